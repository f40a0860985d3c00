//! TLVs: the optional facts behind the addresses, as raw bytes and as what
//! their type says they are.

use crate::error::{DecodeError, TlvError};
use crate::{MAX_UNIQUE_ID_LEN, ReplyTag, Ssl, TLV_PREFIX_LEN, TlvType};

/// One TLV: a type, and a value of 0 to 65,535 bytes.
///
/// ```
/// use ppv2::{TlvType, Tlvs};
///
/// let noop = Tlvs::parse(b"\x04\x00\x02\x00\x00")?.iter().next().unwrap();
/// assert_eq!((noop.kind, noop.value), (TlvType::NOOP, [0, 0].as_slice()));
/// # Ok::<(), ppv2::DecodeError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tlv<'a> {
    /// What the value is.
    pub kind: TlvType,
    /// The value's bytes; NULs and anything else may stand in them.
    pub value: &'a [u8],
}

/// The TLVs of a header: well framed, in the order in which they were sent.
///
/// [`get`](Self::get) and the typed getters return the *first* TLV of a type;
/// iterate to see duplicates. Only [`reply_tag`](Self::reply_tag) wants exactly one.
///
/// ```
/// use ppv2::{Encoder, TlvType};
///
/// let mut buffer = [0; 128];
/// let header = Encoder::udp(
///     &mut buffer,
///     "203.0.113.11:54321".parse().unwrap(),
///     "198.51.100.10:443".parse().unwrap(),
/// )?
/// .alpn(b"h3")?
/// .authority("example.org")?
/// .finish();
///
/// let (header, _payload) = ppv2::decode(header).unwrap();
/// let tlvs = header.tlvs();
/// assert_eq!(tlvs.alpn(), Some(b"h3".as_slice()));
/// assert_eq!(tlvs.authority(), Some(Ok("example.org")));
/// assert_eq!(tlvs.get(TlvType::NETNS), None);
/// assert_eq!(tlvs.iter().count(), 2);
/// # Ok::<(), ppv2::EncodeError>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tlvs<'a> {
    bytes: &'a [u8],
}

impl<'a> Tlvs<'a> {
    /// Checks that `bytes` are whole TLVs from the first byte to the last.
    ///
    /// [`decode`](crate::decode) has done this for a header's own TLVs. It is
    /// of use for the bytes that [`Header::skipped`](crate::Header::skipped)
    /// returns, if the sender is known to put TLVs there.
    ///
    /// # Errors
    ///
    /// [`DecodeError::TlvStray`] or [`DecodeError::TlvPastEnd`], with offsets
    /// counted from the start of `bytes`.
    ///
    /// ```
    /// let tlvs = ppv2::Tlvs::parse(&[0x04, 0, 0, 0x01, 0, 2, b'h', b'3'])?;
    /// assert_eq!(tlvs.iter().count(), 2);
    /// assert!(ppv2::Tlvs::parse(&[0x04, 0, 9]).is_err());
    /// # Ok::<(), ppv2::DecodeError>(())
    /// ```
    pub fn parse(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        walk(bytes, 0, |_, _| Ok(()))?;
        Ok(Self { bytes })
    }

    /// For bytes that [`walk`] has been through.
    pub(crate) fn from_walked(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// The TLVs in the order in which they were sent.
    ///
    /// ```
    /// // Three of type 0xe0, of which get() would return the first.
    /// let tlvs = ppv2::Tlvs::parse(b"\xe0\x00\x01a\xe0\x00\x00\xe0\x00\x01b")?;
    /// let values: Vec<_> = tlvs.iter().map(|tlv| tlv.value).collect();
    /// assert_eq!(values, [b"a".as_slice(), b"", b"b"]);
    /// # Ok::<(), ppv2::DecodeError>(())
    /// ```
    #[must_use]
    pub fn iter(&self) -> TlvsIter<'a> {
        TlvsIter { rest: self.bytes }
    }

