//! Balancers: which server a new session gets, by a plan that workers share and
//! what each keeps for itself.
//!
//! Workers share nothing that changes: each takes its own turns, draws at random by itself
//! and counts its own sessions. The kernel spreads clients over workers evenly, so what is
//! even in each is even in all.

use super::affinity::{scale, step};
use super::plan::{Plan, Spread, Weighted};
use crate::address::ClientAddr;

/// Draws that may name the server that was drawn before. A heavy one among light
/// ones is drawn twice most of the time, and then has no rival.
const DRAWS: usize = 4;

/// Servers whose sessions are looked at for a new one, so that a session costs
/// no more the more servers there are.
const LOOKS: usize = 64;

/// Picks servers for one worker's new sessions.
#[derive(Clone, Debug)]
pub struct Balancer {
    next: usize,
    lot: u64,
}

impl Plan {
    /// The server that any new session of `client` would be given, as its index in
    /// the upstream. `None` where that does not depend on the client alone.
    #[must_use]
    pub fn home(&self, client: ClientAddr) -> Option<usize> {
        match &self.spread {
            Spread::Maglev { hash_on, table } => table.get(hash_on.hash(client)).map(usize::from),
            Spread::RoundRobin(_) | Spread::LeastSessions(_) | Spread::RandomTwo { .. } => None,
        }
    }
}

impl Balancer {
    /// A balancer that takes its turns from number `start` on, so that workers begin
    /// elsewhere and a few sessions spread all the same, and draws from `seed`.
    #[must_use]
    pub fn new(start: usize, seed: u64) -> Self {
        Self {
            next: start,
            lot: seed,
        }
    }

    /// The server for a new session of `client`, as its index in the upstream;
    /// `sessions` tells how many a server has. `None` only if there are no servers
    /// at all.
    pub fn pick(
        &mut self,
        plan: &Plan,
        client: ClientAddr,
        sessions: impl Fn(usize) -> u64,
    ) -> Option<usize> {
        let picked = match &plan.spread {
            Spread::Maglev { hash_on, table } => table.get(hash_on.hash(client)),
            Spread::RoundRobin(turns) => take_turn(turns, &mut self.next),
            Spread::LeastSessions(servers) => least(servers, &mut self.next, sessions),
            Spread::RandomTwo { turns, costs } => {
                let load = |server: u16| {
                    let server = usize::from(server);
                    load(sessions(server), costs[server])
                };
                let one = draw(turns, &mut self.lot)?;
                let mut others = (0..DRAWS).filter_map(|_| draw(turns, &mut self.lot));
                let other = others.find(|other| *other != one);
                other.filter(|other| load(*other) < load(one)).or(Some(one))
            }
        };
        picked.map(usize::from)
    }
}

/// What a server has to bear, one session more included.
fn load(sessions: u64, cost: u32) -> u64 {
    (sessions + 1) * u64::from(cost)
}

fn take_turn(turns: &[u16], next: &mut usize) -> Option<u16> {
    let turn = *next % turns.len().max(1);
    *next = turn + 1;
    turns.get(turn).copied()
}

/// The server with the least load of the next [`LOOKS`]; of several such, the
/// first. They begin after the one that was picked last.
fn least(servers: &[Weighted], next: &mut usize, sessions: impl Fn(usize) -> u64) -> Option<u16> {
    let start = *next % servers.len().max(1);
    let load = |server: &Weighted| load(sessions(usize::from(server.server)), server.cost);
    let (mut at, mut least) = (start, load(servers.get(start)?));
    let (before, from) = servers.split_at(start);
    let from = &from[..from.len().min(LOOKS)];
    let before = &before[..before.len().min(LOOKS - from.len())];
    // Two loops take a third less time than one over both.
    for (index, server) in from.iter().enumerate() {
        let load = load(server);
        if load < least {
            (at, least) = (start + index, load);
        }
    }
    for (index, server) in before.iter().enumerate() {
        let load = load(server);
        if load < least {
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
