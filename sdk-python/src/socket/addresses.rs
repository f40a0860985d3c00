//! The address objects that a socket reports. Each equals an ordinary tuple, and carries
//! the reply path of its client's latest datagram by the same listener and proxy. So a
//! client behind two of them is answered by each, and an object that an application keeps
//! follows the proxy when it takes another port for the client.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ahash::RandomState;
use hashlink::LinkedHashMap;
use ppv2_sdk::{DatagramRef, Demux, Recipient, ReplyPath};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyString, PyTuple, PyType};

use crate::arguments;

/// The addresses of a datagram, and the path of a reply to it.
#[derive(Clone, Copy)]
pub(crate) struct Heard {
    pub(crate) client: SocketAddr,
    pub(crate) destination: Option<SocketAddr>,
    pub(crate) proxy: Option<SocketAddr>,
    path: ReplyPath,
    at: Instant,
}

impl Heard {
    pub(crate) fn new(datagram: &DatagramRef<'_>, at: Instant) -> Self {
        Self {
            client: datagram.client,
            destination: datagram.destination,
            proxy: datagram.proxy,
            path: datagram.reply_path,
            at,
        }
    }

    fn flow(&self) -> Flow {
        (
            self.client,
            self.destination,
            self.proxy.map(|proxy| proxy.ip()),
        )
    }
}

/// Client, listener and proxy host. Address objects differ by these. The proxy's port is
/// not among them, since the proxy may change it.
type Flow = (SocketAddr, Option<SocketAddr>, Option<IpAddr>);

/// The latest reply path of one flow, in its address object.
#[pyclass(frozen, module = "ppv2._native", name = "_ReplyPath")]
pub(crate) struct FlowPath {
    client: SocketAddr,
    /// The path, and when its datagram came. `None` once the object has lost its place
    /// in the table, and is no longer kept up to date.
    latest: Mutex<Option<(ReplyPath, Instant)>>,
    /// The [`Addresses`] that it belongs to.
    owner: u64,
}

impl FlowPath {
    fn latest(&self) -> MutexGuard<'_, Option<(ReplyPath, Instant)>> {
        lock(&self.latest)
    }
}

/// The address objects of one socket, the flow that has been silent for longest first.
///
/// The hasher is keyed, since remote peers choose the addresses.
pub(crate) struct Addresses {
    /// Tells the sockets of one process apart.
    id: u64,
    table: Mutex<LinkedHashMap<Flow, Known, RandomState>>,
    /// Bounds what a flood of made-up client addresses can allocate: about 700 bytes
    /// for each.
    max_flows: usize,
    forget_after: Duration,
    pub(crate) form: Form,
}

struct Known {
    address: Py<PyAny>,
    path: Py<FlowPath>,
}

