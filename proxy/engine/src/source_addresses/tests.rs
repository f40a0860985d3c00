use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

fn network(network: &str) -> SourceNetwork {
    SourceNetwork {
        network: network.parse().unwrap(),
        port: None,
    }
}

/// Networks of which every address can be counted, and how many sessions can have.
const SMALL: [(&str, usize); 7] = [
    ("192.0.2.64/29", 5),
    ("192.0.2.64/28", 13),
    ("127.64.0.0/24", 253),
    ("192.0.2.64/30", 1),
    ("2001:db8::/124", 14),
    ("2001:db8::100/120", 254),
    ("2001:db8::8/126", 2),
];

fn is_reserved(of: &SourceNetwork, address: IpAddr) -> bool {
    let net = of.network;
    let of_network = address == net.network() || address == of.probe_address();
    of_network || net.addr().is_ipv4() && address == net.broadcast()
}

fn take_all(share: &mut SourceAddresses, now: Instant) -> Vec<IpAddr> {
    std::iter::from_fn(|| share.take(now).ok()).collect()
}

#[test]
fn workers_shares_are_disjoint_and_together_complete() {
    let now = Instant::now();
    for (name, sessions) in SMALL {
        let network = network(name);
        for workers in [1, 2, 3, 5, 64] {
            let shares = (0..workers).map(|n| SourceAddresses::new(&network, n, workers, now));
            let shares: Vec<_> = shares.map(|mut share| take_all(&mut share, now)).collect();
            let sizes = shares.iter().map(Vec::len);
            let (least, most) = (sizes.clone().min(), sizes.max());
            assert!(most.unwrap() - least.unwrap() <= 1, "{name} {workers}");
            let all: Vec<_> = shares.into_iter().flatten().collect();
            let distinct: BTreeSet<_> = all.iter().copied().collect();
            assert_eq!((all.len(), distinct.len()), (sessions, sessions), "{name}");
            for address in distinct {
                assert!(network.network.contains(&address), "{address} of {name}");
                assert!(!is_reserved(&network, address), "{address} of {name}");
            }
        }
    }
}

#[test]
fn a_network_of_any_size_gives_addresses() {
    let now = Instant::now();
    for (name, workers) in [
        ("127.64.0.0/10", 2),
        ("10.0.0.0/8", 3),
        ("0.0.0.0/0", 1),
        ("2001:db8::/96", 1),
        ("2001:db8::/95", 1),
        ("2001:db8::/80", 3),
        ("2001:db8::/64", 64),
        ("2001:db8::/32", 7),
        ("::/0", 5),
    ] {
        let network = network(name);
        let mut all = BTreeSet::new();
        for worker in 0..workers {
            let mut share = SourceAddresses::new(&network, worker, workers, now);
            for _ in 0..1000 {
                let address = share.take(now).unwrap();
                assert!(network.network.contains(&address), "{address} of {name}");
                assert!(!is_reserved(&network, address), "{address} of {name}");
                assert!(all.insert(address), "{address} of {name} twice");
                share.give_back(address, now);
            }
        }
    }
}

#[test]
fn addresses_of_the_largest_networks_differ_in_their_low_64_bits() {
    let now = Instant::now();
    let ends = ["2001:db8::/64", "2001:db8::/32", "2001:db8::/63", "::/0"].map(|name| {
        let share = SourceAddresses::new(&network(name), 2, 3, now);
        (share.address(0), share.address(share.len() - 1))
    });
    assert!(ends[0].1 <= "2001:db8::ffff:ffff:ffff:ffff".parse::<IpAddr>().unwrap());
    assert_eq!(ends[1..3], [ends[0]; 2]);
    assert_eq!(
        ends[3].1,
        "::ffff:ffff:ffff:ffff".parse::<IpAddr>().unwrap()
    );
}

