//! What a worker hands over to another process, and takes over of one.
//!
//! Both happen between two looks at the sockets, so nothing is in between: what the kernel has
//! not handed out yet stays in the sockets, which are the same in the other process. From then
//! on a worker neither receives nor sends until it is told to go on, or to let go of all.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use ppv2::ReplyTag;
use ppv2_udp::{Adoptable, Socket};

use super::{Command, Readable, Worker};
use crate::accept::{Sender, SenderId};
use crate::address::{ClientAddr, ListenerAddr};
use crate::counters::EndReason;
use crate::handover::{
    HandOver, Inherited, ListenerSocketState, NotTaken, PathState, Phase, Preview,
    ReplyHeaderState, SenderState, ServerState, SessionState, TakeOver, TakenOver, ViaState,
    WorkerState,
};
use crate::mode::FirstHeader;
use crate::own_tlvs::UniqueId;
use crate::server::Server;
use crate::session::{Amount, Key, MIN_REST, ReplyHeader, Restored, Session, SessionId, Via};
use crate::upstream_socket::{
    Connection, First, Path, PortPool, ServerReplyHeader, UpstreamSocket,
};

/// Sockets that are duplicated before datagrams have their turn: in a part of a millisecond.
const PREVIEWED_AT_ONCE: usize = 512;

/// Sockets that are watched before datagrams have their turn.
const WATCHED_AT_ONCE: usize = 64;

/// Collects what is handed over, with the sockets in the order in which they are named.
#[derive(Default)]
pub(super) struct Collected<'s> {
    pub(super) state: WorkerState,
    descriptors: Vec<(u64, BorrowedFd<'s>)>,
    /// Places of servers, by their ids.
    servers: HashMap<u64, u32, ahash::RandomState>,
}

impl<'s> Collected<'s> {
    pub(super) fn socket(&mut self, socket: &'s Socket) -> io::Result<u64> {
        let cookie = socket.cookie()?;
        self.descriptors.push((cookie, socket.as_fd()));
        Ok(cookie)
    }

    pub(super) fn server(&mut self, server: &Server) -> u32 {
        let servers = &mut self.state.servers;
        *self.servers.entry(server.id()).or_insert_with(|| {
            servers.push(ServerState {
                upstream: server.upstream.clone(),
                address: server.address.0.into(),
                name: server.name.clone(),
                returns_tags: server.returns_tags(),
            });
            place(servers.len() - 1)
        })
    }
}

