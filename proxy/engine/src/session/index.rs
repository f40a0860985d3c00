//! Finds sessions by what is kept in the sessions alone: what is found is a slot, and an
//! entry takes five bytes.

use std::hash::Hash;

use ahash::RandomState;
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

/// Parts that grow one by one. A table that grows looks at all its sessions, which takes
/// about 100 ns for each that is in no cache: all at once, a million would hold up a worker
/// for a tenth of a second. It also holds both its sizes meanwhile.
const PARTS: usize = 64;

/// Slots of sessions by a key.
///
/// Peers choose the keys: the hash must be keyed, with a key that they can't learn, or
/// they could have all theirs meet in one place.
#[derive(Debug)]
pub(super) struct Index {
    parts: [HashTable<u32>; PARTS],
    hasher: RandomState,
}

impl Index {
    pub(super) fn new() -> Self {
        Self {
            parts: [const { HashTable::new() }; PARTS],
            hasher: RandomState::new(),
        }
    }

    /// The slot that the key leads to, of which `has_key` says that it is the key's.
    pub(super) fn get(&self, key: &impl Hash, has_key: impl Fn(u32) -> bool) -> Option<u32> {
        let hash = self.hasher.hash_one(key);
        let found = self.parts[part(hash)].find(hash, |slot| has_key(*slot));
        found.copied()
    }

    /// Has the key lead to `slot`. Returns where it led before. `key_of` says the keys of
    /// other slots.
    pub(super) fn insert<K: Hash>(
        &mut self,
        slot: u32,
        key: &K,
        has_key: impl Fn(u32) -> bool,
        key_of: impl Fn(u32) -> Option<K>,
    ) -> Option<u32> {
        let hash = self.hasher.hash_one(key);
        let hash_of = |slot: &u32| self.hasher.hash_one(key_of(*slot).as_ref().unwrap_or(key));
        match self.parts[part(hash)].entry(hash, |slot| has_key(*slot), hash_of) {
            Entry::Occupied(mut entry) => Some(std::mem::replace(entry.get_mut(), slot)),
            Entry::Vacant(entry) => {
                entry.insert(slot);
                None
            }
        }
    }

    /// If the key leads to `slot`, it leads to `other` from now on, or nowhere. False if it
    /// doesn't.
    pub(super) fn replace(&mut self, key: &impl Hash, slot: u32, other: Option<u32>) -> bool {
        let hash = self.hasher.hash_one(key);
        let found = self.parts[part(hash)].find_entry(hash, |of_key| *of_key == slot);
        let Ok(mut entry) = found else {
            return false;
        };
        match other {
            Some(other) => *entry.get_mut() = other,
            None => _ = entry.remove(),
        }
        true
    }
}

/// By bits that the tables make no use of: they take the lowest for the place and the
/// highest seven to tell entries apart.
fn part(hash: u64) -> usize {
    (hash >> 50) as usize % PARTS
}
