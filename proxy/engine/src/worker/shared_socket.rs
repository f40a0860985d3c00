//! Sockets that sessions of the worker share: each session has a source address of its own
//! instead of a socket, and its replies are known by the address that they come to.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use ppv2_udp::{Cause, Options, Socket};
use slab::Slab;

use super::{Readable, Worker};
use crate::counters::DropReason;
use crate::listener::{Listener, ListenerSettings};
use crate::server::{SourceNetwork, Target};
use crate::session::SessionId;
use crate::source_addresses::{NoAddress, SourceAddresses};
use crate::upstream_socket::{Connection, Path};

/// The shared sockets of a worker, and the source addresses of their sessions.
pub(super) struct SharedSockets {
    worker: usize,
    workers: usize,
    sockets: Slab<SharedSocket>,
    /// Few: those that the configuration names, and former ones that have sessions.
    networks: Vec<NetworkInUse>,
}

/// A socket that is not connected and sends from any address of this host's.
pub(super) struct SharedSocket {
    pub(super) socket: Socket,
    kind: Kind,
    /// The kernel's latest count of replies lost because its buffer was full.
    pub(super) overflows: u32,
    sessions: usize,
    /// Counts what belongs to no session: the listener that opened the socket.
    listener: Arc<Listener>,
}

/// What tells the sockets of a worker apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind {
    v6: bool,
    /// 0 for one of the kernel's choice.
    port: u16,
    options: Options,
}

impl Kind {
    /// Whether a session that needs `self` can have a socket of `other`. A fixed port can
    /// be bound once, whatever the options.
    fn is_served_by(self, other: Self) -> bool {
        self.v6 == other.v6
            && self.port == other.port
            && (self.port != 0 || self.options == other.options)
    }
}

/// The addresses of a network, and the sessions that have them.
struct NetworkInUse {
    network: SourceNetwork,
    free: SourceAddresses,
    /// By the low 64 bits of their address, in which all addresses of a network that are
    /// used differ. Keyed: who sends to the network chooses the address.
    sessions: HashMap<u64, SessionId, ahash::RandomState>,
}

/// The port that a worker sends from; 0 for one of the kernel's choice.
fn port_of(network: SourceNetwork, worker: usize) -> u16 {
    let number = u16::try_from(worker).unwrap_or(u16::MAX);
    network
        .port
        .map_or(0, |port| port.get().saturating_add(number))
}

fn low_bits(ip: IpAddr) -> u64 {
    match ip {
        IpAddr::V4(v4) => v4.to_bits().into(),
        #[expect(clippy::cast_possible_truncation, reason = "the low half")]
        IpAddr::V6(v6) => v6.to_bits() as u64,
    }
}

