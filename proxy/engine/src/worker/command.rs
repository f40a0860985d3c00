//! What a worker can be told, what it tells of its sessions, and how it stops.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::link::Link;
use super::network::WrongInterfaces;
use super::{Change, QUIET, Worker};
use crate::session::{Key, Session};
use crate::upstream::{ServerName, Steering};

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
    /// Go by another setup from now on.
    Follow(Box<Change>),
    /// Have sessions send from the address that this host's routes now say, and take no
    /// replies by wrong interfaces.
    FollowNetwork(Arc<WrongInterfaces>),
    /// End the sessions at those of these addresses that no setup has listeners
    /// for, and take no more there.
    Close(Vec<SocketAddr>),
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
    /// What its listener goes by.
    pub listener: Arc<str>,
    /// What its server goes by.
    pub server: Arc<ServerName>,
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
    fn of(number: usize, session: &Session<Link>, listener: &Arc<str>, now: Instant) -> Self {
        Self {
            number,
            key: session.key,
            listener: Arc::clone(listener),
            server: Arc::clone(&session.link.name),
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
                Command::Follow(change) => self.follow(*change, now),
                Command::FollowNetwork(wrong) => self.follow_network(wrong),
                Command::Close(addresses) => self.close(&addresses, now),
                Command::Drain => {
                    let entrances: Vec<_> = self.entrances.iter().map(|(key, _)| key).collect();
                    for entrance in entrances {
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

    /// Takes what came before the order to stop; not for ever, since more comes
    /// meanwhile.
    pub(super) fn take_waiting(&mut self, entrance: usize, now: Instant) {
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
            .map(|(number, session)| {
                let listener = &self.listeners[session.listener].name;
                SessionReport::of(number, session, listener, now)
            })
            .collect()
    }
}
