//! Logs what is dropped, and which servers refuse datagrams or answer from another
//! address: within a second, then at most once a minute for each reason and server, and
//! what is left at shutdown or when a listener is removed.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crate::metrics::{Counted, Metrics, Traffic};
use ppv2_engine::counters::{DropReason, Oversize};
use ppv2_engine::listener::Listener;
use ppv2_hosts::kernel;

use silence::Silence;

mod silence;

/// The time between two looks at the counters.
pub const INTERVAL: Duration = Duration::from_secs(1);

/// The time between two warnings of one listener and reason, of one server, or of nearly
/// all sessions in use.
const PAUSE: Duration = Duration::from_secs(60);

/// Percentage of the sessions in use that causes a warning.
const NEARLY_FULL: usize = 80;

/// What was dropped since the last notice of the kind.
#[derive(Debug, PartialEq)]
pub struct Notice {
    /// The listener.
    pub listener: Arc<Listener>,
    /// Why.
    pub reason: DropReason,
    /// How many datagrams.
    pub count: u64,
}

/// How much of a counter has been logged, and when.
#[derive(Clone, Copy, Debug, Default)]
struct Logged {
    total: u64,
    at: Option<Instant>,
}

impl Logged {
    /// What has been counted since, if it is to be logged now.
    fn due(&mut self, total: u64, now: Instant, pause: Duration) -> Option<u64> {
        let count = total.saturating_sub(self.total);
        if count == 0 || is_recent(self.at, now, pause) {
            return None;
        }
        *self = Self {
            total,
            at: Some(now),
        };
        Some(count)
    }
}

/// What has been logged of a listener's drops. A removed listener can return while ended
/// sessions hold it, and its counters go on then.
#[derive(Debug)]
struct Drops {
    listener: Weak<Listener>,
    by_reason: HashMap<&'static str, Logged>,
}

/// Compares counters over time.
#[derive(Debug)]
pub struct DropLog {
    metrics: Arc<Metrics>,
    /// By the listener's id.
    drops: HashMap<u64, Drops>,
    /// By the server's id.
    refusals: HashMap<u64, Logged>,
    silence: Silence,
    was_full: bool,
    full_logged: Option<Instant>,
}

