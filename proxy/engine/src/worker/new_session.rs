//! New sessions: whether a client may have one, with which server, and by which socket.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::session_socket::NewPath;
use super::{Readable, Worker, random_seed, wildcard_of};
use crate::accept::SenderId;
use crate::address::{PortRange, own_addresses};
use crate::busiest::Client;
use crate::client_limits::{ClientPermit, Network};
use crate::counters::{DropReason, EndReason};
use crate::listener::ListenerSettings;
use crate::server::{Replies, Target};
use crate::session::{Key, ReplyHeader, SessionId, Via};
use crate::snapshot::{ListenerSnapshot, Snapshot};
use crate::upstream::Balancer;
use crate::upstream_socket::{Connection, First, ServerReplyHeader};

/// How long the host's addresses are taken to stay the same.
const OWN_FOR: Duration = Duration::from_secs(1);

/// Sessions that may turn out to be answered while one that is not is looked for.
const READS: usize = 4;

impl Worker {
    /// Begins a session for a client that has none, unless there is a reason
    /// not to. `number` is that of the listener's socket that it wrote to.
    pub(super) fn new_session(
        &mut self,
        number: usize,
        key: Key,
        now: Instant,
    ) -> Result<SessionId, DropReason> {
        self.close_ended(now);
        self.collect_removed(now);
        let old = self.table.find(&key);
        if let Some(renewed) = old.and_then(|old| self.renew(old, number, key, now)) {
            return renewed;
        }
        let listener_socket = &self.listener_sockets[number];
        if listener_socket.is_closing {
            return Err(DropReason::Stopping);
        }
        let settings = Arc::clone(&listener_socket.settings);
        let client = key.client.0.ip();
        if let Some(reason) = settings.refusal(client) {
            return Err(reason);
        }
        if self.would_loop(&key, now) {
            return Err(DropReason::BadSource);
        }
        let target = self.pick(&settings, &key)?;
        // A header may name any port.
        if !target.takes(key.local) {
            return Err(DropReason::NoServer);
        }
        if target.mode.spoofs() && !self.can_speak_for(client, now) {
            return Err(DropReason::BadSource);
        }
        // A tag can't say which interface a link-local client is at.
        if matches!(target.replies, Replies::Tagged(_)) && !key.fits_header() {
            return Err(DropReason::BadSource);
        }
        self.admit_in_flood(&target, client, now)?;
        let client_permit = self.client_permit(&settings, client, now)?;
        if self.capacity.is_full() {
            self.make_room_for_all(now);
        }
        let mut got = self.new_path(&key, &settings, &target, now)?;
        got.permit = got.permit.of_client(client_permit);
        self.begin(now, key, number, &settings, &target, got)
    }

    /// The place of the server for datagrams of a client, where no session is kept. `number`
    /// is that of the listener's socket.
    pub(super) fn place_without_session(
        &mut self,
        number: usize,
        key: &Key,
        now: Instant,
    ) -> Result<usize, DropReason> {
        let settings = &self.listener_sockets[number].settings;
        if let Some(reason) = settings.refusal(key.client.0.ip()) {
            return Err(reason);
        }
        // A tag can't say which interface a link-local client is at.
        if !key.fits_header() || self.would_loop(key, now) {
            return Err(DropReason::BadSource);
        }
        let settings = &self.listener_sockets[number].settings;
        let listener = self.snapshot.of(&settings.listener);
        let listener = listener.ok_or(DropReason::NoServer)?;
        pick(&mut self.balancers, listener, key, self.number)
    }

    /// The server for a new session.
    fn pick(&mut self, settings: &ListenerSettings, key: &Key) -> Result<Target, DropReason> {
        let listener = self.snapshot.of(&settings.listener);
        let listener = listener.ok_or(DropReason::NoServer)?;
        let place = pick(&mut self.balancers, listener, key, self.number)?;
        let target = listener.targets.get(place).cloned();
        target.ok_or(DropReason::NoServer)
    }

    /// Refuses this client a socket if a flood of forged sources has left too few of them.
    fn admit_in_flood(
        &mut self,
        target: &Target,
        client: IpAddr,
        now: Instant,
    ) -> Result<(), DropReason> {
        if !target.mode.takes_replies() || !self.capacity.is_flooded() {
            return Ok(());
        }
        // The sooner they end the sooner their ports have rested.
        self.make_room_for_all(now);
        match self.capacity.admits(now, client) {
            true => Ok(()),
            false => Err(DropReason::UnverifiedClient),
        }
    }

