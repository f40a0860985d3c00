//! How many sessions there may be, of all workers together.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::newcomers::Newcomers;
use super::{ClientSeat, Need, Network};

/// Fewer sessions that were never answered are no flood, however few sockets there are.
const FLOOD: usize = 32;

/// Servers, by their number, whose answer times workers tell each other.
const SERVERS: usize = 1024;

/// What all workers together may hold: sessions, and the sockets of sessions
/// that are or were. Bounds what a flood of client addresses can take in
/// descriptors, ports and memory.
#[derive(Debug)]
pub struct Budget {
    max_sessions: AtomicUsize,
    sessions: AtomicUsize,
    max_sockets: AtomicUsize,
    sockets: AtomicUsize,
    /// Sockets whose sessions were never answered, by servers that answer.
    unanswered: AtomicUsize,
    /// Within how many microseconds servers usually answer; 0 for those that were not seen
    /// to.
    answer_times: Box<[AtomicU32]>,
    newcomers: Newcomers,
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

impl Budget {
    /// A budget of so many sessions, and of so many sockets for them and for
    /// ended ones.
    #[must_use]
    pub fn new(max_sessions: usize, max_sockets: usize) -> Arc<Self> {
        Arc::new(Self {
            max_sessions: AtomicUsize::new(max_sessions),
            sessions: AtomicUsize::new(0),
            max_sockets: AtomicUsize::new(max_sockets),
            sockets: AtomicUsize::new(0),
            unanswered: AtomicUsize::new(0),
            answer_times: (0..SERVERS).map(|_| AtomicU32::new(0)).collect(),
            newcomers: Newcomers::new(Instant::now()),
        })
    }

    /// Has other bounds from now on. What is taken beyond them stays taken until it
    /// is given back.
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
    pub fn is_crowded(&self) -> bool {
        let half = self.max_sockets().div_ceil(2);
        self.unanswered.load(Ordering::Relaxed) >= half.max(FLOOD)
    }

    /// Whether a new client gets a socket while they are [crowded](Self::is_crowded):
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

    /// Takes a seat for a session and its socket.
    ///
    /// # Errors
    ///
    /// What is used up.
    pub fn take(self: &Arc<Self>) -> Result<Seat, Full> {
        if !add_one(&self.sessions, &self.max_sessions) {
            return Err(Full::Sessions);
        }
        if !add_one(&self.sockets, &self.max_sockets) {
            self.sessions.fetch_sub(1, Ordering::Relaxed);
            return Err(Full::Sockets);
        }
        Ok(Seat {
            budget: Arc::clone(self),
            resting: false,
            unanswered: false,
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
pub struct Seat {
    budget: Arc<Budget>,
    /// The session has ended.
    resting: bool,
    /// The session's first answer is awaited.
    unanswered: bool,
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

    /// Counts among those that await an answer.
    pub(super) fn await_answer(&mut self) {
        if !std::mem::replace(&mut self.unanswered, true) {
            self.budget.unanswered.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Notes that the session of this client was answered.
    pub(super) fn note_answer(&mut self, client: IpAddr) {
        self.forget_answer();
        self.budget.newcomers.note_answer(client);
    }

    /// Tells other workers the time within which a server usually answers.
    pub(super) fn tell_answer_time(&self, server: usize, usual: Duration) {
        if let Some(told) = self.budget.answer_times.get(server) {
            let micros = u32::try_from(usual.as_micros()).unwrap_or(u32::MAX);
            told.store(micros, Ordering::Relaxed);
        }
    }

    /// What was told last of the server.
    pub(super) fn answer_time(&self, server: usize) -> Option<Duration> {
        let micros = self.budget.answer_times.get(server)?;
        let micros = micros.load(Ordering::Relaxed);
        (micros > 0).then(|| Duration::from_micros(micros.into()))
    }

    fn forget_answer(&mut self) {
        if std::mem::replace(&mut self.unanswered, false) {
            self.budget.unanswered.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// The client whose right to the session it is, if that has a bound.
    pub(super) fn network(&self) -> Option<Network> {
        self.client.as_ref().map(ClientSeat::network)
    }

    /// Gives the session back and keeps its socket.
    pub(super) fn rest(&mut self) {
        if !std::mem::replace(&mut self.resting, true) {
            self.budget.sessions.fetch_sub(1, Ordering::Relaxed);
        }
        self.client = None;
    }

    /// Takes a session for a socket that rested.
    ///
    /// # Errors
    ///
    /// [`Full::Sessions`]; the socket's part is given back, too.
    pub fn renew(mut self) -> Result<Self, Full> {
        self.forget_answer();
        if self.resting {
            if !add_one(&self.budget.sessions, &self.budget.max_sessions) {
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
        self.forget_answer();
        self.budget.sockets.fetch_sub(1, Ordering::Relaxed);
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
        let budget = Budget::new(100, 100);
        let mut answered = budget.take().unwrap();
        answered.await_answer();
        answered.note_answer(ip(1));
        let mut seats = Vec::new();
        let mut flood = |budget: &Arc<Budget>, sources: std::ops::Range<u16>| {
            for source in sources {
                if !budget.is_crowded() || budget.admits(now, ip(source)) {
                    let mut seat = budget.take().unwrap();
                    seat.await_answer();
                    seat.rest();
                    seats.push(seat);
                }
            }
            seats.len()
        };
        assert_eq!(flood(&budget, 1000..2000), 50);
        assert!(budget.is_crowded());
        // Those that ask again get as far as the part of the others.
        assert_eq!(flood(&budget, 1000..2000), 75);
        assert_eq!(flood(&budget, 1000..2000), 75);
        assert!(budget.admits(now, ip(1)) && budget.admits(now, ip(1)));
        assert!(!budget.admits(now, ip(1)));
        let again = seats.remove(0).renew().unwrap();
        seats[0].note_answer(ip(2));
        assert_eq!(budget.unanswered.load(Ordering::Relaxed), 73);
        assert!(budget.admits(now, ip(1)));
        drop((seats, again, answered));
        assert_eq!(budget.unanswered.load(Ordering::Relaxed), 0);
        assert!(!budget.is_crowded());
    }

    #[test]
    fn an_ended_session_keeps_its_socket_and_nothing_else() {
        let budget = Budget::new(3, 4);
        let mut seats: Vec<_> = (0..3).map(|_| budget.take().unwrap()).collect();
        assert_eq!(budget.take().err(), Some(Full::Sessions));
        seats[0].rest();
        seats.push(budget.take().unwrap());
        seats[1].rest();
        assert_eq!(budget.take().err(), Some(Full::Sockets));
        assert_eq!((budget.taken(), budget.sockets()), (2, 4));
        let again = seats.remove(0).renew().unwrap();
        seats.push(again);
        assert_eq!((budget.taken(), budget.sockets()), (3, 4));
        assert_eq!(seats.remove(0).renew().err(), Some(Full::Sessions));
        assert_eq!((budget.taken(), budget.sockets()), (3, 3));
        drop(seats);
        assert_eq!((budget.taken(), budget.sockets()), (0, 0));
    }
}
