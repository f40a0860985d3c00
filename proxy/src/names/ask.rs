//! Asks DNS for what names lead to: which questions, of whom, and what their answers
//! are. Nothing is remembered here but how to ask.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::{Query, ResponseCode};
use hickory_resolver::proto::rr::{self, RData, RecordType};
use hickory_resolver::{Hosts, TokioResolver};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::state::{Asked, Failure, MAX_KEPT, MAX_RECORDS, Outcome, Record};
use crate::config::{Config, Name, Resolver};

/// Questions at once. It bounds the descriptors and ports that they take from
/// sessions; with more names than that, some are asked for later.
const MAX_QUESTIONS: usize = 32;

/// Hosts of one name that are asked for at once, two questions each. However many it
/// has and however slowly they are answered, other names come to be asked for.
const MAX_HOSTS: usize = 4;

/// Servers that are asked the same question at once.
const ASKED_AT_ONCE: usize = 2;

/// How often they are, since a datagram may be lost.
const ATTEMPTS: usize = 2;

/// The most descriptors that questions take at a time: the library keeps those of one
/// attempt during the next.
pub(super) const MAX_SOCKETS: usize = MAX_QUESTIONS * ASKED_AT_ONCE * ATTEMPTS;

/// The longest text of another's that a reason is given in.
const MAX_REASON: usize = 200;

/// Where a host says whom to ask, and what it knows without asking.
const HOST_FILES: [&str; 2] = ["/etc/resolv.conf", "/etc/hosts"];

/// Whom to ask.
pub(super) struct Source {
    settings: Resolver,
    /// Made anew when the host's files are others.
    made: Mutex<Option<(Stamp, Arc<Made>)>>,
    /// Those that run beside each other share them.
    places: Arc<Semaphore>,
}

struct Made {
    /// What /etc/hosts says.
    hosts: Hosts,
    /// Whom to ask for the rest, or why there is nobody.
    resolver: Result<TokioResolver, Failure>,
}

/// When the host's files were written last.
type Stamp = [Option<SystemTime>; HOST_FILES.len()];

/// What records of a question's kind say, with their least TTL.
type Found<T> = Result<(Vec<T>, Duration), Failure>;

impl Source {
    pub(super) fn new(settings: Resolver) -> Self {
        Self {
            settings,
            made: Mutex::default(),
            places: Arc::new(Semaphore::new(MAX_QUESTIONS)),
        }
    }

    /// A source with other settings, and no more questions at once than with one.
    pub(super) fn beside(&self, settings: Resolver) -> Self {
        Self {
            settings,
            made: Mutex::default(),
            places: Arc::clone(&self.places),
        }
    }

    pub(super) fn settings(&self) -> &Resolver {
        &self.settings
    }

    /// Whether `config` asks others, or otherwise.
    pub(super) fn asks_others(&self, config: &Config) -> bool {
        self.settings != config.resolver
    }

    /// Looks a name up.
    pub(super) async fn ask(self: &Arc<Self>, name: &Name) -> Asked {
        match name {
            Name::Dns { host, port } => self.ask_dns(host, *port).await,
            Name::Srv { name } => self.ask_srv(name).await,
        }
    }

    async fn ask_dns(self: &Arc<Self>, host: &str, port: u16) -> Asked {
        let record = Record {
            priority: 0,
            weight: 1,
            port,
            host: host.to_owned(),
        };
        let mut asked = Asked::of(vec![record]);
        let hosts = parsed(host).map(|name| BTreeMap::from([(host.to_owned(), name)]));
        match hosts {
            Ok(hosts) => self.ask_hosts(hosts, &mut asked).await,
            Err(failure) => asked.records = Err(failure),
        }
        asked
    }

