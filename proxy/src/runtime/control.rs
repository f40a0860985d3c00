//! What is in force: one configuration after the other, how servers stand, and what
//! workers have been told of both.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{self, unbounded_channel};
use tokio::task::spawn_blocking;

use super::handover::{self, Ask, Giver, Offer, Taking};
use super::inherited::Inherited;
use super::lame_duck::LameDucks;
use super::network::{Network, Told};
use super::reload::{self, Beside, FIRST_ANSWERS, Ready, Reloads};
use super::routing::routing;
use super::snapshot::{Log, rerouted, snapshot};
use super::workers::Workers;
use super::{RunError, bind};
use crate::access_log::Unlogged;
use crate::admin::{ReloadRequest, WorkerHandle};
use crate::capacity::HostCapacity;
use crate::config::{Bind, Config, Expanded};
use crate::discovery::{self, Names};
use crate::health::{Health, Standing, Status};
use crate::metrics::{Counted, Metrics};
use crate::registry::{ActiveConfig, Registry};
use crate::topology;
use ppv2_engine::address::ServerAddr;
use ppv2_engine::capacity::Capacity;
use ppv2_engine::client_ports::ClientPorts;
use ppv2_engine::counters::WorkerCounters;
use ppv2_engine::handover::ServerState;
use ppv2_engine::listener::Listener;
use ppv2_engine::snapshot::{Routing, Snapshot};
use ppv2_engine::upstream::State;
use ppv2_engine::worker::{Command, Reconfiguration, WorkerSetup};
use ppv2_udp::Socket;

/// The time between two looks at where sessions go, whatever servers do: building a plan
/// takes up to 50 ms.
const ROUTE_PAUSE: Duration = Duration::from_millis(100);

/// How long to say nothing more of what names lead to.
const REMARK_PAUSE: Duration = Duration::from_secs(60);

/// How long after what can't fail has failed to try again.
const RETRY: Duration = Duration::from_secs(1);

/// The running proxy, as the control path has it.
pub(super) struct Control {
    /// What the configuration was read from.
    file: Option<PathBuf>,
    /// Sockets that listeners have, or come back to.
    inherited: Inherited,
    /// The configuration as it was read.
    written: Config,
    names: Names,
    /// What was said of what names lead to, and not before when more is.
    remarks: Vec<String>,
    remark_after: Option<Instant>,
    registry: Registry,
    /// The configuration in force, with what names lead to and what is leaving.
    active: Arc<ActiveConfig>,
    lame_ducks: LameDucks,
    /// Addresses that no listener has any more, and when their sessions end.
    closing: BTreeMap<SocketAddr, Instant>,
    /// Ports of source networks that workers send or once sent from, and which worker did.
    source_ports: BTreeMap<SocketAddr, usize>,
    /// What workers obey.
    snapshot: Arc<Snapshot>,
    /// Servers, by their ids, that are down.
    down: BTreeSet<u64>,
    /// When to find out where sessions go, and not before when.
    route_at: Option<Instant>,
    route_after: Instant,
    /// When to find out where names lead to now.
    expand_at: Option<Instant>,
    host_capacity: HostCapacity,
    metrics: Arc<Metrics>,
    health: Health,
    network: Network,
    log: Option<Log>,
    workers: Workers,
    client_ports: Arc<ClientPorts>,
    reloads: Reloads,
    /// How many were applied.
    reloaded: u64,
}

/// What has to be seen to at once.
pub(super) enum Event {
    /// A worker ended by itself.
    Failed(RunError),
    /// A configuration is ready, or has a mistake.
    Ready(Box<Result<Ready, String>>),
    /// Addresses or routes of this host have changed.
    Network(Told),
}

