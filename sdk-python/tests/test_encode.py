"""`encode`: what it writes is what `decode` reads, and what it refuses."""

import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ppv2
from strategies import (
    ipv4_addresses,
    ipv6_addresses,
    same_host,
    tlvs,
    unix_paths,
)

CLIENT = ("203.0.113.11", 54321)
LISTENER = ("198.51.100.10", 9000)

ip_transports = st.sampled_from([ppv2.Transport.UDP, ppv2.Transport.TCP])
unix_transports = st.sampled_from([ppv2.Transport.UNIX_DATAGRAM, ppv2.Transport.UNIX_STREAM])


@given(
    addresses=st.tuples(ipv4_addresses, ipv4_addresses) | st.tuples(ipv6_addresses, ipv6_addresses),
    transport=ip_transports,
    tlvs=tlvs,
    crc32c=st.booleans(),
    payload=st.binary(max_size=50),
)
def test_what_was_written_is_read(
    addresses: tuple[ppv2.Address, ppv2.Address],
    transport: Any,
    tlvs: list[ppv2.Tlv],
    crc32c: bool,
    payload: bytes,
) -> None:
    source, destination = addresses
    written = ppv2.encode(source, destination, transport=transport, tlvs=tlvs, crc32c=crc32c)
    header, rest = ppv2.decode(written + payload, max_header_len=len(written))

    assert bytes(header) == written
    assert rest == payload
    assert header.command is ppv2.Command.PROXY
    assert header.transport is transport
    for found, written_as in ((header.source, source), (header.destination, destination)):
        assert isinstance(found, tuple)
        assert found[1:] == written_as[1:]
        assert same_host(found[0], written_as[0])
    assert header.client == (header.source if transport == "udp" else None)
    assert list(header.tlvs[: len(tlvs)]) == tlvs
    assert len(header.tlvs) == len(tlvs) + crc32c
    assert (header.crc32c is not None) == crc32c
    assert header.skipped == b""


@given(unix_paths, unix_paths, unix_transports)
def test_unix_paths_are_read_without_their_padding(
    source: bytes, destination: bytes, transport: Any
) -> None:
    header, _ = ppv2.decode(ppv2.encode(source, destination, transport=transport))
    assert (header.source, header.destination) == (source, destination)
    assert header.transport is transport
    assert header.client is None
    assert header.length == 232


def test_hosts_are_spelled_as_the_socket_module_does() -> None:
    for host in ("::", "::1", "2001:db8::1:0:0:1", "1:0:2:3:4:5:6:7", "ff02::fb"):
        header, _ = ppv2.decode(ppv2.encode((host, 1, 0, 0), (host, 2, 0, 0)))
        packed = socket.inet_pton(socket.AF_INET6, host)
        assert header.client == (socket.inet_ntop(socket.AF_INET6, packed), 1, 0, 0)


def test_one_family_has_to_do() -> None:
    mapped = ("::ffff:203.0.113.11", 54321, 0, 0)
    both, _ = ppv2.decode(ppv2.encode(mapped, LISTENER))
    assert (both.client, both.destination) == (CLIENT, LISTENER)
    mixed, _ = ppv2.decode(ppv2.encode(CLIENT, ("2001:db8::10", 9000, 0, 0)))
    assert (mixed.client, mixed.length) == (mapped, 52)


def test_the_zone_that_recvfrom_appends_is_left_out() -> None:
    written = ppv2.encode(("fe80::1%eth0", 1, 7, 2), ("fe80::2", 2, 0, 0))
    assert ppv2.decode(written)[0].client == ("fe80::1", 1, 0, 0)


def test_transports_are_told_by_name_or_member() -> None:
    named = ppv2.encode(CLIENT, LISTENER, transport="tcp")
    assert named == ppv2.encode(CLIENT, LISTENER, transport=ppv2.Transport.TCP)
    assert named[13] == 0x11


def test_local_headers_name_no_client() -> None:
    written = ppv2.encode_local()
    assert written == b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00"
    header, payload = ppv2.decode(written + b"ping")
    assert header.command == "local"
    assert payload == b"ping"
    nothing = (header.transport, header.source, header.destination, header.client)
    assert nothing == (None, None, None, None)


def test_tlvs_come_from_any_iterable_and_any_bytes() -> None:
    pairs = ((kind, bytearray(b"x")) for kind in (0xE7, ppv2.TlvType.NOOP))
    header, _ = ppv2.decode(ppv2.encode(CLIENT, LISTENER, tlvs=pairs))
    assert header.tlvs == ((0xE7, b"x"), (0x04, b"x"))


