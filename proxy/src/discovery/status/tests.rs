//! What is known of several names.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use prometheus_client::registry::Registry;

use super::super::state::{Failure, Record};
use super::*;

fn name(host: &str) -> Name {
    let host = host.to_owned();
    let ports = ppv2_engine::address::PortRange::single(53);
    Name::Dns { host, ports }
}

fn settings() -> Resolver {
    Resolver::default()
}

fn lookup(found: Option<&str>) -> Found {
    let nothing = || Err(Failure::new(Outcome::NoRecords, ""));
    let v4 = found.map_or_else(nothing, |ip| Ok(vec![ip.parse().unwrap()]));
    let record = Record {
        priority: 0,
        weight: 1,
        port: 53,
        host: "h".to_owned(),
    };
    Found {
        records: Ok(vec![record]),
        left_out: 0,
        hosts: BTreeMap::from([("h".to_owned(), [v4, nothing()])]),
        ttl: Duration::MAX,
    }
}

fn note(status: &Status, of: &str, found: Option<&str>) {
    status.note(&name(of), lookup(found), &settings());
}

fn reconfigure(status: &Status, names: [&str; 2]) {
    let names = names.map(name);
    status.reconfigure(&names.iter().collect(), BTreeMap::new());
}

/// Whether the future completes at once.
fn is_done(future: impl Future<Output = ()>) -> bool {
    future.now_or_never().is_some()
}

#[test]
fn a_change_is_notified_once_and_not_lost() {
    let status = Status::default();
    reconfigure(&status, ["a", "b"]);
    assert!(is_done(status.changed()));
    note(&status, "a", Some("192.0.2.1"));
    note(&status, "a", Some("192.0.2.2"));
    assert!(is_done(status.changed()));
    assert!(!is_done(status.changed()));
    note(&status, "b", None);
    assert!(!is_done(status.changed()));
    let answers = status.answers();
    assert_eq!(answers.len(), 1);
    assert_eq!(
        answers[&name("a")][0].address,
        "192.0.2.2:53".parse().unwrap()
    );
}

#[test]
fn names_that_stay_are_kept_and_others_forgotten() {
    let status = Status::default();
    reconfigure(&status, ["a", "b"]);
    note(&status, "a", Some("192.0.2.1"));
    note(&status, "b", Some("192.0.2.2"));
    reconfigure(&status, ["b", "c"]);
    assert!(status.answers().keys().eq([&name("b")]));
    note(&status, "a", Some("192.0.2.1"));
    assert!(status.answers().keys().eq([&name("b")]));
}

#[test]
fn metrics_show_each_name() {
    let status = Arc::new(Status::default());
    reconfigure(&status, ["a", "b"]);
    note(&status, "a", Some("192.0.2.1"));
    note(&status, "a", None);
    let mut registry = Registry::with_prefix("ppv2");
    registry.register_collector(Box::new(status));
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
