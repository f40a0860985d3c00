//! Datagrams of a batch that leave by one socket leave in one call. Each has its header in
//! front, which is written when the datagram is queued.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ppv2::Tlvs;
use ppv2_udp::{BATCH, Cause, Outgoing, Part, SendFault, TrafficClass};

use super::{Worker, reconfigure};
use crate::accept;
use crate::address::ServerAddr;
use crate::busiest::Client;
use crate::counters::{DropReason, Oversize, ServerCounters, WorkerCounters};
use crate::listener::ListenerSettings;
use crate::mode::{HeaderParts, MAX_HEADER, MAX_PASSED_TLVS};
use crate::server::Server;
use crate::session::{Amount, Key, Session, SessionId};
use crate::upstream_socket::Path;

/// How long no other datagram is noted as oversize, which takes a lock.
const OVERSIZE_PAUSE: Duration = Duration::from_secs(1);

/// One datagram, where its length doesn't matter.
const ONE: Amount = Amount {
    datagrams: 1,
    bytes: 0,
};

/// Datagrams that leave by one socket, in one call.
pub(super) struct Run {
    socket: Option<RunSocket>,
    now: Instant,
    /// At most [`BATCH`].
    queued: Vec<Queued>,
    headers: Headers,
    passed: Passed,
    /// The number of a socket to a server that has no route: to be renewed after the batch.
    pub(super) renew: Option<u32>,
}

/// The socket that a run leaves by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RunSocket {
    /// That of this session.
    Own(SessionId),
    /// That of this number, of a source network.
    Network(u32),
    /// That of this number, which is connected to the server.
    Tagged(u32),
}

/// Datagrams of one client that are to leave.
struct Queued {
    owner: Owner,
    part: Part,
    /// [`Passed::version`] of its TLVs.
    passed: u64,
    header: Header,
    to: Option<SocketAddr>,
    from: Option<SocketAddr>,
    class: TrafficClass,
    unsent: Cell<Unsent>,
}

/// Headers of those that are queued, one behind the other.
struct Headers {
    /// Room for a batch of the longest.
    bytes: Box<[u8]>,
    len: usize,
}

/// Where a header is among [`Headers`].
#[derive(Clone, Copy, Default)]
struct Header {
    at: usize,
    len: usize,
}

impl Headers {
    fn new() -> Self {
        Self {
            bytes: vec![0; BATCH * MAX_HEADER].into(),
            len: 0,
        }
    }

    /// Adds the header that `write` returns.
    #[inline]
    fn push(&mut self, write: impl FnOnce(&mut [u8; MAX_HEADER]) -> &[u8]) -> Header {
        let at = self.len;
        let room = self.bytes[at..].first_chunk_mut();
        let len = write(room.expect("a batch has fewer headers")).len();
        self.len += len;
        Header { at, len }
    }

    fn get(&self, header: Header) -> &[u8] {
        &self.bytes[header.at..header.at + header.len]
    }
}

/// TLVs of the header that the datagrams which are being queued came with, as far as they
/// go on to the server.
struct Passed {
    /// At most [`MAX_PASSED_TLVS`].
    bytes: Vec<u8>,
    /// Changes with them.
    version: u64,
}

impl Passed {
    fn new() -> Self {
        Self {
            bytes: Vec::with_capacity(MAX_PASSED_TLVS),
            version: 0,
        }
    }

    fn clear(&mut self) {
        if !self.bytes.is_empty() {
            self.bytes.clear();
            self.version += 1;
        }
    }

    fn set(&mut self, tlvs: Tlvs<'_>) {
        self.clear();
        // The bound holds for all headers that are decoded.
        for tlv in tlvs.iter().filter(|tlv| accept::passes(tlv.kind)) {
            let len = u16::try_from(tlv.value.len()).unwrap_or(u16::MAX);
            self.bytes.push(tlv.kind.0);
            self.bytes.extend_from_slice(&len.to_be_bytes());
            self.bytes.extend_from_slice(tlv.value);
        }
        self.version += 1;
    }
}

/// Whose datagrams they are, for what is counted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Owner {
    Session(SessionId),
    /// Of a listener that keeps no sessions: the number of its socket, and the place of the
    /// server among its targets.
    Listener(usize, usize),
}

