//! The sockets of a proxy: its listeners, and the sockets to its servers.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use socket2::{Domain, Protocol, SockAddr, Type};

use crate::{
    Batch, Outgoing, Part, SendFault, SendReport, Sent, SocketState, Transmit, linux, options,
};

/// Bytes of the buffers that every listener asks for. The kernel grants at most
/// `net.core.rmem_max` and `wmem_max` (socket(7)).
pub const LISTENER_BUFFER: usize = 4 << 20;

/// Bytes of the receive buffer that every socket to a server asks for, for servers that
/// answer in bursts. It is a limit, and takes memory only while replies wait in it.
const SESSION_BUFFER: usize = 1 << 20;

/// Bytes of the buffers that every shared socket asks for: it has the replies of all
/// sessions of a worker. The kernel grants at most `net.core.rmem_max` and `wmem_max`.
pub const SHARED_BUFFER: usize = 16 << 20;

/// What a socket is made for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Options {
    /// Refuse to send what exceeds the interface's MTU, instead of fragmenting it, and
    /// forbid routers to fragment it.
    pub dont_fragment: bool,
    /// Receive bursts in one piece. Off where datagrams are counted one by one, which saves
    /// splitting them.
    pub bursts: bool,
}

/// How a listener's socket is bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Binding {
    /// Together with other sockets of the same user at the same address (SO_REUSEPORT in
    /// socket(7)).
    pub shared: bool,
    /// Also to an address that this host does not have yet (IP_FREEBIND in ip(7)).
    pub free: bool,
}

/// A socket that [`Socket::listen`], [`Socket::connect`] or another function here has made in
/// another process, which has passed its descriptor on: for [`Socket::adopt`].
#[derive(Debug)]
pub struct Adoptable {
    inner: socket2::Socket,
    v6: bool,
    cookie: u64,
}

impl AsFd for Adoptable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

impl Adoptable {
    /// Finds out what the descriptor is.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidInput`] if it is anything but a non-blocking UDP socket.
    pub fn check(descriptor: OwnedFd) -> io::Result<Self> {
        let inner = socket2::Socket::from(descriptor);
        let v6 = inner.domain()? == Domain::IPV6;
        check_udp(&inner, v6)?;
        if !inner.nonblocking()? {
            return Err(invalid("not a non-blocking socket"));
        }
        let cookie = inner.cookie()?;
        Ok(Self { inner, v6, cookie })
    }

    /// As [`Socket::cookie`].
    #[must_use]
    pub fn cookie(&self) -> u64 {
        self.cookie
    }
}

/// A non-blocking UDP socket that reports traffic classes and overflows.
#[derive(Debug)]
pub struct Socket {
    pub(crate) inner: socket2::Socket,
    /// Of a socket to a server, it is made as if bound to the server's address.
    state: SocketState,
    /// Others have descriptors of it, too.
    is_kept: bool,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

impl Socket {
    fn new(inner: socket2::Socket, bound: SocketAddr) -> Self {
        Self {
            inner,
            state: SocketState::unasked(bound),
            is_kept: false,
        }
    }

    /// A socket that clients write to. Bound to a wildcard, it reports the address that each
    /// datagram was sent to, and sends from the one that [`Outgoing::from`] names.
    ///
    /// # Errors
    ///
    /// Those of `socket`, `setsockopt` and `bind`.
    pub fn listen(address: SocketAddr, binding: Binding, options: Options) -> io::Result<Self> {
        let inner = open(address, options)?;
        if address.is_ipv6() {
            // A wildcard of each family can then be bound side by side, and no IPv4 client
            // appears under a mapped address.
            inner.set_only_v6(true)?;
        }
        prepare_listener(&inner, address, binding)?;
        inner.bind(&SockAddr::from(address))?;
        let bound = local_address(&inner)?;
        Ok(Self::new(inner, bound))
    }

