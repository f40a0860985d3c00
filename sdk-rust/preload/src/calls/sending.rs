//! The functions that send.

use std::mem;
use std::ptr;

use libc::{
    EINVAL, c_int, c_uint, c_void, iovec, mmsghdr, msghdr, off64_t, size_t, sockaddr,
    sockaddr_storage, socklen_t, ssize_t,
};

use super::hooks;
use crate::boundary::{fail, is_plausible};
use crate::receive::check_parts;
use crate::send;
use crate::socket::Socket;
use crate::{connect, real, registry};

/// The longest address that the kernel reads.
const ADDRESS: usize = size_of::<sockaddr_storage>();

hooks! {
    fn send(fd: c_int, buffer: *const c_void, len: size_t, flags: c_int) -> ssize_t {
        match registry::get(fd) {
            // SAFETY: the program keeps to the manual.
            Some(socket) => unsafe { from_buffer(fd, socket, buffer, len, flags) },
            // SAFETY: as above.
            None => unsafe { real::send(fd, buffer, len, flags) },
        }
    }

    fn sendto(fd: c_int, buffer: *const c_void, len: size_t, flags: c_int, name: *const sockaddr, name_len: socklen_t) -> ssize_t {
        // SAFETY: the program keeps to the manual.
        match unsafe { sending(fd, name, name_len) } {
            // SAFETY: as above.
            Some(socket) => unsafe { to_name(fd, socket, buffer, len, flags, name, name_len) },
            // SAFETY: as above.
            None => unsafe { real::sendto(fd, buffer, len, flags, name, name_len) },
        }
    }

    fn sendmsg(fd: c_int, message: *const msghdr, flags: c_int) -> ssize_t {
        // SAFETY: the program keeps to the manual.
        match unsafe { sending_message(fd, message) } {
            // SAFETY: as above.
            Some(socket) => unsafe { send::message(fd, socket, message, flags) },
            // SAFETY: as above.
            None => unsafe { real::sendmsg(fd, message, flags) },
        }
    }

    fn sendmmsg(fd: c_int, messages: *mut mmsghdr, count: c_uint, flags: c_int) -> c_int {
        let first = if count == 0 { ptr::null() } else { messages };
        // SAFETY: the program keeps to the manual; a message begins with its header.
        match unsafe { sending_message(fd, first.cast()) } {
            // SAFETY: as above.
            Some(socket) => unsafe { send::messages(fd, socket, messages, count, flags) },
            // SAFETY: as above.
            None => unsafe { real::sendmmsg(fd, messages, count, flags) },
        }
    }

    fn write(fd: c_int, buffer: *const c_void, len: size_t) -> ssize_t {
        if let Some(socket) = registry::get(fd) {
            // SAFETY: the program keeps to the manual.
            let sent = unsafe { from_buffer(fd, socket, buffer, len, 0) };
            if sent >= 0 || !super::is_stale(fd) {
                return sent;
            }
        }
        // SAFETY: as above.
        unsafe { real::write(fd, buffer, len) }
    }

    fn writev(fd: c_int, parts: *const iovec, count: c_int) -> ssize_t {
        if let Some(socket) = registry::get(fd) {
            // SAFETY: the program keeps to the manual.
            let sent = unsafe { from_parts(fd, socket, parts, count) };
            if sent >= 0 || !super::is_stale(fd) {
                return sent;
            }
        }
        // SAFETY: as above.
        unsafe { real::writev(fd, parts, count) }
    }

    /// Without an offset, it writes as writev does.
    fn pwritev2(fd: c_int, parts: *const iovec, count: c_int, offset: off64_t, flags: c_int) -> ssize_t {
        match registry::get(fd) {
            // SAFETY: the program keeps to the manual.
            Some(socket) if offset == -1 && flags == 0 => unsafe { from_parts(fd, socket, parts, count) },
            // SAFETY: as above.
            _ => unsafe { real::pwritev2(fd, parts, count, offset, flags) },
        }
    }

    fn pwritev64v2(fd: c_int, parts: *const iovec, count: c_int, offset: off64_t, flags: c_int) -> ssize_t {
        // SAFETY: the program keeps to the manual.
        unsafe { pwritev2(fd, parts, count, offset, flags) }
    }

    fn __write(fd: c_int, buffer: *const c_void, len: size_t) -> ssize_t {
        // SAFETY: the program keeps to the manual.
        unsafe { write(fd, buffer, len) }
    }

    fn __send(fd: c_int, buffer: *const c_void, len: size_t, flags: c_int) -> ssize_t {
        // SAFETY: the program keeps to the manual.
        unsafe { send(fd, buffer, len, flags) }
    }
}

