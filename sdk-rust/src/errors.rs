//! Which errors of a socket are none of the caller's business, and the one that
//! this crate adds.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::Gate;

/// Whether `error` is only the echo of a datagram sent earlier: some host on the
/// way, or one that pretends to be, answered it with an ICMP message. Reading
/// such an error clears it. It says nothing of this socket, and anybody could
/// provoke it.
pub(crate) fn is_echo_of_earlier_send(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::ConnectionRefused
            | Kind::ConnectionReset
            | Kind::HostUnreachable
            | Kind::NetworkUnreachable
    )
}

/// Sends by `send`, once more if what failed was an earlier datagram: the error
/// is reported in place of sending this one.
pub(crate) fn despite_echo<T>(mut send: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    match send() {
        Err(error) if is_echo_of_earlier_send(&error) => send(),
        result => result,
    }
}

/// Nobody knows where a reply to this client would have to go.
#[derive(Debug, Error)]
#[error(
    "no way to client {client}: not heard from in the last {}s, or forgotten for newer clients; \
     answer sooner, or raise forget_after or max_clients of Trust",
    forget_after.as_secs_f64()
)]
struct NoRoute {
    client: SocketAddr,
    forget_after: Duration,
}

impl Gate {
    /// Where to send what is meant for `client`; an error of kind `NotConnected`
    /// if that is not known.
    pub(crate) fn way_to(&self, client: SocketAddr) -> io::Result<SocketAddr> {
        self.route(Instant::now(), client).ok_or_else(|| {
            self.counters().reply_without_route();
            let forget_after = self.trust().limits().forget_after;
            io::Error::new(
                io::ErrorKind::NotConnected,
                NoRoute {
                    client,
                    forget_after,
                },
            )
        })
    }
}
