//! Datagrams in and out, in batches, with room in front of each for a header.
//!
//! This module owns every system call of the data path and the only unsafe
//! code of the proxy, in `net/linux.rs`. Callers see plain addresses, slices
//! and [`io::Error`]s; what a socket is for, and whom a datagram belongs to, is
//! the worker's business.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use socket2::{Domain, Protocol, SockAddr, Type};

#[cfg(target_os = "linux")]
#[path = "net/linux.rs"]
mod sys;
#[cfg(not(target_os = "linux"))]
compile_error!("the proxy's data path is written for Linux");

/// Datagrams that one system call moves at the most. It bounds how long one
/// busy socket can keep the others waiting.
pub const BATCH: usize = 32;

/// Room in front of every received datagram: the longest header that a mode
/// writes (52 bytes, 7 more with a checksum), rounded up to a cache line.
pub const HEADROOM: usize = 64;

/// Longer than any UDP datagram, so that none is ever truncated.
const CAPACITY: usize = 65_536;
const STRIDE: usize = HEADROOM + CAPACITY;

/// Receive buffer that every listener asks for, bytes. The kernel grants at
/// most `net.core.rmem_max`.
const LISTENER_BUFFER: usize = 4 << 20;

/// The two ECN bits of an IP header (RFC 3168).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ecn(u8);

impl Ecn {
    /// The ECN bits of a TOS or traffic class byte.
    #[must_use]
    pub fn of(traffic_class: u8) -> Self {
        Self(traffic_class & 0b11)
    }

    /// The bits, 0 for "not capable".
    #[must_use]
    pub fn bits(self) -> u8 {
        self.0
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
    /// Congestion marks.
    pub ecn: Ecn,
    /// Bytes of payload.
    pub len: usize,
    /// The kernel had more bytes than the buffer holds.
    pub truncated: bool,
}

/// Where a datagram of a batch goes.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing {
    /// The addressee; `None` on a connected socket.
    pub to: Option<SocketAddr>,
    /// The source address, where the socket is bound to a wildcard.
    pub from: Option<SocketAddr>,
    /// Congestion marks to set.
    pub ecn: Ecn,
}

/// What went wrong while sending one datagram of a batch.
#[derive(Debug)]
pub enum SendFault {
    /// The kernel reported what became of an *earlier* datagram, such as "port
    /// unreachable". This one was sent all the same.
    Earlier(io::Error),
    /// This datagram was not sent.
    Lost(io::Error),
}

/// What an error of a socket call means for the datagram at hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Nothing is there to receive, or nothing more can be queued.
    WouldBlock,
    /// Longer than the path or UDP allows.
    Oversize,
    /// No route to the addressee.
    Unreachable,
    /// The process, or the host, has no file descriptor left.
    NoDescriptors,
    /// No local port is left.
    NoPorts,
    /// The kernel has no memory for it.
    NoMemory,
    /// Anything else.
    Other,
}

impl Cause {
    /// Reads the error number of `error`.
    #[must_use]
    pub fn of(error: &io::Error) -> Self {
        sys::cause(error)
    }
}

/// Up to [`BATCH`] datagrams, each with room for a header in front.
#[derive(Debug)]
pub struct Batch {
    bytes: Box<[u8]>,
    received: Vec<Option<Received>>,
    prefix: [usize; BATCH],
}

impl Batch {
    /// Allocates the buffers: about 2 MiB, of which the kernel backs what
    /// datagrams touch.
    #[must_use]
    pub fn new() -> Self {
        Self {
            bytes: vec![0; BATCH * STRIDE].into_boxed_slice(),
            received: vec![None; BATCH],
            prefix: [0; BATCH],
        }
    }

    /// What is known of the datagram in `slot`; `None` if nothing was received
    /// into it.
    #[must_use]
    pub fn received(&self, slot: usize) -> Option<Received> {
        self.received[slot]
    }

