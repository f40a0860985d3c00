"""Each example and the README's server, behind the real proxy."""

import asyncio
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dns.message
import dns.query
import dns.rcode
import pytest
from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import QuicEvent

from certificate import write_certificate
from peers import PATIENCE, udp
from real_proxy import ROOT, free_port, proxy_to, until_ready

EXAMPLES = ROOT / "examples" / "python"

LISTENER = tuple[str, int]


@contextmanager
def behind_proxy(name: str, *options: str, listen: str = "127.0.0.1:0") -> Iterator[LISTENER]:
    """Runs an example and the proxy in front of it, and yields the listener."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), "--listen", listen]
    with until_ready([*command, *options, "--trusted", "127.0.0.1", "::1"]) as line:
        host, port = line.removeprefix("ready on ").rsplit(":", 1)
        with proxy_to((host, int(port))) as listener:
            yield listener


def ask(listener: LISTENER, payload: bytes, host: str = "127.0.0.1") -> tuple[bytes, str]:
    """What a client is answered, and the client's own address."""
    with udp(host) as client:
        client.sendto(payload, listener)
        return client.recv(65535), "{}:{}".format(*client.getsockname())


@pytest.mark.parametrize("name", ["echo_socket.py", "echo_asyncio.py"])
def test_echo(name: str) -> None:
    with behind_proxy(name) as listener:
        assert ask(listener, b"hello")[0] == b"hello"


def test_a_client_of_two_listeners_is_answered_by_each() -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLES / "echo_socket.py")]
    command += ["--listen", "127.0.0.1:0", "--trusted", "127.0.0.1"]
    with until_ready(command) as line:
        server = ("127.0.0.1", int(line.rpartition(":")[2]))
        with proxy_to(server) as one, proxy_to(server) as other, udp() as client:
            for number in range(20):
                client.sendto(b"one %d" % number, one)
                client.sendto(b"other %d" % number, other)
                answers = dict(client.recvfrom(99)[::-1] for _ in range(2))
                assert answers == {one: b"one %d" % number, other: b"other %d" % number}


@pytest.mark.parametrize(
    ("name", "options"),
    [("whoami_asyncio.py", []), ("whoami_asyncio.py", ["--uvloop"])],
    ids=["standard", "uvloop"],
)
def test_whoami_asyncio(name: str, options: list[str]) -> None:
    with behind_proxy(name, *options) as listener:
        for host in ("127.0.0.1", "127.0.0.2"):
            answer, client = ask(listener, b"", host)
            assert answer.decode() == client


def test_whoami_socket() -> None:
    with behind_proxy("whoami_socket.py") as listener:
        for host in ("127.0.0.1", "127.0.0.2"):
            answer, client = ask(listener, b"", host)
            assert answer.decode() == "{} by {}:{}".format(client, *listener)


@pytest.mark.parametrize("name", ["dns_dnslib.py", "dns_dnspython.py"])
def test_dns(name: str) -> None:
    with behind_proxy(name) as listener, udp() as client:
        host, port = listener
        for question, rcode in (("whoami.", dns.rcode.NOERROR), ("other.", dns.rcode.REFUSED)):
            query = dns.message.make_query(question, "TXT")
            response = dns.query.udp(query, host, PATIENCE, port, sock=client)
            assert response.rcode() == rcode
            answers = [rdata.to_text() for rrset in response.answer for rdata in rrset]
            expected = '"{}:{}"'.format(*client.getsockname())
            assert answers == ([expected] if rcode == dns.rcode.NOERROR else [])
        # What is no query is no reason to stop.
        client.sendto(b"nonsense", listener)
        assert dns.query.udp(query, host, PATIENCE, port, sock=client).id == query.id


class HttpClient(QuicConnectionProtocol):
    body = b""

    def quic_event_received(self, event: QuicEvent) -> None:
        for http_event in self.http.handle_event(event):
            if isinstance(http_event, DataReceived):
                self.body += http_event.data
                if http_event.stream_ended:
                    self.done.set()

    async def get(self, authority: str) -> str:
        self.http = H3Connection(self._quic)
        self.done = asyncio.Event()
        headers = [
            (b":method", b"GET"),
            (b":scheme", b"https"),
            (b":authority", authority.encode()),
            (b":path", b"/"),
        ]
        self.http.send_headers(self._quic.get_next_available_stream_id(), headers, end_stream=True)
        self.transmit()
        await self.done.wait()
        return self.body.decode()


def test_http3(tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    configuration = QuicConfiguration(alpn_protocols=H3_ALPN, server_name="localhost")
    configuration.load_verify_locations(str(certificate))

    async def main(listener: LISTENER) -> None:
        async with connect(
            *listener, configuration=configuration, create_protocol=HttpClient
        ) as client:
            assert isinstance(client, HttpClient)
            answer = await client.get("localhost")
            transport = client._transport
            assert isinstance(transport, asyncio.BaseTransport)
            port = transport.get_extra_info("sockname")[1]
            assert answer == f"127.0.0.1:{port}\n"

    files = ("--certificate", str(certificate), "--key", str(key))
    listen = f"127.0.0.1:{free_port()}"
    with behind_proxy("http3_aioquic.py", *files, listen=listen) as listener:
        asyncio.run(asyncio.wait_for(main(listener), PATIENCE))


def test_game_push() -> None:
    with behind_proxy("game_push.py") as listener, udp() as one, udp("127.0.0.2") as other:
        one.sendto(b"1,2", listener)
        # Unasked and again and again.
        for _ in range(3):
            assert one.recv(100).endswith(b": 1,2")
        other.sendto(b"3,4", listener)
        while not one.recv(100).endswith(b": 1,2 3,4"):
            pass
        assert other.recv(100).endswith(b": 1,2 3,4")


def test_rate_limit() -> None:
    # So slow that no more than the burst is answered in any test's time.
    options = ("--rate", "1e-6", "--burst", "3")
    with behind_proxy("rate_limit.py", *options) as listener, udp() as greedy:
        for number in range(10):
            greedy.sendto(b"%d" % number, listener)
        assert [greedy.recv(9) for _ in range(3)] == [b"0", b"1", b"2"]
        # Another client is answered, after which the first would have been.
        assert ask(listener, b"modest", "127.0.0.2")[0] == b"modest"
        greedy.setblocking(False)
        with pytest.raises(BlockingIOError):
            greedy.recv(9)


def test_the_server_of_the_readme(tmp_path: Path) -> None:
    readme = (ROOT / "sdk-python" / "README.md").read_text(encoding="utf-8")
    found = re.search(r"```python no-run\n(.*?)```", readme, re.DOTALL)
    assert found
    server = ("127.0.0.1", free_port())
    source = found[1].replace('("0.0.0.0", 9000)', str(server)).replace("192.0.2.10", "127.0.0.1")
    source = source.replace("while True", 'import sys; print("ready", file=sys.stderr)\nwhile True')
    path = tmp_path / "server.py"
    path.write_text(source, encoding="utf-8")
    with until_ready([sys.executable, "-W", "error", str(path)]), proxy_to(server) as listener:
        assert ask(listener, b"hello")[0] == b"hello"


def test_every_example_is_tested() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    examples = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert len(examples) == 9
    for name in examples:
        assert f'"{name}"' in tests
