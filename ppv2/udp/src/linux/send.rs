//! sendmmsg: what the slots of a batch hold, as few messages as can be, with a
//! header in front of each datagram that is never copied.
//!
//! A burst leaves as one message, a list of header, datagram, header, datagram,
//! …, which the kernel cuts again at the given size (UDP_SEGMENT, udp(7)). It
//! refuses that where a piece exceeds the interface's MTU, or where the device can't
//! compute checksums; then each datagram goes as a message of its own, and
//! longer ones are not tried again on that socket.

use std::io;
use std::mem::{self, MaybeUninit};
use std::ops::Range;

use libc::{iovec, mmsghdr, msghdr, sockaddr_storage};

use super::super::{
    Batch, MAX_BURST, MAX_BURST_BYTES, Outgoing, Part, SendFault, Sent, Socket, datagram,
};
use super::call;
use super::message::{Control, Extras, write_control, write_name};

/// Messages of one call.
const MESSAGES: usize = 64;

/// Pieces that the messages of one call are made of; a burst has at most two
/// for each of its datagrams.
const PIECES: usize = 4 * MAX_BURST;

/// How often to try a message whose failure may be an earlier one's. More than
/// one report can be waiting; someone who forges them must not keep us here.
const TRIES: u32 = 3;

/// What the kernel is pointed at during one call, filled as far as it is used.
struct Scratch {
    names: [sockaddr_storage; MESSAGES],
    controls: [Control; MESSAGES],
    pieces: [iovec; PIECES],
    headers: [mmsghdr; MESSAGES],
    letters: [Letter; MESSAGES],
}

/// What a message carries: some datagrams of a slot, all of one length but for
/// the last.
#[derive(Clone, Copy)]
struct Letter {
    slot: usize,
    /// Number of its first datagram within the slot.
    first: usize,
    count: usize,
    /// Bytes of the first datagram with its header.
    len: usize,
    /// Bytes of all of them with their headers.
    bytes: usize,
}

/// One call of [`Socket::send`].
struct Post<'a, 'h> {
    socket: &'a Socket,
    batch: &'a Batch,
    outgoing: &'a dyn Fn(usize) -> Outgoing<'h>,
    fault: &'a mut dyn FnMut(usize, SendFault),
    sent: Sent,
}

pub(crate) fn send<'h>(
    socket: &Socket,
    batch: &Batch,
    parts: impl Iterator<Item = Part>,
    outgoing: impl Fn(usize) -> Outgoing<'h>,
    mut fault: impl FnMut(usize, SendFault),
) -> Sent {
    let mut post = Post {
        socket,
        batch,
        outgoing: &outgoing,
        fault: &mut fault,
        sent: Sent::default(),
    };
    post.send(parts.map(|part| (part.slot, part.first..part.end)));
    post.sent
}

impl Post<'_, '_> {
    /// Sends the given datagrams of the given slots.
    fn send(&mut self, what: impl Iterator<Item = (usize, Range<usize>)>) {
        let mut scratch = MaybeUninit::<Scratch>::uninit();
        let scratch = scratch.as_mut_ptr();
        let (mut messages, mut pieces) = (0, 0);
        for (slot, mut rest) in what {
            let outgoing = (self.outgoing)(slot);
            while !rest.is_empty() {
                let letter = self.cut(slot, &mut rest, &outgoing);
                let needed = 2 * letter.count;
                if messages == MESSAGES || pieces + needed > PIECES {
                    self.flush(scratch, messages);
                    (messages, pieces) = (0, 0);
                }
                // SAFETY: `messages < MESSAGES` and `pieces + needed <= PIECES`,
                // and `scratch` lives until this function returns.
                unsafe {
                    pieces += self.write(scratch, messages, pieces, letter, &outgoing);
                }
                messages += 1;
            }
        }
        self.flush(scratch, messages);
    }

    /// Takes off the front of `rest` what can go in one message.
    fn cut(&self, slot: usize, rest: &mut Range<usize>, outgoing: &Outgoing<'_>) -> Letter {
        let first = rest.start;
        let header = outgoing.header.len();
        let len = header + datagram(self.batch, slot, first).len();
        let count = if len == 0 || len > self.socket.burst_limit.get() {
            1
        } else {
            rest.len()
                .min(MAX_BURST)
                .min((MAX_BURST_BYTES / len).max(1))
        };
        rest.start = first + count;
        let last = header + datagram(self.batch, slot, rest.start - 1).len();
        Letter {
            slot,
            first,
            count,
            len,
            bytes: len * (count - 1) + last,
        }
    }

