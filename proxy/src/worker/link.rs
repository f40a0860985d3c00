//! What a session owns on its server's side: a socket of its own, so that a
//! reply can only come from the server that was asked. It is new, or that of a
//! session that ended long enough ago.

use std::sync::Arc;
use std::time::Instant;

use super::at_once::AtOnce;
use crate::address::ServerAddr;
use crate::counters::DropReason;
use crate::mode::Prefix;
use crate::net::{Cause, Options, Socket};
use crate::session::{Budget, Full, Seat, Table};
use crate::upstream::Server;

/// What a worker keeps with a session.
#[derive(Debug)]
pub(super) struct Link {
    /// Connected to the server.
    pub(super) socket: Socket,
    /// Number of the socket that the client's datagrams come in by.
    pub(super) via: usize,
    /// The one address that replies may come from.
    pub(super) server: ServerAddr,
    /// What the kernel said last of replies lost for want of buffer.
    pub(super) overflows: u32,
    /// How many replies to ask for.
    pub(super) at_once: AtOnce,
    /// What its datagrams carry in front.
    pub(super) prefix: Prefix,
}

/// A seat for a session, and perhaps what one with the same listener and server
/// has left that ended and rested. For want of another socket, one gives up its
/// own before it has rested.
pub(super) fn seat<T>(
    table: &mut Table<T>,
    budget: &Arc<Budget>,
    now: Instant,
    listener: usize,
    server: usize,
) -> Result<(Seat, Option<T>), DropReason> {
    let mut kept = table.take_rested(now, listener, server);
    if kept.is_none() {
        match budget.take() {
            Ok(seat) => return Ok((seat, None)),
            Err(Full::Sessions) => return Err(DropReason::MaxSessions),
            Err(Full::Sockets) => kept = table.take_resting(listener, server),
        }
    }
    let seat = match kept {
        Some((seat, link)) => seat.renew().map(|seat| (seat, Some(link))),
        None => {
            table.reclaim();
            budget.take().map(|seat| (seat, None))
        }
    };
    seat.map_err(|_| DropReason::MaxSessions)
}

/// Opens a session's socket, from the server's source addresses in turn. When
/// descriptors, ports or memory have run out, sessions that have ended give back
/// theirs, the oldest first.
pub(super) fn connect<T>(
    server: &Server,
    turn: &mut usize,
    options: Options,
    table: &mut Table<T>,
) -> Result<Socket, DropReason> {
    *turn = turn.wrapping_add(1);
    let choices = server.sources.len().max(1);
    loop {
        let mut reason = DropReason::Unreachable;
        for choice in 0..choices {
            let number = turn.wrapping_add(choice) % choices;
            let source = server.sources.get(number).copied();
            reason = match Socket::connect(server.address.0, source, options) {
                Ok(socket) => return Ok(socket),
                Err(error) => why_unconnected(Cause::of(&error))?,
            };
            if reason != DropReason::NoPorts {
                break;
            }
        }
        if !table.reclaim() {
            return Err(reason);
        }
    }
}

/// Why there is no socket: `Ok` if an ended session could give what is lacking.
fn why_unconnected(cause: Cause) -> Result<DropReason, DropReason> {
    match cause {
        Cause::NoDescriptors => Ok(DropReason::NoDescriptors),
        // Binding to a port of the kernel's choice would block, it says.
        Cause::NoPorts | Cause::WouldBlock => Ok(DropReason::NoPorts),
        Cause::NoMemory => Ok(DropReason::NoMemory),
        Cause::Unreachable | Cause::Oversize | Cause::Other => Err(DropReason::Unreachable),
    }
}
