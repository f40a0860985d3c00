//! Any datagrams from any peers, at any time, in any formats, with headers that are said
//! once or each time. What the SDK delivers must name a client that can be answered, what
//! it drops must be counted under a reason, and what it remembers must stay within its
//! bound. A datagram without header must be of the client that its sender named last.
#![no_main]

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use ppv2::spp;
use ppv2_sdk::{Demux, DropReason, Format, HeaderAlone, Trust, Untrusted};

const MAX_CLIENTS: usize = 4;
const MAX_SENDERS: usize = 2;
const IDLE: Duration = Duration::from_secs(20);

#[derive(Arbitrary, Debug)]
enum Headers {
    V2,
    Spp,
    Both,
    SaidOnce,
    SaidOnceAndDelivered,
}

#[derive(Arbitrary, Debug)]
struct Received {
    peer: Peer,
    after_millis: u16,
    content: Content,
}

#[derive(Arbitrary, Debug)]
enum Peer {
    Proxy { host: u8 },
    MappedProxy { host: u8 },
    Any { ip: u128, port: u16 },
}

#[derive(Arbitrary, Debug)]
enum Content {
    Any(Vec<u8>),
    /// Whole, but for one byte.
    Header {
        client: (u32, u16),
        changed: (u8, u8),
        payload: Vec<u8>,
        /// With this reply tag.
        tag: Option<(u8, [u8; 8])>,
    },
    /// Of Simple Proxy Protocol, whole but for one byte.
    Simple {
        client: (u128, u16),
        changed: (u8, u8),
        payload: Vec<u8>,
    },
    Version1(Vec<u8>),
}

impl Peer {
    fn address(&self) -> SocketAddr {
        let proxy = |host| Ipv4Addr::new(192, 0, 2, host);
        match *self {
            Self::Proxy { host } => SocketAddr::from((proxy(host), 40_000)),
            Self::MappedProxy { host } => SocketAddr::from((proxy(host).to_ipv6_mapped(), 40_000)),
            Self::Any { ip, port } => SocketAddr::from((Ipv6Addr::from_bits(ip), port)),
        }
    }
}

impl Content {
    fn datagram(&self) -> Vec<u8> {
        match self {
            Self::Any(bytes) => bytes.clone(),
            Self::Header {
                client: (ip, port),
                changed: (at, to),
                payload,
                tag,
            } => {
                let client = SocketAddr::from((Ipv4Addr::from_bits(*ip), *port));
                let listener = SocketAddr::from(([198, 51, 100, 10], 9000));
                let mut buffer = [0; ppv2::MAX_TAGGED_HEADER_LEN];
                let header = match *tag {
                    None => ppv2::encode_udp(client, listener, &mut buffer),
                    Some((flags, tag)) => {
                        let tag = ppv2::ReplyTag::new(flags, tag);
                        ppv2::encode_udp_tagged(client, listener, tag, &mut buffer)
                    }
                };
                let header = header.expect("fits");
                changed([header, payload].concat(), *at, *to)
            }
            Self::Simple {
                client: (ip, port),
                changed: (at, to),
                payload,
            } => {
                let client = SocketAddr::from((Ipv6Addr::from_bits(*ip), *port));
                let proxy = SocketAddr::from(([198, 51, 100, 10], 9000));
                let header = spp::SppHeader { client, proxy }.to_bytes();
                changed([&header, &payload[..]].concat(), *at, *to)
            }
            Self::Version1(rest) => [b"PROXY UNKNOWN ", &rest[..]].concat(),
        }
    }
}

fn changed(mut datagram: Vec<u8>, at: u8, to: u8) -> Vec<u8> {
    if let Some(byte) = datagram.get_mut(usize::from(at)) {
        *byte = to;
    }
    datagram
}

