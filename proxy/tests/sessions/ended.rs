//! Sessions that have ended: late replies reach nobody, and what they held goes
//! to new clients.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use crate::common::*;
use ppv2_proxy::session::LINGER;

#[test]
fn sessions_that_ended_give_their_ports_to_new_clients() {
    let setup = "echo 40000 40009 > /proc/sys/net/ipv4/ip_local_port_range";
    if !namespace::enter("sessions_that_ended_give_their_ports_to_new_clients", setup) {
        return;
    }
    let (server_address, listener) = (address("127.0.0.1"), address("127.0.0.1"));
    let (server, admin) = (bind(server_address), address("127.0.0.1"));
    let more = ["--responses", "1", "--admin", &admin.to_string()];
    let _proxy = proxy_between(listener, server_address, &more);
    for _ in 0..100 {
        served(&bind(address("127.0.0.1")), listener, &server);
    }
    assert_eq!(dropped(admin, "no_ports"), 0);
}

#[test]
fn a_reply_to_a_session_that_ended_reaches_nobody() {
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
    // The next question begins anew, from another port.
    client.send_to(b"question", listener).unwrap();
    assert_ne!(receive(&server).1, session);
}

#[test]
fn a_late_reply_reaches_nobody_under_a_flood_of_short_sessions() {
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
    assert_eq!(metric(admin, "ppv2_sessions_reclaimed_total"), 0);
}

#[test]
fn a_socket_that_rested_serves_the_next_client_and_keeps_no_late_reply_for_it() {
    let server = socket("127.0.0.1");
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    // Each worker has sockets of its own, and clients go to either.
    let more = [
        "--workers",
        "1",
        "--responses",
        "1",
        "--admin",
        &admin.to_string(),
    ];
    let proxy = proxy_between(listener, server.local_addr().unwrap(), &more);
    let ask = |question: &[u8]| {
        let client = socket("127.0.0.1");
        client.send_to(question, listener).unwrap();
        let (datagram, session) = receive(&server);
        assert_eq!(read_header(&datagram).0, client.local_addr().unwrap());
        (client, session)
    };
    let (first, session) = ask(b"first");
    server.send_to(b"to the first", session).unwrap();
    assert_eq!(receive(&first).0, b"to the first");

    std::thread::sleep(LINGER + Duration::from_millis(500));
    // While the proxy stands still, a question and a late reply come, so that it
    // takes the question first.
    let second = socket("127.0.0.1");
    proxy.pause();
    second.send_to(b"second", listener).unwrap();
    server.send_to(b"late", session).unwrap();
    proxy.signal("CONT");
    let (datagram, reused) = receive(&server);
    assert_eq!(read_header(&datagram).0, second.local_addr().unwrap());
    assert_eq!(reused, session, "the socket that rested");
    server.send_to(b"to the second", reused).unwrap();
    assert_eq!(receive(&second), (b"to the second".to_vec(), listener));
    assert_eq!(dropped(admin, "reply_late"), 1);
    receive_nothing(&first);
    assert_eq!(metric(admin, "ppv2_sessions_reclaimed_total"), 0);
}

#[test]
fn sessions_outlive_a_standstill_in_which_their_clients_write_on() {
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
