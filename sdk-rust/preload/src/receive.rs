//! From the kernel to the program: a datagram is received whole into memory of the
//! library's, judged, and its payload copied to where the program wants it.
//!
//! A call that waits does so in the real recvmsg(2), which is made as the program made its
//! own: so signals, timeouts, cancellation and O_NONBLOCK have the effects that they have
//! without the library. The functions that make it own nothing that must be given back,
//! since they may be left in the midst of it.

use std::mem::{self, MaybeUninit};
use std::net::SocketAddr;
use std::ptr;
use std::slice;

use libc::{
    EAGAIN, EFAULT, EINTR, EINVAL, EIO, EMSGSIZE, F_GETFL, MSG_CTRUNC, MSG_DONTWAIT, MSG_ERRQUEUE,
    MSG_PEEK, MSG_TRUNC, MSG_WAITFORONE, O_NONBLOCK, POLLIN, SO_RCVTIMEO, SOL_SOCKET, c_int,
    c_uint, iovec, mmsghdr, msghdr, pollfd, sockaddr_in6, socklen_t, ssize_t, timespec, timeval,
};

use crate::boundary::{errno, fail, guarded};
use crate::buffers::{self, BATCH, CONTROL, Far, Incoming, NEAR};
use crate::control::{self, Wanted, Writer};
use crate::settings::{self, Pktinfo};
use crate::socket::{Flag, Held, Socket};
use crate::table::{self, Counter, Judged, Table};
use crate::try_lock::Guard;
use crate::{names, real, wait};

/// After so many drops, a call that must not wait ends: a flood of datagrams that must be
/// dropped would keep it for as long as it lasts.
const MAX_DROPS: usize = 64;

/// Parts of a message: the kernel takes no more (UIO_MAXIOV), nor messages of recvmmsg(2).
pub(crate) const MAX_PARTS: usize = 1024;

const NANOS: u64 = 1_000_000_000;

/// What became of a datagram.
#[derive(Clone, Copy, Debug)]
enum Outcome {
    Delivered(usize),
    Dropped,
    Failed(c_int),
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
    if let Some(errno) = interrupted(socket, flags) {
        return fail(errno);
    }
    let mut arrival = Arrival::new();
    let mut patience = Patience::new(socket, flags);
    loop {
        if socket.is(Flag::Held) {
            // SAFETY: as the caller says.
            let taken = || unsafe { take_held(socket, to, flags) };
            match guarded(Some(Outcome::Failed(EIO)), taken) {
                Some(Outcome::Delivered(len)) => return result(len),
                Some(Outcome::Failed(errno)) => return fail(errno),
                Some(Outcome::Dropped) | None => {}
            }
        }
        arrival.prepare();
        // SAFETY: `prepare` has filled the message in.
        let len = unsafe { real::recvmsg(fd, &raw mut arrival.message, patience.flags(flags)) };
        let Ok(len) = usize::try_from(len) else {
            if errno() == EAGAIN && patience.wait(fd) {
                continue;
            }
            return -1;
        };
        // SAFETY: as the caller says, and that is what has been received.
        let settle = || unsafe { arrival.settle(len, fd, socket, to, flags) };
        match guarded(Outcome::Failed(EIO), settle) {
            Outcome::Delivered(len) => return result(len),
            Outcome::Failed(errno) => return fail(errno),
            Outcome::Dropped => {}
        }
        if !patience.after_drop(fd, socket, flags) {
            return fail(EAGAIN);
        }
    }
}

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
    let count = (count as usize).min(MAX_PARTS);
    if flags & MSG_ERRQUEUE != 0 || socket.is(Flag::Direct) || count == 0 {
        // SAFETY: as the caller says.
        return unsafe { real::recvmmsg(fd, to, count as c_uint, flags, timeout) };
    }
    // SAFETY: as the caller says.
    let Ok(deadline) = (unsafe { Deadline::new(timeout) }) else {
        return fail(EINVAL);
    };
    // SAFETY: as the caller says.
    let received = unsafe { until(deadline, fd, socket, to, count, flags) };
    if received > 0 {
        // SAFETY: as the caller says.
        unsafe { deadline.tell(timeout) };
    }
    received
}

