use std::net::SocketAddr;

use etherparse::{IpNumber, Ipv4Header, PacketBuilder, SlicedPacket, UdpHeader};
use ppv2::spp::SppHeader;
use ppv2::{Encoder, ReplyTag, SIGNATURE, Transport};
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::Value;

use super::*;

const PROXY: &str = "192.0.2.1:40000";
const SERVER: &str = "192.0.2.10:53";
const CLIENT: &str = "203.0.113.11:54321";
const LISTENER: &str = "198.51.100.10:9000";

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn header(client: &str, destination: &str) -> Vec<u8> {
    let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
    ppv2::encode_udp(address(client), address(destination), &mut buffer)
        .unwrap()
        .to_vec()
}

fn v2(payload: &[u8]) -> Vec<u8> {
    [&header(CLIENT, LISTENER), payload].concat()
}

fn spp(payload: &[u8]) -> Vec<u8> {
    let [client, proxy] = [CLIENT, LISTENER].map(address);
    [&SppHeader { client, proxy }.to_bytes(), payload].concat()
}

/// An IP packet with a datagram.
fn ip(from: &str, to: &str, payload: &[u8]) -> Vec<u8> {
    let (from, to) = (address(from), address(to));
    let mut packet = Vec::new();
    let builder = match (from, to) {
        (SocketAddr::V4(from), SocketAddr::V4(to)) => {
            PacketBuilder::ipv4(from.ip().octets(), to.ip().octets(), 64)
        }
        (SocketAddr::V6(from), SocketAddr::V6(to)) => {
            PacketBuilder::ipv6(from.ip().octets(), to.ip().octets(), 64)
        }
        _ => panic!("one family"),
    };
    let builder = builder.udp(from.port(), to.port());
    builder.write(&mut packet, payload).unwrap();
    packet
}

/// A pcap file of raw IP packets, or of packets with another link type.
fn pcap_of(link: u32, packets: &[Vec<u8>]) -> Vec<u8> {
    let words = [0xa1b2_c3d4, 0x0004_0002, 0, 0, 262_144, link];
    let mut file: Vec<_> = words
        .iter()
        .flat_map(|word: &u32| word.to_le_bytes())
        .collect();
    for (second, packet) in (0u32..).zip(packets) {
        let len = u32::try_from(packet.len()).unwrap();
        file.extend(
            [second, 250_000, len, len]
                .iter()
                .flat_map(|word| word.to_le_bytes()),
        );
        file.extend(packet);
    }
    file
}

fn pcap(packets: &[Vec<u8>]) -> Vec<u8> {
    pcap_of(101, packets)
}

fn options(more: &[&str]) -> Options {
    #[derive(clap::Parser)]
    struct Arguments {
        #[command(flatten)]
        options: Options,
    }
    let arguments = ["capture", "-"].iter().chain(more);
    <Arguments as clap::Parser>::try_parse_from(arguments)
        .unwrap()
        .options
}

/// What is printed of a file.
fn explained(file: &[u8], more: &[&str]) -> Result<(String, Summary), Unreadable> {
    let mut out = Vec::new();
    match explain(&options(more), file, &mut out) {
        Ok(summary) => Ok((String::from_utf8(out).unwrap(), summary)),
        Err(Stop::Unreadable(error)) => Err(error),
        Err(Stop::Output(error)) => panic!("{error}"),
    }
}

/// The text for packets of one flow, unless they say otherwise.
fn text_of(payloads: &[Vec<u8>]) -> String {
    let packets: Vec<_> = payloads
        .iter()
        .map(|payload| ip(PROXY, SERVER, payload))
        .collect();
    explained(&pcap(&packets), &[]).unwrap().0
}

#[track_caller]
fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "no `{part}` in\n{text}");
    }
}

/// The kinds of mistakes that the summary counts, in the order of their names there.
fn kinds(text: &str) -> Vec<&str> {
    let lines = text
        .lines()
        .filter_map(|line| line.strip_prefix("mistake ("));
    lines.map(|line| line.split_once(')').unwrap().0).collect()
}

