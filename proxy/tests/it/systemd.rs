//! What the proxy tells a service manager, by a socket that stands in for systemd's; and
//! the unit, by systemd's own judgement.

use std::fs;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use ppv2_lab::*;

/// A service manager's socket, and what it was told.
struct Manager {
    socket: UnixDatagram,
    name: String,
    _folder: tempfile::TempDir,
}

impl Manager {
    /// Only this user can reach it: a proxy of root's is another one once it is ready.
    fn at_a_path() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        Self::new(socket, path.display().to_string(), folder)
    }

    fn abstract_one(name: &str) -> Self {
        let name = format!("ppv2-test/{name}/{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        Self::new(socket, format!("@{name}"), tempfile::tempdir().unwrap())
    }

    fn new(socket: UnixDatagram, name: String, _folder: tempfile::TempDir) -> Self {
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        Self {
            socket,
            name,
            _folder,
        }
    }

    /// Starts a proxy with this configuration and environment.
    fn start(&self, folder: &tempfile::TempDir, config: &str, more: &[(&str, &str)]) -> Process {
        let file = write(folder, "proxy.toml", config);
        let mut command = Command::new(binary());
        command.args(["run", "--config"]).arg(file);
        command.env("NOTIFY_SOCKET", &self.name);
        Process::start(command.envs(more.iter().copied()))
    }

    /// The next message.
    fn message(&self) -> String {
        let mut message = [0; 4096];
        let length = self.socket.recv(&mut message).expect("a message in time");
        String::from_utf8(message[..length].to_vec()).unwrap()
    }

    /// The next message that has a line that begins so.
    #[track_caller]
    fn wait_for(&self, line: &str) -> String {
        let deadline = Instant::now() + TIMEOUT;
        let mut others = Vec::new();
        loop {
            assert!(Instant::now() < deadline, "no `{line}` among {others:?}");
            let message = self.message();
            if message.lines().any(|one| one.starts_with(line)) {
                return message;
            }
            others.push(message);
        }
    }

    /// What has come until now.
    fn rest(&self) -> Vec<String> {
        self.socket.set_nonblocking(true).unwrap();
        let mut message = [0; 4096];
        let mut all = Vec::new();
        while let Ok(length) = self.socket.recv(&mut message) {
            all.push(String::from_utf8(message[..length].to_vec()).unwrap());
        }
        self.socket.set_nonblocking(false).unwrap();
        all
    }
}

fn config(listener: std::net::SocketAddr, server: std::net::SocketAddr) -> String {
    format!(
        "workers = 2\ndrain_timeout = \"7s\"\n[[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\n\
         [upstream.u]\nservers = [\"{server}\"]\n"
    )
}

fn monotonic_microseconds() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
    u64::try_from(Duration::from(now).as_micros()).unwrap()
}

/// The value of a line `NAME=VALUE`.
fn value<'m>(message: &'m str, name: &str) -> Option<&'m str> {
    let mut lines = message.lines();
    lines.find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
}

