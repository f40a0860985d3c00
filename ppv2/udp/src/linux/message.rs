//! Names and control messages: addresses, packet info, traffic class and burst sizes as
//! the kernel writes and reads them (cmsg(3), ip(7), ipv6(7), udp(7)).

use std::mem;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::ptr;

use libc::{c_int, cmsghdr, mmsghdr, msghdr, sockaddr_in, sockaddr_in6, socklen_t};

use crate::{Received, TrafficClass};

/// Room for the control messages of a received datagram: packet info for both families
/// (72 bytes), traffic class, burst size and overflows (24 each), and slack for what the
/// socket's owner may have asked for. If there were too little, the kernel would leave out
/// what comes last. `u64` for the alignment of `cmsghdr`.
pub(super) type ControlIn = [u64; 24];

/// Room for the control messages of a message to send: packet info (40 bytes), traffic
/// class and burst size (24 each).
pub(super) type ControlOut = [u64; 11];

/// The name of an IPv4 or IPv6 socket.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) union Name {
    v4: sockaddr_in,
    v6: sockaddr_in6,
}

/// Converts what the kernel wrote about a datagram.
///
/// # Safety
///
/// `message` was filled by `recvmmsg`, and its name, a [`Name`], and control pointers are
/// still valid.
pub(super) unsafe fn read_received(bound: SocketAddr, message: &mmsghdr) -> Received {
    let header = &message.msg_hdr;
    // SAFETY: the name was filled by the kernel, by this function's contract.
    let peer = unsafe { read_name(&*header.msg_name.cast(), header.msg_namelen) };
    // On UDP sockets the kernel always gives a name.
    let peer = peer.unwrap_or(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0).into());
    let mut received = Received::plain(peer, bound, message.msg_len as usize);
    received.truncated = header.msg_flags & libc::MSG_TRUNC != 0;
    // SAFETY: `header` describes a control buffer that the kernel filled. CMSG_FIRSTHDR and
    // CMSG_NXTHDR return null or a whole message in it, and the kernel wrote a value of the
    // size that belongs to each level and type.
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(header);
        while !next.is_null() {
            let data = libc::CMSG_DATA(next);
            match ((*next).cmsg_level, (*next).cmsg_type) {
                (libc::IPPROTO_IP, libc::IP_TOS) => received.class = TrafficClass(*data),
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                    let class: c_int = ptr::read_unaligned(data.cast());
                    received.class = TrafficClass((class & 0xff) as u8);
                }
                (libc::SOL_SOCKET, libc::SO_RXQ_OVFL) => {
                    received.overflows = ptr::read_unaligned(data.cast());
                }
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    let size: c_int = ptr::read_unaligned(data.cast());
                    received.segment = usize::try_from(size).unwrap_or(received.len);
                }
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    note_v4(&mut received, ptr::read_unaligned(data.cast()));
                }
                // A socket for both families reports what came by IPv4 twice, first in IPv6
                // form; the IPv4 form knows the interface's address of a broadcast.
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    note_v6(&mut received, ptr::read_unaligned(data.cast()));
                }
                _ => {}
            }
            next = libc::CMSG_NXTHDR(header, next);
        }
    }
    received
}

/// Notes the address that an IPv4 datagram was sent to, and the one that a reply leaves
/// from, which differ for broadcast and multicast (ip(7)).
fn note_v4(received: &mut Received, info: libc::in_pktinfo) {
    let written_to = Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes());
    let local = Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes());
    received.group = written_to != local;
    received.local = SocketAddrV4::new(local, received.local.port()).into();
    received.interface = u32::try_from(info.ipi_ifindex).unwrap_or(0);
}

fn note_v6(received: &mut Received, info: libc::in6_pktinfo) {
    let ip = Ipv6Addr::from(info.ipi6_addr.s6_addr);
    let scope = if ip.is_unicast_link_local() {
        info.ipi6_ifindex
    } else {
        0
    };
    received.group = ip.is_multicast();
    received.local = SocketAddrV6::new(ip, received.local.port(), 0, scope).into();
    received.interface = info.ipi6_ifindex;
}

/// What a message carries besides bytes and recipient.
pub(super) struct Extras {
    pub(super) from: Option<SocketAddr>,
    pub(super) class: TrafficClass,
    /// Bytes of each datagram of a burst, header included.
    pub(super) segment: Option<u16>,
}

impl Extras {
    pub(super) fn is_empty(&self) -> bool {
        self.from.is_none() && self.class == TrafficClass::default() && self.segment.is_none()
    }
}

