//! Linux: recvmmsg, sendmmsg, their control messages, and the socket options that no other
//! crate sets.
//!
//! Facts from socket(7), ip(7), ipv6(7), udp(7), recvmmsg(2), sendmmsg(2).

mod call;
mod message;
mod readiness;
mod send;

use std::io;
use std::mem::{self, MaybeUninit};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::OnceLock;

use libc::{c_int, iovec, mmsghdr, msghdr};

use crate::Received;
use message::{ControlIn, Name, len_of, read_received};

pub use readiness::{READY, Readiness, Waker};
pub(crate) use send::send;

/// Messages of one system call.
const MESSAGES: usize = 64;

/// What the kernel is pointed at during one receive call. Nothing in it outlives the call,
/// so it stays on the stack and is filled only as far as it is used.
struct Scratch<const N: usize> {
    names: [Name; N],
    controls: [ControlIn; N],
    vectors: [iovec; N],
    headers: [mmsghdr; N],
}

/// Fills `buffers` from the first on, and notes in `received` what is in each.
pub(crate) fn receive<'b>(
    socket: BorrowedFd<'_>,
    bound: SocketAddr,
    mut buffers: impl Iterator<Item = &'b mut [u8]>,
    received: &mut [Option<Received>],
    wait: bool,
) -> io::Result<usize> {
    if received.len() == 1 {
        return receive_once::<1>(socket, bound, &mut buffers, received, wait);
    }
    let mut filled = 0;
    for received in received.chunks_mut(MESSAGES) {
        let wait = wait && filled == 0;
        match receive_once::<MESSAGES>(socket, bound, &mut buffers, received, wait) {
            Ok(count) => filled += count,
            Err(error) if filled == 0 => return Err(error),
            // It is reported again, or is about an earlier datagram: what was received
            // matters more.
            Err(_) => break,
        }
        if filled % MESSAGES != 0 {
            break;
        }
    }
    Ok(filled)
}

/// As `receive`, for at most `N` of `received`.
fn receive_once<'b, const N: usize>(
    socket: BorrowedFd<'_>,
    bound: SocketAddr,
    buffers: &mut impl Iterator<Item = &'b mut [u8]>,
    received: &mut [Option<Received>],
    wait: bool,
) -> io::Result<usize> {
    let mut scratch = MaybeUninit::<Scratch<N>>::uninit();
    let scratch = scratch.as_mut_ptr();
    let mut count = 0;
    for (i, buffer) in buffers.take(received.len().min(N)).enumerate() {
        // SAFETY: `i < N` indexes the arrays of `scratch`, which lives until the
        // function returns; fields are written before anything reads them.
        unsafe {
            (*scratch).vectors[i] = iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: buffer.len(),
            };
            let mut header: msghdr = mem::zeroed();
            header.msg_name = (&raw mut (*scratch).names[i]).cast();
            header.msg_namelen = len_of::<Name>();
            header.msg_iov = &raw mut (*scratch).vectors[i];
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut (*scratch).controls[i]).cast();
            header.msg_controllen = size_of::<ControlIn>() as _;
            (*scratch).headers[i] = mmsghdr {
                msg_hdr: header,
                msg_len: 0,
            };
        }
        count = i + 1;
    }
    // SAFETY: the first `count` headers are initialised, and point at names, vectors,
    // control buffers in `scratch` and at the buffers, which are borrowed for `'b`; all of
    // them stay in place and untouched by others during the call.
    let filled =
        unsafe { call::receive(socket, (&raw mut (*scratch).headers).cast(), count, wait)? };
    for (i, received) in received.iter_mut().enumerate().take(filled) {
        // SAFETY: the kernel has filled the first `filled` headers and what they point at.
        *received = Some(unsafe { read_received(bound, &(*scratch).headers[i]) });
    }
    Ok(filled)
}

/// Has each datagram report the number that the socket has lost.
pub(crate) fn report_overflows(socket: BorrowedFd<'_>) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1)
}

/// Has each datagram report the address that it was sent to, and the interface that it
/// arrived on.
pub(crate) fn report_packet_info(socket: BorrowedFd<'_>, v6: bool) -> io::Result<()> {
    // On a socket for both families, what arrives by IPv4 has both forms then.
    let v4 = set(socket, libc::IPPROTO_IP, libc::IP_PKTINFO, 1);
    if v6 {
        set(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)
    } else {
        v4
    }
}

/// Whether the kernel joins what arrives at the socket.
pub(crate) fn has_gro(socket: BorrowedFd<'_>) -> bool {
    let (mut value, mut len): (c_int, _) = (0, len_of::<c_int>());
    // SAFETY: the option value is an int, and it and its length outlive the call.
    let status = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_GRO,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    status == 0 && value != 0
}

/// Has the kernel join what arrives; `false` if it can't.
pub(crate) fn enable_gro(socket: BorrowedFd<'_>) -> io::Result<bool> {
    match set(socket, libc::SOL_UDP, libc::UDP_GRO, 1) {
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(false),
        result => result.map(|()| true),
    }
}

/// Bytes of the longest datagram in a burst: any, or 0 where the kernel knows no bursts.
/// One before 4.18 would send a burst as one datagram.
pub(crate) fn longest_in_burst() -> usize {
    static LONGEST: OnceLock<usize> = OnceLock::new();
    *LONGEST.get_or_init(|| match can_send_bursts() {
        Ok(()) => usize::MAX,
        Err(_) => 0,
    })
}

/// Whether the kernel knows the option by which bursts are sent.
pub(crate) fn can_send_bursts() -> io::Result<()> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)?;
    set(socket.as_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, 0)
}

/// Sends without UDP checksums, with which the kernel takes no bursts.
#[cfg(test)]
pub(crate) fn switch_checksums_off(socket: BorrowedFd<'_>) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_NO_CHECK, 1)
}

fn set(socket: BorrowedFd<'_>, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
    // SAFETY: the option value is an int that outlives the call.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            len_of::<c_int>(),
        )
    };
    if status == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
