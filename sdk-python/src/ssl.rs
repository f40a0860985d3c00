//! `Ssl`: what a header says of the client's TLS, as a frozen Python object.

use pyo3::basic::CompareOp;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use crate::classes::{self, equality, read, tuple_of};

/// What a proxy that ended the client's TLS knows of it.
///
/// Read from Header.ssl. Immutable, hashable, and equal to those of the same
/// bytes. A property that reads a TLV returns None if there is none of that
/// type, and raises TlvError if its value is not the text that the type
/// promises; tlvs has the bytes of all.
#[pyclass(frozen, module = "ppv2")]
pub(crate) struct Ssl {
    value: Py<PyBytes>,
}

impl Ssl {
    /// For a value that was parsed before.
    pub(crate) fn checked(value: Bound<'_, PyBytes>) -> Self {
        Self {
            value: value.unbind(),
        }
    }

    fn parsed<'a>(&'a self, py: Python<'a>) -> PyResult<ppv2::Ssl<'a>> {
        ppv2::Ssl::parse(self.value.as_bytes(py)).map_err(classes::tlv_error)
    }
}

#[pymethods]
impl Ssl {
    /// Flag of client: the client connected over TLS.
    #[classattr]
    const CLIENT_SSL: u8 = ppv2::Ssl::CLIENT_SSL;
    /// Flag of client: a certificate came over this connection.
    #[classattr]
    const CLIENT_CERT_CONN: u8 = ppv2::Ssl::CLIENT_CERT_CONN;
    /// Flag of client: a certificate came at some time in this TLS session.
    #[classattr]
    const CLIENT_CERT_SESS: u8 = ppv2::Ssl::CLIENT_CERT_SESS;

    /// The flags CLIENT_SSL, CLIENT_CERT_CONN and CLIENT_CERT_SESS, 8 bits.
    #[getter]
    fn client(&self, py: Python<'_>) -> PyResult<u8> {
        Ok(self.parsed(py)?.client())
    }

    /// 0 if the client's certificate was verified, else the verifier's error.
    #[getter]
    fn verify(&self, py: Python<'_>) -> PyResult<u32> {
        Ok(self.parsed(py)?.verify())
    }

    /// Whether the client connected over TLS.
    #[getter]
    fn is_tls(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(self.parsed(py)?.is_tls())
    }

    /// Whether verify is 0. It says something of a certificate only where client
    /// says that there was one.
    #[getter]
    fn is_verified(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(self.parsed(py)?.is_verified())
    }

    /// TLS version, such as "TLSv1.3". TlvError if it is not ASCII.
    #[getter]
    fn version<'a>(&'a self, py: Python<'a>) -> PyResult<Option<&'a str>> {
        read(self.parsed(py)?.version())
    }

    /// Common name of the client's certificate. TlvError if it is not UTF-8.
    #[getter]
    fn common_name<'a>(&'a self, py: Python<'a>) -> PyResult<Option<&'a str>> {
        read(self.parsed(py)?.common_name())
    }

    /// Cipher, such as "TLS_AES_128_GCM_SHA256". TlvError if it is not ASCII.
    #[getter]
    fn cipher<'a>(&'a self, py: Python<'a>) -> PyResult<Option<&'a str>> {
        read(self.parsed(py)?.cipher())
    }

    /// Algorithm that signed the proxy's certificate, such as "RSA-SHA256".
    /// TlvError if it is not ASCII.
    #[getter]
    fn signature_algorithm<'a>(&'a self, py: Python<'a>) -> PyResult<Option<&'a str>> {
        read(self.parsed(py)?.signature_algorithm())
    }

    /// Key algorithm of the proxy's certificate, such as "RSA2048". TlvError if
    /// it is not ASCII.
    #[getter]
    fn key_algorithm<'a>(&'a self, py: Python<'a>) -> PyResult<Option<&'a str>> {
        read(self.parsed(py)?.key_algorithm())
    }

    /// Key exchange group, such as "X25519MLKEM768". TlvError if it is not ASCII.
    #[getter]
    fn group<'a>(&'a self, py: Python<'a>) -> PyResult<Option<&'a str>> {
        read(self.parsed(py)?.group())
    }

    /// Signature scheme of the handshake, such as "ed25519". TlvError if it is
    /// not ASCII.
    #[getter]
    fn signature_scheme<'a>(&'a self, py: Python<'a>) -> PyResult<Option<&'a str>> {
        read(self.parsed(py)?.signature_scheme())
    }

    /// The client's certificate in DER.
    #[getter]
    fn client_certificate<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let certificate = self.parsed(py)?.client_certificate();
        Ok(certificate.map(|der| PyBytes::new(py, der)))
    }

    /// The TLVs inside, in the order in which they were sent.
    #[getter]
    fn tlvs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        tuple_of(py, self.parsed(py)?.tlvs())
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        self.value.bind(py).clone()
    }

    fn __richcmp__(&self, other: &Bound<'_, PyAny>, op: CompareOp) -> PyResult<Py<PyAny>> {
        let py = other.py();
        match other.cast::<Self>() {
            Ok(other) => equality(self.value.bind(py), other.get().value.bind(py), op),
            Err(_) => Ok(py.NotImplemented()),
        }
    }

    // The hash of bytes is keyed: senders choose what a header says.
    fn __hash__(&self, py: Python<'_>) -> PyResult<isize> {
        self.value.bind(py).hash()
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let ssl = self.parsed(py)?;
        let (client, verify) = (ssl.client(), ssl.verify());
        let tlvs = ssl.tlvs().iter().count();
        Ok(format!(
            "<ppv2.Ssl client=0x{client:02x} verify={verify}, tlvs={tlvs}>"
        ))
    }

    fn __reduce__<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyBytes>,))> {
        let function = py.import("ppv2._native")?.getattr("_ssl_of")?;
        Ok((function, (self.__bytes__(py),)))
    }
}

/// What pickle has kept as its bytes.
#[pyfunction]
#[pyo3(name = "_ssl_of", signature = (value, /))]
pub(crate) fn ssl_of(value: Bound<'_, PyBytes>) -> PyResult<Ssl> {
    ppv2::Ssl::parse(value.as_bytes()).map_err(classes::tlv_error)?;
    Ok(Ssl::checked(value))
}
