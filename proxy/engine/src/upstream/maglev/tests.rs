//! The mapping is even, moves little, and is pinned.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use proptest::prelude::*;

use super::super::affinity::{HashOn, step};
use super::*;
use crate::address::ClientAddr;
use crate::upstream::MAX_WEIGHT;

/// So many that what is by chance stays well below one in a hundred.
const CLIENTS: u32 = 100_000;

/// Fingerprints of the servers of 10,000 clients, and of all slots of a table of
/// 300 servers.
const FIRST_CLIENTS: u64 = 0xfdbe_4e31_36c5_bc0f;
const MANY_SLOTS: u64 = 0xf85f_91a2_ac1b_9da2;

type Servers = Vec<(ServerAddr, u16)>;

fn server(text: &str) -> ServerAddr {
    ServerAddr(text.parse().unwrap())
}

/// A table that names servers by their place in `servers`.
fn table(servers: &[(ServerAddr, u16)]) -> Table {
    let names: Vec<_> = (0..u16::try_from(servers.len()).unwrap()).collect();
    Table::build(servers, &names)
}

/// The server's address for so many clients.
fn mapping(servers: &[(ServerAddr, u16)]) -> Vec<ServerAddr> {
    let table = table(servers);
    let hash_on = HashOn::ClientIp { ipv6_prefix: 64 };
    let of = |number| {
        let ip = Ipv4Addr::from_bits(0x0a00_0000 + number);
        let hash = hash_on.hash(ClientAddr(SocketAddr::from((ip, 1))));
        servers[usize::from(table.get(hash).unwrap())].0
    };
    (0..CLIENTS).map(of).collect()
}

/// The part of clients that move from one mapping to the other.
fn moved(before: &[ServerAddr], after: &[ServerAddr]) -> f64 {
    let moved = before.iter().zip(after).filter(|(a, b)| a != b).count();
    f64::from(u32::try_from(moved).unwrap()) / f64::from(CLIENTS)
}

fn share(servers: &[(ServerAddr, u16)], index: usize) -> f64 {
    let all: f64 = servers.iter().map(|(_, weight)| f64::from(*weight)).sum();
    f64::from(servers[index].1) / all
}

fn slots(table: &Table, server: usize) -> f64 {
    let its = table.slots.iter().filter(|s| usize::from(**s) == server);
    f64::from(u32::try_from(its.count()).unwrap())
}

fn addresses() -> impl Strategy<Value = ServerAddr> {
    let ip = prop_oneof![
        any::<u32>().prop_map(|bits| IpAddr::from(Ipv4Addr::from_bits(bits))),
        any::<u128>().prop_map(|bits| IpAddr::from(Ipv6Addr::from_bits(bits))),
        // As they are given out: one after the other.
        (0..64u32).prop_map(|n| IpAddr::from(Ipv4Addr::from_bits(0xc000_0200 + n))),
    ];
    (ip, 1..=u16::MAX).prop_map(|(ip, port)| ServerAddr(SocketAddr::new(ip, port)))
}

