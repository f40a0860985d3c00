//! The blocking socket: `std`'s, with a [`Gate`] between it and the application.

use std::io;
use std::net::{self, IpAddr, SocketAddr, ToSocketAddrs};
#[cfg(unix)]
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ppv2_udp::SocketState;

use crate::clock::Tick;
use crate::errors::{despite_echo, is_echo_of_earlier_send, no_address, received_in_batches};
use crate::listeners::{Listeners, Source};
use crate::offload::Outgoing;
use crate::patience::{Patience, until_there_is_room};
use crate::{
    Admitted, Batch, Datagram, Direct, Gate, Recipient, Stats, Trust, Way, buffer, offload,
};

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
/// let socket = UdpSocket::bind("0.0.0.0:9000", Trust::networks(["192.0.2.10"])?)?;
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
    inner: net::UdpSocket,
    gate: Gate,
    state: SocketState,
    listeners: Listeners<Sender>,
    /// Spares calls that can't time out the time that they would begin at.
    has_timeout: AtomicBool,
}

/// To wait for the socket by poll(2), epoll(7) or crates above them, and for its
/// options. What is received by the descriptor itself has the header and the proxy's
/// address; so there is no `into_raw_fd`, which would hand it to somebody who would.
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

/// A socket that is bound to a listener's address, and doesn't wait.
#[derive(Debug)]
struct Sender {
    inner: net::UdpSocket,
    state: SocketState,
}

