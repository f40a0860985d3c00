//! Hours of a server's life in microseconds.

use std::time::Duration;

use ppv2::{Encoder, ReplyTag, Transport};

use super::*;
use crate::TrustBuilder;

mod properties;
mod remember;
mod spp;

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

fn trust() -> TrustBuilder {
    Trust::networks(["192.0.2.0/24", "2001:db8:1::/64"])
}

fn demux() -> Demux {
    Demux::new(trust().build().unwrap())
}

fn open_demux() -> Demux {
    Demux::new(trust().untrusted(Untrusted::Accept).build().unwrap())
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

/// The same with a reply tag, which differs by `number`.
fn tagged(client: &str, number: u8, payload: &[u8]) -> Vec<u8> {
    let tag = ReplyTag::new(0, [number; 8]);
    with_header(
        |b| Encoder::udp(b, addr(client), addr(LISTENER))?.reply_tag(tag),
        payload,
    )
}

fn spp(client: &str, payload: &[u8]) -> Vec<u8> {
    spp_to(client, LISTENER, payload)
}

/// A datagram with a header of Simple Proxy Protocol.
fn spp_to(client: &str, proxy: &str, payload: &[u8]) -> Vec<u8> {
    let (client, proxy) = (addr(client), addr(proxy));
    let header = ppv2::spp::SppHeader { client, proxy };
    [&header.to_bytes()[..], payload].concat()
}

/// What must stand in front of a reply to `to`.
fn header_to(demux: &Demux, now: Instant, to: impl Into<Recipient>) -> Option<Vec<u8>> {
    Some(demux.reply_path(now, to)?.header().to_vec())
}

#[track_caller]
fn dropped(demux: &Demux, peer: &str, datagram: &[u8], reason: DropReason) {
    let before = demux.stats();
    let result = demux.receive(Instant::now(), addr(peer), None, datagram);
    assert_eq!(result, Err(reason));
    let after = demux.stats();
    assert_eq!(after.dropped(reason), before.dropped(reason) + 1);
    assert_eq!(after.dropped_total(), before.dropped_total() + 1);
    assert_eq!(after.received, before.received + 1);
    assert_eq!(after.delivered, before.delivered);
    assert_eq!(after.clients, before.clients);
}

#[test]
fn delivers_what_a_proxy_passes_on() {
    let demux = demux();
    let datagram = with_header(
        |b| Encoder::udp(b, addr(CLIENT), addr(LISTENER))?.authority("example.org"),
        b"hello",
    );

    let received = demux
        .receive(Instant::now(), addr(PROXY), None, &datagram)
        .unwrap();

    assert_eq!(received.payload, b"hello");
    assert_eq!(received.client, addr(CLIENT));
    assert_eq!(received.destination, Some(addr(LISTENER)));
    assert_eq!(received.proxy, Some(addr(PROXY)));
    assert_eq!(received.tlvs.authority(), Some(Ok("example.org")));
    assert_eq!(received.reply_path.to, addr(PROXY));
    let stats = demux.stats();
    assert_eq!((stats.received, stats.delivered, stats.clients), (1, 1, 1));
    assert_eq!(stats.dropped_total(), 0);
}

#[test]
fn delivers_an_empty_payload() {
    let demux = demux();
    let datagram = from_client(CLIENT, b"");
    let received = demux
        .receive(Instant::now(), addr(PROXY), None, &datagram)
        .unwrap();
    assert_eq!(received.payload, b"");
    assert_eq!(received.client, addr(CLIENT));
}

#[test]
fn untrusted_datagrams_are_never_parsed() {
    let forged = from_client(CLIENT, b"hello");
    dropped(&demux(), STRANGER, &forged, DropReason::Untrusted);

    let demux = open_demux();
    let received = demux
        .receive(Instant::now(), addr(STRANGER), None, &forged)
        .unwrap();
    assert_eq!(received.payload, forged);
    assert_eq!(received.client, addr(STRANGER));
    assert_eq!((received.destination, received.proxy), (None, None));
    assert!(received.tlvs.is_empty());
    assert_eq!(demux.reply_path(Instant::now(), addr(CLIENT)), None);
    let path = demux.reply_path(Instant::now(), addr(STRANGER));
    assert_eq!(path, Some(ReplyPath::back(addr(STRANGER))));
}

#[test]
fn a_trusted_peer_must_send_a_header() {
    for demux in [demux(), open_demux()] {
        dropped(&demux, PROXY, b"hello", DropReason::NoHeader);
        dropped(&demux, PROXY, b"", DropReason::NoHeader);
        dropped(&demux, PROXY, &SIGNATURE, DropReason::NoHeader);
    }
}

#[test]
fn headers_that_name_no_udp_client_are_told_apart() {
    let demux = demux();
    let tcp = with_header(|b| Encoder::tcp(b, addr(CLIENT), addr(LISTENER)), b"x");
    dropped(&demux, PROXY, &tcp, DropReason::Tcp);
    let path = [b'a'; 108];
    for transport in [Transport::Stream, Transport::Datagram] {
        let unix = with_header(|b| Encoder::unix(b, transport, &path, &path), b"x");
        dropped(&demux, PROXY, &unix, DropReason::Unix);
    }
    let unspecified = with_header(|b| Encoder::unspecified(b), b"x");
    dropped(&demux, PROXY, &unspecified, DropReason::Unspecified);

    let mut version = from_client(CLIENT, b"x");
    version[12] = 0x31;
    dropped(&demux, PROXY, &version, DropReason::BadHeader);
    let mut past_end = from_client(CLIENT, b"x");
    past_end[14] = 0x01;
    dropped(&demux, PROXY, &past_end, DropReason::BadHeader);
}

#[test]
fn max_header_len_is_configurable() {
    let datagram = with_header(
        |b| Encoder::udp(b, addr(CLIENT), addr(LISTENER))?.noop(600),
        b"x",
    );
    dropped(&demux(), PROXY, &datagram, DropReason::HeaderTooLong);
    let wide = Demux::new(trust().max_header_len(700).build().unwrap());
    assert!(
        wide.receive(Instant::now(), addr(PROXY), None, &datagram)
            .is_ok()
    );
}

#[test]
fn impossible_client_addresses_are_dropped() {
    let demux = open_demux();
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
        dropped(&demux, PROXY, &datagram, DropReason::ClientAddress);
    }
    // The encoder writes these as IPv4, other senders don't.
    let mut mapped = from_client("[2001:db8::1]:53", b"x");
    mapped[16..32].copy_from_slice(&std::net::Ipv4Addr::BROADCAST.to_ipv6_mapped().octets());
    dropped(&demux, PROXY, &mapped, DropReason::ClientAddress);
    dropped(&demux, "198.18.0.1:0", b"x", DropReason::ClientAddress);
}

