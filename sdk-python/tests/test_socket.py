"""`wrap`: the methods of a UDP socket, with the clients' addresses."""

import array
import copy
import ipaddress
import logging
import pickle
import select
import selectors
import socket
import threading
import time
from typing import Any

import pytest

import ppv2
from peers import CLIENT, CLIENT_V6, LISTENER, OTHER_CLIENT, PATIENCE, Proxy, server, udp

# Linux's numbers, for which the socket module has no names.
IP_RECVERR = 11
IP_RECVTTL = 12

METHODS = {
    "close", "enable_gro", "family", "fileno", "getblocking", "getpeername", "getsockname",
    "getsockopt", "gettimeout", "proto", "recv", "recv_batch", "recv_datagram", "recv_into",
    "recvfrom", "recvfrom_into", "recvmsg", "recvmsg_into", "send_batch", "sendmsg", "sendto",
    "setblocking", "setsockopt", "settimeout", "stats", "timeout", "type",
}  # fmt: skip


def test_each_way_to_receive_hands_out_payload_and_client() -> None:
    with server() as sock, Proxy() as proxy:
        for _ in range(7):
            proxy.send(sock.getsockname(), b"hello")
        buffer = bytearray(8)
        assert sock.recv(100) == b"hello"
        assert sock.recvfrom(100) == (b"hello", CLIENT)
        assert sock.recv_into(buffer) == 5
        assert sock.recvfrom_into(buffer) == (5, CLIENT)
        assert bytes(buffer) == b"hello\0\0\0"
        assert sock.recvmsg(100) == (b"hello", [], 0, CLIENT)
        parts: list[Any] = [bytearray(2), memoryview(bytearray(8))[2:]]
        assert sock.recvmsg_into(parts) == (5, [], 0, CLIENT)
        assert [bytes(part) for part in parts] == [b"he", b"llo\0\0\0"]
        assert sock.recv_batch(5) == [(b"hello", CLIENT)]


def test_what_does_not_fit_is_lost_as_with_any_socket() -> None:
    with server() as sock, Proxy() as proxy:
        for _ in range(6):
            proxy.send(sock.getsockname(), b"hello")
        buffer = bytearray(4)
        assert sock.recv(2) == b"he"
        assert sock.recvfrom(0) == (b"", CLIENT)
        assert sock.recvfrom_into(buffer, 3) == (3, CLIENT)
        assert buffer == b"hel\0"
        assert sock.recvmsg(4)[::2] == (b"hell", socket.MSG_TRUNC)
        assert sock.recvmsg_into([buffer])[::2] == (4, socket.MSG_TRUNC)
        assert sock.recv(5) == b"hello"


def test_the_longest_payload_and_none_at_all_arrive_whole() -> None:
    with server() as sock, Proxy() as proxy:
        longest = bytes(range(256)) * 255 + bytes(199)
        for payload in (longest, b""):
            proxy.send(sock.getsockname(), payload)
            assert sock.recvfrom(65535) == (payload, CLIENT)
        assert sock.sendto(longest, CLIENT) == len(longest)
        assert proxy.receive() == longest
        assert sock.sendto(b"", CLIENT) == 0
        assert proxy.receive() == b""


def test_a_payload_that_looks_like_a_header_stays_payload() -> None:
    with server() as sock, Proxy() as proxy:
        payload = ppv2.encode(OTHER_CLIENT, LISTENER) + b"x"
        proxy.send(sock.getsockname(), payload)
        assert sock.recvfrom(100) == (payload, CLIENT)