impl UdpSocket {
    /// Binds a socket to `addr`, the address that the proxy sends to.
    ///
    /// # Errors
    ///
    /// As [`std::net::UdpSocket::bind`]; `InvalidInput` with a
    /// [`TrustError`](crate::TrustError) inside if `trust` can't be used.
    ///
    /// ```
    /// use ppv2_sdk::{Trust, UdpSocket};
    ///
    /// let socket = UdpSocket::bind("127.0.0.1:0", Trust::networks(["127.0.0.0/8"])?)?;
    /// assert!(socket.local_addr()?.port() > 0);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn bind(addr: impl ToSocketAddrs, trust: Trust) -> io::Result<Self> {
        let gate = Gate::new(trust)?;
        Self::around(net::UdpSocket::bind(addr)?, gate)
    }

    /// Takes over a socket that is bound already, with the options that it has.
    ///
    /// # Errors
    ///
    /// `InvalidInput` with a [`TrustError`](crate::TrustError) inside if `trust`
    /// can't be used.
    ///
    /// ```
    /// use ppv2_sdk::{Trust, UdpSocket};
    ///
    /// let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
    /// socket.set_ttl(32)?;
    /// let socket = UdpSocket::from_std(socket, Trust::networks(["127.0.0.0/8"])?)?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn from_std(socket: net::UdpSocket, trust: Trust) -> io::Result<Self> {
        Self::around(socket, Gate::new(trust)?)
    }

    /// Takes over a socket that only sends, by the ways that a [`Gate`] of the
    /// caller's has found: hand them to [`send_batch`](Self::send_batch) as
    /// [`Recipient::Way`]. Unlike [`from_std`](Self::from_std) it leaves the socket's
    /// options as they are. What it receives counts as direct clients'.
    ///
    /// # Errors
    ///
    /// As [`std::net::UdpSocket::local_addr`].
    pub fn for_sending(socket: net::UdpSocket) -> io::Result<Self> {
        let everybody = Trust::ip_nets([]).direct(Direct::Accept).max_clients(1);
        let state = SocketState::for_sending(&socket, socket.local_addr()?);
        Self::with_state(socket, Gate::new(everybody)?, state)
    }

    fn around(inner: net::UdpSocket, gate: Gate) -> io::Result<Self> {
        let state = SocketState::new(&inner, inner.local_addr()?);
        Self::with_state(inner, gate, state)
    }

    fn with_state(inner: net::UdpSocket, gate: Gate, state: SocketState) -> io::Result<Self> {
        Ok(Self {
            has_timeout: AtomicBool::new(!matches!(inner.read_timeout(), Ok(None))),
            state,
            inner,
            gate,
            listeners: Listeners::new(),
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
        self.receive(|admitted| (buffer::copy(admitted.payload, buffer), admitted.client))
    }

    /// Receives one client's datagram with all that is known of it.
    ///
    /// # Errors
    ///
    /// As [`recv_from`](Self::recv_from).
    pub fn recv_datagram(&self) -> io::Result<Datagram> {
        self.receive(Datagram::new)
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
        let mut patience = Patience::new(self.has_timeout.load(Ordering::Relaxed));
        loop {
            let received = batch.fill(&self.gate, &self.state, |slots| {
                patience.receive(&self.inner, |wait| {
                    let all = 0..slots.slots();
                    self.state.receive(&self.inner, slots, all, wait)
                })
            });
            match received {
                Ok(0) => {}
                Ok(count) => return Ok(count),
                Err(error) if is_echo_of_earlier_send(&error) => {}
                Err(error) => return Err(error),
            }
            patience.dropped(&self.inner, batch.dropped().max(1))?;
        }
    }

    /// Has the kernel hand over datagrams of one proxy that arrive in a row
    /// together, and returns whether it does: Linux can (UDP_GRO in udp(7)).
    /// Receiving bursts then takes a fraction of the time.
    ///
    /// From then on only [`recv_batch`](Self::recv_batch) receives, and there is
    /// no way back: the other calls have no place for the rest of a burst.
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
    /// [`std::net::UdpSocket::send_to`].
    pub fn send_to(&self, payload: &[u8], client: impl ToSocketAddrs) -> io::Result<usize> {
        let client = client.to_socket_addrs()?.next().ok_or_else(no_address)?;
        self.send(payload, self.gate.way_to(client)?)
    }

    /// Answers `datagram` with `payload` by the way that this very datagram came,
    /// and returns how many bytes were sent.
    ///
    /// # Errors
    ///
    /// As [`send_to`](Self::send_to). `NotConnected` if the datagram came through
    /// a proxy more than [`FORMER_CLIENT_GRACE`](crate::FORMER_CLIENT_GRACE) ago, and
    /// its way is no longer that of [`send_to`](Self::send_to).
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
        self.send(payload, self.gate.way_of_reply(datagram.reply_to())?)
    }

    /// Sends datagrams in their order, each to a client's address or as the answer
    /// to a received one, and returns how many were sent. If it is fewer than
    /// were given, the next one is why: ask for it again to learn the error.
    ///
    /// On Linux that takes one call to the kernel for many, and consecutive
    /// datagrams of one length for one client leave as a burst (UDP_SEGMENT in
    /// udp(7)). Elsewhere they are sent one by one.
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
        let outgoing = self.gate.outgoing(datagrams)?;
        let mut sent = 0;
        for run in outgoing.chunk_by(|(_, one), (_, next)| one.same_source(next)) {
            match self.send_run(run) {
                Ok(more) => sent += more,
                Err(error) if sent == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(sent)
    }

    /// The address that the socket is bound to.
    ///
    /// # Errors
    ///
    /// As [`std::net::UdpSocket::local_addr`].
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
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
        self.inner.set_read_timeout(timeout)
    }

    /// The bound that [`set_read_timeout`](Self::set_read_timeout) set.
    ///
    /// # Errors
    ///
    /// As [`std::net::UdpSocket::read_timeout`].
    pub fn read_timeout(&self) -> io::Result<Option<Duration>> {
        self.inner.read_timeout()
    }

    /// Bounds how long a send call takes; `None` for no bound.
    ///
    /// # Errors
    ///
    /// As [`std::net::UdpSocket::set_write_timeout`]: a timeout of 0 is one.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.inner.set_write_timeout(timeout)
    }

    /// The bound that [`set_write_timeout`](Self::set_write_timeout) set.
    ///
    /// # Errors
    ///
    /// As [`std::net::UdpSocket::write_timeout`].
    pub fn write_timeout(&self) -> io::Result<Option<Duration>> {
        self.inner.write_timeout()
    }

    /// Makes calls return `WouldBlock` at once instead of waiting, or wait again.
    ///
    /// # Errors
    ///
    /// As [`std::net::UdpSocket::set_nonblocking`].
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        self.inner.set_nonblocking(nonblocking)
    }

    /// How many hops IPv4 replies may take.
    ///
    /// # Errors
    ///
    /// As [`std::net::UdpSocket::ttl`].
    pub fn ttl(&self) -> io::Result<u32> {
        self.inner.ttl()
    }

    /// Sets how many hops IPv4 replies may take; those that leave by a socket of
    /// a listener ([`ReplyFrom::Listener`](crate::ReplyFrom::Listener)) keep the
    /// system's default.
    ///
    /// # Errors
    ///
    /// As [`std::net::UdpSocket::set_ttl`].
    pub fn set_ttl(&self, ttl: u32) -> io::Result<()> {
        self.inner.set_ttl(ttl)
    }

    /// What the socket has received, dropped and sent so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.gate.stats()
    }

    /// Receives until `take` gets a datagram.
    fn receive<T>(&self, take: impl FnOnce(&Admitted<'_>) -> T) -> io::Result<T> {
        if self.state.gro() {
            return Err(received_in_batches());
        }
        let mut patience = Patience::new(self.has_timeout.load(Ordering::Relaxed));
        buffer::with(|buffer| {
            loop {
                match patience.receive(&self.inner, |wait| self.receive_one(buffer, wait)) {
                    Ok((len, peer, local)) => {
                        if let Ok(admitted) =
                            self.gate
                                .admit_at(Tick::roughly_now(), peer, local, &buffer[..len])
                        {
                            return Ok(take(&admitted));
                        }
                    }
                    Err(error) if is_echo_of_earlier_send(&error) => {}
                    Err(error) => return Err(error),
                }
                patience.dropped(&self.inner, 1)?;
            }
        })
    }

    /// Receives one datagram: its length, its sender, and the address that it was
    /// sent to if that has to be known.
    fn receive_one(
        &self,
        buffer: &mut [u8],
        wait: bool,
    ) -> io::Result<(usize, SocketAddr, Option<IpAddr>)> {
        let one = self.state.receive_one(&self.inner, buffer, wait)?;
        Ok((one.len, one.peer, self.state.reply_from(&one)))
    }

    fn send(&self, payload: &[u8], way: Way) -> io::Result<usize> {
        if way.from.is_some() {
            self.send_run(&[(payload, way)])?;
            return Ok(payload.len());
        }
        let sent = despite_echo(|| self.state.send_one(&self.inner, payload, way.to, way.local))?;
        self.gate.counters().reply_sent();
        Ok(sent)
    }

    /// Sends datagrams that leave from one address, from the front, and returns
    /// how many were sent; an error if it is the first that can't be.
    fn send_run(&self, run: &[Outgoing<'_>]) -> io::Result<usize> {
        let by_own = |source: Option<IpAddr>| {
            despite_echo(|| offload::send(&self.inner, &self.state, run, source))
        };
        let first = run.first().map(|(_, way)| way);
        let sent = match first.and_then(|way| way.from) {
            None => by_own(first.and_then(|way| way.local)),
            Some(listener) => match self.source(listener)? {
                Source::Own(ip) => by_own(Some(ip)),
                Source::Bound(sender) => until_there_is_room(&sender.inner, &self.inner, || {
                    offload::send(&sender.inner, &sender.state, run, None)
                }),
            },
        }?;
        self.gate.counters().replies_sent_many(sent);
        Ok(sent)
    }

    fn source(&self, listener: SocketAddr) -> io::Result<Source<Sender>> {
        let local = self.inner.local_addr()?;
        let counters = self.gate.counters();
        let wrap = |inner| {
            Ok(Sender {
                state: SocketState::unasked(listener),
                inner,
            })
        };
        self.listeners
            .source(Some(&self.inner), local, listener, counters, wrap)
    }
}
