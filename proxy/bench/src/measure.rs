//! How a call is timed, and the figures that come of it.

use std::hint::black_box;
use std::time::{Duration, Instant};

use serde::Serialize;

/// Calls between two looks at the clock.
pub(crate) const CALLS: u32 = 10_000;

/// Looks of which the shortest counts: what others did meanwhile only adds.
const LOOKS: u32 = 20;

/// A median, and the lowest and highest of what it is the median of.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Spread {
    pub(crate) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (low, high) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Self { median, low, high })
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Of counts, no decimals are told.
        let decimals = if self.high.abs() < 100.0 { 2 } else { 0 };
        let Self { median, low, high } = self;
        write!(
            f,
            "{median:.decimals$} [{low:.decimals$}–{high:.decimals$}]"
        )
    }
}

/// Something of ours, divided by the same of somebody else.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Ratio {
    pub(crate) ours: &'static str,
    pub(crate) other: &'static str,
    pub(crate) ratio: Spread,
    /// What the ratio must not exceed.
    pub(crate) at_most: Option<f64>,
}

/// Something measured, in a unit.
pub(crate) struct Bounded {
    pub(crate) what: String,
    pub(crate) unit: &'static str,
    pub(crate) spread: Spread,
    /// What it must not exceed.
    pub(crate) at_most: f64,
}

pub(crate) fn time<T>(call: &mut impl FnMut() -> Option<T>) -> Duration {
    let looks = (0..LOOKS).map(|_| {
        let start = Instant::now();
        for _ in 0..CALLS {
            black_box(call());
        }
        start.elapsed()
    });
    looks.min().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_even_and_odd_counts() {
        let odd = Spread::of(vec![3.0, 1.0, 2.0]).unwrap();
        assert_eq!((odd.low, odd.median, odd.high), (1.0, 2.0, 3.0));
        assert_eq!(Spread::of(vec![4.0, 1.0]).unwrap().median, 2.5);
        assert_eq!(Spread::of(Vec::new()), None);
    }
}
