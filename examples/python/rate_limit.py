"""An echo server that limits how often it answers each client, by the client's IP
address. Without the header all clients would share the proxy's limit.

    python rate_limit.py --listen 127.0.0.1:9001 --trusted 127.0.0.1 --rate 10 --burst 20
"""

import argparse
import ipaddress
import socket
import sys
import time
from collections import OrderedDict

import ppv2

# Bounds what made-up clients can make us remember. The one longest unheard-of is
# forgotten first.
MOST_CLIENTS = 10_000


class Limiter:
    """A bucket for each client that holds `burst` answers, and gets `rate` of them a
    second.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self.rate = rate
        self.burst = burst
        self.buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allows(self, client: str) -> bool:
        now = time.monotonic()
        left, since = self.buckets.pop(client, (self.burst, now))
        left = min(self.burst, left + (now - since) * self.rate)
        allowed = left >= 1
        self.buckets[client] = (left - allowed, now)
        if len(self.buckets) > MOST_CLIENTS:
            self.buckets.popitem(last=False)
        return allowed


def network(host: str) -> str:
    """One client's addresses: of IPv6 it has a whole network."""
    if ipaddress.ip_address(host).version == 4:
        return host
    return str(ipaddress.ip_network((host, 64), strict=False))


parser = argparse.ArgumentParser()
parser.add_argument("--listen", default="127.0.0.1:9001", metavar="HOST:PORT")
parser.add_argument("--trusted", required=True, nargs="+", metavar="NET")
parser.add_argument("--rate", type=float, default=10, help="answers a second")
parser.add_argument("--burst", type=float, default=20, help="answers at once")
options = parser.parse_args()
host, port = options.listen.rsplit(":", 1)

limiter = Limiter(options.rate, options.burst)
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind((host, int(port)))
with ppv2.wrap(sock, trusted=options.trusted) as server:
    print("ready on {}:{}".format(*server.getsockname()), file=sys.stderr, flush=True)
    while True:
        payload, client = server.recvfrom(65535)
        if not limiter.allows(network(client[0])):
            continue
        try:
            server.sendto(payload, client)
        except OSError as error:
            print(f"no answer to {client}: {error}", file=sys.stderr)
