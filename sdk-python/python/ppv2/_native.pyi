"""Codec and sockets, compiled. Everything here is public as `ppv2.…`, if it is at all."""

import socket
from collections.abc import Iterable
from typing import Final, Literal, NoReturn, Self, final, overload

from _typeshed import ReadableBuffer, WriteableBuffer

from ppv2._types import Address, Command, Datagram, Stats, Tlv, Transport

__all__ = [
    "Header",
    "Socket",
    "Ssl",
    "_ReplyPath",
    "__version__",
    "_header_of",
    "_ssl_of",
    "decode",
    "encode",
    "encode_local",
    "wrap",
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

    @property
    def reply_tag(self) -> bytes | None:
        """The tag that a server returns with its replies to this client: the TLV's 10
        bytes. None without a tag of version 1, and None with two of them.
        """

    def __bytes__(self) -> bytes: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Socket:
    """A UDP socket whose addresses are its clients', made by wrap().

    It has the methods that a UDP server uses, with the arguments and results of
    socket.socket; a method that is not here could hand a header to the
    application. Datagrams that must be dropped are dropped and counted in
    stats(); they never raise, and never prolong a timeout.

    An address that it reports equals an ordinary one, in the form of the socket's
    family: (host, port) on an AF_INET socket, IPv6 clients too;
    (host, port, flowinfo, scope_id) on an AF_INET6 one, IPv4 clients as
    "::ffff:192.0.2.1".
    Pass the object itself to sendto(): then the reply takes the listener and the
    proxy that the datagram came through. A reply to an equal tuple takes those of the
    client's latest datagram.

    All methods may be called from several threads.
    """

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """Receives one client's datagram.

        Args:
            bufsize: The most bytes to return; the rest of a longer payload is
                lost. The header needs no room.
            flags: 0 or MSG_DONTWAIT.

        Returns:
            The payload without any header; possibly empty.

        Raises:
            TimeoutError: The timeout passed, bad datagrams or not.
            BlockingIOError: There is no datagram, and the socket is non-blocking;
                or 64 had to be dropped, and more may be there.
            OSError: The socket is closed or broken; never what somebody sent.
        """

    def recv_into(self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0) -> int:
        """Receives one client's datagram into a buffer.

        Args:
            buffer: A writable bytes-like object.
            nbytes: The most bytes to write; 0 for all that there is room for.
            flags: 0 or MSG_DONTWAIT.

        Returns:
            How many bytes were written.

        Raises:
            As recv().
        """

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> tuple[bytes, Address]:
        """Receives one client's datagram and the client's address.

        Args:
            bufsize: As for recv().
            flags: As for recv().

        Returns:
            The payload and the client's address.

        Raises:
            As recv().
        """

    def recvfrom_into(
        self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0
    ) -> tuple[int, Address]:
        """Receives one client's datagram into a buffer, and the client's address.

        Args:
            buffer: As for recv_into().
            nbytes: As for recv_into().
            flags: As for recv_into().

        Returns:
            How many bytes were written, and the client's address.

        Raises:
            As recv().
        """

    def recv_datagram(self) -> Datagram:
        """Receives one client's datagram with all that is known of it.

        Returns:
            Payload, client, destination, proxy and header.

        Raises:
            As recv().
        """

    def recv_batch(self, n: int, /) -> list[tuple[bytes, Address]]:
        """Receives datagrams of clients, many in one call.

        Waits for the first as recv() does, and then takes those that are there
        already.

        Args:
            n: The most datagrams to return, from 1 to 1024. After enable_gro()
                what the kernel joined counts as one.

        Returns:
            Payloads and clients' addresses in the order in which they came; at
            least one.

        Raises:
            As recv().
        """

    def enable_gro(self) -> bool:
        """Has the kernel join datagrams of one proxy that arrive in a row, which
        makes receiving bursts much cheaper (UDP_GRO of Linux).

        From then on only recv_batch() receives: other calls have no place for
        the rest of a burst, and raise.

        Returns:
            Whether the system can.

        Raises:
            OSError: The socket is closed.
        """

    def recvmsg(
        self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /
    ) -> tuple[bytes, list[tuple[int, int, bytes]], int, Address]:
        """Receives one client's datagram, ancillary data and the client's address.

        Args:
            bufsize: As for recv().
            ancbufsize: The most bytes of ancillary data to receive.
            flags: As for recv().

        Returns:
            (data, ancdata, msg_flags, address): the payload, a list of (level,
            type, data), flags such as MSG_TRUNC, and the client's address.
            What ancillary data say of addresses is said of the proxy's datagram.

        Raises:
            As recv().
        """

    def recvmsg_into(
        self, buffers: Iterable[WriteableBuffer], ancbufsize: int = 0, flags: int = 0, /
    ) -> tuple[int, list[tuple[int, int, bytes]], int, Address]:
        """Receives one client's datagram into buffers, ancillary data and the
        client's address.

        Args:
            buffers: Writable bytes-like objects, filled one after the other.
            ancbufsize: As for recvmsg().
            flags: As for recv().

        Returns:
            (nbytes, ancdata, msg_flags, address): how many bytes were written, and
            the rest as of recvmsg().

        Raises:
            As recv().
        """

    @overload
    def sendto(self, data: ReadableBuffer, address: Address, /) -> int:
        """Sends a datagram to a client. The arguments are (data, address) or
        (data, flags, address).

        Args:
            data: The payload, any bytes-like object.
            flags: 0 or MSG_DONTWAIT.
            address: The client's address, best the object that a receive call
                returned.

        Returns:
            How many bytes were sent.

        Raises:
            NoReplyPathError: Nothing was received from the client, or too long ago; or
                10 seconds ago, and the proxy's address has named another client since.
            TimeoutError, BlockingIOError: There is no room to send, and the
                timeout passed or the socket is non-blocking.
            OSError: The datagram could not be sent.
        """

    @overload
    def sendto(self, data: ReadableBuffer, flags: int, address: Address, /) -> int: ...
    def send_batch(self, datagrams: Iterable[tuple[ReadableBuffer, Address]], /) -> int:
        """Sends datagrams to clients, many in one call. What goes to one client in a
        row leaves as a burst (UDP_SEGMENT of Linux); so does what goes to different
        clients through one address of a proxy that sends reply tags.

        Args:
            datagrams: Payloads and clients' addresses, each as for sendto().

        Returns:
            How many datagrams, from the first on, are dealt with: sent, or, without
            a reply path to their client, counted in stats() and left out. Less than
            all if one of the rest can't be sent; sending that again says why.

        Raises:
            TimeoutError, BlockingIOError, OSError: As sendto(), if the first
                datagram can't be sent.
        """

    def sendmsg(
        self,
        buffers: Iterable[ReadableBuffer],
        ancdata: Iterable[tuple[int, int, ReadableBuffer]] = (),
        flags: int = 0,
        address: Address | None = None,
        /,
    ) -> int:
        """Sends a datagram, put together of parts, to a client.

        Args:
            buffers: The payload's parts, bytes-like objects.
            ancdata: Ancillary data: (level, type, data) of each. None with
                reply_from="listener".
            flags: As for sendto().
            address: As for sendto(); it can't be left out.

        Returns:
            How many bytes were sent.

        Raises:
            As sendto().
        """

    def stats(self) -> Stats:
        """What the socket has received, dropped and sent so far."""

    def fileno(self) -> int:
        """The descriptor, to wait on with select or selectors; -1 once closed. What
        is read from it directly has its headers.
        """

    def getsockname(self) -> Address:
        """The address that the socket is bound to."""

    def getpeername(self) -> NoReturn:
        """An OSError, ENOTCONN, as of any socket that was not connected: clients are
        many.
        """

    @overload
    def getsockopt(self, level: int, optname: int, /) -> int:
        """An option's value, as socket.getsockopt()."""

    @overload
    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...
    def setsockopt(
        self,
        level: int,
        optname: int,
        value: int | ReadableBuffer | None,
        optlen: int | None = None,
        /,
    ) -> None:
        """Sets an option, as socket.setsockopt().

        Raises:
            ValueError: The option is UDP_GRO, which would join datagrams.
        """

    def settimeout(self, value: float | None, /) -> None:
        """Sets for how many seconds a call may wait: None for ever, 0 not at all. A
        receive call keeps to it however many bad datagrams come.
        """

    def gettimeout(self) -> float | None:
        """For how many seconds a call may wait, or None."""

    @property
    def timeout(self) -> float | None:
        """For how many seconds a call may wait, or None."""

    def setblocking(self, flag: bool, /) -> None:
        """Whether calls may wait: settimeout(None) or settimeout(0)."""

    def getblocking(self) -> bool:
        """Whether calls may wait, for however long."""

    @property
    def family(self) -> socket.AddressFamily:
        """The address family."""

    @property
    def type(self) -> socket.SocketKind:
        """The socket type, SOCK_DGRAM."""

    @property
    def proto(self) -> int:
        """The protocol's number."""

    def close(self) -> None:
        """Closes the socket. A call that waits in another thread is not woken up."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_args: object) -> None: ...

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

def wrap(
    sock: socket.socket,
    *,
    trusted: Iterable[object],
    formats: Iterable[Literal["v2", "spp"]] = ["v2"],
    untrusted: Literal["drop", "accept"] = "drop",
    reply_from: Literal["proxy", "listener"] = "proxy",
    max_header_len: int = 512,
    max_clients: int = 65536,
    forget_after: float = 120.0,
    remember_senders: float | None = None,
    max_senders: int = 100000,
    header_alone: Literal["announce", "deliver"] = "announce",
) -> Socket:
    """Lets a UDP socket show its clients instead of the proxy in front of it.

    Args:
        sock: A bound UDP socket, IPv4 or IPv6. Its descriptor, options and
            timeout pass to the new socket; sock itself is left closed, as after
            detach().
        trusted: The networks whose datagrams must carry a header, such as
            ["192.0.2.10", "2001:db8::/64"], as text or objects of ipaddress.
            A host in one of them can speak for any client, so name only the
            proxies.
        formats: How trusted senders may write headers: "v2" (PROXY protocol v2), "spp"
            (Simple Proxy Protocol of Cloudflare Spectrum and Tencent EdgeOne, whose
            replies get the same header in front), or both. One must be there: the
            first bytes only tell which it is.
        untrusted: What to do with a datagram from elsewhere: "drop" it, or "accept"
            it as one of a client that is not behind a proxy, payload untouched.
        reply_from: Where replies to clients behind a proxy leave from: "proxy"
            sends them through it, "listener" straight to the client from the
            address that it wrote to, for a proxy with mode = "dsr" and
            rewrite_on = "sdk". This host needs the right to send from there: the
            address is one of its own, or an IPv6 one (Linux), or the process has
            CAP_NET_RAW (Linux).
        max_header_len: The longest PROXY v2 header to accept, in bytes, at least 28.
        max_clients: How many clients are remembered, at about 1 kB each. Beyond
            that a new one replaces the one that has been silent for longest.
        forget_after: For how many seconds after its latest datagram a client can
            be sent to.
        remember_senders: For how many seconds after a sender's latest datagram its
            datagrams without header belong to the client that its latest header
            named; None for senders that put a header in front of each. nginx, frp,
            Cloudflare Spectrum and emit = "first" of ppv2-proxy say it once. That
            is outside the specification. A port that a sender uses again can be
            taken for the client that was there before, and a client whose datagrams
            pass without header can write one of its own. So use it for senders that
            drop such datagrams, or clients that don't forge, and set it above the time
            for which the sender keeps a silent session, below that after which it uses
            a port again. Not with formats "spp".
        max_senders: How many senders are remembered, at about 100 bytes each. Beyond
            that those remembered stay, and new ones need a header in each datagram.
        header_alone: What a header without payload is while remember_senders is
            set: "announce" takes it for the name of the client alone, "deliver" for
            an empty datagram as well.

    Returns:
        The socket to use instead.

    Raises:
        ValueError: A network or another argument is not what is described
            above, or nothing could ever be received: sock is not bound, or
            none of the networks is of its family.
        TypeError: An argument is of another type; sock is one of gevent's.
        OSError: The socket is closed, or there are no descriptors left.
    """

@final
class _ReplyPath: ...

def _header_of(header: bytes, /) -> Header: ...
def _ssl_of(value: bytes, /) -> Ssl: ...
