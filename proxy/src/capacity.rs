//! How many sessions this host allows: each takes a file descriptor, a local port and
//! some kilobytes of memory.

use std::fs;

use ppv2_engine::mode::Mode;

use crate::admin;
use crate::config::{Config, Listener};
use crate::discovery;
use crate::health;
use crate::memory::{self, MemoryLimit};

/// Descriptors for everything but sessions and workers: every possible admin connection,
/// and as many for the admin listener, standard streams, signals, the runtime's epoll and
/// eventfd, and inherited ones.
const SPARE_DESCRIPTORS: usize = 2 * admin::MAX_CONNECTIONS;

/// Descriptors of a worker besides its listening sockets: epoll and eventfd.
const WORKER_DESCRIPTORS: usize = 2;

/// One in so many sockets is kept for sessions that have ended, so that their ports rest
/// before another session gets them.
const RETIRED_SHARE: usize = 16;

/// One in so many local ports is left to the rest of the host, whose own queries would
/// fail without.
const HOST_SHARE: usize = 32;

/// The default maximum of sessions in clients' names. No local port bounds them, and each
/// takes some kilobytes of kernel memory, for as long as an attacker who forges client
/// addresses wants.
const SPOOFED_SESSIONS: usize = 100_000;

/// Memory of a session in bytes, most of it the kernel's for its socket: 3,500 to 3,800
/// were measured.
const SESSION_BYTES: u64 = 4096;

/// Memory of the process without sessions, in bytes, and of each worker. About half was
/// measured; lists of thousands of servers take some of the rest.
const PROCESS_BYTES: u64 = 12 << 20;
const WORKER_BYTES: u64 = 2 << 20;

/// One in so many bytes of memory is left to datagrams that wait in sockets.
const QUEUES_SHARE: u64 = 4;

const PORT_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// Ports in the kernel's default range.
const DEFAULT_PORTS: usize = 28_232;

/// How many sessions and sockets there can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostCapacity {
    /// Sessions that descriptors allow.
    pub descriptors: usize,
    /// Sessions that local ports allow; `None` if no session takes one.
    pub ports: Option<usize>,
    /// Sessions that memory allows, about; `None` if the kernel doesn't say how much
    /// there is.
    pub memory: Option<usize>,
    /// `max_sessions` of the configuration, which may be higher.
    pub configured: Option<usize>,
    /// The maximum of sessions, never higher than descriptors allow.
    pub max_sessions: usize,
    /// The maximum of sockets: of sessions, and of ended sessions whose ports rest.
    pub max_sockets: usize,
}

