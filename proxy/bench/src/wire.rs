//! Datagrams in and out of the bench's own programs, many per system call and,
//! where asked, in bursts (UDP_GRO, UDP_SEGMENT). IPv4 only: everything here
//! runs on 127.0.0.0/8.
//!
//! The module owns all unsafe code of the bench. It shares none with the proxy,
//! so that an error in one can't hide the same error in the other.
#![expect(
    unsafe_code,
    reason = "recvmmsg, sendmmsg and their control messages have no safe interface"
)]

use std::io;
use std::mem::{self, MaybeUninit};
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};
use std::ptr;

use libc::{c_int, c_void, iovec, mmsghdr, msghdr, sockaddr_in};

/// Datagrams, or bursts, that one call moves at most.
pub(crate) const BATCH: usize = 64;

/// As names have it.
const FAMILY: libc::sa_family_t = 2;

const _: () = assert!(FAMILY as c_int == libc::AF_INET);

/// Longer than any datagram or burst. Not a power of two: buffers 64 KiB apart
/// would all fall into the same few sets of the processor's cache.
pub(crate) const BURST_CAPACITY: usize = 65_536 + 320;

/// For single datagrams of up to 1500 bytes.
pub(crate) const DATAGRAM_CAPACITY: usize = 1_536 + 64;

/// Receive buffer of the bench's own sockets.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Room for packet info, burst size and traffic class, 32, 24 and 24 bytes with
/// their headers. `u64` for the alignment of `cmsghdr`.
type Control = [u64; 10];

/// What arrived in one slot of an [`Inbox`].
#[derive(Clone, Copy)]
pub(crate) struct Arrival {
    pub(crate) from: SocketAddrV4,
    /// The address that it was sent to, where packet info was asked for.
    pub(crate) to: Ipv4Addr,
    pub(crate) len: usize,
    /// Bytes of each datagram but the last, which may be shorter.
    pub(crate) segment: usize,
}

/// Buffers that one call fills.
pub(crate) struct Inbox {
    capacity: usize,
    bytes: Vec<u8>,
    arrivals: Vec<Arrival>,
}

impl Inbox {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            capacity,
            bytes: vec![0; BATCH * capacity],
            arrivals: Vec::with_capacity(BATCH),
        }
    }

    pub(crate) fn arrivals(&self) -> &[Arrival] {
        &self.arrivals
    }

    pub(crate) fn bytes(&self, slot: usize) -> &[u8] {
        let start = slot * self.capacity;
        &self.bytes[start..start + self.arrivals[slot].len]
    }

    pub(crate) fn bytes_mut(&mut self, slot: usize) -> &mut [u8] {
        let start = slot * self.capacity;
        &mut self.bytes[start..start + self.arrivals[slot].len]
    }

    pub(crate) fn clear(&mut self) {
        self.arrivals.clear();
    }

    /// Fills the slots with what waits in `socket`, and says how many. Does not
    /// wait; nothing there is 0.
    pub(crate) fn receive(&mut self, socket: &UdpSocket) -> io::Result<usize> {
        self.clear();
        self.receive_more(socket, BATCH)
    }

    /// Fills the next slots, as many as are free and `most` at most, and says how
    /// many.
    pub(crate) fn receive_more(&mut self, socket: &UdpSocket, most: usize) -> io::Result<usize> {
        struct Scratch {
            names: [sockaddr_in; BATCH],
            controls: [Control; BATCH],
            vectors: [iovec; BATCH],
            messages: [mmsghdr; BATCH],
        }
        let first = self.arrivals.len();
        let room = most.min(BATCH - first);
        let mut scratch = MaybeUninit::<Scratch>::uninit();
        let scratch = scratch.as_mut_ptr();
        let bytes = self.bytes.as_mut_ptr();
        for i in 0..room {
            // SAFETY: `i < BATCH` indexes the arrays of `scratch`, which lives
            // until the function returns, and `first + i < BATCH` the slots of
            // `self.bytes`, whose length is `BATCH * capacity`.
            unsafe {
                (*scratch).vectors[i] = iovec {
                    iov_base: bytes.add((first + i) * self.capacity).cast(),
                    iov_len: self.capacity,
                };
                let mut message: msghdr = mem::zeroed();
                message.msg_name = (&raw mut (*scratch).names[i]).cast();
                message.msg_namelen = len_of::<sockaddr_in>();
                message.msg_iov = &raw mut (*scratch).vectors[i];
                message.msg_iovlen = 1;
                message.msg_control = (&raw mut (*scratch).controls[i]).cast();
                message.msg_controllen = size_of::<Control>();
                (*scratch).messages[i] = mmsghdr {
                    msg_hdr: message,
                    msg_len: 0,
                };
            }
        }
        // SAFETY: the first `room` messages are initialised and point at names,
        // vectors, control buffers and `self.bytes`, which stay in place during
        // the call.
        let count = unsafe {
            let messages = (&raw mut (*scratch).messages).cast::<mmsghdr>();
            if room == 1 {
                // Cheaper than a batch of one.
                let header = &raw mut (*messages).msg_hdr;
                let len = libc::recvmsg(socket.as_raw_fd(), header, libc::MSG_DONTWAIT);
                u32::try_from(len)
                    .map(|len| {
                        (*messages).msg_len = len;
                        1
                    })
                    .map_err(|_| io::Error::last_os_error())
            } else {
                count_of(libc::recvmmsg(
                    socket.as_raw_fd(),
                    messages,
                    libc::c_uint::try_from(room).unwrap_or(0),
                    libc::MSG_DONTWAIT,
                    ptr::null_mut(),
                ))
            }
        };
        let count = match count {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Err(error),
        };
        for i in 0..count {
            // SAFETY: the kernel has filled the first `count` messages, with
            // names of IPv4 sockets.
            let arrival = unsafe { arrival(&(*scratch).messages[i], self.capacity) };
            self.arrivals.push(arrival);
        }
        Ok(count)
    }
}

