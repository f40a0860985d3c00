//! Reading a header off the front of a datagram.
//!
//! `ppp` parses the fixed part and the addresses. Around it stands what a
//! datagram receiver must hold besides: LOCAL headers of any shape, the table
//! of permitted pairs of family and transport, the size limit, TLV framing and
//! the checksum.

use core::net::{SocketAddr, SocketAddrV4, SocketAddrV6};

use crate::error::DecodeError;
use crate::tlv::{self, Tlvs};
use crate::{DEFAULT_MAX_HEADER_LEN, FIXED_LEN, SIGNATURE, TlvType, checksum};

const VERSION_COMMAND: usize = 12;
const FAMILY_TRANSPORT: usize = 13;
const LOCAL: u8 = 0x20;

/// Splits a datagram that is known to carry a header into header and payload,
/// with the default limit of [`DEFAULT_MAX_HEADER_LEN`] bytes for the header.
///
/// `datagram` is everything that one receive call returned. The payload is the
/// rest behind the header, and may be empty. Nothing is copied.
///
/// # Errors
///
/// A [`DecodeError`] naming the byte at fault. The datagram is to be dropped:
/// no part of it is trustworthy.
///
/// ```
/// let error = ppv2::decode(b"\r\n\r\n\0\r\nQUIT\n\x31\x12\x00\x00").unwrap_err();
/// assert_eq!(error.offset(), 12);
/// assert_eq!(error.to_string(), "byte 12: expected version 2, found version 3 in 0x31");
/// ```
pub fn decode(datagram: &[u8]) -> Result<(Header<'_>, &[u8]), DecodeError> {
    Decoder::new().decode(datagram)
}

/// Reads headers under a limit of the caller's choice.
///
/// ```
/// let decoder = ppv2::Decoder::new().max_header_len(28);
/// let datagram = b"\r\n\r\n\0\r\nQUIT\n\x21\x12\x00\x0f\
///                  \xcb\x00\x71\x0b\xc6\x33\x64\x0a\xd4\x31\x23\x28\x04\x00\x00";
///
/// let error = decoder.decode(datagram).unwrap_err();
/// assert_eq!(
///     error.to_string(),
///     "byte 14: a header of 31 bytes is longer than the limit of 28",
/// );
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decoder {
    max_header_len: usize,
}

impl Decoder {
    /// A decoder with the limit of [`DEFAULT_MAX_HEADER_LEN`] bytes.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            max_header_len: DEFAULT_MAX_HEADER_LEN,
        }
    }

    /// Sets the longest header to accept, in bytes, fixed part, addresses and
    /// TLVs together. Below 28 nothing but LOCAL and UNSPEC headers pass; no
    /// header exceeds 65,551.
    #[must_use]
    pub const fn max_header_len(mut self, bytes: usize) -> Self {
        self.max_header_len = bytes;
        self
    }

    /// Splits a datagram that is known to carry a header into header and
    /// payload. See [`decode`](crate::decode).
    ///
    /// # Errors
    ///
    /// A [`DecodeError`] naming the byte at fault.
    pub fn decode<'a>(&self, datagram: &'a [u8]) -> Result<(Header<'a>, &'a [u8]), DecodeError> {
        if has_local_command(datagram) {
            return self.decode_local(datagram);
        }
        let parsed = ppp::v2::Header::try_from(datagram).map_err(|e| located(&e, datagram))?;
        let (bytes, payload) = self.split(datagram, parsed.len())?;
        let (origin, addresses_len) = origin(&parsed, bytes)?;

        let header = Header {
            bytes,
            origin,
            tlvs: match origin {
                Origin::Local | Origin::Unspecified => Tlvs::default(),
                Origin::Ip { .. } | Origin::Unix { .. } => {
                    checked_tlvs(bytes, FIXED_LEN + addresses_len)?
                }
            },
        };
        Ok((header, payload))
    }

    /// A LOCAL header says nothing but its length: family, addresses and TLVs
    /// are skipped whatever they are (section 2.2). `ppp` would look at them.
    fn decode_local<'a>(&self, datagram: &'a [u8]) -> Result<(Header<'a>, &'a [u8]), DecodeError> {
        let &[.., high, low] =
            datagram
                .first_chunk::<FIXED_LEN>()
                .ok_or(DecodeError::TooShort {
                    len: datagram.len(),
                })?;
        let length = usize::from(u16::from_be_bytes([high, low]));
        let (bytes, payload) = self.split(datagram, FIXED_LEN + length)?;
        let header = Header {
            bytes,
            origin: Origin::Local,
            tlvs: Tlvs::default(),
        };
        Ok((header, payload))
    }

    /// Cuts the datagram behind a header of `header_len` bytes.
    fn split<'a>(
        &self,
        datagram: &'a [u8],
        header_len: usize,
    ) -> Result<(&'a [u8], &'a [u8]), DecodeError> {
        if header_len > self.max_header_len {
            return Err(DecodeError::TooLong {
                len: header_len,
                max: self.max_header_len,
            });
        }
        datagram
            .split_at_checked(header_len)
            .ok_or(DecodeError::PastEnd {
                length: header_len - FIXED_LEN,
                have: datagram.len(),
            })
    }
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

