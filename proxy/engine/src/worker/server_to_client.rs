//! From servers to clients: replies are received from the sessions' sockets into one
//! batch, each is checked, and all that leave by one listener's socket leave in one call.

use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use ppv2::spp::{self, SppHeader};
use ppv2_udp::{BATCH, Batch, Cause, Outgoing, Part, Received, SendFault, Socket, TrafficClass};
use slab::Slab;

use super::headers_in::MAX_REPLY_HEADER;
use super::reconfigure::is_wrong;
use super::run::count_report;
use super::{ListenerSocket, Worker};
use crate::address::{ClientAddr, ListenerAddr, ServerAddr};
use crate::busiest::Client;
use crate::counters::{DropReason, ServerCounters};
use crate::listener::Listener;
use crate::session::{Amount, Key, Session, SessionId};
use crate::upstream_socket::{Connection, Path, ServerReplyHeader, UpstreamSocket};

/// Errors of earlier datagrams to read past before looking again later. ICMP
/// can be forged, so reading them must not become all that a worker does.
const ERRORS_AT_ONCE: usize = 4;

/// As [`ERRORS_AT_ONCE`], of a socket that sessions share.
const SHARED_ERRORS_AT_ONCE: usize = 32;

/// Batches of replies from such a socket after which its errors are looked for, whether or
/// not a call has failed: one that received something swallows an error.
const TAKES_BETWEEN_LOOKS: u32 = 64;

/// The most late replies and errors to read from a socket before it is closed or taken
/// over.
const LATE: usize = 64;

impl Worker {
    /// Takes some replies from a session's socket, to leave at the end of the
    /// round. Returns how many, bursts counted as one.
    pub(super) fn take_from_server(&mut self, id: SessionId, now: Instant) -> usize {
        let Some(session) = self.table.get_mut(id) else {
            return 0;
        };
        let connection = &mut session.connection;
        let counters = session.server.counters(self.number);
        let slots = match &mut connection.path {
            Path::Own(socket) if socket.takes_replies => {
                // Fewer than there are would leave in several calls, to several bursts.
                let unanswered = session.requests.saturating_sub(session.replies);
                let most = socket.receive_batch.get(unanswered);
                if self.replies.room() < most {
                    self.replies.send(&self.listener_sockets);
                }
                let refusals = counters.refusals.get();
                let slots = self.replies.receive(socket, most, counters);
                if counters.refusals.get() != refusals {
                    connection.forget_header();
                }
                slots
            }
            Path::Own(_) => return 0,
            Path::Network { socket, .. } | Path::Tagged { socket } => {
                let number = *socket;
                return self.take_from_shared(number, now);
            }
        };
        for slot in slots.clone() {
            self.pass_of_session(slot, id, now);
        }
        slots.len()
    }

    /// Takes a batch of replies from a socket that sessions share, to leave at the end of
    /// the round. Returns how many, bursts counted as one.
    pub(super) fn take_from_shared(&mut self, number: u32, now: Instant) -> usize {
        // One call then fills all of the batch.
        self.replies.send(&self.listener_sockets);
        let Some(shared) = self.shared_sockets.get_mut(number) else {
            return 0;
        };
        let is_tagged = shared.tagged().is_some();
        shared.takes = shared.takes.wrapping_add(1);
        let mut look_for_errors = shared.takes.is_multiple_of(TAKES_BETWEEN_LOOKS);
        let slots = self.replies.receive_from_shared(&shared.socket, |report| {
            match shared.tagged() {
                Some(tagged) => count_report(tagged.server.counters(self.number), report),
                // The error queue has it, too.
                None => look_for_errors = true,
            }
        });
        let latest = slots.clone().last();
        let latest = latest.and_then(|slot| self.replies.batch.received(slot));
        let lost = latest.map_or(0, |latest| latest.newly_lost(&mut shared.overflows));
        let mut lost = lost + std::mem::take(&mut shared.lost);
        if is_tagged {
            for slot in slots.clone() {
                self.pass_tagged(slot, number, now);
            }
            if let Some(tagged) = self.shared_sockets.tagged(number) {
                tagged.server.counters(self.number).overflows.add(lost);
            }
            return slots.len();
        }
        // Also while replies come: errors fill the same buffer, and no reply would.
        if slots.is_empty() || look_for_errors {
            self.take_errors(number);
        }
        for slot in slots.clone() {
            let Some(received) = self.replies.batch.received(slot) else {
                continue;
            };
            let to = received.local.ip();
            let id = self.table.find_by_source(to);
            let is_asked = |id: &SessionId| {
                let session = self.table.get(*id);
                session.is_some_and(|session| session.connection.sends_from(number, to))
            };
            match id.filter(is_asked) {
                Some(id) => {
                    if lost > 0 {
                        self.count_overflows_of(id, std::mem::take(&mut lost));
                    }
                    self.pass_of_session(slot, id, now);
                }
                None => {
                    let datagrams = received.datagrams() as u64;
                    let shared = &mut self.shared_sockets;
                    shared.drop_of_no_session(number, to, datagrams, now);
                }
            }
        }
        if let Some(shared) = self.shared_sockets.get_mut(number) {
            shared.lost = lost;
        }
        slots.len()
    }

