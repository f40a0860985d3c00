//! The senders that a worker knows: other proxies, by address and port, with what is
//! remembered of each. No I/O; `now` is an argument.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ppv2::{DecodeError, Origin, TlvType, Transport, spp};
use slab::Slab;

use super::{Accept, LocalHeaders, Remember, Sender, SenderId};
use crate::address::{ClientAddr, ListenerAddr, is_no_host};
use crate::counters::DropReason;
use crate::handover::{SaidState, SenderState};
use crate::session::{Key, ReplyHeader};

/// Senders that are looked at, whether they are still of use, whenever one is added: at
/// most a third of those that are kept are of none.
const LOOKS: usize = 4;

/// As [`LOOKS`], where there are too many to remember another.
const LOOKS_WHEN_FULL: usize = 16;

/// What is known of other proxies.
///
/// Their number is bounded by that of sessions and by [`Remember::max`]: a sender that has
/// neither a session nor said a client lately is dropped while others are added.
#[derive(Debug, Default)]
pub struct Senders {
    entries: Slab<Entry>,
    by_address: HashMap<(SocketAddr, SocketAddr), usize, ahash::RandomState>,
    /// How many clients are remembered, by the id of the listener.
    remembered: HashMap<u64, usize, ahash::RandomState>,
    /// The place of the sender of the latest datagram: bursts come from one.
    latest: Option<usize>,
    /// The place that is looked at next.
    hand: usize,
}

#[derive(Debug)]
struct Entry {
    sender: Arc<Sender>,
    /// The latest client that it has named, and the address that this wrote to.
    named: Option<(SocketAddr, SocketAddr)>,
    said: Option<Said>,
}

/// What a sender has said in a header, for datagrams without one.
#[derive(Clone, Copy, Debug)]
struct Said {
    listener: u64,
    client: SocketAddr,
    destination: SocketAddr,
    idle: Duration,
    /// When the sender's latest datagram came.
    heard: Instant,
}

impl Said {
    fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.heard) >= self.idle
    }
}

/// A datagram, as its header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Its session's key.
    pub key: Key,
    /// Bytes of the header; 0 if the sender has said it before.
    pub header: usize,
    /// Where in the datagram the TLVs are.
    pub tlvs: Range<usize>,
    /// What is to stand in front of replies.
    pub reply_header: ReplyHeader,
    /// It says a client and has no payload.
    pub is_announcement: bool,
    /// The sender should have been remembered, but there are too many.
    pub is_unremembered: bool,
}

impl Senders {
    /// Reads the header of a datagram that came from `peer`, from which `accept` accepts
    /// headers, to `local`, an address of the listener with this id.
    ///
    /// # Errors
    ///
    /// Why the datagram must be dropped. With a header, its sender speaks for nobody from then
    /// on: what it has said before no longer holds, and its port no longer belongs to the
    /// client that it named.
    pub fn read(
        &mut self,
        accept: &Accept,
        listener: u64,
        ends: (SocketAddr, SocketAddr),
        datagram: &[u8],
        now: Instant,
    ) -> Result<Arrival, DropReason> {
        self.read_header(accept, listener, ends, datagram, now)
            .inspect_err(|reason| self.note_refusal(ends, *reason))
    }

