//! QUIC connections of quinn, client and server, survive the proxy: streams in
//! both directions arrive byte for byte over IPv4 and IPv6, both ends go on
//! believing in ECN, and a client that changes its port in the middle of a
//! transfer carries on through a new session. The proxy loses no datagram that
//! it has received; and none is lost at all while the windows fit the kernel's
//! receive buffers, which QUIC otherwise overruns to find out what they hold.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use ppv2_lab::*;
use quinn::rustls::RootCertStore;
use quinn::rustls::pki_types::PrivatePkcs8KeyDer;
use quinn::udp::{EcnCodepoint, RecvMeta, Transmit};
use quinn::{
    AsyncUdpSocket, ClientConfig, Connection, Endpoint, EndpointConfig, RecvStream, Runtime,
    SendStream, ServerConfig, TokioRuntime, TransportConfig, UdpPoller,
};
use tokio::sync::{mpsc, watch};

/// Name in the server's certificate.
const NAME: &str = "server.ppv2.test";

/// A whole test that takes longer hangs.
const GUARD: Duration = Duration::from_secs(120);

const CONNECTIONS: u64 = 4;

/// Bytes of each connection's streams, the same in both directions.
const STREAMS: [usize; 4] = [300_000, 700_000, 1_500_000, 3_000_000];

/// Datagrams by ECN mark.
#[derive(Debug, Default)]
struct Marks {
    none: AtomicU64,
    ect0: AtomicU64,
    /// ECT(1), which quinn never sends, and "congestion experienced", for which
    /// loopback has no cause.
    others: AtomicU64,
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

