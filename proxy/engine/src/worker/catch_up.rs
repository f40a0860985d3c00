//! After a late wake-up, what has come meanwhile is received before sessions expire: their
//! datagrams may wait.

use std::time::{Duration, Instant};

/// A wake-up that comes so much later than it was to: the process was stopped, or got no
/// CPU.
const LATE: Duration = Duration::from_millis(100);

/// How long sessions go on after a late wake-up at the most, while datagrams that have
/// come meanwhile are received.
const CATCH_UP: Duration = Duration::from_secs(1);

/// Whether a worker receives what has come while it slept for too long.
#[derive(Debug)]
pub(super) struct CatchUp {
    /// The latest wake-up.
    latest: Instant,
    /// Until when, if it does.
    until: Option<Instant>,
}

impl CatchUp {
    /// Nothing is late yet.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            latest: now,
            until: None,
        }
    }

    /// Whether sessions may expire after this wake-up, which was `due` then, and brought
    /// nothing if it `is_empty`.
    pub(super) fn may_expire(
        &mut self,
        now: Instant,
        due: Option<Instant>,
        is_empty: bool,
    ) -> bool {
        // Not to be late again at once: a worker that always is would let none expire.
        let is_over = self
            .until
            .take_if(|until| is_empty || now >= *until)
            .is_some();
        let latest = std::mem::replace(&mut self.latest, now);
        let is_late = |due: Instant| now.saturating_duration_since(due.max(latest)) >= LATE;
        // A wait that was interrupted says nothing of what has come: not this one, but the
        // next that brings nothing is the end.
        if self.until.is_none() && !is_over && due.is_some_and(is_late) {
            self.until = Some(now + CATCH_UP);
        }
        self.until.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn none_expires_after_a_late_wake_up_until_one_brings_nothing() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut catch_up = CatchUp::new(start);
        assert!(catch_up.may_expire(at(50), Some(at(50)), true));
        assert!(catch_up.may_expire(at(140), Some(at(100)), false));
        assert!(!catch_up.may_expire(at(900), Some(at(150)), true));
        assert!(!catch_up.may_expire(at(901), Some(at(150)), false));
        assert!(catch_up.may_expire(at(902), Some(at(150)), true));
        assert!(catch_up.may_expire(at(5000), None, true));
    }

    #[test]
    fn a_worker_that_is_always_late_lets_sessions_expire_at_times() {
        let start = Instant::now();
        let mut catch_up = CatchUp::new(start);
        let turns = (1..100).map(|turn| start + LATE * turn);
        let expires = turns.filter(|now| catch_up.may_expire(*now, Some(start), false));
        assert_eq!(expires.count(), 9);
    }
}
