//! Datagrams in and out: in batches, and in bursts within a batch.
//!
//! A burst is what one sender sent in one go, datagrams of one size but for the
//! last, which the kernel hands over in one piece (UDP_GRO) and takes in one
//! piece (UDP_SEGMENT). It is what QUIC, WireGuard and media servers send, and
//! it saves most of the way through the kernel for all but one of them.
//!
//! This module owns every system call of the data path and the only unsafe
//! code of the proxy, in `net/linux.rs`. Callers see plain
//! addresses, slices and [`io::Error`]s; what a socket is for, and whom a
//! datagram belongs to, is the worker's business.

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, RawFd};

use socket2::{Domain, Protocol, SockAddr, Type};

use linux as sys;

pub use cause::Cause;
pub use probe::{own_addresses, probe, probe_bursts, probe_source, source_towards};
pub use sys::{Readiness, Waker};

mod cause;
mod linux;
mod options;
mod probe;

/// Datagrams that one system call moves at the most. It bounds how long one
/// busy socket can keep the others waiting.
pub const BATCH: usize = 32;

/// Sockets that one wait reports at the most; more are reported by the next.
pub const READY: usize = 1024;

/// The longest header that a mode writes: 52 bytes, 7 more with a checksum.
pub const MAX_HEADER: usize = 64;

/// Longer than any UDP datagram, so that none is ever truncated.
const CAPACITY: usize = 65_536;

/// Distance between slots: not a power of two, or the first bytes of all
/// datagrams would share the same few sets of the processor's cache.
const STRIDE: usize = CAPACITY + 5 * 64;

/// Datagrams that the kernel takes in one burst (UDP_MAX_SEGMENTS in Linux
/// before 6.9, which raised it).
const MAX_BURST: usize = 64;

/// Bytes that a burst may have, headers included: what fits one IP packet, less
/// the longest IP and UDP headers.
const MAX_BURST_BYTES: usize = 65_535 - 48;

/// Buffers that every listener asks for, bytes. The kernel grants at most
/// `net.core.rmem_max` and `wmem_max`.
pub const LISTENER_BUFFER: usize = 4 << 20;

/// Receive buffer that every session asks for, bytes, for servers that answer
/// in bursts. It is a limit, and takes memory only while replies wait in it.
const SESSION_BUFFER: usize = 1 << 20;

/// The traffic class of an IP packet, or type of service in IPv4: six bits of
/// DSCP (RFC 2474) and two of ECN (RFC 3168).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrafficClass(pub u8);

impl TrafficClass {
    /// The ECN bits alone.
    #[must_use]
    pub fn ecn(self) -> Self {
        Self(self.0 & 0b11)
    }
}

/// What is known of a received datagram besides its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// Who sent it.
    pub peer: SocketAddr,
    /// The local address that it was sent to. A link-local one carries its
    /// interface as scope.
    pub local: SocketAddr,
    /// It was sent to a multicast or broadcast address, from which no reply
    /// can leave.
    pub group: bool,
    /// Number of the interface that it came in by; 0 where nobody asked for it.
    pub interface: u32,
    /// Traffic class that it came with.
    pub class: TrafficClass,
    /// Datagrams that this socket has lost so far because its buffer was full.
    /// The kernel counts from 0 again after 2³².
    pub overflows: u32,
    /// Bytes of payload, of all datagrams of a burst together.
    pub len: usize,
    /// Bytes of each datagram of a burst but the last, which may have fewer;
    /// `len` if this is no burst.
    pub segment: usize,
    /// The kernel had more bytes than the buffer holds.
    pub truncated: bool,
}

impl Received {
    /// How many datagrams these are: more than one in a burst.
    #[must_use]
    pub fn datagrams(&self) -> usize {
        self.len.div_ceil(self.segment.max(1)).max(1)
    }
}

impl Received {
    /// Notes the packet info of an IPv4 datagram: the address that it was written
    /// to, and the one that a reply leaves from, which differ for broadcast and
    /// multicast (ip(7)).
    fn note_local_v4(&mut self, written_to: Ipv4Addr, local: Ipv4Addr) {
        self.group = written_to != local;
        self.local = SocketAddrV4::new(local, self.local.port()).into();
    }

    /// Notes the packet info of an IPv6 datagram.
    fn note_local_v6(&mut self, ip: Ipv6Addr, interface: u32) {
        let scope = if ip.is_unicast_link_local() {
            interface
        } else {
            0
        };
        self.group = ip.is_multicast();
        self.local = SocketAddrV6::new(ip, self.local.port(), 0, scope).into();
    }
}

