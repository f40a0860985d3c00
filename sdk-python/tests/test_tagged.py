"""Replies that name their client, to datagrams with a reply tag or an SPP header: many
clients through one address.
"""

import asyncio
import errno
import hashlib
import ipaddress
import socket
import socketserver
import struct
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

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
from peers import CLIENT, LISTENER, OTHER_CLIENT, PATIENCE, Proxy, server, udp
from ppv2 import Address
from ppv2.asyncio import create_datagram_endpoint
from test_aioquic import Whoami, ask, configuration

Main = Callable[[], Coroutine[Any, Any, None]]
Send = Callable[[ppv2.Socket, bytes, Address], object]
Receive = Callable[[ppv2.Socket], tuple[bytes, Address]]

# Every second one over IPv6.
CLIENTS: list[Address] = [
    ("203.0.113.11", 10_000 + number) if number % 2 else ("2001:db8::11", 10_000 + number, 0, 0)
    for number in range(50)
]

# One that changes nothing, so that sendmsg() has one to send.
ANCILLARY = [(socket.IPPROTO_IP, socket.IP_TTL, struct.pack("i", 64))]


def tag_of(client: Address) -> bytes:
    """The value of a client's TLV, with a flag that nobody knows."""
    return b"\x01\x80" + hashlib.blake2b(repr(client).encode(), digest_size=8).digest()


def tagged(client: Address, payload: bytes, listener: Address = LISTENER) -> bytes:
    """What passes between the proxy and a server, either way."""
    tlvs = [(ppv2.TlvType.REPLY_TAG, tag_of(client))]
    return ppv2.encode(client, listener, tlvs=tlvs) + payload


def simple(client: Address, payload: bytes, listener: Address = LISTENER) -> bytes:
    """The same by Simple Proxy Protocol."""

    def packed(host: str) -> bytes:
        ip = ipaddress.ip_address(host)
        return ip.packed if ip.version == 6 else bytes(10) + b"\xff\xff" + ip.packed

    ends = packed(client[0]), packed(listener[0]), client[1], listener[1]
    return struct.pack("!H16s16sHH", 0x56EC, *ends) + payload


def read_tagged(datagram: bytes) -> tuple[Address, bytes]:
    header, payload = ppv2.decode(datagram)
    assert header.client is not None
    return header.client, payload


def read_simple(datagram: bytes) -> tuple[Address, bytes]:
    ip = ipaddress.IPv6Address(datagram[2:18])
    return (str(ip.ipv4_mapped or ip), int.from_bytes(datagram[34:36])), datagram[38:]


class Wire(NamedTuple):
    """How a proxy with one address names its clients."""

    datagram: Callable[..., bytes]
    read: Callable[[bytes], tuple[Address, bytes]]
    options: dict[str, Any]


@pytest.fixture(params=["tagged", "spp"])
def wire(request: pytest.FixtureRequest) -> Wire:
    if request.param == "tagged":
        return Wire(tagged, read_tagged, {})
    return Wire(simple, read_simple, {"formats": ["v2", "spp"]})


def rounds(exchanges: int) -> Iterator[list[tuple[Address, bytes]]]:
    """Clients with payloads that say whose they are, a few at once."""
    numbers = range(exchanges)
    for first in numbers[::20]:
        clients = [(number, CLIENTS[number * 7 % 50]) for number in numbers[first : first + 20]]
        yield [(client, f"{client} {number}".encode()) for number, client in clients]


def each_gets_its_own(proxy: Proxy, name: Address, wire: Wire, exchanges: int = 200) -> None:
    """Speaks as the proxy to a server that echoes, in whatever order."""
    for asked in rounds(exchanges):
        datagrams = [wire.datagram(client, payload) for client, payload in asked]
        for datagram in datagrams:
            proxy.send_raw(name, datagram)
        assert sorted(proxy.receive() for _ in asked) == sorted(datagrams)
    proxy.receives_nothing()


