"""Servers that others wrote, behind the real proxy: they see who their clients are."""

import asyncio
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiocoap
import aiocoap.resource
import pytest
import tftpy
import uvloop
from pysnmp.carrier.asyncio.dgram import udp as snmp_udp
from pysnmp.entity import config, engine
from pysnmp.entity.rfc3413 import cmdrsp, context
from pythonosc.dispatcher import Dispatcher
from pythonosc.osc_message import OscMessage
from pythonosc.osc_message_builder import OscMessageBuilder
from pythonosc.osc_server import AsyncIOOSCUDPServer

import ppv2
from peers import PATIENCE, udp
from real_proxy import free_port, proxy_to

Address = tuple[str, int]


class Client:
    """One that waits in a thread for its answer."""

    def __init__(self, listener: Address) -> None:
        self.listener = listener
        self.name: Address = ("", 0)

    async def ask(self, question: bytes) -> bytes:
        def ask() -> bytes:
            with udp() as sock:
                self.name = sock.getsockname()
                sock.sendto(question, self.listener)
                return sock.recv(65535)

        return await asyncio.to_thread(ask)


async def osc(server: Address, client: Client) -> None:
    def whoami(address: Address, *_: object) -> tuple[str, str]:
        return "/you", "{}:{}".format(*address)

    dispatcher = Dispatcher()
    dispatcher.map("/whoami", whoami, needs_reply_address=True)
    loop: Any = asyncio.get_running_loop()
    transport, _ = await AsyncIOOSCUDPServer(server, dispatcher, loop).create_serve_endpoint()
    answer = OscMessage(await client.ask(OscMessageBuilder("/whoami").build().dgram))
    assert answer.params == ["{}:{}".format(*client.name)]
    transport.close()
    await asyncio.sleep(0)


async def coap(server: Address, client: Client) -> None:
    class Whoami(aiocoap.resource.Resource):  # type: ignore[misc]
        async def render_get(self, request: Any) -> Any:
            return aiocoap.Message(payload=request.remote.hostinfo.encode())

    site = aiocoap.resource.Site()
    site.add_resource(["whoami"], Whoami())
    serving = await aiocoap.Context.create_server_context(
        site, bind=server, transports=["simplesocketserver"]
    )
    get = aiocoap.Message(
        mtype=aiocoap.CON, mid=1, token=b"t", code=aiocoap.GET, uri_path=["whoami"]
    )
    answer = aiocoap.Message.decode(await client.ask(get.encode()))
    assert answer.payload.decode() == "{}:{}".format(*client.name)
    await serving.shutdown()


# Version 2c, community "public": get sysDescr.0 (RFC 3416, section 4.2.1).
GET_DESCRIPTION = bytes.fromhex(
    "3026 020101 0406 7075626c6963 a019 020101 020100 020100 300e 300c 06082b06010201010100 0500"
)


async def snmp(server: Address, client: Client) -> None:
    agent = engine.SnmpEngine()
    endpoint = snmp_udp.UdpTransport().open_server_mode(server)
    config.add_transport(agent, snmp_udp.DOMAIN_NAME, endpoint)
    config.add_v1_system(agent, "area", "public")
    config.add_vacm_user(agent, 2, "area", "noAuthNoPriv", (1, 3, 6, 1))
    cmdrsp.GetCommandResponder(agent, context.SnmpContext(agent))
    seen: list[Address] = []
    agent.observer.register_observer(
        lambda _engine, _point, variables, _context: seen.append(
            tuple(variables["transportAddress"])
        ),
        "rfc3412.receiveMessage:request",
    )
    # It opens its endpoint in a task of its own.
    await endpoint._lport
    assert b"PySNMP" in await client.ask(GET_DESCRIPTION)
    assert seen == [client.name]
    agent.close_dispatcher()
    await asyncio.sleep(0)


# aiocoap's own business.
@pytest.mark.filterwarnings("ignore:Initializing messages:DeprecationWarning")
@pytest.mark.parametrize("library", [osc, coap, snmp])
@pytest.mark.parametrize(
    "loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["standard", "uvloop"]
)
def test_libraries_that_open_their_own_endpoint(
    library: Callable[[Address, Client], Awaitable[None]],
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def main() -> None:
        server = ("127.0.0.1", free_port())
        installed = ppv2.asyncio.install(addresses=[server], trusted=["127.0.0.1"])
        with installed, proxy_to(server) as listener:
            await asyncio.wait_for(library(server, Client(listener)), PATIENCE)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())


class Wrapped:
    """A socket that is wrapped when it is bound, for a server that makes its own."""

    def __init__(self, *arguments: Any) -> None:
        self.sock: Any = socket.socket(*arguments)

    def bind(self, address: Address) -> None:
        self.sock.bind(address)
        self.sock = ppv2.wrap(self.sock, trusted=["127.0.0.1"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)


def test_tftpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def whoami(_: str, raddress: str, rport: int) -> Any:
        path = tmp_path / "answer"
        path.write_text(f"{raddress}:{rport}", encoding="ascii")
        return path.open("rb")

    of_server = SimpleNamespace(**{**vars(socket), "socket": Wrapped})
    monkeypatch.setattr(sys.modules["tftpy.TftpServer"], "socket", of_server)
    server = tftpy.TftpServer(str(tmp_path), dyn_file_func=whoami)
    serving = threading.Thread(target=server.listen, args=("127.0.0.1", 0, 1))
    serving.start()
    try:
        assert server.is_running.wait(PATIENCE)
        with proxy_to(("127.0.0.1", server.listenport)) as listener, udp() as client:
            # A read request. The answer comes from a port of the transfer's own, past the
            # proxy, and needs the client's address (RFC 1350, section 4).
            client.sendto(b"\0\1whoami\0octet\0", listener)
            block, transfer = client.recvfrom(999)
            assert block == b"\0\3\0\1" + "{}:{}".format(*client.getsockname()).encode()
            client.sendto(b"\0\4\0\1", transfer)
    finally:
        server.stop(now=True)
        serving.join(PATIENCE)
    assert not serving.is_alive()
