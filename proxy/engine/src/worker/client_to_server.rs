//! From clients to servers: a batch of datagrams is received, each is checked, its session
//! is found or begun, and all that go to one session leave in one call.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ppv2_udp::{BATCH, Cause, Outgoing, Part, Received, SendFault, TrafficClass};

use super::{Worker, reconfigure};
use crate::address::ServerAddr;
use crate::counters::{DropReason, EndReason, Oversize, ServerCounters, WorkerCounters};
use crate::mode::{MAX_HEADER, Mode};
use crate::session::{Amount, Key, SessionId};
use crate::upstream_socket::Path;

/// How long no other datagram is noted as oversize, which takes a lock.
const OVERSIZE_PAUSE: Duration = Duration::from_secs(1);

/// Sessions of a client that may have to leave their server while one is looked for that
/// takes more than it may.
const MOVES: usize = 4;

/// Datagrams of a batch that leave by one socket, in one call.
pub(super) struct Run {
    socket: Option<RunSocket>,
    now: Instant,
    /// At most [`BATCH`].
    queued: Vec<Queued>,
    /// Headers of those that are queued, by their place.
    headers: Box<[[u8; MAX_HEADER]; BATCH]>,
}

/// The socket that a run leaves by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RunSocket {
    /// That of this session.
    Own(SessionId),
    /// That of this number, which sessions share.
    Shared(u32),
}

/// Datagrams of one session that are to leave.
#[derive(Clone, Copy)]
struct Queued {
    session: SessionId,
    part: Part,
    /// Place and length of the header.
    header: (usize, usize),
    to: Option<SocketAddr>,
    from: Option<SocketAddr>,
    class: TrafficClass,
}

impl Run {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            socket: None,
            now,
            queued: Vec::with_capacity(BATCH),
            headers: Box::new([[0; MAX_HEADER]; BATCH]),
        }
    }

    fn header_of(&self, queued: &Queued) -> &[u8] {
        let (place, len) = queued.header;
        &self.headers[place][..len]
    }
}

impl Worker {
    /// Takes a batch from clients to their servers. True if there may be more.
    pub(super) fn take_from_clients(&mut self, number: usize, now: Instant) -> bool {
        let Some(listener_socket) = self.listener_sockets.get(number) else {
            return false;
        };
        let received = listener_socket.socket.receive(&mut self.incoming, 0, BATCH);
        let slots = match received {
            Ok(slots) => slots,
            Err(error) => return error.kind() != io::ErrorKind::WouldBlock,
        };
        self.count_overflows(number, slots);
        for slot in 0..slots {
            let mut rest = self.incoming.whole(slot);
            while rest.datagrams() > 0 {
                let part = self.next_part(number, &mut rest);
                let Some(id) = self.session_for(number, part, now) else {
                    continue;
                };
                self.queue(id, part, now);
            }
        }
        self.send_run();
        slots == BATCH
    }

    fn count_overflows(&mut self, number: usize, slots: usize) {
        let latest = slots.checked_sub(1);
        let latest = latest.and_then(|slot| self.incoming.received(slot));
        let from = &mut self.listener_sockets[number];
        let lost = latest.map_or(0, |latest| latest.newly_lost(&mut from.overflows));
        let counters = from.settings.listener.counters(self.number);
        counters.overflows.add(lost);
    }

    /// Cuts off the front of `rest` what one session may take: all, unless a burst
    /// has come in one piece where requests are counted.
    fn next_part(&self, number: usize, rest: &mut Part) -> Part {
        let rules = &self.listener_sockets[number].settings.rules;
        let received = self.incoming.received(rest.slot);
        let is_cut = rules.count_requests() && rest.datagrams() > 1;
        let Some(received) = received.filter(|_| is_cut) else {
            return rest.take(usize::MAX);
        };
        let room = self.table.room(&Key::of(&received), rules.requests);
        rest.take(usize::try_from(room).unwrap_or(usize::MAX))
    }

    /// The session of the client's datagrams in `part`, begun if need be. `None`
    /// if they are dropped, which is counted.
    fn session_for(&mut self, number: usize, part: Part, now: Instant) -> Option<SessionId> {
        let received = self.incoming.received(part.slot)?;
        let listener = &self.listener_sockets[number].settings.listener;
        let counters = listener.counters(self.number);
        let amount = Amount {
            datagrams: part.datagrams() as u64,
            bytes: self.incoming.len_of(part) as u64,
        };
        counters.received.add(amount.datagrams);
        counters.received_bytes.add(amount.bytes);
        let key = Key::of(&received);
        let found = match refused(&received) {
            Some(reason) => Err(reason),
            None if self.draining => Err(DropReason::Stopping),
            None if self.is_too_fast(number, &key, amount, now) => Err(DropReason::ClientRate),
            None => match self.known_session(&key, amount, now) {
                Some(id) => Ok(id),
                None => match self.new_session(number, key, now) {
                    Ok(id) => Ok(self.table.count(now, id, amount)),
                    Err(reason) => self.overdraw(&key, amount, now).ok_or(reason),
                },
            },
        };
        let listener = &self.listener_sockets[number].settings.listener;
        let counters = listener.counters(self.number);
        found
            .inspect_err(|reason| counters.dropped(*reason).add(amount.datagrams))
            .ok()
    }

