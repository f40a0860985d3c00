//! A server that is bound to all addresses of a host answers each proxy from the
//! address that this one wrote to.

use std::net::{IpAddr, SocketAddr, UdpSocket as StdSocket};
use std::sync::Arc;

use ppv2_lab::TIMEOUT;
use ppv2_lab::fake_proxy::*;
use ppv2_lab::namespace::enter_without_rights;
use ppv2_lab::test_name;
use ppv2_sdk::{Batch, Demux, Trust, UdpSocket};

/// The server's host, beside 127.0.0.0/8.
const HOST: &str = "ip addr add 10.0.0.2/24 dev lo; ip addr add 10.0.0.3/24 dev lo
    ip addr add fd00:a::2/64 dev lo nodad; ip addr add fd00:a::3/64 dev lo nodad";
const V4: &[&str] = &["127.7.0.2", "127.7.0.3", "10.0.0.2", "10.0.0.3"];
const V6: &[&str] = &["fd00:a::2", "fd00:a::3", "::1"];

fn trust() -> Trust {
    Trust::networks(["127.0.0.0/8", "10.0.0.0/8", "fd00:a::/64", "::1"])
        .build()
        .unwrap()
}

/// Sockets bound to all addresses, and addresses by which they are reached.
fn sockets() -> Vec<(StdSocket, Vec<&'static str>)> {
    vec![
        (StdSocket::bind("0.0.0.0:0").unwrap(), V4.to_vec()),
        (dual_stack(), [V4, V6].concat()),
    ]
}

/// A proxy for each address of the server, all of the same host.
fn proxies(addresses: &[&str], bound: SocketAddr) -> Vec<(Proxy, SocketAddr)> {
    let proxy = |ip: &&str| {
        let server = reached_by(ip, bound);
        let own = match server.ip() {
            IpAddr::V4(_) => "127.0.0.1:0",
            IpAddr::V6(_) => "[::1]:0",
        };
        (Proxy::bind(own), server)
    };
    addresses.iter().map(proxy).collect()
}

#[test]
fn replies_leave_from_the_address_that_was_written_to() {
    if !enter_without_rights(test_name!(), HOST) {
        return;
    }
    for (socket, addresses) in sockets() {
        let socket = UdpSocket::from_std(socket, trust()).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        let proxies = proxies(&addresses, socket.local_addr().unwrap());
        let client = addr(CLIENT);
        let mut kept = Vec::new();
        for (proxy, server) in &proxies {
            proxy.send(*server, &from_client(CLIENT, b"hello"));
            let datagram = socket.recv_datagram().unwrap();
            socket.send_to(b"latest", client).unwrap();
            assert_eq!(proxy.receive(), (b"latest".to_vec(), *server));
            kept.push(datagram);
        }
        for (datagram, (proxy, server)) in kept.iter().zip(&proxies) {
            socket.reply(datagram, b"this").unwrap();
            assert_eq!(proxy.receive(), (b"this".to_vec(), *server));
        }
        // A burst to each, all by one call.
        let replies: Vec<_> = kept.iter().flat_map(|one| [(b"burst", one); 3]).collect();
        assert_eq!(socket.send_batch(&replies).unwrap(), replies.len());
        for (proxy, server) in &proxies {
            for _ in 0..3 {
                assert_eq!(proxy.receive(), (b"burst".to_vec(), *server));
            }
        }
    }
}

#[test]
fn batches_are_answered_from_the_addresses_that_were_written_to() {
    if !enter_without_rights(test_name!(), HOST) {
        return;
    }
    for gro in [false, true] {
        for (socket, addresses) in sockets() {
            let socket = UdpSocket::from_std(socket, trust()).unwrap();
            assert!(!gro || socket.enable_gro().unwrap());
            let proxies = proxies(&addresses, socket.local_addr().unwrap());
            for (proxy, server) in &proxies {
                for payload in [b"1", b"2", b"3"] {
                    proxy.send(*server, &from_client(CLIENT, payload));
                }
            }
            let mut batch = Batch::default();
            let mut sent = 0;
            while sent < 3 * proxies.len() {
                socket.recv_batch(&mut batch).unwrap();
                let echoes: Vec<_> = batch.iter().map(|one| (one.payload, one)).collect();
                sent += socket.send_batch(&echoes).unwrap();
            }
            for (proxy, server) in &proxies {
                for payload in [b"1", b"2", b"3"] {
                    assert_eq!(proxy.receive(), (payload.to_vec(), *server));
                }
            }
        }
    }
}

#[test]
fn sockets_share_a_demux() {
    let demux = Arc::new(Demux::new(trust()));
    let [one, other] = [(), ()].map(|()| {
        let socket = StdSocket::bind("127.0.0.1:0").unwrap();
        UdpSocket::with_demux(socket, Arc::clone(&demux)).unwrap()
    });
    let proxy = Proxy::bind("127.0.0.1:0");
    proxy.send(one.local_addr().unwrap(), &from_client(CLIENT, b"x"));
    let mut buffer = [0; 64];
    let datagram = one.recv_ref(&mut buffer).unwrap();
    assert_eq!(
        (datagram.payload, datagram.client),
        (b"x".as_slice(), addr(CLIENT))
    );
    assert_eq!(datagram.header.len(), ppv2::IPV4_HEADER_LEN);
    other.send_to(b"1", addr(CLIENT)).unwrap();
    other.reply_to(datagram, b"2").unwrap();
    for payload in [b"1", b"2"] {
        assert_eq!(
            proxy.receive(),
            (payload.to_vec(), other.local_addr().unwrap())
        );
    }
    assert_eq!(demux.stats(), one.stats());
    assert_eq!((other.stats().received, other.stats().replies_sent), (1, 2));
}

#[cfg(feature = "tokio")]
#[test]
fn a_tokio_socket_answers_from_the_address_that_was_written_to() {
    if !enter_without_rights(test_name!(), HOST) {
        return;
    }
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let tokio = builder.enable_all().build().unwrap();
    tokio.block_on(async {
        for (socket, addresses) in sockets() {
            let socket = ppv2_sdk::tokio::UdpSocket::from_std(socket, trust()).unwrap();
            let client = addr(CLIENT);
            for (proxy, server) in proxies(&addresses, socket.local_addr().unwrap()) {
                proxy.send(server, &from_client(CLIENT, b"hello"));
                let datagram = socket.recv_datagram().await.unwrap();
                socket.send_to(b"1", client).await.unwrap();
                socket.try_send_to(b"2", client).unwrap();
                socket.reply(&datagram, b"3").await.unwrap();
                let replies = [(b"4", &datagram), (b"5", &datagram)];
                assert_eq!(socket.send_batch(&replies).await.unwrap(), 2);
                for payload in [b"1", b"2", b"3", b"4", b"5"] {
                    assert_eq!(proxy.receive(), (payload.to_vec(), server));
                }
                proxy.send(server, &from_client(CLIENT, b"hello"));
                let mut batch = Batch::new(2);
                socket.recv_batch(&mut batch).await.unwrap();
                let echo: Vec<_> = batch.iter().map(|one| (b"6", one)).collect();
                assert_eq!(socket.try_send_batch(&echo).unwrap(), 1);
                assert_eq!(proxy.receive(), (b"6".to_vec(), server));
            }
        }
    });
}
