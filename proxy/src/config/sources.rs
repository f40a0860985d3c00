//! `source` of an upstream: what its servers are written to from. Single addresses give
//! each session a port; a network gives each session an address.

use std::collections::HashSet;
use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;
use ppv2_engine::address::is_no_host;
use ppv2_engine::mode::Mode;
use ppv2_engine::server::{Replies, SourceNetwork, Sources};
use ppv2_engine::source_addresses::SourceAddresses;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer};

use super::error::{Within, key_path, refuse};
use super::options::Upstream;
use super::validate::Groups;
use super::values::{Network, read_from_text};
use super::{AdminAddress, Bind, Config, ConfigError, Listener, Named, Server};

/// Networks that no session has a source address in, with what is in them.
const NO_SOURCES: [(&str, &str); 9] = [
    ("0.0.0.0/8", "addresses of no host"),
    ("169.254.0.0/16", "link-local addresses"),
    ("224.0.0.0/4", "multicast addresses"),
    ("255.255.255.255/32", "the broadcast address"),
    ("::/96", "the addresses :: and ::1"),
    ("::ffff:0:0/96", "IPv4 addresses written as IPv6"),
    ("fe80::/10", "link-local addresses"),
    ("fec0::/10", "site-local addresses, which no longer exist"),
    ("ff00::/8", "multicast addresses"),
];

/// The longest prefixes. A network of two addresses has none for a session beside those of
/// the network and of health checks; fewer than 256 of IPv6 are a mistake.
const LONGEST_V4: u8 = 30;
const LONGEST_V6: u8 = 120;

/// The lowest port that needs no privilege (ip(7)).
const LOWEST_PORT: u16 = 1024;

/// An address or a network, as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Address(IpAddr),
    Network(IpNet),
}
read_from_text!(Source);

impl Source {
    fn is_ipv4(self) -> bool {
        match self {
            Self::Address(ip) => ip.is_ipv4(),
            Self::Network(net) => net.addr().is_ipv4(),
        }
    }
}

impl FromStr for Source {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        if !text.contains('/') {
            let ip: IpAddr = text.parse().map_err(|_| {
                ConfigError::new("this is not an IP address or a network")
                    .hint("write an address without a port, or a network as in 10.99.0.0/16")
            })?;
            return Ok(Self::Address(ip.to_canonical()));
        }
        if let Ok(net) = text.parse::<IpNet>()
            && net != net.trunc()
        {
            let (network, ip) = (net.trunc(), net.addr());
            return Err(
                ConfigError::new(format!("`{text}` is an address within a network")).hint(format!(
                    "the network is {network}; to send from that address alone, write {ip}"
                )),
            );
        }
        let network: Network = text.parse()?;
        Ok(Self::Network(network.0))
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(ip) => ip.fmt(f),
            Self::Network(net) => net.fmt(f),
        }
    }
}

/// The port of a source network, as it is written: the first worker's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FirstPort(NonZeroU16);

impl<'de> Deserialize<'de> for FirstPort {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Port;

        impl Visitor<'_> for Port {
            type Value = FirstPort;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a port from {LOWEST_PORT} to 65535")
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<FirstPort, E> {
                let port = u16::try_from(number).ok().filter(|p| *p >= LOWEST_PORT);
                port.and_then(NonZeroU16::new)
                    .map(FirstPort)
                    .ok_or_else(|| {
                        ConfigError::new(format!("{number} is out of range"))
                            .hint(format!("give a number from {LOWEST_PORT} to 65535"))
                            .into_serde()
                    })
            }

            // The key of the same name that chooses a port in mode transparent.
            fn visit_str<E: de::Error>(self, word: &str) -> Result<FirstPort, E> {
                Err(ConfigError::new(format!("`{word}` is not a port"))
                    .hint("give the port that the first worker sends from; \"any\" and \"client\" belong to a listener or a server in mode transparent")
                    .into_serde())
            }
        }

        deserializer.deserialize_any(Port)
    }
}

impl JsonSchema for FirstPort {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "FirstPort".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "integer", "minimum": LOWEST_PORT, "maximum": u16::MAX })
    }
}

