//! Sockets that sessions of the worker share. Either each session has a source address of its
//! own, and its replies are known by the address that they come to; or replies carry tags
//! that say whose they are.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use ppv2::TaggedReply;
use ppv2_udp::{Cause, Options, Socket};
use slab::Slab;

use super::reconfigure::SETTLED;
use super::{LAST_TAKES, Readable, Worker};
use crate::counters::DropReason;
use crate::listener::{Listener, ListenerSettings};
use crate::server::{Server, SourceNetwork, Target};
use crate::session::{MIN_REST, SessionId};
use crate::source_addresses::{NoAddress, SourceAddresses};
use crate::tag::{TagError, TagKeys};
use crate::upstream_socket::{Connection, Path};

/// The shared sockets of a worker, and the source addresses of their sessions.
pub(super) struct SharedSockets {
    worker: usize,
    workers: usize,
    sockets: Slab<SharedSocket>,
    /// Few: those that the configuration names, and former ones that have sessions.
    networks: Vec<NetworkInUse>,
    /// What source networks are used towards: servers of the snapshot, and of the one
    /// before, whose replies may still come.
    servers: Vec<SocketAddr>,
    former_servers: Vec<SocketAddr>,
}

/// A socket that sessions share.
pub(super) struct SharedSocket {
    pub(super) socket: Socket,
    kind: Kind,
    /// The kernel's latest count of replies lost because its buffer was full.
    pub(super) overflows: u32,
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
    /// One that is not connected and sends from any address of this host's.
    Network {
        v6: bool,
        /// 0 for one of the kernel's choice.
        port: u16,
        options: Options,
    },
    /// One that is connected to a server, whose replies carry tags.
    Tagged { tagged: Tagged, options: Options },
}

/// A server whose replies carry tags.
pub(super) struct Tagged {
    pub(super) server: Arc<Server>,
    keys: Arc<TagKeys>,
    /// Those before the latest reload.
    former: Option<Arc<TagKeys>>,
}

