//! Sessions that ended: when they give their sockets to others, and which first.

use std::cmp::Reverse;
use std::time::{Duration, Instant};

use super::{Class, Lane, Table};
use crate::capacity::{Need, Permit};
use crate::listener::Listener;
use crate::server::{MAX_ANSWER_TIME, Server};
use crate::session::clock::Moment;
use crate::session::links::List;
use crate::session::{MAX_REST, MIN_REST, Session, SessionId, State};

/// Places for what was kept with sessions that are gone: memory is kept for so many, for
/// more only while they wait.
const REMOVED_KEPT: usize = 1024;

/// Resting sessions of a lane that are looked at for one that matches: there may be tens
/// of thousands that don't.
const LOOKS: usize = 64;

impl<C> Table<C> {
    /// The session of this listener and server that has rested for longest, if a new
    /// one may have its socket. [`take`](Self::take) it once what waits in it has been
    /// read, and if that was anything, have the table [`hear`](Self::hear) of it.
    #[must_use]
    pub fn reusable(
        &self,
        now: Instant,
        listener: &Listener,
        server: &Server,
        need: Need,
    ) -> Option<SessionId> {
        let lane = Lane::of(listener, server, Class::Reusable);
        let slot = self.resting.first(lane)?;
        let (session, id, rested) = self.resting(self.clock.moment(now), slot)?;
        Self::may_go(session, lane.class, rested, need).then_some(id)
    }

    /// Of the resting sessions that match, the one whose port may be used again best:
    /// those that have rested for [`MIN_REST`] come first, then those that owe nothing,
    /// then those that have rested for longer. Of each listener and server, a few dozen
    /// of each kind are asked whether they match. To be taken as in
    /// [`reusable`](Self::reusable).
    pub fn closable(
        &self,
        now: Instant,
        need: Need,
        matches: impl Fn(&Session<C>) -> bool,
    ) -> Option<SessionId> {
        let now = self.clock.moment(now);
        let of_lane = |(lane, list): (&Lane, &List)| {
            let ripe = self.links.iter(*list).map_while(|slot| {
                let (session, id, rested) = self.resting(now, slot)?;
                let may_go = Self::may_go(session, lane.class, rested, need);
                may_go.then_some((session, id, rested))
            });
            let mut ripe = ripe.take(LOOKS).filter(|(session, ..)| matches(session));
            let (_, id, rested) = ripe.next()?;
            let is_early = lane.class.is_early(rested);
            Some(((is_early, lane.class.owes(), Reverse(rested)), id))
        };
        let best = self.resting.lanes.iter().filter_map(of_lane);
        best.min_by_key(|(rank, _)| *rank).map(|(_, id)| id)
    }

    /// Takes the permit and what is kept with a session that has ended, for another one
    /// or to be dropped. `None` if it is gone, or active.
    pub fn take(&mut self, now: Instant, id: SessionId) -> Option<(Permit, C)> {
        let session = self.get(id).filter(|session| !session.is_active())?;
        let rest = session.rest(self.clock.moment(now));
        let is_early = rest.is_some_and(|(lane, rested)| lane.class.is_early(rested));
        self.reclaimed += u64::from(is_early);
        let session = self.remove(id.slot)?;
        let permit = session.held.into_permit(&self.capacity);
        Some((permit, session.connection))
    }

    /// Notes that a late reply has come for session `id`: if it rests, its rest
    /// starts again, and it gives its socket to no other session.
    pub fn hear(&mut self, now: Instant, id: SessionId) {
        if self.get(id).is_some() {
            self.renew(self.clock.moment(now), id.slot);
        }
    }

    /// Has no new session of this listener and server, by their ids, take over a socket of
    /// those that rest: they rest, and are closed.
    pub fn set_aside(&mut self, listener: u64, server: u64) {
        let lane = |class| Lane {
            listener,
            server,
            class,
        };
        while let Some(slot) = self.resting.first(lane(Class::Reusable)) {
            let links = &mut self.links;
            self.resting.remove(links, lane(Class::Reusable), slot);
            self.resting.push(links, lane(Class::Silent), slot);
            self.set_state(slot, State::Retired(Some(Class::Silent)));
        }
    }

    /// A session that is to be closed at once, if there is one: to be taken when what
    /// waits in it has been read.
    pub fn next_to_close(&mut self) -> Option<SessionId> {
        self.to_close.pop()
    }

    /// What was kept with a session that is gone, if that is
    /// [`AfterEnd::Pass`](crate::session::AfterEnd::Pass) and was not [taken](Self::take). To be
    /// called until there is none after whatever may have ended sessions.
    pub fn next_removed(&mut self) -> Option<C> {
        let removed = self.removed.pop();
        if removed.is_none() && self.removed.capacity() > REMOVED_KEPT {
            self.removed.shrink_to(REMOVED_KEPT);
        }
        removed
    }

    /// Sessions whose port was used again before it had rested for [`MIN_REST`]. All
    /// had been answered, and nothing more had come.
    #[must_use]
    pub fn reclaimed(&self) -> u64 {
        self.reclaimed
    }

    /// Ended sessions that the log had no time for.
    #[must_use]
    pub fn unlogged(&self) -> u64 {
        self.unlogged
    }

    /// How often a late reply restarted the rest of a port.
    #[must_use]
    pub fn renewed(&self) -> u64 {
        self.renewed
    }

    pub(super) fn renew(&mut self, now: Moment, slot: u32) {
        let session = self.sessions.get(slot as usize);
        let class = match session.is_some_and(Session::is_unanswered) {
            true => Class::Unanswered,
            false => Class::Owing,
        };
        self.renewed += u64::from(self.restart_rest(now, slot, class));
    }

    /// Restarts the rest of a session, if it rests.
    pub(super) fn restart_rest(&mut self, at: Moment, slot: u32, to: Class) -> bool {
        let Some(session) = self.sessions.get_mut(slot as usize) else {
            return false;
        };
        let Some((lane, _)) = session.rest(at).filter(|_| !session.is_passing()) else {
            return false;
        };
        session.state = State::Retired(Some(to));
        session.last_active = at;
        let links = &mut self.links;
        self.resting.remove(links, lane, slot);
        self.resting.push(links, Lane { class: to, ..lane }, slot);
        true
    }

    pub(super) fn resting(
        &self,
        now: Moment,
        slot: u32,
    ) -> Option<(&Session<C>, SessionId, Duration)> {
        let session = self.sessions.get(slot as usize)?;
        let (_, rested) = session.rest(now)?;
        let generation = session.generation;
        Some((session, SessionId { slot, generation }, rested))
    }

    /// Whether a port may be used again.
    pub(super) fn may_go(session: &Session<C>, class: Class, rested: Duration, need: Need) -> bool {
        if class == Class::Passing {
            return need > Need::None;
        }
        match need {
            Need::None => rested >= MAX_REST,
            Need::Supply => rested >= MIN_REST,
            // Another answer would have come by then.
            Need::Now => {
                let usual = session.server.usual_answer_time();
                let silent = || rested >= usual.unwrap_or(MAX_ANSWER_TIME);
                rested >= MIN_REST || !class.owes() && silent()
            }
        }
    }
}
