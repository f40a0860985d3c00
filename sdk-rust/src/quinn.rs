//! Shows a QUIC server of quinn its clients.
//!
//! ```diff
//! -let endpoint = quinn::Endpoint::server(config, addr)?;
//! +let trust = Trust::networks(["192.0.2.10"])?;
//! +let endpoint = ppv2_sdk::quinn::server(EndpointConfig::default(), config, addr, trust)?;
//! ```
//!
//! From then on `remote_address` of a connection is the client's, address
//! validation (Retry) concerns the client, and when its port or address changes
//! quinn sees it migrate. [`Runtime`] is what stands behind it, for endpoints
//! that are set up by hand, and for the numbers of [`Stats`].
//!
//! Such an endpoint serves; it can't connect to anybody, since nothing is sent
//! to an address that was not heard from.

mod inbox;

use std::fmt;
use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use ::quinn::udp::{RecvMeta, Transmit};
use ::quinn::{
    AsyncTimer, AsyncUdpSocket, Endpoint, EndpointConfig, ServerConfig, TokioRuntime, UdpPoller,
};

use crate::clock::roughly_now;
use crate::{Gate, Stats, Trust, TrustError};
use inbox::Inbox;

/// Takes the place of [`Endpoint::server`]: an endpoint bound to `addr` that
/// serves the clients behind the proxies that `trust` names.
///
/// # Errors
///
/// As [`Endpoint::server`]; `InvalidInput` with a
/// [`TrustError`] inside if `trust` can't be used.
///
/// # Panics
///
/// Outside a tokio runtime with I/O enabled.
///
/// ```
/// # async fn serve(server_config: quinn::ServerConfig) -> std::io::Result<()> {
/// use ppv2_sdk::Trust;
/// use quinn::EndpointConfig;
///
/// let trust = Trust::networks(["192.0.2.10"])?;
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
        Arc::new(Runtime::new(trust)?),
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
/// let runtime = Arc::new(Runtime::new(Trust::networks(["192.0.2.10"])?)?);
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
    gate: Arc<Gate>,
}

impl Runtime {
    /// A runtime on tokio.
    ///
    /// # Errors
    ///
    /// A [`TrustError`] if `trust` can't be used.
    pub fn new(trust: Trust) -> Result<Self, TrustError> {
        Self::around(Arc::new(TokioRuntime), trust)
    }

    /// A runtime on another of quinn's.
    ///
    /// # Errors
    ///
    /// A [`TrustError`] if `trust` can't be used.
    pub fn around(runtime: Arc<dyn ::quinn::Runtime>, trust: Trust) -> Result<Self, TrustError> {
        Ok(Self {
            inner: runtime,
            gate: Arc::new(Gate::new(trust)?),
        })
    }

    /// What the runtime's sockets have received, dropped and sent so far. What
    /// quinn sends as one burst counts as many times as it has datagrams.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.gate.stats()
    }

    /// Puts the header's removal in front of a socket that the inner runtime, or
    /// anybody else, has made. Hand it to
    /// [`Endpoint::new_with_abstract_socket`].
    #[must_use]
    pub fn wrap(&self, socket: Arc<dyn AsyncUdpSocket>) -> Arc<dyn AsyncUdpSocket> {
        Arc::new(Socket {
            inner: socket,
            gate: Arc::clone(&self.gate),
            inbox: Mutex::default(),
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
        Ok(self.wrap(self.inner.wrap_udp_socket(socket)?))
    }

    fn now(&self) -> Instant {
        self.inner.now()
    }
}

/// A socket as quinn has it below an endpoint.
struct Socket {
    inner: Arc<dyn AsyncUdpSocket>,
    gate: Arc<Gate>,
    /// Only the endpoint receives, so that nobody ever waits for it.
    inbox: Mutex<Inbox>,
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Socket")
            .field("inner", &self.inner)
            .field("gate", &self.gate)
            .finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    /// Sends by the way to the client. To one who is not known, or no longer,
    /// nothing is sent: for QUIC that is a lost datagram, not a broken socket.
    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let Some(way) = self.gate.route(roughly_now(), transmit.destination) else {
            self.gate.counters().reply_without_route();
            return Ok(());
        };
        self.inner.try_send(&Transmit {
            destination: way,
            ..transmit.clone()
        })?;
        let segment = transmit.segment_size.unwrap_or(transmit.contents.len());
        let datagrams = transmit.contents.len().div_ceil(segment.max(1));
        self.gate.counters().replies_sent_many(datagrams);
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        inbox.poll_recv(cx, &*self.inner, &self.gate, bufs, meta)
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