    fn read_header(
        &mut self,
        accept: &Accept,
        listener: u64,
        (peer, local): (SocketAddr, SocketAddr),
        datagram: &[u8],
        now: Instant,
    ) -> Result<Arrival, DropReason> {
        let arrival = |key, header| Arrival {
            key,
            header,
            tlvs: header..header,
            reply_header: ReplyHeader::None,
            is_announcement: false,
            is_unremembered: false,
        };
        // Two formats are never the same bytes: each has to begin with its own.
        if accept.formats.v2 && datagram.starts_with(&ppv2::SIGNATURE) {
            let (header, payload) = ppv2::decode(datagram).map_err(why_bad)?;
            let len = datagram.len() - payload.len();
            let (client, destination) = match header.origin() {
                Origin::Ip {
                    transport: Transport::Datagram,
                    source,
                    destination,
                } => (canonical(source), canonical(destination)),
                Origin::Local if accept.local == LocalHeaders::Forward => {
                    let key = self.key((peer, local), (peer, local), now);
                    self.forget((peer, local));
                    return Ok(arrival(key, len));
                }
                Origin::Local => return Err(DropReason::LocalHeader),
                Origin::Ip { .. } => return Err(DropReason::Tcp),
                Origin::Unix { .. } => return Err(DropReason::Unix),
                // A header has no other origin over IP.
                Origin::Unspecified | _ => return Err(DropReason::Unspecified),
            };
            let key = self.checked_key((peer, local), (client, destination), now)?;
            let tlvs = header.tlvs();
            // A sender of tags has many clients at a port, and a header for each datagram.
            let remember = accept.remember.filter(|_| tlvs.reply_tag().is_none());
            let is_announcement =
                payload.is_empty() && remember.is_some_and(|remember| !remember.forwards_empty);
            let is_unremembered = remember.is_some_and(|remember| {
                !self.remember(remember, listener, (peer, local), &key, now)
            });
            if remember.is_none() {
                self.forget((peer, local));
            }
            let reply_header = tlvs.reply_tag().map(ReplyHeader::Tagged);
            return Ok(Arrival {
                tlvs: len - tlvs.as_bytes().len()..len,
                reply_header: reply_header.unwrap_or_default(),
                is_announcement,
                is_unremembered,
                ..arrival(key, len)
            });
        }
        if accept.formats.spp && datagram.starts_with(&spp::SPP_MAGIC) {
            let (header, _) = spp::decode(datagram).map_err(|_| DropReason::BadHeader)?;
            let ends = (canonical(header.client), canonical(header.proxy));
            let key = self.checked_key((peer, local), ends, now)?;
            self.forget((peer, local));
            return Ok(Arrival {
                reply_header: ReplyHeader::Spp,
                ..arrival(key, spp::SPP_HEADER_LEN)
            });
        }
        if ppv2::is_v1(datagram) {
            return Err(DropReason::V1Header);
        }
        if accept.remember.is_some()
            && let Some(key) = self.recall(listener, (peer, local), now)
        {
            return Ok(arrival(key, 0));
        }
        Err(DropReason::NoHeader)
    }

    /// Forgets for which clients the senders of this listener have spoken. It no longer
    /// remembers them, and they may speak for others before it does again.
    pub fn forget_said(&mut self, listener: u64) {
        let is_of = |said: &mut Said| said.listener == listener;
        for (_, entry) in &mut self.entries {
            entry.said.take_if(is_of);
        }
        self.remembered.remove(&listener);
    }

    /// What is known of each, by the names of listeners, for another process.
    pub(crate) fn states(
        &self,
        name_of: impl Fn(u64) -> Option<String>,
        now: Instant,
    ) -> (Vec<SenderState>, HashMap<u64, u32, ahash::RandomState>) {
        let (mut states, mut places) = (Vec::new(), HashMap::default());
        for (_, entry) in &self.entries {
            places.insert(
                entry.sender.id.to_bits(),
                u32::try_from(states.len()).unwrap_or(u32::MAX),
            );
            let said = entry.said.filter(|said| !said.is_over(now));
            states.push(SenderState {
                address: entry.sender.address.into(),
                local: entry.sender.local.into(),
                named: entry.named.map(|(client, to)| (client.into(), to.into())),
                said: said.and_then(|said| {
                    Some(SaidState {
                        listener: name_of(said.listener)?,
                        client: said.client.into(),
                        destination: said.destination.into(),
                        idle: said.idle,
                        heard: now.saturating_duration_since(said.heard),
                    })
                }),
            });
        }
        (states, places)
    }