def test_a_datagram_says_all_that_is_known() -> None:
    with server(untrusted="accept") as sock, Proxy() as proxy, udp("127.0.0.2") as direct:
        proxy.send(sock.getsockname(), b"one", tlvs=[(2, b"example.com")])
        datagram = sock.recv_datagram()
        assert datagram[:4] == (b"one", CLIENT, LISTENER, proxy.address)
        assert datagram.header is not None
        assert datagram.header.authority == "example.com"
        assert datagram.tlvs == ((2, b"example.com"),)

        proxy.send_raw(sock.getsockname(), ppv2.encode_local() + b"two")
        datagram = sock.recv_datagram()
        assert datagram[:4] == (b"two", proxy.address, None, proxy.address)
        assert datagram.header is not None
        assert datagram.header.command == "local"

        direct.sendto(b"three", sock.getsockname())
        datagram = sock.recv_datagram()
        assert tuple(datagram) == (b"three", direct.getsockname(), None, None, None)
        assert datagram.tlvs == ()
        sock.sendto(b"four", datagram.client)
        assert direct.recv(100) == b"four"


def test_an_ipv6_socket_reports_four_parts() -> None:
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", 0))
    with ppv2.wrap(sock, trusted=["127.0.0.1"]) as wrapped, Proxy() as proxy:
        address = ("127.0.0.1", wrapped.getsockname()[1])
        mapped = ("::ffff:203.0.113.11", 54321, 0, 0)
        for client, expected in ((CLIENT_V6, CLIENT_V6), (CLIENT, mapped)):
            for _ in range(3):
                proxy.send(address, b"hello", client)
            payload, found = wrapped.recvfrom(100)
            assert (payload, found) == (b"hello", expected)
            datagram = wrapped.recv_datagram()
            assert datagram.client == expected
            assert datagram.destination == ("::ffff:198.51.100.10", 9000, 0, 0)
            assert datagram.proxy is not None
            assert datagram.proxy[0] == "::ffff:127.0.0.1"
            assert wrapped.recv_batch(1) == [(b"hello", expected)]
            spellings: list[Any] = [found, tuple(found), found[:2], client]
            for spelled in spellings:
                assert wrapped.sendto(b"answer", spelled) == 6
                assert proxy.receive() == b"answer"
        wrapped.sendmsg([b"answer"], [(socket.IPPROTO_IP, socket.IP_TTL, b"\x09\0\0\0")], 0, found)
        assert proxy.receive() == b"answer"


def test_an_ipv4_socket_reports_host_and_port() -> None:
    with server() as sock, Proxy() as proxy:
        for client in (CLIENT, CLIENT_V6):
            proxy.send(sock.getsockname(), b"hello", client)
            address: Any = sock.recvfrom(100)[1]
            host, port = address
            assert (host, port) == client[:2]
            spellings: list[Any] = [address, (host, port), client]
            for spelled in spellings:
                sock.sendto(b"answer", spelled)
                assert proxy.receive() == b"answer"


def test_the_first_drop_of_each_reason_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[Any] = [
        lambda sock: sock.recvfrom(9),
        lambda sock: sock.recvmsg(9),
        lambda sock: sock.recv_batch(9),
    ]
    for call in calls:
        caplog.clear()
        with server() as sock, Proxy() as proxy, udp("127.0.0.2") as stranger:
            for _ in range(3):
                stranger.sendto(b"hello", sock.getsockname())
                proxy.send_raw(sock.getsockname(), b"hello")
            proxy.send(sock.getsockname(), b"good")
            call(sock)
            untrusted, no_header = caplog.records
            assert {(one.name, one.levelname) for one in caplog.records} == {("ppv2", "WARNING")}
            sender = "{}:{}".format(*stranger.getsockname())
            assert f"from {sender} (untrusted)" in untrusted.getMessage()
            assert "`trusted`" in untrusted.getMessage()
            assert "(no_header)" in no_header.getMessage()


