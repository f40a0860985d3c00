"""UDP ports of Twisted whose addresses are the clients'.

A server that calls `reactor.listenUDP(...)` calls `ppv2.twisted.listenUDP(reactor, ...,
trusted=...)` instead; its protocol stays as it is. Needs Twisted:
`pip install 'ppv2[twisted]'`.
"""

import errno
from collections.abc import Iterable
from typing import Any, Unpack

import ppv2
from ppv2 import TrustOptions
from ppv2._extras import needed_by

with needed_by(__name__):
    from twisted.internet import error, udp
    from twisted.internet.protocol import AbstractDatagramProtocol

__all__ = ["Port", "listenUDP"]


def listenUDP(  # noqa: N802
    reactor: Any,  # noqa: ANN401
    port: int,
    protocol: AbstractDatagramProtocol,
    interface: str = "",
    maxPacketSize: int = 8192,  # noqa: N803
    *,
    trusted: Iterable[object],
    **options: Unpack[TrustOptions],
) -> "Port":
    """Connects a protocol to a UDP port, as reactor.listenUDP().

    Args:
        reactor: The reactor, one that watches descriptors.
        port: The port to bind to, that which the proxy sends to.
        protocol: As for the reactor's method, and so are interface and maxPacketSize.
        interface: See protocol.
        maxPacketSize: See protocol. The header needs no room.
        trusted: As for ppv2.wrap().
        options: formats, untrusted, reply_from and so on, as for
            ppv2.wrap().

    Returns:
        The port, to be closed by stopListening(). `getHandle()` is a ppv2.Socket, which
        has stats().

    Raises:
        ValueError: Trust can't be used.
        CannotListenError: The address can't be bound.
    """
    listening = Port(port, protocol, interface, maxPacketSize, reactor)
    listening._trusted, listening._options = trusted, options
    listening.startListening()
    return listening


class Port(udp.Port):
    """A listening port, made by listenUDP()."""

    socket: ppv2.Socket  # type: ignore[assignment]
    _trusted: Iterable[object]
    _options: TrustOptions

    def _bindSocket(self) -> None:  # noqa: N802
        super()._bindSocket()
        plain: Any = self.socket
        try:
            self.socket = ppv2.wrap(plain, trusted=self._trusted, **self._options)
        except BaseException:
            self.connected = 0
            plain.close()
            raise
        self.fileno = self.socket.fileno  # type: ignore[method-assign]

    def write(
        self,
        datagram: bytes,
        addr: Any = None,  # noqa: ANN401
    ) -> None:
        """Sends a datagram to a client, IPv6 clients of an IPv4 port included.

        Args:
            datagram: The payload.
            addr: The client's address, best the object that datagramReceived() was
                given.

        Raises:
            ppv2.NoReplyPathError: The client was not heard from, or too long ago.
            MessageLengthError: The datagram is too long.
        """
        try:
            self.socket.sendto(datagram, addr)
        except OSError as failed:
            if failed.errno == errno.EMSGSIZE:
                raise error.MessageLengthError("message too long") from failed
            raise

    def connect(self, host: str, port: int) -> None:
        """Not possible: a server behind a proxy has many clients."""
        raise RuntimeError(
            f"connect: a port behind a proxy has many clients, and can't be connected to "
            f"{host}:{port} alone"
        )
