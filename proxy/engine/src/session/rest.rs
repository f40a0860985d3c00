//! Sessions that ended and rest: which of them gives up its port first.

use std::collections::HashMap;

use ahash::RandomState;

const NONE: u32 = u32::MAX;

/// How far a resting session's port can be trusted to be silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Class {
    /// Every request was answered, nothing came since, and another session of the
    /// same listener and server may have the socket.
    Reusable,
    /// As silent, but the socket is not what a new session would be given.
    Silent,
    /// An answer is owed, or the server sends what it wasn't asked for.
    Owing,
    /// No answer came at all.
    Unanswered,
}

impl Class {
    /// Whether something may come to the port yet.
    pub(super) fn owes(self) -> bool {
        matches!(self, Self::Owing | Self::Unanswered)
    }
}

/// Sessions that rest side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Lane {
    pub(super) listener: usize,
    pub(super) server: usize,
    pub(super) class: Class,
}

#[derive(Clone, Copy, Debug)]
struct Ends {
    first: u32,
    last: u32,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    previous: u32,
    next: u32,
}

const UNLINKED: Link = Link {
    previous: NONE,
    next: NONE,
};

/// Resting sessions by slot: a list for each lane that has any, in the order in
/// which their rests began. All lists run through one array of links, so that any
/// session leaves its list at once.
#[derive(Debug, Default)]
pub(super) struct Rest {
    lanes: HashMap<Lane, Ends, RandomState>,
    links: Vec<Link>,
}

impl Rest {
    /// Puts `slot`, which is in no lane, behind the others of `lane`.
    pub(super) fn push(&mut self, lane: Lane, slot: u32) {
        if self.links.len() <= slot as usize {
            self.links.resize(slot as usize + 1, UNLINKED);
        }
        let ends = self.lanes.entry(lane).or_insert(Ends {
            first: slot,
            last: NONE,
        });
        let previous = std::mem::replace(&mut ends.last, slot);
        self.links[slot as usize] = Link {
            previous,
            next: NONE,
        };
        if previous != NONE {
            self.links[previous as usize].next = slot;
        }
    }

    /// Takes `slot` out of `lane`, in which it is.
    pub(super) fn remove(&mut self, lane: Lane, slot: u32) {
        let Link { previous, next } = std::mem::replace(&mut self.links[slot as usize], UNLINKED);
        if previous != NONE {
            self.links[previous as usize].next = next;
        }
        if next != NONE {
            self.links[next as usize].previous = previous;
        }
        if previous == NONE && next == NONE {
            self.lanes.remove(&lane);
        } else if let Some(ends) = self.lanes.get_mut(&lane) {
            if previous == NONE {
                ends.first = next;
            }
            if next == NONE {
                ends.last = previous;
            }
        }
    }

    /// The one that has rested for longest in `lane`.
    pub(super) fn first(&self, lane: Lane) -> Option<u32> {
        self.lanes.get(&lane).map(|ends| ends.first)
    }

    /// Those in a lane from `slot` on, in the order in which their rests began.
    pub(super) fn from(&self, slot: u32) -> impl Iterator<Item = u32> {
        std::iter::successors(Some(slot), |slot| {
            let next = self.links[*slot as usize].next;
            (next != NONE).then_some(next)
        })
    }

    /// All lanes that have any, with the one that has rested for longest.
    pub(super) fn lanes(&self) -> impl Iterator<Item = (Lane, u32)> {
        self.lanes.iter().map(|(lane, ends)| (*lane, ends.first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LANE: Lane = Lane {
        listener: 0,
        server: 0,
        class: Class::Reusable,
    };

    fn listed(rest: &Rest) -> Vec<u32> {
        rest.first(LANE)
            .map(|first| rest.from(first).collect())
            .unwrap_or_default()
    }

    #[test]
    fn a_lane_keeps_its_order_whoever_leaves_it() {
        let mut rest = Rest::default();
        for slot in [3, 1, 4, 0] {
            rest.push(LANE, slot);
        }
        assert_eq!(listed(&rest), [3, 1, 4, 0]);
        rest.remove(LANE, 1);
        assert_eq!(listed(&rest), [3, 4, 0]);
        rest.remove(LANE, 3);
        rest.push(LANE, 3);
        assert_eq!(listed(&rest), [4, 0, 3]);
        rest.remove(LANE, 3);
        rest.push(LANE, 2);
        assert_eq!(listed(&rest), [4, 0, 2]);
        for slot in [0, 2, 4] {
            rest.remove(LANE, slot);
        }
        assert!(listed(&rest).is_empty() && rest.lanes.is_empty());
    }
}
