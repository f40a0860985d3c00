//! Many datagrams with one call: the buffers that they are received into.

use std::fmt;
use std::io;
use std::iter::FusedIterator;
use std::ops::Range;
use std::slice;

use ppv2_udp::{AsFd, SocketState};

use crate::clock::Tick;
use crate::datagram::Parts;
use crate::{DatagramRef, Demux};

/// Bounds the memory of one batch: 64 MiB of address space.
const MAX_SLOTS: usize = 1024;

/// Received datagrams and their buffers, which the next call uses again.
///
/// A batch of `n` slots takes up to `n` datagrams in one call, each of up to 65,535
/// bytes; on Linux that is one call to the kernel for every 64. Once
/// [`enable_gro`](crate::UdpSocket::enable_gro) has been called, a slot holds as many
/// as the kernel joined, up to 64, so that a batch may hold more datagrams than it has
/// slots.
///
/// # Example
///
/// ```
/// use ppv2_sdk::{Batch, Trust, UdpSocket};
///
/// # let proxy = std::net::UdpSocket::bind("127.0.0.1:0")?;
/// let socket = UdpSocket::bind("127.0.0.1:0", Trust::networks(["127.0.0.1"]).build()?)?;
/// # let mut datagram = [0; 28 + 5];
/// # let client = "203.0.113.11:54321".parse().unwrap();
/// # ppv2::encode_udp(client, "198.51.100.10:9000".parse().unwrap(), &mut datagram).unwrap();
/// # for _ in 0..2 { proxy.send_to(&datagram, socket.local_addr()?)?; }
/// let mut batch = Batch::new(64);
/// # loop {
/// socket.recv_batch(&mut batch)?;
/// let echoes: Vec<_> = batch.iter().map(|d| (d.payload, d)).collect();
/// socket.send_batch(&echoes)?;
/// # if socket.stats().replies_sent == 2 { break }
/// # }
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct Batch {
    buffers: ppv2_udp::Batch,
    /// How many of them the next call fills.
    slots: usize,
    /// Where in the buffers each datagram is, and what is known of it.
    received: Vec<(Range<usize>, Parts)>,
    /// Datagrams that the latest call dropped.
    dropped: usize,
}

impl Batch {
    /// A batch of so many slots, from 1 to 1024; what lies outside counts as the
    /// nearer of the two. A slot has 64 KiB, of which the system gives only what
    /// has ever been used.
    #[must_use]
    pub fn new(slots: usize) -> Self {
        let slots = slots.clamp(1, MAX_SLOTS);
        Self {
            buffers: ppv2_udp::Batch::new(slots),
            slots,
            received: Vec::new(),
            dropped: 0,
        }
    }

    /// Changes how many slots the next call fills, with the bounds of
    /// [`new`](Self::new). Slots that are no longer used keep their memory.
    pub fn set_slots(&mut self, slots: usize) {
        self.slots = slots.clamp(1, MAX_SLOTS);
        self.received.clear();
        if self.buffers.slots() < self.slots {
            self.buffers = ppv2_udp::Batch::new(self.slots);
        }
    }

    /// How many datagrams were received.
    #[must_use]
    pub fn len(&self) -> usize {
        self.received.len()
    }

    /// Whether nothing was received, as before the first call.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.received.is_empty()
    }

    /// The datagram at `index`, in the order in which they arrived.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<DatagramRef<'_>> {
        self.received.get(index).map(|one| self.datagram(one))
    }

    /// The datagrams in the order in which they arrived.
    pub fn iter(&self) -> BatchIter<'_> {
        BatchIter {
            batch: self,
            received: self.received.iter(),
        }
    }

    fn datagram(&self, (range, parts): &(Range<usize>, Parts)) -> DatagramRef<'_> {
        parts.of(&self.buffers.bytes()[range.clone()])
    }

    /// Receives from a socket, as [`SocketState::receive`], and keeps what `demux`
    /// delivers. Returns how many datagrams those are.
    pub(crate) fn fill(
        &mut self,
        demux: &Demux,
        state: &SocketState,
        socket: &impl AsFd,
        wait: bool,
    ) -> io::Result<usize> {
        self.received.clear();
        self.dropped = 0;
        let filled = state.receive(socket, &mut self.buffers, 0..self.slots, wait)?;
        let mut demux = demux.lock(Tick::roughly_now());
        for (about, range) in self.buffers.datagrams(filled) {
            let bytes = &self.buffers.bytes()[range.clone()];
            match demux.receive(about.peer, state.reply_from(about), bytes) {
                Ok(parts) => self.received.push((range, parts)),
                Err(_) => self.dropped += 1,
            }
        }
        Ok(self.received.len())
    }

    /// Datagrams that the latest call dropped.
    pub(crate) fn dropped(&self) -> usize {
        self.dropped
    }
}

/// The datagrams of a [`Batch`], in the order in which they arrived.
#[derive(Clone)]
pub struct BatchIter<'b> {
    batch: &'b Batch,
    received: slice::Iter<'b, (Range<usize>, Parts)>,
}

impl<'b> Iterator for BatchIter<'b> {
    type Item = DatagramRef<'b>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.received.next()?;
        Some(self.batch.datagram(next))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.received.size_hint()
    }
}

impl DoubleEndedIterator for BatchIter<'_> {
    fn next_back(&mut self) -> Option<Self::Item> {
        let next = self.received.next_back()?;
        Some(self.batch.datagram(next))
    }
}

impl ExactSizeIterator for BatchIter<'_> {}

impl FusedIterator for BatchIter<'_> {}

impl fmt::Debug for BatchIter<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.clone()).finish()
    }
}

impl<'b> IntoIterator for &'b Batch {
    type Item = DatagramRef<'b>;
    type IntoIter = BatchIter<'b>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl Default for Batch {
    /// A batch of 64 slots.
    fn default() -> Self {
        Self::new(64)
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
