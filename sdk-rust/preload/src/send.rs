//! From the program to its clients: by the reply path of the latest datagram.
//!
//! A reply path is looked up under the table's lock; then the real sendmsg(2) is called
//! without it, since it may wait. The functions that call it own nothing that must be given
//! back.

use std::mem::{self, MaybeUninit};
use std::net::{IpAddr, SocketAddr};
use std::ptr;
use std::slice;

use libc::{
    AF_INET, AF_UNSPEC, EAGAIN, EDESTADDRREQ, EFAULT, EHOSTUNREACH, EINVAL, EIO, EMSGSIZE, ENOBUFS,
    MSG_DONTWAIT, MSG_MORE, MSG_ZEROCOPY, POLLOUT, c_int, c_uint, c_void, iovec, mmsghdr, msghdr,
    pollfd, size_t, sockaddr, sockaddr_in, sockaddr_in6, socklen_t, ssize_t,
};
use ppv2_sdk::ReplyHeader;

use crate::boundary::{contained, errno, fail, guarded, is_plausible};
use crate::buffers::{self, BATCH, Outgoing, PARTS};
use crate::control::{self, Writer};
use crate::receive::{MAX_PARTS, check_parts};
use crate::socket::{Flag, Socket};
use crate::table::{self, Counter, Path, Table};
use crate::{connect, names, real};

/// The most that a datagram holds. The kernel knows the exact limit.
const LONGEST: usize = 65_535;

/// Room for the control data of a datagram that is sent alone.
const CONTROL: usize = 1024;

/// How a datagram is sent.
#[derive(Clone, Copy, Debug)]
enum Plan {
    /// As the program said.
    Untouched,
    /// As the parcel says.
    Rewritten,
    /// As `Rewritten`, of one part and without control data: sendto(2) costs less.
    Plain,
    /// Cut into segments of this length, each with the parcel's header.
    Segments(usize),
    Refused(c_int),
}

/// What is sent in place of the program's message, on the stack of the call.
#[repr(C, align(8))]
struct Parcel<const N: usize> {
    control: MaybeUninit<[u8; CONTROL]>,
    name: MaybeUninit<sockaddr_in6>,
    parts: [MaybeUninit<iovec>; N],
    message: msghdr,
    header_len: usize,
    /// It, or the datagram that it goes on with, has a header.
    has_header: bool,
}

/// As sendto(2), where the payload alone goes to a client that this thread has heard a moment
/// ago. `None`: it must be sent by [`message`].
///
/// # Safety
///
/// As sendto(2), and `name` is not null.
#[inline]
pub(crate) unsafe fn again(
    fd: c_int,
    socket: &Socket,
    payload: *const c_void,
    len: size_t,
    flags: c_int,
    name: *const sockaddr,
    name_len: socklen_t,
) -> Option<ssize_t> {
    let find = || {
        // A name of another length may be an error.
        let usual = [size_of::<sockaddr_in>(), size_of::<sockaddr_in6>()];
        if !usual.contains(&(name_len as usize))
            || socket.is(Flag::Direct)
            || socket.is(Flag::Begun)
            || socket.peer().is_some()
            || !is_plausible(name)
        {
            return None;
        }
        // SAFETY: as the caller says.
        let client = unsafe { names::read(name, name_len) }?;
        if !names::fits(client, socket.family()) {
            return None;
        }
        let (to, local) = table::path_again(socket.endpoint(), client)?;
        Some((names::written(to, socket.family())?, local))
    };
    let ((mut to, to_len), local) = contained(None, find)?;
    let to = (&raw mut to).cast();
    let sent = match local {
        // SAFETY: the caller vouches for the payload, and the address can be read.
        None => unsafe { real::sendto(fd, payload, len, flags, to, to_len) },
        Some(local) => {
            let mut control = MaybeUninit::<[u64; 8]>::uninit();
            // SAFETY: the memory is there for as long as this function runs.
            let mut writer =
                unsafe { Writer::new(control.as_mut_ptr().cast(), size_of_val(&control)) };
            // A path with a scope is not the usual one, so that there is no interface to name.
            writer.put_source(local, 0);
            let mut part = iovec {
                iov_base: payload.cast_mut(),
                iov_len: len.min(isize::MAX as usize),
            };
            // SAFETY: zeroes are a valid value.
            let mut message: msghdr = unsafe { mem::zeroed() };
            message.msg_name = to.cast();
            message.msg_namelen = to_len;
            message.msg_iov = &raw mut part;
            message.msg_iovlen = 1;
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = writer.used() as _;
            // SAFETY: as above, and the message is whole.
            unsafe { real::sendmsg(fd, &raw const message, flags) }
        }
    };
    if sent >= 0 {
        table::count(Counter::RepliesSent, 1);
    }
    Some(sent)
}

