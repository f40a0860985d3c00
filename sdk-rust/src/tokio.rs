//! The same socket for tokio.

use std::io;
use std::net::{self, SocketAddr};
#[cfg(unix)]
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use ::tokio::io::{Interest, ReadBuf};
use ::tokio::net::{ToSocketAddrs, lookup_host};
use ::tokio::runtime::Handle;
use bytes::BufMut;

use crate::core::{Core, Exit, first_run, send_in_runs};
use crate::errors::no_address;
use crate::patience::MOST_DROPS_IN_A_ROW;
use crate::reply_path::Outgoing;
use crate::{Batch, Datagram, DatagramRef, Demux, Recipient, ReplyPath, Stats, Trust};

/// Takes the place of [tokio's `UdpSocket`](::tokio::net::UdpSocket) in a server
/// behind a proxy: the addresses that it receives from and sends to are the
/// clients'.
///
/// All methods take `&self`; share it between tasks in an
/// [`Arc`]. Every future may be dropped at any time, as in
/// `select!` or under a timeout, without losing a datagram. What is missing is
/// missing from [`UdpSocket`](crate::UdpSocket), too, for the same reasons; so are
/// `into_std`, `try_io` and `async_io`, which would hand out headers. `set_tos_v4`
/// and `bind_device` have their likes in other crates, and are for a socket before
/// it is handed to [`from_std`](Self::from_std).
///
/// ```no_run
/// use ppv2_sdk::{Trust, tokio::UdpSocket};
///
/// # async fn serve() -> std::io::Result<()> {
/// let socket = UdpSocket::bind("0.0.0.0:9000", Trust::networks(["192.0.2.1"]).build()?).await?;
/// let mut buffer = [0; 1500];
/// loop {
///     let (len, client) = socket.recv_from(&mut buffer).await?;
///     socket.send_to(&buffer[..len], client).await?;
/// }
/// # }
/// ```
#[derive(Debug)]
pub struct UdpSocket {
    core: Core<::tokio::net::UdpSocket>,
    /// Registers the sockets of listeners, whichever task sends first.
    runtime: Handle,
}