fn servers(
    count: std::ops::Range<usize>,
    weights: std::ops::RangeInclusive<u16>,
) -> impl Strategy<Value = Servers> {
    prop::collection::btree_map(addresses(), weights, count)
        .prop_map(|servers| servers.into_iter().collect())
        .prop_shuffle()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// Of the same weight, servers have the same number of slots to within one.
    #[test]
    fn equal_servers_have_equal_shares(servers in servers(1..120, 7..=7)) {
        let table = table(&servers);
        let counts: Vec<_> = (0..servers.len()).map(|server| slots(&table, server)).collect();
        let (least, most) = counts.iter().fold((f64::MAX, 0.0f64), |(l, m), c| (l.min(*c), m.max(*c)));
        prop_assert!(most - least <= 1.0 && most <= least * 1.01, "{least} to {most}");
    }

    /// Every server has its share of the slots to within one, and of the clients
    /// to within what chance allows.
    #[test]
    fn shares_go_by_weight(servers in servers(1..60, 1..=MAX_WEIGHT)) {
        let table = table(&servers);
        let len = f64::from(u32::try_from(table.slots.len()).unwrap());
        let mapping = mapping(&servers);
        for index in 0..servers.len() {
            let expected = share(&servers, index) * len;
            let had = slots(&table, index);
            prop_assert!((had - expected).abs() <= 1.0, "{had} slots, not {expected}");
            let clients = mapping.iter().filter(|server| **server == servers[index].0).count();
            let clients = f64::from(u32::try_from(clients).unwrap());
            let expected = had / len * f64::from(CLIENTS);
            let chance = 6.0 * expected.sqrt() + 6.0;
            prop_assert!((clients - expected).abs() <= chance, "{clients} clients, not {expected}");
        }
    }

    /// When one of N comes or goes, its own part of the clients moves and at most
    /// one in a hundred besides.
    #[test]
    fn what_comes_or_goes_moves_little_else(servers in servers(2..150, 1..=1), which: prop::sample::Index) {
        let which = which.index(servers.len());
        let mut fewer = servers.clone();
        fewer.remove(which);
        let moved = moved(&mapping(&servers), &mapping(&fewer));
        prop_assert!(moved <= share(&servers, which) + 0.01, "{moved} of {}", servers.len());
    }

    #[test]
    fn so_it_does_with_weights(servers in servers(2..60, 1..=MAX_WEIGHT), which: prop::sample::Index) {
        let which = which.index(servers.len());
        let mut fewer = servers.clone();
        fewer.remove(which);
        let moved = moved(&mapping(&servers), &mapping(&fewer));
        prop_assert!(moved <= share(&servers, which) + 0.01, "{moved} of {servers:?}");
    }

    /// Another weight moves the part of the clients that it adds or takes, and
    /// little besides.
    #[test]
    fn another_weight_moves_what_it_must(
        servers in servers(2..60, 1..=16),
        which: prop::sample::Index,
        weight in 1..=16u16,
    ) {
        let which = which.index(servers.len());
        let mut changed = servers.clone();
        changed[which].1 = weight;
        let must = (share(&servers, which) - share(&changed, which)).abs();
        let moved = moved(&mapping(&servers), &mapping(&changed));
        prop_assert!(moved <= must + 0.01, "{moved}, not {must}, of {servers:?}");
    }

    /// In every proxy, and for every order of the servers.
    #[test]
    fn tables_of_the_same_servers_are_the_same(servers in servers(1..60, 1..=9)) {
        let mut reversed = servers.clone();
        reversed.reverse();
        prop_assert_eq!(mapping(&servers), mapping(&reversed));
    }
}

#[test]
fn as_much_holds_for_many_servers() {
    let server = |n: u32| {
        let ip = Ipv4Addr::from_bits(0xc612_0000 + n);
        (ServerAddr(SocketAddr::from((ip, 9000))), 1)
    };
    for count in [300, 1000, 2000] {
        let servers: Servers = (0..count).map(server).collect();
        let all = table(&servers);
        let (least, most) = (0..servers.len())
            .map(|server| slots(&all, server))
            .fold((f64::MAX, 0.0f64), |(l, m), c| (l.min(c), m.max(c)));
        assert!(most <= least * 1.0101, "{count}: {least} to {most}");
        let before = mapping(&servers);
        for which in [0, servers.len() / 2, servers.len() - 1] {
            let mut fewer = servers.clone();
            fewer.remove(which);
            let moved = moved(&before, &mapping(&fewer));
            assert!(moved <= 1.0 / f64::from(count) + 0.01, "{count}: {moved}");
        }
    }
}

#[test]
fn servers_that_differ_by_their_interface_alone_share_evenly() {
    let servers = [(server("[fe80::1%2]:53"), 1), (server("[fe80::1%3]:53"), 1)];
    let table = table(&servers);
    assert!((slots(&table, 0) - slots(&table, 1)).abs() <= 1.0);
}

