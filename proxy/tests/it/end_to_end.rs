//! One datagram and its reply through the real binary: what the server reads, what the
//! client gets, from which address, and what is never delivered.

use std::net::SocketAddr;

use ppv2_lab::*;
use quinn_udp::{EcnCodepoint, RecvMeta, Transmit, UdpSocketState};

/// A datagram from `client` to `target` arrives at `server` with the header
/// that it should have; the reply comes back from `target`.
fn exchange(client: &std::net::UdpSocket, target: SocketAddr, server: &std::net::UdpSocket) {
    client.send_to(b"question", target).unwrap();
    let (datagram, proxy) = receive(server);
    let (seen, destination, payload) = read_header(&datagram);
    assert_eq!(seen, client.local_addr().unwrap());
    assert_eq!(destination, target);
    assert_eq!(payload, b"question");
    server.send_to(b"answer", proxy).unwrap();
    assert_eq!(receive(client), (b"answer".to_vec(), target));
}

#[test]
fn the_server_reads_the_clients_address_over_ipv4_and_ipv6() {
    for ip in ["127.0.0.1", "::1"] {
        let server = socket(ip);
        let listener = address(ip);
        let _proxy = proxy_between(listener, server.local_addr().unwrap(), &[]);
        let client = socket(ip);
        for _ in 0..10 {
            exchange(&client, listener, &server);
        }
    }
}

#[test]
fn families_may_differ_between_client_and_server() {
    for (client_side, server_side) in [("127.0.0.1", "::1"), ("::1", "127.0.0.1")] {
        let server = socket(server_side);
        let listener = address(client_side);
        let _proxy = proxy_between(listener, server.local_addr().unwrap(), &[]);
        exchange(&socket(client_side), listener, &server);
    }
}

#[test]
fn wildcard_listener_tells_the_address_written_to_and_answers_from_it() {
    let setup = "ip addr add 198.51.100.10/32 dev lo; ip addr add 198.51.100.11/32 dev lo
                 ip addr add 2001:db8:a::10/128 dev lo nodad; ip addr add 2001:db8:a::11/128 dev lo nodad
                 ip addr add 203.0.113.11/32 dev lo; ip addr add 2001:db8:c::11/128 dev lo nodad";
    if !namespace::enter(test_name!(), setup) {
        return;
    }
    let server = socket("127.0.0.1");
    let port = port();
    let upstream = server.local_addr().unwrap().to_string();
    let (v4, v6) = (format!("0.0.0.0:{port}"), format!("[::]:{port}"));
    let _proxy = proxy(&["--listen", &v4, "--listen", &v6, "--upstream", &upstream]);
    let (client4, client6) = (socket("203.0.113.11"), socket("2001:db8:c::11"));
    for (client, ip) in [
        (&client4, "198.51.100.10"),
        (&client4, "198.51.100.11"),
        (&client4, "127.0.0.1"),
        (&client6, "2001:db8:a::10"),
        (&client6, "2001:db8:a::11"),
        (&client6, "::1"),
    ] {
        exchange(client, SocketAddr::new(ip.parse().unwrap(), port), &server);
    }
}

