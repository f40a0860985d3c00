//! What may not cross into C: panics, cancellation in the midst of our own work, and
//! changes of `errno`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::c_int;

use crate::{arena, real};

unsafe extern "C" {
    fn pthread_setcancelstate(state: c_int, old: *mut c_int) -> c_int;
}

const PTHREAD_CANCEL_DISABLE: c_int = 1;
const PTHREAD_CANCEL_DEFERRED: c_int = 0;

/// Whether a thread of the program's may be cancelled anywhere, not only where it waits.
static ASYNCHRONOUS: AtomicBool = AtomicBool::new(false);

/// The program has a thread cancelled so from now on.
pub(crate) fn saw_cancel_type(kind: c_int) {
    if kind != PTHREAD_CANCEL_DEFERRED {
        ASYNCHRONOUS.store(true, Ordering::Relaxed);
    }
}

/// From now on, this thread is only cancelled where it waits, as the functions that this
/// library calls then expect. Returns what [`cancel_as_before`] takes at the end of the call.
#[inline]
pub(crate) fn defer_cancellation() -> c_int {
    let mut before = PTHREAD_CANCEL_DEFERRED;
    if ASYNCHRONOUS.load(Ordering::Relaxed) {
        // SAFETY: `before` can be written to.
        unsafe { real::pthread_setcanceltype(PTHREAD_CANCEL_DEFERRED, &raw mut before) };
    }
    before
}

#[inline]
pub(crate) fn cancel_as_before(before: c_int) {
    if before != PTHREAD_CANCEL_DEFERRED {
        // SAFETY: the former type need not be told. The thread may end here.
        unsafe { real::pthread_setcanceltype(before, ptr::null_mut()) };
    }
}

/// The error number of this thread.
pub(crate) fn errno() -> c_int {
    // SAFETY: the pointer is valid for as long as the thread lives.
    unsafe { *libc::__errno_location() }
}

pub(crate) fn set_errno(errno: c_int) {
    // SAFETY: as in `errno`.
    unsafe { *libc::__errno_location() = errno }
}

/// Sets `errno` and returns -1, as functions of the C library fail.
pub(crate) fn fail<T: From<i8>>(errno: c_int) -> T {
    set_errno(errno);
    T::from(-1)
}

/// Whether a pointer can be one to a program's memory. The kernel answers wrong ones with
/// EFAULT; we only see those that programs use by mistake, null above all, and end with the
/// program at others. Bit 55 is that of the kernel's half; those above it may be a tag.
#[inline]
pub(crate) fn is_plausible<T>(pointer: *const T) -> bool {
    pointer.addr() >= 4096 && pointer.addr() >> 55 & 1 == 0
}

/// Runs `work`, during which the thread can't be cancelled. `errno` becomes `EIO` and
/// the result that of `fail` if it panics.
///
/// Where a signal handler has interrupted this thread's work on the table, what `work`
/// allocates does not come from the table's memory.
///
/// glibc unwinds a cancelled thread by an exception of its own, which Rust code with
/// destructors must not see; musl runs no destructor at all. So calls that wait are made
/// outside of this function, in functions without destructors, and calls within it don't wait.
pub(crate) fn guarded<T>(failed: T, work: impl FnOnce() -> T) -> T {
    let mut state = 0;
    // SAFETY: `state` can be written to.
    unsafe { pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &raw mut state) };
    let result = contained(failed, work);
    // SAFETY: `state` is what it was before.
    unsafe { pthread_setcancelstate(state, &raw mut state) };
    result
}

/// As [`guarded`], for work that calls no function at which a thread can be cancelled.
#[inline]
pub(crate) fn contained<T>(failed: T, work: impl FnOnce() -> T) -> T {
    let suspended = arena::suspend();
    let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_panic| {
        set_errno(libc::EIO);
        failed
    });
    drop(suspended);
    result
}
