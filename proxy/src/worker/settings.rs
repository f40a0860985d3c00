//! What a worker is given: its sockets, what it must know of listeners and servers,
//! and what it shares with others.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Duration;

use ipnet::IpNet;

use super::{Claims, Command};
use crate::counters::WorkerCounters;
use crate::net::Socket;
use crate::session::{Budget, Clients, Rates, Rules, Summary};
use crate::upstream::{Server, Steering};

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
    /// When its sessions end.
    pub rules: Rules,
    /// Clients that may open sessions.
    pub allow: Vec<IpNet>,
    /// Those of them that may not.
    pub deny: Vec<IpNet>,
    /// How many sessions each client may have.
    pub clients: Option<Arc<Clients>>,
    /// How many datagrams each client may send.
    pub rates: Option<Arc<Rates>>,
    /// Refuse rather than fragment what exceeds the path's MTU.
    pub dont_fragment: bool,
    /// Pass DSCP as well as ECN, in both directions.
    pub dscp: bool,
    /// Servers of its upstream.
    pub servers: Vec<Server>,
}

impl ListenerSettings {
    /// Whether the client at this address may open sessions.
    #[must_use]
    pub fn allows(&self, client: IpAddr) -> bool {
        let is_in = |nets: &[IpNet]| nets.iter().any(|net| net.contains(&client));
        is_in(&self.allow) && !is_in(&self.deny)
    }
}

/// What a worker is given.
pub struct Share {
    /// Its number; each begins its turns through the servers elsewhere.
    pub number: usize,
    /// Sockets that clients write to, and the number of each one's listener.
    pub entrances: Vec<(Socket, usize)>,
    /// All listeners, by number.
    pub listeners: Vec<ListenerSettings>,
    /// How it spends its time between datagrams.
    pub pace: Pace,
    /// Sessions that it may take a part of.
    pub budget: Arc<Budget>,
    /// Where it takes sessions.
    pub steering: Arc<Steering>,
    /// Clients' own ports that sessions of all workers write from.
    pub claims: Arc<Claims>,
    /// The most ended sessions whose ports it keeps.
    pub max_retired: usize,
    /// Where it counts.
    pub counters: Arc<WorkerCounters>,
    /// Where it tells of each session that has ended.
    pub log: Option<SyncSender<Summary>>,
    /// Where it hears what to do.
    pub commands: Receiver<Command>,
}
