//! What is known of the servers, for workers, metrics and operators.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use serde::Serialize;
use tokio::sync::Notify;

use super::drains::{Asked, Drains, is_meant};
use super::probe::Outcome;
use super::state::{Seen, Streak};
use crate::config::{Name, Passive};
use crate::metrics::{Labels, Metrics, Samples, count, gauge};
use crate::roster::Roll;
use ppv2_engine::address::ServerAddr;
use ppv2_engine::upstream::State;

/// In so many steps a server gets its share.
const STEPS: u32 = 10;

/// How a server stands, for whoever plans where sessions go.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Standing {
    /// Whether it takes new sessions.
    pub state: State,
    /// The part of its weight that it has, from 0 to 1: less than all while it
    /// starts slowly.
    pub share: f64,
    /// It was down and is up again.
    pub has_returned: bool,
}

impl Standing {
    /// Of which nothing is known yet.
    pub const UP: Self = Self {
        state: State::Up,
        share: 1.0,
        has_returned: false,
    };
}

/// What is known of all servers, by number.
#[derive(Debug, Default)]
pub struct Board {
    entries: Mutex<BTreeMap<usize, Entry>>,
    /// What was asked for servers that are gone. Locked after the entries.
    gone: Mutex<Drains>,
    /// Told when workers must know.
    changed: Notify,
}

#[derive(Clone, Debug)]
struct Entry {
    upstream: String,
    name: String,
    /// What metrics call it.
    label: String,
    /// The name that leads to it, if one does.
    found_by: Option<Name>,
    address: ServerAddr,
    weight: u16,
    backup: bool,
    /// As the configuration says.
    drain: bool,
    /// As an operator said since.
    drain_asked: Option<bool>,
    leaving: bool,
    slow_start: Duration,
    /// When it came, or came back, unless it was there at the start.
    came: Option<Instant>,
    has_returned: bool,
    is_checked: bool,
    probed: Streak,
    seen: Seen,
    why: String,
    since: SystemTime,
    results: [u64; Outcome::ALL.len()],
}

impl Entry {
    /// Whether an operator who writes `server` means it: by name or by address.
    fn is(&self, upstream: &str, server: &str) -> bool {
        self.upstream == upstream && is_meant(server, &self.name, self.address)
    }

    fn is_down(&self) -> bool {
        self.is_checked && (self.probed.is_down() || self.seen.is_down())
    }

    /// Draining, if it is not down.
    fn state(&self) -> State {
        match (self.is_down(), self.is_draining()) {
            (true, _) => State::Down,
            (false, true) => State::Draining,
            (false, false) => State::Up,
        }
    }

    fn is_draining(&self) -> bool {
        self.leaving || self.drain_asked.unwrap_or(self.drain)
    }

    /// What was asked of it, unless the configuration says the same.
    fn asked(self) -> Option<Asked> {
        let drain = self.drain_asked.filter(|drain| *drain != self.drain)?;
        Some(Asked {
            upstream: self.upstream,
            name: self.name,
            address: self.address,
            drain,
        })
    }

    /// How long it has been there, as a part of its slow start; `None` when that is
    /// over.
    fn started(&self, now: Instant) -> Option<f64> {
        let since = now.saturating_duration_since(self.came?);
        let is_starting = since < self.slow_start && self.state() == State::Up;
        is_starting.then(|| since.as_secs_f64() / self.slow_start.as_secs_f64())
    }

    fn standing(&self, now: Instant) -> Standing {
        Standing {
            state: self.state(),
            share: self.started(now).unwrap_or(1.0),
            has_returned: self.has_returned,
        }
    }

