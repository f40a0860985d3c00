//! What values mean, and which can't be: the one place where a configuration is
//! checked.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, SocketAddrV6, ToSocketAddrs};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use super::error::nearest;
use super::file::{self, At, File};
use super::{Config, ConfigError, Listener, Server, nowhere};
use crate::address::ServerAddr;
use crate::mode::{Emit, Mode};
use crate::session::Rules;
use crate::worker::Pace;

const DEFAULT_IDLE_TIMEOUT: &str = "30s";
const DEFAULT_DRAIN_TIMEOUT: &str = "5s";

/// The longest that a worker may look for datagrams, or let them gather.
const MAX_PAUSE: Duration = Duration::from_millis(10);

/// The shortest that a session may be idle for. Sessions end on a wheel of this
/// order, and a reply that takes longer than the time given is dropped.
const MIN_IDLE_TIMEOUT: Duration = Duration::from_millis(50);

/// More workers than any machine has cores; catches a typing error.
const MAX_WORKERS: usize = 1024;

/// Turns raw values into valid ones. Knows the file, to show errors in it.
pub(super) struct Checker<'a> {
    file: Option<(&'a str, &'a str)>,
    warnings: Vec<String>,
    servers: Vec<Server>,
    pace: Pace,
}

/// A valid upstream. Its servers have numbers only if a listener uses it.
struct CheckedUpstream {
    servers: Vec<CheckedServer>,
    emit: Emit,
    crc32c: bool,
}

struct CheckedServer {
    number: usize,
    /// Where it stands in the file.
    span: Range<usize>,
    /// Its own mode, rather than the listener's.
    mode: Option<Mode>,
}

impl<'a> Checker<'a> {
    pub(super) fn new(file: Option<(&'a str, &'a str)>) -> Self {
        Self {
            file,
            warnings: Vec::new(),
            servers: Vec::new(),
            pace: Pace::default(),
        }
    }

    fn error(&self, span: Range<usize>, message: impl Into<String>) -> ConfigError {
        let error = ConfigError::new(message);
        match self.file {
            Some((name, content)) => error.at(name, content, span),
            None => error,
        }
    }

    pub(super) fn config(mut self, file: File) -> Result<Config, ConfigError> {
        if file.listener.is_empty() {
            return Err(self
                .error(0..0, "no listener")
                .mend("add a [[listener]] with `bind` and `upstream`"));
        }
        let used: BTreeSet<String> = file
            .listener
            .iter()
            .map(|listener| listener.get_ref().upstream.get_ref().clone())
            .collect();
        let mut upstreams = BTreeMap::new();
        for (name, upstream) in file.upstream {
            let (checked, servers) = self.upstream(&name, upstream)?;
            if used.contains(&name) {
                self.servers.extend(servers);
            } else {
                self.warnings
                    .push(format!("upstream `{name}` is used by no listener"));
            }
            upstreams.insert(name, checked);
        }
        let mut listeners: Vec<Listener> = Vec::new();
        for listener in file.listener {
            self.add_pace(listener.get_ref())?;
            let listener = self.listener(listener, &upstreams, &listeners)?;
            listeners.push(listener);
        }
        self.refuse_loops(&listeners, &upstreams)?;
        let admin = file
            .admin
            .map(|admin| self.address("admin address", &admin.listen))
            .transpose()?;
        let drain_timeout = match file.drain_timeout {
            Some(value) => self.duration("drain_timeout", &value)?,
            None => self.duration("drain_timeout", &nowhere(DEFAULT_DRAIN_TIMEOUT.to_owned()))?,
        };
        Ok(Config {
            workers: self.count("workers", file.workers, MAX_WORKERS)?,
            drain_timeout,
            max_sessions: self.count(
                "max_sessions",
                file.limits.max_sessions,
                u32::MAX as usize,
            )?,
            admin,
            pace: self.pace,
            listeners,
            servers: self.servers,
            warnings: self.warnings,
        })
    }

