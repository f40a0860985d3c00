//! Sequences of lookups of one name.

use proptest::prelude::*;

use super::*;

fn settings() -> Resolver {
    Resolver::default()
}

fn label(outcome: Outcome) -> &'static str {
    Outcome::ALL[outcome as usize].1
}

fn failure(outcome: Outcome) -> Failure {
    Failure::new(outcome, label(outcome))
}

fn ips(addresses: &[&str]) -> Result<Vec<IpAddr>, Failure> {
    match addresses {
        [] => Err(failure(Outcome::NoRecords)),
        addresses => Ok(addresses.iter().map(|ip| ip.parse().unwrap()).collect()),
    }
}

fn record(priority: u16, weight: u16, host: &str) -> Record {
    Record {
        priority,
        weight,
        port: 53,
        host: host.to_owned(),
    }
}

/// Takes over a lookup; returns whether the answer changed, and the seconds until the next.
fn note(state: &mut State, found: Found, now: Instant) -> (bool, u64) {
    let changed = state.note(found, &settings(), now);
    let pause = state.next_lookup.unwrap() - now;
    (changed, pause.as_secs())
}

type Families = [Result<Vec<IpAddr>, Failure>; 2];

fn lookup(records: &[Record], hosts: Vec<(&str, Families)>) -> Found {
    let hosts = hosts.into_iter();
    Found {
        records: Ok(records.to_vec()),
        left_out: 0,
        hosts: hosts
            .map(|(host, found)| (host.to_owned(), found))
            .collect(),
        ttl: Duration::from_secs(30),
    }
}

/// A lookup of one host.
fn host(v4: Result<Vec<IpAddr>, Failure>, v6: Result<Vec<IpAddr>, Failure>) -> Found {
    lookup(&[record(0, 1, "a")], vec![("a", [v4, v6])])
}

fn failed() -> Found {
    let timeout = || Err(failure(Outcome::Timeout));
    Found {
        ttl: Duration::MAX,
        ..host(timeout(), timeout())
    }
}

fn addresses(state: &State) -> Vec<String> {
    let answers = state.answers.iter();
    answers
        .map(|answer| answer.address.ip().to_string())
        .collect()
}

#[test]
fn the_next_lookup_follows_the_ttl_within_bounds() {
    for (ttl, expected) in [(0, 5), (4, 5), (30, 30), (86_400, 300)] {
        let found = Found {
            ttl: Duration::from_secs(ttl),
            ..host(ips(&["192.0.2.1"]), ips(&[]))
        };
        let noted = note(&mut State::default(), found, Instant::now());
        assert_eq!(noted, (true, expected));
    }
}

#[test]
fn a_failure_keeps_the_answer_and_retries_back_off() {
    let (mut state, now) = (State::default(), Instant::now());
    let mut pauses = || {
        let pause = |_| note(&mut state, failed(), now).1;
        (0..8).map(pause).collect::<Vec<_>>()
    };
    assert_eq!(pauses(), [1, 2, 4, 8, 16, 32, 60, 60]);
    let good = || host(ips(&["192.0.2.1"]), ips(&["2001:db8::1"]));
    assert!(state.note(good(), &settings(), now));
    assert_eq!(state.failing.as_deref(), None);
    assert_eq!(addresses(&state), ["192.0.2.1", "2001:db8::1"]);
    for found in [
        failed(),
        host(ips(&[]), ips(&[])),
        Found {
            records: Err(failure(Outcome::Failed)),
            ..lookup(&[], Vec::new())
        },
    ] {
        assert!(!state.note(found, &settings(), now));
        assert!(state.failing.is_some());
        assert_eq!(addresses(&state), ["192.0.2.1", "2001:db8::1"]);
    }
    let counts = state.outcomes;
    assert_eq!((counts, state.changes), ([1, 1, 9, 1], 1));
    for _ in 0..100 {
        state.note(failed(), &settings(), now);
    }
    assert!(!state.note(good(), &settings(), now));
    assert_eq!(note(&mut state, failed(), now).1, 1);
}

#[test]
fn addresses_of_one_family_may_go_while_the_other_stays() {
    let (mut state, now) = (State::default(), Instant::now());
    let mut note = |v4, v6| {
        let (_, pause) = note(&mut state, host(v4, v6), now);
        (addresses(&state), state.failing.is_some(), pause)
    };
    let both = ["192.0.2.1", "2001:db8::1"].map(str::to_owned).to_vec();
    let v6 = || ips(&["2001:db8::1"]);
    assert_eq!(note(ips(&["192.0.2.1"]), v6()), (both.clone(), false, 30));
    // What became of it is unknown.
    let broken = || Err(failure(Outcome::Failed));
    assert_eq!(note(broken(), v6()), (both.clone(), true, 1));
    assert_eq!(note(ips(&[]), broken()), (both.clone(), true, 2));
    // It is gone.
    assert_eq!(note(ips(&[]), v6()), (both[1..].to_vec(), false, 30));
    assert_eq!(note(broken(), broken()), (both[1..].to_vec(), true, 1));
}

