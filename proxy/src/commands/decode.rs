//! `decode`: explains a header, one range of bytes a line.

use std::fmt::Write;

use ppv2::spp::{self, SPP_MAGIC, SppError, SppHeader};
use ppv2::{
    DecodeError, Decoder, FIXED_LEN, Header, Origin, SIGNATURE, Tlv, TlvError, TlvType, Tlvs,
};
use thiserror::Error;

/// The most bytes of hexadecimal text: a datagram of 65,535 bytes has 131,070 digits, and
/// the rest is for separators. It bounds what is read from standard input.
pub const MAX_TEXT: u64 = 1 << 20;

/// Why there is nothing to explain, or only a part.
#[derive(Debug, Error)]
pub enum Undecodable {
    /// The input is not hexadecimal.
    #[error(
        "`{found}` at character {at} is not a hexadecimal digit; give two digits for each byte, as in 0d0a0d0a000d0a51…"
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
    /// The bytes begin like an SPP header and are none.
    #[error("not a valid SPP header")]
    Spp(#[from] SppError),
    /// The text of version 1.
    #[error(
        "`{line}` is the text of PROXY protocol v1, with {payload} bytes of payload behind it; v1 is for TCP, and \
         receivers of UDP drop it; have the sender write v2: nginx 1.31.4 or newer does with `proxy_protocol v2;` in \
         place of `proxy_protocol on;`, on each datagram with `proxy_requests 1; proxy_responses 1;`"
    )]
    Version1 {
        /// The line without its end, printable.
        line: String,
        /// Bytes behind the line.
        payload: usize,
    },
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

/// Explains `datagram`, a line for each range of bytes. The first bytes tell the formats
/// apart, which is good enough for a person who looks at a datagram, and not for a server.
///
/// # Errors
///
/// [`Undecodable`], for a header naming the byte at fault.
pub fn explain(datagram: &[u8]) -> Result<String, Undecodable> {
    if ppv2::is_v1(datagram) {
        let (line, payload) = version_1(datagram);
        return Err(Undecodable::Version1 {
            line,
            payload: payload.len(),
        });
    }
    let mut lines = Lines {
        bytes: datagram,
        at: 0,
        text: String::new(),
    };
    let payload = if datagram.starts_with(&SPP_MAGIC) {
        let (header, payload) = spp::decode(datagram)?;
        lines.add_spp(&header);
        payload
    } else {
        let decoder = Decoder::new().max_header_len(usize::MAX);
        let (header, payload) = decoder.decode(datagram)?;
        lines.add_v2(&header, datagram[13]);
        payload
    };
    let mut meaning = format!("{} bytes", payload.len());
    if let Some(second) = format_of(payload) {
        let _ = write!(meaning, "; begins like another header: {second}");
    }
    lines.add(payload.len(), "payload", &meaning);
    Ok(lines.text)
}

/// The line of version 1 that `datagram` begins with, printable and without its end, and
/// what follows it.
pub(super) fn version_1(datagram: &[u8]) -> (String, &[u8]) {
    let end = datagram.windows(2).position(|bytes| bytes == b"\r\n");
    let (line, payload) = match end {
        Some(end) => (&datagram[..end], &datagram[end + 2..]),
        None => (datagram, &[][..]),
    };
    // The longest line has 107 bytes with its end (section 2.1).
    let shown = &line[..line.len().min(107)];
    (shown.escape_ascii().to_string(), payload)
}

/// What the first bytes look like, for a person to judge.
pub(super) fn format_of(bytes: &[u8]) -> Option<&'static str> {
    if bytes.starts_with(&SIGNATURE) {
        Some("PROXY protocol v2")
    } else if bytes.len() >= spp::SPP_HEADER_LEN && bytes.starts_with(&SPP_MAGIC) {
        Some("Simple Proxy Protocol")
    } else if ppv2::is_v1(bytes) {
        Some("text of PROXY protocol v1")
    } else {
        None
    }
}

struct Lines<'a> {
    bytes: &'a [u8],
    at: usize,
    text: String,
}

