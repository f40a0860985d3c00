//! The blocking socket against real ones on this host.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ppv2_lab::TIMEOUT;
use ppv2_lab::fake_proxy::*;
use ppv2_sdk::{DropReason, Trust, UdpSocket, Untrusted};

fn server(trust: Trust) -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind("127.0.0.1:0", trust).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

/// Receives one datagram and answers it with its bytes.
fn echo(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = [0; 2048];
    let (len, client) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!(socket.send_to(&buffer[..len], client).unwrap(), len);
    (buffer[..len].to_vec(), client)
}

#[test]
fn shows_the_client_and_answers_through_the_proxy() {
    let (socket, server) = server(loopback());
    let proxy = Proxy::bind("127.0.0.1:0");
    for client in [CLIENT, CLIENT_V6] {
        proxy.send(server, &from_client(client, b"hello"));
        assert_eq!(echo(&socket), (b"hello".to_vec(), addr(client)));
        assert_eq!(proxy.receive(), (b"hello".to_vec(), server));
    }
    let stats = socket.stats();
    assert_eq!((stats.received, stats.delivered), (2, 2));
    assert_eq!((stats.replies_sent, stats.clients), (2, 2));
}

#[test]
fn serves_over_ipv6() {
    let socket = UdpSocket::bind("[::1]:0", loopback()).unwrap();
    let proxy = Proxy::bind("[::1]:0");
    proxy.send(socket.local_addr().unwrap(), &from_client(CLIENT, b"hello"));
    assert_eq!(echo(&socket), (b"hello".to_vec(), addr(CLIENT)));
    assert_eq!(proxy.receive().0, b"hello");
}

#[test]
fn serves_both_families_on_one_socket() {
    let trust = Trust::networks(["127.0.0.1", "::1"]).untrusted(Untrusted::Accept);
    let socket = UdpSocket::from_std(dual_stack(), trust.build().unwrap()).unwrap();
    let bound = socket.local_addr().unwrap();
    let (v4, v6) = (reached_by("127.0.0.1", bound), reached_by("::1", bound));
    let through_v4 = Proxy::bind("127.0.0.1:0");
    let through_v6 = Proxy::bind("[::1]:0");
    let direct = Proxy::bind("127.0.0.2:0");

    for client in [CLIENT, CLIENT_V6] {
        through_v4.send(v4, &from_client(client, b"4"));
        assert_eq!(echo(&socket), (b"4".to_vec(), addr(client)));
        assert_eq!(through_v4.receive().0, b"4");

        through_v6.send(v6, &from_client(client, b"6"));
        let datagram = socket.recv_datagram().unwrap();
        assert_eq!(datagram.client, addr(client));
        assert_eq!(datagram.proxy, Some(through_v6.address()));
        socket.reply(&datagram, b"six").unwrap();
        assert_eq!(through_v6.receive().0, b"six");
    }

    direct.send(v4, b"direct");
    assert_eq!(echo(&socket), (b"direct".to_vec(), direct.address()));
    assert_eq!(direct.receive().0, b"direct");
}

#[test]
fn the_latest_proxy_gets_the_reply_and_each_its_own_by_reply() {
    let (socket, server) = server(loopback());
    let first = Proxy::bind("127.0.0.1:0");
    let second = Proxy::bind("127.0.0.2:0");
    first.send(server, &from_client(CLIENT, b"1"));
    let through_first = socket.recv_datagram().unwrap();
    second.send(server, &from_client(CLIENT, b"2"));
    let through_second = socket.recv_datagram().unwrap();

    socket.send_to(b"latest", addr(CLIENT)).unwrap();
    assert_eq!(second.receive().0, b"latest");
    first.receives_nothing();

    socket.reply(&through_first, b"to 1").unwrap();
    socket.reply(&through_second, b"to 2").unwrap();
    assert_eq!(first.receive().0, b"to 1");
    assert_eq!(second.receive().0, b"to 2");

    first.send(server, &from_client(CLIENT, b"back"));
    echo(&socket);
    assert_eq!(first.receive().0, b"back");
    second.receives_nothing();
}

