//! UDP sockets for a server behind a proxy. They show the server its clients.
//!
//! A UDP proxy sends from its own address, so a server behind it sees only one client:
//! the proxy. A proxy that speaks PROXY protocol v2, as `ppv2-proxy` does, puts a header
//! with the client's address in front of every datagram. The sockets here remove the
//! header, give the server the client's address, and send replies back through the proxy
//! that the client came through.
//!
//! ```diff
//! -use std::net::UdpSocket;
//! +use ppv2_sdk::{Trust, UdpSocket};
//!
//!  fn main() -> std::io::Result<()> {
//! -    let socket = UdpSocket::bind("0.0.0.0:9000")?;
//! +    let trust = Trust::networks(["192.0.2.1"]).build()?;
//! +    let socket = UdpSocket::bind("0.0.0.0:9000", trust)?;
//!      let mut buffer = [0; 1500];
//!      loop {
//!          let (len, client) = socket.recv_from(&mut buffer)?;
//!          socket.send_to(&buffer[..len], client)?;
//!      }
//!  }
//! ```
//!
//! [`UdpSocket`] blocks as `std`'s does;
#![cfg_attr(
    feature = "tokio",
    doc = "[`tokio::UdpSocket`] is its counterpart for tokio."
)]
#![cfg_attr(
    not(feature = "tokio"),
    doc = "the feature `tokio` adds its counterpart for tokio."
)]
#![cfg_attr(feature = "quinn", doc = "The module [`quinn`] serves QUIC.")]
#![cfg_attr(not(feature = "quinn"), doc = "The feature `quinn` serves QUIC.")]
//! `recv_datagram` returns all that is known of a datagram, and `reply` answers it.
//! `recv_batch` and `send_batch` move many datagrams with one call to the kernel.
//! [`Demux`] is the part behind all of them, for sockets of other kinds.
//!
//! # Example
//!
//! A client, its proxy and a server:
//!
//! ```
//! use std::net::UdpSocket as StdSocket;
//! use ppv2_sdk::{Trust, UdpSocket};
//!
//! let trust = Trust::networks(["127.0.0.1"]).build()?;
//! let server = UdpSocket::bind("127.0.0.1:0", trust)?;
//!
//! // The proxy passes on the datagram of a client at 203.0.113.11.
//! let proxy = StdSocket::bind("127.0.0.1:0")?;
//! let mut datagram = [0; 28 + 5];
//! let client = "203.0.113.11:54321".parse().unwrap();
//! let listener = "198.51.100.10:9000".parse().unwrap();
//! ppv2::encode_udp(client, listener, &mut datagram).unwrap();
//! datagram[28..].copy_from_slice(b"hello");
//! proxy.send_to(&datagram, server.local_addr()?)?;
//!
//! // The server sees the client, and its reply goes to the proxy.
//! let mut buffer = [0; 1500];
//! let (len, from) = server.recv_from(&mut buffer)?;
//! assert_eq!((&buffer[..len], from), (b"hello".as_slice(), client));
//! server.send_to(b"hello yourself", from)?;
//!
//! let len = proxy.recv(&mut buffer)?;
//! assert_eq!(&buffer[..len], b"hello yourself");
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! # Trust
//!
//! The sender decides whether a datagram has a header, never its bytes. [`Trust`] names
//! the networks of the proxies: a datagram from there must carry a header, and the socket
//! never looks for a header in a datagram from elsewhere. There is no default.
//!
//! | sender | header | the datagram is |
//! |---|---|---|
//! | in a trusted network | names a UDP client | delivered, as from that client |
//! | | LOCAL | delivered, as from the proxy itself |
//! | | of any other kind, or none | dropped; with [`remember_senders`] one of none belongs to the client that its sender named last |
//! | elsewhere | not looked for | dropped; with [`Untrusted::Accept`] delivered unchanged, as from its sender |
//!
//! Headers are those of PROXY protocol v2. [`formats`] allows those of Simple Proxy
//! Protocol, which Cloudflare Spectrum and Tencent EdgeOne send, too or instead.
//!
//! [`formats`]: TrustBuilder::formats
//! [`remember_senders`]: TrustBuilder::remember_senders
//!
//! A dropped datagram never makes a receive call fail: [`Stats`] counts it under its
//! [`DropReason`], and the call goes on waiting. `tracing` logs the first drop for each
//! reason, then at most one a minute, at level WARN, with the sender and the setting to
//! change.
//!
//! Senders of UDP can forge their address. So trust a network only where routers or
//! firewalls keep other hosts from sending with its addresses.
//!
//! # Where replies go
//!
//! `send_to` takes the client's address and sends to the proxy that the client's
//! latest datagram came from. The table behind it holds 65,536 clients, each for
//! 120 seconds after its latest datagram, unless [`Trust`] says otherwise.
//! `reply` sends by the [`ReplyPath`] of one datagram.
//!
//! A proxy hands the address that it used for one client on to another, once the
//! first has been silent for long enough. A later reply would reach the wrong client.
//! So after the address of a client's proxy has named another client, the client can
//! be sent to for [`FORMER_CLIENT_GRACE`], 10 seconds, after its own latest
//! datagram; then `send_to` and `reply` fail as for an unknown client.
//!
//! A proxy may add a *reply tag* to its headers. Then its address may name many clients
//! at a time, and the sockets here put a header in front of each reply that names its
//! client ([specification][tag]). An application has nothing to do; it can send 41 or 65
//! bytes less in one datagram than without. Replies to datagrams with SPP headers get those
//! in front in the same way: 38 bytes.
//!
//! [tag]: https://github.com/ppv2/ppv2/blob/main/docs/reference/reply-tag.md
//!
//! A socket that is bound to all addresses of its host (`0.0.0.0`, `[::]`) answers from
//! the address that the datagram was sent to (on Linux): the proxy takes replies from no
//! other. On other systems bind to that address.
//!
//! With [`ReplyFrom::Listener`] replies go straight to the client, from the address that
//! it sent to, and past the proxy.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

/// Has an error's `Debug` print its message, since `main` prints the error that it
/// returns by `Debug`, inside an [`std::io::Error`] too.
macro_rules! message_as_debug {
    ($error:ty) => {
        impl std::fmt::Debug for $error {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::Display::fmt(self, f)
            }
        }
    };
}

/// Has the examples of the README tested.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod address;
mod batch;
mod clients;
mod clock;
mod core;
mod datagram;
mod demux;
mod drop_reason;
mod drop_warning;
mod errors;
mod listeners;
mod patience;
#[cfg(feature = "quinn")]
pub mod quinn;
mod reply_path;
mod senders;
mod socket;
mod stats;
#[cfg(feature = "tokio")]
pub mod tokio;
mod trust;

pub use batch::{Batch, BatchIter};
pub use clients::FORMER_CLIENT_GRACE;
pub use datagram::{Datagram, DatagramRef};
pub use demux::Demux;
pub use drop_reason::DropReason;
pub use drop_warning::DropWarning;
pub use errors::ReplyTooLong;
pub use ipnet::IpNet;
pub use reply_path::{Recipient, ReplyHeader, ReplyPath};
pub use socket::UdpSocket;
pub use stats::Stats;
pub use trust::{Format, HeaderAlone, ReplyFrom, Trust, TrustBuilder, TrustError, Untrusted};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_can_be_boxed_and_sent_to_other_threads() {
        fn check<E: std::error::Error + Send + Sync + 'static>() {}
        check::<DropReason>();
        check::<TrustError>();
        check::<ReplyTooLong>();
    }
}
