//! Lists of sessions by slot. Each kind of list runs through one array with a link for
//! each slot, so that a session leaves its list without a search, and nothing is
//! allocated but the array.

const NONE: u32 = u32::MAX;

/// The ends of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct List {
    first: u32,
    last: u32,
}

impl List {
    pub(super) const EMPTY: Self = Self {
        first: NONE,
        last: NONE,
    };

    pub(super) fn first(self) -> Option<u32> {
        (self.first != NONE).then_some(self.first)
    }
}

#[derive(Clone, Copy, Debug)]
struct Link {
    previous: u32,
    next: u32,
}

impl Link {
    const NONE: Self = Self {
        previous: NONE,
        next: NONE,
    };
}

/// A link for each slot, which is in at most one list.
#[derive(Debug, Default)]
pub(super) struct Links(Vec<Link>);

impl Links {
    /// Puts `slot`, which is in no list, behind the others of `list`.
    pub(super) fn push(&mut self, list: &mut List, slot: u32) {
        if self.0.len() <= slot as usize {
            self.0.resize(slot as usize + 1, Link::NONE);
        }
        self.0[slot as usize].previous = list.last;
        match list.last {
            NONE => list.first = slot,
            last => self.0[last as usize].next = slot,
        }
        list.last = slot;
    }

    /// Takes `slot` out of `list`, if it is there.
    pub(super) fn remove(&mut self, list: &mut List, slot: u32) {
        let Some(link) = self.0.get_mut(slot as usize) else {
            return;
        };
        if link.previous == NONE && list.first != slot {
            return;
        }
        let Link { previous, next } = std::mem::replace(link, Link::NONE);
        match previous {
            NONE => list.first = next,
            previous => self.0[previous as usize].next = next,
        }
        match next {
            NONE => list.last = previous,
            next => self.0[next as usize].previous = previous,
        }
    }

    /// All of `list`, in the order in which they were put there.
    pub(super) fn iter(&self, list: List) -> impl Iterator<Item = u32> {
        std::iter::successors(list.first(), |slot| {
            let next = self.0[*slot as usize].next;
            (next != NONE).then_some(next)
        })
    }
}

/// Sessions of one client that follow each other, in rings: the one that takes its
/// datagrams and those that have taken all that they may. Empty as long as each client
/// has one session.
#[derive(Debug, Default)]
pub(super) struct Rings(Vec<Link>);

impl Rings {
    /// Puts `slot`, which is in no ring, behind another.
    pub(super) fn join(&mut self, slot: u32, behind: u32) {
        let len = slot.max(behind) as usize + 1;
        if self.0.len() < len {
            self.0.resize(len, Link::NONE);
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
        let Link { previous, next } = std::mem::replace(link, Link::NONE);
        if previous == NONE {
            return None;
        }
        if previous == next {
            self.0[next as usize] = Link::NONE;
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
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against plain vectors: the order is kept, and nothing is left behind.
        #[test]
        fn lists_keep_their_order(steps in proptest::collection::vec((0u32..12, 0usize..3), 0..80)) {
            let (mut links, mut lists) = (Links::default(), [List::EMPTY; 3]);
            let mut plain: [Vec<u32>; 3] = Default::default();
            for (slot, to) in steps {
                match plain.iter_mut().position(|list| list.contains(&slot)) {
                    Some(from) => {
                        plain[from].retain(|listed| *listed != slot);
                        links.remove(&mut lists[from], slot);
                        // Once more does no harm.
                        links.remove(&mut lists[from], slot);
                    }
                    None => {
                        plain[to].push(slot);
                        links.push(&mut lists[to], slot);
                    }
                }
                for (list, plain) in lists.iter().zip(&plain) {
                    prop_assert_eq!(&links.iter(*list).collect::<Vec<_>>(), plain);
                    prop_assert_eq!(*list == List::EMPTY, plain.is_empty());
                }
            }
        }
    }

    fn ring(rings: &Rings, from: u32) -> Vec<u32> {
        let after = |slot: &u32| Some(rings.after(*slot)).filter(|next| *next != from);
        std::iter::successors(Some(from), after).collect()
    }

    #[test]
    fn a_ring_keeps_its_order() {
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
