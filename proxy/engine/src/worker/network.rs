//! Sessions follow the network: one whose source address is gone, or is no longer the
//! one that its server is written to from, gets another socket at its client's next
//! datagram, and keeps its server. Replies by interfaces that they can't rightly come in
//! by are told apart from others.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Worker;
use super::link::{Exit, Link};
use super::supply::Exhausted;
use crate::address::ServerAddr;
use crate::counters::DropReason;
use crate::session::{EndReason, Key, SessionId};
use ppv2_udp::Cause;

/// How long no other socket is tried to a server after one would have sent from the same
/// address, or had no route: a server that is switched off must not cost one for each
/// datagram.
const SETTLED: Duration = Duration::from_millis(100);

/// By server, the numbers of interfaces that the kernel takes nothing of it in by. It
/// checks that of each datagram but of those for connected sockets, which it hands over
/// before it looks at their source (early demultiplexing).
pub type WrongInterfaces = HashMap<SocketAddr, Vec<u32>>;

/// Whether nothing of `server` may come in by `interface`.
pub(super) fn is_wrong(wrong: &WrongInterfaces, server: ServerAddr, interface: u32) -> bool {
    wrong
        .get(&server.0)
        .is_some_and(|wrong| wrong.contains(&interface))
}

/// Has the interface of replies told where there are wrong ones.
pub(super) fn ask_for_interface(wrong: &WrongInterfaces, exit: &Exit, server: ServerAddr) {
    if let Exit::Own(own) = exit
        && wrong.contains_key(&server.0)
    {
        // Best effort: without it nothing is told apart, as by other means.
        let _ = own.socket.report_interface();
    }
}

/// Whether another socket could send what this session's could not.
pub(super) fn may_need_socket(link: &Link, settled: &Exhausted) -> bool {
    link.exit.own_source().is_some() && !settled.contains(link.server.0.ip(), Instant::now())
}

impl Worker {
    /// Notes which sessions need another socket. Those that have ended are not taken over
    /// from.
    pub(super) fn follow_network(&mut self, wrong: Arc<WrongInterfaces>) {
        self.wrong_interfaces = wrong;
        let servers = self.listeners.iter().enumerate();
        let servers = servers.flat_map(|(number, listener)| {
            let servers = listener.servers.iter();
            servers.map(move |server| ((number, server.number), &server.sources))
        });
        let sources: HashMap<_, _> = servers.collect();
        let (mut routes, mut outdated) = (Routes::default(), BTreeSet::new());
        for (_, session) in self.table.iter_mut() {
            let Link { exit, server, .. } = &session.link;
            ask_for_interface(&self.wrong_interfaces, exit, *server);
            session.link.ingress = 0;
            let Some(source) = session.link.exit.own_source() else {
                continue;
            };
            let sources = sources.get(&(session.listener, session.server));
            let is_right = if sources.is_some_and(|sources| !sources.is_empty()) {
                routes.has(source)
            } else {
                routes.leave_from(session.link.server.0.ip(), source)
            };
            if !is_right {
                session.needs_socket = session.is_active();
                session.link.is_outdated = true;
                outdated.insert((session.listener, session.server));
            }
        }
        for (listener, server) in outdated {
            self.table.set_aside(listener, server);
        }
    }

    /// Has the client's session `old` go on from another socket if it needs one. It
    /// stays as it is if there is none, or none that is sent from another address.
    /// `None` if it needs none, or its server is gone.
    pub(super) fn renew(
        &mut self,
        old: SessionId,
        entrance: usize,
        key: Key,
        now: Instant,
    ) -> Option<Result<SessionId, DropReason>> {
        let session = self.table.get(old).filter(|session| session.needs_socket)?;
        let (listener, number) = (session.listener, session.server);
        let source = session.link.exit.own_source();
        let servers = &self.listeners[listener].servers;
        let server = servers.iter().find(|server| server.number == number);
        let server = server.cloned()?;
        if self.routeless.contains((listener, number), now) {
            return Some(Err(DropReason::Unreachable));
        }
        let exit = self
            .is_short(&key, &server, now)
            .and_then(|()| self.exit(&key, listener, &server, now));
        let exit = match exit {
            Ok(exit) => exit,
            Err(reason) => {
                if reason == DropReason::Unreachable {
                    self.routeless.note((listener, number), now + SETTLED);
                }
                return Some(Err(reason));
            }
        };
        if exit.own_source() == source {
            self.settled.note(server.address.0.ip(), now + SETTLED);
            self.table.get_mut(old)?.needs_socket = false;
            return Some(Ok(old));
        }
        self.end(now, old, EndReason::Network);
        let clients = self.listeners[listener].clients.as_ref();
        let client = clients.map(|clients| clients.take(key.client.0.ip()));
        let Some(client) = client.map_or(Some(None), |seat| seat.map(Some)) else {
            return Some(Err(DropReason::ClientSessions));
        };
        let seat = self.seat(now);
        let link = self.link(exit, entrance, &key, &server);
        Some(seat.and_then(|seat| {
            let numbers = (listener, number);
            self.begin(now, key, numbers, seat.of_client(client), link, false)
        }))
    }
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
