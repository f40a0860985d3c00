//! What serde can't check: whether values fit each other and this host. It also fills
//! what follows from them: the servers with their addresses, and each listener's.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::mem;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;

use super::error::{key_path, nearest};
use super::expand::of_family;
use super::loops::{Bound, Host, suspect_peers};
use super::names::ServerAddress;
use super::options::{BalanceKind, HashOn, OnReturn, Resolver, Upstream};
use super::values::{Network, canonical, is_link_local, refuse_hidden, scope};
use super::{Config, ConfigError, Health, Listener, Name, Named, Server};
use ppv2_engine::address::{ServerAddr, is_no_host};
use ppv2_engine::mode::Mode;
use ppv2_engine::upstream::{self, Balance, MAX_SERVERS, MAX_WEIGHT};

/// What one subscriber gets at least (RFC 6177): a host can take any address of its
/// network, and with privacy extensions takes new ones every day.
const DEFAULT_HASH_IPV6_PREFIX: u8 = 64;

/// More than resolv.conf(5) takes, and longer than anything waits for.
const MAX_RESOLVERS: usize = 8;

/// A valid upstream.
pub(super) struct Group<'o> {
    pub(super) name: &'o str,
    pub(super) options: &'o Upstream,
    balance: Balance,
    pub(super) servers: Vec<Member>,
    pub(super) names: Vec<Member>,
}

/// A server or a name of an upstream.
pub(super) struct Member {
    /// Its index in `servers` of the upstream.
    pub(super) entry: usize,
    /// Its index in [`Config::servers`] or [`Config::names`], if a listener uses the
    /// upstream.
    pub(super) index: usize,
    /// Its own mode, rather than the listener's.
    mode: Option<Mode>,
}

impl Group<'_> {
    /// The error `error` at a member.
    pub(super) fn at(&self, member: &Member, error: ConfigError) -> ConfigError {
        error.at(key_path!["upstream", self.name, "servers", member.entry])
    }
}

pub(super) fn validate(mut config: Config) -> Result<Config, ConfigError> {
    if config.listeners.is_empty() {
        return Err(
            ConfigError::new("no listener").hint("add a [[listener]] with `bind` and `upstream`")
        );
    }
    let options = mem::take(&mut config.upstreams);
    let mut listeners = mem::take(&mut config.listeners);
    let used: BTreeSet<_> = listeners.iter().map(|l| l.upstream.clone()).collect();
    let mut groups = BTreeMap::new();
    for (name, options) in &options {
        let known = (config.servers.len(), config.names.len());
        let group = config.add_upstream(name, options)?;
        if !used.contains(name) {
            config.servers.truncate(known.0);
            config.names.truncate(known.1);
            let warning = format!("upstream `{name}` is used by no listener");
            config.warnings.push(warning);
        }
        groups.insert(name.as_str(), group);
    }
    let (mut names, mut bound) = (HashSet::new(), Bound::default());
    let mut spoofed = BTreeMap::new();
    for (index, listener) in listeners.iter_mut().enumerate() {
        name_listener(listener, index, &mut names)?;
        let group = group_of(listener, index, &groups)?;
        bind(listener, index, &mut bound)?;
        listener.serve(index, group)?;
        listener.check_clients(index, &mut config.warnings)?;
        config.check_modes(listener, index, group, &mut spoofed)?;
    }
    config.listeners = listeners;
    config.refuse_loops(
        &bound,
        used.iter().filter_map(|name| groups.get(name.as_str())),
    )?;
    config.require_sources(&groups)?;
    config.check_peers()?;
    if let Some(admin) = &mut config.admin {
        let checked = local_address("admin address", admin.listen);
        admin.listen = checked.map_err(|error| error.at(key_path!["admin", "listen"]))?;
    }
    if config
        .access_log
        .as_ref()
        .is_some_and(|log| log.path.as_os_str().is_empty())
    {
        return Err(ConfigError::new("an access log without a path")
            .hint("name a file, or \"-\" for standard output")
            .at(key_path!["access_log", "path"]));
    }
    config.resolver.check()?;
    if config.resolver != Resolver::default() && config.names.is_empty() {
        let warning = "[resolver] changes nothing: no server is written as dns: or srv:";
        config.warnings.push(warning.to_owned());
    }
    Ok(config)
}

