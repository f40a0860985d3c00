//! Replies on their way out: gathered from many sessions' sockets into one
//! batch, so that they leave in few calls.

use std::io;
use std::ops::Range;

use slab::Slab;

use super::Entrance;
use super::link::{Exit, Link, ServerSocket};
use super::onward::note_report;
use super::tally::newly_lost;
use crate::counters::{DropReason, ServerCounters, WorkerCounters};
use crate::session::Session;
use ppv2_udp::{BATCH, Batch, Cause, Outgoing, SendFault};

/// Errors of earlier datagrams to read past before looking again later. ICMP
/// can be forged, so reading them must not become all that a worker does.
const ERRORS_AT_ONCE: usize = 4;

/// Late replies and errors to read at most from a socket before it is closed or taken
/// over.
const LATE: usize = 64;

/// A reply that may go to its client.
struct Passed {
    slot: usize,
    /// Number of the entrance that it leaves by.
    via: usize,
    outgoing: Outgoing<'static>,
}

/// The batch of replies, filled from its front.
pub(super) struct Replies {
    batch: Batch,
    filled: usize,
    /// In the order of their slots.
    passed: Vec<Passed>,
    /// Slots of the replies that leave in one call.
    run: Vec<usize>,
}

impl Replies {
    pub(super) fn new() -> Self {
        Self {
            batch: Batch::default(),
            filled: 0,
            passed: Vec::with_capacity(BATCH),
            run: Vec::with_capacity(BATCH),
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.filled == BATCH
    }

    pub(super) fn batch(&self) -> &Batch {
        &self.batch
    }

    /// Receives some of the replies that wait in a socket, past errors that speak
    /// of datagrams sent earlier, which are counted, as is what the kernel lost.
    /// Returns the slots that they are in, none if there is nothing. The batch
    /// must not be full.
    pub(super) fn receive(
        &mut self,
        from: &mut ServerSocket,
        server: &ServerCounters,
    ) -> Range<usize> {
        let end = BATCH.min(self.filled + from.at_once.get());
        for _ in 0..ERRORS_AT_ONCE {
            match from.socket.receive(&mut self.batch, self.filled, end) {
                Ok(received) => {
                    let slots = self.filled..self.filled + received;
                    self.filled = slots.end;
                    from.at_once.learn(received);
                    if let Some(latest) = self.batch.received(slots.end - 1) {
                        let lost = newly_lost(&mut from.overflows, &latest);
                        server.overflows.add(lost);
                    }
                    return slots;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(report) => note_report(server, &report),
            }
        }
        self.filled..self.filled
    }

    /// Reads past what waits in the socket of a session that has ended, which are late
    /// replies, and errors. True if there is no reply. The batch must not be full.
    pub(super) fn are_none_late(
        &mut self,
        session: &Session<Link>,
        counters: &WorkerCounters,
    ) -> bool {
        let Exit::Own(own) = &session.link.exit else {
            return true;
        };
        let server = &counters.servers[session.server];
        let late = counters.listeners[session.listener].dropped(DropReason::ReplyLate);
        let mut are_none = true;
        for _ in 0..LATE {
            match own
                .socket
                .receive(&mut self.batch, self.filled, self.filled + 1)
            {
                Ok(_) => {
                    let reply = self.batch.received(self.filled);
                    let (datagrams, len) = reply.map_or((0, 0), |r| (r.datagrams(), r.len));
                    server.replies.add(datagrams as u64);
                    server.reply_bytes.add(len as u64);
                    late.add(datagrams as u64);
                    are_none = false;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return are_none,
                Err(report) => note_report(server, &report),
            }
        }
        false
    }

    /// Lets the reply in `slot` go out by entrance number `via`. Replies that
    /// nobody passes on are overwritten after the next [`send`](Self::send).
    pub(super) fn pass(&mut self, slot: usize, via: usize, outgoing: Outgoing<'static>) {
        self.passed.push(Passed {
            slot,
            via,
            outgoing,
        });
    }

    /// Sends what may go, and empties the batch.
    pub(super) fn send(&mut self, entrances: &Slab<Entrance>, counters: &WorkerCounters) {
        let batch = &self.batch;
        for same in self.passed.chunk_by(|a, b| a.via == b.via) {
            let entrance = &entrances[same[0].via];
            let counters = &counters.listeners[entrance.listener];
            self.run.clear();
            self.run.extend(same.iter().map(|passed| passed.slot));
            let onward = |slot| outgoing_of(same, slot);
            let sent = entrance.socket.send(batch, &self.run, onward, |_, fault| {
                // A socket that is not connected hears nothing of earlier
                // datagrams; whatever it was, these were sent then.
                if let SendFault::Lost {
                    error, datagrams, ..
                } = fault
                {
                    counters.dropped(why_unsent(&error)).add(datagrams as u64);
                }
            });
            counters.replied.add(sent.datagrams as u64);
            counters.replied_bytes.add(sent.bytes as u64);
        }
        self.passed.clear();
        self.filled = 0;
    }
}

fn outgoing_of(passed: &[Passed], slot: usize) -> Outgoing<'static> {
    let found = passed.binary_search_by_key(&slot, |passed| passed.slot);
    let index = found.expect("only replies that were passed are sent");
    passed[index].outgoing
}

fn why_unsent(error: &io::Error) -> DropReason {
    match Cause::of(error) {
        Cause::Oversize => DropReason::ReplyOversize,
        Cause::WouldBlock | Cause::NoMemory => DropReason::ReplyBufferFull,
        Cause::Unreachable
        | Cause::NoDescriptors
        | Cause::NoPorts
        | Cause::NotPermitted
        | Cause::Other => DropReason::ReplyFailed,
    }
}