impl SharedSockets {
    pub(super) fn new(worker: usize, workers: usize) -> Self {
        Self {
            worker,
            workers,
            sockets: Slab::new(),
            networks: Vec::new(),
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

    pub(super) fn numbers(&self) -> Vec<u32> {
        let numbers = self.sockets.iter().map(|(number, _)| number);
        numbers
            .filter_map(|number| number.try_into().ok())
            .collect()
    }

    /// The session that has this source address.
    pub(super) fn session_at(&self, source: IpAddr) -> Option<SessionId> {
        let network = self.network_of(source)?;
        self.networks[network]
            .sessions
            .get(&low_bits(source))
            .copied()
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

    /// A source address that no session has and none had lately.
    fn take_address(&mut self, of: SourceNetwork, now: Instant) -> Result<IpAddr, NoAddress> {
        let mut networks = self.networks.iter();
        let known = networks.position(|one| one.network.network == of.network);
        let place = known.unwrap_or_else(|| {
            self.networks.push(NetworkInUse {
                network: of,
                free: SourceAddresses::new(&of, self.worker, self.workers, now),
                sessions: HashMap::default(),
            });
            self.networks.len() - 1
        });
        self.networks[place].free.take(now)
    }

    fn begin(&mut self, socket: u32, source: IpAddr, id: SessionId) {
        if let Some(shared) = self.sockets.get_mut(socket as usize) {
            shared.sessions += 1;
        }
        if let Some(network) = self.network_of(source) {
            self.networks[network].sessions.insert(low_bits(source), id);
        }
    }

    fn give_back(&mut self, source: IpAddr, now: Instant) {
        if let Some(network) = self.network_of(source) {
            self.networks[network].free.give_back(source, now);
        }
    }

    fn end(&mut self, socket: u32, source: IpAddr, now: Instant) {
        if let Some(shared) = self.sockets.get_mut(socket as usize) {
            shared.sessions -= 1;
        }
        if let Some(network) = self.network_of(source) {
            self.networks[network].sessions.remove(&low_bits(source));
        }
        self.give_back(source, now);
    }
}

impl Worker {
    /// A shared socket and an address for a new session, if its server is written to from a
    /// network.
    pub(super) fn shared_path(
        &mut self,
        settings: &ListenerSettings,
        target: &Target,
        network: SourceNetwork,
        now: Instant,
    ) -> Result<Path, DropReason> {
        let kind = Kind {
            v6: target.server.address.0.is_ipv6(),
            port: port_of(network, self.number),
            options: settings.upstream_options(),
        };
        let socket = self.shared_socket(kind, &settings.listener)?;
        let source = self.shared_sockets.take_address(network, now);
        let source = source.map_err(|NoAddress| DropReason::NoAddresses)?;
        Ok(Path::Shared { socket, source })
    }

    fn shared_socket(&mut self, kind: Kind, listener: &Arc<Listener>) -> Result<u32, DropReason> {
        let mut sockets = self.shared_sockets.sockets.iter_mut();
        let found = sockets.find(|(_, shared)| kind.is_served_by(shared.kind));
        if let Some((number, shared)) = found {
            if shared.kind != kind {
                // It fails where it would have failed at the beginning.
                let _ = shared.socket.adapt(kind.options);
                shared.kind = kind;
            }
            return Ok(u32::try_from(number).unwrap_or(u32::MAX));
        }
        let why = |error| match Cause::of(&error) {
            Cause::NoDescriptors => DropReason::NoDescriptors,
            Cause::NoMemory => DropReason::NoMemory,
            Cause::NoPorts
            | Cause::WouldBlock
            | Cause::Unreachable
            | Cause::Oversize
            | Cause::NotPermitted
            | Cause::Other => DropReason::NoPorts,
        };
        let socket = Socket::shared(kind.v6, kind.port, kind.options).map_err(why)?;
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
            sessions: 0,
            listener: Arc::clone(listener),
        });
        Ok(number)
    }

    /// Notes the session that has a path.
    pub(super) fn note_shared(&mut self, id: SessionId) {
        let path = self.table.get(id).map(|session| &session.connection.path);
        if let Some(Path::Shared { socket, source }) = path {
            self.shared_sockets.begin(*socket, *source, id);
        }
    }

    /// Has the addresses of sessions that are gone rest.
    pub(super) fn collect_removed(&mut self, now: Instant) {
        while let Some(Connection { path, .. }) = self.table.next_removed() {
            if let Path::Shared { socket, source } = path {
                self.shared_sockets.end(socket, source, now);
            }
        }
    }

    /// Closes shared sockets that no session has and that the snapshot doesn't ask for, and
    /// forgets their networks.
    pub(super) fn close_unused_shared(&mut self) {
        let listeners = self.snapshot.listeners.iter();
        let wanted: Vec<_> = listeners
            .flat_map(|one| {
                let networks = one.targets.iter();
                networks.filter_map(|target| target.sources.network())
            })
            .collect();
        let is_wanted = |shared: &SharedSocket| {
            shared.sessions > 0
                || wanted.iter().any(|network| {
                    let v6 = network.network.addr().is_ipv6();
                    (port_of(*network, self.number), v6) == (shared.kind.port, shared.kind.v6)
                })
        };
        self.shared_sockets
            .sockets
            .retain(|_, shared| is_wanted(shared));
        self.shared_sockets.networks.retain(|one| {
            !one.sessions.is_empty()
                || wanted
                    .iter()
                    .any(|wanted| wanted.network == one.network.network)
        });
    }
}
