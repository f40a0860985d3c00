//! `ppv2._native`: the codec of [`ppv2`] and the sockets of [`ppv2_sdk`] for Python.
//!
//! This crate converts: arguments of Python's into Rust's, headers into frozen
//! Python objects, errors into exceptions. What a header may look like is the
//! business of the `ppv2` crate alone, and whose a datagram is that of
//! `ppv2_sdk`. Enums, exceptions and named tuples are written in Python, in
//! `ppv2/_types.py`, where they can be ordinary ones.

mod arguments;
mod classes;
mod codec;
mod header;
mod socket;
mod ssl;
mod trust;

// Nothing in here counts on the interpreter's lock: what threads share stands
// behind locks of its own.
#[pyo3::pymodule(gil_used = false)]
mod _native {
    #[pymodule_export]
    use super::codec::{decode, encode, encode_local};
    #[pymodule_export]
    use super::header::{Header, header_of};
    #[pymodule_export]
    use super::socket::{FlowPath, Socket, wrap};
    #[pymodule_export]
    use super::ssl::{Ssl, ssl_of};

    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
