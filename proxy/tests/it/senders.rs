//! The senders of the lab put on the wire what their programs do, so that the tests of headers
//! in show what becomes of it.

use ppv2_lab::nginx::nginx;
use ppv2_lab::senders::{Front, Says, Session};
use ppv2_lab::*;

const SENDER: &str = "127.0.0.2";
const CLIENT: &str = "203.0.113.11:54321";
const VIP: &str = "198.51.100.10:9000";

#[test]
fn they_send_what_their_programs_do_and_pass_replies_on() {
    let (client, destination) = (CLIENT.parse().unwrap(), VIP.parse().unwrap());
    for says in [Says::Every, Says::First, Says::Alone, Says::Spp, Says::Text] {
        let server = socket("127.0.0.1");
        let to = server.local_addr().unwrap();
        let mut sender = Session::new(SENDER, says, client, destination);
        let mut first = Vec::new();
        for payload in [&b"one"[..], b"two"] {
            sender.send(to, payload);
            let count = if says == Says::Alone && payload == b"one" {
                2
            } else {
                1
            };
            for _ in 0..count {
                let (datagram, from) = receive(&server);
                assert_eq!(from, sender.address());
                first.push(datagram);
            }
        }
        let lens: Vec<_> = first.iter().map(Vec::len).collect();
        let text = "PROXY TCP4 203.0.113.11 198.51.100.10 54321 9000\r\n";
        match says {
            Says::Every => assert_eq!(lens, [31, 31]),
            Says::First => assert_eq!(lens, [31, 3]),
            Says::Alone => assert_eq!(lens, [28, 3, 3]),
            Says::Spp => assert_eq!(lens, [41, 41]),
            Says::Text => assert_eq!(first, [[text.as_bytes(), b"one"].concat(), b"two".to_vec()]),
        }
        if matches!(says, Says::Every | Says::First | Says::Alone) {
            let (header, _) = ppv2::decode(&first[0]).unwrap();
            assert_eq!(
                (header.client(), header.destination()),
                (Some(client), Some(destination))
            );
            assert_eq!(first[0][13], 0x12);
        }

        let front = Front::start(says, address("127.0.0.1"), SENDER, to);
        let clients = [socket("127.0.0.9"), socket("127.0.0.9")];
        for client in &clients {
            client.send_to(b"question", front.address).unwrap();
            let (mut datagram, mut from) = receive(&server);
            if says == Says::Alone {
                assert_eq!(ppv2::decode(&datagram).unwrap().1, b"");
                (datagram, from) = receive(&server);
            }
            assert!(datagram.ends_with(b"question"));
            let header = &datagram[..datagram.len() - b"question".len()];
            let header = if says == Says::Spp { header } else { b"" };
            server.send_to(&[header, b"answer"].concat(), from).unwrap();
        }
        for client in &clients {
            assert_eq!(receive(client), (b"answer".to_vec(), front.address));
        }
    }
}

/// nginx 1.31.3 is the one of these programs that is at hand.
#[test]
fn nginx_sends_what_the_labs_sender_does() {
    let (folder, front, to) = (
        tempfile::tempdir().unwrap(),
        address("127.0.0.1"),
        socket("127.0.0.1"),
    );
    let server = to.local_addr().unwrap();
    let _nginx = nginx(&folder, front, SENDER, server, "proxy_protocol on;");
    let client = socket("127.0.0.9");
    let own = client.local_addr().unwrap();
    let mut sender = Session::new(SENDER, Says::Text, own, front);
    let mut ports = Vec::new();
    for payload in [&b"first"[..], b"second", b"third"] {
        client.send_to(payload, front).unwrap();
        let (datagram, from) = receive(&to);
        assert_eq!(vec![datagram], sender.datagrams(payload));
        ports.push(from);
    }
    ports.dedup();
    assert_eq!((ports.len(), ports[0].ip()), (1, SENDER.parse().unwrap()));
}
