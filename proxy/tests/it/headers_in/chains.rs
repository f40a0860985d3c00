//! Chains of our own proxies: the server reads the client that wrote to the first of them, in
//! one header, and replies come back by all of them.

use std::net::{SocketAddr, UdpSocket};

use ppv2_lab::service::Proxy;
use ppv2_lab::*;

use super::*;

const V4: &str = "127.0.0.1";
const V6: &str = "::1";

/// Proxies one behind the other.
struct Chain {
    /// From the client's side.
    proxies: Vec<Proxy>,
    listeners: Vec<SocketAddr>,
    server: UdpSocket,
}

impl Chain {
    /// A proxy for each address but the last, which is the server's.
    fn start(ips: &[&str]) -> Self {
        Self::with(ips, "", "")
    }

    /// `keys` are those of `accept`, `of_upstreams` those of all upstreams.
    fn with(ips: &[&str], keys: &str, of_upstreams: &str) -> Self {
        let (server_ip, ips) = ips.split_last().unwrap();
        let server = socket(server_ip);
        let listeners: Vec<_> = ips.iter().map(|ip| address(ip)).collect();
        let mut proxies = Vec::new();
        for (number, listener) in listeners.iter().enumerate() {
            let next = listeners.get(number + 1).copied();
            let next = next.unwrap_or_else(|| server.local_addr().unwrap());
            let of_listener = match number {
                0 => String::new(),
                _ => accept(ips[number], keys),
            };
            proxies.push(Proxy::start(&config(
                *listener,
                next,
                &of_listener,
                of_upstreams,
            )));
        }
        Self {
            proxies,
            listeners,
            server,
        }
    }

    /// A client's datagram comes with one header, and the reply comes back.
    fn passes(&self, client: &UdpSocket, payload: &[u8]) {
        client.send_to(payload, self.listeners[0]).unwrap();
        let (datagram, session) = receive(&self.server);
        let (seen, destination, got) = read_plain_header(&datagram);
        assert_eq!(
            (seen, destination),
            (client.local_addr().unwrap(), self.listeners[0])
        );
        assert!(got == payload, "{} bytes for {}", got.len(), payload.len());
        self.server.send_to(payload, session).unwrap();
        assert!(receive(client) == (payload.to_vec(), self.listeners[0]));
    }

    fn passes_all(&self, client: &UdpSocket) {
        let header = fake_proxy::from_client(OTHER_CLIENT, b"a header of the client's");
        let big = vec![7; 40_000];
        for payload in [
            &b"question"[..],
            b"",
            &header,
            b"PROXY UNKNOWN\r\n",
            &big,
            b"last",
        ] {
            self.passes(client, payload);
        }
    }

    fn has_dropped_nothing(&self) {
        for proxy in &self.proxies {
            assert_eq!(all_dropped(proxy), []);
        }
    }
}

#[test]
fn two_proxies_of_any_families() {
    for ips in [
        [V4, V4, V4],
        [V4, V4, V6],
        [V4, V6, V4],
        [V4, V6, V6],
        [V6, V4, V4],
        [V6, V4, V6],
        [V6, V6, V4],
        [V6, V6, V6],
    ] {
        let chain = Chain::start(&ips);
        for _ in 0..3 {
            chain.passes_all(&socket(ips[0]));
        }
        chain.has_dropped_nothing();
    }
}

#[test]
fn three_proxies_of_any_families() {
    for ips in [
        [V4, V4, V4, V4],
        [V6, V6, V6, V6],
        [V4, V6, V4, V6],
        [V6, V4, V6, V4],
    ] {
        let chain = Chain::start(&ips);
        let clients = [socket(ips[0]), socket(ips[0])];
        for client in &clients {
            chain.passes_all(client);
        }
        for client in &clients {
            chain.passes(client, b"and again");
        }
        chain.has_dropped_nothing();
    }
}

/// The longest payload beside a header, and the longest reply.
#[test]
fn the_longest_datagrams_pass_a_chain_and_longer_ones_are_counted() {
    const MAX: usize = 65_507;
    let chain = Chain::start(&[V4, V4, V4, V4]);
    let client = socket(V4);
    let payload: Vec<u8> = (0..251u8).cycle().take(MAX).collect();
    let fits = &payload[..MAX - ppv2::IPV4_HEADER_LEN];
    client.send_to(fits, chain.listeners[0]).unwrap();
    let (datagram, session) = receive(&chain.server);
    assert!(read_plain_header(&datagram).2 == fits);
    chain.server.send_to(&payload, session).unwrap();
    assert!(receive(&client).0 == payload);
    client.send_to(&payload, chain.listeners[0]).unwrap();
    chain.passes(&client, b"next");
    assert_eq!(all_dropped(&chain.proxies[0]), [("oversize".to_owned(), 1)]);
    for proxy in &chain.proxies[1..] {
        assert_eq!(all_dropped(proxy), []);
    }
}

