//! Changes of this host's network: the kernel tells of addresses, links, routes and
//! rules that come and go (rtnetlink(7)), and workers hear of those that change which
//! address a server is written to from, or by which interfaces it may answer.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use ipnet::IpNet;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr as NetlinkAddr};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use crate::config::Config;
use ppv2_engine::address::own_addresses;
use ppv2_engine::worker::WrongInterfaces;
use ppv2_hosts::doctor::add_route;
use ppv2_hosts::kernel;
use ppv2_hosts::route::{NoRoute, Packet, rules_look_deeper};
use ppv2_udp::{Cause, source_towards};

/// The groups of rtnetlink.h that tell of links, of addresses, routes and rules of both
/// families, and of `rp_filter`.
const GROUPS: [u32; 8] = [1, 5, 7, 8, 9, 11, 19, 24];

/// How long to let changes gather: an address rarely comes or goes alone.
const GATHER: Duration = Duration::from_millis(20);

/// The time between two looks at the network, however often it changes.
const PAUSE: Duration = Duration::from_millis(500);

/// Messages that are read past at a time.
const AT_ONCE: usize = 1024;

/// Watches the network.
pub(super) struct Network {
    /// `None` without a socket that tells.
    events: Option<mpsc::Receiver<Told>>,
    known: State,
}

impl Network {
    /// Watches from now on. What is so now is known of the addresses in `config`.
    pub(super) async fn watch(config: &Config) -> Self {
        let events = listen().inspect_err(|error| {
            tracing::warn!(
                "can't watch addresses and routes: {error}; allow AF_NETLINK \
                 (RestrictAddressFamilies= in the systemd unit), or sessions follow \
                 a change only once something can't be sent"
            );
        });
        let mut network = Self {
            events: events.ok(),
            known: State::default(),
        };
        network.follow(config).await;
        let names = Wanted::of(config).own;
        let missing = network.known.own.iter().filter(|(_, is_own)| !**is_own);
        for (ip, _) in missing {
            let of = names.get(ip).map_or("", String::as_str);
            tracing::warn!("address {ip} ({of}) is not on this host yet: it is used once it comes");
        }
        network
    }

    /// Knows of the addresses in `config` from now on, and of no others. Whether other
    /// [interfaces](Self::wrong_interfaces) are wrong then.
    pub(super) async fn follow(&mut self, config: &Config) -> bool {
        let mut wanted = Wanted::of(config);
        let known = &mut self.known;
        known.sources.retain(|to, _| wanted.servers.contains(to));
        known.own.retain(|ip, _| wanted.own.contains_key(ip));
        known
            .networks
            .retain(|net, _| wanted.networks.contains(net));
        // What has changed of the others is still to be found.
        wanted.servers.retain(|to| !known.sources.contains_key(to));
        wanted.own.retain(|ip, _| !known.own.contains_key(ip));
        wanted
            .networks
            .retain(|net| !known.networks.contains_key(net));
        let State {
            sources,
            own,
            networks,
            wrong,
        } = wanted.look().await;
        self.known.networks.extend(networks);
        self.known.sources.extend(sources);
        self.known.own.extend(own);
        let is_other = self.known.wrong != wrong;
        self.known.wrong = wrong;
        is_other
    }

    /// The interfaces that servers may not answer by.
    pub(super) fn wrong_interfaces(&self) -> Arc<WrongInterfaces> {
        Arc::clone(&self.known.wrong)
    }

    /// Waits until something changes, for ever without events. Nothing is lost if the
    /// future is dropped.
    pub(super) async fn changed(&mut self) -> Told {
        let told = match &mut self.events {
            Some(events) => events.recv().await,
            None => None,
        };
        match told {
            Some(told) => told,
            None => std::future::pending().await,
        }
    }

    /// Looks at what has changed, and tells the log. Whether sessions may have to follow.
    pub(super) async fn look(&mut self, told: Told, config: &Config) -> bool {
        let wanted = Wanted::of(config);
        let names = wanted.own.clone();
        let state = wanted.look().await;
        let changes = self.known.changes_to(&state);
        let is_other = self.known.wrong != state.wrong;
        self.known = state;
        changes.log(&names);
        // An address may have been gone for a moment that no look shows.
        told == Told::Addresses || is_other || !changes.is_empty()
    }
}

/// What the kernel has told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Told {
    Routes,
    /// Addresses or links, or messages were lost.
    Addresses,
}

/// Has a thread wait for changes. It ends some time after the receiver is dropped.
fn listen() -> io::Result<mpsc::Receiver<Told>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind(&NetlinkAddr::new(0, 0))?;
    for group in GROUPS {
        socket.add_membership(group)?;
    }
    let (tell, events) = mpsc::channel(1);
    let wait = move || {
        while let Some(first) = read_past(&socket, 1, RecvFlags::empty()) {
            thread::sleep(GATHER);
            let more = read_past(&socket, AT_ONCE, RecvFlags::DONTWAIT);
            if tell
                .blocking_send(more.unwrap_or(first).max(first))
                .is_err()
            {
                return;
            }
            thread::sleep(PAUSE);
        }
    };
    thread::Builder::new()
        .name("network".to_owned())
        .spawn(wait)?;
    Ok(events)
}

