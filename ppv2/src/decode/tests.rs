use crate::Origin;
use std::vec::Vec;

use super::*;

fn header(version_command: u8, family_transport: u8, length: u16, rest: &[u8]) -> Vec<u8> {
    let mut bytes = SIGNATURE.to_vec();
    bytes.extend([version_command, family_transport]);
    bytes.extend(length.to_be_bytes());
    bytes.extend(rest);
    bytes
}

const V4: [u8; 12] = [203, 0, 113, 11, 198, 51, 100, 10, 0xd4, 0x31, 0x23, 0x28];

#[test]
fn a_local_header_never_names_a_client() {
    for family in 0..=u8::MAX {
        let datagram = header(0x20, family, 12, &[&V4[..], b"ping"].concat());
        let (header, payload) = decode(&datagram).unwrap();
        assert_eq!(header.origin(), Origin::Local);
        assert_eq!(header.client(), None);
        assert!(header.tlvs().is_empty());
        assert_eq!(header.skipped(), V4);
        assert_eq!(payload, b"ping");
    }
    let empty = header(0x20, 0x12, 0, b"ping");
    assert_eq!(decode(&empty).unwrap().1, b"ping");
}

#[test]
fn every_family_and_transport_outside_the_table_is_refused() {
    let listed = [0x00, 0x11, 0x12, 0x21, 0x22, 0x31, 0x32];
    for found in 0..=u8::MAX {
        let datagram = header(0x21, found, 216, &[0; 216]);
        if listed.contains(&found) {
            assert!(decode(&datagram).is_ok(), "{found:02x}");
            continue;
        }
        let expected = DecodeError::FamilyTransport { found };
        assert_eq!(decode(&datagram).unwrap_err(), expected);
        // Byte 13 comes before a length that is wrong besides.
        for length in [0, 999] {
            let datagram = header(0x21, found, length, &[]);
            assert_eq!(decode(&datagram).unwrap_err(), expected);
        }
    }
}

#[test]
fn unspec_bytes_are_ignored_and_still_reachable() {
    let datagram = header(0x21, 0x00, 5, &[0x04, 0, 2, 1, 2, b'x']);
    let (header, payload) = decode(&datagram).unwrap();
    assert_eq!(header.origin(), Origin::Unspecified);
    assert!(header.tlvs().is_empty());
    let tlvs = Tlvs::parse(header.skipped()).unwrap();
    assert_eq!(tlvs.get(TlvType::NOOP), Some([1, 2].as_slice()));
    assert_eq!(payload, b"x");
}

#[test]
fn a_tcp_header_has_an_origin_but_no_udp_client() {
    let datagram = header(0x21, 0x11, 12, &V4);
    let (header, _) = decode(&datagram).unwrap();
    assert_eq!(header.client(), None);
    assert!(matches!(
        header.origin(),
        Origin::Ip {
            transport: Transport::Stream,
            ..
        }
    ));
}

#[test]
fn unix_paths_are_the_two_halves_of_the_block() {
    let datagram = header(0x21, 0x32, 216, &[[b'a'; 108], [b'b'; 108]].concat());
    let (header, _) = decode(&datagram).unwrap();
    assert_eq!(
        header.origin(),
        Origin::Unix {
            transport: Transport::Datagram,
            source: &[b'a'; 108],
            destination: &[b'b'; 108],
        }
    );
}

#[test]
fn every_cut_of_a_valid_datagram_is_refused_at_the_cut_or_the_length() {
    let whole = header(0x21, 0x12, 12, &V4);
    for len in 0..whole.len() {
        let expected = if len < FIXED_LEN {
            DecodeError::TooShort { len }
        } else {
            DecodeError::PastEnd {
                length: 12,
                have: len,
            }
        };
        assert_eq!(decode(&whole[..len]).unwrap_err(), expected);
    }
}

#[test]
fn errors_name_the_byte() {
    let cases: &[(Vec<u8>, DecodeError, usize)] = &[
        (
            header(0x22, 0x12, 12, &V4),
            DecodeError::Command {
                found: 2,
                byte: 0x22,
            },
            12,
        ),
        (
            header(0x21, 0x12, 11, &V4),
            DecodeError::AddressesCut {
                found: 11,
                needed: 12,
            },
            14,
        ),
        (
            header(0x21, 0x12, 13, &[&V4[..], &[4]].concat()),
            DecodeError::TlvStray {
                offset: 28,
                count: 1,
            },
            28,
        ),
        (
            header(0x21, 0x12, 15, &[&V4[..], &[2, 0, 1], b"payload"].concat()),
            DecodeError::TlvPastEnd {
                offset: 28,
                kind: TlvType::AUTHORITY,
                length: 1,
                left: 0,
            },
            28,
        ),
        (
            header(0x21, 0x12, 17, &[&V4[..], &[3, 0, 2, 0, 0]].concat()),
            DecodeError::ChecksumLength {
                offset: 28,
                found: 2,
            },
            28,
        ),
        (
            header(
                0x21,
                0x12,
                12 + 3 + 129,
                &[&V4[..], &[5, 0, 129], &[7; 129]].concat(),
            ),
            DecodeError::UniqueIdTooLong {
                offset: 28,
                found: 129,
            },
            28,
        ),
    ];
    for (datagram, expected, offset) in cases {
        let error = decode(datagram).unwrap_err();
        assert_eq!(error, *expected);
        assert_eq!(error.offset(), *offset);
    }
}
