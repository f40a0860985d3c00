//! One wrapped socket: receiving, sending and waiting. The Rust SDK's socket, which never
//! blocks here, moves the datagrams; this module waits, lets other threads run meanwhile,
//! and looks at signals.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ppv2_sdk::{Batch, DatagramRef, Demux, UdpSocket};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyTuple};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::BorrowedFd;
use rustix::io::Errno;

use super::addresses::{Addresses, Form, Heard, to_python};
use super::errors::{self, Failure};
use crate::header::Header;
use crate::trust::Limits;
use crate::{arguments, classes};

/// The length field of UDP has 16 bits.
pub(crate) const MAX_DATAGRAM: usize = 65_535;

pub(crate) struct Core {
    pub(crate) demux: Arc<Demux>,
    pub(crate) addresses: Addresses,
    /// `None` once closed. A call in progress keeps its own.
    socket: Mutex<Option<Arc<UdpSocket>>>,
    /// Seconds, as `socket.settimeout` has them: the bits of an f64, a NaN for none.
    timeout: AtomicU64,
    /// A server of `socketserver` waits for datagrams with a selector.
    served: AtomicBool,
    /// Datagrams arrive with the address that they were sent to.
    pub(crate) packet_info: bool,
    /// The application asked for that address too.
    pub(crate) packet_info_asked: AtomicBool,
}

/// How long a call may wait.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Wait {
    Forever,
    Never,
    Until(Instant),
}

