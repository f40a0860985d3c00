//! From clients to servers: a batch of datagrams is received, each is checked, and its
//! session is found or begun.

use std::io;
use std::time::Instant;

use ppv2_udp::{BATCH, Part, Received};

use super::Worker;
use crate::busiest::Client;
use crate::counters::{DropReason, EndReason};
use crate::session::{Amount, Key, SessionId};

/// Sessions of a client that may have to leave their server while one is looked for that
/// takes more than it may.
const MOVES: usize = 4;

impl Worker {
    /// Takes a batch from clients to their servers. True if there may be more.
    pub(super) fn take_from_clients(&mut self, number: usize, now: Instant) -> bool {
        let Some(listener_socket) = self.listener_sockets.get(number) else {
            return false;
        };
        let received = listener_socket.socket.receive(&mut self.incoming, 0, BATCH);
        let slots = match received {
            Ok(slots) => slots,
            Err(error) => return error.kind() != io::ErrorKind::WouldBlock,
        };
        self.count_overflows(number, slots);
        for slot in 0..slots {
            if self.listener_sockets[number].settings.accept.is_some() {
                self.take_with_headers(number, slot, now);
            } else {
                self.take_from_client(number, slot, now);
            }
        }
        self.send_run();
        if let Some(number) = self.run.renew.take() {
            self.renew_tagged_socket(number, now);
        }
        slots == BATCH
    }

    /// Takes what a client has sent to its server: all bytes are payload.
    pub(super) fn take_from_client(&mut self, number: usize, slot: usize, now: Instant) {
        let Some(received) = self.incoming.received(slot) else {
            return;
        };
        let (key, mut rest) = (Key::of(&received), self.incoming.whole(slot));
        if let Some(reason) = refused(&received) {
            self.drop_from_client(number, rest, reason, Some(&key));
            return;
        }
        while rest.datagrams() > 0 {
            let part = self.next_part(number, &key, &mut rest);
            if !self.listener_sockets[number].settings.keeps_sessions {
                self.forward_without_session(number, key, part, now);
            } else if let Some(id) = self.session_for(number, key, part, now) {
                self.queue(id, part, now);
            }
        }
    }

    fn count_overflows(&mut self, number: usize, slots: usize) {
        let latest = slots.checked_sub(1);
        let latest = latest.and_then(|slot| self.incoming.received(slot));
        let from = &mut self.listener_sockets[number];
        let lost = latest.map_or(0, |latest| latest.newly_lost(&mut from.overflows));
        let counters = from.settings.listener.counters(self.number);
        counters.overflows.add(lost);
    }

    /// Cuts off the front of `rest` what one session of the client may take: all, unless a
    /// burst has come in one piece where requests are counted.
    pub(super) fn next_part(&self, number: usize, key: &Key, rest: &mut Part) -> Part {
        let rules = &self.listener_sockets[number].settings.rules;
        if !rules.count_requests() || rest.datagrams() <= 1 {
            return rest.take(usize::MAX);
        }
        let room = self.table.room(key, rules.requests);
        rest.take(usize::try_from(room).unwrap_or(usize::MAX))
    }

    /// The session of the client's datagrams in `part`, begun if need be. `None`
    /// if they are dropped, which is counted.
    fn session_for(
        &mut self,
        number: usize,
        key: Key,
        part: Part,
        now: Instant,
    ) -> Option<SessionId> {
        let amount = self.amount_of(part);
        self.count_received(number, amount);
        self.session_of(number, key, amount, now)
    }

    /// As [`session_for`](Self::session_for), of datagrams that have been counted as
    /// received.
    pub(super) fn session_of(
        &mut self,
        number: usize,
        key: Key,
        amount: Amount,
        now: Instant,
    ) -> Option<SessionId> {
        let found = if self.draining {
            Err(DropReason::Stopping)
        } else if self.is_too_fast(number, &key, amount, now) {
            Err(DropReason::ClientRate)
        } else {
            match self.known_session(&key, amount, now) {
                Some(id) => Ok(id),
                None => match self.new_session(number, key, now) {
                    Ok(id) => Ok(self.table.count(now, id, amount)),
                    Err(reason) => self.overdraw(&key, amount, now).ok_or(reason),
                },
            }
        };
        match found {
            Ok(id) => {
                self.count_passed(number, &key, amount);
                Some(id)
            }
            Err(reason) => {
                self.count_dropped_of(number, reason, amount, Some(&key));
                None
            }
        }
    }

    /// How much a client has sent in `part`.
    pub(super) fn amount_of(&self, part: Part) -> Amount {
        Amount {
            datagrams: part.datagrams() as u64,
            bytes: self.incoming.len_of(part) as u64,
        }
    }

    /// Counts what came from a client by the listener's socket of this number.
    pub(super) fn count_received(&self, number: usize, amount: Amount) {
        let listener = &self.listener_sockets[number].settings.listener;
        let counters = listener.counters(self.number);
        counters.received.add(amount.datagrams);
        counters.received_bytes.add(amount.bytes);
    }

    /// Counts what came by the listener's socket of this number, and its drop; for the
    /// client, where it is known which one it is.
    pub(super) fn drop_from_client(
        &mut self,
        number: usize,
        part: Part,
        reason: DropReason,
        client: Option<&Key>,
    ) {
        let amount = self.amount_of(part);
        self.count_received(number, amount);
        self.count_dropped_of(number, reason, amount, client);
    }

