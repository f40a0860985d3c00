//! What each thread has decided a moment ago: a client that sends again the same way needs
//! neither the table's lock nor another look at its header, nor does a reply to it.
//!
//! A sender's header decides alone what becomes of a datagram, unless senders are remembered,
//! in which case nothing is kept here. The table is asked again often enough that it
//! knows which clients are there; [`Settings::recent`] says for how long it need not be.
//! The path of a reply to a datagram is good for longer than that, whatever else is heard of
//! the client meanwhile.
//!
//! Only the usual header is kept, with two addresses of one family and nothing else, and a
//! reply that needs nothing but another address. Between two system calls, most of the time is
//! spent waiting for memory: of a client of IPv4, one line of the processor's cache is looked at.
//!
//! [`Settings::recent`]: crate::settings::Settings::recent

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ppv2_sdk::ReplyPath;

use crate::buffers;
use crate::table::{Endpoint, Judged};

/// Senders that a thread keeps: so many sets of so many.
const SETS: usize = 1024;
const WAYS: usize = 4;

/// Headers of PROXY v2 for UDP over IPv4 and IPv6, without TLVs: what they begin with behind
/// the signature, and how long they are.
const OVER_IPV4: ([u8; 2], usize) = ([0x21, 0x12], 28);
const OVER_IPV6: ([u8; 2], usize) = ([0x21, 0x22], 52);
const FIXED: usize = 16;

/// Datagrams of which a thread knows in which order they came. Servers answer in that order,
/// some after they have received a hundred.
const ORDER: usize = 128;

/// Datagrams after the one that is due, whose answers are looked for too: those before were
/// not answered.
const AHEAD: u32 = 4;

/// A time of a clock that may be as coarse as the kernel's tick, in nanoseconds.
pub(crate) type Nanos = i64;

/// A time in about milliseconds, and in so little room that all that is looked at for a client
/// of IPv4 is on one line of the cache. It wraps around after 52 days.
#[derive(Clone, Copy, Debug)]
struct Moment(u32);

impl Moment {
    const SHIFT: u32 = 20;

    #[inline]
    fn new(time: Nanos) -> Self {
        Self((time >> Self::SHIFT) as u32)
    }

    #[inline]
    fn is_within(self, recent: Nanos, now: Nanos) -> bool {
        let since = Self::new(now).0.wrapping_sub(self.0);
        i64::from(since) < recent >> Self::SHIFT
    }
}

/// A datagram as it came.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen<'a> {
    pub(crate) endpoint: Endpoint,
    pub(crate) peer: SocketAddr,
    pub(crate) local: Option<IpAddr>,
    pub(crate) bytes: &'a [u8],
}

/// What was decided on a sender's latest datagram: to deliver it. All zeros: nothing.
#[derive(Clone, Copy)]
#[repr(C, align(128))]
struct Decision {
    /// 0: there is none.
    header_len: u8,
    /// The local address is known, and a reply must leave from it.
    has_local: bool,
    peer_port: u16,
    endpoint: u32,
    /// When the table was asked, and when the latest datagram came.
    asked: Moment,
    heard: Moment,
    /// IPv4 addresses mapped, here and below.
    peer: u128,
    header: [u8; OVER_IPV6.1],
    local: u128,
}

/// A thread's decisions.
pub(crate) struct Recent {
    /// Parts of the senders' hashes.
    marks: [[u16; WAYS]; SETS],
    decisions: [[Decision; WAYS]; SETS],
    /// Places of the senders of the latest datagrams.
    order: [u16; ORDER],
    /// Datagrams so far, and those of them that are answered or were passed over.
    received: u32,
    answered: u32,
    /// The place in a set that a new sender gets.
    next_way: u32,
}

/// A signal handler that has interrupted the use of the thread's memory gets other memory.
#[inline]
fn with<R>(work: impl FnOnce(&mut Recent) -> Option<R>) -> Option<R> {
    buffers::take(work).flatten()
}

