//! Certificates for QUIC, and a socket that counts what passes it.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use quinn::rustls::RootCertStore;
use quinn::rustls::pki_types::PrivatePkcs8KeyDer;
use quinn::udp::{EcnCodepoint, RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, ClientConfig, ServerConfig, UdpPoller};

/// The name in the server's certificate.
pub const NAME: &str = "server.ppv2.test";

/// A server with a certificate of its own, and clients that trust it.
pub fn configs() -> (ServerConfig, ClientConfig) {
    let certified = rcgen::generate_simple_self_signed([NAME.to_owned()]).unwrap();
    let certificate = certified.cert.der().clone();
    let key = PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    (
        ServerConfig::with_single_cert(vec![certificate], key.into()).unwrap(),
        ClientConfig::with_root_certificates(Arc::new(roots)).unwrap(),
    )
}

/// Datagrams by ECN mark.
#[derive(Debug, Default)]
pub struct Marks {
    pub none: AtomicU64,
    pub ect0: AtomicU64,
    /// ECT(1), which quinn never sends, and "congestion experienced", for which
    /// loopback has no cause.
    pub others: AtomicU64,
}

impl Marks {
    fn add(&self, ecn: Option<EcnCodepoint>, bytes: usize, each: usize) {
        let counter = match ecn {
            None => &self.none,
            Some(EcnCodepoint::Ect0) => &self.ect0,
            Some(EcnCodepoint::Ect1 | EcnCodepoint::Ce) => &self.others,
        };
        let datagrams = bytes.div_ceil(each.max(1)) as u64;
        counter.fetch_add(datagrams, Ordering::Relaxed);
    }

    pub fn read(&self) -> [u64; 3] {
        [&self.none, &self.ect0, &self.others].map(|counter| counter.load(Ordering::Relaxed))
    }
}

impl fmt::Display for Marks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [none, ect0, others] = self.read();
        write!(
            f,
            "{ect0} with ECT(0), {none} without, {others} with others"
        )
    }
}

/// The datagrams of one end. quinn doesn't tell whether it still believes in
/// ECN, but it marks what it sends only as long as it does.
#[derive(Debug, Default)]
pub struct Traffic {
    pub sent: Marks,
    pub received: Marks,
}

/// One of quinn's sockets, with a count of its datagrams.
#[derive(Debug)]
pub struct Counting {
    pub socket: Arc<dyn AsyncUdpSocket>,
    pub traffic: Arc<Traffic>,
    /// The address of this host that datagrams must have been sent to.
    pub to: Option<IpAddr>,
}

impl AsyncUdpSocket for Counting {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.socket).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.socket.try_send(transmit)?;
        let len = transmit.contents.len();
        let each = transmit.segment_size.unwrap_or(len);
        self.traffic.sent.add(transmit.ecn, len, each);
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let received = ready!(self.socket.poll_recv(cx, bufs, meta))?;
        for meta in &meta[..received] {
            assert!(self.to.is_none() || meta.dst_ip == self.to);
            // The kernel merges datagrams of equal marks alone.
            self.traffic.received.add(meta.ecn, meta.len, meta.stride);
        }
        Poll::Ready(Ok(received))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.socket.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}
