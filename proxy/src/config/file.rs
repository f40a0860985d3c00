//! The configuration as it is written: TOML keys and their raw values, each
//! with its place in the file. What the values mean is decided one level up.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{self, MapAccess, Visitor, value::MapAccessDeserializer};
use toml::Spanned;

/// A value and where it stands.
pub(crate) type At<T> = Spanned<T>;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct File {
    pub(crate) user: Option<At<String>>,
    pub(crate) workers: Option<At<usize>>,
    pub(crate) drain_timeout: Option<At<String>>,
    pub(crate) reuse_port: Option<At<bool>>,
    pub(crate) peers: Option<At<Vec<At<String>>>>,
    pub(crate) access_log: Option<AccessLog>,
    #[serde(default)]
    pub(crate) limits: Limits,
    pub(crate) admin: Option<Admin>,
    pub(crate) resolver: Option<At<Resolver>>,
    #[serde(default)]
    pub(crate) listener: Vec<At<Listener>>,
    #[serde(default)]
    pub(crate) upstream: BTreeMap<String, At<Upstream>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Limits {
    pub(crate) max_sessions: Option<At<usize>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Admin {
    pub(crate) listen: At<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Resolver {
    #[serde(default)]
    pub(crate) servers: Vec<At<String>>,
    pub(crate) timeout: Option<At<String>>,
    pub(crate) min_ttl: Option<At<String>>,
    pub(crate) max_ttl: Option<At<String>>,
    pub(crate) retry: Option<At<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Listener {
    pub(crate) name: Option<At<String>>,
    pub(crate) bind: At<Vec<At<String>>>,
    pub(crate) upstream: At<String>,
    pub(crate) mode: Option<At<String>>,
    pub(crate) rewrite_on: Option<At<String>>,
    pub(crate) source_port: Option<At<String>>,
    pub(crate) idle_timeout: Option<At<String>>,
    #[serde(default)]
    pub(crate) responses: u64,
    #[serde(default)]
    pub(crate) requests: u64,
    pub(crate) allow: Option<At<Vec<At<String>>>>,
    pub(crate) deny: Option<At<Vec<At<String>>>>,
    pub(crate) per_client: Option<At<PerClient>>,
    pub(crate) amplification: Option<At<Amplification>>,
    #[serde(default)]
    pub(crate) df: bool,
    #[serde(default)]
    pub(crate) dscp: bool,
    #[serde(default)]
    pub(crate) freebind: bool,
    pub(crate) busy_poll: Option<At<String>>,
    pub(crate) coalesce: Option<At<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PerClient {
    pub(crate) sessions: Option<At<usize>>,
    pub(crate) rate: Option<At<usize>>,
    pub(crate) burst: Option<At<usize>>,
    pub(crate) ipv6_prefix: Option<At<usize>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Amplification {
    pub(crate) limit: At<usize>,
    pub(crate) action: Option<At<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AccessLog {
    pub(crate) path: At<String>,
    pub(crate) format: Option<At<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Upstream {
    pub(crate) balance: Option<At<String>>,
    pub(crate) hash_on: Option<At<String>>,
    pub(crate) hash_ipv6_prefix: Option<At<i64>>,
    #[serde(default)]
    pub(crate) source: Vec<At<String>>,
    /// Gone; read so that the error can say what to write instead.
    pub(crate) share_sockets: Option<At<bool>>,
    pub(crate) slow_start: Option<At<String>>,
    pub(crate) lame_duck: Option<At<String>>,
    pub(crate) on_return: Option<At<String>>,
    #[serde(default)]
    pub(crate) header: Header,
    pub(crate) health: Option<At<Health>>,
    pub(crate) servers: Vec<At<Server>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Health {
    pub(crate) every: Option<At<String>>,
    pub(crate) timeout: Option<At<String>>,
    pub(crate) fall: Option<At<usize>>,
    pub(crate) rise: Option<At<usize>>,
    pub(crate) jitter: Option<At<usize>>,
    pub(crate) fail_open: Option<bool>,
    pub(crate) probe: Option<At<Probe>>,
    pub(crate) passive: Option<At<Passive>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Probe {
    pub(crate) kind: At<String>,
    pub(crate) send: Option<At<String>>,
    pub(crate) send_hex: Option<At<String>>,
    pub(crate) expect: Option<At<String>>,
    pub(crate) expect_hex: Option<At<String>>,
    pub(crate) expect_regex: Option<At<String>>,
    pub(crate) answer: Option<At<bool>>,
    pub(crate) header: Option<At<String>>,
    pub(crate) name: Option<At<String>>,
    pub(crate) port: Option<At<usize>>,
    pub(crate) path: Option<At<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Passive {
    pub(crate) window: Option<At<String>>,
    pub(crate) unanswered: Option<At<usize>>,
    pub(crate) at_least: Option<At<usize>>,
    pub(crate) hold: Option<At<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Header {
    pub(crate) emit: Option<At<String>>,
    #[serde(default)]
    pub(crate) crc32c: bool,
}

/// `"192.0.2.10:53"` for short, or a table.
#[derive(Debug, Default)]
pub(crate) struct Server {
    pub(crate) address: String,
    pub(crate) mode: Option<At<String>>,
    pub(crate) rewrite_on: Option<At<String>>,
    pub(crate) source_port: Option<At<String>>,
    pub(crate) weight: Option<At<i64>>,
    pub(crate) backup: bool,
    pub(crate) drain: bool,
}

impl Server {
    /// One of which only the address is said.
    pub(crate) fn at(address: String) -> Self {
        Self {
            address,
            ..Self::default()
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ServerTable {
    address: String,
    mode: Option<At<String>>,
    rewrite_on: Option<At<String>>,
    source_port: Option<At<String>>,
    weight: Option<At<i64>>,
    #[serde(default)]
    backup: bool,
    #[serde(default)]
    drain: bool,
}

impl<'de> Deserialize<'de> for Server {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StringOrTable;

        impl<'de> Visitor<'de> for StringOrTable {
            type Value = Server;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an address such as \"192.0.2.10:53\", or { address = … }")
            }

            fn visit_str<E: de::Error>(self, address: &str) -> Result<Server, E> {
                Ok(Server::at(address.to_owned()))
            }

            fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<Server, M::Error> {
                let table = ServerTable::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Server {
                    address: table.address,
                    mode: table.mode,
                    rewrite_on: table.rewrite_on,
                    source_port: table.source_port,
                    weight: table.weight,
                    backup: table.backup,
                    drain: table.drain,
                })
            }
        }

        deserializer.deserialize_any(StringOrTable)
    }
}
