"""`python -m ppv2`: says what a header says, and tells clients who they are."""

import argparse
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Iterator

import ppv2

# Whatever a sender made is worth an explanation: no header is longer.
_LONGEST = 65551

# The longest header's digits take 131,102 bytes; the rest is for what stands between them.
_MAX_TEXT = 1 << 20

_GETTERS = (
    "alpn",
    "authority",
    "crc32c",
    "unique_id",
    "netns",
    "aws_vpc_endpoint_id",
    "azure_private_endpoint_link_id",
    "gcp_psc_connection_id",
    "reply_tag",
)

_SSL_GETTERS = (
    "client",
    "verify",
    "version",
    "common_name",
    "cipher",
    "signature_algorithm",
    "key_algorithm",
    "group",
    "signature_scheme",
    "client_certificate",
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Returns 0, or 1 for an invalid header or an address that can't be bound; exits
    with 2 for wrong usage.
    """
    parser = argparse.ArgumentParser(
        prog="python -m ppv2", description="PROXY protocol v2 for datagrams."
    )
    parser.add_argument("--version", action="version", version=f"ppv2 {ppv2.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    decode = commands.add_parser(
        "decode",
        help="say what the header of a datagram says",
        description="Says what the header of a datagram says. Exit code 1: it is not valid.",
    )
    decode.add_argument(
        "hex",
        nargs="?",
        default="-",
        metavar="HEX",
        help="the datagram as hex digits, white space and colons allowed; - reads standard input",
    )
    whoami = commands.add_parser(
        "whoami",
        help="answer each client with its own address and port",
        description="A server behind a proxy that answers each client with its own address and "
        "port, until SIGINT or SIGTERM. Exit code 1: the address can't be bound.",
    )
    whoami.add_argument(
        "--listen",
        required=True,
        metavar="ADDR",
        help="the address to bind to, such as 0.0.0.0:9000 or [::]:9000",
    )
    whoami.add_argument(
        "--trusted",
        required=True,
        action="append",
        metavar="NET",
        help="a network of proxies, whose datagrams must carry a header; may be repeated",
    )
    whoami.add_argument(
        "--reply-from",
        choices=("proxy", "listener"),
        default="proxy",
        help="answer through the proxy, or straight from the listener's address",
    )
    whoami.add_argument(
        "--format",
        action="append",
        choices=("v2", "spp"),
        help="how the proxies write their header: v2 (the default) or spp, Simple Proxy Protocol; "
        "may be repeated",
    )
    whoami.add_argument(
        "--remember",
        type=float,
        metavar="SECONDS",
        help="take datagrams without header for those of the client that the sender's latest "
        "header named, for this long after its latest datagram",
    )
    options = parser.parse_args(arguments)
    if options.command == "whoami":
        return _whoami(whoami, options)
    return _decode(decode, options.hex)


def _decode(decode: argparse.ArgumentParser, text: str) -> int:
    if text == "-":
        # A datagram that is piped in as it is gets an error that asks for hex.
        data = sys.stdin.buffer.read(_MAX_TEXT + 1)
        if len(data) > _MAX_TEXT:
            decode.error(
                f"standard input has more than {_MAX_TEXT} bytes, which no datagram takes; "
                "give one datagram as hex digits"
            )
        text = data.decode(errors="replace")
    try:
        datagram = _bytes_of_hex(text)
    except ValueError as error:
        decode.error(str(error))
    try:
        header, payload = ppv2.decode(datagram, max_header_len=_LONGEST)
    except ppv2.DecodeError as error:
        print(f"invalid header: {error}", file=sys.stderr)
        return 1
    for name, value in _facts(header, payload):
        print(f"{name:<12} {value}")
    return 0


def _whoami(whoami: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    listen = options.listen
    try:
        family, address = _bindable(listen)
    except ValueError:
        whoami.error(f"--listen: expected an address such as 0.0.0.0:9000, got {listen!r}")
    if _is_no_host(address[0]):
        whoami.error(f"--listen: {listen} is no host's address; give one of this host, or 0.0.0.0")
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind(address)
        except OSError as error:
            print(f"--listen {listen} can't be bound: {error.strerror}", file=sys.stderr)
            return 1
        try:
            wrapped = ppv2.wrap(
                sock,
                trusted=options.trusted,
                formats=options.format or ["v2"],
                reply_from=options.reply_from,
                remember_senders=options.remember,
            )
        except ValueError as error:
            argument = "--remember" if str(error).startswith("remember") else "--trusted"
            whoami.error(f"{argument}: {error}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Why a client gets no answer: the warnings of ppv2 of what it drops.
    logging.basicConfig(format="%(message)s")
    with wrapped:
        print(f"ready on {_address(wrapped.getsockname())}", file=sys.stderr, flush=True)
        try:
            while True:
                _, client = wrapped.recvfrom(0)
                try:
                    wrapped.sendto(_address(client).encode(), client)
                except OSError as error:
                    # One client that can't be answered is no reason to leave the others.
                    print(f"no answer to {_address(client)}: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            return 0


def _bindable(listen: str) -> tuple[socket.AddressFamily, tuple[str, int]]:
    host, _, port = listen.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    ip = ipaddress.ip_address(host[1:-1] if bracketed else host)
    if bracketed != (ip.version == 6) or not 0 <= int(port) <= 65535:
        raise ValueError(listen)
    family = socket.AF_INET6 if ip.version == 6 else socket.AF_INET
    return family, (str(ip), int(port))


def _is_no_host(host: str) -> bool:
    """Whether no answer can come from there: a group's, or a broadcast, address."""
    ip = ipaddress.ip_address(host)
    ip = getattr(ip, "ipv4_mapped", None) or ip
    broadcasts = ("255.255.255.255", "127.255.255.255")
    return not ip.is_unspecified and (
        ip.is_multicast or str(ip) in broadcasts or str(ip).startswith("0.")
    )


def _bytes_of_hex(text: str) -> bytes:
    digits = "".join(text.split()).replace(":", "").removeprefix("0x")
    for digit in digits:
        if digit not in "0123456789abcdefABCDEF":
            raise ValueError(f"expected hex digits, got {digit!r}")
    if len(digits) % 2:
        raise ValueError(f"expected two hex digits for each byte, got {len(digits)} in all")
    return bytes.fromhex(digits)


def _facts(header: ppv2.Header, payload: bytes) -> Iterator[tuple[str, str]]:
    yield "command", header.command
    yield "transport", header.transport or "none"
    yield "source", _address(header.source)
    yield "destination", _address(header.destination)
    yield "client", _address(header.client)
    yield "length", _count(header.length)
    if header.skipped:
        yield "skipped", _count(len(header.skipped))
    for tlv in header.tlvs:
        yield "tlv", f"{_type(tlv.type)}, {_count(len(tlv.value))}: {tlv.value.hex() or '-'}"
    for name in _GETTERS:
        yield from _read(header, name, name)
    try:
        ssl = header.ssl
    except ppv2.TlvError as error:
        yield "ssl", f"malformed: {error}"
    else:
        for name in _SSL_GETTERS if ssl else ():
            yield from _read(ssl, name, f"ssl.{name}")
    yield "payload", _count(len(payload))


def _read(of: object, getter: str, name: str) -> Iterator[tuple[str, str]]:
    try:
        value = getattr(of, getter)
    except ppv2.TlvError as error:
        yield name, f"malformed: {error}"
    else:
        if value is not None:
            # What a sender chose must not reach the terminal as it is.
            yield name, ascii(value)


def _count(number: int) -> str:
    return "1 byte" if number == 1 else f"{number} bytes"


def _type(number: int) -> str:
    try:
        return f"0x{number:02x} {ppv2.TlvType(number).name}"
    except ValueError:
        return f"0x{number:02x}"


def _address(address: ppv2.Address | bytes | None) -> str:
    if address is None:
        return "none"
    if isinstance(address, bytes):
        return ascii(address)
    host, port = address[:2]
    if host.startswith("::ffff:"):
        # An IPv4 client of an IPv6 socket.
        host = str(ipaddress.IPv6Address(host).ipv4_mapped or host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


if __name__ == "__main__":
    sys.exit(main())