impl Wait {
    /// Waits until `socket` is readable or writable.
    fn wait(self, socket: &UdpSocket, what: PollFlags) -> Result<(), Failure> {
        let left = match self {
            Self::Never => return Err(Failure::Io(io::ErrorKind::WouldBlock.into())),
            Self::Forever => None,
            Self::Until(deadline) => match deadline.saturating_duration_since(Instant::now()) {
                Duration::ZERO => return Err(Failure::TimedOut),
                left => Some(Timespec::try_from(left).map_err(|_| Errno::INVAL)?),
            },
        };
        match poll(&mut [PollFd::new(socket, what)], left.as_ref()) {
            Ok(0) => Err(Failure::TimedOut),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Core {
    /// Takes over a second descriptor of `socket`, an open `socket.socket` bound to
    /// `local` that doesn't block. It stays valid while a call uses it, though another
    /// thread closes the object.
    #[expect(unsafe_code, reason = "Python hands out descriptors as numbers")]
    pub(crate) fn new(
        demux: Demux,
        limits: &Limits,
        form: Form,
        socket: &Bound<'_, PyAny>,
        local: SocketAddr,
        packet_info_asked: bool,
    ) -> PyResult<Self> {
        let raw = socket.call_method0("fileno")?.extract()?;
        // SAFETY: `socket` owns the descriptor, and its holder keeps it open until
        // this returns.
        let borrowed = unsafe { BorrowedFd::borrow_raw(raw) };
        let descriptor = borrowed.try_clone_to_owned()?;
        let demux = Arc::new(demux);
        let socket = UdpSocket::with_demux(descriptor.into(), Arc::clone(&demux))?;
        Ok(Self {
            demux,
            addresses: Addresses::new(limits.max_clients, limits.forget_after, form),
            socket: Mutex::new(Some(Arc::new(socket))),
            timeout: AtomicU64::new(f64::NAN.to_bits()),
            served: AtomicBool::new(false),
            packet_info: cfg!(target_os = "linux") && local.ip().is_unspecified(),
            packet_info_asked: AtomicBool::new(packet_info_asked),
        })
    }

    pub(crate) fn socket(&self, py: Python<'_>) -> PyResult<Arc<UdpSocket>> {
        let open = self.slot().clone();
        open.ok_or_else(|| errors::os(py, Errno::BADF))
    }

    fn slot(&self) -> MutexGuard<'_, Option<Arc<UdpSocket>>> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn close(&self) {
        self.slot().take();
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.slot().is_none()
    }

    /// Notes that a server of `socketserver` waits with a selector, and takes an
    /// `OSError` for nothing received.
    pub(crate) fn set_served(&self) {
        self.served.store(true, Ordering::Relaxed);
    }

    pub(crate) fn timeout(&self) -> Option<f64> {
        let seconds = f64::from_bits(self.timeout.load(Ordering::Relaxed));
        (!seconds.is_nan()).then_some(seconds)
    }

    pub(crate) fn set_timeout(&self, seconds: Option<f64>) {
        let bits = seconds.unwrap_or(f64::NAN).to_bits();
        self.timeout.store(bits, Ordering::Relaxed);
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

    /// Has the kernel join datagrams; `false` if it can't.
    pub(crate) fn enable_gro(&self, py: Python<'_>) -> PyResult<bool> {
        let enabled = self.socket(py)?.enable_gro();
        enabled.map_err(|error| Failure::Io(error).into_py(py))
    }

    /// Calls `attempt`, which doesn't block, until it has a result, and waits between
    /// two attempts. Other threads of Python run meanwhile.
    fn persist<T: Send>(
        &self,
        py: Python<'_>,
        wait: Wait,
        what: PollFlags,
        mut attempt: impl FnMut(&UdpSocket) -> io::Result<T> + Send,
    ) -> Result<T, Failure> {
        let socket = self.socket(py)?;
        loop {
            let result = py.detach(|| attempt(&socket));
            self.log_drops(py);
            match result {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    py.detach(|| wait.wait(&socket, what))?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return Ok(result?),
            }
            py.check_signals()?;
        }
    }

    /// As `persist`, to receive. Where a selector has said that there is a datagram, and
    /// it had to be dropped, the call does not wait for another: its server would not
    /// hear of a shutdown.
    fn persist_to_receive<T: Send>(
        &self,
        py: Python<'_>,
        dontwait: bool,
        mut attempt: impl FnMut(&UdpSocket) -> io::Result<T> + Send,
    ) -> Result<T, Failure> {
        let wait = self.wait(dontwait);
        if wait != Wait::Forever || !self.served.load(Ordering::Relaxed) {
            return self.persist(py, wait, PollFlags::IN, attempt);
        }
        let drops = || self.demux.stats().dropped_total();
        let before = drops();
        loop {
            match self.persist(py, Wait::Never, PollFlags::IN, &mut attempt) {
                Err(Failure::Io(error))
                    if error.kind() == io::ErrorKind::WouldBlock && drops() == before => {}
                result => return result,
            }
            let socket = self.socket(py)?;
            py.detach(|| wait.wait(&socket, PollFlags::IN))?;
            py.check_signals()?;
        }
    }

    /// Logs the warnings of drops that are due to the logger `ppv2`. What a handler
    /// raises does not concern the receiver.
    pub(crate) fn log_drops(&self, py: Python<'_>) {
        for warning in self.demux.take_warnings() {
            let logged = py.import("logging").and_then(|logging| {
                let logger = logging.call_method1("getLogger", ("ppv2",))?;
                logger.call_method1("warning", ("%s", warning.to_string()))
            });
            if let Err(error) = logged {
                error.write_unraisable(py, None);
            }
        }
    }

    /// Receives one datagram, and has `take` make of its bytes, and of what is known of
    /// it, what the caller wants.
    pub(crate) fn receive<'py, T>(
        &self,
        py: Python<'py>,
        dontwait: bool,
        take: impl FnOnce(Python<'py>, &Heard, &[u8], &[u8]) -> PyResult<T>,
    ) -> PyResult<T> {
        let mut buffer = Buffer::take();
        let buffer = buffer.bytes();
        let received = self.persist_to_receive(py, dontwait, |socket| {
            let datagram = socket.recv_ref(buffer)?;
            let heard = Heard::new(&datagram, Instant::now());
            Ok((heard, datagram.header.len(), datagram.payload.len()))
        });
        let (heard, header_len, payload_len) = received.map_err(|error| error.into_py(py))?;
        let (header, rest) = buffer.split_at(header_len);
        take(py, &heard, header, &rest[..payload_len])
    }

    /// The address object of a client that was heard.
    pub(crate) fn address<'py>(
        &self,
        py: Python<'py>,
        heard: &Heard,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.addresses.of_one(py, heard)
    }

    /// All that is known of one datagram.
    pub(crate) fn receive_datagram<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.receive(py, false, |py, heard, header, payload| {
            // An SPP header says no more than the addresses do.
            let is_v2 = header.starts_with(&ppv2::SIGNATURE);
            let header = is_v2.then(|| Header::read(py, header)).transpose()?;
            let plain = |address: Option<SocketAddr>| {
                address
                    .map(|address| to_python(py, address, self.addresses.form))
                    .transpose()
            };
            let fields = (
                PyBytes::new(py, payload),
                self.address(py, heard)?,
                plain(heard.destination)?,
                plain(heard.proxy)?,
                header,
            );
            classes::datagram(py, fields)
        })
    }

    /// Waits for one datagram, and takes what else is there, as many as the kernel puts
    /// into that many slots.
    pub(crate) fn receive_batch<'py>(
        &self,
        py: Python<'py>,
        count: usize,
    ) -> PyResult<Bound<'py, PyList>> {
        thread_local! {
            static SPARE: Cell<Option<Batch>> = const { Cell::new(None) };
        }
        // Taken rather than borrowed, as the buffer of single datagrams is.
        let mut batch = SPARE.take().unwrap_or_else(|| Batch::new(count));
        batch.set_slots(count);
        self.persist_to_receive(py, false, |socket| socket.recv_batch(&mut batch))
            .map_err(|error| error.into_py(py))?;
        let now = Instant::now();
        let heard: Vec<_> = batch.iter().map(|one| Heard::new(&one, now)).collect();
        let addresses = self.addresses.of(py, &heard)?;
        let payloads = batch
            .iter()
            .map(|one: DatagramRef<'_>| PyBytes::new(py, one.payload));
        let pairs: Vec<_> = payloads.zip(addresses).collect();
        SPARE.set(Some(batch));
        PyList::new(py, pairs)
    }

