//! Capabilities of this thread, which the sockets of sessions need.

use std::io;
use std::net::SocketAddr;

use rustix::thread::{CapabilitySet, capabilities};
use socket2::{Domain, Protocol, Socket, Type};

use super::Finding;
use crate::kernel;
use crate::reply_path::ReplyPath;

pub(super) fn examine(paths: &[ReplyPath]) -> Vec<Finding> {
    let spoofed = |path: &&ReplyPath| path.rewriter.spoofs() && path.server.is_ipv4();
    let first = paths.iter().find(spoofed);
    let low_ports = paths.iter().any(|path| path.spoofs_ports);
    first
        .map(|path| client_addresses(path.server))
        .into_iter()
        .chain(low_ports.then(client_ports))
        .collect()
}

/// Sets the socket option that sessions need, which also shows whether a security module
/// or a user namespace forbids it.
fn client_addresses(server: SocketAddr) -> Finding {
    let what = format!("CAP_NET_RAW, to write to server {server} from clients' IPv4 addresses");
    match set_transparent() {
        Ok(()) => Finding::ok(what, "granted"),
        Err(error) => Finding::fatal(
            what,
            format!(
                "refused ({error}); effective capabilities: [{}]",
                names().join(" ")
            ),
            format!(
                "{}; IPv6 servers with IPv6 clients need no privilege",
                grant("cap_net_raw")
            ),
        ),
    }
}

fn set_transparent() -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_ip_transparent_v4(true)
}

fn client_ports() -> Finding {
    let what = "CAP_NET_BIND_SERVICE, to write to servers from clients' ports below 1024";
    if effective().contains(CapabilitySet::NET_BIND_SERVICE) {
        return Finding::ok(what, "granted");
    }
    match kernel::parameter("net/ipv4/ip_unprivileged_port_start") {
        Some(0) => Finding::ok(what, "not needed: ip_unprivileged_port_start is 0"),
        start => Finding::advice(
            what,
            format!(
                "missing; clients with ports below {} are refused",
                start.unwrap_or(1024)
            ),
            grant("cap_net_raw,cap_net_bind_service"),
        ),
    }
}

pub(super) fn effective() -> CapabilitySet {
    capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective)
}

fn names() -> Vec<&'static str> {
    effective().iter_names().map(|(name, _)| name).collect()
}

/// The commands that give the proxy these capabilities and nothing else.
fn grant(names: &str) -> String {
    let binary = std::env::current_exe().unwrap_or_else(|_| "ppv2-proxy".into());
    let ambient = names.to_uppercase().replace(',', " ");
    format!(
        "setcap {names}+ep {}, or AmbientCapabilities={ambient} in its systemd unit",
        binary.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fix_is_a_command_and_a_line_of_a_unit() {
        let fix = grant("cap_net_raw,cap_net_bind_service");
        assert!(
            fix.starts_with("setcap cap_net_raw,cap_net_bind_service+ep /"),
            "{fix}"
        );
        let unit = "AmbientCapabilities=CAP_NET_RAW CAP_NET_BIND_SERVICE in its systemd unit";
        assert!(fix.ends_with(unit), "{fix}");
    }
}
