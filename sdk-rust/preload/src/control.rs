//! Control data: what the program sees of it, and what a reply needs.

use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ptr;

use libc::{
    IP_PKTINFO, IPPROTO_IP, IPPROTO_IPV6, IPV6_PKTINFO, SOL_UDP, UDP_SEGMENT, c_int, cmsghdr,
    in_pktinfo, in6_pktinfo,
};

/// Where the data of a control message begins.
const HEADER: usize = align(mem::size_of::<cmsghdr>());

const fn align(len: usize) -> usize {
    len.next_multiple_of(mem::size_of::<usize>())
}

/// One control message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message<'a> {
    pub(crate) level: c_int,
    pub(crate) kind: c_int,
    pub(crate) data: &'a [u8],
}

/// The control messages in a buffer, as CMSG_NXTHDR(3) walks over them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Messages<'a> {
    rest: &'a [u8],
    /// One of them was shorter than its own header, or longer than the buffer.
    malformed: bool,
}

/// The control messages in `bytes`.
#[inline]
pub(crate) fn messages(bytes: &[u8]) -> Messages<'_> {
    Messages {
        rest: bytes,
        malformed: false,
    }
}

impl Messages<'_> {
    /// Whether the kernel would take them from the program.
    pub(crate) fn are_sound(mut self) -> bool {
        while self.next().is_some() {}
        !self.malformed
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    #[inline]
    fn next(&mut self) -> Option<Message<'a>> {
        if self.rest.len() < mem::size_of::<cmsghdr>() {
            return None;
        }
        // SAFETY: that many bytes are there, and all values of the type are valid.
        let header = unsafe { self.rest.as_ptr().cast::<cmsghdr>().read_unaligned() };
        #[expect(
            clippy::allow_attributes,
            reason = "cmsg_len is a usize with glibc only"
        )]
        #[allow(clippy::useless_conversion, clippy::unnecessary_fallible_conversions)]
        let len = usize::try_from(header.cmsg_len).unwrap_or(usize::MAX);
        let Some(data) = self.rest.get(HEADER..len) else {
            self.malformed = true;
            self.rest = &[];
            return None;
        };
        self.rest = self.rest.get(align(len)..).unwrap_or_default();
        Some(Message {
            level: header.cmsg_level,
            kind: header.cmsg_type,
            data,
        })
    }
}

/// Writes control messages as the kernel does: what has no room is cut or left out.
#[derive(Debug)]
pub(crate) struct Writer {
    at: *mut u8,
    room: usize,
    used: usize,
    truncated: bool,
}

impl Writer {
    /// # Safety
    ///
    /// `at` is null or `room` bytes can be written there, for as long as this lives.
    pub(crate) unsafe fn new(at: *mut u8, room: usize) -> Self {
        Self {
            at,
            room: if at.is_null() { 0 } else { room },
            used: 0,
            truncated: false,
        }
    }

    /// How many bytes of the buffer are in use.
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// Whether something was cut or left out.
    pub(crate) fn is_truncated(&self) -> bool {
        self.truncated
    }

    pub(crate) fn put(&mut self, Message { level, kind, data }: Message<'_>) {
        let room = self.room - self.used;
        if room < mem::size_of::<cmsghdr>() {
            self.truncated = true;
            return;
        }
        let whole = HEADER + data.len();
        let len = whole.min(room);
        self.truncated |= len < whole;
        // SAFETY: zeroes are a valid value of this type.
        let mut header: cmsghdr = unsafe { mem::zeroed() };
        header.cmsg_len = len as _;
        header.cmsg_level = level;
        header.cmsg_type = kind;
        // SAFETY: `used + len` is at most `room`, for which the creator vouches. The buffer
        // may be unaligned.
        unsafe {
            let at = self.at.add(self.used);
            at.cast::<cmsghdr>().write_unaligned(header);
            ptr::copy_nonoverlapping(data.as_ptr(), at.add(HEADER), len - HEADER);
        }
        self.used += align(whole).min(room);
    }

    /// The source address of a datagram to be sent.
    pub(crate) fn put_source(&mut self, source: IpAddr, interface: u32) {
        // SAFETY: zeroes are valid values of both types.
        let (mut v4, mut v6) =
            unsafe { (mem::zeroed::<in_pktinfo>(), mem::zeroed::<in6_pktinfo>()) };
        match source.to_canonical() {
            IpAddr::V4(ip) => {
                v4.ipi_spec_dst.s_addr = u32::from_ne_bytes(ip.octets());
                self.put(Message {
                    level: IPPROTO_IP,
                    kind: IP_PKTINFO,
                    data: bytes_of(&v4),
                });
            }
            IpAddr::V6(ip) => {
                v6.ipi6_addr.s6_addr = ip.octets();
                v6.ipi6_ifindex = interface;
                self.put(Message {
                    level: IPPROTO_IPV6,
                    kind: IPV6_PKTINFO,
                    data: bytes_of(&v6),
                });
            }
        }
    }

