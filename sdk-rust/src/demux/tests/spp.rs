//! Datagrams with a header of Simple Proxy Protocol, and the formats that are allowed.

use ppv2::spp::{SPP_HEADER_LEN, SPP_MAGIC};

use super::*;
use crate::Format;

const V2: &[Format] = &[Format::V2];
const SPP: &[Format] = &[Format::Spp];
const BOTH: &[Format] = &[Format::V2, Format::Spp];

fn allowing(formats: &[Format]) -> Demux {
    Demux::new(trust().formats(formats.iter().copied()).build().unwrap())
}

#[test]
fn delivers_the_client_and_its_destination() {
    for formats in [SPP, BOTH] {
        let demux = allowing(formats);
        for (client, listener) in [
            (CLIENT, LISTENER),
            ("[2001:db8:3::1]:1", "[2001:db8::10]:9000"),
            (CLIENT, "[2001:db8::10]:9000"),
            ("[2001:db8:3::1]:1", LISTENER),
        ] {
            for payload in [&b"hello"[..], b""] {
                let datagram = spp_to(client, listener, payload);
                let now = Instant::now();
                let received = demux.receive(now, addr(PROXY), None, &datagram).unwrap();
                assert_eq!(received.payload, payload);
                assert_eq!(received.client, addr(client));
                assert_eq!(received.destination, Some(addr(listener)));
                assert_eq!(received.proxy, Some(addr(PROXY)));
                assert_eq!(received.header, &datagram[..SPP_HEADER_LEN]);
                assert!(received.tlvs.is_empty());
                for to in [
                    Recipient::from(addr(client)),
                    received.into(),
                    received.reply_path.into(),
                ] {
                    let header = header_to(&demux, now, to).unwrap();
                    assert_eq!(header, spp_to(client, listener, b""));
                }
            }
        }
    }
}

#[test]
fn only_the_formats_that_are_allowed_are_headers() {
    let v2 = from_client(CLIENT, b"x");
    let simple = spp(CLIENT, b"x");
    dropped(&allowing(V2), PROXY, &simple, DropReason::NoHeader);
    dropped(&allowing(SPP), PROXY, &v2, DropReason::NoHeader);
    for (formats, datagrams) in [
        (V2, vec![&v2]),
        (SPP, vec![&simple]),
        (BOTH, vec![&v2, &simple]),
    ] {
        for datagram in datagrams {
            let demux = allowing(formats);
            let now = Instant::now();
            let received = demux.receive(now, addr(PROXY), None, datagram).unwrap();
            assert_eq!(received.client, addr(CLIENT));
        }
    }
}

#[test]
fn what_is_neither_is_dropped_by_its_reason() {
    let whole = spp(CLIENT, b"");
    for formats in [SPP, BOTH] {
        let demux = allowing(formats);
        let drops = |datagram: &[u8], reason| dropped(&demux, PROXY, datagram, reason);
        drops(b"", DropReason::NoHeader);
        drops(b"hello", DropReason::NoHeader);
        drops(&SPP_MAGIC[..1], DropReason::NoHeader);
        drops(b"PROXY UNKNOWN\r\nhello", DropReason::V1Header);
        for len in SPP_MAGIC.len()..SPP_HEADER_LEN {
            drops(&whole[..len], DropReason::BadHeader);
        }
        for nobody in ["203.0.113.11:0", "0.0.0.0:1", "224.0.0.1:1", "[ff02::1]:1"] {
            drops(&spp(nobody, b"x"), DropReason::ClientAddress);
        }
    }
    dropped(
        &allowing(SPP),
        STRANGER,
        &spp(CLIENT, b"x"),
        DropReason::Untrusted,
    );
}

/// The limit is for what the sender decides: an SPP header has 38 bytes.
#[test]
fn the_longest_header_is_one_of_v2() {
    let trust = trust().formats(SPP.iter().copied()).max_header_len(28);
    let demux = Demux::new(trust.build().unwrap());
    let datagram = spp(CLIENT, b"x");
    let received = demux.receive(Instant::now(), addr(PROXY), None, &datagram);
    assert_eq!(received.map(|received| received.client), Ok(addr(CLIENT)));
}

#[test]
fn a_strangers_magic_is_payload() {
    let trust = trust().formats(BOTH.iter().copied());
    let demux = Demux::new(trust.untrusted(Untrusted::Accept).build().unwrap());
    let datagram = spp(CLIENT, b"x");
    let received = demux.receive(Instant::now(), addr(STRANGER), None, &datagram);
    let received = received.unwrap();
    assert_eq!(
        (received.client, received.payload),
        (addr(STRANGER), &datagram[..])
    );
    assert!(received.reply_path.header().is_empty());
}

#[test]
fn one_address_of_a_proxy_serves_many_clients() {
    let demux = allowing(SPP);
    let start = Instant::now();
    let first = spp(CLIENT, b"x");
    let first = demux.receive(start, addr(PROXY), None, &first).unwrap();
    let later = start + 100 * SECOND;
    let datagram = spp(OTHER_CLIENT, b"x");
    demux.receive(later, addr(PROXY), None, &datagram).unwrap();
    for to in [Recipient::from(addr(CLIENT)), first.reply_path.into()] {
        assert_eq!(header_to(&demux, later, to), Some(spp(CLIENT, b"")));
        assert_eq!(header_to(&demux, start + 120 * SECOND, to), None);
    }
}

#[test]
fn dsr_answers_without_header() {
    let trust = trust()
        .formats(SPP.iter().copied())
        .reply_from(ReplyFrom::Listener);
    let demux = Demux::new(trust.build().unwrap());
    let now = Instant::now();
    let datagram = spp(CLIENT, b"x");
    let received = demux.receive(now, addr(PROXY), None, &datagram).unwrap();
    for path in [
        received.reply_path,
        demux.reply_path(now, addr(CLIENT)).unwrap(),
    ] {
        assert_eq!((path.to, path.from), (addr(CLIENT), Some(addr(LISTENER))));
        assert!(path.header().is_empty());
    }
}
