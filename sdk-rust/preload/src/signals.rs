//! Signals that come while a call discards datagrams: the kernel would have ended the call,
//! or run their handlers and gone on waiting.
//!
//! A call that finds something in the queue is not ended by a signal, and doesn't say that
//! one was handled meanwhile. So in a flood of datagrams that must be dropped, signals are
//! held back, and looked for between the datagrams. Signals of a fault are not: held back,
//! they would end the program.

use std::mem::MaybeUninit;
use std::ptr;

use libc::{
    EINTR, SA_RESTART, SIG_BLOCK, SIG_DFL, SIG_IGN, SIG_SETMASK, c_int, sigset_t, timespec,
};

use crate::boundary::{errno, set_errno};
use crate::real;

const FAULTS: [c_int; 7] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGSYS,
    libc::SIGABRT,
];

/// What a call has held back. It has no destructor, since a call that waits may be left: it
/// must be released before the call ends.
pub(crate) struct Signals {
    /// The thread's mask, if signals are held.
    before: MaybeUninit<sigset_t>,
    are_held: bool,
}

impl Signals {
    #[inline]
    pub(crate) fn new() -> Self {
        Self {
            before: MaybeUninit::uninit(),
            are_held: false,
        }
    }

    #[inline]
    pub(crate) fn are_held(&self) -> bool {
        self.are_held
    }

    /// Holds signals back from now on.
    #[cold]
    pub(crate) fn hold(&mut self) {
        if self.are_held {
            return;
        }
        let mut held = MaybeUninit::<sigset_t>::uninit();
        // SAFETY: both sets can be written to, and are by these functions.
        let result = unsafe {
            libc::sigfillset(held.as_mut_ptr());
            for fault in FAULTS {
                libc::sigdelset(held.as_mut_ptr(), fault);
            }
            libc::pthread_sigmask(SIG_BLOCK, held.as_ptr(), self.before.as_mut_ptr())
        };
        self.are_held = result == 0;
    }

    /// Lets through what was held back.
    #[inline]
    pub(crate) fn release(&mut self) {
        if self.are_held {
            self.let_through();
        }
    }

    #[cold]
    fn let_through(&mut self) {
        let errno = errno();
        // SAFETY: the set was written when signals were held.
        unsafe { libc::pthread_sigmask(SIG_SETMASK, self.before.as_ptr(), ptr::null_mut()) };
        self.are_held = false;
        set_errno(errno);
    }

    /// Whether a signal that was held back ends a call that receives. If one has come, it is
    /// handled.
    #[cold]
    pub(crate) fn end_receiving(&mut self, has_timeout: bool) -> bool {
        if !self.are_held {
            return false;
        }
        let mut pending = MaybeUninit::<sigset_t>::uninit();
        // SAFETY: the set can be written to.
        if unsafe { libc::sigpending(pending.as_mut_ptr()) } != 0 {
            return false;
        }
        // SAFETY: both sets have been written.
        let (pending, before) =
            unsafe { (pending.assume_init_ref(), self.before.assume_init_ref()) };
        let is_in = |set: &sigset_t, signal| {
            // SAFETY: the set can be read.
            unsafe { libc::sigismember(set, signal) == 1 }
        };
        let came = |signal: &c_int| is_in(pending, *signal) && !is_in(before, *signal);
        let mut came = (1..=libc::SIGRTMAX()).filter(came).peekable();
        if came.peek().is_none() {
            return false;
        }
        let ends = came.any(|signal| is_handled(signal, has_timeout));
        self.let_through();
        if !ends {
            self.hold();
        }
        ends
    }

    /// The mask for a function that waits: `mask` is the program's, or null.
    #[inline]
    pub(crate) fn mask(&self, mask: *const sigset_t) -> *const sigset_t {
        if self.are_held && mask.is_null() {
            self.before.as_ptr()
        } else {
            mask
        }
    }

    /// Whether a signal has come since the latest call, which ends a call of poll(2) and the
    /// like. Signals are held back from now on, but for those that `mask` lets through while
    /// the call waits.
    #[cold]
    pub(crate) fn end_waiting(&mut self, mask: *const sigset_t) -> bool {
        self.hold();
        let none = timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mask = self.mask(mask);
        // SAFETY: nothing is waited for, and the mask can be read.
        let result = unsafe { real::ppoll(ptr::null_mut(), 0, &raw const none, mask) };
        result < 0 && errno() == EINTR
    }
}

