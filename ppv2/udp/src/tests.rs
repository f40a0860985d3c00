//! Sockets and batches over loopback: addresses, headers, bursts, refusals.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use crate::*;

mod adopted;
mod bursts;
mod joined;
mod one_by_one;
mod shared;

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

/// Bytes that differ from datagram to datagram and within one.
fn pattern(len: usize) -> Vec<u8> {
    let row = |n: u8| (0..=u8::MAX).map(move |byte| byte.wrapping_mul(3) ^ n);
    (0..=u8::MAX).flat_map(row).take(len).collect()
}

fn listen(address: &str) -> Socket {
    Socket::listen(address.parse().unwrap(), Binding::default(), OPTIONS).unwrap()
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

/// Sends whole slots. `outgoing` and `fault` are called with the slot.
fn send<'d>(
    socket: &Socket,
    batch: &'d Batch,
    slots: &[usize],
    outgoing: impl Fn(usize) -> Outgoing<'d>,
    mut fault: impl FnMut(usize, SendFault),
) -> Sent {
    let part = |index: usize| (batch.whole(slots[index]), outgoing(slots[index]));
    socket.send(batch, slots.len(), part, |index, reported| {
        fault(slots[index], reported);
    })
}

fn no_fault(slot: usize, fault: SendFault) {
    panic!("slot {slot}: {fault:?}");
}

#[test]
fn a_wildcard_socket_reports_the_address_sent_to_and_answers_from_it() {
    for (wildcard, addresses) in [
        ("0.0.0.0:0", vec!["127.0.0.1", "127.0.0.2", "127.77.1.9"]),
        ("[::]:0", vec!["::1"]),
    ] {
        let socket = listen(wildcard);
        let mut batch = Batch::default();
        for ip in addresses {
            let ip: IpAddr = ip.parse().unwrap();
            let target = SocketAddr::new(ip, socket.bound().port());
            let client = UdpSocket::bind(SocketAddr::new(ip, 0)).unwrap();
            client.send_to(b"question", target).unwrap();
            receive(&socket, &mut batch, 1);
            assert_eq!(batch.received(0).unwrap().local, target);

            let back = |slot| back_to_sender(&batch, slot);
            let sent = send(&socket, &batch, &[0], back, no_fault);
            assert_eq!((sent.datagrams, sent.bytes), (1, 8));
            let mut answer = [0; 100];
            let (len, from) = client.recv_from(&mut answer).unwrap();
            assert_eq!((&answer[..len], from), (&b"question"[..], target));
        }
    }
}

#[test]
fn each_slot_is_sent_with_its_own_header() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let listener = listen("127.0.0.1:0");
    let upstream = connect(&server);
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    let payloads = [&b""[..], b"one", &[7; 40_000]];
    for payload in payloads {
        client.send_to(payload, listener.bound()).unwrap();
    }
    let mut batch = Batch::default();
    receive(&listener, &mut batch, payloads.len());
    let headers = [b"a".to_vec(), Vec::new(), vec![b'h'; 64]];
    let outgoing = |slot: usize| onward(&headers[slot]);
    let sent = send(&upstream, &batch, &[0, 1, 2], outgoing, no_fault);
    assert_eq!((sent.datagrams, sent.bytes), (3, 1 + 3 + 64 + 40_000));
    let mut datagram = vec![0; MAX_DATAGRAM];
    for (header, payload) in headers.iter().zip(payloads) {
        let len = server.recv(&mut datagram).unwrap();
        assert!(datagram[..len] == [header, payload].concat());
    }
}

#[test]
fn an_oversize_datagram_is_reported_and_the_rest_is_sent() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let listener = listen("127.0.0.1:0");
    let upstream = connect(&server);
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.send_to(&[1; 65_507], listener.bound()).unwrap();
    client.send_to(b"behind it", listener.bound()).unwrap();
    let mut batch = Batch::default();
    receive(&listener, &mut batch, 2);
    assert_eq!(batch.received(0).unwrap().len, 65_507);
    let mut lost = Vec::new();
    let sent = send(
        &upstream,
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
fn an_icmp_refusal_does_not_lose_the_next_datagram() {
    let address = ppv2_lab::address("127.0.0.1");
    let upstream = Socket::connect(address, None, OPTIONS).unwrap();
    let listener = listen("127.0.0.1:0");
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.send_to(b"first", listener.bound()).unwrap();
    client.send_to(b"second", listener.bound()).unwrap();
    let mut batch = Batch::default();
    receive(&listener, &mut batch, 2);
    let sent = send(&upstream, &batch, &[0], |_| onward(&[]), no_fault);
    assert_eq!(sent.datagrams, 1);

    // Loopback delivers the ICMP error before `send` returns.
    let server = UdpSocket::bind(address).unwrap();
    let mut earlier = 0;
    let sent = send(
        &upstream,
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

#[test]
fn a_listener_on_a_broadcast_address_is_refused() {
    assert!(probe("127.0.0.1:0".parse().unwrap(), false).is_ok());
    let error = probe("127.255.255.255:0".parse().unwrap(), true).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
}

#[test]
fn a_bound_listener_can_share_its_port() {
    let listener = listen("[::]:0");
    let client = SocketAddr::new("2001:db8::77".parse().unwrap(), listener.bound().port());
    let server = "[::1]:9".parse().unwrap();
    let in_its_name = || Socket::in_name_of(client, server, false, OPTIONS);
    let error = in_its_name().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    listener.share_port().unwrap();
    in_its_name().unwrap();
}