#[test]
fn local_is_the_proxy_itself_whatever_the_header_carries() {
    let demux = demux();
    let mut forged = from_client(CLIENT, b"ping");
    forged[12] = 0x20;
    for datagram in [forged, with_header(|b| Encoder::local(b), b"ping")] {
        let now = Instant::now();
        let received = demux.receive(now, addr(PROXY), None, &datagram).unwrap();
        assert_eq!(received.payload, b"ping");
        assert_eq!(received.client, addr(PROXY));
        assert_eq!(received.proxy, Some(addr(PROXY)));
        assert_eq!(received.destination, None);
        assert!(received.tlvs.is_empty());
        assert_eq!(
            demux.reply_path(now, addr(PROXY)),
            Some(ReplyPath::back(addr(PROXY)))
        );
        assert_eq!(demux.reply_path(now, addr(CLIENT)), None);
    }
}

#[test]
fn addresses_are_compared_and_shown_as_ipv4_where_they_are() {
    let demux = open_demux();
    let now = Instant::now();
    let mapped_proxy = addr("[::ffff:192.0.2.10]:40000");
    let mut datagram = from_client("[2001:db8::1]:54321", b"x");
    let client = std::net::Ipv4Addr::new(203, 0, 113, 11).to_ipv6_mapped();
    datagram[16..32].copy_from_slice(&client.octets());

    let received = demux.receive(now, mapped_proxy, None, &datagram).unwrap();

    assert_eq!(received.client, addr(CLIENT));
    assert_eq!(received.destination, Some(addr(LISTENER)));
    assert_eq!(received.proxy, Some(addr(PROXY)));
    // The socket that reported the peer so can only send to it so.
    assert_eq!(received.reply_path.to, mapped_proxy);
    assert_eq!(
        demux.reply_path(now, addr(CLIENT)),
        Some(ReplyPath::back(mapped_proxy))
    );
    let mapped_client = addr("[::ffff:203.0.113.11]:54321");
    assert_eq!(
        demux.reply_path(now, mapped_client),
        Some(ReplyPath::back(mapped_proxy))
    );

    let direct = demux
        .receive(now, addr("[::ffff:198.18.0.1]:7"), None, b"x")
        .unwrap();
    assert_eq!(direct.client, addr(STRANGER));
    assert_eq!(direct.reply_path.to, addr("[::ffff:198.18.0.1]:7"));
}

