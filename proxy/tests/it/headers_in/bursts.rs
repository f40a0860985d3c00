//! Bursts, marks and empty datagrams of senders pass as they are, also where a burst that comes
//! in one piece has headers of several clients.

use quinn_udp::EcnCodepoint;

use ppv2_lab::fake_proxy::from_client_at;
use ppv2_lab::service::Proxy;
use ppv2_lab::*;

use super::*;
use crate::bursts::{Peer, exchange};
use crate::end_to_end::{receive_marked, report_marks, send_marked};

#[test]
fn bursts_pass_a_chain_both_ways() {
    for ip in ["127.0.0.1", "::1"] {
        let (mut server, a, b) = (Peer::new(socket(ip)), address(ip), address(ip));
        let of_b = accept(ip, "");
        let second = Proxy::start(&config(b, server.address(), &of_b, ""));
        let first = Proxy::start(&config(a, b, "", ""));
        exchange(&mut Peer::new(socket(ip)), a, &mut server);
        let sent = 8 + 8 + 32 + 45 + 64 + 2 + 1;
        for proxy in [&first, &second] {
            for name in ["ppv2_client_datagrams_total", "ppv2_reply_datagrams_total"] {
                eventually(name, || count_of(proxy, name) == sent);
            }
            assert_eq!(all_dropped(proxy), []);
        }
    }
}

/// A sender's burst in one piece, each datagram of which names a client of its own.
#[test]
fn a_burst_may_have_headers_of_many_clients() {
    let (listener, mut server) = (address("127.0.0.1"), Peer::new(socket("127.0.0.1")));
    let of_listener = accept(SENDER, "");
    let proxy = Proxy::start(&config(listener, server.address(), &of_listener, ""));
    let mut sender = Peer::new(socket(SENDER));
    let segment = ppv2::IPV4_HEADER_LEN + 100;
    for pattern in [
        // Each its own, pairs, and one that returns.
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
        [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6],
        [1, 1, 1, 1, 9, 1, 1, 1, 1, 9, 9, 9],
    ] {
        let client =
            |number: &u8| addr(&format!("203.0.113.{number}:{}", 100 + u16::from(*number)));
        let burst: Vec<_> = pattern
            .iter()
            .enumerate()
            .flat_map(|(place, number)| {
                let payload = [vec![*number; 99], vec![u8::try_from(place).unwrap()]].concat();
                from_client_at(client(number), addr(VIP), &payload)
            })
            .collect();
        sender.send(listener, &burst, segment);
        let mut came: Vec<_> = pattern.iter().map(|_| server.receive()).collect();
        // Datagrams of different sessions may overtake each other.
        came.sort_by_key(|(datagram, _)| datagram.last().copied());
        for (place, (number, (datagram, session))) in pattern.iter().zip(&came).enumerate() {
            let (seen, destination, payload) = read_plain_header(datagram);
            assert_eq!((seen, destination), (client(number), addr(VIP)));
            assert_eq!(payload[..99], [*number; 99]);
            assert_eq!(usize::from(payload[99]), place);
            server.send(*session, &payload, 100);
        }
        // All replies go to the one port.
        let mut places: Vec<_> = pattern.iter().map(|_| sender.receive()).collect();
        places.sort_by_key(|(reply, _)| reply[99]);
        for (place, (number, (reply, from))) in pattern.iter().zip(&places).enumerate() {
            assert_eq!((reply[0], usize::from(reply[99])), (*number, place));
            assert_eq!(*from, listener);
        }
    }
    assert_eq!(all_dropped(&proxy), []);
}

/// Some of a burst are wrong: the others pass, and each is counted.
#[test]
fn mistakes_within_a_burst_spare_the_others() {
    let (listener, mut server) = (address("127.0.0.1"), Peer::new(socket("127.0.0.1")));
    let of_listener = accept(SENDER, "");
    let proxy = Proxy::start(&config(listener, server.address(), &of_listener, ""));
    let sender = Peer::new(socket(SENDER));
    let right = from_client_at(addr(CLIENT), addr(VIP), &[7; 100]);
    let bare = vec![7; right.len()];
    let mut wrong = right.clone();
    wrong[12] = 0x31;
    let burst = [
        &right[..],
        &bare,
        &right,
        &wrong,
        &wrong,
        &right,
        &bare,
        &right,
    ]
    .concat();
    sender.send(listener, &burst, right.len());
    for _ in 0..4 {
        let (client, _, payload) = read_plain_header(&server.receive().0);
        assert_eq!((client, payload), (addr(CLIENT), vec![7; 100]));
    }
    eventually("the drops", || {
        dropped_by(&proxy, "no_header") == 2 && dropped_by(&proxy, "bad_header") == 2
    });
    server.receive_nothing();
}

/// With `remember`, the first of a burst says the client of the rest.
#[test]
fn a_burst_whose_first_alone_has_a_header_is_its_clients() {
    let (listener, mut server) = (address("127.0.0.1"), Peer::new(socket("127.0.0.1")));
    let of_listener = accept(SENDER, "remember = {}");
    let proxy = Proxy::start(&config(listener, server.address(), &of_listener, ""));
    let sender = Peer::new(socket(SENDER));
    for client in [CLIENT, OTHER_CLIENT] {
        let first = from_client_at(addr(client), addr(VIP), &[0; 100]);
        let rest: Vec<_> = (1..10u8).flat_map(|n| vec![n; first.len()]).collect();
        sender.send(listener, &[&first[..], &rest].concat(), first.len());
        for number in 0..10 {
            let (seen, destination, payload) = read_plain_header(&server.receive().0);
            assert_eq!((seen, destination), (addr(client), addr(VIP)));
            assert!(payload.iter().all(|byte| *byte == number), "{number}");
        }
    }
    assert_eq!(all_dropped(&proxy), []);
}

#[test]
fn marks_pass_a_chain_both_ways() {
    for ip in ["127.0.0.1", "::1"] {
        let (server, a, b) = (socket(ip), address(ip), address(ip));
        let to = server.local_addr().unwrap();
        let _second = Proxy::start(&config(b, to, &accept(ip, ""), ""));
        let _first = Proxy::start(&config(a, b, "", ""));
        let client = socket(ip);
        for socket in [&server, &client] {
            report_marks(socket);
        }
        for mark in [
            Some(EcnCodepoint::Ect0),
            None,
            Some(EcnCodepoint::Ect1),
            Some(EcnCodepoint::Ce),
        ] {
            send_marked(&client, a, mark);
            let (session, seen) = receive_marked(&server);
            assert_eq!(seen, mark, "to the server over {ip}");
            send_marked(&server, session, mark);
            assert_eq!(
                receive_marked(&client),
                (a, mark),
                "to the client over {ip}"
            );
        }
    }
}
