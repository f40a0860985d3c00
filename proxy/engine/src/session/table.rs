//! The table of one worker's sessions: finds, counts, limits and ends them, and says
//! when the socket of an ended one may be used again.

mod resting;
mod restore;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use slab::Slab;

use super::clock::{Clock, Moment};
use super::index::Index;
use super::links::{Links, List, Rings};
use super::unanswered::{Client, ClientPermits, Unanswered};
use super::wheel::Wheel;
use super::{
    AfterEnd, Amount, Ended, Key, MAX_REST, MIN_REST, Reply, SPARE, Session, SessionId, State, Via,
};
use crate::address::Compact;
use crate::capacity::{Capacity, Permit};
use crate::counters::EndReason;
use crate::listener::{Listener, ListenerSettings};
use crate::own_tlvs::{UniqueId, UniqueIds};
use crate::server::Server;

pub(crate) use restore::Restored;

/// The most sockets that are closed before datagrams have their turn again.
const CLOSES_AT_ONCE: usize = 64;

/// The most sessions that end, or of which no socket is to be closed, before datagrams
/// have their turn again: less than a millisecond's. Many can have begun in one moment.
const ENDS_AT_ONCE: usize = 1024;

/// How far a resting session's port can be trusted to be silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Class {
    /// Every request was answered, nothing came since, and another session of the
    /// same listener and server may have the socket.
    Reusable,
    /// As silent, but the socket is not what a new session would be given.
    Silent,
    /// An answer is owed, or the server sends what it wasn't asked for.
    Owing,
    /// No answer came at all.
    Unanswered,
    /// It has no port that another session could get.
    Passing,
}

impl Class {
    /// Of a session that was answered.
    fn answered(after_end: AfterEnd) -> Self {
        match after_end {
            AfterEnd::RestForReuse => Self::Reusable,
            AfterEnd::Rest | AfterEnd::RestUnheard | AfterEnd::CloseOnceRead | AfterEnd::Close => {
                Self::Silent
            }
            AfterEnd::Pass | AfterEnd::Forget => Self::Passing,
        }
    }

    /// Whether something may come to the port yet.
    fn owes(self) -> bool {
        matches!(self, Self::Owing | Self::Unanswered | Self::Passing)
    }

    /// Whether another session could be given the port after so short a rest that a late
    /// reply may still come to it.
    fn is_early(self, rested: Duration) -> bool {
        rested < MIN_REST && self != Self::Passing
    }
}

/// Sessions that rest side by side: of one listener and server, by their ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Lane {
    listener: u64,
    server: u64,
    class: Class,
}

impl Lane {
    pub(super) fn of(listener: &Listener, server: &Server, class: Class) -> Self {
        Self {
            listener: listener.id(),
            server: server.id(),
            class,
        }
    }
}

/// Resting sessions by slot: a list for each lane that has any, in the order in which
/// their rests began.
#[derive(Debug, Default)]
struct Resting {
    lanes: HashMap<Lane, List, ahash::RandomState>,
}

impl Resting {
    fn push(&mut self, links: &mut Links, lane: Lane, slot: u32) {
        let list = self.lanes.entry(lane).or_insert(List::EMPTY);
        links.push(list, slot);
    }

    fn remove(&mut self, links: &mut Links, lane: Lane, slot: u32) {
        if let Entry::Occupied(mut list) = self.lanes.entry(lane) {
            links.remove(list.get_mut(), slot);
            if *list.get() == List::EMPTY {
                list.remove();
            }
        }
    }

    /// The one that has rested for longest in `lane`.
    fn first(&self, lane: Lane) -> Option<u32> {
        self.lanes.get(&lane)?.first()
    }
}

/// How long before a table was made its sessions may have begun.
const BEFORE: Duration = Duration::from_secs(365 * 86_400);

/// Said where a slot has too many bits.
const FEWER: &str = "a table holds fewer than 2^32 sessions";