def test_a_warning_does_not_wait_for_a_good_datagram() -> None:
    class Seen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "(no_header)" in record.getMessage():
                warned.set()

    warned = threading.Event()
    logger, handler = logging.getLogger("ppv2"), Seen()
    logger.addHandler(handler)
    try:
        with server() as sock, Proxy() as proxy:
            thread = threading.Thread(target=sock.recv, args=(9,))
            thread.start()
            proxy.send_raw(sock.getsockname(), b"bad")
            assert warned.wait(PATIENCE)
            proxy.send(sock.getsockname(), b"good")
            thread.join()
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize(
    "receive",
    [
        lambda sock: sock.recv(9),
        lambda sock: sock.recvfrom_into(bytearray(9)),
        lambda sock: sock.recvmsg(9),
        lambda sock: sock.recv_batch(1),
    ],
)
def test_a_call_that_may_not_wait_drops_no_more_than_64(receive: Any) -> None:
    with server() as sock, Proxy() as proxy:
        sock.settimeout(0)
        for _ in range(130):
            proxy.send_raw(sock.getsockname(), b"bad")
        for dropped in (64, 128, 130):
            with pytest.raises(BlockingIOError):
                receive(sock)
            assert sock.stats().dropped["no_header"] == dropped


def test_integers_are_timeouts_and_flags() -> None:
    with server() as sock:
        flags: list[Any] = [0, None, ""]
        for flag in flags:
            sock.settimeout(1)
            assert sock.gettimeout() == 1.0
            sock.setblocking(flag)
            assert sock.gettimeout() == 0.0
            sock.setblocking(1)  # type: ignore[arg-type]
            assert sock.gettimeout() is None


def test_an_unbound_socket_is_refused() -> None:
    for family in (socket.AF_INET, socket.AF_INET6):
        with (
            socket.socket(family, socket.SOCK_DGRAM) as sock,
            pytest.raises(ValueError, match=r"sock: it is not bound.*call sock\.bind"),
        ):
            ppv2.wrap(sock, trusted=["127.0.0.1", "::1"])


def test_trust_in_the_other_family_alone_is_refused() -> None:
    cases = [
        (socket.AF_INET, "127.0.0.1", "2001:db8::/64", "::ffff:127.0.0.1"),
        (socket.AF_INET6, "::1", "127.0.0.1", "::/0"),
    ]
    for family, host, wrong, right in cases:
        with udp(host, family) as sock, pytest.raises(ValueError, match="trusted: it names IPv"):
            ppv2.wrap(sock, trusted=[wrong])
        for options in ({"trusted": [wrong, right]}, {"trusted": [wrong], "untrusted": "accept"}):
            ppv2.wrap(udp(host, family), **options).close()


def test_addresses_are_tuples_to_everybody_else() -> None:
    with server() as sock, Proxy() as proxy:
        proxy.send(sock.getsockname(), b"")
        address = sock.recvfrom(1)[1]
        assert isinstance(address, tuple)
        assert repr(address) == repr(CLIENT)
        assert {address: 1}[CLIENT] == 1
        host, port = address[:2]
        assert (host, port) == CLIENT
        for copied in (copy.deepcopy(address), pickle.loads(pickle.dumps(address))):
            assert type(copied) is tuple
            assert copied == CLIENT


@pytest.mark.parametrize("data", [b"ab", bytearray(b"ab"), memoryview(b"xab")[1:]])
def test_anything_like_bytes_is_sent(data: Any) -> None:
    with server() as sock, Proxy() as proxy:
        proxy.send(sock.getsockname(), b"")
        client = sock.recvfrom(1)[1]
        assert sock.sendto(data, client) == 2
        assert sock.sendto(data, socket.MSG_DONTWAIT, client) == 2
        assert sock.sendmsg([data, b"c", array.array("B", b"d")], (), 0, client) == 4
        assert [proxy.receive() for _ in range(3)] == [b"ab", b"ab", b"abcd"]


