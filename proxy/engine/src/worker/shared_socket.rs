//! Sockets that sessions of the worker share. Either each session has a source address of its
//! own, and its replies are known by the address that they come to; or replies carry tags
//! that say whose they are.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use ppv2::TaggedReply;
use ppv2_udp::{Adoptable, Cause, Options, Socket};
use slab::Slab;

use super::handover::{Collected, place};
use super::reconfigure::SETTLED;
use super::{LAST_TAKES, Readable, Worker};
use crate::counters::DropReason;
use crate::handover::{NetworkState, SharedKind, SharedSocketState, TagKey, WorkerState};
use crate::listener::{Listener, ListenerSettings};
use crate::server::{Replies, Server, SourceNetwork, Sources, Target};
use crate::session::{MIN_REST, SessionId};
use crate::source_addresses::{GivenBack, NoAddress, SourceAddresses};
use crate::tag::{TagError, TagKeys};
use crate::upstream_socket::{Connection, Path};

/// The shared sockets of a worker, and the source addresses of their sessions.
pub(super) struct SharedSockets {
    worker: usize,
    workers: usize,
    sockets: Slab<SharedSocket>,
    /// Few: those that the configuration names, and former ones that have sessions.
    networks: Vec<NetworkInUse>,
    /// What source networks are used towards, now or before, since replies of former servers
    /// may still come. At most [`MOST_SERVERS`].
    servers: Vec<SocketAddr>,
    /// By server and options, the number of the socket that is connected to it.
    tagged: HashMap<(u64, Options), u32, ahash::RandomState>,
    /// Addresses that belong to shares of other workers.
    pub(super) given_back: Arc<GivenBack>,
}

/// A socket that sessions share.
pub(super) struct SharedSocket {
    pub(super) socket: Socket,
    kind: Kind,
    /// The kernel's latest count of replies lost because its buffer was full.
    pub(super) overflows: u32,
    /// Replies that were lost, until one of a session says of which server they may be.
    pub(super) lost: u64,
    /// How many batches were taken from it.
    pub(super) takes: u32,
    sessions: usize,
    /// Counts what belongs to no session: the listener that opened the socket.
    listener: Arc<Listener>,
    /// Since when no server that the snapshot has needs it.
    unused: Option<Instant>,
}

impl SharedSocket {
    /// The server, if its replies carry tags.
    pub(super) fn tagged(&self) -> Option<&Tagged> {
        match &self.kind {
            Kind::Network { .. } => None,
            Kind::Tagged { tagged, .. } => Some(tagged),
        }
    }
}

/// What tells the sockets of a worker apart.
enum Kind {
    /// Not connected: sends from any address of this host, and hears any server.
    Network {
        v6: bool,
        /// 0 for one of the kernel's choice.
        port: u16,
        options: Options,
    },
    /// Connected to a server whose replies carry tags.
    Tagged { tagged: Tagged, options: Options },
}

/// A server whose replies carry tags.
pub(super) struct Tagged {
    pub(super) server: Arc<Server>,
    /// Where the socket sends from.
    sources: Sources,
    /// A server that returns none is served by sessions.
    is_auto: bool,
    keys: Arc<TagKeys>,
    /// Those before the latest reload.
    former: Option<Arc<TagKeys>>,
    /// When the first batch was sent that no reply has followed, and how many were since.
    unanswered: Option<(Instant, u32)>,
}

impl Tagged {
    /// Notes that a batch was sent. A server that is silent for long, although it answered
    /// before, may take none by this socket.
    pub(super) fn note_sent(&mut self, now: Instant, unix: u64) {
        let (since, batches) = self.unanswered.get_or_insert((now, 0));
        *batches = batches.saturating_add(1);
        let is_long = now.saturating_duration_since(*since) >= SILENCE;
        if self.is_auto && is_long && *batches >= SILENT_BATCHES {
            self.unanswered = None;
            self.server.note_tag(false, unix);
        }
    }

