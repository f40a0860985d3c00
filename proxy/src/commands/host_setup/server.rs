//! What a server's host needs.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use super::proxy::{nft_family, rewriting};
use super::script::{Chain, Script};
use super::{DSR_MTU, HostFacts, HostSetupError};
use crate::host;
use crate::returns::{self, By, Return};

pub(super) fn set_up(
    script: &mut Script,
    returns: &[Return],
    host: &HostFacts<'_>,
) -> Result<(), HostSetupError> {
    let here = servers_here(returns, &host.options.server)?;
    if let Some([first, second]) = returns::alike_on_host(&here) {
        return Err(HostSetupError::OnePort {
            both: Box::new([*first, *second]),
        });
    }
    let of = |by: &'static [By]| {
        let of_those = here.iter().copied().filter(|found| by.contains(&found.by));
        of_those.collect::<Vec<_>>()
    };
    route_through_proxy(script, &of(&[By::Proxy, By::ProxyHost]), host)?;
    rewrite(script, &of(&[By::ServerHost]), &of(&[By::Sdk]), host)?;
    own_listeners_address(script, &of(&[By::Sdk]), host)
}

/// The servers that the script is for.
pub(crate) fn servers_here<'a>(
    returns: &'a [Return],
    named: &[IpAddr],
) -> Result<Vec<&'a Return>, HostSetupError> {
    let here = returns.iter().filter(|r| is_here(r.server.ip(), named));
    let here: Vec<_> = here.collect();
    if here.is_empty() && !returns.is_empty() {
        let servers: BTreeSet<_> = returns.iter().map(|r| r.server.to_string()).collect();
        return Err(HostSetupError::NoServerHere {
            servers: Vec::from_iter(servers).join(", "),
        });
    }
    Ok(here)
}

/// Whether a server with this address is on the host that the script is for.
pub(crate) fn is_here(ip: IpAddr, named: &[IpAddr]) -> bool {
    if named.is_empty() {
        !ip.is_loopback() && host::is_own(ip)
    } else {
        named.contains(&ip)
    }
}

/// Modes transparent, and dsr rewritten by the proxy's host: replies go there.
fn route_through_proxy(
    script: &mut Script,
    returns: &[&Return],
    host: &HostFacts<'_>,
) -> Result<(), HostSetupError> {
    let (mut routes, mut replies, mut others) = (Routes::new(), BTreeSet::new(), BTreeSet::new());
    for found in returns {
        let (ip, v4) = (found.server.ip(), found.server.is_ipv4());
        let mtu = (found.by == By::ProxyHost).then_some(DSR_MTU);
        insert_route(&mut routes, ip, host.options.mtu.or(mtu), host)?;
        replies.insert((v4, format!("ipproto udp sport {}", found.server.port())));
        others.insert((v4, ip));
    }
    if routes.is_empty() {
        return Ok(());
    }
    script.comment(
        "Replies return through the proxy's host, and so does all else from the server's address but to this host's own networks: ICMP errors, and what else on this host uses the address. The rest of the host keeps its default route.",
    );
    add_routes(script, &routes);
    for (v4, reply) in &replies {
        script.rule(*v4, reply);
    }
    for (v4, ip) in &others {
        // Routes but the default one.
        script.rule_to(*v4, &format!("from {ip}"), "main suppress_prefixlength 0");
        script.rule(*v4, &format!("from {ip}"));
    }
    Ok(())
}

type Routes = BTreeSet<(bool, String)>;

/// Notes the way through the gateway of `ip`'s family.
fn insert_route(
    routes: &mut Routes,
    ip: IpAddr,
    mtu: Option<u32>,
    host: &HostFacts<'_>,
) -> Result<(), HostSetupError> {
    let gateway = host.gateway(ip)?;
    let interface = host.interface_of(ip)?;
    let mtu = match mtu {
        // Locked, or an ICMP error that asks for less would be heeded, and one
        // from the listener's side never comes.
        Some(mtu) if ip.is_ipv4() => format!(" mtu lock {mtu}"),
        Some(mtu) => format!(" mtu {mtu}"),
        None => String::new(),
    };
    routes.insert((
        ip.is_ipv4(),
        format!("default via {gateway} dev {interface}{mtu}"),
    ));
    Ok(())
}

fn add_routes(script: &mut Script, routes: &Routes) {
    for (v4, route) in routes {
        script.route(*v4, route);
    }
}