    /// Ends sessions that were never answered: one more than is needed, so that other
    /// workers find room, too.
    fn make_room_for_all(&mut self, now: Instant) {
        let _ = self.make_room(now, None) && self.make_room(now, None);
    }

    /// The client's permit for a session of this listener, where that has a bound. The
    /// client's sessions that were never answered give way first: an attacker may have
    /// begun them in its name.
    fn client_permit(
        &mut self,
        settings: &ListenerSettings,
        client: IpAddr,
        now: Instant,
    ) -> Result<Option<ClientPermit>, DropReason> {
        let Some(sessions) = &settings.client_sessions else {
            return Ok(None);
        };
        let mut permit = sessions.take(client);
        if permit.is_none() {
            let of_client = (settings.listener.id(), sessions.network(client));
            if self.make_room(now, Some(of_client)) {
                permit = sessions.take(client);
            }
        }
        permit.map(Some).ok_or(DropReason::ClientSessions)
    }

    /// Ends a session that was never answered; of one client of a listener, by its id, if
    /// it is given. False if there is none that was given the time for an answer.
    fn make_room(&mut self, now: Instant, client: Option<(u64, Network)>) -> bool {
        for _ in 0..READS {
            let Some(id) = self.table.giving_way(now, client) else {
                return false;
            };
            // Its answer may wait unread, and may end a session whose datagrams are queued.
            self.send_run();
            self.take_from_server(id, now);
            let session = self.table.get(id);
            if session.is_some_and(|session| session.is_active() && session.replies == 0) {
                self.end(id, EndReason::Unanswered, now);
                return true;
            }
        }
        false
    }

    /// Begins a session with all that it needs. `number` is that of the listener's socket.
    pub(super) fn begin(
        &mut self,
        now: Instant,
        key: Key,
        number: usize,
        settings: &Arc<ListenerSettings>,
        target: &Target,
        got: NewPath,
    ) -> Result<SessionId, DropReason> {
        let server = &target.server;
        let mut connection = Connection {
            path: got.path,
            listener_socket: u32::try_from(number).unwrap_or(u32::MAX),
            mode: target.mode,
            is_outdated: server.has_same_port(),
            checked: self.snapshot_number(),
            first: target.mode.first_header().map(|header| {
                let transitions = server.transitions();
                Box::new(First {
                    header,
                    transitions,
                })
            }),
            tags: None,
            tags_are_optional: false,
            reply_header: ServerReplyHeader::of(target.mode),
            tlvs: None,
        };
        connection.set_header(target, &key);
        let permit = got.permit;
        let via = self.senders.get(key.sender).map(|sender| {
            Box::new(Via {
                sender: Arc::clone(sender),
                heard: self.table.clock().moment(now),
                changes: sender.changes(),
                reply_header: ReplyHeader::None,
            })
        });
        debug_assert_eq!(via.is_some(), key.sender != SenderId::NONE);
        let id = self
            .table
            .open_via(now, key, via, settings, server, permit, connection);
        let watch_key = Readable::Session(id).key();
        let watched = self.table.get(id).map(|session| {
            match (session.connection.own_socket(), got.is_watched) {
                (Some(own), true) if own.takes_replies => {
                    self.readiness.rename(&own.socket, watch_key)
                }
                (Some(own), false) if own.takes_replies => {
                    self.readiness.register(&own.socket, watch_key)
                }
                _ => Ok(()),
            }
        });
        if let Some(Err(_)) = watched {
            // The kernel is out of memory for epoll entries, or of permitted ones.
            self.table.abort(id);
            return Err(DropReason::NoMemory);
        }
        self.note_shared(id);
        settings.listener.counters(self.number).opened.add(1);
        server.counters(self.number).opened.add(1);
        self.busiest.begun(Client::of(settings, key.client.0.ip()));
        tracing::trace!(client = %key.client, local = %key.local, "session begun");
        Ok(id)
    }

