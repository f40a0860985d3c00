//! What workers are given of what is in force, and what is counted of it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use super::RunError;
use crate::access_log::{self, Unlogged};
use crate::config::AccessLog;
use crate::metrics::Counted;
use crate::roster::{Roll, Roster};
use ppv2_engine::counters::WorkerCounters;
use ppv2_engine::upstream::Steering;
use ppv2_engine::worker::{Ended, ListenerSettings, Setup};

/// The access log that is being written.
pub(super) struct Log {
    pub(super) of: AccessLog,
    pub(super) writer: access_log::Writer,
    pub(super) sender: SyncSender<Ended>,
}

impl Log {
    /// Opens it. Sessions that don't get into it are counted by `unlogged`.
    pub(super) fn open(of: &AccessLog, unlogged: &Unlogged) -> Result<Self, RunError> {
        let started = access_log::Writer::start(of, Arc::clone(unlogged));
        let (writer, sender) = started.map_err(|error| RunError::AccessLog {
            path: of.path.clone(),
            error,
        })?;
        Ok(Self {
            of: of.clone(),
            writer,
            sender,
        })
    }
}

/// Of what workers' setups are made.
pub(super) struct Setups<'c> {
    pub(super) roll: &'c Roll,
    pub(super) settings: &'c [Arc<ListenerSettings>],
    pub(super) counters: &'c [Arc<WorkerCounters>],
    pub(super) steering: &'c Arc<Steering>,
    pub(super) log: Option<&'c Log>,
}

impl Setups<'_> {
    pub(super) fn of(&self, worker: usize) -> Setup {
        Setup {
            listeners: self.settings.to_vec(),
            steering: Arc::clone(self.steering),
            pace: self.roll.config.pace(),
            counters: Arc::clone(&self.counters[worker]),
            log: self.log.map(|log| log.sender.clone()),
        }
    }
}

/// The listener of each address.
pub(super) fn bound(roll: &Roll) -> BTreeMap<SocketAddr, usize> {
    let listeners = roll.listeners();
    listeners
        .flat_map(|(number, listener)| listener.bind.iter().map(move |a| (*a, number)))
        .collect()
}

/// The counters, under the names of those who were not forgotten.
pub(super) fn counted(roster: &Roster, workers: &[Arc<WorkerCounters>]) -> Counted {
    Counted {
        listeners: roster.listeners(),
        servers: roster.servers(),
        workers: workers.to_vec(),
    }
}
