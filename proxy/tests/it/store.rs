//! A restart through the service manager's store of descriptors, which keeps all sessions: by
//! systemd, and by a small program that stands in for it.

use std::collections::BTreeMap;
use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use ppv2_lab::namespace::enter_as_root;
use ppv2_lab::service_manager::Systemd;
use ppv2_lab::*;

use crate::activation::stand_in;

fn config(bind: &[SocketAddr], server: SocketAddr, more: &str) -> String {
    let bind: Vec<_> = bind.iter().map(|one| format!("\"{one}\"")).collect();
    format!(
        "drain_timeout = \"500ms\"\n{more}\n[[listener]]\nname = \"kept\"\nbind = [{}]\n\
         upstream = \"u\"\n[upstream.u]\nservers = [\"{server}\"]\n",
        bind.join(", ")
    )
}

/// A server that returns each payload to the session that it came from, and knows which session
/// each client had.
struct Echo {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<BTreeMap<SocketAddr, Vec<SocketAddr>>>>,
}

impl Echo {
    fn start() -> Self {
        let socket = socket("127.0.0.1");
        let address = socket.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            socket
                .set_read_timeout(Some(Duration::from_millis(20)))
                .unwrap();
            let mut sessions = BTreeMap::<_, Vec<_>>::new();
            let mut datagram = [0; 2000];
            while !told.load(Ordering::Relaxed) {
                let Ok((len, session)) = socket.recv_from(&mut datagram) else {
                    continue;
                };
                let (client, _, payload) = read_header(&datagram[..len]);
                let known = sessions.entry(client).or_default();
                if known.last() != Some(&session) {
                    known.push(session);
                }
                socket.send_to(&payload, session).unwrap();
            }
            sessions
        });
        Self {
            address,
            stop,
            thread: Some(thread),
        }
    }

    /// The sessions of each client.
    fn sessions(mut self) -> BTreeMap<SocketAddr, Vec<SocketAddr>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

/// Clients that send all the time, and count what comes back.
struct Traffic {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    thread: JoinHandle<(Vec<UdpSocket>, Vec<u64>)>,
}

