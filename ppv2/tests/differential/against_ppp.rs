//! Against `ppp` 2.3.0. The quotations are of the specification's section 2.2.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use ppp::v2::{Addresses, Builder, Command, ParseError, Protocol, Unix, Version};
use ppv2::{DecodeError, Encoder, Origin, TlvType, Transport};
use proptest::prelude::*;

use crate::common::{cases, wire};
use crate::{UNLIMITED, V4, assert_wrong_checksum, datagram, met, tlvs_of};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Known {
    /// It refuses a LOCAL header whose length is shorter than its family's
    /// block. We are right: receivers "must accept this connection as valid and
    /// must use the real connection endpoints and discard the protocol block
    /// including the family which is ignored".
    LocalCut,
    /// It refuses a LOCAL header of an unknown family or transport. As above.
    LocalPair,
    /// It hands out the transport, addresses and TLVs of a LOCAL header, so that
    /// a caller that ignores the command takes them for a client's. As above.
    LocalContent,
    /// It accepts 0x10, 0x20, 0x30, 0x01 and 0x02. We are right: "Other values
    /// are unspecified and must not be emitted in version 2 of this protocol and
    /// must be rejected as invalid by receivers".
    UnlistedPair,
    /// It accepts TLVs that overrun the header or leave stray bytes, and says so
    /// only to those who iterate that far. We refuse what can't be read whole.
    TlvFraming,
    /// A checksum is a TLV like any other to it. We are right: a receiver that
    /// supports it must verify it (2.2.3). Two, or one of another length than
    /// 4, can't be verified.
    Checksum,
    /// It accepts a UNIQUE_ID over the 128 bytes of 2.2.5, which we refuse.
    UniqueIdLength,
}

const ALL: [Known; 7] = [
    Known::LocalCut,
    Known::LocalPair,
    Known::LocalContent,
    Known::UnlistedPair,
    Known::TlvFraming,
    Known::Checksum,
    Known::UniqueIdLength,
];

/// Panics at a difference that is not on the list.
fn differences(datagram: &[u8]) -> Vec<Known> {
    let ours = UNLIMITED.decode(datagram);
    let theirs = ppp::v2::Header::try_from(datagram);
    let known = match (&ours, &theirs) {
        (Err(_), Err(_)) => return Vec::new(),
        (Ok((header, payload)), Ok(parsed)) => {
            assert_eq!(header.as_bytes(), parsed.as_bytes());
            assert_eq!(*payload, &datagram[parsed.len()..]);
            let local = parsed.command == Command::Local;
            assert_eq!(header.origin() == Origin::Local, local);
            if local && (parsed.length() > 0 || parsed.protocol != Protocol::Unspecified) {
                return vec![Known::LocalContent];
            }
            let addresses = (parsed.protocol, parsed.addresses);
            assert_eq!(in_their_terms(header.origin()), addresses);
            let tlvs: Result<Vec<_>, _> = parsed
                .tlvs()
                .map(|tlv| tlv.map(|tlv| (tlv.kind, tlv.value.to_vec())))
                .collect();
            assert_eq!(tlvs, Ok(tlvs_of(header)));
            return Vec::new();
        }
        (Ok((header, _)), Err(error)) => {
            assert_eq!(header.origin(), Origin::Local, "{error:?}");
            match error {
                ParseError::InvalidAddresses(..) => Known::LocalCut,
                ParseError::AddressFamily(_) | ParseError::Protocol(_) => Known::LocalPair,
                other => panic!("unknown: {other:?}"),
            }
        }
        (Err(error), Ok(parsed)) => {
            assert_eq!(parsed.command, Command::Proxy, "{error}");
            match *error {
                DecodeError::FamilyTransport { found } => {
                    assert!((found >> 4 == 0) != (found & 0x0f == 0), "{error}");
                    Known::UnlistedPair
                }
                DecodeError::TlvStray { .. } | DecodeError::TlvPastEnd { .. } => {
                    assert!(parsed.tlvs().any(|tlv| tlv.is_err()), "{error}");
                    Known::TlvFraming
                }
                DecodeError::Checksum { offset, found, .. } => {
                    assert_wrong_checksum(parsed.as_bytes(), offset, found);
                    Known::Checksum
                }
                DecodeError::ChecksumLength { .. } => {
                    let mut tlvs = parsed.tlvs().flatten();
                    assert!(tlvs.any(|tlv| tlv.kind == 0x03 && tlv.len() != 4));
                    Known::Checksum
                }
                DecodeError::SecondChecksum { .. } => {
                    let tlvs = parsed.tlvs().flatten();
                    assert!(tlvs.filter(|tlv| tlv.kind == 0x03).count() > 1);
                    Known::Checksum
                }
                DecodeError::UniqueIdTooLong { .. } => {
                    let mut tlvs = parsed.tlvs().flatten();
                    assert!(tlvs.any(|tlv| tlv.kind == 0x05 && tlv.len() > 128));
                    Known::UniqueIdLength
                }
                other => panic!("unknown: {other}"),
            }
        }
    };
    vec![known]
}

