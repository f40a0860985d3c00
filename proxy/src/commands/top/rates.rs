//! Rates: what counters have grown by between two answers of one process.

use std::collections::HashMap;

use super::answer::{Listener, Server, Status, Text};

/// The shortest time between two answers whose difference says something.
const MIN_SECONDS: f64 = 0.02;

/// What listeners and servers have done per second.
#[derive(Clone, Debug, Default)]
pub(super) struct Rates {
    /// By name.
    listeners: HashMap<Text, Flow>,
    /// By upstream and label.
    servers: HashMap<(Text, Text), Flow>,
    /// By listener and reason.
    drops: HashMap<(Text, Text), f64>,
    /// By listener.
    overflows: HashMap<Text, f64>,
}

/// What a listener or a server has done per second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Flow {
    /// Datagrams of clients and their bytes.
    pub(super) datagrams: f64,
    pub(super) bytes: f64,
    pub(super) reply_datagrams: f64,
    pub(super) reply_bytes: f64,
    /// Sessions begun.
    pub(super) sessions: f64,
    /// Datagrams lost: dropped ones of a listener; ICMP errors and lost replies of a server.
    pub(super) lost: f64,
}

impl Flow {
    const FIELDS: usize = 6;

    fn of(values: [f64; Self::FIELDS]) -> Self {
        let [
            datagrams,
            bytes,
            reply_datagrams,
            reply_bytes,
            sessions,
            lost,
        ] = values;
        Self {
            datagrams,
            bytes,
            reply_datagrams,
            reply_bytes,
            sessions,
            lost,
        }
    }

    fn values(&self) -> [f64; Self::FIELDS] {
        [
            self.datagrams,
            self.bytes,
            self.reply_datagrams,
            self.reply_bytes,
            self.sessions,
            self.lost,
        ]
    }

    /// The sum of several.
    pub(super) fn sum(flows: impl Iterator<Item = Self>) -> Self {
        let mut sum = [0.0; Self::FIELDS];
        for flow in flows {
            for (total, value) in sum.iter_mut().zip(flow.values()) {
                *total += value;
            }
        }
        Self::of(sum)
    }
}

/// Counters in the order of [`Flow`].
type Counters = [u64; Flow::FIELDS];

/// All datagrams that the listener has dropped, and those that the kernel has.
pub(super) fn lost(listener: &Listener) -> u64 {
    listener
        .drops
        .values()
        .fold(listener.receive_overflows, |sum, drops| {
            sum.saturating_add(*drops)
        })
}

fn of_listener(listener: &Listener) -> Counters {
    [
        listener.client_datagrams,
        listener.client_bytes,
        listener.reply_datagrams,
        listener.reply_bytes,
        listener.sessions_opened,
        lost(listener),
    ]
}

fn of_server(server: &Server) -> Counters {
    [
        server.datagrams,
        server.bytes,
        server.reply_datagrams,
        server.reply_bytes,
        server.sessions_opened,
        server.icmp_errors.saturating_add(server.receive_overflows),
    ]
}

/// The servers of a status, by upstream and label.
fn servers(status: &Status) -> impl Iterator<Item = ((Text, Text), &Server)> {
    status.upstreams.iter().flat_map(|upstream| {
        let name = &upstream.upstream;
        let servers = upstream.servers.iter();
        servers.map(|server| ((name.clone(), server.label.clone()), server))
    })
}

impl Rates {
    /// What has happened per second between two answers. None if they are of two processes:
    /// the counters of a restarted proxy begin at 0.
    pub(super) fn between(old: &Status, new: &Status) -> Option<Self> {
        let seconds = new.uptime_seconds - old.uptime_seconds;
        // Both are the same numbers of one process, not measured twice.
        let is_same = old.started_unix_seconds.to_bits() == new.started_unix_seconds.to_bits();
        if !is_same || seconds < MIN_SECONDS {
            return None;
        }
        let step = Step { seconds };
        let mut rates = Self::default();
        let before: HashMap<&Text, &Listener> =
            old.listeners.iter().map(|l| (&l.listener, l)).collect();
        for listener in &new.listeners {
            // One that a reload has brought has no rate at first.
            let Some(before) = before.get(&listener.listener) else {
                continue;
            };
            let name = &listener.listener;
            let flow = step.flow(of_listener(before), of_listener(listener))?;
            rates.listeners.insert(name.clone(), flow);
            let overflows = step.rate(before.receive_overflows, listener.receive_overflows)?;
            rates.overflows.insert(name.clone(), overflows);
            for (reason, drops) in &listener.drops {
                let before = before.drops.get(reason).copied().unwrap_or(0);
                let key = (name.clone(), reason.clone());
                rates.drops.insert(key, step.rate(before, *drops)?);
            }
        }
        let before: HashMap<(Text, Text), &Server> = servers(old).collect();
        for (key, server) in servers(new) {
            if let Some(before) = before.get(&key) {
                let flow = step.flow(of_server(before), of_server(server))?;
                rates.servers.insert(key, flow);
            }
        }
        Some(rates)
    }

    pub(super) fn listener(&self, name: &Text) -> Option<Flow> {
        self.listeners.get(name).copied()
    }

    pub(super) fn server(&self, upstream: &Text, label: &Text) -> Option<Flow> {
        self.servers
            .get(&(upstream.clone(), label.clone()))
            .copied()
    }

    /// Datagrams that the kernel has dropped.
    pub(super) fn overflows(&self, listener: &Text) -> Option<f64> {
        self.overflows.get(listener).copied()
    }

    pub(super) fn drops(&self, listener: &Text, reason: &Text) -> Option<f64> {
        self.drops.get(&(listener.clone(), reason.clone())).copied()
    }

    /// The sum of all listeners.
    pub(super) fn total(&self) -> Flow {
        Flow::sum(self.listeners.values().copied())
    }
}

/// The time between two answers.
struct Step {
    seconds: f64,
}

impl Step {
    /// None if the counter has become smaller: another process answers.
    fn rate(&self, old: u64, new: u64) -> Option<f64> {
        Some(new.checked_sub(old)? as f64 / self.seconds)
    }

    fn flow(&self, old: Counters, new: Counters) -> Option<Flow> {
        let mut rates = [0.0; Flow::FIELDS];
        for (rate, (old, new)) in rates.iter_mut().zip(old.into_iter().zip(new)) {
            *rate = self.rate(old, new)?;
        }
        Some(Flow::of(rates))
    }
}