/// What datagrams to an upstream's servers are sent from, by the servers' family.
#[derive(Clone, Debug)]
pub struct FamilySources {
    v4: Sources,
    v6: Sources,
}

impl FamilySources {
    /// For servers of IPv4, or of IPv6.
    pub(super) fn of(&self, v4: bool) -> &Sources {
        if v4 { &self.v4 } else { &self.v6 }
    }

    pub(super) fn both(&self) -> [&Sources; 2] {
        [&self.v4, &self.v6]
    }

    /// For servers of that family; `None` if only those of the other can be written to.
    pub(super) fn reaching(&self, v4: bool) -> Option<&Sources> {
        let same = self.of(v4);
        (same.are_given() || !self.of(!v4).are_given()).then_some(same)
    }
}

impl Upstream {
    /// Checks `source` and `source_port` by themselves.
    pub(super) fn sources(&self) -> Result<FamilySources, ConfigError> {
        let (mut known, mut given) = (HashSet::new(), Vec::new());
        for (index, source) in self.source.iter().copied().enumerate() {
            let is_new = known.insert(source.to_string());
            let earlier = given.iter().copied().find(|other| conflict(*other, source));
            let checked = match (source, earlier) {
                _ if !is_new => continue,
                (Source::Address(ip), _) if is_no_host(ip) => refuse(
                    format!("can't send from {ip}"),
                    "write an address of this host",
                ),
                (_, Some(other)) => refuse_both(other, source),
                (Source::Address(_), None) => Ok(()),
                (Source::Network(net), None) => check_network(net),
            };
            checked.within(key_path!["source", index])?;
            given.push(source);
        }
        if self.source_port.is_some() && !given.iter().any(|s| matches!(s, Source::Network(_))) {
            return refuse(
                "`source_port` of an upstream without a network in `source`",
                "add a network, as in source = [\"127.64.0.0/10\"], or leave `source_port` out: from single addresses, the kernel chooses each session's port",
            )
            .within(key_path!["source_port"]);
        }
        let port = self.source_port.map(|port| port.0);
        let of = |v4: bool| {
            let same = given.iter().filter(|source| source.is_ipv4() == v4);
            let mut addresses = Vec::new();
            for source in same {
                match *source {
                    Source::Address(ip) => addresses.push(ip),
                    Source::Network(network) => {
                        return Sources::Network(SourceNetwork { network, port });
                    }
                }
            }
            Sources::Addresses(Arc::from(addresses))
        };
        Ok(FamilySources {
            v4: of(true),
            v6: of(false),
        })
    }

    /// The place of this network in `source`.
    fn index_of(&self, network: IpNet) -> usize {
        let mut sources = self.source.iter();
        let found = sources.position(|source| *source == Source::Network(network));
        found.unwrap_or_default()
    }
}

/// Whether two sources of an upstream exclude each other: there is one network of a family,
/// or there are single addresses.
fn conflict(a: Source, b: Source) -> bool {
    let has_network = matches!(a, Source::Network(_)) || matches!(b, Source::Network(_));
    has_network && a.is_ipv4() == b.is_ipv4()
}

fn refuse_both(a: Source, b: Source) -> Result<(), ConfigError> {
    let family = if a.is_ipv4() { "IPv4" } else { "IPv6" };
    let (what, hint) = match (a, b) {
        (Source::Network(_), Source::Network(_)) => (
            format!("`source` has two {family} networks, {a} and {b}"),
            "give one network of each family; one with a shorter prefix has more addresses"
                .to_owned(),
        ),
        _ => (
            format!("`source` has both single addresses and a network of {family}: {a}, {b}"),
            format!(
                "give either for {family}: from a network each session gets an address, from single addresses a port"
            ),
        ),
    };
    refuse(what, hint)
}

