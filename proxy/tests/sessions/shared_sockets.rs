//! Sessions to different servers on one socket: as many as there are servers,
//! and each reply still goes to the one client whose session it answers.

use std::net::{SocketAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use crate::common::*;
use ppv2_proxy::session::LINGER;

/// A proxy for these servers, with one worker.
struct Shared {
    process: Process,
    listener: SocketAddr,
    admin: SocketAddr,
    _folder: tempfile::TempDir,
}

fn shared(servers: &[&UdpSocket], share: bool, more: &str) -> Shared {
    let host = servers[0].local_addr().unwrap().ip().to_string();
    let (listener, admin) = (address(&host), address(&host));
    let servers: Vec<_> = servers
        .iter()
        .map(|server| server.local_addr().unwrap().to_string())
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let config = format!(
        "workers = 1\n[admin]\nlisten = \"{admin}\"\n\
         [[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\n{more}\n\
         [upstream.u]\nbalance = \"round_robin\"\nservers = {servers:?}\nshare_sockets = {share}\n"
    );
    Shared {
        process: proxy_with(&folder, &config),
        listener,
        admin,
        _folder: folder,
    }
}

/// Answers every datagram with its payload and the client that its header names.
fn echo(server: &UdpSocket, total: usize) {
    for _ in 0..total {
        let (datagram, proxy) = receive(server);
        let (client, _, payload) = read_header(&datagram);
        let answer = [client.to_string().as_bytes(), b" ", &payload].concat();
        server.send_to(&answer, proxy).unwrap();
    }
}

fn every_client_gets_its_own(host: &str) {
    const EXCHANGES: usize = 200;
    let servers: Vec<_> = (0..4).map(|_| socket(host)).collect();
    let proxy = shared(&servers.iter().collect::<Vec<_>>(), true, "");
    let clients: Vec<_> = (0..100).map(|_| socket(host)).collect();
    thread::scope(|scope| {
        for server in &servers {
            scope.spawn(|| echo(server, clients.len() / servers.len() * EXCHANGES));
        }
        for exchange in 0..EXCHANGES {
            let question = format!("question {exchange}");
            for client in &clients {
                client.send_to(question.as_bytes(), proxy.listener).unwrap();
            }
            for client in &clients {
                let expected = format!("{} {question}", client.local_addr().unwrap());
                let (answer, from) = receive(client);
                assert_eq!(String::from_utf8_lossy(&answer), expected);
                assert_eq!(from, proxy.listener);
            }
        }
    });
    assert_eq!(metric(proxy.admin, "ppv2_session_sockets"), 25);
    let opened = "ppv2_sessions_opened_total{listener=\"listener1\"}";
    assert_eq!(metric(proxy.admin, opened), 100);
}

#[test]
fn a_hundred_clients_have_their_own_replies_through_25_sockets() {
    every_client_gets_its_own("127.0.0.1");
    every_client_gets_its_own("::1");
}

#[test]
fn a_port_serves_a_session_to_each_server() {
    let setup = "echo 40000 40003 > /proc/sys/net/ipv4/ip_local_port_range";
    if !namespace::enter("a_port_serves_a_session_to_each_server", setup) {
        return;
    }
    for (share, sessions) in [(false, 4), (true, 12)] {
        let servers: Vec<_> = (0..3).map(|_| bind(address("127.0.0.1"))).collect();
        let proxy = shared(&servers.iter().collect::<Vec<_>>(), share, "");
        let log = proxy.process.log();
        assert!(log.contains(&format!("max_sessions={sessions}")), "{log}");
        let clients: Vec<_> = (0..20).map(|_| bind(address("127.0.0.1"))).collect();
        for client in &clients {
            client.send_to(b"question", proxy.listener).unwrap();
        }
        let opened = "ppv2_sessions_opened_total{listener=\"listener1\"}";
        let all = "ppv2_client_datagrams_total{listener=\"listener1\"}";
        eventually("all to be taken", || metric(proxy.admin, all) == 20);
        assert_eq!(metric(proxy.admin, opened), sessions);
        assert_eq!(metric(proxy.admin, "ppv2_session_sockets"), 4);
        assert_eq!(dropped(proxy.admin, "max_sessions"), 20 - sessions);
        for (n, client) in clients[..usize::try_from(sessions).unwrap()]
            .iter()
            .enumerate()
        {
            let (_, session) = receive(&servers[n % 3]);
            servers[n % 3].send_to(b"answer", session).unwrap();
            assert_eq!(receive(client), (b"answer".to_vec(), proxy.listener));
        }
    }
}

#[test]
fn what_a_server_was_not_asked_reaches_nobody() {
    let servers: Vec<_> = (0..3).map(|_| socket("127.0.0.1")).collect();
    let proxy = shared(&servers.iter().collect::<Vec<_>>(), true, "");
    let (one, two) = (socket("127.0.0.1"), socket("127.0.0.1"));
    served(&one, proxy.listener, &servers[0]);
    two.send_to(b"question", proxy.listener).unwrap();
    let (_, session) = receive(&servers[1]);
    assert_eq!(metric(proxy.admin, "ppv2_session_sockets"), 1);
    // The third server has no session on that socket, and a stranger none at all.
    servers[2].send_to(b"unasked", session).unwrap();
    socket("127.0.0.1").send_to(b"forged", session).unwrap();
    let wrong = || dropped(proxy.admin, "reply_wrong_source");
    eventually("two drops", || wrong() == 2);
    // The first one's goes to its own client, whoever's question it thinks of.
    servers[0].send_to(b"for one", session).unwrap();
    assert_eq!(receive(&one), (b"for one".to_vec(), proxy.listener));
    servers[1].send_to(b"for two", session).unwrap();
    assert_eq!(receive(&two), (b"for two".to_vec(), proxy.listener));
    receive_nothing(&one);
    receive_nothing(&two);
}

#[test]
fn a_place_that_owes_an_answer_is_given_to_nobody_else() {
    // With one port, there is no other socket for whoever comes next.
    let setup = "echo 40000 40000 > /proc/sys/net/ipv4/ip_local_port_range";
    let name = "a_place_that_owes_an_answer_is_given_to_nobody_else";
    if !namespace::enter(name, setup) {
        return;
    }
    let servers: Vec<_> = (0..2).map(|_| bind(address("127.0.0.1"))).collect();
    let proxy = shared(
        &servers.iter().collect::<Vec<_>>(),
        true,
        "idle_timeout = \"1s\"",
    );
    let clients: Vec<_> = (0..4).map(|_| bind(address("127.0.0.1"))).collect();
    clients[0].send_to(b"unanswered", proxy.listener).unwrap();
    let (_, session) = receive(&servers[0]);
    served(&clients[1], proxy.listener, &servers[1]);
    let ended = "ppv2_sessions_ended_total{listener=\"listener1\",reason=\"idle\"}";
    // The second session goes on, and keeps the socket.
    eventually("the end of the first", || {
        clients[1].send_to(b"on", proxy.listener).unwrap();
        let (_, session) = receive(&servers[1]);
        servers[1].send_to(b"on", session).unwrap();
        receive(&clients[1]);
        thread::sleep(Duration::from_millis(100));
        metric(proxy.admin, ended) == 1
    });
    // The next turn is the first server's, whose place may not be given on.
    clients[2].send_to(b"question", proxy.listener).unwrap();
    eventually("a drop", || {
        dropped(proxy.admin, "max_sockets") + dropped(proxy.admin, "no_ports") == 1
    });
    servers[0].send_to(b"late answer", session).unwrap();
    let nobodys =
        || dropped(proxy.admin, "reply_late") + dropped(proxy.admin, "reply_wrong_source");
    eventually("the late answer", || nobodys() == 1);
    for client in &clients {
        receive_nothing(client);
    }
}

#[test]
fn a_place_that_was_answered_serves_the_next_client() {
    let servers: Vec<_> = (0..2).map(|_| socket("127.0.0.1")).collect();
    let proxy = shared(
        &servers.iter().collect::<Vec<_>>(),
        true,
        "responses = 1\nidle_timeout = \"1s\"",
    );
    for _ in 0..50 {
        for server in &servers {
            served(&socket("127.0.0.1"), proxy.listener, server);
        }
    }
    // Ended sessions rest, each on a place of its own.
    assert_eq!(metric(proxy.admin, "ppv2_sessions_retired"), 100);
    assert_eq!(metric(proxy.admin, "ppv2_session_sockets"), 50);
    eventually("their rest to end", || {
        metric(proxy.admin, "ppv2_session_sockets") == 0
    });
    for server in &servers {
        served(&socket("127.0.0.1"), proxy.listener, server);
    }
    assert_eq!(metric(proxy.admin, "ppv2_session_sockets"), 1);
}

#[test]
fn a_server_that_never_answers_costs_the_others_no_rest() {
    let setup = "echo 40000 40007 > /proc/sys/net/ipv4/ip_local_port_range";
    let name = "a_server_that_never_answers_costs_the_others_no_rest";
    if !namespace::enter(name, setup) {
        return;
    }
    let servers: Vec<_> = (0..2).map(|_| bind(address("127.0.0.1"))).collect();
    let proxy = shared(
        &servers.iter().collect::<Vec<_>>(),
        true,
        "responses = 1\nidle_timeout = \"60s\"",
    );
    for _ in 0..8 {
        let unlucky = bind(address("127.0.0.1"));
        unlucky.send_to(b"unanswered", proxy.listener).unwrap();
        receive(&servers[0]);
        served(&bind(address("127.0.0.1")), proxy.listener, &servers[1]);
    }
    assert_eq!(metric(proxy.admin, "ppv2_session_sockets"), 8);
    // The next turn is the silent server's, which has a session on each socket.
    let late = bind(address("127.0.0.1"));
    late.send_to(b"no place", proxy.listener).unwrap();
    eventually("a drop", || dropped(proxy.admin, "max_sockets") == 1);
    assert_eq!(metric(proxy.admin, "ppv2_sessions_retired"), 8);
    assert_eq!(metric(proxy.admin, "ppv2_sessions_reclaimed_total"), 0);
}

#[test]
fn late_replies_to_a_place_that_has_passed_on_are_counted() {
    let servers: Vec<_> = (0..2).map(|_| socket("127.0.0.1")).collect();
    let proxy = shared(
        &servers.iter().collect::<Vec<_>>(),
        true,
        "responses = 1\nidle_timeout = \"1s\"",
    );
    let ask = |server: &UdpSocket| {
        let client = socket("127.0.0.1");
        client.send_to(b"question", proxy.listener).unwrap();
        let (_, session) = receive(server);
        server.send_to(b"answer", session).unwrap();
        assert_eq!(receive(&client).0, b"answer");
        session
    };
    let session = ask(&servers[0]);
    let other = ask(&servers[1]);
    assert_eq!(session, other, "one socket for both");
    thread::sleep(LINGER + Duration::from_millis(500));
    // While the proxy stands still, late replies come, and a question that takes
    // over the place that they are for.
    let second = socket("127.0.0.1");
    proxy.process.pause();
    for _ in 0..5 {
        servers[0].send_to(b"late", session).unwrap();
    }
    second.send_to(b"question", proxy.listener).unwrap();
    proxy.process.signal("CONT");
    let (_, reused) = receive(&servers[0]);
    assert_eq!(reused, session, "the place that has rested");
    servers[0].send_to(b"answer", reused).unwrap();
    assert_eq!(receive(&second).0, b"answer");
    receive_nothing(&second);
    assert_eq!(dropped(proxy.admin, "reply_late"), 5);
}