fn name_listener(
    listener: &mut Listener,
    index: usize,
    names: &mut HashSet<String>,
) -> Result<(), ConfigError> {
    if listener.name.is_empty() {
        listener.name = format!("listener{}", index + 1);
    }
    if names.insert(listener.name.clone()) {
        return Ok(());
    }
    let message = format!("a second listener named `{}`", listener.name);
    Err(ConfigError::new(message)
        .hint("give each listener a `name` of its own: metrics tell them apart by it")
        .at(key_path!["listener", index, "name"]))
}

fn group_of<'g, 'o>(
    listener: &Listener,
    index: usize,
    groups: &'g BTreeMap<&'o str, Group<'o>>,
) -> Result<&'g Group<'o>, ConfigError> {
    let wanted = listener.upstream.as_str();
    groups.get(wanted).ok_or_else(|| {
        let error = match wanted {
            "" => ConfigError::new(format!("listener `{}` has no `upstream`", listener.name)),
            _ => ConfigError::new(format!("there is no upstream `{wanted}`")),
        };
        let hint = match nearest(wanted, groups.keys().copied()) {
            _ if wanted.is_empty() => {
                "name the upstream whose servers get the datagrams".to_owned()
            }
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("add an [upstream.{wanted}] with `servers`"),
        };
        error
            .hint(hint)
            .at(key_path!["listener", index, "upstream"])
    })
}

fn bind(listener: &mut Listener, index: usize, bound: &mut Bound) -> Result<(), ConfigError> {
    if listener.bind.is_empty() {
        return Err(ConfigError::new("a listener without an address")
            .hint("give `bind` at least one, as in \"0.0.0.0:53\" or \"[::]:53\"")
            .at(key_path!["listener", index, "bind"]));
    }
    for (number, address) in listener.bind.iter_mut().enumerate() {
        let at = |error: ConfigError| error.at(key_path!["listener", index, "bind", number]);
        *address = local_address("listener address", *address).map_err(at)?;
        bound.add(*address, index).map_err(|other| {
            at(ConfigError::new(format!("{address} overlaps with {other}"))
                .hint("bind each address once; a wildcard covers all of its family"))
        })?;
    }
    Ok(())
}

impl Listener {
    /// Takes what its upstream says of it and of its servers.
    fn serve(&mut self, index: usize, group: &Group<'_>) -> Result<(), ConfigError> {
        let wanted = (self.mode, self.rewrite_on, self.source_port);
        let mode = super::modes::mode(wanted, group.options.header)
            .map_err(|error| error.within(key_path!["listener", index]))?;
        let with_mode = |member: &Member| (member.index, member.mode.unwrap_or(mode));
        self.servers = group.servers.iter().map(with_mode).collect();
        self.names = group.names.iter().map(with_mode).collect();
        self.balance = group.balance;
        self.returns = group.options.on_return == OnReturn::Return;
        Ok(())
    }

    fn check_clients(&self, index: usize, warnings: &mut Vec<String>) -> Result<(), ConfigError> {
        if self.allow.is_empty() {
            return Err(ConfigError::new("an empty `allow` lets no client in")
                .hint("list networks, or leave the key out to allow everybody")
                .at(key_path!["listener", index, "allow"]));
        }
        if self.per_client.burst.is_some() && self.per_client.rate.is_none() {
            return Err(ConfigError::new("`per_client.burst` without a rate")
                .hint("add `rate`, the datagrams a second that each client may send")
                .at(key_path!["listener", index, "per_client", "burst"]));
        }
        for address in &self.bind {
            let same_family = |net: &Network| net.0.addr().is_ipv4() == address.is_ipv4();
            if !self.allow.iter().any(same_family) {
                warnings.push(format!(
                    "listener `{}`: no client of {address} can be served: `allow` has no {} network",
                    self.name,
                    family(*address)
                ));
            }
        }
        Ok(())
    }
}

