//! The Linux side of [`net`](super): recvmmsg, sendmmsg and control messages.
//!
//! Facts from socket(7), ip(7), ipv6(7), cmsg(3), recvmmsg(2), sendmmsg(2).
#![expect(
    unsafe_code,
    reason = "the kernel's batch calls and control messages have no safe interface"
)]

use std::io;
use std::mem::{self, MaybeUninit};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::AsRawFd;
use std::ptr;

use libc::{c_int, c_void, cmsghdr, iovec, mmsghdr, msghdr, sockaddr_storage, socklen_t};

use super::{
    BATCH, Batch, CAPACITY, Cause, Ecn, HEADROOM, Outgoing, Received, STRIDE, SendFault, Socket,
};

/// Room for the control messages of one datagram: packet info (40 bytes with
/// its header, IPv6) and traffic class (24), and slack for what other options
/// might add. `u64` for the alignment of `cmsghdr`.
type Control = [u64; 16];

/// What the kernel is pointed at during one call. Nothing in it outlives the
/// call, so it stays on the stack and is filled only as far as it is used.
struct Scratch {
    names: [sockaddr_storage; BATCH],
    controls: [Control; BATCH],
    vectors: [iovec; BATCH],
    headers: [mmsghdr; BATCH],
}

pub(super) fn receive(
    socket: &Socket,
    batch: &mut Batch,
    first: usize,
    end: usize,
) -> io::Result<usize> {
    let end = end.min(BATCH);
    let count = end.saturating_sub(first);
    let bytes = batch.bytes.as_mut_ptr();
    let mut scratch = MaybeUninit::<Scratch>::uninit();
    let scratch = scratch.as_mut_ptr();
    for i in 0..count {
        let offset = (first + i) * STRIDE + HEADROOM;
        // SAFETY: `i < BATCH` indexes the arrays of `scratch`, which lives until
        // the function returns; fields are written before anything reads them.
        // `offset + CAPACITY <= BATCH * STRIDE`, the length of `batch.bytes`,
        // since `first + i < BATCH`.
        unsafe {
            (*scratch).vectors[i] = iovec {
                iov_base: bytes.add(offset).cast(),
                iov_len: CAPACITY,
            };
            let mut header: msghdr = mem::zeroed();
            header.msg_name = (&raw mut (*scratch).names[i]).cast();
            header.msg_namelen = len_of::<sockaddr_storage>();
            header.msg_iov = &raw mut (*scratch).vectors[i];
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut (*scratch).controls[i]).cast();
            header.msg_controllen = size_of::<Control>() as _;
            (*scratch).headers[i] = mmsghdr {
                msg_hdr: header,
                msg_len: 0,
            };
        }
    }
    let received = loop {
        // SAFETY: the first `count` headers are initialised, and point at
        // names, vectors, control buffers and `batch.bytes`, all of which stay
        // in place and untouched by others during the call.
        let n = unsafe {
            libc::recvmmsg(
                socket.fd(),
                (&raw mut (*scratch).headers).cast(),
                libc::c_uint::try_from(count).unwrap_or(0),
                libc::MSG_DONTWAIT as _,
                ptr::null_mut(),
            )
        };
        match usize::try_from(n) {
            Ok(n) => break n,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    };
    for i in 0..received {
        // SAFETY: the kernel has filled the first `received` headers and what
        // they point at.
        let read = unsafe { read_received(socket, &(*scratch).headers[i]) };
        batch.received[first + i] = Some(read);
        batch.prefix[first + i] = 0;
    }
    Ok(received)
}

/// Turns what the kernel wrote about one datagram into plain values.
///
/// # Safety
///
/// `message` was filled by `recvmmsg`, and its name and control pointers are
/// still valid.
unsafe fn read_received(socket: &Socket, message: &mmsghdr) -> Received {
    let header = &message.msg_hdr;
    let mut received = Received {
        // SAFETY: the name was filled by the kernel, by this function's contract.
        peer: unsafe { read_name(header.msg_name.cast(), header.msg_namelen) }
            .unwrap_or(socket.bound),
        local: socket.bound,
        group: false,
        ecn: Ecn::default(),
        len: (message.msg_len as usize).min(CAPACITY),
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
                (libc::IPPROTO_IP, libc::IP_TOS) => received.ecn = Ecn::of(*data),
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                    let class: c_int = ptr::read_unaligned(data.cast());
                    received.ecn = Ecn::of((class & 0xff) as u8);
                }
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    note_v4(&mut received, ptr::read_unaligned(data.cast()));
                }
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

