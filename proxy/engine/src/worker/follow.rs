//! How a running worker takes over another setup: what goes on, what goes elsewhere
//! and what ends. Sessions whose listener and server are still there are not
//! touched.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use super::open::ServerAddresses;
use super::{Change, ListenerSettings, Setup, Worker, enter, random_seed};
use crate::mode::Mode;
use crate::session::{EndReason, SessionId};
use crate::upstream::{Balancer, ByFamily, Route, Server, Steering};

/// Numbers of listener and server.
type Pair = (usize, usize);

impl Worker {
    /// Takes new sessions elsewhere from now on, and with them those that are to
    /// move.
    pub(super) fn steer(&mut self, steering: Arc<Steering>) {
        for (number, plans) in steering.plans.iter().enumerate() {
            if let Some(balancers) = self.balancers.get_mut(number) {
                balancers.each(|v6, balancer| balancer.follow(Arc::clone(plans.get(v6))));
                continue;
            }
            let balancers = ByFamily::new(|v6| {
                Balancer::new(Arc::clone(plans.get(v6)), self.number, random_seed())
            });
            self.balancers.push(balancers);
        }
        // Whom nobody has left, nobody need leave.
        let servers = &self.counters.servers;
        self.parted.retain(|pair| servers[pair.1].sessions() > 0);
        self.moves_any = steering.moves_any() || !self.parted.is_empty();
        let before = std::mem::replace(&mut self.steering, steering);
        self.repeat_headers(&before.down);
    }

    /// Has sessions that stay with a server tell it of their client again, unless it
    /// was down before.
    fn repeat_headers(&mut self, down_before: &BTreeSet<usize>) {
        let down = &self.steering.down;
        let is_new = |server: &usize| down.contains(server) && !down_before.contains(server);
        let mut servers = self.listeners.iter().flat_map(|listener| &listener.servers);
        // To look through all sessions takes its time.
        if !servers.any(|server| server.mode.may_omit_header() && is_new(&server.number)) {
            return;
        }
        for (_, session) in self.table.iter_mut() {
            if is_new(&session.server) {
                session.link.prefix.forgotten();
            }
        }
    }

    /// Whether session `id` is to go elsewhere at this datagram of its client's.
    pub(super) fn is_to_move(&mut self, id: SessionId) -> bool {
        let Some(session) = self.table.get_mut(id) else {
            return false;
        };
        let route = Route {
            listener: session.listener,
            server: session.server,
            v6: session.key.client.0.is_ipv6(),
        };
        if self.parted.contains(&(route.listener, route.server))
            || self.steering.leave.contains(&route)
        {
            return true;
        }
        // Asked once for each change, which costs as much as a new session's pick.
        let is_new = std::mem::replace(&mut session.link.steered, self.steering.version)
            != self.steering.version;
        if !is_new || self.steering.draining.contains(&route.server) {
            return false;
        }
        let balancer = self.balancers[route.listener].get(route.v6);
        let home = balancer.home(session.key.client);
        let home = home.and_then(|index| self.listeners[route.listener].servers.get(index));
        home.is_some_and(|home| {
            let server = home.number;
            server != route.server && self.steering.returns.contains(&Route { server, ..route })
        })
    }

    /// Goes by another setup, and says so.
    pub(super) fn follow(&mut self, change: Change, now: Instant) {
        let Change {
            setup,
            bound,
            entrances,
            done,
        } = change;
        let Setup {
            listeners,
            steering,
            pace,
            counters,
            log,
        } = setup;
        let old = std::mem::replace(&mut self.listeners, listeners);
        (self.pace, self.counters, self.log) = (pace, counters, log);
        let rules = self.listeners.iter().map(|listener| listener.rules);
        self.table.follow(now, rules.collect());
        self.servers = ServerAddresses::of(&self.listeners);

        let mut differences = Differences::between(&old, &self.listeners);
        // Whoever was to move, and has not, began under a setup that may have been
        // another.
        let rejoined = rejoined(&self.parted, &self.listeners);
        self.parted.retain(|pair| !rejoined.contains_key(pair));
        differences.changed.extend(rejoined);
        self.parted.extend(&differences.parted);
        let passed = self.pass_entrances(&bound);
        self.end_otherwise(&differences, &passed, now);
        self.steer(steering);

        for socket in entrances {
            let (address, listener) = (socket.bound(), bound.get(&socket.bound()));
            let entered = listener
                .map(|listener| enter(&mut self.entrances, &self.readiness, socket, *listener));
            if let Some(Err(error)) = entered {
                tracing::error!(%address, %error, "a worker can't take datagrams there; restart the proxy");
            }
        }
        done();
    }