/// Receives until there are `count` datagrams, or as many as the flags and the timeout ask
/// for.
///
/// # Safety
///
/// As `messages`.
unsafe fn until(
    deadline: Deadline,
    fd: c_int,
    socket: &Socket,
    to: *mut mmsghdr,
    count: usize,
    flags: c_int,
) -> c_int {
    if to.is_null() {
        return fail(EFAULT);
    }
    if let Some(errno) = interrupted(socket, flags) {
        return fail(errno);
    }
    // No datagram is lost to a message that can't take it.
    let mut sound = 0;
    while sound < count {
        // SAFETY: it is one of the caller's.
        match unsafe { check(&raw mut (*to.add(sound)).msg_hdr) } {
            Ok(()) => sound += 1,
            Err(errno) if sound == 0 => return fail(errno),
            Err(_) => break,
        }
    }
    let first = if deadline.is_over() { 1 } else { sound };
    let single = flags & MSG_PEEK != 0 || first == 1;
    let flags = flags & !MSG_WAITFORONE | if single { 0 } else { flags & MSG_WAITFORONE };
    let mut done = 0;
    let mut patience = Patience::new(socket, flags);
    loop {
        if single || socket.is(Flag::Held) {
            // SAFETY: it is one of the caller's.
            let len = unsafe {
                let to = &raw mut (*to.add(done)).msg_hdr;
                let only_held = if single && done == 0 { 0 } else { MSG_DONTWAIT };
                message(fd, socket, to, flags & !MSG_WAITFORONE | only_held)
            };
            if let Ok(len) = u32::try_from(len) {
                // SAFETY: as above.
                unsafe { (*to.add(done)).msg_len = len };
                done += 1;
            } else if done > 0 || single || errno() != EAGAIN {
                return if done > 0 { done as c_int } else { -1 };
            }
            if done == first || done == sound {
                return done as c_int;
            }
            if single {
                continue;
            }
        }
        // SAFETY: `sound - done` messages of the caller's begin there.
        let receive = || unsafe { batch(fd, socket, to.add(done), sound - done, flags) };
        let batch = guarded(Batch::failed(EIO), receive);
        done += batch.delivered;
        if done == sound {
            return done as c_int;
        }
        if batch.delivered > 0 {
            if deadline.is_over() {
                return done as c_int;
            }
            patience.begin_again();
        }
        if batch.errno != 0 && batch.errno != EAGAIN {
            return if done > 0 {
                done as c_int
            } else {
                fail(batch.errno)
            };
        }
        if batch.drops > 0 && !patience.after_drops(batch.drops, fd, socket, flags) {
            return if done > 0 {
                done as c_int
            } else {
                fail(EAGAIN)
            };
        }
        if !batch.drained {
            continue;
        }
        if done > 0 && flags & MSG_WAITFORONE != 0 {
            return done as c_int;
        }
        // SAFETY: nothing is written.
        let waited = flags & MSG_DONTWAIT == 0 && unsafe { patience.wait_for_one(fd, socket) };
        if !waited {
            if flags & MSG_DONTWAIT != 0 && done == 0 {
                return fail(EAGAIN);
            }
            return if done > 0 { done as c_int } else { -1 };
        }
    }
}

/// Discards what must be dropped at the head of the socket's queue, without waiting.
/// Whether a datagram for the program is there then, or an error.
///
/// An error is told to nobody else afterwards: a socket that poll(2) says to have one
/// should not be asked.
pub(crate) fn discard_dropped(fd: c_int, socket: &Socket) -> bool {
    look(fd, socket).is_some()
}

/// The payload's length of the next datagram, as ioctl(FIONREAD) tells it: 0 if there is
/// none.
pub(crate) fn next_len(fd: c_int, socket: &Socket) -> usize {
    look(fd, socket).unwrap_or(0)
}

