//! What must hold for any peers and any bytes, checked against a log of all
//! that was let in.

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
    let valid = (any_client(), any_client(), 0..4u8, vec(any::<u8>(), 0..40))
        .prop_map(|(client, listener, kind, payload)| {
            with_header(
                |b| match kind {
                    0 => Encoder::local(b),
                    1 => Encoder::tcp(b, client, listener),
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
/// of the gate's code.
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

struct Heard {
    at: Instant,
    client: SocketAddr,
    peer: SocketAddr,
}

/// The peer that `client` was last heard through, unless that is too long ago for
/// one whose peer has named another since.
fn expected_way(log: &[Heard], now: Instant, client: SocketAddr) -> Option<SocketAddr> {
    let peer = remembered_way(log, now, client)?;
    let last = log.iter().rposition(|heard| heard.client == client)?;
    let canonical = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
    let names_another =
        |heard: &Heard| canonical(heard.peer) == canonical(peer) && heard.client != canonical(peer);
    let former = client != canonical(peer) && log[last + 1..].iter().any(names_another);
    let lately = now.duration_since(log[last].at) < crate::FORMER_CLIENT_GRACE;
    (!former || lately).then_some(peer)
}

/// The peer that `client` was last heard through, unless that is too long ago or
/// as many others were heard since as the table holds.
fn remembered_way(log: &[Heard], now: Instant, client: SocketAddr) -> Option<SocketAddr> {
    let last = log.iter().rposition(|heard| heard.client == client)?;
    let mut since: Vec<_> = log[last + 1..].iter().map(|heard| heard.client).collect();
    since.sort();
    since.dedup();
    let alive = now.duration_since(log[last].at) < FORGET_AFTER && since.len() < MAX_CLIENTS;
    alive.then_some(log[last].peer)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn holds_to_the_log(
        open in any::<bool>(),
        steps in vec((any_peer(), any_datagram(), 0..8_000u64), 1..60),
    ) {
        let direct = if open { Direct::Accept } else { Direct::Drop };
        let trust = trust().direct(direct).max_clients(MAX_CLIENTS).forget_after(FORGET_AFTER);
        let gate = Gate::new(trust).unwrap();
        let mut now = Instant::now();
        let (mut proxied, mut strangers) = (Vec::new(), Vec::new());
        let mut clients: Vec<SocketAddr> = Vec::new();

        for (peer, datagram, millis) in &steps {
            now += Duration::from_millis(*millis);
            let admitted = gate.admit(now, *peer, datagram);
            let trusted = is_trusted(*peer);
            let named = client_named(*peer, datagram);
            let welcome = named.is_some_and(|client| {
                trusted || open && remembered_way(&proxied, now, client).is_none()
            });
            prop_assert_eq!(admitted.is_ok(), welcome);
            if let (Ok(admitted), Some(client)) = (admitted, named) {
                prop_assert_eq!(admitted.client, client);
                prop_assert_eq!(admitted.proxy.is_some(), trusted);
                prop_assert_eq!(admitted.way.to, *peer);
                prop_assert!(datagram.ends_with(admitted.payload));
                prop_assert!(trusted || admitted.payload == datagram.as_slice());
                let log = if trusted { &mut proxied } else { &mut strangers };
                log.push(Heard { at: now, client, peer: *peer });
                clients.push(client);
            }
            for client in &clients {
                let expected = expected_way(&proxied, now, *client)
                    .or_else(|| expected_way(&strangers, now, *client));
                prop_assert_eq!(gate.route(now, *client), expected.map(Way::back));
            }
            // A reply to an earlier datagram takes its way while that is sure to
            // lead to its client.
            for heard in proxied.iter().chain(&strangers) {
                let way = Way::back(heard.peer);
                let reply = ReplyTo { client: heard.client, way, heard: heard.at.into() };
                let expected = expected_way(&proxied, now, heard.client)
                    .or_else(|| expected_way(&strangers, now, heard.client));
                let lately = now.duration_since(heard.at) < crate::FORMER_CLIENT_GRACE;
                let itself = heard.peer.ip().to_canonical() == heard.client.ip()
                    && heard.peer.port() == heard.client.port();
                let sure = lately || itself || expected == Some(heard.peer);
                prop_assert_eq!(gate.way_of(now.into(), reply), sure.then_some(way));
            }
            prop_assert!(gate.stats().clients <= 2 * MAX_CLIENTS);
        }
        let stats = gate.stats();
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
        let gate = Gate::new(Trust::networks(["0.0.0.0/1", "::/1"]).unwrap().direct(Direct::Accept)).unwrap();
        let mut bytes = if signed { ppv2::SIGNATURE.to_vec() } else { Vec::new() };
        bytes.extend(datagram);
        let peer = SocketAddr::new(ip, port);
        let now = Instant::now();
        if let Ok(admitted) = gate.admit(now, peer, &bytes) {
            prop_assert_eq!(gate.route(now, admitted.client), Some(Way::back(peer)));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    /// Several at once, where a burst spares the work for all but its first,
    /// come to the same as one by one.
    #[test]
    fn together_is_as_one_by_one(
        choices in vec((0usize..3, 0usize..7, 0u8..3), 1..60),
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
                    _ => vec![byte; 30],
                };
                (peers[peer], datagram)
            })
            .collect();
        let (single, together) = (open_gate(), open_gate());
        {
            let mut admission = together.admission(now.into());
            for (peer, datagram) in &datagrams {
                let expected = single.admit(now, *peer, datagram);
                prop_assert_eq!(admission.admit(*peer, None, datagram), expected);
            }
        }
        prop_assert_eq!(single.stats(), together.stats());
        for client in [CLIENT, "203.0.113.11:54322", PROXY, OTHER_PROXY].map(addr) {
            prop_assert_eq!(single.route(now, client), together.route(now, client));
        }
    }
}
