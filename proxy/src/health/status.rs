//! How servers stand, for workers, metrics and operators.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use serde::Serialize;
use tokio::sync::Notify;

use super::check::{Outcome, Streak};
use super::passive::Trial;
use crate::config::Server;
use crate::log::{self, Colour};
use crate::metrics::{Labels, Samples, count, gauge};
use crate::registry::ActiveConfig;
use crate::runtime::ServerStanding;
use ppv2_engine::address::ServerAddr;
use ppv2_engine::counters::ServerCounters;
use ppv2_engine::server;
use ppv2_engine::upstream::State;

/// Steps in which a server that starts slowly gets its share.
const STEPS: u32 = 10;

/// Servers that left whose drain requests are remembered, the last ones to leave. It
/// bounds the memory of a name that leads elsewhere all the time.
const MAX_LEFT: usize = 1024;

/// How a server stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Standing {
    /// Whether it takes new sessions.
    pub state: State,
    /// The part of its weight that it has, from 0 to 1: less than 1 during its slow
    /// start.
    pub share: f64,
    /// Whether it was down and is up again.
    pub has_returned: bool,
}

impl Standing {
    /// A server of which nothing is known yet.
    pub const UP: Self = Self {
        state: State::Up,
        share: 1.0,
        has_returned: false,
    };
}

/// How all servers stand.
#[derive(Debug, Default)]
pub struct Status {
    known: Mutex<Known>,
    /// Notified when workers must know.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Known {
    servers: BTreeMap<Key, Entry>,
    /// Servers that left while an operator's drain request contradicted the
    /// configuration, in the order in which they left.
    left: VecDeque<Entry>,
}

/// A server's identity: its upstream and address.
pub(super) type Key = (String, ServerAddr);

pub(super) fn key(server: &Server) -> Key {
    (server.upstream.clone(), server.id())
}

/// What an outcome was found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Evidence {
    Probe,
    Traffic,
}

#[derive(Debug)]
struct Entry {
    server: Server,
    /// Its object, while anything holds that.
    object: Weak<server::Server>,
    /// The last drain request of an operator, unless the configuration changed since.
    drain_asked: Option<bool>,
    /// When it came, or came back, unless it was there at the start.
    came: Option<Instant>,
    has_returned: bool,
    probes: Streak,
    traffic: Trial,
    why: String,
    since: SystemTime,
    results: [u64; Outcome::ALL.len()],
}

impl Entry {
    fn new(server: &Server, came: Option<Instant>) -> Self {
        Self {
            server: server.clone(),
            object: Weak::new(),
            drain_asked: None,
            came,
            has_returned: false,
            probes: Streak::default(),
            traffic: Trial::default(),
            why: "not judged yet".to_owned(),
            since: SystemTime::now(),
            results: Default::default(),
        }
    }

    /// Whether an operator who writes `server` means it: by name or by address.
    fn is(&self, upstream: &str, server: &str) -> bool {
        let own = &self.server;
        own.upstream == upstream && (own.name == server || server.parse() == Ok(own.address.0))
    }

    fn is_checked(&self) -> bool {
        self.server.health.is_some()
    }

    fn is_down(&self) -> bool {
        self.probes.is_down() || self.traffic.is_down()
    }

    fn drain(&self) -> bool {
        self.drain_asked.unwrap_or(self.server.drain)
    }

    fn is_draining(&self) -> bool {
        self.server.leaving || self.drain()
    }

    fn state(&self) -> State {
        match (self.is_down(), self.is_draining()) {
            (true, _) => State::Down,
            (false, true) => State::Draining,
            (false, false) => State::Up,
        }
    }

    /// How much of its slow start is over, from 0 to 1; `None` if all of it is.
    fn started(&self, now: Instant) -> Option<f64> {
        let (since, whole) = (
            now.saturating_duration_since(self.came?),
            self.server.slow_start,
        );
        let is_starting = since < whole && self.state() == State::Up;
        is_starting.then(|| since.as_secs_f64() / whole.as_secs_f64())
    }

    fn standing(&self, now: Instant) -> Standing {
        Standing {
            state: self.state(),
            share: self.started(now).unwrap_or(1.0),
            has_returned: self.has_returned,
        }
    }

