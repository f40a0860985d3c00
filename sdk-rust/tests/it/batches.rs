//! Batches on both kinds of socket against real ones on this host.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use ppv2_lab::TIMEOUT;
use ppv2_lab::fake_proxy::*;
use ppv2_sdk::{Batch, Demux, DropReason, Recipient, Trust, UdpSocket, Untrusted};
use ppv2_udp::{Outgoing, SocketState, Transmit};

fn server() -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind("127.0.0.1:0", loopback()).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

fn client(port: u16) -> SocketAddr {
    SocketAddr::from(([203, 0, 113, 11], port))
}

/// Sends datagrams of one length as one burst, which loopback hands on whole.
fn send_burst(proxy: &Proxy, server: SocketAddr, datagrams: &[Vec<u8>]) {
    let (state, bytes) = (SocketState::unasked(proxy.address()), datagrams.concat());
    let outgoing = Outgoing {
        to: Some(server),
        ..Outgoing::default()
    };
    let burst = Transmit::burst(outgoing, &bytes, datagrams[0].len());
    let sent = state.send(proxy.socket(), 1, |_| burst).unwrap();
    assert_eq!(sent, datagrams.len());
}

/// All that comes until `count` datagrams have, each with its client.
fn received(socket: &UdpSocket, batch: &mut Batch, count: usize) -> Vec<(SocketAddr, Vec<u8>)> {
    let mut all = Vec::new();
    while all.len() < count {
        assert!(socket.recv_batch(batch).unwrap() > 0);
        all.extend(batch.iter().map(|one| (one.client, one.payload.to_vec())));
    }
    all
}

#[test]
fn a_batch_tells_what_single_calls_tell() {
    let (socket, server) = server();
    let (one, other) = (Proxy::bind("127.0.0.1:0"), Proxy::bind("127.0.0.2:0"));
    one.send(server, &from_client_with_host(CLIENT, "example.org", b"1"));
    other.send(server, &from_client(CLIENT_V6, b""));
    one.send(server, &from_client(OTHER_CLIENT, &[7; 65_507 - 28]));

    let mut batch = Batch::default();
    assert_eq!(socket.recv_batch(&mut batch).unwrap(), 3);
    let first = batch.get(0).unwrap();
    assert_eq!(
        (first.payload, first.client),
        (b"1".as_slice(), addr(CLIENT))
    );
    assert_eq!(first.destination, Some(addr(LISTENER)));
    assert_eq!(first.proxy, Some(one.address()));
    assert_eq!(first.tlvs.authority(), Some(Ok("example.org")));
    let second = batch.get(1).unwrap();
    assert_eq!(
        (second.payload, second.client),
        (b"".as_slice(), addr(CLIENT_V6))
    );
    assert_eq!(second.reply_path.to, other.address());
    assert_eq!(batch.get(2).unwrap().payload, [7; 65_507 - 28]);
    assert_eq!(batch.get(3), None);
}

#[test]
fn a_batch_takes_no_more_than_its_slots() {
    let (socket, server) = server();
    let proxy = Proxy::bind("127.0.0.1:0");
    for number in 0..5 {
        proxy.send(server, &from_client(CLIENT, &[number]));
    }
    let mut batch = Batch::new(2);
    let mut sizes = Vec::new();
    for _ in 0..3 {
        sizes.push(socket.recv_batch(&mut batch).unwrap());
    }
    assert_eq!(sizes, [2, 2, 1]);
    assert_eq!(batch.get(0).unwrap().payload, [4]);
}