/// The payload's length of the next datagram for the program, if there is one.
fn look(fd: c_int, socket: &Socket) -> Option<usize> {
    guarded(Some(0), || {
        let mut arrival = Arrival::new();
        for _ in 0..MAX_DROPS {
            if table::is_inside() {
                return Some(0);
            }
            if socket.is(Flag::Held)
                && let Some(len) = held_len(socket)
            {
                return Some(len);
            }
            arrival.prepare();
            let flags = MSG_PEEK | MSG_DONTWAIT;
            // SAFETY: `prepare` has filled the message in.
            let len = unsafe { real::recvmsg(fd, &raw mut arrival.message, flags) };
            let Ok(len) = usize::try_from(len) else {
                return (errno() != EAGAIN).then_some(0);
            };
            if socket.is(Flag::Direct) {
                return Some(len);
            }
            // SAFETY: that is what has been received.
            if let Some(arrived) = unsafe { arrival.arrived(len) }
                && let Some(judged) = arrived.judge(socket, true)
            {
                return Some(len - judged.header_len);
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
    arrival.prepare();
    // SAFETY: `prepare` has filled the message in.
    let len = unsafe { real::recvmsg(fd, &raw mut arrival.message, MSG_DONTWAIT) };
    let Ok(len) = usize::try_from(len) else {
        return;
    };
    // SAFETY: that is what has been received.
    let Some(arrived) = (unsafe { arrival.arrived(len) }) else {
        return;
    };
    if arrived.judge(socket, false).is_some()
        && let Some(mut held) = held(socket)
    {
        *held = Some(Held {
            bytes: arrived.bytes.to_vec(),
            peer: arrived.peer,
            control: arrived.control.to_vec(),
            flags: arrived.flags,
        });
        socket.set(Flag::Held, true);
    }
}

/// The datagram that is kept for the next call, locked; `None` if another thread has it.
fn held(socket: &Socket) -> Option<Guard<'_, Option<Held>>> {
    socket.held.try_lock().ok()
}

fn held_len(socket: &Socket) -> Option<usize> {
    let held = held(socket)?;
    let one = held.as_ref()?;
    let judged = Arrived::from(one).judge(socket, true)?;
    Some(one.bytes.len() - judged.header_len)
}

/// Delivers the datagram that was kept, if one was.
///
/// # Safety
///
/// As `message`, and `check` has found no fault.
unsafe fn take_held(socket: &Socket, to: *mut msghdr, flags: c_int) -> Option<Outcome> {
    let mut held = held(socket)?;
    let kept = if flags & MSG_PEEK != 0 {
        None
    } else {
        socket.set(Flag::Held, false);
        held.take()
    };
    let one = kept.as_ref().or(held.as_ref())?;
    let arrived = Arrived::from(one);
    // It was counted when it came.
    let Some(judged) = arrived.judge(socket, true) else {
        return Some(Outcome::Dropped);
    };
    // SAFETY: as the caller says.
    Some(unsafe { arrived.deliver(socket, judged, to, flags) })
}

/// Memory on the stack of a call for a datagram and what the kernel tells of it. There is
/// nothing to be given back.
#[repr(C, align(8))]
struct Arrival {
    near: MaybeUninit<[u8; NEAR]>,
    control: MaybeUninit<[u8; CONTROL]>,
    name: MaybeUninit<sockaddr_in6>,
    parts: [iovec; 2],
    message: msghdr,
    far: *mut Far,
    far_uses: u64,
}

impl Arrival {
    #[inline]
    fn new() -> Self {
        Self {
            near: MaybeUninit::uninit(),
            control: MaybeUninit::uninit(),
            name: MaybeUninit::uninit(),
            // SAFETY: zeroes are valid values of both types.
            parts: unsafe { mem::zeroed() },
            // SAFETY: as above.
            message: unsafe { mem::zeroed() },
            far: ptr::null_mut(),
            far_uses: 0,
        }
    }

    /// Fills in the message for recvmsg(2).
    #[inline]
    fn prepare(&mut self) {
        self.far = buffers::far();
        self.far_uses = buffers::far_uses();
        self.parts[0] = iovec {
            iov_base: (&raw mut self.near).cast(),
            iov_len: NEAR,
        };
        if !self.far.is_null() {
            self.parts[1] = iovec {
                // SAFETY: it is longer than that.
                iov_base: unsafe { (&raw mut (*self.far).bytes).cast::<u8>().add(NEAR) }.cast(),
                iov_len: mem::size_of::<Far>() - NEAR,
            };
        }
        self.message.msg_name = (&raw mut self.name).cast();
        self.message.msg_namelen = mem::size_of::<sockaddr_in6>() as socklen_t;
        self.message.msg_iov = (&raw mut self.parts).cast();
        self.message.msg_iovlen = 2;
        self.message.msg_control = (&raw mut self.control).cast();
        self.message.msg_controllen = CONTROL as _;
        self.message.msg_flags = 0;
    }

    /// What has arrived; `None` for a datagram that the memory at hand was too short for.
    ///
    /// # Safety
    ///
    /// recvmsg(2) has returned `len` for the prepared message.
    #[inline]
    unsafe fn arrived(&mut self, len: usize) -> Option<Arrived<'_>> {
        if self.message.msg_flags & MSG_TRUNC != 0 {
            return None;
        }
        let mut start = (&raw const self.near).cast::<u8>();
        if len > NEAR {
            buffers::count_far_use();
            // SAFETY: it was not null, or the datagram would have been truncated. The
            // kernel has filled the rest in.
            unsafe {
                let far = (&raw mut (*self.far).bytes).cast::<u8>();
                ptr::copy_nonoverlapping(start, far, NEAR);
                start = far;
            }
        }
        // SAFETY: the kernel has written that many bytes there.
        let bytes = unsafe { slice::from_raw_parts(start, len) };
        // SAFETY: the kernel has written the control data and the name.
        unsafe { Arrived::new(bytes, &self.message) }
    }

    /// Whether the bytes are those that were received: a handler that received a long
    /// datagram has overwritten them.
    fn is_intact(&self, len: usize) -> bool {
        len <= NEAR || buffers::far_uses() == self.far_uses + 1
    }

    /// Judges and delivers what has arrived.
    ///
    /// # Safety
    ///
    /// As `arrived` and `message`, and `check` has found no fault.
    unsafe fn settle(
        &mut self,
        len: usize,
        fd: c_int,
        socket: &Socket,
        to: *mut msghdr,
        flags: c_int,
    ) -> Outcome {
        let peeking = flags & MSG_PEEK != 0;
        // SAFETY: as the caller says.
        if let Some(arrived) = unsafe { self.arrived(len) }
            && let Some(judged) = arrived.judge(socket, peeking)
        {
            // SAFETY: as the caller says.
            let outcome = unsafe { arrived.deliver(socket, judged, to, flags) };
            return if self.is_intact(len) {
                outcome
            } else {
                Outcome::Dropped
            };
        }
        if peeking {
            discard(fd, socket);
        }
        Outcome::Dropped
    }
}

/// A datagram as the kernel delivered it.
#[derive(Clone, Copy, Debug)]
struct Arrived<'a> {
    bytes: &'a [u8],
    peer: SocketAddr,
    control: &'a [u8],
    flags: c_int,
}

impl<'a> From<&'a Held> for Arrived<'a> {
    fn from(held: &'a Held) -> Self {
        Self {
            bytes: &held.bytes,
            peer: held.peer,
            control: &held.control,
            flags: held.flags,
        }
    }
}

