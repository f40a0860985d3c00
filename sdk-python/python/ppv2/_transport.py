"""The transport of ppv2.asyncio: datagrams between a ppv2.Socket and a protocol, on any
loop that can watch a descriptor.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from ppv2 import Address, Socket

# Datagrams that are handed on after one wake-up. More would hold up the loop's other
# work.
_MOST_AT_ONCE = 32

# A batch of one costs more than receiving it alone, so after one so many datagrams
# are received singly before a batch is tried again.
_SINGLY = 15

_LONGEST = 65535

# As asyncio's own transports.
_HIGH_WATER = 64 * 1024

# What a datagram that is kept costs besides its payload: the objects for both, and its
# place in the queue.
_ENTRY = 128

# Clients decide how much there is to answer, and a protocol may not care for
# pause_writing(): beyond so many bytes, or twice the high-water mark, nothing is kept.
_MOST_UNSENT = 4 * 1024 * 1024


class DatagramTransport(asyncio.DatagramTransport):
    """The transport of an endpoint, made by create_datagram_endpoint()."""

    __module__ = "ppv2.asyncio"

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: Socket, protocol: asyncio.DatagramProtocol
    ) -> None:
        super().__init__({"socket": sock, "sockname": sock.getsockname(), "peername": None})
        self._loop = loop
        self._sock = sock
        # The socket that the caller brought, of which self._sock is a duplicate.
        self._brought: socket.socket | None = None
        self._fd = sock.fileno()
        self._protocol = protocol
        self._closing = False
        self._at_once = 2
        self._singly = 0
        self._unsent: deque[tuple[bytes, Address]] = deque()
        self._unsent_size = 0
        self._paused = False
        self._low_water, self._high_water = _HIGH_WATER // 4, _HIGH_WATER

    def __repr__(self) -> str:
        state = "closing" if self._closing else "open"
        return f"<ppv2.asyncio.DatagramTransport {state} {self._sock!r}>"

    def sendto(
        self,
        data: bytes | bytearray | memoryview,
        addr: Any = None,  # noqa: ANN401
    ) -> None:
        """Sends a datagram to a client; one that can't be sent now is kept for later.

        What goes wrong is given to the protocol's error_received(): a
        ppv2.NoReplyPathError if the client was not heard from, or too long ago; an
        OSError, ENOBUFS, if so much is kept already that this one is not: 4 MiB, or
        twice the high-water mark if that is more.

        Args:
            data: The payload, copied if it is kept.
            addr: The client's address, best the object that datagram_received()
                was given.

        Raises:
            TypeError, ValueError: An argument is not what is described above.
        """
        if not self._unsent:
            if self._closing:
                return
            try:
                self._sock.sendto(data, addr)
            except BlockingIOError:
                self._loop.add_writer(self._fd, self._on_writable)
            except OSError as error:
                self._protocol.error_received(error)
                return
            else:
                return
        elif addr is None:
            raise TypeError("address: expected a client's, got None")
        size = memoryview(data).nbytes + _ENTRY
        if self._unsent_size + size > max(_MOST_UNSENT, 2 * self._high_water):
            self._protocol.error_received(
                OSError(
                    errno.ENOBUFS,
                    f"datagram dropped: {self._unsent_size} bytes wait to be sent already; "
                    "send nothing between pause_writing() and resume_writing()",
                )
            )
            return
        self._unsent.append((bytes(data), addr))
        self._unsent_size += size
        self._pause_if_full()

    def close(self) -> None:
        """Stops receiving, sends what is kept, and then closes the socket."""
        if self._closing:
            return
        self._stop_reading()
        if not self._unsent:
            self._loop.call_soon(self._finish)

    def abort(self) -> None:
        """Closes the socket without sending what is kept."""
        already = self._closing and not self._unsent
        self._stop_reading()
        if self._unsent:
            self._unsent.clear()
            self._unsent_size = 0
            self._loop.remove_writer(self._fd)
        if not already:
            self._loop.call_soon(self._finish)

    def is_closing(self) -> bool:
        """Whether close() or abort() was called."""
        return self._closing

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The protocol in use."""
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Hands what comes from now on to another protocol."""
        if not isinstance(protocol, asyncio.DatagramProtocol):
            raise TypeError(f"protocol: expected a DatagramProtocol, got {protocol!r}")
        self._protocol = protocol

    def get_write_buffer_size(self) -> int:
        """Bytes of memory that is kept for datagrams to be sent: their payloads, and 128
        for each.
        """
        return self._unsent_size

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """The sizes below and above which writing is resumed and paused, in bytes."""
        return self._low_water, self._high_water

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Sets at which sizes, in bytes, the protocol's pause_writing() and
        resume_writing() are called, as for any transport of asyncio.
        """
        if high is None:
            high = _HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._low_water, self._high_water = low, high
        self._pause_if_full()

    def _start(self) -> None:
        if not self._closing:
            self._loop.add_reader(self._fd, self._on_readable)

    def _stop_reading(self) -> None:
        if not self._closing:
            self._closing = True
            self._loop.remove_reader(self._fd)

    def _on_readable(self) -> None:
        try:
            if self._singly:
                self._singly -= 1
                batch = [self._sock.recvfrom(_LONGEST)]
            else:
                batch = self._sock.recv_batch(self._at_once)
                if len(batch) == 1:
                    self._singly = _SINGLY
                # Room for what doesn't come is not free either.
                self._at_once = min(2 * len(batch), _MOST_AT_ONCE)
        except BlockingIOError:
            return
        except OSError as error:
            self._protocol.error_received(error)
            return
        for data, addr in batch:
            if self._closing:
                # What is left is lost, as what the kernel still has.
                return
            try:
                self._protocol.datagram_received(data, addr)
            except Exception as error:  # noqa: BLE001
                # The next datagram is another client's, who must not suffer.
                self._report("datagram_received", error)

    def _on_writable(self) -> None:
        while self._unsent:
            data, addr = self._unsent[0]
            try:
                self._sock.sendto(data, addr)
            except BlockingIOError:
                break
            except OSError as error:
                self._drop_first(data)
                self._protocol.error_received(error)
            else:
                self._drop_first(data)
        if self._paused and self._unsent_size <= self._low_water:
            self._paused = False
            self._call("resume_writing", self._protocol.resume_writing)
        # Either may have sent more, or closed.
        if not self._unsent:
            self._loop.remove_writer(self._fd)
            if self._closing:
                self._finish()

    def _drop_first(self, data: bytes) -> None:
        # The protocol may have called abort() meanwhile.
        with suppress(IndexError):
            self._unsent.popleft()
            self._unsent_size -= len(data) + _ENTRY

    def _pause_if_full(self) -> None:
        if not self._paused and self._unsent_size > self._high_water:
            self._paused = True
            self._call("pause_writing", self._protocol.pause_writing)

    def _call(self, name: str, method: Callable[[], None]) -> None:
        try:
            method()
        except Exception as error:  # noqa: BLE001
            self._report(name, error)

    def _report(self, method: str, error: Exception) -> None:
        self._loop.call_exception_handler(
            {
                "message": f"protocol.{method}() failed",
                "exception": error,
                "transport": self,
                "protocol": self._protocol,
            }
        )

    def _finish(self) -> None:
        try:
            self._protocol.connection_lost(None)
        finally:
            self._sock.close()
            if self._brought is not None:
                self._brought.close()