#[test]
fn hostile_datagrams_are_left_out_and_end_no_call() {
    let (socket, server) = server();
    let proxy = Proxy::bind("127.0.0.1:0");
    for bad in hostile() {
        proxy.send(server, &bad);
    }
    proxy.send(server, &from_client(CLIENT, b"good"));
    for bad in hostile() {
        proxy.send(server, &bad);
    }
    // Several calls to the kernel bring nothing but bad ones.
    let mut batch = Batch::new(4);
    assert_eq!(socket.recv_batch(&mut batch).unwrap(), 1);
    assert_eq!(batch.get(0).unwrap().payload, b"good");
    let error = {
        socket.set_nonblocking(true).unwrap();
        socket.recv_batch(&mut batch).unwrap_err()
    };
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    assert!(batch.is_empty());
    let stats = socket.stats();
    assert_eq!((stats.delivered, stats.dropped_total()), (1, 20));
}

#[test]
fn bad_datagrams_do_not_prolong_the_timeout() {
    let (socket, server) = server();
    let timeout = Duration::from_millis(200);
    socket.set_read_timeout(Some(timeout)).unwrap();
    let proxy = Proxy::bind("127.0.0.1:0");
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let trickle = thread::spawn(move || {
        while stopped.try_recv().is_err() {
            proxy.send(server, b"no header");
            thread::sleep(timeout / 10);
        }
    });
    let error = socket.recv_batch(&mut Batch::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    stop.send(()).unwrap();
    trickle.join().unwrap();
}

#[test]
fn replies_take_the_path_of_their_datagram_or_the_latest() {
    let (socket, server) = server();
    let (one, other) = (Proxy::bind("127.0.0.1:0"), Proxy::bind("127.0.0.2:0"));
    one.send(server, &from_client(CLIENT, b"1"));
    other.send(server, &from_client(CLIENT, b"2"));
    let mut batch = Batch::default();
    assert_eq!(socket.recv_batch(&mut batch).unwrap(), 2);

    let echoes: Vec<_> = batch.iter().map(|one| (one.payload, one)).collect();
    assert_eq!(socket.send_batch(&echoes).unwrap(), 2);
    assert_eq!(one.receive().0, b"1");
    assert_eq!(other.receive().0, b"2");

    let first = Recipient::from(batch.get(0).unwrap());
    let mixed = [("a", Recipient::Client(addr(CLIENT))), ("b", first)];
    assert_eq!(socket.send_batch(&mixed).unwrap(), 2);
    assert_eq!(other.receive().0, b"a");
    assert_eq!(one.receive().0, b"b");
    one.receives_nothing();
    assert_eq!(socket.stats().replies_sent, 4);
}

#[test]
fn what_can_not_be_sent_is_named_when_its_turn_comes() {
    let (socket, server) = server();
    let proxy = Proxy::bind("127.0.0.1:0");
    proxy.send(server, &from_client(CLIENT, b"x"));
    socket.recv_datagram().unwrap();

    let replies = [
        (b"1", addr(CLIENT)),
        (b"2", addr(OTHER_CLIENT)),
        (b"3", addr(CLIENT)),
    ];
    assert_eq!(socket.send_batch(&replies).unwrap(), 1);
    let error = socket.send_batch(&replies[1..]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotConnected);
    assert!(error.to_string().contains(OTHER_CLIENT), "{error}");
    assert_eq!(socket.send_batch(&replies[2..]).unwrap(), 1);
    assert_eq!(socket.send_batch(&replies[..0]).unwrap(), 0);
    assert_eq!(proxy.receive().0, b"1");
    assert_eq!(proxy.receive().0, b"3");
    assert_eq!(socket.stats().replies_without_path, 1);

    // The kernel refuses the second, whose path is of another family.
    let demux = Demux::new(loopback());
    let header = from_client(CLIENT, b"");
    let of_ipv6 = demux.receive(Instant::now(), addr("[::1]:9"), None, &header);
    let unreachable = Recipient::from(of_ipv6.unwrap());
    let client = Recipient::Client(addr(CLIENT));
    let replies = [("1", client), ("2", unreachable), ("3", client)];
    assert_eq!(socket.send_batch(&replies).unwrap(), 1);
    socket.send_batch(&replies[1..]).unwrap_err();
    assert_eq!(proxy.receive().0, b"1");
    proxy.receives_nothing();
}

/// Bursts, single datagrams, clients and proxies mixed: every datagram arrives
/// as it was sent, in order.
#[test]
fn any_mixture_is_sent_datagram_by_datagram() {
    let (socket, server) = server();
    let proxies = [Proxy::bind("127.0.0.1:0"), Proxy::bind("127.0.0.2:0")];
    let mut recipients = Vec::new();
    for (number, proxy) in proxies.iter().enumerate() {
        let client = client(1 + u16::try_from(number).unwrap());
        proxy.send(server, &from_client(&client.to_string(), b"x"));
        socket.recv_datagram().unwrap();
        recipients.push(client);
    }
    let lengths = [
        (100, 32),
        (40, 1),
        (100, 3),
        (0, 2),
        (1000, 7),
        (999, 1),
        (5, 70),
    ];
    for round in 0..20usize {
        let mut replies = Vec::new();
        for (part, (len, count)) in lengths.into_iter().enumerate() {
            for number in 0..count {
                let mark = u8::try_from((round * 31 + part * 7 + number) % 251).unwrap();
                replies.push((vec![mark; len], recipients[(round + part) % 2]));
            }
        }
        assert_eq!(socket.send_batch(&replies).unwrap(), replies.len());
        for (payload, to) in &replies {
            let proxy = &proxies[usize::from(*to == recipients[1])];
            assert_eq!(&proxy.receive().0, payload);
        }
    }
    assert_eq!(socket.stats().replies_sent, 20 * 116);
}

#[test]
fn a_coalesced_burst_is_taken_apart_client_by_client() {
    let (socket, server) = server();
    assert!(socket.enable_gro().unwrap());
    let (one, other) = (Proxy::bind("127.0.0.1:0"), Proxy::bind("127.0.0.2:0"));
    let mut burst: Vec<_> = (1..=40u16)
        .map(|port| from_client(&client(port).to_string(), &port.to_be_bytes()))
        .collect();
    // One in the midst of it is bad, and the last is shorter.
    burst[7] = vec![0; burst[0].len()];
    burst[39].pop();
    send_burst(&one, server, &burst);
    other.send(server, &from_client(CLIENT_V6, b""));

    let mut batch = Batch::new(2);
    assert_eq!(socket.recv_batch(&mut batch).unwrap(), 40);
    let mut ports = 1..=40u16;
    for datagram in batch.iter().take(39) {
        let port = ports.find(|port| *port != 8).unwrap();
        assert_eq!(datagram.client, client(port));
        let whole = port.to_be_bytes();
        let payload = if port == 40 { &whole[..1] } else { &whole };
        assert_eq!(datagram.payload, payload);
        assert_eq!(datagram.reply_path.to, one.address());
    }
    let last = batch.get(39).unwrap();
    assert_eq!(
        (last.client, last.payload),
        (addr(CLIENT_V6), b"".as_slice())
    );
    assert_eq!(socket.stats().dropped(DropReason::NoHeader), 1);
}

#[test]
fn a_burst_from_a_stranger_is_dropped_datagram_by_datagram() {
    let socket = UdpSocket::bind("127.0.0.1:0", one_address()).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    assert!(socket.enable_gro().unwrap());
    let server = socket.local_addr().unwrap();
    let forged: Vec<_> = (0..8u8).map(|n| from_client(CLIENT, &[n])).collect();
    send_burst(&Proxy::bind("127.0.0.2:0"), server, &forged);
    Proxy::bind("127.0.0.1:0").send(server, &from_client(CLIENT, b"true"));
    let mut batch = Batch::default();
    assert_eq!(
        received(&socket, &mut batch, 1),
        [(addr(CLIENT), b"true".to_vec())]
    );
    assert_eq!(socket.stats().dropped(DropReason::Untrusted), 8);
}

#[test]
fn a_burst_without_gro_arrives_datagram_by_datagram() {
    let (socket, server) = server();
    let burst: Vec<_> = (0..9u8).map(|n| from_client(CLIENT, &[n])).collect();
    send_burst(&Proxy::bind("127.0.0.1:0"), server, &burst);
    let mut batch = Batch::new(4);
    let payloads: Vec<_> = (0..9u8).map(|n| (addr(CLIENT), vec![n])).collect();
    assert_eq!(received(&socket, &mut batch, 9), payloads);
}

#[test]
fn single_calls_refuse_a_socket_whose_datagrams_arrive_in_bursts() {
    let inner = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let state = SocketState::unasked(inner.local_addr().unwrap());
    assert!(state.enable_gro(&inner).unwrap());
    let socket = UdpSocket::from_std(inner, loopback()).unwrap();
    let server = socket.local_addr().unwrap();
    let burst: Vec<_> = (0..2u8).map(|n| from_client(CLIENT, &[n])).collect();
    send_burst(&Proxy::bind("127.0.0.1:0"), server, &burst);
    let error = socket.recv_from(&mut [0; 64]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("recv_batch"), "{error}");
    socket.recv_datagram().unwrap_err();
    assert_eq!(socket.recv_batch(&mut Batch::default()).unwrap(), 2);
}

#[test]
fn both_families_share_a_batch() {
    let trust = Trust::networks(LOOPBACK).untrusted(Untrusted::Accept);
    let socket = UdpSocket::from_std(dual_stack(), trust.build().unwrap()).unwrap();
    let bound = socket.local_addr().unwrap();
    let (v4, v6) = (Proxy::bind("127.0.0.1:0"), Proxy::bind("[::1]:0"));
    let mut batch = Batch::default();
    for _ in 0..3 {
        v6.send(reached_by("::1", bound), &from_client(CLIENT_V6, b"6"));
        v4.send(reached_by("127.0.0.1", bound), &from_client(CLIENT, b"4"));
        assert_eq!(socket.recv_batch(&mut batch).unwrap(), 2);
        let echoes: Vec<_> = batch.iter().map(|one| (one.payload, one.client)).collect();
        assert_eq!(
            echoes.iter().map(|e| e.1).collect::<Vec<_>>(),
            [addr(CLIENT_V6), addr(CLIENT)]
        );
        assert_eq!(socket.send_batch(&echoes).unwrap(), 2);
        assert_eq!(
            (v6.receive().0, v4.receive().0),
            (b"6".to_vec(), b"4".to_vec())
        );
    }
}

/// A server that echoes whatever bursts come loses none and mixes none up.
#[test]
fn bursts_from_many_clients_are_echoed_to_each() {
    const ROUNDS: u16 = 50;
    let (socket, server) = server();
    assert!(socket.enable_gro().unwrap());
    let echo = thread::spawn(move || {
        let mut batch = Batch::default();
        while socket.stats().delivered < u64::from(ROUNDS) * 32 * 4 {
            socket.recv_batch(&mut batch).unwrap();
            let echoes: Vec<_> = batch.iter().map(|one| (one.payload, one)).collect();
            let mut left = &echoes[..];
            while !left.is_empty() {
                left = &left[socket.send_batch(left).unwrap()..];
            }
        }
        socket.stats()
    });
    let proxies: Vec<_> = (0..4).map(|_| Proxy::bind("127.0.0.1:0")).collect();
    for round in 0..ROUNDS {
        for (proxy, port) in proxies.iter().zip(1..) {
            let burst: Vec<_> = (0..32u16)
                .map(|n| from_client(&client(port).to_string(), &(round * 32 + n).to_be_bytes()))
                .collect();
            send_burst(proxy, server, &burst);
        }
        for proxy in &proxies {
            for n in 0..32u16 {
                assert_eq!(proxy.receive().0, (round * 32 + n).to_be_bytes());
            }
        }
    }
    assert_eq!(echo.join().unwrap().dropped_total(), 0);
}
