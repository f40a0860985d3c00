//! The process that lets another one go on with all that it has.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ppv2_engine::client_ports::ClientPorts;
use ppv2_engine::handover::WorkerState;
use ppv2_engine::worker::Command;
use rustix::net::sockopt::socket_cookie;
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use thiserror::Error;
use tokio::sync::oneshot;

use super::channel::{Body, Channel, ChannelError, Limits};
use super::message::{FORMAT, Last, Message, Offer, Running, since_boot};
use super::{FROZEN, HELLO, is_trusted};
use crate::admin::WorkerHandle;
use crate::health::Status;

/// How long the new process may take for its configuration, names and access log.
const PREPARATION: Duration = Duration::from_secs(120);

/// Connections at once. More are closed at once.
const MOST: usize = 4;

/// Between two looks whether a connection can be accepted, where that failed.
const PAUSE: Duration = Duration::from_millis(500);

/// What the control path is asked.
pub(in crate::runtime) enum Ask {
    /// What there is to offer, or why there is nothing.
    Offer(oneshot::Sender<Result<Offering, String>>),
    /// Whether what was offered is still so, with its [`Offering::reloads`].
    Confirm(u64, oneshot::Sender<Result<(), String>>),
    /// Another process goes on with all: let go, and end.
    Done(Running),
}

/// What is offered, with the sockets of the control path.
pub(in crate::runtime) struct Offering {
    pub(in crate::runtime) offer: Offer,
    pub(in crate::runtime) sockets: Vec<OwnedFd>,
    /// How many reloads there had been.
    pub(in crate::runtime) reloads: u64,
}

/// What is handed over, and by whom.
#[derive(Clone)]
pub(in crate::runtime) struct Giver {
    workers: Vec<WorkerHandle>,
    client_ports: Arc<ClientPorts>,
    health: Arc<Status>,
    asks: tokio::sync::mpsc::Sender<Ask>,
    stage: Arc<Stage>,
}

/// Who may have workers stop to look at their sockets: one at a time.
#[derive(Debug, Default)]
struct Stage(AtomicU8);

impl Stage {
    const IDLE: u8 = 0;
    /// Another process prepares for taking over.
    const OFFERED: u8 = 1;
    /// Workers don't look at their sockets, or are about not to.
    const FROZEN: u8 = 2;
    /// Nothing is handed over any more.
    const OVER: u8 = 3;

    /// Goes from one of `before` to `next`. False if it is none of them.
    fn go(&self, before: &[u8], next: u8) -> bool {
        let order = Ordering::AcqRel;
        let mut before = before.iter();
        before.any(|from| {
            let gone = self
                .0
                .compare_exchange(*from, next, order, Ordering::Acquire);
            gone.is_ok()
        })
    }
}

/// Why nothing was handed over.
#[derive(Debug, Error)]
pub(in crate::runtime) enum GiveError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// Told to the other process, too.
    #[error("{0}")]
    Refused(String),
    #[error("the other process has ended it: {0}")]
    Ended(String),
    #[error("it said {0} where {1} belongs")]
    Disorder(&'static str, &'static str),
    #[error("a worker can't be asked; see the log")]
    Worker,
}

impl From<io::Error> for GiveError {
    fn from(error: io::Error) -> Self {
        Self::Channel(error.into())
    }
}

impl Giver {
    /// Hands over what `workers` have. The control path answers `asks`.
    pub(in crate::runtime) fn new(
        workers: Vec<WorkerHandle>,
        client_ports: Arc<ClientPorts>,
        health: Arc<Status>,
        asks: tokio::sync::mpsc::Sender<Ask>,
    ) -> Self {
        Self {
            workers,
            client_ports,
            health,
            asks,
            stage: Arc::default(),
        }
    }

