"""Echoes every client's datagrams.

python echo_socket.py --listen 127.0.0.1:9001 --trusted 127.0.0.1
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
        payload, client = server.recvfrom(65535)
        try:
            server.sendto(payload, client)
        except OSError as error:
            # One client that can't be answered is no reason to leave the others.
            print(f"no answer to {client}: {error}", file=sys.stderr)
