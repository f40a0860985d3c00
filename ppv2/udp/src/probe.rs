//! What this host and its kernel can do, asked at start and by new clients.

use std::io;
use std::net::{IpAddr, SocketAddr};

use socket2::{Domain, Protocol, SockAddr, Type};

use super::{Binding, Options, Socket, sys};

/// The addresses of this host's interfaces; loopback's whole range is its own
/// besides.
///
/// # Errors
///
/// Those of asking the kernel for them.
pub fn own_addresses() -> io::Result<Vec<IpAddr>> {
    let interfaces = if_addrs::get_if_addrs()?;
    Ok(interfaces
        .into_iter()
        .map(|interface| interface.ip())
        .collect())
}

/// Whether binding `address` alone, shared with nobody, is possible: the way to
/// learn that another process holds it, which binding shared would hide. If `free`, it
/// may be an address that this host does not have yet.
///
/// # Errors
///
/// Those of `socket` and `bind`.
pub fn probe(address: SocketAddr, free: bool) -> io::Result<()> {
    let options = Options {
        dont_fragment: false,
        bursts: false,
    };
    let binding = Binding {
        shared: false,
        free,
    };
    let socket = Socket::listen(address, binding, options)?;
    // From a broadcast address no reply could leave. Nothing else is asked: there is no
    // way yet to an address that is still to come.
    match socket.inner.connect(&SockAddr::from(socket.bound)) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(io::Error::new(
            error.kind(),
            "it is a broadcast address, which no reply can leave from",
        )),
        _ => Ok(()),
    }
}

/// Whether sessions can be sent from `source`.
///
/// # Errors
///
/// Those of `socket` and `bind`: this host doesn't have the address.
pub fn probe_source(source: IpAddr) -> io::Result<()> {
    probe(SocketAddr::new(source, 0), false)
}

/// The address that this host writes to `server` from, by its routes of this moment.
/// Nothing is sent.
///
/// # Errors
///
/// Those of `socket` and `connect`: there is no route.
pub fn source_towards(server: IpAddr) -> io::Result<IpAddr> {
    let options = Options {
        dont_fragment: false,
        bursts: false,
    };
    // Any port but 0, which can't be connected to everywhere.
    Socket::connect(SocketAddr::new(server, 9), None, options)?
        .local()
        .map(|local| local.ip())
}

/// Whether this kernel hands over and takes bursts in one piece.
///
/// # Errors
///
/// What it says if not.
pub fn probe_bursts() -> io::Result<()> {
    let socket = socket2::Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    sys::receive_bursts(&socket)?;
    sys::can_send_bursts(&socket)
}