def test_ancillary_data_pass_in_both_directions() -> None:
    with server() as sock, Proxy() as proxy:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        assert sock.getsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS) == 1
        proxy.socket.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x02)
        proxy.socket.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
        proxy.send_raw(sock.getsockname(), b"bad")
        proxy.send(sock.getsockname(), b"hello")
        data, ancdata, _, client = sock.recvmsg(100, 100)
        assert (data, client) == (b"hello", CLIENT)
        assert ancdata == [(socket.IPPROTO_IP, socket.IP_TOS, b"\x02")]
        ttl = (9).to_bytes(4, "little")
        sock.sendmsg([b"an", b"swer"], [(socket.IPPROTO_IP, socket.IP_TTL, ttl)], 0, client)
        data, ancdata, _, _ = proxy.socket.recvmsg(100, 100)
        assert data == b"answer"
        assert ancdata == [(socket.IPPROTO_IP, socket.IP_TTL, ttl)]
        assert sock.stats().replies_sent == 1


@pytest.mark.parametrize(
    "receive",
    [
        lambda sock: sock.recv(9),
        lambda sock: sock.recvmsg(9),
        lambda sock: sock.recv_batch(9),
        lambda sock: sock.recv_datagram(),
    ],
)
def test_a_timeout_is_kept_to_however_many_bad_datagrams_come(receive: Any) -> None:
    stop = threading.Event()
    with server() as sock, Proxy() as proxy:

        def flood() -> None:
            while not stop.is_set():
                proxy.send_raw(sock.getsockname(), b"bad")
                time.sleep(0.001)

        proxy.send_raw(sock.getsockname(), b"bad")
        thread = threading.Thread(target=flood)
        thread.start()
        sock.settimeout(0.05)
        try:
            # Without an end of its own the call would last as long as the flood.
            with pytest.raises(TimeoutError, match="timed out"):
                receive(sock)
        finally:
            stop.set()
            thread.join()
        assert sock.stats().dropped["no_header"] > 0


def test_without_blocking_nothing_is_waited_for() -> None:
    with server() as sock, Proxy() as proxy:
        offs: list[Any] = [lambda: sock.setblocking(False), lambda: sock.settimeout(0)]
        for off in offs:
            off()
            assert (sock.getblocking(), sock.gettimeout(), sock.timeout) == (False, 0.0, 0.0)
            for receive in (sock.recv, sock.recvfrom, sock.recvmsg, sock.recv_batch):
                proxy.send_raw(sock.getsockname(), b"bad")
                with pytest.raises(BlockingIOError):
                    receive(9)
        sock.setblocking(True)
        assert (sock.getblocking(), sock.gettimeout()) == (True, None)
        calls: list[Any] = [sock.recv, sock.recvfrom, sock.recvmsg]
        for once in calls:
            proxy.send_raw(sock.getsockname(), b"bad")
            arguments = (9, 0) if once == sock.recvmsg else (9,)
            with pytest.raises(BlockingIOError):
                once(*arguments, socket.MSG_DONTWAIT)


def test_the_timeout_of_the_socket_passes_on() -> None:
    with udp() as sock:
        sock.settimeout(1.5)
        with ppv2.wrap(sock, trusted=["127.0.0.1"]) as wrapped:
            assert wrapped.gettimeout() == 1.5
            assert wrapped.getblocking()
            for bad in (-1, float("nan")):
                with pytest.raises(ValueError, match="Timeout value out of range"):
                    wrapped.settimeout(bad)


def test_select_and_selectors_wait_on_the_descriptor() -> None:
    with server() as sock, Proxy() as proxy, selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        assert selector.select(0) == []
        assert select.select([sock], [sock], [], 0) == ([], [sock], [])
        proxy.send(sock.getsockname(), b"hello")
        [(key, _)] = selector.select(20)
        assert key.fileobj is sock
        assert select.select([sock], [], [], 20) == ([sock], [], [])
        assert sock.recv(9) == b"hello"


