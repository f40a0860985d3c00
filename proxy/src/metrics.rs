//! Metrics: the workers' counters summed and written as text for scrapers.

mod format;

use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::access_log::Unlogged;
use ppv2_engine::counters::{
    DropReason, ListenerCounters, OwnCounters, ServerCounters, WorkerCounters,
};
use ppv2_engine::session::Budget;

pub use format::Format;

/// Everything that is counted.
#[derive(Debug)]
pub struct Metrics {
    counted: RwLock<Arc<Counted>>,
    /// Sessions that may be, and are.
    pub budget: Arc<Budget>,
    /// Ended sessions that the access log could not write.
    pub unlogged: Unlogged,
}

/// The workers' counters, under the names that operators gave.
#[derive(Debug, Default)]
pub struct Counted {
    /// Listeners' names by number; `None` for those that are gone.
    pub listeners: Vec<Option<String>>,
    /// Upstreams' and servers' names by the servers' number; `None` for those that
    /// are gone.
    pub servers: Vec<Option<(String, String)>>,
    /// By worker.
    pub workers: Vec<Arc<WorkerCounters>>,
}

/// What was counted of a server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Datagrams sent to it.
    pub sent: u64,
    /// Datagrams received from it.
    pub replies: u64,
    /// Errors that the network reported for datagrams sent to it.
    pub refusals: u64,
}

pub(crate) type Labels<'a> = Vec<(&'static str, &'a str)>;
pub(crate) type Samples<'a> = Vec<(Labels<'a>, u64)>;

impl Metrics {
    /// What workers and the access log count, and the sessions that may be.
    #[must_use]
    pub fn new(counted: Counted, budget: Arc<Budget>, unlogged: Unlogged) -> Self {
        Self {
            counted: RwLock::new(Arc::new(counted)),
            budget,
            unlogged,
        }
    }

    /// Goes by other counters and names from now on.
    pub fn follow(&self, counted: Counted) {
        let mut current = self.counted.write();
        **current
            .as_mut()
            .unwrap_or_else(|poisoned| poisoned.get_mut()) = Arc::new(counted);
    }

    /// The counters and names of this moment.
    #[must_use]
    pub fn counted(&self) -> Arc<Counted> {
        let current = self.counted.read();
        Arc::clone(&current.unwrap_or_else(PoisonError::into_inner))
    }

    /// The metrics as text of this format, with those of `others`.
    ///
    /// # Errors
    ///
    /// Only if the encoder of the metrics library fails.
    pub fn text(
        self: &Arc<Self>,
        format: Format,
        others: impl IntoIterator<Item = Box<dyn Collector>>,
    ) -> Result<String, fmt::Error> {
        let mut registry = Registry::with_prefix("ppv2");
        registry.register_collector(Box::new(Arc::clone(self)));
        for other in others {
            registry.register_collector(other);
        }
        let mut text = String::new();
        encode_registry(&mut text, &registry)?;
        match format {
            Format::Classic => text = format::classic(&text),
            Format::OpenMetrics => encode_eof(&mut text)?,
        }
        Ok(text)
    }
}

impl Counted {
    /// Datagrams of listener number `listener` that all workers dropped for `reason`.
    #[must_use]
    pub fn dropped(&self, listener: usize, reason: DropReason) -> u64 {
        self.of_listener(listener, |counters| counters.dropped(reason).get())
    }

    /// Errors that the network reported of datagrams sent to server number `server`.
    #[must_use]
    pub fn refusals(&self, server: usize) -> u64 {
        self.of_server(server, |counters| counters.refusals.get())
    }

    /// What the workers have counted of server number `server`, in sum.
    #[must_use]
    pub fn traffic(&self, server: usize) -> Traffic {
        Traffic {
            sent: self.of_server(server, |counters| counters.sent.get()),
            replies: self.of_server(server, |counters| counters.replies.get()),
            refusals: self.refusals(server),
        }
    }

    /// Sessions of server number `server`.
    #[must_use]
    pub fn sessions(&self, server: usize) -> u64 {
        self.of_server(server, ServerCounters::sessions)
    }

    fn of_listener(&self, number: usize, read: impl Fn(&ListenerCounters) -> u64) -> u64 {
        let workers = self.workers.iter();
        let counters = workers.filter_map(|worker| worker.listeners.get(number));
        counters.map(|counters| read(counters)).sum()
    }

    fn of_server(&self, number: usize, read: impl Fn(&ServerCounters) -> u64) -> u64 {
        let workers = self.workers.iter();
        let counters = workers.filter_map(|worker| worker.servers.get(number));
        counters.map(|counters| read(counters)).sum()
    }