fn check_network(net: IpNet) -> Result<(), ConfigError> {
    let overlaps = |other: &IpNet| other.contains(&net.addr()) || net.contains(&other.addr());
    for (unusable, what) in NO_SOURCES {
        let unusable: IpNet = unusable.parse().expect("it is a network");
        if overlaps(&unusable) {
            return refuse(
                format!("source network {net} has {what} ({unusable})"),
                "give a network of unicast addresses that nothing else has, such as 127.64.0.0/10 for servers on this host, or a /64 that is routed to it",
            );
        }
    }
    let longest = if net.addr().is_ipv4() {
        LONGEST_V4
    } else {
        LONGEST_V6
    };
    if net.prefix_len() > longest {
        let single = match net.prefix_len() == net.max_prefix_len() {
            true => format!(", or write {} to send from that address alone", net.addr()),
            false => String::new(),
        };
        return refuse(
            format!("source network {net} is too small to give each session an address"),
            format!("give a /{longest} or larger{single}"),
        );
    }
    Ok(())
}

/// A source network where a server that a listener uses has it.
struct InUse<'c> {
    listener: &'c Listener,
    mode: Mode,
    network: SourceNetwork,
}

impl InUse<'_> {
    /// The ports that workers send from, if they are fixed.
    fn ports(&self, workers: usize) -> Option<std::ops::RangeInclusive<usize>> {
        let first = usize::from(self.network.port?.get());
        Some(first..=first + workers - 1)
    }
}