    /// Whether the client's rate is exceeded: that of its session, once it was answered,
    /// or that of the client, for all its other datagrams.
    fn is_too_fast(&mut self, number: usize, key: &Key, amount: Amount, now: Instant) -> bool {
        let settings = &self.listener_sockets[number].settings;
        let Some(rates) = &settings.client_rates else {
            return false;
        };
        let ip = key.client.0.ip();
        // A client that is not served anyway takes no other's place in the buckets.
        if !settings.allows(ip) {
            return false;
        }
        !match self.table.bucket(key) {
            Some(bucket) => rates.admit_from(bucket, now, amount.datagrams),
            None => rates.admit(now, ip, amount.datagrams),
        }
    }

    /// The client's session that takes its datagrams, unless there is none or it has to
    /// leave its server.
    fn known_session(&mut self, key: &Key, amount: Amount, now: Instant) -> Option<SessionId> {
        let id = self.table.find(key)?;
        let checked = self.table.get(id)?.connection.checked;
        if checked != self.snapshot.version && self.must_leave(id) {
            self.end(id, EndReason::Moved, now);
            return None;
        }
        self.table.request_of(now, id, amount)
    }

    /// Whether session `id` is to leave its server at this datagram of its client's.
    fn must_leave(&mut self, id: SessionId) -> bool {
        let version = self.snapshot.version;
        let session = self.table.get_mut(id);
        // Asked once for each snapshot, which costs as much as a new session's pick.
        let Some(session) = session.filter(|session| session.connection.checked != version) else {
            return false;
        };
        session.connection.checked = version;
        let Some(listener) = self.snapshot.of(&session.settings.listener) else {
            return false;
        };
        let Some(place) = listener.targets.place(&session.server) else {
            return true;
        };
        let v6 = session.key().client.0.is_ipv6();
        let rules = |place: usize| {
            listener
                .routing
                .rules
                .get(place)
                .copied()
                .unwrap_or_default()
        };
        if *rules(place).leave.get(v6) {
            return true;
        }
        if rules(place).is_draining {
            return false;
        }
        let home = listener.routing.plans.get(v6).home(session.key().client);
        home.is_some_and(|home| home != place && *rules(home).takes_back.get(v6))
    }

    /// One of the client's sessions that are to take no more, to take these datagrams as
    /// well, since no other can be begun.
    fn overdraw(&mut self, key: &Key, amount: Amount, now: Instant) -> Option<SessionId> {
        for _ in 0..MOVES {
            let id = self.table.overdraw(now, key, amount)?;
            if !self.must_leave(id) {
                let settings = &self.table.get(id)?.settings;
                if settings.rules.count_requests() {
                    let counters = settings.listener.counters(self.number);
                    counters.overdrawn.add(amount.datagrams);
                }
                return Some(id);
            }
            self.end(id, EndReason::Moved, now);
        }
        None
    }

    /// Ends a session whose datagrams may be queued.
    pub(super) fn end(&mut self, id: SessionId, reason: EndReason, now: Instant) {
        self.send_run();
        self.table.end(now, id, reason);
    }

    /// Has datagrams of a session leave with others by its socket.
    fn queue(&mut self, id: SessionId, part: Part, now: Instant) {
        let Some(session) = self.table.get_mut(id) else {
            return;
        };
        let connection = &mut session.connection;
        let has_header = match &mut connection.first {
            None => true,
            Some(first) => {
                let times_down = session.server.times_down();
                if std::mem::replace(&mut first.times_down, times_down) != times_down {
                    first.header.forgotten();
                }
                first.header.is_due(now)
            }
        };
        let (socket, to, from) = match &connection.path {
            Path::Own(own) => {
                let to = (!own.is_connected).then_some(session.server.address.0);
                (RunSocket::Own(id), to, None)
            }
            Path::Shared { socket, source } => {
                let to = session.server.address.0;
                let from = SocketAddr::new(*source, 0);
                (RunSocket::Shared(*socket), Some(to), Some(from))
            }
        };
        let received = self.incoming.received(part.slot);
        let dscp = session.settings.dscp;
        let class = received.map_or(TrafficClass::default(), |r| r.class.passed(dscp));
        let looks_for_headers = connection.first.is_some();
        let queued = Queued {
            session: id,
            part,
            header: (0, 0),
            to,
            from,
            class,
        };
        let header = has_header.then_some((connection.mode, session.key()));
        self.run.now = now;
        let is_forged = |one: &Part| begins_as_header(self.incoming.first_of(*one));
        if !looks_for_headers || !part.singles().any(|one| is_forged(&one)) {
            self.push(socket, queued, header);
            return;
        }
        // The server would believe the client's own header where it has none of ours.
        let listener = Arc::clone(&session.settings.listener);
        for part in part.singles() {
            if begins_as_header(self.incoming.first_of(part)) {
                let counters = listener.counters(self.number);
                counters.dropped(DropReason::ForgedHeader).add(1);
            } else {
                self.push(socket, Queued { part, ..queued }, header);
            }
        }
    }