/// What a header says of where its datagram comes from.
///
/// LOCAL and UNSPEC have no addresses here, whatever bytes they carry, so that
/// none can be mistaken for a client's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Origin<'a> {
    /// Command LOCAL: the proxy itself speaks, for instance a health check. The
    /// sender of the datagram is the client (section 2.2).
    Local,
    /// Command PROXY with family and transport 0x00: on behalf of a client of
    /// which nothing is said (section 2.2).
    Unspecified,
    /// Command PROXY with IPv4 or IPv6 addresses.
    Ip {
        /// TCP or UDP.
        transport: Transport,
        /// The client's address and port. IPv6 addresses are as sent, a
        /// v4-mapped one included; flow label and scope are 0.
        source: SocketAddr,
        /// The address and port that the client sent to.
        destination: SocketAddr,
    },
    /// Command PROXY with UNIX socket paths, NUL-padded.
    Unix {
        /// Stream or datagram.
        transport: Transport,
        /// The client's path.
        source: &'a [u8; 108],
        /// The path that the client connected or sent to.
        destination: &'a [u8; 108],
    },
}

/// Transport over which the client came (section 2.2, byte 13, lower half).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP or a UNIX stream. It has no business in front of a datagram;
    /// receivers of datagrams drop it unless told otherwise.
    Stream,
    /// UDP or a UNIX datagram.
    Datagram,
}

/// A header that was read and found valid. It borrows from the datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header<'a> {
    bytes: &'a [u8],
    origin: Origin<'a>,
    tlvs: Tlvs<'a>,
}

impl<'a> Header<'a> {
    /// Command, family, transport and addresses.
    #[must_use]
    pub fn origin(&self) -> Origin<'a> {
        self.origin
    }

    /// The client's address and port, if the header names one over UDP.
    ///
    /// `None` for LOCAL, UNSPEC, UNIX and TCP headers; [`origin`](Self::origin)
    /// tells them apart.
    #[must_use]
    pub fn client(&self) -> Option<SocketAddr> {
        self.udp().map(|(source, _)| source)
    }

    /// The address and port that the client sent its datagram to, if the
    /// header names one over UDP.
    #[must_use]
    pub fn destination(&self) -> Option<SocketAddr> {
        self.udp().map(|(_, destination)| destination)
    }

    fn udp(&self) -> Option<(SocketAddr, SocketAddr)> {
        match self.origin {
            Origin::Ip {
                transport: Transport::Datagram,
                source,
                destination,
            } => Some((source, destination)),
            Origin::Ip { .. } | Origin::Local | Origin::Unspecified | Origin::Unix { .. } => None,
        }
    }

    /// The TLVs behind the addresses; none for LOCAL and UNSPEC.
    #[must_use]
    pub fn tlvs(&self) -> Tlvs<'a> {
        self.tlvs
    }

    /// The whole header, from the signature to the last TLV: 16 to 65,551 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The bytes behind the fixed part that a receiver must ignore, since the
    /// header is LOCAL or UNSPEC. Empty for any other header.
    ///
    /// A sender that is known to put TLVs there can be read with [`Tlvs::parse`].
    #[must_use]
    pub fn skipped(&self) -> &'a [u8] {
        match self.origin {
            Origin::Local | Origin::Unspecified => self.bytes.get(FIXED_LEN..).unwrap_or(&[]),
            Origin::Ip { .. } | Origin::Unix { .. } => &[],
        }
    }
}

fn has_local_command(datagram: &[u8]) -> bool {
    datagram.get(VERSION_COMMAND) == Some(&LOCAL) && datagram.starts_with(&SIGNATURE)
}

