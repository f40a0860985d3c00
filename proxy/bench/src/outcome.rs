//! Samples of all rounds, and ratios between proxies. A ratio is taken within a
//! round, between neighbours in time, and only then is the median taken: a
//! machine that others use too drifts more between rounds than within one.

use serde::Serialize;

use crate::host::{Machine, Priority};
use crate::measure::{Ratio, Spread};
use crate::peer::Peer;
use crate::stage::Sample;
use crate::work::{Figure, Goal};

/// All of a run.
#[derive(Serialize)]
pub(crate) struct Outcome {
    pub(crate) machine: Machine,
    pub(crate) rounds: usize,
    pub(crate) priority: Priority,
    pub(crate) receive_buffers: &'static str,
    pub(crate) works: Vec<Measured>,
    pub(crate) micro: Vec<Ratio>,
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

    /// A figure of `one` divided by that of `other`.
    pub(crate) fn ratio(&self, one: Peer, other: Peer, figure: Figure) -> Option<Spread> {
        let (one, other) = (self.series(one)?, self.series(other)?);
        let ratios = one.samples.iter().zip(&other.samples);
        Spread::of(
            ratios
                .filter_map(|(one, other)| Some(figure.of(one)? / figure.of(other)?))
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

    /// Replies to the wrong client and headers of the wrong client.
    pub(crate) fn wrong(&self) -> u64 {
        let samples = self.samples.iter();
        // Each sample has the headers of those before it, too.
        let headers = self.samples.iter().map(|s| s.wrong_headers).max();
        samples.map(|s| s.load.wrong).sum::<u64>() + headers.unwrap_or(0)
    }
}

impl Outcome {
    pub(crate) fn work(&self, name: &str) -> Option<&Measured> {
        self.works.iter().find(|work| work.name == name)
    }

    pub(crate) fn ratio(&self, goal: &Goal) -> Option<Spread> {
        self.work(goal.work)?
            .ratio(goal.ours, goal.peer, goal.figure)
    }
}