fn follows_a_life(manager: &Manager) {
    let (server, folder) = (socket("127.0.0.1"), tempfile::tempdir().unwrap());
    let (listener, upstream) = (address("127.0.0.1"), server.local_addr().unwrap());
    let text = config(listener, upstream);
    let mut proxy = manager.start(&folder, &text, &[]);

    let first = manager.message();
    assert_eq!(
        first,
        "READY=1\nSTATUS=sessions: 0; servers up: 1 of 1\n",
        "{}",
        proxy.log()
    );
    // What is told is true: a datagram passes at once.
    let client = socket("127.0.0.1");
    client.send_to(b"question", listener).unwrap();
    receive(&server);
    let status = manager.wait_for("STATUS");
    assert_eq!(status, "STATUS=sessions: 1; servers up: 1 of 1\n");

    let before = monotonic_microseconds();
    proxy.signal("HUP");
    let reloading = manager.wait_for("RELOADING=1");
    let told: u64 = value(&reloading, "MONOTONIC_USEC")
        .unwrap()
        .parse()
        .unwrap();
    assert!((before..=monotonic_microseconds()).contains(&told));
    let ready = manager.wait_for("READY=1");
    assert!(!ready.contains("rejected"), "{ready}");

    // A rejected reload is over, too, and the status says so until the next.
    write(&folder, "proxy.toml", "nonsense = 1\n");
    proxy.signal("HUP");
    manager.wait_for("RELOADING=1");
    let ready = manager.wait_for("READY=1");
    assert!(value(&ready, "STATUS").unwrap().contains("was rejected"));
    write(&folder, "proxy.toml", &text);
    proxy.signal("HUP");
    manager.wait_for("RELOADING=1");
    assert!(!manager.wait_for("READY=1").contains("rejected"));

    proxy.signal("TERM");
    let stopping = manager.wait_for("STOPPING=1");
    // It may take as long as replies have, and a little more.
    let longest: u64 = value(&stopping, "EXTEND_TIMEOUT_USEC")
        .unwrap()
        .parse()
        .unwrap();
    assert!(longest > 7_000_000, "{longest}");
    // The question waits for its answer: a second signal ends that.
    proxy.signal("TERM");
    let (status, log) = proxy.wait();
    assert!(status.success(), "{log}");
    let rest = manager.rest();
    let all = rest.concat();
    assert!(!all.contains("READY") && !all.contains("WATCHDOG"), "{all}");
}

#[test]
fn ready_reload_and_stop_are_told_by_path() {
    follows_a_life(&Manager::at_a_path());
}

#[test]
fn ready_reload_and_stop_are_told_by_abstract_socket() {
    follows_a_life(&Manager::abstract_one("life"));
}

#[test]
fn a_reload_by_the_admin_address_is_told() {
    let (manager, folder) = (Manager::at_a_path(), tempfile::tempdir().unwrap());
    let admin = address("127.0.0.1");
    let config = format!(
        "[admin]\nlisten = \"{admin}\"\n{}",
        config(address("127.0.0.1"), address("127.0.0.1")).replace("workers = 2\n", "")
    );
    // Keys of the top level come first.
    let config = config.replace("drain_timeout = \"7s\"\n", "");
    let _proxy = manager.start(&folder, &config, &[]);
    manager.wait_for("READY=1");
    let (status, body) = http(admin, "POST /reload", "");
    assert_eq!(status, 200, "{body}");
    manager.wait_for("RELOADING=1");
    manager.wait_for("READY=1");
}

#[test]
fn a_start_that_fails_is_never_ready() {
    let (manager, folder) = (Manager::at_a_path(), tempfile::tempdir().unwrap());
    let listener = address("127.0.0.1");
    let _holder = bind(listener);
    let mut proxy = manager.start(&folder, &config(listener, address("127.0.0.1")), &[]);
    assert_eq!(proxy.wait().0.code(), Some(1));
    assert_eq!(manager.rest(), Vec::<String>::new());
}

#[test]
fn a_service_manager_that_is_gone_or_reads_nothing_stops_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut manager = Manager::at_a_path();
    let server = socket("127.0.0.1");
    let serves = |manager: &Manager, warns: bool| {
        let listener = address("127.0.0.1");
        let text = config(listener, server.local_addr().unwrap());
        let watchdog = [("WATCHDOG_USEC", "3000")];
        let mut proxy = manager.start(&folder, &text, &watchdog);
        proxy.wait_for("ready");
        // Many more messages than wait anywhere.
        std::thread::sleep(Duration::from_millis(600));
        let client = socket("127.0.0.1");
        client.send_to(b"question", listener).unwrap();
        let (_, session) = receive(&server);
        server.send_to(b"answer", session).unwrap();
        assert_eq!(receive(&client).0, b"answer");
        proxy.signal("TERM");
        let (status, log) = proxy.wait();
        assert!(status.success(), "{log}");
        let warned = log.matches("service manager").count();
        assert_eq!(warned, usize::from(warns), "{log}");
    };
    serves(&manager, false);
    for gone in ["/nonexistent/notify", "@ppv2-test/nobody", "vsock:2:1", "x"] {
        manager.name = gone.to_owned();
        serves(&manager, true);
    }
    manager.name = String::new();
    serves(&manager, false);
}

