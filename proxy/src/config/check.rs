//! What values mean, and which can't be: the one place where a configuration is
//! checked.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
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

/// More workers than any machine has cores; catches a typing error.
const MAX_WORKERS: usize = 1024;

/// Turns raw values into valid ones. Knows the file, to show errors in it.
pub(super) struct Checker<'a> {
    file: Option<(&'a str, &'a str)>,
    warnings: Vec<String>,
    servers: Vec<Server>,
    pace: Pace,
}

/// An upstream whose servers have got their numbers.
struct NumberedUpstream {
    servers: Vec<(usize, Option<At<String>>)>,
    emit: Emit,
    crc32c: bool,
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
            if used.contains(&name) {
                let numbered = self.upstream(&name, upstream)?;
                upstreams.insert(name, numbered);
            } else {
                self.warnings
                    .push(format!("upstream `{name}` is used by no listener"));
            }
        }
        let mut listeners: Vec<Listener> = Vec::new();
        for listener in file.listener {
            self.add_pace(listener.get_ref())?;
            let listener = self.listener(listener, &upstreams, &listeners)?;
            listeners.push(listener);
        }
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
        &self,
        listener: At<file::Listener>,
        upstreams: &BTreeMap<String, NumberedUpstream>,
        others: &[Listener],
    ) -> Result<Listener, ConfigError> {
        let span = listener.span();
        let listener = listener.into_inner();
        let name = match &listener.name {
            Some(name) => name.get_ref().clone(),
            None => format!("listener{}", others.len() + 1),
        };
        if others.iter().any(|other| other.name == name) {
            let span = listener.name.map_or(span, |name| name.span());
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
        let mut servers = Vec::new();
        for (number, mode) in &upstream.servers {
            self.refuse_loop(listener.bind.span(), &bind, *number)?;
            let mode = match mode {
                Some(_) => self.mode(mode.as_ref(), upstream)?,
                None => default_mode,
            };
            servers.push((*number, mode));
        }
        let idle_timeout = listener
            .idle_timeout
            .unwrap_or_else(|| nowhere(DEFAULT_IDLE_TIMEOUT.to_owned()));
        Ok(Listener {
            name,
            bind,
            upstream: listener.upstream.into_inner(),
            servers,
            rules: Rules {
                idle_timeout: self.duration("idle_timeout", &idle_timeout)?,
                responses: listener.responses,
                requests: listener.requests,
            },
            allow: self.networks(listener.allow)?,
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
            let ip = address.ip();
            if ip.is_multicast() || ip == IpAddr::from([255; 4]) {
                return Err(self
                    .error(value.span(), format!("can't listen on {address}"))
                    .mend("give an address of this host, or a wildcard: 0.0.0.0, [::]"));
            }
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

    fn upstream(
        &mut self,
        name: &str,
        upstream: At<file::Upstream>,
    ) -> Result<NumberedUpstream, ConfigError> {
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
        let mut servers = Vec::new();
        for server in upstream.servers {
            let span = server.span();
            let server = server.into_inner();
            let address = self.resolve(span.clone(), &server.address)?;
            let duplicate = self
                .servers
                .iter()
                .any(|known| known.upstream == name && known.address == address);
            if duplicate {
                return Err(self
                    .error(span, format!("{address} is twice in upstream `{name}`"))
                    .mend("name each server once"));
            }
            let sources = self.sources_for(&span, address, &upstream.source)?;
            servers.push((self.servers.len(), server.mode));
            self.servers.push(Server {
                upstream: name.to_owned(),
                name: server.address,
                address,
                sources,
            });
        }
        Ok(NumberedUpstream {
            servers,
            emit,
            crc32c: upstream.header.crc32c,
        })
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
        upstream: &NumberedUpstream,
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
        Ok(address)
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
        addresses
            .next()
            .map(ServerAddr)
            .ok_or_else(|| error(format!("server `{text}` resolves to nothing")).mend(mend))
    }

    fn refuse_loop(
        &self,
        span: Range<usize>,
        bind: &[SocketAddr],
        server: usize,
    ) -> Result<(), ConfigError> {
        let server = &self.servers[server];
        let to_itself = bind.iter().find(|bound| {
            let wildcard_loop = bound.ip().is_unspecified() && server.address.0.ip().is_loopback();
            bound.port() == server.address.0.port()
                && bound.is_ipv4() == server.address.0.is_ipv4()
                && (bound.ip() == server.address.0.ip() || wildcard_loop)
        });
        match to_itself {
            None => Ok(()),
            Some(bound) => Err(self
                .error(
                    span,
                    format!(
                        "server `{}` is the listener's own address {bound}: datagrams would go round for ever",
                        server.name
                    ),
                )
                .mend("give the listener or the server another port or address")),
        }
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
            let single = || text.parse::<IpAddr>().map(IpNet::from);
            text.parse().or_else(|_| single()).map_err(|_| {
                self.error(value.span(), format!("`{text}` is not a network"))
                    .mend("write it as 192.0.2.0/24 or 2001:db8::/32")
            })
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

fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    let covers = |a: SocketAddr, b: SocketAddr| a.ip() == b.ip() || a.ip().is_unspecified();
    a.port() == b.port() && a.is_ipv4() == b.is_ipv4() && (covers(a, b) || covers(b, a))
}