#[test]
fn a_server_preferences_for_every_slot_once() {
    for address in ["192.0.2.1:53", "[2001:db8::1]:65535", "0.0.0.0:1"] {
        let mut preferences = Preferences::of(server(address));
        let mut wished = vec![false; SLOTS as usize];
        for _ in 0..SLOTS {
            let slot = preferences.next();
            assert!(
                !std::mem::replace(&mut wished[slot], true),
                "{address}: {slot}"
            );
        }
    }
}

#[test]
fn one_server_has_all_clients_and_none_has_none() {
    let alone = table(&[(server("192.0.2.1:53"), 9)]);
    assert_eq!([0, u64::MAX].map(|hash| alone.get(hash)), [Some(0); 2]);
    assert!(table(&[]).get(7).is_none());
}

#[test]
fn the_lightest_server_beside_the_heaviest_has_a_slot() {
    let server = |n: usize| {
        let ip = Ipv4Addr::from_bits(0xc612_0000 + u32::try_from(n).unwrap());
        let weight = if n == 0 { 1 } else { MAX_WEIGHT };
        (ServerAddr(SocketAddr::from((ip, 9000))), weight)
    };
    let servers: Servers = (0..MAX_SERVERS).map(server).collect();
    let table = table(&servers);
    assert!((0..MAX_SERVERS).all(|server| slots(&table, server) >= 1.0));
}

/// A change that breaks this sends the clients of a running fleet elsewhere the
/// moment that its first proxy is updated. The values come from a program in
/// another language, written after the description in `affinity.rs` and here.
#[test]
fn the_mapping_is_the_same_for_ever() {
    let servers = [
        (server("192.0.2.10:53"), 1),
        (server("192.0.2.11:53"), 2),
        (server("192.0.2.11:5353"), 1),
        (server("[2001:db8::10]:53"), 3),
        (server("10.0.0.1:65535"), 1),
    ];
    let built = table(&servers);
    let hash_ons = [
        HashOn::ClientIp { ipv6_prefix: 64 },
        HashOn::ClientIp { ipv6_prefix: 128 },
        HashOn::ClientAddr,
    ];
    for (client, expected) in [
        ("203.0.113.1:54321", [1, 1, 0]),
        ("203.0.113.2:54321", [0, 0, 0]),
        ("203.0.113.3:54321", [1, 1, 1]),
        ("198.51.100.7:54321", [4, 4, 1]),
        ("127.0.0.1:54321", [3, 3, 3]),
        ("0.0.0.0:54321", [3, 3, 3]),
        ("255.255.255.255:54321", [1, 1, 0]),
        ("[2001:db8:1::1]:54321", [2, 1, 1]),
        ("[2001:db8:1::2]:54321", [2, 2, 3]),
        ("[2001:db8:2::1]:54321", [1, 0, 0]),
        ("[2001:db8:3::1]:54321", [3, 2, 3]),
        ("[::1]:54321", [3, 3, 3]),
    ] {
        let address = ClientAddr(client.parse().unwrap());
        let picked = hash_ons.map(|on| built.get(on.hash(address)).unwrap());
        assert_eq!(picked, expected, "{client}");
    }
    let index = |address: &ServerAddr| servers.iter().position(|(a, _)| a == address).unwrap();
    let fingerprint = |indices: &mut dyn Iterator<Item = usize>| {
        indices.fold(0, |hash, index| step(hash ^ u64::try_from(index).unwrap()))
    };
    let clients = mapping(&servers);
    let first = fingerprint(&mut clients.iter().take(10_000).map(index));
    assert_eq!(first, FIRST_CLIENTS, "{first:#x}");

    let many: Servers = (0..300u32)
        .map(|n| {
            let ip = Ipv4Addr::from_bits(0xc000_0000 + n);
            let weight = 1 + u16::try_from(n % 3).unwrap();
            (ServerAddr(SocketAddr::from((ip, 53))), weight)
        })
        .collect();
    let many = table(&many);
    let slots = fingerprint(&mut many.slots.iter().map(|slot| usize::from(*slot)));
    assert_eq!(slots, MANY_SLOTS, "{slots:#x}");
}
