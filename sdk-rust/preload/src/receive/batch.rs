//! recvmmsg(2).

use std::mem::MaybeUninit;
use std::ptr;

use libc::{
    EAGAIN, EIO, ENOMEM, MSG_DONTWAIT, MSG_ERRQUEUE, MSG_PEEK, MSG_WAITFORONE, c_int, c_uint,
    iovec, mmsghdr, sockaddr_in6, socklen_t, timespec,
};

use super::arrived::{Arrived, check, is_reachable, tell_end};
use super::patience::{Deadline, Patience};
use super::{MAX_PARTS, is_shut_down, message, uninterrupted};
use crate::boundary::{errno, fail, guarded, is_plausible};
use crate::buffers::{self, BATCH, Bytes, CONTROL, Incoming};
use crate::real;
use crate::socket::{Flag, Socket};
use crate::table::{self, Counter, Judged};

/// Receives datagrams as recvmmsg(2) does.
///
/// # Safety
///
/// `to` points to `count` messages, `timeout` is null or can be read and written, as for
/// recvmmsg(2).
pub(crate) unsafe fn messages(
    fd: c_int,
    socket: &Socket,
    to: *mut mmsghdr,
    count: c_uint,
    flags: c_int,
    timeout: *mut timespec,
) -> c_int {
    if flags & MSG_ERRQUEUE != 0 || socket.is(Flag::Direct) || count == 0 || !is_plausible(to) {
        // SAFETY: as the caller says.
        return unsafe { real::recvmmsg(fd, to, count, flags, timeout) };
    }
    // SAFETY: as the caller says.
    let deadline = match unsafe { Deadline::new(timeout) } {
        Ok(deadline) => deadline,
        Err(errno) => return fail(errno),
    };
    // SAFETY: as the caller says.
    let sound = match unsafe { sound(to, (count as usize).min(MAX_PARTS)) } {
        Ok(sound) => sound,
        Err(errno) => return fail(errno),
    };
    let mut patience = Patience::new(socket, flags);
    // SAFETY: as the caller says.
    let received = unsafe { receive(fd, socket, to, sound, flags, deadline, &mut patience) };
    patience.end();
    match received {
        Ok(done) => {
            // SAFETY: as the caller says.
            unsafe { deadline.tell(timeout) };
            c_int::try_from(done).unwrap_or(c_int::MAX)
        }
        Err(errno) => fail(errno),
    }
}

/// How many of the messages can take a datagram, up to the first that can't: what was
/// received for those behind it would be lost. With the first alone, the kernel's error comes
/// after a datagram was received.
///
/// # Safety
///
/// As `messages`.
///
/// # Errors
///
/// The error number if that is the first.
unsafe fn sound(to: *mut mmsghdr, count: usize) -> Result<usize, c_int> {
    for at in 0..count {
        // SAFETY: it is one of the caller's.
        match unsafe { check(&raw const (*to.add(at)).msg_hdr) } {
            // SAFETY: `check` has found no fault.
            Ok(()) if !unsafe { is_reachable(&raw const (*to.add(at)).msg_hdr) } => {
                return Ok(at.max(1));
            }
            Ok(()) => {}
            Err(errno) if at == 0 => return Err(errno),
            Err(_) => return Ok(at),
        }
    }
    Ok(count)
}