/// Sends a datagram as sendmsg(2) does.
///
/// # Safety
///
/// `from` is null or points to what sendmsg(2) takes.
pub(crate) unsafe fn message(
    fd: c_int,
    socket: &Socket,
    from: *const msghdr,
    flags: c_int,
) -> ssize_t {
    if socket.is(Flag::Direct) || !is_plausible(from) {
        // SAFETY: as the caller says.
        return unsafe { real::sendmsg(fd, from, flags) };
    }
    // SAFETY: as the caller says.
    let parts = unsafe { (*from).msg_iovlen as usize };
    if parts <= PARTS {
        // SAFETY: as the caller says.
        unsafe { send::<{ PARTS + 1 }>(fd, socket, from, flags) }
    } else {
        // SAFETY: as the caller says.
        unsafe { send_many_parts(fd, socket, from, flags) }
    }
}

/// Needs 16 KiB of the stack, as few programs do.
#[cold]
#[inline(never)]
unsafe fn send_many_parts(
    fd: c_int,
    socket: &Socket,
    from: *const msghdr,
    flags: c_int,
) -> ssize_t {
    // SAFETY: as the caller says.
    unsafe { send::<MAX_PARTS>(fd, socket, from, flags) }
}

/// # Safety
///
/// `from` points to what sendmsg(2) takes.
#[inline(always)]
unsafe fn send<const N: usize>(
    fd: c_int,
    socket: &Socket,
    from: *const msghdr,
    flags: c_int,
) -> ssize_t {
    let mut parcel = Parcel::<N>::new();
    let mut found = MaybeUninit::uninit();
    // SAFETY: as the caller says.
    let plan = || unsafe { parcel.plan(fd, socket, &*from, flags, &mut found) };
    match contained(Plan::Refused(EIO), plan) {
        // SAFETY: as the caller says.
        Plan::Untouched => unsafe { real::sendmsg(fd, from, flags) },
        plan @ (Plan::Rewritten | Plan::Plain) => {
            // SAFETY: `plan` has filled the message in.
            let sent = unsafe {
                let message = &parcel.message;
                if matches!(plan, Plan::Plain) {
                    let (part, name) = (*message.msg_iov, message.msg_name.cast());
                    let (at, len) = (part.iov_base, part.iov_len);
                    real::sendto(fd, at, len, flags, name, message.msg_namelen)
                } else {
                    real::sendmsg(fd, message, flags)
                }
            };
            if parcel.has_header {
                // If it fails, the kernel forgets what was begun.
                socket.set(Flag::Begun, sent >= 0 && goes_on(socket, flags));
            }
            if sent < 0 {
                return sent;
            }
            table::count(Counter::RepliesSent, 1);
            (sent - parcel.header_len as ssize_t).max(0)
        }
        // SAFETY: as the caller says.
        Plan::Segments(len) => unsafe { parcel.send_segments(fd, &*from, flags, len) },
        Plan::Refused(errno) => fail(errno),
    }
}

impl<const N: usize> Parcel<N> {
    #[inline(always)]
    fn new() -> Self {
        Self {
            control: MaybeUninit::uninit(),
            name: MaybeUninit::uninit(),
            parts: [const { MaybeUninit::uninit() }; N],
            // SAFETY: zeroes are a valid value.
            message: unsafe { mem::zeroed() },
            header_len: 0,
            has_header: false,
        }
    }

