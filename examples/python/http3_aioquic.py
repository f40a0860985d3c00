"""An HTTP/3 server on aioquic that answers every request with the client's address.

python http3_aioquic.py --listen 127.0.0.1:4433 --trusted 127.0.0.1 \
        --certificate certificate.pem --key key.pem
"""

import argparse
import asyncio
import sys
from typing import Any

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ProtocolNegotiated, QuicEvent

import ppv2.aioquic


class Whoami(QuicConnectionProtocol):
    """One client's connection."""

    client: ppv2.Address
    http: H3Connection

    def datagram_received(self, data: Any, addr: Any) -> None:
        # The latest address: clients move from one network to another.
        self.client = addr
        super().datagram_received(data, addr)

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, ProtocolNegotiated):
            self.http = H3Connection(self._quic)
        for http_event in self.http.handle_event(event):
            if isinstance(http_event, HeadersReceived):
                body = "{}:{}\n".format(*self.client[:2]).encode()
                headers = [(b":status", b"200"), (b"content-length", b"%d" % len(body))]
                self.http.send_headers(http_event.stream_id, headers)
                self.http.send_data(http_event.stream_id, body, end_stream=True)
                self.transmit()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", default="127.0.0.1:4433", metavar="HOST:PORT")
    parser.add_argument("--trusted", required=True, nargs="+", metavar="NET")
    parser.add_argument("--certificate", required=True, metavar="FILE")
    parser.add_argument("--key", required=True, metavar="FILE")
    options = parser.parse_args()
    host, port = options.listen.rsplit(":", 1)
    configuration = QuicConfiguration(is_client=False, alpn_protocols=H3_ALPN)
    configuration.load_cert_chain(options.certificate, options.key)

    # The line that makes the difference.
    await ppv2.aioquic.serve(
        host,
        int(port),
        configuration=configuration,
        create_protocol=Whoami,
        retry=True,
        trusted=options.trusted,
    )
    print(f"ready on {host}:{port}", file=sys.stderr, flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