pub(super) fn place(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

impl Worker {
    /// Duplicates some sockets, from number `first` on, for a process that is to take over: what
    /// it knows already need not be sent while nobody looks at it.
    pub(super) fn preview(&mut self, first: usize, to: Preview) {
        self.is_lent = true;
        let sessions = self.table.iter_from(first);
        let own = |(number, session): (usize, &'_ Session<Connection>)| {
            let socket = &session.connection.own_socket()?.socket;
            Some((number, socket.as_fd().try_clone_to_owned().ok()?))
        };
        let (numbers, sockets): (Vec<_>, Vec<_>) =
            sessions.filter_map(own).take(PREVIEWED_AT_ONCE).unzip();
        let next = numbers.last().map(|number| number + 1);
        to(sockets, next.filter(|_| numbers.len() == PREVIEWED_AT_ONCE));
    }

    /// Hands over all that there is, and waits until it is told to go on. True if it is to stop
    /// instead.
    pub(super) fn hand_over(&mut self, to: HandOver, now: Instant) -> bool {
        self.close_ended(now);
        self.collect_removed(now);
        self.replies.send(&self.listener_sockets);
        self.is_lent = true;
        match self.collect(now) {
            Ok(Collected {
                state, descriptors, ..
            }) => to(state, &descriptors),
            // Who asked learns it by the other end of `to`.
            Err(error) => tracing::error!(%error, "a worker can't name its sockets"),
        }
        match self.wait_for_order() {
            Some(later) => self.obey_later(later),
            None => return true,
        }
        false
    }

    /// Takes over what it is given, and waits until it is told to go on. True if it is to stop
    /// instead.
    pub(super) fn inherit_all(&mut self, from: TakeOver, now: Instant) -> bool {
        let TakeOver {
            states,
            mut sockets,
            networks,
            network_addresses,
            given_back,
            done,
        } = from;
        let mut taken = TakenOver::default();
        self.is_lent = true;
        self.shared_sockets.given_back = given_back;
        self.inherit_networks(&networks, &network_addresses, now);
        for inherited in states {
            self.inherit(inherited, &mut sockets, &mut taken, now);
        }
        // A late reply to one of these would reach the next session that has its port.
        self.parked = Some((now + MIN_REST, sockets.into_values().collect()));
        self.publish_counts();
        done(taken);
        let Some(later) = self.wait_for_order() else {
            return true;
        };
        // Until now the other process might have had to go on with the sockets as they were.
        // They were made by another configuration. What fails would have failed there, too.
        for (_, one) in &self.listener_sockets {
            let _ = one.socket.adapt(one.settings.listener_options());
        }
        self.share_ports();
        self.adapt_shared(Instant::now());
        self.obey_later(later);
        false
    }

    /// Watches some of the sockets that were taken over, whose replies wait there. Not all at
    /// once, since clients wait, too.
    pub(super) fn watch_some(&mut self, now: Instant) {
        for _ in 0..WATCHED_AT_ONCE {
            let Some(id) = self.unwatched.pop() else {
                self.unwatched.shrink_to_fit();
                return;
            };
            let session = self.table.get(id);
            let own = session.and_then(|session| session.connection.own_socket());
            let key = Readable::Session(id).key();
            if let Some(own) = own
                && self.readiness.register(&own.socket, key).is_err()
            {
                // The kernel is out of memory for epoll entries, or of permitted ones. The
                // client's next datagram begins another one, or is dropped for that reason.
                self.end(id, EndReason::Moved, now);
            }
        }
    }

    /// Does nothing, until it is told to go on. Returns what else it is told, which comes then;
    /// `None` if it is to stop.
    fn wait_for_order(&mut self) -> Option<Vec<Command>> {
        let mut later = Vec::new();
        loop {
            // Without a control path, nobody can want it to go on.
            match self.commands.recv().ok()? {
                Command::Resume => return Some(later),
                // Its sockets may be another process's by now.
                Command::Release | Command::Stop => return None,
                Command::Sessions {
                    first,
                    limit,
                    reply,
                } => reply(self.report(first, limit, Instant::now())),
                Command::Busiest { reply } => reply(self.busiest.report(Instant::now())),
                Command::HandOver(_) | Command::TakeOver(_) | Command::Preview { .. } => {}
                // They look at sockets.
                command @ (Command::Reconfigure(_)
                | Command::NetworkChanged(_)
                | Command::Drain) => {
                    later.push(command);
                }
            }
        }
    }

    fn obey_later(&mut self, later: Vec<Command>) {
        for command in later {
            let _ = self.obey(command, Instant::now());
        }
    }

    fn collect(&self, now: Instant) -> io::Result<Collected<'_>> {
        let mut collected = Collected::default();
        collected.state.worker = self.number;
        let mut listener_places = HashMap::new();
        for (number, one) in &self.listener_sockets {
            let cookie = collected.socket(&one.socket)?;
            let sockets = &mut collected.state.listener_sockets;
            listener_places.insert(number, place(sockets.len()));
            sockets.push(ListenerSocketState {
                cookie,
                bound: one.socket.bound().into(),
                listener: one.settings.listener.name.clone(),
                overflows: one.overflows,
                is_kept: one.socket.is_kept(),
            });
        }
        let shared_places = self.collect_shared(&mut collected, now)?;
        let listeners = self.snapshot.listeners.iter();
        let names: HashMap<u64, &str> = listeners
            .map(|one| {
                let listener = &one.settings.listener;
                (listener.id(), listener.name.as_str())
            })
            .collect();
        let name_of = |id: u64| names.get(&id).map(|name| (*name).to_owned());
        let (senders, sender_places) = self.senders.states(name_of, now);
        collected.state.senders = senders;
        for (id, session) in self.table.iter() {
            let via = session.via.as_ref();
            let sender = via.map(|via| sender_places.get(&via.sender.id.to_bits()).copied());
            // Of a listener's socket that is gone, or a sender that is not known any more,
            // nothing goes on.
            if let Some(phase) = self.table.phase(now, session)
                && let number = session.connection.listener_socket as usize
                && let Some(listener_socket) = listener_places.get(&number)
                && sender != Some(None)
            {
                let sender = sender.flatten();
                let places = (*listener_socket, sender);
                let one = self.collect_session(
                    &mut collected,
                    (id, session),
                    phase,
                    places,
                    &shared_places,
                    now,
                )?;
                collected.state.sessions.extend(one);
            } else if let Some(own) = session.connection.own_socket() {
                // Unnamed: it stays open there, for late replies.
                collected.socket(&own.socket)?;
            }
        }
        for one in self.parked.iter().flat_map(|(_, sockets)| sockets) {
            collected.descriptors.push((one.cookie(), one.as_fd()));
        }
        Ok(collected)
    }

    fn collect_session<'s>(
        &'s self,
        collected: &mut Collected<'s>,
        (id, session): (SessionId, &'s Session<Connection>),
        phase: Phase,
        (listener_socket, sender): (u32, Option<u32>),
        shared_places: &HashMap<u32, u32>,
        now: Instant,
    ) -> io::Result<Option<SessionState>> {
        let connection = &session.connection;
        let path = match &connection.path {
            Path::Own(own) => PathState::Own {
                cookie: collected.socket(&own.socket)?,
                is_connected: own.is_connected,
                takes_replies: own.takes_replies,
                is_clients: own.is_clients,
                has_client_port: own.client_port.is_some(),
                pool: own.pool.address(),
                overflows: own.overflows,
            },
            Path::Network { socket, source } => match shared_places.get(socket) {
                Some(place) => PathState::Network {
                    socket: *place,
                    source: *source,
                },
                None => return Ok(None),
            },
            Path::Tagged { socket } => match shared_places.get(socket) {
                Some(place) => PathState::Tagged { socket: *place },
                None => return Ok(None),
            },
        };
        let moment = self.table.clock().moment(now);
        let key = session.key();
        let first = connection.first.as_ref().map(|first| {
            let mut header = first.header;
            if first.transitions != session.server.transitions() {
                header.forgotten();
            }
            header.state(now)
        });
        let number = id.to_bits() & u64::from(u32::MAX);
        let unique_id = usize::try_from(number)
            .ok()
            .and_then(|number| self.table.unique_id(number));
        Ok(Some(SessionState {
            client: key.client.0.into(),
            local: key.local.0.into(),
            listener_socket,
            server: collected.server(&session.server),
            age: moment.since(session.started),
            idle: moment.since(session.last_active),
            requests: session.requests,
            request_bytes: session.request_bytes,
            replies: session.replies,
            reply_bytes: session.reply_bytes,
            phase,
            needs_socket: session.needs_socket,
            via: session
                .via
                .as_ref()
                .zip(sender)
                .map(|(via, sender)| ViaState {
                    sender,
                    heard: moment.since(via.heard),
                    is_current: via.changes == via.sender.changes(),
                    reply_header: match via.reply_header {
                        ReplyHeader::None => ReplyHeaderState::None,
                        ReplyHeader::Tagged(tag) => ReplyHeaderState::Tagged {
                            flags: tag.flags(),
                            tag: u64::from_be_bytes(tag.tag()),
                        },
                        ReplyHeader::Spp => ReplyHeaderState::Spp,
                    },
                }),
            path,
            mode: connection.mode,
            first,
            is_tagged: connection.reply_header == ServerReplyHeader::Tagged,
            unique_id: unique_id.map(|id| id.0),
        }))
    }
}

