//! What can be wrong with a header, a TLV's value, or a request to write one.
//! Every error names the byte, what was found there and what was expected.

use thiserror::Error;

use crate::{MAX_UNIQUE_ID_LEN, TlvType};

/// Why a datagram that must carry a header was not understood.
///
/// Every variant is final: no further bytes can make the datagram valid.
/// [`offset`](Self::offset) gives the position of the first byte at fault.
///
/// ```
/// use ppv2::DecodeError;
///
/// assert_eq!(
///     ppv2::decode(b"\r\n\r\n\0\r\nQUIT\n\x21\x10\x00\x00"),
///     Err(DecodeError::FamilyTransport { found: 0x10 }),
/// );
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// A byte of the signature differs (section 2.2): not a header at all.
    #[error("byte {offset}: expected 0x{expected:02x} of the signature, found 0x{found:02x}")]
    Signature {
        /// Position of the first byte that differs, below 12.
        offset: usize,
        /// The byte that stands there.
        found: u8,
        /// The byte of the signature that belongs there.
        expected: u8,
    },

    /// The datagram ends inside the 16 bytes that every header has.
    #[error("byte {len}: the datagram ends there, a header has at least 16 bytes")]
    TooShort {
        /// Bytes in the datagram.
        len: usize,
    },

    /// The version is not 2 (byte 12, upper half; section 2.2).
    #[error("byte 12: expected version 2, found version {found} in 0x{byte:02x}")]
    Version {
        /// The version that was named.
        found: u8,
        /// The whole byte.
        byte: u8,
    },

    /// The command is neither LOCAL nor PROXY (byte 12, lower half; section 2.2).
    #[error("byte 12: expected command 0 (LOCAL) or 1 (PROXY), found {found} in 0x{byte:02x}")]
    Command {
        /// The command that was named.
        found: u8,
        /// The whole byte.
        byte: u8,
    },

    /// Byte 13 names a pair of address family and transport outside the table
    /// of section 2.2.
    #[error(
        "byte 13: expected family and transport 00, 11, 12, 21, 22, 31 or 32, found {found:02x}"
    )]
    FamilyTransport {
        /// The byte that was found.
        found: u8,
    },

    /// The length in bytes 14 and 15 has no room for the addresses that the
    /// family calls for.
    #[error("byte 14: expected a length of at least {needed} for the addresses, found {found}")]
    AddressesCut {
        /// The length that was named.
        found: usize,
        /// Bytes that addresses of this family take: 12, 36 or 216.
        needed: usize,
    },

    /// The length in bytes 14 and 15 reaches past the end of the datagram.
    #[error(
        "byte 14: a length of {length} needs a datagram of at least {} bytes, it has {have}",
        length + 16
    )]
    PastEnd {
        /// The length that was named.
        length: usize,
        /// Bytes in the datagram.
        have: usize,
    },

    /// The header is longer than the receiver allows
    /// (see [`Decoder::max_header_len`](crate::Decoder::max_header_len)).
    #[error("byte 14: a header of {len} bytes is longer than the limit of {max}")]
    TooLong {
        /// Bytes of the whole header.
        len: usize,
        /// The receiver's limit.
        max: usize,
    },

    /// One or two bytes stand after the last TLV, too few to be another.
    #[error("byte {offset}: {count} stray byte(s) after the last TLV, a TLV has at least 3")]
    TlvStray {
        /// Position of the first stray byte.
        offset: usize,
        /// How many there are, 1 or 2.
        count: usize,
    },

    /// A TLV names more bytes than the header has left.
    #[error(
        "byte {offset}: {kind} says it has {length} bytes, the header has {left} left for them"
    )]
    TlvPastEnd {
        /// Position of the TLV's type byte.
        offset: usize,
        /// The TLV's type.
        kind: TlvType,
        /// The length that it names.
        length: usize,
        /// The bytes that are left for it.
        left: usize,
    },

    /// A CRC32C TLV is not four bytes long (section 2.2.3).
    #[error("byte {offset}: CRC32C must have 4 bytes, found {found}")]
    ChecksumLength {
        /// Position of the TLV's type byte.
        offset: usize,
        /// The bytes that it has.
        found: usize,
    },

    /// The checksum in the header is not the header's (section 2.2.3).
    #[error("byte {offset}: the header's CRC32C is {expected:08x}, found {found:08x}")]
    Checksum {
        /// Position of the TLV's type byte.
        offset: usize,
        /// The checksum that was carried.
        found: u32,
        /// The checksum that the header has.
        expected: u32,
    },

    /// A second CRC32C TLV: they can't both cover the header with one of them zeroed.
    #[error("byte {offset}: a second CRC32C, expected at most one")]
    SecondChecksum {
        /// Position of the second TLV's type byte.
        offset: usize,
    },

    /// A unique id is longer than 128 bytes (section 2.2.5).
    #[error("byte {offset}: UNIQUE_ID may have at most {MAX_UNIQUE_ID_LEN} bytes, found {found}")]
    UniqueIdTooLong {
        /// Position of the TLV's type byte.
        offset: usize,
        /// The bytes that it has.
        found: usize,
    },
}

