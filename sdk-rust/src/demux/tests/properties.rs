//! What must hold for any peers and any bytes, checked against a log of all
//! that was let in.

use ppv2::ReplyTag;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::{Format, HeaderAlone};

const MAX_CLIENTS: usize = 3;
const FORGET_AFTER: Duration = Duration::from_secs(30);

fn any_formats() -> impl Strategy<Value = Vec<Format>> {
    prop::sample::select(vec![
        vec![Format::V2],
        vec![Format::Spp],
        vec![Format::V2, Format::Spp],
    ])
}

/// Few enough that they meet one another.
fn any_peer() -> impl Strategy<Value = SocketAddr> {
    prop::sample::select(vec![
        addr(PROXY),
        addr(OTHER_PROXY),
        addr("[::ffff:192.0.2.10]:40000"),
        addr("[2001:db8:1::9]:40000"),
        addr(STRANGER),
        addr("[::ffff:198.18.0.1]:7"),
        addr("[2001:db8:2::9]:7"),
        addr(CLIENT),
        addr("203.0.113.12:1"),
        addr("203.0.113.12:0"),
    ])
}

fn any_client() -> impl Strategy<Value = SocketAddr> {
    prop_oneof![
        any_peer(),
        prop::sample::select(vec![
            addr("203.0.113.13:1"),
            addr("203.0.113.14:1"),
            addr("[2001:db8:3::1]:1"),
            addr("224.0.0.1:1"),
        ]),
    ]
}

/// Whole datagrams of proxies, some of them with a byte changed or an end cut
/// off, text of version 1, and bytes of any kind.
fn any_datagram() -> impl Strategy<Value = Vec<u8>> {
    let tag = ReplyTag::new(0, [7; 8]);
    let valid = (any_client(), any_client(), 0..9u8, vec(any::<u8>(), 0..40))
        .prop_map(move |(client, listener, kind, payload)| {
            if kind > 6 {
                let header = ppv2::spp::SppHeader {
                    client,
                    proxy: listener,
                };
                return [&header.to_bytes()[..], &payload].concat();
            }
            with_header(
                |b| match kind {
                    0 => Encoder::local(b),
                    1 => Encoder::tcp(b, client, listener),
                    2 | 3 => Encoder::udp(b, client, listener)?.reply_tag(tag),
                    4 => {
                        let twice = Encoder::udp(b, client, listener)?.reply_tag(tag)?;
                        twice.reply_tag(tag)
                    }
                    _ => Encoder::udp(b, client, listener),
                },
                &payload,
            )
        })
        .boxed();
    let spoilt = (valid.clone(), any::<prop::sample::Index>(), any::<u8>()).prop_map(
        |(mut datagram, at, byte)| {
            let at = at.index(datagram.len());
            datagram[at] = byte;
            datagram
        },
    );
    let cut = (valid.clone(), any::<prop::sample::Index>()).prop_map(|(mut datagram, at)| {
        datagram.truncate(at.index(datagram.len()));
        datagram
    });
    let v1 = Just(b"PROXY TCP4 203.0.113.13 198.51.100.10 1 2\r\n".to_vec());
    prop_oneof![12 => valid, 2 => spoilt, 2 => cut, 2 => vec(any::<u8>(), 0..80), 1 => v1]
}

/// The same, more of them without header, and headers alone.
fn any_said() -> impl Strategy<Value = Vec<u8>> {
    let alone = any_client().prop_map(|client| from_client(&client.to_string(), b""));
    prop_oneof![2 => any_datagram(), 2 => vec(any::<u8>(), 0..3), 1 => alone]
}

fn is_trusted(peer: SocketAddr) -> bool {
    match peer.ip().to_canonical() {
        IpAddr::V4(ip) => ip.octets()[..3] == [192, 0, 2],
        IpAddr::V6(ip) => ip.segments()[..4] == [0x2001, 0xdb8, 1, 0],
    }
}

/// What a datagram of this peer is to be taken for, said without any of the code under
/// test.
struct Meant {
    client: SocketAddr,
    header_len: usize,
    /// What the reply to it says.
    naming: Option<Naming>,
    /// It names a client, and is no datagram of a stranger's or of the proxy itself.
    names: Option<SocketAddr>,
}

fn canonical_of(a: SocketAddr) -> SocketAddr {
    SocketAddr::new(a.ip().to_canonical(), a.port())
}

