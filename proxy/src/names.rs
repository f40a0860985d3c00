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

use crate::config::{Answers, Config, Name};

use ask::Source;
pub use board::Board;
use state::State;

/// The most descriptors that lookups take at a time.
pub(crate) const MAX_SOCKETS: usize = ask::MAX_SOCKETS;

/// The running lookups, one for each name. They end with the value.
pub struct Names {
    board: Arc<Board>,
    source: Arc<Source>,
    asking: BTreeMap<Name, AbortHandle>,
    tasks: JoinSet<()>,
}

/// The names that run, as others may know them.
#[derive(Clone)]
pub struct Running {
    board: Arc<Board>,
    source: Arc<Source>,
}

/// The names of a configuration that does not hold yet, looked up beside those of the
/// one that does, which is not touched. The lookups end with the value.
pub struct Candidate {
    /// Those alone that nothing is known of.
    names: Names,
    beside: Arc<Board>,
    /// When they have been waited for long enough.
    until: Instant,
}

impl Names {
    /// Begins to look up the names of `config`. Must be called within a tokio
    /// runtime.
    #[must_use]
    pub fn start(config: &Config) -> Self {
        let mut names = Self::of(Source::new(config.resolver.clone()));
        names.look_up(names_of(config));
        names
    }

    fn of(source: Source) -> Self {
        Self {
            board: Arc::default(),
            source: Arc::new(source),
            asking: BTreeMap::new(),
            tasks: JoinSet::new(),
        }
    }

    /// What is known by now and whom it is asked of, for those who look up the names
    /// of another configuration.
    #[must_use]
    pub fn running(&self) -> Running {
        Running {
            board: Arc::clone(&self.board),
            source: Arc::clone(&self.source),
        }
    }

    /// Goes on with the names of `config`, which holds from now on, with what its
    /// candidate has found out, and asks as it says. Lookups of names that stay go on
    /// as they are, unless others are to be asked or at other times; even then the last
    /// answers stand. Nobody is told of names that went: the caller knows.
    pub fn adopt(&mut self, config: &Config, candidate: Candidate) {
        if self.source.asks_others(config) {
            self.source = Arc::clone(&candidate.names.source);
            self.tasks.abort_all();
            self.asking.clear();
            self.board.ask_anew();
        }
        self.board.absorb(&candidate.names.board);
        self.look_up(names_of(config));
    }

    /// Has these names looked up and no others.
    fn look_up(&mut self, wanted: BTreeSet<&Name>) {
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

impl Running {
    /// Begins to look up those names of another configuration that are new, or have
    /// led nowhere yet while others are to be asked; to be waited for as long as
    /// `patience`. Nothing changes here. Must be called within a tokio runtime.
    #[must_use]
    pub fn candidate(&self, config: &Config, patience: Duration) -> Candidate {
        let (known, others) = (self.board.answers(), self.source.asks_others(config));
        let mut wanted = names_of(config);
        wanted.retain(|name| match others {
            true => !known.contains_key(*name),
            false => !self.board.has(name),
        });
        let mut names = Names::of(self.source.beside(config.resolver.clone()));
        names.look_up(wanted);
        Candidate {
            names,
            beside: Arc::clone(&self.board),
            until: Instant::now() + patience,
        }
    }
}

impl Candidate {
    /// Waits until each name has been asked for once, with or without success, or has
    /// been waited for long enough. Nothing is lost if the future is dropped.
    pub async fn ready(&self) {
        let all_asked = self.names.board.all_asked();
        let _ = tokio::time::timeout_at(self.until.into(), all_asked).await;
    }

    /// What the names lead to by now: those that run by what is known there, unless
    /// this has found out what they lead to.
    #[must_use]
    pub fn answers(&self) -> Answers {
        let mut answers = self.beside.answers();
        answers.extend(self.names.answers());
        answers
    }
}

fn names_of(config: &Config) -> BTreeSet<&Name> {
    config.names.iter().map(|named| &named.name).collect()
}

async fn keep_asking(name: Name, source: Arc<Source>, board: Arc<Board>) {
    if let Some(at) = board.ask_at(&name) {
        tokio::time::sleep_until(at.into()).await;
    }
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
    let names: Vec<_> = names_of(config).into_iter().cloned().collect();
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
