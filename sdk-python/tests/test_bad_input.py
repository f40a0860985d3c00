"""Whatever comes: no exception, no crash, no leak, each counted under its reason."""

import ipaddress
import json
import random
import resource
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import ppv2
from peers import CLIENT, LISTENER, Proxy, hostile, server, udp
from strategies import SIGNATURE

TABLE = Path(__file__).parents[2] / "ppv2" / "tests" / "wire-cases.json"
CASES: list[dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))["cases"]

# One burst, which the kernel's buffer holds.
BURST = 64


def dropped(sock: ppv2.Socket) -> dict[str, int]:
    return {reason: count for reason, count in sock.stats().dropped.items() if count}


@pytest.mark.parametrize("receive", ["recvfrom", "recvmsg", "recv_batch"])
def test_bad_datagrams_of_a_proxy_are_dropped_and_counted(receive: str) -> None:
    expected: dict[str, int] = {}
    with server() as sock, Proxy() as proxy:
        for reason, datagram in hostile().values():
            proxy.send_raw(sock.getsockname(), datagram)
            expected[reason] = expected.get(reason, 0) + 1
        proxy.send(sock.getsockname(), b"good")
        result = getattr(sock, receive)(9)
        if receive == "recv_batch":
            [result] = result
        assert (result[0], result[-1]) == (b"good", CLIENT)
        stats = sock.stats()
        assert dropped(sock) == expected
        assert stats.received == sum(expected.values()) + 1
        assert (stats.delivered, stats.clients) == (1, 1)


def test_headers_of_strangers_are_dropped() -> None:
    with server() as sock, Proxy() as proxy, Proxy("127.0.0.2") as stranger:
        stranger.send(sock.getsockname(), b"forged")
        stranger.send_raw(sock.getsockname(), b"no header")
        proxy.send(sock.getsockname(), b"good")
        assert sock.recv(9) == b"good"
        assert dropped(sock) == {"untrusted": 2}


def test_headers_of_direct_clients_are_payload() -> None:
    with server(untrusted="accept") as sock, udp("127.0.0.2") as direct:
        forged = ppv2.encode(CLIENT, LISTENER) + b"forged"
        direct.sendto(forged, sock.getsockname())
        assert sock.recvfrom(100) == (forged, direct.getsockname())
        assert dropped(sock) == {}


def test_local_is_the_proxy_itself_whatever_it_carries() -> None:
    with server() as sock, Proxy() as proxy:
        forged = bytearray(ppv2.encode(CLIENT, LISTENER))
        forged[12] = 0x20
        proxy.send_raw(sock.getsockname(), bytes(forged) + b"check")
        payload, address = sock.recvfrom(9)
        assert (payload, address) == (b"check", proxy.address)
        sock.sendto(b"well", address)
        assert proxy.receive() == b"well"


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["name"]))
def test_the_table_of_the_wire(case: dict[str, Any]) -> None:
    """What the codec refuses never arrives; what it reads arrives, or is counted."""
    datagram = bytes.fromhex(case["datagram"])
    with server(max_header_len=max(28, int(case.get("limit", 512)))) as sock, Proxy() as proxy:
        proxy.send_raw(sock.getsockname(), datagram)
        proxy.send(sock.getsockname(), b"end", client=("192.0.2.99", 1))
        first = sock.recv_datagram()
        if first.payload == b"end":
            assert sum(dropped(sock).values()) == 1
            return
        assert "error" not in case
        assert first.payload == bytes.fromhex(case["payload"])
        assert dropped(sock) == {}


def mutated(source: random.Random) -> bytes:
    """A datagram that is nearly right, or noise."""
    if source.random() < 0.1:
        return source.randbytes(source.randrange(200))
    tlvs = [(source.randrange(4, 256), source.randbytes(source.randrange(20)))]
    client = (f"203.0.113.{source.randrange(256)}", source.randrange(65536))
    transport: Any = source.choice(["udp", "udp", "udp", "tcp"])
    crc32c = source.random() < 0.5
    header = ppv2.encode(client, LISTENER, transport=transport, tlvs=tlvs, crc32c=crc32c)
    datagram = bytearray(header + b"payload")
    for _ in range(source.randrange(4)):
        first = 12 if source.random() < 0.9 else 0
        datagram[source.randrange(first, len(datagram))] = source.randrange(256)
    return bytes(datagram[: source.choice([len(datagram), source.randrange(len(datagram))])])


def fate(datagram: bytes) -> str:
    """What is to become of a proxy's datagram: a reason for dropping it, or ""."""
    try:
        header, _ = ppv2.decode(datagram)
    except ppv2.DecodeError as error:
        if len(datagram) < 16 or not datagram.startswith(SIGNATURE):
            return "no_header"
        return "header_too_long" if "longer than the limit" in str(error) else "bad_header"
    if header.command is ppv2.Command.LOCAL:
        return ""
    if header.client is None:
        return str(header.transport or "unspecified").partition("-")[0]
    host, port = ipaddress.ip_address(header.client[0]), header.client[1]
    # A changed byte can make 0.0.113.9 of 203.0.113.9.
    in_zero_network = host.version == 4 and host.packed[0] == 0
    broadcast = str(host) in ("255.255.255.255", "127.255.255.255")
    nobodys = host.is_multicast or host.is_unspecified or in_zero_network or broadcast
    return "client_address" if nobodys or not port else ""


def test_a_million_mutated_datagrams_leave_nothing_but_counts() -> None:
    source = random.Random(20260401)
    # Many times each, in a new order: making them is the slow part.
    corpus = [mutated(source) for _ in range(4000)]
    fates = [fate(datagram) for datagram in corpus]
    expected: Counter[str] = Counter()

    def rounds(bursts: int) -> None:
        for number in range(bursts):
            burst = source.choices(range(len(corpus)), k=BURST)
            for index in burst:
                proxy.socket.sendto(corpus[index], name)
            expected.update(fates[index] for index in burst)
            receive = (sock.recv_batch, sock.recvfrom, sock.recvmsg)[number % 8 % 3]
            try:
                while True:
                    receive(BURST)
            except BlockingIOError:
                pass

    with server(max_clients=1000) as sock, Proxy() as proxy:
        sock.settimeout(0)
        name = sock.getsockname()
        rounds(1000)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rounds(15000)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        stats = sock.stats()
    assert expected.total() > 1_000_000
    assert stats.received == expected.total()
    assert stats.delivered == expected.pop("")
    assert {reason: count for reason, count in stats.dropped.items() if count} == expected
    assert {"no_header", "bad_header", "tcp", "client_address"} <= expected.keys()
    # Kilobytes; a leak of but a byte for each would be twice that.
    assert after - before < 512
