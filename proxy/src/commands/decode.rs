//! `decode`: explains a header, one range of bytes a line.

use std::fmt::Write;

use ppv2::{DecodeError, Decoder, FIXED_LEN, Header, Origin, Tlv, TlvError, TlvType, Tlvs};
use thiserror::Error;

/// The most bytes of hexadecimal text: a datagram of 65,535 bytes has 131,070 digits, and
/// the rest is for separators. It bounds what is read from standard input.
pub const MAX_TEXT: u64 = 1 << 20;

/// Why there is nothing to explain, or only a part.
#[derive(Debug, Error)]
pub enum Undecodable {
    /// The input is not hexadecimal.
    #[error(
        "`{found}` at character {at} is not a hexadecimal digit; give the datagram as hex, as in 0d0a0d0a000d0a51…"
    )]
    NotHex {
        /// The character.
        found: char,
        /// Where it stands, counted from 1.
        at: usize,
    },
    /// The input ends in the middle of a byte.
    #[error("an odd number of hexadecimal digits, {0}; a byte has two")]
    HalfByte(usize),
    /// The bytes are no header.
    #[error("not a valid header")]
    Header(#[from] DecodeError),
}

/// Reads hexadecimal digits; white space and colons between them are skipped.
///
/// # Errors
///
/// [`Undecodable::NotHex`] or [`Undecodable::HalfByte`].
pub fn bytes_of_hex(text: &str) -> Result<Vec<u8>, Undecodable> {
    let text = text.trim().trim_start_matches("0x");
    let mut digits = Vec::new();
    for (at, found) in (1..).zip(text.chars()) {
        match found.to_digit(16) {
            Some(digit) => digits.push(u8::try_from(digit).unwrap_or_default()),
            None if found.is_whitespace() || found == ':' => {}
            None => return Err(Undecodable::NotHex { found, at }),
        }
    }
    let (pairs, rest) = digits.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(Undecodable::HalfByte(digits.len()));
    }
    Ok(pairs.iter().map(|[high, low]| high << 4 | low).collect())
}

/// Explains `datagram`, a line for each range of bytes.
///
/// # Errors
///
/// [`Undecodable::Header`] naming the byte at fault.
pub fn explain(datagram: &[u8]) -> Result<String, Undecodable> {
    let decoder = Decoder::new().max_header_len(usize::MAX);
    let (header, payload) = decoder.decode(datagram)?;
    let mut lines = Lines {
        bytes: datagram,
        at: 0,
        text: String::new(),
    };
    lines.add(12, "signature", "PROXY protocol v2");
    lines.add(1, "version, command", command(&header));
    lines.add(1, "family, transport", family(datagram[13]));
    let len = header.as_bytes().len();
    let length = format!("{}, so the header has {len} bytes", len - FIXED_LEN);
    lines.add(2, "length", &length);
    match header.origin() {
        Origin::Ip {
            source,
            destination,
            ..
        } => {
            let size = if source.is_ipv4() { 4 } else { 16 };
            lines.add(size, "source address", &source.ip().to_string());
            lines.add(size, "destination address", &destination.ip().to_string());
            lines.add(2, "source port", &source.port().to_string());
            lines.add(2, "destination port", &destination.port().to_string());
        }
        Origin::Unix {
            source,
            destination,
            ..
        } => {
            lines.add(108, "source path", &path(source));
            lines.add(108, "destination path", &path(destination));
        }
        Origin::Local | Origin::Unspecified | _ => {
            lines.add(header.skipped().len(), "skipped", "ignored");
        }
    }
    for tlv in header.tlvs() {
        let what = format!("TLV {}", tlv.kind);
        lines.add(3, &what, &format!("{} bytes", tlv.value.len()));
        if !tlv.value.is_empty() {
            let meaning = meaning(header.tlvs(), tlv);
            lines.add(tlv.value.len(), "  value", &meaning);
        }
    }
    lines.add(
        payload.len(),
        "payload",
        &format!("{} bytes", payload.len()),
    );
    Ok(lines.text)
}

struct Lines<'a> {
    bytes: &'a [u8],
    at: usize,
    text: String,
}

impl Lines<'_> {
    /// Describes the next `len` bytes; nothing if there are none.
    fn add(&mut self, len: usize, what: &str, meaning: &str) {
        const SHOWN: usize = 16;
        if len == 0 {
            return;
        }
        let end = self.at + len;
        let mut hex = String::new();
        for byte in self.bytes[self.at..end].iter().take(SHOWN) {
            let _ = write!(hex, "{byte:02x}");
        }
        if len > SHOWN {
            hex.push('…');
        }
        let range = format!("{}..{end}", self.at);
        let _ = writeln!(self.text, "{range:>11}  {hex:<33}  {what:<20} {meaning}");
        self.at = end;
    }
}

