//! A bulk transfer to a QUIC server of quinn. Client and server have a thread
//! each; what counts is the time that the server's thread spends on a byte, of
//! which the SDK's part is to take a header off every datagram.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use ppv2_sdk::Trust;
use quinn::rustls::RootCertStore;
use quinn::rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{
    AsyncUdpSocket, ClientConfig, Connection, Endpoint, EndpointConfig, Runtime as _, ServerConfig,
    TokioRuntime, UdpPoller,
};
use tokio::runtime::{Builder, Runtime};

use crate::datagrams::{cpu_time, show_times};
use crate::{Row, Wanted};

const ROUNDS: usize = 21;
const BYTES: usize = 16 << 20;
const NAME: &str = "localhost";
const CLIENT: &str = "203.0.113.11:54321";
const LISTENER: &str = "198.51.100.10:443";

/// The client's socket and the proxy in one: a header on all that is sent.
#[derive(Debug)]
struct BehindProxy(Arc<dyn AsyncUdpSocket>);

impl AsyncUdpSocket for BehindProxy {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.0).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
        let (client, listener) = (CLIENT.parse().unwrap(), LISTENER.parse().unwrap());
        let header = ppv2::encode_udp(client, listener, &mut buffer).unwrap();
        let segment = transmit.segment_size.unwrap_or(transmit.contents.len());
        let mut contents = Vec::with_capacity(2 * transmit.contents.len());
        for datagram in transmit.contents.chunks(segment) {
            contents.extend_from_slice(header);
            contents.extend_from_slice(datagram);
        }
        self.0.try_send(&Transmit {
            contents: &contents,
            segment_size: transmit.segment_size.map(|len| len + header.len()),
            ..transmit.clone()
        })
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.0.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.0.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.0.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.0.may_fragment()
    }
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// A server in a thread of its own, and the client's connection to it.
struct Pair {
    runtime: Runtime,
    connection: Connection,
    _endpoint: Endpoint,
}

impl Pair {
    fn new(sdk: bool) -> Self {
        let (server, certificate) = start_server(sdk);
        let mut roots = RootCertStore::empty();
        roots.add(certificate).unwrap();
        let config = ClientConfig::with_root_certificates(Arc::new(roots)).unwrap();
        let runtime = runtime();
        let (endpoint, connection) = runtime.block_on(async {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            let mut socket = TokioRuntime.wrap_udp_socket(socket).unwrap();
            if sdk {
                socket = Arc::new(BehindProxy(socket));
            }
            let config_of_endpoint = EndpointConfig::default();
            let runtime = Arc::new(TokioRuntime);
            let mut endpoint =
                Endpoint::new_with_abstract_socket(config_of_endpoint, None, socket, runtime)
                    .unwrap();
            endpoint.set_default_client_config(config);
            let connection = endpoint.connect(server, NAME).unwrap().await.unwrap();
            (endpoint, connection)
        });
        Self {
            runtime,
            connection,
            _endpoint: endpoint,
        }
    }

    /// Sends so many bytes, and returns how long the server's thread worked.
    fn transfer(&self) -> Duration {
        self.runtime.block_on(async {
            let (mut send, mut receive) = self.connection.open_bi().await.unwrap();
            let chunk = vec![7; 1 << 16];
            for _ in 0..BYTES / chunk.len() {
                send.write_all(&chunk).await.unwrap();
            }
            send.finish().unwrap();
            let mut nanos = [0; 8];
            receive.read_exact(&mut nanos).await.unwrap();
            Duration::from_nanos(u64::from_be_bytes(nanos))
        })
    }
}

fn start_server(sdk: bool) -> (SocketAddr, CertificateDer<'static>) {
    let certified = rcgen::generate_simple_self_signed([NAME.to_owned()]).unwrap();
    let certificate = certified.cert.der().clone();
    let key = PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
    let config = ServerConfig::with_single_cert(vec![certificate.clone()], key.into()).unwrap();
    let (started, address) = std::sync::mpsc::channel();
    thread::spawn(move || {
        runtime().block_on(async move {
            let address = "127.0.0.1:0".parse().unwrap();
            let endpoint = if sdk {
                let trust = Trust::networks(["127.0.0.1"]).build().unwrap();
                ppv2_sdk::quinn::server(EndpointConfig::default(), config, address, trust)
            } else {
                Endpoint::server(config, address)
            };
            let endpoint = endpoint.unwrap();
            started.send(endpoint.local_addr().unwrap()).unwrap();
            serve(endpoint.accept().await.unwrap().await.unwrap()).await;
        });
    });
    (address.recv().unwrap(), certificate)
}

/// Takes whatever comes, and answers each transfer with its time.
async fn serve(connection: Connection) {
    while let Ok((mut send, mut receive)) = connection.accept_bi().await {
        let start = cpu_time();
        while receive.read_chunk(1 << 16, true).await.unwrap().is_some() {}
        let nanos = u64::try_from((cpu_time() - start).as_nanos()).unwrap();
        send.write_all(&nanos.to_be_bytes()).await.unwrap();
        send.finish().unwrap();
    }
}

pub(crate) fn bulk() -> Row {
    let (plain, sdk) = (Pair::new(false), Pair::new(true));
    let round = || {
        let (without, with) = (plain.transfer(), sdk.transfer());
        show_times(with, without, "16 MiB");
        without.as_secs_f64() / with.as_secs_f64()
    };
    round();
    Row {
        work: "quinn bulk transfer through the SDK",
        against: "plain quinn, no header",
        unit: "throughput",
        wanted: Wanted::AtLeast(0.9),
        ratios: (0..ROUNDS).map(|_| round()).collect(),
    }
}
