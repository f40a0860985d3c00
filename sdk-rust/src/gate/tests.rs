//! Hours of a server's life in microseconds.

use std::time::Duration;

use ppv2::{Encoder, Transport};

use super::*;

mod properties;

const PROXY: &str = "192.0.2.10:40000";
const OTHER_PROXY: &str = "192.0.2.11:40000";
const CLIENT: &str = "203.0.113.11:54321";
const OTHER_CLIENT: &str = "203.0.113.12:54321";
const LISTENER: &str = "198.51.100.10:9000";
const STRANGER: &str = "198.18.0.1:7";
const SECOND: Duration = Duration::from_secs(1);

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn trust() -> Trust {
    Trust::networks(["192.0.2.0/24", "2001:db8:1::/64"]).unwrap()
}

fn gate() -> Gate {
    Gate::new(trust()).unwrap()
}

fn open_gate() -> Gate {
    Gate::new(trust().direct(Direct::Accept)).unwrap()
}

/// A proxy's datagram, whose header `write` begins.
fn with_header(
    write: impl FnOnce(&mut [u8]) -> Result<Encoder<'_>, ppv2::EncodeError>,
    payload: &[u8],
) -> Vec<u8> {
    let mut buffer = [0; 1024];
    let mut datagram = write(&mut buffer).unwrap().finish().to_vec();
    datagram.extend(payload);
    datagram
}

fn from_client(client: &str, payload: &[u8]) -> Vec<u8> {
    with_header(|b| Encoder::udp(b, addr(client), addr(LISTENER)), payload)
}

#[track_caller]
fn dropped(gate: &Gate, peer: &str, datagram: &[u8], reason: DropReason) {
    let before = gate.stats();
    let result = gate.admit(Instant::now(), addr(peer), datagram);
    assert_eq!(result, Err(reason));
    let after = gate.stats();
    assert_eq!(after.dropped(reason), before.dropped(reason) + 1);
    assert_eq!(after.dropped_total(), before.dropped_total() + 1);
    assert_eq!(after.received, before.received + 1);
    assert_eq!(after.delivered, before.delivered);
    assert_eq!(after.clients, before.clients);
}

#[test]
fn delivers_what_a_proxy_passes_on() {
    let gate = gate();
    let datagram = with_header(
        |b| Encoder::udp(b, addr(CLIENT), addr(LISTENER))?.authority("example.org"),
        b"hello",
    );

    let admitted = gate.admit(Instant::now(), addr(PROXY), &datagram).unwrap();

    assert_eq!(admitted.payload, b"hello");
    assert_eq!(admitted.client, addr(CLIENT));
    assert_eq!(admitted.destination, Some(addr(LISTENER)));
    assert_eq!(admitted.proxy, Some(addr(PROXY)));
    assert_eq!(admitted.tlvs.authority(), Some(Ok("example.org")));
    assert_eq!(admitted.way.to, addr(PROXY));
    let stats = gate.stats();
    assert_eq!((stats.received, stats.delivered, stats.clients), (1, 1, 1));
    assert_eq!(stats.dropped_total(), 0);
}

#[test]
fn delivers_an_empty_payload() {
    let gate = gate();
    let datagram = from_client(CLIENT, b"");
    let admitted = gate.admit(Instant::now(), addr(PROXY), &datagram).unwrap();
    assert_eq!(admitted.payload, b"");
    assert_eq!(admitted.client, addr(CLIENT));
}

#[test]
fn what_a_stranger_sends_is_never_parsed() {
    let claim = from_client(CLIENT, b"hello");
    dropped(&gate(), STRANGER, &claim, DropReason::Untrusted);

    let gate = open_gate();
    let admitted = gate.admit(Instant::now(), addr(STRANGER), &claim).unwrap();
    assert_eq!(admitted.payload, claim);
    assert_eq!(admitted.client, addr(STRANGER));
    assert_eq!((admitted.destination, admitted.proxy), (None, None));
    assert!(admitted.tlvs.is_empty());
    assert_eq!(gate.route(Instant::now(), addr(CLIENT)), None);
    let way = gate.route(Instant::now(), addr(STRANGER));
    assert_eq!(way, Some(Way::back(addr(STRANGER))));
}

