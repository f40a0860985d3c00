//! What this host's kernel says of its addresses, interfaces and parameters, to
//! `host-setup` and `doctor`. Nothing here needs a privilege or changes anything.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;
use rustix::net::{AddressFamily, SocketType, netdevice};

use crate::config::Config;
use ppv2_engine::address::own_addresses;
use route::{NoRoute, Packet};

pub mod route;

/// A client nobody has, in the networks kept for documentation (RFC 5737, RFC
/// 3849): the way to it is the way to clients anywhere.
const ANYONE: [&str; 2] = ["203.0.113.1", "2001:db8:ffff::1"];

/// Whether `ip` is this host's own.
#[must_use]
pub fn is_own(ip: IpAddr) -> bool {
    ip.is_loopback() || own_addresses().is_ok_and(|own| own.contains(&ip))
}

/// What keeps an IPv6 address of this host's from being used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// It is tentative: duplicate address detection goes on, which takes some seconds
    /// (RFC 4862, section 5.4).
    Tentative,
    /// Duplicate address detection has found another host with it.
    Duplicate,
}

/// What keeps `ip` from being used; `None` if nothing does, or it isn't this host's.
#[must_use]
pub fn unusable(ip: IpAddr) -> Option<Unusable> {
    let IpAddr::V6(ip) = ip else {
        return None;
    };
    unusable_by(&fs::read_to_string("/proc/net/if_inet6").ok()?, ip)
}

/// `table` has a line for each address: it, its interface's number, its prefix's length,
/// scope, flags, all hexadecimal, and the interface.
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
    // An IPv4 address with a label is listed under that, which begins with the
    // interface and a colon (ip-address(8)).
    let (name, _) = has_it.name.split_once(':').unwrap_or((&has_it.name, ""));
    Some(name.to_owned())
}

/// Whether a script can name this interface without quotes. The kernel allows more.
#[must_use]
pub fn is_plain_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    // IFNAMSIZ, less the closing zero.
    (1..=15).contains(&name.len()) && name.chars().all(plain)
}

/// The name of interface `index`.
#[must_use]
pub fn interface_name(index: u32) -> Option<String> {
    netdevice::index_to_name(any_socket().ok()?, index).ok()
}

/// The number of interface `name`.
///
/// # Errors
///
/// That there is none.
pub fn interface_index(name: &str) -> io::Result<u32> {
    Ok(netdevice::name_to_index(any_socket()?, name)?)
}

fn any_socket() -> io::Result<std::os::fd::OwnedFd> {
    Ok(rustix::net::socket(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        None,
    )?)
}

/// A kernel parameter that is a number, under its path below /proc/sys.
#[must_use]
pub fn parameter(path: &str) -> Option<u32> {
    let text = fs::read_to_string(format!("/proc/sys/{path}")).ok()?;
    text.trim().parse().ok()
}

/// UDP datagrams that this host's kernel has dropped so far since no socket took them, of
/// both families.
#[must_use]
pub fn datagrams_without_socket() -> Option<u64> {
    let v4 = fs::read_to_string("/proc/net/snmp").ok()?;
    let mut lines = v4.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let (names, values) = (lines.next()?.split(' '), lines.next()?.split(' '));
    let (_, v4) = names.zip(values).find(|(name, _)| *name == "NoPorts")?;
    // It is missing where IPv6 is.
    let v6 = fs::read_to_string("/proc/net/snmp6").unwrap_or_default();
    let mut lines = v6.lines();
    let v6 = lines.find_map(|line| line.strip_prefix("Udp6NoPorts"));
    let v6 = v6.map_or(Ok(0), |count| count.trim().parse::<u64>());
    Some(v4.parse::<u64>().ok()? + v6.ok()?)
}

/// The numbers of interfaces, but loopback, whose `rp_filter` is strict: nothing comes in
/// there but from where it would be answered by the same way.
#[must_use]
pub fn strict_interfaces() -> Vec<u32> {
    let Ok(folders) = fs::read_dir("/proc/sys/net/ipv4/conf") else {
        return Vec::new();
    };
    let names = folders.filter_map(|folder| folder.ok()?.file_name().into_string().ok());
    let names = names.filter(|name| !["all", "default", "lo"].contains(&name.as_str()));
    let strict = names.filter(|name| larger_of_all_and(name, "rp_filter") == Some(1));
    strict
        .filter_map(|name| interface_index(&name).ok())
        .collect()
}