fn in_their_terms(origin: Origin<'_>) -> (Protocol, Addresses) {
    let protocol = |transport| match transport {
        Transport::Stream => Protocol::Stream,
        Transport::Datagram => Protocol::Datagram,
    };
    match origin {
        Origin::Ip {
            transport,
            source,
            destination,
        } => (protocol(transport), (source, destination).into()),
        Origin::Unix {
            transport,
            source,
            destination,
        } => (protocol(transport), Unix::new(*source, *destination).into()),
        _ => (Protocol::Unspecified, Addresses::Unspecified),
    }
}

proptest! {
    #![proptest_config(cases(5000))]

    #[test]
    fn every_difference_is_on_the_list(datagram in datagram()) {
        differences(&datagram);
    }

    #[test]
    fn the_builder_writes_what_we_write(
        (from, to) in prop_oneof![
            any::<([u8; 4], [u8; 4])>().prop_map(|(a, b)| (a.into(), b.into())),
            any::<([u16; 8], [u16; 8])>().prop_map(|(a, b)| (a.into(), b.into())),
        ],
        ports in any::<(u16, u16)>(),
        (kind, value) in wire::tlv_parts().prop_filter("ours alone", |(kind, value)| {
            *kind != 0x03 && value.len() <= 128
        }),
    ) {
        let (from, to): (std::net::IpAddr, std::net::IpAddr) = (from, to);
        let (from, to) = (SocketAddr::new(from, ports.0), SocketAddr::new(to, ports.1));
        let theirs = Builder::with_addresses(
            Version::Two | Command::Proxy,
            Protocol::Datagram,
            (from, to),
        );
        let theirs = theirs.write_tlv(kind, &value).unwrap().build().unwrap();

        let mut buffer = [0; 256];
        let ours = Encoder::udp(&mut buffer, from, to).unwrap();
        prop_assert_eq!(ours.tlv(TlvType(kind), &value).unwrap().finish(), theirs);
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
        (Known::LocalCut, wire::header(0x20, 0x12, b"")),
        (Known::LocalPair, wire::header(0x20, 0x4f, &V4)),
        (Known::LocalContent, wire::header(0x20, 0x12, &V4)),
        (Known::UnlistedPair, wire::header(0x21, 0x10, &V4)),
        (Known::UnlistedPair, wire::header(0x21, 0x02, &V4)),
        (Known::TlvFraming, with_tlvs(&[0x04, 0])),
        (Known::TlvFraming, with_tlvs(&[0x04, 0, 1])),
        (Known::Checksum, with_tlvs(&[0x03, 0, 4, 0, 0, 0, 0])),
        (Known::Checksum, with_tlvs(&[0x03, 0, 0])),
        (
            Known::UniqueIdLength,
            with_tlvs(&wire::tlv(0x05, &[0; 129])),
        ),
    ] {
        assert_eq!(differences(&datagram), [known], "{datagram:02x?}");
    }
}

/// Where it writes what we don't, or reads text, without a datagram to decode.
#[test]
fn mixed_families_and_text_are_treated_differently() {
    let v4: SocketAddr = "203.0.113.11:54321".parse().unwrap();
    let v6: SocketAddr = "[2001:db8::10]:9000".parse().unwrap();
    let mapped: SocketAddr = "[::ffff:203.0.113.11]:54321".parse().unwrap();

    // It drops both addresses; we write the IPv4 one v4-mapped.
    assert_eq!(Addresses::from((v4, v6)), Addresses::Unspecified);
    let mut buffer = [0; 52];
    assert_eq!(ppv2::encode_udp(v4, v6, &mut buffer).unwrap()[13], 0x22);

    // It writes a v4-mapped address as IPv6; we write the IPv4 address that it is.
    assert!(matches!(
        Addresses::from((mapped, mapped)),
        Addresses::IPv6(_)
    ));
    assert_eq!(
        ppv2::encode_udp(mapped, mapped, &mut buffer).unwrap()[13],
        0x12
    );

    // One of its entry points takes version 1, which is text and not for UDP.
    let text = b"PROXY TCP4 203.0.113.11 198.51.100.10 54321 9000\r\n";
    let parsed = ppp::HeaderResult::parse(text);
    assert!(matches!(parsed, ppp::HeaderResult::V1(Ok(_))));
    assert_eq!(ppv2::decode(text).unwrap_err().offset(), 0);

    // A cut header is a reason to wait for more to it, and final to us.
    use ppp::PartialResult;
    let cut = &wire::header(0x21, 0x12, &V4)[..27];
    assert!(ppp::v2::Header::try_from(cut).is_incomplete());
    assert!(matches!(
        ppv2::decode(cut),
        Err(DecodeError::PastEnd { .. })
    ));
}
