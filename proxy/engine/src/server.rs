//! A server: one object that the control path, the workers and the sessions share. It
//! has its identity, its counters and the time that it takes to answer. While anything
//! holds it, no other object stands for the same server.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ipnet::IpNet;

use crate::address::{ListenerAddr, PortRange, ServerAddr};
use crate::counters::{ServerCounters, next_id};
use crate::mode::Mode;
use crate::own_tlvs::OwnTlvs;
use crate::tag::TagKeys;

/// How long a server that has left a tag out is taken to return none.
const TAG_PAUSE: Duration = Duration::from_secs(30);

/// A server of an upstream. Aligned so that what is read for each datagram shares no
/// cache line with the number of its holders, which changes with each session.
#[derive(Debug)]
#[repr(align(128))]
pub struct Server {
    id: u64,
    /// Where it listens. Port 0 stands for the port that each client wrote to.
    pub address: ServerAddr,
    /// By worker.
    counters: Box<[ServerCounters]>,
    answer_time: SharedAnswerTime,
    transitions: AtomicU32,
    /// It has returned a tag, and has not left one out since.
    returns_tags: AtomicBool,
    /// Seconds after 1970 until which a tag is not taken for a change.
    no_tags_until: AtomicU64,
    /// Its upstream.
    pub upstream: String,
    /// Its name there: as the configuration has it, or its address if a name leads to
    /// it.
    pub name: String,
    label: Mutex<String>,
}

impl Server {
    /// A server of which nothing was counted yet, by so many workers.
    #[must_use]
    pub fn new(upstream: &str, name: &str, address: ServerAddr, workers: usize) -> Arc<Self> {
        Arc::new(Self {
            id: next_id(),
            address,
            counters: (0..workers).map(|_| ServerCounters::default()).collect(),
            answer_time: SharedAnswerTime::default(),
            transitions: AtomicU32::new(0),
            returns_tags: AtomicBool::new(false),
            no_tags_until: AtomicU64::new(0),
            upstream: upstream.to_owned(),
            name: name.to_owned(),
            label: Mutex::new(name.to_owned()),
        })
    }

    /// Tells it from all servers and listeners that ever were.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Whether it is written to at the port that the client wrote to.
    #[must_use]
    pub fn has_same_port(&self) -> bool {
        self.address.0.port() == 0
    }

    /// Where datagrams go that their client sent to `local`.
    #[must_use]
    pub fn address_for(&self, local: ListenerAddr) -> ServerAddr {
        let mut address = self.address;
        if self.has_same_port() {
            address.0.set_port(local.0.port());
        }
        address
    }

    /// The server in metrics: no two of an upstream have the same label.
    #[must_use]
    pub fn label(&self) -> String {
        let label = self.label.lock().unwrap_or_else(PoisonError::into_inner);
        label.clone()
    }

    /// Gives it another label.
    pub fn set_label(&self, label: String) {
        *self.label.lock().unwrap_or_else(PoisonError::into_inner) = label;
    }

    /// What this worker counts.
    #[must_use]
    pub fn counters(&self, worker: usize) -> &ServerCounters {
        &self.counters[worker]
    }

    /// The sum over all workers.
    pub fn sum(&self, read: impl Fn(&ServerCounters) -> u64) -> u64 {
        self.counters.iter().map(read).sum()
    }

    /// Notes that it went down or came back: it may have forgotten the headers that it had.
    pub fn note_transition(&self) {
        self.transitions.fetch_add(1, Ordering::Relaxed);
    }

    /// How often it went down or came back.
    #[must_use]
    pub fn transitions(&self) -> u32 {
        self.transitions.load(Ordering::Relaxed)
    }

    /// Whether its replies carry the tags of the headers that it is sent.
    #[must_use]
    pub fn returns_tags(&self) -> bool {
        self.returns_tags.load(Ordering::Relaxed)
    }

    /// Notes whether its latest reply, at so many seconds after 1970, carried a tag. It is
    /// written only when that changes. After a reply without a tag, a tag changes nothing for
    /// [`TAG_PAUSE`]: neither a server that returns only some tags nor an attacker who forges
    /// replies can make sessions move back and forth.
    pub(crate) fn note_tag(&self, returned: bool, unix: u64) {
        if self.returns_tags() != returned {
            if !returned {
                let until = unix + TAG_PAUSE.as_secs();
                self.no_tags_until.store(until, Ordering::Relaxed);
            } else if unix < self.no_tags_until.load(Ordering::Relaxed) {
                return;
            }
            self.returns_tags.store(returned, Ordering::Relaxed);
            let (upstream, server) = (&self.upstream, &self.name);
            // Who forges a reply of the server without one must not fill the log.
            tracing::debug!(
                upstream,
                server,
                returned,
                "server has begun or ceased to return tags"
            );
        }
    }

