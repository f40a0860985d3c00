"""The UDP servers of `socketserver`, with the clients' addresses.

class Whoami(socketserver.DatagramRequestHandler):
    def handle(self):
        host, port = self.client_address[:2]
        self.wfile.write(f"{host}:{port}".encode())

with ppv2.socketserver.UDPServer(("", 9000), Whoami, trusted=["192.0.2.10"]) as server:
    server.serve_forever()
"""

import socket
import socketserver
from collections.abc import Callable, Iterable
from typing import Any, Unpack

import ppv2
from ppv2 import Address, TrustOptions

__all__ = ["ThreadingUDPServer", "UDPServer"]

# Where there is no such flag, ppv2.Socket has it all the same.
_DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0x40)


class UDPServer(socketserver.UDPServer):
    """`socketserver.UDPServer` behind a proxy: handlers see clients' addresses, and
    answer with the socket in their request as ever.

    Args:
        server_address: As for socketserver.UDPServer, and so are
            RequestHandlerClass and bind_and_activate.
        RequestHandlerClass: See server_address.
        bind_and_activate: See server_address.
        trusted: As for ppv2.wrap().
        options: formats, untrusted, reply_from and so on, as for
            ppv2.wrap().

    Raises:
        ValueError: Trust can't be used.
        OSError: The address can't be bound.
    """

    def __init__(
        self,
        server_address: tuple[str, int],
        RequestHandlerClass: Callable[[Any, Any, Any], socketserver.BaseRequestHandler],  # noqa: N803
        bind_and_activate: bool = True,  # noqa: FBT001, FBT002
        *,
        trusted: Iterable[object],
        **options: Unpack[TrustOptions],
    ) -> None:
        self._trusted = trusted
        self._options = options
        super().__init__(server_address, RequestHandlerClass, bind_and_activate)

    def server_bind(self) -> None:
        """Binds the socket, which from then on is a ppv2.Socket."""
        super().server_bind()
        self.socket = ppv2.wrap(  # type: ignore[assignment]
            self.socket, trusted=self._trusted, **self._options
        )

    def get_request(  # type: ignore[override]
        self,
    ) -> tuple[tuple[bytes, Any], Address]:
        """The next datagram of a client; BlockingIOError if what came was none, on
        which the server goes back to waiting.
        """
        # It must not wait: serve_forever() would not hear of shutdown().
        data, address = self.socket.recvfrom(self.max_packet_size, _DONTWAIT)
        return (data, self.socket), address


class ThreadingUDPServer(socketserver.ThreadingMixIn, UDPServer):
    """A UDPServer that handles each datagram in a thread of its own."""
