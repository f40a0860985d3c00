//! One datagram after the other, where the system has no call for many.

use std::io;

use super::{OneByOne, Outgoing};
use crate::batch::Slots;

/// Nothing is known of a socket that does not segment.
#[derive(Debug)]
pub(crate) struct Offload;

impl Offload {
    pub(crate) const fn new() -> Self {
        Self
    }
}

pub(crate) fn has_gro(_socket: &impl OneByOne) -> bool {
    false
}

pub(crate) fn enable_gro(_socket: &impl OneByOne) -> io::Result<bool> {
    Ok(false)
}

/// Fills slots with what is there; if nothing is, and `wait` is set, waits for
/// the first as the socket does.
pub(crate) fn receive(socket: &impl OneByOne, slots: &mut Slots<'_>, wait: bool) -> io::Result<()> {
    let mut received = Vec::with_capacity(slots.len());
    for buffer in slots.buffers() {
        let first = received.is_empty();
        match socket.recv_one(buffer, wait && first) {
            Ok(one) => received.push(one),
            Err(error) if first => return Err(error),
            // It will come again, or speaks of a datagram sent earlier: those
            // that were received matter more.
            Err(_) => break,
        }
    }
    for (len, peer) in received {
        slots.filled(len, len, peer);
    }
    Ok(())
}

/// Sends from the front, and returns how many datagrams were sent; an error if
/// it is the first that can't be.
pub(crate) fn send(
    socket: &impl OneByOne,
    _offload: &Offload,
    datagrams: &[Outgoing<'_>],
) -> io::Result<usize> {
    for (sent, (payload, to)) in datagrams.iter().enumerate() {
        match socket.send_one(payload, *to) {
            Ok(_) => {}
            Err(error) if sent == 0 => return Err(error),
            Err(_) => return Ok(sent),
        }
    }
    Ok(datagrams.len())
}
