//! sendmmsg: as few messages as can be, with a header in front of each datagram that is
//! never copied.
//!
//! A burst leaves as one message, a list of header, datagram, header, datagram, …, which
//! the kernel splits again at the given size (UDP_SEGMENT, udp(7)). So do neighbours that go
//! the same way, if they have one length with their headers, which may differ. It refuses
//! that where a datagram exceeds the interface's MTU, or where the device can't compute checksums;
//! then each datagram leaves as a message of its own, and longer ones are not tried again on that
//! socket.

use std::io;
use std::marker::PhantomData;
use std::mem::{self, MaybeUninit};
use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use libc::{c_int, cmsghdr, iovec, mmsghdr, msghdr, sockaddr_in, sockaddr_in6, socklen_t};

use super::{MESSAGES, Name, len_of, number};
use crate::{Outgoing, SendFault, Sent, SocketState, TrafficClass, Transmit};

/// Datagrams that the kernel takes in one burst (UDP_MAX_SEGMENTS in Linux before 6.9,
/// which raised it).
const MAX_BURST: usize = 64;

/// Bytes that a burst may have, headers included: what fits one IP packet, less the longest
/// IP and UDP headers.
const MAX_BURST_BYTES: usize = 65_535 - 48;

/// Pieces of memory that the messages of one call consist of; a burst has at most two for
/// each of its datagrams.
const PIECES: usize = 4 * MAX_BURST;

/// How often to try a message again whose failure may be an earlier one's. More than one
/// report can be waiting; someone who forges them must not keep us here.
const TRIES: u32 = 3;

/// What a message carries: consecutive datagrams, all of one length but for the last.
#[derive(Clone, Copy)]
struct Message {
    first: Position,
    datagrams: usize,
    /// Bytes of the first datagram with its header.
    len: usize,
    /// Bytes of all of them with their headers.
    bytes: usize,
}

/// A message that datagrams may yet be added to.
struct Open<'d> {
    message: Message,
    /// The most datagrams that it may have.
    most: usize,
    outgoing: Outgoing<'d>,
}

impl<'d> Open<'d> {
    /// Adds `rest` datagrams of `one`, from index `first` on, if they go the same way and have
    /// the length of those before with their own headers; a single one may be shorter, and is
    /// the last. Returns how many it took.
    #[inline]
    fn join(
        &mut self,
        one: &Transmit<'d>,
        first: usize,
        rest: usize,
        outbox: &mut Outbox<'_, 'd>,
    ) -> usize {
        let message = &mut self.message;
        if message.datagrams == self.most
            || message.bytes != message.datagrams * message.len
            || !one.outgoing.goes_as(&self.outgoing)
        {
            return 0;
        }
        let len = one.len_with_header(first);
        if len != message.len && !(rest == 1 && (1..message.len).contains(&len)) {
            return 0;
        }
        let datagrams = rest.min(self.most - message.datagrams);
        message.bytes += outbox.add(one, first, datagrams);
        message.datagrams += datagrams;
        datagrams
    }
}

/// A datagram to send: its index within the transmit of the given index.
#[derive(Clone, Copy)]
struct Position {
    transmit: usize,
    datagram: usize,
}

/// The first of all.
const START: Position = Position {
    transmit: 0,
    datagram: 0,
};

impl Position {
    fn next_transmit(&mut self) {
        self.transmit += 1;
        self.datagram = 0;
    }
}

/// One call of [`send`].
struct Sending<'a, T, F> {
    state: &'a SocketState,
    socket: BorrowedFd<'a>,
    count: usize,
    transmit: &'a T,
    fault: &'a mut F,
    /// Datagrams of neighbouring transmits may leave in one burst.
    join: bool,
    sent: Sent,
}

/// Sends what `transmit` returns for the indices up to `count`, until `fault` says to stop.
pub(crate) fn send<'d>(
    state: &SocketState,
    socket: BorrowedFd<'_>,
    count: usize,
    transmit: &impl Fn(usize) -> Transmit<'d>,
    fault: &mut impl FnMut(usize, SendFault) -> ControlFlow<()>,
    join: bool,
) -> Sent {
    let mut sending = Sending {
        state,
        socket,
        count,
        transmit,
        fault,
        join,
        sent: Sent::default(),
    };
    // Where it was told to stop, there is nothing left to do.
    let _ = if count == 1 {
        sending.send_only()
    } else {
        sending.send(START, usize::MAX)
    };
    sending.sent
}

