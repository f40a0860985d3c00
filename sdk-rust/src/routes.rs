//! Which address a reply to a client goes to: a bounded table that forgets.
//! It takes `now` as an argument and does no I/O.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ahash::RandomState;
use hashlink::LinkedHashMap;

use crate::Way;
use crate::clock::{Span, Tick};

/// For how long after its own latest datagram a client can still be sent to
/// through a proxy's address that has named another client since: 10 seconds.
///
/// A proxy that gives each client an address of its own hands it on to the next
/// one some time after the last datagram; a reply sent later would reach that
/// next client. Some senders, such as dnsdist, serve many clients from one
/// address, and have their replies within this time.
pub const FORMER_CLIENT_GRACE: Duration = Duration::from_secs(10);

/// The latest way to each client, ordered by when the client was last heard,
/// the longest unheard-of first.
///
/// The hashers are keyed, since remote peers choose the addresses.
#[derive(Debug)]
pub(crate) struct Routes {
    ways: LinkedHashMap<Client, Heard, RandomState>,
    /// The client that each proxy address named last, for as long as that is the
    /// client's latest way: exactly the entries that are [`Reached::ByProxy`], so
    /// that it is never larger than `ways`.
    named_last: HashMap<Client, Client, RandomState>,
    max_clients: usize,
    forget_after: Span,
    grace: Span,
}

/// An address as numbers, which are compared and hashed in no time: every
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
    local: Option<IpAddr>,
    reached: Reached,
    at: Tick,
}

