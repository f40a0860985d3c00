"""Answers each datagram with the address that it came from: a blocking socket, which
threads share, or forked processes.

usage: whoami_socket.py ADDRESS PORT [threads|fork]
"""
import os
import socket
import sys
import threading

host, port = sys.argv[1], int(sys.argv[2])
how = sys.argv[3] if len(sys.argv) > 3 else ""
family = socket.AF_INET6 if ":" in host else socket.AF_INET
sock = socket.socket(family, socket.SOCK_DGRAM)
sock.bind((host, port))


def name(client):
    host = f"[{client[0]}]" if ":" in client[0] else client[0]
    return f"{host}:{client[1]} ".encode()


def answer(payload, client):
    if payload.startswith(b"later "):
        delay = int(payload.split()[1]) / 1000
        threading.Timer(delay, sock.sendto, (name(client) + payload, client)).start()
    else:
        sock.sendto(name(client) + payload, client)


def serve():
    while True:
        answer(*sock.recvfrom(65536))


def end_with_parent(closed):
    os.read(closed, 1)
    os._exit(1)


if how == "threads":
    for _ in range(3):
        threading.Thread(target=serve).start()
elif how == "fork":
    closed, held = os.pipe()
    for _ in range(3):
        if os.fork() == 0:
            os.close(held)
            threading.Thread(target=end_with_parent, args=[closed]).start()
            break
print("ready", file=sys.stderr, flush=True)
serve()
