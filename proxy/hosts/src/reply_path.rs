//! The paths of replies in the modes that need something of a host: who makes a
//! server's reply come from the listener's address.

use std::collections::BTreeMap;
use std::net::SocketAddr;

/// Who makes a reply come from the listener's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rewriter {
    /// The proxy, which replies to clients are routed to (mode transparent).
    Proxy,
    /// The kernel of the proxy's host, which forwards them (mode dsr).
    ProxyHost,
    /// The kernel of the server's host, which sends them to clients directly (mode dsr).
    ServerHost,
    /// The server, by the SDK (mode dsr).
    Sdk,
}

impl Rewriter {
    /// The mode as the operator set it.
    pub(crate) fn mode(self) -> &'static str {
        match self {
            Self::Proxy => "mode transparent",
            Self::ProxyHost => "mode dsr, rewrite_on proxy",
            Self::ServerHost => "mode dsr, rewrite_on server",
            Self::Sdk => "mode dsr, rewrite_on sdk",
        }
    }

    /// Whether servers are written to from clients' addresses.
    pub(crate) fn spoofs(self) -> bool {
        self != Self::Sdk
    }
}

/// The path of one server's replies to the clients of one listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyPath {
    pub rewriter: Rewriter,
    /// With the first of its ports.
    pub server: SocketAddr,
    /// The last of its ports.
    pub last_port: u16,
    /// The address that clients write to.
    pub listener: SocketAddr,
    /// Whether the server is written to from clients' own ports.
    pub spoofs_ports: bool,
}

impl ReplyPath {
    /// The server's ports, as `ip rule` and nft write them.
    pub(crate) fn ports(&self) -> String {
        let first = self.server.port();
        match self.last_port > first {
            true => format!("{first}-{}", self.last_port),
            false => first.to_string(),
        }
    }

    /// Whether both servers have a port of a family in common.
    fn shares_port(&self, other: &Self) -> bool {
        self.server.is_ipv4() == other.server.is_ipv4()
            && self.server.port() <= other.last_port
            && other.server.port() <= self.last_port
    }
}

/// Two servers on one host whose replies that host can't tell apart. It knows replies
/// that it rewrites by their port alone, so all from one port must take the same path.
pub(crate) fn conflict<'a>(on_host: &[&'a ReplyPath]) -> Option<[&'a ReplyPath; 2]> {
    let mut first_of = BTreeMap::new();
    let spoofed = on_host.iter().filter(|path| path.rewriter.spoofs());
    // What is rewritten has one port.
    let is_range = |path: &&&ReplyPath| path.last_port > path.server.port();
    for range in spoofed.clone().filter(is_range) {
        let is_other =
            |path: &&&ReplyPath| path.rewriter == Rewriter::ServerHost && path.shares_port(range);
        if let Some(other) = spoofed.clone().find(is_other) {
            return Some([range, other]);
        }
    }
    let mut spoofed = spoofed;
    spoofed.find_map(|path| {
        let port = (path.server.is_ipv4(), path.server.port());
        let first = *first_of.entry(port).or_insert(*path);
        let rewritten = [first, path]
            .map(|p| p.rewriter)
            .contains(&Rewriter::ServerHost);
        let same = (first.rewriter, first.listener) == (path.rewriter, path.listener);
        (rewritten && !same).then_some([first, path])
    })
}
