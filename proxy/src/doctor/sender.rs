//! Where servers answer from. A session's socket takes replies from the server that it
//! was connected to alone, and the kernel drops others unseen; here a socket that is
//! not connected takes whatever comes.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::thread;

use super::Finding;
use super::probe::{PATIENCE, QUESTION};
use crate::config::{Config, Expect, Header, Probe, Server};
use ppv2_engine::mode::Mode;

/// Servers that are asked at a time.
const AT_ONCE: usize = 64;

/// A server, and what it is asked.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Question {
    server: SocketAddr,
    source: Option<IpAddr>,
    datagram: Vec<u8>,
    /// The configuration says that it is answered.
    is_answered: bool,
}

/// Asks each server that the proxy writes to in its own name, by the health checks'
/// datagram if there is one, and says where the answer came from.
pub(super) fn examine(config: &Config) -> Vec<Finding> {
    let served = config.served();
    let heard = served.filter(|(_, _, mode)| mode.takes_replies() && !mode.spoofs());
    let questions: BTreeSet<_> = heard
        .map(|(_, server, mode)| Question::of(server, mode))
        .collect();
    let questions: Vec<_> = questions.into_iter().collect();
    let mut findings = Vec::new();
    for some in questions.chunks(AT_ONCE) {
        thread::scope(|scope| {
            let asked: Vec<_> = some
                .iter()
                .map(|question| (question, scope.spawn(|| question.ask())))
                .collect();
            let told = asked.into_iter().map(|(question, asked)| {
                let no_thread = |_| Err(io::Error::other("the thread that asked has ended"));
                question.finding(asked.join().unwrap_or_else(no_thread))
            });
            findings.extend(told);
        });
    }
    findings
}

impl Question {
    fn of(server: &Server, mode: Mode) -> Self {
        let health = server.health.as_ref();
        let (payload, header, is_answered) = match health.and_then(|health| health.probe.as_ref()) {
            Some(Probe::Udp {
                payload,
                expect,
                header,
            }) => (payload.as_slice(), *header, *expect != Expect::Silence),
            Some(Probe::Dns { query, header }) => (query.as_slice(), *header, true),
            Some(Probe::Tcp { .. } | Probe::Http { .. }) | None => (QUESTION, Header::Auto, false),
        };
        let has_header = match header {
            Header::Auto => matches!(mode, Mode::Ppv2 { .. }),
            Header::Local => true,
            Header::None => false,
        };
        let mut buffer = [0; ppv2::IPV6_HEADER_LEN];
        let local = has_header.then(|| ppv2::Encoder::local(&mut buffer));
        let local = local.and_then(Result::ok).map(ppv2::Encoder::finish);
        Self {
            server: server.address.0,
            source: server.sources.first().copied(),
            datagram: [local.unwrap_or_default(), payload].concat(),
            is_answered,
        }
    }

    /// The address that an answer came from, if one came.
    fn ask(&self) -> io::Result<Option<SocketAddr>> {
        let any: IpAddr = match self.server {
            SocketAddr::V4(_) => [0; 4].into(),
            SocketAddr::V6(_) => [0u16; 8].into(),
        };
        let socket = UdpSocket::bind((self.source.unwrap_or(any), 0))?;
        socket.send_to(&self.datagram, self.server)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        match socket.recv_from(&mut [0; 2048]) {
            Ok((_, sender)) => Ok(Some(sender)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn finding(&self, came: io::Result<Option<SocketAddr>>) -> Finding {
        let server = self.server;
        let what = format!("answer of server {server}");
        let nothing = format!("none within {} s", PATIENCE.as_secs());
        match came {
            Ok(Some(sender)) if sender.ip() == server.ip() && sender.port() == server.port() => {
                Finding::right(what, "comes from where the server was asked")
            }
            Ok(Some(sender)) => Finding::fatal(
                what,
                format!(
                    "comes from {sender}, and reaches no client: a reply must come from the address and port that was asked"
                ),
                format!(
                    "have the server answer from {server}, by binding that address rather than a wildcard, or list it as \"{sender}\" if it listens there"
                ),
            ),
            Ok(None) if self.is_answered => Finding::advice(
                what,
                nothing,
                "start the server; `probe` in the configuration says that it answers this datagram",
            ),
            Ok(None) => Finding::right(
                what,
                format!(
                    "{nothing}, which may be right: a `probe` of kind udp or dns says what the server answers"
                ),
            ),
            Err(error) => Finding::advice(
                what,
                format!("could not be asked for: {error}"),
                "see the route to the server, and `source`",
            ),
        }
    }
}
