//! Where a new session's socket comes from: a new one, or that of an ended session
//! whose port has rested; and which ended sessions are closed when there is no other
//! port.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::link::{Exit, Link, Ports, ServerSocket, in_name_of, is_shortage, why_unopened};
use super::{Worker, network};
use crate::address::ServerAddr;
use crate::counters::DropReason;
use crate::session::{Full, Key, Need, Seat, Session, SessionId};
use crate::upstream::Server;
use ppv2_udp::{Cause, Socket};

/// How long no socket is looked for where there was none. To find out that all ports
/// are taken costs the kernel a millisecond, which the clients that have a session
/// would wait for.
const SHORTAGE: Duration = Duration::from_millis(20);

/// How long no other port is looked for of a client that has used up its own.
const EXHAUSTED: Duration = Duration::from_millis(500);

/// Ended sessions that a new one looks at before it is refused: each takes a system
/// call to learn whether a late reply waits there.
const LOOKS: usize = 4;

/// Sessions that a new one has closed at most to get a port.
const CLOSES: usize = 16;

/// Ended sessions that are closed at most before datagrams have their turn again.
const CLOSES_AT_ONCE: usize = 64;

/// How long ended sessions are not looked through again after none could be closed.
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// How often a socket that is about to be closed is read, some dozens of replies each
/// time: as many as its buffer can hold.
const LOOKS_AT_LEAVING: usize = 48;

/// Where sockets have run out, and until when not to try there again.
#[derive(Default)]
pub(super) struct Shortages {
    /// Of what all sessions need: descriptors, memory, sockets of the budget.
    common: Option<(DropReason, Instant)>,
    /// Local ports. As many as configured addresses and families, since a client's
    /// are kept elsewhere.
    ports: HashMap<Ports, Instant>,
    clients: Exhausted,
    /// When to look again for ended sessions to close.
    look_at: Option<Instant>,
}

impl Shortages {
    fn common(&self, now: Instant) -> Result<(), DropReason> {
        match self.common {
            Some((reason, until)) if now < until => Err(reason),
            _ => Ok(()),
        }
    }

    fn is_out_of(&self, ports: Ports, now: Instant) -> bool {
        self.ports.get(&ports).is_some_and(|until| now < *until)
    }
}

/// What is not to be tried again, and until when: such as addresses of clients of which
/// all ports are taken, where to find out that there is none costs the kernel
/// milliseconds. As many as can have used up their ports at a time.
pub(super) struct Exhausted<T = IpAddr> {
    noted: [Option<(T, Instant)>; 16],
    next: usize,
}

impl<T: Copy> Default for Exhausted<T> {
    fn default() -> Self {
        Self {
            noted: [None; 16],
            next: 0,
        }
    }
}

impl<T: Copy + PartialEq> Exhausted<T> {
    pub(super) fn contains(&self, what: T, now: Instant) -> bool {
        let is_it = |(noted, until): &(T, Instant)| *noted == what && now < *until;
        self.noted.iter().flatten().any(is_it)
    }

    pub(super) fn note(&mut self, what: T, until: Instant) {
        self.noted[self.next] = Some((what, until));
        self.next = (self.next + 1) % self.noted.len();
    }
}

/// What a new session gets: the right to a session, a socket, and whether that socket
/// is watched already.
pub(super) type Supplied = (Seat, Exit, bool);

impl Worker {
    /// A socket for a new session of this listener and server.
    pub(super) fn supply(
        &mut self,
        key: &Key,
        listener: usize,
        server: &Server,
        now: Instant,
    ) -> Result<Supplied, DropReason> {
        if self.budget.is_full() {
            return Err(DropReason::MaxSessions);
        }
        // What is bound to a client's address, or not heard, is of use to no other.
        let pair = (!server.mode.spoofs() && server.mode.takes_replies())
            .then_some((listener, server.number));
        if let Some(kept) = self.take_over(pair, self.budget.need(), now) {
            return kept;
        }
        if let Err(reason) = self.is_short(key, server, now) {
            return self.take_over(pair, Need::Now, now).unwrap_or(Err(reason));
        }
        if self.budget.has_sockets() {
            match self.make(key, listener, server, now) {
                Ok(exit) => return Ok((self.seat(now)?, exit, false)),
                Err(reason) if !is_shortage(reason, server) => return Err(reason),
                Err(_) => {}
            }
        }
        // What is answered is better reused than closed.
        if let Some(kept) = self.take_over(pair, Need::Now, now) {
            return kept;
        }
        Ok((
            self.seat(now)?,
            self.exit(key, listener, server, now)?,
            false,
        ))
    }

