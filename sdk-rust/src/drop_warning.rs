//! Warnings of dropped datagrams, with the reason and the setting behind it: the first
//! time for each reason, then at most once a minute.

use std::fmt;
use std::mem;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::DropReason;
use crate::address::canonical;
use crate::clock::Tick;

const REASONS: usize = DropReason::ALL.len();

/// Time between two warnings of one reason. Anybody can send what must be dropped,
/// so the interval bounds what strangers can write to the log.
const INTERVAL: Duration = Duration::from_secs(60);

/// Never, as the time of a warning.
const NEVER: i64 = i64::MIN;

/// Decides which drops are worth a warning: for each reason the first, then at most
/// one a minute.
#[derive(Debug)]
pub(crate) struct Warnings {
    occasions: [Occasionally; REASONS],
    since_last: [AtomicU64; REASONS],
    /// Not taken yet, at most one for each reason.
    pending: Mutex<Vec<DropWarning>>,
}

/// A dropped datagram that the operator should know of. Its [`Display`](fmt::Display) names the
/// sender, the reason and the setting to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DropWarning {
    /// Where the datagram came from.
    pub sender: SocketAddr,
    /// Why it was dropped.
    pub reason: DropReason,
    /// Datagrams dropped for this reason since the warning before, this one
    /// included.
    pub since_last: u64,
}

/// The first time, then at most once a minute.
#[derive(Debug)]
pub(crate) struct Occasionally(AtomicI64);

impl Occasionally {
    pub(crate) const fn new() -> Self {
        Self(AtomicI64::new(NEVER))
    }

    /// Whether it is time, which it is for one only of several threads that ask at
    /// once.
    pub(crate) fn is_due(&self, now: Tick) -> bool {
        let before = self.0.load(Ordering::Relaxed);
        let waits = before != NEVER && !now.is_past(Tick::from_number(before), INTERVAL.into());
        !waits
            && self
                .0
                .compare_exchange(before, now.number(), Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }
}

impl Warnings {
    pub(crate) fn new() -> Self {
        Self {
            occasions: [const { Occasionally::new() }; REASONS],
            since_last: [const { AtomicU64::new(0) }; REASONS],
            pending: Mutex::default(),
        }
    }

    /// Counts a datagram from `peer` that was dropped for `reason`; the warning if
    /// one is due.
    pub(crate) fn due(
        &self,
        now: Tick,
        peer: SocketAddr,
        reason: DropReason,
    ) -> Option<DropWarning> {
        let since_last = &self.since_last[reason.index()];
        since_last.fetch_add(1, Ordering::Relaxed);
        if !self.occasions[reason.index()].is_due(now) {
            return None;
        }
        let warning = DropWarning {
            sender: canonical(peer),
            reason,
            since_last: since_last.swap(0, Ordering::Relaxed),
        };
        let mut pending = self.pending();
        pending.retain(|other| other.reason != reason);
        pending.push(warning);
        Some(warning)
    }

    pub(crate) fn take(&self) -> Vec<DropWarning> {
        mem::take(&mut *self.pending())
    }

    fn pending(&self) -> MutexGuard<'_, Vec<DropWarning>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Display for DropWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            sender,
            reason,
            since_last,
        } = self;
        let ip = sender.ip();
        write!(f, "dropped a datagram from {sender} ({reason}): ")?;
        match reason {
            DropReason::Untrusted => write!(
                f,
                "{ip} is in none of the trusted networks; if it is the proxy, add it to \
                 `trusted`; if it is a client that comes directly, set `untrusted` to accept"
            ),
            DropReason::DirectConflict => write!(
                f,
                "it came directly, though a proxy named that address as its client; have \
                 clients come either directly or through the proxy"
            ),
            DropReason::NoHeader => write!(
                f,
                "{ip} is in the networks `trusted`, and sent no header of the formats that are \
                 allowed; have the proxy send it with every datagram (mode = \"ppv2\", header \
                 emit = \"every\" of ppv2-proxy), or set `formats` or `remember_senders`, or \
                 take {ip} out of `trusted`"
            ),
            DropReason::V1Header => write!(
                f,
                "it begins with a PROXY header of version 1, which is text and has no place in a \
                 datagram; nginx up to 1.31.3 sends it with `proxy_protocol on`: use nginx 1.31.4 \
                 or later with `proxy_protocol v2`, and either `proxy_requests 1` and \
                 `proxy_responses 1`, or `remember_senders` here"
            ),
            DropReason::BadHeader => write!(
                f,
                "its PROXY v2 header is malformed; have {ip} send a valid one, or take {ip} out \
                 of `trusted`"
            ),
            DropReason::HeaderTooLong => write!(
                f,
                "its PROXY v2 header is longer than `max_header_len`; raise that"
            ),
            DropReason::Unspecified => write!(
                f,
                "its PROXY v2 header names no client; have the proxy {ip} name UDP clients"
            ),
            DropReason::Tcp | DropReason::Unix => write!(
                f,
                "its PROXY v2 header names no client of UDP; have the proxy {ip} name UDP clients"
            ),
            DropReason::ClientAddress => write!(
                f,
                "the client's address can't be answered (port 0, or an unspecified, \
                 multicast or broadcast IP); look at what the sender {ip} forwards"
            ),
            DropReason::HeaderAlone => write!(
                f,
                "it is a header without payload, by which {ip} says for which client it speaks; \
                 the client's datagrams follow without header"
            ),
        }?;
        if *since_last > 1 {
            write!(f, "; {since_last} such datagrams since the last warning")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn each_reason_is_warned_of_first_and_then_once_a_minute() {
        let warnings = Warnings::new();
        let start = Instant::now();
        let peer: SocketAddr = "[::ffff:192.0.2.1]:7".parse().unwrap();
        for &reason in DropReason::ALL {
            let first = warnings.due(start.into(), peer, reason).unwrap();
            assert_eq!((first.reason, first.since_last), (reason, 1));
            let words = format!("dropped a datagram from 192.0.2.1:7 ({reason}): ");
            assert!(first.to_string().starts_with(&words), "{first}");
            let due = (1..=600u32)
                .filter(|second| {
                    let now = start + *second * SECOND;
                    warnings.due(now.into(), peer, reason).is_some()
                })
                .collect::<Vec<_>>();
            let each_minute: Vec<_> = (1..=10).map(|minute| 60 * minute).collect();
            assert_eq!(due, each_minute);
        }
        let pending = warnings.take();
        assert_eq!(pending.len(), REASONS);
        assert!(pending.iter().all(|warning| warning.since_last == 60));
        assert!(warnings.take().is_empty());
    }

    #[test]
    fn names_the_setting() {
        let warnings = Warnings::new();
        let now = Instant::now();
        let text = |reason| {
            let peer = "192.0.2.1:7".parse().unwrap();
            warnings.due(now.into(), peer, reason).unwrap().to_string()
        };
        assert!(text(DropReason::Untrusted).contains("add it to `trusted`"));
        let no_header = text(DropReason::NoHeader);
        assert!(no_header.contains("emit = \"every\""), "{no_header}");
        assert!(no_header.contains("`remember_senders`"), "{no_header}");
        assert!(text(DropReason::V1Header).contains("nginx 1.31.4"));
        assert!(text(DropReason::HeaderTooLong).contains("`max_header_len`"));
    }
}
