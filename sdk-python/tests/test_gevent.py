"""`ppv2.gevent`: greenlets see clients, and run while others wait."""

import subprocess
import sys
from typing import Any

import gevent
import gevent.server
import gevent.socket
import pytest

import ppv2
import ppv2.gevent
from peers import CLIENT, PATIENCE, Proxy, hostile, udp


def gevent_socket() -> Any:
    sock = gevent.socket.socket(gevent.socket.AF_INET, gevent.socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    sock.settimeout(PATIENCE)
    return sock


@pytest.mark.parametrize("make", [gevent_socket, udp])
def test_a_greenlet_that_waits_lets_others_run(make: Any) -> None:
    sock = make()
    with ppv2.gevent.wrap(sock, trusted=["127.0.0.1"]) as wrapped, Proxy() as proxy:
        assert sock.fileno() == -1
        assert wrapped.gettimeout() == PATIENCE
        buffer = bytearray(9)
        for receive in (
            lambda: wrapped.recvfrom(9),
            lambda: (wrapped.recv(9), CLIENT),
            lambda: wrapped.recv_datagram()[:2],
            lambda: wrapped.recv_batch(4)[0],
            lambda: (buffer[: wrapped.recvfrom_into(buffer)[0]], CLIENT),
            lambda: (buffer[: wrapped.recv_into(buffer)], CLIENT),
            lambda: wrapped.recvmsg(9)[::3],
            lambda: (buffer[: wrapped.recvmsg_into([buffer])[0]], CLIENT),
        ):
            waiting = gevent.spawn(receive)
            gevent.sleep(0)
            for _, datagram in hostile().values():
                proxy.send_raw(wrapped.getsockname(), datagram)
            gevent.sleep(0)
            assert not waiting.ready()
            proxy.send(wrapped.getsockname(), b"hello")
            payload, client = waiting.get()
            assert (payload, client) == (b"hello", CLIENT)
            assert wrapped.sendto(b"answer", client) == 6
            assert wrapped.sendto(b"answer", gevent.socket.MSG_DONTWAIT, client) == 6
            assert wrapped.sendmsg([b"answer"], (), 0, client) == 6
            assert wrapped.send_batch(iter([(b"answer", client)])) == 1
            assert [proxy.receive() for _ in range(4)] == [b"answer"] * 4
        assert wrapped.stats().delivered == 8


class Clogged:
    """A socket that has no room to send until it was asked twice."""

    def __init__(self, inner: ppv2.Socket) -> None:
        self.inner = inner
        self.asked = 0

    def sendto(self, *arguments: Any) -> int:
        self.asked += 1
        if self.asked < 3:
            raise BlockingIOError
        return self.inner.sendto(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_a_greenlet_waits_for_room_to_send() -> None:
    with ppv2.gevent.wrap(udp(), trusted=["127.0.0.1"]) as wrapped, Proxy() as proxy:
        proxy.send(wrapped.getsockname(), b"")
        _, client = wrapped.recvfrom(9)
        wrapped._sock = clogged = Clogged(wrapped._sock)  # type: ignore[assignment]
        with pytest.raises(BlockingIOError):
            wrapped.sendto(b"x", gevent.socket.MSG_DONTWAIT, client)
        assert wrapped.sendto(b"answer", client) == 6
        assert clogged.asked == 3
        assert proxy.receive() == b"answer"


def test_it_has_all_that_a_socket_has() -> None:
    with ppv2.gevent.wrap(udp(), trusted=["127.0.0.1"]) as wrapped:
        for name in dir(ppv2.Socket):
            assert hasattr(wrapped, name), name
        assert wrapped.family == gevent.socket.AF_INET
        assert not hasattr(wrapped, "connect")


def test_timeouts_and_closing() -> None:
    wrapped = ppv2.gevent.wrap(gevent_socket(), trusted=["127.0.0.1"])
    wrapped.settimeout(0.01)
    with pytest.raises(TimeoutError, match="timed out"):
        wrapped.recvfrom(9)
    wrapped.setblocking(False)
    with pytest.raises(BlockingIOError):
        wrapped.recvfrom(9)
    assert (wrapped.timeout, wrapped.getblocking()) == (0, False)
    with pytest.raises(ValueError, match="Timeout value out of range"):
        wrapped.settimeout(-1)
    wrapped.setblocking(True)
    assert wrapped.gettimeout() is None
    with pytest.raises(BlockingIOError):
        wrapped.recv(9, gevent.socket.MSG_DONTWAIT)
    waiting = gevent.spawn(wrapped.recvfrom, 9)
    gevent.sleep(0)
    wrapped.close()
    with pytest.raises(OSError, match="closed in another greenlet"):
        waiting.get()
    assert wrapped.fileno() == -1
    wrapped.close()


def test_a_socket_that_is_refused_is_still_the_callers() -> None:
    with gevent_socket() as sock:
        with pytest.raises(ValueError, match="trusted: it names IPv6 networks alone"):
            ppv2.gevent.wrap(sock, trusted=["::1"])
        sock.getsockname()


@pytest.mark.parametrize("bound", [False, True], ids=["address", "socket"])
def test_a_server_sees_clients_and_answers_them(bound: bool) -> None:
    def handle(payload: bytes, client: Any) -> None:
        server.sendto("{} {} {}".format(*client, payload.decode()).encode(), client)

    listener = gevent_socket() if bound else ("127.0.0.1", 0)
    server = ppv2.gevent.DatagramServer(listener, handle, trusted=["127.0.0.1"])
    # As servers do that fork.
    server.init_socket()
    server.start()
    with Proxy() as proxy:
        for _, datagram in hostile().values():
            proxy.send_raw(server.address, datagram)
        proxy.send(server.address, b"hello")
        assert gevent.get_hub().threadpool.apply(proxy.receive) == b"203.0.113.11 54321 hello"
    server.stop()


PATCHED = """
from gevent import monkey
monkey.patch_all()
import gevent, socket, ppv2
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("127.0.0.1", 0))
try:
    ppv2.wrap(sock, trusted=["127.0.0.1"])
except TypeError as error:
    assert "call ppv2.gevent.wrap(" in str(error), error
else:
    raise AssertionError("wrapped")
sock = ppv2.gevent.wrap(sock, trusted=["127.0.0.1"])
serving = gevent.spawn(sock.recvfrom, 9)
gevent.sleep(0)
header = ppv2.encode(("203.0.113.11", 54321), ("198.51.100.10", 9000))
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as proxy:
    proxy.bind(("127.0.0.1", 0))
    proxy.sendto(header + b"hello", sock.getsockname())
    payload, client = serving.get()
    assert (payload, client) == (b"hello", ("203.0.113.11", 54321))
    sock.sendto(payload, client)
    assert proxy.recv(9) == b"hello"
sock.close()
"""


def test_where_gevent_has_patched_the_socket_module() -> None:
    result = subprocess.run(
        [sys.executable, "-I", "-W", "error::ResourceWarning", "-c", PATCHED],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
