"""A DNS server on dnspython and asyncio that answers `whoami. TXT` with the client's
address.

    python dns_dnspython.py --listen 127.0.0.1:5301 --trusted 127.0.0.1
"""

import argparse
import asyncio
import sys

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset

import ppv2.asyncio

WHOAMI = dns.name.from_text("whoami.")


class Dns(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self.transport = transport

    def datagram_received(self, data: bytes, addr: ppv2.Address) -> None:
        try:
            query = dns.message.from_wire(data)
        except dns.exception.DNSException:
            return
        # An answer to an answer would go to and fro for ever.
        if query.flags & dns.flags.QR or len(query.question) != 1:
            return
        response = dns.message.make_response(query)
        question = query.question[0]
        if question.name == WHOAMI and question.rdtype == dns.rdatatype.TXT:
            client = '"{}:{}"'.format(*addr[:2])
            response.answer.append(dns.rrset.from_text(WHOAMI, 0, "IN", "TXT", client))
        else:
            response.set_rcode(dns.rcode.REFUSED)
        self.transport.sendto(response.to_wire(), addr)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", default="127.0.0.1:5301", metavar="HOST:PORT")
    parser.add_argument("--trusted", required=True, nargs="+", metavar="NET")
    options = parser.parse_args()
    host, port = options.listen.rsplit(":", 1)

    # The line that makes the difference.
    transport, _ = await ppv2.asyncio.create_datagram_endpoint(
        Dns, local_addr=(host, int(port)), trusted=options.trusted
    )
    name = transport.get_extra_info("sockname")
    print("ready on {}:{}".format(*name), file=sys.stderr, flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
