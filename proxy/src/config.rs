//! Configuration: TOML or flags, turned once into a [`Config`] in which
//! everything is valid and resolved. Nothing behind this module checks it again.

mod balance;
mod check;
mod error;
mod expand;
mod file;
mod guards;
mod health;
mod loops;
mod modes;
mod names;
mod resolver;
#[cfg(test)]
mod tests;
mod values;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use ipnet::IpNet;

use crate::files;
use ppv2_engine::address::ServerAddr;
use ppv2_engine::mode::Mode;
use ppv2_engine::session::Rules;
use ppv2_engine::upstream::Balance;
use ppv2_engine::worker::Pace;

use check::Checker;
pub use error::{ConfigError, printable};
pub(crate) use expand::in_order;
pub use expand::{Answer, Answers, Expanded, MAX_ADDRESSES};
use file::{At, File};
pub use health::{Expect, Header, Health, Passive, Probe};
pub use names::{Name, Named};
pub use resolver::Resolver;

/// A valid configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Whom to run as, if started as root; `None` for `nobody`.
    pub user: Option<String>,
    /// Worker threads; `None` for one per core.
    pub workers: Option<usize>,
    /// How long to wait at a stop for replies in flight.
    pub drain_timeout: Duration,
    /// Whether all workers bind every address, which the kernel then spreads
    /// clients over; otherwise each address is one worker's.
    pub reuse_port: bool,
    /// Networks of the other proxies, whose datagrams are never a client's.
    pub peers: Vec<IpNet>,
    /// Where ended sessions are told of.
    pub access_log: Option<AccessLog>,
    /// The most sessions; `None` for what descriptors and ports allow.
    pub max_sessions: Option<usize>,
    /// Where metrics and health are served.
    pub admin: Option<SocketAddr>,
    /// How workers spend their time between datagrams. A worker serves all
    /// listeners, so the longest that any of them asks for applies.
    pub pace: Pace,
    /// At least one.
    pub listeners: Vec<Listener>,
    /// All servers of all upstreams that a listener uses.
    pub servers: Vec<Server>,
    /// All names among the servers of these upstreams, in the order of the
    /// configuration; [`expand`](Self::expand) adds the servers that they lead to.
    pub names: Vec<Named>,
    /// Who is asked for them.
    pub resolver: Resolver,
    /// What works but is probably not meant.
    pub warnings: Vec<String>,
}

/// Addresses that clients write to, and what becomes of their datagrams.
#[derive(Clone, Debug)]
pub struct Listener {
    /// Its name in logs and metrics.
    pub name: String,
    /// At least one, none with port 0.
    pub bind: Vec<SocketAddr>,
    /// Name of its upstream.
    pub upstream: String,
    /// Its upstream's servers, by their place in [`Config::servers`], with the mode
    /// that each is served in.
    pub servers: Vec<(usize, Mode)>,
    /// Servers that it had before and that its sessions may stay with for a while.
    pub leaving: Vec<(usize, Mode)>,
    /// Whether sessions go back to a server that has come back.
    pub returns: bool,
    /// Numbers of its upstream's names, with the mode that the servers of each are
    /// served in.
    pub names: Vec<(usize, Mode)>,
    /// How new sessions are spread over them.
    pub balance: Balance,
    /// When its sessions end.
    pub rules: Rules,
    /// Clients that may use it; at least one network.
    pub allow: Vec<IpNet>,
    /// Those of them that may not.
    pub deny: Vec<IpNet>,
    /// What each client may have.
    pub per_client: PerClient,
    /// Refuse rather than fragment.
    pub dont_fragment: bool,
    /// Pass DSCP as well as ECN.
    pub dscp: bool,
    /// Also serve addresses that this host does not have yet.
    pub freebind: bool,
}

/// What each client may have, an IPv6 one being a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PerClient {
    /// The most sessions.
    pub sessions: Option<u32>,
    /// Datagrams a second, and how many of them at once.
    pub rate: Option<(u32, u32)>,
    /// Leading bits that the addresses of an IPv6 client have in common.
    pub ipv6_prefix: u8,
}

