//! Which clients' own ports are in use towards which servers, by all workers
//! together. The kernel lets several sockets have one address and port; if two of them
//! were also connected to the same server, it would give all replies to one.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::accept::SenderId;
use crate::address::{ListenerAddr, ServerAddr};
use crate::handover::Address;
use crate::session::{Key, MIN_REST};

/// The most ports that are in use or rest: bounds the memory that clients take that come
/// and go. Beyond it new ones are refused.
const MAX_PORTS: usize = 262_144;

/// Client and server.
type Pair = (SocketAddr, SocketAddr);

/// Client and server of each session that writes from the client's own port, and
/// of those that ended a moment ago. Looked at when one begins or ends.
#[derive(Debug, Default)]
pub struct ClientPorts(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    uses: HashMap<Pair, PortUse, ahash::RandomState>,
    /// Pairs that rest or rested, each once, and since when; one that was taken again since
    /// is looked at once more.
    resting: VecDeque<(Pair, Instant)>,
}

#[derive(Debug)]
struct PortUse {
    /// What the client wrote to, and the proxy that it wrote through.
    way: (ListenerAddr, SenderId),
    /// When the port was given back, if it was. A late reply would reach the next
    /// session, which may be the client's by the same way alone.
    since: Option<Instant>,
    /// Whether it is in `resting`.
    is_queued: bool,
}

impl PortUse {
    /// Whether a late reply may still come for the session that had it.
    fn rests(&self, now: Instant) -> bool {
        let is_young = |since| now.saturating_duration_since(since) < MIN_REST;
        self.since.is_some_and(is_young)
    }
}

/// A client's own port that a session wrote from a moment ago.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestingPort {
    /// The client.
    pub client: Address,
    /// The server that it was used towards.
    pub server: Address,
    /// What the client wrote to; `None` if it wrote through another proxy.
    pub local: Option<Address>,
    /// How long ago its session ended.
    pub since: Duration,
}

/// A client's own port that a session writes to a server from, given back when dropped.
#[derive(Debug)]
pub(crate) struct ClientPort {
    pair: Pair,
    of: Arc<ClientPorts>,
}

impl ClientPorts {
    /// Takes the client's port; `None` if another session has it, or had it within
    /// [`MIN_REST`] at another local address, or through another proxy.
    pub(crate) fn take(
        self: &Arc<Self>,
        now: Instant,
        key: &Key,
        server: ServerAddr,
    ) -> Option<ClientPort> {
        let (pair, way) = ((key.client.0, server.0), (key.local, key.sender));
        let mut state = self.lock();
        state.forget_rested(now);
        let known = state.uses.get(&pair);
        let is_free = known.is_none_or(|port_use| {
            port_use.since.is_some() && (port_use.way == way || !port_use.rests(now))
        });
        let is_queued = known.is_some_and(|port_use| port_use.is_queued);
        if !is_free || known.is_none() && state.uses.len() >= MAX_PORTS {
            return None;
        }
        let port_use = PortUse {
            way,
            since: None,
            is_queued,
        };
        state.uses.insert(pair, port_use);
        Some(ClientPort {
            pair,
            of: Arc::clone(self),
        })
    }

    /// Whether a session writes to `server` from this address and port, as a client's
    /// own, or did within [`MIN_REST`].
    pub(crate) fn is_taken(&self, now: Instant, source: SocketAddr, server: ServerAddr) -> bool {
        let mut state = self.lock();
        state.forget_rested(now);
        let port_use = state.uses.get(&(source, server.0));
        port_use.is_some_and(|port_use| port_use.since.is_none() || port_use.rests(now))
    }

    /// Clients' own ports that rest, for another process.
    #[must_use]
    pub fn resting(&self, now: Instant) -> Vec<RestingPort> {
        let state = self.lock();
        let resting = state
            .uses
            .iter()
            .filter(|(_, port_use)| port_use.rests(now));
        let resting = resting.map(|((client, server), port_use)| RestingPort {
            client: (*client).into(),
            server: (*server).into(),
            local: (port_use.way.1 == SenderId::NONE).then(|| port_use.way.0.0.into()),
            since: port_use
                .since
                .map(|since| now.saturating_duration_since(since))
                .unwrap_or_default(),
        });
        resting.collect()
    }

