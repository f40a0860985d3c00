//! `Header`: what a datagram's header says, as a frozen Python object.

use std::fmt::Write;
use std::net::SocketAddr;

use ppv2::{Decoder, FIXED_LEN, TlvType, Tlvs, Transport};
use pyo3::basic::CompareOp;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString, PyTuple};

use crate::arguments::{self, UNIX_PATH_LEN};
use crate::classes::{self, equality, read, tuple_of};
use crate::ssl::Ssl;

/// A header that was read and found valid.
///
/// Made by decode(). Immutable, hashable, and equal to headers of the same
/// bytes. A property that reads a TLV returns None if the header has none of
/// that type, reads the first if it has several, and raises TlvError if its
/// value is not what the type promises; tlvs has the bytes of all.
#[pyclass(frozen, module = "ppv2")]
pub(crate) struct Header {
    bytes: Py<PyBytes>,
    origin: Origin,
    tlvs_at: usize,
}

/// [`ppv2::Origin`] without what it borrows.
enum Origin {
    Local,
    Unspecified,
    Ip {
        transport: Transport,
        source: SocketAddr,
        destination: SocketAddr,
    },
    Unix {
        transport: Transport,
    },
}

impl Header {
    pub(crate) fn new(py: Python<'_>, header: &ppv2::Header<'_>) -> Self {
        let bytes = header.as_bytes();
        let origin = match header.origin() {
            ppv2::Origin::Local => Origin::Local,
            ppv2::Origin::Ip {
                transport,
                source,
                destination,
            } => Origin::Ip {
                transport,
                source,
                destination,
            },
            ppv2::Origin::Unix { transport, .. } => Origin::Unix { transport },
            ppv2::Origin::Unspecified | _ => Origin::Unspecified,
        };
        Self {
            bytes: PyBytes::new(py, bytes).unbind(),
            origin,
            tlvs_at: bytes.len() - header.tlvs().as_bytes().len(),
        }
    }

    /// From the bytes of a header that was found valid before, however long.
    pub(crate) fn read(py: Python<'_>, bytes: &[u8]) -> PyResult<Self> {
        let (header, _) = Decoder::new()
            .max_header_len(usize::MAX)
            .decode(bytes)
            .map_err(classes::decode_error)?;
        Ok(Self::new(py, &header))
    }

    /// The bytes from one offset to another, within the header or not.
    fn range<'a>(&'a self, py: Python<'a>, from: usize, to: usize) -> &'a [u8] {
        self.bytes.as_bytes(py).get(from..to).unwrap_or(&[])
    }

    fn parsed_tlvs<'a>(&'a self, py: Python<'a>) -> PyResult<Tlvs<'a>> {
        let bytes = self.range(py, self.tlvs_at, self.length(py));
        Tlvs::parse(bytes).map_err(classes::decode_error)
    }

    /// The UNIX path at `index` of the two that the header has.
    fn unix_path<'py>(&self, py: Python<'py>, index: usize) -> Bound<'py, PyAny> {
        let from = FIXED_LEN + index * UNIX_PATH_LEN;
        let padded = self.range(py, from, from + UNIX_PATH_LEN);
        let len = padded.iter().rposition(|byte| *byte != 0);
        let path = &padded[..len.map_or(0, |last| last + 1)];
        PyBytes::new(py, path).into_any()
    }
}

