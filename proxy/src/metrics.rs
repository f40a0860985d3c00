//! Metrics: the workers' counters summed and written as text for scrapers.

mod format;

use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock, Weak};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::access_log::Unlogged;
use ppv2_engine::capacity::Capacity;
use ppv2_engine::counters::{
    DropReason, EndReason, ListenerCounters, ServerCounters, WorkerCounters,
};
use ppv2_engine::listener::Listener;
use ppv2_engine::server::Server;

pub use format::Format;

/// Everything that is counted.
#[derive(Debug)]
pub struct Metrics {
    counted: RwLock<Arc<Counted>>,
    /// Sessions that may be, and are.
    pub capacity: Arc<Capacity>,
    /// Ended sessions that the access log could not write.
    pub unlogged: Unlogged,
}

/// What counts.
#[derive(Debug, Default)]
pub struct Counted {
    /// Listeners that are shown.
    pub listeners: Vec<Arc<Listener>>,
    /// Servers. Those that anything holds are shown.
    pub servers: Vec<Weak<Server>>,
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

impl Traffic {
    /// What all workers have counted of `server`.
    #[must_use]
    pub fn of(server: &Server) -> Self {
        Self {
            sent: server.sum(|counters| counters.sent.get()),
            replies: server.sum(|counters| counters.replies.get()),
            refusals: server.sum(|counters| counters.refusals.get()),
        }
    }
}

/// A server that is shown, with its label.
type Labelled = (Arc<Server>, String);

pub(crate) type Labels<'a> = Vec<(&'static str, &'a str)>;
pub(crate) type Samples<'a> = Vec<(Labels<'a>, u64)>;

impl Metrics {
    /// What workers and the access log count, and the sessions that may be.
    #[must_use]
    pub fn new(counted: Counted, capacity: Arc<Capacity>, unlogged: Unlogged) -> Self {
        Self {
            counted: RwLock::new(Arc::new(counted)),
            capacity,
            unlogged,
        }
    }

    /// Shows other listeners and servers.
    pub fn follow(&self, counted: Counted) {
        let mut current = self.counted.write();
        **current
            .as_mut()
            .unwrap_or_else(|poisoned| poisoned.get_mut()) = Arc::new(counted);
    }

    /// What counts at present.
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
    /// The servers that anything holds.
    #[must_use]
    pub fn servers(&self) -> Vec<Arc<Server>> {
        self.servers.iter().filter_map(Weak::upgrade).collect()
    }

    fn by_listener(&self, read: fn(&ListenerCounters) -> u64) -> Samples<'_> {
        let listeners = self.listeners.iter();
        listeners
            .map(|listener| (vec![("listener", &*listener.name)], listener.sum(read)))
            .collect()
    }

    fn drops(&self) -> Samples<'_> {
        self.by_reason(DropReason::ALL, DropReason::label, |counters, reason| {
            counters.dropped(reason).get()
        })
    }

    fn ends(&self) -> Samples<'_> {
        self.by_reason(&EndReason::ALL, EndReason::label, |counters, reason| {
            counters.ended(reason).get()
        })
    }

    fn by_reason<R: Copy>(
        &self,
        all: &[R],
        label: fn(R) -> &'static str,
        read: fn(&ListenerCounters, R) -> u64,
    ) -> Samples<'_> {
        let mut samples = Samples::new();
        for listener in &self.listeners {
            for reason in all {
                let labels = vec![("listener", &*listener.name), ("reason", label(*reason))];
                samples.push((labels, listener.sum(|counters| read(counters, *reason))));
            }
        }
        samples
    }

    /// What no listener and no server counts, of all workers together.
    fn sum(&self, read: fn(&WorkerCounters) -> u64) -> u64 {
        self.workers.iter().map(|worker| read(worker)).sum()
    }

    fn own(&self, read: fn(&WorkerCounters) -> u64) -> Samples<'_> {
        vec![(vec![], self.sum(read))]
    }
}

fn by_server(servers: &[Labelled], read: fn(&ServerCounters) -> u64) -> Samples<'_> {
    let servers = servers.iter().map(|(server, label)| {
        let labels = vec![("upstream", &*server.upstream), ("server", label.as_str())];
        (labels, server.sum(read))
    });
    servers.collect()
}

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let to = &mut encoder;
        let counted = self.counted();
        let servers = counted.servers().into_iter();
        let servers: Vec<Labelled> = servers
            .map(|server| (Arc::clone(&server), server.label()))
            .collect();
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
                counted.sum(|c| c.unlogged.get()) + self.unlogged.load(Ordering::Relaxed),
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
            vec![(vec![], self.capacity.max() as u64)],
        )?;
        gauge(
            to,
            "session_sockets",
            "Sockets of sessions, running and ended ones",
            vec![(vec![], self.capacity.sockets() as u64)],
        )?;
        gauge(
            to,
            "session_sockets_max",
            "Sockets of sessions that there may be",
            vec![(vec![], self.capacity.max_sockets() as u64)],
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
            by_server(&servers, |c| c.sent.get()),
        )?;
        count(
            to,
            "upstream_bytes",
            "Bytes sent to servers, headers included",
            by_server(&servers, |c| c.sent_bytes.get()),
        )?;
        count(
            to,
            "upstream_reply_datagrams",
            "Datagrams received from servers",
            by_server(&servers, |c| c.replies.get()),
        )?;
        count(
            to,
            "upstream_reply_bytes",
            "Bytes received from servers",
            by_server(&servers, |c| c.reply_bytes.get()),
        )?;
        count(
            to,
            "upstream_receive_overflows",
            "Replies that the kernel dropped for want of buffer",
            by_server(&servers, |c| c.overflows.get()),
        )?;
        count(
            to,
            "upstream_refusals",
            "Errors that the network reported of datagrams sent to servers",
            by_server(&servers, |c| c.refusals.get()),
        )?;
        count(
            to,
            "upstream_too_long",
            "Reports by the network that a datagram to a server was too long for a later hop",
            by_server(&servers, |c| c.too_long.get()),
        )?;
        gauge(
            to,
            "upstream_sessions",
            "Sessions of servers",
            by_server(&servers, ServerCounters::sessions),
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
    use ppv2_engine::address::ServerAddr;

    use super::*;

    #[test]
    fn workers_are_summed_under_the_operators_names() {
        let listeners = ["a", "b\"quoted"].map(|name| Listener::new(name, 2));
        let address = ServerAddr(([192, 0, 2, 1], 53).into());
        let server = Server::new("group", "192.0.2.1:53", address, 2);
        for (worker, n) in (0..2).zip(1..) {
            let counters = listeners[1].counters(worker);
            counters.received.add(n);
            counters.dropped(DropReason::NotAllowed).add(10 * n);
            server.counters(worker).opened.add(3);
            server.counters(worker).ended.add(1);
        }
        let gone = Server::new("group", "192.0.2.2:53", address, 2);
        let counted = Counted {
            listeners: listeners.into(),
            servers: vec![Arc::downgrade(&server), Arc::downgrade(&gone)],
            workers: Vec::new(),
        };
        drop(gone);
        let metrics = Arc::new(Metrics::new(
            counted,
            Capacity::new(7, 7),
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
        assert!(!text.contains("192.0.2.2"));
        let reasons = text
            .matches("ppv2_dropped_datagrams_total{listener=\"a\"")
            .count();
        assert_eq!(reasons, DropReason::ALL.len());
    }
}