    /// Whether there are none.
    ///
    /// ```
    /// assert!(ppv2::Tlvs::default().is_empty());
    /// assert!(!ppv2::Tlvs::parse(b"\x04\x00\x00")?.is_empty());
    /// # Ok::<(), ppv2::DecodeError>(())
    /// ```
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The bytes that the TLVs take in the header.
    ///
    /// ```
    /// let bytes = b"\x01\x00\x02h3\x04\x00\x00";
    /// assert_eq!(ppv2::Tlvs::parse(bytes)?.as_bytes(), bytes);
    /// # Ok::<(), ppv2::DecodeError>(())
    /// ```
    #[must_use]
    pub fn as_bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The value of the first TLV of type `kind`.
    ///
    /// ```
    /// use ppv2::{TlvType, Tlvs};
    ///
    /// // Bytes that authority() would refuse.
    /// let tlvs = Tlvs::parse(b"\x02\x00\x02\xff\x00")?;
    /// assert_eq!(tlvs.get(TlvType::AUTHORITY), Some(b"\xff\x00".as_slice()));
    /// # Ok::<(), ppv2::DecodeError>(())
    /// ```
    #[must_use]
    pub fn get(&self, kind: TlvType) -> Option<&'a [u8]> {
        self.iter()
            .find(|tlv| tlv.kind == kind)
            .map(|tlv| tlv.value)
    }

    /// The protocol that was negotiated with the client (section 2.2.1).
    ///
    /// ```
    /// let tlvs = ppv2::Tlvs::parse(b"\x01\x00\x02h3")?;
    /// assert_eq!(tlvs.alpn(), Some(b"h3".as_slice()));
    /// # Ok::<(), ppv2::DecodeError>(())
    /// ```
    #[must_use]
    pub fn alpn(&self) -> Option<&'a [u8]> {
        self.get(TlvType::ALPN)
    }

    /// The host name that the client asked for (section 2.2.2).
    ///
    /// # Errors
    ///
    /// [`TlvError::Text`] if it is not UTF-8; [`get`](Self::get) has the bytes.
    ///
    /// ```
    /// let tlvs = ppv2::Tlvs::parse("\x02\0\x0cbücher.test".as_bytes())?;
    /// assert_eq!(tlvs.authority(), Some(Ok("bücher.test")));
    /// # Ok::<(), ppv2::DecodeError>(())
    /// ```
    #[must_use]
    pub fn authority(&self) -> Option<Result<&'a str, TlvError>> {
        self.get(TlvType::AUTHORITY)
            .map(|value| utf8(TlvType::AUTHORITY, value))
    }

    /// The header's checksum, which [`decode`](crate::decode) has verified
    /// (section 2.2.3).
    ///
    /// # Errors
    ///
    /// [`TlvError::Length`] if it is not 4 bytes long, which a decoded header
    /// has been checked for.
    ///
    /// ```
    /// let mut buffer = [0; 23];
    /// let header = ppv2::Encoder::local(&mut buffer)?.crc32c()?.finish();
    /// let tlvs = ppv2::Tlvs::parse(&header[ppv2::FIXED_LEN..]).unwrap();
    /// assert_eq!(tlvs.crc32c(), Some(Ok(0xa9b8_7e8f)));
    /// # Ok::<(), ppv2::EncodeError>(())
    /// ```
    #[must_use]
    pub fn crc32c(&self) -> Option<Result<u32, TlvError>> {
        self.get(TlvType::CRC32C)
            .map(|value| exactly(TlvType::CRC32C, value).map(u32::from_be_bytes))
    }

    /// The flow's opaque id, at most 128 bytes in a decoded header
    /// (section 2.2.5).
    ///
    /// ```
    /// let tlvs = ppv2::Tlvs::parse(b"\x05\x00\x04\xde\xad\xbe\xef")?;
    /// assert_eq!(tlvs.unique_id(), Some([0xde, 0xad, 0xbe, 0xef].as_slice()));
    /// # Ok::<(), ppv2::DecodeError>(())
    /// ```
    #[must_use]
    pub fn unique_id(&self) -> Option<&'a [u8]> {
        self.get(TlvType::UNIQUE_ID)
    }

    /// What is known of the client's TLS (section 2.2.6).
    ///
    /// # Errors
    ///
    /// [`TlvError::TooShort`] below 5 bytes, [`TlvError::Nested`] if the TLVs
    /// inside are not well framed.
    ///
    /// ```
    /// let tlvs = ppv2::Tlvs::parse(b"\x20\x00\x04\x01\x00\x00\x00")?;
    /// assert_eq!(
    ///     tlvs.ssl().unwrap().unwrap_err().to_string(),
    ///     "SSL must have at least 5 bytes, found 4",
    /// );
    /// # Ok::<(), ppv2::DecodeError>(())
    /// ```
    #[must_use]
    pub fn ssl(&self) -> Option<Result<Ssl<'a>, TlvError>> {
        self.get(TlvType::SSL).map(Ssl::parse)
    }

    /// The network namespace's name (section 2.2.7).
    ///
    /// # Errors
    ///
    /// [`TlvError::Text`] if it is not ASCII.
    ///
    /// ```
    /// let tlvs = ppv2::Tlvs::parse(b"\x30\x00\x03b\xfce")?;
    /// assert_eq!(
    ///     tlvs.netns().unwrap().unwrap_err().to_string(),
    ///     "NETNS is not ASCII from byte 1 of its value on",
    /// );
    /// # Ok::<(), ppv2::DecodeError>(())
    /// ```
    #[must_use]
    pub fn netns(&self) -> Option<Result<&'a str, TlvError>> {
        self.get(TlvType::NETNS)
            .map(|value| ascii(TlvType::NETNS, value))
    }

    /// Amazon: the id of the VPC endpoint that the client came through, as in
    /// `vpce-08d2bf15fac5001c9` (Network Load Balancer user guide, "Proxy protocol").
    ///
    /// # Errors
    ///
    /// [`TlvError::TooShort`] for an empty value, [`TlvError::Subtype`] for
    /// another content than the endpoint's id, [`TlvError::Text`] if the id is
    /// not ASCII.
    ///
    /// ```
    /// let tlvs = ppv2::Tlvs::parse(b"\xea\x00\x0a\x01vpce-08d2")?;
    /// assert_eq!(tlvs.aws_vpc_endpoint_id(), Some(Ok("vpce-08d2")));
    /// # Ok::<(), ppv2::DecodeError>(())
    /// ```
    #[must_use]
    pub fn aws_vpc_endpoint_id(&self) -> Option<Result<&'a str, TlvError>> {
        self.get(TlvType::AWS)
            .map(|value| subtype(TlvType::AWS, 0x01, value).and_then(|id| ascii(TlvType::AWS, id)))
    }

    /// Azure: the link id of the private endpoint that the client came through
    /// (Private Link service overview, "TCP proxy v2").
    ///
    /// # Errors
    ///
    /// [`TlvError::TooShort`] for an empty value, [`TlvError::Subtype`] for
    /// another content than the link's id, [`TlvError::Length`] if the value
    /// is not 5 bytes long.
    ///
    /// ```
    /// let tlvs = ppv2::Tlvs::parse(&[0xee, 0, 5, 0x01, 0x04, 0x03, 0x02, 0x01])?;
    /// assert_eq!(tlvs.azure_private_endpoint_link_id(), Some(Ok(0x01020304)));
    /// # Ok::<(), ppv2::DecodeError>(())
    /// ```
    #[must_use]
    pub fn azure_private_endpoint_link_id(&self) -> Option<Result<u32, TlvError>> {
        self.get(TlvType::AZURE).map(|value| {
            let id = subtype(TlvType::AZURE, 0x01, value)?;
            let id: [u8; 4] = id.try_into().map_err(|_| TlvError::Length {
                kind: TlvType::AZURE,
                expected: 5,
                found: value.len(),
            })?;
            Ok(u32::from_le_bytes(id))
        })
    }

    /// The tag that a server returns with its replies to this client, so that the
    /// proxy knows which client they are for. See [`ReplyTag`].
    ///
    /// TLVs of this type that are of another version or length do not count.
    /// `None` without a tag, and `None` with two: nobody can say which one the
    /// proxy would recognise.
    ///
    /// ```
    /// use ppv2::{ReplyTag, Tlvs};
    ///
    /// let bytes = b"\xeb\x00\x0a\x01\x00abcdefgh";
    /// let tag = ReplyTag::new(0, *b"abcdefgh");
    /// assert_eq!(Tlvs::parse(bytes)?.reply_tag(), Some(tag));
    /// assert_eq!(Tlvs::parse(&bytes.repeat(2))?.reply_tag(), None);
    /// # Ok::<(), ppv2::DecodeError>(())
    /// ```
    #[must_use]
    #[inline]
    pub fn reply_tag(&self) -> Option<ReplyTag> {
        match self.reply_tags() {
            (tag, false) => tag,
            (_, true) => None,
        }
    }

    /// Google Cloud: the Private Service Connect connection that the client
    /// came through (Private Service Connect guide, "PROXY protocol").
    ///
    /// # Errors
    ///
    /// [`TlvError::Length`] if the value is not 8 bytes long.
    ///
    /// ```
    /// let tlvs = ppv2::Tlvs::parse(&[0xe0, 0, 8, 0, 0, 0, 0, 0, 0, 0x01, 0x02])?;
    /// assert_eq!(tlvs.gcp_psc_connection_id(), Some(Ok(0x0102)));
    /// # Ok::<(), ppv2::DecodeError>(())
    /// ```
    #[must_use]
    pub fn gcp_psc_connection_id(&self) -> Option<Result<u64, TlvError>> {
        self.get(TlvType::GCP)
            .map(|value| exactly(TlvType::GCP, value).map(u64::from_be_bytes))
    }
}

