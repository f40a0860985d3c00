//! What a session owns on its server's side: a socket of its own, so that a
//! reply can only come from the server that was asked.

use crate::address::ServerAddr;
use crate::counters::DropReason;
use crate::mode::Prefix;
use crate::net::{Cause, Options, Socket};
use crate::session::Table;

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
    /// What its datagrams carry in front.
    pub(super) prefix: Prefix,
}

/// Opens a session's socket. When descriptors, ports or memory have run out,
/// sessions that have ended give back theirs, the oldest first.
pub(super) fn connect<T>(
    server: ServerAddr,
    options: Options,
    table: &mut Table<T>,
) -> Result<Socket, DropReason> {
    loop {
        let reason = match Socket::connect(server.0, options).map_err(|e| Cause::of(&e)) {
            Ok(socket) => return Ok(socket),
            Err(Cause::NoDescriptors) => DropReason::NoDescriptors,
            // Binding to a port of the kernel's choice would block, it says.
            Err(Cause::NoPorts | Cause::WouldBlock) => DropReason::NoPorts,
            Err(Cause::NoMemory) => DropReason::NoMemory,
            Err(Cause::Unreachable | Cause::Oversize | Cause::Other) => {
                return Err(DropReason::Unreachable);
            }
        };
        if !table.reclaim() {
            return Err(reason);
        }
    }
}