impl Lines<'_> {
    fn add_v2(&mut self, header: &Header<'_>, family_transport: u8) {
        self.add(12, "signature", "PROXY protocol v2");
        self.add(1, "version, command", command(header));
        self.add(1, "family, transport", family(family_transport));
        let len = header.as_bytes().len();
        let length = format!("{}, so the header has {len} bytes", len - FIXED_LEN);
        self.add(2, "length", &length);
        match header.origin() {
            Origin::Ip {
                source,
                destination,
                ..
            } => {
                let size = if source.is_ipv4() { 4 } else { 16 };
                self.add(size, "source address", &source.ip().to_string());
                self.add(size, "destination address", &destination.ip().to_string());
                self.add(2, "source port", &source.port().to_string());
                self.add(2, "destination port", &destination.port().to_string());
            }
            Origin::Unix {
                source,
                destination,
                ..
            } => {
                self.add(108, "source path", &path(source));
                self.add(108, "destination path", &path(destination));
            }
            Origin::Local | Origin::Unspecified | _ => {
                self.add(header.skipped().len(), "skipped", "ignored");
            }
        }
        for tlv in header.tlvs() {
            let what = format!("TLV {}", tlv.kind);
            self.add(3, &what, &format!("{} bytes", tlv.value.len()));
            if !tlv.value.is_empty() {
                let meaning = meaning(header.tlvs(), tlv);
                self.add(tlv.value.len(), "  value", &meaning);
            }
        }
    }

    fn add_spp(&mut self, header: &SppHeader) {
        self.add(2, "magic number", "Simple Proxy Protocol (SPP)");
        self.add(16, "client address", &header.client.ip().to_string());
        self.add(16, "proxy address", &header.proxy.ip().to_string());
        self.add(2, "client port", &header.client.port().to_string());
        self.add(2, "proxy port", &header.proxy.port().to_string());
    }

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
pub(super) fn meaning(tlvs: Tlvs<'_>, tlv: Tlv<'_>) -> String {
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
        // As `/sessions` and the access log show it.
        TlvType::UNIQUE_ID => hex(tlv.value),
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

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
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
    fn spp_is_explained_and_a_header_in_the_payload_is_named() {
        let header = SppHeader {
            client: "203.0.113.11:54321".parse().unwrap(),
            proxy: "[2001:db8::10]:9000".parse().unwrap(),
        };
        let bytes = header.to_bytes();
        let text = explain(&[&bytes[..], b"hello"].concat()).unwrap();
        for part in [
            "       0..2  56ec ",
            "client address       203.0.113.11\n",
            "proxy address        2001:db8::10\n",
            "client port          54321\n",
            "     36..38  2328 ",
            "     38..43  68656c6c6f ",
            " 5 bytes\n",
        ] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
        for (second, name) in [
            (&bytes[..], "Simple Proxy Protocol"),
            (&SIGNATURE[..], "PROXY protocol v2"),
            (b"PROXY UNKNOWN\r\n", "text of PROXY protocol v1"),
        ] {
            let text = explain(&[&bytes, second].concat()).unwrap();
            let part = format!("begins like another header: {name}");
            assert!(text.contains(&part), "{part} is missing in\n{text}");
        }
        let short = explain(&bytes[..37]).unwrap_err();
        assert!(matches!(short, Undecodable::Spp(error) if error.offset() == 37));
    }

    #[test]
    fn version_1_is_no_header_and_the_fix_is_named() {
        let line = "PROXY TCP4 203.0.113.11 198.51.100.10 54321 9000";
        let error = explain(format!("{line}\r\nhello").as_bytes()).unwrap_err();
        let message = error.to_string();
        for part in [
            &format!("`{line}` is the text"),
            "5 bytes",
            "`proxy_protocol v2;`",
        ] {
            assert!(message.contains(part), "{part} is missing in\n{message}");
        }
        let long = [b"PROXY TCP4 \x1b", &[b'x'; 9000][..]].concat();
        let message = explain(&long).unwrap_err().to_string();
        assert!(
            message.len() < 600 && message.starts_with("`PROXY TCP4 \\x1bxxx"),
            "{message}"
        );
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