#[test]
fn link_local_clients_are_answered_over_their_own_link() {
    let setup = "ip link add name va type veth peer name vb; ip link set va up; ip link set vb up
                 ip addr add fe80::a/64 dev va nodad; ip addr add fe80::b/64 dev vb nodad";
    if !namespace::enter(test_name!(), setup) {
        return;
    }
    let scope = |device: &str| {
        let link = std::process::Command::new("ip")
            .args(["-o", "link", "show", "dev", device])
            .output()
            .unwrap();
        let text = String::from_utf8(link.stdout).unwrap();
        text.split(':').next().unwrap().parse::<u32>().unwrap()
    };
    let port = port();
    let server = socket("127.0.0.1");
    let upstream = server.local_addr().unwrap().to_string();
    let _proxy = proxy(&["--listen", &format!("[::]:{port}"), "--upstream", &upstream]);
    let client = bind(format!("[fe80::b%{}]:0", scope("vb")).parse().unwrap());
    let target: SocketAddr = format!("[fe80::a%{}]:{port}", scope("vb")).parse().unwrap();
    eventually("a usable link", || {
        client.send_to(b"question", target).is_ok()
    });
    let (datagram, proxy) = receive(&server);
    let (seen, destination, _) = read_header(&datagram);
    assert_eq!(
        seen.to_string(),
        format!("[fe80::b]:{}", client.local_addr().unwrap().port())
    );
    assert_eq!(destination.to_string(), format!("[fe80::a]:{port}"));
    server.send_to(b"answer", proxy).unwrap();
    let (answer, from) = receive(&client);
    assert_eq!((answer, from.ip()), (b"answer".to_vec(), target.ip()));
}

#[test]
fn plain_adds_nothing() {
    let server = socket("127.0.0.1");
    let listener = address("127.0.0.1");
    let _proxy = proxy_between(listener, server.local_addr().unwrap(), &["--mode", "plain"]);
    let client = socket("127.0.0.1");
    for payload in [
        &b"question"[..],
        b"",
        b"\r\n\r\n\0\r\nQUIT\n\x21\x12\x00\x0c",
    ] {
        client.send_to(payload, listener).unwrap();
        let (datagram, proxy) = receive(&server);
        assert_eq!(datagram, payload);
        server.send_to(payload, proxy).unwrap();
        assert_eq!(receive(&client), (payload.to_vec(), listener));
    }
}

#[test]
fn datagrams_of_any_size_pass_whole_and_what_can_not_is_counted() {
    let server = socket("127.0.0.1");
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let more = ["--admin", &admin.to_string()];
    let _proxy = proxy_between(listener, server.local_addr().unwrap(), &more);
    let client = socket("127.0.0.1");
    for len in [0, 1, 1472, 3000, 40_000, 65_507 - 28] {
        let payload: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        client.send_to(&payload, listener).unwrap();
        let (datagram, proxy) = receive(&server);
        assert!(read_header(&datagram).2 == payload, "{len}");
        server.send_to(&payload, proxy).unwrap();
        assert!(receive(&client) == (payload, listener), "{len}");
    }
    for len in [65_507 - 27, 65_507] {
        client.send_to(&vec![1; len], listener).unwrap();
    }
    client.send_to(b"behind", listener).unwrap();
    assert_eq!(read_header(&receive(&server).0).2, b"behind");
    let oversize = "ppv2_dropped_datagrams_total{listener=\"listener1\",reason=\"oversize\"}";
    assert_eq!(metric(admin, oversize), 2);
    receive_nothing(&server);
}

#[test]
fn servers_take_turns_and_each_keeps_its_mode() {
    let servers = [socket("127.0.0.1"), socket("127.0.0.1")];
    let [a, b] = [&servers[0], &servers[1]].map(|s| s.local_addr().unwrap());
    let listener = address("127.0.0.1");
    let folder = tempfile::tempdir().unwrap();
    let _proxy = proxy_with(
        &folder,
        &format!(
            "workers = 1\n[[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\n\
             [upstream.u]\nbalance = \"round_robin\"\nservers = [\"{a}\", {{ address = \"{b}\", mode = \"plain\" }}]\n"
        ),
    );
    let clients: Vec<_> = (0..6).map(|_| socket("127.0.0.1")).collect();
    for client in &clients {
        client.send_to(b"hi", listener).unwrap();
    }
    for _ in 0..3 {
        assert_eq!(read_header(&receive(&servers[0]).0).2, b"hi");
        assert_eq!(receive(&servers[1]).0, b"hi");
    }
    receive_nothing(&servers[0]);
    receive_nothing(&servers[1]);
}

