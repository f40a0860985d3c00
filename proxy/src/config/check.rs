//! What values mean, and which can't be: the one place where a configuration is
//! checked.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;

use super::error::nearest;
use super::expand::of_family;
use super::file::{self, At, File};
use super::loops::Bound;
use super::modes::{Wanted, Whole};
use super::{Config, ConfigError, Listener, Name, Named, Server, nowhere};
use ppv2_engine::address::{ServerAddr, is_no_host};
use ppv2_engine::mode::{Emit, Mode};
use ppv2_engine::session::Rules;
use ppv2_engine::upstream::Balance;
use ppv2_engine::worker::Pace;

const DEFAULT_IDLE_TIMEOUT: &str = "30s";
const DEFAULT_DRAIN_TIMEOUT: &str = "5s";
const DEFAULT_LAME_DUCK: &str = "30s";

/// More workers than any machine has cores; catches a typing error.
const MAX_WORKERS: usize = 1024;

/// Turns raw values into valid ones. Knows the file, to show errors in it.
pub(super) struct Checker<'a> {
    file: Option<(&'a str, &'a str)>,
    pub(super) warnings: Vec<String>,
    pub(super) servers: Vec<Server>,
    /// Servers that a listener writes to from clients' addresses, with the first
    /// that does and its mode.
    pub(super) spoofed: BTreeMap<SocketAddr, (String, Mode)>,
    names: Vec<Named>,
    pace: Pace,
}

/// A valid upstream. Its servers and names have numbers only if a listener uses it.
pub(super) struct CheckedUpstream {
    pub(super) servers: Vec<CheckedServer>,
    pub(super) names: Vec<CheckedName>,
    balance: Balance,
    returns: bool,
    pub(super) emit: Emit,
    pub(super) crc32c: bool,
}

pub(super) struct CheckedServer {
    pub(super) number: usize,
    pub(super) address: ServerAddr,
    /// Where it stands in the file.
    pub(super) span: Range<usize>,
    /// Its own mode, rather than the listener's.
    mode: Option<Mode>,
}

pub(super) struct CheckedName {
    number: usize,
    pub(super) name: Name,
    /// Where it stands in the file.
    pub(super) span: Range<usize>,
    /// Its own mode, rather than the listener's.
    mode: Option<Mode>,
}

/// The listeners that have been checked, with the one that is being checked last.
#[derive(Default)]
struct Others {
    names: HashSet<String>,
    bound: Bound,
}

/// An upstream's `source` addresses, which all its servers share.
struct Sources {
    all: Arc<[IpAddr]>,
    v4: Arc<[IpAddr]>,
    v6: Arc<[IpAddr]>,
}

/// What an upstream adds to the configuration if a listener uses it.
#[derive(Default)]
struct Members {
    servers: Vec<Server>,
    names: Vec<Named>,
}

impl<'a> Checker<'a> {
    pub(super) fn new(file: Option<(&'a str, &'a str)>) -> Self {
        Self {
            file,
            warnings: Vec::new(),
            servers: Vec::new(),
            spoofed: BTreeMap::new(),
            names: Vec::new(),
            pace: Pace::default(),
        }
    }

