"""PROXY protocol v2 for datagrams: who the client behind a UDP proxy is.

    >>> import ppv2
    >>> header = ppv2.encode(("203.0.113.11", 54321), ("198.51.100.10", 9000))
    >>> header, payload = ppv2.decode(header + b"hello")
    >>> header.client
    ('203.0.113.11', 54321)
    >>> payload
    b'hello'

Decode only datagrams that must carry a header: whether one does is decided by
who sent it, never by what it looks like. Drop what raises `DecodeError`.

The modules `ppv2.asyncio`, `ppv2.socketserver`, `ppv2.aioquic`, `ppv2.anyio`,
`ppv2.gevent` and `ppv2.twisted` are imported when they are first used.
"""

from typing import TYPE_CHECKING

from ppv2._native import Header, Socket, Ssl, __version__, decode, encode, encode_local, wrap
from ppv2._types import (
    Address,
    Command,
    Datagram,
    DecodeError,
    EncodeError,
    NoReplyPathError,
    Stats,
    Tlv,
    TlvError,
    TlvType,
    Transport,
    TrustOptions,
)

if TYPE_CHECKING:
    from ppv2 import aioquic as aioquic
    from ppv2 import anyio as anyio
    from ppv2 import asyncio as asyncio
    from ppv2 import gevent as gevent
    from ppv2 import socketserver as socketserver
    from ppv2 import twisted as twisted

__all__ = [
    "Address",
    "Command",
    "Datagram",
    "DecodeError",
    "EncodeError",
    "Header",
    "NoReplyPathError",
    "Socket",
    "Ssl",
    "Stats",
    "Tlv",
    "TlvError",
    "TlvType",
    "Transport",
    "TrustOptions",
    "__version__",
    "decode",
    "encode",
    "encode_local",
    "wrap",
]

# Tracebacks and pickles name what is public, wherever it is written.
for _class in (
    Command,
    Datagram,
    DecodeError,
    EncodeError,
    NoReplyPathError,
    Stats,
    Tlv,
    TlvError,
    TlvType,
    Transport,
    TrustOptions,
):
    _class.__module__ = __name__
del _class

# The modules that are imported when they are first used, and what each needs to be
# installed.
_MODULES = {
    "aioquic": "aioquic",
    "anyio": "anyio",
    "asyncio": None,
    "gevent": "gevent",
    "socketserver": None,
    "twisted": "twisted",
}


# Type checkers would believe in any name at all.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    from importlib.util import find_spec

    usable = [name for name, needed in _MODULES.items() if not needed or find_spec(needed)]
    return sorted({*globals(), *usable})
