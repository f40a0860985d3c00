//! What one client may take, whatever ports it writes from: sessions, and
//! datagrams a second. A client is an IPv4 address or an IPv6 network, since one
//! host commonly has a whole /64 (RFC 7421).

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ahash::RandomState;

use crate::address::network_bits;

/// An IPv4 address, mapped into IPv6, or an IPv6 network's first address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Network(u128);

impl Network {
    /// The network of `ip`; IPv6 ones have so many leading bits in common, at
    /// most 128.
    #[must_use]
    pub fn of(ip: IpAddr, ipv6_prefix: u8) -> Self {
        Self(network_bits(ip, ipv6_prefix))
    }

    /// Its first address, an IPv4 one as such.
    #[must_use]
    pub fn address(self) -> IpAddr {
        IpAddr::from(Ipv6Addr::from_bits(self.0)).to_canonical()
    }
}

/// How many sessions each client has, of all workers together. Looked at when a
/// session begins or ends. It has as many entries as there are clients with
/// sessions, which are bounded by the [`Capacity`](crate::capacity::Capacity).
#[derive(Debug)]
pub struct ClientSessions {
    max_sessions: AtomicU32,
    ipv6_prefix: u8,
    sessions: Mutex<HashMap<Network, u32, RandomState>>,
}

/// A client's right to one session, given back when dropped.
#[derive(Debug)]
pub struct ClientPermit {
    network: Network,
    of: Arc<ClientSessions>,
}

impl ClientSessions {
    /// At most `max_sessions` for each client.
    #[must_use]
    pub fn new(max_sessions: u32, ipv6_prefix: u8) -> Arc<Self> {
        Arc::new(Self {
            max_sessions: AtomicU32::new(max_sessions),
            ipv6_prefix,
            sessions: Mutex::default(),
        })
    }

    /// Sets the most for each client; what is taken stays taken.
    pub fn resize(&self, max_sessions: u32) {
        self.max_sessions.store(max_sessions, Ordering::Relaxed);
    }

    /// The client that counts for this address.
    #[must_use]
    pub fn network(&self, client: IpAddr) -> Network {
        Network::of(client, self.ipv6_prefix)
    }

