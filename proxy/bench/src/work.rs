//! The loads that proxies are compared under.

use std::net::{Ipv4Addr, SocketAddrV4};

use crate::load::{FIRST_ADDRESS, Load, Senders};
use crate::peer::Peer;
use crate::stage::{Sample, Terms};
use crate::tag::Shape;

/// A load, and the proxies that are compared under it.
pub(crate) struct Work {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    pub(crate) load: Load,
    pub(crate) terms: Terms,
    pub(crate) peers: Vec<Peer>,
    /// Those that a short run leaves out.
    pub(crate) slow: Vec<Peer>,
    /// Each measurement gets a process of its own, since sessions of the one
    /// before would be in the way.
    pub(crate) own_process: bool,
    /// The highest rate without loss is looked for.
    pub(crate) search: bool,
    /// Memory, descriptors and losses are counted, which need no second round.
    pub(crate) counted: bool,
}

/// Requests a second, where a rate is given.
const RATE: u64 = 20_000;

/// All works; `time` is how long each is measured, in milliseconds.
pub(crate) fn works(time: u64) -> Vec<Work> {
    let base = base(time);
    [
        closed(&base),
        accept(&base),
        other(&base),
        paced(&base),
        many(&base),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn base(time: u64) -> Load {
    Load {
        target: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0),
        from: FIRST_ADDRESS,
        clients: 64,
        first: 0,
        ports: 2,
        size: 64,
        burst: 1,
        flight: 1,
        rate: None,
        fresh: false,
        dns: false,
        senders: Senders::Clients,
        warm_up: 300,
        time,
        proxy: Vec::new(),
        server: Vec::new(),
    }
}

fn work(name: &'static str, title: &'static str, load: Load, peers: &[Peer]) -> Work {
    Work {
        name,
        title,
        terms: Terms {
            shape: Shape::Plain,
            one_reply: false,
            hosts: false,
            unprivileged: false,
            clients: load.clients,
        },
        load,
        peers: peers.to_vec(),
        slow: Vec::new(),
        own_process: false,
        search: false,
        counted: false,
    }
}

impl Work {
    /// Leaves peers out of a short run.
    fn without(self, slow: &[Peer]) -> Self {
        let slow = slow.to_vec();
        Self { slow, ..self }
    }

    /// Leaves all of it out of a short run.
    fn long(self) -> Self {
        let slow = self.peers.clone();
        Self { slow, ..self }
    }

    fn with_terms(mut self, change: impl FnOnce(&mut Terms)) -> Self {
        change(&mut self.terms);
        self
    }

    fn alone(self) -> Self {
        Self {
            own_process: true,
            ..self
        }
    }
}

/// As fast as replies come.
fn closed(base: &Load) -> Vec<Work> {
    use Peer::{
        Bare, BareCareful, BareJoin, Envoy, Network, Nginx, NginxHeader, Ours, Reference, Sozu,
        Tagged, TaggedBatch, Udppp,
    };
    let scattered = |clients, warm_up| Load {
        clients,
        warm_up,
        ..base.clone()
    };
    let burst = |burst| Load {
        clients: 16,
        size: 1_200,
        burst,
        ..base.clone()
    };
    let with_bursts = [
        Ours,
        Reference,
        Network,
        TaggedBatch,
        Bare,
        Nginx,
        Envoy,
        Sozu,
        Udppp,
    ];
    let others = [Reference, NginxHeader, Envoy, Sozu, Udppp];
    vec![
        work(
            "scattered-64",
            "64 clients, 64 B",
            base.clone(),
            &[
                Ours,
                Reference,
                Network,
                Tagged,
                TaggedBatch,
                Bare,
                BareCareful,
                Nginx,
                NginxHeader,
                Envoy,
                Sozu,
                Udppp,
            ],
        )
        .without(&[&others[..], &[Network, Tagged, TaggedBatch, BareCareful]].concat()),
        work(
            "runs-64",
            "64 clients that keep 8 datagrams in flight, 64 B",
            Load {
                flight: 8,
                ..base.clone()
            },
            &[
                Ours,
                Reference,
                Network,
                TaggedBatch,
                Bare,
                BareJoin,
                Nginx,
                NginxHeader,
                Sozu,
            ],
        )
        .without(&[&others[..], &[TaggedBatch, BareJoin]].concat()),
        work(
            "scattered-1024",
            "1,024 clients, 64 B",
            scattered(1_024, 500),
            &[
                Ours,
                Reference,
                Network,
                Tagged,
                TaggedBatch,
                Bare,
                BareJoin,
                Nginx,
                NginxHeader,
                Envoy,
                Sozu,
            ],
        )
        .without(&[&others[..], &[BareJoin]].concat()),
        work(
            "scattered-16384",
            "16,384 clients, 64 B",
            scattered(16_384, 1_500),
            &[Ours, Network, Tagged, TaggedBatch, Bare, Nginx, NginxHeader],
        )
        // Session sockets of two proxies would need more ports than there are.
        .alone()
        .without(&[Tagged, TaggedBatch, NginxHeader]),
        work(
            "burst-8",
            "16 clients, bursts of 8 × 1200 B",
            burst(8),
            &with_bursts,
        )
        .long(),
        work(
            "burst-32",
            "16 clients, bursts of 32 × 1200 B",
            burst(32),
            &with_bursts,
        )
        .without(&others),
    ]
}

/// Behind another proxy that writes headers, beside the same clients without one: the payload
/// is the same.
fn accept(base: &Load) -> Vec<Work> {
    use Peer::{Accept, AcceptShared, Ours};
    let peers = [Ours, Accept, AcceptShared];
    vec![
        work(
            "accept-64",
            "64 clients, 64 B, behind another proxy",
            base.clone(),
            &peers,
        ),
        work(
            "accept-1024",
            "1,024 clients, 64 B, behind another proxy",
            Load {
                clients: 1_024,
                warm_up: 500,
                ..base.clone()
            },
            &peers,
        ),
        work(
            "accept-burst-32",
            "16 clients, bursts of 32 × 1200 B, behind another proxy",
            Load {
                clients: 16,
                size: 1_200,
                burst: 32,
                ..base.clone()
            },
            &peers,
        ),
    ]
    .into_iter()
    .map(Work::long)
    .collect()
}

/// Other sizes, and other ways to set up the proxy.
fn other(base: &Load) -> Vec<Work> {
    use Peer::{
        Bare, Dnsdist, Dsr, DsrSdk, Envoy, Nginx, NginxTransparent, Ours, Sozu, Transparent,
        TwoWorkers, Udppp,
    };
    let sized = |size| Load {
        size,
        ..base.clone()
    };
    let common = [Ours, Bare, Nginx, Envoy, Sozu];
    vec![
        work(
            "scattered-dns",
            "64 clients, DNS questions of 64 B",
            base.clone(),
            &[Ours, Dnsdist],
        )
        .with_terms(|terms| terms.shape = Shape::Dns),
        work("scattered-512", "64 clients, 512 B", sized(512), &common),
        work(
            "scattered-1200",
            "64 clients, 1200 B",
            sized(1_200),
            &common,
        ),
        Work {
            search: true,
            ..work(
                "highest-rate",
                "64 clients, highest rate with at most 0.01 % lost, 64 B",
                Load {
                    warm_up: 100,
                    time: base.time / 4,
                    ..base.clone()
                },
                &[Ours, Bare, Nginx, Envoy, Sozu, Udppp],
            )
        },
        work(
            "two-workers",
            "64 clients, 64 B, on cores that the clients share",
            base.clone(),
            &[Ours, TwoWorkers],
        ),
        work(
            "modes",
            "64 clients, 64 B, over three hosts",
            base.clone(),
            &[Ours, Transparent, NginxTransparent, Dsr, DsrSdk, Nginx],
        )
        .with_terms(|terms| terms.hosts = true),
    ]
    .into_iter()
    .map(Work::long)
    .collect()
}

/// At a rate.
fn paced(base: &Load) -> Vec<Work> {
    use Peer::{Bare, BusyPoll, Coalesce, Envoy, Network, Nginx, Ours, Sozu, Tagged, Udppp};
    let paced = Load {
        rate: Some(RATE),
        ..base.clone()
    };
    let several = [
        Ours, BusyPoll, Coalesce, Network, Tagged, Bare, Nginx, Envoy, Sozu,
    ];
    vec![
        work(
            "latency",
            "64 clients, 20,000 requests/s, 64 B",
            paced.clone(),
            &several,
        )
        .without(&[BusyPoll, Coalesce, Network, Tagged, Bare, Envoy, Sozu]),
        work(
            "sessions",
            "18,000 clients, 20,000 datagrams/s, 64 B",
            Load {
                clients: 18_000,
                warm_up: 2_000,
                ..paced
            },
            &[Ours, Network, Tagged, Bare, Nginx, Envoy, Udppp],
        )
        .alone()
        .long(),
        work(
            "new-sessions",
            "every datagram from a new client, 64 B",
            Load {
                fresh: true,
                // Not those who asked whether the proxy is ready.
                first: 1_000_000,
                ..base.clone()
            },
            &[Ours, Network, Nginx, Sozu],
        )
        .with_terms(|terms| terms.one_reply = true)
        .alone()
        .without(&[Network, Sozu]),
    ]
}

/// More clients than a socket for each could serve: all of them write once while the
/// proxy warms up, and some of them once more.
fn many(base: &Load) -> Vec<Work> {
    let at_rate = |clients: usize, rate: u64, time| Load {
        clients,
        rate: Some(rate),
        warm_up: clients as u64 * 1_000 / rate,
        time,
        ..base.clone()
    };
    let counted = |work: Work| {
        Work {
            counted: true,
            ..work
        }
        .with_terms(|terms| terms.unprivileged = true)
        .alone()
        .long()
    };
    vec![
        counted(work(
            "sessions-200k",
            "200,000 clients, 40,000 datagrams/s, 64 B, as nobody",
            at_rate(200_000, 40_000, 6_000),
            &[Peer::Network, Peer::Tagged],
        )),
        counted(work(
            "sessions-1m",
            "1,000,000 clients, 50,000 datagrams/s, 64 B, as nobody",
            at_rate(1_000_000, 50_000, 10_000),
            &[Peer::Network],
        )),
        counted(work(
            "stateless-1m",
            "1,000,000 clients without sessions, 50,000 datagrams/s, 64 B",
            at_rate(1_000_000, 50_000, 5_000),
            &[Peer::Stateless],
        )),
    ]
}

/// What of a sample is compared, or bounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Figure {
    Cpu,
    Whole,
    Throughput,
    P50,
    P99,
    P999,
    SessionMemory,
    KernelMemory,
    Memory,
    Descriptors,
    Lost,
    Wrong,
    Rate,
}

