//! What a worker counts, and the names of the reasons why a datagram is dropped.
//!
//! Each worker writes its own counters and shares them with nobody who writes,
//! so that counting costs a plain add. The control path reads them at any time
//! and sums over the workers.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// A number that one thread writes and others read.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the owning worker may call it: the two steps are not one.
    pub fn add(&self, n: u64) {
        self.set(self.get().wrapping_add(n));
    }

    /// Sets the number, for what goes up and down.
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// The number.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! drop_reasons {
    ($($variant:ident, $label:literal, $meaning:literal, $mend:literal;)*) => {
        /// Why a datagram was dropped. Every dropped datagram is counted under
        /// exactly one of these.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum DropReason {
            $(#[doc = $meaning] $variant,)*
        }

        impl DropReason {
            /// Every reason.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The label in metrics and logs.
            #[must_use]
            pub fn label(self) -> &'static str {
                match self {
                    $(Self::$variant => $label,)*
                }
            }

            /// What it means, in words.
            #[must_use]
            pub fn meaning(self) -> &'static str {
                match self {
                    $(Self::$variant => $meaning,)*
                }
            }

            /// What an operator can do about it.
            #[must_use]
            pub fn mend(self) -> &'static str {
                match self {
                    $(Self::$variant => $mend,)*
                }
            }
        }
    };
}

drop_reasons! {
    NotAllowed, "not_allowed",
        "the client's address is not in the listener's `allow` list, or is in `deny`",
        "extend `allow`, or shorten `deny`, if it should be served";
    ClientRate, "client_rate",
        "the client sends more datagrams a second than `per_client.rate`",
        "raise `per_client.rate` or `burst` if clients do so rightly";
    ClientSessions, "client_sessions",
        "a new session of a client that has `per_client.sessions` of them",
        "raise `per_client.sessions` if many share an address rightly";
    GroupDestination, "group_destination",
        "sent to a multicast or broadcast address, from which no reply can leave",
        "have clients write to an address of this host";
    BadSource, "bad_source",
        "the client's port is 0, its address is the proxy's, a server's or in `peers`, or no server can be written to from it (loopback, multicast, link-local): an answer would go astray or in circles",
        "look for forged sources; have servers not ask through their own proxy; list no network with clients in `peers`";
    ForgedHeader, "forged_header",
        "with `emit = \"first\"`, a client's datagram that itself begins as a PROXY header does, which the server could believe",
        "look for clients that pretend to be others; use `emit = \"every\"` if they rightly send such datagrams";
    MaxSessions, "max_sessions",
        "a new client while all sessions are taken",
        "set `responses` where a question has so many answers, shorten `idle_timeout`, or raise `limits.max_sessions`";
    Newcomer, "newcomer",
        "a new client whose address was not answered lately and has not asked before, or too many of them ask, while sessions never answered hold most sockets, as in a flood of forged sources",
        "nothing, if clients ask again; raise the limit of open files, widen net.ipv4.ip_local_port_range or add addresses to `source`, and look for forged sources";
    NoDescriptors, "no_descriptors",
        "a new client while the process has no file descriptor left",
        "raise the limit of open files (ulimit -Hn, LimitNOFILE)";
    NoPorts, "no_ports",
        "a new client while no local port is free for its session: others have it, or it rests so that a late reply reaches nobody else",
        "add addresses to `source`; end sessions sooner by `responses` or `idle_timeout`; or widen net.ipv4.ip_local_port_range, and the limit of open files if `check` names it";
    NoPrivilege, "no_privilege",
        "a new client whose address the proxy may not write from",
        "give it CAP_NET_RAW, and CAP_NET_BIND_SERVICE for clients' ports below 1024; `ppv2-proxy doctor` says how";
    NoClientPort, "no_client_port",
        "a new session in a client's name whose port, or all ports of whose address, other sessions to the server have",
        "have clients write to one address of the listener, or set `source_port` to any";
    NoMemory, "no_memory",
        "a new client while the kernel has no memory for its socket",
        "lower `limits.max_sessions` to what the host can bear";
    NoServer, "no_server",
        "a new session while no server may take one: all are down by their health checks and `fail_open` is off, or no name leads to one",
        "mend the servers, or the `probe` if they serve, or the name; `/upstreams` and the log say why";
    Unreachable, "unreachable",
        "there is no route to the server, or the address that it was written to from is gone",
        "check the server's address, and this host's addresses and routes";
    Oversize, "oversize",
        "with its header longer than what may be sent",
        "have clients send at most `fits` bytes; up to UDP's limit it is fragmented if `df` is off";
    SendBufferFull, "send_buffer_full",
        "the socket to the server took no more",
        "look for a slow network, or raise net.core.wmem_default";
    SendFailed, "send_failed",
        "the kernel refused to send it to the server",
        "look for a firewall rule of this host";
    ReplyWrongSource, "reply_wrong_source",
        "came to a session's socket from another address than its server",
        "have the server answer from the address that it was asked at";
    ReplyWrongInterface, "reply_wrong_interface",
        "came in by an interface that this host's strict rp_filter allows no datagram of that server on, past the kernel's own check (net.ipv4.udp_early_demux)",
        "look for forged sources; where the server rightly answers by that interface, set its rp_filter to 2";
    ReplyLate, "reply_late",
        "a reply to a session that had ended",
        "raise `idle_timeout` or `responses` if it should have been passed on";
    ReplyAmplified, "reply_amplified",
        "a reply beyond `amplification.limit` times the bytes that its client sent in the session",
        "look for forged sources; raise the limit if servers rightly answer at such length";
    ReplyOversize, "reply_oversize",
        "a reply longer than what may be sent to the client",
        "have the server send less; up to UDP's limit it is fragmented if `df` is off";
    ReplyBufferFull, "reply_buffer_full",
        "the listener's socket took no more",
        "look for a slow network, or raise net.core.wmem_default";
    ReplyFailed, "reply_failed",
        "the kernel refused to send a reply to the client",
        "check the route to the client and firewall rules of this host";
    Stopping, "stopping",
        "came while the proxy was stopping",
        "nothing: clients ask again";
    Truncated, "truncated",
        "received in part only",
        "report it: buffers hold every datagram that UDP can carry";
}

