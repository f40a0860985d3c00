//! What changes while a worker runs: the snapshot that it obeys, and the network. Each
//! session is compared with it and stays, goes elsewhere or ends. Sessions whose listener
//! and server are as before are not touched.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ppv2_udp::{Cause, Socket};

use super::new_session::ServerAddresses;
use super::session_socket::{NewPath, Recent, ask_for_interface};
use super::{ListenerSocket, Readable, Worker};
use crate::address::ServerAddr;
use crate::counters::{DropReason, EndReason};
use crate::session::{Key, Session, SessionId};
use crate::snapshot::{ListenerSnapshot, Snapshot};
use crate::upstream_socket::{Connection, Path};

/// How long no other socket is tried to a server after one would have sent from the same
/// address, or had no route: a server that is switched off must not cost one for each
/// datagram.
pub(super) const SETTLED: Duration = Duration::from_millis(100);

/// By server, the numbers of interfaces by which the kernel takes nothing of it in. The
/// kernel checks that of all datagrams except those for connected sockets, which it hands
/// over before it looks at their source (early demultiplexing).
pub type WrongInterfaces = HashMap<SocketAddr, Vec<u32>>;

/// Another snapshot, and what goes with it.
pub struct Reconfiguration {
    /// What holds from now on.
    pub snapshot: Arc<Snapshot>,
    /// Sockets for addresses that the worker has none for.
    pub sockets: Vec<Socket>,
    /// Called when it is done.
    pub done: Box<dyn FnOnce() + Send>,
}

/// Whether sessions of a listener have nothing to be compared with. The control path hands
/// on what stays the same, so no lists are compared here.
fn is_unchanged(old: &ListenerSnapshot, new: &ListenerSnapshot) -> bool {
    Arc::ptr_eq(&old.settings, &new.settings) && Arc::ptr_eq(&old.targets, &new.targets)
}

impl Worker {
    /// Obeys another snapshot.
    pub(super) fn reconfigure(&mut self, to: Reconfiguration, now: Instant) {
        let Reconfiguration {
            snapshot,
            sockets,
            done,
        } = to;
        self.apply(snapshot, now);
        for socket in sockets {
            let address = socket.bound();
            if let Err(error) = self.add_listener_socket(socket) {
                tracing::error!(%address, %error, "a worker can't take datagrams there; restart the proxy");
            }
        }
        done();
    }

    /// Takes over a snapshot and compares all sessions with it.
    pub(super) fn apply(&mut self, snapshot: Arc<Snapshot>, now: Instant) {
        let before = std::mem::replace(&mut self.snapshot, snapshot);
        let snapshot = Arc::clone(&self.snapshot);
        self.table.log_to(snapshot.log.clone());
        let listeners = snapshot.listeners.iter();
        let ids: HashSet<_> = listeners.map(|one| one.settings.listener.id()).collect();
        self.balancers.retain(|(id, _), _| ids.contains(id));
        let passed = self.reassign_listener_sockets(&snapshot);
        let is_same = |old: &ListenerSnapshot| {
            let new = snapshot.of(&old.settings.listener);
            new.is_some_and(|new| is_unchanged(old, new))
        };
        if !passed.is_empty()
            || before.listeners.count() != snapshot.listeners.count()
            || !before.listeners.iter().all(is_same)
        {
            self.server_addresses = ServerAddresses::of(&snapshot);
            self.compare_sessions(&before, &passed, now);
        }
        self.close_listener_sockets(now);
        self.collect_removed(now);
        self.adapt_shared(now);
    }

