//! Receives and sends many datagrams: with one call to the kernel where there is
//! one (`linux`), else one by one (`portable`, which tests on Linux run too).

#[cfg(target_os = "linux")]
mod linux;
#[cfg(any(not(target_os = "linux"), test))]
mod portable;
#[cfg(test)]
mod tests;

use std::io;
use std::net::{SocketAddr, UdpSocket};

use crate::Way;

#[cfg(target_os = "linux")]
pub(crate) use linux::{Offload, receive, receive_one, send, send_one};
#[cfg(not(target_os = "linux"))]
pub(crate) use portable::{Offload, receive, receive_one, send, send_one};

/// One datagram to send, and how. Those of one call leave from one address.
pub(crate) type Outgoing<'d> = (&'d [u8], Way);

/// What any system's sockets can do.
pub(crate) trait OneByOne {
    /// Receives one datagram; without `wait` an error of the kind `WouldBlock`
    /// if there is none.
    fn recv_one(&self, buffer: &mut [u8], wait: bool) -> io::Result<(usize, SocketAddr)>;

    #[cfg_attr(target_os = "linux", cfg_attr(not(test), expect(dead_code)))]
    fn send_one(&self, payload: &[u8], to: SocketAddr) -> io::Result<usize>;
}

impl OneByOne for UdpSocket {
    fn recv_one(&self, buffer: &mut [u8], wait: bool) -> io::Result<(usize, SocketAddr)> {
        if wait {
            self.recv_from(buffer)
        } else {
            recv_at_once(self, buffer)
        }
    }

    fn send_one(&self, payload: &[u8], to: SocketAddr) -> io::Result<usize> {
        self.send_to(payload, to)
    }
}

#[cfg(unix)]
fn recv_at_once(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
    use rustix::io::Errno;
    use rustix::net::{RecvFlags, recvfrom};

    match recvfrom(socket, buffer, RecvFlags::DONTWAIT)? {
        (len, _, Some(peer)) => Ok((len, SocketAddr::try_from(peer)?)),
        (_, _, None) => Err(Errno::INVAL.into()),
    }
}

/// There is no way to ask without changing the socket for all who share it.
#[cfg(not(unix))]
fn recv_at_once(_socket: &UdpSocket, _buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
    Err(io::ErrorKind::WouldBlock.into())
}

#[cfg(feature = "tokio")]
impl OneByOne for tokio::net::UdpSocket {
    fn recv_one(&self, buffer: &mut [u8], _wait: bool) -> io::Result<(usize, SocketAddr)> {
        self.try_recv_from(buffer)
    }

    fn send_one(&self, payload: &[u8], to: SocketAddr) -> io::Result<usize> {
        self.try_send_to(payload, to)
    }
}