    pub(super) fn error(&self, span: Range<usize>, message: impl Into<String>) -> ConfigError {
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
            let (checked, members) = self.upstream(&name, upstream)?;
            if used.contains(&name) {
                self.servers.extend(members.servers);
                self.names.extend(members.names);
            } else {
                self.warnings
                    .push(format!("upstream `{name}` is used by no listener"));
            }
            upstreams.insert(name, checked);
        }
        let mut listeners: Vec<Listener> = Vec::new();
        let mut others = Others::default();
        for listener in file.listener {
            self.add_pace(listener.get_ref())?;
            let listener = self.listener(listener, &upstreams, &mut others)?;
            listeners.push(listener);
        }
        self.refuse_loops(&self.servers, &listeners, &others.bound, &upstreams)?;
        self.require_sources(&listeners, &upstreams)?;
        let peers = self.peers(file.peers, &listeners)?;
        let admin = file
            .admin
            .map(|admin| self.address("admin address", &admin.listen))
            .transpose()?;
        let drain_timeout = match file.drain_timeout {
            Some(value) => self.duration("drain_timeout", &value)?,
            None => self.duration("drain_timeout", &nowhere(DEFAULT_DRAIN_TIMEOUT.to_owned()))?,
        };
        let sets_resolver = file.resolver.is_some();
        let resolver = self.resolver(file.resolver)?;
        if sets_resolver && self.names.is_empty() {
            self.warnings.push(
                "[resolver] changes nothing: no server is written as dns: or srv:".to_owned(),
            );
        }
        let reuse_port = file.reuse_port.is_none_or(At::into_inner);
        Ok(Config {
            user: file.user.map(At::into_inner),
            workers: self.count("workers", file.workers, MAX_WORKERS)?,
            drain_timeout,
            reuse_port,
            peers,
            access_log: self.access_log(file.access_log)?,
            max_sessions: self.count(
                "max_sessions",
                file.limits.max_sessions,
                u32::MAX as usize,
            )?,
            admin,
            pace: self.pace,
            listeners,
            servers: self.servers,
            names: self.names,
            resolver,
            warnings: self.warnings,
        })
    }

    fn listener(
        &mut self,
        listener: At<file::Listener>,
        upstreams: &BTreeMap<String, CheckedUpstream>,
        others: &mut Others,
    ) -> Result<Listener, ConfigError> {
        let span = listener.span();
        let listener = listener.into_inner();
        let name = match &listener.name {
            Some(name) => name.get_ref().clone(),
            None => format!("listener{}", others.names.len() + 1),
        };
        let span = listener.name.as_ref().map_or(span, At::span);
        self.refuse_hidden("listener", &span, &name)?;
        if name.trim().is_empty() {
            return Err(self
                .error(span, format!("a listener's name is \"{name}\""))
                .mend("give it one that logs and metrics can show, or leave `name` out"));
        }
        if !others.names.insert(name.clone()) {
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
        let default_mode = self.mode(&Wanted::by_listener(&listener), upstream)?;
        let servers = upstream.servers.iter();
        let servers = servers.map(|server| (server.number, server.mode.unwrap_or(default_mode)));
        let names = upstream.names.iter();
        let names = names.map(|named| (named.number, named.mode.unwrap_or(default_mode)));
        let idle_timeout = listener
            .idle_timeout
            .unwrap_or_else(|| nowhere(DEFAULT_IDLE_TIMEOUT.to_owned()));
        let allow = self.networks("allow", listener.allow)?;
        let allows = |v4: bool| allow.iter().any(|net| net.addr().is_ipv4() == v4);
        let (allows_v4, allows_v6) = (allows(true), allows(false));
        for address in &bind {
            if !(if address.is_ipv4() {
                allows_v4
            } else {
                allows_v6
            }) {
                let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
                self.warnings.push(format!(
                    "listener `{name}`: no client of {address} can be served: `allow` has no {family} network"
                ));
            }
        }
        let servers: Vec<_> = servers.collect();
        let names: Vec<_> = names.collect();
        let whole = Whole {
            name: &name,
            bind: (&bind, listener.bind.span()),
            names: &names,
            responses: listener.responses,
            requests: listener.requests,
            amplification: listener.amplification.is_some(),
            span,
        };
        self.check_modes(&whole, &servers, upstream)?;
        Ok(Listener {
            name,
            bind,
            upstream: listener.upstream.into_inner(),
            servers,
            leaving: Vec::new(),
            names,
            balance: upstream.balance,
            returns: upstream.returns,
            rules: Rules {
                idle_timeout: self.idle_timeout(&idle_timeout)?,
                responses: listener.responses,
                requests: listener.requests,
                amplification: self.amplification(listener.amplification)?,
            },
            allow,
            deny: match listener.deny {
                Some(deny) if !deny.get_ref().is_empty() => self.networks("deny", Some(deny))?,
                _ => Vec::new(),
            },
            per_client: self.per_client(listener.per_client)?,
            dont_fragment: listener.df,
            dscp: listener.dscp,
            freebind: listener.freebind,
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

    fn bind(
        &self,
        bind: &At<Vec<At<String>>>,
        others: &mut Others,
    ) -> Result<Vec<SocketAddr>, ConfigError> {
        let number = others.names.len() - 1;
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for value in bind.get_ref() {
            let address = self.address("listener address", value)?;
            others.bound.add(address, number).map_err(|other| {
                self.error(value.span(), format!("{address} overlaps with {other}"))
                    .mend("bind each address once; a wildcard covers all of its family")
            })?;
            addresses.push(address);
        }
        if addresses.is_empty() {
            return Err(self
                .error(bind.span(), "a listener without an address")
                .mend("give at least one, as in \"0.0.0.0:53\" or \"[::]:53\""));
        }
        Ok(addresses)
    }

    /// Checks an upstream; the members that come with it have their numbers if
    /// they are added to those that there are.
    fn upstream(
        &mut self,
        name: &str,
        upstream: At<file::Upstream>,
    ) -> Result<(CheckedUpstream, Members), ConfigError> {
        let span = upstream.span();
        self.refuse_hidden("upstream", &span, name)?;
        let upstream = upstream.into_inner();
        let balance = self.balance(name, &upstream)?;
        let emit = match &upstream.header.emit {
            None => Emit::Every,
            Some(emit) => match emit.get_ref().as_str() {
                "every" => Emit::Every,
                "first" => Emit::First,
                _ => return Err(self.unknown_value("emit", emit, &["every", "first"])),
            },
        };
        self.require_number(span.clone(), name, upstream.servers.len())?;
        if let Some(gone) = upstream.share_sockets {
            return Err(self
                .error(gone.span(), "`share_sockets` no longer exists")
                .mend("remove it; for more sessions, add addresses to `source`"));
        }
        let mut checked = CheckedUpstream {
            servers: Vec::new(),
            names: Vec::new(),
            balance,
            returns: self.returns(upstream.on_return.as_ref(), balance)?,
            emit,
            crc32c: upstream.header.crc32c,
        };
        let health = self.health(upstream.health)?.map(Arc::new);
        let slow_start = self.upstream_time("slow_start", upstream.slow_start, "0s")?;
        let lame_duck = self.upstream_time("lame_duck", upstream.lame_duck, DEFAULT_LAME_DUCK)?;
        let sources = self.sources(&upstream.source)?;
        let mut members = Members::default();
        let (mut known, mut known_names) = (BTreeSet::new(), BTreeSet::new());
        for server in upstream.servers {
            let span = server.span();
            let server = server.into_inner();
            let mode = self.mode_of_server(&server, &checked)?;
            let weight = self.weight(server.weight.as_ref())?;
            if let Some(wanted) = self.name(&span, &server.address)? {
                self.refuse_weight(&wanted, server.weight.as_ref())?;
                if !known_names.insert(wanted.clone()) {
                    return Err(self.twice(span, &wanted.to_string(), name));
                }
                checked.names.push(CheckedName {
                    number: self.names.len() + members.names.len(),
                    name: wanted.clone(),
                    span,
                    mode,
                });
                members.names.push(Named {
                    upstream: name.to_owned(),
                    name: wanted,
                    weight,
                    backup: server.backup,
                    drain: server.drain,
                    slow_start,
                    lame_duck,
                    sources: Arc::clone(&sources.all),
                    health: health.clone(),
                });
                continue;
            }
            let address = self.resolve(span.clone(), &server.address)?;
            if !known.insert(address) {
                return Err(self.twice(span, &address.to_string(), name));
            }
            let sources = self.sources_for(&span, address, &sources)?;
            checked.servers.push(CheckedServer {
                number: self.servers.len() + members.servers.len(),
                address,
                span,
                mode,
            });
            members.servers.push(Server {
                upstream: name.to_owned(),
                weight,
                backup: server.backup,
                drain: server.drain,
                leaving: false,
                slow_start,
                lame_duck,
                name: server.address,
                address,
                found_by: None,
                sources,
                health: health.clone(),
            });
        }
        self.require_serving(span, name, &members.servers, &members.names)?;
        Ok((checked, members))
    }

    fn twice(&self, span: Range<usize>, server: &str, upstream: &str) -> ConfigError {
        self.error(span, format!("{server} is twice in upstream `{upstream}`"))
            .mend("name each server once")
    }

    /// The addresses to send from.
    fn sources(&self, sources: &[At<String>]) -> Result<Sources, ConfigError> {
        let (mut usable, mut known) = (Vec::new(), HashSet::new());
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
            if is_no_host(ip) {
                return Err(self
                    .error(source.span(), format!("can't send from {ip}"))
                    .mend("write an address of this host"));
            }
            if known.insert(ip) {
                usable.push(ip);
            }
        }
        Ok(Sources {
            v4: of_family(&usable, true),
            v6: of_family(&usable, false),
            all: usable.into(),
        })
    }

    /// The source addresses that can reach a server: those of its family.
    fn sources_for(
        &self,
        server: &Range<usize>,
        address: ServerAddr,
        sources: &Sources,
    ) -> Result<Arc<[IpAddr]>, ConfigError> {
        let usable = match address.0.is_ipv4() {
            true => Arc::clone(&sources.v4),
            false => Arc::clone(&sources.v6),
        };
        if usable.is_empty() && !sources.all.is_empty() {
            return Err(self
                .error(
                    server.clone(),
                    format!("no source address can reach {address}"),
                )
                .mend("add one of its family to `source`"));
        }
        Ok(usable)
    }
}
