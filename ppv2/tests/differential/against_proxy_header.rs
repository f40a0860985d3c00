//! Against `proxy-header` 0.1.3, which was read in its source for this list.

use std::collections::BTreeSet;

use ppv2::{DecodeError, Origin, Transport};
use proptest::prelude::*;
use proxy_header::{Error, ParseConfig, Protocol, ProxiedAddress, ProxyHeader};

use crate::common::{cases, wire};
use crate::{UNLIMITED, V4, assert_wrong_checksum, datagram, met, tlvs_of};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Known {
    /// It refuses a LOCAL header whose length is shorter than its family's
    /// block, and one of a pair of family and transport that it does not know.
    /// We are right: LOCAL is to be accepted and skipped whatever it carries
    /// (2.2).
    LocalRefused,
    /// It reads what stands behind a LOCAL header's address block as TLVs, where
    /// the block is to be discarded whole (2.2). We are right.
    LocalTlvs,
    /// It reads all that stands in an UNSPEC header as TLVs. Such bytes may as
    /// well be addresses of a form that the sender could not name, to be ignored
    /// up to the header's end (2.2): we do, and leave them to `Tlvs::parse`.
    UnspecTlvs,
    /// It keeps no UNIX paths: such a header looks like LOCAL. Its own
    /// documentation says so. We are right to tell them apart.
    UnixPaths,
    /// It accepts TLVs that overrun the header or leave stray bytes, and says so
    /// only to those who iterate that far. We refuse what can't be read whole.
    TlvFraming,
    /// It reads a checksum and never verifies it. We are right (2.2.3). One of
    /// another length than 4 is an error to both, to it when iterating.
    Checksum,
    /// It accepts a UNIQUE_ID over the 128 bytes of 2.2.5, which we refuse.
    UniqueIdLength,
    /// Text that is not UTF-8 and an SSL value below 5 bytes are errors of its
    /// iterator, and their bytes out of reach. We keep the bytes, since the
    /// header is sound, and leave the error to the typed getter.
    TypedValue,
    /// It keeps how long a NOOP is, and not its bytes. Neither is wrong: the
    /// bytes mean nothing (2.2.4).
    NoopBytes,
}

const ALL: [Known; 9] = [
    Known::LocalRefused,
    Known::LocalTlvs,
    Known::UnspecTlvs,
    Known::UnixPaths,
    Known::TlvFraming,
    Known::Checksum,
    Known::UniqueIdLength,
    Known::TypedValue,
    Known::NoopBytes,
];

const V2_ONLY: ParseConfig = ParseConfig {
    include_tlvs: true,
    allow_v1: false,
    allow_v2: true,
};

/// Panics at a difference that is not on the list.
fn differences(datagram: &[u8]) -> Vec<Known> {
    let ours = UNLIMITED.decode(datagram);
    let theirs = ProxyHeader::parse(datagram, V2_ONLY);
    match (&ours, &theirs) {
        (Err(_), Err(_)) => Vec::new(),
        (Ok((header, payload)), Ok((parsed, len))) => {
            assert_eq!(header.as_bytes().len(), *len);
            assert_eq!(*payload, &datagram[*len..]);
            let mut known = Vec::new();
            let address = match header.origin() {
                Origin::Ip {
                    transport,
                    source,
                    destination,
                } => Some(match transport {
                    Transport::Stream => ProxiedAddress::stream(source, destination),
                    Transport::Datagram => ProxiedAddress::datagram(source, destination),
                }),
                _ => None,
            };
            assert_eq!(parsed.proxied_address(), address.as_ref());
            let any_tlv = parsed.tlvs().next().is_some();
            match header.origin() {
                Origin::Local if any_tlv => known.push(Known::LocalTlvs),
                Origin::Unspecified if any_tlv => known.push(Known::UnspecTlvs),
                Origin::Unix { .. } => known.push(Known::UnixPaths),
                _ => {}
            }
            if !matches!(header.origin(), Origin::Local | Origin::Unspecified) {
                known.extend(tlv_differences(&tlvs_of(header), parsed));
            }
            known
        }
        (Ok((header, _)), Err(_)) => {
            assert_eq!(header.origin(), Origin::Local);
            let family_transport = header.as_bytes()[13];
            let listed = [0x11, 0x12, 0x21, 0x22, 0x31, 0x32].contains(&family_transport);
            assert!(!listed || header.skipped().len() < wire::block_len(family_transport));
            vec![Known::LocalRefused]
        }
        (Err(error), Ok((parsed, len))) => {
            let header = &datagram[..*len];
            let unsound = parsed.tlvs().any(|tlv| tlv == Err(Error::Invalid));
            match *error {
                DecodeError::TlvStray { .. } | DecodeError::TlvPastEnd { .. } => {
                    assert!(unsound, "{error}");
                    vec![Known::TlvFraming]
                }
                DecodeError::Checksum { offset, found, .. } => {
                    assert_eq!(parsed.crc32c(), Some(found));
                    assert_wrong_checksum(header, offset, found);
                    vec![Known::Checksum]
                }
                DecodeError::SecondChecksum { .. } => vec![Known::Checksum],
                DecodeError::ChecksumLength { .. } => {
                    assert!(unsound, "{error}");
                    vec![Known::Checksum]
                }
                DecodeError::UniqueIdTooLong { found, .. } => {
                    assert!(found > 128);
                    vec![Known::UniqueIdLength]
                }
                other => panic!("unknown: {other}"),
            }
        }
    }
}

