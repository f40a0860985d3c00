//! pthread_setcanceltype.

use libc::c_int;

use crate::{boundary, real};

/// Not one of the hooks, which set the type themselves.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub(crate) unsafe extern "C-unwind" fn pthread_setcanceltype(
    kind: c_int,
    before: *mut c_int,
) -> c_int {
    boundary::saw_cancel_type(kind);
    // SAFETY: the arguments are the program's.
    unsafe { real::pthread_setcanceltype(kind, before) }
}
