//! A server's host.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::script::{Chain, Script};
use super::{DSR_MTU, Host, HostSetupError, Role, interface_of_route, unknown};
use crate::kernel;
use crate::nft::family;
use crate::reply_path::{ReplyPath, Rewriter, conflict};
use crate::route::Packet;

pub(super) fn set_up(
    script: &mut Script,
    paths: &[ReplyPath],
    host: &Host<'_>,
) -> Result<(), HostSetupError> {
    let here = paths
        .iter()
        .filter(|path| is_here(path.server.ip(), &host.options.server));
    let here: Vec<_> = here.collect();
    let routes = routes_to_source_networks(host)?;
    if here.is_empty() && routes.is_empty() && !paths.is_empty() {
        let servers: BTreeSet<_> = paths.iter().map(|path| path.server.to_string()).collect();
        return Err(HostSetupError(format!(
            "none of the servers in mode transparent or dsr ({}) has an address of this host; name the one that the script is for with --server",
            Vec::from_iter(servers).join(", ")
        )));
    }
    if let Some([first, second]) = conflict(&here) {
        return Err(HostSetupError(format!(
            "servers {} ({}) and {} ({}) of this host have the same port, by which it recognizes their replies, but these are for listeners {} and {}; let one of them listen on another port",
            first.server,
            first.rewriter.mode(),
            second.server,
            second.rewriter.mode(),
            first.listener,
            second.listener
        )));
    }
    let of = |rewriters: &[Rewriter]| -> Vec<_> {
        let of_them = here
            .iter()
            .copied()
            .filter(|path| rewriters.contains(&path.rewriter));
        of_them.collect()
    };
    let by_sdk = of(&[Rewriter::Sdk]);
    route_through_proxy(script, &of(&[Rewriter::Proxy, Rewriter::ProxyHost]), host)?;
    rewrite(script, &of(&[Rewriter::ServerHost]), &by_sdk, host)?;
    own_listener_addresses(script, &by_sdk, host)?;
    if !routes.is_empty() {
        script.comment(
            "Replies to source networks go to the proxy's host as a router's. On a link, this host would keep a neighbour entry for each session, and lose replies where its table is full.",
        );
    }
    for (network, (gateway, interface)) in routes {
        script.route_via(network, gateway, &interface);
    }
    Ok(())
}

/// The gateway to each source network that a server of this host is written to from, and
/// the interface towards it.
fn routes_to_source_networks(
    host: &Host<'_>,
) -> Result<BTreeMap<IpNet, (IpAddr, String)>, HostSetupError> {
    let mut routes = BTreeMap::new();
    for source in &host.topology.source_networks {
        let network = source.network;
        let is_local = || {
            let route = Packet::sent_to(source.probe).route();
            route.is_ok_and(|route| route.is_local)
        };
        let servers = source.servers.iter().map(SocketAddr::ip);
        let mut here = servers.filter(|ip| is_here(*ip, &host.options.server));
        let Some(server) = here.find(|_| !is_local()) else {
            continue;
        };
        let what = format!("the proxy's address that replies to source network {network} go to");
        let gateway = host
            .gateway(server)
            .ok_or_else(|| unknown(&what, "only the proxy's host has it", "--gateway"))?;
        routes.insert(network, (gateway, host.interface_of(server)?));
    }
    Ok(routes)
}

/// Whether a server with this address is on the host that the script is for.
pub(crate) fn is_here(ip: IpAddr, named: &[IpAddr]) -> bool {
    match named {
        [] => !ip.is_loopback() && kernel::is_own(ip),
        named => named.contains(&ip),
    }
}

/// Routes through the proxy's host, by family.
#[derive(Default)]
struct Routes(BTreeSet<(bool, String)>);