#[test]
fn the_latest_proxy_gets_the_reply() {
    let demux = demux();
    let now = Instant::now();
    let datagram = from_client(CLIENT, b"x");
    let moved = "192.0.2.10:40001";
    for proxy in [PROXY, OTHER_PROXY, moved, PROXY] {
        demux.receive(now, addr(proxy), None, &datagram).unwrap();
        assert_eq!(
            demux.reply_path(now, addr(CLIENT)),
            Some(ReplyPath::back(addr(proxy)))
        );
    }
    assert_eq!(demux.stats().clients, 1);
}

#[test]
fn a_dropped_datagram_changes_no_reply_path() {
    let demux = open_demux();
    let now = Instant::now();
    demux
        .receive(now, addr(PROXY), None, &from_client(CLIENT, b"x"))
        .unwrap();
    let tcp = with_header(|b| Encoder::tcp(b, addr(CLIENT), addr(LISTENER)), b"x");
    dropped(&demux, OTHER_PROXY, &tcp, DropReason::Tcp);
    assert_eq!(
        demux.reply_path(now, addr(CLIENT)),
        Some(ReplyPath::back(addr(PROXY)))
    );
}

#[test]
fn a_client_is_forgotten_two_minutes_after_its_latest_datagram() {
    let demux = demux();
    let start = Instant::now();
    let datagram = from_client(CLIENT, b"x");
    let mut now = start;
    // Every 100 seconds for 3 hours.
    for _ in 0..108 {
        demux.receive(now, addr(PROXY), None, &datagram).unwrap();
        now += 100 * SECOND;
        assert_eq!(
            demux.reply_path(now, addr(CLIENT)),
            Some(ReplyPath::back(addr(PROXY)))
        );
    }
    // Looking it up, as sending does, has not prolonged it.
    assert!(demux.reply_path(now + 19 * SECOND, addr(CLIENT)).is_some());
    assert_eq!(demux.reply_path(now + 20 * SECOND, addr(CLIENT)), None);
}

#[test]
fn a_proxy_address_that_names_another_client_ends_the_former_path() {
    let demux = demux();
    let start = Instant::now();
    let first = from_client(CLIENT, b"hello");
    let hello = demux.receive(start, addr(PROXY), None, &first).unwrap();
    // The proxy's session has ended, and its port serves the next client.
    let later = start + 42 * SECOND;
    assert_eq!(
        demux.reply_path(later, addr(CLIENT)),
        Some(ReplyPath::back(addr(PROXY)))
    );
    for proxy in [PROXY, "[::ffff:192.0.2.10]:40000"] {
        let second = from_client(OTHER_CLIENT, b"hello");
        demux.receive(later, addr(proxy), None, &second).unwrap();
        assert_eq!(demux.reply_path(later, addr(CLIENT)), None);
        assert_eq!(demux.reply_path(later, hello.reply_path), None);
        let path = demux.reply_path(later, addr(OTHER_CLIENT));
        assert_eq!(path, Some(ReplyPath::back(addr(proxy))));
    }
    // What a proxy vouched for stands nevertheless.
    assert_eq!(demux.stats().clients, 2);
    let open = open_demux();
    for client in [CLIENT, OTHER_CLIENT] {
        open.receive(start, addr(PROXY), None, &from_client(client, b"x"))
            .unwrap();
    }
    let direct = open.receive(start + 42 * SECOND, addr(CLIENT), None, b"x");
    assert_eq!(direct, Err(DropReason::DirectConflict));
}

