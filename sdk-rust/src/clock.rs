//! The time to the few milliseconds that forgetting clients needs, for a third
//! of what the exact time costs: every datagram asks twice.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A time as a number, which is stored and compared in no time: nanoseconds since
/// the process first asked, less than 0 for what lies before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Tick(i64);

/// When the process first asked, by the exact clock and by the rough one.
static START: OnceLock<(Instant, Duration)> = OnceLock::new();

fn start() -> &'static (Instant, Duration) {
    START.get_or_init(|| (Instant::now(), rough_clock()))
}

/// CLOCK_MONOTONIC_COARSE (clock_gettime(2)) is the clock behind `Instant` as it
/// stood at the kernel's latest tick.
#[cfg(target_os = "linux")]
fn rough_clock() -> Duration {
    use rustix::time::{ClockId, clock_gettime};

    Duration::try_from(clock_gettime(ClockId::MonotonicCoarse)).unwrap_or_default()
}

#[cfg(not(target_os = "linux"))]
fn rough_clock() -> Duration {
    Duration::ZERO
}

impl Tick {
    /// The time now, possibly some milliseconds late.
    #[cfg(target_os = "linux")]
    pub(crate) fn roughly_now() -> Self {
        let (_, then) = start();
        Self(nanoseconds(rough_clock().saturating_sub(*then)))
    }

    /// The time now.
    #[cfg(not(target_os = "linux"))]
    pub(crate) fn roughly_now() -> Self {
        Instant::now().into()
    }

    /// The time as a number, to be stored.
    pub(crate) fn number(self) -> i64 {
        self.0
    }

    /// The time that was stored as a number.
    pub(crate) fn from_number(number: i64) -> Self {
        Self(number)
    }

    /// Whether at this time `span` has passed since `earlier`.
    pub(crate) fn is_past(self, earlier: Self, span: Span) -> bool {
        self.0.saturating_sub(earlier.0) >= span.0
    }
}

impl From<Instant> for Tick {
    fn from(instant: Instant) -> Self {
        let (start, _) = start();
        Self(match instant.checked_duration_since(*start) {
            Some(since) => nanoseconds(since),
            None => -nanoseconds(start.duration_since(instant)),
        })
    }
}

/// How long something lasts, as a number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span(i64);

impl From<Duration> for Span {
    fn from(duration: Duration) -> Self {
        Self(nanoseconds(duration))
    }
}

/// What doesn't fit is 292 years.
fn nanoseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn keeps_pace_with_the_exact_time() {
        let (started, rough) = (Instant::now(), Tick::roughly_now());
        let span = Span::from(Duration::from_millis(50));
        while !Tick::roughly_now().is_past(rough, span) {
            thread::yield_now();
        }
        // At the start it may have been as old as a tick, 10 ms at most.
        assert!(started.elapsed() >= Duration::from_millis(40));
    }

    #[test]
    fn times_before_the_first_question_keep_their_distance() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let hours = [-3600, 0, 3600].map(|seconds: i64| {
            let distance = Duration::from_secs(seconds.unsigned_abs());
            Tick::from(if seconds < 0 {
                now - distance
            } else {
                now + distance
            })
        });
        let hour = Span::from(3600 * second);
        let longer = Span::from(3601 * second);
        for (earlier, later) in [(hours[0], hours[1]), (hours[1], hours[2])] {
            assert!(later.is_past(earlier, hour));
            assert!(!later.is_past(earlier, longer));
            assert!(!earlier.is_past(later, hour));
        }
    }
}
