//! Sessions that were never answered, in the order in which they began: those that
//! give way first when sessions run out. Forged sources leave many of them.
//!
//! Lists run through links by number, as in the timer wheel, so that an answer takes
//! a session off its lists without a search.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::{Duration, Instant};

use slab::Slab;

use super::{Network, Session};

const NONE: u32 = u32::MAX;

/// Sessions that are looked at for one that may give way. More than one, since servers
/// differ in how long they take to answer.
const LOOKS: usize = 16;

/// A client of one listener, by its number, that may have so many sessions.
pub(super) type Client = (usize, Network);

/// Unanswered sessions by slot, all together and those of each client that may have
/// so many. Bounded by the number of sessions.
#[derive(Debug)]
pub(super) struct Unanswered {
    links: Links,
    all: List,
    links_of_clients: Links,
    of_clients: HashMap<Client, List, ahash::RandomState>,
    /// By number of the server.
    answer_times: Vec<AnswerTime>,
}

impl Unanswered {
    pub(super) fn new() -> Self {
        Self {
            links: Links::default(),
            all: List::EMPTY,
            links_of_clients: Links::default(),
            of_clients: HashMap::default(),
            answer_times: Vec::new(),
        }
    }

    /// Lists `slot`, which is not listed, as the latest.
    pub(super) fn push(&mut self, slot: u32, client: Option<Client>) {
        self.links.push(&mut self.all, slot);
        if let Some(client) = client {
            let list = self.of_clients.entry(client).or_insert(List::EMPTY);
            self.links_of_clients.push(list, slot);
        }
    }

    /// Takes `slot` off, if it is listed. `client` must be as when it was pushed.
    pub(super) fn remove(&mut self, slot: u32, client: Option<Client>) {
        self.links.remove(&mut self.all, slot);
        if let Some(client) = client
            && let Entry::Occupied(mut list) = self.of_clients.entry(client)
        {
            self.links_of_clients.remove(list.get_mut(), slot);
            if list.get().first == NONE {
                list.remove();
            }
        }
    }

    /// Notes that a session has its first answer.
    pub(super) fn note_answer<T>(&mut self, now: Instant, session: &Session<T>) {
        let server = session.server;
        if self.answer_times.len() <= server {
            self.answer_times.resize(server + 1, AnswerTime::default());
        }
        let time = &mut self.answer_times[server];
        time.note(now.saturating_duration_since(session.started));
        if let Some(usual) = time.usual() {
            session.seat.tell_answer_time(server, usual);
        }
    }

    /// The time within which the session's server usually answers, as this worker saw it
    /// or another; `None` if none did.
    pub(super) fn usual<T>(&self, session: &Session<T>) -> Option<Duration> {
        let own = self.answer_times.get(session.server);
        own.and_then(|time| time.usual())
            .or_else(|| session.seat.answer_time(session.server))
    }

    /// As [`usual`](Self::usual), or as long as the slowest may take if none did.
    pub(super) fn time_for_answer<T>(&self, session: &Session<T>) -> Duration {
        self.usual(session).unwrap_or(AnswerTime::MOST)
    }

    /// The oldest that has had the time that its server usually takes, of all sessions
    /// or of one client's. Where the server was never seen to answer, it must have had no
    /// datagram for as long as the slowest may take.
    pub(super) fn giving_way<T>(
        &mut self,
        now: Instant,
        client: Option<Client>,
        sessions: &Slab<Session<T>>,
    ) -> Option<u32> {
        let had_its_time = |slot: &u32| {
            let session = &sessions[*slot as usize];
            let (since, usual) = match self.usual(session) {
                Some(usual) => (session.started, usual),
                None => (session.last_active, AnswerTime::MOST),
            };
            now.saturating_duration_since(since) >= usual
        };
        let found = self.iter(client).take(LOOKS).find(had_its_time);
        let oldest = self.iter(client).next()?;
        let session = &sessions[oldest as usize];
        if found.is_none() && self.usual(session).is_none() {
            // It stays while it is used, and must not hide those behind it.
            self.remove(oldest, session.bounded_client());
            self.push(oldest, session.bounded_client());
        }
        found
    }

    /// From the oldest to the latest, of all sessions or of one client's.
    fn iter(&self, client: Option<Client>) -> impl Iterator<Item = u32> {
        let (links, first) = match client {
            None => (&self.links, self.all.first),
            Some(client) => {
                let list = self.of_clients.get(&client);
                (&self.links_of_clients, list.map_or(NONE, |list| list.first))
            }
        };
        let listed = |slot: u32| (slot != NONE).then_some(slot);
        std::iter::successors(listed(first), move |slot| {
            listed(links.0[*slot as usize].next)
        })
    }
}

#[derive(Clone, Copy, Debug)]
struct List {
    first: u32,
    last: u32,
}