    /// Notes a reply with a valid tag.
    pub(super) fn note_reply(&mut self, unix: u64) {
        self.unanswered = None;
        self.server.note_tag(true, unix);
    }

    /// Obeys another snapshot. True if it is to be sent from elsewhere.
    fn adapt(&mut self, target: &Target) -> bool {
        self.is_auto = matches!(target.replies, Replies::Auto(_));
        if let Some(keys) = target.replies.tag_keys()
            && **keys != *self.keys
        {
            let former = std::mem::replace(&mut self.keys, Arc::clone(keys));
            self.former = Some(former);
        }
        let moves = self.sources != target.sources;
        self.sources = target.sources.clone();
        moves
    }

    /// Checks the tag of a reply.
    pub(super) fn verify(&self, reply: &TaggedReply<'_>, unix: u64) -> Result<(), DropReason> {
        let verify = |keys: &TagKeys| keys.verify(reply.tag, reply.client, reply.destination, unix);
        let verified = verify(&self.keys);
        match (&verified, &self.former) {
            (Err(_), Some(former)) if verify(former).is_ok() => return Ok(()),
            _ => {}
        }
        verified.map_err(|error| match error {
            TagError::Wrong => DropReason::ReplyWrongTag,
            TagError::OtherEpoch => DropReason::ReplyOldTag,
        })
    }
}

/// How long a server may leave all datagrams unanswered that leave by the socket of tagged
/// replies, before sessions have sockets or addresses of their own again.
const SILENCE: Duration = Duration::from_secs(5);

/// So many batches, too: that some datagrams need no answer is nothing special.
const SILENT_BATCHES: u32 = 16;

/// The most servers that a filter looks at, and one more.
const MOST_SERVERS: usize = 65;

/// The addresses of a network, and how many sessions have one.
struct NetworkInUse {
    network: SourceNetwork,
    free: SourceAddresses,
    sessions: usize,
}

/// The port that a worker sends from; 0 for one of the kernel's choice.
fn port_of(network: SourceNetwork, worker: usize) -> u16 {
    let number = u16::try_from(worker).unwrap_or(u16::MAX);
    network
        .port
        .map_or(0, |port| port.get().saturating_add(number))
}

impl SharedSockets {
    pub(super) fn new(worker: usize, workers: usize) -> Self {
        Self {
            worker,
            workers,
            sockets: Slab::new(),
            networks: Vec::new(),
            servers: Vec::new(),
            tagged: HashMap::default(),
            given_back: Arc::default(),
        }
    }

    pub(super) fn socket(&self, number: u32) -> Option<&Socket> {
        self.sockets
            .get(number as usize)
            .map(|shared| &shared.socket)
    }

    pub(super) fn get_mut(&mut self, number: u32) -> Option<&mut SharedSocket> {
        self.sockets.get_mut(number as usize)
    }

    /// The server of a socket that is connected to one.
    pub(super) fn tagged(&self, number: u32) -> Option<&Tagged> {
        self.sockets.get(number as usize)?.tagged()
    }

    /// The listener that counts what belongs to no session.
    pub(super) fn listener(&self, number: u32) -> Option<Arc<Listener>> {
        let shared = self.sockets.get(number as usize)?;
        Some(Arc::clone(&shared.listener))
    }

    pub(super) fn tagged_mut(&mut self, number: u32) -> Option<&mut Tagged> {
        match &mut self.sockets.get_mut(number as usize)?.kind {
            Kind::Network { .. } => None,
            Kind::Tagged { tagged, .. } => Some(tagged),
        }
    }

    pub(super) fn numbers(&self) -> Vec<u32> {
        let numbers = self.sockets.iter().map(|(number, _)| number);
        numbers
            .filter_map(|number| number.try_into().ok())
            .collect()
    }

