//! Socket activation: the sockets that a service manager has bound before it starts the proxy.
//! systemd's own `systemd-socket-activate`, and a small program where that can't: several
//! sockets for an address, a restart, and what systemd would not do.

use std::collections::BTreeSet;
use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;

use ppv2_lab::*;

/// The program that stands in for systemd, with these sockets, which starts the proxy with
/// this configuration.
pub(crate) fn stand_in(sockets: &[String], file: &Path) -> Command {
    let mut proxy = Command::new(binary());
    proxy.args(["run", "--config"]).arg(file);
    service_manager::stand_in(sockets, &proxy)
}

struct Activated {
    process: Process,
    server: UdpSocket,
    folder: tempfile::TempDir,
}

impl Activated {
    /// Starts the proxy with two workers, `bind` of its listener and these sockets, and waits
    /// until it is ready.
    fn start(bind: &[SocketAddr], sockets: &[String], more: &str) -> Self {
        let server = socket("127.0.0.1");
        let folder = tempfile::tempdir().unwrap();
        let file = write(&folder, "proxy.toml", &config(bind, &server, more));
        let mut process = Process::start(&mut stand_in(sockets, &file));
        process.wait_for("ready");
        Self {
            process,
            server,
            folder,
        }
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("proxy.toml")
    }

    /// Sends a datagram by a new client, and returns where the server saw that it was sent to.
    #[track_caller]
    fn ask(&self, to: SocketAddr) -> SocketAddr {
        let client = client_of(to);
        client.send_to(b"question", to).unwrap();
        self.answer(&client)
    }

    /// Answers a client's question, which the server has or gets.
    #[track_caller]
    fn answer(&self, client: &UdpSocket) -> SocketAddr {
        let (datagram, proxy) = receive(&self.server);
        let (known, to, payload) = read_header(&datagram);
        assert_eq!(payload, b"question");
        assert_eq!(known, client.local_addr().unwrap());
        self.server.send_to(b"answer", proxy).unwrap();
        assert_eq!(receive(client), (b"answer".to_vec(), to));
        to
    }

    /// How many sockets of the host are bound to `address`.
    fn bound(&self, address: SocketAddr) -> usize {
        bound(self.process.pid(), address)
    }

    fn said(&self, what: &str) -> bool {
        self.process.log().contains(what)
    }
}

fn client_of(listener: SocketAddr) -> UdpSocket {
    socket(if listener.is_ipv4() {
        "127.0.0.1"
    } else {
        "::1"
    })
}

fn config(bind: &[SocketAddr], server: &UdpSocket, more: &str) -> String {
    let bind: Vec<_> = bind.iter().map(|one| format!("\"{one}\"")).collect();
    format!(
        "workers = 2\ndrain_timeout = \"500ms\"\n{more}\n[[listener]]\nname = \"given\"\n\
         bind = [{}]\nupstream = \"u\"\n[upstream.u]\nservers = [\"{}\"]\n",
        bind.join(", "),
        server.local_addr().unwrap()
    )
}

fn bound(pid: u32, address: SocketAddr) -> usize {
    let table = if address.is_ipv4() { "udp" } else { "udp6" };
    let table = fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap();
    let port = format!(":{:04X} ", address.port());
    let locals = table
        .lines()
        .skip(1)
        .filter_map(|line| line.split_once(": "));
    locals
        .filter(|(_, rest)| rest[..40].contains(&port))
        .count()
}

fn both_families() -> [SocketAddr; 2] {
    [address("127.0.0.1"), address("::1")]
}

