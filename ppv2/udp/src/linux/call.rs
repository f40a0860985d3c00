//! The four system calls, straight to the kernel: libc's own are points at which a
//! thread can be cancelled (pthreads(7)), which a program with threads pays for at each
//! call.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use libc::{c_int, c_long, mmsghdr, timespec};

/// recvmmsg(2), or recvmsg(2) for a single message, which is cheaper. Returns how many
/// messages were received.
///
/// # Safety
///
/// `messages` points at `count` messages whose names, vectors and control buffers are
/// valid for writes.
pub(super) unsafe fn receive(
    socket: BorrowedFd<'_>,
    messages: *mut mmsghdr,
    count: usize,
    wait: bool,
) -> io::Result<usize> {
    let socket = socket.as_raw_fd();
    // SAFETY: the arguments are those of the calls' manual pages, and valid by the
    // caller's promise.
    unsafe {
        if count == 1 {
            let flags: c_int = if wait { 0 } else { libc::MSG_DONTWAIT };
            let header = &raw mut (*messages).msg_hdr;
            let len = libc::syscall(libc::SYS_recvmsg, socket, header, flags);
            (*messages).msg_len = u32::try_from(len).map_err(|_| io::Error::last_os_error())?;
            return Ok(1);
        }
        let flags = if wait {
            libc::MSG_WAITFORONE
        } else {
            libc::MSG_DONTWAIT
        };
        number(libc::syscall(
            libc::SYS_recvmmsg,
            socket,
            messages,
            count,
            flags,
            ptr::null_mut::<timespec>(),
        ))
    }
}

/// sendmmsg(2), or sendmsg(2) for a single message. Returns how many messages were sent.
///
/// # Safety
///
/// `messages` points at `count` messages whose names, vectors and control buffers are
/// valid for reads.
pub(super) unsafe fn send(
    socket: BorrowedFd<'_>,
    messages: *mut mmsghdr,
    count: usize,
) -> io::Result<usize> {
    let (socket, flags): (_, c_int) = (socket.as_raw_fd(), 0);
    // SAFETY: as above.
    unsafe {
        if count == 1 {
            let header = &raw const (*messages).msg_hdr;
            number(libc::syscall(libc::SYS_sendmsg, socket, header, flags))?;
            return Ok(1);
        }
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
