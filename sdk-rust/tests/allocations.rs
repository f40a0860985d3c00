//! Datagrams of clients that are known allocate nothing, nor do the headers of replies,
//! in whichever format, and whether or not the sender says its header each time.
#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ppv2::{ReplyTag, spp};
use ppv2_sdk::{Demux, DropReason, Format, Trust, TrustBuilder};

const PROXY: &str = "192.0.2.1:40000";
const CLIENT: &str = "203.0.113.11:54321";
const LISTENER: &str = "198.51.100.10:9000";

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn v2(payload: &[u8]) -> Vec<u8> {
    let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
    let header = ppv2::encode_udp(addr(CLIENT), addr(LISTENER), &mut buffer);
    [header.unwrap(), payload].concat()
}

fn tagged(payload: &[u8]) -> Vec<u8> {
    let mut buffer = [0; ppv2::MAX_TAGGED_HEADER_LEN];
    let tag = ReplyTag::new(0, [7; 8]);
    let header = ppv2::encode_udp_tagged(addr(CLIENT), addr(LISTENER), tag, &mut buffer);
    [header.unwrap(), payload].concat()
}

fn simple(payload: &[u8]) -> Vec<u8> {
    let header = spp::SppHeader {
        client: addr(CLIENT),
        proxy: addr(LISTENER),
    };
    [&header.to_bytes()[..], payload].concat()
}

/// Receives each datagram a thousand times, and answers what is delivered. The first of
/// each kind has its client be known, which allocates.
#[track_caller]
fn allocates_nothing(trust: TrustBuilder, datagrams: &[Vec<u8>]) {
    let demux = Demux::new(trust.build().unwrap());
    let (now, proxy) = (Instant::now(), addr(PROXY));
    let exchange = || {
        for datagram in datagrams {
            match demux.receive(now, proxy, None, datagram) {
                Ok(received) => {
                    let path = demux.reply_path(now, received.client).unwrap();
                    assert_eq!(path, received.reply_path);
                    assert_eq!(path.header()[..], received.reply_path.header()[..]);
                }
                Err(reason) => assert_eq!(reason, DropReason::HeaderAlone),
            }
        }
    };
    let first = allocation_counter::measure(exchange);
    assert!(first.count_total > 0, "it is counted");
    let more = allocation_counter::measure(|| {
        for _ in 0..1000 {
            exchange();
        }
    });
    assert_eq!(more.count_total, 0);
    assert_eq!(demux.stats().dropped_total() % 1001, 0);
}

#[test]
fn known_clients_allocate_nothing() {
    let trust = || Trust::networks(["192.0.2.1"]);
    let both = || trust().formats([Format::V2, Format::Spp]);
    allocates_nothing(trust(), &[v2(b"x"), v2(b"")]);
    allocates_nothing(trust(), &[tagged(b"x"), v2(b"x")]);
    allocates_nothing(both(), &[simple(b"x"), simple(b"")]);
    allocates_nothing(both(), &[simple(b"x"), v2(b"x"), tagged(b"x")]);
    let remembering = trust().remember_senders(Duration::from_secs(30), 10);
    let said_once = [v2(b"x"), b"bare".to_vec(), Vec::new(), v2(b""), vec![7; 99]];
    allocates_nothing(remembering, &said_once);
}