fn meant(formats: &[Format], peer: SocketAddr, datagram: &[u8]) -> Option<Meant> {
    let of = |client, header_len, naming, names: Option<SocketAddr>| Meant {
        client: canonical_of(client),
        header_len,
        naming,
        names: names.map(canonical_of),
    };
    let meant = if !is_trusted(peer) {
        of(peer, 0, None, None)
    } else if formats.contains(&Format::Spp)
        && let Ok((header, payload)) = ppv2::spp::decode(datagram)
    {
        let naming = Some(Naming::spp(header.proxy));
        let len = datagram.len() - payload.len();
        of(header.client, len, naming, Some(header.proxy))
    } else if formats.contains(&Format::V2) {
        let (header, payload) = ppv2::decode(datagram).ok()?;
        let len = datagram.len() - payload.len();
        if header.origin() == Origin::Local {
            of(peer, len, None, None)
        } else {
            let reply = ppv2::decode_tagged(datagram).ok();
            let naming = reply.map(|reply| Naming::tag(reply.destination, reply.tag));
            of(header.client()?, len, naming, header.destination())
        }
    } else {
        return None;
    };
    can_be_a_client(meant.client).then_some(meant)
}

/// A spoilt byte can make any address of the one that was there: 0.0.113.13 of
/// 203.0.113.13.
fn can_be_a_client(address: SocketAddr) -> bool {
    let possible = match address.ip() {
        IpAddr::V4(ip) => match ip.octets() {
            [0, ..] | [224..=239, ..] | [255, 255, 255, 255] | [127, 255, 255, 255] => false,
            [..] => true,
        },
        IpAddr::V6(ip) => !ip.is_unspecified() && !ip.is_multicast(),
    };
    address.port() != 0 && possible
}

struct Heard {
    at: Instant,
    client: SocketAddr,
    peer: SocketAddr,
    naming: Option<Naming>,
}

impl Heard {
    fn path(&self) -> ReplyPath {
        ReplyPath {
            naming: self.naming,
            ..ReplyPath::to_peer(self.peer, None, self.client, self.at.into())
        }
    }
}

/// The path by which `client` was last heard, unless that is too long ago for one
/// whose peer has named another since, and whose replies don't name it.
fn expected_path(log: &[Heard], now: Instant, client: SocketAddr) -> Option<ReplyPath> {
    let path = remembered_path(log, now, client)?;
    let peer = path.to;
    let last = log.iter().rposition(|heard| heard.client == client)?;
    let canonical = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
    let names_another = |heard: &Heard| {
        canonical(heard.peer) == canonical(peer)
            && (heard.client != canonical(peer) || heard.naming.is_some())
    };
    let former = client != canonical(peer) && log[last + 1..].iter().any(names_another);
    let lately = now.duration_since(log[last].at) < crate::FORMER_CLIENT_GRACE;
    (!former || lately || path.naming.is_some()).then_some(path)
}

