//! `recvmmsg`, `sendmmsg`, GRO and GSO (recvmmsg(2), sendmmsg(2), udp(7)).

use std::cell::RefCell;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::sockopt::{Ipv4PacketInfo, Ipv6RecvPacketInfo, UdpGroSegment, UdpGsoSegment};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, MultiHeaders, SockaddrIn, SockaddrIn6,
    SockaddrLike, getsockopt, recvmmsg, recvmsg, sendmmsg, sendmsg, setsockopt,
};

use super::Outgoing;
use crate::batch::Slots;

/// Segments that the kernel sends at most for one message (UDP_MAX_SEGMENTS was
/// 64 before Linux 6.9).
const MAX_SEGMENTS: usize = 64;

/// Bytes of all segments of one message: what an IPv4 packet can carry.
const MAX_SEGMENTED: usize = 65_507;

/// Messages for one call (UIO_MAXIOV).
const MAX_MESSAGES: usize = 1024;

/// Bytes for the control messages of a datagram: that of GRO, and those that the
/// owner of the socket may have asked for before it was handed over.
const CONTROL: usize = 256;

/// What is known of a socket: its family, and the longest segment that it takes.
#[derive(Debug)]
pub(crate) struct Offload {
    /// The socket is one for IPv4 alone.
    ipv4: bool,
    /// Datagrams arrive coalesced, which those who receive one by one can't take
    /// apart.
    gro: bool,
    /// Datagrams arrive with the address that they were sent to, as the socket is
    /// bound to all.
    packet_info: bool,
    longest_segment: AtomicUsize,
}

impl Offload {
    const NOT_PROBED: usize = usize::MAX;

    pub(crate) fn new(socket: &impl AsFd, local: SocketAddr) -> Self {
        Self {
            packet_info: local.ip().is_unspecified() && ask_for_packet_info(socket, local),
            ..Self::for_sending(socket, local)
        }
    }

    /// As `new`, with the socket's options left as they are.
    pub(crate) fn for_sending(socket: &impl AsFd, local: SocketAddr) -> Self {
        Self {
            ipv4: local.is_ipv4(),
            gro: getsockopt(socket, UdpGroSegment).unwrap_or(false),
            packet_info: false,
            longest_segment: AtomicUsize::new(Self::NOT_PROBED),
        }
    }

    pub(crate) fn gro(&self) -> bool {
        self.gro
    }

    /// Whether the address is known that a datagram was sent to.
    pub(crate) fn packet_info(&self) -> bool {
        self.packet_info
    }

    /// Has datagrams arrive coalesced; `false` if the kernel can't.
    pub(crate) fn enable_gro(&mut self, socket: &impl AsFd) -> io::Result<bool> {
        match setsockopt(socket, UdpGroSegment, &true) {
            Ok(()) => self.gro = true,
            Err(Errno::ENOPROTOOPT) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(self.gro)
    }

    /// Kernels before 4.18 would send what was to be segmented as one datagram.
    pub(super) fn longest_segment(&self, socket: &impl AsFd) -> usize {
        let known = self.longest_segment.load(Ordering::Relaxed);
        if known != Self::NOT_PROBED {
            return known;
        }
        let probed = match getsockopt(socket, UdpGsoSegment) {
            Ok(_) => MAX_SEGMENTED,
            Err(_) => 0,
        };
        self.longest_segment.store(probed, Ordering::Relaxed);
        probed
    }

    /// Notes that segments of `len` bytes were refused for `error`.
    pub(super) fn refused(&self, len: usize, error: Errno) {
        // EIO: the device can't compute checksums, whatever the length.
        let limit = if error == Errno::EIO { 0 } else { len - 1 };
        self.longest_segment.fetch_min(limit, Ordering::Relaxed);
    }
}

/// Has datagrams arrive with the address that they were sent to (IP_PKTINFO in
/// ip(7), IPV6_RECVPKTINFO in ipv6(7)); `false` if the kernel can't.
fn ask_for_packet_info(socket: &impl AsFd, local: SocketAddr) -> bool {
    let v4 = setsockopt(socket, Ipv4PacketInfo, &true).is_ok();
    match local {
        SocketAddr::V4(_) => v4,
        // What arrives by IPv4 has both then, and the former says more of what was
        // sent to a broadcast address.
        SocketAddr::V6(_) => setsockopt(socket, Ipv6RecvPacketInfo, &true).is_ok(),
    }
}

/// The address that a reply leaves from, as one control message of a datagram from
/// `peer` has it, if it is one that can be sent from.
fn local_address(control: &ControlMessageOwned, peer: SocketAddr) -> Option<IpAddr> {
    let ip = if let ControlMessageOwned::Ipv4PacketInfo(info) = control {
        // Of a broadcast, the address of the interface.
        IpAddr::V4(Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes()))
    } else if let ControlMessageOwned::Ipv6PacketInfo(info) = control {
        IpAddr::V6(Ipv6Addr::from(info.ipi6_addr.s6_addr)).to_canonical()
    } else {
        return None;
    };
    let link_local = |ip: IpAddr| matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
    // A link-local address needs the interface, which the peer's address then has.
    let usable =
        !ip.is_unspecified() && !ip.is_multicast() && (!link_local(ip) || link_local(peer.ip()));
    usable.then_some(ip)
}