/// What counts of an IPv4 parameter of which the larger of all interfaces' and
/// one interface's is used, such as `rp_filter`.
#[must_use]
pub fn larger_of_all_and(interface: &str, name: &str) -> Option<u32> {
    let of = |place: &str| parameter(&format!("net/ipv4/conf/{place}/{name}"));
    of("all").max(of(interface))
}

/// The longest IP packet that goes to `to` in one piece: the MTU of the interface
/// that the route leads to, which is what the proxy's sockets go by.
///
/// # Errors
///
/// That there is no route, or what the kernel says.
pub fn interface_mtu(to: IpAddr) -> io::Result<usize> {
    let route = Packet::sent_to(to).route().map_err(|why| match why {
        NoRoute::Unreachable(error) | NoRoute::BadSource(error) | NoRoute::Unknown(error) => error,
    })?;
    let mtu = route::mtu(route.interface)?;
    // A link may carry more than the length field of IP can say.
    Ok(usize::try_from(mtu).unwrap_or(usize::MAX).min(65_535))
}

/// Bytes of UDP payload in an IP packet of `mtu` bytes to `to`.
#[must_use]
pub fn payload_of(mtu: usize, to: IpAddr) -> usize {
    let headers = if to.is_ipv4() { 20 + 8 } else { 40 + 8 };
    mtu.saturating_sub(headers)
}

/// An address that a client of IPv4 or IPv6 may have: of the first network that
/// a listener allows, if that is not everybody's. `None` where everybody may.
#[must_use]
pub fn allowed_client(config: &Config, v4: bool) -> Option<IpAddr> {
    let networks = config.listeners.iter().flat_map(|listener| &listener.allow);
    let narrow = |network: &&IpNet| network.prefix_len() > 0 && network.addr().is_ipv4() == v4;
    let network = networks.into_iter().find(narrow)?;
    network.hosts().next()
}

/// As [`allowed_client`], or an address that only the widest routes lead to.
#[must_use]
pub fn some_client(config: &Config, v4: bool) -> IpAddr {
    let anyone = || ANYONE[usize::from(!v4)].parse();
    allowed_client(config, v4).unwrap_or_else(|| anyone().expect("it is an address"))
}

/// Whether `client` stands for clients anywhere, whom nobody named.
#[must_use]
pub fn is_anyone(client: IpAddr) -> bool {
    ANYONE.iter().any(|anyone| anyone.parse() == Ok(client))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn a_client_is_one_that_a_listener_allows() {
        let config = Config::from_toml(
            "x",
            "[[listener]]\nbind = [\"127.0.0.1:5300\"]\nallow = [\"198.51.100.0/24\", \"::/0\"]\n\
             upstream = \"u\"\n[upstream.u]\nservers = [\"192.0.2.1:53\"]\n",
        )
        .unwrap();
        let allowed = Some("198.51.100.1".parse().unwrap());
        assert_eq!(allowed_client(&config, true), allowed);
        assert_eq!(Some(some_client(&config, true)), allowed);
        assert_eq!(allowed_client(&config, false), None);
        assert!(some_client(&config, false).is_ipv6());
    }

    #[test]
    fn datagrams_without_socket_are_those_that_nobody_takes() {
        let before = datagrams_without_socket().unwrap();
        for ip in ["127.0.0.1", "::1"] {
            let gone = UdpSocket::bind((ip, 0)).unwrap().local_addr().unwrap();
            let socket = UdpSocket::bind((ip, 0)).unwrap();
            socket.send_to(b"lost", gone).unwrap();
        }
        // Others' may be among them.
        assert!(datagrams_without_socket().unwrap() >= before + 2);
    }

    #[test]
    fn an_address_is_unusable_until_no_other_host_has_it() {
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
    fn loopback_is_known_by_name_number_and_address() {
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
