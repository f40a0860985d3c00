//! Server addresses that are names, looked up again and again while the proxy runs:
//! how they are written, and what they stand for.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use hickory_resolver::proto::rr;

use super::values::read_from_text;
use super::{Config, ConfigError, FamilySources, Listener, Server, bind};
use ppv2_engine::address::PortRange;
use ppv2_engine::mode::Mode;

/// A name that resolves to servers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Name {
    /// `dns:HOST:PORT`: every address that the host has, with this port; or
    /// `dns:HOST:FIRST-LAST`, with these.
    Dns {
        /// In ASCII and lower case; with a dot at its end if it is absolute.
        host: String,
        /// None is 0. Several belong to servers with `port = "same"`.
        ports: PortRange,
    },
    /// `srv:_SERVICE._udp.NAME`: what SRV records (RFC 2782) list, with their ports,
    /// weights and priorities.
    Srv {
        /// The records' name, written as a host's.
        name: String,
    },
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dns { host, ports } => write!(f, "dns:{host}:{ports}"),
            Self::Srv { name } => write!(f, "srv:{name}"),
        }
    }
}

/// A name among the servers of an upstream.
#[derive(Clone, Debug)]
pub struct Named {
    /// What is looked up.
    pub name: Name,
    /// What its servers have in common; its address and its sources say nothing. Records
    /// of `srv:` have their own weights.
    pub server: Server,
    /// What its servers are written to from.
    pub sources: FamilySources,
}

impl Config {
    /// Every mode that a listener serves the servers of a name in, with the name.
    /// Nothing need be known of these servers yet.
    pub fn named(&self) -> impl Iterator<Item = (&Listener, &Named, Mode)> {
        self.listeners.iter().flat_map(move |listener| {
            let names = listener.names.iter();
            names.map(move |(number, mode)| (listener, &self.names[*number], *mode))
        })
    }
}

impl Listener {
    /// The modes of its servers, and of those that names may lead to.
    pub fn modes(&self) -> impl Iterator<Item = Mode> {
        let all = self.servers.iter().chain(&self.names);
        all.map(|(_, mode)| *mode)
    }
}

/// A server's address, as it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ServerAddress {
    /// An address, or a host that is looked up once, each with a port.
    Host(String),
    /// A name that is looked up again and again.
    Name(Name),
}

read_from_text!(ServerAddress);

impl ServerAddress {
    /// Its ports, if they are written as a range.
    pub(super) fn range(&self) -> Result<Option<PortRange>, ConfigError> {
        match self {
            Self::Host(text) => {
                let port = text.rsplit_once(':').map(|(_, port)| port);
                let is_range = port.is_some_and(|port| port.contains('-'));
                let ports = bind::ports(text)?.filter(|_| is_range);
                Ok(ports.map(|(ports, _)| ports))
            }
            Self::Name(Name::Dns { ports, .. }) => Ok((ports.count() > 1).then_some(*ports)),
            Self::Name(Name::Srv { .. }) => Ok(None),
        }
    }
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(text) => f.write_str(text),
            Self::Name(name) => name.fmt(f),
        }
    }
}

impl FromStr for ServerAddress {
    type Err = ConfigError;

    /// A host may be called `dns`: with a port alone behind it, it is that host.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let is_of_port = |c: char| c == '-' || c.is_ascii_digit();
        let is_port = |rest: &str| !rest.is_empty() && rest.chars().all(is_of_port);
        match text.split_once(':') {
            Some(("dns", rest)) if !is_port(rest) => dns(text, rest).map(Self::Name),
            Some(("srv", rest)) if !is_port(rest) => srv(text, rest).map(Self::Name),
            _ => Ok(Self::Host(text.to_owned())),
        }
    }
}

fn dns(text: &str, rest: &str) -> Result<Name, ConfigError> {
    let error = |message: &str| ConfigError::new(format!("server `{text}` {message}"));
    let is_ip = |text: &str| {
        let bare = text.trim_start_matches('[').trim_end_matches(']');
        bare.parse::<IpAddr>().is_ok()
    };
    let (host, ports) = match rest.rsplit_once(':') {
        Some((host, _)) if !is_ip(rest) => (host, bind::ports(rest)?),
        _ => (rest, None),
    };
    if is_ip(host) {
        return Err(error("has an IP address where a name belongs")
            .hint("leave `dns:` out: an address needs no lookup"));
    }
    match ports {
        Some((PortRange { first: 0, .. }, _)) => {
            Err(error("has port 0").hint("name the port that the servers listen on"))
        }
        Some((ports, _)) => Ok(Name::Dns {
            host: dns_name(text, host)?,
            ports,
        }),
        None => Err(error("has no port").hint("write it as dns:servers.example:53")),
    }
}

fn srv(text: &str, rest: &str) -> Result<Name, ConfigError> {
    let error = |message: &str| ConfigError::new(format!("server `{text}` {message}"));
    if let Some((name, _)) = rest.split_once(':') {
        return Err(error("names a port").hint(format!(
            "write srv:{name}: SRV records say on which port servers listen"
        )));
    }
    let name = dns_name(text, rest)?;
    let mut labels = name.splitn(3, '.');
    let service = labels.next().filter(|label| label.starts_with('_'));
    let protocol = labels.next().filter(|label| label.starts_with('_'));
    let domain = labels.next().filter(|rest| !rest.is_empty());
    match (service, protocol, domain) {
        (Some(_), Some("_udp"), Some(_)) => Ok(Name::Srv { name }),
        (Some(service), Some(_), Some(domain)) => Err(error("is not of UDP").hint(format!(
            "write srv:{service}._udp.{domain}: only UDP is carried"
        ))),
        _ => Err(error("names no service, or no domain")
            .hint("write it as srv:_service._udp.domain.example (RFC 2782)")),
    }
}

/// A DNS name in the one form that it is kept in.
fn dns_name(text: &str, name: &str) -> Result<String, ConfigError> {
    let is_plain = |c: char| c.is_alphanumeric() || ['-', '_', '.'].contains(&c);
    let parsed = rr::Name::from_str_relaxed(name).ok();
    let parsed = parsed.filter(|parsed| name.chars().all(is_plain) && parsed.num_labels() > 0);
    parsed.map(|parsed| parsed.to_ascii().to_lowercase()).ok_or_else(|| {
        ConfigError::new(format!("server `{text}`: `{name}` is not a DNS name"))
            .hint("write labels of letters, digits and hyphens with dots between, each of at most 63 bytes, and 255 in all")
    })
}

#[cfg(test)]
mod tests;