#[test]
fn a_service_manager_that_begins_again_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let mut manager = Manager::abstract_one("again");
    let config = config(address("127.0.0.1"), address("127.0.0.1"));
    let proxy = manager.start(&folder, &config, &[]);
    manager.wait_for("READY=1");
    // The name is free once the socket is gone.
    manager.socket = UnixDatagram::unbound().unwrap();
    manager = Manager::abstract_one("again");
    proxy.signal("HUP");
    manager.wait_for("RELOADING=1");
    manager.wait_for("READY=1");
}

/// A worker that stands still, as one in an endless loop would.
struct Stuck(Pid);

impl Stuck {
    fn worker(proxy: &Process, number: usize) -> Self {
        let threads = format!("/proc/{}/task", proxy.pid());
        let is_it = |thread: &PathBuf| {
            let name = fs::read_to_string(thread.join("comm")).unwrap();
            name.trim_end() == format!("worker{number}")
        };
        let mut threads = fs::read_dir(threads)
            .unwrap()
            .map(|one| one.unwrap().path());
        let thread = threads.find(is_it).unwrap();
        let thread = Pid::from_raw(
            thread
                .file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .parse()
                .unwrap(),
        );
        ptrace::attach(thread).expect("tests may trace their child processes");
        waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
        Self(thread)
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        // It fails if the process has ended.
        let _ = ptrace::detach(self.0, None);
    }
}

#[test]
fn the_watchdog_is_fed_only_while_all_workers_answer() {
    let (manager, folder) = (
        Manager::abstract_one("watchdog"),
        tempfile::tempdir().unwrap(),
    );
    let config = config(address("127.0.0.1"), address("127.0.0.1"));
    let mut proxy = manager.start(&folder, &config, &[("WATCHDOG_USEC", "300000")]);
    manager.wait_for("READY=1");
    for _ in 0..5 {
        manager.wait_for("WATCHDOG=1");
    }
    for number in [0, 1] {
        let stuck = Stuck::worker(&proxy, number);
        proxy.wait_for(&format!("workers do not answer; the service manager restarts the proxy unless they do in time workers=[{number}]"));
        // Those that were told before.
        manager.rest();
        std::thread::sleep(Duration::from_secs(2));
        let fed = manager.rest().concat();
        assert!(!fed.contains("WATCHDOG"), "{fed}");
        drop(stuck);
        manager.wait_for("WATCHDOG=1");
    }
    proxy.wait_for("all workers answer again");
}

#[test]
fn a_watchdog_of_another_process_is_not_fed() {
    let (manager, folder) = (Manager::at_a_path(), tempfile::tempdir().unwrap());
    let config = config(address("127.0.0.1"), address("127.0.0.1"));
    for more in [
        &[("WATCHDOG_USEC", "1000"), ("WATCHDOG_PID", "1")][..],
        &[("WATCHDOG_USEC", "0")],
        &[("WATCHDOG_USEC", "soon")],
        &[],
    ] {
        let proxy = manager.start(&folder, &config, more);
        manager.wait_for("READY=1");
        std::thread::sleep(Duration::from_millis(300));
        let told = manager.rest().concat();
        assert!(!told.contains("WATCHDOG"), "{more:?}: {told}");
        drop(proxy);
    }
}

fn packaging() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/systemd")
}

