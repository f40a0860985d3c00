//! What is in force: one configuration after the other, how servers stand, and what
//! workers have been told of both.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::spawn_blocking;

use super::crew::Crew;
use super::leaving::Leaving;
use super::network::{Network, Told};
use super::reload::{self, Beside, FIRST_ANSWERS, Ready, Reloads};
use super::settings::settings;
use super::setups::{Log, Setups, bound, counted};
use super::{RunError, bind, plans};
use crate::access_log::Unlogged;
use crate::admin::{ReloadRequest, WorkerHandle};
use crate::config::{Config, Expanded};
use crate::discovery::{self, Names};
use crate::health::{Health, Status};
use crate::limits::Ceiling;
use crate::metrics::Metrics;
use crate::roster::{Roll, Roster};
use crate::topology;
use ppv2_engine::counters::WorkerCounters;
use ppv2_engine::session::Budget;
use ppv2_engine::upstream::Steering;
use ppv2_engine::worker::{Change, Command, ListenerSettings, Share};
use ppv2_udp::Socket;

/// The time between two plans, whatever servers do: building one takes up to 50 ms.
const PLAN_PAUSE: Duration = Duration::from_millis(100);

/// How long to say nothing more of what names lead to.
const REMARK_PAUSE: Duration = Duration::from_secs(60);

/// How long after what can't fail has failed to try again.
const RETRY: Duration = Duration::from_secs(1);

/// The running proxy, as the control path has it.
pub(super) struct Control {
    /// What the configuration was read from.
    file: Option<PathBuf>,
    /// The configuration as it was read.
    written: Config,
    names: Names,
    /// What was said of what names lead to, and not before when more is.
    remarks: Vec<String>,
    remark_after: Option<Instant>,
    roster: Roster,
    /// The configuration in force, with what names lead to and what is leaving.
    roll: Arc<Roll>,
    leaving: Leaving,
    /// Addresses that no listener has any more: the number of the one that had it
    /// last, and when their sessions end.
    closing: BTreeMap<SocketAddr, (usize, Instant)>,
    /// Numbers of listeners that have no socket in any worker any more.
    closed: BTreeSet<usize>,
    /// By number of the listener.
    settings: Vec<Arc<ListenerSettings>>,
    /// By worker.
    counters: Vec<Arc<WorkerCounters>>,
    steering: Arc<Steering>,
    /// When to plan anew, and not before when.
    plan_at: Option<Instant>,
    plan_after: Instant,
    /// When to go by what names lead to now.
    expand_at: Option<Instant>,
    ceiling: Ceiling,
    metrics: Arc<Metrics>,
    health: Health,
    network: Network,
    log: Option<Log>,
    crew: Crew,
    reloads: Reloads,
}

/// What has to be seen to at once.
pub(super) enum Event {
    /// A worker ended by itself.
    Failed(RunError),
    /// A configuration is ready, or can't be gone by.
    Ready(Box<Result<Ready, String>>),
    /// Addresses or routes of this host have changed.
    Network(Told),
}

