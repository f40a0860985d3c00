//! How many sessions there may be, of all workers together, and which new clients get
//! one while a flood of forged sources holds most of the sockets.

mod newcomers;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::client_limits::ClientPermit;
use newcomers::Newcomers;

/// Fewer sessions that were never answered are no flood, however few sockets there are.
const FLOOD: usize = 32;

/// What all workers together may hold: sessions, and the sockets of sessions
/// that are or were. Bounds what a flood of client addresses can take in
/// descriptors, ports and memory.
#[derive(Debug)]
pub struct Capacity {
    max_sessions: AtomicUsize,
    sessions: AtomicUsize,
    max_sockets: AtomicUsize,
    sockets: AtomicUsize,
    /// Sockets whose sessions were never answered, by servers that answer.
    unanswered: AtomicUsize,
    newcomers: Newcomers,
}

/// How much new sessions need the ports of ended ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// There are enough others: ports rest for [`MAX_REST`](crate::session::MAX_REST).
    None,
    /// Half of all sockets rest: ports may be used again after
    /// [`MIN_REST`](crate::session::MIN_REST).
    Supply,
    /// There is no other port: one may be used again before if every request was
    /// answered, and nothing more came within the time that its server usually takes.
    Now,
}

/// What is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// All sessions are taken.
    #[error("all sessions are taken")]
    Sessions,
    /// Sessions are free, but the sockets for them are with ended ones, whose ports
    /// rest.
    #[error("all sockets are with sessions and ended ones")]
    Sockets,
}

impl Capacity {
    /// Room for so many sessions, and for so many sockets of them and of ended ones.
    #[must_use]
    pub fn new(max_sessions: usize, max_sockets: usize) -> Arc<Self> {
        Arc::new(Self {
            max_sessions: AtomicUsize::new(max_sessions),
            sessions: AtomicUsize::new(0),
            max_sockets: AtomicUsize::new(max_sockets),
            sockets: AtomicUsize::new(0),
            unanswered: AtomicUsize::new(0),
            newcomers: Newcomers::new(Instant::now()),
        })
    }

    /// Sets other bounds. What is taken beyond them stays taken until it is given back.
    pub fn resize(&self, max_sessions: usize, max_sockets: usize) {
        self.max_sessions.store(max_sessions, Ordering::Relaxed);
        self.max_sockets.store(max_sockets, Ordering::Relaxed);
    }

    /// The most sessions there may be.
    #[must_use]
    pub fn max(&self) -> usize {
        self.max_sessions.load(Ordering::Relaxed)
    }

    /// How many there are.
    #[must_use]
    pub fn taken(&self) -> usize {
        self.sessions.load(Ordering::Relaxed)
    }

    /// Whether there may be another socket.
    #[must_use]
    pub fn has_sockets(&self) -> bool {
        self.sockets() < self.max_sockets()
    }

    /// How many sockets are with sessions, running and ended ones.
    #[must_use]
    pub fn sockets(&self) -> usize {
        self.sockets.load(Ordering::Relaxed)
    }

    /// The most sockets there may be.
    #[must_use]
    pub fn max_sockets(&self) -> usize {
        self.max_sockets.load(Ordering::Relaxed)
    }

    /// Which ports of ended sessions may be used again while so many sockets are
    /// taken.
    #[must_use]
    pub fn need(&self) -> Need {
        let resting = self.sockets().saturating_sub(self.taken());
        if resting.saturating_mul(2) < self.max_sockets() {
            Need::None
        } else {
            Need::Supply
        }
    }

    /// Whether ended sessions hold so many sockets that they should be closed even
    /// though no new session of their server takes them over: those of another one, or
    /// of another worker, could need them.
    #[must_use]
    pub fn is_nearly_used_up(&self) -> bool {
        let (sockets, max) = (self.sockets(), self.max_sockets());
        let resting = sockets.saturating_sub(self.taken());
        resting.saturating_mul(8) > max.saturating_mul(5) || sockets >= max - max / 16
    }

    /// Whether half of all sockets are with sessions that were never answered, by
    /// servers that answer others or are to. It takes a flood of forged sources.
    #[must_use]
    pub fn is_flooded(&self) -> bool {
        let half = self.max_sockets().div_ceil(2);
        self.unanswered.load(Ordering::Relaxed) >= half.max(FLOOD)
    }

