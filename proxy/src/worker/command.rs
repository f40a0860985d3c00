//! What a worker can be told, what it tells of its sessions, and how it stops.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{QUIET, Worker};
use crate::session::{Key, Session};
use crate::upstream::Steering;

/// Batches that each listener still takes when told to stop: more than its
/// buffer holds of small datagrams.
const LAST_BATCHES: usize = 1024;

/// What a worker can be told.
pub enum Command {
    /// Report up to `limit` sessions from number `first` on.
    Sessions {
        /// Number of the first session to report.
        first: usize,
        /// The most to report.
        limit: usize,
        /// Takes the report.
        reply: Box<dyn FnOnce(Vec<SessionReport>) + Send>,
    },
    /// Take sessions elsewhere from now on.
    Steer(Arc<Steering>),
    /// Take no more from clients; stop when the replies in flight are through.
    Drain,
    /// Stop now.
    Stop,
}

/// A session as an operator sees it.
#[derive(Clone, Debug)]
pub struct SessionReport {
    /// Number within the worker.
    pub number: usize,
    /// Whose it is.
    pub key: Key,
    /// Number of its listener.
    pub listener: usize,
    /// Number of its server.
    pub server: usize,
    /// Time since it began.
    pub age: Duration,
    /// Time since its latest datagram.
    pub idle: Duration,
    /// Client datagrams.
    pub requests: u64,
    /// Replies.
    pub replies: u64,
}

impl SessionReport {
    pub(super) fn of<T>(number: usize, session: &Session<T>, now: Instant) -> Self {
        Self {
            number,
            key: session.key,
            listener: session.listener,
            server: session.server,
            age: now.saturating_duration_since(session.started),
            idle: now.saturating_duration_since(session.last_active),
            requests: session.requests,
            replies: session.replies,
        }
    }
}

impl Worker {
    /// Does what it was told. True if that was to stop.
    pub(super) fn obey(&mut self, now: Instant) -> bool {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Sessions {
                    first,
                    limit,
                    reply,
                } => reply(self.report(first, limit, now)),
                Command::Steer(steering) => self.steer(steering),
                Command::Drain => {
                    for entrance in 0..self.entrances.len() {
                        self.take_waiting(entrance, now);
                    }
                    self.draining = true;
                    self.last_reply = now;
                }
                Command::Stop => return true,
            }
        }
        false
    }

    fn steer(&mut self, steering: Arc<Steering>) {
        for (balancers, plans) in self.balancers.iter_mut().zip(&steering.plans) {
            balancers.each(|v6, balancer| balancer.follow(Arc::clone(plans.get(v6))));
        }
        self.moves_any = steering.moves_any();
        self.steering = steering;
    }

    /// Takes what came before the order to stop; not for ever, since more comes
    /// meanwhile.
    fn take_waiting(&mut self, entrance: usize, now: Instant) {
        for _ in 0..LAST_BATCHES {
            if !self.take_from_clients(entrance, now) {
                break;
            }
        }
    }

    pub(super) fn is_drained(&self, now: Instant) -> bool {
        self.draining
            && now.saturating_duration_since(self.last_reply) >= QUIET
            && !self.table.awaits_replies()
    }

    fn report(&self, first: usize, limit: usize, now: Instant) -> Vec<SessionReport> {
        let sessions = self.table.iter_from(first).take(limit);
        sessions
            .map(|(number, session)| SessionReport::of(number, session, now))
            .collect()
    }
}
