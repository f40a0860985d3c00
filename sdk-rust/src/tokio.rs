//! The same socket for tokio.

mod runs;

use std::io;
use std::net::{self, IpAddr, SocketAddr};
#[cfg(unix)]
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::task::{Context, Poll, ready};

use ::tokio::io::{Interest, ReadBuf};
use ::tokio::net::{ToSocketAddrs, lookup_host};
use ::tokio::runtime::Handle;
use bytes::BufMut;
use ppv2_udp::SocketState;

use self::runs::{Sender, first_run};
use crate::clock::Tick;
use crate::errors::{despite_echo, is_echo_of_earlier_send, no_address, received_in_batches};
use crate::listeners::{Listeners, Source};
use crate::offload::Outgoing;
use crate::patience::MOST_DROPS_IN_A_ROW;
use crate::{Admitted, Batch, Datagram, Gate, Recipient, Stats, Trust, Way, buffer};

/// Takes the place of [tokio's `UdpSocket`](::tokio::net::UdpSocket) in a server
/// behind a proxy: the addresses that it receives from and sends to are the
/// clients'.
///
/// All methods take `&self`; share it between tasks in an
/// [`Arc`](std::sync::Arc). Every future may be dropped at any time, as in
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
/// let socket = UdpSocket::bind("0.0.0.0:9000", Trust::networks(["192.0.2.10"])?).await?;
/// let mut buffer = [0; 1500];
/// loop {
///     let (len, client) = socket.recv_from(&mut buffer).await?;
///     socket.send_to(&buffer[..len], client).await?;
/// }
/// # }
/// ```
#[derive(Debug)]
pub struct UdpSocket {
    inner: ::tokio::net::UdpSocket,
    gate: Gate,
    state: SocketState,
    listeners: Listeners<Sender>,
    /// Where sockets of listeners are registered, whoever sends first.
    runtime: Handle,
}

/// For the socket's options, and to wait for it by other means. What is received by
/// the descriptor itself has the header and the proxy's address; so there is no
/// `into_std`, which would hand it to somebody who would.
#[cfg(unix)]
impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