/// Generic, so that a transmit need not be written to memory to be read again at once.
impl<'d, T, F> Sending<'_, T, F>
where
    T: Fn(usize) -> Transmit<'d>,
    F: FnMut(usize, SendFault) -> ControlFlow<()>,
{
    /// Sends the only transmit, which a session's datagrams mostly are: a single datagram
    /// needs no list.
    fn send_only(&mut self) -> ControlFlow<()> {
        let one = (self.transmit)(0);
        if one.datagrams() > 1 {
            return self.send(START, usize::MAX);
        }
        let (mut name, mut control) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        let header = one.outgoing.header;
        let mut pieces = [piece(header), piece(one.payload)];
        let (extras, v6) = (
            Extras::of(&one.outgoing, None),
            self.state.bound().is_ipv6(),
        );
        // SAFETY: name and control buffer outlive the call, and so do the pieces, the bytes
        // of which are borrowed for `'d`.
        let result = unsafe {
            let (name, control) = (name.as_mut_ptr(), control.as_mut_ptr());
            let mut message = message_header(one.outgoing.to, &extras, name, control, v6);
            let skipped = usize::from(header.is_empty());
            message.msg_iov = pieces.as_mut_ptr().add(skipped);
            message.msg_iovlen = (pieces.len() - skipped) as _;
            sendmsg(self.socket, &message)
        };
        match result {
            Ok(_) => {
                self.sent.datagrams += 1;
                self.sent.bytes += one.len_with_header(0);
                ControlFlow::Continue(())
            }
            Err(error) => self.after_error_of_only(&one, error),
        }
    }

    #[cold]
    fn after_error_of_only(&mut self, one: &Transmit<'d>, error: io::Error) -> ControlFlow<()> {
        let mut scratch = MaybeUninit::uninit();
        let mut outbox = Outbox::new(&mut scratch);
        let bytes = outbox.add(one, 0, 1);
        let message = Message {
            first: START,
            datagrams: 1,
            len: bytes,
            bytes,
        };
        outbox.end_message(message, &one.outgoing, self.state.bound().is_ipv6());
        self.after_error(&mut outbox, 0, error)?;
        ControlFlow::Continue(())
    }

    /// Sends `left` datagrams, or all, from `at` on.
    fn send(&mut self, mut at: Position, mut left: usize) -> ControlFlow<()> {
        let mut scratch = MaybeUninit::uninit();
        let mut outbox = Outbox::new(&mut scratch);
        let v6 = self.state.bound().is_ipv6();
        let mut open: Option<Open<'d>> = None;
        while at.transmit < self.count && left > 0 {
            // Asked for here alone, so that it is inlined.
            let one = (self.transmit)(at.transmit);
            let mut rest = left.min(one.datagrams() - at.datagram);
            left -= rest;
            if self.join
                && let Some(open) = &mut open
            {
                let joined = open.join(&one, at.datagram, rest, &mut outbox);
                at.datagram += joined;
                rest -= joined;
            }
            while rest > 0 {
                if let Some(done) = open.take() {
                    outbox.end_message(done.message, &done.outgoing, v6);
                }
                let len = one.len_with_header(at.datagram);
                let most = if rest == 1 && !self.join {
                    1
                } else {
                    self.most_in_burst(len)
                };
                let datagrams = most.min(rest);
                if !outbox.has_room_for(if self.join { most } else { datagrams }) {
                    self.flush(&mut outbox)?;
                }
                let message = Message {
                    first: at,
                    datagrams,
                    len,
                    bytes: outbox.add(&one, at.datagram, datagrams),
                };
                at.datagram += datagrams;
                rest -= datagrams;
                open = Some(Open {
                    message,
                    most,
                    outgoing: one.outgoing,
                });
            }
            at.next_transmit();
        }
        if let Some(done) = open {
            outbox.end_message(done.message, &done.outgoing, v6);
        }
        self.flush(&mut outbox)
    }

    /// The number of datagrams of `len` bytes that may leave in one message.
    fn most_in_burst(&self, len: usize) -> usize {
        if len == 0 || len > self.state.burst_limit() {
            1
        } else if len <= MAX_BURST_BYTES / MAX_BURST {
            MAX_BURST
        } else {
            (MAX_BURST_BYTES / len).max(1)
        }
    }

    /// Hands the messages in `outbox` to the kernel, until each is sent or reported.
    fn flush(&mut self, outbox: &mut Outbox<'_, 'd>) -> ControlFlow<()> {
        let mut next = 0;
        while next < outbox.messages {
            next += match self.try_send(outbox, next) {
                Ok(taken) => taken,
                Err(error) => self.after_error(outbox, next, error)?,
            };
        }
        outbox.clear();
        ControlFlow::Continue(())
    }

    /// Hands the messages from index `next` on to the kernel, and returns how many it took.
    fn try_send(&mut self, outbox: &mut Outbox<'_, 'd>, next: usize) -> io::Result<usize> {
        let taken = outbox.send(self.socket, next)?;
        for message in (next..next + taken).map(|index| outbox.message(index)) {
            self.sent.datagrams += message.datagrams;
            self.sent.bytes += message.bytes;
        }
        Ok(taken)
    }

    /// Sends the message at index `next`, which failed with `error`, in another way, or
    /// reports it. Returns how many messages are done with.
    #[cold]
    fn after_error(
        &mut self,
        outbox: &mut Outbox<'_, 'd>,
        next: usize,
        mut error: io::Error,
    ) -> ControlFlow<(), usize> {
        let message = outbox.message(next);
        let mut earlier: Option<io::Error> = None;
        for _ in 0..TRIES {
            if !may_be_of_an_earlier_one(&error) {
                break;
            }
            match self.try_send(outbox, next) {
                Ok(taken) => {
                    (self.fault)(message.first.transmit, SendFault::Earlier(error))?;
                    return ControlFlow::Continue(taken);
                }
                Err(another) => earlier = Some(mem::replace(&mut error, another)),
            }
        }
        if let Some(earlier) = earlier
            && earlier.raw_os_error() != error.raw_os_error()
        {
            (self.fault)(message.first.transmit, SendFault::Earlier(earlier))?;
        }
        if message.datagrams > 1 && refuses_bursts(&error) {
            // EIO: the device can't compute checksums, whatever the length.
            let is_any_length = error.raw_os_error() == Some(libc::EIO);
            let limit = if is_any_length { 0 } else { message.len - 1 };
            let (before, sent) = (self.state.limit_bursts(limit), self.sent.datagrams);
            let flow = self.send(message.first, message.datagrams);
            if self.sent.datagrams == sent {
                // It was no burst that the kernel refused, but where they go or come from,
                // which says nothing of others.
                self.state.unlimit_bursts(limit, before);
            }
            flow?;
        } else {
            self.report_lost(message, &error)?;
        }
        ControlFlow::Continue(1)
    }

    /// Reports each transmit that had datagrams in `message`.
    #[cold]
    fn report_lost(&mut self, message: Message, error: &io::Error) -> ControlFlow<()> {
        let (mut at, mut left) = (message.first, message.datagrams);
        while left > 0 {
            let one = (self.transmit)(at.transmit);
            let datagrams = left.min(one.datagrams() - at.datagram);
            let lost = SendFault::Lost {
                error: same_error(error),
                datagrams,
                len: one.len_with_header(at.datagram),
            };
            (self.fault)(at.transmit, lost)?;
            left -= datagrams;
            at.next_transmit();
        }
        ControlFlow::Continue(())
    }
}

