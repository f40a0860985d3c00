//! Tells the operator what is being dropped: at once when it begins, then at
//! most once a minute for each reason, however many datagrams it concerns.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::counters::DropReason;
use crate::metrics::Metrics;

/// How often to look.
pub const INTERVAL: Duration = Duration::from_secs(1);

/// How long to say nothing more of one listener and reason.
const PAUSE: Duration = Duration::from_secs(60);

/// Share of the sessions, in percent, from which on it is worth a warning.
const NEARLY_FULL: usize = 80;

/// What was dropped since it was last spoken of.
#[derive(Debug, PartialEq, Eq)]
pub struct Notice {
    /// Number of the listener.
    pub listener: usize,
    /// Why.
    pub reason: DropReason,
    /// How many since the last notice of the kind.
    pub count: u64,
}

/// Compares counters over time. Takes the time as an argument.
#[derive(Debug)]
pub struct Watch {
    metrics: Arc<Metrics>,
    told: HashMap<(usize, &'static str), (u64, Option<Instant>)>,
    full_told: bool,
}

impl Watch {
    /// Watches `metrics` from zero.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            metrics,
            told: HashMap::new(),
            full_told: false,
        }
    }

    /// What should be told now.
    pub fn notices(&mut self, now: Instant) -> Vec<Notice> {
        let mut notices = Vec::new();
        for listener in 0..self.metrics.listeners.len() {
            for reason in DropReason::ALL {
                let total = self.metrics.dropped(listener, *reason);
                let (seen, at) = self
                    .told
                    .entry((listener, reason.label()))
                    .or_insert((0, None));
                let count = total.saturating_sub(*seen);
                let quiet = at.is_some_and(|at| now.saturating_duration_since(at) < PAUSE);
                if count > 0 && !quiet {
                    (*seen, *at) = (total, Some(now));
                    notices.push(Notice {
                        listener,
                        reason: *reason,
                        count,
                    });
                }
            }
        }
        notices
    }

    /// Logs what should be told now.
    pub fn log(&mut self, now: Instant) {
        for notice in self.notices(now) {
            let Notice {
                listener,
                reason,
                count,
            } = notice;
            let oversize = (reason == DropReason::Oversize).then(|| self.oversize());
            tracing::warn!(
                listener = self.metrics.listeners[listener],
                reason = reason.label(),
                count,
                len = oversize.map(|(len, _)| len),
                fits = oversize.map(|(_, fits)| fits),
                "datagrams dropped: {}; {}",
                reason.meaning(),
                reason.mend(),
            );
        }
        let (taken, max) = (self.metrics.budget.taken(), self.metrics.budget.max());
        let nearly_full = taken.saturating_mul(100) >= max.saturating_mul(NEARLY_FULL);
        if nearly_full && !self.full_told {
            tracing::warn!(
                sessions = taken,
                max,
                "sessions are nearly all taken; raise `limits.max_sessions` or shorten `idle_timeout`"
            );
        }
        self.full_told = nearly_full;
    }

    /// Length of the latest oversize datagram with its header, and the payload
    /// that would have fitted.
    fn oversize(&self) -> (u64, u64) {
        self.metrics
            .workers
            .iter()
            .map(|worker| (worker.oversize_len.get(), worker.oversize_fits.get()))
            .max()
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counters::WorkerCounters;
    use crate::session::Budget;

    #[test]
    fn a_million_drops_are_one_notice_a_minute() {
        let worker = Arc::new(WorkerCounters::new(1, 1));
        let mut watch = Watch::new(Arc::new(Metrics {
            listeners: vec!["a".into()],
            servers: vec![("u".into(), "s".into())],
            workers: vec![Arc::clone(&worker)],
            budget: Budget::new(1, 1),
        }));
        let mut now = Instant::now();
        assert_eq!(watch.notices(now), []);
        let mut told = Vec::new();
        for _ in 0..121 {
            worker.listeners[0]
                .dropped(DropReason::NoPorts)
                .add(1_000_000);
            told.extend(watch.notices(now).into_iter().map(|notice| notice.count));
            now += INTERVAL;
        }
        assert_eq!(told, [1_000_000, 60_000_000, 60_000_000]);
        worker.listeners[0].dropped(DropReason::ReplyLate).add(1);
        let notices = watch.notices(now);
        assert_eq!(notices.len(), 1);
        assert_eq!(notices[0].reason, DropReason::ReplyLate);
    }
}