/// The better one of what two control messages of a datagram say.
fn better(known: Option<IpAddr>, other: Option<IpAddr>, is_v4_info: bool) -> Option<IpAddr> {
    if is_v4_info {
        other.or(known)
    } else {
        known.or(other)
    }
}

thread_local! {
    /// Where control messages of single datagrams land; on the heap, as the kernel's
    /// structures have to be aligned.
    static CONTROLS: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Receives one datagram on a socket that tells the address that it was sent to:
/// its length, its sender, and that address. Waits as the socket does if `wait` is
/// set.
pub(crate) fn receive_one(
    socket: &impl AsFd,
    offload: &Offload,
    buffer: &mut [u8],
    wait: bool,
) -> io::Result<(usize, SocketAddr, Option<IpAddr>)> {
    let flags = if wait {
        MsgFlags::empty()
    } else {
        MsgFlags::MSG_DONTWAIT
    };
    let fd = socket.as_fd().as_raw_fd();
    CONTROLS.with_borrow_mut(|controls| {
        controls.resize(CONTROL, 0);
        Ok(if offload.ipv4 {
            receive_one_from::<SockaddrIn>(fd, buffer, controls, flags)?
        } else {
            receive_one_from::<SockaddrIn6>(fd, buffer, controls, flags)?
        })
    })
}

fn receive_one_from<A>(
    fd: RawFd,
    buffer: &mut [u8],
    controls: &mut [u8],
    flags: MsgFlags,
) -> Result<(usize, SocketAddr, Option<IpAddr>), Errno>
where
    A: SockaddrLike + Copy + Into<SocketAddr>,
{
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg::<A>(fd, &mut parts, Some(controls), flags)?;
    let peer = message.address.ok_or(Errno::EAFNOSUPPORT)?.into();
    let mut local = None;
    // Where there was no room for all of them, the kernel chooses the address.
    for control in message.cmsgs().into_iter().flatten() {
        let is_v4_info = matches!(control, ControlMessageOwned::Ipv4PacketInfo(_));
        local = better(local, local_address(&control, peer), is_v4_info);
    }
    Ok((message.bytes, peer, local))
}

/// Sends one datagram from `source` and returns its length.
pub(crate) fn send_one(
    socket: &impl AsFd,
    offload: &Offload,
    payload: &[u8],
    to: SocketAddr,
    source: IpAddr,
) -> io::Result<usize> {
    let fd = socket.as_fd().as_raw_fd();
    let info = PacketInfo::from(source);
    let (parts, controls) = ([IoSlice::new(payload)], [info.control()]);
    let flags = MsgFlags::empty();
    let sent = if offload.ipv4 {
        let to = as_v4(to).ok_or(Errno::EAFNOSUPPORT)?;
        sendmsg(fd, &parts, &controls, flags, Some(&to))
    } else {
        sendmsg(fd, &parts, &controls, flags, Some(&as_v6(to)))
    };
    Ok(sent?)
}

fn as_v4(to: SocketAddr) -> Option<SockaddrIn> {
    match to {
        SocketAddr::V4(v4) => Some(SockaddrIn::from(v4)),
        SocketAddr::V6(_) => None,
    }
}

fn as_v6(to: SocketAddr) -> SockaddrIn6 {
    SockaddrIn6::from(match to {
        SocketAddr::V4(v4) => SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0),
        SocketAddr::V6(v6) => v6,
    })
}

/// Fills slots with what is there; if nothing is, and `wait` is set, waits for
/// the first as the socket does.
pub(crate) fn receive(
    socket: &impl AsFd,
    offload: &Offload,
    slots: &mut Slots<'_>,
    wait: bool,
) -> io::Result<()> {
    let flags = if wait {
        MsgFlags::MSG_WAITFORONE
    } else {
        MsgFlags::MSG_DONTWAIT
    };
    let fd = socket.as_fd().as_raw_fd();
    let received = if offload.ipv4 {
        receive_from::<SockaddrIn>(fd, offload, slots, flags)
    } else {
        receive_from::<SockaddrIn6>(fd, offload, slots, flags)
    };
    Ok(received?)
}

