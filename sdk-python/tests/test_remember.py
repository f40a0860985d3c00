"""Senders that say a header once: nginx, frp, Cloudflare Spectrum, `emit = "first"`."""

import asyncio
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import anyio
import gevent
import pytest
from aioquic.asyncio.client import connect
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.protocol import DatagramProtocol

import ppv2
import ppv2.aioquic
import ppv2.anyio
import ppv2.gevent
import ppv2.socketserver
import ppv2.twisted
from peers import CLIENT, CLIENT_V6, LISTENER, OTHER_CLIENT, PATIENCE, Proxy, server, udp
from ppv2 import Address
from ppv2.asyncio import create_datagram_endpoint
from real_proxy import proxy_to_upstream
from test_aioquic import Whoami, ask, configuration

Main = Callable[[], Coroutine[Any, Any, None]]
Receive = Callable[[ppv2.Socket], tuple[bytes, Address]]

REMEMBER: dict[str, Any] = {"remember_senders": PATIENCE, "max_senders": 100}

# One that changes nothing, so that sendmsg() has one to send.
ANCILLARY = [(socket.IPPROTO_IP, socket.IP_TTL, struct.pack("i", 64))]


def says_it_once(name: Address, exchanges: int = 10) -> None:
    """Speaks to a server that echoes as a proxy with a socket for each client."""
    proxies = [(Proxy(), ("203.0.113.11", 10_000 + number)) for number in range(10)]
    for number in range(exchanges):
        for proxy, client in proxies:
            payload = f"{client} {number}".encode()
            if number == 0:
                proxy.send(name, payload, client)
            else:
                proxy.send_raw(name, payload)
        for proxy, client in reversed(proxies):
            assert proxy.receive() == f"{client} {number}".encode()
    for proxy, _ in proxies:
        proxy.receives_nothing()
        proxy.socket.close()


@pytest.mark.parametrize(
    "receive",
    [
        lambda sock: sock.recvfrom(99),
        lambda sock: sock.recvmsg(99)[::3],
        lambda sock: sock.recv_datagram()[:2],
        lambda sock: sock.recv_batch(1)[0],
    ],
    ids=["recvfrom", "recvmsg", "recv_datagram", "recv_batch"],
)
def test_bare_datagrams_belong_to_the_client_of_the_first(receive: Receive) -> None:
    with server(**REMEMBER) as sock, Proxy() as proxy, Proxy() as other:
        name = sock.getsockname()
        proxy.send(name, b"first")
        other.send(name, b"first", OTHER_CLIENT)
        assert sorted(receive(sock) for _ in range(2)) == [
            (b"first", CLIENT),
            (b"first", OTHER_CLIENT),
        ]
        for payload in (b"second", b"", b"\r\n\r\n\0\r\nQUI", b"\x56\xec" + bytes(36)):
            for sender, client in ((proxy, CLIENT), (other, OTHER_CLIENT)):
                sender.send_raw(name, payload)
                data, address = receive(sock)
                assert (data, address) == (payload, client)
                for send in (sock.sendto, lambda data, to: sock.sendmsg([data], ANCILLARY, 0, to)):
                    send(data, address)
                    assert sender.receive() == payload
        assert set(sock.stats().dropped.values()) == {0}


def test_all_that_is_known_of_a_bare_datagram() -> None:
    with server(**REMEMBER) as sock, Proxy() as proxy:
        proxy.send(sock.getsockname(), b"1", tlvs=[(ppv2.TlvType.AUTHORITY, b"example.org")])
        first = sock.recv_datagram()
        proxy.send_raw(sock.getsockname(), b"2")
        second = sock.recv_datagram()
        assert first.header is not None
        assert first.header.authority == "example.org"
        assert second[1:4] == first[1:4] == (CLIENT, LISTENER, proxy.address)
        assert second.client is first.client
        assert (second.header, second.tlvs) == (None, ())


