//! New sessions: who may have one, and what it takes to begin it.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::link::{Exit, Link};
use super::source::Source;
use super::{ListenerSettings, Worker};
use crate::address::own_addresses;
use crate::counters::DropReason;
use crate::session::{Amount, ClientSeat, EndReason, Key, Network, Seat, SessionId};
use crate::upstream::Server;
use ppv2_udp::Received;

/// How long the host's addresses are taken to stay the same.
const OWN_FOR: Duration = Duration::from_secs(1);

/// Sessions that may turn out to be answered while one that is not is looked for.
const READS: usize = 4;

/// Sessions of a client that may turn out to have to go elsewhere while one is looked
/// for that takes more than it may.
const MOVES: usize = 4;

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
            if let Ok(known) = own_addresses() {
                self.known = known;
            }
        }
        ip.is_loopback() || self.known.contains(&ip)
    }
}

/// The addresses of all servers, of whichever listener: what is forged to come
/// from one would be answered to it by another.
#[derive(Default)]
pub(super) struct ServerAddresses {
    addresses: HashSet<SocketAddr>,
    ips: HashSet<IpAddr>,
}

impl ServerAddresses {
    pub(super) fn of(listeners: &[Arc<ListenerSettings>]) -> Self {
        let mut all = Self::default();
        for server in listeners.iter().flat_map(|listener| &listener.servers) {
            all.addresses.insert(server.address.0);
            all.ips.insert(server.address.0.ip());
        }
        all
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
        self.close_leaving(now);
        let old = self.table.find(&key);
        if let Some(renewed) = old.and_then(|old| self.renew(old, entrance, key, now)) {
            return renewed;
        }
        let number = self.entrances[entrance].listener;
        if self.entrances[entrance].is_closing {
            return Err(DropReason::Stopping);
        }
        let listener = &self.listeners[number];
        let client = key.client.0.ip();
        if let Some(reason) = listener.refusal(client) {
            return Err(reason);
        }
        if self.would_loop(&key, now) {
            return Err(DropReason::BadSource);
        }
        let (servers, counters) = (&self.listeners[number].servers, &self.counters.servers);
        let sessions = |server: usize| counters[servers[server].number].sessions();
        let server = self.balancers[number].of(client).pick(key.client, sessions);
        let server = server.and_then(|index| servers.get(index)).cloned();
        let server = server.ok_or_else(|| self.why_no_server(number, client))?;
        if server.mode.spoofs() && !self.can_speak_for(client, now) {
            return Err(DropReason::BadSource);
        }
        self.is_crowded(&server, client, now)?;
        let client_seat = self.seat_of_client(number, client, now)?;
        if self.budget.is_full() {
            self.make_room_for_all(now);
        }
        let numbers = (number, server.number);
        let (seat, exit, is_kept) = self.supply(&key, number, &server, now)?;
        let seat = seat.of_client(client_seat);
        let link = self.link(exit, entrance, &key, &server);
        self.begin(now, key, numbers, seat, link, is_kept)
    }

    /// Whether sockets are so few, for a flood of forged sources, that this client gets
    /// none.
    fn is_crowded(
        &mut self,
        server: &Server,
        client: IpAddr,
        now: Instant,
    ) -> Result<(), DropReason> {
        if !server.mode.takes_replies() || !self.budget.is_crowded() {
            return Ok(());
        }
        // The sooner they end the sooner their ports have rested.
        self.make_room_for_all(now);
        match self.budget.admits(now, client) {
            true => Ok(()),
            false => Err(DropReason::Newcomer),
        }
    }

    /// Ends sessions that were never answered: one more than is needed, so that other
    /// workers find room, too.
    fn make_room_for_all(&mut self, now: Instant) {
        let _ = self.make_room(now, None) && self.make_room(now, None);
    }

    /// The client's right to a session of this listener, where that has a bound. The
    /// client's sessions that were never answered give way first: somebody may have
    /// begun them in its name.
    fn seat_of_client(
        &mut self,
        listener: usize,
        client: IpAddr,
        now: Instant,
    ) -> Result<Option<ClientSeat>, DropReason> {
        let Some(clients) = self.listeners[listener].clients.clone() else {
            return Ok(None);
        };
        let mut seat = clients.take(client);
        if seat.is_none() && self.make_room(now, Some((listener, clients.network(client)))) {
            seat = clients.take(client);
        }
        seat.map(Some).ok_or(DropReason::ClientSessions)
    }

    /// Ends a session that was never answered, of one client of a listener if it is said
    /// which. False if there is none that was given the time for an answer.
    fn make_room(&mut self, now: Instant, client: Option<(usize, Network)>) -> bool {
        for _ in 0..READS {
            let Some(id) = self.table.giving_way(now, client) else {
                return false;
            };
            // Its answer may wait unread.
            self.take_from_server(id, now);
            let session = self.table.get(id);
            if session.is_some_and(|session| session.is_active() && session.replies == 0) {
                self.end(now, id, EndReason::Unanswered);
                return true;
            }
        }
        false
    }

