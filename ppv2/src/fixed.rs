//! The fixed part and the addresses, written in place: all that most datagrams
//! of a proxy need. TLVs are the [encoder](crate::Encoder)'s.

use core::net::{SocketAddr, SocketAddrV4, SocketAddrV6};

use crate::error::EncodeError;
use crate::header::Transport;
use crate::{FIXED_LEN, IPV4_HEADER_LEN, IPV6_HEADER_LEN, SIGNATURE};

pub(crate) const LOCAL: u8 = 0x20;
pub(crate) const PROXY: u8 = 0x21;

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
