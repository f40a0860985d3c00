//! What goes wrong with a socket, as Python's exceptions.

use std::io;

use ppv2_sdk::ReplyTooLong;
use pyo3::exceptions::{PyOSError, PyTimeoutError};
use pyo3::prelude::*;
use rustix::io::Errno;

mod exceptions {
    pyo3::import_exception!(ppv2, NoReplyPathError);
}

/// Why a call has nothing to return.
pub(crate) enum Failure {
    /// The socket's timeout passed.
    TimedOut,
    Io(io::Error),
    /// What a signal's handler raised, for example.
    Python(PyErr),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Errno> for Failure {
    fn from(error: Errno) -> Self {
        Self::Io(error.into())
    }
}

impl From<PyErr> for Failure {
    fn from(error: PyErr) -> Self {
        Self::Python(error)
    }
}

impl Failure {
    /// What the methods of a socket raise.
    pub(crate) fn into_py(self, py: Python<'_>) -> PyErr {
        let error = match self {
            // Without a number, as the socket module raises it.
            Self::TimedOut => return PyTimeoutError::new_err("timed out"),
            Self::Python(error) => return error,
            Self::Io(error) => error,
        };
        if let Some(number) = Errno::from_io_error(&error) {
            return os(py, number);
        }
        // What the Rust SDK says itself: that a call would wait, that there is no reply
        // path, or why it can't send from a listener's address.
        let (name, words) = (errno_of(&error), error.to_string());
        let number = py
            .import("errno")
            .and_then(|errno| errno.getattr(name)?.extract::<i32>());
        match (number, error.kind()) {
            (Err(error), _) => error,
            (Ok(number), io::ErrorKind::WouldBlock) => os(py, Errno::from_raw_os_error(number)),
            (Ok(number), io::ErrorKind::NotConnected) => {
                exceptions::NoReplyPathError::new_err((number, words))
            }
            (Ok(number), _) => PyOSError::new_err((number, words)),
        }
    }
}

/// The name in Python's module `errno` that is nearest to an error of the Rust SDK.
fn errno_of(error: &io::Error) -> &'static str {
    if error
        .get_ref()
        .is_some_and(|inner| inner.is::<ReplyTooLong>())
    {
        return "EMSGSIZE";
    }
    let names = [
        (io::ErrorKind::WouldBlock, "EAGAIN"),
        (io::ErrorKind::NotConnected, "ENOTCONN"),
        (io::ErrorKind::AddrInUse, "EADDRINUSE"),
        (io::ErrorKind::AddrNotAvailable, "EADDRNOTAVAIL"),
        (io::ErrorKind::PermissionDenied, "EACCES"),
    ];
    let found = names.into_iter().find(|(known, _)| *known == error.kind());
    found.map_or("EINVAL", |(_, name)| name)
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

/// Whether `error` is only the echo of a datagram sent earlier: some host on the
/// path answered it with an ICMP message. It says nothing of this socket, and
/// anybody could provoke it.
pub(crate) fn is_echo_of_earlier_send(error: Errno) -> bool {
    [
        Errno::CONNREFUSED,
        Errno::CONNRESET,
        Errno::HOSTUNREACH,
        Errno::NETUNREACH,
    ]
    .contains(&error)
}