#[test]
fn a_flow_without_mistakes_is_explained() {
    let packets = [
        ip(PROXY, SERVER, &v2(b"question")),
        ip(SERVER, PROXY, b"answer"),
        ip(PROXY, SERVER, &v2(b"")),
        ip("192.0.2.77:5", "192.0.2.78:6", b"elsewhere"),
    ];
    let (text, summary) = explained(&pcap(&packets), &[]).unwrap();
    assert_eq!(summary.mistakes(), 0, "{text}");
    has(
        &text,
        &[
            "packet 1, 0.000000 s, 192.0.2.1:40000 to 192.0.2.10:53: PROXY v2, client 203.0.113.11:54321, destination 198.51.100.10:9000; payload of 8 bytes\n",
            "packet 3, 2.000000 s, ",
            "  note: a header alone, without payload\n",
            "4 packets, 4 UDP datagrams: 2 with PROXY v2 (0 of them LOCAL), 0 with SPP, 0 with v1 text, 2 without a header; 1 are replies\n",
        ],
    );
    assert_eq!(text.lines().count(), 4, "{text}");
}

#[test]
fn a_header_that_is_missing_is_found() {
    // Said once, then bare; and a flow whose beginning was bare.
    let text = text_of(&[v2(b"a"), b"b".to_vec(), b"c".to_vec()]);
    assert_eq!(kinds(&text), ["missing"]);
    has(
        &text,
        &[
            "mistake (missing): no header; the flow's first was in packet 1\n",
            "mistake (missing): 2, first in packet 2: ",
            "proxy_requests 1",
        ],
    );
    let text = text_of(&[b"a".to_vec(), b"b".to_vec(), v2(b"c"), v2(b"d")]);
    has(
        &text,
        &[
            "packet 3, ",
            "mistake (missing): 2 datagrams of this flow before had no header",
        ],
    );
    has(&text, &["mistake (missing): 1, first in packet 3"]);
    let text = text_of(&[v2(b""), b"bare".to_vec()]);
    has(
        &text,
        &[
            "note: a header alone",
            "mistake (missing): 1, first in packet 2",
        ],
    );

    // A port that gets headers, and one that does not.
    let file = pcap(&[
        ip(PROXY, SERVER, b"bare"),
        ip(SERVER, PROXY, b"reply"),
        ip(PROXY, "192.0.2.10:54", b"bare"),
    ]);
    assert_eq!(explained(&file, &[]).unwrap().1.mistakes(), 0);
    let (text, summary) = explained(&file, &["--port", "53"]).unwrap();
    assert_eq!((summary.mistakes(), summary.other_ports), (1, 1), "{text}");
    has(
        &text,
        &[
            "no header; --port 53 wants one",
            "1 datagrams of other ports, left out",
        ],
    );
}

#[test]
fn a_header_behind_a_header_is_found() {
    for (inner, name) in [
        (v2(b"x"), "PROXY v2"),
        (spp(b"x"), "SPP"),
        (b"PROXY UNKNOWN\r\nx".to_vec(), "PROXY v1"),
    ] {
        for outer in [v2(&inner), spp(&inner)] {
            let text = text_of(&[outer]);
            assert_eq!(kinds(&text), ["twice"], "{text}");
            has(&text, &[&format!("behind the header is another, {name}\n")]);
        }
    }
}

#[test]
fn a_header_that_is_split_or_wrong_is_found() {
    let text = text_of(&[v2(b"")[..27].to_vec(), SIGNATURE[..9].to_vec()]);
    assert_eq!(kinds(&text), ["split"]);
    has(
        &text,
        &[
            "a PROXY v2 header that is not whole\n",
            "byte 14: a length of 12 needs a datagram of at least 28 bytes, it has 27\n",
            "byte 9: the datagram ends there",
        ],
    );
    let mut wrong = v2(b"x");
    wrong[12] = 0x31;
    let text = text_of(&[wrong]);
    assert_eq!(kinds(&text), ["invalid"]);
    has(&text, &["byte 12: expected version 2, found version 3"]);
}

