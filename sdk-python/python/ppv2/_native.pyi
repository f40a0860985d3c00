"""The codec, compiled. Everything here is public as `ppv2.…`, if it is at all."""

from collections.abc import Iterable
from typing import Final, Literal, final, overload

from _typeshed import ReadableBuffer

from ppv2._types import Address, Command, Tlv, Transport

__all__ = [
    "Header",
    "Ssl",
    "__version__",
    "_header_of",
    "_ssl_of",
    "decode",
    "encode",
    "encode_local",
]

__version__: Final[str]

def decode(datagram: ReadableBuffer, *, max_header_len: int = 512) -> tuple[Header, bytes]:
    """Splits a datagram that is known to carry a header into header and payload.

    Ask this only of datagrams that must carry a header, which is decided by
    who sent them, never by what they look like.

    Args:
        datagram: Everything that one receive call returned, any bytes-like
            object.
        max_header_len: The longest header to accept, in bytes, at least 16.
            No header is longer than 65551.

    Returns:
        The header, and the payload behind it, which may be empty. Both are
        copies: the datagram's buffer can be used again.

    Raises:
        DecodeError: The datagram has no valid header. It is to be dropped: no
            further bytes can make it valid, and no part of it is trustworthy.
        TypeError, ValueError: An argument is not what is described above.
    """

@overload
def encode(
    source: Address,
    destination: Address,
    *,
    transport: Literal["udp", "tcp", Transport.UDP, Transport.TCP] = "udp",
    tlvs: Iterable[tuple[int, ReadableBuffer]] = (),
    crc32c: bool = False,
) -> bytes:
    """Writes the header that a proxy puts in front of a client's datagram.

    Args:
        source: The client's address, as the socket module has it: (host, port)
            or (host, port, flowinfo, scope_id), host being an IP address. The
            last two have no place in a header and are left out. For UNIX
            transports a path of at most 108 bytes.
        destination: The address that the client sent to, likewise. If only one
            of the two is IPv4, it is written v4-mapped, and the header as IPv6;
            v4-mapped addresses are otherwise written as IPv4.
        transport: Over which transport the client came.
        tlvs: Pairs (type, value) in the order in which they shall stand, type
            from 0 to 255 but not 3 (CRC32C), value at most 65535 bytes.
        crc32c: Whether to append a checksum of the header.

    Returns:
        The header: 28 bytes for IPv4, 52 for IPv6, 232 for UNIX, and 3 more for
        each TLV besides its value, the checksum being 4. Send it and the
        payload in one datagram.

    Raises:
        EncodeError: Addresses and TLVs exceed 65535 bytes, a unique id exceeds
            128 bytes, or CRC32C is among the TLVs.
        TypeError, ValueError: An argument is not what is described above.
    """

@overload
def encode(
    source: bytes,
    destination: bytes,
    *,
    transport: Literal[
        "unix-datagram", "unix-stream", Transport.UNIX_DATAGRAM, Transport.UNIX_STREAM
    ],
    tlvs: Iterable[tuple[int, ReadableBuffer]] = (),
    crc32c: bool = False,
) -> bytes: ...
def encode_local() -> bytes:
    """Writes the LOCAL header, which a proxy puts in front of datagrams of its own,
    such as health checks.

    Returns:
        The header, 16 bytes.
    """

