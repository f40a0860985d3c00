"""`Header` and `Ssl` as Python objects: immutable values that can be told apart."""

import copy
import dataclasses
import gc
import pickle
import sys
from typing import Any

import pytest

import ppv2

CLIENT = ("203.0.113.11", 54321)
LISTENER = ("198.51.100.10", 9000)
SSL = b"\x03\0\0\0\x0a\x21\0\x07TLSv1.3\x22\0\x02\xff\xfe"


def header(*tlvs: tuple[int, bytes]) -> ppv2.Header:
    return ppv2.decode(ppv2.encode(CLIENT, LISTENER, tlvs=tlvs))[0]


def ssl() -> ppv2.Ssl:
    found = header((0x20, SSL)).ssl
    assert found is not None
    return found


def test_headers_of_the_same_bytes_are_equal() -> None:
    assert header() == header()
    assert not header() != header()  # noqa: SIM202
    assert hash(header()) == hash(header())
    assert header() != header((4, b""))
    assert header() != bytes(header())
    assert ssl() == ssl()
    assert len({header(), header(), header((4, b"")), ssl(), ssl()}) == 3
    with pytest.raises(TypeError, match="not supported"):
        header() < header()  # type: ignore[operator]  # noqa: B015


@pytest.mark.parametrize("value", [header(), ssl()], ids=["Header", "Ssl"])
def test_values_do_not_change_and_are_not_made_by_hand(value: Any) -> None:
    for name in ("tlvs", "new"):
        with pytest.raises(AttributeError):
            setattr(value, name, ())
    with pytest.raises(TypeError):
        type(value)()
    with pytest.raises(TypeError):
        type("Derived", (type(value),), {})


@pytest.mark.parametrize("value", [header((1, b"h3")), ssl(), header((1, b"h3")).tlvs[0]])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_values_are_pickled_and_copied(value: object, protocol: int) -> None:
    for found in (
        pickle.loads(pickle.dumps(value, protocol)),
        copy.copy(value),
        copy.deepcopy(value),
    ):
        assert type(found) is type(value)
        assert found == value


def test_headers_fit_in_dataclasses() -> None:
    @dataclasses.dataclass(frozen=True)
    class Request:
        header: ppv2.Header

    assert dataclasses.asdict(Request(header())) == {"header": header()}


def test_a_header_says_what_it_is() -> None:
    assert repr(header((4, b""))) == (
        "<ppv2.Header proxy udp ('203.0.113.11', 54321) -> ('198.51.100.10', 9000), "
        "tlvs=1, length=31>"
    )
    local, _ = ppv2.decode(ppv2.encode_local())
    assert repr(local) == "<ppv2.Header local, tlvs=0, length=16>"
    assert repr(ssl()) == "<ppv2.Ssl client=0x03 verify=10, tlvs=2>"


def test_ssl_is_read_by_name() -> None:
    found = ssl()
    assert found.client == ppv2.Ssl.CLIENT_SSL | ppv2.Ssl.CLIENT_CERT_CONN
    assert not found.client & ppv2.Ssl.CLIENT_CERT_SESS
    assert (found.verify, found.is_tls, found.is_verified) == (10, True, False)
    assert found.version == "TLSv1.3"
    assert found.cipher is None
    assert [tlv.type for tlv in found.tlvs] == [ppv2.TlvType.SSL_VERSION, ppv2.TlvType.SSL_CN]
    with pytest.raises(ppv2.TlvError, match="SSL_CN is not UTF-8 from byte 0"):
        _ = found.common_name
    assert bytes(found) == SSL


def test_a_malformed_value_is_an_error_of_its_getter_alone() -> None:
    found = header((0x02, b"\xff"), (0x20, b"\x01"), (0xE0, b"abc"))
    for name in ("authority", "ssl", "gcp_psc_connection_id"):
        with pytest.raises(ppv2.TlvError):
            getattr(found, name)
    assert found.tlv(ppv2.TlvType.AUTHORITY) == b"\xff"
    assert found.netns is None
    assert issubclass(ppv2.TlvError, ValueError)


def test_any_type_of_tlv_is_found() -> None:
    found = header((0xE7, b"first"), (0xE7, b"second"), (0, b""))
    assert found.tlv(0xE7) == b"first"
    assert found.tlv(type=0) == b""
    assert found.tlv(1) is None
    assert [value for kind, value in found.tlvs if kind == 0xE7] == [b"first", b"second"]
    with pytest.raises(ValueError, match="type: expected a TLV type from 0 to 255, got 256"):
        found.tlv(256)
    with pytest.raises(TypeError, match="type: expected a TLV type from 0 to 255, got 'ALPN'"):
        found.tlv("ALPN")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ppv2.TlvType)
def test_types_have_the_codec_s_names(kind: ppv2.TlvType) -> None:
    cut = bytearray(ppv2.encode(CLIENT, LISTENER) + bytes([kind, 0, 9]))
    cut[15] += 3
    with pytest.raises(ppv2.DecodeError, match=f"byte 28: {kind.name} says it has 9 bytes"):
        ppv2.decode(cut)


def test_enums_are_the_text_that_they_mean() -> None:
    assert header().command == "proxy"
    assert header().transport == "udp"
    assert f"{header().transport}" == "udp"
    assert header().transport is ppv2.Transport("udp")


def test_nothing_leaks() -> None:
    datagram = ppv2.encode(CLIENT, LISTENER, tlvs=[(0x20, SSL), (1, b"h3")], crc32c=True)

    def work() -> None:
        for _ in range(200):
            found, _ = ppv2.decode(datagram)
            assert found.ssl
            assert found.tlvs
            assert hash(found)
            with pytest.raises(ppv2.DecodeError):
                ppv2.decode(datagram[:-1])

    def blocks() -> int:
        gc.collect()
        return sys.getallocatedblocks()

    work()
    before = blocks()
    work()
    assert blocks() - before < 200
