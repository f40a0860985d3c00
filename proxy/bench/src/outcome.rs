//! Samples of all rounds, and ratios between proxies. A ratio is taken within a
//! round, between neighbours in time, and only then is the median taken: a
//! machine that others use too drifts more between rounds than within one.

use serde::Serialize;

use crate::host::{Machine, Priority};
use crate::measure::{Ratio, Spread};
use crate::peer::Peer;
use crate::stage::Sample;
use crate::target::Verdict;
use crate::work::Figure;

/// All of a run.
#[derive(Serialize)]
pub(crate) struct Outcome {
    pub(crate) machine: Machine,
    pub(crate) rounds: usize,
    pub(crate) priority: Priority,
    pub(crate) receive_buffers: &'static str,
    pub(crate) whole: &'static str,
    pub(crate) works: Vec<Measured>,
    pub(crate) micro: Vec<Ratio>,
    /// Made of the works.
    pub(crate) targets: Vec<Verdict>,
}

/// A work, and what it came to.
#[derive(Serialize)]
pub(crate) struct Measured {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    #[serde(skip)]
    pub(crate) figures: &'static [Figure],
    pub(crate) peers: Vec<Series>,
}

/// The samples of one proxy, one for each round.
#[derive(Serialize)]
pub(crate) struct Series {
    pub(crate) peer: Peer,
    pub(crate) samples: Vec<Sample>,
    /// Why there are no more.
    pub(crate) failure: Option<String>,
}

impl Measured {
    pub(crate) fn series(&self, peer: Peer) -> Option<&Series> {
        self.peers.iter().find(|series| series.peer == peer)
    }

    /// A figure of `one` divided by that of `other`, round by round.
    pub(crate) fn ratio(&self, one: Peer, other: Peer, figure: Figure) -> Option<Spread> {
        let (one, other) = (self.series(one)?, self.series(other)?);
        let pairs = one.samples.iter().zip(&other.samples);
        let ratio = |(one, other)| {
            let (one, other) = (figure.of(one)?, figure.of(other)?);
            (one > 0.0 && other > 0.0).then_some(one / other)
        };
        Spread::of(pairs.filter_map(ratio).collect())
    }

    /// A figure of `one` as it is.
    pub(crate) fn value(&self, one: Peer, figure: Figure) -> Option<Spread> {
        let samples = &self.series(one)?.samples;
        Spread::of(
            samples
                .iter()
                .filter_map(|sample| figure.of(sample))
                .collect(),
        )
    }
}

impl Series {
    /// Part of its core that the proxy used, in the median.
    pub(crate) fn busy(&self) -> Option<f64> {
        let values = self.samples.iter().map(|sample| sample.busy);
        Some(Spread::of(values.collect())?.median)
    }

    /// Datagrams that never came back, of all that were sent. The end of the
    /// warm-up counts: there sessions are opened.
    pub(crate) fn lost(&self) -> u64 {
        let samples = self.samples.iter();
        samples.map(|s| s.load.lost + s.load.lost_before).sum()
    }

    pub(crate) fn sent(&self) -> u64 {
        self.samples.iter().map(|s| s.load.sent).sum()
    }

    /// Replies to the wrong client, changed, twice or out of order, and headers of the
    /// wrong client.
    pub(crate) fn wrong(&self) -> u64 {
        let samples = self.samples.iter();
        // Each sample has the headers of those before it, too.
        let headers = self.samples.iter().map(|s| s.wrong_headers).max();
        let replies = samples.map(|s| s.load.wrong + s.load.reordered);
        replies.sum::<u64>() + headers.unwrap_or(0)
    }
}

impl Outcome {
    pub(crate) fn work(&self, name: &str) -> Option<&Measured> {
        self.works.iter().find(|work| work.name == name)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::load::Report;

    /// A sample with this much CPU per datagram.
    pub(crate) fn sample(cpu: f64) -> Sample {
        Sample {
            load: Report::default(),
            cpu,
            busy: 1.0,
            whole: 3.0 * cpu,
            clients: 1,
            memory: 0.0,
            session_memory: 0.0,
            kernel_memory: None,
            descriptors: 0,
            wrong_headers: 0,
            rate: None,
        }
    }

    pub(crate) fn measured(name: &'static str, cpu: &[(Peer, &[f64])]) -> Measured {
        let series = |(peer, cpu): &(Peer, &[f64])| Series {
            peer: *peer,
            samples: cpu.iter().copied().map(sample).collect(),
            failure: None,
        };
        Measured {
            name,
            title: name,
            figures: &[Figure::Cpu],
            peers: cpu.iter().map(series).collect(),
        }
    }

    pub(crate) fn outcome(works: Vec<Measured>) -> Outcome {
        Outcome {
            machine: Machine::describe().unwrap(),
            rounds: 1,
            priority: Priority::None,
            receive_buffers: "",
            whole: "",
            works,
            micro: Vec::new(),
            targets: Vec::new(),
        }
    }

    #[test]
    fn ratios_are_paired_within_a_round() {
        // The machine was half as fast in the second round: no ratio shows it.
        let work = measured(
            "work",
            &[
                (Peer::Ours, &[1.0, 2.0, 1.1]),
                (Peer::Bare, &[2.0, 4.0, 2.0]),
            ],
        );
        let ratio = work.ratio(Peer::Ours, Peer::Bare, Figure::Cpu).unwrap();
        assert_eq!((ratio.low, ratio.median, ratio.high), (0.5, 0.5, 0.55));
        assert_eq!(work.ratio(Peer::Ours, Peer::Nginx, Figure::Cpu), None);
        assert_eq!(work.ratio(Peer::Ours, Peer::Bare, Figure::Throughput), None);
    }

    #[test]
    fn value_of_a_count_may_be_zero() {
        let work = measured("work", &[(Peer::Ours, &[1.0])]);
        let lost = work.value(Peer::Ours, Figure::Lost).unwrap();
        assert_eq!(lost.median, 0.0);
        assert_eq!(work.value(Peer::Ours, Figure::KernelMemory), None);
    }
}
