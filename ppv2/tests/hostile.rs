//! What a sender that means harm can put into a datagram, and what the decoder
//! makes of it. Most of what is claimed stands in `common/invariants.rs`.

mod common;

use common::{cases, invariants, wire};
use ppv2::{DecodeError, Decoder, Origin, Ssl, TlvType, Tlvs};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

const UNLIMITED: Decoder = Decoder::new().max_header_len(usize::MAX);

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn any_bytes(datagram in vec(any::<u8>(), 0..600)) {
        invariants::check(&datagram);
    }

    #[test]
    fn any_bytes_behind_the_signature(rest in vec(any::<u8>(), 0..600)) {
        invariants::check(&[&wire::SIGNATURE[..], &rest].concat());
    }

    #[test]
    fn any_bytes_behind_the_magic_of_spp(rest in vec(any::<u8>(), 0..80)) {
        invariants::check(&[&[0x56, 0xec], &rest[..]].concat());
    }

    #[test]
    fn any_text_behind_the_word_of_version_1(rest in "(TCP4|TCP6|UDP4|UNKNOWN|T)?.{0,40}") {
        invariants::check(&[b"PROXY ", rest.as_bytes()].concat());
    }

    #[test]
    fn any_bytes_behind_a_valid_address_block(
        tlvs in vec(prop_oneof![Just(0u8), 0..6u8, any::<u8>()], 0..600),
        payload in vec(any::<u8>(), 0..20),
    ) {
        let header = wire::header(0x21, 0x12, &[&[7; 12], &tlvs[..]].concat());
        invariants::check(&[header, payload].concat());
    }

    #[test]
    fn headers_nearly_right(wire in wire::wire()) {
        invariants::check(&wire.datagram());
    }

    #[test]
    fn headers_mutated(
        wire in wire::wire(),
        mutations in vec(any::<(u8, prop::sample::Index, u8)>(), 1..6),
    ) {
        invariants::check(&wire::mutated(&wire.datagram(), &mutations));
    }

    #[test]
    fn every_cut_of_a_header_is_refused(wire in wire::wire()) {
        let datagram = wire.datagram();
        if let Ok((header, _)) = UNLIMITED.decode(&datagram) {
            for len in 0..header.as_bytes().len() {
                let error = UNLIMITED.decode(&datagram[..len]).unwrap_err();
                let expected = if len < 16 {
                    DecodeError::TooShort { len }
                } else {
                    DecodeError::PastEnd { length: header.as_bytes().len() - 16, have: len }
                };
                prop_assert_eq!(error, expected);
            }
        }
    }

    #[test]
    fn the_limit_is_the_last_length_that_passes(wire in wire::wire()) {
        let datagram = wire.datagram();
        if let Ok(decoded) = UNLIMITED.decode(&datagram) {
            let len = decoded.0.as_bytes().len();
            prop_assert_eq!(Decoder::new().max_header_len(len).decode(&datagram), Ok(decoded));
            let max = len - 1;
            let error = Decoder::new().max_header_len(max).decode(&datagram).unwrap_err();
            prop_assert_eq!(error, DecodeError::TooLong { len, max });
        }
    }

    #[test]
    fn a_payload_that_looks_like_a_header_or_a_tlv_stays_payload(
        outer in wire::wire(),
        inner in wire::wire(),
        tlv in wire::tlv_parts(),
    ) {
        let header = outer.header();
        if let Ok((alone, _)) = UNLIMITED.decode(&header) && alone.as_bytes() == header {
            for payload in [inner.datagram(), wire::SIGNATURE.to_vec(), wire::tlv(tlv.0, &tlv.1)] {
                let datagram = [&header[..], &payload].concat();
                prop_assert_eq!(UNLIMITED.decode(&datagram), Ok((alone, &payload[..])));
            }
        }
    }

    #[test]
    fn any_tlvs_and_any_ssl_value(bytes in vec(prop_oneof![0..3u8, any::<u8>()], 0..400)) {
        if let Ok(tlvs) = Tlvs::parse(&bytes) {
            prop_assert!(3 * tlvs.iter().count() <= bytes.len());
        }
        if let Ok(ssl) = Ssl::parse(&bytes) {
            prop_assert!(5 + 3 * ssl.tlvs().iter().count() <= bytes.len());
        }
    }
}

/// What a header with a checksum says where one bit of it is flipped. The
/// checksum finds every such flip wherever the decoder still sees it; the spec
/// does not protect the bytes that say whether and where it is to be seen.
#[derive(Debug, PartialEq)]
enum Flipped {
    Signature,
    Command,
    Pair,
    Length,
    Address,
    TlvType { checksum: bool },
    TlvLength,
    Value,
}

