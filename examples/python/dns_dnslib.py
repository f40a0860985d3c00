"""A DNS server on dnslib that answers `whoami. TXT` with the client's address.

python dns_dnslib.py --listen 127.0.0.1:5301 --trusted 127.0.0.1
"""

import argparse
import functools
import sys

from dnslib import QTYPE, RCODE, RR, TXT, DNSRecord
from dnslib.server import BaseResolver, DNSHandler, DNSLogger, DNSServer

import ppv2.socketserver


class Whoami(BaseResolver):
    def resolve(self, request: DNSRecord, handler: DNSHandler) -> DNSRecord:
        reply = request.reply()
        if request.q.qname == "whoami." and request.q.qtype == QTYPE.TXT:
            client = "{}:{}".format(*handler.client_address[:2])
            reply.add_answer(RR("whoami.", QTYPE.TXT, ttl=0, rdata=TXT(client)))
        else:
            reply.header.rcode = RCODE.REFUSED
        return reply


parser = argparse.ArgumentParser()
parser.add_argument("--listen", default="127.0.0.1:5301", metavar="HOST:PORT")
parser.add_argument("--trusted", required=True, nargs="+", metavar="NET")
options = parser.parse_args()
host, port = options.listen.rsplit(":", 1)

server = DNSServer(
    Whoami(),
    address=host,
    port=int(port),
    logger=DNSLogger("error"),
    # The line that makes the difference.
    server=functools.partial(ppv2.socketserver.ThreadingUDPServer, trusted=options.trusted),
)
print("ready on {}:{}".format(*server.server.server_address), file=sys.stderr, flush=True)
server.start()
