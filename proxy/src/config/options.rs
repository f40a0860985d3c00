//! The options: every key of the configuration once, with its type, its range and its
//! default. A field's comment is its description, in `--help` and in the reference.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use schemars::{JsonSchema, Schema, json_schema};
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::accept::Accept;
use super::access_log::AccessLog;
use super::admin_address::{AdminAddress, SocketPath};
use super::bind::Bind;
use super::header::HeaderOptions;
use super::names::ServerAddress;
use super::sources::{FirstPort, Source};
use super::token::Token;
use super::values::{
    DAY, MINUTE, MS, Network, Number, OnByDefault, S, Time, WEEK, everybody, label,
};
use super::{ConfigError, Health, Named, Server};
use ppv2_engine::mode::Mode;
use ppv2_engine::upstream::Balance;

/// Declares words that an option takes.
macro_rules! words {
    ($($(#[$meta:meta])* $vis:vis $name:ident { $($(#[$of:meta])* $word:ident),+ $(,)? })+) => {$(
        $(#[$meta])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema, ValueEnum,
        )]
        #[serde(rename_all = "snake_case")]
        #[value(rename_all = "snake_case")]
        #[schemars(inline)]
        $vis enum $name {
            $($(#[$of])* $word),+
        }
    )+};
}
pub(super) use words;

/// The configuration.
///
/// It is read as it is written; `validate` fills what follows from
/// it and is not written.
#[derive(Args, Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(title = "Configuration of ppv2-proxy")]
pub struct Config {
    /// User to run as, if started as root [default: nobody]
    #[arg(long, value_name = "NAME")]
    pub user: Option<String>,

    /// Worker threads [default: one per core]
    #[arg(long, value_name = "N")]
    pub workers: Option<Number<usize, 1, 1024>>,

    /// How long a shutdown waits for outstanding replies
    #[arg(skip)]
    pub drain_timeout: Time<MS, WEEK, { 5 * S }>,

    /// Every worker has a socket for each address, and the kernel spreads clients over them
    /// (SO_REUSEPORT); false: each address has one socket, served by one worker
    #[arg(skip)]
    pub reuse_port: OnByDefault,

    /// Networks of other proxies, whose addresses are never a client's
    #[arg(skip)]
    pub peers: Option<Vec<Network>>,

    /// Log of ended sessions [default: none]
    #[arg(skip)]
    pub access_log: Option<AccessLog>,

    /// Bounds of the whole proxy
    #[command(flatten)]
    pub limits: Limits,

    /// Metrics, health and sessions over HTTP [default: none]
    #[command(flatten)]
    pub admin: Option<Admin>,

    /// Where another process takes over from this one [default: nowhere]
    #[arg(skip)]
    pub upgrade: Option<Upgrade>,

    /// How the names among the servers are looked up
    #[arg(skip)]
    pub resolver: Resolver,

    /// Addresses that clients write to, each with an upstream; at least one
    #[arg(skip)]
    #[serde(rename = "listener")]
    pub listeners: Vec<Listener>,

    /// Groups of servers, by name
    #[arg(skip)]
    #[serde(rename = "upstream")]
    pub(crate) upstreams: BTreeMap<String, Upstream>,

    /// All servers of all upstreams that a listener uses.
    #[arg(skip)]
    #[serde(skip)]
    pub servers: Vec<Server>,

    /// All names among the servers of these upstreams, in the order of the
    /// configuration; [`expand`](Self::expand) adds the servers that they resolve to.
    #[arg(skip)]
    #[serde(skip)]
    pub names: Vec<Named>,

    /// The files with keys of tags.
    #[arg(skip)]
    #[serde(skip)]
    pub(super) key_files: Vec<PathBuf>,

    /// What works but is probably not meant.
    #[arg(skip)]
    #[serde(skip)]
    pub warnings: Vec<String>,
}

/// Bounds of the whole proxy
#[derive(Args, Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// The most sessions [default: what open files, local ports, source networks and memory allow]
    #[arg(long, value_name = "N")]
    pub max_sessions: Option<Number<usize, 1, { u32::MAX }>>,
}

/// Metrics, health and sessions over HTTP
#[derive(Args, Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Admin {
    /// Address for metrics, health and sessions, and a page that shows them: an IP address with a
    /// port, or unix:/PATH for a Unix socket of the proxy's user and group [default: none]
    #[arg(long = "admin", value_name = "ADDR", required = false)]
    pub listen: AdminAddress,

    /// File with a token, of 16 to 1024 characters, that every POST must carry as
    /// `Authorization: Bearer TOKEN` [default: no token]
    #[arg(skip)]
    #[serde(default)]
    pub(crate) token_file: Option<PathBuf>,

    /// What the file has.
    #[arg(skip)]
    #[serde(skip)]
    pub(crate) token: Option<Token>,
}