/// Another `io::Error` of the same number: they can't be cloned.
fn same_error(error: &io::Error) -> io::Error {
    let number = error.raw_os_error();
    number.map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
}

/// Whether an error may be one that ICMP left on the socket: those are about something sent
/// before, and reading them clears them (ip(7), `IP_RECVERR`). Nearly all can also be this
/// message's own, which trying again tells; a lack of room is always its own.
fn may_be_of_an_earlier_one(error: &io::Error) -> bool {
    !matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::EINTR | libc::ENOBUFS | libc::ENOMEM | libc::EINVAL)
    )
}

/// Errors of a burst that its datagrams may not have one by one: longer than the
/// interface's MTU, no checksums by the device, no such option.
fn refuses_bursts(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EMSGSIZE | libc::EIO | libc::EOPNOTSUPP | libc::ENOPROTOOPT)
    )
}

/// What the kernel is pointed at during one call, filled as far as it is used.
struct Scratch {
    names: [Name; MESSAGES],
    controls: [ControlOut; MESSAGES],
    pieces: [iovec; PIECES],
    headers: [mmsghdr; MESSAGES],
    messages: [Message; MESSAGES],
}

/// Messages for one call. It borrows what they consist of.
struct Outbox<'s, 'd> {
    /// Borrowed, so that it does not move: the headers point into it.
    scratch: &'s mut MaybeUninit<Scratch>,
    /// Messages that have been written.
    messages: usize,
    /// Pieces that have been written, and the first of the message that has not ended.
    pieces: usize,
    first_piece: usize,
    datagrams: PhantomData<&'d [u8]>,
}

