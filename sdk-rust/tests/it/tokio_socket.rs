//! The tokio socket against real ones on this host.

use std::future::{Future, poll_fn};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use ppv2_lab::TIMEOUT;
use ppv2_lab::fake_proxy::*;
use ppv2_sdk::tokio::UdpSocket;
use ppv2_sdk::{Batch, DropReason, ReplyFrom, Trust, Untrusted};
use tokio::io::ReadBuf;
use tokio::time::timeout;

async fn server(trust: Trust) -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind("127.0.0.1:0", trust).await.unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

/// What `future` returns, or a failed test instead of one that hangs.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(TIMEOUT, future).await.expect("to be done by now")
}

async fn echo(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = [0; 2048];
    let (len, client) = soon(socket.recv_from(&mut buffer)).await.unwrap();
    let sent = soon(socket.send_to(&buffer[..len], client)).await.unwrap();
    assert_eq!(sent, len);
    (buffer[..len].to_vec(), client)
}

#[tokio::test]
async fn shows_the_client_and_answers_through_the_proxy() {
    let (socket, server) = server(loopback()).await;
    let proxy = Proxy::bind("127.0.0.1:0");
    for client in [CLIENT, CLIENT_V6] {
        proxy.send(server, &from_client(client, b"hello"));
        assert_eq!(echo(&socket).await, (b"hello".to_vec(), addr(client)));
        assert_eq!(proxy.receive(), (b"hello".to_vec(), server));
    }
    let stats = socket.stats();
    assert_eq!((stats.delivered, stats.replies_sent), (2, 2));
}

#[tokio::test]
async fn serves_both_families_on_one_socket() {
    let trust = Trust::networks(["127.0.0.1", "::1"]).untrusted(Untrusted::Accept);
    let socket = UdpSocket::from_std(dual_stack(), trust.build().unwrap()).unwrap();
    let bound = socket.local_addr().unwrap();
    let (v4, v6) = (reached_by("127.0.0.1", bound), reached_by("::1", bound));
    let through_v4 = Proxy::bind("127.0.0.1:0");
    let through_v6 = Proxy::bind("[::1]:0");
    let direct = Proxy::bind("127.0.0.2:0");

    through_v4.send(v4, &from_client(CLIENT, b"4"));
    assert_eq!(echo(&socket).await, (b"4".to_vec(), addr(CLIENT)));
    assert_eq!(through_v4.receive().0, b"4");
    through_v6.send(v6, &from_client(CLIENT_V6, b"6"));
    assert_eq!(echo(&socket).await, (b"6".to_vec(), addr(CLIENT_V6)));
    assert_eq!(through_v6.receive().0, b"6");
    direct.send(v4, b"direct");
    assert_eq!(echo(&socket).await, (b"direct".to_vec(), direct.address()));
    assert_eq!(direct.receive().0, b"direct");
}

#[tokio::test]
async fn the_latest_proxy_gets_the_reply_and_each_its_own_by_reply() {
    let (socket, server) = server(loopback()).await;
    let first = Proxy::bind("127.0.0.1:0");
    let second = Proxy::bind("127.0.0.2:0");
    first.send(server, &from_client_with_host(CLIENT, "example.org", b"1"));
    let through_first = soon(socket.recv_datagram()).await.unwrap();
    assert_eq!(through_first.tlvs().authority(), Some(Ok("example.org")));
    assert_eq!(through_first.destination, Some(addr(LISTENER)));
    second.send(server, &from_client(CLIENT, b"2"));
    soon(socket.recv_datagram()).await.unwrap();

    socket.send_to(b"latest", addr(CLIENT)).await.unwrap();
    socket.try_send_to(b"and", addr(CLIENT)).unwrap();
    socket.reply(&through_first, b"to 1").await.unwrap();
    assert_eq!(second.receive().0, b"latest");
    assert_eq!(second.receive().0, b"and");
    assert_eq!(first.receive().0, b"to 1");
    assert_eq!(socket.stats().replies_sent, 3);
}

#[tokio::test]
async fn a_client_never_heard_can_not_be_sent_to() {
    let (socket, _) = server(loopback()).await;
    let error = socket.send_to(b"x", addr(CLIENT)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotConnected);
    let error = socket.try_send_to(b"x", addr(CLIENT)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotConnected);
    assert_eq!(socket.stats().replies_without_path, 2);
}

