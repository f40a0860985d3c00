//! What systemd, or another service manager with its protocol, is told of the proxy
//! (sd_notify(3)): that it is ready, reloads or stops, a line of status, and that its
//! workers answer. Without `NOTIFY_SOCKET`, nothing happens.
//!
//! The `sd-notify` crate words the messages. It does not send them: it knows no abstract
//! sockets, and waits where the socket is full.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram as StdUnixDatagram};
use std::time::Duration;

use futures_util::future::join_all;
use rustix::cmsg_space;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use sd_notify::NotifyState;
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::UnixDatagram;
use tokio::net::unix::pipe;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Interval, MissedTickBehavior};

use super::inherited::STATE;
use crate::admin::WorkerHandle;

/// The time between two lines of status. Each has the service manager tell its own readers.
pub(super) const STATUS_PAUSE: Duration = Duration::from_secs(5);

/// Messages that may wait while the service manager reads none. More are lost: some minutes
/// of status.
const MAX_WAITING: usize = 64;

/// How long the last messages may delay the end.
const LAST_MESSAGES: Duration = Duration::from_secs(1);

/// How long the service manager may take to have a descriptor in its store, or out of it.
const STORE: Duration = Duration::from_secs(5);

/// Rounds of asking workers in the time that the watchdog grants.
const ROUNDS: u32 = 3;

/// How long the service manager has to wait for the end beyond `drain_timeout`.
const END: Duration = Duration::from_secs(10);

/// The socket of the service manager, opened while the process may reach it: a user that it
/// switches to may not.
pub struct NotifySocket {
    name: OsString,
    opened: io::Result<(SocketAddr, StdUnixDatagram)>,
}

impl NotifySocket {
    /// The one that the environment names, if it names one.
    #[must_use]
    pub fn of_environment() -> Option<Self> {
        let name = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty())?;
        let opened = address_of(&name).and_then(|address| {
            let socket = open(&address)?;
            Ok((address, socket))
        });
        Some(Self { name, opened })
    }
}

/// The service manager that started the process, if one did that wants to be told.
pub(super) struct ServiceManager {
    /// Messages in their order, and what sends them.
    sending: Option<(mpsc::Sender<Message>, JoinHandle<()>)>,
    watchdog: Option<Watchdog>,
    /// The last status.
    status: String,
}

/// What the service manager is told.
struct Message {
    text: String,
    /// What goes with it.
    descriptor: Option<OwnedFd>,
    /// Who wants to know whether it was sent.
    sent: Option<oneshot::Sender<io::Result<()>>>,
}

impl Message {
    fn of(states: &[NotifyState<'_>]) -> Self {
        let mut text = String::new();
        for state in states {
            let _ = writeln!(text, "{state}");
        }
        Self {
            text,
            descriptor: None,
            sent: None,
        }
    }
}

impl ServiceManager {
    /// The one behind `socket`.
    pub(super) fn new(socket: Option<NotifySocket>) -> Self {
        let sending = socket.and_then(|NotifySocket { name, opened }| {
            let sent = opened.and_then(|(address, socket)| {
                let (messages, receiver) = mpsc::channel(MAX_WAITING);
                let socket = UnixDatagram::from_std(socket)?;
                Ok((messages, tokio::spawn(send_all(address, socket, receiver))))
            });
            sent.inspect_err(|error| {
                tracing::warn!(
                    "the service manager is not told that the proxy is ready: NOTIFY_SOCKET {}: {error}",
                    name.display()
                );
            })
            .ok()
        });
        Self {
            sending,
            watchdog: None,
            status: String::new(),
        }
    }

    /// Has it watch these workers, if it wants to.
    pub(super) fn watch(&mut self, workers: Vec<WorkerHandle>) {
        let granted = sd_notify::watchdog_enabled().filter(|granted| !granted.is_zero());
        let granted = granted.filter(|_| self.sending.is_some());
        self.watchdog = granted.map(|granted| Watchdog::new(granted, workers));
    }

    /// Has it store a descriptor for the next process, in place of one from before. It has it
    /// when this returns.
    pub(super) async fn store(&self, descriptor: OwnedFd) -> io::Result<()> {
        self.forget();
        let name = format!("FDNAME={STATE}");
        // FDPOLL=0: it would be taken out as soon as the other end is closed.
        let mut message = Message::of(&["FDSTORE=1", "FDPOLL=0", &name].map(NotifyState::Custom));
        message.descriptor = Some(descriptor);
        self.send(message).await?;
        self.barrier().await
    }