/// `ipi_spec_dst` is the local address that a reply leaves from; it differs
/// from the packet's destination for broadcast and multicast (ip(7)).
fn note_v4(received: &mut Received, info: libc::in_pktinfo) {
    let written_to = Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes());
    let local = Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes());
    received.group = written_to != local;
    received.local = SocketAddrV4::new(local, received.local.port()).into();
}

fn note_v6(received: &mut Received, info: libc::in6_pktinfo) {
    let ip = Ipv6Addr::from(info.ipi6_addr.s6_addr);
    let scope = if super::needs_scope(ip.into()) {
        info.ipi6_ifindex
    } else {
        0
    };
    received.group = ip.is_multicast();
    received.local = SocketAddrV6::new(ip, received.local.port(), 0, scope).into();
}

pub(super) fn send(
    socket: &Socket,
    batch: &Batch,
    slots: &[usize],
    outgoing: &impl Fn(usize) -> Outgoing,
    fault: &mut impl FnMut(usize, SendFault),
) -> usize {
    let count = slots.len().min(BATCH);
    let mut scratch = MaybeUninit::<Scratch>::uninit();
    let scratch = scratch.as_mut_ptr();
    for (i, &slot) in slots.iter().take(count).enumerate() {
        let bytes = wire_bytes(batch, slot);
        let out = outgoing(slot);
        // SAFETY: `i < BATCH` indexes the arrays of `scratch`, which lives until
        // the function returns; fields are written before anything reads them.
        // The kernel only reads what `iov_base` points at.
        unsafe {
            (*scratch).vectors[i] = iovec {
                iov_base: bytes.as_ptr().cast_mut().cast(),
                iov_len: bytes.len(),
            };
            let mut header: msghdr = mem::zeroed();
            if let Some(to) = out.to {
                let name = &raw mut (*scratch).names[i];
                header.msg_name = name.cast();
                header.msg_namelen = write_name(to, name);
            }
            header.msg_iov = &raw mut (*scratch).vectors[i];
            header.msg_iovlen = 1;
            let from = out.from.filter(|_| socket.wildcard);
            if from.is_some() || out.ecn != Ecn::default() {
                (*scratch).controls[i] = [0; 16];
                header.msg_control = (&raw mut (*scratch).controls[i]).cast();
                header.msg_controllen = size_of::<Control>() as _;
                write_control(&mut header, from, out.ecn, socket.bound.is_ipv6());
            }
            (*scratch).headers[i] = mmsghdr {
                msg_hdr: header,
                msg_len: 0,
            };
        }
    }
    let (mut next, mut sent) = (0, 0);
    // Error of the datagram at `next` that may speak of an earlier one, and how
    // often that has been hoped for.
    let mut hoped: Option<(io::Error, u32)> = None;
    while next < count {
        // SAFETY: headers `next..count` are initialised and point at memory that
        // lives in `scratch` and `batch`, which this function borrows.
        let n = unsafe {
            libc::sendmmsg(
                socket.fd(),
                (&raw mut (*scratch).headers).cast::<mmsghdr>().add(next),
                libc::c_uint::try_from(count - next).unwrap_or(0),
                libc::MSG_DONTWAIT as _,
            )
        };
        if let Ok(n) = usize::try_from(n) {
            if let Some((error, _)) = hoped.take() {
                fault(slots[next], SendFault::Earlier(error));
            }
            next += n;
            sent += n;
            continue;
        }
        let error = io::Error::last_os_error();
        let tries = hoped.as_ref().map_or(0, |(_, tries)| *tries);
        if error.kind() == io::ErrorKind::Interrupted {
            continue;
        } else if tries < TRIES && may_be_of_an_earlier_datagram(&error) {
            hoped = Some((error, tries + 1));
        } else {
            hoped = None;
            fault(slots[next], SendFault::Lost(error));
            next += 1;
        }
    }
    sent
}

/// How often to try a datagram whose failure may be an earlier one's. More than
/// one report can be waiting; someone who forges them must not keep us here.
const TRIES: u32 = 3;