    fn read(&self) -> [u64; 3] {
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
struct Traffic {
    sent: Marks,
    received: Marks,
}

/// One of quinn's sockets, with a count of its datagrams.
#[derive(Debug)]
struct Counting {
    socket: Arc<dyn AsyncUdpSocket>,
    traffic: Arc<Traffic>,
}

impl Counting {
    fn bind(ip: &str, traffic: &Arc<Traffic>) -> Arc<Self> {
        Arc::new(Self {
            socket: TokioRuntime.wrap_udp_socket(socket(ip)).unwrap(),
            traffic: Arc::clone(traffic),
        })
    }
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

/// A server, the proxy in front of it and a client.
struct Ends {
    client: Endpoint,
    client_traffic: Arc<Traffic>,
    server: Endpoint,
    server_traffic: Arc<Traffic>,
    accepted: mpsc::UnboundedReceiver<Connection>,
    listener: SocketAddr,
    admin: SocketAddr,
    _proxy: Process,
}

impl Ends {
    /// `window`: bytes in flight of one connection and direction, where they
    /// shall be fewer than quinn would have.
    fn start(ip: &str, window: Option<u32>) -> Self {
        let certified = rcgen::generate_simple_self_signed([NAME.to_owned()]).unwrap();
        let certificate = certified.cert.der().clone();
        let key = PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
        let mut server_config =
            ServerConfig::with_single_cert(vec![certificate.clone()], key.into()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate).unwrap();
        let mut client_config = ClientConfig::with_root_certificates(Arc::new(roots)).unwrap();
        if let Some(window) = window {
            let mut transport = TransportConfig::default();
            transport.receive_window(window.into());
            let transport = Arc::new(transport);
            server_config.transport_config(Arc::clone(&transport));
            client_config.transport_config(transport);
        }

        let (server, server_traffic) = endpoint(ip, Some(server_config));
        let (mut client, client_traffic) = endpoint(ip, None);
        client.set_default_client_config(client_config);
        let (listener, admin) = (address(ip), address("127.0.0.1"));
        let more = ["--mode", "plain", "--admin", &admin.to_string()];
        let proxy = proxy_between(listener, server.local_addr().unwrap(), &more);
        let (accept, accepted) = mpsc::unbounded_channel();
        tokio::spawn(serve(server.clone(), accept));
        Self {
            client,
            client_traffic,
            server,
            server_traffic,
            accepted,
            listener,
            admin,
            _proxy: proxy,
        }
    }

    async fn connect(&self) -> Connection {
        let connecting = self.client.connect(self.listener, NAME).unwrap();
        connecting.await.unwrap()
    }

    fn sessions(&self) -> u64 {
        metric(
            self.admin,
            "ppv2_sessions_opened_total{listener=\"listener1\"}",
        )
    }

    /// Asserts that what the proxy received it has sent on, in both directions.
    fn check_proxy(&self) {
        let server = self.server.local_addr().unwrap();
        let listener = "{listener=\"listener1\"}";
        let upstream = format!("{{upstream=\"upstream\",server=\"{server}\"}}");
        let read = |name: &str, labels: &str| metric(self.admin, &format!("{name}{labels}"));
        // While this waits both ends are silent, since they share its thread.
        eventually("as many datagrams out as in", || {
            let requests = read("ppv2_client_datagrams_total", listener);
            let replies = read("ppv2_upstream_reply_datagrams_total", &upstream);
            requests == read("ppv2_upstream_datagrams_total", &upstream)
                && replies == read("ppv2_reply_datagrams_total", listener)
        });
        let (_, metrics) = http_get(self.admin, "/metrics");
        let drops = metrics
            .lines()
            .filter(|line| line.starts_with("ppv2_dropped_datagrams_total"))
            .inspect(|line| assert!(line.ends_with(" 0"), "{line}"));
        assert_ne!(drops.count(), 0);
    }

    /// Reports what was lost, and asserts that no mark was, and that both ends
    /// marked what they sent to the last.
    fn check_marks(&self, connections: &[&Connection]) {
        for connection in connections {
            let path = connection.stats().path;
            eprintln!(
                "{} of {} packets lost, {} congestion events, MTU {}, RTT {:?}",
                path.lost_packets,
                path.sent_packets,
                path.congestion_events,
                path.current_mtu,
                path.rtt
            );
        }
        let (client, server) = (&self.client_traffic, &self.server_traffic);
        for (from, to, name) in [
            (client, server, "client to server"),
            (server, client, "server to client"),
        ] {
            // First what came, lest something be sent in between.
            let came = to.received.read();
            let sent = from.sent.read();
            eprintln!("{name}: sent {}; came {}", from.sent, to.received);
            // quinn leaves the marks off the few packets that probe a new path.
            assert!(sent[0] * 100 <= sent[1], "{name}: {} sent", from.sent);
            assert!(came[0] <= sent[0], "{name}: lost marks: {}", to.received);
            assert_eq!(came[2], 0, "{name}: false marks: {}", to.received);
            assert!(came[1] * 2 >= sent[1], "{name}: {}", to.received);
        }
    }

    async fn stop(self) {
        self.client.close(0u32.into(), b"done");
        self.client.wait_idle().await;
        self.server.close(0u32.into(), b"done");
        self.server.wait_idle().await;
    }
}

fn endpoint(ip: &str, config: Option<ServerConfig>) -> (Endpoint, Arc<Traffic>) {
    let traffic = Arc::new(Traffic::default());
    let socket = Counting::bind(ip, &traffic);
    let endpoint = Endpoint::new_with_abstract_socket(
        EndpointConfig::default(),
        config,
        socket,
        Arc::new(TokioRuntime),
    );
    (endpoint.unwrap(), traffic)
}

async fn serve(endpoint: Endpoint, accept: mpsc::UnboundedSender<Connection>) {
    while let Some(incoming) = endpoint.accept().await {
        let accept = accept.clone();
        tokio::spawn(async move {
            let connection = incoming.await.unwrap();
            accept.send(connection.clone()).unwrap();
            while let Ok((send, receive)) = connection.accept_bi().await {
                tokio::spawn(answer(send, receive));
            }
        });
    }
}

/// Sends back each byte inverted, so that an answer can't be an echo.
async fn answer(mut send: SendStream, mut receive: RecvStream) {
    while let Some(chunk) = receive.read_chunk(65_536, true).await.unwrap() {
        let inverted: Vec<u8> = chunk.bytes.iter().map(|byte| !byte).collect();
        send.write_all(&inverted).await.unwrap();
    }
    send.finish().unwrap();
}

/// The byte at a place of a stream, like no other stream's or place's around.
fn byte(stream: u64, at: usize) -> u8 {
    let place = (stream << 40) + at as u64;
    place.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[0]
}

/// Sends `len` bytes and checks the answer, telling `progress` how far it came.
async fn transfer(connection: Connection, stream: u64, len: usize, progress: watch::Sender<usize>) {
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    let write = async {
        let mut at = 0;
        while at < len {
            let end = len.min(at + 65_536);
            let bytes: Vec<u8> = (at..end).map(|at| byte(stream, at)).collect();
            send.write_all(&bytes).await.unwrap();
            at = end;
        }
        send.finish().unwrap();
    };
    let read = async {
        let mut at = 0;
        while let Some(chunk) = receive.read_chunk(65_536, true).await.unwrap() {
            let mut expected = (at..).map(|at| !byte(stream, at));
            let right = chunk.bytes.iter().all(|got| Some(*got) == expected.next());
            assert!(right, "stream {stream}, from byte {at}");
            at += chunk.bytes.len();
            progress.send_replace(at);
        }
        assert_eq!(at, len, "stream {stream}");
    };
    tokio::join!(write, read);
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime
        .block_on(async { tokio::time::timeout(GUARD, test).await })
        .expect("the test hangs");
}

async fn streams_pass_whole(ip: &str, window: Option<u32>) {
    let mut ends = Ends::start(ip, window);
    let (mut connections, mut transfers) = (Vec::new(), Vec::new());
    for number in 0..CONNECTIONS {
        let connection = ends.connect().await;
        for (stream, len) in STREAMS.into_iter().enumerate() {
            let stream = number << 8 | stream as u64;
            let work = transfer(connection.clone(), stream, len, watch::channel(0).0);
            transfers.push(tokio::spawn(work));
        }
        connections.push(connection);
    }
    for transfer in transfers {
        transfer.await.unwrap();
    }
    for _ in 0..CONNECTIONS {
        connections.push(ends.accepted.recv().await.unwrap());
    }
    for connection in &connections {
        assert_eq!(connection.close_reason(), None);
        let lost = connection.stats().path.lost_packets;
        assert!(window.is_none() || lost == 0, "{lost} packets lost");
    }
    ends.check_marks(&connections.iter().collect::<Vec<_>>());
    ends.check_proxy();
    // One client socket for all connections: QUIC tells them apart, the proxy
    // need not.
    assert_eq!(ends.sessions(), 1);
    ends.stop().await;
}

#[test]
fn streams_pass_whole_over_ipv4() {
    run(streams_pass_whole("127.0.0.1", None));
}

#[test]
fn streams_pass_whole_over_ipv6() {
    run(streams_pass_whole("::1", None));
}

/// All connections' datagrams in flight then fit the smallest buffer on their
/// way, one of Linux's default size: 208 KiB, in which a datagram of 1,452 bytes
/// takes up to 4 KiB.
const FITTING: u32 = 12_000;

#[test]
fn nothing_is_lost_that_buffers_can_hold_over_ipv4() {
    run(streams_pass_whole("127.0.0.1", Some(FITTING)));
}

#[test]
fn nothing_is_lost_that_buffers_can_hold_over_ipv6() {
    run(streams_pass_whole("::1", Some(FITTING)));
}

async fn a_client_migrates(ip: &str) {
    const LEN: usize = 8_000_000;
    const MOVES: usize = 3;

    let mut ends = Ends::start(ip, None);
    let connection = ends.connect().await;
    let accepted = ends.accepted.recv().await.unwrap();
    let (progress, mut progressed) = watch::channel(0);
    let transfer = tokio::spawn(transfer(connection.clone(), 1, LEN, progress));
    let mut peers = vec![accepted.remote_address()];
    for number in 1..=MOVES {
        let here = LEN * number / (MOVES + 1);
        progressed.wait_for(|at| *at >= here).await.unwrap();
        let socket = Counting::bind(ip, &ends.client_traffic);
        ends.client.rebind_abstract(socket).unwrap();
        // The server has taken note when it sees another socket of the proxy.
        while peers.last() == Some(&accepted.remote_address()) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        peers.push(accepted.remote_address());
        assert!(*progressed.borrow() < LEN, "moved after the transfer");
    }
    transfer.await.unwrap();

    assert_eq!(connection.close_reason(), None);
    assert_eq!(accepted.close_reason(), None);
    assert_eq!(accepted.remote_address(), peers[MOVES]);
    assert_eq!(ends.sessions(), 1 + MOVES as u64, "{peers:?}");
    ends.check_marks(&[&connection, &accepted]);
    ends.check_proxy();
    ends.stop().await;
}

#[test]
fn a_client_that_changes_its_port_carries_on_over_ipv4() {
    run(a_client_migrates("127.0.0.1"));
}

#[test]
fn a_client_that_changes_its_port_carries_on_over_ipv6() {
    run(a_client_migrates("::1"));
}
