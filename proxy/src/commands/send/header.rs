//! The header of the datagrams that are sent, and what servers put in front of their
//! replies for it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use ppv2::spp::{self, SppHeader};
use ppv2::{EncodeError, Encoder, ReplyTag, TlvType, decode_tagged};
use thiserror::Error;

use super::super::decode::{bytes_of_hex, format_of};
use super::{Format, Options, SendError};

/// Bytes of the longest header: the fixed part, and what its length can say.
const MAX_HEADER_LEN: usize = ppv2::FIXED_LEN + 65_535;

/// A TLV, as `TYPE=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tlv {
    kind: TlvType,
    value: Vec<u8>,
}

/// A text is no TLV.
#[derive(Debug, Error)]
pub enum NotATlv {
    /// No `=`.
    #[error("give TYPE=VALUE, as in authority=example.org or 0xE1=hex:0a0b")]
    NoValue,
    /// The type is none.
    #[error("type `{0}`: {1}")]
    Type(String, ppv2::ParseTlvTypeError),
    /// The value behind `hex:` is not hexadecimal.
    #[error("{0}")]
    Hex(super::Undecodable),
    /// The checksum has an option of its own.
    #[error("the program computes the checksum: give --crc32c instead")]
    Checksum,
}

impl FromStr for Tlv {
    type Err = NotATlv;

    fn from_str(text: &str) -> Result<Self, NotATlv> {
        let (kind, value) = text.split_once('=').ok_or(NotATlv::NoValue)?;
        let kind: TlvType = kind
            .parse()
            .map_err(|error| NotATlv::Type(kind.to_owned(), error))?;
        if kind == TlvType::CRC32C {
            return Err(NotATlv::Checksum);
        }
        let value = match value.strip_prefix("hex:") {
            Some(digits) => bytes_of_hex(digits).map_err(NotATlv::Hex)?,
            None => value.as_bytes().to_vec(),
        };
        Ok(Self { kind, value })
    }
}

/// A header, and what is known of it.
pub(super) struct Header {
    bytes: Vec<u8>,
    text: String,
    client: Option<SocketAddr>,
    in_reply: InReply,
}

/// What the server puts in front of a reply.
enum InReply {
    Nothing,
    /// The same SPP header.
    Spp(SppHeader),
    /// A header with the same client, destination and reply tag.
    Tagged(SocketAddr, SocketAddr, ReplyTag),
}

impl Header {
    /// The header that `options` describe, sent from `local` to `server`.
    pub(super) fn new(
        options: &Options,
        local: SocketAddr,
        server: SocketAddr,
    ) -> Result<Self, SendError> {
        options.validate_format()?;
        let client = options.client.map_or(local, |it| it.or_port(local.port()));
        let destination = options
            .destination
            .map_or(server, |it| it.or_port(server.port()));
        let mut named = Some(client);
        let mut in_reply = InReply::Nothing;
        let (what, bytes) = match options.format {
            Format::V2 => {
                let bytes = version_2(options, client, destination)?;
                if let Ok(reply) = decode_tagged(&bytes) {
                    in_reply = InReply::Tagged(reply.client, reply.destination, reply.tag);
                }
                ("PROXY v2", bytes)
            }
            Format::Spp => {
                let bytes = SppHeader {
                    client,
                    proxy: destination,
                }
                .to_bytes();
                if let Ok((header, _)) = spp::decode(&bytes) {
                    in_reply = InReply::Spp(header);
                }
                ("SPP", bytes.to_vec())
            }
            Format::V1 => ("PROXY v1", version_1(client, destination).into_bytes()),
            Format::None => ("no", Vec::new()),
        };
        let text = if options.format == Format::None {
            named = None;
            "no header".to_owned()
        } else if options.local {
            named = None;
            format!("{what} header of {} bytes, LOCAL", bytes.len())
        } else {
            let len = bytes.len();
            format!("{what} header of {len} bytes, client {client}, destination {destination}")
        };
        Ok(Self {
            bytes,
            text,
            client: named,
            in_reply,
        })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Splits what the server put in front of its reply off, and says what it was.
    pub(super) fn split_reply<'r>(&self, reply: &'r [u8]) -> (String, &'r [u8]) {
        const DROPPED: &str = "so that a proxy would drop it";
        match &self.in_reply {
            InReply::Spp(sent) => match spp::decode(reply) {
                Ok((header, payload)) if header == *sent => {
                    (", behind the SPP header of this client".to_owned(), payload)
                }
                Ok((header, payload)) => {
                    let SppHeader { client, proxy } = header;
                    let text = format!(
                        ", behind another SPP header, {DROPPED}: client {client}, proxy {proxy}"
                    );
                    (text, payload)
                }
                Err(error) => (
                    format!(", without an SPP header, {DROPPED}: {error}"),
                    reply,
                ),
            },
            InReply::Tagged(client, destination, tag) => match decode_tagged(reply) {
                Ok(found)
                    if (found.client, found.destination, found.tag)
                        == (*client, *destination, *tag) =>
                {
                    let text = ", behind a header with this client and its reply tag";
                    (text.to_owned(), found.payload)
                }
                Ok(found) => {
                    let client = found.client;
                    let text = format!(
                        ", behind a header with another client or reply tag, {DROPPED}: client {client}"
                    );
                    (text, found.payload)
                }
                Err(_) => (", without the reply tag".to_owned(), reply),
            },
            InReply::Nothing => match format_of(reply) {
                Some(format) => (format!(", which begin like a header: {format}"), reply),
                None => (String::new(), reply),
            },
        }
    }