#[tokio::test]
async fn hostile_datagrams_neither_end_nor_confuse_a_receive_call() {
    let (socket, server) = server(one_address()).await;
    let proxy = Proxy::bind("127.0.0.1:0");
    let stranger = Proxy::bind("127.0.0.2:0");
    for (number, bad) in hostile().iter().enumerate() {
        let payload = format!("good {number}");
        proxy.send(server, bad);
        stranger.send(server, &from_client(OTHER_CLIENT, b"forged"));
        proxy.send(server, &from_client(CLIENT, payload.as_bytes()));
        assert_eq!(echo(&socket).await, (payload.into_bytes(), addr(CLIENT)));
    }
    let stats = socket.stats();
    assert_eq!((stats.delivered, stats.dropped_total()), (10, 20));
    stranger.receives_nothing();
}

#[tokio::test]
async fn buffers_are_for_the_payload_alone() {
    let (socket, server) = server(loopback()).await;
    let proxy = Proxy::bind("127.0.0.1:0");
    let mut small = [0; 2];
    for (payload, kept) in [(b"hello".as_slice(), b"he".as_slice()), (b"", b"")] {
        proxy.send(server, &from_client(CLIENT, payload));
        let (len, _) = soon(socket.recv_from(&mut small)).await.unwrap();
        assert_eq!(&small[..len], kept);
    }
    let longest = vec![7; 65_507 - 28];
    proxy.send(server, &from_client(CLIENT, &longest));
    let datagram = soon(socket.recv_datagram()).await.unwrap();
    assert_eq!(datagram.payload, longest);
}

#[tokio::test]
async fn a_cancelled_receive_loses_nothing() {
    let (socket, server) = server(loopback()).await;
    let proxy = Proxy::bind("127.0.0.1:0");
    let mut buffer = [0; 16];
    let mut received = 0;
    for number in 0..200u8 {
        // Cancelled while it waits, then with a bad and a good one queued.
        let cancelled = timeout(Duration::ZERO, socket.recv_from(&mut buffer)).await;
        received += u32::from(cancelled.is_ok());
        proxy.send(server, b"no header");
        proxy.send(server, &from_client(CLIENT, &[number]));
        let cancelled = timeout(Duration::ZERO, socket.recv_datagram()).await;
        received += u32::from(cancelled.is_ok());
    }
    while timeout(Duration::from_millis(100), socket.recv_datagram())
        .await
        .is_ok()
    {
        received += 1;
    }
    assert_eq!(received, 200);
}

#[tokio::test]
async fn try_recv_from_passes_over_what_is_dropped() {
    let (socket, server) = server(loopback()).await;
    let proxy = Proxy::bind("127.0.0.1:0");
    let mut buffer = [0; 16];
    let error = socket.try_recv_from(&mut buffer).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    soon(socket.writable()).await.unwrap();

    // More than one call passes over.
    for _ in 0..150 {
        proxy.send(server, b"no header");
    }
    proxy.send(server, &from_client(CLIENT, b"good"));
    let mut calls = 0;
    let received = loop {
        calls += 1;
        soon(socket.readable()).await.unwrap();
        match socket.try_recv_from(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            result => break result.unwrap(),
        }
    };
    assert_eq!(received, (4, addr(CLIENT)));
    assert_eq!(socket.stats().dropped(DropReason::NoHeader), 150);
    assert!(calls > 1);
}

#[tokio::test]
async fn a_flood_of_bad_datagrams_starves_no_other_task() {
    const FLOOD: u64 = 200;
    let (socket, server) = server(loopback()).await;
    let proxy = Proxy::bind("127.0.0.1:0");
    for _ in 0..FLOOD {
        proxy.send(server, b"no header");
    }
    proxy.send(server, &from_client(CLIENT, b"good"));
    soon(socket.readable()).await.unwrap();

    let mut receiving = pin!(socket.recv_datagram());
    let at_once = poll_fn(|context| Poll::Ready(receiving.as_mut().poll(context))).await;

    // It has yielded though more was queued, and goes on when its turn comes.
    assert!(at_once.is_pending());
    let dropped = || socket.stats().dropped(DropReason::NoHeader);
    assert!((1..FLOOD).contains(&dropped()), "{}", dropped());
    assert_eq!(&soon(receiving).await.unwrap().payload[..], b"good");
    assert_eq!(dropped(), FLOOD);
}

#[tokio::test]
async fn an_icmp_error_neither_fails_a_receive_nor_swallows_a_reply() {
    let proxy = Proxy::bind("127.0.0.1:0");
    let proxy_address = proxy.address();
    let raw = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    raw.connect(proxy_address).unwrap();
    let provoke = raw.try_clone().unwrap();
    let socket = UdpSocket::from_std(raw, loopback()).unwrap();
    let server = socket.local_addr().unwrap();
    proxy.send(server, &from_client(CLIENT, b"x"));
    soon(socket.recv_datagram()).await.unwrap();

    drop(proxy);
    provoke.send(b"nobody listens").unwrap();
    let waiting = timeout(Duration::from_millis(50), socket.recv_datagram()).await;
    assert!(waiting.is_err(), "{waiting:?}");

    for by_try in [false, true] {
        provoke.send(b"nobody listens").unwrap();
        let proxy = Proxy::bind(&proxy_address.to_string());
        if by_try {
            socket.try_send_to(b"reply", addr(CLIENT)).unwrap();
        } else {
            socket.send_to(b"reply", addr(CLIENT)).await.unwrap();
        }
        assert_eq!(proxy.receive().0, b"reply");
    }
}

