//! What is counted of datagrams and of sessions, and told of those that end.

use std::sync::mpsc::SyncSender;

use super::Worker;
use crate::counters::WorkerCounters;
use crate::net::Received;
use crate::session::{Amount, EndReason, Session, Summary};

/// Datagrams that a socket has lost since it was last asked. The kernel's count
/// is of all that it ever lost, and goes round.
pub(super) fn newly_lost(known: &mut u32, latest: &Received) -> u64 {
    if latest.overflows == 0 {
        return 0;
    }
    let new = latest.overflows.wrapping_sub(*known);
    *known = latest.overflows;
    u64::from(new)
}

pub(super) fn amount_of(received: &Received) -> Amount {
    Amount {
        datagrams: received.datagrams() as u64,
        bytes: received.len as u64,
    }
}

/// Counts the end of a session and tells of it, without waiting for anybody.
pub(super) fn note_end<T>(
    counters: &WorkerCounters,
    log: Option<&SyncSender<Summary>>,
    session: &Session<T>,
    reason: EndReason,
) {
    let listener = &counters.listeners[session.listener];
    match reason {
        EndReason::Idle => listener.ended_idle.add(1),
        EndReason::Responses => listener.ended_responses.add(1),
        EndReason::Moved => listener.ended_moved.add(1),
        EndReason::Stopped => {}
    }
    counters.servers[session.server].ended.add(1);
    tracing::trace!(client = %session.key.client, ?reason, "session ended");
    let unlogged = log.is_some_and(|log| log.try_send(session.summary(reason)).is_err());
    counters.unlogged.add(u64::from(unlogged));
}

impl Worker {
    /// Tells of the sessions that are there at the end.
    pub(super) fn end_all(&self) {
        for (_, session) in self.table.iter_from(0) {
            note_end(
                &self.counters,
                self.log.as_ref(),
                session,
                EndReason::Stopped,
            );
        }
    }
}
