"""`decode`: what it takes, what it refuses, and that nothing else escapes."""

import array
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ppv2
from strategies import hostile_datagrams

CLIENT = ("203.0.113.11", 54321)
LISTENER = ("198.51.100.10", 9000)
DATAGRAM = ppv2.encode(CLIENT, LISTENER) + b"hello"

GETTERS = [name for name in dir(ppv2.Header) if not name.startswith("_") and name != "tlv"]
SSL_GETTERS = [name for name in dir(ppv2.Ssl) if not name.startswith("_")]


@given(hostile_datagrams(), st.sampled_from([16, 28, 512, 65551]))
def test_hostile_bytes_raise_a_decode_error_or_nothing(datagram: bytes, limit: int) -> None:
    try:
        header, payload = ppv2.decode(datagram, max_header_len=limit)
    except ppv2.DecodeError as error:
        assert 0 <= error.offset <= len(datagram)
        assert str(error).startswith(f"byte {error.offset}: ")
        return
    assert bytes(header) + payload == datagram
    assert 16 <= header.length <= limit
    for name in GETTERS:
        read(header, name)
    repr(header)
    assert pickle.loads(pickle.dumps(header)) == header


def read(of: object, name: str) -> None:
    try:
        value = getattr(of, name)
    except ppv2.TlvError as error:
        assert str(error)
        return
    if isinstance(value, ppv2.Ssl):
        for inner in SSL_GETTERS:
            read(value, inner)


@pytest.mark.parametrize(
    "datagram",
    [
        bytearray(DATAGRAM),
        memoryview(DATAGRAM),
        memoryview(b"in front" + DATAGRAM)[8:],
        memoryview(DATAGRAM[::-1])[::-1],
        array.array("B", DATAGRAM),
    ],
    ids=["bytearray", "memoryview", "slice", "reversed", "array"],
)
def test_any_bytes_like_object_is_taken(datagram: bytearray | memoryview) -> None:
    header, payload = ppv2.decode(datagram)
    assert header.client == CLIENT
    assert type(payload) is bytes
    assert payload == b"hello"


def test_nothing_refers_to_the_buffer_once_decoded() -> None:
    buffer = bytearray(DATAGRAM)
    header, payload = ppv2.decode(buffer)
    buffer[:] = bytes(len(buffer))
    buffer.clear()
    assert header.client == CLIENT
    assert payload == b"hello"


@pytest.mark.parametrize("datagram", ["text", 5, None, [1, 2]])
def test_a_datagram_that_is_not_bytes_is_a_type_error(datagram: object) -> None:
    with pytest.raises(TypeError, match="datagram: expected a bytes-like object, got"):
        ppv2.decode(datagram)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [15, 0, -1, -(2**70)])
def test_a_limit_that_no_header_fits_in_is_a_value_error(limit: int) -> None:
    with pytest.raises(ValueError, match=f"max_header_len: .* at least 16, got {limit}"):
        ppv2.decode(DATAGRAM, max_header_len=limit)


@pytest.mark.parametrize("limit", ["512", 512.0, None])
def test_a_limit_that_is_no_int_is_a_type_error(limit: object) -> None:
    with pytest.raises(TypeError, match="max_header_len: expected"):
        ppv2.decode(DATAGRAM, max_header_len=limit)  # type: ignore[arg-type]


def test_the_limit_is_of_the_header_not_of_the_datagram() -> None:
    header, payload = ppv2.decode(DATAGRAM + bytes(60000), max_header_len=28)
    assert header.length == 28
    assert len(payload) == 60005
    with pytest.raises(ppv2.DecodeError, match="longer than the limit of 27") as caught:
        ppv2.decode(DATAGRAM, max_header_len=27)
    assert caught.value.offset == 14


def test_errors_are_value_errors_that_survive_pickling() -> None:
    with pytest.raises(ValueError, match="byte 0: expected 0x0d") as caught:
        ppv2.decode(b"GET / HTTP/1.1\r\n")
    error = caught.value
    assert isinstance(error, ppv2.DecodeError)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.offset) == (ppv2.DecodeError, str(error), 0)


def test_threads_share_headers_and_decode_at_once() -> None:
    shared, _ = ppv2.decode(ppv2.encode(CLIENT, LISTENER, tlvs=[(1, b"h3")], crc32c=True))

    def work(number: int) -> None:
        client = (f"192.0.2.{number}", 1024 + number)
        for sequence in range(500):
            payload = f"{number} {sequence}".encode()
            header, found = ppv2.decode(ppv2.encode(client, LISTENER) + payload)
            assert (header.client, found) == (client, payload)
            assert (shared.client, shared.alpn) == (CLIENT, b"h3")
            assert shared.transport is header.transport is ppv2.Transport.UDP

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
