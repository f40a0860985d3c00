//! The blocking socket: `std`'s, with a [`Demux`] between it and the application.

use std::io;
use std::net::{self, SocketAddr, ToSocketAddrs};
#[cfg(unix)]
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::core::{Core, Exit, send_in_runs};
use crate::errors::no_address;
use crate::patience::{Patience, until_there_is_room};
use crate::reply_path::Outgoing;
use crate::{Batch, Datagram, DatagramRef, Demux, Recipient, Stats, Trust};

/// Takes the place of [`std::net::UdpSocket`] in a server behind a proxy: the
/// addresses that it receives from and sends to are the clients'.
///
/// All methods take `&self`; share it between threads in an
/// [`Arc`](std::sync::Arc). Of `std`'s methods these are missing: `connect`,
/// `send`, `recv` and `peer_addr`, as clients are many; `peek` and `peek_from`,
/// as what is peeked at may have to be dropped; `try_clone`, for which there is
/// the `Arc`; `take_error`, as what it would tell is the echo of some datagram
/// sent earlier; and the options of broadcast and multicast, as a proxy writes to
/// one server and a client is one host. Any option can be set before the socket
/// is handed to [`from_std`](Self::from_std).
///
/// ```no_run
/// use ppv2_sdk::{Trust, UdpSocket};
///
/// let socket = UdpSocket::bind("0.0.0.0:9000", Trust::networks(["192.0.2.1"]).build()?)?;
/// let mut buffer = [0; 1500];
/// loop {
///     let (len, client) = socket.recv_from(&mut buffer)?;
///     socket.send_to(&buffer[..len], client)?;
/// }
/// # #[expect(unreachable_code)]
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct UdpSocket {
    core: Core<net::UdpSocket>,
    /// Spares calls that can't time out the time that they would begin at.
    has_timeout: AtomicBool,
}

/// To wait for the socket by poll(2), epoll(7) or crates above them, and for its
/// options. What is received by the descriptor itself has the header and the proxy's
/// address; so there is no `into_raw_fd`, which would hand it to somebody who would.
#[cfg(unix)]
impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.core.socket.as_fd()
    }
}

/// As [`AsFd`].
#[cfg(unix)]
impl AsRawFd for UdpSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.core.socket.as_raw_fd()
    }
}

