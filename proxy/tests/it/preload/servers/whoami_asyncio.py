"""Answers each datagram with the address that it came from: asyncio, or uvloop.

usage: whoami_asyncio.py ADDRESS PORT [uvloop]
"""
import asyncio
import sys


def name(client):
    host = f"[{client[0]}]" if ":" in client[0] else client[0]
    return f"{host}:{client[1]} ".encode()


class Server(asyncio.DatagramProtocol):
    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, payload, client):
        answer = name(client) + payload
        if payload.startswith(b"later "):
            delay = int(payload.split()[1]) / 1000
            loop = asyncio.get_running_loop()
            loop.call_later(delay, self.transport.sendto, answer, client)
        else:
            self.transport.sendto(answer, client)

    def error_received(self, error):
        print(f"error_received: {error}", file=sys.stderr, flush=True)


async def main(host, port):
    loop = asyncio.get_running_loop()
    await loop.create_datagram_endpoint(Server, local_addr=(host, port))
    print("ready", type(loop).__module__, file=sys.stderr, flush=True)
    await asyncio.Event().wait()


if sys.argv[3:] == ["uvloop"]:
    import uvloop as runner
else:
    runner = asyncio
runner.run(main(sys.argv[1], int(sys.argv[2])))
