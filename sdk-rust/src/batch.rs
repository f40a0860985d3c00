//! Many datagrams with one call: the buffers that they are received into, and
//! the recipients of those that are sent.

use std::fmt;
use std::iter::FusedIterator;
use std::net::SocketAddr;
use std::slice;

use ppv2::Tlvs;
use ppv2_udp::SocketState;

use crate::clock::Tick;
use crate::{Admitted, Datagram, Gate, ReplyTo, Way};

/// Bounds the memory of one batch: 64 MiB of address space.
const MAX_SLOTS: usize = 1024;

/// Received datagrams and the buffers that they stand in, to be used again by
/// the next call.
///
/// A batch of `n` slots takes up to `n` datagrams in one call, each of up to 65,535
/// bytes; on Linux that is one call to the kernel for every 64. Once [`enable_gro`](crate::UdpSocket::enable_gro) has
/// been called, a slot holds as many as the kernel coalesced, up to 64, so that
/// a batch may hold more datagrams than it has slots.
///
/// ```
/// use ppv2_sdk::{Batch, Trust, UdpSocket};
///
/// # let proxy = std::net::UdpSocket::bind("127.0.0.1:0")?;
/// let socket = UdpSocket::bind("127.0.0.1:0", Trust::networks(["127.0.0.1"])?)?;
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
    slots: ppv2_udp::Batch,
    received: Vec<Received>,
    heard: Tick,
    /// Datagrams that the latest call dropped.
    dropped: usize,
}

/// One datagram of a batch, all but its bytes.
#[derive(Clone, Copy)]
struct Received {
    /// Where its payload begins in the buffer.
    start: usize,
    len: usize,
    /// Its TLVs stand right before its payload.
    tlvs_len: usize,
    client: SocketAddr,
    destination: Option<SocketAddr>,
    proxy: Option<SocketAddr>,
    way: Way,
}

impl Batch {
    /// A batch of so many slots, from 1 to 1024; what lies outside counts as the
    /// nearer of the two. A slot has 64 KiB, of which the system gives only what
    /// has ever been used.
    #[must_use]
    pub fn new(slots: usize) -> Self {
        Self {
            slots: ppv2_udp::Batch::new(slots.clamp(1, MAX_SLOTS)),
            received: Vec::new(),
            heard: Tick::roughly_now(),
            dropped: 0,
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
    pub fn get(&self, index: usize) -> Option<Admitted<'_>> {
        self.received.get(index).map(|one| self.admitted(one))
    }

    /// The datagrams in the order in which they arrived.
    pub fn iter(&self) -> BatchIter<'_> {
        BatchIter {
            batch: self,
            received: self.received.iter(),
        }
    }

    fn admitted(&self, one: &Received) -> Admitted<'_> {
        let bytes = self.slots.bytes();
        let payload = &bytes[one.start..][..one.len];
        let tlvs = &bytes[one.start - one.tlvs_len..one.start];
        Admitted {
            payload,
            client: one.client,
            destination: one.destination,
            proxy: one.proxy,
            // The bytes come from TLVs that were read, so they read again.
            tlvs: Tlvs::parse(tlvs).unwrap_or_default(),
            way: one.way,
            heard: self.heard,
        }
    }

    /// Receives by `receive`, which returns how many slots it filled, and keeps what
    /// `gate` lets in. Returns how many datagrams that were.
    pub(crate) fn fill<E>(
        &mut self,
        gate: &Gate,
        state: &SocketState,
        receive: impl FnOnce(&mut ppv2_udp::Batch) -> Result<usize, E>,
    ) -> Result<usize, E> {
        self.received.clear();
        self.dropped = 0;
        let filled = receive(&mut self.slots)?;
        self.heard = Tick::roughly_now();
        let mut admission = gate.admission(self.heard);
        for (about, range) in self.slots.datagrams(filled) {
            let datagram = &self.slots.bytes()[range.clone()];
            let local = state.reply_from(about);
            if let Ok(admitted) = admission.admit(about.peer, local, datagram) {
                self.received.push(Received {
                    start: range.end - admitted.payload.len(),
                    len: admitted.payload.len(),
                    tlvs_len: admitted.tlvs.as_bytes().len(),
                    client: admitted.client,
                    destination: admitted.destination,
                    proxy: admitted.proxy,
                    way: admitted.way,
                });
            } else {
                self.dropped += 1;
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
    received: slice::Iter<'b, Received>,
}

impl<'b> Iterator for BatchIter<'b> {
    type Item = Admitted<'b>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.received.next()?;
        Some(self.batch.admitted(next))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.received.size_hint()
    }
}

impl DoubleEndedIterator for BatchIter<'_> {
    fn next_back(&mut self) -> Option<Self::Item> {
        let next = self.received.next_back()?;
        Some(self.batch.admitted(next))
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
    type Item = Admitted<'b>;
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

/// Whom one datagram of [`send_batch`](crate::UdpSocket::send_batch) goes to.
/// Made from a client's address, or from a datagram that it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Recipient {
    /// This client, by the way that its latest datagram came.
    Client(SocketAddr),
    /// The client of this datagram, by the way that the datagram came.
    Datagram(ReplyTo),
    /// This very way, an [`Admitted::way`], even if it leads to another client by
    /// now: for applications that keep a table of their own.
    Way(Way),
}

impl From<SocketAddr> for Recipient {
    fn from(client: SocketAddr) -> Self {
        Self::Client(client)
    }
}

impl From<Admitted<'_>> for Recipient {
    fn from(admitted: Admitted<'_>) -> Self {
        Self::Datagram(admitted.reply_to())
    }
}

impl From<&Admitted<'_>> for Recipient {
    fn from(admitted: &Admitted<'_>) -> Self {
        Self::Datagram(admitted.reply_to())
    }
}

impl From<&Datagram> for Recipient {
    fn from(datagram: &Datagram) -> Self {
        Self::Datagram(datagram.reply_to())
    }
}
