//! Who calls a method, which tells what happens to the descriptor next.

use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

/// The frame of Python code that runs; `None` if there is none.
fn frame(py: Python<'_>) -> PyResult<Option<Bound<'_, PyAny>>> {
    Ok(py.import("sys")?.call_method0("_getframe").ok())
}

/// Whether a method of `socketserver` is the caller: its servers ask for the
/// descriptor once, and wait for it with a selector.
pub(super) fn asked_by_socketserver(py: Python<'_>) -> PyResult<bool> {
    let Some(frame) = frame(py)? else {
        return Ok(false);
    };
    let name = frame.getattr("f_globals")?.get_item("__name__");
    Ok(name.is_ok_and(|name| {
        name.extract::<String>()
            .is_ok_and(|name| name == "socketserver")
    }))
}

/// The instruction of Python code that a call came from: of which frame, and where
/// in it. Two calls from one instruction were made by one native function.
type Instruction = (usize, i64);

fn instruction(py: Python<'_>) -> PyResult<Option<Instruction>> {
    let Some(frame) = frame(py)? else {
        return Ok(None);
    };
    let at = frame.getattr("f_lasti")?.extract()?;
    Ok(Some((frame.as_ptr() as usize, at)))
}

/// Who asked last for the type of a socket.
#[derive(Default)]
pub(super) struct Caller(Mutex<Option<Instruction>>);

impl Caller {
    /// Notes that the type is being asked for.
    pub(super) fn note(&self, py: Python<'_>) -> PyResult<()> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = instruction(py)?;
        Ok(())
    }

    /// An error if the one who asked for the type, and now makes the socket
    /// non-blocking, is an event loop in native code: its
    /// `create_datagram_endpoint(sock=…)` takes the descriptor next, and reads
    /// headers from it.
    pub(super) fn refuse_native_loop(&self, py: Python<'_>) -> PyResult<()> {
        let asked = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if asked.is_none() || asked != instruction(py)? {
            return Ok(());
        }
        let asyncio = py.import("asyncio")?;
        let running = asyncio.call_method0("_get_running_loop")?;
        if running.is_none() || running.is_instance(&asyncio.getattr("BaseEventLoop")?)? {
            return Ok(());
        }
        let class = running.get_type();
        let (module, name) = (class.module()?, class.name()?);
        Err(PyTypeError::new_err(format!(
            "sock: {module}.{name} reads its descriptor past ppv2.Socket, and would hand \
             headers and the proxy's address to the protocol; call \
             ppv2.asyncio.create_datagram_endpoint(..., sock=sock, trusted=[...]) with the \
             socket as it is before ppv2.wrap()"
        )))
    }
}
