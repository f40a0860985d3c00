"""What hypothesis draws: addresses, TLVs, and datagrams that are nearly valid."""

import ipaddress

from hypothesis import strategies as st

import ppv2

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"

ports = st.integers(0, 65535)
ipv4_hosts = st.ip_addresses(v=4).map(str)
ipv4_addresses = st.tuples(ipv4_hosts, ports)
# The codec writes v4-mapped addresses as IPv4, which has a test of its own.
ipv6_hosts = st.ip_addresses(v=6).map(str).filter(lambda host: not mapped(host))
ipv6_addresses = st.tuples(ipv6_hosts, ports, st.just(0), st.just(0))
unix_paths = st.binary(max_size=108).filter(lambda path: not path.endswith(b"\0"))

tlv_types = st.integers(0, 255).filter(lambda kind: kind != ppv2.TlvType.CRC32C)
tlvs = st.lists(st.builds(ppv2.Tlv, tlv_types, st.binary(max_size=40)), max_size=6)


@st.composite
def hostile_datagrams(draw: st.DrawFn) -> bytes:
    """Anything at all, or a header of which some part is wrong."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=600))
    version_command = draw(st.sampled_from([0x21, 0x21, 0x21, 0x20, 0x11, 0x22]))
    pair = draw(st.sampled_from([0x12, 0x12, 0x22, 0x11, 0x21, 0x32, 0x00, 0x10, 0x13, 0xFF]))
    block = {1: 12, 2: 36, 3: 216}.get(pair >> 4, 0)
    body = draw(st.binary(min_size=block, max_size=block))
    for kind, value in draw(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=140)))):
        wrong = draw(st.sampled_from([0, 0, 0, 0, 0, 0, 1, -1, 60000]))
        length = max(0, len(value) + wrong)
        body += bytes([kind]) + length.to_bytes(2, "big") + value
    wrong = draw(st.sampled_from([0, 0, 0, 0, 1, -1, -13, 60000]))
    length = min(65535, max(0, len(body) + wrong))
    fixed = SIGNATURE + bytes([version_command, pair]) + length.to_bytes(2, "big")
    return fixed + body + draw(st.binary(max_size=20))


def mapped(host: str) -> bool:
    return ipaddress.IPv6Address(host).ipv4_mapped is not None


def same_host(left: str, right: str) -> bool:
    return ipaddress.ip_address(left) == ipaddress.ip_address(right)