    /// Has it forget what an earlier process has left.
    pub(super) fn forget(&self) {
        let name = format!("FDNAME={STATE}");
        self.tell(&["FDSTOREREMOVE=1", &name].map(NotifyState::Custom));
    }

    /// Waits until it has read all messages (sd_notify_barrier(3)).
    pub(super) async fn barrier(&self) -> io::Result<()> {
        let (reader, writer) = io::pipe()?;
        let mut message = Message::of(&[NotifyState::Custom("BARRIER=1")]);
        message.descriptor = Some(writer.into());
        self.send(message).await?;
        let mut reader = pipe::Receiver::from_owned_fd(reader.into())?;
        match tokio::time::timeout(STORE, reader.read(&mut [0])).await {
            Ok(read) => read.map(drop),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// Sends a message, and waits until that is done.
    async fn send(&self, mut message: Message) -> io::Result<()> {
        let Some((messages, _)) = &self.sending else {
            return Err(io::Error::other("there is no service manager"));
        };
        let (tell, told) = oneshot::channel();
        message.sent = Some(tell);
        let sent = async {
            messages.send(message).await.map_err(io::Error::other)?;
            told.await.map_err(io::Error::other)?
        };
        let sent = tokio::time::timeout(STORE, sent).await;
        sent.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// Tells that the proxy serves, at the start and after a reload.
    pub(super) fn ready(&mut self, status: String) {
        self.tell(&[NotifyState::Ready, NotifyState::Status(&status)]);
        self.status = status;
    }

    /// Tells that this process has taken the place of another one.
    pub(super) fn took_over(&self) {
        self.tell(&[NotifyState::MainPid(std::process::id())]);
    }

    /// Tells that a reload has begun. [`ready`](Self::ready) ends it.
    pub(super) fn reloading(&self) {
        // Since systemd 253, one without the other fails.
        if let Ok(now) = NotifyState::monotonic_usec_now() {
            self.tell(&[NotifyState::Reloading, now]);
        }
    }

    /// Tells that the proxy stops, and how long that may take.
    pub(super) fn stopping(&self, drain_timeout: Duration) {
        let longest = drain_timeout.saturating_add(END).as_micros();
        self.tell(&[
            NotifyState::Stopping,
            NotifyState::Status("shutting down: waiting for outstanding replies"),
            NotifyState::Custom(&format!("EXTEND_TIMEOUT_USEC={longest}")),
        ]);
    }

    /// Tells that the process ends, and that the next one goes on with its sessions.
    pub(super) fn leaving(&self) {
        self.tell(&[
            NotifyState::Stopping,
            NotifyState::Status("leaving sessions to the next process"),
        ]);
    }

    /// Tells how the proxy is, if that is new.
    pub(super) fn status(&mut self, status: String) {
        if self.status != status {
            self.tell(&[NotifyState::Status(&status)]);
            self.status = status;
        }
    }

    /// Waits until workers have been asked for the watchdog, for ever if there is none. Nothing
    /// is lost if the future is dropped.
    pub(super) async fn asked(&mut self) -> Answers {
        match &mut self.watchdog {
            Some(watchdog) => watchdog.asked().await,
            None => std::future::pending().await,
        }
    }

    /// Has the watchdog know that the proxy is well, if all workers answer.
    pub(super) fn guard(&mut self, answers: &Answers) {
        if answers.silent.is_empty() {
            self.tell(&[NotifyState::Watchdog]);
        }
        let Some(watchdog) = &mut self.watchdog else {
            return;
        };
        match (answers.silent.is_empty(), watchdog.is_warned) {
            (false, false) => tracing::error!(
                workers = ?answers.silent,
                "workers do not answer; the service manager restarts the proxy unless they do in time"
            ),
            (true, true) => tracing::info!("all workers answer again"),
            _ => {}
        }
        watchdog.is_warned = !answers.silent.is_empty();
    }

    fn tell(&self, states: &[NotifyState<'_>]) {
        let Some((messages, _)) = &self.sending else {
            return;
        };
        if let Err(TrySendError::Full(_)) = messages.try_send(Message::of(states)) {
            tracing::debug!("the service manager reads no messages");
        }
    }

    /// Waits a moment until all messages are sent.
    pub(super) async fn finish(self) {
        if let Some((messages, sent)) = self.sending {
            drop(messages);
            // What is not read by then is lost.
            let _ = tokio::time::timeout(LAST_MESSAGES, sent).await;
        }
    }
}

/// What workers have answered.
pub(super) struct Answers {
    /// The numbers of those that have not.
    silent: Vec<usize>,
}

/// Asks workers in time for the watchdog. The loop that sees to everything else drives it,
/// so the watchdog also ends a process whose loop stands still.
struct Watchdog {
    workers: Vec<WorkerHandle>,
    rounds: Interval,
    /// At most one round.
    asking: JoinSet<Answers>,
    is_warned: bool,
}

impl Watchdog {
    fn new(granted: Duration, workers: Vec<WorkerHandle>) -> Self {
        let mut rounds = tokio::time::interval(granted / ROUNDS);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            workers,
            rounds,
            asking: JoinSet::new(),
            is_warned: false,
        }
    }

    async fn asked(&mut self) -> Answers {
        loop {
            tokio::select! {
                Some(Ok(answers)) = self.asking.join_next() => return answers,
                _ = self.rounds.tick(), if self.asking.is_empty() => {
                    self.asking.spawn(ask(self.workers.clone()));
                }
            }
        }
    }
}

async fn ask(workers: Vec<WorkerHandle>) -> Answers {
    let stuck = join_all(workers.iter().map(WorkerHandle::is_stuck)).await;
    let silent = (0..).zip(stuck).filter(|(_, is_stuck)| *is_stuck);
    Answers {
        silent: silent.map(|(number, _)| number).collect(),
    }
}

/// The address that `NOTIFY_SOCKET` names: a path, or an abstract one after `@`.
fn address_of(name: &OsStr) -> io::Result<SocketAddr> {
    match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        [b'/', ..] => SocketAddr::from_pathname(name),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "neither a path nor an abstract socket (@NAME)",
        )),
    }
}

fn open(address: &SocketAddr) -> io::Result<StdUnixDatagram> {
    let socket = StdUnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.connect_addr(address)?;
    Ok(socket)
}

async fn send_one(socket: &UnixDatagram, message: &Message) -> io::Result<()> {
    let Some(descriptor) = &message.descriptor else {
        return socket.send(message.text.as_bytes()).await.map(drop);
    };
    let send = || {
        let descriptors = [descriptor.as_fd()];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
        let text = [IoSlice::new(message.text.as_bytes())];
        Ok(sendmsg(socket, &text, &mut control, SendFlags::NOSIGNAL)?)
    };
    socket.async_io(Interest::WRITABLE, send).await.map(drop)
}

/// Sends messages until no more will come.
async fn send_all(
    address: SocketAddr,
    mut socket: UnixDatagram,
    mut messages: mpsc::Receiver<Message>,
) {
    let mut is_warned = false;
    while let Some(message) = messages.recv().await {
        let mut sent = send_one(&socket, &message).await;
        // The service manager may have begun again, with another socket.
        if sent.is_err()
            && let Ok(another) = open(&address).and_then(UnixDatagram::from_std)
        {
            socket = another;
            sent = send_one(&socket, &message).await;
        }
        if let Some(asker) = message.sent {
            // Who asked may have given up.
            let _ = asker.send(sent);
        } else if let Err(error) = sent
            && !is_warned
        {
            is_warned = true;
            tracing::warn!("the service manager can't be told how the proxy is: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_paths_or_abstract() {
        let abstract_name = address_of(OsStr::new("@ppv2/test")).unwrap();
        assert_eq!(abstract_name.as_abstract_name(), Some(&b"ppv2/test"[..]));
        let path = address_of(OsStr::new("/run/systemd/notify")).unwrap();
        assert_eq!(path.as_pathname(), Some("/run/systemd/notify".as_ref()));
        let long = format!("/{}", "x".repeat(200));
        for other in ["notify", "vsock:2:1", long.as_str()] {
            assert!(address_of(OsStr::new(other)).is_err(), "{other}");
        }
    }
}