impl Control {
    /// Binds all addresses and starts the workers, after names have had a moment to
    /// be resolved.
    pub(super) async fn start(written: Config, file: Option<PathBuf>) -> Result<Self, RunError> {
        let names = Names::start(&written, FIRST_ANSWERS).await;
        topology::check_host(&written)?;
        let Expanded { config, remarks } = reload::expand(&written, names.answers())
            .await
            .map_err(io::Error::other)?;
        let ceiling = Ceiling::of(&config);
        let warnings = config.warnings.iter().chain(&remarks);
        for warning in warnings.chain(&ceiling.shortfall()) {
            tracing::warn!("{warning}");
        }
        let now = Instant::now();
        bind::probe_sources(&config, Duration::ZERO)?;
        let network = Network::watch(&config).await;
        let mut sockets = bind::listeners(&config, &BTreeSet::new())?;
        let wanted = config.access_log.clone();
        let unlogged = Unlogged::default();
        let opened = spawn_blocking({
            let unlogged = Arc::clone(&unlogged);
            move || wanted.map(|log| Log::open(&log, &unlogged)).transpose()
        });
        let log = opened.await.map_err(io::Error::other)??;
        let mut roster = Roster::default();
        let roll = Arc::new(roster.enroll(config));
        let (listeners, servers) = roll.counts;
        let counters: Vec<_> = (0..sockets.len())
            .map(|_| Arc::new(WorkerCounters::new(listeners, servers)))
            .collect();
        let budget = Budget::new(ceiling.max_sessions, ceiling.max_sockets);
        let counted = counted(&roster, &counters);
        let metrics = Arc::new(Metrics::new(counted, Arc::clone(&budget), unlogged));
        let mut health = Health::new(Arc::clone(&metrics));
        health.reconfigure(&roll, now);
        let standings = health.status().standings(&roll, now);
        let steering = Arc::new(plans::steer(&roll, &standings, 0));
        let settings = settings(&roll, None);
        let setups = Setups {
            roll: &roll,
            settings: &settings,
            counters: &counters,
            steering: &steering,
            log: log.as_ref(),
        };
        let bound = bound(&roll);
        let claims = Arc::default();
        let crew = Crew::start(sockets.len(), |number, commands| {
            let sockets = std::mem::take(&mut sockets[number]);
            let entrance = |socket: Socket| {
                let listener = bound[&socket.bound()];
                (socket, listener)
            };
            Share {
                number,
                entrances: sockets.into_iter().map(entrance).collect(),
                setup: setups.of(number),
                budget: Arc::clone(&budget),
                claims: Arc::clone(&claims),
                commands,
            }
        })?;
        let wrong = network.wrong_interfaces();
        if !wrong.is_empty() {
            crew.tell_all(|| Command::FollowNetwork(Arc::clone(&wrong)));
        }
        Ok(Self {
            file,
            written,
            names,
            remarks,
            remark_after: None,
            roster,
            roll,
            leaving: Leaving::default(),
            closing: BTreeMap::new(),
            closed: BTreeSet::new(),
            settings,
            counters,
            steering,
            plan_at: None,
            plan_after: now,
            expand_at: None,
            ceiling,
            metrics,
            health,
            network,
            log,
            crew,
            reloads: Reloads::default(),
        })
    }

    pub(super) fn config(&self) -> &Config {
        &self.roll.config
    }

    pub(super) fn metrics(&self) -> Arc<Metrics> {
        Arc::clone(&self.metrics)
    }

    pub(super) fn status(&self) -> Arc<Status> {
        self.health.status()
    }

    pub(super) fn ceiling(&self) -> Ceiling {
        self.ceiling
    }

    pub(super) fn names(&self) -> Arc<discovery::Status> {
        self.names.status()
    }

    pub(super) fn workers(&self) -> Vec<WorkerHandle> {
        self.crew.workers.clone()
    }

    /// Waits for what has to be seen to at once. Nothing is lost if the future is
    /// dropped.
    pub(super) async fn event(&mut self) -> Event {
        tokio::select! {
            failure = self.crew.failure() => Event::Failed(failure),
            ready = self.reloads.ready() => Event::Ready(Box::new(ready)),
            told = self.network.changed() => Event::Network(told),
        }
    }

    /// Has the access log opened anew and the configuration read again.
    pub(super) fn hang_up(&mut self) {
        if let Some(log) = &self.log {
            log.writer.reopen();
        }
        self.reload(None);
    }

    /// Has the configuration read again. Whoever asked is told what came of it, as
    /// the log is. All goes on meanwhile.
    pub(super) fn reload(&mut self, asker: Option<ReloadRequest>) {
        if self.reloads.ask(asker) {
            self.begin_reload();
        }
    }

