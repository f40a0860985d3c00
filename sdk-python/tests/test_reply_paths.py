"""Where a reply goes."""

import errno
import threading
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import pytest

import ppv2
from peers import (
    CLIENT,
    LISTENER,
    OTHER_CLIENT,
    OTHER_LISTENER,
    Proxy,
    server,
    two_proxies,
    udp,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def test_each_reply_goes_by_the_proxy_of_its_address_object() -> None:
    with server(trusted=["127.0.0.1", "127.0.0.3"]) as sock, two_proxies() as proxies:
        addresses = []
        for proxy in proxies:
            proxy.send(sock.getsockname(), b"")
            addresses.append(sock.recvfrom(9)[1])
        assert addresses[0] == addresses[1]
        for proxy, address in zip(proxies, addresses, strict=True):
            sock.sendto(b"answer", address)
            sock.sendmsg([b"answer"], (), 0, address)
            sock.send_batch([(b"answer", address)])
            assert [proxy.receive() for _ in range(3)] == [b"answer"] * 3
        for proxy in proxies:
            proxy.receives_nothing()


def test_each_reply_goes_by_the_listener_of_its_address_object() -> None:
    # One session for each listener, and so one port.
    with server() as sock, Proxy() as one, Proxy() as other:
        one.send(sock.getsockname(), b"", listener=LISTENER)
        at_one = sock.recvfrom(9)[1]
        other.send(sock.getsockname(), b"", listener=OTHER_LISTENER)
        at_other = sock.recvfrom(9)[1]
        sock.sendto(b"one", at_one)
        sock.sendto(b"other", at_other)
        assert (one.receive(), other.receive()) == (b"one", b"other")


def test_a_plain_tuple_goes_the_latest_way() -> None:
    with server(trusted=["127.0.0.1", "127.0.0.3"]) as sock, two_proxies() as proxies:
        for proxy in (*proxies, proxies[0]):
            proxy.send(sock.getsockname(), b"")
            sock.recv(9)
            sock.sendto(b"answer", CLIENT)
            assert proxy.receive() == b"answer"


def test_an_address_that_is_kept_follows_the_proxy_to_another_port() -> None:
    with server() as sock:
        with Proxy() as before:
            before.send(sock.getsockname(), b"")
            kept = sock.recvfrom(9)[1]
        with Proxy() as after:
            after.send(sock.getsockname(), b"")
            assert sock.recvfrom(9)[1] is kept
            sock.sendto(b"answer", kept)
            assert after.receive() == b"answer"


def test_an_address_of_another_socket_is_but_a_tuple() -> None:
    with server() as sock, server() as other, Proxy() as proxy, Proxy() as other_proxy:
        proxy.send(sock.getsockname(), b"")
        address = sock.recvfrom(9)[1]
        with pytest.raises(ppv2.NoReplyPathError):
            other.sendto(b"answer", address)
        other_proxy.send(other.getsockname(), b"")
        other.recv(9)
        other.sendto(b"answer", address)
        assert other_proxy.receive() == b"answer"


def test_a_client_never_seen_is_a_clear_error() -> None:
    with server() as sock:
        sends: list[Callable[[], object]] = [
            lambda: sock.sendto(b"", ("192.0.2.1", 53)),
            lambda: sock.sendmsg([b""], (), 0, ("192.0.2.1", 53)),
        ]
        for send in sends:
            with pytest.raises(
                OSError, match=r"no reply path to client 192\.0\.2\.1:53: nothing"
            ) as e:
                send()
            assert isinstance(e.value, ppv2.NoReplyPathError)
            assert e.value.errno == errno.ENOTCONN
        assert sock.stats().replies_without_path == 2
        assert sock.stats().replies_sent == 0


def test_a_client_is_forgotten_in_time() -> None:
    with server(forget_after=0.05) as sock, Proxy() as proxy:
        proxy.send(sock.getsockname(), b"")
        address = sock.recvfrom(9)[1]
        time.sleep(0.06)
        for spelled in (address, CLIENT):
            with pytest.raises(ppv2.NoReplyPathError, match=r"in the last 0\.05s"):
                sock.sendto(b"", spelled)
        # And known again as soon as it is heard; a slow machine may have to try twice.
        sent = 0
        while not sent:
            proxy.send(sock.getsockname(), b"")
            sock.recv(9)
            with suppress(ppv2.NoReplyPathError):
                sent = sock.sendto(b"answer", address)
        assert proxy.receive() == b"answer"


def test_a_former_client_is_not_sent_to_through_an_address_that_serves_another() -> None:
    receives: list[Callable[[ppv2.Socket], object]] = [
        lambda sock: sock.recvfrom(9),
        lambda sock: sock.recv(9),
        lambda sock: sock.recv_batch(1),
    ]
    with ExitStack() as stack:
        cases = []
        for receive in receives:
            sock, proxy = stack.enter_context(server()), stack.enter_context(Proxy())
            proxy.send(sock.getsockname(), b"")
            former = sock.recvfrom(9)[1]
            proxy.send(sock.getsockname(), b"", client=OTHER_CLIENT)
            receive(sock)
            # Senders that serve many clients from one port have their replies at once.
            for spelled in (former, CLIENT):
                sock.sendto(b"answer", spelled)
                assert proxy.receive() == b"answer"
            cases.append((sock, proxy, former))
        time.sleep(10.1)
        for sock, proxy, former in cases:
            for spelled in (former, CLIENT):
                with pytest.raises(ppv2.NoReplyPathError, match="has named another client"):
                    sock.sendto(b"secret", spelled)
            assert sock.send_batch([(b"secret", former)]) == 1
            proxy.receives_nothing()
            sock.sendto(b"answer", OTHER_CLIENT)
            assert proxy.receive() == b"answer"
            # And known again as soon as it is heard.
            proxy.send(sock.getsockname(), b"")
            assert sock.recvfrom(9)[1] is former
            sock.sendto(b"answer", former)
            assert proxy.receive() == b"answer"


def test_the_table_is_bounded() -> None:
    with server(max_clients=2) as sock, Proxy() as proxy:
        addresses = []
        for number in range(5):
            proxy.send(sock.getsockname(), b"", client=("203.0.113.1", 1000 + number))
            addresses.append(sock.recvfrom(9)[1])
        for address in addresses[:3]:
            with pytest.raises(ppv2.NoReplyPathError, match="forgotten for newer clients"):
                sock.sendto(b"", address)
        for address in addresses[3:]:
            sock.sendto(b"answer", address)
            assert proxy.receive() == b"answer"
        stats = sock.stats()
        assert (stats.clients, stats.clients_evicted) == (2, 3)


def test_an_address_without_room_of_its_own_goes_the_latest_way() -> None:
    with server(max_clients=1) as sock, Proxy() as one, Proxy() as other:
        one.send(sock.getsockname(), b"", listener=LISTENER)
        at_one = sock.recvfrom(9)[1]
        other.send(sock.getsockname(), b"", listener=OTHER_LISTENER)
        sock.recv(9)
        other.send(sock.getsockname(), b"", listener=OTHER_LISTENER)
        sock.recvfrom(9)
        sock.sendto(b"answer", at_one)
        assert other.receive() == b"answer"


def test_strangers_can_not_draw_replies_off_the_proxy() -> None:
    with (
        udp("127.0.0.2") as stranger,
        server(untrusted="accept") as sock,
        Proxy() as proxy,
    ):
        proxy.send(sock.getsockname(), b"", client=stranger.getsockname())
        address = sock.recvfrom(9)[1]
        stranger.sendto(b"mine", sock.getsockname())
        proxy.send(sock.getsockname(), b"next", client=OTHER_CLIENT)
        assert sock.recvfrom(9) == (b"next", OTHER_CLIENT)
        assert sock.stats().dropped["direct_conflict"] == 1
        for spelled in (address, stranger.getsockname()):
            sock.sendto(b"answer", spelled)
            assert proxy.receive() == b"answer"


def test_threads_answer_each_client_by_its_own_proxy() -> None:
    with server(trusted=["127.0.0.1", "127.0.0.3"]) as sock, two_proxies() as proxies:

        def answer() -> None:
            for _ in range(100):
                payload, address = sock.recvfrom(9)
                sock.sendto(payload, address)

        threads = [threading.Thread(target=answer) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in range(200):
            for name, proxy in zip((b"a", b"b"), proxies, strict=True):
                proxy.send(sock.getsockname(), name, client=("192.0.2.1", 1 + number % 7))
            for name, proxy in zip((b"a", b"b"), proxies, strict=True):
                assert proxy.receive() == name
        for thread in threads:
            thread.join()
