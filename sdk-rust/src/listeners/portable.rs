//! Where a socket sends only from the address that it is bound to.

use std::io;
use std::net::{SocketAddr, UdpSocket};

use ppv2_udp::AsFd;

use super::NotBound;
use crate::address::canonical;

/// Whether `listener` is a broadcast address of this host's networks. Binding to it fails
/// here, so there is no need to ask.
pub(super) fn is_broadcast(_listener: SocketAddr) -> bool {
    false
}

/// A socket that sends from `listener`, which must be an address of this host; `None` if
/// `receiver`, bound to `local`, does. Without SO_REUSEADDR it is bound only where no
/// other socket receives.
pub(super) fn sender(
    receiver: Option<&impl AsFd>,
    local: SocketAddr,
    listener: SocketAddr,
) -> io::Result<Option<UdpSocket>> {
    if receiver.is_some() && canonical(local) == listener {
        return Ok(None);
    }
    let socket = UdpSocket::bind(listener).map_err(|error| NotBound {
        listener,
        error,
        fix: "give this host that address and leave the port free, or have replies go through the proxy".to_owned(),
    })?;
    socket.set_nonblocking(cfg!(unix))?;
    Ok(Some(socket))
}