fn flipped(header: &[u8], tlvs_at: usize, at: usize) -> Flipped {
    match at {
        0..12 => return Flipped::Signature,
        12 => return Flipped::Command,
        13 => return Flipped::Pair,
        14..16 => return Flipped::Length,
        _ if at < tlvs_at => return Flipped::Address,
        _ => {}
    }
    let mut start = tlvs_at;
    loop {
        let length = usize::from(u16::from_be_bytes([header[start + 1], header[start + 2]]));
        match at - start {
            0 => {
                return Flipped::TlvType {
                    checksum: header[start] == 0x03,
                };
            }
            1 | 2 => return Flipped::TlvLength,
            inside if inside < 3 + length => return Flipped::Value,
            _ => start += 3 + length,
        }
    }
}

/// Short ones, and zeroes for so long that they can pass for UNIX paths and
/// for empty TLVs behind them.
fn flippable_value() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        6 => vec(any::<u8>(), 0..9),
        1 => (200..260usize).prop_map(|len| vec![0; len]),
    ]
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn a_flipped_bit_under_a_checksum_is_refused_or_hides_the_checksum(
        pair in prop::sample::select(vec![0x11u8, 0x12, 0x21, 0x22]),
        block in vec(any::<u8>(), 36),
        tlvs in vec((prop_oneof![Just(4u8), 0xe0..=0xefu8], flippable_value()), 0..4),
        place in 0..4usize,
        payload in vec(any::<u8>(), 0..20),
    ) {
        let wire = wire::Wire {
            version_command: 0x21,
            family_transport: pair,
            block: block[..wire::block_len(pair)].to_vec(),
            tlvs,
            checksum: Some((place, 0)),
            stray: Vec::new(),
            length: None,
            payload,
        };
        let datagram = wire.datagram();
        let header_len = wire.header().len();
        let (whole, _) = UNLIMITED.decode(&datagram).unwrap();

        for bit in 0..header_len * 8 {
            let mut changed = datagram.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            let Ok((header, _)) = UNLIMITED.decode(&changed) else {
                continue;
            };
            let place = flipped(&datagram, 16 + wire.block.len(), bit / 8);
            prop_assert!(header.tlvs().crc32c().is_none(), "{:?} at bit {}", place, bit);
            match place {
                // 0x21 became 0x20: the proxy is said to speak for itself.
                Flipped::Command => prop_assert_eq!(header.origin(), Origin::Local),
                // IPv4 or IPv6 became UNIX, which names no client for UDP.
                Flipped::Pair => {
                    let unix = matches!(header.origin(), Origin::Unix { .. });
                    prop_assert!(unix);
                }
                // The checksum is cut off, renamed, or part of another value.
                Flipped::Length | Flipped::TlvLength | Flipped::TlvType { checksum: true } => {
                    prop_assert_eq!(header.origin(), whole.origin());
                }
                Flipped::Signature
                | Flipped::Address
                | Flipped::TlvType { checksum: false }
                | Flipped::Value => prop_assert!(false, "{:?} passed at bit {}", place, bit),
            }
            // So that no flip of one bit can ever name another client.
            prop_assert!(header.client().is_none() || header.client() == whole.client());
        }
    }
}

#[test]
fn about_half_of_the_generated_datagrams_are_valid() {
    let mut runner = TestRunner::deterministic();
    let strategy = wire::wire();
    let valid = (0..2000)
        .filter(|_| {
            let wire = strategy.new_tree(&mut runner).unwrap().current();
            UNLIMITED.decode(&wire.datagram()).is_ok()
        })
        .count();
    assert!((800..1600).contains(&valid), "{valid} of 2000");
}

#[test]
fn ssl_within_ssl_costs_neither_stack_nor_time() {
    // Each level is a prefix of 3 bytes and 5 fixed ones around the next.
    let levels = 65_535 / 8 - 2;
    let mut body = vec![7; 12];
    for level in (0..levels).rev() {
        let length = u16::try_from(5 + level * 8).unwrap();
        body.push(0x20);
        body.extend(length.to_be_bytes());
        body.extend([0x01, 0, 0, 0, 0]);
    }
    let datagram = wire::header(0x21, 0x12, &body);

    let small_stack = std::thread::Builder::new().stack_size(64 * 1024);
    let deepest = small_stack.spawn(move || {
        let (header, _) = UNLIMITED.decode(&datagram).unwrap();
        assert_eq!(header.tlvs().iter().count(), 1);
        let mut ssl = header.tlvs().ssl();
        let mut depth = 0;
        while let Some(Ok(level)) = ssl {
            depth += 1;
            ssl = level.tlvs().ssl();
        }
        depth
    });
    assert_eq!(deepest.unwrap().join().unwrap(), levels);
}

#[test]
fn the_largest_header_of_empty_tlvs_is_walked_once() {
    let body = [&[7; 12][..], &[0x04, 0, 0].repeat((65_535 - 12) / 3)].concat();
    let datagram = wire::header(0x21, 0x12, &body);
    let (header, _) = UNLIMITED.decode(&datagram).unwrap();
    assert_eq!(header.tlvs().iter().count(), 21_841);
    assert_eq!(header.tlvs().get(TlvType::ALPN), None);
    let error = ppv2::decode(&datagram).unwrap_err();
    assert!(matches!(error, DecodeError::TooLong { max: 512, .. }));
}