/// Taking over.
impl Worker {
    fn inherit(
        &mut self,
        Inherited { state, servers }: Inherited,
        sockets: &mut HashMap<u64, Adoptable>,
        taken: &mut TakenOver,
        now: Instant,
    ) {
        let listener_sockets = self.inherit_listeners(&state, sockets, &mut taken.failed);
        for (server, known) in servers.iter().zip(&state.servers) {
            if known.returns_tags {
                server.note_tag(true, self.unix.now());
            }
        }
        let shared = self.inherit_shared(&state, &servers, sockets);
        let senders = self.inherit_senders(&state.senders, now);
        let mut sessions = state.sessions;
        // Those that rest first: they take no part of `max_sessions`. Of one client, the
        // session that takes its datagrams is the last.
        sessions.sort_by_key(|one| match one.phase {
            Phase::Resting { .. } => (0, Reverse(one.idle)),
            Phase::Detached => (1, Reverse(one.idle)),
            Phase::Live => (2, Reverse(one.idle)),
        });
        for session in sessions {
            let is_active = !matches!(session.phase, Phase::Resting { .. });
            let places = Places {
                listener_sockets: &listener_sockets,
                servers: &servers,
                shared: &shared,
                senders: &senders,
            };
            match self.inherit_session(&session, &places, sockets, now) {
                Ok(()) => taken.sessions += usize::from(is_active),
                Err(why) => {
                    if is_active {
                        *taken.ended.entry(why).or_default() += 1;
                    }
                }
            }
        }
    }