/// Futures of the socket can be moved to another thread by `tokio::spawn`.
#[tokio::test]
async fn tasks_share_a_socket() {
    let (socket, server) = server(loopback()).await;
    let socket = Arc::new(socket);
    let tasks: Vec<_> = (0..4)
        .map(|_| {
            let socket = Arc::clone(&socket);
            tokio::spawn(async move { echo(&socket).await.1 })
        })
        .collect();
    let proxy = Proxy::bind("127.0.0.1:0");
    for port in 1..=4 {
        proxy.send(server, &from_client(&format!("203.0.113.11:{port}"), b"x"));
    }
    let mut ports = Vec::new();
    for task in tasks {
        ports.push(soon(task).await.unwrap().port());
    }
    ports.sort_unstable();
    assert_eq!(ports, [1, 2, 3, 4]);
}

#[tokio::test]
async fn batches_come_and_go_as_on_the_blocking_socket() {
    let (socket, server) = server(loopback()).await;
    let (one, other) = (Proxy::bind("127.0.0.1:0"), Proxy::bind("127.0.0.2:0"));
    let mut batch = Batch::new(16);
    let error = socket.try_recv_batch(&mut batch).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);

    for bad in hostile() {
        one.send(server, &bad);
    }
    one.send(server, &from_client(CLIENT, b"1"));
    other.send(server, &from_client(CLIENT, b"2"));
    assert_eq!(soon(socket.recv_batch(&mut batch)).await.unwrap(), 2);
    let echoes: Vec<_> = batch.iter().map(|one| (one.payload, one)).collect();
    assert_eq!(soon(socket.send_batch(&echoes)).await.unwrap(), 2);
    assert_eq!(
        (one.receive().0, other.receive().0),
        (b"1".to_vec(), b"2".to_vec())
    );

    let replies = [("3", addr(CLIENT)), ("4", addr(OTHER_CLIENT))];
    assert_eq!(socket.try_send_batch(&replies).unwrap(), 1);
    assert_eq!(other.receive().0, b"3");
    let error = soon(socket.send_batch(&replies[1..])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotConnected);

    one.send(server, b"no header");
    soon(socket.readable()).await.unwrap();
    assert_eq!(socket.try_recv_batch(&mut batch).unwrap(), 0);
    let nothing = timeout(Duration::from_millis(20), socket.recv_batch(&mut batch)).await;
    assert!(nothing.is_err() && batch.is_empty());
}

#[tokio::test]
async fn bursts_are_received_in_batches_alone() {
    let (socket, server) = server(loopback()).await;
    let coalesced = socket.enable_gro().unwrap();
    assert_eq!(coalesced, cfg!(target_os = "linux"));
    let proxy = Proxy::bind("127.0.0.1:0");
    proxy.send(server, &from_client(CLIENT, b"x"));
    let single = soon(socket.recv_from(&mut [0; 8])).await;
    assert_eq!(single.is_err(), coalesced);
    if coalesced {
        let mut batch = Batch::default();
        assert_eq!(soon(socket.recv_batch(&mut batch)).await.unwrap(), 1);
    }
}

#[tokio::test]
async fn polling_by_hand_receives_sends_and_wakes() {
    let (socket, server) = server(loopback()).await;
    let proxy = Proxy::bind("127.0.0.1:0");
    let mut bytes = [0; 4];
    let mut buffer = ReadBuf::new(&mut bytes);
    let at_once = poll_fn(|cx| Poll::Ready(socket.poll_recv_from(cx, &mut buffer))).await;
    assert!(at_once.is_pending());

    proxy.send(server, b"no header");
    proxy.send(server, &from_client(CLIENT, b"hello"));
    let client = soon(poll_fn(|cx| socket.poll_recv_from(cx, &mut buffer)))
        .await
        .unwrap();
    assert_eq!(
        (client, buffer.filled()),
        (addr(CLIENT), b"hell".as_slice())
    );

    soon(poll_fn(|cx| socket.poll_send_ready(cx)))
        .await
        .unwrap();
    let sent = soon(poll_fn(|cx| socket.poll_send_to(cx, b"reply", client))).await;
    assert_eq!(sent.unwrap(), 5);
    assert_eq!(proxy.receive().0, b"reply");
    proxy.send(server, b"x");
    soon(poll_fn(|cx| socket.poll_recv_ready(cx)))
        .await
        .unwrap();
    let unknown = poll_fn(|cx| socket.poll_send_to(cx, b"x", addr(OTHER_CLIENT))).await;
    assert_eq!(unknown.unwrap_err().kind(), ErrorKind::NotConnected);
}

