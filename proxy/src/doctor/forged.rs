//! Replies that somebody on the clients' side forges in a server's name. Where clients and
//! servers are behind different interfaces, this host can tell such datagrams by the
//! interface that they come in by; what it needs for that is looked at here.
//!
//! Strict `rp_filter` doesn't do on its own: for a datagram to a connected socket the
//! kernel takes the route of an earlier one and leaves the check of its source out
//! (`udp_early_demux`). The proxy makes up for that unless routing rules go by more than it
//! can know of a datagram.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::Finding;
use super::replies::sample;
use crate::config::Config;
use crate::host;
use crate::host::route::{Packet, rules_look_deeper};

/// The most servers that a rule names.
const MOST_NAMED: usize = 16;

pub(super) fn examine(config: &Config, client: Option<IpAddr>) -> Vec<Finding> {
    let clients = client_interfaces(config, client);
    let mut findings = Vec::new();
    for ((v4, behind), servers) in server_interfaces(config) {
        let others: Vec<_> = clients.iter().filter(|one| **one != behind).collect();
        findings.extend(others.into_iter().map(|from| finding(v4, from, &servers)));
    }
    findings
}

/// The interfaces that clients' datagrams come in by: those that have listeners'
/// addresses, and those that lead to clients.
fn client_interfaces(config: &Config, client: Option<IpAddr>) -> BTreeSet<String> {
    let bound = config.listeners.iter().flat_map(|listener| &listener.bind);
    let bound = bound.map(|address| address.ip());
    let mut interfaces = BTreeSet::new();
    for ip in bound.filter(|ip| !ip.is_loopback()) {
        interfaces.extend(host::interface_with(ip));
        interfaces.extend(leads_to(sample(config, ip.is_ipv4(), client)));
    }
    interfaces.remove("lo");
    interfaces
}

/// The servers whose replies come to the proxy, by family and by the interface that leads
/// to them.
fn server_interfaces(config: &Config) -> BTreeMap<(bool, String), BTreeSet<IpAddr>> {
    let mut interfaces: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    let mut known = BTreeSet::new();
    for (_, server, mode) in config.served() {
        let ip = server.address.0.ip();
        if !mode.takes_replies() || !known.insert(ip) {
            continue;
        }
        if let Some(interface) = leads_to(ip) {
            let servers = interfaces.entry((ip.is_ipv4(), interface)).or_default();
            servers.insert(ip);
        }
    }
    interfaces
}

fn leads_to(ip: IpAddr) -> Option<String> {
    let route = Packet::sent_to(ip).route().ok()?;
    match route.is_local {
        true => Some("lo".to_owned()),
        false => host::interface_name(route.interface),
    }
}

/// What becomes of datagrams that come in by `from`, where clients are, with the address
/// of one of `servers` as their source.
fn finding(v4: bool, from: &str, servers: &BTreeSet<IpAddr>) -> Finding {
    let first = servers.iter().next().map(ToString::to_string);
    let more = match servers.len() {
        0 | 1 => String::new(),
        count => format!(" and {} more", count - 1),
    };
    let what = format!(
        "forged replies of server {}{more} from {from}",
        first.unwrap_or_default()
    );
    let rule = rule(v4, from, servers);
    if !v4 {
        return Finding::advice(
            what,
            "reach sessions unless a firewall drops them, which can't be seen from here: IPv6 has no rp_filter",
            rule,
        );
    }
    let strict = host::larger_of_all_and(from, "rp_filter").unwrap_or(0);
    let early = host::parameter("net/ipv4/udp_early_demux").unwrap_or(1);
    match (strict, early) {
        (1, 0) => Finding::right(
            what,
            format!("are dropped: rp_filter is 1 on {from}, and net.ipv4.udp_early_demux is 0"),
        ),
        (1, _) if !rules_look_deeper(true).unwrap_or(true) => Finding::right(
            what,
            format!("are dropped by the proxy as reply_wrong_interface: rp_filter is 1 on {from}"),
        ),
        (1, _) => Finding::advice(
            what,
            format!(
                "reach sessions past rp_filter, unless a firewall drops them: net.ipv4.udp_early_demux is {early}, and routing rules go by marks, users or destination ports, so that the proxy can't tell them either"
            ),
            format!("sysctl -w net.ipv4.udp_early_demux=0, or {rule}"),
        ),
        _ => Finding::advice(
            what,
            format!(
                "reach sessions, unless a firewall drops them: rp_filter is {strict} on {from}"
            ),
            rule,
        ),
    }
}

/// The command for a firewall rule that drops them, before the kernel looks for a socket.
fn rule(v4: bool, from: &str, servers: &BTreeSet<IpAddr>) -> String {
    let family = if v4 { "ip" } else { "ip6" };
    let mut named: Vec<_> = servers.iter().map(ToString::to_string).collect();
    if named.len() > MOST_NAMED {
        named.truncate(MOST_NAMED);
        named.push("…".to_owned());
    }
    format!(
        "nft 'add table inet ppv2_guard; add chain inet ppv2_guard clients {{ type filter hook prerouting priority raw; }}; add rule inet ppv2_guard clients iifname \"{from}\" {family} saddr {{ {} }} counter drop'",
        named.join(", ")
    )
}