#[test]
fn systemd_socket_activate_starts_it_at_the_first_datagram() {
    let port = port();
    let wildcard = SocketAddr::new("0.0.0.0".parse().unwrap(), port);
    let [first, second] = both_families();
    // The datagram that starts it came before the proxy could ask for its address.
    let asked = SocketAddr::new("127.0.0.9".parse().unwrap(), port);
    for (from, to) in [("127.0.0.1", first), ("::1", second), ("127.0.0.1", asked)] {
        let server = socket("127.0.0.1");
        let folder = tempfile::tempdir().unwrap();
        let listeners = [first, second, wildcard];
        let file = write(
            &folder,
            "proxy.toml",
            &config(&listeners, &server, "").replace("workers = 2", "workers = 1"),
        );
        let mut command = Command::new("systemd-socket-activate");
        command.arg("--datagram");
        for one in listeners {
            command.args(["-l", &one.to_string()]);
        }
        command.arg(binary()).args(["run", "--config"]).arg(&file);
        let mut process = Process::start(&mut command);
        process.wait_for(&format!("Listening on {wildcard}"));
        let client = socket(from);
        client.send_to(b"question", to).unwrap();
        let it = Activated {
            process,
            server,
            folder,
        };
        assert_eq!(it.answer(&client), to);
        for listener in [first, second, asked] {
            assert_eq!(it.ask(listener), listener);
            assert_eq!(it.bound(listener), 1);
        }
        assert!(it.said("sockets of the service manager are in use"));
        assert!(!it.said("WARN"), "{}", it.process.log());
    }
}

#[test]
fn each_worker_has_a_socket_of_each_address_if_they_share_it() {
    let listeners = both_families();
    let sockets: Vec<_> = listeners
        .iter()
        .flat_map(|one| [format!("udp={one},reuse"), format!("udp={one},reuse")])
        .collect();
    let it = Activated::start(&listeners, &sockets, "");
    for listener in listeners {
        assert_eq!(it.bound(listener), 2);
        // The kernel spreads clients over both sockets.
        for _ in 0..20 {
            it.ask(listener);
        }
    }
    assert!(!it.said("service manager has"), "{}", it.process.log());
}

#[test]
fn more_sockets_than_workers_are_all_served() {
    for reuse_port in ["", "reuse_port = false"] {
        let listener = address("127.0.0.1");
        let sockets = vec![format!("udp={listener},reuse"); 5];
        let it = Activated::start(&[listener], &sockets, reuse_port);
        for _ in 0..30 {
            it.ask(listener);
        }
        assert_eq!(it.bound(listener), 5);
    }
}

/// The kernel lets only sockets of one user share an address.
#[test]
fn workers_without_a_socket_get_one_where_the_kernel_allows_it() {
    let listeners = both_families();
    let sockets = listeners.map(|one| format!("udp={one}"));
    let it = Activated::start(&listeners, &sockets, "");
    let is_another_user = rustix::process::geteuid().is_root();
    for listener in listeners {
        let count = if is_another_user { 1 } else { 2 };
        assert_eq!(it.bound(listener), count);
        let warned = format!("1 of 2 workers serve listener `given` at {listener}");
        assert_eq!(it.said(&warned), is_another_user, "{}", it.process.log());
        for _ in 0..20 {
            it.ask(listener);
        }
    }
}

#[test]
fn workers_without_a_socket_get_one_as_the_same_user() {
    if !namespace::enter_without_rights(test_name!(), "") {
        return;
    }
    let listener = address("127.0.0.1");
    let it = Activated::start(&[listener], &[format!("udp={listener}")], "");
    assert_eq!(it.bound(listener), 2);
    for _ in 0..20 {
        it.ask(listener);
    }
    assert!(!it.said("serve listener"), "{}", it.process.log());
}

#[test]
fn ports_below_1024_take_no_capability() {
    if !namespace::enter(test_name!(), "") {
        return;
    }
    let listeners = ["127.0.0.1:53", "[::1]:53"].map(|one| one.parse().unwrap());
    let admin: SocketAddr = "127.0.0.1:81".parse().unwrap();
    let sockets = ["udp=127.0.0.1:53", "udp=[::1]:53", "tcp=127.0.0.1:81"].map(String::from);
    let more = format!("[admin]\nlisten = \"{admin}\"\n");
    let it = Activated::start(&listeners, &sockets, &more);
    assert!(it.said("capabilities=[]"), "{}", it.process.log());
    for listener in listeners {
        assert_eq!(it.ask(listener), listener);
    }
    assert_eq!(http_get(admin, "/readyz").0, 200);
}

