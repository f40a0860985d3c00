//! recv(2), recvfrom(2), read(2) and readv(2) on sockets that don't wait.
//!
//! recvfrom(2) costs the kernel less than recvmsg(2), whose message it has to fetch and to
//! give back. It tells no control data, which a socket with one local address does without.
//! The system call is made directly: the C library's function could be left by cancellation,
//! and the memory that it receives into must be given back.

use std::mem::MaybeUninit;

use libc::{
    EIO, MSG_DONTWAIT, MSG_ERRQUEUE, MSG_OOB, MSG_PEEK, c_int, c_long, msghdr, sockaddr_in6,
    socklen_t, ssize_t,
};

use super::arrived::{Arrived, check};
use super::{Outcome, message, result, uninterrupted};
use crate::boundary::{contained, errno, fail};
use crate::buffers::{self, Far};
use crate::socket::{Flag, Socket};
use crate::{names, real};

unsafe extern "C-unwind" {
    fn pthread_testcancel();
}

/// As [`message`], for a program that is told neither control data nor flags.
///
/// # Safety
///
/// As `message`.
pub(crate) unsafe fn plain(fd: c_int, socket: &Socket, to: *mut msghdr, flags: c_int) -> ssize_t {
    if !is_simple(socket, flags) {
        // SAFETY: as the caller says.
        return unsafe { message(fd, socket, to, flags) };
    }
    // SAFETY: as the caller says.
    if let Err(errno) = unsafe { check(to) } {
        return fail(errno);
    }
    if let Err(errno) = uninterrupted(socket, flags) {
        return fail(errno);
    }
    // SAFETY: as the caller says, and no fault was found.
    let receive = |far: &mut Far| unsafe { once(far, fd, socket, to, flags) };
    // SAFETY: this function owns nothing that must be given back.
    unsafe { pthread_testcancel() };
    match contained(Some(Outcome::Failed(EIO)), || buffers::take(receive)) {
        Some(Outcome::Delivered(len)) => result(len),
        Some(Outcome::Failed(errno)) => fail(errno),
        // SAFETY: as the caller says.
        Some(Outcome::Dropped) | None => unsafe { message(fd, socket, to, flags) },
    }
}

#[inline]
fn is_simple(socket: &Socket, flags: c_int) -> bool {
    flags & (MSG_PEEK | MSG_ERRQUEUE | MSG_OOB) == 0
        && (flags & MSG_DONTWAIT != 0 || socket.is(Flag::NonBlocking))
        && !socket.is_any(&[Flag::Wildcard, Flag::Direct])
        && !socket.held.is_any()
}

/// # Safety
///
/// `to` is a message in which `check` has found no fault.
#[inline]
unsafe fn once(
    far: &mut Far,
    fd: c_int,
    socket: &Socket,
    to: *mut msghdr,
    flags: c_int,
) -> Outcome {
    let mut name = MaybeUninit::<sockaddr_in6>::uninit();
    let mut name_len = size_of::<sockaddr_in6>() as socklen_t;
    // SAFETY: the memory has this length.
    let received = unsafe {
        real::syscall(
            libc::SYS_recvfrom,
            fd.into(),
            (&raw mut far.bytes).expose_provenance() as c_long,
            size_of::<Far>() as c_long,
            flags.into(),
            name.as_mut_ptr().expose_provenance() as c_long,
            (&raw mut name_len).expose_provenance() as c_long,
        )
    };
    let Ok(len) = usize::try_from(received) else {
        return Outcome::Failed(errno());
    };
    // A call that this one has interrupted may have the same memory.
    buffers::count_far_use();
    // SAFETY: the kernel has written the name.
    let Some(peer) = (unsafe { names::read(name.as_ptr().cast(), name_len) }) else {
        // The socket has been shut down, which is seen again: each datagram has a sender.
        return Outcome::Dropped;
    };
    let arrived = Arrived {
        bytes: &far.bytes[..len.min(far.bytes.len())],
        peer,
        control: &[],
        flags: 0,
    };
    match arrived.judge(fd, socket) {
        // SAFETY: as the caller says.
        Some(judged) => unsafe { arrived.hand_over(socket, judged, to, flags) }.into(),
        None => Outcome::Dropped,
    }
}