impl Config {
    /// The source networks of servers that listeners use: once for each listener, mode and
    /// network.
    fn networks_in_use(&self) -> Vec<InUse<'_>> {
        let of_servers = self.served().filter_map(|(listener, server, mode)| {
            let network = server.sources.network()?;
            Some(InUse {
                listener,
                mode,
                network,
            })
        });
        let of_names = self.named().flat_map(|(listener, named, mode)| {
            let networks = named.sources.both().map(Sources::network);
            networks.into_iter().flatten().map(move |network| InUse {
                listener,
                mode,
                network,
            })
        });
        let mut all = Vec::new();
        let mut seen = HashSet::new();
        for one in of_servers.chain(of_names) {
            let key = (&one.listener.name, one.mode.name(), one.network);
            if seen.insert(key) {
                all.push(one);
            }
        }
        all
    }

    /// All source networks in use, each once, with a listener that uses it.
    #[must_use]
    pub fn source_networks(&self) -> Vec<(&Listener, SourceNetwork)> {
        let mut seen = HashSet::new();
        let all = self.networks_in_use().into_iter();
        let all = all.map(|in_use| (in_use.listener, in_use.network));
        all.filter(|(_, network)| seen.insert(*network)).collect()
    }

    /// The source networks of a listener's servers, each once.
    #[must_use]
    pub fn source_networks_of(&self, listener: &Listener) -> Vec<SourceNetwork> {
        let all = self.networks_in_use().into_iter();
        let of_it = all.filter(|in_use| in_use.listener.name == listener.name);
        let mut seen = HashSet::new();
        let networks = of_it.map(|in_use| in_use.network);
        networks.filter(|network| seen.insert(*network)).collect()
    }

    /// Whether a session may take a socket of its own, rather than an address of a source
    /// network, or nothing since its replies are tagged.
    #[must_use]
    pub fn uses_session_sockets(&self) -> bool {
        let by_tag = |server: &Server| matches!(server.replies, Replies::Tagged(_));
        let takes_one = |server: &Server| server.sources.network().is_none() && !by_tag(server);
        let by_name = |named: &Named| {
            let any = named.sources.both().iter().any(|s| s.network().is_none());
            any && !by_tag(&named.server)
        };
        self.served().any(|(_, server, _)| takes_one(server))
            || self.named().any(|(_, named, _)| by_name(named))
    }

    /// Checks source networks beside everything else: nothing but sessions may have their
    /// addresses, and they must have enough of them.
    pub(super) fn check_source_networks(&mut self, groups: &Groups<'_>) -> Result<(), ConfigError> {
        let (mut seen, mut warnings) = (HashSet::new(), Vec::new());
        for in_use in self.networks_in_use() {
            let upstream = in_use.listener.upstream.as_str();
            let network = in_use.network.network;
            let options = groups[upstream].options;
            let at = key_path!["upstream", upstream, "source", options.index_of(network)];
            check_mode(&in_use).within(at.clone())?;
            let at_port = key_path!["upstream", upstream, "source_port"];
            self.check_dont_fragment(&in_use).within(at_port.clone())?;
            if !seen.insert((upstream.to_owned(), network)) {
                continue;
            }
            self.refuse_overlap(upstream, network).within(at.clone())?;
            self.check_size(in_use.network).within(at)?;
            self.check_ports(&in_use).within(at_port)?;
            let repeats = !SourceAddresses::never_repeats(&in_use.network, self.worker_count());
            if let Some(port) = in_use.network.port.filter(|_| repeats) {
                warnings.push(format!(
                    "upstream `{upstream}`: source_port = {port} with source network {network}: after a restart, late replies to a former session can reach a new one that has its address; leave `source_port` out, or take a /64"
                ));
            }
        }
        let used: HashSet<_> = self.listeners.iter().map(|l| &*l.upstream).collect();
        for (name, group) in groups.iter().filter(|(name, _)| used.contains(**name)) {
            for source in &group.options.source {
                if let Source::Network(net) = source
                    && !seen.contains(&((*name).to_owned(), *net))
                {
                    warnings.push(format!(
                        "upstream `{name}`: source network {net} is not used: no server is of its family"
                    ));
                }
            }
        }
        self.warnings.extend(warnings);
        Ok(())
    }

    fn refuse_overlap(&self, upstream: &str, network: IpNet) -> Result<(), ConfigError> {
        let is_in = |ip: IpAddr| network.contains(&ip);
        let bound = self.listeners.iter().flat_map(|listener| {
            let addresses = listener.bind.iter();
            addresses.map(|address| {
                (
                    format!("listener `{}` at {address}", listener.name),
                    address,
                )
            })
        });
        let bound = bound.map(|(what, address)| (what, address.ip()));
        let admin = self
            .admin()
            .and_then(AdminAddress::ip)
            .map(|a| (format!("the admin address {a}"), a.ip()));
        let servers = self.servers.iter();
        let servers = servers.map(|s| (format!("server {}", s.shown_address()), s.address.0.ip()));
        let sources = self.sources().into_iter();
        let sources = sources.map(|ip| (format!("source address {ip}"), ip));
        let mut all = bound.chain(admin).chain(servers).chain(sources);
        let single = all.find(|(_, ip)| is_in(*ip)).map(|(what, _)| what);
        let others = self.networks_in_use();
        let other = others.iter().find_map(|other| {
            let (name, net) = (&other.listener.upstream, other.network.network);
            let overlaps = is_in(net.addr()) || net.contains(&network.addr());
            (name != upstream && overlaps)
                .then(|| format!("source network {net} of upstream `{name}`"))
        });
        match single.or(other) {
            None => Ok(()),
            Some(what) => refuse(
                format!("source network {network} overlaps with {what}"),
                "give each upstream a network whose addresses nothing else has",
            ),
        }
    }

    /// Each worker has an equal part of the addresses.
    fn check_size(&self, network: SourceNetwork) -> Result<(), ConfigError> {
        let workers = self.worker_count();
        let room = sessions_in(network, workers);
        let (wanted, set) = match self.limits.max_sessions {
            Some(most) => (*most, format!("limits.max_sessions is {}", *most)),
            None => (workers, format!("there are {workers} workers")),
        };
        if room >= wanted {
            return Ok(());
        }
        let net = network.network;
        let fits = |len: &u8| {
            let network = IpNet::new(net.addr(), *len).map(|network| network.trunc());
            let larger = network.map(|network| SourceNetwork {
                network,
                port: None,
            });
            larger.is_ok_and(|larger| sessions_in(larger, workers) >= wanted)
        };
        let prefix = (0..net.prefix_len()).rev().find(fits).unwrap_or_default();
        let or = match room {
            0 => String::new(),
            _ => format!(", or set limits.max_sessions to at most {room}"),
        };
        refuse(
            format!("source network {net} has addresses for {room} sessions, but {set}"),
            format!("give a /{prefix} or larger{or}"),
        )
    }

    /// Workers send from ports in a row, which nothing else of the proxy may have.
    fn check_ports(&self, in_use: &InUse<'_>) -> Result<(), ConfigError> {
        let workers = self.worker_count();
        let Some(ports) = in_use.ports(workers) else {
            return Ok(());
        };
        let most = usize::from(u16::MAX);
        if *ports.end() > most {
            return refuse(
                format!(
                    "source_port {} has too few ports after it for {workers} workers, each of which sends from one of its own",
                    ports.start()
                ),
                format!("give at most {}", most + 1 - workers),
            );
        }
        let v4 = in_use.network.network.addr().is_ipv4();
        let has = |port: u16| ports.contains(&usize::from(port));
        let taken = |bind: &&Bind| {
            let bound = bind.ports();
            bind.is_ipv4() == v4 && (bound.first..=bound.last).any(has)
        };
        for listener in &self.listeners {
            if let Some(address) = listener.bind.iter().find(taken) {
                return refuse(
                    format!(
                        "a worker would send from the port of listener `{}` at {address}: workers send from ports {} to {}",
                        listener.name,
                        ports.start(),
                        ports.end()
                    ),
                    "give a `source_port` whose ports no listener has",
                );
            }
        }
        let others = self.networks_in_use();
        let mut others = others.iter().filter(|other| {
            other.network.network.addr().is_ipv4() == v4
                && other.network.port != in_use.network.port
        });
        // Workers share the socket of equal ports.
        let other = others.find(|other| {
            let others = other.ports(workers);
            others.is_some_and(|p| p.contains(ports.start()) || p.contains(ports.end()))
        });
        match other {
            None => Ok(()),
            Some(other) => refuse(
                format!(
                    "two workers would send from one port: workers send from ports {} to {}, and for upstream `{}` from {} on",
                    ports.start(),
                    ports.end(),
                    other.listener.upstream,
                    other.network.port.map_or(0, NonZeroU16::get)
                ),
                format!(
                    "give both upstreams the same `source_port`, or ports that are {workers} apart"
                ),
            ),
        }
    }

    /// Whether datagrams may be fragmented belongs to a socket, and a fixed port has one in
    /// each worker.
    fn check_dont_fragment(&self, in_use: &InUse<'_>) -> Result<(), ConfigError> {
        let key = |of: &InUse<'_>| (of.network.network.addr().is_ipv4(), of.network.port);
        let others = self.networks_in_use();
        let differs = |other: &&InUse<'_>| {
            key(other) == key(in_use)
                && other.listener.dont_fragment != in_use.listener.dont_fragment
        };
        let Some(port) = in_use.network.port else {
            return Ok(());
        };
        match others.iter().find(differs) {
            None => Ok(()),
            Some(other) => refuse(
                format!(
                    "listeners `{}` and `{}` differ in `dont_fragment`, but their datagrams would leave from one socket, at port {port}",
                    in_use.listener.name, other.listener.name
                ),
                "set `dont_fragment` for both, or give them upstreams with a `source_port` of their own",
            ),
        }
    }
}

