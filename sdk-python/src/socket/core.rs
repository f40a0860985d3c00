//! One wrapped socket: what every method of it is made of.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ppv2_sdk::{Admitted, DropWarning, DropWarnings, Gate, Recipient, Way};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use super::address::{self, Form};
use super::descriptor::{Buffer, Descriptor, Failure, MOST_DROPS_IN_A_ROW, Wait};
use super::errors;
use super::ways::{Flow, Heard, Ways};
use crate::classes;
use crate::header::Header;
use crate::trust::Limits;

pub(crate) struct Core {
    pub(crate) gate: Gate,
    pub(crate) ways: Ways,
    replies: Replies,
    forget_after: Duration,
    /// `None` once closed. A call that is under way keeps its own.
    descriptor: Mutex<Option<Arc<Descriptor>>>,
    timeout: Timeout,
    /// Datagrams arrive joined, so that only batches can be received.
    joined: AtomicBool,
    /// A server of `socketserver` waits for datagrams with a selector.
    served: AtomicBool,
    warnings: DropWarnings,
}

/// What one receive call has dropped so far, and the warnings that are due.
#[derive(Default)]
pub(crate) struct Drops {
    pub(crate) count: usize,
    warnings: Vec<DropWarning>,
}

impl Drops {
    /// Whether the call should look up: to log a warning at once, since the next
    /// datagram may be long in coming, or to see whether a signal came.
    pub(crate) fn look_up(&self) -> bool {
        !self.warnings.is_empty() || self.count.is_multiple_of(MOST_DROPS_IN_A_ROW)
    }

    /// Logs the warnings that are due to the logger `ppv2`. What a handler raises
    /// is not the receiver's business.
    pub(crate) fn log(&mut self, py: Python<'_>) {
        for warning in self.warnings.drain(..) {
            let logged = py.import("logging").and_then(|logging| {
                let logger = logging.call_method1("getLogger", ("ppv2",))?;
                logger.call_method1("warning", ("%s", warning.to_string()))
            });
            if let Err(error) = logged {
                error.write_unraisable(py, None);
            }
        }
    }
}

/// What the gate doesn't count.
#[derive(Default)]
struct Replies {
    sent: AtomicU64,
    without_route: AtomicU64,
    /// By a descriptor that is closed.
    listeners_evicted: AtomicU64,
}

impl Replies {
    fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    fn without_route(&self) -> u64 {
        self.without_route.load(Ordering::Relaxed)
    }
}

/// The timeout of a socket, as `socket.settimeout` has it: the bits of an f64,
/// a NaN for none.
struct Timeout(AtomicU64);

impl Timeout {
    fn get(&self) -> Option<f64> {
        let seconds = f64::from_bits(self.0.load(Ordering::Relaxed));
        (!seconds.is_nan()).then_some(seconds)
    }

    fn set(&self, seconds: Option<f64>) {
        let bits = seconds.unwrap_or(f64::NAN).to_bits();
        self.0.store(bits, Ordering::Relaxed);
    }
}

/// A datagram for the application. Its bytes are in the buffer that it was
/// received into.
#[derive(Clone, Copy)]
pub(crate) struct Received {
    /// Where the header ends and the payload begins.
    header_len: usize,
    /// Bytes of both.
    len: usize,
    pub(crate) client: SocketAddr,
    pub(crate) destination: Option<SocketAddr>,
    pub(crate) proxy: Option<SocketAddr>,
    way: Way,
    now: Instant,
}

impl Received {
    fn new(now: Instant, len: usize, admitted: &Admitted<'_>) -> Self {
        Self {
            header_len: len - admitted.payload.len(),
            len,
            client: admitted.client,
            destination: admitted.destination,
            proxy: admitted.proxy,
            way: admitted.way,
            now,
        }
    }

