//! How replies return to clients in the modes that need something of a host: who
//! has them come from the listener's address, for which server.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use crate::config::{Config, Listener, Named};
use ppv2_engine::mode::{Mode, RewriteOn};

/// Who has a reply come from the listener's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum By {
    /// The proxy: replies to clients are routed to it (mode transparent).
    Proxy,
    /// The kernel of the proxy's host, which passes them on (mode dsr).
    ProxyHost,
    /// The kernel of the server's host, which sends them straight on (mode dsr).
    ServerHost,
    /// The server, by the SDK (mode dsr).
    Sdk,
}

/// The way of one server's replies to the clients of one listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Return {
    /// Whose work it is.
    pub by: By,
    /// Whose replies.
    pub server: SocketAddr,
    /// The address that clients write to.
    pub listener: SocketAddr,
    /// Whether the server is written to from clients' own ports.
    pub spoofs_ports: bool,
}

impl By {
    fn of(mode: Mode) -> Option<Self> {
        match mode {
            Mode::Ppv2 { .. } | Mode::Plain => None,
            Mode::Transparent { .. } => Some(Self::Proxy),
            Mode::Dsr(RewriteOn::Proxy) => Some(Self::ProxyHost),
            Mode::Dsr(RewriteOn::Server) => Some(Self::ServerHost),
            Mode::Dsr(RewriteOn::Sdk { .. }) => Some(Self::Sdk),
        }
    }

    /// The mode, as an operator set it.
    #[must_use]
    pub fn mode(self) -> &'static str {
        match self {
            Self::Proxy => "mode transparent",
            Self::ProxyHost => "mode dsr, rewrite_on proxy",
            Self::ServerHost => "mode dsr, rewrite_on server",
            Self::Sdk => "mode dsr, rewrite_on sdk",
        }
    }

    /// Whether servers are written to from clients' addresses.
    #[must_use]
    pub fn spoofs(self) -> bool {
        self != Self::Sdk
    }
}

/// Every way that replies return in `config`, but for those to the proxy's own
/// address. A client's address reaches servers of its own family alone; a header
/// reaches any.
#[must_use]
pub fn of(config: &Config) -> Vec<Return> {
    let served = config.served();
    served
        .flat_map(|(listener, server, mode)| between(listener, server.address.0, mode))
        .collect()
}

/// Every way that replies return of a server that a name leads to.
pub(crate) fn of_found(config: &Config, name: &Named, server: SocketAddr) -> Vec<Return> {
    let named = config.named();
    let same = named.filter(|(_, named, _)| std::ptr::eq(*named, name));
    same.flat_map(|(listener, _, mode)| between(listener, server, mode))
        .collect()
}

/// Two servers on one host whose replies the host can't tell apart, since it knows
/// them by their port alone where it rewrites any: they return in different ways, or
/// to different listeners.
#[must_use]
pub fn alike_on_host<'a>(here: &[&'a Return]) -> Option<[&'a Return; 2]> {
    let mut first_of = BTreeMap::new();
    let spoofed = here.iter().copied().filter(|found| found.by.spoofs());
    spoofed.into_iter().find_map(|found| {
        let port = (found.server.is_ipv4(), found.server.port());
        let first = *first_of.entry(port).or_insert(found);
        let rewritten = [first, found].iter().any(|r| r.by == By::ServerHost);
        let same = (first.by, first.listener) == (found.by, found.listener);
        (rewritten && !same).then_some([first, found])
    })
}

fn between(listener: &Listener, server: SocketAddr, mode: Mode) -> impl Iterator<Item = Return> {
    let addresses = listener.bind.iter().copied();
    By::of(mode).into_iter().flat_map(move |by| {
        let reached = addresses
            .clone()
            .filter(move |address| by == By::Sdk || address.is_ipv4() == server.is_ipv4());
        reached.map(move |listener| Return {
            by,
            server,
            listener,
            spoofs_ports: mode.spoofs_ports(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_one_family_meet_unless_a_header_names_them() {
        let config = |mode: &str| {
            let content = format!(
                "[[listener]]\nbind = [\"198.51.100.10:9000\", \"[2001:db8:a::10]:9000\"]\n\
                 mode = {mode}\nupstream = \"u\"\n[upstream.u]\n\
                 servers = [\"192.0.2.2:9001\", \"[2001:db8:b::2]:9001\"]\n"
            );
            of(&Config::from_toml("x", &content).unwrap())
        };
        assert_eq!(config("\"ppv2\""), []);
        let dsr = config("\"dsr\"");
        assert_eq!(dsr.len(), 2);
        assert!(
            dsr.iter()
                .all(|r| r.server.is_ipv4() == r.listener.is_ipv4())
        );
        assert!(dsr.iter().all(|r| r.by == By::ProxyHost && r.spoofs_ports));
        let transparent = config("\"transparent\"");
        assert!(transparent.iter().all(|r| !r.spoofs_ports));
        assert_eq!(config("\"dsr\"\nrewrite_on = \"sdk\"").len(), 4);
    }
}