#[test]
fn clients_that_share_an_address_are_answered_for_ten_seconds() {
    let demux = demux();
    let start = Instant::now();
    let say = |at: Instant, client: &str| {
        demux
            .receive(at, addr(PROXY), None, &from_client(client, b"x"))
            .unwrap();
    };
    let known =
        |at: Instant| [CLIENT, OTHER_CLIENT].map(|c| demux.reply_path(at, addr(c)).is_some());
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
    let demux = demux();
    let now = Instant::now();
    let first = from_client(CLIENT, b"x");
    let by_first = demux.receive(now, addr(PROXY), None, &first).unwrap();
    demux.receive(now, addr(OTHER_PROXY), None, &first).unwrap();
    demux
        .receive(now, addr(PROXY), None, &from_client(OTHER_CLIENT, b"x"))
        .unwrap();
    let later = now + 100 * SECOND;
    let path = demux.reply_path(later, addr(CLIENT));
    assert_eq!(path, Some(ReplyPath::back(addr(OTHER_PROXY))));
    assert_eq!(demux.reply_path(later, by_first.reply_path), None);
}

#[test]
fn a_local_header_ends_no_clients_path() {
    let demux = demux();
    let now = Instant::now();
    let mut buffer = [0; 64];
    let local = Encoder::local(&mut buffer).unwrap().finish();
    for _ in 0..2 {
        demux
            .receive(now, addr(PROXY), None, &from_client(CLIENT, b"x"))
            .unwrap();
        demux.receive(now, addr(PROXY), None, local).unwrap();
    }
    let later = now + 100 * SECOND;
    for client in [CLIENT, PROXY] {
        let path = demux.reply_path(later, addr(client));
        assert_eq!(path, Some(ReplyPath::back(addr(PROXY))));
    }
}

#[test]
fn paths_from_the_listener_outlive_the_proxys_address() {
    let demux = Demux::new(trust().reply_from(ReplyFrom::Listener).build().unwrap());
    let now = Instant::now();
    let mut first = None;
    let datagrams = [CLIENT, OTHER_CLIENT].map(|client| from_client(client, b"x"));
    for datagram in &datagrams {
        let received = demux.receive(now, addr(PROXY), None, datagram).unwrap();
        first = first.or(Some(received));
    }
    let later = now + 100 * SECOND;
    assert!(demux.reply_path(later, addr(CLIENT)).is_some());
    let first = first.unwrap().reply_path;
    assert_eq!(demux.reply_path(later, first), Some(first));
}

#[test]
fn untrusted_senders_can_neither_take_over_nor_evict_a_proxys_client() {
    let demux = Demux::new(
        trust()
            .untrusted(Untrusted::Accept)
            .max_clients(10)
            .build()
            .unwrap(),
    );
    let now = Instant::now();
    demux
        .receive(now, addr(PROXY), None, &from_client(CLIENT, b"x"))
        .unwrap();

    dropped(&demux, CLIENT, b"forged", DropReason::DirectConflict);
    let mapped = "[::ffff:203.0.113.11]:54321";
    dropped(&demux, mapped, b"forged", DropReason::DirectConflict);
    for port in 1..1000 {
        let stranger = SocketAddr::from(([198, 18, 0, 1], port));
        demux.receive(now, stranger, None, b"flood").unwrap();
    }
    assert_eq!(
        demux.reply_path(now, addr(CLIENT)),
        Some(ReplyPath::back(addr(PROXY)))
    );
    let stats = demux.stats();
    assert_eq!((stats.clients, stats.clients_evicted), (1 + 10, 989));

    // Once the proxy's word is out of date, the address is free again.
    let later = now + 120 * SECOND;
    let received = demux.receive(later, addr(CLIENT), None, b"true").unwrap();
    assert_eq!((received.client, received.proxy), (addr(CLIENT), None));
    assert_eq!(
        demux.reply_path(later, addr(CLIENT)),
        Some(ReplyPath::back(addr(CLIENT)))
    );
}

#[test]
fn a_proxy_takes_over_a_direct_client() {
    let demux = open_demux();
    let now = Instant::now();
    demux.receive(now, addr(CLIENT), None, b"x").unwrap();
    assert_eq!(
        demux.reply_path(now, addr(CLIENT)),
        Some(ReplyPath::back(addr(CLIENT)))
    );
    demux
        .receive(now, addr(PROXY), None, &from_client(CLIENT, b"x"))
        .unwrap();
    assert_eq!(
        demux.reply_path(now, addr(CLIENT)),
        Some(ReplyPath::back(addr(PROXY)))
    );
}

