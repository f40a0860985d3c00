"""Each example and the README's server, behind the real proxy."""

import asyncio
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

pytestmark = pytest.mark.usefixtures("any_replies")

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

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # At once, since the server begins streams of its own.
        self.http = H3Connection(self._quic)

    def quic_event_received(self, event: QuicEvent) -> None:
        for http_event in self.http.handle_event(event):
            if isinstance(http_event, DataReceived):
                self.body += http_event.data
                if http_event.stream_ended:
                    self.done.set()

    async def get(self, authority: str) -> str:
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


def http3_sees_its_client(listener: LISTENER, certificate: Path) -> None:
    configuration = QuicConfiguration(alpn_protocols=H3_ALPN, server_name="localhost")
    configuration.load_verify_locations(str(certificate))

    async def main() -> None:
        async with connect(
            *listener, configuration=configuration, create_protocol=HttpClient
        ) as client:
            assert isinstance(client, HttpClient)
            answer = await client.get("localhost")
            transport = client._transport
            assert isinstance(transport, asyncio.BaseTransport)
            port = transport.get_extra_info("sockname")[1]
            assert answer == f"127.0.0.1:{port}\n"

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_http3(tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    files = ("--certificate", str(certificate), "--key", str(key))
    listen = f"127.0.0.1:{free_port()}"
    with behind_proxy("http3_aioquic.py", *files, listen=listen) as listener:
        http3_sees_its_client(listener, certificate)


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


def of_readme() -> dict[str, str]:
    """The README's servers by name."""
    readme = (ROOT / "sdk-python" / "README.md").read_text(encoding="utf-8")
    return dict(re.findall(r"```python no-run (\S+)\n(.*?)```", readme, re.DOTALL))


@contextmanager
def of_readme_behind_proxy(
    folder: Path, name: str, *changes: tuple[str, str], word: str = "ready"
) -> Iterator[LISTENER]:
    """Runs a server of the README's, changed for this host, and the proxy in front of it."""
    port = free_port()
    source = of_readme()[name].replace("192.0.2.10", "127.0.0.1").replace("0.0.0.0", "127.0.0.1")
    for old, new in (*changes, ("9000", str(port)), ("4433", str(port))):
        assert old in source or new == str(port)
        source = source.replace(old, new)
    path = folder / "server.py"
    path.write_text(source, encoding="utf-8")
    command = [sys.executable, "-W", "error", str(path)]
    with until_ready(command, word), proxy_to(("127.0.0.1", port)) as listener:
        yield listener


SAY_READY = 'import sys; print("ready", file=sys.stderr, flush=True)'

# Where each has bound its port, and begins to serve.
BEGINS = {
    "socket": ("while True", f"{SAY_READY}\nwhile True"),
    "twisted": ("reactor.run()", f"{SAY_READY}\nreactor.run()"),
    "gevent": ("server.serve_forever()", f"server.start(); {SAY_READY}\nserver.serve_forever()"),
}


@pytest.mark.parametrize("name", BEGINS)
def test_echo_of_the_readme(tmp_path: Path, name: str) -> None:
    with of_readme_behind_proxy(tmp_path, name, BEGINS[name]) as listener:
        assert ask(listener, b"hello")[0] == b"hello"


@pytest.mark.parametrize("run", ["asyncio.run(", "uvloop.run("], ids=["standard", "uvloop"])
def test_hypercorn_of_the_readme(tmp_path: Path, run: str) -> None:
    certificate, key = write_certificate(tmp_path)
    changes = (
        ("cert.pem", str(certificate)),
        ("key.pem", str(key)),
        ("asyncio.run(", f"import uvloop; {run}"),
    )
    with of_readme_behind_proxy(tmp_path, "hypercorn", *changes, word="(QUIC)") as listener:
        http3_sees_its_client(listener, certificate)


def test_every_server_of_the_readme_is_tested() -> None:
    assert of_readme().keys() == {*BEGINS, "hypercorn"}


def test_every_example_is_tested() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    examples = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert len(examples) == 9
    for name in examples:
        assert f'"{name}"' in tests