pub(super) fn family(address: SocketAddr) -> &'static str {
    if address.is_ipv4() { "IPv4" } else { "IPv6" }
}

impl Config {
    /// Checks an upstream and adds its servers and names.
    fn add_upstream<'o>(
        &mut self,
        name: &'o str,
        options: &'o Upstream,
    ) -> Result<Group<'o>, ConfigError> {
        let whole = |error: ConfigError| error.at(key_path!["upstream", name]);
        refuse_hidden("upstream", name).map_err(whole)?;
        match options.servers.len() {
            0 => {
                return Err(whole(
                    ConfigError::new(format!("upstream `{name}` has no servers"))
                        .hint("give at least one, as in servers = [\"192.0.2.10:53\"]"),
                ));
            }
            count if count > MAX_SERVERS => {
                return Err(whole(
                    ConfigError::new(format!("upstream `{name}` has {count} servers"))
                        .hint(format!("give at most {MAX_SERVERS}")),
                ));
            }
            _ => {}
        }
        let mut group = Group {
            name,
            options,
            balance: self.balance(name, options)?,
            servers: Vec::new(),
            names: Vec::new(),
        };
        if let Some(health) = &options.health {
            check_health(name, health)?;
        }
        let health = options.health.clone().map(Arc::new);
        let sources = check_sources(name, &options.source)?;
        let [v4, v6] = [true, false].map(|v4| of_family(&sources, v4));
        let (mut known, mut known_names) = (BTreeSet::new(), BTreeSet::new());
        for (entry, server) in options.servers.iter().enumerate() {
            let entry_path = || key_path!["upstream", name, "servers", entry];
            let at = |error: ConfigError| error.at(entry_path());
            let twice = |what: &dyn std::fmt::Display| {
                at(
                    ConfigError::new(format!("{what} is twice in upstream `{name}`"))
                        .hint("name each server once"),
                )
            };
            let mut member = Member {
                entry,
                index: self.names.len(),
                mode: server
                    .own_mode(options.header)
                    .map_err(|error| error.within(entry_path()))?,
            };
            let template = Server {
                upstream: name.to_owned(),
                name: String::new(),
                address: ServerAddr((IpAddr::from([0; 4]), 0).into()),
                found_by: None,
                sources: Arc::clone(&sources),
                weight: check_weight(server.weight).map_err(|error| {
                    error.at(key_path!["upstream", name, "servers", entry, "weight"])
                })?,
                backup: server.backup,
                drain: server.drain,
                leaving: false,
                slow_start: *options.slow_start,
                lame_duck: *options.lame_duck,
                health: health.clone(),
            };
            let host = match &server.address {
                ServerAddress::Host(host) => host,
                ServerAddress::Name(wanted) => {
                    if matches!(wanted, Name::Srv { .. }) && server.weight.is_some() {
                        return Err(ConfigError::new(format!("`{wanted}` with a weight"))
                            .hint("leave `weight` out: each SRV record has its own")
                            .at(key_path!["upstream", name, "servers", entry, "weight"]));
                    }
                    if !known_names.insert(wanted) {
                        return Err(twice(wanted));
                    }
                    group.names.push(member);
                    self.names.push(Named {
                        name: wanted.clone(),
                        server: template,
                    });
                    continue;
                }
            };
            let address = resolve(host).map_err(at)?;
            if !known.insert(address) {
                return Err(twice(&address));
            }
            let of_family = if address.0.is_ipv4() { &v4 } else { &v6 };
            if of_family.is_empty() && !sources.is_empty() {
                return Err(at(ConfigError::new(format!(
                    "no source address can reach {address}"
                ))
                .hint("add one of its family to `source`")));
            }
            member.index = self.servers.len();
            group.servers.push(member);
            self.servers.push(Server {
                name: host.clone(),
                address,
                sources: Arc::clone(of_family),
                ..template
            });
        }
        if options.servers.iter().all(|server| server.backup) {
            return Err(whole(
                ConfigError::new(format!("every server of upstream `{name}` is a backup")).hint(
                    "leave `backup` out for the servers that get sessions normally; a backup stands in for those",
                ),
            ));
        }
        if options.servers.iter().all(|server| server.drain) {
            return Err(whole(
                ConfigError::new(format!("every server of upstream `{name}` is draining")).hint(
                    "leave `drain` out for servers that get new sessions; to end the service, stop the proxy, which waits for outstanding replies",
                ),
            ));
        }
        Ok(group)
    }

    fn balance(&mut self, name: &str, options: &Upstream) -> Result<Balance, ConfigError> {
        let (hash_on, prefix) = (options.hash_on, options.hash_ipv6_prefix);
        let balance = match (options.balance, hash_on.unwrap_or_default()) {
            (BalanceKind::RoundRobin, _) => Balance::RoundRobin,
            (BalanceKind::LeastSessions, _) => Balance::LeastSessions,
            (BalanceKind::RandomTwo, _) => Balance::RandomTwo,
            (BalanceKind::Maglev, HashOn::ClientAddr) => {
                Balance::Maglev(upstream::HashOn::ClientAddr)
            }
            (BalanceKind::Maglev, HashOn::ClientIp) => {
                Balance::Maglev(upstream::HashOn::ClientIp {
                    ipv6_prefix: prefix.map_or(DEFAULT_HASH_IPV6_PREFIX, |prefix| *prefix),
                })
            }
        };
        let is_maglev = options.balance == BalanceKind::Maglev;
        if options.on_return == OnReturn::Return && !is_maglev {
            return Err(
                ConfigError::new("on_return \"return\" without balance \"maglev\"")
                    .hint("use balance = \"maglev\": with others no session belongs to a server")
                    .at(key_path!["upstream", name, "on_return"]),
            );
        }
        let without_effect = match (is_maglev, hash_on, prefix) {
            (true, Some(HashOn::ClientAddr), Some(_)) => {
                "hash_ipv6_prefix changes nothing with hash_on = \"client_addr\""
            }
            (false, Some(_), _) | (false, _, Some(_)) => {
                "hash_on and hash_ipv6_prefix change nothing but with balance = \"maglev\""
            }
            _ => return Ok(balance),
        };
        self.warnings
            .push(format!("upstream `{name}`: {without_effect}"));
        Ok(balance)
    }

    /// Refuses servers that are listeners.
    fn refuse_loops<'g, 'o: 'g>(
        &self,
        bound: &Bound,
        groups: impl Iterator<Item = &'g Group<'o>>,
    ) -> Result<(), ConfigError> {
        let host = Host::default();
        for group in groups {
            for member in &group.servers {
                let server = &self.servers[member.index];
                if let Some((number, at)) = bound.arrives_at(server.address.0, &host) {
                    let message = format!(
                        "server `{}` is listener `{}` at {at}, this proxy's own address: datagrams would loop",
                        server.name, self.listeners[number].name
                    );
                    return Err(group.at(
                        member,
                        ConfigError::new(message)
                            .hint("give the listener or the server another port or address"),
                    ));
                }
            }
        }
        Ok(())
    }

    /// Asks for the networks of other proxies where there seem to be any. An empty list
    /// says that there are none.
    fn check_peers(&mut self) -> Result<(), ConfigError> {
        let Some(peers) = &self.peers else {
            self.warnings.extend(suspect_peers(&self.listeners));
            return Ok(());
        };
        if let Some(index) = peers.iter().position(|peer| peer.0.prefix_len() == 0) {
            let message = format!("{} in `peers` takes every client for a proxy", peers[index]);
            return Err(ConfigError::new(message)
                .hint("list the other proxies' addresses alone, as in \"192.0.2.1\"")
                .at(key_path!["peers", index]));
        }
        for listener in &self.listeners {
            let is_peers = |allowed: &Network| peers.iter().any(|peer| peer.0.contains(&allowed.0));
            if listener.allow.iter().all(is_peers) {
                self.warnings.push(format!(
                    "listener `{}` serves nobody: all that `allow` lets in is in `peers`",
                    listener.name
                ));
            }
        }
        Ok(())
    }
}

