//! `header.format = "spp"`: each datagram to the server begins with the Simple Proxy Protocol
//! header, and so must each reply; it goes to the client without.

use std::net::{SocketAddr, UdpSocket};

use ppv2::spp::{self, SppHeader};
use ppv2_lab::service::Proxy;
use ppv2_lab::*;

struct Setup {
    proxy: Proxy,
    listener: SocketAddr,
    server: UdpSocket,
}

impl Setup {
    fn start(listener: &str, server: &str, of_listener: &str, of_upstream: &str) -> Self {
        let (listener, server) = (address(listener), socket(server));
        let config = format!(
            "[[listener]]\nname = \"l\"\nbind = [\"{listener}\"]\nupstream = \"u\"\n{of_listener}\n\
             [upstream.u]\nservers = [\"{}\"]\nheader = {{ format = \"spp\" }}\n{of_upstream}\n",
            server.local_addr().unwrap()
        );
        Self {
            proxy: Proxy::start(&config),
            listener,
            server,
        }
    }

    /// What the header of a client's datagram must say.
    fn expected(&self, client: &UdpSocket) -> SppHeader {
        SppHeader {
            client: client.local_addr().unwrap(),
            proxy: self.listener,
        }
    }

    /// That this payload of the client comes to the server. Returns the header, and the
    /// address that the datagram came from.
    #[track_caller]
    fn arrives(&self, client: &UdpSocket, payload: &[u8]) -> (SppHeader, SocketAddr) {
        let (datagram, session) = receive(&self.server);
        let (header, rest) = spp::decode(&datagram).unwrap();
        assert_eq!(header, self.expected(client));
        assert_eq!(rest, payload);
        (header, session)
    }

    #[track_caller]
    fn asks(&self, client: &UdpSocket) -> (SppHeader, SocketAddr) {
        client.send_to(b"question", self.listener).unwrap();
        self.arrives(client, b"question")
    }

    fn answers(&self, header: &[u8], payload: &[u8], to: SocketAddr) {
        self.server
            .send_to(&[header, payload].concat(), to)
            .unwrap();
    }

    fn dropped(&self, reason: &str) -> u64 {
        let labels = format!("{{listener=\"l\",reason=\"{reason}\"}}");
        self.proxy
            .metric(&format!("ppv2_dropped_datagrams_total{labels}"))
    }
}

const NETWORK: &str = "source = [\"127.64.0.0/10\"]";

#[test]
fn each_datagram_has_it_and_replies_pass_without() {
    for (listener, server, of_upstream) in [
        ("127.0.0.1", "127.0.0.1", ""),
        ("::1", "::1", ""),
        ("::1", "127.0.0.1", ""),
        ("127.0.0.1", "::1", ""),
        ("127.0.0.1", "127.0.0.1", NETWORK),
    ] {
        let setup = Setup::start(listener, server, "", of_upstream);
        let clients: Vec<_> = (0..5).map(|_| socket(listener)).collect();
        for round in 0..3 {
            // The answers come when all have asked.
            let asked: Vec<_> = clients.iter().map(|client| setup.asks(client)).collect();
            for (number, (header, session)) in asked.iter().enumerate() {
                let answer = format!("answer {round} to {number}");
                setup.answers(&header.to_bytes(), answer.as_bytes(), *session);
            }
            for (number, client) in clients.iter().enumerate() {
                let answer = format!("answer {round} to {number}");
                assert_eq!(receive(client), (answer.into_bytes(), setup.listener));
            }
        }
        // Without payload, in both directions.
        clients[0].send_to(b"", setup.listener).unwrap();
        let (header, session) = setup.arrives(&clients[0], b"");
        setup.answers(&header.to_bytes(), b"", session);
        assert_eq!(receive(&clients[0]), (Vec::new(), setup.listener));
    }
}

#[test]
fn bursts_have_it_on_each_datagram_in_both_directions() {
    for of_upstream in ["", NETWORK] {
        let setup = Setup::start("127.0.0.1", "127.0.0.1", "", of_upstream);
        let client = socket("127.0.0.1");
        // The longest too, and a payload that looks like a header.
        let forged = setup.expected(&socket("127.0.0.1")).to_bytes();
        let payload = |number: u8| match number {
            0 => vec![7; 65_507 - spp::SPP_HEADER_LEN],
            1 => forged.to_vec(),
            _ => vec![number; 200],
        };
        for number in 0..100 {
            client.send_to(&payload(number), setup.listener).unwrap();
        }
        let mut session = None;
        for number in 0..100 {
            let (header, from) = setup.arrives(&client, &payload(number));
            session = Some((header.to_bytes(), from));
        }
        let (header, session) = session.unwrap();
        for number in 0..100 {
            setup.answers(&header, &payload(number), session);
        }
        for number in 0..100 {
            assert!(receive(&client).0 == payload(number), "{number}");
        }
    }
}