#[test]
fn a_wrong_family_is_found() {
    let mut buffer = [0; 1024];
    let tcp = Encoder::tcp(&mut buffer, address(CLIENT), address(LISTENER))
        .unwrap()
        .finish();
    has(
        &text_of(&[tcp.to_vec()]),
        &["mistake (family): the transport is TCP"],
    );
    let unix = Encoder::unix(&mut buffer, Transport::Datagram, &[7; 108], &[8; 108]).unwrap();
    has(
        &text_of(&[unix.finish().to_vec()]),
        &["mistake (family): the addresses are UNIX sockets"],
    );
    let nobody = Encoder::unspecified(&mut buffer).unwrap().finish();
    has(
        &text_of(&[nobody.to_vec()]),
        &["mistake (family): the family is unspecified"],
    );
    let mut mapped = [&SIGNATURE[..], &[0x21, 0x22, 0, 36]].concat();
    mapped.extend(&spp(b"")[2..]);
    has(
        &text_of(&[mapped]),
        &["mistake (family): both addresses are IPv4, written as IPv6"],
    );
    // One family each: v4-mapped is right, and so is another family than the packet's.
    let text = text_of(&[
        header(CLIENT, "[2001:db8::10]:53"),
        header("[2001:db8::11]:1", "[2001:db8::10]:53"),
    ]);
    assert!(kinds(&text).is_empty(), "{text}");
    let local = Encoder::local(&mut buffer).unwrap().finish();
    let text = text_of(&[local.to_vec()]);
    assert!(kinds(&text).is_empty(), "{text}");
    has(
        &text,
        &["PROXY v2, LOCAL; payload of 0 bytes", "(1 of them LOCAL)"],
    );
}

#[test]
fn addresses_of_nobody_are_found() {
    for (client, destination, kind, part) in [
        (
            CLIENT,
            "0.0.0.0:53",
            "destination",
            "destination 0.0.0.0:53 is a wildcard",
        ),
        (
            CLIENT,
            "[::]:53",
            "destination",
            "destination [::]:53 is a wildcard",
        ),
        (
            CLIENT,
            "127.0.0.1:53",
            "destination",
            "127.0.0.1:53 is a loopback address",
        ),
        (CLIENT, "198.51.100.10:0", "destination", "has port 0"),
        (
            "0.0.0.0:1",
            LISTENER,
            "client",
            "client 0.0.0.0:1 is a wildcard",
        ),
        ("127.0.0.1:1", LISTENER, "client", "is a loopback address"),
        ("203.0.113.11:0", LISTENER, "client", "has port 0"),
        ("224.0.0.1:1", LISTENER, "client", "is a multicast address"),
    ] {
        let text = text_of(&[header(client, destination)]);
        assert_eq!(kinds(&text), [kind], "{text}");
        has(&text, &[part]);
    }
    // On one host, all of them are loopback addresses.
    let packet = ip(
        "127.0.0.1:1",
        "127.0.0.1:2",
        &header("127.0.0.1:3", "127.0.0.1:4"),
    );
    let (text, summary) = explained(&pcap(&[packet]), &[]).unwrap();
    assert_eq!(summary.mistakes(), 0, "{text}");
}

#[test]
fn text_of_version_1_and_long_headers_are_found() {
    let text = text_of(&[
        b"PROXY TCP4 203.0.113.11 198.51.100.10 54321 9000\r\nhi\x1b[2J".to_vec(),
        b"bare".to_vec(),
    ]);
    assert_eq!(kinds(&text), ["v1"]);
    has(
        &text,
        &[
            "PROXY v1 text `PROXY TCP4 203.0.113.11 198.51.100.10 54321 9000`; payload of 6 bytes",
            "`proxy_protocol v2;`",
        ],
    );
    let mut buffer = [0; 1024];
    let long = Encoder::udp(&mut buffer, address(CLIENT), address(LISTENER)).unwrap();
    let long = long.noop(482).unwrap().finish();
    has(
        &text_of(&[long.to_vec()]),
        &["mistake (too long): 513 bytes of header, more than 512"],
    );
}

