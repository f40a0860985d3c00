//! The ways back to clients, as address objects carry them.
//!
//! [`Gate`](ppv2_sdk::Gate) remembers the latest way to each client. Here a way
//! is told apart by the listener and the proxy too, so that a client behind two
//! of them is answered by each, whenever the address object that came with its
//! datagram is used. An object that an application keeps for long follows the
//! proxy when it takes another port for the same client.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ahash::RandomState;
use hashlink::LinkedHashMap;
use hashlink::linked_hash_map::Entry;
use ppv2_sdk::{FORMER_CLIENT_GRACE, Way as Reply};
use pyo3::prelude::*;

use super::address::{self, Form};

/// What tells two ways to a client apart. The proxy's port is not in it: that
/// is the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flow {
    pub(crate) client: SocketAddr,
    pub(crate) destination: Option<SocketAddr>,
    pub(crate) proxy: Option<IpAddr>,
}

/// In few words, for every datagram is looked up.
impl Hash for Flow {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let ip = |state: &mut H, ip: IpAddr| match ip {
            IpAddr::V4(v4) => state.write_u32(v4.to_bits()),
            IpAddr::V6(v6) => state.write_u128(v6.to_bits()),
        };
        ip(state, self.client.ip());
        state.write_u16(self.client.port());
        if let Some(destination) = self.destination {
            ip(state, destination.ip());
            state.write_u16(destination.port());
        }
        if let Some(proxy) = self.proxy {
            ip(state, proxy);
        }
    }
}

/// What a datagram says of the way to its client.
#[derive(Clone, Copy)]
pub(crate) struct Heard {
    pub(crate) flow: Flow,
    pub(crate) reply: Reply,
    pub(crate) now: Instant,
}

impl Heard {
    fn latest(&self) -> Latest {
        Latest {
            reply: self.reply,
            heard: self.now,
        }
    }
}

/// The way of one flow; what an address object carries.
#[pyclass(frozen, module = "ppv2._native", name = "_Way")]
pub(crate) struct Way {
    ways: u64,
    client: SocketAddr,
    /// `None` once there was no more room to keep it up to date.
    latest: Mutex<Option<Latest>>,
}

#[derive(Clone, Copy)]
struct Latest {
    reply: Reply,
    heard: Instant,
}

impl Way {
    pub(crate) fn client(&self) -> SocketAddr {
        self.client
    }

    fn latest(&self) -> MutexGuard<'_, Option<Latest>> {
        lock(&self.latest)
    }
}

/// The flows of one socket, the longest unheard-of first.
///
/// The hasher is keyed, since remote peers choose the addresses.
pub(crate) struct Ways {
    /// Tells the ways of two sockets apart.
    id: u64,
    flows: Mutex<Flows>,
    /// Bounds what a flood of made-up client addresses can make us allocate:
    /// about 700 bytes for each.
    max_flows: usize,
    forget_after: Duration,
    form: Form,
}

#[derive(Default)]
struct Flows {
    table: LinkedHashMap<Flow, Known, RandomState>,
    named_last: NamedLast,
}

impl Flows {
    fn known<'py>(&mut self, py: Python<'py>, heard: Heard) -> Option<Bound<'py, PyAny>> {
        self.named_last.name(&heard);
        let Entry::Occupied(mut known) = self.table.entry(heard.flow) else {
            return None;
        };
        known.to_back();
        let before = known.get().way.get().latest().replace(heard.latest());
        if before.is_none_or(|before| before.reply != heard.reply) {
            self.named_last.hold(&heard);
            self.named_last.release(before);
        }
        Some(known.get().address.bind(py).clone())
    }

    fn pop_front(&mut self) -> Option<Known> {
        let (_, known) = self.table.pop_front()?;
        self.forget(&known);
        Some(known)
    }

    fn forget(&mut self, known: &Known) {
        let latest = known.way.get().latest().take();
        self.named_last.release(latest);
    }
}

/// The client that each proxy address named last, for the addresses that some flow
/// uses: no more of them than flows. A proxy hands an address on from one client to
/// the next, and a reply to the former would reach a stranger.
#[derive(Default)]
struct NamedLast(HashMap<SocketAddr, Named, RandomState>);

struct Named {
    client: SocketAddr,
    /// Flows that use the address.
    flows: usize,
}

impl NamedLast {
    /// Notes the client that a proxy's address names, if any flow uses the address.
    fn name(&mut self, heard: &Heard) {
        if let Some(named) = self.0.get_mut(&heard.reply.to) {
            named.client = heard.flow.client;
        }
    }

