"""Headers of Simple Proxy Protocol, and which formats a header may have."""

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import ppv2
from peers import CLIENT, CLIENT_V6, LISTENER, OTHER_CLIENT, PATIENCE, Proxy, server, udp
from ppv2 import Address
from real_proxy import proxy_to_upstream
from test_tagged import simple

V2: list[Any] = ["v2"]
SPP: list[Any] = ["spp"]
BOTH: list[Any] = ["v2", "spp"]

LISTENER_V6 = ("2001:db8::10", 9000, 0, 0)


@pytest.mark.parametrize("client", [CLIENT, CLIENT_V6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("listener", [LISTENER, LISTENER_V6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("payload", [b"hello", b""])
def test_all_that_is_known(client: Address, listener: Address, payload: bytes) -> None:
    with server(formats=SPP) as sock, Proxy() as proxy:
        proxy.send_raw(sock.getsockname(), simple(client, payload, listener))
        received = sock.recv_datagram()
        assert tuple(received) == (payload, client[:2], listener[:2], proxy.address, None)
        assert received.tlvs == ()
        sock.sendto(b"answer", received.client)
        assert proxy.receive() == simple(client, b"answer", listener)


def test_an_ipv6_socket_has_addresses_of_its_form() -> None:
    with (
        ppv2.wrap(udp("::1", socket.AF_INET6), trusted=["::1"], formats=SPP) as sock,
        udp("::1", socket.AF_INET6) as proxy,
    ):
        for client, seen in (
            (CLIENT, ("::ffff:203.0.113.11", 54321, 0, 0)),
            (CLIENT_V6, CLIENT_V6),
        ):
            proxy.sendto(simple(client, b"x"), sock.getsockname())
            payload, address = sock.recvfrom(9)
            assert (payload, address) == (b"x", seen)
            sock.sendto(b"y", address)
            assert proxy.recv(99) == simple(client, b"y")


def test_small_buffers_cut_the_payload_alone() -> None:
    with server(formats=SPP) as sock, Proxy() as proxy:
        for bufsize, expected in ((2, (b"he", socket.MSG_TRUNC)), (5, (b"hello", 0))):
            proxy.send_raw(sock.getsockname(), simple(CLIENT, b"hello"))
            assert sock.recvmsg(bufsize)[0::2] == expected
        buffer = bytearray(3)
        proxy.send_raw(sock.getsockname(), simple(CLIENT, b"hello"))
        assert sock.recvfrom_into(buffer) == (3, CLIENT)
        assert buffer == b"hel"
        longest = bytes(65507 - 38)
        proxy.send_raw(sock.getsockname(), simple(CLIENT, longest))
        assert sock.recv(65507) == longest


@pytest.mark.parametrize(
    ("formats", "datagram", "reason"),
    [
        (V2, simple(CLIENT, b"x"), "no_header"),
        (SPP, ppv2.encode(CLIENT, LISTENER) + b"x", "no_header"),
        (SPP, b"", "no_header"),
        (BOTH, b"hello", "no_header"),
        (BOTH, b"\x56", "no_header"),
        (BOTH, b"\x56\xec", "bad_header"),
        (SPP, simple(CLIENT, b"")[:37], "bad_header"),
        (BOTH, simple(("203.0.113.11", 0), b"x"), "client_address"),
        (BOTH, simple(("224.0.0.1", 53), b"x"), "client_address"),
        (BOTH, b"PROXY UNKNOWN\r\nx", "v1_header"),
    ],
)
def test_what_has_none_of_the_formats_is_dropped(
    formats: list[Any], datagram: bytes, reason: str
) -> None:
    good = simple(CLIENT, b"good") if "spp" in formats else ppv2.encode(CLIENT, LISTENER) + b"good"
    with server(formats=formats) as sock, Proxy() as proxy:
        proxy.send_raw(sock.getsockname(), datagram)
        proxy.send_raw(sock.getsockname(), good)
        assert sock.recvfrom(9) == (b"good", CLIENT)
        dropped = {name: count for name, count in sock.stats().dropped.items() if count}
        assert dropped == {reason: 1}


def test_formats_may_be_any_iterable() -> None:
    for formats in (iter(BOTH), {"v2", "spp"}, ("spp", "v2", "spp")):
        with server(formats=formats) as sock, Proxy() as proxy:
            proxy.send_raw(sock.getsockname(), simple(CLIENT, b"1"))
            proxy.send(sock.getsockname(), b"2", OTHER_CLIENT)
            assert [sock.recvfrom(9) for _ in range(2)] == [(b"1", CLIENT), (b"2", OTHER_CLIENT)]


def test_a_strangers_magic_is_payload() -> None:
    with server(formats=SPP, untrusted="accept") as sock, Proxy("127.0.0.2") as stranger:
        datagram = simple(CLIENT, b"x")
        stranger.send_raw(sock.getsockname(), datagram)
        assert sock.recvfrom(99) == (datagram, stranger.address)


class Echo(asyncio.DatagramProtocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(data, addr)


def test_libraries_that_open_several_endpoints(
    run: Callable[[Callable[[], Coroutine[Any, Any, None]]], None],
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with udp() as one, udp("127.0.0.3") as other:
            names = [one.getsockname(), other.getsockname()]
        formats: Any = iter(SPP)
        installed = ppv2.asyncio.install(addresses=names, trusted=["127.0.0.1"], formats=formats)
        with installed, Proxy() as proxy:
            for name in names:
                transport, _ = await loop.create_datagram_endpoint(Echo, local_addr=name)
                proxy.send_raw(name, simple(CLIENT, b"x"))
                assert await asyncio.to_thread(proxy.receive) == simple(CLIENT, b"x")
                transport.close()
        await asyncio.sleep(0)

    run(main)


def test_the_real_proxy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    header = 'header = { format = "spp" }'

    async def main() -> None:
        transport, _ = await ppv2.asyncio.create_datagram_endpoint(
            Echo, local_addr=("127.0.0.1", 0), trusted=["127.0.0.1"], formats=SPP
        )
        sock = transport.get_extra_info("socket")
        with proxy_to_upstream(tmp_path, sock.getsockname(), header) as listener:
            await asyncio.to_thread(ask, listener)
        stats = sock.stats()
        assert (stats.clients, stats.delivered, stats.replies_sent) == (5, 50, 50)
        transport.close()
        await asyncio.sleep(0)

    def ask(listener: Address) -> None:
        clients = [udp(f"127.0.0.{number}") for number in range(50, 55)]
        for number in range(10):
            for client in clients:
                client.sendto(f"{number} {client.getsockname()}".encode()[: number * 9], listener)
            for client in clients:
                expected = f"{number} {client.getsockname()}".encode()[: number * 9]
                assert client.recvfrom(99) == (expected, listener)
        for client in clients:
            client.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
    assert not caplog.messages
