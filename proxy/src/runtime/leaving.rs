//! Servers that a listener no longer has and that its sessions may stay with for a
//! while: their lame-duck time. Pure; `now` is an argument.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::time::Instant;

use crate::config::{Config, Server};
use crate::roster::Roll;
use ppv2_engine::mode::Mode;

/// Servers found by names that may be leaving a listener at once. It bounds what a
/// name costs that leads elsewhere all the time; the ones that have to be gone soonest
/// go first.
const MAX_LEAVING: usize = 256;

/// A server that is leaving.
#[derive(Debug)]
struct Leaver {
    /// Name of the listener.
    listener: String,
    server: Server,
    mode: Mode,
    until: Instant,
}

/// All servers that are leaving.
#[derive(Debug, Default)]
pub(super) struct Leaving(Vec<Leaver>);

impl Leaving {
    /// Notes what `config` has no more that was there `before`, and adds to it what
    /// may stay for a while.
    pub(super) fn follow(&mut self, config: &mut Config, before: Option<&Roll>, now: Instant) {
        let mut next: Vec<Leaver> = Vec::new();
        let before = before.map(|roll| &roll.config);
        let listeners = before.into_iter().flat_map(|config| &config.listeners);
        for old in listeners {
            let Some(new) = config.listeners.iter().find(|new| new.name == old.name) else {
                continue;
            };
            let all = before.map_or(&[][..], |config| &config.servers);
            let there: HashSet<_> = new
                .servers
                .iter()
                .map(|(index, _)| identity(&config.servers[*index]))
                .collect();
            let leavers = self.0.iter();
            let known: HashMap<_, _> = leavers
                .filter(|leaver| leaver.listener == old.name)
                .map(|leaver| (identity(&leaver.server), leaver.until))
                .collect();
            for (index, mode) in old.servers.iter().chain(&old.leaving) {
                let server = &all[*index];
                if there.contains(&identity(server)) {
                    continue;
                }
                let known = known.get(&identity(server)).copied();
                let until = known.unwrap_or(now + server.lame_duck);
                if until > now {
                    next.push(Leaver {
                        listener: old.name.clone(),
                        server: server.clone(),
                        mode: *mode,
                        until,
                    });
                }
            }
        }
        next.sort_by_key(|leaver| Reverse(leaver.until));
        let mut taken: BTreeMap<String, usize> = BTreeMap::new();
        next.retain(|leaver| {
            if leaver.server.found_by.is_none() {
                return true;
            }
            let taken = taken.entry(leaver.listener.clone()).or_default();
            *taken += 1;
            *taken <= MAX_LEAVING
        });
        next.reverse();
        let servers = config.servers.iter().enumerate();
        let mut indices: HashMap<_, _> = servers
            .map(|(index, server)| (owned(identity(server)), index))
            .collect();
        for leaver in &next {
            let index = indices.entry(owned(identity(&leaver.server)));
            let index = *index.or_insert_with(|| {
                config.servers.push(Server {
                    leaving: true,
                    ..leaver.server.clone()
                });
                config.servers.len() - 1
            });
            let listeners = config.listeners.iter_mut();
            for listener in listeners.filter(|listener| listener.name == leaver.listener) {
                listener.leaving.push((index, leaver.mode));
            }
        }
        self.0 = next;
    }

    /// Lets nobody go before `until`.
    pub(super) fn postpone(&mut self, until: Instant) {
        for leaver in &mut self.0 {
            leaver.until = leaver.until.max(until);
        }
    }

    /// When the next one has to be gone.
    pub(super) fn next(&self) -> Option<Instant> {
        self.0.first().map(|leaver| leaver.until)
    }
}

/// By what a server is the same one in two configurations.
pub(super) fn identity(server: &Server) -> (&str, SocketAddr) {
    (&server.upstream, server.address.0)
}

fn owned((upstream, address): (&str, SocketAddr)) -> (String, SocketAddr) {
    (upstream.to_owned(), address)
}

#[cfg(test)]
mod tests;
