//! Socket addresses as the C library passes them.

use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::ptr;

use libc::{
    AF_INET, AF_INET6, c_int, in_addr, in6_addr, sa_family_t, sockaddr, sockaddr_in, sockaddr_in6,
    socklen_t,
};

use crate::boundary::is_plausible;

/// The family of the address behind a pointer; `None` if it can't be read.
///
/// # Safety
///
/// `len` bytes can be read at `name`, or `is_plausible` sees that it is wrong.
#[inline]
pub(crate) unsafe fn family(name: *const sockaddr, len: socklen_t) -> Option<c_int> {
    if !is_plausible(name) || (len as usize) < size_of::<sa_family_t>() {
        return None;
    }
    // SAFETY: the family is within `len` bytes. The pointer may be unaligned.
    Some(unsafe { (&raw const (*name).sa_family).read_unaligned() }.into())
}

/// The IPv4 address behind a pointer, whatever its family; `None` if it is too short.
///
/// # Safety
///
/// `len` bytes can be read at `name`.
#[inline]
pub(crate) unsafe fn read_ipv4(name: *const sockaddr, len: socklen_t) -> Option<SocketAddr> {
    if (len as usize) < size_of::<sockaddr_in>() {
        return None;
    }
    // SAFETY: `len` bytes can be read, which is enough for the type, of which all values are
    // valid.
    let name = unsafe { name.cast::<sockaddr_in>().read_unaligned() };
    let ip = Ipv4Addr::from(name.sin_addr.s_addr.to_ne_bytes());
    Some(SocketAddr::from((ip, u16::from_be(name.sin_port))))
}

/// The address behind a pointer, IPv4-mapped ones as IPv4; `None` if it is null, too short
/// or of another family.
///
/// # Safety
///
/// As of `family`.
#[inline]
pub(crate) unsafe fn read(name: *const sockaddr, len: socklen_t) -> Option<SocketAddr> {
    // SAFETY: as the caller says.
    let family = unsafe { family(name, len) }?;
    let whole = len;
    let len = usize::try_from(len).ok()?;
    match family {
        // SAFETY: as the caller says.
        AF_INET => unsafe { read_ipv4(name, whole) },
        // An IPv6 address without its scope is valid (RFC 2133).
        AF_INET6 if len >= mem::offset_of!(sockaddr_in6, sin6_scope_id) => {
            // SAFETY: zeroes are a valid value of this type.
            let mut whole: sockaddr_in6 = unsafe { mem::zeroed() };
            if len >= size_of::<sockaddr_in6>() {
                // SAFETY: `len` bytes can be read, and any are valid.
                whole = unsafe { name.cast::<sockaddr_in6>().read_unaligned() };
            } else {
                // SAFETY: `len` bytes can be read, and fit.
                unsafe {
                    ptr::copy_nonoverlapping(name.cast::<u8>(), (&raw mut whole).cast::<u8>(), len);
                }
            }
            let ip = Ipv6Addr::from(whole.sin6_addr.s6_addr);
            let port = u16::from_be(whole.sin6_port);
            Some(match ip.to_ipv4_mapped() {
                Some(ip) => SocketAddr::from((ip, port)),
                None => {
                    SocketAddrV6::new(ip, port, whole.sin6_flowinfo, whole.sin6_scope_id).into()
                }
            })
        }
        _ => None,
    }
}

/// The port of a name, if it is one of IPv4 or IPv6; 0: none. It stands at the same place
/// in both, and in a name of no family, which Linux lets pass for an IPv4 one.
///
/// # Safety
///
/// As of `family`.
pub(crate) unsafe fn port(name: *const sockaddr, len: socklen_t) -> u16 {
    if !is_plausible(name) || !(4..=c_int::MAX as socklen_t).contains(&len) {
        return 0;
    }
    // SAFETY: as the caller says. The pointer may be unaligned.
    let [_, _, high, low] = unsafe { name.cast::<[u8; 4]>().read_unaligned() };
    u16::from_be_bytes([high, low])
}

