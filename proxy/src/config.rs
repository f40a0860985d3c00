//! Configuration: TOML or flags, turned once into a [`Config`] in which everything is
//! valid and resolved. Nothing outside this module checks it again.

mod accept;
mod access_log;
mod admin_address;
mod bind;
mod error;
mod expand;
mod header;
mod health;
mod loops;
mod modes;
mod names;
mod options;
mod replies;
mod same_port;
mod secret;
mod sources;
#[cfg(test)]
mod tests;
mod token;
mod validate;
mod values;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use clap::Args;
use serde::Deserialize;

use crate::files;
use ppv2_engine::address::{PortRange, ServerAddr};
use ppv2_engine::listener::{Amplification, Rules};
use ppv2_engine::mode::Mode;
use ppv2_engine::own_tlvs::OwnTlvs;
use ppv2_engine::server::{Replies, Sources};
use ppv2_engine::snapshot::Pauses;

pub use accept::Accept;
pub use access_log::{AccessLog, LogField, LogTarget};
pub use admin_address::{AdminAddress, SocketPath};
pub use bind::Bind;
pub use error::{ConfigError, printable};
pub(crate) use expand::in_order;
pub use expand::{Answer, Answers, Expanded, MAX_ADDRESSES};
pub use health::{Expect, Header, Health, Passive, Probe};
pub use names::{Name, Named};
pub use options::{
    Admin, Config, Limits, Listener, LogFormat, PerClient, Resolver, Upgrade, Upstream,
};
pub use sources::FamilySources;
pub(crate) use sources::sessions_in;
pub(crate) use token::Token;
pub use values::{Network, Number, OnByDefault, Time};

/// The most bytes that a configuration has: some thousands of servers, at length.
const MAX_BYTES: u64 = 16 << 20;

/// A server of an upstream.
#[derive(Clone, Debug)]
pub struct Server {
    /// Name of the upstream.
    pub upstream: String,
    /// As it was written; its address if a name resolves to it.
    pub name: String,
    /// As it was resolved. Of several ports, with the first.
    pub address: ServerAddr,
    /// The ports that it listens on, if it is written to at the port that the client wrote to.
    pub ports: Option<PortRange>,
    /// The name that resolves to it, if it was not written itself.
    pub found_by: Option<Name>,
    /// What it is written to from.
    pub sources: Sources,
    /// How its replies find their client.
    pub replies: Replies,
    /// What headers to it carry besides.
    pub tlvs: Option<Arc<OwnTlvs>>,
    /// With headers in front of the first datagrams of a session alone: how long after it a
    /// header is sent again.
    pub repeat: Option<Duration>,
    /// Its share of the sessions beside the others'.
    pub weight: u16,
    /// Whether it only stands in for the others.
    pub backup: bool,
    /// Whether it gets no new sessions.
    pub drain: bool,
    /// Whether it is removed, and listeners have it only for the sessions that stay a
    /// while.
    pub leaving: bool,
    /// How long it takes to get its whole share of sessions once it comes, or comes
    /// back.
    pub slow_start: Duration,
    /// How long its sessions may stay when it is removed.
    pub lame_duck: Duration,
    /// How to find out whether it serves, if at all.
    pub health: Option<Arc<Health>>,
}

/// The options that `run` takes as flags: those of one listener and its upstream.
#[derive(Args, Clone, Debug, Default)]
pub struct Flags {
    #[command(flatten)]
    listener: Listener,
    /// Network of proxies whose datagrams begin with a PROXY v2 header; datagrams from elsewhere
    /// are dropped; repeatable [default: none, every byte is payload]
    #[arg(long, value_name = "NET", value_delimiter = ',')]
    accept_from: Vec<Network>,
    #[command(flatten)]
    upstream: Upstream,
    #[command(flatten)]
    config: Config,
}

impl Flags {
    /// The groups of flags, all of which a file replaces. clap leaves the groups of
    /// [`Config`] and of this type empty, since they have groups in them: their own flags are
    /// named one by one.
    pub const GROUPS: [&str; 7] = [
        "user",
        "workers",
        "accept_from",
        "Limits",
        "Admin",
        "Listener",
        "Upstream",
    ];
}