#[test]
fn three_proxies_by_checksums_and_networks() {
    // Sessions with addresses of their own are in the networks that headers come from.
    let (a, b, server) = (address(V4), address(V4), socket(V4));
    let to = server.local_addr().unwrap();
    let source = "header = { crc32c = true }\nsource = [\"127.64.0.0/10\"]";
    let second = Proxy::start(&config(b, to, &accept("127.64.0.0/10", ""), ""));
    let first = Proxy::start(&config(a, b, "", source));
    for client in [socket(V4), socket(V4)] {
        for _ in 0..2 {
            client.send_to(b"question", a).unwrap();
            let (datagram, session) = receive(&server);
            let (seen, destination, _) = read_plain_header(&datagram);
            assert_eq!((seen, destination), (client.local_addr().unwrap(), a));
            server.send_to(b"answer", session).unwrap();
            assert_eq!(receive(&client), (b"answer".to_vec(), a));
        }
    }
    for proxy in [&first, &second] {
        assert_eq!(all_dropped(proxy), []);
    }
}

#[test]
fn the_last_one_strips_the_header_in_mode_plain() {
    let (a, b, server) = (address(V4), address(V6), socket(V4));
    let to = server.local_addr().unwrap();
    let of_listener = format!("mode = \"plain\"\n{}", accept(V6, ""));
    let _second = Proxy::start(&config(b, to, &of_listener, ""));
    let _first = Proxy::start(&config(a, b, "", ""));
    let client = socket(V4);
    for payload in [&b"question"[..], b"", b"\r\n\r\n\0\r\nQUIT\n"] {
        client.send_to(payload, a).unwrap();
        let (datagram, session) = receive(&server);
        assert_eq!(datagram, payload);
        server.send_to(payload, session).unwrap();
        assert_eq!(receive(&client), (payload.to_vec(), a));
    }
}

/// Proxies with `emit = "first"`, the second and third of which remember, and the second
/// restarts.
#[test]
fn a_header_that_is_said_once_is_said_again_to_a_proxy_that_restarts() {
    // The host's kernel reports a bounded number of refusals a second, to all tests together.
    if !namespace::enter(test_name!(), "") {
        return;
    }
    let (listeners, server) = ([(); 3].map(|()| address(V4)), socket(V4));
    let [a, b, c] = listeners;
    let to = server.local_addr().unwrap();
    let first_only = "header = { emit = \"first\" }";
    let remember = accept(V4, "remember = {}");
    let of_second = config(b, c, &remember, first_only);
    let first = Proxy::start(&config(a, b, "", first_only));
    let mut second = Some(Proxy::start(&of_second));
    let third = Proxy::start(&config(c, to, &remember, ""));
    let clients = [(); 3].map(|()| socket(V4));
    let read = |datagram: &[u8]| {
        let (client, destination, payload) = read_plain_header(datagram);
        assert_eq!(destination, a);
        (client, payload)
    };
    let passes = |client: &UdpSocket, payload: &[u8]| {
        client.send_to(payload, a).unwrap();
        let (datagram, session) = receive(&server);
        assert_eq!(
            read(&datagram),
            (client.local_addr().unwrap(), payload.to_vec())
        );
        server.send_to(payload, session).unwrap();
        assert_eq!(receive(client), (payload.to_vec(), a));
    };
    let bare = "ppv2_datagrams_without_header_total";
    for is_refused in [true, false] {
        for client in &clients {
            for _ in 0..5 {
                passes(client, b"hello");
            }
        }
        for proxy in [second.as_ref().unwrap(), &third] {
            eventually("bare datagrams", || count_of(proxy, bare) > 3);
        }

        drop(second.take());
        if is_refused {
            for client in &clients {
                client.send_to(b"lost", a).unwrap();
            }
            let refusals =
                format!("ppv2_upstream_icmp_errors_total{{upstream=\"u\",server=\"{b}\"}}");
            eventually("the refusals", || first.metric(&refusals) > 0);
        }
        second = Some(Proxy::start(&of_second));
        // Where nothing was refused, the first proxy learns of it by silence.
        let short = std::time::Duration::from_millis(50);
        for client in &clients {
            client.set_read_timeout(Some(short)).unwrap();
        }
        server.set_read_timeout(Some(short)).unwrap();
        for client in &clients {
            let own = client.local_addr().unwrap();
            eventually("the header again", || {
                client.send_to(own.to_string().as_bytes(), a).unwrap();
                let mut datagram = [0; 2000];
                while let Ok((len, session)) = server.recv_from(&mut datagram) {
                    let (client, payload) = read(&datagram[..len]);
                    // Never in the name of another.
                    assert_eq!(payload, client.to_string().into_bytes());
                    server.send_to(&payload, session).unwrap();
                }
                let answer = client.recv(&mut datagram);
                answer.is_ok_and(|len| datagram[..len] == *own.to_string().as_bytes())
            });
        }
        for socket in clients.iter().chain([&server]) {
            while socket.recv(&mut [0; 2000]).is_ok() {}
            socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        }
    }
}