/// Receives until there are `count` datagrams, or as many as the flags and the timeout ask
/// for.
///
/// # Safety
///
/// `to` points to `count` messages in which `check` has found no fault.
unsafe fn receive(
    fd: c_int,
    socket: &Socket,
    to: *mut mmsghdr,
    count: usize,
    flags: c_int,
    deadline: Deadline,
    patience: &mut Patience,
) -> Result<usize, c_int> {
    uninterrupted(socket, flags)?;
    let waits_for_one = flags & MSG_WAITFORONE != 0;
    let flags = flags & !MSG_WAITFORONE;
    // The kernel looks at the timeout when it has received one.
    let count = if deadline.is_over() { 1 } else { count };
    let mut done = 0;
    let (mut waited, mut is_over) = (false, false);
    loop {
        // SAFETY: it is one of the caller's.
        let next = unsafe { to.add(done) };
        let alone = count == 1 || is_over && !(waits_for_one && done > 0);
        let batch = if flags & MSG_PEEK != 0 || socket.held.is_any() || alone || is_over {
            // Alone, it may wait. A socket that is shut down doesn't.
            let more = if alone { 0 } else { MSG_DONTWAIT };
            // SAFETY: as the caller says.
            unsafe { single(fd, socket, next, flags | more) }
        } else {
            // SAFETY: `count - done` messages begin there.
            let receive = || unsafe { batch(fd, socket, next, count - done, flags) };
            guarded(Batch::failed(EIO), receive)
        };
        done += batch.delivered;
        let enough = done == count || done > 0 && (deadline.is_over() || batch.errno != 0);
        if enough || done > 0 && batch.drained && waits_for_one {
            return Ok(done);
        }
        if batch.errno != 0 {
            return Err(batch.errno);
        }
        if count == 1 {
            return Err(EAGAIN);
        }
        if batch.delivered > 0 {
            patience.begin_again();
        }
        if waited && batch.drained && batch.delivered + batch.drops == 0 && is_shut_down(fd) {
            is_over = true;
            continue;
        }
        let goes_on = match batch.drops {
            0 => Ok(()),
            drops => patience.outlasts(drops, fd, socket, flags),
        };
        let wait = goes_on.and_then(|()| {
            if batch.drained {
                patience.wait(fd, socket, flags)
            } else {
                Ok(())
            }
        });
        match wait {
            Ok(()) => waited = batch.drained,
            Err(_) if done > 0 => return Ok(done),
            Err(errno) => return Err(errno),
        }
    }
}

/// What one attempt brought.
#[derive(Clone, Copy, Debug)]
struct Batch {
    delivered: usize,
    drops: usize,
    /// The queue was empty afterwards.
    drained: bool,
    /// Why there was nothing; 0: the queue was empty, or all was dropped.
    errno: c_int,
}

impl Batch {
    /// Nothing was received.
    fn failed(errno: c_int) -> Self {
        Self {
            delivered: 0,
            drops: 0,
            drained: errno == EAGAIN,
            errno: if errno == EAGAIN { 0 } else { errno },
        }
    }
}

/// Receives one datagram.
///
/// # Safety
///
/// `to` is a message in which `check` has found no fault.
unsafe fn single(fd: c_int, socket: &Socket, to: *mut mmsghdr, flags: c_int) -> Batch {
    // SAFETY: as the caller says.
    let received = unsafe { message(fd, socket, &raw mut (*to).msg_hdr, flags) };
    let Ok(len) = c_uint::try_from(received) else {
        return Batch::failed(errno());
    };
    // SAFETY: as the caller says.
    unsafe { (*to).msg_len = len };
    Batch {
        delivered: 1,
        drops: 0,
        drained: false,
        errno: 0,
    }
}

/// Receives what is there, at most [`BATCH`] datagrams and `count` messages, and delivers
/// what is the program's, without gaps.
///
/// # Safety
///
/// `to` points to `count` messages in which `check` has found no fault.
unsafe fn batch(fd: c_int, socket: &Socket, to: *mut mmsghdr, count: usize, flags: c_int) -> Batch {
    let asked = count.min(BATCH);
    let received = buffers::take::<Incoming, _>(|incoming| {
        for at in 0..asked {
            prepare(incoming, at);
        }
        // SAFETY: that many messages have been filled in.
        let received = unsafe {
            let (messages, none) = ((&raw mut incoming.messages).cast(), ptr::null_mut());
            real::recvmmsg(fd, messages, asked as c_uint, flags | MSG_DONTWAIT, none)
        };
        match usize::try_from(received) {
            // SAFETY: as the caller says, and that many were received.
            Ok(received) => unsafe {
                let batch = deliver(incoming, received, fd, socket, to, flags);
                Batch {
                    drained: received < asked,
                    ..batch
                }
            },
            Err(_) => Batch::failed(errno()),
        }
    });
    received.unwrap_or(Batch::failed(ENOMEM))
}