    /// Has ports rest that rested in another process.
    pub fn inherit(&self, ports: &[RestingPort], now: Instant) {
        let mut state = self.lock();
        for port in ports.iter().take(MAX_PORTS) {
            let pair = (port.client.into(), port.server.into());
            let since = now.checked_sub(port.since).unwrap_or(now);
            let way = match port.local {
                Some(local) => (ListenerAddr(local.into()), SenderId::NONE),
                None => (ListenerAddr(port.server.into()), SenderId::NONE),
            };
            let port_use = PortUse {
                way,
                since: Some(since),
                is_queued: true,
            };
            state.uses.insert(pair, port_use);
            state.resting.push_back((pair, since));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn forget_rested(&mut self, now: Instant) {
        while let Some((pair, since)) = self.resting.front().copied()
            && now.saturating_duration_since(since) >= MIN_REST
        {
            self.resting.pop_front();
            let Entry::Occupied(mut entry) = self.uses.entry(pair) else {
                continue;
            };
            // It may have been taken again, and given back later.
            match entry.get().since {
                Some(later) if entry.get().rests(now) => self.resting.push_back((pair, later)),
                Some(_) => _ = entry.remove(),
                None => entry.get_mut().is_queued = false,
            }
        }
    }

    fn give_back(&mut self, now: Instant, pair: Pair) {
        if let Some(port_use) = self.uses.get_mut(&pair) {
            port_use.since = Some(now);
            if !std::mem::replace(&mut port_use.is_queued, true) {
                self.resting.push_back((pair, now));
            }
        }
        self.forget_rested(now);
    }
}

impl Drop for ClientPort {
    fn drop(&mut self) {
        self.of.lock().give_back(Instant::now(), self.pair);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::ClientAddr;

    fn key(client: u16, local: u16) -> Key {
        Key::direct(
            ClientAddr(([203, 0, 113, 11], client).into()),
            ListenerAddr(([198, 51, 100, 10], local).into()),
        )
    }

    fn server(port: u16) -> ServerAddr {
        ServerAddr(([192, 0, 2, 1], port).into())
    }

    #[test]
    fn one_session_at_a_time_writes_to_a_server_from_a_clients_port() {
        let ports = Arc::new(ClientPorts::default());
        let take = |client, local, to| ports.take(Instant::now(), &key(client, local), server(to));
        let first = take(1, 53, 1).unwrap();
        assert!(take(1, 53, 1).is_none());
        assert!(take(2, 53, 1).is_some());
        assert!(take(1, 53, 2).is_some());
        drop(first);
        assert!(take(1, 53, 1).is_some());
    }

    #[test]
    fn a_late_reply_reaches_no_session_at_another_local_address() {
        let ports = Arc::new(ClientPorts::default());
        let take = |now, local| ports.take(now, &key(1, local), server(1));
        drop(take(Instant::now(), 53).unwrap());
        let now = Instant::now();
        assert!(take(now, 54).is_none());
        // Its own may go on, and its rest starts again.
        drop(take(now, 53).unwrap());
        assert!(take(now + MIN_REST / 2, 54).is_none());
        assert!(take(Instant::now() + MIN_REST, 54).is_some());
    }

    #[test]
    fn a_port_that_is_given_back_often_is_queued_once() {
        let ports = Arc::new(ClientPorts::default());
        let now = Instant::now();
        for _ in 0..1000 {
            drop(ports.take(now, &key(1, 53), server(1)).unwrap());
        }
        assert_eq!(ports.lock().resting.len(), 1);
        // Taken again when it is looked at, and given back after that.
        let later = Instant::now() + MIN_REST;
        let port = ports.take(later, &key(1, 53), server(1)).unwrap();
        assert!(ports.is_taken(later + MIN_REST, key(1, 53).client.0, server(1)));
        drop(port);
        assert_eq!(ports.lock().resting.len(), 1);
        assert!(!ports.is_taken(Instant::now() + MIN_REST, key(1, 53).client.0, server(1)));
        assert!(ports.lock().uses.is_empty());
    }

    #[test]
    fn new_ports_are_refused_beyond_the_bound() {
        let ports = Arc::new(ClientPorts::default());
        let take = |now, ip: u32| {
            let client = ClientAddr((ip.to_be_bytes(), 1).into());
            let local = key(1, 53).local;
            ports.take(now, &Key::direct(client, local), server(1))
        };
        let now = Instant::now();
        let most = u32::try_from(MAX_PORTS).unwrap();
        assert!((0..most).all(|ip| take(now, ip).is_some()));
        assert!(take(now, most).is_none());
        // One that rests may be its own client's again.
        assert!(take(now, 0).is_some());
        assert!(ports.is_taken(now, ([0, 0, 0, 0], 1).into(), server(1)));
        let rested = Instant::now() + MIN_REST;
        assert!(!ports.is_taken(rested, ([0, 0, 0, 0], 1).into(), server(1)));
        assert!(ports.lock().uses.is_empty());
        assert!(take(rested, most).is_some());
    }

    #[test]
    fn ports_that_rest_rest_in_another_process_too() {
        let (ports, now) = (Arc::<ClientPorts>::default(), Instant::now());
        let server = ServerAddr(([192, 0, 2, 1], 53).into());
        drop(ports.take(now, &key(1, 53), server).unwrap());
        let in_use = ports.take(now, &key(2, 53), server).unwrap();
        let resting = ports.resting(Instant::now());
        assert_eq!(resting.len(), 1);

        let next = Arc::<ClientPorts>::default();
        next.inherit(&resting, Instant::now());
        let now = Instant::now();
        // Another way would get late replies of the first one.
        assert!(next.take(now, &key(1, 54), server).is_none());
        assert!(next.take(now, &key(2, 54), server).is_some());
        assert!(next.take(now, &key(1, 53), server).is_some());
        assert!(next.take(now + 2 * MIN_REST, &key(1, 54), server).is_some());
        drop(in_use);
    }
}
