"""`python -m ppv2`, as its user calls it."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import ppv2
from peers import CLIENT, CLIENT_V6, LISTENER, Proxy, hostile, udp

WHOAMI = ["whoami", "--listen", "127.0.0.1:0", "--trusted", "127.0.0.1"]


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-W", "error", "-m", "ppv2", *arguments]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=60, check=False
    )


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Runs a program, which does not outlive the block, whatever fails there."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_header_is_told_line_by_line() -> None:
    ssl = b"\x01\0\0\0\0\x21\0\x07TLSv1.3"
    tlvs = [(0x01, b"h3"), (0xE7, b""), (0x02, b"\x1b[2J"), (0x20, ssl), (0x30, b"\xff")]
    datagram = ppv2.encode(CLIENT, LISTENER, tlvs=tlvs) + b"hello"
    result = run("decode", datagram.hex())
    assert result.stderr == ""
    assert result.returncode == 0
    assert result.stdout.splitlines() == [
        "command      proxy",
        "transport    udp",
        "source       203.0.113.11:54321",
        "destination  198.51.100.10:9000",
        "client       203.0.113.11:54321",
        "length       65 bytes",
        "tlv          0x01 ALPN, 2 bytes: 6833",
        "tlv          0xe7, 0 bytes: -",
        "tlv          0x02 AUTHORITY, 4 bytes: 1b5b324a",
        "tlv          0x20 SSL, 15 bytes: 0100000000210007544c5376312e33",
        "tlv          0x30 NETNS, 1 byte: ff",
        "alpn         b'h3'",
        r"authority    '\x1b[2J'",
        "netns        malformed: NETNS is not ASCII from byte 0 of its value on",
        "ssl.client   1",
        "ssl.verify   0",
        "ssl.version  'TLSv1.3'",
        "payload      5 bytes",
    ]


def test_standard_input_is_read_for_a_dash_or_nothing() -> None:
    address = ("2001:db8::1", 53, 0, 0)
    spaced = ppv2.encode(address, address).hex(" ") + "\n"
    for arguments in (["decode"], ["decode", "-"]):
        result = run(*arguments, stdin=spaced)
        assert result.returncode == 0
        assert "client       [2001:db8::1]:53\n" in result.stdout
    colons = "0x" + ppv2.encode_local().hex(":")
    assert run("decode", colons).stdout.startswith("command      local\ntransport    none\n")


def test_long_headers_are_told_too() -> None:
    datagram = ppv2.encode(CLIENT, LISTENER, tlvs=[(4, bytes(2000))])
    assert run("decode", stdin=datagram.hex()).returncode == 0


def test_an_invalid_header_is_exit_code_1() -> None:
    result = run("decode", "0d0a0d0b")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == ("invalid header: byte 3: expected 0x0a of the signature, found 0x0b\n")


def test_misuse_is_exit_code_2() -> None:
    for arguments, message in (
        ([], "required: COMMAND"),
        (["explain"], "invalid choice: 'explain'"),
        (["decode", "0g"], "expected hex digits, got 'g'"),
        (["decode", "0d0"], "expected two hex digits for each byte, got 3 in all"),
        (["decode", "0d", "0a"], "unrecognized arguments: 0a"),
        (["whoami"], "required: --listen, --trusted"),
        (["whoami", "--listen", "9000", "--trusted", "::1"], "--listen: expected an address such"),
        (["whoami", "--listen", "::1:9000", "--trusted", "::1"], "got '::1:9000'"),
        (["whoami", "--listen", "0.0.0.0:65536", "--trusted", "::1"], "got '0.0.0.0:65536'"),
        (["whoami", "--listen", "127.0.0.1:0", "--trusted", "all"], '--trusted: trusted network "'),
        (["whoami", "--listen", "224.0.0.1:0", "--trusted", "::1"], "is no host's address"),
        ([*WHOAMI, "--format", "v1"], "argument --format: invalid choice: 'v1'"),
        ([*WHOAMI, "--remember", "0"], "--remember: remember_senders: expected None or a number"),
        (
            [*WHOAMI, "--format", "spp", "--remember", "9"],
            "--remember: remember_senders and format",
        ),
        (
            ["whoami", "--listen", "[::ffff:224.0.0.1]:0", "--trusted", "::1"],
            "is no host's address",
        ),
        (["whoami", "--listen", "[ff02::1]:0", "--trusted", "::1"], "is no host's address"),
        (["whoami", "--listen", "255.255.255.255:0", "--trusted", "::1"], "is no host's address"),
    ):
        result = run(*arguments)
        assert result.returncode == 2
        assert result.stdout == ""
        assert message in result.stderr


def test_a_datagram_that_is_not_in_hex_is_misuse() -> None:
    command = [sys.executable, "-I", "-m", "ppv2", "decode"]
    datagram = ppv2.encode(("255.254.253.252", 65535), LISTENER)
    result = subprocess.run(command, input=datagram, capture_output=True, timeout=60, check=False)
    assert result.returncode == 2
    assert b"expected hex digits, got" in result.stderr
    assert b"Traceback" not in result.stderr


def test_no_more_than_a_datagram_is_read() -> None:
    # A reader without bound would take all memory.
    command = ["prlimit", "--as=2000000000", sys.executable, "-I", "-m", "ppv2", "decode"]
    with open("/dev/zero", "rb") as endless:
        result = subprocess.run(
            command, stdin=endless, capture_output=True, text=True, timeout=60, check=False
        )
    assert result.returncode == 2
    assert "standard input has more than 1048576 bytes" in result.stderr


def test_help_and_version_say_what_there_is() -> None:
    assert run("--version").stdout == f"ppv2 {ppv2.__version__}\n"
    assert "decode" in run("--help").stdout


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_whoami_tells_clients_who_they_are(ending: signal.Signals) -> None:
    command = [sys.executable, "-I", "-W", "error", "-m", "ppv2", "whoami"]
    command += ["--listen", "127.0.0.1:0", "--trusted", "::1", "--trusted", "127.0.0.1"]
    with (
        running(command) as server,
        Proxy() as proxy,
    ):
        assert server.stderr is not None
        ready = server.stderr.readline()
        assert ready.startswith("ready on 127.0.0.1:")
        name = ("127.0.0.1", int(ready.rpartition(":")[2]))
        for _, datagram in hostile().values():
            proxy.send_raw(name, datagram)
        proxy.send(name, b"who am I?")
        assert proxy.receive() == b"203.0.113.11:54321"
        proxy.send(name, b"", client=CLIENT_V6)
        assert proxy.receive() == b"[2001:db8::11]:54321"
        server.send_signal(ending)
        assert server.wait(60) == 0
        # Two datagrams of hostile() may have one reason.
        warned = server.stderr.read().splitlines()
        for reason in {reason for reason, _ in hostile().values()}:
            assert sum(f"({reason})" in line for line in warned) == 1


def test_whoami_answers_from_the_listener_on_request() -> None:
    command = [sys.executable, "-I", "-W", "error", "-m", "ppv2", "whoami"]
    command += ["--listen", "127.0.0.1:0", "--trusted", "127.0.0.1", "--reply-from", "listener"]
    with (
        running(command) as server,
        Proxy() as proxy,
        udp("127.0.1.1") as client,
    ):
        assert server.stderr is not None
        name = ("127.0.0.1", int(server.stderr.readline().rpartition(":")[2]))
        listener = ("127.0.2.4", 9200)
        proxy.send(name, b"who am I?", client=client.getsockname(), listener=listener)
        answer = "{}:{}".format(*client.getsockname()).encode()
        assert client.recvfrom(64) == (answer, listener)
        server.terminate()
        assert server.wait(60) == 0


def test_whoami_reads_other_formats_and_remembers_on_request() -> None:
    simple = b"\x56\xec" + (bytes(10) + b"\xff\xff\xcb\0\x71\x0b") * 2 + b"\0\x07\0\x08"
    named = ppv2.encode(CLIENT, LISTENER)
    for options, datagrams in (
        (["--format", "spp"], [(simple, simple + b"203.0.113.11:7")]),
        (
            ["--format", "spp", "--format", "v2"],
            [(simple, simple + b"203.0.113.11:7"), (named, b"203.0.113.11:54321")],
        ),
        (
            ["--remember", "60.5"],
            [(named + b"who am I?", b"203.0.113.11:54321"), (b"again", b"203.0.113.11:54321")],
        ),
    ):
        command = [sys.executable, "-I", "-W", "error", "-m", "ppv2", *WHOAMI, *options]
        with running(command) as server, Proxy() as proxy:
            assert server.stderr is not None
            name = ("127.0.0.1", int(server.stderr.readline().rpartition(":")[2]))
            for datagram, answer in datagrams:
                proxy.send_raw(name, datagram)
                assert proxy.receive() == answer
            server.terminate()
            assert server.wait(60) == 0


def test_an_address_that_is_taken_is_exit_code_1() -> None:
    with udp() as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        result = run("whoami", "--listen", listen, "--trusted", "127.0.0.1")
    assert result.returncode == 1
    assert result.stderr == f"--listen {listen} can't be bound: Address already in use\n"
