"""A proxy of a few lines, and servers' sockets, for tests on this host."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import pytest

import ppv2
from ppv2 import Address

CLIENT = ("203.0.113.11", 54321)
OTHER_CLIENT = ("203.0.113.12", 54321)
CLIENT_V6 = ("2001:db8::11", 54321, 0, 0)
LISTENER = ("198.51.100.10", 9000)
OTHER_LISTENER = ("198.51.100.11", 9000)

# Longer than anything takes that is going to happen at all.
PATIENCE = 20.0


def udp(host: str = "127.0.0.1", family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
    """A bound UDP socket that waits patiently."""
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.bind((host, 0))
    sock.settimeout(PATIENCE)
    return sock


@contextmanager
def server(**options: Any) -> Iterator[ppv2.Socket]:
    """A wrapped socket that trusts 127.0.0.1, so that 127.0.0.2 is a stranger."""
    with ppv2.wrap(udp(), **{"trusted": ["127.0.0.1"], **options}) as wrapped:
        yield wrapped


class Proxy:
    """The proxy's socket towards a server."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.socket = udp(host)
        self.address: Address = self.socket.getsockname()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(
        self,
        server: Address,
        payload: bytes,
        client: Address = CLIENT,
        listener: Address = LISTENER,
        **options: Any,
    ) -> None:
        """Sends as the proxy does what a client sent to a listener."""
        self.send_raw(server, ppv2.encode(client, listener, **options) + payload)

    def send_raw(self, server: Address, datagram: bytes) -> None:
        self.socket.sendto(datagram, server)

    def receive(self) -> bytes:
        """The next reply."""
        return self.socket.recv(65535)

    def receives_nothing(self) -> None:
        """What a server on this host has sent before would be there already."""
        self.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            self.socket.recv(65535)
        self.socket.settimeout(PATIENCE)


@contextmanager
def two_proxies() -> Iterator[tuple[Proxy, Proxy]]:
    """Proxies at two addresses."""
    with Proxy() as one, Proxy("127.0.0.3") as other:
        yield one, other


def hostile() -> dict[str, tuple[str, bytes]]:
    """Datagrams that a trusted peer must not send, with the reasons for dropping."""
    header = ppv2.encode(CLIENT, LISTENER)
    past_end = header[:14] + b"\xff" + header[15:]
    wrong_version = header[:12] + b"\x11" + header[13:]
    cut_tlv = header[:14] + b"\0\x0e" + header[16:] + b"\x01\0"
    checked = ppv2.encode(CLIENT, LISTENER, crc32c=True)
    return {
        "empty": ("no_header", b""),
        "no header": ("no_header", b"hello"),
        "half a signature": ("no_header", header[:7]),
        "signature alone": ("no_header", header[:12]),
        "past the end": ("bad_header", past_end),
        "wrong version": ("bad_header", wrong_version),
        "stray bytes": ("bad_header", cut_tlv),
        "wrong checksum": ("bad_header", checked[:-1] + bytes([checked[-1] ^ 1])),
        "too long": ("header_too_long", ppv2.encode(CLIENT, LISTENER, tlvs=[(4, bytes(600))])),
        "unspecified": ("unspecified", header[:12] + b"\x21\0\0\0" + b"hello"),
        "tcp": ("tcp", ppv2.encode(CLIENT, LISTENER, transport="tcp")),
        "unix": ("unix", ppv2.encode(b"/a", b"/b", transport="unix-datagram")),
        "port 0": ("client_address", ppv2.encode(("203.0.113.11", 0), LISTENER)),
        "multicast": ("client_address", ppv2.encode(("224.0.0.1", 53), LISTENER)),
    }
