//! What a session has on its server's side: a socket of its own, connected, so
//! that a reply can only come from the server that was asked. It is new, or that of a
//! session that ended and whose port has rested.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use super::at_once::AtOnce;
use super::claims::{Claim, Claims};
use crate::address::{ClientAddr, ServerAddr};
use crate::counters::DropReason;
use crate::mode::{Mode, Prefix};
use crate::session::{Afterlife, Key};
use crate::upstream::{Server, ServerName};
use ppv2_udp::{Cause, Options, Socket};

/// Ports of the kernel's choice that are tried of a client's address, since each could
/// be one that the client itself had a moment ago.
const CHOICES: usize = 4;

/// What a worker keeps with a session.
#[derive(Debug)]
pub(super) struct Link {
    /// What its datagrams leave by to the server.
    pub(super) exit: Exit,
    /// Number of the socket that the client's datagrams come in by.
    pub(super) via: usize,
    /// The one address that replies may come from.
    pub(super) server: ServerAddr,
    /// The mode that it began in.
    pub(super) mode: Mode,
    /// What its datagrams carry in front.
    pub(super) prefix: Prefix,
    /// What the server goes by; keeps its number from being another's.
    pub(super) name: Arc<ServerName>,
    /// The version of the steering by which it is where it belongs.
    pub(super) steered: u64,
    /// Number of the interface that its latest reply came in by, 0 if that is not asked
    /// for.
    pub(super) ingress: u32,
    /// Its socket is not what one would be made for now.
    pub(super) is_outdated: bool,
}

impl Link {
    /// What becomes of the session's socket and port when it ends.
    pub(super) fn afterlife(&self) -> Afterlife {
        match &self.exit {
            Exit::Own(own) if own.claim.is_some() => Afterlife::None,
            Exit::Own(_) if self.is_outdated || self.mode.spoofs() => Afterlife::RestUnused,
            Exit::Own(_) => Afterlife::Rest,
            // On a port of this host's, which another session could get.
            Exit::Unheard { is_connected, .. } if *is_connected => Afterlife::RestUnheard,
            Exit::Unheard { .. } => Afterlife::Unheard,
        }
    }
}

/// What a session's datagrams leave by.
#[derive(Debug)]
pub(super) enum Exit {
    /// A socket of the session's own, connected to its server.
    Own(ServerSocket),
    /// A socket of the session's own by which no replies come.
    Unheard {
        socket: Socket,
        is_connected: bool,
        ports: Ports,
    },
}

/// The local ports that the kernel chooses a socket's port from: each address has its
/// own, and where the kernel chooses the address as well, each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    address: Option<IpAddr>,
    v6: bool,
}

impl Ports {
    /// Those of the address `source` of this host, or of all, towards `server`.
    pub(super) fn of_host(source: Option<IpAddr>, server: ServerAddr) -> Self {
        Self {
            address: source,
            v6: server.0.is_ipv6(),
        }
    }

    /// Those that sockets to `server` have, by its sources.
    pub(super) fn of_server(server: &Server) -> impl Iterator<Item = Self> {
        let sources = server.sources.iter().copied().map(Some);
        let any = server.sources.is_empty().then_some(None);
        sources
            .chain(any)
            .map(|source| Self::of_host(source, server.address))
    }

    /// Those of a client's address.
    pub(super) fn of_client(client: ClientAddr) -> Self {
        Self {
            address: Some(client.0.ip()),
            v6: client.0.is_ipv6(),
        }
    }
}

/// A socket that servers are written to, and reply to.
#[derive(Debug)]
pub(super) struct ServerSocket {
    pub(super) socket: Socket,
    /// What the kernel said last of replies lost for want of buffer.
    pub(super) overflows: u32,
    /// How many replies to ask for.
    pub(super) at_once: AtOnce,
    /// It writes from the client's address.
    pub(super) is_clients: bool,
    /// The client's own port is the socket's.
    pub(super) claim: Option<Claim>,
    pub(super) ports: Ports,
}

