"""What is best written in Python: enums, named tuples, exceptions, aliases.

The compiled part makes these when it decodes; `ppv2` is where they are public.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypedDict

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ppv2._native import Header

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
    REPLY_TAG = 0xEB
    AZURE = 0xEE


class Tlv(NamedTuple):
    """One TLV of a header: a type from 0 to 255, and at most 65535 bytes."""

    type: int
    value: bytes


class TrustOptions(TypedDict, total=False):
    """Arguments of ppv2.wrap() that all that is built on it takes too."""

    formats: Iterable[Literal["v2", "spp"]]
    untrusted: Literal["drop", "accept"]
    reply_from: Literal["proxy", "listener"]
    max_header_len: int
    max_clients: int
    forget_after: float
    remember_senders: float | None
    max_senders: int
    header_alone: Literal["announce", "deliver"]


class ClientAddress(tuple[Any, ...]):
    """The address of a client, equal to any other tuple of it, that carries
    the reply path of its datagram.
    """

    _path: object

    def __reduce__(self) -> tuple[type[tuple[Any, ...]], tuple[tuple[Any, ...]]]:
        """Copies are ordinary tuples: only the socket can use the path."""
        return tuple, (tuple(self),)


class Datagram(NamedTuple):
    """A client's datagram with all that is known of it."""

    payload: bytes
    """The client's bytes, without any header; possibly none."""
    client: Address
    """The client's address, to pass to sendto(): it carries the reply path."""
    destination: Address | None
    """The address that the client sent to, as the proxy saw it. None for a direct
    client, and for a proxy that speaks for itself."""
    proxy: Address | None
    """The proxy that passed the datagram on; equal to client if the proxy speaks
    for itself (a LOCAL header: a health check). None for a direct client."""
    header: Header | None
    """The PROXY v2 header, with its TLVs. None for a direct client, for a header of
    Simple Proxy Protocol, and for a datagram whose sender said its header before."""

    @property
    def tlvs(self) -> tuple[Tlv, ...]:
        """The header's TLVs in the order in which they were sent."""
        return self.header.tlvs if self.header else ()


class Stats(NamedTuple):
    """What a socket has seen, in numbers. All but `clients` only ever grow."""

    received: int
    """Datagrams received, delivered and dropped ones together."""
    delivered: int
    """Datagrams handed to the application."""
    dropped: dict[str, int]
    """Datagrams dropped by reason, zeroes too: "untrusted", "direct_conflict",
    "no_header", "v1_header" (text of PROXY protocol version 1, which nginx up to
    1.31.3 sends), "bad_header", "header_too_long", "unspecified", "tcp", "unix",
    "client_address", "header_alone" (of which nothing is lost: see header_alone of
    ppv2.wrap())."""
    replies_sent: int
    """Datagrams sent to clients."""
    replies_without_path: int
    """Datagrams not sent since there was no reply path to their client, or no
    longer."""
    clients_evicted: int
    """Clients forgotten before their time to make room for new ones. If it grows,
    max_clients is too low."""
    clients: int
    """Clients that are remembered now."""
    listeners_evicted: int
    """Sockets bound to listeners' addresses that were closed to make room for
    others, with reply_from="listener". If it grows, this server has more
    listeners than are kept, which is 64."""
    senders_not_remembered: int
    """Headers whose sender was not remembered, since remember_senders has as many as
    max_senders allows. Their datagrams were delivered; those that such a sender sends
    without header are dropped. If it grows, max_senders is too low."""


class DecodeError(ValueError):
    """A datagram that must carry a header does not carry a valid one.

    The message names the byte at fault, what was expected and what was found.
    """

    offset: int
    """Position in the datagram of the first byte at fault, counted from 0."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, int]]:
        return type(self), (str(self), self.offset)


class NoReplyPathError(OSError):
    """There is no reply path to this client: nothing was received from it, or too
    long ago; or the proxy's address has named another client since, and nothing was
    received from this one for 10 seconds. Its errno is ENOTCONN.
    """


class EncodeError(ValueError):
    """A header can't hold what it was asked to hold."""


class TlvError(ValueError):
    """The value of a TLV is not what its type promises.

    The header itself is valid; `Header.tlvs` has the bytes.
    """