    /// Whether a server can be written to from this address: it must be able to
    /// answer it, and that answer must find its way out of this host.
    fn can_speak_for(&mut self, client: IpAddr, now: Instant) -> bool {
        let is_no_clients = match client {
            IpAddr::V4(v4) => v4.is_broadcast() || v4.is_link_local() || v4.octets()[0] == 0,
            IpAddr::V6(v6) => v6.is_unspecified() || v6.is_unicast_link_local(),
        };
        !is_no_clients
            && !client.is_multicast()
            && !self.server_addresses.ips.contains(&client)
            && !self.own_addresses.contains(client, now)
    }

    /// Whether replies to this client, or to the proxy that it is behind, would come back to
    /// this proxy or to one of its servers. A forged source could otherwise start an exchange
    /// that never ends (CVE-2024-2169). The proxy in front may not know which servers there
    /// are behind this one.
    fn would_loop(&mut self, key: &Key, now: Instant) -> bool {
        let sender = self.senders.get(key.sender);
        let sender = sender.map(|sender| (sender.address, sender.local));
        self.comes_back((key.client.0, key.local.0), now)
            || sender.is_some_and(|sender| self.comes_back(sender, now))
    }

    /// Whether what is sent to `client` from `local` would come back.
    fn comes_back(&mut self, (client, local): (SocketAddr, SocketAddr), now: Instant) -> bool {
        if self.server_addresses.contain(client) {
            return true;
        }
        if !self.listener_ports.contains(&client.port()) {
            return false;
        }
        // There may be thousands of listeners' sockets, of a range of ports.
        let bound = &self.listeners_at;
        local.ip() == client.ip()
            || bound.contains_key(&client)
            || bound.contains_key(&wildcard_of(client))
                && self.own_addresses.contains(client.ip(), now)
    }
}

/// The place of the server that a worker picks for this client.
fn pick(
    balancers: &mut HashMap<(u64, bool), Balancer>,
    listener: &ListenerSnapshot,
    key: &Key,
    worker: usize,
) -> Result<usize, DropReason> {
    let (client, targets) = (key.client.0.ip(), &listener.targets);
    let sessions = |place: usize| {
        let target = targets.get(place);
        target.map_or(0, |target| target.server.counters(worker).sessions())
    };
    let of_family = (listener.settings.listener.id(), client.is_ipv6());
    let balancer = balancers.entry(of_family);
    let balancer = balancer.or_insert_with(|| Balancer::new(worker, random_seed()));
    let plan = listener.routing.plans.get(client.is_ipv6());
    let picked = balancer.pick(plan, key.client, sessions);
    let is_there = |place: &usize| targets.get(*place).is_some();
    picked
        .filter(is_there)
        .ok_or_else(|| why_no_server(listener, client))
}

/// Why no server takes a new session of this client: all are down, or none is
/// known, or all are of the other address family.
fn why_no_server(listener: &ListenerSnapshot, client: IpAddr) -> DropReason {
    let mut targets = listener.targets.iter().peekable();
    let reaches = |target: &Target| {
        let address = target.server.address;
        target.mode.reaches(address, client.is_ipv6())
    };
    if targets.peek().is_none() || targets.any(reaches) {
        DropReason::NoServer
    } else {
        DropReason::Unreachable
    }
}

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

/// The addresses of all servers of all listeners: an answer to a datagram that is forged
/// to come from one would go there from another.
#[derive(Default)]
pub(super) struct ServerAddresses {
    addresses: HashSet<SocketAddr>,
    /// Of those that are written to at the port that a client wrote to.
    ranges: HashMap<IpAddr, Vec<PortRange>>,
    ips: HashSet<IpAddr>,
}

impl ServerAddresses {
    pub(super) fn of(snapshot: &Snapshot) -> Self {
        let mut found = Self::default();
        for target in snapshot.targets() {
            let address = target.server.address.0;
            found.ips.insert(address.ip());
            match target.ports {
                None => _ = found.addresses.insert(address),
                Some(ports) => {
                    let ranges = found.ranges.entry(address.ip()).or_default();
                    if !ranges.contains(&ports) {
                        ranges.push(ports);
                    }
                }
            }
        }
        found
    }

    fn contain(&self, address: SocketAddr) -> bool {
        let has_port = |ranges: &Vec<PortRange>| {
            let port = address.port();
            ranges.iter().any(|ports| ports.contains(port))
        };
        self.addresses.contains(&address) || self.ranges.get(&address.ip()).is_some_and(has_port)
    }
}
