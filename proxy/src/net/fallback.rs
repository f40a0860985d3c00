//! The portable side of [`net`](super): one datagram for each call, by recvmsg and
//! sendmsg (POSIX) as nix wraps them, without bursts. It is there for systems
//! that have nothing better, and is tested on Linux with the feature `portable`.
//! nix allocates for each datagram that is sent with more than its bytes: a source
//! address or a traffic class.

mod readiness;

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

use nix::libc::{in_addr, in_pktinfo, in6_addr, in6_pktinfo};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt,
    sockopt,
};

use super::{
    BATCH, Batch, CAPACITY, Cause, Outgoing, Part, Received, STRIDE, SendFault, Sent, Socket,
    TrafficClass, datagram,
};

pub use readiness::{Readiness, Waker};

/// How often to try a datagram whose failure may be an earlier one's.
const TRIES: u32 = 3;

/// Room for what the kernel says of a datagram, aligned as it says it.
#[repr(align(8))]
struct Control([u8; 256]);

pub(super) fn receive(
    socket: &Socket,
    batch: &mut Batch,
    first: usize,
    end: usize,
) -> io::Result<usize> {
    for slot in first..end.min(BATCH) {
        match receive_one(socket, batch, slot) {
            Ok(received) => batch.received[slot] = Some(received),
            Err(error) if slot == first => return Err(error),
            // An error here speaks of a datagram sent earlier: those that were
            // received matter more.
            Err(_) => return Ok(slot - first),
        }
    }
    Ok(end.min(BATCH).saturating_sub(first))
}

fn receive_one(socket: &Socket, batch: &mut Batch, slot: usize) -> io::Result<Received> {
    let mut control = Control([0; 256]);
    let bytes = &mut batch.bytes[slot * STRIDE..][..CAPACITY];
    let mut pieces = [IoSliceMut::new(bytes)];
    let message = loop {
        let result = recvmsg::<SockaddrStorage>(
            socket.fd(),
            &mut pieces,
            Some(&mut control.0),
            MsgFlags::MSG_DONTWAIT,
        );
        match result {
            Err(nix::errno::Errno::EINTR) => {}
            result => break result?,
        }
    };
    let mut received = Received {
        peer: message.address.and_then(address_of).unwrap_or(socket.bound),
        local: socket.bound,
        group: false,
        class: TrafficClass::default(),
        overflows: 0,
        len: message.bytes,
        segment: message.bytes,
        truncated: message.flags.contains(MsgFlags::MSG_TRUNC),
    };
    for told in message.cmsgs()? {
        match told {
            ControlMessageOwned::Ipv4PacketInfo(info) => received.note_local_v4(
                Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes()),
                Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes()),
            ),
            ControlMessageOwned::Ipv6PacketInfo(info) => {
                received.note_local_v6(Ipv6Addr::from(info.ipi6_addr.s6_addr), info.ipi6_ifindex)
            }
            #[cfg(any(target_os = "linux", target_os = "freebsd"))]
            ControlMessageOwned::Ipv4Tos(class) => received.class = TrafficClass(class),
            #[cfg(any(target_os = "linux", target_os = "freebsd"))]
            ControlMessageOwned::Ipv6TClass(class) => {
                received.class = TrafficClass(class.to_ne_bytes()[least_byte()]);
            }
            #[cfg(target_os = "linux")]
            ControlMessageOwned::RxqOvfl(lost) => received.overflows = lost,
            _ => {}
        }
    }
    Ok(received)
}

const fn least_byte() -> usize {
    if cfg!(target_endian = "little") { 0 } else { 3 }
}

fn address_of(name: SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = name.as_sockaddr_in() {
        return Some(SocketAddrV4::new(v4.ip(), v4.port()).into());
    }
    // The flow label says nothing of who the client is.
    let v6 = name.as_sockaddr_in6()?;
    Some(SocketAddrV6::new(v6.ip(), v6.port(), 0, v6.scope_id()).into())
}

pub(super) fn send<'h>(
    socket: &Socket,
    batch: &Batch,
    parts: impl Iterator<Item = Part>,
    outgoing: impl Fn(usize) -> Outgoing<'h>,
    mut fault: impl FnMut(usize, SendFault),
) -> Sent {
    let mut sent = Sent::default();
    for Part { slot, first, end } in parts {
        let outgoing = outgoing(slot);
        for number in first..end {
            let payload = datagram(batch, slot, number);
            let len = send_one(socket, payload, &outgoing, |error| fault(slot, error));
            sent.datagrams += usize::from(len.is_some());
            sent.bytes += len.unwrap_or(0);
        }
    }
    sent
}