/// What was decided on the same header from the same sender, less than `recent` ago.
#[inline]
pub(crate) fn judged(now: Nanos, recent: Nanos, seen: &Seen<'_>) -> Option<Judged> {
    with(|thread| {
        let (set, mark) = place(seen.peer);
        let way = thread.marks[set].iter().position(|one| *one == mark)?;
        let decision = &mut thread.decisions[set][way];
        if !decision.is_of(seen) || !decision.asked.is_within(recent, now) {
            return None;
        }
        decision.heard = Moment::new(now);
        let judged = decision.judged();
        thread.came(set, way);
        Some(judged)
    })
}

/// The table has decided on a datagram that came by a proxy.
pub(crate) fn note(now: Nanos, seen: &Seen<'_>, judged: Judged, path: &ReplyPath) {
    let Some(decision) = Decision::new(now, seen, judged, path) else {
        return;
    };
    with(|thread| {
        let (set, mark) = place(seen.peer);
        let known = thread.marks[set].iter().position(|one| *one == mark);
        let way = known.unwrap_or_else(|| {
            thread.next_way = thread.next_way.wrapping_add(1);
            thread.next_way as usize % WAYS
        });
        thread.marks[set][way] = mark;
        thread.decisions[set][way] = decision;
        thread.came(set, way);
        Some(())
    });
}

/// Where replies go to a client that this thread has heard less than `recent` ago, if its turn
/// has come to be answered; and the local address that they must leave from, if it is one of
/// many.
#[inline]
pub(crate) fn path(
    now: Nanos,
    recent: Nanos,
    endpoint: Endpoint,
    client: SocketAddr,
) -> Option<(SocketAddr, Option<IpAddr>)> {
    with(|thread| {
        let left = thread.received.wrapping_sub(thread.answered);
        let (due, last) = (thread.answered, left.checked_sub(1)?);
        for ahead in (0..left.min(AHEAD)).chain([last]) {
            let number = due.wrapping_add(ahead);
            let place = usize::from(thread.order[number as usize % ORDER]);
            let decision = &thread.decisions[place / WAYS % SETS][place % WAYS];
            if decision.endpoint == endpoint.0
                && decision.client() == client
                && decision.heard.is_within(recent, now)
            {
                thread.answered = number.wrapping_add(1);
                let to = SocketAddr::new(ip(decision.peer), decision.peer_port);
                return Some((to, decision.local()));
            }
        }
        None
    })
}

impl Decision {
    /// `None` if the header, or a reply, is not the usual one.
    fn new(now: Nanos, seen: &Seen<'_>, judged: Judged, path: &ReplyPath) -> Option<Self> {
        let start = seen.bytes.get(..FIXED)?;
        let (_, header_len) = [OVER_IPV4, OVER_IPV6]
            .into_iter()
            .find(|(kind, len)| start[12..14] == *kind && judged.header_len == *len)?;
        let mut header = [0; OVER_IPV6.1];
        header[..header_len].copy_from_slice(seen.bytes.get(..header_len)?);
        let decision = Self {
            header_len: header_len as u8,
            has_local: seen.local.is_some(),
            peer_port: seen.peer.port(),
            endpoint: seen.endpoint.0,
            peer: bits(seen.peer.ip()),
            header,
            asked: Moment::new(now),
            heard: Moment::new(now),
            local: seen.local.map_or(0, bits),
        };
        let is_usual = decision.judged() == judged
            && path.to == seen.peer
            && path.from.is_none()
            && path.local == decision.local()
            && path.header().is_empty()
            // Nothing of it, such as a scope, is missing here.
            && seen.peer == SocketAddr::new(ip(decision.peer), decision.peer_port);
        is_usual.then_some(decision)
    }

    #[inline]
    fn is_of(&self, seen: &Seen<'_>) -> bool {
        let len = usize::from(self.header_len);
        // A datagram of a header alone is not for everybody.
        len != 0
            && seen.bytes.len() > len
            && self.endpoint == seen.endpoint.0
            && self.peer_port == seen.peer.port()
            && self.peer == bits(seen.peer.ip())
            && match len {
                // Of a length that is known, it is compared by a few instructions.
                28 => self.header[..28] == seen.bytes[..28],
                _ => self.header[..len.min(52)] == seen.bytes[..len.min(52)],
            }
            && self.has_local == seen.local.is_some()
            && seen.local.is_none_or(|local| self.local == bits(local))
    }

