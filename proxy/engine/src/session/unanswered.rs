//! Sessions that were never answered, in the order in which they began: those that
//! give way first when sessions run out. Forged sources leave many of them.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::Instant;

use slab::Slab;

use super::Session;
use super::links::{Links, List};
use crate::client_limits::Network;
use crate::server::MAX_ANSWER_TIME;

/// Sessions that are looked at for one that may give way. More than one, since servers
/// differ in how long they take to answer.
const LOOKS: usize = 16;

/// A client of one listener, by its id, whose sessions are bounded.
pub(super) type Client = (u64, Network);

/// Unanswered sessions by slot, all together and those of each client whose sessions
/// are bounded. Bounded by the number of sessions.
#[derive(Debug)]
pub(super) struct Unanswered {
    links: Links,
    all: List,
    links_of_clients: Links,
    of_clients: HashMap<Client, List, ahash::RandomState>,
}

impl Unanswered {
    pub(super) fn new() -> Self {
        Self {
            links: Links::default(),
            all: List::EMPTY,
            links_of_clients: Links::default(),
            of_clients: HashMap::default(),
        }
    }

    /// Lists `slot`, which is not listed, as the latest.
    pub(super) fn push(&mut self, slot: u32, client: Option<Client>) {
        self.links.push(&mut self.all, slot);
        if let Some(client) = client {
            let list = self.of_clients.entry(client).or_insert(List::EMPTY);
            self.links_of_clients.push(list, slot);
        }
    }

    /// Takes `slot` off, if it is listed. `client` must be as when it was pushed.
    pub(super) fn remove(&mut self, slot: u32, client: Option<Client>) {
        self.links.remove(&mut self.all, slot);
        if let Some(client) = client
            && let Entry::Occupied(mut list) = self.of_clients.entry(client)
        {
            self.links_of_clients.remove(list.get_mut(), slot);
            if *list.get() == List::EMPTY {
                list.remove();
            }
        }
    }

    /// The oldest that has had the time that its server usually takes, of all sessions
    /// or of one client's. Where the server was never seen to answer, it must have had no
    /// datagram for as long as the slowest may take.
    pub(super) fn giving_way<C>(
        &mut self,
        now: Instant,
        client: Option<Client>,
        sessions: &Slab<Session<C>>,
    ) -> Option<u32> {
        let had_its_time = |slot: &u32| {
            let session = &sessions[*slot as usize];
            let (since, usual) = match session.server.usual_answer_time() {
                Some(usual) => (session.started, usual),
                None => (session.last_active, MAX_ANSWER_TIME),
            };
            now.saturating_duration_since(since) >= usual
        };
        let (links, list) = match client {
            None => (&self.links, Some(&self.all)),
            Some(client) => (&self.links_of_clients, self.of_clients.get(&client)),
        };
        let list = *list?;
        let found = links.iter(list).take(LOOKS).find(had_its_time);
        let oldest = list.first()?;
        let session = &sessions[oldest as usize];
        if found.is_none() && session.server.usual_answer_time().is_none() {
            // It stays while it is used, and must not hide those behind it.
            self.remove(oldest, session.bounded_client());
            self.push(oldest, session.bounded_client());
        }
        found
    }
}