def test_small_buffers_cut_the_payload_alone() -> None:
    with server(**REMEMBER) as sock, Proxy() as proxy:
        proxy.send(sock.getsockname(), b"hello")
        assert sock.recvmsg(2)[0::2] == (b"he", socket.MSG_TRUNC)
        proxy.send_raw(sock.getsockname(), b"hello")
        assert sock.recvmsg(2)[0::2] == (b"he", socket.MSG_TRUNC)
        proxy.send_raw(sock.getsockname(), b"hello")
        assert sock.recvmsg(5)[0::2] == (b"hello", 0)
        buffer = bytearray(3)
        proxy.send_raw(sock.getsockname(), b"hello")
        assert sock.recvfrom_into(buffer) == (3, CLIENT)
        assert buffer == b"hel"


def test_batches_hold_headers_and_bare_datagrams() -> None:
    with server(**REMEMBER) as sock, Proxy() as proxy:
        name = sock.getsockname()
        expected = []
        for client in (CLIENT, OTHER_CLIENT, CLIENT_V6[:2], CLIENT):
            proxy.send(name, b"named", client)
            proxy.send_raw(name, b"bare")
            proxy.send_raw(name, b"")
            expected += [(payload, client) for payload in (b"named", b"bare", b"")]
        received: list[tuple[bytes, Address]] = []
        while len(received) < len(expected):
            batch = sock.recv_batch(64)
            assert sock.send_batch(batch) == len(batch)
            received += batch
        assert received == expected
        assert [proxy.receive() for _ in expected] == [payload for payload, _ in expected]


def test_a_header_alone() -> None:
    for options, arrives in ({}, False), ({"header_alone": "deliver"}, True):
        with server(**REMEMBER, **options) as sock, Proxy() as proxy:
            proxy.send(sock.getsockname(), b"")
            proxy.send_raw(sock.getsockname(), b"hello")
            if arrives:
                assert sock.recvfrom(9) == (b"", CLIENT)
            assert sock.recvfrom(9) == (b"hello", CLIENT)
            assert sock.stats().dropped["header_alone"] == (not arrives)
    with server(header_alone="announce") as sock, Proxy() as proxy:
        proxy.send(sock.getsockname(), b"")
        assert sock.recvfrom(9) == (b"", CLIENT)


def test_a_local_header_ends_what_its_sender_said() -> None:
    with server(**REMEMBER) as sock, Proxy() as proxy:
        proxy.send(sock.getsockname(), b"1")
        proxy.send_raw(sock.getsockname(), ppv2.encode_local() + b"check")
        proxy.send_raw(sock.getsockname(), b"2")
        proxy.send(sock.getsockname(), b"3")
        received = [sock.recvfrom(9) for _ in range(3)]
        assert received == [(b"1", CLIENT), (b"check", proxy.address), (b"3", CLIENT)]
        assert sock.stats().dropped["no_header"] == 1


def test_off_unless_asked_for() -> None:
    with server() as sock, Proxy() as proxy:
        proxy.send(sock.getsockname(), b"1")
        proxy.send_raw(sock.getsockname(), b"2")
        proxy.send(sock.getsockname(), b"3")
        assert [sock.recvfrom(9)[0] for _ in range(2)] == [b"1", b"3"]
        assert sock.stats().dropped["no_header"] == 1


def test_what_nobody_said_is_dropped_and_counted() -> None:
    with server(remember_senders=0.001, max_senders=1) as sock, Proxy() as proxy, Proxy() as other:
        name = sock.getsockname()
        proxy.send_raw(name, b"bare")
        proxy.send(name, b"1")
        assert sock.recvfrom(9)[0] == b"1"
        # Longer than the sender is remembered, by the clock's ticks.
        time.sleep(0.05)
        proxy.send_raw(name, b"late")
        other.send(name, b"2")
        assert sock.recvfrom(9)[0] == b"2"
        assert sock.stats().dropped["no_header"] == 2
    with server(remember_senders=PATIENCE, max_senders=1) as sock, Proxy() as proxy:
        name = sock.getsockname()
        proxy.send(name, b"1")
        with Proxy() as other:
            other.send(name, b"2", OTHER_CLIENT)
            other.send_raw(name, b"bare")
            proxy.send_raw(name, b"3")
            received = [sock.recvfrom(9) for _ in range(3)]
        assert received == [(b"1", CLIENT), (b"2", OTHER_CLIENT), (b"3", CLIENT)]
        stats = sock.stats()
        assert (stats.senders_not_remembered, stats.dropped["no_header"]) == (1, 1)


