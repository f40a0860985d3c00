//! Which address a reply to a client goes to: a bounded table that forgets.
//! It takes `now` as an argument and does no I/O.

use std::net::SocketAddr;
use std::time::Duration;

use ahash::RandomState;
use hashlink::LinkedHashMap;

use crate::Way;
use crate::clock::{Span, Tick};

/// The latest way to each client, ordered by when the client was last heard,
/// the longest unheard-of first.
///
/// The hasher is keyed, since remote peers choose the addresses.
#[derive(Debug)]
pub(crate) struct Routes {
    ways: LinkedHashMap<Client, Heard, RandomState>,
    max_clients: usize,
    forget_after: Span,
}

/// A client's address as numbers, which are compared and hashed in no time: every
/// datagram pays for it twice. An IPv4 one stands there mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Client {
    ip: u128,
    /// The scope of a link-local address, too.
    port: u64,
}

impl From<SocketAddr> for Client {
    #[inline]
    fn from(address: SocketAddr) -> Self {
        match address {
            SocketAddr::V4(v4) => Self {
                ip: 0xffff << 32 | u128::from(v4.ip().to_bits()),
                port: v4.port().into(),
            },
            SocketAddr::V6(v6) => Self {
                ip: v6.ip().to_bits(),
                port: u64::from(v6.scope_id()) << 16 | u64::from(v6.port()),
            },
        }
    }
}

/// How a client was heard, in less room than its [`Way`] takes.
#[derive(Debug)]
struct Heard {
    /// The peer, or the listener that the client is answered from.
    via: SocketAddr,
    by_listener: bool,
    at: Tick,
}

/// Whether a client that was still to be remembered had to make room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct Evicted(pub(crate) bool);

impl Routes {
    /// An empty table for at most `max_clients`, each forgotten when not heard
    /// for `forget_after`.
    pub(crate) fn new(max_clients: usize, forget_after: Duration) -> Self {
        Self {
            ways: LinkedHashMap::with_hasher(RandomState::new()),
            max_clients,
            forget_after: forget_after.into(),
        }
    }

    /// Notes the way to `client`, which was just heard. It replaces any earlier one.
    #[inline]
    pub(crate) fn learn(&mut self, now: Tick, client: SocketAddr, way: Way) -> Evicted {
        // Two at most for each one added: the table shrinks back after a flood,
        // and no single datagram pays for it.
        if self.forget_first_if_due(now) {
            self.forget_first_if_due(now);
        }
        // `insert` moves a client that is there already to the back.
        let heard = Heard {
            via: way.from.unwrap_or(way.to),
            by_listener: way.from.is_some(),
            at: now,
        };
        self.ways.insert(Client::from(client), heard);
        let over = self.ways.len() > self.max_clients;
        if over {
            self.ways.pop_front();
        }
        Evicted(over)
    }

    /// The way to `client`, unless it was not heard for too long.
    #[inline]
    pub(crate) fn get(&self, now: Tick, client: SocketAddr) -> Option<Way> {
        let heard = self.ways.get(&Client::from(client))?;
        if self.expired(now, heard) {
            return None;
        }
        Some(if heard.by_listener {
            Way {
                to: client,
                from: Some(heard.via),
            }
        } else {
            Way::back(heard.via)
        })
    }

    /// Clients in the table. Some may be past their time.
    pub(crate) fn len(&self) -> usize {
        self.ways.len()
    }

    /// Forgets the longest unheard-of client if it is time, and returns whether
    /// it was.
    fn forget_first_if_due(&mut self, now: Tick) -> bool {
        let due = match self.ways.front() {
            Some((_, heard)) => self.expired(now, heard),
            None => false,
        };
        if due {
            self.ways.pop_front();
        }
        due
    }

    /// Threads that share the table may hand in times a little out of order;
    /// one that lies ahead of `now` counts as just heard.
    fn expired(&self, now: Tick, heard: &Heard) -> bool {
        now.is_past(heard.at, self.forget_after)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    /// Now, in half a minute, and in a minute.
    fn times() -> (Tick, Tick, Tick) {
        let now = Instant::now();
        (now.into(), (now + MINUTE / 2).into(), (now + MINUTE).into())
    }

    fn addr(port: u16) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, 1], port))
    }

    fn way(port: u16) -> Way {
        Way::back(addr(port))
    }

    #[test]
    fn remembers_which_listener_answers() {
        let (now, ..) = times();
        let mut routes = Routes::new(2, MINUTE);
        let straight = Way {
            to: addr(1),
            from: Some(addr(9000)),
        };
        let _ = routes.learn(now, addr(1), straight);
        let _ = routes.learn(now, addr(2), way(100));
        assert_eq!(routes.get(now, addr(1)), Some(straight));
        assert_eq!(routes.get(now, addr(2)), Some(way(100)));
    }

    #[test]
    fn at_the_bound_the_longest_unheard_of_goes() {
        let (now, ..) = times();
        let mut routes = Routes::new(3, MINUTE);
        for client in [1, 2, 3] {
            assert_eq!(routes.learn(now, addr(client), way(100)), Evicted(false));
        }
        // Heard again, so that 2 is now the oldest.
        assert_eq!(routes.learn(now, addr(1), way(100)), Evicted(false));

        assert_eq!(routes.learn(now, addr(4), way(100)), Evicted(true));

        assert_eq!(routes.len(), 3);
        let known = |client| routes.get(now, addr(client)).is_some();
        assert_eq!([1, 2, 3, 4].map(known), [true, false, true, true]);
    }

    #[test]
    fn looking_a_client_up_does_not_prolong_it() {
        let (now, half, later) = times();
        let mut routes = Routes::new(2, MINUTE);
        let _ = routes.learn(now, addr(1), way(100));
        let _ = routes.learn(now, addr(2), way(100));
        assert!(routes.get(now, addr(1)).is_some());
        let _ = routes.learn(now, addr(3), way(100));
        assert_eq!(routes.get(now, addr(1)), None);
        assert!(routes.get(half, addr(2)).is_some());
        assert_eq!(routes.get(later, addr(2)), None);
    }

    #[test]
    fn an_expired_client_makes_room_without_being_evicted() {
        let (now, half, later) = times();
        let mut routes = Routes::new(2, MINUTE);
        let _ = routes.learn(now, addr(1), way(100));
        let _ = routes.learn(half, addr(2), way(100));
        assert_eq!(routes.learn(later, addr(3), way(100)), Evicted(false));
        assert!(routes.get(later, addr(2)).is_some());
    }

    #[test]
    fn shrinks_back_after_a_flood() {
        let (now, _, later) = times();
        let mut routes = Routes::new(1000, MINUTE);
        for client in 0..1000 {
            let _ = routes.learn(now, addr(client), way(100));
        }
        for _ in 0..600 {
            let _ = routes.learn(later, addr(1), way(100));
        }
        assert_eq!(routes.len(), 1);
    }

    #[test]
    fn a_time_that_runs_backwards_forgets_nobody() {
        let start = Instant::now();
        let [earlier, now] = [start, start + MINUTE].map(Tick::from);
        let mut routes = Routes::new(2, MINUTE);
        let _ = routes.learn(now, addr(1), way(100));
        let _ = routes.learn(earlier, addr(2), way(100));
        assert!(routes.get(earlier, addr(1)).is_some());
        assert!(routes.get(earlier, addr(2)).is_some());
    }
}
