//! One spelling for every address, so that comparing two of them is enough.

use std::hash::{Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// `address` with a v4-mapped IPv6 address as the IPv4 address that it is: a
/// dual-stack socket reports its IPv4 peers mapped. Anything else is unchanged,
/// the scope of a link-local address included.
#[inline]
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    // Most are IPv4 already, and building a new address costs more than all the
    // rest.
    let SocketAddr::V6(v6) = address else {
        return address;
    };
    match v6.ip().to_ipv4_mapped() {
        Some(ip) => SocketAddr::new(IpAddr::V4(ip), address.port()),
        None => address,
    }
}

/// Whether a canonical `address` can be that of one client, to which a datagram
/// could be sent: that of no group, no broadcast of every network or of loopback, and not
/// in 0.0.0.0/8, which names no host (RFC 1122, section 3.2.1.3).
#[inline]
pub(crate) fn is_one_client(address: &SocketAddr) -> bool {
    let ip_is_one_hosts = match address {
        SocketAddr::V4(v4) => {
            let ip = v4.ip();
            let is_broadcast = ip.is_broadcast() || *ip == Ipv4Addr::new(127, 255, 255, 255);
            !(ip.octets()[0] == 0 || ip.is_multicast() || is_broadcast)
        }
        SocketAddr::V6(v6) => !(v6.ip().is_unspecified() || v6.ip().is_multicast()),
    };
    ip_is_one_hosts && address.port() != 0
}

/// An address as numbers, which compare and hash faster: every datagram pays for it
/// twice. An IPv4 address is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    /// In halves: a `u128` would be aligned to 16 bytes, and take 8 more.
    ip: [u64; 2],
    /// The port, and the scope of a link-local address.
    port: u64,
}

impl Hash for Key {
    #[inline]
    fn hash<H: Hasher>(&self, state: &mut H) {
        let [high, low] = self.ip;
        state.write_u128(u128::from(high) << 64 | u128::from(low));
        state.write_u64(self.port);
    }
}

impl From<SocketAddr> for Key {
    #[inline]
    fn from(address: SocketAddr) -> Self {
        let port = match address {
            SocketAddr::V4(v4) => v4.port().into(),
            SocketAddr::V6(v6) => u64::from(v6.scope_id()) << 16 | u64::from(v6.port()),
        };
        Self {
            ip: halves(address.ip()),
            port,
        }
    }
}

/// The bits of an IP address, an IPv4 one mapped.
#[inline]
pub(crate) fn halves(ip: IpAddr) -> [u64; 2] {
    match ip {
        IpAddr::V4(v4) => [0, 0xffff << 32 | u64::from(v4.to_bits())],
        IpAddr::V6(v6) => {
            let ip = v6.octets();
            let half = |at: usize| u64::from_be_bytes(std::array::from_fn(|index| ip[at + index]));
            [half(0), half(8)]
        }
    }
}

/// An address that a header names, in as little room as can be: it is remembered for each
/// client. An IPv4 address is mapped. A header has no place for a scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Compact {
    ip: [u8; 16],
    port: u16,
}

impl From<SocketAddr> for Compact {
    fn from(address: SocketAddr) -> Self {
        let ip = match address.ip() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        Self {
            ip: ip.octets(),
            port: address.port(),
        }
    }
}

impl From<Compact> for SocketAddr {
    /// In canonical form.
    fn from(address: Compact) -> Self {
        canonical((Ipv6Addr::from(address.ip), address.port).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn maps_back_to_ipv4_and_keeps_the_rest() {
        assert_eq!(
            canonical(addr("[::ffff:192.0.2.1]:53")),
            addr("192.0.2.1:53")
        );
        for same in [
            "192.0.2.1:53",
            "[2001:db8::1]:53",
            "[fe80::1%3]:53",
            "[::1]:1",
        ] {
            assert_eq!(canonical(addr(same)), addr(same));
        }
    }

    #[test]
    fn a_compact_address_is_the_canonical_one() {
        for text in [
            "192.0.2.1:53",
            "[2001:db8::1]:65535",
            "0.0.0.0:0",
            "[::]:1",
            "[::ffff:192.0.2.1]:53",
        ] {
            let compact = Compact::from(addr(text));
            assert_eq!(SocketAddr::from(compact), canonical(addr(text)));
        }
    }

    #[test]
    fn tells_clients_from_what_nobody_can_be() {
        for client in [
            "192.0.2.1:1",
            "127.0.0.1:65535",
            "[::1]:1",
            "[2001:db8::1]:53",
        ] {
            assert!(is_one_client(&addr(client)), "{client}");
        }
        for nobody in [
            "192.0.2.1:0",
            "[2001:db8::1]:0",
            "0.0.0.0:53",
            "0.1.2.3:53",
            "127.255.255.255:53",
            "[::]:53",
            "224.0.0.1:53",
            "239.255.255.255:53",
            "[ff02::1]:53",
            "255.255.255.255:53",
        ] {
            assert!(!is_one_client(&addr(nobody)), "{nobody}");
        }
    }
}