def batch_of_one(sock: ppv2.Socket, payload: bytes, client: Address) -> None:
    assert sock.send_batch([(payload, client)]) == 1


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
@pytest.mark.parametrize(
    "send",
    [
        lambda sock, payload, client: sock.sendto(payload, client),
        lambda sock, payload, client: sock.sendto(payload, tuple(client)),
        lambda sock, payload, client: sock.sendmsg([payload[:3], payload[3:]], (), 0, client),
        lambda sock, payload, client: sock.sendmsg([payload], ANCILLARY, 0, client),
        batch_of_one,
    ],
    ids=["sendto", "sendto tuple", "sendmsg", "sendmsg ancillary", "send_batch"],
)
def test_many_clients_through_one_address_each_get_their_own_replies(
    receive: Receive, send: Send, wire: Wire
) -> None:
    with server(**wire.options) as sock, Proxy() as proxy:
        for asked in rounds(200):
            for client, payload in asked:
                proxy.send_raw(sock.getsockname(), wire.datagram(client, payload))
            # All are pending before the first is answered, the last one first.
            pending = [receive(sock) for _ in asked]
            for payload, client in reversed(pending):
                sent = send(sock, payload, client)
                assert sent in (None, len(payload))
            for client, payload in reversed(asked):
                assert proxy.receive() == wire.datagram(client, payload)
        proxy.receives_nothing()
        assert sock.stats().clients == len(CLIENTS)
        assert sock.stats().replies_sent == 200


def test_batches_answer_a_thousand_times(wire: Wire) -> None:
    with server(**wire.options) as sock, Proxy() as proxy:
        for asked in rounds(1000):
            for client, payload in asked:
                proxy.send_raw(sock.getsockname(), wire.datagram(client, payload))
            left = len(asked)
            while left:
                batch = sock.recv_batch(64)
                assert sock.send_batch(batch) == len(batch)
                left -= len(batch)
            for client, payload in asked:
                assert proxy.receive() == wire.datagram(client, payload)
        proxy.receives_nothing()


def test_replies_that_name_their_client_and_bare_ones_differ(wire: Wire) -> None:
    with server(**wire.options) as sock, Proxy() as proxy, Proxy() as session:
        for client in CLIENTS[:10]:
            proxy.send_raw(sock.getsockname(), wire.datagram(client, b"tagged"))
            session.send(sock.getsockname(), b"bare")
            assert sock.send_batch([sock.recvfrom(9) for _ in range(2)]) == 2
            assert proxy.receive() == wire.datagram(client, b"tagged")
            assert session.receive() == b"bare"


def test_a_client_moves_to_a_session_and_back(wire: Wire) -> None:
    with server(**wire.options) as sock, Proxy() as proxy, Proxy() as session:
        for _ in range(10):
            proxy.send_raw(sock.getsockname(), wire.datagram(CLIENT, b"1"))
            _, client = sock.recvfrom(9)
            sock.sendto(b"tagged", client)
            assert proxy.receive() == wire.datagram(CLIENT, b"tagged")
            # The address object is the same, and follows.
            session.send(sock.getsockname(), b"2")
            assert sock.recvfrom(9)[1] is client
            for to in (client, CLIENT):
                sock.sendto(b"bare", to)
                sock.sendmsg([b"bare"], ANCILLARY, 0, to)
                assert [session.receive() for _ in range(2)] == [b"bare"] * 2
        proxy.receives_nothing()


def test_two_listeners_of_one_client_keep_apart(wire: Wire) -> None:
    listeners = [LISTENER, ("198.51.100.11", 9000)]
    with server(**wire.options) as sock, Proxy() as proxy:
        addresses = []
        for listener in listeners:
            proxy.send_raw(sock.getsockname(), wire.datagram(CLIENT, b"", listener))
            addresses.append(sock.recvfrom(9)[1])
        for listener, address in zip(listeners, addresses, strict=True):
            sock.sendto(b"answer", address)
            assert proxy.receive() == wire.datagram(CLIENT, b"answer", listener)


def test_a_strangers_tag_counts_for_nothing() -> None:
    with server() as sock, Proxy("127.0.0.2") as stranger, Proxy() as proxy:
        stranger.send_raw(sock.getsockname(), tagged(CLIENT, b"x"))
        proxy.send_raw(sock.getsockname(), tagged(OTHER_CLIENT, b"x"))
        assert sock.recvfrom(9) == (b"x", OTHER_CLIENT)
        with pytest.raises(ppv2.NoReplyPathError):
            sock.sendto(b"x", CLIENT)
        stranger.receives_nothing()
    with server(untrusted="accept") as sock, Proxy("127.0.0.2") as stranger:
        datagram = tagged(CLIENT, b"x")
        stranger.send_raw(sock.getsockname(), datagram)
        payload, client = sock.recvfrom(999)
        assert (payload, client) == (datagram, stranger.address)
        sock.sendto(b"bare", client)
        assert stranger.receive() == b"bare"


