//! `--probe`: one datagram to each server, and where it or its reply stopped.
//!
//! In mode transparent the reply must come to the very socket. In mode dsr it never comes
//! to this process, and only the kernel's counters show what became of it.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use rustix::net::sockopt::set_ipv6_freebind;
use socket2::{Domain, Protocol, Socket, Type};
use thiserror::Error;

use super::{Finding, answer_source, servers_of};
use crate::kernel::{Counters, counters};
use crate::reply_path::{ReplyPath, Rewriter};
use crate::topology::Topology;

/// The datagram that servers get whose configuration has no other.
pub const QUESTION: &[u8] = b"ppv2-proxy doctor --probe";

/// How long an answer may take.
pub(super) const TIMEOUT: Duration = Duration::from_secs(2);

/// Why nothing was sent.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// A server's host has nothing to send.
    #[error("--probe sends what the proxy sends; run it on the proxy's host, with --role proxy")]
    OnServer,
    /// There is no client address to send from.
    #[error(
        "--probe sends to server {server} from a client's address, and every client is allowed; name one with --client IP"
    )]
    NoClient { server: SocketAddr },
}

/// Sends a datagram to each server.
pub(super) fn probe(
    topology: &Topology,
    client: Option<IpAddr>,
) -> Result<Vec<Finding>, ProbeError> {
    let paths = topology.reply_paths();
    let mut pairs = Vec::new();
    for rewriter in [Rewriter::Proxy, Rewriter::ProxyHost, Rewriter::ServerHost] {
        for path in servers_of(&paths, rewriter) {
            let server = path.server;
            let client = topology.client(server.is_ipv4(), client);
            pairs.push((path, client.ok_or(ProbeError::NoClient { server })?));
        }
    }
    let findings = pairs.into_iter().map(|(path, client)| send(path, client));
    Ok(findings.chain(answer_source::examine(topology)).collect())
}

fn send(path: &ReplyPath, client: IpAddr) -> Finding {
    let (server, mode) = (path.server, path.rewriter.mode());
    let what = format!("datagram to server {server} from client {client} ({mode})");
    let before = counters();
    let reply = exchange(path, client);
    let moved = Moved::between(&before, &counters());
    match reply {
        Ok(()) => Finding::ok(what, "the reply came back"),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Finding::advice(
            what,
            "the server's host answered 'port unreachable': the network works, but nothing listens there",
            "start the server",
        ),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => no_reply(path, what, &moved),
        Err(error) => Finding::fatal(
            what,
            format!("could not be sent: {error}"),
            "see the finding on CAP_NET_RAW, and check the route to the server",
        ),
    }
}

fn no_reply(path: &ReplyPath, what: String, moved: &Moved) -> Finding {
    if path.rewriter == Rewriter::ServerHost {
        let found = "was sent; the reply doesn't come here, and only a client can see it";
        return Finding::ok(what, found);
    }
    if path.rewriter == Rewriter::ProxyHost && moved.forwarded > 0 {
        let found = format!(
            "was sent, and the count of packets that this host forwards rose by {}; only a client can see that the reply came from {}",
            moved.forwarded, path.listener
        );
        return Finding::ok(what, found);
    }
    let fix = "see the other findings; check that the server answers any datagram and routes its replies here";
    let none = format!("no reply within {} s", TIMEOUT.as_secs());
    if moved.dropped.is_empty() {
        Finding::advice(what, format!("{none}, and nothing was dropped here"), fix)
    } else {
        let dropped = moved.dropped.join(", ");
        let found = format!("{none}; dropped on this host meanwhile: {dropped}");
        Finding::fatal(what, found, fix)
    }
}

/// Sends as the mode does and waits for the reply. `WouldBlock` means that none came.
fn exchange(path: &ReplyPath, client: IpAddr) -> io::Result<()> {
    let socket = client_socket(client)?;
    if path.rewriter == Rewriter::Proxy {
        socket.connect(path.server)?;
        socket.send(QUESTION)?;
    } else {
        // The kernel would drop a reply that matches a connected socket.
        socket.send_to(QUESTION, path.server)?;
    }
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.recv(&mut [0; 2048]).map(drop)
}

/// A socket with a port of the client's address.
fn client_socket(client: IpAddr) -> io::Result<UdpSocket> {
    let address = SocketAddr::new(client, 0);
    let domain = Domain::for_address(address);
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
    if client.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else {
        set_ipv6_freebind(&socket, true)?;
    }
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// What the kernel did meanwhile.
struct Moved {
    forwarded: u64,
    /// Reasons with their counts.
    dropped: Vec<String>,
}

impl Moved {
    fn between(before: &Counters, after: &Counters) -> Self {
        let by = |name: &str| {
            let of = |counters: &Counters| counters.get(name).copied().unwrap_or(0);
            of(after).saturating_sub(of(before))
        };
        let reasons = [
            (
                "IpInAddrErrors",
                "the rule for replies is missing, or forwarding is off",
            ),
            ("TcpExtIPReversePathFilter", "rp_filter"),
            ("Ip6InAddrErrors", "the rule for replies is missing"),
            ("Ip6InNoRoutes", "no route for replies"),
        ];
        let counted = reasons.map(|(name, reason)| (by(name), name, reason));
        let dropped = counted.into_iter().filter(|(count, ..)| *count > 0);
        Self {
            forwarded: by("IpForwDatagrams") + by("Ip6OutForwDatagrams"),
            dropped: dropped
                .map(|(count, name, reason)| format!("{count} by {name} ({reason})"))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::parse_pairs;

    #[test]
    fn counters_are_read_as_the_kernel_writes_them() {
        let mut before = Counters::new();
        parse_pairs("Ip: InAddrErrors ForwDatagrams\nIp: 3 10\n", &mut before);
        let mut after = Counters::new();
        parse_pairs("Ip: InAddrErrors ForwDatagrams\nIp: 4 10\n", &mut after);
        let moved = Moved::between(&before, &after);
        assert_eq!(moved.forwarded, 0);
        let [dropped] = &moved.dropped[..] else {
            panic!("{:?}", moved.dropped)
        };
        assert!(dropped.starts_with("1 by IpInAddrErrors"), "{dropped}");
        for name in [
            "IpInAddrErrors",
            "IpForwDatagrams",
            "TcpExtIPReversePathFilter",
        ] {
            assert!(counters().contains_key(name), "no {name}");
        }
    }
}