impl Config {
    /// Reads and checks a TOML file, and resolves the host names in it.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] with file, line, value and what to write instead.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let content = Self::read(path)?;
        Self::from_toml(&path.display().to_string(), &content)
    }

    fn read(path: &Path) -> Result<String, ConfigError> {
        files::read(path, MAX_BYTES).map_err(|error| {
            ConfigError::new(format!("{}: {error}", path.display()))
                .hint("--config takes the path of a readable TOML file of at most 16 MiB")
        })
    }

    /// The admin address in a TOML file. Nothing else of it is looked at and no name is
    /// resolved: the proxy may still run with what the file was before.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] if the file is no TOML, or its table `admin` has a mistake.
    pub fn admin_of_file(path: &Path) -> Result<Option<AdminAddress>, ConfigError> {
        #[derive(Deserialize)]
        struct AdminOnly {
            admin: Option<Admin>,
        }

        let (name, content) = (path.display().to_string(), Self::read(path)?);
        let file: AdminOnly = toml::from_str(&content)
            .map_err(|error| ConfigError::of_toml(&error, &name, &content))?;
        Ok(file.admin.map(|admin| admin.listen))
    }

    /// Checks the TOML text `content`; `name` is what errors call it.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] with file, line, value and what to write instead.
    pub fn from_toml(name: &str, content: &str) -> Result<Self, ConfigError> {
        let config: Self =
            toml::from_str(content).map_err(|error| ConfigError::of_toml(&error, name, content))?;
        let checked = validate::validate(config);
        checked.map_err(|error| error.located(name, content))
    }

    /// Checks the values of command line flags.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] with value and what to write instead.
    pub fn from_flags(flags: Flags) -> Result<Self, ConfigError> {
        let mut config = flags.config;
        config.listeners = vec![flags.listener];
        if !flags.accept_from.is_empty() {
            config.listeners[0].accept = Some(Accept::from_networks(flags.accept_from));
        }
        config.upstreams = BTreeMap::from([("upstream".to_owned(), flags.upstream)]);
        validate::validate(config)
    }

    /// The JSON Schema of the file: every key with its type, its range, its default and
    /// its description.
    #[must_use]
    pub fn schema() -> serde_json::Value {
        schemars::schema_for!(Self).to_value()
    }
}

impl Config {
    /// Single addresses of this host that sessions are sent from, by configuration.
    #[must_use]
    pub fn sources(&self) -> BTreeSet<IpAddr> {
        let of_servers = self.servers.iter().map(|server| &server.sources);
        let of_names = self.names.iter().flat_map(|named| named.sources.both());
        // The servers of an upstream share one list.
        let mut seen = BTreeSet::new();
        let lists = of_servers.chain(of_names).map(Sources::addresses);
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
        let workers = self.workers.map(|workers| *workers);
        workers.unwrap_or_else(|| *CORES.get_or_init(counted))
    }

    /// Where metrics and health are served.
    #[must_use]
    pub fn admin(&self) -> Option<&AdminAddress> {
        self.admin.as_ref().map(|admin| &admin.listen)
    }

    /// Where another process takes over from this one.
    #[must_use]
    pub fn upgrade_socket(&self) -> Option<&Path> {
        Some(self.upgrade.as_ref()?.socket.path())
    }

    /// The token that changes over HTTP need, if they need one.
    pub(crate) fn admin_token(&self) -> Option<&Token> {
        self.admin.as_ref()?.token.as_ref()
    }

    /// How workers spend their time between datagrams. A worker serves all listeners,
    /// so the longest that any of them asks for applies.
    #[must_use]
    pub fn pauses(&self) -> Pauses {
        let longest = |times: fn(&Listener) -> Duration| self.listeners.iter().map(times).max();
        Pauses {
            busy_poll: longest(|listener| *listener.busy_poll).unwrap_or_default(),
            coalesce: longest(|listener| *listener.coalesce).unwrap_or_default(),
        }
    }