#[test]
fn loopback_and_groups_are_no_sources() {
    let now = Instant::now();
    for (around, none) in [
        ("127.0.0.0/28", "127.0.0.1"),
        ("126.0.0.0/7", "127.0.0.1"),
        ("208.0.0.0/4", "224.0.0.1"),
    ] {
        let network = network(around);
        let mut share = SourceAddresses::new(&network, 0, 1, now);
        let none: IpAddr = none.parse().unwrap();
        let is_no_source = is_no_host(none) || none == Ipv4Addr::LOCALHOST;
        if let Some(number) = share.number(none).filter(|_| is_no_source) {
            // As if it came next.
            share.used = share.order.place(number.into());
            assert_ne!(share.take(now).unwrap(), none);
        }
        assert!((0..10_000).all(|_| share.take(now) != Ok(none)));
    }
}

#[test]
fn outsiders_cant_guess_the_order() {
    let now = Instant::now();
    for name in ["127.64.0.0/10", "2001:db8::/64", "2001:db8::/100"] {
        let network = network(name);
        let first = || {
            let mut share = SourceAddresses::new(&network, 0, 1, now);
            (0..3).map(|_| share.take(now).unwrap()).collect::<Vec<_>>()
        };
        assert_ne!(first(), first(), "{name}");
        // Each half of the host's part differs from one address to the next.
        let share = SourceAddresses::new(&network, 0, 1, now);
        let bits = 128 - share.len().leading_zeros();
        let numbers: Vec<_> = (0..64).map(|place| share.order.at(place)).collect();
        for part in [0, bits / 4, bits / 2, bits * 3 / 4] {
            let values = numbers.iter().map(|number| number >> part & 0xf);
            assert!(values.collect::<BTreeSet<_>>().len() > 8, "{name} {part}");
        }
    }
}

#[test]
fn addresses_that_were_never_used_come_first_and_then_the_longest_rested() {
    let start = Instant::now();
    let network = network("192.0.2.0/28");
    let mut share = SourceAddresses::new(&network, 0, 1, start);
    let mut first: Vec<IpAddr> = Vec::new();
    for n in 0..13 {
        let now = start + Duration::from_secs(200 * n);
        let address = share.take(now).unwrap();
        assert!(!first.contains(&address));
        first.push(address);
        share.give_back(address, now);
    }
    let now = start + Duration::from_secs(12 * 200 + 11);
    assert_eq!(take_all(&mut share, now), first);
}

#[test]
fn an_address_rests_after_its_session_and_after_late_replies() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let network = network("192.0.2.0/30");
    let mut share = SourceAddresses::new(&network, 0, 1, start);
    let only = share.take(start).unwrap();
    assert_eq!(share.take(at(1000)), Err(NoAddress));
    share.give_back(only, at(1000));
    assert_eq!(share.take(at(1000)), Err(NoAddress));
    // A time that was read a moment ago.
    assert_eq!(share.take(at(999)), Err(NoAddress));
    let before = at(1010) - Duration::from_millis(1);
    assert_eq!(share.take(before), Err(NoAddress));
    share.heard(only, at(1009));
    assert_eq!(share.take(at(1018)), Err(NoAddress));
    share.heard(only, at(1018));
    share.heard(only, at(1020));
    assert_eq!(share.take(at(1029)), Err(NoAddress));
    assert_eq!(share.take(at(1031)), Ok(only));
    assert!(!share.any_rests(at(1031)));
    assert_eq!((share.resting.len(), share.heard.len()), (0, 0));
    share.give_back(only, at(1031));
    assert!(share.any_rests(at(1040)) && !share.any_rests(at(1042)));
}

#[test]
fn late_replies_lengthen_a_rest_to_its_longest_at_most() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let mut share = SourceAddresses::new(&network("192.0.2.0/30"), 0, 1, start);
    let only = share.take(start).unwrap();
    share.give_back(only, at(1000));
    for seconds in 0..MAX_REST.as_secs() {
        share.heard(only, at(1000 + seconds));
        assert_eq!(share.take(at(1000 + seconds)), Err(NoAddress));
        assert!(share.any_rests(at(1000 + seconds)));
    }
    let over = at(1001) + MAX_REST;
    share.heard(only, over);
    assert!(!share.any_rests(over));
    assert_eq!(share.take(over), Ok(only));
}

