//! The reply tag: how a server names the client that a reply is for, so that a
//! proxy can send the datagrams of many clients through one socket.
//! `docs/reference/reply-tag.md` is the specification.

use core::net::SocketAddr;

use crate::block::Block;
use crate::error::TaggedReplyError;
use crate::tlv::Tlvs;
use crate::{IPV4_HEADER_LEN, IPV6_HEADER_LEN, TLV_PREFIX_LEN, TlvType, Transport, decode};

/// Bytes of a [`ReplyTag`]'s value: version, flags, and a tag of 8 bytes.
pub const REPLY_TAG_LEN: usize = 10;

/// Bytes that a [reply tag](ReplyTag) adds to a header.
///
/// ```
/// use ppv2::{IPV6_HEADER_LEN, IPV6_TAGGED_HEADER_LEN, REPLY_TAG_TLV_LEN};
///
/// assert_eq!(IPV6_TAGGED_HEADER_LEN, IPV6_HEADER_LEN + REPLY_TAG_TLV_LEN);
/// ```
pub const REPLY_TAG_TLV_LEN: usize = TLV_PREFIX_LEN + REPLY_TAG_LEN;

/// Bytes of a header that carries IPv4 addresses and a reply tag: 41.
pub const IPV4_TAGGED_HEADER_LEN: usize = IPV4_HEADER_LEN + REPLY_TAG_TLV_LEN;

/// Bytes of a header that carries IPv6 addresses and a reply tag: 65.
pub const IPV6_TAGGED_HEADER_LEN: usize = IPV6_HEADER_LEN + REPLY_TAG_TLV_LEN;

/// Bytes of the longest header that [`encode_udp_tagged`](crate::encode_udp_tagged)
/// writes.
///
/// ```
/// assert_eq!(ppv2::MAX_TAGGED_HEADER_LEN, 65);
/// ```
pub const MAX_TAGGED_HEADER_LEN: usize = IPV6_TAGGED_HEADER_LEN;

/// The TLV up to its version: type, length of [`REPLY_TAG_LEN`], version.
pub(crate) const REPLY_TAG_PREFIX: [u8; 4] = [TlvType::REPLY_TAG.0, 0, 10, ReplyTag::VERSION];

/// The value of a [`TlvType::REPLY_TAG`] TLV of version 1: 10 bytes by which a
/// proxy recognises that it, or another proxy with its key, named this client to a
/// server.
///
/// A server that understands it puts a header with the same client, destination
/// and tag in front of each reply. It copies all 10 bytes and reads none of them.
///
/// | bytes | content |
/// |---|---|
/// | 0 | [version](Self::VERSION), 1 |
/// | 1 | [flags](Self::flags): bit 0 is the parity of the epoch, the others are 0 |
/// | 2–9 | [tag](Self::tag): a hash that only proxies with the key can compute |
///
/// ```
/// use ppv2::{ReplyTag, encode_udp_tagged};
///
/// let client = "203.0.113.11:54321".parse().unwrap();
/// let listener = "198.51.100.10:9000".parse().unwrap();
/// let tag = ReplyTag::new(ReplyTag::ODD_EPOCH, *b"8 bytes.");
/// let mut buffer = [0; ppv2::MAX_TAGGED_HEADER_LEN];
///
/// let header = encode_udp_tagged(client, listener, tag, &mut buffer)?;
/// assert_eq!(header[28..], *b"\xeb\x00\x0a\x01\x018 bytes.");
///
/// // What the server sends back.
/// let reply = [header, b"pong"].concat();
/// let reply = ppv2::decode_tagged(&reply).unwrap();
/// assert_eq!((reply.client, reply.destination, reply.tag), (client, listener, tag));
/// assert_eq!(reply.payload, b"pong");
/// # Ok::<(), ppv2::EncodeError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ReplyTag {
    value: [u8; REPLY_TAG_LEN],
}

