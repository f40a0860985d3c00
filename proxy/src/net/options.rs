//! Socket options that both platforms set by the same safe calls.

use std::io;

#[cfg(target_os = "linux")]
use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};

/// Never fragment, or fragment wherever it is needed, routers included (ip(7),
/// ipv6(7)).
#[cfg(target_os = "linux")]
pub(super) fn set_fragmentation(
    socket: &socket2::Socket,
    v6: bool,
    dont_fragment: bool,
) -> io::Result<()> {
    let set = match (v6, dont_fragment) {
        (false, true) => sockopt::set_ip_mtu_discover(socket, Ipv4PathMtuDiscovery::DO),
        (false, false) => sockopt::set_ip_mtu_discover(socket, Ipv4PathMtuDiscovery::DONT),
        (true, true) => sockopt::set_ipv6_mtu_discover(socket, Ipv6PathMtuDiscovery::DO),
        (true, false) => sockopt::set_ipv6_mtu_discover(socket, Ipv6PathMtuDiscovery::DONT),
    };
    Ok(set?)
}

/// The path MTU that the kernel holds for a connected socket, bytes.
#[cfg(target_os = "linux")]
pub(super) fn path_mtu(socket: &socket2::Socket, v6: bool) -> io::Result<usize> {
    let mtu = if v6 {
        sockopt::ipv6_mtu(socket)
    } else {
        sockopt::ip_mtu(socket)
    };
    Ok(usize::try_from(mtu?).unwrap_or(usize::MAX))
}

/// Lets the socket be bound to an address that is not this host's. Over IPv4 that
/// takes CAP_NET_RAW or CAP_NET_ADMIN (IP_TRANSPARENT in ip(7)), over IPv6
/// nothing (IPV6_FREEBIND, of which ipv6(7) does not tell).
#[cfg(target_os = "linux")]
pub(super) fn allow_foreign_source(socket: &socket2::Socket, v6: bool) -> io::Result<()> {
    if v6 {
        socket.set_freebind_v6(true)
    } else {
        socket.set_ip_transparent_v4(true)
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) fn allow_foreign_source(_: &socket2::Socket, _: bool) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(not(target_os = "linux"))]
pub(super) fn set_fragmentation(_: &socket2::Socket, _: bool, refuse: bool) -> io::Result<()> {
    if refuse {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
pub(super) fn path_mtu(_: &socket2::Socket, _: bool) -> io::Result<usize> {
    Err(io::ErrorKind::Unsupported.into())
}
