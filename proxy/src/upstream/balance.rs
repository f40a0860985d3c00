//! Balancers: which server a new session gets, by a plan that workers share and
//! what each keeps for itself.
//!
//! Workers share nothing that changes: each takes its own turns, draws its own
//! lots and goes by its own sessions. The kernel spreads clients over workers
//! evenly, so what is even in each is even in all.

use std::sync::Arc;

use super::affinity::{scale, step};
use super::plan::{Plan, Spread, Weighted};
use crate::address::ClientAddr;

/// Draws that may name the server that was drawn before. A heavy one among light
/// ones is drawn twice most of the time, and then has no rival.
const DRAWS: usize = 4;

/// Picks servers for one worker's new sessions.
#[derive(Clone, Debug)]
pub struct Balancer {
    plan: Arc<Plan>,
    next: usize,
    lot: u64,
}

impl Balancer {
    /// A balancer that follows `plan`. It takes its turns from number `start` on,
    /// so that workers begin elsewhere and a few sessions spread all the same, and
    /// draws its lots from `seed`.
    #[must_use]
    pub fn new(plan: Arc<Plan>, start: usize, seed: u64) -> Self {
        Self {
            plan,
            next: start,
            lot: seed,
        }
    }

    /// Follows another plan from the next session on.
    pub fn follow(&mut self, plan: Arc<Plan>) {
        self.plan = plan;
    }

    /// The server for a new session of `client`, as its index in the upstream;
    /// `sessions` tells how many a server has. `None` only if there are no servers
    /// at all.
    pub fn pick(&mut self, client: ClientAddr, sessions: impl Fn(usize) -> u64) -> Option<usize> {
        let picked = match &self.plan.spread {
            Spread::Maglev { hash_on, table } => table.get(hash_on.hash(client)),
            Spread::RoundRobin(turns) => take_turn(turns, &mut self.next),
            Spread::LeastSessions(servers) => least(servers, &mut self.next, sessions),
            Spread::RandomTwo { turns, weights } => {
                let load = |server: u16| Load {
                    sessions: sessions(usize::from(server)),
                    weight: weights[usize::from(server)],
                };
                let one = draw(turns, &mut self.lot)?;
                let mut others = (0..DRAWS).filter_map(|_| draw(turns, &mut self.lot));
                match others.find(|other| *other != one) {
                    Some(other) if load(other).is_below(load(one)) => Some(other),
                    _ => Some(one),
                }
            }
        };
        picked.map(usize::from)
    }
}

/// How much a server has to do.
#[derive(Clone, Copy)]
struct Load {
    sessions: u64,
    weight: u16,
}

impl Load {
    /// Whether one more session would weigh less here than there.
    fn is_below(self, other: Self) -> bool {
        let (here, there) = (self.sessions + 1, other.sessions + 1);
        here * u64::from(other.weight) < there * u64::from(self.weight)
    }
}

fn take_turn(turns: &[u16], next: &mut usize) -> Option<u16> {
    let turn = *next % turns.len().max(1);
    *next = turn + 1;
    turns.get(turn).copied()
}

/// The server with the least load; of several, the first from the one after that
/// which was picked last.
fn least(servers: &[Weighted], next: &mut usize, sessions: impl Fn(usize) -> u64) -> Option<u16> {
    let start = *next % servers.len().max(1);
    let (before, from) = servers.split_at(start);
    let load = |weighted: &Weighted| Load {
        sessions: sessions(usize::from(weighted.server)),
        weight: weighted.weight,
    };
    let mut all = (start..).zip(from).chain((0..).zip(before));
    let (mut at, first) = all.next()?;
    let mut least = load(first);
    for (index, weighted) in all {
        let load = load(weighted);
        if load.is_below(least) {
            (at, least) = (index, load);
        }
    }
    *next = at + 1;
    Some(servers[at].server)
}

/// A server drawn by lot, as often as it has turns.
fn draw(turns: &[u16], lot: &mut u64) -> Option<u16> {
    *lot = lot.wrapping_add(1);
    let len = u32::try_from(turns.len()).unwrap_or(u32::MAX);
    turns.get(scale(step(*lot), len) as usize).copied()
}

#[cfg(test)]
mod tests;
