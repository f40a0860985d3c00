//! What serde can't check: whether values fit each other and this host. It also fills
//! what follows from them: the servers with their addresses, and each listener's.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::mem;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;

use ppv2_engine::address::{PortRange, ServerAddr, is_no_host};
use ppv2_engine::mode::Mode;
use ppv2_engine::upstream::{self, Balance, MAX_SERVERS, MAX_WEIGHT};

use super::bind::{self, MAX_RANGE_ADDRESSES};
use super::error::{Within, key_path, nearest, refuse};
use super::loops::{Bound, Chains, Host, suspect_peers};
use super::names::ServerAddress;
use super::options::{BalanceKind, HashOn, OnReturn, Resolver, ServerOptions, Upstream};
use super::token::Token;
use super::values::{Network, canonical, is_link_local, refuse_hidden, scope};
use super::{
    AdminAddress, Bind, Config, ConfigError, FamilySources, Health, Listener, Name, Named, Server,
};

/// What one subscriber gets at least (RFC 6177): a host can take any address of its
/// network, and with privacy extensions takes new ones every day.
const DEFAULT_HASH_IPV6_PREFIX: u8 = 64;

/// More than resolv.conf(5) takes, and longer than anything waits for.
const MAX_RESOLVERS: usize = 8;

/// A valid upstream.
pub(super) struct Group<'o> {
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

/// Upstreams by name.
pub(super) type Groups<'o> = BTreeMap<&'o str, Group<'o>>;

pub(super) fn validate(mut config: Config) -> Result<Config, ConfigError> {
    if config.listeners.is_empty() {
        return refuse(
            "no listener",
            "add a [[listener]] with `bind` and `upstream`",
        );
    }
    let upstreams = mem::take(&mut config.upstreams);
    let mut listeners = mem::take(&mut config.listeners);
    let used: BTreeSet<_> = listeners.iter().map(|l| l.upstream.clone()).collect();
    let mut groups = Groups::new();
    for (name, options) in &upstreams {
        let known = (config.servers.len(), config.names.len());
        config.key_files.extend(options.tag_key_file.clone());
        let group = config.add_upstream(name, options);
        groups.insert(name, group.within(key_path!["upstream", name.as_str()])?);
        if !used.contains(name) {
            config.servers.truncate(known.0);
            config.names.truncate(known.1);
            let warning = format!("upstream `{name}` is used by no listener");
            config.warnings.push(warning);
        }
    }
    let (mut names, mut bound) = (HashSet::new(), Bound::default());
    let mut spoofed = BTreeMap::new();
    for (index, listener) in listeners.iter_mut().enumerate() {
        if listener.name.is_empty() {
            listener.name = format!("listener{}", index + 1);
        }
        let is_new = names.insert(listener.name.clone());
        let checked = listener.check(is_new, &groups, &mut config.warnings);
        checked.within(key_path!["listener", index])?;
        let bind = listener.bind.iter_mut().enumerate();
        for (number, address) in bind {
            check_bind(address, index, &mut bound)
                .within(key_path!["listener", index, "bind", number])?;
        }
        config.check_same_ports(listener, index)?;
        let checked = config.check_modes(listener, &mut spoofed);
        checked.within(key_path!["listener", index])?;
        let options = groups[listener.upstream.as_str()].options;
        config.check_replies(listener, options, index)?;
        config.check_accept(listener, options, index)?;
        config.check_headers(listener, options)?;
    }
    config.listeners = listeners;
    config.refuse_loops(&bound, &groups)?;
    config.require_sources(&groups)?;
    config.check_source_networks(&groups)?;
    config.check_peers()?;
    if let Some(admin) = &mut config.admin {
        if let AdminAddress::Ip(address) = &mut admin.listen {
            let checked = local_address("admin address", *address);
            *address = checked.within(key_path!["admin", "listen"])?;
        }
        if let Some(file) = &admin.token_file {
            let token = Token::read(file).within(key_path!["admin", "token_file"])?;
            admin.token = Some(token);
            config.key_files.push(file.clone());
        }
    }
    let admin = config.admin.as_ref().map(|admin| &admin.listen);
    if let (Some(AdminAddress::Unix(admin)), Some(upgrade)) = (admin, config.upgrade_socket())
        && admin == upgrade
    {
        return refuse(
            format!("{} is the admin address, too", upgrade.display()),
            "give each a path of its own",
        )
        .within(key_path!["upgrade", "socket"]);
    }
    if let Some(log) = &config.access_log {
        log.check().within(key_path!["access_log"])?;
    }
    config.resolver.check().within(key_path!["resolver"])?;
    if config.resolver != Resolver::default() && config.names.is_empty() {
        let warning = "[resolver] changes nothing: no server is written as dns: or srv:";
        config.warnings.push(warning.to_owned());
    }
    Ok(config)
}

