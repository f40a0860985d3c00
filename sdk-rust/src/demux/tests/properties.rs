//! What must hold for any peers and any bytes, checked against a log of all
//! that was let in.

use ppv2::ReplyTag;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const MAX_CLIENTS: usize = 3;
const FORGET_AFTER: Duration = Duration::from_secs(30);

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
/// off, and bytes of any kind.
fn any_datagram() -> impl Strategy<Value = Vec<u8>> {
    let tag = ReplyTag::new(0, [7; 8]);
    let valid = (any_client(), any_client(), 0..7u8, vec(any::<u8>(), 0..40))
        .prop_map(move |(client, listener, kind, payload)| {
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
    prop_oneof![6 => valid, 1 => spoilt, 1 => cut, 1 => vec(any::<u8>(), 0..80)]
}

fn is_trusted(peer: SocketAddr) -> bool {
    match peer.ip().to_canonical() {
        IpAddr::V4(ip) => ip.octets()[..3] == [192, 0, 2],
        IpAddr::V6(ip) => ip.segments()[..4] == [0x2001, 0xdb8, 1, 0],
    }
}

/// The client that a datagram of this peer is to be taken for, said without any
/// of the code under test.
fn client_named(peer: SocketAddr, datagram: &[u8]) -> Option<SocketAddr> {
    let canonical = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
    let client = if is_trusted(peer) {
        let (header, _) = ppv2::decode(datagram).ok()?;
        if header.origin() == Origin::Local {
            peer
        } else {
            header.client()?
        }
    } else {
        peer
    };
    let client = canonical(client);
    let possible =
        client.port() != 0 && !client.ip().is_multicast() && !client.ip().is_unspecified();
    possible.then_some(client)
}

/// The tag and the destination of the header, if it is one that names a client.
fn tag_of(peer: SocketAddr, datagram: &[u8]) -> Option<Tagged> {
    let reply = ppv2::decode_tagged(datagram).ok()?;
    is_trusted(peer).then(|| Tagged::new(reply.destination, reply.tag))
}

struct Heard {
    at: Instant,
    client: SocketAddr,
    peer: SocketAddr,
    tagged: Option<Tagged>,
}

impl Heard {
    fn path(&self) -> ReplyPath {
        ReplyPath {
            tagged: self.tagged,
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
            && (heard.client != canonical(peer) || heard.tagged.is_some())
    };
    let former = client != canonical(peer) && log[last + 1..].iter().any(names_another);
    let lately = now.duration_since(log[last].at) < crate::FORMER_CLIENT_GRACE;
    (!former || lately || path.tagged.is_some()).then_some(path)
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
    fn behaves_as_the_log_says(
        open in any::<bool>(),
        steps in vec((any_peer(), any_datagram(), 0..8_000u64), 1..60),
    ) {
        let untrusted = if open { Untrusted::Accept } else { Untrusted::Drop };
        let trust = trust().untrusted(untrusted).max_clients(MAX_CLIENTS).forget_after(FORGET_AFTER);
        let demux = Demux::new(trust.build().unwrap());
        let mut now = Instant::now();
        let (mut proxied, mut strangers) = (Vec::new(), Vec::new());
        let mut clients: Vec<SocketAddr> = Vec::new();

        for (peer, datagram, millis) in &steps {
            now += Duration::from_millis(*millis);
            let received = demux.receive(now, *peer, None, datagram);
            let trusted = is_trusted(*peer);
            let named = client_named(*peer, datagram);
            let delivered = named.is_some_and(|client| {
                trusted || open && remembered_path(&proxied, now, client).is_none()
            });
            prop_assert_eq!(received.is_ok(), delivered);
            if let (Ok(received), Some(client)) = (received, named) {
                prop_assert_eq!(received.client, client);
                prop_assert_eq!(received.proxy.is_some(), trusted);
                prop_assert_eq!(received.reply_path.to, *peer);
                prop_assert!(datagram.ends_with(received.payload));
                prop_assert!(trusted || received.payload == datagram.as_slice());
                let log = if trusted { &mut proxied } else { &mut strangers };
                let tagged = tag_of(*peer, datagram);
                prop_assert_eq!(received.reply_path.tagged, tagged);
                log.push(Heard { at: now, client, peer: *peer, tagged });
                clients.push(client);
            }
            for client in &clients {
                let expected = expected_path(&proxied, now, *client)
                    .or_else(|| expected_path(&strangers, now, *client));
                let found = demux.reply_path(now, *client);
                prop_assert_eq!(found, expected);
                prop_assert_eq!(found.and_then(|p| p.tagged), expected.and_then(|p| p.tagged));
            }
            // A reply to an earlier datagram takes its own path while that is certain
            // to reach its client.
            for heard in proxied.iter().chain(&strangers) {
                let path = heard.path();
                let expected = expected_path(&proxied, now, heard.client)
                    .or_else(|| expected_path(&strangers, now, heard.client));
                let lately = now.duration_since(heard.at) < match heard.tagged {
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

    #[test]
    fn survives_anything(
        ip in any::<IpAddr>(),
        port in any::<u16>(),
        datagram in vec(any::<u8>(), 0..600),
        signed in any::<bool>(),
    ) {
        let demux = Demux::new(Trust::networks(["0.0.0.0/1", "::/1"]).untrusted(Untrusted::Accept).build().unwrap());
        let mut bytes = if signed { ppv2::SIGNATURE.to_vec() } else { Vec::new() };
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
        choices in vec((0usize..3, 0usize..9, 0u8..3), 1..60),
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
                    _ => vec![byte; 30],
                };
                (peers[peer], datagram)
            })
            .collect();
        let (single, together) = (open_demux(), open_demux());
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
    }
}
