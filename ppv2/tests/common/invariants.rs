//! What must hold of any datagram, whatever its bytes. The fuzz targets include
//! this file too, so that it depends on nothing but the crate under test.

use ppv2::spp::{self, SPP_HEADER_LEN, SPP_MAGIC, SppError};
use ppv2::{
    DEFAULT_MAX_HEADER_LEN, DecodeError, Decoder, FIXED_LEN, Header, Origin, ReplyTag, Ssl,
    TaggedReplyError, TlvType, Tlvs, Transport,
};

/// Decodes `datagram` with and without a limit, and panics if a promise of the
/// codec does not hold.
pub(crate) fn check(datagram: &[u8]) {
    let unlimited = Decoder::new().max_header_len(usize::MAX).decode(datagram);
    match &unlimited {
        Ok((header, payload)) => check_accepted(datagram, header, payload),
        Err(error) => check_refused(datagram, error),
    }

    let max = DEFAULT_MAX_HEADER_LEN;
    let expected = match (named_len(datagram), &unlimited) {
        // What the fixed part says is wrong stays wrong under any limit.
        (_, Err(error)) if error.offset() < FIXED_LEN => unlimited,
        (Some(len), _) if len > max => Err(DecodeError::TooLong { len, max }),
        _ => unlimited,
    };
    assert_eq!(ppv2::decode(datagram), expected);

    check_tlvs(datagram, Tlvs::parse(datagram));
    check_ssl(datagram);
    check_tagged(datagram);
    check_spp(datagram);
    check_v1(datagram);
}

/// Two bytes and a length decide whether a datagram carries an SPP header, and what
/// is read from it is written back as the very same bytes.
pub(crate) fn check_spp(datagram: &[u8]) {
    let magic = datagram.starts_with(&SPP_MAGIC);
    match spp::decode(datagram) {
        Ok((header, payload)) => {
            assert!(magic && datagram.len() >= SPP_HEADER_LEN);
            assert!(std::ptr::eq(payload, &datagram[SPP_HEADER_LEN..]));
            assert_eq!(header.to_bytes(), datagram[..SPP_HEADER_LEN]);
            for (address, ip_at, port_at) in [(header.client, 2, 34), (header.proxy, 18, 36)] {
                let mapped = &datagram[ip_at..ip_at + 12] == b"\0\0\0\0\0\0\0\0\0\0\xff\xff";
                assert_eq!(address.is_ipv4(), mapped);
                assert_eq!(address.port().to_be_bytes(), datagram[port_at..port_at + 2]);
            }
        }
        Err(error) => {
            let message = error.to_string();
            let offset = error.offset();
            assert!(offset <= datagram.len());
            assert!(
                message.starts_with(&format!("byte {offset}: ")),
                "{message}"
            );
            match error {
                SppError::TooShort { len } => {
                    assert_eq!(len, datagram.len());
                    assert!(len < 2 || magic);
                    assert!(len < SPP_HEADER_LEN);
                }
                SppError::Magic { offset, found, .. } => {
                    assert!(!magic);
                    assert_eq!(datagram.get(offset), Some(&found));
                }
                other => panic!("{other:?} is new"),
            }
        }
    }
}

/// Text of version 1 is neither of the two binary headers.
pub(crate) fn check_v1(datagram: &[u8]) {
    if ppv2::is_v1(datagram) {
        assert!(datagram.starts_with(b"PROXY "));
        assert!(ppv2::decode(datagram).is_err() && spp::decode(datagram).is_err());
    }
}

/// A tagged reply is what the decoder calls a header over UDP with one tag, and
/// every other datagram is refused with what it is instead.
pub(crate) fn check_tagged(datagram: &[u8]) {
    let (header, payload) = match ppv2::decode(datagram) {
        Ok(split) => split,
        Err(error) => {
            let expected = Err(TaggedReplyError::Header(error));
            return assert_eq!(ppv2::decode_tagged(datagram), expected);
        }
    };
    let tags: Vec<_> = header
        .tlvs()
        .iter()
        .filter(|tlv| tlv.kind == TlvType(0xeb) && tlv.value.len() == 10 && tlv.value[0] == 1)
        .map(|tlv| tlv.value)
        .collect();
    let only = match tags[..] {
        [tag] => Some(tag),
        _ => None,
    };
    let tag = header.tlvs().reply_tag();
    assert_eq!(tag.as_ref().map(ReplyTag::value).map(|v| &v[..]), only);
    let expected = match (header.origin(), &tags[..]) {
        (Origin::Local, _) => TaggedReplyError::Local,
        (Origin::Unspecified, _) => TaggedReplyError::Unspecified,
        (Origin::Unix { .. }, _) => TaggedReplyError::Unix,
        (
            Origin::Ip {
                transport: Transport::Stream,
                ..
            },
            _,
        ) => TaggedReplyError::Tcp,
        (_, []) => TaggedReplyError::NoTag,
        (_, [_]) => {
            let reply = ppv2::decode_tagged(datagram).expect("exactly one tag");
            assert_eq!(Some(reply.client), header.client());
            assert_eq!(Some(reply.destination), header.destination());
            assert_eq!(Some(reply.tag), tag);
            return assert!(std::ptr::eq(reply.payload, payload));
        }
        (_, [_, _, ..]) => TaggedReplyError::SecondTag,
    };
    assert_eq!(ppv2::decode_tagged(datagram), Err(expected));
}

