//! What this host and its kernel can do.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

use socket2::{Domain, SockAddr, Type};

use crate::{Binding, Options, Socket, linux};

/// Binds `address`, shared with nobody, and releases it again: so it is known that another
/// process holds it, which binding it shared would hide. If `free`, it may be an address
/// that this host does not have yet.
///
/// # Errors
///
/// Those of `socket` and `bind`; [`io::ErrorKind::PermissionDenied`] for a broadcast
/// address.
pub fn probe(address: SocketAddr, free: bool) -> io::Result<()> {
    let binding = Binding {
        shared: false,
        free,
    };
    let socket = Socket::listen(address, binding, Options::default())?;
    // From a broadcast address no reply could leave. Nothing else is asked: there is no
    // way yet to an address that is still to come.
    match socket.inner.connect(&SockAddr::from(socket.bound())) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(io::Error::new(
            error.kind(),
            "it is a broadcast address, which no reply can leave from",
        )),
        _ => Ok(()),
    }
}

/// Whether a socket can send from `source`.
///
/// # Errors
///
/// Those of `socket` and `bind`: this host doesn't have the address.
pub fn probe_source(source: IpAddr) -> io::Result<()> {
    probe(SocketAddr::new(source, 0), false)
}

/// The source address of what this host sends to `server`, by its routes at this moment.
/// Nothing is sent.
///
/// # Errors
///
/// Those of `socket` and `connect`: there is no route.
pub fn source_towards(server: IpAddr) -> io::Result<IpAddr> {
    // Any port but 0, which can't be connected to everywhere.
    Socket::connect(SocketAddr::new(server, 9), None, Options::default())?
        .local()
        .map(|local| local.ip())
}

/// Whether this kernel receives and sends bursts in one piece.
///
/// # Errors
///
/// What it reports if not.
pub fn probe_bursts() -> io::Result<()> {
    let socket = socket2::Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    if !linux::enable_gro(socket.as_fd())? {
        return Err(io::Error::other("it has no UDP_GRO"));
    }
    linux::can_send_bursts()
}
