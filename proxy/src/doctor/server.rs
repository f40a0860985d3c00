//! What a server's host lacks.

use std::net::{IpAddr, UdpSocket};

use super::{Finding, Told, replies, rewriting};
use crate::commands::host_setup::is_here;
use crate::config::Config;
use crate::host;
use crate::host::route::{NoRoute, Packet};
use crate::returns::{self, By, Return};

const SET_UP: &str =
    "run what `ppv2-proxy host-setup --config FILE --role server --gateway PROXY` prints, as root";

/// Everything that can be told on a server's host.
#[must_use]
pub fn examine_server(config: &Config, told: &Told) -> Vec<Finding> {
    let returns = returns::of(config);
    let here = returns
        .iter()
        .filter(|r| is_here(r.server.ip(), &told.servers));
    let here: Vec<_> = here.collect();
    if here.is_empty() {
        return vec![Finding::advice(
            "servers of this host",
            "none in mode transparent or dsr has an address of this host",
            "name the one meant with --server",
        )];
    }
    let mut findings = Vec::new();
    if let Some([first, second]) = returns::alike_on_host(&here) {
        findings.push(Finding::fatal(
            format!("replies of servers {} and {}", first.server, second.server),
            format!(
                "can't be told apart here, since both have one port: they are for listeners {} and {}",
                first.listener, second.listener
            ),
            "let one of them listen on another port",
        ));
    }
    for found in &here {
        let client = replies::sample(config, found.server.is_ipv4(), told.client);
        if found.by == By::Sdk {
            findings.extend(own_address(found));
            continue;
        }
        if found.server.is_ipv4() {
            findings.push(clients_datagrams(found, client));
        }
        findings.push(way_back(found, client, &told.gateways));
    }
    let rewritten = here
        .iter()
        .copied()
        .filter(|found| found.by == By::ServerHost);
    findings.extend(rewriting::examine_server(&rewritten.collect::<Vec<_>>()));
    findings
}

/// What comes in with a client's source must pass rp_filter. IPv6 has none.
fn clients_datagrams(found: &Return, client: IpAddr) -> Finding {
    let server = found.server.ip();
    let what = format!(
        "datagrams from clients to server {} ({})",
        found.server,
        found.by.mode()
    );
    let interface = host::interface_with(server);
    let index = interface.as_deref().map(host::interface_index);
    let (Some(interface), Some(Ok(index))) = (interface, index) else {
        return Finding::fatal(
            what,
            format!("this host doesn't have {server}"),
            "run doctor on the server's host",
        );
    };
    let packet = Packet {
        from: Some(client),
        comes_in_by: Some(index),
        ..Packet::sent_to(server)
    };
    match packet.route() {
        Ok(route) if route.is_local => {
            Finding::right(what, format!("those of {client} are let in by {interface}"))
        }
        Ok(_) => Finding::fatal(
            what,
            "are not taken for this host's own",
            "look at `ip rule`",
        ),
        Err(NoRoute::Unknown(error)) => {
            let by_hand = format!("try `ip route get {server} from {client} iif {interface}`");
            Finding::advice(
                what,
                format!("the kernel could not be asked: {error}"),
                by_hand,
            )
        }
        Err(NoRoute::BadSource(_) | NoRoute::Unreachable(_)) => {
            let strict = host::larger_of_all_and(&interface, "rp_filter").unwrap_or(0);
            Finding::fatal(
                what,
                format!(
                    "those of {client} are dropped for their source address: rp_filter is {strict} on {interface}"
                ),
                format!("sysctl -w net.ipv4.conf.{interface}.rp_filter=2"),
            )
        }
    }
}

/// Where replies go.
fn way_back(found: &Return, client: IpAddr, gateways: &[IpAddr]) -> Finding {
    let what = format!("replies of server {} ({})", found.server, found.by.mode());
    let packet = Packet {
        port: Some(found.server.port()),
        ..Packet::sent_to(client)
    };
    let route = match packet.route() {
        Ok(route) => route,
        Err(NoRoute::Unknown(error)) => {
            let by_hand = format!("try `ip route get {client}`");
            return Finding::advice(
                what,
                format!("the kernel could not be asked: {error}"),
                by_hand,
            );
        }
        Err(NoRoute::Unreachable(error) | NoRoute::BadSource(error)) => {
            let mend = if found.by == By::ServerHost {
                "add a route to clients (ip route add default via …)"
            } else {
                SET_UP
            };
            return Finding::fatal(what, format!("have no route to {client} ({error})"), mend);
        }
    };
    let name = host::interface_name(route.interface).unwrap_or_default();
    let way = match route.gateway {
        Some(gateway) => format!("those to {client} go by {gateway} on {name}"),
        None => format!("those to {client} go straight on to {name}"),
    };
    if found.by == By::ServerHost {
        return Finding::right(what, way);
    }
    let mut of_family = gateways
        .iter()
        .filter(|ip| ip.is_ipv4() == client.is_ipv4())
        .peekable();
    if of_family.peek().is_some() && !of_family.any(|gateway| route.gateway == Some(*gateway)) {
        return Finding::fatal(what, format!("{way}, not by the proxy"), SET_UP);
    }
    let way = if gateways.is_empty() {
        format!("{way}, which is right if that is the proxy's host (--gateway checks it)")
    } else {
        way
    };
    match route.mtu {
        None if found.by == By::ProxyHost => Finding::advice(
            what,
            format!(
                "{way}; the route names no MTU, and a reply that is too long for a hop beyond the proxy is lost without a word"
            ),
            SET_UP,
        ),
        None => Finding::right(what, way),
        Some(mtu) => Finding::right(what, format!("{way}, MTU {mtu}")),
    }
}

/// A server on the SDK sends from the listener's address. IPv6 takes nothing.
fn own_address(found: &Return) -> Option<Finding> {
    let ip = found.listener.ip();
    if ip.is_unspecified() || ip.is_ipv6() {
        return None;
    }
    let what = format!(
        "address {ip}, which server {} answers from (mode dsr, rewrite_on sdk)",
        found.server
    );
    Some(match UdpSocket::bind((ip, 0)) {
        Ok(_) => Finding::right(what, "can be bound here"),
        Err(error) => Finding::advice(
            what,
            format!("can't be bound here ({error}), unless the server has CAP_NET_RAW"),
            format!("setcap cap_net_raw+ep SERVER, or ip addr add {ip}/32 dev lo"),
        ),
    })
}
