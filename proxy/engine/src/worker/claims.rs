//! Which clients' own ports are in use towards which servers, by all workers
//! together. The kernel lets several sockets have one address and port; of two
//! that were also connected to the same server, it would give all replies to one.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::address::{ListenerAddr, ServerAddr};
use crate::session::{Key, MIN_REST};

/// Ports that are held or rest at most, so that clients that come and go take no memory
/// without end. Beyond it new ones are refused.
const MAX_HELD: usize = 262_144;

/// Client and server.
type Pair = (SocketAddr, SocketAddr);

/// Client and server of each session that writes from the client's own port, and
/// of those that ended a moment ago. Looked at when one begins or ends.
#[derive(Debug, Default)]
pub struct Claims(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    holders: HashMap<Pair, Holder, ahash::RandomState>,
    /// Pairs that rest or rested, each once, and since when; one that was taken again since
    /// is looked at once more.
    resting: VecDeque<(Pair, Instant)>,
}

#[derive(Debug)]
struct Holder {
    /// What the client wrote to.
    local: ListenerAddr,
    /// When the claim was given back, if it was. A late reply would reach the next
    /// session, which may be the client's at the same local address alone.
    since: Option<Instant>,
    /// Whether it is in `resting`.
    is_queued: bool,
}

impl Holder {
    /// Whether a late reply may still come for the session that had it.
    fn rests(&self, now: Instant) -> bool {
        let is_young = |since| now.saturating_duration_since(since) < MIN_REST;
        self.since.is_some_and(is_young)
    }
}

/// The right to write to a server from a client's own port, given back when
/// dropped.
#[derive(Debug)]
pub(super) struct Claim {
    pair: Pair,
    of: Arc<Claims>,
}

impl Claims {
    /// Takes the right; `None` if another session has it, or had it within
    /// [`MIN_REST`] at another local address.
    pub(super) fn claim(
        self: &Arc<Self>,
        now: Instant,
        key: &Key,
        server: ServerAddr,
    ) -> Option<Claim> {
        let pair = (key.client.0, server.0);
        let mut state = self.lock();
        state.forget_rested(now);
        let known = state.holders.get(&pair);
        let is_free = known.is_none_or(|holder| {
            holder.since.is_some() && (holder.local == key.local || !holder.rests(now))
        });
        let is_queued = known.is_some_and(|holder| holder.is_queued);
        if !is_free || known.is_none() && state.holders.len() >= MAX_HELD {
            return None;
        }
        let holder = Holder {
            local: key.local,
            since: None,
            is_queued,
        };
        state.holders.insert(pair, holder);
        Some(Claim {
            pair,
            of: Arc::clone(self),
        })
    }

    /// Whether a session writes to `server` from this address and port, as a client's
    /// own, or did within [`MIN_REST`].
    pub(super) fn is_taken(&self, now: Instant, source: SocketAddr, server: ServerAddr) -> bool {
        let mut state = self.lock();
        state.forget_rested(now);
        let holder = state.holders.get(&(source, server.0));
        holder.is_some_and(|holder| holder.since.is_none() || holder.rests(now))
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
            let Entry::Occupied(mut entry) = self.holders.entry(pair) else {
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
        if let Some(holder) = self.holders.get_mut(&pair) {
            holder.since = Some(now);
            if !std::mem::replace(&mut holder.is_queued, true) {
                self.resting.push_back((pair, now));
            }
        }
        self.forget_rested(now);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.of.lock().give_back(Instant::now(), self.pair);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::ClientAddr;

    fn key(client: u16, local: u16) -> Key {
        Key {
            client: ClientAddr(([203, 0, 113, 11], client).into()),
            local: ListenerAddr(([198, 51, 100, 10], local).into()),
        }
    }

    fn server(port: u16) -> ServerAddr {
        ServerAddr(([192, 0, 2, 1], port).into())
    }

    #[test]
    fn one_session_at_a_time_writes_to_a_server_from_a_clients_port() {
        let claims = Arc::new(Claims::default());
        let claim =
            |client, local, to| claims.claim(Instant::now(), &key(client, local), server(to));
        let first = claim(1, 53, 1).unwrap();
        assert!(claim(1, 53, 1).is_none());
        assert!(claim(2, 53, 1).is_some());
        assert!(claim(1, 53, 2).is_some());
        drop(first);
        assert!(claim(1, 53, 1).is_some());
    }

    #[test]
    fn a_late_reply_meets_no_session_at_another_local_address() {
        let claims = Arc::new(Claims::default());
        let claim = |now, local| claims.claim(now, &key(1, local), server(1));
        drop(claim(Instant::now(), 53).unwrap());
        let now = Instant::now();
        assert!(claim(now, 54).is_none());
        // Its own may go on, and rests anew.
        drop(claim(now, 53).unwrap());
        assert!(claim(now + MIN_REST / 2, 54).is_none());
        assert!(claim(Instant::now() + MIN_REST, 54).is_some());
    }

    #[test]
    fn a_port_that_is_given_back_again_and_again_is_noted_once() {
        let claims = Arc::new(Claims::default());
        let now = Instant::now();
        for _ in 0..1000 {
            drop(claims.claim(now, &key(1, 53), server(1)).unwrap());
        }
        assert_eq!(claims.lock().resting.len(), 1);
        // Taken again when it is looked at, and given back after that.
        let later = Instant::now() + MIN_REST;
        let claim = claims.claim(later, &key(1, 53), server(1)).unwrap();
        assert!(claims.is_taken(later + MIN_REST, key(1, 53).client.0, server(1)));
        drop(claim);
        assert_eq!(claims.lock().resting.len(), 1);
        assert!(!claims.is_taken(Instant::now() + MIN_REST, key(1, 53).client.0, server(1)));
        assert!(claims.lock().holders.is_empty());
    }

    #[test]
    fn new_ports_are_refused_when_as_many_rest_as_there_may() {
        let claims = Arc::new(Claims::default());
        let claim = |now, ip: u32| {
            let client = ClientAddr((ip.to_be_bytes(), 1).into());
            let local = key(1, 53).local;
            claims.claim(now, &Key { client, local }, server(1))
        };
        let now = Instant::now();
        let most = u32::try_from(MAX_HELD).unwrap();
        assert!((0..most).all(|ip| claim(now, ip).is_some()));
        assert!(claim(now, most).is_none());
        // One that rests may be its own client's again.
        assert!(claim(now, 0).is_some());
        assert!(claims.is_taken(now, ([0, 0, 0, 0], 1).into(), server(1)));
        let rested = Instant::now() + MIN_REST;
        assert!(!claims.is_taken(rested, ([0, 0, 0, 0], 1).into(), server(1)));
        assert!(claims.lock().holders.is_empty());
        assert!(claim(rested, most).is_some());
    }
}