/// Reads what the kernel said of one message.
///
/// # Safety
///
/// `message` was filled by `recvmmsg` on an IPv4 socket and its pointers are
/// still valid.
unsafe fn arrival(message: &mmsghdr, capacity: usize) -> Arrival {
    let header = &message.msg_hdr;
    let len = (message.msg_len as usize).min(capacity);
    // SAFETY: a name of an IPv4 socket, by the contract.
    let name: sockaddr_in = unsafe { ptr::read(header.msg_name.cast()) };
    let mut arrival = Arrival {
        from: SocketAddrV4::new(
            Ipv4Addr::from(name.sin_addr.s_addr.to_ne_bytes()),
            u16::from_be(name.sin_port),
        ),
        to: Ipv4Addr::UNSPECIFIED,
        len,
        segment: len,
    };
    // SAFETY: the control buffer was filled by the kernel; CMSG_FIRSTHDR and
    // CMSG_NXTHDR return null or whole messages in it, whose values have the
    // types that belong to their level and type (ip(7), udp(7)).
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(header);
        while !next.is_null() {
            let data = libc::CMSG_DATA(next);
            match ((*next).cmsg_level, (*next).cmsg_type) {
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    let size: c_int = ptr::read_unaligned(data.cast());
                    arrival.segment = usize::try_from(size).unwrap_or(len);
                }
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let info: libc::in_pktinfo = ptr::read_unaligned(data.cast());
                    arrival.to = Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes());
                }
                _ => {}
            }
            next = libc::CMSG_NXTHDR(header, next);
        }
    }
    arrival
}

/// A datagram or burst to send.
#[derive(Clone, Copy)]
pub(crate) struct Packet<'a> {
    /// `None` on a connected socket.
    pub(crate) to: Option<SocketAddrV4>,
    /// Source address, on a socket that is bound to all of them.
    pub(crate) from: Option<Ipv4Addr>,
    pub(crate) parts: [&'a [u8]; 2],
    /// Bytes of each datagram, of a burst.
    pub(crate) segment: Option<u16>,
}

