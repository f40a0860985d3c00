//! Replies as `ppv2_udp` sends them.

use std::io;
use std::net::{IpAddr, SocketAddr};

use ppv2_udp::{AsFd, Outgoing as Target, SocketState, Transmit};

use crate::Way;

/// One datagram to send, and how. Those of one call leave from one address.
pub(crate) type Outgoing<'d> = (&'d [u8], Way);

/// Sends from the front, and returns how many datagrams were sent; an error if it is
/// the first that can't be. They leave from `source`, or from the address that the
/// socket is bound to.
pub(crate) fn send(
    socket: &impl AsFd,
    state: &SocketState,
    datagrams: &[Outgoing<'_>],
    source: Option<IpAddr>,
) -> io::Result<usize> {
    state.send(socket, datagrams.len(), |index| {
        let (payload, way) = datagrams[index];
        let target = Target {
            to: Some(way.to),
            from: source.map(|ip| SocketAddr::new(ip, 0)),
            ..Target::default()
        };
        Transmit::datagram(target, payload)
    })
}
