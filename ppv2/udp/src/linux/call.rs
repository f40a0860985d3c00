//! The four system calls of the data path, straight to the kernel: libc's own
//! are points at which a thread can be cancelled (pthreads(7)), which a program
//! with threads pays for at each call and this one has no use for.

use std::io;
use std::os::fd::RawFd;
use std::ptr;

use libc::{c_int, c_long, mmsghdr, msghdr, timespec};

const FLAGS: c_int = libc::MSG_DONTWAIT;

/// recvmmsg(2), or recvmsg(2) for a single message, which is cheaper. Never
/// blocks. Returns how many messages were received.
///
/// # Safety
///
/// `messages` points at `count` messages whose names, vectors and control
/// buffers are valid for writes.
pub(super) unsafe fn receive(
    socket: RawFd,
    messages: *mut mmsghdr,
    count: usize,
) -> io::Result<usize> {
    // SAFETY: the arguments are those of the calls' manual pages, and valid by
    // the caller's promise.
    unsafe {
        if count == 1 {
            let header = &raw mut (*messages).msg_hdr;
            let len = libc::syscall(libc::SYS_recvmsg, socket, header, FLAGS);
            (*messages).msg_len = length(len)?;
            return Ok(1);
        }
        let timeout = ptr::null_mut::<timespec>();
        number(libc::syscall(
            libc::SYS_recvmmsg,
            socket,
            messages,
            count,
            FLAGS,
            timeout,
        ))
    }
}

/// sendmmsg(2), or sendmsg(2) for a single message. Never blocks. Returns how
/// many messages were sent.
///
/// # Safety
///
/// `messages` points at `count` messages whose names, vectors and control
/// buffers are valid for reads.
pub(super) unsafe fn send(
    socket: RawFd,
    messages: *mut mmsghdr,
    count: usize,
) -> io::Result<usize> {
    // SAFETY: as above.
    unsafe {
        if count == 1 {
            let header: *const msghdr = &raw const (*messages).msg_hdr;
            number(libc::syscall(libc::SYS_sendmsg, socket, header, FLAGS))?;
            return Ok(1);
        }
        number(libc::syscall(
            libc::SYS_sendmmsg,
            socket,
            messages,
            count,
            FLAGS,
        ))
    }
}

fn number(result: c_long) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn length(result: c_long) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}
