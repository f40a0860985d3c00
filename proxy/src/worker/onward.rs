//! On to the server: a session's datagrams with their header, and the count of
//! what became of them.

use std::cell::Cell;
use std::io;
use std::time::{Duration, Instant};

use super::class_of;
use crate::address::ServerAddr;
use crate::counters::{DropReason, ListenerCounters, OwnCounters, ServerCounters};
use crate::net::{Batch, Cause, Outgoing, Part, SendFault, Socket, TrafficClass};

/// How long not to ask again for the MTU of a path that an unconnected socket sends to.
const MTU_PAUSE: Duration = Duration::from_secs(1);

/// Where datagrams are taken from and sent to, and where they are counted.
pub(super) struct Onward<'a> {
    pub(super) batch: &'a Batch,
    pub(super) socket: &'a Socket,
    /// The server, where the socket is not connected.
    pub(super) to: Option<ServerAddr>,
    pub(super) dscp: bool,
    /// When the path of a socket that is not connected was last asked for its
    /// MTU.
    pub(super) mtu_asked: &'a Cell<Option<Instant>>,
    pub(super) all: &'a OwnCounters,
    pub(super) listener: &'a ListenerCounters,
    pub(super) server: &'a ServerCounters,
}

impl Onward<'_> {
    /// Sends what `parts` hold, each datagram with `header` in front. Returns how
    /// many were sent.
    pub(super) fn send(&self, header: &[u8], parts: &[Part]) -> usize {
        let (socket, to) = (self.socket, self.to.map(|server| server.0));
        let outgoing = |slot| Outgoing {
            to,
            from: None,
            class: self.class(slot),
            header,
        };
        let sent = socket.send_parts(self.batch, parts, outgoing, |_, fault| match fault {
            SendFault::Earlier(_) => self.server.refusals.add(1),
            SendFault::Lost {
                error,
                datagrams,
                len,
            } => {
                let reason = why_unsent(&error);
                self.listener.dropped(reason).add(datagrams as u64);
                if reason == DropReason::Oversize {
                    self.note_oversize(len, header.len());
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

    fn note_oversize(&self, len: usize, header: usize) {
        let to = self.to.map(|server| server.0);
        if to.is_some() {
            // It takes a socket of its own, which a client could have the worker
            // make for each datagram.
            let recent = |asked: Instant| asked.elapsed() < MTU_PAUSE;
            if self.mtu_asked.get().is_some_and(recent) {
                return;
            }
            self.mtu_asked.set(Some(Instant::now()));
        }
        let fits = self.socket.unfragmented_payload(to).unwrap_or(0);
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
        Cause::NoDescriptors | Cause::NoPorts | Cause::NotPermitted | Cause::Other => {
            DropReason::SendFailed
        }
    }
}
