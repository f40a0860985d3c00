//! Another process goes on with the sockets and sessions of one that runs: nothing is lost,
//! no session moves, and whatever fails leaves all to the process that had it.

mod ended;
mod failed;
mod hostile;
mod relay;

use std::collections::BTreeSet;
use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use ppv2_lab::continuity::{Clients, Load, Outcome, Server};
use ppv2_lab::*;

/// Clients of each listener, and datagrams a second of all.
const CLIENTS: usize = 50;
const RATE: u32 = 2_000;

/// A listener with its upstream, and what its clients do.
struct Service {
    name: &'static str,
    bind: SocketAddr,
    servers: Vec<Server>,
    /// Keys of the listener, and of the upstream.
    keys: [&'static str; 2],
    clients: Clients,
}

impl Service {
    fn new(name: &'static str, ip: &str, keys: [&'static str; 2]) -> Self {
        let bind = address(ip);
        let is_tagged = keys[1].contains("tagged");
        let servers = (0..2).map(|_| Server::start(address(ip), is_tagged));
        Self {
            name,
            bind,
            servers: servers.collect(),
            keys,
            clients: Clients::new(bind, CLIENTS),
        }
    }

    /// A session ends, or another begins, while the client goes on.
    fn of_short_sessions(mut self) -> Self {
        self.clients.one_session = false;
        self
    }

    fn behind_a_proxy(mut self) -> Self {
        self.clients.in_front = true;
        self
    }

    fn config(&self) -> String {
        let Self { name, bind, .. } = self;
        let [listener, upstream] = self.keys;
        let servers = self.servers.iter().map(|server| server.address.to_string());
        let servers: Vec<_> = servers.collect();
        format!(
            "[[listener]]\nname = \"{name}\"\nbind = [\"{bind}\"]\nupstream = \"{name}\"\n{listener}\n\
             [upstream.{name}]\nhash_on = \"client_addr\"\nservers = {servers:?}\n{upstream}\n"
        )
    }
}

/// Everything that a session may be.
fn all_kinds() -> Vec<Service> {
    let first = "header = { emit = \"first\" }";
    let network = "source = [\"127.64.0.0/10\"]";
    let accept = "accept = { from = [\"127.0.0.0/8\"], remember = { idle = \"1m\" } }";
    vec![
        Service::new("own-v4", "127.0.0.1", ["", ""]),
        Service::new("own-v6", "::1", ["", ""]),
        Service::new("first-v4", "127.0.0.1", ["", first]),
        Service::new("first-v6", "::1", ["", first]),
        Service::new("network", "127.0.0.1", ["", network]),
        Service::new("tagged", "127.0.0.1", ["", "replies = \"tagged\""]),
        Service::new(
            "bounded",
            "127.0.0.1",
            ["per_client = { sessions = 1000, rate = 100000 }", ""],
        ),
        Service::new("remembered", "127.0.0.1", [accept, ""]).behind_a_proxy(),
        Service::new("responses", "127.0.0.1", ["responses = 1", ""]).of_short_sessions(),
        Service::new("requests", "127.0.0.1", ["requests = 3", ""]).of_short_sessions(),
    ]
}

/// Services, and where the processes that serve them have their files.
struct Setup {
    services: Vec<Service>,
    admin: SocketAddr,
    folder: tempfile::TempDir,
    /// The name of the socket on which upgrades are asked for.
    socket: &'static str,
}