#[test]
fn a_reply_to_a_session_shortens_no_rest() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let mut share = SourceAddresses::new(&network("192.0.2.0/30"), 0, 1, start);
    let only = share.take(start).unwrap();
    share.heard(only, at(1));
    share.give_back(only, at(1000));
    assert!(share.heard.is_empty());
    assert_eq!(share.take(at(1000)), Err(NoAddress));
    assert_eq!(share.take(at(1009)), Err(NoAddress));
    assert_eq!(share.take(at(1011)), Ok(only));
}

#[test]
fn a_take_passes_over_few_addresses_that_were_heard() {
    let start = Instant::now();
    let mut share = SourceAddresses::new(&network("10.0.0.0/20"), 0, 1, start);
    let all = take_all(&mut share, start);
    let (last, others) = all.split_last().unwrap();
    for address in &all {
        share.give_back(*address, start);
    }
    let now = start + MIN_REST * 2;
    for address in others {
        share.heard(*address, now);
    }
    let turns = MOST_PASSED_OVER;
    let after = share.resting[turns].number;
    assert_eq!(share.take(now), Err(NoAddress));
    assert_eq!(share.resting[0].number, after);
    // The next ones go on there.
    let takes = (1..others.len()).map(|_| share.take(now));
    let found: Vec<_> = takes.flatten().collect();
    assert_eq!(found, [*last]);
}

/// A share of which many rest, without a million takes.
fn busy(share: &mut SourceAddresses, now: Instant) -> IpAddr {
    let first = share.take(now).unwrap();
    for _ in 0..MANY_RESTING {
        share.give_back(first, now);
    }
    first
}

#[test]
fn where_many_rest_the_longest_rested_comes_before_new_ones() {
    let start = Instant::now();
    for name in ["127.64.0.0/10", "2001:db8::/81"] {
        let mut share = SourceAddresses::new(&network(name), 0, 1, start);
        let first = busy(&mut share, start);
        let rested = start + MAX_REST + Duration::from_secs(1);
        assert_ne!(share.take(rested), Ok(first));
        share.give_back(first, start);
        assert_ne!(share.take(start + MIN_REST * 2), Ok(first));
        assert_eq!(share.take(rested), Ok(first));
        assert_ne!(share.take(rested), Ok(first));
    }
}

#[test]
fn nothing_is_remembered_of_a_network_that_is_never_used_up() {
    let now = Instant::now();
    let network = network("2001:db8::/64");
    let mut share = SourceAddresses::new(&network, 0, 2, now);
    for _ in 0..1000 {
        let address = share.take(now).unwrap();
        share.give_back(address, now);
        share.heard(address, now);
    }
    assert!(SourceAddresses::never_repeats(&network, 2));
    assert!(!SourceAddresses::never_repeats(
        &self::network("2001:db8::/80"),
        2
    ));
    assert_eq!((share.resting.capacity(), share.heard.capacity()), (0, 0));
    share.used = share.len;
    assert!(network.network.contains(&share.take(now).unwrap()));
}

#[test]
fn replies_to_what_does_not_rest_leave_nothing() {
    let now = Instant::now();
    let network = network("127.64.0.0/10");
    let mut share = SourceAddresses::new(&network, 0, 2, now);
    let addresses: Vec<_> = (0..100).map(|_| share.take(now).unwrap()).collect();
    let mut all = network.network.hosts();
    for address in all.by_ref().take(100_000) {
        if !addresses.contains(&address) {
            share.heard(address, now);
        }
    }
    let other = SourceAddresses::new(&network, 1, 2, now).take(now).unwrap();
    for none in [other, "127.0.0.9".parse().unwrap(), "::1".parse().unwrap()] {
        share.heard(none, now);
        share.give_back(none, now);
    }
    assert_eq!((share.resting.len(), share.heard.len()), (0, 0));
}

