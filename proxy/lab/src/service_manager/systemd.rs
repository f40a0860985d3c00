//! systemd as the first process of namespaces of its own: it has no unit but those of its
//! caller, and leaves nothing. The network is the caller's.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Process, eventually, output_of};

/// Where the folder is for systemd and its services.
const INSIDE: &str = "/run/lab";

/// The programs, in Debian's package systemd.
const SYSTEMD: &str = "/lib/systemd/systemd";

/// Enters a control group, which is the root of those of systemd. Every root may mount the second
/// version of control groups, whichever the host uses; but none can be mounted over itself.
const ENTER: &str = r#"
mount -t tmpfs tmpfs /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir "/sys/fs/cgroup/$GROUP"
echo 0 >"/sys/fs/cgroup/$GROUP/cgroup.procs"
exec unshare --mount --pid --fork --kill-child --mount-proc --uts --ipc --cgroup sh -ec "$BEGIN"
"#;

/// Makes a root that is this host's but for /run and control groups, in which systemd begins.
/// The kernel's settings can't be changed from there.
const BEGIN: &str = r#"
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount -t tmpfs tmpfs /run
mkdir "$INSIDE"
mount --bind "$FOLDER" "$INSIDE"
mount -t tmpfs tmpfs /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec env -i PATH="$PATH" container=lab SYSTEMD_UNIT_PATH="$INSIDE" \
    SYSTEMD_GENERATOR_PATH="$INSIDE/none" "$SYSTEMD" --system \
    --unit=lab.target --log-target=null --show-status=no
"#;

/// Removes the group. Its processes leave it a moment after they were killed.
const LEAVE: &str = r#"
mount -t tmpfs tmpfs /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for try in $(seq 100); do
    ! find "/sys/fs/cgroup/$GROUP" -depth -type d -exec rmdir {} + 2>/dev/null || break
    sleep 0.02
done
"#;

/// Units without which systemd does not begin or end.
const UNITS: [&str; 10] = [
    "-.slice",
    "system.slice",
    "init.scope",
    "lab.target",
    "sysinit.target",
    "basic.target",
    "shutdown.target",
    "network-online.target",
    "nss-lookup.target",
    "exit.target",
];

/// A running systemd.
pub struct Systemd {
    folder: tempfile::TempDir,
    /// The name of its control group.
    group: String,
    /// `None` once it was ended.
    process: Option<Process>,
    /// The first process of its namespaces, as this one sees it.
    pid: u32,
}

impl Systemd {
    /// Starts it without a service. Only root can.
    ///
    /// # Panics
    ///
    /// If it does not run here.
    pub fn start() -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "systemd in namespaces of its own mounts control groups: run it as root"
        );
        assert!(
            Path::new(SYSTEMD).exists(),
            "{SYSTEMD} is in the Debian package systemd"
        );
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for name in UNITS {
            fs::write(folder.path().join(name), "[Unit]\nDefaultDependencies=no\n").unwrap();
        }
        let group = format!("ppv2-lab-{}-{}", std::process::id(), fastrand::u32(..));
        let mut command = with_group(&group, ENTER);
        command.env("FOLDER", folder.path());
        command.envs([("BEGIN", BEGIN), ("INSIDE", INSIDE), ("SYSTEMD", SYSTEMD)]);
        let process = Process::start(&mut command);
        let children = format!("/proc/{0}/task/{0}/children", process.pid());
        // The shell has others before.
        let is_systemd = |pid: &&str| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "systemd\n")
        };
        let mut pid = None;
        eventually("systemd to begin", || {
            let children = fs::read_to_string(&children).unwrap_or_default();
            let found = children.split_whitespace().find(is_systemd);
            pid = found.map(|pid| pid.parse().unwrap());
            pid.is_some()
        });
        let it = Self {
            folder,
            group,
            process: Some(process),
            pid: pid.unwrap(),
        };
        eventually("systemd to answer", || {
            it.systemctl(&["is-active", "lab.target"]).0
        });
        it
    }

    /// A folder that systemd and its services see at [`seen`](Self::seen), where units are.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Where they see a file of the folder.
    pub fn seen(name: &str) -> PathBuf {
        Path::new(INSIDE).join(name)
    }

    /// Runs systemctl. Returns whether it succeeded, and what it said.
    pub fn systemctl(&self, arguments: &[&str]) -> (bool, String) {
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--pid", "--target", &self.pid.to_string()]);
        command.args(["systemctl", "--no-pager"]).args(arguments);
        let (code, out, error) = output_of(&mut command);
        (code == Some(0), out + &error)
    }
}

/// A shell in a mount namespace of its own.
fn with_group(group: &str, script: &str) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", script]);
    command.env("GROUP", group);
    command
}

impl Drop for Systemd {
    /// Ends it with all of its services.
    fn drop(&mut self) {
        self.process.take();
        output_of(&mut with_group(&self.group, LEAVE));
    }
}
