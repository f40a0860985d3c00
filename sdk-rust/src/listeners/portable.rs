//! Where a socket sends from the address that it is bound to, and no other.

use std::io;
use std::net::{SocketAddr, UdpSocket};

use thiserror::Error;

use super::Owned;
use crate::address::canonical;

/// Any: it can't be given a right.
pub(crate) trait OwnSocket {}

impl<S> OwnSocket for S {}

/// Whether `listener` is a broadcast address of this host's networks, for which there
/// is no question here: binding to it fails.
pub(super) fn is_broadcast(_listener: SocketAddr) -> bool {
    false
}

/// Owns `listener`, which must be an address of this host. Without SO_REUSEADDR
/// it is bound only where nobody else receives.
pub(crate) fn own(
    receiver: Option<&impl OwnSocket>,
    local: SocketAddr,
    listener: SocketAddr,
) -> io::Result<Owned> {
    if receiver.is_some() && canonical(local) == listener {
        return Ok(Owned::ByOwnSocket);
    }
    let bound = UdpSocket::bind(listener).and_then(|socket| {
        socket.set_nonblocking(cfg!(unix))?;
        Ok(socket)
    });
    match bound {
        Ok(socket) => Ok(Owned::By(socket)),
        Err(error) => Err(io::Error::new(error.kind(), NotBound { listener, error })),
    }
}

#[derive(Error)]
#[error(
    "can't send from listener {listener}: {error}; give this host that address and leave the port free, or have replies go through the proxy"
)]
struct NotBound {
    listener: SocketAddr,
    #[source]
    error: io::Error,
}

message_as_debug!(NotBound);