fuzz_target!(|input: (Headers, Vec<Received>)| {
    let (headers, steps) = input;
    let trust = Trust::networks(["192.0.2.0/25"])
        .untrusted(Untrusted::Accept)
        .max_clients(MAX_CLIENTS);
    let trust = match headers {
        Headers::V2 => trust,
        Headers::Spp => trust.formats([Format::Spp]),
        Headers::Both => trust.formats([Format::V2, Format::Spp]),
        Headers::SaidOnce => trust.remember_senders(IDLE, MAX_SENDERS),
        Headers::SaidOnceAndDelivered => trust
            .remember_senders(IDLE, MAX_SENDERS)
            .header_alone(HeaderAlone::Deliver),
    };
    let remembers = matches!(headers, Headers::SaidOnce | Headers::SaidOnceAndDelivered);
    // The client that each sender's latest header named, and the sender's latest datagram.
    let mut said: HashMap<SocketAddr, (SocketAddr, Instant)> = HashMap::new();
    let demux = Demux::new(trust.build().expect("usable"));
    let mut now = Instant::now();
    let mut delivered = 0;
    for one in &steps {
        now += Duration::from_millis(one.after_millis.into());
        let (peer, datagram) = (one.peer.address(), one.content.datagram());
        let before = demux.stats();
        let sender = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let has_signature = datagram.starts_with(&ppv2::SIGNATURE);
        match demux.receive(now, peer, None, &datagram) {
            Ok(received) => {
                delivered += 1;
                assert!(datagram.ends_with(received.payload));
                assert_eq!(received.reply_path.to, peer);
                assert_eq!(
                    demux.reply_path(now, received.client),
                    Some(received.reply_path)
                );
                assert_ne!(received.client.port(), 0);
                assert!(!received.client.ip().is_unspecified());
                assert!(!received.client.ip().is_multicast());
                assert_eq!(received.client.ip(), received.client.ip().to_canonical());
                let header = received.reply_path.header();
                let tag = received.tlvs.reply_tag();
                let is_spp = received.header.starts_with(&spp::SPP_MAGIC);
                assert_eq!(header.is_empty(), tag.is_none() && !is_spp);
                if is_spp {
                    assert!(matches!(headers, Headers::Spp | Headers::Both));
                    let (reply, _) = spp::decode(&header).expect("an SPP header");
                    assert_eq!(reply.client, received.client);
                    assert_eq!(Some(reply.proxy), received.destination);
                    assert_eq!(received.header.len(), header.len());
                }
                if let Some(tag) = tag {
                    let reply = ppv2::decode_tagged(&header).expect("one tag");
                    assert_eq!(reply.client.ip().to_canonical(), received.client.ip());
                    assert_eq!(
                        (reply.client.port(), reply.tag),
                        (received.client.port(), tag)
                    );
                }
                if received.proxy.is_none() {
                    assert_eq!(received.payload, datagram);
                    assert_eq!(received.client.ip(), peer.ip().to_canonical());
                } else {
                    let IpAddr::V4(proxy) = peer.ip().to_canonical() else {
                        panic!("{peer} is not trusted");
                    };
                    assert!(proxy.octets()[..3] == [192, 0, 2] && proxy.octets()[3] < 128);
                    assert!(remembers || !received.header.is_empty());
                    if received.header.is_empty() {
                        assert!(!has_signature && !ppv2::is_v1(&datagram));
                        let (client, heard) = said[&sender];
                        assert_eq!(received.client, client);
                        assert!(now - heard < IDLE);
                        said.insert(sender, (client, now));
                    } else if received.destination.is_some() && tag.is_none() {
                        said.insert(sender, (received.client, now));
                    } else {
                        said.remove(&sender);
                    }
                }
            }
            Err(reason) => {
                assert_eq!(demux.stats().dropped(reason), before.dropped(reason) + 1);
                if reason == DropReason::HeaderAlone {
                    assert!(matches!(headers, Headers::SaidOnce));
                    let (header, payload) = ppv2::decode(&datagram).expect("a header");
                    assert!(payload.is_empty());
                    let client = header.client().expect("a client");
                    let client = SocketAddr::new(client.ip().to_canonical(), client.port());
                    said.insert(sender, (client, now));
                } else if has_signature {
                    // What follows must not be taken for the client that was there before.
                    said.remove(&sender);
                }
            }
        }
        let stats = demux.stats();
        assert_eq!(stats.received, before.received + 1);
        assert_eq!(stats.delivered, delivered);
        assert!(stats.clients <= 2 * MAX_CLIENTS);
    }
});
