//! One datagram: as the kernel delivers it to the library, and as the program gets it.

use std::mem::{self, MaybeUninit};
use std::net::{IpAddr, SocketAddr};
use std::ptr;
use std::slice;

use libc::{
    EFAULT, EINVAL, EMSGSIZE, MSG_CMSG_CLOEXEC, MSG_CTRUNC, MSG_TRUNC, c_int, iovec, msghdr,
    sockaddr_in6, socklen_t,
};

use super::MAX_PARTS;
use crate::boundary::is_plausible;
use crate::buffers::{self, CONTROL, Far, NEAR, TakenFar};
use crate::control::{self, Wanted, Writer};
use crate::recent::Seen;
use crate::settings::{self, Pktinfo};
use crate::socket::{Flag, Held, Socket};
use crate::table::{self, Counter, Judged, Table};
use crate::{connect, names};

/// Memory on the stack of a call for a datagram and what the kernel tells of it. There is
/// nothing to be given back.
#[repr(C, align(8))]
pub(super) struct Arrival {
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
    pub(super) fn new() -> Self {
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

    /// The message for recvmsg(2).
    #[inline]
    pub(super) fn prepare(&mut self) -> *mut msghdr {
        self.far = buffers::far();
        self.far_uses = buffers::far_uses();
        self.parts[0] = iovec {
            iov_base: (&raw mut self.near).cast(),
            iov_len: NEAR,
        };
        if !self.far.is_null() {
            self.parts[1] = iovec {
                // SAFETY: it is longer than that.
                iov_base: unsafe { self.far.cast::<u8>().add(NEAR) }.cast(),
                iov_len: size_of::<Far>() - NEAR,
            };
        }
        self.message.msg_name = (&raw mut self.name).cast();
        self.message.msg_namelen = size_of::<sockaddr_in6>() as socklen_t;
        self.message.msg_iov = (&raw mut self.parts).cast();
        self.message.msg_iovlen = 2;
        self.message.msg_control = (&raw mut self.control).cast();
        self.message.msg_controllen = CONTROL as _;
        self.message.msg_flags = 0;
        &raw mut self.message
    }

    /// What has arrived, and the memory that it is in if it is long.
    ///
    /// # Safety
    ///
    /// recvmsg(2) has returned `len` for the prepared message, which is not the end.
    ///
    /// # Errors
    ///
    /// What it must be counted as if it can't be read.
    #[inline]
    pub(super) unsafe fn arrived(
        &mut self,
        len: usize,
    ) -> Result<(Arrived<'_>, Option<TakenFar>), Counter> {
        if self.message.msg_flags & MSG_TRUNC != 0 {
            return Err(Counter::NoMemory);
        }
        let mut start = (&raw const self.near).cast::<u8>();
        let mut taken = None;
        if len > NEAR {
            let intact = buffers::take_far(self.far, self.far_uses);
            taken = Some(intact.ok_or(Counter::Interrupted)?);
            let far = self.far.cast::<u8>();
            // SAFETY: it was not null, or the datagram would have been truncated. The
            // kernel has filled the rest in.
            unsafe { ptr::copy_nonoverlapping(start, far, NEAR) };
            start = far;
        }
        // SAFETY: the kernel has written that many bytes there.
        let bytes = unsafe { slice::from_raw_parts(start, len) };
        // SAFETY: the kernel has written the control data and the name.
        let arrived = unsafe { Arrived::new(bytes, &self.message) };
        // Each datagram has a sender.
        Ok((arrived.ok_or(Counter::NoMemory)?, taken))
    }

    /// Whether no datagram was received: the socket is shut down for receiving. Each datagram
    /// has a sender.
    #[inline]
    pub(super) fn is_end(&self, len: usize) -> bool {
        len == 0 && self.message.msg_namelen == 0
    }
}

/// A datagram as the kernel delivered it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrived<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) peer: SocketAddr,
    pub(super) control: &'a [u8],
    pub(super) flags: c_int,
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

/// What a datagram is that stays in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peeked {
    Good(Judged),
    /// It must be dropped.
    Bad,
    /// The table could not be locked.
    Unknown,
}

impl<'a> Arrived<'a> {
    /// # Safety
    ///
    /// recvmsg(2) has filled in the message's name and control data.
    #[inline]
    pub(super) unsafe fn new(bytes: &'a [u8], message: &msghdr) -> Option<Self> {
        // SAFETY: as the caller says.
        let peer = unsafe { names::read(message.msg_name.cast(), message.msg_namelen) }?;
        let control: &[u8] = if message.msg_controllen == 0 {
            &[]
        } else {
            let len = message.msg_controllen as usize;
            // SAFETY: as the caller says.
            unsafe { slice::from_raw_parts(message.msg_control.cast(), len) }
        };
        Some(Self {
            bytes,
            peer,
            control,
            flags: message.msg_flags,
        })
    }