    fn network_of(&self, source: IpAddr) -> Option<usize> {
        let mut networks = self.networks.iter();
        networks.position(|one| one.network.network.contains(&source))
    }

    /// Counts datagrams to an address that no session has.
    pub(super) fn drop_of_no_session(
        &mut self,
        number: u32,
        to: IpAddr,
        datagrams: u64,
        now: Instant,
    ) {
        if let Some(network) = self.network_of(to) {
            self.networks[network].free.heard(to, now);
        }
        if let Some(shared) = self.sockets.get(number as usize) {
            let counters = shared.listener.counters(self.worker);
            counters
                .dropped(DropReason::ReplyUnknownAddress)
                .add(datagrams);
        }
    }

    fn place_of(&self, of: SourceNetwork) -> Option<usize> {
        let mut networks = self.networks.iter();
        networks.position(|one| one.network.network == of.network)
    }

    /// Whether addresses of the network are in use already.
    fn knows(&self, network: SourceNetwork) -> bool {
        self.place_of(network).is_some()
    }

    fn give_back(&mut self, source: IpAddr, now: Instant) {
        if let Some(network) = self.network_of(source)
            && !self.networks[network].free.give_back(source, now)
        {
            self.given_back.add(source, now);
        }
    }

    /// Has addresses of this worker's shares rest whose sessions other workers had.
    fn collect_given_back(&mut self) {
        let networks = &mut self.networks;
        self.given_back.take(|address, ended| {
            let mut networks = networks.iter_mut();
            let network = networks.find(|one| one.network.network.contains(&address));
            network.is_some_and(|one| one.free.give_back(address, ended))
        });
    }

    /// A source address that no session has and none had lately.
    fn take_address(&mut self, of: SourceNetwork, now: Instant) -> Result<IpAddr, NoAddress> {
        let place = match self.place_of(of) {
            Some(place) => place,
            None => {
                // A former network that sessions still have must not give out the same.
                let overlaps = |one: &NetworkInUse| {
                    let (one, of) = (one.network.network, of.network);
                    one.contains(&of) || of.contains(&one)
                };
                if self.networks.iter().any(overlaps) {
                    return Err(NoAddress);
                }
                self.networks.push(NetworkInUse {
                    network: of,
                    free: SourceAddresses::new(&of, self.worker, self.workers, now),
                    sessions: 0,
                });
                self.networks.len() - 1
            }
        };
        self.networks[place].free.take(now)
    }

    /// Has the kernel drop what no server sent, before it takes room in the buffers.
    fn filter(&self) {
        let networks = self.networks.iter().map(|one| one.network.network);
        let networks: Vec<_> = networks.map(|net| (net.addr(), net.prefix_len())).collect();
        for (_, shared) in &self.sockets {
            if let Kind::Network { v6, .. } = shared.kind {
                let mut networks = networks.clone();
                networks.retain(|(ip, _)| ip.is_ipv6() == v6);
                let mut servers = self.servers.clone();
                servers.retain(|server| server.is_ipv6() == v6);
                // The filter knows single ports alone.
                let are_known = servers.iter().all(|server| server.port() != 0);
                let all = (are_known && self.servers.len() < MOST_SERVERS).then_some(&servers[..]);
                // Best effort: what comes from others is dropped, with it or without.
                let _ = shared.socket.filter(&networks, all);
            }
        }
    }

    fn begin(&mut self, path: &Path) {
        if let Some(number) = path.shared_socket()
            && let Some(shared) = self.sockets.get_mut(number as usize)
        {
            shared.sessions += 1;
        }
        if let Path::Network { source, .. } = path
            && let Some(network) = self.network_of(*source)
        {
            self.networks[network].sessions += 1;
        }
    }