    /// Takes over listeners' sockets. Returns the number of each, if its address is that of a
    /// listener; `failed` gets those that can't be used.
    fn inherit_listeners(
        &mut self,
        state: &WorkerState,
        sockets: &mut HashMap<u64, Adoptable>,
        failed: &mut Vec<SocketAddr>,
    ) -> Vec<Option<u32>> {
        let mut numbers = Vec::with_capacity(state.listener_sockets.len());
        for one in &state.listener_sockets {
            let bound = SocketAddr::from(one.bound);
            let is_known = self.snapshot.bound.contains_key(&bound);
            let socket = sockets.remove(&one.cookie).filter(|_| is_known);
            let socket = socket.and_then(|socket| Socket::adopt(socket, bound).ok());
            let socket = socket.map(|socket| if one.is_kept { socket.keep() } else { socket });
            let added = socket.and_then(|socket| self.add_listener_socket(socket).ok());
            let number = added.flatten();
            if is_known && number.is_none() {
                failed.push(bound);
            }
            if let Some(number) = number
                && let Some(added) = self.listener_sockets.get_mut(number as usize)
            {
                added.overflows = one.overflows;
            }
            numbers.push(number);
        }
        numbers
    }

    fn inherit_senders(&mut self, states: &[SenderState], now: Instant) -> Vec<Arc<Sender>> {
        let snapshot = Arc::clone(&self.snapshot);
        let listener_of = |name: &str| {
            let mut listeners = snapshot.listeners.iter();
            let settings = &listeners
                .find(|one| one.settings.listener.name == name)?
                .settings;
            let remember = settings.accept.as_ref()?.remember?;
            Some((settings.listener.id(), remember.max))
        };
        let states = states.iter();
        states
            .map(|state| self.senders.restore(state, listener_of, now))
            .collect()
    }