/// How a reply reaches a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reached {
    /// By a proxy's address, which has named no other client since.
    ByProxy,
    /// By a proxy's address, which has named another client since.
    BySharedProxy,
    /// The peer is the client itself.
    Directly,
    /// Past the proxy, from the listener's address.
    FromListener,
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
            named_last: HashMap::with_hasher(RandomState::new()),
            max_clients,
            forget_after: forget_after.into(),
            grace: FORMER_CLIENT_GRACE.into(),
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
        let via = way.from.unwrap_or(way.to);
        let (client, peer) = (Client::from(client), Client::from(via));
        let reached = match way.from {
            Some(_) => Reached::FromListener,
            None if peer == client => Reached::Directly,
            None => Reached::ByProxy,
        };
        let at = now;
        // `insert` moves a client that is there already to the back.
        let before = self.ways.insert(
            client,
            Heard {
                via,
                local: way.local,
                reached,
                at,
            },
        );
        let known = before.is_some_and(|before| {
            let known = before.reached == Reached::ByProxy
                && reached == Reached::ByProxy
                && Client::from(before.via) == peer;
            if !known {
                self.no_longer_named_last(&before);
            }
            known
        });
        if reached == Reached::ByProxy
            && !known
            && let Some(former) = self.named_last.insert(peer, client)
            && let Some(former) = self.ways.get_mut(&former)
        {
            former.reached = Reached::BySharedProxy;
        }
        let over = self.ways.len() > self.max_clients;
        if over {
            self.forget_first();
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
        match heard.reached {
            Reached::BySharedProxy if now.is_past(heard.at, self.grace) => None,
            Reached::ByProxy | Reached::BySharedProxy | Reached::Directly => {
                Some(Way::back_from(heard.local, heard.via))
            }
            Reached::FromListener => Some(Way::from_listener(heard.via, client)),
        }
    }

    /// Whether `client` is remembered, though there may be no way to it any more.
    #[inline]
    pub(crate) fn remembers(&self, now: Tick, client: SocketAddr) -> bool {
        let heard = self.ways.get(&Client::from(client));
        heard.is_some_and(|heard| !self.expired(now, heard))
    }

    /// Clients that are remembered. The others are forgotten, each once.
    pub(crate) fn count_known(&mut self, now: Tick) -> usize {
        while self.forget_first_if_due(now) {}
        self.len()
    }

    /// Clients in the table. Some may be past their time.
    fn len(&self) -> usize {
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
            self.forget_first();
        }
        due
    }

    fn forget_first(&mut self) {
        if let Some((_, heard)) = self.ways.pop_front() {
            self.no_longer_named_last(&heard);
        }
    }

    /// Of a client that is gone, or is reached by another way now.
    fn no_longer_named_last(&mut self, gone: &Heard) {
        if gone.reached == Reached::ByProxy {
            self.named_last.remove(&Client::from(gone.via));
        }
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

    /// Through a port of a proxy.
    fn way(port: u16) -> Way {
        Way::back(SocketAddr::from(([192, 0, 2, 2], port)))
    }

    #[test]
    fn remembers_which_listener_answers() {
        let (now, ..) = times();
        let mut routes = Routes::new(2, MINUTE);
        let straight = Way::from_listener(addr(9000), addr(1));
        let _ = routes.learn(now, addr(1), straight);
        let _ = routes.learn(now, addr(2), way(102));
        assert_eq!(routes.get(now, addr(1)), Some(straight));
        assert_eq!(routes.get(now, addr(2)), Some(way(102)));
    }

    #[test]
    fn at_the_bound_the_longest_unheard_of_goes() {
        let (now, ..) = times();
        let mut routes = Routes::new(3, MINUTE);
        for client in [1, 2, 3] {
            assert_eq!(routes.learn(now, addr(client), way(100)), Evicted(false));
        }
        // Heard again, so that 2 is now the oldest.
        assert_eq!(routes.learn(now, addr(1), way(101)), Evicted(false));

        assert_eq!(routes.learn(now, addr(4), way(104)), Evicted(true));

        assert_eq!(routes.len(), 3);
        let known = |client| routes.get(now, addr(client)).is_some();
        assert_eq!([1, 2, 3, 4].map(known), [true, false, true, true]);
    }

    #[test]
    fn looking_a_client_up_does_not_prolong_it() {
        let (now, half, later) = times();
        let mut routes = Routes::new(2, MINUTE);
        let _ = routes.learn(now, addr(1), way(101));
        let _ = routes.learn(now, addr(2), way(102));
        assert!(routes.get(now, addr(1)).is_some());
        let _ = routes.learn(now, addr(3), way(103));
        assert_eq!(routes.get(now, addr(1)), None);
        assert!(routes.get(half, addr(2)).is_some());
        assert_eq!(routes.get(later, addr(2)), None);
    }

    #[test]
    fn an_expired_client_makes_room_without_being_evicted() {
        let (now, half, later) = times();
        let mut routes = Routes::new(2, MINUTE);
        let _ = routes.learn(now, addr(1), way(101));
        let _ = routes.learn(half, addr(2), way(102));
        assert_eq!(routes.learn(later, addr(3), way(103)), Evicted(false));
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
            let _ = routes.learn(later, addr(1), way(101));
        }
        assert_eq!(routes.len(), 1);
    }

    /// Clients that come by ever other addresses of a proxy, and then by one.
    #[test]
    fn the_index_of_addresses_is_never_larger_than_the_table() {
        let (now, _, later) = times();
        let mut routes = Routes::new(100, MINUTE);
        for number in 0..60_000u16 {
            let _ = routes.learn(now, addr(number % 150), way(number));
            assert!(routes.named_last.len() <= routes.len());
        }
        for number in 0..200 {
            let _ = routes.learn(now, addr(number), way(1));
        }
        assert_eq!((routes.len(), routes.named_last.len()), (100, 1));
        for _ in 0..100 {
            let _ = routes.learn(later, addr(1), Way::back(addr(1)));
        }
        assert_eq!((routes.len(), routes.named_last.len()), (1, 0));
    }

    #[test]
    fn those_past_their_time_are_not_counted() {
        let (now, half, later) = times();
        let mut routes = Routes::new(10, MINUTE);
        for (at, client) in [(now, 1), (now, 2), (half, 3)] {
            let _ = routes.learn(at, addr(client), way(100 + client));
        }
        assert_eq!(routes.count_known(half), 3);
        assert_eq!(routes.count_known(later), 1);
        assert_eq!(routes.named_last.len(), 1);
    }

    #[test]
    fn a_time_that_runs_backwards_forgets_nobody() {
        let start = Instant::now();
        let [earlier, now] = [start, start + MINUTE].map(Tick::from);
        let mut routes = Routes::new(2, MINUTE);
        let _ = routes.learn(now, addr(1), way(101));
        let _ = routes.learn(earlier, addr(2), way(102));
        assert!(routes.get(earlier, addr(1)).is_some());
        assert!(routes.get(earlier, addr(2)).is_some());
    }
}
