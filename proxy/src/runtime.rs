//! From a valid configuration to running workers, and back to a clean stop.
//!
//! tokio drives what is not a datagram: signals, the admin address, the watch
//! over the counters. Workers are plain threads, each with an epoll of its
//! own: a session's socket then costs one registration and no task.

mod plans;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::MissedTickBehavior;

use crate::access_log;
use crate::admin::{self, Admin, WorkerHandle};
use crate::config::{Config, Listener};
use crate::counters::WorkerCounters;
use crate::doctor;
use crate::health::Health;
use crate::holder;
use crate::limits::Ceiling;
use crate::metrics::Metrics;
use crate::net::{self, Options, Socket};
use crate::session::{Budget, Clients, Rates};
use crate::upstream::Server;
use crate::watch::{self, Watch};
use crate::worker::{Command, ListenerSettings, Share, Worker};

/// Commands that may wait for a worker: what a handful of readers of the admin
/// address can ask at once. More are turned away.
const COMMANDS: usize = 64;

/// Why a valid configuration could not be run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RunError {
    /// A listener's or the admin's address could not be bound.
    #[error("{what} {address} can't be bound: {reason}; {mend}")]
    Bind {
        /// `listener` and its name, or `admin address`.
        what: String,
        /// The address.
        address: SocketAddr,
        /// What the kernel said, and who holds it.
        reason: String,
        /// What to do.
        mend: &'static str,
    },
    /// The access log can't be written.
    #[error(
        "access log {} can't be opened: {error}; name a file that the proxy's user may write, or \"-\"",
        path.display()
    )]
    AccessLog {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// The host lacks what a configured mode needs.
    #[error(transparent)]
    Lacking(#[from] doctor::Lacking),
    /// The kernel refused something that every start needs.
    #[error("can't start")]
    Start(#[from] io::Error),
    /// A worker ended by itself.
    #[error("worker {number} failed: {reason}")]
    Worker {
        /// Its number.
        number: usize,
        /// What it met.
        reason: String,
    },
}

/// Finds out whether every listener's address is free. Sockets that share an
/// address would also share it with another process of the same user, and each
/// would get a part of the clients; one that doesn't share finds such a process
/// out. To be asked while this one may still look into others.
///
/// # Errors
///
/// [`RunError::Bind`], with whoever holds the address.
pub fn probe(config: &Config) -> Result<(), RunError> {
    for listener in &config.listeners {
        for address in &listener.bind {
            net::probe(*address).map_err(|error| bind_error(listener, *address, &error))?;
        }
    }
    Ok(())
}

/// Runs the proxy until it is told to stop by SIGTERM or SIGINT, and then until
/// the replies in flight are through. [`probe`] comes first.
///
/// # Errors
///
/// [`RunError`], before any datagram was taken or when a worker failed.
pub fn run(config: &Config) -> Result<(), RunError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(supervise(config))
}

async fn supervise(config: &Config) -> Result<(), RunError> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    doctor::fatal_at_start(config)?;
    let workers = config.worker_count();
    let ceiling = Ceiling::of(config);
    for warning in config.warnings.iter().chain(&ceiling.shortfall()) {
        tracing::warn!("{warning}");
    }

    if let Err(error) = net::probe_bursts() {
        tracing::warn!(
            "bursts are moved datagram by datagram: this kernel lacks UDP_GRO or UDP_SEGMENT: {error}"
        );
    }
    for source in config.sources() {
        net::probe_source(source).map_err(|error| RunError::Bind {
            what: "source".to_owned(),
            address: SocketAddr::new(source, 0),
            reason: reason_of(&error),
            mend: mend_of(&error),
        })?;
    }
    let entrances = bind_listeners(&config.listeners, workers, config.reuse_port)?;
    let admin_listener = match config.admin {
        Some(address) => Some(bind_admin(address).await?),
        None => None,
    };
    let mut crew = Crew::start(config, ceiling, entrances)?;
    let health = Health::start(
        Arc::new(config.clone()),
        Arc::clone(&crew.metrics),
        crew.workers.clone(),
        plans::steer,
    );
    let ready = Arc::new(AtomicBool::new(true));
    if let Some(listener) = admin_listener {
        let admin = Admin {
            metrics: Arc::clone(&crew.metrics),
            workers: crew.workers.clone(),
            health: health.board(),
            ready: Arc::clone(&ready),
        };
        tokio::spawn(admin::serve(listener, admin));
    }
    announce(config, workers, ceiling);

    let mut watch = Watch::new(Arc::clone(&crew.metrics));
    let told = crew
        .until_told(&mut watch, &mut terminate, &mut interrupt)
        .await;
    if told.is_err() {
        crew.end();
        return told;
    }
    ready.store(false, Ordering::Release);
    drop(health);
    let stopped = crew
        .stop(config.drain_timeout, &mut terminate, &mut interrupt)
        .await;
    watch.log_rest(Instant::now());
    tracing::info!("stopped");
    stopped
}

