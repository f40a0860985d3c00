"""`ppv2.asyncio.install`: libraries that open endpoints by themselves see clients."""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import ExitStack
from typing import Any

import pytest
import uvloop

from peers import CLIENT, Proxy, udp
from ppv2.asyncio import DatagramTransport, install
from real_proxy import free_port

Main = Callable[[], Coroutine[Any, Any, None]]

TRUSTED = ["127.0.0.1", "::1"]


class Protocol(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.received: asyncio.Queue[tuple[bytes, Any]] = asyncio.Queue()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.received.put_nowait((data, addr))


class Endpoint:
    """One that was opened as a library does, and what it is handed."""

    def __init__(self, transport: asyncio.DatagramTransport, protocol: Protocol) -> None:
        self.transport, self.protocol = transport, protocol
        self.sees_clients = isinstance(transport, DatagramTransport)

    @classmethod
    async def open(cls, *args: Any, **options: Any) -> "Endpoint":
        loop = asyncio.get_running_loop()
        return cls(*await loop.create_datagram_endpoint(Protocol, *args, **options))

    async def receive(self, proxy: Proxy) -> tuple[bytes, Any]:
        proxy.send(self.transport.get_extra_info("sockname")[:2], b"hello")
        return await self.protocol.received.get()

    async def close(self) -> None:
        self.transport.close()
        await asyncio.sleep(0.01)


async def closes(*endpoints: Awaitable[Endpoint]) -> list[bool]:
    """Of each endpoint, whether it sees clients."""
    found = []
    for made in endpoints:
        endpoint = await made
        found.append(endpoint.sees_clients)
        await endpoint.close()
    return found


def test_named_addresses_see_clients_and_nothing_else_changes(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        named, other = ("127.0.0.1", free_port()), ("127.0.0.1", free_port())
        before = asyncio.get_running_loop().create_datagram_endpoint
        with install(addresses=[named], trusted=iter(TRUSTED)), Proxy() as proxy:
            for spelled in (named, ("localhost", named[1])):
                endpoint = await Endpoint.open(local_addr=spelled, family=socket.AF_INET)
                assert await endpoint.receive(proxy) == (b"hello", CLIENT)
                endpoint.transport.sendto(b"answer", CLIENT)
                assert await asyncio.to_thread(proxy.receive) == b"answer"
                await endpoint.close()
            endpoint = await Endpoint.open(named)
            assert endpoint.sees_clients
            await endpoint.close()

            plain = await Endpoint.open(local_addr=other)
            data, sender = await plain.receive(proxy)
            assert (data[28:], sender) == (b"hello", proxy.address)
            await plain.close()
            client = Endpoint.open(local_addr=named, remote_addr=other)
            assert await closes(client, Endpoint.open(remote_addr=other)) == [False, False]
        assert asyncio.get_running_loop().create_datagram_endpoint == before
        assert await closes(Endpoint.open(local_addr=named)) == [False]

    run(main)


def test_sockets_that_are_brought_are_told_by_their_address(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        with ExitStack() as stack, Proxy() as proxy:
            named, other, connected = (stack.enter_context(udp()) for _ in range(3))
            connected.connect(proxy.address)
            v6 = stack.enter_context(udp("::1", socket.AF_INET6))
            names = [sock.getsockname() for sock in (named, connected, v6)]
            stack.enter_context(install(addresses=names, trusted=TRUSTED))
            endpoint = await Endpoint.open(sock=named)
            assert named.getsockname() == names[0]
            assert await endpoint.receive(proxy) == (b"hello", CLIENT)
            await endpoint.close()
            assert named.fileno() == -1
            opened = [Endpoint.open(sock=sock) for sock in (other, connected, v6)]
            assert await closes(*opened) == [False, False, True]

    run(main)


def test_installations_nest_and_are_undone_in_any_order(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        before = loop.create_datagram_endpoint
        one, two = ("127.0.0.1", free_port()), ("127.0.0.1", free_port())
        outer = install(loop, addresses=[one], trusted=["127.0.0.1"])
        inner = install(loop, addresses=[one, two], trusted=["127.0.0.3"])

        async def trusted(address: tuple[str, int]) -> str:
            """Which of two proxies is trusted, asked in the order of their addresses."""
            endpoint = await Endpoint.open(local_addr=address)
            for host in ("127.0.0.1", "127.0.0.3"):
                with Proxy(host) as proxy:
                    proxy.send(address, host.encode())
            found, _ = await endpoint.protocol.received.get()
            assert endpoint.transport.get_extra_info("socket").stats().delivered == 1
            await endpoint.close()
            return found.decode()

        assert await trusted(one) == "127.0.0.3"
        assert await trusted(two) == "127.0.0.3"
        outer.undo()
        outer.undo()
        assert await trusted(one) == "127.0.0.3"
        again = install(addresses=[two], trusted=["127.0.0.1"])
        inner.undo()
        assert await closes(Endpoint.open(local_addr=one)) == [False]
        assert await trusted(two) == "127.0.0.1"
        again.undo()
        assert loop.create_datagram_endpoint == before
        assert await closes(Endpoint.open(local_addr=two)) == [False]

    run(main)


def test_what_others_put_before_it_stays(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        named = ("127.0.0.1", free_port())
        installed = install(addresses=[named], trusted=TRUSTED)
        method, asked = loop.create_datagram_endpoint, []

        async def theirs(*args: Any, **options: Any) -> Any:
            asked.append(options)
            return await method(*args, **options)

        loop.create_datagram_endpoint = theirs  # type: ignore[method-assign]
        assert await closes(Endpoint.open(local_addr=named)) == [True]
        installed.undo()
        assert await closes(Endpoint.open(local_addr=named)) == [False]
        assert asked == [{"local_addr": named}] * 2
        assert loop.create_datagram_endpoint is theirs

    run(main)


def test_a_loop_that_does_not_run_yet_is_passed() -> None:
    named = ("127.0.0.1", free_port())
    with pytest.raises(RuntimeError, match=r"loop: no event loop is running; .* pass the loop"):
        install(addresses=[named], trusted=TRUSTED)
    with asyncio.Runner() as runner:
        install(runner.get_loop(), addresses=[named], trusted=TRUSTED)
        assert runner.run(closes(Endpoint.open(local_addr=named))) == [True]


def test_mistakes_are_told_at_once() -> None:
    class Fixed:
        """A loop in native code whose methods are its own."""

        __slots__ = ()

        def create_datagram_endpoint(self) -> None: ...

    with asyncio.Runner() as runner:
        loop: Any = runner.get_loop()
        for addresses in ([("localhost", 1)], [("127.0.0.1", 0)], ["127.0.0.1:1"], [1]):
            with pytest.raises(ValueError, match=r"addresses: expected pairs .IP address, port."):
                install(loop, addresses=addresses, trusted=TRUSTED)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"addresses: expected at least one"):
            install(loop, addresses=[], trusted=TRUSTED)
        named = [("127.0.0.1", 1)]
        with pytest.raises(ValueError, match='"nowhere" is not a network'):
            install(loop, addresses=named, trusted=["nowhere"])
        with pytest.raises(ValueError, match="trusted: it names IPv6 networks alone"):
            install(loop, addresses=named, trusted=["::1"])
        assert "create_datagram_endpoint" not in vars(loop)
        loop = Fixed()
        with pytest.raises(TypeError, match=r"loop: methods of .* can't be replaced"):
            install(loop, addresses=named, trusted=TRUSTED)


def test_an_address_that_was_not_meant_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        port = free_port()
        with install(addresses=[("0.0.0.0", port)], trusted=TRUSTED):
            assert await closes(Endpoint.open(local_addr=("127.0.0.1", port))) == [False]
        [record] = caplog.records
        assert (record.name, record.levelno) == ("ppv2", logging.WARNING)
        assert f"at 127.0.0.1, port {port}, is not one" in record.getMessage()
        assert f"0.0.0.0, port {port}:" in record.getMessage()

    asyncio.run(main())


def test_what_can_not_be_opened_leaves_nothing_open(run: Callable[[Main], None]) -> None:
    def broken() -> asyncio.DatagramProtocol:
        raise RuntimeError("broken")

    async def main() -> None:
        named, port = ("127.0.0.1", free_port()), free_port()
        loop = asyncio.get_running_loop()
        with install(addresses=[named], trusted=TRUSTED), udp() as sock:
            taken = sock.getsockname()
            with (
                install(addresses=[taken], trusted=TRUSTED),
                pytest.raises(OSError, match="in use"),
            ):
                await Endpoint.open(local_addr=taken)
            with pytest.raises(RuntimeError, match="broken"):
                await loop.create_datagram_endpoint(broken, named)
            # uvloop leaves its own endpoint open here.
            if not isinstance(loop, uvloop.Loop):
                with (
                    install(addresses=[("0.0.0.0", port)], trusted=TRUSTED),
                    pytest.raises(RuntimeError, match="broken"),
                ):
                    await loop.create_datagram_endpoint(broken, ("127.0.0.1", port))

    run(main)
