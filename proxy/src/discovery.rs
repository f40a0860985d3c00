//! Servers that are names: looked up when the proxy starts, and again when their TTLs are
//! over. If a lookup fails, the last answer stays. [`Config::expand`] turns answers into
//! servers, beside those that are written as addresses.

mod dns;
mod srv;
mod state;
mod status;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::task::JoinSet;

use crate::config::{self, Answers, Config, Name, Named};

use dns::{Dns, Resolver};
use srv::Srv;
use state::{Failure, Found, State};
pub use status::Status;

/// The most sockets that lookups have at a time.
pub(crate) const MAX_SOCKETS: usize = dns::MAX_SOCKETS;

/// Finds the servers behind a name.
trait Discovery {
    /// Looks the name up once, without memory of earlier lookups.
    fn discover(&self) -> impl Future<Output = Found> + Send;
}

impl Resolver {
    async fn discover(&self, name: &Name) -> Found {
        match name {
            Name::Dns { host, ports } => Dns(self, host, ports.first).discover().await,
            Name::Srv { name } => Srv(self, name).discover().await,
        }
    }
}

/// The names of the configuration in force. Their lookups end with the value.
pub struct Names {
    /// What is known now; another configuration can be prepared beside it.
    pub running: Running,
    tasks: BTreeMap<Name, JoinSet<()>>,
}

/// What the names in force resolve to, and the resolver that they are looked up with.
#[derive(Clone)]
pub struct Running {
    /// What is known of the names.
    pub status: Arc<Status>,
    resolver: Arc<Resolver>,
}

/// The names of a configuration that is not in force yet.
pub struct Candidate {
    /// The names that were looked up, because nothing was known of them.
    found: BTreeMap<Name, State>,
    resolver: Arc<Resolver>,
    /// What all names resolve to.
    pub answers: Answers,
}

impl Names {
    /// Looks up the names of `config`, for `patience` at most, and goes on in the
    /// background. Must be called within a tokio runtime.
    pub async fn start(config: &Config, patience: Duration) -> Self {
        let resolver = Arc::new(Resolver::new(config.resolver.clone()));
        let status = Arc::default();
        let running = Running { status, resolver };
        let Candidate { found, .. } = running.prepare(config, patience).await;
        let tasks = BTreeMap::new();
        let mut names = Self { running, tasks };
        names.follow(config, found);
        names
    }

    /// Follows the names of `config`, which is in force from now on, with the results of
    /// its candidate. Names that stay keep their last answers, even if the resolver
    /// changes and they are looked up again.
    pub fn adopt(&mut self, config: &Config, candidate: Candidate) {
        if self.running.resolver.settings != config.resolver {
            self.running.resolver = candidate.resolver;
            self.running.status.look_up_again();
            self.tasks.clear();
        }
        self.follow(config, candidate.found);
    }

    fn follow(&mut self, config: &Config, found: BTreeMap<Name, State>) {
        let wanted = names_of(config);
        self.running.status.reconfigure(&wanted, found);
        self.tasks.retain(|name, _| wanted.contains(name));
        for name in wanted {
            self.tasks.entry(name.clone()).or_insert_with(|| {
                let mut task = JoinSet::new();
                task.spawn(self.running.clone().keep_current(name.clone()));
                task
            });
        }
    }
}

impl Running {
    /// Looks up the names of another configuration that are new, or that never resolved
    /// while another resolver is asked now. Waits for `patience` at most. Nothing that is
    /// in force changes.
    pub async fn prepare(&self, config: &Config, patience: Duration) -> Candidate {
        let is_other = self.resolver.settings != config.resolver;
        let resolver = match is_other {
            true => Arc::new(self.resolver.beside(config.resolver.clone())),
            false => Arc::clone(&self.resolver),
        };
        let known = self.status.answers();
        let mut wanted = names_of(config);
        wanted.retain(|name| match is_other {
            true => !known.contains_key(*name),
            false => !self.status.has(name),
        });
        let mut found = look_up(&resolver, &wanted, patience).await;
        let mut answers = self.status.answers();
        for (name, state) in &mut found {
            state.log(name, Instant::now());
            if !state.answers.is_empty() {
                answers.insert(name.clone(), state.answers.clone());
            }
        }
        Candidate {
            found,
            resolver,
            answers,
        }
    }

    /// Looks `name` up whenever it is due, for as long as it is wanted.
    async fn keep_current(self, name: Name) {
        while let Some(due) = self.status.next_lookup(&name) {
            tokio::time::sleep_until(due.into()).await;
            let found = self.resolver.discover(&name).await;
            self.status.note(&name, found, &self.resolver.settings);
        }
    }
}

fn names_of(config: &Config) -> BTreeSet<&Name> {
    config.names.iter().map(|named| &named.name).collect()
}

/// Looks up each name once, for `patience` at most.
async fn look_up(
    resolver: &Resolver,
    names: &BTreeSet<&Name>,
    patience: Duration,
) -> BTreeMap<Name, State> {
    let lookups = names.iter().map(|name| async {
        let found = tokio::time::timeout(patience, resolver.discover(name)).await;
        let found = found.unwrap_or_else(|_| Found::failed(Failure::timeout(patience)));
        let mut state = State::default();
        state.note(found, &resolver.settings, Instant::now());
        ((*name).clone(), state)
    });
    join_all(lookups).await.into_iter().collect()
}

/// The result of looking up each name once.
#[derive(Clone, Debug, Default)]
pub struct Resolved {
    /// What the names resolve to.
    pub answers: Answers,
    /// Why names don't resolve, or only in part.
    pub failures: BTreeMap<Name, String>,
}

impl Resolved {
    /// A line for each name of `config` that failed.
    #[must_use]
    pub fn remarks(&self, config: &Config) -> Vec<String> {
        let remark = |Named { server, name, .. }: &Named| {
            let upstream = &server.upstream;
            let why = self.failures.get(name)?;
            let how = match self.answers.contains_key(name) {
                true => "resolves only in part",
                false => "does not resolve",
            };
            Some(format!(
                "upstream `{upstream}`: `{name}` {how}: {why}; `run` goes on asking"
            ))
        };
        config.names.iter().filter_map(remark).collect()
    }
}

/// Looks up each name of `config` once. Must not be called within a tokio runtime.
#[must_use]
pub fn resolve_once(config: &Config) -> Resolved {
    let (mut resolved, names) = (Resolved::default(), names_of(config));
    if names.is_empty() {
        return resolved;
    }
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let states = match runtime.enable_all().build() {
        Ok(runtime) => {
            let resolver = Resolver::new(config.resolver.clone());
            runtime.block_on(look_up(&resolver, &names, Duration::MAX))
        }
        Err(error) => {
            let failed = |name: &&Name| ((*name).clone(), error.to_string());
            resolved.failures = names.iter().map(failed).collect();
            return resolved;
        }
    };
    for (name, state) in states {
        if let Some(why) = state.failing {
            resolved.failures.insert(name.clone(), why);
        }
        if !state.answers.is_empty() {
            resolved.answers.insert(name, state.answers);
        }
    }
    resolved
}