impl HostCapacity {
    /// Raises the soft limit of open files to the hard limit, and reads what the kernel
    /// leaves to sessions of `config`.
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
        // Each source address has local ports of its own, and so has each client's.
        let sources = config.sources().len().max(1);
        let mut modes = config.listeners.iter().flat_map(Listener::modes);
        let ports = ports_in(&range).unwrap_or(DEFAULT_PORTS) * sources;
        let ports = (!modes.all(Mode::spoofs)).then_some(ports);
        let memory = memory::limit().map(|limit| sessions_in(&limit, config.worker_count()));
        let configured = config.limits.max_sessions.map(|most| *most);
        Self::new(configured, descriptors, ports, memory)
    }

    fn new(
        configured: Option<usize>,
        descriptors: usize,
        ports: Option<usize>,
        memory: Option<usize>,
    ) -> Self {
        let by_ports = ports.map_or(SPOOFED_SESSIONS, |ports| ports - ports / HOST_SHARE);
        let by_memory = memory.unwrap_or(usize::MAX);
        let sockets = descriptors.min(by_ports).min(by_memory).max(1);
        let running = (sockets - sockets / RETIRED_SHARE).max(1);
        // More sessions would take the descriptors of the admin address.
        let allowed = configured.map(|wanted| wanted.min(descriptors).max(1));
        let max_sessions = allowed.unwrap_or(running);
        Self {
            descriptors,
            ports,
            memory,
            configured,
            max_sessions,
            max_sockets: sockets.max(max_sessions),
        }
    }

    /// Which resource runs out before `max_sessions` is reached, for the operator.
    #[must_use]
    pub fn shortfall(&self) -> Option<String> {
        let wanted = self.configured.unwrap_or(self.max_sessions);
        let (descriptors, applied) = (self.descriptors, self.max_sessions);
        let is_short = |allowed: &usize| wanted > *allowed;
        let why = if wanted > descriptors {
            format!(
                "open files allow {descriptors}, so {applied} apply; raise the hard limit (LimitNOFILE)"
            )
        } else if let Some(memory) = self.memory.filter(is_short) {
            format!(
                "memory allows about {memory}, and the kernel ends a process that exceeds its limit; raise that (MemoryMax, docker run --memory) or lower max_sessions"
            )
        } else {
            let ports = self.ports.filter(is_short)?;
            format!(
                "local ports allow {ports}; widen net.ipv4.ip_local_port_range or add addresses to `source`"
            )
        };
        Some(format!("max_sessions is {wanted}, {why}"))
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

/// How many ports are in a range such as `32768 60999`.
fn ports_in(range: &str) -> Option<usize> {
    let (first, last) = range.trim().split_once(char::is_whitespace)?;
    let (first, last): (usize, usize) = (first.parse().ok()?, last.trim().parse().ok()?);
    (last + 1).checked_sub(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scarcest_resource_decides() {
        let of = |descriptors, ports, memory| HostCapacity::new(None, descriptors, ports, memory);
        let by_descriptors = of(1600, Some(28_232), Some(2000));
        assert_eq!(by_descriptors.max_sessions, 1500);
        assert_eq!(by_descriptors.max_sockets, 1600);
        assert_eq!(of(1_000_000, Some(1600), None).max_sockets, 1550);
        let by_memory = of(1_000_000, Some(28_232), Some(1600));
        assert_eq!(
            (by_memory.max_sessions, by_memory.max_sockets),
            (1500, 1600)
        );
        for capacity in [by_descriptors, by_memory] {
            assert_eq!(capacity.shortfall(), None);
        }
    }

    #[test]
    fn a_configured_maximum_applies_and_its_shortfall_is_reported() {
        let of = |configured, descriptors, memory| {
            let capacity = HostCapacity::new(Some(configured), descriptors, Some(28_232), memory);
            (capacity, capacity.shortfall().unwrap_or_default())
        };
        let (capacity, shortfall) = of(30_000, 100_000, None);
        assert_eq!(
            (capacity.max_sessions, capacity.max_sockets),
            (30_000, 30_000)
        );
        assert!(shortfall.contains("ip_local_port_range"), "{shortfall}");
        let (capacity, shortfall) = of(3000, 100_000, Some(2000));
        assert_eq!((capacity.max_sessions, capacity.max_sockets), (3000, 3000));
        assert!(shortfall.contains("about 2000"), "{shortfall}");
        assert!(of(2000, 2000, Some(2000)).1.is_empty());
    }

    #[test]
    fn a_configured_maximum_leaves_spare_descriptors() {
        for (configured, applies) in [(2000, 1000), (1000, 1000), (usize::MAX, 1000)] {
            let capacity = HostCapacity::new(Some(configured), 1000, None, None);
            assert_eq!(
                (capacity.max_sessions, capacity.max_sockets),
                (applies, applies)
            );
            let shortfall = capacity.shortfall().unwrap_or_default();
            assert_eq!(configured > applies, shortfall.contains("LimitNOFILE"));
            assert_eq!(configured > applies, shortfall.contains("so 1000 apply"));
        }
        assert_eq!(HostCapacity::new(Some(5), 0, None, None).max_sessions, 1);
    }

    #[test]
    fn sessions_get_the_memory_that_the_process_leaves() {
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
    fn the_kernels_port_range_is_read() {
        assert_eq!(ports_in("32768\t60999\n"), Some(28_232));
        assert_eq!(ports_in(""), None);
        assert_eq!(ports_in("5 1"), None);
    }
}