#[test]
fn replies_without_it_or_for_another_client_are_dropped_and_counted() {
    for of_upstream in ["", NETWORK] {
        let setup = Setup::start("127.0.0.1", "127.0.0.1", "", of_upstream);
        let (client, other) = (socket("127.0.0.1"), socket("127.0.0.1"));
        let ((header, session), (of_other, _)) = (setup.asks(&client), setup.asks(&other));
        let bytes = header.to_bytes();
        let no_header = [
            &b"answer"[..],
            b"",
            &bytes[..37],
            &[&[0x56, 0xed], &bytes[2..]].concat(),
        ];
        for reply in no_header {
            setup.answers(&[], reply, session);
        }
        let mut at_another_address = header;
        at_another_address.proxy.set_port(1);
        for wrong in [of_other, at_another_address] {
            setup.answers(&wrong.to_bytes(), b"answer", session);
        }
        // PROXY v2 is another format.
        let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
        let v2 = ppv2::encode_udp(header.client, header.proxy, &mut buffer).unwrap();
        setup.answers(v2, b"answer", session);
        // The right one passes, and nothing before it has.
        setup.answers(&bytes, b"right", session);
        assert_eq!(receive(&client), (b"right".to_vec(), setup.listener));
        receive_nothing(&other);
        assert_eq!(setup.dropped("reply_no_header"), 5);
        assert_eq!(setup.dropped("reply_wrong_client"), 2);
        // They came from the server nevertheless.
        let server = setup.server.local_addr().unwrap();
        let labels = format!("{{upstream=\"u\",server=\"{server}\"}}");
        let replies = format!("ppv2_upstream_reply_datagrams_total{labels}");
        assert_eq!(setup.proxy.metric(&replies), 8);
    }
}

#[test]
fn a_late_reply_loses_its_header_too() {
    let setup = Setup::start("127.0.0.1", "127.0.0.1", "requests = 1", "");
    let client = socket("127.0.0.1");
    let (first, second) = (setup.asks(&client), setup.asks(&client));
    assert_ne!(first.1, second.1);
    for ((header, session), answer) in [(second, b"second"), (first, b"first ")] {
        setup.answers(&header.to_bytes(), answer, session);
        assert_eq!(receive(&client).0, answer);
    }
}

/// A health check asks as the proxy itself, and its answer must have the header as well.
#[test]
fn probes_are_asked_by_it() {
    let health = "health = { every = \"100ms\", fall = 1, rise = 1,\n  \
                  probe = { kind = \"udp\", send = \"ping\", expect = \"pong\" } }";
    let setup = Setup::start("127.0.0.1", "127.0.0.1", "", health);
    let server = setup.server.local_addr().unwrap();
    let up = format!("ppv2_upstream_up{{upstream=\"u\",server=\"{server}\"}}");
    let answer_with = |with_header: bool, is_up: u64| {
        eventually("the server's state", || {
            let (datagram, from) = receive(&setup.server);
            let (header, payload) = spp::decode(&datagram).unwrap();
            assert_eq!((header.client, header.proxy), (from, server));
            assert_eq!(payload, b"ping");
            let header = if with_header {
                &header.to_bytes()[..]
            } else {
                &[]
            };
            setup.answers(header, b"pong", from);
            setup.proxy.metric(&up) == is_up
        });
    };
    answer_with(false, 0);
    answer_with(true, 1);
}

/// A chain: what comes by PROXY v2 goes on by Simple Proxy Protocol, and back.
#[test]
fn behind_another_proxy_it_names_that_ones_client() {
    let accept = "accept = { from = [\"127.0.0.1\"] }";
    let setup = Setup::start("127.0.0.1", "127.0.0.1", accept, "");
    let front = socket("127.0.0.1");
    let (client, destination) = ("[2001:db8::1]:4000", "198.51.100.1:9000");
    let [client, destination] = [client, destination].map(|text| text.parse().unwrap());
    let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
    let header = ppv2::encode_udp(client, destination, &mut buffer).unwrap();
    let datagram = [header, b"question"].concat();
    front.send_to(&datagram, setup.listener).unwrap();
    let (datagram, session) = receive(&setup.server);
    let (header, payload) = spp::decode(&datagram).unwrap();
    assert_eq!((header.client, header.proxy), (client, destination));
    assert_eq!(payload, b"question");
    setup.answers(&header.to_bytes(), b"answer", session);
    assert_eq!(receive(&front), (b"answer".to_vec(), setup.listener));
}

