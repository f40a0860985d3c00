//! Any bytes at all. What must hold of them is what the property tests of
//! `ppv2` claim, and `ppp` must agree wherever it is not known to be wrong
//! (`ppv2/tests/differential/against_ppp.rs` has the list).
#![no_main]

use libfuzzer_sys::fuzz_target;
use ppp::v2::{Addresses, Command, ParseError, Protocol, Unix};
use ppv2::{DecodeError, Decoder, Header, Origin, Transport};

#[path = "../../ppv2/tests/common/invariants.rs"]
mod invariants;

fuzz_target!(|datagram: &[u8]| {
    invariants::check(datagram);
    agree_with_ppp(datagram);
});

fn agree_with_ppp(datagram: &[u8]) {
    let ours = Decoder::new().max_header_len(usize::MAX).decode(datagram);
    let theirs = ppp::v2::Header::try_from(datagram);
    match (ours, theirs) {
        (Err(_), Err(_)) => {}
        (Ok((header, payload)), Ok(parsed)) => {
            assert_eq!(header.as_bytes(), parsed.as_bytes());
            assert_eq!(payload, &datagram[parsed.len()..]);
            if parsed.command == Command::Local {
                assert_eq!(header.origin(), Origin::Local);
            } else {
                same_facts(&header, &parsed);
            }
        }
        (Ok((header, _)), Err(error)) => {
            assert_eq!(header.origin(), Origin::Local, "{error:?}");
            assert!(matches!(
                error,
                ParseError::InvalidAddresses(..)
                    | ParseError::AddressFamily(_)
                    | ParseError::Protocol(_)
            ));
        }
        (Err(error), Ok(parsed)) => {
            assert_eq!(parsed.command, Command::Proxy, "{error}");
            assert!(
                matches!(
                    error,
                    DecodeError::FamilyTransport { .. }
                        | DecodeError::TlvStray { .. }
                        | DecodeError::TlvPastEnd { .. }
                        | DecodeError::ChecksumLength { .. }
                        | DecodeError::Checksum { .. }
                        | DecodeError::SecondChecksum { .. }
                        | DecodeError::UniqueIdTooLong { .. }
                ),
                "{error}"
            );
        }
    }
}

fn same_facts(header: &Header<'_>, parsed: &ppp::v2::Header<'_>) {
    let over = |transport| match transport {
        Transport::Stream => Protocol::Stream,
        Transport::Datagram => Protocol::Datagram,
    };
    let (protocol, addresses) = match header.origin() {
        Origin::Ip {
            transport,
            source,
            destination,
        } => (over(transport), Addresses::from((source, destination))),
        Origin::Unix {
            transport,
            source,
            destination,
        } => (over(transport), Unix::new(*source, *destination).into()),
        _ => (Protocol::Unspecified, Addresses::Unspecified),
    };
    assert_eq!(protocol, parsed.protocol);
    assert_eq!(addresses, parsed.addresses);

    let mut theirs = parsed.tlvs();
    for ours in header.tlvs() {
        let theirs = theirs.next().expect("as many TLVs").expect("well framed");
        assert_eq!((ours.kind.0, ours.value), (theirs.kind, &*theirs.value));
    }
    assert!(theirs.next().is_none());
}
