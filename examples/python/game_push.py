"""A game server that pushes to its players: each player that has sent its position is
told, many times a second, where all players are.

    python game_push.py --listen 127.0.0.1:9001 --trusted 127.0.0.1
"""

import argparse
import socket
import sys
import time

import ppv2

TICK = 0.05  # seconds
GONE_AFTER = 10.0  # seconds
# Bounds what made-up players can cost in memory and datagrams.
MOST_PLAYERS = 256
LONGEST_POSITION = 32  # bytes

parser = argparse.ArgumentParser()
parser.add_argument("--listen", default="127.0.0.1:9001", metavar="HOST:PORT")
parser.add_argument("--trusted", required=True, nargs="+", metavar="NET")
options = parser.parse_args()
host, port = options.listen.rsplit(":", 1)

# An address that is kept follows its client when the proxy takes another port.
players: dict[ppv2.Address, tuple[bytes, float]] = {}


def receive_until(server: ppv2.Socket, end: float) -> None:
    while (left := end - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            batch = server.recv_batch(64)
        except TimeoutError:
            return
        now = time.monotonic()
        for position, player in batch:
            if player in players or len(players) < MOST_PLAYERS:
                players[player] = (position[:LONGEST_POSITION], now)


def push(server: ppv2.Socket, tick: int) -> None:
    oldest = time.monotonic() - GONE_AFTER
    for player in [player for player, (_, heard) in players.items() if heard < oldest]:
        del players[player]
    positions = b" ".join(position for position, _ in players.values())
    news = [(b"%d: %s" % (tick, positions), player) for player in players]
    server.settimeout(TICK)
    try:
        server.send_batch(news)
    except OSError as error:
        # The next tick brings newer news.
        print(f"tick {tick} not sent: {error}", file=sys.stderr)


sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind((host, int(port)))
with ppv2.wrap(sock, trusted=options.trusted, forget_after=GONE_AFTER) as server:
    print("ready on {}:{}".format(*server.getsockname()), file=sys.stderr, flush=True)
    tick = 0
    while True:
        receive_until(server, time.monotonic() + TICK)
        push(server, tick)
        tick += 1
