//! What a worker counts, and the names of the reasons why a datagram is dropped.
//!
//! Each worker writes its own counters, which no other thread writes, so that counting
//! costs a plain add. The control path reads them at any time and sums over the workers.

use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// A number that no other listener or server of this process has or had.
pub(crate) fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

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
    ($($variant:ident, $label:literal, $description:literal, $fix:literal;)*) => {
        /// Why a datagram was dropped. Every dropped datagram is counted under
        /// exactly one of these.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum DropReason {
            $(#[doc = $description] $variant,)*
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

            /// What happened, as a sentence without its end.
            #[must_use]
            pub fn description(self) -> &'static str {
                match self {
                    $(Self::$variant => $description,)*
                }
            }

            /// What an operator can do about it.
            #[must_use]
            pub fn fix(self) -> &'static str {
                match self {
                    $(Self::$variant => $fix,)*
                }
            }
        }
    };
}

drop_reasons! {
    Untrusted, "untrusted",
        "it came from an address outside `accept.from`, and `accept.direct` is drop",
        "add the address to `accept.from` if it is a proxy that writes headers; set `accept.direct` to accept if clients send here directly, too";
    NoHeader, "no_header",
        "it came from a network in `accept.from` and does not begin with a header of `accept.formats`",
        "have the sender put a header of `accept.formats` in front of each datagram; if it does so once per session, set `accept.remember`, with an `idle` and `max` that suffice";
    V1Header, "v1_header",
        "it came from a network in `accept.from` and begins with a PROXY v1 header, which is for TCP alone",
        "have the sender write PROXY v2: nginx needs 1.31.4 and `proxy_protocol v2`, older versions write v1 over UDP, too";
    BadHeader, "bad_header",
        "its PROXY v2 header is malformed, its checksum is wrong, or it is cut off",
        "capture such a datagram and look at it with `ppv2-proxy capture` or `ppv2-proxy decode`";
    HeaderTooLong, "header_too_long",
        "its header has more than 512 bytes",
        "have the sender write fewer or shorter TLVs";
    LocalHeader, "local_header",
        "its header says LOCAL, as health checks of the sender do, and `accept.local` is drop",
        "nothing; set `accept.local` to forward if servers are to answer such checks";
    Unspecified, "unspecified",
        "its header names no client (address family UNSPEC)",
        "find out why the sender does not know its client's address";
    Tcp, "tcp",
        "its header names a client of a TCP connection",
        "have the sender write the transport protocol of what it passes on: UDP";
    Unix, "unix",
        "its header names a UNIX socket",
        "have the sender write the client's IP address";
    ClientAddress, "client_address",
        "no client can have the address that its header names: port 0, or an unspecified, multicast or broadcast IP address",
        "have the sender write the address that the datagram came from";
    HeaderAlone, "header_alone",
        "its header has no payload: it says the client of later datagrams, which `accept.remember` keeps",
        "nothing; set `accept.remember.header_alone` to forward if clients send empty datagrams";
    NotAllowed, "not_allowed",
        "the client's address is not in the listener's `allow` list, or is in `deny`",
        "add it to `allow` or remove it from `deny` if it should be served";
    ClientRate, "client_rate",
        "the client sends more datagrams a second than `per_client.rate` allows",
        "raise `per_client.rate` or `per_client.burst` if such clients are legitimate";
    ClientSessions, "client_sessions",
        "the client already has as many sessions as `per_client.sessions` allows",
        "raise `per_client.sessions` if many clients share an address";
    MulticastDestination, "multicast_destination",
        "it was sent to a multicast or broadcast address, which no reply can come from",
        "let clients send to an address of this host";
    BadSource, "bad_source",
        "a reply would be lost or loop: the client's port is 0, its address belongs to the proxy, a server or `peers`, or no server can be reached from it (loopback, multicast, link-local)",
        "look for forged sources; do not let servers send through their own proxy; keep clients' networks out of `peers`";
    ForgedHeader, "forged_header",
        "with `emit = \"first\"`, the client's datagram itself starts like a PROXY header, which the server could believe",
        "look for clients that impersonate others; use `emit = \"every\"` if legitimate datagrams start like this";
    MaxSessions, "max_sessions",
        "the client is new, and all sessions are in use",
        "set `responses` if each request has a known number of replies, shorten `idle_timeout`, or raise `limits.max_sessions`";
    UnverifiedClient, "unverified_client",
        "sessions that were never answered hold most sockets, as in a flood of forged sources, and the client was not answered lately and sends for the first time, or too many such clients send",
        "nothing, if clients send again; raise the limit of open files, widen net.ipv4.ip_local_port_range or add addresses to `source`, and look for forged sources";
    NoDescriptors, "no_descriptors",
        "the client is new, and the process has no file descriptor left",
        "raise the limit of open files (ulimit -Hn, LimitNOFILE)";
    NoPorts, "no_ports",
        "the client is new, and no local port is free: other sessions use them, or they rest so that a late reply reaches no other client",
        "add addresses to `source`; end sessions sooner by `responses` or `idle_timeout`; or widen net.ipv4.ip_local_port_range, and the limit of open files if `check` names it";
    NoPrivilege, "no_privilege",
        "the client is new, and the proxy lacks the privilege to send from its address",
        "grant CAP_NET_RAW, and CAP_NET_BIND_SERVICE for clients' ports below 1024; see `ppv2-proxy doctor`";
    ClientPortInUse, "client_port_in_use",
        "the client's source port, or every port of its address, is already in use towards this server",
        "let clients send to one address of the listener, and a proxy in front send each from one port; or set `source_port` to any";
    NoMemory, "no_memory",
        "the client is new, and the kernel has no memory for its socket",
        "lower `limits.max_sessions` to what the host can hold";
    NoServer, "no_server",
        "no server may take a new session: health checks report all as down and `fail_open` is off, or no DNS name resolves to a server, or a header names a port that a server with port = \"same\" does not listen on",
        "fix the servers, the `probe` if they work, or the DNS name; see `/upstreams` and the log";
    Unreachable, "unreachable",
        "there is no route to the server, or this host no longer has the address to send from",
        "check the server's address, and this host's addresses and routes";
    Oversize, "oversize",
        "with its header it is too long to be sent",
        "let clients send at most the bytes that the log's `fits` shows; without `dont_fragment`, datagrams up to UDP's limit are fragmented";
    SendBufferFull, "send_buffer_full",
        "the send buffer of the socket to the server was full",
        "look for a slow network, or raise net.core.wmem_default";
    SendFailed, "send_failed",
        "the kernel refused to send it to the server",
        "check this host's firewall rules";
    ReplyWrongSource, "reply_wrong_source",
        "the reply came from another address than the session's server",
        "have the server answer from the address that it was asked at";
    ReplyWrongInterface, "reply_wrong_interface",
        "the reply arrived at an interface where strict rp_filter allows no datagram of that server, and the kernel's own check missed it (net.ipv4.udp_early_demux)",
        "look for forged sources; if the server answers through that interface, set its rp_filter to 2";
    NoAddresses, "no_addresses",
        "the client is new, and all addresses of the upstream's source network are in use, or rest so that a late reply reaches no other client",
        "use a larger network as `source`, or end sessions sooner by `responses` or `idle_timeout`";
    ReplyUnknownAddress, "reply_unknown_address",
        "it came to an address of the upstream's source network that no session has: a reply after its session had ended, or one that nobody asked for",
        "raise `idle_timeout` or `responses` if it should have been forwarded; look for hosts that scan the network";
    ReplyUntagged, "reply_untagged",
        "the reply came without a valid header and tag, through the socket that all sessions to its server share",
        "serve by a version of the SDK that returns tags, or set `replies = \"auto\"`; one such drop is normal when a server is rolled back";
    ReplyWrongTag, "reply_wrong_tag",
        "the reply's tag was not made with the upstream's key for the client and listener that its header names, or is hours old",
        "give all replicas the same `tag_key_file`; look for servers that forge replies";
    ReplyOldTag, "reply_old_tag",
        "the reply's tag is no longer valid (it is for 30 to 90 minutes), or the clocks of replicas differ by more than half an hour",
        "set the clocks of all replicas; look for servers that repeat old replies";
    ReplyUnknownListener, "reply_unknown_listener",
        "the reply's tag is valid, but this proxy has no listener at the address that it names",
        "give all replicas that share a key the same listeners";
    ReplyNotAllowed, "reply_not_allowed",
        "the reply's tag is valid, but its client is not in the listener's `allow` list, or is in `deny`",
        "add the client to `allow` or remove it from `deny` if it should be served";
    ReplyReassigned, "reply_reassigned",
        "the sender's port that the client's datagrams came from names another client now, and this client was silent for 10 s",
        "have the sender use a port for each client, or keep clients sending";
    ReplyNoHeader, "reply_no_header",
        "the server's reply has no Simple Proxy Protocol header in front",
        "serve by a program that returns the header with its replies, or set another `header.format`";
    ReplyWrongClient, "reply_wrong_client",
        "the Simple Proxy Protocol header of the server's reply names another client than the session's",
        "look for a server that mixes up its clients";
    ReplyLate, "reply_late",
        "the reply came after its session had ended",
        "raise `idle_timeout` or `responses` if it should have been forwarded";
    ReplyAmplified, "reply_amplified",
        "the reply exceeds `amplification.limit` times the bytes that the client sent in the session",
        "look for forged sources; raise the limit if servers legitimately send such long replies";
    ReplyOversize, "reply_oversize",
        "the reply is too long to be sent to the client",
        "let the server send less; without `dont_fragment`, datagrams up to UDP's limit are fragmented";
    ReplyBufferFull, "reply_buffer_full",
        "the send buffer of the listener's socket was full",
        "look for a slow network, or raise net.core.wmem_default";
    ReplyFailed, "reply_failed",
        "the kernel refused to send the reply to the client",
        "check the route to the client and this host's firewall rules";
    Stopping, "stopping",
        "it arrived while the proxy was shutting down",
        "nothing: clients send again";
    Truncated, "truncated",
        "only a part of it was received",
        "report this as a bug: buffers hold every UDP datagram";
}

