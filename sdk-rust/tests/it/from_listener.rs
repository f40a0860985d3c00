//! Replies that go straight to clients, from the listener's address.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket as StdSocket};

use ppv2_lab::TIMEOUT;
use ppv2_lab::fake_proxy::*;
use ppv2_lab::namespace::{enter, enter_without_rights};
use ppv2_lab::test_name;
use ppv2_sdk::{Batch, ReplyFrom, Trust, TrustBuilder, UdpSocket, Untrusted};

/// Addresses of this host that play the parts of others.
const CLIENT_HOST: &str = "127.0.1.1:0";
const ONE_LISTENER: &str = "127.0.2.1:9000";
const OTHER_LISTENER: &str = "127.0.2.2:9000";

/// The namespace's only addresses of its own: the server's and the client's.
const HOSTS: &str = "ip addr add 10.0.0.2/24 dev lo; ip addr add 203.0.113.11/24 dev lo
    ip addr add fd00:a::2/64 dev lo nodad; ip addr add 2001:db8:c::11/64 dev lo nodad";
const FOREIGN: &str = "198.51.100.10:9000";
const OTHER_FOREIGN: &str = "198.51.100.11:9001";
const FOREIGN_V6: &str = "[2001:db8:a::10]:9000";
const OTHER_FOREIGN_V6: &str = "[2001:db8:a::11]:9001";

fn from_listener(networks: &[&str]) -> TrustBuilder {
    Trust::networks(networks).reply_from(ReplyFrom::Listener)
}

fn server(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind(address, from_listener(&LOOPBACK).build().unwrap()).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    socket
}

/// Where a proxy on this host sends to reach the server.
fn reached(socket: &UdpSocket) -> SocketAddr {
    let bound = socket.local_addr().unwrap();
    if bound.ip().is_unspecified() {
        reached_by("127.0.0.1", bound)
    } else {
        bound
    }
}

/// Has `client` write to each listener, and checks that `socket` answers by every
/// call from there, and the proxy sees nothing of it.
#[track_caller]
fn answers(socket: &UdpSocket, client: &Proxy, listeners: &[&str]) {
    let through = match reached(socket) {
        SocketAddr::V4(_) => Proxy::bind("127.0.0.1:0"),
        SocketAddr::V6(_) => Proxy::bind("[::1]:0"),
    };
    for listener in listeners.iter().copied().map(addr) {
        let hello = from_client_at(client.address(), listener, b"hello");
        through.send(reached(socket), &hello);
        let datagram = socket.recv_datagram().unwrap();
        assert_eq!(datagram.client, client.address());
        assert_eq!(datagram.destination, Some(listener));

        assert_eq!(socket.send_to(b"latest", client.address()).unwrap(), 6);
        assert_eq!(client.receive(), (b"latest".to_vec(), listener));
        assert_eq!(socket.reply(&datagram, b"this").unwrap(), 4);
        assert_eq!(client.receive(), (b"this".to_vec(), listener));
        let burst = [b"1", b"2", b"3", b"4"].map(|payload| (payload, &datagram));
        assert_eq!(socket.send_batch(&burst).unwrap(), 4);
        for (payload, _) in burst {
            assert_eq!(client.receive(), (payload.to_vec(), listener));
        }
    }
    through.receives_nothing();
}

#[test]
fn answers_from_its_own_port_and_from_any_other() {
    let client = Proxy::bind(CLIENT_HOST);
    for server in [server("0.0.0.0:0"), server("127.0.0.1:0")] {
        let own_port = server.local_addr().unwrap().port();
        let own_port = format!("127.0.2.1:{own_port}");
        answers(&server, &client, &[&own_port, ONE_LISTENER, OTHER_LISTENER]);
        assert_eq!(server.stats().replies_sent, 3 * 6);
    }
}

#[test]
fn a_socket_for_both_families_answers_both() {
    let trust = from_listener(&LOOPBACK).build().unwrap();
    let socket = UdpSocket::from_std(dual_stack(), trust).unwrap();
    let bound = socket.local_addr().unwrap();
    let port = bound.port();
    let v4 = (Proxy::bind(CLIENT_HOST), format!("127.0.2.1:{port}"));
    let v6 = (Proxy::bind("[::1]:0"), format!("[::1]:{port}"));
    for (client, own_port) in [v4, v6] {
        for ip in ["127.0.0.1", "::1"] {
            let through = Proxy::bind(&SocketAddr::new(ip.parse().unwrap(), 0).to_string());
            let own_port = addr(&own_port);
            let other_port = SocketAddr::new(own_port.ip(), 9000);
            for listener in [own_port, other_port] {
                let hello = from_client_at(client.address(), listener, b"hello");
                through.send(reached_by(ip, bound), &hello);
                let datagram = socket.recv_datagram().unwrap();
                socket.reply(&datagram, b"answer").unwrap();
                assert_eq!(client.receive(), (b"answer".to_vec(), listener));
            }
        }
    }
}

