//! The functions that the program calls instead of the C library's. Each looks whether
//! the descriptor is taken over, and calls the real function if not.

mod cancellation;
pub(crate) mod descriptors;
// musl has no RTLD_DEEPBIND.
#[cfg(target_env = "gnu")]
mod libraries;
mod raw;
pub(crate) mod receiving;
pub(crate) mod sending;
pub(crate) mod sockets;
pub(crate) mod waiting;

use libc::c_int;

use crate::boundary::{errno, guarded};
use crate::registry;

/// After a call that failed: whether the descriptor is no socket (any more), but a file that
/// got the number of one whose end was not seen. It is let go then.
#[cold]
fn is_stale(fd: c_int) -> bool {
    let stale = errno() == libc::ENOTSOCK;
    if stale {
        guarded((), || registry::remove(fd));
    }
    stale
}

/// Defines functions under the names of the C library's; not in this crate's own unit
/// tests, whose sockets are none of ours.
///
/// `fcntl`, `ioctl` and `syscall` take a variable number of arguments in C. Here they take
/// as many as there can be: in the calling conventions of Linux on x86-64 and AArch64,
/// integer arguments come in the same places either way, and those that the caller did
/// not pass are not looked at by the real function.
///
/// A thread that may be cancelled anywhere, may only be so where the real function waits.
macro_rules! hooks {
    ($($(#[$note:meta])* fn $name:ident($($argument:ident: $kind:ty),* $(,)?) $(-> $result:ty)? $body:block)*) => {$(
        $(#[$note])*
        #[cfg_attr(not(test), unsafe(no_mangle))]
        pub(crate) unsafe extern "C-unwind" fn $name($($argument: $kind),*) $(-> $result)? {
            #[inline(always)]
            unsafe fn hook($($argument: $kind),*) $(-> $result)? $body

            let before = crate::boundary::defer_cancellation();
            // SAFETY: the arguments are the program's.
            let result = unsafe { hook($($argument),*) };
            crate::boundary::cancel_as_before(before);
            result
        }
    )*};
}
pub(crate) use hooks;
