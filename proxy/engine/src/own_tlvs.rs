//! TLVs that the proxy adds to headers by itself: those of the configuration, and an id for
//! each session.

use std::fmt;
use std::io;

use ppv2::TlvType;
use siphasher::sip128::SipHasher24;

use crate::session::SessionId;

/// Bytes of a TLV before its value: type and length.
const PREFIX_LEN: usize = 3;

/// Bytes of a [`UniqueId`] as a TLV.
pub(crate) const UNIQUE_ID_TLV_LEN: usize = PREFIX_LEN + UniqueId::LEN;

/// TLVs that the headers to a server carry besides those that the proxy needs itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnTlvs {
    /// As they stand in headers.
    encoded: Vec<u8>,
    has_unique_id: bool,
}

/// Why a TLV can't be added to headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OwnTlvError {
    /// The proxy writes TLVs of this type itself, or they say nothing.
    #[error("the proxy writes TLVs of this type itself")]
    Reserved,
    /// A unique id may have 128 bytes.
    #[error("a unique id has at most {} bytes, not {len}", ppv2::MAX_UNIQUE_ID_LEN)]
    UniqueIdTooLong {
        /// Bytes of the value.
        len: usize,
    },
    /// All TLVs together may have [`OwnTlvs::MAX_LEN`] bytes.
    #[error("TLVs of {len} bytes, of which at most {} fit", OwnTlvs::MAX_LEN)]
    TooLong {
        /// Bytes of all TLVs up to this one.
        len: usize,
    },
}

impl OwnTlvs {
    /// Bytes that they may have together, apart from the id of the session. A server is sent
    /// as much with each datagram.
    pub const MAX_LEN: usize = 512;

    /// None.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a TLV behind those that are there.
    ///
    /// # Errors
    ///
    /// [`OwnTlvError`] if a header can't have it.
    pub fn push(&mut self, kind: TlvType, value: &[u8]) -> Result<(), OwnTlvError> {
        if [TlvType::CRC32C, TlvType::NOOP, TlvType::REPLY_TAG].contains(&kind) {
            return Err(OwnTlvError::Reserved);
        }
        let value_len = value.len();
        if kind == TlvType::UNIQUE_ID && value_len > ppv2::MAX_UNIQUE_ID_LEN {
            return Err(OwnTlvError::UniqueIdTooLong { len: value_len });
        }
        let len = self.encoded.len() + PREFIX_LEN + value_len;
        let too_long = OwnTlvError::TooLong { len };
        let value_len = u16::try_from(value_len).map_err(|_| too_long)?;
        if len > Self::MAX_LEN {
            return Err(too_long);
        }
        self.encoded.push(kind.0);
        self.encoded.extend_from_slice(&value_len.to_be_bytes());
        self.encoded.extend_from_slice(value);
        Ok(())
    }

    /// Has headers carry an id of their session as well.
    pub fn add_unique_id(&mut self) {
        self.has_unique_id = true;
    }

    /// Whether headers carry an id of their session.
    #[must_use]
    pub fn has_unique_id(&self) -> bool {
        self.has_unique_id
    }

    /// Whether there are none at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.encoded.is_empty() && !self.has_unique_id
    }

    /// Bytes that they add to a header.
    #[must_use]
    pub fn header_len(&self) -> usize {
        let unique_id = if self.has_unique_id {
            UNIQUE_ID_TLV_LEN
        } else {
            0
        };
        self.encoded.len() + unique_id
    }

    /// Their types, without that of the session's id.
    pub fn types(&self) -> impl Iterator<Item = TlvType> {
        split_tlvs(&self.encoded).map(|(kind, _)| kind)
    }

    /// They, without the id of the session, as they stand in headers.
    #[must_use]
    pub fn encoded(&self) -> &[u8] {
        &self.encoded
    }
}

/// The TLVs that `encoded` consists of, as far as they are whole.
pub(crate) fn split_tlvs(mut encoded: &[u8]) -> impl Iterator<Item = (TlvType, &[u8])> {
    std::iter::from_fn(move || {
        let ([kind, high, low], rest) = encoded.split_first_chunk::<PREFIX_LEN>()?;
        let len = u16::from_be_bytes([*high, *low]).into();
        let (value, rest) = rest.split_at_checked(len)?;
        encoded = rest;
        Some((TlvType(*kind), value))
    })
}

