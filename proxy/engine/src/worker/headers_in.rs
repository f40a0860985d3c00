//! From other proxies to servers: the header in front of each datagram names its client.
//! Replies go back through the proxy, by the address and port that it sends from.

use std::time::Instant;

use ppv2::{Tlvs, spp};
use ppv2_udp::{Part, Received};

use super::Worker;
use super::client_to_server::refused;
use super::server_to_client::Exit;
use crate::accept::{Arrival, Direct};
use crate::counters::DropReason;
use crate::session::{Key, MIN_REST, ReplyHeader, SessionId};

/// Bytes of the longest header that stands in front of a reply: one with a tag, or one of
/// Simple Proxy Protocol.
pub(super) const MAX_REPLY_HEADER: usize = ppv2::MAX_TAGGED_HEADER_LEN;

impl Worker {
    /// Takes what other proxies, or clients, have sent to their servers, where headers are
    /// accepted.
    pub(super) fn take_with_headers(&mut self, number: usize, slot: usize, now: Instant) {
        let Some(received) = self.incoming.received(slot) else {
            return;
        };
        let mut rest = self.incoming.whole(slot);
        // It is looked up again and again, since a count of its holders is shared.
        let Some(accept) = &self.listener_sockets[number].settings.accept else {
            return;
        };
        let refused = refused(&received);
        if !accept.includes(received.peer.ip()) {
            let (key, direct) = (Key::of(&received), accept.direct);
            return match refused {
                Some(reason) => self.drop_from_client(number, rest, reason, Some(&key)),
                None if direct == Direct::Accept => self.take_from_client(number, slot, now),
                None => self.drop_from_client(number, rest, DropReason::Untrusted, Some(&key)),
            };
        }
        if let Some(reason) = refused {
            return self.drop_from_client(number, rest, reason, None);
        }
        while rest.datagrams() > 0 {
            let first = rest.take(1);
            match self.read_header(number, &received, first, now) {
                Ok(arrival) => {
                    let all = self.same_header(&arrival, first, &mut rest);
                    self.forward_arrival(number, &arrival, all, now);
                }
                Err(reason) => {
                    let listener = &self.listener_sockets[number].settings.listener;
                    let counters = listener.counters(self.number);
                    counters.note_sender(reason, received.peer.ip());
                    self.drop_from_client(number, first, reason, None);
                }
            }
        }
        self.run.pass_tlvs(Tlvs::default());
    }

    /// What the header of a datagram says, or its sender has said before.
    fn read_header(
        &mut self,
        number: usize,
        received: &Received,
        one: Part,
        now: Instant,
    ) -> Result<Arrival, DropReason> {
        let settings = &self.listener_sockets[number].settings;
        let accept = settings.accept.as_ref().ok_or(DropReason::NoHeader)?;
        let datagram = self.incoming.first_of(one);
        let ends = (received.peer, received.local);
        let listener = &settings.listener;
        let arrival = self
            .senders
            .read(accept, listener.id(), ends, datagram, now)?;
        let counters = listener.counters(self.number);
        if arrival.is_unremembered {
            counters.unremembered.add(1);
        }
        if arrival.is_announcement {
            return Err(DropReason::HeaderAlone);
        }
        if arrival.header == 0 {
            counters.without_header.add(1);
        }
        if accept.passes_tlvs {
            let tlvs = Tlvs::parse(&datagram[arrival.tlvs.clone()]);
            self.run.pass_tlvs(tlvs.unwrap_or_default());
        }
        Ok(arrival)
    }

    /// The datagram with those that follow it with the same header: the next ones of a burst
    /// mostly have it.
    fn same_header(&self, arrival: &Arrival, first: Part, rest: &mut Part) -> Part {
        let mut all = first;
        if arrival.header > 0 {
            let header = &self.incoming.first_of(first)[..arrival.header];
            let is_same = |datagram: &[u8]| {
                // A header alone may be an announcement.
                datagram.len() > header.len() && datagram.starts_with(header)
            };
            while rest.datagrams() > 0 && is_same(self.incoming.first_of(*rest)) {
                all = all.with(rest.take(1));
            }
        }
        all
    }

    /// Has datagrams go to their client's server without the header that they came with.
    fn forward_arrival(&mut self, number: usize, arrival: &Arrival, mut all: Part, now: Instant) {
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

    /// Whether replies of session `id` may go to the sender that its client's datagrams came
    /// through.
    ///
    /// Another client may have got the sender's port since. Then replies pass for as long
    /// after the client's latest datagram as our SDKs send to such a client, or if they name
    /// it.
    pub(super) fn check_sender(&self, id: SessionId, now: Instant) -> Result<(), DropReason> {
        let session = self.table.get(id);
        let Some(via) = session.and_then(|session| session.via.as_ref()) else {
            return Ok(());
        };
        let names_client = via.reply_header != ReplyHeader::None;
        let since_heard = || self.table.clock().moment(now).since(via.heard);
        if names_client || via.changes == via.sender.changes() || since_heard() < MIN_REST {
            Ok(())
        } else {
            Err(DropReason::ReplyReassigned)
        }
    }

    /// Has replies of session `id`, which would go to its client by `exit`, go to the sender
    /// that the client's datagrams came through, if there is one.
    pub(super) fn through_sender(&mut self, id: SessionId, exit: Exit) -> Exit {
        let session = self.table.get(id);
        let Some(via) = session.and_then(|session| session.via.as_ref()) else {
            return exit;
        };
        let mut buffer = [0; MAX_REPLY_HEADER];
        let (client, destination) = (exit.to, exit.from);
        let header = match via.reply_header {
            ReplyHeader::None => None,
            ReplyHeader::Tagged(tag) => {
                ppv2::encode_udp_tagged(client, destination, tag, &mut buffer).ok()
            }
            ReplyHeader::Spp => spp::encode(client, destination, &mut buffer).ok(),
        };
        Exit {
            to: via.sender.address,
            from: via.sender.local,
            header: header.map_or((0, 0), |header| self.replies.keep_header(header)),
            ..exit
        }
    }
}