fn tlv_differences(ours: &[(u8, Vec<u8>)], parsed: &ProxyHeader<'_>) -> Vec<Known> {
    let theirs: Vec<_> = parsed.tlvs().collect();
    assert_eq!(ours.len(), theirs.len());
    let mut known = Vec::new();
    for ((kind, value), theirs) in ours.iter().zip(theirs) {
        let Ok(theirs) = theirs else {
            match kind {
                0x02 | 0x21..=0x25 | 0x30 => assert!(std::str::from_utf8(value).is_err()),
                0x20 => assert!(value.len() < 5),
                _ => panic!("unknown: TLV {kind:02x} {value:02x?}"),
            }
            known.push(Known::TypedValue);
            continue;
        };
        let mut written = Vec::new();
        theirs.encode(&mut written);
        if *kind == 0x04 && value.iter().any(|byte| *byte != 0) {
            assert_eq!(written, wire::tlv(0x04, &vec![0; value.len()]));
            known.push(Known::NoopBytes);
        } else {
            assert_eq!(written, wire::tlv(*kind, value));
        }
    }
    known
}

proptest! {
    #![proptest_config(cases(5000))]

    #[test]
    fn every_difference_is_on_the_list(datagram in datagram()) {
        differences(&datagram);
    }

    #[test]
    fn its_encoder_writes_what_we_write(
        from in any::<([u16; 8], u16)>(),
        to in any::<([u16; 8], u16)>(),
        v4 in any::<Option<([u8; 4], [u8; 4])>>(),
    ) {
        let (from, to) = match v4 {
            Some((a, b)) => ((a, from.1).into(), (b, to.1).into()),
            None => (from.into(), to.into()),
        };
        let mut theirs = Vec::new();
        let header = ProxyHeader::with_address(ProxiedAddress::datagram(from, to));
        header.encode_v2(&mut theirs).unwrap();
        let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
        prop_assert_eq!(ppv2::encode_udp(from, to, &mut buffer).unwrap(), theirs);
    }
}

#[test]
fn the_generator_meets_the_whole_list() {
    assert_eq!(met(differences), BTreeSet::from(ALL));
}

#[test]
fn each_difference_has_a_datagram() {
    let with_tlvs = |tlvs: &[u8]| wire::header(0x21, 0x12, &[&V4, tlvs].concat());
    for (known, datagram) in [
        (Known::LocalRefused, wire::header(0x20, 0x12, b"")),
        (Known::LocalRefused, wire::header(0x20, 0x10, &V4)),
        (
            Known::LocalTlvs,
            wire::header(0x20, 0x12, &[&V4[..], &[0x04, 0, 0]].concat()),
        ),
        (Known::UnspecTlvs, wire::header(0x21, 0x00, &V4)),
        (Known::UnixPaths, wire::header(0x21, 0x32, &[b'u'; 216])),
        (Known::TlvFraming, with_tlvs(&[0x04, 0])),
        (Known::TlvFraming, with_tlvs(&[0x04, 0, 1])),
        (Known::Checksum, with_tlvs(&[0x03, 0, 4, 0, 0, 0, 0])),
        (Known::Checksum, with_tlvs(&[0x03, 0, 0])),
        (
            Known::UniqueIdLength,
            with_tlvs(&wire::tlv(0x05, &[0; 129])),
        ),
        (Known::TypedValue, with_tlvs(&[0x02, 0, 1, 0xff])),
        (Known::TypedValue, with_tlvs(&[0x20, 0, 4, 0, 0, 0, 0])),
        (Known::NoopBytes, with_tlvs(&[0x04, 0, 1, 0x55])),
    ] {
        assert_eq!(differences(&datagram), [known], "{datagram:02x?}");
    }
}

/// Where it names an error otherwise, or refuses to write what we write.
#[test]
fn cut_addresses_and_mixed_families_are_treated_differently() {
    // The header is malformed, and no further byte can make it valid; it asks for more.
    let cut = wire::header(0x21, 0x12, &V4[..11]);
    let theirs = ProxyHeader::parse(&cut, V2_ONLY);
    assert_eq!(theirs.unwrap_err(), Error::BufferTooShort);
    let error = ppv2::decode(&cut).unwrap_err();
    assert!(matches!(error, DecodeError::AddressesCut { .. }));

    // It refuses; we write the IPv4 address v4-mapped.
    let (v4, v6) = ("192.0.2.1:1".parse().unwrap(), "[::1]:2".parse().unwrap());
    let mixed = ProxiedAddress {
        protocol: Protocol::Datagram,
        source: v4,
        destination: v6,
    };
    let theirs = ProxyHeader::with_address(mixed).encode_v2(&mut Vec::new());
    assert_eq!(theirs, Err(Error::AddressFamilyMismatch));
    let mut buffer = [0; 52];
    assert_eq!(ppv2::encode_udp(v4, v6, &mut buffer).unwrap()[13], 0x22);
}
