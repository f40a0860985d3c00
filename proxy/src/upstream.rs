//! Upstreams: named groups of servers, and which of them a new session gets.

use std::net::IpAddr;
use std::sync::Arc;

use crate::address::ServerAddr;
use crate::mode::Mode;

/// A member of an upstream.
#[derive(Clone, Debug)]
pub struct Server {
    /// Number of the server among all servers of the proxy, by which it is
    /// counted.
    pub number: usize,
    /// Where it listens.
    pub address: ServerAddr,
    /// What it is sent.
    pub mode: Mode,
    /// Addresses of this host to send from, in turn; empty for the kernel's
    /// choice. Each has local ports of its own.
    pub sources: Arc<[IpAddr]>,
}

/// Gives each new session the next server in turn.
///
/// Every worker has one of its own and starts elsewhere, so that workers share
/// nothing and a few sessions spread all the same.
#[derive(Clone, Debug)]
pub struct RoundRobin {
    servers: Vec<Server>,
    next: usize,
}

impl RoundRobin {
    /// Turns through `servers`, beginning with number `start`.
    #[must_use]
    pub fn new(servers: Vec<Server>, start: usize) -> Self {
        Self {
            servers,
            next: start,
        }
    }

    /// The server for a new session; `None` only if there are none at all.
    pub fn pick(&mut self) -> Option<&Server> {
        if self.servers.is_empty() {
            return None;
        }
        let index = self.next % self.servers.len();
        self.next = index + 1;
        self.servers.get(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_server_gets_its_turn() {
        let servers = (0..3)
            .map(|number| Server {
                number,
                address: ServerAddr(([192, 0, 2, 1], 53).into()),
                mode: Mode::Plain,
                sources: Arc::from([]),
            })
            .collect();
        let mut turns = RoundRobin::new(servers, 2);
        let picked: Vec<_> = (0..7).map(|_| turns.pick().unwrap().number).collect();
        assert_eq!(picked, [2, 0, 1, 2, 0, 1, 2]);
        assert!(RoundRobin::new(Vec::new(), 5).pick().is_none());
    }
}