    /// What to look at if no reply came.
    pub(super) fn hint(&self, format: Format, local: IpAddr) -> String {
        let expected = match format {
            Format::V2 => "PROXY v2",
            Format::Spp => "SPP",
            Format::V1 => return "servers must drop PROXY v1 over UDP; try --format v2".to_owned(),
            Format::None => {
                return format!(
                    "a server that expects headers from {local} drops a datagram without one"
                );
            }
        };
        let client = match self.client {
            Some(client) => format!(", and allow the client {}", client.ip()),
            None => String::new(),
        };
        format!(
            "the server must be up, expect {expected} headers from {local}{client}; most servers \
             drop other datagrams without a reply"
        )
    }
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Options {
    fn validate_format(&self) -> Result<(), SendError> {
        let given = [
            ("--tlv", !self.tlvs.is_empty()),
            ("--crc32c", self.crc32c),
            ("--local", self.local),
        ];
        match given.into_iter().find(|(_, is_given)| *is_given) {
            Some((option, _)) if self.format != Format::V2 => Err(SendError::NotForFormat(option)),
            _ => Ok(()),
        }
    }
}

fn version_2(
    options: &Options,
    client: SocketAddr,
    destination: SocketAddr,
) -> Result<Vec<u8>, EncodeError> {
    let mut buffer = vec![0; MAX_HEADER_LEN];
    let mut encoder = match options.local {
        true => Encoder::local(&mut buffer)?,
        false => Encoder::udp(&mut buffer, client, destination)?,
    };
    for Tlv { kind, value } in &options.tlvs {
        encoder = encoder.tlv(*kind, value)?;
    }
    if options.crc32c {
        encoder = encoder.crc32c()?;
    }
    Ok(encoder.finish().to_vec())
}

/// The line that nginx writes over UDP, too (section 2.1 of the specification).
fn version_1(client: SocketAddr, destination: SocketAddr) -> String {
    let [from, to] = [client, destination].map(|address| address.ip().to_canonical());
    let family = match (from, to) {
        (IpAddr::V4(_), IpAddr::V4(_)) => "TCP4",
        (IpAddr::V6(_), IpAddr::V6(_)) => "TCP6",
        _ => return "PROXY UNKNOWN\r\n".to_owned(),
    };
    let [from_port, to_port] = [client.port(), destination.port()];
    format!("PROXY {family} {from} {to} {from_port} {to_port}\r\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tlvs_are_read() {
        for (text, kind, value) in [
            (
                "authority=example.org",
                TlvType::AUTHORITY,
                &b"example.org"[..],
            ),
            ("ALPN=h3", TlvType::ALPN, b"h3"),
            ("0xE1=a=b", TlvType(0xe1), b"a=b"),
            ("0xe1=", TlvType(0xe1), b""),
            ("unique_id=hex:00 ff", TlvType::UNIQUE_ID, b"\x00\xff"),
        ] {
            let value = value.to_vec();
            assert_eq!(text.parse::<Tlv>().unwrap(), Tlv { kind, value });
        }
        for (text, part) in [
            ("authority", "TYPE=VALUE"),
            (
                "host=example.org",
                "type `host`: expected a name such as alpn",
            ),
            ("0xe1=hex:0", "an odd number"),
            ("crc32c=hex:00000000", "--crc32c"),
        ] {
            let error = text.parse::<Tlv>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn version_1_is_written_as_nginx_writes_it() {
        let [v4, v6] = ["203.0.113.11:54321", "[2001:db8::10]:9000"].map(|it| it.parse().unwrap());
        let line = "PROXY TCP4 203.0.113.11 203.0.113.11 54321 54321\r\n";
        assert_eq!(version_1(v4, v4), line);
        let line = "PROXY TCP6 2001:db8::10 2001:db8::10 9000 9000\r\n";
        assert_eq!(version_1(v6, v6), line);
        assert_eq!(version_1(v4, v6), "PROXY UNKNOWN\r\n");
        assert!(ppv2::is_v1(version_1(v4, v4).as_bytes()));
    }
}
