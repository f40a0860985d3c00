//! The proxy's host.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use super::script::{Chain, Script};
use super::{Host, HostSetupError, Role};
use crate::doctor::source_networks;
use crate::kernel;
use crate::nft::family;
use crate::reply_path::{ReplyPath, Rewriter};
use crate::topology::SourceNetwork;

/// A firewall mark that no packet has: a rule that asks for it never matches, but its
/// presence switches defragmentation on.
const NO_MARK: &str = "0xdef0dead";

pub(super) fn set_up(
    script: &mut Script,
    paths: &[ReplyPath],
    host: &Host<'_>,
) -> Result<(), HostSetupError> {
    let of = |rewriter: Rewriter| -> Vec<_> {
        let of_it = paths.iter().filter(|path| path.rewriter == rewriter);
        of_it.collect()
    };
    route_replies_here(script, &of(Rewriter::Proxy), host)?;
    forward_and_rewrite(script, &of(Rewriter::ProxyHost), host)?;
    if !of(Rewriter::ServerHost).is_empty() {
        script.comment("Servers whose own hosts rewrite their replies (mode dsr, rewrite_on server) need nothing here.");
    }
    forward_for_sdk(script, &of(Rewriter::Sdk), host)?;
    own_source_networks(script, host);
    Ok(())
}

/// Source networks: their addresses are this host's own.
fn own_source_networks(script: &mut Script, host: &Host<'_>) {
    let networks = &host.topology.source_networks;
    if networks.is_empty() {
        return;
    }
    let is_needed = |source: &&SourceNetwork| !source.network.addr().is_loopback();
    let needed: Vec<_> = networks.iter().filter(is_needed).collect();
    if needed.len() < networks.len() {
        script.comment(
            "Source networks in 127.0.0.0/8 need nothing: these addresses are every host's own. They reach servers on this host alone.",
        );
    }
    if !needed.is_empty() {
        script.comment(
            "Source networks: each session sends from an address of its own. This route makes all of them this host's.",
        );
    }
    for source in &needed {
        script.local_route(source.network);
    }
    let routed: Vec<_> = needed
        .iter()
        .filter_map(|source| route_here(source))
        .collect();
    if !routed.is_empty() {
        script.comment(
            "The servers' hosts, or the router between, need a route to these networks through this host. It is not enough that a link has them: each server would keep a neighbour entry for each session, and lose replies where its table is full.",
        );
        for route in routed {
            script.comment(&route);
        }
    }
    let rules = networks.iter().map(source_networks::no_track).collect();
    script.comment(
        "Where a firewall tracks connections, each session takes an entry and each datagram about a microsecond. If no rule needs the state of these datagrams, switch it off:",
    );
    script.comment_line(&format!("nft '{}'", source_networks::notrack_rules(rules)));
}

/// The command that servers' hosts need.
fn route_here(source: &SourceNetwork) -> Option<String> {
    let network = source.network;
    let mut servers = source.servers.iter().map(SocketAddr::ip);
    let server = servers.find(|ip| !kernel::is_own(*ip))?;
    let own = own_address_towards(server);
    let own = own.map_or_else(|| "PROXY".to_owned(), |ip| ip.to_string());
    Some(format!("ip route add {network} via {own}"))
}

