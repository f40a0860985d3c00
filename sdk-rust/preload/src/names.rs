//! Socket addresses as the C library passes them.

use std::net::SocketAddr;

use libc::{c_int, sockaddr, sockaddr_storage, socklen_t};

/// The address behind a pointer, IPv4-mapped ones as such; `None` if it is null, too short
/// or of another family.
///
/// # Safety
///
/// `name` is null, or `len` bytes can be read there.
pub(crate) unsafe fn read(_name: *const sockaddr, _len: socklen_t) -> Option<SocketAddr> {
    todo!()
}

/// As the kernel would report the address on a socket of this family; `None` for IPv6 on
/// an IPv4 socket.
pub(crate) fn written(
    _address: SocketAddr,
    _family: c_int,
) -> Option<(sockaddr_storage, socklen_t)> {
    todo!()
}

/// Gives the program an address as recvfrom(2) and getpeername(2) do: cut to `*len`,
/// which becomes the whole length.
///
/// # Safety
///
/// `name` is null, or `len` can be read and written and `*len` bytes written at `name`.
pub(crate) unsafe fn give(
    _address: SocketAddr,
    _family: c_int,
    _name: *mut sockaddr,
    _len: *mut socklen_t,
) {
    todo!()
}
