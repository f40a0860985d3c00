//! The functions that receive.

use std::mem;
use std::ptr;

use libc::{
    EFAULT, EINVAL, c_int, c_uint, c_void, iovec, mmsghdr, msghdr, off64_t, size_t, sockaddr,
    socklen_t, ssize_t, timespec,
};

use super::hooks;
use crate::boundary::{fail, is_plausible};
use crate::receive::{self, check_parts};
use crate::socket::Socket;
use crate::{passed, real, registry};

hooks! {
    fn recv(fd: c_int, buffer: *mut c_void, len: size_t, flags: c_int) -> ssize_t {
        match registry::get(fd) {
            // SAFETY: the program keeps to the manual.
            Some(socket) => unsafe { into_buffer(fd, socket, buffer, len, flags) },
            // SAFETY: as above.
            None => unsafe { real::recv(fd, buffer, len, flags) },
        }
    }

    fn recvfrom(fd: c_int, buffer: *mut c_void, len: size_t, flags: c_int, name: *mut sockaddr, name_len: *mut socklen_t) -> ssize_t {
        match registry::get(fd) {
            // SAFETY: the program keeps to the manual.
            Some(socket) => unsafe { with_name(fd, socket, buffer, len, flags, name, name_len) },
            // SAFETY: as above.
            None => unsafe { real::recvfrom(fd, buffer, len, flags, name, name_len) },
        }
    }

    fn recvmsg(fd: c_int, message: *mut msghdr, flags: c_int) -> ssize_t {
        match registry::get(fd) {
            // SAFETY: the program keeps to the manual.
            Some(socket) => unsafe { receive::message(fd, socket, message, flags) },
            // SAFETY: as above.
            None => unsafe {
                let received = real::recvmsg(fd, message, flags);
                passed::in_message(received, message);
                received
            },
        }
    }

    fn recvmmsg(fd: c_int, messages: *mut mmsghdr, count: c_uint, flags: c_int, timeout: *mut timespec) -> c_int {
        match registry::get(fd) {
            // SAFETY: the program keeps to the manual.
            Some(socket) => unsafe { receive::messages(fd, socket, messages, count, flags, timeout) },
            // SAFETY: as above.
            None => unsafe {
                let received = real::recvmmsg(fd, messages, count, flags, timeout);
                passed::in_messages(received, messages);
                received
            },
        }
    }

    fn read(fd: c_int, buffer: *mut c_void, len: size_t) -> ssize_t {
        // read(2) of nothing leaves the queue as it is, other than recv(2).
        if let Some(socket) = registry::get(fd).filter(|_| len > 0) {
            // SAFETY: the program keeps to the manual.
            let received = unsafe { into_buffer(fd, socket, buffer, len, 0) };
            if received >= 0 || !super::is_stale(fd) {
                return received;
            }
        }
        // SAFETY: as above.
        unsafe { real::read(fd, buffer, len) }
    }

    fn readv(fd: c_int, parts: *const iovec, count: c_int) -> ssize_t {
        if let Some(socket) = registry::get(fd) {
            // SAFETY: the program keeps to the manual.
            let received = unsafe { into_parts(fd, socket, parts, count) };
            if received >= 0 || !super::is_stale(fd) {
                return received;
            }
        }
        // SAFETY: as above.
        unsafe { real::readv(fd, parts, count) }
    }

    /// Without an offset, it reads as readv does.
    fn preadv2(fd: c_int, parts: *const iovec, count: c_int, offset: off64_t, flags: c_int) -> ssize_t {
        match registry::get(fd) {
            // SAFETY: the program keeps to the manual.
            Some(socket) if offset == -1 && flags == 0 => unsafe { into_parts(fd, socket, parts, count) },
            // SAFETY: as above.
            _ => unsafe { real::preadv2(fd, parts, count, offset, flags) },
        }
    }

    fn preadv64v2(fd: c_int, parts: *const iovec, count: c_int, offset: off64_t, flags: c_int) -> ssize_t {
        // SAFETY: the program keeps to the manual.
        unsafe { preadv2(fd, parts, count, offset, flags) }
    }

    fn __read(fd: c_int, buffer: *mut c_void, len: size_t) -> ssize_t {
        // SAFETY: the program keeps to the manual.
        unsafe { read(fd, buffer, len) }
    }

    // What the compiler calls in place of a function when it knows how large the buffer is
    // (_FORTIFY_SOURCE). The real ones end the program if the length is larger.

    fn __read_chk(fd: c_int, buffer: *mut c_void, len: size_t, size: size_t) -> ssize_t {
        if len > size {
            // SAFETY: it does not return.
            return unsafe { real::__read_chk(fd, buffer, len, size) };
        }
        // SAFETY: the program keeps to the manual.
        unsafe { read(fd, buffer, len) }
    }

    fn __recv_chk(fd: c_int, buffer: *mut c_void, len: size_t, size: size_t, flags: c_int) -> ssize_t {
        if len > size {
            // SAFETY: it does not return.
            return unsafe { real::__recv_chk(fd, buffer, len, size, flags) };
        }
        // SAFETY: the program keeps to the manual.
        unsafe { recv(fd, buffer, len, flags) }
    }

    fn __recvfrom_chk(fd: c_int, buffer: *mut c_void, len: size_t, size: size_t, flags: c_int, name: *mut sockaddr, name_len: *mut socklen_t) -> ssize_t {
        if len > size {
            // SAFETY: it does not return.
            return unsafe { real::__recvfrom_chk(fd, buffer, len, size, flags, name, name_len) };
        }
        // SAFETY: the program keeps to the manual.
        unsafe { recvfrom(fd, buffer, len, flags, name, name_len) }
    }
}