    /// Notes the time that it took to answer a session for the first time.
    pub(crate) fn note_answer(&self, took: Duration) {
        // Workers that meet here lose one of two notes, which harms nothing.
        let mut time = AnswerTime::from_bits(self.answer_time.0.load(Ordering::Relaxed));
        time.note(took);
        self.answer_time.0.store(time.to_bits(), Ordering::Relaxed);
    }

    /// The time within which nearly all its answers come; `None` if it was not seen
    /// to answer.
    pub(crate) fn usual_answer_time(&self) -> Option<Duration> {
        AnswerTime::from_bits(self.answer_time.0.load(Ordering::Relaxed)).usual()
    }
}

impl PartialEq for Server {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

/// A server as one listener writes to it.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// The server.
    pub server: Arc<Server>,
    /// What it is sent.
    pub mode: Mode,
    /// Where its datagrams are sent from.
    pub sources: Sources,
    /// How its replies find their client.
    pub replies: Replies,
    /// What its headers carry besides. `None` rather than none.
    pub tlvs: Option<Arc<OwnTlvs>>,
    /// Where the first datagrams of a session alone have the header: how long after it the
    /// next one has it again. `None` as long as the server seems to know it.
    pub repeat: Option<Duration>,
    /// The ports that it listens on, where it is written to at the port that the client wrote
    /// to.
    pub ports: Option<PortRange>,
}

impl Target {
    /// Whether the server listens on the port that it would be written to at, for a client
    /// that wrote to `local`.
    #[must_use]
    pub fn takes(&self, local: ListenerAddr) -> bool {
        self.ports
            .is_none_or(|ports| ports.contains(local.0.port()))
    }

    /// Whether sockets to both are the same.
    #[must_use]
    pub fn has_same_sockets(&self, other: &Self) -> bool {
        (&self.server, self.mode, &self.sources, &self.replies)
            == (&other.server, other.mode, &other.sources, &other.replies)
    }
}

/// How a server's replies find their client. Keys are equal where they make equal tags.
#[derive(Clone, Debug, PartialEq)]
pub enum Replies {
    /// By the session whose socket or source address they come to.
    Session,
    /// By the tag of a reply where the server returns it, otherwise as
    /// [`Session`](Self::Session).
    Auto(Arc<TagKeys>),
    /// By their tags. Replies without one are dropped.
    Tagged(Arc<TagKeys>),
}

impl Replies {
    /// The key of the tags that headers to the server carry, if they do.
    #[must_use]
    pub fn tag_keys(&self) -> Option<&Arc<TagKeys>> {
        match self {
            Self::Session => None,
            Self::Auto(keys) | Self::Tagged(keys) => Some(keys),
        }
    }
}

/// Where datagrams to a server are sent from, unless it is the client's address.
#[derive(Clone, Debug, PartialEq)]
pub enum Sources {
    /// Addresses of this host, in turn; empty for the kernel's choice. Each has local
    /// ports of its own. Each session has a socket of its own, unless its replies carry tags.
    Addresses(Arc<[IpAddr]>),
    /// Each session has an address of this network, unless its replies carry tags. Sessions
    /// of a worker share sockets: one for each family, port and set of options.
    Network(SourceNetwork),
}

impl Sources {
    /// Single addresses; none where sessions have a network, or the kernel chooses.
    #[must_use]
    pub fn addresses(&self) -> &[IpAddr] {
        match self {
            Self::Addresses(addresses) => addresses,
            Self::Network(_) => &[],
        }
    }

    /// Whether the configuration says where datagrams come from, rather than the kernel.
    #[must_use]
    pub fn are_given(&self) -> bool {
        match self {
            Self::Addresses(addresses) => !addresses.is_empty(),
            Self::Network(_) => true,
        }
    }

    /// The network that sessions have an address of, if they have.
    #[must_use]
    pub fn network(&self) -> Option<SourceNetwork> {
        match self {
            Self::Addresses(_) => None,
            Self::Network(network) => Some(*network),
        }
    }
}

/// A network that gives each session a source address of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceNetwork {
    /// Its addresses, which this host must accept as its own (a local route), of the
    /// server's family.
    pub network: IpNet,
    /// The source port of worker 0; each further worker has the next one. `None` for ports
    /// of the kernel's choice.
    pub port: Option<NonZeroU16>,
}

impl SourceNetwork {
    /// The address that health checks are sent from, and datagrams to servers that return
    /// tags. No session has it, so that an answer to a check is never taken for a client's
    /// reply.
    #[must_use]
    pub fn probe_address(&self) -> IpAddr {
        // The first address of an IPv4 network names the network, that of an IPv6 one is
        // the anycast address of its routers (RFC 4291, section 2.6.1).
        match self.network {
            IpNet::V4(net) => Ipv4Addr::from_bits(net.network().to_bits() | 1).into(),
            IpNet::V6(net) => Ipv6Addr::from_bits(net.network().to_bits() | 1).into(),
        }
    }

