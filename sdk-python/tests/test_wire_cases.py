"""The table of datagrams that the Rust codec is tested against, read from Python."""

import json
from pathlib import Path
from typing import Any

import pytest

import ppv2

TABLE = Path(__file__).parents[2] / "ppv2" / "tests" / "wire-cases.json"
CASES: list[dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))["cases"]

SSL_TEXTS = (
    "version",
    "common_name",
    "cipher",
    "signature_algorithm",
    "key_algorithm",
    "group",
    "signature_scheme",
    "client_certificate",
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["name"]))
def test_a_datagram_is_what_the_table_says(case: dict[str, Any]) -> None:
    datagram = bytes.fromhex(case["datagram"])
    limit = case.get("limit", 512)
    if "error" in case:
        with pytest.raises(ppv2.DecodeError) as caught:
            ppv2.decode(datagram, max_header_len=limit)
        found = {"offset": caught.value.offset, "message": str(caught.value)}
        assert found == case["error"]
        return

    header, payload = ppv2.decode(datagram, max_header_len=limit)

    typed = case.get("typed", {})
    found = {
        "command": header.command.upper(),
        "origin": origin(header),
        "source": address(header.source),
        "destination": address(header.destination),
        "client": address(header.client),
        "tlvs": [[f"{tlv.type:02x}", tlv.value.hex()] for tlv in header.tlvs],
        "skipped": header.skipped.hex(),
        "payload": payload.hex(),
        "typed": {getter: read(header, getter) for getter in typed},
    }
    expected = {key: case[key] for key in found if key != "typed"} | {"typed": typed}
    assert found == expected
    assert bytes(header) + payload == datagram
    assert header.length == len(bytes(header))


def test_the_table_has_both_kinds() -> None:
    refused = sum("error" in case for case in CASES)
    assert 0 < refused < len(CASES)


def origin(header: ppv2.Header) -> str:
    if header.command is ppv2.Command.LOCAL:
        return "local"
    return header.transport or "unspec"


def address(address: ppv2.Address | bytes | None) -> str | None:
    match address:
        case None:
            return None
        case bytes():
            return address.decode()
        case (host, port):
            return f"{host}:{port}"
        case (host, port, 0, 0):
            return f"[{host}]:{port}"
        case _:
            pytest.fail(f"no address: {address!r}")


def read(of: ppv2.Header | ppv2.Ssl, getter: str) -> Any:
    """What a getter returns, in the words of the table."""
    try:
        value = getattr(of, getter)
    except ppv2.TlvError as error:
        return {"error": str(error)}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, ppv2.Ssl):
        texts = {name: read(value, name) for name in SSL_TEXTS}
        present = {name: text for name, text in texts.items() if text is not None}
        return {"client": value.client, "verify": value.verify} | present
    return value
