//! When a server counts as down, and when as up again: so many failures or
//! successes in a row. No I/O, and `now` is an argument.

use std::time::{Duration, Instant};

use crate::config::{Health, Passive};

/// How a server stands in the eyes of one kind of check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Streak {
    is_down: bool,
    /// Results in a row that speak against how it stands.
    against: u32,
}

impl Streak {
    pub(super) fn is_down(self) -> bool {
        self.is_down
    }

    /// Notes a result. True if it changed how the server stands.
    pub(super) fn note(&mut self, good: bool, fall: u32, rise: u32) -> bool {
        if good != self.is_down {
            self.against = 0;
            return false;
        }
        self.against += 1;
        let needed = if self.is_down { rise } else { fall };
        if self.against < needed {
            return false;
        }
        *self = Self {
            is_down: !self.is_down,
            against: 0,
        };
        true
    }
}

/// When to begin the next probe, counted from the beginning of the last. A little
/// sooner than `every`, so that `fall` of them, the last of which has to wait out
/// its timeout, are over within `fall × every`. `lot` is from 0 to 1.
pub(super) fn pause(health: &Health, lot: f64) -> Duration {
    let full = health.every.saturating_sub(health.timeout / health.fall);
    let full = full.max(health.every / 2);
    full.mul_f64(1.0 - lot.clamp(0.0, 1.0) * f64::from(health.jitter) / 100.0)
}

/// What was counted of a server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Datagrams sent to it.
    pub sent: u64,
    /// Datagrams received from it.
    pub replies: u64,
    /// Errors that the network reported of what was sent.
    pub refusals: u64,
}

/// What a window of clients' traffic says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Good,
    Refused,
    Unanswered,
}

/// So many refusals in a window are taken for more than a forged one.
const REFUSALS: u64 = 2;

/// The longest hold, as a multiple of the first.
const MAX_HOLD: u32 = 16;

/// Judges what was counted from `before` to `after`; `None` if that says nothing.
/// Refusals can be forged, so they count only where no reply came at all.
pub(super) fn judge(passive: &Passive, before: Traffic, after: Traffic) -> Option<Verdict> {
    let sent = after.sent.saturating_sub(before.sent);
    let replies = after.replies.saturating_sub(before.replies);
    let refusals = after.refusals.saturating_sub(before.refusals);
    if sent < passive.at_least {
        return None;
    }
    if replies == 0 && refusals >= REFUSALS {
        return Some(Verdict::Refused);
    }
    if let Some(share) = passive.unanswered {
        let unanswered = u128::from(sent.saturating_sub(replies));
        if unanswered * 100 >= u128::from(sent) * u128::from(share) {
            return Some(Verdict::Unanswered);
        }
    }
    (replies > 0).then_some(Verdict::Good)
}

/// A server seen by its clients' traffic. Once down it gets none, so it comes back
/// on trial after a time, which is doubled each time that it fails again.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    streak: Streak,
    until: Option<Instant>,
    holds: u32,
    back: Option<Instant>,
}

impl Seen {
    pub(super) fn is_down(&self) -> bool {
        self.until.is_some()
    }

    /// Notes what a window said. True if that changed how the server stands.
    pub(super) fn note(
        &mut self,
        verdict: Option<Verdict>,
        passive: &Passive,
        fall: u32,
        now: Instant,
    ) -> bool {
        if let Some(until) = self.until {
            if now < until {
                return false;
            }
            (self.until, self.back) = (None, Some(now));
            return true;
        }
        let hold = passive.hold * self.holds.clamp(1, MAX_HOLD);
        if self
            .back
            .is_some_and(|back| now.saturating_duration_since(back) > 2 * hold)
        {
            (self.holds, self.back) = (0, None);
        }
        let Some(verdict) = verdict else {
            return false;
        };
        if self.streak.note(verdict == Verdict::Good, fall, 1) {
            self.streak = Streak::default();
            self.holds = (self.holds * 2).clamp(1, MAX_HOLD);
            self.until = Some(now + passive.hold * self.holds);
            return true;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_changes_after_so_many_in_a_row_and_no_sooner(
            results in proptest::collection::vec(any::<bool>(), 0..200),
            fall in 1u32..6,
            rise in 1u32..6,
        ) {
            let mut streak = Streak::default();
            let (mut down, mut changes) = (false, 0u32);
            for n in 0..results.len() {
                let needed = if down { rise } else { fall };
                let changed = streak.note(results[n], fall, rise);
                if changed {
                    let row = &results[n + 1 - needed as usize..=n];
                    prop_assert!(row.iter().all(|good| *good == down));
                    down = !down;
                    changes += 1;
                }
                prop_assert_eq!(streak.is_down(), down);
            }
            // Flapping is bounded by the shorter row.
            let most = results.len() / fall.min(rise) as usize;
            prop_assert!(changes as usize <= most);
        }
    }

    #[test]
    fn fall_in_a_row_take_a_server_down_and_rise_bring_it_back() {
        let mut streak = Streak::default();
        let noted = |streak: &mut Streak, results: &[bool]| -> Vec<bool> {
            results
                .iter()
                .map(|good| streak.note(*good, 3, 2))
                .collect()
        };
        let results = [false, false, true, false, false];
        assert_eq!(noted(&mut streak, &results), [false; 5]);
        assert_eq!(noted(&mut streak, &[false]), [true]);
        let results = [true, false, true, true];
        assert_eq!(noted(&mut streak, &results), [false, false, false, true]);
    }

    const PASSIVE: Passive = Passive {
        window: Duration::from_secs(1),
        unanswered: Some(90),
        at_least: 10,
        hold: Duration::from_secs(10),
    };

    #[test]
    fn refusals_count_only_where_no_reply_came() {
        let zero = Traffic::default();
        let judged = |passive: &Passive, sent, replies, refusals| {
            let after = Traffic {
                sent,
                replies,
                refusals,
            };
            judge(passive, zero, after)
        };
        let refusals = Passive {
            unanswered: None,
            ..PASSIVE
        };
        assert_eq!(judged(&refusals, 100, 0, 1), None, "one may be forged");
        assert_eq!(judged(&refusals, 100, 1, 100), Some(Verdict::Good));
        assert_eq!(judged(&refusals, 100, 0, 2), Some(Verdict::Refused));
        assert_eq!(judged(&refusals, 9, 0, 9), None, "too few to say");
        assert_eq!(judged(&refusals, 100, 0, 0), None, "it may never answer");
        assert_eq!(judged(&PASSIVE, 100, 10, 0), Some(Verdict::Unanswered));
        assert_eq!(judged(&PASSIVE, 100, 11, 0), Some(Verdict::Good));
    }

    #[test]
    fn one_that_fails_again_and_again_is_left_alone_for_longer() {
        let mut seen = Seen::default();
        let start = Instant::now();
        let mut downs = Vec::new();
        for second in 0..600u32 {
            let now = start + Duration::from_secs(second.into());
            let bad = (!seen.is_down()).then_some(Verdict::Refused);
            if seen.note(bad, &PASSIVE, 3, now) && seen.is_down() {
                downs.push(second);
            }
        }
        assert_eq!(downs, [2, 15, 38, 81, 164, 327, 490]);
    }
}
