//! Where a reply goes.

use std::net::{IpAddr, SocketAddr};

use crate::address::canonical;
use crate::clock::Tick;
use crate::{Datagram, DatagramRef, FORMER_CLIENT_GRACE};

/// The path of a reply to a client: which address it is sent to, and from which.
///
/// Each datagram has the path of a reply to it. [`Demux::reply_path`] returns that of
/// a client's latest datagram. The sockets of this crate keep to the addresses in it
/// by themselves; they are public for sockets of other kinds.
///
/// Two paths are equal if replies by them are sent to the same address from the same
/// address.
///
/// [`Demux::reply_path`]: crate::Demux::reply_path
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ReplyPath {
    /// The address to send to: the peer as the socket reported it, or with
    /// [`from`](Self::from) the client itself, an IPv4 one never in IPv6 form.
    pub to: SocketAddr,
    /// The listener's address and port, which the reply must leave from, an IPv4
    /// one never in IPv6 form: set with
    /// [`ReplyFrom::Listener`](crate::ReplyFrom::Listener) for a client that a
    /// header names. `None`: the reply leaves by the socket that received.
    pub from: Option<SocketAddr>,
    /// The address of this host that the datagram was sent to, and that the reply
    /// must leave from: known for sockets that are bound to all addresses. `None`:
    /// the system chooses the address.
    pub local: Option<IpAddr>,
    pub(crate) client: SocketAddr,
    /// When the datagram came.
    pub(crate) heard: Tick,
}

impl ReplyPath {
    /// Back to the peer, from an address of this host.
    pub(crate) fn to_peer(
        peer: SocketAddr,
        local: Option<IpAddr>,
        client: SocketAddr,
        heard: Tick,
    ) -> Self {
        Self {
            to: peer,
            from: None,
            local,
            client,
            heard,
        }
    }

    /// Back to a peer, for tests in which the client doesn't matter.
    #[cfg(test)]
    pub(crate) fn back(peer: SocketAddr) -> Self {
        Self::to_peer(peer, None, peer, Tick::roughly_now())
    }

    /// Straight to the client, from the listener's address.
    pub(crate) fn from_listener(listener: SocketAddr, client: SocketAddr, heard: Tick) -> Self {
        Self {
            to: client,
            from: Some(listener),
            local: None,
            client,
            heard,
        }
    }

    /// Whether a reply by this path certainly reaches its client: it passes no proxy,
    /// or the datagram came so lately that its proxy's address can't be another
    /// client's by now.
    pub(crate) fn is_certain(&self, now: Tick) -> bool {
        self.from.is_some()
            || canonical(self.to) == self.client
            || !now.is_past(self.heard, FORMER_CLIENT_GRACE.into())
    }

    /// Whether replies by both leave from one address, so that one call can send them.
    pub(crate) fn same_source(&self, other: &Self) -> bool {
        (self.from, self.local) == (other.from, other.local)
    }
}

impl PartialEq for ReplyPath {
    fn eq(&self, other: &Self) -> bool {
        self.to == other.to && self.same_source(other)
    }
}

impl Eq for ReplyPath {}

/// One datagram to send, and where to.
pub(crate) type Outgoing<'d> = (&'d [u8], ReplyPath);

/// The recipient of a reply: a client by its address, or the sender of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Recipient {
    /// This client, by the path of its latest datagram.
    Client(SocketAddr),
    /// The client of a datagram, by the datagram's own path.
    Path(ReplyPath),
}

impl From<SocketAddr> for Recipient {
    fn from(client: SocketAddr) -> Self {
        Self::Client(client)
    }
}

impl From<ReplyPath> for Recipient {
    fn from(path: ReplyPath) -> Self {
        Self::Path(path)
    }
}

impl From<DatagramRef<'_>> for Recipient {
    fn from(datagram: DatagramRef<'_>) -> Self {
        Self::Path(datagram.reply_path)
    }
}

impl From<&DatagramRef<'_>> for Recipient {
    fn from(datagram: &DatagramRef<'_>) -> Self {
        Self::Path(datagram.reply_path)
    }
}

impl From<&Datagram> for Recipient {
    fn from(datagram: &Datagram) -> Self {
        Self::Path(datagram.reply_path)
    }
}
