//! `/status`: all that the page at `/` and `top` show, in one answer. Counters only grow, and
//! `uptime_seconds` has fractions, so that readers work out rates between two answers.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures_util::future::join_all;
use serde::Serialize;

use super::Admin;
use crate::config;
use crate::health::UpstreamStatus;
use crate::metrics::Counted;
use ppv2_engine::counters::{DropReason, ListenerCounters};
use ppv2_engine::listener::Listener;
use ppv2_engine::mode::Mode;

/// The most listeners, and the most servers, that an answer has. It bounds what readers take
/// of the thread that also checks servers.
pub(super) const MAX_SHOWN: usize = 1000;

/// When the proxy began.
#[derive(Clone, Copy, Debug)]
pub struct Started {
    at: Instant,
    clock: SystemTime,
}

impl Started {
    /// This moment.
    #[must_use]
    pub fn now() -> Self {
        Self {
            at: Instant::now(),
            clock: SystemTime::now(),
        }
    }
}

#[derive(Serialize)]
struct Report<'a> {
    version: &'static str,
    unix_seconds: f64,
    /// Tells one run from the next.
    started_unix_seconds: f64,
    uptime_seconds: f64,
    ready: bool,
    workers: usize,
    workers_not_responding: Vec<usize>,
    sessions: usize,
    sessions_max: usize,
    session_sockets: usize,
    session_sockets_max: usize,
    reloads: Reloads,
    listeners: Vec<ListenerReport<'a>>,
    listeners_left_out: usize,
    upstreams: Vec<UpstreamStatus>,
    servers_left_out: usize,
    drop_reasons: BTreeMap<&'static str, Meaning>,
}

#[derive(Serialize)]
struct Reloads {
    applied: u64,
    rejected: u64,
    latest_is_rejected: bool,
}

#[derive(Serialize)]
struct ListenerReport<'a> {
    listener: &'a str,
    /// Empty, as what follows is null, once a reload has removed it.
    bind: Vec<String>,
    upstream: Option<&'a str>,
    /// Of its servers; "plain, ppv2" where they differ.
    mode: Option<String>,
    client_datagrams: u64,
    client_bytes: u64,
    reply_datagrams: u64,
    reply_bytes: u64,
    receive_overflows: u64,
    sessions: u64,
    sessions_opened: u64,
    drops: BTreeMap<&'static str, u64>,
}

/// What a reason for drops means.
#[derive(Serialize)]
struct Meaning {
    description: &'static str,
    fix: &'static str,
}

fn seconds(time: SystemTime) -> f64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_secs_f64()
}

pub(super) async fn status(State(admin): State<Arc<Admin>>) -> Response {
    let answers = admin.workers.iter().map(|worker| worker.sessions(0, 0));
    let answers = join_all(answers).await.into_iter().enumerate();
    let silent = answers.filter(|(_, answer)| answer.is_none());
    let workers_not_responding = silent.map(|(number, _)| number).collect();
    let metrics = &admin.metrics;
    let (capacity, reloads) = (&metrics.capacity, &metrics.reloads);
    let counted = metrics.counted();
    let (upstreams, servers_left_out) = admin.health.statuses(MAX_SHOWN);
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        unix_seconds: seconds(SystemTime::now()),
        started_unix_seconds: seconds(admin.started.clock),
        uptime_seconds: admin.started.at.elapsed().as_secs_f64(),
        ready: admin.ready.load(Ordering::Acquire),
        workers: admin.workers.len(),
        workers_not_responding,
        sessions: capacity.taken(),
        sessions_max: capacity.max(),
        session_sockets: capacity.sockets(),
        session_sockets_max: capacity.max_sockets(),
        reloads: Reloads {
            applied: reloads.applied(),
            rejected: reloads.rejected(),
            latest_is_rejected: reloads.is_latest_rejected(),
        },
        listeners: listeners(&counted),
        listeners_left_out: counted.listeners.len().saturating_sub(MAX_SHOWN),
        upstreams,
        servers_left_out,
        drop_reasons: meanings(&counted),
    };
    Json(report).into_response()
}

fn listeners(counted: &Counted) -> Vec<ListenerReport<'_>> {
    let active = counted.active.iter();
    let configured: HashMap<u64, &config::Listener> = active
        .flat_map(|active| active.listeners.iter().zip(&active.config.listeners))
        .map(|(listener, written)| (listener.id(), written))
        .collect();
    let shown = counted.listeners.iter().take(MAX_SHOWN);
    shown
        .map(|listener| listener_report(listener, &configured))
        .collect()
}

fn listener_report<'a>(
    listener: &'a Listener,
    configured: &HashMap<u64, &'a config::Listener>,
) -> ListenerReport<'a> {
    let written = configured.get(&listener.id()).copied();
    let sum = |read: fn(&ListenerCounters) -> u64| listener.sum(read);
    ListenerReport {
        listener: &listener.name,
        bind: written.map_or_else(Vec::new, |written| {
            written.bind.iter().map(ToString::to_string).collect()
        }),
        upstream: written.map(|written| &*written.upstream),
        mode: written.map(mode),
        client_datagrams: sum(|c| c.received.get()),
        client_bytes: sum(|c| c.received_bytes.get()),
        reply_datagrams: sum(|c| c.replied.get()),
        reply_bytes: sum(|c| c.replied_bytes.get()),
        receive_overflows: sum(|c| c.overflows.get()),
        sessions: sum(ListenerCounters::sessions),
        sessions_opened: sum(|c| c.opened.get()),
        drops: drops(listener).collect(),
    }
}

fn mode(listener: &config::Listener) -> String {
    let names: BTreeSet<_> = listener.modes().map(Mode::name).collect();
    Vec::from_iter(names).join(", ")
}

/// The reasons for which the listener has dropped datagrams, and how many.
fn drops(listener: &Listener) -> impl Iterator<Item = (&'static str, u64)> {
    let all = DropReason::ALL.iter();
    let counts = all.map(|reason| (reason.label(), listener.sum(|c| c.dropped(*reason).get())));
    counts.filter(|(_, count)| *count > 0)
}

/// What the reasons that occur mean.
fn meanings(counted: &Counted) -> BTreeMap<&'static str, Meaning> {
    let occurs = |reason: &&DropReason| {
        let mut listeners = counted.listeners.iter().take(MAX_SHOWN);
        listeners.any(|listener| listener.sum(|c| c.dropped(**reason).get()) > 0)
    };
    let reasons = DropReason::ALL.iter().filter(occurs);
    let meaning = |reason: &DropReason| Meaning {
        description: reason.description(),
        fix: reason.fix(),
    };
    reasons
        .map(|reason| (reason.label(), meaning(reason)))
        .collect()
}