fn receive_from<A>(
    fd: RawFd,
    offload: &Offload,
    slots: &mut Slots<'_>,
    flags: MsgFlags,
) -> Result<(), Errno>
where
    A: SockaddrLike + Copy + Into<SocketAddr>,
{
    let (buffers, filled) = slots.parts();
    let mut buffers: Vec<_> = buffers.map(|slot| [IoSliceMut::new(slot)]).collect();
    // Made anew for each call: `recvmmsg` leaves the lengths of the last call in
    // them, and would cut off a longer address or control message.
    let asked = offload.gro || offload.packet_info;
    let space = asked.then(|| Vec::with_capacity(CONTROL));
    let mut headers = MultiHeaders::<A>::preallocate(buffers.len(), space);
    for message in recvmmsg(fd, &mut headers, buffers.iter_mut(), flags, None)? {
        let peer = message.address.ok_or(Errno::EAFNOSUPPORT)?.into();
        let (mut stride, mut local) = (message.bytes, None);
        if asked {
            for control in message.cmsgs()? {
                if let ControlMessageOwned::UdpGroSegments(size) = control {
                    stride = usize::try_from(size).unwrap_or(stride);
                } else {
                    let is_v4_info = matches!(control, ControlMessageOwned::Ipv4PacketInfo(_));
                    local = better(local, local_address(&control, peer), is_v4_info);
                }
            }
        }
        filled.push(message.bytes, stride, peer, local);
    }
    Ok(())
}

/// Sends from the front, and returns how many datagrams were sent; an error if
/// it is the first that can't be. They leave from `source`, or from the address
/// that the socket is bound to.
pub(crate) fn send(
    socket: &impl AsFd,
    offload: &Offload,
    datagrams: &[Outgoing<'_>],
    source: Option<IpAddr>,
) -> io::Result<usize> {
    let mut sent = 0;
    while sent < datagrams.len() {
        match send_some(socket, offload, &datagrams[sent..], source) {
            Ok(more) => sent += more,
            Err(error) if sent == 0 => return Err(error),
            Err(_) => break,
        }
    }
    Ok(sent)
}

/// The address that a message leaves from (IP_PKTINFO in ip(7), IPV6_PKTINFO in
/// ipv6(7)).
enum PacketInfo {
    V4(libc::in_pktinfo),
    V6(libc::in6_pktinfo),
}

impl From<IpAddr> for PacketInfo {
    fn from(source: IpAddr) -> Self {
        match source {
            IpAddr::V4(ip) => Self::V4(libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr {
                    s_addr: u32::from_ne_bytes(ip.octets()),
                },
                ipi_addr: libc::in_addr { s_addr: 0 },
            }),
            IpAddr::V6(ip) => Self::V6(libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr {
                    s6_addr: ip.octets(),
                },
                ipi6_ifindex: 0,
            }),
        }
    }
}

impl PacketInfo {
    fn control(&self) -> ControlMessage<'_> {
        match self {
            Self::V4(info) => ControlMessage::Ipv4PacketInfo(info),
            Self::V6(info) => ControlMessage::Ipv6PacketInfo(info),
        }
    }
}

/// Consecutive datagrams for one address that go out as segments of one message.
pub(super) struct Message {
    pub(super) datagrams: usize,
    segment: usize,
}

