//! Sessions that ended and rest: whose turn it is to give up what it owns.

use std::collections::VecDeque;
use std::time::Instant;

use super::SessionId;

/// A session that rests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Resting {
    pub(super) id: SessionId,
    pub(super) since: Instant,
}

/// Resting sessions, a queue for each server, in the order of their ends. The
/// owner tells which are still there.
#[derive(Debug, Default)]
pub(super) struct Rest {
    queues: Vec<VecDeque<Resting>>,
}

impl Rest {
    pub(super) fn push(&mut self, server: usize, resting: Resting) {
        if self.queues.len() <= server {
            self.queues.resize_with(server + 1, VecDeque::new);
        }
        self.queues[server].push_back(resting);
    }

    /// The session of `server` that has rested for longest, past those that are
    /// gone.
    pub(super) fn front(
        &mut self,
        server: usize,
        is_there: impl Fn(SessionId) -> bool,
    ) -> Option<Resting> {
        let queue = self.queues.get_mut(server)?;
        while queue.front().is_some_and(|first| !is_there(first.id)) {
            queue.pop_front();
        }
        queue.front().copied()
    }

    /// The session that has rested for longest, past those that are gone.
    pub(super) fn oldest(&mut self, is_there: impl Fn(SessionId) -> bool) -> Option<Resting> {
        (0..self.queues.len())
            .filter_map(|server| self.front(server, &is_there))
            .min_by_key(|resting| resting.since)
    }
}
