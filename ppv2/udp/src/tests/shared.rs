//! Sockets that many sessions share, over loopback.

use std::net::Ipv6Addr;

use super::*;

/// Sockets of both families, with addresses to send from.
fn families() -> [(Socket, [IpAddr; 2]); 2] {
    let shared = |v6| Socket::shared(v6, 0, OPTIONS).unwrap();
    let ips = |ips: [&str; 2]| ips.map(|ip| ip.parse().unwrap());
    [
        (shared(false), ips(["127.64.0.9", "127.99.255.1"])),
        (shared(true), ips(["::1", "::1"])),
    ]
}

fn server(ip: IpAddr) -> UdpSocket {
    let ip: IpAddr = if ip.is_ipv4() {
        "127.0.0.1".parse().unwrap()
    } else {
        ip
    };
    let server = UdpSocket::bind(SocketAddr::new(ip, 0)).unwrap();
    server
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    server
}

/// Sends `datagrams`, (from, to, payload). Returns the indices at which an earlier one was
/// reported; fails if one was lost.
fn send_all(socket: &Socket, datagrams: &[(IpAddr, SocketAddr, &[u8])]) -> Vec<usize> {
    let state = SocketState::unasked(socket.bound());
    let transmit = |index: usize| {
        let (from, to, payload) = datagrams[index];
        let outgoing = Outgoing {
            to: Some(to),
            from: Some(SocketAddr::new(from, 0)),
            ..Outgoing::default()
        };
        Transmit::datagram(outgoing, payload)
    };
    let mut earlier = Vec::new();
    let sent = state.send_joined(
        socket,
        datagrams.len(),
        transmit,
        |index, fault| match fault {
            SendFault::Earlier(_) => earlier.push(index),
            lost @ SendFault::Lost { .. } => panic!("{index}: {lost:?}"),
        },
    );
    assert_eq!(sent.datagrams, datagrams.len());
    earlier
}