/// Counts of one listener in one worker, apart from what other workers write.
#[derive(Debug)]
#[repr(align(128))]
pub struct ListenerCounters {
    /// Datagrams from clients.
    pub received: Counter,
    /// Their payload bytes.
    pub received_bytes: Counter,
    /// Replies sent to clients.
    pub replied: Counter,
    /// Their payload bytes.
    pub replied_bytes: Counter,
    /// Datagrams that the kernel dropped because a socket's buffer was full. It
    /// tells with the next datagram that it hands over.
    pub overflows: Counter,
    /// Sessions begun.
    pub opened: Counter,
    /// Sessions ended by the idle timeout.
    pub ended_idle: Counter,
    /// Sessions ended by their number of replies.
    pub ended_responses: Counter,
    /// Sessions ended since their server was to be left.
    pub ended_moved: Counter,
    /// Sessions that went on from another socket, since the network changed.
    pub ended_network: Counter,
    /// Sessions never answered that gave way to new ones.
    pub ended_unanswered: Counter,
    /// Sessions ended since their client is no longer served.
    pub ended_denied: Counter,
    /// Sessions ended with the listener, or with the proxy.
    pub ended_stopped: Counter,
    /// Datagrams beyond `requests` that sessions took since no other could be begun.
    pub overdrawn: Counter,
    /// Replies beyond what `amplification` allows, whether dropped or not.
    pub amplified: Counter,
    drops: [Counter; DropReason::ALL.len()],
}

impl ListenerCounters {
    fn new() -> Self {
        Self {
            received: Counter::default(),
            received_bytes: Counter::default(),
            replied: Counter::default(),
            replied_bytes: Counter::default(),
            overflows: Counter::default(),
            opened: Counter::default(),
            ended_idle: Counter::default(),
            ended_responses: Counter::default(),
            ended_moved: Counter::default(),
            ended_network: Counter::default(),
            ended_unanswered: Counter::default(),
            ended_denied: Counter::default(),
            ended_stopped: Counter::default(),
            overdrawn: Counter::default(),
            amplified: Counter::default(),
            drops: std::array::from_fn(|_| Counter::default()),
        }
    }

