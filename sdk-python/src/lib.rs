//! `ppv2._native`: the codec of [`ppv2`] for Python.
//!
//! This crate converts: arguments of Python's into Rust's, headers into frozen
//! Python objects, errors into exceptions. What a header may look like is the
//! business of the `ppv2` crate alone. Enums, exceptions and named tuples are
//! written in Python, in `ppv2/_types.py`, where they can be ordinary ones.

#![forbid(unsafe_code)]

mod arguments;
mod classes;
mod codec;
mod header;
mod ssl;

#[pyo3::pymodule]
mod _native {
    #[pymodule_export]
    use super::codec::{decode, encode, encode_local};
    #[pymodule_export]
    use super::header::{Header, header_of};
    #[pymodule_export]
    use super::ssl::{Ssl, ssl_of};

    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
