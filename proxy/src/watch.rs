//! Tells the operator what is being dropped, and which servers refuse or answer from
//! elsewhere: within a second of its beginning, then at most once a minute for each
//! reason and server, however many datagrams it concerns, and what is left at a stop or
//! when a listener is gone.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::metrics::{Counted, Metrics, Traffic};
use ppv2_engine::counters::{DropReason, Oversize};
use ppv2_engine::listener::Listener;
use ppv2_hosts::kernel;

use silence::Silence;

mod silence;

/// How often to look.
pub const INTERVAL: Duration = Duration::from_secs(1);

/// How long to say nothing more of one listener and reason, or of sessions that
/// are nearly all taken.
const PAUSE: Duration = Duration::from_secs(60);

/// Share of the sessions, in percent, from which on it is worth a warning.
const NEARLY_FULL: usize = 80;

/// What was dropped since it was last spoken of.
#[derive(Debug, PartialEq)]
pub struct Notice {
    /// The listener.
    pub listener: Arc<Listener>,
    /// Why.
    pub reason: DropReason,
    /// How many since the last notice of the kind.
    pub count: u64,
}

/// How far a counter has been spoken of, and when.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    total: u64,
    at: Option<Instant>,
}

impl Told {
    /// What has been counted beyond that, if it should be told now.
    fn news(&mut self, total: u64, now: Instant, patience: Duration) -> Option<u64> {
        let count = total.saturating_sub(self.total);
        if count == 0 || is_recent(self.at, now, patience) {
            return None;
        }
        *self = Self {
            total,
            at: Some(now),
        };
        Some(count)
    }
}

/// Compares counters over time. Takes the time as an argument.
#[derive(Debug)]
pub struct Watch {
    metrics: Arc<Metrics>,
    /// By the listener's id and the reason.
    drops: HashMap<(u64, &'static str), Told>,
    /// By the server's id.
    refusals: HashMap<u64, Told>,
    silence: Silence,
    was_full: bool,
    full_told: Option<Instant>,
}

impl Watch {
    /// Watches `metrics` from zero.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            metrics,
            refusals: HashMap::new(),
            silence: Silence::default(),
            drops: HashMap::new(),
            was_full: false,
            full_told: None,
        }
    }

    /// What drops of the listeners that `of` chooses should be told now, if none are to
    /// be told twice within `patience`.
    fn notices(
        &mut self,
        now: Instant,
        patience: Duration,
        of: impl Fn(&Listener) -> bool,
    ) -> Vec<Notice> {
        let mut notices = Vec::new();
        let counted = self.metrics.counted();
        for listener in counted.listeners.iter().filter(|listener| of(listener)) {
            for reason in DropReason::ALL {
                let total = listener.sum(|counters| counters.dropped(*reason).get());
                let told = self.drops.entry((listener.id(), reason.label()));
                let news = told.or_default().news(total, now, patience);
                notices.extend(news.map(|count| Notice {
                    listener: Arc::clone(listener),
                    reason: *reason,
                    count,
                }));
            }
        }
        notices
    }

    /// How many sessions are taken, if they are nearly all and that should be
    /// told now.
    pub fn nearly_full(&mut self, now: Instant) -> Option<usize> {
        let (taken, max) = (self.metrics.capacity.taken(), self.metrics.capacity.max());
        let nearly_full = taken.saturating_mul(100) >= max.saturating_mul(NEARLY_FULL);
        // Staying beyond the mark is no news, nor is crossing it again: the number
        // goes up and down around it as sessions come and go.
        let news = nearly_full && !self.was_full && !is_recent(self.full_told, now, PAUSE);
        self.was_full = nearly_full;
        if news {
            self.full_told = Some(now);
        }
        news.then_some(taken)
    }

    /// Logs what should be told now.
    pub fn log(&mut self, now: Instant) {
        self.log_counts(now, PAUSE);
        if let Some(sessions) = self.nearly_full(now) {
            tracing::warn!(
                sessions,
                max = self.metrics.capacity.max(),
                "sessions are nearly all taken; {}",
                DropReason::MaxSessions.hint()
            );
        }
    }

    /// Logs, at a stop, all that has not been told.
    pub fn log_rest(&mut self, now: Instant) {
        self.log_counts(now, Duration::ZERO);
    }

    /// Logs all that has not been told of listeners that are gone.
    pub fn log_gone(&mut self, listeners: &[Arc<Listener>], now: Instant) {
        let is_gone = |one: &Listener| listeners.iter().any(|gone| **gone == *one);
        let notices = self.notices(now, Duration::ZERO, is_gone);
        self.log_drops(notices);
        let is_there = |id: u64| listeners.iter().all(|gone| gone.id() != id);
        self.drops.retain(|(id, _), _| is_there(*id));
    }

    fn log_counts(&mut self, now: Instant, patience: Duration) {
        let notices = self.notices(now, patience, |_| true);
        self.log_drops(notices);
        self.log_servers(now, patience);
    }

    fn log_drops(&self, notices: Vec<Notice>) {
        let counted = self.metrics.counted();
        for notice in notices {
            let Notice {
                listener,
                reason,
                count,
            } = notice;
            let oversize = if reason == DropReason::Oversize {
                oversize(&counted)
            } else {
                None
            };
            tracing::warn!(
                listener = listener.name,
                reason = reason.label(),
                count,
                len = oversize.map(|oversize| oversize.len),
                fits = oversize.and_then(fits),
                "datagrams dropped: {}; {}",
                reason.meaning(),
                reason.hint(),
            );
        }
    }

    fn log_servers(&mut self, now: Instant, patience: Duration) {
        let counted = self.metrics.counted();
        let servers = counted.servers();
        let ids: HashSet<_> = servers.iter().map(|server| server.id()).collect();
        self.refusals.retain(|id, _| ids.contains(id));
        self.silence.retain(|id| ids.contains(&id));
        let unclaimed = kernel::datagrams_without_socket();
        for server in servers {
            let (upstream, label) = (&server.upstream, server.label());
            let told = self.refusals.entry(server.id()).or_default();
            let traffic = Traffic::of(&server);
            if let Some(count) = told.news(traffic.refusals, now, patience) {
                tracing::warn!(
                    upstream,
                    server = label,
                    count,
                    "server refuses datagrams: the network says that they do not arrive; \
                     check that it runs and listens there"
                );
            }
            let silent =
                unclaimed.and_then(|count| self.silence.news(server.id(), traffic, count, now));
            if let Some(count) = silent {
                tracing::warn!(
                    upstream,
                    server = label,
                    count,
                    "server answers nothing, while this host drops datagrams that no socket \
                     takes: it seems to answer from another address or port than it was asked \
                     at, and such replies reach no client; `ppv2-proxy doctor --probe` tells \
                     from which"
                );
            }
        }
    }
}