/// Judges and delivers what was received.
///
/// # Safety
///
/// The kernel has filled the first `received` messages in, and `to` points to as many.
unsafe fn deliver(
    incoming: &Incoming,
    received: usize,
    fd: c_int,
    socket: &Socket,
    to: *mut mmsghdr,
    flags: c_int,
) -> Batch {
    let mut batch = Batch {
        delivered: 0,
        drops: 0,
        drained: false,
        errno: 0,
    };
    let received = &incoming.messages[..received];
    let (mut direct, mut ends) = (0, 0);
    let mut judged = [const { MaybeUninit::uninit() }; BATCH];
    let mut table = None;
    for ((judged, message), bytes) in judged.iter_mut().zip(received).zip(&incoming.bytes) {
        // SAFETY: as the caller says.
        judged.write(unsafe { arrived(message, bytes) }.and_then(|arrived| {
            arrived.judge_again(socket).or_else(|| {
                if table.is_none() {
                    table = table::lock();
                }
                arrived.judge_in(table.as_mut(), fd, socket)
            })
        }));
    }
    // The program's memory may be slow to come, or not be there at all.
    drop(table);
    for ((judged, message), bytes) in judged.iter().zip(received).zip(&incoming.bytes) {
        // SAFETY: it was written above, for each message.
        let judged: Option<Judged> = unsafe { judged.assume_init_read() };
        if message.msg_len == 0 && message.msg_hdr.msg_namelen == 0 {
            // The socket is shut down for receiving.
            // SAFETY: no more are delivered than were received.
            unsafe {
                let to = to.add(batch.delivered);
                tell_end(&raw mut (*to).msg_hdr, flags);
                (*to).msg_len = 0;
            }
            batch.delivered += 1;
            ends += 1;
            continue;
        }
        // SAFETY: as the caller says.
        let Some(arrived) = (unsafe { arrived(message, bytes) }) else {
            // Each datagram has a sender.
            table::count(Counter::NoMemory, 1);
            batch.drops += 1;
            continue;
        };
        let Some(judged) = judged else {
            batch.drops += 1;
            continue;
        };
        if batch.errno != 0 {
            arrived.keep(socket);
            continue;
        }
        // SAFETY: no more are delivered than were received.
        let to = unsafe { &mut *to.add(batch.delivered) };
        // SAFETY: as the caller says.
        match unsafe { arrived.deliver(socket, judged, &raw mut to.msg_hdr, flags) } {
            Ok(len) => {
                to.msg_len = c_uint::try_from(len).unwrap_or(c_uint::MAX);
                batch.delivered += 1;
                direct += u64::from(judged.is_direct);
            }
            // Another thread has changed the message since it was looked at.
            Err(errno) => {
                table::count(Counter::BadPointer, 1);
                batch.errno = errno;
            }
        }
    }
    table::count_delivered((batch.delivered - ends) as u64, direct);
    batch
}

/// # Safety
///
/// The kernel has filled the message in.
#[inline]
unsafe fn arrived<'a>(message: &mmsghdr, bytes: &'a Bytes) -> Option<Arrived<'a>> {
    let bytes = &bytes.0[..message.msg_len as usize];
    // SAFETY: as the caller says.
    unsafe { Arrived::new(bytes, &message.msg_hdr) }
}

#[inline]
fn prepare(incoming: &mut Incoming, at: usize) {
    incoming.parts[at] = iovec {
        iov_base: (&raw mut incoming.bytes[at]).cast(),
        iov_len: size_of_val(&incoming.bytes[at]),
    };
    let message = &mut incoming.messages[at].msg_hdr;
    message.msg_name = (&raw mut incoming.names[at]).cast();
    message.msg_namelen = size_of::<sockaddr_in6>() as socklen_t;
    message.msg_iov = &raw mut incoming.parts[at];
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut incoming.control[at]).cast();
    message.msg_controllen = CONTROL as _;
    message.msg_flags = 0;
}
