"""`ppv2.socketserver`: handlers of the standard library see clients."""

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import ppv2
import ppv2.socketserver
from peers import CLIENT, OTHER_CLIENT, Proxy, hostile


class Whoami(socketserver.DatagramRequestHandler):
    def handle(self) -> None:
        host, port = self.client_address
        self.wfile.write(f"{host}:{port} {self.rfile.read().decode()}".encode())


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        data, sock = self.request
        sock.sendto(data, self.client_address)


@contextmanager
def serving(
    kind: type[ppv2.socketserver.UDPServer],
    handler: type[socketserver.BaseRequestHandler],
    **options: Any,
) -> Iterator[ppv2.socketserver.UDPServer]:
    with kind(("127.0.0.1", 0), handler, trusted=["127.0.0.1"], **options) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    "kind", [ppv2.socketserver.UDPServer, ppv2.socketserver.ThreadingUDPServer]
)
def test_handlers_see_clients_and_answer_them(kind: type[ppv2.socketserver.UDPServer]) -> None:
    with serving(kind, Whoami) as server, Proxy() as one, Proxy() as other:
        name: Any = server.server_address
        for _, datagram in hostile().values():
            one.send_raw(name, datagram)
        one.send(name, b"a")
        assert one.receive() == b"203.0.113.11:54321 a"
        other.send(name, b"b", client=OTHER_CLIENT)
        assert other.receive() == b"203.0.113.12:54321 b"
    with serving(kind, Echo) as server, Proxy() as one:
        one.send(server.server_address, b"hello")  # type: ignore[arg-type]
        assert one.receive() == b"hello"


def test_a_bad_datagram_does_not_keep_a_server_from_stopping() -> None:
    with serving(ppv2.socketserver.UDPServer, Echo) as server, Proxy() as proxy:
        proxy.send_raw(server.server_address, b"bad")  # type: ignore[arg-type]
        sock: Any = server.socket
        while not sock.stats().dropped["no_header"]:
            pass
    # `serving` has stopped it: a receive call that waits would have hung.


def test_a_server_whose_socket_was_swapped_stops_after_a_bad_datagram() -> None:
    with socketserver.UDPServer(("127.0.0.1", 0), Echo) as server, Proxy() as proxy:
        sock: Any = ppv2.wrap(server.socket, trusted=["127.0.0.1"])
        server.socket = sock
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        proxy.send_raw(sock.getsockname(), b"bad")
        while not sock.stats().dropped["no_header"]:
            pass
        server.shutdown()
        thread.join()


def test_one_request_at_a_time() -> None:
    kind = ppv2.socketserver.UDPServer
    with kind(("127.0.0.1", 0), Echo, False, trusted=["127.0.0.1"]) as server, Proxy() as proxy:
        server.server_bind()
        server.server_activate()
        server.timeout = 20
        proxy.send(server.server_address, b"x", client=CLIENT)  # type: ignore[arg-type]
        server.handle_request()
        assert proxy.receive() == b"x"


def test_bad_arguments_leave_nothing_open() -> None:
    with pytest.raises(ValueError, match='"nowhere" is not a network'):
        ppv2.socketserver.UDPServer(("127.0.0.1", 0), Echo, trusted=["nowhere"])
    with pytest.raises(ValueError, match="untrusted: expected 'drop' or 'accept'"):
        ppv2.socketserver.UDPServer(
            ("127.0.0.1", 0),
            Echo,
            trusted=["127.0.0.1"],
            untrusted="allow",  # type: ignore[arg-type]
        )