#[test]
fn two_clients_behind_one_address_and_two_proxies_keep_apart() {
    let (socket, server) = server(loopback());
    let one = Proxy::bind("127.0.0.1:0");
    let other = Proxy::bind("127.0.0.2:0");
    one.send(server, &from_client("203.0.113.11:1", b"a"));
    other.send(server, &from_client("203.0.113.11:2", b"b"));
    let mut buffer = [0; 16];
    for _ in 0..2 {
        socket.recv_from(&mut buffer).unwrap();
    }
    socket.send_to(b"for 2", addr("203.0.113.11:2")).unwrap();
    socket.send_to(b"for 1", addr("203.0.113.11:1")).unwrap();
    assert_eq!(one.receive().0, b"for 1");
    assert_eq!(other.receive().0, b"for 2");
}

#[test]
fn tells_all_that_the_header_says() {
    let (socket, server) = server(loopback());
    let proxy = Proxy::bind("127.0.0.1:0");
    proxy.send(
        server,
        &from_client_with_host(CLIENT, "example.org", b"hello"),
    );
    let datagram = socket.recv_datagram().unwrap();
    assert_eq!(&datagram.payload[..], b"hello");
    assert_eq!(datagram.client, addr(CLIENT));
    assert_eq!(datagram.destination, Some(addr(LISTENER)));
    assert_eq!(datagram.proxy, Some(proxy.address()));
    assert_eq!(datagram.tlvs().authority(), Some(Ok("example.org")));
}

#[test]
fn a_buffer_for_the_payload_alone_is_enough() {
    let (socket, server) = server(loopback());
    let proxy = Proxy::bind("127.0.0.1:0");
    let client = addr(CLIENT);

    proxy.send(server, &from_client(CLIENT, b"hello"));
    let mut exact = [0; 5];
    assert_eq!(socket.recv_from(&mut exact).unwrap(), (5, client));
    assert_eq!(&exact, b"hello");

    proxy.send(server, &from_client(CLIENT, b"hello"));
    let mut small = [0; 2];
    assert_eq!(socket.recv_from(&mut small).unwrap(), (2, client));
    assert_eq!(&small, b"he");

    proxy.send(server, &from_client(CLIENT, b""));
    assert_eq!(socket.recv_from(&mut small).unwrap(), (0, client));

    // The longest that IPv4 carries: 65,535 less the IP and UDP headers.
    let longest = vec![7; 65_507 - 28];
    proxy.send(server, &from_client(CLIENT, &longest));
    assert_eq!(socket.recv_datagram().unwrap().payload, longest);
}

#[test]
fn hostile_datagrams_neither_end_nor_confuse_a_receive_call() {
    let (socket, server) = server(one_address());
    let proxy = Proxy::bind("127.0.0.1:0");
    let stranger = Proxy::bind("127.0.0.2:0");
    let hostile = hostile();
    for (number, bad) in hostile.iter().enumerate() {
        let payload = format!("good {number}");
        proxy.send(server, bad);
        stranger.send(server, &from_client(OTHER_CLIENT, b"forged"));
        stranger.send(server, bad);
        proxy.send(server, &from_client(CLIENT, payload.as_bytes()));
        assert_eq!(echo(&socket), (payload.into_bytes(), addr(CLIENT)));
    }
    let stats = socket.stats();
    assert_eq!(stats.delivered, 10);
    let counts: Vec<_> = stats
        .drops()
        .map(|(reason, count)| (reason.as_str(), count))
        .collect();
    assert_eq!(
        counts,
        [
            ("untrusted", 20),
            ("direct_conflict", 0),
            ("no_header", 3),
            ("v1_header", 0),
            ("bad_header", 2),
            ("header_too_long", 0),
            ("unspecified", 1),
            ("tcp", 1),
            ("unix", 1),
            ("client_address", 2),
            ("header_alone", 0),
        ]
    );
    stranger.receives_nothing();
}