/// The address of this host that a server sees it by.
fn own_address_towards(server: IpAddr) -> Option<IpAddr> {
    let any: IpAddr = match server.is_ipv4() {
        true => Ipv4Addr::UNSPECIFIED.into(),
        false => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    // Nothing is sent.
    socket.connect((server, 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// Mode transparent: the kernel takes a reply to a client as this host's own.
fn route_replies_here(
    script: &mut Script,
    paths: &[&ReplyPath],
    host: &Host<'_>,
) -> Result<(), HostSetupError> {
    let mut rules = BTreeSet::new();
    for path in paths {
        let (ip, port) = (path.server.ip(), path.ports());
        let whole = if ip.is_ipv4() { 32 } else { 128 };
        let interface = host.interface_to(ip)?;
        // Of what this host itself sends, only the server's replies.
        let narrow = match &*interface {
            "lo" => format!(" ipproto udp sport {port}"),
            _ => String::new(),
        };
        let rule = format!("iif {interface} from {ip}/{whole}{narrow}");
        rules.insert((!ip.is_ipv4(), rule));
    }
    if rules.is_empty() {
        return Ok(());
    }
    script.comment(
        "Mode transparent: replies are addressed to clients, and these routes deliver them to the proxy. Forwarding stays off. A firewall must accept them as traffic to this host.",
    );
    for (v6, everything) in [(false, "0.0.0.0/0"), (true, "::/0")] {
        let mut of_family = rules.iter().filter(|(is_v6, _)| *is_v6 == v6).peekable();
        if of_family.peek().is_some() {
            script.route(!v6, &format!("local {everything} dev lo"));
        }
        for (_, rule) in of_family {
            script.rule(!v6, rule);
        }
    }
    Ok(())
}

/// Mode dsr, rewritten here: replies are forwarded, from the listener's address.
fn forward_and_rewrite(
    script: &mut Script,
    paths: &[&ReplyPath],
    host: &Host<'_>,
) -> Result<(), HostSetupError> {
    if paths.is_empty() {
        return Ok(());
    }
    let mut forwarding = BTreeSet::new();
    let mut forwards_v6 = None;
    let (mut pre, mut out, mut post) = (Vec::new(), Vec::new(), Vec::new());
    for path in paths {
        let (server, v4) = (path.server, path.server.is_ipv4());
        let interface = host.interface_to(server.ip())?;
        if interface == "lo" {
            return Err(HostSetupError(format!(
                "server {server} is on this host, which never forwards its own replies, as {} needs; use mode transparent or ppv2 for it",
                path.rewriter.mode()
            )));
        }
        let public = host.public_interface(|| interface_with(path.listener.ip()))?;
        let (replies, family) = (path.nft_match(Role::Proxy), family(v4));
        pre.push(format!("iifname \"{interface}\" {replies} notrack"));
        let (ip, port) = (server.ip(), server.port());
        out.push(format!("{family} daddr {ip} udp dport {port} notrack"));
        post.extend(path.nft_rewrite(&format!("oifname \"{public}\" {replies}")));
        if v4 {
            forwarding.insert(interface);
        } else {
            forwards_v6 = Some(public);
        }
    }
    script.comment(
        "Mode dsr: this host forwards the servers' replies to clients, and must have routes to them.",
    );
    for interface in &forwarding {
        script.parameter(interface, "forwarding", 1);
    }
    if let Some(public) = forwards_v6 {
        script.forward_v6(Some(&public));
    }
    let defrag = vec![format!("meta mark {NO_MARK} meta l4proto udp tproxy to :1")];
    script.nft(
        "Mode dsr: replies get the listener's address as their source. Both directions are not tracked, since a tracked reply would keep its source; a firewall here that forwards only tracked (established) traffic needs a rule of its own for them in its forward chain. The rule in `defrag` matches nothing; its presence makes the kernel reassemble fragments, of which only the first has the port. A datagram without a checksum stays without.",
        &[
            Chain("pre", "prerouting priority raw", pre),
            Chain("defrag", "prerouting priority mangle", defrag),
            Chain("out", "output priority raw", out),
            Chain("post", "postrouting priority 300", post),
        ],
    );
    Ok(())
}

/// The interface that clients' datagrams to `listener` arrive at.
fn interface_with(listener: IpAddr) -> Result<String, String> {
    match kernel::interface_with(listener) {
        Some(name) if name != "lo" => Ok(name),
        Some(_) => Err(format!("{listener} is on lo")),
        None => Err(format!(
            "this host doesn't have the listener's address {listener}"
        )),
    }
}

/// Mode dsr by the SDK: nothing, unless servers route their replies through this host.
fn forward_for_sdk(
    script: &mut Script,
    paths: &[&ReplyPath],
    host: &Host<'_>,
) -> Result<(), HostSetupError> {
    if paths.is_empty() {
        return Ok(());
    }
    if !host.options.is_gateway {
        script.comment(
            "Servers on the SDK (mode dsr, rewrite_on sdk) answer clients themselves and need nothing here. If they route their replies through this host, print this script with --is-gateway.",
        );
        return Ok(());
    }
    script.comment(
        "Servers on the SDK (mode dsr, rewrite_on sdk) route their replies through this host, from an address that this host has, too: it must accept and forward them.",
    );
    let mut interfaces = BTreeSet::new();
    for path in paths.iter().filter(|path| path.listener.is_ipv4()) {
        interfaces.insert(host.interface_to(path.server.ip())?);
    }
    for interface in &interfaces {
        script.parameter(interface, "forwarding", 1);
        script.parameter(interface, "accept_local", 1);
        // The larger of `all` and this one is used; 2 accepts a source that would be
        // answered through another interface.
        script.parameter(interface, "rp_filter", 2);
    }
    if paths.iter().any(|path| path.listener.is_ipv6()) {
        script.forward_v6(host.options.public_interface.as_deref());
    }
    Ok(())
}
