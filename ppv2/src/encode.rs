//! Writing a header into a buffer that the caller owns.

use core::net::{SocketAddr, SocketAddrV4, SocketAddrV6};

use crate::decode::Transport;
use crate::error::EncodeError;
use crate::ssl::SSL_FIXED_LEN;
use crate::{
    CRC32C_TLV_LEN, FIXED_LEN, IPV4_HEADER_LEN, IPV6_HEADER_LEN, MAX_UNIQUE_ID_LEN, SIGNATURE,
    TLV_PREFIX_LEN, TlvType, UNIX_HEADER_LEN, checksum,
};

const LOCAL: u8 = 0x20;
const PROXY: u8 = 0x21;
const MAX_LEN_FIELD: usize = u16::MAX as usize;

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

/// Writes a header piece by piece: addresses first, then TLVs in the order in
/// which they shall stand, then [`finish`](Self::finish).
///
/// ```
/// use ppv2::{Encoder, TlvType};
///
/// let mut buffer = [0; 64];
/// let header = Encoder::udp(
///     &mut buffer,
///     "203.0.113.11:54321".parse().unwrap(),
///     "198.51.100.10:9000".parse().unwrap(),
/// )?
/// .tlv(TlvType(0xe7), b"eu-west")?
/// .crc32c()?
/// .finish();
///
/// assert_eq!(header.len(), 28 + 3 + 7 + 3 + 4);
/// assert!(ppv2::decode(header).is_ok());
/// # Ok::<(), ppv2::EncodeError>(())
/// ```
#[derive(Debug)]
#[must_use = "the header is complete only after finish()"]
pub struct Encoder<'b> {
    buffer: &'b mut [u8],
    len: usize,
    checksum_at: Option<usize>,
}

impl<'b> Encoder<'b> {
    /// Starts a LOCAL header: 16 bytes, no addresses. A proxy sends it for
    /// datagrams of its own, such as health checks (section 2.2).
    ///
    /// # Errors
    ///
    /// [`EncodeError::BufferTooSmall`] below 16 bytes.
    ///
    /// ```
    /// let mut buffer = [0; 16];
    /// let header = ppv2::Encoder::local(&mut buffer)?.finish();
    /// assert_eq!(ppv2::decode(header).unwrap().0.origin(), ppv2::Origin::Local);
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
    pub fn local(buffer: &'b mut [u8]) -> Result<Self, EncodeError> {
        let len = write_fixed(buffer, LOCAL, 0x00, FIXED_LEN)?;
        Ok(Self::behind(buffer, len))
    }

    /// Starts a PROXY header that names no client, 16 bytes (section 2.2, UNSPEC).
    ///
    /// # Errors
    ///
    /// [`EncodeError::BufferTooSmall`] below 16 bytes.
    pub fn unspecified(buffer: &'b mut [u8]) -> Result<Self, EncodeError> {
        let len = write_fixed(buffer, PROXY, 0x00, FIXED_LEN)?;
        Ok(Self::behind(buffer, len))
    }

    /// Starts the header of a client's UDP datagram, as [`encode_udp`] does.
    ///
    /// # Errors
    ///
    /// [`EncodeError::BufferTooSmall`] below 28 or 52 bytes.
    pub fn udp(
        buffer: &'b mut [u8],
        client: SocketAddr,
        destination: SocketAddr,
    ) -> Result<Self, EncodeError> {
        let len = write_ip(buffer, Transport::Datagram, client, destination)?;
        Ok(Self::behind(buffer, len))
    }

    /// Starts the header of a client's TCP connection. A receiver of datagrams
    /// will usually drop it.
    ///
    /// # Errors
    ///
    /// [`EncodeError::BufferTooSmall`] below 28 or 52 bytes.
    pub fn tcp(
        buffer: &'b mut [u8],
        client: SocketAddr,
        destination: SocketAddr,
    ) -> Result<Self, EncodeError> {
        let len = write_ip(buffer, Transport::Stream, client, destination)?;
        Ok(Self::behind(buffer, len))
    }

    /// Starts a header that names UNIX sockets by their NUL-padded paths, 232 bytes.
    ///
    /// # Errors
    ///
    /// [`EncodeError::BufferTooSmall`] below 232 bytes.
    pub fn unix(
        buffer: &'b mut [u8],
        transport: Transport,
        source: &[u8; 108],
        destination: &[u8; 108],
    ) -> Result<Self, EncodeError> {
        let family_transport = 0x30 | nibble(transport);
        let len = write_fixed(buffer, PROXY, family_transport, UNIX_HEADER_LEN)?;
        let (from, to) = buffer[FIXED_LEN..len].split_at_mut(108);
        from.copy_from_slice(source);
        to.copy_from_slice(destination);
        Ok(Self::behind(buffer, len))
    }