fn assert_none(socket: &Socket) {
    let none = socket.receive_error().unwrap_err();
    assert_eq!(none.kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn a_shared_socket_sends_from_any_address_and_says_which_was_answered() {
    for (socket, ips) in families() {
        let server = server(ips[0]);
        let to = server.local_addr().unwrap();
        let mut batch = Batch::default();
        let mut datagram = [0; 100];
        for ip in ips {
            let local = SocketAddr::new(ip, socket.bound().port());
            assert!(send_all(&socket, &[(ip, to, b"question")]).is_empty());
            let (len, from) = server.recv_from(&mut datagram).unwrap();
            assert_eq!((&datagram[..len], from), (&b"question"[..], local));
            server.send_to(b"answer", from).unwrap();
            receive(&socket, &mut batch, 1);
            let received = batch.received(0).unwrap();
            assert_eq!((received.local, received.peer), (local, to));
            assert_eq!(batch.payload(0), b"answer");
        }
    }
}

#[test]
fn a_refusal_names_the_address_and_the_server_and_loses_nothing_else() {
    for (socket, ips) in families() {
        let readiness = Readiness::new().unwrap();
        readiness.register(&socket, 7).unwrap();
        let is_ready = |timeout| {
            let mut ready = Vec::new();
            readiness.wait(Some(timeout), &mut ready).unwrap();
            ready == [7]
        };
        let healthy = server(ips[0]);
        let to = healthy.local_addr().unwrap();
        let dead = SocketAddr::new(ips[0], ppv2_lab::port());
        assert!(!is_ready(Duration::ZERO));
        // Loopback delivers the ICMP error before `send` returns.
        let datagrams: [(_, _, &[u8]); 6] = [
            (ips[0], dead, b"lost"),
            (ips[1], to, b"one"),
            (ips[1], to, b"two"),
            (ips[1], dead, b"lost"),
            (ips[1], dead, b"lost"),
            (ips[0], to, b"three"),
        ];
        send_all(&socket, &datagrams);
        let mut datagram = [0; 100];
        for expected in [&b"one"[..], b"two", b"three"] {
            let len = healthy.recv(&mut datagram).unwrap();
            assert_eq!(&datagram[..len], expected);
        }
        assert!(is_ready(Duration::from_secs(10)));
        let mut reports = Vec::new();
        while let Ok(report) = socket.receive_error() {
            assert_eq!(report.error.kind(), io::ErrorKind::ConnectionRefused);
            assert_eq!((report.is_local, report.mtu), (false, None));
            reports.push((report.from.unwrap(), report.to));
        }
        // One of a burst of two: its first datagram's.
        reports.dedup();
        assert_eq!(reports, [(ips[0], dead), (ips[1], dead)][..reports.len()]);
        assert_eq!(reports.len(), if ips[0] == ips[1] { 1 } else { 2 });
        assert_none(&socket);
        assert!(!is_ready(Duration::ZERO));

        // A report that nobody took is in the way of the next send, which goes on.
        assert!(send_all(&socket, &[(ips[0], dead, b"lost")]).is_empty());
        assert_eq!(send_all(&socket, &[(ips[1], to, b"four")]), [0]);
        let len = healthy.recv(&mut datagram).unwrap();
        assert_eq!(&datagram[..len], b"four");
        assert_eq!(socket.receive_error().unwrap().from, Some(ips[0]));

        // So it is of the next receive, which then has what came.
        let from = SocketAddr::new(ips[1], socket.bound().port());
        assert!(send_all(&socket, &[(ips[0], dead, b"lost")]).is_empty());
        healthy.send_to(b"answer", from).unwrap();
        let mut batch = Batch::default();
        let refused = socket.receive(&mut batch, 0, BATCH).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        receive(&socket, &mut batch, 1);
        assert_eq!(batch.payload(0), b"answer");
    }
}

#[test]
fn what_this_host_refuses_is_reported_as_its_own() {
    for (socket, ips) in families() {
        socket
            .adapt(Options {
                dont_fragment: true,
                ..OPTIONS
            })
            .unwrap();
        let to = server(ips[0]).local_addr().unwrap();
        let state = SocketState::unasked(socket.bound());
        let outgoing = Outgoing {
            to: Some(to),
            from: Some(SocketAddr::new(ips[1], 0)),
            ..Outgoing::default()
        };
        // Within UDP's length, and beyond the interface's MTU with IP's header.
        let payload = vec![0; 65_520];
        let mut lost = Vec::new();
        let transmit = |_| Transmit::datagram(outgoing, &payload);
        state.send_joined(&socket, 1, transmit, |index, fault| match fault {
            SendFault::Lost { error, .. } => lost.push((index, error.raw_os_error())),
            SendFault::Earlier(error) => panic!("{error}"),
        });
        assert_eq!(lost, [(0, Some(libc::EMSGSIZE))]);
        let report = socket.receive_error().unwrap();
        assert!(report.is_local, "{report:?}");
        assert_eq!(report.error.raw_os_error(), Some(libc::EMSGSIZE));
        assert_eq!((report.to.ip(), report.from), (to.ip(), None));
        assert_eq!(report.mtu, Some(65_536));
    }
}

#[test]
fn a_shared_socket_takes_the_port_that_it_is_told() {
    for v6 in [false, true] {
        let free = Socket::shared(v6, 0, OPTIONS).unwrap().bound().port();
        let socket = Socket::shared(v6, free, OPTIONS).unwrap();
        assert_eq!(socket.bound().port(), free);
        let taken = Socket::shared(v6, free, OPTIONS).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
    }
}

/// A network, and servers if any: what a filter lets pass.
type Passing<'a> = ((IpAddr, u8), Option<&'a [SocketAddr]>);

#[test]
fn a_filter_passes_what_servers_send_to_the_network_alone() {
    let network = |network: &str, prefix| (network.parse::<IpAddr>().unwrap(), prefix);
    for (socket, ips) in families() {
        let servers: Vec<_> = (0..3).map(|_| server(ips[0])).collect();
        let addresses: Vec<_> = servers.iter().map(|s| s.local_addr().unwrap()).collect();
        let mut many = vec!["[2001:db8::1]:1".parse().unwrap(); 64];
        many.extend_from_slice(&addresses);
        let [ours, wide, other] = if ips[0].is_ipv4() {
            [("127.64.0.0", 10), ("0.0.0.0", 0), ("127.64.0.8", 32)]
        } else {
            [("::", 96), ("::", 0), ("0:0:0:1::", 64)]
        };
        let [ours, wide, other] = [ours, wide, other].map(|(ip, prefix)| network(ip, prefix));
        let others = (1..=61).map(|number| {
            if ips[0].is_ipv4() {
                SocketAddr::new([10, 0, 0, number].into(), 53)
            } else {
                let ip = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, number.into());
                SocketAddr::new(ip.into(), 53)
            }
        });
        let most: Vec<_> = others.chain(addresses.clone()).collect();
        let cases: [(Passing<'_>, &[usize]); 10] = [
            ((ours, None), &[0, 1, 2]),
            ((ours, Some(&addresses[..1])), &[0]),
            ((ours, Some(&addresses[1..])), &[1, 2]),
            ((wide, Some(&addresses)), &[0, 1, 2]),
            ((ours, Some(&[])), &[]),
            ((ours, Some(&most)), &[0, 1, 2]),
            // Those of the other family don't count.
            ((ours, Some(&many)), &[0, 1, 2]),
            ((ours, Some(&[addresses[2]].repeat(65))), &[0, 1, 2]),
            ((other, Some(&addresses)), &[]),
            ((other, None), &[]),
        ];
        let to = SocketAddr::new(ips[0], socket.bound().port());
        let mut batch = Batch::default();
        for (number, ((network, servers_of), expected)) in cases.into_iter().enumerate() {
            socket.filter(&[network], servers_of).unwrap();
            for server in &servers {
                server.send_to(b"answer", to).unwrap();
            }
            let mut passed = Vec::new();
            // Loopback delivers before `send_to` returns.
            if let Ok(slots) = socket.receive(&mut batch, 0, BATCH) {
                let peers = (0..slots).map(|slot| batch.received(slot).unwrap().peer);
                passed.extend(peers.map(|peer| addresses.iter().position(|a| *a == peer).unwrap()));
            }
            assert_eq!(passed, expected, "case {number}");
        }
        // One network of several is enough.
        socket
            .filter(&[other, ours], Some(&addresses[..1]))
            .unwrap();
        servers[0].send_to(b"answer", to).unwrap();
        assert_eq!(socket.receive(&mut batch, 0, BATCH).unwrap(), 1);
    }
}

#[test]
fn a_filter_looks_at_the_address_and_the_port_of_a_server() {
    let networks = [
        ("127.64.0.0".parse().unwrap(), 10),
        ("::".parse().unwrap(), 64),
    ];
    for (socket, ips) in families() {
        let to = SocketAddr::new(ips[0], socket.bound().port());
        let sender = server(ips[0]);
        let address = sender.local_addr().unwrap();
        let mut batch = Batch::default();
        let other_port = SocketAddr::new(address.ip(), address.port() ^ 1);
        // The last bytes of the second one are those of the server.
        let other_ip = if to.is_ipv4() {
            "127.0.0.2"
        } else {
            "2001:db8::1"
        };
        let other_ip = SocketAddr::new(other_ip.parse().unwrap(), address.port());
        for servers in [
            &[other_port][..],
            &[other_ip],
            &[other_ip, other_port, address],
        ] {
            socket.filter(&networks, Some(servers)).unwrap();
            sender.send_to(b"answer", to).unwrap();
            let is_passed = socket.receive(&mut batch, 0, BATCH).is_ok();
            assert_eq!(is_passed, servers.contains(&address), "{servers:?}");
        }
    }
}
