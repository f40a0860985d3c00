//! Senders that say a header once, on each kind of socket: a proxy with a socket for each
//! of its clients, as nginx and Cloudflare Spectrum have them.

use std::net::SocketAddr;
use std::time::Duration;

use ppv2_lab::TIMEOUT;
use ppv2_lab::fake_proxy::*;
use ppv2_sdk::{Batch, DropReason, HeaderAlone, Trust, TrustBuilder, UdpSocket};

fn remembering() -> TrustBuilder {
    Trust::networks(LOOPBACK).remember_senders(TIMEOUT, 100)
}

fn server(trust: TrustBuilder) -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind("127.0.0.1:0", trust.build().unwrap()).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

/// Clients, each with the proxy's socket that speaks for it.
fn sessions() -> Vec<(SocketAddr, Proxy)> {
    let session = |number: u16| {
        let client = SocketAddr::from(([203, 0, 113, 11], 10_000 + number));
        (client, Proxy::bind("127.0.0.1:0"))
    };
    (0..20).map(session).collect()
}

#[test]
fn bare_datagrams_belong_to_the_client_of_the_first() {
    let (socket, server) = server(remembering());
    let sessions = sessions();
    for (client, proxy) in &sessions {
        let first = from_client_at(*client, addr(LISTENER), b"first");
        proxy.send(server, &first);
        let datagram = socket.recv_datagram().unwrap();
        assert_eq!(
            (datagram.client, &datagram.payload[..]),
            (*client, &b"first"[..])
        );
    }
    for round in 0..10 {
        for (_, proxy) in sessions.iter().rev() {
            proxy.send(server, format!("{round}").as_bytes());
        }
        for (client, proxy) in sessions.iter().rev() {
            let mut buffer = [0; 9];
            let (len, from) = socket.recv_from(&mut buffer).unwrap();
            assert_eq!(from, *client);
            socket.send_to(&buffer[..len], from).unwrap();
            assert_eq!(proxy.receive().0, format!("{round}").as_bytes());
        }
    }
    assert_eq!(socket.stats().dropped_total(), 0);
}

/// A burst of one sender, and datagrams of several in one batch.
#[test]
fn batches_hold_headers_and_bare_datagrams() {
    let (socket, server) = server(remembering());
    let sessions = sessions();
    let mut batch = Batch::new(64);
    for round in 0..3u8 {
        for (client, proxy) in &sessions {
            if round == 0 {
                proxy.send(server, &from_client_at(*client, addr(LISTENER), &[round]));
            }
            for payload in [&[round][..], b"", &[round; 5]] {
                proxy.send(server, payload);
            }
        }
        let mut left = sessions.len() * if round == 0 { 4 } else { 3 };
        let mut heard = Vec::new();
        while left > 0 {
            left -= socket.recv_batch(&mut batch).unwrap();
            heard.extend(batch.iter().map(|one| (one.client, one.payload.to_vec())));
            let echoes: Vec<_> = batch.iter().map(|one| (one.payload, one)).collect();
            assert_eq!(socket.send_batch(&echoes).unwrap(), echoes.len());
        }
        let mut heard = heard.into_iter();
        for (client, proxy) in &sessions {
            let mut sent = vec![vec![round], vec![], vec![round; 5]];
            if round == 0 {
                sent.insert(0, vec![round]);
            }
            for payload in sent {
                assert_eq!(heard.next(), Some((*client, payload.clone())));
                assert_eq!(proxy.receive().0, payload);
            }
        }
    }
}

/// The kernel hands a burst on as one piece, in which a header is like any other datagram.
#[cfg(target_os = "linux")]
#[test]
fn a_burst_holds_headers_and_bare_datagrams() {
    use ppv2_udp::{Outgoing, SocketState, Transmit};

    let (socket, server) = server(remembering());
    assert!(socket.enable_gro().unwrap());
    let proxy = Proxy::bind("127.0.0.1:0");
    let state = SocketState::unasked(proxy.address());
    let mut expected = Vec::new();
    let datagrams = (0..40u8).map(|number| {
        let client = match number % 20 {
            0..10 => CLIENT,
            _ => OTHER_CLIENT,
        };
        let (datagram, payload) = if number % 10 == 0 {
            (from_client(client, &[number; 5]), vec![number; 5])
        } else {
            (vec![number; 28 + 5], vec![number; 28 + 5])
        };
        expected.push((addr(client), payload));
        datagram
    });
    let burst: Vec<u8> = datagrams.flatten().collect();
    let outgoing = Outgoing {
        to: Some(server),
        ..Outgoing::default()
    };
    let transmit = Transmit::burst(outgoing, &burst, 28 + 5);
    assert_eq!(state.send(proxy.socket(), 1, |_| transmit).unwrap(), 40);

    let (mut batch, mut heard) = (Batch::new(1), Vec::new());
    while heard.len() < expected.len() {
        socket.recv_batch(&mut batch).unwrap();
        heard.extend(batch.iter().map(|one| (one.client, one.payload.to_vec())));
    }
    assert_eq!(heard, expected);
}