    /// The listeners that there are, by number.
    pub fn listeners(&self) -> impl Iterator<Item = (usize, &str)> {
        let numbered = self.listeners.iter().enumerate();
        numbered.filter_map(|(number, name)| Some((number, name.as_deref()?)))
    }

    /// The servers that there are, by number: their upstream's name and their own.
    pub fn servers(&self) -> impl Iterator<Item = (usize, (&str, &str))> {
        let numbered = self.servers.iter().enumerate();
        numbered.filter_map(|(number, name)| {
            let (upstream, server) = name.as_ref()?;
            Some((number, (upstream.as_str(), server.as_str())))
        })
    }

    fn by_listener(&self, read: fn(&ListenerCounters) -> u64) -> Samples<'_> {
        self.listeners()
            .map(|(number, name)| (vec![("listener", name)], self.of_listener(number, read)))
            .collect()
    }

    fn by_server(&self, read: fn(&ServerCounters) -> u64) -> Samples<'_> {
        self.servers()
            .map(|(number, (upstream, server))| {
                let labels = vec![("upstream", upstream), ("server", server)];
                (labels, self.of_server(number, read))
            })
            .collect()
    }

    fn drops(&self) -> Samples<'_> {
        self.listeners()
            .flat_map(|(number, name)| {
                DropReason::ALL.iter().map(move |reason| {
                    let labels = vec![("listener", name), ("reason", reason.label())];
                    (labels, self.dropped(number, *reason))
                })
            })
            .collect()
    }

    fn ends(&self) -> Samples<'_> {
        let mut samples = Samples::new();
        for (reason, read) in [
            (
                "idle",
                (|c| c.ended_idle.get()) as fn(&ListenerCounters) -> u64,
            ),
            ("responses", |c| c.ended_responses.get()),
            ("moved", |c| c.ended_moved.get()),
            ("network", |c| c.ended_network.get()),
            ("unanswered", |c| c.ended_unanswered.get()),
            ("denied", |c| c.ended_denied.get()),
            ("stopped", |c| c.ended_stopped.get()),
        ] {
            for (mut labels, value) in self.by_listener(read) {
                labels.push(("reason", reason));
                samples.push((labels, value));
            }
        }
        samples
    }

    fn unlogged(&self) -> u64 {
        let workers = self.workers.iter();
        workers.map(|worker| worker.own.unlogged.get()).sum()
    }

    /// What no listener and no server counts, of all workers together.
    fn own(&self, read: fn(&OwnCounters) -> u64) -> Samples<'_> {
        let sum = self.workers.iter().map(|worker| read(&worker.own)).sum();
        vec![(vec![], sum)]
    }
}

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let to = &mut encoder;
        let counted = self.counted();
        count(
            to,
            "client_datagrams",
            "Datagrams from clients",
            counted.by_listener(|c| c.received.get()),
        )?;
        count(
            to,
            "client_bytes",
            "Payload bytes from clients",
            counted.by_listener(|c| c.received_bytes.get()),
        )?;
        count(
            to,
            "reply_datagrams",
            "Replies sent to clients",
            counted.by_listener(|c| c.replied.get()),
        )?;
        count(
            to,
            "reply_bytes",
            "Payload bytes of replies sent to clients",
            counted.by_listener(|c| c.replied_bytes.get()),
        )?;
        count(
            to,
            "receive_overflows",
            "Datagrams from clients that the kernel dropped for want of buffer",
            counted.by_listener(|c| c.overflows.get()),
        )?;
        count(
            to,
            "dropped_datagrams",
            "Datagrams dropped, by reason",
            counted.drops(),
        )?;
        count(
            to,
            "sessions_opened",
            "Sessions begun",
            counted.by_listener(|c| c.opened.get()),
        )?;
        count(
            to,
            "sessions_ended",
            "Sessions ended, by reason",
            counted.ends(),
        )?;
        count(
            to,
            "overdrawn_datagrams",
            "Datagrams beyond `requests` that sessions took since no other could be begun",
            counted.by_listener(|c| c.overdrawn.get()),
        )?;
        count(
            to,
            "amplified_replies",
            "Replies beyond the limit of `amplification`, dropped or not",
            counted.by_listener(|c| c.amplified.get()),
        )?;
        count(
            to,
            "sessions_unlogged",
            "Ended sessions that are not in the access log, which was full or too slow",
            vec![(
                vec![],
                counted.unlogged() + self.unlogged.load(Ordering::Relaxed),
            )],
        )?;
        gauge(
            to,
            "sessions",
            "Sessions",
            counted.by_listener(ListenerCounters::sessions),
        )?;
        gauge(
            to,
            "sessions_max",
            "Sessions that there may be",
            vec![(vec![], self.budget.max() as u64)],
        )?;
        gauge(
            to,
            "session_sockets",
            "Sockets of sessions, running and ended ones",
            vec![(vec![], self.budget.sockets() as u64)],
        )?;
        gauge(
            to,
            "session_sockets_max",
            "Sockets of sessions that there may be",
            vec![(vec![], self.budget.max_sockets() as u64)],
        )?;
        gauge(
            to,
            "sessions_retired",
            "Sessions that ended and still hold their port",
            counted.own(|c| c.retired.get()),
        )?;
        count(
            to,
            "sessions_reclaimed",
            "Sessions that ended, all answered, and gave up their port before it had rested",
            counted.own(|c| c.reclaimed.get()),
        )?;
        count(
            to,
            "rests_renewed",
            "Times that a late reply restarted the rest of an ended session's port",
            counted.own(|c| c.renewed.get()),
        )?;
        count(
            to,
            "upstream_datagrams",
            "Datagrams sent to servers",
            counted.by_server(|c| c.sent.get()),
        )?;
        count(
            to,
            "upstream_bytes",
            "Bytes sent to servers, headers included",
            counted.by_server(|c| c.sent_bytes.get()),
        )?;
        count(
            to,
            "upstream_reply_datagrams",
            "Datagrams received from servers",
            counted.by_server(|c| c.replies.get()),
        )?;
        count(
            to,
            "upstream_reply_bytes",
            "Bytes received from servers",
            counted.by_server(|c| c.reply_bytes.get()),
        )?;
        count(
            to,
            "upstream_receive_overflows",
            "Replies that the kernel dropped for want of buffer",
            counted.by_server(|c| c.overflows.get()),
        )?;
        count(
            to,
            "upstream_refusals",
            "Errors that the network reported of datagrams sent to servers",
            counted.by_server(|c| c.refusals.get()),
        )?;
        count(
            to,
            "upstream_too_long",
            "Reports by the network that a datagram to a server was too long for a later hop",
            counted.by_server(|c| c.too_long.get()),
        )?;
        gauge(
            to,
            "upstream_sessions",
            "Sessions of servers",
            counted.by_server(|c| c.opened.get().saturating_sub(c.ended.get())),
        )
    }
}

