//! The fixed part and the addresses, written in place: all that most datagrams
//! of a proxy need. TLVs are the [encoder](crate::Encoder)'s.

use core::net::{SocketAddr, SocketAddrV4, SocketAddrV6};

use crate::error::EncodeError;
use crate::header::Transport;
use crate::reply_tag::REPLY_TAG_PREFIX;
use crate::{
    FIXED_LEN, IPV4_HEADER_LEN, IPV4_TAGGED_HEADER_LEN, IPV6_HEADER_LEN, IPV6_TAGGED_HEADER_LEN,
    ReplyTag, SIGNATURE,
};

pub(crate) const LOCAL: u8 = 0x20;
pub(crate) const PROXY: u8 = 0x21;

/// The fixed part of a header with UDP over IPv4 and a reply tag.
pub(crate) const TAGGED_IPV4: [u8; FIXED_LEN] = *b"\r\n\r\n\0\r\nQUIT\n\x21\x12\x00\x19";

/// The fixed part of a header with UDP over IPv6 and a reply tag.
pub(crate) const TAGGED_IPV6: [u8; FIXED_LEN] = *b"\r\n\r\n\0\r\nQUIT\n\x21\x22\x00\x31";

/// Bytes that [`encode_udp`] writes for these addresses: 28 or 52.
///
/// ```
/// let v4 = "203.0.113.11:54321".parse().unwrap();
/// let v6 = "[2001:db8::1]:9000".parse().unwrap();
/// assert_eq!(ppv2::udp_header_len(v4, v4), 28);
/// assert_eq!(ppv2::udp_header_len(v4, v6), 52);
/// ```
#[must_use]
pub fn udp_header_len(client: SocketAddr, destination: SocketAddr) -> usize {
    match Pair::new(client, destination) {
        Pair::V4(..) => IPV4_HEADER_LEN,
        Pair::V6(..) => IPV6_HEADER_LEN,
    }
}

/// Writes the header that a proxy puts in front of a client's UDP datagram,
/// and returns it: the first 28 or 52 bytes of `buffer` (section 2.2).
///
/// `destination` is the address that the client sent to. A v4-mapped IPv6
/// address is written as IPv4; if only one of the two is IPv4, it is written
/// v4-mapped, and the header as IPv6. Scope and flow label have no place in a
/// header.
///
/// # Errors
///
/// [`EncodeError::BufferTooSmall`] if `buffer` is shorter than
/// [`udp_header_len`]; [`MAX_UDP_HEADER_LEN`](crate::MAX_UDP_HEADER_LEN) is
/// always enough.
///
/// ```
/// let client = "[::ffff:203.0.113.11]:54321".parse().unwrap();
/// let listener = "198.51.100.10:9000".parse().unwrap();
/// let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
///
/// let header = ppv2::encode_udp(client, listener, &mut buffer)?;
///
/// assert_eq!(header, b"\r\n\r\n\0\r\nQUIT\n\x21\x12\x00\x0c\
///                      \xcb\x00\x71\x0b\xc6\x33\x64\x0a\xd4\x31\x23\x28");
/// # Ok::<(), ppv2::EncodeError>(())
/// ```
pub fn encode_udp(
    client: SocketAddr,
    destination: SocketAddr,
    buffer: &mut [u8],
) -> Result<&[u8], EncodeError> {
    let len = write_ip(buffer, Transport::Datagram, client, destination)?;
    Ok(&buffer[..len])
}

/// Writes the header of [`encode_udp`] with a [`ReplyTag`] as its only TLV, and
/// returns it: the first 41 or 65 bytes of `buffer`.
///
/// A proxy puts it in front of a client's datagram; a server puts it in front of
/// its reply to a datagram that came with the tag, with the client, the destination
/// and the tag of that datagram's header.
///
/// # Errors
///
/// [`EncodeError::BufferTooSmall`] if `buffer` is shorter than [`udp_header_len`]
/// and [`REPLY_TAG_TLV_LEN`](crate::REPLY_TAG_TLV_LEN) together;
/// [`MAX_TAGGED_HEADER_LEN`](crate::MAX_TAGGED_HEADER_LEN) is always enough.
///
/// ```
/// let client = "203.0.113.11:54321".parse().unwrap();
/// let listener = "198.51.100.10:9000".parse().unwrap();
/// let tag = ppv2::ReplyTag::new(0, *b"abcdefgh");
/// let mut buffer = [0; ppv2::MAX_TAGGED_HEADER_LEN];
///
/// let header = ppv2::encode_udp_tagged(client, listener, tag, &mut buffer)?;
///
/// assert_eq!(header, b"\r\n\r\n\0\r\nQUIT\n\x21\x12\x00\x19\
///                      \xcb\x00\x71\x0b\xc6\x33\x64\x0a\xd4\x31\x23\x28\
///                      \xeb\x00\x0a\x01\x00abcdefgh");
/// # Ok::<(), ppv2::EncodeError>(())
/// ```
#[inline]
pub fn encode_udp_tagged(
    client: SocketAddr,
    destination: SocketAddr,
    tag: ReplyTag,
    buffer: &mut [u8],
) -> Result<&[u8], EncodeError> {
    // Arrays of known length, so that each copy is a store and none is checked.
    match Pair::new(client, destination) {
        Pair::V4(client, destination) => {
            let header = header_of::<IPV4_TAGGED_HEADER_LEN>(buffer)?;
            header[..16].copy_from_slice(&TAGGED_IPV4);
            header[16..20].copy_from_slice(&client.ip().octets());
            header[20..24].copy_from_slice(&destination.ip().octets());
            header[24..26].copy_from_slice(&client.port().to_be_bytes());
            header[26..28].copy_from_slice(&destination.port().to_be_bytes());
            header[28..32].copy_from_slice(&REPLY_TAG_PREFIX);
            header[31..].copy_from_slice(tag.value());
            Ok(header)
        }
        Pair::V6(client, destination) => {
            let header = header_of::<IPV6_TAGGED_HEADER_LEN>(buffer)?;
            header[..16].copy_from_slice(&TAGGED_IPV6);
            header[16..32].copy_from_slice(&client.ip().octets());
            header[32..48].copy_from_slice(&destination.ip().octets());
            header[48..50].copy_from_slice(&client.port().to_be_bytes());
            header[50..52].copy_from_slice(&destination.port().to_be_bytes());
            header[52..56].copy_from_slice(&REPLY_TAG_PREFIX);
            header[55..].copy_from_slice(tag.value());
            Ok(header)
        }
    }
}