    /// Has listeners' sockets serve the listeners that their addresses now belong to.
    /// Returns those that were another listener's.
    fn reassign_listener_sockets(&mut self, snapshot: &Snapshot) -> BTreeSet<usize> {
        let mut passed = BTreeSet::new();
        for (number, listener_socket) in &mut self.listener_sockets {
            let place = snapshot.bound.get(&listener_socket.socket.bound());
            listener_socket.is_closing = place.is_none();
            let bound = place.and_then(|place| snapshot.listeners.get(*place));
            // An address that is being closed keeps its listener, with the present settings.
            let of_listener = || snapshot.of(&listener_socket.settings.listener);
            if let Some(ListenerSnapshot { settings, .. }) = bound.or_else(of_listener)
                && !Arc::ptr_eq(settings, &listener_socket.settings)
            {
                let before = std::mem::replace(&mut listener_socket.settings, Arc::clone(settings));
                if before.remembers_senders() && !settings.remembers_senders() {
                    self.senders.forget_said(before.listener.id());
                }
                if before.listener != settings.listener {
                    settings.listener.note_open_socket();
                    before.listener.note_closed_socket();
                    passed.insert(number);
                }
                // It fails where it would have failed at the beginning.
                let _ = listener_socket.socket.adapt(settings.listener_options());
            }
        }
        // Servers may ask for it that are new, while the settings stay.
        self.share_ports();
        passed
    }

    /// Has listeners' sockets share their ports with sessions that write from their clients',
    /// if there are such.
    pub(super) fn share_ports(&mut self) {
        let mut targets = self.snapshot.targets();
        if !targets.any(|target| target.mode.spoofs_ports()) {
            return;
        }
        for (_, listener_socket) in &mut self.listener_sockets {
            if !listener_socket.shares_port {
                // Without it, clients that write from this port have no session.
                listener_socket.shares_port = listener_socket.socket.share_port().is_ok();
            }
        }
    }

    /// Takes from `socket` from now on, for the listener of its address. Returns its number;
    /// `None` if there is no such listener.
    pub(super) fn add_listener_socket(&mut self, socket: Socket) -> io::Result<Option<u32>> {
        let place = self.snapshot.bound.get(&socket.bound());
        let Some(listener) = place.and_then(|place| self.snapshot.listeners.get(*place)) else {
            return Ok(None);
        };
        let settings = Arc::clone(&listener.settings);
        let entry = self.listener_sockets.vacant_entry();
        let key = Readable::Listener(entry.key()).key();
        self.readiness.register(&socket, key)?;
        settings.listener.note_open_socket();
        let number = u32::try_from(entry.key()).unwrap_or(u32::MAX);
        self.listeners_at.insert(socket.bound(), number);
        self.listener_ports.insert(socket.bound().port());
        entry.insert(ListenerSocket {
            socket,
            settings,
            overflows: 0,
            is_closing: false,
            shares_port: false,
        });
        Ok(Some(number))
    }

    /// Ends sessions that would begin otherwise now, or not at all, and has no session take
    /// over sockets that would be made otherwise. Those whose server their listener no
    /// longer has leave it at their client's next datagram.
    fn compare_sessions(&mut self, before: &Snapshot, passed: &BTreeSet<usize>, now: Instant) {
        let snapshot = Arc::clone(&self.snapshot);
        let (mut ends, mut updates, mut set_aside) = (Vec::new(), Vec::new(), HashSet::new());
        for (id, session) in self.table.iter_mut() {
            let is_passed = passed.contains(&(session.connection.listener_socket as usize));
            let listener = &session.settings.listener;
            let Some(new) = snapshot.of(listener) else {
                // Otherwise it ends when its listener's sockets are closed.
                if is_passed {
                    ends.push((id, EndReason::Moved));
                }
                continue;
            };
            let old = before.of(listener);
            if !is_passed && old.is_some_and(|old| is_unchanged(old, new)) {
                continue;
            }
            let target = new.targets.of(&session.server);
            let makes_same_socket = || {
                let (old, target) = (old?, target?);
                let same = old.targets.of(&session.server)?.has_same_sockets(target);
                let options = new.settings.upstream_options();
                Some(same && old.settings.upstream_options() == options)
            };
            if makes_same_socket() != Some(true) {
                session.connection.is_outdated = true;
                set_aside.insert((listener.id(), session.server.id()));
            }
            let key = session.key();
            if let Some(target) = target {
                session.connection.set_header(target, &key);
            }
            let has_other_settings = !Arc::ptr_eq(&session.settings, &new.settings);
            if has_other_settings {
                updates.push((id, Arc::clone(&new.settings)));
            }
            let is_denied = has_other_settings
                && !session.settings.has_same_access(&new.settings)
                && !(new.settings.allows(key.client.0.ip())
                    && new
                        .settings
                        .admits(key.client.0.ip(), session.proxy().map(|proxy| proxy.ip())));
            if !session.is_active() {
                if is_denied {
                    session.silence();
                }
                continue;
            }
            let has_other_mode =
                target.is_some_and(|target| target.mode != session.connection.mode);
            if is_denied {
                ends.push((id, EndReason::Denied));
            } else if has_other_mode || is_passed {
                ends.push((id, EndReason::Moved));
            }
        }
        for (id, settings) in updates {
            self.table.set_settings(now, id, &settings);
        }
        for (listener, server) in set_aside {
            self.table.set_aside(listener, server);
        }
        for (id, reason) in ends {
            self.table.end(now, id, reason);
        }
    }

