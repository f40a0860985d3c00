"""What is best written in Python: enums, named tuples, exceptions, aliases.

The compiled part makes these when it decodes; `ppv2` is where they are public.
"""

from enum import IntEnum, StrEnum
from typing import NamedTuple, TypeAlias

Address: TypeAlias = tuple[str, int] | tuple[str, int, int, int]
"""An address of the `socket` module: `(host, port)` for IPv4, and
`(host, port, flowinfo, scope_id)` for IPv6."""


class Command(StrEnum):
    """On whose behalf a datagram was sent."""

    LOCAL = "local"
    """The proxy's own, such as a health check; the sender is the client."""
    PROXY = "proxy"
    """A client's."""


class Transport(StrEnum):
    """Over which transport a client came to the proxy."""

    UDP = "udp"
    TCP = "tcp"
    UNIX_DATAGRAM = "unix-datagram"
    UNIX_STREAM = "unix-stream"


class TlvType(IntEnum):
    """Types of TLVs that have a name. A header may have any from 0 to 255."""

    ALPN = 0x01
    AUTHORITY = 0x02
    CRC32C = 0x03
    NOOP = 0x04
    UNIQUE_ID = 0x05
    SSL = 0x20
    SSL_VERSION = 0x21
    SSL_CN = 0x22
    SSL_CIPHER = 0x23
    SSL_SIG_ALG = 0x24
    SSL_KEY_ALG = 0x25
    SSL_GROUP = 0x26
    SSL_SIG_SCHEME = 0x27
    SSL_CLIENT_CERT = 0x28
    NETNS = 0x30
    GCP = 0xE0
    AWS = 0xEA
    AZURE = 0xEE


class Tlv(NamedTuple):
    """One TLV of a header: a type from 0 to 255, and at most 65535 bytes."""

    type: int
    value: bytes


class DecodeError(ValueError):
    """A datagram that must carry a header does not carry a valid one.

    The message names the byte at fault, what was expected and what was found.
    """

    offset: int
    """Position in the datagram of the first byte at fault, counted from 0."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset

    def __reduce__(self) -> tuple[type["DecodeError"], tuple[str, int]]:
        return type(self), (str(self), self.offset)


class EncodeError(ValueError):
    """A header can't hold what it was asked to hold."""


class TlvError(ValueError):
    """The value of a TLV is not what its type promises.

    The header itself is valid; `Header.tlvs` has the bytes.
    """
