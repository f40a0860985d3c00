"""A socket bound to all addresses answers from the one that a datagram was sent to."""

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import ppv2
import ppv2.asyncio
from namespace import inside
from peers import CLIENT, LISTENER, PATIENCE, udp

if TYPE_CHECKING:
    from collections.abc import Callable

IP_PKTINFO = 8
HEADER = ppv2.encode(CLIENT, LISTENER)

RECEIVES: "list[Callable[[ppv2.Socket], Any]]" = [
    lambda sock: sock.recvfrom(9)[1],
    lambda sock: sock.recv_datagram().client,
    lambda sock: sock.recvfrom_into(bytearray(9))[1],
    lambda sock: sock.recv_batch(4)[0][1],
    lambda sock: sock.recvmsg(9)[3],
]


def wildcard(family: socket.AddressFamily) -> ppv2.Socket:
    host = "0.0.0.0" if family == socket.AF_INET else "::"
    return ppv2.wrap(udp(host, family), trusted=["127.0.0.0/8", "fd00::/16"])


def answers_from(sock: ppv2.Socket, proxy: socket.socket, host: str) -> None:
    to = (host, sock.getsockname()[1])
    ttl = [(socket.IPPROTO_IP, socket.IP_TTL, (9).to_bytes(4, "little"))]
    for receive in RECEIVES:
        proxy.sendto(HEADER + b"hello", to)
        client = receive(sock)
        sends: list[Callable[[Any], object]] = [
            lambda to: sock.sendto(b"answer", to),
            lambda to: sock.sendmsg([b"answer"], (), 0, to),
            lambda to: sock.send_batch([(b"answer", to)]),
        ]
        if proxy.family == socket.AF_INET:
            sends.append(lambda to: sock.sendmsg([b"answer"], ttl, 0, to))
        for send in sends:
            for spelled in (client, CLIENT):
                send(spelled)
                answer, source = proxy.recvfrom(9)
                assert (answer, source[:2]) == (b"answer", to)


def test_ipv4() -> None:
    with wildcard(socket.AF_INET) as sock, udp() as proxy:
        for host in ("127.7.0.1", "127.7.0.2", "127.0.0.1"):
            answers_from(sock, proxy, host)


@inside("ip addr add fd00::1/64 dev lo; ip addr add fd00::2/64 dev lo nodad", rights=True)
def test_ipv6_and_dual_stack() -> None:
    with (
        wildcard(socket.AF_INET6) as sock,
        udp() as proxy,
        udp("fd00::1", socket.AF_INET6) as proxy_v6,
    ):
        for host in ("fd00::2", "fd00::1"):
            answers_from(sock, proxy_v6, host)
        for host in ("127.7.0.1", "127.0.0.1"):
            answers_from(sock, proxy, host)


def test_the_application_sees_packet_information_only_if_it_asked() -> None:
    with wildcard(socket.AF_INET) as sock, udp() as proxy:
        to = ("127.7.0.1", sock.getsockname()[1])
        proxy.sendto(HEADER, to)
        assert sock.recvmsg(9, 99)[1:3] == ([], 0)
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        proxy.sendto(HEADER, to)
        [(level, kind, _)] = sock.recvmsg(9, 99)[1]
        assert (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO)


def test_asyncio() -> None:
    class Echo(asyncio.DatagramProtocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, addr: Any) -> None:
            self.transport.sendto(data, addr)

    async def serve() -> None:
        transport, _ = await ppv2.asyncio.create_datagram_endpoint(
            Echo, ("::", 0), family=socket.AF_INET6, trusted=["127.0.0.1"]
        )
        to = ("127.7.0.1", transport.get_extra_info("sockname")[1])
        with udp() as proxy:
            proxy.sendto(HEADER + b"hello", to)
            assert await asyncio.to_thread(proxy.recvfrom, 9) == (b"hello", to)
        transport.close()

    asyncio.run(asyncio.wait_for(serve(), PATIENCE))
