//! The table of one worker's sessions: finds, counts, limits and ends them.

mod resting;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::Instant;

use slab::Slab;

use super::rest::{Class, Rest};
use super::rings::Rings;
use super::unanswered::Unanswered;
use super::wheel::Wheel;
use super::{
    Afterlife, Amount, EndReason, Key, MAX_REST, Network, Reply, Rules, SPARE, Seat, Session,
    SessionId, State,
};

use resting::silent_class;

/// Sessions that are let go at the most before datagrams have their turn again,
/// since each costs the closing of a socket.
const LET_GO_AT_ONCE: usize = 64;

/// The sessions of one worker.
#[derive(Debug)]
pub struct Table<T> {
    rules: Vec<Rules>,
    sessions: Slab<Session<T>>,
    /// Peers choose the keys: the hash must be keyed, with a key that they can't
    /// learn, or they could have all theirs meet in one place.
    by_key: HashMap<Key, u32, ahash::RandomState>,
    /// Sessions of one key: one that takes its datagrams, and those that have taken all
    /// that they may.
    rings: Rings,
    wheel: Wheel,
    unanswered: Unanswered,
    rest: Rest,
    /// To be let go as soon as what waits for them has been read.
    leaving: Vec<SessionId>,
    retired: usize,
    reclaimed: u64,
    renewed: u64,
    generation: u32,
    afterlife: fn(&T) -> Afterlife,
}

impl<T> Table<T> {
    /// A table for listeners with these `rules`.
    #[must_use]
    pub fn new(now: Instant, rules: Vec<Rules>) -> Self {
        Self {
            rules,
            sessions: Slab::new(),
            by_key: HashMap::default(),
            rings: Rings::default(),
            wheel: Wheel::new(now),
            unanswered: Unanswered::new(),
            rest: Rest::default(),
            leaving: Vec::new(),
            retired: 0,
            reclaimed: 0,
            renewed: 0,
            generation: 0,
            afterlife: |_| Afterlife::Rest,
        }
    }

    /// Has `afterlife` say of what is kept with a session what becomes of it.
    /// Otherwise all of it rests.
    #[must_use]
    pub fn with_afterlife(self, afterlife: fn(&T) -> Afterlife) -> Self {
        Self { afterlife, ..self }
    }

    /// Goes by other rules from now on, for as many listeners as before or more.
    pub fn follow(&mut self, now: Instant, rules: Vec<Rules>) {
        let sooner = |(new, old): (&Rules, &Rules)| new.idle_timeout < old.idle_timeout;
        let ends_sooner = rules.iter().zip(&self.rules).any(sooner);
        self.rules = rules;
        if ends_sooner {
            for (slot, session) in &self.sessions {
                if session.is_active() {
                    let deadline = session.last_active + self.rules[session.listener].idle_timeout;
                    let slot = u32::try_from(slot).expect("as when it was opened");
                    self.wheel.arm(slot, deadline.max(now));
                }
            }
        }
    }