def test_text_of_version_1_is_dropped_and_explained(caplog: pytest.LogCaptureFixture) -> None:
    line = b"PROXY TCP4 203.0.113.11 198.51.100.10 54321 9000\r\nhello"
    for options in ({}, {"formats": ["spp"]}, {"formats": ["v2", "spp"]}, REMEMBER):
        caplog.clear()
        with server(**options) as sock, Proxy() as proxy:
            sock.settimeout(0)
            proxy.send_raw(sock.getsockname(), line)
            with pytest.raises(BlockingIOError):
                sock.recv(9)
            assert sock.stats().dropped["v1_header"] == 1
        [warning] = caplog.messages
        assert "(v1_header)" in warning
        assert "nginx 1.31.4" in warning


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"formats": []}, ValueError, "formats names none"),
        ({"formats": "v2"}, TypeError, "formats: expected an iterable of 'v2' and 'spp'"),
        ({"formats": ["v1"]}, ValueError, "formats.0.: expected 'v2' or 'spp', got 'v1'"),
        ({"formats": [2]}, TypeError, "formats.0.: expected 'v2' or 'spp', got 2"),
        ({"remember_senders": 0}, ValueError, "remember_senders: expected None or a number of sec"),
        ({"remember_senders": "30"}, TypeError, "remember_senders: expected None or a number"),
        ({"max_senders": 0}, ValueError, "max_senders: expected a number of senders, at least 1"),
        ({"header_alone": "drop"}, ValueError, "header_alone: expected 'announce' or 'deliver'"),
        (
            {"formats": ["v2", "spp"], "remember_senders": 30},
            ValueError,
            "remember_senders and format spp exclude each other",
        ),
    ],
)
def test_arguments_that_are_wrong_are_named(
    options: Any, error: type[Exception], message: str
) -> None:
    with udp() as sock:
        with pytest.raises(error, match=message):
            ppv2.wrap(sock, trusted=["127.0.0.1"], **options)
        assert sock.fileno() >= 0


def test_asyncio(run: Callable[[Main], None]) -> None:
    class Echo(asyncio.DatagramProtocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, addr: Any) -> None:
            self.transport.sendto(data, addr)

    async def main() -> None:
        transport, _ = await create_datagram_endpoint(
            Echo, local_addr=("127.0.0.1", 0), trusted=["127.0.0.1"], **REMEMBER
        )
        name = transport.get_extra_info("sockname")
        await asyncio.to_thread(says_it_once, name)
        transport.close()
        await asyncio.sleep(0)

    run(main)


def test_twisted() -> None:
    class Echo(DatagramProtocol):
        transport: Any

        def datagramReceived(self, datagram: bytes, addr: Any) -> None:  # noqa: N802
            self.transport.write(datagram, addr)

    reactor: Any = EPollReactor()  # type: ignore[no-untyped-call]
    port: Any = ppv2.twisted.listenUDP(
        reactor, 0, Echo(), "127.0.0.1", trusted=["127.0.0.1"], **REMEMBER
    )
    thread = threading.Thread(target=reactor.run, kwargs={"installSignalHandlers": False})
    thread.start()
    try:
        says_it_once(("127.0.0.1", port.getHost().port))
    finally:
        reactor.callFromThread(
            lambda: port.stopListening().addCallback(lambda _: reactor.stop()),
        )
        thread.join(PATIENCE)
        reactor.removeAll()


