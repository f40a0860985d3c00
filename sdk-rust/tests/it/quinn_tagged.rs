//! A QUIC server whose proxy has one address for all clients, or says a header once.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use ppv2::{ReplyTag, decode_tagged, spp};
use ppv2_lab::TIMEOUT;
use ppv2_lab::quic::{NAME, configs};
use ppv2_sdk::quinn::Runtime;
use ppv2_sdk::{Format, Trust, TrustBuilder};
use quinn::{ClientConfig, Endpoint, EndpointConfig};
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use tokio::time::timeout;

const CLIENTS: usize = 10;
const BYTES: usize = 256 << 10;

fn bind(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap();
    let short = Duration::from_millis(20);
    socket.set_read_timeout(Some(short)).unwrap();
    socket
}

fn tag_of(client: SocketAddr) -> ReplyTag {
    ReplyTag::new(0, u64::from(client.port()).to_be_bytes())
}

/// Tells each client its own address, many times over.
async fn serve(server: Endpoint) {
    while let Some(incoming) = server.accept().await {
        tokio::spawn(async move {
            let connection = incoming.await.unwrap();
            let (mut send, mut receive) = connection.accept_bi().await.unwrap();
            assert_eq!(receive.read_to_end(100).await.unwrap(), b"who am I?");
            let text = format!("{:>21}", connection.remote_address());
            send.write_all(&text.into_bytes().repeat(BYTES / 21))
                .await
                .unwrap();
            send.finish().unwrap();
            connection.closed().await;
        });
    }
}

/// Asks, and checks the answer.
async fn ask(config: ClientConfig, listener: SocketAddr) {
    let mut client = Endpoint::client("127.0.1.1:0".parse().unwrap()).unwrap();
    client.set_default_client_config(config);
    let text = format!("{:>21}", client.local_addr().unwrap());
    let connection = client.connect(listener, NAME).unwrap().await.unwrap();
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    send.write_all(b"who am I?").await.unwrap();
    send.finish().unwrap();
    let answer = receive.read_to_end(BYTES).await.unwrap();
    assert!(answer == text.into_bytes().repeat(BYTES / 21));
    connection.close(0u32.into(), b"");
    client.wait_idle().await;
}

/// What a proxy sends to the server, and what it reads from a reply: the client, and how
/// long the header is.
struct Wire {
    write: fn(SocketAddr, SocketAddr) -> Vec<u8>,
    read: fn(&[u8], SocketAddr) -> (SocketAddr, usize),
}

fn with_tag(client: SocketAddr, listener: SocketAddr) -> Vec<u8> {
    let mut buffer = [0; ppv2::MAX_TAGGED_HEADER_LEN];
    let tag = tag_of(client);
    ppv2::encode_udp_tagged(client, listener, tag, &mut buffer)
        .unwrap()
        .to_vec()
}

#[test]
fn connections_of_many_clients_share_one_address_of_the_proxy() {
    let read = |datagram: &[u8], listener| {
        let reply = decode_tagged(datagram).expect("a tagged reply");
        let said = (reply.destination, reply.tag);
        assert_eq!(said, (listener, tag_of(reply.client)));
        (reply.client, datagram.len() - reply.payload.len())
    };
    let write = with_tag;
    share_one_address(Trust::networks(["127.0.0.1"]), &Wire { write, read });
}

#[test]
fn connections_of_many_clients_share_one_address_by_spp() {
    let write = |client, proxy| spp::SppHeader { client, proxy }.to_bytes().to_vec();
    let read = |datagram: &[u8], listener| {
        let (header, payload) = spp::decode(datagram).expect("an SPP header");
        assert_eq!(header.proxy, listener);
        (header.client, datagram.len() - payload.len())
    };
    let trust = Trust::networks(["127.0.0.1"]).formats([Format::Spp]);
    share_one_address(trust, &Wire { write, read });
}