fn announce(config: &Config, workers: usize, ceiling: Ceiling) {
    for listener in &config.listeners {
        let servers = listener.servers.iter().map(|(number, mode)| {
            let server = &config.servers[*number];
            format!("{} ({})", server.address, mode.name())
        });
        tracing::info!(
            listener = listener.name,
            bind = ?listener.bind,
            upstream = listener.upstream,
            servers = %servers.collect::<Vec<_>>().join(", "),
            "listening"
        );
    }
    let admin = config.admin.map(tracing::field::display);
    let max_sessions = ceiling.max_sessions;
    tracing::info!(workers, max_sessions, admin, "ready");
}

/// One socket per worker for every address of every listener, or one for each
/// address, in turn; by worker.
fn bind_listeners(
    listeners: &[Listener],
    workers: usize,
    reuse_port: bool,
) -> Result<Vec<Vec<(Socket, usize)>>, RunError> {
    let addresses = || {
        let numbered = listeners.iter().enumerate();
        numbered.flat_map(|(number, l)| l.bind.iter().map(move |address| (number, l, *address)))
    };
    // A session that writes from its client's own port may need that of a listener.
    let own_ports =
        |listener: &Listener| listener.servers.iter().any(|(_, mode)| mode.spoofs_ports());
    let shared = reuse_port && workers > 1 || listeners.iter().any(own_ports);
    let bind_one = |(number, listener, address): (usize, &Listener, SocketAddr)| {
        let options = Options {
            dont_fragment: listener.dont_fragment,
            bursts: !listener.rules.count_requests() && !listener.emits_once(),
        };
        Socket::listen(address, shared, options)
            .map(|socket| (socket, number))
            .map_err(|error| bind_error(listener, address, &error))
    };
    let mut entrances: Vec<Vec<_>> = (0..workers).map(|_| Vec::new()).collect();
    if reuse_port {
        for entrances in &mut entrances {
            *entrances = addresses().map(bind_one).collect::<Result<_, _>>()?;
        }
    } else {
        for (turn, address) in addresses().enumerate() {
            entrances[turn % workers].push(bind_one(address)?);
        }
    }
    Ok(entrances)
}

async fn bind_admin(address: SocketAddr) -> Result<TcpListener, RunError> {
    TcpListener::bind(address)
        .await
        .map_err(|error| RunError::Bind {
            what: "admin address".to_owned(),
            address,
            reason: reason_of(&error),
            mend: mend_of(&error),
        })
}

fn bind_error(listener: &Listener, address: SocketAddr, error: &io::Error) -> RunError {
    let mut reason = reason_of(error);
    if error.kind() == io::ErrorKind::AddrInUse {
        let holder = holder::of(address);
        reason += &holder.map_or_else(
            || ", by a process that we may not look into".to_owned(),
            |holder| format!(", by {holder}"),
        );
    }
    RunError::Bind {
        what: format!("listener `{}`:", listener.name),
        address,
        reason,
        mend: mend_of(error),
    }
}

/// The kernel's own text for an address in use contains the word that a
/// supervisor waits for, at the end of "already".
fn reason_of(error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::AddrInUse {
        "it is in use".to_owned()
    } else {
        error.to_string()
    }
}

fn mend_of(error: &io::Error) -> &'static str {
    let kind = error.kind();
    if kind == io::ErrorKind::AddrInUse {
        "stop that process or choose another port"
    } else if kind == io::ErrorKind::AddrNotAvailable {
        "use an address that this host has (ip address)"
    } else if kind == io::ErrorKind::PermissionDenied {
        "ports below 1024 need CAP_NET_BIND_SERVICE or net.ipv4.ip_unprivileged_port_start"
    } else {
        "check that this host has the address family (net.ipv6.conf.all.disable_ipv6)"
    }
}

/// The running workers.
struct Crew {
    metrics: Arc<Metrics>,
    workers: Vec<WorkerHandle>,
    /// Says of each worker that ended how it did.
    ended: tokio::sync::mpsc::UnboundedReceiver<(usize, Result<(), String>)>,
    running: usize,
    writer: Option<access_log::Writer>,
}

