//! A worker: one thread that owns its sockets and its sessions.
//!
//! ```text
//! client_to_server: receive a batch ─▶ find or begin sessions ─▶ send to the server, with header
//! server_to_client: receive a batch ─▶ find the session ───────▶ send to the client
//! ```
//!
//! A worker touches what it shares with others when a session begins or ends: the number
//! of free ones, of each client's, and clients' own ports in use. For each datagram it
//! touches nothing shared, except the rates of clients where these are bounded, which take
//! no lock. The kernel spreads clients over the workers' sockets (SO_REUSEPORT), always the
//! same client to the same worker.

mod client_to_server;
mod handover;
mod headers_in;
mod new_session;
mod reconfigure;
mod run;
mod server_to_client;
mod session_socket;
mod shared_socket;

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant, SystemTime};

use ppv2_udp::{Adoptable, Batch, READY, Readiness, Socket, Waker};
use slab::Slab;

use crate::accept::Senders;
use crate::busiest::{self, Busiest};
use crate::capacity::Capacity;
use crate::client_ports::ClientPorts;
use crate::counters::{DropReason, WorkerCounters};
use crate::handover::{HandOver, Preview, TakeOver};
use crate::listener::{Listener, ListenerSettings};
use crate::own_tlvs::{UniqueId, UniqueIds};
use crate::server::{MAX_ANSWER_TIME, Server};
use crate::session::{Key, Session, SessionId, Table};
use crate::snapshot::Snapshot;
use crate::upstream::Balancer;
use crate::upstream_socket::{Connection, Path};
use new_session::{OwnAddresses, ServerAddresses};
use run::Run;
use server_to_client::Replies;
use session_socket::{Recent, Shortages};
use shared_socket::SharedSockets;

pub use reconfigure::{Reconfiguration, WrongInterfaces};

/// A wake-up that brings fewer sockets than this is worth waiting after, if
/// datagrams are to gather.
const FEW: usize = 16;

/// With so few sockets, replies leave at once: there are no others for them to
/// leave with, and the sooner they do the better.
const ALONE: usize = 2;

/// How long after the last reply a stopping worker waits for another one, when
/// no session is known to await any.
const QUIET: Duration = Duration::from_millis(200);

/// The longest that a worker with ended sessions sleeps: others could need the sockets
/// that these hold.
const REST_LOOK: Duration = Duration::from_secs(1);

/// Batches that each listener still takes when told to stop: more than its
/// buffer holds of small datagrams.
const LAST_BATCHES: usize = 1024;

/// How often replies are taken from one session's socket before it is closed: enough for
/// all that its buffer holds of small ones. More come meanwhile.
const LAST_TAKES: usize = 1024;

/// What a worker is given at its start.
pub struct WorkerSetup {
    /// Its number; each begins its turns through the servers elsewhere.
    pub number: usize,
    /// How many workers there are.
    pub workers: usize,
    /// Sockets that clients write to, at addresses that the snapshot has.
    pub sockets: Vec<Socket>,
    /// Listeners, servers and where sessions go.
    pub snapshot: Arc<Snapshot>,
    /// What all workers together may hold.
    pub capacity: Arc<Capacity>,
    /// Clients' own ports that sessions of all workers write from.
    pub client_ports: Arc<ClientPorts>,
    /// Where it counts what is no listener's or server's.
    pub counters: Arc<WorkerCounters>,
    /// Where it hears what to do.
    pub commands: Receiver<Command>,
}

/// What a worker can be told.
pub enum Command {
    /// Report up to `limit` sessions from number `first` on.
    Sessions {
        /// Number of the first session to report.
        first: usize,
        /// The most to report.
        limit: usize,
        /// Takes the report.
        reply: Box<dyn FnOnce(Vec<SessionReport>) + Send>,
    },
    /// Report the busiest clients.
    Busiest {
        /// Takes the report.
        reply: Box<dyn FnOnce(busiest::Report) + Send>,
    },
    /// Obey another snapshot.
    Reconfigure(Box<Reconfiguration>),
    /// The network may have changed: have sessions send from the address that this host's
    /// routes now say, and take no replies by wrong interfaces.
    NetworkChanged(Arc<WrongInterfaces>),
    /// Duplicate some of the sockets of sessions, from number `first` on.
    Preview {
        /// The first session.
        first: usize,
        /// Takes them.
        reply: Preview,
    },
    /// Hand over all sockets and sessions, and then wait for [`Resume`](Self::Resume) or
    /// [`Release`](Self::Release).
    HandOver(HandOver),
    /// Take over sockets and sessions, and then wait as after [`HandOver`](Self::HandOver).
    TakeOver(Box<TakeOver>),
    /// Go on with what there is.
    Resume,
    /// Stop, and leave all to another process: nothing is received, and no session ends.
    Release,
    /// Take no more from clients; stop when the replies in flight are through.
    Drain,
    /// Stop now.
    Stop,
}

