//! A worker: one thread that owns its sockets and its sessions.
//!
//! ```text
//! take_from_clients: receive a batch ─▶ whose session? ─▶ send to its server, prefixed
//! take_from_server:  receive a batch ─▶ whose session? ──────────▶ send to its client
//! ```
//!
//! What is shared with other workers is touched when a session begins or ends: the
//! number of free ones, of each client's, and who writes from a client's own port.
//! For each datagram, nothing is, but for the rates of clients where these are
//! bounded, which take no lock. The kernel spreads clients
//! over the workers' sockets (SO_REUSEPORT), always the same client to the same
//! worker.

mod at_once;
mod catch_up;
mod claims;
mod command;
mod follow;
mod link;
mod network;
mod onward;
mod open;
mod replies;
mod settings;
mod source;
mod supply;
mod tally;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::{Duration, Instant};

use slab::Slab;

use crate::address::{ClientAddr, ListenerAddr, ServerAddr};
use crate::counters::{DropReason, WorkerCounters};
use crate::session::{Amount, Budget, EndReason, Key, Session, SessionId, Table};
use crate::upstream::{Balancer, ByFamily, Steering};
use catch_up::CatchUp;
use link::{Exit, Link};
use onward::Onward;
use open::{OwnAddresses, ServerAddresses, refused};
use ppv2_udp::{
    BATCH, Batch, Outgoing, Part, READY, Readiness, Received, Socket, TrafficClass, Waker,
};
use replies::Replies;
use source::Source;
use supply::{Exhausted, Shortages};
use tally::{Ends, amount_of, newly_lost};

pub use claims::Claims;
pub use command::{Command, SessionReport};
pub use network::WrongInterfaces;
pub use settings::{Change, ListenerSettings, Pace, Setup, Share};
pub use tally::Ended;

/// A wake-up that brings fewer sources than this is worth waiting after, if
/// datagrams are to gather.
const FEW: usize = 16;

/// With so few sources, replies leave at once: there are no others for them to
/// leave with, and the sooner they do the better.
const ALONE: usize = 2;

/// How long after the last reply a stopping worker waits for another one, when
/// no session is known to await any.
const QUIET: Duration = Duration::from_millis(200);

/// How long a worker with ended sessions sleeps at most: others could need the sockets
/// that these hold.
const REST_LOOK: Duration = Duration::from_secs(1);

/// A socket that clients write to.
struct Entrance {
    socket: Socket,
    listener: usize,
    /// What the kernel said last of datagrams lost.
    overflows: u32,
    /// Sessions go on, none begins.
    is_closing: bool,
}

/// Datagrams of a batch that go to one session. Those that follow each other leave
/// in one call.
struct Run {
    session: Option<SessionId>,
    parts: Vec<Part>,
}

/// One thread's share of the proxy.
pub struct Worker {
    number: usize,
    readiness: Readiness,
    entrances: Slab<Entrance>,
    listeners: Vec<Arc<ListenerSettings>>,
    pace: Pace,
    /// By listener.
    balancers: Vec<ByFamily<Balancer>>,
    steering: Arc<Steering>,
    /// Numbers of listener and server between which sessions may no longer be.
    parted: BTreeSet<(usize, usize)>,
    /// Some session may have to go elsewhere.
    moves_any: bool,
    /// Whose turn it is among a server's source addresses.
    next_source: usize,
    /// Where there was no socket for a new session.
    shortages: Shortages,
    own: OwnAddresses,
    servers: ServerAddresses,
    /// Servers to which another socket would be sent from the same address.
    settled: Exhausted,
    /// Listeners and servers for which no other socket has a route. The sources of one
    /// listener say nothing of another's.
    routeless: Exhausted<(usize, usize)>,
    wrong_interfaces: Arc<WrongInterfaces>,
    /// When a datagram was last noted as oversize.
    oversize_noted: Cell<Option<Instant>>,
    table: Table<Link>,
    budget: Arc<Budget>,
    claims: Arc<Claims>,
    inbound: Batch,
    run: Run,
    replies: Replies,
    counters: Arc<WorkerCounters>,
    log: Option<SyncSender<Ended>>,
    commands: Receiver<Command>,
    draining: bool,
    catch_up: CatchUp,
    last_reply: Instant,
}