    fn begin_reload(&mut self) {
        self.reloads.begin(reload::make_ready(Beside {
            file: self.file.clone(),
            roll: Arc::clone(&self.roll),
            held: self.held(),
            names: self.names.running(),
            log: self.log.as_ref().map(|log| log.of.clone()),
            unlogged: Arc::clone(&self.metrics.unlogged),
        }));
    }

    /// Goes by the configuration that was made ready. If anything is wrong with it,
    /// nothing changes.
    pub(super) async fn end_reload(&mut self, ready: Result<Ready, String>) {
        let outcome = match ready {
            Ok(ready) => self.adopt(ready).await,
            Err(why) => Err(why),
        };
        match &outcome {
            Ok(news) => tracing::info!("reloaded: {news}"),
            Err(why) => tracing::error!("not reloaded, nothing has changed: {why}"),
        }
        if self.reloads.end(&outcome) {
            self.begin_reload();
        }
    }

    async fn adopt(&mut self, ready: Ready) -> Result<String, String> {
        let Ready {
            written,
            candidate,
            expanded: Expanded { config, remarks },
            log,
        } = ready;
        if let Some(upstream) = reload::without_servers(&self.roll.config, &config) {
            return Err(format!(
                "no name in upstream `{upstream}` leads to a server; mend them, or ask again when they do"
            ));
        }
        let before = Arc::clone(&self.roll);
        let warnings = config.warnings.clone();
        self.apply(config, log)
            .await
            .map_err(|error| error.to_string())?;
        let shortfall = self.ceiling.shortfall();
        for warning in warnings.iter().chain(&remarks).chain(&shortfall) {
            tracing::warn!("{warning}");
        }
        self.remarks = remarks;
        self.names.adopt(&written, candidate);
        self.written = written;
        // Names may lead elsewhere since.
        self.expand_soon(Instant::now());
        Ok(reload::news(&before.config, &self.roll.config))
    }

    /// Has workers told of what names lead to, but not too often.
    pub(super) fn expand_soon(&mut self, now: Instant) {
        self.expand_at = Some(now.max(self.plan_after));
    }

    /// Goes by what names lead to now, and lets go who has been leaving for long
    /// enough.
    async fn expand(&mut self, now: Instant) {
        self.expand_at = None;
        let expanded = reload::expand(&self.written, self.names.answers()).await;
        let applied = match expanded {
            Ok(Expanded { config, remarks }) => {
                self.remark(remarks, now);
                let applied = self.apply(config, None).await;
                applied.map_err(|error| error.to_string())
            }
            Err(error) => Err(error),
        };
        if let Err(error) = applied {
            tracing::error!("can't go by what names lead to now: {error}");
            self.leaving.postpone(now + RETRY);
            self.expand_at = Some(now + RETRY);
        }
    }

    /// Tells what is new of what names lead to, and not more than DNS may have told
    /// once a minute.
    fn remark(&mut self, remarks: Vec<String>, now: Instant) {
        self.remarks.retain(|remark| remarks.contains(remark));
        if self.remark_after.is_some_and(|after| now < after) {
            return;
        }
        for remark in &remarks {
            if !self.remarks.contains(remark) {
                tracing::warn!("{remark}");
                self.remark_after = Some(now + REMARK_PAUSE);
            }
        }
        self.remarks = remarks;
    }

    /// Addresses that this process has sockets for.
    fn held(&self) -> BTreeSet<SocketAddr> {
        let bound = self.roll.config.listeners.iter();
        let bound = bound.flat_map(|listener| listener.bind.iter().copied());
        bound.chain(self.closing.keys().copied()).collect()
    }

