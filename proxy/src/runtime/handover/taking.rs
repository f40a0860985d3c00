//! The process that goes on with all that another one has.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use ppv2_engine::client_ports::RestingPort;
use ppv2_engine::handover::{
    Inherited, NotTaken, PathState, ServerState, TakeOver, TakenOver, WorkerState,
};
use ppv2_engine::server::Server;
use ppv2_udp::Adoptable;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;

use super::channel::{Body, Channel, ChannelError, Limits, make_room};
use super::message::{FORMAT, Hello, Last, Message, Offer, Running, ServerStanding, since_boot};
use super::{FROZEN, HELLO, is_trusted};

/// How long a process that has closed its connection may take to end.
const END: Duration = Duration::from_secs(2);

/// Why nothing was taken over. The other process goes on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TakeError {
    /// Nobody hands over there.
    #[error(
        "no process hands over at {}: {error}; `[upgrade] socket` of the running proxy says where it does",
        path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// The other process does not want to, or is not trusted.
    #[error("nothing was taken over: {0}")]
    Refused(String),
    /// The connection failed.
    #[error("nothing was taken over: {0}; the log of the other process says more")]
    Failed(String),
}

impl From<ChannelError> for TakeError {
    fn from(error: ChannelError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<io::Error> for TakeError {
    fn from(error: io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Another process, which hands over.
#[derive(Debug)]
pub(in crate::runtime) struct Taking {
    channel: Channel,
    /// The other process has ended, and said all that there is.
    is_queued: bool,
    offer: Offer,
    /// All that it said.
    queued: Option<Estate>,
    /// Becomes readable when the other process has ended.
    process: Option<OwnedFd>,
    /// The socket of the admin API.
    pub(in crate::runtime) admin: Option<OwnedFd>,
    /// The socket on which upgrades are asked for.
    pub(in crate::runtime) upgrade: Option<OwnedFd>,
}

/// What a worker has, with its sockets by their cookies.
type Received = (WorkerState, Sockets);

/// Sockets by their cookies.
type Sockets = HashMap<u64, Adoptable>;

/// All that was handed over.
#[derive(Debug)]
pub(in crate::runtime) struct Estate {
    workers: Vec<Received>,
    /// What all workers have together.
    last: Last,
}

/// Whether a process hands over at `path`, or something else is wrong there than that none does.
#[must_use]
pub fn hands_over(path: &Path) -> bool {
    // A process that gets a connection without a word says nothing of it.
    let kind = UnixStream::connect(path).map_err(|error| error.kind());
    !matches!(
        kind,
        Err(io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
    )
}

impl Taking {
    /// Asks the process that listens at `path` what it has.
    ///
    /// # Errors
    ///
    /// [`TakeError`] if there is none, or it hands nothing over.
    pub(in crate::runtime) fn connect(path: &Path) -> Result<Self, TakeError> {
        let stream = UnixStream::connect(path).map_err(|error| TakeError::Connect {
            path: path.to_owned(),
            error,
        })?;
        is_trusted(&stream).map_err(TakeError::Refused)?;
        let mut channel = Channel::new(stream);
        channel.set_timeout(Some(HELLO))?;
        let hello = Hello {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            process: std::process::id(),
        };
        channel.send(&Message::Hello(hello), &[])?;
        Self::of(channel, false)
    }

    /// What another process has left in a socket, by
    /// [`Giver::queue`](super::Giver::queue), of which [`read`](Self::read) reads the rest. Best
    /// called while the process has a single thread: to make room for descriptors takes no time
    /// then, and nobody looks at the sockets meanwhile.
    pub(in crate::runtime) fn queued(socket: OwnedFd) -> Result<Self, TakeError> {
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(false)?;
        let mut channel = Channel::new(stream);
        channel.set_timeout(Some(HELLO))?;
        let taking = Self::of(channel, true)?;
        taking.make_room()?;
        Ok(taking)
    }

    /// Reads all that another process has left.
    pub(in crate::runtime) fn read(mut self) -> Result<Self, TakeError> {
        self.queued = Some(self.take()?);
        Ok(self)
    }

    /// Has the kernel make room for all descriptors, and some that are made meanwhile.
    fn make_room(&self) -> io::Result<()> {
        make_room(self.offer.sockets + self.offer.sockets / 8)
    }

    /// Reads what is offered.
    fn of(channel: Channel, is_queued: bool) -> Result<Self, TakeError> {
        let limits = Limits {
            descriptors: 3,
            ..Limits::STATE
        };
        let (said, sockets) = receive(&channel, limits)?;
        let Message::Offer(offer) = said else {
            return Err(disorder(&said, "Offer"));
        };
        if offer.format != FORMAT {
            return Err(TakeError::Refused(format!(
                "process {} (version {}) hands over in format {}, and this one takes over in format {FORMAT}",
                offer.process, offer.version, offer.format
            )));
        }
        if sockets.len() != offer.descriptors() {
            return Err(TakeError::Failed(
                "the other process offers sockets that it does not send".to_owned(),
            ));
        }
        let mut sockets = sockets.into_iter();
        let admin = offer.admin.as_ref().and_then(|_| sockets.next());
        let upgrade = offer.upgrade.as_ref().and_then(|_| sockets.next());
        Ok(Self {
            channel,
            is_queued,
            offer,
            queued: None,
            process: sockets.next(),
            admin,
            upgrade,
        })
    }

    /// Addresses that the other process's listeners have sockets at.
    pub(in crate::runtime) fn addresses(&self) -> BTreeSet<SocketAddr> {
        self.offer.addresses().collect()
    }

    /// Fixed ports of source networks that its workers have.
    pub(in crate::runtime) fn source_ports(&self) -> BTreeSet<SocketAddr> {
        self.offer.source_ports().collect()
    }

    /// Whether the other process has ended before this one began.
    pub(in crate::runtime) fn is_queued(&self) -> bool {
        self.is_queued
    }

    /// What it offers.
    pub(in crate::runtime) fn offer(&self) -> &Offer {
        &self.offer
    }

    /// Has the other process stop to look at its sockets, and takes them and its sessions.
    pub(in crate::runtime) fn take(&mut self) -> Result<Estate, TakeError> {
        if let Some(estate) = self.queued.take() {
            return Ok(estate);
        }
        self.make_room()?;
        self.channel.set_timeout(Some(FROZEN))?;
        let mut before = HashMap::new();
        if !self.is_queued {
            self.channel.send(&Message::Begin, &[])?;
            before = self.receive_sockets()?;
            self.channel.send(&Message::Freeze, &[])?;
        }
        let (mut workers, mut last) = self.receive_all()?;
        let passed = last.said.map(|said| since_boot().saturating_sub(said));
        let passed = passed.unwrap_or_default();
        for (state, _) in &mut workers {
            state.pass(passed);
        }
        for port in &mut last.resting_ports {
            port.since = port.since.saturating_add(passed);
        }
        for (state, sockets) in &mut workers {
            if let Some(mut before) = before.remove(&state.worker) {
                before.extend(sockets.drain());
                *sockets = before;
            }
        }
        let known: HashSet<SocketAddr> = self.offer.addresses().collect();
        let states = || workers.iter().map(|(state, _)| state);
        let listeners = || states().flat_map(|one| &one.listener_sockets);
        let found: HashSet<_> = listeners().map(|one| one.bound.into()).collect();
        if let Some(missing) = known.difference(&found).next() {
            return Err(TakeError::Failed(format!(
                "the other process has no socket for {missing} any more"
            )));
        }
        let mut listeners = listeners();
        if let Some(new) = listeners.find(|one| !known.contains(&one.bound.into())) {
            return Err(TakeError::Refused(format!(
                "the other process has begun to listen at {} meanwhile; try again",
                SocketAddr::from(new.bound)
            )));
        }
        Ok(Estate { workers, last })
    }

    /// Receives the sockets of each worker that are sent ahead of time, by its number.
    fn receive_sockets(&self) -> Result<HashMap<usize, Sockets>, TakeError> {
        let mut all = HashMap::<_, Sockets>::new();
        loop {
            let (said, descriptors) = receive(&self.channel, Limits::STATE)?;
            if let Message::Sockets(worker) = said {
                all.entry(worker).or_default().extend(checked(descriptors)?);
            } else if let Message::Previewed = said {
                return Ok(all);
            } else {
                return Err(disorder(&said, "Sockets"));
            }
        }
    }

    /// Receives what each worker has, and what they have together. Threads of their own read
    /// what workers have, since nobody looks at their sockets meanwhile.
    fn receive_all(&self) -> Result<(Vec<Received>, Last), TakeError> {
        thread::scope(|scope| {
            let mut reading = Vec::new();
            let last = loop {
                let (body, sockets) = self.channel.receive_body(Limits::STATE)?;
                if !sockets.is_empty() {
                    reading.push(scope.spawn(move || read(body, sockets)));
                    continue;
                }
                let said = body.read()?;
                if let Message::Last(last) = said {
                    break last;
                }
                if let Message::Refused(why) = said {
                    return Err(TakeError::Refused(why));
                }
                reading.push(scope.spawn(move || state_of(said, HashMap::new())));
            };
            let read = reading.into_iter().map(|thread| match thread.join() {
                Ok(read) => read,
                Err(_) => Err(TakeError::Failed("reading what came has failed".to_owned())),
            });
            Ok((read.collect::<Result<_, _>>()?, last))
        })
    }

    /// Has the other process let go of all, which this one's workers then go on with.
    pub(in crate::runtime) fn claim(&self) -> Result<(), TakeError> {
        if self.is_queued {
            return Ok(());
        }
        let sent = self.channel.send(&Message::Ready, &[]);
        match sent.and_then(|()| self.channel.receive(Limits::WORDS)) {
            Ok((Message::Yours, _)) => Ok(()),
            Ok((Message::Refused(why), _)) => Err(TakeError::Refused(why)),
            Ok((said, _)) => Err(disorder(&said, "Yours")),
            Err(ChannelError::Closed) if self.has_ended() => {
                tracing::warn!("the other process has ended before it let go of what it had");
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Whether the other process is no more, which has closed the connection. A process that
    /// ends does so a moment before; one that goes on with all has it closed as well.
    fn has_ended(&self) -> bool {
        let Some(process) = &self.process else {
            return false;
        };
        let mut ended = [PollFd::new(process, PollFlags::IN)];
        // It fails for what is no process at all.
        let polled = poll(&mut ended, Timespec::try_from(END).ok().as_ref());
        polled.is_ok() && ended[0].revents().contains(PollFlags::IN)
    }

    /// Tells the other process that it may end.
    pub(in crate::runtime) fn dismiss(&self, running: Running) {
        if self.is_queued {
            return;
        }
        if let Err(error) = self.channel.send(&Message::Running(running), &[]) {
            tracing::warn!("the other process can't be told that it may end: {error}");
        }
    }
}

impl Estate {
    /// How servers stand.
    pub(in crate::runtime) fn servers(&self) -> &[ServerStanding] {
        &self.last.servers
    }

    /// Clients' own ports that rest.
    pub(in crate::runtime) fn resting_ports(&self) -> &[RestingPort] {
        &self.last.resting_ports
    }

    /// Shares it out to so many workers. Each gets the whole of some of the former workers':
    /// no client's datagrams then come to another one than before. `server_of` finds the object
    /// of a server.
    pub(in crate::runtime) fn share_out(
        self,
        count: usize,
        mut server_of: impl FnMut(&ServerState) -> Arc<Server>,
        done: impl Fn(TakenOver) + Clone + Send + 'static,
    ) -> Vec<TakeOver> {
        let addresses: Arc<[_]> = network_addresses(&self.workers).into();
        let networks = self.workers.iter().flat_map(|(state, _)| &state.networks);
        let networks: Arc<[_]> = networks.cloned().collect();
        let given_back = Arc::default();
        let mut shares: Vec<Vec<Inherited>> = (0..count).map(|_| Vec::new()).collect();
        let mut sockets: Vec<HashMap<_, _>> = (0..count).map(|_| HashMap::new()).collect();
        for (number, (state, its)) in self.workers.into_iter().enumerate() {
            let number = number % count.max(1);
            if sockets[number].is_empty() {
                sockets[number] = its;
            } else {
                sockets[number].extend(its);
            }
            let servers = state.servers.iter().map(&mut server_of).collect();
            shares[number].push(Inherited { state, servers });
        }
        let shares = shares.into_iter().zip(sockets);
        let shares = shares.map(|(states, sockets)| TakeOver {
            states,
            sockets,
            networks: Arc::clone(&networks),
            network_addresses: Arc::clone(&addresses),
            given_back: Arc::clone(&given_back),
            done: Box::new(done.clone()),
        });
        shares.collect()
    }
}

/// Addresses of source networks that sessions have, or had so long ago: the longest first.
fn network_addresses(workers: &[Received]) -> Vec<(IpAddr, Option<Duration>)> {
    let states = || workers.iter().map(|(state, _)| state);
    let sessions = states().flat_map(|one| &one.sessions);
    let in_use = sessions.filter_map(|session| match session.path {
        PathState::Network { source, .. } => Some((source, None)),
        PathState::Own { .. } | PathState::Tagged { .. } => None,
    });
    let networks = states().flat_map(|one| &one.networks);
    let resting = networks.flat_map(|network| &network.resting);
    let mut resting: Vec<_> = resting.map(|(ip, ended)| (*ip, Some(*ended))).collect();
    resting.sort_by_key(|(_, ended)| std::cmp::Reverse(*ended));
    in_use.chain(resting).collect()
}

/// What came of it, in words.
///
/// # Errors
///
/// If it can't go on so.
pub(in crate::runtime) fn summary(taken: &[TakenOver]) -> Result<String, TakeError> {
    let mut failed = taken.iter().flat_map(|one| &one.failed);
    if let Some(address) = failed.next() {
        return Err(TakeError::Failed(format!(
            "the socket at {address} can't be used"
        )));
    }
    let sessions: usize = taken.iter().map(|one| one.sessions).sum();
    let mut ended: HashMap<NotTaken, usize> = HashMap::new();
    for (why, count) in taken.iter().flat_map(|one| &one.ended) {
        *ended.entry(*why).or_default() += count;
    }
    let mut text = format!("{sessions} sessions go on");
    for (why, count) in ended {
        text += &format!("; {count} have ended, since {why}");
    }
    Ok(text)
}

fn checked(descriptors: Vec<OwnedFd>) -> Result<Sockets, TakeError> {
    let sockets = descriptors.into_iter().map(|descriptor| {
        let socket = Adoptable::check(descriptor)?;
        Ok((socket.cookie(), socket))
    });
    Ok(sockets.collect::<io::Result<_>>()?)
}

fn read(body: Body, descriptors: Vec<OwnedFd>) -> Result<Received, TakeError> {
    state_of(body.read()?, checked(descriptors)?)
}

fn state_of(said: Message, sockets: Sockets) -> Result<Received, TakeError> {
    let Message::Worker(state) = said else {
        return Err(disorder(&said, "Worker"));
    };
    Ok((*state, sockets))
}

fn receive(channel: &Channel, limits: Limits) -> Result<(Message, Vec<OwnedFd>), TakeError> {
    match channel.receive(limits)? {
        (Message::Refused(why), _) => Err(TakeError::Refused(why)),
        said => Ok(said),
    }
}

fn disorder(said: &Message, expected: &str) -> TakeError {
    let said = said.name();
    TakeError::Failed(format!(
        "the other process said {said} where {expected} belongs"
    ))
}
