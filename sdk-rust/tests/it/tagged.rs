//! Replies that name their client, on each kind of socket, to datagrams that came with a
//! reply tag or an SPP header: many clients through one address of the proxy.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;

use ppv2::{ReplyTag, TaggedReplyError, decode_tagged, spp};
use ppv2_lab::TIMEOUT;
use ppv2_lab::fake_proxy::*;
use ppv2_sdk::{
    Batch, Datagram, Format, Recipient, ReplyFrom, ReplyTooLong, Trust, UdpSocket, Untrusted,
};

const CLIENTS: u16 = 50;
const EXCHANGES: usize = 1_000;

/// What one proxy sends of `client`, with the tag that belongs to it.
fn tagged(client: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let mut buffer = [0; ppv2::MAX_TAGGED_HEADER_LEN];
    let header = ppv2::encode_udp_tagged(client, addr(LISTENER), tag_of(client), &mut buffer);
    [header.unwrap(), payload].concat()
}

/// The same by Simple Proxy Protocol.
fn simple(client: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let proxy = addr(LISTENER);
    let header = spp::SppHeader { client, proxy };
    [&header.to_bytes()[..], payload].concat()
}

/// How a proxy with one address names its clients.
#[derive(Clone, Copy, Debug)]
enum Wire {
    Tagged,
    Spp,
}

const WIRES: [Wire; 2] = [Wire::Tagged, Wire::Spp];

impl Wire {
    fn datagram(self, client: SocketAddr, payload: &[u8]) -> Vec<u8> {
        match self {
            Self::Tagged => tagged(client, payload),
            Self::Spp => simple(client, payload),
        }
    }

    /// Whom a reply is for, and what it says. It must be the very bytes, so nothing but
    /// the one TLV.
    #[track_caller]
    fn read(self, datagram: &[u8]) -> (SocketAddr, Vec<u8>) {
        let (client, payload) = match self {
            Self::Tagged => {
                let reply = decode_tagged(datagram).unwrap();
                (reply.client, reply.payload)
            }
            Self::Spp => {
                let (header, payload) = spp::decode(datagram).unwrap();
                (header.client, payload)
            }
        };
        assert_eq!(datagram, self.datagram(client, payload));
        (client, payload.to_vec())
    }

    fn header_len(self, client: SocketAddr) -> usize {
        self.datagram(client, b"").len()
    }
}

/// Trust in this host, whichever of the two it writes.
fn either() -> Trust {
    let formats = [Format::V2, Format::Spp];
    Trust::networks(LOOPBACK).formats(formats).build().unwrap()
}

fn tag_of(client: SocketAddr) -> ReplyTag {
    let mut hasher = DefaultHasher::new();
    client.hash(&mut hasher);
    ReplyTag::new(0x80, hasher.finish().to_be_bytes())
}

/// Every second one is an IPv6 client.
fn client(number: u16) -> SocketAddr {
    let ip: std::net::IpAddr = match number % 2 {
        0 => [203, 0, 113, 11].into(),
        _ => [0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x11].into(),
    };
    SocketAddr::new(ip, 10_000 + number)
}

/// A payload that says whose it is.
fn payload_of(client: SocketAddr, exchange: usize) -> Vec<u8> {
    format!("{client} {exchange}").into_bytes()
}

/// A proxy that has one address for all clients, and checks every reply.
struct OneAddress {
    proxy: Proxy,
    server: SocketAddr,
    wire: Wire,
}

impl OneAddress {
    fn to(server: SocketAddr, wire: Wire) -> Self {
        Self {
            proxy: Proxy::bind("127.0.0.1:0"),
            server,
            wire,
        }
    }

    fn send(&self, client: SocketAddr, payload: &[u8]) {
        let datagram = self.wire.datagram(client, payload);
        self.proxy.send(self.server, &datagram);
    }

    /// The next reply's client and payload.
    #[track_caller]
    fn receive(&self) -> (SocketAddr, Vec<u8>) {
        let (datagram, from) = self.proxy.receive();
        assert_eq!(from, self.server);
        self.wire.read(&datagram)
    }

