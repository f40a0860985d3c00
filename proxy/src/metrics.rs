//! Metrics: the workers' counters summed and written as OpenMetrics text, which
//! Prometheus reads.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::counters::{Counter, DropReason, ListenerCounters, ServerCounters, WorkerCounters};
use crate::health::{Board, Traffic};
use crate::session::Budget;

/// The media type of what [`Metrics::text`] returns.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Everything that is counted, under the names that operators gave.
#[derive(Debug)]
pub struct Metrics {
    /// Listeners' names by number.
    pub listeners: Vec<String>,
    /// Upstreams' and servers' names by the servers' number.
    pub servers: Vec<(String, String)>,
    /// By worker.
    pub workers: Vec<Arc<WorkerCounters>>,
    /// Sessions that may be, and are.
    pub budget: Arc<Budget>,
}

pub(crate) type Labels<'a> = Vec<(&'static str, &'a str)>;
pub(crate) type Samples<'a> = Vec<(Labels<'a>, u64)>;

impl Metrics {
    /// The metrics as text, with those of `health`.
    ///
    /// # Errors
    ///
    /// Only if the encoder of the metrics library fails.
    pub fn text(self: &Arc<Self>, health: Arc<Board>) -> Result<String, fmt::Error> {
        let mut registry = Registry::with_prefix("ppv2");
        registry.register_collector(Box::new(Arc::clone(self)));
        registry.register_collector(Box::new(health));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry)?;
        Ok(text)
    }

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
        workers.map(|worker| read(&worker.listeners[number])).sum()
    }

    fn of_server(&self, number: usize, read: impl Fn(&ServerCounters) -> u64) -> u64 {
        let workers = self.workers.iter();
        workers.map(|worker| read(&worker.servers[number])).sum()
    }

    fn by_listener(&self, read: fn(&ListenerCounters) -> u64) -> Samples<'_> {
        self.listeners
            .iter()
            .enumerate()
            .map(|(number, name)| {
                (
                    vec![("listener", name.as_str())],
                    self.of_listener(number, read),
                )
            })
            .collect()
    }

    fn by_server(&self, read: fn(&ServerCounters) -> u64) -> Samples<'_> {
        self.servers
            .iter()
            .enumerate()
            .map(|(number, (upstream, server))| {
                let labels = vec![("upstream", upstream.as_str()), ("server", server.as_str())];
                (labels, self.of_server(number, read))
            })
            .collect()
    }

    fn drops(&self) -> Samples<'_> {
        self.listeners
            .iter()
            .enumerate()
            .flat_map(|(number, name)| {
                DropReason::ALL.iter().map(move |reason| {
                    let labels = vec![("listener", name.as_str()), ("reason", reason.label())];
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
        ] {
            for (mut labels, value) in self.by_listener(read) {
                labels.push(("reason", reason));
                samples.push((labels, value));
            }
        }
        samples
    }

    fn retired(&self) -> u64 {
        self.workers.iter().map(|worker| worker.retired.get()).sum()
    }
}

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let to = &mut encoder;
        count(
            to,
            "client_datagrams",
            "Datagrams from clients",
            self.by_listener(|c| c.received.get()),
        )?;
        count(
            to,
            "client_bytes",
            "Payload bytes from clients",
            self.by_listener(|c| c.received_bytes.get()),
        )?;
        count(
            to,
            "reply_datagrams",
            "Replies sent to clients",
            self.by_listener(|c| c.replied.get()),
        )?;
        count(
            to,
            "reply_bytes",
            "Payload bytes of replies sent to clients",
            self.by_listener(|c| c.replied_bytes.get()),
        )?;
        count(
            to,
            "receive_overflows",
            "Datagrams from clients that the kernel dropped for want of buffer",
            self.by_listener(|c| c.overflows.get()),
        )?;
        count(
            to,
            "dropped_datagrams",
            "Datagrams dropped, by reason",
            self.drops(),
        )?;
        count(
            to,
            "sessions_opened",
            "Sessions begun",
            self.by_listener(|c| c.opened.get()),
        )?;
        count(
            to,
            "sessions_ended",
            "Sessions ended, by reason",
            self.ends(),
        )?;
        count(
            to,
            "amplified_replies",
            "Replies beyond the limit of `amplification`, dropped or not",
            self.by_listener(|c| c.amplified.get()),
        )?;
        let unlogged = self.workers.iter().map(|w| w.unlogged.get()).sum();
        count(
            to,
            "sessions_unlogged",
            "Ended sessions that the access log had no time for",
            vec![(vec![], unlogged)],
        )?;
        gauge(
            to,
            "sessions",
            "Sessions",
            self.by_listener(|c| {
                let ended = [&c.ended_idle, &c.ended_responses, &c.ended_moved];
                let ended = ended.into_iter().map(Counter::get).sum();
                c.opened.get().saturating_sub(ended)
            }),
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
        let spoiled = self.workers.iter().map(|w| w.spoiled.get()).sum();
        gauge(
            to,
            "session_places_spoiled",
            "Places on shared sockets that an answer may still come to, given to nobody else",
            vec![(vec![], spoiled)],
        )?;
        gauge(
            to,
            "sessions_retired",
            "Sessions that ended and still hold their port",
            vec![(vec![], self.retired())],
        )?;
        let reclaimed = self.workers.iter().map(|w| w.reclaimed.get()).sum();
        count(
            to,
            "sessions_reclaimed",
            "Sessions that ended and gave up their port before it had rested",
            vec![(vec![], reclaimed)],
        )?;
        count(
            to,
            "upstream_datagrams",
            "Datagrams sent to servers",
            self.by_server(|c| c.sent.get()),
        )?;
        count(
            to,
            "upstream_bytes",
            "Bytes sent to servers, headers included",
            self.by_server(|c| c.sent_bytes.get()),
        )?;
        count(
            to,
            "upstream_reply_datagrams",
            "Datagrams received from servers",
            self.by_server(|c| c.replies.get()),
        )?;
        count(
            to,
            "upstream_reply_bytes",
            "Bytes received from servers",
            self.by_server(|c| c.reply_bytes.get()),
        )?;
        count(
            to,
            "upstream_receive_overflows",
            "Replies that the kernel dropped for want of buffer",
            self.by_server(|c| c.overflows.get()),
        )?;
        count(
            to,
            "upstream_refusals",
            "Errors that the network reported of datagrams sent to servers",
            self.by_server(|c| c.refusals.get()),
        )?;
        gauge(
            to,
            "upstream_sessions",
            "Sessions of servers",
            self.by_server(|c| c.opened.get().saturating_sub(c.ended.get())),
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
                let worker = WorkerCounters::new(2, 1);
                worker.listeners[1].received.add(n);
                worker.listeners[1]
                    .dropped(DropReason::NotAllowed)
                    .add(10 * n);
                worker.servers[0].opened.add(3);
                worker.servers[0].ended.add(1);
                Arc::new(worker)
            })
            .collect();
        let metrics = Arc::new(Metrics {
            listeners: vec!["a".into(), "b\"quoted".into()],
            servers: vec![("group".into(), "192.0.2.1:53".into())],
            workers,
            budget: Budget::new(7, 7),
        });
        let text = metrics.text(Arc::default()).unwrap();
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