fn command(header: &Header<'_>) -> &'static str {
    if header.origin() == Origin::Local {
        "2, LOCAL: from the proxy itself"
    } else {
        "2, PROXY: on behalf of a client"
    }
}

fn family(byte: u8) -> &'static str {
    match byte {
        0x00 => "unspecified",
        0x11 => "IPv4, TCP",
        0x12 => "IPv4, UDP",
        0x21 => "IPv6, TCP",
        0x22 => "IPv6, UDP",
        0x31 => "UNIX, stream",
        0x32 => "UNIX, datagram",
        _ => "ignored",
    }
}

fn path(bytes: &[u8; 108]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(108);
    String::from_utf8_lossy(&bytes[..end])
        .escape_debug()
        .to_string()
}

/// The meaning of a TLV's value. Getters read only the first TLV of each type.
fn meaning(tlvs: Tlvs<'_>, tlv: Tlv<'_>) -> String {
    if tlvs.get(tlv.kind).map(<[u8]>::as_ptr) != Some(tlv.value.as_ptr()) {
        return "duplicate of an earlier TLV; ignored".to_owned();
    }
    let quoted = |text: &str| format!("{text:?}");
    match tlv.kind {
        TlvType::AUTHORITY => read(tlvs.authority(), quoted),
        TlvType::NETNS => read(tlvs.netns(), quoted),
        TlvType::AWS => read(tlvs.aws_vpc_endpoint_id(), quoted),
        TlvType::CRC32C => "matches the header".to_owned(),
        TlvType::NOOP => "padding".to_owned(),
        TlvType::AZURE => read(tlvs.azure_private_endpoint_link_id(), |id| id.to_string()),
        TlvType::GCP => read(tlvs.gcp_psc_connection_id(), |id| id.to_string()),
        TlvType::SSL => read(tlvs.ssl(), |ssl| {
            let mut text = format!("client 0x{:02x}, verify {}", ssl.client(), ssl.verify());
            for tlv in ssl.tlvs() {
                let _ = write!(text, ", {} \"{}\"", tlv.kind, tlv.value.escape_ascii());
            }
            text
        }),
        TlvType::REPLY_TAG => match tlvs.reply_tag() {
            Some(tag) => format!(
                "epoch {}, tag {:016x}",
                if tag.is_odd_epoch() { "odd" } else { "even" },
                u64::from_be_bytes(tag.tag())
            ),
            None => "not one tag of version 1; ignored".to_owned(),
        },
        _ => tlv.value.escape_ascii().to_string(),
    }
}

fn read<T>(value: Option<Result<T, TlvError>>, text: impl FnOnce(T) -> String) -> String {
    match value {
        Some(Ok(value)) => text(value),
        Some(Err(error)) => error.to_string(),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_explained_once_and_in_order() {
        let mut buffer = [0; 512];
        let header = ppv2::Encoder::udp(
            &mut buffer,
            "203.0.113.11:54321".parse().unwrap(),
            "198.51.100.10:9000".parse().unwrap(),
        )
        .unwrap()
        .authority("example.org")
        .unwrap()
        .ssl(1, 0, &[(TlvType::SSL_VERSION, b"TLSv1.3")])
        .unwrap()
        .noop(0)
        .unwrap()
        .reply_tag(ppv2::ReplyTag::new(0x01, [0xa5; 8]))
        .unwrap()
        .crc32c()
        .unwrap()
        .finish();
        let datagram = [header, b"hello"].concat();
        let text = explain(&datagram).unwrap();
        let mut at = 0;
        for line in text.lines() {
            let range = line.split_whitespace().next().unwrap();
            let (from, to) = range.split_once("..").unwrap();
            assert_eq!(from.parse::<usize>().unwrap(), at, "{text}");
            at = to.parse().unwrap();
        }
        assert_eq!(at, datagram.len());
        for part in [
            "203.0.113.11",
            "54321",
            "\"example.org\"",
            "SSL_VERSION \"TLSv1.3\"",
            "epoch odd, tag a5a5a5a5a5a5a5a5",
            "matches the header",
            "5 bytes",
        ] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }

    #[test]
    fn errors_name_input_that_is_not_hexadecimal() {
        assert_eq!(bytes_of_hex("0x0d:0A 0d\n0a").unwrap(), b"\r\n\r\n");
        assert!(
            bytes_of_hex("0g")
                .unwrap_err()
                .to_string()
                .contains("`g` at character 2")
        );
        assert!(bytes_of_hex("0d0").unwrap_err().to_string().contains("3"));
        let short = explain(b"\r\n\r\n").unwrap_err();
        assert!(matches!(short, Undecodable::Header(error) if error.offset() == 4));
    }
}