    /// Waits in a thread of its own for processes that want to go on with all.
    pub(in crate::runtime) fn listen(self, listener: UnixListener) -> io::Result<()> {
        // It may come from another process.
        listener.set_nonblocking(false)?;
        let connections = Arc::new(AtomicUsize::new(0));
        let accept = move || {
            loop {
                let Ok((stream, _)) = listener.accept() else {
                    thread::sleep(PAUSE);
                    continue;
                };
                if connections.fetch_add(1, Ordering::Relaxed) >= MOST {
                    connections.fetch_sub(1, Ordering::Relaxed);
                    continue;
                }
                let (giver, connections) = (self.clone(), Arc::clone(&connections));
                let serve = move || {
                    giver.serve(stream);
                    connections.fetch_sub(1, Ordering::Relaxed);
                };
                // Without a thread, the other process learns it from the closed connection.
                let _ = thread::Builder::new()
                    .name("upgrade".to_owned())
                    .spawn(serve);
            }
        };
        thread::Builder::new()
            .name("upgrades".to_owned())
            .spawn(accept)
            .map(drop)
    }

    /// Hands all over to the process at the other end, and says in the log what came of it.
    fn serve(&self, stream: UnixStream) {
        match is_trusted(&stream) {
            Ok(()) => {}
            Err(why) => {
                tracing::warn!("no upgrade: {why}");
                let mut channel = Channel::new(stream);
                let _ = channel.set_timeout(Some(HELLO));
                let _ = channel.send(&Message::Refused(why), &[]);
                return;
            }
        }
        let line = Line::new(Channel::new(stream));
        if let Err(why) = self.give(&line) {
            if let GiveError::Refused(why) = &why {
                let _ = line.send(&Message::Refused(why.clone()), &[]);
            }
            // A worker may hold the other end of `line` yet.
            line.lock().close();
            tracing::warn!("no upgrade, this process goes on: {why}");
        }
    }

    fn give(&self, line: &Line) -> Result<(), GiveError> {
        line.lock().set_timeout(Some(HELLO))?;
        let hello = match line.receive() {
            // Somebody wanted to know whether there is a process.
            Err(ChannelError::Closed) => return Ok(()),
            hello => hello?,
        };
        let Message::Hello(hello) = hello else {
            return Err(GiveError::Disorder(hello.name(), "Hello"));
        };
        if hello.format != FORMAT {
            return Err(GiveError::Refused(format!(
                "process {} (version {}) takes over in format {}, and this one (version {}) hands over in format {FORMAT}; upgrade by way of a release that knows both, or restart",
                hello.process,
                hello.version,
                hello.format,
                env!("CARGO_PKG_VERSION"),
            )));
        }
        if !self.stage.go(&[Stage::IDLE], Stage::OFFERED) {
            return Err(refused(IS_TAKING));
        }
        let given = self.give_to(line, hello.process, &hello.version);
        // The process may be ending, or leave all to a later one.
        self.stage.go(&[Stage::OFFERED], Stage::IDLE);
        given
    }

    fn give_to(&self, line: &Line, process: u32, version: &str) -> Result<(), GiveError> {
        let Offering {
            mut offer,
            mut sockets,
            reloads,
        } = self.ask(Ask::Offer)?.map_err(GiveError::Refused)?;
        // Where the kernel or a filter of system calls does not let it, the other process does
        // not learn that this one has ended.
        let own = pidfd_open(getpid(), PidfdFlags::empty());
        offer.has_process = own.is_ok();
        sockets.extend(own);
        let sockets: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
        line.send(&Message::Offer(offer), &sockets)?;
        line.lock().set_timeout(Some(PREPARATION))?;
        line.expect("Begin", |said| matches!(said, Message::Begin))?;
        tracing::info!(process, version, "handing over to another process");
        line.lock().set_timeout(Some(FROZEN))?;
        let sent = self.send_sockets(line)?;
        line.send(&Message::Previewed, &[])?;
        line.expect("Freeze", |said| matches!(said, Message::Freeze))?;
        if !self.stage.go(&[Stage::OFFERED], Stage::FROZEN) {
            return Err(refused(IS_ENDING));
        }
        let frozen = Instant::now();
        // From now on no reload is applied, and none may have been since the offer: the other
        // process has read its configuration for that.
        let confirmed = self.ask(|reply| Ask::Confirm(reloads, reply));
        let confirmed = confirmed.and_then(|so| so.map_err(GiveError::Refused));
        let released = confirmed.and_then(|()| self.send_all(line, sent));
        let released = released.and_then(|()| {
            tracing::debug!(took = ?frozen.elapsed(), "all is sent");
            line.expect("Ready", |said| matches!(said, Message::Ready))?;
            line.lock().set_timeout(None)?;
            line.send(&Message::Yours, &[])?;
            // The other one may look at the sockets from now on, until it has closed the
            // connection: whatever else it says, this one does no more.
            match line.receive() {
                Ok(Message::Running(running)) => Ok(running),
                Err(ChannelError::Closed) => Err(ChannelError::Closed.into()),
                said => {
                    tracing::warn!(?said, "the other process goes on, and does not say how");
                    Ok(Running::default())
                }
            }
        });
        match released {
            Ok(running) => {
                tracing::info!(process, version, took = ?frozen.elapsed(), "handed over");
                let _ = self.asks.blocking_send(Ask::Done(running));
                // Nobody is told that it was otherwise: the process ends.
                loop {
                    thread::park();
                }
            }
            Err(why) => {
                self.resume();
                Err(why)
            }
        }
    }