impl Figure {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Cpu => "CPU per datagram",
            Self::Whole => "whole machine's CPU",
            Self::Throughput => "throughput",
            Self::P50 => "latency p50",
            Self::P99 => "latency p99",
            Self::P999 => "latency p99.9",
            Self::SessionMemory => "bytes per session",
            Self::KernelMemory => "kernel's bytes per session",
            Self::Memory => "MB of process",
            Self::Descriptors => "descriptors",
            Self::Lost => "lost",
            Self::Wrong => "wrong",
            Self::Rate => "highest rate",
        }
    }

    /// What it is counted in, if it isn't told by its name.
    pub(crate) fn unit(self) -> &'static str {
        match self {
            Self::Cpu | Self::Whole => ", ns",
            Self::Throughput | Self::Rate => ", /s",
            Self::P50 | Self::P99 | Self::P999 => ", µs",
            Self::SessionMemory
            | Self::KernelMemory
            | Self::Memory
            | Self::Descriptors
            | Self::Lost
            | Self::Wrong => "",
        }
    }

    pub(crate) fn of(self, sample: &Sample) -> Option<f64> {
        let (load, latency) = (&sample.load, sample.load.latency);
        match self {
            Self::Cpu => Some(sample.cpu),
            Self::Whole => Some(sample.whole),
            Self::Throughput => Some(load.received as f64 / load.seconds),
            Self::P50 => latency.map(|latency| latency.p50),
            Self::P99 => latency.map(|latency| latency.p99),
            Self::P999 => latency.map(|latency| latency.p999),
            Self::SessionMemory => Some(sample.session_memory),
            Self::KernelMemory => sample.kernel_memory,
            Self::Memory => Some(sample.memory / 1e6),
            Self::Descriptors => Some(sample.descriptors as f64),
            Self::Lost => Some((load.lost_before + load.lost) as f64),
            Self::Wrong => Some((load.wrong + load.reordered + sample.wrong_headers) as f64),
            Self::Rate => sample.rate,
        }
    }
}

impl Work {
    /// What says something under this load.
    pub(crate) fn figures(&self) -> &'static [Figure] {
        use Figure::{
            Cpu, Descriptors, KernelMemory, Lost, Memory, P50, P99, P999, Rate, SessionMemory,
            Throughput, Whole, Wrong,
        };
        if self.search {
            return &[Rate];
        }
        if self.counted {
            return &[
                Memory,
                SessionMemory,
                KernelMemory,
                Descriptors,
                Lost,
                Wrong,
            ];
        }
        match (self.load.rate, self.own_process) {
            (None, _) => &[Cpu, Whole, Throughput],
            // The generator looks at the clock all the time, which the whole machine's CPU
            // would tell most of.
            (Some(_), false) => &[Cpu, P50, P99, P999],
            (Some(_), true) => &[Cpu, P99, SessionMemory, KernelMemory, Descriptors],
        }
    }
}
