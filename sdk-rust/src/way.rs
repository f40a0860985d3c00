//! The way of a reply.

use std::net::{IpAddr, SocketAddr};

use crate::address::canonical;
use crate::clock::Tick;
use crate::routes::FORMER_CLIENT_GRACE;

/// How a reply reaches its client: to which address it is sent, and from which.
///
/// For those who bring sockets of their own to a [`Gate`](crate::Gate); the
/// sockets of this crate keep to it by themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Way {
    /// The address to send to: the peer as the socket reported it, or with
    /// [`from`](Self::from) the client itself, an IPv4 one never in IPv6 form.
    pub to: SocketAddr,
    /// The listener's address and port, which the reply must come from, an IPv4
    /// one never in IPv6 form: set with
    /// [`ReplyFrom::Listener`](crate::ReplyFrom::Listener) for a client that a
    /// header names. `None`: the reply leaves by the socket that received.
    pub from: Option<SocketAddr>,
    /// The address of this host that the datagram was sent to, and that the reply
    /// must leave from: known for sockets that are bound to all addresses. `None`:
    /// the reply leaves from the one that the system chooses.
    pub local: Option<IpAddr>,
}

/// A received datagram, as far as a reply to it needs to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyTo {
    pub(crate) client: SocketAddr,
    pub(crate) way: Way,
    pub(crate) heard: Tick,
}

impl ReplyTo {
    /// The way by which the datagram came, if a reply by it reaches the client
    /// for sure: no proxy passes it on, or the datagram came so lately that its
    /// proxy's address can't be another client's by now.
    pub(crate) fn sure_way(&self, now: Tick) -> Option<Way> {
        let sure = self.way.from.is_some()
            || canonical(self.way.to) == self.client
            || !now.is_past(self.heard, FORMER_CLIENT_GRACE.into());
        sure.then_some(self.way)
    }
}

impl Way {
    /// Back to the peer.
    #[cfg(test)]
    pub(crate) fn back(peer: SocketAddr) -> Self {
        Self::back_from(None, peer)
    }

    /// Back to the peer, from an address of this host.
    pub(crate) fn back_from(local: Option<IpAddr>, peer: SocketAddr) -> Self {
        Self {
            to: peer,
            from: None,
            local,
        }
    }

    /// Straight to the client, from the listener's address.
    pub(crate) fn from_listener(listener: SocketAddr, client: SocketAddr) -> Self {
        Self {
            to: client,
            from: Some(listener),
            local: None,
        }
    }

    /// Whether both leave from one address, so that one call can send both.
    pub(crate) fn same_source(&self, other: &Self) -> bool {
        (self.from, self.local) == (other.from, other.local)
    }
}
