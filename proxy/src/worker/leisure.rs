//! Whether a worker has time to spare: then each reply is sent as soon as it has
//! come, where a busy worker gathers them to send many with one call.

use std::time::Duration;

/// Rounds after which what was measured counts for about a third.
const ROUNDS: u32 = 64;

/// How a worker has divided its time of late between waiting and moving
/// datagrams.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Leisure {
    waited: Duration,
    worked: Duration,
}

impl Leisure {
    /// Notes one round: so long a wait, and so much work after it.
    pub(super) fn note(&mut self, waited: Duration, worked: Duration) {
        self.waited = self.waited - self.waited / ROUNDS + waited / ROUNDS;
        self.worked = self.worked - self.worked / ROUNDS + worked / ROUNDS;
    }

    /// Whether it waited for a third of the time or more.
    pub(super) fn is_given(&self) -> bool {
        self.waited * 2 >= self.worked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_the_load_within_some_hundred_rounds() {
        let mut leisure = Leisure::default();
        let [little, much] = [5, 50].map(Duration::from_micros);
        for _ in 0..3 {
            for _ in 0..500 {
                leisure.note(little, much);
            }
            assert!(!leisure.is_given());
            for _ in 0..500 {
                leisure.note(much, little);
            }
            assert!(leisure.is_given());
        }
        // One long wait is no leisure for long.
        leisure.note(Duration::from_secs(1), little);
        assert!(leisure.is_given());
        for _ in 0..2000 {
            leisure.note(little, much);
        }
        assert!(!leisure.is_given());
    }
}
