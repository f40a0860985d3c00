//! What a worker can be told, and what it tells of its sessions.

use std::time::{Duration, Instant};

use crate::session::{Key, Session};

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
