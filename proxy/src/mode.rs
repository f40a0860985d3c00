//! Modes: how a server learns who the client is, by what stands in front of a
//! datagram or by its source address, and whether its replies come back.

use std::net::SocketAddr;

use crate::address::{ClientAddr, ListenerAddr, ServerAddr};
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
    /// By the source address, which is the client's. Replies are routed to the
    /// proxy, which passes them on.
    Transparent {
        /// The source port.
        port: SourcePort,
    },
    /// By the source address, or by a header, with replies that never come to the
    /// proxy: direct server return.
    Dsr(RewriteOn),
    /// Not at all.
    Plain,
}

/// From which port a server is written to in the client's name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SourcePort {
    /// One that the kernel chooses.
    #[default]
    Any,
    /// The client's own.
    Client,
}

/// Who makes the reply of direct server return come from the listener's address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RewriteOn {
    /// The kernel of the proxy's host, which the server routes its replies to.
    #[default]
    Proxy,
    /// The kernel of the server's host, which sends them by itself.
    Server,
    /// The server, which reads the header and sends from the address that it
    /// names.
    Sdk {
        /// The header comes with a checksum, 7 bytes more.
        crc32c: bool,
    },
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
            Self::Ppv2 { emit, crc32c } => Prefix::header(client, local, crc32c, emit),
            Self::Dsr(RewriteOn::Sdk { crc32c }) => {
                Prefix::header(client, local, crc32c, Emit::Every)
            }
            Self::Transparent { .. } | Self::Dsr(_) | Self::Plain => Prefix::NONE,
        }
    }

    /// The address that the datagrams of one session are sent from, if it is the
    /// client's: port 0 is one of the kernel's choice.
    #[must_use]
    pub fn source(self, client: ClientAddr) -> Option<SocketAddr> {
        match self {
            Self::Transparent {
                port: SourcePort::Any,
            } => Some(SocketAddr::new(client.0.ip(), 0)),
            Self::Transparent {
                port: SourcePort::Client,
            }
            | Self::Dsr(RewriteOn::Proxy | RewriteOn::Server) => Some(client.0),
            Self::Ppv2 { .. } | Self::Dsr(RewriteOn::Sdk { .. }) | Self::Plain => None,
        }
    }

    /// Whether servers are written to from clients' addresses.
    #[must_use]
    pub fn spoofs(self) -> bool {
        match self {
            Self::Transparent { .. } | Self::Dsr(RewriteOn::Proxy | RewriteOn::Server) => true,
            Self::Ppv2 { .. } | Self::Dsr(RewriteOn::Sdk { .. }) | Self::Plain => false,
        }
    }

    /// Whether this server can be written to for clients of IPv6, or of IPv4: one
    /// that sees a client as the source has those of its own family alone.
    #[must_use]
    pub fn reaches(self, server: ServerAddr, v6: bool) -> bool {
        !self.spoofs() || server.0.is_ipv6() == v6
    }

    /// Whether servers are written to from clients' own ports, too.
    #[must_use]
    pub fn spoofs_ports(self) -> bool {
        match self {
            Self::Transparent { port } => port == SourcePort::Client,
            Self::Dsr(_) => self.spoofs(),
            Self::Ppv2 { .. } | Self::Plain => false,
        }
    }

    /// Whether a session's first datagram alone carries the header.
    #[must_use]
    pub fn emits_once(self) -> bool {
        matches!(
            self,
            Self::Ppv2 {
                emit: Emit::First,
                ..
            }
        )
    }

    /// Whether replies come to the proxy, which passes them on.
    #[must_use]
    pub fn takes_replies(self) -> bool {
        !matches!(self, Self::Dsr(_))
    }

    /// The mode's name in configuration, metrics and logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ppv2 { .. } => "ppv2",
            Self::Transparent { .. } => "transparent",
            Self::Dsr(_) => "dsr",
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
    fn only_servers_that_read_a_header_get_one() {
        let transparent = |port| Mode::Transparent { port };
        let without = [
            Mode::Plain,
            transparent(SourcePort::Any),
            transparent(SourcePort::Client),
            Mode::Dsr(RewriteOn::Proxy),
            Mode::Dsr(RewriteOn::Server),
        ];
        for mode in without {
            assert!(prefix(mode).bytes().is_empty(), "{mode:?}");
        }
        let sdk = prefix(Mode::Dsr(RewriteOn::Sdk { crc32c: true }));
        assert!(!sdk.is_due_once());
        assert_eq!(sdk.bytes().len(), ppv2::IPV6_HEADER_LEN + 7);
    }

    #[test]
    fn a_server_that_reads_no_header_sees_the_client_as_the_source() {
        let client: SocketAddr = CLIENT.parse().unwrap();
        let source = |mode: Mode| mode.source(ClientAddr(client));
        let any = Mode::Transparent {
            port: SourcePort::Any,
        };
        assert_eq!(source(any), Some(SocketAddr::new(client.ip(), 0)));
        let own = Mode::Transparent {
            port: SourcePort::Client,
        };
        for mode in [
            own,
            Mode::Dsr(RewriteOn::Proxy),
            Mode::Dsr(RewriteOn::Server),
        ] {
            assert_eq!(source(mode), Some(client));
            assert!(mode.spoofs() && mode.spoofs_ports());
        }
        assert!(any.spoofs() && !any.spoofs_ports());
        for mode in [Mode::Plain, Mode::Dsr(RewriteOn::Sdk { crc32c: false })] {
            assert_eq!(source(mode), None);
            assert!(!mode.spoofs() && !mode.spoofs_ports());
        }
        assert!(any.takes_replies() && Mode::Plain.takes_replies());
        assert!(!Mode::Dsr(RewriteOn::Proxy).takes_replies());
    }
}
