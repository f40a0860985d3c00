//! How many sessions there may be, of all workers together.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::ClientSeat;

/// What all workers together may hold: sessions, and the sockets of sessions
/// that are or were. Bounds what a flood of client addresses can take in
/// descriptors, ports and memory.
#[derive(Debug)]
pub struct Budget {
    max_sessions: AtomicUsize,
    sessions: AtomicUsize,
    max_sockets: AtomicUsize,
    sockets: AtomicUsize,
    /// Sessions with a socket of their own. Where others share, these must not
    /// have all sockets that there are, or none could rest.
    max_own: AtomicUsize,
    own: AtomicUsize,
}

/// What is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// All sessions are taken.
    #[error("all sessions are taken")]
    Sessions,
    /// Sessions are free, but the sockets for them are with ended ones;
    /// [`Table::reclaim`](super::Table::reclaim) can free one.
    #[error("all sockets are with sessions and ended ones")]
    Sockets,
}

impl Budget {
    /// A budget of so many sessions, and of so many sockets for them and for
    /// ended ones.
    #[must_use]
    pub fn new(max_sessions: usize, max_sockets: usize) -> Arc<Self> {
        Self::with_own(max_sessions, max_sockets, usize::MAX)
    }

    /// As [`new`](Self::new), with at most `max_own` sessions that have a socket
    /// of their own.
    #[must_use]
    pub fn with_own(max_sessions: usize, max_sockets: usize, max_own: usize) -> Arc<Self> {
        Arc::new(Self {
            max_sessions: AtomicUsize::new(max_sessions),
            sessions: AtomicUsize::new(0),
            max_sockets: AtomicUsize::new(max_sockets),
            sockets: AtomicUsize::new(0),
            max_own: AtomicUsize::new(max_own),
            own: AtomicUsize::new(0),
        })
    }

    /// Has other bounds from now on. What is taken beyond them stays taken until it
    /// is given back.
    pub fn resize(&self, max_sessions: usize, max_sockets: usize, max_own: usize) {
        self.max_sessions.store(max_sessions, Ordering::Relaxed);
        self.max_sockets.store(max_sockets, Ordering::Relaxed);
        self.max_own.store(max_own, Ordering::Relaxed);
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

    /// Takes a seat for a session with a socket of its own.
    ///
    /// # Errors
    ///
    /// What is used up.
    pub fn take(self: &Arc<Self>) -> Result<Seat, Full> {
        let mut seat = self.take_session()?;
        seat.socket = Some(self.take_socket()?);
        // Given back with the seat.
        seat.own = add_one(&self.own, &self.max_own);
        if seat.own {
            Ok(seat)
        } else {
            Err(Full::Sessions)
        }
    }

    /// Takes a seat for a session that shares a socket, which has a
    /// [`SocketSeat`] of its own.
    ///
    /// # Errors
    ///
    /// [`Full::Sessions`].
    pub fn take_session(self: &Arc<Self>) -> Result<Seat, Full> {
        if !add_one(&self.sessions, &self.max_sessions) {
            return Err(Full::Sessions);
        }
        Ok(Seat {
            budget: Arc::clone(self),
            resting: false,
            own: false,
            socket: None,
            client: None,
        })
    }

    /// Takes the right to one socket.
    ///
    /// # Errors
    ///
    /// [`Full::Sockets`].
    pub fn take_socket(self: &Arc<Self>) -> Result<SocketSeat, Full> {
        if !add_one(&self.sockets, &self.max_sockets) {
            return Err(Full::Sockets);
        }
        Ok(SocketSeat(Arc::clone(self)))
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

/// The right to one socket, given back when dropped.
#[derive(Debug)]
pub struct SocketSeat(Arc<Budget>);

impl Drop for SocketSeat {
    fn drop(&mut self) {
        self.0.sockets.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The right to one session, and to its socket if that is its own, given back
/// when dropped.
#[derive(Debug)]
pub struct Seat {
    budget: Arc<Budget>,
    /// The session has ended.
    resting: bool,
    /// It counts among the sessions with a socket of their own.
    own: bool,
    socket: Option<SocketSeat>,
    /// The client's part.
    client: Option<ClientSeat>,
}

impl Seat {
    /// With the client's right to the session, given back when that ends.
    #[must_use]
    pub fn of_client(mut self, client: Option<ClientSeat>) -> Self {
        self.client = client;
        self
    }

    /// Gives the session back and keeps its socket.
    pub(super) fn rest(&mut self) {
        if !std::mem::replace(&mut self.resting, true) {
            self.budget.sessions.fetch_sub(1, Ordering::Relaxed);
        }
        self.client = None;
        if std::mem::take(&mut self.own) {
            self.budget.own.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Takes a session for a socket that rested.
    ///
    /// # Errors
    ///
    /// [`Full::Sessions`]; the socket's part is given back, too.
    pub fn renew(mut self) -> Result<Self, Full> {
        if self.resting {
            if !add_one(&self.budget.sessions, &self.budget.max_sessions) {
                return Err(Full::Sessions);
            }
            self.resting = false;
            self.own = self.socket.is_some() && add_one(&self.budget.own, &self.budget.max_own);
            if self.socket.is_some() && !self.own {
                return Err(Full::Sessions);
            }
        }
        Ok(self)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.rest();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_with_sockets_of_their_own_leave_some_to_rest() {
        let budget = Budget::with_own(10, 4, 3);
        let mut seats: Vec<_> = (0..3).map(|_| budget.take().unwrap()).collect();
        assert_eq!(budget.take().err(), Some(Full::Sessions));
        assert_eq!((budget.taken(), budget.sockets()), (3, 3));
        let shared = budget.take_session().unwrap();
        seats[0].rest();
        seats.push(budget.take().unwrap());
        assert_eq!(budget.take().err(), Some(Full::Sockets));
        assert_eq!((budget.taken(), budget.sockets()), (4, 4));
        // The one that rests can't take part again while three others do.
        assert_eq!(seats.remove(0).renew().err(), Some(Full::Sessions));
        assert_eq!((budget.taken(), budget.sockets()), (4, 3));
        drop(seats.pop());
        drop(shared);
        let mut seat = budget.take().unwrap();
        seat.rest();
        let seat = seat.renew().unwrap();
        assert_eq!((budget.taken(), budget.sockets()), (3, 3));
        drop((seat, seats));
        assert_eq!((budget.taken(), budget.sockets()), (0, 0));
        assert_eq!(budget.own.load(Ordering::Relaxed), 0);
    }
}