#[test]
fn direct_clients_are_served_when_they_may_be() {
    let trust = Trust::networks(["127.0.0.1"]).untrusted(Untrusted::Accept);
    let (socket, server) = server(trust.build().unwrap());
    let stranger = Proxy::bind("127.0.0.2:0");
    let proxy = Proxy::bind("127.0.0.1:0");

    let looks_like_a_header = from_client(CLIENT, b"x");
    stranger.send(server, &looks_like_a_header);
    assert_eq!(echo(&socket), (looks_like_a_header, stranger.address()));
    assert_eq!(stranger.receive().1, server);

    // The proxy vouches for this address now, so the stranger must be silent.
    let claimed = stranger.address().to_string();
    proxy.send(server, &from_client(&claimed, b"through the proxy"));
    stranger.send(server, b"direct");
    proxy.send(server, &from_client(&claimed, b"again"));
    assert_eq!(echo(&socket).0, b"through the proxy");
    assert_eq!(echo(&socket).0, b"again");
    assert_eq!(socket.stats().dropped(DropReason::DirectConflict), 1);
    assert_eq!(proxy.receive().0, b"through the proxy");
    stranger.receives_nothing();
}

#[test]
fn a_client_never_heard_or_forgotten_can_not_be_sent_to() {
    let trust = Trust::networks(LOOPBACK).forget_after(Duration::from_millis(50));
    let (socket, server) = server(trust.build().unwrap());
    let error = socket.send_to(b"x", addr(CLIENT)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotConnected);
    assert_eq!(
        error.to_string(),
        "no reply path to client 203.0.113.11:54321: nothing received from it in the last 0.05s, \
         or forgotten for newer clients, or nothing received from it in the last 10s and its \
         proxy's address has named another client since; answer sooner, or raise forget_after or \
         max_clients",
    );

    let proxy = Proxy::bind("127.0.0.1:0");
    proxy.send(server, &from_client(CLIENT, b"x"));
    let datagram = socket.recv_datagram().unwrap();
    thread::sleep(Duration::from_millis(60));
    let error = socket.send_to(b"x", addr(CLIENT)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotConnected);
    socket.reply(&datagram, b"late").unwrap();
    assert_eq!(proxy.receive().0, b"late");
    let stats = socket.stats();
    assert_eq!((stats.replies_sent, stats.replies_without_path), (1, 2));
}

/// Sends what must be dropped, every few milliseconds, until told to stop.
fn trickle(server: SocketAddr, stop: &AtomicBool) {
    let proxy = Proxy::bind("127.0.0.1:0");
    while !stop.load(Ordering::Relaxed) {
        proxy.send(server, b"no header");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_read_timeout_bounds_the_call_whatever_is_dropped() {
    let timeout = Duration::from_millis(200);
    let (socket, server) = server(loopback());
    socket.set_read_timeout(Some(timeout)).unwrap();
    assert_eq!(socket.read_timeout().unwrap(), Some(timeout));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| trickle(server, &stop));
        // Two at once: neither may prolong or shorten the other's wait.
        let calls = [0, 1].map(|_| {
            scope.spawn(|| {
                let started = Instant::now();
                let error = socket.recv_from(&mut [0; 16]).unwrap_err();
                (error.kind(), started.elapsed())
            })
        });
        let results = calls.map(|call| call.join().unwrap());
        stop.store(true, Ordering::Relaxed);
        for (kind, took) in results {
            assert_eq!(kind, ErrorKind::WouldBlock);
            // The kernel counts in ticks of its own, and the machine may be busy.
            assert!((timeout / 2..TIMEOUT).contains(&took), "{took:?}");
        }
    });
    assert!(socket.stats().dropped(DropReason::NoHeader) > 1);
}