impl Listener {
    /// Checks it beside its upstream, and takes the servers from there.
    fn check(
        &mut self,
        is_new: bool,
        groups: &Groups<'_>,
        warnings: &mut Vec<String>,
    ) -> Result<(), ConfigError> {
        let (name, wanted) = (&self.name, self.upstream.as_str());
        if !is_new {
            return refuse(
                format!("a second listener named `{name}`"),
                "give each listener a `name` of its own: metrics tell them apart by it",
            )
            .within(key_path!["name"]);
        }
        if wanted.is_empty() {
            return refuse(
                format!("listener `{name}` has no `upstream`"),
                "name the upstream whose servers get the datagrams",
            );
        }
        let Some(group) = groups.get(wanted) else {
            let hint = match nearest(wanted, groups.keys().copied()) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("add an [upstream.{wanted}] with `servers`"),
            };
            return refuse(format!("there is no upstream `{wanted}`"), hint)
                .within(key_path!["upstream"]);
        };
        let mode = (self.mode, self.rewrite_on, self.source_port);
        let mode = super::modes::mode(mode, &group.options.header)?;
        let with_mode = |member: &Member| (member.index, member.mode.unwrap_or(mode));
        self.servers = group.servers.iter().map(with_mode).collect();
        self.names = group.names.iter().map(with_mode).collect();
        self.balance = group.balance;
        self.returns = group.options.on_return == OnReturn::Return;
        if self.bind.is_empty() {
            return refuse(
                "a listener without an address",
                "give `bind` at least one, as in \"0.0.0.0:53\" or \"[::]:53\"",
            )
            .within(key_path!["bind"]);
        }
        let ranges = self.bind.iter().filter(|bind| !bind.is_single());
        let in_ranges: usize = ranges.map(|bind| bind.ports().count()).sum();
        if in_ranges > MAX_RANGE_ADDRESSES {
            return refuse(
                format!("the ranges of listener `{name}` have {in_ranges} addresses"),
                format!("give at most {MAX_RANGE_ADDRESSES}: each takes a socket of every worker"),
            )
            .within(key_path!["bind"]);
        }
        if self.allow.is_empty() {
            return refuse(
                "an empty `allow` lets no client in",
                "list networks, or leave the key out to allow everybody",
            )
            .within(key_path!["allow"]);
        }
        if self.per_client.burst.is_some() && self.per_client.rate.is_none() {
            return refuse(
                "`per_client.burst` without a rate",
                "add `rate`, the datagrams a second that each client may send",
            )
            .within(key_path!["per_client", "burst"]);
        }
        if let Some(accept) = &self.accept {
            accept.check().within(key_path!["accept"])?;
        }
        for address in &self.bind {
            let same_family = |net: &Network| net.0.addr().is_ipv4() == address.is_ipv4();
            if self.accept.is_none() && !self.allow.iter().any(same_family) {
                let family = family(address.first());
                warnings.push(format!(
                    "listener `{name}`: no client of {address} can be served: `allow` has no {family} network"
                ));
            }
        }
        Ok(())
    }
}

