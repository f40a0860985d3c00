//! What a health check is, and what it can find out about a server.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

use rustix::io::Errno;
use socket2::{SockAddr, SockRef};
use tokio::time::Instant;

use crate::config::Header;
use ppv2::spp::SppHeader;
use ppv2_engine::mode::{Mode, RewriteOn};

/// Finds out whether one server serves.
pub(super) trait HealthCheck: Send + 'static {
    /// Checks once, until `deadline` at the latest.
    fn check(&mut self, deadline: Instant) -> impl Future<Output = Outcome> + Send;
}

/// The result of one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Passed,
    Refused,
    Timeout,
    WrongAnswer,
    Unreachable,
    /// The check says nothing about the server: this host could not ask (no descriptor,
    /// no memory, no such source address, its own firewall) or had no time to search the
    /// answer, or too few clients sent datagrams.
    Unknown,
}

impl Outcome {
    /// All of them, in their order, with their names in metrics.
    pub(super) const ALL: [(Self, &'static str); 6] = [
        (Self::Passed, "passed"),
        (Self::Refused, "refused"),
        (Self::Timeout, "timeout"),
        (Self::WrongAnswer, "wrong_answer"),
        (Self::Unreachable, "unreachable"),
        (Self::Unknown, "not_sent"),
    ];

    pub(super) fn label(self) -> &'static str {
        Self::ALL[self as usize].1
    }

    /// The meaning of an error before a datagram was sent, or of a connection.
    pub(super) fn of(error: &io::Error) -> Self {
        match Errno::from_io_error(error) {
            // A server may close a connection before it has read the request.
            Some(Errno::CONNREFUSED | Errno::CONNRESET | Errno::CONNABORTED | Errno::PIPE) => {
                Self::Refused
            }
            Some(Errno::TIMEDOUT) => Self::Timeout,
            Some(
                Errno::MFILE
                | Errno::NFILE
                | Errno::NOBUFS
                | Errno::NOMEM
                | Errno::AGAIN
                | Errno::PERM,
            )
            | None => Self::Unknown,
            // Clients' datagrams can't be sent to such an address either.
            Some(_) => Self::Unreachable,
        }
    }

    /// The meaning of an error after a datagram was sent, if it has one: most are ICMP
    /// errors (`icmp_err_convert` of Linux).
    pub(super) fn of_sent(error: &io::Error) -> Option<Self> {
        match Errno::from_io_error(error)? {
            Errno::CONNREFUSED => Some(Self::Refused),
            Errno::NETUNREACH
            | Errno::HOSTUNREACH
            | Errno::NETDOWN
            | Errno::HOSTDOWN
            | Errno::NONET
            | Errno::NOPROTOOPT => Some(Self::Unreachable),
            _ => None,
        }
    }
}

/// What a server expects in front of clients' datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reads {
    /// Nothing.
    Payload,
    /// A PROXY v2 header.
    V2,
    /// A Simple Proxy Protocol header, which it returns.
    Spp,
}

impl Reads {
    /// Of a server in this mode.
    pub(crate) fn of(mode: Mode) -> Self {
        match mode {
            Mode::Spp => Self::Spp,
            Mode::Ppv2 { .. } | Mode::Dsr(RewriteOn::Sdk { .. }) => Self::V2,
            Mode::Transparent { .. }
            | Mode::Dsr(RewriteOn::Proxy | RewriteOn::Server)
            | Mode::Plain => Self::Payload,
        }
    }
}

/// The server to check, and the address to check it from.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Target {
    pub(super) address: SocketAddr,
    pub(super) source: Option<IpAddr>,
    /// The source is an address of a network, which no interface has.
    pub(super) freebind: bool,
    pub(super) reads: Reads,
}

impl Target {
    /// The local address to bind, of the server's family.
    pub(super) fn local(&self) -> SocketAddr {
        let any: IpAddr = match self.address {
            SocketAddr::V4(_) => [0; 4].into(),
            SocketAddr::V6(_) => [0u16; 8].into(),
        };
        SocketAddr::new(self.source.unwrap_or(any), 0)
    }