/// # Safety
///
/// As recv(2).
unsafe fn into_buffer(
    fd: c_int,
    socket: &Socket,
    buffer: *mut c_void,
    len: size_t,
    flags: c_int,
) -> ssize_t {
    // SAFETY: as the caller says.
    unsafe {
        let none = ptr::null_mut();
        with_name(fd, socket, buffer, len, flags, none, ptr::null_mut())
    }
}

/// # Safety
///
/// As recvfrom(2).
unsafe fn with_name(
    fd: c_int,
    socket: &Socket,
    buffer: *mut c_void,
    len: size_t,
    flags: c_int,
    name: *mut sockaddr,
    name_len: *mut socklen_t,
) -> ssize_t {
    let mut part = iovec {
        iov_base: buffer,
        // The kernel cuts it so too.
        iov_len: len.min(isize::MAX as usize),
    };
    // SAFETY: zeroes are a valid value.
    let mut message: msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    // The kernel says what is wrong with these when it has received.
    let mut wrong = 0;
    if !name.is_null() {
        if is_plausible(name) && is_plausible(name_len) {
            // SAFETY: as the caller says.
            message.msg_namelen = unsafe { name_len.read() };
            if c_int::try_from(message.msg_namelen).is_ok() {
                message.msg_name = name.cast();
            } else {
                wrong = EINVAL;
            }
        } else {
            wrong = EFAULT;
            // Seen when the datagram has been received.
            message.msg_name = ptr::without_provenance_mut(1);
        }
    }
    // SAFETY: as the caller says.
    let received = unsafe { receive::plain(fd, socket, &raw mut message, flags) };
    if received < 0 || name.is_null() {
        return received;
    }
    if wrong != 0 {
        return fail(wrong);
    }
    // SAFETY: as the caller says.
    unsafe { name_len.write(message.msg_namelen) };
    received
}

/// # Safety
///
/// As readv(2).
unsafe fn into_parts(fd: c_int, socket: &Socket, parts: *const iovec, count: c_int) -> ssize_t {
    let Ok(len) = usize::try_from(count) else {
        return fail(EINVAL);
    };
    // SAFETY: as the caller says.
    if let Err(errno) = unsafe { check_parts(parts, len, EINVAL) } {
        return fail(errno);
    }
    // readv(2) of nothing leaves the queue as it is.
    // SAFETY: as the caller says; no fault was found.
    if (0..len).all(|at| unsafe { (*parts.add(at)).iov_len } == 0) {
        return 0;
    }
    // SAFETY: zeroes are a valid value.
    let mut message: msghdr = unsafe { mem::zeroed() };
    message.msg_iov = parts.cast_mut();
    message.msg_iovlen = len as _;
    // SAFETY: as the caller says.
    unsafe { receive::plain(fd, socket, &raw mut message, 0) }
}
