//! Sends many datagrams with one call to the kernel, and those that leave from a
//! listener's address, by the Rust SDK's socket.

use std::io;

use ppv2_sdk::{Recipient, UdpSocket};
use rustix::event::PollFlags;
use rustix::fd::OwnedFd;
use rustix::io::Errno;

use super::descriptor::{Descriptor, Failure, Wait};

/// A socket of the SDK that is handed the ways to send by, and so needs no gate
/// of its own. It receives nothing: the gate that decides has to be the one that
/// single calls ask too.
#[derive(Debug)]
pub(crate) struct Bursts(UdpSocket);

/// A payload and where it goes.
pub(crate) type Reply<'d> = (&'d [u8], Recipient);

impl Bursts {
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        UdpSocket::for_sending(fd.into()).map(Self)
    }

    /// Has the kernel join datagrams from now on, for all who share the socket;
    /// `false` if it can't.
    pub(crate) fn enable_gro(fd: OwnedFd) -> io::Result<bool> {
        Self::new(fd)?.0.enable_gro()
    }

    /// Sends from the front, and returns how many were sent.
    pub(crate) fn send(
        &self,
        descriptor: &Descriptor,
        replies: &[Reply<'_>],
        wait: Wait,
    ) -> Result<usize, Failure> {
        loop {
            match self.0.send_batch(replies) {
                Ok(sent) => return Ok(sent),
                Err(error) => {
                    let failure = Failure::from(error);
                    let Failure::Os(error) = failure else {
                        return Err(failure);
                    };
                    descriptor.wait_out(error, wait, PollFlags::OUT)?;
                }
            }
        }
    }

    /// Listeners' sockets closed to make room for others.
    pub(crate) fn listeners_evicted(&self) -> u64 {
        self.0.stats().listeners_evicted
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if let Some(number) = Errno::from_io_error(&error) {
            return Self::Os(number);
        }
        // What the SDK says itself: that a wait is over, or why a listener's
        // address can't be sent from.
        let kinds = [
            (io::ErrorKind::WouldBlock, Errno::AGAIN),
            (io::ErrorKind::AddrInUse, Errno::ADDRINUSE),
            (io::ErrorKind::AddrNotAvailable, Errno::ADDRNOTAVAIL),
            (io::ErrorKind::PermissionDenied, Errno::ACCESS),
        ];
        let of_kind = kinds.into_iter().find(|(kind, _)| *kind == error.kind());
        match of_kind {
            Some((_, Errno::AGAIN)) => Self::Os(Errno::AGAIN),
            Some((_, number)) => Self::Explained(number, error.to_string()),
            None => Self::Explained(Errno::INVAL, error.to_string()),
        }
    }
}
