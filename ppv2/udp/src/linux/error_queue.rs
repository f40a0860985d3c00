//! What the network says of datagrams sent earlier: recvmsg with MSG_ERRQUEUE (IP_RECVERR in
//! ip(7), IPV6_RECVERR in ipv6(7)).

use std::io;
use std::mem::{self, MaybeUninit};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use libc::{iovec, msghdr, sock_extended_err};

use super::receive::read_name;
use super::{Name, len_of, number};
use crate::SendReport;

/// Room for the control messages of a report: the error with its sender (64 bytes), packet
/// info for both families (72), traffic class and overflows (24 each), and slack. `u64` for
/// the alignment of `cmsghdr`.
type Control = [u64; 32];

/// Takes the first report from the socket's error queue.
pub(crate) fn receive_error(socket: BorrowedFd<'_>) -> io::Result<SendReport> {
    let mut name = MaybeUninit::<Name>::uninit();
    let mut control = MaybeUninit::<Control>::uninit();
    // The datagram itself follows, which nobody needs.
    let mut nothing = iovec {
        iov_base: ptr::null_mut(),
        iov_len: 0,
    };
    // SAFETY: a `msghdr` of zeros is valid.
    let mut header: msghdr = unsafe { mem::zeroed() };
    header.msg_name = name.as_mut_ptr().cast();
    header.msg_namelen = len_of::<Name>();
    header.msg_iov = &raw mut nothing;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of::<Control>() as _;
    let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
    // SAFETY: what `header` points at outlives the call, and is valid for writes.
    number(unsafe {
        libc::syscall(
            libc::SYS_recvmsg,
            socket.as_raw_fd(),
            &raw mut header,
            flags,
        )
    })?;
    // SAFETY: the kernel has filled the name as far as `msg_namelen` says.
    let to = unsafe { read_name(&*name.as_ptr(), header.msg_namelen) };
    let mut report: Option<sock_extended_err> = None;
    let mut from = None;
    // SAFETY: the kernel has filled the control buffer. CMSG_FIRSTHDR and CMSG_NXTHDR return
    // null or a whole message in it, and each has a value of the size that belongs to its
    // level and type.
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(&raw const header);
        while !next.is_null() {
            let data = libc::CMSG_DATA(next);
            match ((*next).cmsg_level, (*next).cmsg_type) {
                (libc::IPPROTO_IP, libc::IP_RECVERR) | (libc::IPPROTO_IPV6, libc::IPV6_RECVERR) => {
                    report = Some(ptr::read_unaligned(data.cast()));
                }
                // The report was sent to the address that the datagram came from.
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let info: libc::in_pktinfo = ptr::read_unaligned(data.cast());
                    let ip = Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes());
                    from = Some(IpAddr::V4(ip));
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let info: libc::in6_pktinfo = ptr::read_unaligned(data.cast());
                    from = Some(IpAddr::V6(Ipv6Addr::from(info.ipi6_addr.s6_addr)));
                }
                _ => {}
            }
            next = libc::CMSG_NXTHDR(&raw const header, next);
        }
    }
    let report = report.ok_or_else(|| io::Error::other("a report without an error"))?;
    let error = report.ee_errno.cast_signed();
    Ok(SendReport {
        error: io::Error::from_raw_os_error(error),
        is_local: report.ee_origin == libc::SO_EE_ORIGIN_LOCAL,
        to: to.unwrap_or(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0)),
        from,
        mtu: (error == libc::EMSGSIZE).then_some(report.ee_info),
    })
}