/// Reads past up to `count` messages. How things are is asked for afterwards, since
/// messages can get lost. `None` if there is none.
fn read_past(socket: &Socket, count: usize, flags: RecvFlags) -> Option<Told> {
    /// RTM_NEWLINK to RTM_GETADDR of rtnetlink.h.
    const LINKS_AND_ADDRESSES: std::ops::Range<u16> = 16..23;
    let mut all = None;
    let mut message = [0; 8192];
    for _ in 0..count {
        let told = match recv(socket, &mut message[..], flags) {
            Ok(_) => {
                // Behind the length (netlink(7)).
                let kind = u16::from_ne_bytes([message[4], message[5]]);
                if LINKS_AND_ADDRESSES.contains(&kind) {
                    Told::Addresses
                } else {
                    Told::Routes
                }
            }
            Err(Errno::NOBUFS | Errno::INTR) => Told::Addresses,
            Err(_) => break,
        };
        all = all.max(Some(told));
    }
    all
}

/// Addresses that something depends on.
#[derive(Clone, Default)]
struct Wanted {
    /// Servers that are written to from an address of the kernel's choice.
    servers: BTreeSet<IpAddr>,
    /// IPv4 servers that answer the proxy, each with a port that it does from.
    answering: BTreeMap<SocketAddr, u16>,
    /// What should be this host's, and what for.
    own: BTreeMap<IpAddr, String>,
    /// Source networks, whose addresses a route should make this host's.
    networks: BTreeSet<IpNet>,
}

impl Wanted {
    fn of(config: &Config) -> Self {
        let mut wanted = Self::default();
        for listener in &config.listeners {
            let concrete = listener.bind.iter().map(|bind| bind.ip());
            for ip in concrete.filter(|ip| !ip.is_unspecified()) {
                let name = format!("listener `{}`", listener.name);
                wanted.own.entry(ip).or_insert(name);
            }
            for (index, mode) in listener.servers.iter().chain(&listener.leaving) {
                let server = &config.servers[*index];
                let ip = server.address.0.ip();
                if ip.is_ipv4() && mode.takes_replies() {
                    let port = server.address.0.port();
                    wanted.answering.insert(server.id().0, port);
                }
                if !server.sources.are_given() && !mode.spoofs() {
                    wanted.servers.insert(ip);
                }
            }
        }
        for source in config.sources() {
            wanted
                .own
                .entry(source)
                .or_insert_with(|| "source".to_owned());
        }
        let networks = config.source_networks().into_iter();
        wanted.networks = networks.map(|(_, source)| source.network).collect();
        wanted
    }

    /// Asks the kernel, which takes a moment where there are many.
    async fn look(self) -> State {
        let looked = spawn_blocking(move || {
            let own = own_addresses().unwrap_or_default();
            let is_own = |ip: IpAddr| ip.is_loopback() || own.contains(&ip);
            let servers = self.servers.into_iter();
            State {
                sources: servers.filter_map(|to| Some((to, source(to)?))).collect(),
                own: self.own.into_keys().map(|ip| (ip, is_own(ip))).collect(),
                networks: self.networks.into_iter().filter_map(is_local).collect(),
                wrong: Arc::new(wrong_interfaces(
                    self.answering
                        .into_iter()
                        .filter(|(server, _)| !is_own(server.ip())),
                )),
            }
        });
        // It fails only where the runtime is ending.
        looked.await.unwrap_or_default()
    }
}

/// The address that `server` is written to from, `None` within if there is no route;
/// `None` if that can't be told now, since ports or descriptors have run out.
fn source(server: IpAddr) -> Option<Option<IpAddr>> {
    match source_towards(server) {
        Ok(source) => Some(Some(source)),
        Err(error) => (Cause::of(&error) == Cause::Unreachable).then_some(None),
    }
}

/// A source network, and whether its addresses are this host's; `None` if that can't be
/// told now.
fn is_local(network: IpNet) -> Option<(IpNet, bool)> {
    // One in the middle, since a single address may be an interface's.
    let middle = match network {
        IpNet::V4(net) => {
            let host = net.hostmask().to_bits();
            IpAddr::from(Ipv4Addr::from_bits(net.network().to_bits() | (host >> 1)))
        }
        IpNet::V6(net) => {
            let host = net.hostmask().to_bits();
            IpAddr::from(Ipv6Addr::from_bits(net.network().to_bits() | (host >> 1)))
        }
    };
    match Packet::sent_to(middle).route() {
        Ok(route) => Some((network, route.is_local)),
        Err(NoRoute::Unknown(_)) => None,
        Err(_) => Some((network, false)),
    }
}

/// How the network is.
#[derive(Debug, Default)]
struct State {
    /// By server, the address that it is written to from; `None` without a route.
    sources: BTreeMap<IpAddr, Option<IpAddr>>,
    /// Whether this host has an address.
    own: BTreeMap<IpAddr, bool>,
    /// Whether a source network's addresses are this host's.
    networks: BTreeMap<IpNet, bool>,
    wrong: Arc<WrongInterfaces>,
}