/// The first proxy has its replies carry a tag, and keeps one socket for all clients: the
/// second returns the tag in front of each reply, as the SDKs do.
#[test]
fn a_proxy_that_tags_gets_its_tags_back() {
    for (ip, sessions) in [(V4, true), (V4, false), (V6, false)] {
        let (a, b, server) = (address(ip), address(ip), socket(ip));
        let to = server.local_addr().unwrap();
        let second = Proxy::start(&config(b, to, &accept(ip, ""), ""));
        let keys = format!("sessions = {sessions}");
        let first = Proxy::start(&config(a, b, &keys, "replies = \"tagged\""));
        let clients: Vec<_> = (0..30).map(|_| socket(ip)).collect();
        for round in 0..3 {
            let mut asked = Vec::new();
            for client in &clients {
                client.send_to(b"question", a).unwrap();
                let (datagram, session) = receive(&server);
                // The tag stays with the first.
                let (seen, destination, payload) = read_plain_header(&datagram);
                assert_eq!((seen, destination), (client.local_addr().unwrap(), a));
                assert_eq!(payload, b"question");
                asked.push((session, format!("{seen} {round}")));
            }
            // Each client's session with the second goes on.
            fastrand::shuffle(&mut asked);
            for (session, answer) in &asked {
                server.send_to(answer.as_bytes(), *session).unwrap();
            }
            for client in &clients {
                let answer = format!("{} {round}", client.local_addr().unwrap());
                assert_eq!(receive(client), (answer.into_bytes(), a));
            }
        }
        assert_eq!(count_of(&second, "ppv2_sessions_opened_total"), 30);
        for proxy in [&first, &second] {
            assert_eq!(all_dropped(proxy), []);
        }
    }
}

/// The probes of a proxy in front say LOCAL: the servers behind answer them, or nobody does.
#[test]
fn probes_of_a_proxy_in_front_reach_a_server_or_are_counted() {
    for local in ["forward", "drop"] {
        let (a, b) = (address(V4), address(V4));
        let server = service::Server::start();
        let of_second = format!(
            "mode = \"plain\"\n{}",
            accept(V4, &format!("local = \"{local}\""))
        );
        let second = Proxy::start(&config(b, server.address, &of_second, ""));
        let probe = "health = { every = \"100ms\", timeout = \"90ms\", fall = 2, rise = 1, \
                     probe = { kind = \"udp\", send = \"alive?\" } }";
        let first = Proxy::start(&config(a, b, "", probe));
        let up = format!("ppv2_upstream_up{{upstream=\"u\",server=\"{b}\"}}");
        let probed = || count_of(&second, "ppv2_client_datagrams_total");
        if local == "forward" {
            eventually("probes", || probed() > 3);
            eventually("it to be up", || first.metric(&up) == 1);
            assert_eq!(all_dropped(&second), []);
        } else {
            eventually("it to be down", || first.metric(&up) == 0);
            assert!(dropped_by(&second, "local_header") > 0);
            assert_eq!(count_of(&second, "ppv2_sessions_opened_total"), 0);
        }
    }
}

/// What the first proxy adds to its headers reaches the server, behind what the second adds.
#[test]
fn tlvs_of_each_proxy_pass() {
    let (a, b, server) = (address(V4), address(V6), socket(V4));
    let to = server.local_addr().unwrap();
    let of_second =
        "header = { crc32c = true, tlvs = [ { type = \"0xE2\", value = \"second\" } ] }";
    let of_first = "header = { crc32c = true, authority = \"example.org\", \
                    tlvs = [ { type = \"0xE1\", value = \"first\" }, { type = \"unique_id\", from = \"session\" } ] }";
    let second = Proxy::start(&config(b, to, &accept(V6, "tlvs = \"pass\""), of_second));
    let first = Proxy::start(&config(a, b, "", of_first));
    let mut ids = std::collections::HashSet::new();
    for client in [socket(V4), socket(V4)] {
        let mut own = std::collections::HashSet::new();
        for _ in 0..3 {
            client.send_to(b"question", a).unwrap();
            let datagram = receive(&server).0;
            let (header, payload) = ppv2::decode(&datagram).unwrap();
            assert_eq!(header.client(), Some(client.local_addr().unwrap()));
            assert_eq!((header.destination(), payload), (Some(a), &b"question"[..]));
            let tlvs = header.tlvs();
            assert_eq!(tlvs.get(ppv2::TlvType(0xe1)), Some(&b"first"[..]));
            assert_eq!(tlvs.get(ppv2::TlvType(0xe2)), Some(&b"second"[..]));
            assert_eq!(tlvs.authority(), Some(Ok("example.org")));
            assert!(tlvs.crc32c().unwrap().is_ok());
            assert_eq!(tlvs.iter().count(), 5);
            own.insert(tlvs.unique_id().unwrap().to_vec());
        }
        assert_eq!(own.len(), 1);
        ids.extend(own);
    }
    assert_eq!(ids.len(), 2);
    for proxy in [&first, &second] {
        assert_eq!(all_dropped(proxy), []);
    }
}
