//! How many sessions this host allows. One with a socket of its own takes a file
//! descriptor, a local port and some kilobytes of memory; one on a source network takes an
//! address of it and some hundred bytes; one with tagged replies just these bytes.

use std::fs;

use ppv2_engine::mode::Mode;

use crate::admin;
use crate::config::{self, Config, Listener};
use crate::discovery;
use crate::health;
use crate::memory::{self, MemoryLimit};

/// Descriptors for everything but sessions and workers: every possible admin connection,
/// and as many for the admin listener, standard streams, signals, the runtime's epoll and
/// eventfd, and inherited ones.
const SPARE_DESCRIPTORS: usize = 2 * admin::MAX_CONNECTIONS;

/// Descriptors of a worker besides its listening sockets: epoll and eventfd.
const WORKER_DESCRIPTORS: usize = 2;

/// Descriptors that the process needs at least, besides those of workers: standard streams,
/// the runtime's, and some that come and go.
const FEWEST_DESCRIPTORS: usize = 32;

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

/// The default maximum of sessions on source networks or with tagged replies. Neither descriptors
/// nor ports bound them, and an attacker who forges client addresses could fill the host's memory.
const NETWORK_SESSIONS: usize = 1_000_000;

/// Of this many addresses of a source network, one session has one: the others rest after
/// use, so that late replies reach nobody.
const RESTING_ADDRESSES: usize = 2;

/// Memory of a session in bytes, most of it the kernel's for its socket: 3,500 to 3,800
/// were measured.
const SESSION_BYTES: u64 = 4096;

/// Memory of a session without a socket, in bytes.
const NETWORK_SESSION_BYTES: u64 = 512;