@pytest.mark.parametrize(
    "values",
    [
        [b"\x02" + bytes(9)],
        [b"\x01" + bytes(8)],
        [b"\x01" + bytes(10)],
        [b"\x01" + bytes(9)] * 2,
    ],
    ids=["version 2", "9 bytes", "11 bytes", "twice"],
)
def test_what_is_no_tag_is_answered_bare(values: list[bytes]) -> None:
    with server() as sock, Proxy() as proxy:
        tlvs = [(ppv2.TlvType.REPLY_TAG, value) for value in values]
        proxy.send(sock.getsockname(), b"x", tlvs=tlvs)
        received = sock.recv_datagram()
        assert received.header is not None
        assert received.header.reply_tag is None
        for send in (sock.sendto, lambda data, to: sock.sendmsg([data], ANCILLARY, 0, to)):
            send(b"bare", received.client)
            assert proxy.receive() == b"bare"


def test_a_reply_that_is_too_long_with_its_header_is_refused_as_a_whole(wire: Wire) -> None:
    with server(**wire.options) as sock, Proxy() as proxy:
        proxy.send_raw(sock.getsockname(), wire.datagram(CLIENT, b""))
        _, client = sock.recvfrom(9)
        longest = bytes(65507 - len(wire.datagram(CLIENT, b"")))
        assert sock.sendto(longest, client) == len(longest)
        assert proxy.receive() == wire.datagram(CLIENT, longest)
        longer = longest + b"x"
        for send in (sock.sendto, lambda data, to: sock.send_batch([(data, to)])):
            with pytest.raises(OSError, match=f"send at most {len(longest)} bytes") as caught:
                send(longer, client)
            assert caught.value.errno == errno.EMSGSIZE
        with pytest.raises(OSError, match="too long") as caught:
            sock.sendmsg([longer], ANCILLARY, 0, client)
        assert caught.value.errno == errno.EMSGSIZE
        assert sock.send_batch([(longest, client), (longer, client)]) == 1
        assert proxy.receive() == wire.datagram(CLIENT, longest)
        proxy.receives_nothing()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has bursts")
def test_each_datagram_of_a_burst_has_the_header_in_front(wire: Wire) -> None:
    with server(**wire.options) as sock, Proxy() as proxy:
        proxy.send_raw(sock.getsockname(), wire.datagram(CLIENT, b""))
        _, client = sock.recvfrom(9)
        for size in (100, 0):
            burst = [(socket.SOL_UDP, 103, struct.pack("H", size)), *ANCILLARY]
            data = [bytes(100), b"1" * 100, b"2"]
            assert sock.sendmsg(data, burst, 0, client) == 201
            expected = data if size else [b"".join(data)]
            for payload in expected:
                assert proxy.receive() == wire.datagram(CLIENT, payload)
        proxy.receives_nothing()


def test_a_server_that_answers_from_the_listener_names_no_client(wire: Wire) -> None:
    with (
        server(reply_from="listener", **wire.options) as sock,
        Proxy() as proxy,
        udp("127.0.1.1") as client,
    ):
        listener = ("127.0.2.1", 9301)
        proxy.send_raw(sock.getsockname(), wire.datagram(client.getsockname(), b"x", listener))
        sock.sendto(b"bare", sock.recvfrom(9)[1])
        assert client.recvfrom(99) == (b"bare", listener)
        proxy.receives_nothing()


def test_asyncio(run: Callable[[Main], None], wire: Wire) -> None:
    class Echo(asyncio.DatagramProtocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, addr: Any) -> None:
            self.transport.sendto(data, addr)

    async def main() -> None:
        transport, _ = await create_datagram_endpoint(
            Echo, local_addr=("127.0.0.1", 0), trusted=["127.0.0.1"], **wire.options
        )
        with Proxy() as proxy:
            name = transport.get_extra_info("sockname")
            await asyncio.to_thread(each_gets_its_own, proxy, name, wire)
        transport.close()
        await asyncio.sleep(0)

    run(main)


def test_twisted(wire: Wire) -> None:
    class Echo(DatagramProtocol):
        transport: Any

        def datagramReceived(self, datagram: bytes, addr: Any) -> None:  # noqa: N802
            self.transport.write(datagram, addr)

    reactor: Any = EPollReactor()  # type: ignore[no-untyped-call]
    port: Any = ppv2.twisted.listenUDP(
        reactor, 0, Echo(), "127.0.0.1", trusted=["127.0.0.1"], **wire.options
    )
    thread = threading.Thread(target=reactor.run, kwargs={"installSignalHandlers": False})
    thread.start()
    try:
        with Proxy() as proxy:
            each_gets_its_own(proxy, ("127.0.0.1", port.getHost().port), wire)
    finally:
        reactor.callFromThread(
            lambda: port.stopListening().addBoth(lambda _: reactor.stop()),
        )
        thread.join(PATIENCE)
        reactor.removeAll()


