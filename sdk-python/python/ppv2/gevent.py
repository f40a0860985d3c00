"""UDP sockets and servers for gevent, with the clients' addresses.

A server that has a socket of gevent's, which it may owe to gevent.monkey, calls
`ppv2.gevent.wrap(sock, trusted=...)`. `ppv2.gevent.DatagramServer` stands for
`gevent.server.DatagramServer`. Needs gevent: `pip install 'ppv2[gevent]'`.
"""

import time
from _socket import dup
from collections.abc import Callable, Iterable
from typing import Any, Self, TypeVar, Unpack

import ppv2
from ppv2 import Address, Datagram, Stats, TrustOptions
from ppv2._extras import needed_by

with needed_by(__name__):
    import gevent
    import gevent.monkey
    import gevent.server
    import gevent.socket

__all__ = ["DatagramServer", "Socket", "wrap"]

_T = TypeVar("_T")


def wrap(
    sock: Any,  # noqa: ANN401
    *,
    trusted: Iterable[object],
    **options: Unpack[TrustOptions],
) -> "Socket":
    """Lets a UDP socket show its clients to greenlets, as ppv2.wrap().

    Args:
        sock: A bound UDP socket, gevent's or a plain one. It is left closed.
        trusted: As for ppv2.wrap().
        options: formats, untrusted, reply_from and so on, as for
            ppv2.wrap().

    Returns:
        The socket to use instead.

    Raises:
        TypeError, ValueError, OSError: As ppv2.wrap(); sock stays as it was.
    """
    make = gevent.monkey.get_original("socket", "socket")
    plain = make(sock.family, sock.type, sock.proto, fileno=dup(sock.fileno()))
    try:
        wrapped = ppv2.wrap(plain, trusted=trusted, **options)
    except BaseException:
        plain.close()
        raise
    timeout = sock.gettimeout()
    sock.close()
    return Socket(wrapped, timeout)


