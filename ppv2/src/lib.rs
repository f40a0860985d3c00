//! PROXY protocol v2 for datagrams.
//!
//! A UDP proxy hides the clients' addresses from the server. It can pass them on in
//! a PROXY protocol v2 header in front of every datagram. This crate reads such a
//! header from a received datagram, and writes one into a buffer of the caller. It
//! does no I/O, contains no unsafe code and allocates nothing.
//!
//! ```text
//!  0            12 13 14   16               28 or 52            header end
//!  ├─ signature ─┼──┼──┼────┼─ addresses, ports ─┼─ TLVs, if any ─┼─ payload ──
//!                 │  │  └ length of what follows, up to the payload
//!                 │  └ family and transport: 0x12 UDP/IPv4, 0x22 UDP/IPv6, …
//!                 └ version 2 and command: 0x20 LOCAL, 0x21 PROXY
//! ```
//!
//! # Reading
//!
//! ```
//! let datagram = b"\r\n\r\n\0\r\nQUIT\n\x21\x12\x00\x0c\
//!                  \xcb\x00\x71\x0b\xc6\x33\x64\x0a\xd4\x31\x23\x28hello";
//!
//! let (header, payload) = ppv2::decode(datagram)?;
//!
//! assert_eq!(header.client(), Some("203.0.113.11:54321".parse().unwrap()));
//! assert_eq!(header.destination(), Some("198.51.100.10:9000".parse().unwrap()));
//! assert_eq!(payload, b"hello");
//! # Ok::<(), ppv2::DecodeError>(())
//! ```
//!
//! Call [`decode`] only for datagrams that *must* carry a header. The sender decides
//! that, never the bytes (specification, section 5). Drop a datagram that fails to
//! decode: there is no "need more bytes", since a header never spans two datagrams.
//!
//! # Writing
//!
//! ```
//! let client = "203.0.113.11:54321".parse().unwrap();
//! let listener = "198.51.100.10:9000".parse().unwrap();
//! let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
//!
//! let header = ppv2::encode_udp(client, listener, &mut buffer)?;
//!
//! assert_eq!(header.len(), ppv2::IPV4_HEADER_LEN);
//! # Ok::<(), ppv2::EncodeError>(())
//! ```
//!
//! [`Encoder`] writes everything else: LOCAL headers, TLVs, checksums.
//!
//! # Tagged replies
//!
//! A proxy may add a [`ReplyTag`] to each header ([`encode_udp_tagged`]). A server
//! that understands it puts the same header in front of each reply, and the proxy
//! reads from it which client the reply is for ([`decode_tagged`]). The tag is this project's,
//! not the specification's.
//!
//! # Simple Proxy Protocol and version 1
//!
//! [`spp`] reads and writes the header of 38 bytes that Cloudflare Spectrum and others
//! send over UDP. [`is_v1`] recognises the text of PROXY protocol v1, which has no place
//! in a datagram; nothing here reads an address from it.
//!
//! # Where the facts come from
//!
//! Section numbers in this crate's documentation are those of HAProxy's
//! [`proxy-protocol.txt`](https://www.haproxy.org/download/3.4/doc/proxy-protocol.txt) of
//! 2026-04-27.
//! Addresses and the fixed part are parsed by the [`ppp`] crate; this crate
//! adds what a datagram receiver needs beyond it: LOCAL headers of any shape,
//! the table of permitted family and transport pairs, TLV framing, checksums,
//! size limits, and errors that name the byte. The crate itself is `no_std`
//! and needs no allocator; `ppp` 2.3 still links `std`.

#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

#[cfg(test)]
extern crate std;

/// Has the examples of the README tested.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod block;
mod checksum;
mod decode;
mod encode;
mod error;
mod fixed;
mod header;
mod reply_tag;
pub mod spp;
mod ssl;
mod tlv;
mod tlv_type;
mod v1;

pub use decode::{Decoder, decode};
pub use encode::Encoder;
pub use error::{DecodeError, EncodeError, TaggedReplyError, TlvError};
pub use fixed::{encode_udp, encode_udp_tagged, udp_header_len};
pub use header::{Header, Origin, Transport};
pub use reply_tag::{
    IPV4_TAGGED_HEADER_LEN, IPV6_TAGGED_HEADER_LEN, MAX_TAGGED_HEADER_LEN, REPLY_TAG_LEN,
    REPLY_TAG_TLV_LEN, ReplyTag, TaggedReply, decode_tagged,
};
pub use ssl::Ssl;
pub use tlv::{Tlv, Tlvs, TlvsIter};
pub use tlv_type::{ParseTlvTypeError, TlvType};
pub use v1::is_v1;

/// The 12 bytes that open every header (section 2.2).
///
/// ```
/// assert_eq!(ppv2::SIGNATURE[7..], *b"QUIT\n");
/// ```
pub const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// Bytes before the addresses: signature, version and command, family and
/// transport, length (section 2.2).
pub const FIXED_LEN: usize = 16;

/// Bytes of a header that carries IPv4 addresses and no TLVs.
pub const IPV4_HEADER_LEN: usize = FIXED_LEN + 12;

/// Bytes of a header that carries IPv6 addresses and no TLVs.
pub const IPV6_HEADER_LEN: usize = FIXED_LEN + 36;

/// Bytes of a header that carries UNIX socket addresses and no TLVs.
pub const UNIX_HEADER_LEN: usize = FIXED_LEN + 216;

/// Bytes of the longest header that [`encode_udp`] writes.
///
/// ```
/// // Head-room in front of a received datagram, for any client's header.
/// let buffer = [0; ppv2::MAX_UDP_HEADER_LEN + 1500];
/// assert_eq!(buffer.len(), 1552);
/// ```
pub const MAX_UDP_HEADER_LEN: usize = IPV6_HEADER_LEN;

/// Bytes that a [CRC32C TLV](TlvType::CRC32C) adds to a header.
///
/// ```
/// let mut buffer = [0; ppv2::FIXED_LEN + ppv2::CRC32C_TLV_LEN];
/// let header = ppv2::Encoder::local(&mut buffer)?.crc32c()?.finish();
/// assert_eq!(header.len(), 23);
/// # Ok::<(), ppv2::EncodeError>(())
/// ```
pub const CRC32C_TLV_LEN: usize = TLV_PREFIX_LEN + 4;

/// Bytes of the longest header that a [`Decoder`] accepts unless told
/// otherwise. It leaves room for IPv6 addresses, a checksum and a few hundred
/// bytes of TLVs, and bounds what a sender can make a receiver walk through.
///
/// ```
/// let all = ppv2::UNIX_HEADER_LEN + 3 + ppv2::MAX_UNIQUE_ID_LEN + ppv2::CRC32C_TLV_LEN;
/// assert!(all < ppv2::DEFAULT_MAX_HEADER_LEN);
/// ```
pub const DEFAULT_MAX_HEADER_LEN: usize = 512;

/// Bytes of a TLV before its value: type and length (section 2.2).
pub(crate) const TLV_PREFIX_LEN: usize = 3;

/// Bytes of the longest [unique id](TlvType::UNIQUE_ID) (section 2.2.5).
pub const MAX_UNIQUE_ID_LEN: usize = 128;
