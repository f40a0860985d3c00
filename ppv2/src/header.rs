//! What a header says, once it has been read and found valid.

use core::net::SocketAddr;

use crate::block::Block;
use crate::{FIXED_LEN, Tlvs};

/// What a header says of where its datagram comes from.
///
/// LOCAL and UNSPEC have no addresses here, whatever bytes they carry, so that
/// none can be mistaken for a client's.
///
/// ```
/// use ppv2::Origin;
///
/// let datagram = b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00ping";
/// let (header, _) = ppv2::decode(datagram)?;
/// let client = match header.origin() {
///     Origin::Local => Some("the proxy itself"),
///     Origin::Ip { .. } => Some("somebody behind the proxy"),
///     _ => None,
/// };
/// assert_eq!(client, Some("the proxy itself"));
/// # Ok::<(), ppv2::DecodeError>(())
/// ```
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
///
/// ```
/// use ppv2::{Origin, Transport};
///
/// let address = "192.0.2.1:53".parse().unwrap();
/// let mut buffer = [0; 28];
/// let header = ppv2::encode_udp(address, address, &mut buffer)?;
///
/// let (header, _) = ppv2::decode(header).unwrap();
/// assert!(matches!(
///     header.origin(),
///     Origin::Ip { transport: Transport::Datagram, .. },
/// ));
/// # Ok::<(), ppv2::EncodeError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP or a UNIX stream. It has no business in front of a datagram;
    /// receivers of datagrams drop it unless told otherwise.
    Stream,
    /// UDP or a UNIX datagram.
    Datagram,
}

/// A header that was read and found valid. It borrows from the datagram.
///
/// ```
/// let datagram = b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00ping";
/// let (header, payload) = ppv2::decode(datagram)?;
/// assert_eq!([header.as_bytes(), payload].concat(), datagram);
/// # Ok::<(), ppv2::DecodeError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) block: Block<'a>,
    pub(crate) tlvs: Tlvs<'a>,
}

impl<'a> Header<'a> {
    /// Command, family, transport and addresses.
    ///
    /// ```
    /// let datagram = b"\r\n\r\n\0\r\nQUIT\n\x21\x00\x00\x00";
    /// let (header, _) = ppv2::decode(datagram)?;
    /// assert_eq!(header.origin(), ppv2::Origin::Unspecified);
    /// # Ok::<(), ppv2::DecodeError>(())
    /// ```
    #[must_use]
    #[inline]
    pub fn origin(&self) -> Origin<'a> {
        self.block.origin()
    }

    /// The client's address and port, if the header names one over UDP.
    ///
    /// `None` for LOCAL, UNSPEC, UNIX and TCP headers; [`origin`](Self::origin)
    /// tells them apart.
    ///
    /// ```
    /// let client = "203.0.113.11:54321".parse().unwrap();
    /// let listener = "198.51.100.10:9000".parse().unwrap();
    /// let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
    ///
    /// let (header, _) = ppv2::decode(ppv2::encode_udp(client, listener, &mut buffer)?).unwrap();
    /// assert_eq!(header.client(), Some(client));
    ///
    /// let tcp = ppv2::Encoder::tcp(&mut buffer, client, listener)?.finish();
    /// assert_eq!(ppv2::decode(tcp).unwrap().0.client(), None);
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
    #[must_use]
    #[inline]
    pub fn client(&self) -> Option<SocketAddr> {
        self.block.udp().map(|(source, _)| source)
    }

    /// The address and port that the client sent its datagram to, if the
    /// header names one over UDP.
    ///
    /// ```
    /// let client = "203.0.113.11:54321".parse().unwrap();
    /// let listener = "[2001:db8::10]:9000".parse().unwrap();
    /// let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
    ///
    /// let (header, _) = ppv2::decode(ppv2::encode_udp(client, listener, &mut buffer)?).unwrap();
    /// assert_eq!(header.destination(), Some(listener));
    /// // One of the two is IPv6, so that the header has room for nothing else.
    /// assert_eq!(header.client().unwrap().to_string(), "[::ffff:203.0.113.11]:54321");
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
    #[must_use]
    #[inline]
    pub fn destination(&self) -> Option<SocketAddr> {
        self.block.udp().map(|(_, destination)| destination)
    }

    /// The TLVs behind the addresses; none for LOCAL and UNSPEC.
    ///
    /// ```
    /// let address = "192.0.2.1:53".parse().unwrap();
    /// let mut buffer = [0; 64];
    /// let header = ppv2::Encoder::udp(&mut buffer, address, address)?.netns("blue")?.finish();
    ///
    /// let (header, _) = ppv2::decode(header).unwrap();
    /// assert_eq!(header.tlvs().netns(), Some(Ok("blue")));
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
    #[must_use]
    pub fn tlvs(&self) -> Tlvs<'a> {
        self.tlvs
    }

    /// The whole header, from the signature to the last TLV: 16 to 65,551 bytes.
    ///
    /// ```
    /// let datagram = b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00ping";
    /// let (header, _) = ppv2::decode(datagram)?;
    /// assert_eq!(header.as_bytes().len(), ppv2::FIXED_LEN);
    /// # Ok::<(), ppv2::DecodeError>(())
    /// ```
    #[must_use]
    pub fn as_bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The bytes behind the fixed part that a receiver must ignore, since the
    /// header is LOCAL or UNSPEC. Empty for any other header.
    ///
    /// A sender that is known to put TLVs there can be read with [`Tlvs::parse`].
    ///
    /// ```
    /// use ppv2::{Encoder, TlvType, Tlvs};
    ///
    /// let mut buffer = [0; 32];
    /// let header = Encoder::local(&mut buffer)?.tlv(TlvType(0xe7), b"probe 7")?.finish();
    ///
    /// let (header, _) = ppv2::decode(header).unwrap();
    /// assert!(header.tlvs().is_empty());
    /// let tlvs = Tlvs::parse(header.skipped()).unwrap();
    /// assert_eq!(tlvs.get(TlvType(0xe7)), Some(b"probe 7".as_slice()));
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
    #[must_use]
    pub fn skipped(&self) -> &'a [u8] {
        if self.block.is_skipped() {
            self.bytes.get(FIXED_LEN..).unwrap_or(&[])
        } else {
            &[]
        }
    }
}
