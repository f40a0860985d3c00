//! The types that a TLV can have: those of the specification, those of the
//! clouds, and the ranges that it leaves to others.

use core::fmt;
use core::str::FromStr;

use thiserror::Error;

/// The type of a TLV (section 2.2).
///
/// A newtype rather than an enum, since receivers must carry types that they
/// do not know.
///
/// ```
/// use ppv2::TlvType;
///
/// assert_eq!(TlvType::AUTHORITY.to_string(), "AUTHORITY");
/// assert_eq!(TlvType(0xe7).to_string(), "TLV 0xe7 (custom)");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TlvType(pub u8);

impl TlvType {
    /// Protocol negotiated with the client, bytes (section 2.2.1).
    pub const ALPN: Self = Self(ppp::v2::Type::ALPN as u8);
    /// Host name that the client asked for, UTF-8 (section 2.2.2).
    pub const AUTHORITY: Self = Self(ppp::v2::Type::Authority as u8);
    /// Checksum of the header, 4 bytes (section 2.2.3).
    pub const CRC32C: Self = Self(ppp::v2::Type::CRC32C as u8);
    /// Padding, any bytes (section 2.2.4).
    pub const NOOP: Self = Self(ppp::v2::Type::NoOp as u8);
    /// Opaque id of the flow, at most 128 bytes (section 2.2.5).
    pub const UNIQUE_ID: Self = Self(ppp::v2::Type::UniqueId as u8);
    /// What is known of the client's TLS, [`Ssl`](crate::Ssl) (section 2.2.6).
    pub const SSL: Self = Self(ppp::v2::Type::SSL as u8);
    /// Inside [`SSL`](Self::SSL): TLS version, ASCII.
    pub const SSL_VERSION: Self = Self(ppp::v2::Type::SSLVersion as u8);
    /// Inside [`SSL`](Self::SSL): common name of the client's certificate, UTF-8.
    pub const SSL_CN: Self = Self(ppp::v2::Type::SSLCommonName as u8);
    /// Inside [`SSL`](Self::SSL): cipher, ASCII.
    pub const SSL_CIPHER: Self = Self(ppp::v2::Type::SSLCipher as u8);
    /// Inside [`SSL`](Self::SSL): signature algorithm of the certificate, ASCII.
    pub const SSL_SIG_ALG: Self = Self(ppp::v2::Type::SSLSignatureAlgorithm as u8);
    /// Inside [`SSL`](Self::SSL): key algorithm of the certificate, ASCII.
    pub const SSL_KEY_ALG: Self = Self(ppp::v2::Type::SSLKeyAlgorithm as u8);
    /// Inside [`SSL`](Self::SSL): key exchange group, ASCII.
    pub const SSL_GROUP: Self = Self(0x26);
    /// Inside [`SSL`](Self::SSL): signature scheme of the handshake, ASCII.
    ///
    /// ```
    /// assert_eq!(ppv2::TlvType::SSL_SIG_SCHEME, ppv2::TlvType(0x27));
    /// ```
    pub const SSL_SIG_SCHEME: Self = Self(0x27);
    /// Inside [`SSL`](Self::SSL): the client's certificate, DER bytes.
    pub const SSL_CLIENT_CERT: Self = Self(0x28);
    /// Network namespace's name, ASCII (section 2.2.7).
    pub const NETNS: Self = Self(ppp::v2::Type::NetworkNamespace as u8);

    /// Google Cloud: Private Service Connect connection id, 8 bytes big-endian.
    pub const GCP: Self = Self(0xe0);
    /// Amazon: subtype 0x01 and the id of the VPC endpoint, ASCII.
    pub const AWS: Self = Self(0xea);
    /// This project: the [`ReplyTag`](crate::ReplyTag) that a server returns with
    /// its replies, 10 bytes.
    pub const REPLY_TAG: Self = Self(0xeb);
    /// Azure: subtype 0x01 and the link id of the private endpoint, `u32`
    /// little-endian.
    pub const AZURE: Self = Self(0xee);

    /// Whether the type is reserved for applications: 0xE0–0xEF (section 2.2.8).
    ///
    /// ```
    /// assert!(ppv2::TlvType::AWS.is_custom());
    /// assert!(!ppv2::TlvType(0xf0).is_custom());
    /// ```
    #[must_use]
    pub const fn is_custom(self) -> bool {
        matches!(self.0, 0xe0..=0xef)
    }

    /// Whether the type is reserved for experiments: 0xF0–0xF7 (section 2.2.8).
    ///
    /// ```
    /// assert!(ppv2::TlvType(0xf0).is_experiment());
    /// ```
    #[must_use]
    pub const fn is_experiment(self) -> bool {
        matches!(self.0, 0xf0..=0xf7)
    }

