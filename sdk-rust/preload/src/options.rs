//! Socket options that are numbers, asked of the kernel and told to it.

use std::mem;
use std::net::SocketAddr;
use std::ptr;

use libc::{c_int, sockaddr_storage, socklen_t, timeval};

use crate::{names, real};

const INT: socklen_t = size_of::<c_int>() as socklen_t;

/// `None` if the descriptor is no socket, or the option isn't one of its kind's.
pub(crate) fn get(fd: c_int, level: c_int, option: c_int) -> Option<c_int> {
    let mut value: c_int = 0;
    let mut len = INT;
    // SAFETY: `len` bytes can be written at `value`.
    let result =
        unsafe { real::getsockopt(fd, level, option, (&raw mut value).cast(), &raw mut len) };
    (result == 0 && len == INT).then_some(value)
}

/// Whether the kernel accepted it.
pub(crate) fn set(fd: c_int, level: c_int, option: c_int, value: c_int) -> bool {
    // SAFETY: `INT` bytes can be read at `value`.
    unsafe { real::setsockopt(fd, level, option, (&raw const value).cast(), INT) == 0 }
}

/// AF_INET or AF_INET6 if the descriptor is a UDP socket.
pub(crate) fn udp_family(fd: c_int) -> Option<c_int> {
    let of_socket = |option| get(fd, libc::SOL_SOCKET, option);
    (of_socket(libc::SO_PROTOCOL)? == libc::IPPROTO_UDP
        && of_socket(libc::SO_TYPE)? == libc::SOCK_DGRAM)
        .then(|| of_socket(libc::SO_DOMAIN))?
        .filter(|family| [libc::AF_INET, libc::AF_INET6].contains(family))
}

/// From asm-generic/socket.h.
const SO_BINDTOIFINDEX: c_int = 62;
const SO_NETNS_COOKIE: c_int = 71;

/// The number of the network namespace that a socket is in; 0 before Linux 5.14, which
/// doesn't tell.
pub(crate) fn network(fd: c_int) -> u64 {
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>() as socklen_t;
    let at = (&raw mut cookie).cast();
    // SAFETY: `len` bytes can be written at `cookie`.
    unsafe { real::getsockopt(fd, libc::SOL_SOCKET, SO_NETNS_COOKIE, at, &raw mut len) };
    cookie
}

/// The index of the device that a socket is bound to; 0: none, or before Linux 5.1, which
/// doesn't tell.
pub(crate) fn device(fd: c_int) -> u32 {
    let index = get(fd, libc::SOL_SOCKET, SO_BINDTOIFINDEX);
    index.and_then(|index| index.try_into().ok()).unwrap_or(0)
}

/// Binds a socket to a device, if it isn't bound to one.
pub(crate) fn set_device(fd: c_int, device: u32) {
    if let Ok(index) = c_int::try_from(device)
        && index != 0
    {
        set(fd, libc::SOL_SOCKET, SO_BINDTOIFINDEX, index);
    }
}

/// Whether the option changes the device.
pub(crate) fn is_device(level: c_int, option: c_int) -> bool {
    level == libc::SOL_SOCKET && [libc::SO_BINDTODEVICE, SO_BINDTOIFINDEX].contains(&option)
}

/// Whether the kernel has connected a socket.
pub(crate) fn is_connected(fd: c_int) -> bool {
    let mut len = 0;
    // SAFETY: nothing is written to the name.
    unsafe { real::getpeername(fd, ptr::null_mut(), &raw mut len) == 0 }
}

/// The address that a socket is bound to, IPv4-mapped ones as IPv4.
pub(crate) fn local(fd: c_int) -> Option<SocketAddr> {
    // SAFETY: zeros are a valid value.
    let mut name: sockaddr_storage = unsafe { mem::zeroed() };
    let mut len = size_of::<sockaddr_storage>() as socklen_t;
    let at = (&raw mut name).cast();
    // SAFETY: `len` bytes can be written at `name`.
    if unsafe { real::getsockname(fd, at, &raw mut len) } != 0 {
        return None;
    }
    // SAFETY: the kernel has written `len` bytes.
    unsafe { names::read(ptr::from_ref(&name).cast(), len) }
}

/// SO_RCVTIMEO or SO_SNDTIMEO of the one becomes that of the other.
pub(crate) fn copy_timeout(from: c_int, to: c_int, option: c_int) {
    let mut timeout = timeval {
        tv_sec: 0,
        tv_usec: 0,
    };
    let mut len = size_of::<timeval>() as socklen_t;
    let at = (&raw mut timeout).cast();
    // SAFETY: `len` bytes can be written at `timeout`.
    if unsafe { real::getsockopt(from, libc::SOL_SOCKET, option, at, &raw mut len) } == 0
        && (timeout.tv_sec, timeout.tv_usec) != (0, 0)
    {
        // SAFETY: `len` bytes can be read at `timeout`.
        unsafe { real::setsockopt(to, libc::SOL_SOCKET, option, at, len) };
    }
}