/// What became of queued datagrams that were not all sent.
#[derive(Clone, Copy, Default)]
struct Unsent {
    datagrams: u32,
    bytes: u32,
    /// The server refused an earlier one.
    is_refused: bool,
    /// There is no route, or the source address is gone.
    lacks_route: bool,
}

impl Unsent {
    fn amount(self) -> Amount {
        Amount {
            datagrams: self.datagrams.into(),
            bytes: self.bytes.into(),
        }
    }
}

impl Run {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            socket: None,
            now,
            queued: Vec::with_capacity(BATCH),
            headers: Headers::new(),
            passed: Passed::new(),
            renew: None,
        }
    }

    /// Has the headers of what is queued from now on carry these TLVs, which came with it.
    pub(super) fn pass_tlvs(&mut self, tlvs: Tlvs<'_>) {
        if tlvs.is_empty() {
            self.passed.clear();
        } else {
            self.passed.set(tlvs);
        }
    }
}

impl Worker {
    /// Has datagrams of a session leave with others by its socket.
    pub(super) fn queue(&mut self, id: SessionId, part: Part, now: Instant) {
        let Some(session) = self.table.get(id) else {
            return;
        };
        let is_forged = |one: &Part| begins_as_header(self.incoming.first_of(*one));
        if session.connection.first.is_none() || !part.singles().any(|one| is_forged(&one)) {
            self.queue_part(id, part, now);
            return;
        }
        // The server would believe the client's own header where it has none of ours.
        let listener = Arc::clone(&session.settings.listener);
        let client = Client::of(&session.settings, session.key().client.0.ip());
        for one in part.singles() {
            if begins_as_header(self.incoming.first_of(one)) {
                let counters = listener.counters(self.number);
                counters.dropped(DropReason::ForgedHeader).add(1);
                self.busiest.dropped(ONE, || Some(client));
            } else {
                self.queue_part(id, one, now);
            }
        }
    }

    fn queue_part(&mut self, id: SessionId, part: Part, now: Instant) {
        let Some(session) = self.table.get(id) else {
            return;
        };
        let server = session.server_address().0;
        let (socket, to, from) = match &session.connection.path {
            Path::Own(own) => (
                RunSocket::Own(id),
                (!own.is_connected).then_some(server),
                None,
            ),
            Path::Network { socket, source } => {
                let from = SocketAddr::new(*source, 0);
                (RunSocket::Network(*socket), Some(server), Some(from))
            }
            Path::Tagged { socket } => (RunSocket::Tagged(*socket), None, None),
        };
        self.make_room_in_run(socket);
        let Some((session, unique_id)) = self.table.get_mut_with_id(id) else {
            return;
        };
        let (key, connection) = (session.key(), &mut session.connection);
        let has_header = match &mut connection.first {
            None => true,
            Some(first) => {
                let transitions = session.server.transitions();
                if std::mem::replace(&mut first.transitions, transitions) != transitions {
                    first.header.forgotten();
                }
                first.header.is_due(now)
            }
        };
        let owner = Owner::Session(id);
        let header = match self.run.queued.last() {
            _ if !has_header => Header::default(),
            Some(last)
                if (last.owner, last.passed) == (owner, self.run.passed.version)
                    && (last.header.len > 0 || connection.first.is_none()) =>
            {
                last.header
            }
            _ => {
                let keys = connection.tags.as_ref();
                let has_id = connection.has_unique_id();
                let parts = HeaderParts {
                    passed: &self.run.passed.bytes,
                    own: connection.tlvs.as_deref(),
                    unique_id: if has_id { unique_id() } else { None },
                    tag: keys.map(|keys| keys.tag(key.client.0, key.local.0, self.unix.now())),
                    ..HeaderParts::new(key.client, key.local)
                };
                let mode = connection.mode;
                self.run
                    .headers
                    .push(|buffer| mode.write_header(parts, buffer))
            }
        };
        let received = self.incoming.received(part.slot);
        let dscp = session.settings.dscp;
        self.run.now = now;
        self.run.queued.push(Queued {
            owner,
            part,
            passed: self.run.passed.version,
            header,
            to,
            from,
            class: received.map_or(TrafficClass::default(), |r| r.class.passed(dscp)),
            unsent: Cell::default(),
        });
    }

