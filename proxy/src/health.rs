//! Which servers serve: asks them, watches what clients' traffic shows, and says
//! when one goes down or comes back. All of it in the control path; the data path
//! learns of it by a [`Steering`](ppv2_engine::upstream::Steering) alone.

mod board;
mod drains;
mod probe;
mod search;
mod state;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::JoinSet;

use crate::config;
use crate::metrics::Metrics;
use crate::roster::Roll;
use ppv2_engine::mode::{Mode, RewriteOn};

pub use board::{Board, Standing, UpstreamReport};
use probe::Target;
pub use state::Traffic;

/// Probes at once. It bounds the descriptors and ports that they take from
/// sessions; where more servers hang than that, some are asked later.
pub(crate) const MAX_PROBES: usize = 256;

/// Probes at once of one upstream. It bounds what its servers, when all hang, keep
/// from those of others.
const MAX_UPSTREAM_PROBES: usize = 64;

/// The running checks. They end with the value.
pub struct Health {
    board: Arc<Board>,
    metrics: Arc<Metrics>,
    places: Arc<Semaphore>,
    /// By upstream.
    shares: HashMap<String, Arc<Semaphore>>,
    /// By number of the server.
    checks: HashMap<usize, Checks>,
}

/// The checks of one server, and what they were made of.
struct Checks {
    health: Arc<config::Health>,
    target: Target,
    is_looked_at: bool,
    _tasks: JoinSet<()>,
}

impl Health {
    /// No checks yet.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            board: Arc::default(),
            metrics,
            places: Arc::new(Semaphore::new(MAX_PROBES)),
            shares: HashMap::new(),
            checks: HashMap::new(),
        }
    }

    /// Checks the servers of `roll` from now on. All that are new count as up until
    /// they fail; those that stay stand as they did, and their checks go on. To be
    /// called within a tokio runtime.
    pub fn follow(&mut self, roll: &Roll, now: Instant) {
        self.board.follow(roll, now);
        let config = &roll.config;
        let mut modes = HashMap::<_, Vec<_>>::new();
        for listener in &config.listeners {
            for (server, mode) in listener.servers.iter().chain(&listener.leaving) {
                modes.entry(*server).or_default().push(*mode);
            }
        }
        let mut before = std::mem::take(&mut self.checks);
        for (index, server) in config.servers.iter().enumerate() {
            let (Some(health), number) = (&server.health, roll.server(index)) else {
                continue;
            };
            let modes = modes.get(&index).map_or(&[][..], Vec::as_slice);
            let target = Target {
                address: server.address.0,
                source: server.sources.first().copied(),
                reads_header: modes.iter().any(|mode| reads_header(*mode)),
            };
            // Where replies don't come by here, nothing is known of them.
            let is_looked_at = modes.iter().all(|mode| mode.takes_replies());
            let same = |checks: &Checks| {
                checks.health == *health
                    && checks.target == target
                    && checks.is_looked_at == is_looked_at
            };
            let checks = match before.remove(&number).filter(same) {
                Some(checks) => checks,
                None => {
                    let places = self.places(&server.upstream);
                    self.check(number, Arc::clone(health), target, is_looked_at, places)
                }
            };
            self.checks.insert(number, checks);
        }
        self.shares.retain(|_, share| Arc::strong_count(share) > 1);
    }

    fn places(&mut self, upstream: &str) -> Places {
        let share = self.shares.entry(upstream.to_owned());
        let share = share.or_insert_with(|| Arc::new(Semaphore::new(MAX_UPSTREAM_PROBES)));
        Places {
            share: Arc::clone(share),
            all: Arc::clone(&self.places),
        }
    }

    fn check(
        &self,
        number: usize,
        health: Arc<config::Health>,
        target: Target,
        is_looked_at: bool,
        places: Places,
    ) -> Checks {
        let mut tasks = JoinSet::new();
        let watched = Watched {
            number,
            health: Arc::clone(&health),
            board: Arc::clone(&self.board),
        };
        if let Some(probe) = health.probe.clone() {
            tasks.spawn(watched.clone().probe(probe, target.clone(), places));
        }
        if let Some(passive) = health.passive
            && is_looked_at
        {
            tasks.spawn(watched.look(passive, Arc::clone(&self.metrics)));
        }
        Checks {
            health,
            target,
            is_looked_at,
            _tasks: tasks,
        }
    }

    /// What is known of the servers.
    #[must_use]
    pub fn board(&self) -> Arc<Board> {
        Arc::clone(&self.board)
    }
}

fn reads_header(mode: Mode) -> bool {
    matches!(mode, Mode::Ppv2 { .. } | Mode::Dsr(RewriteOn::Sdk { .. }))
}

/// Places for probes of one upstream.
struct Places {
    share: Arc<Semaphore>,
    all: Arc<Semaphore>,
}

impl Places {
    /// Waits for one. `None` if there will be none any more.
    async fn take(&self) -> Option<[SemaphorePermit<'_>; 2]> {
        // Whoever waits for its upstream's keeps nobody else's.
        let own = self.share.acquire().await.ok()?;
        Some([own, self.all.acquire().await.ok()?])
    }
}

/// A server that is being checked.
#[derive(Clone)]
struct Watched {
    number: usize,
    health: Arc<config::Health>,
    board: Arc<Board>,
}

impl Watched {
    async fn probe(self, probe: config::Probe, target: Target, places: Places) {
        // Servers are asked one after the other, not all in the same moment.
        tokio::time::sleep(self.health.every.mul_f64(share())).await;
        loop {
            let begun = tokio::time::Instant::now();
            let Some(place) = places.take().await else {
                return;
            };
            let outcome = probe::ask(&probe, &target, self.health.timeout).await;
            drop(place);
            let (fall, rise) = (self.health.fall, self.health.rise);
            self.board
                .probed(self.number, outcome, fall, rise, Instant::now());
            tokio::time::sleep_until(begun + state::pause(&self.health, share())).await;
        }
    }

    async fn look(self, passive: config::Passive, metrics: Arc<Metrics>) {
        let mut before = metrics.counted().traffic(self.number);
        loop {
            tokio::time::sleep(passive.window).await;
            let after = metrics.counted().traffic(self.number);
            let verdict = state::judge(&passive, before, after);
            before = after;
            let (fall, now) = (self.health.fall, Instant::now());
            self.board.seen(self.number, verdict, &passive, fall, now);
        }
    }
}

/// A share from 0 to 1, by lot.
fn share() -> f64 {
    f64::from(u16::try_from(probe::lot() & 0xffff).unwrap_or(0)) / 65_536.0
}

#[cfg(test)]
mod tests;
