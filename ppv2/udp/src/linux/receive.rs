//! recvmmsg: datagrams, each with what the kernel wrote about it in control messages:
//! addresses, packet info, traffic class, burst size and overflows (cmsg(3), ip(7),
//! ipv6(7), udp(7)).

use std::io;
use std::mem::{self, MaybeUninit};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use libc::{c_int, iovec, mmsghdr, msghdr, sockaddr_in, sockaddr_in6, socklen_t, timespec};

use super::{MESSAGES, Name, len_of, number};
use crate::{Received, TrafficClass};

/// Room for the control messages of a received datagram: packet info for both families
/// (72 bytes), traffic class, burst size and overflows (24 each), and slack for what the
/// socket's owner may have asked for. If there were too little, the kernel would leave out
/// what comes last. `u64` for the alignment of `cmsghdr`.
pub(super) type ControlIn = [u64; 24];

/// What the kernel is pointed at during one receive call. Nothing in it outlives the call,
/// so it stays on the stack and is filled only as far as it is used.
struct Scratch<const N: usize> {
    names: [Name; N],
    controls: [ControlIn; N],
    vectors: [iovec; N],
    headers: [mmsghdr; N],
}

/// Fills `buffers` from the first on, and notes in `received` what is in each.
pub(crate) fn receive<'b>(
    socket: BorrowedFd<'_>,
    bound: SocketAddr,
    mut buffers: impl Iterator<Item = &'b mut [u8]>,
    received: &mut [Option<Received>],
    wait: bool,
) -> io::Result<usize> {
    if received.len() == 1 {
        return receive_once::<1>(socket, bound, &mut buffers, received, wait);
    }
    let mut filled = 0;
    for received in received.chunks_mut(MESSAGES) {
        let wait = wait && filled == 0;
        match receive_once::<MESSAGES>(socket, bound, &mut buffers, received, wait) {
            Ok(count) => filled += count,
            Err(error) if filled == 0 => return Err(error),
            // It is reported again, or is about an earlier datagram: what was received
            // matters more.
            Err(_) => break,
        }
        if filled % MESSAGES != 0 {
            break;
        }
    }
    Ok(filled)
}

/// As `receive`, for at most `N` of `received`.
fn receive_once<'b, const N: usize>(
    socket: BorrowedFd<'_>,
    bound: SocketAddr,
    buffers: &mut impl Iterator<Item = &'b mut [u8]>,
    received: &mut [Option<Received>],
    wait: bool,
) -> io::Result<usize> {
    let mut scratch = MaybeUninit::<Scratch<N>>::uninit();
    let scratch = scratch.as_mut_ptr();
    let mut count = 0;
    for (i, buffer) in buffers.take(received.len().min(N)).enumerate() {
        // SAFETY: `i < N` indexes the arrays of `scratch`, which lives until the
        // function returns; fields are written before anything reads them.
        unsafe {
            (*scratch).vectors[i] = iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: buffer.len(),
            };
            let mut header: msghdr = mem::zeroed();
            header.msg_name = (&raw mut (*scratch).names[i]).cast();
            header.msg_namelen = len_of::<Name>();
            header.msg_iov = &raw mut (*scratch).vectors[i];
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut (*scratch).controls[i]).cast();
            header.msg_controllen = size_of::<ControlIn>() as _;
            (*scratch).headers[i] = mmsghdr {
                msg_hdr: header,
                msg_len: 0,
            };
        }
        count = i + 1;
    }
    // SAFETY: the first `count` headers are initialised, and point at names, vectors,
    // control buffers in `scratch` and at the buffers, which are borrowed for `'b`; all of
    // them stay in place and untouched by others during the call.
    let filled = unsafe { recvmmsg(socket, (&raw mut (*scratch).headers).cast(), count, wait)? };
    for (i, received) in received.iter_mut().enumerate().take(filled) {
        // SAFETY: the kernel has filled the first `filled` headers and what they point at.
        unsafe { read_received(bound, &(*scratch).headers[i], received) };
    }
    Ok(filled)
}

/// recvmmsg(2), or recvmsg(2) for a single message, which is cheaper. Returns how many
/// messages were received.
///
/// # Safety
///
/// `messages` points at `count` messages whose names, vectors and control buffers are
/// valid for writes.
unsafe fn recvmmsg(
    socket: BorrowedFd<'_>,
    messages: *mut mmsghdr,
    count: usize,
    wait: bool,
) -> io::Result<usize> {
    let socket = socket.as_raw_fd();
    // SAFETY: the arguments are those of the calls' manual pages, and valid by the
    // caller's promise.
    unsafe {
        if count == 1 {
            let flags: c_int = if wait { 0 } else { libc::MSG_DONTWAIT };
            let header = &raw mut (*messages).msg_hdr;
            let len = libc::syscall(libc::SYS_recvmsg, socket, header, flags);
            (*messages).msg_len = u32::try_from(len).map_err(|_| io::Error::last_os_error())?;
            return Ok(1);
        }
        let flags = if wait {
            libc::MSG_WAITFORONE
        } else {
            libc::MSG_DONTWAIT
        };
        number(libc::syscall(
            libc::SYS_recvmmsg,
            socket,
            messages,
            count,
            flags,
            ptr::null_mut::<timespec>(),
        ))
    }
}

/// Converts what the kernel wrote about a datagram, in place.
///
/// # Safety
///
/// `message` was filled by `recvmmsg`, and its name, a [`Name`], and control pointers are
/// still valid.
unsafe fn read_received(bound: SocketAddr, message: &mmsghdr, received: &mut Option<Received>) {
    let header = &message.msg_hdr;
    // SAFETY: the name was filled by the kernel, by this function's contract.
    let peer = unsafe { read_name(&*header.msg_name.cast(), header.msg_namelen) };
    // On UDP sockets the kernel always gives a name.
    let peer = peer.unwrap_or(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0).into());
    let received = received.insert(Received::plain(peer, bound, message.msg_len as usize));
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
                    note_v4(received, ptr::read_unaligned(data.cast()));
                }
                // A socket for both families reports what came by IPv4 twice, first in IPv6
                // form; the IPv4 form knows the interface's address of a broadcast.
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    note_v6(received, ptr::read_unaligned(data.cast()));
                }
                _ => {}
            }
            next = libc::CMSG_NXTHDR(header, next);
        }
    }
}

/// Notes the address that an IPv4 datagram was sent to, and the one that a reply leaves
/// from, which differ for broadcast and multicast (ip(7)).
fn note_v4(received: &mut Received, info: libc::in_pktinfo) {
    let written_to = Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes());
    let mut local = Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes());
    if local.is_unspecified() {
        // It came before the socket was to report it, as one that others have bound.
        local = written_to;
    }
    received.group = written_to != local || written_to.is_multicast() || written_to.is_broadcast();
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

/// # Safety
///
/// The first `len` bytes of `name` are initialised.
pub(super) unsafe fn read_name(name: &Name, len: socklen_t) -> Option<SocketAddr> {
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