def test_gevent(wire: Wire) -> None:
    wrapped = ppv2.gevent.wrap(udp(), trusted=["127.0.0.1"], **wire.options)
    with wrapped as sock, Proxy() as proxy:

        def echo() -> None:
            while True:
                payload, client = sock.recvfrom(99)
                assert sock.sendto(payload, client) == len(payload)

        serving = gevent.spawn(echo)
        try:
            pool = gevent.get_hub().threadpool
            asking = pool.spawn(each_gets_its_own, proxy, sock.getsockname(), wire)
            asking.get(timeout=PATIENCE)
        finally:
            serving.kill()


@pytest.mark.parametrize(
    "kind", [ppv2.socketserver.UDPServer, ppv2.socketserver.ThreadingUDPServer]
)
def test_socketserver(kind: type[ppv2.socketserver.UDPServer], wire: Wire) -> None:
    class Echo(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            data, sock = self.request
            sock.sendto(data, self.client_address)

    server = kind(("127.0.0.1", 0), Echo, trusted=["127.0.0.1"], **wire.options)
    with server as served, Proxy() as proxy:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        try:
            name: Any = served.server_address
            each_gets_its_own(proxy, name, wire)
        finally:
            served.shutdown()
            thread.join()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_anyio(backend: str, wire: Wire) -> None:
    async def echo(sock: ppv2.anyio.UDPSocket) -> None:
        async for payload, client in sock:
            await sock.send((payload, client))

    async def main() -> None:
        with anyio.fail_after(PATIENCE), Proxy() as proxy:
            sock = await ppv2.anyio.create_udp_socket(
                local_host="127.0.0.1", trusted=["127.0.0.1"], **wire.options
            )
            async with sock, anyio.create_task_group() as tasks:
                tasks.start_soon(echo, sock)
                await anyio.to_thread.run_sync(each_gets_its_own, proxy, sock.getsockname(), wire)
                tasks.cancel_scope.cancel()

    anyio.run(main, backend=backend)


class OneAddress(asyncio.DatagramProtocol):
    """A proxy with one socket towards its server, as the protocol of its listener."""

    def __init__(self, server: Address, wire: Wire) -> None:
        self.server = server
        self.wire = wire
        self.replies = 0
        self.upstream = udp()
        self.upstream.setblocking(False)
        asyncio.get_running_loop().add_reader(self.upstream, self.reply)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.listener = transport.get_extra_info("sockname")

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.upstream.sendto(self.wire.datagram(addr, data, self.listener), self.server)

    def reply(self) -> None:
        with suppress(BlockingIOError):
            while True:
                datagram = self.upstream.recv(65535)
                client, payload = self.wire.read(datagram)
                assert datagram == self.wire.datagram(client, payload, self.listener)
                self.transport.sendto(payload, client)
                self.replies += 1

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        asyncio.get_running_loop().remove_reader(self.upstream)
        self.upstream.close()


def test_aioquic(tmp_path: Path, wire: Wire) -> None:
    for_server, for_client = configuration(tmp_path)

    async def main() -> None:
        server = await ppv2.aioquic.serve(
            "127.0.0.1",
            0,
            configuration=for_server,
            create_protocol=Whoami,
            trusted=["127.0.0.1"],
            **wire.options,
        )
        sock: ppv2.Socket = server._transport.get_extra_info("socket")  # type: ignore[union-attr]
        name = sock.getsockname()
        transport, proxy = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: OneAddress(name, wire), local_addr=("127.0.2.6", 0)
        )

        async def one_client() -> None:
            async with connect(*proxy.listener, configuration=for_client) as client:
                its: Any = client._transport
                port = its.get_extra_info("sockname")[1]
                for size in (1, 20_000):
                    answer = await ask(client, bytes(size))
                    assert answer.startswith(f"127.0.0.1:{port} ".encode())

        await asyncio.gather(*(one_client() for _ in range(5)))
        assert sock.stats().clients == 5
        assert proxy.replies > 20
        transport.close()
        server.close()
        await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