    /// Has the address of a session that is gone rest.
    pub(super) fn end(&mut self, path: &Path, now: Instant) {
        if let Some(number) = path.shared_socket()
            && let Some(shared) = self.sockets.get_mut(number as usize)
        {
            shared.sessions -= 1;
        }
        if let Path::Network { source, .. } = path
            && let Some(network) = self.network_of(*source)
        {
            self.networks[network].sessions -= 1;
            self.give_back(*source, now);
        }
    }
}

impl Worker {
    /// A shared socket and an address for a new session, if its server is written to from a
    /// network.
    pub(super) fn network_path(
        &mut self,
        settings: &ListenerSettings,
        target: &Target,
        network: SourceNetwork,
        now: Instant,
    ) -> Result<Path, DropReason> {
        let v6 = target.server.address.0.is_ipv6();
        let port = port_of(network, self.number);
        let options = settings.upstream_options();
        let mut sockets = self.shared_sockets.sockets.iter_mut();
        // A fixed port can be bound once, whatever the options.
        let found = sockets.find_map(|(number, shared)| match &mut shared.kind {
            Kind::Network {
                v6: its_v6,
                port: its_port,
                options: its,
            } if (*its_v6, *its_port) == (v6, port) && (port != 0 || *its == options) => {
                if *its != options {
                    // It fails where it would have failed at the beginning.
                    let _ = shared.socket.adapt(options);
                    *its = options;
                }
                u32::try_from(number).ok()
            }
            Kind::Network { .. } | Kind::Tagged { .. } => None,
        });
        let is_known = self.shared_sockets.knows(network);
        let socket = match found {
            Some(number) => number,
            None => {
                let kind = Kind::Network { v6, port, options };
                self.open_shared(target, kind, settings, now, || {
                    Socket::shared(v6, port, options)
                })?
            }
        };
        let mut source = self.shared_sockets.take_address(network, now);
        // One that a session of another process had, of a network too large to remember any.
        while let Ok(address) = source
            && self.table.find_by_source(address).is_some()
        {
            source = self.shared_sockets.take_address(network, now);
        }
        let source = source.map_err(|NoAddress| DropReason::NoAddresses)?;
        if found.is_none() || !is_known {
            self.shared_sockets.filter();
        }
        Ok(Path::Network { socket, source })
    }

    /// The number of the socket that is connected to a server whose replies carry tags.
    pub(super) fn tagged_socket(
        &mut self,
        settings: &ListenerSettings,
        target: &Target,
        now: Instant,
    ) -> Result<u32, DropReason> {
        let options = settings.upstream_options();
        let key = (target.server.id(), options);
        if let Some(number) = self.shared_sockets.tagged.get(&key) {
            return Ok(*number);
        }
        let keys = target.replies.tag_keys().ok_or(DropReason::NoServer)?;
        let tagged = Tagged {
            server: Arc::clone(&target.server),
            sources: target.sources.clone(),
            is_auto: matches!(target.replies, Replies::Auto(_)),
            keys: Arc::clone(keys),
            former: None,
            unanswered: None,
        };
        let kind = Kind::Tagged { tagged, options };
        let number = self.open_shared(target, kind, settings, now, || connect(target, options))?;
        self.shared_sockets.tagged.insert(key, number);
        Ok(number)
    }

    /// As [`tagged_socket`](Self::tagged_socket), of the server in this place. `number` is
    /// that of the listener's socket. Nothing that workers share is touched where the socket
    /// is there already.
    pub(super) fn tagged_socket_at(
        &mut self,
        number: usize,
        place: usize,
        now: Instant,
    ) -> Result<u32, DropReason> {
        let settings = &self.listener_sockets[number].settings;
        let listener = self.snapshot.of(&settings.listener);
        let target = listener.and_then(|one| one.targets.get(place));
        let target = target.ok_or(DropReason::NoServer)?;
        let key = (target.server.id(), settings.upstream_options());
        if let Some(number) = self.shared_sockets.tagged.get(&key) {
            return Ok(*number);
        }
        let (settings, target) = (Arc::clone(settings), target.clone());
        self.tagged_socket(&settings, &target, now)
    }