impl List {
    const EMPTY: Self = Self {
        first: NONE,
        last: NONE,
    };
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

/// One link for each slot, of whichever list it is on.
#[derive(Debug, Default)]
struct Links(Vec<Link>);

impl Links {
    fn push(&mut self, list: &mut List, slot: u32) {
        if self.0.len() <= slot as usize {
            self.0.resize(slot as usize + 1, Link::NONE);
        }
        self.0[slot as usize] = Link {
            previous: list.last,
            next: NONE,
        };
        match list.last {
            NONE => list.first = slot,
            last => self.0[last as usize].next = slot,
        }
        list.last = slot;
    }

    fn remove(&mut self, list: &mut List, slot: u32) {
        let Some(link) = self.0.get_mut(slot as usize) else {
            return;
        };
        let Link { previous, next } = std::mem::replace(link, Link::NONE);
        match previous {
            // Not listed, but for the first.
            NONE if list.first != slot => return,
            NONE => list.first = next,
            previous => self.0[previous as usize].next = next,
        }
        match next {
            NONE => list.last = previous,
            next => self.0[next as usize].previous = previous,
        }
    }
}

/// How long a server takes to answer, as far as it was seen: smoothed as TCP's
/// retransmission timer is (RFC 6298, section 2).
#[derive(Clone, Copy, Debug, Default)]
struct AnswerTime {
    /// In microseconds; 0 before the first answer.
    mean: u32,
    deviation: u32,
}

impl AnswerTime {
    /// However fast a server is, its answer may wait in a busy host for so long.
    const LEAST: Duration = Duration::from_millis(50);

    /// Slower answers count as this, so that nobody who has a server answer late
    /// keeps unanswered sessions from giving way.
    const MOST: Duration = Duration::from_secs(2);

    /// Takes note of the first answer of a session.
    fn note(&mut self, took: Duration) {
        let took = took.min(Self::MOST).as_micros();
        let took = u32::try_from(took).unwrap_or(u32::MAX).max(1);
        if self.mean == 0 {
            (self.mean, self.deviation) = (took, took / 2);
            return;
        }
        let off = took.abs_diff(self.mean);
        self.deviation = self.deviation - self.deviation / 4 + off / 4;
        self.mean = (self.mean - self.mean / 8 + took / 8).max(1);
    }

    /// The time within which nearly all its answers come; `None` if it was not seen
    /// to answer.
    fn usual(self) -> Option<Duration> {
        let micros = u64::from(self.mean) + 4 * u64::from(self.deviation);
        let usual = Duration::from_micros(micros).clamp(Self::LEAST, Self::MOST);
        (self.mean > 0).then_some(usual)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn client(number: u8) -> Option<Client> {
        (number > 0).then(|| (0, Network::of([192, 0, 2, number].into(), 64)))
    }

    proptest! {
        /// Against plain queues: the order is kept, and nothing is left behind.
        #[test]
        fn agrees_with_plain_queues(steps in proptest::collection::vec((0u32..12, 0u8..3), 0..80)) {
            let mut lists = Unanswered::new();
            let mut queue: VecDeque<(u32, u8)> = VecDeque::new();
            for (slot, of) in steps {
                match queue.iter().position(|(listed, _)| *listed == slot) {
                    Some(at) => {
                        let (_, of) = queue.remove(at).unwrap();
                        lists.remove(slot, client(of));
                        // Once more does no harm.
                        lists.remove(slot, client(of));
                    }
                    None => {
                        lists.push(slot, client(of));
                        queue.push_back((slot, of));
                    }
                }
                let all: Vec<_> = queue.iter().map(|(slot, _)| *slot).collect();
                prop_assert_eq!(lists.iter(None).collect::<Vec<_>>(), all);
                for of in 1..3 {
                    let own = queue.iter().filter(|(_, whose)| *whose == of);
                    let own: Vec<_> = own.map(|(slot, _)| *slot).collect();
                    prop_assert_eq!(lists.iter(client(of)).collect::<Vec<_>>(), own);
                }
            }
            for (slot, of) in queue {
                lists.remove(slot, client(of));
            }
            prop_assert!(lists.of_clients.is_empty());
        }
    }

    #[test]
    fn the_usual_time_follows_a_server_within_bounds() {
        let mut time = AnswerTime::default();
        assert_eq!(time.usual(), None);
        time.note(Duration::from_micros(300));
        assert_eq!(time.usual(), Some(AnswerTime::LEAST));
        for _ in 0..100 {
            time.note(Duration::from_millis(200));
        }
        let usual = time.usual().unwrap();
        assert!(usual >= Duration::from_millis(199) && usual < Duration::from_millis(300));
        for _ in 0..100 {
            time.note(Duration::from_secs(3600));
        }
        assert_eq!(time.usual(), Some(AnswerTime::MOST));
        for _ in 0..200 {
            time.note(Duration::ZERO);
        }
        assert_eq!(time.usual(), Some(AnswerTime::LEAST));
    }
}