#[test]
fn a_flood_of_clients_keeps_the_table_at_its_bound() {
    let demux = demux();
    let now = Instant::now();
    let mut datagram = from_client("203.0.113.11:1", b"x");
    for n in 0..200_000u32 {
        datagram[16..20].copy_from_slice(&(0x0a00_0000 + n).to_be_bytes());
        demux.receive(now, addr(PROXY), None, &datagram).unwrap();
    }
    let stats = demux.stats();
    assert_eq!(stats.clients, 65_536);
    assert_eq!(stats.clients_evicted, 200_000 - 65_536);
    let last = SocketAddr::from((std::net::Ipv4Addr::from(0x0a00_0000 + 199_999), 1));
    assert_eq!(
        demux.reply_path(now, last),
        Some(ReplyPath::back(addr(PROXY)))
    );
}

#[test]
fn only_clients_that_a_header_names_are_answered_from_the_listener() {
    let trust = trust().untrusted(Untrusted::Accept);
    let trust = trust.reply_from(ReplyFrom::Listener).build().unwrap();
    let demux = Demux::new(trust);
    let now = Instant::now();
    let straight = |listener| {
        Some(ReplyPath::from_listener(
            addr(listener),
            addr(CLIENT),
            now.into(),
        ))
    };
    for listener in [LISTENER, "198.51.100.11:9000"] {
        let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
        let datagram = ppv2::encode_udp(addr(CLIENT), addr(listener), &mut buffer).unwrap();
        let received = demux.receive(now, addr(PROXY), None, datagram).unwrap();
        assert_eq!(Some(received.reply_path), straight(listener));
        assert_eq!(demux.reply_path(now, addr(CLIENT)), straight(listener));
    }

    let mut buffer = [0; 64];
    let local = Encoder::local(&mut buffer).unwrap().finish();
    for (peer, datagram) in [(PROXY, local), (STRANGER, b"direct".as_slice())] {
        let received = demux.receive(now, addr(peer), None, datagram).unwrap();
        assert_eq!(received.reply_path, ReplyPath::back(addr(peer)));
        assert_eq!(demux.reply_path(now, addr(peer)), Some(received.reply_path));
    }
}

#[test]
fn a_tagged_datagram_is_answered_with_its_header() {
    let demux = demux();
    let now = Instant::now();
    for client in [CLIENT, "[2001:db8::1]:54321"] {
        let datagram = tagged(client, 1, b"x");
        let received = demux.receive(now, addr(PROXY), None, &datagram).unwrap();
        let header = &datagram[..datagram.len() - 1];
        assert_eq!(*received.reply_path.header(), *header);
        assert_eq!(header_to(&demux, now, addr(client)).unwrap(), header);
    }
    // The latest tag counts, and none if the latest datagram has none.
    let newer = tagged(CLIENT, 2, b"");
    demux.receive(now, addr(PROXY), None, &newer).unwrap();
    assert_eq!(header_to(&demux, now, addr(CLIENT)).unwrap(), newer);
    let bare = from_client(CLIENT, b"x");
    demux.receive(now, addr(PROXY), None, &bare).unwrap();
    assert_eq!(header_to(&demux, now, addr(CLIENT)).unwrap(), b"");
}

