//! Upstreams: named groups of servers, and which of them a new session gets.
//!
//! A [`Plan`] says which servers take new sessions and how these are spread; it is
//! made on the control path, by [`Balance`] and the [`State`] of each server. Each
//! worker has a [`Balancer`] of its own that follows it.

mod affinity;
mod balance;
mod maglev;
mod plan;
mod turns;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use crate::address::ServerAddr;
use crate::mode::Mode;

pub use affinity::HashOn;
pub use balance::Balancer;
pub use maglev::MAX_SERVERS;
pub use plan::{Balance, Member, Plan, State};
pub use turns::MAX_WEIGHT;

/// What a server goes by in logs and metrics. Whoever has to do with a server
/// holds it: while anybody does, no other server gets its number.
#[derive(Debug, PartialEq, Eq)]
pub struct ServerName {
    /// Its upstream.
    pub upstream: String,
    /// Its own name there.
    pub server: String,
}

/// A member of an upstream.
#[derive(Clone, Debug)]
pub struct Server {
    /// Number of the server among all servers of the proxy, by which it is
    /// counted.
    pub number: usize,
    /// What it goes by.
    pub name: Arc<ServerName>,
    /// Where it listens.
    pub address: ServerAddr,
    /// What it is sent.
    pub mode: Mode,
    /// Addresses of this host to send from, in turn; empty for the kernel's
    /// choice. Each has local ports of its own.
    pub sources: Arc<[IpAddr]>,
}

/// One thing for IPv4 clients and another for IPv6 clients.
#[derive(Clone, Debug)]
pub struct ByFamily<T>([T; 2]);

impl<T> ByFamily<T> {
    /// Has `make` make both, told whether it is for IPv6.
    pub fn new(make: impl FnMut(bool) -> T) -> Self {
        Self([false, true].map(make))
    }

    /// The one for IPv6 clients, or for IPv4 ones.
    #[must_use]
    pub fn get(&self, v6: bool) -> &T {
        &self.0[usize::from(v6)]
    }

    /// The one for this client.
    pub fn of(&mut self, client: IpAddr) -> &mut T {
        &mut self.0[usize::from(client.is_ipv6())]
    }

    /// Has `change` change both, told whether it is for IPv6.
    pub fn each(&mut self, mut change: impl FnMut(bool, &mut T)) {
        for (v6, one) in [false, true].into_iter().zip(&mut self.0) {
            change(v6, one);
        }
    }

    /// Both.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter()
    }
}

/// Sessions that stand or fall together: those of one listener with one server,
/// by their numbers, and of one address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    /// Number of the listener.
    pub listener: usize,
    /// Number of the server.
    pub server: usize,
    /// Of IPv6 clients rather than of IPv4 ones.
    pub v6: bool,
}

/// Where sessions go: what the control path tells workers anew when a server goes
/// down, comes back or is to be left.
#[derive(Debug, Default)]
pub struct Steering {
    /// Another one for each change.
    pub version: u64,
    /// By number of the listener: how new sessions are spread.
    pub plans: Vec<ByFamily<Arc<Plan>>>,
    /// Sessions that are to go elsewhere, at their client's next datagram.
    pub leave: BTreeSet<Route>,
    /// Where sessions go back to that new ones of their clients would be given.
    pub returns: BTreeSet<Route>,
    /// Numbers of servers whose sessions stay, whatever returns.
    pub draining: BTreeSet<usize>,
    /// Numbers of servers that are down, which may have sessions all the same.
    pub down: BTreeSet<usize>,
}

impl Steering {
    /// Whether any session may have to go elsewhere.
    #[must_use]
    pub fn moves_any(&self) -> bool {
        !self.leave.is_empty() || !self.returns.is_empty()
    }
}
