//! Reading a header off the front of a datagram.
//!
//! `ppp` parses the fixed part and the addresses. Around it stands what a
//! datagram receiver must hold besides: LOCAL headers of any shape, the table
//! of permitted pairs of family and transport, the size limit, TLV framing and
//! the checksum.

use crate::block::Block;
use crate::error::DecodeError;
use crate::fixed::{LOCAL, TAGGED_IPV4, TAGGED_IPV6};
use crate::header::{Header, Transport};
use crate::reply_tag::REPLY_TAG_PREFIX;
use crate::tlv::{self, Tlvs};
use crate::{
    DEFAULT_MAX_HEADER_LEN, FIXED_LEN, IPV4_HEADER_LEN, IPV4_TAGGED_HEADER_LEN, IPV6_HEADER_LEN,
    IPV6_TAGGED_HEADER_LEN, REPLY_TAG_TLV_LEN, SIGNATURE, TlvType, checksum,
};

const VERSION_COMMAND: usize = 12;
const FAMILY_TRANSPORT: usize = 13;

/// The pairs of address family and transport that section 2.2 lists.
const LISTED_PAIRS: [u8; 7] = [0x00, 0x11, 0x12, 0x21, 0x22, 0x31, 0x32];

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
#[inline]
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
    ///
    /// ```
    /// assert_eq!(ppv2::Decoder::new(), ppv2::Decoder::default());
    /// ```
    #[must_use]
    pub const fn new() -> Self {
        Self {
            max_header_len: DEFAULT_MAX_HEADER_LEN,
        }
    }

    /// Sets the longest header to accept, in bytes, fixed part, addresses and
    /// TLVs together. Below 28 nothing but LOCAL and UNSPEC headers pass; no
    /// header exceeds 65,551.
    ///
    /// ```
    /// // A health check, and a receiver that allows nothing else.
    /// let datagram = b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00ping";
    /// assert!(ppv2::Decoder::new().max_header_len(16).decode(datagram).is_ok());
    /// assert!(ppv2::Decoder::new().max_header_len(15).decode(datagram).is_err());
    /// ```
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
    ///
    /// ```
    /// // Received into a buffer with room for the longest datagram: pass what came.
    /// let mut buffer = [0; 65_535];
    /// buffer[..20].copy_from_slice(b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00ping");
    /// let (_, payload) = ppv2::Decoder::new().decode(&buffer[..20])?;
    /// assert_eq!(payload, b"ping");
    /// # Ok::<(), ppv2::DecodeError>(())
    /// ```
    #[inline]
    pub fn decode<'a>(&self, datagram: &'a [u8]) -> Result<(Header<'a>, &'a [u8]), DecodeError> {
        match self.decode_plain_udp(datagram) {
            Some(split) => Ok(split),
            None => self.decode_any(datagram),
        }
    }

    #[inline(never)]
    fn decode_any<'a>(&self, datagram: &'a [u8]) -> Result<(Header<'a>, &'a [u8]), DecodeError> {
        if has_local_command(datagram) {
            return self.decode_local(datagram);
        }
        let parsed = ppp::v2::Header::try_from(datagram).map_err(|e| located(&e, datagram))?;
        let block = block(&parsed, datagram)?;
        let (bytes, payload) = self.split(datagram, parsed.len())?;
        let tlvs = if block.is_skipped() {
            Tlvs::default()
        } else {
            checked_tlvs(bytes, FIXED_LEN + parsed.addresses.len())?
        };
        let header = Header { bytes, block, tlvs };
        Ok((header, payload))
    }

    /// The headers that nearly all datagrams have: UDP without a TLV, or with a
    /// reply tag alone. Those of one kind differ from each other in addresses and
    /// tag alone: one comparison tells that the rest is as it must be. `None` for
    /// any other header, valid or not.
    #[inline]
    fn decode_plain_udp<'a>(&self, datagram: &'a [u8]) -> Option<(Header<'a>, &'a [u8])> {
        let (fixed, rest) = datagram.split_first_chunk::<FIXED_LEN>()?;
        let (block, tlvs, payload) = match u128::from_be_bytes(*fixed) {
            UDP_IPV4 if self.max_header_len >= IPV4_HEADER_LEN => {
                let (block, payload) = rest.split_first_chunk()?;
                let block = Block::Ipv4(Transport::Datagram, block);
                (block, Tlvs::default(), payload)
            }
            UDP_IPV6 if self.max_header_len >= IPV6_HEADER_LEN => {
                let (block, payload) = rest.split_first_chunk()?;
                let block = Block::Ipv6(Transport::Datagram, block);
                (block, Tlvs::default(), payload)
            }
            UDP_IPV4_TAGGED if self.max_header_len >= IPV4_TAGGED_HEADER_LEN => {
                let (block, rest) = rest.split_first_chunk()?;
                let (tlvs, payload) = split_reply_tag(rest)?;
                (Block::Ipv4(Transport::Datagram, block), tlvs, payload)
            }
            UDP_IPV6_TAGGED if self.max_header_len >= IPV6_TAGGED_HEADER_LEN => {
                let (block, rest) = rest.split_first_chunk()?;
                let (tlvs, payload) = split_reply_tag(rest)?;
                (Block::Ipv6(Transport::Datagram, block), tlvs, payload)
            }
            _ => return None,
        };
        let header = Header {
            bytes: datagram.get(..datagram.len() - payload.len())?,
            block,
            tlvs,
        };
        Some((header, payload))
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
            block: Block::Local,
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
        let (header, payload) =
            datagram
                .split_at_checked(header_len)
                .ok_or(DecodeError::PastEnd {
                    length: header_len - FIXED_LEN,
                    have: datagram.len(),
                })?;
        if header_len > self.max_header_len {
            return Err(DecodeError::TooLong {
                len: header_len,
                max: self.max_header_len,
            });
        }
        Ok((header, payload))
    }
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