    /// Binds a socket to [`local`](Self::local).
    pub(super) fn bind(&self, socket: &impl AsFd) -> io::Result<()> {
        let socket = SockRef::from(socket);
        // A local route is enough for IPv4 alone (ip(7), IP_FREEBIND).
        if self.freebind && self.address.is_ipv6() {
            socket.set_freebind_v6(true)?;
        }
        socket.bind(&SockAddr::from(self.local()))
    }

    /// It at another port, if one is configured for the check.
    pub(super) fn with(self, port: Option<u16>) -> Self {
        Self {
            address: self.at(port),
            ..self
        }
    }

    /// The server's address with another port, if one is configured for the check.
    pub(super) fn at(&self, port: Option<u16>) -> SocketAddr {
        let mut address = self.address;
        address.set_port(port.unwrap_or(address.port()));
        address
    }
}

/// What stands in front of a datagram of the proxy's own from one address to another, to a
/// server that `reads` this. Simple Proxy Protocol has no command LOCAL: the proxy is the
/// client itself.
pub(crate) fn header_of_own(
    header: Header,
    reads: Reads,
    from: SocketAddr,
    to: SocketAddr,
) -> Vec<u8> {
    match (header, reads) {
        (Header::Auto, Reads::Payload) | (Header::None, _) => Vec::new(),
        (Header::Auto, Reads::Spp) => {
            let header = SppHeader {
                client: from,
                proxy: to,
            };
            header.to_bytes().to_vec()
        }
        (Header::Auto, Reads::V2) | (Header::Local, _) => {
            let mut buffer = [0; ppv2::FIXED_LEN];
            let header = ppv2::Encoder::local(&mut buffer).map(ppv2::Encoder::finish);
            header.unwrap_or_default().to_vec()
        }
    }
}

/// Hides the error number of a failed bind, which would count against the server.
pub(super) fn own(error: io::Error) -> io::Error {
    io::Error::other(error)
}

/// Results in a row: how one kind of check stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Streak {
    is_down: bool,
    /// Results in a row that contradict it.
    against: u32,
}

impl Streak {
    /// One that has failed often enough.
    pub(super) fn down() -> Self {
        Self {
            is_down: true,
            against: 0,
        }
    }

    pub(super) fn is_down(self) -> bool {
        self.is_down
    }

    /// Adds a result: `fall` failures in a row turn it down, `rise` successes up.
    /// Returns whether it turned.
    pub(super) fn add(&mut self, passed: bool, fall: u32, rise: u32) -> bool {
        if passed != self.is_down {
            self.against = 0;
            return false;
        }
        self.against += 1;
        let turns = self.against >= if self.is_down { rise } else { fall };
        if turns {
            self.is_down = !self.is_down;
            self.against = 0;
        }
        turns
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_streak_turns_after_fall_or_rise_in_a_row_and_no_sooner(
            results in proptest::collection::vec(any::<bool>(), 0..200),
            fall in 1u32..6,
            rise in 1u32..6,
        ) {
            let mut streak = Streak::default();
            let (mut down, mut changes) = (false, 0u32);
            for n in 0..results.len() {
                let needed = if down { rise } else { fall };
                let changed = streak.add(results[n], fall, rise);
                if changed {
                    let row = &results[n + 1 - needed as usize..=n];
                    prop_assert!(row.iter().all(|good| *good == down));
                    down = !down;
                    changes += 1;
                }
                prop_assert_eq!(streak.is_down(), down);
            }
            // Flapping is bounded by the shorter row.
            let most = results.len() / fall.min(rise) as usize;
            prop_assert!(changes as usize <= most);
        }
    }

    #[test]
    fn fall_failures_take_a_server_down_and_rise_successes_bring_it_back() {
        let mut streak = Streak::default();
        let added = |streak: &mut Streak, results: &[bool]| -> Vec<bool> {
            results.iter().map(|good| streak.add(*good, 3, 2)).collect()
        };
        let results = [false, false, true, false, false];
        assert_eq!(added(&mut streak, &results), [false; 5]);
        assert_eq!(added(&mut streak, &[false]), [true]);
        let results = [true, false, true, true];
        assert_eq!(added(&mut streak, &results), [false, false, false, true]);
    }
}