    /// Looks up the path and fills the message in.
    ///
    /// # Safety
    ///
    /// `from` is a message as sendmsg(2) takes it.
    ///
    /// The message refers to what is written to `found`.
    unsafe fn plan(
        &mut self,
        fd: c_int,
        socket: &Socket,
        from: &msghdr,
        flags: c_int,
        found: &mut MaybeUninit<Proxied>,
    ) -> Plan {
        let Some(mut table) = table::lock() else {
            return Plan::Refused(ENOBUFS);
        };
        // SAFETY: as the caller says.
        let path = match unsafe { path(&mut table, socket, from, found) } {
            Ok(Some(path)) => path,
            Ok(None) => return Plan::Untouched,
            Err(errno) => {
                if errno == EHOSTUNREACH {
                    table::count(Counter::RepliesWithoutPath, 1);
                }
                return Plan::Refused(errno);
            }
        };
        drop(table);
        connect::follow(fd, socket, path.client, path.to);
        // SAFETY: as the caller says.
        unsafe { self.fill(socket, from, flags, path) }
    }

    /// # Safety
    ///
    /// As `plan`.
    unsafe fn fill(
        &mut self,
        socket: &Socket,
        from: &msghdr,
        flags: c_int,
        path: &Proxied,
    ) -> Plan {
        // SAFETY: as the caller says.
        if let Err(errno) = unsafe { check_parts(from.msg_iov, from.msg_iovlen as usize, EMSGSIZE) }
        {
            return Plan::Refused(errno);
        }
        // SAFETY: as the caller says.
        let program = unsafe { parts_of(from) };
        self.has_header = !path.header.is_empty();
        let header_len = if socket.is(Flag::Begun) {
            0
        } else {
            path.header.len()
        };
        if header_len > 0 && (flags & MSG_ZEROCOPY != 0 || program.len() >= N) {
            // The header doesn't live as long as the kernel would need it; programs send
            // again without the flag after this error.
            return Plan::Refused(if flags & MSG_ZEROCOPY != 0 {
                ENOBUFS
            } else {
                EMSGSIZE
            });
        }
        let Some((name, name_len)) = names::written(path.to, socket.family()) else {
            return Plan::Refused(EHOSTUNREACH);
        };
        // Of a socket that is connected, too: another process that shares it may have
        // connected it to another port of the proxy; and what was put together for one client
        // (UDP_CORK, MSG_MORE) has Linux send to it what has no address later on.
        self.message.msg_name = ptr::from_mut(self.name.write(name)).cast();
        self.message.msg_namelen = name_len;
        // SAFETY: as the caller says; the control data has room for as much.
        let writer = unsafe { Writer::new(self.control.as_mut_ptr().cast(), CONTROL) };
        // SAFETY: as the caller says.
        let given = unsafe { control_of(from) };
        let write = |given| write_control(writer, given, socket, path);
        let written = match given.and_then(write) {
            Ok(written) => written,
            Err(errno) => return Plan::Refused(errno),
        };
        if written.len > 0 {
            self.message.msg_control = self.control.as_mut_ptr().cast();
            self.message.msg_controllen = written.len as _;
        }
        if header_len == 0 {
            self.message.msg_iov = from.msg_iov;
            self.message.msg_iovlen = from.msg_iovlen;
            let is_plain = written.len == 0 && from.msg_iovlen == 1;
            return if is_plain {
                Plan::Plain
            } else {
                Plan::Rewritten
            };
        }
        self.header_len = header_len;
        self.parts[0].write(iovec {
            iov_base: path.header.as_ptr().cast_mut().cast(),
            iov_len: header_len,
        });
        self.message.msg_iov = (&raw mut self.parts).cast();
        let payload_len = payload_len(program);
        if payload_len > LONGEST {
            return Plan::Refused(EMSGSIZE);
        }
        if let Some(segment) = written.segment {
            // What the kernel would put together, it can't be asked to cut: each segment needs
            // a header. Programs take this error for that of a device that can't cut.
            if goes_on(socket, flags) {
                return Plan::Refused(EIO);
            }
            if payload_len > segment {
                return Plan::Segments(segment);
            }
        }
        for (to, part) in self.parts[1..].iter_mut().zip(program) {
            to.write(*part);
        }
        self.message.msg_iovlen = program.len() as _;
        self.message.msg_iovlen += 1;
        Plan::Rewritten
    }