    /// Goes by `config` from now on, with this access log if it is another; if that
    /// fails, by what was in force before.
    async fn apply(&mut self, mut config: Config, log: Option<Log>) -> Result<(), RunError> {
        let now = Instant::now();
        // Whatever can fail comes first.
        let mut sockets = bind::listeners(&config, &self.held())?;
        self.log = match config.access_log {
            Some(_) => log.or(self.log.take()),
            None => None,
        };

        let ceiling = Ceiling::of(&config);
        self.metrics
            .budget
            .resize(ceiling.max_sessions, ceiling.max_sockets);
        self.ceiling = ceiling;
        self.closed.clear();
        self.close_later(&config, now);
        self.leaving.follow(&mut config, Some(&self.roll), now);
        let roll = Arc::new(self.roster.enroll(config));
        self.settings = settings(&roll, Some((&self.roll, &self.settings)));
        self.let_go_of_listeners(&roll);
        let grown = |counters: &Arc<WorkerCounters>| {
            Arc::new(counters.with(roll.counts, &roll.listeners_anew, &roll.anew))
        };
        self.counters = self.counters.iter().map(grown).collect();
        self.roll = roll;
        self.count();
        self.health.reconfigure(&self.roll, now);
        if self.network.follow(&self.roll.config).await {
            self.tell_network();
        }
        self.plan().await;

        let (setups, bound) = (self.setups(), bound(&self.roll));
        let change = |number: usize, done| {
            Command::Follow(Box::new(Change {
                setup: setups.of(number),
                bound: bound.clone(),
                entrances: std::mem::take(&mut sockets[number]),
                done,
            }))
        };
        if self.crew.tell_and_wait(change).await {
            // They were told to close what is not held before.
            let held = self.held_listeners(&self.roll);
            self.closed = (0..self.roll.counts.0).collect();
            self.closed.retain(|number| !held.contains(number));
        } else {
            tracing::warn!("a worker is busy, and goes by the configuration as soon as it is not");
        }
        Ok(())
    }

    /// Notes addresses that `config` has no listener for, and forgets those that it
    /// has.
    fn close_later(&mut self, config: &Config, now: Instant) {
        let wanted: BTreeSet<_> = config.listeners.iter().flat_map(|l| &l.bind).collect();
        self.closing.retain(|address, _| !wanted.contains(address));
        let until = now + *self.roll.config.drain_timeout;
        for (address, number) in bound(&self.roll) {
            if !wanted.contains(&address) {
                self.closing.insert(address, (number, until));
            }
        }
    }

    /// Lets go of what listeners hold that are gone and have no sessions any more.
    fn let_go_of_listeners(&mut self, roll: &Roll) {
        let held = self.held_listeners(roll);
        for (number, settings) in self.settings.iter_mut().enumerate() {
            if !held.contains(&number) && !settings.servers.is_empty() {
                *settings = Arc::new(settings.emptied());
            }
        }
    }

    /// The numbers of listeners that have sockets.
    fn held_listeners(&self, roll: &Roll) -> BTreeSet<usize> {
        let closing = self.closing.values().map(|(number, _)| *number);
        roll.listeners.iter().copied().chain(closing).collect()
    }

    /// The numbers of listeners that are gone and have no sessions any more: what is
    /// counted of them doesn't change again, and was not forgotten yet.
    pub(super) fn gone_listeners(&self) -> Vec<usize> {
        let shown = self.metrics.counted();
        let has_sessions = |number: usize| {
            let counters = self.counters.iter().map(|worker| &worker.listeners[number]);
            counters.map(|counters| counters.sessions()).sum::<u64>() > 0
        };
        let gone = shown.listeners().map(|(number, _)| number);
        gone.filter(|number| self.closed.contains(number) && !has_sessions(*number))
            .collect()
    }

