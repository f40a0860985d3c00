//! What goes wrong with a socket, as Python's exceptions.

use std::net::SocketAddr;
use std::time::Duration;

use pyo3::exceptions::{PyOSError, PyTimeoutError};
use pyo3::prelude::*;
use rustix::io::Errno;

use super::descriptor::Failure;

mod exceptions {
    pyo3::import_exception!(ppv2, NoRouteError);
}

/// What the methods of a socket raise.
pub(crate) fn failure(py: Python<'_>, failure: Failure) -> PyErr {
    match failure {
        Failure::WouldBlock => os(py, Errno::AGAIN),
        // Without a number, as the socket module raises it.
        Failure::TimedOut => PyTimeoutError::new_err("timed out"),
        Failure::Interrupted => os(py, Errno::INTR),
        Failure::Os(error) => os(py, error),
        Failure::Explained(error, words) => PyOSError::new_err((error.raw_os_error(), words)),
    }
}

/// The subclass of `OSError` for a number, with the words for it.
pub(crate) fn os(py: Python<'_>, error: Errno) -> PyErr {
    let number = error.raw_os_error();
    let words = py
        .import("os")
        .and_then(|os| os.call_method1("strerror", (number,))?.extract::<String>());
    match words {
        Ok(words) => PyOSError::new_err((number, words)),
        Err(error) => error,
    }
}

/// The number that an exception carries, if it is an `OSError` with one.
pub(crate) fn number(py: Python<'_>, error: &PyErr) -> Option<Errno> {
    if !error.is_instance_of::<PyOSError>(py) {
        return None;
    }
    let number = error.value(py).getattr("errno").ok()?.extract().ok()?;
    Some(Errno::from_raw_os_error(number))
}

/// A call that would take a burst for one datagram.
pub(crate) fn joined(py: Python<'_>) -> PyErr {
    with_number(
        py,
        "EINVAL",
        "the socket has GRO enabled, so that its datagrams arrive in bursts; receive with \
         recv_batch(), or leave GRO off"
            .to_owned(),
        PyOSError::new_err,
    )
}

fn with_number(
    py: Python<'_>,
    name: &str,
    words: String,
    exception: impl FnOnce((i32, String)) -> PyErr,
) -> PyErr {
    let number = py
        .import("errno")
        .and_then(|errno| errno.getattr(name)?.extract::<i32>());
    match number {
        Ok(number) => exception((number, words)),
        Err(error) => error,
    }
}

/// Nobody knows where a reply to this client would have to go.
pub(crate) fn no_route(py: Python<'_>, client: SocketAddr, forget_after: Duration) -> PyErr {
    let seconds = forget_after.as_secs_f64();
    let words = format!(
        "no way to client {client}: not heard from in the last {seconds}s, or forgotten for \
         newer clients, or silent for 10 s while the proxy's address has come to serve another \
         client; answer sooner, or raise forget_after or max_clients"
    );
    with_number(py, "ENOTCONN", words, exceptions::NoRouteError::new_err)
}