fn check_bind(bind: &mut Bind, listener: usize, bound: &mut Bound) -> Result<(), ConfigError> {
    let first = local_address("listener address", bind.first())?;
    *bind = Bind::new(first, bind.ports());
    match bound.add(*bind, listener) {
        Ok(()) => Ok(()),
        Err(other) => refuse(
            format!("{bind} overlaps with {other}"),
            "bind each address once; a wildcard covers all of its family",
        ),
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
        refuse_hidden("upstream", name)?;
        let what = match options.servers.len() {
            0 => "no servers".to_owned(),
            count if count > MAX_SERVERS => format!("{count} servers"),
            _ => String::new(),
        };
        if !what.is_empty() {
            return refuse(
                format!("upstream `{name}` has {what}"),
                format!(
                    "give at least one, as in servers = [\"192.0.2.10:53\"], and give at most {MAX_SERVERS}"
                ),
            );
        }
        if options.servers.iter().all(|server| server.backup) {
            return refuse(
                format!("every server of upstream `{name}` is a backup"),
                "leave `backup` out for the servers that get sessions normally; a backup stands in for those",
            );
        }
        if options.servers.iter().all(|server| server.drain) {
            return refuse(
                format!("every server of upstream `{name}` is draining"),
                "leave `drain` out for servers that get new sessions; to end the service, stop the proxy, which waits for outstanding replies",
            );
        }
        if let Some(health) = &options.health {
            health.check().within(key_path!["health"])?;
        }
        options.header.check_format().within(key_path!["header"])?;
        let sources = options.sources()?;
        let template = Server {
            upstream: name.to_owned(),
            name: String::new(),
            address: ServerAddr((IpAddr::from([0; 4]), 0).into()),
            ports: None,
            found_by: None,
            sources: sources.of(true).clone(),
            replies: options.reply_paths()?,
            tlvs: options.header.own_tlvs().within(key_path!["header"])?,
            repeat: options.header.repeat().within(key_path!["header"])?,
            weight: 1,
            backup: false,
            drain: false,
            leaving: false,
            slow_start: *options.slow_start,
            lame_duck: *options.lame_duck,
            health: options.health.clone().map(Arc::new),
        };
        let mut group = Group {
            options,
            balance: self.balance(name, options)?,
            servers: Vec::new(),
            names: Vec::new(),
        };
        let mut known = HashSet::new();
        for (entry, server) in options.servers.iter().enumerate() {
            self.add_server(&mut group, entry, server, &template, &sources, &mut known)
                .within(key_path!["servers", entry])?;
        }
        Ok(group)
    }

    /// Adds the server or name number `entry` of an upstream, whose servers so far are
    /// `known`.
    fn add_server(
        &mut self,
        group: &mut Group<'_>,
        entry: usize,
        server: &ServerOptions,
        template: &Server,
        sources: &FamilySources,
        known: &mut HashSet<String>,
    ) -> Result<(), ConfigError> {
        let mode = server.own_mode(&group.options.header)?;
        let mut template = Server {
            weight: check_weight(server.weight).within(key_path!["weight"])?,
            backup: server.backup,
            drain: server.drain,
            ..template.clone()
        };
        template.ports = server.ports(group.options)?;
        let (what, id, index) = match &server.address {
            ServerAddress::Name(name) => {
                let what = name.to_string();
                (what.clone(), what, self.names.len())
            }
            ServerAddress::Host(host) => {
                template.name.clone_from(host);
                template.address = resolve(host)?;
                let id = template.id().to_string();
                (template.shown_address(), id, self.servers.len())
            }
        };
        if known.contains(&id) {
            return refuse(
                format!("{what} is twice in upstream `{}`", template.upstream),
                "name each server once",
            );
        }
        let member = Member { entry, index, mode };
        if let ServerAddress::Name(name) = &server.address {
            if matches!(name, Name::Srv { .. }) && server.weight.is_some() {
                return refuse(
                    format!("`{what}` with a weight"),
                    "leave `weight` out: each SRV record has its own",
                )
                .within(key_path!["weight"]);
            }
            group.names.push(member);
            self.names.push(Named {
                name: name.clone(),
                server: template,
                sources: sources.clone(),
            });
        } else {
            let Some(of_family) = sources.reaching(template.address.0.is_ipv4()) else {
                return refuse(
                    format!("no source address can reach {what}"),
                    "add an address or a network of its family to `source`",
                );
            };
            template.sources = of_family.clone();
            group.servers.push(member);
            self.servers.push(template);
        }
        known.insert(id);
        Ok(())
    }

    fn balance(&mut self, name: &str, options: &Upstream) -> Result<Balance, ConfigError> {
        let (hash_on, prefix) = (options.hash_on, options.hash_ipv6_prefix);
        let hash = match hash_on.unwrap_or_default() {
            HashOn::ClientAddr => upstream::HashOn::ClientAddr,
            HashOn::ClientIp => upstream::HashOn::ClientIp {
                ipv6_prefix: prefix.map_or(DEFAULT_HASH_IPV6_PREFIX, |prefix| *prefix),
            },
        };
        let balance = match options.balance {
            BalanceKind::Maglev => Balance::Maglev(hash),
            BalanceKind::RoundRobin => Balance::RoundRobin,
            BalanceKind::LeastSessions => Balance::LeastSessions,
            BalanceKind::RandomTwo => Balance::RandomTwo,
        };
        let is_maglev = options.balance == BalanceKind::Maglev;
        if options.on_return == OnReturn::Return && !is_maglev {
            return refuse(
                "on_return \"return\" without balance \"maglev\"",
                "use balance = \"maglev\": with others no session belongs to a server",
            )
            .within(key_path!["on_return"]);
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

    /// Refuses servers that are listeners, unless a chain of listeners that read headers ends
    /// at other servers.
    fn refuse_loops(&self, bound: &Bound, groups: &Groups<'_>) -> Result<(), ConfigError> {
        let host = Host::default();
        let mut chains = Chains::default();
        for (index, listener) in self.listeners.iter().enumerate() {
            let name = listener.upstream.as_str();
            for member in &groups[name].servers {
                let server = &self.servers[member.index];
                let mut loops = bound.arrive_at(server.address.0, server.ports, &host);
                let mut modes = listener.servers.iter();
                let mode = modes.find(|(number, _)| *number == member.index);
                let has_header = mode.is_none_or(|(_, mode)| mode.has_header());
                let next = |number: usize| &self.listeners[number];
                loops.retain(|(number, _)| {
                    let is_read = has_header && next(*number).accept.is_some();
                    !is_read || !chains.add(index, *number)
                });
                let Some((number, at)) = loops.first() else {
                    continue;
                };
                let next = next(*number);
                if next.accept.is_some() && !has_header {
                    return refuse(
                        format!(
                            "server `{}` is listener `{}` at {at}, which accepts headers, and listener `{}` writes none: every datagram would be dropped",
                            server.name, next.name, listener.name
                        ),
                        "set mode = \"ppv2\" for this server, or leave `accept` out of that listener",
                    )
                    .within(key_path!["upstream", name, "servers", member.entry]);
                }
                return refuse(
                    format!(
                        "server `{}` is listener `{}` at {at}, this proxy's own address: datagrams would loop",
                        server.name, next.name
                    ),
                    "give the listener or the server another port or address",
                )
                .within(key_path!["upstream", name, "servers", member.entry]);
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
            return refuse(
                format!(
                    "{} in `peers` would treat every client as a proxy",
                    peers[index]
                ),
                "list the other proxies' addresses alone, as in \"192.0.2.1\"",
            )
            .within(key_path!["peers", index]);
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
    let plain = canonical(address);
    let (problem, hint) = if address.port() == 0 {
        let hint = "name the port: clients could not know one that the kernel chose";
        ("has port 0", hint.to_owned())
    } else if plain.is_ipv4() != address.is_ipv4() {
        ("is IPv4 written as IPv6", format!("write it as {plain}"))
    } else if is_no_host(plain.ip()) && !plain.ip().is_unspecified() {
        let hint = "give an address of this host, or a wildcard: 0.0.0.0, [::]";
        return refuse(format!("can't listen on {plain}"), hint);
    } else {
        require_scope(what, plain)?;
        return Ok(plain);
    };
    refuse(format!("{what} `{address}` {problem}"), hint)
}

/// Refuses a link-local address that doesn't say of which interface.
fn require_scope(what: &str, address: SocketAddr) -> Result<(), ConfigError> {
    if !is_link_local(address.ip()) || scope(address) != 0 {
        return Ok(());
    }
    let (ip, port) = (address.ip(), address.port());
    refuse(
        format!("{what} `{address}` is link-local and names no interface"),
        format!("add the interface's number (ip link shows it), as in [{ip}%2]:{port}"),
    )
}

/// The address of a server that is written as an address or a host name.
fn resolve(text: &str) -> Result<ServerAddr, ConfigError> {
    let form = "write it as 192.0.2.10:53, [2001:db8::10]:53 or host.example:53";
    let first = match bind::ports(text)? {
        Some((PortRange { first: 0, .. }, _)) => {
            let hint = "name the port that the server listens on";
            return refuse(format!("server `{text}` has port 0"), hint);
        }
        Some((_, first)) => first,
        None => return refuse(format!("server `{text}` has no port"), form),
    };
    let addresses = match first.to_socket_addrs() {
        Ok(addresses) => addresses.map(canonical),
        Err(cause) => {
            return refuse(
                format!("server `{text}` does not resolve: {cause}"),
                format!(
                    "check the name and this host's resolver, write the IP address, or dns:{text} to have it looked up while the proxy runs"
                ),
            );
        }
    };
    let Some(address) = steady(addresses) else {
        return refuse(format!("server `{text}` resolves to nothing"), form);
    };
    let ip = address.ip();
    if is_no_host(ip) {
        return refuse(
            format!("server `{text}`: {ip} can't be a server's address"),
            "write the address that the server itself has, such as 127.0.0.1",
        );
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
    let max = i64::from(MAX_WEIGHT);
    match u16::try_from(weight) {
        Ok(valid) if (1..=MAX_WEIGHT).contains(&valid) => return Ok(valid),
        _ => {}
    }
    let otherwise = match weight {
        0 => ", or drain = true to send it no new sessions".to_owned(),
        _ => format!("; the nearest is {}", weight.clamp(1, max)),
    };
    refuse(
        format!("weight is {weight}"),
        format!("give a number from 1 to {max}{otherwise}"),
    )
}

impl Health {
    fn check(&self) -> Result<(), ConfigError> {
        if self.timeout() > *self.every {
            return refuse(
                "health.timeout is longer than health.every",
                "give at most the time between probes, since the next waits for the last",
            )
            .within(key_path!["timeout"]);
        }
        if self.probe.is_none() && self.passive.is_none() {
            return refuse(
                "health checks that check nothing",
                "add `passive`, give a probe of another kind, or leave `health` out",
            );
        }
        Ok(())
    }
}

impl Resolver {
    fn check(&mut self) -> Result<(), ConfigError> {
        if self.servers.len() > MAX_RESOLVERS {
            return refuse(
                format!("resolver.servers has {} addresses", self.servers.len()),
                format!("give at most {MAX_RESOLVERS}"),
            )
            .within(key_path!["servers", MAX_RESOLVERS]);
        }
        let mut known = HashSet::new();
        for (index, server) in self.servers.iter_mut().enumerate() {
            let ip = server.ip().to_canonical();
            let at = |what: &str, hint: &str| {
                refuse(format!("resolver `{server}` {what}"), hint)
                    .within(key_path!["servers", index])
            };
            if server.port() == 0 || is_no_host(ip) || is_link_local(ip) {
                let hint =
                    "give a DNS server's address, not link-local or multicast, with its port: 53";
                return at("can't be asked", hint);
            }
            if !known.insert((ip, server.port())) {
                return at("is there twice", "name each once");
            }
            *server = SocketAddr::new(ip, server.port());
        }
        if self.min_ttl() > *self.max_ttl {
            return refuse(
                "resolver.min_ttl is longer than resolver.max_ttl",
                "give at most as long a time: names are asked for again in between",
            )
            .within(key_path!["min_ttl"]);
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
