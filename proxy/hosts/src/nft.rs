//! The nft rules that rewrite replies: `host-setup` writes them, `doctor` looks for them.

use std::net::SocketAddr;

use crate::reply_path::ReplyPath;
use crate::role::Role;

impl Role {
    /// The nft table of this crate on such a host. It holds nothing else.
    pub(crate) fn nft_table(self) -> &'static str {
        match self {
            Self::Proxy => "ppv2_dsr",
            Self::Server => "ppv2_dsr_server",
        }
    }
}

pub(crate) fn family(v4: bool) -> &'static str {
    if v4 { "ip" } else { "ip6" }
}

impl ReplyPath {
    /// Matches the server's replies. The server's own host knows them by their port alone,
    /// since a server on a wildcard leaves the address to the kernel.
    pub(crate) fn nft_match(&self, role: Role) -> String {
        let (v4, port) = (self.server.is_ipv4(), self.server.port());
        match role {
            Role::Proxy => format!("{} saddr {} udp sport {port}", family(v4), self.server.ip()),
            Role::Server if v4 => format!("meta nfproto ipv4 udp sport {port}"),
            Role::Server => format!("meta nfproto ipv6 udp sport {port}"),
        }
    }

    /// The rules that give what `matches` the listener's address as its source. Each ends
    /// the chain, so that no other rule rewrites it once more.
    pub(crate) fn nft_rewrite(&self, matches: &str) -> Vec<String> {
        let set = nft_set(self.listener);
        let mut rules = Vec::new();
        // IPv6 has no UDP without a checksum (RFC 8200, 8.1).
        if self.listener.is_ipv4() {
            rules.push(format!(
                "{matches} udp checksum 0 {set} udp checksum set 0 accept"
            ));
        }
        rules.push(format!("{matches} {set} accept"));
        rules
    }
}

/// Sets the source of a datagram.
pub(crate) fn nft_set(source: SocketAddr) -> String {
    let (family, ip, port) = (family(source.is_ipv4()), source.ip(), source.port());
    format!("udp sport set {port} {family} saddr set {ip}")
}