/// The fixed part of a header with nothing but UDP over IPv4.
const UDP_IPV4: u128 = u128::from_be_bytes(*b"\r\n\r\n\0\r\nQUIT\n\x21\x12\x00\x0c");

/// The fixed part of a header with nothing but UDP over IPv6.
const UDP_IPV6: u128 = u128::from_be_bytes(*b"\r\n\r\n\0\r\nQUIT\n\x21\x22\x00\x24");

/// The fixed parts of headers with a reply tag alone, or with other TLVs of the
/// same length together.
const UDP_IPV4_TAGGED: u128 = u128::from_be_bytes(TAGGED_IPV4);
const UDP_IPV6_TAGGED: u128 = u128::from_be_bytes(TAGGED_IPV6);

/// Splits a reply tag of version 1 off the front of `bytes`. `None` for anything
/// else, valid or not.
#[inline]
fn split_reply_tag(bytes: &[u8]) -> Option<(Tlvs<'_>, &[u8])> {
    let (tlv, payload) = bytes.split_first_chunk::<REPLY_TAG_TLV_LEN>()?;
    if *tlv.first_chunk()? != REPLY_TAG_PREFIX {
        return None;
    }
    Some((Tlvs::from_walked(tlv), payload))
}

fn has_local_command(datagram: &[u8]) -> bool {
    datagram.get(VERSION_COMMAND) == Some(&LOCAL) && datagram.starts_with(&SIGNATURE)
}

/// Turns what `ppp` read into our terms, borrowing where it copies, and refuses
/// the pairs of family and transport that it lets through though section 2.2
/// does not list them.
fn block<'a>(parsed: &ppp::v2::Header<'_>, datagram: &'a [u8]) -> Result<Block<'a>, DecodeError> {
    use ppp::v2::{Addresses, Protocol};

    let transport = match parsed.protocol {
        Protocol::Unspecified => None,
        Protocol::Stream => Some(Transport::Stream),
        Protocol::Datagram => Some(Transport::Datagram),
    };
    let addresses = datagram.get(FIXED_LEN..).unwrap_or(&[]);
    let block = match (parsed.addresses, transport) {
        (Addresses::Unspecified, None) => Some(Block::Unspecified),
        (Addresses::IPv4(_), Some(transport)) => addresses
            .first_chunk()
            .map(|block| Block::Ipv4(transport, block)),
        (Addresses::IPv6(_), Some(transport)) => addresses
            .first_chunk()
            .map(|block| Block::Ipv6(transport, block)),
        (Addresses::Unix(_), Some(transport)) => addresses
            .split_first_chunk()
            .and_then(|(source, rest)| Some((source, rest.first_chunk()?)))
            .map(|(source, destination)| Block::Unix(transport, source, destination)),
        _ => None,
    };
    block.ok_or_else(|| unlisted_pair(datagram))
}

fn unlisted_pair(datagram: &[u8]) -> DecodeError {
    DecodeError::FamilyTransport {
        found: datagram.get(FAMILY_TRANSPORT).copied().unwrap_or_default(),
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
        // `ppp` reads 0x10 as IPv4 and goes on to its length; byte 13 comes first.
        ParseError::InvalidAddresses(..) | ParseError::Partial(..)
            if !LISTED_PAIRS.contains(&at(FAMILY_TRANSPORT)) =>
        {
            unlisted_pair(datagram)
        }
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
mod tests;
