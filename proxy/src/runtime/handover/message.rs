//! What two processes of the proxy say to each other when one goes on with what the other has.
//!
//! ```text
//! new process                                 old process
//!     │ Hello ──────────────────────────────────▶ │  which format?
//!     │ ◀────────────────────────────────── Offer │  addresses, sockets of the control path
//!   reads its configuration, resolves names,      │  goes on as before
//!   binds what is new, starts its workers         │
//!     │ Begin ──────────────────────────────────▶ │
//!     │ ◀──────────── Sockets, Sockets … Previewed │  those that there are, ahead of time
//!     │ Freeze ─────────────────────────────────▶ │  workers stop to look at their sockets
//!     │ ◀────────────────── Worker, Worker … Last │  all sockets and sessions
//!   takes them over, looks at none yet            │
//!     │ Ready ──────────────────────────────────▶ │
//!     │ ◀────────────────────────────────── Yours │  the old one only goes on if the
//!   its workers go on with them                   │  connection closes now
//!     │ Running ────────────────────────────────▶ │  exits
//! ```
//!
//! A process that closes the connection doesn't look at the sockets, or never again: so one of
//! the two does at any time, and whichever fails leaves them to the other. An old process that
//! ends after `Last` leaves all to the new one, too.

use std::net::SocketAddr;
use std::time::Duration;

use ppv2_engine::client_ports::RestingPort;
use ppv2_engine::handover::{Address, WorkerState};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// The format of all that is said after the first message. Fields may be added, with a default,
/// and none may change its meaning; whatever else changes takes another number.
pub(super) const FORMAT: u32 = 1;

/// One message.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Message {
    /// Who asks, and in which format.
    Hello(Hello),
    /// What there is, with the sockets that `Offer` counts.
    Offer(Offer),
    /// Send sockets ahead of time.
    Begin,
    /// Some sockets of the worker of this number.
    Sockets(usize),
    /// Nearly all sockets are there.
    Previewed,
    /// Stop to look at the sockets, and send all.
    Freeze,
    /// What one worker has, with those of its sockets that were not sent before.
    Worker(Box<WorkerState>),
    /// What all workers have together. It is the last.
    Last(Last),
    /// All is taken over.
    Ready,
    /// Go on with it.
    Yours,
    /// The workers go on.
    Running(Running),
    /// There will be none, and why.
    Refused(String),
}

impl Message {
    /// The message's name, for errors.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "Hello",
            Self::Offer(_) => "Offer",
            Self::Begin => "Begin",
            Self::Sockets(_) => "Sockets",
            Self::Previewed => "Previewed",
            Self::Freeze => "Freeze",
            Self::Worker(_) => "Worker",
            Self::Last(_) => "Last",
            Self::Ready => "Ready",
            Self::Yours => "Yours",
            Self::Running(_) => "Running",
            Self::Refused(_) => "Refused",
        }
    }
}

/// Who asks.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Hello {
    /// The only [`FORMAT`] that it knows.
    pub(in crate::runtime) format: u32,
    /// Its version.
    pub(in crate::runtime) version: String,
    /// Its process id.
    pub(in crate::runtime) process: u32,
}

/// What there is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(in crate::runtime) struct Offer {
    /// The [`FORMAT`] that follows.
    pub(in crate::runtime) format: u32,
    /// The version of the process.
    pub(in crate::runtime) version: String,
    /// Its id.
    pub(in crate::runtime) process: u32,
    /// How many workers there are.
    pub(in crate::runtime) workers: usize,
    /// Addresses that listeners have sockets at.
    pub(in crate::runtime) addresses: Vec<Address>,
    /// Fixed ports of source networks that workers have.
    pub(in crate::runtime) source_ports: Vec<Address>,
    /// How many sockets workers have together, about.
    pub(in crate::runtime) sockets: usize,
    /// Servers that are not as the configuration alone says.
    pub(in crate::runtime) servers: Vec<ServerStanding>,
    /// Where the admin API is served; its socket comes along.
    pub(in crate::runtime) admin: Option<String>,
    /// The file of that socket is the proxy's to remove.
    pub(in crate::runtime) has_admin_file: bool,
    /// Where upgrades are asked for; its socket comes along, behind that of the admin API.
    pub(in crate::runtime) upgrade: Option<String>,
    /// A descriptor of the process comes along, behind the sockets.
    pub(in crate::runtime) has_process: bool,
}

impl Offer {
    /// Of this process.
    pub(in crate::runtime) fn of_this_process() -> Self {
        Self {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            process: std::process::id(),
            ..Self::default()
        }
    }

    /// How many descriptors come along.
    pub(super) fn descriptors(&self) -> usize {
        let sockets = [self.admin.is_some(), self.upgrade.is_some()];
        sockets.into_iter().map(usize::from).sum::<usize>() + usize::from(self.has_process)
    }

    pub(super) fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.addresses.iter().copied().map(SocketAddr::from)
    }

    pub(super) fn source_ports(&self) -> impl Iterator<Item = SocketAddr> {
        self.source_ports.iter().copied().map(SocketAddr::from)
    }
}

/// What all workers have together.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Last {
    /// Clients' own ports that rest.
    pub(super) resting_ports: Vec<RestingPort>,
    /// As [`Offer::servers`], which may be old by now.
    pub(super) servers: Vec<ServerStanding>,
    /// When it was said, as time since the host began; it is read much later if it is left in a
    /// store.
    pub(super) said: Option<Duration>,
}

/// The time since the host began, the same for all processes.
pub(super) fn since_boot() -> Duration {
    clock_gettime(ClockId::Boottime)
        .try_into()
        .unwrap_or_default()
}

/// How a server stands, as far as the configuration does not say it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ServerStanding {
    /// Its upstream.
    pub(crate) upstream: String,
    /// Its address.
    pub(crate) address: Option<Address>,
    /// Health checks have found it down.
    pub(crate) is_down: bool,
    /// An operator has asked for it to be drained, or not to be.
    pub(crate) drain: Option<bool>,
}

/// What the new process goes on with besides.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(in crate::runtime) struct Running {
    /// The socket of the admin API.
    pub(in crate::runtime) keeps_admin: bool,
    /// The socket on which upgrades are asked for.
    pub(in crate::runtime) keeps_upgrade: bool,
}
