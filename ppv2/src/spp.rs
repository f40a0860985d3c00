//! Simple Proxy Protocol (SPP): 38 bytes of one shape in front of every datagram.
//!
//! Cloudflare Spectrum and Tencent EdgeOne send it over UDP. Cloudflare's page
//! [Simple Proxy Protocol Header](https://developers.cloudflare.com/spectrum/reference/simple-proxy-protocol-header/)
//! is the specification.
//!
//! ```text
//!  0       2                18               34       36       38
//!  ├─ magic ┼─ client address ┼─ proxy address ─┼ client ┼ proxy ─┼─ payload ──
//!  56 ec     IPv6, or IPv4 as ::ffff:a.b.c.d      port     port
//! ```
//!
//! The proxy address is the one that the client sent its datagram to.
//!
//! A server puts the same header in front of each reply: the client and the proxy
//! do not swap places. The proxy reads from it which client the reply is for, and
//! strips it.
//!
//! # Reading
//!
//! ```
//! use ppv2::spp;
//!
//! let datagram = b"\x56\xec\
//!     \0\0\0\0\0\0\0\0\0\0\xff\xff\xcb\x00\x71\x0b\
//!     \0\0\0\0\0\0\0\0\0\0\xff\xff\xc6\x33\x64\x0a\
//!     \xd4\x31\x23\x28hello";
//!
//! let (header, payload) = spp::decode(datagram)?;
//!
//! assert_eq!(header.client, "203.0.113.11:54321".parse().unwrap());
//! assert_eq!(header.proxy, "198.51.100.10:9000".parse().unwrap());
//! assert_eq!(payload, b"hello");
//!
//! // The header of the reply is the request's.
//! let reply = [&header.to_bytes()[..], b"welcome"].concat();
//! assert_eq!(reply[..spp::SPP_HEADER_LEN], datagram[..spp::SPP_HEADER_LEN]);
//! # Ok::<(), spp::SppError>(())
//! ```
//!
//! Call [`decode`] only for datagrams that *must* carry a header. The sender decides
//! that, never the bytes: a magic of two bytes says nothing about a datagram.

use core::net::{IpAddr, SocketAddr};

use thiserror::Error;

use crate::EncodeError;

/// Bytes of every SPP header.
///
/// ```
/// // Head-room in front of a received datagram.
/// let buffer = [0; ppv2::spp::SPP_HEADER_LEN + 1500];
/// assert_eq!(buffer.len(), 1538);
/// ```
pub const SPP_HEADER_LEN: usize = 38;

/// The two bytes that open every SPP header (Cloudflare's page, "Magic Number").
///
/// ```
/// assert_eq!(u16::from_be_bytes(ppv2::spp::SPP_MAGIC), 0x56ec);
/// ```
pub const SPP_MAGIC: [u8; 2] = [0x56, 0xec];

/// What an SPP header says.
///
/// IPv4 addresses are IPv4 here, though they are v4-mapped on the wire. Each of the
/// two addresses is of its own family: a client over IPv4 and a proxy address of
/// IPv6 make a valid header. An IPv6 address has no flow label and no scope.
///
/// ```
/// use ppv2::spp::SppHeader;
///
/// let header = SppHeader {
///     client: "203.0.113.11:54321".parse().unwrap(),
///     proxy: "[2001:db8::10]:9000".parse().unwrap(),
/// };
/// let bytes = header.to_bytes();
/// assert_eq!(ppv2::spp::decode(&bytes), Ok((header, &[][..])));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SppHeader {
    /// The client's address and port.
    pub client: SocketAddr,
    /// The address and port that the client sent its datagram to.
    pub proxy: SocketAddr,
}

impl SppHeader {
    /// The header's bytes, for a datagram to a server or for a server's reply.
    ///
    /// ```
    /// use ppv2::spp::{self, SppHeader};
    ///
    /// let client = "203.0.113.11:54321".parse().unwrap();
    /// let proxy = "198.51.100.10:9000".parse().unwrap();
    /// let mut buffer = [0; spp::SPP_HEADER_LEN];
    ///
    /// assert_eq!(
    ///     spp::encode(client, proxy, &mut buffer),
    ///     Ok(&SppHeader { client, proxy }.to_bytes()[..]),
    /// );
    /// ```
    #[must_use]
    #[inline]
    pub fn to_bytes(&self) -> [u8; SPP_HEADER_LEN] {
        let mut bytes = [0; SPP_HEADER_LEN];
        bytes[..2].copy_from_slice(&SPP_MAGIC);
        bytes[2..18].copy_from_slice(&mapped(self.client.ip()));
        bytes[18..34].copy_from_slice(&mapped(self.proxy.ip()));
        bytes[34..36].copy_from_slice(&self.client.port().to_be_bytes());
        bytes[36..].copy_from_slice(&self.proxy.port().to_be_bytes());
        bytes
    }
}

