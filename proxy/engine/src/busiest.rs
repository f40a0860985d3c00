//! The busiest clients of the last minute: those with the most datagrams, bytes, new
//! sessions and drops.
//!
//! Each worker has a sketch of a fixed size for each of these, by the space-saving
//! algorithm (Metwally, Agrawal and El Abbadi, 2005): `PLACES` clients have a count each,
//! and a new one takes the place and the count of the lowest. Of `n` that were counted, a
//! client that has more than `n / PLACES` is there whatever the others send. An attacker who
//! forges sources neither grows the sketch nor hides such a client; each count says how much
//! of it may be another client's.
//!
//! Not all datagrams of a busy worker are counted one by one, which would take a twentieth
//! of its time: up to 4,000 parts of batches a second are, and on average each `EVERY`th
//! datagram of the others, with this weight. Gaps between these are random, so that no order
//! of datagrams hides a client.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::IpAddr;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use crate::client_limits::Network;
use crate::listener::ListenerSettings;
use crate::session::Amount;

/// Clients in a sketch: what bounds its memory, to 46 kB, and its error. Eight sketches for
/// each worker are 370 kB, of which those that nothing is counted in take no pages.
const PLACES: usize = 512;

/// How long a half of the window is. Its end is the same for all workers.
const HALF: Duration = Duration::from_secs(30);

/// Nanoseconds in which a worker earns the time to count one part of a batch exactly. It
/// bounds what counting costs to less than a hundredth of the worker's time.
const EARN: u64 = 250_000;

/// The most that it saves, of this time: parts that come at once are counted exactly.
const SAVE: u64 = 256 * EARN;

/// One of so many other datagrams is counted, on average.
const EVERY: u64 = 32;

/// Where the halves of all workers begin.
static START: OnceLock<Instant> = OnceLock::new();

/// What clients are compared by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// Datagrams that were passed on, in both directions.
    Datagrams,
    /// Their bytes of payload.
    Bytes,
    /// Sessions begun.
    Sessions,
    /// Datagrams of the client that were dropped.
    Drops,
}

impl Measure {
    /// All, in the order of [`Report::by`].
    pub const ALL: [Self; 4] = [Self::Datagrams, Self::Bytes, Self::Sessions, Self::Drops];
}

/// The busiest clients of one worker.
#[derive(Debug)]
pub struct Busiest {
    start: Instant,
    /// The half that counts now; the other one is the half before.
    current: usize,
    current_since: Instant,
    halves: [Half; 2],
    hasher: ahash::RandomState,
    sampling: Sampling,
}

/// What is counted in half of the window, by [`Measure`].
type Half = [Sketch; Measure::ALL.len()];

/// A client, as the limits of clients group them, and where it is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    /// What it is known by.
    pub network: Network,
    /// How many leading bits of IPv6 addresses that is.
    pub ipv6_prefix: u8,
    /// The id of the listener.
    pub listener: u64,
}

impl Client {
    /// The client at this address.
    #[must_use]
    pub fn of(settings: &ListenerSettings, ip: IpAddr) -> Self {
        Self {
            network: Network::of(ip, settings.ipv6_prefix),
            ipv6_prefix: settings.ipv6_prefix,
            listener: settings.listener.id(),
        }
    }
}

impl Busiest {
    /// Nothing has been counted yet.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self::since(*START.get_or_init(|| now), now)
    }

    fn since(start: Instant, now: Instant) -> Self {
        let half = || std::array::from_fn(|_| Sketch::new(PLACES));
        let mut new = Self {
            start,
            current: 0,
            current_since: start,
            halves: [half(), half()],
            hasher: ahash::RandomState::new(),
            sampling: Sampling::new(now, RandomState::new().build_hasher().finish()),
        };
        new.turn(now);
        new
    }

    /// Notes that the worker woke up.
    #[inline]
    pub fn turn(&mut self, now: Instant) {
        self.sampling.earn(now);
        if now.saturating_duration_since(self.current_since) >= HALF {
            self.rotate(now);
        }
    }

    #[cold]
    fn rotate(&mut self, now: Instant) {
        let since_start = now.saturating_duration_since(self.start).as_nanos();
        #[expect(clippy::cast_possible_truncation, reason = "shorter than a half")]
        let into_half = Duration::from_nanos((since_start % HALF.as_nanos()) as u64);
        let begun = now.checked_sub(into_half).unwrap_or(now);
        let is_next = begun.saturating_duration_since(self.current_since) < HALF + HALF / 2;
        self.current = 1 - self.current;
        self.current_since = begun;
        clear(&mut self.halves[self.current]);
        if !is_next {
            clear(&mut self.halves[1 - self.current]);
        }
    }

    /// Counts what was passed on from a client, or to it.
    #[inline]
    pub fn passed(&mut self, amount: Amount, client: impl FnOnce() -> Option<Client>) {
        if let Some(amount) = self.sampling.take(amount)
            && let Some(client) = client()
        {
            let hash = self.hasher.hash_one(client.network);
            self.count(Measure::Datagrams, client, hash, amount.datagrams);
            self.count(Measure::Bytes, client, hash, amount.bytes);
        }
    }

    /// Counts what was dropped of a client's.
    #[inline]
    pub fn dropped(&mut self, amount: Amount, client: impl FnOnce() -> Option<Client>) {
        if let Some(amount) = self.sampling.take(amount)
            && let Some(client) = client()
        {
            let hash = self.hasher.hash_one(client.network);
            self.count(Measure::Drops, client, hash, amount.datagrams);
        }
    }

    /// Counts a new session.
    pub fn begun(&mut self, client: Client) {
        let hash = self.hasher.hash_one(client.network);
        self.count(Measure::Sessions, client, hash, 1);
    }

    fn count(&mut self, measure: Measure, client: Client, hash: u64, weight: u64) {
        self.halves[self.current][measure as usize].add(client, hash, weight);
    }

    /// What was counted in the window.
    #[must_use]
    pub fn report(&mut self, now: Instant) -> Report {
        self.turn(now);
        let window = HALF + now.saturating_duration_since(self.current_since);
        Report {
            window: window.min(now.saturating_duration_since(self.start)),
            by: Measure::ALL.map(|measure| {
                let halves = self.halves.iter();
                halves.map(|half| half[measure as usize].report()).collect()
            }),
        }
    }
}

