//! Maglev hashing (Eisenbud et al., NSDI 2016, section 3.4): a table in which
//! each server has slots by its weight, the same wherever and whenever it is
//! built of the same servers, and of which little changes when one comes or goes.
//!
//! Each server prefers the slots in an order of its own, which its address alone
//! decides; in turns by weight, each takes the slot that it likes best of those
//! that are free. Servers take their turns in the order of their addresses, so
//! that how a configuration lists them changes nothing.
//!
//! In the paper, the slots that a server prefers are a fixed distance apart. Of few
//! servers, two may have distances that collide, and ten times as much moves as usually
//! does; here each order is as good as random.

use super::affinity::{hash_server, scale, step};
use super::turns;
use crate::address::ServerAddr;

/// The number of slots is two to the power of this. Never another one, also for
/// few servers: a table of another size is another table, and a server more or less
/// could then send all clients elsewhere.
///
/// So many keep what moves besides the unavoidable below one in a hundred, and
/// cost half a megabyte.
const BITS: u32 = 18;
const SLOTS: u32 = 1 << BITS;

/// The most servers of an upstream: each then has a hundred slots or more, of
/// which one more or less is a hundredth, and the lightest one beside the
/// heaviest has a slot still.
pub const MAX_SERVERS: usize = 2_000;

/// No server's.
const FREE: u16 = u16::MAX;

/// Which server clients get, by their hash.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Table {
    slots: Box<[u16]>,
}

impl Table {
    /// Builds the table of these servers with their weights, which names them as
    /// `names` does. All three have one length, of at most [`MAX_SERVERS`].
    pub(super) fn build(servers: &[(ServerAddr, u16)], names: &[u16]) -> Self {
        if servers.len() < 2 {
            return Self {
                slots: names.into(),
            };
        }
        let mut order: Vec<_> = (0..servers.len()).collect();
        order.sort_unstable_by_key(|index| servers[*index].0);
        let weights: Vec<_> = order.iter().map(|index| servers[*index].1).collect();
        let mut preferences: Vec<_> = order
            .iter()
            .map(|index| Preferences::of(servers[*index].0))
            .collect();
        let mut slots = vec![FREE; SLOTS as usize];
        let mut free = slots.len();
        let round = turns::round(&weights);
        for turn in round.iter().copied().cycle() {
            if free == 0 {
                break;
            }
            let preferences = &mut preferences[usize::from(turn)];
            let mut slot = preferences.next();
            while slots[slot] != FREE {
                slot = preferences.next();
            }
            slots[slot] = turn;
            free -= 1;
        }
        for slot in &mut slots {
            *slot = names[order[usize::from(*slot)]];
        }
        Self {
            slots: slots.into_boxed_slice(),
        }
    }

    /// The server that is right for this hash; `None` if there are none at all.
    pub(super) fn get(&self, hash: u64) -> Option<u16> {
        let len = u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
        self.slots.get(scale(hash, len) as usize).copied()
    }
}

/// The slots that a server prefers, one after the other and each once: numbers
/// from 0 on, sent through steps that can each be undone.
struct Preferences {
    next: u32,
    start: u32,
    first: u32,
    second: u32,
}

impl Preferences {
    #[expect(clippy::cast_possible_truncation, reason = "parts of a hash")]
    fn of(server: ServerAddr) -> Self {
        let hash = hash_server(server);
        Self {
            next: 0,
            start: hash as u32 % SLOTS,
            first: (hash >> 32) as u32 | 1,
            second: step(hash) as u32 | 1,
        }
    }

    fn next(&mut self) -> usize {
        let mut slot = self.next ^ self.start;
        self.next += 1;
        for factor in [self.first, self.second, self.first] {
            slot = slot.wrapping_mul(factor) % SLOTS;
            slot ^= slot >> (BITS / 2);
        }
        slot as usize
    }
}

#[cfg(test)]
mod tests;
