//! Which sockets are taken over, by the address that they are bound to.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use thiserror::Error;

/// Sockets by their bound address: ports, ranges of ports, addresses, and both together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Only {
    /// None: all sockets.
    parts: Vec<Part>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    /// `None`: any address.
    ip: Option<IpAddr>,
    first: u16,
    last: u16,
}

/// A part of a list of sockets that can't be understood.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum OnlyError {
    #[error(
        "{part:?} names no socket; write a port (53), a range of ports (5000-5100), an address (192.0.2.7) or both (192.0.2.1:53, [::]:5060)"
    )]
    Part { part: String },
    #[error("{part:?} is port 0, which no socket has; write a port from 1 to 65535")]
    PortZero { part: String },
    #[error("{part:?} ends before it begins; write the lower port first")]
    Reversed { part: String },
}

impl Only {
    /// All sockets.
    pub(crate) fn all() -> Self {
        Self { parts: Vec::new() }
    }

    /// Whether a socket that is bound to this address is one of them.
    pub(crate) fn includes(&self, bound: SocketAddr) -> bool {
        let ip = bound.ip().to_canonical();
        let includes = |part: &Part| {
            part.ip.is_none_or(|named| named == ip)
                && (part.first..=part.last).contains(&bound.port())
        };
        self.parts.is_empty() || self.parts.iter().any(includes)
    }
}

impl FromStr for Only {
    type Err = OnlyError;

    /// Reads parts with commas between them.
    fn from_str(text: &str) -> Result<Self, OnlyError> {
        let parts = text.split(',').map(|part| part.trim().parse());
        Ok(Self {
            parts: parts.collect::<Result<_, _>>()?,
        })
    }
}

impl FromStr for Part {
    type Err = OnlyError;

    fn from_str(text: &str) -> Result<Self, OnlyError> {
        let wrong = || OnlyError::Part {
            part: text.to_owned(),
        };
        let unbracketed = |text: &str| {
            let inner = text
                .strip_prefix('[')
                .and_then(|text| text.strip_suffix(']'));
            inner.unwrap_or(text).parse::<IpAddr>().ok()
        };
        if let Some(ip) = unbracketed(text) {
            return Ok(Self {
                ip: Some(ip.to_canonical()),
                first: 1,
                last: u16::MAX,
            });
        }
        let (ip, ports) = match text.rsplit_once(':') {
            None => (None, text),
            Some((ip, ports)) => {
                let bracketed = ip.starts_with('[') || !ip.contains(':');
                let ip = unbracketed(ip).filter(|_| bracketed).ok_or_else(wrong)?;
                (Some(ip.to_canonical()), ports)
            }
        };
        let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
        let port = |text: &str| {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse::<u16>()
                .ok()
                .filter(|_| digits)
                .ok_or_else(wrong)
        };
        let (first, last) = (port(first)?, port(last)?);
        let part = || text.to_owned();
        if first == 0 {
            return Err(OnlyError::PortZero { part: part() });
        }
        if last < first {
            return Err(OnlyError::Reversed { part: part() });
        }
        Ok(Self { ip, first, last })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn includes(only: &str, bound: &str) -> bool {
        let only: Only = only.parse().unwrap();
        only.includes(bound.parse().unwrap())
    }

    #[test]
    fn names_sockets_by_port_range_and_address() {
        let only = "53, 5000-5100,192.0.2.7,192.0.2.1:5353,[::]:6060,[2001:db8::1]:1-9,::1,[::2]";
        for bound in [
            "0.0.0.0:53",
            "[::1]:53",
            "192.0.2.9:5000",
            "192.0.2.9:5100",
            "192.0.2.7:1",
            "[::ffff:192.0.2.7]:1",
            "192.0.2.1:5353",
            "[::]:6060",
            "[2001:db8::1]:9",
            "[::1]:999",
            "[::2]:999",
        ] {
            assert!(includes(only, bound), "{bound}");
        }
        for bound in [
            "0.0.0.0:54",
            "192.0.2.9:5101",
            "192.0.2.9:4999",
            "192.0.2.2:5353",
            "0.0.0.0:6060",
            "[2001:db8::1]:10",
            "[::3]:999",
        ] {
            assert!(!includes(only, bound), "{bound}");
        }
    }

    #[test]
    fn all_are_all() {
        assert!(Only::all().includes("[::1]:9".parse().unwrap()));
    }

    #[test]
    fn errors_name_the_part() {
        for part in [
            "",
            "http",
            "+53",
            "65536",
            "53-",
            "-53",
            "1-2-3",
            "localhost:53",
            "2001:db8::1:x",
            "[::1:53",
            "192.0.2.1:",
            ":53",
            "192.0.2.0/24",
            "[192.0.2.1",
        ] {
            let error = format!("80,{part}").parse::<Only>().unwrap_err();
            assert_eq!(
                error,
                OnlyError::Part {
                    part: part.to_owned()
                }
            );
        }
        let error = |text: &str| text.parse::<Only>().unwrap_err();
        let part = |text: &str| text.to_owned();
        assert_eq!(error("0"), OnlyError::PortZero { part: part("0") });
        let reversed = "127.0.0.1:9-5";
        assert_eq!(
            error(reversed),
            OnlyError::Reversed {
                part: part(reversed)
            }
        );
    }

    proptest! {
        #[test]
        fn a_socket_is_named_by_its_own_address(bound: SocketAddr, other: SocketAddr) {
            prop_assume!(bound.port() != 0);
            let canonical = SocketAddr::new(bound.ip().to_canonical(), bound.port());
            let only: Only = canonical.to_string().parse().unwrap();
            prop_assert!(only.includes(bound));
            let same = (other.ip().to_canonical(), other.port()) == (canonical.ip(), bound.port());
            prop_assert_eq!(only.includes(other), same);
        }

        #[test]
        fn never_panics(text: String) {
            let _ = text.parse::<Only>();
        }
    }
}