impl Setup {
    fn new(services: Vec<Service>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        // Started as root, the proxy is another user, whose socket is in there.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        Self {
            services,
            admin: address("127.0.0.1"),
            folder,
            socket: "upgrade.sock",
        }
    }

    /// Sessions with sockets of their own, of both families.
    fn simple() -> Self {
        let service = |name, ip| Service::new(name, ip, ["", ""]);
        Self::new(vec![service("v4", "127.0.0.1"), service("v6", "::1")])
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join(self.socket)
    }

    fn config(&self, workers: usize) -> String {
        let services = self.services.iter().map(Service::config);
        format!(
            "workers = {workers}\ndrain_timeout = \"1s\"\n[upgrade]\nsocket = {:?}\n[admin]\nlisten = \"{}\"\n{}",
            self.socket(),
            self.admin,
            services.collect::<String>()
        )
    }

    fn start(&self, workers: usize) -> Process {
        proxy_with(&self.folder, &self.config(workers))
    }

    /// The command of a process that takes over, with another configuration.
    fn taking(&self, config: &str) -> Command {
        self.taking_from(&self.socket(), config)
    }

    fn taking_from(&self, socket: &Path, config: &str) -> Command {
        let file = write(&self.folder, "next.toml", config);
        let mut command = Command::new(binary());
        command.args(["run", "--config"]).arg(file);
        command.arg("--takeover").arg(socket);
        command
    }

    /// Has another process take over. The one before must end with success.
    #[track_caller]
    fn upgrade(&self, old: &mut Process, config: &str) {
        self.upgrade_by(old, &mut self.taking(config));
    }

    #[track_caller]
    fn upgrade_by(&self, old: &mut Process, taking: &mut Command) {
        let mut new = Process::start(taking);
        new.wait_for("ready");
        let (status, log) = old.wait();
        assert!(status.success(), "{status}: {log}");
        *old = new;
    }

    /// Has another process try to take over, which must fail with 1. The one before must go
    /// on. Returns what the other one said.
    #[track_caller]
    fn fails(&self, old: &mut Process, command: &mut Command) -> String {
        let (status, said) = Process::start(command).wait();
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(!old.has_ended(), "{}", old.log());
        said
    }

    fn load(&self, rate: u32) -> Load {
        let groups: Vec<_> = self
            .services
            .iter()
            .map(|one| one.clients.clone())
            .collect();
        let load = Load::start(&groups, rate);
        load.wait_for_all();
        load
    }

    fn sessions(&self) -> u64 {
        let of = |one: &Service| {
            let name = format!("ppv2_sessions{{listener=\"{}\"}}", one.name);
            metric(self.admin, &name)
        };
        self.services.iter().map(of).sum()
    }
}

/// The inodes of the process's sockets.
fn open_sockets(process: &Process) -> BTreeSet<u64> {
    let descriptors = fs::read_dir(format!("/proc/{}/fd", process.pid())).unwrap();
    let targets = descriptors.filter_map(|one| fs::read_link(one.unwrap().path()).ok());
    let inode = |target: PathBuf| {
        let inode = target.to_str()?.strip_prefix("socket:[")?;
        inode.strip_suffix(']')?.parse().ok()
    };
    targets.filter_map(inode).collect()
}

#[track_caller]
fn clean(load: Load) -> Outcome {
    load.wait_for_a_round();
    let outcome = load.finish();
    outcome.assert_clean();
    outcome
}

#[test]
fn sessions_go_on_in_another_process() {
    let setup = Setup::new(all_kinds());
    let mut proxy = setup.start(2);
    let load = setup.load(RATE);
    let config = setup.config(2);
    for _ in 0..3 {
        setup.upgrade(&mut proxy, &config);
        load.wait_for_a_round();
    }
    // The admin address is that of before.
    assert!(setup.sessions() > 0);
    let outcome = clean(load);
    println!("{outcome}");
}

#[test]
fn sessions_go_on_with_other_numbers_of_workers() {
    let setup = Setup::new(all_kinds());
    let mut proxy = setup.start(1);
    let load = setup.load(RATE);
    for workers in [2, 3, 1, 2] {
        setup.upgrade(&mut proxy, &setup.config(workers));
        load.wait_for_a_round();
    }
    clean(load);
}

#[test]
fn new_clients_are_served_after_a_takeover() {
    let setup = Setup::simple();
    let mut proxy = setup.start(1);
    for workers in [3, 1] {
        setup.upgrade(&mut proxy, &setup.config(workers));
        clean(setup.load(RATE));
    }
    let (status, said) = http(setup.admin, "POST /reload", "");
    assert_eq!(status, 200, "{said}");
    proxy.signal("TERM");
    let (status, log) = proxy.wait();
    assert!(status.success() && log.contains("stopped"), "{log}");
    assert!(!setup.socket().exists(), "the socket's file is left");
}

#[test]
fn what_waits_in_sockets_is_not_lost() {
    let setup = Setup::simple();
    let mut proxy = setup.start(2);
    let mut waiting = Vec::new();
    let client = |to: SocketAddr| {
        let client = socket(&to.ip().to_string());
        client.connect(to).unwrap();
        client
    };
    for service in &setup.services {
        for _ in 0..20 {
            waiting.push(client(service.bind));
        }
    }
    // The process stands still while they write, and goes on to hand over.
    proxy.pause();
    for number in 0..5 {
        for client in &waiting {
            client.send(format!("{number} ").as_bytes()).unwrap();
        }
    }
    let mut new = Process::start(&mut setup.taking(&setup.config(2)));
    proxy.signal("CONT");
    new.wait_for("ready");
    assert!(proxy.wait().0.success());
    for client in &waiting {
        let mut came: Vec<_> = (0..5).map(|_| receive(client).0).collect();
        came.sort();
        for (number, came) in came.into_iter().enumerate() {
            let came = String::from_utf8(came).unwrap();
            assert!(came.ends_with(&format!(" {number} ")), "{came}");
        }
    }
}