    /// Has the replies in `slot`, each for itself, go to the clients that their tags name.
    /// They came by a socket that sessions to one server share.
    fn pass_tagged(&mut self, slot: usize, number: u32, now: Instant) {
        let Some(received) = self.replies.batch.received(slot) else {
            return;
        };
        self.last_reply = now;
        let mut rest = self.replies.batch.whole(slot);
        while rest.datagrams() > 0 {
            let first = rest.take(1);
            let read = self.read_tag(number, &received, first);
            let (mut all, bytes_of_first) = (first, self.replies.batch.len_of(first));
            let mut amount = Amount {
                datagrams: 1,
                bytes: bytes_of_first as u64,
            };
            let checked = read.map_err(|reason| (reason, None)).and_then(|named| {
                // The next ones of a burst mostly have the same header, and the same way.
                let header = &self.replies.batch.first_of(first)[..named.header];
                while self.replies.batch.first_of(rest).starts_with(header) {
                    let next = rest.take(1);
                    amount.datagrams += 1;
                    amount.bytes += self.replies.batch.len_of(next) as u64;
                    all = all.with(next);
                }
                let headers = amount.datagrams * named.header as u64;
                let payload = Amount {
                    bytes: amount.bytes - headers,
                    ..amount
                };
                let exit = self.tagged_reply_to(&named, &received, payload, now)?;
                Ok((named.header, exit))
            });
            if let Some(tagged) = self.shared_sockets.tagged(number) {
                let counters = tagged.server.counters(self.number);
                counters.replies.add(amount.datagrams);
                counters.reply_bytes.add(amount.bytes);
            }
            match checked {
                Ok((header, exit)) => {
                    let passed = all.singles().map(|one| Passed {
                        part: one.behind(header),
                        exit,
                    });
                    self.replies.passed.extend(passed);
                }
                Err((reason, listener)) => {
                    let of_socket = || self.shared_sockets.listener(number);
                    if let Some(listener) = listener.or_else(of_socket) {
                        let counters = listener.counters(self.number);
                        counters.dropped(reason).add(amount.datagrams);
                    }
                }
            }
        }
    }

    /// What the valid tag of a reply says that came by a socket that sessions to one server
    /// share.
    fn read_tag(
        &mut self,
        number: u32,
        received: &Received,
        one: Part,
    ) -> Result<Named, DropReason> {
        let datagram = self.replies.batch.first_of(one);
        let unix = self.unix.now();
        let tagged = self.shared_sockets.tagged_mut(number);
        let tagged = tagged.ok_or(DropReason::ReplyLate)?;
        if ServerAddr(received.peer) != tagged.server.address {
            return Err(DropReason::ReplyWrongSource);
        }
        let Ok(reply) = ppv2::decode_tagged(datagram) else {
            tagged.server.note_tag(false, unix);
            return Err(DropReason::ReplyUntagged);
        };
        tagged.verify(&reply, unix)?;
        tagged.note_reply(unix);
        Ok(Named {
            key: Key::direct(ClientAddr(reply.client), ListenerAddr(reply.destination)),
            server: tagged.server.id(),
            header: datagram.len() - reply.payload.len(),
        })
    }