impl<'a> Arrived<'a> {
    /// # Safety
    ///
    /// recvmsg(2) has filled in the message's name and control data.
    #[inline]
    unsafe fn new(bytes: &'a [u8], message: &msghdr) -> Option<Self> {
        // SAFETY: as the caller says.
        let peer = unsafe { names::read(message.msg_name.cast(), message.msg_namelen) }?;
        let control: &[u8] = if message.msg_controllen == 0 {
            &[]
        } else {
            // SAFETY: as the caller says.
            unsafe {
                slice::from_raw_parts(message.msg_control.cast(), message.msg_controllen as usize)
            }
        };
        Some(Self {
            bytes,
            peer,
            control,
            flags: message.msg_flags,
        })
    }

    fn judge(&self, socket: &Socket, peeking: bool) -> Option<Judged> {
        let Some(mut table) = table::lock() else {
            table::count(Counter::Interrupted, 1);
            return None;
        };
        self.judge_in(&mut table, socket, peeking)
    }

    #[inline]
    fn judge_in(&self, table: &mut Table, socket: &Socket, peeking: bool) -> Option<Judged> {
        judge(table, socket, peeking, self.peer, self.control, self.bytes)
    }

    /// Gives the program its datagram.
    ///
    /// # Safety
    ///
    /// `to` is a message as recvmsg(2) takes it, in which `check` has found no fault.
    #[inline]
    unsafe fn deliver(
        &self,
        socket: &Socket,
        judged: Judged,
        to: *mut msghdr,
        flags: c_int,
    ) -> Outcome {
        let payload = &self.bytes[judged.header_len..];
        // SAFETY: as the caller says.
        let to = unsafe { &mut *to };
        let parts: &[iovec] = if to.msg_iovlen == 0 {
            &[]
        } else {
            // SAFETY: as the caller says.
            unsafe { slice::from_raw_parts(to.msg_iov, to.msg_iovlen as usize) }
        };
        // SAFETY: as the caller says.
        let Some(copied) = (unsafe { scatter(payload, parts) }) else {
            return Outcome::Failed(EFAULT);
        };
        let mut told = self.flags & !MSG_TRUNC;
        if copied < payload.len() {
            told |= MSG_TRUNC;
        }
        // SAFETY: as the caller says.
        unsafe {
            let len = &raw mut to.msg_namelen;
            names::give(judged.client, socket.family(), to.msg_name.cast(), len);
        }
        // SAFETY: as the caller says.
        let mut control = unsafe { Writer::new(to.msg_control.cast(), to.msg_controllen as usize) };
        if !self.control.is_empty() {
            let wanted = wanted(socket, judged);
            control::give(self.control, wanted, &mut control);
        }
        if control.is_truncated() {
            told |= MSG_CTRUNC;
        }
        to.msg_controllen = control.used() as _;
        to.msg_flags = told;
        Outcome::Delivered(if flags & MSG_TRUNC != 0 {
            payload.len()
        } else {
            copied
        })
    }
}

