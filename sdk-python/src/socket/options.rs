//! Options and the timeout, most of which Python's own socket keeps.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::Socket;

/// Of udp(7).
const SOL_UDP: i32 = 17;
const UDP_GRO: i32 = 104;

/// Whether somebody has had the kernel join datagrams of `socket`, a
/// `socket.socket`.
pub(super) fn joins_datagrams(socket: &Bound<'_, PyAny>) -> PyResult<bool> {
    if !cfg!(target_os = "linux") {
        return Ok(false);
    }
    match socket.call_method1("getsockopt", (SOL_UDP, UDP_GRO)) {
        Ok(value) => value.is_truthy(),
        // A kernel that has no such option.
        Err(_) => Ok(false),
    }
}

impl Socket {
    pub(super) fn option<'py>(
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

    pub(super) fn set_option(
        &self,
        py: Python<'_>,
        level: i32,
        optname: i32,
        value: &Bound<'_, PyAny>,
        optlen: Option<u32>,
    ) -> PyResult<()> {
        if cfg!(target_os = "linux") && (level, optname) == (SOL_UDP, UDP_GRO) {
            return Err(PyValueError::new_err(
                "optname: UDP_GRO joins datagrams, each with its header; use enable_gro()",
            ));
        }
        #[cfg(target_os = "linux")]
        if super::packet_info::OPTIONS.contains(&(level, optname)) {
            // It stays on where the socket itself needs it.
            let descriptor = self.core.descriptor(py)?;
            let asked = value.extract::<i32>().is_ok_and(|value| value != 0);
            descriptor.ask_for_packet_info(asked || !descriptor.packet_info());
            if descriptor.packet_info() {
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

    pub(super) fn set_timeout(&self, py: Python<'_>, seconds: Option<f64>) -> PyResult<()> {
        if seconds.is_some_and(|seconds| seconds.is_nan() || seconds < 0.0) {
            return Err(PyValueError::new_err("Timeout value out of range"));
        }
        // The descriptor waits only where nothing bounds the time.
        self.python
            .bind(py)
            .call_method1("setblocking", (seconds.is_none(),))?;
        self.core.set_timeout(seconds);
        Ok(())
    }

    pub(super) fn describe(&self, py: Python<'_>) -> PyResult<String> {
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