    fn listener(
        &mut self,
        listener: At<file::Listener>,
        upstreams: &BTreeMap<String, CheckedUpstream>,
        others: &[Listener],
    ) -> Result<Listener, ConfigError> {
        let span = listener.span();
        let listener = listener.into_inner();
        let name = match &listener.name {
            Some(name) => name.get_ref().clone(),
            None => format!("listener{}", others.len() + 1),
        };
        let span = listener.name.map_or(span, |name| name.span());
        if name.trim().is_empty() {
            return Err(self
                .error(span, format!("a listener's name is \"{name}\""))
                .mend("give it one that logs and metrics can show, or leave `name` out"));
        }
        if others.iter().any(|other| other.name == name) {
            return Err(self
                .error(span, format!("a second listener named `{name}`"))
                .mend("give each listener a `name` of its own: metrics tell them apart by it"));
        }
        let upstream = upstreams.get(listener.upstream.get_ref()).ok_or_else(|| {
            let wanted = listener.upstream.get_ref();
            let mend = match nearest(wanted, upstreams.keys().map(String::as_str)) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("add an [upstream.{wanted}] with `servers`"),
            };
            self.error(
                listener.upstream.span(),
                format!("there is no upstream `{wanted}`"),
            )
            .mend(mend)
        })?;
        let bind = self.bind(&listener.bind, others)?;
        let default_mode = self.mode(listener.mode.as_ref(), upstream)?;
        let servers = upstream.servers.iter();
        let servers = servers.map(|server| (server.number, server.mode.unwrap_or(default_mode)));
        let idle_timeout = listener
            .idle_timeout
            .unwrap_or_else(|| nowhere(DEFAULT_IDLE_TIMEOUT.to_owned()));
        let allow = self.networks(listener.allow)?;
        for address in &bind {
            if !allow
                .iter()
                .any(|net| net.addr().is_ipv4() == address.is_ipv4())
            {
                let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
                self.warnings.push(format!(
                    "listener `{name}`: no client of {address} can be served: `allow` has no {family} network"
                ));
            }
        }
        Ok(Listener {
            name,
            bind,
            upstream: listener.upstream.into_inner(),
            servers: servers.collect(),
            rules: Rules {
                idle_timeout: self.idle_timeout(&idle_timeout)?,
                responses: listener.responses,
                requests: listener.requests,
            },
            allow,
            dont_fragment: listener.df,
            dscp: listener.dscp,
        })
    }

    fn add_pace(&mut self, listener: &file::Listener) -> Result<(), ConfigError> {
        if let Some(busy_poll) = &listener.busy_poll {
            let asked = self.pause("busy_poll", busy_poll)?;
            self.pace.busy_poll = self.pace.busy_poll.max(asked);
        }
        if let Some(coalesce) = &listener.coalesce {
            let asked = self.pause("coalesce", coalesce)?;
            self.pace.coalesce = self.pace.coalesce.max(asked);
        }
        Ok(())
    }

    /// A pause of a worker: 0 for none, and never so long that clients notice.
    fn pause(&self, key: &str, value: &At<String>) -> Result<Duration, ConfigError> {
        let text = value.get_ref();
        match humantime::parse_duration(text) {
            Ok(pause) if pause <= MAX_PAUSE => Ok(pause),
            _ => Err(self
                .error(value.span(), format!("{key} is `{text}`"))
                .mend("give a duration from \"0us\" to \"10ms\", such as \"50us\"")),
        }
    }

    fn bind(
        &self,
        bind: &At<Vec<At<String>>>,
        others: &[Listener],
    ) -> Result<Vec<SocketAddr>, ConfigError> {
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for value in bind.get_ref() {
            let address = self.address("listener address", value)?;
            let taken = others.iter().flat_map(|other| &other.bind);
            if let Some(other) = taken.chain(&addresses).find(|a| overlap(**a, address)) {
                return Err(self
                    .error(value.span(), format!("{address} overlaps with {other}"))
                    .mend("bind each address once; a wildcard covers all of its family"));
            }
            addresses.push(address);
        }
        if addresses.is_empty() {
            return Err(self
                .error(bind.span(), "a listener without an address")
                .mend("give at least one, as in \"0.0.0.0:53\" or \"[::]:53\""));
        }
        Ok(addresses)
    }

    /// Checks an upstream; the servers that come with it have their numbers if
    /// they are added to those that there are.
    fn upstream(
        &self,
        name: &str,
        upstream: At<file::Upstream>,
    ) -> Result<(CheckedUpstream, Vec<Server>), ConfigError> {
        let span = upstream.span();
        let upstream = upstream.into_inner();
        if let Some(balance) = &upstream.balance
            && balance.get_ref() != "round_robin"
        {
            return Err(self.unknown_value("balance", balance, &["round_robin"]));
        }
        let emit = match &upstream.header.emit {
            None => Emit::Every,
            Some(emit) => match emit.get_ref().as_str() {
                "every" => Emit::Every,
                "first" => Emit::First,
                _ => return Err(self.unknown_value("emit", emit, &["every", "first"])),
            },
        };
        if upstream.servers.is_empty() {
            return Err(self
                .error(span, format!("upstream `{name}` has no servers"))
                .mend("give at least one, as in servers = [\"192.0.2.10:53\"]"));
        }
        let mut checked = CheckedUpstream {
            servers: Vec::new(),
            emit,
            crc32c: upstream.header.crc32c,
        };
        let mut servers: Vec<Server> = Vec::new();
        for server in upstream.servers {
            let span = server.span();
            let server = server.into_inner();
            let address = self.resolve(span.clone(), &server.address)?;
            if servers.iter().any(|known| known.address == address) {
                return Err(self
                    .error(span, format!("{address} is twice in upstream `{name}`"))
                    .mend("name each server once"));
            }
            let mode = match &server.mode {
                Some(mode) => Some(self.mode(Some(mode), &checked)?),
                None => None,
            };
            let sources = self.sources_for(&span, address, &upstream.source)?;
            checked.servers.push(CheckedServer {
                number: self.servers.len() + servers.len(),
                span,
                mode,
            });
            servers.push(Server {
                upstream: name.to_owned(),
                name: server.address,
                address,
                sources,
            });
        }
        Ok((checked, servers))
    }

    /// The source addresses that can reach a server: those of its family.
    fn sources_for(
        &self,
        server: &Range<usize>,
        address: ServerAddr,
        sources: &[At<String>],
    ) -> Result<Arc<[IpAddr]>, ConfigError> {
        let mut usable = Vec::new();
        for source in sources {
            let text = source.get_ref();
            let ip: IpAddr = text.parse().map_err(|_| {
                self.error(
                    source.span(),
                    format!("source `{text}` is not an IP address"),
                )
                .mend("write an address of this host, without a port")
            })?;
            let ip = ip.to_canonical();
            if ip.is_unspecified() || ip.is_multicast() {
                return Err(self
                    .error(source.span(), format!("can't send from {ip}"))
                    .mend("write an address of this host"));
            }
            if ip.is_ipv4() == address.0.is_ipv4() && !usable.contains(&ip) {
                usable.push(ip);
            }
        }
        if usable.is_empty() && !sources.is_empty() {
            return Err(self
                .error(
                    server.clone(),
                    format!("no source address can reach {address}"),
                )
                .mend("add one of its family to `source`"));
        }
        Ok(usable.into())
    }

    fn mode(
        &self,
        mode: Option<&At<String>>,
        upstream: &CheckedUpstream,
    ) -> Result<Mode, ConfigError> {
        let ppv2 = Mode::Ppv2 {
            emit: upstream.emit,
            crc32c: upstream.crc32c,
        };
        let Some(mode) = mode else {
            return Ok(ppv2);
        };
        match mode.get_ref().as_str() {
            "ppv2" => Ok(ppv2),
            "plain" => Ok(Mode::Plain),
            _ => Err(self.unknown_value("mode", mode, &["ppv2", "plain"])),
        }
    }

    fn unknown_value(&self, key: &str, value: &At<String>, known: &[&str]) -> ConfigError {
        let message = format!("{key} `{}` is not known", value.get_ref());
        let mend = format!("this version knows {}", known.join(", "));
        self.error(value.span(), message).mend(mend)
    }

    fn address(&self, what: &str, value: &At<String>) -> Result<SocketAddr, ConfigError> {
        let text = value.get_ref();
        let address: SocketAddr = text.parse().map_err(|_| {
            self.error(
                value.span(),
                format!("{what} `{text}` is not an IP address with a port"),
            )
            .mend("write it as 192.0.2.1:53, [2001:db8::1]:53, 0.0.0.0:53 or [::]:53")
        })?;
        if address.port() == 0 {
            return Err(self
                .error(value.span(), format!("{what} `{text}` has port 0"))
                .mend("name the port: clients could not know one that the kernel chose"));
        }
        let plain = canonical(address);
        if plain.is_ipv4() != address.is_ipv4() {
            return Err(self
                .error(
                    value.span(),
                    format!("{what} `{text}` is IPv4 written as IPv6"),
                )
                .mend(format!("write it as {plain}")));
        }
        if is_group(plain.ip()) {
            return Err(self
                .error(value.span(), format!("can't listen on {plain}"))
                .mend("give an address of this host, or a wildcard: 0.0.0.0, [::]"));
        }
        self.require_scope(value.span(), &format!("{what} `{text}`"), plain)?;
        Ok(plain)
    }

    /// Refuses a link-local address that doesn't say of which interface.
    fn require_scope(
        &self,
        span: Range<usize>,
        what: &str,
        address: SocketAddr,
    ) -> Result<(), ConfigError> {
        if !is_link_local(address.ip()) || scope(address) != 0 {
            return Ok(());
        }
        let mend = format!(
            "add the interface's number (ip link shows it), as in [{}%2]:{}",
            address.ip(),
            address.port()
        );
        Err(self
            .error(span, format!("{what} is link-local and names no interface"))
            .mend(mend))
    }

    fn resolve(&self, span: Range<usize>, text: &str) -> Result<ServerAddr, ConfigError> {
        let mend = "write it as 192.0.2.10:53, [2001:db8::10]:53 or host.example:53";
        let error = |message: String| self.error(span.clone(), message);
        let port = text.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
        if !matches!(port, Some(Ok(_))) {
            return Err(error(format!("server `{text}` has no port")).mend(mend));
        }
        if let Some(Ok(0)) = port {
            return Err(error(format!("server `{text}` has port 0"))
                .mend("name the port that the server listens on"));
        }
        let mut addresses = text.to_socket_addrs().map_err(|cause| {
            error(format!("server `{text}` does not resolve: {cause}"))
                .mend("check the name and this host's resolver, or write the IP address")
        })?;
        let address = addresses
            .next()
            .map(canonical)
            .ok_or_else(|| error(format!("server `{text}` resolves to nothing")).mend(mend))?;
        let ip = address.ip();
        if ip.is_unspecified() || is_group(ip) {
            return Err(
                error(format!("server `{text}`: {ip} is the address of no server"))
                    .mend("write the address that the server itself has, such as 127.0.0.1"),
            );
        }
        self.require_scope(span.clone(), &format!("server `{text}`"), address)?;
        Ok(ServerAddr(address))
    }

    /// Refuses servers that are listeners: what goes there comes back to this
    /// proxy, by one listener or several.
    fn refuse_loops(
        &self,
        listeners: &[Listener],
        upstreams: &BTreeMap<String, CheckedUpstream>,
    ) -> Result<(), ConfigError> {
        let own = own_addresses();
        let is_own = |ip: IpAddr, scope: u32| {
            let same = |(own, index): &(IpAddr, Option<u32>)| {
                let on_it = !is_link_local(ip) || index.is_none_or(|index| index == scope);
                *own == ip && on_it
            };
            ip.is_loopback() || own.iter().any(same)
        };
        let used = listeners.iter().map(|listener| &listener.upstream);
        for listed in used
            .filter_map(|name| upstreams.get(name))
            .flat_map(|u| &u.servers)
        {
            let server = &self.servers[listed.number];
            let address = server.address.0;
            let arrives = |bound: SocketAddr| {
                let wildcard = bound.ip().is_unspecified();
                covers(bound, address) && (!wildcard || is_own(address.ip(), scope(address)))
            };
            for listener in listeners {
                if let Some(bound) = listener.bind.iter().find(|bound| arrives(**bound)) {
                    let message = format!(
                        "server `{}` is listener `{}` at {bound}, this proxy's own address: datagrams would go round",
                        server.name, listener.name
                    );
                    return Err(self
                        .error(listed.span.clone(), message)
                        .mend("give the listener or the server another port or address"));
                }
            }
        }
        Ok(())
    }

    fn networks(&self, allow: Option<At<Vec<At<String>>>>) -> Result<Vec<IpNet>, ConfigError> {
        let Some(allow) = allow else {
            return Ok(vec![
                IpNet::new_assert(IpAddr::from([0; 4]), 0),
                IpNet::new_assert(IpAddr::from([0u16; 8]), 0),
            ]);
        };
        if allow.get_ref().is_empty() {
            return Err(self
                .error(allow.span(), "an empty `allow` lets no client in")
                .mend("list networks, or leave the key out to allow everybody"));
        }
        let parse = |value: &At<String>| {
            let text = value.get_ref();
            let error = |message: String| self.error(value.span(), message);
            let single = || text.parse::<IpAddr>().map(IpNet::from);
            let net: IpNet = text.parse().or_else(|_| single()).map_err(|_| {
                error(format!("`{text}` is not a network"))
                    .mend("write it as 192.0.2.0/24 or 2001:db8::/32")
            })?;
            if let Some(v4) = mapped(net) {
                return Err(error(format!("`{text}` is IPv4 written as IPv6"))
                    .mend(format!("write it as {}", v4.trunc())));
            }
            if net != net.trunc() {
                let one = IpNet::from(net.addr());
                return Err(
                    error(format!("`{text}` is an address within a network")).mend(format!(
                        "the network is {}, that address alone {one}",
                        net.trunc()
                    )),
                );
            }
            Ok(net)
        };
        allow.get_ref().iter().map(parse).collect()
    }

    fn duration(&self, key: &str, value: &At<String>) -> Result<Duration, ConfigError> {
        let text = value.get_ref();
        let error = |message: String| {
            self.error(value.span(), message)
                .mend("write it as \"30s\", \"500ms\" or \"2m\"")
        };
        let duration = humantime::parse_duration(text)
            .map_err(|cause| error(format!("{key} `{text}` is not a duration: {cause}")))?;
        if duration.is_zero() {
            return Err(error(format!("{key} must not be 0")));
        }
        if duration > Duration::from_secs(7 * 24 * 3600) {
            return Err(error(format!("{key} `{text}` is more than a week")));
        }
        Ok(duration)
    }

    fn idle_timeout(&self, value: &At<String>) -> Result<Duration, ConfigError> {
        let duration = self.duration("idle_timeout", value)?;
        if duration < MIN_IDLE_TIMEOUT {
            let text = value.get_ref();
            return Err(self
                .error(value.span(), format!("idle_timeout `{text}` is too short"))
                .mend("give at least \"50ms\", and more than the servers take to answer"));
        }
        Ok(duration)
    }

    fn count(
        &self,
        key: &str,
        value: Option<At<usize>>,
        max: usize,
    ) -> Result<Option<usize>, ConfigError> {
        let Some(value) = value else {
            return Ok(None);
        };
        let number = *value.get_ref();
        if (1..=max).contains(&number) {
            return Ok(Some(number));
        }
        Err(self
            .error(value.span(), format!("{key} is {number}"))
            .mend(format!("give a number from 1 to {max}, or leave it out")))
    }
}

