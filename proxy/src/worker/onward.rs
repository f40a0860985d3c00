//! On to the server: a session's datagrams with their header, and the count of
//! what became of them.

use std::io;

use super::class_of;
use super::link::Link;
use crate::counters::{DropReason, ListenerCounters, ServerCounters, WorkerCounters};
use crate::net::{Batch, Cause, Outgoing, SendFault, Socket, TrafficClass};

/// Where datagrams are sent from, and where they are counted.
pub(super) struct Onward<'a> {
    pub(super) batch: &'a Batch,
    pub(super) dscp: bool,
    pub(super) all: &'a WorkerCounters,
    pub(super) listener: &'a ListenerCounters,
    pub(super) server: &'a ServerCounters,
}

impl Onward<'_> {
    /// Sends what `slots` hold to the server of `link`, each datagram with the
    /// session's header. Returns how many were sent.
    pub(super) fn send(&self, link: &Link, slots: &[usize]) -> usize {
        let header = link.prefix.bytes();
        let outgoing = |slot| Outgoing {
            to: None,
            from: None,
            class: self.class(slot),
            header,
        };
        let sent = link
            .socket
            .send(self.batch, slots, outgoing, |_, fault| match fault {
                SendFault::Earlier(_) => self.server.refusals.add(1),
                SendFault::Lost {
                    error,
                    datagrams,
                    len,
                } => {
                    let reason = why_unsent(&error);
                    self.listener.dropped(reason).add(datagrams as u64);
                    if reason == DropReason::Oversize {
                        self.note_oversize(&link.socket, len, header.len());
                    }
                }
            });
        self.server.sent.add(sent.datagrams as u64);
        self.server.sent_bytes.add(sent.bytes as u64);
        sent.datagrams
    }

    fn class(&self, slot: usize) -> TrafficClass {
        let received = self.batch.received(slot);
        received.map_or(TrafficClass::default(), |r| class_of(self.dscp, r.class))
    }

    fn note_oversize(&self, socket: &Socket, len: usize, header: usize) {
        let fits = socket.unfragmented_payload().unwrap_or(0);
        self.all.oversize_len.set(len as u64);
        self.all
            .oversize_fits
            .set(fits.saturating_sub(header) as u64);
    }
}

fn why_unsent(error: &io::Error) -> DropReason {
    match Cause::of(error) {
        Cause::Oversize => DropReason::Oversize,
        Cause::WouldBlock | Cause::NoMemory => DropReason::SendBufferFull,
        Cause::Unreachable => DropReason::Unreachable,
        Cause::NoDescriptors | Cause::NoPorts | Cause::Other => DropReason::SendFailed,
    }
}