impl Control {
    /// Binds all addresses and starts the workers, after names have had a moment to
    /// be resolved. Addresses that another process is to hand over are left to it.
    pub(super) async fn start(
        written: Config,
        file: Option<PathBuf>,
        inherited: Inherited,
        other: Option<&Taking>,
    ) -> Result<Self, RunError> {
        let names = Names::start(&written, FIRST_ANSWERS).await;
        topology::check_host(&written)?;
        let Expanded { config, remarks } = reload::expand(&written, names.running.status.answers())
            .await
            .map_err(io::Error::other)?;
        let host_capacity = HostCapacity::of(&config);
        let warnings = config.warnings.iter().chain(&remarks);
        for warning in warnings.chain(&host_capacity.shortfall()) {
            tracing::warn!("{warning}");
        }
        let now = Instant::now();
        bind::probe_sources(&config, Duration::ZERO)?;
        let network = Network::watch(&config).await;
        let held = other.map(Taking::addresses).unwrap_or_default();
        let mut sockets = bind::listeners(&config, &held, &inherited)?;
        let wanted = config.access_log.clone();
        let unlogged = Unlogged::default();
        let opened = spawn_blocking({
            let unlogged = Arc::clone(&unlogged);
            move || {
                wanted
                    .map(|log| Log::open(&log, &unlogged, true))
                    .transpose()
            }
        });
        let log = opened.await.map_err(io::Error::other)??;
        let mut registry = Registry::new(sockets.len());
        let active = Arc::new(registry.activate(config));
        let counters: Vec<Arc<WorkerCounters>> =
            (0..sockets.len()).map(|_| Arc::default()).collect();
        let capacity = Capacity::new(host_capacity.max_sessions, host_capacity.max_sockets);
        let counted = Counted {
            active: Some(Arc::clone(&active)),
            listeners: active.listeners.clone(),
            servers: registry.servers(),
            workers: counters.clone(),
        };
        let metrics = Arc::new(Metrics::new(counted, Arc::clone(&capacity), unlogged));
        let mut health = Health::default();
        health.reconfigure(&active, now);
        if let Some(other) = other {
            health.status.inherit(&other.offer().servers);
        }
        let routing = routing(&active, &health.status.standings(&active, now));
        let first = snapshot(&active, routing, None, BTreeSet::new(), log.as_ref());
        let snapshot = Arc::new(first);
        let client_ports = Arc::<ClientPorts>::default();
        let count = sockets.len();
        let workers = Workers::start(count, |number, commands| WorkerSetup {
            number,
            workers: count,
            sockets: std::mem::take(&mut sockets[number]),
            snapshot: Arc::clone(&snapshot),
            capacity: Arc::clone(&capacity),
            client_ports: Arc::clone(&client_ports),
            counters: Arc::clone(&counters[number]),
            commands,
        })?;
        let wrong = network.wrong_interfaces();
        if !wrong.is_empty() {
            workers.tell_all(|| Command::NetworkChanged(Arc::clone(&wrong)));
        }
        let source_ports = bind::source_ports(&active.config);
        Ok(Self {
            file,
            inherited,
            written,
            names,
            remarks,
            remark_after: None,
            registry,
            active,
            lame_ducks: LameDucks::default(),
            closing: BTreeMap::new(),
            source_ports,
            snapshot,
            down: BTreeSet::new(),
            route_at: None,
            route_after: now,
            expand_at: None,
            host_capacity,
            metrics,
            health,
            network,
            log,
            workers,
            client_ports,
            reloads: Reloads::default(),
            reloaded: 0,
        })
    }