/// Where the datagrams of a slot go, and what is put in front of them.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing<'h> {
    /// The addressee; `None` on a connected socket.
    pub to: Option<SocketAddr>,
    /// The source address, where the socket is bound to a wildcard.
    pub from: Option<SocketAddr>,
    /// Traffic class to send with.
    pub class: TrafficClass,
    /// Bytes to put in front, at most [`MAX_HEADER`].
    pub header: &'h [u8],
}

/// Datagrams that were sent, and their bytes with headers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// How many.
    pub datagrams: usize,
    /// How long together.
    pub bytes: usize,
}

/// What went wrong while sending the datagrams of a slot.
#[derive(Debug)]
pub enum SendFault {
    /// The kernel reported what became of an *earlier* datagram, such as "port
    /// unreachable". These were sent all the same.
    Earlier(io::Error),
    /// So many datagrams were not sent; `len` is the length of the first with
    /// its header.
    Lost {
        /// Why.
        error: io::Error,
        /// How many.
        datagrams: usize,
        /// Bytes of the first.
        len: usize,
    },
}

/// Datagrams in a row of what one slot holds: all, unless a burst is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The slot.
    pub slot: usize,
    /// Number of the first.
    first: usize,
    /// Number of the one behind the last.
    end: usize,
}

impl Part {
    /// How many datagrams these are.
    #[must_use]
    pub fn datagrams(&self) -> usize {
        self.end - self.first
    }

    /// Cuts off the first `count` of them, or all if there are no more.
    #[must_use]
    pub fn take(&mut self, count: usize) -> Self {
        let whole = *self;
        self.first += count.min(self.datagrams());
        Self {
            end: self.first,
            ..whole
        }
    }
}

/// Room for what one call receives: [`BATCH`] slots, each for a datagram or a
/// burst of them.
#[derive(Debug)]
pub struct Batch {
    bytes: Box<[u8]>,
    received: [Option<Received>; BATCH],
}

impl Batch {
    /// Allocates the buffers: 2 MiB, of which the kernel backs what datagrams
    /// touch.
    #[must_use]
    pub fn new() -> Self {
        Self {
            bytes: vec![0; BATCH * STRIDE].into_boxed_slice(),
            received: [None; BATCH],
        }
    }

    /// What is known of what `slot` holds; `None` if nothing was received into
    /// it.
    #[must_use]
    pub fn received(&self, slot: usize) -> Option<Received> {
        self.received[slot]
    }

    /// All that `slot` holds.
    #[must_use]
    pub fn whole(&self, slot: usize) -> Part {
        let end = self.received[slot].map_or(0, |received| received.datagrams());
        Part {
            slot,
            first: 0,
            end,
        }
    }

    /// Bytes of payload in `part`.
    #[must_use]
    pub fn len_of(&self, part: Part) -> usize {
        let (len, segment) = self.received[part.slot].map_or((0, 0), |r| (r.len, r.segment));
        (part.end * segment).min(len) - (part.first * segment).min(len)
    }

    /// The first datagram of `part`; empty if there is none.
    #[must_use]
    pub fn first_of(&self, part: Part) -> &[u8] {
        datagram(self, part.slot, part.first)
    }

    /// The payload in `slot`.
    fn payload(&self, slot: usize) -> &[u8] {
        let len = self.received[slot].map_or(0, |received| received.len);
        &self.bytes[slot * STRIDE..][..len]
    }
}

impl Default for Batch {
    fn default() -> Self {
        Self::new()
    }
}

/// What a socket is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Refuse rather than cut up a datagram that exceeds the interface's MTU, and
    /// forbid routers to.
    pub dont_fragment: bool,
    /// Have bursts handed over in one piece. Off where datagrams are counted one by
    /// one, which saves cutting them.
    pub bursts: bool,
}

/// How a listener's socket is bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Binding {
    /// Together with other sockets of the same user at the same address.
    pub shared: bool,
    /// Also to an address that is not this host's, yet.
    pub free: bool,
}

/// A non-blocking UDP socket.
#[derive(Debug)]
pub struct Socket {
    inner: socket2::Socket,
    /// Datagrams longer than this, header included, have been refused as a
    /// burst: the interface's MTU is smaller, or the device can't. They go one by one.
    burst_limit: Cell<usize>,
    /// What the socket is bound to; of a session's socket only the family counts.
    bound: SocketAddr,
    /// Bound to all addresses of the host: the kernel says per datagram which
    /// one it was, and is told per reply.
    wildcard: bool,
}

