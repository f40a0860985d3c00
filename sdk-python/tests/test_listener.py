"""Replies that go straight to clients, from the listener's address."""

import asyncio
import errno
import socket
import socketserver
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

import ppv2.anyio
import ppv2.asyncio
import ppv2.socketserver
from namespace import inside
from peers import PATIENCE, Proxy, server, udp

if TYPE_CHECKING:
    from collections.abc import Callable

if sys.platform != "linux":
    pytest.fail("the addresses and rights are those of Linux")

# Addresses of this host that play the parts of others.
CLIENT_HOST = "127.0.1.1"
LISTENERS = [("127.0.2.1", 9200), ("127.0.2.2", 9200)]

# The namespace's only addresses of its own: the server's and the client's.
HOSTS = """
ip addr add 10.0.0.2/24 dev lo; ip addr add 203.0.113.11/24 dev lo
ip addr add 2001:db8:c::11/64 dev lo nodad
"""


def answers(sock: ppv2.Socket, client: Any, listeners: list[Any]) -> None:
    """Checks every method that sends, and that the proxy sees nothing of it."""
    at = ("127.0.0.1", sock.getsockname()[1])
    to = client.getsockname()
    addresses = []
    with Proxy() as through:
        for listener in listeners:
            through.send(at, b"hello", client=to, listener=listener)
            payload, address = sock.recvfrom(9)
            assert (payload, address) == (b"hello", to[:2])
            for number in range(2):
                assert sock.sendto(b"latest", to if number else address) == 6
                assert client.recvfrom(9) == (b"latest", listener)
            assert sock.sendmsg([b"an", b"swer"], (), 0, address) == 6
            assert client.recvfrom(9) == (b"answer", listener)
            addresses.append((address, listener))
        # Each from its own listener, whichever was the latest.
        replies = [(b"one", address) for address, _ in addresses for _ in range(3)]
        assert sock.send_batch(replies) == len(replies)
        for _, listener in addresses:
            for _ in range(3):
                assert client.recvfrom(9) == (b"one", listener)
        through.receives_nothing()
    assert sock.stats().replies_sent == 6 * len(listeners)


def test_answers_from_its_own_port_and_from_any_other() -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        with (
            ppv2.wrap(udp(host), trusted=["127.0.0.1"], reply_from="listener") as sock,
            udp(CLIENT_HOST) as client,
        ):
            own_port = ("127.0.2.1", sock.getsockname()[1])
            answers(sock, client, [own_port, *LISTENERS])


def test_those_without_a_listener_are_answered_by_the_socket() -> None:
    with (
        server(reply_from="listener", untrusted="accept") as sock,
        udp("127.0.0.2") as direct,
        Proxy() as proxy,
    ):
        peers = [(direct, b"direct"), (proxy.socket, ppv2.encode_local())]
        for peer, datagram in peers:
            peer.sendto(datagram, sock.getsockname())
            _, address = sock.recvfrom(9)
            assert address == peer.getsockname()
            sock.sendto(b"answer", address)
            assert peer.recvfrom(9) == (b"answer", sock.getsockname())


def test_closed_sockets_of_listeners_are_counted() -> None:
    with server(reply_from="listener") as sock, udp(CLIENT_HOST) as client, Proxy() as proxy:
        for number in range(66):
            listener = ("127.0.2.3", 9300 + number)
            proxy.send(sock.getsockname(), b"", client=client.getsockname(), listener=listener)
            _, address = sock.recvfrom(9)
            sock.sendto(b"answer", address)
            assert client.recvfrom(9) == (b"answer", listener)
        assert sock.stats().listeners_evicted == 2
    assert sock.stats().listeners_evicted == 2


def test_ancillary_data_can_not_be_sent_from_a_listener() -> None:
    with server(reply_from="listener") as sock, udp(CLIENT_HOST) as client, Proxy() as proxy:
        proxy.send(sock.getsockname(), b"", client=client.getsockname(), listener=LISTENERS[0])
        _, address = sock.recvfrom(9)
        ttl = [(socket.IPPROTO_IP, socket.IP_TTL, bytes(4))]
        with pytest.raises(ValueError, match="ancdata: expected none with reply_from='listener'"):
            sock.sendmsg([b""], ttl, 0, address)


def test_wrong_arguments() -> None:
    with udp() as sock:
        expected = "reply_from: expected 'proxy' or 'listener'"
        with pytest.raises(ValueError, match=f"{expected}, got 'a'"):
            ppv2.wrap(sock, trusted=["127.0.0.1"], reply_from="a")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=expected):
            ppv2.wrap(sock, trusted=["127.0.0.1"], reply_from=1)  # type: ignore[arg-type]


class _Echo(asyncio.DatagramProtocol):
    transport: asyncio.DatagramTransport

    def __init__(self) -> None:
        self.errors: list[Exception] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.DatagramTransport)
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(data, addr)

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)