#[test]
fn replies_are_judged_by_what_asked_for_them() {
    let exchange = |request: &[u8], reply: &[u8]| {
        let file = pcap(&[
            ip(PROXY, SERVER, request),
            ip(SERVER, PROXY, reply),
            ip(PROXY, SERVER, request),
        ]);
        explained(&file, &[]).unwrap().0
    };
    let tag = ReplyTag::new(0, *b"8 bytes.");
    let mut buffer = [0; ppv2::MAX_TAGGED_HEADER_LEN];
    let tagged =
        ppv2::encode_udp_tagged(address(CLIENT), address(LISTENER), tag, &mut buffer).unwrap();
    for (request, reply) in [
        (spp(b"q"), spp(b"a")),
        (tagged.to_vec(), tagged.to_vec()),
        (v2(b"q"), b"a".to_vec()),
    ] {
        let text = exchange(&request, &reply);
        assert!(kinds(&text).is_empty(), "{text}");
    }
    has(
        &exchange(tagged, tagged),
        &[
            "53 to 192.0.2.1:40000: reply, PROXY v2",
            "note: returns a reply tag",
        ],
    );
    for (request, reply, part) in [
        (
            spp(b"q"),
            b"a".to_vec(),
            "a reply without the SPP header of the request",
        ),
        (
            spp(b"q"),
            v2(b"a"),
            "a reply with PROXY v2 to a request with SPP",
        ),
        (v2(b"q"), v2(b"a"), "a reply with a header"),
        (
            v2(b"q"),
            spp(b"a"),
            "a reply with SPP to a request with PROXY v2",
        ),
    ] {
        let text = exchange(&request, &reply);
        assert_eq!(kinds(&text), ["reply"], "{text}");
        has(&text, &[&format!("mistake (reply): {part}\n")]);
    }
}

#[test]
fn each_link_type_is_read() {
    let v4 = ip(PROXY, SERVER, &v2(b"x"));
    let v6 = ip("[2001:db8::1]:4", "[2001:db8::10]:53", &v2(b"x"));
    let ethernet = |kind: u16, packet: &[u8]| [&[2; 12], &kind.to_be_bytes()[..], packet].concat();
    let vlan = |packet: &[u8]| [&[2; 12], &[0x81, 0x00, 0, 7, 0x08, 0x00][..], packet].concat();
    let sll = |kind: u16, packet: &[u8]| [&[0; 14], &kind.to_be_bytes()[..], packet].concat();
    let sll2 = |kind: u16, packet: &[u8]| [&kind.to_be_bytes()[..], &[0; 18], packet].concat();
    let family = |bytes: [u8; 4], packet: &[u8]| [&bytes[..], packet].concat();
    for (link, packet) in [
        (1, ethernet(0x0800, &v4)),
        (1, ethernet(0x86dd, &v6)),
        (1, vlan(&v4)),
        (
            1,
            ethernet(0x88a8, &[&[0, 7, 0x81, 0, 0, 8, 0x08, 0][..], &v4].concat()),
        ),
        (113, sll(0x0800, &v4)),
        (113, sll(0x86dd, &v6)),
        (276, sll2(0x0800, &v4)),
        (276, sll2(0x86dd, &v6)),
        (0, family([2, 0, 0, 0], &v4)),
        (0, family([0, 0, 0, 30], &v6)),
        (108, family([0, 0, 0, 2], &v4)),
        (101, v4.clone()),
        (12, v6.clone()),
        (228, v4.clone()),
        (229, v6.clone()),
    ] {
        let (text, summary) = explained(&pcap_of(link, &[packet]), &[]).unwrap();
        assert_eq!(summary.mistakes(), 0, "{link}: {text}");
        has(&text, &["PROXY v2, client 203.0.113.11:54321"]);
    }
    let error = explained(&pcap_of(127, &[v4]), &[]).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("link type 127 is not known here; ")
    );
}

#[test]
fn both_byte_orders_and_resolutions_and_pcapng_are_read() {
    let packet = ip(PROXY, SERVER, &v2(b"x"));
    let len = u32::try_from(packet.len()).unwrap();
    let big: Vec<_> = [
        0xa1b2_c3d4_u32,
        0x0002_0004,
        0,
        0,
        65_535,
        101,
        5,
        0,
        len,
        len,
    ]
    .iter()
    .flat_map(|word| word.to_be_bytes())
    .chain(packet.iter().copied())
    .collect();
    let mut nanoseconds = pcap(&[packet.clone(), packet.clone()]);
    nanoseconds[0] = 0x4d;
    nanoseconds[1] = 0x3c;
    let words = |words: &[u32]| {
        words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect::<Vec<_>>()
    };
    let padded = [&packet[..], &vec![0; (4 - packet.len() % 4) % 4]].concat();
    let padded_len = u32::try_from(padded.len()).unwrap();
    let enhanced = |interface, time| {
        let block = 32 + padded_len;
        let fields = words(&[6, block, interface, 0, time, len, len]);
        [&fields[..], &padded, &words(&[block])].concat()
    };
    let ng = [
        words(&[0x0a0d_0d0a, 28, 0x1a2b_3c4d, 1, u32::MAX, u32::MAX, 28]),
        words(&[1, 20, 101, 0, 20]),
        // A block of a kind that nobody knows.
        words(&[0x99, 12, 12]),
        enhanced(0, 1_000_000),
        enhanced(0, 1_500_000),
        words(&[3, 16 + padded_len, len]),
        padded.clone(),
        words(&[16 + padded_len]),
        enhanced(1, 0),
    ]
    .concat();
    for (file, packets, unknown) in [(&big, 1, 0), (&nanoseconds, 2, 0), (&ng, 4, 1)] {
        let (text, summary) = explained(file, &[]).unwrap();
        assert_eq!(
            (summary.packets, summary.unknown_link),
            (packets, unknown),
            "{text}"
        );
        let headers = text.matches("PROXY v2, client ").count() as u64;
        assert_eq!(headers, packets - unknown, "{text}");
    }
    has(&explained(&ng, &[]).unwrap().0, &["packet 2, 0.500000 s, "]);
    has(
        &explained(&nanoseconds, &[]).unwrap().0,
        &["packet 2, 1.000000 s, "],
    );
}