    /// One of the client's sessions that are to take no more, to take these datagrams as
    /// well, since no other can be begun.
    pub(super) fn overdraw(
        &mut self,
        key: &Key,
        amount: Amount,
        now: Instant,
    ) -> Option<SessionId> {
        for _ in 0..MOVES {
            let id = self.table.overdraw(now, key, amount)?;
            if !self.moves_any || !self.is_to_move(id) {
                let listener = self.table.get(id)?.listener;
                if self.listeners[listener].rules.count_requests() {
                    let counters = &self.counters.listeners[listener];
                    counters.overdrawn.add(amount.datagrams);
                }
                return Some(id);
            }
            self.end(now, id, EndReason::Moved);
        }
        None
    }

    /// Whether the client's rate is exceeded: that of its session, once it was answered,
    /// or that of the client, for all its other datagrams.
    pub(super) fn is_too_fast(
        &mut self,
        listener: usize,
        key: &Key,
        amount: Amount,
        now: Instant,
    ) -> bool {
        let (listener, ip) = (&self.listeners[listener], key.client.0.ip());
        // Who is not served anyway takes nobody's place in the buckets.
        let Some(rates) = listener.rates.as_ref().filter(|_| listener.allows(ip)) else {
            return false;
        };
        !match self.table.bucket(key) {
            Some(bucket) => rates.admit_from(bucket, now, amount.datagrams),
            None => rates.admit(now, ip, amount.datagrams),
        }
    }

    /// Why no server takes a new session of this client: all are down, or none is
    /// known, or all are of the other address family.
    fn why_no_server(&self, listener: usize, client: IpAddr) -> DropReason {
        let servers = &self.listeners[listener].servers;
        if servers.is_empty()
            || servers
                .iter()
                .any(|server| server.mode.reaches(server.address, client.is_ipv6()))
        {
            DropReason::NoServer
        } else {
            DropReason::Unreachable
        }
    }

    pub(super) fn link(&self, exit: Exit, entrance: usize, key: &Key, server: &Server) -> Link {
        Link {
            exit,
            via: entrance,
            server: server.address,
            mode: server.mode,
            prefix: server.mode.prefix(key.client, key.local),
            name: Arc::clone(&server.name),
            steered: self.steering.version,
            ingress: 0,
            is_outdated: false,
        }
    }

    /// Whether a server can be written to from this address: it must be able to
    /// answer it, and that answer must find its way out of this host.
    fn can_speak_for(&mut self, client: IpAddr, now: Instant) -> bool {
        let is_nobodys = match client {
            IpAddr::V4(v4) => v4.is_broadcast() || v4.is_link_local() || v4.octets()[0] == 0,
            IpAddr::V6(v6) => v6.is_unspecified() || v6.is_unicast_link_local(),
        };
        !is_nobodys
            && !client.is_multicast()
            && !self.servers.ips.contains(&client)
            && !self.own.contains(client, now)
    }

    /// Whether replies to this client would come back to the proxy or to one of
    /// its servers. A forged source could otherwise start an exchange that never
    /// ends (CVE-2024-2169).
    fn would_loop(&mut self, key: &Key, now: Instant) -> bool {
        let (client, local) = (key.client.0, key.local.0);
        if self.servers.addresses.contains(&client) {
            return true;
        }
        let entrances = self
            .entrances
            .iter()
            .map(|(_, entrance)| entrance.socket.bound());
        let mut same_port = entrances.filter(|bound| bound.port() == client.port());
        let wildcard =
            |bound: SocketAddr| bound.ip().is_unspecified() && bound.is_ipv4() == client.is_ipv4();
        same_port.any(|bound| {
            bound.ip() == client.ip()
                || local.ip() == client.ip()
                || wildcard(bound) && self.own.contains(client.ip(), now)
        })
    }

    pub(super) fn begin(
        &mut self,
        now: Instant,
        key: Key,
        (listener, server): (usize, usize),
        seat: Seat,
        link: Link,
        is_watched: bool,
    ) -> Result<SessionId, DropReason> {
        let id = self.table.open(now, key, listener, server, seat, link);
        let key_of_own = Source::Server(id).key();
        let registered = self.table.get(id).map(|session| match &session.link.exit {
            Exit::Own(own) if is_watched => self.readiness.rename(&own.socket, key_of_own),
            Exit::Own(own) => self.readiness.register(&own.socket, key_of_own),
            Exit::Unheard { .. } => Ok(()),
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