    /// Has entrances serve the listeners that their addresses now belong to.
    /// Returns those that were another listener's.
    fn pass_entrances(&mut self, bound: &BTreeMap<SocketAddr, usize>) -> BTreeSet<usize> {
        let mut passed = BTreeSet::new();
        let mut servers = self.listeners.iter().flat_map(|l| &l.servers);
        let own_ports = servers.any(|server| server.mode.spoofs_ports());
        for (key, entrance) in &mut self.entrances {
            let listener = bound.get(&entrance.socket.bound()).copied();
            entrance.is_closing = listener.is_none();
            if listener.is_some_and(|listener| listener != entrance.listener) {
                passed.insert(key);
            }
            entrance.listener = listener.unwrap_or(entrance.listener);
            // It fails where it would have failed at the beginning.
            let _ = entrance
                .socket
                .adapt(self.listeners[entrance.listener].entrance);
            if own_ports {
                // Without it, clients that write from this port have no session.
                let _ = entrance.socket.share_port();
            }
        }
        passed
    }

    /// Ends sessions that would begin otherwise now, or not at all, and has nobody take
    /// over sockets that would be made otherwise.
    fn end_otherwise(&mut self, differences: &Differences, passed: &BTreeSet<usize>, now: Instant) {
        let Differences {
            changed,
            outdated,
            barred,
            ..
        } = differences;
        if changed.is_empty() && outdated.is_empty() && barred.is_empty() && passed.is_empty() {
            return;
        }
        for (listener, server) in outdated {
            self.table.set_aside(*listener, *server);
        }
        let mut ends = Vec::new();
        for (id, session) in self.table.iter_mut() {
            let pair = (session.listener, session.server);
            session.link.is_outdated |= outdated.contains(&pair);
            let client = session.key.client.0.ip();
            let listener = &self.listeners[session.listener];
            let is_barred = barred.contains(&session.listener) && !listener.allows(client);
            if !session.is_active() {
                if is_barred {
                    session.silence();
                }
                continue;
            }
            let mode = changed.get(&pair);
            let is_changed = mode.is_some_and(|mode| *mode != session.link.mode);
            if is_barred {
                ends.push((id, EndReason::Denied));
            } else if is_changed || passed.contains(&session.link.via) {
                ends.push((id, EndReason::Moved));
            }
        }
        for (id, reason) in ends {
            self.end(now, id, reason);
        }
    }

    /// Ends what is left at these addresses, unless they have a listener again.
    pub(super) fn close(&mut self, addresses: &[SocketAddr], now: Instant) {
        let is_closing = |key: &usize| {
            let entrance = &self.entrances[*key];
            entrance.is_closing && addresses.contains(&entrance.socket.bound())
        };
        let keys = self.entrances.iter().map(|(key, _)| key);
        let closing: BTreeSet<_> = keys.filter(is_closing).collect();
        if closing.is_empty() {
            return;
        }
        for key in &closing {
            // What came in time is still taken, and what has come since is counted.
            self.take_waiting(*key, now);
        }
        let ends = self.table.iter_mut();
        let ends = ends.filter(|(_, session)| closing.contains(&session.link.via));
        let ends: Vec<_> = ends.map(|(id, _)| id).collect();
        self.take_last_replies(&ends, now);
        for id in ends {
            // Of one that was moved, replies could still come.
            if let Some(session) = self.table.get_mut(id) {
                session.silence();
            }
            self.end(now, id, EndReason::Stopped);
        }
        for key in closing {
            self.entrances.remove(key);
        }
    }
}

