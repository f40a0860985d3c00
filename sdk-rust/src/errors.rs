//! Which errors of a socket are none of the caller's business, and the one that
//! this crate adds.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use thiserror::Error;

use crate::clock::Tick;
use crate::offload::Outgoing;
use crate::routes::FORMER_CLIENT_GRACE;
use crate::{Gate, Recipient, ReplyTo, Way};

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
#[derive(Error)]
#[error(
    "no way to client {client}: not heard from in the last {}s, or forgotten for newer clients, \
     or not heard from in the last {}s by a proxy's address that has named another client since; \
     answer sooner, or raise forget_after or max_clients of Trust",
    forget_after.as_secs_f64(),
    FORMER_CLIENT_GRACE.as_secs()
)]
struct NoRoute {
    client: SocketAddr,
    forget_after: Duration,
}

message_as_debug!(NoRoute);

/// The error of a send call whose address is none at all, in the words of std.
pub(crate) fn no_address() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "no addresses to send data to")
}

/// The error of a call that would take a burst for one datagram.
pub(crate) fn received_in_batches() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        "the socket has GRO enabled, so that its datagrams arrive in bursts; receive with \
         recv_batch, or leave GRO off",
    )
}

impl Gate {
    /// What to send and where to, up to the first datagram to whose recipient
    /// there is no way; an error of kind `NotConnected` if that is the first.
    pub(crate) fn outgoing<'d, P, R>(
        &self,
        datagrams: &'d [(P, R)],
    ) -> io::Result<Vec<Outgoing<'d>>>
    where
        P: AsRef<[u8]>,
        R: Copy + Into<Recipient>,
    {
        let recipients = datagrams.iter().map(|(_, recipient)| (*recipient).into());
        let ways = self.ways(Tick::roughly_now(), recipients);
        if ways.is_empty()
            && let Some((_, first)) = datagrams.first()
        {
            match (*first).into() {
                Recipient::Client(client) | Recipient::Datagram(ReplyTo { client, .. }) => {
                    return Err(self.no_way_to(client));
                }
                Recipient::Way(_) => {}
            }
        }
        let payloads = datagrams.iter().map(|(payload, _)| payload.as_ref());
        Ok(payloads.zip(ways).collect())
    }

    /// Where to send what is meant for `client`; an error of kind `NotConnected`
    /// if that is not known.
    pub(crate) fn way_to(&self, client: SocketAddr) -> io::Result<Way> {
        self.route_at(Tick::roughly_now(), client)
            .ok_or_else(|| self.no_way_to(client))
    }

    /// Where to send a reply to a datagram; an error of kind `NotConnected` if
    /// that is not known any more.
    pub(crate) fn way_of_reply(&self, reply: ReplyTo) -> io::Result<Way> {
        self.way_of(Tick::roughly_now(), reply)
            .ok_or_else(|| self.no_way_to(reply.client))
    }

    fn no_way_to(&self, client: SocketAddr) -> io::Error {
        self.counters().reply_without_route();
        let forget_after = self.trust().limits().forget_after;
        io::Error::new(
            io::ErrorKind::NotConnected,
            NoRoute {
                client,
                forget_after,
            },
        )
    }
}
