//! `Socket`: a UDP socket of Python's whose addresses are the clients'.
//!
//! The methods here are the ones of `socket.socket`, argument by argument. What
//! they do is in [`core`]. PyO3 wants the methods of a class in one block, so this file
//! is as long as their help is.

mod addresses;
mod buffers;
mod callers;
mod core;
mod errors;
mod message;
mod wrapping;

use std::sync::atomic::Ordering;

use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};
use rustix::io::Errno;

use self::buffers::{Flags, Writable, batch_size, bufsize, clipped, writable};
use self::core::Core;
use crate::arguments;

pub(crate) use self::addresses::FlowPath;
pub(crate) use self::wrapping::wrap;

/// Level and name of the option that joins datagrams (udp(7)).
const UDP_GRO: (i32, i32) = (17, 104);

/// A UDP socket whose addresses are its clients', made by wrap().
///
/// It has the methods that a UDP server uses, with the arguments and results of
/// socket.socket; a method that is not here could hand a header to the
/// application. Datagrams that must be dropped are dropped and counted in
/// stats(); they never raise, and never prolong a timeout.
///
/// An address that it reports equals an ordinary one, in the form of the socket's
/// family: (host, port) on an AF_INET socket, IPv6 clients too;
/// (host, port, flowinfo, scope_id) on an AF_INET6 one, IPv4 clients as
/// "::ffff:192.0.2.1".
/// Pass the object itself to sendto(): then the reply takes the listener and the
/// proxy that the datagram came through. A reply to an equal tuple takes those of the
/// client's latest datagram.
///
/// All methods may be called from several threads.
#[pyclass(frozen, weakref, module = "ppv2")]
pub(crate) struct Socket {
    /// The `socket.socket` that owns the descriptor. It is non-blocking.
    python: Py<PyAny>,
    core: Core,
    type_asked: callers::Caller,
}

