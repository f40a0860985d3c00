//! From other proxies to servers: the header in front of each datagram says its client. The
//! way back is that of the client's latest datagram.

use std::sync::Arc;
use std::time::Instant;

use ppv2::{Tlvs, spp};
use ppv2_udp::Part;

use super::Worker;
use super::client_to_server::refused;
use super::server_to_client::Exit;
use crate::accept::{Accept, Direct};
use crate::counters::DropReason;
use crate::session::{MIN_REST, ReplyHeader, SessionId};

/// Bytes of the longest header that stands in front of a reply: one with a tag, or one of
/// Simple Proxy Protocol.
pub(super) const MAX_REPLY_HEADER: usize = ppv2::MAX_TAGGED_HEADER_LEN;

impl Worker {
    /// Takes what other proxies, or clients, have sent to their servers, where headers are
    /// accepted.
    pub(super) fn take_with_headers(&mut self, number: usize, slot: usize, now: Instant) {
        let settings = &self.listener_sockets[number].settings;
        let (Some(received), Some(accept)) = (self.incoming.received(slot), &settings.accept)
        else {
            return;
        };
        let (accept, listener) = (Arc::clone(accept), settings.listener.id());
        let mut rest = self.incoming.whole(slot);
        if let Some(reason) = refused(&received) {
            return self.drop_from_client(number, rest, reason);
        }
        if !accept.includes(received.peer.ip()) {
            return match accept.direct {
                Direct::Accept => self.take_from_client(number, slot, now),
                Direct::Drop => self.drop_from_client(number, rest, DropReason::Untrusted),
            };
        }
        let ends = (received.peer, received.local);
        while rest.datagrams() > 0 {
            let first = rest.take(1);
            let datagram = self.incoming.first_of(first);
            let read = self.senders.read(&accept, listener, ends, datagram, now);
            let arrival = match read {
                Ok(arrival) => arrival,
                Err(reason) => {
                    self.drop_from_client(number, first, reason);
                    continue;
                }
            };
            if accept.passes_tlvs {
                let tlvs = Tlvs::parse(&datagram[arrival.tlvs.clone()]);
                self.run.pass_tlvs(tlvs.unwrap_or_default());
            }
            let counters = self.listener_sockets[number]
                .settings
                .listener
                .counters(self.number);
            counters.unremembered.add(arrival.is_unremembered.into());
            if arrival.is_announcement {
                self.drop_from_client(number, first, DropReason::HeaderAlone);
                continue;
            }
            if arrival.header == 0 {
                counters.without_header.add(1);
            }
            // The next ones of a burst mostly have the same header.
            let mut all = first;
            if arrival.header > 0 {
                let header = &datagram[..arrival.header];
                while rest.datagrams() > 0 && self.is_same_arrival(&accept, header, rest) {
                    all = all.with(rest.take(1));
                }
            }
            while all.datagrams() > 0 {
                let part = self.next_part(number, &arrival.key, &mut all);
                let mut amount = self.amount_of(part);
                amount.bytes -= amount.datagrams * arrival.header as u64;
                self.count_received(number, amount);
                let Some(id) = self.session_of(number, arrival.key, amount, now) else {
                    continue;
                };
                self.note_sender(id, arrival.reply_header, now);
                for one in part.singles() {
                    let payload = one.behind(arrival.header);
                    if self
                        .incoming
                        .first_of(payload)
                        .starts_with(&ppv2::SIGNATURE)
                    {
                        let listener = &self.listener_sockets[number].settings.listener;
                        listener.counters(self.number).nested_headers.add(1);
                    }
                    self.queue(id, payload, now);
                }
            }
        }
        self.run.pass_tlvs(Tlvs::default());
    }

    /// Whether the first datagram of `rest` has this header, and would be forwarded as one
    /// that has.
    fn is_same_arrival(&self, accept: &Accept, header: &[u8], rest: Part) -> bool {
        let datagram = self.incoming.first_of(rest);
        let may_be_announcement = accept.remember.is_some() && datagram.len() == header.len();
        !may_be_announcement && datagram.starts_with(header)
    }

    /// Notes that the client's latest datagrams have come through the sender of the
    /// session.
    fn note_sender(&mut self, id: SessionId, reply_header: ReplyHeader, now: Instant) {
        let heard = self.table.clock().moment(now);
        let session = self.table.get_mut(id);
        if let Some(via) = session.and_then(|session| session.via.as_mut()) {
            (via.heard, via.changes) = (heard, via.sender.changes());
            via.reply_header = reply_header;
        }
    }

    /// Has replies of session `id`, which would go to its client by `exit`, go to the sender
    /// that the client's datagrams came through, if there is one.
    ///
    /// Another client may have got the sender's port since. Then replies pass for as long
    /// after the client's latest datagram as our SDKs send to such a client, or if they name
    /// it.
    pub(super) fn through_sender(
        &mut self,
        id: SessionId,
        exit: Exit,
        now: Instant,
    ) -> Result<Exit, DropReason> {
        let Some(session) = self.table.get(id) else {
            return Ok(exit);
        };
        let Some(via) = &session.via else {
            return Ok(exit);
        };
        let names_client = via.reply_header != ReplyHeader::None;
        let since_heard = || self.table.clock().moment(now).since(via.heard);
        if !names_client && via.changes != via.sender.changes() && since_heard() >= MIN_REST {
            return Err(DropReason::ReplyReassigned);
        }
        let mut buffer = [0; MAX_REPLY_HEADER];
        let (client, destination) = (exit.to, exit.from);
        let header = match via.reply_header {
            ReplyHeader::None => None,
            ReplyHeader::Tagged(tag) => {
                ppv2::encode_udp_tagged(client, destination, tag, &mut buffer).ok()
            }
            ReplyHeader::Spp => spp::encode(client, destination, &mut buffer).ok(),
        };
        Ok(Exit {
            to: via.sender.address,
            from: via.sender.local,
            header: header.map_or((0, 0), |header| self.replies.keep_header(header)),
            ..exit
        })
    }
}