impl ReplyTag {
    /// The first byte of the value. A TLV of another version says nothing.
    pub const VERSION: u8 = 1;

    /// Bit 0 of the [flags](Self::flags): the epoch of the tag is odd.
    pub const ODD_EPOCH: u8 = 0x01;

    /// A tag with these flags.
    ///
    /// ```
    /// use ppv2::ReplyTag;
    ///
    /// assert_eq!(ReplyTag::new(0, [7; 8]).value(), b"\x01\x00\x07\x07\x07\x07\x07\x07\x07\x07");
    /// ```
    #[must_use]
    #[inline]
    pub const fn new(flags: u8, tag: [u8; 8]) -> Self {
        let [a, b, c, d, e, f, g, h] = tag;
        let value = [Self::VERSION, flags, a, b, c, d, e, f, g, h];
        Self { value }
    }

    /// Reads a TLV's value. `None` for another version or another length.
    ///
    /// ```
    /// use ppv2::ReplyTag;
    ///
    /// let tag = ReplyTag::from_value(b"\x01\x00abcdefgh").unwrap();
    /// assert_eq!(tag.tag(), *b"abcdefgh");
    /// assert_eq!(ReplyTag::from_value(b"\x02\x00abcdefgh"), None);
    /// assert_eq!(ReplyTag::from_value(b"\x01\x00abcdefghi"), None);
    /// ```
    #[must_use]
    #[inline]
    pub fn from_value(value: &[u8]) -> Option<Self> {
        let value: [u8; REPLY_TAG_LEN] = value.try_into().ok()?;
        (value[0] == Self::VERSION).then_some(Self { value })
    }

    /// The TLV's value.
    ///
    /// ```
    /// use ppv2::ReplyTag;
    ///
    /// let tag = ReplyTag::new(ReplyTag::ODD_EPOCH, [7; 8]);
    /// assert_eq!(ReplyTag::from_value(tag.value()), Some(tag));
    /// ```
    #[must_use]
    #[inline]
    pub const fn value(&self) -> &[u8; REPLY_TAG_LEN] {
        &self.value
    }

    /// The flags as they were sent, unknown ones included.
    ///
    /// ```
    /// assert_eq!(ppv2::ReplyTag::new(0x80, [7; 8]).flags(), 0x80);
    /// ```
    #[must_use]
    #[inline]
    pub const fn flags(self) -> u8 {
        self.value[1]
    }

    /// Whether the flags name an odd epoch.
    ///
    /// ```
    /// use ppv2::ReplyTag;
    ///
    /// assert!(ReplyTag::new(ReplyTag::ODD_EPOCH, [7; 8]).is_odd_epoch());
    /// assert!(!ReplyTag::new(0, [7; 8]).is_odd_epoch());
    /// ```
    #[must_use]
    #[inline]
    pub const fn is_odd_epoch(self) -> bool {
        self.flags() & Self::ODD_EPOCH != 0
    }

    /// The 8 bytes that the proxy has computed.
    ///
    /// ```
    /// assert_eq!(ppv2::ReplyTag::new(0, *b"abcdefgh").tag(), *b"abcdefgh");
    /// ```
    #[must_use]
    #[inline]
    pub const fn tag(self) -> [u8; 8] {
        let [_, _, a, b, c, d, e, f, g, h] = self.value;
        [a, b, c, d, e, f, g, h]
    }
}

/// A server's reply that names its client: what [`decode_tagged`] returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TaggedReply<'a> {
    /// The client that the reply is for. A v4-mapped address is as sent.
    pub client: SocketAddr,
    /// The address that the client had sent to, which the reply is to leave from.
    pub destination: SocketAddr,
    /// What the proxy checks before it believes either address.
    pub tag: ReplyTag,
    /// The reply, without its header.
    pub payload: &'a [u8],
}