    /// Where replies with a valid tag go, or why they are dropped and of which listener, if
    /// that is known.
    fn tagged_reply_to(
        &mut self,
        named: &Named,
        received: &Received,
        amount: Amount,
        now: Instant,
    ) -> Result<Exit, Refusal> {
        // A server that the session has left doesn't count for it.
        let is_of_server = |id: &SessionId| {
            let session = self.table.get(*id);
            session.is_some_and(|session| session.server.id() == named.server)
        };
        let Some(id) = self.table.find(&named.key).filter(is_of_server) else {
            return self.check_without_session(&named.key, received, amount);
        };
        self.reply_to(id, received, amount, now).map_err(|reason| {
            let session = self.table.get(id);
            let listener = session.map(|one| Arc::clone(&one.settings.listener));
            (reason, listener)
        })
    }

    /// Where a reply with a valid tag goes that is of no session: none is kept, or it has
    /// ended. It can reach no other client, so it passes, unless there is a bound on what a
    /// client gets.
    fn check_without_session(
        &mut self,
        key: &Key,
        received: &Received,
        amount: Amount,
    ) -> Result<Exit, Refusal> {
        let number = self.listener_socket_at(key.local.0);
        let number = number.ok_or((DropReason::ReplyUnknownListener, None))?;
        let settings = &self.listener_sockets[number as usize].settings;
        let of_listener = |reason| Err((reason, Some(Arc::clone(&settings.listener))));
        if settings.rules.amplification.is_some() {
            return of_listener(DropReason::ReplyLate);
        }
        let client = key.client.0.ip();
        if !settings.allows(client) || !settings.admits(client, None) {
            return of_listener(DropReason::ReplyNotAllowed);
        }
        let of_client = || Some(Client::of(settings, client));
        self.busiest.passed(amount, of_client);
        Ok(Exit {
            listener_socket: number,
            to: key.client.0,
            from: key.local.0,
            class: received.class.passed(settings.dscp),
            header: (0, 0),
        })
    }

    /// Has the replies in `slot`, which came by the socket or to the address of session
    /// `id`, go to its client, without the header in front if they have one.
    fn pass_of_session(&mut self, slot: usize, id: SessionId, now: Instant) {
        let session = self.table.get(id);
        let header = session.map_or(ServerReplyHeader::None, |session| {
            session.connection.reply_header
        });
        match header {
            ServerReplyHeader::None => self.pass(self.replies.batch.whole(slot), id, now),
            ServerReplyHeader::Tagged => self.pass_perhaps_tagged(slot, id, now),
            ServerReplyHeader::Spp => self.pass_spp(slot, id, now),
        }
    }

    /// As [`pass_of_session`](Self::pass_of_session), of a server that must put the Simple
    /// Proxy Protocol header of the request in front of each reply.
    fn pass_spp(&mut self, slot: usize, id: SessionId, now: Instant) {
        let (Some(received), Some(session)) =
            (self.replies.batch.received(slot), self.table.get(id))
        else {
            return;
        };
        let key = session.key();
        let expected = SppHeader {
            client: key.client.0,
            proxy: key.local.0,
        };
        let expected = expected.to_bytes();
        let is_of_server = ServerAddr(received.peer) == session.server_address();
        for one in self.replies.batch.whole(slot).singles() {
            let datagram = self.replies.batch.first_of(one);
            if datagram.starts_with(&expected) {
                self.pass(one.behind(expected.len()), id, now);
                continue;
            }
            let reason = match spp::decode(datagram) {
                _ if !is_of_server => DropReason::ReplyWrongSource,
                Ok(_) => DropReason::ReplyWrongClient,
                Err(_) => DropReason::ReplyNoHeader,
            };
            if let Some(session) = self.table.get(id) {
                let counters = session.server.counters(self.number);
                counters.replies.add(1);
                counters.reply_bytes.add(datagram.len() as u64);
                let counters = session.settings.listener.counters(self.number);
                counters.dropped(reason).add(1);
            }
        }
    }

