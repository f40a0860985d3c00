//! Which errors of a socket don't concern the caller, and the errors that this crate
//! adds.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use thiserror::Error;

use crate::clock::Tick;
use crate::reply_path::Outgoing;
use crate::{Demux, FORMER_CLIENT_GRACE, Recipient, ReplyPath};

/// Whether `error` is only the echo of a datagram sent earlier: some host on the
/// path, or one that pretends to be, answered it with an ICMP message. Reading
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

#[derive(Error)]
#[error(
    "no reply path to client {client}: nothing received from it in the last {}s, or forgotten for \
     newer clients, or nothing received from it in the last {}s and its proxy's address has named \
     another client since; answer sooner, or raise forget_after or max_clients",
    forget_after.as_secs_f64(),
    FORMER_CLIENT_GRACE.as_secs()
)]
struct NoReplyPath {
    client: SocketAddr,
    forget_after: Duration,
}

message_as_debug!(NoReplyPath);

/// Bytes that a UDP datagram holds over IPv4: 65,535, less the headers of both
/// (RFC 768, RFC 791).
const MAX_IPV4_PAYLOAD: usize = 65_507;

/// Over IPv6, the length of whose header is not counted (RFC 8200).
const MAX_IPV6_PAYLOAD: usize = 65_527;

/// A reply that was not sent, since header and reply exceed what a datagram holds: the
/// [source](std::error::Error::source), or [`get_ref`](io::Error::get_ref), of the
/// [`io::Error`] of a send call, whose kind is `InvalidInput`. Only a reply to a datagram
/// with a reply tag or an SPP header needs a header ([`ReplyPath::header`]).
#[derive(Error)]
#[non_exhaustive]
#[error(
    "a reply of {len} bytes to client {client} and the header of {header_len} bytes in front of \
     it exceed the {max} bytes that a datagram holds; its proxy asks for that header, with a \
     reply tag or by SPP, so send at most {} bytes",
    max - header_len
)]
pub struct ReplyTooLong {
    client: SocketAddr,
    len: usize,
    header_len: usize,
    max: usize,
}

message_as_debug!(ReplyTooLong);

/// An error of the kind `InvalidInput` if header and reply exceed what a datagram holds.
pub(crate) fn check_length(header: &[u8], payload: &[u8], path: &ReplyPath) -> io::Result<()> {
    let max = match path.to.ip().to_canonical() {
        IpAddr::V4(_) => MAX_IPV4_PAYLOAD,
        IpAddr::V6(_) => MAX_IPV6_PAYLOAD,
    };
    let (len, header_len) = (payload.len(), header.len());
    if header_len + len <= max {
        return Ok(());
    }
    let error = ReplyTooLong {
        client: path.client,
        len,
        header_len,
        max,
    };
    Err(io::Error::new(io::ErrorKind::InvalidInput, error))
}

/// The error of a send call without an address, in the words of std.
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

impl Demux {
    /// What to send and where to, up to the first datagram whose recipient has no reply
    /// path, or that is too long with the header that it needs; an error of kind
    /// `NotConnected` or `InvalidInput` if that is the first.
    pub(crate) fn outgoing<'d, P, R>(
        &self,
        datagrams: &'d [(P, R)],
    ) -> io::Result<Vec<Outgoing<'d>>>
    where
        P: AsRef<[u8]>,
        R: Copy + Into<Recipient>,
    {
        let recipients = datagrams.iter().map(|(_, recipient)| (*recipient).into());
        let paths = self.paths_to(Tick::roughly_now(), recipients);
        if paths.is_empty()
            && let Some((_, first)) = datagrams.first()
        {
            return Err(self.no_reply_path((*first).into()));
        }
        let mut outgoing = Vec::with_capacity(paths.len());
        for ((payload, _), path) in datagrams.iter().zip(paths) {
            let one = Outgoing::new(payload.as_ref(), path);
            if !one.header.is_empty()
                && let Err(error) = check_length(&one.header, one.payload, &one.path)
            {
                if outgoing.is_empty() {
                    return Err(error);
                }
                break;
            }
            outgoing.push(one);
        }
        Ok(outgoing)
    }

    pub(crate) fn no_reply_path(&self, recipient: Recipient) -> io::Error {
        self.counters().reply_without_path();
        let (Recipient::Client(client) | Recipient::Path(ReplyPath { client, .. })) = recipient;
        let forget_after = self.settings().forget_after;
        let error = NoReplyPath {
            client,
            forget_after,
        };
        io::Error::new(io::ErrorKind::NotConnected, error)
    }
}
