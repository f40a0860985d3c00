//! What a thread knows of its own work on the table. Signal handlers of the same thread
//! read and change it too. It is made at compile time and has no destructor, so that its
//! use neither allocates nor ends before the thread does.

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicPtr, AtomicU32};

use crate::arena::Arena;

pub(crate) struct ThisThread {
    /// Whether it is in a section that holds the table's lock, or about to.
    pub(crate) inside: AtomicBool,
    /// How many calls have found that, and when the first did.
    pub(crate) found: AtomicU32,
    pub(crate) found_at: AtomicI64,
    /// The arena that it allocates from; null: as usual.
    pub(crate) arena: AtomicPtr<Arena>,
}

thread_local! {
    static THIS_THREAD: ThisThread = const {
        ThisThread {
            inside: AtomicBool::new(false),
            found: AtomicU32::new(0),
            found_at: AtomicI64::new(0),
            arena: AtomicPtr::new(ptr::null_mut()),
        }
    };
}

/// This thread's. In a library, each lookup is a call of the C library's, so callers keep
/// the reference for as long as they don't leave the thread.
#[inline]
pub(crate) fn get() -> *const ThisThread {
    THIS_THREAD.with(ptr::from_ref)
}

/// As `get`, for one use.
#[inline]
pub(crate) fn with<T>(work: impl FnOnce(&ThisThread) -> T) -> T {
    THIS_THREAD.with(work)
}