/// Splits a reply that must carry a header with a reply tag, as a server that
/// understands [`ReplyTag`] sends it.
///
/// The addresses are what the sender *says*. A proxy sends nothing to them before
/// it has computed the tag itself and found it equal.
///
/// # Errors
///
/// [`TaggedReplyError`] says what the reply has instead of one header that names
/// a client over UDP with exactly one tag. Other TLVs are no error.
///
/// ```
/// use ppv2::TaggedReplyError;
///
/// // A reply without a header, and one from a server that does not know the tag.
/// let error = ppv2::decode_tagged(b"pong, of which the signature is missing").unwrap_err();
/// assert!(matches!(error, TaggedReplyError::Header(_)));
///
/// let address = "192.0.2.1:53".parse().unwrap();
/// let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
/// let untagged = ppv2::encode_udp(address, address, &mut buffer)?;
/// assert_eq!(ppv2::decode_tagged(untagged), Err(TaggedReplyError::NoTag));
/// # Ok::<(), ppv2::EncodeError>(())
/// ```
#[inline]
pub fn decode_tagged(datagram: &[u8]) -> Result<TaggedReply<'_>, TaggedReplyError> {
    let (header, payload) = decode(datagram)?;
    let Some((client, destination)) = header.block.udp() else {
        return Err(no_udp_client(header.block));
    };
    let tag = match header.tlvs.reply_tags() {
        (Some(tag), false) => tag,
        (None, _) => return Err(TaggedReplyError::NoTag),
        (Some(_), true) => return Err(TaggedReplyError::SecondTag),
    };
    Ok(TaggedReply {
        client,
        destination,
        tag,
        payload,
    })
}

#[cold]
fn no_udp_client(block: Block<'_>) -> TaggedReplyError {
    match block {
        Block::Local => TaggedReplyError::Local,
        Block::Unspecified => TaggedReplyError::Unspecified,
        Block::Ipv4(Transport::Stream, _) | Block::Ipv6(Transport::Stream, _) => {
            TaggedReplyError::Tcp
        }
        Block::Ipv4(Transport::Datagram, _)
        | Block::Ipv6(Transport::Datagram, _)
        | Block::Unix(..) => TaggedReplyError::Unix,
    }
}