#[test]
fn what_belongs_to_nobody_is_closed_and_said() {
    let folder = tempfile::tempdir().unwrap();
    let unix = folder.path().join("x.sock").display().to_string();
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let (other, other_tcp) = (address("::1"), address("127.0.0.1"));
    let sockets = [
        "file=".to_owned(),
        format!("udp={other}"),
        format!("tcp={admin}"),
        "connected=".to_owned(),
        format!("udp={listener}"),
        format!("unix={unix}"),
        format!("tcp={other_tcp}"),
    ];
    let more = format!("reuse_port = false\n[admin]\nlisten = \"{admin}\"\n");
    let it = Activated::start(&[listener], &sockets, &more);
    for said in [
        "socket 0 from the service manager (file) is closed: it is no socket for a listener"
            .to_owned(),
        format!(
            "the UDP socket {other} from the service manager is closed: no listener has this address"
        ),
        "socket 3 from the service manager (connected) is closed: ".to_owned(),
        format!("the socket unix:{unix} from the service manager is closed: it is not the admin"),
        format!("the socket {other_tcp} from the service manager is closed"),
    ] {
        assert!(it.said(&said), "no `{said}`:\n{}", it.process.log());
    }
    assert_eq!(
        it.process.log().matches("WARN").count(),
        5,
        "{}",
        it.process.log()
    );
    assert_eq!(it.ask(listener), listener);
    assert_eq!(http_get(admin, "/readyz").0, 200);
}

#[test]
fn the_admin_address_may_be_a_unix_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("admin.sock");
    let sockets = [format!("unix={}", path.display())];
    let more = format!("[admin]\nlisten = \"unix:{}\"\n", path.display());
    let mut it = Activated::start(&[address("127.0.0.1")], &sockets, &more);
    let asked = format!("unix:{}", path.display());
    let (status, answer, _) = output(&["healthcheck", "--ready", "--admin", &asked]);
    assert_eq!(status, Some(0), "{answer}");
    it.process.signal("TERM");
    assert!(it.process.wait().0.success());
    // The file is the service manager's.
    assert!(path.exists());
}

#[test]
fn a_wildcard_for_both_families_is_refused_with_the_fix() {
    let listener: SocketAddr = format!("[::]:{}", port()).parse().unwrap();
    let (server, folder) = (socket("127.0.0.1"), tempfile::tempdir().unwrap());
    let file = write(&folder, "proxy.toml", &config(&[listener], &server, ""));
    let sockets = [format!("udp={listener},dual")];
    let mut process = Process::start(&mut stand_in(&sockets, &file));
    let (status, log) = process.wait();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("set BindIPv6Only=ipv6-only"), "{log}");

    let it = Activated::start(&[listener], &[format!("udp={listener}")], "");
    let asked = SocketAddr::new("::1".parse().unwrap(), listener.port());
    assert_eq!(it.ask(asked), asked);
}

/// The sockets that the workers of the program's process wait for.
pub(crate) fn watched(program: u32) -> BTreeSet<String> {
    let descriptors = format!("/proc/{program}/fdinfo");
    let all = fs::read_dir(descriptors).unwrap();
    let texts = all.filter_map(|one| fs::read_to_string(one.unwrap().path()).ok());
    let inode = |line: &str| Some(line.split_once(" ino:")?.1.split(' ').next()?.to_owned());
    texts
        .flat_map(|text| text.lines().filter_map(inode).collect::<Vec<_>>())
        .collect()
}

/// The process that the stand-in has started.
fn program(stand_in: u32) -> u32 {
    let children = format!("/proc/{stand_in}/task/{stand_in}/children");
    let children = fs::read_to_string(children).unwrap();
    let mut children = children.split_whitespace().map(|pid| pid.parse().unwrap());
    let is_proxy = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "ppv2-proxy\n")
    };
    children.find(is_proxy).expect("the proxy runs")
}