fn clear(half: &mut Half) {
    half.iter_mut().for_each(Sketch::clear);
}

/// Which datagrams are counted.
#[derive(Debug)]
struct Sampling {
    /// When time was last earned, and how much there is, in nanoseconds.
    earned: Instant,
    saved: u64,
    /// Datagrams up to the next that is counted, it included.
    gap: u64,
    /// The state of a generator of random numbers (xorshift64), never 0.
    random: u64,
}

impl Sampling {
    fn new(now: Instant, seed: u64) -> Self {
        let mut new = Self {
            earned: now,
            saved: SAVE,
            gap: 0,
            random: seed | 1,
        };
        new.gap = new.next_gap();
        new
    }

    #[inline]
    fn earn(&mut self, now: Instant) {
        let since = now.saturating_duration_since(self.earned).as_nanos();
        let since = u64::try_from(since).unwrap_or(SAVE);
        self.saved = self.saved.saturating_add(since).min(SAVE);
        self.earned = now;
    }

    /// What is to be counted for this much, if it is one's turn: on average as much.
    #[inline]
    fn take(&mut self, amount: Amount) -> Option<Amount> {
        if let Some(left) = self.saved.checked_sub(EARN) {
            self.saved = left;
            return Some(amount);
        }
        if amount.datagrams < self.gap {
            self.gap -= amount.datagrams;
            return None;
        }
        Some(self.weigh(amount))
    }

    fn weigh(&mut self, amount: Amount) -> Amount {
        if amount.datagrams >= 2 * EVERY {
            return amount;
        }
        let (mut left, mut hits) = (amount.datagrams, 0);
        while left >= self.gap {
            left -= self.gap;
            hits += 1;
            self.gap = self.next_gap();
        }
        self.gap -= left;
        let weight = hits * EVERY;
        Amount {
            datagrams: weight,
            bytes: amount.bytes * weight / amount.datagrams.max(1),
        }
    }

    /// Evenly from 1 to 63, which are 32 on average.
    fn next_gap(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        1 + (self.random >> 32) % (2 * EVERY - 1)
    }
}

/// Counts of the clients that have the most.
///
/// It keeps to its memory, which is allocated when it is made.
#[derive(Debug)]
struct Sketch {
    places: usize,
    clients: Vec<Place>,
    /// Numbers in `clients`, by the client.
    index: HashTable<u16>,
    /// A heap whose root has the lowest count.
    heap: Vec<Count>,
}

/// A client that has a count.
#[derive(Debug)]
struct Place {
    /// With the listener of its latest datagram.
    client: Client,
    hash: u64,
    /// How much of its count may be other clients'.
    error: u64,
    /// Where its count is in the heap.
    at: u16,
}

#[derive(Clone, Copy, Debug)]
struct Count {
    count: u64,
    /// Number in `clients`.
    place: u16,
}

/// Said where a number has too many bits.
const FEWER: &str = "a sketch has fewer than 2^16 places";

impl Sketch {
    fn new(places: usize) -> Self {
        Self {
            places,
            clients: Vec::with_capacity(places),
            // With twice as many, it is tidied up where it is, rather than grows.
            index: HashTable::with_capacity(2 * places),
            heap: Vec::with_capacity(places),
        }
    }

    fn clear(&mut self) {
        self.clients.clear();
        self.index.clear();
        self.heap.clear();
    }