impl Socket {
    fn new(inner: socket2::Socket, bound: SocketAddr, wildcard: bool) -> Self {
        Self {
            inner,
            burst_limit: Cell::new(usize::MAX),
            bound,
            wildcard,
        }
    }

    /// A socket that clients write to.
    ///
    /// # Errors
    ///
    /// Those of `socket`, `setsockopt` and `bind`.
    pub fn listen(address: SocketAddr, binding: Binding, options: Options) -> io::Result<Self> {
        let inner = open(address, options)?;
        let wildcard = address.ip().is_unspecified();
        if address.is_ipv6() {
            // A wildcard of each family can then be bound side by side, and no
            // IPv4 client appears under a mapped address.
            inner.set_only_v6(true)?;
        }
        if binding.shared {
            inner.set_reuse_port(true)?;
        }
        if binding.free {
            options::allow_missing_address(&inner, address.is_ipv6())?;
        }
        // Best effort: small buffers work, they only overflow earlier.
        let _ = inner.set_recv_buffer_size(LISTENER_BUFFER);
        let _ = inner.set_send_buffer_size(LISTENER_BUFFER);
        if wildcard {
            sys::report_local_address(&inner, address.is_ipv6())?;
        }
        inner.bind(&SockAddr::from(address))?;
        let bound = local_address(&inner)?;
        Ok(Self::new(inner, bound, wildcard))
    }

    /// A session's socket, connected to `server`, from the address `source` of
    /// this host or one of the kernel's choice.
    ///
    /// # Errors
    ///
    /// Those of `socket`, `setsockopt` and `connect`: no descriptors, no local
    /// ports, no route.
    pub fn connect(
        server: SocketAddr,
        source: Option<IpAddr>,
        options: Options,
    ) -> io::Result<Self> {
        let inner = open(server, options)?;
        let _ = inner.set_recv_buffer_size(SESSION_BUFFER);
        if server.is_ipv6() {
            // Its port is then none of those of IPv4.
            inner.set_only_v6(true)?;
        }
        if let Some(source) = source {
            inner.bind(&SockAddr::from(SocketAddr::new(source, 0)))?;
        }
        inner.connect(&SockAddr::from(server))?;
        Ok(Self::new(inner, server, false))
    }

    /// A session's socket to `server` in the name of a client: what it sends comes
    /// from the address `client`, which is not this host's, and from that port,
    /// or one of the kernel's choice if it is 0. `takes_replies` connects it, so
    /// that nobody but the server can answer. Replies that the kernel is to forward
    /// need one that is not: a connected socket that they match has it drop them
    /// without a word.
    ///
    /// # Errors
    ///
    /// Those of `socket`, `setsockopt`, `bind` and `connect`: no descriptors, the
    /// port is taken or, as [`Cause::NotPermitted`], a capability is missing:
    /// CAP_NET_RAW for IPv4, CAP_NET_BIND_SERVICE for ports below 1024.
    pub fn in_name_of(
        client: SocketAddr,
        server: SocketAddr,
        takes_replies: bool,
        options: Options,
    ) -> io::Result<Self> {
        let inner = open(server, options)?;
        options::allow_foreign_source(&inner, server.is_ipv6())?;
        if client.port() != 0 {
            // A listener on a wildcard has the port of clients that write from its
            // own, and the client's port serves its sessions to other servers.
            inner.set_reuse_port(true)?;
        }
        inner.bind(&SockAddr::from(client))?;
        if takes_replies {
            let _ = inner.set_recv_buffer_size(SESSION_BUFFER);
            inner.connect(&SockAddr::from(server))?;
        }
        Ok(Self::new(inner, server, false))
    }

    /// The address and port of this host, or of the client, that a session's socket sends
    /// from.
    ///
    /// # Errors
    ///
    /// Those of `getsockname`: none is known to occur here.
    pub fn local(&self) -> io::Result<SocketAddr> {
        local_address(&self.inner)
    }

    /// Nobody will receive from the socket: what comes all the same is dropped by
    /// the kernel, once it has filled the smallest buffer that there is.
    pub fn ignore_replies(&self) {
        // Best effort: a larger one only takes more memory.
        let _ = self.inner.set_recv_buffer_size(0);
    }

