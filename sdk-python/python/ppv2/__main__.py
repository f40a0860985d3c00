"""`python -m ppv2`: says what a header says."""

import argparse
import sys
from collections.abc import Iterator

import ppv2

# Whatever a sender made is worth an explanation: no header is longer.
_LONGEST = 65551

_GETTERS = (
    "alpn",
    "authority",
    "crc32c",
    "unique_id",
    "netns",
    "aws_vpc_endpoint_id",
    "azure_private_endpoint_link_id",
    "gcp_psc_connection_id",
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

    Returns 0, or 1 for an invalid header; exits with 2 for wrong usage.
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
    options = parser.parse_args(arguments)
    text: str = options.hex
    if text == "-":
        # Whoever pipes in the datagram itself is told that hex is expected.
        text = sys.stdin.buffer.read().decode(errors="replace")
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
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


if __name__ == "__main__":
    sys.exit(main())