    /// Writes `header` directly in front of the payload in `slot`, which stays
    /// where it is.
    ///
    /// # Panics
    ///
    /// If the header is longer than [`HEADROOM`].
    pub fn prefix(&mut self, slot: usize, header: &[u8]) {
        let payload = slot * STRIDE + HEADROOM;
        self.bytes[payload - header.len()..payload].copy_from_slice(header);
        self.prefix[slot] = header.len();
    }

    /// Bytes that will be sent for `slot`: header and payload.
    #[must_use]
    pub fn wire_len(&self, slot: usize) -> usize {
        self.prefix[slot] + self.received[slot].map_or(0, |received| received.len)
    }
}

impl Default for Batch {
    fn default() -> Self {
        Self::new()
    }
}

/// A non-blocking UDP socket.
#[derive(Debug)]
pub struct Socket {
    inner: socket2::Socket,
    /// What the socket is bound to; of a session's socket only the family counts.
    bound: SocketAddr,
    /// Bound to all addresses of the host: the kernel says per datagram which
    /// one it was, and is told per reply.
    wildcard: bool,
}

impl Socket {
    /// A socket that clients write to. `shared` lets the sockets of several
    /// workers bind the same address; `dont_fragment` is as for
    /// [`connect`](Self::connect).
    ///
    /// # Errors
    ///
    /// Those of `socket`, `setsockopt` and `bind`.
    pub fn listen(address: SocketAddr, shared: bool, dont_fragment: bool) -> io::Result<Self> {
        let inner = open(address, dont_fragment)?;
        let wildcard = address.ip().is_unspecified();
        if address.is_ipv6() {
            // A wildcard of each family can then be bound side by side, and no
            // IPv4 client appears under a mapped address.
            inner.set_only_v6(true)?;
        }
        if shared {
            inner.set_reuse_port(true)?;
        }
        // Best effort: a small buffer works, it only overflows earlier.
        let _ = inner.set_recv_buffer_size(LISTENER_BUFFER);
        if wildcard {
            sys::report_local_address(&inner, address.is_ipv6())?;
        }
        inner.bind(&SockAddr::from(address))?;
        let bound = local_address(&inner)?;
        Ok(Self {
            inner,
            bound,
            wildcard,
        })
    }

    /// A session's socket, connected to `server`. With `dont_fragment` a
    /// datagram that exceeds the path's MTU is refused rather than cut up.
    ///
    /// # Errors
    ///
    /// Those of `socket`, `setsockopt` and `connect`: no descriptors, no local
    /// ports, no route.
    pub fn connect(server: SocketAddr, dont_fragment: bool) -> io::Result<Self> {
        let inner = open(server, dont_fragment)?;
        inner.connect(&SockAddr::from(server))?;
        Ok(Self {
            inner,
            bound: server,
            wildcard: false,
        })
    }

    /// The address that the socket is bound to.
    #[must_use]
    pub fn bound(&self) -> SocketAddr {
        self.bound
    }

    /// Tells `registry` to report under `token` that datagrams have arrived.
    ///
    /// # Errors
    ///
    /// Those of `epoll_ctl`.
    pub fn register(&self, registry: &Registry, token: Token) -> io::Result<()> {
        registry.register(&mut SourceFd(&self.fd()), token, Interest::READABLE)
    }

    /// Ends what [`register`](Self::register) began.
    ///
    /// # Errors
    ///
    /// Those of `epoll_ctl`.
    pub fn deregister(&self, registry: &Registry) -> io::Result<()> {
        registry.deregister(&mut SourceFd(&self.fd()))
    }

    /// Receives datagrams into the slots of `batch` from `first` up to, not
    /// including, `end`, and returns how many came. Fewer than there was room
    /// for means that none are left.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::WouldBlock`] when there are none; otherwise what the
    /// kernel says, on a connected socket also of datagrams sent earlier.
    pub fn receive(&self, batch: &mut Batch, first: usize, end: usize) -> io::Result<usize> {
        sys::receive(self, batch, first, end)
    }