    /// Has an open socket serve other options from the next datagram on. Where
    /// bursts have been handed over in one piece, they go on being so: of those
    /// that wait already, the kernel would no longer tell the size of a datagram.
    ///
    /// # Errors
    ///
    /// Those of `setsockopt`: none is known to occur here on Linux.
    pub fn adapt(&self, options: Options) -> io::Result<()> {
        let v6 = self.bound.is_ipv6();
        options::set_fragmentation(&self.inner, v6, options.dont_fragment)?;
        if options.bursts {
            // Best effort, as at the beginning.
            let _ = sys::receive_bursts(&self.inner);
        }
        Ok(())
    }

    /// Lets others be bound to the socket's port that share it, too: those that write
    /// from a client's own port, which is that of a wildcard here. On Linux it holds
    /// for a bound socket as well.
    ///
    /// # Errors
    ///
    /// Those of `setsockopt`.
    pub fn share_port(&self) -> io::Result<()> {
        self.inner.set_reuse_port(true)
    }

    /// The address that the socket is bound to.
    #[must_use]
    pub fn bound(&self) -> SocketAddr {
        self.bound
    }

    /// Has the interface told that each datagram comes in by, over IPv4.
    ///
    /// # Errors
    ///
    /// Those of `setsockopt`: none is known to occur here.
    pub fn report_interface(&self) -> io::Result<()> {
        sys::report_local_address(&self.inner, false)
    }

    /// Receives into the slots of `batch` from `first` up to, not including,
    /// `end`, and returns how many were filled. Fewer than there was room for
    /// means that nothing is left. Room for one asks the kernel once, where more
    /// asks it once more to learn that nothing is left.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::WouldBlock`] when there is nothing; otherwise what the
    /// kernel says, on a connected socket also of datagrams sent earlier.
    pub fn receive(&self, batch: &mut Batch, first: usize, end: usize) -> io::Result<usize> {
        sys::receive(self, batch, first, end)
    }

    /// Sends what `slots` hold, in order, bursts in one piece where that goes.
    /// `outgoing` says where each slot goes and with which header, which is not
    /// copied; `fault` hears of all that could not be sent, after which the rest
    /// is tried all the same.
    pub fn send<'h>(
        &self,
        batch: &Batch,
        slots: &[usize],
        outgoing: impl Fn(usize) -> Outgoing<'h>,
        fault: impl FnMut(usize, SendFault),
    ) -> Sent {
        let parts = slots.iter().map(|slot| batch.whole(*slot));
        sys::send(self, batch, parts, outgoing, fault)
    }

    /// As [`send`](Self::send), of these parts of slots.
    pub fn send_parts<'h>(
        &self,
        batch: &Batch,
        parts: &[Part],
        outgoing: impl Fn(usize) -> Outgoing<'h>,
        fault: impl FnMut(usize, SendFault),
    ) -> Sent {
        sys::send(self, batch, parts.iter().copied(), outgoing, fault)
    }

    fn fd(&self) -> RawFd {
        self.inner.as_raw_fd()
    }
}

/// What listeners and sessions have in common: non-blocking, telling ECN bits.
fn open(address: SocketAddr, options: Options) -> io::Result<socket2::Socket> {
    let socket = socket2::Socket::new(
        Domain::for_address(address),
        Type::DGRAM.nonblocking(),
        Some(Protocol::UDP),
    )?;
    if address.is_ipv6() {
        socket.set_recv_tclass_v6(true)?;
    } else {
        socket.set_recv_tos_v4(true)?;
    }
    sys::report_overflows(&socket)?;
    options::set_fragmentation(&socket, address.is_ipv6(), options.dont_fragment)?;
    if options.bursts {
        // Best effort: a kernel without it hands over single datagrams.
        let _ = sys::receive_bursts(&socket);
    }
    Ok(socket)
}

fn local_address(socket: &socket2::Socket) -> io::Result<SocketAddr> {
    socket
        .local_addr()?
        .as_socket()
        .ok_or_else(|| io::Error::other("the kernel bound a UDP socket to no IP address"))
}

/// Datagram number `number` of a slot, which holds one or a burst.
fn datagram(batch: &Batch, slot: usize, number: usize) -> &[u8] {
    let payload = batch.payload(slot);
    let segment = batch.received(slot).map_or(0, |received| received.segment);
    let start = (number * segment).min(payload.len());
    let end = start.saturating_add(segment).min(payload.len());
    &payload[start..end]
}

#[cfg(test)]
mod tests;