#[test]
fn each_datagram_of_a_batch_is_answered_from_its_own_listener() {
    let socket = server("127.0.0.1:0");
    let through = Proxy::bind("127.0.0.1:0");
    let clients = [Proxy::bind(CLIENT_HOST), Proxy::bind(CLIENT_HOST)];
    // The latest listener of each client is the other's first.
    let listeners = [ONE_LISTENER, OTHER_LISTENER].map(addr);
    let mut wanted = Vec::new();
    for (number, client) in clients.iter().enumerate() {
        for listener in [listeners[number], listeners[1 - number]] {
            for payload in [b"a", b"b"] {
                let datagram = from_client_at(client.address(), listener, payload);
                through.send(reached(&socket), &datagram);
                wanted.push((number, payload.to_vec(), listener));
            }
        }
    }
    let mut batch = Batch::new(16);
    let mut sent = 0;
    while sent < wanted.len() {
        socket.recv_batch(&mut batch).unwrap();
        let echoes: Vec<_> = batch.iter().map(|one| (one.payload, one)).collect();
        sent += socket.send_batch(&echoes).unwrap();
    }
    for (number, payload, listener) in wanted {
        assert_eq!(clients[number].receive(), (payload, listener));
    }
    through.receives_nothing();
}

#[test]
fn those_without_a_listener_are_answered_by_the_socket() {
    let trust = from_listener(&["127.0.0.1"]).untrusted(Untrusted::Accept);
    let socket = UdpSocket::bind("127.0.0.1:0", trust.build().unwrap()).unwrap();
    let server = socket.local_addr().unwrap();
    let (direct, through) = (Proxy::bind("127.0.0.2:0"), Proxy::bind("127.0.0.1:0"));
    let mut local = [0; 16];
    let local = ppv2::Encoder::local(&mut local).unwrap().finish();
    for (peer, datagram) in [(&direct, b"direct".as_slice()), (&through, local)] {
        peer.send(server, datagram);
        let datagram = socket.recv_datagram().unwrap();
        assert_eq!(datagram.client, peer.address());
        socket.send_to(b"one", peer.address()).unwrap();
        socket.reply(&datagram, b"two").unwrap();
        assert_eq!(peer.receive(), (b"one".to_vec(), server));
        assert_eq!(peer.receive(), (b"two".to_vec(), server));
    }
}

#[test]
fn the_server_keeps_what_is_sent_to_the_listener_on_its_host() {
    let socket = server("0.0.0.0:0");
    let listener = reached_by("127.0.2.1", socket.local_addr().unwrap());
    let client = Proxy::bind(CLIENT_HOST);
    answers(&socket, &client, &[&listener.to_string()]);
    let through = Proxy::bind("127.0.0.1:0");
    through.send(
        listener,
        &from_client_at(client.address(), listener, b"still here"),
    );
    assert_eq!(&socket.recv_datagram().unwrap().payload[..], b"still here");
}

#[test]
fn several_servers_of_a_host_answer_from_one_listener() {
    let client = Proxy::bind(CLIENT_HOST);
    let servers = [server("127.0.0.1:0"), server("127.0.0.1:0")];
    for server in servers.iter().chain(&servers) {
        answers(server, &client, &[ONE_LISTENER, OTHER_LISTENER]);
    }
}

#[test]
fn a_client_that_is_gone_fails_no_later_reply() {
    let socket = server("127.0.0.1:0");
    let through = Proxy::bind("127.0.0.1:0");
    let client = Proxy::bind(CLIENT_HOST);
    let gone = Proxy::bind(CLIENT_HOST).address();
    for listener in [
        addr(ONE_LISTENER),
        reached_by("127.0.2.1", reached(&socket)),
    ] {
        for _ in 0..3 {
            for to in [gone, client.address()] {
                through.send(reached(&socket), &from_client_at(to, listener, b""));
                let datagram = socket.recv_datagram().unwrap();
                socket.reply(&datagram, b"answer").unwrap();
            }
            assert_eq!(client.receive(), (b"answer".to_vec(), listener));
        }
    }
}

