//! What is known of a name: what a lookup does to its answer, when to ask again, and
//! what the log is told. No I/O; `now` is an argument.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use crate::config::{Answer, MAX_ADDRESSES, Resolver, in_order};
use ppv2_engine::upstream::MAX_WEIGHT;

/// Servers of a name that are remembered: more than are used, so that it can be told
/// how many are left out, and a bound on what an answer takes.
pub(super) const MAX_KEPT: usize = 4 * MAX_ADDRESSES;

/// Records of `srv:` that are followed, those to be preferred first. Each costs two
/// more questions, which whoever answers could have us ask of anybody.
pub(super) const MAX_RECORDS: usize = 64;

/// Lookups in a row that other records wait for, until all their hosts have addresses;
/// then those that have some are enough.
const PATIENCE: u32 = 3;

/// Lines in the log of one kind, for one name, in so long a time: an answer that
/// changes with each lookup would fill it.
const LINES: u32 = 2;
const MINUTE: Duration = Duration::from_secs(60);

/// What came of one lookup.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    /// Which hosts serve. Of `dns:` it is the one, without asking.
    pub(super) records: Result<Vec<Record>, Failure>,
    /// How many records there were beyond [`MAX_RECORDS`].
    pub(super) left_out: usize,
    /// By host: its IPv4 addresses, and its IPv6 ones.
    pub(super) hosts: BTreeMap<String, [Result<Vec<IpAddr>, Failure>; 2]>,
    /// The least TTL of all that was answered.
    pub(super) ttl: Option<Duration>,
}

/// A host that serves, as an SRV record says it (RFC 2782).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// The lowest there is, is preferred.
    pub(super) priority: u16,
    /// Its share beside those of the same priority.
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

/// How a lookup went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// All questions were answered.
    Answered,
    /// There is no such name, or it has no such records.
    NoRecords,
    /// Nobody answered in time.
    Timeout,
    /// Another failure.
    Failed,
}

impl Outcome {
    pub(super) const ALL: [Self; 4] =
        [Self::Answered, Self::NoRecords, Self::Timeout, Self::Failed];

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::NoRecords => "no_records",
            Self::Timeout => "timeout",
            Self::Failed => "failed",
        }
    }
}

/// What is to be done after a lookup.
#[derive(Debug)]
pub(super) struct Noted {
    /// Whether the answer is another.
    pub(super) changed: bool,
    /// Time until the next.
    pub(super) pause: Duration,
    /// What the log is told.
    pub(super) sayings: Vec<Saying>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Saying {
    /// The name resolves no longer, or in part alone; so many servers are kept.
    Failing { why: String, kept: usize },
    /// It resolves again.
    Recovered,
    /// It leads to other servers than the log was last told.
    Changed {
        added: usize,
        removed: usize,
        /// Records that are not followed.
        left_out: usize,
    },
}

/// What is known of a name.
#[derive(Clone, Debug, Default)]
pub(super) struct State {
    records: Vec<Record>,
    /// By host of the records: the last IPv4 addresses, and the last IPv6 ones.
    hosts: BTreeMap<String, [Vec<IpAddr>; 2]>,
    answers: Vec<Answer>,
    left_out: usize,
    /// Lookups in a row whose records were others and not taken over.
    put_off: u32,
    /// Why the last lookup failed, if it did.
    failing: Option<String>,
    /// Lookups in a row that did.
    failures: u32,
    /// When to ask again; none for at once.
    ask_at: Option<Instant>,
    outcomes: [u64; Outcome::ALL.len()],
    changes: u64,
    told: Told,
}

/// What the log was told last.
#[derive(Clone, Debug, Default)]
struct Told {
    failing: bool,
    servers: BTreeSet<SocketAddr>,
    situations: Lines,
    changes: Lines,
}

/// Lines of a kind within the running minute.
#[derive(Clone, Copy, Debug, Default)]
struct Lines {
    since: Option<Instant>,
    count: u32,
}

impl Lines {
    /// Whether there may be another, which is then counted.
    fn take(&mut self, now: Instant) -> bool {
        let runs = |since: Instant| now.saturating_duration_since(since) < MINUTE;
        if !self.since.is_some_and(runs) {
            *self = Self {
                since: Some(now),
                count: 0,
            };
        }
        self.count += 1;
        self.count <= LINES
    }
}

impl State {
    /// What the name leads to, in the order in which it is used.
    pub(super) fn answers(&self) -> &[Answer] {
        &self.answers
    }

    /// Why the last lookup failed, if it did.
    pub(super) fn failing(&self) -> Option<&str> {
        self.failing.as_deref()
    }

    /// Whether it has been asked for.
    pub(super) fn is_asked(&self) -> bool {
        self.outcomes.iter().any(|count| *count > 0)
    }

    /// When to ask again; none for at once.
    pub(super) fn ask_at(&self) -> Option<Instant> {
        self.ask_at
    }

    /// Has it asked for again at once, since others are asked.
    pub(super) fn ask_anew(&mut self) {
        self.ask_at = None;
    }

    /// Takes over what another has found out of the same name, unless that leads
    /// nowhere and this does not.
    pub(super) fn absorb(&mut self, other: Self) {
        let outcomes = std::array::from_fn(|n| self.outcomes[n] + other.outcomes[n]);
        let changes = self.changes + other.changes;
        let leads_nowhere = other.answers.is_empty();
        if other.is_asked() && (self.answers.is_empty() || !leads_nowhere) {
            *self = other;
        }
        (self.outcomes, self.changes) = (outcomes, changes);
    }

    /// How many lookups went so.
    pub(super) fn outcomes(&self, outcome: Outcome) -> u64 {
        self.outcomes[outcome as usize]
    }