    /// Goes on with what another process knew of a sender. `listener_of` says the id of the
    /// listener of a name, if it remembers senders, and how many.
    pub(crate) fn restore(
        &mut self,
        state: &SenderState,
        listener_of: impl Fn(&str) -> Option<(u64, usize)>,
        now: Instant,
    ) -> Arc<Sender> {
        let ends = (state.address.into(), state.local.into());
        let place = self.find(ends).unwrap_or_else(|| self.add(ends, now));
        let said = state.said.as_ref().and_then(|said| {
            let (listener, max) = listener_of(&said.listener)?;
            let count = self.remembered.get(&listener).copied().unwrap_or(0);
            (count < max).then_some(Said {
                listener,
                client: said.client.into(),
                destination: said.destination.into(),
                idle: said.idle,
                heard: now.checked_sub(said.heard).unwrap_or(now),
            })
        });
        let entry = &mut self.entries[place];
        let named = state.named.map(|(client, to)| (client.into(), to.into()));
        if entry.named.is_some() && entry.named != named {
            // Two workers knew it: sessions of the client before don't have its port any more.
            entry.sender.note_change();
        }
        entry.named = named;
        if entry.said.is_none()
            && let Some(said) = said
        {
            entry.said = Some(said);
            *self.remembered.entry(said.listener).or_default() += 1;
        }
        Arc::clone(&entry.sender)
    }

    /// The sender with this id, if anything is known of it.
    #[must_use]
    pub fn get(&self, id: SenderId) -> Option<&Arc<Sender>> {
        let entry = self.entries.get(id.place())?;
        (entry.sender.id == id).then_some(&entry.sender)
    }

    /// How many senders are known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether none is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// As [`key`](Self::key), of a client that a header names.
    fn checked_key(
        &mut self,
        sender: (SocketAddr, SocketAddr),
        (client, destination): (SocketAddr, SocketAddr),
        now: Instant,
    ) -> Result<Key, DropReason> {
        if client.port() == 0 || is_no_host(client.ip()) {
            return Err(DropReason::ClientAddress);
        }
        Ok(self.key(sender, (client, destination), now))
    }

    /// The key of a datagram of this client. The sender's port belongs to it from now on.
    fn key(
        &mut self,
        sender: (SocketAddr, SocketAddr),
        named: (SocketAddr, SocketAddr),
        now: Instant,
    ) -> Key {
        let place = self.find(sender).unwrap_or_else(|| self.add(sender, now));
        self.latest = Some(place);
        let entry = &mut self.entries[place];
        let before = entry.named.replace(named);
        if before.is_some_and(|before| before != named) {
            entry.sender.note_change();
        }
        Key {
            client: ClientAddr(named.0),
            local: ListenerAddr(named.1),
            sender: entry.sender.id,
        }
    }

    fn find(&self, sender: (SocketAddr, SocketAddr)) -> Option<usize> {
        let is_it = |place: &usize| {
            let entry = self.entries.get(*place);
            entry.is_some_and(|entry| (entry.sender.address, entry.sender.local) == sender)
        };
        let latest = self.latest.filter(is_it);
        latest.or_else(|| self.by_address.get(&sender).copied())
    }

    fn add(&mut self, (address, local): (SocketAddr, SocketAddr), now: Instant) -> usize {
        // Before it is there itself: it has no session yet.
        self.tidy(LOOKS, now);
        let entry = self.entries.vacant_entry();
        let place = entry.key();
        entry.insert(Entry {
            sender: Arc::new(Sender::new(SenderId::new(place), address, local)),
            named: None,
            said: None,
        });
        self.by_address.insert((address, local), place);
        place
    }

    /// Forgets some of the senders that no session has, and what they have said once it is
    /// over.
    fn tidy(&mut self, looks: usize, now: Instant) {
        for _ in 0..looks.min(self.entries.capacity() + 1) {
            self.hand = if self.hand >= self.entries.capacity() {
                0
            } else {
                self.hand + 1
            };
            let place = self.hand;
            let Some(entry) = self.entries.get_mut(place) else {
                continue;
            };
            if let Some(said) = entry.said
                && said.is_over(now)
            {
                entry.said = None;
                forget_one(&mut self.remembered, said.listener);
            }
            if entry.said.is_none() && Arc::strong_count(&entry.sender) == 1 {
                let ends = (entry.sender.address, entry.sender.local);
                self.by_address.remove(&ends);
                self.entries.remove(place);
            }
        }
    }