    /// Whether workers don't look at their sockets.
    pub(in crate::runtime) fn is_giving(&self) -> bool {
        self.stage.0.load(Ordering::Acquire) == Stage::FROZEN
    }

    /// Whether from now on nothing is handed over to a process that asks. While workers don't
    /// look at their sockets for one, what comes of that is to be waited for.
    pub(in crate::runtime) fn end(&self) -> bool {
        self.stage
            .go(&[Stage::IDLE, Stage::OFFERED, Stage::OVER], Stage::OVER)
    }

    /// Has workers look at their sockets no more, and puts all that they have into a socket, for
    /// a process that is yet to start: [`Taking::queued`](super::Taking::queued). If that fails,
    /// workers go on.
    pub(in crate::runtime) fn queue(&self, offering: &Offering) -> Result<Queued, GiveError> {
        if !self.stage.go(&[Stage::IDLE, Stage::OFFERED], Stage::FROZEN) {
            return Err(GiveError::Ended(IS_TAKING.to_owned()));
        }
        self.queue_all(offering).inspect_err(|_| self.resume())
    }

    fn queue_all(&self, offering: &Offering) -> Result<Queued, GiveError> {
        let (channel, unread) = Channel::unread()?;
        let line = Line::new(channel);
        let sockets: Vec<_> = offering.sockets.iter().map(AsFd::as_fd).collect();
        line.send(&Message::Offer(offering.offer.clone()), &sockets)?;
        self.send_all(&line, Vec::new())?;
        let unread = Some(unread);
        Ok(Queued { line, unread })
    }

    /// Has workers go on that stopped for what has failed.
    pub(in crate::runtime) fn resume(&self) {
        for worker in &self.workers {
            // One that is gone ends the process, which is told elsewhere.
            let _ = worker.tell(Command::Resume);
        }
        self.stage.go(&[Stage::FROZEN], Stage::IDLE);
    }

    /// Sends the sockets of sessions, while workers go on. Returns the cookies of those of each
    /// worker.
    fn send_sockets(&self, line: &Line) -> Result<Vec<HashSet<u64>>, GiveError> {
        let mut all = Vec::with_capacity(self.workers.len());
        for (number, worker) in self.workers.iter().enumerate() {
            let (mut sent, mut next) = (HashSet::new(), Some(0));
            while let Some(first) = next {
                let (tell, told) = mpsc::channel();
                // Who waits may have given up.
                let reply = move |sockets, next| _ = tell.send((sockets, next));
                let reply = Box::new(reply);
                if !worker.tell(Command::Preview { first, reply }) {
                    return Err(GiveError::Worker);
                }
                let told = told.recv_timeout(FROZEN);
                let (sockets, after): (Vec<OwnedFd>, _) = told.map_err(|_| GiveError::Worker)?;
                next = after;
                for socket in &sockets {
                    sent.insert(socket_cookie(socket).map_err(io::Error::from)?);
                }
                let sockets: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
                line.send(&Message::Sockets(number), &sockets)?;
            }
            all.push(sent);
        }
        Ok(all)
    }

