//! Sessions that begin in one process and go on in another.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Class, FEWER, Table};
use crate::address::Compact;
use crate::capacity::Permit;
use crate::handover::{Phase, Rest};
use crate::listener::ListenerSettings;
use crate::own_tlvs::UniqueId;
use crate::server::Server;
use crate::session::clock::Moment;
use crate::session::{Amount, Key, Session, SessionId, State, Via};

/// What a session was when another table let go of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Restored {
    /// How long ago it began.
    pub age: Duration,
    /// How long ago its latest datagram came, or its rest began.
    pub idle: Duration,
    /// What its client sent.
    pub requests: Amount,
    /// What its client got.
    pub replies: Amount,
    /// Where it is in its life.
    pub phase: Phase,
    /// It goes on from another socket.
    pub needs_socket: bool,
    /// The id that its headers carry.
    pub unique_id: Option<UniqueId>,
}

impl<C> Table<C> {
    /// All sessions, ended ones too.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (SessionId, &Session<C>)> {
        self.sessions.iter().map(|(slot, session)| {
            let id = SessionId {
                slot: u32::try_from(slot).expect(FEWER),
                generation: session.generation,
            };
            (id, session)
        })
    }

    /// Where a session is in its life; `None` if it is only there to be closed.
    pub(crate) fn phase(&self, now: Instant, session: &Session<C>) -> Option<Phase> {
        let now = self.clock.moment(now);
        let rest = match session.state {
            State::Live => return Some(Phase::Live),
            State::Detached => return Some(Phase::Detached),
            State::Retired(class) => match class? {
                Class::Reusable | Class::Silent => Rest::Silent,
                Class::Owing => Rest::Owing,
                Class::Unanswered => Rest::Unanswered,
                Class::Passing => Rest::Passing,
            },
        };
        let passes = session.passes_until().since(now);
        Some(Phase::Resting { rest, passes })
    }

    /// Goes on with a session of another table. Those of one key must come in the order of
    /// [`Phase::Detached`] and then [`Phase::Live`], and those that rest in the order in which
    /// their rests began.
    ///
    /// # Panics
    ///
    /// As [`open`](Self::open).
    #[expect(clippy::too_many_arguments, reason = "all that a session has")]
    pub(crate) fn restore(
        &mut self,
        now: Instant,
        key: Key,
        via: Option<Box<Via>>,
        settings: &Arc<ListenerSettings>,
        server: &Arc<Server>,
        permit: Permit,
        connection: C,
        restored: Restored,
    ) -> SessionId {
        let id = match restored.phase {
            Phase::Live | Phase::Detached => {
                self.open_via(now, key, via, settings, server, permit, connection)
            }
            Phase::Resting { rest, passes } => {
                let rest = (class_of(rest), passes, restored.idle);
                self.open_resting(now, key, via, settings, server, permit, connection, rest)
            }
        };
        if let Some(unique_id) = restored.unique_id {
            self.inherited_ids.insert(id.slot, unique_id);
        }
        let now = self.clock.moment(now);
        let Some(session) = self.sessions.get_mut(id.slot as usize) else {
            return id;
        };
        session.started = now - restored.age.max(restored.idle);
        session.last_active = now - restored.idle;
        session.requests = restored.requests.datagrams;
        session.request_bytes = restored.requests.bytes;
        session.replies = restored.replies.datagrams;
        session.reply_bytes = restored.replies.bytes;
        session.needs_socket = restored.needs_socket;
        if session.is_active() {
            let deadline = session.deadline();
            if !session.is_unanswered() {
                let client = self
                    .client_permits
                    .client(id.slot, &session.settings.listener);
                self.unanswered.remove(&mut self.links, id.slot, client);
                session.held.note_answer(&self.capacity, key.client.0.ip());
            }
            self.wheel.arm(id.slot, deadline);
        }
        id
    }

    /// Keeps a session that has ended, and rests since so long.
    #[expect(clippy::too_many_arguments, reason = "all that a session has")]
    fn open_resting(
        &mut self,
        now: Instant,
        key: Key,
        via: Option<Box<Via>>,
        settings: &Arc<ListenerSettings>,
        server: &Arc<Server>,
        permit: Permit,
        connection: C,
        (class, passes, idle): (Class, Duration, Duration),
    ) -> SessionId {
        self.generation = self.generation.checked_add(1).unwrap_or(1);
        let generation = self.generation;
        let now = self.clock.moment(now);
        // The client's part of the permit goes back: the session has ended.
        let (mut held, _) = permit
            .into_parts(&self.capacity)
            .expect("a permit of the table's capacity");
        held.rest(&self.capacity);
        let slot = self.sessions.insert(Session {
            client: Compact::of(key.client.0),
            local: Compact::of(key.local.0),
            settings: Arc::clone(settings),
            server: Arc::clone(server),
            started: now,
            last_active: now - idle,
            requests: 0,
            request_bytes: 0,
            replies: 0,
            reply_bytes: 0,
            via,
            connection,
            needs_socket: false,
            bucket_or_passes_until: 0,
            generation,
            state: State::Retired(Some(class)),
            held,
        });
        let slot = u32::try_from(slot).expect(FEWER);
        self.retired += 1;
        self.note_source(slot);
        if let Some(session) = self.sessions.get_mut(slot as usize) {
            session.pass_until(match passes.is_zero() {
                true => Moment::ORIGIN,
                false => now + passes,
            });
            let deadline = session.deadline();
            if let Some((lane, _)) = session.rest(now) {
                self.resting.push(&mut self.links, lane, slot);
            }
            self.wheel.arm(slot, deadline);
        }
        SessionId { slot, generation }
    }
}

/// Sockets of another process are taken over by no new session: they may have been made in
/// another way.
fn class_of(rest: Rest) -> Class {
    match rest {
        Rest::Silent => Class::Silent,
        Rest::Owing => Class::Owing,
        Rest::Unanswered => Class::Unanswered,
        Rest::Passing => Class::Passing,
    }
}
