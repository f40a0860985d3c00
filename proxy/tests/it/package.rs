//! The Debian package: installed, used, upgraded and purged by dpkg on this host's root, of
//! which an overlay takes every change.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use ppv2_lab::namespace::enter_as_root;
use ppv2_lab::*;

/// What stays when a package is purged: dpkg's own notes, and the user (Debian's policy keeps
/// users, whose files may be anywhere).
const STAYS: [&str; 10] = [
    "etc/.pwd.lock",
    "etc/group",
    "etc/group-",
    "etc/gshadow",
    "etc/gshadow-",
    "etc/passwd",
    "etc/passwd-",
    "etc/shadow",
    "etc/shadow-",
    "var/log/dpkg.log",
];

/// Stands in for systemd: it notes what it is asked for.
const SYSTEMCTL: &str = "#!/bin/sh\necho \"$*\" >>/run/systemctl.log\n";

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Runs a command and returns what it printed.
#[track_caller]
fn run(command: &mut Command) -> String {
    let output = command.output();
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(output.status.success(), "{command:?}: {text}");
    text
}

/// The package of `make dist`, with the binary and the libraries of the tests in it.
fn build(folder: &Path) -> PathBuf {
    let target = folder.join("target");
    fs::create_dir_all(target.join("release")).unwrap();
    let program = folder.join("ppv2-proxy");
    run(Command::new("strip")
        .arg("-o")
        .args([&program, &binary().to_owned()]));
    run(Command::new(repository().join("proxy/packaging/install"))
        .args([&program, preload_library(), preload_library_musl()])
        .args([&target.join("release/root"), Path::new("/usr")]));

    let tool = repository().join("target/tools/bin/cargo-deb");
    assert!(tool.exists(), "{tool:?} is missing; `make unit` builds it");
    let package = folder.join("first.deb");
    // Little compression: the package is used once.
    run(Command::new(tool)
        .args(["deb", "--no-build", "--no-strip", "--locked", "--fast"])
        .args(["--compress-type", "gz", "--compress-system"])
        .args(["--deb-version", "0.1.0-1", "--manifest-path"])
        .arg(repository().join("proxy/Cargo.toml"))
        .arg("--output")
        .arg(&package)
        .env("CARGO_TARGET_DIR", &target));
    package
}

/// The next version of a package, which comes with another configuration.
fn next(folder: &Path, package: &Path) -> PathBuf {
    let content = folder.join("content");
    run(Command::new("dpkg-deb").arg("-R").args([package, &content]));
    let edit = |name: &str, change: &dyn Fn(&str) -> String| {
        let path = content.join(name);
        let text = fs::read_to_string(&path).unwrap();
        let changed = change(&text);
        assert_ne!(text, changed);
        fs::write(path, changed).unwrap();
    };
    edit("DEBIAN/control", &|text| text.replace("0.1.0-1", "0.2.0-1"));
    edit("etc/ppv2/proxy.toml", &|text| format!("{text}# New.\n"));
    let next = folder.join("next.deb");
    run(Command::new("dpkg-deb")
        .args(["-b", "-Znone"])
        .args([&content, &next]));
    next
}

/// Has a folder of devices of its own: what is removed there is not this host's.
const DEVICES: &str = "mount -t tmpfs tmpfs \"$0\"
    for device in null zero full random urandom tty; do
        touch \"$0/$device\"
        mount --bind \"/dev/$device\" \"$0/$device\"
    done";

/// The root that packages are installed on: this host's, and what has changed on it.
struct Root {
    root: PathBuf,
    changes: PathBuf,
    folder: tempfile::TempDir,
}

impl Drop for Root {
    /// Takes all mounts away, before the folder and everything in it is removed.
    fn drop(&mut self) {
        run(Command::new("umount")
            .args(["--lazy"])
            .arg(self.folder.path()));
    }
}

