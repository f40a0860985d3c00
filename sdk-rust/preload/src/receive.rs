//! From the kernel to the program: a datagram is received whole into memory of the
//! library's, judged, and its payload copied to where the program wants it.
//!
//! A call that waits does so in the real recvmsg(2), which is made as the program made its
//! own: so signals, timeouts, cancellation and O_NONBLOCK have the effects that they have
//! without the library. The functions that make it own nothing that must be given back,
//! since they may be left in the midst of it.

mod arrived;
mod batch;
mod patience;
mod plain;
#[cfg(test)]
mod tests;

use libc::{
    EAGAIN, EINTR, EIO, MSG_DONTWAIT, MSG_ERRQUEUE, MSG_PEEK, POLLERR, POLLIN, POLLRDHUP, c_int,
    c_short, msghdr, pollfd, ssize_t,
};

pub(crate) use arrived::check_parts;
use arrived::{Arrival, Arrived, Peeked, check, tell_end};
pub(crate) use batch::messages;
use patience::{MAX_DROPS, Patience};
pub(crate) use plain::plain;

use crate::boundary::{contained, errno, fail, guarded};
use crate::real;
use crate::socket::{Flag, Held, Socket};
use crate::table::{self, Counter};

/// The kernel takes no more parts of a message (UIO_MAXIOV), nor messages of a call.
pub(crate) const MAX_PARTS: usize = 1024;

/// What became of an attempt to receive a datagram.
#[derive(Clone, Copy, Debug)]
enum Outcome {
    /// The program has it; what recvmsg(2) returns.
    Delivered(usize),
    Dropped,
    Failed(c_int),
}

impl From<Result<usize, c_int>> for Outcome {
    fn from(delivered: Result<usize, c_int>) -> Self {
        delivered.map_or_else(Self::Failed, Self::Delivered)
    }
}

/// Receives a datagram as recvmsg(2) does.
///
/// # Safety
///
/// `to` is null or points to what recvmsg(2) takes.
pub(crate) unsafe fn message(fd: c_int, socket: &Socket, to: *mut msghdr, flags: c_int) -> ssize_t {
    if flags & MSG_ERRQUEUE != 0 || socket.is(Flag::Direct) {
        // SAFETY: as the caller says.
        return unsafe { real::recvmsg(fd, to, flags) };
    }
    // SAFETY: as the caller says.
    if let Err(errno) = unsafe { check(to) } {
        return fail(errno);
    }
    if let Err(errno) = uninterrupted(socket, flags) {
        return fail(errno);
    }
    let mut patience = Patience::new(socket, flags);
    // SAFETY: as the caller says, and no fault was found.
    let received = unsafe { receive(fd, socket, to, flags, &mut patience) };
    patience.end();
    received
}

/// # Safety
///
/// As `message`, and `check` has found no fault.
#[inline]
unsafe fn receive(
    fd: c_int,
    socket: &Socket,
    to: *mut msghdr,
    flags: c_int,
    patience: &mut Patience,
) -> ssize_t {
    let mut arrival = Arrival::new();
    loop {
        if socket.held.is_any() {
            // SAFETY: as the caller says.
            let taken = || unsafe { take_held(fd, socket, to, flags) };
            match guarded(Outcome::Failed(EIO), taken) {
                Outcome::Delivered(len) => return result(len),
                Outcome::Failed(errno) => return fail(errno),
                Outcome::Dropped => {}
            }
        }
        // SAFETY: the message has been filled in.
        let received = unsafe { real::recvmsg(fd, arrival.prepare(), patience.flags(flags)) };
        let Ok(len) = usize::try_from(received) else {
            if errno() != EAGAIN {
                return -1;
            }
            match patience.wait_on(fd) {
                Ok(()) => continue,
                Err(errno) => return fail(errno),
            }
        };
        if arrival.is_end(len) {
            // SAFETY: as the caller says.
            unsafe { tell_end(to, flags) };
            return 0;
        }
        // SAFETY: as the caller says, and `len` is what was received.
        let settle = || unsafe { settle(&mut arrival, len, fd, socket, to, flags) };
        let outcome = if flags & MSG_PEEK != 0 {
            guarded(Outcome::Failed(EIO), settle)
        } else {
            contained(Outcome::Failed(EIO), settle)
        };
        match outcome {
            Outcome::Delivered(len) => return result(len),
            Outcome::Failed(errno) => return fail(errno),
            Outcome::Dropped => {}
        }
        if let Err(errno) = patience.outlasts(1, fd, socket, flags) {
            return fail(errno);
        }
    }
}

