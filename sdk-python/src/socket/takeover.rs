//! `wrap`: takes a socket of Python's over.

use std::time::Duration;

use ppv2_sdk::{Direct, Gate, ReplyFrom};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyType};
use rustix::io::Errno;

use super::core::Core;
use super::descriptor::Descriptor;
use super::options::joins_datagrams;
use super::{Socket, errors};
use crate::arguments;
use crate::trust::{self, Limits};

/// As long as NATs keep a UDP mapping (RFC 4787, section 4.3).
const DEFAULT_FORGET_AFTER: Duration = Duration::from_secs(120);

/// Lets a UDP socket show its clients instead of the proxy in front of it.
///
/// Args:
///     sock: A bound UDP socket, IPv4 or IPv6. Its descriptor, options and
///         timeout pass to the new socket; sock itself is left closed, as after
///         detach().
///     trusted: The networks whose datagrams must carry a header, such as
///         ["192.0.2.10", "2001:db8::/64"], as text or objects of ipaddress.
///         Whoever sits in one can speak for any client, so name the proxies
///         alone.
///     direct: What to do with a datagram from elsewhere: "drop" it, or "accept"
///         it as one of a client that is not behind a proxy, payload untouched.
///     reply_from: Where replies to clients behind a proxy leave from: "proxy"
///         sends them through it, "listener" straight to the client from the
///         address that it wrote to, for a proxy with mode = "dsr" and
///         rewrite_on = "sdk". This host must be let send from there: the address
///         is one of its own, or an IPv6 one (Linux), or the process has
///         CAP_NET_RAW (Linux).
///     max_header_len: The longest header to accept, in bytes, at least 28.
///     max_clients: How many clients are remembered, at about 1 kB each. A new
///         one then takes the place of the one longest unheard-of.
///     forget_after: For how many seconds after its latest datagram a client can
///         be sent to.
///
/// Returns:
///     The socket to use instead.
///
/// Raises:
///     ValueError: A network or another argument is not what is described
///         above, or nothing could ever be received.
///     TypeError: An argument is of another type.
///     OSError: The socket is closed, or there are no descriptors left.
#[pyfunction]
#[pyo3(
    signature = (
        sock, *, trusted, direct = Direct::Drop, reply_from = ReplyFrom::Proxy,
        max_header_len = 512, max_clients = 65_536, forget_after = DEFAULT_FORGET_AFTER
    ),
    text_signature = "(sock, *, trusted, direct='drop', reply_from='proxy', max_header_len=512, \
                      max_clients=65536, forget_after=120.0)"
)]
pub(crate) fn wrap<'py>(
    sock: &Bound<'py, PyAny>,
    trusted: &Bound<'py, PyAny>,
    #[pyo3(from_py_with = trust::direct_policy)] direct: Direct,
    #[pyo3(from_py_with = trust::reply_from)] reply_from: ReplyFrom,
    #[pyo3(from_py_with = arguments::max_header_len)] max_header_len: usize,
    #[pyo3(from_py_with = trust::max_clients)] max_clients: usize,
    #[pyo3(from_py_with = trust::forget_after)] forget_after: Duration,
) -> PyResult<Socket> {
    check_is_udp(sock)?;
    let limits = Limits {
        max_header_len,
        max_clients,
        forget_after,
    };
    let trust = trust::trust(trusted, direct, reply_from, &limits)?;
    let gate = Gate::new(trust).map_err(trust::refused)?;
    let timeout: Option<f64> = sock.call_method0("gettimeout")?.extract()?;
    let python = take_over(sock)?;
    let descriptor = Descriptor::of(&python)?;
    let core = Core::new(gate, &limits, descriptor);
    let socket = Socket {
        python: python.unbind(),
        core,
    };
    socket.set_timeout(sock.py(), timeout)?;
    if joins_datagrams(socket.python.bind(sock.py()))? {
        socket.core.set_joined();
    }
    Ok(socket)
}

fn check_is_udp(sock: &Bound<'_, PyAny>) -> PyResult<()> {
    const EXPECTED: &str = "an open UDP socket, IPv4 or IPv6";
    let py = sock.py();
    static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    if !sock.is_instance(CLASS.import(py, "socket", "socket")?)? {
        return Err(arguments::type_error("sock", EXPECTED, sock));
    }
    let module = py.import("socket")?;
    let family = sock.getattr("family")?;
    let is_ip = family.eq(module.getattr("AF_INET")?)? || family.eq(module.getattr("AF_INET6")?)?;
    if is_ip && sock.getattr("type")?.eq(module.getattr("SOCK_DGRAM")?)? {
        return Ok(());
    }
    Err(arguments::value_error("sock", EXPECTED, sock))
}

/// A `socket.socket` of our own for the descriptor of `sock`, which is left
/// closed, so that nobody reads headers from it by oversight.
fn take_over<'py>(sock: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let py = sock.py();
    let arguments = (
        sock.getattr("family")?,
        sock.getattr("type")?,
        sock.getattr("proto")?,
    );
    if sock.call_method0("fileno")?.extract::<i64>()? < 0 {
        return Err(errors::os(py, Errno::BADF));
    }
    let descriptor = PyDict::new(py);
    descriptor.set_item("fileno", sock.call_method0("detach")?)?;
    py.import("socket")?
        .getattr("socket")?
        .call(arguments, Some(&descriptor))
}
