//! How long a call goes on: what was dropped must not prolong what the program asked for.

use std::ptr;

use libc::{
    EAGAIN, EFAULT, EINTR, EINVAL, F_GETFL, MSG_DONTWAIT, MSG_PEEK, O_NONBLOCK, POLLIN, POLLRDHUP,
    SO_RCVTIMEO, SOL_SOCKET, c_int, pollfd, socklen_t, timespec, timeval,
};

use crate::boundary::{errno, is_plausible};
use crate::real;
use crate::signals::Signals;
use crate::socket::{Flag, Socket};
use crate::wait;

/// After so many drops, a call that must not wait ends: a flood of datagrams that must be
/// dropped would keep it for as long as it lasts.
pub(super) const MAX_DROPS: usize = 64;

const NANOS: u64 = 1_000_000_000;

/// Waits as long as the kernel would have, from the start of the call. Neither this nor what
/// its methods own must be given back where a call waits, since it may be left; otherwise,
/// the call ends with [`Patience::end`].
pub(super) struct Patience {
    /// By the monotonic clock, in nanoseconds; 0: not known.
    started: u64,
    drops: usize,
    mode: Mode,
    signals: Signals,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Nothing was dropped yet, so the kernel knows how long to wait.
    Unknown,
    NonBlocking,
    Blocking,
    Until(u64),
}

impl Patience {
    /// Of a call that begins.
    #[inline]
    pub(super) fn new(socket: &Socket, flags: c_int) -> Self {
        let waits = flags & MSG_DONTWAIT == 0 && !socket.is(Flag::NonBlocking);
        Self {
            started: if waits { now() } else { 0 },
            drops: 0,
            mode: Mode::Unknown,
            signals: Signals::new(),
        }
    }

    /// The call ends.
    #[inline]
    pub(super) fn end(&mut self) {
        self.signals.release();
    }

    /// The time starts again, since a datagram was delivered.
    pub(super) fn begin_again(&mut self) {
        self.mode = Mode::Unknown;
        self.started = now();
    }

    /// The flags for the next attempt.
    #[inline]
    pub(super) fn flags(&self, flags: c_int) -> c_int {
        match self.mode {
            Mode::Until(_) => flags | MSG_DONTWAIT,
            // Otherwise no signal could end the call.
            _ if self.signals.are_held() => flags | MSG_DONTWAIT,
            Mode::Unknown | Mode::NonBlocking | Mode::Blocking => flags,
        }
    }

    /// After so many drops: whether the call should go on.
    ///
    /// # Errors
    ///
    /// The error number that the call ends with.
    pub(super) fn outlasts(
        &mut self,
        drops: usize,
        fd: c_int,
        socket: &Socket,
        flags: c_int,
    ) -> Result<(), c_int> {
        self.drops += drops;
        if self.mode == Mode::Unknown {
            self.mode = self.mode_of(fd, flags);
        }
        match self.mode {
            Mode::NonBlocking if self.drops >= MAX_DROPS => {
                wait::rearm(fd, socket);
                Err(EAGAIN)
            }
            // What is in the queue when the time is over is still looked at.
            Mode::Until(deadline) if self.drops >= MAX_DROPS && now() >= deadline => Err(EAGAIN),
            Mode::Until(_) | Mode::Blocking if self.drops >= MAX_DROPS => self.uninterrupted(),
            Mode::Unknown | Mode::NonBlocking | Mode::Blocking | Mode::Until(_) => Ok(()),
        }
    }

    /// In a flood, a signal ends the call as it would while the call waits.
    #[cold]
    fn uninterrupted(&mut self) -> Result<(), c_int> {
        // It is asked again after some more.
        self.drops = MAX_DROPS - MAX_DROPS / 4;
        if self.signals.end_receiving(self.has_timeout()) {
            return Err(EINTR);
        }
        self.signals.hold();
        Ok(())
    }

    fn has_timeout(&self) -> bool {
        matches!(self.mode, Mode::Until(_))
    }

    /// The flood has ended: signals are the kernel's to handle again.
    fn let_signals_through(&mut self) -> Result<(), c_int> {
        self.drops = 0;
        let ends = self.signals.end_receiving(self.has_timeout());
        self.signals.release();
        if ends { Err(EINTR) } else { Ok(()) }
    }

    #[cold]
    fn mode_of(&self, fd: c_int, flags: c_int) -> Mode {
        if flags & MSG_DONTWAIT != 0 || is_nonblocking(fd) {
            return Mode::NonBlocking;
        }
        match timeout_of(fd) {
            Some(timeout) => {
                let started = if self.started == 0 {
                    now()
                } else {
                    self.started
                };
                Mode::Until(started.saturating_add(timeout))
            }
            None => Mode::Blocking,
        }
    }