impl DecodeError {
    /// Position in the datagram of the first byte at fault, counted from 0. For
    /// a datagram that is too short it is the first byte that is missing.
    ///
    /// ```
    /// let error = ppv2::decode(b"GET / HTTP/1.1\r\n\r\n").unwrap_err();
    /// assert_eq!(error.offset(), 0);
    /// assert_eq!(
    ///     error.to_string(),
    ///     "byte 0: expected 0x0d of the signature, found 0x47",
    /// );
    /// ```
    #[must_use]
    pub fn offset(&self) -> usize {
        match *self {
            Self::Signature { offset, .. }
            | Self::TlvStray { offset, .. }
            | Self::TlvPastEnd { offset, .. }
            | Self::ChecksumLength { offset, .. }
            | Self::Checksum { offset, .. }
            | Self::SecondChecksum { offset }
            | Self::UniqueIdTooLong { offset, .. } => offset,
            Self::TooShort { len } => len,
            Self::Version { .. } | Self::Command { .. } => 12,
            Self::FamilyTransport { .. } => 13,
            Self::AddressesCut { .. } | Self::PastEnd { .. } | Self::TooLong { .. } => 14,
        }
    }
}

/// Why a reply is not one that [`decode_tagged`](crate::decode_tagged) reads: one
/// header that names a client over UDP and carries exactly one
/// [`ReplyTag`](crate::ReplyTag).
///
/// ```
/// use ppv2::TaggedReplyError;
///
/// let local = b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00";
/// let error = ppv2::decode_tagged(local).unwrap_err();
/// assert_eq!(error, TaggedReplyError::Local);
/// assert_eq!(error.to_string(), "expected a header that names a client over UDP, found LOCAL");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TaggedReplyError {
    /// No valid header: a reply from a server that does not know the tag, or a
    /// malformed one.
    #[error(transparent)]
    Header(#[from] DecodeError),

    /// A LOCAL header names no client.
    #[error("expected a header that names a client over UDP, found LOCAL")]
    Local,

    /// A PROXY header without addresses names no client.
    #[error("expected a header that names a client over UDP, found UNSPEC")]
    Unspecified,

    /// A client over TCP gets no datagrams.
    #[error("expected a header that names a client over UDP, found TCP")]
    Tcp,

    /// A client at a UNIX socket is not reached over UDP.
    #[error("expected a header that names a client over UDP, found UNIX")]
    Unix,

    /// The header has no [`ReplyTag`](crate::ReplyTag) of version 1.
    #[error("the header carries no reply tag of version 1")]
    NoTag,

    /// The header has two [`ReplyTag`](crate::ReplyTag)s or more.
    #[error("the header carries more than one reply tag, expected exactly one")]
    SecondTag,
}