impl<'a> IntoIterator for Tlvs<'a> {
    type Item = Tlv<'a>;
    type IntoIter = TlvsIter<'a>;

    fn into_iter(self) -> TlvsIter<'a> {
        self.iter()
    }
}

/// Iterator over [`Tlvs`]. It ends for any input: every step consumes at least
/// three bytes.
///
/// ```
/// let mut tlvs = ppv2::Tlvs::parse(b"\x04\x00\x00\x04\x00\x00")?.iter();
/// assert!(tlvs.next().is_some() && tlvs.next().is_some());
/// assert_eq!(tlvs.next(), None);
/// # Ok::<(), ppv2::DecodeError>(())
/// ```
#[derive(Clone, Debug)]
pub struct TlvsIter<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for TlvsIter<'a> {
    type Item = Tlv<'a>;

    fn next(&mut self) -> Option<Tlv<'a>> {
        let (tlv, rest) = split_first(self.rest)?;
        self.rest = rest;
        Some(tlv)
    }
}

/// The first TLV of `bytes` and what follows it, or `None` if no whole TLV
/// stands there.
fn split_first(bytes: &[u8]) -> Option<(Tlv<'_>, &[u8])> {
    let (&[kind, high, low], rest) = bytes.split_first_chunk::<TLV_PREFIX_LEN>()?;
    let length = usize::from(u16::from_be_bytes([high, low]));
    let (value, rest) = rest.split_at_checked(length)?;
    let kind = TlvType(kind);
    Some((Tlv { kind, value }, rest))
}