/// The length of the whole header, as its length field has it.
fn named_len(datagram: &[u8]) -> Option<usize> {
    let field = datagram.get(14..FIXED_LEN)?;
    Some(FIXED_LEN + usize::from(field[0]) * 256 + usize::from(field[1]))
}

fn check_accepted(datagram: &[u8], header: &Header<'_>, payload: &[u8]) {
    let bytes = header.as_bytes();
    assert_eq!(Some(bytes.len()), named_len(datagram));
    // The very bytes of the datagram, not equal ones from elsewhere.
    assert!(std::ptr::eq(bytes, &datagram[..bytes.len()]));
    assert!(std::ptr::eq(payload, &datagram[bytes.len()..]));

    let tlvs = header.tlvs();
    let addresses_len = match header.origin() {
        Origin::Ip { source, .. } if source.is_ipv4() => Some(12),
        Origin::Ip { .. } => Some(36),
        Origin::Unix { .. } => Some(216),
        Origin::Local | Origin::Unspecified | _ => None,
    };
    let (skipped, tlv_bytes) = match addresses_len {
        Some(len) => (&[][..], &bytes[FIXED_LEN + len..]),
        None => (&bytes[FIXED_LEN..], &[][..]),
    };
    assert_eq!(header.skipped(), skipped);
    assert_eq!(tlvs.as_bytes(), tlv_bytes);
    check_tlvs(tlvs.as_bytes(), Ok(tlvs));
    assert!(tlvs.crc32c().is_none_or(|value| value.is_ok()));
    assert!(tlvs.unique_id().is_none_or(|id| id.len() <= 128));

    let over_udp = matches!(
        header.origin(),
        Origin::Ip {
            transport: Transport::Datagram,
            ..
        }
    );
    assert_eq!(header.client().is_some(), over_udp);
    assert_eq!(header.destination().is_some(), over_udp);
}

fn check_refused(datagram: &[u8], error: &DecodeError) {
    assert!(error.offset() <= datagram.len());
    let message = error.to_string();
    assert!(
        message.starts_with(&format!("byte {}: ", error.offset())),
        "{message}"
    );
    assert!(!message.ends_with('.'), "{message}");
}

/// Well framed or refused with the byte; in either case the walk ends within
/// one step for every three bytes, and no getter panics.
fn check_tlvs(bytes: &[u8], parsed: Result<Tlvs<'_>, DecodeError>) {
    let tlvs = match parsed {
        Ok(tlvs) => tlvs,
        Err(error) => return assert!(error.offset() < bytes.len()),
    };
    let mut steps = 0;
    let mut rest = bytes;
    for tlv in tlvs {
        steps += 1;
        assert!(steps <= bytes.len() / 3);
        assert_eq!(rest[0], tlv.kind.0);
        assert!(std::ptr::eq(&rest[3..3 + tlv.value.len()], tlv.value));
        rest = &rest[3 + tlv.value.len()..];
        assert!(tlvs.get(tlv.kind).is_some());
    }
    assert!(rest.is_empty());
    let _ = (tlvs.alpn(), tlvs.authority(), tlvs.crc32c(), tlvs.netns());
    let _ = (tlvs.unique_id(), tlvs.aws_vpc_endpoint_id());
    let _ = tlvs.azure_private_endpoint_link_id();
    let _ = tlvs.gcp_psc_connection_id();
    if let Some(value) = tlvs.get(TlvType::SSL) {
        assert_eq!(tlvs.ssl(), Some(Ssl::parse(value)));
        check_ssl(value);
    }
}

fn check_ssl(value: &[u8]) {
    let Ok(ssl) = Ssl::parse(value) else { return };
    assert!(ssl.tlvs().iter().count() <= value.len() / 3);
    let _ = (ssl.version(), ssl.common_name(), ssl.cipher(), ssl.group());
    let _ = (ssl.signature_algorithm(), ssl.key_algorithm());
    let _ = (ssl.signature_scheme(), ssl.client_certificate());
    let _ = (ssl.client(), ssl.verify(), ssl.is_tls(), ssl.is_verified());
}