    /// The local address that it was sent to, of a socket that is bound to all.
    #[inline]
    fn local(&self, socket: &Socket) -> Option<IpAddr> {
        if socket.is(Flag::Wildcard) {
            control::local(self.control)
        } else {
            None
        }
    }

    /// Decides whether the datagram is for the program. `None`: it must be dropped, and has
    /// been counted.
    #[inline]
    pub(super) fn judge(&self, fd: c_int, socket: &Socket) -> Option<Judged> {
        self.judge_again(socket)
            .or_else(|| self.judge_in(table::lock().as_mut(), fd, socket))
    }

    /// As `judge`, if this thread has decided on the like a moment ago; without a lock.
    #[inline]
    pub(super) fn judge_again(&self, socket: &Socket) -> Option<Judged> {
        if socket.peer().is_some() || socket.is(Flag::Unnamed) {
            return None;
        }
        let seen = Seen {
            endpoint: socket.endpoint(),
            peer: self.peer,
            local: self.local(socket),
            bytes: self.bytes,
        };
        table::receive_again(&seen, |judged| names::fits(judged.client, socket.family()))
    }

    /// As `judge`, with a table that is locked already; `None` if it can't be.
    #[inline]
    pub(super) fn judge_in(
        &self,
        table: Option<&mut Table>,
        fd: c_int,
        socket: &Socket,
    ) -> Option<Judged> {
        let Some(table) = table else {
            table::count(Counter::Interrupted, 1);
            return None;
        };
        let local = self.local(socket);
        let judged = table.receive(socket.endpoint(), self.peer, local, self.bytes)?;
        if socket.is(Flag::Unnamed) {
            connect::named(socket, judged.client, self.peer);
        }
        match refusal(socket, judged) {
            None => Some(judged),
            Some(counter) => {
                table::count(counter, 1);
                if counter == Counter::OtherClient {
                    connect::part(table, fd, socket, self.peer);
                }
                None
            }
        }
    }

    /// As `judge`, of a datagram that stays in the queue and is not counted.
    pub(super) fn peek(&self, socket: &Socket) -> Peeked {
        let Some(mut table) = table::lock() else {
            return Peeked::Unknown;
        };
        let local = self.local(socket);
        let judged = table.peek(socket.endpoint(), self.peer, local, self.bytes);
        match judged.filter(|judged| refusal(socket, *judged).is_none()) {
            Some(judged) => Peeked::Good(judged),
            None => Peeked::Bad,
        }
    }

    /// Gives the program its datagram for good, and counts it.
    ///
    /// # Safety
    ///
    /// As `deliver`.
    #[inline]
    pub(super) unsafe fn hand_over(
        &self,
        socket: &Socket,
        judged: Judged,
        to: *mut msghdr,
        flags: c_int,
    ) -> Result<usize, c_int> {
        // SAFETY: as the caller says.
        let delivered = unsafe { self.deliver(socket, judged, to, flags) };
        match delivered {
            Ok(_) => table::count_delivered(1, judged.is_direct.into()),
            Err(_) => table::count(Counter::BadPointer, 1),
        }
        delivered
    }

    /// Keeps a good datagram for the next call, or drops it if there is no place for it.
    #[cold]
    pub(super) fn keep(&self, socket: &Socket) {
        let held = Box::new(Held {
            bytes: self.bytes.to_vec(),
            peer: self.peer,
            control: self.control.to_vec(),
            flags: self.flags,
        });
        if !socket.held.put(held) {
            table::count(Counter::NoMemory, 1);
        }
    }

    /// Gives the program its datagram. Returns what recvmsg(2) would.
    ///
    /// # Safety
    ///
    /// `to` is a message as recvmsg(2) takes it, in which `check` has found no fault.
    #[inline]
    pub(super) unsafe fn deliver(
        &self,
        socket: &Socket,
        judged: Judged,
        to: *mut msghdr,
        flags: c_int,
    ) -> Result<usize, c_int> {
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
        let copied = unsafe { scatter(payload, parts) }.ok_or(EFAULT)?;
        let mut told = self.flags & !MSG_TRUNC | flags & MSG_CMSG_CLOEXEC;
        if copied < payload.len() {
            told |= MSG_TRUNC;
        }
        if !to.msg_name.is_null() {
            if !is_plausible(to.msg_name) {
                return Err(EFAULT);
            }
            let len = &raw mut to.msg_namelen;
            // SAFETY: as the caller says.
            unsafe { names::give(judged.client, socket.family(), to.msg_name.cast(), len) };
        }
        let room = to.msg_controllen as usize;
        // SAFETY: as the caller says.
        let mut control = unsafe { Writer::new(to.msg_control.cast(), room) };
        if !self.control.is_empty() && (room == 0 || is_plausible(to.msg_control)) {
            control::give(self.control, wanted(socket, judged), &mut control);
        }
        if control.is_truncated() {
            told |= MSG_CTRUNC;
        }
        to.msg_controllen = control.used() as _;
        to.msg_flags = told;
        if !socket.is(Flag::Received) {
            socket.set(Flag::Received, true);
        }
        Ok(if flags & MSG_TRUNC != 0 {
            payload.len()
        } else {
            copied
        })
    }
}