impl<'s, 'd> Outbox<'s, 'd> {
    fn new(scratch: &'s mut MaybeUninit<Scratch>) -> Self {
        Self {
            scratch,
            messages: 0,
            pieces: 0,
            first_piece: 0,
            datagrams: PhantomData,
        }
    }

    fn clear(&mut self) {
        (self.messages, self.pieces, self.first_piece) = (0, 0, 0);
    }

    /// Whether there is room for a message of so many datagrams.
    fn has_room_for(&self, datagrams: usize) -> bool {
        self.messages < MESSAGES && self.pieces + 2 * datagrams <= PIECES
    }

    /// Adds `datagrams` datagrams of `one` to the message, from index `first` on, each with
    /// its header. Returns their bytes.
    #[inline]
    fn add(&mut self, one: &Transmit<'d>, first: usize, datagrams: usize) -> usize {
        let header = one.outgoing.header;
        let payload = one.slice(first, datagrams);
        if header.is_empty() {
            self.add_piece(payload);
        } else {
            for number in first..first + datagrams {
                self.add_piece(header);
                self.add_piece(one.slice(number, 1));
            }
        }
        payload.len() + datagrams * header.len()
    }

    #[inline]
    fn add_piece(&mut self, bytes: &'d [u8]) {
        assert!(self.pieces < PIECES, "the caller has asked for room");
        // SAFETY: the index is within the array, and the field is valid for writes.
        unsafe { (*self.scratch.as_mut_ptr()).pieces[self.pieces] = piece(bytes) };
        self.pieces += 1;
    }

    /// Ends `message`, which consists of the pieces added since the last one.
    #[inline]
    fn end_message(&mut self, message: Message, outgoing: &Outgoing<'_>, v6: bool) {
        let at = self.messages;
        assert!(at < MESSAGES, "the caller has asked for room");
        let segment = u16::try_from(message.len).ok();
        let extras = Extras::of(outgoing, segment.filter(|_| message.datagrams > 1));
        let scratch = self.scratch.as_mut_ptr();
        // SAFETY: `at < MESSAGES` and `first_piece <= PIECES`, and every field is written
        // before it is read. The pointers lead into `scratch`, which is borrowed for longer
        // than `self` lives.
        unsafe {
            let name = (&raw mut (*scratch).names).cast::<Name>().add(at);
            let control = (&raw mut (*scratch).controls).cast::<ControlOut>().add(at);
            let mut header = message_header(outgoing.to, &extras, name, control, v6);
            header.msg_iov = (&raw mut (*scratch).pieces)
                .cast::<iovec>()
                .add(self.first_piece);
            header.msg_iovlen = (self.pieces - self.first_piece) as _;
            (*scratch).headers[at] = mmsghdr {
                msg_hdr: header,
                msg_len: 0,
            };
            (*scratch).messages[at] = message;
        }
        self.messages += 1;
        self.first_piece = self.pieces;
    }

    #[inline]
    fn message(&self, index: usize) -> Message {
        assert!(
            index < self.messages,
            "only messages that were written are read"
        );
        // SAFETY: the first `messages` have been written.
        unsafe { (*self.scratch.as_ptr()).messages[index] }
    }

