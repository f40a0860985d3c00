//! Times in eight bytes each: an [`Instant`] takes sixteen, and each session has several.

use std::ops::{Add, Sub};
use std::time::{Duration, Instant};

/// A moment, as nanoseconds since its table's [`Clock`] began; enough for centuries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

impl Moment {
    /// The beginning.
    pub(super) const ORIGIN: Self = Self(0);

    /// The time that has passed since then; nothing if it is yet to come.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    pub(super) fn nanos(self) -> u64 {
        self.0
    }

    pub(super) fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }
}

impl Add<Duration> for Moment {
    type Output = Self;

    /// The last moment there is, if it would be beyond.
    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(nanos(duration)))
    }
}

impl Sub<Duration> for Moment {
    type Output = Self;

    /// The beginning, if it would be before.
    fn sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(nanos(duration)))
    }
}

/// Turns [`Instant`]s into the [`Moment`]s of one table and back, without loss.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    origin: Instant,
}

impl Clock {
    pub(super) fn new(origin: Instant) -> Self {
        Self { origin }
    }

    /// The moment of an instant; the beginning if it is earlier.
    #[must_use]
    pub fn moment(self, instant: Instant) -> Moment {
        Moment(nanos(instant.saturating_duration_since(self.origin)))
    }

    /// The instant of a moment; the beginning if it is too far off for one.
    #[must_use]
    pub fn instant(self, moment: Moment) -> Instant {
        let passed = Duration::from_nanos(moment.0);
        self.origin.checked_add(passed).unwrap_or(self.origin)
    }
}

fn nanos(duration: Duration) -> u64 {
    let seconds = duration.as_secs().saturating_mul(1_000_000_000);
    seconds.saturating_add(duration.subsec_nanos().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_come_back_as_they_were() {
        let origin = Instant::now();
        let clock = Clock::new(origin);
        let later = origin + Duration::new(86_400 * 365 * 20, 123_456_789);
        assert_eq!(clock.instant(clock.moment(later)), later);
        assert_eq!(clock.moment(later).since(Moment::ORIGIN), later - origin);
        assert_eq!(Moment::ORIGIN.since(clock.moment(later)), Duration::ZERO);
        let before = origin.checked_sub(Duration::from_secs(1)).unwrap_or(origin);
        assert_eq!(clock.moment(before), Moment::ORIGIN);
        let never = clock.moment(later) + Duration::MAX;
        assert!(never > clock.moment(later));
        assert_eq!(never + Duration::from_secs(1), never);
    }
}