    #[inline]
    fn judged(&self) -> Judged {
        Judged {
            client: self.client(),
            destination: Some(self.address(1)),
            header_len: self.header_len.into(),
            is_direct: false,
        }
    }

    #[inline]
    fn client(&self) -> SocketAddr {
        self.address(0)
    }

    fn local(&self) -> Option<IpAddr> {
        self.has_local.then(|| ip(self.local))
    }

    /// The first or second address of the header.
    #[inline]
    fn address(&self, which: usize) -> SocketAddr {
        let addresses = &self.header[FIXED..];
        let port = |ports: usize| {
            let at = ports + 2 * which;
            u16::from_be_bytes([addresses[at], addresses[at + 1]])
        };
        if usize::from(self.header_len) == OVER_IPV4.1 {
            let (ips, _) = addresses.as_chunks::<4>();
            (Ipv4Addr::from(ips[which]), port(8)).into()
        } else {
            let (ips, _) = addresses.as_chunks::<16>();
            (ip(u128::from_be_bytes(ips[which])), port(32)).into()
        }
    }
}

impl Recent {
    #[inline]
    fn came(&mut self, set: usize, way: usize) {
        self.order[self.received as usize % ORDER] = (set * WAYS + way) as u16;
        self.received = self.received.wrapping_add(1);
        if self.received.wrapping_sub(self.answered) > ORDER as u32 {
            self.answered = self.received.wrapping_sub(ORDER as u32);
        }
    }
}