/// Why the value of a TLV is not what its type promises. The header itself is
/// valid; the raw bytes stay available through [`Tlvs::get`](crate::Tlvs::get).
///
/// ```
/// use ppv2::{TlvError, TlvType, Tlvs};
///
/// let tlvs = Tlvs::parse(b"\xe0\x00\x03abc")?;
/// let error = tlvs.gcp_psc_connection_id().unwrap().unwrap_err();
/// assert_eq!(error, TlvError::Length { kind: TlvType::GCP, expected: 8, found: 3 });
/// assert_eq!(tlvs.get(TlvType::GCP), Some(b"abc".as_slice()));
/// # Ok::<(), ppv2::DecodeError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TlvError {
    /// The value has the wrong number of bytes.
    #[error("{kind} must have {expected} bytes, found {found}")]
    Length {
        /// The TLV's type.
        kind: TlvType,
        /// Bytes that the type calls for.
        expected: usize,
        /// Bytes that are there.
        found: usize,
    },

    /// The value has fewer bytes than the type needs at least.
    #[error("{kind} must have at least {expected} bytes, found {found}")]
    TooShort {
        /// The TLV's type.
        kind: TlvType,
        /// Bytes that the type needs at least.
        expected: usize,
        /// Bytes that are there.
        found: usize,
    },

    /// The value is not the text that the type calls for: UTF-8, or ASCII.
    #[error("{kind} is not {expected} from byte {offset} of its value on")]
    Text {
        /// The TLV's type.
        kind: TlvType,
        /// `"UTF-8"` or `"ASCII"`.
        expected: &'static str,
        /// Position within the value of the first byte at fault.
        offset: usize,
    },

    /// The first byte of a cloud vendor's TLV names another content.
    #[error("{kind} must begin with subtype 0x{expected:02x}, found 0x{found:02x}")]
    Subtype {
        /// The TLV's type.
        kind: TlvType,
        /// The subtype that the getter reads.
        expected: u8,
        /// The subtype that is there.
        found: u8,
    },

    /// The TLVs inside an SSL TLV overrun it or leave stray bytes.
    #[error("{kind}: malformed TLV at byte {offset} of its value")]
    Nested {
        /// The TLV's type, [`TlvType::SSL`].
        kind: TlvType,
        /// Position within the value of the nested TLV's type byte.
        offset: usize,
    },
}

/// Why a header could not be written. The buffer's content is unspecified then.
///
/// ```
/// let address = "192.0.2.1:53".parse().unwrap();
/// assert_eq!(
///     ppv2::encode_udp(address, address, &mut [0; 20]),
///     Err(ppv2::EncodeError::BufferTooSmall { needed: 28, have: 20 }),
/// );
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The caller's buffer ends before the header does.
    #[error("the header needs {needed} bytes so far, the buffer has {have}")]
    BufferTooSmall {
        /// Bytes needed by what was asked for so far.
        needed: usize,
        /// Bytes in the buffer.
        have: usize,
    },

    /// Addresses and TLVs add up to more than the 16-bit length can say.
    #[error("addresses and TLVs of {len} bytes exceed the 65535 that a header can hold")]
    TooLong {
        /// Bytes after the fixed part.
        len: usize,
    },

    /// A unique id is longer than 128 bytes (section 2.2.5).
    #[error("UNIQUE_ID may have at most {MAX_UNIQUE_ID_LEN} bytes, got {len}")]
    UniqueIdTooLong {
        /// Bytes of the value.
        len: usize,
    },

    /// A CRC32C was asked for as a raw TLV, or a second time; only
    /// [`Encoder::crc32c`](crate::Encoder::crc32c) can write a true one, once.
    #[error("CRC32C is written once and by Encoder::crc32c")]
    Checksum,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_can_be_boxed_and_sent_to_other_threads() {
        fn check<E: core::error::Error + Send + Sync + 'static>() {}
        check::<DecodeError>();
        check::<EncodeError>();
        check::<TaggedReplyError>();
        check::<TlvError>();
    }
}
