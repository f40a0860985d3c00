//! `bind` of a listener: an address, or a range of ports of one.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use ppv2_engine::address::PortRange;

use super::ConfigError;
use super::values::read_from_text;

/// The most addresses that the ranges of one listener have: the RTP ports of most media
/// servers. Each takes a socket of every worker.
pub(super) const MAX_RANGE_ADDRESSES: usize = 20_000;

/// What a listener is bound to: one address, or one for each port of a range.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Bind {
    first: SocketAddr,
    last: u16,
}
read_from_text!(Bind);

impl Bind {
    /// The ports `ports` of this address.
    #[must_use]
    pub fn new(mut address: SocketAddr, ports: PortRange) -> Self {
        address.set_port(ports.first);
        Self {
            first: address,
            last: ports.last.max(ports.first),
        }
    }

    /// The address with the first port.
    #[must_use]
    pub fn first(self) -> SocketAddr {
        self.first
    }

    /// The IP address.
    #[must_use]
    pub fn ip(self) -> IpAddr {
        self.first.ip()
    }

    /// Whether it is of IPv4.
    #[must_use]
    pub fn is_ipv4(self) -> bool {
        self.first.is_ipv4()
    }

    /// The ports.
    #[must_use]
    pub fn ports(self) -> PortRange {
        PortRange {
            first: self.first.port(),
            last: self.last,
        }
    }

    /// Whether it was written as one address, rather than as a range.
    #[must_use]
    pub fn is_single(self) -> bool {
        self.first.port() == self.last
    }

    /// All addresses.
    pub fn addresses(self) -> impl Iterator<Item = SocketAddr> + Clone {
        let mut address = self.first;
        (self.first.port()..=self.last).map(move |port| {
            address.set_port(port);
            address
        })
    }

    /// These addresses in order, with those of successive ports as a range.
    #[must_use]
    pub fn merged(addresses: impl IntoIterator<Item = SocketAddr>) -> Vec<Self> {
        let mut addresses: Vec<_> = addresses.into_iter().collect();
        addresses.sort_unstable();
        let mut merged: Vec<Self> = Vec::new();
        for address in addresses {
            let port = address.port();
            match merged.last_mut() {
                Some(latest)
                    if latest.last.checked_add(1) == Some(port)
                        && Self::new(address, latest.ports()) == *latest =>
                {
                    latest.last = port;
                }
                _ => merged.push(Self::from(address)),
            }
        }
        merged
    }
}

impl From<SocketAddr> for Bind {
    fn from(address: SocketAddr) -> Self {
        Self {
            first: address,
            last: address.port(),
        }
    }
}

impl FromStr for Bind {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let error = || {
            ConfigError::new(format!("`{text}` is not an IP address with a port"))
                .hint("write it as 192.0.2.1:53, [2001:db8::1]:53, 0.0.0.0:53, [::]:53 or, for a range of ports, 0.0.0.0:40000-40999")
        };
        let (ports, first) = ports(text)?.ok_or_else(error)?;
        let first = first.parse().map_err(|_| error())?;
        Ok(Self::new(first, ports))
    }
}

/// The port or ports at the end of `text`, and `text` with the first one alone; `None` if
/// there are none.
pub(super) fn ports(text: &str) -> Result<Option<(PortRange, String)>, ConfigError> {
    let Some((host, port)) = text.rsplit_once(':') else {
        return Ok(None);
    };
    let Some((first, last)) = port.split_once('-') else {
        let port = port.parse().ok().map(PortRange::single);
        return Ok(port.map(|port| (port, text.to_owned())));
    };
    let (Ok(first), Ok(last)) = (first.parse::<u16>(), last.parse::<u16>()) else {
        return Ok(None);
    };
    let (problem, hint) = match (first, last) {
        (0, _) => (
            "has port 0 in its range",
            format!("begin at 1: {host}:1-{last}"),
        ),
        _ if first > last => (
            "has a range whose first port is after its last",
            format!("write {host}:{last}-{first}"),
        ),
        _ => {
            let ports = PortRange { first, last };
            return Ok(Some((ports, format!("{host}:{first}"))));
        }
    };
    Err(ConfigError::new(format!("`{text}` {problem}")).hint(hint))
}

impl fmt::Display for Bind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.first.fmt(f)?;
        if !self.is_single() {
            write!(f, "-{}", self.last)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Bind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bind(text: &str) -> Bind {
        text.parse().unwrap()
    }

    #[test]
    fn a_bind_is_shown_as_it_is_written() {
        for (text, count) in [
            ("0.0.0.0:53", 1),
            ("0.0.0.0:40000-40999", 1000),
            ("[::]:1-65535", 65_535),
            ("[fe80::1%2]:5000-5001", 2),
        ] {
            let bind = bind(text);
            assert_eq!(bind.to_string(), text);
            assert_eq!(format!("{bind:?}"), text);
            assert_eq!(bind.addresses().count(), count);
            assert_eq!(bind.ports().count(), count);
        }
        assert_eq!(bind("127.0.0.1:53-53").to_string(), "127.0.0.1:53");
        let last = bind("[::]:65534-65535").addresses().last();
        assert_eq!(last, Some("[::]:65535".parse().unwrap()));
    }

    #[test]
    fn a_wrong_range_is_refused_with_the_right_one() {
        for (text, parts) in [
            ("0.0.0.0:0-10", ["port 0", "0.0.0.0:1-10"]),
            ("0.0.0.0:41-40", ["after its last", "0.0.0.0:40-41"]),
            ("0.0.0.0:1-65536", ["is not an IP address", "40000-40999"]),
            ("0.0.0.0:1-", ["is not an IP address", "40000-40999"]),
            ("example.org:1-2", ["is not an IP address", "40000-40999"]),
            ("0.0.0.0", ["is not an IP address", "40000-40999"]),
        ] {
            let error = text.parse::<Bind>().unwrap_err().to_string();
            for part in parts {
                assert!(error.contains(part), "{text}: {error}");
            }
        }
    }

    #[test]
    fn successive_ports_are_one_range() {
        let all = [
            "127.0.0.1:5",
            "127.0.0.1:4",
            "127.0.0.2:6",
            "127.0.0.1:7",
            "[::1]:65535",
            "[::1]:65534",
        ];
        let merged = Bind::merged(all.map(|text| text.parse().unwrap()));
        let merged: Vec<_> = merged.iter().map(Bind::to_string).collect();
        assert_eq!(
            merged,
            [
                "127.0.0.1:4-5",
                "127.0.0.1:7",
                "127.0.0.2:6",
                "[::1]:65534-65535"
            ]
        );
    }
}