#[test]
fn another_configuration_is_taken_up_with_the_sessions() {
    let mut setup = Setup::simple();
    let [gone, other] = [address("127.0.0.1"), address("127.0.0.1")];
    let extra = |bind: SocketAddr| {
        let server = setup.services[0].servers[0].address;
        format!(
            "[[listener]]\nname = \"extra-{}\"\nbind = [\"{bind}\"]\nupstream = \"extra\"\n\
             [upstream.extra]\nservers = [\"{server}\"]\n",
            bind.port()
        )
    };
    let before = setup.config(2) + &extra(gone);
    let mut proxy = proxy_with(&setup.folder, &before);
    let load = setup.load(RATE);
    let old_client = socket("127.0.0.1");
    old_client.send_to(b"1 ", gone).unwrap();
    receive(&old_client);

    // One listener goes, another comes.
    setup.upgrade(&mut proxy, &(setup.config(2) + &extra(other)));
    let new_client = socket("127.0.0.1");
    new_client.send_to(b"1 ", other).unwrap();
    assert_eq!(receive(&new_client).1, other);
    eventually(
        "the address of the listener that is gone to be free",
        || UdpSocket::bind(gone).is_ok(),
    );

    // A server of each upstream goes.
    let left: Vec<_> = setup
        .services
        .iter_mut()
        .map(|service| service.servers.remove(0))
        .collect();
    setup.upgrade(&mut proxy, &setup.config(2));
    load.wait_for_a_round();
    let outcome = load.finish();
    assert_eq!((outcome.lost, outcome.wrong), (0, 0), "{outcome}");
    drop(left);
}

#[test]
fn what_no_reload_changes_is_changed_by_a_takeover() {
    let mut setup = Setup::simple();
    let mut proxy = setup.start(2);
    let load = setup.load(RATE);
    let (old_socket, old_admin) = (setup.socket(), setup.admin);
    (setup.socket, setup.admin) = ("other.sock", address("127.0.0.1"));
    let config = format!("reuse_port = false\n{}", setup.config(1));
    setup.upgrade_by(&mut proxy, &mut setup.taking_from(&old_socket, &config));
    assert!(!old_socket.exists(), "the former socket's file is left");
    assert!(std::net::TcpListener::bind(old_admin).is_ok());
    assert_eq!(setup.sessions(), 2 * CLIENTS as u64);
    load.wait_for_a_round();
    let config = format!("reuse_port = true\n{}", setup.config(2));
    setup.upgrade(&mut proxy, &config);
    clean(load);
    let (status, said) = http(setup.admin, "POST /reload", "");
    assert_eq!(status, 200, "{said}");
}

#[test]
fn a_new_process_that_is_killed_leaves_all_to_the_old_one() {
    let setup = Setup::new(all_kinds());
    let mut proxy = setup.start(2);
    let mut load = setup.load(RATE);
    let config = setup.config(2);
    let began = Instant::now();
    setup.upgrade(&mut proxy, &config);
    let whole = u64::try_from(began.elapsed().as_micros()).unwrap();
    let (mut killed, mut late) = (0, 0);
    for _ in 0..12 {
        let new = Process::start(&mut setup.taking(&config));
        std::thread::sleep(Duration::from_micros(fastrand::u64(..whole)));
        new.signal("KILL");
        drop(new);
        load.wait_for_a_round();
        // It ends a moment after it has let go.
        if !proxy.has_ended() && !proxy.log().contains("handed over") {
            killed += 1;
            continue;
        }
        // The new process served already, and was killed as any may be.
        let (status, log) = proxy.wait();
        assert!(status.success() && log.contains("handed over"), "{log}");
        late += 1;
        drop(load.finish());
        proxy = setup.start(2);
        load = setup.load(RATE);
    }
    println!("{killed} killed before they served, {late} after");
    clean(load);
    // It can still hand over.
    let load = setup.load(RATE);
    setup.upgrade(&mut proxy, &config);
    clean(load);
}