    /// Clients in an order of their own, a few at once.
    fn rounds() -> impl Iterator<Item = Vec<(SocketAddr, Vec<u8>)>> {
        let numbers: Vec<_> = (0..EXCHANGES).collect();
        let rounds: Vec<_> = numbers.chunks(20).map(<[usize]>::to_vec).collect();
        rounds.into_iter().map(|round| {
            let exchange = |number: usize| {
                let client = client(u16::try_from(number * 7 % usize::from(CLIENTS)).unwrap());
                (client, payload_of(client, number))
            };
            round.into_iter().map(exchange).collect()
        })
    }

    /// Asserts that each of a round was answered, in this order.
    #[track_caller]
    fn answered<'r>(&self, round: impl IntoIterator<Item = &'r (SocketAddr, Vec<u8>)>) {
        for (client, payload) in round {
            assert_eq!(self.receive(), (*client, payload.clone()));
        }
    }
}

fn server(trust: Trust) -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind("127.0.0.1:0", trust).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

/// A round is received as a whole before the first reply, so that all are pending.
fn received(socket: &UdpSocket, count: usize) -> Vec<Datagram> {
    let receive = |_| socket.recv_datagram().unwrap();
    (0..count).map(receive).collect()
}

#[test]
fn many_clients_through_one_address_each_get_their_own_replies() {
    for wire in WIRES {
        let (socket, server) = server(either());
        let proxy = OneAddress::to(server, wire);
        for (number, round) in OneAddress::rounds().enumerate() {
            for (client, payload) in &round {
                proxy.send(*client, payload);
            }
            let datagrams = received(&socket, round.len());
            // By address, by datagram and by path; forwards and backwards.
            for datagram in datagrams.iter().rev() {
                let sent = match number % 3 {
                    0 => socket.send_to(&datagram.payload, datagram.client),
                    1 => socket.reply(datagram, &datagram.payload),
                    _ => socket.reply_to(datagram.reply_path, &datagram.payload),
                };
                assert_eq!(sent.unwrap(), datagram.payload.len());
            }
            proxy.answered(round.iter().rev());
        }
        proxy.proxy.receives_nothing();
        let stats = socket.stats();
        assert_eq!(stats.clients, usize::from(CLIENTS));
        assert_eq!(stats.replies_sent, EXCHANGES as u64);
    }
}

#[test]
fn batches_answer_many_clients_through_one_address() {
    for wire in WIRES {
        let (socket, server) = server(either());
        let proxy = OneAddress::to(server, wire);
        let mut batch = Batch::default();
        for round in OneAddress::rounds() {
            for (client, payload) in &round {
                proxy.send(*client, payload);
            }
            let mut left = round.len();
            while left > 0 {
                left -= socket.recv_batch(&mut batch).unwrap();
                let echoes: Vec<_> = batch.iter().map(|one| (one.payload, one)).collect();
                assert_eq!(socket.send_batch(&echoes).unwrap(), echoes.len());
            }
            proxy.answered(&round);
        }
        proxy.proxy.receives_nothing();
    }
}

/// Loopback hands a burst on whole, to a socket that asks for it.
#[cfg(target_os = "linux")]
#[test]
fn replies_of_one_size_to_many_clients_leave_as_one_burst() {
    for wire in WIRES {
        let (socket, server) = server(either());
        let proxy = OneAddress::to(server, wire);
        let clients: Vec<_> = (0..32).map(|number| client(2 * number)).collect();
        for client in &clients {
            proxy.send(*client, b"x");
        }
        let datagrams = received(&socket, clients.len());
        let state = ppv2_udp::SocketState::new(proxy.proxy.socket(), proxy.proxy.address());
        if !state.enable_gro(proxy.proxy.socket()).unwrap() {
            return;
        }
        let replies: Vec<_> = datagrams.iter().map(|one| ([7; 100], one)).collect();
        assert_eq!(socket.send_batch(&replies).unwrap(), clients.len());

        let mut slots = ppv2_udp::Batch::new(64);
        let filled = state
            .receive(proxy.proxy.socket(), &mut slots, 0..64, true)
            .unwrap();
        assert_eq!(filled, 1);
        let named: Vec<_> = slots
            .datagrams(filled)
            .map(|(_, range)| {
                let (client, payload) = wire.read(&slots.bytes()[range]);
                assert_eq!(payload, [7; 100]);
                client
            })
            .collect();
        assert_eq!(named, clients);
    }
}

