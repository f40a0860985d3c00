//! `dns:` names: the addresses of a host, by /etc/hosts or by the resolver library.
//!
//! The library's cache is off: it would keep answers with codes of failures, and answers
//! that lack the records asked for, beyond `retry`. What it says of TTLs is used.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use futures_util::{StreamExt, stream};
use hickory_resolver::config::{NameServerConfig, ResolveHosts, ResolverConfig};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::{Query, ResponseCode};
use hickory_resolver::proto::rr::{self, RData, RecordType};
use hickory_resolver::{Hosts, TokioResolver};
use tokio::sync::Semaphore;

use super::state::{Failure, Found, MAX_KEPT, Outcome, Record};
use super::{Discovery, config};

/// Questions at once. It bounds the descriptors and ports that they take from sessions.
const MAX_QUESTIONS: usize = 32;

/// Hosts of one name that are asked for at once, two questions each. It bounds how long a
/// name of many silent hosts keeps other names waiting.
const MAX_HOSTS: usize = 4;

/// DNS servers that are asked the same question at once.
const ASKED_AT_ONCE: usize = 2;

/// How often they are asked, since a datagram may be lost.
const ATTEMPTS: usize = 2;

/// The most sockets of questions at a time: the library keeps those of one attempt during
/// the next.
pub(super) const MAX_SOCKETS: usize = MAX_QUESTIONS * ASKED_AT_ONCE * ATTEMPTS;

/// The longest text of others, in characters, in the reason for a failure.
const MAX_REASON: usize = 200;

/// The files in which the host says which DNS servers to ask, and which hosts it knows.
const HOST_FILES: [&str; 2] = ["/etc/resolv.conf", "/etc/hosts"];

pub(super) struct Dns<'a>(pub(super) &'a Resolver, pub(super) &'a str, pub(super) u16);

impl Discovery for Dns<'_> {
    async fn discover(&self) -> Found {
        let Self(resolver, host, port) = *self;
        let mut found = Found::of(vec![Record {
            priority: 0,
            weight: 1,
            port,
            host: host.to_owned(),
        }]);
        match parsed(host) {
            Ok(name) => {
                let hosts = BTreeMap::from([(host.to_owned(), name)]);
                resolver.find_addresses(hosts, &mut found).await;
            }
            Err(failure) => found.records = Err(failure),
        }
        found
    }
}

/// Asks questions, as the configuration or the host's files say.
pub(super) struct Resolver {
    pub(super) settings: config::Resolver,
    /// Made again when the host's files have changed.
    current: Mutex<Option<(Stamp, Arc<Current>)>>,
    /// Shared with the resolvers of other configurations.
    permits: Arc<Semaphore>,
}

struct Current {
    hosts: Hosts,
    /// The DNS servers for other hosts, or why there are none.
    servers: Result<TokioResolver, Failure>,
}

/// When the host's files were last written.
type Stamp = [Option<SystemTime>; HOST_FILES.len()];

/// The records of one question, with their lowest TTL.
type Answered<T> = Result<(Vec<T>, Duration), Failure>;

impl Resolver {
    pub(super) fn new(settings: config::Resolver) -> Self {
        Self {
            settings,
            current: Mutex::default(),
            permits: Arc::new(Semaphore::new(MAX_QUESTIONS)),
        }
    }

    /// A resolver with other settings, which shares the bound on questions.
    pub(super) fn beside(&self, settings: config::Resolver) -> Self {
        Self {
            permits: Arc::clone(&self.permits),
            ..Self::new(settings)
        }
    }