/// Where another process takes over from this one
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Upgrade {
    /// Path of a Unix socket, on which a process of the same user gets all sockets and sessions by
    /// `run --takeover`
    pub socket: SocketPath,
}

/// How the names among the servers are looked up
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Resolver {
    /// DNS servers, at most 8 [default: those of /etc/resolv.conf, after /etc/hosts]
    pub servers: Vec<SocketAddr>,
    /// How long the answer to a question may take
    pub timeout: Time<{ 100 * MS }, MINUTE, { 5 * S }>,
    /// The shortest time between two lookups of a name, whatever its TTL
    /// [default: 5s, or max_ttl if that is shorter]
    pub min_ttl: Option<Time<{ 100 * MS }, DAY>>,
    /// The longest
    pub max_ttl: Time<{ 100 * MS }, DAY, { 5 * MINUTE }>,
    /// The pause after the first failure; doubled with each, up to a minute
    pub retry: Time<{ 100 * MS }, MINUTE, S>,
}

/// Addresses that clients write to, and what is done with their datagrams
#[derive(Args, Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Listener {
    /// Name in logs and metrics [default: listener1, listener2, …]
    #[arg(skip)]
    #[serde(deserialize_with = "label")]
    pub name: String,

    /// Address that clients write to, or a range of ports: 0.0.0.0:40000-40999; repeatable
    #[arg(
        long = "listen",
        value_name = "ADDR",
        required_unless_present = "config"
    )]
    pub bind: Vec<Bind>,

    /// Name of the upstream whose servers get the datagrams
    #[arg(skip = "upstream")]
    pub upstream: String,

    /// How the client's address reaches the server
    #[arg(long, default_value_t, value_enum)]
    pub(crate) mode: ModeKind,

    /// Mode dsr: who makes replies come from the listener's address [default: proxy]
    #[arg(long, value_name = "WHERE", value_enum)]
    pub(crate) rewrite_on: Option<RewriteOn>,

    /// Mode transparent: which port of the client's address datagrams come from [default: any]
    #[arg(long, value_name = "PORT", value_enum)]
    pub(crate) source_port: Option<SourcePort>,

    /// End a session after this long without a datagram
    // A shorter time than the wheel that ends sessions turns in would drop replies.
    #[arg(long, value_name = "DURATION", default_value_t)]
    pub idle_timeout: Time<{ 50 * MS }, WEEK, { 30 * S }>,

    /// End a session after N replies to each datagram; 0 for never
    #[arg(long, value_name = "N", default_value_t)]
    pub responses: u64,

    /// Start a new session after N client datagrams; 0 for never
    #[arg(long, value_name = "N", default_value_t)]
    pub requests: u64,

    /// Remember each client in a session; false: replies find their client by tags alone, which
    /// needs replies = "tagged" in the upstream
    #[arg(skip)]
    pub(crate) sessions: OnByDefault,

    /// Network whose clients are served; repeatable
    #[arg(long, value_name = "NET", default_values_t = everybody(), value_delimiter = ',')]
    #[serde(default = "everybody")]
    pub allow: Vec<Network>,

    /// Networks whose clients are refused, though `allow` has them
    #[arg(skip)]
    pub deny: Vec<Network>,

    /// What each client may have
    #[arg(skip)]
    pub per_client: PerClient,

    /// A bound on the bytes of replies, against clients with a forged address [default: none]
    #[arg(skip)]
    pub(crate) amplification: Option<Amplification>,

    /// Proxies in front of the listener, whose datagrams begin with a header that names the client
    /// [default: none, every byte is payload]
    #[arg(skip)]
    pub accept: Option<Accept>,

    /// Drop and count datagrams that exceed the interface's MTU, rather than fragment them
    #[arg(skip)]
    pub dont_fragment: bool,

    /// Pass the DSCP bits on, besides those of ECN
    #[arg(skip)]
    pub dscp: bool,

    /// Also bind addresses that this host does not have yet (IP_FREEBIND)
    #[arg(skip)]
    pub freebind: bool,

    /// Look for datagrams for this long before sleeping: lower latency, more CPU. Workers serve
    /// all listeners: the longest that any of them asks for applies
    #[arg(long, value_name = "DURATION", default_value_t)]
    pub(crate) busy_poll: Pause,

    /// Let datagrams gather for this long after a wake-up: less CPU, higher latency
    #[arg(long, value_name = "DURATION", default_value_t)]
    pub(crate) coalesce: Pause,

    /// Its upstream's servers, by their index in [`Config::servers`], with the mode
    /// that each is served in.
    #[arg(skip)]
    #[serde(skip)]
    pub servers: Vec<(usize, Mode)>,

    /// Servers that it had before and that its sessions may stay with for a while.
    #[arg(skip)]
    #[serde(skip)]
    pub leaving: Vec<(usize, Mode)>,

    /// Indexes of its upstream's names, with the mode that the servers of each are
    /// served in.
    #[arg(skip)]
    #[serde(skip)]
    pub names: Vec<(usize, Mode)>,

    /// How new sessions are spread over the servers.
    #[arg(skip)]
    #[serde(skip)]
    pub balance: Balance,

    /// Whether sessions move back to a server that has come back.
    #[arg(skip)]
    #[serde(skip)]
    pub returns: bool,
}

