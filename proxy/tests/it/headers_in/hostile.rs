//! What senders must not do: each mistake is counted under its own reason, nothing of it
//! reaches a server, and what looks like a header where none is due is payload.

use ppv2::{Encoder, TlvType, Transport};
use ppv2_lab::fake_proxy::from_client_at;
use ppv2_lab::senders::{Says, Session, spp};
use ppv2_lab::*;

use super::*;

fn header(client: &str, payload: &[u8]) -> Vec<u8> {
    from_client_at(addr(client), addr(VIP), payload)
}

/// A header of a client over IPv4 with these bytes behind its addresses, and a payload.
fn with_tail(tail: &[u8]) -> Vec<u8> {
    let mut datagram = header(CLIENT, b"");
    let length = u16::try_from(12 + tail.len()).unwrap();
    datagram[14..16].copy_from_slice(&length.to_be_bytes());
    [&datagram[..], tail, b"payload"].concat()
}

/// A header with the given command, family and transport, addresses and a payload.
fn raw(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
    let mut datagram = ppv2::SIGNATURE.to_vec();
    datagram.extend([command, family]);
    datagram.extend(u16::try_from(block.len()).unwrap().to_be_bytes());
    datagram.extend(block);
    datagram.extend(b"payload");
    datagram
}

/// Datagrams of a trusted sender, and why they are dropped.
fn mistakes() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let mut buffer = [0; 600];
    let path = [b'a'; 108];
    let unix = Encoder::unix(&mut buffer, Transport::Datagram, &path, &path).unwrap();
    let unix = unix.finish().to_vec();
    let unix_stream = Encoder::unix(&mut buffer, Transport::Stream, &path, &path).unwrap();
    let unix_stream = unix_stream.finish().to_vec();
    let tcp = Encoder::tcp(&mut buffer, addr(CLIENT), addr(VIP)).unwrap();
    let tcp = tcp.finish().to_vec();
    let tcp6 = Encoder::tcp(&mut buffer, addr(CLIENT_V6), addr(VIP_V6)).unwrap();
    let tcp6 = tcp6.finish().to_vec();
    let mut summed = Encoder::udp(&mut buffer, addr(CLIENT), addr(VIP))
        .and_then(Encoder::crc32c)
        .unwrap()
        .finish()
        .to_vec();
    // Another client than the one that the sum is of.
    summed[19] ^= 1;
    let mut version = header(CLIENT, b"payload");
    version[12] = 0x11;
    let mut command = header(CLIENT, b"payload");
    command[12] = 0x22;
    let mut past_end = header(CLIENT, b"payload");
    past_end[14] = 0xff;
    let mut cut = header(CLIENT, b"");
    cut.truncate(27);
    let block = &header(CLIENT, b"")[16..];
    let v1 = b"PROXY TCP4 203.0.113.11 198.51.100.10 54321 9000\r\npayload";
    vec![
        ("bare", "no_header", b"payload".to_vec()),
        ("empty", "no_header", Vec::new()),
        (
            "a format that is not accepted",
            "no_header",
            spp(addr(CLIENT), addr(VIP)).to_vec(),
        ),
        (
            "a header behind its first byte",
            "no_header",
            header(CLIENT, b"")[1..].to_vec(),
        ),
        ("v1 text", "v1_header", v1.to_vec()),
        (
            "v1 text of no client",
            "v1_header",
            b"PROXY UNKNOWN\r\npayload".to_vec(),
        ),
        ("version 1", "bad_header", version),
        ("command 2", "bad_header", command),
        ("past the end", "bad_header", past_end),
        ("cut off", "bad_header", cut),
        ("no such family", "bad_header", raw(0x21, 0x42, block)),
        ("no such transport", "bad_header", raw(0x21, 0x13, block)),
        (
            "family without transport",
            "bad_header",
            raw(0x21, 0x10, block),
        ),
        (
            "transport without family",
            "bad_header",
            raw(0x21, 0x02, block),
        ),
        ("addresses cut", "bad_header", raw(0x21, 0x12, &block[..11])),
        (
            "IPv4 addresses for IPv6",
            "bad_header",
            raw(0x21, 0x22, block),
        ),
        ("a stray byte", "bad_header", with_tail(&[4])),
        ("two stray bytes", "bad_header", with_tail(&[4, 0])),
        (
            "a TLV past the header",
            "bad_header",
            with_tail(&[0xe0, 0, 5, 1, 2, 3]),
        ),
        (
            "a TLV far past the header",
            "bad_header",
            with_tail(&[0xe0, 0xff, 0xff]),
        ),
        ("a wrong checksum", "bad_header", summed),
        (
            "a short checksum",
            "bad_header",
            with_tail(&[3, 0, 3, 1, 2, 3]),
        ),
        (
            "two checksums",
            "bad_header",
            with_tail(&[3, 0, 4, 0, 0, 0, 0, 3, 0, 4, 0, 0, 0, 0]),
        ),
        (
            "a long unique id",
            "bad_header",
            with_tail(&[&[5, 0, 129][..], &[7; 129]].concat()),
        ),
        (
            "TLVs over the limit",
            "header_too_long",
            with_tail(&[4, 0, 0].repeat(162)),
        ),
        (
            "a TLV over the limit",
            "header_too_long",
            with_tail(&[&[4, 4, 0][..], &[0; 1024]].concat()),
        ),
        ("TCP", "tcp", [&tcp[..], b"payload"].concat()),
        ("TCP over IPv6", "tcp", [&tcp6[..], b"payload"].concat()),
        ("a UNIX datagram", "unix", [&unix[..], b"payload"].concat()),
        (
            "a UNIX stream",
            "unix",
            [&unix_stream[..], b"payload"].concat(),
        ),
        ("no client", "unspecified", raw(0x21, 0, b"")),
        ("no client but bytes", "unspecified", raw(0x21, 0, block)),
        (
            "port 0",
            "client_address",
            header("203.0.113.11:0", b"payload"),
        ),
        (
            "no address",
            "client_address",
            header("0.0.0.0:53", b"payload"),
        ),
        (
            "multicast",
            "client_address",
            header("224.0.0.1:53", b"payload"),
        ),
        (
            "broadcast",
            "client_address",
            header("255.255.255.255:53", b"payload"),
        ),
        (
            "IPv6 multicast",
            "client_address",
            from_client_at(addr("[ff02::1]:53"), addr(VIP_V6), b"payload"),
        ),
    ]
}

