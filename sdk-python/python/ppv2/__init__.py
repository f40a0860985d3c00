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

from ppv2._native import Header, Ssl, __version__, decode, encode, encode_local
from ppv2._types import (
    Address,
    Command,
    DecodeError,
    EncodeError,
    Tlv,
    TlvError,
    TlvType,
    Transport,
)

__all__ = [
    "Address",
    "Command",
    "DecodeError",
    "EncodeError",
    "Header",
    "Ssl",
    "Tlv",
    "TlvError",
    "TlvType",
    "Transport",
    "__version__",
    "decode",
    "encode",
    "encode_local",
]

# Tracebacks and pickles name what is public, wherever it is written.
for _class in (Command, DecodeError, EncodeError, Tlv, TlvError, TlvType, Transport):
    _class.__module__ = __name__
del _class