impl Worker {
    /// A worker with its share of the proxy. The [`Waker`] makes it look at its
    /// commands.
    ///
    /// # Errors
    ///
    /// Those of `epoll_create` and `epoll_ctl`.
    pub fn new(share: Share) -> io::Result<(Self, Waker)> {
        let Share {
            number,
            entrances,
            setup,
            budget,
            claims,
            commands,
        } = share;
        let Setup {
            listeners,
            steering,
            pace,
            counters,
            log,
        } = setup;
        let readiness = Readiness::new()?;
        let waker = readiness.waker();
        let mut all = Slab::new();
        for (socket, listener) in entrances {
            enter(&mut all, &readiness, socket, listener)?;
        }
        let now = Instant::now();
        let rules = listeners.iter().map(|listener| listener.rules).collect();
        let balancers = steering.plans.iter().map(|plans| {
            ByFamily::new(|v6| Balancer::new(Arc::clone(plans.get(v6)), number, random_seed()))
        });
        let servers = ServerAddresses::of(&listeners);
        let worker = Self {
            number,
            readiness,
            entrances: all,
            listeners,
            pace,
            balancers: balancers.collect(),
            parted: BTreeSet::new(),
            moves_any: steering.moves_any(),
            steering,
            next_source: number,
            shortages: Shortages::default(),
            own: OwnAddresses::default(),
            servers,
            settled: Exhausted::default(),
            routeless: Exhausted::default(),
            wrong_interfaces: Arc::default(),
            oversize_noted: Cell::default(),
            table: Table::new(now, rules).with_afterlife(Link::afterlife),
            budget,
            claims,
            inbound: Batch::default(),
            run: Run {
                session: None,
                parts: Vec::with_capacity(BATCH),
            },
            replies: Replies::new(),
            counters,
            log,
            commands,
            draining: false,
            catch_up: CatchUp::new(now),
            last_reply: now,
        };
        Ok((worker, waker))
    }

    /// Moves datagrams until told to stop.
    ///
    /// # Errors
    ///
    /// Those of `epoll_wait`, after which nothing can go on.
    pub fn run(mut self) -> io::Result<()> {
        let mut ready = Vec::with_capacity(READY);
        loop {
            let due = self.table.next_deadline();
            self.wait(&mut ready, due)?;
            let now = Instant::now();
            let may_expire = self.catch_up.may_expire(now, due, ready.is_empty());

            // Whatever is not taken to its end is reported again.
            let at_once = ready.len() <= ALONE;
            for key in ready.drain(..) {
                match Source::of_key(key) {
                    Source::Clients(entrance) => _ = self.take_from_clients(entrance, now),
                    Source::Server(id) => _ = self.take_from_server(id, now),
                }
                if at_once {
                    self.replies.send(&self.entrances, &self.counters);
                }
            }
            self.replies.send(&self.entrances, &self.counters);
            // What has come for a session may wait yet.
            if may_expire {
                self.expire(now);
            }
            if self.obey(now) || self.is_drained(now) {
                self.end_all(now);
                return Ok(());
            }
        }
    }

    /// Sleeps until something has come, or something is to be done; `ready` then
    /// has the keys of what has something to receive. Sessions are `due` to be looked at.
    fn wait(&self, ready: &mut Vec<u64>, due: Option<Instant>) -> io::Result<()> {
        if !self.pace.busy_poll.is_zero() {
            let begun = Instant::now();
            while begun.elapsed() < self.pace.busy_poll {
                if self.readiness.wait(Some(Duration::ZERO), ready)? {
                    return Ok(());
                }
            }
        }
        let left = due.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = if self.draining {
            Some(QUIET / 4)
        } else if self.table.retired() > 0 {
            left.map(|left| left.min(REST_LOOK))
        } else {
            left
        };
        self.readiness.wait(timeout, ready)?;
        if !self.pace.coalesce.is_zero() && (1..FEW).contains(&ready.len()) {
            std::thread::sleep(self.pace.coalesce);
            ready.clear();
            self.readiness.wait(Some(Duration::ZERO), ready)?;
        }
        Ok(())
    }

    /// Takes a batch from clients to their servers. True if there may be more.
    fn take_from_clients(&mut self, entrance: usize, now: Instant) -> bool {
        let Some(from) = self.entrances.get(entrance) else {
            return false;
        };
        let received = match from.socket.receive(&mut self.inbound, 0, BATCH) {
            Ok(received) => received,
            Err(error) => return error.kind() != io::ErrorKind::WouldBlock,
        };
        self.note_overflows(entrance, received);
        for slot in 0..received {
            let mut rest = self.inbound.whole(slot);
            while rest.datagrams() > 0 {
                let part = self.cut(entrance, &mut rest);
                let Some(id) = self.session_of(entrance, part, now) else {
                    continue;
                };
                // Of one session there is one part of each slot, unless it takes
                // more than it may, for want of another.
                if self.run.session != Some(id) || self.run.parts.len() == BATCH {
                    self.send_to_server();
                    self.run.session = Some(id);
                }
                self.run.parts.push(part);
            }
        }
        self.send_to_server();
        received == BATCH
    }