    /// All sessions, ended ones too, to change what the owner keeps there.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (SessionId, &mut Session<T>)> {
        self.sessions.iter_mut().map(|(slot, session)| {
            let id = SessionId {
                slot: u32::try_from(slot).expect("as when it was opened"),
                generation: session.generation,
            };
            (id, session)
        })
    }

    /// Finds the session that takes these datagrams of a client, and counts
    /// them. `None` if there is none, or if it has taken all that it may or needs
    /// another socket: then [`open`](Self::open) another and ask again.
    pub fn request(&mut self, now: Instant, key: &Key, amount: Amount) -> Option<SessionId> {
        let slot = *self.by_key.get(key)?;
        let session = self.sessions.get_mut(slot as usize)?;
        let limit = self.rules[session.listener].requests;
        if session.needs_socket || limit > 0 && session.requests >= limit {
            return None;
        }
        Some(session.count(slot, now, amount))
    }

    /// The bucket, for [`Rates`](super::Rates), of the session that takes this client's
    /// datagrams. `None` if it was never answered, or another is to be begun.
    pub fn bucket(&mut self, key: &Key) -> Option<&mut u64> {
        let slot = *self.by_key.get(key)?;
        let session = self.sessions.get_mut(slot as usize)?;
        let limit = self.rules[session.listener].requests;
        let takes_more = limit == 0 || session.requests < limit;
        (takes_more && !session.is_unanswered()).then_some(&mut session.bucket)
    }

    /// How many datagrams [`request`](Self::request) takes at once for this client,
    /// by a session that this listener's rules end at some number: what it has left
    /// or, where another is to be begun, all that that may take.
    #[must_use]
    pub fn room(&self, key: &Key, listener: usize) -> u64 {
        let limit = self.rules[listener].requests;
        let session = self.find(key).and_then(|id| self.get(id));
        let left = session.map_or(0, |session| limit.saturating_sub(session.requests));
        if left > 0 { left } else { limit }
    }

    /// As [`request`](Self::request), by session `id`, which was found already.
    pub fn count(&mut self, now: Instant, id: SessionId, amount: Amount) -> SessionId {
        self.get_mut(id)
            .map_or(id, |session| session.count(id.slot, now, amount))
    }

    /// As [`request`](Self::request), but by sessions of the client that are to take no
    /// more, in turn, since there is none for another.
    pub fn overdraw(&mut self, now: Instant, key: &Key, amount: Amount) -> Option<SessionId> {
        let current = self.by_key.get_mut(key)?;
        let slot = self.rings.after(*current);
        let previous = std::mem::replace(current, slot);
        self.set_state(previous, State::Detached);
        self.set_state(slot, State::Live);
        let session = self.sessions.get_mut(slot as usize)?;
        Some(session.count(slot, now, amount))
    }

    fn set_state(&mut self, slot: u32, state: State) {
        if let Some(session) = self.sessions.get_mut(slot as usize) {
            session.state = state;
        }
    }

    /// Begins a session, in which nothing has been counted yet. A session that
    /// the key led to until now is detached.
    ///
    /// # Panics
    ///
    /// If `listener` has no rules, or at 2³² sessions, which no budget allows.
    pub fn open(
        &mut self,
        now: Instant,
        key: Key,
        listener: usize,
        server: usize,
        seat: Seat,
        link: T,
    ) -> SessionId {
        self.generation = self.generation.checked_add(1).unwrap_or(1);
        let generation = self.generation;
        let is_heard = (self.afterlife)(&link).is_heard();
        let slot = self.sessions.insert(Session {
            key,
            listener,
            server,
            started: now,
            last_active: now,
            requests: 0,
            request_bytes: 0,
            replies: 0,
            reply_bytes: 0,
            link,
            needs_socket: false,
            bucket: 0,
            state: State::Live,
            generation,
            seat,
        });
        let slot = u32::try_from(slot).expect("a table holds fewer than 2^32 sessions");
        if let Some(previous) = self.by_key.insert(key, slot) {
            self.rings.join(slot, previous);
            self.set_state(previous, State::Detached);
        }
        self.wheel
            .arm(slot, now + self.rules[listener].idle_timeout);
        if is_heard && let Some(session) = self.sessions.get_mut(slot as usize) {
            self.unanswered.push(slot, session.bounded_client());
            let is_answering = self.rules[listener].responses > 0;
            if is_answering || self.unanswered.usual(session).is_some() {
                session.seat.await_answer();
            }
        }
        SessionId { slot, generation }
    }

    /// Undoes [`open`](Self::open) for a session whose owner could not set it up.
    pub fn abort(&mut self, id: SessionId) {
        if let Some(session) = self.get(id) {
            let key = session.key;
            self.take_no_more(id.slot, key);
            self.remove(id.slot);
        }
    }

    /// Counts replies that came for session `id` and says whose they are. If it
    /// waited for no more, `ended` is told, and it ends. `None` if it had ended
    /// before, unless it was moved or gave way just now: then nobody may have them, and
    /// its rest begins anew.
    pub fn reply(
        &mut self,
        now: Instant,
        id: SessionId,
        amount: Amount,
        ended: impl FnOnce(&Session<T>, EndReason),
    ) -> Option<Reply> {
        let session = self.sessions.get_mut(id.slot as usize)?;
        if session.generation != id.generation {
            return None;
        }
        if !session.passes_replies(now) {
            self.hear(now, id);
            return None;
        }
        let rules = self.rules[session.listener];
        if session.is_unanswered() {
            self.unanswered.remove(id.slot, session.bounded_client());
            self.unanswered.note_answer(now, session);
            session.seat.note_answer(session.key.client.0.ip());
        }
        let was_answered = session.is_answered(rules.responses.max(1));
        session.replies += amount.datagrams;
        session.last_active = now;
        let bytes = session.reply_bytes + amount.bytes;
        let exceeds = rules
            .amplification
            .filter(|bound| bytes > session.request_bytes.saturating_mul(bound.limit));
        if !exceeds.is_some_and(|bound| bound.enforce) {
            session.reply_bytes = bytes;
        }
        let (key, listener) = (session.key, session.listener);
        let is_answered = session.is_answered(rules.responses.max(1));
        let takes_more = session.is_active() && session.requests < rules.requests;
        let is_over = rules.responses > 0 && is_answered && !takes_more;
        if !session.is_active() {
            if is_over {
                session.silence();
            }
            let class = if is_answered && !was_answered {
                silent_class((self.afterlife)(&session.link))
            } else {
                Class::Owing
            };
            self.rest_anew(now, id.slot, class);
        } else if is_over {
            ended(session, EndReason::Responses);
            self.retire(now, id.slot, false);
        }
        Some(Reply {
            to: key.client,
            from: key.local,
            listener,
            exceeds: exceeds.is_some(),
        })
    }

    /// The session named `id`, ended or not, if it still exists.
    #[must_use]
    pub fn get(&self, id: SessionId) -> Option<&Session<T>> {
        find(&self.sessions, id)
    }

    /// As [`get`](Self::get), to change what the owner keeps there.
    pub fn get_mut(&mut self, id: SessionId) -> Option<&mut Session<T>> {
        self.sessions
            .get_mut(id.slot as usize)
            .filter(|session| session.generation == id.generation)
    }

    /// The session that takes a client's datagrams, whether it may take more or not.
    #[must_use]
    pub fn find(&self, key: &Key) -> Option<SessionId> {
        let slot = *self.by_key.get(key)?;
        let session = self.sessions.get(slot as usize)?;
        Some(SessionId {
            slot,
            generation: session.generation,
        })
    }

    /// Ends session `id`, if it is active; `ended` is told. If it has
    /// [`Moved`](EndReason::Moved), goes on from another socket or gave way
    /// [`Unanswered`](EndReason::Unanswered), replies to what it asked pass until it has
    /// rested.
    pub fn end(
        &mut self,
        now: Instant,
        id: SessionId,
        reason: EndReason,
        ended: impl FnOnce(&Session<T>),
    ) {
        if let Some(session) = self.get(id).filter(|session| session.is_active()) {
            ended(session);
            let passes = matches!(
                reason,
                EndReason::Moved | EndReason::Network | EndReason::Unanswered
            );
            self.retire(now, id.slot, passes);
        }
    }

    /// The oldest session that was never answered and has had as long as its server
    /// usually takes; of one `client` of a listener alone, if it is said which. It is
    /// to [`end`](Self::end) when sessions, or those of that client, have run out.
    ///
    /// Where the server was never seen to answer, as those of logs don't, it must have
    /// had no datagram for as long as the slowest may take.
    pub fn giving_way(
        &mut self,
        now: Instant,
        client: Option<(usize, Network)>,
    ) -> Option<SessionId> {
        let found = self.unanswered.giving_way(now, client, &self.sessions);
        found.map(|slot| SessionId {
            slot,
            generation: self.sessions[slot as usize].generation,
        })
    }

    /// Ends the sessions whose time is up, and tells `ended` of each; lets go
    /// of what has rested for long enough, if `is_silent` says so after it has read what
    /// waits there. If that is of many, the others wait for the next time, which
    /// [`next_deadline`](Self::next_deadline) says is due.
    pub fn expire(
        &mut self,
        now: Instant,
        mut ended: impl FnMut(&Session<T>, EndReason),
        mut is_silent: impl FnMut(&mut Session<T>) -> bool,
    ) {
        let mut let_go = 0;
        while let_go < LET_GO_AT_ONCE
            && let Some(slot) = self.wheel.pop(now)
        {
            let Some(session) = self.sessions.get_mut(slot as usize) else {
                continue;
            };
            let deadline = match session.state {
                State::Retired { since, .. } => since + MAX_REST + SPARE,
                State::Live | State::Detached => {
                    session.last_active + self.rules[session.listener].idle_timeout
                }
            };
            if now < deadline {
                self.wheel.arm(slot, deadline);
            } else if session.is_active() {
                ended(session, EndReason::Idle);
                self.retire(now, slot, false);
            } else {
                let_go += 1;
                if is_silent(session) {
                    self.remove(slot);
                } else {
                    self.renew(now, slot);
                    self.wheel.arm(slot, now + MAX_REST + SPARE);
                }
            }
        }
    }

    /// When [`expire`](Self::expire) has something to do at the earliest.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.wheel.next()
    }

    /// Sessions that take or pass datagrams.
    #[must_use]
    pub fn active(&self) -> usize {
        self.sessions.len() - self.retired
    }

    /// Sessions that ended and still keep what they own.
    #[must_use]
    pub fn retired(&self) -> usize {
        self.retired
    }

    /// Whether any session has had fewer replies than its datagrams should get:
    /// one each, unless the listener's rules say more.
    #[must_use]
    pub fn awaits_replies(&self) -> bool {
        self.sessions.iter().any(|(_, session)| {
            let each = self.rules[session.listener].responses.max(1);
            let is_heard = (self.afterlife)(&session.link).is_heard();
            session.is_active() && is_heard && !session.is_answered(each)
        })
    }

    /// Active sessions with their numbers, from number `first` on.
    pub fn iter_from(&self, first: usize) -> impl Iterator<Item = (usize, &Session<T>)> {
        // The slab's iterator can't start in the middle; a page of an admin's
        // listing may cost a walk.
        self.sessions
            .iter()
            .skip_while(move |(slot, _)| *slot < first)
            .filter(|(_, session)| session.is_active())
    }

    fn retire(&mut self, now: Instant, slot: u32, passes: bool) {
        let Some(session) = self.sessions.get_mut(slot as usize) else {
            return;
        };
        self.unanswered.remove(slot, session.bounded_client());
        let key = session.key;
        self.take_no_more(slot, key);
        let Some(session) = self.sessions.get_mut(slot as usize) else {
            return;
        };
        let each = self.rules[session.listener].responses.max(1);
        let class = match (self.afterlife)(&session.link) {
            Afterlife::Unheard => {
                self.remove(slot);
                return;
            }
            Afterlife::None => None,
            kept @ (Afterlife::Rest | Afterlife::RestUnused | Afterlife::RestUnheard) => {
                Some(if session.is_unanswered() && session.requests > 0 {
                    Class::Unanswered
                } else if session.is_answered(each) && !session.is_streamed_to(now, each) {
                    silent_class(kept)
                } else {
                    Class::Owing
                })
            }
        };
        session.state = State::Retired {
            ended: now,
            since: now,
            passes,
            class,
        };
        session.seat.rest();
        self.retired += 1;
        if let Some((lane, _)) = session.rest(now) {
            self.rest.push(lane, slot);
            self.wheel.arm(slot, now + MAX_REST + SPARE);
        } else {
            self.wheel.disarm(slot);
            self.leaving.push(SessionId {
                slot,
                generation: session.generation,
            });
        }
    }

    /// Has the client's datagrams go to another of its sessions, if there is one.
    fn take_no_more(&mut self, slot: u32, key: Key) {
        let other = self.rings.leave(slot);
        let Entry::Occupied(mut current) = self.by_key.entry(key) else {
            return;
        };
        if *current.get() == slot {
            match other {
                Some(other) => {
                    current.insert(other);
                    self.set_state(other, State::Live);
                }
                None => _ = current.remove(),
            }
        }
    }

    fn remove(&mut self, slot: u32) -> Option<Session<T>> {
        self.wheel.disarm(slot);
        let session = self.sessions.try_remove(slot as usize)?;
        self.unanswered.remove(slot, session.bounded_client());
        if let State::Retired { since, .. } = session.state {
            self.retired -= 1;
            if let Some((lane, _)) = session.rest(since) {
                self.rest.remove(lane, slot);
            }
        }
        Some(session)
    }
}

fn find<T>(sessions: &Slab<Session<T>>, id: SessionId) -> Option<&Session<T>> {
    sessions
        .get(id.slot as usize)
        .filter(|session| session.generation == id.generation)
}
