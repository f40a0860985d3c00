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
"""

from ppv2._native import Header, Socket, Ssl, __version__, decode, encode, encode_local, wrap
from ppv2._types import (
    Address,
    Command,
    Datagram,
    DecodeError,
    EncodeError,
    NoRouteError,
    Stats,
    Tlv,
    TlvError,
    TlvType,
    Transport,
    TrustOptions,
)

__all__ = [
    "Address",
    "Command",
    "Datagram",
    "DecodeError",
    "EncodeError",
    "Header",
    "NoRouteError",
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
    NoRouteError,
    Stats,
    Tlv,
    TlvError,
    TlvType,
    Transport,
    TrustOptions,
):
    _class.__module__ = __name__
del _class