    fn behind(buffer: &'b mut [u8], len: usize) -> Self {
        Self {
            buffer,
            len,
            checksum_at: None,
        }
    }

    /// Appends a TLV of any type but CRC32C: 3 bytes and the value.
    ///
    /// In a LOCAL or UNSPEC header the receiver skips it.
    ///
    /// # Errors
    ///
    /// [`EncodeError::TooLong`] if the header would exceed 65,551 bytes,
    /// [`EncodeError::BufferTooSmall`] if it would exceed the buffer,
    /// [`EncodeError::UniqueIdTooLong`] for a unique id over 128 bytes,
    /// [`EncodeError::Checksum`] for [`TlvType::CRC32C`].
    pub fn tlv(self, kind: TlvType, value: &[u8]) -> Result<Self, EncodeError> {
        self.tlv_of(kind, &[value])
    }

    /// Appends the protocol that was negotiated with the client (section 2.2.1).
    ///
    /// # Errors
    ///
    /// As [`tlv`](Self::tlv).
    pub fn alpn(self, protocol: &[u8]) -> Result<Self, EncodeError> {
        self.tlv(TlvType::ALPN, protocol)
    }

    /// Appends the host name that the client asked for (section 2.2.2).
    ///
    /// # Errors
    ///
    /// As [`tlv`](Self::tlv).
    pub fn authority(self, host: &str) -> Result<Self, EncodeError> {
        self.tlv(TlvType::AUTHORITY, host.as_bytes())
    }

    /// Appends padding of `len` zero bytes, 3 more with its prefix (section 2.2.4).
    ///
    /// # Errors
    ///
    /// As [`tlv`](Self::tlv).
    pub fn noop(self, len: usize) -> Result<Self, EncodeError> {
        let (mut this, at) = self.reserve(TlvType::NOOP, len)?;
        this.value_mut(at, len).fill(0);
        Ok(this)
    }

    /// Appends the flow's opaque id, at most 128 bytes (section 2.2.5).
    ///
    /// # Errors
    ///
    /// As [`tlv`](Self::tlv).
    pub fn unique_id(self, id: &[u8]) -> Result<Self, EncodeError> {
        self.tlv(TlvType::UNIQUE_ID, id)
    }

    /// Appends what is known of the client's TLS (section 2.2.6): the flags
    /// ([`Ssl::CLIENT_SSL`](crate::Ssl::CLIENT_SSL) and its siblings), the verify result, and TLVs of
    /// the `SSL_` types.
    ///
    /// # Errors
    ///
    /// As [`tlv`](Self::tlv).
    pub fn ssl(
        self,
        client: u8,
        verify: u32,
        tlvs: &[(TlvType, &[u8])],
    ) -> Result<Self, EncodeError> {
        let nested = tlvs.iter().fold(0usize, |sum, (_, value)| {
            sum.saturating_add(TLV_PREFIX_LEN + value.len())
        });
        let len = SSL_FIXED_LEN.saturating_add(nested);
        let (mut this, at) = self.reserve(TlvType::SSL, len)?;
        let mut rest = this.value_mut(at, len);
        put(&mut rest, &[client]);
        put(&mut rest, &verify.to_be_bytes());
        for (kind, value) in tlvs {
            put(&mut rest, &[kind.0]);
            put(&mut rest, &length_field(value.len())?);
            put(&mut rest, value);
        }
        Ok(this)
    }

    /// Appends a network namespace's name (section 2.2.7).
    ///
    /// # Errors
    ///
    /// As [`tlv`](Self::tlv).
    pub fn netns(self, name: &str) -> Result<Self, EncodeError> {
        self.tlv(TlvType::NETNS, name.as_bytes())
    }

    /// Appends Amazon's VPC endpoint id.
    ///
    /// # Errors
    ///
    /// As [`tlv`](Self::tlv).
    pub fn aws_vpc_endpoint_id(self, id: &str) -> Result<Self, EncodeError> {
        self.tlv_of(TlvType::AWS, &[&[0x01], id.as_bytes()])
    }