/// Addresses of this host's interfaces, with the interface's number. None are
/// known where the kernel doesn't tell; loopback is recognised without them.
fn own_addresses() -> Vec<(IpAddr, Option<u32>)> {
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    let address = |interface: &if_addrs::Interface| (interface.ip(), interface.index);
    interfaces.iter().map(address).collect()
}

/// Whether a datagram to `b` arrives at a socket bound to `a`.
fn covers(a: SocketAddr, b: SocketAddr) -> bool {
    let same = a.ip() == b.ip() && scope(a) == scope(b);
    a.port() == b.port() && a.is_ipv4() == b.is_ipv4() && (same || a.ip().is_unspecified())
}

fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    covers(a, b) || covers(b, a)
}

/// The number of the interface, 0 where the address needs none.
fn scope(address: SocketAddr) -> u32 {
    match address {
        SocketAddr::V4(_) => 0,
        SocketAddr::V6(address) => address.scope_id(),
    }
}

/// The one way to write an address: IPv4 as such, and the number of an interface
/// only where it tells addresses apart.
fn canonical(address: SocketAddr) -> SocketAddr {
    let scope = if is_link_local(address.ip()) {
        scope(address)
    } else {
        0
    };
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => SocketAddr::from((ip, address.port())),
        IpAddr::V6(ip) => SocketAddrV6::new(ip, address.port(), 0, scope).into(),
    }
}

fn is_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

/// No single host's.
fn is_group(ip: IpAddr) -> bool {
    ip.is_multicast() || ip == IpAddr::from([255; 4])
}

/// An IPv4 network in IPv6 clothes, undressed.
fn mapped(net: IpNet) -> Option<IpNet> {
    let ip = net.addr();
    let len = net.prefix_len().checked_sub(128 - 32)?;
    match ip.to_canonical() {
        v4 if v4 != ip => IpNet::new(v4, len).ok(),
        _ => None,
    }
}