#[test]
fn a_trusted_peer_must_send_a_header() {
    for gate in [gate(), open_gate()] {
        dropped(&gate, PROXY, b"hello", DropReason::NoHeader);
        dropped(&gate, PROXY, b"", DropReason::NoHeader);
        dropped(&gate, PROXY, &ppv2::SIGNATURE, DropReason::NoHeader);
    }
}

#[test]
fn headers_that_name_no_udp_client_are_told_apart() {
    let gate = gate();
    let tcp = with_header(|b| Encoder::tcp(b, addr(CLIENT), addr(LISTENER)), b"x");
    dropped(&gate, PROXY, &tcp, DropReason::Tcp);
    let path = [b'a'; 108];
    for transport in [Transport::Stream, Transport::Datagram] {
        let unix = with_header(|b| Encoder::unix(b, transport, &path, &path), b"x");
        dropped(&gate, PROXY, &unix, DropReason::Unix);
    }
    let unspecified = with_header(|b| Encoder::unspecified(b), b"x");
    dropped(&gate, PROXY, &unspecified, DropReason::Unspecified);

    let mut version = from_client(CLIENT, b"x");
    version[12] = 0x31;
    dropped(&gate, PROXY, &version, DropReason::BadHeader);
    let mut past_end = from_client(CLIENT, b"x");
    past_end[14] = 0x01;
    dropped(&gate, PROXY, &past_end, DropReason::BadHeader);
}

#[test]
fn the_limit_of_the_header_can_be_moved() {
    let datagram = with_header(
        |b| Encoder::udp(b, addr(CLIENT), addr(LISTENER))?.noop(600),
        b"x",
    );
    dropped(&gate(), PROXY, &datagram, DropReason::HeaderTooLong);
    let wide = Gate::new(trust().max_header_len(700)).unwrap();
    assert!(wide.admit(Instant::now(), addr(PROXY), &datagram).is_ok());
}

#[test]
fn nobody_has_such_an_address() {
    let gate = open_gate();
    for client in [
        "203.0.113.11:0",
        "0.0.0.0:53",
        "224.0.0.251:5353",
        "255.255.255.255:68",
        "[::]:53",
        "[ff02::fb]:5353",
        "[::ffff:0.0.0.0]:53",
        "[::ffff:224.0.0.251]:5353",
    ] {
        let datagram = from_client(client, b"x");
        dropped(&gate, PROXY, &datagram, DropReason::ClientAddress);
    }
    // The encoder writes these as IPv4, other senders don't.
    let mut mapped = from_client("[2001:db8::1]:53", b"x");
    mapped[16..32].copy_from_slice(&std::net::Ipv4Addr::BROADCAST.to_ipv6_mapped().octets());
    dropped(&gate, PROXY, &mapped, DropReason::ClientAddress);
    dropped(&gate, "198.18.0.1:0", b"x", DropReason::ClientAddress);
}

#[test]
fn local_is_the_proxy_itself_whatever_the_header_carries() {
    let gate = gate();
    let mut forged = from_client(CLIENT, b"ping");
    forged[12] = 0x20;
    for datagram in [forged, with_header(|b| Encoder::local(b), b"ping")] {
        let now = Instant::now();
        let admitted = gate.admit(now, addr(PROXY), &datagram).unwrap();
        assert_eq!(admitted.payload, b"ping");
        assert_eq!(admitted.client, addr(PROXY));
        assert_eq!(admitted.proxy, Some(addr(PROXY)));
        assert_eq!(admitted.destination, None);
        assert!(admitted.tlvs.is_empty());
        assert_eq!(gate.route(now, addr(PROXY)), Some(Way::back(addr(PROXY))));
        assert_eq!(gate.route(now, addr(CLIENT)), None);
    }
}

