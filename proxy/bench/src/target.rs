//! What must be reached, and whether it was.

use serde::Serialize;

use crate::measure::Spread;
use crate::outcome::Outcome;
use crate::peer::Peer;
use crate::work::Figure;

/// A figure of ours, divided by the same figure of a peer in the same round, or as it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    pub(crate) work: &'static str,
    pub(crate) ours: Peer,
    pub(crate) figure: Figure,
    pub(crate) peer: Option<Peer>,
    pub(crate) limit: Limit,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Limit {
    AtMost(f64),
    AtLeast(f64),
}

impl Limit {
    pub(crate) fn met(self, value: f64) -> bool {
        match self {
            Self::AtMost(limit) => value <= limit,
            Self::AtLeast(limit) => value >= limit,
        }
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (sign, limit) = match self {
            Self::AtMost(limit) => ('≤', limit),
            Self::AtLeast(limit) => ('≥', limit),
        };
        if limit.fract() == 0.0 && *limit != 1.0 {
            write!(f, "{sign} {limit:.0}")
        } else {
            write!(f, "{sign} {limit:.2}")
        }
    }
}

/// How a target was met: by the median, in some rounds only, or in none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reached {
    Met,
    Partly,
    Missed,
    NotMeasured,
}

impl Reached {
    pub(crate) fn of(limit: Limit, value: Option<Spread>) -> Self {
        let Some(value) = value else {
            return Self::NotMeasured;
        };
        if limit.met(value.median) {
            Self::Met
        } else if limit.met(value.low) || limit.met(value.high) {
            Self::Partly
        } else {
            Self::Missed
        }
    }

    pub(crate) fn mark(self) -> char {
        match self {
            Self::Met => '✓',
            Self::Partly => '~',
            Self::Missed => '✗',
            Self::NotMeasured => '?',
        }
    }
}

/// A target, and what it came to.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Verdict {
    pub(crate) work: &'static str,
    pub(crate) ours: &'static str,
    pub(crate) figure: &'static str,
    /// `None` for a figure that is not divided by anybody's.
    pub(crate) against: Option<&'static str>,
    pub(crate) limit: Limit,
    pub(crate) value: Option<Spread>,
    pub(crate) reached: Reached,
}

/// A verdict on each target of the works that were measured.
pub(crate) fn verdicts(outcome: &Outcome) -> Vec<Verdict> {
    let verdict = |target: Target| {
        let work = outcome.work(target.work)?;
        let value = match target.peer {
            Some(peer) => work.ratio(target.ours, peer, target.figure),
            None => work.value(target.ours, target.figure),
        };
        Some(Verdict {
            work: target.work,
            ours: target.ours.name(),
            figure: target.figure.name(),
            against: target.peer.map(Peer::name),
            limit: target.limit,
            value,
            reached: Reached::of(target.limit, value),
        })
    };
    targets().into_iter().filter_map(verdict).collect()
}

