//! Sessions: which client's datagram is this, and which client's reply?
//!
//! A session joins one client address and port, and the local address that it wrote to,
//! with one server. The [`Table`] finds, counts, limits and ends sessions. It does no I/O
//! and takes the time as an argument; what a session has besides (the worker keeps its
//! socket there) is the type parameter.
//!
//! ```text
//!            first datagram
//!                  │
//!                  ▼      took all its `requests`
//!              ┌────────┐ ───────────────────────▶ ┌──────────┐  passes replies,
//!              │  Live  │                          │ Detached │  takes no requests
//!              └────────┘ ◀─────────────────────── └──────────┘
//!                  │       no other can be begun         │
//!                  └───────────────┬─────────────────────┘
//!                                  │  idle, responses, moved, network,
//!                                  │  unanswered, denied, stopped
//!                                  ▼
//!   late reply:       ┌──▶ ┌──────────────┐  keeps its socket; after moved, network and
//!   its rest restarts │    │   Retired    │  unanswered, late replies pass for `MIN_REST`,
//!                     └─── └──────────────┘  otherwise they are dropped
//!                             │        │
//!     rested, and a session   │        │  rested, and no session
//!     of its server begins    ▼        ▼  needs its socket
//!                socket of that one    closed
//! ```
//!
//! A retired session keeps its socket, because a late reply to its port would otherwise
//! reach another client's session that was given that port. The port rests for
//! [`MAX_REST`] while there are enough others, and at least for [`MIN_REST`] unless every
//! request was answered and nothing more came. [`AfterEnd`] says which sockets need no
//! rest, and which sessions share one.

mod clock;
mod index;
mod links;
mod table;
mod unanswered;
mod wheel;

use std::hash::{Hash, Hasher};
use std::net::{SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use ppv2::ReplyTag;
use ppv2_udp::Received;

use crate::accept::{Sender, SenderId};
use crate::address::{ClientAddr, Compact, ListenerAddr, ServerAddr};
use crate::capacity::Held;
use crate::counters::EndReason;
use crate::listener::{Amplification, Listener, ListenerSettings};
use crate::own_tlvs::UniqueId;
use crate::server::Server;

pub use clock::{Clock, Moment};
pub(crate) use table::Restored;
pub use table::Table;
use table::{Class, Lane};

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

/// What makes a session this session and no other. Never to be confused with
/// what a balancer hashes: two clients behind one IP have a key each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// The client's address and port.
    pub client: ClientAddr,
    /// The address and port that it wrote to.
    pub local: ListenerAddr,
    /// The proxy that passed its datagram on, if that says so in a header.
    pub sender: SenderId,
}

impl Key {
    /// The key of the session that a client's datagram belongs to.
    #[must_use]
    pub fn of(received: &Received) -> Self {
        Self::direct(ClientAddr(received.peer), ListenerAddr(received.local))
    }

    /// The key of the session of a client whose datagrams no other proxy passes on.
    #[must_use]
    pub fn direct(client: ClientAddr, local: ListenerAddr) -> Self {
        Self {
            client,
            local,
            sender: SenderId::NONE,
        }
    }

    /// Whether a header can say all of it: it has no room for the interface of a link-local
    /// address.
    #[must_use]
    pub fn fits_header(&self) -> bool {
        let is_scoped = |address| matches!(address, SocketAddr::V6(v6) if v6.scope_id() != 0);
        !is_scoped(self.client.0) && !is_scoped(self.local.0)
    }
}