def test_gevent() -> None:
    with ppv2.gevent.wrap(udp(), trusted=["127.0.0.1"], **REMEMBER) as sock:

        def echo() -> None:
            while True:
                payload, client = sock.recvfrom(99)
                assert sock.sendto(payload, client) == len(payload)

        serving = gevent.spawn(echo)
        try:
            asking = gevent.get_hub().threadpool.spawn(says_it_once, sock.getsockname())
            asking.get(timeout=PATIENCE)
        finally:
            serving.kill()


@pytest.mark.parametrize(
    "kind", [ppv2.socketserver.UDPServer, ppv2.socketserver.ThreadingUDPServer]
)
def test_socketserver(kind: type[ppv2.socketserver.UDPServer]) -> None:
    class Echo(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            data, sock = self.request
            sock.sendto(data, self.client_address)

    with kind(("127.0.0.1", 0), Echo, trusted=["127.0.0.1"], **REMEMBER) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        try:
            name: Any = served.server_address
            says_it_once(name)
        finally:
            served.shutdown()
            thread.join()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_anyio(backend: str) -> None:
    async def echo(sock: ppv2.anyio.UDPSocket) -> None:
        async for payload, client in sock:
            await sock.send((payload, client))

    async def main() -> None:
        with anyio.fail_after(PATIENCE):
            sock = await ppv2.anyio.create_udp_socket(
                local_host="127.0.0.1", trusted=["127.0.0.1"], **REMEMBER
            )
            async with sock, anyio.create_task_group() as tasks:
                tasks.start_soon(echo, sock)
                await anyio.to_thread.run_sync(says_it_once, sock.getsockname())
                tasks.cancel_scope.cancel()

    anyio.run(main, backend=backend)


EMITS_FIRST = 'header = { emit = "first" }'


def test_the_real_proxy_that_says_it_once(tmp_path: Path) -> None:
    with server(**REMEMBER) as sock:

        def echo() -> None:
            while True:
                payload, client = sock.recvfrom(2000)
                if payload == b"end":
                    return
                sock.sendto(f"{client[0]}:{client[1]} {len(payload)}".encode(), client)

        thread = threading.Thread(target=echo)
        thread.start()
        with proxy_to_upstream(tmp_path, sock.getsockname(), EMITS_FIRST) as listener:
            clients = [udp() for _ in range(5)]
            # The first has a payload: a header alone is none of the application's.
            for size in (5, 0, 9, 1, 0, 1000):
                for client in clients:
                    client.sendto(bytes(size), listener)
                for client in clients:
                    host, port = client.getsockname()
                    assert client.recv(99) == f"{host}:{port} {size}".encode()
            for client in clients:
                client.close()
            with udp() as last:
                last.sendto(b"end", listener)
                thread.join(PATIENCE)
        stats = sock.stats()
        assert (stats.clients, stats.received) == (6, 31)
        assert set(stats.dropped.values()) == {0}


def test_quic_behind_the_real_proxy_that_says_it_once(tmp_path: Path) -> None:
    for_server, for_client = configuration(tmp_path)

    async def main() -> None:
        server = await ppv2.aioquic.serve(
            "127.0.0.1",
            0,
            configuration=for_server,
            create_protocol=Whoami,
            trusted=["127.0.0.1"],
            **REMEMBER,
        )
        sock: ppv2.Socket = server._transport.get_extra_info("socket")  # type: ignore[union-attr]

        async def one_client(listener: tuple[str, int]) -> None:
            async with connect(*listener, configuration=for_client) as client:
                its: Any = client._transport
                port = its.get_extra_info("sockname")[1]
                for size in (1, 20_000):
                    answer = await ask(client, bytes(size))
                    assert answer.startswith(f"127.0.0.1:{port} ".encode())

        with proxy_to_upstream(tmp_path, sock.getsockname(), EMITS_FIRST) as listener:
            await asyncio.gather(*(one_client(listener) for _ in range(3)))
        assert set(sock.stats().dropped.values()) == {0}
        server.close()
        await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
