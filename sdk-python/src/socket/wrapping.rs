//! `wrap`: takes a socket of Python's over.

use std::time::Duration;

use ppv2_sdk::{Demux, Format, HeaderAlone, ReplyFrom, Untrusted};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use rustix::io::Errno;

use super::addresses::{Form, from_python};
use super::core::Core;
use super::{Socket, callers, errors, message};
use crate::arguments;
use crate::trust::{self, Families, Headers, Limits};

/// As long as NATs keep a UDP mapping (RFC 4787, section 4.3).
const DEFAULT_FORGET_AFTER: Duration = Duration::from_secs(120);

/// At 100 bytes each, 10 MB.
const DEFAULT_MAX_SENDERS: usize = 100_000;

/// Lets a UDP socket show its clients instead of the proxy in front of it.
///
/// Args:
///     sock: A bound UDP socket, IPv4 or IPv6. Its descriptor, options and
///         timeout pass to the new socket; sock itself is left closed, as after
///         detach().
///     trusted: The networks whose datagrams must carry a header, such as
///         ["192.0.2.10", "2001:db8::/64"], as text or objects of ipaddress.
///         A host in one of them can speak for any client, so name only the
///         proxies.
///     formats: How trusted senders may write headers: "v2" (PROXY protocol v2), "spp"
///         (Simple Proxy Protocol of Cloudflare Spectrum and Tencent EdgeOne, whose
///         replies get the same header in front), or both. One must be there: the
///         first bytes only tell which it is.
///     untrusted: What to do with a datagram from elsewhere: "drop" it, or "accept"
///         it as one of a client that is not behind a proxy, payload untouched.
///     reply_from: Where replies to clients behind a proxy leave from: "proxy"
///         sends them through it, "listener" straight to the client from the
///         address that it wrote to, for a proxy with mode = "dsr" and
///         rewrite_on = "sdk". This host needs the right to send from there: the
///         address is one of its own, or an IPv6 one (Linux), or the process has
///         CAP_NET_RAW (Linux).
///     max_header_len: The longest PROXY v2 header to accept, in bytes, at least 28.
///     max_clients: How many clients are remembered, at about 1 kB each. Beyond
///         that a new one replaces the one that has been silent for longest.
///     forget_after: For how many seconds after its latest datagram a client can
///         be sent to.
///     remember_senders: For how many seconds after a sender's latest datagram its
///         datagrams without header belong to the client that its latest header
///         named; None for senders that put a header in front of each. nginx, frp,
///         Cloudflare Spectrum and emit = "first" of ppv2-proxy say it once. That
///         is outside the specification. A port that a sender uses again can be
///         taken for the client that was there before, and a client whose datagrams
///         pass without header can write one of its own. So use it for senders that
///         drop such datagrams, or clients that don't forge, and set it above the time
///         for which the sender keeps a silent session, below that after which it uses
///         a port again. Not with formats "spp".
///     max_senders: How many senders are remembered, at about 100 bytes each. Beyond
///         that those remembered stay, and new ones need a header in each datagram.
///     header_alone: What a header without payload is while remember_senders is
///         set: "announce" takes it for the name of the client alone, "deliver" for
///         an empty datagram as well.
///
/// Returns:
///     The socket to use instead.
///
/// Raises:
///     ValueError: A network or another argument is not what is described
///         above, or nothing could ever be received: sock is not bound, or
///         none of the networks is of its family.
///     TypeError: An argument is of another type; sock is one of gevent's.
///     OSError: The socket is closed, or there are no descriptors left.
#[pyfunction]
#[pyo3(
    signature = (
        sock, *, trusted, formats = vec![Format::V2], untrusted = Untrusted::Drop,
        reply_from = ReplyFrom::Proxy, max_header_len = 512, max_clients = 65_536,
        forget_after = DEFAULT_FORGET_AFTER, remember_senders = None,
        max_senders = DEFAULT_MAX_SENDERS, header_alone = HeaderAlone::Announce
    ),
    text_signature = "(sock, *, trusted, formats=['v2'], untrusted='drop', reply_from='proxy', \
                      max_header_len=512, max_clients=65536, forget_after=120.0, \
                      remember_senders=None, max_senders=100000, header_alone='announce')"
)]
#[expect(
    clippy::too_many_arguments,
    reason = "they are the arguments of the Python function"
)]
pub(crate) fn wrap<'py>(
    sock: &Bound<'py, PyAny>,
    trusted: &Bound<'py, PyAny>,
    #[pyo3(from_py_with = trust::formats)] formats: Vec<Format>,
    #[pyo3(from_py_with = trust::untrusted)] untrusted: Untrusted,
    #[pyo3(from_py_with = trust::reply_from)] reply_from: ReplyFrom,
    #[pyo3(from_py_with = arguments::max_header_len)] max_header_len: usize,
    #[pyo3(from_py_with = trust::max_clients)] max_clients: usize,
    #[pyo3(from_py_with = trust::forget_after)] forget_after: Duration,
    #[pyo3(from_py_with = trust::remember_senders)] remember_senders: Option<Duration>,
    #[pyo3(from_py_with = trust::max_senders)] max_senders: usize,
    #[pyo3(from_py_with = trust::header_alone)] header_alone: HeaderAlone,
) -> PyResult<Socket> {
    let class = check_is_udp(sock)?;
    let limits = Limits {
        max_header_len,
        max_clients,
        forget_after,
    };
    let headers = Headers {
        formats,
        remember: remember_senders.map(|idle| (idle, max_senders)),
        header_alone,
    };
    let networks = trust::networks(trusted)?;
    let trusted_families = trust::families(&networks);
    let trust = trust::trust(networks, headers, untrusted, reply_from, &limits)?;
    let (form, local) = check_can_receive(sock, trusted_families, untrusted)?;
    let timeout: Option<f64> = sock.call_method0("gettimeout")?.extract()?;
    let asked = asks_for_packet_info(sock);
    let python = take_over(sock, &class)?;
    // This socket waits by itself, so that it can look at signals and timeouts.
    python.call_method1("setblocking", (false,))?;
    let core = Core::new(Demux::new(trust), &limits, form, &python, local, asked)?;
    core.set_timeout(timeout);
    Ok(Socket {
        python: python.unbind(),
        core,
        type_asked: callers::Caller::default(),
    })
}

