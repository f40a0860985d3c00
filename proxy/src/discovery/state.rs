//! What is known of one name: the last answer, when to look it up again, and what to log.
//! No I/O; `now` is an argument.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ppv2_engine::upstream::MAX_WEIGHT;

use crate::config::{Answer, MAX_ADDRESSES, Name, Resolver, in_order};

/// Servers of a name that are kept: more than are used, so that it can be told how many
/// are left out. It bounds the memory of an answer.
pub(super) const MAX_KEPT: usize = 4 * MAX_ADDRESSES;

/// SRV records that are used, the preferred ones first. Each costs two more questions,
/// which a hostile DNS server could aim at others.
pub(super) const MAX_RECORDS: usize = 64;

/// Lookups in a row for which changed records wait until all their hosts have addresses;
/// then those with addresses are used.
const PATIENCE: u32 = 3;

/// Log lines about one name in a [`MINUTE`]: an answer that changes with each lookup would
/// fill the log.
const MAX_LINES: u32 = 4;
const MINUTE: Duration = Duration::from_secs(60);

/// The result of one lookup.
#[derive(Clone, Debug)]
pub(super) struct Found {
    /// The hosts that serve. For `dns:` it is the one in the name.
    pub(super) records: Result<Vec<Record>, Failure>,
    /// How many records there were beyond [`MAX_RECORDS`].
    pub(super) left_out: usize,
    /// By host: its IPv4 addresses, and its IPv6 addresses.
    pub(super) hosts: BTreeMap<String, [Result<Vec<IpAddr>, Failure>; 2]>,
    /// The lowest TTL of all answers.
    pub(super) ttl: Duration,
}

/// A host that serves, as an SRV record has it (RFC 2782).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// The lowest is preferred.
    pub(super) priority: u16,
    /// Its share among those of the same priority.
    pub(super) weight: u16,
    pub(super) port: u16,
    pub(super) host: String,
}

/// Why a question has no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) outcome: Outcome,
    pub(super) why: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// All questions were answered.
    Answered,
    /// There is no such name, or it has no such records.
    NoRecords,
    /// No DNS server answered in time.
    Timeout,
    /// Another failure.
    Failed,
}

impl Outcome {
    /// All of them, in their order, with their names in metrics.
    pub(super) const ALL: [(Self, &'static str); 4] = [
        (Self::Answered, "answered"),
        (Self::NoRecords, "no_records"),
        (Self::Timeout, "timeout"),
        (Self::Failed, "failed"),
    ];
}

impl Failure {
    pub(super) fn new(outcome: Outcome, why: impl Into<String>) -> Self {
        let why = why.into();
        Self { outcome, why }
    }
}

impl Found {
    /// These records, before their hosts are looked up.
    pub(super) fn of(records: Vec<Record>) -> Self {
        Self {
            records: Ok(records),
            left_out: 0,
            hosts: BTreeMap::new(),
            ttl: Duration::MAX,
        }
    }

    pub(super) fn failed(failure: Failure) -> Self {
        Self {
            records: Err(failure),
            ..Self::of(Vec::new())
        }
    }
}

/// What is known of a name.
#[derive(Clone, Debug, Default)]
pub(super) struct State {
    records: Vec<Record>,
    /// By host of the records: the last IPv4 addresses, and the last IPv6 addresses.
    hosts: BTreeMap<String, [Vec<IpAddr>; 2]>,
    /// The servers that the name resolves to, in the order in which they are used.
    pub(super) answers: Vec<Answer>,
    left_out: usize,
    /// Lookups in a row whose records differed and were not taken over.
    put_off: u32,
    /// Why the last lookup failed, if it did.
    pub(super) failing: Option<String>,
    /// Failed lookups in a row.
    failures: u32,
    /// When to look it up again; `None` for at once.
    pub(super) next_lookup: Option<Instant>,
    /// Lookups by outcome.
    pub(super) outcomes: [u64; Outcome::ALL.len()],
    /// How often the answer has changed.
    pub(super) changes: u64,
    logged: Logged,
}

/// What was logged last, and how many lines in the running minute.
#[derive(Clone, Debug, Default)]
struct Logged {
    failing: bool,
    servers: BTreeSet<SocketAddr>,
    minute: Option<Instant>,
    lines: u32,
}

impl Logged {
    /// Counts a line, unless there were enough.
    fn may_log(&mut self, now: Instant) -> bool {
        let is_running = |minute: Instant| now.saturating_duration_since(minute) < MINUTE;
        if !self.minute.is_some_and(is_running) {
            (self.minute, self.lines) = (Some(now), 0);
        }
        self.lines += 1;
        self.lines <= MAX_LINES
    }
}

impl State {
    /// Takes over the state of another lookup of the name, unless that found nothing and
    /// this has an answer. The counters are added up.
    pub(super) fn absorb(&mut self, other: Self) {
        let outcomes = std::array::from_fn(|n| self.outcomes[n] + other.outcomes[n]);
        let changes = self.changes + other.changes;
        if self.answers.is_empty() || !other.answers.is_empty() {
            *self = other;
        }
        (self.outcomes, self.changes) = (outcomes, changes);
    }

    /// Takes over the result of a lookup. Returns whether the answer has changed.
    pub(super) fn note(&mut self, found: Found, settings: &Resolver, now: Instant) -> bool {
        let ttl = found.ttl;
        let failure = self.merge(found);
        let outcome = failure.as_ref().map_or(Outcome::Answered, |f| f.outcome);
        self.outcomes[outcome as usize] += 1;
        self.failing = failure.map(|failure| failure.why);
        self.failures = match self.failing {
            Some(_) => self.failures.saturating_add(1),
            None => 0,
        };
        self.next_lookup = Some(now + self.pause(ttl, settings));
        let answers = self.expanded();
        let changed = answers != self.answers;
        self.changes += u64::from(changed);
        self.answers = answers;
        changed
    }

