//! Sessions that were never answered, in the order in which they began: those that
//! give way first when sessions run out. Forged sources leave many of them.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use slab::Slab;

use super::Session;
use super::clock::Moment;
use super::links::{Links, List};
use crate::client_limits::{ClientPermit, Network};
use crate::listener::Listener;
use crate::server::MAX_ANSWER_TIME;

/// Sessions that are looked at for one that may give way. More than one, since servers
/// differ in how long they take to answer.
const LOOKS: usize = 16;

/// A client of one listener, by its id, whose sessions are bounded.
pub(super) type Client = (u64, Network);

/// The permits of clients whose sessions are bounded, by slot. Empty as long as none are.
#[derive(Debug, Default)]
pub(super) struct ClientPermits(Vec<Option<ClientPermit>>);

impl ClientPermits {
    /// Keeps the permit of the session at `slot`, which has none.
    pub(super) fn insert(&mut self, slot: u32, permit: ClientPermit) {
        if self.0.len() <= slot as usize {
            self.0.resize_with(slot as usize + 1, || None);
        }
        self.0[slot as usize] = Some(permit);
    }

    /// Gives back the permit of the session at `slot`, if it has one.
    pub(super) fn remove(&mut self, slot: u32) {
        if let Some(permit) = self.0.get_mut(slot as usize) {
            *permit = None;
        }
    }

    /// The client of the session at `slot`, which is of `listener`, if its sessions are
    /// bounded.
    pub(super) fn client(&self, slot: u32, listener: &Listener) -> Option<Client> {
        let permit = self.0.get(slot as usize)?.as_ref()?;
        Some((listener.id(), permit.network()))
    }
}

/// Unanswered sessions by slot, all together and those of each client whose sessions
/// are bounded. Bounded by the number of sessions.
#[derive(Debug)]
pub(super) struct Unanswered {
    all: List,
    links_of_clients: Links,
    of_clients: HashMap<Client, List, ahash::RandomState>,
}

impl Unanswered {
    pub(super) fn new() -> Self {
        Self {
            all: List::EMPTY,
            links_of_clients: Links::default(),
            of_clients: HashMap::default(),
        }
    }

    /// Lists `slot`, which is in no list that runs through `links`, as the latest.
    pub(super) fn push(&mut self, links: &mut Links, slot: u32, client: Option<Client>) {
        links.push(&mut self.all, slot);
        if let Some(client) = client {
            let list = self.of_clients.entry(client).or_insert(List::EMPTY);
            self.links_of_clients.push(list, slot);
        }
    }

    /// Takes `slot` off, which is in no other list that runs through `links`, if it is
    /// listed. `client` must be as when it was pushed.
    pub(super) fn remove(&mut self, links: &mut Links, slot: u32, client: Option<Client>) {
        links.remove(&mut self.all, slot);
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
        now: Moment,
        client: Option<Client>,
        links: &mut Links,
        sessions: &Slab<Session<C>>,
        permits: &ClientPermits,
    ) -> Option<u32> {
        let had_its_time = |slot: &u32| {
            let session = &sessions[*slot as usize];
            let (since, usual) = match session.server.usual_answer_time() {
                Some(usual) => (session.started, usual),
                None => (session.last_active, MAX_ANSWER_TIME),
            };
            now.since(since) >= usual
        };
        let (links_of_list, list) = match client {
            None => (&*links, Some(&self.all)),
            Some(client) => (&self.links_of_clients, self.of_clients.get(&client)),
        };
        let list = *list?;
        let found = links_of_list.iter(list).take(LOOKS).find(had_its_time);
        let oldest = list.first()?;
        let session = &sessions[oldest as usize];
        if found.is_none() && session.server.usual_answer_time().is_none() {
            // It stays while it is used, and must not hide those behind it.
            let client = permits.client(oldest, &session.settings.listener);
            self.remove(links, oldest, client);
            self.push(links, oldest, client);
        }
        found
    }
}
