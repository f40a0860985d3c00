"""`recv_batch` and `send_batch`."""

import socket
import threading
from typing import Any

import pytest

import ppv2
from peers import CLIENT, CLIENT_V6, LISTENER, Proxy, server, udp

# Linux's numbers, for which the socket module has no names.
SOL_UDP = 17
UDP_SEGMENT = 103
UDP_GRO = 104


def test_a_batch_is_what_is_there_in_order() -> None:
    with server() as sock, Proxy() as proxy:
        for number in range(10):
            client = (f"203.0.113.{number}", 1000)
            proxy.send(sock.getsockname(), bytes([number]) * number, client=client)
            proxy.send_raw(sock.getsockname(), b"bad")
        expected = [(bytes([n]) * n, (f"203.0.113.{n}", 1000)) for n in range(10)]
        received: list[Any] = []
        while len(received) < 10:
            batch = sock.recv_batch(4)
            assert 1 <= len(batch) <= 4
            received += batch
        assert received == expected
        assert sock.stats().dropped["no_header"] >= 9
        sock.settimeout(0)
        with pytest.raises(BlockingIOError):
            sock.recv_batch(4)


def test_a_batch_waits_for_the_first_alone() -> None:
    with server() as sock, Proxy() as proxy:
        received: list[Any] = []
        thread = threading.Thread(target=lambda: received.append(sock.recv_batch(64)))
        thread.start()
        proxy.send(sock.getsockname(), b"hello")
        thread.join()
        assert received == [[(b"hello", CLIENT)]]


@pytest.mark.parametrize("size", [0, 1, 1200, 60000])
def test_bursts_arrive_whole_whatever_their_size(size: int) -> None:
    with server() as sock, Proxy() as proxy:
        count = 3 if size > 1200 else 40
        expected = []
        for number in range(count):
            payload = number.to_bytes(1, "big")[:size] * size
            client = CLIENT_V6 if number % 5 == 4 else CLIENT
            proxy.send(sock.getsockname(), payload, client=client)
            expected.append((payload, client[:2]))
        received: list[Any] = []
        while len(received) < count:
            received += sock.recv_batch(64)
        assert received == expected
        assert sock.send_batch(received) == count
        assert [proxy.receive() for _ in range(count)] == [payload for payload, _ in expected]
        assert sock.stats().replies_sent == count


TRAIN = [(f"203.0.113.{number}", 1000) for number in range(30)]


def send_train(sock: ppv2.Socket, proxy: Proxy) -> list[Any]:
    """Sends as a proxy does that uses UDP_SEGMENT, many headers in one system call,
    and returns what the server is to receive.
    """
    payloads = [bytes([number]) * 100 for number in range(29)] + [b"end"]
    headers = [ppv2.encode(client, LISTENER) for client in TRAIN]
    segments = [header + payload for header, payload in zip(headers, payloads, strict=True)]
    size = len(segments[0]).to_bytes(2, "little")
    proxy.socket.sendmsg(
        [b"".join(segments)], [(SOL_UDP, UDP_SEGMENT, size)], 0, sock.getsockname()
    )
    return list(zip(payloads, TRAIN, strict=True))


def test_a_train_arrives_as_datagrams() -> None:
    with server() as sock, Proxy() as proxy:
        expected = send_train(sock, proxy)
        assert [sock.recvfrom(200) for _ in expected] == expected


@pytest.mark.parametrize("slots", [1, 2, 64])
def test_a_train_that_the_kernel_joins_is_taken_apart(slots: int) -> None:
    with server() as sock, Proxy() as proxy:
        assert sock.enable_gro()
        for _ in range(3):
            proxy.send_raw(sock.getsockname(), b"bad")
            expected = [*send_train(sock, proxy), (b"single", CLIENT), (b"", CLIENT)]
            proxy.send(sock.getsockname(), b"single")
            proxy.send(sock.getsockname(), b"")
            received: list[Any] = []
            while len(received) < len(expected):
                received += sock.recv_batch(slots)
            assert received == expected
            assert sock.send_batch(received) == len(expected)
            replies = [proxy.receive() for _ in expected]
            assert replies == [payload for payload, _ in expected]
        assert sock.stats().received == 3 * (len(expected) + 1)


def test_joined_datagrams_are_received_in_batches_alone() -> None:
    with server() as sock, Proxy() as proxy:
        sock.enable_gro()
        proxy.send(sock.getsockname(), b"hello")
        for receive in (sock.recv, sock.recvfrom, sock.recvmsg):
            with pytest.raises(OSError, match=r"GRO enabled.*receive with recv_batch"):
                receive(9)
        assert sock.recv_batch(9) == [(b"hello", CLIENT)]
        sock.sendto(b"answer", CLIENT)
        assert proxy.receive() == b"answer"
    with udp() as plain:
        plain.setsockopt(SOL_UDP, UDP_GRO, 1)
        with (
            ppv2.wrap(plain, trusted=["127.0.0.1"]) as sock,
            pytest.raises(OSError, match="GRO enabled"),
        ):
            sock.recv(9)


def test_mixed_replies_go_where_they_belong() -> None:
    with server() as sock, Proxy() as one, Proxy() as other:
        replies = []
        for number in range(60):
            proxy = (one, other)[number % 7 % 2]
            client = (f"203.0.113.{number % 5}", 1000 + number % 3)
            proxy.send(sock.getsockname(), b"", client=client, listener=("198.51.100.1", number))
            payload = f"{number % 7 % 2} {number}".encode() + bytes(number % 4)
            replies.append((payload, sock.recvfrom(9)[1]))
        assert sock.send_batch(iter(replies)) == 60
        for name, proxy in ((b"0", one), (b"1", other)):
            expected = [payload for payload, _ in replies if payload.startswith(name)]
            assert [proxy.receive() for _ in expected] == expected
            proxy.receives_nothing()


def test_replies_without_a_route_are_left_out_and_counted() -> None:
    with server() as sock, Proxy() as proxy:
        proxy.send(sock.getsockname(), b"")
        client = sock.recvfrom(9)[1]
        stranger = ("192.0.2.1", 53)
        replies: list[Any] = [
            (b"0", stranger),
            (b"1", client),
            (b"2", stranger),
            (bytearray(b"3"), client),
        ]
        assert sock.send_batch(replies) == 4
        assert [proxy.receive(), proxy.receive()] == [b"1", b"3"]
        proxy.receives_nothing()
        stats = sock.stats()
        assert (stats.replies_sent, stats.replies_without_path) == (2, 2)
        assert sock.send_batch([]) == 0


def test_what_can_not_be_sent_ends_the_batch() -> None:
    with server() as sock, Proxy() as proxy:
        proxy.send(sock.getsockname(), b"")
        client = sock.recvfrom(9)[1]
        replies = [(b"1", client), (bytes(66000), client), (b"3", client)]
        assert sock.send_batch(replies) == 1
        with pytest.raises(OSError, match="Message too long"):
            sock.send_batch(replies[1:])
        assert proxy.receive() == b"1"
        proxy.receives_nothing()
        assert sock.stats().replies_sent == 1


def test_a_flood_of_bad_datagrams_does_not_hold_up_a_call() -> None:
    with server() as sock, Proxy() as proxy:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        proxy.send(sock.getsockname(), b"good")
        for _ in range(200):
            proxy.send_raw(sock.getsockname(), b"bad")
        assert sock.recv_batch(8) == [(b"good", CLIENT)]
