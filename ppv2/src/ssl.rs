//! The SSL TLV (section 2.2.6): what a proxy that ended TLS knows of it. One
//! level of TLVs stands inside; an SSL TLV within is carried but not entered,
//! so that nesting costs neither time nor stack.

use crate::error::TlvError;
use crate::tlv::{Tlvs, ascii, utf8};
use crate::{DecodeError, TlvType};

/// Bytes before the TLVs inside: one of flags, four of the verify result.
pub(crate) const SSL_FIXED_LEN: usize = 5;

/// What is known of the client's TLS.
///
/// ```
/// use ppv2::{Encoder, Ssl, TlvType};
///
/// let mut buffer = [0; 128];
/// let header = Encoder::udp(
///     &mut buffer,
///     "[2001:db8:c::11]:54321".parse().unwrap(),
///     "[2001:db8:a::10]:443".parse().unwrap(),
/// )?
/// .ssl(Ssl::CLIENT_SSL, 0, &[(TlvType::SSL_VERSION, b"TLSv1.3")])?
/// .finish();
///
/// let (header, _) = ppv2::decode(header).unwrap();
/// let ssl = header.tlvs().ssl().unwrap().unwrap();
/// assert!(ssl.is_tls());
/// assert!(ssl.is_verified());
/// assert_eq!(ssl.version(), Some(Ok("TLSv1.3")));
/// assert_eq!(ssl.common_name(), None);
/// # Ok::<(), ppv2::EncodeError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ssl<'a> {
    client: u8,
    verify: u32,
    tlvs: Tlvs<'a>,
}

impl<'a> Ssl<'a> {
    /// Flag of the client field: the client connected over TLS.
    pub const CLIENT_SSL: u8 = 0x01;
    /// Flag of the client field: a certificate came over this connection.
    pub const CLIENT_CERT_CONN: u8 = 0x02;
    /// Flag of the client field: a certificate came at some time in this TLS session.
    ///
    /// ```
    /// use ppv2::Ssl;
    ///
    /// assert_eq!(Ssl::CLIENT_SSL | Ssl::CLIENT_CERT_CONN | Ssl::CLIENT_CERT_SESS, 0x07);
    /// ```
    pub const CLIENT_CERT_SESS: u8 = 0x04;

    /// Reads the value of an SSL TLV.
    ///
    /// # Errors
    ///
    /// [`TlvError::TooShort`] below 5 bytes, [`TlvError::Nested`] if the TLVs
    /// inside are not well framed.
    ///
    /// ```
    /// use ppv2::{Ssl, TlvError, TlvType};
    ///
    /// assert_eq!(Ssl::parse(&[0x01, 0, 0, 0, 1])?.verify(), 1);
    /// // The TLV inside, five bytes in, says that it has nine bytes.
    /// assert_eq!(
    ///     Ssl::parse(&[0x01, 0, 0, 0, 1, 0x21, 0, 9]),
    ///     Err(TlvError::Nested { kind: TlvType::SSL, offset: 5 }),
    /// );
    /// # Ok::<(), ppv2::TlvError>(())
    /// ```
    pub fn parse(value: &'a [u8]) -> Result<Self, TlvError> {
        let Some((&[client, v0, v1, v2, v3], nested)) = value.split_first_chunk::<SSL_FIXED_LEN>()
        else {
            return Err(TlvError::TooShort {
                kind: TlvType::SSL,
                expected: SSL_FIXED_LEN,
                found: value.len(),
            });
        };
        let tlvs = Tlvs::parse(nested).map_err(|error: DecodeError| TlvError::Nested {
            kind: TlvType::SSL,
            offset: SSL_FIXED_LEN + error.offset(),
        })?;
        Ok(Self {
            client,
            verify: u32::from_be_bytes([v0, v1, v2, v3]),
            tlvs,
        })
    }