/// Why a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// No datagram for the idle timeout.
    Idle,
    /// All expected replies have come.
    Responses,
    /// It had to leave its server: the client's next datagram begins another one.
    Moved,
    /// It goes on from another socket, since this one's address is gone or is no longer
    /// the one that its server is written to from.
    Network,
    /// It was never answered, and sessions had run out: it gave way to a new one.
    Unanswered,
    /// Its client is no longer served.
    Denied,
    /// The listener was taken out, or the proxy stopped.
    Stopped,
}

impl EndReason {
    /// Every reason.
    pub const ALL: [Self; 7] = [
        Self::Idle,
        Self::Responses,
        Self::Moved,
        Self::Network,
        Self::Unanswered,
        Self::Denied,
        Self::Stopped,
    ];

    /// The word for it in logs.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Responses => "responses",
            Self::Moved => "moved",
            Self::Network => "network",
            Self::Unanswered => "unanswered",
            Self::Denied => "denied",
            Self::Stopped => "stopped",
        }
    }
}

/// Counts of one listener in one worker, apart from what other workers write.
#[derive(Debug, Default)]
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
    /// Datagrams without header that a remembered sender sent: see
    /// [`Remember`](crate::accept::Remember).
    pub without_header: Counter,
    /// Senders that were not remembered since there were too many.
    pub unremembered: Counter,
    /// Datagrams whose payload begins with another header. They are forwarded as they are.
    pub nested_headers: Counter,
    /// Sessions begun.
    pub opened: Counter,
    /// Datagrams beyond `requests` that sessions took since no other could be begun.
    pub overdrawn: Counter,
    /// Replies beyond what `amplification` allows, whether dropped or not.
    pub amplified: Counter,
    ended: [Counter; EndReason::ALL.len()],
    dropped: ByReason<Counter>,
    senders: Mutex<ByReason<Option<IpAddr>>>,
}

