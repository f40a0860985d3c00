//! Socket options of the proxy's sockets, set by safe calls.

use std::io;

use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};

/// Never fragment, or fragment wherever it is needed, IPv4 routers included (ip(7),
/// ipv6(7)). Either way the outgoing interface's MTU decides here: what ICMP says of
/// a path's MTU can be forged, and the kernel would believe it for ten minutes.
pub(crate) fn set_fragmentation(
    socket: &socket2::Socket,
    v6: bool,
    dont_fragment: bool,
) -> io::Result<()> {
    let set = match (v6, dont_fragment) {
        (false, true) => sockopt::set_ip_mtu_discover(socket, Ipv4PathMtuDiscovery::PROBE),
        (false, false) => sockopt::set_ip_mtu_discover(socket, Ipv4PathMtuDiscovery::OMIT),
        (true, true) => sockopt::set_ipv6_mtu_discover(socket, Ipv6PathMtuDiscovery::PROBE),
        (true, false) => sockopt::set_ipv6_mtu_discover(socket, Ipv6PathMtuDiscovery::OMIT),
    };
    Ok(set?)
}

/// Lets the socket be bound to an address that this host does not have yet, which takes
/// no privilege (IP_FREEBIND in ip(7)).
pub(crate) fn allow_missing_address(socket: &socket2::Socket, v6: bool) -> io::Result<()> {
    if v6 {
        socket.set_freebind_v6(true)
    } else {
        socket.set_freebind_v4(true)
    }
}

/// Lets the socket be bound to an address that is not this host's. Over IPv4 that
/// takes CAP_NET_RAW or CAP_NET_ADMIN (IP_TRANSPARENT in ip(7)), over IPv6
/// nothing (IPV6_FREEBIND, which ipv6(7) does not mention).
pub(crate) fn allow_foreign_source(socket: &socket2::Socket, v6: bool) -> io::Result<()> {
    if v6 {
        socket.set_freebind_v6(true)
    } else {
        socket.set_ip_transparent_v4(true)
    }
}