#[test]
fn fragments_are_called_fragments() {
    let payload = v2(&[7; 1000]);
    let whole = ip(PROXY, SERVER, &payload);
    let datagram = &whole[20..];
    let fragment = |offset: usize, bytes: &[u8], more: bool| {
        let length = u16::try_from(bytes.len()).unwrap();
        let mut header =
            Ipv4Header::new(length, 64, IpNumber::UDP, [192, 0, 2, 1], [192, 0, 2, 10]).unwrap();
        header.fragment_offset = (u16::try_from(offset / 8).unwrap()).try_into().unwrap();
        header.more_fragments = more;
        let mut packet = Vec::new();
        header.write(&mut packet).unwrap();
        packet.extend(bytes);
        packet
    };
    let file = pcap(&[
        fragment(0, &datagram[..504], true),
        fragment(504, &datagram[504..], false),
    ]);
    let (text, summary) = explained(&file, &[]).unwrap();
    assert_eq!(summary.mistakes(), 0, "{text}");
    has(
        &text,
        &[
            "PROXY v2, client 203.0.113.11:54321",
            "note: the first of several IP fragments",
            "packet 2, 1.000000 s, 192.0.2.1 to 192.0.2.10: a later IP fragment of a datagram",
            "1 later IP fragments",
        ],
    );
    // The header itself over two fragments.
    let file = pcap(&[
        fragment(0, &datagram[..24], true),
        fragment(24, &datagram[24..], false),
    ]);
    has(
        &explained(&file, &[]).unwrap().0,
        &["note: the header goes on in another fragment"],
    );

    // IPv6, with the fragment header of RFC 8200.
    let v6 = ip("[2001:db8::1]:4", "[2001:db8::10]:53", &payload);
    let fragment6 = |offset: u16, bytes: &[u8], more: bool| {
        let mut packet = v6[..40].to_vec();
        packet[6] = 44;
        packet[4..6].copy_from_slice(&u16::try_from(bytes.len() + 8).unwrap().to_be_bytes());
        packet.extend([17, 0]);
        packet.extend((offset | u16::from(more)).to_be_bytes());
        packet.extend([0, 0, 0, 9]);
        packet.extend(bytes);
        packet
    };
    let file = pcap(&[
        fragment6(0, &v6[40..544], true),
        fragment6(504, &v6[544..], false),
    ]);
    let (text, _) = explained(&file, &[]).unwrap();
    has(
        &text,
        &[
            "note: the first of several IP fragments",
            "2001:db8::1 to 2001:db8::10: a later IP fragment",
        ],
    );
}

#[test]
fn what_the_capture_cut_off_is_no_mistake() {
    let mut packet = ip(PROXY, SERVER, &v2(b"hello"));
    packet.truncate(20 + 8 + 20);
    let (text, summary) = explained(&pcap(&[packet]), &[]).unwrap();
    assert_eq!(summary.mistakes(), 0, "{text}");
    has(
        &text,
        &["note: the capture has only the beginning; use `tcpdump -s 0`"],
    );
}

