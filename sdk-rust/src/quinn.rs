//! QUIC servers of quinn that see their clients.
//!
//! ```diff
//! -let endpoint = quinn::Endpoint::server(config, addr)?;
//! +let trust = Trust::networks(["192.0.2.1"]).build()?;
//! +let endpoint = ppv2_sdk::quinn::server(EndpointConfig::default(), config, addr, trust)?;
//! ```
//!
//! `remote_address` of a connection is then the client's, address validation (Retry)
//! concerns the client, and quinn sees a migration when its port or address changes.
//! [`Runtime`] is for endpoints that are set up by hand, and for [`Stats`].
//!
//! With [`ReplyFrom::Listener`], a connection fails if this host may not send to its
//! client from the listener's address. An error in quinn's log says how to fix it.
//!
//! What quinn sends to a forgotten client is lost. It is counted as
//! [`Stats::replies_without_path`], and the log warns of it at most once a minute. So
//! set [`forget_after`](crate::TrustBuilder::forget_after) (120 seconds unless set) to
//! at least quinn's `max_idle_timeout` (30 seconds unless set), which this crate can't
//! read.
//!
//! To a proxy that sends reply tags each datagram has a header of 41 or 65 bytes in front,
//! to one that sends SPP headers one of 38. quinn doesn't know of it, so `initial_mtu` and
//! `min_mtu` of its `TransportConfig` must leave room for it on the way to the proxy. 1200, the
//! value unless set, does so where IP packets of 1313 bytes pass. The search for larger sizes finds
//! what fits.
//!
//! Such an endpoint serves. It can't connect to other hosts, since it sends only to
//! addresses that it has received from.

mod inbox;

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, SocketAddrV6, UdpSocket};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use ::quinn::udp::{RecvMeta, Transmit};
use ::quinn::{
    AsyncTimer, AsyncUdpSocket, Endpoint, EndpointConfig, ServerConfig, TokioRuntime, UdpPoller,
};

use crate::clock::Tick;
use crate::listeners::{Listeners, Source};
use crate::{Demux, ReplyFrom, ReplyPath, Stats, Trust};
use inbox::Inbox;

/// Takes the place of [`Endpoint::server`]: an endpoint bound to `addr` that
/// serves the clients behind the proxies that `trust` names.
///
/// # Errors
///
/// As [`Endpoint::server`].
///
/// # Panics
///
/// Outside a tokio runtime with I/O enabled.
///
/// [`Endpoint::server`]: https://docs.rs/quinn/0.11/quinn/struct.Endpoint.html#method.server
///
/// ```
/// # async fn serve(server_config: quinn::ServerConfig) -> std::io::Result<()> {
/// use ppv2_sdk::Trust;
/// use quinn::EndpointConfig;
///
/// let trust = Trust::networks(["192.0.2.1"]).build()?;
/// let addr = "0.0.0.0:443".parse().unwrap();
/// let config = EndpointConfig::default();
/// let endpoint = ppv2_sdk::quinn::server(config, server_config, addr, trust)?;
/// while let Some(incoming) = endpoint.accept().await {
///     println!("{} connects", incoming.remote_address());
/// }
/// # Ok(())
/// # }
/// ```
pub fn server(
    config: EndpointConfig,
    server_config: ServerConfig,
    addr: SocketAddr,
    trust: Trust,
) -> io::Result<Endpoint> {
    Endpoint::new(
        config,
        Some(server_config),
        UdpSocket::bind(addr)?,
        Arc::new(Runtime::new(trust)),
    )
}

/// A runtime of quinn whose sockets take the header off and send replies back
/// through the proxy. All sockets of one runtime, such as those of
/// [`Endpoint::rebind`], share what it knows.
///
/// ```no_run
/// use std::sync::Arc;
///
/// use ppv2_sdk::{Trust, quinn::Runtime};
/// use quinn::{Endpoint, EndpointConfig};
///
/// # fn serve(server_config: quinn::ServerConfig) -> std::io::Result<()> {
/// let runtime = Arc::new(Runtime::new(Trust::networks(["192.0.2.1"]).build()?));
/// let socket = std::net::UdpSocket::bind("0.0.0.0:443")?;
/// let endpoint = Endpoint::new(
///     EndpointConfig::default(),
///     Some(server_config),
///     socket,
///     runtime.clone(),
/// )?;
/// println!("{} datagrams dropped", runtime.stats().dropped_total());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Runtime {
    inner: Arc<dyn ::quinn::Runtime>,
    demux: Arc<Demux>,
}

