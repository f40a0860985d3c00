//! Names and control messages: addresses, packet info, ECN and burst sizes as
//! the kernel writes and reads them (cmsg(3), ip(7), ipv6(7), udp(7)).

use std::mem;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::ptr;

use libc::{c_int, cmsghdr, mmsghdr, msghdr, sockaddr_storage, socklen_t};

use super::super::{CAPACITY, Received, Socket, TrafficClass};

/// Room for the control messages of one call: packet info (40 bytes with its
/// header, IPv6), traffic class, burst size and overflows (24 each), and slack
/// for what other options might add. `u64` for the alignment of `cmsghdr`.
pub(super) type Control = [u64; 16];

/// Turns what the kernel wrote about one datagram into plain values.
///
/// # Safety
///
/// `message` was filled by `recvmmsg`, and its name and control pointers are
/// still valid.
pub(super) unsafe fn read_received(socket: &Socket, message: &mmsghdr) -> Received {
    let header = &message.msg_hdr;
    let mut received = Received {
        // SAFETY: the name was filled by the kernel, by this function's contract.
        peer: unsafe { read_name(header.msg_name.cast(), header.msg_namelen) }
            .unwrap_or(socket.bound),
        local: socket.bound,
        group: false,
        interface: 0,
        overflows: 0,
        class: TrafficClass::default(),
        len: (message.msg_len as usize).min(CAPACITY),
        segment: message.msg_len as usize,
        truncated: header.msg_flags & libc::MSG_TRUNC != 0,
    };
    // SAFETY: `header` describes a control buffer that the kernel filled.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !next.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return null or a whole message
        // within the control buffer; the kernel wrote a value of the size that
        // belongs to each level and type.
        unsafe {
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
                    let info: libc::in_pktinfo = ptr::read_unaligned(data.cast());
                    let written_to = Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes());
                    let local = Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes());
                    received.note_local_v4(written_to, local);
                    received.interface = u32::try_from(info.ipi_ifindex).unwrap_or(0);
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let info: libc::in6_pktinfo = ptr::read_unaligned(data.cast());
                    let ip = Ipv6Addr::from(info.ipi6_addr.s6_addr);
                    received.note_local_v6(ip, info.ipi6_ifindex);
                }
                _ => {}
            }
            next = libc::CMSG_NXTHDR(header, next);
        }
    }
    received
}

/// What is said of a message besides its bytes and addressee.
pub(super) struct Extras {
    /// Source address, on a wildcard socket.
    pub(super) from: Option<SocketAddr>,
    pub(super) class: TrafficClass,
    /// Bytes of each datagram of a burst, headers included.
    pub(super) segment: Option<u16>,
}

impl Extras {
    pub(super) fn is_empty(&self) -> bool {
        self.from.is_none() && self.class == TrafficClass::default() && self.segment.is_none()
    }
}

/// Appends `extras` to the control buffer of `header`, and cuts
/// `msg_controllen` to what was written.
///
/// # Safety
///
/// `header.msg_control` points at a zeroed [`Control`], whose size is
/// `header.msg_controllen`.
pub(super) unsafe fn write_control(header: &mut msghdr, extras: &Extras, v6: bool) {
    let mut used = 0;
    // SAFETY: by the contract the buffer is zeroed and large enough for all
    // messages (40 + 24 + 24 of 128 bytes), so no pointer is null.
    unsafe {
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

/// Writes one control message and returns the bytes that it takes.
///
/// # Safety
///
/// `at` points into a control buffer with room for a message holding a `T`.
unsafe fn write_message<T>(at: *mut cmsghdr, level: c_int, kind: c_int, value: T) -> usize {
    let size = len_of::<T>();
    // SAFETY: room and alignment of the message header are the caller's
    // promise; the value may lie unaligned behind it.
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
/// `name` points at a `sockaddr_storage` whose first `len` bytes are initialised.
unsafe fn read_name(name: *const sockaddr_storage, len: socklen_t) -> Option<SocketAddr> {
    // SAFETY: a name of the length of a family's address is one of that family,
    // and `sockaddr_storage` is aligned for all of them.
    unsafe {
        if len == len_of::<libc::sockaddr_in>() && c_int::from((*name).ss_family) == libc::AF_INET {
            let v4 = &*name.cast::<libc::sockaddr_in>();
            let ip = Ipv4Addr::from(v4.sin_addr.s_addr.to_ne_bytes());
            return Some(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into());
        }
        if len == len_of::<libc::sockaddr_in6>() && c_int::from((*name).ss_family) == libc::AF_INET6
        {
            let v6 = &*name.cast::<libc::sockaddr_in6>();
            let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            let port = u16::from_be(v6.sin6_port);
            // The flow label says nothing of who the client is.
            return Some(SocketAddrV6::new(ip, port, 0, v6.sin6_scope_id).into());
        }
    }
    None
}

/// Writes `address` to `name` and returns its length.
///
/// # Safety
///
/// `name` is valid for writes.
pub(super) unsafe fn write_name(address: SocketAddr, name: *mut sockaddr_storage) -> socklen_t {
    // SAFETY: `sockaddr_storage` is large enough and aligned for every family,
    // and the caller promises that it may be written.
    unsafe {
        match address {
            SocketAddr::V4(address) => {
                let mut v4: libc::sockaddr_in = mem::zeroed();
                v4.sin_family = family(libc::AF_INET);
                v4.sin_port = address.port().to_be();
                v4.sin_addr.s_addr = u32::from_ne_bytes(address.ip().octets());
                ptr::write(name.cast(), v4);
                len_of::<libc::sockaddr_in>()
            }
            SocketAddr::V6(address) => {
                let mut v6: libc::sockaddr_in6 = mem::zeroed();
                v6.sin6_family = family(libc::AF_INET6);
                v6.sin6_port = address.port().to_be();
                v6.sin6_addr.s6_addr = address.ip().octets();
                v6.sin6_scope_id = address.scope_id();
                ptr::write(name.cast(), v6);
                len_of::<libc::sockaddr_in6>()
            }
        }
    }
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
    use std::mem::MaybeUninit;

    use super::*;

    #[test]
    fn names_survive_the_way_through_a_sockaddr() {
        for address in ["203.0.113.7:65535", "[2001:db8::1]:53", "[fe80::1%3]:1"] {
            let address: SocketAddr = address.parse().unwrap();
            let mut name = MaybeUninit::<sockaddr_storage>::zeroed();
            // SAFETY: `name` is writable, and zeroed where nothing is written.
            let back = unsafe {
                let len = write_name(address, name.as_mut_ptr());
                read_name(name.as_ptr(), len)
            };
            assert_eq!(back, Some(address));
        }
    }
}
