//! Where a new session's socket comes from: one that sessions share, a new one, or that of
//! an ended session whose port has rested; and which ended sessions are closed when there is no
//! other port.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ppv2_udp::Options;

use super::{Worker, WrongInterfaces};
use crate::address::ServerAddr;
use crate::capacity::{Full, Need, Permit};
use crate::counters::DropReason;
use crate::listener::ListenerSettings;
use crate::server::Target;
use crate::session::{Key, Session, SessionId};
use crate::upstream_socket::{Connection, Path, PortPool, UpstreamSocket, is_shortage};

/// How long no socket is looked for where there was none. To find out that all ports
/// are taken costs the kernel a millisecond, which the clients that have a session
/// would wait for.
const SHORTAGE: Duration = Duration::from_millis(20);

/// How long no other port is looked for of a client that has used up its own.
const EXHAUSTED: Duration = Duration::from_millis(500);

/// Ended sessions that a new one looks at before it is refused: each takes a system
/// call to learn whether a late reply waits there.
const LOOKS: usize = 4;

/// The most ended sessions that a new one has closed to get a port.
const CLOSES: usize = 16;

/// The most ended sessions that are closed before datagrams have their turn again.
const CLOSES_AT_ONCE: usize = 64;

/// How long ended sessions are not looked through again after none could be closed.
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// How often a socket that is about to be closed is read, some dozens of replies each
/// time: as many as its buffer can hold.
const LAST_LOOKS: usize = 48;

/// Where sockets have run out, and until when not to try there again.
#[derive(Default)]
pub(super) struct Shortages {
    /// Of what all sessions need: descriptors, memory, sockets that there may be.
    common: Option<(DropReason, Instant)>,
    /// Local ports. As many as configured addresses and families, since a client's
    /// are kept elsewhere.
    pools: HashMap<PortPool, Instant>,
    clients: Recent<IpAddr>,
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

    fn is_out_of(&self, pool: PortPool, now: Instant) -> bool {
        self.pools.get(&pool).is_some_and(|until| now < *until)
    }
}

/// What was tried in vain and is not tried again for a while: such as addresses of clients
/// of which all ports are taken, where to find out that there is none costs the kernel
/// milliseconds. As many as can have used up their ports at a time.
pub(super) struct Recent<T> {
    noted: [Option<(T, Instant)>; 16],
    next: usize,
}

impl<T: Copy> Default for Recent<T> {
    fn default() -> Self {
        Self {
            noted: [None; 16],
            next: 0,
        }
    }
}

impl<T: Copy + PartialEq> Recent<T> {
    pub(super) fn contains(&self, what: T, now: Instant) -> bool {
        let is_it = |(noted, until): &(T, Instant)| *noted == what && now < *until;
        self.noted.iter().flatten().any(is_it)
    }

    /// What was noted lately and matches.
    pub(super) fn find(&self, now: Instant, matches: impl Fn(&T) -> bool) -> Option<T> {
        let mut valid = self
            .noted
            .iter()
            .flatten()
            .filter(|(_, until)| now < *until);
        valid.find_map(|(noted, _)| matches(noted).then_some(*noted))
    }

    pub(super) fn note(&mut self, what: T, until: Instant) {
        self.noted[self.next] = Some((what, until));
        self.next = (self.next + 1) % self.noted.len();
    }
}

/// What a new session gets.
pub(super) struct NewPath {
    pub(super) permit: Permit,
    pub(super) path: Path,
    /// The worker waits for replies there already.
    pub(super) is_watched: bool,
}

impl Worker {
    /// The socket for a new session of this listener and server.
    pub(super) fn new_path(
        &mut self,
        key: &Key,
        settings: &ListenerSettings,
        target: &Target,
        now: Instant,
    ) -> Result<NewPath, DropReason> {
        if self.capacity.is_full() {
            return Err(DropReason::MaxSessions);
        }
        if Connection::shares_socket(target, key) {
            // First, since an address that is not used after all would have to be given back.
            let permit = self.permit(now)?;
            return Ok(NewPath {
                permit,
                path: self.shared_path(key, settings, target, now)?,
                is_watched: false,
            });
        }
        // What is bound to a client's address, or not heard, is of use to no other.
        // Nor is one that is connected to the port that a former client wrote to.
        let is_reusable =
            !target.mode.spoofs() && target.mode.takes_replies() && !target.server.has_same_port();
        let pair = is_reusable.then_some((settings, target));
        if let Some(kept) = self.take_over(pair, self.capacity.need(), now) {
            return kept;
        }
        if let Err(reason) = self.is_short(key, target, now) {
            return self.take_over(pair, Need::Now, now).unwrap_or(Err(reason));
        }
        if self.capacity.has_sockets() {
            match self.make(key, settings, target, now) {
                Ok(socket) => {
                    return Ok(NewPath {
                        permit: self.permit(now)?,
                        path: Path::Own(Box::new(socket)),
                        is_watched: false,
                    });
                }
                Err(reason) if !is_shortage(reason, target) => return Err(reason),
                Err(_) => {}
            }
        }
        // What is answered is better reused than closed.
        if let Some(kept) = self.take_over(pair, Need::Now, now) {
            return kept;
        }
        let permit = self.permit(now)?;
        let socket = self.new_socket(key, settings, target, now)?;
        Ok(NewPath {
            permit,
            path: Path::Own(Box::new(socket)),
            is_watched: false,
        })
    }