/// Mode dsr, rewritten here: the server's host sends replies straight on.
fn rewrite(
    script: &mut Script,
    returns: &[&Return],
    by_sdk: &[&Return],
    host: &HostFacts<'_>,
) -> Result<(), HostSetupError> {
    if returns.is_empty() {
        return Ok(());
    }
    let mut rules = Vec::new();
    let mut seen = BTreeSet::new();
    let mut interfaces = BTreeSet::new();
    for found in returns {
        let v4 = found.server.is_ipv4();
        let public = host.interface_to_clients(v4)?;
        let family = if v4 { "ipv4" } else { "ipv6" };
        let port = found.server.port();
        // A server may have several addresses.
        if seen.insert((v4, port)) {
            let matches = format!("oifname \"{public}\" meta nfproto {family} udp sport {port}");
            rules.extend(rewriting(&matches, found.listener));
        }
        if v4 {
            interfaces.insert(host.interface_of(found.server.ip())?);
        }
    }
    let mut kept = replies_to_proxy(&seen, host)?;
    for found in by_sdk {
        let (v4, port) = (found.listener.is_ipv4(), found.listener.port());
        if seen.contains(&(v4, port)) {
            for ip in host.listener_addresses(found.listener.ip())? {
                let family = nft_family(found.listener);
                kept.push(format!("{family} saddr {ip} udp sport {port} accept"));
            }
        }
    }
    kept.dedup();
    kept.append(&mut rules);
    if !interfaces.is_empty() {
        script.comment(
            "Mode dsr: clients' datagrams come in by another interface than replies leave by, which strict rp_filter refuses.",
        );
    }
    for interface in &interfaces {
        script.parameter(true, interface, "rp_filter", 2);
    }
    script.nft(
        "Mode dsr: replies to clients get the listener's address as their source, by their port alone, since a server on a wildcard leaves the address to the kernel. Replies to clients that write to this server directly get it, too; those to the proxy itself don't. A datagram without a checksum stays without.",
        &[Chain {
            name: "post",
            hook: "postrouting priority 300",
            rules: kept,
        }],
    );
    Ok(())
}

/// Rules that leave alone what goes to the proxy itself, which knows the server's
/// replies to its probes, and in other modes, by their source. `rewritten` are the
/// families and ports of rewritten replies.
fn replies_to_proxy(
    rewritten: &BTreeSet<(bool, u16)>,
    host: &HostFacts<'_>,
) -> Result<Vec<String>, HostSetupError> {
    for (_, server, mode) in host.config.served() {
        let address = server.address.0;
        let is_rewritten = rewritten.contains(&(address.is_ipv4(), address.port()))
            && is_here(address.ip(), &host.options.server);
        let Some(why) = server.answers_proxy(mode).filter(|_| is_rewritten) else {
            continue;
        };
        if server.sources.is_empty() && host.gateway_like(address.ip()).is_none() {
            return Err(HostSetupError::Unknown {
                what: format!("the proxy's address that server {address} answers ({why})"),
                why: format!("[upstream.{}] has no `source`", server.upstream),
                option: "--gateway",
            });
        }
    }
    let mut proxy = host.config.sources();
    let listeners = host.config.listeners.iter().flat_map(|l| &l.bind);
    proxy.extend(listeners.map(SocketAddr::ip));
    proxy.extend(&host.options.gateway);
    proxy.retain(|ip| !ip.is_unspecified());
    let mut rules = Vec::new();
    for (v4, family) in [(true, "ip"), (false, "ip6")] {
        let of_family = proxy.iter().filter(|ip| ip.is_ipv4() == v4);
        let of_family: Vec<_> = of_family.map(ToString::to_string).collect();
        if rewritten.iter().any(|(is_v4, _)| *is_v4 == v4) {
            rules.push(format!(
                "{family} daddr {{ {} }} accept",
                of_family.join(", ")
            ));
        }
    }
    Ok(rules)
}

/// Mode dsr by the SDK: the server sends from the listener's address.
fn own_listeners_address(
    script: &mut Script,
    returns: &[&Return],
    host: &HostFacts<'_>,
) -> Result<(), HostSetupError> {
    let mut addresses = BTreeSet::new();
    for found in returns {
        addresses.extend(host.listener_addresses(found.listener.ip())?);
    }
    let v4 = || addresses.iter().filter(|ip| ip.is_ipv4());
    if v4().next().is_some() {
        script.comment(
            "Servers on the SDK send from the listener's address. For IPv4 lo gets it, which needs no privilege of the server; this host then no longer reaches the real listener. Neighbours must not hear of the address (arp_ignore, arp_announce). A server with CAP_NET_RAW needs none of this: leave it out.",
        );
        for ip in v4() {
            script.address(&format!("{ip}/32"));
        }
        script.parameter(true, "all", "arp_ignore", 1);
        script.parameter(true, "all", "arp_announce", 2);
    }
    if addresses.iter().any(IpAddr::is_ipv6) {
        script.comment(
            "Servers on the SDK send from a listener's IPv6 address by IPV6_FREEBIND, which needs no privilege and no setup.",
        );
    }
    let mut routes = Routes::new();
    let mut rules = BTreeSet::new();
    for found in returns {
        for ip in host.listener_addresses(found.listener.ip())? {
            let Some(gateway) = host.gateway_like(ip) else {
                continue;
            };
            let interface = host.interface_of(found.server.ip())?;
            let mtu = host.options.mtu.unwrap_or(DSR_MTU);
            let lock = if ip.is_ipv4() { "lock " } else { "" };
            routes.insert((
                ip.is_ipv4(),
                format!("default via {gateway} dev {interface} mtu {lock}{mtu}"),
            ));
            rules.insert((ip.is_ipv4(), format!("from {ip}")));
        }
    }
    if !routes.is_empty() {
        script.comment("What is sent from the listener's address goes through the proxy's host.");
        add_routes(script, &routes);
    }
    for (v4, rule) in &rules {
        script.rule(*v4, rule);
    }
    Ok(())
}
