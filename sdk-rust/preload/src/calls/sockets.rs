//! socket, bind, connect, getpeername, getsockname, setsockopt, getsockopt.

use std::slice;

use libc::{c_int, c_void, sockaddr, socklen_t};

use super::hooks;
use crate::boundary::{fail, guarded, is_plausible};
use crate::connect::{self, Decision};
use crate::socket::{Flag, Socket};
use crate::{lifecycle, names, options, real, registry};

/// A descriptor is new: whatever had the number before was closed, even if unseen.
#[inline]
fn made(fd: c_int) -> c_int {
    connect::forget(fd);
    if registry::get(fd).is_some() {
        guarded((), || registry::remove(fd));
    }
    fd
}

/// The number that the program passes for an option, as the kernel reads it.
unsafe fn number(value: *const c_void, len: socklen_t) -> Option<c_int> {
    // SAFETY: the program passes `len` bytes.
    unsafe {
        match len {
            0 => None,
            1..4 => Some(value.cast::<u8>().read().into()),
            _ => Some(value.cast::<c_int>().read_unaligned()),
        }
    }
}

/// What the program is told of, or the kernel is not told, for each option.
fn flag_of(socket: &Socket, level: c_int, option: c_int) -> Option<Flag> {
    match (level, option) {
        (libc::IPPROTO_IP, libc::IP_PKTINFO) => Some(Flag::WantsPktinfo),
        (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO) if socket.family() == libc::AF_INET6 => {
            Some(Flag::WantsPktinfo6)
        }
        (libc::IPPROTO_UDP, libc::UDP_GRO) => Some(Flag::WantsGro),
        _ => None,
    }
}

unsafe fn set_option(
    fd: c_int,
    socket: &Socket,
    level: c_int,
    option: c_int,
    value: *const c_void,
    len: socklen_t,
) -> c_int {
    if !is_plausible(value) {
        // SAFETY: the arguments are the program's.
        return unsafe { real::setsockopt(fd, level, option, value, len) };
    }
    // SAFETY: the arguments are the program's.
    let number = unsafe { number(value, len) };
    let flag = flag_of(socket, level, option);
    if flag == Some(Flag::WantsGro) {
        return match number.filter(|_| len >= 4) {
            Some(on) => {
                socket.set(Flag::WantsGro, on != 0);
                0
            }
            None if value.is_null() => fail(libc::EFAULT),
            None => fail(libc::EINVAL),
        };
    }
    if (level, option) == (libc::SOL_SOCKET, libc::SO_PEEK_OFF) {
        // The header would be counted.
        return fail(libc::EOPNOTSUPP);
    }
    // SAFETY: the arguments are the program's.
    let result = unsafe { real::setsockopt(fd, level, option, value, len) };
    if result != 0 {
        return result;
    }
    if let (Some(flag), Some(on)) = (flag, number) {
        socket.set(flag, on != 0);
        lifecycle::tell_local_addresses(fd, socket);
    }
    if options::is_device(level, option) && !guarded(false, || lifecycle::moved(fd, socket)) {
        // Its clients could be mixed up with those of other networks.
        return fail(libc::ENOBUFS);
    }
    if (level, option) == (libc::IPPROTO_UDP, libc::UDP_CORK) {
        socket.set(Flag::Cork, number.is_some_and(|on| on != 0));
        socket.set(Flag::Begun, false);
    }
    if (level, option) == (libc::IPPROTO_UDP, libc::UDP_SEGMENT) {
        socket.set_segment(number.and_then(|len| u16::try_from(len).ok()).unwrap_or(0));
    }
    result
}

