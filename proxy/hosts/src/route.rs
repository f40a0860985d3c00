//! Route lookups as `ip route get` makes them (RTM_GETROUTE, rtnetlink(7)). With an
//! input interface, the kernel runs its own checks of incoming packets, too.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "netlink messages have many attributes that don't matter here"
)]

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteType,
};
use netlink_packet_route::rule::{RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use rustix::io::Errno;
use thiserror::Error;

/// UDP's number among the protocols of IP.
const UDP: u8 = 17;

/// A packet whose route is looked up.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    pub to: IpAddr,
    /// `None` for the kernel's choice.
    pub from: Option<IpAddr>,
    /// The index of the interface that it arrives at; `None` if this host sends it.
    pub input: Option<u32>,
    /// Its UDP source port, for rules that match one.
    pub port: Option<u16>,
    /// Its firewall mark, 0 for none.
    pub mark: u32,
}

/// Where a packet goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// To this host itself.
    pub is_local: bool,
    /// The index of the interface that it leaves through.
    pub interface: u32,
    /// The next router, if the destination isn't a neighbour.
    pub gateway: Option<IpAddr>,
    /// The routing table that has the route.
    pub table: u32,
    /// The MTU of the route itself.
    pub mtu: Option<u32>,
}

/// Why a packet has no route.
#[derive(Debug, Error)]
#[error(transparent)]
pub enum NoRoute {
    /// No route leads there, or this host doesn't forward what arrives there.
    Unreachable(io::Error),
    /// It arrived and failed a check of its source address: rp_filter, or an address that
    /// can't arrive there.
    BadSource(io::Error),
    /// The lookup itself failed.
    Unknown(io::Error),
}

impl Packet {
    /// A packet that this host sends.
    #[must_use]
    pub fn sent_to(to: IpAddr) -> Self {
        Self {
            to,
            from: None,
            input: None,
            port: None,
            mark: 0,
        }
    }

    /// Looks its route up.
    ///
    /// # Errors
    ///
    /// [`NoRoute`].
    pub fn route(&self) -> Result<Route, NoRoute> {
        let answers = ask(RouteNetlinkMessage::GetRoute(self.question()), 0);
        let answers = answers.map_err(|error| match Errno::from_io_error(&error) {
            Some(Errno::INVAL | Errno::XDEV) => NoRoute::BadSource(error),
            Some(Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::ACCESS) => {
                NoRoute::Unreachable(error)
            }
            _ => NoRoute::Unknown(error),
        })?;
        let route = answers.into_iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(route) => Some(Route::of(&route)),
            _ => None,
        });
        route.ok_or_else(|| NoRoute::Unknown(io::ErrorKind::UnexpectedEof.into()))
    }

    fn question(&self) -> RouteMessage {
        let mut question = RouteMessage::default();
        question.header.address_family = family(self.to.is_ipv4());
        let whole = if self.to.is_ipv4() { 32 } else { 128 };
        question.header.destination_prefix_length = whole;
        question.header.flags = RouteFlags::LookupTable;
        let attributes = &mut question.attributes;
        attributes.push(RouteAttribute::Destination(self.to.into()));
        if let Some(from) = self.from {
            question.header.source_prefix_length = whole;
            attributes.push(RouteAttribute::Source(from.into()));
        }
        if let Some(interface) = self.input {
            attributes.push(RouteAttribute::Iif(interface));
        }
        if let Some(port) = self.port {
            attributes.push(RouteAttribute::IpProto(UDP));
            attributes.push(RouteAttribute::Sport(port));
        }
        if self.mark != 0 {
            attributes.push(RouteAttribute::Mark(self.mark));
        }
        question
    }
}

