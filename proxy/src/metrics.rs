//! Metrics: the workers' counters, summed and written as text for scrapers.

mod format;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, Weak};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::access_log::Unlogged;
use crate::log;
use crate::registry::ActiveConfig;
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
    /// What came of reloads.
    pub reloads: Reloads,
}

/// What came of reloads.
#[derive(Debug, Default)]
pub struct Reloads {
    applied: AtomicU64,
    rejected: AtomicU64,
    latest_is_rejected: AtomicBool,
}

impl Reloads {
    /// Counts a reload that has ended.
    pub fn record(&self, is_applied: bool) {
        let count = if is_applied {
            &self.applied
        } else {
            &self.rejected
        };
        count.fetch_add(1, Ordering::Relaxed);
        self.latest_is_rejected
            .store(!is_applied, Ordering::Relaxed);
    }

    /// How many were applied.
    #[must_use]
    pub fn applied(&self) -> u64 {
        self.applied.load(Ordering::Relaxed)
    }

    /// How many were rejected.
    #[must_use]
    pub fn rejected(&self) -> u64 {
        self.rejected.load(Ordering::Relaxed)
    }

    /// Whether the latest reload was rejected, so that the former configuration still holds.
    #[must_use]
    pub fn is_latest_rejected(&self) -> bool {
        self.latest_is_rejected.load(Ordering::Relaxed)
    }
}

/// What counts.
#[derive(Debug, Default)]
pub struct Counted {
    /// The configuration in force.
    pub active: Option<Arc<ActiveConfig>>,
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
            reloads: Reloads::default(),
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

/// A counter: its name without prefix and suffix, help text, and value.
type Row<C> = (&'static str, &'static str, fn(&C) -> u64);

macro_rules! rows {
    ($($field:ident => $name:literal, $help:literal;)*) => {
        &[$(($name, $help, |c| c.$field.get()),)*]
    };
}

const OF_LISTENERS: &[Row<ListenerCounters>] = rows! {
    received => "client_datagrams", "Datagrams received from clients";
    received_bytes => "client_bytes", "Payload bytes received from clients";
    replied => "reply_datagrams", "Replies sent to clients";
    replied_bytes => "reply_bytes", "Payload bytes of replies sent to clients";
    overflows => "receive_overflows",
        "Datagrams from clients that the kernel dropped because a receive buffer was full";
    without_header => "datagrams_without_header",
        "Datagrams without a header from senders that `accept.remember` remembers";
    unremembered => "senders_unremembered",
        "Senders that were not remembered because `accept.remember.max` others were";
    nested_headers => "nested_headers",
        "Datagrams whose header is followed by another one, which is payload";
    opened => "sessions_opened", "Sessions opened";
    overdrawn => "requests_exceeded_datagrams",
        "Datagrams beyond `requests` that a session took because no new one could be opened";
    amplified => "amplified_replies",
        "Replies beyond `amplification.limit`, whether dropped or not";
};

const OF_WORKERS: &[Row<WorkerCounters>] = rows! {
    reclaimed => "resting_ports_reclaimed",
        "Ports of fully answered sessions that were freed before their rest was over";
    renewed => "resting_ports_renewed", "Late replies that restarted the rest of a port";
};

const OF_SERVERS: &[Row<ServerCounters>] = rows! {
    sent => "upstream_datagrams", "Datagrams sent to servers";
    sent_bytes => "upstream_bytes", "Bytes sent to servers, headers included";
    replies => "upstream_reply_datagrams", "Datagrams received from servers";
    reply_bytes => "upstream_reply_bytes", "Bytes received from servers";
    overflows => "upstream_receive_overflows",
        "Replies that the kernel dropped because a receive buffer was full, and what came to a source network from elsewhere than its servers";
    refusals => "upstream_icmp_errors",
        "ICMP errors for datagrams sent to servers, such as port unreachable";
    too_long => "upstream_icmp_too_big",
        "ICMP reports that a datagram to a server was too long for a later hop, which are ignored";
};

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let to = &mut encoder;
        let counted = self.counted();
        for (name, help, read) in OF_LISTENERS {
            count(to, name, help, counted.by_listener(*read))?;
        }
        let (dropped, ended) = (counted.drops(), counted.ends());
        count(to, "dropped_datagrams", "Datagrams dropped", dropped)?;
        count(to, "sessions_ended", "Sessions ended", ended)?;
        let sessions = counted.by_listener(ListenerCounters::sessions);
        gauge(to, "sessions", "Open sessions", sessions)?;
        for (name, help, read) in OF_WORKERS {
            count(to, name, help, counted.own(*read))?;
        }
        let unlogged = counted.sum(|c| c.unlogged.get()) + self.unlogged.load(Ordering::Relaxed);
        let help = "Ended sessions missing from the access log, which was full or too slow";
        count(to, "sessions_unlogged", help, vec![(vec![], unlogged)])?;
        let help = "Lines of the log on standard error that could not be written";
        count(
            to,
            "log_lines_lost",
            help,
            vec![(vec![], log::lost_lines())],
        )?;
        let help =
            "Ports kept from reuse after a session, so that a late reply reaches no other client";
        gauge(to, "resting_ports", help, counted.own(|c| c.retired.get()))?;
        let results = [
            ("applied", self.reloads.applied()),
            ("rejected", self.reloads.rejected()),
        ];
        let results = results.map(|(result, counted)| (vec![("result", result)], counted));
        let help = "Reloads of the configuration, by result";
        count(to, "reloads", help, results.into())?;
        let help = "1 if the latest reload was rejected, so that the former configuration still holds, else 0";
        let rejected = vec![(vec![], u64::from(self.reloads.is_latest_rejected()))];
        gauge(to, "reload_rejected", help, rejected)?;
        let all = &self.capacity;
        for (name, help, value) in [
            ("sessions_max", "Most open sessions", all.max()),
            (
                "session_sockets",
                "Sockets of sessions and resting ports",
                all.sockets(),
            ),
            (
                "session_sockets_max",
                "Most sockets of sessions and resting ports",
                all.max_sockets(),
            ),
        ] {
            gauge(to, name, help, vec![(vec![], value as u64)])?;
        }
        let servers = counted.servers().into_iter();
        let servers: Vec<Labelled> = servers
            .map(|server| (Arc::clone(&server), server.label()))
            .collect();
        for (name, help, read) in OF_SERVERS {
            count(to, name, help, by_server(&servers, *read))?;
        }
        let sessions = by_server(&servers, ServerCounters::sessions);
        gauge(
            to,
            "upstream_sessions",
            "Open sessions of servers",
            sessions,
        )?;
        let help = "1 for servers whose latest replies carried the tags of `replies`";
        let returns_tags = servers.iter().map(|(server, label)| {
            let labels = vec![("upstream", &*server.upstream), ("server", &**label)];
            (labels, u64::from(server.returns_tags()))
        });
        gauge(to, "upstream_returns_tags", help, returns_tags.collect())
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
            counters.without_header.add(n);
            counters.unremembered.add(2 * n);
            counters.nested_headers.add(3 * n);
            server.counters(worker).opened.add(3);
            server.counters(worker).ended.add(1);
        }
        let gone = Server::new("group", "192.0.2.2:53", address, 2);
        let counted = Counted {
            active: None,
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
            "ppv2_datagrams_without_header_total{listener=\"b\\\"quoted\"} 3",
            "ppv2_senders_unremembered_total{listener=\"b\\\"quoted\"} 6",
            "ppv2_nested_headers_total{listener=\"b\\\"quoted\"} 9",
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