/// Judges what has arrived, and delivers it.
///
/// # Safety
///
/// As `message`, `check` has found no fault, and `arrival` has received `len` bytes.
#[inline]
unsafe fn settle(
    arrival: &mut Arrival,
    len: usize,
    fd: c_int,
    socket: &Socket,
    to: *mut msghdr,
    flags: c_int,
) -> Outcome {
    if flags & MSG_PEEK != 0 {
        // SAFETY: as the caller says.
        return unsafe { settle_peeked(arrival, len, fd, socket, to, flags) };
    }
    // SAFETY: as the caller says.
    match unsafe { arrival.arrived(len) } {
        Ok((arrived, _taken)) => match arrived.judge(fd, socket) {
            // SAFETY: as the caller says.
            Some(judged) => unsafe { arrived.hand_over(socket, judged, to, flags) }.into(),
            None => Outcome::Dropped,
        },
        Err(counter) => {
            table::count(counter, 1);
            Outcome::Dropped
        }
    }
}

/// As `settle`, of a datagram that is still in the queue.
///
/// # Safety
///
/// As `settle`.
unsafe fn settle_peeked(
    arrival: &mut Arrival,
    len: usize,
    fd: c_int,
    socket: &Socket,
    to: *mut msghdr,
    flags: c_int,
) -> Outcome {
    // SAFETY: as the caller says.
    match unsafe { arrival.arrived(len) } {
        Ok((arrived, _taken)) => match arrived.peek(socket) {
            Peeked::Good(judged) => {
                // SAFETY: as the caller says.
                return unsafe { arrived.deliver(socket, judged, to, flags) }.into();
            }
            Peeked::Unknown => return Outcome::Failed(unable(socket, flags)),
            Peeked::Bad => {}
        },
        // It is looked at again.
        Err(Counter::Interrupted) => return Outcome::Dropped,
        Err(_) => {}
    }
    discard(fd, socket);
    Outcome::Dropped
}

/// Discards what must be dropped at the head of the socket's queue, without waiting.
/// Whether a datagram for the program is there then, or an error.
///
/// An error is told to nobody else afterwards: a socket that poll(2) says to have one
/// ([`has_error`]) must not be asked.
pub(crate) fn discard_dropped(fd: c_int, socket: &Socket) -> bool {
    look(fd, socket).is_some() || is_shut_down(fd)
}

/// Whether nothing more is received, which the kernel reports as readable.
fn is_shut_down(fd: c_int) -> bool {
    events(fd, POLLRDHUP) & POLLRDHUP != 0
}

/// Whether the next call fails, or something is in the queue of errors.
pub(crate) fn has_error(fd: c_int) -> bool {
    events(fd, 0) & POLLERR != 0
}

/// Whether nothing is in the queue.
pub(crate) fn is_empty(fd: c_int) -> bool {
    events(fd, POLLIN) & POLLIN == 0
}

fn events(fd: c_int, events: c_short) -> c_short {
    let mut polled = pollfd {
        fd,
        events,
        revents: 0,
    };
    // SAFETY: it can be read and written.
    unsafe { real::poll(&raw mut polled, 1, 0) };
    polled.revents
}

/// The payload's length of the next datagram, as ioctl(FIONREAD) tells it: 0 if there is
/// none. With an error, nobody can look: the length is that of the kernel, with the header.
pub(crate) fn next_len(fd: c_int, socket: &Socket) -> Option<usize> {
    (!has_error(fd)).then(|| look(fd, socket).unwrap_or(0))
}