    /// Goes on with all that another process has, which lets go of it. If it doesn't, nothing
    /// was taken.
    pub(super) async fn take_over(&mut self, mut other: Taking) -> Result<Taking, RunError> {
        let begun = Instant::now();
        let taken = spawn_blocking(move || other.take().map(|estate| (other, estate)));
        let (other, estate) = taken.await.map_err(io::Error::other)??;
        tracing::debug!(took = ?begun.elapsed(), "all is received");
        self.client_ports
            .inherit(estate.resting_ports(), Instant::now());
        self.health.status.inherit(estate.servers());
        self.route_soon(begun);
        let (tell, mut told) = unbounded_channel();
        let registry = &mut self.registry;
        let server_of = |one: &ServerState| {
            registry.server(&one.upstream, &one.name, ServerAddr(one.address.into()))
        };
        // Who waits is gone when the process ends.
        let done = move |taken| _ = tell.send(taken);
        let shares = estate.share_out(self.workers.handles.len(), server_of, done);
        for (worker, share) in self.workers.handles.iter().zip(shares) {
            // One that is gone ends the process, which is told elsewhere.
            let _ = worker.tell(Command::TakeOver(Box::new(share)));
        }
        let mut taken = Vec::new();
        while taken.len() < self.workers.handles.len() {
            tokio::select! {
                failure = self.workers.failure() => return Err(failure),
                one = told.recv() => taken.extend(one),
            }
        }
        tracing::debug!(took = ?begun.elapsed(), "workers have taken over");
        let summary = handover::summary(&taken)?;
        let claimed = spawn_blocking(move || other.claim().map(|()| other));
        let other = claimed.await.map_err(io::Error::other)??;
        self.workers.tell_all(|| Command::Resume);
        let took = begun.elapsed();
        if other.is_queued() {
            // Addresses and routes may have changed while nobody looked.
            self.tell_network();
        }
        self.show(self.shown_listeners());
        let Offer {
            process, version, ..
        } = other.offer();
        tracing::info!(
            process,
            version,
            ?took,
            "took over from another process: {summary}"
        );
        Ok(other)
    }

    /// What another process can go on with, but for the sockets of the control path.
    pub(super) fn offer(&self) -> Result<Offer, String> {
        if self.is_reloading() {
            return Err("a reload is under way; try again when it is over".to_owned());
        }
        let workers = self.workers.handles.len();
        Ok(Offer {
            workers,
            addresses: self.held().into_iter().map(Into::into).collect(),
            source_ports: self
                .source_ports
                .keys()
                .map(|port| (*port).into())
                .collect(),
            sockets: self.metrics.capacity.sockets() + self.held().len() * workers,
            servers: self.health.status.handed_over(),
            ..Offer::of_this_process()
        })
    }

    /// How many reloads were applied.
    pub(super) fn reloaded(&self) -> u64 {
        self.reloaded
    }

    /// Whether what was [offered](Self::offer) after so many reloads is still so.
    pub(super) fn confirm(&self, reloaded: u64) -> Result<(), String> {
        if self.reloaded == reloaded && !self.is_reloading() {
            return Ok(());
        }
        Err("a reload has come in between; try again".to_owned())
    }

    /// Hands over, when asked, what workers have.
    pub(super) fn giver(&self, asks: mpsc::Sender<Ask>) -> Giver {
        let client_ports = Arc::clone(&self.client_ports);
        Giver::new(self.workers(), client_ports, self.status(), asks)
    }

    /// Leaves all to another process.
    pub(super) async fn let_go(mut self) -> Result<(), RunError> {
        self.workers.tell_all(|| Command::Release);
        let result = self.workers.all_ended().await;
        self.end();
        result
    }

    pub(super) fn config(&self) -> &Config {
        &self.active.config
    }

    pub(super) fn metrics(&self) -> Arc<Metrics> {
        Arc::clone(&self.metrics)
    }

    pub(super) fn status(&self) -> Arc<Status> {
        Arc::clone(&self.health.status)
    }

    pub(super) fn host_capacity(&self) -> HostCapacity {
        self.host_capacity
    }

    pub(super) fn names(&self) -> Arc<discovery::Status> {
        Arc::clone(&self.names.running.status)
    }

    pub(super) fn workers(&self) -> Vec<WorkerHandle> {
        self.workers.handles.clone()
    }

    /// Waits for what has to be seen to at once. Nothing is lost if the future is
    /// dropped.
    pub(super) async fn event(&mut self) -> Event {
        tokio::select! {
            failure = self.workers.failure() => Event::Failed(failure),
            ready = self.reloads.ready() => Event::Ready(Box::new(ready)),
            told = self.network.changed() => Event::Network(told),
        }
    }

    /// Reopens the access log and reads the configuration again.
    pub(super) fn hang_up(&mut self) {
        if let Some(log) = &self.log {
            log.writer.reopen();
        }
        self.reload(None);
    }

