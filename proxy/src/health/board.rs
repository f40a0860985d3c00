//! What is known of the servers, for workers, metrics and operators.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use serde::Serialize;
use tokio::sync::Notify;

use super::probe::Outcome;
use super::state::{Seen, Streak};
use crate::address::ServerAddr;
use crate::config::{Config, Passive};
use crate::metrics::{Labels, Metrics, Samples, count, gauge};
use crate::upstream::State;

/// What is known of all servers, by number.
#[derive(Debug, Default)]
pub struct Board {
    entries: Mutex<Vec<Entry>>,
    /// Told when workers must know.
    changed: Arc<Notify>,
}

#[derive(Clone, Debug)]
struct Entry {
    upstream: String,
    name: String,
    address: ServerAddr,
    weight: u16,
    backup: bool,
    drain: bool,
    is_checked: bool,
    probed: Streak,
    seen: Seen,
    why: String,
    since: SystemTime,
    results: [u64; Outcome::ALL.len()],
}

impl Entry {
    fn is_down(&self) -> bool {
        self.is_checked && (self.probed.is_down() || self.seen.is_down())
    }

    /// Draining, if it is not down.
    fn state(&self) -> State {
        match (self.is_down(), self.drain) {
            (true, _) => State::Down,
            (false, true) => State::Draining,
            (false, false) => State::Up,
        }
    }

    /// Logs and notes that the server now stands otherwise, if it does.
    fn settle(&mut self, was_down: bool, why: String) -> bool {
        if self.is_down() == was_down {
            return false;
        }
        let name = |down| if down { "down" } else { "up" };
        let (from, to) = (name(was_down), name(!was_down));
        if was_down {
            tracing::info!(
                upstream = self.upstream,
                server = self.name,
                from,
                to,
                why,
                "server is up"
            );
        } else {
            tracing::warn!(
                upstream = self.upstream,
                server = self.name,
                from,
                to,
                why,
                "server is down"
            );
        }
        (self.why, self.since) = (why, SystemTime::now());
        true
    }
}

/// An upstream as operators see it.
#[derive(Debug, Serialize)]
pub struct UpstreamReport {
    upstream: String,
    servers: Vec<ServerReport>,
}

#[derive(Debug, Serialize)]
struct ServerReport {
    server: String,
    address: String,
    state: &'static str,
    checked: bool,
    weight: u16,
    backup: bool,
    drain: bool,
    why: String,
    since_unix_seconds: u64,
    sessions: u64,
}

impl Board {
    fn entries(&self) -> std::sync::MutexGuard<'_, Vec<Entry>> {
        // Nothing that holds the lock can leave half of a change behind.
        self.entries
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// What is told when workers must know how servers stand.
    pub(super) fn changed(&self) -> Arc<Notify> {
        Arc::clone(&self.changed)
    }

    /// Has a server get no new sessions, or get them again, until the process ends.
    /// False if there is no such server.
    pub fn drain(&self, upstream: &str, server: &str, drain: bool) -> bool {
        let mut entries = self.entries();
        let found = entries
            .iter_mut()
            .find(|entry| entry.upstream == upstream && entry.name == server);
        let Some(entry) = found else {
            return false;
        };
        if entry.drain != drain {
            entry.drain = drain;
            tracing::info!(upstream, server, drain, "an operator asked for it");
            self.changed.notify_one();
        }
        true
    }

    /// Takes over the servers of `config`, and what is known of those that stay.
    pub(super) fn follow(&self, config: &Config) {
        let mut entries = self.entries();
        let known: HashMap<_, _> = entries
            .drain(..)
            .map(|entry| ((entry.upstream.clone(), entry.address.0), entry))
            .collect();
        entries.extend(config.servers.iter().map(|server| {
            let old = known.get(&(server.upstream.clone(), server.address.0));
            let checks = server.health.as_ref();
            let old = old.filter(|old| old.is_checked == checks.is_some());
            let has_probe = checks.is_some_and(|health| health.probe.is_some());
            let has_passive = checks.is_some_and(|health| health.passive.is_some());
            Entry {
                upstream: server.upstream.clone(),
                name: server.name.clone(),
                address: server.address,
                weight: server.weight,
                backup: server.backup,
                drain: server.drain,
                is_checked: checks.is_some(),
                probed: old
                    .filter(|_| has_probe)
                    .map(|old| old.probed)
                    .unwrap_or_default(),
                seen: old
                    .filter(|_| has_passive)
                    .map(|old| old.seen)
                    .unwrap_or_default(),
                why: old.map_or_else(|| "not judged yet".to_owned(), |old| old.why.clone()),
                since: old.map_or_else(SystemTime::now, |old| old.since),
                results: old.map(|old| old.results).unwrap_or_default(),
            }
        }));
    }