    /// How often the answer has changed.
    pub(super) fn changes(&self) -> u64 {
        self.changes
    }

    /// Notes what came of a lookup.
    pub(super) fn note(&mut self, asked: Asked, settings: &Resolver, now: Instant) -> Noted {
        let ttl = asked.ttl;
        let failure = self.merge(asked);
        let outcome = failure.as_ref().map_or(Outcome::Answered, |f| f.outcome);
        self.outcomes[outcome as usize] += 1;
        self.failing = failure.map(|failure| failure.why);
        self.failures = match self.failing {
            Some(_) => self.failures.saturating_add(1),
            None => 0,
        };
        let answers = self.expanded();
        let changed = answers != self.answers;
        if changed {
            self.answers = answers;
            self.changes += 1;
        }
        let pause = self.pause(ttl, settings);
        self.ask_at = Some(now + pause);
        Noted {
            changed,
            pause,
            sayings: self.sayings(now),
        }
    }

    /// Takes over what was answered, and returns what failed. A host with addresses
    /// of one family and none of the other is not failing; one that has no more at
    /// all keeps those that it had. Other records wait until their hosts have addresses.
    fn merge(&mut self, asked: Asked) -> Option<Failure> {
        let mut worst: Option<Failure> = None;
        let mut note = |failure: Failure| match &worst {
            // That nobody answered says more than that there is nothing.
            Some(known) if known.outcome != Outcome::NoRecords => {}
            _ => worst = Some(failure),
        };
        // Hosts that are known to have no addresses, or not to be.
        let mut absent = BTreeSet::new();
        for (host, families) in asked.hosts {
            let has_some = families.iter().any(Result::is_ok);
            let has_none = |found: &Result<_, Failure>| {
                let failure = found.as_ref().err();
                failure.is_some_and(|failure| failure.outcome == Outcome::NoRecords)
            };
            if families.iter().all(has_none) {
                absent.insert(host.clone());
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
        match asked.records {
            Ok(records) if self.may_go_by(&records, &absent) => {
                (self.records, self.left_out) = (records, asked.left_out);
                self.put_off = 0;
            }
            Ok(_) => self.put_off = self.put_off.saturating_add(1),
            Err(failure) => note(failure),
        }
        let used: BTreeSet<_> = self.records.iter().map(|record| &record.host).collect();
        self.hosts.retain(|host, _| used.contains(host));
        worst
    }

    /// Whether these records may take the place of those before: they lead somewhere,
    /// and nothing more is to be learnt of their hosts soon.
    fn may_go_by(&self, records: &[Record], absent: &BTreeSet<String>) -> bool {
        let has_addresses = |record: &Record| {
            let families = self.hosts.get(&record.host);
            families.is_some_and(|families| families.iter().any(|known| !known.is_empty()))
        };
        let is_settled = |record: &Record| has_addresses(record) || absent.contains(&record.host);
        let leads_somewhere = records.iter().any(has_addresses);
        // Who leads nowhere yet has nothing to lose.
        records == self.records
            || self.answers.is_empty()
            || leads_somewhere && (self.put_off >= PATIENCE || records.iter().all(is_settled))
    }

    fn expanded(&self) -> Vec<Answer> {
        let preferred = self.records.iter().map(|record| record.priority).min();
        let answers = self.records.iter().flat_map(|record| {
            let same = self
                .records
                .iter()
                .filter(|r| r.priority == record.priority);
            let most = same.map(|record| record.weight).max();
            let weight = scaled(record.weight, most.unwrap_or_default());
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

    fn pause(&self, ttl: Option<Duration>, settings: &Resolver) -> Duration {
        let until_old = ttl.map(|ttl| ttl.clamp(settings.min_ttl, settings.max_ttl));
        if self.failures == 0 {
            return until_old.unwrap_or(settings.min_ttl);
        }
        let doubled = 2u32.saturating_pow(self.failures - 1);
        let retry = settings.retry.saturating_mul(doubled);
        let retry = retry.min(Resolver::MAX_RETRY);
        until_old.map_or(retry, |until_old| until_old.min(retry))
    }

    /// What the log has not been told yet and may be now; the rest is, with a later
    /// lookup, if it still holds.
    fn sayings(&mut self, now: Instant) -> Vec<Saying> {
        let mut sayings = Vec::new();
        let failing = self.failing.is_some();
        if failing != self.told.failing && self.told.situations.take(now) {
            self.told.failing = failing;
            sayings.push(match &self.failing {
                Some(why) => Saying::Failing {
                    why: why.clone(),
                    kept: self.answers.len(),
                },
                None => Saying::Recovered,
            });
        }
        let servers: BTreeSet<_> = self.answers.iter().map(|answer| answer.address).collect();
        if servers != self.told.servers && self.told.changes.take(now) {
            sayings.push(Saying::Changed {
                added: servers.difference(&self.told.servers).count(),
                removed: self.told.servers.difference(&servers).count(),
                left_out: self.left_out,
            });
            self.told.servers = servers;
        }
        sayings
    }
}

/// A weight of SRV, from 0 to 65,535, as one of ours, from 1 to [`MAX_WEIGHT`], where
/// `most` is the greatest beside it. Small ones stay as they are.
fn scaled(weight: u16, most: u16) -> u16 {
    let ours = match most <= MAX_WEIGHT {
        true => u32::from(weight),
        false => u32::from(weight) * u32::from(MAX_WEIGHT) / u32::from(most),
    };
    u16::try_from(ours)
        .unwrap_or(MAX_WEIGHT)
        .clamp(1, MAX_WEIGHT)
}

#[cfg(test)]
mod tests;
