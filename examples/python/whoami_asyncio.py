"""Answers every client with its own address and port, on asyncio and uvloop.

python whoami_asyncio.py --listen 127.0.0.1:9001 --trusted 127.0.0.1 [--uvloop]
"""

import argparse
import asyncio
import sys

import uvloop

import ppv2.asyncio


class Whoami(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self.transport = transport

    def datagram_received(self, data: bytes, addr: ppv2.Address) -> None:
        self.transport.sendto("{}:{}".format(*addr[:2]).encode(), addr)


parser = argparse.ArgumentParser()
parser.add_argument("--listen", default="127.0.0.1:9001", metavar="HOST:PORT")
parser.add_argument("--trusted", required=True, nargs="+", metavar="NET")
parser.add_argument("--uvloop", action="store_true")
options = parser.parse_args()


async def main() -> None:
    host, port = options.listen.rsplit(":", 1)
    transport, _ = await ppv2.asyncio.create_datagram_endpoint(
        Whoami, local_addr=(host, int(port)), trusted=options.trusted
    )
    name = transport.get_extra_info("sockname")
    print("ready on {}:{}".format(*name), file=sys.stderr, flush=True)
    await asyncio.Event().wait()


with asyncio.Runner(loop_factory=uvloop.new_event_loop if options.uvloop else None) as runner:
    runner.run(main())