/// A session has an address of its own only where replies come to it.
fn check_mode(in_use: &InUse<'_>) -> Result<(), ConfigError> {
    let why = match in_use.mode {
        Mode::Ppv2 { .. } | Mode::Spp | Mode::Plain => return Ok(()),
        mode if mode.spoofs() => "sends from clients' addresses",
        Mode::Transparent { .. } | Mode::Dsr(_) => "takes no replies",
    };
    refuse(
        format!(
            "source network {} for mode {}, which {why} (listener `{}`)",
            in_use.network.network,
            in_use.mode.name(),
            in_use.listener.name
        ),
        "give single addresses, which health checks are then sent from, or leave `source` out",
    )
}

/// How many sessions a network has addresses for: each worker has an equal part.
pub(crate) fn sessions_in(network: SourceNetwork, workers: usize) -> usize {
    let workers = workers.max(1);
    let share = usize::try_from(network.session_addresses()).unwrap_or(usize::MAX) / workers;
    share.saturating_mul(workers)
}

impl Server {
    /// The address that health checks are sent from; `None` for the kernel's choice.
    #[must_use]
    pub fn probe_source(&self) -> Option<IpAddr> {
        match &self.sources {
            Sources::Addresses(addresses) => addresses.first().copied(),
            Sources::Network(network) => Some(network.probe_address()),
        }
    }
}
