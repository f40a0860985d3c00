//! The client's, listener's and server's addresses, as types that can't be swapped.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// The addresses of this host's interfaces; all of 127.0.0.0/8 is this host's besides.
///
/// # Errors
///
/// Those of asking the kernel for them.
pub fn own_addresses() -> io::Result<Vec<IpAddr>> {
    let interfaces = if_addrs::get_if_addrs()?.into_iter();
    Ok(interfaces.map(|interface| interface.ip()).collect())
}

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub SocketAddr);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

/// The 128 bits of an IPv6 address, of which the first `ipv6_prefix`, at most 128,
/// are kept and the rest are 0; or all of an IPv4 one, mapped into IPv6.
#[must_use]
pub fn network_bits(ip: IpAddr, ipv6_prefix: u8) -> u128 {
    match ip.to_canonical() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => {
            let host = u128::MAX.checked_shr(ipv6_prefix.into()).unwrap_or(0);
            v6.to_bits() & !host
        }
    }
}

address! {
    /// Who wrote to a listener, and who alone gets the replies.
    ClientAddr
}
address! {
    /// The address that a client wrote to: on a wildcard listener one of the
    /// host's own. Replies leave from it.
    ListenerAddr
}
address! {
    /// A server of an upstream.
    ServerAddr
}

/// Ports from the first to the last, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortRange {
    /// The first.
    pub first: u16,
    /// The last, which is not lower.
    pub last: u16,
}

impl PortRange {
    /// This port alone.
    #[must_use]
    pub fn single(port: u16) -> Self {
        Self {
            first: port,
            last: port,
        }
    }

    /// Whether the port is one of them.
    #[must_use]
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    /// Whether both have a port in common.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// How many they are.
    #[must_use]
    pub fn count(self) -> usize {
        usize::from(self.last.saturating_sub(self.first)) + 1
    }
}

/// As `40000-40999`, or `53` for one port.
impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first)?;
        if self.last > self.first {
            write!(f, "-{}", self.last)?;
        }
        Ok(())
    }
}

/// A socket address in 23 bytes rather than 32. The flow label is left out: the kernel
/// tells none of a datagram that it has received.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Compact {
    /// An IPv4 address is in the first four.
    ip: [u8; 16],
    scope: [u8; 4],
    port: [u8; 2],
    is_v6: bool,
}

impl Compact {
    pub(crate) fn of(address: SocketAddr) -> Self {
        let port = address.port().to_ne_bytes();
        match address {
            SocketAddr::V4(v4) => {
                let mut ip = [0; 16];
                ip[..4].copy_from_slice(&v4.ip().octets());
                Self {
                    ip,
                    scope: [0; 4],
                    port,
                    is_v6: false,
                }
            }
            SocketAddr::V6(v6) => Self {
                ip: v6.ip().octets(),
                scope: v6.scope_id().to_ne_bytes(),
                port,
                is_v6: true,
            },
        }
    }

    pub(crate) fn address(self) -> SocketAddr {
        let port = u16::from_ne_bytes(self.port);
        if self.is_v6 {
            let scope = u32::from_ne_bytes(self.scope);
            SocketAddrV6::new(Ipv6Addr::from(self.ip), port, 0, scope).into()
        } else {
            SocketAddr::new(self.v4().into(), port)
        }
    }

    /// Whether it is this address.
    pub(crate) fn is(&self, address: &SocketAddr) -> bool {
        address.port() == u16::from_ne_bytes(self.port)
            && match address {
                SocketAddr::V4(v4) => !self.is_v6 && *v4.ip() == self.v4(),
                SocketAddr::V6(v6) => {
                    self.is_v6
                        && v6.ip().octets() == self.ip
                        && v6.scope_id() == u32::from_ne_bytes(self.scope)
                }
            }
    }

    fn v4(&self) -> Ipv4Addr {
        let [a, b, c, d, ..] = self.ip;
        Ipv4Addr::new(a, b, c, d)
    }
}

impl fmt::Debug for Compact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address().fmt(f)
    }
}

/// Whether no host has this address: it is a group's, a broadcast address of every
/// network or of loopback, or of the network 0.0.0.0/8, which names no host (RFC 1122,
/// section 3.2.1.3). Wildcards, too, name no host.
#[must_use]
pub fn is_no_host(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => {
            let broadcasts = [Ipv4Addr::BROADCAST, Ipv4Addr::new(127, 255, 255, 255)];
            ip.is_multicast() || ip.octets()[0] == 0 || broadcasts.contains(&ip)
        }
        IpAddr::V6(ip) => ip.is_multicast() || ip.is_unspecified(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_broadcasts_and_wildcards_are_no_hosts() {
        for none in [
            "0.0.0.0",
            "0.1.2.3",
            "224.0.0.1",
            "239.255.255.255",
            "255.255.255.255",
            "127.255.255.255",
            "::",
            "ff02::1",
            "::ffff:224.0.0.1",
            "::ffff:127.255.255.255",
            "::ffff:0.0.0.0",
        ] {
            assert!(is_no_host(none.parse().unwrap()), "{none}");
        }
        for host in ["127.0.0.1", "127.255.255.254", "1.0.0.0", "::1", "fe80::1"] {
            assert!(!is_no_host(host.parse().unwrap()), "{host}");
        }
    }

    #[test]
    fn addresses_come_back_as_they_were_and_differ_in_all_that_they_have() {
        let addresses: [SocketAddr; 8] = [
            "192.0.2.1:53",
            "192.0.2.1:54",
            "192.0.2.2:53",
            "[::ffff:192.0.2.1]:53",
            // As the bytes of the first are kept.
            "[c000:201::]:53",
            "[fe80::1%1]:53",
            "[fe80::1%2]:53",
            "[fe80::2%1]:53",
        ]
        .map(|text| text.parse().unwrap());
        for one in addresses {
            let compact = Compact::of(one);
            assert_eq!(compact.address(), one);
            for other in addresses {
                assert_eq!(compact.is(&other), one == other, "{one} {other}");
            }
        }
    }

    #[test]
    fn the_prefix_cuts_ipv6_alone() {
        let ones = IpAddr::from([u8::MAX; 16]);
        for len in 0..=128 {
            let bits = network_bits(ones, len);
            assert_eq!(bits.leading_ones(), u32::from(len));
            assert_eq!(bits.count_ones(), u32::from(len));
        }
        let v4 = IpAddr::from([192, 0, 2, 1]);
        let mapped: IpAddr = "::ffff:192.0.2.1".parse().unwrap();
        assert_eq!(network_bits(v4, 0), network_bits(mapped, 64));
        assert_eq!(network_bits(v4, 0), 0xffff_c000_0201);
    }

    #[test]
    fn loopback_is_among_the_hosts_own_addresses() {
        let own = own_addresses().unwrap();
        assert!(own.contains(&"127.0.0.1".parse().unwrap()), "{own:?}");
    }
}
