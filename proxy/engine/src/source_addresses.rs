//! Which address of a source network a new session gets. Each worker has a share of the
//! network and hands its addresses out in an order that outsiders can't guess. It does no I/O
//! and takes the time as an argument.
//!
//! A late reply to an ended session would reach the next one that has its address. So an
//! address comes back only after all others, and after a rest:
//!
//! - One that was never used is handed out first.
//! - Then the one whose session ended first, if it has rested for [`MIN_REST`]. A reply that
//!   comes to a resting address starts its rest again, but [`MAX_REST`] after the session's
//!   end the rest is over. Otherwise replies forged without end would keep all addresses
//!   away. One that comes to the front during such a rest waits behind the others.
//! - Where more than a million rest, one that has rested for [`MAX_REST`] comes before those
//!   that were never used. That bounds the memory, of which a resting address takes 8
//!   bytes: 8 MB, or 96 MB where 100,000 sessions a second end.
//!
//! A share of 2⁴⁸ addresses or more is never used up: a million new sessions a second take
//! 8.9 years for it. Nothing is remembered of such a network; of a /64, even 64 workers
//! have 2⁵⁸ each, which last for 9,000 years. Of a share between 2³² and 2⁴⁸ addresses, 2³²
//! are used; of a network larger than a /64, its first /64.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use siphasher::sip::SipHasher13;

use crate::address::is_no_host;
use crate::server::SourceNetwork;
use crate::session::{MAX_REST, MIN_REST};

/// The first address of a network that a session may have. The one before it is that of
/// health checks; the first of all is that of the network itself, or of all its routers.
const FIRST: u128 = 2;

/// Of a larger network the first so many addresses are used, which differ in their low
/// 64 bits.
const LOW_BITS: u128 = 1 << 64;

/// A share of so many addresses is never used up.
const ENDLESS: u128 = 1 << 48;

/// The most addresses of a share that is not endless.
const MOST: u128 = 1 << 32;

/// As long as no more addresses rest than this, those that were never used come first.
const MANY_RESTING: usize = 1 << 20;

/// How many resting addresses that were heard a new session passes over at most: after forged
/// replies to a million of them, passing over all would stop the worker.
const MOST_PASSED_OVER: usize = 64;

/// All addresses of the worker's share are in use, or have not rested for long enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no address of the source network has rested for {} s", MIN_REST.as_secs())]
pub struct NoAddress;

/// One worker's share of a source network.
#[derive(Debug)]
pub struct SourceAddresses {
    network: IpNet,
    /// The share's first address, counted from the start of the network.
    first: u128,
    order: Permutation,
    /// How many addresses of `order` are used.
    len: u128,
    /// How many of these were handed out.
    used: u128,
    clock: Clock,
    /// By the end of their sessions, but for those that were passed over.
    resting: VecDeque<Resting>,
    /// When the latest reply came to each of `resting` that one came to. Bounded by the
    /// addresses that were handed out, whatever servers and forged replies do, since others
    /// are not noted. What came to a running session is forgotten when it ends.
    heard: HashMap<u32, Tick, ahash::RandomState>,
    /// Numbers of addresses that sessions of another process had: they come back by their rest
    /// alone.
    inherited: HashSet<u32, ahash::RandomState>,
    /// When a rest last began, or began again.
    latest_rest: Option<Tick>,
    /// When a session last ended.
    latest_end: Option<Tick>,
}

/// Addresses of other workers' shares whose sessions have ended, and when. A worker has such
/// sessions of a process before that had another number of workers; each was in use when that
/// process let go, which bounds them.
#[derive(Debug, Default)]
pub struct GivenBack {
    addresses: Mutex<Vec<(IpAddr, Instant)>>,
    /// How many there are, to be read without the lock.
    count: AtomicUsize,
}

impl GivenBack {
    /// Leaves an address to the worker whose it is.
    pub fn add(&self, address: IpAddr, ended: Instant) {
        let mut addresses = self.lock();
        addresses.push((address, ended));
        self.count.store(addresses.len(), Ordering::Release);
    }