#[test]
fn replies_that_name_their_client_and_bare_ones_differ() {
    for wire in WIRES {
        let (socket, server) = server(either());
        let (proxy, session) = (OneAddress::to(server, wire), Proxy::bind("127.0.0.1:0"));
        for exchange in 0..20 {
            proxy.send(client(exchange), b"tagged");
            session.send(server, &from_client(CLIENT, b"bare"));
            // A server that receives both in one batch answers both so.
            let datagrams = received(&socket, 2);
            let replies: Vec<_> = datagrams.iter().map(|one| (&one.payload, one)).collect();
            assert_eq!(socket.send_batch(&replies).unwrap(), 2);
            assert_eq!(proxy.receive(), (client(exchange), b"tagged".to_vec()));
            assert_eq!(session.receive().0, b"bare");
        }
    }
}

#[test]
fn a_client_moves_to_a_session_and_back_while_replies_are_pending() {
    for wire in WIRES {
        let (socket, server) = server(either());
        let (proxy, session) = (OneAddress::to(server, wire), Proxy::bind("127.0.0.1:0"));
        let moving = addr(CLIENT);
        for _ in 0..20 {
            proxy.send(moving, b"1");
            session.send(server, &from_client(CLIENT, b"2"));
            proxy.send(moving, b"3");
            let datagrams = received(&socket, 3);
            // The latest datagram decides for the address, each for itself.
            socket.send_to(b"latest", moving).unwrap();
            assert_eq!(proxy.receive(), (moving, b"latest".to_vec()));
            for datagram in &datagrams {
                socket.reply(datagram, &datagram.payload).unwrap();
            }
            assert_eq!(proxy.receive(), (moving, b"1".to_vec()));
            assert_eq!(session.receive().0, b"2");
            assert_eq!(proxy.receive(), (moving, b"3".to_vec()));

            session.send(server, &from_client(CLIENT, b"4"));
            received(&socket, 1);
            socket.send_to(b"bare", moving).unwrap();
            assert_eq!(session.receive().0, b"bare");
        }
        proxy.proxy.receives_nothing();
    }
}

#[test]
fn a_strangers_tag_counts_for_nothing() {
    let (socket, server) = server(one_address());
    let stranger = Proxy::bind("127.0.0.2:0");
    stranger.send(server, &tagged(addr(CLIENT), b"x"));
    let proxy = OneAddress::to(server, Wire::Tagged);
    proxy.send(addr(OTHER_CLIENT), b"x");
    assert_eq!(received(&socket, 1)[0].client, addr(OTHER_CLIENT));
    assert!(socket.send_to(b"x", addr(CLIENT)).is_err());
    stranger.receives_nothing();

    let trust = Trust::networks(["127.0.0.1"]).untrusted(Untrusted::Accept);
    let (socket, server) = self::server(trust.build().unwrap());
    let datagram = tagged(addr(CLIENT), b"x");
    stranger.send(server, &datagram);
    let direct = &received(&socket, 1)[0];
    assert_eq!(direct.payload, datagram);
    socket.reply(direct, b"bare").unwrap();
    assert_eq!(stranger.receive().0, b"bare");
}

