//! A QUIC server on the SDK behind the real proxy: bulk transfers in both
//! directions pass whole while the client moves from port to port, the server
//! sees where it moves to, addresses are validated by Retry, and both ends go on
//! believing in ECN.
#![expect(clippy::unwrap_used, reason = "a failed test is the right answer")]

mod common;

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use common::Proxy;
use ppv2_sdk::{Stats, Trust, quinn::Runtime};
use quinn::rustls::RootCertStore;
use quinn::rustls::pki_types::PrivatePkcs8KeyDer;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{
    AsyncUdpSocket, ClientConfig, Connection, Endpoint, EndpointConfig, Runtime as _, ServerConfig,
    UdpPoller,
};
use tokio::sync::oneshot;

const NAME: &str = "server.ppv2.test";
const PATIENCE: Duration = Duration::from_secs(60);
const ROUND: usize = 2_000_000;

/// The server's socket on its way to quinn, with a count of datagrams by mark.
#[derive(Debug)]
struct Counting {
    socket: Arc<dyn AsyncUdpSocket>,
    marked: Arc<AtomicU64>,
    unmarked: Arc<AtomicU64>,
}

impl AsyncUdpSocket for Counting {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.socket).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.socket.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let received = ready!(self.socket.poll_recv(cx, bufs, meta))?;
        for meta in &meta[..received] {
            // The kernel's address, which a proxy on this host wrote to.
            assert_eq!(meta.dst_ip, Some([127, 0, 0, 1].into()));
            let datagrams = meta.len.div_ceil(meta.stride) as u64;
            let counter = if meta.ecn.is_some() {
                &self.marked
            } else {
                &self.unmarked
            };
            counter.fetch_add(datagrams, Ordering::Relaxed);
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

/// Answers each stream with its bytes inverted, after the address that the
/// client had when it opened it.
async fn serve(endpoint: Endpoint, retried: oneshot::Sender<SocketAddr>) {
    let incoming = endpoint.accept().await.unwrap();
    assert!(!incoming.remote_address_validated());
    let first = incoming.remote_address();
    incoming.retry().unwrap();
    let incoming = endpoint.accept().await.unwrap();
    assert!(incoming.remote_address_validated());
    retried.send(first).unwrap();
    let connection = incoming.await.unwrap();
    while let Ok((mut send, mut receive)) = connection.accept_bi().await {
        let address = connection.remote_address().to_string();
        send.write_all(format!("{address:>32}").as_bytes())
            .await
            .unwrap();
        while let Some(chunk) = receive.read_chunk(65_536, true).await.unwrap() {
            let inverted: Vec<u8> = chunk.bytes.iter().map(|byte| !byte).collect();
            send.write_all(&inverted).await.unwrap();
        }
        send.finish().unwrap();
    }
}

/// Sends bytes, checks the answer, and returns the address in front of it.
async fn transfer(connection: &Connection, move_now: impl FnOnce()) -> String {
    let bytes: Vec<u8> = (0..ROUND as u64)
        .map(|at| at.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[0])
        .collect();
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    let write = async {
        send.write_all(&bytes[..ROUND / 2]).await.unwrap();
        move_now();
        send.write_all(&bytes[ROUND / 2..]).await.unwrap();
        send.finish().unwrap();
    };
    let (answer, ()) = tokio::join!(receive.read_to_end(2 * ROUND), write);
    let answer = answer.unwrap();
    let (address, answer) = answer.split_at(32);
    assert!(answer.iter().map(|byte| !byte).eq(bytes));
    String::from_utf8_lossy(address).trim_start().to_owned()
}

async fn carries_on() -> (Stats, u64, u64) {
    let certified = rcgen::generate_simple_self_signed([NAME.to_owned()]).unwrap();
    let certificate = certified.cert.der().clone();
    let key = PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
    let server_config =
        ServerConfig::with_single_cert(vec![certificate.clone()], key.into()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate).unwrap();

    let runtime = Arc::new(Runtime::new(Trust::networks(["127.0.0.1"]).unwrap()).unwrap());
    let (marked, unmarked) = (Arc::default(), Arc::default());
    let socket = Arc::new(Counting {
        socket: runtime
            .wrap_udp_socket(UdpSocket::bind("127.0.0.1:0").unwrap())
            .unwrap(),
        marked: Arc::clone(&marked),
        unmarked: Arc::clone(&unmarked),
    });
    let config = EndpointConfig::default();
    let server =
        Endpoint::new_with_abstract_socket(config, Some(server_config), socket, runtime.clone())
            .unwrap();
    let proxy = Proxy::start(server.local_addr().unwrap(), 1);
    let (retried, first_address) = oneshot::channel();
    tokio::spawn(serve(server, retried));

    let mut client = Endpoint::client("127.0.0.2:0".parse().unwrap()).unwrap();
    client
        .set_default_client_config(ClientConfig::with_root_certificates(Arc::new(roots)).unwrap());
    let connecting = client.connect(proxy.listener(), NAME).unwrap();
    let connection = connecting.await.unwrap();
    let mut here = client.local_addr().unwrap();
    assert_eq!(first_address.await.unwrap(), here);
    for ip in ["127.0.0.2", "127.0.0.3", "127.0.0.2"] {
        let elsewhere = UdpSocket::bind((ip, 0)).unwrap();
        let there = elsewhere.local_addr().unwrap();
        let seen = transfer(&connection, || client.rebind(elsewhere).unwrap()).await;
        // The move can overtake the stream's first bytes.
        assert!(
            [here, there].map(|at| at.to_string()).contains(&seen),
            "{seen}"
        );
        here = there;
    }
    assert_eq!(transfer(&connection, || {}).await, here.to_string());
    assert_eq!(connection.close_reason(), None);
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    (runtime.stats(), count(&marked), count(&unmarked))
}

#[test]
fn a_client_that_moves_carries_on_and_is_seen_to_move() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (stats, marked, unmarked) = runtime
        .block_on(async { tokio::time::timeout(PATIENCE, carries_on()).await })
        .expect("to be done by now");
    assert_eq!(stats.dropped_total(), 0);
    assert_eq!(stats.replies_without_route, 0);
    // From four addresses in all.
    assert_eq!(stats.clients, 4);
    // quinn leaves the mark off the few packets that probe a new path, and off
    // all if the server doesn't report them.
    assert!(
        unmarked * 20 <= marked,
        "{marked} with a mark, {unmarked} without"
    );
}