#[test]
fn a_read_timeout_ends_a_call_amid_a_flood_without_a_gap() {
    let (socket, server) = server(loopback());
    socket
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    let stop = AtomicBool::new(false);
    let outlasted = thread::scope(|scope| {
        let flood = scope.spawn(|| {
            let proxy = Proxy::bind("127.0.0.1:0");
            let started = Instant::now();
            while !stop.load(Ordering::Relaxed) && started.elapsed() < TIMEOUT {
                proxy.send(server, b"no header");
            }
            stop.load(Ordering::Relaxed)
        });
        let single = socket.recv_from(&mut [0; 16]).unwrap_err();
        let batch = socket.recv_batch(&mut ppv2_sdk::Batch::new(4)).unwrap_err();
        stop.store(true, Ordering::Relaxed);
        assert_eq!(single.kind(), ErrorKind::WouldBlock);
        assert_eq!(batch.kind(), ErrorKind::WouldBlock);
        flood.join().unwrap()
    });
    assert!(outlasted, "a call lasted as long as the flood");
}

#[test]
fn a_good_datagram_ends_the_wait_among_dropped_ones() {
    let (socket, server) = server(loopback());
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| trickle(server, &stop));
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(100));
            Proxy::bind("127.0.0.1:0").send(server, &from_client(CLIENT, b"good"));
        });
        let received = socket.recv_datagram();
        stop.store(true, Ordering::Relaxed);
        assert_eq!(&received.unwrap().payload[..], b"good");
    });
}

#[test]
fn a_timeout_passes_when_nothing_comes_after_a_drop() {
    let timeout = Duration::from_millis(100);
    let (socket, server) = server(loopback());
    socket.set_read_timeout(Some(timeout)).unwrap();
    let proxy = Proxy::bind("127.0.0.1:0");
    proxy.send(server, b"no header");
    let started = Instant::now();
    let error = socket.recv_datagram().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    assert!(started.elapsed() >= timeout / 2);
}

