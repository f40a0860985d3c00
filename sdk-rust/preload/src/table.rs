//! The clients and their reply paths, in memory that forked processes share: whichever
//! process received a client's datagram, any of them can answer it.
//!
//! One [`Demux`](ppv2_sdk::Demux) for each local address and port that a socket is taken
//! over on, all of them in the [`arena`](crate::arena), under one lock: a robust
//! pthread mutex that processes share. A process that dies while it holds the lock leaves
//! the table in an unknown state; the next one then begins with an empty table, and counts
//! that. The lock is held for the time of a few lookups, never during a system call that
//! waits.

use std::net::{IpAddr, SocketAddr};

use ppv2_sdk::ReplyHeader;

/// The number of a local address and port in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint(pub(crate) u32);

/// The table, locked: for one call of the program's, which may move several datagrams.
pub(crate) struct Table {
    _todo: (),
}

/// What a datagram is to the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Judged {
    /// IPv4 addresses as such, not mapped.
    pub(crate) client: SocketAddr,
    /// The address that the client sent to, if the header says it.
    pub(crate) destination: Option<SocketAddr>,
    /// Where the payload begins.
    pub(crate) header_len: usize,
}

/// How a datagram to a client leaves.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Path {
    /// By its reply path.
    Proxied {
        to: SocketAddr,
        /// The local address to leave from, of a socket that is bound to all.
        local: Option<IpAddr>,
        /// Stands in front of the payload; often empty.
        header: ReplyHeader,
    },
    /// As the program said: the address is talked to directly.
    Direct,
}

/// What only the preload library counts, beside the SDK's drop reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counter {
    /// Dropped: a client's IPv6 address, on a socket for IPv4.
    ClientFamily,
    /// Dropped: the socket is connected to another client.
    OtherClient,
    /// Delivered without a look at it: from an address that is talked to directly.
    Direct,
    /// Datagrams sent by a reply path.
    RepliesSent,
    /// Datagrams not sent: their address is no client's, or was forgotten.
    RepliesWithoutPath,
    /// Calls from a signal handler that had interrupted this library.
    Interrupted,
    /// Panics of this library, each caught.
    Panics,
}

/// Makes the shared memory. Once, before the program begins.
pub(crate) fn start(/* settings */) {
    todo!()
}

/// The number for a local address, IPv4 ones as such; `None` if the table holds no more.
pub(crate) fn endpoint(_local: SocketAddr) -> Option<Endpoint> {
    todo!()
}

/// `None` if a signal handler has interrupted this thread while it held the lock.
pub(crate) fn lock() -> Option<Table> {
    todo!()
}

/// Counts; needs no lock.
pub(crate) fn count(_counter: Counter, _by: u64) {
    todo!()
}

impl Table {
    /// Decides on a datagram: `peer` and `local` as the kernel told, IPv4 or mapped.
    /// `None`: it must be dropped, and has been counted.
    pub(crate) fn receive(
        &mut self,
        _endpoint: Endpoint,
        _peer: SocketAddr,
        _local: Option<IpAddr>,
        _bytes: &[u8],
    ) -> Option<Judged> {
        todo!()
    }

    /// As `receive`, for a look at a datagram (MSG_PEEK) that will be received again: a
    /// good one is remembered and not counted.
    pub(crate) fn peek(
        &mut self,
        _endpoint: Endpoint,
        _peer: SocketAddr,
        _local: Option<IpAddr>,
        _bytes: &[u8],
    ) -> Option<Judged> {
        todo!()
    }

    /// How to send to an address; `None` if it is no client's that is known. Not counted:
    /// see [`Counter::RepliesSent`] and [`Counter::RepliesWithoutPath`].
    pub(crate) fn path(&self, _endpoint: Endpoint, _to: SocketAddr) -> Option<Path> {
        todo!()
    }

    /// The endpoint that knows a client by a proxy, with its local address and the path.
    pub(crate) fn find(&self, _client: SocketAddr) -> Option<(Endpoint, SocketAddr, Path)> {
        todo!()
    }
}
