//! The way of replies through the proxy's host, as the kernel's own checks of
//! incoming packets see it (RTM_GETROUTE with the interface that they come in by).

use std::net::IpAddr;

use super::{Finding, servers_of};
use crate::config::Config;
use crate::host::route::{NoRoute, Packet, Route, marks_in_rules};
use crate::host::{self, some_client};
use crate::returns::{By, Return};

const SET_UP: &str = "run what `ppv2-proxy host-setup --config FILE --role proxy` prints, as root";

pub(super) fn examine(config: &Config, returns: &[Return], client: Option<IpAddr>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for by in [By::Proxy, By::ProxyHost] {
        for found in servers_of(returns, by) {
            let client = sample(config, found.server.is_ipv4(), client);
            findings.push(match Reply::of(found, client) {
                Ok(reply) if by == By::Proxy => reply.to_proxy(),
                Ok(reply) => reply.to_client(),
                Err(finding) => finding,
            });
        }
    }
    findings
}

/// The client that was told, or one that the configuration lets in.
pub(super) fn sample(config: &Config, v4: bool, told: Option<IpAddr>) -> IpAddr {
    told.filter(|client| client.is_ipv4() == v4)
        .unwrap_or_else(|| some_client(config, v4))
}

/// A reply of a server to a client, on this host.
struct Reply {
    what: String,
    packet: Packet,
    /// The interface that it comes in by; `lo` from a server on this host.
    interface: String,
}

impl Reply {
    fn of(found: &Return, client: IpAddr) -> Result<Self, Finding> {
        let server = found.server;
        let what = format!("replies of server {server} ({})", found.by.mode());
        let route = match Packet::sent_to(server.ip()).route() {
            Ok(route) => route,
            Err(NoRoute::Unknown(error)) => {
                return Err(Finding::advice(
                    what,
                    format!("the kernel could not be asked for routes: {error}"),
                    format!("try `ip route get {}`", server.ip()),
                ));
            }
            Err(NoRoute::Unreachable(error) | NoRoute::BadSource(error)) => {
                return Err(Finding::fatal(
                    what,
                    format!("there is no route to the server itself: {error}"),
                    format!("add one (ip route add {} …)", server.ip()),
                ));
            }
        };
        let name = host::interface_name(route.interface);
        let interface = if route.is_local {
            Some("lo".to_owned())
        } else {
            name
        };
        Ok(Self {
            what,
            packet: Packet {
                from: Some(server.ip()),
                comes_in_by: (!route.is_local).then_some(route.interface),
                port: Some(server.port()),
                ..Packet::sent_to(client)
            },
            interface: interface.unwrap_or_else(|| route.interface.to_string()),
        })
    }

    fn is_v4(&self) -> bool {
        self.packet.to.is_ipv4()
    }

    /// How the same is asked by hand.
    fn question(&self) -> String {
        let Packet { to, from, .. } = self.packet;
        let from = from.unwrap_or(to);
        if self.packet.comes_in_by.is_some() {
            format!("`ip route get {to} from {from} iif {}`", self.interface)
        } else {
            format!("`ip route get {to} from {from}`")
        }
    }

    /// Mode transparent: it must be taken for this host's own.
    fn to_proxy(&self) -> Finding {
        match self.packet.route() {
            Ok(route) if route.is_local => Finding::right(
                &self.what,
                format!("those to {} are handed to the proxy, by table {}", self.packet.to, route.table),
            ),
            Err(NoRoute::Unknown(error)) => self.unknown(&error),
            other => self.by_mark().unwrap_or_else(|| {
                let (found, mend) = match other {
                    Ok(route) => (
                        format!("leave by {} rather than come to the proxy", name_of(&route)),
                        SET_UP.to_owned(),
                    ),
                    Err(NoRoute::BadSource(_)) => (self.bad_source(), self.loosen()),
                    Err(NoRoute::Unreachable(error) | NoRoute::Unknown(error)) => (
                        format!(
                            "are dropped here ({error}): the rule or the route that hands them to the proxy is missing"
                        ),
                        SET_UP.to_owned(),
                    ),
                };
                let found = format!("{found} ({})", self.question());
                Finding::fatal(&self.what, found, mend)
            }),
        }
    }

    /// Somebody's own setup may hand over what a firewall has marked, which only
    /// the firewall's rules could tell.
    fn by_mark(&self) -> Option<Finding> {
        let marks = marks_in_rules(self.is_v4()).ok()?;
        let count = |name| host::larger_of_all_and(&self.interface, name).unwrap_or(0);
        // Then the kernel looks for the way back by the mark, too, and finds itself.
        let is_checked = self.is_v4() && count("src_valid_mark") > 0 && count("rp_filter") > 0;
        marks.into_iter().find_map(|mark| {
            let marked = Packet {
                mark,
                ..self.packet
            };
            let found = format!("are handed to the proxy if a firewall gives them mark {mark}");
            match marked.route() {
                Ok(route) if route.is_local => Some(Finding::advice(
                    &self.what,
                    format!("{found}, which can't be seen from here"),
                    "try --probe",
                )),
                Err(NoRoute::BadSource(_)) if is_checked => Some(Finding::fatal(
                    &self.what,
                    format!("{found}, but dropped by rp_filter since src_valid_mark is 1"),
                    format!(
                        "sysctl -w net.ipv4.conf.all.src_valid_mark=0, or without marks: {SET_UP}"
                    ),
                )),
                _ => None,
            }
        })
    }

