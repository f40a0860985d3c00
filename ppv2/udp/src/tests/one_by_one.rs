//! The portable functions, on this system.

use std::ops::ControlFlow;

use super::*;
use crate::portable;

fn bound() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    socket
}

fn receive(socket: &UdpSocket, batch: &mut Batch, wait: bool) -> io::Result<usize> {
    let bound = socket.local_addr()?;
    let (buffers, received) = batch.fill(0..batch.slots());
    portable::receive(socket.as_fd(), bound, buffers, received, wait)
}

/// Sends until the first fault. Returns how many were sent, and the index that failed.
fn send(socket: &UdpSocket, datagrams: &[(&[u8], SocketAddr)]) -> (Sent, Option<usize>) {
    let state = SocketState::unasked(socket.local_addr().unwrap());
    let transmit = |index: usize| {
        let (payload, to) = datagrams[index];
        let to = Some(to);
        Transmit::datagram(
            Outgoing {
                to,
                header: b"h",
                ..Outgoing::default()
            },
            payload,
        )
    };
    let mut failed = None;
    let mut fault = |index, _| {
        failed = Some(index);
        ControlFlow::Break(())
    };
    let (fd, count) = (socket.as_fd(), datagrams.len());
    let sent = portable::send(&state, fd, count, &transmit, &mut fault, true);
    (sent, failed)
}

#[test]
fn a_batch_is_filled_and_sent_one_by_one() {
    let (socket, peer) = (bound(), bound());
    let (address, to) = (socket.local_addr().unwrap(), peer.local_addr().unwrap());
    for datagram in [&b"a"[..], b"", b"long", b"later"] {
        peer.send_to(datagram, address).unwrap();
    }
    let mut batch = Batch::with_capacity(3, 10);
    assert_eq!(receive(&socket, &mut batch, true).unwrap(), 3);
    let payloads: Vec<_> = batch
        .datagrams(3)
        .map(|(received, range)| {
            assert_eq!((received.peer, received.local), (to, address));
            &batch.bytes()[range]
        })
        .collect();
    assert_eq!(payloads, [&b"a"[..], b"", b"long"]);

    let outgoing: [(&[u8], _); 2] = [(b"one", to), (b"two", to)];
    let (sent, failed) = send(&socket, &outgoing);
    assert_eq!((sent.datagrams, sent.bytes, failed), (2, 8, None));
    let mut buffer = [0; 8];
    for expected in [b"hone", b"htwo"] {
        let len = peer.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], expected);
    }

    assert_eq!(receive(&socket, &mut batch, true).unwrap(), 1);
    let error = receive(&socket, &mut batch, false).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn datagrams_are_sent_up_to_the_first_that_fails() {
    let (socket, peer) = (bound(), bound());
    let to = peer.local_addr().unwrap();
    let other_family: SocketAddr = "[2001:db8::1]:9".parse().unwrap();
    let outgoing: [(&[u8], _); 3] = [(b"one", to), (b"two", other_family), (b"three", to)];
    let (sent, failed) = send(&socket, &outgoing);
    assert_eq!((sent.datagrams, failed), (1, Some(1)));
    let (sent, failed) = send(&socket, &outgoing[1..]);
    assert_eq!((sent.datagrams, failed), (0, Some(0)));
}
