//! Servers that are listeners: what goes there comes back to this proxy, by one
//! listener or several.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use super::check::{CheckedUpstream, Checker};
use super::values::{is_link_local, scope};
use super::{ConfigError, Listener, Server};

impl Checker<'_> {
    /// Refuses servers that are listeners.
    pub(super) fn refuse_loops(
        &self,
        servers: &[Server],
        listeners: &[Listener],
        upstreams: &BTreeMap<String, CheckedUpstream>,
    ) -> Result<(), ConfigError> {
        let host = Host::default();
        let used = listeners.iter().map(|listener| &listener.upstream);
        for listed in used
            .filter_map(|name| upstreams.get(name))
            .flat_map(|u| &u.servers)
        {
            let server = &servers[listed.number];
            if let Some((listener, bound)) = host.listener_at(listeners, server.address.0) {
                let message = format!(
                    "server `{}` is listener `{}` at {bound}, this proxy's own address: datagrams would go round",
                    server.name, listener.name
                );
                return Err(self
                    .error(listed.span.clone(), message)
                    .mend("give the listener or the server another port or address"));
            }
        }
        Ok(())
    }
}

/// This host, as far as it tells which addresses are its own. Asked but once, and
/// only if that matters.
#[derive(Default)]
pub(super) struct Host {
    /// Addresses of its interfaces, with the interface's number.
    own: OnceCell<Vec<(IpAddr, Option<u32>)>>,
}

impl Host {
    /// The listener that a datagram to `address` arrives at, and where it is bound.
    pub(super) fn listener_at<'a>(
        &self,
        listeners: &'a [Listener],
        address: SocketAddr,
    ) -> Option<(&'a Listener, SocketAddr)> {
        let arrives = |bound: SocketAddr| {
            let wildcard = bound.ip().is_unspecified();
            covers(bound, address) && (!wildcard || self.is_own(address))
        };
        listeners.iter().find_map(|listener| {
            let bound = listener.bind.iter().find(|bound| arrives(**bound))?;
            Some((listener, *bound))
        })
    }

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

/// Whether a datagram to `b` arrives at a socket bound to `a`.
fn covers(a: SocketAddr, b: SocketAddr) -> bool {
    let same = a.ip() == b.ip() && scope(a) == scope(b);
    a.port() == b.port() && a.is_ipv4() == b.is_ipv4() && (same || a.ip().is_unspecified())
}

/// Whether some datagrams would arrive at sockets bound to either.
pub(super) fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    covers(a, b) || covers(b, a)
}