/// Hashes few words rather than many small parts, which is what takes time.
impl Hash for Key {
    #[inline]
    fn hash<H: Hasher>(&self, state: &mut H) {
        if self.sender != SenderId::NONE {
            state.write_u64(self.sender.to_bits());
        }
        if let (SocketAddr::V4(client), SocketAddr::V4(local)) = (self.client.0, self.local.0) {
            let word =
                |v4: SocketAddrV4| u128::from(v4.ip().to_bits()) << 16 | u128::from(v4.port());
            state.write_u128(word(client) << 64 | word(local));
            return;
        }
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

/// Datagrams, and their bytes of payload together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// How many.
    pub datagrams: u64,
    /// How long together.
    pub bytes: u64,
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

/// How the replies of a session get back through another proxy.
#[derive(Clone, Debug)]
pub struct Via {
    /// The proxy that the client's datagrams come through.
    pub sender: Arc<Sender>,
    /// When the latest of them came.
    pub heard: Moment,
    /// [`Sender::changes`] at that time.
    pub changes: u64,
    /// What stands in front of replies.
    pub reply_header: ReplyHeader,
}

/// What a proxy wants to have in front of replies, as its latest datagram said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReplyHeader {
    /// Nothing.
    #[default]
    None,
    /// A PROXY v2 header with the client, the address that it wrote to, and this tag.
    Tagged(ReplyTag),
    /// The client and the address that it wrote to by Simple Proxy Protocol.
    Spp,
}

/// A session that has ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Its client and the address that it wrote to.
    pub key: Key,
    /// The address of the proxy that passed its client's datagrams on with a header.
    pub proxy: Option<SocketAddr>,
    /// Its listener.
    pub listener: Arc<Listener>,
    /// Its server.
    pub server: Arc<Server>,
    /// What the client sent.
    pub requests: Amount,
    /// What it got: all replies, and the bytes of those that were passed on.
    pub replies: Amount,
    /// From its beginning to its latest datagram.
    pub lasted: Duration,
    /// Why it ended.
    pub reason: EndReason,
    /// The id that its headers carried, if they did at its end.
    pub unique_id: Option<UniqueId>,
}

/// What becomes of a session's socket when the session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterEnd {
    /// It rests, because a late reply could otherwise reach another client; then a new
    /// session of the same listener and server may have it.
    RestForReuse,
    /// It rests and is then closed: a new session would be given another kind.
    Rest,
    /// It rests although no reply ought to come to it: one could, from a server that
    /// knows no better.
    RestUnheard,
    /// It is closed as soon as what waits in it has been read: no other client can get
    /// the same port.
    CloseOnceRead,
    /// It is closed at once: no reply ever comes to it.
    Close,
    /// It has none of its own. Late replies pass for [`MIN_REST`] where the session's end
    /// lets them, and what is kept with it then goes to [`Table::next_removed`]: at once
    /// after any other end.
    Pass,
    /// It has nothing of its own, and late replies are known without it. What is kept with
    /// it goes to [`Table::next_removed`].
    Forget,
}

impl AfterEnd {
    /// Whether replies are waited for.
    fn is_heard(self) -> bool {
        matches!(
            self,
            Self::RestForReuse | Self::Rest | Self::CloseOnceRead | Self::Pass | Self::Forget
        )
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Live,
    Detached,
    /// `None` if it is closed without rest.
    Retired(Option<Class>),
}

/// One session: 136 bytes besides what is kept with it. There may be a million, so that
/// what few of them need, or all have in common, is in the table.
#[derive(Debug)]
pub struct Session<C> {
    client: Compact,
    local: Compact,
    /// The listener whose rules it obeys.
    pub settings: Arc<ListenerSettings>,
    /// The server that it was given.
    pub server: Arc<Server>,
    /// When it began.
    pub started: Moment,
    /// Time of the latest datagram in either direction. Of one that has ended, when its rest
    /// began: at its end, or with the latest reply to it.
    pub last_active: Moment,
    /// Client datagrams so far.
    pub requests: u64,
    /// Their bytes.
    pub request_bytes: u64,
    /// Replies so far.
    pub replies: u64,
    /// The bytes of those that were passed on.
    pub reply_bytes: u64,
    /// The proxy that passes its client's datagrams on, if that says so in a header.
    pub via: Option<Box<Via>>,
    /// What the owner of the table keeps with it.
    pub connection: C,
    /// [`Table::request`] leaves the client's next datagram to another session, since
    /// this one's socket may no longer do.
    pub needs_socket: bool,
    /// While it is active, its own bucket for
    /// [`ClientRates`](crate::client_limits::ClientRates), which it has once it was
    /// answered; then the nanoseconds of the moment until which late replies pass.
    bucket_or_passes_until: u64,
    generation: u32,
    state: State,
    held: Held,
}

impl<C> Session<C> {
    /// Its client and the address that it wrote to.
    #[must_use]
    pub fn key(&self) -> Key {
        Key {
            client: ClientAddr(self.client.address()),
            local: ListenerAddr(self.local.address()),
            sender: self.sender(),
        }
    }

    fn sender(&self) -> SenderId {
        let via = self.via.as_ref();
        via.map_or(SenderId::NONE, |via| via.sender.id)
    }

