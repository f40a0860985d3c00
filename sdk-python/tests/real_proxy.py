"""The real proxy, `ppv2-proxy`, in front of a server."""

import os
import random
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

# How replies find their client, of the proxies that are started: `any_replies` changes it.
replies = "session"


def binary() -> str:
    """The proxy's path: PPV2_PROXY, or where cargo builds it."""
    named = os.environ.get("PPV2_PROXY")
    path = Path(named) if named else ROOT / "target" / "debug" / "ppv2-proxy"
    if not path.is_file():
        pytest.fail(
            f"{path} is not there; build it with `cargo build -p ppv2-proxy`, or name it in "
            "PPV2_PROXY"
        )
    return str(path)


def free_port() -> int:
    """A port that no socket has and no other test gets, of this process or another, Rust's
    included. It lies below the ports that the kernel gives out, so that nothing else takes it
    either.
    """
    while True:
        port = random.randrange(10_000, 32_768)
        reserved = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            # Like ports, abstract names belong to a network namespace.
            reserved.bind(f"\0ppv2-lab-port-{port}")
        except OSError:
            reserved.close()
            continue
        # Held until the process ends.
        _reserved.append(reserved)
        if port not in _ports_in_use():
            return port


_reserved: list[socket.socket] = []


def _ports_in_use() -> set[int]:
    ports = set()
    for protocol in ["udp", "udp6", "tcp", "tcp6"]:
        # The format is that of proc_pid_net(5).
        sockets = Path(f"/proc/thread-self/net/{protocol}").read_text().splitlines()[1:]
        ports |= {int(line.split()[1].rpartition(":")[2], 16) for line in sockets}
    return ports


@contextmanager
def proxy_to(server: tuple[str, int], *options: str) -> Iterator[tuple[str, int]]:
    """Runs the proxy, and yields the listener's address."""
    listener = ("127.0.0.1", free_port())
    command = [binary(), "run", "--listen", f"127.0.0.1:{listener[1]}"]
    command += ["--upstream", f"{server[0]}:{server[1]}", "--workers", "1"]
    command += ["--replies", replies, *options]
    with until_ready(command):
        yield listener


@contextmanager
def proxy_to_upstream(
    folder: Path, server: tuple[Any, ...], *keys: str
) -> Iterator[tuple[str, int]]:
    """Runs the proxy with these keys of the upstream, as TOML, and yields the listener's
    address.
    """
    listener = ("127.0.0.1", free_port())
    upstream = "\n".join([f'servers = ["{server[0]}:{server[1]}"]', *keys])
    config = folder / "proxy.toml"
    config.write_text(
        f'workers = 1\n[[listener]]\nname = "test"\nbind = ["127.0.0.1:{listener[1]}"]\n'
        f'upstream = "test"\n[upstream.test]\n{upstream}\n'
    )
    with until_ready([binary(), "run", "--config", str(config)]):
        yield listener


@contextmanager
def until_ready(command: list[str], word: str = "ready") -> Iterator[str]:
    """Runs a program from the line on standard error that says `word`, which is
    yielded, until the end of the block.
    """
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        try:
            for line in process.stderr:
                lines.append(line)
                if word in line:
                    break
            else:
                pytest.fail(f"{command} ended: {''.join(lines)}")
            # Nobody may be kept waiting for room in the pipe.
            rest = threading.Thread(target=lines.extend, args=(process.stderr,))
            rest.start()
            yield lines[-1]
        finally:
            # No waiting for sessions to end.
            process.kill()
            process.wait()
        rest.join()
        assert "Traceback" not in "".join(lines), "".join(lines)
