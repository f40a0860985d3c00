//! Tests that need addresses which a machine doesn't have, in a network
//! namespace of their own.

use std::process::Command;

const INSIDE: &str = "PPV2_TEST_NAMESPACE";

/// Has the namespaces' root become an ordinary user, in a user namespace that owns no network.
const WITHOUT_RIGHTS: &str = "unshare --user --map-user=65534 --map-group=65534 \
     setpriv --bounding-set=-all --inh-caps=-all --no-new-privs";

/// Has an ordinary user own a network of its own, with every right in it: for programs that
/// give up the rights of root, which a user namespace does not let them do.
const NOT_AS_ROOT: &str = "unshare --user --map-user=65534 --map-group=65534 --keep-caps --net \
     sh -ec 'ip link set lo up; exec \"$0\" \"$@\"'";

/// Hides what programs keep on this host, and has them leave nothing there.
const ON_ITS_OWN: &str =
    "for folder in /run /var/lib /dev/shm /sys/fs/cgroup; do mount -t tmpfs tmpfs $folder; done";

/// Waits for the routes to IPv6 addresses of this host. The kernel adds them after `ip`
/// has returned, and what is sent there before is lost.
const AWAIT_ROUTES: &str = r#"ip -6 -o addr show dev lo | while read -r _ _ _ address _; do
    until ip -6 route show table local | grep -q "^local ${address%/*} "; do sleep 0.01; done
done"#;

/// Whether the calling test runs inside its namespace. If not, the test is run
/// again inside a new one, after the shell commands `setup`, and its success is
/// asserted; the caller then has nothing left to do.
///
/// A user namespace gives the right to make a network namespace to everybody.
/// Where that is forbidden, root can do without it, and others can't run such
/// tests: they fail, saying so.
#[track_caller]
pub fn enter(test: &str, setup: &str) -> bool {
    enter_by(unshare_flags, "", test, setup)
}

/// As [`enter`], as the ordinary user 65534 without capabilities, who can't gain any.
#[track_caller]
pub fn enter_without_rights(test: &str, setup: &str) -> bool {
    enter_by(unshare_flags, WITHOUT_RIGHTS, test, setup)
}

/// As [`enter`], as the ordinary user 65534 with every right in a network that has nothing
/// but the loopback interface.
#[track_caller]
pub fn enter_not_as_root(test: &str) -> bool {
    enter_by(unshare_flags, NOT_AS_ROOT, test, "")
}

/// As [`enter`], as a root that has other users beside it and can run containers: that of the
/// machine or, for an ordinary user, that of a user namespace with the user's subordinate
/// users. It sees its own processes alone, and nothing outlives the test.
#[track_caller]
pub fn enter_for_containers(test: &str, setup: &str) -> bool {
    enter_by(container_flags, "", test, &format!("{ON_ITS_OWN}\n{setup}"))
}

/// As [`enter`], as the machine's root with all its users. Nobody else can run such tests.
#[track_caller]
pub fn enter_as_root(test: &str) -> bool {
    let is_root = std::env::var_os(INSIDE).is_some() || rustix::process::geteuid().is_root();
    assert!(
        is_root,
        "{test} lays an overlay over the root file system: run it as root"
    );
    enter_by(|| AS_ROOT.to_vec(), "", test, "")
}

#[track_caller]
fn enter_by(flags: fn() -> Vec<&'static str>, command: &str, test: &str, setup: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let script = format!(
        "ip link set lo up\n{setup}\n{AWAIT_ROUTES}\n\
         exec {command} \"$0\" --exact {test} --nocapture"
    );
    let this = std::env::current_exe().unwrap();
    let output = Command::new("unshare")
        .args(flags())
        .args(["sh", "-ec", &script])
        .arg(this)
        .env(INSIDE, test)
        .output()
        .expect("unshare(1) and setpriv(1) are in the Debian package util-linux");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (status, out, err) = (output.status, text(&output.stdout), text(&output.stderr));
    assert!(
        status.success() && out.contains("1 passed"),
        "{test} failed in its namespace: {status}\n{out}\n{err}"
    );
    eprintln!("{out}");
    false
}

/// The path of a test, from that of a function in it; see [`test_name!`](crate::test_name).
pub fn test_path(of_function: &'static str) -> &'static str {
    let (path, _) = of_function.rsplit_once("::").unwrap();
    let (_, path) = path.split_once("::").unwrap();
    path.trim_end_matches("::{{closure}}")
}

/// Namespaces that root makes without a user namespace.
const AS_ROOT: &[&str] = &["--net", "--mount"];

fn unshare_flags() -> Vec<&'static str> {
    const CHOICES: [&[&str]; 2] = [&["--user", "--map-root-user", "--net", "--mount"], AS_ROOT];
    possible(&CHOICES).expect(
        "network namespaces can't be made: run as root, or allow user namespaces \
         (sysctl kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)",
    )
}

fn container_flags() -> Vec<&'static str> {
    const CHOICES: [&[&str]; 2] = [
        AS_ROOT,
        &[
            "--user",
            "--map-root-user",
            "--map-auto",
            "--net",
            "--mount",
        ],
    ];
    let mut flags = possible(&CHOICES).expect(
        "containers can't be run: run as root, or allow user namespaces (see subuid(5)) and \
         install the Debian package uidmap",
    );
    flags.extend(["--pid", "--fork", "--kill-child", "--mount-proc"]);
    flags
}

/// The first of these flags of unshare(1) that this user may use.
fn possible(choices: &[&[&'static str]]) -> Option<Vec<&'static str>> {
    let is_possible = |flags: &&&[&str]| {
        let tried = Command::new("unshare").args(**flags).arg("true").output();
        tried.is_ok_and(|output| output.status.success())
    };
    choices.iter().find(is_possible).map(|flags| flags.to_vec())
}
