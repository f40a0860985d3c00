//! The sockets that `--only` names.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::config::ConfigError;

/// Sockets by what they are bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalSockets {
    /// None: any address.
    ip: Option<IpAddr>,
    /// The first port and the last. None: any port.
    ports: Option<(u16, u16)>,
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
    if let Some(ip) = address(text, false) {
        return Some(LocalSockets {
            ip: Some(ip),
            ports: None,
        });
    }
    let (ip, ports) = match text.rsplit_once(':') {
        None => (None, text),
        Some((ip, ports)) => (Some(address(ip, true)?), ports),
    };
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    let (first, last) = (port(first)?, port(last)?);
    (first <= last).then_some(LocalSockets {
        ip,
        ports: Some((first, last)),
    })
}

/// An address; an IPv6 one has brackets where a port is behind it, and may have them elsewhere.
fn address(text: &str, with_port: bool) -> Option<IpAddr> {
    let inner = text
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    let ip: IpAddr = inner.unwrap_or(text).parse().ok()?;
    let is_valid = match inner {
        Some(_) => ip.is_ipv6(),
        None => ip.is_ipv4() || !with_port,
    };
    is_valid.then(|| ip.to_canonical())
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
        match (self.ip, self.ports) {
            (Some(IpAddr::V6(ip)), Some(_)) => write!(f, "[{ip}]:")?,
            (Some(ip), Some(_)) => write!(f, "{ip}:")?,
            (Some(ip), None) => write!(f, "{ip}")?,
            (None, _) => {}
        }
        match self.ports {
            Some((first, last)) if first != last => write!(f, "{first}-{last}"),
            Some((port, _)) => write!(f, "{port}"),
            None => Ok(()),
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
            ("192.0.2.1:5000-5010", "192.0.2.1:5000-5010"),
            ("[2001:db8::1]:1-9", "[2001:db8::1]:1-9"),
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
            "192.0.2.1:6-5",
            "::1:x",
            "localhost:53",
        ] {
            let error = text.parse::<LocalSockets>().unwrap_err().to_string();
            assert!(
                error.contains(&format!("`{text}` names no socket")),
                "{error}"
            );
        }
    }
}