/// The interfaces by which the kernel takes nothing in of each server, by its own check of
/// the source (rp_filter in ip-sysctl). Where that is off or loose, or rules look at
/// more than addresses, no interface is wrong: replies may take another path than requests.
fn wrong_interfaces(servers: impl Iterator<Item = (SocketAddr, u16)>) -> WrongInterfaces {
    let strict = kernel::strict_interfaces();
    if strict.is_empty() || rules_look_deeper(true).unwrap_or(true) {
        return HashMap::new();
    }
    let wrong = servers.filter_map(|(server, port)| {
        let own = source_towards(server.ip()).ok()?;
        let is_wrong = |interface: &&u32| {
            let reply = Packet {
                from: Some(server.ip()),
                port: Some(port),
                input: Some(**interface),
                ..Packet::sent_to(own)
            };
            matches!(reply.route(), Err(NoRoute::BadSource(_)))
        };
        let wrong: Vec<_> = strict.iter().filter(is_wrong).copied().collect();
        (!wrong.is_empty()).then_some((server, wrong))
    });
    wrong.collect()
}

/// What is otherwise than before.
#[derive(Debug, Default, PartialEq, Eq)]
struct Changes {
    /// Servers by the address that they were written to from and the one that they are.
    sources: BTreeMap<(Option<IpAddr>, Option<IpAddr>), Vec<IpAddr>>,
    own: Vec<(IpAddr, bool)>,
    networks: Vec<(IpNet, bool)>,
}

impl State {
    fn changes_to(&self, next: &Self) -> Changes {
        let mut changes = Changes::default();
        for (server, now) in &next.sources {
            let before = self.sources.get(server).unwrap_or(now);
            if before != now {
                let same = changes.sources.entry((*before, *now));
                same.or_default().push(*server);
            }
        }
        let own = next.own.iter().map(|(ip, is_own)| (*ip, *is_own));
        let is_new = |(ip, is_own): &(IpAddr, bool)| self.own.get(ip).is_some_and(|o| o != is_own);
        changes.own = own.filter(is_new).collect();
        let networks = next.networks.iter().map(|(net, is_own)| (*net, *is_own));
        let is_new =
            |(net, is_own): &(IpNet, bool)| self.networks.get(net).is_some_and(|o| o != is_own);
        changes.networks = networks.filter(is_new).collect();
        changes
    }
}

impl Changes {
    fn is_empty(&self) -> bool {
        self.sources.is_empty() && self.own.is_empty() && self.networks.is_empty()
    }

    /// A line for each.
    fn log(&self, names: &BTreeMap<IpAddr, String>) {
        for (ip, is_own) in &self.own {
            let of = names.get(ip).map_or("", String::as_str);
            if *is_own {
                tracing::info!("address {ip} ({of}) is on this host now");
            } else {
                tracing::warn!(
                    "address {ip} ({of}) is gone from this host: nothing is sent from it until it is back"
                );
            }
        }
        for (network, is_own) in &self.networks {
            if *is_own {
                tracing::info!(
                    "the addresses of source network {network} are this host's again: its sessions go on"
                );
            } else {
                let fix = add_route(*network);
                tracing::warn!(
                    "the addresses of source network {network} are no longer this host's: its sessions get no replies until they are; fix: {fix}"
                );
            }
        }
        for ((before, now), servers) in &self.sources {
            let (first, count) = (servers[0], servers.len());
            match (before, now) {
                (Some(before), Some(now)) => tracing::info!(
                    server = %first,
                    servers = count,
                    "servers are written to from {now} instead of {before}: sessions go on from there at their next datagram"
                ),
                (None, Some(now)) => tracing::info!(
                    server = %first,
                    servers = count,
                    "there is a route to servers again, from {now}"
                ),
                (_, None) => tracing::warn!(
                    server = %first,
                    servers = count,
                    "there is no route to servers any more; check this host's addresses and routes"
                ),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_otherwise_than_before_is_a_change() {
        let ip = |last| IpAddr::from([192, 0, 2, last]);
        let net = |third| IpNet::new_assert(IpAddr::from([10, 99, third, 0]), 24);
        let before = State {
            sources: [(ip(1), Some(ip(10))), (ip(2), Some(ip(10))), (ip(3), None)].into(),
            own: [(ip(10), true), (ip(11), true)].into(),
            networks: [(net(1), true), (net(2), true)].into(),
            wrong: Arc::default(),
        };
        assert!(before.changes_to(&before).is_empty());
        let now = State {
            // Of one that is new, nothing was known.
            sources: [(ip(1), Some(ip(11))), (ip(3), None), (ip(4), None)].into(),
            own: [(ip(10), false), (ip(11), true), (ip(12), false)].into(),
            networks: [(net(1), true), (net(2), false), (net(3), false)].into(),
            wrong: Arc::default(),
        };
        let expected = Changes {
            sources: [((Some(ip(10)), Some(ip(11))), vec![ip(1)])].into(),
            own: vec![(ip(10), false)],
            networks: vec![(net(2), false)],
        };
        assert_eq!(before.changes_to(&now), expected);
    }
}
