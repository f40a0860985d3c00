"""`ppv2.asyncio`, on the standard loop and on uvloop."""

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
import uvloop

import ppv2
import ppv2.asyncio
from peers import CLIENT, OTHER_CLIENT, Proxy, hostile, udp
from ppv2.asyncio import DatagramTransport, create_datagram_endpoint

Main = Callable[[], Coroutine[Any, Any, None]]


class Protocol(asyncio.DatagramProtocol):
    """Notes what it is told."""

    transport: DatagramTransport

    def __init__(self) -> None:
        self.received: asyncio.Queue[tuple[bytes, Any]] = asyncio.Queue()
        self.errors: list[Exception] = []
        self.calls: list[str] = []
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, DatagramTransport)
        self.transport = transport
        self.calls.append("made")

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.received.put_nowait((data, addr))

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)

    def pause_writing(self) -> None:
        self.calls.append("pause")

    def resume_writing(self) -> None:
        self.calls.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(exc)


async def endpoint(
    factory: Callable[[], Protocol] = Protocol, **options: Any
) -> tuple[DatagramTransport, Protocol]:
    options = {"local_addr": ("127.0.0.1", 0), "trusted": ["127.0.0.1"], **options}
    return await create_datagram_endpoint(factory, **options)


async def reply(proxy: Proxy) -> bytes:
    return await asyncio.to_thread(proxy.receive)


async def closed(transport: DatagramTransport, protocol: Protocol) -> None:
    transport.close()
    assert await protocol.lost is None
    assert transport.get_extra_info("socket").fileno() == -1


