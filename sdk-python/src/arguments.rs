//! What Python passes, checked and converted. Every error names the argument,
//! what was expected and what came: `TypeError` for another type, `ValueError`
//! for a value out of range.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;

use ppv2::{DEFAULT_MAX_HEADER_LEN, FIXED_LEN, Transport};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyMemoryView, PyString, PyTuple};

/// Bytes of a UNIX socket's path in a header, NUL padding included.
pub(crate) const UNIX_PATH_LEN: usize = 108;

// The signature of `decode` spells the number out, for `help()` to show it.
const _: () = assert!(DEFAULT_MAX_HEADER_LEN == 512);

/// What `transport` names: which addresses the header has, and over what the
/// client came.
#[derive(Clone, Copy)]
pub(crate) enum Over {
    Ip(Transport),
    Unix(Transport),
}

pub(crate) fn transport(value: &Bound<'_, PyAny>) -> PyResult<Over> {
    const EXPECTED: &str = "'udp', 'tcp', 'unix-datagram' or 'unix-stream'";
    let name = value
        .cast::<PyString>()
        .map_err(|_| type_error("transport", EXPECTED, value))?;
    match name.to_cow()?.as_ref() {
        "udp" => Ok(Over::Ip(Transport::Datagram)),
        "tcp" => Ok(Over::Ip(Transport::Stream)),
        "unix-datagram" => Ok(Over::Unix(Transport::Datagram)),
        "unix-stream" => Ok(Over::Unix(Transport::Stream)),
        _ => Err(value_error("transport", EXPECTED, value)),
    }
}

/// Any bytes-like object. Other than `bytes` itself it is copied, since another
/// thread may write to it while it is being read.
pub(crate) fn bytes_like<'py>(
    name: &str,
    value: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyBytes>> {
    if let Ok(bytes) = value.cast::<PyBytes>() {
        return Ok(bytes.clone());
    }
    let view =
        PyMemoryView::from(value).map_err(|_| type_error(name, "a bytes-like object", value))?;
    Ok(view
        .call_method0(pyo3::intern!(value.py(), "tobytes"))?
        .cast_into()?)
}

pub(crate) fn max_header_len(value: &Bound<'_, PyAny>) -> PyResult<usize> {
    let longest = isize::MAX.unsigned_abs();
    let expected = "a number of bytes, at least 16";
    integer("max_header_len", expected, FIXED_LEN..=longest, value)
}

pub(crate) fn crc32c(value: &Bound<'_, PyAny>) -> PyResult<bool> {
    match value.cast::<PyBool>() {
        Ok(value) => Ok(value.is_true()),
        Err(_) => Err(type_error("crc32c", "a bool", value)),
    }
}

/// TLVs to write: types and values.
pub(crate) type TlvList<'py> = Vec<(u8, Bound<'py, PyBytes>)>;

pub(crate) fn tlvs<'py>(value: &Bound<'py, PyAny>) -> PyResult<TlvList<'py>> {
    let items = value
        .try_iter()
        .map_err(|_| type_error("tlvs", "an iterable of (type, value) pairs", value))?;
    let mut tlvs = Vec::new();
    for (index, item) in items.enumerate() {
        tlvs.push(tlv(&format!("tlvs[{index}]"), &item?)?);
    }
    Ok(tlvs)
}

fn tlv<'py>(name: &str, item: &Bound<'py, PyAny>) -> PyResult<(u8, Bound<'py, PyBytes>)> {
    let (kind, value): (Bound<'_, PyAny>, Bound<'_, PyAny>) = item
        .cast::<PyTuple>()
        .map_err(PyErr::from)
        .and_then(|pair| pair.extract())
        .map_err(|_| type_error(name, "a (type, value) pair", item))?;
    Ok((
        tlv_type(&format!("{name}[0]"), &kind)?,
        bytes_like(&format!("{name}[1]"), &value)?,
    ))
}