/// A pause of a worker, too short for clients to notice.
type Pause = Time<0, { 10 * MS }>;

/// More than any client can send or have.
pub(crate) const MOST: u32 = 100_000_000;

/// What each client may have
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PerClient {
    /// The most sessions [default: no bound]
    pub sessions: Option<Number<u32, 1, MOST>>,
    /// Datagrams per second [default: no bound]
    pub(crate) rate: Option<Number<u32, 1, MOST>>,
    /// How many of them at once [default: those of a second]
    pub(crate) burst: Option<Number<u32, 1, MOST>>,
    /// IPv6 addresses with so many leading bits in common are one client
    // What one subscriber, or host, is commonly given (RFC 6177, RFC 7421).
    pub ipv6_prefix: Number<u8, 1, 128, 64>,
}

/// A bound on the bytes of replies, against clients with a forged address
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Amplification {
    /// Bytes of replies for each byte of the client's, over the whole session
    pub(crate) limit: Number<u64, 1, MOST>,
    /// What happens to replies beyond the bound
    #[serde(default)]
    pub(crate) action: AmplificationAction,
}

/// A group of servers
#[derive(Args, Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Upstream {
    /// Server to pass datagrams to, as IP:PORT, HOST:PORT, dns:HOST:PORT or
    /// srv:_SERVICE._udp.NAME; repeatable
    #[arg(
        long = "upstream",
        value_name = "ADDR",
        required_unless_present = "config"
    )]
    pub(crate) servers: Vec<ServerOptions>,

    /// How new sessions are spread over the servers
    #[arg(long, default_value_t, value_enum)]
    pub(crate) balance: BalanceKind,

    /// Balance maglev: what of a client decides on its server [default: client_ip]
    #[arg(skip)]
    pub(crate) hash_on: Option<HashOn>,

    /// Balance maglev by client_ip: IPv6 addresses with so many leading bits in common get the
    /// same server [default: 64]
    #[arg(skip)]
    pub(crate) hash_ipv6_prefix: Option<Number<u8, 1, 128>>,

    /// Addresses of this host to send from, each with ports of its own; or a network of each
    /// family, of which each session gets an address of its own [default: the kernel's
    /// choice]
    #[arg(long, value_name = "SOURCE")]
    pub(crate) source: Vec<Source>,

    /// Beside a network in `source`: the port that the first worker sends from; each further
    /// worker has the next one [default: the kernel's choice]
    #[arg(skip)]
    pub(crate) source_port: Option<FirstPort>,

    /// How replies find their client
    #[arg(long, default_value_t, value_enum)]
    pub(crate) replies: ReplyKind,

    /// Replies auto and tagged: file with the key of tags, 32 hexadecimal digits, which proxies
    /// that serve the same clients share [default: a key of this process]
    #[arg(skip)]
    pub(crate) tag_key_file: Option<PathBuf>,

    /// How long a server takes to get its whole share of sessions once it comes, or comes back
    #[arg(skip)]
    pub(crate) slow_start: Time<0, WEEK>,

    /// How long the sessions of a server may stay when it is removed
    #[arg(skip)]
    pub(crate) lame_duck: Time<0, WEEK, { 30 * S }>,

    /// Balance maglev: what sessions do when the server that they belong to has come back
    #[arg(skip)]
    pub(crate) on_return: OnReturn,

    /// The header of modes ppv2 and dsr
    #[arg(skip)]
    pub(crate) header: HeaderOptions,

    /// Health checks [default: none]
    #[arg(skip)]
    pub(crate) health: Option<Health>,
}