    /// Sends each segment with a header of its own. Returns how much of the payload went
    /// out.
    ///
    /// # Safety
    ///
    /// `plan` has filled this in for the same message.
    unsafe fn send_segments(
        &mut self,
        fd: c_int,
        from: &msghdr,
        flags: c_int,
        segment: usize,
    ) -> ssize_t {
        // SAFETY: as the caller says.
        let program = unsafe { parts_of(from) };
        let whole = payload_len(program);
        let mut sent = 0;
        while sent < whole {
            let len = segment.min(whole - sent);
            let count = cut(program, sent, len, &mut self.parts[1..]);
            self.message.msg_iovlen = count as _;
            self.message.msg_iovlen += 1;
            // SAFETY: the message is filled in.
            if unsafe { real::sendmsg(fd, &raw const self.message, flags) } < 0 {
                return if sent > 0 { sent as ssize_t } else { -1 };
            }
            table::count(Counter::RepliesSent, 1);
            sent += len;
        }
        sent as ssize_t
    }
}

/// Writes the parts that hold `len` bytes from `skip` on. Returns how many they are.
fn cut(program: &[iovec], mut skip: usize, mut len: usize, to: &mut [MaybeUninit<iovec>]) -> usize {
    let mut count = 0;
    for part in program {
        let skipped = skip.min(part.iov_len);
        skip -= skipped;
        let taken = (part.iov_len - skipped).min(len);
        if taken > 0 {
            to[count].write(iovec {
                iov_base: part.iov_base.wrapping_byte_add(skipped),
                iov_len: taken,
            });
            count += 1;
            len -= taken;
        }
    }
    count
}

/// A path by which the datagram is rewritten.
#[derive(Clone, Copy, Debug)]
struct Proxied {
    client: SocketAddr,
    to: SocketAddr,
    local: Option<IpAddr>,
    header: ReplyHeader,
}

/// The path for a message, written to `found`; `Ok(None)` if it passes untouched.
///
/// # Safety
///
/// `from` is a message as sendmsg(2) takes it.
#[inline]
unsafe fn path<'f>(
    table: &mut Table,
    socket: &Socket,
    from: &msghdr,
    found: &'f mut MaybeUninit<Proxied>,
) -> Result<Option<&'f Proxied>, c_int> {
    // SAFETY: as the caller says.
    let to = unsafe { destination(socket, from.msg_name.cast(), from.msg_namelen) }?;
    // The kernel knows what is wrong with an address that is none.
    let Some(client) = to.filter(|to| is_one(to) && names::fits(*to, socket.family())) else {
        return Ok(None);
    };
    match table.path(socket.endpoint(), client) {
        Some(Path::Proxied { to, local, header }) => Ok(Some(found.write(Proxied {
            client,
            to,
            local,
            header,
        }))),
        // The kernel would send it to the proxy's port that once spoke for the client, and may
        // speak for another one now.
        // SAFETY: as the caller says.
        Some(Path::Direct) if !unsafe { is_named(socket, from) } => Err(EHOSTUNREACH),
        Some(Path::Direct) => Ok(None),
        None => Err(EHOSTUNREACH),
    }
}

/// Whether an address can be that of one client. The program reaches groups itself.
#[inline]
fn is_one(to: &SocketAddr) -> bool {
    let is_group = match to.ip() {
        IpAddr::V4(ip) => ip.is_multicast() || ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_multicast(),
    };
    to.port() != 0 && !is_group
}

/// Whether the kernel takes the address of the message, not that which the socket is
/// connected to.
///
/// # Safety
///
/// `from` is a message as sendmsg(2) takes it.
unsafe fn is_named(socket: &Socket, from: &msghdr) -> bool {
    let name: *const sockaddr = from.msg_name.cast();
    let len = from.msg_namelen;
    // SAFETY: as the caller says.
    !name.is_null()
        && len != 0
        && (socket.family() == AF_INET || unsafe { names::family(name, len) } != Some(AF_UNSPEC))
}

