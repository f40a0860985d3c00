//! The clients that a socket remembers, with the reply path to each: a bounded table
//! that forgets. It takes `now` as an argument and does no I/O.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ahash::RandomState;
use hashlink::LinkedHashMap;

use crate::ReplyPath;
use crate::address::Key;
use crate::clock::{Span, Tick};
use crate::reply_path::Naming;

/// For how long after its own latest datagram a client can still be sent to
/// through a proxy's address that has named another client since: 10 seconds.
///
/// A proxy that gives each client an address of its own hands it on to the next
/// client some time after the last datagram. A later reply would reach that next
/// client. Some senders, such as dnsdist, serve many clients from one address, and
/// have their replies within this time.
///
/// A reply to a datagram that came with a reply tag or an SPP header names its client, so
/// its proxy's address may name any number of clients, and this time doesn't apply.
pub const FORMER_CLIENT_GRACE: Duration = Duration::from_secs(10);

/// The latest reply path to each client, the client that has been silent for longest
/// first.
///
/// The hashers are keyed, since remote peers choose the addresses.
#[derive(Debug)]
pub(crate) struct Clients {
    table: LinkedHashMap<Key, Known, RandomState>,
    /// The client that each proxy address named last, while that is the client's
    /// latest path: exactly the entries that are [`Reached::ByProxy`]. So it is never
    /// larger than `table`.
    named_last: HashMap<Key, Key, RandomState>,
    max_clients: usize,
    forget_after: Span,
}

/// The reply path to a client, in less room than a [`ReplyPath`] takes.
#[derive(Debug)]
struct Known {
    /// The peer, or the listener that the client is answered from.
    via: SocketAddr,
    local: Option<IpAddr>,
    reached: Reached,
    heard: Tick,
}

/// How a reply reaches a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reached {
    /// Through a proxy's address, which has named no other client since.
    ByProxy,
    /// Through a proxy's address, which has named another client since.
    ByFormerProxy,
    /// The peer is the client itself.
    Directly,
    /// Past the proxy, from the listener's address.
    FromListener,
    /// Through a proxy's address that may name any number of clients, since the reply
    /// says which client it is for.
    Named(Naming),
}

/// Whether a client was forgotten before its time to make room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct Evicted(pub(crate) bool);

impl Clients {
    /// An empty table of at most `max_clients`, each forgotten after `forget_after`
    /// of silence.
    pub(crate) fn new(max_clients: usize, forget_after: Duration) -> Self {
        Self {
            table: LinkedHashMap::with_hasher(RandomState::new()),
            named_last: HashMap::with_hasher(RandomState::new()),
            max_clients,
            forget_after: forget_after.into(),
        }
    }

    /// Notes the path to a client that was just heard. It replaces any earlier one.
    #[inline]
    pub(crate) fn learn(&mut self, path: &ReplyPath) -> Evicted {
        // At most two for each client added: the table shrinks back after a flood,
        // and no single datagram pays for it.
        if self.forget_first_if_due(path.heard) {
            self.forget_first_if_due(path.heard);
        }
        let via = path.from.unwrap_or(path.to);
        let (client, peer) = (Key::from(path.client), Key::from(via));
        let reached = match (path.from, path.naming) {
            (Some(_), _) => Reached::FromListener,
            (None, Some(naming)) => Reached::Named(naming),
            (None, None) if peer == client => Reached::Directly,
            (None, None) => Reached::ByProxy,
        };
        let known = Known {
            via,
            local: path.local,
            reached,
            heard: path.heard,
        };
        // `insert` moves a client that is in the table to the back.
        let before = self.table.insert(client, known);
        let unchanged = before.is_some_and(|before| {
            let unchanged = before.reached == Reached::ByProxy
                && reached == Reached::ByProxy
                && Key::from(before.via) == peer;
            if !unchanged {
                self.release_proxy(&before);
            }
            unchanged
        });
        let former = match reached {
            Reached::ByProxy if !unchanged => self.named_last.insert(peer, client),
            // A client that this address named before, whose replies don't name it, would
            // get a bare reply, and the address may be another client's by now.
            Reached::Named(_) if !self.named_last.is_empty() => self.named_last.remove(&peer),
            Reached::ByProxy
            | Reached::ByFormerProxy
            | Reached::Directly
            | Reached::FromListener
            | Reached::Named(_) => None,
        };
        if let Some(former) = former
            && let Some(former) = self.table.get_mut(&former)
        {
            former.reached = Reached::ByFormerProxy;
        }
        let over = self.table.len() > self.max_clients;
        if over {
            self.forget_first();
        }
        Evicted(over)
    }

