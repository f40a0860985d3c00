//! Control data: what the program sees of it, and what a reply needs.

use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ptr;

use libc::{
    IP_PKTINFO, IPPROTO_IP, IPPROTO_IPV6, IPV6_PKTINFO, SOL_UDP, UDP_SEGMENT, c_int, cmsghdr,
    in_pktinfo, in6_pktinfo,
};

/// Where the data of a control message begins.
const HEADER: usize = align(size_of::<cmsghdr>());

const fn align(len: usize) -> usize {
    len.next_multiple_of(size_of::<usize>())
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
        if self.rest.len() < size_of::<cmsghdr>() {
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
        if room < size_of::<cmsghdr>() {
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
    unsafe { std::slice::from_raw_parts(ptr::from_ref(value).cast::<u8>(), size_of::<T>()) }
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
        (self.data.len() >= size_of::<T>())
            // SAFETY: enough bytes are there, and any are valid.
            .then(|| unsafe { self.data.as_ptr().cast::<T>().read_unaligned() })
    }

    pub(crate) fn is_pktinfo(&self) -> bool {
        matches!(
            (self.level, self.kind),
            (IPPROTO_IP, IP_PKTINFO) | (IPPROTO_IPV6, IPV6_PKTINFO)
        )
    }

    /// Whether the kernel takes it from the program, if it is packet info.
    pub(crate) fn is_whole_pktinfo(&self) -> bool {
        match self.level {
            IPPROTO_IP => self.data.len() == size_of::<in_pktinfo>(),
            _ => self.data.len() >= size_of::<in6_pktinfo>(),
        }
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

#[cfg(test)]
mod tests {
    use libc::{IP_TOS, IP_TTL, SCM_TIMESTAMP, SOL_SOCKET, msghdr};
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    type Owned = (c_int, c_int, Vec<u8>);

    fn owned(message: Message<'_>) -> Owned {
        (message.level, message.kind, message.data.to_vec())
    }

    fn borrowed((level, kind, data): &Owned) -> Message<'_> {
        Message {
            level: *level,
            kind: *kind,
            data,
        }
    }

    /// The same by the C library's macros.
    fn by_macros(buffer: &mut [u64], len: usize) -> Vec<Owned> {
        // SAFETY: zeroes are a valid value.
        let mut header: msghdr = unsafe { mem::zeroed() };
        header.msg_control = buffer.as_mut_ptr().cast();
        header.msg_controllen = len;
        let mut found = Vec::new();
        // SAFETY: the macros read within the buffer, whose messages are sound.
        unsafe {
            let mut at = libc::CMSG_FIRSTHDR(&raw const header);
            while !at.is_null() {
                let data = libc::CMSG_DATA(at);
                let len = (*at).cmsg_len - data.offset_from_unsigned(at.cast());
                let data = std::slice::from_raw_parts(data, len).to_vec();
                found.push(((*at).cmsg_level, (*at).cmsg_type, data));
                at = libc::CMSG_NXTHDR(&raw const header, at);
            }
        }
        found
    }

    fn bytes(buffer: &[u64], len: usize) -> &[u8] {
        // SAFETY: the buffer is longer.
        unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast(), len) }
    }

    fn written(messages: &[Owned], room: usize) -> (Vec<u64>, usize, bool) {
        let mut buffer = vec![0_u64; 512];
        // SAFETY: there is as much room.
        let mut writer = unsafe { Writer::new(buffer.as_mut_ptr().cast(), room) };
        messages
            .iter()
            .for_each(|message| writer.put(borrowed(message)));
        let (used, truncated) = (writer.used(), writer.is_truncated());
        (buffer, used, truncated)
    }

    fn some_messages() -> impl Strategy<Value = Vec<Owned>> {
        vec(
            (any::<c_int>(), any::<c_int>(), vec(any::<u8>(), 0..80)),
            0..8,
        )
    }

    proptest! {
        #[test]
        fn written_messages_are_found_by_us_and_by_the_macros(messages in some_messages()) {
            let (mut buffer, used, truncated) = written(&messages, 4096);
            prop_assert!(!truncated);
            let found: Vec<_> = super::messages(bytes(&buffer, used)).map(owned).collect();
            prop_assert_eq!(&found, &messages);
            prop_assert_eq!(by_macros(&mut buffer, used), messages);
        }

        #[test]
        fn any_bytes_are_walked_over(garbage in vec(any::<u8>(), 0..200)) {
            let walked = messages(&garbage);
            let found: usize = walked.map(|message| message.data.len() + HEADER).sum();
            prop_assert!(found <= garbage.len());
            let _ = walked.are_sound();
            let _ = local(&garbage);
        }

        #[test]
        fn a_short_buffer_is_filled_as_the_kernel_does(
            messages in some_messages(),
            room in 0_usize..300,
        ) {
            let (buffer, used, truncated) = written(&messages, room);
            prop_assert!(used <= room);
            prop_assert!(buffer[room.div_ceil(8)..].iter().all(|word| *word == 0));
            let whole: usize = messages.iter().map(|(_, _, data)| HEADER + align(data.len())).sum();
            if room >= whole {
                prop_assert!(!truncated);
                prop_assert_eq!(used, whole);
            }
            for (found, put) in super::messages(bytes(&buffer, used)).zip(&messages) {
                prop_assert_eq!((found.level, found.kind), (put.0, put.1));
                prop_assert!(put.2.starts_with(found.data));
            }
        }
    }

    fn pktinfo(local: [u8; 4], to: [u8; 4]) -> Owned {
        // SAFETY: zeroes are a valid value.
        let mut info: in_pktinfo = unsafe { mem::zeroed() };
        info.ipi_ifindex = 7;
        info.ipi_spec_dst.s_addr = u32::from_ne_bytes(local);
        info.ipi_addr.s_addr = u32::from_ne_bytes(to);
        (IPPROTO_IP, IP_PKTINFO, bytes_of(&info).to_vec())
    }

    fn pktinfo6(ip: &str) -> Owned {
        // SAFETY: zeroes are a valid value.
        let mut info: in6_pktinfo = unsafe { mem::zeroed() };
        info.ipi6_ifindex = 7;
        info.ipi6_addr.s6_addr = ip.parse::<Ipv6Addr>().unwrap().octets();
        (IPPROTO_IPV6, IPV6_PKTINFO, bytes_of(&info).to_vec())
    }

    #[test]
    fn the_local_address_is_found() {
        let tos: Owned = (IPPROTO_IP, IP_TOS, vec![1]);
        let of = |info: Owned| {
            let (buffer, used, _) = written(&[tos.clone(), info], 4096);
            local(bytes(&buffer, used))
        };
        let v4 = Some(IpAddr::from([192, 0, 2, 1]));
        assert_eq!(of(pktinfo([192, 0, 2, 1], [192, 0, 2, 255])), v4);
        assert_eq!(of(pktinfo([0; 4], [192, 0, 2, 1])), v4);
        assert_eq!(of(pktinfo([0; 4], [224, 0, 0, 1])), None);
        assert_eq!(of(pktinfo6("::ffff:192.0.2.1")), v4);
        assert_eq!(of(pktinfo6("2001:db8::1")), "2001:db8::1".parse().ok());
        assert_eq!(of(pktinfo6("ff02::1")), None);
        assert_eq!(of(tos.clone()), None);
    }

    fn given(messages: &[Owned], wanted: Wanted) -> Vec<Owned> {
        let (buffer, used, _) = written(messages, 4096);
        let mut out = vec![0_u64; 512];
        // SAFETY: there is as much room.
        let mut writer = unsafe { Writer::new(out.as_mut_ptr().cast(), 4096) };
        give(bytes(&buffer, used), wanted, &mut writer);
        let used = writer.used();
        super::messages(bytes(&out, used)).map(owned).collect()
    }

    #[test]
    fn the_program_sees_packet_info_only_if_it_asked() {
        let stamp: Owned = (SOL_SOCKET, SCM_TIMESTAMP, vec![9; 16]);
        let (v4, v6) = (
            pktinfo([10, 0, 0, 1], [10, 0, 0, 1]),
            pktinfo6("::ffff:10.0.0.1"),
        );
        let ttl: Owned = (IPPROTO_IP, IP_TTL, vec![64, 0, 0, 0]);
        let all = [stamp.clone(), v4.clone(), v6, ttl.clone()];
        let wanted = |v4, v6, destination: Option<&str>| Wanted {
            v4,
            v6,
            destination: destination.map(|text| text.parse().unwrap()),
        };

        let rest = [stamp.clone(), ttl.clone()];
        assert_eq!(given(&all, wanted(false, false, None)), rest);
        let some = [stamp.clone(), v4.clone(), ttl.clone()];
        assert_eq!(given(&all, wanted(true, false, None)), some);
        assert_eq!(given(&all, wanted(true, true, None)), all);

        let shown = given(&all, wanted(true, true, Some("198.51.100.10:53")));
        let new = pktinfo([198, 51, 100, 10], [198, 51, 100, 10]);
        assert_eq!(
            shown,
            [
                stamp.clone(),
                new,
                pktinfo6("::ffff:198.51.100.10"),
                ttl.clone()
            ]
        );
        // IP_PKTINFO has no room for an IPv6 address.
        let shown = given(&all, wanted(true, true, Some("[2001:db8::10]:53")));
        assert_eq!(shown, [stamp, v4, pktinfo6("2001:db8::10"), ttl]);
    }

    #[test]
    fn malformed_messages_are_not_sound() {
        let (buffer, used, _) = written(&[(1, 2, vec![3; 5])], 4096);
        assert!(messages(bytes(&buffer, used)).are_sound());
        assert!(messages(&[0; 15]).are_sound());
        // A length of nothing, and one beyond the end.
        assert!(!messages(&[0; 16]).are_sound());
        assert!(!messages(bytes(&buffer, 20)).are_sound());
    }
}