impl Traffic {
    /// Each client sends a datagram every 20 ms: what comes in a second fits into the smallest
    /// buffers.
    fn start(clients: usize, listeners: &[SocketAddr]) -> Self {
        let clients: Vec<_> = listeners
            .iter()
            .cycle()
            .take(clients)
            .map(client_of)
            .collect();
        let stop = Arc::new(AtomicBool::new(false));
        let sent = Arc::new(AtomicU64::new(0));
        let (told, counted) = (Arc::clone(&stop), Arc::clone(&sent));
        let thread = std::thread::spawn(move || {
            let mut numbers = vec![0_u64; clients.len()];
            while !told.load(Ordering::Relaxed) {
                for (client, number) in clients.iter().zip(&mut numbers) {
                    client.send(&number.to_be_bytes()).unwrap();
                    *number += 1;
                    counted.fetch_add(1, Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            (clients, numbers)
        });
        Self { stop, sent, thread }
    }

    /// Waits until so many more datagrams are sent.
    fn go_on(&self, more: u64) {
        let until = self.sent.load(Ordering::Relaxed) + more;
        eventually("more datagrams", || {
            self.sent.load(Ordering::Relaxed) >= until
        });
    }

    /// Ends it. Each datagram has come back, and once.
    fn all_came_back(self) -> Vec<SocketAddr> {
        self.stop.store(true, Ordering::Relaxed);
        let (clients, sent) = self.thread.join().unwrap();
        for (client, sent) in clients.iter().zip(sent) {
            let mut missing: std::collections::BTreeSet<_> = (0..sent).collect();
            let mut number = [0; 9];
            while !missing.is_empty() {
                let len = client.recv(&mut number).unwrap_or_else(|error| {
                    panic!("{} of {sent} datagrams are lost: {error}", missing.len())
                });
                let number = u64::from_be_bytes(number[..len].try_into().unwrap());
                assert!(missing.remove(&number), "{number} came twice");
            }
        }
        clients
            .iter()
            .map(|one| one.local_addr().unwrap())
            .collect()
    }
}

fn client_of(listener: &SocketAddr) -> UdpSocket {
    let client = socket(if listener.is_ipv4() {
        "127.0.0.1"
    } else {
        "::1"
    });
    client.connect(listener).unwrap();
    client
}

fn start(file: &Path, sockets: &[String]) -> Process {
    let mut manager = Process::start(&mut stand_in(sockets, file));
    manager.wait_for(" ready ");
    manager
}

/// Restarts the proxy, and waits until another one goes on.
fn restart(manager: &Process, times: usize) {
    manager.signal("USR1");
    let log = || manager.log();
    eventually("another start", || {
        log().matches(" ready ").count() == times + 1
    });
    eventually("an empty store", || {
        log().matches("removed ppv2-state").count() == times
    });
}

fn keeps_sessions(sockets: &[String], listeners: &[SocketAddr], more: &str) {
    let (server, folder) = (Echo::start(), tempfile::tempdir().unwrap());
    let text = config(listeners, server.address, more);
    let file = write(&folder, "proxy.toml", &text);
    let mut manager = start(&file, sockets);
    let traffic = Traffic::start(10, listeners);
    for times in 1..4 {
        traffic.go_on(60);
        restart(&manager, times);
        let log = manager.log();
        let told = log.matches("10 sessions go on").count();
        assert_eq!(told, times, "{log}");
    }
    traffic.go_on(60);
    let clients = traffic.all_came_back();
    let sessions = server.sessions();
    for client in clients {
        // It is the same one from the first datagram to the last.
        assert_eq!(
            sessions[&client].len(),
            1,
            "{client}: {:?}",
            sessions[&client]
        );
    }
    manager.signal("TERM");
    let (status, log) = manager.wait();
    assert!(status.success(), "{log}");
    assert_eq!(log.matches("shutting down").count(), 1, "{log}");
    assert_eq!(log.matches("stored ppv2-state").count(), 3, "{log}");
}

#[test]
fn a_restart_keeps_every_session_and_datagram() {
    let listeners = [address("127.0.0.1"), address("::1")];
    keeps_sessions(&["store".to_owned()], &listeners, "workers = 2");
}

#[test]
fn a_restart_with_sockets_of_the_service_manager_does_too() {
    let listeners = [address("127.0.0.1"), address("::1")];
    let admin = address("127.0.0.1");
    let mut sockets = vec!["store".to_owned()];
    for one in listeners {
        sockets.extend([format!("udp={one},reuse"), format!("udp={one},reuse")]);
    }
    sockets.push(format!("tcp={admin}"));
    let more = format!("workers = 2\n[admin]\nlisten = \"{admin}\"\n");
    keeps_sessions(&sockets, &listeners, &more);
}

#[test]
fn systemd_restarts_the_packaged_unit_without_losing_a_session() {
    if !enter_as_root(test_name!()) {
        return;
    }
    let (server, systemd) = (Echo::start(), Systemd::start());
    let listeners = [address("127.0.0.1"), address("::1")];
    let file = |name: &str| systemd.folder().join(name);
    fs::copy(binary(), file("ppv2-proxy")).unwrap();
    let text = config(&listeners, server.address, "workers = 2");
    fs::write(file("proxy.toml"), text).unwrap();
    let unit = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/packaging/systemd/ppv2-proxy.service"
    );
    fs::copy(unit, file("ppv2-proxy.service")).unwrap();
    let [proxy, config, log] = ["ppv2-proxy", "proxy.toml", "log"].map(Systemd::seen);
    let changes = format!(
        "[Unit]\nDefaultDependencies=no\n[Service]\nExecStart=\n\
         ExecStart={} run --config {}\nStandardError=append:{}\n",
        proxy.display(),
        config.display(),
        log.display()
    );
    fs::create_dir(file("ppv2-proxy.service.d")).unwrap();
    fs::write(file("ppv2-proxy.service.d/test.conf"), changes).unwrap();
    let log = || fs::read_to_string(file("log")).unwrap_or_default();
    let ask = |arguments: &[&str]| {
        let (is_done, said) = systemd.systemctl(arguments);
        assert!(is_done, "{arguments:?}: {said}\n{}", log());
        said
    };
    ask(&["daemon-reload"]);
    ask(&["start", "ppv2-proxy"]);
    let traffic = Traffic::start(10, &listeners);
    for times in 1..4 {
        traffic.go_on(60);
        // It returns when the next process is ready, which its log says a moment later.
        ask(&["restart", "ppv2-proxy"]);
        eventually("the next process to go on", || {
            log().matches("10 sessions go on").count() == times
        });
        assert!(ask(&["status", "ppv2-proxy"]).contains("sessions: 10"));
    }
    traffic.go_on(60);
    let clients = traffic.all_came_back();
    let sessions = server.sessions();
    for client in clients {
        assert_eq!(sessions[&client].len(), 1, "{client}");
    }
    ask(&["stop", "ppv2-proxy"]);
    assert!(log().contains("shutting down"), "{}", log());
    let result = ask(&["show", "--property=Result,NRestarts", "ppv2-proxy"]);
    assert_eq!(result.trim(), "Result=success\nNRestarts=0", "{}", log());
}

/// As by RuntimeDirectory= of a unit.
#[test]
fn a_restart_makes_sockets_anew_whose_folder_is_gone() {
    let (server, folder) = (Echo::start(), tempfile::tempdir().unwrap());
    // The proxy is another user, if started as root.
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (listeners, run) = ([address("127.0.0.1")], folder.path().join("run"));
    let (admin, upgrade) = (run.join("admin.sock"), run.join("upgrade.sock"));
    let admin = format!("unix:{}", admin.display());
    let more = format!("[admin]\nlisten = \"{admin}\"\n[upgrade]\nsocket = {upgrade:?}\n");
    let text = config(&listeners, server.address, &more);
    let file = write(&folder, "proxy.toml", &text);
    let sockets = ["store".to_owned(), format!("folder={}", run.display())];
    let manager = start(&file, &sockets);
    let traffic = Traffic::start(10, &listeners);
    for times in 1..3 {
        traffic.go_on(60);
        restart(&manager, times);
        let log = manager.log();
        assert_eq!(log.matches("10 sessions go on").count(), times, "{log}");
        let (code, _, said) = output(&["healthcheck", "--admin", &admin]);
        assert_eq!(code, Some(0), "{said}");
        drop(std::os::unix::net::UnixStream::connect(&upgrade).unwrap());
    }
    traffic.all_came_back();
}

const NUMBER: [u8; 8] = [7; 8];

/// What the process before has left is not what it should be: sessions begin anew.
#[test]
fn what_can_not_be_read_of_the_store_stops_no_start() {
    for (content, why) in [
        (&b""[..], "has closed the connection"),
        (
            b"GET / HTTP/1.1\r\n\r\n",
            "does not speak as ppv2-proxy does",
        ),
        (b"ppv2\xff\xff\xff\xff\x00\x00\x00\x00", "may have"),
        (
            b"ppv2\x00\x00\x00\x03\x00\x00\x00\x00\xc1\xc1\xc1",
            "can't be understood",
        ),
        (
            b"ppv2\x00\x00\x00\x05\x00\x00\x00\x01\xa5Begin",
            "the other process",
        ),
        (
            b"ppv2\x00\x00\x00\x06\x00\x00\x00\x00\xa5Begin",
            "where Offer belongs",
        ),
    ] {
        let (server, folder) = (Echo::start(), tempfile::tempdir().unwrap());
        let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
        let more = format!("[admin]\nlisten = \"{admin}\"\n");
        let file = write(
            &folder,
            "proxy.toml",
            &config(&[listener], server.address, &more),
        );
        let state = folder.path().join("state");
        fs::write(&state, content).unwrap();
        let manager = start(&file, &[format!("store={}", state.display())]);
        let client = client_of(&listener);
        client.send(&NUMBER).unwrap();
        assert_eq!(receive(&client).0, NUMBER);
        restart(&manager, 1);
        let log = manager.log();
        let said = "what the process before has left can't be used";
        assert!(log.contains(said) && log.contains(why), "{why}: {log}");
        let client = client_of(&listener);
        client.send(b"question").unwrap();
        assert_eq!(receive(&client).0, b"question");
        assert_eq!(http_get(admin, "/readyz").0, 200);
    }
}

#[test]
fn without_a_store_replies_in_flight_are_let_out() {
    let (server, folder) = (socket("127.0.0.1"), tempfile::tempdir().unwrap());
    let listener = address("127.0.0.1");
    let text = config(&[listener], server.local_addr().unwrap(), "");
    let mut proxy = proxy_with(&folder, &text);
    let client = client_of(&listener);
    client.send(b"question").unwrap();
    let (_, session) = receive(&server);
    proxy.signal("USR2");
    proxy.wait_for("sessions are not left to the next process: ");
    proxy.wait_for("shutting down");
    server.send_to(b"answer", session).unwrap();
    assert_eq!(receive(&client).0, b"answer");
    assert!(proxy.wait().0.success());
}

#[test]
fn a_service_manager_that_stores_nothing_loses_no_reply() {
    use std::os::linux::net::SocketAddrExt as _;
    let (server, folder) = (socket("127.0.0.1"), tempfile::tempdir().unwrap());
    let name = format!("ppv2-test/silent/{}", std::process::id());
    let address_of_manager = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
    // It reads nothing.
    let _manager = std::os::unix::net::UnixDatagram::bind_addr(&address_of_manager).unwrap();
    let listener = address("127.0.0.1");
    let text = config(&[listener], server.local_addr().unwrap(), "");
    let file = write(&folder, "proxy.toml", &text);
    let mut command = Command::new(binary());
    command.args(["run", "--config"]).arg(file);
    let mut proxy = Process::start(command.env("NOTIFY_SOCKET", format!("@{name}")));
    proxy.wait_for(" ready ");
    let client = client_of(&listener);
    client.send(b"question").unwrap();
    let (_, session) = receive(&server);
    proxy.signal("USR2");
    server.send_to(b"answer", session).unwrap();
    assert_eq!(receive(&client).0, b"answer");
    let (status, log) = proxy.wait();
    assert!(status.success(), "{log}");
    assert!(
        log.contains("the service manager has not stored them"),
        "{log}"
    );
}

#[test]
fn a_service_manager_that_closes_what_it_should_store_loses_no_reply() {
    let (server, folder) = (socket("127.0.0.1"), tempfile::tempdir().unwrap());
    let listener = address("127.0.0.1");
    let text = config(&[listener], server.local_addr().unwrap(), "");
    let text = text.replace("\"500ms\"", "\"60s\"");
    let file = write(&folder, "proxy.toml", &text);
    let mut manager = start(&file, &["store-nothing".to_owned()]);
    let client = client_of(&listener);
    client.send(b"question").unwrap();
    let (_, session) = receive(&server);
    manager.signal("USR1");
    manager.wait_for("not stored ppv2-state");
    manager.wait_for("FileDescriptorStoreMax=1");
    manager.wait_for("shutting down");
    server.send_to(b"answer", session).unwrap();
    assert_eq!(receive(&client).0, b"answer");
    // The next one begins anew.
    eventually("another start", || {
        manager.log().matches(" ready ").count() == 2
    });
    let log = manager.log();
    assert!(!log.contains("sessions go on"), "{log}");
    client.send(b"question").unwrap();
    assert_eq!(read_header(&receive(&server).0).2, b"question");
}