    /// Has the configuration read again. The asker is told the outcome, as
    /// the log is. All goes on meanwhile.
    pub(super) fn reload(&mut self, asker: Option<ReloadRequest>) {
        if self.reloads.ask(asker) {
            self.begin_reload();
        }
    }

    fn begin_reload(&mut self) {
        self.reloads.begin(reload::make_ready(Beside {
            file: self.file.clone(),
            active: Arc::clone(&self.active),
            held: self.held(),
            inherited: self.inherited.addresses(),
            source_ports: self.source_ports.clone(),
            names: self.names.running.clone(),
            log: self.log.as_ref().map(|log| log.of.clone()),
            unlogged: Arc::clone(&self.metrics.unlogged),
        }));
    }

    /// Puts the configuration that was made ready in force. If anything is wrong with it, or
    /// another process `is_taking` over, nothing changes.
    pub(super) async fn end_reload(&mut self, ready: Result<Ready, String>, is_taking: bool) {
        let outcome = match ready {
            Ok(_) if is_taking => Err(
                "another process is taking over at this time, with the configuration that it has read; reload that one, or try again if it fails"
                    .to_owned(),
            ),
            Ok(ready) => self.adopt(ready).await,
            Err(why) => Err(why),
        };
        self.reloaded += u64::from(outcome.is_ok());
        match &outcome {
            Ok(news) => tracing::info!("reloaded: {news}"),
            Err(why) => tracing::error!("not reloaded, nothing has changed: {why}"),
        }
        // Before who asked is told: what they scrape next shows it.
        self.metrics.reloads.record(outcome.is_ok());
        if self.reloads.end(&outcome) {
            self.begin_reload();
        }
    }

    /// Whether a reload is under way.
    pub(super) fn is_reloading(&self) -> bool {
        self.reloads.are_under_way()
    }

    /// How the proxy is, in a line for the service manager.
    pub(super) fn status_line(&self) -> String {
        let sessions = self.metrics.capacity.taken();
        let (up, servers) = self.health.status.up();
        let rejected = match self.metrics.reloads.is_latest_rejected() {
            true => "; the last reload was rejected, see the log",
            false => "",
        };
        format!("sessions: {sessions}; servers up: {up} of {servers}{rejected}")
    }

    async fn adopt(&mut self, ready: Ready) -> Result<String, String> {
        let Ready {
            written,
            candidate,
            expanded: Expanded { config, remarks },
            log,
        } = ready;
        if let Some(upstream) = reload::without_servers(&self.active.config, &config) {
            return Err(format!(
                "none of the names in upstream `{upstream}` resolves to a usable server; correct them, or reload once they do"
            ));
        }
        let before = Arc::clone(&self.active);
        let warnings = config.warnings.clone();
        self.apply(config, log)
            .await
            .map_err(|error| error.to_string())?;
        let shortfall = self.host_capacity.shortfall();
        for warning in warnings.iter().chain(&remarks).chain(&shortfall) {
            tracing::warn!("{warning}");
        }
        self.remarks = remarks;
        self.names.adopt(&written, candidate);
        self.written = written;
        // Names may lead elsewhere since.
        self.expand_soon(Instant::now());
        Ok(reload::news(&before.config, &self.active.config))
    }

    /// Has workers told of what names lead to, but not too often.
    pub(super) fn expand_soon(&mut self, now: Instant) {
        self.expand_at = Some(now.max(self.route_after));
    }

