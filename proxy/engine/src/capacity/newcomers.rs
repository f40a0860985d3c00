//! Which new clients get a socket while sessions that were never answered hold most of
//! them, as in a flood of forged sources: those that were answered lately, then those
//! that ask again. A port whose answer may still come can't be given to anybody else,
//! so that the ports of a flood are lost for a while whatever is done; what can be
//! chosen is who gets those that are left.
//!
//! A client here is an IPv4 address or an IPv6 network of 64 bits. Both tables have one
//! size however many there are, and no lock; they are looked at when a session begins,
//! and when it has its first answer. Where clients meet in them is a secret of the
//! process.

use std::net::IpAddr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ahash::RandomState;

use crate::client_limits::Network;

/// As of what one host commonly has (RFC 7421).
const IPV6_PREFIX: u8 = 64;

/// Clients that were answered and are remembered: half a megabyte.
const ANSWERED: usize = 1 << 16;

/// Clients that asked and are remembered: two megabytes, taken at the first flood. One
/// of 30,000 sources a second leaves most of them there for seconds.
const ASKED: usize = 1 << 18;

/// How long a client has to ask again.
const ASKS_AGAIN: Duration = Duration::from_secs(10);

/// Sessions that a client may begin for each that was answered. More than one, so that
/// those who get answers may have more and more at a time.
const FOR_EACH_ANSWER: u64 = 2;

/// The most that it may have saved. Bounds what an attacker who forges the address of a
/// client that is served can take.
const MOST_SAVED: u64 = 256;

/// Bits of an entry that are its number; the others tell clients apart.
const NUMBER: u64 = (1 << 32) - 1;

/// What is remembered of clients.
#[derive(Debug)]
pub(super) struct Newcomers {
    start: Instant,
    hasher: RandomState,
    /// Sessions that clients may begin.
    answered: Box<[AtomicU64]>,
    /// When clients asked, in milliseconds.
    asked: OnceLock<Box<[AtomicU64]>>,
}

impl Newcomers {
    pub(super) fn new(start: Instant) -> Self {
        Self {
            start,
            hasher: RandomState::new(),
            answered: table(ANSWERED),
            asked: OnceLock::new(),
        }
    }

    /// Notes that a session of the client was answered.
    pub(super) fn note_answer(&self, client: IpAddr) {
        let hash = self.hash(client);
        let saved = number_of(entry(&self.answered, hash), hash).unwrap_or(0);
        let saved = (saved + FOR_EACH_ANSWER).min(MOST_SAVED);
        remember(entry(&self.answered, hash), hash, saved);
    }

    /// Whether the client may begin a session since others of its were answered, which
    /// is then counted.
    pub(super) fn was_answered(&self, client: IpAddr) -> bool {
        let hash = self.hash(client);
        let entry = entry(&self.answered, hash);
        match number_of(entry, hash) {
            None | Some(0) => false,
            Some(saved) => {
                remember(entry, hash, saved - 1);
                true
            }
        }
    }

    /// Whether the client was asked about a moment ago; from now on it was.
    pub(super) fn asks_again(&self, now: Instant, client: IpAddr) -> bool {
        let hash = self.hash(client);
        let entry = entry(self.asked.get_or_init(|| table(ASKED)), hash);
        let now = now.saturating_duration_since(self.start).as_millis();
        let now = u64::try_from(now).unwrap_or(u64::MAX) & NUMBER;
        let before = number_of(entry, hash);
        remember(entry, hash, now);
        let patience = u64::try_from(ASKS_AGAIN.as_millis()).unwrap_or(u64::MAX);
        before.is_some_and(|before| now.wrapping_sub(before) & NUMBER <= patience)
    }

    fn hash(&self, client: IpAddr) -> u64 {
        self.hasher.hash_one(Network::of(client, IPV6_PREFIX))
    }
}

fn table(entries: usize) -> Box<[AtomicU64]> {
    (0..entries).map(|_| AtomicU64::new(0)).collect()
}

/// The place of a hash, by its lower bits. Others who meet there overwrite it.
#[expect(clippy::cast_possible_truncation, reason = "the lower bits are meant")]
fn entry(table: &[AtomicU64], hash: u64) -> &AtomicU64 {
    &table[hash as usize % table.len()]
}

/// What is remembered under this hash, which the upper bits tell from others.
fn number_of(entry: &AtomicU64, hash: u64) -> Option<u64> {
    let value = entry.load(Ordering::Relaxed);
    ((value ^ hash) & !NUMBER == 0 && value != 0).then_some(value & NUMBER)
}

fn remember(entry: &AtomicU64, hash: u64, number: u64) {
    entry.store(hash & !NUMBER | number, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(number: u32) -> IpAddr {
        IpAddr::from(number.to_be_bytes())
    }

    #[test]
    fn answers_let_a_client_begin_sessions_up_to_a_bound() {
        let newcomers = Newcomers::new(Instant::now());
        let begins = |client| (0..1000).filter(|_| newcomers.was_answered(client)).count();
        assert_eq!(begins(v4(1)), 0);
        newcomers.note_answer(v4(1));
        assert_eq!((begins(v4(2)), begins(v4(1))), (0, 2));
        for _ in 0..1000 {
            newcomers.note_answer(v4(1));
        }
        assert_eq!(begins(v4(1)), 256);
        // An IPv6 host has a whole network.
        newcomers.note_answer("2001:db8::1".parse().unwrap());
        assert_eq!(begins("2001:db8::ffff:2".parse().unwrap()), 2);
        assert_eq!(begins("2001:db8:0:1::1".parse().unwrap()), 0);
    }

    #[test]
    fn a_client_asks_again_within_a_while() {
        let start = Instant::now();
        let newcomers = Newcomers::new(start);
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(!newcomers.asks_again(at(0), v4(1)));
        assert!(newcomers.asks_again(at(10), v4(1)));
        assert!(!newcomers.asks_again(at(21), v4(1)));
        assert!(!newcomers.asks_again(at(21), v4(2)));
    }

    #[test]
    fn a_flood_leaves_most_clients_remembered() {
        let start = Instant::now();
        let newcomers = Newcomers::new(start);
        let clients = || (0..1000).map(v4);
        for client in clients() {
            newcomers.note_answer(client);
            newcomers.asks_again(start, client);
        }
        for source in 1_000_000..1_030_000 {
            assert!(!newcomers.was_answered(v4(source)));
            newcomers.asks_again(start, v4(source));
        }
        let again = clients().filter(|client| newcomers.asks_again(start, *client));
        assert!(again.count() > 800);
        let answered = clients().filter(|client| newcomers.was_answered(*client));
        assert!(answered.count() > 950);
    }
}