    /// Ends what is left at addresses that no listener has any more.
    fn close_listener_sockets(&mut self, now: Instant) {
        let snapshot = Arc::clone(&self.snapshot);
        let is_closed = |socket: &ListenerSocket| {
            socket.is_closing && !snapshot.closing.contains(&socket.socket.bound())
        };
        let all = self.listener_sockets.iter();
        let closed = all.filter(|(_, socket)| is_closed(socket));
        let closed: BTreeSet<_> = closed.map(|(number, _)| number).collect();
        if closed.is_empty() {
            return;
        }
        for number in &closed {
            // What came in time is still taken, and what has come since is counted.
            self.take_waiting(*number, now);
        }
        let of_closed = |session: &Session<Connection>| {
            closed.contains(&(session.connection.listener_socket as usize))
        };
        let ends = self.table.iter_mut();
        let ends = ends.filter(|(_, session)| of_closed(session));
        let ends: Vec<_> = ends.map(|(id, _)| id).collect();
        self.take_last_replies(&ends, now);
        for id in ends {
            // Of one that was moved, replies could still come.
            if let Some(session) = self.table.get_mut(id) {
                session.silence();
            }
            self.table.end(now, id, EndReason::Stopped);
        }
        for number in closed {
            let socket = self.listener_sockets.remove(number);
            // One that others keep open would be reported for ever. The key has no other use
            // if it fails.
            let _ = self.readiness.unregister(&socket.socket);
            self.listeners_at.remove(&socket.socket.bound());
            socket.settings.listener.note_closed_socket();
        }
        let ports = self.listeners_at.keys().map(SocketAddr::port);
        self.listener_ports = ports.collect();
    }

    /// Notes which sessions need another socket since the network has changed: those whose
    /// source address is gone, or is no longer the one that their server is written to
    /// from. They get it at their client's next datagram and keep their server. Sockets of
    /// ended ones are not taken over.
    pub(super) fn network_changed(&mut self, wrong: Arc<WrongInterfaces>, now: Instant) {
        self.wrong_interfaces = wrong;
        let (mut routes, mut outdated) = (Routes::default(), HashSet::new());
        let snapshot = Arc::clone(&self.snapshot);
        for (_, session) in self.table.iter_mut() {
            let (server, connection) = (&session.server, &mut session.connection);
            let Path::Own(socket) = &mut connection.path else {
                continue;
            };
            ask_for_interface(&self.wrong_interfaces, socket, server.address);
            socket.interface = 0;
            let Some(source) = socket.own_source() else {
                continue;
            };
            let listener = &session.settings.listener;
            let target = snapshot.of(listener).and_then(|one| one.targets.of(server));
            let is_right = if target.is_some_and(|target| !target.sources.addresses().is_empty()) {
                routes.has(source)
            } else {
                routes.leave_from(server.address.0.ip(), source)
            };
            if !is_right {
                connection.is_outdated = true;
                outdated.insert((listener.id(), server.id()));
                session.needs_socket = session.is_active();
            }
        }
        for (listener, server) in outdated {
            self.table.set_aside(listener, server);
        }
        for number in self.shared_sockets.numbers() {
            self.renew_tagged_socket(number, now);
        }
    }

