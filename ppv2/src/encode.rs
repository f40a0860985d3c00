//! Writing TLVs behind the fixed part and the addresses, into a buffer that the
//! caller owns.

use core::net::SocketAddr;

use crate::error::EncodeError;
use crate::fixed::{LOCAL, PROXY, length_field, nibble, write_fixed, write_ip};
use crate::header::Transport;
use crate::ssl::SSL_FIXED_LEN;
use crate::{
    CRC32C_TLV_LEN, FIXED_LEN, MAX_UNIQUE_ID_LEN, ReplyTag, TLV_PREFIX_LEN, TlvType,
    UNIX_HEADER_LEN, checksum,
};

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
    ///
    /// ```
    /// let mut buffer = [0; 16];
    /// let header = ppv2::Encoder::unspecified(&mut buffer)?.finish();
    /// assert_eq!(header[12..], [0x21, 0x00, 0, 0]);
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
    pub fn unspecified(buffer: &'b mut [u8]) -> Result<Self, EncodeError> {
        let len = write_fixed(buffer, PROXY, 0x00, FIXED_LEN)?;
        Ok(Self::behind(buffer, len))
    }

    /// Starts the header of a client's UDP datagram, as [`encode_udp`](crate::encode_udp) does.
    ///
    /// # Errors
    ///
    /// [`EncodeError::BufferTooSmall`] below 28 or 52 bytes.
    ///
    /// ```
    /// let client = "[2001:db8::1]:4242".parse().unwrap();
    /// let listener = "[2001:db8::10]:53".parse().unwrap();
    /// let mut buffer = [0; 80];
    /// let header = ppv2::Encoder::udp(&mut buffer, client, listener)?.crc32c()?.finish();
    /// assert_eq!(header.len(), ppv2::IPV6_HEADER_LEN + ppv2::CRC32C_TLV_LEN);
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
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
    ///
    /// ```
    /// let address = "192.0.2.1:443".parse().unwrap();
    /// let mut buffer = [0; 28];
    /// let header = ppv2::Encoder::tcp(&mut buffer, address, address)?.finish();
    /// assert_eq!(header[13], 0x11);
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
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
    ///
    /// ```
    /// use ppv2::{Encoder, Transport};
    ///
    /// let mut path = [0; 108];
    /// path[..13].copy_from_slice(b"/run/app.sock");
    /// let mut buffer = [0; ppv2::UNIX_HEADER_LEN];
    /// let header = Encoder::unix(&mut buffer, Transport::Datagram, &path, &path)?.finish();
    /// assert_eq!(header[13], 0x32);
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
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
    ///
    /// ```
    /// use ppv2::{EncodeError, Encoder, TlvType};
    ///
    /// let mut buffer = [0; 32];
    /// let header = Encoder::local(&mut buffer)?.tlv(TlvType(0xe7), b"eu")?.finish();
    /// assert_eq!(&header[14..], b"\x00\x05\xe7\x00\x02eu");
    ///
    /// let error = Encoder::local(&mut buffer)?.tlv(TlvType::CRC32C, &[0; 4]).unwrap_err();
    /// assert_eq!(error, EncodeError::Checksum);
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
    pub fn tlv(self, kind: TlvType, value: &[u8]) -> Result<Self, EncodeError> {
        self.tlv_of(kind, &[value])
    }

    /// Appends the protocol that was negotiated with the client (section 2.2.1).
    ///
    /// # Errors
    ///
    /// As [`tlv`](Self::tlv).
    ///
    /// ```
    /// let mut buffer = [0; 32];
    /// let header = ppv2::Encoder::local(&mut buffer)?.alpn(b"h3")?.finish();
    /// assert_eq!(&header[16..], b"\x01\x00\x02h3");
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
    pub fn alpn(self, protocol: &[u8]) -> Result<Self, EncodeError> {
        self.tlv(TlvType::ALPN, protocol)
    }

    /// Appends the host name that the client asked for (section 2.2.2).
    ///
    /// # Errors
    ///
    /// As [`tlv`](Self::tlv).
    ///
    /// ```
    /// let mut buffer = [0; 32];
    /// let header = ppv2::Encoder::local(&mut buffer)?.authority("a.test")?.finish();
    /// assert_eq!(&header[16..], b"\x02\x00\x06a.test");
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
    pub fn authority(self, host: &str) -> Result<Self, EncodeError> {
        self.tlv(TlvType::AUTHORITY, host.as_bytes())
    }

    /// Appends padding of `len` zero bytes, 3 more with its prefix (section 2.2.4).
    ///
    /// # Errors
    ///
    /// As [`tlv`](Self::tlv).
    ///
    /// ```
    /// // Pads a header of 28 bytes to 32.
    /// let address = "192.0.2.1:53".parse().unwrap();
    /// let mut buffer = [0; 32];
    /// let header = ppv2::Encoder::udp(&mut buffer, address, address)?.noop(1)?.finish();
    /// assert_eq!(header[28..], [0x04, 0, 1, 0]);
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
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
    ///
    /// ```
    /// use ppv2::{EncodeError, Encoder};
    ///
    /// let mut buffer = [0; 256];
    /// assert!(Encoder::local(&mut buffer)?.unique_id(&[7; 128]).is_ok());
    /// let error = Encoder::local(&mut buffer)?.unique_id(&[7; 129]).unwrap_err();
    /// assert_eq!(error, EncodeError::UniqueIdTooLong { len: 129 });
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
    pub fn unique_id(self, id: &[u8]) -> Result<Self, EncodeError> {
        self.tlv(TlvType::UNIQUE_ID, id)
    }

    /// Appends what is known of the client's TLS (section 2.2.6): the flags
    /// ([`Ssl::CLIENT_SSL`](crate::Ssl::CLIENT_SSL) and its siblings), the verify result, and TLVs
    /// of the `SSL_` types.
    ///
    /// # Errors
    ///
    /// As [`tlv`](Self::tlv).
    ///
    /// ```
    /// use ppv2::{Encoder, Ssl, TlvType};
    ///
    /// let mut buffer = [0; 32];
    /// let header = Encoder::local(&mut buffer)?
    ///     .ssl(Ssl::CLIENT_SSL, 1, &[(TlvType::SSL_CN, b"me")])?
    ///     .finish();
    /// assert_eq!(&header[16..], b"\x20\x00\x0a\x01\x00\x00\x00\x01\x22\x00\x02me");
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
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
    ///
    /// ```
    /// let mut buffer = [0; 32];
    /// let header = ppv2::Encoder::local(&mut buffer)?.netns("blue")?.finish();
    /// assert_eq!(&header[16..], b"\x30\x00\x04blue");
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
    pub fn netns(self, name: &str) -> Result<Self, EncodeError> {
        self.tlv(TlvType::NETNS, name.as_bytes())
    }

    /// Appends Amazon's VPC endpoint id.
    ///
    /// # Errors
    ///
    /// As [`tlv`](Self::tlv).
    ///
    /// ```
    /// let mut buffer = [0; 32];
    /// let header = ppv2::Encoder::local(&mut buffer)?.aws_vpc_endpoint_id("vpce-1")?.finish();
    /// assert_eq!(&header[16..], b"\xea\x00\x07\x01vpce-1");
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
    pub fn aws_vpc_endpoint_id(self, id: &str) -> Result<Self, EncodeError> {
        self.tlv_of(TlvType::AWS, &[&[0x01], id.as_bytes()])
    }

    /// Appends Azure's private endpoint link id.
    ///
    /// # Errors
    ///
    /// As [`tlv`](Self::tlv).
    ///
    /// ```
    /// let mut buffer = [0; 32];
    /// let encoder = ppv2::Encoder::local(&mut buffer)?;
    /// let header = encoder.azure_private_endpoint_link_id(0x01020304)?.finish();
    /// assert_eq!(&header[16..], b"\xee\x00\x05\x01\x04\x03\x02\x01");
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
    pub fn azure_private_endpoint_link_id(self, id: u32) -> Result<Self, EncodeError> {
        self.tlv_of(TlvType::AZURE, &[&[0x01], &id.to_le_bytes()])
    }

    /// Appends Google Cloud's Private Service Connect connection id.
    ///
    /// # Errors
    ///
    /// As [`tlv`](Self::tlv).
    ///
    /// ```
    /// let mut buffer = [0; 32];
    /// let header = ppv2::Encoder::local(&mut buffer)?.gcp_psc_connection_id(0x0102)?.finish();
    /// assert_eq!(&header[16..], b"\xe0\x00\x08\x00\x00\x00\x00\x00\x00\x01\x02");
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
    pub fn gcp_psc_connection_id(self, id: u64) -> Result<Self, EncodeError> {
        self.tlv(TlvType::GCP, &id.to_be_bytes())
    }

    /// Appends a reply tag, 13 bytes. [`encode_udp_tagged`](crate::encode_udp_tagged)
    /// is the fast way to a header with this TLV alone.
    ///
    /// # Errors
    ///
    /// As [`tlv`](Self::tlv).
    ///
    /// ```
    /// let mut buffer = [0; 32];
    /// let tag = ppv2::ReplyTag::new(0, *b"abcdefgh");
    /// let header = ppv2::Encoder::local(&mut buffer)?.reply_tag(tag)?.finish();
    /// assert_eq!(&header[16..], b"\xeb\x00\x0a\x01\x00abcdefgh");
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
    pub fn reply_tag(self, tag: ReplyTag) -> Result<Self, EncodeError> {
        self.tlv(TlvType::REPLY_TAG, tag.value())
    }

    /// Appends a checksum, 7 bytes (section 2.2.3). Its value is computed by
    /// [`finish`](Self::finish), so that TLVs may follow it.
    ///
    /// # Errors
    ///
    /// As [`tlv`](Self::tlv); [`EncodeError::Checksum`] if there is one already.
    ///
    /// ```
    /// use ppv2::Encoder;
    ///
    /// let address = "192.0.2.1:53".parse().unwrap();
    /// let mut buffer = [0; 64];
    /// let header = Encoder::udp(&mut buffer, address, address)?.crc32c()?.noop(2)?.finish();
    ///
    /// let mut changed = header.to_vec();
    /// changed[28 + 7 + 3] ^= 1;
    /// let error = ppv2::decode(&changed).unwrap_err();
    /// assert_eq!(error.offset(), 28);
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
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
    ///
    /// ```
    /// let mut buffer = [0xff; 20];
    /// assert_eq!(ppv2::Encoder::local(&mut buffer)?.finish().len(), 16);
    /// assert_eq!(buffer[16..], [0xff; 4], "the rest is left alone");
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
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
