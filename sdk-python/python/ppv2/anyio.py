"""A UDP socket for anyio, on asyncio and trio alike, with the clients' addresses.

    async with await ppv2.anyio.create_udp_socket(
        local_host="0.0.0.0", local_port=9000, trusted=["192.0.2.10"]
    ) as udp:
        async for payload, client in udp:
            await udp.send((payload, client))

Needs anyio: `pip install 'ppv2[anyio]'`.
"""

import socket
from collections.abc import Iterable
from typing import Self, Unpack

import ppv2
from ppv2 import Address, Datagram, Stats, TrustOptions
from ppv2._extras import needed_by

with needed_by(__name__):
    import anyio
    import anyio.abc
    import anyio.lowlevel

__all__ = ["UDPSocket", "create_udp_socket"]


async def create_udp_socket(
    family: socket.AddressFamily = socket.AF_UNSPEC,
    *,
    local_host: str | None = None,
    local_port: int = 0,
    reuse_port: bool = False,
    trusted: Iterable[object],
    **options: Unpack[TrustOptions],
) -> "UDPSocket":
    """Makes a UDP socket, as anyio.create_udp_socket().

    Args:
        family: AF_INET or AF_INET6, if local_host does not say.
        local_host: The address to bind to; all of the host's if left out.
        local_port: The port to bind to, that which the proxy sends to.
        reuse_port: Whether other sockets may bind to it too.
        trusted: As for ppv2.wrap().
        options: formats, untrusted, reply_from and so on, as for
            ppv2.wrap().

    Raises:
        ValueError: Neither family nor local_host is given, or trust can't be used.
        OSError: The address can't be bound.
    """
    if family == socket.AF_UNSPEC and not local_host:
        raise ValueError('Either "family" or "local_host" must be given')
    found = await anyio.getaddrinfo(
        local_host, local_port, family=family, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE
    )
    its_family, its_type, its_proto, _, address = found[0]
    sock = socket.socket(its_family, its_type, its_proto)
    try:
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        return UDPSocket(ppv2.wrap(sock, trusted=trusted, **options))
    except BaseException:
        sock.close()
        raise


class UDPSocket(anyio.abc.AsyncResource):
    """A UDP socket whose addresses are its clients'.

    Args:
        sock: What ppv2.wrap() returned; it is owned from then on.
    """

    def __init__(self, sock: ppv2.Socket) -> None:
        sock.settimeout(0)
        self._sock = sock

    async def receive(self) -> tuple[bytes, Address]:
        """The next payload and its client's address.

        Raises:
            anyio.ClosedResourceError: The socket is closed.
            anyio.BusyResourceError: Another task is receiving.
        """
        datagram = await self.receive_datagram()
        return datagram.payload, datagram.client

    async def receive_datagram(self) -> Datagram:
        """The next datagram with all that is known of it. Raises as receive()."""
        await anyio.lowlevel.checkpoint()
        while True:
            self._check_open()
            try:
                return self._sock.recv_datagram()
            except BlockingIOError:
                await anyio.wait_readable(self._sock)

    async def send(self, item: tuple[bytes, Address]) -> None:
        """Sends a payload to a client's address.

        Raises:
            ppv2.NoReplyPathError: The client was not heard from, or too long ago.
            anyio.ClosedResourceError: The socket is closed.
            anyio.BusyResourceError: Another task is waiting to send.
            OSError: The datagram could not be sent.
        """
        await anyio.lowlevel.checkpoint()
        while True:
            self._check_open()
            try:
                self._sock.sendto(*item)
            except BlockingIOError:
                await anyio.wait_writable(self._sock)
            else:
                return

    async def sendto(self, data: bytes, host: str, port: int) -> None:
        """Sends to a client by the path of its latest datagram."""
        await self.send((data, (host, port)))

    async def aclose(self) -> None:
        """Closes the socket."""
        if self._sock.fileno() >= 0:
            anyio.notify_closing(self._sock)
            self._sock.close()
        await anyio.lowlevel.checkpoint()

    def stats(self) -> Stats:
        """What the socket has received, dropped and sent so far."""
        return self._sock.stats()

    def getsockname(self) -> Address:
        """The address that the socket is bound to."""
        return self._sock.getsockname()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[bytes, Address]:
        try:
            return await self.receive()
        except anyio.ClosedResourceError:
            raise StopAsyncIteration from None

    def _check_open(self) -> None:
        if self._sock.fileno() < 0:
            raise anyio.ClosedResourceError