impl Routes {
    fn insert(
        &mut self,
        gateway: IpAddr,
        mtu: Option<u32>,
        server: IpAddr,
        host: &Host<'_>,
    ) -> Result<(), HostSetupError> {
        let (v4, interface) = (gateway.is_ipv4(), host.interface_of(server)?);
        // An unlocked MTU of IPv4 would follow ICMP errors, and the proxy's host gets
        // those from the listener's side.
        let lock = if v4 { "lock " } else { "" };
        let mtu = mtu
            .map(|mtu| format!(" mtu {lock}{mtu}"))
            .unwrap_or_default();
        self.0
            .insert((v4, format!("default via {gateway} dev {interface}{mtu}")));
        Ok(())
    }

    fn add_to(&self, script: &mut Script) {
        for (v4, route) in &self.0 {
            script.route(*v4, route);
        }
    }
}

/// Modes transparent, and dsr rewritten by the proxy's host: replies go there.
fn route_through_proxy(
    script: &mut Script,
    paths: &[&ReplyPath],
    host: &Host<'_>,
) -> Result<(), HostSetupError> {
    if paths.is_empty() {
        return Ok(());
    }
    let (mut routes, mut replies, mut others) =
        (Routes::default(), BTreeSet::new(), BTreeSet::new());
    for path in paths {
        let (ip, v4) = (path.server.ip(), path.server.is_ipv4());
        let what = || format!("the proxy's address that server {ip} routes replies to");
        let gateway = host
            .gateway(ip)
            .ok_or_else(|| unknown(&what(), "only the proxy's host has it", "--gateway"))?;
        let mtu = (path.rewriter == Rewriter::ProxyHost).then_some(DSR_MTU);
        routes.insert(gateway, host.options.mtu.or(mtu), ip, host)?;
        replies.insert((v4, format!("ipproto udp sport {}", path.ports())));
        others.insert((v4, ip));
    }
    script.comment(
        "Replies return through the proxy's host. So does everything else from the server's address that is not to this host's own networks: ICMP errors, and what other programs send from it. The rest of the host keeps its default route.",
    );
    routes.add_to(script);
    for (v4, reply) in &replies {
        script.rule(*v4, reply);
    }
    for (v4, ip) in &others {
        let from = format!("from {ip}");
        // Every route but the default one.
        script.rule_to(*v4, &from, "main suppress_prefixlength 0");
        script.rule(*v4, &from);
    }
    Ok(())
}

/// Mode dsr, rewritten here: the server's host sends replies directly to clients.
fn rewrite(
    script: &mut Script,
    paths: &[&ReplyPath],
    by_sdk: &[&ReplyPath],
    host: &Host<'_>,
) -> Result<(), HostSetupError> {
    if paths.is_empty() {
        return Ok(());
    }
    let mut rules = Vec::new();
    let (mut rewritten, mut interfaces) = (BTreeSet::new(), BTreeSet::new());
    for path in paths {
        let (v4, port) = (path.server.is_ipv4(), path.server.port());
        let public =
            host.public_interface(|| interface_of_route(host.topology.sample_client(v4, None)))?;
        // A server may have several addresses.
        if rewritten.insert((v4, port)) {
            let replies = path.nft_match(Role::Server);
            rules.extend(path.nft_rewrite(&format!("oifname \"{public}\" {replies}")));
        }
        if v4 {
            interfaces.insert(host.interface_of(path.server.ip())?);
        }
    }
    let mut all = replies_to_proxy(&rewritten, host)?;
    for listener in by_sdk.iter().map(|path| path.listener) {
        let (v4, port) = (listener.is_ipv4(), listener.port());
        if rewritten.contains(&(v4, port)) {
            for ip in host.listener_addresses(listener.ip())? {
                all.push(format!("{} saddr {ip} udp sport {port} accept", family(v4)));
            }
        }
    }
    all.dedup();
    all.append(&mut rules);
    if !interfaces.is_empty() {
        script.comment(
            "Mode dsr: clients' datagrams arrive at another interface than replies leave through, which strict rp_filter refuses.",
        );
    }
    for interface in &interfaces {
        script.parameter(interface, "rp_filter", 2);
    }
    script.nft(
        "Mode dsr: replies to clients get the listener's address as their source. They are recognized by their port alone, since a server on a wildcard leaves the address to the kernel. Replies to clients that write to this server directly are rewritten, too; those to the proxy itself are not. A datagram without a checksum stays without.",
        &[Chain("post", "postrouting priority 300", all)],
    );
    Ok(())
}

