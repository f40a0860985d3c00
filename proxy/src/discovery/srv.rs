//! `srv:` names: the hosts and ports of SRV records (RFC 2782).

use std::cmp::Reverse;
use std::collections::BTreeMap;

use hickory_resolver::proto::rr::{RData, RecordType};

use super::Discovery;
use super::dns::{Resolver, parsed};
use super::state::{Failure, Found, MAX_RECORDS, Outcome, Record};

pub(super) struct Srv<'a>(pub(super) &'a Resolver, pub(super) &'a str);

impl Discovery for Srv<'_> {
    async fn discover(&self) -> Found {
        let Self(resolver, name) = *self;
        let pick = |data: &RData| {
            let RData::SRV(srv) = data else { return None };
            Some(srv.clone())
        };
        let records = match parsed(name) {
            Ok(name) => resolver.question(name, RecordType::SRV, pick).await,
            Err(failure) => Err(failure),
        };
        let (records, ttl) = match records {
            Ok(answered) => answered,
            Err(failure) => return Found::failed(failure),
        };
        let mut hosts = BTreeMap::new();
        // A target of "." means that there is no such service.
        let records = records.into_iter().filter(|srv| !srv.target.is_root());
        let records = records.map(|srv| {
            let host = srv.target.to_ascii().to_lowercase();
            hosts.insert(host.clone(), srv.target);
            Record {
                priority: srv.priority,
                weight: srv.weight,
                port: srv.port,
                host,
            }
        });
        let mut records: Vec<_> = records.collect();
        if records.is_empty() {
            let why = "its SRV records say that there is no such service";
            return Found::failed(Failure::new(Outcome::NoRecords, why));
        }
        let left_out = leave_out(&mut records);
        hosts.retain(|host, _| records.iter().any(|record| record.host == *host));
        let mut found = Found::of(records);
        (found.left_out, found.ttl) = (left_out, ttl);
        resolver.find_addresses(hosts, &mut found).await;
        for (host, families) in &mut found.hosts {
            for failure in families.iter_mut().filter_map(|found| found.as_mut().err()) {
                failure.why = format!("{host}: {}", failure.why);
            }
        }
        found
    }
}

/// Keeps the preferred records, [`MAX_RECORDS`] of them, and returns how many it left out.
fn leave_out(records: &mut Vec<Record>) -> usize {
    records.sort_by_cached_key(|record| {
        let host = record.host.clone();
        (record.priority, Reverse(record.weight), host, record.port)
    });
    records.dedup();
    let left_out = records.len().saturating_sub(MAX_RECORDS);
    records.truncate(MAX_RECORDS);
    left_out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_too_many_records_the_preferred_are_used() {
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
}