    /// Has the client's session `old` go on from another socket if it needs one. It
    /// stays as it is if there is none, or none that is sent from another address.
    /// `None` if it needs none, or its server is gone. `number` is that of the listener's
    /// socket.
    pub(super) fn renew(
        &mut self,
        old: SessionId,
        number: usize,
        key: Key,
        now: Instant,
    ) -> Option<Result<SessionId, DropReason>> {
        let session = self.table.get(old).filter(|session| session.needs_socket)?;
        let settings = Arc::clone(&session.settings);
        let listener = self.snapshot.of(&settings.listener)?;
        let target = listener.targets.of(&session.server)?.clone();
        let source = session.connection.own_source();
        let ids = (settings.listener.id(), target.server.id());
        if self.routeless.contains(ids, now) {
            return Some(Err(DropReason::Unreachable));
        }
        let path = if Connection::shares_socket(&target, &key) {
            self.shared_path(&key, &settings, &target, now)
        } else {
            self.is_short(&key, &target, now)
                .and_then(|()| self.new_socket(&key, &settings, &target, now))
                .map(|socket| Path::Own(Box::new(socket)))
        };
        let path = match path {
            Ok(path) => path,
            Err(reason) => {
                if reason == DropReason::Unreachable {
                    self.routeless.note(ids, now + SETTLED);
                }
                return Some(Err(reason));
            }
        };
        if let Path::Own(socket) = &path
            && source.is_some()
            && socket.own_source() == source
        {
            let server = target.server.address.0.ip();
            self.settled.note(server, now + SETTLED);
            self.table.get_mut(old)?.needs_socket = false;
            return Some(Ok(old));
        }
        self.end(old, EndReason::Network, now);
        let sessions = settings.client_sessions.as_ref();
        let client = sessions.map(|sessions| sessions.take(key.client.0.ip()));
        let client = client.map_or(Ok(None), |permit| {
            permit.map(Some).ok_or(DropReason::ClientSessions)
        });
        let permit = client.and_then(|client| Ok(self.permit(now)?.of_client(client)));
        let permit = match permit {
            Ok(permit) => permit,
            Err(reason) => {
                self.give_back(&path, now);
                return Some(Err(reason));
            }
        };
        let got = NewPath {
            permit,
            path,
            is_watched: false,
        };
        Some(self.begin(now, key, number, &settings, &target, got))
    }
}

/// Whether nothing of `server` may come in by `interface`.
pub(super) fn is_wrong(wrong: &WrongInterfaces, server: ServerAddr, interface: u32) -> bool {
    wrong
        .get(&server.0)
        .is_some_and(|wrong| wrong.contains(&interface))
}

/// Whether another socket could send what this session's could not.
pub(super) fn may_need_socket(session: &Session<Connection>, settled: &Recent<IpAddr>) -> bool {
    let server = session.server.address.0.ip();
    session.connection.own_source().is_some() && !settled.contains(server, Instant::now())
}

/// What the kernel says of addresses, each asked for once.
#[derive(Default)]
struct Routes {
    /// By server, what it is written to from; `None` if there is no route.
    sources: HashMap<IpAddr, Option<IpAddr>>,
    own: HashMap<IpAddr, bool>,
}

impl Routes {
    /// Whether `server` is written to from `source`. Without a route, nothing is better.
    fn leave_from(&mut self, server: IpAddr, source: IpAddr) -> bool {
        let found = self.sources.entry(server);
        let found = found.or_insert_with(|| ppv2_udp::source_towards(server).ok());
        found.is_none_or(|found| found == source)
    }

    /// Whether this host has `source`. A shortage of ports or descriptors says nothing of
    /// that.
    fn has(&mut self, source: IpAddr) -> bool {
        let is_gone = |error| Cause::of(&error) == Cause::Unreachable;
        let found = self.own.entry(source);
        *found.or_insert_with(|| !ppv2_udp::probe_source(source).is_err_and(is_gone))
    }
}
