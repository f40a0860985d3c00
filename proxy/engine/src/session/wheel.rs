//! A timer wheel over numbered slots: the cost of a session that does nothing
//! is nothing, however many there are.
//!
//! Deadlines are coarse (one [`TICK`]) and lazy: a session that is used does
//! not touch the wheel; when its old deadline comes up, the owner looks at it
//! and arms it again.

#[cfg(test)]
use std::time::Duration;

use super::clock::Moment;
use super::links::{Links, List};

/// How late a deadline may come up.
#[cfg(test)]
pub(super) const TICK: Duration = Duration::from_nanos(TICK_NANOS);

const BUCKETS: usize = 1024;
/// [`TICK`] in nanoseconds.
const TICK_NANOS: u64 = 50_000_000;
const NONE: u16 = u16::MAX;

/// The wheel. Every slot is in it at most once.
#[derive(Debug)]
pub(super) struct Wheel {
    /// The tick up to which, inclusively, everything has been popped.
    done: u64,
    buckets: Box<[List]>,
    /// One bit per bucket that is not empty, to find the next one quickly.
    occupied: [u64; BUCKETS / 64],
    links: Links,
    /// The bucket that each slot is in, or `NONE`.
    bucket_of: Vec<u16>,
}

impl Wheel {
    /// An empty wheel. No deadline is before `now`.
    pub(super) fn new(now: Moment) -> Self {
        Self {
            done: now.nanos() / TICK_NANOS,
            buckets: vec![List::EMPTY; BUCKETS].into(),
            occupied: [0; BUCKETS / 64],
            links: Links::default(),
            bucket_of: Vec::new(),
        }
    }

    /// Lists `slot` to be popped at `deadline`, rounded up to a tick, or
    /// earlier if that is beyond the wheel's horizon of about 51 seconds.
    pub(super) fn arm(&mut self, slot: u32, deadline: Moment) {
        self.disarm(slot);
        let last = self.done + BUCKETS as u64 - 1;
        let tick = tick_after(deadline).clamp(self.done + 1, last);
        let bucket = bucket_of(tick);
        self.bucket_of[slot as usize] = bucket;
        self.links.push(&mut self.buckets[bucket as usize], slot);
        self.occupied[bucket as usize / 64] |= 1 << (bucket % 64);
    }

    /// Takes `slot` off the wheel if it is on it.
    pub(super) fn disarm(&mut self, slot: u32) {
        if self.bucket_of.len() <= slot as usize {
            self.bucket_of.resize(slot as usize + 1, NONE);
        }
        let bucket = std::mem::replace(&mut self.bucket_of[slot as usize], NONE);
        if bucket == NONE {
            return;
        }
        let list = &mut self.buckets[bucket as usize];
        self.links.remove(list, slot);
        if *list == List::EMPTY {
            self.occupied[bucket as usize / 64] &= !(1 << (bucket % 64));
        }
    }

    /// Takes off and returns one slot whose time has come. A slot that is armed
    /// again meanwhile comes up at the next tick at the earliest, so calling
    /// this until `None` ends.
    pub(super) fn pop(&mut self, now: Moment) -> Option<u32> {
        let current = now.nanos() / TICK_NANOS;
        while self.done < current {
            let bucket = bucket_of(self.done + 1);
            if let Some(slot) = self.buckets[bucket as usize].first() {
                self.disarm(slot);
                return Some(slot);
            }
            // Past an empty stretch in one step; everything armed lies within
            // one turn of the wheel.
            let next = self.next_occupied().map_or(current, |tick| tick - 1);
            self.done = next.clamp(self.done + 1, current);
        }
        None
    }

    /// When [`pop`](Self::pop) has something to return at the earliest.
    pub(super) fn next(&self) -> Option<Moment> {
        let tick = self.next_occupied()?;
        Some(Moment::from_nanos(tick.saturating_mul(TICK_NANOS)))
    }

