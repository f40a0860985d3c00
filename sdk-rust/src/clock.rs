//! The time to the few milliseconds that forgetting clients needs, for a third
//! of what the exact time costs: every datagram asks twice.

use std::time::Instant;

/// The time now, possibly some milliseconds late.
#[cfg(target_os = "linux")]
pub(crate) fn roughly_now() -> Instant {
    use std::sync::OnceLock;
    use std::time::Duration;

    use rustix::time::{ClockId, clock_gettime};

    static START: OnceLock<(Instant, Duration)> = OnceLock::new();

    // CLOCK_MONOTONIC_COARSE (clock_gettime(2)) is the clock behind `Instant` as
    // it stood at the kernel's latest tick.
    let coarse = || Duration::try_from(clock_gettime(ClockId::MonotonicCoarse)).unwrap_or_default();
    let (instant, then) = *START.get_or_init(|| (Instant::now(), coarse()));
    instant + coarse().saturating_sub(then)
}

/// The time now.
#[cfg(not(target_os = "linux"))]
pub(crate) fn roughly_now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn keeps_pace_with_the_exact_time() {
        let (start, rough_start) = (Instant::now(), roughly_now());
        while roughly_now() - rough_start < Duration::from_millis(50) {
            thread::yield_now();
        }
        // At the start it may have been as old as a tick, 10 ms at most.
        assert!(start.elapsed() >= Duration::from_millis(40));
    }
}