impl ServerSocket {
    pub(super) fn new(socket: Socket, ports: Ports) -> Self {
        Self {
            socket,
            overflows: 0,
            at_once: AtOnce::default(),
            is_clients: false,
            claim: None,
            ports,
        }
    }
}

impl Exit {
    /// The address of this host's that datagrams are sent from; `None` if it is the
    /// client's, to which changes of the network mean nothing.
    pub(super) fn own_source(&self) -> Option<IpAddr> {
        let (socket, is_connected) = self.socket();
        let is_clients = matches!(self, Self::Own(own) if own.is_clients);
        if is_clients || !is_connected {
            return None;
        }
        socket.local().ok().map(|local| local.ip())
    }

    /// The socket, and whether it is connected to the server.
    pub(super) fn socket(&self) -> (&Socket, bool) {
        match self {
            Self::Own(own) => (&own.socket, true),
            Self::Unheard {
                socket,
                is_connected,
                ..
            } => (socket, *is_connected),
        }
    }

    /// What its port is one of.
    pub(super) fn ports(&self) -> Ports {
        match self {
            Self::Own(own) => own.ports,
            Self::Unheard { ports, .. } => *ports,
        }
    }
}

/// Opens the socket of a session whose server sees `client` as the source: one that
/// sends, and takes replies if they come back.
pub(super) fn in_name_of(
    (now, key): (Instant, &Key),
    server: &Server,
    claims: &Arc<Claims>,
    options: Options,
) -> Result<Exit, DropReason> {
    let (client, to) = (key.client, server.address);
    let source = server.mode.source(client).unwrap_or(client.0);
    let ports = Ports::of_client(client);
    let takes_replies = server.mode.takes_replies();
    let open = || {
        Socket::in_name_of(source, to.0, takes_replies, options)
            .map_err(|error| why_not_in_its_name(Cause::of(&error)))
    };
    if !takes_replies {
        let socket = open()?;
        socket.ignore_replies();
        return Ok(Exit::Unheard {
            socket,
            is_connected: false,
            ports,
        });
    }
    if source.port() != 0 {
        let claim = claims.claim(now, key, to);
        let claim = Some(claim.ok_or(DropReason::NoClientPort)?);
        let own = ServerSocket::new(open()?, ports);
        return Ok(Exit::Own(ServerSocket {
            is_clients: true,
            claim,
            ..own
        }));
    }
    for _ in 0..CHOICES {
        let socket = open()?;
        let is_taken = |source| claims.is_taken(now, source, to);
        if !socket.local().is_ok_and(is_taken) {
            return Ok(Exit::Own(ServerSocket {
                is_clients: true,
                ..ServerSocket::new(socket, ports)
            }));
        }
    }
    Err(DropReason::NoClientPort)
}

/// Whether a session that has ended could give what is lacking towards `server`. A
/// client's own port is no other session's to give.
pub(super) fn is_shortage(reason: DropReason, server: &Server) -> bool {
    use DropReason::{NoClientPort, NoDescriptors, NoMemory, NoPorts};
    [NoDescriptors, NoMemory, NoPorts].contains(&reason)
        || reason == NoClientPort && !server.mode.spoofs_ports()
}

fn why_not_in_its_name(cause: Cause) -> DropReason {
    match cause {
        Cause::NoPorts | Cause::WouldBlock => DropReason::NoClientPort,
        Cause::NotPermitted => DropReason::NoPrivilege,
        Cause::NoDescriptors
        | Cause::NoMemory
        | Cause::Unreachable
        | Cause::Oversize
        | Cause::Other => why_unopened(cause),
    }
}

pub(super) fn why_unopened(cause: Cause) -> DropReason {
    match cause {
        Cause::NoDescriptors => DropReason::NoDescriptors,
        // Binding to a port of the kernel's choice would block, it says.
        Cause::NoPorts | Cause::WouldBlock => DropReason::NoPorts,
        Cause::NoMemory => DropReason::NoMemory,
        Cause::Unreachable | Cause::Oversize | Cause::NotPermitted | Cause::Other => {
            DropReason::Unreachable
        }
    }
}