    /// Puts in force what names lead to now, and drops servers whose lame-duck time is over.
    async fn expand(&mut self, now: Instant) {
        self.expand_at = None;
        let expanded = reload::expand(&self.written, self.names.running.status.answers()).await;
        let applied = match expanded {
            Ok(Expanded { config, remarks }) => {
                self.remark(remarks, now);
                let applied = self.apply(config, None).await;
                applied.map_err(|error| error.to_string())
            }
            Err(error) => Err(error),
        };
        if let Err(error) = applied {
            tracing::error!(
                "the servers that names resolve to now can't be used; trying again in 1 s: {error}"
            );
            self.lame_ducks.postpone(now + RETRY);
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
        let bound = self.active.config.addresses();
        bound.chain(self.closing.keys().copied()).collect()
    }

    /// Puts `config` in force, with this access log if it is another; if that fails, what
    /// was in force before stays.
    async fn apply(&mut self, mut config: Config, log: Option<Log>) -> Result<(), RunError> {
        let now = Instant::now();
        // What can fail comes first.
        let sockets = bind::listeners(&config, &self.held(), &self.inherited)?;
        self.log = match config.access_log {
            Some(_) => log.or(self.log.take()),
            None => None,
        };
        let host_capacity = HostCapacity::of(&config);
        let capacity = &self.metrics.capacity;
        capacity.resize(host_capacity.max_sessions, host_capacity.max_sockets);
        self.host_capacity = host_capacity;
        self.close_later(&config, now);
        self.source_ports.extend(bind::source_ports(&config));
        self.lame_ducks.update(&mut config, &self.active, now);
        let active = Arc::new(self.registry.activate(config));
        let before = std::mem::replace(&mut self.active, active);
        self.health.reconfigure(&self.active, now);
        if self.network.follow(&self.active.config).await {
            self.tell_network();
        }
        let routing = self.route().await;
        self.snapshot = Arc::new(snapshot(
            &self.active,
            routing,
            Some((&before, &self.snapshot)),
            self.closing.keys().copied().collect(),
            self.log.as_ref(),
        ));
        drop(before);
        self.show(self.shown_listeners());
        if !self.send_snapshot(sockets).await {
            tracing::warn!(
                "a worker has not applied the new configuration within 2 s; still waiting"
            );
        }
        Ok(())
    }

    /// Sends the snapshot to all workers, with the sockets of each. The future waits for
    /// them: false if one has not applied it, yet.
    fn send_snapshot(&self, mut sockets: Vec<Vec<Socket>>) -> impl Future<Output = bool> {
        let command = move |number: usize, done| {
            let sockets = sockets.get_mut(number).map(std::mem::take);
            Command::Reconfigure(Box::new(Reconfiguration {
                snapshot: Arc::clone(&self.snapshot),
                sockets: sockets.unwrap_or_default(),
                done,
            }))
        };
        self.workers.tell_each(command)
    }

    /// Notes addresses that `config` has no listener for, and forgets those that it
    /// has.
    fn close_later(&mut self, config: &Config, now: Instant) {
        let wanted: BTreeSet<_> = config.addresses().collect();
        self.closing.retain(|address, _| !wanted.contains(address));
        let until = now + *self.active.config.drain_timeout;
        for address in self.active.config.addresses() {
            if !wanted.contains(&address) {
                self.closing.insert(address, until);
            }
        }
    }

    /// The listeners that metrics show: those of the configuration, and those that have
    /// sockets or sessions still.
    fn shown_listeners(&self) -> Vec<Arc<Listener>> {
        let mut shown = self.active.listeners.clone();
        let known: HashSet<_> = shown.iter().map(|listener| listener.id()).collect();
        let counted = self.metrics.counted();
        let others = counted
            .listeners
            .iter()
            .filter(|one| !known.contains(&one.id()));
        shown.extend(others.cloned());
        shown
    }

    /// The listeners that are gone and have no socket and no session any more, and that
    /// metrics show yet: what is counted of them doesn't change again.
    pub(super) fn gone_listeners(&self) -> Vec<Arc<Listener>> {
        let gone = self
            .shown_listeners()
            .split_off(self.active.listeners.len());
        gone.into_iter().filter(|one| !one.is_in_use()).collect()
    }

    /// Has metrics show these listeners no more.
    pub(super) fn forget(&self, gone: &[Arc<Listener>]) {
        if !gone.is_empty() {
            let mut shown = self.shown_listeners();
            shown.retain(|listener| !gone.contains(listener));
            self.show(shown);
        }
    }

    fn show(&self, listeners: Vec<Arc<Listener>>) {
        self.metrics.follow(Counted {
            active: Some(Arc::clone(&self.active)),
            listeners,
            servers: self.registry.servers(),
            workers: self.metrics.counted().workers.clone(),
        });
    }

    /// Has sessions go where servers stand now, but not too often.
    pub(super) fn route_soon(&mut self, now: Instant) {
        self.route_at = Some(now.max(self.route_after));
    }

    /// Looks at what has changed of the network, and has sessions follow.
    pub(super) async fn look(&mut self, told: Told) {
        if self.network.look(told, &self.active.config).await {
            self.tell_network();
        }
    }

    fn tell_network(&self) {
        let wrong = self.network.wrong_interfaces();
        let command = || Command::NetworkChanged(Arc::clone(&wrong));
        self.workers.tell_all(command);
    }

    /// Where sessions go, as servers stand now.
    async fn route(&mut self) -> Vec<Routing> {
        let now = Instant::now();
        let active = Arc::clone(&self.active);
        let standings = self.health.status.standings(&active, now);
        self.note_transitions(&standings);
        let made = spawn_blocking(move || routing(&active, &standings));
        self.route_after = Instant::now() + ROUTE_PAUSE;
        let step = self.health.status.next_step(now);
        self.route_at = step.map(|step| step.max(self.route_after));
        // It fails only where the runtime is ending.
        made.await.unwrap_or_default()
    }

    /// Has sessions that stay with servers that went down, or that have come back, tell them of
    /// their clients again.
    fn note_transitions(&mut self, standings: &[Standing]) {
        let mut down = BTreeSet::new();
        for (server, standing) in self.active.servers.iter().zip(standings) {
            let is_down = standing.state == State::Down;
            if is_down {
                down.insert(server.id());
            }
            if is_down != self.down.contains(&server.id()) {
                server.note_transition();
            }
        }
        self.down = down;
    }

    /// When [`meet_deadlines`](Self::meet_deadlines) has something to do.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let closing = self.closing.values().copied().min();
        let all = [
            self.route_at,
            self.expand_at,
            self.lame_ducks.next(),
            closing,
        ];
        all.into_iter().flatten().min()
    }

