//! From the kernel to the program: a datagram is received whole into the thread's own
//! buffer, judged, and its payload copied to where the program wants it.

use libc::c_int;

use crate::socket::Socket;

/// Discards what must be dropped at the head of the socket's queue, without waiting.
/// Whether a datagram for the program is there then.
pub(crate) fn discard_dropped(_fd: c_int, _socket: &Socket) -> bool {
    todo!()
}

/// The payload's length of the next datagram, as ioctl(FIONREAD) tells it: 0 if there is
/// none.
pub(crate) fn next_len(_fd: c_int, _socket: &Socket) -> usize {
    todo!()
}
