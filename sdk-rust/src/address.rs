//! One spelling for every address, so that comparing two of them is enough.

use std::net::{IpAddr, SocketAddr};

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
/// could be sent.
#[inline]
pub(crate) fn is_one_client(address: &SocketAddr) -> bool {
    let ip_is_one_hosts = match address {
        SocketAddr::V4(v4) => {
            let ip = v4.ip();
            !(ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast())
        }
        SocketAddr::V6(v6) => !(v6.ip().is_unspecified() || v6.ip().is_multicast()),
    };
    ip_is_one_hosts && address.port() != 0
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