#[test]
fn srv_records_become_primaries_and_backups_with_weights() {
    let mut state = State::default();
    let records = [
        record(10, 0, "a"),
        record(10, 65_535, "b"),
        record(10, 300, "gone"),
        record(20, 3, "c"),
        record(20, 0, "d"),
        record(30, 1, "a"),
    ];
    let one = |ip| [ips(&[ip]), ips(&[])];
    let hosts = vec![
        ("a", one("192.0.2.1")),
        ("b", [ips(&["192.0.2.2"]), ips(&["2001:db8::2"])]),
        ("c", one("192.0.2.3")),
        ("d", one("192.0.2.4")),
        ("gone", [ips(&[]), ips(&[])]),
    ];
    state.note(lookup(&records, hosts), &settings(), Instant::now());
    let answers = state.answers.iter();
    let answers: Vec<_> = answers
        .map(|a| (a.address.ip().to_string(), a.weight, a.backup))
        .collect();
    let expected = [
        ("192.0.2.1", 1, false),
        ("192.0.2.2", 256, false),
        ("2001:db8::2", 256, false),
        ("192.0.2.3", 3, true),
        ("192.0.2.4", 1, true),
    ];
    assert_eq!(
        answers,
        expected.map(|(ip, weight, backup)| (ip.to_owned(), weight, backup))
    );
    assert_eq!(state.failing.as_deref(), Some("no_records"));
    // Hosts that no record names any longer are forgotten.
    let fewer = lookup(&records[..1], vec![("a", one("192.0.2.9"))]);
    state.note(fewer, &settings(), Instant::now());
    assert_eq!(addresses(&state), ["192.0.2.9"]);
    assert_eq!(state.hosts.len(), 1);
}

#[test]
fn records_without_any_addresses_do_not_replace_the_answer() {
    let now = Instant::now();
    let one = |ip| [ips(&[ip]), ips(&[])];
    for outcome in [Outcome::NoRecords, Outcome::Timeout, Outcome::Failed] {
        let mut state = State::default();
        let old = lookup(&[record(1, 1, "old")], vec![("old", one("192.0.2.1"))]);
        state.note(old, &settings(), now);
        let fails = || [Err(failure(outcome)), Err(failure(outcome))];
        for _ in 0..10 {
            let new = lookup(&[record(1, 1, "new")], vec![("new", fails())]);
            assert!(!state.note(new, &settings(), now));
            assert_eq!(addresses(&state), ["192.0.2.1"]);
            assert_eq!(state.failing.as_deref(), Some(label(outcome)));
        }
        let new = lookup(&[record(1, 1, "new")], vec![("new", one("192.0.2.2"))]);
        assert!(state.note(new, &settings(), now));
        assert_eq!(addresses(&state), ["192.0.2.2"]);
        assert_eq!(state.failing.as_deref(), None);
    }
}

#[test]
fn changed_records_wait_for_failed_hosts_but_not_for_long() {
    let (mut state, now) = (State::default(), Instant::now());
    let one = |ip| [ips(&[ip]), ips(&[])];
    let old = lookup(&[record(1, 1, "old")], vec![("old", one("192.0.2.1"))]);
    state.note(old.clone(), &settings(), now);
    let records = [record(1, 1, "first"), record(2, 1, "second")];
    let new = |first| {
        let hosts = vec![("first", first), ("second", one("192.0.2.3"))];
        lookup(&records, hosts)
    };
    let fails = || [Err(failure(Outcome::Failed)), ips(&[])];
    for turn in 1..=3 {
        assert!(!state.note(new(fails()), &settings(), now));
        assert_eq!(
            (addresses(&state).as_slice(), turn),
            (&["192.0.2.1".to_owned()][..], turn)
        );
    }
    assert!(state.note(new(fails()), &settings(), now));
    assert_eq!(addresses(&state), ["192.0.2.3"]);
    state.note(new(one("192.0.2.2")), &settings(), now);
    assert_eq!(addresses(&state), ["192.0.2.2", "192.0.2.3"]);
    // A host that is not there is not waited for.
    state.note(old, &settings(), now);
    assert_eq!(addresses(&state), ["192.0.2.1"]);
    state.note(new([ips(&[]), ips(&[])]), &settings(), now);
    assert_eq!(addresses(&state), ["192.0.2.3"]);
}