/// The first `N` bytes of `buffer`.
fn header_of<const N: usize>(buffer: &mut [u8]) -> Result<&mut [u8; N], EncodeError> {
    let have = buffer.len();
    buffer
        .first_chunk_mut()
        .ok_or(EncodeError::BufferTooSmall { needed: N, have })
}

/// Two addresses brought to one family, as a header needs them.
enum Pair {
    V4(SocketAddrV4, SocketAddrV4),
    V6(SocketAddrV6, SocketAddrV6),
}

impl Pair {
    fn new(source: SocketAddr, destination: SocketAddr) -> Self {
        match (unmapped(source), unmapped(destination)) {
            (SocketAddr::V4(source), SocketAddr::V4(destination)) => Self::V4(source, destination),
            (source, destination) => Self::V6(mapped(source), mapped(destination)),
        }
    }
}

fn unmapped(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn mapped(address: SocketAddr) -> SocketAddrV6 {
    match address {
        SocketAddr::V4(v4) => SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0),
        SocketAddr::V6(v6) => v6,
    }
}

pub(crate) fn nibble(transport: Transport) -> u8 {
    match transport {
        Transport::Stream => 0x1,
        Transport::Datagram => 0x2,
    }
}

/// Writes fixed part and addresses, and returns how many bytes that took.
pub(crate) fn write_ip(
    buffer: &mut [u8],
    transport: Transport,
    source: SocketAddr,
    destination: SocketAddr,
) -> Result<usize, EncodeError> {
    match Pair::new(source, destination) {
        Pair::V4(source, destination) => {
            let family_transport = 0x10 | nibble(transport);
            let len = write_fixed(buffer, PROXY, family_transport, IPV4_HEADER_LEN)?;
            let block = &mut buffer[FIXED_LEN..len];
            block[..4].copy_from_slice(&source.ip().octets());
            block[4..8].copy_from_slice(&destination.ip().octets());
            block[8..10].copy_from_slice(&source.port().to_be_bytes());
            block[10..].copy_from_slice(&destination.port().to_be_bytes());
            Ok(len)
        }
        Pair::V6(source, destination) => {
            let family_transport = 0x20 | nibble(transport);
            let len = write_fixed(buffer, PROXY, family_transport, IPV6_HEADER_LEN)?;
            let block = &mut buffer[FIXED_LEN..len];
            block[..16].copy_from_slice(&source.ip().octets());
            block[16..32].copy_from_slice(&destination.ip().octets());
            block[32..34].copy_from_slice(&source.port().to_be_bytes());
            block[34..].copy_from_slice(&destination.port().to_be_bytes());
            Ok(len)
        }
    }
}

/// Writes the fixed part of a header of `len` bytes, and returns `len`.
pub(crate) fn write_fixed(
    buffer: &mut [u8],
    version_command: u8,
    family_transport: u8,
    len: usize,
) -> Result<usize, EncodeError> {
    if buffer.len() < len {
        return Err(EncodeError::BufferTooSmall {
            needed: len,
            have: buffer.len(),
        });
    }
    let length = length_field(len - FIXED_LEN)?;
    buffer[..12].copy_from_slice(&SIGNATURE);
    buffer[12] = version_command;
    buffer[13] = family_transport;
    buffer[14..16].copy_from_slice(&length);
    Ok(len)
}

pub(crate) fn length_field(len: usize) -> Result<[u8; 2], EncodeError> {
    u16::try_from(len)
        .map(u16::to_be_bytes)
        .map_err(|_| EncodeError::TooLong { len })
}