/// The path by which `client` was last heard, unless that is too long ago or
/// as many others were heard since as the table holds.
fn remembered_path(log: &[Heard], now: Instant, client: SocketAddr) -> Option<ReplyPath> {
    let last = log.iter().rposition(|heard| heard.client == client)?;
    let mut since: Vec<_> = log[last + 1..].iter().map(|heard| heard.client).collect();
    since.sort();
    since.dedup();
    let alive = now.duration_since(log[last].at) < FORGET_AFTER && since.len() < MAX_CLIENTS;
    alive.then(|| log[last].path())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_client_has_an_address_that_no_host_can_have(
        octets in any::<[u8; 4]>(),
        first in prop::sample::select(vec![0, 1, 127, 203, 223, 224, 239, 240, 255]),
        rest in prop::option::of(prop::sample::select(vec![0, 255])),
        port in prop::sample::select(vec![0, 1, 65_535]),
    ) {
        let [_, second, third, fourth] = octets;
        let others = rest.map_or([second, third, fourth], |all| [all; 3]);
        let client = SocketAddr::from(([first, others[0], others[1], others[2]], port));
        let datagram = from_client(&client.to_string(), b"");
        let demux = Demux::new(trust().build().unwrap());
        let received = demux.receive(Instant::now(), addr(PROXY), None, &datagram);
        prop_assert_eq!(received.is_ok(), can_be_a_client(client));
    }

    #[test]
    fn behaves_as_the_log_says(
        open in any::<bool>(),
        formats in any_formats(),
        steps in vec((any_peer(), any_datagram(), 0..8_000u64), 1..60),
    ) {
        let untrusted = if open { Untrusted::Accept } else { Untrusted::Drop };
        let trust = trust()
            .formats(formats.iter().copied())
            .untrusted(untrusted)
            .max_clients(MAX_CLIENTS)
            .forget_after(FORGET_AFTER);
        let demux = Demux::new(trust.build().unwrap());
        let mut now = Instant::now();
        let (mut proxied, mut strangers) = (Vec::new(), Vec::new());
        let mut clients: Vec<SocketAddr> = Vec::new();

        for (peer, datagram, millis) in &steps {
            now += Duration::from_millis(*millis);
            let received = demux.receive(now, *peer, None, datagram);
            let trusted = is_trusted(*peer);
            let meant = meant(&formats, *peer, datagram);
            let delivered = meant.as_ref().is_some_and(|meant| {
                trusted || open && remembered_path(&proxied, now, meant.client).is_none()
            });
            prop_assert_eq!(received.is_ok(), delivered);
            if let (Ok(received), Some(Meant { client, header_len, naming, .. })) = (received, meant) {
                prop_assert_eq!(received.client, client);
                prop_assert_eq!(received.payload, &datagram[header_len..]);
                prop_assert_eq!(received.proxy.is_some(), trusted);
                prop_assert_eq!(received.reply_path.to, *peer);
                let log = if trusted { &mut proxied } else { &mut strangers };
                prop_assert_eq!(received.reply_path.naming, naming);
                log.push(Heard { at: now, client, peer: *peer, naming });
                clients.push(client);
            }
            for client in &clients {
                let expected = expected_path(&proxied, now, *client)
                    .or_else(|| expected_path(&strangers, now, *client));
                let found = demux.reply_path(now, *client);
                prop_assert_eq!(found, expected);
                prop_assert_eq!(found.and_then(|p| p.naming), expected.and_then(|p| p.naming));
            }
            // A reply to an earlier datagram takes its own path while that is certain
            // to reach its client.
            for heard in proxied.iter().chain(&strangers) {
                let path = heard.path();
                let expected = expected_path(&proxied, now, heard.client)
                    .or_else(|| expected_path(&strangers, now, heard.client));
                let lately = now.duration_since(heard.at) < match heard.naming {
                    Some(_) => FORGET_AFTER,
                    None => crate::FORMER_CLIENT_GRACE,
                };
                let itself = heard.peer.ip().to_canonical() == heard.client.ip()
                    && heard.peer.port() == heard.client.port();
                let sure = lately || itself || expected == Some(path);
                prop_assert_eq!(demux.reply_path(now, path), sure.then_some(path));
            }
            prop_assert!(demux.stats().clients <= 2 * MAX_CLIENTS);
        }
        let stats = demux.stats();
        prop_assert_eq!(stats.received, steps.len() as u64);
        prop_assert_eq!(stats.delivered, clients.len() as u64);
        prop_assert_eq!(stats.delivered + stats.dropped_total(), stats.received);
    }

    /// Each sender speaks for the client that its latest header named, unless that was
    /// too long ago, or something else came since.
    #[test]
    fn bare_datagrams_belong_to_whom_the_log_says(
        deliver in any::<bool>(),
        steps in vec((any_peer(), any_said(), 0..20_000u64), 1..60),
    ) {
        const IDLE: Duration = Duration::from_secs(30);
        const MAX: usize = 2;
        let alone = if deliver { HeaderAlone::Deliver } else { HeaderAlone::Announce };
        let trust = trust().remember_senders(IDLE, MAX).header_alone(alone);
        let demux = Demux::new(trust.build().unwrap());
        let mut now = Instant::now();
        // Sender, client, destination and time.
        let mut said: Vec<(SocketAddr, SocketAddr, SocketAddr, Instant)> = Vec::new();
        let (mut delivered, mut refused) = (0, 0);
        for (peer, datagram, millis) in &steps {
            now += Duration::from_millis(*millis);
            said.retain(|(.., heard)| now.duration_since(*heard) < IDLE);
            let sender = canonical_of(*peer);
            let position = said.iter().position(|(known, ..)| *known == sender);
            let bare = !datagram.starts_with(&SIGNATURE) && !ppv2::is_v1(datagram);
            let expected = if !is_trusted(*peer) {
                None
            } else if bare {
                position.map(|position| {
                    said[position].3 = now;
                    let (_, client, destination, _) = said[position];
                    (client, Some(destination), &datagram[..])
                })
            } else if let Some(meant) = meant(&[Format::V2], *peer, datagram) {
                let payload = &datagram[meant.header_len..];
                let tagged = ppv2::decode(datagram).unwrap().0.tlvs().reply_tag().is_some();
                if let Some(destination) = meant.names.filter(|_| !tagged) {
                    let one = (sender, meant.client, destination, now);
                    match position {
                        Some(position) => said[position] = one,
                        None if said.len() < MAX => said.push(one),
                        None => refused += 1,
                    }
                } else {
                    said.retain(|(known, ..)| *known != sender);
                }
                let announces = meant.names.is_some() && !tagged && payload.is_empty() && !deliver;
                (!announces).then_some((meant.client, meant.names, payload))
            } else {
                said.retain(|(known, ..)| *known != sender);
                None
            };
            delivered += u64::from(expected.is_some());
            let received = demux.receive(now, *peer, None, datagram);
            let received = received.ok().map(|one| (one.client, one.destination, one.payload));
            prop_assert_eq!(received, expected);
            let stats = demux.stats();
            prop_assert_eq!(stats.delivered, delivered);
            prop_assert_eq!(stats.senders_not_remembered, refused);
        }
    }

    #[test]
    fn survives_anything(
        ip in any::<IpAddr>(),
        port in any::<u16>(),
        datagram in vec(any::<u8>(), 0..600),
        signed in any::<bool>(),
    ) {
        let demux = Demux::new(Trust::networks(["0.0.0.0/1", "::/1"]).untrusted(Untrusted::Accept).build().unwrap());
        let mut bytes = if signed { SIGNATURE.to_vec() } else { Vec::new() };
        bytes.extend(datagram);
        let peer = SocketAddr::new(ip, port);
        let now = Instant::now();
        if let Ok(received) = demux.receive(now, peer, None, &bytes) {
            prop_assert_eq!(demux.reply_path(now, received.client), Some(ReplyPath::back(peer)));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    /// A burst is decided by its first datagram, with the same result as one by one.
    #[test]
    fn a_batch_is_decided_as_single_datagrams(
        remembers in any::<bool>(),
        choices in vec((0usize..3, 0usize..13, 0u8..3), 1..60),
    ) {
        let now = Instant::now();
        let peers = [PROXY, OTHER_PROXY, CLIENT].map(addr);
        let datagrams: Vec<_> = choices
            .iter()
            .map(|&(peer, kind, byte)| {
                let datagram = match kind {
                    0 | 1 => from_client(CLIENT, &[byte; 5]),
                    2 => from_client(CLIENT, b""),
                    3 => from_client("203.0.113.11:54322", &[byte]),
                    4 => with_header(
                        |b| Encoder::udp(b, addr(CLIENT), addr(LISTENER))?.authority("a.example"),
                        &[byte],
                    ),
                    5 => with_header(|b| Encoder::local(b), &[byte]),
                    6 | 7 => tagged(CLIENT, byte, &[byte; 5]),
                    8 => spp(CLIENT, &[byte; 5]),
                    9 => b"PROXY UNKNOWN\r\n".to_vec(),
                    10 => Vec::new(),
                    _ => vec![byte; 30],
                };
                (peers[peer], datagram)
            })
            .collect();
        let demux = || {
            let trust = trust().untrusted(Untrusted::Accept);
            let trust = if remembers {
                trust.remember_senders(Duration::from_secs(30), 1)
            } else {
                trust.formats([Format::V2, Format::Spp])
            };
            Demux::new(trust.build().unwrap())
        };
        let (single, together) = (demux(), demux());
        {
            let mut together = together.lock(now.into());
            for (peer, datagram) in &datagrams {
                let expected = single.receive(now, *peer, None, datagram);
                let parts = together.receive(*peer, None, datagram);
                prop_assert_eq!(parts.map(|parts| parts.of(datagram)), expected);
            }
        }
        prop_assert_eq!(single.stats(), together.stats());
        for client in [CLIENT, "203.0.113.11:54322", PROXY, OTHER_PROXY].map(addr) {
            prop_assert_eq!(single.reply_path(now, client), together.reply_path(now, client));
        }
        for peer in [PROXY, OTHER_PROXY].map(addr) {
            let [single, together] = [&single, &together].map(|demux| {
                let received = demux.receive(now, peer, None, b"bare");
                received.map(|received| received.client)
            });
            prop_assert_eq!(single, together);
        }
    }
}