impl Root {
    /// In a mount namespace of the caller.
    fn new() -> Self {
        let own = tempfile::tempdir().unwrap();
        let folder = own.path();
        let mount = |arguments: &[&str], target: &Path| {
            run(Command::new("mount").args(arguments).arg(target));
        };
        let tmpfs = ["-t", "tmpfs", "tmpfs"];
        // An overlay's folders can't be on what it is laid over.
        mount(&tmpfs, folder);
        let [root, changes, work] = ["root", "changes", "work"].map(|name| folder.join(name));
        for folder in [&root, &changes, &work] {
            fs::create_dir(folder).unwrap();
        }
        let layers = format!(
            "lowerdir=/,upperdir={},workdir={}",
            changes.display(),
            work.display()
        );
        mount(&["-t", "overlay", "overlay", "-o", &layers], &root);
        mount(&["--bind", "-o", "ro", "/proc"], &root.join("proc"));
        run(Command::new("sh")
            .args(["-ec", DEVICES])
            .arg(root.join("dev")));
        mount(&tmpfs, &root.join("run"));
        mount(&tmpfs, &root.join("tmp"));
        // Maintainer scripts look for the first, to know whether systemd runs.
        for folder in ["run/systemd/system", "run/bin"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        let systemctl = root.join("run/bin/systemctl");
        fs::write(&systemctl, SYSTEMCTL).unwrap();
        fs::set_permissions(&systemctl, fs::Permissions::from_mode(0o755)).unwrap();
        // What forbids services to start and stop, in containers and while tests are set up;
        // and what has man-db make its index of all pages anew.
        for name in ["usr/sbin/policy-rc.d", "var/lib/man-db/auto-update"] {
            let _ = fs::remove_file(root.join(name));
        }
        // Of a proxy that runs on this host.
        for name in ["var/log/ppv2-proxy", "var/log/private/ppv2-proxy"] {
            let _ = fs::remove_dir_all(root.join(name));
        }
        Self {
            root,
            changes,
            folder: own,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// A command on this root, by this user.
    fn command(&self, user: &str, program: &str) -> Command {
        let mut command = Command::new("chroot");
        command.arg(format!("--userspec={user}"));
        command.arg(&self.root).arg(program);
        command.env("PATH", "/run/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    #[track_caller]
    fn root(&self, program: &str, arguments: &[&str]) -> String {
        run(self.command("root:root", program).args(arguments))
    }

    /// Has dpkg install a package as an unattended upgrade does.
    #[track_caller]
    fn install(&self, package: &Path) {
        fs::copy(package, self.path("tmp/package.deb")).unwrap();
        let options = ["--force-confdef", "--force-confold"];
        let arguments = [&options[..], &["-i", "/tmp/package.deb"]].concat();
        self.root("dpkg", &arguments);
    }

    /// What systemd was asked for about the service since the last call.
    fn asked(&self) -> Vec<String> {
        let log = self.path("run/systemctl.log");
        let asked = fs::read_to_string(&log).unwrap_or_default();
        let _ = fs::remove_file(log);
        let mut asked: Vec<_> = asked.lines().map(str::to_owned).collect();
        asked.retain(|line| !line.contains("daemon-reload"));
        asked
    }

    /// The files that have changed, and the folders that are new.
    fn changed(&self) -> BTreeSet<String> {
        let mut changed = BTreeSet::new();
        let mut folders = vec![self.changes.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let (entry, path) = entry
                    .map(|entry| (entry.file_type(), entry.path()))
                    .unwrap();
                let name = path.strip_prefix(&self.changes).unwrap();
                let is_folder = entry.unwrap().is_dir();
                if is_folder {
                    folders.push(path.clone());
                }
                if !is_folder || !Path::new("/").join(name).exists() {
                    changed.insert(name.display().to_string());
                }
            }
        }
        changed
    }

    /// Starts the proxy as the unit does.
    fn start(&self) -> Process {
        let mut command = self.command("ppv2-proxy:ppv2-proxy", "/usr/bin/ppv2-proxy");
        command.args(["run", "--config", "/etc/ppv2/proxy.toml"]);
        let mut proxy = Process::start(&mut command);
        proxy.wait_for("ready");
        proxy
    }
}

/// One datagram through the proxy, which has the header of the client.
fn passes_a_datagram() {
    let server = bind("127.0.0.1:5301".parse().unwrap());
    let client = socket("127.0.0.1");
    let listener: std::net::SocketAddr = "127.0.0.1:5300".parse().unwrap();
    client.send_to(b"question", listener).unwrap();
    let (datagram, proxy) = receive(&server);
    let (source, destination, payload) = read_header(&datagram);
    assert_eq!(source, client.local_addr().unwrap());
    assert_eq!(destination, listener);
    assert_eq!(payload, b"question");
    server.send_to(b"answer", proxy).unwrap();
    assert_eq!(receive(&client).0, b"answer");
}

#[test]
fn a_debian_package_is_installed_upgraded_and_purged() {
    if !enter_as_root(test_name!()) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let first = build(folder.path());
    let second = next(folder.path(), &first);
    let root = Root::new();
    let before = root.changed();

    root.install(&first);
    // An operator starts it once it has a configuration.
    assert_eq!(root.asked(), Vec::<String>::new());
    assert!(
        !root
            .path("etc/systemd/system/multi-user.target.wants/ppv2-proxy.service")
            .exists()
    );
    let user = root.root("getent", &["passwd", "ppv2-proxy"]);
    assert!(user.trim_end().ends_with(":/:/usr/sbin/nologin"), "{user}");
    // Whatever was installed is as the package has it.
    assert_eq!(root.root("dpkg", &["--verify", "ppv2-proxy"]), "");
    for name in [
        "usr/share/man/man1/ppv2-proxy.1.gz",
        "usr/share/man/man1/ppv2-proxy-host-setup.1.gz",
        "usr/share/bash-completion/completions/ppv2-proxy",
        "usr/share/zsh/vendor-completions/_ppv2-proxy",
        "usr/share/fish/vendor_completions.d/ppv2-proxy.fish",
        "usr/share/doc/ppv2-proxy/copyright",
        "usr/share/doc/ppv2-proxy/examples/dns.toml",
        "usr/lib/ppv2/libppv2_preload.so",
        "usr/lib/ppv2/libppv2_preload_musl.so",
        "usr/share/doc/ppv2-proxy/examples/bird/ppv2-bird",
        "usr/share/doc/ppv2-proxy/examples/kubernetes/base/deployment.yaml",
        "usr/lib/systemd/system/ppv2-proxy.service",
    ] {
        assert!(
            root.path(name)
                .metadata()
                .is_ok_and(|file| file.len() > 100),
            "{name}"
        );
    }
    let report = root.root("ppv2-proxy", &["check", "--config", "/etc/ppv2/proxy.toml"]);
    assert!(
        report.starts_with("listener example: 127.0.0.1:5300"),
        "{report}"
    );
    assert!(!report.contains("warning"), "{report}");

    // Any program loads the library, which `wrap` finds in its place.
    let wrap = [
        "wrap",
        "--trusted",
        "192.0.2.1",
        "--",
        "cat",
        "/proc/self/maps",
    ];
    let maps = root.root("ppv2-proxy", &wrap);
    assert!(
        maps.contains(" /usr/lib/ppv2/libppv2_preload.so\n"),
        "{maps}"
    );

    // The operator changes the configuration, adds a secret, and enables the service.
    let config = root.path("etc/ppv2/proxy.toml");
    let own = fs::read_to_string(&config).unwrap().replace(
        "listen = \"127.0.0.1:9901\"",
        "listen = \"127.0.0.1:9901\"\ntoken_file = \"/etc/ppv2/admin.token\"",
    );
    fs::write(&config, &own).unwrap();
    let secret = root.path("etc/ppv2/admin.token");
    fs::write(&secret, "0123456789abcdef0123456789abcdef\n").unwrap();
    root.root("chown", &["ppv2-proxy", "/etc/ppv2/admin.token"]);
    root.root("chmod", &["400", "/etc/ppv2/admin.token"]);
    root.root("/usr/bin/systemctl", &["--root=/", "enable", "ppv2-proxy"]);
    let mut proxy = root.start();
    passes_a_datagram();

    // An upgrade leaves the old process to systemd, which has been asked to restart it.
    root.install(&second);
    assert_eq!(root.asked(), ["try-restart ppv2-proxy.service"]);
    assert_eq!(fs::read_to_string(&config).unwrap(), own);
    let offered = fs::read_to_string(root.path("etc/ppv2/proxy.toml.dpkg-dist")).unwrap();
    assert!(offered.ends_with("# New.\n"), "{offered}");
    passes_a_datagram();
    proxy.signal("TERM");
    assert!(proxy.wait().0.success());
    let proxy = root.start();
    passes_a_datagram();
    drop(proxy);

    // A package that is removed leaves its configuration, which the next one takes up.
    root.root("dpkg", &["--remove", "ppv2-proxy"]);
    assert_eq!(root.asked(), ["stop ppv2-proxy.service"]);
    assert_eq!(fs::read_to_string(&config).unwrap(), own);
    for name in [
        "usr/bin/ppv2-proxy",
        "usr/lib/ppv2",
        "usr/lib/systemd/system/ppv2-proxy.service",
    ] {
        assert!(!root.path(name).exists(), "{name}");
    }
    let logs = root.path("var/log/ppv2-proxy");
    fs::create_dir(&logs).unwrap();
    fs::write(logs.join("access.log"), "a session\n").unwrap();

    fs::remove_file(secret).unwrap();
    root.root("dpkg", &["--purge", "ppv2-proxy"]);
    let left: Vec<_> = root.changed().difference(&before).cloned().collect();
    let left = left.into_iter().filter(|name| {
        let is_dpkgs = name.starts_with("var/lib/dpkg/") || name.starts_with("var/cache/man/");
        !is_dpkgs && !STAYS.contains(&name.as_str())
    });
    assert_eq!(left.collect::<Vec<_>>(), Vec::<String>::new());
}