    /// Mode dsr: it must be passed on.
    fn to_client(&self) -> Finding {
        let to = self.packet.to;
        if self.packet.comes_in_by.is_none() {
            return Finding::advice(
                &self.what,
                "the server is on this host, which passes none of its own replies on",
                "use mode transparent or ppv2 for it",
            );
        }
        match self.packet.route() {
            Ok(_) if host::is_own(to) => Finding::advice(
                &self.what,
                format!("nothing can be told by client {to}, an address of this host"),
                "name another with --client",
            ),
            Ok(route) if route.is_local => Finding::fatal(
                &self.what,
                format!(
                    "those to {to} are taken for this host's own ({})",
                    self.question()
                ),
                format!(
                    "remove the rule that leads to table {}, then {SET_UP}",
                    route.table
                ),
            ),
            // For IPv6 the kernel doesn't look at the parameter when it is asked.
            Ok(_) if !self.is_v4() && !forwards_v6(&self.interface) => Finding::fatal(
                &self.what,
                "are dropped here: net.ipv6.conf.all.forwarding is 0",
                SET_UP,
            ),
            Ok(route) => Finding::right(
                &self.what,
                format!("those to {to} are passed on by {}", name_of(&route)),
            ),
            Err(NoRoute::Unknown(error)) => self.unknown(&error),
            Err(NoRoute::BadSource(_)) => {
                let found = format!("{} ({})", self.bad_source(), self.question());
                Finding::fatal(&self.what, found, self.loosen())
            }
            Err(NoRoute::Unreachable(error)) => {
                let key = format!("net/ipv4/conf/{}/forwarding", self.interface);
                if self.is_v4() && host::parameter(&key) == Some(0) {
                    return Finding::fatal(
                        &self.what,
                        format!(
                            "are dropped here: net.ipv4.conf.{}.forwarding is 0",
                            self.interface
                        ),
                        SET_UP,
                    );
                }
                let found = format!("are dropped here: no route to {to} ({error})");
                let mend = "add a route to clients (ip route add default via …)";
                // There may be routes to the clients that there are.
                if host::is_anyone(to) {
                    Finding::advice(
                        &self.what,
                        found,
                        format!("{mend}, or name one with --client"),
                    )
                } else {
                    Finding::fatal(&self.what, found, mend)
                }
            }
        }
    }

    fn unknown(&self, error: &std::io::Error) -> Finding {
        Finding::advice(
            &self.what,
            format!("the kernel could not be asked for their way: {error}"),
            format!("try {}", self.question()),
        )
    }

    fn bad_source(&self) -> String {
        let interface = &self.interface;
        let strict = host::larger_of_all_and(interface, "rp_filter").unwrap_or(0);
        format!("are dropped here for their source address: rp_filter is {strict} on {interface}")
    }

    fn loosen(&self) -> String {
        format!("sysctl -w net.ipv4.conf.{}.rp_filter=2", self.interface)
    }
}

fn name_of(route: &Route) -> String {
    host::interface_name(route.interface).unwrap_or_else(|| route.interface.to_string())
}

fn forwards_v6(interface: &str) -> bool {
    let on = |path: &str| host::parameter(path).is_none_or(|value| value > 0);
    let forced = format!("net/ipv6/conf/{interface}/force_forwarding");
    on("net/ipv6/conf/all/forwarding") || host::parameter(&forced) == Some(1)
}

/// Mode dsr by the SDK, with this host as the servers' gateway: it must let in
/// and pass on what comes from an address of its own.
pub(super) fn examine_gateway(
    config: &Config,
    returns: &[Return],
    client: Option<IpAddr>,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for found in returns.iter().filter(|found| found.by == By::Sdk) {
        if found.listener.ip().is_unspecified() {
            continue;
        }
        let v4 = found.listener.is_ipv4();
        let mut reply = match Reply::of(found, sample(config, v4, client)) {
            Ok(reply) => reply,
            Err(finding) => {
                findings.push(finding);
                continue;
            }
        };
        reply.what = format!("{} from {}", reply.what, found.listener);
        reply.packet.from = Some(found.listener.ip());
        let accepts = host::larger_of_all_and(&reply.interface, "accept_local").unwrap_or(0);
        findings.push(if v4 && accepts == 0 {
            Finding::fatal(
                &reply.what,
                format!("are dropped here, since their source is this host's own: accept_local is 0 on {}", reply.interface),
                format!("{SET_UP}, with --is-gateway"),
            )
        } else {
            reply.to_client()
        });
    }
    findings
}