/// Whether a call ends when the signal has been handled (signal(7)).
fn is_handled(signal: c_int, has_timeout: bool) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: the action can be written to, and is if the call succeeds.
    unsafe {
        libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) == 0 && {
            let action = action.assume_init();
            ![SIG_DFL, SIG_IGN].contains(&action.sa_sigaction)
                && (has_timeout || action.sa_flags & SA_RESTART == 0)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    static HANDLED: AtomicU32 = AtomicU32::new(0);

    extern "C" fn handle(_: c_int) {
        HANDLED.fetch_add(1, Ordering::SeqCst);
    }

    /// What `work` returns, and how many signals were handled by its end and by the end of the
    /// call.
    fn with_handler<T>(flags: c_int, work: impl FnOnce(&mut Signals) -> T) -> (T, u32, u32) {
        static ONE: Mutex<()> = Mutex::new(());
        let _one = ONE.lock();
        // SAFETY: zeroes are a valid value, and the action can be read.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as extern "C" fn(c_int) as usize;
            action.sa_flags = flags;
            assert_eq!(
                libc::sigaction(libc::SIGUSR1, &raw const action, ptr::null_mut()),
                0
            );
        }
        let before = HANDLED.load(Ordering::SeqCst);
        let handled = || HANDLED.load(Ordering::SeqCst) - before;
        let mut signals = Signals::new();
        let result = work(&mut signals);
        let then = handled();
        signals.release();
        (result, then, handled())
    }

    fn raise(signal: c_int) {
        // SAFETY: this thread gets the signal.
        assert_eq!(unsafe { libc::raise(signal) }, 0);
    }

    #[test]
    fn a_signal_that_was_held_back_ends_a_call_that_receives_unless_it_is_to_go_on() {
        for (flags, has_timeout, ends) in [
            (0, false, true),
            (SA_RESTART, false, false),
            (SA_RESTART, true, true),
        ] {
            let found = with_handler(flags, |signals| {
                signals.hold();
                assert!(!signals.end_receiving(has_timeout));
                raise(libc::SIGUSR1);
                let ends = signals.end_receiving(has_timeout);
                assert_eq!(signals.are_held(), !ends);
                ends
            });
            assert_eq!(found, (ends, 1, 1), "{flags} {has_timeout}");
        }
    }

    #[test]
    fn a_signal_that_was_held_back_is_handled_at_the_end() {
        let found = with_handler(0, |signals| {
            signals.hold();
            raise(libc::SIGUSR1);
        });
        assert_eq!(found, ((), 0, 1));
        // One that is not held is handled at once.
        assert_eq!(with_handler(0, |_| raise(libc::SIGUSR1)), ((), 1, 1));
    }

    #[test]
    fn a_signal_that_nobody_handles_ends_no_call() {
        let found = with_handler(0, |signals| {
            signals.hold();
            raise(libc::SIGWINCH);
            signals.end_receiving(true)
        });
        assert_eq!(found, (false, 0, 0));
    }

    #[test]
    fn a_signal_ends_a_call_that_waits_whatever_its_handler_says() {
        for flags in [0, SA_RESTART] {
            let found = with_handler(flags, |signals| {
                let nothing = signals.end_waiting(ptr::null());
                raise(libc::SIGUSR1);
                (nothing, signals.end_waiting(ptr::null()))
            });
            assert_eq!(found, ((false, true), 1, 1));
        }
    }

    #[test]
    fn a_mask_of_the_programs_is_kept_to() {
        let mut mask = MaybeUninit::<sigset_t>::uninit();
        // SAFETY: the set can be written to.
        unsafe { libc::sigfillset(mask.as_mut_ptr()) };
        let found = with_handler(0, |signals| {
            signals.end_waiting(mask.as_ptr());
            raise(libc::SIGUSR1);
            signals.end_waiting(mask.as_ptr())
        });
        assert_eq!(found, (false, 0, 1));
    }
}