    /// Opens a shared socket, unless that was tried in vain a moment ago.
    fn open_shared(
        &mut self,
        target: &Target,
        kind: Kind,
        settings: &ListenerSettings,
        now: Instant,
        open: impl FnOnce() -> io::Result<Socket>,
    ) -> Result<u32, DropReason> {
        let server = target.server.id();
        if let Some((_, reason)) = self.unopened.find(now, |(of, _)| *of == server) {
            return Err(reason);
        }
        let opened = open().map_err(|error| why_unopened(&error));
        let opened = opened.and_then(|socket| self.add_shared(socket, kind, settings));
        opened.inspect_err(|reason| self.unopened.note((server, *reason), now + SETTLED))
    }

    fn add_shared(
        &mut self,
        socket: Socket,
        kind: Kind,
        settings: &ListenerSettings,
    ) -> Result<u32, DropReason> {
        let entry = self.shared_sockets.sockets.vacant_entry();
        let number = u32::try_from(entry.key()).unwrap_or(u32::MAX);
        let watched = self
            .readiness
            .register(&socket, Readable::Shared(number).key());
        watched.map_err(|_| DropReason::NoMemory)?;
        entry.insert(SharedSocket {
            socket,
            kind,
            overflows: 0,
            lost: 0,
            takes: 0,
            sessions: 0,
            listener: Arc::clone(&settings.listener),
            unused: None,
        });
        Ok(number)
    }

    /// Has a socket to a server sent from another address, where routes now say so. What
    /// waits in the old one is read first.
    pub(super) fn renew_tagged_socket(&mut self, number: u32, now: Instant) {
        let Some(shared) = self.shared_sockets.get_mut(number) else {
            return;
        };
        let Kind::Tagged { tagged, options } = &shared.kind else {
            return;
        };
        let (options, server) = (*options, tagged.server.address.0.ip());
        if self.settled.contains(server, now) {
            return;
        }
        let server_id = tagged.server.id();
        let is_of = |target: &&Target| target.server.id() == server_id;
        let target = self.snapshot.targets().find(is_of);
        let socket = target.and_then(|target| connect(target, options).ok());
        let source = |socket: &Socket| socket.local().ok().map(|local| local.ip());
        let before = source(&shared.socket);
        let Some(socket) = socket.filter(|socket| source(socket) != before) else {
            self.settled.note(server, now + SETTLED);
            return;
        };
        let mut takes = 0..LAST_TAKES;
        while takes.next().is_some() && self.take_from_shared(number, now) > 0 {}
        let key = Readable::Shared(number).key();
        if self.readiness.register(&socket, key).is_ok()
            && let Some(shared) = self.shared_sockets.get_mut(number)
        {
            if self.is_lent {
                let _ = self.readiness.unregister(&shared.socket);
            }
            shared.socket = socket;
            shared.overflows = 0;
        }
    }

    /// Has the address of a path that no session got after all be used again.
    pub(super) fn give_back(&mut self, path: &Path, now: Instant) {
        if let Path::Network { source, .. } = path {
            self.shared_sockets.give_back(*source, now);
        }
    }

    /// Notes the session that has a path.
    pub(super) fn note_shared(&mut self, id: SessionId) {
        if let Some(session) = self.table.get(id) {
            self.shared_sockets.begin(&session.connection.path);
        }
    }

    /// Has the addresses of sessions that are gone rest.
    pub(super) fn collect_removed(&mut self, now: Instant) {
        while let Some(Connection { path, .. }) = self.table.next_removed() {
            self.shared_sockets.end(&path, now);
        }
        self.shared_sockets.collect_given_back();
    }