    fn report(&self) -> ServerReport {
        let since = self.since.duration_since(UNIX_EPOCH).unwrap_or_default();
        let server = &self.server;
        let object = self.object.upgrade();
        ServerReport {
            server: server.name.clone(),
            address: server.shown_address(),
            found_by: server.found_by.as_ref().map(ToString::to_string),
            state: match self.state() {
                State::Up => "up",
                State::Draining if server.leaving => "leaving",
                State::Draining => "draining",
                State::Down => "down",
            },
            checked: self.is_checked(),
            weight: server.weight,
            backup: server.backup,
            drain: self.drain(),
            why: self.why.clone(),
            since_unix_seconds: since.as_secs(),
            sessions: object.map_or(0, |object| object.sum(ServerCounters::sessions)),
        }
    }

    fn status(&self) -> ServerStatus {
        let object = self.object.upgrade();
        let sum = |read: fn(&ServerCounters) -> u64| object.as_ref().map_or(0, |o| o.sum(read));
        ServerStatus {
            label: match &object {
                Some(object) => object.label(),
                None => self.server.name.clone(),
            },
            datagrams: sum(|c| c.sent.get()),
            bytes: sum(|c| c.sent_bytes.get()),
            reply_datagrams: sum(|c| c.replies.get()),
            reply_bytes: sum(|c| c.reply_bytes.get()),
            receive_overflows: sum(|c| c.overflows.get()),
            icmp_errors: sum(|c| c.refusals.get()),
            sessions_opened: sum(|c| c.opened.get()),
            report: self.report(),
        }
    }
}

/// Shows people at a terminal what the first check of a server found. The log has only what
/// changes.
fn show_first(server: &Server, outcome: Outcome) {
    let Some(terminal) = log::terminal() else {
        return;
    };
    let sign = match outcome == Outcome::Passed {
        true => terminal.paint(Colour::Green, "●"),
        false => terminal.paint(Colour::Red, "○"),
    };
    let Server { upstream, name, .. } = server;
    terminal.show(&format!(
        "  {sign} {upstream} {name}: first check {}",
        outcome.label()
    ));
}

/// An upstream as operators see it.
#[derive(Debug, Serialize)]
pub struct UpstreamReport {
    upstream: String,
    servers: Vec<ServerReport>,
}

/// An upstream as operators see it, with what was counted.
#[derive(Debug, Serialize)]
pub struct UpstreamStatus {
    upstream: String,
    servers: Vec<ServerStatus>,
}

#[derive(Debug, Serialize)]
struct ServerStatus {
    #[serde(flatten)]
    report: ServerReport,
    /// Its name in metrics, which no other server of the upstream has.
    label: String,
    datagrams: u64,
    bytes: u64,
    reply_datagrams: u64,
    reply_bytes: u64,
    receive_overflows: u64,
    icmp_errors: u64,
    sessions_opened: u64,
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

impl Status {
    fn known(&self) -> MutexGuard<'_, Known> {
        // No panic can leave half of a change behind.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until workers must know how servers stand. No change between two calls is
    /// missed.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// When the next step of a slow start is due, if there is one.
    #[must_use]
    pub fn next_step(&self, now: Instant) -> Option<Instant> {
        let known = self.known();
        let starting = known
            .servers
            .values()
            .filter(|entry| entry.started(now).is_some());
        starting
            .map(|entry| now + entry.server.slow_start / STEPS)
            .min()
    }

    /// Drains a server, or ends that, until the process ends or the configuration says
    /// otherwise, also if the server leaves for a while. `server` is its address, or what
    /// is written in the configuration, which may have led to several servers. Returns
    /// false if there is no such server.
    pub fn drain(&self, upstream: &str, server: &str, drain: bool) -> bool {
        let mut known = self.known();
        let Known { servers, left } = &mut *known;
        let entries = servers.values_mut().chain(left.iter_mut());
        let mut is_known = false;
        for entry in entries.filter(|entry| entry.is(upstream, server)) {
            is_known = true;
            if entry.drain() != drain {
                let done = if drain { "drained" } else { "undrained" };
                tracing::info!(
                    upstream,
                    server,
                    drain,
                    "server {done} through the admin API"
                );
                self.changed.notify_one();
            }
            entry.drain_asked = Some(drain);
        }
        left.retain(|entry| entry.server.drain != drain || !entry.is(upstream, server));
        is_known
    }

