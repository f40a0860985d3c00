//! Capabilities: of this thread, which is what the sockets of a session need.

use std::io;
use std::net::SocketAddr;

use rustix::thread::{CapabilitySet, capabilities};
use socket2::{Domain, Protocol, Socket, Type};

use super::Finding;
use crate::host;
use crate::returns::Return;

pub(super) fn examine(returns: &[Return]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let spoofed = |found: &&Return| found.by.spoofs();
    if let Some(first) = returns
        .iter()
        .filter(spoofed)
        .find(|found| found.server.is_ipv4())
    {
        findings.push(clients_addresses(first.server));
    }
    if returns.iter().any(|found| found.spoofs_ports) {
        findings.push(low_ports());
    }
    findings
}

/// Asked of the kernel by the very option that a session's socket needs, which
/// also knows of a security module or a user namespace that says no.
fn clients_addresses(server: SocketAddr) -> Finding {
    let what = format!("CAP_NET_RAW, to write to server {server} from clients' IPv4 addresses");
    match set_transparent() {
        Ok(()) => Finding::right(what, "this process may"),
        Err(error) => Finding::fatal(
            what,
            format!("refused ({error}); capabilities: {}", effective()),
            format!(
                "{}, or let a group of IPv6 servers have the clients of IPv6, who need no privilege",
                grant("cap_net_raw")
            ),
        ),
    }
}

fn set_transparent() -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_ip_transparent_v4(true)
}

fn low_ports() -> Finding {
    let what = "CAP_NET_BIND_SERVICE, to write to servers from clients' ports below 1024";
    if has(CapabilitySet::NET_BIND_SERVICE) {
        return Finding::right(what, "this process has it");
    }
    match host::parameter("net/ipv4/ip_unprivileged_port_start") {
        Some(0) => Finding::right(what, "not needed, ip_unprivileged_port_start is 0"),
        start => Finding::advice(
            what,
            format!(
                "this process lacks it, and clients with ports below {} are refused",
                start.unwrap_or(1024)
            ),
            grant("cap_net_raw,cap_net_bind_service"),
        ),
    }
}

pub(super) fn has(capability: CapabilitySet) -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(capability))
}

fn effective() -> String {
    match capabilities(None) {
        Ok(sets) if sets.effective.is_empty() => "none".to_owned(),
        Ok(sets) => {
            let names = sets.effective.iter_names().map(|(name, _)| name);
            names.collect::<Vec<_>>().join(" ")
        }
        Err(error) => format!("unknown ({error})"),
    }
}

/// How the proxy gets capabilities and nothing else.
fn grant(names: &str) -> String {
    let binary = std::env::current_exe();
    let binary = binary.map_or_else(
        |_| "ppv2-proxy".to_owned(),
        |path| path.display().to_string(),
    );
    let ambient = names.to_uppercase().replace(',', " ");
    format!("setcap {names}+ep {binary}, or in its systemd unit AmbientCapabilities={ambient}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mend_is_a_command_and_a_line_of_a_unit() {
        let mend = grant("cap_net_raw,cap_net_bind_service");
        assert!(
            mend.starts_with("setcap cap_net_raw,cap_net_bind_service+ep /"),
            "{mend}"
        );
        assert!(
            mend.ends_with("AmbientCapabilities=CAP_NET_RAW CAP_NET_BIND_SERVICE"),
            "{mend}"
        );
    }
}