#[pymethods]
impl Header {
    /// Whether the header speaks for a client ("proxy") or the proxy itself
    /// sent the datagram ("local"), as for a health check.
    #[getter]
    fn command<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        classes::command(py, matches!(self.origin, Origin::Local))
    }

    /// Over which transport the client came, or None for LOCAL and UNSPEC.
    #[getter]
    fn transport<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        match self.origin {
            Origin::Local | Origin::Unspecified => Ok(None),
            Origin::Ip { transport, .. } => classes::ip_transport(py, transport).map(Some),
            Origin::Unix { transport } => classes::unix_transport(py, transport).map(Some),
        }
    }

    /// The client's address as the header has it, or None for LOCAL and UNSPEC.
    ///
    /// (host, port) for IPv4, (host, port, 0, 0) for IPv6, bytes without the
    /// padding for UNIX. A v4-mapped IPv6 address is left as it was sent.
    #[getter]
    fn source<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        match self.origin {
            Origin::Local | Origin::Unspecified => Ok(None),
            Origin::Ip { source, .. } => address(py, source).map(Some),
            Origin::Unix { .. } => Ok(Some(self.unix_path(py, 0))),
        }
    }

    /// The address that the client sent to, in the form of source, or None for
    /// LOCAL and UNSPEC.
    #[getter]
    fn destination<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        match self.origin {
            Origin::Local | Origin::Unspecified => Ok(None),
            Origin::Ip { destination, .. } => address(py, destination).map(Some),
            Origin::Unix { .. } => Ok(Some(self.unix_path(py, 1))),
        }
    }

    /// The client's address if the header names one over UDP, else None.
    ///
    /// None for LOCAL, UNSPEC, TCP and UNIX headers, for which a receiver of
    /// datagrams has no client; (host, port) for IPv4 and (host, port, 0, 0)
    /// for IPv6 otherwise.
    #[getter]
    fn client<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        match self.origin {
            Origin::Ip {
                transport: Transport::Datagram,
                source,
                ..
            } => address(py, source).map(Some),
            Origin::Ip { .. } | Origin::Local | Origin::Unspecified | Origin::Unix { .. } => {
                Ok(None)
            }
        }
    }

    /// Bytes of the whole header, 16 to 65551: signature, addresses and TLVs.
    #[getter]
    fn length(&self, py: Python<'_>) -> usize {
        self.bytes.as_bytes(py).len()
    }

    /// The bytes that must be ignored since the header is LOCAL or UNSPEC; empty
    /// for any other header.
    #[getter]
    fn skipped<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let to = match self.origin {
            Origin::Local | Origin::Unspecified => self.length(py),
            Origin::Ip { .. } | Origin::Unix { .. } => FIXED_LEN,
        };
        PyBytes::new(py, self.range(py, FIXED_LEN, to))
    }

    /// The TLVs in the order in which they were sent, duplicates included. Empty
    /// for LOCAL and UNSPEC.
    #[getter]
    fn tlvs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        tuple_of(py, self.parsed_tlvs(py)?)
    }

    /// The value of the first TLV of a type from 0 to 255, or None.
    fn tlv<'py>(
        &self,
        py: Python<'py>,
        r#type: &Bound<'py, PyAny>,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let kind = TlvType(arguments::tlv_type("type", r#type)?);
        let value = self.parsed_tlvs(py)?.get(kind);
        Ok(value.map(|value| PyBytes::new(py, value)))
    }

    /// The protocol that was negotiated with the client, such as b"h3".
    #[getter]
    fn alpn<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        Ok(self.parsed_tlvs(py)?.alpn().map(|id| PyBytes::new(py, id)))
    }

    /// The host name that the client asked for. TlvError if it is not UTF-8.
    #[getter]
    fn authority<'a>(&'a self, py: Python<'a>) -> PyResult<Option<&'a str>> {
        read(self.parsed_tlvs(py)?.authority())
    }

    /// The header's checksum, which decode() has verified.
    #[getter]
    fn crc32c(&self, py: Python<'_>) -> PyResult<Option<u32>> {
        read(self.parsed_tlvs(py)?.crc32c())
    }

    /// The flow's opaque id, at most 128 bytes.
    #[getter]
    fn unique_id<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let id = self.parsed_tlvs(py)?.unique_id();
        Ok(id.map(|id| PyBytes::new(py, id)))
    }

    /// What the proxy knows of the client's TLS. TlvError if the value has less
    /// than 5 bytes, or the TLVs inside are not whole.
    #[getter]
    fn ssl(&self, py: Python<'_>) -> PyResult<Option<Ssl>> {
        let tlvs = self.parsed_tlvs(py)?;
        read(tlvs.ssl())?;
        let value = tlvs.get(TlvType::SSL);
        Ok(value.map(|value| Ssl::checked(PyBytes::new(py, value))))
    }

    /// The network namespace's name. TlvError if it is not ASCII.
    #[getter]
    fn netns<'a>(&'a self, py: Python<'a>) -> PyResult<Option<&'a str>> {
        read(self.parsed_tlvs(py)?.netns())
    }

    /// Amazon: the id of the VPC endpoint that the client came through, such as
    /// "vpce-08d2bf15fac5001c9". TlvError for another subtype, or if it is not
    /// ASCII.
    #[getter]
    fn aws_vpc_endpoint_id<'a>(&'a self, py: Python<'a>) -> PyResult<Option<&'a str>> {
        read(self.parsed_tlvs(py)?.aws_vpc_endpoint_id())
    }

    /// Azure: the link id of the private endpoint that the client came through,
    /// 32 bits. TlvError for another subtype or length.
    #[getter]
    fn azure_private_endpoint_link_id(&self, py: Python<'_>) -> PyResult<Option<u32>> {
        read(self.parsed_tlvs(py)?.azure_private_endpoint_link_id())
    }

    /// Google Cloud: the Private Service Connect connection that the client came
    /// through, 64 bits. TlvError if the value has another length.
    #[getter]
    fn gcp_psc_connection_id(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        read(self.parsed_tlvs(py)?.gcp_psc_connection_id())
    }

    /// The tag that a server returns with its replies to this client: the TLV's 10
    /// bytes. None without a tag of version 1, and None with two of them.
    #[getter]
    fn reply_tag<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let tag = self.parsed_tlvs(py)?.reply_tag();
        Ok(tag.map(|tag| PyBytes::new(py, tag.value())))
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        self.bytes.bind(py).clone()
    }

    fn __richcmp__(&self, other: &Bound<'_, PyAny>, op: CompareOp) -> PyResult<Py<PyAny>> {
        let py = other.py();
        match other.cast::<Self>() {
            Ok(other) => equality(self.bytes.bind(py), other.get().bytes.bind(py), op),
            Err(_) => Ok(py.NotImplemented()),
        }
    }

    // The hash of bytes is keyed: senders choose what a header says.
    fn __hash__(&self, py: Python<'_>) -> PyResult<isize> {
        self.bytes.bind(py).hash()
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let mut text = format!("<ppv2.Header {}", self.command(py)?.str()?);
        if let (Some(transport), Some(source), Some(destination)) =
            (self.transport(py)?, self.source(py)?, self.destination(py)?)
        {
            let _ = write!(
                text,
                " {} {} -> {}",
                transport.str()?,
                source.repr()?,
                destination.repr()?
            );
        }
        let tlvs = self.parsed_tlvs(py)?.iter().count();
        let _ = write!(text, ", tlvs={tlvs}, length={}>", self.length(py));
        Ok(text)
    }

    fn __reduce__<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyBytes>,))> {
        let function = py.import("ppv2._native")?.getattr("_header_of")?;
        Ok((function, (self.__bytes__(py),)))
    }
}

/// The header that pickle has kept as its bytes.
#[pyfunction]
#[pyo3(name = "_header_of", signature = (header, /))]
pub(crate) fn header_of(header: &Bound<'_, PyBytes>) -> PyResult<Header> {
    Header::read(header.py(), header.as_bytes())
}

/// What a getter of the codec has read, for Python.
/// An address as Python's `socket` module has it.
fn address(py: Python<'_>, address: SocketAddr) -> PyResult<Bound<'_, PyAny>> {
    let host = PyString::new(py, &address.ip().to_string());
    let tuple = match address {
        SocketAddr::V4(_) => (host, address.port()).into_pyobject(py)?,
        SocketAddr::V6(_) => (host, address.port(), 0, 0).into_pyobject(py)?,
    };
    Ok(tuple.into_any())
}
