//! A listener: one object that the control path, the workers and the sessions share,
//! with its name and its counters; and the settings that a configuration gives it.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ipnet::IpNet;
use ppv2_udp::Options;

use crate::accept::{Accept, Direct};
use crate::client_limits::{ClientRates, ClientSessions};
use crate::counters::{DropReason, ListenerCounters, next_id};

/// What stays of a listener over all reloads. Aligned as [`Server`](crate::server::Server)
/// is.
#[derive(Debug)]
#[repr(align(128))]
pub struct Listener {
    id: u64,
    /// Its name in logs and metrics.
    pub name: String,
    /// By worker.
    counters: Box<[ListenerCounters]>,
    open_sockets: AtomicUsize,
}

impl Listener {
    /// A listener of which nothing was counted yet, by so many workers.
    #[must_use]
    pub fn new(name: &str, workers: usize) -> Arc<Self> {
        Arc::new(Self {
            id: next_id(),
            name: name.to_owned(),
            counters: (0..workers).map(|_| ListenerCounters::default()).collect(),
            open_sockets: AtomicUsize::new(0),
        })
    }

    /// Tells it from all servers and listeners that ever were.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// What this worker counts.
    #[must_use]
    pub fn counters(&self, worker: usize) -> &ListenerCounters {
        &self.counters[worker]
    }

    /// The sum over all workers.
    pub fn sum(&self, read: impl Fn(&ListenerCounters) -> u64) -> u64 {
        self.counters.iter().map(read).sum()
    }

    /// A proxy in front of which a datagram was dropped for `reason` since this was asked
    /// before.
    #[must_use]
    pub fn take_sender(&self, reason: DropReason) -> Option<IpAddr> {
        // All notes are taken, so that none is old when it is read.
        let workers = self.counters.iter();
        workers.filter_map(|one| one.take_sender(reason)).last()
    }

    /// Whether a worker has a socket of it that clients may write to, or a session.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        self.open_sockets.load(Ordering::Acquire) > 0 || self.sum(ListenerCounters::sessions) > 0
    }

    pub(crate) fn note_open_socket(&self) {
        self.open_sockets.fetch_add(1, Ordering::Release);
    }

    pub(crate) fn note_closed_socket(&self) {
        self.open_sockets.fetch_sub(1, Ordering::Release);
    }
}

impl PartialEq for Listener {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

/// When the sessions of a listener end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Without a datagram in either direction for this long.
    pub idle_timeout: Duration,
    /// After so many replies to each client datagram; 0 for never. Where the number of
    /// requests has a bound, once it has had these as well.
    pub responses: u64,
    /// After so many client datagrams a new session is begun, and the old one
    /// passes what replies still come; 0 for never.
    pub requests: u64,
    /// How much of replies its clients may get.
    pub amplification: Option<Amplification>,
}

impl Rules {
    /// Whether a client's datagrams must be counted one by one.
    #[must_use]
    pub fn count_requests(&self) -> bool {
        self.requests > 0
    }

    /// Whether replies must be counted one by one.
    #[must_use]
    pub fn count_replies(&self) -> bool {
        self.responses > 0
    }
}

/// A bound on what a client gets for what it sends. Replies to a forged source go to
/// its owner; the less they are, the less an attack by such replies is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Amplification {
    /// Bytes of replies for each byte of the client's, over the whole session.
    pub limit: u64,
    /// Whether what exceeds it is dropped, rather than counted alone.
    pub enforce: bool,
}

/// What a configuration says of a listener. Aligned as [`Server`](crate::server::Server)
/// is.
#[derive(Clone, Debug, PartialEq)]
#[repr(align(128))]
pub struct ListenerSettings {
    /// The listener.
    pub listener: Arc<Listener>,
    /// When its sessions end.
    pub rules: Rules,
    /// Clients that may open sessions.
    pub allow: Vec<IpNet>,
    /// Those of them that may not.
    pub deny: Vec<IpNet>,
    /// Other proxies, which could answer each other for ever.
    pub peers: Vec<IpNet>,
    /// Leading bits that the addresses of one IPv6 client have in common, at most 128.
    pub ipv6_prefix: u8,
    /// How many sessions each client may have.
    pub client_sessions: Option<Arc<ClientSessions>>,
    /// How many datagrams each client may send.
    pub client_rates: Option<Arc<ClientRates>>,
    /// Refuse rather than fragment what exceeds the path's MTU.
    pub dont_fragment: bool,
    /// Pass DSCP as well as ECN, in both directions.
    pub dscp: bool,
    /// Other proxies whose datagrams carry a header. `None` where all bytes of all datagrams
    /// are payload.
    pub accept: Option<Arc<Accept>>,
    /// Remember each client in a session. Without sessions, which needs tagged replies,
    /// nothing that is counted by session applies.
    pub keeps_sessions: bool,
}

impl ListenerSettings {
    /// Settings with these rules that allow all clients and limit none.
    #[must_use]
    pub fn new(listener: Arc<Listener>, rules: Rules) -> Self {
        Self {
            listener,
            rules,
            allow: vec![IpNet::default(), ipnet::Ipv6Net::default().into()],
            deny: Vec::new(),
            peers: Vec::new(),
            ipv6_prefix: 64,
            client_sessions: None,
            client_rates: None,
            dont_fragment: false,
            dscp: false,
            accept: None,
            keeps_sessions: true,
        }
    }

    /// Why the client at this address may not open sessions, if it may not.
    #[must_use]
    pub fn refusal(&self, client: IpAddr) -> Option<DropReason> {
        let is_in = |nets: &[IpNet]| nets.iter().any(|net| net.contains(&client));
        if is_in(&self.peers) {
            Some(DropReason::BadSource)
        } else if !is_in(&self.allow) || is_in(&self.deny) {
            Some(DropReason::NotAllowed)
        } else {
            None
        }
    }

    /// Whether a client may write directly, or a proxy that passes on what it writes.
    #[must_use]
    pub fn admits(&self, client: IpAddr, proxy: Option<IpAddr>) -> bool {
        match (&self.accept, proxy) {
            (None, proxy) => proxy.is_none(),
            (Some(accept), Some(proxy)) => accept.includes(proxy),
            (Some(accept), None) => accept.direct == Direct::Accept && !accept.includes(client),
        }
    }

    /// Whether a proxy in front may leave the header out once it has said it.
    #[must_use]
    pub fn remembers_senders(&self) -> bool {
        let accept = self.accept.as_ref();
        accept.is_some_and(|accept| accept.remember.is_some())
    }

    /// Whether the client at this address may open sessions.
    #[must_use]
    pub fn allows(&self, client: IpAddr) -> bool {
        self.refusal(client).is_none()
    }

    /// Whether both allow the same clients.
    #[must_use]
    pub fn has_same_access(&self, other: &Self) -> bool {
        (&self.allow, &self.deny, &self.peers, &self.accept)
            == (&other.allow, &other.deny, &other.peers, &other.accept)
    }

    /// What the listener's own sockets are made for.
    #[must_use]
    pub fn listener_options(&self) -> Options {
        Options {
            dont_fragment: self.dont_fragment,
            bursts: !self.rules.count_requests(),
        }
    }

    /// What the sockets of its sessions are made for.
    #[must_use]
    pub fn upstream_options(&self) -> Options {
        Options {
            dont_fragment: self.dont_fragment,
            bursts: !self.rules.count_replies(),
        }
    }
}