/// Where the kernel would send to, if the socket were not connected for the sake of a client.
///
/// # Safety
///
/// `name` is null, or `len` bytes can be read there, or nothing if `len` is negative.
#[inline]
unsafe fn destination(
    socket: &Socket,
    name: *const sockaddr,
    len: socklen_t,
) -> Result<Option<SocketAddr>, c_int> {
    if name.is_null() || len == 0 {
        return if socket.is(Flag::KernelOnly) {
            Err(EDESTADDRREQ)
        } else {
            Ok(socket.peer())
        };
    }
    if c_int::try_from(len).is_err() {
        return Ok(None);
    }
    // SAFETY: as the caller says.
    Ok(
        match (unsafe { names::family(name, len) }, socket.family()) {
            // Linux takes it for an IPv4 address on an IPv4 socket, and for none on others.
            // SAFETY: as the caller says.
            (Some(AF_UNSPEC), AF_INET) => unsafe { names::read_ipv4(name, len) },
            (Some(AF_UNSPEC), _) => socket.peer(),
            // SAFETY: as the caller says.
            _ => unsafe { names::read(name, len) },
        },
    )
}

/// What was written of control data.
#[derive(Clone, Copy, Debug)]
struct Written {
    len: usize,
    /// The length of segments, if there is a header and the kernel may not cut.
    segment: Option<usize>,
}

/// Writes the program's control data, but for packet info, of which that of the path takes
/// the place.
fn write_control(
    mut writer: Writer,
    given: &[u8],
    socket: &Socket,
    path: &Proxied,
) -> Result<Written, c_int> {
    let has_header = !path.header.is_empty();
    let mut segment = socket.segment();
    if !given.is_empty() {
        if !control::messages(given).are_sound() {
            return Err(EINVAL);
        }
        for message in control::messages(given) {
            if message.is_pktinfo() {
                if !message.is_whole_pktinfo() {
                    return Err(EINVAL);
                }
                continue;
            }
            if let Some(len) = message.segment() {
                segment = Some(len);
                if has_header {
                    continue;
                }
            }
            writer.put(message);
        }
    }
    if let Some(local) = path.local {
        let interface = match path.to {
            SocketAddr::V4(_) => 0,
            SocketAddr::V6(v6) => v6.scope_id(),
        };
        writer.put_source(local, interface);
    }
    if has_header && socket.segment().is_some() {
        writer.put_segment(0);
    }
    if writer.is_truncated() {
        return Err(ENOBUFS);
    }
    Ok(Written {
        len: writer.used(),
        segment: segment.map(usize::from).filter(|len| *len > 0),
    })
}

/// # Safety
///
/// The message is one as sendmsg(2) takes it, and `check_parts` found no fault.
unsafe fn parts_of<'a>(message: &msghdr) -> &'a [iovec] {
    if message.msg_iovlen == 0 {
        return &[];
    }
    // SAFETY: as the caller says.
    unsafe { slice::from_raw_parts(message.msg_iov, message.msg_iovlen as usize) }
}

/// Whether the kernel waits for more of the datagram.
#[inline]
fn goes_on(socket: &Socket, flags: c_int) -> bool {
    flags & MSG_MORE != 0 || socket.is(Flag::Cork)
}

fn payload_len(parts: &[iovec]) -> usize {
    parts
        .iter()
        .fold(0, |len, part| len.saturating_add(part.iov_len))
}

/// # Safety
///
/// The message is one as sendmsg(2) takes it.
///
/// # Errors
///
/// `EFAULT` if the control data is not there.
unsafe fn control_of<'a>(message: &msghdr) -> Result<&'a [u8], c_int> {
    if message.msg_controllen == 0 {
        return Ok(&[]);
    }
    if !is_plausible(message.msg_control) {
        return Err(EFAULT);
    }
    // SAFETY: as the caller says.
    Ok(unsafe {
        slice::from_raw_parts(message.msg_control.cast(), message.msg_controllen as usize)
    })
}

