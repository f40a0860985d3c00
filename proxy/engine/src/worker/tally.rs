//! What is counted of datagrams and of sessions, and told of those that end.

use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Instant;

use super::link::Link;
use super::{ListenerSettings, Worker};
use crate::counters::WorkerCounters;
use crate::session::{Amount, EndReason, Session, SessionId, Summary};
use crate::upstream::ServerName;
use ppv2_udp::Received;

/// How often replies are taken from one session's socket before it is closed: enough for
/// all that its buffer holds of small ones. More come meanwhile.
const LAST_TAKES: usize = 1024;

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

/// A session that has ended, and what its listener and its server go by.
#[derive(Debug)]
pub struct Ended {
    /// What it came to.
    pub summary: Summary,
    /// Its listener.
    pub listener: Arc<str>,
    /// Its server.
    pub server: Arc<ServerName>,
}

/// Where sessions' ends are counted and told of.
pub(super) struct Ends<'w> {
    counters: &'w WorkerCounters,
    listeners: &'w [Arc<ListenerSettings>],
    log: Option<&'w SyncSender<Ended>>,
}

impl<'w> Ends<'w> {
    pub(super) fn of(
        counters: &'w WorkerCounters,
        listeners: &'w [Arc<ListenerSettings>],
        log: Option<&'w SyncSender<Ended>>,
    ) -> Self {
        Self {
            counters,
            listeners,
            log,
        }
    }

    /// Counts the end of a session and tells of it, without waiting for anybody.
    pub(super) fn note(&self, session: &Session<Link>, reason: EndReason) {
        let listener = &self.counters.listeners[session.listener];
        match reason {
            EndReason::Idle => listener.ended_idle.add(1),
            EndReason::Responses => listener.ended_responses.add(1),
            EndReason::Moved => listener.ended_moved.add(1),
            EndReason::Network => listener.ended_network.add(1),
            EndReason::Unanswered => listener.ended_unanswered.add(1),
            EndReason::Denied => listener.ended_denied.add(1),
            EndReason::Stopped => listener.ended_stopped.add(1),
        }
        self.counters.servers[session.server].ended.add(1);
        tracing::trace!(client = %session.key.client, ?reason, "session ended");
        let Some(log) = self.log else {
            return;
        };
        let ended = Ended {
            summary: session.summary(reason),
            listener: Arc::clone(&self.listeners[session.listener].name),
            server: Arc::clone(&session.link.name),
        };
        let is_lost = log.try_send(ended).is_err();
        self.counters.own.unlogged.add(u64::from(is_lost));
    }
}

impl Worker {
    /// Ends session `id`, if it is active.
    pub(super) fn end(&mut self, now: Instant, id: SessionId, reason: EndReason) {
        let ends = Ends::of(&self.counters, &self.listeners, self.log.as_ref());
        self.table
            .end(now, id, reason, |session| ends.note(session, reason));
    }

    /// Takes the replies that wait for these sessions, which are about to end: what came
    /// in time still passes.
    pub(super) fn take_last_replies(&mut self, ids: &[SessionId], now: Instant) {
        for id in ids {
            let mut takes = 0..LAST_TAKES;
            while takes.next().is_some() && self.take_from_server(*id, now) > 0 {}
        }
        self.replies.send(&self.entrances, &self.counters);
    }

    /// Takes what waits in all sockets at the end, late replies too, and tells of the
    /// sessions that are there.
    pub(super) fn end_all(&mut self, now: Instant) {
        let ids: Vec<_> = self.table.iter_mut().map(|(id, _)| id).collect();
        self.take_last_replies(&ids, now);
        let ends = Ends::of(&self.counters, &self.listeners, self.log.as_ref());
        for (_, session) in self.table.iter_from(0) {
            ends.note(session, EndReason::Stopped);
        }
    }
}