    /// Logs and notes that the server now stands otherwise, if it does.
    fn settle(&mut self, was_down: bool, why: String, now: Instant) -> bool {
        if self.is_down() == was_down {
            return false;
        }
        self.has_returned = was_down;
        if was_down {
            self.came = Some(now);
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
    /// The name that leads to it, if one does.
    found_by: Option<String>,
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
    fn entries(&self) -> MutexGuard<'_, BTreeMap<usize, Entry>> {
        // Nothing that holds the lock can leave half of a change behind.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until workers must know how servers stand. Nothing is missed between
    /// two calls.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// When shares of servers that start slowly are to be seen to again, if any do.
    #[must_use]
    pub fn next_step(&self, now: Instant) -> Option<Instant> {
        let entries = self.entries();
        let starting = entries
            .values()
            .filter(|entry| entry.started(now).is_some());
        starting.map(|entry| now + entry.slow_start / STEPS).min()
    }

    fn gone(&self) -> MutexGuard<'_, Drains> {
        self.gone.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a server get no new sessions, or get them again, until the process ends,
    /// also if it is gone for a while. `server` is what is written, which may have led
    /// to several of them, or an address. False if there is no such server.
    pub fn drain(&self, upstream: &str, server: &str, drain: bool) -> bool {
        let mut entries = self.entries();
        let mut is_known = self.gone().ask(upstream, server, drain);
        for entry in entries.values_mut() {
            if !entry.is(upstream, server) {
                continue;
            }
            is_known = true;
            let was_draining = entry.is_draining();
            entry.drain_asked = Some(drain);
            if entry.is_draining() != was_draining {
                tracing::info!(upstream, server, drain, "an operator asked for it");
                self.changed.notify_one();
            }
        }
        is_known
    }

    /// Takes over the servers of `roll`, and what is known of those that stay.
    pub(super) fn follow(&self, roll: &Roll, now: Instant) {
        let mut entries = self.entries();
        let mut gone = self.gone();
        let is_start = entries.is_empty();
        let mut known = std::mem::take(&mut *entries);
        let servers = roll.config.servers.iter().zip(&roll.servers);
        for ((server, (number, name)), label) in servers.zip(&roll.labels) {
            // Of another server that had the number before, nothing is known.
            let is_same =
                |old: &Entry| (&old.upstream, old.address) == (&server.upstream, server.address);
            let old = known.get(number).is_some_and(is_same);
            let old = old.then(|| known.remove(number)).flatten();
            let came = match &old {
                Some(old) => old.came,
                None => (!is_start).then_some(now),
            };
            let checks = server.health.as_ref();
            let drain_asked = match &old {
                Some(old) => old.drain_asked.filter(|_| old.drain == server.drain),
                None => gone.take(&server.upstream, server.address, server.drain),
            };
            let old = old.filter(|old| old.is_checked == checks.is_some());
            let has_probe = checks.is_some_and(|health| health.probe.is_some());
            let has_passive = checks.is_some_and(|health| health.passive.is_some());
            let old = old.as_ref();
            let entry = Entry {
                upstream: server.upstream.clone(),
                name: name.server.clone(),
                label: label.clone(),
                found_by: server.found_by.clone(),
                address: server.address,
                weight: server.weight,
                backup: server.backup,
                drain: server.drain,
                drain_asked,
                leaving: server.leaving,
                slow_start: server.slow_start,
                came,
                has_returned: old.is_some_and(|old| old.has_returned),
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
            };
            entries.insert(*number, entry);
        }
        gone.keep(known.into_values().filter_map(Entry::asked));
    }

    /// How each server of `roll` stands, by its place in the configuration.
    #[must_use]
    pub fn standings(&self, roll: &Roll, now: Instant) -> Vec<Standing> {
        let entries = self.entries();
        let standing = |(number, _): &(usize, _)| {
            entries
                .get(number)
                .map_or(Standing::UP, |entry| entry.standing(now))
        };
        roll.servers.iter().map(standing).collect()
    }

    /// Notes what came of a probe.
    pub(super) fn probed(
        &self,
        server: usize,
        outcome: Outcome,
        fall: u32,
        rise: u32,
        now: Instant,
    ) {
        let mut entries = self.entries();
        let Some(entry) = entries.get_mut(&server) else {
            return;
        };
        entry.results[outcome as usize] += 1;
        if outcome == Outcome::NotSent {
            return;
        }
        let was_down = entry.is_down();
        let good = outcome == Outcome::Passed;
        entry.probed.note(good, fall, rise);
        let times = if good { rise } else { fall };
        let why = format!("probe {}, {times} in a row", outcome.label());
        if entry.settle(was_down, why, now) {
            self.changed.notify_one();
        }
    }

    /// Notes what a window of clients' traffic said.
    pub(super) fn seen(
        &self,
        server: usize,
        verdict: Option<super::state::Verdict>,
        passive: &Passive,
        fall: u32,
        now: Instant,
    ) {
        let mut entries = self.entries();
        let Some(entry) = entries.get_mut(&server) else {
            return;
        };
        let was_down = entry.is_down();
        entry.seen.note(verdict, passive, fall, now);
        let why = match verdict {
            Some(super::state::Verdict::Refused) => "clients' datagrams refused, no replies",
            Some(super::state::Verdict::Unanswered) => "clients' datagrams unanswered",
            Some(super::state::Verdict::Good) | None => "on trial after its time off",
        };
        if entry.settle(was_down, why.to_owned(), now) {
            self.changed.notify_one();
        }
    }

    /// All upstreams, with the sessions that `metrics` count.
    #[must_use]
    pub fn report(&self, metrics: &Metrics) -> Vec<UpstreamReport> {
        let counted = metrics.counted();
        let mut upstreams = BTreeMap::<String, Vec<ServerReport>>::new();
        for (number, entry) in self.entries().iter() {
            let since = entry.since.duration_since(UNIX_EPOCH).unwrap_or_default();
            upstreams
                .entry(entry.upstream.clone())
                .or_default()
                .push(ServerReport {
                    server: entry.name.clone(),
                    address: entry.address.to_string(),
                    found_by: entry.found_by.as_ref().map(ToString::to_string),
                    state: match entry.state() {
                        State::Up => "up",
                        State::Draining if entry.leaving => "leaving",
                        State::Draining => "draining",
                        State::Down => "down",
                    },
                    checked: entry.is_checked,
                    weight: entry.weight,
                    backup: entry.backup,
                    drain: entry.drain_asked.unwrap_or(entry.drain),
                    why: entry.why.clone(),
                    since_unix_seconds: since.as_secs(),
                    sessions: counted.sessions(*number),
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
            vec![("upstream", &entry.upstream), ("server", &entry.label)]
        }
        let up = entries
            .values()
            .map(|entry| (labels(entry), u64::from(!entry.is_down())));
        gauge(
            &mut encoder,
            "upstream_up",
            "Whether servers are up, by health checks or for want of them",
            up.collect(),
        )?;
        let mut results = Samples::new();
        for entry in entries.values().filter(|entry| entry.is_checked) {
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
