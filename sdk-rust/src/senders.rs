//! The senders that said a header a while ago, with the client that each named last: a
//! bounded table that forgets. It takes `now` as an argument and does no I/O.

use std::net::{IpAddr, SocketAddr};

use ahash::RandomState;
use hashlink::LinkedHashMap;

use crate::address::{Compact, Key, canonical, halves};
use crate::clock::{Span, Tick};
use crate::trust::RememberSenders;

/// The client of each sender, the sender that has been silent for longest first.
///
/// The hasher is keyed, since remote peers choose the addresses.
#[derive(Debug)]
pub(crate) struct Senders {
    table: LinkedHashMap<Sender, Said, RandomState>,
    idle: Span,
    max: usize,
}

/// A sender: its address and port, and the address of this host that it sends to, where
/// that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Sender {
    peer: Key,
    /// 0 if it is not known: no datagram is sent to the unspecified address.
    local: [u64; 2],
}

impl Sender {
    pub(crate) fn new(peer: SocketAddr, local: Option<IpAddr>) -> Self {
        Self {
            peer: canonical(peer).into(),
            local: local.map_or([0; 2], halves),
        }
    }
}

/// What a sender said last, and when its latest datagram came.
#[derive(Clone, Copy, Debug)]
struct Said {
    client: Compact,
    destination: Compact,
    heard: Tick,
}

impl Senders {
    /// An empty table of at most `max` senders, each forgotten after `idle` without a
    /// datagram.
    pub(crate) fn new(RememberSenders { idle, max }: RememberSenders) -> Self {
        Self {
            table: LinkedHashMap::with_hasher(RandomState::new()),
            idle: idle.into(),
            max,
        }
    }

    /// Notes that `sender` speaks for `client` from now on, which wrote to `destination`.
    /// `false` if there is no room for one more sender: those that are known keep their
    /// place, or a flood of new ones would cut them off.
    pub(crate) fn learn(
        &mut self,
        now: Tick,
        sender: Sender,
        client: SocketAddr,
        destination: SocketAddr,
    ) -> bool {
        // At most two for each sender added: the table shrinks back after a flood, and no
        // single datagram pays for it.
        if self.forget_first_if_due(now) {
            self.forget_first_if_due(now);
        }
        if self.table.len() >= self.max && !self.table.contains_key(&sender) {
            return false;
        }
        let said = Said {
            client: client.into(),
            destination: destination.into(),
            heard: now,
        };
        // `insert` moves a sender that is in the table to the back.
        self.table.insert(sender, said);
        true
    }

    /// The client that `sender` speaks for in a datagram without header, and the address
    /// that the client wrote to. `None` if it never said so, or has been silent since.
    pub(crate) fn client_of(
        &mut self,
        now: Tick,
        sender: &Sender,
    ) -> Option<(SocketAddr, SocketAddr)> {
        let said = self.table.to_back(sender)?;
        if now.is_past(said.heard, self.idle) {
            self.table.remove(sender);
            return None;
        }
        said.heard = now;
        Some((said.client.into(), said.destination.into()))
    }

    /// Forgets the client that `sender` speaks for.
    pub(crate) fn forget(&mut self, sender: &Sender) {
        self.table.remove(sender);
    }

    fn forget_first_if_due(&mut self, now: Tick) -> bool {
        let first = self.table.front();
        let due = first.is_some_and(|(_, said)| now.is_past(said.heard, self.idle));
        if due {
            self.table.pop_front();
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    const IDLE: Duration = Duration::from_secs(30);

    fn senders(max: usize) -> Senders {
        Senders::new(RememberSenders { idle: IDLE, max })
    }

    fn sender(port: u16) -> Sender {
        Sender::new(addr(port), None)
    }

    fn addr(port: u16) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, 1], port))
    }

    /// What `learn` and `client_of` say of the sender of this port, and of its client.
    fn learn(senders: &mut Senders, now: Instant, port: u16) -> bool {
        senders.learn(now.into(), sender(port), addr(port + 1000), addr(9))
    }

    fn knows(senders: &mut Senders, now: Instant, port: u16) -> bool {
        let said = senders.client_of(now.into(), &sender(port));
        assert!(said.is_none_or(|said| said == (addr(port + 1000), addr(9))));
        said.is_some()
    }

    #[test]
    fn idle_counts_from_the_latest_datagram() {
        let mut senders = senders(10);
        let mut now = Instant::now();
        assert!(learn(&mut senders, now, 1));
        for _ in 0..5 {
            now += IDLE - Duration::from_secs(1);
            assert!(knows(&mut senders, now, 1));
        }
        assert!(!knows(&mut senders, now + IDLE, 1));
        assert!(!knows(&mut senders, now, 1));
        assert!(senders.table.is_empty());
    }

    #[test]
    fn a_full_table_refuses_new_senders_and_keeps_those_it_has() {
        let mut senders = senders(2);
        let now = Instant::now();
        assert!(learn(&mut senders, now, 1) && learn(&mut senders, now, 2));
        assert!(!learn(&mut senders, now, 3));
        assert!(learn(&mut senders, now, 1));
        assert_eq!(
            [1, 2, 3].map(|port| knows(&mut senders, now, port)),
            [true, true, false]
        );
        let later = now + IDLE / 2;
        assert!(knows(&mut senders, later, 1));
        assert!(learn(&mut senders, now + IDLE, 3));
        assert_eq!(
            [1, 2, 3].map(|port| knows(&mut senders, now + IDLE, port)),
            [true, false, true]
        );
    }

    #[test]
    fn shrinks_back_after_a_flood() {
        let mut senders = senders(1000);
        let now = Instant::now();
        for port in 0..1000 {
            learn(&mut senders, now, port);
        }
        for _ in 0..600 {
            learn(&mut senders, now + IDLE, 1);
        }
        assert_eq!(senders.table.len(), 1);
    }

    #[test]
    fn senders_differ_by_the_address_that_they_send_to() {
        let mut senders = senders(10);
        let now = Instant::now().into();
        let to = |ip: &str| Sender::new(addr(1), Some(ip.parse().unwrap()));
        assert!(senders.learn(now, to("198.51.100.10"), addr(2), addr(9)));
        assert_eq!(senders.client_of(now, &to("198.51.100.11")), None);
        assert_eq!(senders.client_of(now, &sender(1)), None);
        let mapped = to("::ffff:198.51.100.10");
        assert_eq!(senders.client_of(now, &mapped), Some((addr(2), addr(9))));
    }

    /// The bound of the table times this is what a flood of senders can allocate.
    #[cfg(target_pointer_width = "64")]
    #[test]
    fn a_sender_takes_104_bytes_of_the_table() {
        let links = 2 * size_of::<usize>();
        assert_eq!(size_of::<(Sender, Said)>() + links, 104);
    }
}
