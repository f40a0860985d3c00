//! Finds sessions by their keys, which stand in the sessions alone: what is found is a
//! slot, and an entry takes five bytes.

use ahash::RandomState;
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use slab::Slab;

use super::{Key, Session};

/// Parts that grow one by one. A table that grows looks at all its sessions, which takes
/// about 100 ns for each that is in no cache: all at once, a million would hold up a worker
/// for a tenth of a second. It also holds both its sizes meanwhile.
const PARTS: usize = 64;

/// Slots by their sessions' keys. A session that is in the index is in the slab as well.
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

    /// The slot that the key leads to.
    pub(super) fn get<C>(&self, key: &Key, sessions: &Slab<Session<C>>) -> Option<u32> {
        let hash = self.hasher.hash_one(key);
        let is_it = |slot: &u32| has_key(sessions, *slot, key);
        self.parts[part(hash)].find(hash, is_it).copied()
    }

    /// Has the key of the session at `slot` lead there. Returns where it led before.
    pub(super) fn insert<C>(&mut self, slot: u32, sessions: &Slab<Session<C>>) -> Option<u32> {
        let key = sessions.get(slot as usize)?.key();
        let hash = self.hasher.hash_one(key);
        let hash_of = |slot: &u32| {
            let session = sessions.get(*slot as usize);
            session.map_or(0, |session| self.hasher.hash_one(session.key()))
        };
        let is_it = |slot: &u32| has_key(sessions, *slot, &key);
        match self.parts[part(hash)].entry(hash, is_it, hash_of) {
            Entry::Occupied(mut entry) => Some(std::mem::replace(entry.get_mut(), slot)),
            Entry::Vacant(entry) => {
                entry.insert(slot);
                None
            }
        }
    }

    /// If the key leads to `slot`, it leads to `other` from now on, or nowhere. False if it
    /// doesn't.
    pub(super) fn replace(&mut self, key: &Key, slot: u32, other: Option<u32>) -> bool {
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

fn has_key<C>(sessions: &Slab<Session<C>>, slot: u32, key: &Key) -> bool {
    let session = sessions.get(slot as usize);
    session.is_some_and(|session| session.has_key(key))
}

/// By bits that the tables make no use of: they take the lowest for the place and the
/// highest seven to tell entries apart.
fn part(hash: u64) -> usize {
    (hash >> 50) as usize % PARTS
}
