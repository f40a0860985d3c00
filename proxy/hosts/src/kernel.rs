//! This host's addresses, interfaces, parameters and counters, as its kernel tells them.
//! Nothing here needs a privilege or changes anything.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketType, netdevice, socket};

use crate::route::{self, Packet};

/// Whether `ip` is this host's own.
#[must_use]
pub fn is_own(ip: IpAddr) -> bool {
    ip.is_loopback() || interface_with(ip).is_some()
}

/// Why an IPv6 address of this host can't be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// Duplicate address detection is still running, which takes some seconds (RFC 4862,
    /// section 5.4).
    Tentative,
    /// Duplicate address detection has found another host with it.
    Duplicate,
}

/// Why `ip` can't be used; `None` if it can, or if this host doesn't have it.
#[must_use]
pub fn unusable(ip: IpAddr) -> Option<Unusable> {
    let IpAddr::V6(ip) = ip else {
        return None;
    };
    unusable_by(&fs::read_to_string("/proc/net/if_inet6").ok()?, ip)
}

/// `table` has a line for each address: the address, the interface's index, the length of
/// the prefix, scope, flags, all hexadecimal, and the interface's name.
fn unusable_by(table: &str, ip: Ipv6Addr) -> Option<Unusable> {
    // IFA_F_DADFAILED and IFA_F_tentative of linux/if_addr.h.
    let (dad_failed, tentative) = (0x08, 0x40);
    let ip = format!("{:032x}", ip.to_bits());
    let line = table.lines().find(|line| line.starts_with(&ip))?;
    let flags = line.split_whitespace().nth(4)?;
    let flags = u32::from_str_radix(flags, 16).ok()?;
    if flags & dad_failed != 0 {
        Some(Unusable::Duplicate)
    } else {
        (flags & tentative != 0).then_some(Unusable::Tentative)
    }
}

/// The name of the interface that has `ip`.
#[must_use]
pub fn interface_with(ip: IpAddr) -> Option<String> {
    let interfaces = if_addrs::get_if_addrs().ok()?;
    let has_it = interfaces.into_iter().find(|found| found.ip() == ip)?;
    // An IPv4 address with a label is listed under the label, which begins with the
    // interface's name and a colon (ip-address(8)).
    let (name, _) = has_it.name.split_once(':').unwrap_or((&has_it.name, ""));
    Some(name.to_owned())
}

/// Whether an interface's name is safe in a shell script and in nft's rules. The kernel
/// allows others.
pub(crate) fn is_plain_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    // IFNAMSIZ, less the closing zero.
    (1..=15).contains(&name.len()) && name.chars().all(plain)
}

/// The name of the interface with this index.
#[must_use]
pub fn interface_name(index: u32) -> Option<String> {
    netdevice::index_to_name(any_socket().ok()?, index).ok()
}

/// The index of the interface with this name.
///
/// # Errors
///
/// That there is none.
pub fn interface_index(name: &str) -> io::Result<u32> {
    Ok(netdevice::name_to_index(any_socket()?, name)?)
}

fn any_socket() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::UNIX, SocketType::DGRAM, None)?)
}

/// A kernel parameter that is a number, under its path below /proc/sys.
#[must_use]
pub fn parameter(path: &str) -> Option<u32> {
    let text = fs::read_to_string(format!("/proc/sys/{path}")).ok()?;
    text.trim().parse().ok()
}

/// A value of each counter of IP and UDP, of both families, by its name as nstat(8)
/// shows it.
pub(crate) type Counters = BTreeMap<String, u64>;

/// Reads all counters.
pub(crate) fn counters() -> Counters {
    let mut counters = Counters::new();
    for file in ["/proc/net/snmp", "/proc/net/netstat"] {
        parse_pairs(&fs::read_to_string(file).unwrap_or_default(), &mut counters);
    }
    // Missing where IPv6 is.
    let v6 = fs::read_to_string("/proc/net/snmp6").unwrap_or_default();
    let lines = v6
        .lines()
        .filter_map(|line| line.split_once(char::is_whitespace));
    let values = lines.filter_map(|(name, value)| Some((name, value.trim().parse().ok()?)));
    counters.extend(values.map(|(name, value)| (name.to_owned(), value)));
    counters
}