#[pymethods]
impl Socket {
    /// Receives one client's datagram.
    ///
    /// Args:
    ///     bufsize: The most bytes to return; the rest of a longer payload is
    ///         lost. The header needs no room.
    ///     flags: 0 or MSG_DONTWAIT.
    ///
    /// Returns:
    ///     The payload without any header; possibly empty.
    ///
    /// Raises:
    ///     TimeoutError: The timeout passed, bad datagrams or not.
    ///     BlockingIOError: There is no datagram, and the socket is non-blocking;
    ///         or 64 had to be dropped, and more may be there.
    ///     OSError: The socket is closed or broken; never what somebody sent.
    #[pyo3(signature = (bufsize, flags = Flags::default(), /), text_signature = "($self, bufsize, flags=0, /)")]
    fn recv<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = bufsize)] bufsize: usize,
        flags: Flags,
    ) -> PyResult<Bound<'py, PyBytes>> {
        self.core
            .receive(py, flags.dontwait, |py, heard, _, payload| {
                self.core.addresses.note(py, heard);
                Ok(PyBytes::new(py, clipped(payload, bufsize)))
            })
    }

    /// Receives one client's datagram into a buffer.
    ///
    /// Args:
    ///     buffer: A writable bytes-like object.
    ///     nbytes: The most bytes to write; 0 for all that there is room for.
    ///     flags: 0 or MSG_DONTWAIT.
    ///
    /// Returns:
    ///     How many bytes were written.
    ///
    /// Raises:
    ///     As recv().
    #[pyo3(signature = (buffer, nbytes = 0, flags = Flags::default()), text_signature = "($self, buffer, nbytes=0, flags=0)")]
    fn recv_into(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = writable)] buffer: Writable<'_>,
        #[pyo3(from_py_with = bufsize)] nbytes: usize,
        flags: Flags,
    ) -> PyResult<usize> {
        let room = buffer.room(nbytes)?;
        self.core
            .receive(py, flags.dontwait, |py, heard, _, payload| {
                self.core.addresses.note(py, heard);
                buffer.write(clipped(payload, room))
            })
    }

    /// Receives one client's datagram and the client's address.
    ///
    /// Args:
    ///     bufsize: As for recv().
    ///     flags: As for recv().
    ///
    /// Returns:
    ///     The payload and the client's address.
    ///
    /// Raises:
    ///     As recv().
    #[pyo3(signature = (bufsize, flags = Flags::default(), /), text_signature = "($self, bufsize, flags=0, /)")]
    fn recvfrom<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = bufsize)] bufsize: usize,
        flags: Flags,
    ) -> PyResult<(Bound<'py, PyBytes>, Bound<'py, PyAny>)> {
        self.core
            .receive(py, flags.dontwait, |py, heard, _, payload| {
                let payload = PyBytes::new(py, clipped(payload, bufsize));
                Ok((payload, self.core.address(py, heard)?))
            })
    }

    /// Receives one client's datagram into a buffer, and the client's address.
    ///
    /// Args:
    ///     buffer: As for recv_into().
    ///     nbytes: As for recv_into().
    ///     flags: As for recv_into().
    ///
    /// Returns:
    ///     How many bytes were written, and the client's address.
    ///
    /// Raises:
    ///     As recv().
    #[pyo3(signature = (buffer, nbytes = 0, flags = Flags::default()), text_signature = "($self, buffer, nbytes=0, flags=0)")]
    fn recvfrom_into<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = writable)] buffer: Writable<'_>,
        #[pyo3(from_py_with = bufsize)] nbytes: usize,
        flags: Flags,
    ) -> PyResult<(usize, Bound<'py, PyAny>)> {
        let room = buffer.room(nbytes)?;
        self.core
            .receive(py, flags.dontwait, |py, heard, _, payload| {
                let written = buffer.write(clipped(payload, room))?;
                Ok((written, self.core.address(py, heard)?))
            })
    }

    /// Receives one client's datagram with all that is known of it.
    ///
    /// Returns:
    ///     Payload, client, destination, proxy and header.
    ///
    /// Raises:
    ///     As recv().
    fn recv_datagram<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.core.receive_datagram(py)
    }

    /// Receives one client's datagram, ancillary data and the client's address.
    ///
    /// Args:
    ///     bufsize: As for recv().
    ///     ancbufsize: The most bytes of ancillary data to receive.
    ///     flags: As for recv().
    ///
    /// Returns:
    ///     (data, ancdata, msg_flags, address): the payload, a list of (level,
    ///     type, data), flags such as MSG_TRUNC, and the client's address.
    ///     What ancillary data say of addresses is said of the proxy's datagram.
    ///
    /// Raises:
    ///     As recv().
    #[pyo3(signature = (bufsize, ancbufsize = 0, flags = Flags::default(), /), text_signature = "($self, bufsize, ancbufsize=0, flags=0, /)")]
    fn recvmsg<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = bufsize)] bufsize: usize,
        #[pyo3(from_py_with = bufsize)] ancbufsize: usize,
        flags: Flags,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let message = self.receive_message(py, ancbufsize, flags)?;
        let payload = message.payload();
        let data = PyBytes::new(py, clipped(payload, bufsize));
        message.result(data.into_any(), payload.len() > bufsize)
    }

    /// Receives one client's datagram into buffers, ancillary data and the
    /// client's address.
    ///
    /// Args:
    ///     buffers: Writable bytes-like objects, filled one after the other.
    ///     ancbufsize: As for recvmsg().
    ///     flags: As for recv().
    ///
    /// Returns:
    ///     (nbytes, ancdata, msg_flags, address): how many bytes were written, and
    ///     the rest as of recvmsg().
    ///
    /// Raises:
    ///     As recv().
    #[pyo3(signature = (buffers, ancbufsize = 0, flags = Flags::default(), /), text_signature = "($self, buffers, ancbufsize=0, flags=0, /)")]
    fn recvmsg_into<'py>(
        &self,
        py: Python<'py>,
        buffers: &Bound<'py, PyAny>,
        #[pyo3(from_py_with = bufsize)] ancbufsize: usize,
        flags: Flags,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let buffers: Vec<_> = buffers
            .try_iter()?
            .map(|buffer| writable(&buffer?))
            .collect::<PyResult<_>>()?;
        let message = self.receive_message(py, ancbufsize, flags)?;
        let mut rest = message.payload();
        let mut written = 0;
        for buffer in &buffers {
            let (part, after) = rest.split_at(rest.len().min(buffer.len));
            written += buffer.write(part)?;
            rest = after;
        }
        message.result(written.into_pyobject(py)?.into_any(), !rest.is_empty())
    }

    /// Sends a datagram to a client. The arguments are (data, address) or
    /// (data, flags, address).
    ///
    /// Args:
    ///     data: The payload, any bytes-like object.
    ///     flags: 0 or MSG_DONTWAIT.
    ///     address: The client's address, best the object that a receive call
    ///         returned.
    ///
    /// Returns:
    ///     How many bytes were sent.
    ///
    /// Raises:
    ///     NoReplyPathError: Nothing was received from the client, or too long ago; or
    ///         10 seconds ago, and the proxy's address has named another client since.
    ///     TimeoutError, BlockingIOError: There is no room to send, and the
    ///         timeout passed or the socket is non-blocking.
    ///     OSError: The datagram could not be sent.
    #[pyo3(signature = (data, flags, address = None, /), text_signature = None)]
    fn sendto(
        &self,
        data: &Bound<'_, PyAny>,
        flags: &Bound<'_, PyAny>,
        address: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<usize> {
        let (flags, address) = match address {
            Some(address) => (flags.extract()?, address),
            None => (Flags::default(), flags),
        };
        let data = arguments::bytes_like("data", data)?;
        self.core
            .send(data.py(), data.as_bytes(), address, flags.dontwait)
    }

    /// Sends a datagram, put together of parts, to a client.
    ///
    /// Args:
    ///     buffers: The payload's parts, bytes-like objects.
    ///     ancdata: Ancillary data: (level, type, data) of each. None with
    ///         reply_from="listener".
    ///     flags: As for sendto().
    ///     address: As for sendto(); it can't be left out.
    ///
    /// Returns:
    ///     How many bytes were sent.
    ///
    /// Raises:
    ///     As sendto().
    #[pyo3(signature = (buffers, ancdata = None, flags = Flags::default(), address = None, /), text_signature = "($self, buffers, ancdata=(), flags=0, address=None, /)")]
    fn sendmsg(
        &self,
        py: Python<'_>,
        buffers: &Bound<'_, PyAny>,
        ancdata: Option<&Bound<'_, PyAny>>,
        flags: Flags,
        address: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<usize> {
        let address = address.ok_or_else(|| errors::os(py, Errno::DESTADDRREQ))?;
        let mut data = Vec::new();
        for (index, buffer) in buffers.try_iter()?.enumerate() {
            let part = arguments::bytes_like(&format!("buffers[{index}]"), &buffer?)?;
            data.extend_from_slice(part.as_bytes());
        }
        match ancdata {
            Some(ancdata) if ancdata.is_truthy()? => {
                self.send_message(&data, ancdata, flags, address)
            }
            _ => self.core.send(py, &data, address, flags.dontwait),
        }
    }

    /// Receives datagrams of clients, many in one call.
    ///
    /// Waits for the first as recv() does, and then takes those that are there
    /// already.
    ///
    /// Args:
    ///     n: The most datagrams to return, from 1 to 1024. After enable_gro()
    ///         what the kernel joined counts as one.
    ///
    /// Returns:
    ///     Payloads and clients' addresses in the order in which they came; at
    ///     least one.
    ///
    /// Raises:
    ///     As recv().
    #[pyo3(signature = (n, /))]
    fn recv_batch<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = batch_size)] n: usize,
    ) -> PyResult<Bound<'py, PyList>> {
        self.core.receive_batch(py, n)
    }

    /// Has the kernel join datagrams of one proxy that arrive in a row, which
    /// makes receiving bursts much cheaper (UDP_GRO of Linux).
    ///
    /// From then on only recv_batch() receives: other calls have no place for
    /// the rest of a burst, and raise.
    ///
    /// Returns:
    ///     Whether the system can.
    ///
    /// Raises:
    ///     OSError: The socket is closed.
    fn enable_gro(&self, py: Python<'_>) -> PyResult<bool> {
        self.core.enable_gro(py)
    }

    /// Sends datagrams to clients, many in one call. What goes to one client in a
    /// row leaves as a burst (UDP_SEGMENT of Linux); so does what goes to different
    /// clients through one address of a proxy that sends reply tags.
    ///
    /// Args:
    ///     datagrams: Payloads and clients' addresses, each as for sendto().
    ///
    /// Returns:
    ///     How many datagrams, from the first on, are dealt with: sent, or, without
    ///     a reply path to their client, counted in stats() and left out. Less than
    ///     all if one of the rest can't be sent; sending that again says why.
    ///
    /// Raises:
    ///     TimeoutError, BlockingIOError, OSError: As sendto(), if the first
    ///         datagram can't be sent.
    #[pyo3(signature = (datagrams, /))]
    fn send_batch(&self, datagrams: &Bound<'_, PyAny>) -> PyResult<usize> {
        self.core.send_batch(datagrams)
    }

    /// What the socket has received, dropped and sent so far.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.core.stats(py)
    }

    /// The descriptor, to wait on with select or selectors; -1 once closed. What
    /// is read from it directly has its headers.
    fn fileno<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        if callers::asked_by_socketserver(py)? {
            self.core.set_served();
        }
        self.python.bind(py).call_method0(intern!(py, "fileno"))
    }

    /// The address that the socket is bound to.
    fn getsockname<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.python.bind(py).call_method0("getsockname")
    }

    /// An OSError, ENOTCONN, as of any socket that was not connected: clients are
    /// many.
    fn getpeername(&self, py: Python<'_>) -> PyResult<()> {
        self.core.socket(py)?;
        Err(errors::os(py, Errno::NOTCONN))
    }

    /// An option's value, as socket.getsockopt().
    #[pyo3(signature = (level, optname, buflen = 0, /))]
    fn getsockopt<'py>(
        &self,
        py: Python<'py>,
        level: i32,
        optname: i32,
        buflen: i32,
    ) -> PyResult<Bound<'py, PyAny>> {
        let arguments = match buflen {
            0 => (level, optname).into_pyobject(py)?,
            _ => (level, optname, buflen).into_pyobject(py)?,
        };
        self.python.bind(py).call_method1("getsockopt", arguments)
    }

    /// Sets an option, as socket.setsockopt().
    ///
    /// Raises:
    ///     ValueError: The option is UDP_GRO, which would join datagrams.
    #[pyo3(signature = (level, optname, value, optlen = None, /))]
    fn setsockopt(
        &self,
        py: Python<'_>,
        level: i32,
        optname: i32,
        value: &Bound<'_, PyAny>,
        optlen: Option<u32>,
    ) -> PyResult<()> {
        if cfg!(target_os = "linux") && (level, optname) == UDP_GRO {
            return Err(PyValueError::new_err(
                "optname: UDP_GRO joins datagrams, each with its header; use enable_gro()",
            ));
        }
        if cfg!(target_os = "linux") && message::PACKET_INFO_OPTIONS.contains(&(level, optname)) {
            // It stays on where the socket itself needs it.
            let asked = value.extract::<i32>().is_ok_and(|value| value != 0);
            let asked = asked || !self.core.packet_info;
            self.core.packet_info_asked.store(asked, Ordering::Relaxed);
            if self.core.packet_info {
                self.core.socket(py)?;
                return Ok(());
            }
        }
        let arguments = match optlen {
            None => (level, optname, value).into_pyobject(py)?,
            Some(optlen) => (level, optname, value, optlen).into_pyobject(py)?,
        };
        self.python.bind(py).call_method1("setsockopt", arguments)?;
        Ok(())
    }

    /// Sets for how many seconds a call may wait: None for ever, 0 not at all. A
    /// receive call keeps to it however many bad datagrams come.
    #[pyo3(signature = (value, /))]
    fn settimeout(&self, py: Python<'_>, value: Option<f64>) -> PyResult<()> {
        if value.is_some_and(|seconds| seconds.is_nan() || seconds < 0.0) {
            return Err(PyValueError::new_err("Timeout value out of range"));
        }
        self.core.socket(py)?;
        self.core.set_timeout(value);
        Ok(())
    }

    /// For how many seconds a call may wait, or None.
    fn gettimeout(&self) -> Option<f64> {
        self.core.timeout()
    }

    /// For how many seconds a call may wait, or None.
    #[getter]
    fn timeout(&self) -> Option<f64> {
        self.core.timeout()
    }

    /// Whether calls may wait: settimeout(None) or settimeout(0).
    #[pyo3(signature = (flag, /))]
    fn setblocking(&self, py: Python<'_>, flag: &Bound<'_, PyAny>) -> PyResult<()> {
        self.type_asked.refuse_native_loop(py)?;
        self.settimeout(py, (!flag.is_truthy()?).then_some(0.0))
    }

    /// Whether calls may wait, for however long.
    fn getblocking(&self) -> bool {
        self.core.timeout() != Some(0.0)
    }

    /// The address family.
    #[getter]
    fn family<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.python.bind(py).getattr("family")
    }

    /// The socket type, SOCK_DGRAM.
    #[getter]
    fn r#type<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.type_asked.note(py)?;
        self.python.bind(py).getattr("type")
    }

    /// The protocol's number.
    #[getter]
    fn proto<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.python.bind(py).getattr("proto")
    }

    /// Closes the socket. A call that waits in another thread is not woken up.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.core.close();
        self.python.bind(py).call_method0("close")?;
        Ok(())
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_args))]
    fn __exit__(&self, py: Python<'_>, _args: &Bound<'_, PyTuple>) -> PyResult<()> {
        self.close(py)
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        if self.core.is_closed() {
            return Ok("<ppv2.Socket [closed]>".to_owned());
        }
        let socket = self.python.bind(py);
        let (fd, name) = (
            socket.call_method0("fileno")?,
            socket.call_method0("getsockname")?,
        );
        Ok(format!("<ppv2.Socket fd={fd}, laddr={}>", name.repr()?))
    }
}
