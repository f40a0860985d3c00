//! Networks that sessions have source addresses of: this host must take their addresses as
//! its own, and no neighbour table, its own or a server's, should have an entry for each.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use ipnet::IpNet;

use super::Finding;
use crate::kernel;
use crate::route::{NoRoute, Packet, Route};
use crate::topology::{SourceNetwork, Topology};

/// How many addresses of a network are looked up. Routes to parts of it that lead elsewhere
/// are found if they are larger than such a share of it.
const SAMPLES: u32 = 16;

/// Kernel memory of a neighbour entry: 26 MB were measured for 60,000.
const NEIGHBOUR_BYTES: usize = 430;

/// Findings that `run` refuses to start for: addresses that aren't this host's own.
pub(super) fn examine(topology: &Topology) -> Vec<Finding> {
    topology.source_networks.iter().map(local_route).collect()
}

/// What else could be better.
pub(super) fn examine_more(topology: &Topology) -> Vec<Finding> {
    let networks = &topology.source_networks;
    if networks.is_empty() {
        return Vec::new();
    }
    let mut findings: Vec<_> = networks.iter().filter_map(on_link).collect();
    findings.extend(neighbours(topology));
    findings.extend(tracked(topology));
    findings.push(super::mtu::receive_buffer(
        "receive buffer of all sessions of a worker on source networks",
        topology.shared_buffer,
    ));
    findings
}

/// The command that makes a network's addresses this host's own.
#[must_use]
pub fn add_route(network: IpNet) -> String {
    let flag = if network.addr().is_ipv4() { "-4" } else { "-6" };
    format!("ip {flag} route add local {network} dev lo")
}

/// The kernel is asked what becomes of packets to the network's addresses: replies are
/// such packets.
fn local_route(source: &SourceNetwork) -> Finding {
    let network = source.network;
    let what = format!("source network {network} of upstream {}", source.upstream);
    let mut first = None;
    for ip in samples(source) {
        let route = Packet::sent_to(ip).route();
        if let Err(NoRoute::Unknown(error)) = &route {
            return Finding::lookup_failed(what, error, &format!("ip route get {ip}"));
        }
        first = first.or(route.as_ref().ok().map(|route| route.table));
        if let Some(wrong) = wrong(ip, route) {
            return Finding::fatal(what, wrong, add_route(network));
        }
    }
    let found = match first {
        Some(table) => format!("its addresses are this host's, by table {table}"),
        None => "its addresses are this host's".to_owned(),
    };
    Finding::ok(what, found)
}

/// Why a session can't send from `ip` and be answered there.
fn wrong(ip: IpAddr, route: Result<Route, NoRoute>) -> Option<String> {
    match route {
        Ok(route) if !route.is_local => {
            let name = kernel::interface_name(route.interface).unwrap_or_default();
            Some(format!(
                "{ip} is not this host's: replies to it would leave through {name} (`ip route get {ip}`)"
            ))
        }
        // The route may be in a table that the kernel doesn't ask for sources. IPv6
        // sockets bind it freely instead (ip(7), IP_FREEBIND).
        Ok(_) if ip.is_ipv4() => {
            let error = UdpSocket::bind((ip, 0)).err()?;
            Some(format!(
                "{ip} can't be sent from ({error}): the local route must be in table local"
            ))
        }
        Ok(_) => None,
        Err(error) => Some(format!(
            "{ip} is not this host's: there is no route to it ({error})"
        )),
    }
}

/// Addresses from all over the network that sessions and health checks can have.
fn samples(source: &SourceNetwork) -> impl Iterator<Item = IpAddr> {
    let network = source.network;
    let host_bits = network.max_prefix_len() - network.prefix_len();
    let last = u128::MAX
        .checked_shr(u32::from(128 - host_bits))
        .unwrap_or(0);
    let step = (last / u128::from(SAMPLES)).max(1);
    let offsets = (0..u128::from(SAMPLES)).map(move |n| (n * step + 2).min(last - 1));
    let at = move |offset: u128| match network {
        IpNet::V4(net) => {
            let offset = u32::try_from(offset).unwrap_or(u32::MAX);
            Ipv4Addr::from_bits(net.network().to_bits() | offset).into()
        }
        IpNet::V6(net) => Ipv6Addr::from_bits(net.network().to_bits() | offset).into(),
    };
    let offsets = offsets.chain([last - 1]);
    std::iter::once(source.probe).chain(offsets.map(at))
}

/// A network that an interface's own network has a part of. Neighbours there would ask for
/// each session's address one by one.
fn on_link(source: &SourceNetwork) -> Option<Finding> {
    let network = source.network;
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    let overlap = interfaces.into_iter().find_map(|interface| {
        let (ip, prefix) = match &interface.addr {
            if_addrs::IfAddr::V4(v4) => (IpAddr::from(v4.ip), v4.prefixlen),
            if_addrs::IfAddr::V6(v6) => (IpAddr::from(v6.ip), v6.prefixlen),
        };
        let of_link = IpNet::new(ip, prefix).ok()?.trunc();
        let overlaps = of_link.contains(&network.addr()) || network.contains(&of_link.addr());
        (interface.name != "lo" && overlaps).then_some((of_link, interface.name))
    });
    let (of_link, name) = overlap?;
    Some(Finding::advice(
        format!("neighbours of source network {network}"),
        format!(
            "it overlaps with {of_link}, which is on the link of {name}: hosts there ask for the link address of each session, and their neighbour tables (gc_thresh3) overflow; this host reaches none of them that has an address of {network}"
        ),
        format!(
            "use a network that no link has, and on the servers' hosts `ip route add {network} via` this host's address"
        ),
    ))
}