/// The longest of the datagrams that workers noted as oversize last.
fn oversize(counted: &Counted) -> Option<Oversize> {
    let workers = counted.workers.iter();
    let noted = workers.filter_map(|worker| *worker.oversize.lock().ok()?);
    noted.max_by_key(|oversize| oversize.len)
}

/// Bytes of payload that go to the server in one piece with a header of that length.
fn fits(oversize: Oversize) -> Option<usize> {
    let mtu = kernel::interface_mtu(oversize.server.ip())?;
    Some(kernel::payload_of(mtu, oversize.server.ip()).saturating_sub(oversize.header))
}

fn is_recent(told: Option<Instant>, now: Instant, patience: Duration) -> bool {
    told.is_some_and(|at| now.saturating_duration_since(at) < patience)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access_log::Unlogged;
    use ppv2_engine::capacity::Capacity;

    /// What watches listeners with these names, and they.
    fn watch<const N: usize>(names: [&str; N]) -> (Watch, [Arc<Listener>; N]) {
        let listeners = names.map(|name| Listener::new(name, 1));
        let counted = Counted {
            listeners: listeners.to_vec(),
            ..Counted::default()
        };
        let metrics = Metrics::new(counted, Capacity::new(1, 1), Unlogged::default());
        (Watch::new(Arc::new(metrics)), listeners)
    }

    fn drop_at(listener: &Listener, count: u64) {
        listener.counters(0).dropped(DropReason::NoPorts).add(count);
    }

    #[test]
    fn a_million_drops_are_one_notice_a_minute() {
        let (mut watch, [listener]) = watch(["a"]);
        let mut now = Instant::now();
        let all = |_: &Listener| true;
        assert_eq!(watch.notices(now, PAUSE, all), []);
        let mut told = Vec::new();
        for _ in 0..121 {
            drop_at(&listener, 1_000_000);
            told.extend(
                watch
                    .notices(now, PAUSE, all)
                    .into_iter()
                    .map(|notice| notice.count),
            );
            now += INTERVAL;
        }
        assert_eq!(told, [1_000_000, 60_000_000, 60_000_000]);
        listener.counters(0).dropped(DropReason::ReplyLate).add(1);
        let notices = watch.notices(now, PAUSE, all);
        assert_eq!(notices.len(), 1);
        assert_eq!(notices[0].reason, DropReason::ReplyLate);
    }

    #[test]
    fn all_drops_of_a_listener_that_is_gone_are_told() {
        let (mut watch, listeners) = watch(["a", "b"]);
        let now = Instant::now();
        for listener in &listeners {
            drop_at(listener, 100);
        }
        watch.log(now);
        for listener in &listeners {
            drop_at(listener, 50);
        }
        let [gone, stays] = listeners;
        watch.log_gone(&[Arc::clone(&gone)], now);
        watch.metrics.follow(Counted {
            listeners: vec![Arc::clone(&stays)],
            ..Counted::default()
        });
        // What came within the pause of the other is told after it.
        assert_eq!(watch.notices(now, PAUSE, |_| true), []);
        let rest = watch.notices(now + PAUSE, PAUSE, |_| true);
        let rest: Vec<_> = rest.iter().map(|n| (&n.listener, n.count)).collect();
        assert_eq!(rest, [(&stays, 50)]);
    }

    #[test]
    fn sessions_around_the_mark_are_one_warning_a_minute() {
        let capacity = Capacity::new(10, 10);
        let metrics = Metrics::new(
            Counted::default(),
            Arc::clone(&capacity),
            Unlogged::default(),
        );
        let mut watch = Watch::new(Arc::new(metrics));
        let start = Instant::now();
        let mut permits: Vec<_> = (0..7).map(|_| capacity.take().unwrap()).collect();
        let mut told = Vec::new();
        for second in 0..200 {
            // Beyond the mark in every other second up to 130, then for good.
            if second % 2 == 1 && second < 130 {
                permits.truncate(7);
            } else if permits.len() == 7 {
                permits.push(capacity.take().unwrap());
            }
            let now = start + Duration::from_secs(second);
            if let Some(taken) = watch.nearly_full(now) {
                told.push((second, taken));
            }
        }
        assert_eq!(told, [(0, 8), (60, 8), (120, 8)]);
        permits.clear();
        let mut now = start + Duration::from_secs(200);
        assert_eq!(watch.nearly_full(now), None);
        permits.extend((0..10).map(|_| capacity.take().unwrap()));
        now += INTERVAL;
        assert_eq!(watch.nearly_full(now), Some(10));
    }
}
