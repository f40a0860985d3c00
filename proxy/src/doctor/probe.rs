//! One datagram around the loop, in a client's name, and where it stopped.
//!
//! In mode transparent the reply must come to the very socket. In mode dsr it never
//! comes to this process, so the kernel's counters are all that can be told by.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use rustix::net::sockopt::set_ipv6_freebind;
use socket2::{Domain, Protocol, Socket, Type};
use thiserror::Error;

use super::{Finding, Told, sender, servers_of};
use crate::config::Config;
use crate::host;
use crate::returns::{self, By, Return};

/// What the server gets.
pub(super) const QUESTION: &[u8] = b"ppv2-proxy doctor --probe";

/// How long the reply may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);

/// Why nothing was sent.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// A server's host has nothing to send.
    #[error("--probe sends what the proxy sends; run it on the proxy's host, with --role proxy")]
    OnServer,
    /// Nobody's name to send in.
    #[error(
        "--probe sends to server {server} in a client's name, and every client is allowed; name one with --client IP"
    )]
    NoClient {
        /// The server.
        server: SocketAddr,
    },
}

/// Sends a datagram to each server that answers the proxy's host, or is written to from
/// clients' addresses.
///
/// # Errors
///
/// [`ProbeError`], before anything was sent.
pub fn probe(config: &Config, told: &Told) -> Result<Vec<Finding>, ProbeError> {
    let returns = returns::of(config);
    let mut pairs = Vec::new();
    for by in [By::Proxy, By::ProxyHost, By::ServerHost] {
        for found in servers_of(&returns, by) {
            let v4 = found.server.is_ipv4();
            let told = told.client.filter(|client| client.is_ipv4() == v4);
            let client = told.or_else(|| host::allowed_client(config, v4));
            let client = client.ok_or(ProbeError::NoClient {
                server: found.server,
            })?;
            pairs.push((found, client));
        }
    }
    let findings = pairs.into_iter().map(|(found, client)| send(found, client));
    Ok(findings.chain(sender::examine(config)).collect())
}

fn send(found: &Return, client: IpAddr) -> Finding {
    let (server, mode) = (found.server, found.by.mode());
    let what = format!("datagram to server {server} in the name of {client} ({mode})");
    let before = counters();
    let answer = exchange(found, client);
    let moved = moved(&before, &counters());
    let hints =
        "see the other findings; does the server answer any datagram, and route its replies here?";
    match answer {
        Err(error) => Finding::fatal(
            what,
            format!("could not be sent: {error}"),
            "see the finding on CAP_NET_RAW, and the route to the server",
        ),
        Ok(Answer::Reply) => Finding::right(what, "the reply came back"),
        Ok(Answer::Refused) => Finding::advice(
            what,
            format!(
                "came back as refused: the way is open in both directions, and nobody listens at {server}"
            ),
            "start the server",
        ),
        Ok(Answer::Nothing) if found.by == By::ServerHost => Finding::right(
            what,
            "was sent; the reply doesn't come here, and only a client can tell",
        ),
        Ok(Answer::Nothing) if found.by == By::ProxyHost && moved.forwarded > 0 => Finding::right(
            what,
            format!(
                "was sent, and what this host passes on rose by {}; that the reply came from {} only a client can tell",
                moved.forwarded, found.listener
            ),
        ),
        Ok(Answer::Nothing) => {
            let refused = moved.refused();
            let within = format!("no reply within {} s", PATIENCE.as_secs());
            if refused.is_empty() {
                Finding::advice(what, format!("{within}, and nothing dropped here"), hints)
            } else {
                let found = format!("{within}; dropped on this host meanwhile: {refused}");
                Finding::fatal(what, found, hints)
            }
        }
    }
}

enum Answer {
    Reply,
    Refused,
    Nothing,
}