/// Parses pairs of a line of names and a line of values, both after the same word.
pub(crate) fn parse_pairs(text: &str, counters: &mut Counters) {
    let lines: Vec<_> = text.lines().collect();
    let (pairs, _) = lines.as_chunks::<2>();
    for [names, values] in pairs {
        let prefix = names.split(':').next().unwrap_or_default();
        let both = names.split_whitespace().zip(values.split_whitespace());
        let both = both
            .skip(1)
            .filter_map(|(name, value)| Some((name, value.parse().ok()?)));
        counters.extend(both.map(|(name, value)| (format!("{prefix}{name}"), value)));
    }
}

/// UDP datagrams that this host's kernel has dropped since no socket took them, of both
/// families.
#[must_use]
pub fn datagrams_without_socket() -> Option<u64> {
    let counters = counters();
    let v6 = counters.get("Udp6NoPorts").copied().unwrap_or(0);
    Some(counters.get("UdpNoPorts")? + v6)
}

/// The indexes of interfaces, without loopback, whose `rp_filter` is strict: the kernel
/// takes only packets whose source it would answer through the same interface.
#[must_use]
pub fn strict_interfaces() -> Vec<u32> {
    let Ok(folders) = fs::read_dir("/proc/sys/net/ipv4/conf") else {
        return Vec::new();
    };
    let names = folders.filter_map(|folder| folder.ok()?.file_name().into_string().ok());
    let names = names.filter(|name| !["all", "default", "lo"].contains(&name.as_str()));
    let strict = names.filter(|name| larger_of_all_and(name, "rp_filter") == 1);
    strict
        .filter_map(|name| interface_index(&name).ok())
        .collect()
}

/// The effective value of an IPv4 parameter of which the kernel uses the larger of
/// `all` and the interface's own, such as `rp_filter`. 0 if it can't be read.
pub(crate) fn larger_of_all_and(interface: &str, name: &str) -> u32 {
    let of = |place: &str| parameter(&format!("net/ipv4/conf/{place}/{name}"));
    of("all").max(of(interface)).unwrap_or(0)
}

/// The longest IP packet that goes to `to` unfragmented: the MTU of the interface that
/// the route leads to, which the proxy's sockets use. `None` without a route.
#[must_use]
pub fn interface_mtu(to: IpAddr) -> Option<usize> {
    let route = Packet::sent_to(to).route().ok()?;
    let mtu = route::mtu(route.interface).ok()?;
    // A link may carry more than the length field of IP can say.
    Some(usize::try_from(mtu).unwrap_or(usize::MAX).min(65_535))
}

/// Bytes of UDP payload in an IP packet of `mtu` bytes to `to`.
#[must_use]
pub fn payload_of(mtu: usize, to: IpAddr) -> usize {
    let headers = if to.is_ipv4() { 20 + 8 } else { 40 + 8 };
    mtu.saturating_sub(headers)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn datagrams_without_socket_are_counted() {
        let before = datagrams_without_socket().unwrap();
        for ip in ["127.0.0.1", "::1"] {
            let socket = UdpSocket::bind((ip, 0)).unwrap();
            // Nobody listens at the first port.
            socket.send_to(b"lost", (ip, 1)).unwrap();
        }
        // Other programs' may be among them.
        assert!(datagrams_without_socket().unwrap() >= before + 2);
    }

    #[test]
    fn tentative_and_duplicate_addresses_are_unusable() {
        let table = "20010db8000000000000000000000001 02 40 00 c0     eth0\n\
                     20010db8000000000000000000000002 02 40 00 c8     eth0\n\
                     20010db8000000000000000000000003 02 40 00 80     eth0\n";
        let all = (1..=4).map(|last| {
            let ip = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last);
            unusable_by(table, ip)
        });
        let expected = [
            Some(Unusable::Tentative),
            Some(Unusable::Duplicate),
            None,
            None,
        ];
        assert!(all.eq(expected));
        assert_eq!(unusable("::1".parse().unwrap()), None);
    }

    #[test]
    fn loopback_is_found_by_name_index_and_address() {
        let index = interface_index("lo").unwrap();
        assert_eq!(interface_name(index).as_deref(), Some("lo"));
        let address = "127.0.0.1".parse().unwrap();
        assert_eq!(interface_with(address).as_deref(), Some("lo"));
        assert!(is_own(address) && is_own("127.5.5.5".parse().unwrap()));
        assert!(!is_own("192.0.2.1".parse().unwrap()));
        assert!(interface_index("no-such-if").is_err());
        assert!(interface_mtu(address).unwrap() > 1280);
    }
}