    /// The path of a new session that has no socket of its own.
    pub(super) fn shared_path(
        &mut self,
        key: &Key,
        settings: &ListenerSettings,
        target: &Target,
        now: Instant,
    ) -> Result<Path, DropReason> {
        match target.sources.network() {
            Some(network) if !Connection::shares_tagged_socket(target, key) => {
                self.network_path(settings, target, network, now)
            }
            _ => {
                let socket = self.tagged_socket(settings, target, now)?;
                Ok(Path::Tagged { socket })
            }
        }
    }

    /// The permit for a session, for which an ended one may be closed.
    pub(super) fn permit(&mut self, now: Instant) -> Result<Permit, DropReason> {
        match self.capacity.take() {
            Ok(permit) => Ok(permit),
            Err(Full::Sessions) => Err(DropReason::MaxSessions),
            Err(Full::Sockets) => {
                if !self.close_one(Need::Now, now, |_| true) {
                    self.shortages.common = Some((DropReason::NoPorts, now + SHORTAGE));
                    return Err(DropReason::NoPorts);
                }
                self.capacity.take().map_err(why_full)
            }
        }
    }

    /// A new socket for a session to `server`, for which ended ones may be closed.
    pub(super) fn new_socket(
        &mut self,
        key: &Key,
        settings: &ListenerSettings,
        target: &Target,
        now: Instant,
    ) -> Result<UpstreamSocket, DropReason> {
        for _ in 0..CLOSES {
            let reason = match self.make(key, settings, target, now) {
                Ok(socket) => return Ok(socket),
                Err(reason) if is_shortage(reason, target) => reason,
                Err(reason) => return Err(reason),
            };
            let helps = |session: &Session<Connection>| {
                let Some(own) = session.connection.own_socket() else {
                    return false;
                };
                let pool = own.pool;
                if reason == DropReason::NoPorts {
                    PortPool::of_target(target).any(|of_target| of_target == pool)
                } else {
                    reason != DropReason::ClientPortInUse || pool == PortPool::of_client(key.client)
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
        pair: Option<(&ListenerSettings, &Target)>,
        need: Need,
        now: Instant,
    ) -> Option<Result<NewPath, DropReason>> {
        let (settings, target) = pair?;
        for _ in 0..LOOKS {
            let (listener, server) = (&settings.listener, &target.server);
            let id = self.table.reusable(now, listener, server, need)?;
            if self.is_silent(id, now)
                && let Some((permit, connection)) = self.table.take(now, id)
            {
                return Some(match permit.renew() {
                    Ok(permit) => Ok(NewPath {
                        permit,
                        path: connection.path,
                        is_watched: true,
                    }),
                    Err(full) => {
                        self.unwatch(&connection.path);
                        Err(why_full(full))
                    }
                });
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
        matches: impl Fn(&Session<Connection>) -> bool,
    ) -> bool {
        for _ in 0..LOOKS {
            let Some(id) = self.table.closable(now, need, &matches) else {
                return false;
            };
            if self.is_silent(id, now)
                && let Some((_, connection)) = self.table.take(now, id)
            {
                if let Some(own) = connection.own_socket() {
                    self.shortages.pools.remove(&own.pool);
                }
                self.unwatch(&connection.path);
                self.shared_sockets.end(&connection.path, now);
                return true;
            }
        }
        false
    }

    /// Closes ended sessions that have rested, where other sessions, perhaps of other
    /// workers, need what they hold; and those never answered, where they keep new
    /// clients out.
    pub(super) fn close_rested(&mut self, now: Instant) {
        let capacity = Arc::clone(&self.capacity);
        let is_needed = || capacity.is_nearly_used_up() || capacity.is_flooded();
        if !is_needed() || self.shortages.look_at.is_some_and(|at| now < at) {
            return;
        }
        for _ in 0..CLOSES_AT_ONCE {
            if !is_needed() {
                return;
            }
            let is_flooded = capacity.is_flooded();
            let helps = |session: &Session<Connection>| !is_flooded || session.replies == 0;
            if !self.close_one(Need::Supply, now, helps) {
                self.shortages.look_at = Some(now + LOOK_PAUSE);
                return;
            }
        }
    }

    /// Closes what has ended and doesn't rest, once what waits there has been read.
    pub(super) fn close_ended(&mut self, now: Instant) {
        while let Some(id) = self.table.next_to_close() {
            (0..LAST_LOOKS).any(|_| self.is_silent(id, now));
            if let Some((_, connection)) = self.table.take(now, id) {
                self.unwatch(&connection.path);
            }
        }
    }

    /// Reads and counts what waits in the socket of a session that has ended, whose
    /// rest restarts if that is anything. True if it is nothing.
    pub(super) fn is_silent(&mut self, id: SessionId, now: Instant) -> bool {
        if self.replies.is_full() {
            self.replies.send(&self.listener_sockets);
        }
        let Some(session) = self.table.get(id) else {
            return true;
        };
        let is_silent = self.replies.are_none_late(session);
        if !is_silent {
            self.table.hear(now, id);
        }
        is_silent
    }

    /// Why no socket is looked for at present, if there was none a moment ago.
    pub(super) fn is_short(
        &self,
        key: &Key,
        target: &Target,
        now: Instant,
    ) -> Result<(), DropReason> {
        self.shortages.common(now)?;
        match target.mode.source(key.client) {
            Some(source) if source.port() == 0 => {
                let client = source.ip();
                if self.shortages.clients.contains(client, now) {
                    return Err(DropReason::ClientPortInUse);
                }
            }
            Some(_) => {}
            None => {
                if PortPool::of_target(target).all(|pool| self.shortages.is_out_of(pool, now)) {
                    return Err(DropReason::NoPorts);
                }
            }
        }
        Ok(())
    }

    fn note_shortage(&mut self, reason: DropReason, key: &Key, now: Instant) {
        if reason == DropReason::ClientPortInUse {
            let client = key.client.0.ip();
            self.shortages.clients.note(client, now + EXHAUSTED);
        } else if reason != DropReason::NoPorts {
            // A shortage of ports is noted where they are looked for.
            self.shortages.common = Some((reason, now + SHORTAGE));
        }
    }

    /// Makes a socket for a session.
    fn make(
        &mut self,
        key: &Key,
        settings: &ListenerSettings,
        target: &Target,
        now: Instant,
    ) -> Result<UpstreamSocket, DropReason> {
        let options = settings.upstream_options();
        let socket = if target.mode.spoofs() {
            let ports = &self.client_ports;
            UpstreamSocket::in_name_of_client((now, key), target, ports, options)?
        } else {
            self.connect(key, target, options, now)?
        };
        ask_for_interface(&self.wrong_interfaces, &socket, target.server.address);
        Ok(socket)
    }

    /// Opens a socket from the server's source addresses in turn.
    fn connect(
        &mut self,
        key: &Key,
        target: &Target,
        options: Options,
        now: Instant,
    ) -> Result<UpstreamSocket, DropReason> {
        self.next_source = self.next_source.wrapping_add(1);
        let choices = target.sources.addresses().len().max(1);
        let mut reason = DropReason::Unreachable;
        for choice in 0..choices {
            let number = self.next_source.wrapping_add(choice) % choices;
            let source = target.sources.addresses().get(number).copied();
            let pool = PortPool::of_host(source, target.server.address);
            if self.shortages.is_out_of(pool, now) {
                reason = DropReason::NoPorts;
                continue;
            }
            match UpstreamSocket::connect(key, target, source, options) {
                Ok(socket) => return Ok(socket),
                Err(why) => reason = why,
            }
            // Another source has ports of its own, and perhaps a route.
            if reason == DropReason::NoPorts {
                self.shortages.pools.insert(pool, now + SHORTAGE);
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

/// Has the interface of replies told where there are wrong ones.
pub(super) fn ask_for_interface(
    wrong: &WrongInterfaces,
    upstream: &UpstreamSocket,
    server: ServerAddr,
) {
    if upstream.takes_replies && wrong.contains_key(&server.0) {
        // Best effort: without it nothing is told apart, as by other means.
        let _ = upstream.socket.report_interface();
    }
}
