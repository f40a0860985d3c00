//! UDP sockets for a server behind a proxy: they show it its clients.
//!
//! A UDP proxy sends from its own address, so that a server behind it sees one
//! client only: the proxy. One that speaks PROXY protocol v2, as `ppv2-proxy`
//! does, puts a header in front of every datagram that says who the client is.
//! The sockets here take it off, hand the server the client's address, and send
//! replies back through the proxy that the client came through.
//!
//! ```diff
//! -use std::net::UdpSocket;
//! +use ppv2_sdk::{Trust, UdpSocket};
//!
//!  fn main() -> std::io::Result<()> {
//! -    let socket = UdpSocket::bind("0.0.0.0:9000")?;
//! +    let socket = UdpSocket::bind("0.0.0.0:9000", Trust::networks(["192.0.2.10"]).build()?)?;
//!      let mut buffer = [0; 1500];
//!      loop {
//!          let (len, client) = socket.recv_from(&mut buffer)?;
//!          socket.send_to(&buffer[..len], client)?;
//!      }
//!  }
//! ```
//!
//! [`UdpSocket`] blocks as `std`'s does;
#![cfg_attr(feature = "tokio", doc = "[`tokio::UdpSocket`] is its like for tokio.")]
#![cfg_attr(
    not(feature = "tokio"),
    doc = "the feature `tokio` adds its like for tokio."
)]
#![cfg_attr(
    feature = "quinn",
    doc = "The module [`quinn`] shows them to a QUIC server."
)]
#![cfg_attr(
    not(feature = "quinn"),
    doc = "The feature `quinn` shows them to a QUIC server."
)]
//! `recv_datagram` returns all that is known of a datagram, and `reply` answers
//! it; `recv_batch` and `send_batch` move many with one call to the kernel.
//! [`Demux`] is what stands behind both, for sockets of any other kind.
//!
//! # A client, its proxy and a server
//!
//! ```
//! use std::net::UdpSocket as StdSocket;
//! use ppv2_sdk::{Trust, UdpSocket};
//!
//! let server = UdpSocket::bind("127.0.0.1:0", Trust::networks(["127.0.0.1"]).build()?)?;
//!
//! // What a proxy does for a client at 203.0.113.11.
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
//! # Who is believed
//!
//! Whether a datagram has a header is decided by who sent it, never by what it
//! looks like. The networks in [`Trust`] are those of the proxies: what comes
//! from there must carry a header, and what comes from elsewhere is never
//! searched for one. There is no default.
//!
//! | comes from | begins with a header | and is |
//! |---|---|---|
//! | a trusted network | that names a UDP client | delivered, as from that client |
//! | | that says LOCAL | delivered, as from the proxy itself |
//! | | of any other kind, or none | dropped |
//! | elsewhere | never looked at | dropped; with [`Untrusted::Accept`] delivered untouched, as from its sender |
//!
//! What is dropped never makes a receive call fail: it is counted in [`Stats`]
//! under its [`DropReason`], and the call goes on waiting. The first drop for each
//! reason, then at most one a minute, is logged by `tracing` at level WARN, with the
//! sender and the setting to look at. A sender's address in
//! UDP can be forged, so trust networks only where routers or firewalls keep
//! others from sending under their addresses.
//!
//! # Where replies go
//!
//! `send_to` takes the client's address and sends to the proxy that the client's
//! latest datagram came from. The table behind it holds 65,536 clients, each for
//! 120 seconds after its latest datagram, unless [`Trust`] says otherwise.
//! `reply` sends by the way that the very datagram came.
//!
//! A proxy hands the address that it used for one client on to another, once the
//! first has been silent for long enough. A reply sent later would reach a
//! stranger. So a client whose proxy's address has named another client since can
//! be sent to for [`FORMER_CLIENT_GRACE`], 10 seconds, after its own latest
//! datagram; then `send_to` and `reply` fail as for a client that is not known.
//!
//! A socket that is bound to all addresses of its host, as `0.0.0.0` or `[::]`,
//! answers from the one that the datagram was sent to (on Linux): the proxy takes
//! replies from no other. Elsewhere bind to that address.
//!
//! With [`ReplyFrom::Listener`] replies go straight to the client instead, from
//! the address that it wrote to, and the proxy is spared them.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

/// Has an error's `Debug` print its message, as `main` prints the error that it
/// returns by `Debug`: inside an [`std::io::Error`] too.
macro_rules! message_as_debug {
    ($error:ty) => {
        impl std::fmt::Debug for $error {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::Display::fmt(self, f)
            }
        }
    };
}

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
pub use ipnet::IpNet;
pub use reply_path::{Recipient, ReplyPath};
pub use socket::UdpSocket;
pub use stats::Stats;
pub use trust::{ReplyFrom, Trust, TrustBuilder, TrustError, Untrusted};
