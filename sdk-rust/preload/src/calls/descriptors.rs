//! close, dup, fcntl, ioctl and their like.

use libc::{Ioctl, c_int, c_uint, c_ulong};

use super::hooks;
use crate::boundary::{guarded, is_plausible};
use crate::socket::Flag;
use crate::{connect, real, receive, registry, wait};

/// A number that refers to no descriptor.
const NOWHERE: c_uint = c_int::MAX as c_uint;

const UNSHARE: c_int = libc::CLOSE_RANGE_UNSHARE as c_int;
const CLOEXEC: c_int = libc::CLOSE_RANGE_CLOEXEC as c_int;

/// A descriptor is about to be closed.
#[inline]
fn closing(fd: c_int) {
    connect::forget(fd);
    wait::forget(fd);
    if registry::get(fd).is_some() {
        guarded((), || {
            connect::keep(fd);
            registry::remove(fd);
        });
    }
}

/// A descriptor is new, and refers to what `from` does.
#[inline]
fn duplicated(from: c_int, to: c_int) -> c_int {
    if to != -1 && to != from {
        connect::forget(to);
        wait::forget(to);
        if registry::get(from).is_some() || registry::get(to).is_some() {
            guarded((), || registry::share(from, to));
        }
    }
    to
}

#[inline]
fn controlled(fd: c_int, command: c_int, argument: c_ulong, result: c_int) -> c_int {
    match command {
        libc::F_DUPFD | libc::F_DUPFD_CLOEXEC => duplicated(fd, result),
        libc::F_SETFL if result == 0 => {
            if let Some(socket) = registry::get(fd) {
                let on = argument & libc::O_NONBLOCK as c_ulong != 0;
                socket.set(Flag::NonBlocking, on);
            }
            result
        }
        _ => result,
    }
}

/// All descriptors of a range are about to be closed.
fn closing_between(first: c_uint, last: c_uint) {
    guarded((), || {
        connect::forget_between(first, last);
        wait::forget_between(first, last);
        for fd in registry::between(first, last) {
            registry::remove(fd);
        }
    });
}

hooks! {
    fn close(fd: c_int) -> c_int {
        closing(fd);
        // SAFETY: the arguments are the program's.
        unsafe { real::close(fd) }
    }

    fn __close(fd: c_int) -> c_int {
        // SAFETY: the arguments are the program's.
        unsafe { close(fd) }
    }

    fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
        // Sockets are let go before the real call, as by `close`; so it must be known that it
        // will succeed, as a kernel before 5.9 would not.
        let closes = flags & CLOEXEC == 0
            && first <= last
            // SAFETY: nothing is closed.
            && unsafe { real::close_range(NOWHERE, NOWHERE, flags & !UNSHARE) } == 0;
        if closes {
            closing_between(first, last);
        }
        // SAFETY: the arguments are the program's.
        unsafe { real::close_range(first, last, flags) }
    }

    fn closefrom(first: c_int) {
        closing_between(c_uint::try_from(first).unwrap_or(0), c_uint::MAX);
        // SAFETY: the arguments are the program's.
        unsafe { real::closefrom(first) }
    }

    fn dup(fd: c_int) -> c_int {
        // SAFETY: the arguments are the program's.
        duplicated(fd, unsafe { real::dup(fd) })
    }

    fn dup2(fd: c_int, to: c_int) -> c_int {
        // SAFETY: the arguments are the program's.
        duplicated(fd, unsafe { real::dup2(fd, to) })
    }

    fn __dup2(fd: c_int, to: c_int) -> c_int {
        // SAFETY: the arguments are the program's.
        unsafe { dup2(fd, to) }
    }

    fn dup3(fd: c_int, to: c_int, flags: c_int) -> c_int {
        // SAFETY: the arguments are the program's.
        duplicated(fd, unsafe { real::dup3(fd, to, flags) })
    }

    fn fcntl(fd: c_int, command: c_int, argument: c_ulong) -> c_int {
        // SAFETY: the arguments are the program's.
        let result = unsafe { real::fcntl(fd, command, argument) };
        controlled(fd, command, argument, result)
    }

    fn __fcntl(fd: c_int, command: c_int, argument: c_ulong) -> c_int {
        // SAFETY: the arguments are the program's.
        unsafe { fcntl(fd, command, argument) }
    }

    fn fcntl64(fd: c_int, command: c_int, argument: c_ulong) -> c_int {
        // SAFETY: the arguments are the program's.
        let result = unsafe { real::fcntl64(fd, command, argument) };
        controlled(fd, command, argument, result)
    }

    /// The request is an int to musl, whose callers leave the other half of the register as it is.
    fn ioctl(fd: c_int, request: Ioctl, argument: c_ulong) -> c_int {
        if let Some(socket) = registry::get(fd) {
            let value = argument as *mut c_int;
            let is_length = request == libc::FIONREAD as Ioctl && is_plausible(value);
            if is_length
                && !socket.is(Flag::Direct)
                && let Some(len) = guarded(Some(0), || receive::next_len(fd, socket))
            {
                // SAFETY: the program passes where to write the number.
                unsafe { value.write(c_int::try_from(len).unwrap_or(c_int::MAX)) };
                return 0;
            }
            // SAFETY: the arguments are the program's.
            let result = unsafe { real::ioctl(fd, request, argument) };
            if request == libc::FIONBIO as Ioctl && result == 0 {
                // SAFETY: the kernel has read the number there.
                socket.set(Flag::NonBlocking, unsafe { value.read() } != 0);
            }
            return result;
        }
        // SAFETY: the arguments are the program's.
        unsafe { real::ioctl(fd, request, argument) }
    }
}

#[cfg(test)]
mod tests;
