//! What the proxy's host needs.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::script::{Chain, Script};
use super::{HostFacts, HostSetupError};
use crate::returns::{By, Return};

/// A firewall mark that no packet has: the rule that asks for it never matches,
/// but its being there switches defragmentation on.
const NO_MARK: &str = "0xdef0dead";

pub(super) fn set_up(
    script: &mut Script,
    returns: &[Return],
    host: &HostFacts<'_>,
) -> Result<(), HostSetupError> {
    let of = |by: By| returns.iter().filter(move |found| found.by == by);
    route_replies_here(script, of(By::Proxy), host)?;
    forward_and_rewrite(script, &of(By::ProxyHost).collect::<Vec<_>>(), host)?;
    if of(By::ServerHost).next().is_some() {
        script.comment("Servers whose own hosts rewrite their replies (mode dsr, rewrite_on server) need nothing here.");
    }
    pass_on_for_sdk(script, &of(By::Sdk).collect::<Vec<_>>(), host)
}

/// Mode transparent: a reply to a client is taken for this host's own.
fn route_replies_here<'a>(
    script: &mut Script,
    returns: impl Iterator<Item = &'a Return>,
    host: &HostFacts<'_>,
) -> Result<(), HostSetupError> {
    let mut rules = BTreeSet::new();
    for Return { server, .. } in returns {
        let (ip, port) = (server.ip(), server.port());
        let whole = if ip.is_ipv4() { 32 } else { 128 };
        let interface = host.interface_to(ip)?;
        // Of what this host itself sends, the server's replies alone.
        let narrow = if interface == "lo" {
            format!(" ipproto udp sport {port}")
        } else {
            String::new()
        };
        let rule = format!("iif {interface} from {ip}/{whole}{narrow}");
        rules.insert((!ip.is_ipv4(), rule));
    }
    if rules.is_empty() {
        return Ok(());
    }
    script.comment(
        "Mode transparent: replies are addressed to clients, and these routes hand them to the proxy all the same. Forwarding stays off. A firewall must let them in as traffic to this host.",
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

/// Mode dsr, rewritten here: replies are passed on, from the listener's address.
fn forward_and_rewrite(
    script: &mut Script,
    returns: &[&Return],
    host: &HostFacts<'_>,
) -> Result<(), HostSetupError> {
    if returns.is_empty() {
        return Ok(());
    }
    let mut forwarding = BTreeSet::new();
    let mut forwards_v6 = None;
    let (mut before, mut sent, mut after) = (Vec::new(), Vec::new(), Vec::new());
    for Return {
        server, listener, ..
    } in returns
    {
        let interface = host.interface_to(server.ip())?;
        if interface == "lo" {
            return Err(HostSetupError::OwnServer {
                server: *server,
                mode: By::ProxyHost.mode(),
            });
        }
        let public = host.public_interface(listener.ip())?;
        let (family, ip, port) = (nft_family(*server), server.ip(), server.port());
        before.push(format!(
            "iifname \"{interface}\" {family} saddr {ip} udp sport {port} notrack"
        ));
        sent.push(format!("{family} daddr {ip} udp dport {port} notrack"));
        let from_server = format!("oifname \"{public}\" {family} saddr {ip} udp sport {port}");
        after.extend(rewriting(&from_server, *listener));
        if server.is_ipv4() {
            forwarding.insert(interface);
        } else {
            forwards_v6 = Some(public);
        }
    }
    script.comment(
        "Mode dsr: replies come in from the servers and are passed on to clients, whom this host must have routes to.",
    );
    for interface in &forwarding {
        script.parameter(true, interface, "forwarding", 1);
    }
    if let Some(public) = forwards_v6 {
        script.forward_v6(Some(&public));
    }
    let chain = |name, hook, rules| Chain { name, hook, rules };
    script.nft(
        "Mode dsr: replies get the listener's address as their source. Both directions go untracked, since a tracked reply would keep its source; a firewall here that lets only tracked (established) traffic pass needs a rule of its own for them in its forward chain. The rule in `defrag` matches nothing, and has fragments put together, which all but the first lack the port. A datagram without a checksum stays without.",
        &[
            chain("pre", "prerouting priority raw", before),
            chain(
                "defrag",
                "prerouting priority mangle",
                vec![format!("meta mark {NO_MARK} meta l4proto udp tproxy to :1")],
            ),
            chain("out", "output priority raw", sent),
            chain("post", "postrouting priority 300", after),
        ],
    );
    Ok(())
}

/// The rules that have what `matches` come from `listener`. Nothing that one has
/// rewritten comes to another.
pub(super) fn rewriting(matches: &str, listener: SocketAddr) -> Vec<String> {
    let (family, ip, port) = (nft_family(listener), listener.ip(), listener.port());
    let set = format!("udp sport set {port} {family} saddr set {ip}");
    let mut rules = Vec::new();
    // IPv6 knows no UDP without a checksum (RFC 8200, 8.1).
    if listener.is_ipv4() {
        rules.push(format!(
            "{matches} udp checksum 0 {set} udp checksum set 0 accept"
        ));
    }
    rules.push(format!("{matches} {set} accept"));
    rules
}

pub(super) fn nft_family(address: SocketAddr) -> &'static str {
    if address.is_ipv4() { "ip" } else { "ip6" }
}

/// Mode dsr by the SDK: nothing, unless servers route their replies through here.
fn pass_on_for_sdk(
    script: &mut Script,
    returns: &[&Return],
    host: &HostFacts<'_>,
) -> Result<(), HostSetupError> {
    if returns.is_empty() {
        return Ok(());
    }
    if !host.options.is_gateway {
        script.comment(
            "Servers on the SDK (mode dsr, rewrite_on sdk) answer clients by themselves, and need nothing here unless they route their replies through this host: then print this script with --is-gateway.",
        );
        return Ok(());
    }
    script.comment(
        "Servers on the SDK (mode dsr, rewrite_on sdk) route their replies through this host, from an address that it has itself: these are let in, and passed on.",
    );
    let mut interfaces = BTreeSet::new();
    for found in returns.iter().filter(|found| found.listener.is_ipv4()) {
        interfaces.insert(host.interface_to(found.server.ip())?);
    }
    for interface in &interfaces {
        script.parameter(true, interface, "forwarding", 1);
        script.parameter(true, interface, "accept_local", 1);
        // The larger of all interfaces' and this one's counts; 2 lets a source in
        // that would be answered by another way.
        script.parameter(true, interface, "rp_filter", 2);
    }
    if returns.iter().any(|found| found.listener.is_ipv6()) {
        script.forward_v6(host.options.public_interface.as_deref());
    }
    Ok(())
}