pub(crate) fn tlv_type(name: &str, value: &Bound<'_, PyAny>) -> PyResult<u8> {
    integer(name, "a TLV type from 0 to 255", 0..=255, value)
}

/// An address of Python's `socket` module: `(host, port)` for both families, or
/// with flow label and scope behind for IPv6, for which a header has no place.
pub(crate) fn socket_address(name: &str, value: &Bound<'_, PyAny>) -> PyResult<SocketAddr> {
    const EXPECTED: &str = "a tuple (host, port) or (host, port, flowinfo, scope_id)";
    let address = value
        .cast::<PyTuple>()
        .map_err(|_| type_error(name, EXPECTED, value))?;
    if !matches!(address.len(), 2 | 4) {
        return Err(value_error(name, EXPECTED, value));
    }
    let host = ip_address(&format!("{name}[0]"), &address.get_item(0)?)?;
    let port = integer(
        &format!("{name}[1]"),
        "a port from 0 to 65535",
        0..=65_535,
        &address.get_item(1)?,
    )?;
    Ok(SocketAddr::new(host, port))
}

fn ip_address(name: &str, host: &Bound<'_, PyAny>) -> PyResult<IpAddr> {
    const EXPECTED: &str = "an IPv4 or IPv6 address as text";
    let text = host
        .cast::<PyString>()
        .map_err(|_| type_error(name, EXPECTED, host))?
        .to_cow()?;
    // recvfrom() appends the interface to a link-local address: fe80::1%eth0.
    let parsed = match text.split_once('%') {
        Some((ip, _zone)) => ip.parse::<Ipv6Addr>().map(IpAddr::V6),
        None => text.parse(),
    };
    parsed.map_err(|_| value_error(name, EXPECTED, host))
}

pub(crate) fn unix_path(name: &str, value: &Bound<'_, PyAny>) -> PyResult<[u8; UNIX_PATH_LEN]> {
    const EXPECTED: &str = "a UNIX socket's path of at most 108 bytes";
    let path = value
        .cast::<PyBytes>()
        .map_err(|_| type_error(name, EXPECTED, value))?
        .as_bytes();
    let mut padded = [0; UNIX_PATH_LEN];
    padded
        .get_mut(..path.len())
        .ok_or_else(|| value_error(name, EXPECTED, value))?
        .copy_from_slice(path);
    Ok(padded)
}

/// An `int`, or what stands for one (`__index__`), within `range`.
pub(crate) fn integer<N: TryFrom<i64> + PartialOrd>(
    name: &str,
    expected: &str,
    range: RangeInclusive<N>,
    value: &Bound<'_, PyAny>,
) -> PyResult<N> {
    match value.extract::<i64>() {
        Ok(number) => N::try_from(number)
            .ok()
            .filter(|number| range.contains(number))
            .ok_or_else(|| value_error(name, expected, value)),
        Err(error) if error.is_instance_of::<PyTypeError>(value.py()) => {
            Err(type_error(name, expected, value))
        }
        // Beyond 64 bits.
        Err(_) => Err(value_error(name, expected, value)),
    }
}

pub(crate) fn type_error(name: &str, expected: &str, found: &Bound<'_, PyAny>) -> PyErr {
    PyTypeError::new_err(message(name, expected, found))
}

pub(crate) fn value_error(name: &str, expected: &str, found: &Bound<'_, PyAny>) -> PyErr {
    PyValueError::new_err(message(name, expected, found))
}

/// The value is quoted up to a length that a log line can bear.
fn message(name: &str, expected: &str, found: &Bound<'_, PyAny>) -> String {
    const SHOWN: usize = 100;
    let found = match found.repr() {
        Ok(repr) => repr.to_string_lossy().into_owned(),
        Err(_) => format!("an object of {}", found.get_type()),
    };
    match found.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{name}: expected {expected}, got {}…", &found[..end]),
        None => format!("{name}: expected {expected}, got {found}"),
    }
}