    /// Has workers look at their sockets no more, and sends all that they have, but for the
    /// sockets of each that were sent before.
    fn send_all(&self, line: &Line, sent: Vec<HashSet<u64>>) -> Result<(), GiveError> {
        let (tell, told) = mpsc::channel();
        let sent = sent.into_iter().chain(std::iter::repeat_with(HashSet::new));
        for (worker, before) in self.workers.iter().zip(sent) {
            let (tell, line) = (tell.clone(), line.clone());
            // Each worker sends what is its own, from its own thread.
            let send = move |state: WorkerState, sockets: &[(u64, BorrowedFd<'_>)]| {
                let sockets = sockets
                    .iter()
                    .filter(|(cookie, _)| !before.contains(cookie));
                let sockets: Vec<_> = sockets.map(|(_, socket)| *socket).collect();
                let body = Body::of(&Message::Worker(Box::new(state)));
                let sent = body.and_then(|body| line.lock().send_body(body, &sockets));
                // Who waits may have given up.
                let _ = tell.send(sent);
            };
            if !worker.tell(Command::HandOver(Box::new(send))) {
                return Err(GiveError::Worker);
            }
        }
        drop(tell);
        for _ in &self.workers {
            match told.recv_timeout(FROZEN * 2) {
                Ok(sent) => sent?,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    return Err(GiveError::Worker);
                }
            }
        }
        let last = Last {
            resting_ports: self.client_ports.resting(Instant::now()),
            servers: self.health.handed_over(),
            said: Some(since_boot()),
        };
        Ok(line.send(&Message::Last(last), &[])?)
    }

    fn ask<T>(&self, ask: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Result<T, GiveError> {
        let (reply, answer) = oneshot::channel();
        let ended = |_| GiveError::Refused("the process is ending".to_owned());
        self.asks.blocking_send(ask(reply)).map_err(|_| ended(()))?;
        answer.blocking_recv().map_err(|_| ended(()))
    }
}

/// Why a hand-over is refused.
const IS_TAKING: &str =
    "another process is taking over at this time; try again when it has or has failed";
pub(in crate::runtime) const IS_ENDING: &str = "the process is ending";

fn refused(why: &str) -> GiveError {
    GiveError::Refused(why.to_owned())
}

/// All that there is, in a socket that nobody reads yet.
pub(in crate::runtime) struct Queued {
    line: Line,
    /// `None` once that was asked.
    unread: Option<OwnedFd>,
}

impl Queued {
    /// The end that all is to be read from.
    pub(in crate::runtime) fn unread(&self) -> io::Result<OwnedFd> {
        let unread = self.unread.as_ref();
        unread.ok_or(io::ErrorKind::NotFound)?.try_clone()
    }

    /// Whether anybody has the end that all is to be read from, besides this process.
    pub(in crate::runtime) fn is_kept(&mut self) -> bool {
        self.unread.take();
        !self.line.lock().is_closed()
    }
}

/// A channel that workers share.
#[derive(Clone)]
struct Line(Arc<Mutex<Channel>>);

impl Line {
    fn new(channel: Channel) -> Self {
        Self(Arc::new(Mutex::new(channel)))
    }

    fn lock(&self) -> MutexGuard<'_, Channel> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, message: &Message, sockets: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        self.lock().send(message, sockets)
    }

    fn receive(&self) -> Result<Message, ChannelError> {
        Ok(self.lock().receive(Limits::WORDS)?.0)
    }

    fn expect(
        &self,
        name: &'static str,
        is_it: impl FnOnce(&Message) -> bool,
    ) -> Result<(), GiveError> {
        let said = self.receive()?;
        if is_it(&said) {
            return Ok(());
        }
        if let Message::Refused(why) = said {
            return Err(GiveError::Ended(why));
        }
        Err(GiveError::Disorder(said.name(), name))
    }
}