def test_a_call_that_waits_lets_other_threads_run() -> None:
    with server() as sock, Proxy() as proxy:
        received: list[Any] = []
        threads = [
            threading.Thread(target=lambda: received.append(sock.recvfrom(9))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for _ in threads:
            proxy.send(sock.getsockname(), b"hello")
        for thread in threads:
            thread.join()
        assert received == [(b"hello", CLIENT)] * 4


def test_the_socket_is_taken_over() -> None:
    with udp() as sock:
        name, number = sock.getsockname(), sock.fileno()
        wrapped = ppv2.wrap(sock, trusted=["127.0.0.1"])
        assert sock.fileno() == -1
        assert (wrapped.getsockname(), wrapped.fileno()) == (name, number)
        assert (wrapped.family, wrapped.type) == (socket.AF_INET, socket.SOCK_DGRAM)
        assert wrapped.proto == sock.proto
        assert repr(wrapped) == f"<ppv2.Socket fd={number}, laddr={name!r}>"
        wrapped.close()
    # The port is free again.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
        again.bind(name)


def test_a_closed_socket_is_a_bad_descriptor() -> None:
    with server() as sock:
        pass
    sock.close()
    assert sock.fileno() == -1
    assert repr(sock) == "<ppv2.Socket [closed]>"
    for call in (
        lambda: sock.recv(9),
        lambda: sock.recvmsg(9),
        lambda: sock.recv_batch(9),
        lambda: sock.sendto(b"", CLIENT),
        lambda: sock.send_batch([]),
        lambda: sock.getsockname(),
        lambda: sock.getpeername(),
    ):
        with pytest.raises(OSError, match="Bad file descriptor"):
            call()
    assert sock.stats().received == 0


def test_a_socket_has_no_peer() -> None:
    with server() as sock:
        for unconnected in (sock, udp()):
            with pytest.raises(OSError, match="not connected"), unconnected:
                unconnected.getpeername()


def test_an_unclosed_socket_is_a_warning() -> None:
    with pytest.warns(ResourceWarning, match="unclosed"):
        ppv2.wrap(udp(), trusted=["127.0.0.1"])


def test_there_is_no_method_that_was_not_wrapped() -> None:
    found = {name for name in dir(ppv2.Socket) if not name.startswith("_")}
    assert found == METHODS
    with server() as sock:
        for name in set(dir(socket.socket)) - set(dir(ppv2.Socket)):
            assert not hasattr(sock, name), name


def test_no_option_joins_datagrams() -> None:
    with server() as sock, pytest.raises(ValueError, match=r"UDP_GRO joins .* use enable_gro"):
        sock.setsockopt(17, 104, 1)


def test_a_port_that_nobody_listens_on_is_no_error_of_the_next_call() -> None:
    # IP_RECVERR has the kernel report what a reply ran into.
    with server() as sock, Proxy() as proxy:
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        with Proxy() as gone:
            gone.send(sock.getsockname(), b"hello", OTHER_CLIENT)
            other = sock.recvfrom(9)[1]
        for receive in (sock.recvfrom, sock.recvmsg):
            sock.sendto(b"answer", other)
            proxy.send(sock.getsockname(), b"hello")
            result = receive(9)
            assert (result[0], result[-1]) == (b"hello", CLIENT)
        ttl = [(socket.IPPROTO_IP, socket.IP_TTL, b"\x09\0\0\0")]
        sends: list[Any] = [
            lambda: sock.sendto(b"answer", CLIENT),
            lambda: sock.sendmsg([b"answer"], ttl, 0, CLIENT),
            lambda: sock.send_batch([(b"answer", CLIENT)]),
        ]
        for send in sends:
            sock.sendto(b"lost", other)
            send()
            assert proxy.receive() == b"answer"


@pytest.mark.parametrize(
    ("trusted", "message"),
    [
        (["10.0.0.300"], 'trusted network "10.0.0.300" is not a network; write it as'),
        (["192.0.2.1/24"], "bits set behind its prefix; write 192.0.2.0/24 for the network"),
        (["127.0.0.1", "localhost"], '"localhost" is not a network'),
        ([None], '"None" is not a network'),
        ([], "no trusted network is given and untrusted senders are dropped"),
    ],
)
def test_a_network_that_is_none_is_named(trusted: list[str], message: str) -> None:
    with udp() as sock:
        with pytest.raises(ValueError, match=message):
            ppv2.wrap(sock, trusted=trusted)
        assert sock.fileno() >= 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trusted": "127.0.0.1"}, TypeError, "trusted: expected an iterable of networks"),
        ({"trusted": 5}, TypeError, "trusted: expected an iterable of networks"),
        ({"untrusted": "allow"}, ValueError, "untrusted: expected 'drop' or 'accept', got 'allow'"),
        ({"untrusted": True}, TypeError, "untrusted: expected 'drop' or 'accept', got True"),
        ({"max_header_len": 27}, ValueError, "max_header_len is 27"),
        ({"max_clients": 0}, ValueError, "max_clients: expected a number of clients, at least 1"),
        ({"forget_after": 0}, ValueError, "forget_after: expected a number of seconds above 0"),
        ({"forget_after": -1}, ValueError, "forget_after: expected a number of seconds"),
        ({"forget_after": "1"}, TypeError, "forget_after: expected a number of seconds"),
    ],
)
def test_other_arguments_are_named_too(options: Any, error: type[Exception], message: str) -> None:
    with udp() as sock:
        with pytest.raises(error, match=message):
            ppv2.wrap(sock, **{"trusted": ["127.0.0.1"], **options})
        assert sock.fileno() >= 0


