//! What a socket has seen, in numbers. Counters only ever grow.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::DropReason;

const REASONS: usize = DropReason::ALL.len();

/// A snapshot of a socket's counters, taken one after the other: under load
/// they need not add up to the last datagram.
///
/// ```
/// use ppv2_sdk::{Trust, UdpSocket};
///
/// let socket = UdpSocket::bind("127.0.0.1:0", Trust::networks(["192.0.2.0/24"]).build()?)?;
///
/// for (reason, count) in socket.stats().drops() {
///     println!("datagrams_dropped{{reason=\"{reason}\"}} {count}");
/// }
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Datagrams received, delivered and dropped ones together.
    pub received: u64,
    /// Datagrams handed to the application.
    pub delivered: u64,
    /// Datagrams sent to clients.
    pub replies_sent: u64,
    /// Datagrams not sent, since there is no reply path to their client, or no longer.
    pub replies_without_path: u64,
    /// Clients forgotten before their time to make room for new ones. If it
    /// grows, [`max_clients`](crate::TrustBuilder::max_clients) is too low.
    pub clients_evicted: u64,
    /// Sockets bound to listeners' addresses that were closed to make room for
    /// others, with [`ReplyFrom::Listener`](crate::ReplyFrom::Listener). If it
    /// grows, this server has more listeners than are kept.
    pub listeners_evicted: u64,
    /// Headers whose sender was not remembered, since
    /// [`remember_senders`](crate::TrustBuilder::remember_senders) remembers as many as it
    /// may. Their datagrams were delivered; those that the sender sends without a header are
    /// dropped. If it grows, `max` is too low.
    pub senders_not_remembered: u64,
    /// Clients that are remembered now: heard within
    /// [`forget_after`](crate::TrustBuilder::forget_after).
    pub clients: usize,
    dropped: [u64; REASONS],
}

impl Stats {
    /// Datagrams dropped for `reason`.
    #[must_use]
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.dropped[reason.index()]
    }

    /// Datagrams dropped for any reason.
    #[must_use]
    pub fn dropped_total(&self) -> u64 {
        self.dropped.iter().sum()
    }

    /// Every reason with the number of datagrams dropped for it, zeroes too.
    pub fn drops(&self) -> impl Iterator<Item = (DropReason, u64)> {
        DropReason::ALL.iter().copied().zip(self.dropped)
    }
}

impl fmt::Debug for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        struct Drops<'s>(&'s Stats);

        impl fmt::Debug for Drops<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let drops = self.0.drops();
                let drops = drops.map(|(reason, count)| (reason.as_str(), count));
                f.debug_map().entries(drops).finish()
            }
        }

        f.debug_struct("Stats")
            .field("received", &self.received)
            .field("delivered", &self.delivered)
            .field("replies_sent", &self.replies_sent)
            .field("replies_without_path", &self.replies_without_path)
            .field("clients_evicted", &self.clients_evicted)
            .field("listeners_evicted", &self.listeners_evicted)
            .field("senders_not_remembered", &self.senders_not_remembered)
            .field("clients", &self.clients)
            .field("dropped", &Drops(self))
            .finish()
    }
}

/// The counters behind [`Stats`], except those under the lock of the demux.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    dropped: [AtomicU64; REASONS],
    replies_sent: AtomicU64,
    replies_without_path: AtomicU64,
    clients_evicted: AtomicU64,
    listeners_evicted: AtomicU64,
    senders_not_remembered: AtomicU64,
}

impl Counters {
    pub(crate) fn dropped(&self, reason: DropReason) {
        self.dropped[reason.index()].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn replies_sent(&self, count: usize) {
        self.replies_sent.fetch_add(count as u64, Ordering::Relaxed);
    }

    pub(crate) fn reply_without_path(&self) {
        self.replies_without_path.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn client_evicted(&self) {
        self.clients_evicted.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn listener_evicted(&self) {
        self.listeners_evicted.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn sender_not_remembered(&self) {
        self.senders_not_remembered.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn snapshot(&self, clients: usize, delivered: u64) -> Stats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let dropped = self.dropped.each_ref().map(get);
        Stats {
            received: delivered + dropped.iter().sum::<u64>(),
            delivered,
            replies_sent: get(&self.replies_sent),
            replies_without_path: get(&self.replies_without_path),
            clients_evicted: get(&self.clients_evicted),
            listeners_evicted: get(&self.listeners_evicted),
            senders_not_remembered: get(&self.senders_not_remembered),
            clients,
            dropped,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_are_printed_by_the_names_of_their_reasons() {
        let counters = Counters::default();
        counters.dropped(DropReason::NoHeader);
        let printed = format!("{:?}", counters.snapshot(0, 0));
        assert!(
            printed
                .contains("dropped: {\"untrusted\": 0, \"direct_conflict\": 0, \"no_header\": 1,"),
            "{printed}"
        );
    }
}