#[test]
fn a_listener_comes_back_by_a_reload_without_what_came_meanwhile() {
    let [first, second] = both_families();
    let sockets = [first, first, second, second].map(|one| format!("udp={one},reuse"));
    let it = Activated::start(&[first, second], &sockets, "");
    let clients: Vec<_> = (0..20).map(|_| client_of(first)).collect();
    let all = watched(program(it.process.pid()));
    it.ask(first);

    let reload = |bind: &[SocketAddr], times: usize| {
        fs::write(it.file(), config(bind, &it.server, "")).unwrap();
        it.process.signal("HUP");
        eventually("the reload", || {
            it.process.log().matches("reloaded: ").count() == times
        });
    };
    reload(&[second], 1);
    eventually("its end", || it.said("closed addresses="));
    // What the service manager keeps is not watched any more: it would be reported for ever.
    eventually("its sockets to rest", || {
        all.difference(&watched(program(it.process.pid()))).count() == 2
    });
    for client in &clients {
        client.send_to(b"stale", first).unwrap();
    }
    assert_eq!(it.ask(second), second);
    reload(&[second, first], 2);
    for client in &clients {
        client.send_to(b"question", first).unwrap();
        it.answer(client);
    }
    assert_eq!(it.ask(second), second);
}

#[test]
fn what_comes_during_a_restart_waits_for_the_next_process() {
    let listeners = both_families();
    let sockets = listeners.map(|one| format!("udp={one}"));
    let it = Activated::start(&listeners, &sockets, "reuse_port = false");
    let starts = || it.process.log().matches(" ready ").count();
    for count in 2..4 {
        // A session awaits a reply, and so does the first process.
        let waiting = client_of(listeners[0]);
        waiting.send_to(b"waits", listeners[0]).unwrap();
        receive(&it.server);
        it.process.signal("USR1");
        eventually("the stop", || {
            it.process.log().matches("shutting down").count() == count - 1
        });
        let clients: Vec<_> = listeners
            .iter()
            .cycle()
            .take(40)
            .map(|to| {
                let client = client_of(*to);
                client.send_to(b"question", to).unwrap();
                client
            })
            .collect();
        // The first process may still have taken some: it lets their answers out.
        let mut served = BTreeSet::new();
        for _ in &clients {
            let (datagram, proxy) = receive(&it.server);
            served.insert(read_header(&datagram).0);
            it.server.send_to(b"answer", proxy).unwrap();
        }
        assert_eq!(served.len(), clients.len());
        eventually("another start", || starts() == count);
        for client in clients {
            assert_eq!(receive(&client).0, b"answer");
        }
    }
    let mut process = it.process;
    process.signal("TERM");
    assert!(process.wait().0.success());
}

#[test]
fn sockets_of_another_process_are_not_taken() {
    let listener = address("127.0.0.1");
    let (server, folder) = (socket("127.0.0.1"), tempfile::tempdir().unwrap());
    let file = write(&folder, "proxy.toml", &config(&[listener], &server, ""));
    for (name, value, said) in [
        ("LISTEN_PID", "1", None),
        (
            "LISTEN_FDS",
            "many",
            Some("LISTEN_FDS is no number of sockets"),
        ),
        (
            "LISTEN_FDS",
            "4000000000",
            Some("LISTEN_FDS is no number of sockets"),
        ),
    ] {
        // Other than the listener's: that would be in use.
        let sockets = [format!("udp={}", address("127.0.0.1"))];
        let mut command = stand_in(&sockets, &file);
        let mut process = Process::start(command.env(name, value));
        process.wait_for("ready");
        let log = process.log();
        let told = log.matches("service manager").count();
        assert_eq!(told, usize::from(said.is_some()), "{log}");
        assert!(said.is_none_or(|said| log.contains(said)), "{log}");
    }
}
