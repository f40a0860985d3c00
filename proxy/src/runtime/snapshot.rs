//! The snapshot that workers get, made of a configuration and of where sessions go.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Instant;

use ipnet::IpNet;

use super::RunError;
use crate::access_log::{self, Unlogged};
use crate::config::{AccessLog, Listener, Network, PerClient};
use crate::registry::ActiveConfig;
use ppv2_engine::client_limits::{ClientRates, ClientSessions};
use ppv2_engine::listener::ListenerSettings;
use ppv2_engine::server::Target;
use ppv2_engine::session::Ended;
use ppv2_engine::snapshot::{ListenerSnapshot, Routing, Snapshot, Targets};

/// The access log that is being written.
pub(super) struct Log {
    pub(super) of: AccessLog,
    pub(super) writer: access_log::Writer,
    pub(super) sender: SyncSender<Ended>,
}

impl Log {
    /// Opens it, or later if it `may_be_missing`. Sessions that don't get into it are counted
    /// by `unlogged`.
    pub(super) fn open(
        of: &AccessLog,
        unlogged: &Unlogged,
        may_be_missing: bool,
    ) -> Result<Self, RunError> {
        let started = access_log::Writer::start(of, Arc::clone(unlogged), may_be_missing);
        let (writer, sender) = started.map_err(|error| RunError::AccessLog {
            path: of.shown_path().to_owned(),
            error,
        })?;
        Ok(Self {
            of: of.clone(),
            writer,
            sender,
        })
    }
}

/// The snapshot of `active` after `before`, which is nothing at the start. Limits of
/// clients go on with what was counted. What stays the same is handed on, by which workers
/// know it, and so are listeners that are gone while their addresses are being closed.
pub(super) fn snapshot(
    active: &ActiveConfig,
    routing: Vec<Routing>,
    before: Option<(&ActiveConfig, &Snapshot)>,
    closing: BTreeSet<SocketAddr>,
    log: Option<&Log>,
) -> Snapshot {
    let listeners = active.config.listeners.iter().enumerate();
    let bound = listeners
        .clone()
        .flat_map(|(place, listener)| listener.addresses().map(move |address| (address, place)));
    let places: HashMap<_, _> = before
        .into_iter()
        .flat_map(|(config, _)| config.listeners.iter().enumerate())
        .map(|(place, listener)| (listener.id(), place))
        .collect();
    let of_listener = |((place, listener), routing): ((usize, &Listener), Routing)| {
        let object = &active.listeners[place];
        let old = before.and_then(|(_, snapshot)| snapshot.of(object));
        let limits = before.zip(old).and_then(|((config, _), old)| {
            let place = *places.get(&object.id())?;
            Some((config.config.listeners[place].per_client, &*old.settings))
        });
        let settings = settings(active, place, limits);
        let targets = targets(active, listener);
        let same_settings = old.filter(|old| *old.settings == settings);
        let same_targets = old.filter(|old| *old.targets == targets);
        ListenerSnapshot {
            settings: same_settings
                .map_or_else(|| Arc::new(settings), |old| Arc::clone(&old.settings)),
            targets: same_targets.map_or_else(|| Arc::new(targets), |old| Arc::clone(&old.targets)),
            routing,
        }
    };
    let present: HashSet<_> = active.listeners.iter().map(|one| one.id()).collect();
    let is_gone = |one: &&ListenerSnapshot| {
        let listener = &one.settings.listener;
        !closing.is_empty() && !present.contains(&listener.id()) && listener.is_in_use()
    };
    let gone = before
        .into_iter()
        .flat_map(|(_, snapshot)| snapshot.listeners.iter());
    let gone = gone.filter(is_gone).map(|one| ListenerSnapshot {
        routing: Routing::staying(&one.targets),
        ..one.clone()
    });
    let routing = routing
        .into_iter()
        .chain(std::iter::repeat_with(Routing::default));
    Snapshot {
        version: before.map_or(0, |(_, snapshot)| snapshot.version + 1),
        bound: bound.collect(),
        listeners: listeners
            .zip(routing)
            .map(of_listener)
            .chain(gone)
            .collect(),
        closing,
        pauses: active.config.pauses(),
        log: log.map(|log| log.sender.clone()),
    }
}

