//! Sockets and batches over loopback: addresses, headers, bursts, refusals.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use super::*;

fn receive(socket: &Socket, batch: &mut Batch, count: usize) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut have = 0;
    while have < count {
        assert!(Instant::now() < deadline, "only {have} of {count} came");
        match socket.receive(batch, have, BATCH) {
            Ok(n) => have += n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error}"),
        }
    }
}

const OPTIONS: Options = Options {
    dont_fragment: false,
    bursts: true,
};

fn listen(address: &str) -> Socket {
    Socket::listen(address.parse().unwrap(), false, OPTIONS).unwrap()
}

fn connect(server: &UdpSocket) -> Socket {
    Socket::connect(server.local_addr().unwrap(), None, OPTIONS).unwrap()
}

fn back_to_sender(batch: &Batch, slot: usize) -> Outgoing<'static> {
    let received = batch.received(slot).unwrap();
    Outgoing {
        to: Some(received.peer),
        from: Some(received.local),
        ..onward(&[])
    }
}

fn onward(header: &[u8]) -> Outgoing<'_> {
    Outgoing {
        to: None,
        from: None,
        class: TrafficClass::default(),
        header,
    }
}

fn no_fault(slot: usize, fault: SendFault) {
    panic!("slot {slot}: {fault:?}");
}

#[test]
fn a_wildcard_socket_knows_the_address_written_to_and_answers_from_it() {
    for (wildcard, addresses) in [
        ("0.0.0.0:0", vec!["127.0.0.1", "127.0.0.2", "127.77.1.9"]),
        ("[::]:0", vec!["::1"]),
    ] {
        let socket = listen(wildcard);
        let mut batch = Batch::new();
        for ip in addresses {
            let ip: IpAddr = ip.parse().unwrap();
            let target = SocketAddr::new(ip, socket.bound().port());
            let client = UdpSocket::bind(SocketAddr::new(ip, 0)).unwrap();
            client.send_to(b"question", target).unwrap();
            receive(&socket, &mut batch, 1);
            assert_eq!(batch.received(0).unwrap().local, target);

            let back = |slot| back_to_sender(&batch, slot);
            let sent = socket.send(&batch, &[0], back, no_fault);
            assert_eq!((sent.datagrams, sent.bytes), (1, 8));
            let mut answer = [0; 100];
            let (len, from) = client.recv_from(&mut answer).unwrap();
            assert_eq!((&answer[..len], from), (&b"question"[..], target));
        }
    }
}

#[test]
fn a_header_is_sent_in_front_of_the_payload_of_its_own_slot() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let listener = listen("127.0.0.1:0");
    let upstream = connect(&server);
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    let payloads = [&b""[..], b"one", &[7; 40_000]];
    for payload in payloads {
        client.send_to(payload, listener.bound()).unwrap();
    }
    let mut batch = Batch::new();
    receive(&listener, &mut batch, payloads.len());
    let headers = [b"a".to_vec(), Vec::new(), vec![b'h'; MAX_HEADER]];
    let outgoing = |slot: usize| onward(&headers[slot]);
    let sent = upstream.send(&batch, &[0, 1, 2], outgoing, no_fault);
    assert_eq!((sent.datagrams, sent.bytes), (3, 1 + 3 + 64 + 40_000));
    let mut datagram = vec![0; CAPACITY];
    for (header, payload) in headers.iter().zip(payloads) {
        let len = server.recv(&mut datagram).unwrap();
        assert!(datagram[..len] == [header, payload].concat());
    }
}

#[test]
fn what_does_not_fit_is_reported_and_the_rest_is_sent() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let listener = listen("127.0.0.1:0");
    let upstream = connect(&server);
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.send_to(&[1; 65_507], listener.bound()).unwrap();
    client.send_to(b"behind it", listener.bound()).unwrap();
    let mut batch = Batch::new();
    receive(&listener, &mut batch, 2);
    assert_eq!(batch.received(0).unwrap().len, 65_507);
    let mut lost = Vec::new();
    let sent = upstream.send(
        &batch,
        &[0, 1],
        |slot| onward(if slot == 0 { &[0; 28] } else { &[] }),
        |slot, fault| match fault {
            SendFault::Lost {
                error,
                datagrams,
                len,
            } => lost.push((slot, error.raw_os_error(), datagrams, len)),
            SendFault::Earlier(error) => panic!("{error}"),
        },
    );
    assert_eq!((sent.datagrams, sent.bytes), (1, 9));
    assert_eq!(lost, [(0, Some(libc::EMSGSIZE), 1, 65_507 + 28)]);
    let mut datagram = [0; 100];
    let len = server.recv(&mut datagram).unwrap();
    assert_eq!(&datagram[..len], b"behind it");
}

