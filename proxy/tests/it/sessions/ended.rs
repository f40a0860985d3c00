//! Sessions that have ended: late replies reach no client, and their sockets and ports are
//! used for new clients.

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use ppv2_engine::session::MIN_REST;
use ppv2_lab::*;

/// Sends a question, and returns the port that the server was asked from.
fn ask(client: &UdpSocket, listener: SocketAddr, server: &UdpSocket) -> SocketAddr {
    client.send_to(b"question", listener).unwrap();
    let (datagram, session) = receive(server);
    assert_eq!(read_header(&datagram).0, client.local_addr().unwrap());
    session
}

#[test]
fn sessions_that_ended_give_their_ports_to_new_clients() {
    let setup = "echo 40000 40009 > /proc/sys/net/ipv4/ip_local_port_range";
    if !namespace::enter(test_name!(), setup) {
        return;
    }
    let (server_address, listener) = (address("127.0.0.1"), address("127.0.0.1"));
    let (server, admin) = (bind(server_address), address("127.0.0.1"));
    let more = ["--responses", "1", "--admin", &admin.to_string()];
    let _proxy = proxy_between(listener, server_address, &more);
    let a_moment = Some(Duration::from_millis(50));
    server.set_read_timeout(a_moment).unwrap();
    let mut datagram = [0; 2048];
    for _ in 0..100 {
        let client = bind(address("127.0.0.1"));
        client.set_read_timeout(a_moment).unwrap();
        // Each port is silent for a moment before another session has it.
        eventually("an answer", || {
            client.send_to(b"question", listener).unwrap();
            if let Ok((_, session)) = server.recv_from(&mut datagram) {
                server.send_to(b"answer", session).unwrap();
            }
            client.recv(&mut datagram).is_ok()
        });
    }
    assert!(metric(admin, "ppv2_resting_ports_reclaimed_total") > 0);
}

#[test]
fn late_reply_reaches_no_client() {
    let server = socket("127.0.0.1");
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let more = ["--responses", "1", "--admin", &admin.to_string()];
    let _proxy = proxy_between(listener, server.local_addr().unwrap(), &more);
    let client = socket("127.0.0.1");
    client.send_to(b"question", listener).unwrap();
    let (_, session) = receive(&server);
    for _ in 0..3 {
        server.send_to(b"answer", session).unwrap();
    }
    assert_eq!(receive(&client).0, b"answer");
    receive_nothing(&client);
    eventually("two late replies", || dropped(admin, "reply_late") == 2);
    // The next question starts a new session, from another port.
    client.send_to(b"question", listener).unwrap();
    assert_ne!(receive(&server).1, session);
}

#[test]
fn late_reply_reaches_no_client_under_a_flood_of_short_sessions() {
    let server = socket("127.0.0.1");
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let more = ["--responses", "1", "--admin", &admin.to_string()];
    let _proxy = proxy_between(listener, server.local_addr().unwrap(), &more);
    // 1,500 sessions that are answered; then each is sent a second answer,
    // which names the client of the first, while others are being begun. All
    // of it must be over before the ports have rested.
    let mut old = Vec::new();
    for n in 0..1500u16 {
        let client = socket("127.0.0.1");
        client.send_to(&n.to_be_bytes(), listener).unwrap();
        let (datagram, session) = receive(&server);
        server.send_to(&read_header(&datagram).2, session).unwrap();
        assert_eq!(receive(&client).0, n.to_be_bytes());
        old.push((session, n));
    }
    for (session, n) in old {
        let client = socket("127.0.0.1");
        client.send_to(b"new", listener).unwrap();
        let (_, own) = receive(&server);
        server.send_to(&n.to_be_bytes(), session).unwrap();
        server.send_to(b"own", own).unwrap();
        assert_eq!(receive(&client).0, b"own");
    }
    eventually("all late replies", || dropped(admin, "reply_late") == 1500);
    assert_eq!(metric(admin, "ppv2_resting_ports_reclaimed_total"), 0);
}