/// Turns what `ppp` read into our terms, and refuses the pairs of family and
/// transport that it lets through though section 2.2 does not list them.
/// The number is that of the address bytes.
fn origin<'a>(
    parsed: &ppp::v2::Header<'_>,
    bytes: &'a [u8],
) -> Result<(Origin<'a>, usize), DecodeError> {
    use ppp::v2::{Addresses, Protocol};

    let transport = match parsed.protocol {
        Protocol::Unspecified => None,
        Protocol::Stream => Some(Transport::Stream),
        Protocol::Datagram => Some(Transport::Datagram),
    };
    let origin = match (parsed.addresses, transport) {
        (Addresses::Unspecified, None) => Origin::Unspecified,
        (Addresses::IPv4(ip), Some(transport)) => Origin::Ip {
            transport,
            source: SocketAddrV4::new(ip.source_address, ip.source_port).into(),
            destination: SocketAddrV4::new(ip.destination_address, ip.destination_port).into(),
        },
        (Addresses::IPv6(ip), Some(transport)) => Origin::Ip {
            transport,
            source: SocketAddrV6::new(ip.source_address, ip.source_port, 0, 0).into(),
            destination: SocketAddrV6::new(ip.destination_address, ip.destination_port, 0, 0)
                .into(),
        },
        (Addresses::Unix(_), Some(transport)) => {
            let (source, destination) = unix_paths(bytes).ok_or_else(|| unlisted_pair(bytes))?;
            Origin::Unix {
                transport,
                source,
                destination,
            }
        }
        _ => return Err(unlisted_pair(bytes)),
    };
    Ok((origin, parsed.addresses.len()))
}

/// The two halves of the address block, which `ppp` copies where we borrow.
fn unix_paths(header: &[u8]) -> Option<(&[u8; 108], &[u8; 108])> {
    let (source, rest) = header.get(FIXED_LEN..)?.split_first_chunk()?;
    Some((source, rest.first_chunk()?))
}

fn unlisted_pair(bytes: &[u8]) -> DecodeError {
    DecodeError::FamilyTransport {
        found: bytes.get(FAMILY_TRANSPORT).copied().unwrap_or_default(),
    }
}

/// Checks the framing of the TLVs from `tlvs_at` on, and the checksum if there
/// is one.
fn checked_tlvs(header: &[u8], tlvs_at: usize) -> Result<Tlvs<'_>, DecodeError> {
    let bytes = header.get(tlvs_at..).unwrap_or(&[]);
    let mut checksum_at = None;
    tlv::walk(bytes, tlvs_at, |offset, tlv| {
        tlv::check_value(offset, tlv)?;
        if tlv.kind == TlvType::CRC32C && checksum_at.replace(offset).is_some() {
            return Err(DecodeError::SecondChecksum { offset });
        }
        Ok(())
    })?;
    let tlvs = Tlvs::from_walked(bytes);
    if let (Some(offset), Some(Ok(found))) = (checksum_at, tlvs.crc32c()) {
        let expected = checksum::of_header(header, offset + crate::TLV_PREFIX_LEN);
        if found != expected {
            return Err(DecodeError::Checksum {
                offset,
                found,
                expected,
            });
        }
    }
    Ok(tlvs)
}

/// Says in our terms what `ppp` refused, with the byte that it refused.
/// `ppp` has found the bytes that each of its errors speaks of to be there.
fn located(error: &ppp::v2::ParseError, datagram: &[u8]) -> DecodeError {
    use ppp::v2::ParseError;

    let at = |offset: usize| datagram.get(offset).copied().unwrap_or_default();
    let byte = at(VERSION_COMMAND);
    match *error {
        ParseError::Version(_) => DecodeError::Version {
            found: byte >> 4,
            byte,
        },
        ParseError::Command(_) => DecodeError::Command {
            found: byte & 0x0f,
            byte,
        },
        ParseError::AddressFamily(_) | ParseError::Protocol(_) => unlisted_pair(datagram),
        ParseError::InvalidAddresses(found, needed) => DecodeError::AddressesCut { found, needed },
        ParseError::Partial(_, length) => DecodeError::PastEnd {
            length,
            have: datagram.len(),
        },
        ParseError::Prefix
        | ParseError::Incomplete(_)
        | ParseError::InvalidTLV(..)
        | ParseError::Leftovers(_) => signature_error(datagram),
    }
}

fn signature_error(datagram: &[u8]) -> DecodeError {
    let differing = (0..)
        .zip(datagram.iter().zip(SIGNATURE))
        .find(|(_, (found, expected))| *found != expected);
    match differing {
        Some((offset, (&found, expected))) => DecodeError::Signature {
            offset,
            found,
            expected,
        },
        None => DecodeError::TooShort {
            len: datagram.len(),
        },
    }
}

#[cfg(test)]
mod tests {
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
            let expected = if listed.contains(&found) {
                None
            } else {
                Some(DecodeError::FamilyTransport { found })
            };
            assert_eq!(decode(&datagram).err(), expected, "{found:02x}");
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
}