    /// As [`pass_of_session`](Self::pass_of_session), of a server that may return tags.
    fn pass_perhaps_tagged(&mut self, slot: usize, id: SessionId, now: Instant) {
        for one in self.replies.batch.whole(slot).singles() {
            let datagram = self.replies.batch.first_of(one);
            let (Ok(reply), Some(session)) = (ppv2::decode_tagged(datagram), self.table.get(id))
            else {
                self.pass(one, id, now);
                continue;
            };
            let key = session.key();
            if (reply.client, reply.destination) != (key.client.0, key.local.0) {
                let counters = session.settings.listener.counters(self.number);
                counters.dropped(DropReason::ReplyWrongTag).add(1);
                continue;
            }
            // Socket or address say whose reply it is, also with a tag of a former key.
            let (unix, header) = (self.unix.now(), datagram.len() - reply.payload.len());
            let verified = session
                .connection
                .tags
                .as_ref()
                .map(|keys| keys.verify(reply.tag, reply.client, reply.destination, unix));
            if verified == Some(Ok(())) {
                session.server.note_tag(true, unix);
            }
            self.pass(one.behind(header), id, now);
        }
    }

    fn count_overflows_of(&self, id: SessionId, lost: u64) {
        if let Some(session) = self.table.get(id) {
            session.server.counters(self.number).overflows.add(lost);
        }
    }

    /// Counts what the network reports of datagrams that left by a shared socket, for the
    /// server of the session that each left for.
    fn take_errors(&mut self, number: u32) {
        for _ in 0..SHARED_ERRORS_AT_ONCE {
            let Some(shared) = self.shared_sockets.get_mut(number) else {
                return;
            };
            let Ok(report) = shared.socket.receive_error() else {
                return;
            };
            // What this host could not send has been counted there.
            let from = report.from.filter(|_| !report.is_local);
            let id = from.and_then(|ip| self.table.find_by_source(ip));
            let session = id.and_then(|id| self.table.get_mut(id));
            let is_of =
                |session: &&mut Session<Connection>| report.to == session.server_address().0;
            if let Some(session) = session.filter(is_of) {
                count_report(session.server.counters(self.number), &report.error);
                session.connection.forget_header();
            }
        }
    }

    /// Has replies go to the client of session `id`, if they came from the server that was
    /// asked.
    fn pass(&mut self, part: Part, id: SessionId, now: Instant) {
        let Some(received) = self.replies.batch.received(part.slot) else {
            return;
        };
        self.last_reply = now;
        let amount = Amount {
            datagrams: part.datagrams() as u64,
            bytes: self.replies.batch.len_of(part) as u64,
        };
        match self.check(&received, id, amount, now) {
            Ok(exit) => self.replies.passed.push(Passed { part, exit }),
            Err(reason) => {
                if let Some(session) = self.table.get(id) {
                    let counters = session.settings.listener.counters(self.number);
                    counters.dropped(reason).add(amount.datagrams);
                }
            }
        }
    }

    /// The number of the listener's socket that replies leave by, and how, unless they are
    /// dropped.
    fn check(
        &mut self,
        received: &Received,
        id: SessionId,
        amount: Amount,
        now: Instant,
    ) -> Result<Exit, DropReason> {
        let session = self.table.get_mut(id).ok_or(DropReason::ReplyLate)?;
        let asked = session.server_address();
        let (server, connection) = (&session.server, &mut session.connection);
        let wrong = || is_wrong(&self.wrong_interfaces, server.address, received.interface);
        match &mut connection.path {
            Path::Own(socket) if socket.interface == received.interface => {}
            _ if wrong() => return Err(DropReason::ReplyWrongInterface),
            Path::Own(socket) => socket.interface = received.interface,
            Path::Network { .. } | Path::Tagged { .. } => {}
        }
        let counters = server.counters(self.number);
        counters.replies.add(amount.datagrams);
        counters.reply_bytes.add(amount.bytes);
        // The kernel filters by the connected address, but only from the moment
        // that the socket was connected.
        if ServerAddr(received.peer) != asked {
            return Err(DropReason::ReplyWrongSource);
        }
        self.reply_to(id, received, amount, now)
    }