    /// Takes over the servers of `active`. Those that stay keep what is known of them.
    pub(super) fn reconfigure(&self, active: &ActiveConfig, now: Instant) {
        let mut known = self.known();
        let Known { servers, left } = &mut *known;
        let is_start = servers.is_empty();
        let mut before = std::mem::take(servers);
        for (server, object) in active.config.servers.iter().zip(&active.servers) {
            let key = key(server);
            let old = before.remove(&key);
            let at = left
                .iter()
                .position(|entry| self::key(&entry.server) == key);
            let returned = at.and_then(|at| left.remove(at));
            // A changed configuration ends an operator's request.
            let last = old.as_ref().or(returned.as_ref());
            let last = last.filter(|last| last.server.drain == server.drain);
            let drain_asked = last.and_then(|last| last.drain_asked);
            let came = old
                .as_ref()
                .map_or((!is_start).then_some(now), |old| old.came);
            let mut entry = old
                .filter(|old| old.is_checked() == server.health.is_some())
                .unwrap_or_else(|| Entry::new(server, came));
            if !server.is_probed() {
                entry.probes = Streak::default();
            }
            if server
                .health
                .as_ref()
                .is_none_or(|health| health.passive.is_none())
            {
                entry.traffic = Trial::default();
            }
            entry.server = server.clone();
            entry.object = Arc::downgrade(object);
            entry.drain_asked = drain_asked;
            servers.insert(key, entry);
        }
        for mut entry in before.into_values() {
            entry.server.leaving = false;
            if entry.drain() != entry.server.drain {
                left.push_back(entry);
            }
        }
        while left.len() > MAX_LEFT
            && let Some(Entry { server, .. }) = left.pop_front()
        {
            tracing::warn!(
                upstream = server.upstream,
                server = server.name,
                "an operator's drain request is forgotten: this server left, and so did \
                 {MAX_LEFT} others since"
            );
        }
    }

    /// What another process of this proxy is to know of servers.
    pub(crate) fn handed_over(&self) -> Vec<ServerStanding> {
        let known = self.known();
        let standing = |((upstream, address), entry): (&Key, &Entry)| ServerStanding {
            upstream: upstream.clone(),
            address: Some(address.0.into()),
            is_down: entry.probes.is_down(),
            drain: entry.drain_asked,
        };
        let servers = known.servers.iter().map(standing);
        servers
            .filter(|one| one.is_down || one.drain.is_some())
            .collect()
    }

    /// Goes on with what another process of this proxy knew of servers.
    pub(crate) fn inherit(&self, standings: &[ServerStanding]) {
        let mut known = self.known();
        for standing in standings {
            let Some(address) = standing.address else {
                continue;
            };
            let key = (standing.upstream.clone(), ServerAddr(address.into()));
            let Some(entry) = known.servers.get_mut(&key) else {
                continue;
            };
            entry.drain_asked = standing.drain;
            if standing.is_down && entry.server.is_probed() {
                entry.probes = Streak::down();
                "was down before the upgrade".clone_into(&mut entry.why);
            }
        }
    }

    /// How each server of `active` stands, by its place in the configuration.
    #[must_use]
    pub fn standings(&self, active: &ActiveConfig, now: Instant) -> Vec<Standing> {
        let known = self.known();
        let standing = |server| {
            let entry = known.servers.get(&key(server));
            entry.map_or(Standing::UP, |entry| entry.standing(now))
        };
        active.config.servers.iter().map(standing).collect()
    }