    fn has_key(&self, key: &Key) -> bool {
        self.client.is(&key.client.0) && self.local.is(&key.local.0) && self.sender() == key.sender
    }

    /// Where its datagrams go, and replies come from.
    #[must_use]
    pub fn server_address(&self) -> ServerAddr {
        match self.server.has_same_port() {
            true => self.server.address_for(ListenerAddr(self.local.address())),
            false => self.server.address,
        }
    }

    /// The address of the proxy that passes its client's datagrams on with a header.
    #[must_use]
    pub fn proxy(&self) -> Option<SocketAddr> {
        self.via.as_ref().map(|via| via.sender.address)
    }

    /// Whether the session takes or passes datagrams. One that does not only
    /// keeps its socket's port from being reused.
    #[must_use]
    pub fn is_active(&self) -> bool {
        !matches!(self.state, State::Retired { .. })
    }

    /// If it has ended, it passes no more replies.
    pub fn silence(&mut self) {
        if !self.is_active() {
            self.pass_until(Moment::ORIGIN);
        }
    }

    /// Until when late replies pass, if it has ended; the beginning if none do.
    fn passes_until(&self) -> Moment {
        Moment::from_nanos(self.bucket_or_passes_until)
    }

    fn pass_until(&mut self, end: Moment) {
        self.bucket_or_passes_until = end.nanos();
    }

    fn passes_replies(&self, now: Moment) -> bool {
        self.is_active() || now < self.passes_until()
    }

    /// Whether it has ended and is kept for late replies alone.
    fn is_passing(&self) -> bool {
        self.state == State::Retired(Some(Class::Passing))
    }

    /// When it ends, or what is kept of it goes, if nothing more comes.
    fn deadline(&self) -> Moment {
        match self.state {
            State::Live | State::Detached => self.last_active + self.settings.rules.idle_timeout,
            State::Retired(Some(Class::Passing)) => self.passes_until(),
            State::Retired(_) => self.last_active + MAX_REST + SPARE,
        }
    }

    fn count(&mut self, slot: u32, now: Moment, amount: Amount) -> SessionId {
        self.requests += amount.datagrams;
        self.request_bytes += amount.bytes;
        self.last_active = now;
        SessionId {
            slot,
            generation: self.generation,
        }
    }

    /// Whether it may take more datagrams of its client.
    fn takes_more(&self) -> bool {
        let limit = self.settings.rules.requests;
        limit == 0 || self.requests < limit
    }

    fn is_unanswered(&self) -> bool {
        self.replies == 0
    }

    /// How long it has rested, and among which; `None` if it doesn't rest.
    fn rest(&self, now: Moment) -> Option<(Lane, Duration)> {
        let State::Retired(class) = self.state else {
            return None;
        };
        let lane = Lane::of(&self.settings.listener, &self.server, class?);
        Some((lane, now.since(self.last_active)))
    }

    fn ended(&self, reason: EndReason, unique_id: Option<UniqueId>) -> Ended {
        Ended {
            unique_id,
            key: self.key(),
            proxy: self.proxy(),
            listener: Arc::clone(&self.settings.listener),
            server: Arc::clone(&self.server),
            requests: Amount {
                datagrams: self.requests,
                bytes: self.request_bytes,
            },
            replies: Amount {
                datagrams: self.replies,
                bytes: self.reply_bytes,
            },
            lasted: self.last_active.since(self.started),
            reason,
        }
    }

    /// How many replies each request is to have, at least.
    fn expected_replies(&self) -> u64 {
        let each = self.settings.rules.responses.max(1);
        each.saturating_mul(self.requests)
    }

    /// Whether its server sends more than it was asked for, and did so lately.
    fn is_streamed_to(&self, now: Moment) -> bool {
        self.replies > self.expected_replies() && now.since(self.last_active) < MIN_REST
    }

    /// Whether all replies have come that its requests are to have.
    fn is_answered(&self) -> bool {
        self.replies >= self.expected_replies()
    }
}

/// What to do with a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The one client that may have it.
    pub to: ClientAddr,
    /// The address that it must leave from.
    pub from: ListenerAddr,
    /// The bound on what the client may get, if it has got more with this reply.
    pub exceeds: Option<Amplification>,
}

#[cfg(test)]
mod tests;
