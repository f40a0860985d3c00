//! Which servers serve: asks them, watches what clients' traffic shows, and tells
//! workers when one goes down or comes back. All of it in the control path; the
//! data path learns of it by a [`Steering`] alone.

mod board;
mod probe;
mod state;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;

use crate::admin::WorkerHandle;
use crate::config::{self, Config};
use crate::metrics::Metrics;
use crate::mode::{Mode, RewriteOn};
use crate::upstream::{State, Steering};
use crate::worker::Command;

pub use board::{Board, UpstreamReport};
use probe::Target;
pub use state::Traffic;

/// Probes at once. It bounds the descriptors and ports that they take from
/// sessions; where more servers hang than that, some are asked later.
pub(crate) const MAX_PROBES: usize = 64;

/// The time between two plans, whatever servers do: building one takes up to 50 ms.
const STEER_PAUSE: Duration = Duration::from_millis(100);

/// Makes of servers' states where sessions go.
pub type Steer = fn(&Config, &[State]) -> Steering;

/// The running checks. They end with the value.
pub struct Health {
    board: Arc<Board>,
    workers: Vec<WorkerHandle>,
    steer: Steer,
    tasks: JoinSet<()>,
}

impl Health {
    /// Begins to check the servers of `config`. All count as up until they fail.
    #[must_use]
    pub fn start(
        config: Arc<Config>,
        metrics: Arc<Metrics>,
        workers: Vec<WorkerHandle>,
        steer: Steer,
    ) -> Self {
        let mut health = Self {
            board: Arc::default(),
            workers,
            steer,
            tasks: JoinSet::new(),
        };
        health.restart(config, metrics);
        health
    }

    /// Goes on with the servers of another configuration. Those that stay, by
    /// upstream and address, stand as they did. Workers are told of changes from
    /// now on; how things stand is for the caller to tell them, by
    /// [`states`](Board::states).
    pub fn restart(&mut self, config: Arc<Config>, metrics: Arc<Metrics>) {
        self.tasks.abort_all();
        self.tasks = JoinSet::new();
        self.board.follow(&config);
        let changed = self.board.changed();
        let places = Arc::new(Semaphore::new(MAX_PROBES));
        for (number, server) in config.servers.iter().enumerate() {
            let Some(health) = &server.health else {
                continue;
            };
            let modes = config
                .listeners
                .iter()
                .flat_map(|listener| &listener.servers);
            let modes: Vec<_> = modes
                .filter(|(of, _)| *of == number)
                .map(|(_, mode)| *mode)
                .collect();
            let watched = Watched {
                number,
                health: Arc::clone(health),
                board: Arc::clone(&self.board),
                changed: Arc::clone(&changed),
            };
            if let Some(probe) = health.probe.clone() {
                let target = Target {
                    address: server.address.0,
                    source: server.sources.first().copied(),
                    reads_header: modes.iter().any(|mode| reads_header(*mode)),
                };
                let places = Arc::clone(&places);
                self.tasks
                    .spawn(watched.clone().probe(probe, target, places));
            }
            // Where replies don't come by here, nothing is known of them.
            if let Some(passive) = health.passive
                && modes.iter().all(|mode| mode.takes_replies())
            {
                self.tasks
                    .spawn(watched.look(passive, Arc::clone(&metrics)));
            }
        }
        let board = Arc::clone(&self.board);
        let (workers, steer) = (self.workers.clone(), self.steer);
        self.tasks
            .spawn(steer_workers(config, board, workers, steer, changed));
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

/// A server that is being checked.
#[derive(Clone)]
struct Watched {
    number: usize,
    health: Arc<config::Health>,
    board: Arc<Board>,
    changed: Arc<Notify>,
}

impl Watched {
    async fn probe(self, probe: config::Probe, target: Target, places: Arc<Semaphore>) {
        // Servers are asked one after the other, not all in the same moment.
        tokio::time::sleep(self.health.every.mul_f64(share())).await;
        loop {
            let begun = tokio::time::Instant::now();
            let Ok(place) = places.acquire().await else {
                return;
            };
            let outcome = probe::ask(&probe, &target, self.health.timeout).await;
            drop(place);
            let (fall, rise) = (self.health.fall, self.health.rise);
            if self.board.probed(self.number, outcome, fall, rise) {
                self.changed.notify_one();
            }
            tokio::time::sleep_until(begun + state::pause(&self.health, share())).await;
        }
    }

    async fn look(self, passive: config::Passive, metrics: Arc<Metrics>) {
        let mut before = metrics.traffic(self.number);
        loop {
            tokio::time::sleep(passive.window).await;
            let after = metrics.traffic(self.number);
            let verdict = state::judge(&passive, before, after);
            before = after;
            let (fall, now) = (self.health.fall, Instant::now());
            if self.board.seen(self.number, verdict, &passive, fall, now) {
                self.changed.notify_one();
            }
        }
    }
}

/// Tells workers where sessions go whenever that has changed, until each has heard.
async fn steer_workers(
    config: Arc<Config>,
    board: Arc<Board>,
    workers: Vec<WorkerHandle>,
    steer: Steer,
    changed: Arc<Notify>,
) {
    loop {
        changed.notified().await;
        let (config, states) = (Arc::clone(&config), board.states());
        let made = tokio::task::spawn_blocking(move || steer(&config, &states));
        let Ok(steering) = made.await.map(Arc::new) else {
            return;
        };
        let mut deaf: Vec<_> = workers.iter().collect();
        loop {
            deaf.retain(|worker| !worker.tell(Command::Steer(Arc::clone(&steering))));
            tokio::time::sleep(STEER_PAUSE).await;
            if deaf.is_empty() {
                break;
            }
        }
    }
}

/// A share from 0 to 1, by lot.
fn share() -> f64 {
    f64::from(u16::try_from(probe::lot() & 0xffff).unwrap_or(0)) / 65_536.0
}