/// The socket that the program sends from, if its datagrams go by reply paths.
///
/// # Safety
///
/// As sendto(2).
#[inline]
unsafe fn sending(fd: c_int, name: *const sockaddr, len: socklen_t) -> Option<&'static Socket> {
    registry::get(fd).or_else(|| {
        // SAFETY: as the caller says.
        unsafe { connect::adopt_at_send(fd, name, len) }
    })
}

/// # Safety
///
/// As sendmsg(2).
#[inline]
unsafe fn sending_message(fd: c_int, message: *const msghdr) -> Option<&'static Socket> {
    if !is_plausible(message) {
        return registry::get(fd);
    }
    // SAFETY: as the caller says.
    unsafe { sending(fd, (*message).msg_name.cast(), (*message).msg_namelen) }
}

/// # Safety
///
/// As send(2).
unsafe fn from_buffer(
    fd: c_int,
    socket: &Socket,
    buffer: *const c_void,
    len: size_t,
    flags: c_int,
) -> ssize_t {
    // SAFETY: as the caller says.
    unsafe { to_name(fd, socket, buffer, len, flags, ptr::null(), 0) }
}

/// # Safety
///
/// As sendto(2).
unsafe fn to_name(
    fd: c_int,
    socket: &Socket,
    buffer: *const c_void,
    len: size_t,
    flags: c_int,
    name: *const sockaddr,
    name_len: socklen_t,
) -> ssize_t {
    // Other than in a message, an address without bytes is one, and a long one isn't cut.
    if !name.is_null() && !(1..=ADDRESS).contains(&(name_len as usize)) {
        return fail(EINVAL);
    }
    if !name.is_null() {
        // SAFETY: as the caller says.
        let sent = unsafe { send::again(fd, socket, buffer, len, flags, name, name_len) };
        if let Some(sent) = sent {
            return sent;
        }
    }
    let mut part = iovec {
        iov_base: buffer.cast_mut(),
        iov_len: len.min(isize::MAX as usize),
    };
    // SAFETY: zeroes are a valid value.
    let mut message: msghdr = unsafe { mem::zeroed() };
    message.msg_name = name.cast_mut().cast();
    message.msg_namelen = name_len;
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    // SAFETY: as the caller says.
    unsafe { send::message(fd, socket, &raw const message, flags) }
}

/// # Safety
///
/// As writev(2).
unsafe fn from_parts(fd: c_int, socket: &Socket, parts: *const iovec, count: c_int) -> ssize_t {
    let Ok(len) = usize::try_from(count) else {
        return fail(EINVAL);
    };
    // SAFETY: as the caller says.
    if let Err(errno) = unsafe { check_parts(parts, len, EINVAL) } {
        return fail(errno);
    }
    // writev(2) of nothing sends nothing, other than write(2).
    // SAFETY: as the caller says; no fault was found.
    if (0..len).all(|at| unsafe { (*parts.add(at)).iov_len } == 0) {
        return 0;
    }
    // SAFETY: zeroes are a valid value.
    let mut message: msghdr = unsafe { mem::zeroed() };
    message.msg_iov = parts.cast_mut();
    message.msg_iovlen = len as _;
    // SAFETY: as the caller says.
    unsafe { send::message(fd, socket, &raw const message, 0) }
}