pub(crate) fn count(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: Samples<'_>,
) -> fmt::Result {
    family(to, name, help, samples, ConstCounter::new)
}

pub(crate) fn gauge(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: Samples<'_>,
) -> fmt::Result {
    family(to, name, help, samples, |value| {
        ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX))
    })
}

fn family<M: EncodeMetric>(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: Samples<'_>,
    metric: fn(u64) -> M,
) -> fmt::Result
where
    for<'a> Labels<'a>: EncodeLabelSet,
{
    let mut encoder = to.encode_descriptor(name, help, None, metric(0).metric_type())?;
    for (labels, value) in samples {
        if labels.is_empty() {
            return metric(value).encode(encoder);
        }
        metric(value).encode(encoder.encode_family(&labels)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_are_summed_under_the_operators_names() {
        let workers: Vec<_> = (1..=2)
            .map(|n| {
                let worker = WorkerCounters::new(3, 1);
                worker.listeners[2].received.add(n);
                worker.listeners[2]
                    .dropped(DropReason::NotAllowed)
                    .add(10 * n);
                worker.servers[0].opened.add(3);
                worker.servers[0].ended.add(1);
                Arc::new(worker)
            })
            .collect();
        let counted = Counted {
            listeners: vec![Some("a".into()), None, Some("b\"quoted".into())],
            servers: vec![Some(("group".into(), "192.0.2.1:53".into())), None],
            workers,
        };
        let metrics = Arc::new(Metrics::new(
            counted,
            Budget::new(7, 7),
            Unlogged::default(),
        ));
        let text = metrics.text(Format::OpenMetrics, []).unwrap();
        for line in [
            "# TYPE ppv2_client_datagrams counter",
            "ppv2_client_datagrams_total{listener=\"a\"} 0",
            "ppv2_client_datagrams_total{listener=\"b\\\"quoted\"} 3",
            "ppv2_dropped_datagrams_total{listener=\"b\\\"quoted\",reason=\"not_allowed\"} 30",
            "ppv2_upstream_sessions{upstream=\"group\",server=\"192.0.2.1:53\"} 4",
            "ppv2_sessions_max 7",
            "# EOF",
        ] {
            assert!(
                text.lines().any(|l| l == line),
                "{line} is missing in\n{text}"
            );
        }
        let reasons = text
            .matches("ppv2_dropped_datagrams_total{listener=\"a\"")
            .count();
        assert_eq!(reasons, DropReason::ALL.len());
    }
}
