"""Datagram endpoints of asyncio whose addresses are the clients'.

A server that calls `loop.create_datagram_endpoint(...)` calls
`ppv2.asyncio.create_datagram_endpoint(..., trusted=...)` instead; its protocol
stays as it is. The transport is one of ours, on every loop that can watch a
descriptor: uvloop's own reads the descriptor itself, past any Python object.

A library that calls the loop's method by itself is served by `install()`.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Self, TypeGuard, TypeVar, Unpack

import ppv2
from ppv2 import Address, TrustOptions
from ppv2._transport import DatagramTransport

__all__ = ["DatagramTransport", "Installation", "create_datagram_endpoint", "install"]

_LOGGER = logging.getLogger("ppv2")

_Protocol = TypeVar("_Protocol", bound=asyncio.DatagramProtocol)


async def create_datagram_endpoint(
    protocol_factory: Callable[[], _Protocol],
    local_addr: tuple[str, int] | None = None,
    remote_addr: None = None,
    *,
    family: int = 0,
    proto: int = 0,
    flags: int = 0,
    reuse_port: bool | None = None,
    allow_broadcast: bool | None = None,
    sock: socket.socket | None = None,
    trusted: Iterable[object],
    **options: Unpack[TrustOptions],
) -> tuple["DatagramTransport", _Protocol]:
    """Creates a datagram endpoint in the running loop, as the loop's method of the
    same name.

    Args:
        protocol_factory: Makes the protocol, whose datagram_received() is given
            payloads and clients' addresses.
        local_addr: Host and port to bind to, those that the proxy sends to.
        remote_addr: Only None: clients are many.
        family: As for the loop's method, and so are proto, flags, reuse_port and
            allow_broadcast.
        proto: See family.
        flags: See family.
        reuse_port: See family.
        allow_broadcast: See family.
        sock: A bound UDP socket to use in place of all these. As with the loop's
            method it stays open, is the transport's from then on, and is closed with
            it; if this raises, it is still the caller's.
        trusted: As for ppv2.wrap().
        options: formats, untrusted, reply_from and so on, as for
            ppv2.wrap().

    Returns:
        The transport and the protocol. `transport.get_extra_info("socket")` is a
        ppv2.Socket, which has stats().

    Raises:
        ValueError: Arguments contradict each other, or trust can't be used.
        OSError: No address could be bound; the first error.
        NotImplementedError: The loop can't watch a descriptor, as the proactor
            loop of Windows.
    """
    loop = asyncio.get_running_loop()
    if remote_addr is not None:
        raise ValueError("remote_addr: a server behind a proxy has many clients; leave it out")
    if (local_addr is None) == (sock is None):
        raise ValueError("expected either local_addr or sock")
    if sock is None:
        bound = await _bind(
            loop,
            local_addr,
            family=family,
            proto=proto,
            flags=flags,
            reuse_port=reuse_port,
            allow_broadcast=allow_broadcast,
        )
    elif family or proto or flags or reuse_port or allow_broadcast:
        raise ValueError(
            "family, proto, flags, reuse_port and allow_broadcast can't be used with sock"
        )
    else:
        bound = _duplicate(sock)
    return _open(loop, protocol_factory, bound, trusted, options, brought=sock)


def _open(
    loop: asyncio.AbstractEventLoop,
    protocol_factory: Callable[[], _Protocol],
    bound: socket.socket,
    trusted: Iterable[object],
    options: TrustOptions,
    brought: socket.socket | None = None,
) -> tuple[DatagramTransport, _Protocol]:
    """The endpoint on a bound socket, which is closed if it can't be made."""
    try:
        wrapped = ppv2.wrap(bound, trusted=trusted, **options)
    except BaseException:
        bound.close()
        raise
    try:
        wrapped.settimeout(0)
        protocol = protocol_factory()
        transport = DatagramTransport(loop, wrapped, protocol)
        protocol.connection_made(transport)
        transport._start()
    except BaseException:
        wrapped.close()
        raise
    transport._brought = brought
    return transport, protocol