#[test]
fn weights_keep_their_proportions() {
    assert_eq!(scaled(0, 0), 1);
    assert_eq!(scaled(256, 256), 256);
    assert_eq!(scaled(100, 200), 100);
    assert_eq!(scaled(30_000, 60_000), 128);
    assert_eq!(scaled(u16::MAX, u16::MAX), 256);
    assert_eq!(scaled(1, u16::MAX), 1);
}

fn name() -> Name {
    let host = "a".to_owned();
    let ports = ppv2_engine::address::PortRange::single(53);
    Name::Dns { host, ports }
}

#[test]
fn each_change_is_logged_once() {
    let (mut state, start) = (State::default(), Instant::now());
    let mut lines = |second, found| {
        let now = start + Duration::from_secs(second);
        state.note(found, &settings(), now);
        state.log(&name(), now)
    };
    let good = |texts: &[&str]| host(ips(texts), ips(&[]));
    assert_eq!(lines(0, failed()), 1);
    assert_eq!(lines(1, failed()), 0);
    // It resolves again, and to a server.
    assert_eq!(lines(3, good(&["192.0.2.1"])), 2);
    assert_eq!(lines(4, good(&["192.0.2.1"])), 0);
    assert_eq!(lines(5, good(&["192.0.2.2", "192.0.2.3"])), 1);
    // The minute has had its lines.
    assert_eq!(lines(6, good(&["192.0.2.2"])), 0);
    assert_eq!(lines(7, failed()), 0);
    // The failure, and that there is one server less.
    assert_eq!(lines(60, failed()), 2);
    assert_eq!(lines(63, good(&["192.0.2.2"])), 1);
}

#[test]
fn an_answer_that_changes_each_second_does_not_fill_the_log() {
    let (mut state, start) = (State::default(), Instant::now());
    let lines: usize = (0..3600)
        .map(|second| {
            let ip = format!("10.0.{}.{}", second / 256, second % 256);
            let found = match second % 3 {
                0 => failed(),
                _ => host(ips(&[&ip]), ips(&[])),
            };
            let now = start + Duration::from_secs(second);
            state.note(found, &settings(), now);
            assert!(state.answers.len() <= 1 && state.hosts.len() == 1);
            state.log(&name(), now)
        })
        .sum();
    assert!(lines <= 4 * 60, "{lines} lines in an hour");
    assert_eq!(state.changes, 2400);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// Any answers in any order: what is known stays bounded and consistent, and an answer is never
    /// lost.
    #[test]
    fn any_sequence_of_lookups_keeps_a_bounded_answer(
        lookups in prop::collection::vec(
            (
                prop::option::of(prop::collection::vec((0..3u16, any::<u16>(), 0..5u8), 0..6)),
                prop::collection::vec(prop::collection::vec(any::<u16>(), 0..40), 10),
                prop::option::of(any::<u32>()),
                0..4usize,
            ),
            1..20,
        ),
    ) {
        let (mut state, settings, mut now) = (State::default(), settings(), Instant::now());
        for (records, found, ttl, outcome) in lookups {
            let fails = |outcome: usize| Err(failure(Outcome::ALL[outcome].0));
            let records = records.map(|records| {
                let records = records.into_iter();
                records.map(|(priority, weight, host)| record(priority, weight, &host.to_string())).collect::<Vec<_>>()
            });
            let hosts = records.iter().flatten().map(|record| {
                let number: usize = record.host.parse().unwrap();
                let families = [2 * number, 2 * number + 1].map(|place| match found[place].as_slice() {
                    [] => fails(1 + outcome % 3),
                    some => Ok(some.iter().map(|n| {
                        let [high, low] = n.to_be_bytes();
                        IpAddr::from([10, u8::try_from(place % 2).unwrap(), high, low])
                    }).collect()),
                });
                (record.host.clone(), families)
            }).collect();
            let found = Found {
                records: records.ok_or_else(|| failure(Outcome::Failed)),
                left_out: 0,
                hosts,
                ttl: ttl.map_or(Duration::MAX, |ttl| Duration::from_secs(ttl.into())),
            };
            let before = state.answers.clone();
            let changed = state.note(found, &settings, now);
            let pause = state.next_lookup.unwrap() - now;
            now += pause;
            prop_assert!(pause >= *settings.retry && pause <= *settings.max_ttl);
            prop_assert_eq!(changed, before != state.answers);
            prop_assert!(before.is_empty() || !state.answers.is_empty());
            prop_assert!(state.answers.len() <= MAX_KEPT);
            let weights = state.answers.iter().map(|answer| answer.weight);
            prop_assert!(weights.clone().all(|weight| (1..=MAX_WEIGHT).contains(&weight)));
            let distinct: BTreeSet<_> = state.answers.iter().map(|answer| answer.address).collect();
            prop_assert_eq!(distinct.len(), weights.count());
            prop_assert!(state.hosts.keys().all(|host| state.records.iter().any(|r| r.host == *host)));
        }
    }
}
