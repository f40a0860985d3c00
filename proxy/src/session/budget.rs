//! How many sessions there may be, of all workers together.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What all workers together may hold: sessions, and the sockets of sessions
/// that are or were. Bounds what a flood of client addresses can take in
/// descriptors, ports and memory.
#[derive(Debug)]
pub struct Budget {
    max_sessions: usize,
    sessions: AtomicUsize,
    max_sockets: usize,
    sockets: AtomicUsize,
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
        Arc::new(Self {
            max_sessions,
            sessions: AtomicUsize::new(0),
            max_sockets,
            sockets: AtomicUsize::new(0),
        })
    }

    /// The most sessions there may be.
    #[must_use]
    pub fn max(&self) -> usize {
        self.max_sessions
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
        self.max_sockets
    }

    /// Takes a seat for a session with a socket of its own.
    ///
    /// # Errors
    ///
    /// What is used up.
    pub fn take(self: &Arc<Self>) -> Result<Seat, Full> {
        let mut seat = self.take_session()?;
        seat.socket = Some(self.take_socket()?);
        Ok(seat)
    }

    /// Takes a seat for a session that shares a socket, which has a
    /// [`SocketSeat`] of its own.
    ///
    /// # Errors
    ///
    /// [`Full::Sessions`].
    pub fn take_session(self: &Arc<Self>) -> Result<Seat, Full> {
        if !add_one(&self.sessions, self.max_sessions) {
            return Err(Full::Sessions);
        }
        Ok(Seat {
            budget: Arc::clone(self),
            resting: false,
            socket: None,
        })
    }

    /// Takes the right to one socket.
    ///
    /// # Errors
    ///
    /// [`Full::Sockets`].
    pub fn take_socket(self: &Arc<Self>) -> Result<SocketSeat, Full> {
        if !add_one(&self.sockets, self.max_sockets) {
            return Err(Full::Sockets);
        }
        Ok(SocketSeat(Arc::clone(self)))
    }
}

fn add_one(number: &AtomicUsize, max: usize) -> bool {
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
    socket: Option<SocketSeat>,
}

impl Seat {
    /// Gives the session back and keeps its socket.
    pub(super) fn rest(&mut self) {
        if !std::mem::replace(&mut self.resting, true) {
            self.budget.sessions.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Takes a session for a socket that rested.
    ///
    /// # Errors
    ///
    /// [`Full::Sessions`]; the socket's part is given back, too.
    pub fn renew(mut self) -> Result<Self, Full> {
        if self.resting {
            if !add_one(&self.budget.sessions, self.budget.max_sessions) {
                return Err(Full::Sessions);
            }
            self.resting = false;
        }
        Ok(self)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.rest();
    }
}