    /// As [`check`](Self::check), of replies that came from the session's server.
    fn reply_to(
        &mut self,
        id: SessionId,
        received: &Received,
        amount: Amount,
        now: Instant,
    ) -> Result<Exit, DropReason> {
        let session = self.table.get_mut(id).ok_or(DropReason::ReplyLate)?;
        let connection = &mut session.connection;
        if let Some(first) = &mut connection.first {
            first.header.answered();
        }
        let (listener_socket, dscp) = (connection.listener_socket, session.settings.dscp);
        self.check_sender(id, now)?;
        let reply = self.table.reply(now, id, amount);
        let reply = reply.ok_or(DropReason::ReplyLate)?;
        if let Some(bound) = reply.exceeds {
            let session = self.table.get(id).ok_or(DropReason::ReplyLate)?;
            let counters = session.settings.listener.counters(self.number);
            counters.amplified.add(amount.datagrams);
            if bound.enforce {
                return Err(DropReason::ReplyAmplified);
            }
        }
        self.busiest.passed(amount, || {
            let settings = &self.table.get(id)?.settings;
            Some(Client::of(settings, reply.to.0.ip()))
        });
        let exit = Exit {
            listener_socket,
            to: reply.to.0,
            from: reply.from.0,
            class: received.class.passed(dscp),
            header: (0, 0),
        };
        Ok(self.through_sender(id, exit))
    }
}

/// Why a tagged reply is dropped, and of which listener it is, if that is known.
type Refusal = (DropReason, Option<Arc<Listener>>);

/// What a valid tag says.
struct Named {
    key: Key,
    /// Its id.
    server: u64,
    /// Bytes of the header.
    header: usize,
}

/// How replies leave.
#[derive(Clone, Copy)]
pub(super) struct Exit {
    /// Number of the listener's socket that they leave by.
    pub(super) listener_socket: u32,
    pub(super) to: SocketAddr,
    pub(super) from: SocketAddr,
    pub(super) class: TrafficClass,
    /// Place and length of what stands in front of each, among the headers of [`Replies`].
    pub(super) header: (usize, usize),
}

/// A reply that may go to its client.
struct Passed {
    part: Part,
    exit: Exit,
}

/// The batch of replies, filled from its front.
pub(super) struct Replies {
    worker: usize,
    batch: Batch,
    filled: usize,
    /// In the order that they came in. The others are overwritten after the next
    /// [`send`](Self::send).
    passed: Vec<Passed>,
    /// What stands in front of those that go to another proxy.
    headers: Vec<u8>,
}

impl Replies {
    /// Those of this worker.
    pub(super) fn new(worker: usize) -> Self {
        Self {
            worker,
            batch: Batch::default(),
            filled: 0,
            passed: Vec::with_capacity(BATCH),
            headers: Vec::with_capacity(BATCH * MAX_REPLY_HEADER),
        }
    }

    /// Keeps what stands in front of a reply until that is sent. Returns its place and
    /// length, of a reply header that has been kept before those of the latest one.
    pub(super) fn keep_header(&mut self, header: &[u8]) -> (usize, usize) {
        let same = self.passed.last().map(|passed| passed.exit.header);
        let is_same = |(place, len): (usize, usize)| self.headers[place..place + len] == *header;
        if let Some(same) = same.filter(|same| is_same(*same)) {
            return same;
        }
        let place = self.headers.len();
        self.headers.extend_from_slice(header);
        (place, header.len())
    }

    pub(super) fn is_full(&self) -> bool {
        self.room() == 0
    }

    /// Slots that are free.
    fn room(&self) -> usize {
        BATCH - self.filled
    }