/// Sends a datagram and returns its length with its header, if that goes.
fn send_one(
    socket: &Socket,
    payload: &[u8],
    outgoing: &Outgoing<'_>,
    mut fault: impl FnMut(SendFault),
) -> Option<usize> {
    let pieces = [IoSlice::new(outgoing.header), IoSlice::new(payload)];
    let to = outgoing.to.map(SockaddrStorage::from);
    let from = outgoing.from.filter(|_| socket.wildcard);
    let class = outgoing.class.0;
    let class_v6 = i32::from(class);
    let (mut info_v4, mut info_v6) = (None, None);
    match from {
        Some(SocketAddr::V4(from)) => {
            let s_addr = u32::from_ne_bytes(from.ip().octets());
            info_v4 = Some(in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: in_addr { s_addr },
                ipi_addr: in_addr { s_addr: 0 },
            });
        }
        Some(SocketAddr::V6(from)) => {
            info_v6 = Some(in6_pktinfo {
                ipi6_addr: in6_addr {
                    s6_addr: from.ip().octets(),
                },
                ipi6_ifindex: from.scope_id(),
            });
        }
        None => {}
    }
    let info = match (&info_v4, &info_v6) {
        (Some(info), _) => Some(ControlMessage::Ipv4PacketInfo(info)),
        (None, Some(info)) => Some(ControlMessage::Ipv6PacketInfo(info)),
        (None, None) => None,
    };
    let marks = class_message(socket, &class, &class_v6);
    let (two, one);
    let told: &[ControlMessage<'_>] = match (info, marks) {
        (Some(info), Some(marks)) => {
            two = [info, marks];
            &two
        }
        (Some(single), None) | (None, Some(single)) => {
            one = [single];
            &one
        }
        (None, None) => &[],
    };
    let mut earlier: Option<io::Error> = None;
    let mut tries = 0;
    loop {
        let flags = MsgFlags::MSG_DONTWAIT;
        let result = sendmsg(socket.fd(), &pieces, told, flags, to.as_ref());
        let error = match result {
            Ok(len) => {
                if let Some(error) = earlier {
                    fault(SendFault::Earlier(error));
                }
                return Some(len);
            }
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => io::Error::from(error),
        };
        if tries < TRIES && may_be_of_an_earlier_one(&error) {
            tries += 1;
            earlier = Some(error);
            continue;
        }
        if let Some(earlier) = earlier.filter(|e| e.raw_os_error() != error.raw_os_error()) {
            fault(SendFault::Earlier(earlier));
        }
        fault(SendFault::Lost {
            error,
            datagrams: 1,
            len: outgoing.header.len() + payload.len(),
        });
        return None;
    }
}

/// Says which traffic class to send with, where there is one and the system can
/// be told.
#[cfg(any(target_os = "linux", target_os = "freebsd"))]
fn class_message<'c>(
    socket: &Socket,
    class: &'c u8,
    class_v6: &'c i32,
) -> Option<ControlMessage<'c>> {
    (*class != 0).then_some(if socket.bound.is_ipv6() {
        ControlMessage::Ipv6TClass(class_v6)
    } else {
        ControlMessage::Ipv4Tos(class)
    })
}

#[cfg(not(any(target_os = "linux", target_os = "freebsd")))]
fn class_message<'c>(_: &Socket, _: &'c u8, _: &'c i32) -> Option<ControlMessage<'c>> {
    None
}

/// Whether an error may be one that ICMP left on a connected socket; want of room
/// is always the datagram's own.
fn may_be_of_an_earlier_one(error: &io::Error) -> bool {
    !matches!(Cause::of(error), Cause::WouldBlock | Cause::NoMemory)
        && error.kind() != io::ErrorKind::InvalidInput
}

/// Asks with every datagram for the number that the socket has lost, where the
/// system counts them.
pub(super) fn report_overflows(socket: &socket2::Socket) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    setsockopt(socket, sockopt::RxqOvfl, &1)?;
    Ok(())
}

/// Asks for the local address of every received datagram.
pub(super) fn report_local_address(socket: &socket2::Socket, v6: bool) -> io::Result<()> {
    if v6 {
        setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true)?;
    } else {
        setsockopt(socket, sockopt::Ipv4PacketInfo, &true)?;
    }
    Ok(())
}

pub(super) fn receive_bursts(_: &socket2::Socket) -> io::Result<()> {
    Err(unsupported())
}

pub(super) fn can_send_bursts(_: &socket2::Socket) -> io::Result<()> {
    Err(unsupported())
}

fn unsupported() -> io::Error {
    io::Error::new(
        io::ErrorKind::Unsupported,
        "this build moves one datagram at a time",
    )
}
