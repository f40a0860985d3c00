//! Addresses of the `socket` module to and fro.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyString, PyTuple, PyType};

use super::ways::Way;
use crate::arguments;

/// The class of the addresses that a socket reports.
fn class(py: Python<'_>) -> PyResult<&Bound<'_, PyType>> {
    static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    CLASS.import(py, "ppv2._types", "ClientAddress")
}

/// The address of a client, with the way to it attached.
pub(crate) fn client_address<'py>(
    py: Python<'py>,
    client: SocketAddr,
    form: Form,
    way: &Py<Way>,
) -> PyResult<Bound<'py, PyAny>> {
    let address = class(py)?.call1((in_form(py, client, form)?,))?;
    address.setattr(pyo3::intern!(py, "_way"), way)?;
    Ok(address)
}

/// The way that an address object carries; `None` for an ordinary tuple.
pub(crate) fn way_of<'py>(address: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, Way>>> {
    let py = address.py();
    if !address.get_type().is(class(py)?) {
        return Ok(None);
    }
    let way = address.getattr(pyo3::intern!(py, "_way"))?;
    Ok(Some(way.cast_into()?))
}

/// An address as the `socket` module has it.
pub(crate) fn to_python(py: Python<'_>, address: SocketAddr) -> PyResult<Bound<'_, PyTuple>> {
    let host = PyString::new(py, &address.ip().to_string());
    match address {
        SocketAddr::V4(_) => (host, address.port()).into_pyobject(py),
        SocketAddr::V6(v6) => (host, v6.port(), v6.flowinfo(), v6.scope_id()).into_pyobject(py),
    }
}

/// The form of the addresses that a socket reports, by its family as in the
/// `socket` module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Of an AF_INET socket: (host, port). So is an IPv6 client's, which only a
    /// header can name.
    Pair,
    /// Of an AF_INET6 socket: (host, port, flowinfo, scope_id), an IPv4 address in
    /// IPv6 form.
    Mapped,
}

/// An address as a socket of that form reports it.
pub(crate) fn in_form(
    py: Python<'_>,
    address: SocketAddr,
    form: Form,
) -> PyResult<Bound<'_, PyTuple>> {
    match (form, address) {
        (Form::Pair, SocketAddr::V6(v6)) => {
            let host = PyString::new(py, &v6.ip().to_string());
            (host, v6.port()).into_pyobject(py)
        }
        (Form::Mapped, SocketAddr::V4(v4)) => {
            to_python(py, (v4.ip().to_ipv6_mapped(), v4.port()).into())
        }
        (Form::Pair, SocketAddr::V4(_)) | (Form::Mapped, SocketAddr::V6(_)) => {
            to_python(py, address)
        }
    }
}

/// An address that Python passes or a socket of Python's reports: host must be
/// an IP address. The scope stays, since it is a part of a direct client's
/// address.
pub(crate) fn from_python(name: &str, value: &Bound<'_, PyAny>) -> PyResult<SocketAddr> {
    let address = arguments::socket_address(name, value)?;
    let tuple = value.cast::<PyTuple>()?;
    let scope: u32 = match tuple.len() {
        4 => tuple.get_item(3)?.extract()?,
        _ => 0,
    };
    match address.ip() {
        IpAddr::V6(ip) => Ok(scoped(ip, address.port(), scope)),
        IpAddr::V4(_) => Ok(address),
    }
}

fn scoped(ip: Ipv6Addr, port: u16, scope: u32) -> SocketAddr {
    SocketAddrV6::new(ip, port, 0, scope).into()
}