/// Makes one call, or a second if the kernel refuses to segment.
fn send_some(
    socket: &impl AsFd,
    offload: &Offload,
    datagrams: &[Outgoing<'_>],
    source: Option<IpAddr>,
) -> io::Result<usize> {
    let source = source.map(PacketInfo::from);
    let send = |messages: &[Message], segment| {
        send_messages(
            socket,
            offload.ipv4,
            datagrams,
            messages,
            segment,
            source.as_ref(),
        )
    };
    let (messages, segment) = plan(datagrams, offload.longest_segment(socket));
    match send(&messages, segment) {
        Err(error) if segment.is_some_and(|_| is_of_segmenting(error)) => {
            offload.refused(segment.map_or(1, usize::from), error);
            let (messages, segment) = plan(datagrams, offload.longest_segment(socket));
            Ok(send(&messages, segment)?)
        }
        result => Ok(result?),
    }
}

/// Errors that tell of the device or the route rather than of the datagram. If
/// it is the datagram after all, sending it alone will fail likewise.
fn is_of_segmenting(error: Errno) -> bool {
    matches!(error, Errno::EIO | Errno::EINVAL | Errno::EMSGSIZE)
}

/// Splits what can go out in one call into messages. All messages of a call
/// share the length of a segment, and what is no longer than that goes out as
/// it is.
pub(super) fn plan(datagrams: &[Outgoing<'_>], longest: usize) -> (Vec<Message>, Option<u16>) {
    let mut messages = Vec::with_capacity(datagrams.len().min(MAX_MESSAGES));
    let mut shared = 0;
    let mut longest_single = 0;
    let mut rest = datagrams;
    while !rest.is_empty() && messages.len() < MAX_MESSAGES {
        let message = first_message(rest, longest);
        if message.datagrams > 1 {
            if (shared != 0 && shared != message.segment) || longest_single > message.segment {
                break;
            }
            shared = message.segment;
        } else {
            if shared != 0 && message.segment > shared {
                break;
            }
            longest_single = longest_single.max(message.segment);
        }
        rest = &rest[message.datagrams..];
        messages.push(message);
    }
    (messages, u16::try_from(shared).ok().filter(|&len| len > 0))
}

/// As many datagrams from the front as make up one message: for one address, of
/// one length, save that the last may be shorter.
fn first_message(datagrams: &[Outgoing<'_>], longest: usize) -> Message {
    let (first, way) = datagrams[0];
    let segment = first.len();
    let mut count = 1;
    if (1..=longest).contains(&segment) {
        let most = MAX_SEGMENTS.min(MAX_SEGMENTED / segment);
        for (payload, to) in datagrams.iter().take(most).skip(1) {
            if *to != way || payload.is_empty() || payload.len() > segment {
                break;
            }
            count += 1;
            if payload.len() < segment {
                break;
            }
        }
    }
    Message {
        datagrams: count,
        segment,
    }
}

/// Sends what `plan` planned on a socket for IPv4 or IPv6, and returns how many
/// datagrams that were.
fn send_messages(
    socket: &impl AsFd,
    ipv4: bool,
    datagrams: &[Outgoing<'_>],
    messages: &[Message],
    segment: Option<u16>,
    source: Option<&PacketInfo>,
) -> Result<usize, Errno> {
    let fd = socket.as_fd().as_raw_fd();
    let sent = if ipv4 {
        send_messages_to(fd, datagrams, messages, segment, source, as_v4)?
    } else {
        send_messages_to(fd, datagrams, messages, segment, source, |to| {
            Some(as_v6(to))
        })?
    };
    Ok(messages[..sent]
        .iter()
        .map(|message| message.datagrams)
        .sum())
}

/// Sends messages up to the first to whose address `family` has no answer.
fn send_messages_to<A: SockaddrLike + Copy>(
    fd: RawFd,
    datagrams: &[Outgoing<'_>],
    messages: &[Message],
    segment: Option<u16>,
    source: Option<&PacketInfo>,
    family: impl Fn(SocketAddr) -> Option<A>,
) -> Result<usize, Errno> {
    let slices: Vec<IoSlice<'_>> = datagrams
        .iter()
        .map(|(bytes, _)| IoSlice::new(bytes))
        .collect();
    let mut parts = Vec::with_capacity(messages.len());
    let mut ways = Vec::with_capacity(messages.len());
    let mut at = 0;
    for message in messages {
        let Some(way) = family(datagrams[at].1.to) else {
            break;
        };
        parts.push(&slices[at..at + message.datagrams]);
        ways.push(Some(way));
        at += message.datagrams;
    }
    if parts.is_empty() {
        return Err(Errno::EAFNOSUPPORT);
    }
    let gso = segment.as_ref().map(ControlMessage::UdpGsoSegments);
    let info = source.map(PacketInfo::control);
    // No larger than what goes in: the kernel would read on.
    let space = match (segment, source) {
        (None, None) => None,
        (Some(_), None) => Some(cmsg_space!(u16)),
        (None, Some(PacketInfo::V4(_))) => Some(cmsg_space!(libc::in_pktinfo)),
        (None, Some(PacketInfo::V6(_))) => Some(cmsg_space!(libc::in6_pktinfo)),
        (Some(_), Some(PacketInfo::V4(_))) => Some(cmsg_space!(u16, libc::in_pktinfo)),
        (Some(_), Some(PacketInfo::V6(_))) => Some(cmsg_space!(u16, libc::in6_pktinfo)),
    };
    let controls: Vec<_> = gso.into_iter().chain(info).collect();
    let mut headers = MultiHeaders::preallocate(parts.len(), space);
    let sent = sendmmsg(
        fd,
        &mut headers,
        &parts,
        &ways,
        &controls,
        MsgFlags::empty(),
    )?;
    Ok(sent.count())
}