def test_asyncio_and_anyio_answer_from_the_listener() -> None:
    def ask(at: Any) -> None:
        with udp(CLIENT_HOST) as client, Proxy() as proxy:
            for listener in LISTENERS:
                proxy.send(at, b"hello", client=client.getsockname(), listener=listener)
                assert client.recvfrom(9) == (b"hello", listener)
            proxy.receives_nothing()

    async def serve() -> None:
        transport, protocol = await ppv2.asyncio.create_datagram_endpoint(
            _Echo, ("127.0.0.1", 0), trusted=["127.0.0.1"], reply_from="listener"
        )
        await asyncio.to_thread(ask, transport.get_extra_info("sockname"))
        transport.close()
        assert protocol.errors == []

        async with await ppv2.anyio.create_udp_socket(
            socket.AF_INET, local_host="127.0.0.1", trusted=["127.0.0.1"], reply_from="listener"
        ) as sock:
            asking = asyncio.create_task(asyncio.to_thread(ask, sock.getsockname()))
            for _ in LISTENERS:
                await sock.send(await sock.receive())
            await asking

    for factory in (asyncio.new_event_loop, uvloop.new_event_loop):
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(asyncio.wait_for(serve(), PATIENCE))


def test_socketserver_answers_from_the_listener() -> None:
    class Echo(socketserver.DatagramRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.read())

    with (
        ppv2.socketserver.UDPServer(
            ("127.0.0.1", 0), Echo, trusted=["127.0.0.1"], reply_from="listener"
        ) as echo,
        udp(CLIENT_HOST) as client,
        Proxy() as proxy,
    ):
        thread = threading.Thread(target=echo.serve_forever, args=(0.01,))
        thread.start()
        try:
            at = ("127.0.0.1", echo.server_address[1])
            proxy.send(at, b"hello", client=client.getsockname(), listener=LISTENERS[0])
            assert client.recvfrom(9) == (b"hello", LISTENERS[0])
        finally:
            echo.shutdown()
            thread.join()


# The client on a host of its own, which `ip netns` keeps in /run.
TWO_HOSTS = """
mount -t tmpfs tmpfs /run; ip netns add client; ip -n client link set lo up
ip link add to_client type veth peer name to_server netns client
ip addr add 192.0.2.20/24 dev to_client; ip addr add 2001:db8:b::20/64 dev to_client nodad
ip link set to_client up
ip -n client addr add 203.0.113.11/24 dev to_server
ip -n client addr add 2001:db8:c::11/64 dev to_server nodad
ip -n client link set to_server up
ip route add 203.0.113.0/24 dev to_client; ip route add 2001:db8:c::/64 dev to_client
ip -n client route add default dev to_server; ip -n client -6 route add default dev to_server
"""

ONE_ANSWER = """
import socket, sys
host = sys.argv[1]
sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
sock.bind((host, 5000))
sock.settimeout(20)
print("ready", flush=True)
print(*sock.recvfrom(9))
"""


@inside(TWO_HOSTS, rights=True)
def test_a_client_on_another_host_gets_the_answer_from_the_listener() -> None:
    command = ["ip", "netns", "exec", "client", sys.executable, "-I", "-c", ONE_ANSWER]
    cases: list[tuple[Any, ...]] = [
        (("203.0.113.11", 5000), ("198.51.100.10", 9000)),
        (("2001:db8:c::11", 5000, 0, 0), ("2001:db8:a::10", 9000, 0, 0)),
    ]
    for client, listener in cases:
        with (
            server(reply_from="listener") as sock,
            Proxy() as proxy,
            subprocess.Popen(
                [*command, client[0]], stdout=subprocess.PIPE, text=True
            ) as its_process,
        ):
            assert its_process.stdout is not None
            assert its_process.stdout.readline() == "ready\n"
            proxy.send(sock.getsockname(), b"", client=client, listener=listener)
            _, address = sock.recvfrom(9)
            sock.sendto(b"answer", address)
            assert its_process.stdout.readline() == f"{b'answer'!r} {listener}\n"


@inside(HOSTS, rights=True)
def test_the_right_to_any_address_serves_ipv4() -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        with (
            ppv2.wrap(udp(host), trusted=["127.0.0.1"], reply_from="listener") as sock,
            udp("203.0.113.11") as client,
        ):
            own_port = ("198.51.100.10", sock.getsockname()[1])
            answers(sock, client, [own_port, ("198.51.100.10", 9000), ("198.51.100.11", 9000)])


@inside(HOSTS, rights=False)
def test_ipv6_needs_no_right() -> None:
    with (
        server(reply_from="listener") as sock,
        udp("2001:db8:c::11", socket.AF_INET6) as client,
    ):
        answers(sock, client, [("2001:db8:a::10", 9000, 0, 0), ("2001:db8:a::11", 9000, 0, 0)])


@inside(f"{HOSTS}ip addr add 198.51.100.10/32 dev lo", rights=False)
def test_an_address_of_the_host_needs_no_right() -> None:
    with server(reply_from="listener") as sock, udp("203.0.113.11") as client:
        own_port = ("198.51.100.10", sock.getsockname()[1])
        answers(sock, client, [own_port, ("198.51.100.10", 9000)])


@inside(HOSTS, rights=False)
def test_without_a_right_the_error_names_what_would_mend_it() -> None:
    with server(reply_from="listener") as sock, Proxy() as proxy:
        proxy.send(sock.getsockname(), b"")
        _, address = sock.recvfrom(9)
        sends: list[Callable[[], object]] = [
            lambda: sock.sendto(b"", address),
            lambda: sock.send_batch([(b"", address)]),
        ]
        for send in sends:
            with pytest.raises(OSError, match=r"can't send from listener 198\.51\.100\.10:") as e:
                send()
            assert e.value.errno == errno.EADDRNOTAVAIL
            words = str(e.value)
            assert "IP_TRANSPARENT (Operation not permitted" in words
            assert "`ip addr add 198.51.100.10/32 dev lo`" in words
            assert "`setcap cap_net_raw+ep /" in words
        assert sock.stats().replies_sent == 0
