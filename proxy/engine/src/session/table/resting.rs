//! Sessions that ended and rest: when they give their sockets to others, and which first.

use std::cmp::Reverse;
use std::time::{Duration, Instant};

use super::Table;
use crate::session::rest::{Class, Lane};
use crate::session::{Afterlife, MAX_REST, MIN_REST, Need, Seat, Session, SessionId, State};

/// Sessions of a lane that are looked at for one that matches: there may be tens of
/// thousands that don't.
const LOOKS: usize = 64;

impl<T> Table<T> {
    /// The session of this listener and server that has rested for longest, if a new
    /// one may have its socket. [`take`](Self::take) it once what waits in it has been
    /// read, and if that was anything, have the table [`hear`](Self::hear) of it.
    #[must_use]
    pub fn reusable(
        &self,
        now: Instant,
        listener: usize,
        server: usize,
        need: Need,
    ) -> Option<SessionId> {
        let lane = Lane {
            listener,
            server,
            class: Class::Reusable,
        };
        let slot = self.rest.first(lane)?;
        let (session, id, rested) = self.resting(now, slot)?;
        self.may_go(session, lane.class, rested, need).then_some(id)
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
        matches: impl Fn(&Session<T>) -> bool,
    ) -> Option<SessionId> {
        let of_lane = |(lane, first): (Lane, u32)| {
            let ripe = self.rest.from(first).map_while(|slot| {
                let (session, id, rested) = self.resting(now, slot)?;
                let may_go = self.may_go(session, lane.class, rested, need);
                may_go.then_some((session, id, rested))
            });
            let mut ripe = ripe.take(LOOKS).filter(|(session, ..)| matches(session));
            let (_, id, rested) = ripe.next()?;
            let is_early = rested < MIN_REST;
            Some(((is_early, lane.class.owes(), Reverse(rested)), id))
        };
        let best = self.rest.lanes().filter_map(of_lane);
        best.min_by_key(|(rank, _)| *rank).map(|(_, id)| id)
    }

    /// Takes the seat and what is kept with a session that has ended, for another one
    /// or to be dropped. `None` if it is gone, or active.
    pub fn take(&mut self, now: Instant, id: SessionId) -> Option<(Seat, T)> {
        let session = self.get(id).filter(|session| !session.is_active())?;
        let rest = session.rest(now);
        let is_early = rest.is_some_and(|(_, rested)| rested < MIN_REST);
        self.reclaimed += u64::from(is_early);
        let session = self.remove(id.slot)?;
        Some((session.seat, session.link))
    }

    /// Notes that a late reply has come for session `id`: if it rests, its rest begins
    /// anew, and it gives its socket to no other session.
    pub fn hear(&mut self, now: Instant, id: SessionId) {
        if self.get(id).is_some() {
            self.renew(now, id.slot);
        }
    }

    /// Has no new session of this listener and server take over a socket of those that
    /// rest: they rest, and are let go.
    pub fn set_aside(&mut self, listener: usize, server: usize) {
        let lane = |class| Lane {
            listener,
            server,
            class,
        };
        while let Some(slot) = self.rest.first(lane(Class::Reusable)) {
            self.rest.remove(lane(Class::Reusable), slot);
            self.rest.push(lane(Class::Silent), slot);
            if let State::Retired { class, .. } = &mut self.sessions[slot as usize].state {
                *class = Some(Class::Silent);
            }
        }
    }

    /// A session that is to be let go at once, if there is one: to be taken when what
    /// waits in it has been read.
    pub fn next_leaving(&mut self) -> Option<SessionId> {
        self.leaving.pop()
    }

    /// Sessions whose port was used again before it had rested for [`MIN_REST`]. All
    /// had been answered, and nothing more had come.
    #[must_use]
    pub fn reclaimed(&self) -> u64 {
        self.reclaimed
    }

    /// How often the rest of a port began anew because a late reply came.
    #[must_use]
    pub fn renewed(&self) -> u64 {
        self.renewed
    }

    pub(super) fn renew(&mut self, now: Instant, slot: u32) {
        let session = self.sessions.get(slot as usize);
        let class = match session.is_some_and(Session::is_unanswered) {
            true => Class::Unanswered,
            false => Class::Owing,
        };
        self.renewed += u64::from(self.rest_anew(now, slot, class));
    }

    /// Begins the rest of a session anew, if it rests.
    pub(super) fn rest_anew(&mut self, at: Instant, slot: u32, to: Class) -> bool {
        let Some(session) = self.sessions.get_mut(slot as usize) else {
            return false;
        };
        let Some((lane, _)) = session.rest(at) else {
            return false;
        };
        if let State::Retired { since, class, .. } = &mut session.state {
            (*since, *class) = (at, Some(to));
        }
        self.rest.remove(lane, slot);
        self.rest.push(Lane { class: to, ..lane }, slot);
        true
    }

    fn resting(&self, now: Instant, slot: u32) -> Option<(&Session<T>, SessionId, Duration)> {
        let session = self.sessions.get(slot as usize)?;
        let (_, rested) = session.rest(now)?;
        let generation = session.generation;
        Some((session, SessionId { slot, generation }, rested))
    }

    /// Whether a port may be used again.
    fn may_go(&self, session: &Session<T>, class: Class, rested: Duration, need: Need) -> bool {
        match need {
            Need::None => rested >= MAX_REST,
            Need::Supply => rested >= MIN_REST,
            // Another answer would have come by then.
            Need::Now => {
                let silent = || rested >= self.unanswered.time_for_answer(session);
                rested >= MIN_REST || !class.owes() && silent()
            }
        }
    }
}

/// Among which a session rests that was answered.
pub(super) fn silent_class(afterlife: Afterlife) -> Class {
    match afterlife {
        Afterlife::Rest => Class::Reusable,
        Afterlife::RestUnused | Afterlife::RestUnheard | Afterlife::None | Afterlife::Unheard => {
            Class::Silent
        }
    }
}
