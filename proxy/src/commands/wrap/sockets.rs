//! The sockets that `--only` names.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use crate::config::ConfigError;

/// Sockets by what they are bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalSockets {
    /// Any address, with one of these ports, both ends among them.
    Ports(u16, u16),
    /// This address, with any port.
    Address(IpAddr),
    /// This address and port.
    One(SocketAddr),
}

impl FromStr for LocalSockets {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        parse(text).ok_or_else(|| {
            ConfigError::new(format!("`{text}` names no socket")).hint(
                "write a port (53), ports (5000-5010), an address (192.0.2.10) or both (192.0.2.10:53, [::]:53)",
            )
        })
    }
}

fn parse(text: &str) -> Option<LocalSockets> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        return (address.port() != 0).then_some(LocalSockets::One(address));
    }
    let bare = text
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    if let Ok(ip) = bare.unwrap_or(text).parse::<IpAddr>() {
        let is_valid = bare.is_none() || ip.is_ipv6();
        return is_valid.then_some(LocalSockets::Address(ip.to_canonical()));
    }
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (port(first)?, port(last)?);
    (first <= last).then_some(LocalSockets::Ports(first, last))
}

/// A port in digits alone: `+53` is none.
fn port(text: &str) -> Option<u16> {
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    let port = text.parse().ok().filter(|_| is_number);
    port.filter(|port| *port != 0)
}

/// As the library reads it.
impl fmt::Display for LocalSockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ports(first, last) if first == last => write!(f, "{first}"),
            Self::Ports(first, last) => write!(f, "{first}-{last}"),
            Self::Address(ip) => write!(f, "{ip}"),
            Self::One(address) => write!(f, "{address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read_and_written_as_the_library_reads_it() {
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
            ("::ffff:192.0.2.7", "192.0.2.7"),
            ("[::ffff:192.0.2.7]:53", "192.0.2.7:53"),
        ] {
            let sockets: LocalSockets = text.parse().unwrap();
            assert_eq!(sockets.to_string(), written, "{text}");
        }
    }

    #[test]
    fn what_names_no_socket_is_refused() {
        for text in [
            "",
            "0",
            "65536",
            "+53",
            "-53",
            "53-",
            "10-9",
            "0-9",
            "192.0.2.1:0",
            "192.0.2.1:",
            "[192.0.2.1]",
            "nsd",
            "53,54",
            " 53",
            "192.0.2.0/24",
            "192.0.2.1:5-6",
        ] {
            let error = text.parse::<LocalSockets>().unwrap_err().to_string();
            assert!(
                error.contains(&format!("`{text}` names no socket")),
                "{error}"
            );
        }
    }
}
