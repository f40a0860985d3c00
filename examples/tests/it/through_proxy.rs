//! Every example behind the real proxy, for real clients.

use std::time::Duration;

use ppv2_lab::{receive, socket};

use crate::http3;
use crate::running::{Example, Proxy, REPLIES};

fn behind_proxy(path: &str, listeners: usize, replies: &str) -> (Example, Proxy) {
    let example = Example::start(path);
    let proxy = Proxy::start(example.address, listeners, replies);
    (example, proxy)
}

#[test]
fn echo_and_whoami_answer_every_client_its_own() {
    for (path, echoes) in [
        (env!("CARGO_BIN_EXE_echo_std"), true),
        (env!("CARGO_BIN_EXE_echo_tokio"), true),
        (env!("CARGO_BIN_EXE_whoami_std"), false),
        (env!("CARGO_BIN_EXE_whoami_tokio"), false),
    ] {
        for replies in REPLIES {
            let (_example, proxy) = behind_proxy(path, 1, replies);
            let clients: Vec<_> = (0..60).map(|_| socket("127.0.0.2")).collect();
            for _ in 0..20 {
                for client in &clients {
                    client.send_to(b"hello", proxy.listener()).unwrap();
                }
                for client in &clients {
                    let own = client.local_addr().unwrap().to_string().into_bytes();
                    let answer = if echoes { b"hello".to_vec() } else { own };
                    let expected = (answer, proxy.listener());
                    assert_eq!(receive(client), expected, "{path}, {replies}");
                }
            }
        }
    }
}

/// `reply` answers through the proxy and the listener that the datagram came by.
#[test]
fn one_client_at_two_listeners_and_two_proxies_gets_each_answer_from_where_it_asked() {
    for (path, replies) in [
        env!("CARGO_BIN_EXE_whoami_std"),
        env!("CARGO_BIN_EXE_whoami_tokio"),
    ]
    .into_iter()
    .flat_map(|path| REPLIES.map(|replies| (path, replies)))
    {
        let (example, proxy) = behind_proxy(path, 2, replies);
        let other = Proxy::start(example.address, 1, replies);
        let client = socket("127.0.0.2");
        let mut asked = [&proxy.listeners[..], &other.listeners].concat();
        for listener in &asked {
            client.send_to(b"who am I?", *listener).unwrap();
        }
        let mut answered = Vec::new();
        for _ in &asked {
            let (answer, from) = receive(&client);
            assert_eq!(answer, client.local_addr().unwrap().to_string().as_bytes());
            answered.push(from);
        }
        asked.sort();
        answered.sort();
        assert_eq!(answered, asked);
    }
}

/// A question for TXT records of `name`.
fn question(id: u16, name: &str) -> Vec<u8> {
    let [high, low] = id.to_be_bytes();
    // Header (RFC 1035, section 4.1.1): a query that may recurse, one question.
    let mut message = vec![high, low, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        message.push(u8::try_from(label.len()).unwrap());
        message.extend(label.as_bytes());
    }
    // The root, type TXT, class IN.
    message.extend([0, 0, 16, 0, 1]);
    message
}

#[test]
fn dns_tells_every_client_its_address() {
    for replies in REPLIES {
        dns_tells_address(replies);
    }
}

fn dns_tells_address(replies: &str) {
    let (_example, proxy) = behind_proxy(env!("CARGO_BIN_EXE_dns_hickory"), 1, replies);
    for (id, ip) in [(1, "127.0.0.2"), (2, "127.0.0.3")] {
        let client = socket(ip);
        let question = question(id, "whoami.example");
        client.send_to(b"no question", proxy.listener()).unwrap();
        client.send_to(&question, proxy.listener()).unwrap();
        let (answer, from) = receive(&client);
        assert_eq!(from, proxy.listener());
        assert_eq!(answer[..2], question[..2]);
        // No error, one question, one answer.
        assert_eq!(
            (answer[3] & 0x0f, &answer[4..8]),
            (0, [0, 1, 0, 1].as_slice())
        );
        let own = client.local_addr().unwrap().to_string();
        assert!(
            answer.ends_with(own.as_bytes()),
            "{}",
            answer.escape_ascii()
        );
    }
}

#[test]
fn http3_sees_the_client_and_where_it_moves_to() {
    for replies in REPLIES {
        let (_example, proxy) = behind_proxy(env!("CARGO_BIN_EXE_http3_quinn"), 1, replies);
        http3::move_about(proxy.listener());
    }
}

#[test]
fn game_pushes_to_its_players_unasked() {
    for replies in REPLIES {
        game_pushes(replies);
    }
}

fn game_pushes(replies: &str) {
    let (_example, proxy) = behind_proxy(env!("CARGO_BIN_EXE_game_tokio"), 1, replies);
    let players = ["127.0.0.2", "127.0.0.3"].map(socket);
    let onlooker = socket("127.0.0.4");
    onlooker.send_to(b"move", proxy.listener()).unwrap();
    for player in &players {
        player.send_to(b"join", proxy.listener()).unwrap();
    }
    players[0].send_to(b"move", proxy.listener()).unwrap();
    // What it does from here on it does without hearing from anybody.
    for player in &players {
        while receive(player).0 != b"2 players, 1 moves" {}
        for _ in 0..3 {
            assert_eq!(receive(player).0, b"2 players, 1 moves");
        }
    }
    players[1].send_to(b"leave", proxy.listener()).unwrap();
    while receive(&players[0]).0 != b"1 players, 1 moves" {}
    onlooker.set_nonblocking(true).unwrap();
    onlooker.recv(&mut [0; 64]).unwrap_err();
}

#[test]
fn rate_limit_tells_clients_apart() {
    for replies in ["session", "tagged"] {
        rate_limit(replies);
    }
}

fn rate_limit(replies: &str) {
    // All of it would take fifteen seconds to let through; no buffer
    // is too small for it.
    const FLOOD: usize = 150;

    let (_example, proxy) = behind_proxy(env!("CARGO_BIN_EXE_rate_limit_std"), 1, replies);
    let (flooding, modest) = (socket("127.0.0.2"), socket("127.0.0.3"));
    for _ in 0..FLOOD {
        flooding.send_to(b"flood", proxy.listener()).unwrap();
    }
    modest.send_to(b"hello", proxy.listener()).unwrap();
    assert_eq!(receive(&modest).0, b"hello");

    assert_eq!(receive(&flooding).0, b"flood");
    let mut answers = 1;
    flooding
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    while flooding.recv(&mut [0; 64]).is_ok() {
        answers += 1;
    }
    assert!(answers < FLOOD, "all {answers} answered");
}
