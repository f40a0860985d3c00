//! The paths of replies through the proxy's host, as the kernel's own checks of incoming
//! packets see them: route lookups with the interface that the replies arrive at.

use std::net::IpAddr;

use super::{Finding, servers_of};
use crate::host_setup::Role;
use crate::kernel;
use crate::reply_path::{ReplyPath, Rewriter};
use crate::route::{NoRoute, Packet, Route, marks_in_rules};
use crate::topology::{Topology, is_anywhere};

pub(super) fn examine(
    topology: &Topology,
    paths: &[ReplyPath],
    client: Option<IpAddr>,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for rewriter in [Rewriter::Proxy, Rewriter::ProxyHost] {
        for path in servers_of(paths, rewriter) {
            let client = topology.sample_client(path.server.is_ipv4(), client);
            findings.push(match Reply::of(path, client) {
                Ok(reply) if rewriter == Rewriter::Proxy => reply.delivered_to_proxy(),
                Ok(reply) => reply.forwarded_to_client(),
                Err(finding) => finding,
            });
        }
    }
    findings
}

/// Mode dsr by the SDK with this host as the servers' gateway: it must accept and forward
/// packets from one of its own addresses.
pub(super) fn examine_gateway(
    topology: &Topology,
    paths: &[ReplyPath],
    client: Option<IpAddr>,
) -> Vec<Finding> {
    let concrete =
        |path: &&ReplyPath| path.rewriter == Rewriter::Sdk && !path.listener.ip().is_unspecified();
    let finding = |path: &ReplyPath| {
        let v4 = path.listener.is_ipv4();
        let mut reply = match Reply::of(path, topology.sample_client(v4, client)) {
            Ok(reply) => reply,
            Err(finding) => return finding,
        };
        reply.what = format!("{} from {}", reply.what, path.listener);
        reply.packet.from = Some(path.listener.ip());
        if v4 && kernel::larger_of_all_and(&reply.interface, "accept_local") == 0 {
            let found = format!(
                "are dropped here since their source is this host's own: accept_local is 0 on {}",
                reply.interface
            );
            let fix = format!("{}, with --is-gateway", Role::Proxy.set_up());
            return Finding::fatal(reply.what, found, fix);
        }
        reply.forwarded_to_client()
    };
    paths.iter().filter(concrete).map(finding).collect()
}

/// A reply of a server to a client, on this host.
struct Reply {
    what: String,
    packet: Packet,
    /// The interface that it arrives at; `lo` from a server on this host.
    interface: String,
}

impl Reply {
    fn of(path: &ReplyPath, client: IpAddr) -> Result<Self, Finding> {
        let (server, ip) = (path.server, path.server.ip());
        let what = format!("replies of server {server} ({})", path.rewriter.mode());
        let route = match Packet::sent_to(ip).route() {
            Ok(route) => route,
            Err(NoRoute::Unknown(error)) => {
                let question = format!("ip route get {ip}");
                return Err(Finding::lookup_failed(what, &error, &question));
            }
            Err(error) => {
                let found = format!("there is no route to the server itself: {error}");
                return Err(Finding::fatal(
                    what,
                    found,
                    format!("add one (ip route add {ip} …)"),
                ));
            }
        };
        let interface = match route.is_local {
            true => "lo".to_owned(),
            false => name_of(&route),
        };
        Ok(Self {
            what,
            packet: Packet {
                from: Some(ip),
                input: (!route.is_local).then_some(route.interface),
                port: Some(server.port()),
                ..Packet::sent_to(client)
            },
            interface,
        })
    }

    /// The command for the same lookup.
    fn question(&self) -> String {
        let Packet { to, from, .. } = self.packet;
        let from = from.unwrap_or(to);
        let input = match self.packet.input {
            Some(_) => format!(" iif {}", self.interface),
            None => String::new(),
        };
        format!("ip route get {to} from {from}{input}")
    }

    fn ok(self, found: String) -> Finding {
        Finding::ok(self.what, found)
    }

    fn fatal(self, found: &str, fix: impl Into<String>) -> Finding {
        let found = format!("{found} (`{}`)", self.question());
        Finding::fatal(self.what, found, fix)
    }