    /// The client field: an "or" of [`CLIENT_SSL`](Self::CLIENT_SSL),
    /// [`CLIENT_CERT_CONN`](Self::CLIENT_CERT_CONN) and
    /// [`CLIENT_CERT_SESS`](Self::CLIENT_CERT_SESS).
    ///
    /// ```
    /// use ppv2::Ssl;
    ///
    /// let ssl = Ssl::parse(&[0x03, 0, 0, 0, 0])?;
    /// assert_ne!(ssl.client() & Ssl::CLIENT_CERT_CONN, 0);
    /// assert_eq!(ssl.client() & Ssl::CLIENT_CERT_SESS, 0);
    /// # Ok::<(), ppv2::TlvError>(())
    /// ```
    #[must_use]
    pub fn client(&self) -> u8 {
        self.client
    }

    /// The verify field: 0 if the client's certificate was verified.
    ///
    /// ```
    /// // 10 is OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED.
    /// assert_eq!(ppv2::Ssl::parse(&[0x03, 0, 0, 0, 10])?.verify(), 10);
    /// # Ok::<(), ppv2::TlvError>(())
    /// ```
    #[must_use]
    pub fn verify(&self) -> u32 {
        self.verify
    }

    /// Whether the client connected over TLS.
    ///
    /// ```
    /// assert!(!ppv2::Ssl::parse(&[0x00, 0, 0, 0, 0])?.is_tls());
    /// # Ok::<(), ppv2::TlvError>(())
    /// ```
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.client & Self::CLIENT_SSL != 0
    }

    /// Whether the verify field is 0. It says something of a certificate only
    /// where [`client`](Self::client) says that there was one.
    ///
    /// ```
    /// assert!(!ppv2::Ssl::parse(&[0x03, 0, 0, 0, 10])?.is_verified());
    /// # Ok::<(), ppv2::TlvError>(())
    /// ```
    #[must_use]
    pub fn is_verified(&self) -> bool {
        self.verify == 0
    }

    /// The TLVs inside.
    ///
    /// ```
    /// use ppv2::{Ssl, TlvType};
    ///
    /// let ssl = Ssl::parse(b"\x01\0\0\0\0\x29\x00\x03new")?;
    /// assert_eq!(ssl.tlvs().get(TlvType(0x29)), Some(b"new".as_slice()));
    /// # Ok::<(), ppv2::TlvError>(())
    /// ```
    #[must_use]
    pub fn tlvs(&self) -> Tlvs<'a> {
        self.tlvs
    }

    /// TLS version, as in `TLSv1.3`.
    ///
    /// # Errors
    ///
    /// [`TlvError::Text`] if it is not ASCII, as for every text here.
    ///
    /// ```
    /// let ssl = ppv2::Ssl::parse(b"\x01\0\0\0\0\x21\0\x07TLSv1.3")?;
    /// assert_eq!(ssl.version(), Some(Ok("TLSv1.3")));
    /// # Ok::<(), ppv2::TlvError>(())
    /// ```
    #[must_use]
    pub fn version(&self) -> Option<Result<&'a str, TlvError>> {
        self.ascii(TlvType::SSL_VERSION)
    }

    /// Common name of the client's certificate, UTF-8.
    ///
    /// # Errors
    ///
    /// [`TlvError::Text`] if it is not UTF-8.
    ///
    /// ```
    /// let ssl = ppv2::Ssl::parse(b"\x01\0\0\0\0\x22\0\x0bclient.test")?;
    /// assert_eq!(ssl.common_name(), Some(Ok("client.test")));
    /// # Ok::<(), ppv2::TlvError>(())
    /// ```
    #[must_use]
    pub fn common_name(&self) -> Option<Result<&'a str, TlvError>> {
        let value = self.tlvs.get(TlvType::SSL_CN)?;
        Some(utf8(TlvType::SSL_CN, value))
    }

    /// Cipher, as in `TLS_AES_128_GCM_SHA256`.
    ///
    /// # Errors
    ///
    /// [`TlvError::Text`] if it is not ASCII.
    ///
    /// ```
    /// let ssl = ppv2::Ssl::parse(b"\x01\0\0\0\0\x23\0\x16TLS_AES_128_GCM_SHA256")?;
    /// assert_eq!(ssl.cipher(), Some(Ok("TLS_AES_128_GCM_SHA256")));
    /// # Ok::<(), ppv2::TlvError>(())
    /// ```
    #[must_use]
    pub fn cipher(&self) -> Option<Result<&'a str, TlvError>> {
        self.ascii(TlvType::SSL_CIPHER)
    }

    /// Algorithm that signed the proxy's certificate, as in `RSA-SHA256`.
    ///
    /// # Errors
    ///
    /// [`TlvError::Text`] if it is not ASCII.
    ///
    /// ```
    /// let ssl = ppv2::Ssl::parse(b"\x01\0\0\0\0\x24\0\x0aRSA-SHA256")?;
    /// assert_eq!(ssl.signature_algorithm(), Some(Ok("RSA-SHA256")));
    /// # Ok::<(), ppv2::TlvError>(())
    /// ```
    #[must_use]
    pub fn signature_algorithm(&self) -> Option<Result<&'a str, TlvError>> {
        self.ascii(TlvType::SSL_SIG_ALG)
    }

    /// Key algorithm of the proxy's certificate, as in `RSA2048`.
    ///
    /// # Errors
    ///
    /// [`TlvError::Text`] if it is not ASCII.
    ///
    /// ```
    /// let ssl = ppv2::Ssl::parse(b"\x01\0\0\0\0\x25\0\x07RSA2048")?;
    /// assert_eq!(ssl.key_algorithm(), Some(Ok("RSA2048")));
    /// # Ok::<(), ppv2::TlvError>(())
    /// ```
    #[must_use]
    pub fn key_algorithm(&self) -> Option<Result<&'a str, TlvError>> {
        self.ascii(TlvType::SSL_KEY_ALG)
    }

    /// Key exchange group, as in `X25519MLKEM768`.
    ///
    /// # Errors
    ///
    /// [`TlvError::Text`] if it is not ASCII.
    ///
    /// ```
    /// let ssl = ppv2::Ssl::parse(b"\x01\0\0\0\0\x26\0\x0eX25519MLKEM768")?;
    /// assert_eq!(ssl.group(), Some(Ok("X25519MLKEM768")));
    /// # Ok::<(), ppv2::TlvError>(())
    /// ```
    #[must_use]
    pub fn group(&self) -> Option<Result<&'a str, TlvError>> {
        self.ascii(TlvType::SSL_GROUP)
    }

    /// Signature scheme of the handshake, as in `rsa_pss_rsae_sha256`.
    ///
    /// # Errors
    ///
    /// [`TlvError::Text`] if it is not ASCII.
    ///
    /// ```
    /// let ssl = ppv2::Ssl::parse(b"\x01\0\0\0\0\x27\0\x07ed25519")?;
    /// assert_eq!(ssl.signature_scheme(), Some(Ok("ed25519")));
    /// # Ok::<(), ppv2::TlvError>(())
    /// ```
    #[must_use]
    pub fn signature_scheme(&self) -> Option<Result<&'a str, TlvError>> {
        self.ascii(TlvType::SSL_SIG_SCHEME)
    }

    /// The client's certificate, DER bytes.
    ///
    /// ```
    /// let ssl = ppv2::Ssl::parse(b"\x03\0\0\0\0\x28\x00\x02\x30\x00")?;
    /// assert_eq!(ssl.client_certificate(), Some([0x30, 0x00].as_slice()));
    /// # Ok::<(), ppv2::TlvError>(())
    /// ```
    #[must_use]
    pub fn client_certificate(&self) -> Option<&'a [u8]> {
        self.tlvs.get(TlvType::SSL_CLIENT_CERT)
    }

    fn ascii(&self, kind: TlvType) -> Option<Result<&'a str, TlvError>> {
        self.tlvs.get(kind).map(|value| ascii(kind, value))
    }
}
