//! What a session has on its server's side: a socket of its own, connected, so
//! that a reply can only come from the server that was asked. It is new, or that of a session that
//! ended long enough ago.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use super::at_once::AtOnce;
use super::claims::{Claim, Claims};
use crate::address::ServerAddr;
use crate::counters::DropReason;
use crate::mode::{Mode, Prefix};
use crate::net::{Cause, Options, Socket};
use crate::session::{Afterlife, Budget, Full, Key, Seat, Table};
use crate::upstream::{Server, ServerName};

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
    /// Its socket is not what one would be made for now.
    pub(super) is_outdated: bool,
}

impl Link {
    /// What becomes of the session's socket and port when it ends.
    pub(super) fn afterlife(&self) -> Afterlife {
        match &self.exit {
            Exit::Own(own) if own.claim.is_some() => Afterlife::None,
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
    Unheard { socket: Socket, is_connected: bool },
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
}

impl ServerSocket {
    pub(super) fn new(socket: Socket) -> Self {
        Self {
            socket,
            overflows: 0,
            at_once: AtOnce::default(),
            is_clients: false,
            claim: None,
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
        socket.source().ok()
    }

    /// The socket, and whether it is connected to the server.
    pub(super) fn socket(&self) -> (&Socket, bool) {
        match self {
            Self::Own(own) => (&own.socket, true),
            Self::Unheard {
                socket,
                is_connected,
            } => (socket, *is_connected),
        }
    }
}

/// Sessions that a new one makes give up their sockets before they have rested,
/// at the most.
const RECLAIMS: usize = 16;

/// A seat for a session, and perhaps what one with the same listener and server
/// has left that ended and rested. For want of another socket, one gives up its
/// own before it has rested. One in the name
/// of its client `takes_over` from nobody.
pub(super) fn seat(
    table: &mut Table<Link>,
    budget: &Arc<Budget>,
    now: Instant,
    (listener, server): (usize, usize),
    takes_over: bool,
) -> Result<(Seat, Option<Link>), DropReason> {
    let mut kept = None;
    if takes_over {
        kept = table.take_rested(now, listener, server).filter(is_current);
    }
    if kept.is_none() {
        match budget.take() {
            Ok(seat) => return Ok((seat, None)),
            Err(Full::Sessions) => return Err(DropReason::MaxSessions),
            Err(Full::Sockets) if takes_over => {
                kept = table.take_resting(listener, server).filter(is_current);
            }
            Err(Full::Sockets) => {}
        }
    }
    if let Some((seat, link)) = kept {
        let seat = seat.renew().map_err(why_full)?;
        return Ok((seat, Some(link)));
    }
    let seat = with_reclaims(table, || budget.take().map_err(why_full))?;
    Ok((seat, None))
}

/// Whether what a session has left is what would be made for it now. The seat goes
/// with the socket: another kind of one takes another kind of seat.
pub(super) fn is_current((_, link): &(Seat, Link)) -> bool {
    !link.is_outdated
}

/// Opens a session's own socket. When descriptors, ports or memory have run out,
/// sessions that have ended give back theirs, the oldest first.
pub(super) fn connect(
    server: &Server,
    turn: &mut usize,
    options: Options,
    table: &mut Table<Link>,
) -> Result<ServerSocket, DropReason> {
    let socket = with_reclaims(table, || {
        let address = server.address.0;
        from_sources(server, turn, |from| Socket::connect(address, from, options))
    })?;
    Ok(ServerSocket::new(socket))
}

/// Opens the socket of a session whose server sees `client` as the source, or is
/// not to answer the proxy: one that sends, and takes replies if they come back.
pub(super) fn speak_for(
    (now, key): (Instant, &Key),
    server: &Server,
    claims: &Arc<Claims>,
    turn: &mut usize,
    options: Options,
    table: &mut Table<Link>,
) -> Result<Exit, DropReason> {
    let Some(from) = server.mode.source(key.client) else {
        let own = connect(server, turn, options, table)?;
        own.socket.ignore_replies();
        return Ok(Exit::Unheard {
            socket: own.socket,
            is_connected: true,
        });
    };
    let to = server.address;
    let takes_replies = server.mode.takes_replies();
    let claim = if takes_replies && from.port() != 0 {
        let claim = claims.claim(now, key, to);
        Some(claim.ok_or(DropReason::NoClientPort)?)
    } else {
        None
    };
    let socket = with_reclaims(table, || {
        Socket::in_name_of(from, to.0, takes_replies, options)
            .map_err(|error| why_not_in_its_name(Cause::of(&error)))
    })?;
    if !takes_replies {
        socket.ignore_replies();
        return Ok(Exit::Unheard {
            socket,
            is_connected: false,
        });
    }
    Ok(Exit::Own(ServerSocket {
        is_clients: true,
        claim,
        ..ServerSocket::new(socket)
    }))
}

/// Tries anew as long as a session that has ended could give what is lacking,
/// but not for ever.
pub(super) fn with_reclaims<T>(
    table: &mut Table<Link>,
    mut attempt: impl FnMut() -> Result<T, DropReason>,
) -> Result<T, DropReason> {
    let mut reclaims = 0;
    loop {
        match attempt() {
            Err(reason) if is_shortage(reason) && reclaims < RECLAIMS && table.reclaim() => {
                reclaims += 1;
            }
            result => return result,
        }
    }
}

/// Opens a socket from the server's source addresses in turn.
fn from_sources(
    server: &Server,
    turn: &mut usize,
    open: impl Fn(Option<IpAddr>) -> io::Result<Socket>,
) -> Result<Socket, DropReason> {
    *turn = turn.wrapping_add(1);
    let choices = server.sources.len().max(1);
    let mut reason = DropReason::Unreachable;
    for choice in 0..choices {
        let number = turn.wrapping_add(choice) % choices;
        match open(server.sources.get(number).copied()) {
            Ok(socket) => return Ok(socket),
            Err(error) => reason = why_unopened(Cause::of(&error)),
        }
        // Another source has ports of its own, and perhaps a route.
        if [DropReason::NoDescriptors, DropReason::NoMemory].contains(&reason) {
            break;
        }
    }
    Err(reason)
}

/// Whether a session that has ended could give what is lacking.
pub(super) fn is_shortage(reason: DropReason) -> bool {
    use DropReason::{MaxSockets, NoDescriptors, NoMemory, NoPorts};
    [MaxSockets, NoDescriptors, NoMemory, NoPorts].contains(&reason)
}

pub(super) fn why_full(full: Full) -> DropReason {
    match full {
        Full::Sessions => DropReason::MaxSessions,
        Full::Sockets => DropReason::MaxSockets,
    }
}

fn why_not_in_its_name(cause: Cause) -> DropReason {
    match cause {
        // Others' sessions could give up no port of this client's.
        Cause::NoPorts | Cause::WouldBlock => DropReason::NoClientPort,
        Cause::NotPermitted => DropReason::NoPrivilege,
        Cause::NoDescriptors
        | Cause::NoMemory
        | Cause::Unreachable
        | Cause::Oversize
        | Cause::Other => why_unopened(cause),
    }
}

fn why_unopened(cause: Cause) -> DropReason {
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