/// As [`AsFd`].
#[cfg(unix)]
impl AsRawFd for UdpSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.inner.as_raw_fd()
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
        let gate = Gate::new(trust)?;
        let inner = ::tokio::net::UdpSocket::bind(addr).await?;
        Self::around(inner, gate)
    }

    /// Takes over a socket that is bound already, with the options that it has,
    /// and makes it non-blocking.
    ///
    /// # Errors
    ///
    /// `InvalidInput` with a [`TrustError`](crate::TrustError) inside if `trust`
    /// can't be used; otherwise as [`from_std`](::tokio::net::UdpSocket::from_std)
    /// of tokio.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime with I/O enabled.
    pub fn from_std(socket: net::UdpSocket, trust: Trust) -> io::Result<Self> {
        let gate = Gate::new(trust)?;
        socket.set_nonblocking(true)?;
        let inner = ::tokio::net::UdpSocket::from_std(socket)?;
        Self::around(inner, gate)
    }

    fn around(inner: ::tokio::net::UdpSocket, gate: Gate) -> io::Result<Self> {
        Ok(Self {
            state: SocketState::new(&inner, inner.local_addr()?),
            inner,
            gate,
            listeners: Listeners::new(),
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
        self.receive(|admitted| (buffer::copy(admitted.payload, buffer), admitted.client))
            .await
    }

    /// Receives one client's datagram with all that is known of it.
    ///
    /// # Errors
    ///
    /// As [`recv_from`](Self::recv_from).
    pub async fn recv_datagram(&self) -> io::Result<Datagram> {
        self.receive(Datagram::new).await
    }

    /// Receives as [`recv_from`](Self::recv_from) if a datagram is there already.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if there is none, or after many that had to be dropped;
    /// wait for [`readable`](Self::readable) then.
    pub fn try_recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        self.try_receive(|admitted| (buffer::copy(admitted.payload, buffer), admitted.client))
    }

    /// Receives one client's payload to the end of `buffer`, as far as that has room
    /// or can grow, and returns its length and the client's address. What does not
    /// fit is lost.
    ///
    /// # Errors
    ///
    /// As [`recv_from`](Self::recv_from).
    pub async fn recv_buf_from(&self, buffer: &mut impl BufMut) -> io::Result<(usize, SocketAddr)> {
        self.receive(|admitted| (buffer::append(admitted.payload, buffer), admitted.client))
            .await
    }

    /// Receives as [`recv_buf_from`](Self::recv_buf_from) if a datagram is there
    /// already.
    ///
    /// # Errors
    ///
    /// As [`try_recv_from`](Self::try_recv_from).
    pub fn try_recv_buf_from(&self, buffer: &mut impl BufMut) -> io::Result<(usize, SocketAddr)> {
        self.try_receive(|admitted| (buffer::append(admitted.payload, buffer), admitted.client))
    }

    /// Receives as [`recv_datagram`](Self::recv_datagram) if a datagram is there
    /// already.
    ///
    /// # Errors
    ///
    /// As [`try_recv_from`](Self::try_recv_from).
    pub fn try_recv_datagram(&self) -> io::Result<Datagram> {
        self.try_receive(Datagram::new)
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
        let mut take = |admitted: &Admitted<'_>| {
            let len = admitted.payload.len().min(buffer.remaining());
            buffer.put_slice(&admitted.payload[..len]);
            admitted.client
        };
        loop {
            // Has the task give way now and then, however many are dropped.
            ready!(self.inner.poll_recv_ready(cx))?;
            match self.receive_one(&mut take) {
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
            let once = || self.receive_batch(batch);
            match self.inner.async_io(Interest::READABLE, once).await? {
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
        self.inner
            .try_io(Interest::READABLE, || self.receive_batch(batch))
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
            ready!(self.inner.poll_recv_ready(cx))?;
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
    /// From then on only batches are received, and there is no way back: the
    /// other calls have no place for the rest of a burst.
    ///
    /// # Errors
    ///
    /// As the system's for setting a socket's options.
    pub fn enable_gro(&mut self) -> io::Result<bool> {
        self.state.enable_gro(&self.inner)
    }

    /// Sends `payload` to a client by the way that its latest datagram came, and
    /// returns how many bytes were sent.
    ///
    /// # Errors
    ///
    /// `NotConnected` if the client has not been heard for
    /// [`Trust::forget_after`], or not at all; or not for
    /// [`FORMER_CLIENT_GRACE`](crate::FORMER_CLIENT_GRACE), and its proxy's address
    /// has named another client since. With
    /// [`ReplyFrom::Listener`](crate::ReplyFrom::Listener), `AddrNotAvailable`,
    /// `AddrInUse` or `PermissionDenied` if this host may not send from the
    /// listener's address; the message says what would mend it. Otherwise as
    /// [`send_to`](::tokio::net::UdpSocket::send_to) of tokio.
    pub async fn send_to(&self, payload: &[u8], client: impl ToSocketAddrs) -> io::Result<usize> {
        let client = lookup_host(client).await?.next().ok_or_else(no_address)?;
        self.send(payload, self.gate.way_to(client)?).await
    }

    /// Sends as [`send_to`](Self::send_to) if that is possible without waiting.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if it is not, in which case wait for
    /// [`writable`](Self::writable); otherwise as [`send_to`](Self::send_to).
    pub fn try_send_to(&self, payload: &[u8], client: SocketAddr) -> io::Result<usize> {
        self.try_send(payload, self.gate.way_to(client)?)
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
        let way = self.gate.way_to(client)?;
        let source = way.from.map(|listener| self.source(listener)).transpose()?;
        let socket = match &source {
            Some(Source::Bound(sender)) => &sender.inner,
            Some(Source::Own(_)) | None => &self.inner,
        };
        loop {
            ready!(socket.poll_send_ready(cx))?;
            match self.try_send_to(payload, client) {
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
    /// one length for one client leave as a burst (UDP_SEGMENT in udp(7)).
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
        let outgoing = self.gate.outgoing(datagrams)?;
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
        self.try_send_all(&self.gate.outgoing(datagrams)?)
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
        let outgoing = self.gate.outgoing(datagrams)?;
        let source = self.source_of(first_run(&outgoing))?;
        let socket = match &source {
            Some(Source::Bound(sender)) => &sender.inner,
            Some(Source::Own(_)) | None => &self.inner,
        };
        loop {
            ready!(socket.poll_send_ready(cx))?;
            match self.try_send_all(&outgoing) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }

    /// Answers `datagram` with `payload` by the way that this very datagram came,
    /// and returns how many bytes were sent.
    ///
    /// # Errors
    ///
    /// As [`send_to`](Self::send_to). `NotConnected` if the datagram came through
    /// a proxy more than [`FORMER_CLIENT_GRACE`](crate::FORMER_CLIENT_GRACE) ago, and
    /// its way is no longer that of [`send_to`](Self::send_to).
    pub async fn reply(&self, datagram: &Datagram, payload: &[u8]) -> io::Result<usize> {
        self.send(payload, self.gate.way_of_reply(datagram.reply_to())?)
            .await
    }

    /// Answers as [`reply`](Self::reply) if that is possible without waiting.
    ///
    /// # Errors
    ///
    /// As [`reply`](Self::reply); `WouldBlock` if it is not possible, in which case
    /// wait for [`writable`](Self::writable).
    pub fn try_reply(&self, datagram: &Datagram, payload: &[u8]) -> io::Result<usize> {
        self.try_send(payload, self.gate.way_of_reply(datagram.reply_to())?)
    }

    /// Waits until there may be something to receive. Since it may have to be
    /// dropped, [`try_recv_from`](Self::try_recv_from) can still find nothing.
    ///
    /// # Errors
    ///
    /// As [`readable`](::tokio::net::UdpSocket::readable) of tokio.
    pub async fn readable(&self) -> io::Result<()> {
        self.inner.readable().await
    }

    /// Waits until there may be room to send.
    ///
    /// # Errors
    ///
    /// As [`writable`](::tokio::net::UdpSocket::writable) of tokio.
    pub async fn writable(&self) -> io::Result<()> {
        self.inner.writable().await
    }

    /// Waits for [`readable`](Self::readable) in a task that is polled by hand.
    ///
    /// # Errors
    ///
    /// As [`poll_recv_ready`](::tokio::net::UdpSocket::poll_recv_ready) of tokio.
    pub fn poll_recv_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner.poll_recv_ready(cx)
    }

    /// Waits for [`writable`](Self::writable) in a task that is polled by hand.
    ///
    /// # Errors
    ///
    /// As [`poll_send_ready`](::tokio::net::UdpSocket::poll_send_ready) of tokio.
    pub fn poll_send_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner.poll_send_ready(cx)
    }

    /// The address that the socket is bound to.
    ///
    /// # Errors
    ///
    /// As [`local_addr`](::tokio::net::UdpSocket::local_addr) of tokio.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    /// How many hops IPv4 replies may take.
    ///
    /// # Errors
    ///
    /// As [`ttl`](::tokio::net::UdpSocket::ttl) of tokio.
    pub fn ttl(&self) -> io::Result<u32> {
        self.inner.ttl()
    }

    /// Sets how many hops IPv4 replies may take; those that leave by a socket of
    /// a listener ([`ReplyFrom::Listener`](crate::ReplyFrom::Listener)) keep the
    /// system's default.
    ///
    /// # Errors
    ///
    /// As [`set_ttl`](::tokio::net::UdpSocket::set_ttl) of tokio.
    pub fn set_ttl(&self, ttl: u32) -> io::Result<()> {
        self.inner.set_ttl(ttl)
    }

    /// What the socket has received, dropped and sent so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.gate.stats()
    }

    /// Receives until `take` gets a datagram. Each turn goes through tokio's
    /// `async_io`, which lets other tasks run when too many are dropped in a row.
    async fn receive<T>(&self, mut take: impl FnMut(&Admitted<'_>) -> T) -> io::Result<T> {
        loop {
            let one = || self.receive_one(&mut take);
            if let Some(taken) = self.inner.async_io(Interest::READABLE, one).await? {
                return Ok(taken);
            }
        }
    }

    /// As `receive`, without waiting; an error of the kind `WouldBlock` after many
    /// that had to be dropped.
    fn try_receive<T>(&self, mut take: impl FnMut(&Admitted<'_>) -> T) -> io::Result<T> {
        for _ in 0..MOST_DROPS_IN_A_ROW {
            if let Some(taken) = self.receive_one(&mut take)? {
                return Ok(taken);
            }
        }
        // Readiness stays set, so that `readable` returns at once.
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Receives one datagram without waiting; `None` if it had to be dropped.
    fn receive_one<T>(&self, mut take: impl FnMut(&Admitted<'_>) -> T) -> io::Result<Option<T>> {
        if self.state.gro() {
            return Err(received_in_batches());
        }
        buffer::with(|buffer| match self.receive_any(buffer) {
            Ok((len, peer, local)) => Ok(self
                .gate
                .admit_at(Tick::roughly_now(), peer, local, &buffer[..len])
                .ok()
                .map(|admitted| take(&admitted))),
            Err(error) if is_echo_of_earlier_send(&error) => Ok(None),
            Err(error) => Err(error),
        })
    }

    /// Receives one datagram: its length, its sender, and the address that it was
    /// sent to if that has to be known.
    fn receive_any(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr, Option<IpAddr>)> {
        // The socket is non-blocking, so this does not wait.
        let one = self.inner.try_io(Interest::READABLE, || {
            self.state.receive_one(&self.inner, buffer, true)
        })?;
        Ok((one.len, one.peer, self.state.reply_from(&one)))
    }

    /// Sends one datagram by this socket without waiting.
    fn try_send_one(&self, payload: &[u8], way: Way) -> io::Result<usize> {
        self.inner.try_io(Interest::WRITABLE, || {
            self.state.send_one(&self.inner, payload, way.to, way.local)
        })
    }

    /// Receives what is there without waiting; 0 if all of it had to be dropped.
    fn receive_batch(&self, batch: &mut Batch) -> io::Result<usize> {
        match batch.fill(&self.gate, &self.state, |slots| {
            self.state
                .receive(&self.inner, slots, 0..slots.slots(), true)
        }) {
            Err(error) if is_echo_of_earlier_send(&error) => Ok(0),
            result => result,
        }
    }

    fn try_send(&self, payload: &[u8], way: Way) -> io::Result<usize> {
        if way.from.is_some() {
            self.try_send_run(&[(payload, way)])?;
            return Ok(payload.len());
        }
        let sent = despite_echo(|| self.try_send_one(payload, way))?;
        self.gate.counters().reply_sent();
        Ok(sent)
    }

    /// Sends from the front what can be sent without waiting; an error if it is the
    /// first that can't be.
    fn try_send_all(&self, outgoing: &[Outgoing<'_>]) -> io::Result<usize> {
        let mut sent = 0;
        while sent < outgoing.len() {
            match self.try_send_run(first_run(&outgoing[sent..])) {
                Ok(more) => sent += more,
                Err(error) if sent == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(sent)
    }

    async fn send(&self, payload: &[u8], way: Way) -> io::Result<usize> {
        if way.from.is_some() {
            self.send_run(&[(payload, way)]).await?;
            return Ok(payload.len());
        }
        let once = || despite_echo(|| self.try_send_one(payload, way));
        let sent = self.inner.async_io(Interest::WRITABLE, once).await?;
        self.gate.counters().reply_sent();
        Ok(sent)
    }
}