/// The payload's length of the next datagram for the program, if there is one.
fn look(fd: c_int, socket: &Socket) -> Option<usize> {
    if table::is_inside() {
        return Some(0);
    }
    guarded(Some(0), || {
        let mut arrival = Arrival::new();
        for _ in 0..MAX_DROPS {
            if socket.held.is_any()
                && let Some(len) = held_len(fd, socket)
            {
                return Some(len);
            }
            let flags = MSG_PEEK | MSG_DONTWAIT;
            // SAFETY: the message has been filled in.
            let received = unsafe { real::recvmsg(fd, arrival.prepare(), flags) };
            let Ok(len) = usize::try_from(received) else {
                return (errno() != EAGAIN).then_some(0);
            };
            if socket.is(Flag::Direct) || arrival.is_end(len) {
                return Some(len);
            }
            // SAFETY: that is what was received.
            match unsafe { arrival.arrived(len) } {
                Ok((arrived, _taken)) => match arrived.peek(socket) {
                    Peeked::Good(judged) => return Some(len - judged.header_len),
                    Peeked::Unknown => return Some(0),
                    Peeked::Bad => {}
                },
                Err(Counter::Interrupted) => continue,
                Err(_) => {}
            }
            discard(fd, socket);
        }
        None
    })
}

/// Receives the datagram at the head of the queue, which must be dropped. If another thread
/// has taken that one in between, what came in its place is kept for the next call.
fn discard(fd: c_int, socket: &Socket) {
    let mut arrival = Arrival::new();
    // SAFETY: the message has been filled in.
    let received = unsafe { real::recvmsg(fd, arrival.prepare(), MSG_DONTWAIT) };
    let Ok(len) = usize::try_from(received) else {
        return;
    };
    if arrival.is_end(len) {
        return;
    }
    // SAFETY: that is what was received.
    match unsafe { arrival.arrived(len) } {
        Ok((arrived, _taken)) => {
            if arrived.judge(fd, socket).is_some() {
                arrived.keep(socket);
            }
        }
        Err(counter) => table::count(counter, 1),
    }
}

/// The payload's length of a datagram that was kept, if one still is.
fn held_len(fd: c_int, socket: &Socket) -> Option<usize> {
    while let Some(one) = socket.held.take() {
        if let Some(judged) = Arrived::from(&*one).judge(fd, socket) {
            let len = one.bytes.len() - judged.header_len;
            put_back(socket, one);
            return Some(len);
        }
    }
    None
}

/// Delivers a datagram that was kept, if one still is.
///
/// # Safety
///
/// As `message`, and `check` has found no fault.
unsafe fn take_held(fd: c_int, socket: &Socket, to: *mut msghdr, flags: c_int) -> Outcome {
    while let Some(one) = socket.held.take() {
        let arrived = Arrived::from(&*one);
        let Some(judged) = arrived.judge(fd, socket) else {
            continue;
        };
        if flags & MSG_PEEK == 0 {
            // SAFETY: as the caller says.
            return unsafe { arrived.hand_over(socket, judged, to, flags) }.into();
        }
        // SAFETY: as the caller says.
        let delivered = unsafe { arrived.deliver(socket, judged, to, flags) };
        put_back(socket, one);
        return delivered.into();
    }
    Outcome::Dropped
}

fn put_back(socket: &Socket, one: Box<Held>) {
    if !socket.held.put(one) {
        table::count(Counter::NoMemory, 1);
    }
}

/// Nothing may be received by a signal handler that has interrupted this thread while it was
/// in the table: it could not be judged.
///
/// # Errors
///
/// The error number for the program.
#[inline]
fn uninterrupted(socket: &Socket, flags: c_int) -> Result<(), c_int> {
    // A thread that a handler took out of the table by longjmp is only found to be so here.
    if !table::is_inside() || table::lock().is_some() {
        return Ok(());
    }
    Err(unable(socket, flags))
}

/// The error number for a program whose datagrams can't be judged.
#[cold]
fn unable(socket: &Socket, flags: c_int) -> c_int {
    let waits = flags & MSG_DONTWAIT == 0 && !socket.is(Flag::NonBlocking);
    if waits { EINTR } else { EAGAIN }
}

fn result(len: usize) -> ssize_t {
    ssize_t::try_from(len).unwrap_or(ssize_t::MAX)
}