#[test]
fn rested_socket_is_reused_unless_a_late_reply_came() {
    // Half of the sockets rest when two do.
    let setup = "echo 40000 40003 > /proc/sys/net/ipv4/ip_local_port_range";
    if !namespace::enter(test_name!(), setup) {
        return;
    }
    let server = bind(address("127.0.0.1"));
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    // Each worker has sockets of its own, and clients go to either.
    let admin_text = admin.to_string();
    let more = ["--workers", "1", "--responses", "1", "--admin", &admin_text];
    let proxy = proxy_between(listener, server.local_addr().unwrap(), &more);
    let clients: Vec<_> = (0..4).map(|_| bind(address("127.0.0.1"))).collect();
    let sessions: Vec<_> = clients[..2]
        .iter()
        .map(|client| {
            let session = ask(client, listener, &server);
            server.send_to(b"answer", session).unwrap();
            assert_eq!(receive(client).0, b"answer");
            session
        })
        .collect();

    std::thread::sleep(MIN_REST + Duration::from_millis(500));
    // While the proxy stands still, a question and a late reply come, so that it
    // takes the question first.
    proxy.pause();
    clients[2].send_to(b"question", listener).unwrap();
    server.send_to(b"late", sessions[0]).unwrap();
    proxy.signal("CONT");
    let (datagram, reused) = receive(&server);
    assert_eq!(read_header(&datagram).0, clients[2].local_addr().unwrap());
    assert_eq!(reused, sessions[1], "the socket that was silent");
    server.send_to(b"answer", reused).unwrap();
    assert_eq!(receive(&clients[2]), (b"answer".to_vec(), listener));
    assert_eq!(dropped(admin, "reply_late"), 1);
    assert_eq!(metric(admin, "ppv2_resting_ports_renewed_total"), 1);
    assert_eq!(metric(admin, "ppv2_resting_ports_reclaimed_total"), 0);
    receive_nothing(&clients[0]);
}

#[test]
fn port_that_a_server_streams_to_is_not_reused() {
    let setup = "echo 40000 40001 > /proc/sys/net/ipv4/ip_local_port_range";
    if !namespace::enter(test_name!(), setup) {
        return;
    }
    std::thread::scope(|scope| {
        for host in ["127.0.0.1", "::1"] {
            scope.spawn(move || streamed_to(host));
        }
    });
}

fn streamed_to(host: &str) {
    let server = bind(address(host));
    let (listener, admin) = (address(host), address(host));
    let folder = tempfile::tempdir().unwrap();
    let config = |deny: &str| {
        format!(
            "workers = 1\n[admin]\nlisten = \"{admin}\"\n\
             [[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\ndeny = [{deny}]\n\
             responses = 1\n[upstream.u]\nservers = [\"{}\"]\n",
            server.local_addr().unwrap()
        )
    };
    let mut proxy = proxy_with(&folder, &config(""));
    let clients: Vec<_> = (0..4).map(|_| bind(address(host))).collect();
    // One session ends by its answer, the other by a reload that denies its client.
    let answered = ask(&clients[0], listener, &server);
    let denied = ask(&clients[1], listener, &server);
    server.send_to(b"answer", answered).unwrap();
    assert_eq!(receive(&clients[0]).0, b"answer");
    write(&folder, "proxy.toml", &config(&format!("\"{host}\"")));
    let reload = || assert_eq!(http(admin, "POST /reload", "").0, 200);
    reload();
    write(&folder, "proxy.toml", &config(""));
    reload();
    eventually("both to rest", || metric(admin, "ppv2_resting_ports") == 2);

    // The server streams on to both, and others ask, past the time of a rest.
    let end = Instant::now() + MIN_REST + Duration::from_secs(3);
    let mut streamed = 0;
    while Instant::now() < end {
        for session in [answered, denied] {
            server.send_to(b"of the stream", session).unwrap();
        }
        streamed += 2;
        eventually("the stream to be counted", || {
            dropped(admin, "reply_late") == streamed
        });
        clients[2].send_to(b"question", listener).unwrap();
        std::thread::sleep(Duration::from_millis(200));
    }
    for client in &clients[..3] {
        receive_nothing(client);
    }
    receive_nothing(&server);
    assert_eq!(dropped(admin, "no_ports"), streamed / 2);
    assert_eq!(metric(admin, "ppv2_resting_ports"), 2);
    for way_out in ["no_ports", "`source`", "`responses`", "`idle_timeout`"] {
        proxy.wait_for(way_out);
    }
    // Once it is silent for long enough, the ports are free.
    std::thread::sleep(MIN_REST + Duration::from_millis(500));
    served(&clients[3], listener, &server);
    assert_eq!(metric(admin, "ppv2_resting_ports_reclaimed_total"), 0);
}

