//! Which clients' own ports are in use towards which servers, by all workers
//! together. The kernel lets several sockets have one address and port; of two
//! that were also connected to the same server, it would give all replies to one.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::address::{ListenerAddr, ServerAddr};
use crate::session::{Key, LINGER};

/// Ports that rest at the most, so that clients that come and go take no memory
/// without end. Beyond it those that have rested for longest may be used again.
const MAX_RESTING: usize = 65_536;

/// Client and server.
type Pair = (SocketAddr, SocketAddr);

/// Client and server of each session that writes from the client's own port, and
/// of those that ended a moment ago. Looked at when one begins or ends.
#[derive(Debug, Default)]
pub struct Claims(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    holders: HashMap<Pair, Holder, ahash::RandomState>,
    /// In the order in which they were given back.
    resting: VecDeque<(Pair, Instant)>,
}

#[derive(Debug)]
struct Holder {
    /// What the client wrote to.
    local: ListenerAddr,
    /// When the claim was given back, if it was. A late reply would reach the next
    /// session, which may be the client's at the same local address alone.
    since: Option<Instant>,
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
    /// [`LINGER`] at another local address.
    pub(super) fn claim(
        self: &Arc<Self>,
        now: Instant,
        key: &Key,
        server: ServerAddr,
    ) -> Option<Claim> {
        let pair = (key.client.0, server.0);
        let mut state = self.lock();
        state.forget_rested(now);
        let is_free = state
            .holders
            .get(&pair)
            .is_none_or(|holder| holder.since.is_some() && holder.local == key.local);
        if !is_free {
            return None;
        }
        let holder = Holder {
            local: key.local,
            since: None,
        };
        state.holders.insert(pair, holder);
        Some(Claim {
            pair,
            of: Arc::clone(self),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn forget_rested(&mut self, now: Instant) {
        while let Some((pair, since)) = self.resting.front().copied()
            && (self.resting.len() > MAX_RESTING || now.saturating_duration_since(since) >= LINGER)
        {
            self.resting.pop_front();
            // It may have been taken again, and given back later.
            if let Entry::Occupied(entry) = self.holders.entry(pair)
                && entry.get().since == Some(since)
            {
                entry.remove();
            }
        }
    }

    fn give_back(&mut self, now: Instant, pair: Pair) {
        if let Some(holder) = self.holders.get_mut(&pair) {
            holder.since = Some(now);
            self.resting.push_back((pair, now));
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
        assert!(claim(now + LINGER / 2, 54).is_none());
        assert!(claim(Instant::now() + LINGER, 54).is_some());
    }

    #[test]
    fn what_rests_is_bounded_and_forgotten() {
        let mut state = State::default();
        let now = Instant::now();
        for n in 0..MAX_RESTING + 10 {
            let n = u32::try_from(n).unwrap();
            let pair = (SocketAddr::from((n.to_be_bytes(), 1)), server(1).0);
            let holder = Holder {
                local: key(1, 53).local,
                since: None,
            };
            state.holders.insert(pair, holder);
            state.give_back(now, pair);
        }
        assert_eq!(state.resting.len(), MAX_RESTING);
        assert_eq!(state.holders.len(), MAX_RESTING);
        state.forget_rested(now + LINGER);
        assert!(state.holders.is_empty() && state.resting.is_empty());
    }
}