    /// Of the bytes that it was received into, those of the header; none for a
    /// direct client.
    pub(crate) fn header<'b>(&self, bytes: &'b [u8]) -> &'b [u8] {
        bytes.get(..self.header_len).unwrap_or_default()
    }

    /// Of the bytes that it was received into, the client's.
    pub(crate) fn payload<'b>(&self, bytes: &'b [u8]) -> &'b [u8] {
        bytes.get(self.header_len..self.len).unwrap_or_default()
    }

    /// All that is known of it; `bytes` are those that it was received into.
    pub(crate) fn datagram<'py>(
        &self,
        py: Python<'py>,
        bytes: &[u8],
        ways: &Ways,
    ) -> PyResult<Bound<'py, PyAny>> {
        let header = match self.header(bytes) {
            [] => None,
            header => Some(Header::read(py, header)?),
        };
        let plain = |address: Option<SocketAddr>| {
            address
                .map(|address| address::in_form(py, address, ways.form()))
                .transpose()
        };
        classes::datagram(
            py,
            (
                PyBytes::new(py, self.payload(bytes)),
                self.address(py, ways)?,
                plain(self.destination)?,
                plain(self.proxy)?,
                header,
            ),
        )
    }

    /// The client's address, which carries the way back.
    pub(crate) fn address<'py>(&self, py: Python<'py>, ways: &Ways) -> PyResult<Bound<'py, PyAny>> {
        match ways.known_one(py, self.heard()) {
            Some(address) => Ok(address),
            None => ways.learn(py, self.heard()),
        }
    }

    /// Notes the way to the client, whose address is not asked for.
    pub(crate) fn note(&self, py: Python<'_>, ways: &Ways) {
        ways.known_one(py, self.heard());
    }

    /// The addresses of several, with one lock for those that are known.
    pub(crate) fn addresses<'py, T>(
        py: Python<'py>,
        received: &[(T, Self)],
        ways: &Ways,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let heard = received.iter().map(|(_, one)| one.heard());
        ways.known(py, heard)
            .into_iter()
            .zip(received)
            .map(|(address, (_, one))| match address {
                Some(address) => Ok(address),
                None => ways.learn(py, one.heard()),
            })
            .collect()
    }

    fn heard(&self) -> Heard {
        Heard {
            flow: Flow {
                client: self.client,
                destination: self.destination,
                proxy: self.proxy.map(|proxy| proxy.ip()),
            },
            reply: self.way,
            now: self.now,
        }
    }
}

impl Core {
    pub(crate) fn new(gate: Gate, limits: &Limits, form: Form, descriptor: Descriptor) -> Self {
        Self {
            gate,
            ways: Ways::new(limits.max_clients, limits.forget_after, form),
            replies: Replies::default(),
            forget_after: limits.forget_after,
            descriptor: Mutex::new(Some(Arc::new(descriptor))),
            timeout: Timeout(AtomicU64::new(f64::NAN.to_bits())),
            joined: AtomicBool::new(false),
            served: AtomicBool::new(false),
            warnings: DropWarnings::new(),
        }
    }

    /// Notes that datagrams arrive joined from now on.
    pub(crate) fn set_joined(&self) {
        self.joined.store(true, Ordering::Relaxed);
    }

    /// An error where datagrams arrive joined: the rest of a burst would have no
    /// place.
    pub(crate) fn check_not_joined(&self, py: Python<'_>) -> PyResult<()> {
        if self.joined.load(Ordering::Relaxed) {
            return Err(errors::joined(py));
        }
        Ok(())
    }

    /// Notes that a server of `socketserver` waits with a selector, and takes an
    /// `OSError` for nothing received.
    pub(crate) fn set_served(&self) {
        self.served.store(true, Ordering::Relaxed);
    }

    /// How a call waits that has dropped something: where a selector has said
    /// that there is a datagram, that may have been all, and the server would not
    /// hear of its end.
    pub(crate) fn wait_on(&self, wait: Wait, drops: &Drops) -> Wait {
        let served = drops.count > 0 && self.served.load(Ordering::Relaxed);
        if served && wait == Wait::Forever {
            Wait::Never
        } else {
            wait
        }
    }

    pub(crate) fn timeout(&self) -> Option<f64> {
        self.timeout.get()
    }

    pub(crate) fn set_timeout(&self, seconds: Option<f64>) {
        self.timeout.set(seconds);
    }

    pub(crate) fn close(&self) {
        if let Some(descriptor) = self.slot().take() {
            let counter = &self.replies.listeners_evicted;
            counter.store(descriptor.listeners_evicted(), Ordering::Relaxed);
        }
    }

    /// Listeners' sockets closed to make room for others.
    fn listeners_evicted(&self) -> u64 {
        match self.slot().as_ref() {
            Some(descriptor) => descriptor.listeners_evicted(),
            None => self.replies.listeners_evicted.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.slot().is_none()
    }

    pub(crate) fn descriptor(&self, py: Python<'_>) -> PyResult<Arc<Descriptor>> {
        let open = self.slot().clone();
        open.ok_or_else(|| errors::os(py, rustix::io::Errno::BADF))
    }

    fn slot(&self) -> std::sync::MutexGuard<'_, Option<Arc<Descriptor>>> {
        self.descriptor
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The counters of the gate, and those that stand here.
    pub(crate) fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let stats = self.gate.stats();
        let dropped = PyDict::new(py);
        for (reason, count) in stats.drops() {
            dropped.set_item(reason.as_str(), count)?;
        }
        classes::stats(
            py,
            (
                stats.received,
                stats.delivered,
                dropped,
                self.replies.sent(),
                self.replies.without_route(),
                stats.clients_evicted,
                stats.clients,
                self.listeners_evicted(),
            ),
        )
    }