#[test]
fn sessions_outlive_a_paused_proxy_while_clients_write() {
    for host in ["127.0.0.1", "::1"] {
        let server = socket(host);
        let listener = address(host);
        let more = ["--workers", "1", "--idle-timeout", "1s"];
        let proxy = proxy_between(listener, server.local_addr().unwrap(), &more);
        // More than are received at once.
        let clients: Vec<_> = (0..200).map(|_| socket(host)).collect();
        let ask = || {
            for client in &clients {
                client.send_to(b"question", listener).unwrap();
            }
        };
        let heard = || -> BTreeMap<SocketAddr, SocketAddr> {
            let heard = clients.iter().map(|_| receive(&server));
            heard
                .map(|(datagram, session)| (read_header(&datagram).0, session))
                .collect()
        };
        ask();
        let before = heard();
        proxy.pause();
        ask();
        std::thread::sleep(Duration::from_millis(2500));
        proxy.signal("CONT");
        let after = heard();
        let kept = before
            .iter()
            .filter(|(client, session)| after.get(client) == Some(session));
        assert_eq!(kept.count(), clients.len());
    }
}

#[test]
fn rested_sockets_serve_other_workers_too() {
    let setup = "echo 40000 40007 > /proc/sys/net/ipv4/ip_local_port_range";
    if !namespace::enter(test_name!(), setup) {
        return;
    }
    let server = bind(address("127.0.0.1"));
    let listeners = [(); 2].map(|()| address("127.0.0.1"));
    let folder = tempfile::tempdir().unwrap();
    // Each address has a worker of its own.
    let config = format!(
        "workers = 2\nreuse_port = false\n[[listener]]\nbind = [\"{}\", \"{}\"]\n\
         upstream = \"u\"\nidle_timeout = \"200ms\"\n[upstream.u]\nservers = [\"{}\"]\n",
        listeners[0],
        listeners[1],
        server.local_addr().unwrap()
    );
    let _proxy = proxy_with(&folder, &config);
    let clients: Vec<_> = (0..8).map(|_| bind(address("127.0.0.1"))).collect();
    // They owe an answer, so that their ports rest for the full time.
    for client in &clients {
        ask(client, listeners[0], &server);
    }
    let short = Some(Duration::from_millis(100));
    server.set_read_timeout(short).unwrap();
    let asked = |client: &UdpSocket| {
        client.send_to(b"question", listeners[1]).unwrap();
        server.recv(&mut [0; 100]).is_ok()
    };
    assert!(!asked(&clients[0]));
    for client in &clients {
        eventually("the other worker to close one", || asked(client));
    }
}

#[test]
fn restarted_proxy_begins_with_other_ports() {
    let server = socket("127.0.0.1");
    let [before, after] = [(); 2].map(|()| {
        let listener = address("127.0.0.1");
        let _proxy = proxy_between(listener, server.local_addr().unwrap(), &[]);
        let clients = (0..50).map(|_| socket("127.0.0.1"));
        clients
            .map(|client| ask(&client, listener, &server).port())
            .collect::<Vec<_>>()
    });
    // By chance about one run in ten has one.
    let again = before.iter().filter(|port| after.contains(port)).count();
    assert!(again < 10, "{again} of {before:?} again");
}

#[test]
fn source_without_free_ports_harms_no_other_source() {
    let setup = "echo 40000 40009 > /proc/sys/net/ipv4/ip_local_port_range; \
                 ip addr add fd00::5/128 dev lo; ip addr add fd00::6/128 dev lo";
    if !namespace::enter(test_name!(), setup) {
        return;
    }
    for (host, sources) in [
        ("127.0.0.1", ["127.0.0.5", "127.0.0.6"]),
        ("::1", ["fd00::5", "fd00::6"]),
    ] {
        let [first, second, admin] = [(); 3].map(|()| address(host));
        let server = bind(address(host));
        let folder = tempfile::tempdir().unwrap();
        let upstream = server.local_addr().unwrap();
        let config: String = [first, second]
            .iter()
            .zip(sources)
            .map(|(listener, source)| {
                format!(
                    "[[listener]]\nbind = [\"{listener}\"]\nupstream = \"{source}\"\n\
                     [upstream.\"{source}\"]\nsource = [\"{source}\"]\n\
                     servers = [\"{upstream}\"]\n"
                )
            })
            .collect();
        let config = format!("workers = 1\n[admin]\nlisten = \"{admin}\"\n{config}");
        let _proxy = proxy_with(&folder, &config);
        let clients: Vec<_> = (0..20).map(|_| bind(address(host))).collect();
        for client in &clients[..10] {
            ask(client, first, &server);
        }
        for (client, other) in clients[10..].iter().zip(&clients[..8]) {
            // A moment after one was refused; its port is taken there, and free here.
            let refused = dropped(admin, "no_ports");
            client.send_to(b"one too many", first).unwrap();
            while dropped(admin, "no_ports") == refused {}
            client.send_to(b"one too many", first).unwrap();
            served(other, second, &server);
        }
    }
}