    /// Describes `letter` to the kernel as message number `at`, from piece
    /// number `piece` on. Returns the pieces that it took.
    ///
    /// # Safety
    ///
    /// `scratch` is valid for writes, `at < MESSAGES`, and there are two pieces
    /// for each datagram from `piece` on.
    unsafe fn write(
        &self,
        scratch: *mut Scratch,
        at: usize,
        piece: usize,
        letter: Letter,
        outgoing: &Outgoing<'_>,
    ) -> usize {
        let mut used = 0;
        let mut add = |bytes: &[u8]| {
            // SAFETY: the caller vouches for room for all pieces. The kernel
            // only reads what they point at, which `batch` and the header's
            // owner keep in place during the call.
            unsafe {
                (*scratch).pieces[piece + used] = iovec {
                    iov_base: bytes.as_ptr().cast_mut().cast(),
                    iov_len: bytes.len(),
                };
            }
            used += 1;
        };
        for number in letter.first..letter.first + letter.count {
            if !outgoing.header.is_empty() {
                add(outgoing.header);
            }
            add(datagram(self.batch, letter.slot, number));
        }
        let segment = u16::try_from(letter.len).ok();
        let extras = Extras {
            from: outgoing.from.filter(|_| self.socket.wildcard),
            class: outgoing.class,
            segment: segment.filter(|_| letter.count > 1),
        };
        // SAFETY: `at < MESSAGES`, by the caller's promise; every field is
        // written before the kernel reads it.
        unsafe {
            let mut header: msghdr = mem::zeroed();
            if let Some(to) = outgoing.to {
                let name = &raw mut (*scratch).names[at];
                header.msg_name = name.cast();
                header.msg_namelen = write_name(to, name);
            }
            header.msg_iov = &raw mut (*scratch).pieces[piece];
            header.msg_iovlen = used as _;
            if !extras.is_empty() {
                (*scratch).controls[at] = Control::default();
                header.msg_control = (&raw mut (*scratch).controls[at]).cast();
                header.msg_controllen = size_of::<Control>() as _;
                write_control(&mut header, &extras, self.socket.bound.is_ipv6());
            }
            (*scratch).headers[at] = mmsghdr {
                msg_hdr: header,
                msg_len: 0,
            };
            (*scratch).letters[at] = letter;
        }
        used
    }

    /// Hands the first `count` messages to the kernel, until each is sent or
    /// reported. They must have been written.
    fn flush(&mut self, scratch: *mut Scratch, count: usize) {
        let mut next = 0;
        // Error of the message at `next` that may speak of an earlier one, and
        // how often that has been hoped for.
        let mut hoped: Option<(io::Error, u32)> = None;
        while next < count {
            // SAFETY: messages `next..count` and their letters have been written,
            // and what they point at is borrowed by `self` or lives in `scratch`.
            let (letters, result) = unsafe {
                let messages = (&raw mut (*scratch).headers).cast::<mmsghdr>().add(next);
                let result = call::send(self.socket.fd(), messages, count - next);
                let first = (&raw const (*scratch).letters).cast::<Letter>().add(next);
                (std::slice::from_raw_parts(first, count - next), result)
            };
            let letter = letters[0];
            let error = match result {
                Ok(taken) => {
                    if let Some((error, _)) = hoped.take() {
                        (self.fault)(letter.slot, SendFault::Earlier(error));
                    }
                    for letter in &letters[..taken] {
                        self.sent.datagrams += letter.count;
                        self.sent.bytes += letter.bytes;
                    }
                    next += taken;
                    continue;
                }
                Err(error) => error,
            };
            let tries = hoped.as_ref().map_or(0, |(_, tries)| *tries);
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            } else if tries < TRIES && may_be_of_an_earlier_one(&error) {
                hoped = Some((error, tries + 1));
                continue;
            }
            if let Some((earlier, _)) = hoped.take()
                && earlier.raw_os_error() != error.raw_os_error()
            {
                (self.fault)(letter.slot, SendFault::Earlier(earlier));
            }
            next += 1;
            if letter.count > 1 && refuses_bursts(&error) {
                self.send_one_by_one(letter);
            } else {
                let lost = SendFault::Lost {
                    error,
                    datagrams: letter.count,
                    len: letter.len,
                };
                (self.fault)(letter.slot, lost);
            }
        }
    }

    fn send_one_by_one(&mut self, letter: Letter) {
        let limit = self.socket.burst_limit.get();
        self.socket.burst_limit.set(limit.min(letter.len - 1));
        let datagrams = letter.first..letter.first + letter.count;
        self.send(std::iter::once((letter.slot, datagrams)));
    }
}

/// Whether an error may be one that ICMP left on a connected socket: those speak
/// of something sent before, and reading them clears them (ip(7), `IP_RECVERR`).
/// Nearly all can also be this message's own, which trying again tells; want of
/// room is always its own.
fn may_be_of_an_earlier_one(error: &io::Error) -> bool {
    !matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM | libc::EINVAL)
    )
}

/// Errors of a burst that its datagrams may not have one by one: longer than
/// the interface's MTU, no checksums by the device, no such option.
fn refuses_bursts(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EMSGSIZE | libc::EIO | libc::EOPNOTSUPP | libc::ENOPROTOOPT)
    )
}