/// The sessions of one worker.
#[derive(Debug)]
pub struct Table<C> {
    clock: Clock,
    /// What was asked last: many datagrams come at one time.
    latest: (Instant, Moment),
    sessions: Slab<Session<C>>,
    by_key: Index,
    /// Those that have a source address of their own.
    by_source: Index,
    source_of: fn(&C) -> Option<IpAddr>,
    /// Makes ids of sessions for those that are to have one.
    unique_ids: Option<UniqueIds>,
    has_unique_id: fn(&C) -> bool,
    /// Of sessions that another process began, by slot.
    inherited_ids: HashMap<u32, UniqueId, ahash::RandomState>,
    /// Sessions of one key: one that takes its datagrams, and those that have taken all
    /// that they may.
    rings: Rings,
    wheel: Wheel,
    /// For the list that a session is in: among the unanswered ones while it is active, in
    /// its lane while it rests.
    links: Links,
    unanswered: Unanswered,
    resting: Resting,
    /// What all permits are of.
    capacity: Arc<Capacity>,
    client_permits: ClientPermits,
    /// To be closed as soon as what waits for them has been read.
    to_close: Vec<SessionId>,
    /// What was kept with sessions that are gone, as far as their owner wants it back. As
    /// many as end before it asks.
    removed: Vec<C>,
    retired: usize,
    reclaimed: u64,
    renewed: u64,
    unlogged: u64,
    generation: u32,
    after_end: fn(&C) -> AfterEnd,
    /// Number of the worker whose sessions these are.
    worker: usize,
    log: Option<SyncSender<Ended>>,
}

impl<C> Table<C> {
    /// The table of this worker, whose sessions have permits of `capacity`. `after_end` says
    /// of what is kept with a session what becomes of it.
    #[must_use]
    pub fn new(
        now: Instant,
        worker: usize,
        capacity: &Arc<Capacity>,
        after_end: fn(&C) -> AfterEnd,
    ) -> Self {
        // Sessions may have begun before, in another process.
        let clock = Clock::new(now.checked_sub(BEFORE).unwrap_or(now));
        let begin = clock.moment(now);
        Self {
            clock,
            latest: (now, begin),
            sessions: Slab::new(),
            by_key: Index::new(),
            by_source: Index::new(),
            source_of: |_| None,
            unique_ids: None,
            has_unique_id: |_| false,
            inherited_ids: HashMap::default(),
            rings: Rings::default(),
            wheel: Wheel::new(begin),
            links: Links::default(),
            unanswered: Unanswered::new(),
            resting: Resting::default(),
            capacity: Arc::clone(capacity),
            client_permits: ClientPermits::default(),
            to_close: Vec::new(),
            removed: Vec::new(),
            retired: 0,
            reclaimed: 0,
            renewed: 0,
            unlogged: 0,
            generation: 0,
            after_end,
            worker,
            log: None,
        }
    }

    /// Has sessions found by the source address that each has of its own, which
    /// `source_of` says of what is kept with one and which stays as it is.
    #[must_use]
    pub fn with_sources(mut self, source_of: fn(&C) -> Option<IpAddr>) -> Self {
        self.source_of = source_of;
        self
    }

    /// Has sessions told with the id that they have of `ids`, if `has_id` says so of what is
    /// kept with one.
    #[must_use]
    pub fn with_unique_ids(mut self, ids: UniqueIds, has_id: fn(&C) -> bool) -> Self {
        self.unique_ids = Some(ids);
        self.has_unique_id = has_id;
        self
    }

    /// The id of the session of this number, if it has one.
    #[must_use]
    pub fn unique_id(&self, number: usize) -> Option<UniqueId> {
        let session = self.sessions.get(number)?;
        let id = self.id_at(u32::try_from(number).ok()?)?;
        let has_id = (self.has_unique_id)(&session.connection);
        has_id.then(|| self.unique_id_of(id))?
    }

    fn unique_id_of(&self, id: SessionId) -> Option<UniqueId> {
        unique_id_of(self.unique_ids, &self.inherited_ids, id)
    }

