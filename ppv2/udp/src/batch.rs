//! Where datagrams are received: slots side by side, and what is known of each.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

/// Slots of [`Batch::default`]: datagrams, or bursts, that a busy socket gets before
/// others have their turn.
pub const BATCH: usize = 32;

/// Bytes of the longest datagram or burst: the length field of UDP has 16 bits.
pub const MAX_DATAGRAM: usize = 65_535;

/// Bytes from the start of one slot of [`Batch::new`] to that of the next. Not a power of
/// two, or the first bytes of all slots would share a few sets of the processor's cache.
pub const SLOT: usize = stride(MAX_DATAGRAM);

/// As many cache lines as `capacity` bytes take, and five more.
const fn stride(capacity: usize) -> usize {
    (capacity.div_ceil(64) + 5) * 64
}

/// The number of datagrams that `len` bytes are, if all but the last have `segment`. An empty
/// datagram is one, too. Single ones are told without a division, which takes time.
pub(crate) fn count(len: usize, segment: usize) -> usize {
    if len <= segment {
        1
    } else {
        len.div_ceil(segment.max(1))
    }
}

/// The traffic class of an IP packet, or type of service in IPv4: six bits of DSCP (RFC
/// 2474) and two of ECN (RFC 3168).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrafficClass(pub u8);

impl TrafficClass {
    /// The ECN bits alone.
    #[must_use]
    pub fn ecn(self) -> Self {
        Self(self.0 & 0b11)
    }

    /// What a proxy passes on: all bits with `dscp`, else the ECN bits alone.
    #[must_use]
    pub fn passed(self, dscp: bool) -> Self {
        if dscp { self } else { self.ecn() }
    }
}

/// What is known of a received datagram, or burst, besides its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// The sender.
    pub peer: SocketAddr,
    /// The local address that it was sent to if the socket reports that
    /// ([`SocketState::new`](crate::SocketState::new)), else the one that the socket is
    /// bound to. A link-local address has its interface as scope. For what was sent to a
    /// broadcast or IPv4 multicast address, it is the interface's address (`ipi_spec_dst`
    /// in ip(7)).
    pub local: SocketAddr,
    /// It was sent to a multicast or broadcast address, from which no reply can leave.
    pub group: bool,
    /// Index of the interface that it arrived on; 0 if the socket does not report it.
    pub interface: u32,
    /// Traffic class that it arrived with; 0 if the socket does not report it.
    pub class: TrafficClass,
    /// Datagrams that this socket has lost so far because its buffer was full
    /// (SO_RXQ_OVFL in socket(7)); 0 if the socket does not report it. The kernel starts
    /// again at 0 after 2³².
    pub overflows: u32,
    /// Bytes of payload, of all datagrams of a burst together.
    pub len: usize,
    /// Bytes of each datagram of a burst but the last, which may have fewer; `len` for a
    /// single datagram.
    pub segment: usize,
    /// The datagram had more bytes than there was room for.
    pub truncated: bool,
}

impl Received {
    /// A single datagram of which only the sender is known.
    pub(crate) fn plain(peer: SocketAddr, local: SocketAddr, len: usize) -> Self {
        Self {
            peer,
            local,
            group: false,
            interface: 0,
            class: TrafficClass::default(),
            overflows: 0,
            len,
            segment: len,
            truncated: false,
        }
    }

    /// Datagrams that the socket has lost since `known`, which is brought up to date. The
    /// kernel counts all that it ever lost, and starts again after 2³².
    #[must_use]
    pub fn newly_lost(&self, known: &mut u32) -> u64 {
        // A kernel that has lost nothing yet reports nothing.
        if self.overflows == 0 {
            return 0;
        }
        let new = self.overflows.wrapping_sub(*known);
        *known = self.overflows;
        u64::from(new)
    }

    /// The number of datagrams: more than one in a burst.
    #[must_use]
    pub fn datagrams(&self) -> usize {
        count(self.len, self.segment)
    }

    /// The address that a reply can leave from, an IPv4 one never in IPv6 form. `None` if
    /// the kernel has to choose: the address is unspecified or multicast, or link-local
    /// while the peer's is not.
    #[must_use]
    pub fn reply_from(&self) -> Option<IpAddr> {
        let is_link_local = |ip| matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
        let ip = self.local.ip().to_canonical();
        // A link-local address needs the interface, which the peer's address then has.
        let is_usable = !ip.is_unspecified()
            && !ip.is_multicast()
            && (!is_link_local(ip) || is_link_local(self.peer.ip()));
        is_usable.then_some(ip)
    }
}

/// Consecutive datagrams of one slot: all of them, unless a burst is split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The slot.
    pub slot: usize,
    /// Index of the first datagram.
    first: usize,
    /// Index behind the last datagram.
    end: usize,
    /// Bytes at the front of the first datagram that are left out.
    skip: usize,
}

impl Part {
    /// The number of datagrams.
    #[must_use]
    pub fn datagrams(&self) -> usize {
        self.end - self.first
    }

    /// Its datagrams, one by one.
    pub fn singles(&self) -> impl Iterator<Item = Self> + use<> {
        let whole = *self;
        (whole.first..whole.end).map(move |first| Self {
            first,
            end: first + 1,
            ..whole
        })
    }