    /// Has sockets obey the snapshot: they check tags with its keys, and those that it has
    /// no use for are closed once no session has them and late replies have come.
    pub(super) fn adapt_shared(&mut self, now: Instant) {
        let listeners = self.snapshot.listeners.iter();
        let targets: Vec<_> = listeners
            .flat_map(|one| {
                one.targets
                    .iter()
                    .map(|target| (target, &one.settings.listener))
            })
            .collect();
        let tagged = targets
            .iter()
            .filter(|(one, _)| one.replies.tag_keys().is_some());
        let tagged = tagged.map(|(target, listener)| (target.server.id(), (*target, *listener)));
        let tagged_targets: HashMap<_, _> = tagged.collect();
        let networks = targets.iter().filter_map(|(one, listener)| {
            let network = one.sources.network()?;
            let port = port_of(network, self.number);
            Some(((port, network.network.addr().is_ipv6()), *listener))
        });
        let ports: HashMap<_, _> = networks.collect();
        let mut renew = Vec::new();
        for (number, shared) in &mut self.shared_sockets.sockets {
            let listener = match &mut shared.kind {
                Kind::Network { v6, port, .. } => ports.get(&(*port, *v6)).copied(),
                Kind::Tagged { tagged, .. } => {
                    let target = tagged_targets.get(&tagged.server.id());
                    if let Some((target, _)) = target
                        && tagged.adapt(target)
                    {
                        renew.extend(u32::try_from(number));
                    }
                    target.map(|(_, listener)| *listener)
                }
            };
            if let Some(listener) = listener
                && self.snapshot.of(&shared.listener).is_none()
            {
                // The one before is gone, and soon its counters with it.
                shared.listener = Arc::clone(listener);
            }
            let is_wanted = listener.is_some();
            shared.unused = (!is_wanted).then(|| shared.unused.unwrap_or(now));
        }
        let of_networks = targets.iter();
        let of_networks =
            of_networks.filter_map(|(target, _)| Some((target.sources.network()?, &target.server)));
        let (networks, servers): (Vec<_>, Vec<_>) = of_networks
            .map(|(network, server)| (network.network, server.address.0))
            .unzip();
        let shared = &mut self.shared_sockets;
        let is_wanted = |one: &NetworkInUse| networks.contains(&one.network.network);
        shared
            .networks
            .retain_mut(|one| is_wanted(one) || one.sessions > 0 || one.free.any_rests(now));
        for server in servers {
            if shared.servers.len() < MOST_SERVERS && !shared.servers.contains(&server) {
                shared.servers.push(server);
            }
        }
        shared.filter();
        for number in renew {
            self.renew_tagged_socket(number, now);
        }
    }

