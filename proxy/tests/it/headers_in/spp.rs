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
