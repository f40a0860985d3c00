//! The session table: whose datagram is this, and whose is this reply?
//!
//! A session joins one client address and port, and the local address that it
//! wrote to, with one server. The table finds, counts, limits and ends
//! sessions. It does no I/O and takes the time as an argument; what a session
//! owns besides (the worker keeps its socket there) is the type parameter.
//!
//! ```text
//!            responses reached, idle, moved, unanswered
//!   Live ──────────────────────────────▶ Retired ── MIN_REST ‥ MAX_REST ──▶ gone
//!     │ requests reached                    ▲                         └──▶ a new session's
//!     └────────▶ Detached ──────────────────┘
//!          (passes replies, takes no requests)
//! ```
//!
//! A retired session delivers nothing, unless it was moved or gave way unanswered: then
//! replies in flight still pass for [`MIN_REST`]. It keeps its socket, because a late reply to its port
//! would otherwise reach another client's session that was given that port. The port
//! rests for [`MAX_REST`] while there are enough others, and at least for [`MIN_REST`]
//! unless every request was answered and nothing more came. A late reply begins the
//! rest anew. Where no other client can get the port, or no reply comes, a session is
//! gone at its end.

mod budget;
mod clients;
mod newcomers;
mod rest;
mod rings;
mod table;
mod unanswered;
mod wheel;

use std::hash::{Hash, Hasher};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::address::{ClientAddr, ListenerAddr};
use rest::{Class, Lane};

pub use budget::{Budget, Full, Seat};
pub use clients::{ClientSeat, Clients, Network, Rates};
pub use table::Table;
use unanswered::Client;

/// How long the port of an ended session rests at least, since its end or the latest
/// reply to it: longer than a server takes to answer, or a network to deliver a
/// duplicate. Our SDKs send to a client for as long after another one has taken its
/// port over.
pub const MIN_REST: Duration = Duration::from_secs(10);

/// How long the port of an ended session rests while there are enough others: as long
/// as our SDKs remember a client unless told otherwise.
pub const MAX_REST: Duration = Duration::from_secs(120);

/// How long a socket that has rested for [`MAX_REST`] is kept for a new session, which
/// saves it half of what making one costs.
const SPARE: Duration = Duration::from_secs(5);

/// How much new sessions need the ports of ended ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// There are enough others: ports rest for [`MAX_REST`].
    None,
    /// Half of all sockets rest: ports may be used again after [`MIN_REST`].
    Supply,
    /// There is no other port: one may be used again before if every request was
    /// answered, and nothing more came within the time that its server usually takes.
    Now,
}

/// What makes a session this session and no other. Never to be confused with
/// what a balancer hashes: two clients behind one IP have a key each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// The client's address and port.
    pub client: ClientAddr,
    /// The address and port that it wrote to.
    pub local: ListenerAddr,
}

/// Hashes few words rather than many small parts, which is what takes time.
impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        for address in [self.client.0, self.local.0] {
            let port = u64::from(address.port());
            match address {
                SocketAddr::V4(v4) => state.write_u64(u64::from(v4.ip().to_bits()) << 16 | port),
                SocketAddr::V6(v6) => {
                    state.write_u128(v6.ip().to_bits());
                    state.write_u64(1 << 48 | u64::from(v6.scope_id()) << 16 | port);
                }
            }
        }
    }
}

/// When the sessions of a listener end.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Without a datagram in either direction for this long.
    pub idle_timeout: Duration,
    /// After so many replies to each client datagram; 0 for never. Where the number of
    /// requests has a bound, once it has had these as well.
    pub responses: u64,
    /// After so many client datagrams a new session is begun, and the old one
    /// passes what replies still come; 0 for never.
    pub requests: u64,
    /// How much of replies its clients may get.
    pub amplification: Option<Amplification>,
}

/// A bound on what a client gets for what it sends. Whoever forges a source has
/// the replies sent to somebody else; the less it gets for its trouble, the
/// better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Amplification {
    /// Bytes of replies for each byte of the client's, over the whole session.
    pub limit: u64,
    /// Whether what exceeds it is dropped, rather than counted alone.
    pub enforce: bool,
}

/// Datagrams, and their bytes of payload together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// How many.
    pub datagrams: u64,
    /// How long together.
    pub bytes: u64,
}

impl Rules {
    /// Whether a client's datagrams must be counted one by one.
    #[must_use]
    pub fn count_requests(&self) -> bool {
        self.requests > 0
    }

    /// Whether replies must be counted one by one.
    #[must_use]
    pub fn count_replies(&self) -> bool {
        self.responses > 0
    }
}

/// Names a session for as long as it exists. A number is reused only with
/// another generation, never 0, so that a stale name finds nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionId {
    slot: u32,
    generation: u32,
}

impl SessionId {
    /// Packs the id into 64 bits.
    #[must_use]
    pub fn to_bits(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.slot)
    }

    /// Reverses [`to_bits`](Self::to_bits).
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the two halves")]
    pub fn from_bits(bits: u64) -> Self {
        Self {
            slot: bits as u32,
            generation: (bits >> 32) as u32,
        }
    }
}

/// Why a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// No datagram for the idle timeout.
    Idle,
    /// All expected replies have come.
    Responses,
    /// Its server was to be left: the client's next datagram began another one.
    Moved,
    /// It goes on from another socket, since this one's address is gone or is no longer
    /// the one that its server is written to from.
    Network,
    /// It was never answered, and sessions had run out: it gave way to a new one.
    Unanswered,
    /// Its client is no longer served.
    Denied,
    /// The listener was taken out, or the proxy stopped.
    Stopped,
}