/// Points `header` at `control`, filled with `extras`.
///
/// # Safety
///
/// `control` is valid for writes, and stays in place until the kernel has read it.
pub(super) unsafe fn write_control(
    header: &mut msghdr,
    control: *mut ControlOut,
    extras: &Extras,
    v6: bool,
) {
    let mut used = 0;
    // SAFETY: the buffer is zeroed first, as CMSG_NXTHDR asks for, and has room for all
    // three messages, so no pointer is null.
    unsafe {
        *control = ControlOut::default();
        header.msg_control = control.cast();
        header.msg_controllen = size_of::<ControlOut>() as _;
        let mut at = libc::CMSG_FIRSTHDR(header);
        match extras.from {
            Some(SocketAddr::V4(from)) => {
                let mut info: libc::in_pktinfo = mem::zeroed();
                info.ipi_spec_dst.s_addr = u32::from_ne_bytes(from.ip().octets());
                used += write_message(at, libc::IPPROTO_IP, libc::IP_PKTINFO, info);
                at = libc::CMSG_NXTHDR(header, at);
            }
            Some(SocketAddr::V6(from)) => {
                let mut info: libc::in6_pktinfo = mem::zeroed();
                info.ipi6_addr.s6_addr = from.ip().octets();
                info.ipi6_ifindex = from.scope_id();
                used += write_message(at, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, info);
                at = libc::CMSG_NXTHDR(header, at);
            }
            None => {}
        }
        if extras.class != TrafficClass::default() {
            let class = c_int::from(extras.class.0);
            used += if v6 {
                write_message(at, libc::IPPROTO_IPV6, libc::IPV6_TCLASS, class)
            } else {
                write_message(at, libc::IPPROTO_IP, libc::IP_TOS, class)
            };
            at = libc::CMSG_NXTHDR(header, at);
        }
        if let Some(segment) = extras.segment {
            used += write_message(at, libc::SOL_UDP, libc::UDP_SEGMENT, segment);
        }
    }
    header.msg_controllen = used as _;
}

/// Writes a control message and returns the bytes that it takes.
///
/// # Safety
///
/// `at` points into a control buffer with room for a message holding a `T`.
unsafe fn write_message<T>(at: *mut cmsghdr, level: c_int, kind: c_int, value: T) -> usize {
    let size = len_of::<T>();
    // SAFETY: room and alignment of the message header are the caller's promise; the value
    // may lie unaligned behind it.
    unsafe {
        (*at).cmsg_level = level;
        (*at).cmsg_type = kind;
        (*at).cmsg_len = libc::CMSG_LEN(size) as _;
        ptr::write_unaligned(libc::CMSG_DATA(at).cast(), value);
        libc::CMSG_SPACE(size) as usize
    }
}

/// # Safety
///
/// The first `len` bytes of `name` are initialised.
unsafe fn read_name(name: &Name, len: socklen_t) -> Option<SocketAddr> {
    // SAFETY: both families' names begin with the family, and a name of the length of a
    // family's name is one of that family.
    unsafe {
        if len == len_of::<sockaddr_in>() && c_int::from(name.v4.sin_family) == libc::AF_INET {
            let v4 = name.v4;
            let ip = Ipv4Addr::from(v4.sin_addr.s_addr.to_ne_bytes());
            return Some(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into());
        }
        if len == len_of::<sockaddr_in6>() && c_int::from(name.v6.sin6_family) == libc::AF_INET6 {
            let v6 = name.v6;
            let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            let port = u16::from_be(v6.sin6_port);
            // The flow label does not identify the sender.
            return Some(SocketAddrV6::new(ip, port, 0, v6.sin6_scope_id).into());
        }
    }
    None
}

/// `address` as a name, and the length of that. An IPv4 one is mapped to IPv6 if `v6`: the
/// socket is one for IPv6.
pub(super) fn name_of(address: SocketAddr, v6: bool) -> (Name, socklen_t) {
    let (ip, scope) = match address {
        SocketAddr::V4(v4) if !v6 => {
            let name = sockaddr_in {
                sin_family: family(libc::AF_INET),
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(v4.ip().octets()),
                },
                sin_zero: [0; 8],
            };
            return (Name { v4: name }, len_of::<sockaddr_in>());
        }
        SocketAddr::V4(v4) => (v4.ip().to_ipv6_mapped(), 0),
        SocketAddr::V6(v6) => (*v6.ip(), v6.scope_id()),
    };
    let name = sockaddr_in6 {
        sin6_family: family(libc::AF_INET6),
        sin6_port: address.port().to_be(),
        sin6_flowinfo: 0,
        sin6_addr: libc::in6_addr {
            s6_addr: ip.octets(),
        },
        sin6_scope_id: scope,
    };
    (Name { v6: name }, len_of::<sockaddr_in6>())
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "families are small numbers"
)]
const fn family(family: c_int) -> libc::sa_family_t {
    family as libc::sa_family_t
}

#[expect(clippy::cast_possible_truncation, reason = "structs are small")]
pub(super) const fn len_of<T>() -> socklen_t {
    size_of::<T>() as socklen_t
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_name_keeps_the_address() {
        for address in ["203.0.113.7:65535", "[2001:db8::1]:53", "[fe80::1%3]:1"] {
            let address: SocketAddr = address.parse().unwrap();
            let (name, len) = name_of(address, address.is_ipv6());
            // SAFETY: all of `name` that is in use is initialised.
            let back = unsafe { read_name(&name, len) };
            assert_eq!(back, Some(address));
        }
    }

    #[test]
    fn an_ipv4_recipient_is_mapped_on_an_ipv6_socket() {
        let (name, len) = name_of("203.0.113.7:9".parse().unwrap(), true);
        // SAFETY: as above.
        let back = unsafe { read_name(&name, len) };
        assert_eq!(back, Some("[::ffff:203.0.113.7]:9".parse().unwrap()));
    }
}
