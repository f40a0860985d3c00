//! Servers that a listener no longer has and that its sessions may stay with for their
//! `lame_duck` time. No I/O; `now` is an argument.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::time::Instant;

use crate::config::{Config, Server};
use crate::registry::ActiveConfig;
use ppv2_engine::mode::Mode;

/// The most servers found by names that a listener may be leaving at once. It bounds the
/// cost of a name that leads elsewhere all the time; those whose time ends first go first.
const MAX_LAME_DUCKS: usize = 256;

/// A server that is leaving.
#[derive(Debug)]
struct LameDuck {
    /// Name of the listener.
    listener: String,
    server: Server,
    mode: Mode,
    until: Instant,
}

/// All servers that are leaving.
#[derive(Debug, Default)]
pub(super) struct LameDucks(Vec<LameDuck>);

impl LameDucks {
    /// Notes the servers that were there `before` and that `config` has no more, and adds to
    /// it those that sessions may stay with for a while.
    pub(super) fn update(&mut self, config: &mut Config, before: &ActiveConfig, now: Instant) {
        let mut next: Vec<LameDuck> = Vec::new();
        let before = &before.config;
        for old in &before.listeners {
            let Some(new) = config.listeners.iter().find(|new| new.name == old.name) else {
                continue;
            };
            let there: HashSet<_> = new
                .servers
                .iter()
                .map(|(index, _)| identity(&config.servers[*index]))
                .collect();
            let ducks = self.0.iter();
            let known: HashMap<_, _> = ducks
                .filter(|duck| duck.listener == old.name)
                .map(|duck| (identity(&duck.server), duck.until))
                .collect();
            for (index, mode) in old.servers.iter().chain(&old.leaving) {
                let server = &before.servers[*index];
                if there.contains(&identity(server)) {
                    continue;
                }
                let known = known.get(&identity(server)).copied();
                let until = known.unwrap_or(now + server.lame_duck);
                if until > now {
                    next.push(LameDuck {
                        listener: old.name.clone(),
                        server: server.clone(),
                        mode: *mode,
                        until,
                    });
                }
            }
        }
        next.sort_by_key(|duck| Reverse(duck.until));
        let mut taken: BTreeMap<String, usize> = BTreeMap::new();
        next.retain(|duck| {
            if duck.server.found_by.is_none() {
                return true;
            }
            let taken = taken.entry(duck.listener.clone()).or_default();
            *taken += 1;
            *taken <= MAX_LAME_DUCKS
        });
        next.reverse();
        let servers = config.servers.iter().enumerate();
        let mut indices: HashMap<_, _> = servers
            .map(|(index, server)| (owned(identity(server)), index))
            .collect();
        for duck in &next {
            let index = indices.entry(owned(identity(&duck.server)));
            let index = *index.or_insert_with(|| {
                config.servers.push(Server {
                    leaving: true,
                    ..duck.server.clone()
                });
                config.servers.len() - 1
            });
            let listeners = config.listeners.iter_mut();
            for listener in listeners.filter(|listener| listener.name == duck.listener) {
                listener.leaving.push((index, duck.mode));
            }
        }
        self.0 = next;
    }

    /// Lets no server go before `until`.
    pub(super) fn postpone(&mut self, until: Instant) {
        for duck in &mut self.0 {
            duck.until = duck.until.max(until);
        }
    }

    /// When the next one has to be gone.
    pub(super) fn next(&self) -> Option<Instant> {
        self.0.first().map(|duck| duck.until)
    }
}

/// By what a server is the same one in two configurations.
pub(super) fn identity(server: &Server) -> (&str, SocketAddr) {
    (&server.upstream, server.id().0)
}

fn owned((upstream, address): (&str, SocketAddr)) -> (String, SocketAddr) {
    (upstream.to_owned(), address)
}

#[cfg(test)]
mod tests;
