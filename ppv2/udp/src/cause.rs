//! What errors of socket calls mean.

use std::io;

use rustix::io::Errno;

/// What an error of a socket call means for the datagram at hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Nothing is there to receive, or nothing more can be queued.
    WouldBlock,
    /// Longer than the interface or UDP allows, or than a router says.
    Oversize,
    /// No route to the addressee, or no address of this host's to write to it from.
    Unreachable,
    /// The process, or the host, has no file descriptor left.
    NoDescriptors,
    /// No local port is left.
    NoPorts,
    /// The kernel has no memory for it.
    NoMemory,
    /// The process lacks a privilege.
    NotPermitted,
    /// Anything else.
    Other,
}

impl Cause {
    /// Reads the error number of `error`.
    #[must_use]
    pub fn of(error: &io::Error) -> Self {
        match Errno::from_io_error(error) {
            Some(Errno::AGAIN) => Self::WouldBlock,
            Some(Errno::MSGSIZE) => Self::Oversize,
            // Where no port is left, Linux says EAGAIN or EADDRINUSE; the last of
            // these comes of a host without IPv6, or of a source that is gone, of which
            // a connected socket says EINVAL over IPv4.
            Some(
                Errno::NETUNREACH
                | Errno::HOSTUNREACH
                | Errno::NETDOWN
                | Errno::HOSTDOWN
                | Errno::ADDRNOTAVAIL
                | Errno::INVAL
                | Errno::NODEV,
            ) => Self::Unreachable,
            Some(Errno::MFILE | Errno::NFILE) => Self::NoDescriptors,
            Some(Errno::ADDRINUSE) => Self::NoPorts,
            Some(Errno::NOBUFS | Errno::NOMEM) => Self::NoMemory,
            Some(Errno::PERM | Errno::ACCESS) => Self::NotPermitted,
            _ => Self::Other,
        }
    }
}
