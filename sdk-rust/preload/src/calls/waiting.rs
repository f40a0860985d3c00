//! poll, select, epoll.
//!
//! The functions that wait have no destructors: a cancelled thread is unwound through them.

use std::ptr;

use libc::{
    EINTR, c_int, c_ulong, epoll_event, fd_set, nfds_t, pollfd, sigset_t, size_t, timespec, timeval,
};

use super::hooks;
use crate::boundary::{fail, guarded};
use crate::signals::Signals;
use crate::wait::{self, Deadline, Set};
use crate::{connect, real};

/// Words of an `fd_set`, and of the largest sets that are looked at.
const USUAL: usize = libc::FD_SETSIZE / c_ulong::BITS as usize;
const LARGEST: usize = 65536 / c_ulong::BITS as usize;

/// Whether select(2) tells how much of the timeout is left. musl passes the kernel a copy of it.
const WRITES_TIMEOUT: bool = cfg!(not(target_env = "musl"));

fn pointer(timeout: Option<&timespec>) -> *const timespec {
    timeout.map_or(ptr::null(), ptr::from_ref)
}

unsafe fn poll_until(
    fds: *mut pollfd,
    count: nfds_t,
    deadline: Deadline,
    mask: *const sigset_t,
    wait: impl Fn(bool, *const sigset_t) -> c_int,
) -> c_int {
    let mut signals = Signals::new();
    loop {
        // SAFETY: the program passes `count` elements.
        let held = guarded(false, || unsafe { wait::holds_polled(fds, count) });
        let ready = wait(held, signals.mask(mask));
        if ready < 0 || (ready == 0 && !held) {
            signals.release();
            return ready;
        }
        // SAFETY: the program passes `count` elements.
        let ready = guarded(ready, || unsafe { wait::correct_polled(fds, count) });
        if ready > 0 || deadline.is_over() {
            signals.release();
            return ready;
        }
        if signals.end_waiting(mask) {
            signals.release();
            return fail(EINTR);
        }
    }
}

unsafe fn epoll_until(
    epoll: c_int,
    events: *mut epoll_event,
    room: c_int,
    deadline: Deadline,
    mask: *const sigset_t,
    wait: impl Fn(bool, *const sigset_t) -> c_int,
) -> c_int {
    let mut signals = Signals::new();
    loop {
        let held = guarded(false, || wait::holds_registered(epoll));
        let ready = wait(held, signals.mask(mask));
        if ready < 0 || (ready == 0 && !held) {
            signals.release();
            return ready;
        }
        // SAFETY: the kernel has written `ready` events, of `room`.
        let ready = guarded(ready, || unsafe {
            wait::correct_epoll(epoll, events, ready, room)
        });
        if ready > 0 || deadline.is_over() {
            signals.release();
            return ready;
        }
        if signals.end_waiting(mask) {
            signals.release();
            return fail(EINTR);
        }
    }
}

/// The arguments of pselect(2). select(2) is the same without a mask.
#[derive(Clone, Copy)]
struct Selected {
    count: c_int,
    read: *mut fd_set,
    write: *mut fd_set,
    except: *mut fd_set,
    mask: *const sigset_t,
}

/// Never inlined: with sets of `N` words on its stack.
#[inline(never)]
unsafe fn select_until<const N: usize>(to: Selected, words: usize, deadline: Deadline) -> c_int {
    let (read, write, except) = (Set::new(to.read), Set::new(to.write), Set::new(to.except));
    // SAFETY: the kernel reads as many words of the sets.
    let saved: [[c_ulong; N]; 3] =
        unsafe { [read.save(words), write.save(words), except.save(words)] };
    let asked = Set::new(saved[0].as_ptr().cast_mut().cast());
    let mut signals = Signals::new();
    loop {
        // SAFETY: `asked` is as long as the program's set.
        let held = guarded(false, || unsafe { wait::holds_selected(to.count, asked) });
        let timeout = deadline.timespec_or_zero(held);
        let timeout = pointer(timeout.as_ref());
        let mask = signals.mask(to.mask);
        // SAFETY: the arguments are the program's.
        let ready = unsafe { real::pselect(to.count, to.read, to.write, to.except, timeout, mask) };
        if ready < 0 || (ready == 0 && !held) {
            signals.release();
            return ready;
        }
        // SAFETY: as above.
        let ready = guarded(ready, || unsafe {
            wait::correct_selected(to.count, ready, read, asked)
        });
        if ready > 0 || deadline.is_over() {
            signals.release();
            return ready;
        }
        if signals.end_waiting(to.mask) {
            signals.release();
            return fail(EINTR);
        }
        // SAFETY: the kernel writes as many words of the sets.
        unsafe {
            read.restore(&saved[0], words);
            write.restore(&saved[1], words);
            except.restore(&saved[2], words);
        }
    }
}

