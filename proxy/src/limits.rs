//! How many sessions this host can bear: each takes a file descriptor and a
//! local port, and both end before memory does.

use std::fs;

use crate::admin;
use crate::config::{Config, Listener};
use crate::health;
use crate::mode::Mode;
use crate::names;

/// Descriptors for everything that is no session and no worker's: every admin
/// connection that there can be, and as many again for the admin listener,
/// standard streams, the pipe of signals, the epoll and eventfd that go with
/// them, and what the process inherited.
const SPARE_DESCRIPTORS: usize = 2 * admin::MAX_CONNECTIONS;

/// What each worker takes besides its listening sockets: epoll and eventfd.
const WORKER_DESCRIPTORS: usize = 2;

/// One in so many of the sockets is kept for sessions that have ended, so that
/// their ports rest before another session gets them.
const RETIRED_SHARE: usize = 16;

/// One in so many local ports is left to the rest of the host, whose own
/// queries would fail without.
const HOST_SHARE: usize = 32;

/// Sessions in clients' names that there are at the most, unless the configuration
/// says otherwise: no local port bounds them, and each takes kernel memory, some
/// kilobytes, as long as whoever forges its client's address likes.
const IN_CLIENTS_NAMES: usize = 100_000;

const PORT_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// Sockets that sessions can have at the most, and how they are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ceiling {
    /// What descriptors leave.
    pub descriptors: usize,
    /// What local ports leave; `None` if no session takes one of the host's own.
    pub ports: Option<usize>,
    /// The most sessions, by configuration or by this ceiling.
    pub max_sessions: usize,
    /// The most sockets, of sessions and of ended ones whose ports rest.
    pub max_sockets: usize,
    /// The most ended sessions that rest.
    pub max_retired: usize,
}

impl Ceiling {
    /// Raises the soft limit of open files to the hard one, and reads what the
    /// kernel leaves to sessions under `config`. Each source address has local
    /// ports of its own.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        let descriptors = rlimit::increase_nofile_limit(u64::MAX).unwrap_or(1024);
        let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
        let workers = config.worker_count() * WORKER_DESCRIPTORS;
        let probed = config.servers.iter().filter(|server| server.is_probed());
        let probes = probed.count().min(health::MAX_PROBES);
        let lookups = match config.names.is_empty() {
            true => 0,
            false => names::MAX_SOCKETS,
        };
        let taken = SPARE_DESCRIPTORS + probes + lookups + workers + config.listening_sockets();
        let descriptors = descriptors.saturating_sub(taken);
        let range = fs::read_to_string(PORT_RANGE).unwrap_or_default();
        let ports = ports_in(&range).unwrap_or(28_232);
        let sources = config.sources().len().max(1);
        // Each client address has ports of its own.
        let mut modes = config.listeners.iter().flat_map(Listener::modes);
        let in_clients_names = modes.all(Mode::spoofs);
        let ports = (!in_clients_names).then_some(ports * sources);
        Self::new(config.max_sessions, descriptors, ports)
    }

    fn new(configured: Option<usize>, descriptors: usize, ports: Option<usize>) -> Self {
        let by_ports = ports.map_or(IN_CLIENTS_NAMES, |ports| ports - ports / HOST_SHARE);
        let sockets = descriptors.min(by_ports).max(1);
        let running = (sockets - sockets / RETIRED_SHARE).max(1);
        let max_sessions = configured.unwrap_or(running);
        let max_sockets = sockets.max(max_sessions);
        Self {
            descriptors,
            ports,
            max_sessions,
            max_sockets,
            max_retired: max_sockets,
        }
    }

    /// What will run out before the configured number of sessions is reached,
    /// in words for the operator.
    #[must_use]
    pub fn shortfall(&self) -> Option<String> {
        let max = self.max_sessions;
        let descriptors = self.descriptors;
        let ports = self.ports.unwrap_or(usize::MAX);
        if max > descriptors {
            Some(format!(
                "max_sessions is {max}, open files allow {descriptors}; raise the hard limit (LimitNOFILE)"
            ))
        } else if max > ports {
            Some(format!(
                "max_sessions is {max}, local ports allow {ports}; widen net.ipv4.ip_local_port_range or add addresses to `source`"
            ))
        } else {
            None
        }
    }
}

fn ports_in(range: &str) -> Option<usize> {
    let mut bounds = range.split_whitespace().map(str::parse::<usize>);
    let (Some(Ok(first)), Some(Ok(last))) = (bounds.next(), bounds.next()) else {
        return None;
    };
    (last + 1).checked_sub(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scarcer_resource_decides() {
        let by_descriptors = Ceiling::new(None, 1600, Some(28_232));
        assert_eq!(by_descriptors.max_sessions, 1500);
        assert_eq!(by_descriptors.max_sockets, 1600);
        assert_eq!(Ceiling::new(None, 1_000_000, Some(1600)).max_sockets, 1550);
        assert_eq!(by_descriptors.shortfall(), None);
    }

    #[test]
    fn a_configured_number_stands_and_its_shortfall_is_named() {
        let ceiling = Ceiling::new(Some(30_000), 100_000, Some(28_232));
        assert_eq!(
            (ceiling.max_sessions, ceiling.max_sockets),
            (30_000, 30_000)
        );
        assert!(ceiling.shortfall().unwrap().contains("ip_local_port_range"));
        let ceiling = Ceiling::new(Some(2000), 1000, Some(28_232));
        assert!(ceiling.shortfall().unwrap().contains("LimitNOFILE"));
    }

    #[test]
    fn the_port_range_is_read_as_the_kernel_writes_it() {
        assert_eq!(ports_in("32768\t60999\n"), Some(28_232));
        assert_eq!(ports_in(""), None);
        assert_eq!(ports_in("5 1"), None);
    }
}