impl Route {
    fn of(message: &RouteMessage) -> Self {
        let mut route = Self {
            is_local: message.header.kind == RouteType::Local,
            interface: 0,
            gateway: None,
            table: u32::from(message.header.table),
            mtu: None,
        };
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Oif(interface) => route.interface = *interface,
                RouteAttribute::Gateway(RouteAddress::Inet(ip)) => {
                    route.gateway = Some(IpAddr::V4(*ip));
                }
                RouteAttribute::Gateway(RouteAddress::Inet6(ip)) => {
                    route.gateway = Some(IpAddr::V6(*ip));
                }
                RouteAttribute::Table(table) => route.table = *table,
                RouteAttribute::Metrics(metrics) => {
                    route.mtu = metrics.iter().find_map(|metric| match metric {
                        RouteMetric::Mtu(mtu) => Some(*mtu),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        route
    }
}

/// The MTU of the interface with this index, in bytes.
pub(crate) fn mtu(interface: u32) -> io::Result<u32> {
    let mut question = LinkMessage::default();
    question.header.index = interface;
    let answers = ask(RouteNetlinkMessage::GetLink(question), 0)?;
    let mtu = answers.iter().find_map(|answer| match answer {
        RouteNetlinkMessage::NewLink(link) => {
            link.attributes.iter().find_map(|found| match found {
                LinkAttribute::Mtu(mtu) => Some(*mtu),
                _ => None,
            })
        }
        _ => None,
    });
    mtu.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

fn rules(v4: bool) -> io::Result<Vec<RuleMessage>> {
    let mut question = RuleMessage::default();
    question.header.family = family(v4);
    let answers = ask(RouteNetlinkMessage::GetRule(question), NLM_F_DUMP)?;
    let rules = answers.into_iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewRule(rule) => Some(rule),
        _ => None,
    });
    Ok(rules.collect())
}

/// The firewall marks that routing rules match.
pub(crate) fn marks_in_rules(v4: bool) -> io::Result<Vec<u32>> {
    let rules = rules(v4)?;
    let attributes = rules.iter().flat_map(|rule| &rule.attributes);
    let marks = attributes.filter_map(|attribute| match attribute {
        RuleAttribute::FwMark(mark) if *mark != 0 => Some(*mark),
        _ => None,
    });
    Ok(marks.collect())
}

/// Whether routing rules match what a [`Packet`] doesn't have, or only some packets have:
/// marks, users, the destination port.
///
/// # Errors
///
/// Those of the kernel.
pub fn rules_look_deeper(v4: bool) -> io::Result<bool> {
    use RuleAttribute::{
        Destination, Goto, Iifname, IpProtocol, L3MDev, Oifname, Priority, Protocol, Source,
        SourcePortRange, SuppressIfGroup, SuppressPrefixLen, Table,
    };
    let is_plain = |found: &RuleAttribute| {
        matches!(
            found,
            Destination(_)
                | Goto(_)
                | Iifname(_)
                | IpProtocol(_)
                | L3MDev(_)
                | Oifname(_)
                | Priority(_)
                | Protocol(_)
                | Source(_)
                | SourcePortRange(_)
                | SuppressIfGroup(_)
                | SuppressPrefixLen(_)
                | Table(_)
        )
    };
    let rules = rules(v4)?;
    Ok(rules
        .iter()
        .any(|rule| rule.header.tos != 0 || !rule.attributes.iter().all(is_plain)))
}

fn family(v4: bool) -> AddressFamily {
    if v4 {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}

/// One question and all answers to it.
fn ask(question: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(question));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let mut answers = Vec::new();
    loop {
        let (bytes, _) = socket.recv_from_full()?;
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
            match answer.payload {
                NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::Done(_) => return Ok(answers),
                _ => {}
            }
            // Messages are aligned to four bytes (netlink(7)).
            let len = usize::try_from(answer.header.length).unwrap_or(usize::MAX);
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
        if flags & NLM_F_DUMP == 0 {
            return Ok(answers);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_to_this_host_are_local() {
        for ip in ["127.0.0.1", "::1"] {
            let route = Packet::sent_to(ip.parse().unwrap()).route().unwrap();
            assert!(route.is_local, "{route:?}");
            assert_eq!(route.gateway, None);
        }
    }

    #[test]
    fn bad_source_is_told_apart_from_no_route() {
        let packet = Packet {
            from: Some("127.0.0.1".parse().unwrap()),
            input: Some(u32::MAX >> 1),
            ..Packet::sent_to("127.0.0.1".parse().unwrap())
        };
        assert!(matches!(packet.route(), Err(NoRoute::Unknown(_))));
        let packet = Packet {
            from: Some("224.0.0.1".parse().unwrap()),
            input: Some(1),
            ..Packet::sent_to("192.0.2.1".parse().unwrap())
        };
        assert!(matches!(packet.route(), Err(NoRoute::BadSource(_))));
    }

    #[test]
    fn all_rules_are_read() {
        for v4 in [true, false] {
            assert!(marks_in_rules(v4).unwrap().iter().all(|mark| *mark != 0));
        }
    }
}