/// For the socket's options, and to wait for it by other means. What is received by
/// the descriptor itself has the header and the proxy's address; so there is no
/// `into_std`, which would hand it to somebody who would.
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
    /// As [`bind`](::tokio::net::UdpSocket::bind) of tokio; `InvalidInput` with
    /// a [`TrustError`](crate::TrustError) inside if `trust` can't be used.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime with I/O enabled.
    pub async fn bind(addr: impl ToSocketAddrs, trust: Trust) -> io::Result<Self> {
        let socket = ::tokio::net::UdpSocket::bind(addr).await?;
        Self::around(socket, Demux::new(trust).into())
    }

    /// Takes over a socket that is bound already, with the options that it has,
    /// and makes it non-blocking.
    ///
    /// # Errors
    ///
    /// As [`from_std`](::tokio::net::UdpSocket::from_std) of tokio.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime with I/O enabled.
    pub fn from_std(socket: net::UdpSocket, trust: Trust) -> io::Result<Self> {
        Self::with_demux(socket, Demux::new(trust).into())
    }

    /// As [`from_std`](Self::from_std), with a [`Demux`] that the caller or other sockets
    /// use too. They share the clients that it remembers, its counters and its warnings.
    ///
    /// # Errors
    ///
    /// As [`from_std`](Self::from_std).
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime with I/O enabled.
    pub fn with_demux(socket: net::UdpSocket, demux: Arc<Demux>) -> io::Result<Self> {
        Self::around(register(socket)?, demux)
    }

    fn around(socket: ::tokio::net::UdpSocket, demux: Arc<Demux>) -> io::Result<Self> {
        let local = socket.local_addr()?;
        Ok(Self {
            core: Core::new(socket, local, demux),
            runtime: Handle::current(),
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
    /// As [`recv_from`](::tokio::net::UdpSocket::recv_from) of tokio. Neither a
    /// bad datagram nor a client that went away is an error. `InvalidInput`
    /// after [`enable_gro`](Self::enable_gro).
    pub async fn recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        self.receive(|datagram| datagram.copy_to(buffer)).await
    }

    /// Receives one client's datagram with all that is known of it.
    ///
    /// # Errors
    ///
    /// As [`recv_from`](Self::recv_from).
    pub async fn recv_datagram(&self) -> io::Result<Datagram> {
        self.receive(|datagram| datagram.into()).await
    }

    /// Receives as [`recv_from`](Self::recv_from) if a datagram is there already.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if there is none, or after many that had to be dropped;
    /// wait for [`readable`](Self::readable) then.
    pub fn try_recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        self.try_receive(|datagram| datagram.copy_to(buffer))
    }

    /// Receives one client's payload to the end of `buffer`, as far as that has room
    /// or can grow, and returns its length and the client's address. What does not
    /// fit is lost.
    ///
    /// # Errors
    ///
    /// As [`recv_from`](Self::recv_from).
    pub async fn recv_buf_from(&self, buffer: &mut impl BufMut) -> io::Result<(usize, SocketAddr)> {
        self.receive(|datagram| datagram.append_to(buffer)).await
    }

    /// Receives as [`recv_buf_from`](Self::recv_buf_from) if a datagram is there
    /// already.
    ///
    /// # Errors
    ///
    /// As [`try_recv_from`](Self::try_recv_from).
    pub fn try_recv_buf_from(&self, buffer: &mut impl BufMut) -> io::Result<(usize, SocketAddr)> {
        self.try_receive(|datagram| datagram.append_to(buffer))
    }

    /// Receives as [`recv_datagram`](Self::recv_datagram) if a datagram is there
    /// already.
    ///
    /// # Errors
    ///
    /// As [`try_recv_from`](Self::try_recv_from).
    pub fn try_recv_datagram(&self) -> io::Result<Datagram> {
        self.try_receive(|datagram| datagram.into())
    }

    /// Receives as [`recv_from`](Self::recv_from) into the unfilled part of
    /// `buffer`, or has the task of `cx` woken when there may be something to
    /// receive.
    ///
    /// Only the last task to poll for receiving, by this or by
    /// [`poll_recv_ready`](Self::poll_recv_ready), is woken.
    ///
    /// # Errors
    ///
    /// As [`recv_from`](Self::recv_from).
    pub fn poll_recv_from(
        &self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<SocketAddr>> {
        loop {
            // Lets other tasks run now and then, however many datagrams are dropped.
            ready!(self.core.socket.poll_recv_ready(cx))?;
            match self.try_receive_one(|datagram| {
                let len = datagram.payload.len().min(buffer.remaining());
                buffer.put_slice(&datagram.payload[..len]);
                datagram.client
            }) {
                Ok(Some(client)) => return Poll::Ready(Ok(client)),
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Receives what is there into `batch`, in place of what that held before,
    /// and returns how many datagrams are in it: at least one.
    ///
    /// On Linux that takes one call to the kernel. Elsewhere datagrams are
    /// received one by one.
    ///
    /// # Errors
    ///
    /// As [`recv_from`](Self::recv_from). The batch is empty then.
    pub async fn recv_batch(&self, batch: &mut Batch) -> io::Result<usize> {
        loop {
            let once = || self.core.receive_batch(batch, true);
            match self.core.socket.async_io(Interest::READABLE, once).await? {
                0 => {}
                count => return Ok(count),
            }
        }
    }

    /// Receives as [`recv_batch`](Self::recv_batch) if something is there
    /// already. A batch of which all had to be dropped is returned empty.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if there is nothing; wait for [`readable`](Self::readable)
    /// then.
    pub fn try_recv_batch(&self, batch: &mut Batch) -> io::Result<usize> {
        self.core
            .socket
            .try_io(Interest::READABLE, || self.core.receive_batch(batch, true))
    }

    /// Receives as [`recv_batch`](Self::recv_batch), or has the task of `cx` woken
    /// when there may be something to receive.
    ///
    /// Only the last task to poll for receiving is woken, as with
    /// [`poll_recv_from`](Self::poll_recv_from).
    ///
    /// # Errors
    ///
    /// As [`recv_from`](Self::recv_from).
    pub fn poll_recv_batch(
        &self,
        cx: &mut Context<'_>,
        batch: &mut Batch,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.core.socket.poll_recv_ready(cx))?;
            match self.try_recv_batch(batch) {
                Ok(0) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }

    /// Has the kernel hand over datagrams of one proxy that arrive in a row
    /// together, and returns whether it does: Linux can (UDP_GRO in udp(7)).
    /// Receiving bursts then takes a fraction of the time.
    ///
    /// From then on only batches are received, and there is no path back: the
    /// other calls have no place for the rest of a burst.
    ///
    /// # Errors
    ///
    /// As the system's for setting a socket's options.
    pub fn enable_gro(&self) -> io::Result<bool> {
        self.core.enable_gro()
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
    /// [`send_to`](::tokio::net::UdpSocket::send_to) of tokio.
    pub async fn send_to(&self, payload: &[u8], client: impl ToSocketAddrs) -> io::Result<usize> {
        let client = lookup_host(client).await?.next().ok_or_else(no_address)?;
        self.reply_to(client, payload).await
    }

    /// Sends as [`send_to`](Self::send_to) if that is possible without waiting.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if it is not, in which case wait for
    /// [`writable`](Self::writable); otherwise as [`send_to`](Self::send_to).
    pub fn try_send_to(&self, payload: &[u8], client: SocketAddr) -> io::Result<usize> {
        self.try_reply_to(client, payload)
    }

    /// Sends as [`send_to`](Self::send_to), or has the task of `cx` woken when
    /// there may be room to send.
    ///
    /// Only the last task to poll for sending, by this or by
    /// [`poll_send_ready`](Self::poll_send_ready), is woken.
    ///
    /// # Errors
    ///
    /// As [`send_to`](Self::send_to).
    pub fn poll_send_to(
        &self,
        cx: &mut Context<'_>,
        payload: &[u8],
        client: SocketAddr,
    ) -> Poll<io::Result<usize>> {
        let path = self.core.demux.require_reply_path(client)?;
        let exit = self.exit(&path)?;
        loop {
            ready!(self.core.socket_of(&exit).poll_send_ready(cx))?;
            match self.try_reply_to(client, payload) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }

    /// Sends datagrams in their order, each to a client's address or as the answer
    /// to a received one, and returns how many were sent. If it is fewer than
    /// were given, the next one is why: ask for it again to learn the error.
    ///
    /// On Linux one call to the kernel takes many, and consecutive datagrams of
    /// one length for one client leave as a burst (UDP_SEGMENT in udp(7)); so do those
    /// for different clients, if they came through one address with reply tags.
    /// Elsewhere they are sent one by one. A future that is dropped may have sent
    /// a part of them.
    ///
    /// # Errors
    ///
    /// As [`send_to`](Self::send_to), if the first can't be sent.
    pub async fn send_batch<P, R>(&self, datagrams: &[(P, R)]) -> io::Result<usize>
    where
        P: AsRef<[u8]>,
        R: Copy + Into<Recipient>,
    {
        let outgoing = self.core.demux.outgoing(datagrams)?;
        let mut sent = 0;
        while sent < outgoing.len() {
            match self.send_run(first_run(&outgoing[sent..])).await {
                Ok(more) => sent += more,
                Err(error) if sent == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(sent)
    }

    /// Sends as [`send_batch`](Self::send_batch) as many as that is possible for
    /// without waiting.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if it is for none, in which case wait for
    /// [`writable`](Self::writable); otherwise as [`send_to`](Self::send_to), if
    /// the first can't be sent.
    pub fn try_send_batch<P, R>(&self, datagrams: &[(P, R)]) -> io::Result<usize>
    where
        P: AsRef<[u8]>,
        R: Copy + Into<Recipient>,
    {
        let outgoing = self.core.demux.outgoing(datagrams)?;
        send_in_runs(&outgoing, |run| self.try_send_run(run))
    }

    /// Sends as [`try_send_batch`](Self::try_send_batch), or has the task of `cx`
    /// woken when there may be room for the first datagram.
    ///
    /// Only the last task to poll for sending is woken, as with
    /// [`poll_send_to`](Self::poll_send_to).
    ///
    /// # Errors
    ///
    /// As [`send_to`](Self::send_to), if the first can't be sent.
    pub fn poll_send_batch<P, R>(
        &self,
        cx: &mut Context<'_>,
        datagrams: &[(P, R)],
    ) -> Poll<io::Result<usize>>
    where
        P: AsRef<[u8]>,
        R: Copy + Into<Recipient>,
    {
        let outgoing = self.core.demux.outgoing(datagrams)?;
        let Some(first) = outgoing.first() else {
            return Poll::Ready(Ok(0));
        };
        let exit = self.exit(&first.path)?;
        loop {
            ready!(self.core.socket_of(&exit).poll_send_ready(cx))?;
            match send_in_runs(&outgoing, |run| self.try_send_run(run)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }

    /// Answers `datagram` with `payload` by the path that it came, and returns how many
    /// bytes were sent.
    ///
    /// # Errors
    ///
    /// As [`send_to`](Self::send_to). `NotConnected` if the datagram came through
    /// a proxy more than [`FORMER_CLIENT_GRACE`](crate::FORMER_CLIENT_GRACE) ago, and
    /// its path is no longer that of the client's latest datagram.
    pub async fn reply(&self, datagram: &Datagram, payload: &[u8]) -> io::Result<usize> {
        self.reply_to(datagram, payload).await
    }

    /// Answers as [`reply`](Self::reply) if that is possible without waiting.
    ///
    /// # Errors
    ///
    /// As [`reply`](Self::reply); `WouldBlock` if it is not possible, in which case
    /// wait for [`writable`](Self::writable).
    pub fn try_reply(&self, datagram: &Datagram, payload: &[u8]) -> io::Result<usize> {
        self.try_reply_to(datagram, payload)
    }

    /// Sends `payload` to a recipient: a client's address, as [`send_to`](Self::send_to),
    /// or a [`DatagramRef`], [`Datagram`] or [`ReplyPath`], as [`reply`](Self::reply).
    ///
    /// # Errors
    ///
    /// As of those two.
    pub async fn reply_to(
        &self,
        recipient: impl Into<Recipient>,
        payload: &[u8],
    ) -> io::Result<usize> {
        let path = self.core.demux.require_reply_path(recipient)?;
        if path.from.is_some() {
            self.send_run(&[Outgoing::new(payload, path)]).await?;
            return Ok(payload.len());
        }
        let once = || self.core.send_one(payload, &path);
        self.core.socket.async_io(Interest::WRITABLE, once).await
    }

    /// Sends as [`reply_to`](Self::reply_to) if that is possible without waiting.
    ///
    /// # Errors
    ///
    /// As [`try_reply`](Self::try_reply).
    pub fn try_reply_to(
        &self,
        recipient: impl Into<Recipient>,
        payload: &[u8],
    ) -> io::Result<usize> {
        let path = self.core.demux.require_reply_path(recipient)?;
        if path.from.is_some() {
            self.try_send_run(&[Outgoing::new(payload, path)])?;
            return Ok(payload.len());
        }
        let once = || self.core.send_one(payload, &path);
        self.core.socket.try_io(Interest::WRITABLE, once)
    }

    /// Waits until there may be something to receive. Since it may have to be
    /// dropped, [`try_recv_from`](Self::try_recv_from) can still find nothing.
    ///
    /// # Errors
    ///
    /// As [`readable`](::tokio::net::UdpSocket::readable) of tokio.
    pub async fn readable(&self) -> io::Result<()> {
        self.core.socket.readable().await
    }

    /// Waits until there may be room to send.
    ///
    /// # Errors
    ///
    /// As [`writable`](::tokio::net::UdpSocket::writable) of tokio.
    pub async fn writable(&self) -> io::Result<()> {
        self.core.socket.writable().await
    }

    /// Waits for [`readable`](Self::readable) in a task that is polled by hand.
    ///
    /// # Errors
    ///
    /// As [`poll_recv_ready`](::tokio::net::UdpSocket::poll_recv_ready) of tokio.
    pub fn poll_recv_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.core.socket.poll_recv_ready(cx)
    }

    /// Waits for [`writable`](Self::writable) in a task that is polled by hand.
    ///
    /// # Errors
    ///
    /// As [`poll_send_ready`](::tokio::net::UdpSocket::poll_send_ready) of tokio.
    pub fn poll_send_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.core.socket.poll_send_ready(cx)
    }

    /// The address that the socket is bound to.
    ///
    /// # Errors
    ///
    /// As [`local_addr`](::tokio::net::UdpSocket::local_addr) of tokio.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.core.socket.local_addr()
    }

    /// How many hops IPv4 replies may take.
    ///
    /// # Errors
    ///
    /// As [`ttl`](::tokio::net::UdpSocket::ttl) of tokio.
    pub fn ttl(&self) -> io::Result<u32> {
        self.core.socket.ttl()
    }

    /// Sets how many hops IPv4 replies may take; those that leave by a socket of
    /// a listener ([`ReplyFrom::Listener`](crate::ReplyFrom::Listener)) keep the
    /// system's default.
    ///
    /// # Errors
    ///
    /// As [`set_ttl`](::tokio::net::UdpSocket::set_ttl) of tokio.
    pub fn set_ttl(&self, ttl: u32) -> io::Result<()> {
        self.core.socket.set_ttl(ttl)
    }

    /// What the socket has received, dropped and sent so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.core.demux.stats()
    }

    /// Receives until there is a datagram for the application, which `take` gets. Each
    /// turn goes through tokio's `async_io`, which lets other tasks run when too many
    /// are dropped in a row.
    async fn receive<T>(&self, mut take: impl FnMut(DatagramRef<'_>) -> T) -> io::Result<T> {
        let socket = &self.core.socket;
        loop {
            let once = || self.core.receive_one(true, &mut take);
            if let Some(taken) = socket.async_io(Interest::READABLE, once).await? {
                return Ok(taken);
            }
        }
    }

    /// As `receive`, without waiting; an error of the kind `WouldBlock` after many
    /// datagrams that were dropped.
    fn try_receive<T>(&self, mut take: impl FnMut(DatagramRef<'_>) -> T) -> io::Result<T> {
        for _ in 0..MOST_DROPS_IN_A_ROW {
            if let Some(taken) = self.try_receive_one(&mut take)? {
                return Ok(taken);
            }
        }
        // Readiness stays set, so that `readable` returns at once.
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn try_receive_one<T>(&self, take: impl FnMut(DatagramRef<'_>) -> T) -> io::Result<Option<T>> {
        let once = || self.core.receive_one(true, take);
        self.core.socket.try_io(Interest::READABLE, once)
    }

    fn exit(&self, path: &ReplyPath) -> io::Result<Exit<::tokio::net::UdpSocket>> {
        self.core.exit(path, |socket| {
            let _context = self.runtime.enter();
            register(socket)
        })
    }

    /// Sends datagrams that leave from one address, from the front, and returns how
    /// many were sent; an error if the first can't be.
    async fn send_run(&self, run: &[Outgoing<'_>]) -> io::Result<usize> {
        let exit = self.exit(&run[0].path)?;
        let once = || self.core.send_run(&exit, run);
        let socket = self.core.socket_of(&exit);
        socket.async_io(Interest::WRITABLE, once).await
    }

    /// As `send_run`, without waiting.
    fn try_send_run(&self, run: &[Outgoing<'_>]) -> io::Result<usize> {
        let exit = self.exit(&run[0].path)?;
        let once = || self.core.send_run(&exit, run);
        self.core.socket_of(&exit).try_io(Interest::WRITABLE, once)
    }
}

/// A non-blocking socket of the current runtime.
fn register(socket: net::UdpSocket) -> io::Result<::tokio::net::UdpSocket> {
    socket.set_nonblocking(true)?;
    ::tokio::net::UdpSocket::from_std(socket)
}