    fn inherit_session(
        &mut self,
        state: &SessionState,
        places: &Places<'_>,
        sockets: &mut HashMap<u64, Adoptable>,
        now: Instant,
    ) -> Result<(), NotTaken> {
        let listener_socket = places.listener_sockets.get(state.listener_socket as usize);
        let listener_socket = listener_socket.ok_or(NotTaken::Invalid)?;
        let listener_socket = listener_socket.ok_or(NotTaken::NoListener)?;
        let listener = self.listener_sockets.get(listener_socket as usize);
        let settings = Arc::clone(&listener.ok_or(NotTaken::NoListener)?.settings);
        if !settings.keeps_sessions {
            return Err(NotTaken::OtherMode);
        }
        let server = places.servers.get(state.server as usize);
        let server = Arc::clone(server.ok_or(NotTaken::Invalid)?);
        let sender = match state.via {
            Some(via) => Some(
                places
                    .senders
                    .get(via.sender as usize)
                    .ok_or(NotTaken::Invalid)?,
            ),
            None => None,
        };
        let key = Key {
            client: ClientAddr(state.client.into()),
            local: ListenerAddr(state.local.into()),
            sender: sender.map_or(SenderId::NONE, |sender| sender.id),
        };
        let client = key.client.0.ip();
        let proxy = sender.map(|sender| sender.address.ip());
        if !settings.allows(client) || !settings.admits(client, proxy) {
            return Err(NotTaken::Denied);
        }
        let target = self.snapshot.of(&settings.listener);
        let target = target.and_then(|one| one.targets.of(&server)).cloned();
        if target
            .as_ref()
            .is_some_and(|target| target.mode != state.mode)
        {
            return Err(NotTaken::OtherMode);
        }
        let permit = self.capacity.take().map_err(|_| NotTaken::NoRoom)?;
        let path = self.inherit_path(state, &key, &server, places.shared, sockets, now)?;
        let mut connection = Connection {
            path,
            listener_socket,
            mode: state.mode,
            // It may have been made in another way.
            is_outdated: true,
            // It is compared with this snapshot at its next datagram.
            checked: self.snapshot_number().wrapping_sub(1),
            first: first_of(state, &server, now),
            tags: None,
            tags_are_optional: false,
            reply_header: match ServerReplyHeader::of(state.mode) {
                ServerReplyHeader::None if state.is_tagged => ServerReplyHeader::Tagged,
                ServerReplyHeader::None => ServerReplyHeader::None,
                of_mode @ (ServerReplyHeader::Tagged | ServerReplyHeader::Spp) => of_mode,
            },
            tlvs: None,
        };
        if let Some(target) = &target {
            connection.set_header(target, &key);
        }
        let moment = self.table.clock().moment(now);
        let via = state.via.zip(sender).map(|(via, sender)| {
            let changes = sender.changes();
            Box::new(Via {
                sender: Arc::clone(sender),
                heard: moment - via.heard,
                // As one that was named before.
                changes: if via.is_current {
                    changes
                } else {
                    changes.wrapping_sub(1)
                },
                reply_header: match via.reply_header {
                    ReplyHeaderState::None => ReplyHeader::None,
                    ReplyHeaderState::Tagged { flags, tag } => {
                        ReplyHeader::Tagged(ReplyTag::new(flags, tag.to_be_bytes()))
                    }
                    ReplyHeaderState::Spp => ReplyHeader::Spp,
                },
            })
        });
        let is_active = !matches!(state.phase, Phase::Resting { .. });
        let of_client = settings.client_sessions.as_ref().filter(|_| is_active);
        let permit = permit.of_client(of_client.and_then(|sessions| sessions.take(client)));
        let restored = Restored {
            age: state.age,
            idle: state.idle,
            requests: Amount {
                datagrams: state.requests,
                bytes: state.request_bytes,
            },
            replies: Amount {
                datagrams: state.replies,
                bytes: state.reply_bytes,
            },
            phase: state.phase,
            needs_socket: state.needs_socket,
            unique_id: state.unique_id.map(UniqueId),
        };
        let id = self.table.restore(
            now, key, via, &settings, &server, permit, connection, restored,
        );
        let own = self.table.get(id);
        let own = own.and_then(|session| session.connection.own_socket());
        if own.is_some_and(|own| own.takes_replies) {
            self.unwatched.push(id);
        }
        self.note_shared(id);
        if is_active {
            settings.listener.counters(self.number).opened.add(1);
            server.counters(self.number).opened.add(1);
        }
        Ok(())
    }

    fn inherit_path(
        &self,
        state: &SessionState,
        key: &Key,
        server: &Server,
        shared: &[Option<u32>],
        sockets: &mut HashMap<u64, Adoptable>,
        now: Instant,
    ) -> Result<Path, NotTaken> {
        let shared = |socket: u32| {
            let number = shared.get(socket as usize).ok_or(NotTaken::Invalid)?;
            number.ok_or(NotTaken::NoRoom)
        };
        match state.path {
            PathState::Own {
                cookie,
                is_connected,
                takes_replies,
                is_clients,
                has_client_port,
                pool,
                overflows,
            } => {
                let to = server.address_for(key.local);
                let socket = sockets.remove(&cookie).ok_or(NotTaken::Invalid)?;
                let socket = Socket::adopt(socket, to.0).map_err(|_| NotTaken::Invalid)?;
                let client_port = match has_client_port {
                    true => {
                        let taken = self.client_ports.take(now, key, to);
                        Some(taken.ok_or(NotTaken::Invalid)?)
                    }
                    false => None,
                };
                Ok(Path::Own(Box::new(UpstreamSocket {
                    is_connected,
                    takes_replies,
                    is_clients,
                    client_port,
                    overflows,
                    ..UpstreamSocket::new(socket, PortPool::of_host(pool, to))
                })))
            }
            PathState::Network { socket, source } => Ok(Path::Network {
                socket: shared(socket)?,
                source,
            }),
            PathState::Tagged { socket } => Ok(Path::Tagged {
                socket: shared(socket)?,
            }),
        }
    }
}

/// What sessions name by places.
struct Places<'p> {
    listener_sockets: &'p [Option<u32>],
    servers: &'p [Arc<Server>],
    shared: &'p [Option<u32>],
    senders: &'p [Arc<Sender>],
}

fn first_of(state: &SessionState, server: &Server, now: Instant) -> Option<Box<First>> {
    let first = state.first.filter(|_| state.mode.may_omit_header())?;
    Some(Box::new(First {
        header: FirstHeader::from_state(first, now),
        transitions: server.transitions(),
    }))
}
