//! The loads that proxies are compared under, and the limits that each must meet.

use std::net::{Ipv4Addr, SocketAddrV4};

use crate::load::{FIRST_ADDRESS, Load};
use crate::peer::Peer;
use crate::stage::Sample;
use crate::tag::Shape;

/// A load, and the proxies that are compared under it.
pub(crate) struct Work {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    pub(crate) load: Load,
    pub(crate) shape: Shape,
    pub(crate) peers: Vec<Peer>,
    /// Each measurement gets a process of its own, since sessions of the one
    /// before would be in the way.
    pub(crate) own_process: bool,
    pub(crate) one_reply: bool,
    /// The highest rate without loss is looked for.
    pub(crate) search: bool,
    /// Clients, proxy and server are hosts of their own.
    pub(crate) hosts: bool,
}

/// Clients of the work with many.
pub(crate) const SESSIONS: usize = 18_000;

/// Requests a second, where a rate is given.
const RATE: u64 = 20_000;

/// All works; `time` is how long each is measured, in milliseconds.
pub(crate) fn works(time: u64) -> Vec<Work> {
    use Peer::{
        Bare, BareCareful, Dnsdist, Envoy, Nginx, NginxTransparent, Ours, OursBusyPoll,
        OursCoalesce, OursDsr, OursDsrSdk, OursTransparent, OursTwice, Sozu, Udppp,
    };
    let load = Load {
        target: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0),
        from: FIRST_ADDRESS,
        clients: 64,
        first: 0,
        ports: 2,
        size: 64,
        burst: 1,
        rate: None,
        fresh: false,
        dns: false,
        warm_up: 300,
        time,
    };
    let work = |name, title, load, peers| Work {
        name,
        title,
        load,
        shape: Shape::Plain,
        peers,
        own_process: false,
        one_reply: false,
        search: false,
        hosts: false,
    };
    let all = vec![Ours, Bare, Nginx, Envoy, Sozu, Udppp];
    let with_careful = vec![Ours, Bare, BareCareful, Nginx, Envoy, Sozu, Udppp];
    let sized = |size| Load {
        size,
        ..load.clone()
    };
    let burst = |burst| Load {
        clients: 16,
        size: 1_200,
        burst,
        ..load.clone()
    };
    let paced = Load {
        rate: Some(RATE),
        ..load.clone()
    };
    vec![
        work(
            "scattered-64",
            "64 clients, closed loop, 64 B",
            sized(64),
            with_careful,
        ),
        Work {
            shape: Shape::Dns,
            ..work(
                "scattered-dns",
                "64 clients, closed loop, DNS questions of 64 B",
                sized(64),
                vec![Ours, Dnsdist],
            )
        },
        work(
            "scattered-512",
            "64 clients, closed loop, 512 B",
            sized(512),
            all.clone(),
        ),
        work(
            "scattered-1200",
            "64 clients, closed loop, 1200 B",
            sized(1_200),
            all.clone(),
        ),
        Work {
            search: true,
            ..work(
                "highest-rate",
                "64 clients, highest rate with at most 0.01 % lost, 64 B",
                Load {
                    warm_up: 100,
                    time: time / 4,
                    ..load.clone()
                },
                vec![Ours, Bare, Nginx, Envoy, Sozu, Udppp],
            )
        },
        work(
            "two-workers",
            "64 clients, closed loop, 64 B, on cores that the clients share",
            load.clone(),
            vec![Ours, OursTwice],
        ),
        Work {
            hosts: true,
            ..work(
                "modes",
                "64 clients, closed loop, 64 B, over three hosts",
                load.clone(),
                vec![
                    Ours,
                    OursTransparent,
                    NginxTransparent,
                    OursDsr,
                    OursDsrSdk,
                    Nginx,
                ],
            )
        },
        work(
            "burst-8",
            "16 clients, bursts of 8 × 1200 B",
            burst(8),
            all.clone(),
        ),
        work(
            "burst-32",
            "16 clients, bursts of 32 × 1200 B",
            burst(32),
            all,
        ),
        work(
            "latency",
            "64 clients, 20,000 requests/s, 64 B",
            paced.clone(),
            vec![Ours, OursBusyPoll, OursCoalesce, Bare, Nginx, Envoy, Sozu],
        ),
        Work {
            own_process: true,
            ..work(
                "sessions",
                "18,000 clients, 20,000 datagrams/s, 64 B",
                Load {
                    clients: SESSIONS,
                    warm_up: 2_000,
                    ..paced
                },
                vec![Ours, Bare, Nginx, Envoy, Udppp],
            )
        },
        Work {
            own_process: true,
            one_reply: true,
            ..work(
                "new-sessions",
                "every datagram from a new client, 64 B",
                Load {
                    fresh: true,
                    // Not those who asked whether the proxy is ready.
                    first: 1_000_000,
                    ..load.clone()
                },
                vec![Ours, Nginx, Sozu],
            )
        },
    ]
}