/// Errors that ICMP left on a connected socket: they speak of something sent
/// before, and reading them clears them (ip(7), `IP_RECVERR`). Some can also be
/// this datagram's own, which trying again tells.
fn may_be_of_an_earlier_datagram(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNREFUSED
                | libc::EHOSTUNREACH
                | libc::ENETUNREACH
                | libc::EHOSTDOWN
                | libc::ENOPROTOOPT
                | libc::EPROTO
                | libc::EMSGSIZE
        )
    )
}

pub(super) fn cause(error: &io::Error) -> Cause {
    match error.raw_os_error() {
        Some(libc::EAGAIN) => Cause::WouldBlock,
        Some(libc::EMSGSIZE) => Cause::Oversize,
        Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ENETDOWN | libc::EHOSTDOWN) => {
            Cause::Unreachable
        }
        Some(libc::EMFILE | libc::ENFILE) => Cause::NoDescriptors,
        Some(libc::EADDRNOTAVAIL) => Cause::NoPorts,
        Some(libc::ENOBUFS | libc::ENOMEM) => Cause::NoMemory,
        _ => Cause::Other,
    }
}

fn wire_bytes(batch: &Batch, slot: usize) -> &[u8] {
    let payload = slot * STRIDE + HEADROOM;
    let start = payload - batch.prefix[slot];
    &batch.bytes[start..start + batch.wire_len(slot)]
}

/// Appends packet info for `from` and the traffic class for `ecn` to the
/// control buffer of `header`, and cuts `msg_controllen` to what was written.
///
/// # Safety
///
/// `header.msg_control` points at a zeroed [`Control`], whose size is
/// `header.msg_controllen`.
unsafe fn write_control(header: &mut msghdr, from: Option<SocketAddr>, ecn: Ecn, v6: bool) {
    let mut used = 0;
    // SAFETY: by the contract the buffer is zeroed and large enough for both
    // messages (40 + 24 of 128 bytes), so neither pointer is null.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(header);
        match from {
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
        if ecn != Ecn::default() {
            let class = c_int::from(ecn.bits());
            used += if v6 {
                write_message(at, libc::IPPROTO_IPV6, libc::IPV6_TCLASS, class)
            } else {
                write_message(at, libc::IPPROTO_IP, libc::IP_TOS, class)
            };
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
unsafe fn write_name(address: SocketAddr, name: *mut sockaddr_storage) -> socklen_t {
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
const fn len_of<T>() -> socklen_t {
    size_of::<T>() as socklen_t
}

/// Asks for the local address of every received datagram.
pub(super) fn report_local_address(socket: &socket2::Socket, v6: bool) -> io::Result<()> {
    if v6 {
        set(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)
    } else {
        set(socket, libc::IPPROTO_IP, libc::IP_PKTINFO, 1)
    }
}

/// Never fragment, or fragment wherever it is needed, routers included.
pub(super) fn set_fragmentation(
    socket: &socket2::Socket,
    v6: bool,
    dont_fragment: bool,
) -> io::Result<()> {
    let (level, name, value) = match (v6, dont_fragment) {
        (false, true) => (
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            libc::IP_PMTUDISC_DO,
        ),
        (false, false) => (
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            libc::IP_PMTUDISC_DONT,
        ),
        (true, true) => (
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_DO,
        ),
        (true, false) => (
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_DONT,
        ),
    };
    set(socket, level, name, value)
}

/// The path MTU that the kernel holds for a connected socket, bytes.
pub(super) fn path_mtu(socket: &socket2::Socket, v6: bool) -> io::Result<usize> {
    let (level, name) = if v6 {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU)
    } else {
        (libc::IPPROTO_IP, libc::IP_MTU)
    };
    let mut value: c_int = 0;
    let mut len = len_of::<c_int>();
    // SAFETY: `value` and `len` are valid for the write of an int and its size.
    let status = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw mut value).cast::<c_void>(),
            &raw mut len,
        )
    };
    if status == 0 {
        Ok(usize::try_from(value).unwrap_or(0))
    } else {
        Err(io::Error::last_os_error())
    }
}

fn set(socket: &socket2::Socket, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
    // SAFETY: the option value is an int that outlives the call.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast::<c_void>(),
            len_of::<c_int>(),
        )
    };
    if status == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
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