impl Addresses {
    pub(crate) fn new(max_flows: usize, forget_after: Duration, form: Form) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            table: Mutex::default(),
            max_flows,
            forget_after,
            form,
        }
    }

    /// Notes that clients were heard, and returns their address objects.
    pub(crate) fn of<'py>(
        &self,
        py: Python<'py>,
        heard: &[Heard],
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let known: Vec<_> = {
            let mut table = lock(&self.table);
            heard.iter().map(|one| known(py, &mut table, one)).collect()
        };
        known
            .into_iter()
            .zip(heard)
            .map(|(known, one)| known.map_or_else(|| self.learn(py, one), Ok))
            .collect()
    }

    /// As `of`, for one client.
    pub(crate) fn of_one<'py>(
        &self,
        py: Python<'py>,
        heard: &Heard,
    ) -> PyResult<Bound<'py, PyAny>> {
        match self.note(py, heard) {
            Some(address) => Ok(address),
            None => self.learn(py, heard),
        }
    }

    /// Notes that a client was heard; its address object if there is one.
    pub(crate) fn note<'py>(&self, py: Python<'py>, heard: &Heard) -> Option<Bound<'py, PyAny>> {
        known(py, &mut lock(&self.table), heard)
    }

    /// Makes the address object of a new flow.
    fn learn<'py>(&self, py: Python<'py>, heard: &Heard) -> PyResult<Bound<'py, PyAny>> {
        // Making objects can run any code, so nothing is locked meanwhile.
        let path = FlowPath {
            client: heard.client,
            latest: Mutex::new(Some((heard.path, heard.at))),
            owner: self.id,
        };
        let path = Py::new(py, path)?;
        let address = class(py)?.call1((to_python(py, heard.client, self.form)?,))?;
        address.setattr(pyo3::intern!(py, "_path"), &path)?;
        let known = Known {
            address: address.clone().unbind(),
            path,
        };
        self.insert(heard, known);
        Ok(address)
    }

    fn insert(&self, heard: &Heard, known: Known) {
        // Dropping objects can run any code too, so that waits for the end.
        let mut gone = Vec::new();
        let mut table = lock(&self.table);
        // At most two expired flows for each new one: the table shrinks back after a
        // flood, and no single datagram pays for it.
        for _ in 0..2 {
            let expired = |known: &Known| {
                known
                    .path
                    .get()
                    .latest()
                    .is_none_or(|(_, at)| self.is_expired(heard.at, at))
            };
            if table.front().is_some_and(|(_, known)| expired(known)) {
                gone.extend(table.pop_front().map(|(_, known)| known));
            }
        }
        gone.extend(table.insert(heard.flow(), known));
        if table.len() > self.max_flows {
            gone.extend(table.pop_front().map(|(_, known)| known));
        }
        for known in &gone {
            *known.path.get().latest() = None;
        }
        drop(table);
        drop(gone);
    }

    /// The recipient that `address` stands for: the path that an object of this socket
    /// carries while a reply by it certainly reaches the client, else the client.
    pub(crate) fn recipient(
        &self,
        demux: &Demux,
        address: &Bound<'_, PyAny>,
    ) -> PyResult<Recipient> {
        let py = address.py();
        if !address.get_type().is(class(py)?) {
            return Ok(Recipient::Client(from_python("address", address)?));
        }
        let carried = address.getattr(pyo3::intern!(py, "_path"))?;
        let carried = carried.cast_into::<FlowPath>()?;
        let carried = carried.get();
        let now = Instant::now();
        let latest = carried
            .latest()
            .filter(|(_, at)| carried.owner == self.id && !self.is_expired(now, *at));
        let path = latest.and_then(|(path, _)| demux.reply_path(now, path));
        Ok(path.map_or(Recipient::Client(carried.client), Recipient::Path))
    }

    fn is_expired(&self, now: Instant, heard: Instant) -> bool {
        now.saturating_duration_since(heard) >= self.forget_after
    }
}

/// Notes that a client was heard by a known flow, and returns its address object.
fn known<'py>(
    py: Python<'py>,
    table: &mut LinkedHashMap<Flow, Known, RandomState>,
    heard: &Heard,
) -> Option<Bound<'py, PyAny>> {
    let known = table.to_back(&heard.flow())?;
    *known.path.get().latest() = Some((heard.path, heard.at));
    Some(known.address.bind(py).clone())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics halfway through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The class of the addresses that a socket reports.
fn class(py: Python<'_>) -> PyResult<&Bound<'_, PyType>> {
    static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    CLASS.import(py, "ppv2._types", "ClientAddress")
}

/// The form of the addresses that a socket reports, by its family as in the `socket`
/// module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Of an AF_INET socket: (host, port). So is an IPv6 client's, which only a
    /// header can name.
    Pair,
    /// Of an AF_INET6 socket: (host, port, flowinfo, scope_id), an IPv4 address in
    /// IPv6 form.
    Mapped,
}

/// An address as a socket of that form reports it, and as Python's own accepts it.
pub(crate) fn to_python(
    py: Python<'_>,
    address: SocketAddr,
    form: Form,
) -> PyResult<Bound<'_, PyTuple>> {
    let port = address.port();
    let v6 = match (form, address) {
        (Form::Pair, _) => {
            let host = PyString::new(py, &address.ip().to_string());
            return (host, port).into_pyobject(py);
        }
        (Form::Mapped, SocketAddr::V6(v6)) => v6,
        (Form::Mapped, SocketAddr::V4(v4)) => {
            SocketAddrV6::new(v4.ip().to_ipv6_mapped(), port, 0, 0)
        }
    };
    let host = PyString::new(py, &v6.ip().to_string());
    (host, port, v6.flowinfo(), v6.scope_id()).into_pyobject(py)
}

/// An address that Python passes or a socket of Python's reports: host must be
/// an IP address. The scope stays, since it is a part of a direct client's
/// address.
pub(crate) fn from_python(name: &str, value: &Bound<'_, PyAny>) -> PyResult<SocketAddr> {
    let mut address = arguments::socket_address(name, value)?;
    let tuple = value.cast::<PyTuple>()?;
    if let SocketAddr::V6(v6) = &mut address
        && tuple.len() == 4
    {
        v6.set_scope_id(tuple.get_item(3)?.extract()?);
    }
    Ok(address)
}