/// An address of this host that clients or operators write to.
fn local_address(what: &str, address: SocketAddr) -> Result<SocketAddr, ConfigError> {
    let error = |problem: &str| ConfigError::new(format!("{what} `{address}` {problem}"));
    if address.port() == 0 {
        return Err(error("has port 0")
            .hint("name the port: clients could not know one that the kernel chose"));
    }
    let plain = canonical(address);
    if plain.is_ipv4() != address.is_ipv4() {
        return Err(error("is IPv4 written as IPv6").hint(format!("write it as {plain}")));
    }
    if is_no_host(plain.ip()) && !plain.ip().is_unspecified() {
        return Err(ConfigError::new(format!("can't listen on {plain}"))
            .hint("give an address of this host, or a wildcard: 0.0.0.0, [::]"));
    }
    require_scope(what, plain)?;
    Ok(plain)
}

/// Refuses a link-local address that doesn't say of which interface.
fn require_scope(what: &str, address: SocketAddr) -> Result<(), ConfigError> {
    if !is_link_local(address.ip()) || scope(address) != 0 {
        return Ok(());
    }
    let message = format!("{what} `{address}` is link-local and names no interface");
    Err(ConfigError::new(message).hint(format!(
        "add the interface's number (ip link shows it), as in [{}%2]:{}",
        address.ip(),
        address.port()
    )))
}