#[test]
fn only_one_tag_of_version_1_from_a_proxy_counts() {
    let value = |version: u8, len: usize| [&[version], &vec![7; len - 1][..]].concat();
    let with_tlvs = |tlvs: &[Vec<u8>]| {
        with_header(
            |b| {
                tlvs.iter()
                    .try_fold(Encoder::udp(b, addr(CLIENT), addr(LISTENER))?, |e, tlv| {
                        e.tlv(ppv2::TlvType::REPLY_TAG, tlv)
                    })
            },
            b"x",
        )
    };
    let demux = demux();
    let now = Instant::now();
    for (tlvs, counts) in [
        (vec![value(1, 10)], true),
        (vec![value(2, 10)], false),
        (vec![value(1, 9)], false),
        (vec![value(1, 11)], false),
        (vec![value(1, 10), value(1, 10)], false),
        (vec![value(2, 4), value(1, 10)], true),
    ] {
        let datagram = with_tlvs(&tlvs);
        let received = demux.receive(now, addr(PROXY), None, &datagram).unwrap();
        assert_eq!(received.reply_path.header().is_empty(), !counts, "{tlvs:?}");
    }
    let local = with_header(
        |b| Encoder::local(b)?.reply_tag(ReplyTag::new(0, [7; 8])),
        b"x",
    );
    let received = demux.receive(now, addr(PROXY), None, &local).unwrap();
    assert!(received.reply_path.header().is_empty());

    let demux = open_demux();
    let datagram = with_tlvs(&[value(1, 10)]);
    let received = demux.receive(now, addr(STRANGER), None, &datagram).unwrap();
    assert_eq!(received.payload, datagram);
    assert!(received.reply_path.header().is_empty());
}

#[test]
fn a_tagged_reply_is_possible_while_its_proxy_address_names_others() {
    let demux = demux();
    let start = Instant::now();
    let first = tagged(CLIENT, 1, b"x");
    let first = demux.receive(start, addr(PROXY), None, &first).unwrap();
    let later = start + 100 * SECOND;
    for at in [start, later] {
        for client in ["203.0.113.13:1", "203.0.113.14:1"] {
            let datagram = tagged(client, 2, b"x");
            demux.receive(at, addr(PROXY), None, &datagram).unwrap();
        }
    }
    for to in [Recipient::from(addr(CLIENT)), first.reply_path.into()] {
        let header = header_to(&demux, later, to).unwrap();
        assert_eq!(header, tagged(CLIENT, 1, b""));
        assert_eq!(header_to(&demux, start + 120 * SECOND, to), None);
    }
}

#[test]
fn a_tagged_client_ends_the_bare_path_through_its_proxys_address() {
    let demux = demux();
    let start = Instant::now();
    let bare = from_client(CLIENT, b"x");
    let bare = demux.receive(start, addr(PROXY), None, &bare).unwrap();
    let other = tagged(OTHER_CLIENT, 1, b"x");
    demux.receive(start, addr(PROXY), None, &other).unwrap();
    let later = start + 10 * SECOND;
    assert!(demux.reply_path(later - SECOND, addr(CLIENT)).is_some());
    assert_eq!(demux.reply_path(later, addr(CLIENT)), None);
    assert_eq!(demux.reply_path(later, bare.reply_path), None);
    assert!(demux.reply_path(later, addr(OTHER_CLIENT)).is_some());
}

#[test]
fn replies_that_are_pending_while_a_client_changes_its_kind_take_their_own_paths() {
    let demux = demux();
    let start = Instant::now();
    let heard = |at: Instant, proxy: &str, datagram: &[u8]| {
        let received = demux.receive(at, addr(proxy), None, datagram).unwrap();
        received.reply_path
    };
    let shared = heard(start, PROXY, &tagged(CLIENT, 1, b"x"));
    let own = heard(start + SECOND, OTHER_PROXY, &from_client(CLIENT, b"x"));
    let again = heard(start + 20 * SECOND, PROXY, &tagged(CLIENT, 2, b"x"));
    let now = start + 20 * SECOND;
    let to = |path| {
        demux
            .reply_path(now, path)
            .map(|p| (p.to, p.header().to_vec()))
    };
    assert_eq!(to(shared), Some((addr(PROXY), tagged(CLIENT, 1, b""))));
    assert_eq!(to(again), Some((addr(PROXY), tagged(CLIENT, 2, b""))));
    // By now the session's own address may serve another client.
    assert_eq!(to(own), None);
}

#[test]
fn dsr_wins_over_a_tag() {
    let demux = Demux::new(trust().reply_from(ReplyFrom::Listener).build().unwrap());
    let now = Instant::now();
    let datagram = tagged(CLIENT, 1, b"x");
    let received = demux.receive(now, addr(PROXY), None, &datagram).unwrap();
    for path in [
        received.reply_path,
        demux.reply_path(now, addr(CLIENT)).unwrap(),
    ] {
        assert_eq!((path.to, path.from), (addr(CLIENT), Some(addr(LISTENER))));
        assert!(path.header().is_empty());
    }
}