    /// Adds the addresses of `hosts` to `found`.
    pub(super) async fn find_addresses(
        &self,
        hosts: BTreeMap<String, rr::Name>,
        found: &mut Found,
    ) {
        let lookups = hosts
            .into_iter()
            .map(|(host, name)| async { (host, self.addresses(name).await) });
        let mut lookups = stream::iter(lookups).buffer_unordered(MAX_HOSTS);
        while let Some((host, families)) = lookups.next().await {
            let families = families.map(|answered| {
                let (mut addresses, ttl) = answered?;
                addresses.sort_unstable();
                addresses.dedup();
                addresses.truncate(MAX_KEPT);
                found.ttl = found.ttl.min(ttl);
                Ok(addresses)
            });
            found.hosts.insert(host, families);
        }
    }

    /// The IPv4 addresses of a host, and its IPv6 addresses.
    async fn addresses(&self, host: rr::Name) -> [Answered<IpAddr>; 2] {
        if let Some(known) = self.current().known(&host) {
            return known;
        }
        let (v4, v6) = tokio::join!(
            self.question(host.clone(), RecordType::A, RData::ip_addr),
            self.question(host, RecordType::AAAA, RData::ip_addr),
        );
        [v4, v6]
    }

    pub(super) async fn question<T>(
        &self,
        name: rr::Name,
        kind: RecordType,
        pick: impl Fn(&RData) -> Option<T>,
    ) -> Answered<T> {
        let _permit = self.permits.acquire().await;
        let servers = self.current().servers.clone()?;
        let timeout = *self.settings.timeout;
        let lookup = match tokio::time::timeout(timeout, servers.lookup(name, kind)).await {
            Ok(Ok(lookup)) => lookup,
            Err(_) | Ok(Err(NetError::Timeout)) => return Err(Failure::timeout(timeout)),
            Ok(Err(error)) => return Err(Failure::of(&error, kind)),
        };
        let code = lookup.message().response_code;
        if !matches!(code, ResponseCode::NoError | ResponseCode::NXDomain) {
            return Err(Failure::code(code, kind));
        }
        let found = picked(&lookup, pick);
        if found.is_empty() {
            return Err(Failure::no_records(kind));
        }
        let until = lookup.valid_until();
        Ok((found, until.saturating_duration_since(Instant::now())))
    }

    fn current(&self) -> Arc<Current> {
        let from_host = self.settings.servers.is_empty();
        let written = |path| fs::metadata(path).and_then(|file| file.modified()).ok();
        let stamp = match from_host {
            true => HOST_FILES.map(written),
            false => Stamp::default(),
        };
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, current)) = &*current
            && *of == stamp
        {
            return Arc::clone(current);
        }
        let new = Arc::new(Current {
            hosts: match from_host {
                true => Hosts::from_system().unwrap_or_default(),
                false => Hosts::default(),
            },
            servers: self.servers(from_host).map_err(|error| {
                let why = format!("{}: {error}", HOST_FILES[0]);
                Failure::new(Outcome::Failed, shortened(&why))
            }),
        });
        *current = Some((stamp, Arc::clone(&new)));
        new
    }

    fn servers(&self, from_host: bool) -> Result<TokioResolver, NetError> {
        let mut builder = if from_host {
            TokioResolver::builder_tokio()?
        } else {
            let servers = self.settings.servers.iter().map(name_server);
            let config = ResolverConfig::from_name_servers(servers.collect());
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
        };
        let options = builder.options_mut();
        options.cache_size = 0;
        options.num_concurrent_reqs = ASKED_AT_ONCE;
        // The library counts from the second on.
        options.attempts = ATTEMPTS - 1;
        options.timeout = *self.settings.timeout / 2;
        // The library would ask for the other family of a host that the file has.
        options.use_hosts_file = ResolveHosts::Never;
        builder.build()
    }
}

impl Current {
    /// The addresses of a host that is in /etc/hosts, and then has no others.
    fn known(&self, host: &rr::Name) -> Option<[Answered<IpAddr>; 2]> {
        let found = [RecordType::A, RecordType::AAAA].map(|kind| {
            let query = Query::query(host.clone(), kind);
            let lookup = self.hosts.lookup_static_host(&query);
            let lookup = lookup.ok_or_else(|| Failure::no_records(kind))?;
            Ok((picked(&lookup, RData::ip_addr), Duration::MAX))
        });
        found.iter().any(Result::is_ok).then_some(found)
    }
}