    /// Adds the outcome of a check of a server, and logs if it goes down or comes back.
    pub(super) fn add(&self, server: &Key, evidence: Evidence, outcome: Outcome, now: Instant) {
        let mut known = self.known();
        let Some(entry) = known.servers.get_mut(server) else {
            return;
        };
        let Some(health) = entry.server.health.clone() else {
            return;
        };
        let was_down = entry.is_down();
        let passed = outcome == Outcome::Passed;
        if evidence == Evidence::Probe {
            if entry.results == <[u64; Outcome::ALL.len()]>::default() {
                show_first(&entry.server, outcome);
            }
            entry.results[outcome as usize] += 1;
            if outcome != Outcome::Unknown {
                entry.probes.add(passed, *health.fall, *health.rise);
            }
        } else if let Some(passive) = &health.passive {
            entry.traffic.add(outcome, passive, *health.fall, now);
        }
        let is_down = entry.is_down();
        if is_down == was_down {
            return;
        }
        entry.has_returned = was_down;
        entry.since = SystemTime::now();
        entry.why = match (evidence, outcome) {
            (Evidence::Probe, _) => {
                let times = if passed { *health.rise } else { *health.fall };
                format!("probe {}, {times} in a row", outcome.label())
            }
            _ if was_down => "hold time is over; taking sessions on trial".to_owned(),
            (_, Outcome::Refused) => "clients' datagrams refused, no replies".to_owned(),
            _ => "clients' datagrams unanswered".to_owned(),
        };
        let Server { upstream, name, .. } = &entry.server;
        let why = &entry.why;
        if is_down {
            tracing::warn!(upstream, server = name, why, "server is down");
        } else {
            entry.came = Some(now);
            tracing::info!(upstream, server = name, why, "server is up");
        }
        self.changed.notify_one();
    }

    /// How many servers are up, and how many there are; those that are leaving don't count.
    #[must_use]
    pub fn up(&self) -> (usize, usize) {
        let known = self.known();
        let staying = known.servers.values().filter(|one| !one.server.leaving);
        staying.fold((0, 0), |(up, all), entry| {
            (up + usize::from(entry.state() == State::Up), all + 1)
        })
    }

    /// All upstreams.
    #[must_use]
    pub fn report(&self) -> Vec<UpstreamReport> {
        let known = self.known();
        let entries: Vec<_> = known.servers.values().collect();
        let upstreams = by_upstream(&entries);
        upstreams
            .map(|(upstream, servers)| UpstreamReport {
                upstream,
                servers: servers.iter().map(|entry| entry.report()).collect(),
            })
            .collect()
    }

    /// The upstreams with `most` servers, and how many servers are left out.
    #[must_use]
    pub fn statuses(&self, most: usize) -> (Vec<UpstreamStatus>, usize) {
        let known = self.known();
        let entries: Vec<_> = known.servers.values().take(most).collect();
        let upstreams = by_upstream(&entries);
        let upstreams = upstreams.map(|(upstream, servers)| UpstreamStatus {
            upstream,
            servers: servers.iter().map(|entry| entry.status()).collect(),
        });
        (upstreams.collect(), known.servers.len() - entries.len())
    }
}

/// The entries, in their order, of each upstream.
fn by_upstream<'e>(entries: &'e [&Entry]) -> impl Iterator<Item = (String, &'e [&'e Entry])> {
    let upstreams = entries.chunk_by(|a, b| a.server.upstream == b.server.upstream);
    upstreams.map(|servers| (servers[0].server.upstream.clone(), servers))
}

impl Collector for Status {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        type Labelled<'e> = (&'e Entry, String);
        fn labels<'e>((entry, label): &'e Labelled<'_>) -> Labels<'e> {
            vec![("upstream", &entry.server.upstream), ("server", label)]
        }
        let known = self.known();
        let entries = known.servers.values();
        let entries: Vec<Labelled<'_>> = entries
            .filter_map(|entry| Some((entry, entry.object.upgrade()?.label())))
            .collect();
        let up = entries.iter();
        let up = up.map(|one| (labels(one), u64::from(!one.0.is_down())));
        gauge(
            &mut encoder,
            "upstream_up",
            "1 if the server is up, else 0; always 1 without health checks",
            up.collect(),
        )?;
        let mut results = Samples::new();
        for one in entries.iter().filter(|(entry, _)| entry.is_checked()) {
            for ((_, result), count) in Outcome::ALL.iter().zip(one.0.results) {
                let labels = [labels(one), vec![("result", *result)]].concat();
                results.push((labels, count));
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
