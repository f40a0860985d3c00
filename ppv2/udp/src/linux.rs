//! Linux: recvmmsg, sendmmsg, their control messages, and the socket options that no other
//! crate sets.
//!
//! Facts from socket(7), ip(7), ipv6(7), udp(7), recvmmsg(2), sendmmsg(2).

mod error_queue;
mod filter;
mod name_service;
mod readiness;
mod receive;
mod send;
#[cfg(feature = "sigpipe")]
mod sigpipe;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::OnceLock;

use libc::{c_int, c_long, sockaddr_in, sockaddr_in6, socklen_t};

pub(crate) use error_queue::receive_error;
pub(crate) use filter::attach_filter;
pub use name_service::look_up_without_plugins;
pub use readiness::{READY, Readiness, Waker};
pub(crate) use receive::receive;
pub(crate) use send::send;
#[cfg(feature = "sigpipe")]
pub use sigpipe::restore_sigpipe;

/// Messages of one system call.
const MESSAGES: usize = 64;

/// The name of an IPv4 or IPv6 socket.
#[derive(Clone, Copy)]
#[repr(C)]
union Name {
    v4: sockaddr_in,
    v6: sockaddr_in6,
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

/// Has the kernel keep what becomes of datagrams sent earlier, for
/// [`receive_error`].
pub(crate) fn queue_errors(socket: BorrowedFd<'_>, v6: bool) -> io::Result<()> {
    if v6 {
        set(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVERR, 1)
    } else {
        set(socket, libc::IPPROTO_IP, libc::IP_RECVERR, 1)
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

/// The result of a call by `libc::syscall`. Batches are received and sent by it: libc's own
/// functions are points at which a thread can be cancelled (pthreads(7)), which a program
/// with threads pays for at each call.
fn number(result: c_long) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[expect(clippy::cast_possible_truncation, reason = "structs are small")]
const fn len_of<T>() -> socklen_t {
    size_of::<T>() as socklen_t
}