/// Memory of a proxy in front, by address and port, that is remembered or has a session. 385
/// bytes were measured.
const SENDER_BYTES: u64 = 512;

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
    /// Sessions that descriptors allow; `None` if no session takes one.
    pub descriptors: Option<usize>,
    /// Sessions that local ports allow; `None` if no session takes one.
    pub ports: Option<usize>,
    /// Sessions that the smallest source network has addresses for, beside as many that
    /// rest; `None` without one.
    pub addresses: Option<usize>,
    /// Sessions that memory allows, about; `None` if the kernel doesn't say how much
    /// there is.
    pub memory: Option<usize>,
    /// `max_sessions` of the configuration, which may be higher.
    pub configured: Option<usize>,
    /// The sockets that clients write to, where descriptors don't suffice for them, and how
    /// many there could be.
    pub lacking: Option<(usize, usize)>,
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
        let networks = config.source_networks();
        // Each worker has a socket for each family and port, perhaps another for datagrams
        // that may not be fragmented, and one for each server that returns tags.
        let by_tags = config.servers.iter();
        let by_tags = by_tags.filter(|server| server.replies.tag_keys().is_some());
        let shared = config.worker_count() * (networks.len() * 2 + by_tags.count());
        let taken =
            SPARE_DESCRIPTORS + probes + lookups + workers + shared + config.listening_sockets();
        let listening = config.listening_sockets();
        let left = descriptors.saturating_sub(workers + FEWEST_DESCRIPTORS);
        let lacking = (listening > left.max(1)).then_some((listening, left));
        let has_sockets = config.uses_session_sockets();
        let descriptors = has_sockets.then(|| descriptors.saturating_sub(taken));
        let range = fs::read_to_string(PORT_RANGE).unwrap_or_default();
        // Each source address has local ports of its own, and so has each client's.
        let sources = config.sources().len().max(1);
        let mut modes = config.listeners.iter().flat_map(Listener::modes);
        let ports = ports_in(&range).unwrap_or(DEFAULT_PORTS) * sources;
        let ports = (has_sockets && !modes.all(Mode::spoofs)).then_some(ports);
        let room = |(_, network)| config::sessions_in(network, config.worker_count());
        let addresses = networks.into_iter().map(room).min();
        let mut each = match has_sockets {
            true => SESSION_BYTES,
            false => NETWORK_SESSION_BYTES,
        };
        if config.listeners.iter().any(|one| one.accept.is_some()) {
            each += SENDER_BYTES;
        }
        let senders = config.remembered_senders().saturating_mul(SENDER_BYTES);
        let memory = memory::limit();
        let other = SESSION_BYTES.saturating_mul(u64::try_from(listening).unwrap_or(u64::MAX));
        let other = other.saturating_add(senders);
        let memory = memory.map(|limit| sessions_in(&limit, other, config.worker_count(), each));
        Self::new(Self {
            descriptors,
            ports,
            addresses: addresses.map(|all| all / RESTING_ADDRESSES),
            memory,
            configured: config.limits.max_sessions.map(|most| *most),
            lacking,
            max_sessions: 0,
            max_sockets: 0,
        })
    }

    /// With the maxima that follow from what each resource allows.
    fn new(allowed: Self) -> Self {
        let all = usize::MAX;
        let by_ports = match (allowed.ports, allowed.descriptors) {
            (Some(ports), _) => ports - ports / HOST_SHARE,
            (None, Some(_)) => SPOOFED_SESSIONS,
            (None, None) => NETWORK_SESSIONS,
        };
        let descriptors = allowed.descriptors.unwrap_or(all);
        let by_addresses = allowed.addresses.unwrap_or(all);
        let by_memory = allowed.memory.unwrap_or(all);
        let sockets = descriptors.min(by_ports).min(by_memory).max(1);
        let sockets = sockets.min(by_addresses).max(1);
        // An address of a network rests without a socket.
        let retired = match allowed.descriptors {
            Some(_) => sockets / RETIRED_SHARE,
            None => 0,
        };
        let running = (sockets - retired).max(1);
        // More sessions would take the descriptors of the admin address.
        let configured = allowed.configured;
        let configured = configured.map(|wanted| wanted.min(descriptors).max(1));
        let max_sessions = configured.unwrap_or(running);
        Self {
            max_sessions,
            max_sockets: sockets.max(max_sessions),
            ..allowed
        }
    }

    /// What each resource allows, in words.
    #[must_use]
    pub fn bounds(&self) -> String {
        let of_sockets = [
            ("open files", self.descriptors),
            ("local ports", self.ports),
        ];
        let others = [("source networks", self.addresses), ("memory", self.memory)];
        let mut known = Vec::new();
        for (what, allowed) in of_sockets.into_iter().chain(others) {
            let about = if what == "memory" { "about " } else { "" };
            let allow = match (known.is_empty(), what) {
                (false, _) => "",
                (true, "memory") => "allows ",
                (true, _) => "allow ",
            };
            known.extend(allowed.map(|allowed| format!("{what} {allow}{about}{allowed}")));
        }
        known.join(", ")
    }

    /// Whether there are too few descriptors for the sockets that clients write to, in words.
    #[must_use]
    pub fn lack(&self) -> Option<String> {
        let (listening, left) = self.lacking?;
        Some(format!(
            "listeners take {listening} sockets, one of each worker for each port, but open files allow {left}; raise the hard limit (LimitNOFILE), or bind fewer ports, or set fewer `workers`"
        ))
    }

    /// Which resource runs out before `max_sessions` is reached, for the operator.
    #[must_use]
    pub fn shortfall(&self) -> Option<String> {
        if let Some(lack) = self.lack() {
            return Some(lack);
        }
        let wanted = self.configured.unwrap_or(self.max_sessions);
        let (descriptors, applied) = (self.descriptors, self.max_sessions);
        let is_short = |allowed: &usize| wanted > *allowed;
        let why = if let Some(descriptors) = descriptors.filter(is_short) {
            format!(
                "open files allow {descriptors}, so {applied} apply; raise the hard limit (LimitNOFILE)"
            )
        } else if let Some(memory) = self.memory.filter(is_short) {
            format!(
                "memory allows about {memory}, and the kernel ends a process that exceeds its limit; raise that (MemoryMax, docker run --memory) or lower max_sessions"
            )
        } else if let Some(addresses) = self.addresses.filter(is_short) {
            format!(
                "a source network has addresses for {addresses}, beside as many that rest after use; give a larger network"
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

/// About how many sessions there is memory for, of so many bytes each, beside workers and
/// `other` bytes, for the sockets that clients write to and remembered proxies.
fn sessions_in(limit: &MemoryLimit, other: u64, workers: usize, each: u64) -> usize {
    let workers = u64::try_from(workers).unwrap_or(u64::MAX);
    let process = WORKER_BYTES
        .saturating_mul(workers)
        .saturating_add(PROCESS_BYTES)
        .saturating_add(other);
    let left = limit.bytes.saturating_sub(process);
    let sessions = (left - left / QUEUES_SHARE) / each;
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

    fn capacity(
        configured: Option<usize>,
        descriptors: Option<usize>,
        ports: Option<usize>,
        memory: Option<usize>,
    ) -> HostCapacity {
        HostCapacity::new(HostCapacity {
            descriptors,
            ports,
            addresses: None,
            memory,
            configured,
            lacking: None,
            max_sessions: 0,
            max_sockets: 0,
        })
    }

    #[test]
    fn the_scarcest_resource_decides() {
        let of = |descriptors, ports, memory| capacity(None, Some(descriptors), ports, memory);
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
            let capacity = capacity(Some(configured), Some(descriptors), Some(28_232), memory);
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
            let capacity = capacity(Some(configured), Some(1000), None, None);
            assert_eq!(
                (capacity.max_sessions, capacity.max_sockets),
                (applies, applies)
            );
            let shortfall = capacity.shortfall().unwrap_or_default();
            assert_eq!(configured > applies, shortfall.contains("LimitNOFILE"));
            assert_eq!(configured > applies, shortfall.contains("so 1000 apply"));
        }
        assert_eq!(capacity(Some(5), Some(0), None, None).max_sessions, 1);
    }

    #[test]
    fn sessions_on_source_networks_take_no_descriptor_and_no_port() {
        let of = |networks: &str, more: &str| {
            HostCapacity::of(
                &Config::from_toml(
                    "x",
                    &format!(
                        "workers = 2\n{more}\n[[listener]]\nbind = [\"127.0.0.1:53\"]\nupstream = \"u\"\n\
                         [upstream.u]\nsource = {networks}\nservers = [\"127.0.0.1:5300\", \"[::1]:5300\"]\n"
                    ),
                )
                .unwrap(),
            )
        };
        let both = of("[\"127.64.0.0/10\", \"fd00:1::/64\"]", "");
        assert_eq!((both.descriptors, both.ports), (None, None));
        // Two workers have an equal part of 2^22 - 3; half of that rests.
        assert_eq!(both.addresses, Some(((1 << 22) - 4) / 2));
        let most = NETWORK_SESSIONS.min(both.memory.unwrap());
        assert_eq!((both.max_sessions, both.max_sockets), (most, most));
        let small = of("[\"10.99.0.0/24\", \"fd00:1::/64\"]", "");
        assert_eq!((small.max_sessions, small.max_sockets), (126, 126));
        let few = of(
            "[\"10.99.0.0/24\", \"fd00:1::/64\"]",
            "[limits]\nmax_sessions = 200",
        );
        assert_eq!(few.max_sessions, 200);
        let shortfall = few.shortfall().unwrap();
        assert!(shortfall.contains("has addresses for 126"), "{shortfall}");
        assert!(
            few.bounds()
                .starts_with("source networks allow 126, memory about ")
        );
    }

    #[test]
    fn tagged_replies_take_a_descriptor_for_each_server_alone() {
        let of = |replies: &str| {
            let config = format!(
                "workers = 2\n[[listener]]\nbind = [\"127.0.0.1:53\"]\nupstream = \"u\"\n\
                 [upstream.u]\nreplies = \"{replies}\"\nservers = [\"127.0.0.1:5300\", \"127.0.0.1:5301\"]\n"
            );
            HostCapacity::of(&Config::from_toml("x", &config).unwrap())
        };
        let descriptors = |replies| of(replies).descriptors;
        let of_sessions = descriptors("session").unwrap();
        // Two workers, two servers.
        assert_eq!(descriptors("auto"), Some(of_sessions - 4));
        let tagged = of("tagged");
        assert_eq!((tagged.descriptors, tagged.ports), (None, None));
        let most = NETWORK_SESSIONS.min(tagged.memory.unwrap());
        assert_eq!(tagged.max_sessions, most);
        assert!(tagged.bounds().starts_with("memory allows about "));
    }

    #[test]
    fn a_session_socket_anywhere_bounds_all_sessions() {
        let config = "workers = 2\n[[listener]]\nbind = [\"127.0.0.1:53\"]\nupstream = \"u\"\n\
                      [[listener]]\nbind = [\"127.0.0.1:54\"]\nupstream = \"v\"\n\
                      [upstream.u]\nsource = [\"127.64.0.0/10\"]\nservers = [\"127.0.0.1:5300\"]\n\
                      [upstream.v]\nservers = [\"127.0.0.1:5300\"]\n";
        let capacity = HostCapacity::of(&Config::from_toml("x", config).unwrap());
        let (descriptors, ports) = (capacity.descriptors.unwrap(), capacity.ports.unwrap());
        assert!(capacity.max_sessions <= descriptors.min(ports));
        assert!(capacity.addresses.is_some());
    }

    #[test]
    fn sessions_get_the_memory_that_the_process_leaves() {
        let of = |megabytes: u64, workers| {
            let bytes = megabytes << 20;
            let source = "memory.max".into();
            sessions_in(&MemoryLimit { bytes, source }, 0, workers, SESSION_BYTES)
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