#[inline]
fn judge(
    table: &mut Table,
    socket: &Socket,
    peeking: bool,
    peer: SocketAddr,
    control: &[u8],
    bytes: &[u8],
) -> Option<Judged> {
    let local = if socket.is(Flag::Wildcard) {
        control::local(control)
    } else {
        None
    };
    let endpoint = socket.endpoint();
    let judged = if peeking {
        table.peek(endpoint, peer, local, bytes)
    } else {
        table.receive(endpoint, peer, local, bytes)
    }?;
    let refused = if !names::fits(judged.client, socket.family()) {
        Counter::ClientFamily
    } else if socket
        .peer()
        .is_some_and(|peer| !is_same(peer, judged.client))
    {
        Counter::OtherClient
    } else {
        return Some(judged);
    };
    if !peeking {
        table::count(refused, 1);
    }
    None
}

fn is_same(a: SocketAddr, b: SocketAddr) -> bool {
    a.port() == b.port() && a.ip().to_canonical() == b.ip().to_canonical()
}

fn wanted(socket: &Socket, judged: Judged) -> Wanted {
    let (v4, v6) = (
        socket.is(Flag::WantsPktinfo),
        socket.is(Flag::WantsPktinfo6),
    );
    let shows_destination = (v4 || v6)
        && settings::get().is_some_and(|settings| settings.pktinfo == Pktinfo::Destination);
    Wanted {
        v4,
        v6,
        destination: judged.destination.filter(|_| shows_destination),
    }
}