    /// After an attempt that found nothing: waits for what is left of the time, if the
    /// kernel doesn't know it.
    ///
    /// # Errors
    ///
    /// The error number that the call ends with.
    pub(super) fn wait_on(&mut self, fd: c_int) -> Result<(), c_int> {
        if self.signals.are_held() {
            self.let_signals_through()?;
            if self.mode == Mode::Blocking {
                return Ok(());
            }
        }
        let Mode::Until(deadline) = self.mode else {
            return Err(EAGAIN);
        };
        let timeout = timespec_of(deadline.saturating_sub(now()));
        let mut polled = pollfd {
            fd,
            events: POLLIN | POLLRDHUP,
            revents: 0,
        };
        // SAFETY: both can be read, and the first written.
        match unsafe { real::ppoll(&raw mut polled, 1, &raw const timeout, ptr::null()) } {
            0 => Err(EAGAIN),
            ready if ready > 0 => {
                if polled.revents & POLLRDHUP != 0 {
                    // Shut down for receiving: the kernel waits no more, and tells so only
                    // where it may.
                    self.mode = Mode::Blocking;
                }
                Ok(())
            }
            _ => Err(errno()),
        }
    }

    /// Waits until the kernel has a datagram, as long as it would let the program wait.
    ///
    /// # Errors
    ///
    /// As `wait_on`.
    pub(super) fn wait(&mut self, fd: c_int, socket: &Socket, flags: c_int) -> Result<(), c_int> {
        if flags & MSG_DONTWAIT != 0 || socket.is(Flag::NonBlocking) && is_nonblocking(fd) {
            return Err(EAGAIN);
        }
        if let Mode::Until(_) = self.mode {
            return self.wait_on(fd);
        }
        self.let_signals_through()?;
        let (nothing, nobody) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: nothing is written.
        let received = unsafe { real::recvfrom(fd, nothing, 0, MSG_PEEK, nobody, ptr::null_mut()) };
        if received < 0 { Err(errno()) } else { Ok(()) }
    }
}

fn is_nonblocking(fd: c_int) -> bool {
    // SAFETY: it takes no argument.
    let flags = unsafe { real::fcntl(fd, F_GETFL, 0) };
    flags >= 0 && flags & O_NONBLOCK != 0
}

/// SO_RCVTIMEO in nanoseconds, if there is one.
fn timeout_of(fd: c_int) -> Option<u64> {
    let mut timeout = timeval {
        tv_sec: 0,
        tv_usec: 0,
    };
    let mut len = size_of::<timeval>() as socklen_t;
    // SAFETY: both can be written to.
    let result = unsafe {
        let timeout = (&raw mut timeout).cast();
        real::getsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, timeout, &raw mut len)
    };
    let seconds = u64::try_from(timeout.tv_sec).unwrap_or(0);
    let micros = u64::try_from(timeout.tv_usec).unwrap_or(0);
    let nanos = seconds.saturating_mul(NANOS).saturating_add(micros * 1000);
    (result == 0 && nanos > 0).then_some(nanos)
}

/// The monotonic clock, in nanoseconds.
#[inline]
fn now() -> u64 {
    let mut now = timespec_of(0);
    // SAFETY: it can be written to.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec.unsigned_abs() * NANOS + now.tv_nsec.unsigned_abs()
}

fn timespec_of(nanos: u64) -> timespec {
    timespec {
        tv_sec: i64::try_from(nanos / NANOS).unwrap_or(i64::MAX),
        tv_nsec: (nanos % NANOS) as _,
    }
}

/// The timeout of recvmmsg(2), which is looked at after each datagram.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline(Option<u64>);

impl Deadline {
    /// # Safety
    ///
    /// `timeout` is null or can be read.
    ///
    /// # Errors
    ///
    /// `EINVAL` if it is none, `EFAULT` if it is not there.
    pub(super) unsafe fn new(timeout: *const timespec) -> Result<Self, c_int> {
        if timeout.is_null() {
            return Ok(Self(None));
        }
        if !is_plausible(timeout) {
            return Err(EFAULT);
        }
        // SAFETY: as the caller says.
        let timeout = unsafe { timeout.read() };
        let seconds = u64::try_from(timeout.tv_sec).map_err(|_| EINVAL)?;
        let nanos = u64::try_from(timeout.tv_nsec).map_err(|_| EINVAL)?;
        if nanos >= NANOS {
            return Err(EINVAL);
        }
        let after = seconds.saturating_mul(NANOS).saturating_add(nanos);
        Ok(Self(Some(now().saturating_add(after))))
    }

    pub(super) fn is_over(self) -> bool {
        self.0.is_some_and(|deadline| now() >= deadline)
    }

    /// Tells the program how much is left.
    ///
    /// # Safety
    ///
    /// `timeout` is null or can be written.
    pub(super) unsafe fn tell(self, timeout: *mut timespec) {
        if let Self(Some(deadline)) = self
            && !timeout.is_null()
        {
            // SAFETY: as the caller says.
            unsafe { timeout.write(timespec_of(deadline.saturating_sub(now()))) };
        }
    }
}