/// A server: `"192.0.2.10:53"` for short, or a table
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, remote = "Self")]
#[schemars(transform = or_its_address)]
pub(crate) struct ServerOptions {
    /// IP:PORT, HOST:PORT, dns:HOST:PORT or srv:_SERVICE._udp.NAME; FIRST-LAST for PORT with
    /// port = "same"
    pub(super) address: ServerAddress,
    /// Which of the ports in `address` datagrams go to [default: the only one]
    pub(crate) port: Option<ServerPort>,
    /// How the client's address reaches it [default: the listener's]
    pub(crate) mode: Option<ModeKind>,
    /// Mode dsr: who makes replies come from the listener's address [default: proxy]
    pub(crate) rewrite_on: Option<RewriteOn>,
    /// Mode transparent: which port of the client's address datagrams come from [default: any]
    pub(crate) source_port: Option<SourcePort>,
    /// Its share of the sessions beside the others' [default: 1]
    #[schemars(range(min = 1, max = 256))]
    pub(crate) weight: Option<i64>,
    /// Whether it only stands in for the others
    #[serde(default)]
    pub(crate) backup: bool,
    /// Whether it gets no new sessions
    #[serde(default)]
    pub(crate) drain: bool,
}

/// Has the schema of a server allow its address in place of the table.
fn or_its_address(table: &mut Schema) {
    *table = json_schema!({ "anyOf": [{ "type": "string" }, table] });
}

impl FromStr for ServerOptions {
    type Err = ConfigError;

    fn from_str(address: &str) -> Result<Self, ConfigError> {
        Ok(Self {
            address: address.parse()?,
            port: None,
            mode: None,
            rewrite_on: None,
            source_port: None,
            weight: None,
            backup: false,
            drain: false,
        })
    }
}

impl<'de> Deserialize<'de> for ServerOptions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StringOrTable;

        impl<'de> Visitor<'de> for StringOrTable {
            type Value = ServerOptions;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an address such as \"192.0.2.10:53\", or { address = … }")
            }

            fn visit_str<E: de::Error>(self, address: &str) -> Result<ServerOptions, E> {
                address.parse().map_err(ConfigError::into_serde)
            }

            fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<ServerOptions, M::Error> {
                // The one that is derived, by the attribute `remote`.
                ServerOptions::deserialize(MapAccessDeserializer::new(map))
            }
        }

        deserializer.deserialize_any(StringOrTable)
    }
}

impl ReplyKind {
    /// As it is written.
    pub(super) fn quoted(self) -> &'static str {
        match self {
            Self::Session => "\"session\"",
            Self::Auto => "\"auto\"",
            Self::Tagged => "\"tagged\"",
        }
    }
}

words! {
    /// How lines of a log are written
    pub LogFormat {
        /// For people: values in an order, with names
        #[default]
        Text,
        /// A JSON object per line
        Json,
    }

    /// How the client's address reaches a server
    pub(crate) ModeKind {
        /// In a PROXY v2 header before the datagram
        #[default]
        Ppv2,
        /// As the source address; replies are routed to the proxy
        Transparent,
        /// As the source address and port, or in a header; replies bypass the proxy process (direct server return)
        Dsr,
        /// Not at all
        Plain,
    }

    /// Who makes replies of direct server return come from the listener's address
    pub(crate) RewriteOn {
        /// The kernel of the proxy's host
        #[default]
        Proxy,
        /// The kernel of the server's host
        Server,
        /// The server, by the SDK
        Sdk,
    }

    /// Which port of the client's address datagrams come from
    pub(crate) SourcePort {
        /// One that the kernel chooses
        #[default]
        Any,
        /// The client's own
        Client,
    }

    /// Which of a server's ports datagrams go to
    pub(crate) ServerPort {
        /// The one that the client wrote to
        #[default]
        Same,
    }

    /// How replies find their client
    pub(crate) ReplyKind {
        /// By the session that they come to
        #[default]
        Session,
        /// By the tag that a server on our SDKs returns; of other servers as session
        Auto,
        /// By their tags; replies without one are dropped
        Tagged,
    }

    /// How new sessions are spread over servers
    pub(crate) BalanceKind {
        /// The same server for the same client, also by other proxies with the same servers
        #[default]
        Maglev,
        /// One after the other
        RoundRobin,
        /// The server that has the fewest sessions for its weight
        LeastSessions,
        /// Of two drawn at random, the one that has fewer sessions for its weight
        RandomTwo,
    }

    /// What of a client decides on its server
    pub(crate) HashOn {
        /// Its IP address
        #[default]
        ClientIp,
        /// Its IP address and port
        ClientAddr,
    }

    /// What sessions do when the server that they belong to has come back
    pub(crate) OnReturn {
        /// Stay where they are
        #[default]
        Stay,
        /// Return to it
        Return,
    }

    /// Which datagrams of a session have a header
    pub(crate) Emit {
        /// All
        #[default]
        Every,
        /// Those before the server's first reply, and again when the server may have forgotten it
        First,
    }

    /// What happens to replies beyond a bound on their bytes
    pub(crate) AmplificationAction {
        /// Nothing: there is no bound
        Off,
        /// They are counted
        #[default]
        Watch,
        /// They are dropped
        Enforce,
    }
}