/// `before`, with sessions that go elsewhere.
pub(super) fn rerouted(before: &Snapshot, routing: Vec<Routing>) -> Snapshot {
    // Of listeners that are gone, which come last, there is none.
    let routing = routing.into_iter().map(Some).chain(std::iter::repeat(None));
    let listeners = before.listeners.iter().zip(routing);
    let listeners = listeners.map(|(listener, routing)| ListenerSnapshot {
        routing: routing.unwrap_or_else(|| listener.routing.clone()),
        ..listener.clone()
    });
    Snapshot {
        version: before.version + 1,
        listeners: listeners.collect(),
        bound: before.bound.clone(),
        closing: before.closing.clone(),
        pauses: before.pauses,
        log: before.log.clone(),
    }
}

fn targets(active: &ActiveConfig, listener: &Listener) -> Targets {
    let targets = listener.servers.iter().chain(&listener.leaving);
    let target = |(index, mode): &(usize, _)| Target {
        server: Arc::clone(&active.servers[*index]),
        mode: *mode,
        sources: active.config.servers[*index].sources.clone(),
        replies: active.config.servers[*index].replies.clone(),
        tlvs: active.config.servers[*index].tlvs.clone(),
        repeat: active.config.servers[*index].repeat,
        ports: active.config.servers[*index].ports,
    };
    Targets::new(targets.map(target).collect())
}

fn settings(
    active: &ActiveConfig,
    place: usize,
    old: Option<(PerClient, &ListenerSettings)>,
) -> ListenerSettings {
    let listener = &active.config.listeners[place];
    let workers = active.config.workers_of(listener);
    let accept = listener.accept.as_ref();
    ListenerSettings {
        listener: Arc::clone(&active.listeners[place]),
        rules: listener.rules(),
        allow: networks(&listener.allow),
        deny: networks(&listener.deny),
        peers: networks(active.config.peers.as_deref().unwrap_or_default()),
        ipv6_prefix: *listener.per_client.ipv6_prefix,
        client_sessions: client_sessions(listener.per_client, old),
        client_rates: client_rates(listener.per_client, old),
        dont_fragment: listener.dont_fragment,
        dscp: listener.dscp,
        accept: accept.map(|accept| Arc::new(accept.of_worker(workers))),
        keeps_sessions: listener.sessions.0,
    }
}

fn networks(of: &[Network]) -> Vec<IpNet> {
    of.iter().map(|network| network.0).collect()
}

fn client_sessions(
    wanted: PerClient,
    old: Option<(PerClient, &ListenerSettings)>,
) -> Option<Arc<ClientSessions>> {
    let most = *wanted.sessions?;
    let same = old.filter(|(old, _)| old.ipv6_prefix == wanted.ipv6_prefix);
    let Some(sessions) = same.and_then(|(_, settings)| settings.client_sessions.as_ref()) else {
        return Some(ClientSessions::new(most, *wanted.ipv6_prefix));
    };
    sessions.resize(most);
    Some(Arc::clone(sessions))
}

fn client_rates(
    wanted: PerClient,
    old: Option<(PerClient, &ListenerSettings)>,
) -> Option<Arc<ClientRates>> {
    let (rate, burst) = wanted.rate()?;
    let same =
        old.filter(|(old, _)| (old.rate(), old.ipv6_prefix) == (wanted.rate(), wanted.ipv6_prefix));
    let Some(rates) = same.and_then(|(_, settings)| settings.client_rates.as_ref()) else {
        let rates = ClientRates::new(Instant::now(), rate, burst, *wanted.ipv6_prefix);
        return Some(Arc::new(rates));
    };
    Some(Arc::clone(rates))
}
