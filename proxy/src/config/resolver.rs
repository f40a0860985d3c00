//! Who is asked for the names of servers, and how often.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::check::Checker;
use super::file::{self, At};
use super::values::is_link_local;
use super::{ConfigError, nowhere};
use ppv2_engine::address::is_no_host;

/// More than resolv.conf(5) takes, and all that anybody waits for.
const MAX_SERVERS: usize = 8;

/// What a time must not exceed, either way.
const TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(60);
const RETRY: RangeInclusive<Duration> = Duration::from_millis(100)..=Resolver::MAX_RETRY;
const TTL: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(24 * 3600);

/// Who is asked for the names of servers, and how often.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolver {
    /// DNS servers; empty for what /etc/hosts and /etc/resolv.conf say.
    pub servers: Vec<SocketAddr>,
    /// How long the answer to a question may take.
    pub timeout: Duration,
    /// The shortest time between two lookups of a name, whatever its TTL.
    pub min_ttl: Duration,
    /// The longest; not shorter than the other.
    pub max_ttl: Duration,
    /// The pause after the first failure; doubled with each, up to
    /// [`MAX_RETRY`](Self::MAX_RETRY).
    pub retry: Duration,
}

impl Resolver {
    /// The longest pause after a failure.
    pub const MAX_RETRY: Duration = Duration::from_secs(60);
}

impl Checker<'_> {
    pub(super) fn resolver(
        &self,
        wanted: Option<At<file::Resolver>>,
    ) -> Result<Resolver, ConfigError> {
        let span = wanted.as_ref().map(At::span).unwrap_or_default();
        let wanted = wanted.map(At::into_inner).unwrap_or_default();
        let time = |key: &str, value: Option<At<String>>, usual: &str, range| {
            let value = value.unwrap_or_else(|| nowhere(usual.to_owned()));
            self.time_within(&format!("resolver.{key}"), &value, &range)
        };
        let max_ttl = time("max_ttl", wanted.max_ttl, "5m", TTL)?;
        let min_span = wanted.min_ttl.as_ref().map_or(span, At::span);
        let min_ttl = match wanted.min_ttl {
            None => time("min_ttl", None, "5s", TTL)?.min(max_ttl),
            given => time("min_ttl", given, "5s", TTL)?,
        };
        if min_ttl > max_ttl {
            return Err(self
                .error(min_span, "resolver.min_ttl is longer than resolver.max_ttl")
                .mend("give at most as long a time: names are asked for again in between"));
        }
        Ok(Resolver {
            servers: self.resolvers(&wanted.servers)?,
            timeout: time("timeout", wanted.timeout, "5s", TIMEOUT)?,
            min_ttl,
            max_ttl,
            retry: time("retry", wanted.retry, "1s", RETRY)?,
        })
    }

    fn resolvers(&self, wanted: &[At<String>]) -> Result<Vec<SocketAddr>, ConfigError> {
        if let Some(surplus) = wanted.get(MAX_SERVERS) {
            let what = format!("resolver.servers has {} addresses", wanted.len());
            return Err(self
                .error(surplus.span(), what)
                .mend(format!("give at most {MAX_SERVERS}")));
        }
        let mut servers = Vec::new();
        for value in wanted {
            let text = value.get_ref();
            let error = |what: &str| self.error(value.span(), format!("resolver `{text}` {what}"));
            let server: SocketAddr = text.parse().map_err(|_| {
                error("is not an IP address with a port")
                    .mend("write it as 192.0.2.1:53 or [2001:db8::1]:53")
            })?;
            let ip = server.ip().to_canonical();
            if server.port() == 0 || is_no_host(ip) || is_link_local(ip) {
                return Err(error("can't be asked").mend(
                    "give a DNS server's address, that of no link or group, with its port: 53",
                ));
            }
            let server = SocketAddr::new(ip, server.port());
            if servers.contains(&server) {
                return Err(error("is there twice").mend("name each once"));
            }
            servers.push(server);
        }
        Ok(servers)
    }

    fn time_within(
        &self,
        key: &str,
        value: &At<String>,
        range: &RangeInclusive<Duration>,
    ) -> Result<Duration, ConfigError> {
        let time = self.duration(key, value)?;
        if range.contains(&time) {
            return Ok(time);
        }
        let [least, most] = [range.start(), range.end()].map(|t| humantime::format_duration(*t));
        Err(self
            .error(value.span(), format!("{key} is `{}`", value.get_ref()))
            .mend(format!("give a time from \"{least}\" to \"{most}\"")))
    }
}