#[test]
fn addresses_are_compared_and_shown_as_ipv4_where_they_are() {
    let gate = open_gate();
    let now = Instant::now();
    let mapped_proxy = addr("[::ffff:192.0.2.10]:40000");
    let mut datagram = from_client("[2001:db8::1]:54321", b"x");
    let client = std::net::Ipv4Addr::new(203, 0, 113, 11).to_ipv6_mapped();
    datagram[16..32].copy_from_slice(&client.octets());

    let admitted = gate.admit(now, mapped_proxy, &datagram).unwrap();

    assert_eq!(admitted.client, addr(CLIENT));
    assert_eq!(admitted.destination, Some(addr(LISTENER)));
    assert_eq!(admitted.proxy, Some(addr(PROXY)));
    // The socket that reported the peer so can only send to it so.
    assert_eq!(admitted.way.to, mapped_proxy);
    assert_eq!(gate.route(now, addr(CLIENT)), Some(Way::back(mapped_proxy)));
    let mapped_client = addr("[::ffff:203.0.113.11]:54321");
    assert_eq!(
        gate.route(now, mapped_client),
        Some(Way::back(mapped_proxy))
    );

    let direct = gate
        .admit(now, addr("[::ffff:198.18.0.1]:7"), b"x")
        .unwrap();
    assert_eq!(direct.client, addr(STRANGER));
    assert_eq!(direct.way.to, addr("[::ffff:198.18.0.1]:7"));
}

#[test]
fn the_latest_proxy_gets_the_reply() {
    let gate = gate();
    let now = Instant::now();
    let datagram = from_client(CLIENT, b"x");
    let moved = "192.0.2.10:40001";
    for proxy in [PROXY, OTHER_PROXY, moved, PROXY] {
        gate.admit(now, addr(proxy), &datagram).unwrap();
        assert_eq!(gate.route(now, addr(CLIENT)), Some(Way::back(addr(proxy))));
    }
    assert_eq!(gate.stats().clients, 1);
}

#[test]
fn a_dropped_datagram_moves_no_route() {
    let gate = open_gate();
    let now = Instant::now();
    gate.admit(now, addr(PROXY), &from_client(CLIENT, b"x"))
        .unwrap();
    let tcp = with_header(|b| Encoder::tcp(b, addr(CLIENT), addr(LISTENER)), b"x");
    dropped(&gate, OTHER_PROXY, &tcp, DropReason::Tcp);
    assert_eq!(gate.route(now, addr(CLIENT)), Some(Way::back(addr(PROXY))));
}

#[test]
fn a_client_is_forgotten_two_minutes_after_its_latest_datagram() {
    let gate = gate();
    let start = Instant::now();
    let datagram = from_client(CLIENT, b"x");
    let mut now = start;
    // Every 100 seconds for 3 hours.
    for _ in 0..108 {
        gate.admit(now, addr(PROXY), &datagram).unwrap();
        now += 100 * SECOND;
        assert_eq!(gate.route(now, addr(CLIENT)), Some(Way::back(addr(PROXY))));
    }
    // Looking it up, as sending does, has not prolonged it.
    assert!(gate.route(now + 19 * SECOND, addr(CLIENT)).is_some());
    assert_eq!(gate.route(now + 20 * SECOND, addr(CLIENT)), None);
}

#[test]
fn an_address_that_names_another_client_leads_to_that_one_alone() {
    let gate = gate();
    let start = Instant::now();
    let first = from_client(CLIENT, b"hello");
    let hello = gate.admit(start, addr(PROXY), &first).unwrap();
    // The proxy's session has ended, and its port serves the next client.
    let later = start + 42 * SECOND;
    assert_eq!(
        gate.route(later, addr(CLIENT)),
        Some(Way::back(addr(PROXY)))
    );
    for proxy in [PROXY, "[::ffff:192.0.2.10]:40000"] {
        let second = from_client(OTHER_CLIENT, b"hello");
        gate.admit(later, addr(proxy), &second).unwrap();
        assert_eq!(gate.route(later, addr(CLIENT)), None);
        assert_eq!(gate.way_of(later.into(), hello.reply_to()), None);
        let way = gate.route(later, addr(OTHER_CLIENT));
        assert_eq!(way, Some(Way::back(addr(proxy))));
    }
    // What a proxy vouched for stands nevertheless.
    assert_eq!(gate.stats().clients, 2);
    let open = open_gate();
    for client in [CLIENT, OTHER_CLIENT] {
        open.admit(start, addr(PROXY), &from_client(client, b"x"))
            .unwrap();
    }
    let direct = open.admit(start + 42 * SECOND, addr(CLIENT), b"x");
    assert_eq!(direct, Err(DropReason::DirectConflict));
}

