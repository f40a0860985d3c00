//! The classes of `ppv2/_types.py`, and how values of Rust become theirs.

use ppv2::{DecodeError, EncodeError, TlvError, Tlvs, Transport};
use pyo3::basic::CompareOp;
use pyo3::call::PyCallArgs;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyTuple, PyType};

mod exceptions {
    pyo3::import_exception!(ppv2, DecodeError);
    pyo3::import_exception!(ppv2, EncodeError);
    pyo3::import_exception!(ppv2, TlvError);
}

const MODULE: &str = "ppv2._types";

/// A member of an enum of Python's, looked up once.
struct Member {
    class: &'static str,
    value: &'static str,
    found: PyOnceLock<Py<PyAny>>,
}

impl Member {
    const fn new(class: &'static str, value: &'static str) -> Self {
        Self {
            class,
            value,
            found: PyOnceLock::new(),
        }
    }

    fn get<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let found = self.found.get_or_try_init(py, || {
            let class = py.import(MODULE)?.getattr(self.class)?;
            Ok::<_, PyErr>(class.call1((self.value,))?.unbind())
        })?;
        Ok(found.bind(py).clone())
    }
}

pub(crate) fn command(py: Python<'_>, local: bool) -> PyResult<Bound<'_, PyAny>> {
    static LOCAL: Member = Member::new("Command", "local");
    static PROXY: Member = Member::new("Command", "proxy");
    if local { LOCAL.get(py) } else { PROXY.get(py) }
}

pub(crate) fn ip_transport(py: Python<'_>, transport: Transport) -> PyResult<Bound<'_, PyAny>> {
    static UDP: Member = Member::new("Transport", "udp");
    static TCP: Member = Member::new("Transport", "tcp");
    match transport {
        Transport::Datagram => UDP.get(py),
        Transport::Stream => TCP.get(py),
    }
}

pub(crate) fn unix_transport(py: Python<'_>, transport: Transport) -> PyResult<Bound<'_, PyAny>> {
    static DATAGRAM: Member = Member::new("Transport", "unix-datagram");
    static STREAM: Member = Member::new("Transport", "unix-stream");
    match transport {
        Transport::Datagram => DATAGRAM.get(py),
        Transport::Stream => STREAM.get(py),
    }
}

pub(crate) fn tlv<'py>(py: Python<'py>, tlv: ppv2::Tlv<'_>) -> PyResult<Bound<'py, PyAny>> {
    static TLV: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let class = TLV.import(py, MODULE, "Tlv")?;
    class.call1((tlv.kind.0, PyBytes::new(py, tlv.value)))
}

pub(crate) fn datagram<'py>(
    py: Python<'py>,
    fields: impl PyCallArgs<'py>,
) -> PyResult<Bound<'py, PyAny>> {
    static DATAGRAM: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    DATAGRAM.import(py, MODULE, "Datagram")?.call1(fields)
}

pub(crate) fn stats<'py>(
    py: Python<'py>,
    fields: impl PyCallArgs<'py>,
) -> PyResult<Bound<'py, PyAny>> {
    static STATS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    STATS.import(py, MODULE, "Stats")?.call1(fields)
}

pub(crate) fn decode_error(error: DecodeError) -> PyErr {
    exceptions::DecodeError::new_err((error.to_string(), error.offset()))
}

pub(crate) fn encode_error(error: EncodeError) -> PyErr {
    exceptions::EncodeError::new_err(match error {
        EncodeError::Checksum => {
            "tlvs: CRC32C is computed, not given; pass crc32c=True instead".to_owned()
        }
        EncodeError::BufferTooSmall { .. }
        | EncodeError::TooLong { .. }
        | EncodeError::UniqueIdTooLong { .. }
        | _ => error.to_string(),
    })
}

pub(crate) fn tlv_error(error: TlvError) -> PyErr {
    exceptions::TlvError::new_err(error.to_string())
}

pub(crate) fn read<T>(value: Option<Result<T, TlvError>>) -> PyResult<Option<T>> {
    value.transpose().map_err(tlv_error)
}

pub(crate) fn tuple_of<'py>(py: Python<'py>, tlvs: Tlvs<'_>) -> PyResult<Bound<'py, PyTuple>> {
    let tlvs: Vec<_> = tlvs
        .iter()
        .map(|one| tlv(py, one))
        .collect::<PyResult<_>>()?;
    PyTuple::new(py, tlvs)
}

/// `==` and `!=` of objects that are what their bytes are; no other comparison.
pub(crate) fn equality(
    left: &Bound<'_, PyBytes>,
    right: &Bound<'_, PyBytes>,
    op: CompareOp,
) -> PyResult<Py<PyAny>> {
    match op {
        CompareOp::Eq | CompareOp::Ne => Ok(left.rich_compare(right, op)?.unbind()),
        CompareOp::Lt | CompareOp::Le | CompareOp::Gt | CompareOp::Ge => {
            Ok(left.py().NotImplemented())
        }
    }
}