    /// Sends the datagrams in `slots`, each with its header if it has one.
    /// `outgoing` says where each goes; `fault` hears of every one that could
    /// not be sent, after which the rest are tried all the same. Returns how
    /// many were sent.
    pub fn send(
        &self,
        batch: &Batch,
        slots: &[usize],
        outgoing: impl Fn(usize) -> Outgoing,
        mut fault: impl FnMut(usize, SendFault),
    ) -> usize {
        let mut sent = 0;
        for slots in slots.chunks(BATCH) {
            sent += sys::send(self, batch, slots, &outgoing, &mut fault);
        }
        sent
    }

    /// Largest UDP payload that passes to the connected server in one piece, as
    /// far as the kernel knows: the path's MTU less IP and UDP headers.
    ///
    /// # Errors
    ///
    /// Those of `getsockopt`.
    pub fn unfragmented_payload(&self) -> io::Result<usize> {
        let v6 = self.bound.is_ipv6();
        let headers = if v6 { 40 + 8 } else { 20 + 8 };
        Ok(sys::path_mtu(&self.inner, v6)?.saturating_sub(headers))
    }

    fn fd(&self) -> RawFd {
        self.inner.as_raw_fd()
    }
}

/// What listeners and sessions have in common: non-blocking, telling ECN bits.
fn open(address: SocketAddr, dont_fragment: bool) -> io::Result<socket2::Socket> {
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
    sys::set_fragmentation(&socket, address.is_ipv6(), dont_fragment)?;
    Ok(socket)
}

fn local_address(socket: &socket2::Socket) -> io::Result<SocketAddr> {
    socket
        .local_addr()?
        .as_socket()
        .ok_or_else(|| io::Error::other("the kernel bound a UDP socket to no IP address"))
}

/// Whether binding `address` alone, shared with nobody, is possible: the way to
/// learn that another process holds it, which binding shared would hide.
///
/// # Errors
///
/// Those of `socket` and `bind`.
pub fn probe(address: SocketAddr) -> io::Result<()> {
    Socket::listen(address, false, false).map(drop)
}

