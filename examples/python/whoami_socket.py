"""Answers every client with its own address and port, and with the listener that
it wrote to.

    python whoami_socket.py --listen 127.0.0.1:9001 --trusted 127.0.0.1
"""

import argparse
import socket
import sys

import ppv2

parser = argparse.ArgumentParser()
parser.add_argument("--listen", default="127.0.0.1:9001", metavar="HOST:PORT")
parser.add_argument("--trusted", required=True, nargs="+", metavar="NET")
options = parser.parse_args()
host, port = options.listen.rsplit(":", 1)

sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind((host, int(port)))
with ppv2.wrap(sock, trusted=options.trusted) as server:
    print("ready on {}:{}".format(*server.getsockname()), file=sys.stderr, flush=True)
    while True:
        datagram = server.recv_datagram()
        answer = "{}:{}".format(*datagram.client[:2])
        if datagram.destination:
            answer += " by {}:{}".format(*datagram.destination[:2])
        try:
            server.sendto(answer.encode(), datagram.client)
        except OSError as error:
            # One client that can't be answered is no reason to leave the others.
            print(f"no answer to {datagram.client}: {error}", file=sys.stderr)
