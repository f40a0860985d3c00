//! Server addresses that are names, looked up again and again while the proxy
//! runs: how they are written, and what they stand for. Who asks is no matter here.

use std::fmt;
use std::net::IpAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use hickory_resolver::proto::rr;

use super::check::Checker;
use super::{Config, ConfigError, Health, Listener};
use ppv2_engine::mode::Mode;

/// A name that leads to servers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Name {
    /// `dns:HOST:PORT`: every address that the host has, with this port.
    Dns {
        /// In ASCII and lower case; with a dot at its end if it is absolute.
        host: String,
        /// Not 0.
        port: u16,
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
            Self::Dns { host, port } => write!(f, "dns:{host}:{port}"),
            Self::Srv { name } => write!(f, "srv:{name}"),
        }
    }
}

/// A name among the servers of an upstream, with what its servers have in common.
#[derive(Clone, Debug)]
pub struct Named {
    /// Name of the upstream.
    pub upstream: String,
    /// What is looked up.
    pub name: Name,
    /// Each server's share of the sessions; records of `srv:` have their own.
    pub weight: u16,
    /// Whether they only stand in for the others.
    pub backup: bool,
    /// Whether they get no new sessions.
    pub drain: bool,
    /// How long they take to get their whole share of sessions.
    pub slow_start: Duration,
    /// How long their sessions may stay when the name no longer leads to them.
    pub lame_duck: Duration,
    /// Addresses of this host to send to them from, of both families; empty for the
    /// kernel's choice.
    pub sources: Arc<[IpAddr]>,
    /// How to find out whether they serve, if at all.
    pub health: Option<Arc<Health>>,
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

impl Checker<'_> {
    /// The name that a server's address is, if it is one that is looked up again.
    /// A host may be called `dns`: with a port alone behind it, it is that host.
    pub(super) fn name(
        &self,
        span: &Range<usize>,
        text: &str,
    ) -> Result<Option<Name>, ConfigError> {
        let is_port = |rest: &str| rest.parse::<u16>().is_ok();
        match text.split_once(':') {
            Some(("dns", rest)) if !is_port(rest) => self.dns(span, text, rest).map(Some),
            Some(("srv", rest)) if !is_port(rest) => self.srv(span, text, rest).map(Some),
            _ => Ok(None),
        }
    }

    fn dns(&self, span: &Range<usize>, text: &str, rest: &str) -> Result<Name, ConfigError> {
        let error = |message: &str| self.error(span.clone(), format!("server `{text}` {message}"));
        let bare = rest.trim_start_matches('[').trim_end_matches(']');
        let (host, port) = match rest.rsplit_once(':') {
            Some((host, port)) if bare.parse::<IpAddr>().is_err() => (host, port.parse()),
            _ => (rest, "".parse()),
        };
        let ip = host.trim_start_matches('[').trim_end_matches(']');
        if ip.parse::<IpAddr>().is_ok() {
            return Err(error("has an IP address where a name belongs")
                .mend("leave `dns:` out: an address needs no looking up"));
        }
        let port = match port {
            Ok(0) => {
                return Err(error("has port 0").mend("name the port that the servers listen on"));
            }
            Ok(port) => port,
            Err(_) => {
                return Err(error("has no port").mend("write it as dns:servers.example:53"));
            }
        };
        let host = self.dns_name(span, text, host)?;
        Ok(Name::Dns { host, port })
    }

    fn srv(&self, span: &Range<usize>, text: &str, rest: &str) -> Result<Name, ConfigError> {
        let error = |message: &str| self.error(span.clone(), format!("server `{text}` {message}"));
        if let Some((name, _)) = rest.split_once(':') {
            return Err(error("names a port").mend(format!(
                "write srv:{name}: SRV records say on which port servers listen"
            )));
        }
        let name = self.dns_name(span, text, rest)?;
        let mut labels = name.splitn(3, '.');
        let service = labels.next().filter(|label| label.starts_with('_'));
        let protocol = labels.next().filter(|label| label.starts_with('_'));
        let domain = labels.next().filter(|rest| !rest.is_empty());
        let mend = "write it as srv:_service._udp.domain.example (RFC 2782)";
        match (service, protocol, domain) {
            (Some(_), Some("_udp"), Some(_)) => Ok(Name::Srv { name }),
            (Some(service), Some(_), Some(domain)) => Err(error("is not of UDP").mend(format!(
                "write srv:{service}._udp.{domain}: UDP alone is carried"
            ))),
            _ => Err(error("names no service, or no domain").mend(mend)),
        }
    }

    /// A DNS name in the one form that it is kept in.
    fn dns_name(&self, span: &Range<usize>, text: &str, name: &str) -> Result<String, ConfigError> {
        let is_plain = |c: char| c.is_alphanumeric() || ['-', '_', '.'].contains(&c);
        let parsed = rr::Name::from_str_relaxed(name).ok();
        parsed
            .filter(|parsed| name.chars().all(is_plain) && parsed.num_labels() > 0)
            .map(|parsed| parsed.to_ascii().to_lowercase())
            .ok_or_else(|| {
                self.error(span.clone(), format!("server `{text}`: `{name}` is no DNS name"))
                    .mend("write labels of letters, digits and hyphens with dots between, each of 63 bytes at the most, and 255 in all")
            })
    }

    /// Refuses a weight where records have theirs.
    pub(super) fn refuse_weight(
        &self,
        name: &Name,
        weight: Option<&super::file::At<i64>>,
    ) -> Result<(), ConfigError> {
        match (name, weight) {
            (Name::Srv { .. }, Some(weight)) => Err(self
                .error(weight.span(), format!("`{name}` with a weight"))
                .mend("leave `weight` out: each SRV record has its own")),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