proptest! {
    #[test]
    fn a_permutation_has_each_number_once(len in 1u128..3000, key in any::<[u64; 2]>()) {
        let order = Permutation::new(len, key);
        let numbers: Vec<_> = (0..len).map(|place| order.at(place)).collect();
        for (place, number) in numbers.iter().enumerate() {
            prop_assert_eq!(order.place(*number), place as u128);
        }
        prop_assert_eq!(numbers.into_iter().collect::<BTreeSet<_>>().len() as u128, len);
    }

    #[test]
    fn a_permutation_of_any_size_can_be_undone(
        len in 1u128..,
        bits in 0u32..128,
        place in any::<u128>(),
        key in any::<[u64; 2]>(),
    ) {
        let len = (len >> bits).max(1);
        let order = Permutation::new(len, key);
        let number = order.at(place % len);
        prop_assert!(number < len);
        prop_assert_eq!(order.place(number), place % len);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Take,
    GiveBack(prop::sample::Index),
    Heard(prop::sample::Index),
    /// Milliseconds.
    Pass(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => Just(Step::Take),
        5 => any::<prop::sample::Index>().prop_map(Step::GiveBack),
        1 => any::<prop::sample::Index>().prop_map(Step::Heard),
        1 => (0u64..8000).prop_map(Step::Pass),
        1 => (0u64..200_000).prop_map(Step::Pass),
    ];
    proptest::collection::vec(step, 0..300)
}

/// What a test knows of an address that was handed out.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Known {
    Running,
    /// Since when, and when the latest reply came.
    Resting(Instant, Option<Instant>),
}

impl Known {
    /// Whether it has rested for as long as it must.
    fn has_rested(self, now: Instant) -> bool {
        match self {
            Self::Running => false,
            Self::Resting(ended, heard) => {
                let latest = heard.map_or(ended, |heard| heard.max(ended));
                now - latest >= MIN_REST || now - ended >= MAX_REST
            }
        }
    }
}

proptest! {
    /// Whatever happens in whatever order, also replies to running sessions: no address is
    /// handed out that runs or has not rested, and one is refused only if all run or rest.
    #[test]
    fn an_address_has_one_session_at_a_time_and_rests_in_between(
        steps in steps(),
        small in prop::sample::select(&SMALL[..]),
        workers in 1usize..4,
    ) {
        let network = network(small.0);
        let mut now = Instant::now();
        let mut share = SourceAddresses::new(&network, 0, workers, now);
        let mut known: BTreeMap<IpAddr, Known> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Take => match share.take(now) {
                    Ok(address) => {
                        prop_assert!(network.network.contains(&address));
                        prop_assert!(!is_reserved(&network, address));
                        match known.insert(address, Known::Running) {
                            None => {}
                            Some(Known::Running) => prop_assert!(false, "{address} runs"),
                            Some(rests) => {
                                prop_assert!(rests.has_rested(now), "{address}: {rests:?}");
                                prop_assert_eq!(known.len() as u128, share.len());
                            }
                        }
                    }
                    Err(NoAddress) => {
                        prop_assert_eq!(known.len() as u128, share.len());
                        // Time is counted in tenths of a second, and one that was heard
                        // waits for its turn.
                        let a_moment_ago = now - 2 * Tick::STEP;
                        let could = |of: &Known| match of {
                            Known::Resting(_, None) => of.has_rested(a_moment_ago),
                            Known::Running | Known::Resting(..) => false,
                        };
                        prop_assert!(!known.values().any(could), "{known:?}");
                    }
                },
                Step::GiveBack(which) => {
                    let running = known.iter().filter(|(_, of)| **of == Known::Running);
                    let running: Vec<_> = running.map(|(address, _)| *address).collect();
                    if !running.is_empty() {
                        let address = *which.get(&running);
                        share.give_back(address, now);
                        known.insert(address, Known::Resting(now, None));
                    }
                }
                Step::Heard(which) => {
                    let hosts: Vec<_> = network.network.hosts().collect();
                    let address = *which.get(&hosts);
                    share.heard(address, now);
                    if let Some(Known::Resting(_, heard)) = known.get_mut(&address) {
                        *heard = Some(now);
                    }
                }
                Step::Pass(millis) => now += Duration::from_millis(millis),
            }
            let rests = |of: &Known| *of != Known::Running && !of.has_rested(now);
            prop_assert!(share.any_rests(now) || !known.values().any(rests), "{known:?}");
            let resting = known.values().filter(|of| **of != Known::Running).count();
            prop_assert_eq!(share.resting.len(), resting);
            prop_assert!(share.heard.len() <= known.len());
        }
        // Whatever happened, all come back.
        now += MAX_REST;
        let left = take_all(&mut share, now).len();
        let running = known.values().filter(|of| **of == Known::Running).count();
        prop_assert_eq!((left + running) as u128, share.len());
    }
}

