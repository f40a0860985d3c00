//! Bursts over loopback.

use super::*;

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

/// A batch that holds one burst of `len` bytes in datagrams of `segment`.
fn burst(len: usize, segment: usize) -> (Batch, Vec<u8>) {
    let listener = listen("127.0.0.1:0");
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    let bytes = pattern(len);
    send_burst(&client, listener.bound(), &bytes, segment);
    let mut batch = Batch::default();
    receive(&listener, &mut batch, 1);
    let received = batch.received(0).unwrap();
    assert_eq!((received.len, received.segment), (len, segment));
    assert_eq!(received.datagrams(), len.div_ceil(segment));
    (batch, bytes)
}

#[test]
fn a_burst_leaves_as_one_message_with_a_header_on_each_datagram() {
    for (len, segment) in [(8 * 1200, 1200), (7 * 1200 + 1, 1200), (64 * 100, 100)] {
        let (batch, bytes) = burst(len, segment);
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let upstream = connect(&server);
        let header = [b'h'; 52];
        let sent = send(&upstream, &batch, &[0], |_| onward(&header), no_fault);
        let count = len.div_ceil(segment);
        assert_eq!(
            (sent.datagrams, sent.bytes),
            (count, len + count * header.len())
        );
        assert_eq!(upstream.burst_limit(), usize::MAX, "sent one by one");
        let mut datagram = vec![0; MAX_DATAGRAM];
        for expected in bytes.chunks(segment) {
            let len = server.recv(&mut datagram).unwrap();
            assert!(datagram[..len] == [&header[..], expected].concat());
        }
    }
}

#[test]
fn a_burst_that_headers_make_too_long_leaves_as_several() {
    let (batch, bytes) = burst(54 * 1200, 1200);
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket2::SockRef::from(&server)
        .set_recv_buffer_size(1 << 20)
        .unwrap();
    let upstream = connect(&server);
    let header = [b'h'; 52];
    let sent = send(&upstream, &batch, &[0], |_| onward(&header), no_fault);
    assert_eq!(sent.datagrams, 54);
    let mut datagram = vec![0; MAX_DATAGRAM];
    for expected in bytes.chunks(1200) {
        let len = server.recv(&mut datagram).unwrap();
        assert!(datagram[..len] == [&header[..], expected].concat());
    }
}

#[test]
fn a_burst_that_the_kernel_refuses_is_sent_datagram_by_datagram() {
    let (batch, bytes) = burst(4 * 1400, 1400);
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let upstream = connect(&server);
    // Bursts need checksums; with those switched off the kernel says EINVAL.
    linux::switch_checksums_off(upstream.as_fd()).unwrap();
    for _ in 0..2 {
        let sent = send(&upstream, &batch, &[0], |_| onward(b"h"), no_fault);
        assert_eq!((sent.datagrams, sent.bytes), (4, 4 * 1401));
        let mut datagram = vec![0; MAX_DATAGRAM];
        for expected in bytes.chunks(1400) {
            let len = server.recv(&mut datagram).unwrap();
            assert!(datagram[..len] == [&b"h"[..], expected].concat());
        }
    }
    assert_eq!(upstream.burst_limit(), 1400);
}

#[test]
fn waiting_bursts_keep_their_datagram_size_when_options_change() {
    let listener = listen("127.0.0.1:0");
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    let bytes = pattern(4 * 100 + 1);
    let mut batch = Batch::default();
    for bursts in [false, true, false] {
        send_burst(&client, listener.bound(), &bytes, 100);
        listener.adapt(Options { bursts, ..OPTIONS }).unwrap();
        receive(&listener, &mut batch, 1);
        let received = batch.received(0).unwrap();
        assert_eq!((received.len, received.segment), (bytes.len(), 100));
    }
}

#[test]
fn a_part_of_a_burst_is_sent_without_the_rest() {
    let (batch, bytes) = burst(7 * 100 + 1, 100);
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let upstream = connect(&server);
    let mut rest = batch.whole(0);
    let (first, next, last) = (rest.take(1), rest.take(3), rest.take(usize::MAX));
    assert_eq!(rest.datagrams(), 0);
    let lengths = [(first, 1, 100), (next, 3, 300), (last, 4, 301)];
    for (part, datagrams, len) in lengths {
        assert_eq!((part.datagrams(), batch.len_of(part)), (datagrams, len));
    }
    for (parts, header) in [(vec![first], &b"h"[..]), (vec![next, last], b"")] {
        let sent = upstream.send(
            &batch,
            parts.len(),
            |i| (parts[i], onward(header)),
            no_fault,
        );
        assert_eq!(
            sent.datagrams,
            parts.iter().map(Part::datagrams).sum::<usize>()
        );
    }
    let mut datagram = vec![0; MAX_DATAGRAM];
    for (number, expected) in bytes.chunks(100).enumerate() {
        let len = server.recv(&mut datagram).unwrap();
        let header = if number == 0 { &b"h"[..] } else { b"" };
        assert!(datagram[..len] == [header, expected].concat());
    }
}