/// The kernel makes a neighbour entry for each IPv6 address of its own that a server on
/// this host writes to. Those of loopback are limited by no gc_thresh, so nothing is lost.
fn neighbours(topology: &Topology) -> Option<Finding> {
    let is_here = |source: &&SourceNetwork| {
        let mut servers = source.servers.iter();
        source.network.addr().is_ipv6() && servers.any(|server| kernel::is_own(server.ip()))
    };
    let source = topology.source_networks.iter().find(is_here)?;
    let megabytes = topology.max_sessions.saturating_mul(NEIGHBOUR_BYTES) >> 20;
    Some(Finding::advice(
        format!(
            "neighbour entries of source network {}, with servers on this host",
            source.network
        ),
        format!(
            "each session takes one of the kernel's, of about {NEIGHBOUR_BYTES} bytes, {megabytes} MiB for {} sessions; it stays for about a minute after its session",
            topology.max_sessions
        ),
        "write the server's IPv4 address (127.0.0.1), and use source = [\"127.64.0.0/10\"]",
    ))
}

/// Connection tracking, which has an entry for each session.
fn tracked(topology: &Topology) -> Option<Finding> {
    let of = |name: &str| kernel::parameter(&format!("net/netfilter/nf_conntrack_{name}"));
    let count = of("count").filter(|count| *count > 0)?;
    let most = of("max").unwrap_or(0);
    let rules: Vec<_> = topology.source_networks.iter().map(no_track).collect();
    Some(Finding::advice(
        "connection tracking and source networks",
        format!(
            "has {count} entries, of at most {most}: each session takes one, and each datagram about a microsecond"
        ),
        format!(
            "where no rule needs it for these datagrams: nft '{}'",
            notrack_rules(rules)
        ),
    ))
}

/// The nft commands that switch connection tracking off for source networks.
pub(crate) fn notrack_rules(rules: Vec<[String; 2]>) -> String {
    let mut commands = String::from(
        "add table inet ppv2_notrack; add chain inet ppv2_notrack out { type filter hook output priority raw; }; add chain inet ppv2_notrack in { type filter hook prerouting priority raw; }",
    );
    for rule in rules.into_iter().flatten() {
        commands.push_str("; add rule inet ppv2_notrack ");
        commands.push_str(&rule);
    }
    commands
}

/// Rules, each after its chain, for what leaves from a network and what comes to it.
pub(crate) fn no_track(source: &SourceNetwork) -> [String; 2] {
    let network = source.network;
    let family = crate::nft::family(network.addr().is_ipv4());
    [
        format!("out {family} saddr {network} meta l4proto udp notrack"),
        format!("in {family} daddr {network} meta l4proto udp notrack"),
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn source(network: &str, probe: &str) -> SourceNetwork {
        SourceNetwork {
            network: network.parse().unwrap(),
            probe: probe.parse().unwrap(),
            upstream: "u".to_owned(),
            servers: BTreeSet::new(),
        }
    }

    #[test]
    fn samples_are_within_the_network_and_reach_its_end() {
        for (network, probe, last) in [
            ("10.99.0.0/16", "10.99.0.1", "10.99.255.254"),
            ("10.99.0.4/30", "10.99.0.5", "10.99.0.6"),
            ("fd00:1::/64", "fd00:1::1", "fd00:1::ffff:ffff:ffff:fffe"),
            ("fd00:1::/120", "fd00:1::1", "fd00:1::fe"),
        ] {
            let source = source(network, probe);
            let all: Vec<_> = samples(&source).collect();
            assert!(all.iter().all(|ip| source.network.contains(ip)), "{all:?}");
            assert_eq!(all.first().unwrap().to_string(), probe);
            assert_eq!(all.last().unwrap().to_string(), last);
        }
    }

    #[test]
    fn loopback_networks_need_no_route_and_others_do() {
        let has = local_route(&source("127.64.0.0/10", "127.64.0.1"));
        assert!(!has.is_fatal(), "{has}");
        for (network, probe, fix) in [
            (
                "198.51.100.0/24",
                "198.51.100.1",
                "ip -4 route add local 198.51.100.0/24 dev lo",
            ),
            (
                "2001:db8:9::/64",
                "2001:db8:9::1",
                "ip -6 route add local 2001:db8:9::/64 dev lo",
            ),
        ] {
            let lacks = local_route(&source(network, probe));
            assert!(lacks.is_fatal(), "{lacks}");
            assert!(
                lacks.to_string().ends_with(&format!("; fix: {fix}")),
                "{lacks}"
            );
        }
    }
}
