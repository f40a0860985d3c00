//! A snapshot: all that the control path tells workers, as it is at one time. A worker
//! that gets another one compares its sessions with it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use crate::listener::{Listener, ListenerSettings};
use crate::server::{Server, Target};
use crate::session::Ended;
use crate::upstream::{ByFamily, Plan};

/// Listeners, their servers and where sessions go.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Another one for each snapshot.
    pub version: u64,
    /// All listeners, and those that are gone while sessions of theirs go on.
    pub listeners: Listeners,
    /// The listener of each address, by its place in `listeners`.
    pub bound: BTreeMap<SocketAddr, usize>,
    /// Addresses at which sessions go on and none begins. At those that are neither here
    /// nor in `bound`, sessions end.
    pub closing: BTreeSet<SocketAddr>,
    /// How workers spend their time between datagrams.
    pub pauses: Pauses,
    /// Where workers tell of each session that has ended.
    pub log: Option<SyncSender<Ended>>,
}

/// A listener, its servers and where its sessions go.
#[derive(Clone, Debug)]
pub struct ListenerSnapshot {
    /// What the configuration says of it.
    pub settings: Arc<ListenerSettings>,
    /// The servers of its upstream.
    pub targets: Arc<Targets>,
    /// Where its sessions go.
    pub routing: Routing,
}

/// How a worker spends its time between datagrams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pauses {
    /// Look for datagrams again and again for so long before going to sleep.
    pub busy_poll: Duration,
    /// After a wake-up that brought few, let more gather for so long.
    pub coalesce: Duration,
}

/// Listeners, each with its place.
#[derive(Clone, Debug, Default)]
pub struct Listeners {
    all: Vec<ListenerSnapshot>,
    places: HashMap<u64, usize>,
}

/// The servers of a listener: those that its plans name by their place here, then those
/// that sessions may stay with.
#[derive(Debug, Default)]
pub struct Targets {
    all: Vec<Target>,
    places: HashMap<u64, usize>,
}

/// Where the sessions of a listener go: what changes when a server goes down, comes back
/// or drains.
#[derive(Clone, Debug)]
pub struct Routing {
    /// How new sessions are spread.
    pub plans: ByFamily<Arc<Plan>>,
    /// By the target's place.
    pub rules: Vec<TargetRules>,
}

/// What becomes of sessions with a server. Of IPv4 clients, and of IPv6 ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TargetRules {
    /// They go to another server at their client's next datagram.
    pub leave: ByFamily<bool>,
    /// Sessions of clients that new sessions would bring here come back.
    pub takes_back: ByFamily<bool>,
    /// They stay, whichever server takes its clients back.
    pub is_draining: bool,
}

impl Snapshot {
    /// What there is of this listener.
    #[must_use]
    pub fn of(&self, listener: &Listener) -> Option<&ListenerSnapshot> {
        self.listeners.of(listener)
    }

    /// All servers of all listeners.
    pub fn targets(&self) -> impl Iterator<Item = &Target> {
        self.listeners.iter().flat_map(|one| one.targets.iter())
    }
}

impl Listeners {
    /// Those in this place.
    #[must_use]
    pub fn get(&self, place: usize) -> Option<&ListenerSnapshot> {
        self.all.get(place)
    }

    /// What there is of this listener.
    #[must_use]
    pub fn of(&self, listener: &Listener) -> Option<&ListenerSnapshot> {
        self.get(*self.places.get(&listener.id())?)
    }

    /// All, in their order.
    pub fn iter(&self) -> impl Iterator<Item = &ListenerSnapshot> {
        self.all.iter()
    }

    /// How many they are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.all.len()
    }
}

impl FromIterator<ListenerSnapshot> for Listeners {
    fn from_iter<I: IntoIterator<Item = ListenerSnapshot>>(all: I) -> Self {
        let all: Vec<_> = all.into_iter().collect();
        let places = all.iter().enumerate();
        let places = places.map(|(place, one)| (one.settings.listener.id(), place));
        Self {
            places: places.collect(),
            all,
        }
    }
}

impl Targets {
    /// These servers, in this order.
    #[must_use]
    pub fn new(all: Vec<Target>) -> Self {
        let places = all.iter().enumerate();
        let places = places.map(|(place, target)| (target.server.id(), place));
        Self {
            places: places.collect(),
            all,
        }
    }

    /// Those in this place.
    #[must_use]
    pub fn get(&self, place: usize) -> Option<&Target> {
        self.all.get(place)
    }

    /// Where a server is.
    #[must_use]
    pub fn place(&self, server: &Server) -> Option<usize> {
        self.places.get(&server.id()).copied()
    }

    /// What is said of a server.
    #[must_use]
    pub fn of(&self, server: &Server) -> Option<&Target> {
        self.get(self.place(server)?)
    }

    /// All, in their order.
    pub fn iter(&self) -> impl Iterator<Item = &Target> {
        self.all.iter()
    }
}

impl PartialEq for Targets {
    fn eq(&self, other: &Self) -> bool {
        self.all == other.all
    }
}

impl Routing {
    /// No session begins, and none moves.
    #[must_use]
    pub fn staying(targets: &Targets) -> Self {
        Self {
            rules: vec![TargetRules::default(); targets.all.len()],
            ..Self::default()
        }
    }
}

impl Default for Routing {
    fn default() -> Self {
        let none = Arc::new(Plan::none());
        Self {
            plans: ByFamily::new(|_| Arc::clone(&none)),
            rules: Vec::new(),
        }
    }
}