#[tokio::test]
async fn replies_live_as_many_hops_as_is_set() {
    let (socket, _) = server(loopback()).await;
    socket.set_ttl(7).unwrap();
    assert_eq!(socket.ttl().unwrap(), 7);
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn answers_from_the_listener_by_every_call() {
    let trust = Trust::networks(LOOPBACK).reply_from(ReplyFrom::Listener);
    let trust = trust.build().unwrap();
    let socket = UdpSocket::bind("0.0.0.0:0", trust).await.unwrap();
    let server = reached_by("127.0.0.1", socket.local_addr().unwrap());
    let through = Proxy::bind("127.0.0.1:0");
    let client = Proxy::bind("127.0.1.1:0");
    let to = client.address();
    let listeners = [
        reached_by("127.0.2.1", server),
        addr("127.0.2.1:9100"),
        addr("127.0.2.2:9100"),
    ];
    let mut datagrams = Vec::new();
    for listener in listeners {
        through.send(server, &from_client_at(to, listener, b"hello"));
        let datagram = soon(socket.recv_datagram()).await.unwrap();
        socket.send_to(b"1", to).await.unwrap();
        socket.try_send_to(b"2", to).unwrap();
        soon(poll_fn(|cx| socket.poll_send_to(cx, b"3", to)))
            .await
            .unwrap();
        socket.reply(&datagram, b"4").await.unwrap();
        for payload in [b"1", b"2", b"3", b"4"] {
            assert_eq!(client.receive(), (payload.to_vec(), listener));
        }
        datagrams.push(datagram);
    }

    let replies: Vec<_> = datagrams
        .iter()
        .flat_map(|datagram| [(b"one", datagram), (b"two", datagram)])
        .collect();
    assert_eq!(socket.send_batch(&replies).await.unwrap(), 6);
    assert_eq!(socket.try_send_batch(&replies).unwrap(), 6);
    for listener in [listeners, listeners].concat() {
        for payload in [b"one", b"two"] {
            assert_eq!(client.receive(), (payload.to_vec(), listener));
        }
    }
    through.receives_nothing();
    assert_eq!(socket.stats().replies_sent, 24);
}

#[tokio::test]
async fn has_the_calls_that_tokios_socket_has() {
    let (socket, server) = server(loopback()).await;
    let proxy = Proxy::bind("127.0.0.1:0");
    let error = socket.try_recv_datagram().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);

    let mut text = b"> ".to_vec();
    proxy.send(server, &from_client(CLIENT, b"one"));
    let received = soon(socket.recv_buf_from(&mut text)).await.unwrap();
    assert_eq!(
        (received, text.as_slice()),
        ((3, addr(CLIENT)), b"> one".as_slice())
    );
    socket.send_to(b"by text", CLIENT).await.unwrap();
    assert_eq!(proxy.receive().0, b"by text");

    proxy.send(server, &from_client(CLIENT, b"two"));
    soon(socket.readable()).await.unwrap();
    let mut short = [0; 2];
    let received = socket.try_recv_buf_from(&mut short.as_mut_slice()).unwrap();
    assert_eq!((received.0, &short), (2, b"tw"));

    proxy.send(server, &from_client(CLIENT, b"three"));
    soon(socket.readable()).await.unwrap();
    let datagram = socket.try_recv_datagram().unwrap();
    socket.try_reply(&datagram, b"3").unwrap();
    assert_eq!(proxy.receive().0, b"3");

    let mut batch = Batch::new(4);
    let at_once = poll_fn(|cx| Poll::Ready(socket.poll_recv_batch(cx, &mut batch))).await;
    assert!(at_once.is_pending());
    proxy.send(server, b"no header");
    proxy.send(server, &from_client(CLIENT, b"four"));
    let count = soon(poll_fn(|cx| socket.poll_recv_batch(cx, &mut batch))).await;
    assert_eq!(count.unwrap(), 1);
    let mut echoes = Vec::new();
    for one in &batch {
        echoes.push((one.payload, one));
    }
    let sent = soon(poll_fn(|cx| socket.poll_send_batch(cx, &echoes))).await;
    assert_eq!(sent.unwrap(), 1);
    assert_eq!(proxy.receive().0, b"four");
}