/// Sends the first [`BATCH`] of `packets` at most, and says how many went.
pub(crate) fn send(socket: &UdpSocket, packets: &[Packet<'_>]) -> io::Result<usize> {
    struct Scratch {
        names: [sockaddr_in; BATCH],
        controls: [Control; BATCH],
        vectors: [[iovec; 2]; BATCH],
        messages: [mmsghdr; BATCH],
    }
    let mut scratch = MaybeUninit::<Scratch>::uninit();
    let scratch = scratch.as_mut_ptr();
    let count = packets.len().min(BATCH);
    for (i, packet) in packets.iter().take(BATCH).enumerate() {
        // SAFETY: `i < BATCH` indexes the arrays of `scratch`, which lives until
        // the function returns. The kernel only reads from the vectors.
        unsafe {
            (*scratch).vectors[i] = packet.parts.map(|part| iovec {
                iov_base: part.as_ptr().cast_mut().cast(),
                iov_len: part.len(),
            });
            let mut message: msghdr = mem::zeroed();
            if let Some(to) = packet.to {
                (*scratch).names[i] = name_of(to);
                message.msg_name = (&raw mut (*scratch).names[i]).cast();
                message.msg_namelen = len_of::<sockaddr_in>();
            }
            // An empty first part needn't be walked by the kernel.
            let skip = usize::from(packet.parts[0].is_empty());
            message.msg_iov = (&raw mut (*scratch).vectors[i]).cast::<iovec>().add(skip);
            message.msg_iovlen = 2 - skip;
            if packet.from.is_some() || packet.segment.is_some() {
                (*scratch).controls[i] = [0; 10];
                message.msg_control = (&raw mut (*scratch).controls[i]).cast();
                message.msg_controllen = size_of::<Control>();
                write_control(&mut message, packet);
            }
            (*scratch).messages[i] = mmsghdr {
                msg_hdr: message,
                msg_len: 0,
            };
        }
    }
    // SAFETY: the first `count` messages are initialised and all that they
    // point at outlives the call.
    unsafe {
        let first = (&raw mut (*scratch).messages).cast::<mmsghdr>();
        match count {
            0 => Ok(0),
            // Cheaper than a batch of one.
            1 => {
                let sent = libc::sendmsg(
                    socket.as_raw_fd(),
                    &raw const (*first).msg_hdr,
                    libc::MSG_DONTWAIT,
                );
                if sent < 0 {
                    Err(io::Error::last_os_error())
                } else {
                    Ok(1)
                }
            }
            _ => count_of(libc::sendmmsg(
                socket.as_raw_fd(),
                first,
                libc::c_uint::try_from(count).unwrap_or(0),
                libc::MSG_DONTWAIT,
            )),
        }
    }
}

/// # Safety
///
/// `message.msg_control` points at a zeroed [`Control`], whose size is
/// `message.msg_controllen`.
unsafe fn write_control(message: &mut msghdr, packet: &Packet<'_>) {
    let mut used = 0;
    // SAFETY: both messages fit into the buffer, so no pointer is null.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(message);
        if let Some(from) = packet.from {
            let mut info: libc::in_pktinfo = mem::zeroed();
            info.ipi_spec_dst.s_addr = u32::from_ne_bytes(from.octets());
            (*at).cmsg_level = libc::IPPROTO_IP;
            (*at).cmsg_type = libc::IP_PKTINFO;
            (*at).cmsg_len = libc::CMSG_LEN(len_of::<libc::in_pktinfo>()) as usize;
            ptr::write_unaligned(libc::CMSG_DATA(at).cast(), info);
            used += libc::CMSG_SPACE(len_of::<libc::in_pktinfo>()) as usize;
            at = libc::CMSG_NXTHDR(message, at);
        }
        if let Some(segment) = packet.segment {
            (*at).cmsg_level = libc::SOL_UDP;
            (*at).cmsg_type = libc::UDP_SEGMENT;
            (*at).cmsg_len = libc::CMSG_LEN(len_of::<u16>()) as usize;
            ptr::write_unaligned(libc::CMSG_DATA(at).cast(), segment);
            used += libc::CMSG_SPACE(len_of::<u16>()) as usize;
        }
    }
    message.msg_controllen = used;
}

/// A socket that does not wait, with a receive buffer that holds a burst of
/// every client.
pub(crate) fn socket(bind: SocketAddrV4) -> io::Result<UdpSocket> {
    let socket = socket2::Socket::new(
        socket2::Domain::IPV4,
        socket2::Type::DGRAM,
        Some(socket2::Protocol::UDP),
    )?;
    socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    socket.set_nonblocking(true)?;
    socket.bind(&bind.into())?;
    Ok(socket.into())
}

/// Asks for the address that each datagram was sent to.
pub(crate) fn report_local_address(socket: &UdpSocket) -> io::Result<()> {
    set(socket.as_raw_fd(), libc::IPPROTO_IP, libc::IP_PKTINFO)
}

/// Asks for the ECN bits of each datagram.
pub(crate) fn report_traffic_class(socket: &UdpSocket) -> io::Result<()> {
    set(socket.as_raw_fd(), libc::IPPROTO_IP, libc::IP_RECVTOS)
}

/// Asks for bursts in one piece.
pub(crate) fn receive_bursts(socket: &UdpSocket) -> io::Result<()> {
    set(socket.as_raw_fd(), libc::SOL_UDP, libc::UDP_GRO)
}

fn set(fd: RawFd, level: c_int, name: c_int) -> io::Result<()> {
    let one: c_int = 1;
    // SAFETY: the option value is an int that outlives the call.
    let status = unsafe {
        libc::setsockopt(
            fd,
            level,
            name,
            (&raw const one).cast::<c_void>(),
            len_of::<c_int>(),
        )
    };
    count_of(status).map(drop)
}

fn name_of(address: SocketAddrV4) -> sockaddr_in {
    sockaddr_in {
        sin_family: FAMILY,
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from_ne_bytes(address.ip().octets()),
        },
        sin_zero: [0; 8],
    }
}

fn count_of(status: c_int) -> io::Result<usize> {
    usize::try_from(status).map_err(|_| io::Error::last_os_error())
}

#[expect(clippy::cast_possible_truncation, reason = "sizes of small C types")]
const fn len_of<T>() -> u32 {
    size_of::<T>() as u32
}