    /// Hands the messages from index `next` on to the kernel, and returns how many it took.
    fn send(&mut self, socket: BorrowedFd<'_>, next: usize) -> io::Result<usize> {
        assert!(next < self.messages, "there is something to send");
        // SAFETY: the first `messages` headers have been written, and point into `scratch`
        // and at what is borrowed for `'d`.
        unsafe {
            let headers = (&raw mut (*self.scratch.as_mut_ptr()).headers).cast::<mmsghdr>();
            sendmmsg(socket, headers.add(next), self.messages - next)
        }
    }
}

/// What the kernel is pointed at for some bytes, which it only reads.
#[inline]
fn piece(bytes: &[u8]) -> iovec {
    iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    }
}

/// A message without content, to be sent to `to` with `extras`, which it points at `name` and
/// `control` for.
///
/// # Safety
///
/// `name` and `control` are valid for writes, and stay in place until the kernel has read
/// them.
#[inline]
unsafe fn message_header(
    to: Option<SocketAddr>,
    extras: &Extras,
    name: *mut Name,
    control: *mut ControlOut,
    v6: bool,
) -> msghdr {
    // SAFETY: a `msghdr` of zeros is valid; the rest is the caller's promise.
    unsafe {
        let mut header: msghdr = mem::zeroed();
        if let Some(to) = to {
            let (value, len) = name_of(to, v6);
            name.write(value);
            header.msg_name = name.cast();
            header.msg_namelen = len;
        }
        if !extras.is_empty() {
            write_control(&mut header, control, extras, v6);
        }
        header
    }
}

/// sendmmsg(2), or sendmsg(2) for a single message. Returns how many messages were sent.
///
/// # Safety
///
/// `messages` points at `count` messages whose names, vectors and control buffers are
/// valid for reads.
unsafe fn sendmmsg(
    socket: BorrowedFd<'_>,
    messages: *mut mmsghdr,
    count: usize,
) -> io::Result<usize> {
    let (fd, flags): (_, c_int) = (socket.as_raw_fd(), 0);
    // SAFETY: as above.
    unsafe {
        if count == 1 {
            return sendmsg(socket, &(*messages).msg_hdr).map(|_| 1);
        }
        number(libc::syscall(
            libc::SYS_sendmmsg,
            fd,
            messages,
            count,
            flags,
        ))
    }
}

/// sendmsg(2). Returns how many bytes were sent.
///
/// # Safety
///
/// Name, vectors and control buffer of `message` are valid for reads.
unsafe fn sendmsg(socket: BorrowedFd<'_>, message: &msghdr) -> io::Result<usize> {
    let (fd, flags): (_, c_int) = (socket.as_raw_fd(), 0);
    let message: *const msghdr = message;
    // SAFETY: as above.
    number(unsafe { libc::syscall(libc::SYS_sendmsg, fd, message, flags) })
}

/// Room for the control messages of a message to send: packet info (40 bytes), traffic
/// class and burst size (24 each).
pub(super) type ControlOut = [u64; 11];

/// What a message carries besides bytes and recipient.
struct Extras {
    from: Option<SocketAddr>,
    class: TrafficClass,
    /// Bytes of each datagram of a burst, header included.
    segment: Option<u16>,
}

impl Extras {
    #[inline]
    fn of(outgoing: &Outgoing<'_>, segment: Option<u16>) -> Self {
        Self {
            from: outgoing.from,
            class: outgoing.class,
            segment,
        }
    }

    fn is_empty(&self) -> bool {
        self.from.is_none() && self.class == TrafficClass::default() && self.segment.is_none()
    }
}

