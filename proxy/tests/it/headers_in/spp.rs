//! Simple Proxy Protocol on a listener: each datagram has the 38 bytes in front, and each reply
//! carries them back to the sender.

use ppv2_lab::senders::{Front, Says, Session, spp};
use ppv2_lab::*;

use super::*;

const SPP: &str = "formats = [\"spp\"]";

fn session(client: &str, destination: &str) -> Session {
    Session::new(SENDER, Says::Spp, addr(client), addr(destination))
}

#[test]
fn the_client_and_its_destination_are_read_and_replies_carry_the_header() {
    for keys in [SPP, "formats = [\"v2\", \"spp\"]"] {
        let it = In::start(keys);
        for (client, destination) in [(CLIENT, VIP), (CLIENT_V6, VIP_V6), (CLIENT, VIP_V6)] {
            let mut sender = session(client, destination);
            for payload in [
                &b"question"[..],
                b"",
                &spp(addr(OTHER_CLIENT), addr(VIP)),
                b"last",
            ] {
                sender.send(it.listener, payload);
                let (seen, to, got, from) = it.next();
                assert_eq!(to, addr(destination));
                assert_eq!((seen.port(), &got[..]), (addr(client).port(), payload));
                for answer in [&b"answer"[..], b"", payload] {
                    it.answers(from, answer);
                    let (reply, from) = receive(&sender.socket);
                    let header = spp(addr(client), addr(destination));
                    assert_eq!(reply, [&header, answer].concat());
                    assert_eq!(from, it.listener);
                }
            }
        }
        assert_eq!(all_dropped(&it.proxy), []);
    }
}

#[test]
fn both_formats_at_once_are_answered_in_kind() {
    let it = In::start("formats = [\"spp\", \"v2\"]");
    let mut v2 = Session::new(SENDER, Says::Every, addr(CLIENT), addr(VIP));
    let mut spp_too = session(OTHER_CLIENT, VIP);
    let mut ways = Vec::new();
    for sender in [&mut v2, &mut spp_too] {
        sender.send(it.listener, b"question");
        ways.push(it.gets(sender.client, sender.destination, b"question"));
    }
    for (sender, way) in [&v2, &spp_too].into_iter().zip(ways).rev() {
        it.answers(way, b"answer");
        // Strips the header of Simple Proxy Protocol alone.
        assert_eq!(sender.receive(), (b"answer".to_vec(), it.listener));
    }
}

#[test]
fn what_is_not_accepted_or_malformed_is_dropped() {
    let it = In::start(SPP);
    let sender = socket(SENDER);
    let right = spp(addr(CLIENT), addr(VIP));
    let v2 = Session::new(SENDER, Says::Every, addr(CLIENT), addr(VIP)).datagrams(b"v2");
    let mut other_magic = right;
    other_magic[0] = 0x57;
    for datagram in [&v2[0][..], b"bare", b"", &other_magic] {
        sender.send_to(datagram, it.listener).unwrap();
    }
    it.eventually_dropped("no_header", 4);
    for client in [
        "203.0.113.11:0",
        "0.0.0.0:53",
        "224.0.0.1:53",
        "[::]:53",
        "[ff02::1]:53",
    ] {
        let datagram = [&spp(addr(client), addr(VIP))[..], b"payload"].concat();
        sender.send_to(&datagram, it.listener).unwrap();
    }
    it.eventually_dropped("client_address", 5);
    // Cut off within the header.
    sender.send_to(&right[..37], it.listener).unwrap();
    eventually("the drop", || {
        it.dropped("no_header") + it.dropped("bad_header") == 5
    });
    receive_nothing(&it.server);
    receive_nothing(&sender);
}

#[test]
fn clients_behind_a_program_that_sends_it_are_served() {
    let it = In::start(SPP);
    let front = Front::start(Says::Spp, address("127.0.0.1"), SENDER, it.listener);
    let clients: Vec<_> = (0..10).map(|_| socket("127.0.0.9")).collect();
    for client in &clients {
        client.send_to(b"question", front.address).unwrap();
    }
    for _ in &clients {
        let (client, destination, _, session) = it.next();
        assert_eq!(destination, front.address);
        it.answers(session, client.to_string().as_bytes());
    }
    for client in &clients {
        let own = client.local_addr().unwrap().to_string();
        assert_eq!(receive(client), (own.into_bytes(), front.address));
    }
}

/// Two of our proxies, which speak it to each other: the server's replies need none.
#[test]
fn two_of_our_proxies_speak_it_to_each_other() {
    for ip in ["127.0.0.1", "::1"] {
        let (a, b, server) = (address(ip), address(ip), socket(ip));
        let to = server.local_addr().unwrap();
        let second = Proxy::start(&config(b, to, &accept(ip, SPP), ""));
        let first = Proxy::start(&config(a, b, "", "header = { format = \"spp\" }"));
        let clients: Vec<_> = (0..5).map(|_| socket(ip)).collect();
        for payload in [&b"question"[..], b"", &[7; 1400]] {
            for client in &clients {
                client.send_to(payload, a).unwrap();
                let (datagram, session) = receive(&server);
                let (seen, destination, got) = read_plain_header(&datagram);
                assert_eq!((seen, destination), (client.local_addr().unwrap(), a));
                assert!(got == payload);
                server.send_to(payload, session).unwrap();
                assert_eq!(receive(client), (payload.to_vec(), a));
            }
        }
        for proxy in [&first, &second] {
            assert_eq!(all_dropped(proxy), []);
        }
    }
}

/// Version 2 in front, Simple Proxy Protocol behind, and the other way round.
#[test]
fn formats_are_translated_in_a_chain() {
    let spp_out = "header = { format = \"spp\" }";
    for (ip, of_first, accepts, of_second) in [
        ("127.0.0.1", "", "", spp_out),
        ("::1", spp_out, SPP, ""),
        ("127.0.0.1", spp_out, SPP, spp_out),
    ] {
        let (a, b, server) = (address(ip), address(ip), socket(ip));
        let to = server.local_addr().unwrap();
        let second = Proxy::start(&config(b, to, &accept(ip, accepts), of_second));
        let first = Proxy::start(&config(a, b, "", of_first));
        let clients = [(); 3].map(|()| socket(ip));
        let mut asked = Vec::new();
        for client in &clients {
            client.send_to(b"question", a).unwrap();
            let (datagram, session) = receive(&server);
            let own = client.local_addr().unwrap();
            let header = match of_second {
                "" => fake_proxy::from_client_at(own, a, b""),
                _ => spp(own, a).to_vec(),
            };
            assert_eq!(datagram, [&header[..], b"question"].concat());
            // A server that reads Simple Proxy Protocol returns it.
            let header = if of_second.is_empty() {
                Vec::new()
            } else {
                header
            };
            asked.push((session, header));
        }
        for (number, (session, header)) in asked.iter().enumerate().rev() {
            let answer = format!("answer {number}");
            let reply = [&header[..], answer.as_bytes()].concat();
            server.send_to(&reply, *session).unwrap();
            assert_eq!(receive(&clients[number]), (answer.into_bytes(), a));
        }
        for proxy in [&first, &second] {
            assert_eq!(all_dropped(proxy), []);
        }
    }
}
