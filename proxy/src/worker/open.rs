//! New sessions: who may have one, and what it takes to begin it.

use std::time::Instant;

use super::link::{Link, connect};
use super::{Entrance, ListenerSettings, Worker, token_of};
use crate::counters::DropReason;
use crate::net::{Options, Received};
use crate::session::{Key, Seat, SessionId};
use crate::upstream::Server;

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
        if self.would_loop(&key, listener) {
            return Err(DropReason::BadSource);
        }
        let seat = self.budget.take().ok_or(DropReason::MaxSessions)?;
        let server = self.turns[number].pick().ok_or(DropReason::Unreachable)?;
        let options = Options {
            dont_fragment: listener.dont_fragment,
            bursts: !listener.rules.count_replies(),
        };
        let socket = connect(server, &mut self.next_source, options, &mut self.table)?;
        let (server_number, link) = (
            server.number,
            Link {
                socket,
                via: entrance,
                server: server.address,
                overflows: 0,
                prefix: server.mode.prefix(key.client, key.local),
            },
        );
        self.begin(now, key, number, server_number, seat, link)
    }

    /// Whether replies to this client would come back to the proxy or to one of
    /// its servers. A forged source could otherwise start an exchange that never
    /// ends (CVE-2024-2169).
    fn would_loop(&self, key: &Key, listener: &ListenerSettings) -> bool {
        let (client, local) = (key.client.0, key.local.0);
        let is_entrance = |entrance: &Entrance| {
            let bound = entrance.socket.bound();
            bound == client || bound.port() == client.port() && local.ip() == client.ip()
        };
        let is_server = |server: &Server| server.address.0 == client;
        self.entrances.iter().any(is_entrance) || listener.servers.iter().any(is_server)
    }

    fn begin(
        &mut self,
        now: Instant,
        key: Key,
        listener: usize,
        server: usize,
        seat: Seat,
        link: Link,
    ) -> Result<SessionId, DropReason> {
        let id = self.table.open(now, key, listener, server, seat, link);
        let registered = self.table.get(id).map(|session| {
            session
                .link
                .socket
                .register(self.poll.registry(), token_of(id))
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
