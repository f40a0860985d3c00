//! A QUIC server that answers from the listener's address.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use ppv2_lab::TIMEOUT;
use ppv2_lab::fake_proxy::*;
use ppv2_lab::quic::{NAME, configs};
use ppv2_sdk::quinn::Runtime;
use ppv2_sdk::{ReplyFrom, Trust};
use quinn::{Endpoint, EndpointConfig};
use socket2::{Domain, Socket, Type};
use tokio::runtime::Builder;
use tokio::time::timeout;

const BYTES: usize = 1 << 20;

/// The proxy's socket for clients, at `listener`. It shares the address, as one
/// on the server's host has to.
fn listen(listener: SocketAddr) -> UdpSocket {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&listener.into()).unwrap();
    let socket = UdpSocket::from(socket);
    let short = Duration::from_millis(20);
    socket.set_read_timeout(Some(short)).unwrap();
    socket
}

/// Serves one connection from a listener at `port`, or at the server's own.
fn serve(port: Option<u16>) {
    let (server_config, client_config) = configs();
    let tokio = Builder::new_current_thread().enable_all().build().unwrap();
    let _context = tokio.enter();
    let trust = Trust::networks(["127.0.0.1"]).reply_from(ReplyFrom::Listener);
    let runtime = Arc::new(Runtime::new(trust.build().unwrap()));
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let config = EndpointConfig::default();
    let server = Endpoint::new(config, Some(server_config), socket, runtime.clone()).unwrap();
    let listener = SocketAddr::from(([127, 0, 3, 1], port.unwrap_or(address.port())));

    let proxy = listen(listener);
    let upstream = Proxy::bind("127.0.0.1:0");
    let done = AtomicBool::new(false);
    let mut client = Endpoint::client("127.0.1.1:0".parse().unwrap()).unwrap();
    client.set_default_client_config(client_config);
    let client_address = client.local_addr().unwrap();

    let accept = async {
        let connection = server.accept().await.unwrap().await.unwrap();
        assert_eq!(connection.remote_address(), client_address);
        let (mut send, mut receive) = connection.accept_bi().await.unwrap();
        assert_eq!(receive.read_to_end(BYTES).await.unwrap(), b"all, please");
        send.write_all(&vec![7; BYTES]).await.unwrap();
        send.finish().unwrap();
        connection.closed().await;
    };
    let connect = async {
        let connection = client.connect(listener, NAME).unwrap().await.unwrap();
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        send.write_all(b"all, please").await.unwrap();
        send.finish().unwrap();
        let answer = receive.read_to_end(BYTES).await.unwrap();
        assert!(answer == vec![7; BYTES]);
        connection.close(0u32.into(), b"");
        client.wait_idle().await;
    };
    // A client of QUIC takes no answer but from the address that it wrote to.
    let both = async { ::tokio::join!(accept, connect) };
    thread::scope(|scope| {
        let forward = || {
            let mut buffer = [0; 2048];
            while !done.load(Ordering::Relaxed) {
                if let Ok((len, from)) = proxy.recv_from(&mut buffer) {
                    upstream.send(address, &from_client_at(from, listener, &buffer[..len]));
                }
            }
        };
        scope.spawn(forward);
        let served = tokio.block_on(async { timeout(TIMEOUT, both).await });
        done.store(true, Ordering::Relaxed);
        served.expect("to be done by now");
    });
    upstream.receives_nothing();
    assert!(runtime.stats().replies_sent > 100);
    assert_eq!(runtime.stats().replies_without_path, 0);
}

#[test]
fn a_connection_is_served_from_another_port() {
    serve(Some(ppv2_lab::port()));
}

#[test]
fn a_connection_is_served_from_the_servers_own_port() {
    serve(None);
}