/// Sends datagrams as sendmmsg(2) does.
///
/// # Safety
///
/// `from` is null or points to `count` messages, as for sendmmsg(2).
pub(crate) unsafe fn messages(
    fd: c_int,
    socket: &Socket,
    from: *mut mmsghdr,
    count: c_uint,
    flags: c_int,
) -> c_int {
    let count = (count as usize).min(MAX_PARTS);
    if socket.is(Flag::Direct) || count == 0 || !is_plausible(from) {
        // SAFETY: as the caller says.
        return unsafe { real::sendmmsg(fd, from, count as c_uint, flags) };
    }
    let mut done = 0;
    while done < count {
        // SAFETY: `count - done` messages of the caller's begin there.
        let (at, left) = (unsafe { from.add(done) }, count - done);
        if left > 1 {
            // SAFETY: as above.
            let send = || unsafe { batch(fd, socket, at, left, flags) };
            match guarded(Batch::Failed(EIO), send) {
                Batch::Sent(sent) => {
                    done += sent;
                    continue;
                }
                Batch::Stopped(sent) => {
                    done += sent;
                    // The kernel doesn't say why. A socket that has room didn't have to wait.
                    if flags & MSG_DONTWAIT != 0 || has_room(fd) {
                        return done as c_int;
                    }
                    continue;
                }
                Batch::Failed(_) if done > 0 => return done as c_int,
                Batch::Failed(errno) => return fail(errno),
                Batch::Alone => {}
            }
        }
        // What can't go with others, what must wait, and what fails.
        // SAFETY: as above.
        let sent = unsafe { message(fd, socket, &raw const (*at).msg_hdr, flags) };
        let Ok(sent) = c_uint::try_from(sent) else {
            return if done > 0 { done as c_int } else { -1 };
        };
        // SAFETY: as above.
        unsafe { (*at).msg_len = sent };
        done += 1;
    }
    done as c_int
}

/// What became of messages that can be sent together.
#[derive(Clone, Copy, Debug)]
enum Batch {
    /// So many were, all that could be.
    Sent(usize),
    /// So many were; the next had to wait, or failed.
    Stopped(usize),
    /// The first failed, and the kernel has told why: it may not tell again.
    Failed(c_int),
    /// The first must be sent alone, or wait.
    Alone,
}

fn has_room(fd: c_int) -> bool {
    let mut polled = pollfd {
        fd,
        events: POLLOUT,
        revents: 0,
    };
    // SAFETY: it can be read and written.
    unsafe { real::poll(&raw mut polled, 1, 0) > 0 }
}

/// Sends what can be sent together and without waiting, from the first message on.
///
/// # Safety
///
/// `from` points to `count` messages.
unsafe fn batch(
    fd: c_int,
    socket: &Socket,
    from: *mut mmsghdr,
    count: usize,
    flags: c_int,
) -> Batch {
    buffers::take::<Outgoing, _>(|outgoing| {
        let Some(mut table) = table::lock() else {
            return Batch::Alone;
        };
        let mut found = MaybeUninit::uninit();
        let mut ready = 0;
        let mut rewritten = 0;
        for at in 0..count.min(BATCH) {
            // SAFETY: as the caller says.
            let program = unsafe { &(*from.add(at)).msg_hdr };
            // SAFETY: as the caller says.
            let path = match unsafe { path(&mut table, socket, program, &mut found) } {
                Ok(Some(path)) => path,
                Ok(None) => {
                    outgoing.messages[at].msg_hdr = *program;
                    outgoing.header_lens[at] = 0;
                    ready += 1;
                    continue;
                }
                Err(_) => break,
            };
            if connect::must_follow(socket, path.client, path.to) {
                break;
            }
            // SAFETY: as the caller says.
            if !unsafe { fill(outgoing, at, socket, program, path, flags) } {
                break;
            }
            rewritten |= 1_u64 << at;
            ready += 1;
        }
        drop(table);
        if ready == 0 {
            return Batch::Alone;
        }
        // SAFETY: that many messages have been filled in.
        let sent = unsafe {
            let messages = (&raw mut outgoing.messages).cast();
            real::sendmmsg(fd, messages, ready as c_uint, flags | MSG_DONTWAIT)
        };
        let Ok(sent) = usize::try_from(sent) else {
            return match errno() {
                EAGAIN => Batch::Alone,
                errno => Batch::Failed(errno),
            };
        };
        for at in 0..sent {
            let len = outgoing.messages[at].msg_len - outgoing.header_lens[at];
            // SAFETY: as the caller says.
            unsafe { (*from.add(at)).msg_len = len };
        }
        let first = if sent == BATCH {
            u64::MAX
        } else {
            (1 << sent) - 1
        };
        let replies = (rewritten & first).count_ones();
        table::count(Counter::RepliesSent, replies.into());
        if sent == ready {
            Batch::Sent(sent)
        } else {
            Batch::Stopped(sent)
        }
    })
    .unwrap_or(Batch::Alone)
}