    /// As [`listen`](Self::listen), with a socket that is bound already and that others keep
    /// descriptors of, such as a service manager. It gets the options that `listen` sets.
    /// Datagrams that wait in it are received like those to come.
    ///
    /// # Errors
    ///
    /// Those of `getsockname` and `setsockopt`; [`io::ErrorKind::InvalidInput`] if it is
    /// bound to `[::]` and takes IPv4 datagrams, too, which can't be changed.
    pub fn inherit(socket: UdpSocket, binding: Binding, options: Options) -> io::Result<Self> {
        let inner = socket2::Socket::from(socket);
        let bound = local_address(&inner)?;
        if bound.is_ipv6() && bound.ip().is_unspecified() && !inner.only_v6()? {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it takes IPv4 datagrams, too",
            ));
        }
        inner.set_nonblocking(true)?;
        inner.set_cloexec(true)?;
        report_classes(&inner, bound, options)?;
        prepare_listener(&inner, bound, binding)?;
        Ok(Self {
            is_kept: true,
            ..Self::new(inner, bound)
        })
    }

    /// It, as one of which others keep descriptors.
    #[must_use]
    pub fn keep(mut self) -> Self {
        self.is_kept = true;
        self
    }

    /// Whether others keep descriptors of it ([`inherit`](Self::inherit)): it stays bound, and
    /// takes datagrams, after this one is dropped.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.is_kept
    }

    /// A session's socket, connected to `server`, from the address `source` of this host or
    /// one of the kernel's choice.
    ///
    /// # Errors
    ///
    /// Those of `socket`, `setsockopt` and `connect`: no descriptors, no local ports, no
    /// route.
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
        Ok(Self::new(inner, server))
    }

    /// As [`connect`](Self::connect), for a socket that many sessions share: it has the
    /// buffers of [`shared`](Self::shared).
    ///
    /// # Errors
    ///
    /// Those of [`connect`](Self::connect).
    pub fn connect_shared(
        server: SocketAddr,
        source: Option<IpAddr>,
        options: Options,
    ) -> io::Result<Self> {
        let socket = Self::connect(server, source, options)?;
        // Best effort, as a listener's.
        let _ = socket.inner.set_recv_buffer_size(SHARED_BUFFER);
        let _ = socket.inner.set_send_buffer_size(SHARED_BUFFER);
        Ok(socket)
    }

    /// A session's socket to `server` that sends from the address of a client: from
    /// `client`, which is not this host's, and from its port, or one of the kernel's choice
    /// if that is 0. With `takes_replies` it is connected, so that only the server can
    /// answer. Replies that the kernel is to forward need a socket that is not connected:
    /// those that match a connected socket are dropped without a word.
    ///
    /// # Errors
    ///
    /// Those of `socket`, `setsockopt`, `bind` and `connect`: no descriptors, the port is
    /// taken or, as [`Cause::NotPermitted`](crate::Cause::NotPermitted), a capability is
    /// missing: CAP_NET_RAW for IPv4, CAP_NET_BIND_SERVICE for ports below 1024.
    pub fn in_name_of(
        client: SocketAddr,
        server: SocketAddr,
        takes_replies: bool,
        options: Options,
    ) -> io::Result<Self> {
        let inner = open(server, options)?;
        options::allow_foreign_source(&inner, server.is_ipv6())?;
        if client.port() != 0 {
            // A listener on a wildcard has the port of clients that write from its own, and
            // the client's port serves its sessions to other servers.
            inner.set_reuse_port(true)?;
        }
        inner.bind(&SockAddr::from(client))?;
        if takes_replies {
            let _ = inner.set_recv_buffer_size(SESSION_BUFFER);
            inner.connect(&SockAddr::from(server))?;
        }
        Ok(Self::new(inner, server))
    }

    /// A socket that many sessions share, each with an address of its own: bound to all
    /// addresses of the family and to `port`, or one of the kernel's choice if that is 0.
    /// Each datagram leaves from the address that [`Outgoing::from`] names, and
    /// [`Received::local`](crate::Received::local) is the one that it was sent to. Addresses
    /// are this host's if a local route leads to their network (`ip route add local`), which
    /// takes no privilege here; over IPv6 they need no route to be sent from.
    ///
    /// What the network says of datagrams sent earlier is for
    /// [`receive_error`](Self::receive_error). It is also in the way of the next send or
    /// receive, of whichever session: a send goes on and reports it as
    /// [`SendFault::Earlier`], which says nothing of the server at hand, and a receive fails
    /// once.
    ///
    /// # Errors
    ///
    /// Those of `socket`, `setsockopt` and `bind`: no descriptors, the port is taken.
    pub fn shared(v6: bool, port: u16, options: Options) -> io::Result<Self> {
        let wildcard: IpAddr = if v6 {
            Ipv6Addr::UNSPECIFIED.into()
        } else {
            Ipv4Addr::UNSPECIFIED.into()
        };
        let address = SocketAddr::new(wildcard, port);
        let inner = open(address, options)?;
        if v6 {
            inner.set_only_v6(true)?;
            // For what IPV6_PKTINFO names as source, too.
            inner.set_freebind_v6(true)?;
        }
        // Best effort, as a listener's.
        let _ = inner.set_recv_buffer_size(SHARED_BUFFER);
        let _ = inner.set_send_buffer_size(SHARED_BUFFER);
        linux::report_packet_info(inner.as_fd(), v6)?;
        linux::queue_errors(inner.as_fd(), v6)?;
        inner.bind(&SockAddr::from(address))?;
        let bound = local_address(&inner)?;
        Ok(Self::new(inner, bound))
    }

    /// Goes on with a socket of another process. `bound` is what [`bound`](Self::bound)
    /// returned there. All options stay as they are.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidInput`] if the socket is of another address family.
    pub fn adopt(socket: Adoptable, bound: SocketAddr) -> io::Result<Self> {
        if socket.v6 != bound.is_ipv6() {
            return Err(invalid("a UDP socket of the other address family"));
        }
        Ok(Self::new(socket.inner, bound))
    }

    /// What names the socket among all of this network namespace, in whichever process
    /// (SO_COOKIE in socket(7)).
    ///
    /// # Errors
    ///
    /// Those of `getsockopt`: none is known to occur here.
    pub fn cookie(&self) -> io::Result<u64> {
        self.inner.cookie()
    }

    /// The next of what the network says of datagrams sent earlier, on a socket made by
    /// [`shared`](Self::shared). While there is one, [`Readiness`](crate::Readiness) reports
    /// the socket, and it takes room in the buffer that datagrams are received in. Anybody
    /// who can guess addresses and ports can forge them.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::WouldBlock`] when there is none.
    pub fn receive_error(&self) -> io::Result<SendReport> {
        linux::receive_error(self.as_fd())
    }

    /// Has the kernel drop what is not addressed to one of `networks`, each an address with
    /// the length of its prefix, or, if `servers` are given, does not come from one of them.
    /// With more than 64 of either, they are not looked at. It takes the place of the filter
    /// before, without a gap. What it drops counts among
    /// [`Received::overflows`](crate::Received::overflows): the kernel counts both as one.
    ///
    /// # Errors
    ///
    /// Those of `setsockopt`: no memory, or the program exceeds `net.core.optmem_max`. There
    /// is no filter then.
    pub fn filter(
        &self,
        networks: &[(IpAddr, u8)],
        servers: Option<&[SocketAddr]>,
    ) -> io::Result<()> {
        let v6 = self.bound().is_ipv6();
        linux::attach_filter(self.as_fd(), v6, networks, servers)
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

    /// Has the kernel drop what arrives, once that has filled the smallest buffer that there
    /// is: nobody will receive from the socket.
    pub fn ignore_replies(&self) {
        // Best effort: a larger one only takes more memory.
        let _ = self.inner.set_recv_buffer_size(0);
    }

    /// Changes the options of an open socket from the next datagram on. Receiving bursts in
    /// one piece is never switched off: of those that wait already, the kernel would no
    /// longer report the size of a datagram.
    ///
    /// # Errors
    ///
    /// Those of `setsockopt`: none is known to occur here on Linux.
    pub fn adapt(&self, options: Options) -> io::Result<()> {
        adapt(&self.inner, self.bound().is_ipv6(), options)
    }

    /// Lets other sockets share the port that this one is bound to (SO_REUSEPORT), namely
    /// those that send from a client's own port, which is that of a wildcard here. On Linux
    /// it works on a bound socket as well.
    ///
    /// # Errors
    ///
    /// Those of `setsockopt`.
    pub fn share_port(&self) -> io::Result<()> {
        self.inner.set_reuse_port(true)
    }

    /// The address that a listener's socket is bound to.
    #[must_use]
    pub fn bound(&self) -> SocketAddr {
        self.state.bound()
    }

    /// Has each datagram report the interface that it arrives on, over IPv4.
    ///
    /// # Errors
    ///
    /// Those of `setsockopt`: none is known to occur here.
    pub fn report_interface(&self) -> io::Result<()> {
        linux::report_packet_info(self.as_fd(), false)
    }

    /// Receives into the slots of `batch` from `first` up to, not including, `end`, and
    /// returns how many were filled. Fewer than there was room for means that nothing is
    /// left. Room for one asks the kernel once, where more asks it once more to learn that
    /// nothing is left.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::WouldBlock`] when there is nothing; otherwise what the kernel
    /// reports, on a connected socket also about datagrams sent earlier.
    pub fn receive(&self, batch: &mut Batch, first: usize, end: usize) -> io::Result<usize> {
        self.state.receive(self, batch, first..end, false)
    }

    /// Sends what `outgoing` returns for the indices from 0 to `count`, in order: a part of
    /// `batch`, and where it goes. A burst leaves in one piece where the kernel takes it, and
    /// so do neighbours of one length, headers included, that go the same way. `fault` is
    /// called with each index of what could not be sent, after which the rest is tried all
    /// the same.
    pub fn send<'d>(
        &self,
        batch: &'d Batch,
        count: usize,
        outgoing: impl Fn(usize) -> (Part, Outgoing<'d>),
        fault: impl FnMut(usize, SendFault),
    ) -> Sent {
        let is_wildcard = self.bound().ip().is_unspecified();
        let transmit = |index| {
            let (part, mut outgoing) = outgoing(index);
            outgoing.from = outgoing.from.filter(|_| is_wildcard);
            let (payload, segment) = batch.burst_of(part);
            Transmit::burst(outgoing, payload, segment)
        };
        self.state.send_joined(self, count, transmit, fault)
    }

    #[cfg(test)]
    pub(crate) fn burst_limit(&self) -> usize {
        self.state.burst_limit()
    }
}

