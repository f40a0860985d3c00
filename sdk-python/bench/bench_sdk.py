"""What the SDK costs a Python server, and what its batches save: `bench/run`.

Every figure is a ratio of two servers that are measured in turn in one run, the
median of several rounds: the SDK's, whose clients come through proxies and carry
headers, and one of the standard library, whose clients carry none. What is
measured is the processor time of the server's thread, the kernel's part of it
included; datagrams are sent to it, and its answers taken, off the clock. A ratio
of rates is that of the times, turned over.
"""

import asyncio
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import ppv2
import ppv2.asyncio

# Datagrams that wait for the server when the clock is started.
BURST = 64
TRAIN = 32
ROUNDS = 15
BURSTS_PER_ROUND = 150
PAYLOAD = b"x" * 64
# What servers ask for who know that their datagrams fit in a packet. More costs the
# plain socket time, which allocates it, and the SDK none.
BUFFER = 2048

# Linux's numbers, for which the socket module has no names.
SOL_UDP = 17
UDP_SEGMENT = 103

Work = Callable[[], int]
"""Handles one burst, and returns how many nanoseconds a datagram took."""


class Peers:
    """Those who send to a server: clients without header, or sessions of a proxy."""

    def __init__(self, stack: ExitStack, name: Any, senders: int, *, header: bool) -> None:
        self.sockets = []
        self.datagrams = []
        for number in range(senders):
            sock = stack.enter_context(udp())
            sock.connect(name)
            self.sockets.append(sock)
            client = (f"203.0.113.{number}", 1024 + number)
            front = ppv2.encode(client, ("198.51.100.10", 9000)) if header else b""
            self.datagrams.append(front + PAYLOAD)

    def send(self, count: int = BURST) -> None:
        for number in range(count):
            index = number % len(self.sockets)
            self.sockets[index].send(self.datagrams[index])

    def send_trains(self) -> None:
        segment = self.datagrams[0]
        control = [(SOL_UDP, UDP_SEGMENT, struct.pack("H", len(segment)))]
        for _ in range(BURST // TRAIN):
            self.sockets[0].sendmsg([segment * TRAIN], control)

    def take_answers(self) -> None:
        for number in range(BURST):
            self.sockets[number % len(self.sockets)].recv(65535)

    def take_answer(self) -> None:
        self.sockets[0].recv(65535)


def udp() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    sock.bind(("127.0.0.1", 0))
    return sock


def plain_server(stack: ExitStack, senders: int) -> tuple[socket.socket, Peers]:
    sock = stack.enter_context(udp())
    return sock, Peers(stack, sock.getsockname(), senders, header=False)


def sdk_server(stack: ExitStack, senders: int) -> tuple[ppv2.Socket, Peers]:
    sock = stack.enter_context(ppv2.wrap(udp(), trusted=["127.0.0.1"]))
    return sock, Peers(stack, sock.getsockname(), senders, header=True)


def echo_one_by_one(sock: Any, peers: Peers) -> Work:
    def work() -> int:
        peers.send()
        start = time.thread_time_ns()
        for _ in range(BURST):
            data, client = sock.recvfrom(BUFFER)
            sock.sendto(data, client)
        took = time.thread_time_ns() - start
        peers.take_answers()
        return took // BURST

    return work


def receive_one_by_one(sock: socket.socket, peers: Peers) -> Work:
    def work() -> int:
        peers.send()
        start = time.thread_time_ns()
        for _ in range(BURST):
            sock.recvfrom(BUFFER)
        return (time.thread_time_ns() - start) // BURST

    return work


def receive_batches(sock: ppv2.Socket, peers: Peers) -> Work:
    def work() -> int:
        peers.send()
        start = time.thread_time_ns()
        received = 0
        while received < BURST:
            received += len(sock.recv_batch(BURST))
        return (time.thread_time_ns() - start) // BURST

    return work


def echo_batches(sock: ppv2.Socket, peers: Peers, send: Callable[[], None]) -> Work:
    def work() -> int:
        send()
        start = time.thread_time_ns()
        received = 0
        while received < BURST:
            batch = sock.recv_batch(BURST)
            received += len(batch)
            sock.send_batch(batch)
        took = time.thread_time_ns() - start
        peers.take_answers()
        return took // BURST

    return work


class Echo(asyncio.DatagramProtocol):
    """Echoes, and says when it has echoed as many datagrams as are expected."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop

    def expect(self, count: int) -> "asyncio.Future[None]":
        self.left = count
        self.done = self.loop.create_future()
        return self.done

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(data, addr)
        self.left -= 1
        if not self.left:
            self.done.set_result(None)


def asyncio_server(
    stack: ExitStack, create: Callable[..., Any], senders: int, *, header: bool
) -> tuple[asyncio.AbstractEventLoop, Echo, Peers]:
    loop = asyncio.new_event_loop()
    stack.callback(loop.close)
    sock = udp()
    peers = Peers(stack, sock.getsockname(), senders, header=header)
    transport, protocol = loop.run_until_complete(create(loop, sock))

    def close() -> None:
        transport.close()
        loop.run_until_complete(asyncio.sleep(0))

    stack.callback(close)
    return loop, protocol, peers


async def plain_endpoint(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> Any:
    return await loop.create_datagram_endpoint(lambda: Echo(loop), sock=sock)


async def sdk_endpoint(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> Any:
    return await ppv2.asyncio.create_datagram_endpoint(
        lambda: Echo(loop), sock=sock, trusted=["127.0.0.1"]
    )


def echo_asyncio_bursts(loop: asyncio.AbstractEventLoop, protocol: Echo, peers: Peers) -> Work:
    def work() -> int:
        peers.send()
        done = protocol.expect(BURST)
        start = time.thread_time_ns()
        loop.run_until_complete(done)
        took = time.thread_time_ns() - start
        peers.take_answers()
        return took // BURST

    return work


def echo_asyncio_singly(loop: asyncio.AbstractEventLoop, protocol: Echo, peers: Peers) -> Work:
    """One datagram for each turn of the loop, the least that batches can do for it."""

    def work() -> int:
        took = 0
        for _ in range(BURST):
            peers.send(1)
            done = protocol.expect(1)
            start = time.thread_time_ns()
            loop.run_until_complete(done)
            took += time.thread_time_ns() - start
            peers.take_answer()
        return took // BURST

    return work


def one_by_one(stack: ExitStack) -> tuple[Work, Work]:
    return (
        echo_one_by_one(*sdk_server(stack, BURST)),
        echo_one_by_one(*plain_server(stack, BURST)),
    )


def receiving(stack: ExitStack) -> tuple[Work, Work]:
    return (
        receive_batches(*sdk_server(stack, BURST)),
        receive_one_by_one(*plain_server(stack, BURST)),
    )


def scattered(stack: ExitStack) -> tuple[Work, Work]:
    sock, peers = sdk_server(stack, BURST)
    return (
        echo_batches(sock, peers, peers.send),
        echo_one_by_one(*plain_server(stack, BURST)),
    )


def trains(stack: ExitStack) -> tuple[Work, Work]:
    sock, peers = sdk_server(stack, 1)
    sock.enable_gro()
    return (
        echo_batches(sock, peers, peers.send_trains),
        echo_one_by_one(*plain_server(stack, 1)),
    )


def asyncio_bursts(stack: ExitStack) -> tuple[Work, Work]:
    return (
        echo_asyncio_bursts(*asyncio_server(stack, sdk_endpoint, BURST, header=True)),
        echo_asyncio_bursts(*asyncio_server(stack, plain_endpoint, BURST, header=False)),
    )


def asyncio_singly(stack: ExitStack) -> tuple[Work, Work]:
    return (
        echo_asyncio_singly(*asyncio_server(stack, sdk_endpoint, 1, header=True)),
        echo_asyncio_singly(*asyncio_server(stack, plain_endpoint, 1, header=False)),
    )


ROWS: list[tuple[str, str, Callable[[ExitStack], tuple[Work, Work]], str, float]] = [
    ("recvfrom + sendto", "a plain socket's, no header", one_by_one, "<=", 1.15),
    ("recv_batch of 64, receiving alone", "a plain recvfrom loop", receiving, ">=", 1.8),
    ("recv_batch + send_batch, scattered clients", "a plain echo loop", scattered, ">=", 1.2),
    ("recv_batch + send_batch, bursts of 32", "a plain echo loop", trains, ">=", 3.0),
    ("asyncio echo, bursts of 64", "plain asyncio echo, no header", asyncio_bursts, ">=", 1.0),
    ("asyncio echo, one at a time", "plain asyncio echo, no header", asyncio_singly, ">=", 1.0),
]


def measure(work: Work, against: Work) -> list[float]:
    """How much more time `work` takes, in each round."""
    ratios = []
    for _ in range(ROUNDS):
        mine, theirs = [], []
        for _ in range(BURSTS_PER_ROUND):
            mine.append(work())
            theirs.append(against())
        ratios.append(statistics.median(mine) / statistics.median(theirs))
    # The first warms up.
    return ratios[1:]


def main() -> int:
    """Prints a row for each piece of work; 1 if any falls short."""
    print("| work | against | measured: median (all rounds) | wanted | |")
    print("|---|---|---|---|---|")
    status = 0
    for work, against, make, sign, bound in ROWS:
        with ExitStack() as stack:
            ratios = measure(*make(stack))
        unit = "time"
        if sign == ">=":
            unit, ratios = "datagrams/s", [1 / ratio for ratio in ratios]
        ratio = statistics.median(ratios)
        reached = ratio <= bound if sign == "<=" else ratio >= bound
        verdict = "✓" if reached else f"✗ short by {abs(ratio / bound - 1):.1%}"
        status |= not reached
        print(
            f"| Python {work} | {against} | {unit} {ratio:.2f} x ({min(ratios):.2f} to "
            f"{max(ratios):.2f}) | {sign} {bound:.2f} x | {verdict} |",
            flush=True,
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