/// Whether `ip` is a link-local IPv6 address, which means nothing without the
/// interface.
fn needs_scope(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::time::{Duration, Instant};

    use super::*;

    fn receive(socket: &Socket, batch: &mut Batch, count: usize) {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut have = 0;
        while have < count {
            assert!(Instant::now() < deadline, "only {have} of {count} came");
            match socket.receive(batch, have, BATCH) {
                Ok(n) => have += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn back_to_sender(batch: &Batch, slot: usize) -> Outgoing {
        let received = batch.received(slot).unwrap();
        Outgoing {
            to: Some(received.peer),
            from: Some(received.local),
            ecn: received.ecn,
        }
    }

    #[test]
    fn a_wildcard_socket_knows_the_address_written_to_and_answers_from_it() {
        for (wildcard, addresses) in [
            ("0.0.0.0:0", vec!["127.0.0.1", "127.0.0.2", "127.77.1.9"]),
            ("[::]:0", vec!["::1"]),
        ] {
            let socket = Socket::listen(wildcard.parse().unwrap(), false, false).unwrap();
            let mut batch = Batch::new();
            for ip in addresses {
                let ip: IpAddr = ip.parse().unwrap();
                let target = SocketAddr::new(ip, socket.bound().port());
                let client = UdpSocket::bind(SocketAddr::new(ip, 0)).unwrap();
                client.send_to(b"question", target).unwrap();
                receive(&socket, &mut batch, 1);
                assert_eq!(batch.received(0).unwrap().local, target);

                let sent = socket.send(
                    &batch,
                    &[0],
                    |slot| back_to_sender(&batch, slot),
                    |_, fault| panic!("{fault:?}"),
                );
                assert_eq!(sent, 1);
                let mut answer = [0; 100];
                let (len, from) = client.recv_from(&mut answer).unwrap();
                assert_eq!((&answer[..len], from), (&b"question"[..], target));
            }
        }
    }

    #[test]
    fn a_header_is_sent_in_front_of_the_payload_of_its_own_slot() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let listener = Socket::listen("127.0.0.1:0".parse().unwrap(), false, false).unwrap();
        let upstream = Socket::connect(server.local_addr().unwrap(), false).unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        let payloads = [&b""[..], b"one", &[7; 40_000]];
        for payload in payloads {
            client.send_to(payload, listener.bound()).unwrap();
        }
        let mut batch = Batch::new();
        receive(&listener, &mut batch, payloads.len());
        batch.prefix(0, b"a");
        batch.prefix(2, &[b'h'; HEADROOM]);
        let plain = |_| Outgoing {
            to: None,
            from: None,
            ecn: Ecn::default(),
        };
        let sent = upstream.send(&batch, &[0, 1, 2], plain, |_, fault| panic!("{fault:?}"));
        assert_eq!(sent, 3);
        let mut datagram = vec![0; CAPACITY];
        for expected in [
            b"a".to_vec(),
            b"one".to_vec(),
            [vec![b'h'; HEADROOM], vec![7; 40_000]].concat(),
        ] {
            let len = server.recv(&mut datagram).unwrap();
            assert!(datagram[..len] == expected);
        }
    }

    #[test]
    fn what_does_not_fit_is_reported_and_the_rest_is_sent() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let listener = Socket::listen("127.0.0.1:0".parse().unwrap(), false, false).unwrap();
        let upstream = Socket::connect(server.local_addr().unwrap(), false).unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.send_to(&[1; 65_507], listener.bound()).unwrap();
        client.send_to(b"behind it", listener.bound()).unwrap();
        let mut batch = Batch::new();
        receive(&listener, &mut batch, 2);
        assert_eq!(batch.received(0).unwrap().len, 65_507);
        batch.prefix(0, &[0; 28]);
        let mut lost = Vec::new();
        let sent = upstream.send(
            &batch,
            &[0, 1],
            |_| Outgoing {
                to: None,
                from: None,
                ecn: Ecn::default(),
            },
            |slot, fault| match fault {
                SendFault::Lost(error) => lost.push((slot, error.raw_os_error())),
                SendFault::Earlier(error) => panic!("{error}"),
            },
        );
        assert_eq!(sent, 1);
        assert_eq!(lost, [(0, Some(libc::EMSGSIZE))]);
        let mut datagram = [0; 100];
        let len = server.recv(&mut datagram).unwrap();
        assert_eq!(&datagram[..len], b"behind it");
    }

    #[test]
    fn a_refusal_neither_loses_the_next_datagram_nor_shows_up_as_one() {
        let closed = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = closed.local_addr().unwrap();
        drop(closed);
        let upstream = Socket::connect(address, false).unwrap();
        let listener = Socket::listen("127.0.0.1:0".parse().unwrap(), false, false).unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.send_to(b"first", listener.bound()).unwrap();
        client.send_to(b"second", listener.bound()).unwrap();
        let mut batch = Batch::new();
        receive(&listener, &mut batch, 2);
        let plain = |_| Outgoing {
            to: None,
            from: None,
            ecn: Ecn::default(),
        };
        assert_eq!(
            upstream.send(&batch, &[0], plain, |_, f| panic!("{f:?}")),
            1
        );

        // Loopback delivers the ICMP error before `send` returns.
        let server = UdpSocket::bind(address).unwrap();
        let mut earlier = 0;
        let sent = upstream.send(&batch, &[1], plain, |_, fault| match fault {
            SendFault::Earlier(_) => earlier += 1,
            SendFault::Lost(error) => panic!("{error}"),
        });
        assert_eq!((sent, earlier), (1, 1));
        let mut datagram = [0; 100];
        let len = server.recv(&mut datagram).unwrap();
        assert_eq!(&datagram[..len], b"second");
        let nothing = upstream.receive(&mut batch, 0, BATCH).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
    }
}