    /// With the datagrams of `next`, which follow it in the same slot.
    #[must_use]
    pub fn with(&self, next: Self) -> Self {
        debug_assert_eq!((self.slot, self.end), (next.slot, next.first));
        Self {
            end: next.end,
            ..*self
        }
    }

    /// Its first datagram without its first `len` bytes.
    #[must_use]
    pub fn behind(&self, len: usize) -> Self {
        Self {
            end: self.end.min(self.first + 1),
            skip: self.skip + len,
            ..*self
        }
    }

    /// Splits off the first `count` datagrams, or all if there are no more.
    #[must_use]
    pub fn take(&mut self, count: usize) -> Self {
        let whole = *self;
        self.first += count.min(self.datagrams());
        self.skip = 0;
        Self {
            end: self.first,
            ..whole
        }
    }
}

/// Slots to receive into, each for a datagram or a burst. A batch is reused: a call
/// overwrites the slots that it fills.
#[derive(Debug)]
pub struct Batch {
    bytes: Vec<u8>,
    capacity: usize,
    /// Bytes from the start of one slot to that of the next.
    stride: usize,
    received: Vec<Option<Received>>,
}

impl Batch {
    /// `slots` slots, each with room for the longest datagram or burst. A slot has 64 KiB of
    /// address space, of which the system backs only the pages that were ever written to.
    #[must_use]
    pub fn new(slots: usize) -> Self {
        Self::with_capacity(slots, MAX_DATAGRAM)
    }

    /// `slots` slots of `capacity` bytes each. What is longer is truncated.
    #[must_use]
    pub fn with_capacity(slots: usize, capacity: usize) -> Self {
        Self {
            bytes: vec![0; slots * stride(capacity)],
            capacity,
            stride: stride(capacity),
            received: vec![None; slots],
        }
    }

    /// The number of slots.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.received.len()
    }

    /// What is known of the content of `slot`; `None` if nothing was received into it.
    #[must_use]
    pub fn received(&self, slot: usize) -> Option<Received> {
        self.received[slot]
    }

    /// The payload in `slot`, of all datagrams of a burst; empty if there is none.
    #[must_use]
    pub fn payload(&self, slot: usize) -> &[u8] {
        let range = self.range(slot);
        &self.bytes[range]
    }

    /// As [`payload`](Self::payload), to be changed in place.
    pub fn payload_mut(&mut self, slot: usize) -> &mut [u8] {
        let range = self.range(slot);
        &mut self.bytes[range]
    }

    fn range(&self, slot: usize) -> Range<usize> {
        let start = slot * self.stride;
        start
            ..start
                + self.received[slot]
                    .as_ref()
                    .map_or(0, |received| received.len)
    }

    /// The datagrams in the first `slots` slots, in the order of their arrival: what is
    /// known of each, which is the same for all datagrams of a burst, and where in
    /// [`bytes`](Self::bytes) it is.
    pub fn datagrams(&self, slots: usize) -> impl Iterator<Item = (&Received, Range<usize>)> {
        let filled = self.received[..slots].iter().enumerate();
        filled.flat_map(move |(slot, received)| {
            received.iter().flat_map(move |received| {
                let Range { start, end } = self.range(slot);
                let segment = received.segment.max(1);
                // An empty datagram is one, too.
                (start..end.max(start + 1))
                    .step_by(segment)
                    .map(move |at| (received, at..end.min(at + segment)))
            })
        })
    }

    /// The bytes of all slots.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// All datagrams in `slot`.
    #[must_use]
    pub fn whole(&self, slot: usize) -> Part {
        let end = self.received[slot].as_ref().map_or(0, Received::datagrams);
        Part {
            slot,
            first: 0,
            end,
            skip: 0,
        }
    }

    /// Bytes of payload in `part`.
    #[must_use]
    pub fn len_of(&self, part: Part) -> usize {
        self.burst_of(part).0.len()
    }

    /// The first datagram of `part`; empty if there is none.
    #[must_use]
    pub fn first_of(&self, part: Part) -> &[u8] {
        let end = part.end.min(part.first + 1);
        self.burst_of(Part { end, ..part }).0
    }

    /// The payload of the datagrams of `part`, and the bytes of each but the last.
    pub(crate) fn burst_of(&self, part: Part) -> (&[u8], usize) {
        let Some(received) = &self.received[part.slot] else {
            return (&[], 0);
        };
        let (len, segment) = (received.len, received.segment);
        let start = part.slot * self.stride;
        let (first, end) = (
            (part.first * segment).min(len),
            (part.end * segment).min(len),
        );
        let first = (first + part.skip).min(end);
        (&self.bytes[start + first..start + end], segment)
    }

    /// Buffers of the slots in `slots`, and where to note what was received into each.
    pub(crate) fn fill(
        &mut self,
        slots: Range<usize>,
    ) -> (impl Iterator<Item = &mut [u8]>, &mut [Option<Received>]) {
        let buffers = self.bytes.chunks_exact_mut(self.stride);
        let received = &mut self.received[slots.clone()];
        let buffers = buffers.skip(slots.start).take(received.len());
        (buffers.map(|buffer| &mut buffer[..self.capacity]), received)
    }
}

impl Default for Batch {
    /// A batch of [`BATCH`] slots, each with room for the longest datagram or burst.
    fn default() -> Self {
        Self::new(BATCH)
    }
}