    /// Has datagrams of a client that has no session leave by this `socket` to the server in
    /// this place. `number` is that of the listener's socket.
    pub(super) fn queue_without_session(
        &mut self,
        number: usize,
        place: usize,
        socket: u32,
        key: Key,
        part: Part,
        now: Instant,
    ) {
        self.make_room_in_run(RunSocket::Tagged(socket));
        let settings = &self.listener_sockets[number].settings;
        let listener = self.snapshot.of(&settings.listener);
        let Some(target) = listener.and_then(|one| one.targets.get(place)) else {
            return;
        };
        let keys = target.replies.tag_keys();
        let parts = HeaderParts {
            own: target.tlvs.as_deref(),
            tag: keys.map(|keys| keys.tag(key.client.0, key.local.0, self.unix.now())),
            ..HeaderParts::new(key.client, key.local)
        };
        let mode = target.mode;
        self.run.now = now;
        let headers = &mut self.run.headers;
        let header = headers.push(|buffer| mode.write_header(parts, buffer));
        let received = self.incoming.received(part.slot);
        let dscp = settings.dscp;
        self.run.queued.push(Queued {
            owner: Owner::Listener(number, place),
            part,
            passed: self.run.passed.version,
            header,
            to: None,
            from: None,
            class: received.map_or(TrafficClass::default(), |r| r.class.passed(dscp)),
            unsent: Cell::default(),
        });
    }

    /// Sends what is queued if it leaves by another socket, or is a full batch.
    fn make_room_in_run(&mut self, socket: RunSocket) {
        if self.run.socket != Some(socket) || self.run.queued.len() == BATCH {
            self.send_run();
            self.run.socket = Some(socket);
        }
    }

    /// Sends the queued datagrams to their servers.
    pub(super) fn send_run(&mut self) {
        let Some(run_socket) = self.run.socket.take() else {
            return;
        };
        let socket = match run_socket {
            RunSocket::Own(id) => {
                let session = self.table.get(id);
                session.and_then(|session| Some(&session.connection.own_socket()?.socket))
            }
            RunSocket::Network(number) | RunSocket::Tagged(number) => {
                self.shared_sockets.socket(number)
            }
        };
        let run = &self.run;
        if let Some(socket) = socket {
            let outgoing = |index: usize| {
                let queued = &run.queued[index];
                let outgoing = Outgoing {
                    to: queued.to,
                    from: queued.from,
                    class: queued.class,
                    header: run.headers.get(queued.header),
                };
                (queued.part, outgoing)
            };
            let fault =
                |index: usize, fault| self.note_fault(run_socket, &run.queued[index], fault);
            socket.send(&self.incoming, run.queued.len(), outgoing, fault);
        } else {
            // Not known to happen: runs are sent before sessions and sockets go.
            for queued in &run.queued {
                let lost = SendFault::Lost {
                    error: io::ErrorKind::NotConnected.into(),
                    datagrams: queued.part.datagrams(),
                    len: self.incoming.len_of(queued.part),
                };
                self.note_fault(run_socket, queued, lost);
            }
        }
        let mut queued = std::mem::take(&mut self.run.queued);
        for queued in queued.drain(..) {
            self.count_sent(run_socket, &queued);
        }
        self.run.queued = queued;
        self.run.headers.len = 0;
        if let RunSocket::Tagged(number) = run_socket
            && let Some(tagged) = self.shared_sockets.tagged_mut(number)
        {
            tagged.note_sent(self.run.now, self.unix.now());
        }
    }

    /// The settings of the listener and the server of queued datagrams.
    fn ends_of(&self, owner: Owner) -> Option<(&ListenerSettings, &Server)> {
        match owner {
            Owner::Session(id) => {
                let session = self.table.get(id)?;
                Some((&session.settings, &session.server))
            }
            Owner::Listener(number, place) => {
                let settings = &self.listener_sockets.get(number)?.settings;
                let target = self.snapshot.of(&settings.listener)?.targets.get(place)?;
                Some((settings, &target.server))
            }
        }
    }