    fn note_overflows(&mut self, entrance: usize, received: usize) {
        let latest = received
            .checked_sub(1)
            .and_then(|slot| self.inbound.received(slot));
        let entrance = &mut self.entrances[entrance];
        let lost = latest.map_or(0, |latest| newly_lost(&mut entrance.overflows, &latest));
        let counters = &self.counters.listeners[entrance.listener];
        counters.overflows.add(lost);
    }

    /// Cuts off the front of `rest` what one session may take: all, unless a burst
    /// has come in one piece where requests are counted.
    fn cut(&self, entrance: usize, rest: &mut Part) -> Part {
        let listener = self.entrances[entrance].listener;
        let counts = self.listeners[listener].rules.count_requests();
        let received = self.inbound.received(rest.slot);
        let Some(received) = received.filter(|_| counts && rest.datagrams() > 1) else {
            return rest.take(usize::MAX);
        };
        let room = self.table.room(&key_of(&received), listener);
        rest.take(usize::try_from(room).unwrap_or(usize::MAX))
    }

    /// The session of the client's datagrams in `part`, begun if need be. `None`
    /// if they are dropped, which is counted.
    fn session_of(&mut self, entrance: usize, part: Part, now: Instant) -> Option<SessionId> {
        let received = self.inbound.received(part.slot)?;
        let listener = self.entrances[entrance].listener;
        let counters = &self.counters.listeners[listener];
        let amount = Amount {
            datagrams: part.datagrams() as u64,
            bytes: self.inbound.len_of(part) as u64,
        };
        counters.received.add(amount.datagrams);
        counters.received_bytes.add(amount.bytes);
        let key = key_of(&received);
        let found = match refused(&received) {
            Some(reason) => Err(reason),
            None if self.draining => Err(DropReason::Stopping),
            None if self.is_too_fast(listener, &key, amount, now) => Err(DropReason::ClientRate),
            None => match self.stay(&key, amount, now) {
                Some(id) => Ok(id),
                None => {
                    // Beginning one may end another, which what was collected
                    // may be of.
                    self.send_to_server();
                    match self.open(entrance, key, now) {
                        Ok(id) => Ok(self.table.count(now, id, amount)),
                        Err(reason) => self.overdraw(&key, amount, now).ok_or(reason),
                    }
                }
            },
        };
        let counters = &self.counters.listeners[listener];
        found
            .inspect_err(|reason| counters.dropped(*reason).add(amount.datagrams))
            .ok()
    }

    /// The client's session that takes its datagrams, unless there is none or it
    /// has to end, since its server is to be left.
    fn stay(&mut self, key: &Key, amount: Amount, now: Instant) -> Option<SessionId> {
        if self.moves_any
            && let Some(id) = self.table.find(key)
            && self.is_to_move(id)
        {
            // What was collected may be of it.
            self.send_to_server();
            self.end(now, id, EndReason::Moved);
            return None;
        }
        self.table.request(now, key, amount)
    }

    /// Sends the collected run to its session's server.
    fn send_to_server(&mut self) {
        let Run { session, parts } = &mut self.run;
        if let Some(session) = session.take().and_then(|id| self.table.get_mut(id)) {
            let Link {
                exit,
                server,
                prefix,
                ..
            } = &mut session.link;
            let (socket, is_connected) = exit.socket();
            let counters = &self.counters.servers[session.server];
            let onward = Onward {
                batch: &self.inbound,
                socket,
                to: *server,
                is_connected,
                dscp: self.listeners[session.listener].dscp,
                oversize_noted: &self.oversize_noted,
                all: &self.counters.own,
                listener: &self.counters.listeners[session.listener],
                server: counters,
                lacks_route: Cell::new(false),
            };
            let (now, refusals) = (session.last_active, counters.refusals.get());
            let may_be_absent = prefix.may_be_absent();
            let header = prefix.bytes(now);
            let sent = if may_be_absent {
                onward.send_unforged(header, parts)
            } else {
                onward.send(header, parts)
            };
            if sent > 0 {
                prefix.went_out(now);
            }
            if counters.refusals.get() != refusals {
                prefix.forgotten();
            }
            if onward.lacks_route.get() {
                session.needs_socket |= network::may_need_socket(&session.link, &self.settled);
            }
        }
        parts.clear();
    }