    /// Sessions that have begun and not ended.
    #[must_use]
    pub fn sessions(&self) -> u64 {
        let ended = [
            &self.ended_idle,
            &self.ended_responses,
            &self.ended_moved,
            &self.ended_network,
            &self.ended_unanswered,
            &self.ended_denied,
            &self.ended_stopped,
        ];
        let ended = ended.into_iter().map(Counter::get).sum();
        self.opened.get().saturating_sub(ended)
    }

    /// The counter of datagrams dropped for `reason`.
    #[must_use]
    pub fn dropped(&self, reason: DropReason) -> &Counter {
        &self.drops[reason as usize]
    }
}

/// Counts of one server in one worker, apart from what other workers write.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct ServerCounters {
    /// Datagrams sent to it.
    pub sent: Counter,
    /// Their bytes, headers included.
    pub sent_bytes: Counter,
    /// Datagrams received from it.
    pub replies: Counter,
    /// Their bytes.
    pub reply_bytes: Counter,
    /// Sessions begun.
    pub opened: Counter,
    /// Sessions ended.
    pub ended: Counter,
    /// Replies that the kernel dropped because a session's buffer was full. It
    /// tells with the next reply that it hands over.
    pub overflows: Counter,
    /// Errors that the network reported of datagrams sent to it, such as "port
    /// unreachable". The sender of such a report can be forged.
    pub refusals: Counter,
    /// Those that say that a datagram was too long for a later hop, which nothing
    /// follows from.
    pub too_long: Counter,
}

impl ServerCounters {
    /// Sessions that have begun and not ended.
    #[must_use]
    pub fn sessions(&self) -> u64 {
        self.opened.get().saturating_sub(self.ended.get())
    }
}

/// A datagram that was too long to be sent to its server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Oversize {
    /// The server.
    pub server: SocketAddr,
    /// Bytes of the datagram, its header included.
    pub len: usize,
    /// Bytes of the header.
    pub header: usize,
}

/// What one worker counts of no listener or server, apart from what other workers
/// write.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct OwnCounters {
    /// A datagram that was dropped as oversize, noted once a second at the most.
    pub oversize: Mutex<Option<Oversize>>,
    /// Sessions that ended and still hold their socket.
    pub retired: Counter,
    /// Sessions that ended, all answered, and gave up their socket before its port had
    /// rested.
    pub reclaimed: Counter,
    /// Late replies that restarted the rest of a port.
    pub renewed: Counter,
    /// Ended sessions that the access log had no time for. Those that it could not
    /// write are counted beside (`access_log::Unlogged`).
    pub unlogged: Counter,
}

/// Everything that one worker counts.
#[derive(Clone, Debug, Default)]
pub struct WorkerCounters {
    /// By number of the listener.
    pub listeners: Vec<Arc<ListenerCounters>>,
    /// By number of the server.
    pub servers: Vec<Arc<ServerCounters>>,
    /// Of neither.
    pub own: Arc<OwnCounters>,
}

impl WorkerCounters {
    /// Zeroes for so many listeners and servers.
    #[must_use]
    pub fn new(listeners: usize, servers: usize) -> Self {
        Self::default().with((listeners, servers), &[], &[])
    }

    /// The same counters, with room for so many listeners and servers, and zeroes for
    /// those listeners and servers that have a number which was another's before.
    #[must_use]
    pub fn with(
        &self,
        (listeners, servers): (usize, usize),
        listeners_anew: &[usize],
        servers_anew: &[usize],
    ) -> Self {
        let mut grown = self.clone();
        grown
            .listeners
            .resize_with(listeners, || Arc::new(ListenerCounters::new()));
        grown.servers.resize_with(servers, Arc::default);
        for number in listeners_anew {
            grown.listeners[*number] = Arc::new(ListenerCounters::new());
        }
        for number in servers_anew {
            grown.servers[*number] = Arc::default();
        }
        grown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_counter_and_label() {
        let counters = ListenerCounters::new();
        for (n, reason) in (1..).zip(DropReason::ALL) {
            counters.dropped(*reason).add(n);
        }
        let mut labels: Vec<_> = DropReason::ALL.iter().map(|r| r.label()).collect();
        for (n, reason) in (1..).zip(DropReason::ALL) {
            assert_eq!(counters.dropped(*reason).get(), n, "{}", reason.label());
        }
        labels.sort_unstable();
        labels.dedup();
        assert_eq!(labels.len(), DropReason::ALL.len());
    }
}
