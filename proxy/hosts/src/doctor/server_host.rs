//! What a server's host lacks.

use std::net::{IpAddr, UdpSocket};

use super::{Finding, Options, nft_rules};
use crate::host_setup::{Role, is_here};
use crate::kernel;
use crate::reply_path::{ReplyPath, Rewriter, conflict};
use crate::route::{NoRoute, Packet};
use crate::topology::{SourceNetwork, Topology};

pub(super) fn examine(topology: &Topology, options: &Options) -> Vec<Finding> {
    let paths = topology.reply_paths();
    let here = paths
        .iter()
        .filter(|path| is_here(path.server.ip(), &options.server));
    let here: Vec<_> = here.collect();
    let mut findings = routes_to_source_networks(topology, options);
    if here.is_empty() && findings.is_empty() {
        return vec![Finding::advice(
            "servers of this host",
            "no server in mode transparent or dsr, or of a source network, has an address of this host",
            "name the server with --server",
        )];
    }
    if let Some([first, second]) = conflict(&here) {
        findings.push(Finding::fatal(
            format!("replies of servers {} and {}", first.server, second.server),
            format!(
                "can't be told apart here since both servers have the same port: they are for listeners {} and {}",
                first.listener, second.listener
            ),
            "let one of them listen on another port",
        ));
    }
    for path in &here {
        let client = topology.sample_client(path.server.is_ipv4(), options.client);
        if path.rewriter == Rewriter::Sdk {
            findings.extend(listener_address(path));
            continue;
        }
        if path.server.is_ipv4() {
            findings.push(datagrams_from_clients(path, client));
        }
        findings.push(route_of_replies(path, client, &options.gateway));
    }
    let by_kernel = |path: &&ReplyPath| path.rewriter == Rewriter::ServerHost;
    let rewritten: Vec<_> = here.into_iter().filter(by_kernel).collect();
    findings.extend(nft_rules::examine(&rewritten, Role::Server));
    findings
}

/// Replies to addresses of source networks must go to the proxy's host as a router's:
/// on a link, this host would resolve each address by itself.
fn routes_to_source_networks(topology: &Topology, options: &Options) -> Vec<Finding> {
    let networks = topology.source_networks.iter().filter(|source| {
        let mut servers = source.servers.iter();
        servers.any(|server| is_here(server.ip(), &options.server))
    });
    networks
        .map(|source| route_to(source, &options.gateway))
        .collect()
}

fn route_to(source: &SourceNetwork, gateways: &[IpAddr]) -> Finding {
    let (network, ip) = (source.network, source.probe);
    let what = format!("replies to source network {network}");
    let mut same = gateways.iter().filter(|g| g.is_ipv4() == ip.is_ipv4());
    let gateway = same.next();
    let via = gateway.map_or_else(|| "PROXY".to_owned(), IpAddr::to_string);
    let fix = format!("ip route replace {network} via {via}");
    let route = match Packet::sent_to(ip).route() {
        Ok(route) => route,
        Err(NoRoute::Unknown(error)) => {
            return Finding::lookup_failed(what, &error, &format!("ip route get {ip}"));
        }
        Err(error) => {
            return Finding::fatal(what, format!("have no route to {ip} ({error})"), fix);
        }
    };
    if route.is_local {
        return Finding::ok(what, "stay on this host");
    }
    let name = kernel::interface_name(route.interface).unwrap_or_default();
    match (route.gateway, gateway) {
        (None, _) => Finding::advice(
            what,
            format!(
                "leave directly through {name}: this host keeps a neighbour entry for each session, and loses replies where they are too many (gc_thresh3)"
            ),
            fix,
        ),
        (Some(via), Some(expected)) if via != *expected => Finding::fatal(
            what,
            format!("leave via {via} on {name}, not via the proxy"),
            fix,
        ),
        (Some(via), Some(_)) => Finding::ok(what, format!("leave via {via} on {name}")),
        (Some(via), None) => Finding::ok(
            what,
            format!(
                "leave via {via} on {name}, which is right if the proxy's host is there (--gateway checks it)"
            ),
        ),
    }
}