impl UdpSocket {
    /// Binds a socket to `addr`, the address that the proxy sends to.
    ///
    /// # Errors
    ///
    /// As [`std::net::UdpSocket::bind`];
    ///
    /// ```
    /// use ppv2_sdk::{Trust, UdpSocket};
    ///
    /// let socket = UdpSocket::bind("127.0.0.1:0", Trust::networks(["127.0.0.0/8"]).build()?)?;
    /// assert!(socket.local_addr()?.port() > 0);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn bind(addr: impl ToSocketAddrs, trust: Trust) -> io::Result<Self> {
        Self::with_demux(net::UdpSocket::bind(addr)?, Demux::new(trust).into())
    }

    /// Takes over a socket that is bound already, with the options that it has.
    ///
    /// # Errors
    ///
    /// As [`std::net::UdpSocket::local_addr`].
    ///
    /// # Example
    ///
    /// ```
    /// use ppv2_sdk::{Trust, UdpSocket};
    ///
    /// let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
    /// socket.set_ttl(32)?;
    /// let socket = UdpSocket::from_std(socket, Trust::networks(["127.0.0.0/8"]).build()?)?;
    /// assert_eq!(socket.ttl()?, 32);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn from_std(socket: net::UdpSocket, trust: Trust) -> io::Result<Self> {
        Self::with_demux(socket, Demux::new(trust).into())
    }

    /// As [`from_std`](Self::from_std), with a [`Demux`] that the caller or other sockets
    /// use too. They share the clients that it remembers, its counters and its warnings.
    ///
    /// # Errors
    ///
    /// As [`std::net::UdpSocket::local_addr`].
    pub fn with_demux(socket: net::UdpSocket, demux: Arc<Demux>) -> io::Result<Self> {
        let local = socket.local_addr()?;
        Ok(Self {
            has_timeout: AtomicBool::new(!matches!(socket.read_timeout(), Ok(None))),
            core: Core::new(socket, local, demux),
        })
    }

    /// Receives one client's payload into `buffer`, and returns its length and
    /// the client's address. The buffer needs no room for the header; what does
    /// not fit is lost. The length may be 0.
    ///
    /// Datagrams that must be dropped are dropped and counted in
    /// [`stats`](Self::stats), and the call goes on waiting.
    ///
    /// # Errors
    ///
    /// As [`std::net::UdpSocket::recv_from`], `WouldBlock` or `TimedOut` after
    /// the [read timeout](Self::set_read_timeout). On a
    /// [non-blocking](Self::set_nonblocking) socket `WouldBlock` also after 64
    /// datagrams that had to be dropped; then there may be more, so ask again
    /// before waiting for an edge-triggered event. Neither a bad datagram nor a
    /// client that went away is an error. `InvalidInput` after
    /// [`enable_gro`](Self::enable_gro).
    pub fn recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        self.receive(|datagram| datagram.copy_to(buffer))
    }

    /// Receives one client's datagram with all that is known of it.
    ///
    /// # Errors
    ///
    /// As [`recv_from`](Self::recv_from).
    pub fn recv_datagram(&self) -> io::Result<Datagram> {
        self.receive(|datagram| datagram.into())
    }

    /// Receives one client's datagram without copying it. `buffer` needs room for the
    /// header too; what does not fit is lost.
    ///
    /// # Errors
    ///
    /// As [`recv_from`](Self::recv_from).
    pub fn recv_ref<'b>(&self, buffer: &'b mut [u8]) -> io::Result<DatagramRef<'b>> {
        let (len, parts) =
            self.persist(|wait| Ok(self.core.receive_parts(buffer, wait)?.ok_or(1)))?;
        Ok(parts.of(&buffer[..len]))
    }

    /// Receives what is there into `batch`, in place of what that held before,
    /// and returns how many datagrams are in it: at least one, for which the call
    /// waits.
    ///
    /// On Linux that takes one call to the kernel. Elsewhere datagrams are
    /// received one by one; on Windows a batch never holds more than one.
    ///
    /// # Errors
    ///
    /// As [`recv_from`](Self::recv_from). The batch is empty then.
    pub fn recv_batch(&self, batch: &mut Batch) -> io::Result<usize> {
        self.persist(|wait| match self.core.receive_batch(batch, wait)? {
            0 => Ok(Err(batch.dropped().max(1))),
            count => Ok(Ok(count)),
        })
    }

    /// Has the kernel hand over datagrams of one proxy that arrive in a row
    /// together, and returns whether it does: Linux can (UDP_GRO in udp(7)).
    /// Receiving bursts then takes a fraction of the time.
    ///
    /// From then on only [`recv_batch`](Self::recv_batch) receives, and there is
    /// no path back: the other calls have no place for the rest of a burst.
    ///
    /// # Errors
    ///
    /// As the system's for setting a socket's options.
    pub fn enable_gro(&self) -> io::Result<bool> {
        self.core.enable_gro()
    }

    /// Whether datagrams arrive in bursts, since [`enable_gro`](Self::enable_gro) was
    /// called or the option was set before.
    #[must_use]
    pub fn is_gro_enabled(&self) -> bool {
        self.core.gro()
    }

    /// Sends `payload` to a client by the path of its latest datagram, and returns how
    /// many bytes were sent.
    ///
    /// # Errors
    ///
    /// `NotConnected` if the client has not been heard for
    /// [`TrustBuilder::forget_after`](crate::TrustBuilder::forget_after), or not at all; or not for
    /// [`FORMER_CLIENT_GRACE`](crate::FORMER_CLIENT_GRACE), and its proxy's address
    /// has named another client since. With
    /// [`ReplyFrom::Listener`](crate::ReplyFrom::Listener), `AddrNotAvailable`,
    /// `AddrInUse` or `PermissionDenied` if this host may not send from the
    /// listener's address; the message says how to fix it. `InvalidInput` with
    /// [`ReplyTooLong`](crate::ReplyTooLong) if no datagram holds the reply and the header
    /// that its proxy asks for. Otherwise as
    /// [`std::net::UdpSocket::send_to`].
    pub fn send_to(&self, payload: &[u8], client: impl ToSocketAddrs) -> io::Result<usize> {
        let client = client.to_socket_addrs()?.next().ok_or_else(no_address)?;
        self.reply_to(client, payload)
    }

    /// Answers `datagram` with `payload` by the path that it came, and returns how many
    /// bytes were sent.
    ///
    /// # Errors
    ///
    /// As [`send_to`](Self::send_to). `NotConnected` if the datagram came through
    /// a proxy more than [`FORMER_CLIENT_GRACE`](crate::FORMER_CLIENT_GRACE) ago, and
    /// its path is no longer that of the client's latest datagram.
    ///
    /// # Example
    ///
    /// ```no_run
    /// # fn serve(socket: ppv2_sdk::UdpSocket) -> std::io::Result<()> {
    /// let datagram = socket.recv_datagram()?;
    /// println!("{} sent to {:?}", datagram.client, datagram.destination);
    /// socket.reply(&datagram, b"hello")?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn reply(&self, datagram: &Datagram, payload: &[u8]) -> io::Result<usize> {
        self.reply_to(datagram, payload)
    }

    /// Sends `payload` to a recipient: a client's address, as [`send_to`](Self::send_to),
    /// or a [`DatagramRef`], [`Datagram`] or
    /// [`ReplyPath`](crate::ReplyPath), as [`reply`](Self::reply).
    ///
    /// # Errors
    ///
    /// As of those two.
    pub fn reply_to(&self, recipient: impl Into<Recipient>, payload: &[u8]) -> io::Result<usize> {
        let path = self.core.demux.require_reply_path(recipient)?;
        if path.from.is_some() {
            self.send_run(&[Outgoing::new(payload, path)])?;
            return Ok(payload.len());
        }
        self.core.send_one(payload, &path)
    }

    /// Sends datagrams in their order, each to a client's address or as the answer
    /// to a received one, and returns how many were sent. If it is fewer than
    /// were given, the next one is why: ask for it again to learn the error.
    ///
    /// On Linux that takes one call to the kernel for many, and consecutive
    /// datagrams of one length for one client leave as a burst (UDP_SEGMENT in
    /// udp(7)); so do those for different clients, if they came through one address with
    /// reply tags. Elsewhere they are sent one by one.
    ///
    /// # Errors
    ///
    /// As [`send_to`](Self::send_to), if the first can't be sent.
    ///
    /// ```no_run
    /// # fn serve(socket: ppv2_sdk::UdpSocket, batch: ppv2_sdk::Batch) {
    /// let replies: Vec<_> = batch.iter().map(|d| (d.payload, d)).collect();
    /// let mut left = &replies[..];
    /// while !left.is_empty() {
    ///     match socket.send_batch(left) {
    ///         Ok(sent) => left = &left[sent..],
    ///         Err(error) => {
    ///             eprintln!("no reply to {}: {error}", left[0].1.client);
    ///             left = &left[1..];
    ///         }
    ///     }
    /// }
    /// # }
    /// ```
    pub fn send_batch<P, R>(&self, datagrams: &[(P, R)]) -> io::Result<usize>
    where
        P: AsRef<[u8]>,
        R: Copy + Into<Recipient>,
    {
        let outgoing = self.core.demux.outgoing(datagrams)?;
        send_in_runs(&outgoing, |run| self.send_run(run))
    }

    /// The address that the socket is bound to.
    ///
    /// # Errors
    ///
    /// As [`std::net::UdpSocket::local_addr`].
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.core.socket.local_addr()
    }

    /// Bounds how long a receive call takes, however many datagrams are dropped
    /// meanwhile; `None` for no bound.
    ///
    /// # Errors
    ///
    /// As [`std::net::UdpSocket::set_read_timeout`]: a timeout of 0 is one.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.has_timeout
            .fetch_or(timeout.is_some(), Ordering::Relaxed);
        self.core.socket.set_read_timeout(timeout)
    }

    /// The bound that [`set_read_timeout`](Self::set_read_timeout) set.
    ///
    /// # Errors
    ///
    /// As [`std::net::UdpSocket::read_timeout`].
    pub fn read_timeout(&self) -> io::Result<Option<Duration>> {
        self.core.socket.read_timeout()
    }

    /// Bounds how long a send call takes; `None` for no bound.
    ///
    /// # Errors
    ///
    /// As [`std::net::UdpSocket::set_write_timeout`]: a timeout of 0 is one.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.core.socket.set_write_timeout(timeout)
    }

    /// The bound that [`set_write_timeout`](Self::set_write_timeout) set.
    ///
    /// # Errors
    ///
    /// As [`std::net::UdpSocket::write_timeout`].
    pub fn write_timeout(&self) -> io::Result<Option<Duration>> {
        self.core.socket.write_timeout()
    }

    /// Makes calls return `WouldBlock` at once instead of waiting, or wait again.
    ///
    /// # Errors
    ///
    /// As [`std::net::UdpSocket::set_nonblocking`].
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        self.core.socket.set_nonblocking(nonblocking)
    }

    /// How many hops IPv4 replies may take.
    ///
    /// # Errors
    ///
    /// As [`std::net::UdpSocket::ttl`].
    pub fn ttl(&self) -> io::Result<u32> {
        self.core.socket.ttl()
    }

    /// Sets how many hops IPv4 replies may take; those that leave by a socket of
    /// a listener ([`ReplyFrom::Listener`](crate::ReplyFrom::Listener)) keep the
    /// system's default.
    ///
    /// # Errors
    ///
    /// As [`std::net::UdpSocket::set_ttl`].
    pub fn set_ttl(&self, ttl: u32) -> io::Result<()> {
        self.core.socket.set_ttl(ttl)
    }

    /// What the socket has received, dropped and sent so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.core.demux.stats()
    }

    /// Receives until there is a datagram for the application, which `take` gets.
    fn receive<T>(&self, mut take: impl FnMut(DatagramRef<'_>) -> T) -> io::Result<T> {
        self.persist(|wait| Ok(self.core.receive_one(wait, &mut take)?.ok_or(1)))
    }

    /// Calls `receive` until it has a result; instead it returns how many datagrams were
    /// dropped. It waits as the socket does if it is passed `true`.
    fn persist<T>(
        &self,
        mut receive: impl FnMut(bool) -> io::Result<Result<T, usize>>,
    ) -> io::Result<T> {
        let socket = &self.core.socket;
        let mut patience = Patience::new(self.has_timeout.load(Ordering::Relaxed));
        loop {
            match patience.receive(socket, &mut receive)? {
                Ok(received) => return Ok(received),
                Err(dropped) => patience.dropped(socket, dropped)?,
            }
        }
    }

    /// Sends datagrams that leave from one address, from the front, and returns how
    /// many were sent; an error if the first can't be.
    fn send_run(&self, run: &[Outgoing<'_>]) -> io::Result<usize> {
        let exit = self.core.exit(&run[0].path, Ok)?;
        let send = || self.core.send_run(&exit, run);
        match &exit {
            Exit::Own(_) => send(),
            // That socket doesn't wait.
            Exit::Listener(_) => {
                until_there_is_room(self.core.socket_of(&exit), &self.core.socket, send)
            }
        }
    }
}
