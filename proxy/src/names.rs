//! Servers that are names: looks them up when the proxy starts and again as often
//! as their TTLs ask, and tells when the answers have changed. Whatever DNS says or
//! fails to say, the last answer stands until there is another. What servers an
//! answer comes to is for [`Config::expand`] to say; what becomes of sessions, for
//! others.

mod ask;
mod board;
mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::{AbortHandle, JoinSet};

use crate::config::{Answers, Config, Name, Resolver};

use ask::Source;
pub use board::Board;
use state::State;

/// The most descriptors that lookups take at a time.
pub(crate) const MAX_SOCKETS: usize = ask::MAX_SOCKETS;

/// The running lookups, one for each name. They end with the value.
pub struct Names {
    board: Arc<Board>,
    resolver: Resolver,
    source: Arc<Source>,
    asking: BTreeMap<Name, AbortHandle>,
    tasks: JoinSet<()>,
}

impl Names {
    /// Begins to look up the names of `config`. Must be called within a tokio
    /// runtime.
    #[must_use]
    pub fn start(config: &Config) -> Self {
        let mut names = Self {
            board: Arc::default(),
            resolver: config.resolver.clone(),
            source: Arc::new(Source::new(config.resolver.clone())),
            asking: BTreeMap::new(),
            tasks: JoinSet::new(),
        };
        names.follow(&[config]);
        names
    }

    /// Goes on with the names of other configurations, and asks as the last of them
    /// says. Lookups of those that stay go on as they are, unless others are to be
    /// asked or at other times; even then the last answers stand. Nobody is told of
    /// names that went: the caller knows.
    pub fn follow(&mut self, configs: &[&Config]) {
        let names = configs.iter().flat_map(|config| &config.names);
        let wanted: BTreeSet<_> = names.map(|named| &named.name).collect();
        if let Some(config) = configs.last()
            && self.resolver != config.resolver
        {
            self.resolver = config.resolver.clone();
            self.source = Arc::new(Source::new(config.resolver.clone()));
            self.tasks.abort_all();
            self.asking.clear();
        }
        self.asking.retain(|name, task| {
            let stays = wanted.contains(name);
            if !stays {
                task.abort();
            }
            stays
        });
        // What has ended is let go of.
        while self.tasks.try_join_next().is_some() {}
        self.board.follow(&wanted);
        for name in wanted {
            if !self.asking.contains_key(name) {
                let (board, source) = (Arc::clone(&self.board), Arc::clone(&self.source));
                let task = self.tasks.spawn(keep_asking(name.clone(), source, board));
                self.asking.insert(name.clone(), task);
            }
        }
    }

    /// What the names lead to by now. One that has never resolved is not among them.
    #[must_use]
    pub fn answers(&self) -> Answers {
        self.board.answers()
    }

    /// Waits until an answer has changed since this last returned. Nothing is lost if
    /// the future is dropped, as `select!` does; one caller at a time is told.
    pub async fn changed(&self) {
        self.board.changed().await;
    }

    /// Waits until each name has been asked for once, with or without success, but
    /// for no longer than `patience`.
    pub async fn first(&self, patience: Duration) {
        let _ = tokio::time::timeout(patience, self.board.all_asked()).await;
    }

    /// What is known of the names, for metrics.
    #[must_use]
    pub fn board(&self) -> Arc<Board> {
        Arc::clone(&self.board)
    }
}

async fn keep_asking(name: Name, source: Arc<Source>, board: Arc<Board>) {
    loop {
        let asked = source.ask(&name).await;
        let pause = board.note(&name, asked, source.settings(), Instant::now());
        tokio::time::sleep(pause).await;
    }
}

/// What came of looking up each name once.
#[derive(Clone, Debug, Default)]
pub struct Resolved {
    /// What they lead to.
    pub answers: Answers,
    /// Why names don't resolve, or in part alone.
    pub failures: BTreeMap<Name, String>,
}

impl Resolved {
    /// What there is to tell of `config`, a line for each name that failed.
    #[must_use]
    pub fn remarks(&self, config: &Config) -> Vec<String> {
        let remark = |named: &crate::config::Named| {
            let (upstream, name) = (&named.upstream, &named.name);
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

/// Looks up each name of `config` once, and waits for that as long as its resolver's
/// settings allow. Without names nothing is done. Must not be called within a tokio
/// runtime; makes no thread.
#[must_use]
pub fn resolve_once(config: &Config) -> Resolved {
    let names: BTreeSet<_> = config
        .names
        .iter()
        .map(|named| named.name.clone())
        .collect();
    if names.is_empty() {
        return Resolved::default();
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            let failures = names.into_iter().map(|name| (name, error.to_string()));
            return Resolved {
                failures: failures.collect(),
                ..Resolved::default()
            };
        }
    };
    let source = Arc::new(Source::new(config.resolver.clone()));
    let asked = runtime.block_on(async {
        let mut tasks = JoinSet::new();
        for name in names {
            let source = Arc::clone(&source);
            tasks.spawn(async move {
                let asked = source.ask(&name).await;
                (name, asked)
            });
        }
        tasks.join_all().await
    });
    let mut resolved = Resolved::default();
    for (name, asked) in asked {
        let mut state = State::default();
        state.note(asked, &config.resolver, Instant::now());
        resolved
            .failures
            .extend(state.failing().map(|why| (name.clone(), why.to_owned())));
        if !state.answers().is_empty() {
            resolved.answers.insert(name, state.answers().to_vec());
        }
    }
    resolved
}