    /// The path to `client`, unless the client has been silent for too long.
    #[inline]
    pub(crate) fn path(&self, now: Tick, client: SocketAddr) -> Option<ReplyPath> {
        let known = self.table.get(&Key::from(client))?;
        let former = known.reached == Reached::ByFormerProxy;
        if self.is_expired(now, known)
            || former && now.is_past(known.heard, FORMER_CLIENT_GRACE.into())
        {
            return None;
        }
        let from_listener = known.reached == Reached::FromListener;
        Some(ReplyPath {
            to: if from_listener { client } else { known.via },
            from: from_listener.then_some(known.via),
            local: known.local,
            client,
            heard: known.heard,
            naming: match known.reached {
                Reached::Named(naming) => Some(naming),
                Reached::ByProxy
                | Reached::ByFormerProxy
                | Reached::Directly
                | Reached::FromListener => None,
            },
        })
    }

    /// Whether `client` is remembered, even if there is no path to it any more.
    #[inline]
    pub(crate) fn remembers(&self, now: Tick, client: SocketAddr) -> bool {
        let known = self.table.get(&Key::from(client));
        known.is_some_and(|known| !self.is_expired(now, known))
    }

    /// How many clients are remembered. Those whose time is over are forgotten.
    pub(crate) fn count(&mut self, now: Tick) -> usize {
        while self.forget_first_if_due(now) {}
        self.table.len()
    }

    /// Forgets the client that has been silent for longest if its time is over, and
    /// returns whether it was.
    fn forget_first_if_due(&mut self, now: Tick) -> bool {
        let first = self.table.front();
        let due = first.is_some_and(|(_, known)| self.is_expired(now, known));
        if due {
            self.forget_first();
        }
        due
    }

    fn forget_first(&mut self) {
        if let Some((_, known)) = self.table.pop_front() {
            self.release_proxy(&known);
        }
    }

    /// Forgets which client a proxy's address named last, once that client is gone or
    /// has another path.
    fn release_proxy(&mut self, gone: &Known) {
        if gone.reached == Reached::ByProxy {
            self.named_last.remove(&Key::from(gone.via));
        }
    }