#[inline]
fn bits(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => 0xffff << 32 | u128::from(ip.to_bits()),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

#[inline]
fn ip(bits: u128) -> IpAddr {
    match bits >> 32 {
        0xffff => Ipv4Addr::from_bits(bits as u32).into(),
        _ => Ipv6Addr::from_bits(bits).into(),
    }
}

/// The set of a sender, and its mark there. Senders are trusted, and one that is after the
/// place of another gains nothing.
#[inline]
fn place(peer: SocketAddr) -> (usize, u16) {
    let bits = bits(peer.ip());
    let short = (bits >> 64) as u64 ^ (bits as u64).rotate_left(32) ^ u64::from(peer.port());
    let mixed = short.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed >> 48) as usize % SETS, (mixed >> 32) as u16)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use ppv2_sdk::{Demux, Trust};

    use super::*;

    const RECENT: Nanos = 200_000_000;
    const NOW: Nanos = 5_000_000_000;
    const HERE: Endpoint = Endpoint(1);

    struct Sent {
        peer: SocketAddr,
        client: SocketAddr,
        bytes: Vec<u8>,
    }

    impl Sent {
        fn new(peer: &str, client: &str) -> Self {
            let client = client.parse().unwrap();
            let listener = "203.0.113.1:53".parse().unwrap();
            let mut header = [0; ppv2::MAX_UDP_HEADER_LEN];
            let header = ppv2::encode_udp(client, listener, &mut header).unwrap();
            Self {
                peer: peer.parse().unwrap(),
                client,
                bytes: [header, b"payload"].concat(),
            }
        }

        fn seen(&self) -> Seen<'_> {
            Seen {
                endpoint: HERE,
                peer: self.peer,
                local: None,
                bytes: &self.bytes,
            }
        }

        fn judged(&self, now: Nanos) -> Option<SocketAddr> {
            judged(now, RECENT, &self.seen()).map(|judged| judged.client)
        }

        /// As the table does.
        fn decide(&self, now: Nanos) {
            let trust = Trust::networks(["192.0.2.0/24"]).build().unwrap();
            let demux = Demux::new(trust);
            let datagram = demux
                .receive(Instant::now(), self.peer, None, &self.bytes)
                .unwrap();
            let judged = Judged {
                client: datagram.client,
                destination: datagram.destination,
                header_len: datagram.header.len(),
                is_direct: false,
            };
            note(now, &self.seen(), judged, &datagram.reply_path);
        }

        fn answer(&self, now: Nanos) -> Option<SocketAddr> {
            let (to, local) = path(now, RECENT, HERE, self.client)?;
            assert_eq!(local, None);
            Some(to)
        }
    }

    #[test]
    fn a_decision_stands_for_the_same_header_and_sender_and_for_a_moment() {
        let now = NOW;
        let one = Sent::new("192.0.2.1:7000", "198.51.100.7:4000");
        assert_eq!(one.judged(now), None);
        one.decide(now);
        assert_eq!(one.judged(now), Some(one.client));
        let almost = now + RECENT / 2;
        assert_eq!(one.judged(almost), Some(one.client));
        // That it was heard meanwhile is no reason not to ask again.
        assert_eq!(one.judged(now + RECENT), None);

        let other = Sent::new("192.0.2.1:7000", "198.51.100.8:4000");
        assert_eq!(other.judged(now), None);
        let elsewhere = Sent::new("192.0.2.1:7001", "198.51.100.7:4000");
        assert_eq!(elsewhere.judged(now), None);
        let endpoint = Endpoint(2);
        let seen = Seen {
            endpoint,
            ..one.seen()
        };
        assert_eq!(judged(now, RECENT, &seen), None);
        let local = Some(one.peer.ip());
        let seen = Seen {
            local,
            ..one.seen()
        };
        assert_eq!(judged(now, RECENT, &seen), None);
        let bytes = &one.bytes[..one.bytes.len() - b"payload".len()];
        let alone = Seen {
            bytes,
            ..one.seen()
        };
        assert_eq!(judged(now, RECENT, &alone), None);

        other.decide(now);
        assert_eq!(one.judged(now), None);
        assert_eq!(other.judged(now), Some(other.client));
    }

    #[test]
    fn a_reply_leaves_from_where_the_datagram_was_sent_to() {
        let one = Sent::new("192.0.2.1:7000", "198.51.100.7:4000");
        let trust = Trust::networks(["192.0.2.0/24"]).build().unwrap();
        let demux = Demux::new(trust);
        for local in ["10.0.0.1", "10.0.0.2", "2001:db8::1"] {
            let local = Some(local.parse().unwrap());
            let received = demux.receive(Instant::now(), one.peer, local, &one.bytes);
            let path = received.unwrap().reply_path;
            let seen = Seen {
                local,
                ..one.seen()
            };
            let judged = Judged {
                client: one.client,
                destination: Some("203.0.113.1:53".parse().unwrap()),
                header_len: 28,
                is_direct: false,
            };
            note(NOW, &seen, judged, &path);
            assert_eq!(super::judged(NOW, RECENT, &seen), Some(judged));
            let reply = super::path(NOW, RECENT, HERE, one.client);
            assert_eq!(reply, Some((one.peer, local)));
        }
    }

    #[test]
    fn clients_are_answered_in_the_order_in_which_they_came_or_at_once() {
        let now = NOW;
        let name = |number: usize| {
            let peer = format!("192.0.2.{}:7000", number % 200);
            Sent::new(&peer, &format!("198.51.100.{}:{number}", number % 200))
        };
        let all: Vec<_> = (1..=100).map(name).collect();
        for one in &all {
            one.decide(now);
        }
        // Another may have taken a place.
        let answered = |one: &Sent| one.answer(now) == Some(one.peer);
        let count = all.iter().filter(|one| answered(one)).count();
        assert!(count > 80, "{count} of 100");
        for one in &all {
            one.decide(now);
            assert!(answered(one));
            assert_eq!(one.answer(now + RECENT), None);
        }
        // Some are not answered.
        for one in &all[..8] {
            one.decide(now);
        }
        assert!(answered(&all[3]));
        assert!(answered(&all[7]));
        assert!(!answered(&all[5]));
    }
}