impl Runtime {
    /// A runtime on tokio.
    #[must_use]
    pub fn new(trust: Trust) -> Self {
        Self::around(Arc::new(TokioRuntime), trust)
    }

    /// A runtime on another of quinn's.
    #[must_use]
    pub fn around(runtime: Arc<dyn ::quinn::Runtime>, trust: Trust) -> Self {
        Self {
            inner: runtime,
            demux: Arc::new(Demux::new(trust)),
        }
    }

    /// What the runtime's sockets have received, dropped and sent so far. What
    /// quinn sends as one burst counts as many times as it has datagrams.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.demux.stats()
    }

    /// Puts the header's removal in front of a socket that the inner runtime, or
    /// anybody else, has made. Hand it to
    /// [`Endpoint::new_with_abstract_socket`].
    ///
    /// With [`ReplyFrom::Listener`] such a socket
    /// can't be given the right to send from a listener of its own port; what
    /// [`wrap_udp_socket`](::quinn::Runtime::wrap_udp_socket) makes can.
    #[must_use]
    pub fn wrap(&self, socket: Arc<dyn AsyncUdpSocket>) -> Arc<dyn AsyncUdpSocket> {
        self.around_socket(socket, None)
    }

    fn around_socket(
        &self,
        inner: Arc<dyn AsyncUdpSocket>,
        descriptor: Option<UdpSocket>,
    ) -> Arc<dyn AsyncUdpSocket> {
        Arc::new(Socket {
            inner,
            descriptor,
            runtime: Arc::clone(&self.inner),
            demux: Arc::clone(&self.demux),
            inbox: Mutex::default(),
            listeners: Listeners::new(),
            full: Mutex::default(),
        })
    }
}

impl ::quinn::Runtime for Runtime {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        self.inner.new_timer(at)
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        self.inner.spawn(future);
    }

    fn wrap_udp_socket(&self, socket: UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let descriptor = match self.demux.settings().reply_from {
            ReplyFrom::Proxy => None,
            ReplyFrom::Listener => Some(socket.try_clone()?),
        };
        Ok(self.around_socket(self.inner.wrap_udp_socket(socket)?, descriptor))
    }

    fn now(&self) -> Instant {
        self.inner.now()
    }
}

/// Bytes that the kernel takes in one burst, headers included: what fits one IP packet,
/// less the longest IP and UDP headers.
const MAX_BURST: usize = 65_535 - 48;

/// A socket as quinn has it below an endpoint.
struct Socket {
    inner: Arc<dyn AsyncUdpSocket>,
    /// Its descriptor, with [`ReplyFrom::Listener`] and if it is known.
    descriptor: Option<UdpSocket>,
    /// Makes the sockets of listeners.
    runtime: Arc<dyn ::quinn::Runtime>,
    demux: Arc<Demux>,
    listeners: Listeners<Sender>,
    /// The socket of a listener that had no room for a datagram just now.
    full: Mutex<Option<Sender>>,
    /// Only the endpoint receives, so that nobody ever waits for it.
    inbox: Mutex<Inbox>,
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Socket")
            .field("inner", &self.inner)
            .field("demux", &self.demux)
            .finish_non_exhaustive()
    }
}

/// A socket that is bound to a listener's address.
type Sender = Arc<dyn AsyncUdpSocket>;