def test_a_protocol_sees_clients_and_answers_them(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        transport, protocol = await endpoint()
        name = transport.get_extra_info("sockname")
        with Proxy() as one, Proxy() as other:
            for _, datagram in hostile().values():
                one.send_raw(name, datagram)
            one.send(name, b"one")
            data, at_one = await protocol.received.get()
            assert (data, at_one) == (b"one", CLIENT)
            other.send(name, b"other", listener=("198.51.100.99", 53))
            data, at_other = await protocol.received.get()
            transport.sendto(b"first", at_one)
            transport.sendto(bytearray(b"second"), at_other)
            transport.sendto(memoryview(b"third"), CLIENT)
            transport.sendto(b"", CLIENT)
            assert await reply(one) == b"first"
            assert [await reply(other) for _ in range(3)] == [b"second", b"third", b""]
        sock = transport.get_extra_info("socket")
        assert isinstance(sock, ppv2.Socket)
        assert sock.stats().delivered == 2
        assert protocol.errors == []
        assert protocol.calls == ["made"]
        await closed(transport, protocol)

    run(main)


def test_a_burst_arrives_whole_and_in_order(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        transport, protocol = await endpoint()
        with Proxy() as proxy:
            for number in range(100):
                proxy.send(transport.get_extra_info("sockname"), bytes([number]))
            received = [await protocol.received.get() for _ in range(100)]
        assert received == [(bytes([number]), CLIENT) for number in range(100)]
        await closed(transport, protocol)

    run(main)


def test_a_client_never_seen_is_told_to_the_protocol(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        transport, protocol = await endpoint()
        transport.sendto(b"", OTHER_CLIENT)
        [error] = protocol.errors
        assert isinstance(error, ppv2.NoReplyPathError)
        with pytest.raises(TypeError, match=r"address: expected a tuple .*, got None"):
            transport.sendto(b"")
        with pytest.raises(TypeError, match="data: expected a bytes-like object, got 'text'"):
            transport.sendto("text", CLIENT)  # type: ignore[arg-type]
        await closed(transport, protocol)

    run(main)


class Clogged:
    """A socket that has no room to send until it is told."""

    def __init__(self, inner: ppv2.Socket) -> None:
        self.inner = inner
        self.clogged = True

    def sendto(self, data: bytes, addr: Any) -> None:
        if self.clogged:
            raise BlockingIOError
        self.inner.sendto(data, addr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


async def clogged(
    proxy: Proxy,
) -> tuple[DatagramTransport, Protocol, Clogged]:
    transport, protocol = await endpoint()
    proxy.send(transport.get_extra_info("sockname"), b"")
    await protocol.received.get()
    sock = Clogged(transport._sock)
    transport._sock = sock  # type: ignore[assignment]
    return transport, protocol, sock


def test_writing_pauses_and_resumes(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        with Proxy() as proxy:
            transport, protocol, sock = await clogged(proxy)
            # Room for one: each costs 128 bytes besides its payload.
            transport.set_write_buffer_limits(high=200)
            assert transport.get_write_buffer_limits() == (50, 200)
            payload = bytearray(b"x" * 60)
            transport.sendto(payload, CLIENT)
            payload[:] = b"y" * 60
            assert protocol.calls == ["made"]
            transport.sendto(payload, CLIENT)
            assert protocol.calls == ["made", "pause"]
            transport.sendto(payload, CLIENT)
            assert transport.get_write_buffer_size() == 3 * (128 + 60)
            sock.clogged = False
            assert await reply(proxy) == b"x" * 60
            assert await reply(proxy) == b"y" * 60
            assert await reply(proxy) == b"y" * 60
            while transport.get_write_buffer_size():
                await asyncio.sleep(0)
            assert protocol.calls == ["made", "pause", "resume"]
            await closed(transport, protocol)

    run(main)


def test_empty_datagrams_pause_writing_and_are_not_kept_without_end(
    run: Callable[[Main], None],
) -> None:
    async def main() -> None:
        with Proxy() as proxy:
            transport, protocol, _ = await clogged(proxy)
            for _ in range(64 * 1024 // 128):
                transport.sendto(b"", CLIENT)
            assert protocol.calls == ["made"]
            transport.sendto(b"", CLIENT)
            assert protocol.calls == ["made", "pause"]
            # A protocol that does not care.
            for _ in range(40_000):
                transport.sendto(b"", CLIENT)
            assert transport.get_write_buffer_size() == 4 * 1024 * 1024
            assert all(
                isinstance(error, OSError) and error.errno == errno.ENOBUFS
                for error in protocol.errors
            )
            assert len(protocol.errors) == 513 + 40_000 - 4 * 1024 * 1024 // 128
            # Unless it is told to keep more.
            transport.set_write_buffer_limits(high=16 * 1024 * 1024)
            transport.sendto(b"x", CLIENT)
            assert transport.get_write_buffer_size() == 4 * 1024 * 1024 + 129
            transport.abort()
            assert await protocol.lost is None

    run(main)


def test_what_waits_is_sent_before_closing(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        with Proxy() as proxy:
            transport, protocol, sock = await clogged(proxy)
            transport.sendto(b"one", CLIENT)
            transport.sendto(b"nobody", OTHER_CLIENT)
            transport.sendto(b"two", CLIENT)
            transport.close()
            transport.close()
            assert transport.is_closing()
            await asyncio.sleep(0.01)
            assert not protocol.lost.done()
            sock.clogged = False
            assert await protocol.lost is None
            assert [await reply(proxy), await reply(proxy)] == [b"one", b"two"]
            assert [type(error) for error in protocol.errors] == [ppv2.NoReplyPathError]
            transport.sendto(b"late", CLIENT)
            proxy.receives_nothing()

    run(main)


def test_abort_drops_what_waits(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        with Proxy() as proxy:
            transport, protocol, sock = await clogged(proxy)
            transport.sendto(b"one", CLIENT)
            transport.close()
            transport.abort()
            transport.abort()
            sock.clogged = False
            assert await protocol.lost is None
            assert transport.get_write_buffer_size() == 0
            proxy.receives_nothing()

    run(main)


def test_a_protocol_that_fails_does_not_cost_the_next_client(run: Callable[[Main], None]) -> None:
    class Failing(Protocol):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            super().datagram_received(data, addr)
            if data == b"bad":
                raise RuntimeError(data)

    async def main() -> None:
        reported: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: reported.append(context))
        transport, protocol = await endpoint(Failing)
        with Proxy() as proxy:
            proxy.send(transport.get_extra_info("sockname"), b"bad")
            proxy.send(transport.get_extra_info("sockname"), b"good")
            assert (await protocol.received.get())[0] == b"bad"
            assert (await protocol.received.get())[0] == b"good"
        [context] = reported
        assert context["message"] == "protocol.datagram_received() failed"
        assert isinstance(context["exception"], RuntimeError)
        assert context["transport"] is transport
        await closed(transport, protocol)

    run(main)


def test_a_protocol_that_closes_is_told_nothing_more(run: Callable[[Main], None]) -> None:
    class Closing(Protocol):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            super().datagram_received(data, addr)
            self.transport.close()

    async def main() -> None:
        transport, protocol = await endpoint(Closing)
        with Proxy() as proxy:
            for _ in range(3):
                proxy.send(transport.get_extra_info("sockname"), b"x")
            await protocol.lost
        assert protocol.received.qsize() == 1

    run(main)


def test_another_protocol_takes_over(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        transport, first = await endpoint()
        second = Protocol()
        assert transport.get_protocol() is first
        transport.set_protocol(second)
        assert transport.get_protocol() is second
        with pytest.raises(TypeError, match="protocol: expected a DatagramProtocol"):
            transport.set_protocol(asyncio.Protocol())
        with Proxy() as proxy:
            proxy.send(transport.get_extra_info("sockname"), b"x")
            assert (await second.received.get())[0] == b"x"
        assert first.received.empty()
        await closed(transport, second)

    run(main)


def test_a_socket_that_is_brought_stays_open_until_the_transport_closes(
    run: Callable[[Main], None],
) -> None:
    async def main() -> None:
        with udp() as sock, Proxy() as proxy:
            transport, protocol = await endpoint(local_addr=None, sock=sock)
            # Servers go on to ask the socket itself, as hypercorn does.
            name = sock.getsockname()
            assert transport.get_extra_info("sockname") == name
            assert sock.gettimeout() == 0
            assert repr(transport).startswith("<ppv2.asyncio.DatagramTransport open <ppv2.Socket")
            proxy.send(name, b"x")
            assert await protocol.received.get() == (b"x", CLIENT)
            await closed(transport, protocol)
            assert sock.fileno() == -1

    run(main)


def test_a_socket_that_is_refused_is_still_the_callers(run: Callable[[Main], None]) -> None:
    def broken() -> Protocol:
        raise RuntimeError("broken")

    async def main() -> None:
        with udp() as sock:
            for factory, trusted in ((broken, ["127.0.0.1"]), (Protocol, ["::1"])):
                with pytest.raises((RuntimeError, ValueError), match=r"broken|it names IPv6"):
                    await endpoint(factory, local_addr=None, sock=sock, trusted=trusted)
            transport, protocol = await endpoint(local_addr=None, sock=sock)
            await closed(transport, protocol)
        with ppv2.wrap(udp(), trusted=["127.0.0.1"]) as wrapped:
            with pytest.raises(TypeError, match=r"sock: expected .* before ppv2.wrap\(\)"):
                await endpoint(local_addr=None, sock=wrapped)
            wrapped.getsockname()

    run(main)


def test_the_loops_own_endpoint_shows_clients_or_refuses(run: Callable[[Main], None]) -> None:
    class Plain(asyncio.DatagramProtocol):
        def __init__(self) -> None:
            self.received: asyncio.Queue[tuple[bytes, Any]] = asyncio.Queue()

        def datagram_received(self, data: bytes, addr: Any) -> None:
            self.received.put_nowait((data, addr))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with ppv2.wrap(udp(), trusted=["127.0.0.1"]) as wrapped, Proxy() as proxy:
            sock: Any = wrapped
            made = loop.create_datagram_endpoint(Plain, sock=sock)
            if isinstance(loop, uvloop.Loop):
                message = r"sock: uvloop\.Loop reads .* call ppv2\.asyncio\.create_datagram_end"
                with pytest.raises(TypeError, match=message):
                    await made
                # And from a task of its own.
                with pytest.raises(TypeError, match=message):
                    await asyncio.create_task(loop.create_datagram_endpoint(Plain, sock=sock))
                # What asks for the same from Python is no loop.
                assert sock.type == socket.SOCK_DGRAM
                sock.setblocking(False)
                return
            transport, protocol = await made
            proxy.send(sock.getsockname(), b"x")
            data, client = await protocol.received.get()
            assert (data, client) == (b"x", CLIENT)
            transport.sendto(b"answer", client)
            assert await reply(proxy) == b"answer"
            transport.close()
            await asyncio.sleep(0)

    run(main)


def test_two_endpoints_share_a_port_when_told(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        transport, protocol = await endpoint(reuse_port=True, family=socket.AF_INET)
        name = transport.get_extra_info("sockname")
        with pytest.raises(OSError, match="in use"):
            await endpoint(local_addr=name)
        again, its_protocol = await endpoint(local_addr=name, reuse_port=True, allow_broadcast=True)
        await closed(transport, protocol)
        await closed(again, its_protocol)

    run(main)


def test_arguments_that_contradict_are_refused(run: Callable[[Main], None]) -> None:
    async def refused(message: str, **options: Any) -> None:
        with pytest.raises((ValueError, TypeError), match=message):
            await endpoint(**options)

    async def main() -> None:
        await refused("remote_addr: a server behind a proxy", remote_addr=("127.0.0.1", 1))
        await refused("expected either local_addr or sock", local_addr=None)
        await refused("local_addr: expected .host, port.", local_addr="127.0.0.1")
        await refused('"nowhere" is not a network', trusted=["nowhere"])
        with udp() as sock:
            await refused("expected either local_addr or sock", sock=sock)
            await refused("can't be used with sock", local_addr=None, sock=sock, reuse_port=True)

    run(main)


def test_a_protocol_that_can_not_be_made_leaves_nothing_open(run: Callable[[Main], None]) -> None:
    def broken() -> Protocol:
        raise RuntimeError("broken")

    async def main() -> None:
        made: Awaitable[Any] = endpoint(broken)
        with pytest.raises(RuntimeError, match="broken"):
            await made

    run(main)