#[test]
fn without_blocking_it_returns_at_once_behind_what_is_dropped() {
    let (socket, server) = server(loopback());
    socket.set_nonblocking(true).unwrap();
    let proxy = Proxy::bind("127.0.0.1:0");
    let would_block = |socket: &UdpSocket| {
        let started = Instant::now();
        let error = socket.recv_from(&mut [0; 16]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        assert!(started.elapsed() < TIMEOUT / 2);
    };
    would_block(&socket);
    for bad in hostile() {
        proxy.send(server, &bad);
    }
    would_block(&socket);
    assert_eq!(socket.stats().dropped_total(), 10);
    proxy.send(server, &from_client(CLIENT, b"x"));
    assert_eq!(echo(&socket).1, addr(CLIENT));
}

#[test]
fn replies_live_as_many_hops_as_is_set() {
    let (socket, _) = server(loopback());
    socket.set_ttl(7).unwrap();
    assert_eq!(socket.ttl().unwrap(), 7);
    assert!(socket.set_ttl(256).is_err());
}

#[test]
fn write_timeouts_are_the_sockets() {
    let (socket, _) = server(loopback());
    assert_eq!(socket.write_timeout().unwrap(), None);
    let timeout = Some(Duration::from_millis(300));
    socket.set_write_timeout(timeout).unwrap();
    assert_eq!(socket.write_timeout().unwrap(), timeout);
}

#[test]
fn an_icmp_error_neither_fails_a_receive_nor_swallows_a_reply() {
    let proxy = Proxy::bind("127.0.0.1:0");
    let proxy_address = proxy.address();
    // A connected socket is told of ICMP errors, an unconnected one is not.
    let raw = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    raw.connect(proxy_address).unwrap();
    let provoke = raw.try_clone().unwrap();
    let socket = UdpSocket::from_std(raw, loopback()).unwrap();
    let server = socket.local_addr().unwrap();
    proxy.send(server, &from_client(CLIENT, b"x"));
    socket.recv_datagram().unwrap();

    drop(proxy);
    provoke.send(b"nobody listens").unwrap();
    let timeout = Duration::from_millis(50);
    socket.set_read_timeout(Some(timeout)).unwrap();
    let error = socket.recv_from(&mut [0; 16]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);

    provoke.send(b"nobody listens").unwrap();
    let proxy = Proxy::bind(&proxy_address.to_string());
    socket.send_to(b"reply", addr(CLIENT)).unwrap();
    assert_eq!(proxy.receive().0, b"reply");
}

#[test]
fn real_errors_are_returned() {
    let (socket, server) = server(loopback());
    let proxy = Proxy::bind("127.0.0.1:0");
    proxy.send(server, &from_client(CLIENT, b"x"));
    let datagram = socket.recv_datagram().unwrap();
    // Longer than UDP can carry.
    assert!(socket.reply(&datagram, &[0; 65_536]).is_err());
    assert_eq!(socket.stats().replies_sent, 0);

    assert!(UdpSocket::bind(server, loopback()).is_err());
}

#[test]
fn threads_share_a_socket() {
    const THREADS: u16 = 4;
    const CLIENTS: u16 = 200;
    let (socket, server) = server(loopback());
    let socket = Arc::new(socket);
    let workers: Vec<_> = (0..THREADS)
        .map(|_| {
            let socket = Arc::clone(&socket);
            thread::spawn(move || while !echo(&socket).0.is_empty() {})
        })
        .collect();
    let proxy = Proxy::bind("127.0.0.1:0");
    for port in 1..=CLIENTS {
        let client = format!("203.0.113.11:{port}");
        proxy.send(server, &from_client(&client, client.as_bytes()));
        assert_eq!(proxy.receive().0, client.as_bytes());
    }
    for _ in 0..THREADS {
        proxy.send(server, &from_client(CLIENT, b""));
    }
    for worker in workers {
        worker.join().unwrap();
    }
    assert_eq!(socket.stats().delivered, u64::from(CLIENTS + THREADS));
}

#[test]
fn without_blocking_a_flood_of_bad_datagrams_does_not_hold_a_call() {
    let (socket, server) = server(loopback());
    socket.set_nonblocking(true).unwrap();
    let proxy = Proxy::bind("127.0.0.1:0");
    for _ in 0..150 {
        proxy.send(server, b"no header");
    }
    proxy.send(server, &from_client(CLIENT, b"good"));
    for dropped in [64, 128] {
        let error = socket.recv_from(&mut [0; 16]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        assert_eq!(socket.stats().dropped_total(), dropped);
    }
    assert_eq!(&socket.recv_datagram().unwrap().payload[..], b"good");

    for _ in 0..150 {
        proxy.send(server, b"no header");
    }
    proxy.send(server, &from_client(CLIENT, b"good"));
    let mut batch = ppv2_sdk::Batch::new(16);
    for dropped in [64, 128] {
        let error = socket.recv_batch(&mut batch).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        assert_eq!(socket.stats().dropped_total(), 150 + dropped);
    }
    assert_eq!(socket.recv_batch(&mut batch).unwrap(), 1);
}

#[cfg(unix)]
#[test]
fn takes_addresses_as_std_does_and_lends_its_descriptor() {
    use std::os::fd::{AsFd, AsRawFd};

    let (socket, server) = server(loopback());
    let proxy = Proxy::bind("127.0.0.1:0");
    proxy.send(server, &from_client(CLIENT, b"x"));
    socket.recv_datagram().unwrap();
    socket.send_to(b"1", CLIENT).unwrap();
    socket.send_to(b"2", ("203.0.113.11", 54321)).unwrap();
    assert_eq!(
        (proxy.receive().0, proxy.receive().0),
        (b"1".to_vec(), b"2".to_vec())
    );
    let error = socket.send_to(b"3", &[][..]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert_eq!(socket.as_fd().as_raw_fd(), socket.as_raw_fd());
}