/// The most bytes that a configuration has: some thousands of servers, at length.
const MAX_BYTES: u64 = 16 << 20;

/// Where ended sessions are told of, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessLog {
    /// A file to append to; `None` for standard output.
    pub path: Option<PathBuf>,
    /// How lines are written.
    pub format: LogFormat,
}

/// How lines of the access log are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people: values in an order, with names.
    #[default]
    Text,
    /// An object a line.
    Json,
}

/// A server of an upstream.
#[derive(Clone, Debug)]
pub struct Server {
    /// Name of the upstream.
    pub upstream: String,
    /// As it was written; its address if a name leads to it.
    pub name: String,
    /// As it was resolved.
    pub address: ServerAddr,
    /// The name that leads to it, if it was not written itself.
    pub found_by: Option<Name>,
    /// Addresses of this host to send to it from; empty for the kernel's choice.
    pub sources: Arc<[IpAddr]>,
    /// Whether its sessions may share sockets with sessions to other servers.
    /// Its share of the sessions beside the others'.
    pub weight: u16,
    /// Whether it only stands in for the others.
    pub backup: bool,
    /// Whether it gets no new sessions.
    pub drain: bool,
    /// Whether no listener has it any more but for sessions that stay a while.
    pub leaving: bool,
    /// How long it takes to get its whole share of sessions once it comes, or comes
    /// back.
    pub slow_start: Duration,
    /// How long its sessions may stay when it is taken out.
    pub lame_duck: Duration,
    /// How to find out whether it serves, if at all.
    pub health: Option<Arc<Health>>,
}

/// The one-listener case, from the command line.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    /// Addresses to bind.
    pub listen: Vec<String>,
    /// Servers.
    pub upstream: Vec<String>,
    /// Mode's name.
    pub mode: Option<String>,
    /// As the keys of the same names.
    pub rewrite_on: Option<String>,
    /// As the key of the same name.
    pub source_port: Option<String>,
    /// As the key of the same name.
    pub user: Option<String>,
    /// Balancer's name.
    pub balance: Option<String>,
    /// Worker threads.
    pub workers: Option<usize>,
    /// Admin's address.
    pub admin: Option<String>,
    /// As the keys of the same names.
    pub idle_timeout: Option<String>,
    /// As the key of the same name.
    pub max_sessions: Option<usize>,
    /// As the key of the same name.
    pub responses: u64,
    /// As the key of the same name.
    pub requests: u64,
    /// As the key of the same name; empty for everybody.
    pub allow: Vec<String>,
    /// As the key of the same name.
    pub busy_poll: Option<String>,
    /// As the key of the same name.
    pub coalesce: Option<String>,
}

impl Config {
    /// Reads and checks a TOML file, and resolves the names in it.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] with file, line, value and mend.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let name = path.display().to_string();
        let content = files::read(path, MAX_BYTES).map_err(|error| {
            ConfigError::new(format!("{name}: {error}"))
                .mend("--config takes the path of a readable TOML file of 16 MiB at most")
        })?;
        Self::from_toml(&name, &content)
    }

    /// Checks the TOML text `content`; `name` is what errors call it.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] with file, line, value and mend.
    pub fn from_toml(name: &str, content: &str) -> Result<Self, ConfigError> {
        let file: File =
            toml::from_str(content).map_err(|error| ConfigError::of_toml(&error, name, content))?;
        Checker::new(Some((name, content))).config(file)
    }

    /// Checks the values of command line flags.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] with flag, value and mend.
    pub fn from_flags(flags: Flags) -> Result<Self, ConfigError> {
        Checker::new(None).config(flags.into())
    }
}