#[test]
fn a_configuration_that_can_not_be_run_leaves_all_to_the_old_process() {
    let setup = Setup::simple();
    let mut proxy = setup.start(2);
    let load = setup.load(RATE);
    let good = setup.config(2);
    let taken = bind(address("127.0.0.1"));
    let taken = taken.local_addr().unwrap();
    let listens = format!(
        "[[listener]]\nname = \"taken\"\nbind = [\"{taken}\"]\nupstream = \"v4\"\nmode = \"plain\"\n"
    );
    for (config, why) in [
        (format!("{good}{listens}"), "is in use"),
        (
            format!(
                "{good}{}",
                listens.replace(&taken.to_string(), "192.0.2.1:5300")
            ),
            "192.0.2.1",
        ),
    ] {
        let said = setup.fails(&mut proxy, &mut setup.taking(&config));
        assert!(said.contains(why), "{said}");
    }
    let mut wrong = setup.taking(&good.replace("workers", "werkers"));
    let (status, said) = Process::start(&mut wrong).wait();
    assert_eq!(status.code(), Some(2), "{said}");
    assert!(said.contains("unknown key `werkers`"), "{said}");
    clean(load);
    assert!(!proxy.has_ended());
}

#[test]
fn a_takeover_without_a_process_fails() {
    let setup = Setup::simple();
    let config = setup.config(2);
    for name in ["nowhere.sock", "next.toml"] {
        let path = setup.folder.path().join(name);
        let (status, said) = Process::start(&mut setup.taking_from(&path, &config)).wait();
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(said.contains(name), "{said}");
    }
}

/// Sockets that no session has any more get late replies for a while, which no other may get.
#[test]
fn what_no_session_has_stays_open_over_several_takeovers() {
    let mut setup = Setup::simple();
    let mut proxy = setup.start(2);
    let gone = setup.services.pop().unwrap();
    let before = open_sockets(&proxy);
    let client = socket("::1");
    client.send_to(b"1 ", gone.bind).unwrap();
    receive(&client);
    let session: BTreeSet<_> = open_sockets(&proxy).difference(&before).copied().collect();
    assert_eq!(session.len(), 1);
    for _ in 0..2 {
        setup.upgrade(&mut proxy, &setup.config(2));
        assert!(open_sockets(&proxy).is_superset(&session));
    }
}

#[test]
fn a_takeover_if_any_process_runs_is_a_start_if_none_does() {
    let setup = Setup::simple();
    let config = setup.config(2);
    let start = || {
        let mut command = setup.taking(&config);
        let mut proxy = Process::start(command.arg("--if-running"));
        proxy.wait_for("ready");
        proxy
    };
    // There is no file, a process, and a file without process.
    let mut first = start();
    let second = start();
    let (status, log) = first.wait();
    assert!(status.success() && !log.contains("no upgrade"), "{log}");
    assert!(second.log().contains("took over"), "{}", second.log());
    drop(second);
    assert!(setup.socket().exists());
    let third = start();
    assert!(!third.log().contains("took over"), "{}", third.log());
    clean(setup.load(RATE / 4));
}

#[test]
fn of_two_takeovers_at_once_one_process_is_left() {
    let setup = Setup::simple();
    let mut proxy = setup.start(2);
    let load = setup.load(RATE);
    for _ in 0..3 {
        let mut command = setup.taking(&setup.config(2));
        let mut both = vec![Process::start(&mut command), Process::start(&mut command)];
        // One fails with 1. Or it takes over in its turn, and the other one ends with 0.
        let mut ended = None;
        eventually("one of them to end", || {
            ended = both.iter_mut().position(Process::has_ended);
            ended.is_some()
        });
        let (status, log) = both.remove(ended.unwrap()).wait();
        assert!(matches!(status.code(), Some(0 | 1)), "{status}: {log}");
        let mut left = both.remove(0);
        left.wait_for("ready");
        let (status, log) = proxy.wait();
        assert!(status.success(), "{status}: {log}");
        proxy = left;
        load.wait_for_a_round();
    }
    clean(load);
}

#[test]
fn processes_of_other_users_are_refused() {
    let setup = Setup::simple();
    let mut proxy = setup.start(2);
    let load = setup.load(RATE);
    // The operator has opened the socket to others.
    let everybody = fs::Permissions::from_mode(0o666);
    fs::set_permissions(setup.socket(), everybody).unwrap();
    let config = setup.config(2);
    let mut command = if rustix::process::geteuid().is_root() {
        setup.taking(&format!("user = \"daemon\"\n{config}"))
    } else {
        let taking = setup.taking(&config);
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-auto", "--setuid=1"]);
        command.arg(taking.get_program()).args(taking.get_args());
        command
    };
    let said = setup.fails(&mut proxy, &mut command);
    assert!(said.contains("run both as the same user"), "{said}");
    eventually("the log to say it", || proxy.log().contains("no upgrade"));
    clean(load);
}