/// Whether the application has asked for the addresses that datagrams are sent to.
fn asks_for_packet_info(sock: &Bound<'_, PyAny>) -> bool {
    cfg!(target_os = "linux")
        && message::PACKET_INFO_OPTIONS.into_iter().any(|option| {
            let value = sock.call_method1("getsockopt", option);
            value.is_ok_and(|value| value.is_truthy().unwrap_or(false))
        })
}

/// The class `socket.socket` of the standard library, of which `sock` is. It is
/// found by its name: gevent and eventlet put another one in its place.
fn check_is_udp<'py>(sock: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    const EXPECTED: &str = "an open UDP socket, IPv4 or IPv6";
    let py = sock.py();
    let names = |class: &Bound<'py, PyAny>| -> PyResult<(String, String)> {
        let name = class.getattr("__name__")?.extract()?;
        Ok((class.getattr("__module__")?.extract()?, name))
    };
    let mut found = None;
    for class in sock.get_type().mro() {
        let (module, name) = names(&class)?;
        let instead = match module.split('.').next() {
            Some("gevent") => "call ppv2.gevent.wrap(sock, trusted=[...])",
            Some("eventlet") => "make sock with the class of eventlet.patcher.original('socket')",
            _ => "",
        };
        if !instead.is_empty() {
            return Err(PyTypeError::new_err(format!(
                "sock: {module}.{name} lets other greenlets run while it waits, which \
                 ppv2.Socket can't; {instead}"
            )));
        }
        if (module.as_str(), name.as_str()) == ("socket", "socket") {
            found = Some(class);
            break;
        }
    }
    let Some(class) = found else {
        return Err(arguments::type_error("sock", EXPECTED, sock));
    };
    let module = py.import("socket")?;
    let family = sock.getattr("family")?;
    let is_ip = family.eq(module.getattr("AF_INET")?)? || family.eq(module.getattr("AF_INET6")?)?;
    if is_ip && sock.getattr("type")?.eq(module.getattr("SOCK_DGRAM")?)? {
        return Ok(class);
    }
    Err(arguments::value_error("sock", EXPECTED, sock))
}

/// A `socket.socket` of our own for the descriptor of `sock`, which is left
/// closed, so that nobody reads headers from it by oversight.
fn take_over<'py>(
    sock: &Bound<'py, PyAny>,
    class: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = sock.py();
    let arguments = (
        sock.getattr("family")?,
        sock.getattr("type")?,
        sock.getattr("proto")?,
    );
    let descriptor = PyDict::new(py);
    descriptor.set_item("fileno", sock.call_method0("detach")?)?;
    class.call(arguments, Some(&descriptor))
}

/// An error if no datagram of a proxy can reach `sock`; the form of its addresses.
fn check_can_receive(
    sock: &Bound<'_, PyAny>,
    trusted: Families,
    untrusted: Untrusted,
) -> PyResult<(Form, std::net::SocketAddr)> {
    let py = sock.py();
    if sock.call_method0("fileno")?.extract::<i64>()? < 0 {
        return Err(errors::os(py, Errno::BADF));
    }
    let local = from_python("sock", &sock.call_method0("getsockname")?)?;
    if local.port() == 0 {
        return Err(PyValueError::new_err(
            "sock: it is not bound, so that nothing could be received; call \
             sock.bind((host, port)) first",
        ));
    }
    let module = py.import("socket")?;
    let form = if local.is_ipv4() {
        Form::Pair
    } else {
        Form::Mapped
    };
    let (v4, v6) = match local.ip() {
        std::net::IpAddr::V4(_) => (true, false),
        std::net::IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some() => (true, false),
        std::net::IpAddr::V6(ip) if ip.is_unspecified() => {
            let option = (
                module.getattr("IPPROTO_IPV6")?,
                module.getattr("IPV6_V6ONLY")?,
            );
            (!sock.call_method1("getsockopt", option)?.is_truthy()?, true)
        }
        std::net::IpAddr::V6(_) => (false, true),
    };
    let reached = (v4 && trusted.v4) || (v6 && trusted.v6);
    if reached || untrusted == Untrusted::Accept {
        return Ok((form, local));
    }
    let (ours, theirs) = if v4 {
        ("IPv4", "IPv6")
    } else {
        ("IPv6", "IPv4")
    };
    Err(PyValueError::new_err(format!(
        "trusted: it names {theirs} networks alone, and the socket bound to {local} receives \
         {ours} alone, so that nothing could be received; name the proxy's {ours} address, or \
         bind a socket to an {theirs} address"
    )))
}
