"""`ppv2.anyio`, on asyncio and trio."""

from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

import ppv2
import ppv2.anyio
from peers import CLIENT, PATIENCE, Proxy, hostile

Main = Callable[[], Coroutine[Any, Any, None]]


@pytest.fixture(params=["asyncio", "trio"])
def run(request: pytest.FixtureRequest) -> Callable[[Main], None]:
    async def patiently(main: Main) -> None:
        with anyio.fail_after(PATIENCE):
            await main()

    return lambda main: anyio.run(patiently, main, backend=request.param)


async def udp_socket(**options: Any) -> ppv2.anyio.UDPSocket:
    options = {"local_host": "127.0.0.1", "trusted": ["127.0.0.1"], **options}
    return await ppv2.anyio.create_udp_socket(**options)


def test_tasks_see_clients_and_answer_them(run: Callable[[Main], None]) -> None:
    async def serve(udp: ppv2.anyio.UDPSocket) -> None:
        async for payload, client in udp:
            assert client == CLIENT
            await udp.send((payload, client))

    async def main() -> None:
        with Proxy() as proxy:
            async with await udp_socket() as udp, anyio.create_task_group() as tasks:
                tasks.start_soon(serve, udp)
                for _, datagram in hostile().values():
                    proxy.send_raw(udp.getsockname(), datagram)
                proxy.send(udp.getsockname(), b"hello")
                assert await anyio.to_thread.run_sync(proxy.receive) == b"hello"
                await udp.sendto(b"again", *CLIENT)
                assert proxy.receive() == b"again"
                assert udp.stats().replies_sent == 2
                await udp.aclose()
                # The loop over datagrams ends with the socket.

    run(main)


def test_a_datagram_says_all_that_is_known(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        with Proxy() as proxy:
            async with await udp_socket(reuse_port=True) as udp:
                proxy.send(udp.getsockname(), b"hello")
                datagram = await udp.receive_datagram()
                assert datagram.proxy == proxy.address
                with pytest.raises(ppv2.NoReplyPathError):
                    await udp.sendto(b"", "192.0.2.1", 53)
            for late in (udp.receive(), udp.send((b"", CLIENT))):
                with pytest.raises(anyio.ClosedResourceError):
                    await late
            await udp.aclose()

    run(main)


def test_arguments_are_those_of_anyio(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match='Either "family" or "local_host" must be given'):
            await udp_socket(local_host=None)
        with pytest.raises(ValueError, match='"nowhere" is not a network'):
            await udp_socket(trusted=["nowhere"])

    run(main)
