//! A QUIC server on the SDK behind the real proxy: bulk transfers in both
//! directions pass whole while the client moves from port to port, the server
//! sees where it moves to, addresses are validated by Retry, and both ends go on
//! believing in ECN.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use ppv2_lab::quic::{Counting, NAME, Traffic, configs};
use ppv2_sdk::{Stats, Trust, quinn::Runtime};
use quinn::{Connection, Endpoint, EndpointConfig, Runtime as _};
use tokio::sync::oneshot;

use crate::running::Proxy;

const PATIENCE: Duration = Duration::from_secs(60);
const ROUND: usize = 2_000_000;

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

async fn carries_on(replies: &str) -> (Stats, Arc<Traffic>) {
    let (server_config, client_config) = configs();
    let runtime = Arc::new(Runtime::new(
        Trust::networks(["127.0.0.1"]).build().unwrap(),
    ));
    let traffic = Arc::<Traffic>::default();
    let socket = Arc::new(Counting {
        socket: runtime
            .wrap_udp_socket(UdpSocket::bind("127.0.0.1:0").unwrap())
            .unwrap(),
        traffic: Arc::clone(&traffic),
        to: Some([127, 0, 0, 1].into()),
    });
    let config = EndpointConfig::default();
    let server =
        Endpoint::new_with_abstract_socket(config, Some(server_config), socket, runtime.clone())
            .unwrap();
    let proxy = Proxy::start(server.local_addr().unwrap(), 1, replies);
    let (retried, first_address) = oneshot::channel();
    tokio::spawn(serve(server, retried));

    let mut client = Endpoint::client("127.0.0.2:0".parse().unwrap()).unwrap();
    client.set_default_client_config(client_config);
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
    (runtime.stats(), traffic)
}

#[test]
fn a_client_that_moves_carries_on_and_is_seen_to_move() {
    for replies in ["session", "tagged"] {
        is_seen_to_move(replies);
    }
}

fn is_seen_to_move(replies: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (stats, traffic) = runtime
        .block_on(async { tokio::time::timeout(PATIENCE, carries_on(replies)).await })
        .expect("to be done by now");
    assert_eq!(stats.dropped_total(), 0);
    assert_eq!(stats.replies_without_path, 0);
    // From four addresses in all.
    assert_eq!(stats.clients, 4);
    // quinn leaves the mark off the few packets that probe a new path, and off
    // all if the server doesn't report them.
    let [unmarked, marked, others] = traffic.received.read();
    assert!(unmarked * 20 <= marked + others, "{}", traffic.received);
}