    /// Whether a new client gets a socket while they are [flooded](Self::is_flooded):
    /// those get the last quarter whose address was answered lately, others must have
    /// asked a moment ago.
    #[must_use]
    pub fn admits(&self, now: Instant, client: IpAddr) -> bool {
        if self.newcomers.was_answered(client) {
            return true;
        }
        let asks_again = self.newcomers.asks_again(now, client);
        let unanswered = self.unanswered.load(Ordering::Relaxed);
        asks_again && unanswered < self.max_sockets() - self.max_sockets() / 4
    }

    /// Whether all sessions are taken.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.taken() >= self.max()
    }

    /// Takes the permit for a session and its socket.
    ///
    /// # Errors
    ///
    /// What is used up.
    pub fn take(self: &Arc<Self>) -> Result<Permit, Full> {
        if !add_one(&self.sessions, &self.max_sessions) {
            return Err(Full::Sessions);
        }
        if !add_one(&self.sockets, &self.max_sockets) {
            self.sessions.fetch_sub(1, Ordering::Relaxed);
            return Err(Full::Sockets);
        }
        Ok(Permit {
            capacity: Arc::clone(self),
            held: Some(Held {
                is_resting: false,
                is_unanswered: false,
            }),
            client: None,
        })
    }
}

fn add_one(number: &AtomicUsize, max: &AtomicUsize) -> bool {
    let max = max.load(Ordering::Relaxed);
    number
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
            (n < max).then_some(n + 1)
        })
        .is_ok()
}

/// The right to one session and to its socket, given back when dropped.
#[derive(Debug)]
pub struct Permit {
    capacity: Arc<Capacity>,
    /// `None` once a table keeps it.
    held: Option<Held>,
    /// The client's part.
    client: Option<ClientPermit>,
}

impl Permit {
    /// With the client's right to the session, given back when that ends.
    #[must_use]
    pub fn of_client(mut self, client: Option<ClientPermit>) -> Self {
        self.client = client;
        self
    }

    /// Takes it apart, for a session that keeps its parts. `None` if it is a permit of
    /// another `capacity`, which that must not be given back to.
    pub(crate) fn into_parts(
        mut self,
        capacity: &Arc<Capacity>,
    ) -> Option<(Held, Option<ClientPermit>)> {
        let is_of_it = Arc::ptr_eq(&self.capacity, capacity);
        let held = self.held.take_if(|_| is_of_it)?;
        Some((held, self.client.take()))
    }

    #[cfg(test)]
    pub(crate) fn rest(&mut self) {
        let held = self.held.as_mut();
        held.expect("a permit that no table keeps")
            .rest(&self.capacity);
    }

    /// Takes a session for a socket that rested.
    ///
    /// # Errors
    ///
    /// [`Full::Sessions`]; the socket's part is given back, too.
    pub fn renew(mut self) -> Result<Self, Full> {
        if let Some(held) = &mut self.held {
            held.forget_answer(&self.capacity);
            if held.is_resting {
                if !add_one(&self.capacity.sessions, &self.capacity.max_sessions) {
                    return Err(Full::Sessions);
                }
                held.is_resting = false;
            }
        }
        Ok(self)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(held) = self.held.take() {
            held.give_back(&self.capacity);
        }
    }
}

/// What a session keeps of its [`Permit`]: two bytes. Whose capacity it is, is known to the
/// session's table, which must give it back.
#[derive(Debug)]
#[must_use]
pub(crate) struct Held {
    /// The session has ended.
    is_resting: bool,
    /// The session's first answer is awaited.
    is_unanswered: bool,
}

impl Held {
    /// Makes it a permit again, without the client's part.
    pub(crate) fn into_permit(self, capacity: &Arc<Capacity>) -> Permit {
        Permit {
            capacity: Arc::clone(capacity),
            held: Some(self),
            client: None,
        }
    }