    /// How each server stands, by number.
    #[must_use]
    pub fn states(&self) -> Vec<State> {
        self.entries().iter().map(Entry::state).collect()
    }

    /// Notes what came of a probe. True if workers must know.
    pub(super) fn probed(&self, server: usize, outcome: Outcome, fall: u32, rise: u32) -> bool {
        let mut entries = self.entries();
        let Some(entry) = entries.get_mut(server) else {
            return false;
        };
        entry.results[outcome as usize] += 1;
        if outcome == Outcome::NotSent {
            return false;
        }
        let was_down = entry.is_down();
        let good = outcome == Outcome::Passed;
        entry.probed.note(good, fall, rise);
        let times = if good { rise } else { fall };
        entry.settle(
            was_down,
            format!("probe {}, {times} in a row", outcome.label()),
        )
    }

    /// Notes what a window of clients' traffic said. True if workers must know.
    pub(super) fn seen(
        &self,
        server: usize,
        verdict: Option<super::state::Verdict>,
        passive: &Passive,
        fall: u32,
        now: Instant,
    ) -> bool {
        let mut entries = self.entries();
        let Some(entry) = entries.get_mut(server) else {
            return false;
        };
        let was_down = entry.is_down();
        entry.seen.note(verdict, passive, fall, now);
        let why = match verdict {
            Some(super::state::Verdict::Refused) => "clients' datagrams refused, no replies",
            Some(super::state::Verdict::Unanswered) => "clients' datagrams unanswered",
            Some(super::state::Verdict::Good) | None => "on trial after its time off",
        };
        entry.settle(was_down, why.to_owned())
    }

    /// All upstreams, with the sessions that `metrics` count.
    #[must_use]
    pub fn report(&self, metrics: &Metrics) -> Vec<UpstreamReport> {
        let numbers: HashMap<_, _> = metrics.servers.iter().zip(0..).collect();
        let mut upstreams = BTreeMap::<String, Vec<ServerReport>>::new();
        for entry in self.entries().iter() {
            let number = numbers.get(&(entry.upstream.clone(), entry.name.clone()));
            let since = entry.since.duration_since(UNIX_EPOCH).unwrap_or_default();
            upstreams
                .entry(entry.upstream.clone())
                .or_default()
                .push(ServerReport {
                    server: entry.name.clone(),
                    address: entry.address.to_string(),
                    state: match entry.state() {
                        State::Up => "up",
                        State::Draining => "draining",
                        State::Down => "down",
                    },
                    checked: entry.is_checked,
                    weight: entry.weight,
                    backup: entry.backup,
                    drain: entry.drain,
                    why: entry.why.clone(),
                    since_unix_seconds: since.as_secs(),
                    sessions: number.map_or(0, |number| metrics.sessions(*number)),
                });
        }
        let report = |(upstream, servers)| UpstreamReport { upstream, servers };
        upstreams.into_iter().map(report).collect()
    }
}

impl Collector for Board {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let entries = self.entries();
        fn labels(entry: &Entry) -> Labels<'_> {
            vec![("upstream", &entry.upstream), ("server", &entry.name)]
        }
        let up = entries
            .iter()
            .map(|entry| (labels(entry), u64::from(!entry.is_down())));
        gauge(
            &mut encoder,
            "upstream_up",
            "Whether servers are up, by health checks or for want of them",
            up.collect(),
        )?;
        let mut results = Samples::new();
        for entry in entries.iter().filter(|entry| entry.is_checked) {
            for outcome in Outcome::ALL {
                let mut labels = labels(entry);
                labels.push(("result", outcome.label()));
                results.push((labels, entry.results[outcome as usize]));
            }
        }
        count(
            &mut encoder,
            "upstream_health_checks",
            "Probes of servers, by result",
            results,
        )
    }
}