#[test]
fn each_mistake_of_a_trusted_sender_has_a_reason_of_its_own() {
    for keys in ["", "direct = \"accept\"", "remember = {}"] {
        let it = In::start(keys);
        let mut expected = std::collections::BTreeMap::<String, u64>::new();
        // A sender that never said a header, so that nothing of it is remembered.
        let wrong = socket(SENDER);
        let mut right = Session::new(SENDER, Says::Every, addr(CLIENT), addr(VIP));
        for (what, reason, datagram) in mistakes() {
            wrong.send_to(&datagram, it.listener).unwrap();
            *expected.entry(reason.to_owned()).or_default() += 1;
            let payload = format!("after {what}");
            right.send(it.listener, payload.as_bytes());
            it.gets(right.client, right.destination, payload.as_bytes());
        }
        // Each was read before what followed it, unless another worker had it.
        let expected: Vec<_> = expected.into_iter().collect();
        let counted = || {
            let mut all = all_dropped(&it.proxy);
            all.sort();
            all
        };
        eventually("all drops", || {
            let sum = |all: &[(String, u64)]| all.iter().map(|(_, n)| n).sum::<u64>();
            sum(&counted()) >= sum(&expected)
        });
        assert_eq!(counted(), expected, "{keys}");
        receive_nothing(&it.server);
        // Nothing is answered.
        receive_nothing(&wrong);
    }
}

#[test]
fn headers_of_strangers_are_dropped_or_payload() {
    let forged = header(CLIENT, b"forged");
    let text = b"PROXY TCP4 203.0.113.66 127.0.0.1 1 2\r\nforged".to_vec();
    let it = In::start("");
    let stranger = socket(STRANGER);
    for datagram in [&forged[..], &text, b"direct", b""] {
        stranger.send_to(datagram, it.listener).unwrap();
    }
    it.eventually_dropped("untrusted", 4);
    receive_nothing(&it.server);
    assert_eq!(all_dropped(&it.proxy), [("untrusted".to_owned(), 4)]);

    let it = In::start("direct = \"accept\"");
    let own = stranger.local_addr().unwrap();
    for datagram in [&forged[..], &text, b"direct", b""] {
        stranger.send_to(datagram, it.listener).unwrap();
        let session = it.gets(own, it.listener, datagram);
        it.answers(session, b"answer");
        assert_eq!(receive(&stranger), (b"answer".to_vec(), it.listener));
    }
    assert_eq!(all_dropped(&it.proxy), []);
}

