//! The arguments of the socket's methods: flags, sizes, and buffers to write to.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView, PySlice};

use crate::arguments;

/// Flags of a call. Those that let it see other datagrams than the next one, or
/// parts of them, would need a rule for headers; none is widely used.
#[derive(Clone, Copy, Default)]
pub(crate) struct Flags {
    pub(crate) dontwait: bool,
}

#[cfg(not(windows))]
const MSG_DONTWAIT: u32 = rustix::net::RecvFlags::DONTWAIT.bits();
/// Linux's number, for our own calls: Windows has no such flag.
#[cfg(windows)]
const MSG_DONTWAIT: u32 = 0x40;

impl<'py> FromPyObject<'_, 'py> for Flags {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        const EXPECTED: &str = "0 or MSG_DONTWAIT";
        let value = value.to_owned();
        match arguments::integer("flags", EXPECTED, 0..=u32::MAX, &value)? {
            0 => Ok(Self { dontwait: false }),
            MSG_DONTWAIT => Ok(Self { dontwait: true }),
            _ => Err(arguments::value_error("flags", EXPECTED, &value)),
        }
    }
}

impl Flags {
    /// As the socket module has them.
    pub(crate) fn bits(self) -> u32 {
        if self.dontwait { MSG_DONTWAIT } else { 0 }
    }
}

pub(crate) fn bufsize(value: &Bound<'_, PyAny>) -> PyResult<usize> {
    let most = isize::MAX.unsigned_abs();
    arguments::integer("bufsize", "a number of bytes", 0..=most, value)
}

/// As many datagrams as the kernel takes in one call.
pub(crate) fn batch_size(value: &Bound<'_, PyAny>) -> PyResult<usize> {
    arguments::integer("n", "a number of datagrams from 1 to 1024", 1..=1024, value)
}

/// A buffer of Python's that can be written to, as a memoryview of bytes.
pub(crate) struct Writable<'py> {
    view: Bound<'py, PyAny>,
    pub(crate) len: usize,
}

pub(crate) fn writable<'py>(value: &Bound<'py, PyAny>) -> PyResult<Writable<'py>> {
    const EXPECTED: &str = "a writable, contiguous bytes-like object";
    let wrong = |_| arguments::type_error("buffer", EXPECTED, value);
    let view = PyMemoryView::from(value).map_err(wrong)?;
    let view = view.call_method1("cast", ("B",)).map_err(wrong)?;
    if view.getattr("readonly")?.is_truthy()? {
        return Err(arguments::type_error("buffer", EXPECTED, value));
    }
    let len = view.len()?;
    Ok(Writable { view, len })
}

impl Writable<'_> {
    /// How many bytes to write at most, when `nbytes` are asked for; 0 means all.
    pub(crate) fn room(&self, nbytes: usize) -> PyResult<usize> {
        match nbytes {
            0 => Ok(self.len),
            nbytes if nbytes <= self.len => Ok(nbytes),
            _ => Err(PyValueError::new_err(format!(
                "nbytes: expected at most the buffer's length, {}, got {nbytes}",
                self.len
            ))),
        }
    }

    /// Writes `payload`, which fits, to the front.
    pub(crate) fn write(&self, payload: &[u8]) -> PyResult<usize> {
        let py = self.view.py();
        let end = payload.len().try_into()?;
        let front = PySlice::new(py, 0, end, 1);
        self.view.set_item(front, PyBytes::new(py, payload))?;
        Ok(payload.len())
    }
}

pub(crate) fn clipped(payload: &[u8], len: usize) -> &[u8] {
    payload.get(..len).unwrap_or(payload)
}