    /// Sends one datagram to a client and returns its length.
    pub(crate) fn send(
        &self,
        py: Python<'_>,
        payload: &[u8],
        client: &Bound<'_, PyAny>,
        dontwait: bool,
    ) -> PyResult<usize> {
        self.socket(py)?;
        let recipient = self.addresses.recipient(&self.demux, client)?;
        self.persist(py, self.wait(dontwait), PollFlags::OUT, |socket| {
            socket.reply_to(recipient, payload)
        })
        .map_err(|error| error.into_py(py))
    }

    /// Sends to clients in turn, and returns how many datagrams are dealt with: sent,
    /// or counted as without a reply path.
    pub(crate) fn send_batch(&self, datagrams: &Bound<'_, PyAny>) -> PyResult<usize> {
        let py = datagrams.py();
        self.socket(py)?;
        let mut owned = Vec::new();
        for (index, datagram) in datagrams.try_iter()?.enumerate() {
            let (data, address) = pair(index, &datagram?)?;
            let data = match data.cast_into::<PyBytes>() {
                Ok(bytes) => bytes,
                Err(other) => {
                    let name = format!("datagrams[{index}][0]");
                    arguments::bytes_like(&name, &other.into_inner())?
                }
            };
            owned.push((data, self.addresses.recipient(&self.demux, &address)?));
        }
        let replies: Vec<_> = owned
            .iter()
            .map(|(data, to)| (data.as_bytes(), *to))
            .collect();
        let wait = self.wait(false);
        let mut done = 0;
        while done < replies.len() {
            let rest = &replies[done..];
            match self.persist(py, wait, PollFlags::OUT, |socket| socket.send_batch(rest)) {
                Ok(sent) => done += sent,
                Err(Failure::Io(error)) if error.kind() == io::ErrorKind::NotConnected => done += 1,
                // What fails now fails again at the next call, which can say so.
                Err(Failure::Io(_) | Failure::TimedOut) if done > 0 => break,
                Err(error) => return Err(error.into_py(py)),
            }
        }
        Ok(done)
    }

    /// Calls a method of Python's socket, which never blocks, until it has a result.
    /// `None` if the kernel reported an earlier datagram instead.
    pub(crate) fn persist_in_python<'py>(
        &self,
        py: Python<'py>,
        wait: Wait,
        what: PollFlags,
        call: impl Fn() -> PyResult<Bound<'py, PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        loop {
            let error = match call() {
                Ok(result) => return Ok(Some(result)),
                Err(error) => error,
            };
            match errors::number(py, &error) {
                Some(Errno::AGAIN) => {}
                Some(number) if errors::is_echo_of_earlier_send(number) => return Ok(None),
                _ => return Err(error),
            }
            let socket = self.socket(py)?;
            py.detach(|| wait.wait(&socket, what))
                .map_err(|error| error.into_py(py))?;
            py.check_signals()?;
        }
    }

    /// The counters of the demux.
    pub(crate) fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let stats = self.demux.stats();
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
                stats.replies_sent,
                stats.replies_without_path,
                stats.clients_evicted,
                stats.clients,
                stats.listeners_evicted,
                stats.senders_not_remembered,
            ),
        )
    }
}

fn pair<'py>(
    index: usize,
    datagram: &Bound<'py, PyAny>,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
    let pair = datagram.cast::<PyTuple>().map_err(PyErr::from);
    pair.and_then(|pair| pair.extract()).map_err(|_: PyErr| {
        let name = format!("datagrams[{index}]");
        arguments::type_error(&name, "a pair (data, address)", datagram)
    })
}

thread_local! {
    static SPARE: Cell<Option<Box<[u8]>>> = const { Cell::new(None) };
}

/// This thread's buffer, with room for the longest datagram, so that a header
/// never costs the application's buffer any bytes. It is taken rather than
/// borrowed: what Python runs meanwhile, such as a signal's handler, may receive
/// too, and gets another.
struct Buffer(Option<Box<[u8]>>);

impl Buffer {
    fn take() -> Self {
        let spare = SPARE.take();
        Self(Some(
            spare.unwrap_or_else(|| vec![0; MAX_DATAGRAM].into_boxed_slice()),
        ))
    }

    fn bytes(&mut self) -> &mut [u8] {
        self.0.as_deref_mut().unwrap_or_default()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        SPARE.set(self.0.take());
    }
}
