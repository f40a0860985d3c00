//! The ways back to clients, as address objects carry them.
//!
//! [`Gate`](ppv2_sdk::Gate) remembers the latest way to each client. Here a way
//! is told apart by the listener and the proxy too, so that a client behind two
//! of them is answered by each, whenever the address object that came with its
//! datagram is used. An object that an application keeps for long follows the
//! proxy when it takes another port for the same client.

use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ahash::RandomState;
use hashlink::LinkedHashMap;
use hashlink::linked_hash_map::Entry;
use ppv2_sdk::Way as Reply;
use pyo3::prelude::*;

use super::address;

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
}

#[derive(Default)]
struct Flows(LinkedHashMap<Flow, Known, RandomState>);

impl Flows {
    fn known<'py>(&mut self, py: Python<'py>, heard: Heard) -> Option<Bound<'py, PyAny>> {
        let Entry::Occupied(mut known) = self.0.entry(heard.flow) else {
            return None;
        };
        known.to_back();
        *known.get().way.get().latest() = Some(heard.latest());
        Some(known.get().address.bind(py).clone())
    }
}

struct Known {
    address: Py<PyAny>,
    way: Py<Way>,
}

impl Ways {
    pub(crate) fn new(max_flows: usize, forget_after: Duration) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            flows: Mutex::default(),
            max_flows,
            forget_after,
        }
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
        let address = address::client_address(py, flow.client, &way)?;
        let known = Known {
            address: address.clone().unbind(),
            way,
        };
        self.insert(py, now, flow, known);
        Ok(address)
    }

    /// The way that an address object carries, if it is one of this socket's and
    /// its client was heard by it lately.
    pub(crate) fn of(&self, now: Instant, way: &Way) -> Option<Reply> {
        if way.ways != self.id {
            return None;
        }
        let latest = (*way.latest())?;
        let fresh = now.saturating_duration_since(latest.heard) < self.forget_after;
        fresh.then_some(latest.reply)
    }

    fn insert(&self, py: Python<'_>, now: Instant, flow: Flow, known: Known) {
        // Dropping objects can run any code too, so that waits for the end.
        let mut gone = [None, None, None];
        let mut locked = lock(&self.flows);
        let flows = &mut locked.0;
        // Two at most for each one added: the table shrinks back after a flood,
        // and no single datagram pays for it.
        for slot in gone.iter_mut().take(2) {
            if flows
                .front()
                .is_some_and(|(_, known)| self.of(now, known.way.get()).is_none())
            {
                *slot = flows.pop_front().map(|(_, known)| known);
            }
        }
        let replaced = flows.insert(flow, known);
        if flows.len() > self.max_flows {
            gone[2] = flows.pop_front().map(|(_, known)| known);
        }
        drop(locked);
        for known in gone.into_iter().flatten().chain(replaced) {
            *known.way.bind(py).get().latest() = None;
            drop(known);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics halfway through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