    fn next_occupied(&self) -> Option<u64> {
        let first = bucket_of(self.done + 1) as usize;
        let words = self.occupied.len();
        (0..=words).find_map(|i| {
            let word = (first / 64 + i) % words;
            let bits = match i {
                0 => self.occupied[word] & (u64::MAX << (first % 64)),
                _ if i == words => self.occupied[word] & !(u64::MAX << (first % 64)),
                _ => self.occupied[word],
            };
            (bits != 0).then(|| {
                let bucket = word * 64 + bits.trailing_zeros() as usize;
                let ahead = (bucket + BUCKETS - first) % BUCKETS;
                self.done + 1 + ahead as u64
            })
        })
    }
}

fn tick_after(time: Moment) -> u64 {
    time.nanos().div_ceil(TICK_NANOS)
}

#[expect(clippy::cast_possible_truncation, reason = "below BUCKETS")]
fn bucket_of(tick: u64) -> u16 {
    (tick % BUCKETS as u64) as u16
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const START: Moment = Moment::ORIGIN;

    fn drain(wheel: &mut Wheel, now: Moment) -> Vec<u32> {
        std::iter::from_fn(|| wheel.pop(now)).collect()
    }

    #[test]
    fn nothing_comes_up_early_and_all_within_a_tick() {
        let mut wheel = Wheel::new(START);
        wheel.arm(7, START + Duration::from_millis(120));
        assert_eq!(wheel.next(), Some(START + Duration::from_millis(150)));
        assert!(drain(&mut wheel, START + Duration::from_millis(119)).is_empty());
        assert_eq!(drain(&mut wheel, START + Duration::from_millis(170)), [7]);
        assert_eq!(wheel.next(), None);
        assert!(drain(&mut wheel, START + Duration::from_secs(3600)).is_empty());
    }

    #[test]
    fn a_disarmed_slot_is_gone() {
        let mut wheel = Wheel::new(START);
        for slot in 0..3 {
            wheel.arm(slot, START + Duration::from_secs(1));
        }
        wheel.disarm(1);
        wheel.disarm(1);
        let mut left = drain(&mut wheel, START + Duration::from_secs(2));
        left.sort_unstable();
        assert_eq!(left, [0, 2]);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Arm(u32, u64),
        Disarm(u32),
        Pass(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0u32..40, 0u64..120_000).prop_map(|(slot, ms)| Step::Arm(slot, ms)),
            (0u32..40).prop_map(Step::Disarm),
            (0u64..90_000).prop_map(Step::Pass),
            (0u64..200).prop_map(Step::Pass),
        ];
        proptest::collection::vec(step, 0..80)
    }

    proptest! {
        /// Against a map from slot to deadline: nothing is lost, nothing comes
        /// early, and what is beyond the horizon may be looked at early but
        /// never late.
        #[test]
        fn agrees_with_a_plain_map(steps in steps()) {
            let mut now = START;
            let mut wheel = Wheel::new(START);
            let mut armed: HashMap<u32, Moment> = HashMap::new();
            let horizon = TICK * u32::try_from(BUCKETS - 2).unwrap();
            for step in steps {
                match step {
                    Step::Arm(slot, ms) => {
                        let deadline = now + Duration::from_millis(ms);
                        wheel.arm(slot, deadline);
                        armed.insert(slot, deadline.min(now + horizon));
                    }
                    Step::Disarm(slot) => {
                        wheel.disarm(slot);
                        armed.remove(&slot);
                    }
                    Step::Pass(ms) => {
                        now = now + Duration::from_millis(ms);
                        while let Some(slot) = wheel.pop(now) {
                            let deadline = armed.remove(&slot);
                            prop_assert!(deadline.is_some(), "{slot} was not armed");
                            prop_assert!(deadline.unwrap() <= now);
                        }
                        for (slot, deadline) in &armed {
                            prop_assert!(*deadline + 2 * TICK > now, "{slot} is late");
                        }
                        prop_assert_eq!(wheel.next().is_some(), !armed.is_empty());
                    }
                }
            }
        }
    }
}
