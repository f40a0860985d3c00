//! Headers in: which senders put a header in front of the datagrams that they pass on, and
//! what is made of it. Who sent a datagram decides whether it must carry one, never its
//! bytes.

mod senders;

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use ipnet::IpNet;

pub use senders::{Arrival, Senders, passes};

/// Which senders of a listener must put a header in front of each datagram, and what becomes
/// of all others'.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accept {
    /// Their networks. They can speak for any client.
    pub from: Vec<IpNet>,
    /// How their headers may be written.
    pub formats: Formats,
    /// What becomes of datagrams from everybody else.
    pub direct: Direct,
    /// What becomes of datagrams with a LOCAL header, by which a sender speaks for itself.
    pub local: LocalHeaders,
    /// Whether the TLVs of a header go on to servers that read one, besides its checksum,
    /// padding and reply tag, which are the sender's own.
    pub passes_tlvs: bool,
    /// Whether a sender may leave the header out once it has said it; the specification
    /// forbids that.
    pub remember: Option<Remember>,
}

impl Accept {
    /// Whether datagrams from this address must carry a header.
    #[must_use]
    pub fn includes(&self, sender: IpAddr) -> bool {
        self.from.iter().any(|net| net.contains(&sender))
    }
}

/// How headers may be written. At least one is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Formats {
    /// PROXY protocol v2.
    pub v2: bool,
    /// Simple Proxy Protocol, 38 bytes.
    pub spp: bool,
}

/// What becomes of a datagram that comes from none of the networks that headers are accepted
/// from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direct {
    /// It is dropped.
    #[default]
    Drop,
    /// Its sender is a client, and all its bytes are payload.
    Accept,
}

/// What becomes of a datagram with a LOCAL header, such as a health check of the sender's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LocalHeaders {
    /// It goes to a server, with the sender as its client.
    #[default]
    Forward,
    /// It is dropped.
    Drop,
}

/// How long it is remembered for which client a sender has spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remember {
    /// Since the latest datagram of the sender.
    pub idle: Duration,
    /// The most senders, by address and port, that a worker remembers. Then no other is
    /// remembered until one has been idle for too long.
    pub max: usize,
    /// Whether a header without payload makes an empty datagram to the server, rather than
    /// say the client alone.
    pub forwards_empty: bool,
}

/// Names a sender for as long as anything is known of it. No other sender of any worker has
/// the id until 2³² have come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SenderId(u64);

impl SenderId {
    /// Of a client's own datagrams.
    pub const NONE: Self = Self(0);

    /// Another id for a sender in this place of its worker's.
    fn new(place: usize) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let mut number = NEXT.fetch_add(1, Ordering::Relaxed);
        if number == 0 {
            // All numbers have been used. This one is nobody's.
            number = NEXT.fetch_add(1, Ordering::Relaxed);
        }
        Self(u64::from(number) << 32 | place as u64 & u64::from(u32::MAX))
    }

    #[expect(clippy::cast_possible_truncation, reason = "the lower half")]
    fn place(self) -> usize {
        self.0 as u32 as usize
    }

    /// The id in 64 bits; 0 for none.
    #[must_use]
    pub fn to_bits(self) -> u64 {
        self.0
    }
}

/// A sender as one worker knows it: an address and port of another proxy, and the address of
/// the listener's that it sends to.
#[derive(Debug)]
pub struct Sender {
    /// Tells it from all senders that this worker knew.
    pub id: SenderId,
    /// Where its datagrams come from, and replies go.
    pub address: SocketAddr,
    /// Where it sends to, and replies leave from.
    pub local: SocketAddr,
    /// How often its headers have named another client than before.
    changes: AtomicU64,
}

impl Sender {
    fn new(id: SenderId, address: SocketAddr, local: SocketAddr) -> Self {
        Self {
            id,
            address,
            local,
            changes: AtomicU64::new(0),
        }
    }

    /// How often its headers have named another client than before. As long as this stays
    /// the same, so does the client.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    fn note_change(&self) {
        // Its worker alone writes it.
        self.changes.store(self.changes() + 1, Ordering::Relaxed);
    }
}
