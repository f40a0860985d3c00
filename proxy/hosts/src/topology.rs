//! The input of this crate: what the proxy's configuration says about hosts.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::reply_path::{ReplyPath, Rewriter};

/// Stand for clients anywhere: addresses kept for documentation (RFC 5737, RFC 3849),
/// which only default routes lead to.
const ANYWHERE: [&str; 2] = ["203.0.113.1", "2001:db8:ffff::1"];

/// Listeners and the servers behind them.
#[derive(Clone, Debug, Default)]
pub struct Topology {
    /// Addresses that clients write to.
    pub listeners: BTreeSet<SocketAddr>,
    /// Networks of the clients that may use a listener, in the order of the configuration.
    pub allow: Vec<IpNet>,
    /// Networks of other proxies, whose headers a listener believes.
    pub senders: BTreeSet<IpNet>,
    /// Each server of each listener. A server of two listeners is here twice.
    pub servers: Vec<Server>,
    /// Addresses that the proxy is configured to write to servers from.
    pub sources: BTreeSet<IpAddr>,
    /// Networks that the proxy's sessions have source addresses of.
    pub source_networks: Vec<SourceNetwork>,
    /// The most sessions that there can be.
    pub max_sessions: usize,
    /// Bytes that the proxy asks the kernel for as the receive buffer of a listener.
    pub receive_buffer: usize,
    /// The same of a socket that all sessions of a worker share.
    pub shared_buffer: usize,
}

/// A network that gives each session a source address.
#[derive(Clone, Debug)]
pub struct SourceNetwork {
    pub network: IpNet,
    /// Its address that health checks are sent from.
    pub probe: IpAddr,
    /// The name of its upstream.
    pub upstream: String,
    /// The servers that are written to from it.
    pub servers: BTreeSet<SocketAddr>,
}

/// A server as one listener uses it.
#[derive(Clone, Debug)]
pub struct Server {
    /// With the first of its ports.
    pub address: SocketAddr,
    /// The last of its ports.
    pub last_port: u16,
    /// The name of its upstream.
    pub upstream: String,
    /// The addresses of its listener.
    pub listener: Vec<SocketAddr>,
    /// Whether its listener reads headers of other proxies: they name clients of either family,
    /// and the address that these wrote to, which no configuration tells.
    pub reads_headers: bool,
    /// Who gives its replies the listener's address; `None` if they go to the proxy's own.
    pub rewriter: Option<Rewriter>,
    /// Whether it sees the client's own port as the source.
    pub spoofs_ports: bool,
    /// Bytes of the header in front of each datagram, 0 without one.
    pub header_len: usize,
    /// Bytes of the reply tag in the header, 0 without one.
    pub tag_len: usize,
    /// Whether datagrams that are too long are dropped rather than fragmented.
    pub dont_fragment: bool,
    /// The address that the proxy's health checks of it come from; `None` for the kernel's
    /// choice.
    pub source: Option<IpAddr>,
    /// Why it sends datagrams to the proxy's own address, if it does.
    pub answers_proxy: Option<&'static str>,
    /// A datagram that it may answer.
    pub question: Vec<u8>,
    /// Whether the configuration says that it answers `question`.
    pub answers_question: bool,
}

impl Server {
    /// Whether the server is written to from clients' addresses.
    pub(crate) fn sees_clients(&self) -> bool {
        self.rewriter.is_some_and(Rewriter::spoofs)
    }

    /// Whether replies come to the proxy's process.
    pub(crate) fn answers_to_proxy(&self) -> bool {
        matches!(self.rewriter, None | Some(Rewriter::Proxy))
    }
}

impl Topology {
    /// The paths of all replies that don't go to the proxy's own address. A client's
    /// address reaches servers of its own family alone; a header reaches any. Those that
    /// leave from an address which only a header tells are left out.
    pub(crate) fn reply_paths(&self) -> Vec<ReplyPath> {
        let mut paths = Vec::new();
        for server in &self.servers {
            let Some(rewriter) = server.rewriter else {
                continue;
            };
            let reached = server.listener.iter().filter(|listener| {
                let same_family = listener.is_ipv4() == server.address.is_ipv4();
                match (server.reads_headers, rewriter) {
                    (true, Rewriter::Sdk) => false,
                    (true, Rewriter::Proxy) => true,
                    _ => !rewriter.spoofs() || same_family,
                }
            });
            paths.extend(reached.map(|listener| ReplyPath {
                rewriter,
                server: server.address,
                last_port: server.last_port,
                listener: *listener,
                spoofs_ports: server.spoofs_ports,
            }));
        }
        paths
    }

    /// An address of a client: the named one, or one of the first network that a listener
    /// allows. `None` if neither is of that family and everybody is allowed.
    pub(crate) fn client(&self, v4: bool, named: Option<IpAddr>) -> Option<IpAddr> {
        let narrow = |net: &&IpNet| net.prefix_len() > 0 && net.addr().is_ipv4() == v4;
        let allowed = || self.allow.iter().find(narrow)?.hosts().next();
        named.filter(|ip| ip.is_ipv4() == v4).or_else(allowed)
    }

    /// As [`client`](Self::client), or an address that stands for clients anywhere.
    pub(crate) fn sample_client(&self, v4: bool, named: Option<IpAddr>) -> IpAddr {
        let anywhere = || ANYWHERE[usize::from(!v4)].parse();
        self.client(v4, named)
            .unwrap_or_else(|| anywhere().expect("it is an address"))
    }
}

/// Whether `client` stands for clients anywhere.
pub(crate) fn is_anywhere(client: IpAddr) -> bool {
    ANYWHERE.iter().any(|ip| ip.parse() == Ok(client))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_bring_clients_of_either_family() {
        let paths = |reads_headers, rewriter| {
            let topology = Topology {
                servers: vec![Server {
                    address: "192.0.2.1:53".parse().unwrap(),
                    last_port: 53,
                    upstream: String::new(),
                    listener: vec!["[2001:db8::1]:53".parse().unwrap()],
                    reads_headers,
                    rewriter: Some(rewriter),
                    spoofs_ports: false,
                    header_len: 0,
                    tag_len: 0,
                    dont_fragment: false,
                    source: None,
                    answers_proxy: None,
                    question: Vec::new(),
                    answers_question: false,
                }],
                ..Topology::default()
            };
            topology.reply_paths().len()
        };
        assert_eq!(paths(false, Rewriter::Proxy), 0);
        assert_eq!(paths(true, Rewriter::Proxy), 1);
        // What the kernel writes is the listener's own address.
        assert_eq!(paths(true, Rewriter::ServerHost), 0);
        assert_eq!(paths(false, Rewriter::Sdk), 1);
        assert_eq!(paths(true, Rewriter::Sdk), 0);
    }

    #[test]
    fn sample_client_is_one_that_a_listener_allows() {
        let topology = Topology {
            allow: ["198.51.100.0/24", "::/0"]
                .map(|n| n.parse().unwrap())
                .into(),
            ..Topology::default()
        };
        let allowed = Some("198.51.100.1".parse().unwrap());
        assert_eq!(topology.client(true, None), allowed);
        assert_eq!(Some(topology.sample_client(true, None)), allowed);
        assert_eq!(topology.client(false, None), None);
        assert!(topology.sample_client(false, None).is_ipv6());
    }
}