    /// Appends Azure's private endpoint link id.
    ///
    /// # Errors
    ///
    /// As [`tlv`](Self::tlv).
    pub fn azure_private_endpoint_link_id(self, id: u32) -> Result<Self, EncodeError> {
        self.tlv_of(TlvType::AZURE, &[&[0x01], &id.to_le_bytes()])
    }

    /// Appends Google Cloud's Private Service Connect connection id.
    ///
    /// # Errors
    ///
    /// As [`tlv`](Self::tlv).
    pub fn gcp_psc_connection_id(self, id: u64) -> Result<Self, EncodeError> {
        self.tlv(TlvType::GCP, &id.to_be_bytes())
    }

    /// Appends a checksum, 7 bytes (section 2.2.3). Its value is computed by
    /// [`finish`](Self::finish), so that TLVs may follow it.
    ///
    /// # Errors
    ///
    /// As [`tlv`](Self::tlv); [`EncodeError::Checksum`] if there is one already.
    pub fn crc32c(self) -> Result<Self, EncodeError> {
        if self.checksum_at.is_some() {
            return Err(EncodeError::Checksum);
        }
        let (mut this, at) = self.reserve(TlvType::CRC32C, CRC32C_TLV_LEN - TLV_PREFIX_LEN)?;
        this.checksum_at = Some(at);
        Ok(this)
    }

    /// Completes length and checksum and returns the header, which begins at
    /// the buffer's first byte.
    #[must_use]
    pub fn finish(self) -> &'b [u8] {
        let Self {
            buffer,
            len,
            checksum_at,
        } = self;
        let header = &mut buffer[..len];
        if let Some(at) = checksum_at {
            let checksum = checksum::of_header(header, at).to_be_bytes();
            header[at..at + checksum.len()].copy_from_slice(&checksum);
        }
        header
    }

    fn tlv_of(self, kind: TlvType, parts: &[&[u8]]) -> Result<Self, EncodeError> {
        let len = parts.iter().map(|part| part.len()).sum();
        match kind {
            TlvType::CRC32C => return Err(EncodeError::Checksum),
            TlvType::UNIQUE_ID if len > MAX_UNIQUE_ID_LEN => {
                return Err(EncodeError::UniqueIdTooLong { len });
            }
            _ => {}
        }
        let (mut this, at) = self.reserve(kind, len)?;
        let mut rest = this.value_mut(at, len);
        for part in parts {
            put(&mut rest, part);
        }
        Ok(this)
    }

    /// Makes room for a TLV, writes its prefix and the header's new length, and
    /// returns where its value belongs.
    fn reserve(self, kind: TlvType, value_len: usize) -> Result<(Self, usize), EncodeError> {
        let at = self.len + TLV_PREFIX_LEN;
        let end = at.saturating_add(value_len);
        let length = length_field(end - FIXED_LEN)?;
        let value_length = length_field(value_len)?;
        let have = self.buffer.len();
        if end > have {
            return Err(EncodeError::BufferTooSmall { needed: end, have });
        }
        let prefix = &mut self.buffer[self.len..at];
        prefix[0] = kind.0;
        prefix[1..].copy_from_slice(&value_length);
        self.buffer[FIXED_LEN - 2..FIXED_LEN].copy_from_slice(&length);
        Ok((Self { len: end, ..self }, at))
    }

    fn value_mut(&mut self, at: usize, len: usize) -> &mut [u8] {
        &mut self.buffer[at..at + len]
    }
}

/// Copies `bytes` to the front of `rest`, which [`Encoder::reserve`] has sized,
/// and moves `rest` behind them.
fn put(rest: &mut &mut [u8], bytes: &[u8]) {
    let (front, behind) = core::mem::take(rest).split_at_mut(bytes.len());
    front.copy_from_slice(bytes);
    *rest = behind;
}

fn length_field(len: usize) -> Result<[u8; 2], EncodeError> {
    u16::try_from(len)
        .map(u16::to_be_bytes)
        .map_err(|_| EncodeError::TooLong { len })
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

fn nibble(transport: Transport) -> u8 {
    match transport {
        Transport::Stream => 0x1,
        Transport::Datagram => 0x2,
    }
}

/// Writes fixed part and addresses, and returns how many bytes that took.
fn write_ip(
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
fn write_fixed(
    buffer: &mut [u8],
    version_command: u8,
    family_transport: u8,
    len: usize,
) -> Result<usize, EncodeError> {
    debug_assert!(len - FIXED_LEN <= MAX_LEN_FIELD);
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