pub(crate) fn targets() -> Vec<Target> {
    use Figure::{
        Cpu, Descriptors, KernelMemory, Lost, Memory, P50, P99, SessionMemory, Throughput, Whole,
        Wrong,
    };
    use Limit::{AtLeast, AtMost};
    use Peer::{
        Accept, AcceptShared, Bare, BusyPoll, Coalesce, Dsr, Envoy, Network, Nginx,
        NginxTransparent, Ours, Reference, Sozu, Stateless, Tagged, TaggedBatch, Transparent,
        Udppp,
    };
    let of = |work, ours, figure, peer, limit| Target {
        work,
        ours,
        figure,
        peer,
        limit,
    };
    let ratio = |work, ours, figure, peer, limit| of(work, ours, figure, Some(peer), limit);
    let count = |work, ours, figure, limit| of(work, ours, figure, None, AtMost(limit));
    vec![
        ratio("scattered-64", Ours, Cpu, Bare, AtMost(1.05)),
        ratio("scattered-64", Ours, Cpu, Nginx, AtMost(1.0)),
        ratio("scattered-64", Ours, Throughput, Nginx, AtLeast(1.0)),
        ratio("scattered-64", Ours, Cpu, Sozu, AtMost(1.0)),
        ratio("scattered-64", Ours, Throughput, Sozu, AtLeast(1.0)),
        ratio("scattered-64", Ours, Cpu, Envoy, AtMost(0.8)),
        ratio("scattered-64", Ours, Cpu, Udppp, AtMost(0.8)),
        ratio("runs-64", Ours, Cpu, Bare, AtMost(0.85)),
        ratio("runs-64", Ours, Cpu, Nginx, AtMost(0.9)),
        ratio("runs-64", Network, Cpu, Bare, AtMost(0.85)),
        ratio("scattered-1024", Ours, Cpu, Bare, AtMost(1.05)),
        ratio("scattered-1024", Ours, Cpu, Nginx, AtMost(0.95)),
        ratio("scattered-1024", Network, Cpu, Bare, AtMost(0.92)),
        ratio("scattered-1024", Network, Cpu, Nginx, AtMost(0.8)),
        ratio("scattered-1024", Network, Throughput, Nginx, AtLeast(1.15)),
        ratio("scattered-1024", Tagged, Cpu, Bare, AtMost(0.75)),
        ratio("scattered-1024", TaggedBatch, Cpu, Bare, AtMost(0.58)),
        ratio("scattered-1024", TaggedBatch, Cpu, Nginx, AtMost(0.5)),
        ratio(
            "scattered-1024",
            TaggedBatch,
            Throughput,
            Nginx,
            AtLeast(1.7),
        ),
        ratio("scattered-1024", TaggedBatch, Whole, Nginx, AtMost(0.65)),
        ratio("scattered-16384", Network, Cpu, Bare, AtMost(0.92)),
        ratio("scattered-16384", Network, Cpu, Nginx, AtMost(0.8)),
        ratio("scattered-16384", Network, Throughput, Nginx, AtLeast(1.15)),
        ratio("accept-64", Accept, Cpu, Ours, AtMost(1.05)),
        ratio("accept-64", AcceptShared, Cpu, Ours, AtMost(1.05)),
        ratio("accept-1024", Accept, Cpu, Ours, AtMost(1.05)),
        ratio("accept-1024", AcceptShared, Cpu, Ours, AtMost(1.05)),
        ratio("accept-burst-32", Accept, Cpu, Ours, AtMost(1.15)),
        ratio("accept-burst-32", AcceptShared, Cpu, Ours, AtMost(1.15)),
        ratio("modes", Transparent, Cpu, NginxTransparent, AtMost(1.0)),
        ratio("modes", Dsr, Cpu, Ours, AtMost(0.6)),
        ratio("burst-8", Ours, Cpu, Reference, AtMost(1.02)),
        ratio("burst-8", Ours, Throughput, Nginx, AtLeast(2.2)),
        ratio("burst-8", Ours, Cpu, Nginx, AtMost(0.45)),
        ratio("burst-32", Ours, Cpu, Reference, AtMost(1.02)),
        ratio("burst-32", Ours, Throughput, Nginx, AtLeast(3.2)),
        ratio("burst-32", Ours, Cpu, Nginx, AtMost(0.33)),
        ratio("burst-32", Network, Cpu, Ours, AtMost(1.1)),
        ratio("burst-32", TaggedBatch, Cpu, Ours, AtMost(1.1)),
        ratio("latency", Ours, P50, Nginx, AtMost(1.05)),
        ratio("latency", Ours, P99, Nginx, AtMost(1.05)),
        ratio("latency", BusyPoll, P50, Nginx, AtMost(0.7)),
        ratio("latency", Coalesce, Cpu, Nginx, AtMost(0.75)),
        ratio("sessions", Ours, P99, Nginx, AtMost(0.5)),
        ratio("sessions", Ours, SessionMemory, Nginx, AtMost(0.1)),
        ratio("sessions", Ours, Cpu, Nginx, AtMost(1.0)),
        count("sessions", Ours, Lost, 0.0),
        ratio("new-sessions", Ours, Throughput, Nginx, AtLeast(3.0)),
        count("sessions-200k", Network, Lost, 0.0),
        count("sessions-200k", Network, Wrong, 0.0),
        count("sessions-200k", Network, Descriptors, 16.0),
        count("sessions-200k", Network, SessionMemory, 250.0),
        // What a table of the kernel's may grow by, whatever the number of sessions.
        count("sessions-200k", Network, KernelMemory, 5.0),
        count("sessions-1m", Network, Lost, 0.0),
        count("sessions-1m", Network, Wrong, 0.0),
        count("sessions-1m", Network, SessionMemory, 300.0),
        count("stateless-1m", Stateless, Lost, 0.0),
        count("stateless-1m", Stateless, Wrong, 0.0),
        count("stateless-1m", Stateless, Memory, 60.0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::work::works;

    #[test]
    fn every_target_is_measured_by_some_work() {
        let works = works(1_000);
        for target in targets() {
            let work = works.iter().find(|work| work.name == target.work);
            let work = work.unwrap_or_else(|| panic!("{target:?}: no such work"));
            for peer in [Some(target.ours), target.peer].into_iter().flatten() {
                assert!(work.peers.contains(&peer), "{target:?}: without {peer:?}");
            }
        }
    }

    #[test]
    fn median_decides_and_a_single_round_makes_it_partly() {
        let spread = |low, median, high| Some(Spread { median, low, high });
        let at_most = Limit::AtMost(0.9);
        assert_eq!(Reached::of(at_most, spread(0.8, 0.9, 1.2)), Reached::Met);
        assert_eq!(
            Reached::of(at_most, spread(0.8, 0.91, 1.2)),
            Reached::Partly
        );
        assert_eq!(
            Reached::of(at_most, spread(0.91, 0.92, 1.2)),
            Reached::Missed
        );
        let at_least = Limit::AtLeast(1.7);
        assert_eq!(
            Reached::of(at_least, spread(1.0, 1.6, 1.8)),
            Reached::Partly
        );
        assert_eq!(
            Reached::of(at_least, spread(1.0, 1.6, 1.69)),
            Reached::Missed
        );
        assert_eq!(Reached::of(at_least, None), Reached::NotMeasured);
    }

    #[test]
    fn limits_of_counts_have_no_decimals() {
        assert_eq!(Limit::AtMost(0.0).to_string(), "≤ 0");
        assert_eq!(Limit::AtMost(1.0).to_string(), "≤ 1.00");
        assert_eq!(Limit::AtLeast(1.15).to_string(), "≥ 1.15");
        assert_eq!(Limit::AtMost(250.0).to_string(), "≤ 250");
    }
}