    /// How long a call that begins now may wait.
    pub(crate) fn wait(&self, dontwait: bool) -> Wait {
        match self.timeout() {
            _ if dontwait => Wait::Never,
            None => Wait::Forever,
            Some(0.0) => Wait::Never,
            Some(seconds) => Duration::try_from_secs_f64(seconds)
                .ok()
                .and_then(|timeout| Instant::now().checked_add(timeout))
                .map_or(Wait::Forever, Wait::Until),
        }
    }

    /// Receives until there is a datagram for the application, and has `take`
    /// make of its bytes what the caller wants.
    pub(crate) fn receive<'py, T>(
        &self,
        py: Python<'py>,
        dontwait: bool,
        take: impl FnOnce(Python<'py>, &Received, &[u8]) -> PyResult<T>,
    ) -> PyResult<T> {
        let descriptor = self.descriptor(py)?;
        self.check_not_joined(py)?;
        let wait = self.wait(dontwait);
        let mut buffer = Buffer::take();
        let mut drops = Drops::default();
        loop {
            let buffer = buffer.bytes();
            let received =
                py.detach(|| self.receive_some(&descriptor, wait, &mut *buffer, &mut drops));
            drops.log(py);
            match received {
                Ok(Some(received)) => return take(py, &received, buffer),
                Ok(None) | Err(Failure::Interrupted) => py.check_signals()?,
                Err(failure) => return Err(errors::failure(py, failure)),
            }
        }
    }

    /// Receives until a datagram is for the application, or nothing but bad ones
    /// has come for long, or a warning is due.
    fn receive_some(
        &self,
        descriptor: &Descriptor,
        wait: Wait,
        buffer: &mut [u8],
        drops: &mut Drops,
    ) -> Result<Option<Received>, Failure> {
        loop {
            let (len, peer, local) = descriptor.receive(buffer, self.wait_on(wait, drops))?;
            let received = self.admit(Instant::now(), peer, local, &buffer[..len], drops);
            if received.is_some() {
                return Ok(received);
            }
            self.wait_on(wait, drops).after_drops(drops.count)?;
            if drops.look_up() {
                return Ok(None);
            }
        }
    }

    /// Has the gate decide on a datagram; `None` if it was dropped.
    pub(crate) fn admit(
        &self,
        now: Instant,
        peer: SocketAddr,
        local: Option<IpAddr>,
        bytes: &[u8],
        drops: &mut Drops,
    ) -> Option<Received> {
        match self.gate.admit_to(now, peer, local, bytes) {
            Ok(admitted) => Some(Received::new(now, bytes.len(), &admitted)),
            Err(reason) => {
                drops.count += 1;
                drops.warnings.extend(self.warnings.due(now, peer, reason));
                None
            }
        }
    }

    /// Sends one datagram to a client and returns its length.
    pub(crate) fn send(
        &self,
        py: Python<'_>,
        payload: &[u8],
        client: &Bound<'_, PyAny>,
        dontwait: bool,
    ) -> PyResult<usize> {
        let descriptor = self.descriptor(py)?;
        let way = self.way_to(client)?;
        let wait = self.wait(dontwait);
        loop {
            let sent = py.detach(|| match way.from.is_some() || way.local.is_some() {
                false => descriptor.send(payload, way.to, wait),
                true => descriptor
                    .bursts()?
                    .send(&descriptor, &[(payload, Recipient::Way(way))], wait)
                    .map(|_| payload.len()),
            });
            match sent {
                Ok(sent) => {
                    self.replies_sent(1);
                    return Ok(sent);
                }
                Err(Failure::Interrupted) => py.check_signals()?,
                Err(failure) => return Err(errors::failure(py, failure)),
            }
        }
    }

    /// Where to send what is meant for a client: the way that its address object
    /// carries, or else the one that its latest datagram came by. Otherwise the
    /// client, to which nobody knows the way.
    pub(crate) fn find_way_to(
        &self,
        now: Instant,
        address: &Bound<'_, PyAny>,
    ) -> PyResult<Result<Way, SocketAddr>> {
        let client = match address::way_of(address)? {
            Some(way) => {
                if let Some(reply) = self.ways.of(now, way.get()) {
                    return Ok(Ok(reply));
                }
                way.get().client()
            }
            None => address::from_python("address", address)?,
        };
        Ok(self.gate.route(now, client).ok_or(client))
    }

    /// As `find_way_to`, a missing one being an exception, and counted.
    pub(crate) fn way_to(&self, address: &Bound<'_, PyAny>) -> PyResult<Way> {
        self.find_way_to(Instant::now(), address)?
            .map_err(|client| {
                self.replies_without_route(1);
                errors::no_route(address.py(), client, self.forget_after)
            })
    }

    /// Counts replies that were sent.
    pub(crate) fn replies_sent(&self, count: usize) {
        self.replies.sent.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// Counts replies that could not be sent for want of a way.
    pub(crate) fn replies_without_route(&self, count: usize) {
        let counter = &self.replies.without_route;
        counter.fetch_add(count as u64, Ordering::Relaxed);
    }
}
