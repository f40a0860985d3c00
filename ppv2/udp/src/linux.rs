//! The Linux side of [`net`](super): recvmmsg, sendmmsg and socket options.
//!
//! Facts from socket(7), ip(7), ipv6(7), udp(7), recvmmsg(2), sendmmsg(2).
#![expect(
    unsafe_code,
    reason = "the kernel's batch calls and control messages have no safe interface"
)]

mod call;
mod message;
mod readiness;
mod send;

use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::AsRawFd;

use libc::{c_int, c_void, iovec, mmsghdr, msghdr, sockaddr_storage};

use super::{BATCH, Batch, CAPACITY, STRIDE, Socket};
use message::{Control, len_of, read_received};

pub use readiness::{Readiness, Waker};
pub(super) use send::send;

/// What the kernel is pointed at during one receive call. Nothing in it
/// outlives the call, so it stays on the stack and is filled only as far as it
/// is used.
struct Scratch {
    names: [sockaddr_storage; BATCH],
    controls: [Control; BATCH],
    vectors: [iovec; BATCH],
    headers: [mmsghdr; BATCH],
}

pub(super) fn receive(
    socket: &Socket,
    batch: &mut Batch,
    first: usize,
    end: usize,
) -> io::Result<usize> {
    let end = end.min(BATCH);
    let count = end.saturating_sub(first);
    let bytes = batch.bytes.as_mut_ptr();
    let mut scratch = MaybeUninit::<Scratch>::uninit();
    let scratch = scratch.as_mut_ptr();
    for i in 0..count {
        let offset = (first + i) * STRIDE;
        // SAFETY: `i < BATCH` indexes the arrays of `scratch`, which lives until
        // the function returns; fields are written before anything reads them.
        // `offset + CAPACITY <= BATCH * STRIDE`, the length of `batch.bytes`,
        // since `first + i < BATCH`.
        unsafe {
            (*scratch).vectors[i] = iovec {
                iov_base: bytes.add(offset).cast(),
                iov_len: CAPACITY,
            };
            let mut header: msghdr = mem::zeroed();
            header.msg_name = (&raw mut (*scratch).names[i]).cast();
            header.msg_namelen = len_of::<sockaddr_storage>();
            header.msg_iov = &raw mut (*scratch).vectors[i];
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut (*scratch).controls[i]).cast();
            header.msg_controllen = size_of::<Control>() as _;
            (*scratch).headers[i] = mmsghdr {
                msg_hdr: header,
                msg_len: 0,
            };
        }
    }
    let received = loop {
        // SAFETY: the first `count` headers are initialised, and point at
        // names, vectors, control buffers and `batch.bytes`, all of which stay
        // in place and untouched by others during the call.
        let result =
            unsafe { call::receive(socket.fd(), (&raw mut (*scratch).headers).cast(), count) };
        match result {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => break result?,
        }
    };
    for i in 0..received {
        // SAFETY: the kernel has filled the first `received` headers and what
        // they point at.
        let read = unsafe { read_received(socket, &(*scratch).headers[i]) };
        batch.received[first + i] = Some(read);
    }
    Ok(received)
}

/// Asks with every datagram for the number that the socket has lost.
pub(super) fn report_overflows(socket: &socket2::Socket) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1)
}

/// Asks for bursts in one piece, with a control message that tells the size. There
/// is no way back: the kernel cuts a burst when it comes, by the option of then, and
/// tells the size when it is received, by that of now.
pub(super) fn receive_bursts(socket: &socket2::Socket) -> io::Result<()> {
    set(socket, libc::SOL_UDP, libc::UDP_GRO, 1)
}

/// Whether the kernel knows the option by which bursts are sent. Setting it to 0
/// changes nothing.
pub(super) fn can_send_bursts(socket: &socket2::Socket) -> io::Result<()> {
    set(socket, libc::SOL_UDP, libc::UDP_SEGMENT, 0)
}

/// Sends without UDP checksums, with which the kernel takes no bursts.
#[cfg(test)]
pub(super) fn switch_checksums_off(socket: &socket2::Socket) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_NO_CHECK, 1)
}

/// Asks for the local address of every received datagram.
pub(super) fn report_local_address(socket: &socket2::Socket, v6: bool) -> io::Result<()> {
    if v6 {
        set(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)
    } else {
        set(socket, libc::IPPROTO_IP, libc::IP_PKTINFO, 1)
    }
}

fn set(socket: &socket2::Socket, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
    // SAFETY: the option value is an int that outlives the call.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast::<c_void>(),
            len_of::<c_int>(),
        )
    };
    if status == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