    /// Threads that share the table may pass times slightly out of order; a time
    /// ahead of `now` counts as just heard.
    fn is_expired(&self, now: Tick, known: &Known) -> bool {
        now.is_past(known.heard, self.forget_after)
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

    /// The path of a datagram from `client` through a port of a proxy.
    fn path(heard: Tick, client: u16, port: u16) -> ReplyPath {
        let proxy = SocketAddr::from(([192, 0, 2, 2], port));
        ReplyPath::to_peer(proxy, None, addr(client), heard)
    }

    #[test]
    fn remembers_the_listener_that_answers() {
        let (now, ..) = times();
        let mut clients = Clients::new(2, MINUTE);
        let straight = ReplyPath::from_listener(addr(9000), addr(1), now);
        let _ = clients.learn(&straight);
        let _ = clients.learn(&path(now, 2, 102));
        assert_eq!(clients.path(now, addr(1)), Some(straight));
        assert_eq!(clients.path(now, addr(2)), Some(path(now, 2, 102)));
    }

    #[test]
    fn a_full_table_forgets_the_client_that_was_silent_for_longest() {
        let (now, ..) = times();
        let mut clients = Clients::new(3, MINUTE);
        for client in [1, 2, 3] {
            assert_eq!(clients.learn(&path(now, client, 100)), Evicted(false));
        }
        // Heard again, so that 2 is now the oldest.
        assert_eq!(clients.learn(&path(now, 1, 101)), Evicted(false));

        assert_eq!(clients.learn(&path(now, 4, 104)), Evicted(true));

        assert_eq!(clients.table.len(), 3);
        let known = |client| clients.path(now, addr(client)).is_some();
        assert_eq!([1, 2, 3, 4].map(known), [true, false, true, true]);
    }

    #[test]
    fn a_lookup_does_not_prolong_a_client() {
        let (now, half, later) = times();
        let mut clients = Clients::new(2, MINUTE);
        let _ = clients.learn(&path(now, 1, 101));
        let _ = clients.learn(&path(now, 2, 102));
        assert!(clients.path(now, addr(1)).is_some());
        let _ = clients.learn(&path(now, 3, 103));
        assert_eq!(clients.path(now, addr(1)), None);
        assert!(clients.path(half, addr(2)).is_some());
        assert_eq!(clients.path(later, addr(2)), None);
    }

    #[test]
    fn an_expired_client_makes_room_without_being_evicted() {
        let (now, half, later) = times();
        let mut clients = Clients::new(2, MINUTE);
        let _ = clients.learn(&path(now, 1, 101));
        let _ = clients.learn(&path(half, 2, 102));
        assert_eq!(clients.learn(&path(later, 3, 103)), Evicted(false));
        assert!(clients.path(later, addr(2)).is_some());
    }

    #[test]
    fn shrinks_back_after_a_flood() {
        let (now, _, later) = times();
        let mut clients = Clients::new(1000, MINUTE);
        for client in 0..1000 {
            let _ = clients.learn(&path(now, client, 100));
        }
        for _ in 0..600 {
            let _ = clients.learn(&path(later, 1, 101));
        }
        assert_eq!(clients.table.len(), 1);
    }

    /// Each datagram comes through another address of the proxy, then all through one.
    #[test]
    fn the_index_of_proxy_addresses_is_never_larger_than_the_table() {
        let (now, _, later) = times();
        let mut clients = Clients::new(100, MINUTE);
        for number in 0..60_000u16 {
            let _ = clients.learn(&path(now, number % 150, number));
            assert!(clients.named_last.len() <= clients.table.len());
        }
        for number in 0..200 {
            let _ = clients.learn(&path(now, number, 1));
        }
        assert_eq!((clients.table.len(), clients.named_last.len()), (100, 1));
        for _ in 0..100 {
            let _ = clients.learn(&ReplyPath::to_peer(addr(1), None, addr(1), later));
        }
        assert_eq!((clients.table.len(), clients.named_last.len()), (1, 0));
    }

    /// The bound of the table times this is what a flood of clients can allocate.
    #[cfg(target_pointer_width = "64")]
    #[test]
    fn a_client_takes_128_bytes_of_the_table() {
        let links = 2 * size_of::<usize>();
        assert_eq!(size_of::<(Key, Known)>() + links, 128);
    }

    /// Clients that no proxy address stands for need no second entry.
    #[test]
    fn clients_whose_replies_name_them_are_not_in_the_index_of_proxy_addresses() {
        let (now, _, _) = times();
        let mut clients = Clients::new(10, MINUTE);
        let tag = ppv2::ReplyTag::new(0, [7; 8]);
        for number in 0..6 {
            let _ = clients.learn(&path(now, number, 1));
            assert_eq!(clients.named_last.len(), 1);
            let naming = match number % 2 {
                0 => Naming::tag(addr(9), tag),
                _ => Naming::spp(addr(9)),
            };
            let named = ReplyPath {
                naming: Some(naming),
                ..path(now, number, 1)
            };
            let _ = clients.learn(&named);
            assert_eq!(clients.named_last.len(), 0);
            assert_eq!(
                clients.path(now, addr(number)).and_then(|path| path.naming),
                Some(naming)
            );
        }
    }

    #[test]
    fn expired_clients_are_not_counted() {
        let (now, half, later) = times();
        let mut clients = Clients::new(10, MINUTE);
        for (at, client) in [(now, 1), (now, 2), (half, 3)] {
            let _ = clients.learn(&path(at, client, 100 + client));
        }
        assert_eq!(clients.count(half), 3);
        assert_eq!(clients.count(later), 1);
        assert_eq!(clients.named_last.len(), 1);
    }

    #[test]
    fn a_time_that_runs_backwards_forgets_no_client() {
        let start = Instant::now();
        let [earlier, now] = [start, start + MINUTE].map(Tick::from);
        let mut clients = Clients::new(2, MINUTE);
        let _ = clients.learn(&path(now, 1, 101));
        let _ = clients.learn(&path(earlier, 2, 102));
        assert!(clients.path(earlier, addr(1)).is_some());
        assert!(clients.path(earlier, addr(2)).is_some());
    }
}