/// Checks the framing of `bytes` and shows each TLV to `each` with its offset.
/// `base` is the offset of the first byte.
pub(crate) fn walk<'a>(
    bytes: &'a [u8],
    base: usize,
    mut each: impl FnMut(usize, Tlv<'a>) -> Result<(), DecodeError>,
) -> Result<(), DecodeError> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let offset = base + (bytes.len() - rest.len());
        let Some((tlv, next)) = split_first(rest) else {
            return Err(misframed(rest, offset));
        };
        each(offset, tlv)?;
        rest = next;
    }
    Ok(())
}

/// Names what is wrong with bytes that [`split_first`] refused.
fn misframed(rest: &[u8], offset: usize) -> DecodeError {
    match *rest {
        [kind, high, low, ref value @ ..] => DecodeError::TlvPastEnd {
            offset,
            kind: TlvType(kind),
            length: usize::from(u16::from_be_bytes([high, low])),
            left: value.len(),
        },
        ref stray => DecodeError::TlvStray {
            offset,
            count: stray.len(),
        },
    }
}

/// Checks that are the header's own business rather than a getter's: types
/// whose malformed values make the whole header invalid.
pub(crate) fn check_value(offset: usize, tlv: Tlv<'_>) -> Result<(), DecodeError> {
    let found = tlv.value.len();
    match tlv.kind {
        TlvType::CRC32C if found != 4 => Err(DecodeError::ChecksumLength { offset, found }),
        TlvType::UNIQUE_ID if found > MAX_UNIQUE_ID_LEN => {
            Err(DecodeError::UniqueIdTooLong { offset, found })
        }
        _ => Ok(()),
    }
}

pub(crate) fn utf8(kind: TlvType, value: &[u8]) -> Result<&str, TlvError> {
    core::str::from_utf8(value).map_err(|error| TlvError::Text {
        kind,
        expected: "UTF-8",
        offset: error.valid_up_to(),
    })
}

pub(crate) fn ascii(kind: TlvType, value: &[u8]) -> Result<&str, TlvError> {
    match value.iter().position(|byte| !byte.is_ascii()) {
        None => utf8(kind, value),
        Some(offset) => Err(TlvError::Text {
            kind,
            expected: "ASCII",
            offset,
        }),
    }
}

fn exactly<const N: usize>(kind: TlvType, value: &[u8]) -> Result<[u8; N], TlvError> {
    value.try_into().map_err(|_| TlvError::Length {
        kind,
        expected: N,
        found: value.len(),
    })
}

fn subtype(kind: TlvType, expected: u8, value: &[u8]) -> Result<&[u8], TlvError> {
    match value.split_first() {
        Some((&found, rest)) if found == expected => Ok(rest),
        Some((&found, _)) => Err(TlvError::Subtype {
            kind,
            expected,
            found,
        }),
        None => Err(TlvError::TooShort {
            kind,
            expected: 1,
            found: 0,
        }),
    }
}
