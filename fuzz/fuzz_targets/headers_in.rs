//! Any datagrams from other proxies, at any time, through what reads their headers and
//! keeps sessions. A client must be one that can exist, a datagram without header must be of
//! the latest client that its sender has named, and what is remembered must stay within its
//! bounds.
#![no_main]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use ppv2_engine::accept::{Accept, Direct, Formats, LocalHeaders, Remember, Senders};
use ppv2_engine::address::is_no_host;
use ppv2_engine::session::ReplyHeader;

const LISTENER: u64 = 1;
const MAX: usize = 4;
const IDLE: Duration = Duration::from_secs(30);

#[derive(Arbitrary, Debug)]
struct Input {
    v2: bool,
    spp: bool,
    forwards_local: bool,
    remembers: bool,
    forwards_empty: bool,
    datagrams: Vec<Datagram>,
}

#[derive(Arbitrary, Debug)]
struct Datagram {
    port: u8,
    after_millis: u16,
    /// A session holds its sender from now on.
    is_held: bool,
    content: Content,
}

#[derive(Arbitrary, Debug)]
enum Content {
    Any(Vec<u8>),
    /// Whole, but for one byte.
    Header {
        client: (u32, u16),
        changed: (u8, u8),
        tag: Option<(u8, [u8; 8])>,
        payload: Vec<u8>,
    },
    Spp {
        client: (u128, u16),
        payload: Vec<u8>,
    },
    Bare(Vec<u8>),
}

fn destination() -> SocketAddr {
    SocketAddr::from(([198, 51, 100, 10], 9000))
}

impl Content {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Any(bytes) => bytes.clone(),
            Self::Bare(bytes) => [b"bare", &bytes[..]].concat(),
            Self::Header {
                client,
                changed: (at, to),
                tag,
                payload,
            } => {
                let client = SocketAddr::from((std::net::Ipv4Addr::from(client.0), client.1));
                let mut buffer = [0; ppv2::MAX_TAGGED_HEADER_LEN];
                let header = match tag {
                    None => ppv2::encode_udp(client, destination(), &mut buffer),
                    Some((flags, tag)) => {
                        let tag = ppv2::ReplyTag::new(*flags, *tag);
                        ppv2::encode_udp_tagged(client, destination(), tag, &mut buffer)
                    }
                };
                let mut datagram = [header.expect("it fits"), payload].concat();
                if let Some(byte) = datagram.get_mut(usize::from(*at)) {
                    *byte ^= to;
                }
                datagram
            }
            Self::Spp { client, payload } => {
                let client = SocketAddr::from((std::net::Ipv6Addr::from(client.0), client.1));
                let mut buffer = [0; ppv2::spp::SPP_HEADER_LEN];
                let header = ppv2::spp::encode(client, destination(), &mut buffer);
                [header.expect("it fits"), payload].concat()
            }
        }
    }
}

fuzz_target!(|input: Input| {
    let accept = Accept {
        from: Vec::new(),
        formats: Formats {
            v2: input.v2,
            spp: input.spp,
        },
        direct: Direct::Drop,
        local: if input.forwards_local {
            LocalHeaders::Forward
        } else {
            LocalHeaders::Drop
        },
        passes_tlvs: true,
        remember: input.remembers.then_some(Remember {
            idle: IDLE,
            max: MAX,
            forwards_empty: input.forwards_empty,
        }),
    };
    let mut senders = Senders::default();
    let mut now = Instant::now();
    // What each port has said, and when it was heard last.
    let mut said: HashMap<u8, (SocketAddr, Instant)> = HashMap::new();
    let mut held = Vec::new();
    for datagram in &input.datagrams {
        now += Duration::from_millis(datagram.after_millis.into());
        said.retain(|_, (_, heard)| now - *heard < IDLE);
        let peer = SocketAddr::from(([192, 0, 2, 1], 1 + u16::from(datagram.port)));
        let ends = (peer, destination());
        let bytes = datagram.content.bytes();
        let Ok(arrival) = senders.read(&accept, LISTENER, ends, &bytes, now) else {
            said.remove(&datagram.port);
            continue;
        };
        let client = arrival.key.client.0;
        let sender = senders.get(arrival.key.sender).expect("it was just heard");
        assert_eq!((sender.address, sender.local), ends);
        assert!(arrival.header <= bytes.len());
        assert!(ppv2::Tlvs::parse(&bytes[arrival.tlvs.clone()]).is_ok());
        assert!(client == peer || client.port() != 0 && !is_no_host(client.ip()));
        assert_eq!(client.ip(), client.ip().to_canonical());
        if arrival.header == 0 {
            let (named, heard) = said.get_mut(&datagram.port).expect("it was said");
            assert_eq!(*named, client);
            *heard = now;
        } else if accept.remember.is_some()
            && bytes.starts_with(&ppv2::SIGNATURE)
            && bytes[12] == 0x21
            && arrival.reply_header == ReplyHeader::None
        {
            let is_full = said.len() >= MAX && !said.contains_key(&datagram.port);
            // It may take a while until room that has become free is found.
            assert!(arrival.is_unremembered || !is_full);
            if !arrival.is_unremembered {
                said.insert(datagram.port, (client, now));
            }
            let is_empty = bytes.len() == arrival.header;
            assert_eq!(arrival.is_announcement, is_empty && !input.forwards_empty);
        } else {
            // It speaks for itself, tags, has the other format, or none are remembered.
            said.remove(&datagram.port);
        }
        if datagram.is_held {
            held.push(Arc::clone(sender));
        }
    }
    assert!(senders.len() <= 257);
    for sender in held {
        let known = senders.get(sender.id).expect("a session holds it");
        assert_eq!(known.address, sender.address);
    }
});
