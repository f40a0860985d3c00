//! The address block of a header: where it is, until somebody asks what it says.

use core::array;
use core::net::SocketAddr;

use crate::{Origin, Transport};

/// The address block of a header, by family (section 2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Block<'a> {
    /// Command LOCAL: what stands there is skipped.
    Local,
    /// UNSPEC: what stands there is skipped.
    Unspecified,
    Ipv4(Transport, &'a [u8; 12]),
    Ipv6(Transport, &'a [u8; 36]),
    /// The two paths.
    Unix(Transport, &'a [u8; 108], &'a [u8; 108]),
}

impl<'a> Block<'a> {
    #[inline]
    pub(crate) fn origin(self) -> Origin<'a> {
        let ip = |transport, (source, destination)| Origin::Ip {
            transport,
            source,
            destination,
        };
        match self {
            Self::Local => Origin::Local,
            Self::Unspecified => Origin::Unspecified,
            Self::Ipv4(transport, block) => ip(transport, ipv4_pair(block)),
            Self::Ipv6(transport, block) => ip(transport, ipv6_pair(block)),
            Self::Unix(transport, source, destination) => Origin::Unix {
                transport,
                source,
                destination,
            },
        }
    }

    /// Source and destination, if the transport is UDP.
    #[inline]
    pub(crate) fn udp(self) -> Option<(SocketAddr, SocketAddr)> {
        match self {
            Self::Ipv4(Transport::Datagram, block) => Some(ipv4_pair(block)),
            Self::Ipv6(Transport::Datagram, block) => Some(ipv6_pair(block)),
            Self::Ipv4(..) | Self::Ipv6(..) | Self::Unix(..) | Self::Local | Self::Unspecified => {
                None
            }
        }
    }

    /// Whether what stands there says nothing.
    pub(crate) fn is_skipped(self) -> bool {
        matches!(self, Self::Local | Self::Unspecified)
    }
}

#[inline]
fn ipv4_pair(block: &[u8; 12]) -> (SocketAddr, SocketAddr) {
    let [s0, s1, s2, s3, d0, d1, d2, d3, sp0, sp1, dp0, dp1] = *block;
    let source = SocketAddr::from(([s0, s1, s2, s3], u16::from_be_bytes([sp0, sp1])));
    let destination = SocketAddr::from(([d0, d1, d2, d3], u16::from_be_bytes([dp0, dp1])));
    (source, destination)
}

#[inline]
fn ipv6_pair(block: &[u8; 36]) -> (SocketAddr, SocketAddr) {
    let [ips @ .., sp0, sp1, dp0, dp1] = block;
    let source: [u8; 16] = array::from_fn(|i| ips[i]);
    let destination: [u8; 16] = array::from_fn(|i| ips[16 + i]);
    let source = SocketAddr::from((source, u16::from_be_bytes([*sp0, *sp1])));
    let destination = SocketAddr::from((destination, u16::from_be_bytes([*dp0, *dp1])));
    (source, destination)
}