hooks! {
    fn socket(family: c_int, kind: c_int, protocol: c_int) -> c_int {
        // SAFETY: the arguments are the program's.
        made(unsafe { real::socket(family, kind, protocol) })
    }

    fn socketpair(family: c_int, kind: c_int, protocol: c_int, pair: *mut c_int) -> c_int {
        // SAFETY: the arguments are the program's.
        let result = unsafe { real::socketpair(family, kind, protocol, pair) };
        if result == 0 {
            // SAFETY: the kernel has written both numbers.
            unsafe {
                made(pair.read());
                made(pair.add(1).read());
            }
        }
        result
    }

    fn accept(fd: c_int, name: *mut sockaddr, len: *mut socklen_t) -> c_int {
        // SAFETY: the arguments are the program's.
        made(unsafe { real::accept(fd, name, len) })
    }

    fn accept4(fd: c_int, name: *mut sockaddr, len: *mut socklen_t, flags: c_int) -> c_int {
        // SAFETY: the arguments are the program's.
        made(unsafe { real::accept4(fd, name, len, flags) })
    }

    fn bind(fd: c_int, name: *const sockaddr, len: socklen_t) -> c_int {
        // SAFETY: the arguments are the program's.
        connect::binds(unsafe { names::port(name, len) });
        // SAFETY: the arguments are the program's.
        let result = unsafe { real::bind(fd, name, len) };
        // A socket that can't be taken over would let everybody's datagrams through.
        // SAFETY: the kernel has read the name.
        if result == 0 && !guarded(false, || unsafe { lifecycle::bound(fd, name, len) }) {
            return fail(libc::ENOBUFS);
        }
        result
    }

    fn connect(fd: c_int, name: *const sockaddr, len: socklen_t) -> c_int {
        let decision = if registry::is_used() {
            // SAFETY: the arguments are the program's.
            guarded(Decision::Fail(libc::EIO), || unsafe {
                connect::decide(fd, name, len)
            })
        } else {
            Decision::Pass
        };
        match decision {
            // SAFETY: the arguments are the program's.
            Decision::Pass => unsafe { real::connect(fd, name, len) },
            Decision::PassDirect => {
                // SAFETY: the arguments are the program's.
                let result = unsafe { real::connect(fd, name, len) };
                if result == 0 && let Some(socket) = registry::get(fd) {
                    guarded((), || {
                        connect::connected_directly(fd, socket);
                        lifecycle::tell_local_addresses(fd, socket);
                    });
                }
                result
            }
            Decision::Done => {
                if let Some(socket) = registry::get(fd) {
                    guarded((), || lifecycle::tell_local_addresses(fd, socket));
                }
                0
            }
            Decision::Fail(errno) => fail(errno),
        }
    }

    fn __connect(fd: c_int, name: *const sockaddr, len: socklen_t) -> c_int {
        // SAFETY: the arguments are the program's.
        unsafe { connect(fd, name, len) }
    }

    fn getpeername(fd: c_int, name: *mut sockaddr, len: *mut socklen_t) -> c_int {
        if let Some(socket) = registry::get(fd)
            && let Some(client) = socket.peer()
        {
            if socket.is(Flag::KernelOnly) {
                return fail(libc::ENOTCONN);
            }
            if !is_plausible(name) || !is_plausible(len) {
                return fail(libc::EFAULT);
            }
            // SAFETY: the arguments are the program's.
            unsafe {
                if c_int::try_from(len.read()).is_err() {
                    return fail(libc::EINVAL);
                }
                names::give(client, socket.family(), name, len);
            }
            return 0;
        }
        // SAFETY: the arguments are the program's.
        unsafe { real::getpeername(fd, name, len) }
    }

    fn setsockopt(
        fd: c_int,
        level: c_int,
        option: c_int,
        value: *const c_void,
        len: socklen_t,
    ) -> c_int {
        // SAFETY: the arguments are the program's.
        unsafe {
            match registry::get(fd) {
                Some(socket) => set_option(fd, socket, level, option, value, len),
                None => real::setsockopt(fd, level, option, value, len),
            }
        }
    }

    fn getsockopt(
        fd: c_int,
        level: c_int,
        option: c_int,
        value: *mut c_void,
        len: *mut socklen_t,
    ) -> c_int {
        // SAFETY: the arguments are the program's.
        let result = unsafe { real::getsockopt(fd, level, option, value, len) };
        if result == 0
            && let Some(socket) = registry::get(fd)
            && let Some(flag) = flag_of(socket, level, option)
        {
            let asked = c_int::from(socket.is(flag)).to_ne_bytes();
            // SAFETY: the kernel has written `len`, and as many bytes at `value`.
            let told = unsafe { slice::from_raw_parts_mut(value.cast::<u8>(), len.read() as usize) };
            for (told, asked) in told.iter_mut().zip(asked) {
                *told = asked;
            }
        }
        result
    }
}

#[cfg(test)]
mod tests;
