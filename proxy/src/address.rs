//! The three addresses on a datagram's way, as types that can't be swapped.

use std::fmt;
use std::net::SocketAddr;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub SocketAddr);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

address! {
    /// Who wrote to a listener, and who alone gets the replies.
    ClientAddr
}
address! {
    /// The address that a client wrote to: on a wildcard listener one of the
    /// host's own. Replies leave from it.
    ListenerAddr
}
address! {
    /// A server of an upstream.
    ServerAddr
}
