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

    /// Whether it stands in front of one datagram alone, which has not gone out
    /// yet. Until it has, datagrams must go one by one: were a server to see
    /// any before it, the client could pass off a header of its own as ours.
    #[must_use]
    pub fn is_due_once(&self) -> bool {
        self.emit == Emit::First && self.len > 0
    }

    /// Notes that a datagram with it has gone out.
    pub fn went_out(&mut self) {
        if self.emit == Emit::First {
            self.len = 0;
        }
    }

    /// The bytes for the session's next datagram.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
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
        let mut prefix = prefix;
        for _ in 0..3 {
            assert!(!prefix.is_due_once());
            let (header, rest) = ppv2::decode(prefix.bytes()).unwrap();
            assert_eq!(header.client(), Some(CLIENT.parse().unwrap()));
            assert_eq!(header.destination(), Some(LOCAL.parse().unwrap()));
            assert!(header.tlvs().crc32c().is_some());
            assert!(rest.is_empty());
            prefix.went_out();
        }
    }

    #[test]
    fn the_first_datagram_alone_carries_it_on_request() {
        let mut prefix = prefix(Mode::Ppv2 {
            emit: Emit::First,
            crc32c: false,
        });
        assert!(prefix.is_due_once());
        assert_eq!(prefix.bytes().len(), ppv2::IPV6_HEADER_LEN);
        prefix.went_out();
        assert!(!prefix.is_due_once());
        assert!(prefix.bytes().is_empty());
    }

    #[test]
    fn plain_adds_nothing() {
        assert!(prefix(Mode::Plain).bytes().is_empty());
    }
}
