//! Datagrams from the clients' side that are forged to look like a server's replies, or like
//! those of another proxy whose headers are believed. Where clients and servers, or proxies,
//! are behind different interfaces, this host can recognize them by the interface that they
//! arrive at.
//!
//! Strict `rp_filter` alone doesn't drop them all: for a datagram to a connected socket
//! the kernel uses the route of an earlier one and skips the check of its source
//! (`udp_early_demux`). The proxy then makes the check itself, unless routing rules match
//! more than the proxy knows of a datagram.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::Finding;
use crate::kernel;
use crate::nft::family;
use crate::route::{Packet, rules_look_deeper};
use crate::topology::Topology;

/// Addresses of a network of other proxies that are looked at for one of another host.
const SAMPLES: usize = 8;

/// The most addresses that a suggested rule names.
const MOST_NAMED: usize = 16;

pub(super) fn examine(topology: &Topology, client: Option<IpAddr>) -> Vec<Finding> {
    let clients = client_interfaces(topology, client);
    let mut findings = Vec::new();
    for ((v4, interface), senders) in sender_interfaces(topology) {
        let others = clients.iter().filter(|client| **client != interface);
        findings.extend(others.map(|from| headers(v4, from, &senders)));
    }
    for ((v4, interface), servers) in server_interfaces(topology) {
        let others = clients.iter().filter(|client| **client != interface);
        findings.extend(others.map(|from| finding(v4, from, &servers)));
    }
    findings
}

/// The interfaces that clients' datagrams arrive at: those that have listeners'
/// addresses, and those that lead to clients.
fn client_interfaces(topology: &Topology, client: Option<IpAddr>) -> BTreeSet<String> {
    let bound = topology.listeners.iter().map(SocketAddr::ip);
    let mut interfaces = BTreeSet::new();
    for ip in bound.filter(|ip| !ip.is_loopback()) {
        interfaces.extend(kernel::interface_with(ip));
        let client = topology.sample_client(ip.is_ipv4(), client);
        interfaces.extend(interface_towards(client));
    }
    interfaces.remove("lo");
    interfaces
}

/// The servers whose replies come to the proxy, by family and by the interface that leads
/// to them.
fn server_interfaces(topology: &Topology) -> BTreeMap<(bool, String), BTreeSet<IpAddr>> {
    let servers = topology.servers.iter().filter(|s| s.answers_to_proxy());
    let servers: BTreeSet<_> = servers.map(|server| server.address.ip()).collect();
    let mut interfaces: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for ip in servers {
        if let Some(interface) = interface_towards(ip) {
            let behind = interfaces.entry((ip.is_ipv4(), interface)).or_default();
            behind.insert(ip);
        }
    }
    interfaces
}

/// The other proxies whose headers are believed, by family and by the interface that leads to
/// them. The kernel takes no address of loopback from elsewhere.
fn sender_interfaces(topology: &Topology) -> BTreeMap<(bool, String), BTreeSet<IpNet>> {
    let is_narrow = |net: &&IpNet| net.prefix_len() > 0 && !net.addr().is_loopback();
    let networks: Vec<_> = topology.senders.iter().filter(is_narrow).copied().collect();
    let mut interfaces: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    // nftables takes no network within another.
    for network in IpNet::aggregate(&networks) {
        let mut hosts = network.hosts().take(SAMPLES);
        let sample = hosts.find(|ip| !kernel::is_own(*ip));
        let sample = sample.unwrap_or(network.addr());
        if let Some(interface) = interface_towards(sample) {
            let behind = interfaces.entry((sample.is_ipv4(), interface)).or_default();
            behind.insert(network);
        }
    }
    interfaces
}

fn interface_towards(ip: IpAddr) -> Option<String> {
    let route = Packet::sent_to(ip).route().ok()?;
    match route.is_local {
        true => Some("lo".to_owned()),
        false => kernel::interface_name(route.interface),
    }
}

/// What becomes of datagrams that arrive at `from`, where clients are, with an address of
/// `senders` as their source.
fn headers(v4: bool, from: &str, senders: &BTreeSet<IpNet>) -> Finding {
    let what = format!(
        "forged headers of proxies {} from {from}",
        first_of(senders)
    );
    let rule = rule(v4, from, senders);
    let strict = kernel::larger_of_all_and(from, "rp_filter");
    if !v4 {
        let found = "are believed unless a firewall drops them, which doctor can't see: IPv6 has no rp_filter";
        Finding::advice(what, found, rule)
    } else if strict == 1 {
        Finding::ok(what, format!("are dropped: rp_filter is 1 on {from}"))
    } else {
        let found =
            format!("are believed unless a firewall drops them: rp_filter is {strict} on {from}");
        Finding::advice(what, found, rule)
    }
}

/// What becomes of datagrams that arrive at `from`, where clients are, with the address
/// of one of `servers` as their source.
fn finding(v4: bool, from: &str, servers: &BTreeSet<IpAddr>) -> Finding {
    let what = format!("forged replies of server {} from {from}", first_of(servers));
    let rule = rule(v4, from, servers);
    if !v4 {
        let found = "reach sessions unless a firewall drops them, which doctor can't see: IPv6 has no rp_filter";
        return Finding::advice(what, found, rule);
    }
    let strict = kernel::larger_of_all_and(from, "rp_filter");
    let early = kernel::parameter("net/ipv4/udp_early_demux").unwrap_or(1);
    if strict != 1 {
        let found =
            format!("reach sessions unless a firewall drops them: rp_filter is {strict} on {from}");
        Finding::advice(what, found, rule)
    } else if early == 0 {
        let found =
            format!("are dropped: rp_filter is 1 on {from}, and net.ipv4.udp_early_demux is 0");
        Finding::ok(what, found)
    } else if rules_look_deeper(true).unwrap_or(true) {
        Finding::advice(
            what,
            format!(
                "get past rp_filter and reach sessions unless a firewall drops them: net.ipv4.udp_early_demux is {early}, and routing rules match marks, users or destination ports, so the proxy can't recognize them either"
            ),
            format!("sysctl -w net.ipv4.udp_early_demux=0, or {rule}"),
        )
    } else {
        let found =
            format!("are dropped by the proxy as reply_wrong_interface: rp_filter is 1 on {from}");
        Finding::ok(what, found)
    }
}

fn first_of<T: Display + Ord>(all: &BTreeSet<T>) -> String {
    let first = all.first().map(ToString::to_string).unwrap_or_default();
    match all.len() {
        0 | 1 => first,
        count => format!("{first} and {} more", count - 1),
    }
}

/// The command for a firewall rule that drops them before the kernel looks for a socket.
fn rule<T: Display>(v4: bool, from: &str, sources: &BTreeSet<T>) -> String {
    let named = sources.iter().take(MOST_NAMED).map(ToString::to_string);
    let rest = (sources.len() > MOST_NAMED).then(|| "…".to_owned());
    let named: Vec<_> = named.chain(rest).collect();
    format!(
        "nft 'add table inet ppv2_guard; add chain inet ppv2_guard clients {{ type filter hook prerouting priority raw; }}; add rule inet ppv2_guard clients iifname \"{from}\" {} saddr {{ {} }} counter drop'",
        family(v4),
        named.join(", ")
    )
}