/// Points `header` at `control`, filled with `extras`.
///
/// # Safety
///
/// `control` is valid for writes, and stays in place until the kernel has read it.
unsafe fn write_control(header: &mut msghdr, control: *mut ControlOut, extras: &Extras, v6: bool) {
    let mut used = 0;
    // SAFETY: the buffer is zeroed first, as CMSG_NXTHDR asks for, and has room for all
    // three messages, so no pointer is null.
    unsafe {
        *control = ControlOut::default();
        header.msg_control = control.cast();
        header.msg_controllen = size_of::<ControlOut>() as _;
        let mut at = libc::CMSG_FIRSTHDR(header);
        match extras.from {
            Some(SocketAddr::V4(from)) => {
                let mut info: libc::in_pktinfo = mem::zeroed();
                info.ipi_spec_dst.s_addr = u32::from_ne_bytes(from.ip().octets());
                used += write_message(at, libc::IPPROTO_IP, libc::IP_PKTINFO, info);
                at = libc::CMSG_NXTHDR(header, at);
            }
            Some(SocketAddr::V6(from)) => {
                let mut info: libc::in6_pktinfo = mem::zeroed();
                info.ipi6_addr.s6_addr = from.ip().octets();
                info.ipi6_ifindex = from.scope_id();
                used += write_message(at, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, info);
                at = libc::CMSG_NXTHDR(header, at);
            }
            None => {}
        }
        if extras.class != TrafficClass::default() {
            let class = c_int::from(extras.class.0);
            used += if v6 {
                write_message(at, libc::IPPROTO_IPV6, libc::IPV6_TCLASS, class)
            } else {
                write_message(at, libc::IPPROTO_IP, libc::IP_TOS, class)
            };
            at = libc::CMSG_NXTHDR(header, at);
        }
        if let Some(segment) = extras.segment {
            used += write_message(at, libc::SOL_UDP, libc::UDP_SEGMENT, segment);
        }
    }
    header.msg_controllen = used as _;
}

/// Writes a control message and returns the bytes that it takes.
///
/// # Safety
///
/// `at` points into a control buffer with room for a message holding a `T`.
unsafe fn write_message<T>(at: *mut cmsghdr, level: c_int, kind: c_int, value: T) -> usize {
    let size = len_of::<T>();
    // SAFETY: room and alignment of the message header are the caller's promise; the value
    // may lie unaligned behind it.
    unsafe {
        (*at).cmsg_level = level;
        (*at).cmsg_type = kind;
        (*at).cmsg_len = libc::CMSG_LEN(size) as _;
        ptr::write_unaligned(libc::CMSG_DATA(at).cast(), value);
        libc::CMSG_SPACE(size) as usize
    }
}

/// `address` as a name, and the length of that. An IPv4 one is mapped to IPv6 if `v6`: the
/// socket is one for IPv6.
fn name_of(address: SocketAddr, v6: bool) -> (Name, socklen_t) {
    let (ip, scope) = match address {
        SocketAddr::V4(v4) if !v6 => {
            let name = sockaddr_in {
                sin_family: family(libc::AF_INET),
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(v4.ip().octets()),
                },
                sin_zero: [0; 8],
            };
            return (Name { v4: name }, len_of::<sockaddr_in>());
        }
        SocketAddr::V4(v4) => (v4.ip().to_ipv6_mapped(), 0),
        SocketAddr::V6(v6) => (*v6.ip(), v6.scope_id()),
    };
    let name = sockaddr_in6 {
        sin6_family: family(libc::AF_INET6),
        sin6_port: address.port().to_be(),
        sin6_flowinfo: 0,
        sin6_addr: libc::in6_addr {
            s6_addr: ip.octets(),
        },
        sin6_scope_id: scope,
    };
    (Name { v6: name }, len_of::<sockaddr_in6>())
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "families are small numbers"
)]
const fn family(family: c_int) -> libc::sa_family_t {
    family as libc::sa_family_t
}

#[cfg(test)]
mod tests {
    use super::super::receive::read_name;
    use super::*;

    #[test]
    fn a_socket_name_keeps_the_address() {
        for address in ["203.0.113.7:65535", "[2001:db8::1]:53", "[fe80::1%3]:1"] {
            let address: SocketAddr = address.parse().unwrap();
            let (name, len) = name_of(address, address.is_ipv6());
            // SAFETY: all of `name` that is in use is initialised.
            let back = unsafe { read_name(&name, len) };
            assert_eq!(back, Some(address));
        }
    }

    #[test]
    fn an_ipv4_recipient_is_mapped_on_an_ipv6_socket() {
        let (name, len) = name_of("203.0.113.7:9".parse().unwrap(), true);
        // SAFETY: as above.
        let back = unsafe { read_name(&name, len) };
        assert_eq!(back, Some("[::ffff:203.0.113.7]:9".parse().unwrap()));
    }
}