/// systemd-analyze with copies of the units whose program exists, as on a host that has the
/// proxy.
fn analyze(arguments: &[&str], drop_in: bool) -> (Option<i32>, String) {
    let folder = tempfile::tempdir().unwrap();
    let unit = fs::read_to_string(packaging().join("ppv2-proxy.service")).unwrap();
    let start = "ExecStart=ppv2-proxy ";
    assert!(unit.contains(start));
    let unit = unit.replace(start, &format!("ExecStart={} ", binary().display()));
    let unit = write(&folder, "ppv2-proxy.service", &unit);
    let socket = "ppv2-proxy.socket";
    fs::copy(packaging().join(socket), folder.path().join(socket)).unwrap();
    if drop_in {
        let drop_ins = folder.path().join("ppv2-proxy.service.d");
        fs::create_dir(&drop_ins).unwrap();
        let name = "before-253.conf";
        fs::copy(packaging().join(name), drop_ins.join(name)).unwrap();
    }
    let mut command = Command::new("systemd-analyze");
    command.args(arguments).arg(unit);
    if arguments.contains(&"verify") {
        command.arg(folder.path().join(socket));
    }
    // What this host runs is no matter.
    command.env("SYSTEMD_LOG_LEVEL", "warning");
    let output = command
        .output()
        .expect("systemd-analyze judges units: Debian package systemd");
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

#[test]
fn systemd_understands_the_units() {
    for drop_in in [false, true] {
        let (code, said) = analyze(&["verify", "--man=no"], drop_in);
        assert_eq!(code, Some(0), "{said}");
        // systemd before 253 says that it ignores the type that the unit names last.
        let of_the_unit = said.lines().filter(|line| {
            line.contains("ppv2-proxy") && !line.contains("service type, ignoring: notify-reload")
        });
        assert_eq!(of_the_unit.collect::<Vec<_>>(), Vec::<&str>::new());
    }
}

/// What a proxy without sessions has for itself: its program, which others may share, is not
/// in it, and is larger in a debug build.
#[test]
fn an_idle_proxy_takes_little_memory() {
    let admin = address("127.0.0.1");
    let options = ["--workers", "2", "--admin", &admin.to_string()];
    let proxy = proxy_between(address("127.0.0.1"), address("127.0.0.1"), &options);
    let status = fs::read_to_string(format!("/proc/{}/status", proxy.pid())).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let taken: u64 = line
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    assert!(taken < 6144, "{status}");
}

#[test]
fn the_unit_lets_the_proxy_do_little() {
    // The exposure is given in tenths.
    let (code, said) = analyze(&["security", "--offline=true", "--threshold=15"], false);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("Overall exposure level"), "{said}");
}

/// The unit forbids capset(2), by which the proxy drops what its configuration does not need:
/// here the capability for ports below 1024.
#[test]
fn the_proxy_starts_where_the_unit_forbids_to_drop_capabilities() {
    let folder = tempfile::tempdir().unwrap();
    let is_root = rustix::process::geteuid().is_root();
    let mut program = binary().to_owned();
    let mut command = Command::new("strace");
    if is_root {
        // As the unit starts it, which needs a program that this user can reach.
        fs::set_permissions(
            folder.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )
        .unwrap();
        program = folder.path().join("ppv2-proxy");
        fs::copy(binary(), &program).unwrap();
        command = Command::new("setpriv");
        command.args(["--reuid=54321", "--regid=54321", "--clear-groups"]);
        for set in ["inh-caps", "ambient-caps", "bounding-set"] {
            command.arg(format!("--{set}=-all,+net_bind_service"));
        }
        command.arg("strace");
    }
    let inject = "inject=capset:error=EPERM";
    command.args([
        "-D",
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        "trace=capset",
        "-e",
        inject,
    ]);
    let (listener, server) = (address("127.0.0.1"), socket("127.0.0.1"));
    let file = write(
        &folder,
        "proxy.toml",
        &config(listener, server.local_addr().unwrap()),
    );
    command.arg(program).args(["run", "--config"]).arg(file);
    let mut proxy = Process::start(&mut command);
    proxy.wait_for("ready");
    let kept = match is_root {
        true => "capabilities=[\"CAP_NET_BIND_SERVICE\"]",
        false => "capabilities=[]",
    };
    assert!(proxy.log().contains(kept), "{}", proxy.log());
    socket("127.0.0.1").send_to(b"question", listener).unwrap();
    receive(&server);
    // With -D, this process is the proxy.
    proxy.signal("TERM");
    proxy.signal("TERM");
    let (status, log) = proxy.wait();
    assert!(status.success(), "{log}");
}