async def _bind(
    loop: asyncio.AbstractEventLoop,
    local_addr: tuple[str, int] | None,
    *,
    family: int = 0,
    proto: int = 0,
    flags: int = 0,
    reuse_port: bool | None = None,
    allow_broadcast: bool | None = None,
) -> socket.socket:
    if not isinstance(local_addr, tuple) or len(local_addr) != 2:
        raise TypeError(f"local_addr: expected (host, port), got {local_addr!r}")
    host, port = local_addr
    found = await loop.getaddrinfo(
        host, port, family=family, type=socket.SOCK_DGRAM, proto=proto, flags=flags
    )
    failed: OSError | None = None
    for its_family, its_type, its_proto, _, address in found:
        try:
            sock = socket.socket(its_family, its_type, its_proto)
        except OSError as error:
            failed = failed or error
            continue
        try:
            if reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if allow_broadcast:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sock.bind(address)
        except OSError as error:
            sock.close()
            failed = failed or error
        else:
            return sock
    raise failed or OSError(f"local_addr: no address found for {local_addr!r}")


def _duplicate(sock: socket.socket) -> socket.socket:
    """A socket of our own for the same port, since ppv2.wrap() closes what it is given."""
    if not isinstance(sock, socket.socket):
        raise TypeError(f"sock: expected a UDP socket as it is before ppv2.wrap(), got {sock!r}")
    bound = socket.fromfd(sock.fileno(), sock.family, sock.type, sock.proto)
    # As the loop does.
    sock.settimeout(0)
    return bound


def install(
    loop: asyncio.AbstractEventLoop | None = None,
    *,
    addresses: Iterable[Address],
    trusted: Iterable[object],
    **options: Unpack[TrustOptions],
) -> "Installation":
    """Has libraries that call `loop.create_datagram_endpoint()` by themselves see their
    clients: from now on, endpoints bound to the named addresses are those of
    ppv2.asyncio.create_datagram_endpoint().

    Whatever else is opened on the loop stays as it is: other addresses, endpoints with
    a remote_addr, sockets that are connected. Of several installations that name an
    address, the latest decides.

        with ppv2.asyncio.install(addresses=[("0.0.0.0", 4433)], trusted=["192.0.2.10"]):
            await hypercorn.asyncio.serve(app, config)

    Args:
        loop: The event loop; the running one if left out.
        addresses: Pairs (host, port) that the proxy sends to, as the library binds
            them: host is an IP address, "0.0.0.0" and "::" being addresses like others.
        trusted: As for ppv2.wrap().
        options: formats, untrusted, reply_from and so on, as for
            ppv2.wrap().

    Returns:
        What undoes it, at the end of a with-block or by undo().

    Raises:
        ValueError: An address is not what is described above, or trust can't be used.
        RuntimeError: No loop is given, and none is running.
        TypeError: The loop takes no other method than its own.
    """
    if loop is None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError(
                "loop: no event loop is running; call install() in a coroutine, or pass the loop"
            ) from None
    named = {_named(address) for address in addresses}
    if not named:
        raise ValueError("addresses: expected at least one (host, port), got none")
    if "formats" in options:
        # Each endpoint reads them.
        options["formats"] = list(options["formats"])
    installation = Installation(_Layer.of(loop), named, list(trusted), options)
    installation._layer.add(installation)
    return installation


_Name = tuple[IPv4Address | IPv6Address, int]


def _named(address: Address) -> _Name:
    try:
        host, port, *_ = address
        name = ip_address(host), int(port)
    except (TypeError, ValueError):
        name = None
    if name is None or not 0 < name[1] < 65536:
        raise ValueError(f"addresses: expected pairs (IP address, port), got {address!r}")
    return name


