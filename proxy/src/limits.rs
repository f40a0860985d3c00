//! How many sessions this host allows: each takes a file descriptor, a local port and
//! some kilobytes of memory.

use std::fs;

use crate::admin;
use crate::config::{Config, Listener};
use crate::discovery;
use crate::health;
use crate::memory::{self, MemoryLimit};
use ppv2_engine::mode::Mode;

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

/// Memory that a session takes, in bytes, most of it the kernel's for its socket:
/// 3,500 to 3,800 were measured.
const SESSION_BYTES: u64 = 4096;

/// Memory that the process takes without sessions, in bytes, and what each worker adds.
/// About a half was measured; lists of thousands of servers take some of the rest.
const PROCESS_BYTES: u64 = 12 << 20;
const WORKER_BYTES: u64 = 2 << 20;

/// One in so many bytes of memory is left to datagrams that wait in sockets.
const QUEUES_SHARE: u64 = 4;

const PORT_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// Sockets that sessions can have at the most, and how they are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ceiling {
    /// What descriptors leave.
    pub descriptors: usize,
    /// What local ports leave; `None` if no session takes one of the host's own.
    pub ports: Option<usize>,
    /// What memory leaves, about; `None` if the kernel doesn't tell how much there is.
    pub memory: Option<usize>,
    /// What the configuration says, which may be more than there can be.
    pub configured: Option<usize>,
    /// The most sessions, by configuration or by this ceiling, and never more than
    /// descriptors allow.
    pub max_sessions: usize,
    /// The most sockets, of sessions and of ended ones whose ports rest.
    pub max_sockets: usize,
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
            false => discovery::MAX_SOCKETS,
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
        let memory = memory::limit().map(|limit| sessions_in(&limit, config.worker_count()));
        let max_sessions = config.limits.max_sessions.map(|most| *most);
        Self::new(max_sessions, descriptors, ports, memory)
    }

    fn new(
        configured: Option<usize>,
        descriptors: usize,
        ports: Option<usize>,
        memory: Option<usize>,
    ) -> Self {
        let by_ports = ports.map_or(IN_CLIENTS_NAMES, |ports| ports - ports / HOST_SHARE);
        let by_memory = memory.unwrap_or(usize::MAX);
        let sockets = descriptors.min(by_ports).min(by_memory).max(1);
        let running = (sockets - sockets / RETIRED_SHARE).max(1);
        // With more, sessions would take the descriptors that the admin address needs.
        let allowed = configured.map(|wanted| wanted.min(descriptors).max(1));
        let max_sessions = allowed.unwrap_or(running);
        let max_sockets = sockets.max(max_sessions);
        Self {
            descriptors,
            ports,
            memory,
            configured,
            max_sessions,
            max_sockets,
        }
    }

    /// What will run out before the configured number of sessions is reached,
    /// in words for the operator.
    #[must_use]
    pub fn shortfall(&self) -> Option<String> {
        let wanted = self.configured.unwrap_or(self.max_sessions);
        let descriptors = self.descriptors;
        let ports = self.ports.unwrap_or(usize::MAX);
        let memory = self.memory.unwrap_or(usize::MAX);
        if wanted > descriptors {
            Some(format!(
                "max_sessions is {wanted}, open files allow {descriptors}, so {} apply; raise the hard limit (LimitNOFILE)",
                self.max_sessions
            ))
        } else if wanted > memory {
            Some(format!(
                "max_sessions is {wanted}, memory allows about {memory}, and the kernel ends a process that exceeds its limit; raise that (MemoryMax, docker run --memory) or lower max_sessions"
            ))
        } else if wanted > ports {
            Some(format!(
                "max_sessions is {wanted}, local ports allow {ports}; widen net.ipv4.ip_local_port_range or add addresses to `source`"
            ))
        } else {
            None
        }
    }
}

/// About how many sessions there is memory for.
fn sessions_in(limit: &MemoryLimit, workers: usize) -> usize {
    let workers = u64::try_from(workers).unwrap_or(u64::MAX);
    let process = WORKER_BYTES
        .saturating_mul(workers)
        .saturating_add(PROCESS_BYTES);
    let left = limit.bytes.saturating_sub(process);
    let sessions = (left - left / QUEUES_SHARE) / SESSION_BYTES;
    usize::try_from(sessions).unwrap_or(usize::MAX)
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
    fn the_scarcest_resource_decides() {
        let of = |descriptors, ports, memory| Ceiling::new(None, descriptors, ports, memory);
        let by_descriptors = of(1600, Some(28_232), Some(2000));
        assert_eq!(by_descriptors.max_sessions, 1500);
        assert_eq!(by_descriptors.max_sockets, 1600);
        assert_eq!(of(1_000_000, Some(1600), None).max_sockets, 1550);
        let by_memory = of(1_000_000, Some(28_232), Some(1600));
        assert_eq!(
            (by_memory.max_sessions, by_memory.max_sockets),
            (1500, 1600)
        );
        for ceiling in [by_descriptors, by_memory] {
            assert_eq!(ceiling.shortfall(), None);
        }
    }

    #[test]
    fn a_configured_number_stands_and_its_shortfall_is_named() {
        let of = |configured, descriptors, memory| {
            let ceiling = Ceiling::new(Some(configured), descriptors, Some(28_232), memory);
            (ceiling, ceiling.shortfall().unwrap_or_default())
        };
        let (ceiling, shortfall) = of(30_000, 100_000, None);
        assert_eq!(
            (ceiling.max_sessions, ceiling.max_sockets),
            (30_000, 30_000)
        );
        assert!(shortfall.contains("ip_local_port_range"), "{shortfall}");
        let (ceiling, shortfall) = of(3000, 100_000, Some(2000));
        assert_eq!((ceiling.max_sessions, ceiling.max_sockets), (3000, 3000));
        assert!(shortfall.contains("about 2000"), "{shortfall}");
        assert!(of(2000, 2000, Some(2000)).1.is_empty());
    }

    #[test]
    fn no_configured_number_takes_the_spare_descriptors() {
        for (configured, applies) in [(2000, 1000), (1000, 1000), (usize::MAX, 1000)] {
            let ceiling = Ceiling::new(Some(configured), 1000, None, None);
            assert_eq!(
                (ceiling.max_sessions, ceiling.max_sockets),
                (applies, applies)
            );
            let shortfall = ceiling.shortfall().unwrap_or_default();
            assert_eq!(configured > applies, shortfall.contains("LimitNOFILE"));
            assert_eq!(configured > applies, shortfall.contains("so 1000 apply"));
        }
        assert_eq!(Ceiling::new(Some(5), 0, None, None).max_sessions, 1);
    }

    #[test]
    fn memory_is_for_the_process_first_and_then_for_sessions() {
        let of = |megabytes: u64, workers| {
            let bytes = megabytes << 20;
            let source = "memory.max".into();
            sessions_in(&MemoryLimit { bytes, source }, workers)
        };
        assert_eq!((of(0, 1), of(14, 1), of(15, 1)), (0, 0, 192));
        // Three quarters of 48 MiB, at 4 KiB each.
        assert_eq!(of(64, 2), 9216);
        assert_eq!(of(1, usize::MAX), 0);
    }

    #[test]
    fn the_port_range_is_read_as_the_kernel_writes_it() {
        assert_eq!(ports_in("32768\t60999\n"), Some(28_232));
        assert_eq!(ports_in(""), None);
        assert_eq!(ports_in("5 1"), None);
    }
}
