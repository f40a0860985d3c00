//! The four system calls of the data path, straight to the kernel: libc's own
//! are points at which a thread can be cancelled (pthreads(7)), and to mark them
//! as such costs a program with threads two atomic operations each.

use std::io;
use std::os::fd::RawFd;
use std::ptr;

use libc::{c_int, c_long, mmsghdr, msghdr, timespec};

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
            let len = libc::syscall(libc::SYS_recvmsg, socket, header, libc::MSG_DONTWAIT);
            (*messages).msg_len = length(len)?;
            return Ok(1);
        }
        let timeout = ptr::null_mut::<timespec>();
        let flags: c_int = libc::MSG_DONTWAIT;
        number(libc::syscall(
            libc::SYS_recvmmsg,
            socket,
            messages,
            count,
            flags,
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
            let flags: c_int = libc::MSG_DONTWAIT;
            number(libc::syscall(libc::SYS_sendmsg, socket, header, flags))?;
            return Ok(1);
        }
        let flags: c_int = libc::MSG_DONTWAIT;
        number(libc::syscall(
            libc::SYS_sendmmsg,
            socket,
            messages,
            count,
            flags,
        ))
    }
}

fn number(result: c_long) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn length(result: c_long) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}