/// Copies to where the program wants it. Returns how much of it had room; `None` if a
/// pointer can't be right.
///
/// # Safety
///
/// Each part is writable memory, or its address is so wrong that `is_plausible` sees it.
unsafe fn scatter(mut payload: &[u8], parts: &[iovec]) -> Option<usize> {
    let whole = payload.len();
    for part in parts {
        if payload.is_empty() {
            break;
        }
        let (now, later) = payload.split_at(payload.len().min(part.iov_len));
        if !now.is_empty() {
            if !is_plausible(part.iov_base as usize) {
                return None;
            }
            // SAFETY: the caller vouches for the memory, which the payload is no part of.
            unsafe { ptr::copy_nonoverlapping(now.as_ptr(), part.iov_base.cast(), now.len()) };
        }
        payload = later;
    }
    Some(whole - payload.len())
}

/// Whether an address can be that of a program's memory. The kernel answers wrong ones with
/// EFAULT; we can only see those that programs use by mistake, null above all.
fn is_plausible(address: usize) -> bool {
    (4096..1 << 47).contains(&address)
}

/// Finds what the kernel would refuse before it receives.
///
/// # Safety
///
/// `to` is null or points to what recvmsg(2) takes.
unsafe fn check(to: *const msghdr) -> Result<(), c_int> {
    if !is_plausible(to as usize) {
        return Err(EFAULT);
    }
    // SAFETY: as the caller says.
    let to = unsafe { &*to };
    if !to.msg_name.is_null() && i32::try_from(to.msg_namelen).is_err() {
        return Err(EINVAL);
    }
    // SAFETY: as the caller says.
    unsafe { check_parts(to.msg_iov, to.msg_iovlen as usize, EMSGSIZE) }
}

/// Finds what the kernel would refuse of a list of parts, `too_many` of them with this
/// error number.
///
/// # Safety
///
/// `count` parts can be read there, unless the address is so wrong that `is_plausible` sees
/// it.
pub(crate) unsafe fn check_parts(
    parts: *const iovec,
    count: usize,
    too_many: c_int,
) -> Result<(), c_int> {
    if count > MAX_PARTS {
        return Err(too_many);
    }
    if count == 0 {
        return Ok(());
    }
    if !is_plausible(parts as usize) {
        return Err(EFAULT);
    }
    // SAFETY: as the caller says.
    let parts = unsafe { slice::from_raw_parts(parts, count) };
    if parts
        .iter()
        .any(|part| isize::try_from(part.iov_len).is_err())
    {
        return Err(EINVAL);
    }
    Ok(())
}

/// The error for a signal handler that has interrupted this thread while it was in the
/// table.
fn interrupted(socket: &Socket, flags: c_int) -> Option<c_int> {
    if !table::is_inside() {
        return None;
    }
    table::count(Counter::Interrupted, 1);
    let waits = flags & MSG_DONTWAIT == 0 && !socket.is(Flag::NonBlocking);
    Some(if waits { EINTR } else { EAGAIN })
}

fn result(len: usize) -> ssize_t {
    ssize_t::try_from(len).unwrap_or(ssize_t::MAX)
}

/// What one batch brought.
#[derive(Clone, Copy, Debug)]
struct Batch {
    delivered: usize,
    drops: usize,
    /// The queue was empty afterwards.
    drained: bool,
    /// 0: none.
    errno: c_int,
}