    /// As [`get_mut`](Self::get_mut), with what says the id of the session if it is to have one.
    pub(crate) fn get_mut_with_id(
        &mut self,
        id: SessionId,
    ) -> Option<(&mut Session<C>, impl Fn() -> Option<UniqueId>)> {
        let session = self.sessions.get_mut(id.slot as usize);
        let session = session.filter(|session| session.generation == id.generation)?;
        let (ids, inherited) = (self.unique_ids, &self.inherited_ids);
        Some((session, move || unique_id_of(ids, inherited, id)))
    }

    /// What its sessions' times are by.
    #[must_use]
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// As [`Clock::moment`].
    fn moment(&mut self, now: Instant) -> Moment {
        if self.latest.0 != now {
            self.latest = (now, self.clock.moment(now));
        }
        self.latest.1
    }

    /// Tells of each session that ends there from now on.
    pub fn log_to(&mut self, log: Option<SyncSender<Ended>>) {
        self.log = log;
    }

    /// Has a session obey other settings of its listener.
    pub fn set_settings(&mut self, now: Instant, id: SessionId, settings: &Arc<ListenerSettings>) {
        let now = self.clock.moment(now);
        let Some(session) = self.get_mut(id) else {
            return;
        };
        let before = std::mem::replace(&mut session.settings, Arc::clone(settings));
        let idle_timeout = settings.rules.idle_timeout;
        if idle_timeout < before.rules.idle_timeout && session.is_active() {
            let deadline = session.last_active + idle_timeout;
            self.wheel.arm(id.slot, deadline.max(now));
        }
    }