/// Splits a datagram that is known to carry an SPP header into header and payload.
///
/// `datagram` is everything that one receive call returned. The payload is the rest
/// behind the header, and may be empty. Nothing is copied but the addresses.
///
/// Ports and addresses are what the bytes say: port 0 and `0.0.0.0` are for the
/// caller to judge.
///
/// # Errors
///
/// An [`SppError`] naming the byte at fault. Drop the datagram then.
///
/// ```
/// let error = ppv2::spp::decode(b"GET / HTTP/1.1\r\n\r\n").unwrap_err();
/// assert_eq!(error.offset(), 0);
/// assert_eq!(
///     error.to_string(),
///     "byte 0: expected 0x56 of the magic number 0x56ec, found 0x47",
/// );
/// ```
#[inline]
pub fn decode(datagram: &[u8]) -> Result<(SppHeader, &[u8]), SppError> {
    let Some((header, payload)) = datagram.split_first_chunk::<SPP_HEADER_LEN>() else {
        return Err(magic_error(datagram).unwrap_or(SppError::TooShort {
            len: datagram.len(),
        }));
    };
    if let Some(error) = magic_error(header) {
        return Err(error);
    }
    let header = SppHeader {
        client: address(&header[2..18], &header[34..36]),
        proxy: address(&header[18..34], &header[36..]),
    };
    Ok((header, payload))
}

/// Writes the header that a proxy puts in front of a client's datagram, and returns
/// it: the first 38 bytes of `buffer`.
///
/// `proxy` is the address that the client sent to. IPv4 addresses are written
/// v4-mapped, each for itself. Scope and flow label have no place in a header.
///
/// # Errors
///
/// [`EncodeError::BufferTooSmall`] if `buffer` is shorter than [`SPP_HEADER_LEN`].
/// [`SppHeader::to_bytes`] needs no buffer and has no error.
///
/// ```
/// use ppv2::spp;
///
/// let client = "203.0.113.11:54321".parse().unwrap();
/// let proxy = "198.51.100.10:9000".parse().unwrap();
/// let mut buffer = [0; spp::SPP_HEADER_LEN];
///
/// let header = spp::encode(client, proxy, &mut buffer)?;
///
/// assert_eq!(header[..2], spp::SPP_MAGIC);
/// assert_eq!(spp::decode(header).unwrap().0.client, client);
/// # Ok::<(), ppv2::EncodeError>(())
/// ```
#[inline]
pub fn encode(
    client: SocketAddr,
    proxy: SocketAddr,
    buffer: &mut [u8],
) -> Result<&[u8], EncodeError> {
    let have = buffer.len();
    let header: &mut [u8; SPP_HEADER_LEN] =
        buffer
            .first_chunk_mut()
            .ok_or(EncodeError::BufferTooSmall {
                needed: SPP_HEADER_LEN,
                have,
            })?;
    *header = SppHeader { client, proxy }.to_bytes();
    Ok(header)
}

/// Why a datagram that must carry an SPP header was not understood.
///
/// Both are final: no further bytes can make the datagram valid.
///
/// ```
/// use ppv2::spp::{self, SppError};
///
/// let cut = b"\x56\xec\0\0\0\0\0\0\0\0\0\0\xff\xff";
/// assert_eq!(spp::decode(cut), Err(SppError::TooShort { len: 14 }));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SppError {
    /// One of the first two bytes differs from [`SPP_MAGIC`]: not a header at all.
    #[error(
        "byte {offset}: expected 0x{expected:02x} of the magic number 0x56ec, found 0x{found:02x}"
    )]
    Magic {
        /// Position of the first byte that differs, 0 or 1.
        offset: usize,
        /// The byte that stands there.
        found: u8,
        /// The byte of the magic number that belongs there.
        expected: u8,
    },

    /// The datagram ends inside the 38 bytes that every header has.
    #[error("byte {len}: the datagram ends there, an SPP header has {SPP_HEADER_LEN} bytes")]
    TooShort {
        /// Bytes in the datagram.
        len: usize,
    },
}

impl SppError {
    /// Position in the datagram of the first byte at fault, counted from 0. For a
    /// datagram that is too short it is the first byte that is missing.
    ///
    /// ```
    /// assert_eq!(ppv2::spp::decode(b"\x56\xed").unwrap_err().offset(), 1);
    /// assert_eq!(ppv2::spp::decode(b"\x56\xec").unwrap_err().offset(), 2);
    /// ```
    #[must_use]
    pub fn offset(&self) -> usize {
        match *self {
            Self::Magic { offset, .. } => offset,
            Self::TooShort { len } => len,
        }
    }
}

fn magic_error(datagram: &[u8]) -> Option<SppError> {
    (0..)
        .zip(datagram.iter().zip(SPP_MAGIC))
        .find(|(_, (found, expected))| *found != expected)
        .map(|(offset, (&found, expected))| SppError::Magic {
            offset,
            found,
            expected,
        })
}

fn mapped(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// An address of 16 bytes and its port of 2, both of which the caller has cut.
fn address(ip: &[u8], port: &[u8]) -> SocketAddr {
    let ip: [u8; 16] = ip.first_chunk().copied().unwrap_or_default();
    let port: [u8; 2] = port.first_chunk().copied().unwrap_or_default();
    SocketAddr::new(IpAddr::from(ip).to_canonical(), u16::from_be_bytes(port))
}