#[test]
fn clients_that_share_an_address_are_answered_for_ten_seconds() {
    let gate = gate();
    let start = Instant::now();
    let say = |at: Instant, client: &str| {
        gate.admit(at, addr(PROXY), &from_client(client, b"x"))
            .unwrap();
    };
    let known = |at: Instant| [CLIENT, OTHER_CLIENT].map(|c| gate.route(at, addr(c)).is_some());
    // Each is heard every 8 seconds, in turn, for ten minutes.
    for turn in 0..75 {
        say(start + 8 * turn * SECOND, CLIENT);
        say(start + (8 * turn + 4) * SECOND, OTHER_CLIENT);
        assert_eq!(known(start + (8 * turn + 4) * SECOND), [true, true]);
    }
    let (first, second) = (start + 592 * SECOND, start + 596 * SECOND);
    assert_eq!(known(first + 10 * SECOND - SECOND / 1000), [true, true]);
    assert_eq!(known(first + 10 * SECOND), [false, true]);
    // The one that the address names now is known for as long as any.
    assert_eq!(known(second + 119 * SECOND), [false, true]);
    // The other comes back, and it is the turn of this one.
    say(second + 60 * SECOND, CLIENT);
    assert_eq!(known(second + 60 * SECOND), [true, false]);
    assert_eq!(known(second + 179 * SECOND), [true, false]);
}

#[test]
fn a_client_that_has_moved_to_another_address_keeps_that_one() {
    let gate = gate();
    let now = Instant::now();
    let first = from_client(CLIENT, b"x");
    let by_first = gate.admit(now, addr(PROXY), &first).unwrap();
    gate.admit(now, addr(OTHER_PROXY), &first).unwrap();
    gate.admit(now, addr(PROXY), &from_client(OTHER_CLIENT, b"x"))
        .unwrap();
    let later = now + 100 * SECOND;
    let way = gate.route(later, addr(CLIENT));
    assert_eq!(way, Some(Way::back(addr(OTHER_PROXY))));
    assert_eq!(gate.way_of(later.into(), by_first.reply_to()), None);
}

#[test]
fn a_proxy_that_speaks_for_itself_takes_no_way_from_its_client() {
    let gate = gate();
    let now = Instant::now();
    let mut buffer = [0; 64];
    let local = Encoder::local(&mut buffer).unwrap().finish();
    for _ in 0..2 {
        gate.admit(now, addr(PROXY), &from_client(CLIENT, b"x"))
            .unwrap();
        gate.admit(now, addr(PROXY), local).unwrap();
    }
    let later = now + 100 * SECOND;
    for client in [CLIENT, PROXY] {
        let way = gate.route(later, addr(client));
        assert_eq!(way, Some(Way::back(addr(PROXY))));
    }
}

#[test]
fn replies_past_the_proxy_need_none_of_its_addresses() {
    let gate = Gate::new(trust().reply_from(ReplyFrom::Listener)).unwrap();
    let now = Instant::now();
    let mut first = None;
    let datagrams = [CLIENT, OTHER_CLIENT].map(|client| from_client(client, b"x"));
    for datagram in &datagrams {
        let admitted = gate.admit(now, addr(PROXY), datagram).unwrap();
        first = first.or(Some(admitted));
    }
    let later = now + 100 * SECOND;
    assert!(gate.route(later, addr(CLIENT)).is_some());
    let first = first.unwrap().reply_to();
    assert_eq!(gate.way_of(later.into(), first), Some(first.way));
}