    /// Adds shared sockets, and what is known of source networks, to what is handed over.
    /// Returns the place of each socket by its number.
    pub(super) fn collect_shared<'s>(
        &'s self,
        collected: &mut Collected<'s>,
        now: Instant,
    ) -> io::Result<HashMap<u32, u32>> {
        let mut places = HashMap::new();
        let shared = &self.shared_sockets;
        for (number, one) in &shared.sockets {
            let cookie = collected.socket(&one.socket)?;
            let (kind, options) = match &one.kind {
                Kind::Network { v6, port, options } => {
                    let (v6, port) = (*v6, *port);
                    let bound = one.socket.bound().into();
                    (SharedKind::Network { v6, port, bound }, *options)
                }
                Kind::Tagged { tagged, options } => {
                    let server = collected.server(&tagged.server);
                    let key = TagKey(tagged.keys.key());
                    let former = tagged.former.as_ref();
                    let former = former.map(|keys| TagKey(keys.key()));
                    let kind = SharedKind::Tagged {
                        server,
                        key,
                        former,
                    };
                    (kind, *options)
                }
            };
            let sockets = &mut collected.state.shared_sockets;
            places.insert(place(number), place(sockets.len()));
            sockets.push(SharedSocketState {
                cookie,
                listener: one.listener.name.clone(),
                kind,
                dont_fragment: options.dont_fragment,
                bursts: options.bursts,
                overflows: one.overflows,
            });
        }
        let networks = shared.networks.iter().map(|one| {
            let mut resting = one.free.resting(now);
            let given_back = shared.given_back.of(&one.network.network, now);
            resting.extend(given_back);
            NetworkState {
                address: one.network.network.addr(),
                prefix: one.network.network.prefix_len(),
                port: one.network.port.map_or(0, NonZeroU16::get),
                resting,
            }
        });
        collected.state.networks = networks.collect();
        let servers = shared.servers.iter();
        collected.state.network_servers = servers.map(|server| (*server).into()).collect();
        Ok(places)
    }

    /// Goes on with source networks. `addresses` are those that sessions of any worker have, or
    /// had so long ago.
    pub(super) fn inherit_networks(
        &mut self,
        networks: &[NetworkState],
        addresses: &[(IpAddr, Option<Duration>)],
        now: Instant,
    ) {
        let (worker, workers) = (self.shared_sockets.worker, self.shared_sockets.workers);
        for one in networks {
            let Ok(network) = IpNet::new(one.address, one.prefix) else {
                continue;
            };
            let network = SourceNetwork {
                network,
                port: NonZeroU16::new(one.port),
            };
            if self.shared_sockets.knows(network) {
                continue;
            }
            let mut free = SourceAddresses::new(&network, worker, workers, now);
            for (address, ended) in addresses {
                free.inherit(*address, *ended, now);
            }
            self.shared_sockets.networks.push(NetworkInUse {
                network,
                free,
                sessions: 0,
            });
        }
    }

    /// Takes over shared sockets. Returns the number of each, if there is room for it.
    pub(super) fn inherit_shared(
        &mut self,
        state: &WorkerState,
        servers: &[Arc<Server>],
        sockets: &mut HashMap<u64, Adoptable>,
    ) -> Vec<Option<u32>> {
        for server in &state.network_servers {
            let servers = &mut self.shared_sockets.servers;
            let server = SocketAddr::from(*server);
            if servers.len() < MOST_SERVERS && !servers.contains(&server) {
                servers.push(server);
            }
        }
        let of_state = state.shared_sockets.iter();
        of_state
            .map(|one| self.inherit_shared_socket(one, servers, sockets))
            .collect()
    }

    fn inherit_shared_socket(
        &mut self,
        state: &SharedSocketState,
        servers: &[Arc<Server>],
        sockets: &mut HashMap<u64, Adoptable>,
    ) -> Option<u32> {
        let snapshot = Arc::clone(&self.snapshot);
        let mut listeners = snapshot.listeners.iter();
        let first = listeners.next()?;
        let named = listeners.find(|one| one.settings.listener.name == state.listener);
        let settings = Arc::clone(&named.unwrap_or(first).settings);
        let options = Options {
            dont_fragment: state.dont_fragment,
            bursts: state.bursts,
        };
        let (kind, bound) = match &state.kind {
            SharedKind::Network { v6, port, bound } => {
                let (v6, port) = (*v6, *port);
                (Kind::Network { v6, port, options }, (*bound).into())
            }
            SharedKind::Tagged {
                server,
                key,
                former,
            } => {
                let server = servers.get(*server as usize)?;
                let before = Arc::new(TagKeys::new(key.0));
                let id = server.id();
                let target = snapshot.targets().find(|one| one.server.id() == id);
                let keys = target.and_then(|one| one.replies.tag_keys()).cloned();
                let keys = keys.unwrap_or_else(|| Arc::clone(&before));
                let none = Sources::Addresses(Arc::from([]));
                let tagged = Tagged {
                    server: Arc::clone(server),
                    sources: target.map_or(none, |one| one.sources.clone()),
                    is_auto: target.is_none_or(|one| matches!(one.replies, Replies::Auto(_))),
                    former: match *keys == *before {
                        true => former.as_ref().map(|key| Arc::new(TagKeys::new(key.0))),
                        false => Some(before),
                    },
                    keys,
                    unanswered: None,
                };
                (Kind::Tagged { tagged, options }, server.address.0)
            }
        };
        let key = match &kind {
            Kind::Network { .. } => None,
            Kind::Tagged { tagged, options } => Some((tagged.server.id(), *options)),
        };
        let socket = Socket::adopt(sockets.remove(&state.cookie)?, bound).ok()?;
        let number = self.add_shared(socket, kind, &settings).ok()?;
        if let Some(key) = key {
            self.shared_sockets.tagged.entry(key).or_insert(number);
        }
        self.shared_sockets.get_mut(number)?.overflows = state.overflows;
        Some(number)
    }

    /// Closes shared sockets that have been of no use for as long as late replies may come.
    pub(super) fn close_unused_shared(&mut self, now: Instant) {
        self.parked.take_if(|(until, _)| *until <= now);
        let SharedSockets {
            sockets, tagged, ..
        } = &mut self.shared_sockets;
        sockets.retain(|_, shared| {
            let is_over = |since| now.saturating_duration_since(since) >= MIN_REST;
            let is_kept = shared.sessions > 0 || !shared.unused.is_some_and(is_over);
            if let Kind::Tagged {
                tagged: of,
                options,
            } = &shared.kind
                && !is_kept
            {
                tagged.remove(&(of.server.id(), *options));
            }
            if !is_kept && self.is_lent {
                let _ = self.readiness.unregister(&shared.socket);
            }
            is_kept
        });
    }
}