/// Each port of a range is written to by it, and answers by it.
#[test]
fn it_goes_to_the_ports_of_a_range() {
    let first = ports(2);
    let range = format!("{first}-{}", first + 1);
    let servers = [first, first + 1].map(|port| bind(SocketAddr::from(([127, 0, 0, 2], port))));
    let config = format!(
        "[[listener]]\nname = \"l\"\nbind = [\"127.0.0.1:{range}\"]\nupstream = \"u\"\n\
         [upstream.u]\nheader = {{ format = \"spp\" }}\n\
         servers = [{{ address = \"127.0.0.2:{range}\", port = \"same\" }}]\n"
    );
    let proxy = Proxy::start(&config);
    let client = socket("127.0.0.1");
    for server in &servers {
        let listener = SocketAddr::from(([127, 0, 0, 1], server.local_addr().unwrap().port()));
        client.send_to(b"question", listener).unwrap();
        let (datagram, session) = receive(server);
        let (header, payload) = spp::decode(&datagram).unwrap();
        assert_eq!((header.proxy, payload), (listener, &b"question"[..]));
        server.send_to(&[b'x'; 100], session).unwrap();
        let reply = [&header.to_bytes()[..], b"answer"].concat();
        server.send_to(&reply, session).unwrap();
        assert_eq!(receive(&client), (b"answer".to_vec(), listener));
    }
    let labels = "{listener=\"l\",reason=\"reply_no_header\"}";
    assert_eq!(
        proxy.metric(&format!("ppv2_dropped_datagrams_total{labels}")),
        2
    );
}

#[test]
fn a_server_on_our_sdk_reads_it_and_returns_it() {
    let trust = ppv2_sdk::Trust::networks(["127.0.0.1"]).formats([ppv2_sdk::Format::Spp]);
    let server = ppv2_sdk::UdpSocket::bind("127.0.0.1:0", trust.build().unwrap()).unwrap();
    server.set_read_timeout(Some(TIMEOUT)).unwrap();
    let listener = address("127.0.0.1");
    let config = format!(
        "[[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\n\
         [upstream.u]\nservers = [\"{}\"]\nheader = {{ format = \"spp\" }}\n",
        server.local_addr().unwrap()
    );
    let _proxy = Proxy::start(&config);
    for _ in 0..3 {
        let client = socket("127.0.0.1");
        for _ in 0..3 {
            client.send_to(b"question", listener).unwrap();
            let mut question = [0; 100];
            let (len, peer) = server.recv_from(&mut question).unwrap();
            assert_eq!(&question[..len], b"question");
            assert_eq!(peer, client.local_addr().unwrap());
            server.send_to(b"answer", peer).unwrap();
            assert_eq!(receive(&client), (b"answer".to_vec(), listener));
        }
    }
}

/// The proxy in front writes the format that the one behind it reads, and takes its replies.
#[test]
fn two_proxies_speak_it_with_each_other() {
    for (ip, accept) in [("127.0.0.1", "127.0.0.1"), ("::1", "::1")] {
        let accept = format!("accept = {{ from = [\"{accept}\"], formats = [\"spp\"] }}");
        let behind = Setup::start(ip, ip, &accept, "");
        let front = address(ip);
        let config = format!(
            "[[listener]]\nname = \"l\"\nbind = [\"{front}\"]\nupstream = \"u\"\n\
             [upstream.u]\nservers = [\"{}\"]\nheader = {{ format = \"spp\" }}\n",
            behind.listener
        );
        let proxy = Proxy::start(&config);
        let clients: Vec<_> = (0..5).map(|_| socket(ip)).collect();
        for number in 0..20u8 {
            for client in &clients {
                client.send_to(&[number; 100], front).unwrap();
            }
            for _ in &clients {
                let (datagram, session) = receive(&behind.server);
                let (header, payload) = spp::decode(&datagram).unwrap();
                assert_eq!((header.proxy, payload), (front, &[number; 100][..]));
                // The answer names the client, so that it can be told whose it is.
                let answer = header.client.to_string();
                behind.answers(&header.to_bytes(), answer.as_bytes(), session);
            }
            for client in &clients {
                let own = client.local_addr().unwrap().to_string();
                assert_eq!(receive(client), (own.into_bytes(), front));
            }
        }
        for reason in ["reply_no_header", "reply_wrong_client"] {
            let labels = format!("{{listener=\"l\",reason=\"{reason}\"}}");
            let dropped = proxy.metric(&format!("ppv2_dropped_datagrams_total{labels}"));
            assert_eq!(dropped, 0);
        }
    }
}