/// A session as an operator sees it.
#[derive(Clone, Debug)]
pub struct SessionReport {
    /// Number within the worker.
    pub number: usize,
    /// Its client and the address that it wrote to.
    pub key: Key,
    /// The address of the proxy that passes its client's datagrams on with a header.
    pub proxy: Option<SocketAddr>,
    /// Its listener.
    pub listener: Arc<Listener>,
    /// Its server.
    pub server: Arc<Server>,
    /// Time since it began.
    pub age: Duration,
    /// Time since its latest datagram.
    pub idle: Duration,
    /// Client datagrams.
    pub requests: u64,
    /// Replies.
    pub replies: u64,
    /// The id that its headers carry, if they do.
    pub unique_id: Option<UniqueId>,
}

/// A socket that clients write to.
struct ListenerSocket {
    socket: Socket,
    settings: Arc<ListenerSettings>,
    /// The kernel's latest count of datagrams lost because its buffer was full.
    overflows: u32,
    /// Sessions go on, none begins.
    is_closing: bool,
    /// Sessions that write from the port of their client may have its port.
    shares_port: bool,
}

/// What has something to receive. Its number is the key that its socket is watched under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Readable {
    /// A listener's socket.
    Listener(usize),
    /// A socket that sessions share.
    Shared(u32),
    /// A session's socket.
    Session(SessionId),
}

impl Readable {
    /// Tells the keys of shared sockets from those of listeners.
    const SHARED: u64 = 1 << 31;

    // Sessions' generations begin at 1, which leaves keys below 2³² to others.
    #[expect(clippy::cast_possible_truncation, reason = "it has been compared")]
    fn of_key(key: u64) -> Self {
        if key >> 32 != 0 {
            Self::Session(SessionId::from_bits(key))
        } else if key & Self::SHARED != 0 {
            Self::Shared((key & !Self::SHARED) as u32)
        } else {
            Self::Listener(key as usize)
        }
    }

    fn key(self) -> u64 {
        match self {
            Self::Listener(number) => u32::try_from(number)
                .expect("a process has fewer than 2^32 descriptors")
                .into(),
            Self::Shared(number) => u64::from(number) | Self::SHARED,
            Self::Session(id) => id.to_bits(),
        }
    }
}

/// What a worker was told to do next.
enum Order {
    GoOn,
    /// Tell of all sessions, and stop.
    Stop,
    /// Stop without a word.
    Release,
}

/// One thread of the data path.
pub struct Worker {
    number: usize,
    readiness: Readiness,
    listener_sockets: Slab<ListenerSocket>,
    /// By the address that they are bound to, numbers in `listener_sockets`.
    listeners_at: HashMap<SocketAddr, u32, ahash::RandomState>,
    /// The ports in `listeners_at`.
    listener_ports: HashSet<u16, ahash::RandomState>,
    snapshot: Arc<Snapshot>,
    /// By the listener's id, and whether they are for IPv6 clients.
    balancers: HashMap<(u64, bool), Balancer>,
    /// Whose turn it is among a server's source addresses.
    next_source: usize,
    /// Where there was no socket for a new session.
    shortages: Shortages,
    own_addresses: OwnAddresses,
    server_addresses: ServerAddresses,
    /// Servers to which another socket would be sent from the same address.
    settled: Recent<IpAddr>,
    /// Listeners and servers, by their ids, for which no other socket has a route. The
    /// sources of one listener say nothing of another's.
    routeless: Recent<(u64, u64)>,
    /// Servers, by their ids, to which no shared socket could be opened, and why.
    unopened: Recent<(u64, DropReason)>,
    wrong_interfaces: Arc<WrongInterfaces>,
    /// When a datagram was last noted as oversize.
    oversize_noted: Cell<Option<Instant>>,
    table: Table<Connection>,
    shared_sockets: SharedSockets,
    /// Sessions of another process whose sockets are not watched yet.
    unwatched: Vec<SessionId>,
    /// Sockets of another process that no session has, and until when late replies may come.
    parked: Option<(Instant, Vec<Adoptable>)>,
    /// Another process has, or had, descriptors of sockets: one that is closed here may stay open.
    is_lent: bool,
    /// Proxies that put headers in front of what they pass on.
    senders: Senders,
    unix: UnixClock,
    capacity: Arc<Capacity>,
    client_ports: Arc<ClientPorts>,
    incoming: Batch,
    run: Run,
    replies: Replies,
    counters: Arc<WorkerCounters>,
    busiest: Busiest,
    commands: Receiver<Command>,
    draining: bool,
    late_wake_up: LateWakeUp,
    last_reply: Instant,
}

