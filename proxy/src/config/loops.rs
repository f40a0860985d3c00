//! What could loop for ever: servers that are listeners of this proxy, and proxies that
//! take each other for clients.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::values::{is_link_local, scope};
use super::{Bind, Listener};
use ppv2_engine::address::PortRange;
use ppv2_hosts::kernel;

/// A warning where a listener's address suggests that other proxies have it, too.
pub(super) fn suspect_peers(listeners: &[Listener]) -> Option<String> {
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    // An IPv4 address with a label is listed under that (ip-address(8)).
    let name = |of: &str| of.split(':').next().unwrap_or_default().to_owned();
    let own = interfaces.iter().map(|one| (one.ip(), name(&one.name)));
    let own: BTreeMap<_, _> = own.collect();
    // What pretends to be another proxy's reply has no header, and is dropped.
    let mut listeners = listeners.iter().filter(|one| one.takes_direct_clients());
    let (listener, sign) = listeners.find_map(|listener| {
        let sign = |bound: &Bind| sign_of_peers(bound.ip(), listener.freebind, &own);
        Some((listener, listener.bind.iter().find_map(sign)?))
    })?;
    Some(format!(
        "listener `{}`: {sign}: other proxies may serve this address. List them in `peers`, or set `peers = []` if there are none; otherwise one forged datagram can make two proxies answer each other endlessly",
        listener.name
    ))
}

/// Why other proxies may have an address, too. `own` has the addresses of this host with
/// their interfaces.
fn sign_of_peers(ip: IpAddr, freebind: bool, own: &BTreeMap<IpAddr, String>) -> Option<String> {
    if ip.is_unspecified() || ip.is_loopback() {
        return None;
    }
    match own.get(&ip).map(String::as_str) {
        Some("lo") => Some(format!(
            "{ip} is an address of lo, as anycast addresses are"
        )),
        Some(_) => None,
        None if freebind => Some(format!(
            "{ip} is not an address of this host now, and `freebind` is on"
        )),
        None => {
            let family = if ip.is_ipv4() { "ipv4" } else { "ipv6" };
            let is_set = kernel::parameter(&format!("net/{family}/ip_nonlocal_bind")) == Some(1);
            is_set.then(|| {
                format!("{ip} is not an address of this host now, and net.{family}.ip_nonlocal_bind is 1")
            })
        }
    }
}

/// The addresses of all listeners, none of which overlaps with another. All are
/// canonical, so that the same address is the same value.
#[derive(Default)]
pub(super) struct Bound {
    /// The number of the listener that has each address, and by what it does.
    listeners: HashMap<SocketAddr, (usize, Bind)>,
    /// The first that has each port of a family.
    of_port: HashMap<(bool, u16), Bind>,
    ips: HashSet<IpAddr>,
}

impl Bound {
    pub(super) fn of(listeners: &[Listener]) -> Self {
        let mut bound = Self::default();
        for (number, listener) in listeners.iter().enumerate() {
            for bind in &listener.bind {
                bound.insert(*bind, number);
            }
        }
        bound
    }

    /// Adds the addresses of listener `number`, unless some datagrams would arrive at
    /// both one of them and another address, by what that is bound is returned.
    pub(super) fn add(&mut self, bind: Bind, number: usize) -> Result<(), Bind> {
        let other = |address: SocketAddr| match address.ip().is_unspecified() {
            true => self.of_port.get(&(address.is_ipv4(), address.port())),
            false => [address, wildcard_of(address)]
                .into_iter()
                .find_map(|other| Some(&self.listeners.get(&other)?.1)),
        };
        match bind.addresses().find_map(other) {
            Some(other) => Err(*other),
            None => {
                self.insert(bind, number);
                Ok(())
            }
        }
    }

    fn insert(&mut self, bind: Bind, number: usize) {
        self.ips.insert(bind.ip());
        for address in bind.addresses() {
            let port = (address.is_ipv4(), address.port());
            self.listeners.insert(address, (number, bind));
            self.of_port.entry(port).or_insert(bind);
        }
    }

    /// The number of the listener that a datagram to `address` arrives at, and where
    /// that is bound.
    pub(super) fn arrives_at(&self, address: SocketAddr, host: &Host) -> Option<(usize, Bind)> {
        let wildcard = wildcard_of(address);
        let at = |bound| self.listeners.get(&bound).copied();
        at(address).or_else(|| at(wildcard).filter(|_| host.is_own(address)))
    }
}

/// Listeners that have others as their servers, by number. None leads back to itself.
#[derive(Default)]
pub(super) struct Chains {
    next: BTreeMap<usize, BTreeSet<usize>>,
}

impl Chains {
    /// Adds a step, unless it closes a loop.
    pub(super) fn add(&mut self, from: usize, to: usize) -> bool {
        let is_loop = self.leads(to, from);
        if !is_loop {
            self.next.entry(from).or_default().insert(to);
        }
        !is_loop
    }

    /// Whether datagrams to listener `from` can arrive at listener `to`.
    fn leads(&self, from: usize, to: usize) -> bool {
        let (mut known, mut open) = (BTreeSet::from([from]), vec![from]);
        while let Some(number) = open.pop() {
            let next = self.next.get(&number).into_iter().flatten();
            open.extend(next.copied().filter(|next| known.insert(*next)));
        }
        known.contains(&to)
    }
}

impl Bound {
    /// As [`arrives_at`](Self::arrives_at), of what is sent to a server: each listener once.
    pub(super) fn arrive_at(
        &self,
        address: SocketAddr,
        ports: Option<PortRange>,
        host: &Host,
    ) -> Vec<(usize, Bind)> {
        let Some(ports) = ports else {
            return self.arrives_at(address, host).into_iter().collect();
        };
        // Few servers have an address of this host's, and most ranges are long.
        if !self.ips.contains(&address.ip()) && !host.is_own(address) {
            return Vec::new();
        }
        let all = Bind::new(address, ports).addresses();
        let all = all.filter_map(|address| self.arrives_at(address, host));
        let by_number: BTreeMap<_, _> = all.collect();
        by_number.into_iter().collect()
    }
}

/// The wildcard that covers `address`.
fn wildcard_of(address: SocketAddr) -> SocketAddr {
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    SocketAddr::new(any, address.port())
}

/// This host, as far as it tells which addresses are its own. Asked but once, and
/// only if that matters.
#[derive(Default)]
pub(super) struct Host {
    /// Addresses of its interfaces, with the interface's number.
    own: OnceCell<Vec<(IpAddr, Option<u32>)>>,
}

impl Host {
    fn is_own(&self, address: SocketAddr) -> bool {
        let (ip, scope) = (address.ip(), scope(address));
        let same = |(own, index): &(IpAddr, Option<u32>)| {
            let on_it = !is_link_local(ip) || index.is_none_or(|index| index == scope);
            *own == ip && on_it
        };
        ip.is_loopback() || self.own.get_or_init(own_addresses).iter().any(same)
    }
}

/// None are known where the kernel doesn't tell; loopback is recognised without
/// them.
fn own_addresses() -> Vec<(IpAddr, Option<u32>)> {
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    let address = |interface: &if_addrs::Interface| (interface.ip(), interface.index);
    interfaces.iter().map(address).collect()
}