/// `None` if the real function is to be called.
unsafe fn select_concerned(to: Selected, deadline: Option<Deadline>) -> Option<c_int> {
    let deadline = deadline?;
    let words = guarded(usize::MAX, || wait::words(to.count));
    if words <= USUAL {
        // SAFETY: the arguments are the program's.
        Some(unsafe { select_until::<USUAL>(to, words, deadline) })
    } else if words <= LARGEST {
        // SAFETY: the arguments are the program's.
        Some(unsafe { select_until::<LARGEST>(to, words, deadline) })
    } else {
        None
    }
}

hooks! {
    fn poll(fds: *mut pollfd, count: nfds_t, timeout: c_int) -> c_int {
        connect::waits();
        // SAFETY: the arguments are the program's.
        unsafe {
            if !wait::concerns_poll(fds, count) {
                return real::poll(fds, count, timeout);
            }
            let deadline = Deadline::after_millis(timeout);
            poll_until(fds, count, deadline, ptr::null(), |held, mask| {
                if mask.is_null() {
                    return real::poll(fds, count, deadline.millis_or_zero(held));
                }
                let timeout = deadline.timespec_or_zero(held);
                real::ppoll(fds, count, pointer(timeout.as_ref()), mask)
            })
        }
    }

    fn ppoll(
        fds: *mut pollfd,
        count: nfds_t,
        timeout: *const timespec,
        mask: *const sigset_t,
    ) -> c_int {
        connect::waits();
        // SAFETY: the arguments are the program's.
        unsafe {
            if wait::concerns_poll(fds, count)
                && let Some(deadline) = Deadline::after_timespec(timeout.as_ref())
            {
                return poll_until(fds, count, deadline, mask, |held, mask| {
                    let timeout = deadline.timespec_or_zero(held);
                    real::ppoll(fds, count, pointer(timeout.as_ref()), mask)
                });
            }
            real::ppoll(fds, count, timeout, mask)
        }
    }

    fn __poll(fds: *mut pollfd, count: nfds_t, timeout: c_int) -> c_int {
        // SAFETY: the arguments are the program's.
        unsafe { poll(fds, count, timeout) }
    }

    fn __poll_chk(fds: *mut pollfd, count: nfds_t, timeout: c_int, fds_len: size_t) -> c_int {
        // SAFETY: the arguments are the program's.
        unsafe {
            if fits(count, fds_len) {
                poll(fds, count, timeout)
            } else {
                real::__poll_chk(fds, count, timeout, fds_len)
            }
        }
    }

    fn __ppoll_chk(
        fds: *mut pollfd,
        count: nfds_t,
        timeout: *const timespec,
        mask: *const sigset_t,
        fds_len: size_t,
    ) -> c_int {
        // SAFETY: the arguments are the program's.
        unsafe {
            if fits(count, fds_len) {
                ppoll(fds, count, timeout, mask)
            } else {
                real::__ppoll_chk(fds, count, timeout, mask, fds_len)
            }
        }
    }

    fn select(
        count: c_int,
        read: *mut fd_set,
        write: *mut fd_set,
        except: *mut fd_set,
        timeout: *mut timeval,
    ) -> c_int {
        connect::waits();
        // SAFETY: the arguments are the program's.
        unsafe {
            if wait::concerns_select(count, Set::new(read)) {
                let deadline = Deadline::after_timeval(timeout.as_ref());
                let to = Selected { count, read, write, except, mask: ptr::null() };
                if let Some(ready) = select_concerned(to, deadline) {
                    if WRITES_TIMEOUT && let Some(left) = deadline.and_then(Deadline::timeval) {
                        timeout.write(left);
                    }
                    return ready;
                }
            }
            real::select(count, read, write, except, timeout)
        }
    }

    fn __select(
        count: c_int,
        read: *mut fd_set,
        write: *mut fd_set,
        except: *mut fd_set,
        timeout: *mut timeval,
    ) -> c_int {
        // SAFETY: the arguments are the program's.
        unsafe { select(count, read, write, except, timeout) }
    }

    fn pselect(
        count: c_int,
        read: *mut fd_set,
        write: *mut fd_set,
        except: *mut fd_set,
        timeout: *const timespec,
        mask: *const sigset_t,
    ) -> c_int {
        connect::waits();
        // SAFETY: the arguments are the program's.
        unsafe {
            if wait::concerns_select(count, Set::new(read)) {
                let deadline = Deadline::after_timespec(timeout.as_ref());
                let to = Selected { count, read, write, except, mask };
                if let Some(ready) = select_concerned(to, deadline) {
                    return ready;
                }
            }
            real::pselect(count, read, write, except, timeout, mask)
        }
    }

    fn epoll_ctl(epoll: c_int, operation: c_int, fd: c_int, event: *mut epoll_event) -> c_int {
        // SAFETY: the arguments are the program's.
        let result = unsafe { real::epoll_ctl(epoll, operation, fd, event) };
        if result == 0 {
            guarded((), || wait::saw(epoll, operation, fd, event));
        }
        result
    }

    fn epoll_wait(
        epoll: c_int,
        events: *mut epoll_event,
        room: c_int,
        timeout: c_int,
    ) -> c_int {
        connect::waits();
        // SAFETY: the arguments are the program's.
        unsafe {
            if !wait::concerns_epoll() {
                return real::epoll_wait(epoll, events, room, timeout);
            }
            let deadline = Deadline::after_millis(timeout);
            epoll_until(epoll, events, room, deadline, ptr::null(), |held, mask| {
                let timeout = deadline.millis_or_zero(held);
                if mask.is_null() {
                    return real::epoll_wait(epoll, events, room, timeout);
                }
                real::epoll_pwait(epoll, events, room, timeout, mask)
            })
        }
    }

    fn epoll_pwait(
        epoll: c_int,
        events: *mut epoll_event,
        room: c_int,
        timeout: c_int,
        mask: *const sigset_t,
    ) -> c_int {
        connect::waits();
        // SAFETY: the arguments are the program's.
        unsafe {
            if !wait::concerns_epoll() {
                return real::epoll_pwait(epoll, events, room, timeout, mask);
            }
            let deadline = Deadline::after_millis(timeout);
            epoll_until(epoll, events, room, deadline, mask, |held, mask| {
                real::epoll_pwait(epoll, events, room, deadline.millis_or_zero(held), mask)
            })
        }
    }

    fn epoll_pwait2(
        epoll: c_int,
        events: *mut epoll_event,
        room: c_int,
        timeout: *const timespec,
        mask: *const sigset_t,
    ) -> c_int {
        connect::waits();
        // SAFETY: the arguments are the program's.
        unsafe {
            if wait::concerns_epoll()
                && let Some(deadline) = Deadline::after_timespec(timeout.as_ref())
            {
                return epoll_until(epoll, events, room, deadline, mask, |held, mask| {
                    let timeout = deadline.timespec_or_zero(held);
                    real::epoll_pwait2(epoll, events, room, pointer(timeout.as_ref()), mask)
                });
            }
            real::epoll_pwait2(epoll, events, room, timeout, mask)
        }
    }
}

fn fits(count: nfds_t, len: size_t) -> bool {
    let elements = len / size_of::<pollfd>();
    usize::try_from(count).is_ok_and(|count| count <= elements)
}

#[cfg(test)]
mod tests;