@final
class Header:
    """A header that was read and found valid.

    Made by decode(). Immutable, hashable, and equal to headers of the same
    bytes. A property that reads a TLV returns None if the header has none of
    that type, reads the first if it has several, and raises TlvError if its
    value is not what the type promises; tlvs has the bytes of all.
    """

    @property
    def command(self) -> Command:
        """Whether the header speaks for a client ("proxy") or the proxy itself
        sent the datagram ("local"), as for a health check.
        """

    @property
    def transport(self) -> Transport | None:
        """Over which transport the client came, or None for LOCAL and UNSPEC."""

    @property
    def source(self) -> Address | bytes | None:
        """The client's address as the header has it, or None for LOCAL and UNSPEC.

        (host, port) for IPv4, (host, port, 0, 0) for IPv6, bytes without the
        padding for UNIX. A v4-mapped IPv6 address is left as it was sent.
        """

    @property
    def destination(self) -> Address | bytes | None:
        """The address that the client sent to, in the form of source, or None for
        LOCAL and UNSPEC.
        """

    @property
    def client(self) -> Address | None:
        """The client's address if the header names one over UDP, else None.

        None for LOCAL, UNSPEC, TCP and UNIX headers, for which a receiver of
        datagrams has no client; (host, port) for IPv4 and (host, port, 0, 0)
        for IPv6 otherwise.
        """

    @property
    def length(self) -> int:
        """Bytes of the whole header, 16 to 65551: signature, addresses and TLVs."""

    @property
    def skipped(self) -> bytes:
        """The bytes that must be ignored since the header is LOCAL or UNSPEC; empty
        for any other header.
        """

    @property
    def tlvs(self) -> tuple[Tlv, ...]:
        """The TLVs in the order in which they were sent, duplicates included. Empty
        for LOCAL and UNSPEC.
        """

    def tlv(self, type: int) -> bytes | None:
        """The value of the first TLV of a type from 0 to 255, or None."""

    @property
    def alpn(self) -> bytes | None:
        """The protocol that was negotiated with the client, such as b"h3"."""

    @property
    def authority(self) -> str | None:
        """The host name that the client asked for. TlvError if it is not UTF-8."""

    @property
    def crc32c(self) -> int | None:
        """The header's checksum, which decode() has verified."""

    @property
    def unique_id(self) -> bytes | None:
        """The flow's opaque id, at most 128 bytes."""

    @property
    def ssl(self) -> Ssl | None:
        """What the proxy knows of the client's TLS. TlvError if the value has less
        than 5 bytes, or the TLVs inside are not whole.
        """

    @property
    def netns(self) -> str | None:
        """The network namespace's name. TlvError if it is not ASCII."""

    @property
    def aws_vpc_endpoint_id(self) -> str | None:
        """Amazon: the id of the VPC endpoint that the client came through, such as
        "vpce-08d2bf15fac5001c9". TlvError for another subtype, or if it is not
        ASCII.
        """

    @property
    def azure_private_endpoint_link_id(self) -> int | None:
        """Azure: the link id of the private endpoint that the client came through,
        32 bits. TlvError for another subtype or length.
        """

    @property
    def gcp_psc_connection_id(self) -> int | None:
        """Google Cloud: the Private Service Connect connection that the client came
        through, 64 bits. TlvError if the value has another length.
        """

    def __bytes__(self) -> bytes: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Ssl:
    """What a proxy that ended the client's TLS knows of it.

    Read from Header.ssl. Immutable, hashable, and equal to those of the same
    bytes. A property that reads a TLV returns None if there is none of that
    type, and raises TlvError if its value is not the text that the type
    promises; tlvs has the bytes of all.
    """

    CLIENT_SSL: Final = 0x01
    CLIENT_CERT_CONN: Final = 0x02
    CLIENT_CERT_SESS: Final = 0x04

    @property
    def client(self) -> int:
        """The flags CLIENT_SSL, CLIENT_CERT_CONN and CLIENT_CERT_SESS, 8 bits."""

    @property
    def verify(self) -> int:
        """0 if the client's certificate was verified, else the verifier's error."""

    @property
    def is_tls(self) -> bool:
        """Whether the client connected over TLS."""

    @property
    def is_verified(self) -> bool:
        """Whether verify is 0. It says something of a certificate only where client
        says that there was one.
        """

    @property
    def version(self) -> str | None:
        """TLS version, such as "TLSv1.3". TlvError if it is not ASCII."""

    @property
    def common_name(self) -> str | None:
        """Common name of the client's certificate. TlvError if it is not UTF-8."""

    @property
    def cipher(self) -> str | None:
        """Cipher, such as "TLS_AES_128_GCM_SHA256". TlvError if it is not ASCII."""

    @property
    def signature_algorithm(self) -> str | None:
        """Algorithm that signed the proxy's certificate, such as "RSA-SHA256".
        TlvError if it is not ASCII.
        """

    @property
    def key_algorithm(self) -> str | None:
        """Key algorithm of the proxy's certificate, such as "RSA2048". TlvError if
        it is not ASCII.
        """

    @property
    def group(self) -> str | None:
        """Key exchange group, such as "X25519MLKEM768". TlvError if it is not ASCII."""

    @property
    def signature_scheme(self) -> str | None:
        """Signature scheme of the handshake, such as "ed25519". TlvError if it is
        not ASCII.
        """

    @property
    def client_certificate(self) -> bytes | None:
        """The client's certificate in DER."""

    @property
    def tlvs(self) -> tuple[Tlv, ...]:
        """The TLVs inside, in the order in which they were sent."""

    def __bytes__(self) -> bytes: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

def _header_of(header: bytes, /) -> Header: ...
def _ssl_of(value: bytes, /) -> Ssl: ...