#[test]
fn only_allowed_clients_are_served() {
    let server = socket("127.0.0.1");
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let more = ["--allow", "127.9.0.0/16", "--admin", &admin.to_string()];
    let _proxy = proxy_between(listener, server.local_addr().unwrap(), &more);
    socket("127.0.0.1").send_to(b"no", listener).unwrap();
    socket("127.9.9.9").send_to(b"yes", listener).unwrap();
    assert_eq!(read_header(&receive(&server).0).2, b"yes");
    receive_nothing(&server);
    let refused = "ppv2_dropped_datagrams_total{listener=\"listener1\",reason=\"not_allowed\"}";
    eventually("the drop", || metric(admin, refused) == 1);
}

#[test]
fn only_the_server_reaches_the_client_of_a_session() {
    let server = socket("127.0.0.1");
    let listener = address("127.0.0.1");
    let _proxy = proxy_between(listener, server.local_addr().unwrap(), &[]);
    let client = socket("127.0.0.1");
    client.send_to(b"question", listener).unwrap();
    let (_, session) = receive(&server);
    for ip in ["127.0.0.1", "127.0.0.2"] {
        socket(ip).send_to(b"forged", session).unwrap();
    }
    // From the server's IP and another port, as an attacker on its host could.
    receive_nothing(&client);
    server.send_to(b"true", session).unwrap();
    assert_eq!(receive(&client).0, b"true");
}

/// Has the kernel report the marks of what comes.
pub(crate) fn report_marks(socket: &std::net::UdpSocket) {
    UdpSocketState::new(socket.into()).unwrap();
}

pub(crate) fn send_marked(socket: &std::net::UdpSocket, to: SocketAddr, ecn: Option<EcnCodepoint>) {
    let state = UdpSocketState::new(socket.into()).unwrap();
    let transmit = Transmit {
        destination: to,
        ecn,
        contents: b"marked",
        segment_size: None,
        src_ip: None,
    };
    state.try_send(socket.into(), &transmit).unwrap();
}

pub(crate) fn receive_marked(socket: &std::net::UdpSocket) -> (SocketAddr, Option<EcnCodepoint>) {
    let state = UdpSocketState::new(socket.into()).unwrap();
    let mut bytes = [0; 2000];
    let mut meta = [RecvMeta::default()];
    let mut result = None;
    eventually("a datagram", || {
        let mut buffers = [std::io::IoSliceMut::new(&mut bytes)];
        let received = state.recv(socket.into(), &mut buffers, &mut meta);
        result = received.is_ok().then(|| (meta[0].addr, meta[0].ecn));
        result.is_some()
    });
    result.unwrap()
}

#[test]
fn ecn_marks_pass_in_both_directions() {
    for (ip, source) in [
        ("127.0.0.1", ""),
        ("::1", ""),
        ("127.0.0.1", "source = [\"127.64.0.0/10\"]"),
    ] {
        let server = socket(ip);
        let listener = address(ip);
        let folder = tempfile::tempdir().unwrap();
        let _proxy = proxy_with(
            &folder,
            &format!(
                "workers = 1\n[[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\n\
                 [upstream.u]\n{source}\nservers = [\"{}\"]\n",
                server.local_addr().unwrap()
            ),
        );
        let client = socket(ip);
        // Made before anything arrives, so that the kernel reports marks.
        for socket in [&server, &client] {
            report_marks(socket);
        }
        let marks = [
            Some(EcnCodepoint::Ect0),
            None,
            Some(EcnCodepoint::Ect1),
            Some(EcnCodepoint::Ce),
        ];
        for mark in marks {
            send_marked(&client, listener, mark);
            let (proxy, seen) = receive_marked(&server);
            assert_eq!(seen, mark, "to the server over {ip}");
            send_marked(&server, proxy, mark);
            assert_eq!(
                receive_marked(&client),
                (listener, mark),
                "to the client over {ip}"
            );
        }
    }
}