    /// Counts this much more for the client, which has this hash: a keyed one, since peers
    /// choose their addresses.
    fn add(&mut self, client: Client, hash: u64, weight: u64) {
        let clients = &self.clients;
        let is_client = |place: &u16| clients[usize::from(*place)].client.network == client.network;
        let at = match self.index.find(hash, is_client) {
            Some(place) => {
                let known = &mut self.clients[usize::from(*place)];
                known.client = client;
                usize::from(known.at)
            }
            None if self.clients.len() < self.places => {
                self.push(client, hash);
                // Nothing is lower than 0.
                self.raise_to_root(self.heap.len() - 1)
            }
            None => {
                self.replace_lowest(client, hash);
                0
            }
        };
        let count = &mut self.heap[at].count;
        *count = count.saturating_add(weight);
        self.sink(at);
    }

    fn push(&mut self, client: Client, hash: u64) {
        let place = u16::try_from(self.clients.len()).expect(FEWER);
        self.clients.push(Place {
            client,
            hash,
            error: 0,
            at: place,
        });
        self.heap.push(Count { count: 0, place });
        self.note(hash, place);
    }

    /// Has a client that has no place take that of the one with the lowest count.
    fn replace_lowest(&mut self, client: Client, hash: u64) {
        let Count { count, place } = self.heap[0];
        let lowest = &mut self.clients[usize::from(place)];
        let before = std::mem::replace(&mut lowest.hash, hash);
        lowest.client = client;
        lowest.error = count;
        let is_place = |one: &u16| *one == place;
        if let Ok(entry) = self.index.find_entry(before, is_place) {
            entry.remove();
        }
        self.note(hash, place);
    }

    fn note(&mut self, hash: u64, place: u16) {
        let clients = &self.clients;
        let hash_of = |place: &u16| clients[usize::from(*place)].hash;
        let is_place = |one: &u16| *one == place;
        if let Entry::Vacant(entry) = self.index.entry(hash, is_place, hash_of) {
            entry.insert(place);
        }
    }

    /// Restores the order of the heap after the count there has become the lowest.
    fn raise_to_root(&mut self, mut at: usize) -> usize {
        while at > 0 {
            let parent = (at - 1) / 2;
            self.swap(at, parent);
            at = parent;
        }
        at
    }

    /// Restores the order of the heap after the count there has grown.
    fn sink(&mut self, mut at: usize) {
        loop {
            let children = 2 * at + 1..(2 * at + 3).min(self.heap.len());
            let lower = children.min_by_key(|child| self.heap[*child].count);
            match lower {
                Some(child) if self.heap[child].count < self.heap[at].count => {
                    self.swap(at, child);
                    at = child;
                }
                _ => return,
            }
        }
    }

    fn swap(&mut self, a: usize, b: usize) {
        self.heap.swap(a, b);
        for at in [a, b] {
            let place = self.heap[at].place;
            self.clients[usize::from(place)].at = u16::try_from(at).expect(FEWER);
        }
    }

    /// The most that a client without a place can have.
    fn floor(&self) -> u64 {
        let is_full = self.clients.len() == self.places;
        self.heap
            .first()
            .filter(|_| is_full)
            .map_or(0, |lowest| lowest.count)
    }

    fn report(&self) -> Counts {
        let counted = |count: &Count| {
            let place = &self.clients[usize::from(count.place)];
            Counted {
                client: place.client,
                at_least: count.count - place.error,
                uncertain: place.error,
            }
        };
        Counts {
            clients: self.heap.iter().map(counted).collect(),
            floor: self.floor(),
        }
    }
}

/// What one worker counted.
#[derive(Clone, Debug)]
pub struct Report {
    /// How long it counted.
    pub window: Duration,
    /// By [`Measure`], in parts that add up.
    pub by: [Vec<Counts>; Measure::ALL.len()],
}

/// Clients with their counts, in no order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Each client once.
    pub clients: Vec<Counted>,
    /// The most that a client can have that is not among them.
    pub floor: u64,
}

/// A client with its count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// The client, with the listener of its latest datagram.
    pub client: Client,
    /// What it has for certain.
    pub at_least: u64,
    /// How much more it can have.
    pub uncertain: u64,
}

impl Counts {
    /// All counts together, of workers and halves of a window.
    #[must_use]
    pub fn sum<'a>(all: impl IntoIterator<Item = &'a Self>) -> Self {
        // A client that a part does not have can have had its floor there.
        let mut sums: HashMap<Network, (Counted, u64)> = HashMap::new();
        let mut floor: u64 = 0;
        for part in all {
            floor = floor.saturating_add(part.floor);
            for counted in &part.clients {
                let none = Counted {
                    at_least: 0,
                    uncertain: 0,
                    ..*counted
                };
                let (sum, floors) = sums.entry(counted.client.network).or_insert((none, 0));
                sum.at_least = sum.at_least.saturating_add(counted.at_least);
                sum.uncertain = sum.uncertain.saturating_add(counted.uncertain);
                sum.client = counted.client;
                *floors = floors.saturating_add(part.floor);
            }
        }
        let clients = sums.into_values().map(|(sum, floors)| Counted {
            uncertain: sum.uncertain.saturating_add(floor - floors),
            ..sum
        });
        Self {
            clients: clients.collect(),
            floor,
        }
    }
}

#[cfg(test)]
mod tests;
