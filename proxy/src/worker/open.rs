//! New sessions: who may have one, and what it takes to begin it.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::Worker;
use super::at_once::AtOnce;
use super::link::{Link, connect, seat};
use super::source::Source;
use crate::counters::DropReason;
use crate::net::{self, Options, Received};
use crate::session::{Key, Seat, SessionId};
use crate::upstream::Server;

/// How long new clients are refused at once after there was no socket for one.
/// To find out that all ports are taken costs the kernel a millisecond, which
/// the clients that have a session would wait for.
const SHORTAGE: Duration = Duration::from_millis(20);

/// How long the host's addresses are taken to stay the same.
const OWN_FOR: Duration = Duration::from_secs(1);

/// The host's own addresses, as far as a source could be forged to be one.
#[derive(Default)]
pub(super) struct OwnAddresses {
    known: Vec<IpAddr>,
    asked: Option<Instant>,
}

impl OwnAddresses {
    fn contains(&mut self, ip: IpAddr, now: Instant) -> bool {
        let fresh = |asked: Instant| now.saturating_duration_since(asked) < OWN_FOR;
        if !self.asked.is_some_and(fresh) {
            self.asked = Some(now);
            // Better the addresses of a moment ago than none.
            if let Ok(known) = net::own_addresses() {
                self.known = known;
            }
        }
        ip.is_loopback() || self.known.contains(&ip)
    }
}

impl Worker {
    /// Begins a session for a client that has none, unless there is a reason
    /// not to.
    pub(super) fn open(
        &mut self,
        entrance: usize,
        key: Key,
        now: Instant,
    ) -> Result<SessionId, DropReason> {
        let number = self.entrances[entrance].listener;
        let listener = &self.listeners[number];
        let client = key.client.0.ip();
        if !listener.allow.iter().any(|net| net.contains(&client)) {
            return Err(DropReason::NotAllowed);
        }
        if self.would_loop(&key, number, now) {
            return Err(DropReason::BadSource);
        }
        if let Some((reason, _)) = self.shortage.filter(|(_, until)| now < *until) {
            return Err(reason);
        }
        let server = self.turns[number].pick().ok_or(DropReason::Unreachable)?;
        let (seat, kept) = seat(&mut self.table, &self.budget, now, number, server.number)?;
        if self.replies.is_full() {
            self.replies.send(&self.entrances, &self.counters);
        }
        let from_server = &self.counters.servers[server.number];
        let late = self.counters.listeners[number].dropped(DropReason::ReplyLate);
        let kept = kept.filter(|link| self.replies.drain(&link.socket, from_server, late));
        let prefix = server.mode.prefix(key.client, key.local);
        let (link, is_watched) = match kept {
            Some(link) => {
                let link = Link {
                    via: entrance,
                    prefix,
                    ..link
                };
                (link, true)
            }
            None => {
                let listener = &self.listeners[number];
                let options = Options {
                    dont_fragment: listener.dont_fragment,
                    bursts: !listener.rules.count_replies(),
                };
                let socket = connect(server, &mut self.next_source, options, &mut self.table)
                    .inspect_err(|reason| self.shortage = Some((*reason, now + SHORTAGE)))?;
                let link = Link {
                    socket,
                    via: entrance,
                    server: server.address,
                    overflows: 0,
                    at_once: AtOnce::default(),
                    prefix,
                };
                (link, false)
            }
        };
        let numbers = (number, server.number);
        self.begin(now, key, numbers, seat, link, is_watched)
    }

    /// Whether replies to this client would come back to the proxy or to one of
    /// its servers. A forged source could otherwise start an exchange that never
    /// ends (CVE-2024-2169).
    fn would_loop(&mut self, key: &Key, listener: usize, now: Instant) -> bool {
        let (client, local) = (key.client.0, key.local.0);
        let is_server = |server: &Server| server.address.0 == client;
        if self.listeners[listener].servers.iter().any(is_server) {
            return true;
        }
        let entrances = self
            .entrances
            .iter()
            .map(|entrance| entrance.socket.bound());
        let mut same_port = entrances.filter(|bound| bound.port() == client.port());
        let wildcard =
            |bound: SocketAddr| bound.ip().is_unspecified() && bound.is_ipv4() == client.is_ipv4();
        same_port.any(|bound| {
            bound.ip() == client.ip()
                || local.ip() == client.ip()
                || wildcard(bound) && self.own.contains(client.ip(), now)
        })
    }

    fn begin(
        &mut self,
        now: Instant,
        key: Key,
        (listener, server): (usize, usize),
        seat: Seat,
        link: Link,
        is_watched: bool,
    ) -> Result<SessionId, DropReason> {
        let id = self.table.open(now, key, listener, server, seat, link);
        let registered = self.table.get(id).map(|session| {
            let key = Source::Server(id).key();
            let socket = &session.link.socket;
            if is_watched {
                self.readiness.rename(socket, key)
            } else {
                self.readiness.register(socket, key)
            }
        });
        if let Some(Err(_)) = registered {
            // The kernel is out of memory for epoll entries, or of permitted ones.
            self.table.abort(id);
            return Err(DropReason::NoMemory);
        }
        self.counters.listeners[listener].opened.add(1);
        self.counters.servers[server].opened.add(1);
        tracing::trace!(client = %key.client, local = %key.local, "session begun");
        Ok(id)
    }
}

/// Why no session may be had for a datagram, by what is known of it alone.
pub(super) fn refused(received: &Received) -> Option<DropReason> {
    if received.group {
        Some(DropReason::GroupDestination)
    } else if received.truncated {
        Some(DropReason::Truncated)
    } else if received.peer.port() == 0 {
        Some(DropReason::BadSource)
    } else {
        None
    }
}