    /// Does what is due.
    pub(super) async fn meet_deadlines(&mut self, now: Instant) {
        let is_due = |until: &Instant| *until <= now;
        let due = self.closing.iter().filter(|(_, until)| is_due(until));
        let due: Vec<_> = due.map(|(address, _)| *address).collect();
        if !due.is_empty() {
            self.closing.retain(|_, until| !is_due(until));
            let mut next = (*self.snapshot).clone();
            next.version += 1;
            next.closing.retain(|address| !due.contains(address));
            if next.closing.is_empty() {
                let present = next.listeners.iter().take(self.active.listeners.len());
                next.listeners = present.cloned().collect();
            }
            self.snapshot = Arc::new(next);
            drop(self.send_snapshot(Vec::new()));
            tracing::info!(addresses = ?Bind::merged(due), "closed");
        }
        let leaves = self.lame_ducks.next();
        if [leaves, self.expand_at].iter().flatten().any(is_due) {
            self.expand(now).await;
        } else if self.route_at.as_ref().is_some_and(is_due) {
            let routing = self.route().await;
            if routing.len() == self.active.listeners.len() {
                self.snapshot = Arc::new(rerouted(&self.snapshot, routing));
                drop(self.send_snapshot(Vec::new()));
            }
        }
    }

    /// Lets replies in flight out, for as long as `drain_timeout` or until
    /// `hurried`, and ends the workers.
    pub(super) async fn stop(mut self, hurried: impl Future<Output = ()>) -> Result<(), RunError> {
        let drain_timeout = *self.active.config.drain_timeout;
        self.workers.tell_all(|| Command::Drain);
        tracing::info!(
            sessions = self.metrics.capacity.taken(),
            ?drain_timeout,
            "shutting down: no new datagrams are accepted; waiting up to drain_timeout for outstanding replies"
        );
        let result = tokio::select! {
            result = self.workers.all_ended() => result,
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
        self.workers.tell_all(|| Command::Stop);
        // It holds a sender of the access log.
        self.snapshot = Arc::default();
        if let Some(Log { writer, sender, .. }) = self.log.take() {
            drop(sender);
            writer.finish();
        }
    }
}