    /// Counts among those that await an answer.
    pub(crate) fn await_answer(&mut self, capacity: &Capacity) {
        if !std::mem::replace(&mut self.is_unanswered, true) {
            capacity.unanswered.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Notes that the session of this client was answered.
    pub(crate) fn note_answer(&mut self, capacity: &Capacity, client: IpAddr) {
        self.forget_answer(capacity);
        capacity.newcomers.note_answer(client);
    }

    fn forget_answer(&mut self, capacity: &Capacity) {
        if std::mem::replace(&mut self.is_unanswered, false) {
            capacity.unanswered.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Gives the session back and keeps its socket.
    pub(crate) fn rest(&mut self, capacity: &Capacity) {
        if !std::mem::replace(&mut self.is_resting, true) {
            capacity.sessions.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Gives all back.
    pub(crate) fn give_back(mut self, capacity: &Capacity) {
        self.rest(capacity);
        self.forget_answer(capacity);
        capacity.sockets.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_leaves_sockets_to_those_who_are_answered() {
        let now = Instant::now();
        let ip =
            |number: u16| IpAddr::from([192, 0, number.to_be_bytes()[0], number.to_be_bytes()[1]]);
        let capacity = Capacity::new(100, 100);
        let taken = || capacity.take().unwrap().into_parts(&capacity).unwrap().0;
        let mut answered = taken();
        answered.await_answer(&capacity);
        answered.note_answer(&capacity, ip(1));
        let mut permits = Vec::new();
        let mut flood = |capacity: &Arc<Capacity>, sources: std::ops::Range<u16>| {
            for source in sources {
                if !capacity.is_flooded() || capacity.admits(now, ip(source)) {
                    let mut held = taken();
                    held.await_answer(capacity);
                    held.rest(capacity);
                    permits.push(held);
                }
            }
            permits.len()
        };
        assert_eq!(flood(&capacity, 1000..2000), 50);
        assert!(capacity.is_flooded());
        // Those that ask again get as far as the part of the others.
        assert_eq!(flood(&capacity, 1000..2000), 75);
        assert_eq!(flood(&capacity, 1000..2000), 75);
        assert!(capacity.admits(now, ip(1)) && capacity.admits(now, ip(1)));
        assert!(!capacity.admits(now, ip(1)));
        let again = permits.remove(0).into_permit(&capacity).renew().unwrap();
        permits[0].note_answer(&capacity, ip(2));
        assert_eq!(capacity.unanswered.load(Ordering::Relaxed), 73);
        assert!(capacity.admits(now, ip(1)));
        drop(again);
        permits.push(answered);
        permits
            .into_iter()
            .for_each(|held| held.give_back(&capacity));
        assert_eq!(capacity.unanswered.load(Ordering::Relaxed), 0);
        assert!(!capacity.is_flooded());
    }

    #[test]
    fn a_permit_of_another_capacity_is_given_back_to_its_own() {
        let (one, other) = (Capacity::new(1, 1), Capacity::new(1, 1));
        assert!(one.take().unwrap().into_parts(&other).is_none());
        assert_eq!((one.taken(), one.sockets()), (0, 0));
        let (held, _) = one.take().unwrap().into_parts(&one).unwrap();
        assert_eq!((one.taken(), one.sockets()), (1, 1));
        held.give_back(&one);
        assert_eq!((one.taken(), one.sockets()), (0, 0));
    }

    #[test]
    fn an_ended_session_keeps_its_socket_and_nothing_else() {
        let capacity = Capacity::new(3, 4);
        let mut permits: Vec<_> = (0..3).map(|_| capacity.take().unwrap()).collect();
        assert_eq!(capacity.take().err(), Some(Full::Sessions));
        permits[0].rest();
        permits.push(capacity.take().unwrap());
        permits[1].rest();
        assert_eq!(capacity.take().err(), Some(Full::Sockets));
        assert_eq!((capacity.taken(), capacity.sockets()), (2, 4));
        let again = permits.remove(0).renew().unwrap();
        permits.push(again);
        assert_eq!((capacity.taken(), capacity.sockets()), (3, 4));
        assert_eq!(permits.remove(0).renew().err(), Some(Full::Sessions));
        assert_eq!((capacity.taken(), capacity.sockets()), (3, 3));
        drop(permits);
        assert_eq!((capacity.taken(), capacity.sockets()), (0, 0));
    }
}