class Installation:
    """What install() has changed; a with-block undoes it at its end."""

    def __init__(
        self, layer: "_Layer", named: set[_Name], trusted: list[object], options: TrustOptions
    ) -> None:
        self._layer = layer
        self._named = named
        self._trusted = trusted
        self._options = options
        for host, _ in named:
            self._check_trust(str(host))

    def undo(self) -> None:
        """Leaves endpoints that are opened from now on to the loop, or to what was
        installed before. Those that are open stay as they are.
        """
        self._layer.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def _check_trust(self, host: str) -> None:
        """An error now rather than in the library, which may keep it to itself."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            try:
                sock.bind((host, 0))
            except OSError:
                # The address may come later.
                return
            ppv2.wrap(sock, trusted=self._trusted, **self._options).close()


class _Layer:
    """What stands before a loop's create_datagram_endpoint() while anything is installed."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._beneath = loop.create_datagram_endpoint
        self._installations: list[Installation] = []

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> "_Layer":
        """The loop's, if it is the outermost, else a new one."""
        found = getattr(loop.create_datagram_endpoint, "__self__", None)
        return found if isinstance(found, cls) else cls(loop)

    def add(self, installation: Installation) -> None:
        if not self._installations:
            self._set(self.create_datagram_endpoint)
        self._installations.append(installation)

    def remove(self, installation: Installation) -> None:
        if installation not in self._installations:
            return
        self._installations.remove(installation)
        # Somebody else may have put a method of theirs before this one since.
        outermost = self._loop.create_datagram_endpoint == self.create_datagram_endpoint
        if outermost and not self._installations:
            self._set(self._beneath)

    def _set(self, method: Any) -> None:  # noqa: ANN401
        try:
            self._loop.create_datagram_endpoint = method  # type: ignore[method-assign]
        except AttributeError:
            raise TypeError(f"loop: methods of {self._loop!r} can't be replaced") from None

    async def create_datagram_endpoint(
        self,
        protocol_factory: Callable[[], Any],
        local_addr: Any = None,  # noqa: ANN401
        remote_addr: Any = None,  # noqa: ANN401
        *,
        sock: Any = None,  # noqa: ANN401
        **options: Any,  # noqa: ANN401
    ) -> tuple[asyncio.BaseTransport, Any]:
        """As the loop's method: its endpoint, or ours."""
        if sock is None and remote_addr is None and self._names_port_of(local_addr):
            # Which of its addresses a host name leads to is known once it is bound.
            bound = await _bind(self._loop, local_addr, **options)
            if found := self._installed_for(bound):
                return _open(self._loop, protocol_factory, bound, found._trusted, found._options)
            try:
                return await self._beneath(protocol_factory, sock=bound)
            except BaseException:
                bound.close()
                raise
        if found := self._installed_for(sock):
            return await create_datagram_endpoint(
                protocol_factory,
                local_addr,
                remote_addr,
                sock=sock,
                trusted=found._trusted,
                **found._options,
                **options,
            )
        return await self._beneath(protocol_factory, local_addr, remote_addr, sock=sock, **options)

    def _names_port_of(self, local_addr: object) -> bool:
        match local_addr:
            case (_, port):
                ports = {str(named) for one in self._installations for _, named in one._named}
                return str(port) in ports
        return False

    def _installed_for(self, sock: object) -> Installation | None:
        """The latest installation that names the address of a server's socket."""
        if not _is_servers(sock):
            return None
        host, port, *_ = sock.getsockname()
        for installation in reversed(self._installations):
            if (ip_address(host), port) in installation._named:
                return installation
        named = {name for one in self._installations for name in one._named if name[1] == port}
        if named:
            _LOGGER.warning(
                "the datagram endpoint at %s, port %s, is not one that install() named, which are "
                "%s: its protocol is handed headers and the proxy's address",
                host,
                port,
                ", ".join(f"{ip}, port {port}" for ip, _ in sorted(named, key=str)),
            )
        return None


def _is_servers(sock: object) -> TypeGuard[socket.socket]:
    """Whether clients write to a socket, which is then bound and not connected."""
    if not isinstance(sock, socket.socket) or sock.type != socket.SOCK_DGRAM:
        return False
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    try:
        sock.getpeername()
    except OSError:
        return True
    return False