/// What listeners and sessions have in common: non-blocking, reporting ECN bits.
fn open(address: SocketAddr, options: Options) -> io::Result<socket2::Socket> {
    let socket = socket2::Socket::new(
        Domain::for_address(address),
        Type::DGRAM.nonblocking(),
        Some(Protocol::UDP),
    )?;
    report_classes(&socket, address, options)?;
    Ok(socket)
}

fn report_classes(
    socket: &socket2::Socket,
    address: SocketAddr,
    options: Options,
) -> io::Result<()> {
    if address.is_ipv6() {
        socket.set_recv_tclass_v6(true)?;
    } else {
        socket.set_recv_tos_v4(true)?;
    }
    linux::report_overflows(socket.as_fd())?;
    adapt(socket, address.is_ipv6(), options)
}

/// What listeners have besides, all of which can also be set once they are bound.
fn prepare_listener(
    socket: &socket2::Socket,
    address: SocketAddr,
    binding: Binding,
) -> io::Result<()> {
    if binding.shared {
        socket.set_reuse_port(true)?;
    }
    if binding.free {
        options::allow_missing_address(socket, address.is_ipv6())?;
    }
    // Best effort: small buffers work, they only overflow earlier.
    let _ = socket.set_recv_buffer_size(LISTENER_BUFFER);
    let _ = socket.set_send_buffer_size(LISTENER_BUFFER);
    if address.ip().is_unspecified() {
        linux::report_packet_info(socket.as_fd(), address.is_ipv6())?;
    }
    Ok(())
}

fn adapt(socket: &socket2::Socket, v6: bool, options: Options) -> io::Result<()> {
    options::set_fragmentation(socket, v6, options.dont_fragment)?;
    if options.bursts {
        // Best effort: a kernel without it hands over single datagrams.
        let _ = linux::enable_gro(socket.as_fd());
    }
    Ok(())
}

/// Fails unless `socket`, which somebody else has made, is a UDP socket of this family.
fn check_udp(socket: &socket2::Socket, v6: bool) -> io::Result<()> {
    let is_udp = socket.r#type()? == Type::DGRAM && socket.protocol()? == Some(Protocol::UDP);
    if !is_udp {
        return Err(invalid("not a UDP socket"));
    }
    match socket.domain()? == if v6 { Domain::IPV6 } else { Domain::IPV4 } {
        true => Ok(()),
        false => Err(invalid("a UDP socket of the other address family")),
    }
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

fn local_address(socket: &socket2::Socket) -> io::Result<SocketAddr> {
    socket
        .local_addr()?
        .as_socket()
        .ok_or_else(|| io::Error::other("the kernel bound a UDP socket to no IP address"))
}