/// What of a sample is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Figure {
    Cpu,
    Throughput,
    P50,
    P99,
    P999,
    Memory,
    Rate,
}

impl Figure {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Cpu => "CPU per datagram",
            Self::Throughput => "throughput",
            Self::P50 => "latency p50",
            Self::P99 => "latency p99",
            Self::P999 => "latency p99.9",
            Self::Memory => "memory per session",
            Self::Rate => "highest rate",
        }
    }

    pub(crate) fn of(self, sample: &Sample) -> Option<f64> {
        let latency = sample.load.latency;
        match self {
            Self::Cpu => Some(sample.cpu),
            Self::Throughput => Some(sample.load.received as f64 / sample.load.seconds),
            Self::P50 => latency.map(|latency| latency.p50),
            Self::P99 => latency.map(|latency| latency.p99),
            Self::P999 => latency.map(|latency| latency.p999),
            Self::Memory => Some(sample.memory),
            Self::Rate => sample.rate,
        }
        .filter(|value| *value > 0.0)
    }
}

impl Work {
    /// What says something under this load.
    pub(crate) fn figures(&self) -> &'static [Figure] {
        use Figure::{Cpu, Memory, P50, P99, P999, Rate, Throughput};
        if self.search {
            return &[Rate];
        }
        match (self.load.rate, self.own_process) {
            (None, _) => &[Cpu, Throughput],
            (Some(_), false) => &[Cpu, P50, P99, P999],
            (Some(_), true) => &[Cpu, Memory],
        }
    }
}

/// What must be reached: a figure of ours divided by a peer's.
pub(crate) struct Goal {
    pub(crate) work: &'static str,
    pub(crate) ours: Peer,
    pub(crate) peer: Peer,
    pub(crate) figure: Figure,
    pub(crate) limit: Limit,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Limit {
    AtMost(f64),
    AtLeast(f64),
}

impl Limit {
    pub(crate) fn met(self, ratio: f64) -> bool {
        match self {
            Self::AtMost(limit) => ratio <= limit,
            Self::AtLeast(limit) => ratio >= limit,
        }
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtMost(limit) => write!(f, "≤ {limit:.2}"),
            Self::AtLeast(limit) => write!(f, "≥ {limit:.2}"),
        }
    }
}

pub(crate) fn goals() -> Vec<Goal> {
    use Figure::{Cpu, Memory, P50, P99, Throughput};
    use Limit::{AtLeast, AtMost};
    use Peer::{
        Bare, Envoy, Nginx, NginxTransparent, Ours, OursBusyPoll, OursCoalesce, OursDsr,
        OursTransparent, Sozu, Udppp,
    };
    let goal = |work, ours, peer, figure, limit| Goal {
        work,
        ours,
        peer,
        figure,
        limit,
    };
    vec![
        goal("scattered-64", Ours, Bare, Cpu, AtMost(1.05)),
        goal("scattered-64", Ours, Nginx, Cpu, AtMost(1.0)),
        goal("scattered-64", Ours, Nginx, Throughput, AtLeast(1.0)),
        goal("scattered-64", Ours, Sozu, Cpu, AtMost(1.0)),
        goal("scattered-64", Ours, Sozu, Throughput, AtLeast(1.0)),
        goal("scattered-64", Ours, Envoy, Cpu, AtMost(0.8)),
        goal("scattered-64", Ours, Udppp, Cpu, AtMost(0.8)),
        goal("modes", OursTransparent, NginxTransparent, Cpu, AtMost(1.0)),
        goal("modes", OursDsr, Ours, Cpu, AtMost(0.6)),
        goal("burst-8", Ours, Nginx, Throughput, AtLeast(2.2)),
        goal("burst-8", Ours, Nginx, Cpu, AtMost(0.45)),
        goal("burst-32", Ours, Nginx, Throughput, AtLeast(3.2)),
        goal("burst-32", Ours, Nginx, Cpu, AtMost(0.33)),
        goal("latency", Ours, Nginx, P50, AtMost(1.0)),
        goal("latency", Ours, Nginx, P99, AtMost(1.0)),
        goal("latency", OursBusyPoll, Nginx, P50, AtMost(0.7)),
        goal("latency", OursCoalesce, Nginx, Cpu, AtMost(0.75)),
        goal("sessions", Ours, Nginx, Memory, AtMost(0.1)),
        goal("sessions", Ours, Nginx, Cpu, AtMost(1.0)),
        goal("new-sessions", Ours, Nginx, Throughput, AtLeast(1.2)),
    ]
}
