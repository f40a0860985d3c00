"""Echoes every client's datagrams, on asyncio.

python echo_asyncio.py --listen 127.0.0.1:9001 --trusted 127.0.0.1
"""

import argparse
import asyncio
import sys

import ppv2.asyncio


class Echo(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self.transport = transport

    def datagram_received(self, data: bytes, addr: ppv2.Address) -> None:
        self.transport.sendto(data, addr)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", default="127.0.0.1:9001", metavar="HOST:PORT")
    parser.add_argument("--trusted", required=True, nargs="+", metavar="NET")
    options = parser.parse_args()
    host, port = options.listen.rsplit(":", 1)

    transport, _ = await ppv2.asyncio.create_datagram_endpoint(
        Echo, local_addr=(host, int(port)), trusted=options.trusted
    )
    name = transport.get_extra_info("sockname")
    print("ready on {}:{}".format(*name), file=sys.stderr, flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