#[test]
fn the_right_to_any_address_serves_ipv4() {
    if enter(test_name!(), HOSTS) {
        let client = Proxy::bind("203.0.113.11:0");
        for address in ["0.0.0.0:9000", "10.0.0.2:9000", "127.0.0.1:9001"] {
            let socket = UdpSocket::bind(
                address,
                from_listener(&["127.0.0.0/8", "10.0.0.0/8"])
                    .build()
                    .unwrap(),
            )
            .unwrap();
            answers(&socket, &client, &[FOREIGN, OTHER_FOREIGN, FOREIGN]);
        }
    }
}

#[test]
fn ipv6_needs_no_right() {
    if enter_without_rights(test_name!(), HOSTS) {
        let client = Proxy::bind("[2001:db8:c::11]:0");
        for address in ["[::1]:9000", "[::1]:9002", "127.0.0.1:9000", "0.0.0.0:9001"] {
            answers(
                &server(address),
                &client,
                &[FOREIGN_V6, OTHER_FOREIGN_V6, FOREIGN_V6],
            );
        }
    }
}

#[test]
fn an_address_of_the_host_needs_no_right() {
    let setup = format!(
        "{HOSTS}; ip addr add 198.51.100.10/32 dev lo; ip addr add 198.51.100.11/32 dev lo"
    );
    if enter_without_rights(test_name!(), &setup) {
        let client = Proxy::bind("203.0.113.11:0");
        for address in ["0.0.0.0:9000", "127.0.0.1:9002"] {
            answers(&server(address), &client, &[FOREIGN, OTHER_FOREIGN]);
        }
    }
}

#[test]
fn without_a_right_the_error_names_the_fix() {
    let setup = format!("{HOSTS}; echo 1 > /proc/sys/net/ipv4/ip_nonlocal_bind");
    if !enter_without_rights(test_name!(), &setup) {
        return;
    }
    let through = Proxy::bind("127.0.0.1:0");
    let client = Proxy::bind("203.0.113.11:0");
    for address in ["0.0.0.0:9000", "127.0.0.1:9002"] {
        let socket = server(address);
        let hello = from_client_at(client.address(), addr(FOREIGN), b"");
        through.send(reached(&socket), &hello);
        let datagram = socket.recv_datagram().unwrap();
        let program = std::env::current_exe().unwrap();
        for error in [
            socket.send_to(b"", client.address()).unwrap_err(),
            socket.reply(&datagram, b"").unwrap_err(),
            socket.send_batch(&[(b"", &datagram)]).unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::AddrNotAvailable);
            let words = error.to_string();
            for part in [
                "can't send from listener 198.51.100.10:9000: tried an address of this host (",
                "IP_TRANSPARENT (Operation not permitted",
                "run `ip addr add 198.51.100.10/32 dev lo`, or `setcap cap_net_raw+ep ",
                &format!("{}`", program.display()),
            ] {
                assert!(words.contains(part), "{words}");
            }
        }
        assert_eq!(socket.stats().replies_sent, 0);
        client.receives_nothing();
        through.receives_nothing();
    }
    low_ports_need_a_right(&client, &through);
}

fn low_ports_need_a_right(client: &Proxy, through: &Proxy) {
    let socket = server("127.0.0.1:9003");
    let low = addr("127.0.2.1:53");
    through.send(
        reached(&socket),
        &from_client_at(client.address(), low, b""),
    );
    let datagram = socket.recv_datagram().unwrap();
    let error = socket.reply(&datagram, b"").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied);
    let words = error.to_string();
    assert!(words.contains("listener 127.0.2.1:53"), "{words}");
    assert!(words.contains("ip_unprivileged_port_start=53"), "{words}");
}

#[test]
fn a_host_with_the_listener_in_use_says_so() {
    let taken = StdSocket::bind("127.0.2.3:0").unwrap();
    let listener = taken.local_addr().unwrap();
    let socket = server("127.0.0.1:0");
    let client = Proxy::bind(CLIENT_HOST);
    let through = Proxy::bind("127.0.0.1:0");
    through.send(
        reached(&socket),
        &from_client_at(client.address(), listener, b""),
    );
    let datagram = socket.recv_datagram().unwrap();
    let error = socket.reply(&datagram, b"").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddrInUse, "{error}");
}