    /// Remembers for which client the sender has spoken. False if there are too many.
    fn remember(
        &mut self,
        remember: Remember,
        listener: u64,
        sender: (SocketAddr, SocketAddr),
        key: &Key,
        now: Instant,
    ) -> bool {
        let Some(place) = self.find(sender) else {
            return false;
        };
        let said = self.entries[place].said;
        // What is held here is not dropped while others are.
        let _held = Arc::clone(&self.entries[place].sender);
        if said.is_none_or(|said| said.listener != listener) {
            let count = |senders: &Self| senders.remembered.get(&listener).copied().unwrap_or(0);
            if count(self) >= remember.max {
                self.tidy(LOOKS_WHEN_FULL, now);
                if count(self) >= remember.max {
                    // It was said to another listener, before a reload.
                    self.forget(sender);
                    return false;
                }
            }
            if let Some(said) = self.entries[place].said {
                forget_one(&mut self.remembered, said.listener);
            }
            *self.remembered.entry(listener).or_default() += 1;
        }
        let Some(entry) = self.entries.get_mut(place) else {
            return false;
        };
        entry.said = Some(Said {
            listener,
            client: key.client.0,
            destination: key.local.0,
            idle: remember.idle,
            heard: now,
        });
        true
    }

    /// Notes that a datagram of the sender was refused.
    fn note_refusal(&mut self, sender: (SocketAddr, SocketAddr), reason: DropReason) {
        self.forget(sender);
        let place = self.find(sender).filter(|_| reason != DropReason::NoHeader);
        let entry = place.and_then(|place| self.entries.get_mut(place));
        if let Some(entry) = entry
            && entry.named.take().is_some()
        {
            entry.sender.note_change();
        }
    }

    /// Forgets for which client the sender has spoken.
    fn forget(&mut self, sender: (SocketAddr, SocketAddr)) {
        let place = self.find(sender);
        let entry = place.and_then(|place| self.entries.get_mut(place));
        if let Some(said) = entry.and_then(|entry| entry.said.take()) {
            forget_one(&mut self.remembered, said.listener);
        }
    }

    /// The key of a datagram without header, if its sender has said it before.
    fn recall(
        &mut self,
        listener: u64,
        sender: (SocketAddr, SocketAddr),
        now: Instant,
    ) -> Option<Key> {
        let place = self.find(sender)?;
        let entry = self.entries.get_mut(place)?;
        let said = entry.said.as_mut()?;
        if said.is_over(now) || said.listener != listener {
            self.forget(sender);
            return None;
        }
        said.heard = now;
        self.latest = Some(place);
        Some(Key {
            client: ClientAddr(said.client),
            local: ListenerAddr(said.destination),
            sender: entry.sender.id,
        })
    }
}

fn forget_one(remembered: &mut HashMap<u64, usize, ahash::RandomState>, listener: u64) {
    if let Some(count) = remembered.get_mut(&listener) {
        *count -= 1;
        if *count == 0 {
            remembered.remove(&listener);
        }
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn why_bad(error: DecodeError) -> DropReason {
    if matches!(error, DecodeError::TooLong { .. }) {
        DropReason::HeaderTooLong
    } else {
        DropReason::BadHeader
    }
}

/// Whether a TLV of a header that comes in may stand in one that goes out. A checksum and
/// padding are of one header alone, and a tag is for the one who made it.
#[must_use]
pub fn passes(kind: TlvType) -> bool {
    ![TlvType::CRC32C, TlvType::NOOP, TlvType::REPLY_TAG].contains(&kind)
}

#[cfg(test)]
mod tests;
