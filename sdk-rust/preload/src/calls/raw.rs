//! syscall(2), by which libraries call functions that older C libraries lack.

use libc::{c_int, c_long, c_uint};

use super::{descriptors, hooks, receiving, sending};
use crate::{real, registry};

hooks! {
    fn syscall(number: c_long, a: c_long, b: c_long, c: c_long, d: c_long, e: c_long, f: c_long) -> c_long {
        // SAFETY: the program keeps to the manual of the system call.
        unsafe {
            match number {
                // libuv closes so.
                libc::SYS_close => descriptors::close(a as c_int).into(),
                libc::SYS_close_range => {
                    descriptors::close_range(a as c_uint, b as c_uint, c as c_int).into()
                }
                _ if is_ours(number) && registry::get(a as c_int).is_some() => {
                    ours(number, a, b, c, d, e, f)
                }
                _ => real::syscall(number, a, b, c, d, e, f),
            }
        }
    }
}

fn is_ours(number: c_long) -> bool {
    matches!(
        number,
        libc::SYS_read
            | libc::SYS_readv
            | libc::SYS_recvfrom
            | libc::SYS_recvmsg
            | libc::SYS_recvmmsg
            | libc::SYS_write
            | libc::SYS_writev
            | libc::SYS_sendto
            | libc::SYS_sendmsg
            | libc::SYS_sendmmsg
    )
}

/// # Safety
///
/// As the system call of this number.
#[expect(
    clippy::cast_possible_truncation,
    reason = "system calls look at as many bits as their arguments have"
)]
#[expect(clippy::cast_sign_loss, reason = "lengths come in signed registers")]
unsafe fn ours(
    number: c_long,
    a: c_long,
    b: c_long,
    c: c_long,
    d: c_long,
    e: c_long,
    f: c_long,
) -> c_long {
    let fd = a as c_int;
    // SAFETY: as the caller says, who passes what the function of this name takes.
    unsafe {
        match number {
            libc::SYS_read => receiving::read(fd, b as _, c as _) as c_long,
            libc::SYS_readv => receiving::readv(fd, b as _, c as c_int) as c_long,
            libc::SYS_recvfrom => {
                receiving::recvfrom(fd, b as _, c as _, d as c_int, e as _, f as _) as c_long
            }
            libc::SYS_recvmsg => receiving::recvmsg(fd, b as _, c as c_int) as c_long,
            libc::SYS_recvmmsg => {
                receiving::recvmmsg(fd, b as _, c as c_uint, d as c_int, e as _).into()
            }
            libc::SYS_write => sending::write(fd, b as _, c as _) as c_long,
            libc::SYS_writev => sending::writev(fd, b as _, c as c_int) as c_long,
            libc::SYS_sendto => {
                sending::sendto(fd, b as _, c as _, d as c_int, e as _, f as _) as c_long
            }
            libc::SYS_sendmsg => sending::sendmsg(fd, b as _, c as c_int) as c_long,
            libc::SYS_sendmmsg => sending::sendmmsg(fd, b as _, c as c_uint, d as c_int).into(),
            _ => real::syscall(number, a, b, c, d, e, f),
        }
    }
}