/// The address of a server that is written as an address or a host name.
fn resolve(text: &str) -> Result<ServerAddr, ConfigError> {
    let error = |message: String| ConfigError::new(format!("server `{text}`{message}"));
    let hint = "write it as 192.0.2.10:53, [2001:db8::10]:53 or host.example:53";
    match text.rsplit_once(':').map(|(_, port)| port.parse::<u16>()) {
        Some(Ok(0)) => {
            return Err(
                error(" has port 0".to_owned()).hint("name the port that the server listens on")
            );
        }
        Some(Ok(_)) => {}
        _ => return Err(error(" has no port".to_owned()).hint(hint)),
    }
    let addresses = text.to_socket_addrs().map_err(|cause| {
        error(format!(" does not resolve: {cause}"))
            .hint(format!(
                "check the name and this host's resolver, write the IP address, or dns:{text} to have it looked up while the proxy runs"
            ))
    })?;
    let address = steady(addresses.map(canonical))
        .ok_or_else(|| error(" resolves to nothing".to_owned()).hint(hint))?;
    let ip = address.ip();
    if is_no_host(ip) {
        return Err(error(format!(": {ip} is the address of no server"))
            .hint("write the address that the server itself has, such as 127.0.0.1"));
    }
    require_scope("server", address)?;
    Ok(ServerAddr(address))
}

/// The one address of a name that is used, whatever the order of the answers: the lowest
/// of the family that comes first.
fn steady(addresses: impl Iterator<Item = SocketAddr>) -> Option<SocketAddr> {
    let addresses: Vec<_> = addresses.collect();
    let first = addresses.first()?.is_ipv4();
    let same = addresses
        .into_iter()
        .filter(|address| address.is_ipv4() == first);
    same.min()
}