impl Tagged {
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
            former_servers: Vec::new(),
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
        if let Some(network) = self.network_of(source) {
            self.networks[network].free.give_back(source, now);
        }
    }

    /// A source address that no session has and none had lately.
    fn take_address(&mut self, of: SourceNetwork, now: Instant) -> Result<IpAddr, NoAddress> {
        let place = self.place_of(of).unwrap_or_else(|| {
            self.networks.push(NetworkInUse {
                network: of,
                free: SourceAddresses::new(&of, self.worker, self.workers, now),
                sessions: 0,
            });
            self.networks.len() - 1
        });
        self.networks[place].free.take(now)
    }

    /// Has the kernel drop what no server sent, before it takes room in the buffers.
    fn filter(&self) {
        let networks = self.networks.iter().map(|one| one.network.network);
        let networks: Vec<_> = networks.map(|net| (net.addr(), net.prefix_len())).collect();
        let servers: Vec<_> = [&self.servers[..], &self.former_servers].concat();
        for (_, shared) in &self.sockets {
            if let Kind::Network { v6, .. } = shared.kind {
                let mut networks = networks.clone();
                networks.retain(|(ip, _)| ip.is_ipv6() == v6);
                let mut servers = servers.clone();
                servers.retain(|server| server.is_ipv6() == v6);
                servers.sort_unstable();
                servers.dedup();
                // Best effort: what comes from others is dropped, with it or without.
                let _ = shared.socket.filter(&networks, Some(&servers));
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
            let network = &mut self.networks[network];
            network.sessions -= 1;
            network.free.give_back(*source, now);
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
        let source = self.shared_sockets.take_address(network, now);
        let source = source.map_err(|NoAddress| DropReason::NoAddresses)?;
        let socket = match found {
            Some(number) => number,
            None => {
                let socket = Socket::shared(v6, port, options).map_err(|e| why_unopened(&e));
                let added = socket.and_then(|socket| {
                    let kind = Kind::Network { v6, port, options };
                    self.add_shared(socket, kind, settings)
                });
                if added.is_err() {
                    self.shared_sockets.give_back(source, now);
                }
                added?
            }
        };
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
    ) -> Result<u32, DropReason> {
        let options = settings.upstream_options();
        let mut sockets = self.shared_sockets.sockets.iter();
        let found = sockets.find(|(_, shared)| match &shared.kind {
            Kind::Network { .. } => false,
            Kind::Tagged {
                tagged,
                options: its,
            } => *tagged.server == *target.server && *its == options,
        });
        if let Some((number, _)) = found {
            return Ok(u32::try_from(number).unwrap_or(u32::MAX));
        }
        let keys = target.replies.tag_keys().ok_or(DropReason::NoServer)?;
        let socket = connect(target, options)?;
        let tagged = Tagged {
            server: Arc::clone(&target.server),
            keys: Arc::clone(keys),
            former: None,
        };
        self.add_shared(socket, Kind::Tagged { tagged, options }, settings)
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
        let listener = self.snapshot.of(&shared.listener);
        let target = listener.and_then(|one| one.targets.of(&tagged.server));
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
    }

    /// Has sockets obey the snapshot: they check tags with its keys, and those that it has
    /// no use for are closed once no session has them and late replies have come.
    pub(super) fn adapt_shared(&mut self, now: Instant) {
        let targets: Vec<_> = self.snapshot.targets().collect();
        let keys = targets
            .iter()
            .filter_map(|target| Some((target.server.id(), target.replies.tag_keys()?)));
        let keys: HashMap<_, _> = keys.collect();
        let networks = targets.iter().filter_map(|one| one.sources.network());
        let ports = networks.map(|one| (port_of(one, self.number), one.network.addr().is_ipv6()));
        let ports: HashSet<_> = ports.collect();
        for (_, shared) in &mut self.shared_sockets.sockets {
            let is_wanted = match &mut shared.kind {
                Kind::Network { v6, port, .. } => ports.contains(&(*port, *v6)),
                Kind::Tagged { tagged, .. } => {
                    let keys = keys.get(&tagged.server.id());
                    if let Some(keys) = keys.filter(|keys| ***keys != tagged.keys) {
                        let former = std::mem::replace(&mut tagged.keys, Arc::clone(keys));
                        tagged.former = Some(former);
                    }
                    keys.is_some()
                }
            };
            shared.unused = (!is_wanted).then(|| shared.unused.unwrap_or(now));
        }
        let of_networks = targets.iter();
        let of_networks =
            of_networks.filter_map(|target| Some((target.sources.network()?, &target.server)));
        let (networks, servers): (Vec<_>, Vec<_>) = of_networks
            .map(|(network, server)| (network.network, server.address.0))
            .unzip();
        let shared = &mut self.shared_sockets;
        let is_wanted = |one: &NetworkInUse| networks.contains(&one.network.network);
        shared
            .networks
            .retain_mut(|one| is_wanted(one) || one.sessions > 0 || one.free.any_rests(now));
        if shared.servers != servers {
            shared.former_servers = std::mem::replace(&mut shared.servers, servers);
        }
        shared.filter();
    }

    /// Closes shared sockets that have been of no use for as long as late replies may come.
    pub(super) fn close_unused_shared(&mut self, now: Instant) {
        self.shared_sockets.sockets.retain(|_, shared| {
            let is_over = |since| now.saturating_duration_since(since) >= MIN_REST;
            shared.sessions > 0 || !shared.unused.is_some_and(is_over)
        });
    }
}

/// A socket to a server for all its sessions, from one of the server's sources.
fn connect(target: &Target, options: Options) -> Result<Socket, DropReason> {
    let source = target.sources.addresses().first().copied();
    let server = target.server.address.0;
    Socket::connect_shared(server, source, options).map_err(|error| why_unopened(&error))
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