/// Sends as the mode does and waits for what comes back.
fn exchange(found: &Return, client: IpAddr) -> io::Result<Answer> {
    let socket = socket_of(client)?;
    if found.by == By::Proxy {
        socket.connect(found.server)?;
        socket.send(QUESTION)?;
    } else {
        // A connected socket that a reply matches would have the kernel drop it.
        socket.send_to(QUESTION, found.server)?;
    }
    socket.set_read_timeout(Some(PATIENCE))?;
    let Err(error) = socket.recv(&mut [0; 2048]) else {
        return Ok(Answer::Reply);
    };
    if error.kind() == io::ErrorKind::ConnectionRefused {
        Ok(Answer::Refused)
    } else if error.kind() == io::ErrorKind::WouldBlock {
        Ok(Answer::Nothing)
    } else {
        Err(error)
    }
}

/// A socket with a port of the client's address.
fn socket_of(client: IpAddr) -> io::Result<UdpSocket> {
    let domain = if client.is_ipv4() {
        Domain::IPV4
    } else {
        Domain::IPV6
    };
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
    if client.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else {
        set_ipv6_freebind(&socket, true)?;
    }
    socket.bind(&SocketAddr::new(client, 0).into())?;
    Ok(socket.into())
}

/// What the kernel has counted so far, by name.
type Counters = BTreeMap<String, u64>;

/// The counters of IP, of both families.
fn counters() -> Counters {
    let mut counters = Counters::new();
    for file in ["/proc/net/snmp", "/proc/net/netstat"] {
        let text = fs::read_to_string(file).unwrap_or_default();
        pairs_of_lines(&text, &mut counters);
    }
    let text = fs::read_to_string("/proc/net/snmp6").unwrap_or_default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if let (Some(name), Some(Ok(value))) = (words.next(), words.next().map(str::parse)) {
            counters.insert(name.to_owned(), value);
        }
    }
    counters
}

/// A line of names and a line of values, both after the same word.
fn pairs_of_lines(text: &str, counters: &mut Counters) {
    let lines: Vec<_> = text.lines().collect();
    let (pairs, _) = lines.as_chunks::<2>();
    for [names, values] in pairs {
        let prefix = names.split(':').next().unwrap_or_default();
        let both = names.split_whitespace().zip(values.split_whitespace());
        for (name, value) in both.skip(1) {
            if let Ok(value) = value.parse() {
                counters.insert(format!("{prefix}{name}"), value);
            }
        }
    }
}

/// What has moved.
struct Moved {
    forwarded: u64,
    dropped: Vec<(&'static str, u64)>,
}

fn moved(before: &Counters, after: &Counters) -> Moved {
    let by = |name: &str| {
        let of = |counters: &Counters| counters.get(name).copied().unwrap_or(0);
        of(after).saturating_sub(of(before))
    };
    let reasons = [
        (
            "IpInAddrErrors",
            "IpInAddrErrors (the rule for replies is missing, or forwarding is off)",
        ),
        (
            "TcpExtIPReversePathFilter",
            "IPReversePathFilter (rp_filter)",
        ),
        (
            "Ip6InAddrErrors",
            "Ip6InAddrErrors (the rule for replies is missing)",
        ),
        ("Ip6InNoRoutes", "Ip6InNoRoutes (no route for replies)"),
    ];
    let dropped = reasons.map(|(name, reason)| (reason, by(name)));
    Moved {
        forwarded: by("IpForwDatagrams") + by("Ip6OutForwDatagrams"),
        dropped: dropped
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .collect(),
    }
}

impl Moved {
    fn refused(&self) -> String {
        let each = self
            .dropped
            .iter()
            .map(|(reason, count)| format!("{count} by {reason}"));
        each.collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_as_the_kernel_writes_them() {
        let mut before = Counters::new();
        pairs_of_lines("Ip: InAddrErrors ForwDatagrams\nIp: 3 10\n", &mut before);
        let mut after = Counters::new();
        pairs_of_lines("Ip: InAddrErrors ForwDatagrams\nIp: 4 10\n", &mut after);
        let moved = moved(&before, &after);
        assert_eq!(moved.forwarded, 0);
        assert!(
            moved.refused().starts_with("1 by IpInAddrErrors"),
            "{}",
            moved.refused()
        );
        for name in [
            "IpInAddrErrors",
            "IpForwDatagrams",
            "TcpExtIPReversePathFilter",
        ] {
            assert!(counters().contains_key(name), "no {name}");
        }
    }
}
