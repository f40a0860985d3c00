//! Sockets by the address that they are bound to: `53`, `5000-5010`, `192.0.2.10`, `[::]:53`.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::str::FromStr;

use thiserror::Error;

/// Sockets that are bound to a port, a range of ports, an address, or both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sockets {
    /// None: any address.
    ip: Option<IpAddr>,
    /// None: any port.
    ports: Option<RangeInclusive<u16>>,
}

/// A text that names no socket.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SocketsError {
    /// It is neither a port nor an address.
    #[error(
        "{0:?} names no socket; write a port (53), ports (5000-5010), an address (192.0.2.10) or both (192.0.2.10:53, [::]:53)"
    )]
    Malformed(String),
    /// It is port 0, by which programs have the kernel choose a port.
    #[error("{0:?} has port 0, which no socket has; write a port from 1 to 65535")]
    PortZero(String),
    /// A range of ports is empty.
    #[error("{0:?} ends before it begins; write the lower port first")]
    Reversed(String),
}

impl Sockets {
    /// Whether a socket that is bound to this address is one of them.
    #[must_use]
    pub fn includes(&self, bound: SocketAddr) -> bool {
        let ip = self.ip.as_ref();
        let ports = self.ports.as_ref();
        ip.is_none_or(|ip| *ip == bound.ip().to_canonical())
            && ports.is_none_or(|ports| ports.contains(&bound.port()))
    }
}

impl FromStr for Sockets {
    type Err = SocketsError;

    fn from_str(text: &str) -> Result<Self, SocketsError> {
        let malformed = || SocketsError::Malformed(text.to_owned());
        if let Some(ip) = address(text) {
            return Ok(Self {
                ip: Some(ip),
                ports: None,
            });
        }
        let (ip, ports) = match text.rsplit_once(':') {
            None => (None, text),
            Some((ip, ports)) => {
                // An IPv6 address needs brackets before a port.
                let is_clear = ip.starts_with('[') || !ip.contains(':');
                let ip = address(ip).filter(|_| is_clear);
                (Some(ip.ok_or_else(malformed)?), ports)
            }
        };
        let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
        let (first, last) = port(first).zip(port(last)).ok_or_else(malformed)?;
        if first == 0 {
            return Err(SocketsError::PortZero(text.to_owned()));
        }
        if last < first {
            return Err(SocketsError::Reversed(text.to_owned()));
        }
        Ok(Self {
            ip,
            ports: Some(first..=last),
        })
    }
}

/// An address; an IPv6 one may have brackets.
fn address(text: &str) -> Option<IpAddr> {
    let inner = text
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    let ip: IpAddr = inner.unwrap_or(text).parse().ok()?;
    (inner.is_none() || ip.is_ipv6()).then(|| ip.to_canonical())
}

/// A port in digits alone: `+53` is none.
fn port(text: &str) -> Option<u16> {
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| is_number)
}

/// As it is parsed.
impl fmt::Display for Sockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.ip, &self.ports) {
            (Some(IpAddr::V6(ip)), Some(_)) => write!(f, "[{ip}]:")?,
            (Some(ip), Some(_)) => write!(f, "{ip}:")?,
            (Some(ip), None) => write!(f, "{ip}")?,
            (None, _) => {}
        }
        match &self.ports {
            Some(ports) if ports.start() == ports.end() => write!(f, "{}", ports.start()),
            Some(ports) => write!(f, "{}-{}", ports.start(), ports.end()),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_form_is_read_and_written() {
        for (text, written) in [
            ("53", "53"),
            ("5000-5010", "5000-5010"),
            ("7-7", "7"),
            ("192.0.2.7", "192.0.2.7"),
            ("192.0.2.1:53", "192.0.2.1:53"),
            ("0.0.0.0", "0.0.0.0"),
            ("::", "::"),
            ("[2001:DB8::1]", "2001:db8::1"),
            ("[::]:5060", "[::]:5060"),
            ("192.0.2.1:5000-5010", "192.0.2.1:5000-5010"),
            ("[2001:db8::1]:1-9", "[2001:db8::1]:1-9"),
            ("::ffff:192.0.2.7", "192.0.2.7"),
            ("[::ffff:192.0.2.7]:53", "192.0.2.7:53"),
        ] {
            let sockets: Sockets = text.parse().unwrap();
            assert_eq!(sockets.to_string(), written, "{text}");
            assert_eq!(written.parse(), Ok(sockets), "{text}");
        }
    }

    #[test]
    fn sockets_are_named_by_port_and_address() {
        for (named, bound, others) in [
            ("53", &["0.0.0.0:53", "[::1]:53"][..], &["0.0.0.0:54"][..]),
            (
                "5000-5100",
                &["192.0.2.9:5000", "192.0.2.9:5100"],
                &["192.0.2.9:4999", "192.0.2.9:5101"],
            ),
            (
                "192.0.2.7",
                &["192.0.2.7:1", "[::ffff:192.0.2.7]:1"],
                &["192.0.2.8:1", "0.0.0.0:1"],
            ),
            (
                "192.0.2.1:5353",
                &["192.0.2.1:5353"],
                &["192.0.2.1:5354", "192.0.2.2:5353"],
            ),
            ("[::]:6060", &["[::]:6060"], &["0.0.0.0:6060"]),
            (
                "[2001:db8::1]:1-9",
                &["[2001:db8::1]:9"],
                &["[2001:db8::1]:10"],
            ),
            ("::1", &["[::1]:999"], &["[::2]:999"]),
            ("[::2]", &["[::2]:999"], &["[::1]:999"]),
        ] {
            let sockets: Sockets = named.parse().unwrap();
            let includes = |bound: &&str| sockets.includes(bound.parse().unwrap());
            assert!(bound.iter().all(includes), "{named}");
            assert!(!others.iter().any(includes), "{named}");
        }
    }

    #[test]
    fn what_names_no_socket_is_refused() {
        for text in [
            "",
            "http",
            "+53",
            "-53",
            " 53",
            "65536",
            "53-",
            "1-2-3",
            "53,54",
            "localhost:53",
            "::1:x",
            "2001:db8::1:x",
            "[::1:53",
            "192.0.2.1:",
            ":53",
            "192.0.2.0/24",
            "[192.0.2.1",
            "[192.0.2.1]",
        ] {
            let error = text.parse::<Sockets>().unwrap_err();
            assert_eq!(error, SocketsError::Malformed(text.to_owned()));
            assert!(error.to_string().contains("write a port (53)"));
        }
        for text in ["0", "0-9", "192.0.2.1:0"] {
            let error = SocketsError::PortZero(text.to_owned());
            assert_eq!(text.parse::<Sockets>(), Err(error));
        }
        for text in ["10-9", "127.0.0.1:9-5"] {
            let error = SocketsError::Reversed(text.to_owned());
            assert_eq!(text.parse::<Sockets>(), Err(error));
        }
    }

    proptest! {
        #[test]
        fn a_socket_is_named_by_its_own_address(bound: SocketAddr, other: SocketAddr) {
            prop_assume!(bound.port() != 0);
            let canonical = SocketAddr::new(bound.ip().to_canonical(), bound.port());
            let sockets: Sockets = canonical.to_string().parse().unwrap();
            prop_assert!(sockets.includes(bound));
            let same = (other.ip().to_canonical(), other.port()) == (canonical.ip(), bound.port());
            prop_assert_eq!(sockets.includes(other), same);
        }

        #[test]
        fn never_panics(text: String) {
            let _ = text.parse::<Sockets>();
        }
    }
}