    /// Takes over what was answered, and returns what failed. A host with addresses of
    /// one family and none of the other does not fail; one without any addresses keeps
    /// those that it had. Changed records wait until their hosts have addresses.
    fn merge(&mut self, found: Found) -> Option<Failure> {
        let mut worst: Option<Failure> = None;
        let mut note = |failure: Failure| match &worst {
            // A missing answer says more than missing records.
            Some(known) if known.outcome != Outcome::NoRecords => {}
            _ => worst = Some(failure),
        };
        let mut without_addresses = BTreeSet::new();
        for (host, families) in found.hosts {
            let has_some = families.iter().any(Result::is_ok);
            let has_none = |found: &Result<_, Failure>| {
                found
                    .as_ref()
                    .is_err_and(|failure| failure.outcome == Outcome::NoRecords)
            };
            if families.iter().all(has_none) {
                without_addresses.insert(host.clone());
            }
            let known = self.hosts.entry(host).or_default();
            for (known, found) in known.iter_mut().zip(families) {
                match found {
                    Ok(addresses) => *known = addresses,
                    Err(failure) if has_some && failure.outcome == Outcome::NoRecords => {
                        known.clear();
                    }
                    Err(failure) => note(failure),
                }
            }
        }
        match found.records {
            Ok(records) if self.may_use(&records, &without_addresses) => {
                (self.records, self.left_out) = (records, found.left_out);
                self.put_off = 0;
            }
            Ok(_) => self.put_off = self.put_off.saturating_add(1),
            Err(failure) => note(failure),
        }
        let used: BTreeSet<_> = self.records.iter().map(|record| &record.host).collect();
        self.hosts.retain(|host, _| used.contains(host));
        worst
    }

    /// Whether these records may replace the former ones: some have addresses, and all
    /// the others are known to have none or were waited for long enough.
    fn may_use(&self, records: &[Record], without_addresses: &BTreeSet<String>) -> bool {
        let has_addresses = |record: &Record| {
            let families = self.hosts.get(&record.host);
            families.is_some_and(|families| families.iter().any(|known| !known.is_empty()))
        };
        let is_settled =
            |record: &Record| has_addresses(record) || without_addresses.contains(&record.host);
        records == self.records
            || self.answers.is_empty()
            || records.iter().any(has_addresses)
                && (self.put_off >= PATIENCE || records.iter().all(is_settled))
    }

    fn expanded(&self) -> Vec<Answer> {
        let preferred = self.records.iter().map(|record| record.priority).min();
        let answers = self.records.iter().flat_map(|record| {
            let same = self
                .records
                .iter()
                .filter(|other| other.priority == record.priority);
            let heaviest = same.map(|record| record.weight).max();
            let weight = scaled(record.weight, heaviest.unwrap_or_default());
            let backup = Some(record.priority) != preferred;
            let hosts = self.hosts.get(&record.host);
            hosts.into_iter().flatten().flatten().map(move |ip| Answer {
                address: SocketAddr::new(*ip, record.port),
                weight,
                backup,
            })
        });
        let mut answers = in_order(answers.collect());
        answers.truncate(MAX_KEPT);
        answers
    }

    fn pause(&self, ttl: Duration, settings: &Resolver) -> Duration {
        let ttl = ttl.clamp(settings.min_ttl(), *settings.max_ttl);
        let Some(repeated) = self.failures.checked_sub(1) else {
            return ttl;
        };
        let retry = settings.retry.saturating_mul(2u32.saturating_pow(repeated));
        retry.min(Resolver::MAX_RETRY).min(ttl)
    }

    /// Logs what has changed since the last call, and returns the number of lines. What
    /// the bound on lines forbids is logged after a later lookup, if it still holds.
    pub(super) fn log(&mut self, name: &Name, now: Instant) -> usize {
        let mut lines = 0;
        let (servers, failing) = (self.answers.len(), self.failing.is_some());
        if failing != self.logged.failing && self.logged.may_log(now) {
            self.logged.failing = failing;
            lines += 1;
            match &self.failing {
                Some(why) => tracing::warn!(
                    %name, why, servers,
                    "name does not resolve; its last answer is kept and it is looked up again"
                ),
                None => tracing::info!(%name, servers, "name resolves again"),
            }
        }
        let now_used: BTreeSet<_> = self.answers.iter().map(|answer| answer.address).collect();
        if now_used != self.logged.servers && self.logged.may_log(now) {
            lines += 1;
            let added = now_used.difference(&self.logged.servers).count();
            let removed = self.logged.servers.difference(&now_used).count();
            match self.left_out {
                0 => tracing::info!(%name, servers, added, removed, "servers of name changed"),
                left_out => tracing::warn!(
                    %name, servers, added, removed, left_out,
                    "servers of name changed; it has more SRV records than are used"
                ),
            }
            self.logged.servers = now_used;
        }
        lines
    }
}

/// An SRV weight, from 0 to 65,535, as one from 1 to [`MAX_WEIGHT`], where `heaviest` is
/// the highest beside it. Low ones stay as they are.
fn scaled(weight: u16, heaviest: u16) -> u16 {
    let max = u32::from(MAX_WEIGHT);
    let scaled = u32::from(weight) * max / u32::from(heaviest).max(max);
    u16::try_from(scaled).unwrap_or(MAX_WEIGHT).max(1)
}

#[cfg(test)]
mod tests;
