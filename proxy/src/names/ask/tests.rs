//! What is known without asking, and how failures are told.

use std::str::FromStr;

use super::*;

#[test]
fn a_host_of_the_file_is_not_asked_for() {
    let mut hosts = Hosts::default();
    let file = b"192.0.2.1 one both\n2001:db8::2 Two. both # a comment\nnonsense\n";
    hosts.read_hosts_conf(&file[..]).unwrap();
    let resolver = Err(Failure::timeout(Duration::from_secs(1)));
    let made = Made { hosts, resolver };
    let written = |host: &str| {
        let found = made.written(&rr::Name::from_str(host).unwrap())?;
        Some(found.map(|found| found.map(|(addresses, _)| addresses)))
    };
    let ip = |text: &str| Ok(vec![text.parse().unwrap()]);
    let none = || Err(Failure::no_records(RecordType::A));
    assert_eq!(written("one"), Some([ip("192.0.2.1"), none()]));
    assert_eq!(written("two."), Some([none(), ip("2001:db8::2")]));
    assert_eq!(written("BOTH"), Some([ip("192.0.2.1"), ip("2001:db8::2")]));
    assert_eq!(written("three"), None);
}

#[test]
fn of_too_many_records_the_preferred_are_followed() {
    let record = |(priority, weight): (u16, u16)| Record {
        priority,
        weight,
        port: 53,
        host: format!("h{weight}"),
    };
    let mut records: Vec<_> = (0..70).map(|weight| record((2, weight))).collect();
    let preferred = [(1, 7), (1, 0)].map(record);
    records.extend(preferred.iter().chain(&preferred).cloned());
    assert_eq!(leave_out(&mut records), 8);
    let heaviest = (8..70).rev().map(|weight| record((2, weight)));
    let expected: Vec<_> = preferred.into_iter().chain(heaviest).collect();
    assert_eq!(records, expected);
    assert_eq!(leave_out(&mut records), 0);
}

#[test]
fn others_words_are_one_short_line() {
    let long = format!("a\nb\u{1b}[31m{}", "\u{fc}".repeat(1000));
    let failure = Failure::of(&NetError::from(long), RecordType::A);
    assert_eq!(failure.outcome, Outcome::Failed);
    assert!(failure.why.starts_with("ab[31m\u{fc}"), "{}", failure.why);
    assert_eq!(failure.why.chars().count(), MAX_REASON);
}