#[test]
fn a_reply_that_is_too_long_with_its_header_is_refused_as_a_whole() {
    for wire in WIRES {
        let (socket, server) = server(either());
        let proxy = OneAddress::to(server, wire);
        let (v4, v6) = (client(0), client(1));
        for client in [v4, v6] {
            let header_len = wire.header_len(client);
            proxy.send(client, b"x");
            let datagram = &received(&socket, 1)[0];
            let longest = vec![7; 65_507 - header_len];
            let longer = vec![7; longest.len() + 1];
            assert_eq!(socket.reply(datagram, &longest).unwrap(), longest.len());
            assert_eq!(proxy.receive(), (client, longest.clone()));

            let error = socket.reply(datagram, &longer).unwrap_err();
            assert!(error.get_ref().unwrap().is::<ReplyTooLong>());
            assert_eq!(
                error.to_string(),
                format!(
                    "a reply of {} bytes to client {client} and the header of {header_len} bytes in \
                     front of it exceed the 65507 bytes that a datagram holds; its proxy asks for \
                     that header, with a reply tag or by SPP, so send at most {} bytes",
                    longer.len(),
                    longest.len()
                )
            );
            let replies = [&longest, &longer, &longest].map(|payload| (payload, datagram));
            assert_eq!(socket.send_batch(&replies).unwrap(), 1);
            assert_eq!(proxy.receive(), (client, longest.clone()));
            let again = socket.send_batch(&replies[1..]).unwrap_err();
            assert_eq!(again.to_string(), error.to_string());
        }
        proxy.proxy.receives_nothing();
        assert_eq!(socket.stats().replies_sent, 4);
    }
}

