//! Health checks: probes servers, watches their clients' traffic, and says when one goes
//! down or comes back. The data path learns of it only by a
//! [`Snapshot`](ppv2_engine::snapshot::Snapshot).

mod check;
mod dns;
mod passive;
mod status;
mod tcp;
mod udp;

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::JoinSet;

use crate::config::{self, Probe};
use crate::metrics::Traffic;
use crate::registry::ActiveConfig;
use ppv2_engine::server::Server;

use check::{HealthCheck, Outcome, Target};
pub(crate) use check::{Reads, header_of_own};
use dns::Dns;
use passive::Passive;
use status::{Evidence, Key};
pub use status::{Standing, Status, UpstreamReport, UpstreamStatus};
use tcp::{Http, Tcp};
use udp::Udp;

/// Probes at once. It bounds the descriptors and ports that they take from sessions.
pub(crate) const MAX_PROBES: usize = 256;

/// Probes at once of one upstream. It bounds how long its servers, when all hang, keep
/// those of others from being probed.
const MAX_UPSTREAM_PROBES: usize = 64;

/// The running checks. They end with the value.
pub struct Health {
    /// How the servers stand.
    pub status: Arc<Status>,
    permits: Arc<Semaphore>,
    /// By upstream.
    upstream_permits: HashMap<String, Arc<Semaphore>>,
    /// The tasks of each server, and what they check.
    running: HashMap<Key, (Checked, JoinSet<()>)>,
}

/// A server that is checked, and how.
#[derive(Clone, PartialEq)]
struct Checked {
    health: Arc<config::Health>,
    target: Target,
    /// Whether its replies pass the proxy.
    replies_pass: bool,
    server: Arc<Server>,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            status: Arc::default(),
            permits: Arc::new(Semaphore::new(MAX_PROBES)),
            upstream_permits: HashMap::new(),
            running: HashMap::new(),
        }
    }
}

impl Health {
    /// Checks the servers of `active` from now on. New ones count as up until they fail;
    /// those that stay keep their status, and their checks go on. Must be called within
    /// a tokio runtime.
    pub fn reconfigure(&mut self, active: &ActiveConfig, now: Instant) {
        self.status.reconfigure(active, now);
        let (mut reads, mut bypassed) = (HashMap::new(), HashSet::new());
        for listener in &active.config.listeners {
            for (server, mode) in listener.servers.iter().chain(&listener.leaving) {
                if mode.has_header() {
                    reads.entry(*server).or_insert(Reads::of(*mode));
                }
                if !mode.takes_replies() {
                    bypassed.insert(*server);
                }
            }
        }
        let mut before = std::mem::take(&mut self.running);
        for (index, server) in active.config.servers.iter().enumerate() {
            let Some(health) = &server.health else {
                continue;
            };
            let checked = Checked {
                health: Arc::clone(health),
                target: Target {
                    address: server.address.0,
                    source: server.probe_source(),
                    freebind: server.sources.network().is_some(),
                    reads: reads.get(&index).copied().unwrap_or(Reads::Payload),
                },
                replies_pass: !bypassed.contains(&index),
                server: Arc::clone(&active.servers[index]),
            };
            let key = status::key(server);
            let same = before.remove(&key).filter(|(before, _)| *before == checked);
            let running = same.unwrap_or_else(|| (checked.clone(), self.start(&key, checked)));
            self.running.insert(key, running);
        }
        self.upstream_permits
            .retain(|_, permits| Arc::strong_count(permits) > 1);
    }

    /// Starts the checks of a server.
    fn start(&mut self, key: &Key, checked: Checked) -> JoinSet<()> {
        let Checked {
            health,
            target,
            replies_pass,
            server,
        } = checked;
        let upstream = self.upstream_permits.entry(key.0.clone());
        let upstream = upstream.or_insert_with(|| Arc::new(Semaphore::new(MAX_UPSTREAM_PROBES)));
        let runner = Runner {
            key: key.clone(),
            health: Arc::clone(&health),
            status: Arc::clone(&self.status),
            permits: [Arc::clone(upstream), Arc::clone(&self.permits)],
        };
        let mut tasks = JoinSet::new();
        if let Some(config) = health.passive.filter(|_| replies_pass) {
            let passive = Passive {
                config,
                before: Traffic::of(&server),
                server,
            };
            tasks.spawn(runner.clone().watch(passive));
        }
        match health.probe.clone() {
            None => {}
            Some(Probe::Udp {
                payload,
                port,
                expect,
                header,
            }) => {
                let target = target.with(port);
                tasks.spawn(runner.probe(Udp {
                    target,
                    header,
                    payload,
                    expect,
                }));
            }
            Some(Probe::Dns {
                query,
                port,
                header,
            }) => {
                let target = target.with(port);
                tasks.spawn(runner.probe(Dns {
                    target,
                    query,
                    header,
                }));
            }
            Some(Probe::Tcp { port }) => {
                tasks.spawn(runner.probe(Tcp { target, port }));
            }
            Some(Probe::Http { port, path }) => {
                let tcp = Tcp { target, port };
                tasks.spawn(runner.probe(Http { tcp, path }));
            }
        }
        tasks
    }
}

/// Runs the checks of one server.
#[derive(Clone)]
struct Runner {
    key: Key,
    health: Arc<config::Health>,
    status: Arc<Status>,
    /// Its upstream's, and those of all.
    permits: [Arc<Semaphore>; 2],
}

impl Runner {
    async fn probe(self, mut check: impl HealthCheck) {
        // Spread over time, so that servers aren't all probed at the same moment.
        tokio::time::sleep(self.health.every.mul_f64(random_share())).await;
        loop {
            let begun = tokio::time::Instant::now();
            let Some(permits) = self.permits().await else {
                return;
            };
            let deadline = tokio::time::Instant::now() + self.health.timeout();
            let outcome = check.check(deadline).await;
            drop(permits);
            self.note(Evidence::Probe, outcome);
            tokio::time::sleep_until(begun + pause(&self.health, random_share())).await;
        }
    }

    /// Waits for a turn. `None` if there will be none any more.
    async fn permits(&self) -> Option<[SemaphorePermit<'_>; 2]> {
        let [upstream, all] = &self.permits;
        // In this order, so that a check waiting for its upstream blocks no other one.
        let upstream = upstream.acquire().await.ok()?;
        Some([upstream, all.acquire().await.ok()?])
    }

    fn note(&self, evidence: Evidence, outcome: Outcome) {
        let now = Instant::now();
        self.status.add(&self.key, evidence, outcome, now);
    }

    async fn watch(self, mut check: Passive) {
        let config = check.config;
        loop {
            tokio::time::sleep(*config.window).await;
            let outcome = check.check(tokio::time::Instant::now()).await;
            self.note(Evidence::Traffic, outcome);
        }
    }
}

/// The time from the start of one probe to the start of the next. A little less than
/// `every`, so that `fall` of them, the last of which has to wait out its timeout, are
/// over within `fall × every`. `share` is from 0 to 1.
fn pause(health: &config::Health, share: f64) -> Duration {
    let full = health.every.saturating_sub(health.timeout() / *health.fall);
    let full = full.max(*health.every / 2);
    full.mul_f64(1.0 - share * f64::from(*health.jitter_percent) / 100.0)
}

/// An unpredictable number.
fn random_u16() -> u16 {
    let [a, b, ..] = RandomState::new().build_hasher().finish().to_ne_bytes();
    u16::from_ne_bytes([a, b])
}

/// A random number from 0 to 1.
fn random_share() -> f64 {
    f64::from(random_u16()) / 65_536.0
}

#[cfg(test)]
mod tests;