    /// How many addresses sessions can have: all but those of the network itself, of
    /// broadcasts, and of health checks.
    #[must_use]
    pub fn session_addresses(&self) -> u128 {
        let host_bits = self.network.max_prefix_len() - self.network.prefix_len();
        let all = 1u128.checked_shl(host_bits.into()).unwrap_or(u128::MAX);
        all.saturating_sub(if self.network.addr().is_ipv4() { 3 } else { 2 })
    }
}

/// The longest time for an answer. Slower answers count as this, so that an
/// attacker who has a server answer late doesn't keep unanswered sessions from ending.
pub(crate) const MAX_ANSWER_TIME: Duration = Duration::from_secs(2);

/// An [`AnswerTime`], apart from what is read for each datagram.
#[derive(Debug, Default)]
#[repr(align(128))]
struct SharedAnswerTime(AtomicU64);

/// How long a server takes to answer, as far as it was seen: smoothed as TCP's
/// retransmission timer is (RFC 6298, section 2). In microseconds.
#[derive(Clone, Copy, Debug, Default)]
struct AnswerTime {
    /// 0 before the first answer.
    mean: u32,
    deviation: u32,
}

impl AnswerTime {
    /// However fast a server is, its answer may wait in a busy host for so long.
    const MIN: Duration = Duration::from_millis(50);

    #[expect(clippy::cast_possible_truncation, reason = "the two halves")]
    fn from_bits(bits: u64) -> Self {
        Self {
            mean: bits as u32,
            deviation: (bits >> 32) as u32,
        }
    }

    fn to_bits(self) -> u64 {
        u64::from(self.deviation) << 32 | u64::from(self.mean)
    }

    fn note(&mut self, took: Duration) {
        let took = took.min(MAX_ANSWER_TIME).as_micros();
        let took = u32::try_from(took).unwrap_or(u32::MAX).max(1);
        if self.mean == 0 {
            (self.mean, self.deviation) = (took, took / 2);
            return;
        }
        let off = took.abs_diff(self.mean);
        self.deviation = self.deviation - self.deviation / 4 + off / 4;
        self.mean = (self.mean - self.mean / 8 + took / 8).max(1);
    }

    fn usual(self) -> Option<Duration> {
        let micros = u64::from(self.mean) + 4 * u64::from(self.deviation);
        let usual = Duration::from_micros(micros).clamp(Self::MIN, MAX_ANSWER_TIME);
        (self.mean > 0).then_some(usual)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_checks_have_an_address_that_no_session_has() {
        for (network, probe, sessions) in [
            ("10.99.0.0/16", "10.99.0.1", (1 << 16) - 3),
            ("127.64.0.0/10", "127.64.0.1", (1 << 22) - 3),
            ("192.0.2.4/30", "192.0.2.5", 1),
            ("fd00:1::/64", "fd00:1::1", (1 << 64) - 2),
            ("::/0", "::1", u128::MAX - 2),
        ] {
            let of = SourceNetwork {
                network: network.parse().unwrap(),
                port: None,
            };
            assert_eq!(of.probe_address().to_string(), probe);
            assert_eq!(of.session_addresses(), sessions, "{network}");
        }
    }

    #[test]
    fn a_server_that_leaves_a_tag_out_is_not_believed_at_once_again() {
        let server = Server::new("u", "s", ServerAddr(([192, 0, 2, 1], 53).into()), 1);
        server.note_tag(true, 1000);
        assert!(server.returns_tags());
        server.note_tag(false, 1001);
        for unix in 1001..1031 {
            server.note_tag(true, unix);
            assert!(!server.returns_tags(), "{unix}");
        }
        server.note_tag(true, 1031);
        assert!(server.returns_tags());
    }

    #[test]
    fn the_usual_answer_time_follows_a_server_within_bounds() {
        let server = Server::new("u", "s", ServerAddr(([192, 0, 2, 1], 53).into()), 1);
        let usual = || server.usual_answer_time();
        assert_eq!(usual(), None);
        server.note_answer(Duration::from_micros(300));
        assert_eq!(usual(), Some(AnswerTime::MIN));
        for _ in 0..100 {
            server.note_answer(Duration::from_millis(200));
        }
        let slow = usual().unwrap();
        assert!(slow >= Duration::from_millis(199) && slow < Duration::from_millis(300));
        for _ in 0..100 {
            server.note_answer(Duration::from_secs(3600));
        }
        assert_eq!(usual(), Some(MAX_ANSWER_TIME));
        for _ in 0..200 {
            server.note_answer(Duration::ZERO);
        }
        assert_eq!(usual(), Some(AnswerTime::MIN));
    }
}