    /// All sessions, ended ones too, to change what the owner keeps there.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (SessionId, &mut Session<C>)> {
        self.sessions.iter_mut().map(|(slot, session)| {
            let id = SessionId {
                slot: u32::try_from(slot).expect(FEWER),
                generation: session.generation,
            };
            (id, session)
        })
    }

    /// Finds the session that takes these datagrams of a client, and counts
    /// them. `None` if there is none, or if it has taken all that it may or needs
    /// another socket: then [`open`](Self::open) another and ask again.
    pub fn request(&mut self, now: Instant, key: &Key, amount: Amount) -> Option<SessionId> {
        self.request_of(now, self.find(key)?, amount)
    }

    /// As [`request`](Self::request), of session `id`, which was found for the client.
    pub fn request_of(&mut self, now: Instant, id: SessionId, amount: Amount) -> Option<SessionId> {
        let now = self.moment(now);
        let session = self.get_mut(id)?;
        if session.needs_socket || !session.takes_more() {
            return None;
        }
        Some(session.count(id.slot, now, amount))
    }

    /// The bucket, for [`ClientRates`](crate::client_limits::ClientRates), of the session that
    /// takes this client's datagrams. `None` if it was never answered, or another is to be begun.
    pub fn bucket(&mut self, key: &Key) -> Option<&mut u64> {
        let slot = self.slot_of(key)?;
        let session = self.sessions.get_mut(slot as usize)?;
        let has_bucket = session.takes_more() && !session.is_unanswered();
        has_bucket.then_some(&mut session.bucket_or_passes_until)
    }

    /// How many datagrams [`request`](Self::request) takes at once for this client,
    /// by a session that takes at most `limit`: what it has left or, where another is to be
    /// begun, all that that may take.
    #[must_use]
    pub fn room(&self, key: &Key, limit: u64) -> u64 {
        let session = self.find(key).and_then(|id| self.get(id));
        let left = session.map_or(0, |session| limit.saturating_sub(session.requests));
        if left > 0 { left } else { limit }
    }

    /// As [`request`](Self::request), by session `id`, which was found already.
    pub fn count(&mut self, now: Instant, id: SessionId, amount: Amount) -> SessionId {
        let now = self.moment(now);
        self.get_mut(id)
            .map_or(id, |session| session.count(id.slot, now, amount))
    }

    /// As [`request`](Self::request), but by sessions of the client that are to take no
    /// more, in turn, since there is none for another.
    pub fn overdraw(&mut self, now: Instant, key: &Key, amount: Amount) -> Option<SessionId> {
        let now = self.clock.moment(now);
        let previous = self.slot_of(key)?;
        let slot = self.rings.after(previous);
        self.by_key.replace(key, previous, Some(slot));
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
    /// With a permit of another capacity than the table's, and at 2³² sessions, which no
    /// capacity allows.
    pub fn open(
        &mut self,
        now: Instant,
        key: Key,
        settings: &Arc<ListenerSettings>,
        server: &Arc<Server>,
        permit: Permit,
        connection: C,
    ) -> SessionId {
        self.open_via(now, key, None, settings, server, permit, connection)
    }

    /// As [`open`](Self::open), of a client behind another proxy, whose id is the key's.
    ///
    /// # Panics
    ///
    /// As [`open`](Self::open).
    #[expect(clippy::too_many_arguments, reason = "all that a session begins with")]
    pub fn open_via(
        &mut self,
        now: Instant,
        key: Key,
        via: Option<Box<Via>>,
        settings: &Arc<ListenerSettings>,
        server: &Arc<Server>,
        permit: Permit,
        connection: C,
    ) -> SessionId {
        self.generation = self.generation.checked_add(1).unwrap_or(1);
        let generation = self.generation;
        let is_heard = (self.after_end)(&connection).is_heard();
        let begun = self.clock.moment(now);
        let (held, client_permit) = permit
            .into_parts(&self.capacity)
            .expect("a permit of the table's capacity");
        let slot = self.sessions.insert(Session {
            client: Compact::of(key.client.0),
            local: Compact::of(key.local.0),
            settings: Arc::clone(settings),
            server: Arc::clone(server),
            started: begun,
            last_active: begun,
            requests: 0,
            request_bytes: 0,
            replies: 0,
            reply_bytes: 0,
            via,
            connection,
            needs_socket: false,
            bucket_or_passes_until: 0,
            generation,
            state: State::Live,
            held,
        });
        let slot = u32::try_from(slot).expect(FEWER);
        if let Some(previous) = self.note_key(slot, &key) {
            self.rings.join(slot, previous);
            self.set_state(previous, State::Detached);
        }
        self.note_source(slot);
        self.wheel.arm(slot, begun + settings.rules.idle_timeout);
        if let Some(permit) = client_permit {
            self.client_permits.insert(slot, permit);
        }
        if is_heard && let Some(session) = self.sessions.get_mut(slot as usize) {
            let client = self.client_permits.client(slot, &settings.listener);
            self.unanswered.push(&mut self.links, slot, client);
            let is_answering = settings.rules.responses > 0;
            if is_answering || server.usual_answer_time().is_some() {
                session.held.await_answer(&self.capacity);
            }
        }
        SessionId { slot, generation }
    }

    /// Has the key lead to `slot`. Returns where it led before.
    fn note_key(&mut self, slot: u32, key: &Key) -> Option<u32> {
        let sessions = &self.sessions;
        let key_of = |slot: u32| sessions.get(slot as usize).map(Session::key);
        self.by_key
            .insert(slot, key, |slot| has_key(sessions, slot, key), key_of)
    }

    /// Has the session found by its source address, if it has one of its own.
    fn note_source(&mut self, slot: u32) {
        let Some(source) = self.source_at(slot) else {
            return;
        };
        let source_at = |slot: u32| source_at(&self.sessions, self.source_of, slot);
        self.by_source.insert(
            slot,
            &source_bits(source),
            |slot| source_at(slot) == Some(source),
            |slot| source_at(slot).map(source_bits),
        );
    }

    /// Undoes [`open`](Self::open) for a session whose owner could not set it up.
    pub fn abort(&mut self, id: SessionId) {
        if let Some(session) = self.get(id) {
            let key = session.key();
            self.take_no_more(id.slot, &key);
            self.discard(id.slot);
        }
    }

    /// Counts replies that came for session `id` and says whose they are. If it
    /// waited for no more, it ends. `None` if it had ended before, unless it was moved or
    /// gave way just now: then no client may have them, and its rest starts again.
    pub fn reply(&mut self, now: Instant, id: SessionId, amount: Amount) -> Option<Reply> {
        let now = self.moment(now);
        let session = self.sessions.get_mut(id.slot as usize)?;
        if session.generation != id.generation {
            return None;
        }
        if !session.passes_replies(now) {
            self.renew(now, id.slot);
            return None;
        }
        let key = session.key();
        if session.is_unanswered() {
            if session.is_active() {
                let client = self
                    .client_permits
                    .client(id.slot, &session.settings.listener);
                self.unanswered.remove(&mut self.links, id.slot, client);
            }
            session.server.note_answer(now.since(session.started));
            session.held.note_answer(&self.capacity, key.client.0.ip());
        }
        let was_answered = session.is_answered();
        session.replies += amount.datagrams;
        session.last_active = now;
        let rules = &session.settings.rules;
        let bytes = session.reply_bytes + amount.bytes;
        let exceeds = rules
            .amplification
            .filter(|bound| bytes > session.request_bytes.saturating_mul(bound.limit));
        if !exceeds.is_some_and(|bound| bound.enforce) {
            session.reply_bytes = bytes;
        }
        let reply = Reply {
            to: key.client,
            from: key.local,
            exceeds,
        };
        let is_answered = session.is_answered();
        let waits_for_requests = session.is_active() && session.requests < rules.requests;
        let is_over = rules.count_replies() && is_answered && !waits_for_requests;
        if !session.is_active() {
            if is_over {
                session.silence();
            }
            let class = if is_answered && !was_answered {
                Class::answered((self.after_end)(&session.connection))
            } else {
                Class::Owing
            };
            self.restart_rest(now, id.slot, class);
        } else if is_over {
            self.retire(now, id.slot, EndReason::Responses);
        }
        Some(reply)
    }

    /// The session named `id`, ended or not, if it still exists.
    #[must_use]
    pub fn get(&self, id: SessionId) -> Option<&Session<C>> {
        find(&self.sessions, id)
    }

    /// As [`get`](Self::get), to change what the owner keeps there.
    pub fn get_mut(&mut self, id: SessionId) -> Option<&mut Session<C>> {
        self.sessions
            .get_mut(id.slot as usize)
            .filter(|session| session.generation == id.generation)
    }

    /// The session that takes a client's datagrams, whether it may take more or not.
    #[must_use]
    pub fn find(&self, key: &Key) -> Option<SessionId> {
        self.id_at(self.slot_of(key)?)
    }

    /// The session, ended or not, that has this source address of its own.
    #[must_use]
    pub fn find_by_source(&self, source: IpAddr) -> Option<SessionId> {
        let has_source = |slot: u32| self.source_at(slot) == Some(source);
        self.id_at(self.by_source.get(&source_bits(source), has_source)?)
    }

    fn slot_of(&self, key: &Key) -> Option<u32> {
        self.by_key
            .get(key, |slot| has_key(&self.sessions, slot, key))
    }

    fn id_at(&self, slot: u32) -> Option<SessionId> {
        let session = self.sessions.get(slot as usize)?;
        Some(SessionId {
            slot,
            generation: session.generation,
        })
    }

    fn source_at(&self, slot: u32) -> Option<IpAddr> {
        source_at(&self.sessions, self.source_of, slot)
    }

    /// Ends session `id`, if it is active. If it has [`Moved`](EndReason::Moved), goes on
    /// from another socket or gave way [`Unanswered`](EndReason::Unanswered), replies to
    /// what it asked pass until it has rested.
    pub fn end(&mut self, now: Instant, id: SessionId, reason: EndReason) {
        if self.get(id).is_some_and(Session::is_active) {
            self.retire(self.clock.moment(now), id.slot, reason);
        }
    }

    /// The oldest session that was never answered and has had as long as its server
    /// usually takes; of one `client` of a listener alone, if it is said which. It is
    /// to [`end`](Self::end) when sessions, or those of that client, have run out.
    ///
    /// Where the server was never seen to answer, as those of logs don't, it must have
    /// had no datagram for as long as the slowest may take.
    pub fn giving_way(&mut self, now: Instant, client: Option<Client>) -> Option<SessionId> {
        let now = self.clock.moment(now);
        let found = self.unanswered.giving_way(
            now,
            client,
            &mut self.links,
            &self.sessions,
            &self.client_permits,
        );
        found.map(|slot| SessionId {
            slot,
            generation: self.sessions[slot as usize].generation,
        })
    }

    /// Ends the sessions whose time is up; closes what has rested for long enough, if
    /// `is_silent` says so after it has read what waits there. If these are many, the
    /// others wait for the next time, which [`next_deadline`](Self::next_deadline) says is
    /// due.
    pub fn expire(&mut self, now: Instant, mut is_silent: impl FnMut(&mut Session<C>) -> bool) {
        let now = self.clock.moment(now);
        let (mut closed, mut ended) = (0, 0);
        while closed < CLOSES_AT_ONCE
            && ended < ENDS_AT_ONCE
            && let Some(slot) = self.wheel.pop(now)
        {
            let Some(session) = self.sessions.get_mut(slot as usize) else {
                continue;
            };
            let deadline = session.deadline();
            if now < deadline {
                self.wheel.arm(slot, deadline);
            } else if session.is_active() {
                ended += 1;
                self.retire(now, slot, EndReason::Idle);
            } else if session.is_passing() {
                ended += 1;
                self.discard(slot);
            } else {
                closed += 1;
                if is_silent(session) {
                    self.discard(slot);
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
        self.wheel.next().map(|due| self.clock.instant(due))
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
            let is_heard = (self.after_end)(&session.connection).is_heard();
            session.is_active() && is_heard && !session.is_answered()
        })
    }

    /// Active sessions with their numbers, from number `first` on.
    pub fn iter_from(&self, first: usize) -> impl Iterator<Item = (usize, &Session<C>)> {
        // The slab's iterator can't start in the middle; a page of an admin's
        // listing may cost a walk.
        self.sessions
            .iter()
            .skip_while(move |(slot, _)| *slot < first)
            .filter(|(_, session)| session.is_active())
    }

    fn retire(&mut self, now: Moment, slot: u32, reason: EndReason) {
        let Some(session) = self.sessions.get_mut(slot as usize) else {
            return;
        };
        let client = self.client_permits.client(slot, &session.settings.listener);
        self.unanswered.remove(&mut self.links, slot, client);
        let key = session.key();
        self.note_end(slot, reason);
        self.take_no_more(slot, &key);
        let Some(session) = self.sessions.get_mut(slot as usize) else {
            return;
        };
        let passes = matches!(
            reason,
            EndReason::Moved | EndReason::Network | EndReason::Unanswered
        );
        let class = match (self.after_end)(&session.connection) {
            AfterEnd::Pass if passes => Some(Class::Passing),
            AfterEnd::Close | AfterEnd::Pass | AfterEnd::Forget => {
                self.discard(slot);
                return;
            }
            AfterEnd::CloseOnceRead => None,
            rests @ (AfterEnd::RestForReuse | AfterEnd::Rest | AfterEnd::RestUnheard) => {
                Some(if session.is_unanswered() && session.requests > 0 {
                    Class::Unanswered
                } else if session.is_answered() && !session.is_streamed_to(now) {
                    Class::answered(rests)
                } else {
                    Class::Owing
                })
            }
        };
        session.state = State::Retired(class);
        session.last_active = now;
        session.pass_until(if passes {
            now + MIN_REST
        } else {
            Moment::ORIGIN
        });
        session.held.rest(&self.capacity);
        self.client_permits.remove(slot);
        self.retired += 1;
        if let Some((lane, _)) = session.rest(now) {
            self.resting.push(&mut self.links, lane, slot);
            self.wheel.arm(slot, session.deadline());
        } else {
            self.wheel.disarm(slot);
            self.to_close.push(SessionId {
                slot,
                generation: session.generation,
            });
        }
    }

    /// Counts the end of a session, and logs it without waiting.
    fn note_end(&mut self, slot: u32, reason: EndReason) {
        let session = &self.sessions[slot as usize];
        let listener = session.settings.listener.counters(self.worker);
        listener.ended(reason).add(1);
        session.server.counters(self.worker).ended.add(1);
        tracing::trace!(client = %session.client.address(), ?reason, "session ended");
        if let Some(log) = &self.log {
            let unique_id = self.unique_id(slot as usize);
            let is_lost = log.try_send(session.ended(reason, unique_id)).is_err();
            self.unlogged += u64::from(is_lost);
        }
    }

    /// Counts and logs the end of all sessions, since the worker stops.
    pub fn note_stop(&mut self) {
        let slots: Vec<_> = self.iter_from(0).map(|(slot, _)| slot).collect();
        for slot in slots {
            self.note_end(u32::try_from(slot).expect(FEWER), EndReason::Stopped);
        }
    }

    /// Has the client's datagrams go to another of its sessions, if there is one.
    fn take_no_more(&mut self, slot: u32, key: &Key) {
        let other = self.rings.leave(slot);
        if self.by_key.replace(key, slot, other)
            && let Some(other) = other
        {
            self.set_state(other, State::Live);
        }
    }

    fn remove(&mut self, slot: u32) -> Option<Session<C>> {
        self.wheel.disarm(slot);
        let session = self.sessions.try_remove(slot as usize)?;
        if !self.inherited_ids.is_empty() {
            self.inherited_ids.remove(&slot);
        }
        if let Some(source) = (self.source_of)(&session.connection) {
            self.by_source.replace(&source_bits(source), slot, None);
        }
        if session.is_active() {
            let client = self.client_permits.client(slot, &session.settings.listener);
            self.unanswered.remove(&mut self.links, slot, client);
        } else {
            self.retired -= 1;
            if let Some((lane, _)) = session.rest(session.last_active) {
                self.resting.remove(&mut self.links, lane, slot);
            }
        }
        self.client_permits.remove(slot);
        Some(session)
    }

    /// Removes the session, and gives back what was its.
    fn discard(&mut self, slot: u32) {
        if let Some(session) = self.remove(slot) {
            session.held.give_back(&self.capacity);
            let after_end = (self.after_end)(&session.connection);
            if matches!(after_end, AfterEnd::Pass | AfterEnd::Forget) {
                self.removed.push(session.connection);
            }
        }
    }
}

impl<C> Drop for Table<C> {
    /// Other tables have the same capacity.
    fn drop(&mut self) {
        for session in self.sessions.drain() {
            session.held.give_back(&self.capacity);
        }
    }
}

/// The id of a session that is to have one; `None` if there is none to give.
fn unique_id_of(
    ids: Option<UniqueIds>,
    inherited: &HashMap<u32, UniqueId, ahash::RandomState>,
    id: SessionId,
) -> Option<UniqueId> {
    let inherited = inherited.get(&id.slot).copied();
    inherited.or_else(|| ids.map(|ids| ids.of(id)))
}

fn has_key<C>(sessions: &Slab<Session<C>>, slot: u32, key: &Key) -> bool {
    let session = sessions.get(slot as usize);
    session.is_some_and(|session| session.has_key(key))
}

fn source_at<C>(
    sessions: &Slab<Session<C>>,
    source_of: fn(&C) -> Option<IpAddr>,
    slot: u32,
) -> Option<IpAddr> {
    source_of(&sessions.get(slot as usize)?.connection)
}

fn source_bits(source: IpAddr) -> u128 {
    match source {
        IpAddr::V4(v4) => v4.to_bits().into(),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn find<C>(sessions: &Slab<Session<C>>, id: SessionId) -> Option<&Session<C>> {
    sessions
        .get(id.slot as usize)
        .filter(|session| session.generation == id.generation)
}
