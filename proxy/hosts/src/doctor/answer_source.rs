//! The address that servers answer from. A session's socket is connected and takes
//! replies only from its server; the kernel drops others unseen. Here an unconnected
//! socket takes whatever arrives.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::thread;

use socket2::{Domain, Socket, Type};

use super::Finding;
use super::probe::TIMEOUT;
use crate::topology::{Server, Topology};

/// How many servers are asked at a time.
const CONCURRENCY: usize = 64;

/// A server and the datagram that it is asked with.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Question<'a> {
    server: SocketAddr,
    source: Option<IpAddr>,
    datagram: &'a [u8],
    /// The configuration says that the server answers it.
    is_answered: bool,
}

/// Asks each server that the proxy writes to from its own address, with the health check's
/// datagram if there is one, and checks where the answer comes from.
pub(super) fn examine(topology: &Topology) -> Vec<Finding> {
    let servers = topology.servers.iter();
    let asked = servers.filter(|server| server.answers_to_proxy() && !server.sees_clients());
    let questions: BTreeSet<_> = asked.map(Question::of).collect();
    let questions: Vec<_> = questions.into_iter().collect();
    let mut findings = Vec::new();
    for some in questions.chunks(CONCURRENCY) {
        thread::scope(|scope| {
            let start = |question| scope.spawn(move || Question::finding(question));
            let threads: Vec<_> = some.iter().map(start).collect();
            let ended = threads.into_iter().map(|thread| thread.join());
            findings.extend(ended.map(|finding| finding.expect("asking does not panic")));
        });
    }
    findings
}

impl<'a> Question<'a> {
    fn of(server: &'a Server) -> Self {
        Self {
            server: server.address,
            source: server.source,
            datagram: &server.question,
            is_answered: server.answers_question,
        }
    }

    /// The address that an answer came from, if one came.
    fn ask(&self) -> io::Result<Option<SocketAddr>> {
        let any: IpAddr = match self.server {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let local = SocketAddr::new(self.source.unwrap_or(any), 0);
        let socket = Socket::new(Domain::for_address(local), Type::DGRAM, None)?;
        // An address of a source network is no interface's.
        if local.is_ipv6() {
            socket.set_freebind_v6(true)?;
        }
        socket.bind(&local.into())?;
        let socket = UdpSocket::from(socket);
        socket.send_to(self.datagram, self.server)?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        match socket.recv_from(&mut [0; 2048]) {
            Ok((_, sender)) => Ok(Some(sender)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn finding(&self) -> Finding {
        let server = self.server;
        let what = format!("answer of server {server}");
        let none = format!("none within {} s", TIMEOUT.as_secs());
        match self.ask() {
            Ok(Some(sender)) if sender.ip() == server.ip() && sender.port() == server.port() => {
                Finding::ok(what, "comes from the address that was asked")
            }
            Ok(Some(sender)) => Finding::fatal(
                what,
                format!(
                    "comes from {sender} and reaches no client: a reply must come from the address and port that was asked"
                ),
                format!(
                    "have the server answer from {server}, by binding that address instead of a wildcard, or list it as \"{sender}\" if it listens there"
                ),
            ),
            Ok(None) if self.is_answered => Finding::advice(
                what,
                none,
                "start the server; according to `probe` in the configuration it answers this datagram",
            ),
            Ok(None) => Finding::ok(
                what,
                format!(
                    "{none}, which may be normal; a `probe` of kind udp or dns tells doctor what the server answers"
                ),
            ),
            Err(error) => Finding::advice(
                what,
                format!("the datagram could not be sent: {error}"),
                "check the route to the server, and `source`",
            ),
        }
    }
}