    /// Receives at most so many of the replies that wait in a socket, past errors that speak
    /// of datagrams sent earlier, which are counted, as is what the kernel lost.
    /// Returns the slots that they are in, none if there is nothing. The batch
    /// must have room for them.
    fn receive(
        &mut self,
        from: &mut UpstreamSocket,
        most: usize,
        server: &ServerCounters,
    ) -> Range<usize> {
        let end = self.filled + most;
        for _ in 0..ERRORS_AT_ONCE {
            match from.socket.receive(&mut self.batch, self.filled, end) {
                Ok(received) => {
                    let slots = self.filled..self.filled + received;
                    self.filled = slots.end;
                    from.receive_batch.learn(most, received);
                    if let Some(latest) = self.batch.received(slots.end - 1) {
                        let lost = latest.newly_lost(&mut from.overflows);
                        server.overflows.add(lost);
                    }
                    return slots;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(report) => count_report(server, &report),
            }
        }
        self.filled..self.filled
    }

    /// Receives some of the replies that wait in a socket that sessions share.
    fn receive_from_shared(
        &mut self,
        from: &Socket,
        mut report: impl FnMut(&io::Error),
    ) -> Range<usize> {
        for _ in 0..SHARED_ERRORS_AT_ONCE {
            match from.receive(&mut self.batch, self.filled, BATCH) {
                Ok(received) => {
                    let slots = self.filled..self.filled + received;
                    self.filled = slots.end;
                    return slots;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => report(&error),
            }
        }
        self.filled..self.filled
    }

    /// Sends the replies that passed, and empties the batch.
    pub(super) fn send(&mut self, listener_sockets: &Slab<ListenerSocket>) {
        let batch = &self.batch;
        for same in self
            .passed
            .chunk_by(|a, b| a.exit.listener_socket == b.exit.listener_socket)
        {
            let listener_socket = &listener_sockets[same[0].exit.listener_socket as usize];
            let counters = listener_socket.settings.listener.counters(self.worker);
            let outgoing = |index: usize| {
                let Passed { part, exit } = &same[index];
                let (place, len) = exit.header;
                let outgoing = Outgoing {
                    to: Some(exit.to),
                    from: Some(exit.from),
                    class: exit.class,
                    header: &self.headers[place..place + len],
                };
                (*part, outgoing)
            };
            let socket = &listener_socket.socket;
            let len_of_headers = |passed: &Passed| passed.part.datagrams() * passed.exit.header.1;
            let mut headers = match self.headers.is_empty() {
                true => 0,
                false => same.iter().map(len_of_headers).sum(),
            };
            let sent = socket.send(batch, same.len(), outgoing, |index, fault| {
                // A socket that is not connected hears nothing of earlier
                // datagrams; whatever it was, these were sent then.
                if let SendFault::Lost {
                    error, datagrams, ..
                } = fault
                {
                    headers -= datagrams * same[index].exit.header.1;
                    counters.dropped(why_unsent(&error)).add(datagrams as u64);
                }
            });
            counters.replied.add(sent.datagrams as u64);
            counters.replied_bytes.add((sent.bytes - headers) as u64);
        }
        self.passed.clear();
        self.headers.clear();
        self.filled = 0;
    }

    /// Reads past what waits in the socket of a session that has ended, which are late
    /// replies, and errors. True if there is no reply. The batch must not be full.
    pub(super) fn are_none_late(&mut self, session: &Session<Connection>) -> bool {
        let own_socket = session.connection.own_socket();
        let Some(from) = own_socket.filter(|socket| socket.takes_replies) else {
            return true;
        };
        let server = session.server.counters(self.worker);
        let listener = session.settings.listener.counters(self.worker);
        let late = listener.dropped(DropReason::ReplyLate);
        let mut are_none = true;
        for _ in 0..LATE {
            let received = from
                .socket
                .receive(&mut self.batch, self.filled, self.filled + 1);
            match received {
                Ok(_) => {
                    let reply = self.batch.received(self.filled);
                    let (datagrams, len) = reply.map_or((0, 0), |r| (r.datagrams(), r.len));
                    server.replies.add(datagrams as u64);
                    server.reply_bytes.add(len as u64);
                    late.add(datagrams as u64);
                    are_none = false;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return are_none,
                Err(report) => count_report(server, &report),
            }
        }
        false
    }
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
