//! The way of a reply.

use std::net::SocketAddr;

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
}

impl Way {
    /// Back to the peer.
    pub(crate) fn back(peer: SocketAddr) -> Self {
        Self {
            to: peer,
            from: None,
        }
    }
}