#[test]
fn strangers_can_neither_take_over_nor_crowd_out_a_proxys_client() {
    let gate = Gate::new(trust().direct(Direct::Accept).max_clients(10)).unwrap();
    let now = Instant::now();
    gate.admit(now, addr(PROXY), &from_client(CLIENT, b"x"))
        .unwrap();

    dropped(&gate, CLIENT, b"forged", DropReason::DirectConflict);
    let mapped = "[::ffff:203.0.113.11]:54321";
    dropped(&gate, mapped, b"forged", DropReason::DirectConflict);
    for port in 1..1000 {
        let stranger = SocketAddr::from(([198, 18, 0, 1], port));
        gate.admit(now, stranger, b"flood").unwrap();
    }
    assert_eq!(gate.route(now, addr(CLIENT)), Some(Way::back(addr(PROXY))));
    let stats = gate.stats();
    assert_eq!((stats.clients, stats.clients_evicted), (1 + 10, 989));

    // Once the proxy's word is out of date, the address is free again.
    let later = now + 120 * SECOND;
    let admitted = gate.admit(later, addr(CLIENT), b"true").unwrap();
    assert_eq!((admitted.client, admitted.proxy), (addr(CLIENT), None));
    assert_eq!(
        gate.route(later, addr(CLIENT)),
        Some(Way::back(addr(CLIENT)))
    );
}

#[test]
fn a_proxy_takes_over_a_direct_client() {
    let gate = open_gate();
    let now = Instant::now();
    gate.admit(now, addr(CLIENT), b"x").unwrap();
    assert_eq!(gate.route(now, addr(CLIENT)), Some(Way::back(addr(CLIENT))));
    gate.admit(now, addr(PROXY), &from_client(CLIENT, b"x"))
        .unwrap();
    assert_eq!(gate.route(now, addr(CLIENT)), Some(Way::back(addr(PROXY))));
}

#[test]
fn a_flood_of_clients_keeps_the_table_at_its_bound() {
    let gate = gate();
    let now = Instant::now();
    let mut datagram = from_client("203.0.113.11:1", b"x");
    for n in 0..200_000u32 {
        datagram[16..20].copy_from_slice(&(0x0a00_0000 + n).to_be_bytes());
        gate.admit(now, addr(PROXY), &datagram).unwrap();
    }
    let stats = gate.stats();
    assert_eq!(stats.clients, 65_536);
    assert_eq!(stats.clients_evicted, 200_000 - 65_536);
    let last = SocketAddr::from((std::net::Ipv4Addr::from(0x0a00_0000 + 199_999), 1));
    assert_eq!(gate.route(now, last), Some(Way::back(addr(PROXY))));
}

#[test]
fn a_gate_that_lets_nobody_in_is_refused() {
    let nobody = Trust::ip_nets([]);
    assert_eq!(Gate::new(nobody.clone()).unwrap_err(), TrustError::Nobody);
    assert!(Gate::new(nobody.direct(Direct::Accept)).is_ok());
}

#[test]
fn the_listener_answers_whom_a_header_names_and_nobody_else() {
    let trust = trust().direct(Direct::Accept);
    let gate = Gate::new(trust.reply_from(ReplyFrom::Listener)).unwrap();
    let now = Instant::now();
    let straight = |listener| Some(Way::from_listener(addr(listener), addr(CLIENT)));
    for listener in [LISTENER, "198.51.100.11:9000"] {
        let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
        let datagram = ppv2::encode_udp(addr(CLIENT), addr(listener), &mut buffer).unwrap();
        let admitted = gate.admit(now, addr(PROXY), datagram).unwrap();
        assert_eq!(Some(admitted.way), straight(listener));
        assert_eq!(gate.route(now, addr(CLIENT)), straight(listener));
    }

    let mut buffer = [0; 64];
    let local = Encoder::local(&mut buffer).unwrap().finish();
    for (peer, datagram) in [(PROXY, local), (STRANGER, b"direct".as_slice())] {
        let admitted = gate.admit(now, addr(peer), datagram).unwrap();
        assert_eq!(admitted.way, Way::back(addr(peer)));
        assert_eq!(gate.route(now, addr(peer)), Some(admitted.way));
    }
}
