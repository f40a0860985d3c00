"""`ppv2.aioquic`, with QUIC clients that come through the real proxy."""

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ConnectionTerminated, QuicEvent, StreamDataReceived

import ppv2.aioquic
from certificate import write_certificate
from peers import PATIENCE, Proxy
from real_proxy import proxy_to


class Whoami(QuicConnectionProtocol):
    """Answers on each stream with the client's address."""

    def datagram_received(self, data: Any, addr: Any) -> None:
        self.client = addr
        super().datagram_received(data, addr)

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, StreamDataReceived) and event.end_stream:
            host, port = self.client[:2]
            answer = f"{host}:{port} {len(event.data)}".encode()
            self._quic.send_stream_data(event.stream_id, answer, end_stream=True)
            self.transmit()
        elif isinstance(event, ConnectionTerminated):
            self.closed = True


async def ask(client: QuicConnectionProtocol, request: bytes) -> bytes:
    reader, writer = await client.create_stream()
    writer.write(request)
    writer.write_eof()
    return await reader.read()


def configuration(folder: Path) -> tuple[QuicConfiguration, QuicConfiguration]:
    certificate, key = write_certificate(folder)
    server = QuicConfiguration(is_client=False, alpn_protocols=["test"])
    server.load_cert_chain(certificate, key)
    client = QuicConfiguration(alpn_protocols=["test"], server_name="localhost")
    client.load_verify_locations(str(certificate))
    return server, client


def move(client: QuicConnectionProtocol) -> int:
    """Gives the client another port, as a NAT does that has forgotten it."""
    transport: Any = client._transport
    loop: Any = asyncio.get_running_loop()
    loop._remove_reader(transport._sock_fd)
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as moved:
        moved.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        moved.bind(("::", 0))
        moved.setblocking(False)
        os.dup2(moved.fileno(), transport._sock_fd)
        port: int = moved.getsockname()[1]
    loop._add_reader(transport._sock_fd, transport._read_ready)
    return port


@pytest.mark.usefixtures("any_replies")
@pytest.mark.parametrize("retry", [False, True], ids=["", "retry"])
@pytest.mark.parametrize(
    ("bound", "upstream", "seen"),
    [("127.0.0.1", "127.0.0.1", "127.0.0.1"), ("::", "127.7.0.1", "::ffff:127.0.0.1")],
    ids=["", "wildcard"],
)
def test_quic_sees_its_clients(
    tmp_path: Path, bound: str, upstream: str, seen: str, retry: bool
) -> None:
    for_server, for_client = configuration(tmp_path)

    async def main() -> None:
        server = await ppv2.aioquic.serve(
            bound,
            0,
            configuration=for_server,
            create_protocol=Whoami,
            retry=retry,
            trusted=["127.0.0.1"],
        )
        sock: ppv2.Socket = server._transport.get_extra_info("socket")  # type: ignore[union-attr]
        with proxy_to((upstream, sock.getsockname()[1])) as listener:
            async with connect(*listener, configuration=for_client) as client:
                transport: Any = client._transport
                port = transport.get_extra_info("sockname")[1]
                answer = await ask(client, b"x" * 100_000)
                assert answer.startswith(f"{seen}:{port} ".encode())
                moved_to = move(client)
                assert moved_to != port
                answer = await ask(client, b"x")
                assert answer == f"{seen}:{moved_to} 1".encode()
        assert sum(sock.stats().dropped.values()) == 0
        server.close()
        await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


class Forward(asyncio.DatagramProtocol):
    """A proxy at a listener's address that sees to one direction alone."""

    def __init__(self, proxy: Proxy, server: Any, listener: Any) -> None:
        self.proxy, self.server, self.listener = proxy, server, listener

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.proxy.send(self.server, data, client=addr, listener=self.listener)


class Client(QuicConnectionProtocol):
    """Notes where answers come from."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.answered_from: set[Any] = set()

    def datagram_received(self, data: Any, addr: Any) -> None:
        self.answered_from.add(addr[:2])
        super().datagram_received(data, addr)


def test_quic_is_answered_from_the_listener(tmp_path: Path) -> None:
    for_server, for_client = configuration(tmp_path)

    async def main() -> None:
        server = await ppv2.aioquic.serve(
            "127.0.0.1",
            0,
            configuration=for_server,
            create_protocol=Whoami,
            trusted=["127.0.0.1"],
            reply_from="listener",
        )
        sock: ppv2.Socket = server._transport.get_extra_info("socket")  # type: ignore[union-attr]
        # On the server's own host the two have to share the address.
        listening = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.2.5", 0))
        listener = listening.getsockname()
        with Proxy() as proxy:
            forward, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                lambda: Forward(proxy, sock.getsockname(), listener), sock=listening
            )
            async with connect(
                *listener, configuration=for_client, create_protocol=Client
            ) as client:
                assert isinstance(client, Client)
                transport: Any = client._transport
                port = transport.get_extra_info("sockname")[1]
                answer = await ask(client, b"x" * 100_000)
                assert answer.startswith(f"127.0.0.1:{port} ".encode())
            forward.close()
            proxy.receives_nothing()
        assert client.answered_from == {(f"::ffff:{listener[0]}", listener[1])}
        server.close()
        await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
