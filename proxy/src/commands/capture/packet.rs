//! The UDP datagram in a captured packet.

use std::net::{IpAddr, SocketAddr};

use etherparse::{
    EtherType, IpNumber, Ipv6ExtensionSlice, LaxNetSlice, LaxSlicedPacket, UdpHeader, UdpSlice,
};
use pcap_parser::Linktype;

/// IPv4 and IPv6 alone, without a link header (LINKTYPE_IPV4, LINKTYPE_IPV6, and two
/// numbers that LINKTYPE_RAW has on some systems).
const RAW: [i32; 5] = [101, 12, 14, 228, 229];

/// What a packet is.
#[derive(Debug, PartialEq)]
pub(super) enum Packet<'a> {
    /// A datagram, or the first fragment of one.
    Udp(Datagram<'a>),
    /// A later fragment of a datagram: it has no ports, and no header.
    LaterFragment { from: IpAddr, to: IpAddr },
    /// Not UDP.
    Other,
    /// Bytes that make no sense, or too few of them.
    Malformed,
    /// Of a link type that is not known here.
    UnknownLink,
}

/// A datagram.
#[derive(Debug, PartialEq)]
pub(super) struct Datagram<'a> {
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    pub(super) payload: &'a [u8],
    /// The rest of the payload is in other packets.
    pub(super) is_fragment: bool,
    /// The file has fewer bytes of it than there were.
    pub(super) is_cut: bool,
}

impl<'a> Packet<'a> {
    /// Reads a packet of an interface with this link type.
    pub(super) fn read(link: Linktype, data: &'a [u8]) -> Self {
        let sliced = match link {
            Linktype::ETHERNET => LaxSlicedPacket::from_ethernet(data).ok(),
            Linktype::LINUX_SLL => of_protocol(data, 14, 16),
            Linktype::LINUX_SLL2 => of_protocol(data, 0, 20),
            // The address family has the byte order of the host that captured, and other
            // numbers on other systems. The version of IP says as much.
            Linktype::NULL | Linktype::LOOP => data
                .get(4..)
                .and_then(|packet| LaxSlicedPacket::from_ip(packet).ok()),
            Linktype(number) if RAW.contains(&number) => LaxSlicedPacket::from_ip(data).ok(),
            _ => return Self::UnknownLink,
        };
        let Some(sliced) = sliced else {
            return Self::Malformed;
        };
        let (from, to, offset) = match &sliced.net {
            Some(LaxNetSlice::Ipv4(ip)) => {
                let header = ip.header();
                let offset = header.fragments_offset().value();
                (
                    IpAddr::V4(header.source_addr()),
                    IpAddr::V4(header.destination_addr()),
                    offset,
                )
            }
            Some(LaxNetSlice::Ipv6(ip)) => {
                let header = ip.header();
                let fragments = ip.extensions().clone().into_iter();
                let mut fragments = fragments.filter_map(|extension| {
                    if let Ipv6ExtensionSlice::Fragment(fragment) = extension {
                        return Some(fragment);
                    }
                    None
                });
                let fragment = fragments.next();
                let offset = fragment.map_or(0, |it| it.fragment_offset().value());
                (
                    IpAddr::V6(header.source_addr()),
                    IpAddr::V6(header.destination_addr()),
                    offset,
                )
            }
            Some(LaxNetSlice::Arp(_)) => return Self::Other,
            None if sliced.stop_err.is_some() => return Self::Malformed,
            None => return Self::Other,
        };
        let Some(ip) = sliced.net.as_ref().and_then(LaxNetSlice::ip_payload_ref) else {
            return Self::Malformed;
        };
        if ip.ip_number != IpNumber::UDP {
            return Self::Other;
        }
        if offset > 0 {
            return Self::LaterFragment { from, to };
        }
        let Ok(udp) = UdpSlice::from_slice_lax(ip.payload) else {
            return Self::Malformed;
        };
        let length = usize::from(udp.length()).saturating_sub(UdpHeader::LEN);
        Self::Udp(Datagram {
            from: SocketAddr::new(from, udp.source_port()),
            to: SocketAddr::new(to, udp.destination_port()),
            payload: udp.payload(),
            is_fragment: ip.fragmented,
            is_cut: ip.incomplete || !ip.fragmented && udp.payload().len() < length,
        })
    }
}

/// A packet behind a pseudo-header of `len` bytes, with its protocol at `at`.
fn of_protocol(data: &[u8], at: usize, len: usize) -> Option<LaxSlicedPacket<'_>> {
    let protocol = data.get(at..at + 2)?.first_chunk().copied()?;
    let protocol = EtherType(u16::from_be_bytes(protocol));
    Some(LaxSlicedPacket::from_ether_type(protocol, data.get(len..)?))
}