/// As the kernel would report the address on a socket of this family; `None` for IPv6 on
/// an IPv4 socket.
#[inline]
pub(crate) fn written(address: SocketAddr, family: c_int) -> Option<(sockaddr_in6, socklen_t)> {
    // SAFETY: zeroes are a valid value of this type.
    let mut storage: sockaddr_in6 = unsafe { mem::zeroed() };
    let len = match (to_family(address, family)?, address.port()) {
        (IpAddr::V4(ip), port) => {
            let name = sockaddr_in {
                sin_family: AF_INET as sa_family_t,
                sin_port: port.to_be(),
                sin_addr: in_addr {
                    s_addr: u32::from_ne_bytes(ip.octets()),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: the storage is no shorter than an IPv4 name, and aligned as one.
            unsafe { (&raw mut storage).cast::<sockaddr_in>().write(name) };
            size_of::<sockaddr_in>()
        }
        (IpAddr::V6(ip), port) => {
            let (flowinfo, scope) = match address {
                SocketAddr::V4(_) => (0, 0),
                SocketAddr::V6(v6) => (v6.flowinfo(), v6.scope_id()),
            };
            let name = sockaddr_in6 {
                sin6_family: AF_INET6 as sa_family_t,
                sin6_port: port.to_be(),
                sin6_flowinfo: flowinfo,
                sin6_addr: in6_addr {
                    s6_addr: ip.octets(),
                },
                sin6_scope_id: scope,
            };
            // SAFETY: as above.
            storage = name;
            size_of::<sockaddr_in6>()
        }
    };
    Some((storage, len as socklen_t))
}

/// Whether a socket of this family can have or name this address.
#[inline]
pub(crate) fn fits(address: SocketAddr, family: c_int) -> bool {
    to_family(address, family).is_some()
}

#[inline]
fn to_family(address: SocketAddr, family: c_int) -> Option<IpAddr> {
    match (address.ip(), family) {
        (IpAddr::V4(ip), AF_INET6) => Some(ip.to_ipv6_mapped().into()),
        (ip @ IpAddr::V4(_), _) | (ip @ IpAddr::V6(_), AF_INET6) => Some(ip),
        (IpAddr::V6(ip), _) => ip.to_ipv4_mapped().map(IpAddr::V4),
    }
}

/// Gives the program an address as recvfrom(2) and getpeername(2) do: cut to `*len`,
/// which becomes the whole length.
///
/// # Safety
///
/// `name` is null, or `len` can be read and written and `*len` bytes written at `name`.
pub(crate) unsafe fn give(
    address: SocketAddr,
    family: c_int,
    name: *mut sockaddr,
    len: *mut socklen_t,
) {
    if name.is_null() || len.is_null() {
        return;
    }
    let Some((storage, whole)) = written(address, family) else {
        return;
    };
    // SAFETY: the caller lets us read it.
    let room = unsafe { len.read() };
    // SAFETY: at most `*len` bytes are written, and the storage is longer than `whole`.
    unsafe {
        ptr::copy_nonoverlapping(
            (&raw const storage).cast::<u8>(),
            name.cast::<u8>(),
            room.min(whole) as usize,
        );
        len.write(whole);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn addresses() -> impl Strategy<Value = SocketAddr> {
        let v4 = (any::<u32>(), any::<u16>())
            .prop_map(|(ip, port)| SocketAddr::from((Ipv4Addr::from_bits(ip), port)));
        let v6 = (any::<u128>(), any::<u16>(), any::<u32>(), any::<u32>()).prop_map(
            |(ip, port, flowinfo, scope)| {
                SocketAddrV6::new(Ipv6Addr::from_bits(ip), port, flowinfo, scope).into()
            },
        );
        let mapped = any::<(u32, u16)>().prop_map(|(ip, port)| {
            SocketAddr::from((Ipv4Addr::from_bits(ip).to_ipv6_mapped(), port))
        });
        prop_oneof![v4, v6, mapped]
    }

    fn canonical(address: SocketAddr) -> SocketAddr {
        match address.ip().to_canonical() {
            ip @ IpAddr::V4(_) => SocketAddr::new(ip, address.port()),
            IpAddr::V6(_) => address,
        }
    }

    fn read_back(storage: &sockaddr_in6, len: socklen_t) -> Option<SocketAddr> {
        // SAFETY: that many bytes are there.
        unsafe { read(ptr::from_ref(storage).cast(), len) }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(address in addresses()) {
            let (storage, len) = written(address, AF_INET6).unwrap();
            prop_assert_eq!(c_int::from(storage.sin6_family), AF_INET6);
            prop_assert_eq!(len, 28);
            prop_assert_eq!(read_back(&storage, len), Some(canonical(address)));

            let on_v4 = written(address, AF_INET);
            prop_assert_eq!(on_v4.is_some(), canonical(address).is_ipv4());
            prop_assert_eq!(fits(address, AF_INET), on_v4.is_some());
            if let Some((storage, len)) = on_v4 {
                prop_assert_eq!(c_int::from(storage.sin6_family), AF_INET);
                prop_assert_eq!(len, 16);
                prop_assert_eq!(read_back(&storage, len), Some(canonical(address)));
            }
        }

        #[test]
        fn names_are_cut_to_the_room_there_is(address in addresses(), room in 0_u32..40) {
            let mut name = [0xee_u8; 48];
            let mut len = room;
            // SAFETY: the room is within the array.
            unsafe { give(address, AF_INET6, name.as_mut_ptr().cast(), &raw mut len) };
            prop_assert_eq!(len, 28);
            let (storage, whole) = written(address, AF_INET6).unwrap();
            let mut expected = [0xee_u8; 48];
            let cut = room.min(whole) as usize;
            // SAFETY: the storage is longer.
            let bytes = unsafe { std::slice::from_raw_parts((&raw const storage).cast(), cut) };
            expected[..cut].copy_from_slice(bytes);
            prop_assert_eq!(name, expected);
        }
    }

    #[test]
    fn short_and_foreign_names_are_no_addresses() {
        let (storage, len) = written("[2001:db8::1]:9000".parse().unwrap(), AF_INET6).unwrap();
        for len in [0, 1, 2, 16, 23, u32::MAX] {
            assert_eq!(read_back(&storage, len.min(23)), None);
        }
        // Without the scope (RFC 2133).
        assert!(read_back(&storage, 24).is_some());
        assert!(read_back(&storage, len).is_some());
        // SAFETY: null is allowed.
        assert_eq!(unsafe { read(ptr::null(), 16) }, None);

        let (mut storage, _) = written("192.0.2.1:9000".parse().unwrap(), AF_INET).unwrap();
        assert_eq!(read_back(&storage, 15), None);
        storage.sin6_family = libc::AF_UNIX as sa_family_t;
        assert_eq!(read_back(&storage, 16), None);
    }
}
