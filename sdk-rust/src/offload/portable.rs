//! One datagram after the other, where the system has no call for many.

use std::io;
use std::net::{IpAddr, SocketAddr};

use super::{OneByOne, Outgoing};
use crate::batch::Slots;

/// Nothing is known of a socket that neither segments nor coalesces.
#[derive(Debug)]
pub(crate) struct Offload;

impl Offload {
    pub(crate) fn new(_socket: &impl OneByOne, _local: SocketAddr) -> Self {
        Self
    }

    #[cfg(not(target_os = "linux"))]
    pub(crate) fn for_sending(_socket: &impl OneByOne, _local: SocketAddr) -> Self {
        Self
    }

    pub(crate) fn gro(&self) -> bool {
        false
    }

    /// Whether the address is known that a datagram was sent to.
    #[cfg_attr(
        target_os = "linux",
        expect(dead_code, reason = "tests move batches alone")
    )]
    pub(crate) fn packet_info(&self) -> bool {
        false
    }

    #[expect(
        clippy::needless_pass_by_ref_mut,
        reason = "as where it can be enabled"
    )]
    pub(crate) fn enable_gro(&mut self, _socket: &impl OneByOne) -> io::Result<bool> {
        Ok(false)
    }
}

/// Receives one datagram: what it holds, its sender, and here not the address that
/// it was sent to.
#[cfg_attr(
    target_os = "linux",
    expect(dead_code, reason = "tests move batches alone")
)]
pub(crate) fn receive_one(
    socket: &impl OneByOne,
    _offload: &Offload,
    buffer: &mut [u8],
    wait: bool,
) -> io::Result<(usize, SocketAddr, Option<IpAddr>)> {
    let (len, peer) = socket.recv_one(buffer, wait)?;
    Ok((len, peer, None))
}

/// Sends one datagram from where the socket is bound to.
#[cfg_attr(
    target_os = "linux",
    expect(dead_code, reason = "tests move batches alone")
)]
pub(crate) fn send_one(
    socket: &impl OneByOne,
    _offload: &Offload,
    payload: &[u8],
    to: SocketAddr,
    _source: IpAddr,
) -> io::Result<usize> {
    socket.send_one(payload, to)
}

/// Fills slots with what is there; if nothing is, and `wait` is set, waits for
/// the first as the socket does.
pub(crate) fn receive(
    socket: &impl OneByOne,
    _offload: &Offload,
    slots: &mut Slots<'_>,
    wait: bool,
) -> io::Result<()> {
    let (buffers, filled) = slots.parts();
    for (slot, buffer) in buffers.enumerate() {
        match socket.recv_one(buffer, wait && slot == 0) {
            Ok((len, peer)) => filled.push(len, len, peer, None),
            Err(error) if slot == 0 => return Err(error),
            // It will come again, or speaks of a datagram sent earlier: those
            // that were received matter more.
            Err(_) => break,
        }
    }
    Ok(())
}

/// Sends from the front, and returns how many datagrams were sent; an error if
/// it is the first that can't be. They leave from where the socket is bound to,
/// which is `source` if there is one.
pub(crate) fn send(
    socket: &impl OneByOne,
    _offload: &Offload,
    datagrams: &[Outgoing<'_>],
    _source: Option<IpAddr>,
) -> io::Result<usize> {
    for (sent, (payload, way)) in datagrams.iter().enumerate() {
        match socket.send_one(payload, way.to) {
            Ok(_) => {}
            Err(error) if sent == 0 => return Err(error),
            Err(_) => return Ok(sent),
        }
    }
    Ok(datagrams.len())
}