    /// The right to a session, for which an ended one may be closed.
    pub(super) fn seat(&mut self, now: Instant) -> Result<Seat, DropReason> {
        match self.budget.take() {
            Ok(seat) => Ok(seat),
            Err(Full::Sessions) => Err(DropReason::MaxSessions),
            Err(Full::Sockets) => {
                if !self.close_one(Need::Now, now, |_| true) {
                    self.shortages.common = Some((DropReason::NoPorts, now + SHORTAGE));
                    return Err(DropReason::NoPorts);
                }
                self.budget.take().map_err(why_full)
            }
        }
    }

    /// A new socket for a session to `server`, for which ended ones may be closed.
    pub(super) fn exit(
        &mut self,
        key: &Key,
        listener: usize,
        server: &Server,
        now: Instant,
    ) -> Result<Exit, DropReason> {
        for _ in 0..CLOSES {
            let reason = match self.make(key, listener, server, now) {
                Ok(exit) => return Ok(exit),
                Err(reason) if is_shortage(reason, server) => reason,
                Err(reason) => return Err(reason),
            };
            let helps = |session: &Session<Link>| {
                let own = session.link.exit.ports();
                if reason == DropReason::NoPorts {
                    Ports::of_server(server).any(|ports| ports == own)
                } else {
                    reason != DropReason::NoClientPort || own == Ports::of_client(key.client)
                }
            };
            if !self.close_one(Need::Now, now, helps) {
                self.note_shortage(reason, key, now);
                return Err(reason);
            }
        }
        Err(DropReason::NoPorts)
    }

    /// The socket of the ended session of this listener and server that has rested for
    /// longest, if it may be used again.
    fn take_over(
        &mut self,
        pair: Option<(usize, usize)>,
        need: Need,
        now: Instant,
    ) -> Option<Result<Supplied, DropReason>> {
        let (listener, server) = pair?;
        for _ in 0..LOOKS {
            let id = self.table.reusable(now, listener, server, need)?;
            if self.is_silent(id, now)
                && let Some((seat, link)) = self.table.take(now, id)
            {
                let seat = seat.renew().map_err(why_full);
                return Some(seat.map(|seat| (seat, link.exit, true)));
            }
        }
        None
    }

    /// Closes the ended session, of those that match, whose port may be used again
    /// best. False if there is none.
    fn close_one(
        &mut self,
        need: Need,
        now: Instant,
        matches: impl Fn(&Session<Link>) -> bool,
    ) -> bool {
        for _ in 0..LOOKS {
            let Some(id) = self.table.closable(now, need, &matches) else {
                return false;
            };
            if self.is_silent(id, now)
                && let Some((_, link)) = self.table.take(now, id)
            {
                self.shortages.ports.remove(&link.exit.ports());
                return true;
            }
        }
        false
    }

    /// Closes ended sessions that have rested, where other sessions, perhaps of other
    /// workers, need what they hold; and those never answered, where they keep new
    /// clients out.
    pub(super) fn close_rested(&mut self, now: Instant) {
        let budget = Arc::clone(&self.budget);
        let is_needed = || budget.is_nearly_used_up() || budget.is_crowded();
        if !is_needed() || self.shortages.look_at.is_some_and(|at| now < at) {
            return;
        }
        for _ in 0..CLOSES_AT_ONCE {
            if !is_needed() {
                return;
            }
            let is_crowded = budget.is_crowded();
            let helps = |session: &Session<Link>| !is_crowded || session.replies == 0;
            if !self.close_one(Need::Supply, now, helps) {
                self.shortages.look_at = Some(now + LOOK_PAUSE);
                return;
            }
        }
    }