/// Datagrams with a client's source must pass rp_filter. IPv6 has none.
fn datagrams_from_clients(path: &ReplyPath, client: IpAddr) -> Finding {
    let server = path.server.ip();
    let what = format!(
        "datagrams from clients to server {} ({})",
        path.server,
        path.rewriter.mode()
    );
    let interface = kernel::interface_with(server);
    let index = interface.as_deref().map(kernel::interface_index);
    let (Some(interface), Some(Ok(index))) = (interface, index) else {
        let found = format!("this host doesn't have {server}");
        return Finding::fatal(what, found, "run doctor on the server's host");
    };
    let packet = Packet {
        from: Some(client),
        input: Some(index),
        ..Packet::sent_to(server)
    };
    match packet.route() {
        Ok(route) if route.is_local => Finding::ok(
            what,
            format!("those of {client} are accepted on {interface}"),
        ),
        Ok(_) => Finding::fatal(what, "are not taken as this host's own", "check `ip rule`"),
        Err(NoRoute::Unknown(error)) => {
            let question = format!("ip route get {server} from {client} iif {interface}");
            Finding::lookup_failed(what, &error, &question)
        }
        Err(NoRoute::BadSource(_) | NoRoute::Unreachable(_)) => {
            Finding::bad_source(what, &format!("those of {client} are"), &interface)
        }
    }
}

fn route_of_replies(path: &ReplyPath, client: IpAddr, gateways: &[IpAddr]) -> Finding {
    let what = format!(
        "replies of server {} ({})",
        path.server,
        path.rewriter.mode()
    );
    let is_direct = path.rewriter == Rewriter::ServerHost;
    let set_up = Role::Server.set_up();
    let packet = Packet {
        port: Some(path.server.port()),
        ..Packet::sent_to(client)
    };
    let route = match packet.route() {
        Ok(route) => route,
        Err(NoRoute::Unknown(error)) => {
            return Finding::lookup_failed(what, &error, &format!("ip route get {client}"));
        }
        Err(error) => {
            let fix = match is_direct {
                true => "add a route to clients (ip route add default via …)".to_owned(),
                false => set_up,
            };
            return Finding::fatal(what, format!("have no route to {client} ({error})"), fix);
        }
    };
    let name = kernel::interface_name(route.interface).unwrap_or_default();
    let mut found = match route.gateway {
        Some(gateway) => format!("those to {client} leave via {gateway} on {name}"),
        None => format!("those to {client} leave directly through {name}"),
    };
    if is_direct {
        return Finding::ok(what, found);
    }
    let same_family = |gateway: &&IpAddr| gateway.is_ipv4() == client.is_ipv4();
    let expected: Vec<_> = gateways.iter().filter(same_family).copied().collect();
    if !expected.is_empty() && !route.gateway.is_some_and(|ip| expected.contains(&ip)) {
        return Finding::fatal(what, format!("{found}, not via the proxy"), set_up);
    }
    if gateways.is_empty() {
        found += ", which is right if that is the proxy's host (--gateway checks it)";
    }
    match route.mtu {
        None if path.rewriter == Rewriter::ProxyHost => Finding::advice(
            what,
            format!(
                "{found}; the route has no MTU, and a reply that is too long for a hop beyond the proxy is lost silently"
            ),
            set_up,
        ),
        None => Finding::ok(what, found),
        Some(mtu) => Finding::ok(what, format!("{found}, MTU {mtu}")),
    }
}

/// A server on the SDK sends from the listener's address. IPv6 needs nothing for that.
fn listener_address(path: &ReplyPath) -> Option<Finding> {
    let ip = path.listener.ip();
    if ip.is_unspecified() || ip.is_ipv6() {
        return None;
    }
    let what = format!(
        "address {ip}, which server {} answers from ({})",
        path.server,
        path.rewriter.mode()
    );
    Some(match UdpSocket::bind((ip, 0)) {
        Ok(_) => Finding::ok(what, "can be bound here"),
        Err(error) => Finding::advice(
            what,
            format!("can't be bound here ({error}), unless the server has CAP_NET_RAW"),
            format!("setcap cap_net_raw+ep SERVER, or ip addr add {ip}/32 dev lo"),
        ),
    })
}
