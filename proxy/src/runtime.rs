//! From a valid configuration to running workers, through other configurations
//! while they run, and back to a clean stop.
//!
//! tokio drives what is not a datagram: signals, the admin address, health checks,
//! the drop log, the service manager. Workers are plain threads, each with an epoll of
//! its own: a session's socket then costs one registration and no task.

mod announcement;
mod bind;
mod control;
mod doors;
mod handover;
mod inherited;
mod lame_duck;
mod network;
mod reload;
mod routing;
mod service_manager;
mod snapshot;
mod workers;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::MissedTickBehavior;

use crate::admin::{self, Admin, ReloadRequest};
use crate::config::Config;
use crate::drop_log::{self, DropLog};
use control::{Control, Event};
use doors::Doors;
use handover::{Ask, Giver, IS_ENDING, Running, Taking};
use ppv2_hosts::doctor;
use service_manager::{STATUS_PAUSE, ServiceManager};

pub use announcement::announce_privileges;
pub use bind::probe;
pub(crate) use handover::ServerStanding;
pub use handover::{TakeError, hands_over};
pub use inherited::Inherited;
pub use service_manager::NotifySocket;

/// Requests for a reload that may wait to be heard.
const RELOADS: usize = 8;

/// How long a process that has taken over may take to serve what has come meanwhile.
const CATCH_UP: Duration = Duration::from_millis(200);

/// How often to look whether workers that stopped for another process go on.
const SETTLE_PAUSE: Duration = Duration::from_millis(10);

/// Questions of another process that may wait to be heard.
const ASKS: usize = 8;

/// Why a valid configuration could not be run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RunError {
    /// A listener's or the admin's address could not be bound.
    #[error("{what} {address} can't be bound: {reason}; {hint}")]
    Bind {
        /// `listener` and its name, or `admin address`.
        what: String,
        /// The address.
        address: SocketAddr,
        /// What the kernel said, and who holds it.
        reason: String,
        /// What to do.
        hint: &'static str,
    },
    /// The Unix socket of the admin API could not be made.
    #[error("admin socket {} can't be bound: {reason}; {hint}", path.display())]
    AdminSocket {
        /// Its path.
        path: PathBuf,
        /// What is in the way.
        reason: String,
        /// What to do.
        hint: &'static str,
    },
    /// A socket that the service manager has bound can't be used.
    #[error(
        "listener `{listener}`: the socket {address} of the service manager can't be used: {reason}; {hint}"
    )]
    Inherit {
        /// Its name.
        listener: String,
        /// The address.
        address: SocketAddr,
        /// What is wrong with it.
        reason: String,
        /// What to do.
        hint: &'static str,
    },
    /// There are too few descriptors for the listeners' sockets.
    #[error("{0}")]
    Descriptors(String),
    /// The access log can't be written.
    #[error(
        "access log {} can't be opened: {error}; name a file that the proxy's user may write, a pipe that is read, or \"-\" for standard output",
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
    Unfit(#[from] doctor::Unfit),
    /// Another process could not hand over.
    #[error(transparent)]
    TakeOver(#[from] TakeError),
    /// The Unix socket on which upgrades are asked for could not be made.
    #[error("upgrade socket {} can't be bound: {reason}; {hint}", path.display())]
    UpgradeSocket {
        /// Its path.
        path: PathBuf,
        /// What is in the way.
        reason: String,
        /// What to do.
        hint: &'static str,
    },
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

/// Keeps a SIGHUP from ending the process before it listens to signals: a log rotation
/// does not ask whether it is ready. Such a signal is lost.
///
/// # Errors
///
/// Those of the kernel, out of descriptors or memory.
pub fn outlast_hang_ups() -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    let _inside = runtime.enter();
    // Once listened to, a signal has its default effect no more.
    signal(SignalKind::hangup()).map(drop)
}

/// Signals that the process listens to.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    /// Asks for a stop that leaves sessions to the next process.
    leave: Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            leave: signal(SignalKind::user_defined2())?,
        })
    }

    /// Waits for one that asks for a stop.
    async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Runs the proxy until it is told to stop by SIGTERM or SIGINT, and then until