impl Socket {
    fn send(&self, path: ReplyPath, transmit: &Transmit<'_>) -> io::Result<()> {
        let Some(listener) = path.from else {
            let header = path.header();
            if !header.is_empty() {
                return self.send_with_header(&header, path, transmit);
            }
            // quinn keeps to the address that a connection began with, whereas
            // the client may come through another proxy by now.
            return self.inner.try_send(&Transmit {
                destination: path.to,
                src_ip: path.local.or(transmit.src_ip),
                ..transmit.clone()
            });
        };
        let local = self.inner.local_addr()?;
        let wrap = |socket| self.runtime.wrap_udp_socket(socket);
        let counters = self.demux.counters();
        let descriptor = self.descriptor.as_ref();
        match self
            .listeners
            .source(descriptor, local, listener, counters, wrap)?
        {
            Source::Own(ip) => self.inner.try_send(&Transmit {
                destination: as_seen_by(local, path.to),
                src_ip: Some(ip),
                ..transmit.clone()
            }),
            Source::Bound(sender) => {
                let sent = sender.try_send(&Transmit {
                    destination: path.to,
                    src_ip: None,
                    ..transmit.clone()
                });
                if matches!(&sent, Err(error) if error.kind() == io::ErrorKind::WouldBlock) {
                    *self.full() = Some(Sender::clone(&sender));
                }
                sent
            }
        }
    }

    /// Sends with `header` in front of each datagram of a burst. Below quinn a burst is
    /// one piece of memory, so it has to be copied.
    fn send_with_header(
        &self,
        header: &[u8],
        path: ReplyPath,
        transmit: &Transmit<'_>,
    ) -> io::Result<()> {
        thread_local! {
            static BURST: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        let payload = transmit.segment_size.unwrap_or(transmit.contents.len());
        let segment = header.len() + payload.max(1);
        // Headers may make a burst of large datagrams longer than the kernel takes.
        let at_once = (MAX_BURST / segment).max(1);
        BURST.with_borrow_mut(|burst| {
            for (number, datagrams) in transmit
                .contents
                .chunks(payload.max(1).saturating_mul(at_once))
                .enumerate()
            {
                burst.clear();
                for datagram in datagrams.chunks(payload.max(1)) {
                    burst.extend_from_slice(header);
                    burst.extend_from_slice(datagram);
                }
                let sent = self.inner.try_send(&Transmit {
                    destination: path.to,
                    src_ip: path.local.or(transmit.src_ip),
                    contents: burst,
                    segment_size: transmit.segment_size.map(|_| segment),
                    ecn: transmit.ecn,
                });
                // quinn would repeat what was sent already. For QUIC the rest is lost.
                if number == 0 {
                    sent?;
                }
            }
            Ok(())
        })
    }

    fn full(&self) -> MutexGuard<'_, Option<Sender>> {
        self.full.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An IPv4 address in the form that a socket bound to `local` can send to.
fn as_seen_by(local: SocketAddr, to: SocketAddr) -> SocketAddr {
    match (local, to) {
        (SocketAddr::V6(_), SocketAddr::V4(v4)) => {
            SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0).into()
        }
        _ => to,
    }
}

/// Waits for room in the socket that had none: the one that receives, or that of
/// a listener.
#[derive(Debug)]
struct Poller {
    socket: Arc<Socket>,
    own: Pin<Box<dyn UdpPoller>>,
    of_listener: Option<Pin<Box<dyn UdpPoller>>>,
}

impl UdpPoller for Poller {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let full = self.socket.full().take();
        if let Some(full) = full {
            self.of_listener = Some(full.create_io_poller());
        }
        let Some(of_listener) = &mut self.of_listener else {
            return self.own.as_mut().poll_writable(cx);
        };
        let result = ready!(of_listener.as_mut().poll_writable(cx));
        self.of_listener = None;
        Poll::Ready(result)
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        let own = Arc::clone(&self.inner).create_io_poller();
        match self.demux.settings().reply_from {
            ReplyFrom::Proxy => own,
            ReplyFrom::Listener => Box::pin(Poller {
                socket: self,
                own,
                of_listener: None,
            }),
        }
    }

    /// Sends by the path to the client. To one who is not known, or no longer,
    /// nothing is sent: for QUIC that is a lost datagram, not a broken socket.
    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let Some(path) = self
            .demux
            .path_to(Tick::roughly_now(), transmit.destination.into())
        else {
            self.demux.counters().reply_without_path();
            self.demux.warn_of_lost_send(transmit.destination);
            return Ok(());
        };
        self.send(path, transmit)?;
        let segment = transmit.segment_size.unwrap_or(transmit.contents.len());
        let datagrams = transmit.contents.len().div_ceil(segment.max(1));
        self.demux.counters().replies_sent(datagrams);
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        inbox.poll_recv(cx, &*self.inner, &self.demux, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests;