    /// Whether the type is reserved for the future: 0xF8–0xFF (section 2.2.8).
    ///
    /// ```
    /// assert!(ppv2::TlvType(0xff).is_future());
    /// assert!(!ppv2::TlvType::NETNS.is_future());
    /// ```
    #[must_use]
    pub const fn is_future(self) -> bool {
        matches!(self.0, 0xf8..=0xff)
    }
}

/// The types that have a name.
const NAMES: [(TlvType, &str); 19] = [
    (TlvType::ALPN, "ALPN"),
    (TlvType::AUTHORITY, "AUTHORITY"),
    (TlvType::CRC32C, "CRC32C"),
    (TlvType::NOOP, "NOOP"),
    (TlvType::UNIQUE_ID, "UNIQUE_ID"),
    (TlvType::SSL, "SSL"),
    (TlvType::SSL_VERSION, "SSL_VERSION"),
    (TlvType::SSL_CN, "SSL_CN"),
    (TlvType::SSL_CIPHER, "SSL_CIPHER"),
    (TlvType::SSL_SIG_ALG, "SSL_SIG_ALG"),
    (TlvType::SSL_KEY_ALG, "SSL_KEY_ALG"),
    (TlvType::SSL_GROUP, "SSL_GROUP"),
    (TlvType::SSL_SIG_SCHEME, "SSL_SIG_SCHEME"),
    (TlvType::SSL_CLIENT_CERT, "SSL_CLIENT_CERT"),
    (TlvType::NETNS, "NETNS"),
    (TlvType::GCP, "GCP"),
    (TlvType::AWS, "AWS"),
    (TlvType::REPLY_TAG, "REPLY_TAG"),
    (TlvType::AZURE, "AZURE"),
];

impl fmt::Display for TlvType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((_, name)) = NAMES.iter().find(|(kind, _)| kind == self) {
            return f.write_str(name);
        }
        write!(f, "TLV 0x{:02x}", self.0)?;
        match self {
            kind if kind.is_custom() => f.write_str(" (custom)"),
            kind if kind.is_experiment() => f.write_str(" (experiment)"),
            kind if kind.is_future() => f.write_str(" (future)"),
            _ => Ok(()),
        }
    }
}

/// Reads a type as people write it: a name in upper or lower case, or `0x` and two
/// hexadecimal digits.
///
/// ```
/// use ppv2::TlvType;
///
/// assert_eq!("unique_id".parse(), Ok(TlvType::UNIQUE_ID));
/// assert_eq!("0xE1".parse(), Ok(TlvType(0xe1)));
/// assert_eq!(
///     "225".parse::<TlvType>().unwrap_err().to_string(),
///     "expected a name such as alpn, authority or unique_id, or 0x and two hexadecimal digits",
/// );
/// ```
impl FromStr for TlvType {
    type Err = ParseTlvTypeError;

    fn from_str(text: &str) -> Result<Self, ParseTlvTypeError> {
        let named = NAMES
            .iter()
            .find(|(_, name)| name.eq_ignore_ascii_case(text));
        if let Some((kind, _)) = named {
            return Ok(*kind);
        }
        let digits = text
            .strip_prefix("0x")
            .filter(|digits| digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit()));
        digits
            .and_then(|digits| u8::from_str_radix(digits, 16).ok())
            .map(Self)
            .ok_or(ParseTlvTypeError(()))
    }
}

/// A text is no [`TlvType`]: neither a name nor `0x` and two hexadecimal digits.
///
/// ```
/// assert!("0xe10".parse::<ppv2::TlvType>().is_err());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("expected a name such as alpn, authority or unique_id, or 0x and two hexadecimal digits")]
pub struct ParseTlvTypeError(());

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;

    #[test]
    fn every_name_and_every_number_is_read() {
        for byte in 0..=0xff {
            let kind = TlvType(byte);
            assert_eq!(std::format!("0x{byte:02x}").parse(), Ok(kind));
            assert_eq!(std::format!("0x{byte:02X}").parse(), Ok(kind));
            let shown = kind.to_string();
            if !shown.starts_with("TLV ") {
                assert_eq!(shown.parse(), Ok(kind));
                assert_eq!(shown.to_lowercase().parse(), Ok(kind));
            }
        }
    }

    #[test]
    fn other_texts_are_not() {
        for text in [
            "", "0x", "0x1", "0x001", "e1", "0Xe1", "225", "0x+1", "0x-1", "alpn ", "TLV 0xe1",
            "0xé",
        ] {
            assert_eq!(
                text.parse::<TlvType>(),
                Err(ParseTlvTypeError(())),
                "{text:?}"
            );
        }
    }
}