#[test]
fn an_empty_reply_is_a_header_alone() {
    for wire in WIRES {
        let (socket, server) = server(either());
        let proxy = OneAddress::to(server, wire);
        proxy.send(client(0), b"");
        let datagram = &received(&socket, 1)[0];
        assert_eq!(socket.reply(datagram, b"").unwrap(), 0);
        assert_eq!(socket.send_batch(&[(b"", datagram)]).unwrap(), 1);
        for _ in 0..2 {
            assert_eq!(proxy.receive(), (client(0), Vec::new()));
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_wildcard_socket_answers_from_the_address_that_it_was_sent_to() {
    for wire in WIRES {
        let socket = UdpSocket::from_std(dual_stack(), either()).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        let bound = socket.local_addr().unwrap();
        for (from, to) in [
            ("127.0.0.1:0", "127.0.0.7"),
            ("127.0.0.1:0", "127.0.0.8"),
            ("[::1]:0", "::1"),
        ] {
            let server = reached_by(to, bound);
            let proxy = Proxy::bind(from);
            let proxy = OneAddress {
                proxy,
                server,
                wire,
            };
            for number in 0..4 {
                proxy.send(client(number), b"x");
            }
            for datagram in &received(&socket, 4) {
                socket.reply(datagram, b"single").unwrap();
                assert_eq!(socket.send_batch(&[(b"batch", datagram)]).unwrap(), 1);
            }
            for number in 0..4 {
                assert_eq!(proxy.receive(), (client(number), b"single".to_vec()));
                assert_eq!(proxy.receive(), (client(number), b"batch".to_vec()));
            }
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_server_that_answers_from_the_listener_names_no_client() {
    let trust = Trust::networks(["127.0.0.1"]).formats([Format::V2, Format::Spp]);
    let trust = trust.reply_from(ReplyFrom::Listener);
    let (socket, server) = server(trust.build().unwrap());
    let (proxy, client) = (Proxy::bind("127.0.0.1:0"), Proxy::bind("127.0.1.1:0"));
    let listener = addr("127.0.2.1:9300");
    let mut buffer = [0; ppv2::MAX_TAGGED_HEADER_LEN];
    let tag = tag_of(client.address());
    let tagged = ppv2::encode_udp_tagged(client.address(), listener, tag, &mut buffer).unwrap();
    let simple = spp::SppHeader {
        client: client.address(),
        proxy: listener,
    };
    for header in [tagged, &simple.to_bytes()] {
        proxy.send(server, header);
        let datagram = &received(&socket, 1)[0];
        socket.reply(datagram, b"1").unwrap();
        socket.send_to(b"2", client.address()).unwrap();
        assert_eq!(socket.send_batch(&[(b"3", datagram)]).unwrap(), 1);
        for payload in [b"1", b"2", b"3"] {
            assert_eq!(client.receive(), (payload.to_vec(), listener));
        }
        proxy.receives_nothing();
    }
}

#[test]
fn a_bare_reply_is_none_that_a_proxy_takes_for_tagged() {
    let (socket, server) = server(loopback());
    let session = Proxy::bind("127.0.0.1:0");
    session.send(server, &from_client(CLIENT, b"x"));
    let datagram = &received(&socket, 1)[0];
    socket.reply(datagram, b"bare").unwrap();
    let error = decode_tagged(&session.receive().0).unwrap_err();
    assert!(matches!(error, TaggedReplyError::Header(_)));
}

#[cfg(feature = "tokio")]
mod tokio_sockets {
    use std::future::poll_fn;

    use ppv2_sdk::tokio::UdpSocket;

    use super::*;

    async fn soon<T>(future: impl Future<Output = T>) -> T {
        tokio::time::timeout(TIMEOUT, future)
            .await
            .expect("in time")
    }

    #[tokio::test]
    async fn many_clients_through_one_address_each_get_their_own_replies() {
        for wire in WIRES {
            each_gets_its_own(wire).await;
        }
    }

    async fn each_gets_its_own(wire: Wire) {
        let socket = UdpSocket::bind("127.0.0.1:0", either()).await.unwrap();
        let proxy = OneAddress::to(socket.local_addr().unwrap(), wire);
        let mut batch = Batch::default();
        for (number, round) in OneAddress::rounds().enumerate() {
            for (client, payload) in &round {
                proxy.send(*client, payload);
            }
            let mut datagrams: Vec<Datagram> = Vec::new();
            while datagrams.len() < round.len() {
                soon(socket.recv_batch(&mut batch)).await.unwrap();
                datagrams.extend(batch.iter().map(Datagram::from));
            }
            if number % 6 == 5 {
                let replies: Vec<_> = datagrams.iter().map(|one| (&one.payload, one)).collect();
                let sent = match number % 4 {
                    1 => soon(socket.send_batch(&replies)).await,
                    _ => soon(poll_fn(|cx| socket.poll_send_batch(cx, &replies))).await,
                };
                assert_eq!(sent.unwrap(), replies.len());
                proxy.answered(&round);
                continue;
            }
            for datagram in datagrams.iter().rev() {
                let (payload, client) = (&datagram.payload[..], datagram.client);
                let sent = match number % 6 {
                    0 => socket.send_to(payload, client).await,
                    1 => socket.try_send_to(payload, client),
                    2 => soon(poll_fn(|cx| socket.poll_send_to(cx, payload, client))).await,
                    3 => socket.reply(datagram, payload).await,
                    _ => socket.try_reply_to(Recipient::from(datagram), payload),
                };
                assert_eq!(sent.unwrap(), payload.len());
            }
            proxy.answered(round.iter().rev());
        }
        proxy.proxy.receives_nothing();
        assert_eq!(socket.stats().replies_sent, EXCHANGES as u64);
    }

    #[tokio::test]
    async fn a_reply_that_is_too_long_with_its_header_is_refused_as_a_whole() {
        let socket = UdpSocket::bind("127.0.0.1:0", loopback()).await.unwrap();
        let proxy = OneAddress::to(socket.local_addr().unwrap(), Wire::Tagged);
        proxy.send(client(0), b"x");
        let datagram = soon(socket.recv_datagram()).await.unwrap();
        let longer = vec![7; 65_507 - 41 + 1];
        let error = socket.reply(&datagram, &longer).await.unwrap_err();
        assert!(error.to_string().contains("send at most 65466 bytes"));
        socket.reply(&datagram, &longer[1..]).await.unwrap();
        assert_eq!(proxy.receive(), (client(0), longer[1..].to_vec()));
        proxy.proxy.receives_nothing();
    }
}