    async fn ask_srv(self: &Arc<Self>, name: &str) -> Asked {
        let pick = |data: &RData| {
            let RData::SRV(srv) = data else { return None };
            Some(srv.clone())
        };
        let found = match parsed(name) {
            Ok(name) => self.question(name, RecordType::SRV, pick).await,
            Err(failure) => Err(failure),
        };
        let (found, ttl) = match found {
            Ok(found) => found,
            Err(failure) => return Asked::failed(failure),
        };
        let mut hosts = BTreeMap::new();
        let records = found.into_iter().filter(|srv| !srv.target.is_root());
        let mut records: Vec<_> = records
            .map(|srv| {
                let host = srv.target.to_ascii().to_lowercase();
                hosts.insert(host.clone(), srv.target);
                Record {
                    priority: srv.priority,
                    weight: srv.weight,
                    port: srv.port,
                    host,
                }
            })
            .collect();
        if records.is_empty() {
            // A target of "." says so (RFC 2782).
            return Asked::failed(Failure {
                outcome: Outcome::NoRecords,
                why: "its SRV records say that there is no such service".to_owned(),
            });
        }
        let left_out = leave_out(&mut records);
        hosts.retain(|host, _| records.iter().any(|record| record.host == *host));
        let mut asked = Asked::of(records);
        (asked.left_out, asked.ttl) = (left_out, Some(ttl));
        self.ask_hosts(hosts, &mut asked).await;
        for (host, families) in &mut asked.hosts {
            for failure in families.iter_mut().filter_map(|found| found.as_mut().err()) {
                failure.why = format!("{host}: {}", failure.why);
            }
        }
        asked
    }

    /// Asks for the addresses of all hosts, some at once.
    async fn ask_hosts(self: &Arc<Self>, hosts: BTreeMap<String, rr::Name>, asked: &mut Asked) {
        let mut tasks = JoinSet::new();
        let turns = Arc::new(Semaphore::new(MAX_HOSTS));
        for (host, name) in hosts {
            let (source, turns) = (Arc::clone(self), Arc::clone(&turns));
            tasks.spawn(async move {
                // The semaphores are never closed.
                let _turn = turns.acquire().await;
                if let Some(written) = source.made().written(&name) {
                    return (host, written);
                }
                let ip = |data: &RData| data.ip_addr();
                let (v4, v6) = tokio::join!(
                    source.question(name.clone(), RecordType::A, ip),
                    source.question(name, RecordType::AAAA, ip),
                );
                (host, [v4, v6])
            });
        }
        // A task that panics ends the process in a release, where panics abort. Elsewhere
        // its host goes without an answer.
        while let Some(done) = tasks.join_next().await {
            let Ok((host, families)) = done else { continue };
            let mut ttl = asked.ttl;
            let families = families.map(|found| {
                let (mut addresses, lasts) = found?;
                addresses.sort_unstable();
                addresses.dedup();
                addresses.truncate(MAX_KEPT);
                ttl = Some(ttl.map_or(lasts, |ttl| ttl.min(lasts)));
                Ok(addresses)
            });
            asked.ttl = ttl;
            asked.hosts.insert(host, families);
        }
    }

    async fn question<T>(
        &self,
        name: rr::Name,
        kind: RecordType,
        pick: impl Fn(&RData) -> Option<T>,
    ) -> Found<T> {
        let _place = self.places.acquire().await;
        let resolver = self.made().resolver.clone()?;
        let timeout = self.settings.timeout;
        let lookup = resolver.lookup(name, kind);
        let Ok(answered) = tokio::time::timeout(timeout, lookup).await else {
            return Err(Failure::timeout(timeout));
        };
        let lookup = answered.map_err(|error| {
            if matches!(error, NetError::Timeout) {
                Failure::timeout(timeout)
            } else {
                Failure::of(&error, kind)
            }
        })?;
        let code = lookup.message().response_code;
        if !matches!(code, ResponseCode::NoError | ResponseCode::NXDomain) {
            return Err(Failure::code(code));
        }
        let found = picked(&lookup, pick);
        if found.is_empty() {
            return Err(Failure::no_records(kind));
        }
        let ttl = lookup
            .valid_until()
            .saturating_duration_since(Instant::now());
        Ok((found, ttl))
    }