/// Names a session to its server, and in logs: no other session has it, of this process or of
/// another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UniqueId(pub [u8; Self::LEN]);

impl UniqueId {
    /// Bytes of an id.
    pub const LEN: usize = 16;
}

/// As 32 hexadecimal digits.
impl fmt::Display for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// Makes the ids of a worker's sessions.
#[derive(Clone, Copy)]
pub struct UniqueIds {
    /// Differs between workers, and from one start of the proxy to the next.
    key: [u8; 16],
}

/// Leaves out the key, whose holder could foresee ids.
impl fmt::Debug for UniqueIds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UniqueIds").finish_non_exhaustive()
    }
}

impl UniqueIds {
    /// Ids by a key that nobody else knows.
    ///
    /// # Errors
    ///
    /// Those of the kernel's random numbers.
    pub fn random() -> io::Result<Self> {
        let mut key = [0; 16];
        getrandom::fill(&mut key)?;
        Ok(Self { key })
    }

    /// The id of a session of the worker, always the same.
    #[must_use]
    pub fn of(&self, session: SessionId) -> UniqueId {
        let hasher = SipHasher24::new_with_key(&self.key);
        UniqueId(hasher.hash(&session.to_bits().to_be_bytes()).as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_stand_in_the_order_in_which_they_were_added() {
        let mut tlvs = OwnTlvs::new();
        assert!(tlvs.is_empty());
        tlvs.push(TlvType(0xe1), b"text").unwrap();
        tlvs.push(TlvType(0xe1), b"").unwrap();
        tlvs.push(TlvType::AUTHORITY, b"a.test").unwrap();
        let split: Vec<_> = split_tlvs(tlvs.encoded()).collect();
        let (custom, authority) = (TlvType(0xe1), TlvType::AUTHORITY);
        let expected: [(_, &[u8]); 3] = [(custom, b"text"), (custom, b""), (authority, b"a.test")];
        assert_eq!(split, expected);
        assert_eq!(tlvs.header_len(), 3 * 3 + 4 + 6);
        tlvs.add_unique_id();
        assert_eq!(tlvs.header_len(), 3 * 3 + 4 + 6 + 19);
        assert!(!tlvs.is_empty());
    }

    #[test]
    fn those_that_a_header_can_not_have_are_refused() {
        let mut tlvs = OwnTlvs::new();
        for kind in [TlvType::CRC32C, TlvType::NOOP, TlvType::REPLY_TAG] {
            assert_eq!(tlvs.push(kind, b"1234"), Err(OwnTlvError::Reserved));
        }
        let long_id = OwnTlvError::UniqueIdTooLong { len: 129 };
        assert_eq!(tlvs.push(TlvType::UNIQUE_ID, &[7; 129]), Err(long_id));
        assert!(tlvs.is_empty());

        tlvs.push(TlvType(0xe1), &[7; 500]).unwrap();
        let one_more = tlvs.push(TlvType(0xe2), &[7; 7]);
        assert_eq!(one_more, Err(OwnTlvError::TooLong { len: 513 }));
        tlvs.push(TlvType(0xe2), &[7; 6]).unwrap();
        assert_eq!(tlvs.encoded().len(), OwnTlvs::MAX_LEN);
        let huge = tlvs.push(TlvType(0xe3), &vec![0; 1 << 16]);
        assert!(matches!(huge, Err(OwnTlvError::TooLong { .. })));
    }

    #[test]
    fn an_id_is_of_one_session_of_one_worker() {
        let (one, other) = (UniqueIds::random().unwrap(), UniqueIds::random().unwrap());
        let mut ids = std::collections::HashSet::new();
        for bits in 0..1000 {
            let session = SessionId::from_bits(1 << 32 | bits);
            assert_eq!(one.of(session), one.of(session));
            assert!(ids.insert(one.of(session)) && ids.insert(other.of(session)));
        }
    }

    #[test]
    fn an_id_is_written_as_hexadecimal_digits() {
        let mut id = UniqueId([0; 16]);
        (id.0[0], id.0[15]) = (0x0a, 0xff);
        assert_eq!(id.to_string(), format!("0a{}ff", "00".repeat(14)));
    }
}