    #[cold]
    fn note_fault(&self, run_socket: RunSocket, queued: &Queued, fault: SendFault) {
        let Some((settings, server)) = self.ends_of(queued.owner) else {
            return;
        };
        let mut unsent = queued.unsent.get();
        match fault {
            SendFault::Earlier(report) => {
                // Of a source network, the error queue tells whose datagram it was.
                if !matches!(run_socket, RunSocket::Network(_)) {
                    unsent.is_refused = true;
                    count_report(server.counters(self.number), &report);
                }
            }
            SendFault::Lost {
                error,
                datagrams,
                len,
            } => {
                let reason = why_unsent(&error);
                let counters = settings.listener.counters(self.number);
                counters.dropped(reason).add(datagrams as u64);
                let count = u32::try_from(datagrams).unwrap_or(u32::MAX);
                let bytes = u32::try_from(datagrams * len).unwrap_or(u32::MAX);
                unsent.datagrams = unsent.datagrams.saturating_add(count);
                unsent.bytes = unsent.bytes.saturating_add(bytes);
                unsent.lacks_route |= reason == DropReason::Unreachable;
                if reason == DropReason::Oversize {
                    let noted = &self.oversize_noted;
                    let session = match queued.owner {
                        Owner::Session(id) => self.table.get(id),
                        Owner::Listener(..) => None,
                    };
                    let address = session.map(Session::server_address);
                    note_oversize(
                        noted,
                        &self.counters,
                        address.unwrap_or(server.address),
                        len,
                        queued.header.len,
                    );
                }
            }
        }
        queued.unsent.set(unsent);
    }

    fn count_sent(&mut self, run_socket: RunSocket, queued: &Queued) {
        let unsent = queued.unsent.get();
        let datagrams = queued.part.datagrams();
        let bytes = self.incoming.len_of(queued.part) + datagrams * queued.header.len;
        let sent = (datagrams as u64).saturating_sub(unsent.datagrams.into());
        let sent_bytes = (bytes as u64).saturating_sub(unsent.bytes.into());
        let count = |server: &Server| {
            let counters = server.counters(self.number);
            counters.sent.add(sent);
            counters.sent_bytes.add(sent_bytes);
        };
        match queued.owner {
            Owner::Session(id) => {
                let Some(session) = self.table.get_mut(id) else {
                    return;
                };
                count(&session.server);
                if unsent.datagrams > 0 {
                    let client = Client::of(&session.settings, session.key().client.0.ip());
                    self.busiest.dropped(unsent.amount(), || Some(client));
                }
                if let Some(first) = &mut session.connection.first {
                    if sent > 0 {
                        first.header.went_out(self.run.now);
                    }
                    if unsent.is_refused {
                        first.header.forgotten();
                    }
                }
                if unsent.lacks_route {
                    session.needs_socket |= reconfigure::may_need_socket(session, &self.settled);
                }
            }
            Owner::Listener(..) => {
                if let Some((_, server)) = self.ends_of(queued.owner) {
                    count(server);
                }
            }
        }
        if let RunSocket::Tagged(number) = run_socket
            && unsent.lacks_route
        {
            self.run.renew = Some(number);
        }
    }
}

/// Notes for the operator which datagram was too long.
fn note_oversize(
    noted: &Cell<Option<Instant>>,
    worker: &WorkerCounters,
    server: ServerAddr,
    len: usize,
    header: usize,
) {
    let recent = |noted: Instant| noted.elapsed() < OVERSIZE_PAUSE;
    if noted.get().is_some_and(recent) {
        return;
    }
    noted.set(Some(Instant::now()));
    let oversize = Oversize {
        server: server.0,
        len,
        header,
    };
    // If it is being read, the next one is as good.
    if let Ok(mut latest) = worker.oversize.try_lock() {
        *latest = Some(oversize);
    }
}

/// Counts what the network says of a datagram sent earlier, which can be forged.
pub(super) fn count_report(server: &ServerCounters, report: &io::Error) {
    if Cause::of(report) == Cause::Oversize {
        server.too_long.add(1);
    } else {
        server.refusals.add(1);
    }
}

/// Whether it begins as a header of PROXY v2 does, or of v1, which servers that look for
/// one may read as well.
fn begins_as_header(datagram: &[u8]) -> bool {
    datagram.starts_with(&ppv2::SIGNATURE) || ppv2::is_v1(datagram)
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