#[test]
fn a_burst_in_one_packet_is_taken_apart() {
    let burst = [v2(b"aaaa"), v2(b"bbbb"), v2(b"c")].concat();
    let (text, summary) = explained(&pcap(&[ip(PROXY, SERVER, &burst)]), &[]).unwrap();
    assert_eq!(summary.mistakes(), 0, "{text}");
    has(
        &text,
        &[
            "packet 1 (1 of 3), ",
            "packet 1 (3 of 3), 0.000000 s, 192.0.2.1:40000 to 192.0.2.10:53: PROXY v2, client 203.0.113.11:54321, destination 198.51.100.10:9000; payload of 1 byte\n",
            "1 packets that hold a burst",
            "1 packet, 3 UDP datagrams: 3 with PROXY v2",
        ],
    );
}

#[test]
fn other_packets_are_counted() {
    let mut tcp = Vec::new();
    PacketBuilder::ipv4([1; 4], [2; 4], 9)
        .tcp(1, 2, 3, 4)
        .write(&mut tcp, &v2(b""))
        .unwrap();
    let file = pcap(&[tcp, vec![0x45; 3], vec![]]);
    let (text, summary) = explained(&file, &[]).unwrap();
    assert_eq!((summary.not_udp, summary.malformed), (1, 2), "{text}");
    let (text, _) = explained(&pcap(&[ip(PROXY, SERVER, b"x")]), &[]).unwrap();
    has(&text, &["no datagram has a header\n"]);
}

#[test]
fn json_has_an_object_a_line() {
    let mut buffer = [0; 64];
    let with_tlv = Encoder::udp(&mut buffer, address(CLIENT), address(LISTENER)).unwrap();
    let with_tlv = with_tlv.authority("a.test").unwrap().finish().to_vec();
    let file = pcap(&[
        ip(PROXY, SERVER, &with_tlv),
        ip(PROXY, SERVER, b"bare"),
        ip("192.0.2.2:1", SERVER, &spp(b"x")),
        ip("192.0.2.3:1", SERVER, b"PROXY UNKNOWN\r\n"),
        ip("192.0.2.4:1", SERVER, &with_tlv[..20]),
    ]);
    let (text, _) = explained(&file, &["--json"]).unwrap();
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 6, "{text}");
    let header = &lines[0]["header"];
    assert_eq!(header["client"], CLIENT);
    assert_eq!(header["tlvs"][0]["type"], 2);
    assert_eq!(header["tlvs"][0]["value"], "612e74657374");
    assert_eq!(lines[1]["header"], Value::Null);
    assert_eq!(lines[1]["mistakes"][0]["kind"], "missing");
    assert_eq!(lines[2]["header"]["format"], "spp");
    assert_eq!(lines[3]["header"]["text"], "PROXY UNKNOWN");
    assert_eq!(lines[4]["mistakes"][0]["kind"], "split");
    let summary = &lines[5]["summary"];
    assert_eq!(summary["packets"], 5);
    assert_eq!(summary["mistakes"]["missing"]["first_packet"], 2);
}

#[test]
fn only_mistakes_or_each_byte_can_be_asked_for() {
    let file = pcap(&[ip(PROXY, SERVER, &v2(b"a")), ip(PROXY, SERVER, b"bare")]);
    let (text, _) = explained(&file, &["--mistakes"]).unwrap();
    assert!(text.starts_with("packet 2, "), "{text}");
    let (text, _) = explained(&file, &["--bytes"]).unwrap();
    has(
        &text,
        &["      0..12  0d0a0d0a000d0a515549540a", "28..29  61"],
    );
}