/// A socket to a server for all its sessions, from one of the server's sources: of a network,
/// from the address that no session has.
fn connect(target: &Target, options: Options) -> io::Result<Socket> {
    let probe = target
        .sources
        .network()
        .map(|network| network.probe_address());
    let source = probe.or_else(|| target.sources.addresses().first().copied());
    Socket::connect_shared(target.server.address.0, source, options)
}

fn why_unopened(error: &io::Error) -> DropReason {
    match Cause::of(error) {
        Cause::NoDescriptors => DropReason::NoDescriptors,
        Cause::NoMemory => DropReason::NoMemory,
        Cause::NoPorts | Cause::WouldBlock => DropReason::NoPorts,
        Cause::Unreachable | Cause::Oversize | Cause::NotPermitted | Cause::Other => {
            DropReason::Unreachable
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::ServerAddr;

    fn tagged(is_auto: bool) -> Tagged {
        Tagged {
            server: Server::new("u", "s", ServerAddr(([192, 0, 2, 1], 53).into()), 1),
            sources: Sources::Addresses(Arc::from([])),
            is_auto,
            keys: Arc::new(TagKeys::new([7; 16])),
            former: None,
            unanswered: None,
        }
    }

    #[test]
    fn a_server_that_falls_silent_by_the_shared_socket_is_served_by_sessions() {
        let (start, batch) = (Instant::now(), Duration::from_secs(1));
        for (is_auto, expected) in [(true, false), (false, true)] {
            let mut tagged = tagged(is_auto);
            tagged.note_reply(1000);
            for number in 0..SILENT_BATCHES {
                assert!(tagged.server.returns_tags(), "{number}");
                tagged.note_sent(start + batch * number, 1000);
            }
            assert_eq!(tagged.server.returns_tags(), expected);
        }
    }

    #[test]
    fn some_unanswered_datagrams_are_no_silence() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut tagged = tagged(true);
        tagged.note_reply(1000);
        // Few in a long time, or many at once.
        for number in 0..100 {
            let now = start + second * 60 * number;
            for _ in 0..SILENT_BATCHES - 1 {
                tagged.note_sent(now, 1000);
            }
            tagged.note_reply(1000);
            for _ in 0..1000 {
                tagged.note_sent(now, 1000);
            }
            assert!(tagged.server.returns_tags(), "{number}");
            tagged.note_reply(1000);
        }
    }
}
