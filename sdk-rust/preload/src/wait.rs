//! poll, select and epoll: a socket in blocking mode is reported readable only if a
//! datagram for the program is there.

use libc::c_int;

use crate::socket::Socket;

/// Has edge-triggered epoll instances report again what is still queued: a call has
/// given up after many drops, and the program believes the queue to be empty.
pub(crate) fn rearm(_fd: c_int, _socket: &Socket) {
    todo!()
}
