//! Sockets that another process passes through a UNIX socket (SCM_RIGHTS), as when a server
//! hands over to its successor.

use std::slice;

use libc::{SCM_RIGHTS, SOL_SOCKET, c_int, mmsghdr, msghdr, ssize_t};

use crate::boundary::guarded;
use crate::{connect, control, lifecycle, registry, wait};

/// The program has received a message by a descriptor that is not taken over.
///
/// # Safety
///
/// If `received` isn't negative, recvmsg(2) has filled in `message`.
#[inline]
pub(crate) unsafe fn in_message(received: ssize_t, message: *const msghdr) {
    // SAFETY: as the caller says.
    if received >= 0 && unsafe { (*message).msg_controllen } > 0 {
        // SAFETY: as the caller says.
        guarded((), || unsafe { in_control(&*message) });
    }
}

/// As `in_message`, for recvmmsg(2).
///
/// # Safety
///
/// The kernel has filled in so many messages.
#[inline]
pub(crate) unsafe fn in_messages(received: c_int, messages: *const mmsghdr) {
    for at in 0..usize::try_from(received).unwrap_or(0) {
        // SAFETY: as the caller says.
        unsafe { in_message(0, &raw const (*messages.add(at)).msg_hdr) };
    }
}

/// # Safety
///
/// recvmsg(2) has filled in the message.
unsafe fn in_control(message: &msghdr) {
    let len = message.msg_controllen as usize;
    // SAFETY: as the caller says.
    let control = unsafe { slice::from_raw_parts(message.msg_control.cast(), len) };
    for message in control::messages(control) {
        if (message.level, message.kind) == (SOL_SOCKET, SCM_RIGHTS) {
            let (descriptors, _) = message.data.as_chunks();
            for descriptor in descriptors {
                received(c_int::from_ne_bytes(*descriptor));
            }
        }
    }
}

fn received(fd: c_int) {
    // Whatever had the number before was closed, even if unseen.
    connect::forget(fd);
    wait::forget(fd);
    registry::remove(fd);
    lifecycle::received(fd);
}