    /// Mode transparent: the kernel must take it as this host's own.
    fn delivered_to_proxy(self) -> Finding {
        let fix = Role::Proxy.set_up();
        let lookup = self.packet.route();
        match &lookup {
            Ok(Route {
                is_local: true,
                table,
                ..
            }) => {
                let found = format!(
                    "those to {} are delivered to the proxy, by table {table}",
                    self.packet.to
                );
                return self.ok(found);
            }
            Err(NoRoute::Unknown(error)) => {
                return Finding::lookup_failed(&self.what, error, &self.question());
            }
            Ok(_) | Err(_) => {}
        }
        if let Some(finding) = self.by_mark() {
            return finding;
        }
        match lookup {
            Ok(route) => {
                let found = format!(
                    "leave through {} instead of reaching the proxy",
                    name_of(&route)
                );
                self.fatal(&found, fix)
            }
            Err(NoRoute::BadSource(_)) => self.bad_source(),
            Err(error) => {
                let found = format!(
                    "are dropped here ({error}): the rule or the route that delivers them to the proxy is missing"
                );
                self.fatal(&found, fix)
            }
        }
    }

    /// The operator's own setup may deliver what a firewall has marked, which only the
    /// firewall's rules could tell.
    fn by_mark(&self) -> Option<Finding> {
        let v4 = self.packet.to.is_ipv4();
        let is_set = |name| kernel::larger_of_all_and(&self.interface, name) > 0;
        // Then the kernel checks the source with the mark, too, and finds itself.
        let is_checked = v4 && is_set("src_valid_mark") && is_set("rp_filter");
        marks_in_rules(v4).ok()?.into_iter().find_map(|mark| {
            let marked = Packet {
                mark,
                ..self.packet
            };
            let found = format!("are delivered to the proxy if a firewall gives them mark {mark}");
            match marked.route() {
                Ok(route) if route.is_local => Some(Finding::advice(
                    &self.what,
                    format!("{found}, which doctor can't see"),
                    "try --probe",
                )),
                Err(NoRoute::BadSource(_)) if is_checked => Some(Finding::fatal(
                    &self.what,
                    format!("{found}, but dropped by rp_filter since src_valid_mark is 1"),
                    format!(
                        "sysctl -w net.ipv4.conf.all.src_valid_mark=0, or without marks: {}",
                        Role::Proxy.set_up()
                    ),
                )),
                Ok(_) | Err(_) => None,
            }
        })
    }

    /// Mode dsr: this host must forward it.
    fn forwarded_to_client(self) -> Finding {
        let (to, v4) = (self.packet.to, self.packet.to.is_ipv4());
        let set_up = Role::Proxy.set_up();
        if self.packet.input.is_none() {
            return Finding::advice(
                self.what,
                "the server is on this host, which forwards none of its own replies",
                "use mode transparent or ppv2 for it",
            );
        }
        match self.packet.route() {
            Ok(_) if kernel::is_own(to) => Finding::advice(
                self.what,
                format!("client {to} is an address of this host and shows nothing"),
                "name another with --client",
            ),
            Ok(route) if route.is_local => {
                let table = route.table;
                let fix = format!("remove the rule that leads to table {table}, then {set_up}");
                self.fatal(&format!("those to {to} are taken as this host's own"), fix)
            }
            // The kernel ignores the parameter in lookups of IPv6.
            Ok(_) if !v4 && !forwards_v6(&self.interface) => {
                let found = "are dropped here: net.ipv6.conf.all.forwarding is 0";
                Finding::fatal(self.what, found, set_up)
            }
            Ok(route) => self.ok(format!(
                "those to {to} are forwarded through {}",
                name_of(&route)
            )),
            Err(NoRoute::Unknown(error)) => {
                Finding::lookup_failed(&self.what, &error, &self.question())
            }
            Err(NoRoute::BadSource(_)) => self.bad_source(),
            Err(NoRoute::Unreachable(error)) => {
                let key = format!("net/ipv4/conf/{}/forwarding", self.interface);
                if v4 && kernel::parameter(&key) == Some(0) {
                    let found = format!("are dropped here: {} is 0", key.replace('/', "."));
                    return Finding::fatal(self.what, found, set_up);
                }
                let found = format!("are dropped here: no route to {to} ({error})");
                let fix = "add a route to clients (ip route add default via …)";
                // There may be routes to the real clients.
                if is_anywhere(to) {
                    let fix = format!("{fix}, or name a client with --client");
                    Finding::advice(self.what, found, fix)
                } else {
                    Finding::fatal(self.what, found, fix)
                }
            }
        }
    }

    fn bad_source(self) -> Finding {
        let packets = format!("those to {} are", self.packet.to);
        Finding::bad_source(self.what, &packets, &self.interface)
    }
}

fn name_of(route: &Route) -> String {
    kernel::interface_name(route.interface).unwrap_or_else(|| route.interface.to_string())
}

fn forwards_v6(interface: &str) -> bool {
    let forced = format!("net/ipv6/conf/{interface}/force_forwarding");
    kernel::parameter("net/ipv6/conf/all/forwarding") != Some(0)
        || kernel::parameter(&forced) == Some(1)
}
