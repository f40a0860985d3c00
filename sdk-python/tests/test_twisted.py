"""`ppv2.twisted`: protocols of Twisted see clients."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from twisted.internet.asyncioreactor import AsyncioSelectorReactor
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.error import MessageLengthError
from twisted.internet.protocol import DatagramProtocol

import ppv2
import ppv2.twisted
from peers import CLIENT, CLIENT_V6, PATIENCE, Proxy, hostile, udp

epoll_reactor: Any = EPollReactor


class Echo(DatagramProtocol):
    """Answers with what it was handed."""

    transport: Any

    def datagramReceived(self, datagram: bytes, addr: Any) -> None:  # noqa: N802
        host, port = addr
        self.transport.write(f"{host} {port} {datagram.decode()}".encode(), addr)


@contextmanager
def serving(
    reactor: Any, interface: str = "127.0.0.1", protocol: DatagramProtocol | None = None
) -> Iterator[Any]:
    """A port that is served in another thread, which ends with the port's."""
    port: Any = ppv2.twisted.listenUDP(
        reactor, 0, protocol or Echo(), interface, trusted=["127.0.0.1", "::1"]
    )
    thread = threading.Thread(target=reactor.run, kwargs={"installSignalHandlers": False})
    thread.start()
    try:
        yield port
    finally:

        def stop() -> None:
            port.stopListening().addBoth(lambda _: reactor.stop())

        reactor.callFromThread(stop)
        thread.join(PATIENCE)
        assert not thread.is_alive()
        reactor.removeAll()


@pytest.mark.parametrize("kind", ["epoll", "asyncio"])
def test_a_protocol_sees_clients_and_answers_them(kind: str) -> None:
    with (
        asyncio.Runner() as runner,
        serving(
            epoll_reactor() if kind == "epoll" else AsyncioSelectorReactor(runner.get_loop())
        ) as port,
        Proxy() as proxy,
    ):
        name = ("127.0.0.1", port.getHost().port)
        for _, datagram in hostile().values():
            proxy.send_raw(name, datagram)
        proxy.send(name, b"hello")
        assert proxy.receive() == b"203.0.113.11 54321 hello"
        # Twisted itself would not write to an IPv6 host here.
        proxy.send(name, b"hello", client=CLIENT_V6, listener=CLIENT_V6)
        assert proxy.receive() == b"2001:db8::11 54321 hello"
        assert port.getHandle().stats().delivered == 2


def test_ipv6() -> None:
    with serving(epoll_reactor(), "::1") as port, udp("::1", socket.AF_INET6) as proxy:
        name = ("::1", port.getHost().port)
        proxy.sendto(ppv2.encode(CLIENT_V6, CLIENT_V6) + b"hello", name)
        assert proxy.recv(99) == b"2001:db8::11 54321 hello"
        # An IPv4 client in the form that such a port's addresses have.
        proxy.sendto(ppv2.encode(CLIENT, CLIENT) + b"hello", name)
        assert proxy.recv(99) == b"::ffff:203.0.113.11 54321 hello"


def test_what_can_not_be_sent_is_an_error() -> None:
    errors: list[Exception] = []

    class Protocol(Echo):
        def datagramReceived(self, datagram: bytes, addr: Any) -> None:  # noqa: N802
            sends: list[Callable[[], object]] = [
                lambda: self.transport.write(b"x" * 65536, addr),
                lambda: self.transport.write(b"", ("203.0.113.99", 1)),
                lambda: self.transport.connect("203.0.113.99", 1),
            ]
            for send in sends:
                try:
                    send()
                except (OSError, RuntimeError, MessageLengthError) as error:
                    errors.append(error)
            self.transport.write(datagram, addr)

    with serving(epoll_reactor(), protocol=Protocol()) as port, Proxy() as proxy:
        proxy.send(("127.0.0.1", port.getHost().port), b"hello")
        assert proxy.receive() == b"hello"
    assert [type(error) for error in errors] == [
        MessageLengthError,
        ppv2.NoReplyPathError,
        RuntimeError,
    ]


def test_bad_arguments_leave_nothing_open() -> None:
    reactor = epoll_reactor()
    with pytest.raises(ValueError, match='"nowhere" is not a network'):
        ppv2.twisted.listenUDP(reactor, 0, Echo(), trusted=["nowhere"])
    assert [
        reader for reader in reactor.getReaders() if isinstance(reader, ppv2.twisted.Port)
    ] == []
    reactor.removeAll()
