//! A lock that is never waited for: a caller that finds it taken does without.
//!
//! The one who has it may be the very thread that a signal handler has interrupted, or a
//! thread that a forked process doesn't have.

use std::cell::UnsafeCell;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};

pub(crate) struct TryLock<T> {
    locked: AtomicBool,
    value: UnsafeCell<T>,
}

/// The lock is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Locked;

pub(crate) struct Guard<'l, T>(&'l TryLock<T>);

// SAFETY: only the one who has locked it reaches the value.
unsafe impl<T: Send> Sync for TryLock<T> {}

impl<T> TryLock<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self {
            locked: AtomicBool::new(false),
            value: UnsafeCell::new(value),
        }
    }

    #[inline]
    pub(crate) fn try_lock(&self) -> Result<Guard<'_, T>, Locked> {
        if self.locked.swap(true, Ordering::Acquire) {
            Err(Locked)
        } else {
            Ok(Guard(self))
        }
    }
}

impl<T: Default> TryLock<T> {
    /// In a new process, in which no thread has the lock: an empty value. The former one may
    /// have been half written and is left as it is.
    pub(crate) fn renew(&self) {
        // SAFETY: the thread that called fork(2) is the only one, and is not in here.
        unsafe { self.value.get().write(T::default()) };
        self.locked.store(false, Ordering::Release);
    }

    /// In a new process: as `renew` if a thread of the parent had the lock.
    pub(crate) fn unlock(&self) {
        if self.locked.load(Ordering::Relaxed) {
            self.renew();
        }
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: this guard has the lock.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: this guard has the lock.
        unsafe { &mut *self.0.value.get() }
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        self.0.locked.store(false, Ordering::Release);
    }
}

impl<T> fmt::Debug for TryLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TryLock").finish_non_exhaustive()
    }
}