#[test]
fn a_refusal_neither_loses_the_next_datagram_nor_shows_up_as_one() {
    let closed = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = closed.local_addr().unwrap();
    drop(closed);
    let upstream = Socket::connect(address, None, OPTIONS).unwrap();
    let listener = listen("127.0.0.1:0");
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.send_to(b"first", listener.bound()).unwrap();
    client.send_to(b"second", listener.bound()).unwrap();
    let mut batch = Batch::new();
    receive(&listener, &mut batch, 2);
    let sent = upstream.send(&batch, &[0], |_| onward(&[]), no_fault);
    assert_eq!(sent.datagrams, 1);

    // Loopback delivers the ICMP error before `send` returns.
    let server = UdpSocket::bind(address).unwrap();
    let mut earlier = 0;
    let sent = upstream.send(
        &batch,
        &[1],
        |_| onward(&[]),
        |_, fault| match fault {
            SendFault::Earlier(_) => earlier += 1,
            lost @ SendFault::Lost { .. } => panic!("{lost:?}"),
        },
    );
    assert_eq!((sent.datagrams, earlier), (1, 1));
    let mut datagram = [0; 100];
    let len = server.recv(&mut datagram).unwrap();
    assert_eq!(&datagram[..len], b"second");
    let nothing = upstream.receive(&mut batch, 0, BATCH).unwrap_err();
    assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
}

/// Sends `bytes` as a burst of datagrams of `segment` bytes each.
fn send_burst(socket: &UdpSocket, to: SocketAddr, bytes: &[u8], segment: usize) {
    let state = quinn_udp::UdpSocketState::new(socket.into()).unwrap();
    let transmit = quinn_udp::Transmit {
        destination: to,
        ecn: None,
        contents: bytes,
        segment_size: Some(segment),
        src_ip: None,
    };
    state.try_send(socket.into(), &transmit).unwrap();
}

/// Bytes that differ from datagram to datagram and within one.
fn pattern(len: usize) -> Vec<u8> {
    let row = |n: u8| (0..=u8::MAX).map(move |byte| byte.wrapping_mul(3) ^ n);
    (0..=u8::MAX).flat_map(row).take(len).collect()
}

/// A batch that holds one burst of `len` bytes in datagrams of `segment`.
fn burst(len: usize, segment: usize) -> (Batch, Vec<u8>) {
    let listener = listen("127.0.0.1:0");
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    let bytes = pattern(len);
    send_burst(&client, listener.bound(), &bytes, segment);
    let mut batch = Batch::new();
    receive(&listener, &mut batch, 1);
    let received = batch.received(0).unwrap();
    assert_eq!((received.len, received.segment), (len, segment));
    assert_eq!(received.datagrams(), len.div_ceil(segment));
    (batch, bytes)
}

#[test]
fn a_burst_leaves_as_one_with_a_header_on_each_datagram() {
    for (len, segment) in [(8 * 1200, 1200), (7 * 1200 + 1, 1200), (64 * 100, 100)] {
        let (batch, bytes) = burst(len, segment);
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let upstream = connect(&server);
        let header = [b'h'; 52];
        let sent = upstream.send(&batch, &[0], |_| onward(&header), no_fault);
        let count = len.div_ceil(segment);
        assert_eq!(
            (sent.datagrams, sent.bytes),
            (count, len + count * header.len())
        );
        assert_eq!(upstream.burst_limit.get(), usize::MAX, "sent one by one");
        let mut datagram = vec![0; CAPACITY];
        for expected in bytes.chunks(segment) {
            let len = server.recv(&mut datagram).unwrap();
            assert!(datagram[..len] == [&header[..], expected].concat());
        }
    }
}

#[test]
fn a_burst_that_grows_too_long_by_its_headers_leaves_as_several() {
    let (batch, bytes) = burst(54 * 1200, 1200);
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket2::SockRef::from(&server)
        .set_recv_buffer_size(1 << 20)
        .unwrap();
    let upstream = connect(&server);
    let header = [b'h'; 52];
    let sent = upstream.send(&batch, &[0], |_| onward(&header), no_fault);
    assert_eq!(sent.datagrams, 54);
    let mut datagram = vec![0; CAPACITY];
    for expected in bytes.chunks(1200) {
        let len = server.recv(&mut datagram).unwrap();
        assert!(datagram[..len] == [&header[..], expected].concat());
    }
}

#[test]
fn a_burst_that_the_kernel_refuses_goes_datagram_by_datagram() {
    let (batch, bytes) = burst(4 * 1400, 1400);
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let upstream = connect(&server);
    // Bursts need checksums; with those switched off the kernel says EINVAL.
    sys::switch_checksums_off(&upstream.inner).unwrap();
    for _ in 0..2 {
        let sent = upstream.send(&batch, &[0], |_| onward(b"h"), no_fault);
        assert_eq!((sent.datagrams, sent.bytes), (4, 4 * 1401));
        let mut datagram = vec![0; CAPACITY];
        for expected in bytes.chunks(1400) {
            let len = server.recv(&mut datagram).unwrap();
            assert!(datagram[..len] == [&b"h"[..], expected].concat());
        }
    }
    assert_eq!(upstream.burst_limit.get(), 1400);
}

#[test]
fn a_broadcast_address_is_none_to_listen_on() {
    assert!(probe("127.0.0.1:0".parse().unwrap()).is_ok());
    let error = probe("127.255.255.255:0".parse().unwrap()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
}

#[test]
fn loopback_is_among_the_hosts_own_addresses() {
    let own = own_addresses().unwrap();
    assert!(own.contains(&"127.0.0.1".parse().unwrap()), "{own:?}");
}