    /// Closes what has ended and doesn't rest, once what waits there has been read.
    pub(super) fn close_leaving(&mut self, now: Instant) {
        while let Some(id) = self.table.next_leaving() {
            (0..LOOKS_AT_LEAVING).any(|_| self.is_silent(id, now));
            self.table.take(now, id);
        }
    }

    /// Reads and counts what waits in the socket of a session that has ended, whose
    /// rest restarts if that is anything. True if it is nothing.
    pub(super) fn is_silent(&mut self, id: SessionId, now: Instant) -> bool {
        if self.replies.is_full() {
            self.replies.send(&self.entrances, &self.counters);
        }
        let Some(session) = self.table.get(id) else {
            return true;
        };
        let is_silent = self.replies.are_none_late(session, &self.counters);
        if !is_silent {
            self.table.hear(now, id);
        }
        is_silent
    }

    /// Why no socket is looked for at present, if there was none a moment ago.
    pub(super) fn is_short(
        &self,
        key: &Key,
        server: &Server,
        now: Instant,
    ) -> Result<(), DropReason> {
        self.shortages.common(now)?;
        match server.mode.source(key.client) {
            Some(source) if source.port() == 0 => {
                let client = source.ip();
                if self.shortages.clients.contains(client, now) {
                    return Err(DropReason::NoClientPort);
                }
            }
            Some(_) => {}
            None => {
                if Ports::of_server(server).all(|ports| self.shortages.is_out_of(ports, now)) {
                    return Err(DropReason::NoPorts);
                }
            }
        }
        Ok(())
    }

    fn note_shortage(&mut self, reason: DropReason, key: &Key, now: Instant) {
        if reason == DropReason::NoClientPort {
            let client = key.client.0.ip();
            self.shortages.clients.note(client, now + EXHAUSTED);
        } else if reason != DropReason::NoPorts {
            // A shortage of ports is noted where they are looked for.
            self.shortages.common = Some((reason, now + SHORTAGE));
        }
    }

    /// Makes a socket for a session to `server`.
    fn make(
        &mut self,
        key: &Key,
        listener: usize,
        server: &Server,
        now: Instant,
    ) -> Result<Exit, DropReason> {
        let options = self.listeners[listener].exit_options();
        let exit = if server.mode.spoofs() {
            in_name_of((now, key), server, &self.claims, options)?
        } else {
            let (socket, ports) = self.connect(listener, server, now)?;
            if server.mode.takes_replies() {
                Exit::Own(ServerSocket::new(socket, ports))
            } else {
                socket.ignore_replies();
                Exit::Unheard {
                    socket,
                    is_connected: true,
                    ports,
                }
            }
        };
        network::ask_for_interface(&self.wrong_interfaces, &exit, server.address);
        Ok(exit)
    }

    /// Opens a socket from the server's source addresses in turn.
    fn connect(
        &mut self,
        listener: usize,
        server: &Server,
        now: Instant,
    ) -> Result<(Socket, Ports), DropReason> {
        let options = self.listeners[listener].exit_options();
        let ServerAddr(address) = server.address;
        self.next_source = self.next_source.wrapping_add(1);
        let choices = server.sources.len().max(1);
        let mut reason = DropReason::Unreachable;
        for choice in 0..choices {
            let number = self.next_source.wrapping_add(choice) % choices;
            let source = server.sources.get(number).copied();
            let ports = Ports::of_host(source, server.address);
            if self.shortages.is_out_of(ports, now) {
                reason = DropReason::NoPorts;
                continue;
            }
            match Socket::connect(address, source, options) {
                Ok(socket) => return Ok((socket, ports)),
                Err(error) => reason = why_unopened(Cause::of(&error)),
            }
            // Another source has ports of its own, and perhaps a route.
            if reason == DropReason::NoPorts {
                self.shortages.ports.insert(ports, now + SHORTAGE);
            } else if [DropReason::NoDescriptors, DropReason::NoMemory].contains(&reason) {
                break;
            }
        }
        Err(reason)
    }
}

fn why_full(full: Full) -> DropReason {
    match full {
        Full::Sessions => DropReason::MaxSessions,
        Full::Sockets => DropReason::NoPorts,
    }
}
