//! On to the server: a session's datagrams with their header, and the count of
//! what became of them.

use std::cell::Cell;
use std::io;
use std::time::{Duration, Instant};

use super::class_of;
use crate::address::ServerAddr;
use crate::counters::{DropReason, ListenerCounters, Oversize, OwnCounters, ServerCounters};
use ppv2_udp::{Batch, Cause, Outgoing, Part, SendFault, Socket, TrafficClass};

/// How long no other datagram is noted as oversize, which takes a lock.
const OVERSIZE_PAUSE: Duration = Duration::from_secs(1);

/// Where datagrams are taken from and sent to, and where they are counted.
pub(super) struct Onward<'a> {
    pub(super) batch: &'a Batch,
    pub(super) socket: &'a Socket,
    /// The server.
    pub(super) to: ServerAddr,
    pub(super) is_connected: bool,
    pub(super) dscp: bool,
    /// When a datagram was last noted as oversize.
    pub(super) oversize_noted: &'a Cell<Option<Instant>>,
    pub(super) all: &'a OwnCounters,
    pub(super) listener: &'a ListenerCounters,
    pub(super) server: &'a ServerCounters,
    /// Something could not be sent because there is no route, or the source address is gone.
    pub(super) lacks_route: Cell<bool>,
}

impl Onward<'_> {
    /// Sends what `parts` hold, each datagram with `header` in front. Returns how
    /// many were sent.
    pub(super) fn send(&self, header: &[u8], parts: &[Part]) -> usize {
        let to = (!self.is_connected).then_some(self.to.0);
        let outgoing = |slot| Outgoing {
            to,
            from: None,
            class: self.class(slot),
            header,
        };
        let socket = self.socket;
        let sent = socket.send_parts(self.batch, parts, outgoing, |_, fault| match fault {
            SendFault::Earlier(report) => note_report(self.server, &report),
            SendFault::Lost {
                error,
                datagrams,
                len,
            } => {
                let reason = why_unsent(&error);
                self.listener.dropped(reason).add(datagrams as u64);
                if reason == DropReason::Unreachable {
                    self.lacks_route.set(true);
                }
                if reason == DropReason::Oversize {
                    self.note_oversize(len, header.len());
                }
            }
        });
        self.server.sent.add(sent.datagrams as u64);
        self.server.sent_bytes.add(sent.bytes as u64);
        sent.datagrams
    }

    /// As [`send`](Self::send), but drops datagrams that begin as a header does. A
    /// server that looks for a header where it knows of none would believe theirs.
    pub(super) fn send_unforged(&self, header: &[u8], parts: &[Part]) -> usize {
        let is_forged = |one: &Part| begins_as_header(self.batch.first_of(*one));
        let singles = |part: &Part| {
            let mut rest = *part;
            (0..part.datagrams()).map(move |_| rest.take(1))
        };
        if !parts.iter().flat_map(singles).any(|one| is_forged(&one)) {
            return self.send(header, parts);
        }
        let mut sent = 0;
        for one in parts.iter().flat_map(singles) {
            if is_forged(&one) {
                self.listener.dropped(DropReason::ForgedHeader).add(1);
            } else {
                sent += self.send(header, &[one]);
            }
        }
        sent
    }

    fn class(&self, slot: usize) -> TrafficClass {
        let received = self.batch.received(slot);
        received.map_or(TrafficClass::default(), |r| class_of(self.dscp, r.class))
    }

    fn note_oversize(&self, len: usize, header: usize) {
        let recent = |noted: Instant| noted.elapsed() < OVERSIZE_PAUSE;
        if self.oversize_noted.get().is_some_and(recent) {
            return;
        }
        self.oversize_noted.set(Some(Instant::now()));
        let noted = Oversize {
            server: self.to.0,
            len,
            header,
        };
        // If it is being read, the next one is as good.
        if let Ok(mut latest) = self.all.oversize.try_lock() {
            *latest = Some(noted);
        }
    }
}

/// Counts what the network says of a datagram sent earlier, which can be forged.
pub(super) fn note_report(server: &ServerCounters, report: &io::Error) {
    if Cause::of(report) == Cause::Oversize {
        server.too_long.add(1);
    } else {
        server.refusals.add(1);
    }
}

/// Whether it begins as a header of PROXY v2 does, or of v1, which servers that look for
/// one may read as well: `PROXY TCP4 …`.
fn begins_as_header(datagram: &[u8]) -> bool {
    let protocols: [&[u8]; 3] = [b"TCP", b"UDP", b"UNKNOWN"];
    let is_v1 = |rest: &[u8]| protocols.iter().any(|protocol| rest.starts_with(protocol));
    datagram.starts_with(&ppv2::SIGNATURE) || datagram.strip_prefix(b"PROXY ").is_some_and(is_v1)
}

fn why_unsent(error: &io::Error) -> DropReason {
    match Cause::of(error) {
        Cause::Oversize => DropReason::Oversize,
        Cause::WouldBlock | Cause::NoMemory => DropReason::SendBufferFull,
        Cause::Unreachable => DropReason::Unreachable,
        Cause::NoDescriptors | Cause::NoPorts | Cause::NotPermitted | Cause::Other => {
            DropReason::SendFailed
        }
    }
}