/// Tells the program what recvmsg(2) does when the socket is shut down for receiving.
///
/// # Safety
///
/// `to` is a message as recvmsg(2) takes it.
pub(super) unsafe fn tell_end(to: *mut msghdr, flags: c_int) {
    // SAFETY: as the caller says.
    let to = unsafe { &mut *to };
    if !to.msg_name.is_null() {
        to.msg_namelen = 0;
    }
    to.msg_controllen = 0;
    to.msg_flags = flags & MSG_CMSG_CLOEXEC;
}

/// Why a datagram that the table takes is not for a socket.
#[inline]
fn refusal(socket: &Socket, judged: Judged) -> Option<Counter> {
    if !names::fits(judged.client, socket.family()) {
        Some(Counter::ClientFamily)
    } else if socket
        .peer()
        .is_some_and(|peer| !is_same(peer, judged.client))
    {
        Some(Counter::OtherClient)
    } else {
        None
    }
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
        let (now, later) = payload.split_at(payload.len().min(part.iov_len));
        if !now.is_empty() {
            if !is_plausible(part.iov_base) {
                return None;
            }
            // SAFETY: the caller vouches for the memory, which the payload is no part of.
            unsafe { ptr::copy_nonoverlapping(now.as_ptr(), part.iov_base.cast(), now.len()) };
        }
        payload = later;
    }
    Some(whole - payload.len())
}

/// Finds what the kernel would refuse before it receives.
///
/// # Safety
///
/// `to` is null or points to what recvmsg(2) takes.
#[inline]
pub(super) unsafe fn check(to: *const msghdr) -> Result<(), c_int> {
    if !is_plausible(to) {
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

/// Whether `deliver` will find no wrong address in a message, however long the datagram is.
///
/// # Safety
///
/// `check` has found no fault.
pub(super) unsafe fn is_reachable(to: *const msghdr) -> bool {
    // SAFETY: as the caller says.
    let to = unsafe { &*to };
    let parts: &[iovec] = if to.msg_iovlen == 0 {
        &[]
    } else {
        // SAFETY: as the caller says.
        unsafe { slice::from_raw_parts(to.msg_iov, to.msg_iovlen as usize) }
    };
    (to.msg_name.is_null() || is_plausible(to.msg_name))
        && parts
            .iter()
            .all(|part| part.iov_len == 0 || is_plausible(part.iov_base))
}

/// Finds what the kernel would refuse of a list of parts, `too_many` of them with this
/// error number.
///
/// # Safety
///
/// `count` parts can be read there, unless the address is so wrong that `is_plausible` sees
/// it.
#[inline]
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
    if !is_plausible(parts) {
        return Err(EFAULT);
    }
    // SAFETY: as the caller says.
    let parts = unsafe { slice::from_raw_parts(parts, count) };
    let is_negative = |part: &iovec| isize::try_from(part.iov_len).is_err();
    if parts.iter().any(is_negative) {
        Err(EINVAL)
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_payload_is_scattered_like_one_byte_after_the_other(
            payload in vec(any::<u8>(), 0..300),
            lens in vec(0_usize..60, 0..12),
        ) {
            let mut rooms: Vec<Vec<u8>> = lens.iter().map(|len| vec![0xee; *len]).collect();
            let parts: Vec<iovec> = rooms
                .iter_mut()
                .map(|room| iovec {
                    // No memory is looked at for a part without length.
                    iov_base: if room.is_empty() {
                        ptr::null_mut()
                    } else {
                        room.as_mut_ptr().cast()
                    },
                    iov_len: room.len(),
                })
                .collect();
            // SAFETY: the parts are the rooms.
            let copied = unsafe { scatter(&payload, &parts) };

            let room: usize = lens.iter().sum();
            prop_assert_eq!(copied, Some(payload.len().min(room)));
            let mut expected = payload;
            expected.resize(room, 0xee);
            prop_assert_eq!(rooms.concat(), expected);
        }
    }

    #[test]
    fn a_null_buffer_is_told_from_memory() {
        let parts = [iovec {
            iov_base: ptr::null_mut(),
            iov_len: 1,
        }];
        // SAFETY: null is allowed.
        assert_eq!(unsafe { scatter(b"x", &parts) }, None);
        // SAFETY: as above; there is nothing to copy.
        assert_eq!(unsafe { scatter(b"", &parts) }, Some(0));
    }
}