/// Rules that leave datagrams to the proxy itself unchanged: it recognizes replies to
/// probes, and in other modes all replies, by their source. `rewritten` are the families
/// and ports of rewritten replies.
fn replies_to_proxy(
    rewritten: &BTreeSet<(bool, u16)>,
    host: &Host<'_>,
) -> Result<Vec<String>, HostSetupError> {
    for server in &host.topology.servers {
        let (address, ip) = (server.address, server.address.ip());
        let Some(why) = server.answers_proxy else {
            continue;
        };
        let is_rewritten = rewritten.contains(&(ip.is_ipv4(), address.port()))
            && is_here(ip, &host.options.server);
        if is_rewritten && server.source.is_none() && host.gateway(ip).is_none() {
            let what = format!("the proxy's address that server {address} answers ({why})");
            let why = format!("[upstream.{}] has no `source`", server.upstream);
            return Err(unknown(&what, &why, "--gateway"));
        }
    }
    let mut proxy = host.topology.sources.clone();
    proxy.extend(host.topology.listeners.iter().map(SocketAddr::ip));
    proxy.extend(&host.options.gateway);
    proxy.retain(|ip| !ip.is_unspecified());
    let networks = host.topology.source_networks.iter();
    let networks = networks.map(|source| source.network);
    let proxy: BTreeSet<_> = proxy.into_iter().map(IpNet::from).chain(networks).collect();
    let mut rules = Vec::new();
    for v4 in [true, false] {
        if rewritten.iter().any(|(is_v4, _)| *is_v4 == v4) {
            let of_family = proxy.iter().filter(|net| net.addr().is_ipv4() == v4);
            let of_family: Vec<_> = of_family.map(in_nft).collect();
            let (family, all) = (family(v4), of_family.join(", "));
            rules.push(format!("{family} daddr {{ {all} }} accept"));
        }
    }
    Ok(rules)
}

/// A network in a set of nft's; a single address without the length of its prefix.
fn in_nft(net: &IpNet) -> String {
    match net.prefix_len() == net.max_prefix_len() {
        true => net.addr().to_string(),
        false => net.to_string(),
    }
}

/// Mode dsr by the SDK: the server sends from the listener's address.
fn own_listener_addresses(
    script: &mut Script,
    paths: &[&ReplyPath],
    host: &Host<'_>,
) -> Result<(), HostSetupError> {
    let (mut v4, mut v6) = (BTreeSet::new(), BTreeSet::new());
    let (mut routes, mut rules) = (Routes::default(), BTreeSet::new());
    for path in paths {
        for ip in host.listener_addresses(path.listener.ip())? {
            if ip.is_ipv4() { &mut v4 } else { &mut v6 }.insert(ip);
            if let Some(gateway) = host.gateway(ip) {
                let mtu = host.options.mtu.or(Some(DSR_MTU));
                routes.insert(gateway, mtu, path.server.ip(), host)?;
                rules.insert((ip.is_ipv4(), format!("from {ip}")));
            }
        }
    }
    if !v4.is_empty() {
        script.comment(
            "Servers on the SDK send from the listener's address. For IPv4, adding the address to lo lets them do so without privilege; this host then no longer reaches the real listener. Neighbours must not learn of the address (arp_ignore, arp_announce). A server with CAP_NET_RAW needs none of this: leave it out.",
        );
        for ip in &v4 {
            script.address(&format!("{ip}/32"));
        }
        script.parameter("all", "arp_ignore", 1);
        script.parameter("all", "arp_announce", 2);
    }
    if !v6.is_empty() {
        script.comment(
            "Servers on the SDK send from a listener's IPv6 address by IPV6_FREEBIND, which needs no privilege and no setup.",
        );
    }
    if !rules.is_empty() {
        script.comment("Packets from the listener's address leave through the proxy's host.");
        routes.add_to(script);
    }
    for (v4, rule) in &rules {
        script.rule(*v4, rule);
    }
    Ok(())
}
