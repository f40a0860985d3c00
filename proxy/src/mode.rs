//! Modes: what a server is sent in front of a client's datagram.

use crate::address::{ClientAddr, ListenerAddr};
use crate::net::MAX_HEADER;

/// How a server is told who the client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// By a PROXY v2 header in front of the datagram.
    Ppv2 {
        /// On which datagrams of a session.
        emit: Emit,
        /// With a checksum, 7 bytes more.
        crc32c: bool,
    },
    /// Not at all.
    Plain,
}

/// Which datagrams of a session carry the header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Emit {
    /// Every one, as the specification asks (receivers parse each datagram by
    /// itself).
    #[default]
    Every,
    /// The first alone, for servers that remember it.
    First,
}

impl Mode {
    /// What to write in front of the datagrams of one session. It is the same
    /// for all of them, so it is made once.
    #[must_use]
    pub fn prefix(self, client: ClientAddr, local: ListenerAddr) -> Prefix {
        match self {
            Self::Plain => Prefix::NONE,
            Self::Ppv2 { emit, crc32c } => Prefix::header(client, local, crc32c, emit),
        }
    }

    /// The mode's name in configuration, metrics and logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ppv2 { .. } => "ppv2",
            Self::Plain => "plain",
        }
    }
}

/// The bytes in front of a session's datagrams.
#[derive(Clone, Debug)]
pub struct Prefix {
    bytes: [u8; MAX_HEADER],
    len: usize,
    emit: Emit,
}

impl Prefix {
    const NONE: Self = Self {
        bytes: [0; MAX_HEADER],
        len: 0,
        emit: Emit::Every,
    };

    fn header(client: ClientAddr, local: ListenerAddr, crc32c: bool, emit: Emit) -> Self {
        let mut bytes = [0; MAX_HEADER];
        let header = ppv2::Encoder::udp(&mut bytes, client.0, local.0).and_then(|encoder| {
            if crc32c {
                encoder.crc32c()
            } else {
                Ok(encoder)
            }
        });
        let len = header
            .expect("there is room for the longest header and its checksum")
            .finish()
            .len();
        Self { bytes, len, emit }
    }

    /// Whether it stands in front of the session's first datagram alone.
    #[must_use]
    pub fn is_once(&self) -> bool {
        self.emit == Emit::First
    }

    /// The bytes for the session's next datagram, of which `sent` have gone out
    /// before.
    #[must_use]
    pub fn for_datagram(&self, sent: u64) -> &[u8] {
        match self.emit {
            Emit::First if sent > 0 => &[],
            Emit::First | Emit::Every => &self.bytes[..self.len],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: &str = "[2001:db8:c::11]:54321";
    const LOCAL: &str = "[2001:db8:a::10]:9000";

    fn prefix(mode: Mode) -> Prefix {
        mode.prefix(
            ClientAddr(CLIENT.parse().unwrap()),
            ListenerAddr(LOCAL.parse().unwrap()),
        )
    }

    #[test]
    fn the_longest_header_fits_and_names_client_and_listener() {
        let prefix = prefix(Mode::Ppv2 {
            emit: Emit::Every,
            crc32c: true,
        });
        for sent in [0, 1, 1_000_000] {
            let (header, rest) = ppv2::decode(prefix.for_datagram(sent)).unwrap();
            assert_eq!(header.client(), Some(CLIENT.parse().unwrap()));
            assert_eq!(header.destination(), Some(LOCAL.parse().unwrap()));
            assert!(header.tlvs().crc32c().is_some());
            assert!(rest.is_empty());
        }
    }

    #[test]
    fn the_first_datagram_alone_carries_it_on_request() {
        let prefix = prefix(Mode::Ppv2 {
            emit: Emit::First,
            crc32c: false,
        });
        assert_eq!(prefix.for_datagram(0).len(), ppv2::IPV6_HEADER_LEN);
        assert!(prefix.for_datagram(1).is_empty());
    }

    #[test]
    fn plain_adds_nothing() {
        assert!(prefix(Mode::Plain).for_datagram(0).is_empty());
    }
}