/// the replies in flight are through. `file` is what `config` was read from, to be
/// read again on SIGHUP. `takeover` is the Unix socket of another process, with whose sockets
/// and sessions this one goes on. `manager` is told how the proxy is, and has bound
/// `inherited`. [`probe`] comes first, unless another process has the addresses.
///
/// # Errors
///
/// [`RunError`], before any datagram was taken or when a worker failed.
pub fn run(
    config: Config,
    file: Option<PathBuf>,
    takeover: Option<PathBuf>,
    manager: Option<NotifySocket>,
    mut inherited: Inherited,
) -> Result<(), RunError> {
    // Before there is another thread.
    let left = inherited.take_state().map(Taking::queued);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let others = (takeover, left);
    let ended = runtime.block_on(supervise(config, file, others, manager, inherited));
    // A file system that hangs must not hold up the end.
    runtime.shutdown_background();
    ended
}

/// Tells of a file that can't be read again. A pipe is not opened, which would wait
/// for a writer.
fn warn_of_reloads(file: &Path) {
    let name = file.display();
    match std::fs::metadata(file).map(|file| file.is_file()) {
        Ok(true) => {
            if let Err(error) = std::fs::File::open(file) {
                tracing::warn!(
                    "{name} can't be read any more, so no reload can succeed: {error}; let the user that the proxy runs as read it"
                );
            }
        }
        Ok(false) => {
            tracing::warn!("{name} is not a regular file, so no reload can succeed");
        }
        Err(error) => {
            tracing::warn!(
                "{name} can't be found any more, so no reload can succeed: {error}; let the user that the proxy runs as see it"
            );
        }
    }
}

async fn supervise(
    config: Config,
    file: Option<PathBuf>,
    (takeover, left): (Option<PathBuf>, Option<Result<Taking, TakeError>>),
    manager: Option<NotifySocket>,
    mut inherited: Inherited,
) -> Result<(), RunError> {
    let mut signals = Signals::listen()?;
    let started = admin::Started::now();
    if let Err(error) = ppv2_udp::probe_bursts() {
        tracing::warn!(
            "bursts are moved datagram by datagram: this kernel lacks UDP_GRO or UDP_SEGMENT: {error}"
        );
    }
    for file in file
        .iter()
        .map(PathBuf::as_path)
        .chain(config.tag_key_files())
    {
        warn_of_reloads(file);
    }
    inherited.keep_those_of(&config);
    let mut manager = ServiceManager::new(manager);
    let is_upgrade = takeover.is_some();
    let mut other = match takeover {
        Some(socket) => {
            let other = Taking::connect(&socket)?;
            // What an earlier process has left is older than what there is.
            if left.is_some() {
                manager.forget();
            }
            bind::probe_beside(&config, &other)?;
            Some(other)
        }
        None => left_behind(left, &config, &inherited, &manager).await?,
    };
    let mut doors = Doors::open(&config, &mut inherited, other.as_mut()).await?;
    let admin = config.admin().cloned();
    let mut control = tokio::select! {
        started = Control::start(config, file, inherited, other.as_ref()) => started?,
        // Names may take their time.
        () = signals.stop() => return Ok(()),
    };
    let predecessor = match other {
        Some(other) => {
            if other.is_queued() {
                // The next start begins anew if this one fails, rather than fail again.
                manager.forget();
            }
            let taken = tokio::select! {
                taken = control.take_over(other) => taken?,
                () = signals.stop() => return Ok(()),
            };
            Some(taken)
        }
        None => None,
    };
    let ready = Arc::new(AtomicBool::new(true));
    let (ask, reloads) = mpsc::channel(RELOADS);
    let (give, mut asks) = mpsc::channel(ASKS);
    let giver = control.giver(give);
    if let Some(listener) = doors.upgrade.take()
        && let Err(error) = giver.clone().listen(listener)
    {
        // All else works.
        tracing::error!("no other process can take over from this one: {error}");
    }
    if let Some(listener) = doors.admin.take() {
        let admin = Admin {
            metrics: control.metrics(),
            workers: control.workers(),
            health: control.status(),
            names: control.names(),
            ready: Arc::clone(&ready),
            started,
            reload: ask,
            token: control.config().admin_token().cloned(),
        };
        tokio::spawn(admin::serve(listener, admin));
    }
    announcement::announce(control.config(), control.host_capacity(), admin.as_ref());
    if let Some(predecessor) = predecessor {
        predecessor.dismiss(doors.kept.clone());
        doors.own();
    }
    manager.watch(control.workers());
    if is_upgrade {
        manager.took_over();
    }
    manager.ready(control.status_line());

    let mut drop_log = DropLog::new(control.metrics());
    let told = until_told(
        &mut control,
        &mut drop_log,
        &mut signals,
        (reloads, &mut asks, &doors, &giver),
        &mut manager,
    )
    .await;
    let mut told = match told {
        Ok(told) => told,
        Err(error) => {
            control.end();
            return Err(error);
        }
    };
    loop {
        told = settle(told, &giver, &mut asks).await;
        match told {
            Told::Stop => break,
            Told::Leave => {
                manager.leaving();
                match leave(&control, &giver, &doors, &manager).await {
                    Ok(()) => {
                        doors.leave(&Running {
                            keeps_admin: true,
                            keeps_upgrade: true,
                        });
                        let ended = control.let_go().await;
                        drop_log.log_rest(Instant::now());
                        tracing::info!("stopped: the next process goes on");
                        return ended;
                    }
                    Err(why) => {
                        tracing::error!("sessions are not left to the next process: {why}");
                        told = Told::Stop;
                    }
                }
            }
            Told::LetGo(kept) => {
                doors.leave(&kept);
                // To close thousands of sockets takes time of the processor that their clients
                // wait for.
                tokio::time::sleep(CATCH_UP).await;
                let ended = control.let_go().await;
                drop_log.log_rest(Instant::now());
                tracing::info!("stopped: another process goes on");
                return ended;
            }
        }
    }
    ready.store(false, Ordering::Release);
    manager.stopping(*control.config().drain_timeout);
    // Kept for what is still to be logged of them.
    let servers = control.metrics().counted().servers();
    let stopped = {
        let mut stopped = pin!(control.stop(signals.stop()));
        loop {
            tokio::select! {
                stopped = &mut stopped => break stopped,
                answers = manager.asked() => manager.guard(&answers),
            }
        }
    };
    drop_log.log_rest(Instant::now());
    drop(servers);
    tracing::info!("stopped");
    manager.finish().await;
    stopped
}