def test_the_longest_header_is_written_and_no_longer_one() -> None:
    room = 65535 - 12 - 3
    written = ppv2.encode(CLIENT, LISTENER, tlvs=[(0xE7, bytes(room))])
    assert len(written) == 65551
    header, _ = ppv2.decode(written, max_header_len=len(written))
    assert header.tlv(0xE7) == bytes(room)
    for too_much in ([(0xE7, bytes(room + 1))], [(0xE7, bytes(room)), (0xE8, b"")]):
        with pytest.raises(ppv2.EncodeError, match="exceed the 65535"):
            ppv2.encode(CLIENT, LISTENER, tlvs=too_much)


def test_what_a_header_can_not_hold_is_an_encode_error() -> None:
    with pytest.raises(ppv2.EncodeError, match="at most 128 bytes, got 129"):
        ppv2.encode(CLIENT, LISTENER, tlvs=[(5, bytes(129))])
    with pytest.raises(ppv2.EncodeError, match="pass crc32c=True"):
        ppv2.encode(CLIENT, LISTENER, tlvs=[(3, bytes(4))])
    assert issubclass(ppv2.EncodeError, ValueError)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"source": "203.0.113.11:53"}, TypeError, r"source: expected a tuple \(host, port\)"),
        ({"source": ["203.0.113.11", 53]}, TypeError, r"got \['203.0.113.11', 53\]"),
        ({"source": ("203.0.113.11",)}, ValueError, r"source: .*got \('203.0.113.11',\)"),
        ({"source": ("localhost", 53)}, ValueError, r"source\[0\]: .* got 'localhost'"),
        ({"source": ("203.0.113.11%1", 53)}, ValueError, r"source\[0\]: expected an IPv4"),
        ({"source": (b"::1", 53)}, TypeError, r"source\[0\]: .* as text, got b'::1'"),
        ({"destination": ("::1", 65536)}, ValueError, r"destination\[1\]: .*65535, got 65536"),
        ({"destination": ("::1", -1)}, ValueError, r"destination\[1\]: .* got -1"),
        ({"destination": ("::1", "53")}, TypeError, r"destination\[1\]: .* got '53'"),
        ({"destination": ("::1", 2**70)}, ValueError, r"destination\[1\]: .* got \d+"),
        ({"source": b"/run/app.sock"}, TypeError, "source: expected a tuple"),
        ({"transport": "unix-stream"}, TypeError, "source: expected a UNIX socket's path"),
        ({"transport": "sctp"}, ValueError, "transport: expected 'udp', .* got 'sctp'"),
        ({"transport": None}, TypeError, "transport: expected 'udp', .* got None"),
        ({"tlvs": 5}, TypeError, "tlvs: expected an iterable"),
        ({"tlvs": [(1, b""), 5]}, TypeError, r"tlvs\[1\]: expected a \(type, value\) pair, got 5"),
        ({"tlvs": [(1, b"", 0)]}, TypeError, r"tlvs\[0\]: expected a \(type, value\) pair"),
        ({"tlvs": [(256, b"")]}, ValueError, r"tlvs\[0\]\[0\]: .* 0 to 255, got 256"),
        ({"tlvs": [("1", b"")]}, TypeError, r"tlvs\[0\]\[0\]: .* 0 to 255, got '1'"),
        ({"tlvs": [(1, "h3")]}, TypeError, r"tlvs\[0\]\[1\]: expected a bytes-like .* 'h3'"),
        ({"crc32c": 1}, TypeError, "crc32c: expected a bool, got 1"),
        ({"source": ("x" * 500, 1)}, ValueError, "x…$"),
    ],
)
def test_bad_arguments_are_named(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"source": CLIENT, "destination": LISTENER} | changed
    with pytest.raises(error, match=message):
        ppv2.encode(**arguments)


def test_a_unix_path_has_108_bytes_at_most() -> None:
    assert len(ppv2.encode(b"p" * 108, b"", transport="unix-stream")) == 232
    with pytest.raises(ValueError, match=r"destination: .* at most 108 bytes"):
        ppv2.encode(b"", b"p" * 109, transport="unix-stream")


def test_an_error_of_the_iterable_is_passed_on() -> None:
    with pytest.raises(ZeroDivisionError):
        ppv2.encode(CLIENT, LISTENER, tlvs=((1 // n, b"") for n in (1, 0)))