#[test]
fn addresses_that_another_process_handed_out_come_back_by_their_rest_alone() {
    let start = Instant::now();
    for (name, sessions) in SMALL {
        let network = network(name);
        let mut old = SourceAddresses::new(&network, 0, 1, start);
        let in_use: Vec<_> = (0..sessions / 2)
            .map(|_| old.take(start).unwrap())
            .collect();
        let ended = old.take(start).unwrap();
        old.give_back(ended, start);
        let now = start + MIN_REST / 2;
        let resting = old.resting(now);
        assert_eq!(resting, [(ended, MIN_REST / 2)]);

        let mut new = SourceAddresses::new(&network, 0, 1, now);
        for address in &in_use {
            new.inherit(*address, None, now);
        }
        for (address, since) in resting {
            new.inherit(address, Some(since), now);
        }
        let taken: BTreeSet<_> = take_all(&mut new, now).into_iter().collect();
        assert_eq!(taken.len(), sessions - in_use.len() - 1, "{name}");
        assert!(!taken.contains(&ended), "{name}");
        assert!(
            !in_use.iter().any(|address| taken.contains(address)),
            "{name}"
        );
        // It has rested for long enough, by a step of the clock more than it needs to.
        let rested = start + MIN_REST + Tick::STEP * 2;
        assert_eq!(take_all(&mut new, rested), [ended], "{name}");
        for address in &in_use {
            new.give_back(*address, rested);
        }
        assert!(take_all(&mut new, rested).is_empty(), "{name}");
        let later = rested + MIN_REST + Tick::STEP * 2;
        assert_eq!(take_all(&mut new, later), in_use, "{name}");
    }
}

#[test]
fn workers_give_addresses_of_other_shares_back_to_their_owner() {
    let start = Instant::now();
    for (name, _) in SMALL {
        let network = network(name);
        let mut old = SourceAddresses::new(&network, 0, 1, start);
        let in_use = take_all(&mut old, start);
        // The sessions come to worker 0 of two.
        let mut new: Vec<_> = (0..2)
            .map(|worker| SourceAddresses::new(&network, worker, 2, start))
            .collect();
        for share in &mut new {
            for address in &in_use {
                share.inherit(*address, None, start);
            }
            assert!(take_all(share, start).is_empty(), "{name}");
        }
        let given_back = GivenBack::default();
        for address in &in_use {
            if !new[0].give_back(*address, start) {
                given_back.add(*address, start);
            }
        }
        let of_network = given_back.of(&network.network, start + MIN_REST);
        assert!(of_network.iter().all(|(_, ended)| *ended == MIN_REST));
        let left = of_network.len();
        // Of a single one, it is the first worker's.
        assert_eq!(left, in_use.len() / 2, "{name}");
        for share in &mut new {
            given_back.take(|address, ended| share.give_back(address, ended));
        }
        assert!(given_back.of(&network.network, start).is_empty(), "{name}");
        let rested = start + MIN_REST + Tick::STEP * 2;
        let back: BTreeSet<_> = new
            .iter_mut()
            .flat_map(|share| take_all(share, rested))
            .collect();
        assert_eq!(back, in_use.into_iter().collect(), "{name}");
    }
}