/// Fills in a message of a batch. `false` if it must be sent alone.
///
/// # Safety
///
/// `from` is a message as sendmsg(2) takes it.
unsafe fn fill(
    outgoing: &mut Outgoing,
    at: usize,
    socket: &Socket,
    from: &msghdr,
    path: &Proxied,
    flags: c_int,
) -> bool {
    let header_len = path.header.len();
    // SAFETY: as the caller says.
    let sound = unsafe { check_parts(from.msg_iov, from.msg_iovlen as usize, EMSGSIZE) }.is_ok();
    if !sound
        || from.msg_iovlen as usize > PARTS
        || header_len > 0 && (flags & MSG_ZEROCOPY != 0 || goes_on(socket, flags))
        || socket.is(Flag::Begun)
        || header_len > size_of_val(&outgoing.headers[at])
    {
        return false;
    }
    let Some((name, name_len)) = names::written(path.to, socket.family()) else {
        return false;
    };
    let room = &mut outgoing.control[at].0;
    // SAFETY: it is written before anything else refers to it.
    let writer = unsafe { Writer::new(room.as_mut_ptr(), room.len()) };
    // SAFETY: as the caller says.
    let given = unsafe { control_of(from) };
    let write = |given| write_control(writer, given, socket, path);
    let Ok(written) = given.and_then(write) else {
        return false;
    };
    let message = &mut outgoing.messages[at].msg_hdr;
    let to = &raw mut outgoing.names[at];
    // SAFETY: it is memory of this thread's.
    unsafe { to.write(name) };
    message.msg_name = to.cast();
    message.msg_namelen = name_len;
    message.msg_control = ptr::null_mut();
    message.msg_controllen = written.len as _;
    if written.len > 0 {
        message.msg_control = (&raw mut outgoing.control[at]).cast();
    }
    message.msg_flags = 0;
    message.msg_iov = from.msg_iov;
    message.msg_iovlen = from.msg_iovlen;
    outgoing.header_lens[at] = header_len as u32;
    if header_len > 0 {
        // SAFETY: as the caller says.
        let program = unsafe { parts_of(from) };
        let len = payload_len(program);
        if len > LONGEST {
            return false;
        }
        if written.segment.is_some_and(|segment| len > segment) {
            return false;
        }
        outgoing.headers[at][..header_len].copy_from_slice(&path.header);
        let parts = &mut outgoing.parts[at];
        parts[0] = iovec {
            iov_base: (&raw mut outgoing.headers[at]).cast(),
            iov_len: header_len,
        };
        parts[1..=program.len()].copy_from_slice(program);
        message.msg_iov = parts.as_mut_ptr();
        message.msg_iovlen += 1;
    }
    true
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn segments_are_cut_like_from_one_buffer(
            parts in vec(vec(any::<u8>(), 0..50), 0..12),
            segment in 1_usize..70,
        ) {
            let program: Vec<iovec> = parts
                .iter()
                .map(|part| iovec {
                    iov_base: part.as_ptr().cast_mut().cast(),
                    iov_len: part.len(),
                })
                .collect();
            let whole = parts.concat();
            for (number, expected) in whole.chunks(segment).enumerate() {
                let mut room = [const { MaybeUninit::uninit() }; 12];
                let count = cut(&program, number * segment, expected.len(), &mut room);
                let mut found: Vec<u8> = Vec::new();
                for part in &room[..count] {
                    // SAFETY: `cut` has written so many, within the parts.
                    found.extend_from_slice(unsafe {
                        let part = part.assume_init();
                        slice::from_raw_parts(part.iov_base.cast(), part.iov_len)
                    });
                }
                prop_assert_eq!(found, expected);
            }
        }
    }
}