#[test]
fn files_that_are_no_captures_or_damaged_are_told_apart() {
    for file in [
        &b""[..],
        b"\xd4\xc3\xb2",
        b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",
        &PCAPNG_CUT,
    ] {
        let error = explained(file, &[]).unwrap_err();
        assert!(matches!(error, Unreadable::NoCapture), "{error}");
    }
    let mut file = pcap(&[ip(PROXY, SERVER, &v2(b"a")), ip(PROXY, SERVER, &v2(b"b"))]);
    let whole = file.len();
    for len in (24..whole).filter(|len| *len != 24 && *len != 24 + (whole - 24) / 2) {
        let (text, summary) = explained(&file[..len], &[]).unwrap();
        has(&text, &["the file ends in the middle of a packet"]);
        assert!(summary.packets <= 1);
    }
    // The second packet is longer than any.
    let at = 24 + (whole - 24) / 2 + 8;
    file[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    let error = explained(&file, &[]).unwrap_err();
    assert!(matches!(error, Unreadable::Damaged(1)), "{error}");
}

/// A section header that ends too soon.
const PCAPNG_CUT: [u8; 14] = *b"\x0a\x0d\x0d\x0a\x1c\0\0\0\x4d\x3c\x2b\x1a\x01\0";

/// Packets of all kinds, with bytes that differ.
fn packets() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let payload = prop_oneof![
        3 => vec(any::<u8>(), 0..60),
        2 => vec(any::<u8>(), 0..60).prop_map(|rest| v2(&rest)),
        1 => vec(any::<u8>(), 0..60).prop_map(|rest| spp(&rest)),
        1 => vec(any::<u8>(), 0..60).prop_map(|rest| [&SIGNATURE[..], &rest].concat()),
        1 => "PROXY (TCP4|UNKNOWN|UDP6) .{0,20}".prop_map(String::into_bytes),
    ];
    let packet = (
        payload,
        any::<bool>(),
        vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
    );
    let packet = packet.prop_map(|(payload, back, changes)| {
        let (from, to) = if back {
            (SERVER, PROXY)
        } else {
            (PROXY, SERVER)
        };
        let mut packet = ip(from, to, &payload);
        for (at, byte) in changes {
            let at = at.index(packet.len());
            packet[at] = byte;
        }
        packet
    });
    vec(packet, 0..6)
}

/// A file with every kind of block, of `packets`.
fn pcapng(packets: &[Vec<u8>]) -> Vec<u8> {
    let words = |words: &[u32]| {
        words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect::<Vec<_>>()
    };
    let mut file = words(&[
        0x0a0d_0d0a,
        28,
        0x1a2b_3c4d,
        1,
        u32::MAX,
        u32::MAX,
        28,
        1,
        20,
        101,
        0,
        20,
    ]);
    for packet in packets {
        let len = u32::try_from(packet.len()).unwrap();
        let padding = vec![0; (4 - packet.len() % 4) % 4];
        let block = 32 + len + u32::try_from(padding.len()).unwrap();
        file.extend(words(&[6, block, 0, 0, 7, len, len]));
        file.extend(packet);
        file.extend(padding);
        file.extend(words(&[block]));
    }
    file
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    /// Hostile files end with a summary or with an error.
    #[test]
    fn any_file_is_read_to_an_end(
        packets in packets(),
        link in prop_oneof![Just(101u32), Just(1), Just(113), Just(276), Just(0), any::<u32>()],
        is_ng in any::<bool>(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in prop::option::weighted(0.3, any::<prop::sample::Index>()),
    ) {
        let mut file = if is_ng { pcapng(&packets) } else { pcap_of(link, &packets) };
        for (at, byte) in changes {
            let at = at.index(file.len());
            file[at] = byte;
        }
        if let Some(cut) = cut {
            file.truncate(cut.index(file.len()));
        }
        for more in [&[][..], &["--json"], &["--bytes", "--port", "53"]] {
            if let Ok((text, _)) = explained(&file, more) {
                prop_assert!(!text.contains('\u{1b}'), "{text:?}");
            }
        }
    }

    #[test]
    fn any_bytes_are_read_to_an_end(
        magic in prop_oneof![
            Just(b"\xd4\xc3\xb2\xa1".to_vec()),
            Just(b"\xa1\xb2\xc3\xd4".to_vec()),
            Just(b"\x0a\x0d\x0d\x0a\x1c\0\0\0\x4d\x3c\x2b\x1a".to_vec()),
            Just(Vec::new()),
        ],
        bytes in vec(prop_oneof![Just(0u8), any::<u8>()], 0..300),
    ) {
        let _ = explained(&[magic, bytes].concat(), &[]);
    }

    #[test]
    fn any_packet_is_read(
        link in prop_oneof![Just(1), Just(113), Just(276), Just(0), Just(108), Just(101)],
        bytes in vec(any::<u8>(), 0..120),
    ) {
        let _ = Packet::read(pcap_parser::Linktype(link), &bytes);
    }
}

#[test]
fn the_packets_of_these_tests_are_valid() {
    let packet = ip(PROXY, SERVER, b"x");
    assert_eq!(packet.len(), 20 + UdpHeader::LEN + 1);
    assert!(SlicedPacket::from_ip(&packet).unwrap().transport.is_some());
}