impl Worker {
    /// A worker, and the [`Waker`] that makes it look at its commands.
    ///
    /// # Errors
    ///
    /// Those of `epoll_create`, `epoll_ctl` and of the kernel's random numbers.
    pub fn new(setup: WorkerSetup) -> io::Result<(Self, Waker)> {
        let readiness = Readiness::new()?;
        let waker = readiness.waker();
        let unique_ids = UniqueIds::random()?;
        let now = Instant::now();
        let WorkerSetup {
            number,
            workers,
            sockets,
            snapshot,
            capacity,
            client_ports,
            counters,
            commands,
        } = setup;
        let mut worker = Self {
            number,
            readiness,
            listener_sockets: Slab::new(),
            listeners_at: HashMap::default(),
            listener_ports: HashSet::default(),
            snapshot: Arc::default(),
            balancers: HashMap::new(),
            next_source: number,
            shortages: Shortages::default(),
            own_addresses: OwnAddresses::default(),
            server_addresses: ServerAddresses::default(),
            settled: Recent::default(),
            routeless: Recent::default(),
            unopened: Recent::default(),
            wrong_interfaces: Arc::default(),
            oversize_noted: Cell::default(),
            table: Table::new(now, number, &capacity, Connection::after_end)
                .with_sources(Connection::source)
                .with_unique_ids(unique_ids, Connection::has_unique_id),
            shared_sockets: SharedSockets::new(number, workers),
            unwatched: Vec::new(),
            parked: None,
            is_lent: false,
            senders: Senders::default(),
            unix: UnixClock::new(now),
            capacity,
            client_ports,
            incoming: Batch::default(),
            run: Run::new(now),
            replies: Replies::new(number),
            counters,
            busiest: Busiest::new(now),
            commands,
            draining: false,
            late_wake_up: LateWakeUp::new(now),
            last_reply: now,
        };
        worker.apply(snapshot, now);
        for socket in sockets {
            worker.add_listener_socket(socket)?;
        }
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
            let due = match self.unwatched.is_empty() {
                true => self.table.next_deadline(),
                false => Some(Instant::now()),
            };
            self.wait(&mut ready, due)?;
            let now = Instant::now();
            self.unix.update(now);
            self.busiest.turn(now);
            let may_expire = self.late_wake_up.may_expire(now, due, ready.is_empty());

            if !self.unwatched.is_empty() {
                self.watch_some(now);
            }
            // What is not received to its end is reported again.
            let at_once = ready.len() <= ALONE;
            for key in ready.drain(..) {
                match Readable::of_key(key) {
                    Readable::Listener(number) => _ = self.take_from_clients(number, now),
                    Readable::Session(id) => _ = self.take_from_server(id, now),
                    Readable::Shared(number) => _ = self.take_from_shared(number, now),
                }
                if at_once {
                    self.replies.send(&self.listener_sockets);
                }
            }
            self.replies.send(&self.listener_sockets);
            // What has come for a session may wait yet.
            if may_expire {
                self.expire(now);
            }
            match self.obey_commands(now) {
                Order::Release => return Ok(()),
                Order::Stop => {
                    self.end_all(now);
                    return Ok(());
                }
                Order::GoOn if self.is_drained(now) => {
                    self.end_all(now);
                    return Ok(());
                }
                Order::GoOn => {}
            }
        }
    }

    /// Sleeps until something has come, or something is to be done; `ready` then
    /// has the keys of what has something to receive. Sessions are `due` to be looked at.
    fn wait(&self, ready: &mut Vec<u64>, due: Option<Instant>) -> io::Result<()> {
        let pauses = self.snapshot.pauses;
        if !pauses.busy_poll.is_zero() {
            let begun = Instant::now();
            while begun.elapsed() < pauses.busy_poll {
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
        if !pauses.coalesce.is_zero() && (1..FEW).contains(&ready.len()) {
            std::thread::sleep(pauses.coalesce);
            ready.clear();
            self.readiness.wait(Some(Duration::ZERO), ready)?;
        }
        Ok(())
    }

    fn expire(&mut self, now: Instant) {
        self.table
            .expire(now, |session| self.replies.are_none_late(session));
        self.close_ended(now);
        self.close_rested(now);
        self.collect_removed(now);
        self.close_unused_shared(now);
        self.publish_counts();
    }

    fn publish_counts(&self) {
        let counters = &self.counters;
        counters.retired.set(self.table.retired() as u64);
        counters.reclaimed.set(self.table.reclaimed());
        counters.renewed.set(self.table.renewed());
        counters.unlogged.set(self.table.unlogged());
    }

    /// Does what it was told.
    fn obey_commands(&mut self, now: Instant) -> Order {
        while let Ok(command) = self.commands.try_recv() {
            match self.obey(command, now) {
                Order::GoOn => {}
                order @ (Order::Stop | Order::Release) => return order,
            }
        }
        Order::GoOn
    }

    fn obey(&mut self, command: Command, now: Instant) -> Order {
        match command {
            Command::Sessions {
                first,
                limit,
                reply,
            } => reply(self.report(first, limit, now)),
            Command::Busiest { reply } => reply(self.busiest.report(now)),
            Command::Reconfigure(to) => self.reconfigure(*to, now),
            Command::NetworkChanged(wrong) => self.network_changed(wrong, now),
            Command::Preview { first, reply } => self.preview(first, reply),
            Command::HandOver(to) => {
                if self.hand_over(to, now) {
                    return Order::Release;
                }
            }
            Command::TakeOver(from) => {
                if self.inherit_all(*from, now) {
                    return Order::Release;
                }
            }
            // It was not waiting.
            Command::Resume => {}
            Command::Release => return Order::Release,
            Command::Drain => {
                let numbers: Vec<_> = self.listener_sockets.iter().map(|(n, _)| n).collect();
                for number in numbers {
                    self.take_waiting(number, now);
                    let socket = &self.listener_sockets[number].socket;
                    if socket.is_kept() {
                        // What comes from now on waits for the next process.
                        let _ = self.readiness.unregister(socket);
                    }
                }
                self.draining = true;
                self.last_reply = now;
            }
            Command::Stop => return Order::Stop,
        }
        Order::GoOn
    }

    fn report(&self, first: usize, limit: usize, now: Instant) -> Vec<SessionReport> {
        let now = self.table.clock().moment(now);
        let report = |(number, session): (usize, &Session<Connection>)| SessionReport {
            number,
            key: session.key(),
            proxy: session.proxy(),
            listener: Arc::clone(&session.settings.listener),
            server: Arc::clone(&session.server),
            age: now.since(session.started),
            idle: now.since(session.last_active),
            requests: session.requests,
            replies: session.replies,
            unique_id: self.table.unique_id(number),
        };
        let sessions = self.table.iter_from(first).take(limit);
        sessions.map(report).collect()
    }

    /// Takes what came before the order to stop; not for ever, since more comes
    /// meanwhile.
    fn take_waiting(&mut self, number: usize, now: Instant) {
        for _ in 0..LAST_BATCHES {
            if !self.take_from_clients(number, now) {
                break;
            }
        }
    }

    /// Takes the replies that wait for these sessions, which are about to end: what came
    /// in time still passes.
    fn take_last_replies(&mut self, ids: &[SessionId], now: Instant) {
        for id in ids {
            let session = self.table.get(*id);
            if session.is_some_and(|session| session.connection.own_socket().is_some()) {
                let mut takes = 0..LAST_TAKES;
                while takes.next().is_some() && self.take_from_server(*id, now) > 0 {}
            }
        }
        for number in self.shared_sockets.numbers() {
            let mut takes = 0..LAST_TAKES;
            while takes.next().is_some() && self.take_from_shared(number, now) > 0 {}
        }
        self.replies.send(&self.listener_sockets);
    }

    /// Watches a session's socket no more, which is about to be closed: as long as another
    /// process has a descriptor of it, it would be reported for ever.
    fn unwatch(&self, path: &Path) {
        if self.is_lent
            && let Path::Own(own) = path
        {
            // It is not watched where no replies are taken.
            let _ = self.readiness.unregister(&own.socket);
        }
    }

    /// The number of the listener's socket that replies from this address leave by.
    fn listener_socket_at(&self, local: SocketAddr) -> Option<u32> {
        let found = self.listeners_at.get(&local);
        let found = found.or_else(|| self.listeners_at.get(&wildcard_of(local)));
        found.copied()
    }

    /// Tells the snapshot from those before.
    #[expect(clippy::cast_possible_truncation, reason = "no session sees so many")]
    fn snapshot_number(&self) -> u32 {
        self.snapshot.version as u32
    }

    fn is_drained(&self, now: Instant) -> bool {
        let mut listeners = self.listener_sockets.iter();
        // Where no session is kept, nobody knows which replies are still to come.
        let quiet = match listeners.all(|(_, one)| one.settings.keeps_sessions) {
            true => QUIET,
            false => MAX_ANSWER_TIME,
        };
        self.draining
            && now.saturating_duration_since(self.last_reply) >= quiet
            && !self.table.awaits_replies()
    }

    /// Takes what waits in all sockets at the end, late replies too, and tells of the
    /// sessions that are there.
    fn end_all(&mut self, now: Instant) {
        let ids: Vec<_> = self.table.iter_mut().map(|(id, _)| id).collect();
        self.take_last_replies(&ids, now);
        self.table.note_stop();
        self.publish_counts();
    }
}

/// Seconds since 1970, which are read from the clock once a second.
struct UnixClock {
    seconds: u64,
    read: Instant,
}

impl UnixClock {
    fn new(now: Instant) -> Self {
        let mut clock = Self {
            seconds: 0,
            read: now,
        };
        clock.read(now);
        clock
    }

    fn update(&mut self, now: Instant) {
        if now.saturating_duration_since(self.read) >= Duration::from_secs(1) {
            self.read(now);
        }
    }

    fn read(&mut self, now: Instant) {
        let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        (self.seconds, self.read) = (since.as_secs(), now);
    }

    fn now(&self) -> u64 {
        self.seconds
    }
}

/// The wildcard that covers this address.
fn wildcard_of(address: SocketAddr) -> SocketAddr {
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    SocketAddr::new(any, address.port())
}

/// A number that no client can foresee.
fn random_seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// A wake-up that comes so much later than it was to: the process was stopped, or got no
/// CPU.
const LATE: Duration = Duration::from_millis(100);

/// The longest that sessions go on after a late wake-up, while datagrams that have come
/// meanwhile are received.
const CATCH_UP: Duration = Duration::from_secs(1);

/// After a late wake-up, what has come meanwhile is received before sessions expire: their
/// datagrams may wait.
#[derive(Debug)]
struct LateWakeUp {
    /// The latest wake-up.
    latest: Instant,
    /// Until when, if it does.
    until: Option<Instant>,
}

impl LateWakeUp {
    /// Nothing is late yet.
    fn new(now: Instant) -> Self {
        Self {
            latest: now,
            until: None,
        }
    }

    /// Whether sessions may expire after this wake-up, which was `due` then, and brought
    /// nothing if it `is_empty`.
    fn may_expire(&mut self, now: Instant, due: Option<Instant>, is_empty: bool) -> bool {
        // Not to be late again at once: a worker that always is would let none expire.
        let is_over = self
            .until
            .take_if(|until| is_empty || now >= *until)
            .is_some();
        let latest = std::mem::replace(&mut self.latest, now);
        let is_late = |due: Instant| now.saturating_duration_since(due.max(latest)) >= LATE;
        // A wait that was interrupted says nothing of what has come: not this one, but the
        // next that brings nothing is the end.
        if self.until.is_none() && !is_over && due.is_some_and(is_late) {
            self.until = Some(now + CATCH_UP);
        }
        self.until.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_names_what_it_was_made_for() {
        let readables = [
            Readable::Listener(0),
            Readable::Listener(2),
            Readable::Session(SessionId::from_bits(1 << 32)),
            Readable::Session(SessionId::from_bits(u64::MAX - 1)),
        ];
        for readable in readables {
            assert_eq!(Readable::of_key(readable.key()), readable);
        }
    }

    #[test]
    fn none_expires_after_a_late_wake_up_until_one_brings_nothing() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut wake_up = LateWakeUp::new(start);
        assert!(wake_up.may_expire(at(50), Some(at(50)), true));
        assert!(wake_up.may_expire(at(140), Some(at(100)), false));
        assert!(!wake_up.may_expire(at(900), Some(at(150)), true));
        assert!(!wake_up.may_expire(at(901), Some(at(150)), false));
        assert!(wake_up.may_expire(at(902), Some(at(150)), true));
        assert!(wake_up.may_expire(at(5000), None, true));
    }

    #[test]
    fn a_worker_that_is_always_late_lets_sessions_expire_at_times() {
        let start = Instant::now();
        let mut wake_up = LateWakeUp::new(start);
        let turns = (1..100).map(|turn| start + LATE * turn);
        let expires = turns.filter(|now| wake_up.may_expire(*now, Some(start), false));
        assert_eq!(expires.count(), 9);
    }
}