impl Batch {
    fn failed(errno: c_int) -> Self {
        Self {
            delivered: 0,
            drops: 0,
            drained: errno == EAGAIN,
            errno,
        }
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
    buffers::take::<Incoming, _>(|incoming| {
        for at in 0..asked {
            prepare(incoming, at);
        }
        let flags_now = flags & !MSG_WAITFORONE | MSG_DONTWAIT;
        // SAFETY: that many messages have been prepared.
        let received = unsafe {
            let messages = (&raw mut incoming.messages).cast();
            real::recvmmsg(fd, messages, asked as c_uint, flags_now, ptr::null_mut())
        };
        let Ok(received) = usize::try_from(received) else {
            return Batch::failed(errno());
        };
        let mut batch = Batch {
            delivered: 0,
            drops: 0,
            drained: received < asked,
            errno: 0,
        };
        let Some(mut table) = table::lock() else {
            table::count(Counter::Interrupted, 1);
            return Batch::failed(EAGAIN);
        };
        for at in 0..received {
            let message = &incoming.messages[at];
            let bytes = &incoming.bytes[at].0[..message.msg_len as usize];
            // SAFETY: the kernel has filled the message in.
            let judged = unsafe { Arrived::new(bytes, &message.msg_hdr) }.and_then(|arrived| {
                let judged = arrived.judge_in(&mut table, socket, false)?;
                Some((arrived, judged))
            });
            let Some((arrived, judged)) = judged else {
                batch.drops += 1;
                continue;
            };
            // SAFETY: no more are delivered than were asked for.
            let to = unsafe { &mut *to.add(batch.delivered) };
            // SAFETY: as the caller says.
            match unsafe { arrived.deliver(socket, judged, &raw mut to.msg_hdr, flags) } {
                Outcome::Delivered(len) => {
                    to.msg_len = len as c_uint;
                    batch.delivered += 1;
                }
                Outcome::Dropped => batch.drops += 1,
                Outcome::Failed(errno) => {
                    batch.errno = errno;
                    break;
                }
            }
        }
        batch
    })
    .unwrap_or(Batch::failed(libc::ENOMEM))
}

#[inline]
fn prepare(incoming: &mut Incoming, at: usize) {
    incoming.parts[at] = iovec {
        iov_base: (&raw mut incoming.bytes[at]).cast(),
        iov_len: mem::size_of_val(&incoming.bytes[at]),
    };
    let message = &mut incoming.messages[at].msg_hdr;
    message.msg_name = (&raw mut incoming.names[at]).cast();
    message.msg_namelen = mem::size_of::<sockaddr_in6>() as socklen_t;
    message.msg_iov = &raw mut incoming.parts[at];
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut incoming.control[at]).cast();
    message.msg_controllen = CONTROL as _;
    message.msg_flags = 0;
}

/// For how long a call goes on after drops: as long as the kernel would wait, from the
/// start of the call.
#[derive(Clone, Copy, Debug)]
struct Patience {
    /// By the monotonic clock, in nanoseconds; 0: not known.
    started: u64,
    drops: usize,
    mode: Mode,
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
    #[inline]
    fn new(socket: &Socket, flags: c_int) -> Self {
        let waits = flags & MSG_DONTWAIT == 0 && !socket.is(Flag::NonBlocking);
        Self {
            started: if waits { now() } else { 0 },
            drops: 0,
            mode: Mode::Unknown,
        }
    }

    /// A datagram has been delivered: the time runs anew for the next.
    fn begin_again(&mut self) {
        self.mode = Mode::Unknown;
        self.started = now();
    }

    /// The flags for the next attempt.
    #[inline]
    fn flags(&self, flags: c_int) -> c_int {
        if matches!(self.mode, Mode::Until(_)) {
            flags | MSG_DONTWAIT
        } else {
            flags
        }
    }

    fn after_drop(&mut self, fd: c_int, socket: &Socket, flags: c_int) -> bool {
        self.after_drops(1, fd, socket, flags)
    }