impl DropLog {
    /// Logs what `metrics` count from now on.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            metrics,
            refusals: HashMap::new(),
            silence: Silence::default(),
            drops: HashMap::new(),
            was_full: false,
            full_logged: None,
        }
    }

    /// The drops of the listeners that `of` chooses which are to be logged now, none twice
    /// within `pause`.
    fn notices(
        &mut self,
        now: Instant,
        pause: Duration,
        of: impl Fn(&Listener) -> bool,
    ) -> Vec<Notice> {
        let mut notices = Vec::new();
        let counted = self.metrics.counted();
        self.drops
            .retain(|_, drops| drops.listener.strong_count() > 0);
        for listener in counted.listeners.iter().filter(|listener| of(listener)) {
            let drops = self.drops.entry(listener.id()).or_insert_with(|| Drops {
                listener: Arc::downgrade(listener),
                by_reason: HashMap::new(),
            });
            for reason in DropReason::ALL {
                let total = listener.sum(|counters| counters.dropped(*reason).get());
                let logged = drops.by_reason.entry(reason.label());
                let due = logged.or_default().due(total, now, pause);
                notices.extend(due.map(|count| Notice {
                    listener: Arc::clone(listener),
                    reason: *reason,
                    count,
                }));
            }
        }
        notices
    }

    /// The number of sessions, if nearly all are in use and that is to be logged now.
    pub fn nearly_full(&mut self, now: Instant) -> Option<usize> {
        let (taken, max) = (self.metrics.capacity.taken(), self.metrics.capacity.max());
        let nearly_full = taken.saturating_mul(100) >= max.saturating_mul(NEARLY_FULL);
        // Neither staying beyond the mark nor crossing it again within a minute is logged:
        // the number goes up and down as sessions come and go.
        let due = nearly_full && !self.was_full && !is_recent(self.full_logged, now, PAUSE);
        self.was_full = nearly_full;
        if due {
            self.full_logged = Some(now);
        }
        due.then_some(taken)
    }

    /// Logs what is due.
    pub fn log(&mut self, now: Instant) {
        self.log_counts(now, PAUSE);
        if let Some(sessions) = self.nearly_full(now) {
            tracing::warn!(
                sessions,
                max = self.metrics.capacity.max(),
                "nearly all sessions are in use; {}",
                DropReason::MaxSessions.fix()
            );
        }
    }

    /// Logs everything that has not been logged, at shutdown.
    pub fn log_rest(&mut self, now: Instant) {
        self.log_counts(now, Duration::ZERO);
    }

    /// Logs everything that has not been logged of removed listeners.
    pub fn log_gone(&mut self, listeners: &[Arc<Listener>], now: Instant) {
        let is_gone = |one: &Listener| listeners.iter().any(|gone| **gone == *one);
        let notices = self.notices(now, Duration::ZERO, is_gone);
        self.log_drops(notices);
    }

    fn log_counts(&mut self, now: Instant, pause: Duration) {
        let notices = self.notices(now, pause, |_| true);
        self.log_drops(notices);
        self.log_servers(now, pause);
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
            if is_meant(reason) {
                tracing::debug!(
                    listener = listener.name,
                    reason = reason.label(),
                    count,
                    "datagrams dropped: {}",
                    reason.description(),
                );
                continue;
            }
            tracing::warn!(
                listener = listener.name,
                reason = reason.label(),
                count,
                // Another proxy's address, never a client's.
                proxy = listener.take_sender(reason).map(tracing::field::display),
                len = oversize.map(|oversize| oversize.len),
                fits = oversize.and_then(fits),
                "datagrams dropped: {}; {}",
                reason.description(),
                reason.fix(),
            );
        }
    }

    fn log_servers(&mut self, now: Instant, pause: Duration) {
        let counted = self.metrics.counted();
        let servers = counted.servers();
        let ids: HashSet<_> = servers.iter().map(|server| server.id()).collect();
        self.refusals.retain(|id, _| ids.contains(id));
        self.silence.retain(|id| ids.contains(&id));
        let unclaimed = kernel::datagrams_without_socket();
        for server in servers {
            let (upstream, label) = (&server.upstream, server.label());
            let logged = self.refusals.entry(server.id()).or_default();
            let traffic = Traffic::of(&server);
            if let Some(count) = logged.due(traffic.refusals, now, pause) {
                tracing::warn!(
                    upstream,
                    server = label,
                    count,
                    "server refuses datagrams: ICMP errors say that they do not arrive; check \
                     that the server runs and listens there"
                );
            }
            let silent =
                unclaimed.and_then(|count| self.silence.due(server.id(), traffic, count, now));
            if let Some(count) = silent {
                tracing::warn!(
                    upstream,
                    server = label,
                    count,
                    "server does not answer, and this host drops datagrams that no socket \
                     takes: the server seems to answer from another address or port than it \
                     was asked at, and such replies reach no client; `ppv2-proxy doctor \
                     --probe` shows from which"
                );
            }
        }
    }
}

/// Whether such drops are what the configuration asks for, and nobody misses the datagrams.
fn is_meant(reason: DropReason) -> bool {
    matches!(reason, DropReason::HeaderAlone | DropReason::LocalHeader)
}

/// The longest of the oversize datagrams that workers noted last.
fn oversize(counted: &Counted) -> Option<Oversize> {
    let workers = counted.workers.iter();
    let noted = workers.filter_map(|worker| *worker.oversize.lock().ok()?);
    noted.max_by_key(|oversize| oversize.len)
}

/// Bytes of payload that reach the server unfragmented with a header of that length.
fn fits(oversize: Oversize) -> Option<usize> {
    let mtu = kernel::interface_mtu(oversize.server.ip())?;
    Some(kernel::payload_of(mtu, oversize.server.ip()).saturating_sub(oversize.header))
}

