//! A QUIC server whose proxy has one address for all clients.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use ppv2::{ReplyTag, decode_tagged};
use ppv2_lab::TIMEOUT;
use ppv2_lab::quic::{NAME, configs};
use ppv2_sdk::Trust;
use ppv2_sdk::quinn::Runtime;
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

#[test]
fn connections_of_many_clients_share_one_address_of_the_proxy() {
    let (server_config, client_config) = configs();
    let tokio = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let _context = tokio.enter();
    let trust = Trust::networks(["127.0.0.1"]).build().unwrap();
    let runtime = Arc::new(Runtime::new(trust));
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let config = EndpointConfig::default();
    let server = Endpoint::new(config, Some(server_config), socket, runtime.clone()).unwrap();

    let (clients, upstream) = (bind("127.0.3.1:0"), bind("127.0.0.1:0"));
    let listener = clients.local_addr().unwrap();
    let (done, replies) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let forward = || {
            let (mut buffer, mut header) = ([0; 2048], [0; ppv2::MAX_TAGGED_HEADER_LEN]);
            while !done.load(Ordering::Relaxed) {
                if let Ok((len, from)) = clients.recv_from(&mut buffer) {
                    let tag = tag_of(from);
                    let header = ppv2::encode_udp_tagged(from, listener, tag, &mut header).unwrap();
                    let datagram = [header, &buffer[..len]].concat();
                    upstream.send_to(&datagram, address).unwrap();
                }
            }
        };
        let reply = || {
            let mut buffer = [0; 65_535];
            while !done.load(Ordering::Relaxed) {
                if let Ok((len, from)) = upstream.recv_from(&mut buffer) {
                    assert_eq!(from, address);
                    let reply = decode_tagged(&buffer[..len]).expect("a tagged reply");
                    assert_eq!(
                        (reply.destination, reply.tag),
                        (listener, tag_of(reply.client))
                    );
                    clients.send_to(reply.payload, reply.client).unwrap();
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