    /// Takes a permit for one more session of `client`; `None` if it has all that it
    /// may have.
    pub fn take(self: &Arc<Self>, client: IpAddr) -> Option<ClientPermit> {
        let network = self.network(client);
        let mut sessions = self.lock();
        let taken = sessions.entry(network).or_insert(0);
        if *taken >= self.max_sessions.load(Ordering::Relaxed) {
            return None;
        }
        *taken += 1;
        Some(ClientPermit {
            network,
            of: Arc::clone(self),
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Network, u32, RandomState>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientPermit {
    pub(crate) fn network(&self) -> Network {
        self.network
    }
}

impl PartialEq for ClientSessions {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Drop for ClientPermit {
    fn drop(&mut self) {
        if let Entry::Occupied(mut entry) = self.of.lock().entry(self.network) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }
}

/// Places in each of the two rows of [`ClientRates`]: half a megabyte in all.
const PLACES: usize = 1 << 15;

/// Token buckets of all clients, for datagrams of sessions that were not answered. Those
/// of an answered one are taken from a bucket of its own, so that an attacker who forges its
/// client's address can't empty it. All workers share them, without a lock; their size is
/// fixed however many clients there are.
///
/// A client has a place in each of two rows, which it shares with others, and is
/// over its rate when both say so. A client that keeps to its rate is refused
/// only while others fill both of its places; which these are is a secret of the
/// process, so an attacker can't aim at it. Two workers that look at once may both let
/// a datagram pass that only one should have.
///
/// Each place holds when its bucket will be full again, in nanoseconds since the
/// start (the generic cell rate algorithm, ITU-T I.371).
#[derive(Debug)]
pub struct ClientRates {
    start: Instant,
    /// Nanoseconds in which a client earns one datagram.
    interval: u64,
    /// Nanoseconds in which an empty bucket fills.
    depth: u64,
    ipv6_prefix: u8,
    hasher: RandomState,
    rows: [Box<[AtomicU64]>; 2],
}

impl ClientRates {
    /// So many datagrams a second for each client, and `burst` of them at once.
    /// Both are at least 1.
    #[must_use]
    pub fn new(start: Instant, per_second: u32, burst: u32, ipv6_prefix: u8) -> Self {
        let interval = 1_000_000_000 / u64::from(per_second.max(1));
        let row = || (0..PLACES).map(|_| AtomicU64::new(0)).collect();
        Self {
            start,
            interval,
            depth: interval * u64::from(burst.max(1)),
            ipv6_prefix,
            hasher: RandomState::new(),
            rows: [row(), row()],
        }
    }

    /// Whether `client` may have so many datagrams more, which are then counted.
    /// A burst passes whole if its first datagram may, and is paid for after.
    #[must_use]
    pub fn admit(&self, now: Instant, client: IpAddr, datagrams: u64) -> bool {
        let hash = self.hasher.hash_one(Network::of(client, self.ipv6_prefix));
        let places = [(0, hash), (1, hash >> 32)].map(|(row, hash)| {
            #[expect(clippy::cast_possible_truncation, reason = "the lower bits are meant")]
            let place = hash as usize % PLACES;
            &self.rows[row][place]
        });
        let full_at = places
            .iter()
            .map(|place| place.load(Ordering::Relaxed))
            .min()
            .unwrap_or(0);
        let full_at = self.full_at_after(full_at, now, datagrams);
        if let Some(full_at) = full_at {
            for place in places {
                place.fetch_max(full_at, Ordering::Relaxed);
            }
        }
        full_at.is_some()
    }

    /// As [`admit`](Self::admit), from a bucket of a session's own, which begins full
    /// at 0.
    #[must_use]
    pub fn admit_from(&self, bucket: &mut u64, now: Instant, datagrams: u64) -> bool {
        let full_at = self.full_at_after(*bucket, now, datagrams);
        *bucket = full_at.unwrap_or(*bucket);
        full_at.is_some()
    }

    /// When a bucket that will be full at `full_at` would be if so many more passed;
    /// `None` if they may not.
    fn full_at_after(&self, full_at: u64, now: Instant, datagrams: u64) -> Option<u64> {
        let now = nanoseconds(now.saturating_duration_since(self.start));
        let full_at = full_at.max(now);
        let may_pass = full_at + self.interval <= now + self.depth;
        may_pass.then(|| full_at + self.interval.saturating_mul(datagrams))
    }
}

impl PartialEq for ClientRates {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn an_ipv6_client_is_its_network_an_ipv4_client_its_address() {
        let of = |text| Network::of(ip(text), 64);
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("2001:db8::1").address(), ip("2001:db8::"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
        assert_eq!(of("192.0.2.1").address(), ip("192.0.2.1"));
        let whole = Network::of(ip("2001:db8::1"), 128);
        assert_eq!(whole.address(), ip("2001:db8::1"));
        assert_eq!(Network::of(ip("2001:db8::1"), 0).address(), ip("::"));
    }

    #[test]
    fn a_client_has_so_many_sessions_whatever_its_ports() {
        let clients = ClientSessions::new(2, 64);
        let first = clients.take(ip("2001:db8::1")).unwrap();
        let second = clients.take(ip("2001:db8::2")).unwrap();
        assert!(clients.take(ip("2001:db8::3")).is_none());
        let other = clients.take(ip("192.0.2.1")).unwrap();
        drop(first);
        drop(clients.take(ip("2001:db8::3")).unwrap());
        drop((second, other));
        assert!(clients.lock().is_empty());
    }

    #[test]
    fn a_client_keeps_to_its_rate_and_may_burst() {
        let start = Instant::now();
        let rates = ClientRates::new(start, 100, 5, 64);
        let at = |millis| start + Duration::from_millis(millis);
        let one = ip("192.0.2.1");
        let admitted = |millis| (0..20).filter(|_| rates.admit(at(millis), one, 1)).count();
        assert_eq!(admitted(0), 5);
        assert_eq!(admitted(9), 0);
        assert_eq!(admitted(10), 1);
        assert_eq!(admitted(35), 2);
        assert_eq!(admitted(1_000), 5);
        assert!(rates.admit(at(1_000), ip("192.0.2.2"), 1));
    }

    #[test]
    fn a_bucket_of_a_sessions_own_holds_as_much() {
        let start = Instant::now();
        let rates = ClientRates::new(start, 100, 5, 64);
        let one = ip("192.0.2.1");
        while rates.admit(start, one, 1) {}
        let mut bucket = 0;
        let at = |millis| start + Duration::from_millis(millis);
        let mut admitted = |millis| {
            (0..20)
                .filter(|_| rates.admit_from(&mut bucket, at(millis), 1))
                .count()
        };
        assert_eq!((admitted(0), admitted(10), admitted(1_000)), (5, 1, 5));
    }

    #[test]
    fn a_burst_passes_whole_and_is_paid_for() {
        let start = Instant::now();
        let rates = ClientRates::new(start, 1_000, 2, 64);
        let one = ip("192.0.2.1");
        assert!(rates.admit(start, one, 50));
        assert!(!rates.admit(start + Duration::from_millis(48), one, 1));
        assert!(rates.admit(start + Duration::from_millis(49), one, 1));
    }

    #[test]
    fn a_flood_from_many_addresses_hardly_touches_a_client() {
        let start = Instant::now();
        let rates = ClientRates::new(start, 10, 10, 64);
        for client in 0..2_000_u32 {
            let flooder = IpAddr::from((0x0a00_0000 + client).to_be_bytes());
            for _ in 0..20 {
                let _ = rates.admit(start, flooder, 1);
            }
        }
        let asked = (0..2_000_u32).map(|n| IpAddr::from((0xc000_0000 + n).to_be_bytes()));
        let refused = asked
            .filter(|client| !rates.admit(start, *client, 1))
            .count();
        // About 6 % of the places are full in each row.
        assert!(refused < 40, "{refused} of 2,000 refused");
    }
}