#[test]
fn a_port_that_speaks_for_another_client_moves_to_it() {
    let (socket, server) = server(remembering());
    let proxy = Proxy::bind("127.0.0.1:0");
    for client in [CLIENT, OTHER_CLIENT, CLIENT] {
        proxy.send(server, &from_client(client, b"x"));
        proxy.send(server, b"y");
        for _ in 0..2 {
            assert_eq!(socket.recv_datagram().unwrap().client, addr(client));
        }
    }
}

#[test]
fn a_header_in_a_datagram_of_its_own_is_none_for_the_application() {
    for alone in [HeaderAlone::Announce, HeaderAlone::Deliver] {
        let (socket, server) = server(remembering().header_alone(alone));
        let proxy = Proxy::bind("127.0.0.1:0");
        proxy.send(server, &from_client(CLIENT, b""));
        proxy.send(server, b"hello");
        if alone == HeaderAlone::Deliver {
            assert!(socket.recv_datagram().unwrap().payload.is_empty());
        }
        let datagram = socket.recv_datagram().unwrap();
        assert_eq!(
            (datagram.client, &datagram.payload[..]),
            (addr(CLIENT), &b"hello"[..])
        );
        let announced = u64::from(alone == HeaderAlone::Announce);
        assert_eq!(socket.stats().dropped(DropReason::HeaderAlone), announced);
    }
}

#[test]
fn what_nobody_said_is_dropped() {
    let short = Duration::from_millis(1);
    let (socket, server) = server(Trust::networks(LOOPBACK).remember_senders(short, 100));
    let proxy = Proxy::bind("127.0.0.1:0");
    proxy.send(server, b"bare");
    proxy.send(
        server,
        b"PROXY TCP4 203.0.113.11 198.51.100.10 1 2\r\nhello",
    );
    proxy.send(server, &from_client(CLIENT, b"hello"));
    assert_eq!(&socket.recv_datagram().unwrap().payload[..], b"hello");
    // Longer than the sender is remembered, by the clock's ticks.
    std::thread::sleep(Duration::from_millis(50));
    proxy.send(server, b"late");
    proxy.send(server, &from_client(OTHER_CLIENT, b"again"));
    assert_eq!(socket.recv_datagram().unwrap().client, addr(OTHER_CLIENT));
    let stats = socket.stats();
    assert_eq!(stats.dropped(DropReason::NoHeader), 2);
    assert_eq!(stats.dropped(DropReason::V1Header), 1);
}

/// One address of the proxy may speak for different clients to different addresses of the
/// server.
#[cfg(target_os = "linux")]
#[test]
fn a_wildcard_socket_tells_the_addresses_apart_that_it_is_sent_to() {
    let socket = UdpSocket::from_std(dual_stack(), remembering().build().unwrap()).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    let bound = socket.local_addr().unwrap();
    let proxy = Proxy::bind("127.0.0.1:0");
    let sent = [(CLIENT, "127.0.0.7"), (OTHER_CLIENT, "127.0.0.8")];
    for bare in [false, true] {
        for (client, to) in sent {
            let server = reached_by(to, bound);
            let datagram = from_client(client, b"x");
            proxy.send(server, if bare { b"x" } else { &datagram });
            let datagram = socket.recv_datagram().unwrap();
            assert_eq!(datagram.client, addr(client));
            socket.reply(&datagram, b"y").unwrap();
            assert_eq!(proxy.receive(), (b"y".to_vec(), server));
        }
    }
}

#[cfg(feature = "tokio")]
#[tokio::test]
async fn tokio_sockets_remember_too() {
    let trust = remembering().build().unwrap();
    let socket = ppv2_sdk::tokio::UdpSocket::bind("127.0.0.1:0", trust);
    let socket = socket.await.unwrap();
    let server = socket.local_addr().unwrap();
    let proxy = Proxy::bind("127.0.0.1:0");
    let soon = |future| tokio::time::timeout(TIMEOUT, future);
    proxy.send(server, &from_client(CLIENT, b""));
    for payload in [&b"1"[..], b"", b"2"] {
        proxy.send(server, payload);
        let datagram = soon(socket.recv_datagram()).await.unwrap().unwrap();
        assert_eq!(
            (datagram.client, &datagram.payload[..]),
            (addr(CLIENT), payload)
        );
        socket.reply(&datagram, payload).await.unwrap();
        assert_eq!(proxy.receive().0, payload);
    }
}