def test_networks_may_be_objects() -> None:
    networks = [ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_address("::1")]
    with server(trusted=iter(networks)) as sock, Proxy() as proxy:
        proxy.send(sock.getsockname(), b"hello")
        assert sock.recv(9) == b"hello"


def test_only_an_open_udp_socket_is_wrapped() -> None:
    with socket.socket() as tcp, pytest.raises(ValueError, match="sock: expected an open UDP"):
        ppv2.wrap(tcp, trusted=["127.0.0.1"])
    with pytest.raises(TypeError, match="sock: expected an open UDP socket"):
        ppv2.wrap(5, trusted=["127.0.0.1"])  # type: ignore[arg-type]
    closed = udp()
    closed.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        ppv2.wrap(closed, trusted=["127.0.0.1"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda sock: sock.recv(-1), ValueError, "bufsize: expected a number of bytes, got -1"),
        (lambda sock: sock.recv("9"), TypeError, "bufsize: expected a number of bytes, got '9'"),
        (lambda sock: sock.recv(9, socket.MSG_PEEK), ValueError, "flags: expected 0 or MSG_DONT"),
        (lambda sock: sock.recv_into(b"ab"), TypeError, "buffer: expected a writable"),
        (lambda sock: sock.recv_into(bytearray(2), 3), ValueError, "nbytes: expected at most"),
        (lambda sock: sock.recvmsg_into([b"ab"]), TypeError, "buffer: expected a writable"),
        (lambda sock: sock.recv_batch(0), ValueError, "n: expected a number of datagrams from 1"),
        (lambda sock: sock.recv_batch(1025), ValueError, "n: expected .* 1024, got 1025"),
        (lambda sock: sock.sendto("text", CLIENT), TypeError, "data: expected a bytes-like"),
        (lambda sock: sock.sendto(b"", "host"), TypeError, "address: expected a tuple"),
        (lambda sock: sock.sendto(b"", ("host", 5)), ValueError, "address.0.: expected an IPv4"),
        (lambda sock: sock.sendmsg([b""]), OSError, "Destination address required"),
        (lambda sock: sock.send_batch([b""]), TypeError, "datagrams.0.: expected a pair"),
    ],
)
def test_an_argument_that_is_wrong_is_named(
    call: Any, error: type[Exception], message: str
) -> None:
    with server() as sock, pytest.raises(error, match=message):
        call(sock)