    fn setups(&self) -> Setups<'_> {
        Setups {
            roll: &self.roll,
            settings: &self.settings,
            counters: &self.counters,
            steering: &self.steering,
            log: self.log.as_ref(),
        }
    }

    fn count(&self) {
        self.metrics.follow(counted(&self.roster, &self.counters));
    }

    /// Stops counting these listeners, and servers that nobody goes by any more.
    pub(super) fn forget_gone(&mut self, listeners: &[usize], now: Instant) {
        for number in listeners {
            self.roster.forget_listener(*number, now);
        }
        let servers = self.metrics.counted().servers().count();
        if !listeners.is_empty() || servers > self.roll.servers.len() {
            self.count();
        }
    }

    /// Has workers told of how servers stand, but not too often.
    pub(super) fn plan_soon(&mut self, now: Instant) {
        self.plan_at = Some(now.max(self.plan_after));
    }

    /// Looks at what has changed of the network, and has sessions follow.
    pub(super) async fn look(&mut self, told: Told) {
        if self.network.look(told, &self.roll.config).await {
            self.tell_network();
        }
    }

    fn tell_network(&self) {
        let wrong = self.network.wrong_interfaces();
        let command = || Command::FollowNetwork(Arc::clone(&wrong));
        self.crew.tell_all(command);
    }

    /// Plans where sessions go, as servers stand now.
    async fn plan(&mut self) {
        let now = Instant::now();
        let (roll, version) = (Arc::clone(&self.roll), self.steering.version + 1);
        let standings = self.health.status().standings(&roll, now);
        let made = spawn_blocking(move || plans::steer(&roll, &standings, version));
        // It fails only where the runtime is ending.
        if let Ok(steering) = made.await {
            self.steering = Arc::new(steering);
        }
        self.plan_after = Instant::now() + PLAN_PAUSE;
        let step = self.health.status().next_step(now);
        self.plan_at = step.map(|step| step.max(self.plan_after));
    }

    /// When [`meet_deadlines`](Self::meet_deadlines) has something to do.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let closing = self.closing.values().map(|(_, until)| *until).min();
        let all = [self.plan_at, self.expand_at, self.leaving.next(), closing];
        all.into_iter().flatten().min()
    }

    /// Does what is due.
    pub(super) async fn meet_deadlines(&mut self, now: Instant) {
        let is_due = |until: &Instant| *until <= now;
        let closing = self.closing.iter();
        let due = closing.filter(|(_, (_, until))| is_due(until));
        let due: Vec<_> = due.map(|(address, _)| *address).collect();
        self.closing.retain(|_, (_, until)| !is_due(until));
        if !due.is_empty() {
            self.crew.tell_all(|| Command::Close(due.clone()));
            tracing::info!(addresses = ?due, "closed");
            // So that their listeners are let go of.
            self.expand_at = Some(now);
        }
        let leaves = self.leaving.next();
        if [leaves, self.expand_at].iter().flatten().any(is_due) {
            self.expand(now).await;
        } else if self.plan_at.as_ref().is_some_and(is_due) {
            self.plan().await;
            self.crew
                .tell_all(|| Command::Steer(Arc::clone(&self.steering)));
        }
    }

    /// Lets replies in flight out, for as long as `drain_timeout` or until
    /// `hurried`, and ends the workers.
    pub(super) async fn stop(mut self, hurried: impl Future<Output = ()>) -> Result<(), RunError> {
        let drain_timeout = *self.roll.config.drain_timeout;
        tracing::info!(
            sessions = self.metrics.budget.taken(),
            ?drain_timeout,
            "stopping: no more datagrams are taken, replies in flight are let out"
        );
        self.crew.tell_all(|| Command::Drain);
        let result = tokio::select! {
            result = self.crew.all_ended() => result,
            () = tokio::time::sleep(drain_timeout) => {
                tracing::warn!("some replies did not come within {drain_timeout:?}");
                Ok(())
            }
            () = hurried => Ok(()),
        };
        self.end();
        result
    }

    /// Ends the workers, and lets out what they had to tell of their sessions.
    pub(super) fn end(mut self) {
        self.crew.tell_all(|| Command::Stop);
        if let Some(Log { writer, sender, .. }) = self.log.take() {
            drop(sender);
            writer.finish();
        }
    }
}