impl Tlvs<'_> {
    /// The first reply tag, and whether another one follows.
    #[inline]
    pub(crate) fn reply_tags(&self) -> (Option<ReplyTag>, bool) {
        let mut tags = self
            .iter()
            .filter(|tlv| tlv.kind == TlvType::REPLY_TAG)
            .filter_map(|tlv| ReplyTag::from_value(tlv.value));
        (tags.next(), tags.next().is_some())
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;
    use crate::{DecodeError, EncodeError, Encoder, encode_udp_tagged};

    const TAG: ReplyTag = ReplyTag::new(ReplyTag::ODD_EPOCH, *b"\x00\x01\x02\xff8765");

    fn addresses() -> [(SocketAddr, SocketAddr); 3] {
        let of = |client: &str, destination: &str| {
            (client.parse().unwrap(), destination.parse().unwrap())
        };
        [
            of("203.0.113.11:54321", "198.51.100.10:9000"),
            of("[2001:db8:c::11]:54321", "[2001:db8:a::10]:9000"),
            of("[2001:db8:c::11]:54321", "[::ffff:198.51.100.10]:9000"),
        ]
    }

    fn written(by: impl FnOnce(&mut [u8]) -> Result<&[u8], EncodeError>) -> Vec<u8> {
        by(&mut [0xa5; 300]).unwrap().to_vec()
    }

    #[test]
    fn the_fast_path_writes_what_the_encoder_writes() {
        for (client, destination) in addresses() {
            let fast = written(|buffer| encode_udp_tagged(client, destination, TAG, buffer));
            let plain = written(|buffer| {
                let encoder = Encoder::udp(buffer, client, destination)?;
                Ok(encoder.reply_tag(TAG)?.finish())
            });
            assert_eq!(fast, plain);
            let len = crate::udp_header_len(client, destination) + REPLY_TAG_TLV_LEN;
            assert_eq!(fast.len(), len);
            for have in 0..len {
                let mut short = [0xa5; MAX_TAGGED_HEADER_LEN];
                assert_eq!(
                    encode_udp_tagged(client, destination, TAG, &mut short[..have]),
                    Err(EncodeError::BufferTooSmall { needed: len, have })
                );
                assert_eq!(short, [0xa5; MAX_TAGGED_HEADER_LEN], "partly written");
            }
        }
    }

    #[test]
    fn a_tagged_reply_reads_back_as_written() {
        for (client, destination) in addresses() {
            let header = written(|buffer| encode_udp_tagged(client, destination, TAG, buffer));
            for payload in [&b""[..], b"pong", &header] {
                let datagram = [&header, payload].concat();
                let reply = decode_tagged(&datagram).unwrap();
                assert_eq!(
                    (reply.client, reply.destination, reply.tag, reply.payload),
                    (client, destination, TAG, payload)
                );
            }
        }
    }

    #[test]
    fn a_reply_that_is_not_tagged_once_is_refused_with_what_it_is() {
        let [(v4, to), ..] = addresses();
        let other = |version: u8| {
            let mut value = *TAG.value();
            value[0] = version;
            value
        };
        let cases = [
            (
                written(|b| Ok(Encoder::local(b)?.reply_tag(TAG)?.finish())),
                TaggedReplyError::Local,
            ),
            (
                written(|b| Ok(Encoder::unspecified(b)?.reply_tag(TAG)?.finish())),
                TaggedReplyError::Unspecified,
            ),
            (
                written(|b| Ok(Encoder::tcp(b, v4, to)?.reply_tag(TAG)?.finish())),
                TaggedReplyError::Tcp,
            ),
            (
                written(|b| {
                    let paths = ([1; 108], [2; 108]);
                    let unix = Encoder::unix(b, Transport::Datagram, &paths.0, &paths.1)?;
                    Ok(unix.reply_tag(TAG)?.finish())
                }),
                TaggedReplyError::Unix,
            ),
            (
                written(|b| Ok(Encoder::udp(b, v4, to)?.finish())),
                TaggedReplyError::NoTag,
            ),
            (
                written(|b| {
                    let udp = Encoder::udp(b, v4, to)?;
                    Ok(udp.tlv(TlvType::REPLY_TAG, &other(2))?.finish())
                }),
                TaggedReplyError::NoTag,
            ),
            (
                written(|b| {
                    let udp = Encoder::udp(b, v4, to)?.reply_tag(TAG)?;
                    Ok(udp.noop(3)?.reply_tag(TAG)?.finish())
                }),
                TaggedReplyError::SecondTag,
            ),
            (
                b"\r\n\r\n".to_vec(),
                TaggedReplyError::Header(DecodeError::TooShort { len: 4 }),
            ),
        ];
        for (datagram, expected) in cases {
            assert_eq!(decode_tagged(&datagram), Err(expected), "{datagram:02x?}");
        }
    }

    #[test]
    fn two_tags_are_no_tag_and_unknown_versions_do_not_count() {
        let [(v4, to), ..] = addresses();
        let tag = |header: &[u8]| decode(header).unwrap().0.tlvs().reply_tag();
        let twice = written(|b| {
            let udp = Encoder::udp(b, v4, to)?;
            Ok(udp.reply_tag(TAG)?.reply_tag(TAG)?.finish())
        });
        assert_eq!(tag(&twice), None);
        let beside_version_2 = written(|b| {
            let udp = Encoder::udp(b, v4, to)?;
            let udp = udp.tlv(TlvType::REPLY_TAG, b"\x02 of any length")?;
            Ok(udp.reply_tag(TAG)?.crc32c()?.finish())
        });
        assert_eq!(tag(&beside_version_2), Some(TAG));
    }
}