    /// Adds to the run; sends it first if it leaves by another socket or is full.
    fn push(&mut self, socket: RunSocket, mut queued: Queued, header: Option<(Mode, Key)>) {
        if self.run.socket != Some(socket) || self.run.queued.len() == BATCH {
            self.send_run();
            self.run.socket = Some(socket);
        }
        let Run {
            queued: before,
            headers,
            ..
        } = &mut self.run;
        queued.header = match (before.last(), header) {
            (_, None) => (0, 0),
            (Some(last), _) if last.session == queued.session => last.header,
            (_, Some((mode, key))) => {
                let place = before.len();
                let header = mode.write_header(key.client, key.local, &mut headers[place]);
                (place, header.len())
            }
        };
        before.push(queued);
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
            RunSocket::Shared(number) => self.shared_sockets.socket(number),
        };
        let mut unsent = [Unsent::default(); BATCH];
        let (run, table, worker) = (&self.run, &self.table, self.number);
        if let Some(socket) = socket {
            let outgoing = |index: usize| {
                let queued = &run.queued[index];
                let outgoing = Outgoing {
                    to: queued.to,
                    from: queued.from,
                    class: queued.class,
                    header: run.header_of(queued),
                };
                (queued.part, outgoing)
            };
            let fault = |index: usize, fault| {
                let (queued, unsent): (&Queued, _) = (&run.queued[index], &mut unsent[index]);
                let Some(session) = table.get(queued.session) else {
                    return;
                };
                match (fault, run_socket) {
                    (SendFault::Earlier(report), RunSocket::Own(_)) => {
                        unsent.is_refused = true;
                        count_report(session.server.counters(worker), &report);
                    }
                    // Its error queue tells whose datagram it was.
                    (SendFault::Earlier(_), RunSocket::Shared(_)) => {}
                    (
                        SendFault::Lost {
                            error,
                            datagrams,
                            len,
                        },
                        _,
                    ) => {
                        let reason = why_unsent(&error);
                        let counters = session.settings.listener.counters(worker);
                        counters.dropped(reason).add(datagrams as u64);
                        unsent.datagrams += datagrams;
                        unsent.bytes += datagrams * len;
                        unsent.lacks_route |= reason == DropReason::Unreachable;
                        if reason == DropReason::Oversize {
                            let (server, header) = (session.server.address, queued.header.1);
                            note_oversize(
                                &self.oversize_noted,
                                &self.counters,
                                server,
                                len,
                                header,
                            );
                        }
                    }
                }
            };
            socket.send(&self.incoming, run.queued.len(), outgoing, fault);
        }
        for (queued, unsent) in self.run.queued.drain(..).zip(unsent) {
            let Some(session) = self.table.get_mut(queued.session) else {
                continue;
            };
            let datagrams = queued.part.datagrams();
            let bytes = self.incoming.len_of(queued.part) + datagrams * queued.header.1;
            let sent = datagrams.saturating_sub(unsent.datagrams);
            let counters = session.server.counters(worker);
            counters.sent.add(sent as u64);
            counters
                .sent_bytes
                .add(bytes.saturating_sub(unsent.bytes) as u64);
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
    }
}

/// What became of queued datagrams that were not all sent.
#[derive(Clone, Copy, Default)]
struct Unsent {
    datagrams: usize,
    bytes: usize,
    /// The server refused an earlier one.
    is_refused: bool,
    /// There is no route, or the source address is gone.
    lacks_route: bool,
}

/// Why a datagram is dropped, by what is known of it alone.
fn refused(received: &Received) -> Option<DropReason> {
    if received.group {
        Some(DropReason::MulticastDestination)
    } else if received.truncated {
        Some(DropReason::Truncated)
    } else if received.peer.port() == 0 {
        Some(DropReason::BadSource)
    } else {
        None
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
