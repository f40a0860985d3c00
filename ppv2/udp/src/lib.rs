//! UDP datagrams in batches, with what the kernel knows of each.
//!
//! - [`Batch`] holds received datagrams; [`Received`] says of each who sent it, to which
//!   address, with which traffic class, and how the kernel joined it with others (GRO).
//! - [`SocketState`] receives into a batch and sends [`Transmit`]s on any UDP socket: one
//!   of std, tokio or socket2, or a bare descriptor.
//! - On Linux, `Socket` is a ready-made non-blocking socket for proxies, and `Readiness`
//!   says which of many sockets have something to receive.
//!
//! On Linux one system call moves up to 64 messages (recvmmsg(2), sendmmsg(2)), and a
//! message may be a burst: datagrams of one size, but for the last, that the kernel joins
//! (UDP_GRO) and splits (UDP_SEGMENT, both in udp(7)). QUIC, WireGuard and media servers
//! send bursts, and one trip through the kernel serves the whole burst. Whether the
//! kernel can is asked once; without it, and on other systems, each datagram is a
//! system call of its own.
//!
//! All unsafe code of the proxy and the SDK is here, in `linux`.
//!
//! # Example
//!
//! An echo server that answers a batch with one call:
//!
//! ```
//! use std::net::{SocketAddr, UdpSocket};
//!
//! use ppv2_udp::{Batch, Outgoing, SocketState, Transmit};
//!
//! let socket = UdpSocket::bind("127.0.0.1:0")?;
//! let state = SocketState::new(&socket, socket.local_addr()?);
//! # let client = UdpSocket::bind("127.0.0.1:0")?;
//! # client.send_to(b"hello", socket.local_addr()?)?;
//! let mut batch = Batch::new(16);
//! let received = state.receive(&socket, &mut batch, 0..16, true)?;
//! let echo = |slot| {
//!     let datagram = batch.received(slot).expect("the slot was just filled");
//!     let outgoing = Outgoing { to: Some(datagram.peer), ..Outgoing::default() };
//!     Transmit::burst(outgoing, batch.payload(slot), datagram.segment)
//! };
//! state.send(&socket, received, echo)?;
//! # let mut buffer = [0; 8];
//! # assert_eq!(client.recv(&mut buffer)?, 5);
//! # Ok::<(), std::io::Error>(())
//! ```

#![cfg_attr(
    target_os = "linux",
    expect(
        unsafe_code,
        reason = "the kernel's batch calls and control messages have no safe interface"
    )
)]
#![deny(missing_docs)]

/// Has the examples of the README tested.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod batch;
#[cfg(target_os = "linux")]
mod cause;
#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "linux")]
mod options;
mod portable;
#[cfg(target_os = "linux")]
mod probe;
#[cfg(target_os = "linux")]
mod socket;
mod state;
#[cfg(test)]
mod tests;
mod transmit;

pub use rustix::fd::AsFd;

pub use batch::{BATCH, Batch, MAX_DATAGRAM, Part, Received, SLOT, TrafficClass};
#[cfg(target_os = "linux")]
pub use cause::Cause;
#[cfg(all(target_os = "linux", feature = "sigpipe"))]
pub use linux::restore_sigpipe;
#[cfg(target_os = "linux")]
pub use linux::{READY, Readiness, Waker, look_up_without_plugins};
#[cfg(target_os = "linux")]
pub use probe::{probe, probe_bursts, probe_source, source_towards};
#[cfg(target_os = "linux")]
pub use socket::{Adoptable, Binding, LISTENER_BUFFER, Options, SHARED_BUFFER, Socket};
pub use state::SocketState;
#[cfg(target_os = "linux")]
pub use transmit::SendReport;
pub use transmit::{Outgoing, SendFault, Sent, Transmit};