    /// Takes some replies from a session's own socket, to leave at the end of the
    /// round. Returns how many, bursts counted as one.
    fn take_from_server(&mut self, id: SessionId, now: Instant) -> usize {
        if self.replies.is_full() {
            self.replies.send(&self.entrances, &self.counters);
        }
        let Some(session) = self.table.get_mut(id) else {
            return 0;
        };
        let Exit::Own(from) = &mut session.link.exit else {
            return 0;
        };
        let listener = session.listener;
        let server = &self.counters.servers[session.server];
        let refusals = server.refusals.get();
        let slots = self.replies.receive(from, server);
        if server.refusals.get() != refusals {
            session.link.prefix.forgotten();
        }
        for slot in slots.clone() {
            self.pass(slot, id, listener, now);
        }
        slots.len()
    }

    /// Has the replies in `slot`, which came to a socket of this listener's, go to
    /// the client of session `id`, if they came from the server that was asked.
    fn pass(&mut self, slot: usize, id: SessionId, listener: usize, now: Instant) {
        let Some(reply) = self.replies.batch().received(slot) else {
            return;
        };
        let amount = amount_of(&reply);
        let datagrams = amount.datagrams;
        let Some(session) = self.table.get_mut(id) else {
            let late = self.counters.listeners[listener].dropped(DropReason::ReplyLate);
            return late.add(datagrams);
        };
        self.last_reply = now;
        let (asked, via) = (session.link.server, session.link.via);
        let listener = &self.counters.listeners[session.listener];
        if reply.interface != session.link.ingress {
            if network::is_wrong(&self.wrong_interfaces, asked, reply.interface) {
                let wrong = listener.dropped(DropReason::ReplyWrongInterface);
                return wrong.add(datagrams);
            }
            session.link.ingress = reply.interface;
        }
        let server = &self.counters.servers[session.server];
        server.replies.add(datagrams);
        server.reply_bytes.add(amount.bytes);
        // The kernel filters by the connected address, but only from the moment
        // that the socket was connected.
        if ServerAddr(reply.peer) != asked {
            let wrong = listener.dropped(DropReason::ReplyWrongSource);
            return wrong.add(datagrams);
        }
        session.link.prefix.answered();
        let ends = Ends::of(&self.counters, &self.listeners, self.log.as_ref());
        let ended = |session: &Session<_>, reason| ends.note(session, reason);
        let Some(whose) = self.table.reply(now, id, amount, ended) else {
            return listener.dropped(DropReason::ReplyLate).add(datagrams);
        };
        if whose.exceeds {
            listener.amplified.add(datagrams);
            let bound = self.listeners[whose.listener].rules.amplification;
            if bound.is_some_and(|bound| bound.enforce) {
                return listener.dropped(DropReason::ReplyAmplified).add(datagrams);
            }
        }
        let outgoing = Outgoing {
            to: Some(whose.to.0),
            from: Some(whose.from.0),
            class: class_of(self.listeners[whose.listener].dscp, reply.class),
            header: &[],
        };
        self.replies.pass(slot, via, outgoing);
    }

    fn expire(&mut self, now: Instant) {
        let ends = Ends::of(&self.counters, &self.listeners, self.log.as_ref());
        self.table.expire(
            now,
            |session, reason| ends.note(session, reason),
            |session| self.replies.are_none_late(session, &self.counters),
        );
        self.close_leaving(now);
        self.close_rested(now);
        let counters = &self.counters.own;
        counters.retired.set(self.table.retired() as u64);
        counters.reclaimed.set(self.table.reclaimed());
        counters.renewed.set(self.table.renewed());
    }
}

/// Takes from `socket`, for this listener, from now on.
fn enter(
    entrances: &mut Slab<Entrance>,
    readiness: &Readiness,
    socket: Socket,
    listener: usize,
) -> io::Result<()> {
    let entry = entrances.vacant_entry();
    readiness.register(&socket, Source::Clients(entry.key()).key())?;
    entry.insert(Entrance {
        socket,
        listener,
        overflows: 0,
        is_closing: false,
    });
    Ok(())
}

fn key_of(received: &Received) -> Key {
    Key {
        client: ClientAddr(received.peer),
        local: ListenerAddr(received.local),
    }
}

/// A number that nobody outside can foresee.
fn random_seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// What of a datagram's traffic class passes.
fn class_of(dscp: bool, class: TrafficClass) -> TrafficClass {
    if dscp { class } else { class.ecn() }
}
