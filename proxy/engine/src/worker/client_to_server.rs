//! From clients to servers: a batch of datagrams is received, each is checked, its session
//! is found or begun, and all that go to one session leave in one call.

use std::cell::Cell;
use std::io;
use std::time::{Duration, Instant};

use ppv2_udp::{BATCH, Batch, Cause, Outgoing, Part, Received, SendFault, Socket, TrafficClass};

use super::{Worker, reconfigure};
use crate::address::ServerAddr;
use crate::counters::{
    DropReason, EndReason, ListenerCounters, Oversize, ServerCounters, WorkerCounters,
};
use crate::session::{Amount, Key, SessionId};

/// How long no other datagram is noted as oversize, which takes a lock.
const OVERSIZE_PAUSE: Duration = Duration::from_secs(1);

/// Sessions of a client that may have to leave their server while one is looked for that
/// takes more than it may.
const MOVES: usize = 4;

/// Datagrams of a batch that go to one session. Those that follow each other leave
/// in one call.
pub(super) struct Run {
    session: Option<SessionId>,
    parts: Vec<Part>,
}

impl Default for Run {
    fn default() -> Self {
        Self {
            session: None,
            parts: Vec::with_capacity(BATCH),
        }
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
                // A session has one part of each slot, unless it takes more than it may
                // since no other could be begun.
                if self.run.session != Some(id) || self.run.parts.len() == BATCH {
                    self.send_run();
                    self.run.session = Some(id);
                }
                self.run.parts.push(part);
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
                None => {
                    // Beginning one may end another, which the collected datagrams may be
                    // of.
                    self.send_run();
                    match self.new_session(number, key, now) {
                        Ok(id) => Ok(self.table.count(now, id, amount)),
                        Err(reason) => self.overdraw(&key, amount, now).ok_or(reason),
                    }
                }
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
            // The collected datagrams may be of it.
            self.send_run();
            self.table.end(now, id, EndReason::Moved);
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
        let v6 = session.key.client.0.is_ipv6();
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
        let home = listener.routing.plans.get(v6).home(session.key.client);
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
            self.table.end(now, id, EndReason::Moved);
        }
        None
    }

    /// Sends the collected datagrams to their session's server.
    pub(super) fn send_run(&mut self) {
        let Run { session, parts } = &mut self.run;
        if let Some(session) = session.take().and_then(|id| self.table.get_mut(id)) {
            let now = session.last_active;
            let (server, connection) = (&session.server, &mut session.connection);
            let counters = server.counters(self.number);
            let forward = Forward {
                batch: &self.incoming,
                socket: &connection.socket.socket,
                to: server.address,
                is_connected: connection.socket.is_connected,
                dscp: session.settings.dscp,
                oversize_noted: &self.oversize_noted,
                worker: &self.counters,
                listener: session.settings.listener.counters(self.number),
                server: counters,
                lacks_route: Cell::new(false),
            };
            let refusals = counters.refusals.get();
            let prefix = &mut connection.prefix;
            let sent = if prefix.may_be_absent() {
                let times_down = server.times_down();
                if std::mem::replace(&mut connection.times_down, times_down) != times_down {
                    prefix.forgotten();
                }
                forward.send_unforged(prefix.bytes(now), parts)
            } else {
                forward.send(prefix.bytes(now), parts)
            };
            if sent > 0 {
                prefix.went_out(now);
            }
            if counters.refusals.get() != refusals {
                prefix.forgotten();
            }
            if forward.lacks_route.get() {
                session.needs_socket |= reconfigure::may_need_socket(session, &self.settled);
            }
        }
        parts.clear();
    }
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

/// Where datagrams are taken from and sent to, and where they are counted.
struct Forward<'a> {
    batch: &'a Batch,
    socket: &'a Socket,
    to: ServerAddr,
    is_connected: bool,
    dscp: bool,
    oversize_noted: &'a Cell<Option<Instant>>,
    worker: &'a WorkerCounters,
    listener: &'a ListenerCounters,
    server: &'a ServerCounters,
    /// Something could not be sent because there is no route, or the source address is gone.
    lacks_route: Cell<bool>,
}

impl Forward<'_> {
    /// Sends `parts`, each datagram with `header` in front. Returns how many were sent.
    fn send(&self, header: &[u8], parts: &[Part]) -> usize {
        let to = (!self.is_connected).then_some(self.to.0);
        let outgoing = |index: usize| {
            let part = parts[index];
            let outgoing = Outgoing {
                to,
                from: None,
                class: self.class(part.slot),
                header,
            };
            (part, outgoing)
        };
        let socket = self.socket;
        let sent = socket.send(self.batch, parts.len(), outgoing, |_, fault| match fault {
            SendFault::Earlier(report) => count_report(self.server, &report),
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
    fn send_unforged(&self, header: &[u8], parts: &[Part]) -> usize {
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
        received.map_or(TrafficClass::default(), |r| r.class.passed(self.dscp))
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
        if let Ok(mut latest) = self.worker.oversize.try_lock() {
            *latest = Some(noted);
        }
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
