//! The address of this host that a datagram was sent to: a socket that is bound to
//! all of them has to answer from that one (IP_PKTINFO in ip(7), IPV6_PKTINFO in
//! ipv6(7)).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nix::sys::socket::ControlMessageOwned;
use nix::sys::socket::sockopt::{Ipv4PacketInfo, Ipv6RecvPacketInfo};
use nix::sys::socket::{getsockopt, setsockopt};
use rustix::fd::OwnedFd;

/// Level and type of the control messages, and the options that ask for them.
pub(crate) const IPV4: (i32, i32) = (0, 8);
pub(crate) const IPV6: (i32, i32) = (41, 50);
pub(crate) const OPTIONS: [(i32, i32); 2] = [(0, 8), (41, 49)];

/// Bytes for both control messages.
pub(crate) const ROOM: usize = 128;

/// Asks for packet information; whether it comes, and whether the socket's owner
/// had asked before.
pub(crate) fn ask(fd: &OwnedFd, ipv6: bool) -> (bool, bool) {
    let asked = getsockopt(fd, Ipv4PacketInfo).unwrap_or(false)
        || (ipv6 && getsockopt(fd, Ipv6RecvPacketInfo).unwrap_or(false));
    let v4 = setsockopt(fd, Ipv4PacketInfo, &true).is_ok();
    let v6 = ipv6 && setsockopt(fd, Ipv6RecvPacketInfo, &true).is_ok();
    (v4 || v6, asked)
}

/// What one control message says, if a reply can leave from it: `known` is what
/// those before said. Of a broadcast, that is the address of the interface.
pub(crate) fn better(
    known: Option<IpAddr>,
    control: &ControlMessageOwned,
    peer: IpAddr,
) -> Option<IpAddr> {
    if let ControlMessageOwned::Ipv4PacketInfo(info) = control {
        let ip = Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes());
        usable(ip.into(), peer).or(known)
    } else if let ControlMessageOwned::Ipv6PacketInfo(info) = control {
        let ip = Ipv6Addr::from(info.ipi6_addr.s6_addr);
        known.or_else(|| usable(ip.into(), peer))
    } else {
        known
    }
}

/// As `better`, for a control message as Python has it.
pub(crate) fn better_of_bytes(
    known: Option<IpAddr>,
    kind: (i32, i32),
    data: &[u8],
    peer: IpAddr,
) -> Option<IpAddr> {
    if kind == IPV4 {
        // in_pktinfo: interface, ipi_spec_dst, ipi_addr.
        let ip = data.get(4..8).and_then(|ip| <[u8; 4]>::try_from(ip).ok());
        ip.and_then(|ip| usable(ip.into(), peer)).or(known)
    } else if kind == IPV6 {
        let ip = data.get(..16).and_then(|ip| <[u8; 16]>::try_from(ip).ok());
        known.or_else(|| ip.and_then(|ip| usable(ip.into(), peer)))
    } else {
        known
    }
}

/// The control message that has a datagram leave from `local`, as Python has it.
pub(crate) fn to_send(local: IpAddr) -> ((i32, i32), Vec<u8>) {
    match local {
        IpAddr::V4(ip) => {
            let parts = [[0; 4], ip.octets(), [0; 4]];
            (IPV4, parts.concat())
        }
        IpAddr::V6(ip) => {
            let mut data = ip.octets().to_vec();
            data.extend([0; 4]);
            (IPV6, data)
        }
    }
}

/// A link-local address needs the interface, which the peer's address then has.
fn usable(ip: IpAddr, peer: IpAddr) -> Option<IpAddr> {
    let link_local = |ip: IpAddr| matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
    let ip = ip.to_canonical();
    let usable =
        !ip.is_unspecified() && !ip.is_multicast() && (!link_local(ip) || link_local(peer));
    usable.then_some(ip)
}