impl EndReason {
    /// The word for it in logs.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Responses => "responses",
            Self::Moved => "moved",
            Self::Network => "network",
            Self::Unanswered => "unanswered",
            Self::Denied => "denied",
            Self::Stopped => "stopped",
        }
    }
}

/// What a session came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Whose it was.
    pub key: Key,
    /// What the client sent.
    pub requests: Amount,
    /// What it got: all replies, and the bytes of those that were passed on.
    pub replies: Amount,
    /// From its beginning to its latest datagram.
    pub lasted: Duration,
    /// Why it ended.
    pub reason: EndReason,
}

/// What becomes of what a session owned when it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Afterlife {
    /// It rests, because a late reply could otherwise reach another client; then a new
    /// session of the same listener and server may have it.
    Rest,
    /// It rests, and is then let go: a new session would be given another kind.
    RestUnused,
    /// It rests although no reply ought to come to it: one could, from a server that
    /// knows no better.
    RestUnheard,
    /// It is let go, as soon as what waits in it has been read: no other client can get
    /// the same port.
    None,
    /// It is let go at once: no reply ever comes to it.
    Unheard,
}

impl Afterlife {
    /// Whether replies are waited for.
    #[must_use]
    pub fn is_heard(self) -> bool {
        matches!(self, Self::Rest | Self::RestUnused | Self::None)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Live,
    Detached,
    Retired {
        ended: Instant,
        /// When its rest began: at its end, or with the latest reply to it.
        since: Instant,
        /// It still passes replies for a while.
        passes: bool,
        /// `None` if it is let go without rest.
        class: Option<Class>,
    },
}

/// One session.
#[derive(Debug)]
pub struct Session<T> {
    /// Whose it is.
    pub key: Key,
    /// Number of the listener whose [`Rules`] it follows.
    pub listener: usize,
    /// Number of the server that it was given.
    pub server: usize,
    /// When it began.
    pub started: Instant,
    /// Time of the latest datagram in either direction.
    pub last_active: Instant,
    /// Client datagrams so far.
    pub requests: u64,
    /// Their bytes.
    pub request_bytes: u64,
    /// Replies so far.
    pub replies: u64,
    /// The bytes of those that were passed on.
    pub reply_bytes: u64,
    /// What the owner of the table keeps with it.
    pub link: T,
    /// [`Table::request`] leaves the client's next datagram to another session, since
    /// this one's socket may no longer do.
    pub needs_socket: bool,
    /// Of its own, for [`Rates`], once it was answered.
    bucket: u64,
    state: State,
    generation: u32,
    seat: Seat,
}

impl<T> Session<T> {
    /// Whether the session takes or passes datagrams. One that does not only
    /// keeps its socket's port from being reused.
    #[must_use]
    pub fn is_active(&self) -> bool {
        !matches!(self.state, State::Retired { .. })
    }

    /// If it has ended, it passes no more replies.
    pub fn silence(&mut self) {
        if let State::Retired { passes, .. } = &mut self.state {
            *passes = false;
        }
    }

    fn passes_replies(&self, now: Instant) -> bool {
        match self.state {
            State::Live | State::Detached => true,
            State::Retired { ended, passes, .. } => {
                passes && now.saturating_duration_since(ended) < MIN_REST
            }
        }
    }

    fn count(&mut self, slot: u32, now: Instant, amount: Amount) -> SessionId {
        self.requests += amount.datagrams;
        self.request_bytes += amount.bytes;
        self.last_active = now;
        SessionId {
            slot,
            generation: self.generation,
        }
    }

    /// It was never answered.
    fn is_unanswered(&self) -> bool {
        self.replies == 0
    }

    /// The client of its listener whose sessions are bounded, if they are.
    fn bounded_client(&self) -> Option<Client> {
        let network = self.seat.network()?;
        Some((self.listener, network))
    }

    /// How long it has rested, and among which; `None` if it doesn't rest.
    fn rest(&self, now: Instant) -> Option<(Lane, Duration)> {
        let State::Retired { since, class, .. } = self.state else {
            return None;
        };
        let lane = Lane {
            listener: self.listener,
            server: self.server,
            class: class?,
        };
        Some((lane, now.saturating_duration_since(since)))
    }

    /// What it came to, if it ends now.
    #[must_use]
    pub fn summary(&self, reason: EndReason) -> Summary {
        Summary {
            key: self.key,
            requests: Amount {
                datagrams: self.requests,
                bytes: self.request_bytes,
            },
            replies: Amount {
                datagrams: self.replies,
                bytes: self.reply_bytes,
            },
            lasted: self.last_active.saturating_duration_since(self.started),
            reason,
        }
    }

    /// Whether its server sends more than it was asked for, and did so lately.
    fn is_streamed_to(&self, now: Instant, each: u64) -> bool {
        self.replies > each.saturating_mul(self.requests)
            && now.saturating_duration_since(self.last_active) < MIN_REST
    }

    /// Whether as many replies have come as `each` request is to have.
    fn is_answered(&self, each: u64) -> bool {
        self.replies >= each.saturating_mul(self.requests)
    }
}

/// What to do with a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The one client that may have it.
    pub to: ClientAddr,
    /// The address that it must leave from.
    pub from: ListenerAddr,
    /// Number of the session's listener.
    pub listener: usize,
    /// With it, the client has got more than its [`Amplification`] allows.
    pub exceeds: bool,
}

#[cfg(test)]
mod tests;
