//! One datagram a system call, by calls that every system has.

use std::io;
use std::net::SocketAddr;
#[cfg(any(not(target_os = "linux"), test))]
use std::ops::ControlFlow;

use rustix::fd::BorrowedFd;
use rustix::net::{RecvFlags, SendFlags, recvfrom, sendto};

use crate::Received;
#[cfg(any(not(target_os = "linux"), test))]
use crate::{SendFault, Sent, SocketState, Transmit};

/// The address that a datagram was sent to is not reported.
#[cfg(not(target_os = "linux"))]
pub(crate) fn report_packet_info(_socket: BorrowedFd<'_>, _v6: bool) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn has_gro(_socket: BorrowedFd<'_>) -> bool {
    false
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn enable_gro(_socket: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(false)
}

#[cfg(any(not(target_os = "linux"), test))]
pub(crate) fn receive<'b>(
    socket: BorrowedFd<'_>,
    bound: SocketAddr,
    buffers: impl Iterator<Item = &'b mut [u8]>,
    received: &mut [Option<Received>],
    wait: bool,
) -> io::Result<usize> {
    let mut filled = 0;
    for (buffer, received) in buffers.zip(received) {
        match receive_one(socket, bound, buffer, wait && filled == 0) {
            Ok(one) => *received = Some(one),
            Err(error) if filled == 0 => return Err(error),
            // It is reported again, or is about an earlier datagram: what was received
            // matters more.
            Err(_) => break,
        }
        filled += 1;
    }
    Ok(filled)
}

/// Receives one datagram, of which only the sender is known.
pub(crate) fn receive_one(
    socket: BorrowedFd<'_>,
    bound: SocketAddr,
    buffer: &mut [u8],
    wait: bool,
) -> io::Result<Received> {
    #[cfg(not(windows))]
    let flags = if wait {
        RecvFlags::empty()
    } else {
        RecvFlags::DONTWAIT
    };
    #[cfg(windows)]
    let flags = RecvFlags::empty();
    // Not to wait would take another mode, for all who share the socket.
    if cfg!(windows) && !wait {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    let (len, _, peer) = recvfrom(socket, buffer, flags)?;
    let peer = peer.ok_or_else(|| io::Error::other("a datagram without a sender"))?;
    Ok(Received::plain(SocketAddr::try_from(peer)?, bound, len))
}

/// Sends one datagram, and returns its length.
pub(crate) fn send_one(
    socket: BorrowedFd<'_>,
    payload: &[u8],
    to: SocketAddr,
) -> io::Result<usize> {
    Ok(sendto(socket, payload, SendFlags::empty(), &to)?)
}

/// Header and payload are copied together. Source address and traffic class are the
/// system's choice.
#[cfg(any(not(target_os = "linux"), test))]
pub(crate) fn send<'d>(
    _state: &SocketState,
    socket: BorrowedFd<'_>,
    count: usize,
    transmit: &impl Fn(usize) -> Transmit<'d>,
    fault: &mut impl FnMut(usize, SendFault) -> ControlFlow<()>,
    _join: bool,
) -> Sent {
    let mut sent = Sent::default();
    for index in 0..count {
        let one = transmit(index);
        for number in 0..one.datagrams() {
            let payload = one.slice(number, 1);
            let joined = [one.outgoing.header, payload].concat();
            let result = match one.outgoing.to {
                Some(to) => send_one(socket, &joined, to),
                None => rustix::net::send(socket, &joined, SendFlags::empty()).map_err(Into::into),
            };
            match result {
                Ok(_) => {
                    sent.datagrams += 1;
                    sent.bytes += joined.len();
                }
                Err(error) => {
                    let lost = SendFault::Lost {
                        error,
                        datagrams: 1,
                        len: joined.len(),
                    };
                    if fault(index, lost).is_break() {
                        return sent;
                    }
                }
            }
        }
    }
    sent
}