    /// The length of the segments of what is to be sent; 0 for none, whatever the socket's
    /// UDP_SEGMENT is.
    pub(crate) fn put_segment(&mut self, len: u16) {
        self.put(Message {
            level: SOL_UDP,
            kind: UDP_SEGMENT,
            data: &len.to_ne_bytes(),
        });
    }
}

fn bytes_of<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: the type has no padding, and the slice has its size and its lifetime.
    unsafe { std::slice::from_raw_parts(ptr::from_ref(value).cast::<u8>(), mem::size_of::<T>()) }
}

/// # Safety
///
/// The type has no padding, and any bytes are a valid value of it.
unsafe trait Plain: Copy {}
// SAFETY: three fields of four bytes.
unsafe impl Plain for in_pktinfo {}
// SAFETY: sixteen bytes, then four.
unsafe impl Plain for in6_pktinfo {}

impl Message<'_> {
    fn read<T: Plain>(&self) -> Option<T> {
        (self.data.len() >= mem::size_of::<T>())
            // SAFETY: enough bytes are there, and any are valid.
            .then(|| unsafe { self.data.as_ptr().cast::<T>().read_unaligned() })
    }

    pub(crate) fn is_pktinfo(&self) -> bool {
        matches!(
            (self.level, self.kind),
            (IPPROTO_IP, IP_PKTINFO) | (IPPROTO_IPV6, IPV6_PKTINFO)
        )
    }

    /// What the program set as the length of the segments that the kernel cuts.
    pub(crate) fn segment(&self) -> Option<u16> {
        if (self.level, self.kind) != (SOL_UDP, UDP_SEGMENT) {
            return None;
        }
        let len = self.data.first_chunk()?;
        Some(u16::from_ne_bytes(*len))
    }

    /// The address of this host that replies to the datagram must leave from.
    fn local(&self) -> Option<IpAddr> {
        match (self.level, self.kind) {
            (IPPROTO_IP, IP_PKTINFO) => {
                let info: in_pktinfo = self.read()?;
                let [to, local] = [info.ipi_addr, info.ipi_spec_dst]
                    .map(|ip| Ipv4Addr::from(ip.s_addr.to_ne_bytes()));
                // Not set if the datagram came before the socket asked for it.
                let local = if local.is_unspecified() { to } else { local };
                Some(IpAddr::V4(local))
            }
            (IPPROTO_IPV6, IPV6_PKTINFO) => {
                let info: in6_pktinfo = self.read()?;
                Some(IpAddr::V6(Ipv6Addr::from(info.ipi6_addr.s6_addr)).to_canonical())
            }
            _ => None,
        }
        .filter(|ip| !ip.is_multicast() && !ip.is_unspecified())
    }
}

/// The address of this host that replies must leave from, if the kernel tells it.
pub(crate) fn local(control: &[u8]) -> Option<IpAddr> {
    messages(control).find_map(|message| message.local())
}

/// What the program asked to see of packet info.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub(crate) v4: bool,
    pub(crate) v6: bool,
    /// To be shown in place of the local address.
    pub(crate) destination: Option<SocketAddr>,
}

/// Gives the program its control data: all but packet info that it did not ask for.
pub(crate) fn give(control: &[u8], wanted: Wanted, to: &mut Writer) {
    for message in messages(control) {
        match (message.level, message.kind) {
            (IPPROTO_IP, IP_PKTINFO) => {
                if wanted.v4 {
                    give_v4(message, wanted.destination, to);
                }
            }
            (IPPROTO_IPV6, IPV6_PKTINFO) => {
                if wanted.v6 {
                    give_v6(message, wanted.destination, to);
                }
            }
            _ => to.put(message),
        }
    }
}

fn give_v4(message: Message<'_>, destination: Option<SocketAddr>, to: &mut Writer) {
    let shown = destination.map(|destination| destination.ip().to_canonical());
    if let Some(IpAddr::V4(ip)) = shown
        && let Some(mut info) = message.read::<in_pktinfo>()
    {
        info.ipi_addr.s_addr = u32::from_ne_bytes(ip.octets());
        info.ipi_spec_dst = info.ipi_addr;
        let data = bytes_of(&info);
        to.put(Message { data, ..message });
    } else {
        to.put(message);
    }
}

fn give_v6(message: Message<'_>, destination: Option<SocketAddr>, to: &mut Writer) {
    if let Some(destination) = destination
        && let Some(mut info) = message.read::<in6_pktinfo>()
    {
        info.ipi6_addr.s6_addr = match destination.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        };
        let data = bytes_of(&info);
        to.put(Message { data, ..message });
    } else {
        to.put(message);
    }
}