/// What a setup changes of how listeners serve their servers.
#[derive(Debug, Default)]
struct Differences {
    /// These no longer belong together.
    parted: BTreeSet<Pair>,
    /// Servers may see other datagrams than before, in this mode.
    changed: BTreeMap<Pair, Mode>,
    /// Sockets would be made otherwise.
    outdated: BTreeSet<Pair>,
    /// Listeners that serve other clients than before.
    barred: BTreeSet<usize>,
}

impl Differences {
    fn between(old: &[Arc<ListenerSettings>], new: &[Arc<ListenerSettings>]) -> Self {
        let mut all = Self::default();
        for (listener, (old, new)) in old.iter().zip(new).enumerate() {
            if Arc::ptr_eq(old, new) {
                continue;
            }
            if (&old.allow, &old.deny, &old.peers) != (&new.allow, &new.deny, &new.peers) {
                all.barred.insert(listener);
            }
            let same_options = old.exit_options() == new.exit_options();
            let servers = new.servers.iter();
            let now: HashMap<_, _> = servers.map(|server| (server.number, server)).collect();
            for before in &old.servers {
                let pair = (listener, before.number);
                let Some(after) = now.get(&before.number) else {
                    all.parted.insert(pair);
                    // Should they meet again, it may be in another mode.
                    all.outdated.insert(pair);
                    continue;
                };
                if before.mode != after.mode {
                    all.changed.insert(pair, after.mode);
                }
                if !same_options || !same_sockets(before, after) {
                    all.outdated.insert(pair);
                }
            }
        }
        all
    }
}

/// Those of `parted` that belong together again, and in which mode.
fn rejoined(parted: &BTreeSet<Pair>, listeners: &[Arc<ListenerSettings>]) -> BTreeMap<Pair, Mode> {
    let listeners = listeners.iter().enumerate();
    let pairs = listeners.flat_map(|(number, listener)| {
        let servers = listener.servers.iter();
        servers.map(move |server| ((number, server.number), server.mode))
    });
    pairs.filter(|(pair, _)| parted.contains(pair)).collect()
}

fn same_sockets(a: &Server, b: &Server) -> bool {
    (a.mode, &a.sources) == (b.mode, &b.sources)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::address::ServerAddr;
    use crate::session::Rules;
    use crate::upstream::ServerName;
    use ppv2_udp::Options;

    fn listener(servers: impl Iterator<Item = usize>) -> Arc<ListenerSettings> {
        let name = Arc::new(ServerName {
            upstream: "u".to_owned(),
            server: "s".to_owned(),
        });
        let server = |number| Server {
            number,
            name: Arc::clone(&name),
            address: ServerAddr(([192, 0, 2, 1], 53).into()),
            mode: Mode::Plain,
            sources: Arc::from([]),
        };
        let options = Options {
            dont_fragment: false,
            bursts: true,
        };
        Arc::new(ListenerSettings {
            name: "l".into(),
            rules: Rules {
                idle_timeout: Duration::from_secs(60),
                responses: 0,
                requests: 0,
                amplification: None,
            },
            allow: Vec::new(),
            deny: Vec::new(),
            peers: Vec::new(),
            clients: None,
            rates: None,
            entrance: options,
            dont_fragment: false,
            dscp: false,
            servers: servers.map(server).collect(),
        })
    }

    #[test]
    fn who_belongs_together_again_is_found_among_many() {
        const MANY: usize = 40_000;
        let listeners = [listener(0..0), listener(0..MANY)];
        let parted: BTreeSet<_> = (MANY - 1..2 * MANY).map(|server| (1, server)).collect();
        let rejoined = rejoined(&parted, &listeners);
        assert_eq!(rejoined, BTreeMap::from([((1, MANY - 1), Mode::Plain)]));
    }
}
