//! Sessions of one client that follow each other, in rings: the one that takes its
//! datagrams and those that have taken all that they may. When there is no session for
//! another, they take what comes in turn.

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Link {
    previous: u32,
    next: u32,
}

const ALONE: Link = Link {
    previous: NONE,
    next: NONE,
};

/// Rings of slots. Empty as long as each client has one session.
#[derive(Debug, Default)]
pub(super) struct Rings(Vec<Link>);

impl Rings {
    /// Puts `slot`, which is in no ring, behind another.
    pub(super) fn join(&mut self, slot: u32, behind: u32) {
        let len = slot.max(behind) as usize + 1;
        if self.0.len() < len {
            self.0.resize(len, ALONE);
        }
        let next = self.after(behind);
        self.0[slot as usize] = Link {
            previous: behind,
            next,
        };
        self.0[next as usize].previous = slot;
        self.0[behind as usize].next = slot;
    }

    /// Takes `slot` out. Returns another of its ring, if there is one: the one before it.
    pub(super) fn leave(&mut self, slot: u32) -> Option<u32> {
        let link = self.0.get_mut(slot as usize)?;
        let Link { previous, next } = std::mem::replace(link, ALONE);
        if previous == NONE {
            return None;
        }
        if previous == next {
            self.0[next as usize] = ALONE;
        } else {
            self.0[previous as usize].next = next;
            self.0[next as usize].previous = previous;
        }
        Some(previous)
    }

    /// The next in the ring; `slot` itself if it is alone.
    pub(super) fn after(&self, slot: u32) -> u32 {
        let next = self.0.get(slot as usize).map_or(NONE, |link| link.next);
        if next == NONE { slot } else { next }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(rings: &Rings, from: u32) -> Vec<u32> {
        let after = |slot: &u32| Some(rings.after(*slot)).filter(|next| *next != from);
        std::iter::successors(Some(from), after).collect()
    }

    #[test]
    fn those_who_join_come_round_in_their_order() {
        let mut rings = Rings::default();
        assert_eq!(ring(&rings, 7), [7]);
        assert_eq!(rings.leave(7), None);
        for slot in 1..5 {
            rings.join(slot, slot - 1);
        }
        rings.join(10, 9);
        assert_eq!(ring(&rings, 4), [4, 0, 1, 2, 3]);
        assert_eq!(rings.leave(0), Some(4));
        assert_eq!(rings.leave(0), None);
        assert_eq!(rings.leave(3), Some(2));
        assert_eq!(ring(&rings, 4), [4, 1, 2]);
        assert_eq!((rings.leave(2), rings.leave(1)), (Some(1), Some(4)));
        assert_eq!((ring(&rings, 4), rings.leave(4)), (vec![4], None));
        assert_eq!(ring(&rings, 9), [9, 10]);
    }
}
