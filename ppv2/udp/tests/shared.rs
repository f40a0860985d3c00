//! Shared sockets with source networks that a machine doesn't have, in network namespaces.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};

use ppv2_lab::namespace::{enter, enter_without_rights};
use ppv2_lab::{TIMEOUT, eventually, test_name};
use ppv2_udp::{BATCH, Batch, Options, Outgoing, SendFault, Socket, SocketState, Transmit};

/// Source networks by local routes, and servers' addresses beside them.
const HOST: &str = "
    ip addr add 192.0.2.1/32 dev lo
    ip addr add 2001:db8::1/128 dev lo
    ip route add local 10.99.0.0/16 dev lo
    ip -6 route add local fd00:1::/64 dev lo";

const OPTIONS: Options = Options {
    dont_fragment: false,
    bursts: true,
};

/// Sessions in each network.
const SESSIONS: usize = 300;

fn server(ip: &str) -> UdpSocket {
    let server = UdpSocket::bind((ip, 0)).unwrap();
    server.set_read_timeout(Some(TIMEOUT)).unwrap();
    server
}

/// Sends one datagram to `to` from each of `sources`, which it has as payload.
fn send(socket: &Socket, to: SocketAddr, sources: &[IpAddr]) {
    let state = SocketState::unasked(socket.bound());
    let payloads: Vec<_> = sources.iter().map(IpAddr::to_string).collect();
    let transmit = |index: usize| {
        let outgoing = Outgoing {
            to: Some(to),
            from: Some(SocketAddr::new(sources[index], 0)),
            ..Outgoing::default()
        };
        Transmit::datagram(outgoing, payloads[index].as_bytes())
    };
    let sent = state.send_joined(socket, sources.len(), transmit, |index, fault| {
        if let SendFault::Lost { error, .. } = fault {
            panic!("from {}: {error}", sources[index]);
        }
    });
    assert_eq!(sent.datagrams, sources.len());
}

#[test]
fn any_address_of_a_source_network_is_sent_from_without_a_privilege() {
    if !enter_without_rights(test_name!(), HOST) {
        return;
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    for line in [
        "Uid:\t65534\t65534\t65534\t65534",
        "CapEff:\t0000000000000000",
        "CapPrm:\t0000000000000000",
        "CapInh:\t0000000000000000",
        "CapAmb:\t0000000000000000",
        "NoNewPrivs:\t1",
    ] {
        assert!(status.contains(line), "{line}: {status}");
    }
    let v4 = |first: [u8; 2]| {
        let ip = move |number: usize| {
            let [.., high, low] = number.to_be_bytes();
            IpAddr::from([first[0], first[1], high, low])
        };
        (1..=SESSIONS).map(ip).collect::<Vec<_>>()
    };
    let v6 = (1..=SESSIONS).map(|number| {
        let low = u16::try_from(number).unwrap();
        IpAddr::from([0xfd00, 1, 0, 0, low ^ 0xbeef, low, 0, low])
    });
    let cases = [
        ("127.0.0.1", v4([127, 70])),
        ("192.0.2.1", v4([10, 99])),
        ("2001:db8::1", v6.collect()),
    ];
    for (ip, sources) in cases {
        let socket = Socket::shared(ip.contains(':'), 0, OPTIONS).unwrap();
        let port = socket.bound().port();
        let (server, closed) = (server(ip), server(ip));
        let (to, dead) = (server.local_addr().unwrap(), closed.local_addr().unwrap());
        drop(closed);

        // As many as an ordinary receive buffer holds.
        for sources in sources.chunks(100) {
            send(&socket, to, sources);
            let mut buffer = [0; 100];
            for source in sources {
                let (len, from) = server.recv_from(&mut buffer).unwrap();
                assert_eq!(from, SocketAddr::new(*source, port));
                assert_eq!(buffer[..len], *source.to_string().as_bytes());
                server.send_to(&buffer[..len], from).unwrap();
            }
        }
        let mut batch = Batch::default();
        let mut answered = Vec::new();
        eventually("replies to all", || {
            let Ok(slots) = socket.receive(&mut batch, 0, BATCH) else {
                return answered.len() == sources.len();
            };
            for slot in 0..slots {
                let received = batch.received(slot).unwrap();
                assert_eq!(received.peer, to);
                let local = received.local.ip().to_string();
                assert_eq!(batch.payload(slot), local.as_bytes());
                answered.push(received.local.ip());
            }
            false
        });
        assert_eq!(answered, sources);

        send(&socket, dead, &sources[..1]);
        let report = socket.receive_error().unwrap();
        assert_eq!(report.error.kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!((report.from, report.to), (Some(sources[0]), dead));
    }
}

/// The one's complement sum that UDP's checksum is (RFC 768, and RFC 8200 for the addresses).
fn checksum(from: Ipv6Addr, to: Ipv6Addr, udp: &[u8]) -> u16 {
    let len = u32::try_from(udp.len()).unwrap().to_be_bytes();
    let all = [&from.octets()[..], &to.octets(), &len, &[0, 0, 0, 17], udp].concat();
    let words = all.chunks(2).map(|pair| {
        let low = pair.get(1).copied().unwrap_or(0);
        u32::from(u16::from_be_bytes([pair[0], low]))
    });
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap()
}

#[test]
fn a_filter_finds_ports_behind_extension_headers() {
    if !enter(test_name!(), HOST) {
        return;
    }
    let socket = Socket::shared(true, 0, OPTIONS).unwrap();
    let (server, to): (Ipv6Addr, Ipv6Addr) =
        ("2001:db8::1".parse().unwrap(), "fd00:1::7".parse().unwrap());
    let server = SocketAddr::new(server.into(), 5300);
    // Destination options: next UDP, no more than 8 bytes, six of padding (RFC 8200).
    let options = [17, 0, 1, 4, 0, 0, 0, 0];
    let raw = socket2::Socket::new(
        socket2::Domain::IPV6,
        socket2::Type::RAW,
        Some(socket2::Protocol::from(60)),
    )
    .unwrap();
    raw.bind(&SocketAddr::new(server.ip(), 0).into()).unwrap();
    let send_from = |port: u16| {
        let mut udp = ppv2_lab::network::unchecked(port, socket.bound().port(), b"answer");
        let IpAddr::V6(from) = server.ip() else {
            unreachable!("it is an IPv6 address")
        };
        let sum = checksum(from, to, &udp).to_be_bytes();
        udp[6..8].copy_from_slice(&sum);
        let packet = [&options[..], &udp].concat();
        raw.send_to(&packet, &SocketAddr::new(to.into(), 0).into())
            .unwrap();
    };
    let network = ("fd00:1::".parse().unwrap(), 64);
    let mut batch = Batch::default();
    for (ports, passes) in [(5300, true), (5301, false)] {
        socket.filter(&[network], Some(&[server])).unwrap();
        send_from(ports);
        let received = socket.receive(&mut batch, 0, BATCH);
        assert_eq!(received.is_ok(), passes, "port {ports}: {received:?}");
    }
    assert_eq!(batch.received(0).unwrap().peer, server);
    assert_eq!(batch.payload(0), b"answer");
}
