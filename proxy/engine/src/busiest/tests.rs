use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;

const LISTENER: u64 = 7;

fn client(number: u32) -> Client {
    Client {
        network: Network::of(Ipv4Addr::from_bits(number).into(), 64),
        ipv6_prefix: 64,
        listener: LISTENER,
    }
}

/// Adds to a sketch, by a hash that keeps clients in the same places of the index.
fn add(sketch: &mut Sketch, number: u32, weight: u64) {
    let hash = u64::from(number % 1000).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    sketch.add(client(number), hash, weight);
}

fn one() -> Amount {
    Amount {
        datagrams: 1,
        bytes: 100,
    }
}

fn counted(counts: &Counts, number: u32) -> Option<Counted> {
    let network = client(number).network;
    let mut clients = counts.clients.iter();
    clients
        .find(|counted| counted.client.network == network)
        .copied()
}

/// Every bound that a sketch, or a sum of sketches, states.
fn assert_bounds(counts: &Counts, truth: &BTreeMap<u32, u64>) -> Result<(), TestCaseError> {
    for (number, true_count) in truth {
        match counted(counts, *number) {
            Some(counted) => {
                prop_assert!(counted.at_least <= *true_count);
                prop_assert!(counted.at_least + counted.uncertain >= *true_count);
                prop_assert!(counted.uncertain <= counts.floor);
            }
            None => prop_assert!(*true_count <= counts.floor),
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn counts_keep_their_bounds_and_their_memory(
        places in 1..20_usize,
        weights in prop::collection::vec((0..60_u32, 1..1000_u64), 0..400),
    ) {
        let mut sketch = Sketch::new(places);
        let room = (sketch.clients.capacity(), sketch.index.allocation_size(), sketch.heap.capacity());
        let mut truth = BTreeMap::new();
        for (number, weight) in weights {
            add(&mut sketch, number, weight);
            *truth.entry(number).or_insert(0) += weight;
            let counts: Vec<_> = sketch.heap.iter().map(|one| one.count).collect();
            prop_assert!((1..counts.len()).all(|at| counts[(at - 1) / 2] <= counts[at]));
        }
        for (at, count) in sketch.heap.iter().enumerate() {
            prop_assert_eq!(usize::from(sketch.clients[usize::from(count.place)].at), at);
        }
        let now = (sketch.clients.capacity(), sketch.index.allocation_size(), sketch.heap.capacity());
        prop_assert_eq!(now, room);
        let all: u64 = truth.values().sum();
        prop_assert!(sketch.floor() <= all / places as u64);
        let counts = sketch.report();
        prop_assert_eq!(counts.clients.len(), truth.len().min(places));
        assert_bounds(&counts, &truth)?;
    }

    #[test]
    fn sums_of_workers_keep_their_bounds(
        places in 1..20_usize,
        weights in prop::collection::vec((0..3_usize, 0..60_u32, 1..1000_u64), 0..400),
    ) {
        let mut sketches = [(); 3].map(|()| Sketch::new(places));
        let mut truth = BTreeMap::new();
        for (worker, number, weight) in weights {
            add(&mut sketches[worker], number, weight);
            *truth.entry(number).or_insert(0) += weight;
        }
        let parts = sketches.map(|sketch| sketch.report());
        let sum = Counts::sum(&parts);
        assert_bounds(&sum, &truth)?;
        let all: u64 = truth.values().sum();
        prop_assert!(sum.floor <= all / places as u64);
    }
}

#[test]
fn a_flood_of_forged_sources_hides_no_busy_client() {
    let mut sketch = Sketch::new(PLACES);
    let room = sketch.index.allocation_size();
    let flood = 2_000_000;
    let busy = 1..=10;
    for forged in 0..flood {
        add(&mut sketch, 0x0a00_0000 + forged, 1);
        // Each has a hundredth of the flood.
        if forged % 100 == 0 {
            busy.clone().for_each(|number| add(&mut sketch, number, 1));
        }
    }
    let counts = sketch.report();
    assert_eq!(counts.clients.len(), PLACES);
    assert_eq!(sketch.index.allocation_size(), room);
    let mut ranked = counts.clients.clone();
    ranked.sort_by_key(|counted| std::cmp::Reverse(counted.at_least));
    let first: Vec<_> = ranked
        .iter()
        .take(10)
        .map(|one| one.client.network)
        .collect();
    for number in busy {
        assert!(first.contains(&client(number).network), "{number}");
        let counted = counted(&counts, number).unwrap();
        assert!(counted.at_least + counted.uncertain >= u64::from(flood / 100));
        assert_eq!(counted.client, client(number));
    }
}

#[test]
fn few_datagrams_are_counted_exactly() {
    let start = Instant::now();
    let mut busiest = Busiest::since(start, start);
    let mut now = start;
    for turn in 0..1000 {
        // Two parts, whose time it has earned.
        now += Duration::from_micros(500);
        busiest.turn(now);
        busiest.passed(one(), || Some(client(turn % 2)));
        busiest.dropped(one(), || Some(client(2)));
        busiest.begun(client(3));
    }
    let report = busiest.report(now);
    let of = |measure: Measure, number| {
        let sum = Counts::sum(&report.by[measure as usize]);
        counted(&sum, number).map_or(0, |counted| counted.at_least)
    };
    let all = Measure::ALL;
    assert_eq!(all.map(|measure| of(measure, 0)), [500, 50_000, 0, 0]);
    assert_eq!(all.map(|measure| of(measure, 1)), [500, 50_000, 0, 0]);
    assert_eq!(all.map(|measure| of(measure, 2)), [0, 0, 0, 1000]);
    assert_eq!(all.map(|measure| of(measure, 3)), [0, 0, 1000, 0]);
}

/// Strictly in turns, which a sample of each 32nd would not see.
#[test]
fn a_sample_is_true_on_average_whatever_the_order() {
    let start = Instant::now();
    let mut busiest = Busiest::since(start, start);
    let turns = 800_000;
    for turn in 0..turns {
        let amount = Amount {
            datagrams: 1 + u64::from(turn % 4),
            bytes: 100,
        };
        busiest.passed(amount, || Some(client(turn % 4)));
    }
    let report = busiest.report(start);
    let of = |measure: Measure| Counts::sum(&report.by[measure as usize]);
    for number in 0..4 {
        let near = |measure, expected: u32| {
            let counted = counted(&of(measure), number).unwrap().at_least;
            let off = counted.abs_diff(expected.into());
            // Six standard deviations are less.
            assert!(off < u64::from(expected / 10), "{counted} for {expected}");
        };
        near(Measure::Datagrams, turns / 4 * (1 + number));
        near(Measure::Bytes, turns / 4 * 100);
    }
}

#[test]
fn what_is_older_than_the_window_is_forgotten() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let counts = |busiest: &mut Busiest, seconds| {
        let report = busiest.report(at(seconds));
        let sum = Counts::sum(&report.by[Measure::Sessions as usize]);
        let of = |number| counted(&sum, number).map_or(0, |counted| counted.at_least);
        (report.window.as_secs(), of(1), of(2))
    };
    let mut busiest = Busiest::since(start, start);
    busiest.begun(client(1));
    assert_eq!(counts(&mut busiest, 10), (10, 1, 0));
    busiest.turn(at(40));
    busiest.begun(client(2));
    assert_eq!(counts(&mut busiest, 59), (59, 1, 1));
    assert_eq!(counts(&mut busiest, 61), (31, 0, 1));
    assert_eq!(counts(&mut busiest, 95), (35, 0, 0));
    // It slept for some halves: both are old.
    busiest.begun(client(1));
    assert_eq!(counts(&mut busiest, 160), (40, 0, 0));
    // Or for one alone, whose beginning it missed.
    busiest.begun(client(2));
    assert_eq!(counts(&mut busiest, 209), (59, 0, 1));
}

#[test]
fn an_ipv6_client_is_its_network() {
    let mut settings = ListenerSettings::new(
        crate::listener::Listener::new("a", 1),
        crate::listener::Rules {
            idle_timeout: Duration::from_secs(1),
            responses: 0,
            requests: 0,
            amplification: None,
        },
    );
    let of = |settings: &ListenerSettings, ip: &str| Client::of(settings, ip.parse().unwrap());
    let same = |settings: &ListenerSettings| {
        of(settings, "2001:db8::1").network == of(settings, "2001:db8::2").network
    };
    assert!(same(&settings));
    settings.ipv6_prefix = 128;
    assert!(!same(&settings));
}
