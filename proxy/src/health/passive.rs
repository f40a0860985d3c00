//! The passive check: judges a server by its clients' own datagrams.

use std::sync::Arc;
use std::time::Instant;

use super::check::{HealthCheck, Outcome, Streak};
use crate::config;
use crate::metrics::Traffic;
use ppv2_engine::server::Server;

/// Refusals in a window from which on they are not taken for a single forged one.
const MIN_REFUSALS: u64 = 2;

/// The longest hold, as a multiple of the first.
const MAX_HOLD: u32 = 16;

pub(super) struct Passive {
    pub(super) config: config::Passive,
    pub(super) server: Arc<Server>,
    /// The counters when the window began.
    pub(super) before: Traffic,
}

impl HealthCheck for Passive {
    async fn check(&mut self, _: tokio::time::Instant) -> Outcome {
        let now = Traffic::of(&self.server);
        let before = std::mem::replace(&mut self.before, now);
        judge(&self.config, before, now)
    }
}

/// Judges a window by the counters at its ends. Refusals can be forged, so they count
/// only if there was no reply at all.
fn judge(config: &config::Passive, before: Traffic, after: Traffic) -> Outcome {
    let sent = after.sent.saturating_sub(before.sent);
    let replies = after.replies.saturating_sub(before.replies);
    let refusals = after.refusals.saturating_sub(before.refusals);
    let unanswered = u128::from(sent.saturating_sub(replies)) * 100;
    let most = config.unanswered_percent.map(|most| u128::from(*most));
    let is_too_many = |most: u128| unanswered >= u128::from(sent) * most;
    if sent < *config.min_datagrams {
        Outcome::Unknown
    } else if replies == 0 && refusals >= MIN_REFUSALS {
        Outcome::Refused
    } else if most.is_some_and(is_too_many) {
        Outcome::Timeout
    } else if replies > 0 {
        Outcome::Passed
    } else {
        Outcome::Unknown
    }
}

/// How a server stands by its clients' datagrams. It gets none while it is down, so it
/// returns on trial after a hold, which doubles each time that it fails again.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Trial {
    streak: Streak,
    down_until: Option<Instant>,
    /// The last hold, as a multiple of the first.
    holds: u32,
    returned: Option<Instant>,
}

impl Trial {
    pub(super) fn is_down(&self) -> bool {
        self.down_until.is_some()
    }

    /// Adds the outcome of a window.
    pub(super) fn add(
        &mut self,
        outcome: Outcome,
        config: &config::Passive,
        fall: u32,
        now: Instant,
    ) {
        if let Some(until) = self.down_until {
            if now >= until {
                (self.down_until, self.returned) = (None, Some(now));
            }
            return;
        }
        let hold = |holds: u32| *config.hold * holds.clamp(1, MAX_HOLD);
        let has_served =
            |since: Instant| now.saturating_duration_since(since) > 2 * hold(self.holds);
        if self.returned.is_some_and(has_served) {
            (self.holds, self.returned) = (0, None);
        }
        if outcome != Outcome::Unknown && self.streak.add(outcome == Outcome::Passed, fall, 1) {
            self.streak = Streak::default();
            self.holds = (self.holds * 2).clamp(1, MAX_HOLD);
            self.down_until = Some(now + hold(self.holds));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn passive() -> config::Passive {
        config::Passive {
            unanswered_percent: Some("90".parse().unwrap()),
            hold: "10s".parse().unwrap(),
            ..config::Passive::default()
        }
    }

    #[test]
    fn refusals_count_only_without_a_reply() {
        let zero = Traffic::default();
        let judged = |passive: &config::Passive, sent, replies, refusals| {
            let after = Traffic {
                sent,
                replies,
                refusals,
            };
            judge(passive, zero, after)
        };
        let refusals = config::Passive {
            unanswered_percent: None,
            ..passive()
        };
        assert_eq!(
            judged(&refusals, 100, 0, 1),
            Outcome::Unknown,
            "one may be forged"
        );
        assert_eq!(judged(&refusals, 100, 1, 100), Outcome::Passed);
        assert_eq!(judged(&refusals, 100, 0, 2), Outcome::Refused);
        assert_eq!(
            judged(&refusals, 9, 0, 9),
            Outcome::Unknown,
            "too few to say"
        );
        assert_eq!(
            judged(&refusals, 100, 0, 0),
            Outcome::Unknown,
            "it may never answer"
        );
        assert_eq!(judged(&passive(), 100, 10, 0), Outcome::Timeout);
        assert_eq!(judged(&passive(), 100, 11, 0), Outcome::Passed);
    }

    #[test]
    fn the_hold_doubles_with_each_failure() {
        let mut trial = Trial::default();
        let start = Instant::now();
        let mut downs = Vec::new();
        for second in 0..600u32 {
            let now = start + Duration::from_secs(second.into());
            let was_down = trial.is_down();
            let outcome = if was_down {
                Outcome::Unknown
            } else {
                Outcome::Refused
            };
            trial.add(outcome, &passive(), 3, now);
            if trial.is_down() && !was_down {
                downs.push(second);
            }
        }
        assert_eq!(downs, [2, 15, 38, 81, 164, 327, 490]);
    }
}