fn check_weight(weight: Option<i64>) -> Result<u16, ConfigError> {
    let weight = weight.unwrap_or(1);
    let valid = u16::try_from(weight).ok();
    valid.filter(|weight| (1..=MAX_WEIGHT).contains(weight)).ok_or_else(|| {
        ConfigError::new(format!("weight is {weight}")).hint(match weight {
            0 => format!("give a number from 1 to {MAX_WEIGHT}, or drain = true to send it no new sessions"),
            _ => format!(
                "give a number from 1 to {MAX_WEIGHT}; the nearest is {}",
                weight.clamp(1, MAX_WEIGHT.into())
            ),
        })
    })
}

/// The addresses to send from, each once.
fn check_sources(upstream: &str, sources: &[IpAddr]) -> Result<Arc<[IpAddr]>, ConfigError> {
    let (mut usable, mut known) = (Vec::new(), HashSet::new());
    for (index, source) in sources.iter().enumerate() {
        let ip = source.to_canonical();
        if is_no_host(ip) {
            return Err(ConfigError::new(format!("can't send from {ip}"))
                .hint("write an address of this host")
                .at(key_path!["upstream", upstream, "source", index]));
        }
        if known.insert(ip) {
            usable.push(ip);
        }
    }
    Ok(usable.into())
}

fn check_health(upstream: &str, health: &Health) -> Result<(), ConfigError> {
    if health.timeout() > *health.every {
        return Err(
            ConfigError::new("health.timeout is longer than health.every")
                .hint("give at most the time between probes, since the next waits for the last")
                .at(key_path!["upstream", upstream, "health", "timeout"]),
        );
    }
    if health.probe.is_none() && health.passive.is_none() {
        return Err(ConfigError::new("health checks that check nothing")
            .hint("add `passive`, give a probe of another kind, or leave `health` out")
            .at(key_path!["upstream", upstream, "health"]));
    }
    Ok(())
}

impl Resolver {
    fn check(&mut self) -> Result<(), ConfigError> {
        if self.servers.len() > MAX_RESOLVERS {
            let message = format!("resolver.servers has {} addresses", self.servers.len());
            return Err(ConfigError::new(message)
                .hint(format!("give at most {MAX_RESOLVERS}"))
                .at(key_path!["resolver", "servers", MAX_RESOLVERS]));
        }
        let mut known = HashSet::new();
        for (index, server) in self.servers.iter_mut().enumerate() {
            let error = |what: &str, hint: &str| {
                let error = ConfigError::new(format!("resolver `{server}` {what}"));
                Err(error.hint(hint).at(key_path!["resolver", "servers", index]))
            };
            let ip = server.ip().to_canonical();
            if server.port() == 0 || is_no_host(ip) || is_link_local(ip) {
                return error(
                    "can't be asked",
                    "give a DNS server's address, that of no link or group, with its port: 53",
                );
            }
            if !known.insert((ip, server.port())) {
                return error("is there twice", "name each once");
            }
            *server = SocketAddr::new(ip, server.port());
        }
        if self.min_ttl() > *self.max_ttl {
            return Err(
                ConfigError::new("resolver.min_ttl is longer than resolver.max_ttl")
                    .hint("give at most as long a time: names are asked for again in between")
                    .at(key_path!["resolver", "min_ttl"]),
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_answers_decides_the_family_alone() {
        let used = |texts: &[&str]| {
            let addresses = texts.iter().map(|text| text.parse().unwrap());
            steady(addresses).map(|address| address.to_string())
        };
        let lowest = Some("192.0.2.9:53".to_owned());
        assert_eq!(used(&["192.0.2.9:53", "192.0.2.10:53"]), lowest);
        assert_eq!(
            used(&["192.0.2.10:53", "[2001:db8::1]:53", "192.0.2.9:53"]),
            lowest
        );
        let of_ipv6 = Some("[2001:db8::1]:53".to_owned());
        assert_eq!(used(&["[2001:db8::1]:53", "192.0.2.9:53"]), of_ipv6);
        assert_eq!(used(&[]), None);
    }
}