fn is_recent(at: Option<Instant>, now: Instant, pause: Duration) -> bool {
    at.is_some_and(|at| now.saturating_duration_since(at) < pause)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access_log::Unlogged;
    use ppv2_engine::capacity::Capacity;

    /// A log of listeners with these names, and the listeners.
    fn drop_log<const N: usize>(names: [&str; N]) -> (DropLog, [Arc<Listener>; N]) {
        let listeners = names.map(|name| Listener::new(name, 1));
        let counted = Counted {
            listeners: listeners.to_vec(),
            ..Counted::default()
        };
        let metrics = Metrics::new(counted, Capacity::new(1, 1), Unlogged::default());
        (DropLog::new(Arc::new(metrics)), listeners)
    }

    fn drop_at(listener: &Listener, count: u64) {
        listener.counters(0).dropped(DropReason::NoPorts).add(count);
    }

    #[test]
    fn a_million_drops_are_one_notice_a_minute() {
        let (mut log, [listener]) = drop_log(["a"]);
        let mut now = Instant::now();
        let all = |_: &Listener| true;
        assert_eq!(log.notices(now, PAUSE, all), []);
        let mut logged = Vec::new();
        for _ in 0..121 {
            drop_at(&listener, 1_000_000);
            logged.extend(
                log.notices(now, PAUSE, all)
                    .into_iter()
                    .map(|notice| notice.count),
            );
            now += INTERVAL;
        }
        assert_eq!(logged, [1_000_000, 60_000_000, 60_000_000]);
        listener.counters(0).dropped(DropReason::ReplyLate).add(1);
        let notices = log.notices(now, PAUSE, all);
        assert_eq!(notices.len(), 1);
        assert_eq!(notices[0].reason, DropReason::ReplyLate);
    }

    #[test]
    fn all_drops_of_a_removed_listener_are_logged() {
        let (mut log, listeners) = drop_log(["a", "b"]);
        let now = Instant::now();
        for listener in &listeners {
            drop_at(listener, 100);
        }
        log.log(now);
        for listener in &listeners {
            drop_at(listener, 50);
        }
        let [gone, stays] = listeners;
        log.log_gone(&[Arc::clone(&gone)], now);
        log.metrics.follow(Counted {
            listeners: vec![Arc::clone(&stays)],
            ..Counted::default()
        });
        // The drops of the other listener are logged after its pause.
        assert_eq!(log.notices(now, PAUSE, |_| true), []);
        let rest = log.notices(now + PAUSE, PAUSE, |_| true);
        let rest: Vec<_> = rest.iter().map(|n| (&n.listener, n.count)).collect();
        assert_eq!(rest, [(&stays, 50)]);
    }

    /// Its ended sessions hold it for some minutes, and its counters go on.
    #[test]
    fn drops_of_a_listener_that_returns_are_logged_once() {
        let (mut log, [listener]) = drop_log(["a"]);
        let now = Instant::now();
        drop_at(&listener, 100);
        log.log_gone(&[Arc::clone(&listener)], now);
        log.metrics.follow(Counted::default());
        assert_eq!(log.notices(now, PAUSE, |_| true), []);

        log.metrics.follow(Counted {
            listeners: vec![Arc::clone(&listener)],
            ..Counted::default()
        });
        drop_at(&listener, 1);
        let notices = log.notices(now + PAUSE, PAUSE, |_| true);
        let counts: Vec<_> = notices.iter().map(|notice| notice.count).collect();
        assert_eq!(counts, [1]);

        log.metrics.follow(Counted::default());
        drop((notices, listener));
        assert_eq!(log.notices(now + PAUSE, PAUSE, |_| true), []);
        assert!(log.drops.is_empty());
    }

    #[test]
    fn sessions_around_the_mark_are_one_warning_a_minute() {
        let capacity = Capacity::new(10, 10);
        let metrics = Metrics::new(
            Counted::default(),
            Arc::clone(&capacity),
            Unlogged::default(),
        );
        let mut log = DropLog::new(Arc::new(metrics));
        let start = Instant::now();
        let mut permits: Vec<_> = (0..7).map(|_| capacity.take().unwrap()).collect();
        let mut logged = Vec::new();
        for second in 0..200 {
            // Beyond the mark in every other second up to 130, then for good.
            if second % 2 == 1 && second < 130 {
                permits.truncate(7);
            } else if permits.len() == 7 {
                permits.push(capacity.take().unwrap());
            }
            let now = start + Duration::from_secs(second);
            if let Some(taken) = log.nearly_full(now) {
                logged.push((second, taken));
            }
        }
        assert_eq!(logged, [(0, 8), (60, 8), (120, 8)]);
        permits.clear();
        let mut now = start + Duration::from_secs(200);
        assert_eq!(log.nearly_full(now), None);
        permits.extend((0..10).map(|_| capacity.take().unwrap()));
        now += INTERVAL;
        assert_eq!(log.nearly_full(now), Some(10));
    }
}
