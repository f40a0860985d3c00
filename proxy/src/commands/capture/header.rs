//! The header that a captured datagram begins with. A capture says nothing of who is
//! trusted, so the first bytes decide.

use std::net::{IpAddr, SocketAddr};

use ppv2::spp::{self, SPP_HEADER_LEN, SppHeader};
use ppv2::{DecodeError, Decoder, FIXED_LEN, Header, SIGNATURE};

use super::super::decode::version_1;

/// Bytes of the shortest beginning of a signature that is taken for one.
const SHORTEST_CUT: usize = 4;

/// What a datagram begins with.
#[derive(Debug)]
pub(super) enum Front<'a> {
    V2(Header<'a>, &'a [u8]),
    Spp(SppHeader, &'a [u8]),
    /// Text of version 1: its line, and what follows it.
    V1(String, &'a [u8]),
    /// The datagram ends in the middle of a header.
    Split(DecodeError),
    /// The signature, and a header that is wrong.
    Invalid(DecodeError),
    /// No header.
    Bare(&'a [u8]),
}

impl<'a> Front<'a> {
    pub(super) fn read(payload: &'a [u8]) -> Self {
        let is_cut_signature = payload.len() >= SHORTEST_CUT && SIGNATURE.starts_with(payload);
        if payload.starts_with(&SIGNATURE) || is_cut_signature {
            return match Decoder::new().max_header_len(usize::MAX).decode(payload) {
                Ok((header, rest)) => Self::V2(header, rest),
                Err(error @ (DecodeError::PastEnd { .. } | DecodeError::TooShort { .. })) => {
                    Self::Split(error)
                }
                Err(error) => Self::Invalid(error),
            };
        }
        if ppv2::is_v1(payload) {
            let (line, rest) = version_1(payload);
            return Self::V1(line, rest);
        }
        match spp::decode(payload) {
            Ok((header, rest)) if is_plausible(&header) => Self::Spp(header, rest),
            _ => Self::Bare(payload),
        }
    }

    /// The name of the format, if there is a header.
    pub(super) fn format(&self) -> Option<&'static str> {
        match self {
            Self::V2(..) | Self::Split(_) | Self::Invalid(_) => Some("PROXY v2"),
            Self::Spp(..) => Some("SPP"),
            Self::V1(..) => Some("PROXY v1"),
            Self::Bare(_) => None,
        }
    }
}

/// Whether two bytes of magic number are no accident: one payload in 65,536 has them.
fn is_plausible(header: &SppHeader) -> bool {
    [header.client, header.proxy]
        .iter()
        .all(|address: &SocketAddr| match address.ip() {
            IpAddr::V4(_) => true,
            // Global unicast, or for this host, link or site (RFC 4291, RFC 4193).
            IpAddr::V6(ip) => {
                ip.segments()[0] >> 13 == 1
                    || ip.is_loopback()
                    || ip.is_unicast_link_local()
                    || ip.is_unique_local()
            }
        })
}

/// The datagrams in `payload`. A sender's host captures a burst in one piece, before its
/// network interface cuts it (UDP_SEGMENT), and a receiver's may see it joined (UDP_GRO):
/// datagrams of one length, of which each begins with a header, and the last may be shorter.
pub(super) fn split_burst(payload: &[u8]) -> Vec<&[u8]> {
    let whole = vec![payload];
    let (first_len, sign): (_, &[u8]) = match Front::read(payload) {
        Front::V2(header, _) => (header.as_bytes().len(), &SIGNATURE),
        Front::Spp(..) => (SPP_HEADER_LEN, payload.get(..34).unwrap_or_default()),
        Front::V1(..) | Front::Split(_) | Front::Invalid(_) | Front::Bare(_) => return whole,
    };
    // The header is known to be whole, and a header behind a header is none of a burst.
    let from = first_len + 1;
    let next = payload
        .get(from..)
        .and_then(|rest| rest.windows(sign.len()).position(|bytes| bytes == sign));
    let Some(len) = next.map(|at| from + at) else {
        return whole;
    };
    let parts: Vec<_> = payload.chunks(len).collect();
    let is_datagram = |part: &&[u8]| part.len() >= FIXED_LEN && part.starts_with(sign);
    match parts.iter().all(is_datagram) {
        true => parts,
        false => whole,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: &str = "203.0.113.11:54321";
    const LISTENER: &str = "198.51.100.10:9000";

    fn v2(payload: &[u8]) -> Vec<u8> {
        let mut buffer = [0; 64];
        let [client, listener] = [CLIENT, LISTENER].map(|it| it.parse().unwrap());
        let header = ppv2::encode_udp(client, listener, &mut buffer).unwrap();
        [header, payload].concat()
    }

    #[test]
    fn bursts_are_taken_apart() {
        let burst = [v2(b"aaaa"), v2(b"bbbb"), v2(b"c")].concat();
        let parts: Vec<_> = split_burst(&burst)
            .iter()
            .map(|part| part[28..].to_vec())
            .collect();
        assert_eq!(parts, [&b"aaaa"[..], b"bbbb", b"c"]);

        // A header behind a header, a signature in a payload, and no header.
        for single in [
            v2(&v2(b"hello")),
            v2(&[b"x", &SIGNATURE[..], b"yz"].concat()),
            b"hi".to_vec(),
        ] {
            assert_eq!(split_burst(&single), [&single[..]]);
        }
        // The last is longer than the others.
        let odd = [v2(b"a"), v2(b"bb")].concat();
        assert_eq!(split_burst(&odd).len(), 1);
    }

    #[test]
    fn a_dns_query_with_the_magic_number_as_its_id_is_not_spp() {
        let query = b"\x56\xec\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07example\x03org\x00\x00\x01\x00\x01 more of it";
        assert!(query.len() >= SPP_HEADER_LEN);
        assert!(matches!(Front::read(query), Front::Bare(_)));
    }

    #[test]
    fn a_datagram_that_ends_in_a_header_is_split() {
        let whole = v2(b"");
        for len in SHORTEST_CUT..whole.len() {
            assert!(
                matches!(Front::read(&whole[..len]), Front::Split(_)),
                "{len}"
            );
        }
        assert!(matches!(Front::read(b"\r\n"), Front::Bare(_)));
    }
}