#[test]
fn headers_inside_headers_are_payload_and_counted() {
    let it = In::start("");
    let plain = In::with("", "mode = \"plain\"", "");
    let mut sender = Session::new(SENDER, Says::Every, addr(CLIENT), addr(VIP));
    let inner = [
        header(OTHER_CLIENT, b"inner"),
        from_client_at(addr(CLIENT_V6), addr(VIP_V6), b"inner"),
        header(OTHER_CLIENT, &header(CLIENT, b"")),
        raw(0x20, 0, b""),
    ];
    for payload in &inner {
        sender.send(it.listener, payload);
        it.gets(sender.client, sender.destination, payload);
        sender.send(plain.listener, payload);
        assert_eq!(receive(&plain.server).0, *payload);
    }
    let name = "ppv2_nested_headers_total";
    eventually(name, || it.count(name) == 4 && plain.count(name) == 4);
    assert_eq!(all_dropped(&it.proxy), []);
    assert_eq!(all_dropped(&plain.proxy), []);
}

#[test]
fn local_headers_speak_for_their_sender_alone() {
    let it = In::start("");
    let strict = In::start("local = \"drop\"");
    let sender = socket(SENDER);
    let own = sender.local_addr().unwrap();
    let block = &header(CLIENT, b"")[16..];
    let probes = [
        raw(0x20, 0, b""),
        // Whatever addresses it has, and whatever stands behind them.
        raw(0x20, 0x12, block),
        raw(0x20, 0x11, &[block, &[9; 5]].concat()),
        raw(0x20, 0x22, b""),
    ];
    for probe in &probes {
        sender.send_to(probe, it.listener).unwrap();
        let session = it.gets(own, it.listener, b"payload");
        it.answers(session, b"alive");
        assert_eq!(receive(&sender), (b"alive".to_vec(), it.listener));
        sender.send_to(probe, strict.listener).unwrap();
    }
    strict.eventually_dropped("local_header", 4);
    receive_nothing(&strict.server);
    assert_eq!(all_dropped(&it.proxy), []);
}

#[test]
fn a_sender_that_stops_sending_headers_is_not_served() {
    let it = In::start("");
    let mut sender = Session::new(SENDER, Says::Every, addr(CLIENT), addr(VIP));
    sender.send(it.listener, b"with");
    let session = it.gets(sender.client, sender.destination, b"with");
    for _ in 0..5 {
        sender.send_bare(it.listener, b"without");
    }
    it.eventually_dropped("no_header", 5);
    receive_nothing(&it.server);
    // Its session is as it was.
    it.answers(session, b"answer");
    assert_eq!(sender.receive(), (b"answer".to_vec(), it.listener));
    sender.send(it.listener, b"again");
    assert_eq!(
        it.gets(sender.client, sender.destination, b"again"),
        session
    );
}

/// TLVs of a header's whole room, of any type and size, neither slow nor fatal.
#[test]
fn the_longest_headers_pass() {
    let it = In::start("");
    let sender = socket(SENDER);
    for tail in [
        [4, 0, 0].repeat(161),
        [&[0x20, 1, 225][..], &[0x20, 0, 3].repeat(160), &[0]].concat(),
        [&[TlvType::AUTHORITY.0, 1, 225][..], &[0xff; 481]].concat(),
    ] {
        assert!(28 + tail.len() <= 512, "{}", tail.len());
        sender.send_to(&with_tail(&tail), it.listener).unwrap();
        it.gets(addr(CLIENT), addr(VIP), b"payload");
    }
    assert_eq!(all_dropped(&it.proxy), []);
}

/// Replies to such a client would begin an exchange without end: its address belongs to a
/// server, or to a listener of the proxy's own.
#[test]
fn clients_that_are_servers_or_listeners_are_dropped() {
    for (keys, mode) in [("", "ppv2"), ("remember = {}", "ppv2"), ("", "plain")] {
        let it = In::with(keys, &format!("mode = \"{mode}\""), "");
        let server = it.server.local_addr().unwrap();
        let mut sender = Session::new(SENDER, Says::Every, server, addr(VIP));
        for client in [server, it.listener] {
            sender.becomes(client);
            sender.send(it.listener, b"loop");
        }
        it.eventually_dropped("bad_source", 2);
        receive_nothing(&it.server);
        assert_eq!(it.count("ppv2_sessions_opened_total"), 0);
    }
}