/// What the process before has left in the service manager's store. If that can't be used, its
/// sessions are lost, and all begins anew.
async fn left_behind(
    left: Option<Result<Taking, TakeError>>,
    config: &Config,
    inherited: &Inherited,
    manager: &ServiceManager,
) -> Result<Option<Taking>, RunError> {
    let Some(left) = left else {
        return Ok(None);
    };
    let read = spawn_blocking(move || left.and_then(Taking::read)).await;
    match read.map_err(io::Error::other)? {
        Ok(other) => {
            bind::probe_beside(config, &other)?;
            Ok(Some(other))
        }
        Err(why) => {
            tracing::error!("what the process before has left can't be used: {why}");
            // As long as it is in the store, its sockets have the addresses.
            manager.forget();
            if let Err(error) = manager.barrier().await {
                tracing::warn!("the service manager does not answer: {error}");
            }
            probe(config, inherited)?;
            Ok(None)
        }
    }
}

/// Has nothing handed over from now on to a process that asks, and waits for what comes of it
/// where workers have stopped for one.
async fn settle(told: Told, giver: &Giver, asks: &mut mpsc::Receiver<Ask>) -> Told {
    loop {
        let is_settled = match told {
            Told::Stop => giver.end(),
            Told::Leave => !giver.is_giving(),
            Told::LetGo(_) => true,
        };
        if is_settled {
            return told;
        }
        match tokio::time::timeout(SETTLE_PAUSE, asks.recv()).await {
            Ok(Some(Ask::Done(kept))) => return Told::LetGo(kept),
            Ok(Some(Ask::Offer(reply))) => _ = reply.send(Err(IS_ENDING.to_owned())),
            Ok(Some(Ask::Confirm(_, reply))) => _ = reply.send(Err(IS_ENDING.to_owned())),
            // It has failed, and workers go on, or not yet.
            Ok(None) | Err(_) => {}
        }
    }
}

