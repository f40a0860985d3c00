//! QUIC connections of quinn, client and server, survive the proxy: streams in
//! both directions arrive byte for byte over IPv4 and IPv6, both ends go on
//! believing in ECN, and a client that changes its port in the middle of a
//! transfer carries on through a new session. The proxy loses no datagram that
//! it has received; and none is lost at all while the windows fit the kernel's
//! receive buffers, which QUIC otherwise overruns to find out what they hold.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ppv2_lab::quic::{Counting, NAME, Traffic, configs};
use ppv2_lab::*;
use quinn::{
    Connection, Endpoint, EndpointConfig, RecvStream, Runtime, SendStream, ServerConfig,
    TokioRuntime, TransportConfig,
};
use tokio::sync::{mpsc, watch};

/// A whole test that takes longer hangs.
const GUARD: Duration = Duration::from_secs(120);

const CONNECTIONS: u64 = 4;

/// Bytes of each connection's streams, the same in both directions.
const STREAMS: [usize; 4] = [300_000, 700_000, 1_500_000, 3_000_000];

/// A socket of quinn's own that counts.
fn counting(ip: &str, traffic: &Arc<Traffic>) -> Arc<Counting> {
    Arc::new(Counting {
        socket: TokioRuntime.wrap_udp_socket(socket(ip)).unwrap(),
        traffic: Arc::clone(traffic),
        to: None,
    })
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
    _proxies: Vec<Process>,
    _folder: tempfile::TempDir,
}

/// What clients write to.
#[derive(Clone, Copy, PartialEq)]
enum By {
    /// The proxy in front of the server.
    Proxy,
    /// Another proxy, which writes headers for that one.
    TwoProxies,
}

impl Ends {
    /// `window`: bytes in flight of one connection and direction, where they
    /// shall be fewer than quinn would have.
    fn start(ip: &str, by: By, window: Option<u32>) -> Self {
        let (mut server_config, mut client_config) = configs();
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
        let (mut listener, admin) = (address(ip), address("127.0.0.1"));
        let folder = tempfile::tempdir().unwrap();
        let accept = match by {
            By::Proxy => String::new(),
            By::TwoProxies => format!("accept = {{ from = [\"{ip}\"] }}"),
        };
        let config = format!(
            "[admin]\nlisten = \"{admin}\"\n[[listener]]\nbind = [\"{listener}\"]\n\
             mode = \"plain\"\nupstream = \"upstream\"\n{accept}\n\
             [upstream.upstream]\nservers = [\"{}\"]\n",
            server.local_addr().unwrap()
        );
        let mut proxies = vec![proxy_with(&folder, &config)];
        if by == By::TwoProxies {
            let front = address(ip);
            proxies.push(proxy_between(front, listener, &[]));
            listener = front;
        }
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
            _proxies: proxies,
            _folder: folder,
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
            // What came is read first: more may be sent in between.
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
    let socket = counting(ip, &traffic);
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

async fn streams_pass_whole(ip: &str, by: By, window: Option<u32>) {
    let mut ends = Ends::start(ip, by, window);
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
    run(streams_pass_whole("127.0.0.1", By::Proxy, None));
}

#[test]
fn streams_pass_whole_over_ipv6() {
    run(streams_pass_whole("::1", By::Proxy, None));
}

/// All connections' datagrams in flight then fit the smallest buffer on their
/// path, one of Linux's default size: 208 KiB, in which a datagram of 1,452 bytes
/// takes up to 4 KiB.
const FITTING: u32 = 12_000;

#[test]
fn nothing_is_lost_that_buffers_can_hold_over_ipv4() {
    run(streams_pass_whole("127.0.0.1", By::Proxy, Some(FITTING)));
}

#[test]
fn nothing_is_lost_that_buffers_can_hold_over_ipv6() {
    run(streams_pass_whole("::1", By::Proxy, Some(FITTING)));
}

async fn a_client_migrates(ip: &str, by: By) {
    const LEN: usize = 8_000_000;
    const MOVES: usize = 3;

    let mut ends = Ends::start(ip, by, None);
    let connection = ends.connect().await;
    let accepted = ends.accepted.recv().await.unwrap();
    let (progress, mut progressed) = watch::channel(0);
    let transfer = tokio::spawn(transfer(connection.clone(), 1, LEN, progress));
    let mut peers = vec![accepted.remote_address()];
    for number in 1..=MOVES {
        let here = LEN * number / (MOVES + 1);
        progressed.wait_for(|at| *at >= here).await.unwrap();
        let socket = counting(ip, &ends.client_traffic);
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
    run(a_client_migrates("127.0.0.1", By::Proxy));
}

#[test]
fn a_client_that_changes_its_port_carries_on_over_ipv6() {
    run(a_client_migrates("::1", By::Proxy));
}

#[test]
fn streams_pass_two_proxies_whole() {
    run(streams_pass_whole("127.0.0.1", By::TwoProxies, None));
}

#[test]
fn a_client_that_changes_its_port_carries_on_behind_two_proxies() {
    run(a_client_migrates("::1", By::TwoProxies));
}