fn share_one_address(trust: TrustBuilder, wire: &Wire) {
    let (server_config, client_config) = configs();
    let tokio = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let _context = tokio.enter();
    let runtime = Arc::new(Runtime::new(trust.build().unwrap()));
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let config = EndpointConfig::default();
    let server = Endpoint::new(config, Some(server_config), socket, runtime.clone()).unwrap();

    let (clients, upstream) = (bind("127.0.3.1:0"), bind("127.0.0.1:0"));
    let listener = clients.local_addr().unwrap();
    let (done, replies) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let forward = || {
            let mut buffer = [0; 2048];
            while !done.load(Ordering::Relaxed) {
                if let Ok((len, from)) = clients.recv_from(&mut buffer) {
                    let datagram = [&(wire.write)(from, listener), &buffer[..len]].concat();
                    upstream.send_to(&datagram, address).unwrap();
                }
            }
        };
        let reply = || {
            let mut buffer = [0; 65_535];
            while !done.load(Ordering::Relaxed) {
                if let Ok((len, from)) = upstream.recv_from(&mut buffer) {
                    assert_eq!(from, address);
                    let (client, header_len) = (wire.read)(&buffer[..len], listener);
                    clients.send_to(&buffer[header_len..len], client).unwrap();
                    replies.fetch_add(1, Ordering::Relaxed);
                }
            }
        };
        let (forward, reply) = (scope.spawn(forward), scope.spawn(reply));
        let asked = tokio.block_on(async {
            tokio::spawn(serve(server));
            let mut asking = JoinSet::new();
            for _ in 0..CLIENTS {
                asking.spawn(ask(client_config.clone(), listener));
            }
            timeout(TIMEOUT, asking.join_all()).await
        });
        done.store(true, Ordering::Relaxed);
        forward.join().unwrap();
        reply.join().unwrap();
        asked.expect("to be done by now");
    });
    let least = CLIENTS * BYTES / 1_500;
    assert!(replies.load(Ordering::Relaxed) > least as u64);
    let stats = runtime.stats();
    assert_eq!((stats.clients, stats.replies_without_path), (CLIENTS, 0));
}

/// As `emit = "first"` of a proxy with a socket for each client.
#[test]
fn connections_of_clients_whose_header_comes_once() {
    let (server_config, client_config) = configs();
    let tokio = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let _context = tokio.enter();
    let trust = Trust::networks(["127.0.0.1"]).remember_senders(TIMEOUT, CLIENTS);
    let runtime = Arc::new(Runtime::new(trust.build().unwrap()));
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let config = EndpointConfig::default();
    let server = Endpoint::new(config, Some(server_config), socket, runtime.clone()).unwrap();

    let done = AtomicBool::new(false);
    // What a session of the proxy does.
    let forward = |listener: UdpSocket| {
        let (at, upstream) = (listener.local_addr().unwrap(), bind("127.0.0.1:0"));
        upstream.connect(address).unwrap();
        for socket in [&listener, &upstream] {
            let short = Duration::from_millis(1);
            socket.set_read_timeout(Some(short)).unwrap();
        }
        let (mut buffer, mut client) = ([0; 65_535], None);
        while !done.load(Ordering::Relaxed) {
            if let Ok((len, from)) = listener.recv_from(&mut buffer) {
                let mut header = [0; ppv2::MAX_UDP_HEADER_LEN];
                let header: &[u8] = match client.replace(from) {
                    None => ppv2::encode_udp(from, at, &mut header).unwrap(),
                    Some(_) => &[],
                };
                upstream.send(&[header, &buffer[..len]].concat()).unwrap();
            }
            if let (Ok(len), Some(client)) = (upstream.recv(&mut buffer), client) {
                listener.send_to(&buffer[..len], client).unwrap();
            }
        }
    };
    thread::scope(|scope| {
        let mut listeners = Vec::new();
        for _ in 0..3 {
            let listener = bind("127.0.3.1:0");
            listeners.push(listener.local_addr().unwrap());
            let forward = &forward;
            scope.spawn(move || forward(listener));
        }
        let asked = tokio.block_on(async {
            tokio::spawn(serve(server));
            let mut asking = JoinSet::new();
            for listener in listeners {
                asking.spawn(ask(client_config.clone(), listener));
            }
            timeout(TIMEOUT, asking.join_all()).await
        });
        done.store(true, Ordering::Relaxed);
        asked.expect("to be done by now");
    });
    let stats = runtime.stats();
    assert_eq!((stats.clients, stats.dropped_total()), (3, 0));
}
