//! How many replies to ask a session's socket for: about as many as its server
//! answered with of late. Most answer with one, and to ask for another costs half
//! as much as the reply itself, to learn that there is none.

/// The most to take from one session before others have their turn.
const MOST: u8 = 8;

/// A number of datagrams, between 1 and [`MOST`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AtOnce(u8);

impl Default for AtOnce {
    fn default() -> Self {
        Self(1)
    }
}

impl AtOnce {
    /// How many to ask for.
    pub(super) fn get(self) -> usize {
        usize::from(self.0)
    }

    /// Learns from how many there were of those asked for.
    pub(super) fn learn(&mut self, received: usize) {
        if received >= self.get() {
            self.0 = (self.0 * 2).min(MOST);
        } else if received <= self.get() / 2 {
            self.0 = (self.0 / 2).max(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asks_for_about_as_many_as_there_were() {
        let mut replies = AtOnce::default();
        assert_eq!(replies.get(), 1);
        for expected in [2, 4, 8, 8] {
            replies.learn(replies.get());
            assert_eq!(replies.get(), expected);
        }
        replies.learn(5);
        assert_eq!(replies.get(), 8);
        for expected in [4, 2, 1, 1] {
            replies.learn(0);
            assert_eq!(replies.get(), expected);
        }
    }
}
