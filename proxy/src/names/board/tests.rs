//! What is told of names, and to whom.

use std::sync::Arc;

use prometheus_client::registry::Registry;

use super::super::state::{Failure, Record};
use super::*;

fn name(host: &str) -> Name {
    let host = host.to_owned();
    Name::Dns { host, port: 53 }
}

fn settings() -> Resolver {
    crate::config::Config::from_flags(crate::config::Flags {
        listen: vec!["127.0.0.1:5300".into()],
        upstream: vec!["dns:a:53".into()],
        ..Default::default()
    })
    .unwrap()
    .resolver
}

fn asked(found: Option<&str>) -> Asked {
    let nothing = || {
        Err(Failure {
            outcome: Outcome::NoRecords,
            why: String::new(),
        })
    };
    let v4 = found.map_or_else(nothing, |ip| Ok(vec![ip.parse().unwrap()]));
    let record = Record {
        priority: 0,
        weight: 1,
        port: 53,
        host: "h".to_owned(),
    };
    Asked {
        records: Ok(vec![record]),
        left_out: 0,
        hosts: BTreeMap::from([("h".to_owned(), [v4, nothing()])]),
        ttl: None,
    }
}

fn note(board: &Board, of: &str, found: Option<&str>) {
    board.note(&name(of), asked(found), &settings(), Instant::now());
}

/// Whether the future is through at once.
async fn is_done(future: impl Future<Output = ()>) -> bool {
    tokio::time::timeout(Duration::from_millis(10), future)
        .await
        .is_ok()
}

#[tokio::test]
async fn a_change_is_told_once_and_not_lost() {
    let board = Board::default();
    board.follow(&BTreeSet::from([&name("a"), &name("b")]));
    assert!(!is_done(board.changed()).await);
    assert!(!is_done(board.all_asked()).await);
    note(&board, "a", Some("192.0.2.1"));
    note(&board, "a", Some("192.0.2.2"));
    assert!(is_done(board.changed()).await);
    assert!(!is_done(board.changed()).await);
    assert!(!is_done(board.all_asked()).await);
    note(&board, "b", None);
    assert!(is_done(board.all_asked()).await);
    assert!(!is_done(board.changed()).await);
    let answers = board.answers();
    assert_eq!(answers.len(), 1);
    assert_eq!(
        answers[&name("a")][0].address,
        "192.0.2.2:53".parse().unwrap()
    );
}

#[test]
fn names_that_stay_are_known_and_others_forgotten() {
    let board = Board::default();
    board.follow(&BTreeSet::from([&name("a"), &name("b")]));
    note(&board, "a", Some("192.0.2.1"));
    note(&board, "b", Some("192.0.2.2"));
    board.follow(&BTreeSet::from([&name("b"), &name("c")]));
    assert!(board.answers().keys().eq([&name("b")]));
    note(&board, "a", Some("192.0.2.1"));
    assert!(board.answers().keys().eq([&name("b")]));
}

#[test]
fn metrics_tell_of_each_name() {
    let board = Arc::new(Board::default());
    board.follow(&BTreeSet::from([&name("a"), &name("b")]));
    note(&board, "a", Some("192.0.2.1"));
    note(&board, "a", None);
    let mut registry = Registry::with_prefix("ppv2");
    registry.register_collector(Box::new(board));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    for line in [
        "# TYPE ppv2_name_lookups counter",
        "ppv2_name_lookups_total{name=\"dns:a:53\",result=\"answered\"} 1",
        "ppv2_name_lookups_total{name=\"dns:a:53\",result=\"no_records\"} 1",
        "ppv2_name_lookups_total{name=\"dns:b:53\",result=\"timeout\"} 0",
        "ppv2_name_changes_total{name=\"dns:a:53\"} 1",
        "ppv2_name_addresses{name=\"dns:a:53\"} 1",
        "ppv2_name_failing{name=\"dns:a:53\"} 1",
        "ppv2_name_failing{name=\"dns:b:53\"} 0",
    ] {
        assert!(
            text.lines().any(|l| l == line),
            "{line} is missing in\n{text}"
        );
    }
}
