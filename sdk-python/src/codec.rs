//! The functions: a datagram to header and payload, addresses to a header.

use ppv2::{
    CRC32C_TLV_LEN, Decoder, EncodeError, Encoder, FIXED_LEN, TlvType, Transport, UNIX_HEADER_LEN,
};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::arguments::{self, Over, TlvList, socket_address, unix_path};
use crate::classes::{decode_error, encode_error};
use crate::header::Header;

/// Bytes of the longest header that there can be: its length has 16 bits.
const LONGEST: usize = FIXED_LEN + 65_535;

/// Splits a datagram that is known to carry a header into header and payload.
///
/// Ask this only of datagrams that must carry a header, which is decided by
/// who sent them, never by what they look like.
///
/// Args:
///     datagram: Everything that one receive call returned, any bytes-like
///         object.
///     max_header_len: The longest header to accept, in bytes, at least 16.
///         No header is longer than 65551.
///
/// Returns:
///     The header, and the payload behind it, which may be empty. Both are
///     copies: the datagram's buffer can be used again.
///
/// Raises:
///     DecodeError: The datagram has no valid header. It is to be dropped: no
///         further bytes can make it valid, and no part of it is trustworthy.
///     TypeError, ValueError: An argument is not what is described above.
#[pyfunction]
#[pyo3(signature = (datagram, *, max_header_len = 512))]
pub(crate) fn decode<'py>(
    datagram: &Bound<'py, PyAny>,
    #[pyo3(from_py_with = arguments::max_header_len)] max_header_len: usize,
) -> PyResult<(Header, Bound<'py, PyBytes>)> {
    let py = datagram.py();
    let datagram = arguments::bytes_like("datagram", datagram)?;
    let (header, payload) = Decoder::new()
        .max_header_len(max_header_len)
        .decode(datagram.as_bytes())
        .map_err(decode_error)?;
    Ok((Header::new(py, &header), PyBytes::new(py, payload)))
}

/// Writes the header that a proxy puts in front of a client's datagram.
///
/// Args:
///     source: The client's address, as the socket module has it: (host, port)
///         or (host, port, flowinfo, scope_id), host being an IP address. The
///         last two have no place in a header and are left out. For UNIX
///         transports a path of at most 108 bytes.
///     destination: The address that the client sent to, likewise. If only one
///         of the two is IPv4, it is written v4-mapped, and the header as IPv6;
///         v4-mapped addresses are otherwise written as IPv4.
///     transport: Over which transport the client came.
///     tlvs: Pairs (type, value) in the order in which they shall stand, type
///         from 0 to 255 but not 3 (CRC32C), value at most 65535 bytes.
///     crc32c: Whether to append a checksum of the header.
///
/// Returns:
///     The header: 28 bytes for IPv4, 52 for IPv6, 232 for UNIX, and 3 more for
///     each TLV besides its value, the checksum being 4. Send it and the
///     payload in one datagram.
///
/// Raises:
///     EncodeError: Addresses and TLVs exceed 65535 bytes, a unique id exceeds
///         128 bytes, or CRC32C is among the TLVs.
///     TypeError, ValueError: An argument is not what is described above.
#[pyfunction]
#[pyo3(
    signature = (
        source, destination, *,
        transport = Over::Ip(Transport::Datagram), tlvs = TlvList::new(), crc32c = false
    ),
    text_signature = "(source, destination, *, transport='udp', tlvs=(), crc32c=False)"
)]
pub(crate) fn encode<'py>(
    source: &Bound<'py, PyAny>,
    destination: &Bound<'py, PyAny>,
    #[pyo3(from_py_with = arguments::transport)] transport: Over,
    #[pyo3(from_py_with = arguments::tlvs)] tlvs: TlvList<'py>,
    #[pyo3(from_py_with = arguments::crc32c)] crc32c: bool,
) -> PyResult<Bound<'py, PyBytes>> {
    let py = source.py();
    let mut buffer = vec![0; room_for(&tlvs)];
    let encoder = match transport {
        Over::Ip(transport) => {
            let source = socket_address("source", source)?;
            let destination = socket_address("destination", destination)?;
            match transport {
                Transport::Datagram => Encoder::udp(&mut buffer, source, destination),
                Transport::Stream => Encoder::tcp(&mut buffer, source, destination),
            }
        }
        Over::Unix(transport) => {
            let source = unix_path("source", source)?;
            let destination = unix_path("destination", destination)?;
            Encoder::unix(&mut buffer, transport, &source, &destination)
        }
    };
    let header = encoder
        .and_then(|encoder| with_tlvs(encoder, &tlvs, crc32c))
        .map_err(encode_error)?
        .finish();
    Ok(PyBytes::new(py, header))
}

/// Writes the LOCAL header, which a proxy puts in front of datagrams of its own,
/// such as health checks.
///
/// Returns:
///     The header, 16 bytes.
#[pyfunction]
pub(crate) fn encode_local(py: Python<'_>) -> PyResult<Bound<'_, PyBytes>> {
    let mut buffer = [0; FIXED_LEN];
    let header = Encoder::local(&mut buffer).map_err(encode_error)?.finish();
    Ok(PyBytes::new(py, header))
}

/// Bytes that any header with these TLVs fits in. Beyond the longest one the
/// encoder refuses, for which it needs no buffer.
fn room_for(tlvs: &TlvList<'_>) -> usize {
    let fixed = UNIX_HEADER_LEN + CRC32C_TLV_LEN;
    let tlvs = tlvs.iter().map(|(_, value)| 3 + value.as_bytes().len());
    tlvs.fold(fixed, usize::saturating_add).min(LONGEST)
}

fn with_tlvs<'b>(
    mut encoder: Encoder<'b>,
    tlvs: &TlvList<'_>,
    crc32c: bool,
) -> Result<Encoder<'b>, EncodeError> {
    for (kind, value) in tlvs {
        encoder = encoder.tlv(TlvType(*kind), value.as_bytes())?;
    }
    if crc32c {
        encoder = encoder.crc32c()?;
    }
    Ok(encoder)
}