    /// Whether listeners' sockets share their addresses (SO_REUSEPORT): those of several
    /// workers, and those beside sessions that write from their client's own port, which
    /// may be a listener's.
    #[must_use]
    pub fn shares_addresses(&self) -> bool {
        let mut modes = self.listeners.iter().flat_map(Listener::modes);
        self.reuse_port.0 && self.worker_count() > 1 || modes.any(Mode::spoofs_ports)
    }

    /// Sockets that clients write to: with `reuse_port`, each worker has one for
    /// every address.
    #[must_use]
    pub fn listening_sockets(&self) -> usize {
        let addresses = self.listeners.iter().map(Listener::address_count);
        self.sockets_of_address() * addresses.sum::<usize>()
    }

    /// Sockets that each address of a listener has.
    #[must_use]
    pub fn sockets_of_address(&self) -> usize {
        match self.reuse_port.0 {
            true => self.worker_count(),
            false => 1,
        }
    }

    /// All addresses of all listeners.
    pub fn addresses(&self) -> impl Iterator<Item = SocketAddr> + Clone {
        self.listeners.iter().flat_map(Listener::addresses)
    }
}

impl Listener {
    /// All addresses that clients write to.
    pub fn addresses(&self) -> impl Iterator<Item = SocketAddr> + Clone {
        self.bind.iter().copied().flat_map(Bind::addresses)
    }

    /// How many they are.
    #[must_use]
    pub fn address_count(&self) -> usize {
        self.bind.iter().map(|bind| bind.ports().count()).sum()
    }

    /// When its sessions end.
    #[must_use]
    pub fn rules(&self) -> Rules {
        use options::AmplificationAction::{Enforce, Off};
        let amplification = self.amplification.filter(|bound| bound.action != Off);
        Rules {
            idle_timeout: *self.idle_timeout,
            responses: self.responses,
            requests: self.requests,
            amplification: amplification.map(|bound| Amplification {
                limit: *bound.limit,
                enforce: bound.action == Enforce,
            }),
        }
    }
}

impl PerClient {
    /// Datagrams per second, and how many of them at once.
    #[must_use]
    pub fn rate(&self) -> Option<(u32, u32)> {
        let rate = self.rate?;
        Some((*rate, *self.burst.unwrap_or(rate)))
    }
}

impl Resolver {
    /// The longest pause after a failure.
    pub const MAX_RETRY: Duration = Duration::from_secs(60);

    /// The shortest time between two lookups of a name, whatever its TTL.
    #[must_use]
    pub fn min_ttl(&self) -> Duration {
        let usual = Duration::from_secs(5).min(*self.max_ttl);
        self.min_ttl.map_or(usual, |time| *time)
    }
}

impl Server {
    /// By what it is the same server in two configurations, besides its upstream: port 0
    /// stands for the port that each client wrote to, whichever there are.
    #[must_use]
    pub fn id(&self) -> ServerAddr {
        let mut address = self.address;
        if self.ports.is_some() {
            address.0.set_port(0);
        }
        address
    }

    /// Its address as it is shown, with all of its ports.
    #[must_use]
    pub fn shown_address(&self) -> String {
        let ports = self
            .ports
            .unwrap_or(PortRange::single(self.address.0.port()));
        Bind::new(self.address.0, ports).to_string()
    }

    /// Whether both have a port in common.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        let ports = |server: &Self| {
            let single = PortRange::single(server.address.0.port());
            server.ports.unwrap_or(single)
        };
        let ip = |server: &Self| server.address.0.ip();
        ip(self) == ip(other) && ports(self).overlaps(ports(other))
    }

    /// What of its settings is unlike most servers', in words.
    #[must_use]
    pub fn remarks(&self) -> Vec<String> {
        let weight = (self.weight != 1).then(|| format!("weight {}", self.weight));
        let backup = self.backup.then(|| "backup".to_owned());
        let drain = self.drain.then(|| "drain".to_owned());
        let port = self
            .ports
            .map(|_| "the client's destination port".to_owned());
        [port, weight, backup, drain]
            .into_iter()
            .flatten()
            .collect()
    }
}