    /// Removes those that `is_taken` returns true of.
    pub fn take(&self, mut is_taken: impl FnMut(IpAddr, Instant) -> bool) {
        if self.count.load(Ordering::Acquire) > 0 {
            let mut addresses = self.lock();
            addresses.retain(|(address, ended)| !is_taken(*address, *ended));
            self.count.store(addresses.len(), Ordering::Release);
        }
    }

    /// Those of a network, and how long ago their sessions ended.
    #[must_use]
    pub fn of(&self, network: &IpNet, now: Instant) -> Vec<(IpAddr, Duration)> {
        let addresses = self.lock();
        let of_network = addresses.iter().filter(|(ip, _)| network.contains(ip));
        let since = |ended| now.saturating_duration_since(ended);
        of_network.map(|(ip, ended)| (*ip, since(*ended))).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(IpAddr, Instant)>> {
        self.addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// An address, by its number in the share, and when its session ended.
#[derive(Clone, Copy, Debug)]
struct Resting {
    number: u32,
    ended: Tick,
}

impl SourceAddresses {
    /// The share of one of so many workers.
    #[must_use]
    pub fn new(network: &SourceNetwork, worker: usize, workers: usize, now: Instant) -> Self {
        let all = network.session_addresses().min(LOW_BITS - FIRST);
        let (worker, workers) = (worker as u128, workers.max(1) as u128);
        let (each, left) = (all / workers, all % workers);
        let share = each + u128::from(worker < left);
        let len = if share >= ENDLESS {
            share
        } else {
            share.min(MOST)
        };
        Self {
            network: network.network.trunc(),
            first: FIRST + worker * each + worker.min(left),
            order: Permutation::random(len),
            len,
            used: 0,
            clock: Clock::new(now),
            resting: VecDeque::new(),
            heard: HashMap::default(),
            inherited: HashSet::default(),
            latest_rest: None,
            latest_end: None,
        }
    }

    /// Whether none of so many workers ever hands out an address twice.
    #[must_use]
    pub fn never_repeats(network: &SourceNetwork, workers: usize) -> bool {
        let all = network.session_addresses().min(LOW_BITS - FIRST);
        all / workers.max(1) as u128 >= ENDLESS
    }

    /// How many addresses there are.
    #[must_use]
    pub fn len(&self) -> u128 {
        self.len
    }

    /// Whether there is none: the network has fewer addresses than there are workers.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// An address for a new session, until it is [given back](Self::give_back).
    ///
    /// # Errors
    ///
    /// [`NoAddress`] if none has rested for [`MIN_REST`].
    pub fn take(&mut self, now: Instant) -> Result<IpAddr, NoAddress> {
        if self.resting.len() > MANY_RESTING
            && let Some(rested) = self.rested(now, MAX_REST)
        {
            return Ok(rested);
        }
        loop {
            if self.used == self.len {
                if self.len < ENDLESS {
                    return self.rested(now, MIN_REST).ok_or(NoAddress);
                }
                self.used = 0;
            }
            let number = self.order.at(self.used);
            let address = self.address(number);
            self.used += 1;
            if self.is_inherited(number) {
                continue;
            }
            // In the middle of a network around 127.0.0.0/8 alone.
            if !is_no_host(address) && address != Ipv4Addr::LOCALHOST {
                return Ok(address);
            }
        }
    }

    /// The address whose session ended first, if it has rested for so long.
    fn rested(&mut self, now: Instant, rest: Duration) -> Option<IpAddr> {
        let now = self.clock.tick(now);
        for _ in 0..MOST_PASSED_OVER {
            let front = *self.resting.front()?;
            if !now.is_after(front.ended, rest) {
                return None;
            }
            self.resting.pop_front();
            let heard = self.heard.get(&front.number);
            let heard_lately = heard.is_some_and(|heard| !now.is_after(*heard, rest));
            if !heard_lately || now.is_after(front.ended, MAX_REST) {
                self.heard.remove(&front.number);
                return Some(self.address(front.number.into()));
            }
            self.resting.push_back(front);
        }
        None
    }

    /// The session that had `address` has ended: now it rests. False if the address is of
    /// another worker's share.
    pub fn give_back(&mut self, address: IpAddr, now: Instant) -> bool {
        let ended = self.clock.tick(now);
        let Some(number) = self.number(address) else {
            return self.len >= ENDLESS;
        };
        self.heard.remove(&number);
        self.resting.push_back(Resting { number, ended });
        self.latest_rest = Some(ended);
        self.latest_end = Some(ended);
        true
    }

    /// Has an address not handed out that another process has handed out: until it is
    /// [given back](Self::give_back), or has rested if its session ended so long ago. Those
    /// that rest must come in the order in which their rests began.
    pub fn inherit(&mut self, address: IpAddr, ended: Option<Duration>, now: Instant) {
        let Some(number) = self.number(address) else {
            return;
        };
        if self.inherited.insert(number)
            && let Some(ended) = ended
        {
            let ended = self.clock.tick(now).before(ended);
            self.resting.push_back(Resting { number, ended });
            self.latest_rest = Some(self.clock.tick(now));
            self.latest_end = self.latest_rest;
        }
    }

    /// Addresses that rest, and how long ago their sessions ended.
    pub fn resting(&self, now: Instant) -> Vec<(IpAddr, Duration)> {
        let now = self.clock.clone().tick(now);
        let of = |one: &Resting| (self.address(one.number.into()), now.since(one.ended));
        let resting = self.resting.iter().map(of);
        // Those that have rested for longer are as if they had never been used.
        resting.filter(|(_, ended)| *ended < MAX_REST).collect()
    }

    fn is_inherited(&self, number: u128) -> bool {
        let is_there = |number| self.inherited.contains(&number);
        !self.inherited.is_empty() && u32::try_from(number).is_ok_and(is_there)
    }

    /// Whether a rest began within the last [`MIN_REST`], even if its address is in use again.
    pub fn any_rests(&mut self, now: Instant) -> bool {
        let now = self.clock.tick(now);
        let lasts = |since: Option<Tick>, rest| since.is_some_and(|at| !now.is_after(at, rest));
        lasts(self.latest_rest, MIN_REST) && lasts(self.latest_end, MAX_REST)
    }

    /// A reply came to `address`, which no session has: if it rests, its rest begins
    /// again, and is over at most [`MAX_REST`] after the session's end.
    pub fn heard(&mut self, address: IpAddr, now: Instant) {
        let since = self.clock.tick(now);
        if let Some(number) = self.number(address)
            && (self.order.place(number.into()) < self.used || self.inherited.contains(&number))
        {
            self.heard.insert(number, since);
            self.latest_rest = Some(since);
        }
    }

    fn address(&self, number: u128) -> IpAddr {
        let number = self.first + number;
        match self.network {
            IpNet::V4(net) => {
                let number = u32::try_from(number).expect("an IPv4 network has so many");
                Ipv4Addr::from_bits(net.addr().to_bits() + number).into()
            }
            IpNet::V6(net) => Ipv6Addr::from_bits(net.addr().to_bits() + number).into(),
        }
    }

    /// The number of an address in the share; `None` if it is of no share, or of one that
    /// nothing is remembered of.
    fn number(&self, address: IpAddr) -> Option<u32> {
        let number = match (self.network, address) {
            (IpNet::V4(net), IpAddr::V4(ip)) => {
                ip.to_bits().checked_sub(net.addr().to_bits())?.into()
            }
            (IpNet::V6(net), IpAddr::V6(ip)) => ip.to_bits().checked_sub(net.addr().to_bits())?,
            _ => return None,
        };
        let number = number.checked_sub(self.first)?;
        let is_remembered = number < self.len && self.len < ENDLESS;
        u32::try_from(number).ok().filter(|_| is_remembered)
    }
}

/// The time since a clock's start, in steps of 100 ms. Of times more than 13 years apart,
/// the difference is wrong.
#[derive(Clone, Copy, Debug)]
struct Tick(u32);

impl Tick {
    const STEP: Duration = Duration::from_millis(100);

    /// Whether at least so much time has passed since `earlier`.
    fn is_after(self, earlier: Self, rest: Duration) -> bool {
        let steps = self.0.wrapping_sub(earlier.0);
        // Both are rounded down: of the first step any part may be missing.
        steps > 0 && Self::STEP * (steps - 1) >= rest
    }

    fn since(self, earlier: Self) -> Duration {
        Self::STEP * self.0.wrapping_sub(earlier.0)
    }

    #[expect(clippy::cast_possible_truncation, reason = "differences alone count")]
    fn before(self, ago: Duration) -> Self {
        let steps = ago.as_millis() / Self::STEP.as_millis();
        Self(self.0.wrapping_sub(steps as u32))
    }
}

/// Never goes back, so that a time read a moment ago isn't taken for one long past.
#[derive(Clone, Debug)]
struct Clock {
    started: Instant,
    latest: u128,
}

impl Clock {
    fn new(now: Instant) -> Self {
        Self {
            started: now,
            latest: 0,
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "differences alone count")]
    fn tick(&mut self, now: Instant) -> Tick {
        let passed = now.saturating_duration_since(self.started);
        let steps = passed.as_millis() / Tick::STEP.as_millis();
        self.latest = self.latest.max(steps);
        Tick(self.latest as u32)
    }
}

/// An order of the numbers below `len` that who doesn't know the key can't guess: a
/// Feistel network over as many bits as the numbers have, with SipHash as its function.
/// Where it leads beyond `len`, it is applied again (cycle walking): fewer than twice on
/// average.
struct Permutation {
    len: u128,
    /// At most 64 each.
    low_bits: u32,
    high_bits: u32,
    key: SipHasher13,
}

/// Leaves out the key: who has it knows which addresses come next.
impl fmt::Debug for Permutation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Permutation")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl Permutation {
    /// Four are enough for a pseudorandom permutation where halves are wide (Luby and
    /// Rackoff); two more for narrow ones.
    const ROUNDS: u8 = 6;

    fn random(len: u128) -> Self {
        let random = || RandomState::new().build_hasher().finish();
        Self::new(len, [random(), random()])
    }

    fn new(len: u128, key: [u64; 2]) -> Self {
        let bits = (u128::BITS - len.saturating_sub(1).leading_zeros()).max(2);
        Self {
            len,
            low_bits: bits / 2,
            high_bits: bits - bits / 2,
            key: SipHasher13::new_with_keys(key[0], key[1]),
        }
    }

    /// The number at this place, which is below `len`.
    fn at(&self, place: u128) -> u128 {
        let rounds = |number| self.rounds(number, 0..Self::ROUNDS);
        self.walk(place, rounds)
    }

    /// The place of a number below `len`.
    fn place(&self, number: u128) -> u128 {
        let rounds = |number| self.rounds(number, (0..Self::ROUNDS).rev());
        self.walk(number, rounds)
    }

    fn walk(&self, mut number: u128, step: impl Fn(u128) -> u128) -> u128 {
        debug_assert!(number < self.len);
        loop {
            number = step(number);
            if number < self.len {
                return number;
            }
        }
    }

    /// Each round changes one half by a function of the other, and undoes itself.
    fn rounds(&self, number: u128, rounds: impl Iterator<Item = u8>) -> u128 {
        let mut low = low_half(number) & mask(self.low_bits);
        let mut high = low_half(number >> self.low_bits);
        for round in rounds {
            if round % 2 == 0 {
                low ^= self.function(round, high) & mask(self.low_bits);
            } else {
                high ^= self.function(round, low) & mask(self.high_bits);
            }
        }
        u128::from(high) << self.low_bits | u128::from(low)
    }

    fn function(&self, round: u8, half: u64) -> u64 {
        let mut bytes = [round; 9];
        bytes[1..].copy_from_slice(&half.to_be_bytes());
        self.key.hash(&bytes)
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the low half")]
fn low_half(number: u128) -> u64 {
    number as u64
}

fn mask(bits: u32) -> u64 {
    u64::MAX >> (u64::BITS - bits)
}

#[cfg(test)]
mod tests;