    /// Counts a drop of what came by the listener's socket of this number.
    fn count_dropped_of(
        &mut self,
        number: usize,
        reason: DropReason,
        amount: Amount,
        client: Option<&Key>,
    ) {
        let settings = &self.listener_sockets[number].settings;
        let counters = settings.listener.counters(self.number);
        counters.dropped(reason).add(amount.datagrams);
        if let Some(key) = client {
            let client = || Some(Client::of(settings, key.client.0.ip()));
            self.busiest.dropped(amount, client);
        }
    }

    /// Counts for a client that its datagrams, which came by the listener's socket of this
    /// number, go to a server.
    fn count_passed(&mut self, number: usize, key: &Key, amount: Amount) {
        let settings = &self.listener_sockets[number].settings;
        let client = || Some(Client::of(settings, key.client.0.ip()));
        self.busiest.passed(amount, client);
    }

    /// Has a client's datagrams leave where no session is kept: each for itself goes to the
    /// server that the client now has, and the reply's tag says where that goes.
    fn forward_without_session(&mut self, number: usize, key: Key, part: Part, now: Instant) {
        let amount = self.amount_of(part);
        self.count_received(number, amount);
        let place = if self.draining {
            Err(DropReason::Stopping)
        } else if self.is_too_fast(number, &key, amount, now) {
            Err(DropReason::ClientRate)
        } else {
            self.place_without_session(number, &key, now)
        };
        let socket = place.and_then(|place| {
            let socket = self.tagged_socket_at(number, place, now)?;
            Ok((place, socket))
        });
        match socket {
            Ok((place, socket)) => {
                self.count_passed(number, &key, amount);
                self.queue_without_session(number, place, socket, key, part, now);
            }
            Err(reason) => self.count_dropped_of(number, reason, amount, Some(&key)),
        }
    }

    /// Whether the client's rate is exceeded: that of its session, once it was answered,
    /// or that of the client, for all its other datagrams.
    fn is_too_fast(&mut self, number: usize, key: &Key, amount: Amount, now: Instant) -> bool {
        let settings = &self.listener_sockets[number].settings;
        let Some(rates) = &settings.client_rates else {
            return false;
        };
        let ip = key.client.0.ip();
        // A client that is not served anyway takes no other's place in the buckets.
        if !settings.allows(ip) {
            return false;
        }
        !match self.table.bucket(key) {
            Some(bucket) => rates.admit_from(bucket, now, amount.datagrams),
            None => rates.admit(now, ip, amount.datagrams),
        }
    }

    /// The client's session that takes its datagrams, unless there is none or it has to
    /// leave its server.
    fn known_session(&mut self, key: &Key, amount: Amount, now: Instant) -> Option<SessionId> {
        let id = self.table.find(key)?;
        let session = self.table.get_mut(id)?;
        if session.connection.is_to_follow_tags(&session.server) {
            session.needs_socket = true;
        }
        let checked = session.connection.checked;
        if checked != self.snapshot_number() && self.must_leave(id) {
            self.end(id, EndReason::Moved, now);
            return None;
        }
        self.table.request_of(now, id, amount)
    }

    /// Whether session `id` is to leave its server at this datagram of its client's.
    fn must_leave(&mut self, id: SessionId) -> bool {
        let version = self.snapshot_number();
        let session = self.table.get_mut(id);
        // Asked once for each snapshot, which costs as much as a new session's pick.
        let Some(session) = session.filter(|session| session.connection.checked != version) else {
            return false;
        };
        session.connection.checked = version;
        let Some(listener) = self.snapshot.of(&session.settings.listener) else {
            return false;
        };
        let Some(place) = listener.targets.place(&session.server) else {
            return true;
        };
        let v6 = session.key().client.0.is_ipv6();
        let rules = |place: usize| {
            listener
                .routing
                .rules
                .get(place)
                .copied()
                .unwrap_or_default()
        };
        if *rules(place).leave.get(v6) {
            return true;
        }
        if rules(place).is_draining {
            return false;
        }
        let home = listener.routing.plans.get(v6).home(session.key().client);
        home.is_some_and(|home| home != place && *rules(home).takes_back.get(v6))
    }

    /// One of the client's sessions that are to take no more, to take these datagrams as
    /// well, since no other can be begun.
    fn overdraw(&mut self, key: &Key, amount: Amount, now: Instant) -> Option<SessionId> {
        for _ in 0..MOVES {
            let id = self.table.overdraw(now, key, amount)?;
            if !self.must_leave(id) {
                let settings = &self.table.get(id)?.settings;
                if settings.rules.count_requests() {
                    let counters = settings.listener.counters(self.number);
                    counters.overdrawn.add(amount.datagrams);
                }
                return Some(id);
            }
            self.end(id, EndReason::Moved, now);
        }
        None
    }

    /// Ends a session whose datagrams may be queued.
    pub(super) fn end(&mut self, id: SessionId, reason: EndReason, now: Instant) {
        self.send_run();
        self.table.end(now, id, reason);
    }
}

/// Why a datagram is dropped, by what is known of it alone.
pub(super) fn refused(received: &Received) -> Option<DropReason> {
    if received.group {
        Some(DropReason::MulticastDestination)
    } else if received.truncated {
        Some(DropReason::Truncated)
    } else if received.peer.port() == 0 {
        Some(DropReason::BadSource)
    } else {
        None
    }
}
