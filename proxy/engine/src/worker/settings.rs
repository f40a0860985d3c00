//! What a worker is given: its sockets, what it must know of listeners and servers,
//! and what it shares with others; and what of that can change while it runs.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Duration;

use ipnet::IpNet;

use super::{Claims, Command, Ended};
use crate::counters::{DropReason, WorkerCounters};
use crate::session::{Budget, Clients, Rates, Rules};
use crate::upstream::{Server, Steering};
use ppv2_udp::{Options, Socket};

/// How a worker spends its time between datagrams.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    /// Look for datagrams again and again for so long before going to sleep.
    pub busy_poll: Duration,
    /// After a wake-up that brought few, let more gather for so long.
    pub coalesce: Duration,
}

/// What a worker must know of a listener.
#[derive(Clone, Debug)]
pub struct ListenerSettings {
    /// What it goes by in logs and metrics.
    pub name: Arc<str>,
    /// When its sessions end.
    pub rules: Rules,
    /// Clients that may open sessions.
    pub allow: Vec<IpNet>,
    /// Those of them that may not.
    pub deny: Vec<IpNet>,
    /// Other proxies, which could answer each other for ever.
    pub peers: Vec<IpNet>,
    /// How many sessions each client may have.
    pub clients: Option<Arc<Clients>>,
    /// How many datagrams each client may send.
    pub rates: Option<Arc<Rates>>,
    /// What its sockets to clients are made for.
    pub entrance: Options,
    /// Refuse rather than fragment what exceeds the path's MTU.
    pub dont_fragment: bool,
    /// Pass DSCP as well as ECN, in both directions.
    pub dscp: bool,
    /// Servers of its upstream, in the order in which its plans name them; then
    /// those that sessions may stay with and no plan names.
    pub servers: Vec<Server>,
}

impl ListenerSettings {
    /// Why the client at this address may not open sessions, if it may not.
    #[must_use]
    pub fn refusal(&self, client: IpAddr) -> Option<DropReason> {
        let is_in = |nets: &[IpNet]| nets.iter().any(|net| net.contains(&client));
        if is_in(&self.peers) {
            Some(DropReason::BadSource)
        } else if !is_in(&self.allow) || is_in(&self.deny) {
            Some(DropReason::NotAllowed)
        } else {
            None
        }
    }

    /// Whether the client at this address may open sessions.
    #[must_use]
    pub fn allows(&self, client: IpAddr) -> bool {
        self.refusal(client).is_none()
    }

    /// As it is when it is gone: its name, and nothing that others could have.
    #[must_use]
    pub fn emptied(&self) -> Self {
        Self {
            clients: None,
            rates: None,
            servers: Vec::new(),
            ..self.clone()
        }
    }

    /// What its sessions' sockets are made for.
    #[must_use]
    pub fn exit_options(&self) -> Options {
        Options {
            dont_fragment: self.dont_fragment,
            bursts: !self.rules.count_replies(),
        }
    }
}

/// What may change while a worker runs.
#[derive(Clone)]
pub struct Setup {
    /// All listeners, by number; those that are gone, as they were.
    pub listeners: Vec<Arc<ListenerSettings>>,
    /// Where it takes sessions.
    pub steering: Arc<Steering>,
    /// How it spends its time between datagrams.
    pub pace: Pace,
    /// Where it counts.
    pub counters: Arc<WorkerCounters>,
    /// Where it tells of each session that has ended.
    pub log: Option<SyncSender<Ended>>,
}

/// Another setup, and the sockets that go with it.
pub struct Change {
    /// What holds from now on.
    pub setup: Setup,
    /// The number of the listener of every address that goes on or begins. At
    /// others, sessions go on until [`Command::Close`], and none begins.
    pub bound: BTreeMap<SocketAddr, usize>,
    /// Sockets for addresses that begin.
    pub entrances: Vec<Socket>,
    /// Told when it is done.
    pub done: Box<dyn FnOnce() + Send>,
}

/// What a worker is given.
pub struct Share {
    /// Its number; each begins its turns through the servers elsewhere.
    pub number: usize,
    /// Sockets that clients write to, and the number of each one's listener.
    pub entrances: Vec<(Socket, usize)>,
    /// What may change.
    pub setup: Setup,
    /// Sessions that it may take a part of.
    pub budget: Arc<Budget>,
    /// Clients' own ports that sessions of all workers write from.
    pub claims: Arc<Claims>,
    /// Where it hears what to do.
    pub commands: Receiver<Command>,
}