impl Crew {
    fn start(
        config: &Config,
        ceiling: Ceiling,
        entrances: Vec<Vec<(Socket, usize)>>,
    ) -> Result<Self, RunError> {
        let running = entrances.len();
        let (writer, log) = match &config.access_log {
            Some(log) => {
                let started = access_log::Writer::start(log, config);
                let (writer, sender) = started.map_err(|error| RunError::AccessLog {
                    path: log.path.clone().unwrap_or_default(),
                    error,
                })?;
                (Some(writer), Some(sender))
            }
            None => (None, None),
        };
        let claims = Arc::default();
        let budget = Budget::with_own(ceiling.max_sessions, ceiling.max_sockets, ceiling.max_own);
        let settings = settings(config);
        let states = plans::configured_states(config);
        let steering = Arc::new(plans::steer(config, &states));
        let counters: Vec<_> = (0..running)
            .map(|_| WorkerCounters::new(config.listeners.len(), config.servers.len()))
            .map(Arc::new)
            .collect();
        let (tell, ended) = tokio::sync::mpsc::unbounded_channel();
        let mut workers = Vec::new();
        for (number, entrances) in entrances.into_iter().enumerate() {
            let (commands, receiver) = mpsc::sync_channel(COMMANDS);
            let (worker, waker) = Worker::new(Share {
                number,
                entrances,
                listeners: settings.clone(),
                pace: config.pace,
                budget: Arc::clone(&budget),
                claims: Arc::clone(&claims),
                steering: Arc::clone(&steering),
                max_retired: ceiling.max_retired.div_ceil(running),
                counters: Arc::clone(&counters[number]),
                log: log.clone(),
                commands: receiver,
            })?;
            let tell = tell.clone();
            thread::Builder::new()
                .name(format!("worker{number}"))
                .spawn(move || {
                    let run = std::panic::AssertUnwindSafe(|| worker.run());
                    let result = match std::panic::catch_unwind(run) {
                        Ok(result) => result.map_err(|error| error.to_string()),
                        Err(_) => Err("it panicked".to_owned()),
                    };
                    // The process is ending if nobody listens.
                    let _ = tell.send((number, result));
                })?;
            workers.push(WorkerHandle { commands, waker });
        }
        let metrics = Arc::new(Metrics {
            listeners: config.listener_names(),
            servers: config.server_names(),
            workers: counters,
            budget,
        });
        Ok(Self {
            metrics,
            workers,
            ended,
            running,
            writer,
        })
    }

    /// Watches over the workers until a signal asks for a stop.
    async fn until_told(
        &mut self,
        watch: &mut Watch,
        terminate: &mut Signal,
        interrupt: &mut Signal,
    ) -> Result<(), RunError> {
        // Taken so that it ends nothing: many send it for a reload.
        let mut hangup = signal(SignalKind::hangup())?;
        let mut interval = tokio::time::interval(watch::INTERVAL);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
                _ = hangup.recv() => self.reopen_log(),
                _ = interval.tick() => watch.log(Instant::now()),
                Some((number, result)) = self.ended.recv() => {
                    let reason = result.err().unwrap_or_else(|| "it ended".to_owned());
                    return Err(RunError::Worker { number, reason });
                }
            }
        }
    }

    /// Lets replies in flight out, for as long as `drain_timeout` or until a
    /// second signal, and ends the workers.
    async fn stop(
        mut self,
        drain_timeout: Duration,
        terminate: &mut Signal,
        interrupt: &mut Signal,
    ) -> Result<(), RunError> {
        tracing::info!(
            sessions = self.metrics.budget.taken(),
            ?drain_timeout,
            "stopping: no more datagrams are taken, replies in flight are let out"
        );
        self.tell_all(|| Command::Drain);
        let timeout = tokio::time::sleep(drain_timeout);
        tokio::pin!(timeout);
        while self.running > 0 {
            tokio::select! {
                Some((number, result)) = self.ended.recv() => {
                    self.running -= 1;
                    result.map_err(|reason| RunError::Worker { number, reason })?;
                }
                () = &mut timeout => {
                    tracing::warn!("some replies did not come within {drain_timeout:?}");
                    break;
                }
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
            }
        }
        self.end();
        Ok(())
    }

    /// Ends the workers, and lets out what they had to tell of their sessions.
    fn end(&mut self) {
        self.tell_all(|| Command::Stop);
        if let Some(writer) = self.writer.take() {
            writer.finish();
        }
    }

    fn reopen_log(&self) {
        if let Some(writer) = &self.writer {
            writer.reopen();
        }
        tracing::warn!(
            "SIGHUP opens the access log anew, if there is one, and changes nothing else; stop and start the proxy for a new configuration"
        );
    }

    fn tell_all(&self, command: impl Fn() -> Command) {
        for worker in &self.workers {
            // A worker that is gone, or too busy to hear, ends with the process.
            let _ = worker.tell(command());
        }
    }
}

/// What workers need of the configuration.
fn settings(config: &Config) -> Vec<ListenerSettings> {
    let server = |(number, mode): &(usize, _)| Server {
        number: *number,
        address: config.servers[*number].address,
        mode: *mode,
        sources: Arc::clone(&config.servers[*number].sources),
        share_sockets: config.servers[*number].share_sockets,
    };
    config
        .listeners
        .iter()
        .map(|listener| ListenerSettings {
            rules: listener.rules,
            allow: listener.allow.clone(),
            deny: listener.deny.clone(),
            clients: listener
                .per_client
                .sessions
                .map(|most| Clients::new(most, listener.per_client.ipv6_prefix)),
            rates: listener.per_client.rate.map(|(rate, burst)| {
                let prefix = listener.per_client.ipv6_prefix;
                Arc::new(Rates::new(Instant::now(), rate, burst, prefix))
            }),
            dont_fragment: listener.dont_fragment,
            dscp: listener.dscp,
            servers: listener.servers.iter().map(server).collect(),
        })
        .collect()
}