    /// Who is asked, by the settings or by the host's files as they are now.
    fn made(&self) -> Arc<Made> {
        let from_host = self.settings.servers.is_empty();
        let written = |path| fs::metadata(path).and_then(|file| file.modified()).ok();
        let stamp = if from_host {
            HOST_FILES.map(written)
        } else {
            Stamp::default()
        };
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, made)) = &*made
            && *of == stamp
        {
            return Arc::clone(made);
        }
        let hosts = if from_host {
            Hosts::from_system().unwrap_or_default()
        } else {
            Hosts::default()
        };
        let resolver = self.resolver(from_host).map_err(|error| Failure {
            outcome: Outcome::Failed,
            why: shortened(&format!("{}: {error}", HOST_FILES[0])),
        });
        let new = Arc::new(Made { hosts, resolver });
        *made = Some((stamp, Arc::clone(&new)));
        new
    }

    fn resolver(&self, from_host: bool) -> Result<TokioResolver, NetError> {
        let mut builder = if from_host {
            TokioResolver::builder_tokio()?
        } else {
            let servers = self.settings.servers.iter().map(name_server);
            let config = ResolverConfig::from_name_servers(servers.collect());
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
        };
        let options = builder.options_mut();
        // What is asked is to be answered now; TTLs are kept elsewhere.
        options.cache_size = 0;
        options.num_concurrent_reqs = ASKED_AT_ONCE;
        // The library counts from the second on.
        options.attempts = ATTEMPTS - 1;
        options.timeout = self.settings.timeout / 2;
        // That file is read here, since a host that is there is not asked for.
        options.use_hosts_file = ResolveHosts::Never;
        builder.build()
    }
}

impl Made {
    /// The addresses of a host in /etc/hosts, which then has no others.
    fn written(&self, host: &rr::Name) -> Option<[Found<IpAddr>; 2]> {
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
    let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()];
    let connections = connections.map(|mut connection| {
        connection.port = address.port();
        connection
    });
    NameServerConfig::new(address.ip(), true, connections.into())
}

fn picked<T>(lookup: &Lookup, pick: impl Fn(&RData) -> Option<T>) -> Vec<T> {
    let answers = lookup.answers().iter();
    answers.filter_map(|record| pick(&record.data)).collect()
}

/// Leaves those records that are to be preferred, and returns how many were left out.
fn leave_out(records: &mut Vec<Record>) -> usize {
    records.sort_by_cached_key(|record| {
        let Record {
            priority,
            weight,
            port,
            ref host,
        } = *record;
        (priority, Reverse(weight), host.clone(), port)
    });
    records.dedup();
    let left_out = records.len().saturating_sub(MAX_RECORDS);
    records.truncate(MAX_RECORDS);
    left_out
}

fn parsed(name: &str) -> Result<rr::Name, Failure> {
    rr::Name::from_str_relaxed(name).map_err(|error| Failure {
        outcome: Outcome::Failed,
        why: shortened(&error.to_string()),
    })
}

/// In one short line, since it may hold what others wrote.
fn shortened(text: &str) -> String {
    let plain = text.chars().filter(|c| !c.is_control());
    plain.take(MAX_REASON).collect()
}

impl Asked {
    fn of(records: Vec<Record>) -> Self {
        Self {
            records: Ok(records),
            left_out: 0,
            hosts: BTreeMap::new(),
            ttl: None,
        }
    }

    fn failed(failure: Failure) -> Self {
        Self {
            records: Err(failure),
            ..Self::of(Vec::new())
        }
    }
}

impl Failure {
    fn of(error: &NetError, kind: RecordType) -> Self {
        let code = if let NetError::Dns(DnsError::NoRecordsFound(none)) = error {
            none.response_code
        } else if let NetError::Dns(DnsError::ResponseCode(code)) = error {
            *code
        } else {
            return Self {
                outcome: Outcome::Failed,
                why: shortened(&error.to_string()),
            };
        };
        if code == ResponseCode::NoError {
            Self::no_records(kind)
        } else if code == ResponseCode::NXDomain {
            Self {
                outcome: Outcome::NoRecords,
                why: "there is no such name".to_owned(),
            }
        } else {
            Self::code(code)
        }
    }

    /// A code that says nothing of what there is, one without a meaning included.
    fn code(code: ResponseCode) -> Self {
        Self {
            outcome: Outcome::Failed,
            why: format!("DNS server: {code}"),
        }
    }

    fn no_records(kind: RecordType) -> Self {
        let what = if kind == RecordType::SRV {
            "SRV records"
        } else {
            "addresses"
        };
        Self {
            outcome: Outcome::NoRecords,
            why: format!("it has no {what}"),
        }
    }

    fn timeout(after: Duration) -> Self {
        let after = humantime::format_duration(after);
        Self {
            outcome: Outcome::Timeout,
            why: format!("no answer within {after}"),
        }
    }
}

#[cfg(test)]
mod tests;