    /// Whether the call should go on.
    fn after_drops(&mut self, drops: usize, fd: c_int, socket: &Socket, flags: c_int) -> bool {
        self.drops += drops;
        if self.mode == Mode::Unknown {
            self.mode = self.mode_of(fd, flags);
        }
        let ends = match self.mode {
            Mode::NonBlocking => self.drops >= MAX_DROPS,
            Mode::Until(deadline) => now() >= deadline,
            Mode::Unknown | Mode::Blocking => false,
        };
        if ends && self.mode == Mode::NonBlocking {
            wait::rearm(fd, socket);
        }
        !ends
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

    /// Waits for what is left of the time, if the time began with an earlier attempt.
    /// Whether to try again; if not, `errno` is set.
    fn wait(&self, fd: c_int) -> bool {
        let Mode::Until(deadline) = self.mode else {
            return false;
        };
        let left = deadline.saturating_sub(now());
        let timeout = timespec {
            tv_sec: (left / NANOS) as _,
            tv_nsec: (left % NANOS) as _,
        };
        let mut polled = pollfd {
            fd,
            events: POLLIN,
            revents: 0,
        };
        // SAFETY: both can be read, and the first written.
        match unsafe { real::ppoll(&raw mut polled, 1, &raw const timeout, ptr::null()) } {
            0 => fail::<c_int>(EAGAIN) > 0,
            ready => ready > 0,
        }
    }

    /// Waits until the kernel has a datagram, as long as it would let recvmmsg(2) wait.
    /// Whether it has one; if not, `errno` is set.
    ///
    /// # Safety
    ///
    /// None; it only looks so to the compiler, as the function waits.
    unsafe fn wait_for_one(&self, fd: c_int, socket: &Socket) -> bool {
        if matches!(self.mode, Mode::Until(_)) {
            return self.wait(fd);
        }
        if socket.is(Flag::NonBlocking) && is_nonblocking(fd) {
            return fail::<c_int>(EAGAIN) > 0;
        }
        let (nothing, nobody) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: nothing is written.
        unsafe { real::recvfrom(fd, nothing, 0, MSG_PEEK, nobody, ptr::null_mut()) >= 0 }
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
    let mut len = mem::size_of::<timeval>() as socklen_t;
    // SAFETY: both can be written to.
    let result = unsafe {
        let timeout = (&raw mut timeout).cast();
        real::getsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, timeout, &raw mut len)
    };
    let nanos = u64::try_from(timeout.tv_sec)
        .unwrap_or(0)
        .saturating_mul(NANOS)
        + u64::try_from(timeout.tv_usec).unwrap_or(0) * 1000;
    (result == 0 && nanos > 0).then_some(nanos)
}

/// The monotonic clock, in nanoseconds.
fn now() -> u64 {
    let mut now = timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: it can be written to.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec.unsigned_abs() * NANOS + now.tv_nsec.unsigned_abs()
}

/// The timeout of recvmmsg(2), which is looked at after each datagram.
#[derive(Clone, Copy, Debug)]
struct Deadline(Option<u64>);

impl Deadline {
    /// # Safety
    ///
    /// `timeout` is null or can be read.
    unsafe fn new(timeout: *const timespec) -> Result<Self, ()> {
        if timeout.is_null() {
            return Ok(Self(None));
        }
        // SAFETY: as the caller says.
        let timeout = unsafe { timeout.read() };
        let (Ok(seconds), Ok(nanos)) = (
            u64::try_from(timeout.tv_sec),
            u64::try_from(timeout.tv_nsec),
        ) else {
            return Err(());
        };
        if nanos >= NANOS {
            return Err(());
        }
        let after = seconds.saturating_mul(NANOS).saturating_add(nanos);
        Ok(Self(Some(now().saturating_add(after))))
    }

    fn is_over(self) -> bool {
        self.0.is_some_and(|deadline| now() >= deadline)
    }

    /// Tells the program how much is left.
    ///
    /// # Safety
    ///
    /// `timeout` is null or can be written.
    unsafe fn tell(self, timeout: *mut timespec) {
        if let Self(Some(deadline)) = self
            && !timeout.is_null()
        {
            let left = deadline.saturating_sub(now());
            // SAFETY: as the caller says.
            unsafe {
                timeout.write(timespec {
                    tv_sec: (left / NANOS) as _,
                    tv_nsec: (left % NANOS) as _,
                });
            }
        }
    }
}
