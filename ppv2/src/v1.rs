//! The PROXY protocol's version 1, as far as a receiver of datagrams may know it:
//! that it is there.

/// What follows `PROXY ` in a v1 line: the protocols of section 2.1, and the two for
/// UDP that some senders write though the section does not have them.
const PROTOCOLS: [&[u8]; 5] = [b"TCP4", b"TCP6", b"UNKNOWN", b"UDP4", b"UDP6"];

/// Whether `datagram` begins with the text of PROXY protocol v1, such as
/// `PROXY TCP4 203.0.113.11 198.51.100.10 54321 9000`.
///
/// Use it only to say *why* a datagram is dropped: of a sender that must write v2,
/// and whose datagram does not [decode](crate::decode). nginx with
/// `proxy_protocol on` writes such text in front of the first datagram of each of its
/// sessions. Version 1 is for streams alone (section 2.1), so this crate never reads an
/// address from it. A payload may begin like this, too.
///
/// Looks at 14 bytes at most. The line need not be complete.
///
/// ```
/// assert!(ppv2::is_v1(b"PROXY TCP4 203.0.113.11 198.51.100.10 54321 9000\r\nhello"));
/// assert!(ppv2::is_v1(b"PROXY UNKNOWN\r\nhello"));
/// assert!(!ppv2::is_v1(b"PROXY of the crown"));
/// assert!(!ppv2::is_v1(b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00ping"));
/// ```
#[must_use]
pub fn is_v1(datagram: &[u8]) -> bool {
    let Some(rest) = datagram.strip_prefix(b"PROXY ") else {
        return false;
    };
    PROTOCOLS.iter().any(|protocol| {
        rest.strip_prefix(*protocol)
            .and_then(<[u8]>::first)
            .is_some_and(|next| matches!(next, b' ' | b'\r'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_nginx_and_others_are_recognised() {
        for line in [
            "PROXY TCP4 127.0.0.1 127.0.0.1 40000 9000\r\n",
            "PROXY TCP6 2001:db8::1 2001:db8::10 40000 9000\r\n",
            "PROXY UNKNOWN\r\n",
            "PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n",
            "PROXY UDP4 127.0.0.1 127.0.0.1 40000 9000\r\n",
            "PROXY UDP6 ::1 ::1 40000 9000\r\n",
            "PROXY TCP4 cut",
        ] {
            assert!(is_v1(line.as_bytes()), "{line:?}");
        }
    }

    #[test]
    fn other_datagrams_are_not() {
        for bytes in [
            "",
            "PROXY",
            "PROXY ",
            "PROXY TCP",
            "PROXY TCP4",
            "PROXY TCP45 ",
            "PROXY SCTP4 ",
            "proxy tcp4 ",
            " PROXY TCP4 ",
            "PROXY  TCP4 ",
            "\r\n\r\n\0\r\nQUIT\n",
        ] {
            assert!(!is_v1(bytes.as_bytes()), "{bytes:?}");
        }
    }
}