impl Config {
    /// Addresses of this host that sessions are sent from, by configuration.
    #[must_use]
    pub fn sources(&self) -> BTreeSet<IpAddr> {
        let of_servers = self.servers.iter().map(|server| &server.sources);
        let of_names = self.names.iter().map(|named| &named.sources);
        // The servers of an upstream share one list.
        let mut seen = BTreeSet::new();
        let lists = of_servers.chain(of_names);
        let lists = lists.filter(|sources| seen.insert(sources.as_ptr()));
        lists.flat_map(|sources| sources.iter().copied()).collect()
    }

    /// Every mode that a listener's server is served in, with the server.
    pub fn served(&self) -> impl Iterator<Item = (&Listener, &Server, Mode)> {
        self.listeners.iter().flat_map(move |listener| {
            let servers = listener.servers.iter();
            servers.map(move |(number, mode)| (listener, &self.servers[*number], *mode))
        })
    }

    /// Worker threads, by configuration or one for each core that this process could
    /// use when it was first asked.
    #[must_use]
    pub fn worker_count(&self) -> usize {
        // Cores come and go with quotas and affinities, and workers don't.
        static CORES: OnceLock<usize> = OnceLock::new();
        let counted = || thread::available_parallelism().map_or(1, usize::from);
        self.workers.unwrap_or_else(|| *CORES.get_or_init(counted))
    }

    /// Whether listeners' sockets share their addresses (SO_REUSEPORT): those of several
    /// workers, and those beside sessions that write from their client's own port, which
    /// may be a listener's.
    #[must_use]
    pub fn shares_addresses(&self) -> bool {
        let mut modes = self.listeners.iter().flat_map(Listener::modes);
        self.reuse_port && self.worker_count() > 1 || modes.any(Mode::spoofs_ports)
    }

    /// Sockets that clients write to: with `reuse_port`, each worker has one for
    /// every address.
    #[must_use]
    pub fn listening_sockets(&self) -> usize {
        let addresses = self.listeners.iter().map(|listener| listener.bind.len());
        let for_each = if self.reuse_port {
            self.worker_count()
        } else {
            1
        };
        for_each * addresses.sum::<usize>()
    }
}

fn nowhere<T>(value: T) -> At<T> {
    At::new(0..0, value)
}

impl From<Flags> for File {
    fn from(flags: Flags) -> Self {
        let strings = |values: Vec<String>| nowhere(values.into_iter().map(nowhere).collect());
        let servers = flags.upstream.into_iter();
        let servers = servers.map(file::Server::at).map(nowhere).collect();
        Self {
            user: flags.user.map(nowhere),
            workers: flags.workers.map(nowhere),
            drain_timeout: None,
            reuse_port: None,
            peers: None,
            access_log: None,
            resolver: None,
            limits: file::Limits {
                max_sessions: flags.max_sessions.map(nowhere),
            },
            admin: flags.admin.map(|listen| file::Admin {
                listen: nowhere(listen),
            }),
            listener: vec![nowhere(file::Listener {
                name: None,
                bind: strings(flags.listen),
                upstream: nowhere("upstream".to_owned()),
                mode: flags.mode.map(nowhere),
                rewrite_on: flags.rewrite_on.map(nowhere),
                source_port: flags.source_port.map(nowhere),
                idle_timeout: flags.idle_timeout.map(nowhere),
                responses: flags.responses,
                requests: flags.requests,
                deny: None,
                per_client: None,
                amplification: None,
                allow: (!flags.allow.is_empty()).then(|| strings(flags.allow)),
                df: false,
                dscp: false,
                freebind: false,
                busy_poll: flags.busy_poll.map(nowhere),
                coalesce: flags.coalesce.map(nowhere),
            })],
            upstream: BTreeMap::from([(
                "upstream".to_owned(),
                nowhere(file::Upstream {
                    balance: flags.balance.map(nowhere),
                    hash_on: None,
                    hash_ipv6_prefix: None,
                    source: Vec::new(),
                    share_sockets: None,
                    slow_start: None,
                    lame_duck: None,
                    on_return: None,
                    header: file::Header::default(),
                    health: None,
                    servers,
                }),
            )]),
        }
    }
}
