//! What is sent, where to, and what became of it.

use std::io;
#[cfg(target_os = "linux")]
use std::net::IpAddr;
use std::net::SocketAddr;

use crate::TrafficClass;
use crate::batch::count;

/// Where datagrams go, and what is put in front of each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outgoing<'h> {
    /// The recipient; `None` on a connected socket.
    pub to: Option<SocketAddr>,
    /// The source address, for a socket that is bound to a wildcard; `None` for the
    /// kernel's choice. Its port is ignored, its scope is used.
    pub from: Option<SocketAddr>,
    /// Traffic class to send with.
    pub class: TrafficClass,
    /// Bytes in front of each datagram. They are not copied on Linux.
    pub header: &'h [u8],
}

#[cfg(target_os = "linux")]
impl Outgoing<'_> {
    /// Whether both go from one address to one address, with one class: they can leave as one
    /// burst, in which each datagram has a header of its own.
    #[inline]
    pub(crate) fn goes_as(&self, other: &Self) -> bool {
        self.to == other.to && self.class == other.class && self.from == other.from
    }
}

/// A datagram or a burst to send.
#[derive(Clone, Copy, Debug)]
pub struct Transmit<'d> {
    /// Where it goes.
    pub outgoing: Outgoing<'d>,
    /// The payload, of all datagrams of a burst.
    pub payload: &'d [u8],
    /// Bytes of each datagram but the last, which may have fewer.
    segment: usize,
}

impl<'d> Transmit<'d> {
    /// One datagram.
    #[must_use]
    pub fn datagram(outgoing: Outgoing<'d>, payload: &'d [u8]) -> Self {
        Self::burst(outgoing, payload, payload.len())
    }

    /// Datagrams of `segment` bytes each; the last has what remains.
    #[must_use]
    pub fn burst(outgoing: Outgoing<'d>, payload: &'d [u8], segment: usize) -> Self {
        Self {
            outgoing,
            payload,
            segment: segment.max(1),
        }
    }

    /// The number of datagrams. An empty payload is one.
    #[inline]
    pub(crate) fn datagrams(&self) -> usize {
        count(self.payload.len(), self.segment)
    }

    /// Bytes of the datagram of index `number`, with its header.
    #[cfg(target_os = "linux")]
    #[inline]
    pub(crate) fn len_with_header(&self, number: usize) -> usize {
        let left = self.payload.len() - (number * self.segment).min(self.payload.len());
        self.outgoing.header.len() + left.min(self.segment)
    }

    /// The payload of `count` datagrams from index `first` on.
    #[inline]
    pub(crate) fn slice(&self, first: usize, count: usize) -> &'d [u8] {
        let len = self.payload.len();
        let start = (first * self.segment).min(len);
        &self.payload[start..(start + count * self.segment).min(len)]
    }
}

/// Datagrams that were sent, and their bytes with headers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// The number of datagrams.
    pub datagrams: usize,
    /// Bytes of all of them.
    pub bytes: usize,
}

/// What went wrong while sending.
#[derive(Debug)]
pub enum SendFault {
    /// The kernel reported what became of an *earlier* datagram, such as "port
    /// unreachable". What was to be sent was sent all the same.
    Earlier(io::Error),
    /// Datagrams of the transmit were not sent.
    Lost {
        /// Why.
        error: io::Error,
        /// The number of datagrams.
        datagrams: usize,
        /// Bytes of the first, with its header.
        len: usize,
    },
}

/// What became of a datagram that was sent earlier (IP_RECVERR in ip(7)).
#[cfg(target_os = "linux")]
#[derive(Debug)]
pub struct SendReport {
    /// What the kernel makes of it, such as "connection refused" of ICMP's "port
    /// unreachable".
    pub error: io::Error,
    /// This host reports it, of a datagram that it could not send; the call that was to send
    /// it has failed, too. If not, a router or the server's host does, by ICMP.
    pub is_local: bool,
    /// Where the datagram was sent to; its port is 0 if this host reports it.
    pub to: SocketAddr,
    /// The address that it was sent from; `None` if this host reports it.
    pub from: Option<IpAddr>,
    /// Bytes of the longest IP packet that the path takes, if the datagram was longer.
    pub mtu: Option<u32>,
}