/// Leaves all sockets and sessions in the service manager's store, for the next process. If that
/// fails, workers go on.
async fn leave(
    control: &Control,
    giver: &Giver,
    doors: &Doors,
    manager: &ServiceManager,
) -> Result<(), String> {
    let offering = doors.offer(control.offer()?, control.reloaded());
    let giving = giver.clone();
    let queued = spawn_blocking(move || giving.queue(&offering)).await;
    let queued = queued.map_err(|error| error.to_string())?;
    let mut queued = queued.map_err(|error| error.to_string())?;
    let unread = queued.unread().map_err(|error| error.to_string())?;
    let stored = match manager.store(unread).await {
        Ok(()) if queued.is_kept() => return Ok(()),
        Ok(()) => "it keeps none; its unit needs FileDescriptorStoreMax=1".to_owned(),
        Err(error) => error.to_string(),
    };
    // It may come to be stored yet.
    manager.forget();
    giver.resume();
    Err(format!("the service manager has not stored them: {stored}"))
}

/// What ends the process.
enum Told {
    /// A signal.
    Stop,
    /// A signal that wants sessions to be left to the next process.
    Leave,
    /// Another process, which goes on with all.
    LetGo(Running),
}

/// Sees to all that comes until a signal asks for a stop, or another process goes on.
async fn until_told(
    control: &mut Control,
    drop_log: &mut DropLog,
    signals: &mut Signals,
    (mut reloads, asks, doors, giver): (
        mpsc::Receiver<ReloadRequest>,
        &mut mpsc::Receiver<Ask>,
        &Doors,
        &Giver,
    ),
    manager: &mut ServiceManager,
) -> Result<Told, RunError> {
    let mut interval = tokio::time::interval(drop_log::INTERVAL);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut status_interval = tokio::time::interval(STATUS_PAUSE);
    status_interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (status, names) = (control.status(), control.names());
    let mut is_leaving = false;
    loop {
        let next = control.next_deadline();
        let deadline = async {
            match next {
                Some(next) => tokio::time::sleep_until(next.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = signals.terminate.recv() => return Ok(Told::Stop),
            _ = signals.interrupt.recv() => return Ok(Told::Stop),
            _ = signals.leave.recv() => {
                // What is being reloaded is left as well.
                is_leaving = true;
                if !control.is_reloading() {
                    return Ok(Told::Leave);
                }
            }
            _ = signals.hangup.recv() => {
                manager.reloading();
                control.hang_up();
            }
            // Without an admin address no reload is asked for here.
            Some(asker) = reloads.recv() => {
                manager.reloading();
                control.reload(Some(asker));
            }
            // Without a socket for it, nobody asks.
            Some(ask) = asks.recv() => match ask {
                // Who asked may have gone.
                Ask::Offer(reply) => {
                    let offer = control.offer();
                    let offer = offer.map(|offer| doors.offer(offer, control.reloaded()));
                    let _ = reply.send(offer);
                }
                Ask::Confirm(reloaded, reply) => _ = reply.send(control.confirm(reloaded)),
                Ask::Done(kept) => return Ok(Told::LetGo(kept)),
            },
            () = status.changed() => control.route_soon(Instant::now()),
            () = names.changed() => control.expand_soon(Instant::now()),
            () = deadline => control.meet_deadlines(Instant::now()).await,
            _ = interval.tick() => {
                let now = Instant::now();
                let gone = control.gone_listeners();
                drop_log.log(now);
                drop_log.log_gone(&gone, now);
                control.forget(&gone);
            }
            _ = status_interval.tick() => manager.status(control.status_line()),
            answers = manager.asked() => manager.guard(&answers),
            event = control.event() => match event {
                Event::Failed(failure) => return Err(failure),
                Event::Ready(ready) => {
                    control.end_reload(*ready, giver.is_giving()).await;
                    if !control.is_reloading() {
                        manager.ready(control.status_line());
                        if is_leaving {
                            return Ok(Told::Leave);
                        }
                    }
                }
                Event::Network(told) => control.look(told).await,
            },
        }
    }
}