#[derive(Debug)]
struct ByReason<T>([T; DropReason::ALL.len()]);

impl<T: Default> Default for ByReason<T> {
    fn default() -> Self {
        Self(std::array::from_fn(|_| T::default()))
    }
}

impl ListenerCounters {
    /// Sessions that have begun and not ended.
    #[must_use]
    pub fn sessions(&self) -> u64 {
        let ended = self.ended.iter().map(Counter::get).sum();
        self.opened.get().saturating_sub(ended)
    }

    /// The counter of sessions that ended for `reason`.
    #[must_use]
    pub fn ended(&self, reason: EndReason) -> &Counter {
        &self.ended[reason as usize]
    }

    /// The counter of datagrams dropped for `reason`.
    #[must_use]
    pub fn dropped(&self, reason: DropReason) -> &Counter {
        &self.dropped.0[reason as usize]
    }

    /// Notes that a datagram of this sender, another proxy whose headers are accepted, is
    /// dropped for `reason`. The note is left out while the control path reads.
    pub fn note_sender(&self, reason: DropReason, sender: IpAddr) {
        if let Ok(mut senders) = self.senders.try_lock() {
            senders.0[reason as usize] = Some(sender);
        }
    }

    /// The proxy whose datagram was the latest to be dropped for `reason` since this was asked
    /// before.
    #[must_use]
    pub fn take_sender(&self, reason: DropReason) -> Option<IpAddr> {
        self.senders.lock().ok()?.0[reason as usize].take()
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
    /// Replies that the kernel dropped because a session's buffer was full. It tells with
    /// the next reply that it hands over; of a buffer that sessions share, that reply's
    /// server counts them.
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
pub struct WorkerCounters {
    /// A datagram that was dropped as oversize, noted at most once a second.
    pub oversize: Mutex<Option<Oversize>>,
    /// Sessions that ended and still hold their socket.
    pub retired: Counter,
    /// Sessions that ended, all answered, and gave up their socket before its port had
    /// rested.
    pub reclaimed: Counter,
    /// Late replies that restarted the rest of a port.
    pub renewed: Counter,
    /// Ended sessions that the access log had no time for. The access log counts by
    /// itself those that it could not write.
    pub unlogged: Counter,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_counter_and_label() {
        let counters = ListenerCounters::default();
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