    /// Notes that one more flow uses the address.
    fn hold(&mut self, heard: &Heard) {
        let client = heard.flow.client;
        let named = self.0.entry(heard.reply.to);
        let named = named.or_insert(Named { client, flows: 0 });
        named.client = client;
        named.flows += 1;
    }

    /// Notes that one flow less uses the address.
    fn release(&mut self, latest: Option<Latest>) {
        let Some(Latest { reply, .. }) = latest else {
            return;
        };
        if let Some(named) = self.0.get_mut(&reply.to) {
            named.flows -= 1;
            if named.flows == 0 {
                self.0.remove(&reply.to);
            }
        }
    }

    /// Whether a proxy's address has named another client since.
    fn names_another(&self, reply: &Reply, client: SocketAddr) -> bool {
        let named = self.0.get(&reply.to);
        reply.from.is_none() && named.is_some_and(|named| named.client != client)
    }
}

struct Known {
    address: Py<PyAny>,
    way: Py<Way>,
}

impl Ways {
    pub(crate) fn new(max_flows: usize, forget_after: Duration, form: Form) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            flows: Mutex::default(),
            max_flows,
            forget_after,
            form,
        }
    }

    /// The form of the addresses.
    pub(crate) fn form(&self) -> Form {
        self.form
    }

    /// Notes that clients were heard, and returns the address objects of those
    /// whose flow is known.
    pub(crate) fn known<'py>(
        &self,
        py: Python<'py>,
        heard: impl Iterator<Item = Heard>,
    ) -> Vec<Option<Bound<'py, PyAny>>> {
        let mut flows = lock(&self.flows);
        heard.map(|heard| flows.known(py, heard)).collect()
    }

    /// As `known`, for one client.
    pub(crate) fn known_one<'py>(
        &self,
        py: Python<'py>,
        heard: Heard,
    ) -> Option<Bound<'py, PyAny>> {
        lock(&self.flows).known(py, heard)
    }

    /// Notes that a client was heard by a flow that is not known, and returns its
    /// address object.
    pub(crate) fn learn<'py>(&self, py: Python<'py>, heard: Heard) -> PyResult<Bound<'py, PyAny>> {
        // Making objects can run any code, so nothing is locked meanwhile.
        let Heard { flow, now, .. } = heard;
        let way = Way {
            ways: self.id,
            client: flow.client,
            latest: Mutex::new(Some(heard.latest())),
        };
        let way = Py::new(py, way)?;
        let address = address::client_address(py, flow.client, self.form, &way)?;
        let known = Known {
            address: address.clone().unbind(),
            way,
        };
        self.insert(now, heard, known);
        Ok(address)
    }

    /// The way that an address object carries, if it is one of this socket's and
    /// its client was heard by it lately: in the last 10 seconds, where the proxy's
    /// address has named another client since.
    pub(crate) fn of(&self, now: Instant, way: &Way) -> Option<Reply> {
        if way.ways != self.id {
            return None;
        }
        let latest = (*way.latest())?;
        let age = now.saturating_duration_since(latest.heard);
        let sure = age < self.forget_after
            && (age < FORMER_CLIENT_GRACE
                || !lock(&self.flows)
                    .named_last
                    .names_another(&latest.reply, way.client));
        sure.then_some(latest.reply)
    }

    fn insert(&self, now: Instant, heard: Heard, known: Known) {
        // Dropping objects can run any code too, so that waits for the end.
        let mut gone = [None, None, None];
        let mut locked = lock(&self.flows);
        let flows = &mut *locked;
        // Two at most for each one added: the table shrinks back after a flood,
        // and no single datagram pays for it.
        for slot in gone.iter_mut().take(2) {
            let expired = |known: &Known| {
                let latest = *known.way.get().latest();
                latest.is_none_or(|latest| {
                    now.saturating_duration_since(latest.heard) >= self.forget_after
                })
            };
            if flows.table.front().is_some_and(|(_, known)| expired(known)) {
                *slot = flows.pop_front();
            }
        }
        let replaced = flows.table.insert(heard.flow, known);
        flows.named_last.hold(&heard);
        if let Some(replaced) = &replaced {
            flows.forget(replaced);
        }
        if flows.table.len() > self.max_flows {
            gone[2] = flows.pop_front();
        }
        drop(locked);
        drop((gone, replaced));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics halfway through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