class Socket:
    """A ppv2.Socket that lets other greenlets run while it waits, made by wrap().

    Its methods are those of ppv2.Socket. As with gevent's own sockets one greenlet at a
    time may wait to receive, and one to send.
    """

    def __init__(self, sock: ppv2.Socket, timeout: float | None) -> None:
        sock.settimeout(0)
        self._sock = sock
        self._timeout = timeout
        loop = gevent.get_hub().loop
        self._readable, self._writable = (loop.io(sock.fileno(), event) for event in (1, 2))

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        # Methods that don't wait.
        return getattr(self._sock, name)

    def _until(
        self,
        ready: Any,  # noqa: ANN401
        flags: int,
        call: Callable[..., _T],
        *arguments: Any,  # noqa: ANN401
    ) -> _T:
        until = None if self._timeout is None else time.monotonic() + self._timeout
        while True:
            try:
                return call(*arguments)
            except BlockingIOError:
                # The one flag that there is, MSG_DONTWAIT, forbids it.
                if flags or self._timeout == 0:
                    raise
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError("timed out")
            gevent.socket.wait(ready, left, TimeoutError("timed out"))

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """As of ppv2.Socket, and so are all others."""
        return self._until(self._readable, flags, self._sock.recv, bufsize, flags)

    def recv_into(
        self,
        buffer: Any,  # noqa: ANN401
        nbytes: int = 0,
        flags: int = 0,
    ) -> int:
        """See recv()."""
        return self._until(self._readable, flags, self._sock.recv_into, buffer, nbytes, flags)

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> tuple[bytes, Address]:
        """See recv()."""
        return self._until(self._readable, flags, self._sock.recvfrom, bufsize, flags)

    def recvfrom_into(
        self,
        buffer: Any,  # noqa: ANN401
        nbytes: int = 0,
        flags: int = 0,
    ) -> tuple[int, Address]:
        """See recv()."""
        return self._until(self._readable, flags, self._sock.recvfrom_into, buffer, nbytes, flags)

    def recvmsg(
        self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /
    ) -> tuple[bytes, list[tuple[int, int, bytes]], int, Address]:
        """See recv()."""
        return self._until(self._readable, flags, self._sock.recvmsg, bufsize, ancbufsize, flags)

    def recvmsg_into(
        self, buffers: Iterable[Any], ancbufsize: int = 0, flags: int = 0, /
    ) -> tuple[int, list[tuple[int, int, bytes]], int, Address]:
        """See recv()."""
        receive = self._sock.recvmsg_into
        return self._until(self._readable, flags, receive, list(buffers), ancbufsize, flags)

    def recv_datagram(self) -> Datagram:
        """See recv()."""
        return self._until(self._readable, 0, self._sock.recv_datagram)

    def recv_batch(self, n: int, /) -> list[tuple[bytes, Address]]:
        """See recv()."""
        return self._until(self._readable, 0, self._sock.recv_batch, n)

    def sendto(self, data: Any, *flags_and_address: Any) -> int:  # noqa: ANN401
        """See recv()."""
        flags = flags_and_address[0] if len(flags_and_address) > 1 else 0
        return self._until(self._writable, flags, self._sock.sendto, data, *flags_and_address)

    def sendmsg(
        self,
        buffers: Iterable[Any],
        ancdata: Iterable[tuple[int, int, Any]] = (),
        flags: int = 0,
        address: Address | None = None,
        /,
    ) -> int:
        """See recv()."""
        arguments = list(buffers), list(ancdata), flags, address
        return self._until(self._writable, flags, self._sock.sendmsg, *arguments)

    def send_batch(self, datagrams: Iterable[tuple[Any, Address]], /) -> int:
        """See recv()."""
        return self._until(self._writable, 0, self._sock.send_batch, list(datagrams))

    def fileno(self) -> int:
        """See recv()."""
        return self._sock.fileno()

    def stats(self) -> Stats:
        """See recv()."""
        return self._sock.stats()

    def settimeout(self, value: float | None, /) -> None:
        """See recv()."""
        if value is not None and not value >= 0:
            raise ValueError("Timeout value out of range")
        self._timeout = value

    def gettimeout(self) -> float | None:
        """See recv()."""
        return self._timeout

    @property
    def timeout(self) -> float | None:
        """See recv()."""
        return self._timeout

    def setblocking(self, flag: bool, /) -> None:  # noqa: FBT001
        """See recv()."""
        self.settimeout(None if flag else 0)

    def getblocking(self) -> bool:
        """See recv()."""
        return self._timeout != 0

    def close(self) -> None:
        """Closes the socket. A greenlet that waits for it is woken up by an OSError."""
        if self._sock.fileno() >= 0:
            gevent.get_hub().cancel_waits_close_and_then(
                (self._readable, self._writable), gevent.socket.cancel_wait_ex, self._sock.close
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DatagramServer(gevent.server.DatagramServer):
    """A gevent.server.DatagramServer behind a proxy: `handle` is given payloads and
    clients' addresses.

    Args:
        listener: As for gevent's server, and so are handle and spawn.
        handle: See listener.
        spawn: See listener.
        trusted: As for ppv2.wrap().
        options: formats, untrusted, reply_from and so on, as for
            ppv2.wrap().

    Raises:
        ValueError: Trust can't be used; when it starts.
        OSError: The address can't be bound; when it starts.
    """

    socket: Any

    def __init__(
        self,
        listener: Any,  # noqa: ANN401
        handle: Callable[[bytes, Any], object] | None = None,
        spawn: Any = "default",  # noqa: ANN401
        *,
        trusted: Iterable[object],
        **options: Unpack[TrustOptions],
    ) -> None:
        self._trusted = trusted
        self._options = options
        super().__init__(listener, handle, spawn)

    def init_socket(self) -> None:
        """Binds the socket, which from then on is a ppv2.gevent.Socket."""
        super().init_socket()
        if not isinstance(self.socket, Socket):
            self.socket = wrap(self.socket, trusted=self._trusted, **self._options)
        # What it receives with, which must not wait.
        self._socket = self.socket._sock