fn name_server(address: &SocketAddr) -> NameServerConfig {
    let mut server = NameServerConfig::udp_and_tcp(address.ip());
    for connection in &mut server.connections {
        connection.port = address.port();
    }
    server
}

fn picked<T>(lookup: &Lookup, pick: impl Fn(&RData) -> Option<T>) -> Vec<T> {
    let answers = lookup.answers().iter();
    answers.filter_map(|record| pick(&record.data)).collect()
}

pub(super) fn parsed(name: &str) -> Result<rr::Name, Failure> {
    let parsed = rr::Name::from_str_relaxed(name);
    parsed.map_err(|error| Failure::new(Outcome::Failed, shortened(&error.to_string())))
}

/// One short line of text that may come from others.
fn shortened(text: &str) -> String {
    let plain = text.chars().filter(|c| !c.is_control());
    plain.take(MAX_REASON).collect()
}

impl Failure {
    fn of(error: &NetError, kind: RecordType) -> Self {
        if let NetError::Dns(DnsError::NoRecordsFound(none)) = error {
            Self::code(none.response_code, kind)
        } else if let NetError::Dns(DnsError::ResponseCode(code)) = error {
            Self::code(*code, kind)
        } else {
            Self::new(Outcome::Failed, shortened(&error.to_string()))
        }
    }

    /// No records, for the reason that the code gives.
    fn code(code: ResponseCode, kind: RecordType) -> Self {
        if code == ResponseCode::NoError {
            Self::no_records(kind)
        } else if code == ResponseCode::NXDomain {
            Self::new(Outcome::NoRecords, "there is no such name")
        } else {
            // Unassigned codes, too, say nothing about the name.
            Self::new(Outcome::Failed, format!("DNS server: {code}"))
        }
    }

    fn no_records(kind: RecordType) -> Self {
        let is_srv = kind == RecordType::SRV;
        let what = if is_srv { "SRV records" } else { "addresses" };
        Self::new(Outcome::NoRecords, format!("it has no {what}"))
    }

    pub(super) fn timeout(after: Duration) -> Self {
        let after = humantime::format_duration(after);
        Self::new(Outcome::Timeout, format!("no answer within {after}"))
    }
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use super::*;

    #[test]
    fn a_host_of_the_hosts_file_is_not_asked_for() {
        let mut hosts = Hosts::default();
        let file = b"192.0.2.1 one both\n2001:db8::2 Two. both # a comment\nnonsense\n";
        hosts.read_hosts_conf(&file[..]).unwrap();
        let servers = Err(Failure::timeout(Duration::from_secs(1)));
        let current = Current { hosts, servers };
        let known = |host: &str| {
            let found = current.known(&rr::Name::from_str(host).unwrap())?;
            Some(found.map(|found| found.map(|(addresses, _)| addresses)))
        };
        let ip = |text: &str| Ok(vec![text.parse().unwrap()]);
        let none = || Err(Failure::no_records(RecordType::A));
        assert_eq!(known("one"), Some([ip("192.0.2.1"), none()]));
        assert_eq!(known("two."), Some([none(), ip("2001:db8::2")]));
        assert_eq!(known("BOTH"), Some([ip("192.0.2.1"), ip("2001:db8::2")]));
        assert_eq!(known("three"), None);
    }

    #[test]
    fn text_of_others_is_one_short_line() {
        let long = format!("a\nb\u{1b}[31m{}", "\u{fc}".repeat(1000));
        let failure = Failure::of(&NetError::from(long), RecordType::A);
        assert_eq!(failure.outcome, Outcome::Failed);
        assert!(failure.why.starts_with("ab[31m\u{fc}"), "{}", failure.why);
        assert_eq!(failure.why.chars().count(), MAX_REASON);
    }
}
