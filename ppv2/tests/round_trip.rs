//! Everything that can be written reads back as what was asked for, and is the
//! very bytes that a second, plain construction of the header yields.

mod common;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use common::{cases, wire};
use ppv2::spp::{self, SPP_HEADER_LEN, SppError, SppHeader};
use ppv2::{Decoder, EncodeError, Encoder, Origin, ReplyTag, Ssl, TlvType, Transport};
use proptest::array::uniform32;
use proptest::collection::vec;
use proptest::prelude::*;

const UNLIMITED: Decoder = Decoder::new().max_header_len(usize::MAX);

#[derive(Clone, Debug)]
enum Start {
    Local,
    Unspecified,
    Ip(Transport, SocketAddr, SocketAddr),
    Unix(Transport, [u8; 108], [u8; 108]),
}

#[derive(Clone, Debug)]
enum Piece {
    Tlv(u8, Vec<u8>),
    Alpn(Vec<u8>),
    Authority(String),
    Noop(usize),
    UniqueId(Vec<u8>),
    Ssl(u8, u32, Vec<(u8, Vec<u8>)>),
    Netns(String),
    Aws(String),
    Azure(u32),
    Gcp(u64),
    ReplyTag(u8, [u8; 8]),
    Crc32c,
}

fn encode<'b>(
    start: &Start,
    pieces: &[Piece],
    buffer: &'b mut [u8],
) -> Result<&'b [u8], EncodeError> {
    let mut encoder = match start {
        Start::Local => Encoder::local(buffer)?,
        Start::Unspecified => Encoder::unspecified(buffer)?,
        Start::Ip(Transport::Datagram, from, to) => Encoder::udp(buffer, *from, *to)?,
        Start::Ip(Transport::Stream, from, to) => Encoder::tcp(buffer, *from, *to)?,
        Start::Unix(transport, source, destination) => {
            Encoder::unix(buffer, *transport, source, destination)?
        }
    };
    for piece in pieces {
        encoder = match piece {
            Piece::Tlv(kind, value) => encoder.tlv(TlvType(*kind), value)?,
            Piece::Alpn(protocol) => encoder.alpn(protocol)?,
            Piece::Authority(host) => encoder.authority(host)?,
            Piece::Noop(len) => encoder.noop(*len)?,
            Piece::UniqueId(id) => encoder.unique_id(id)?,
            Piece::Ssl(client, verify, tlvs) => {
                let tlvs: Vec<_> = tlvs.iter().map(|(k, v)| (TlvType(*k), &v[..])).collect();
                encoder.ssl(*client, *verify, &tlvs)?
            }
            Piece::Netns(name) => encoder.netns(name)?,
            Piece::Aws(id) => encoder.aws_vpc_endpoint_id(id)?,
            Piece::Azure(id) => encoder.azure_private_endpoint_link_id(*id)?,
            Piece::Gcp(id) => encoder.gcp_psc_connection_id(*id)?,
            Piece::ReplyTag(flags, tag) => encoder.reply_tag(ReplyTag::new(*flags, *tag))?,
            Piece::Crc32c => encoder.crc32c()?,
        };
    }
    Ok(encoder.finish())
}

/// The TLV that a piece must become. A checksum stands there as zeroes.
fn raw(piece: &Piece) -> (u8, Vec<u8>) {
    match piece {
        Piece::Tlv(kind, value) => (*kind, value.clone()),
        Piece::Alpn(value) => (0x01, value.clone()),
        Piece::Authority(host) => (0x02, host.clone().into_bytes()),
        Piece::Crc32c => (0x03, vec![0; 4]),
        Piece::Noop(len) => (0x04, vec![0; *len]),
        Piece::UniqueId(id) => (0x05, id.clone()),
        Piece::Ssl(client, verify, tlvs) => {
            let tlvs = tlvs
                .iter()
                .flat_map(|(kind, value)| wire::tlv(*kind, value));
            let fixed = [&[*client], &verify.to_be_bytes()[..]].concat();
            (0x20, fixed.into_iter().chain(tlvs).collect())
        }
        Piece::Netns(name) => (0x30, name.clone().into_bytes()),
        Piece::Aws(id) => (0xea, [b"\x01", id.as_bytes()].concat()),
        Piece::Azure(id) => (0xee, [&[0x01], &id.to_le_bytes()[..]].concat()),
        Piece::Gcp(id) => (0xe0, id.to_be_bytes().to_vec()),
        Piece::ReplyTag(flags, tag) => (0xeb, [&[1, *flags], &tag[..]].concat()),
    }
}

/// The same header without the encoder: bytes put one after another.
fn by_hand(start: &Start, pieces: &[Piece]) -> Vec<u8> {
    let (version_command, family_transport, mut body) = match start {
        Start::Local => (0x20, 0x00, Vec::new()),
        Start::Unspecified => (0x21, 0x00, Vec::new()),
        Start::Ip(Transport::Datagram, from, to) => ip_by_hand(0x02, *from, *to),
        Start::Ip(Transport::Stream, from, to) => ip_by_hand(0x01, *from, *to),
        Start::Unix(transport, source, destination) => {
            let family_transport = match transport {
                Transport::Stream => 0x31,
                Transport::Datagram => 0x32,
            };
            (0x21, family_transport, [*source, *destination].concat())
        }
    };
    let mut checksum_at = None;
    for piece in pieces {
        if matches!(piece, Piece::Crc32c) {
            checksum_at = Some(16 + body.len() + 3);
        }
        let (kind, value) = raw(piece);
        body.extend(wire::tlv(kind, &value));
    }
    let mut header = wire::header(version_command, family_transport, &body);
    if let Some(at) = checksum_at {
        wire::seal(&mut header, at);
    }
    header
}

fn ip_by_hand(transport: u8, source: SocketAddr, destination: SocketAddr) -> (u8, u8, Vec<u8>) {
    let ports = [
        source.port().to_be_bytes(),
        destination.port().to_be_bytes(),
    ]
    .concat();
    match (plain_v4(source.ip()), plain_v4(destination.ip())) {
        (Some(source), Some(destination)) => {
            let block = [&source.octets()[..], &destination.octets(), &ports].concat();
            (0x21, 0x10 | transport, block)
        }
        _ => {
            let block = [
                &v6_octets(source.ip())[..],
                &v6_octets(destination.ip()),
                &ports,
            ];
            (0x21, 0x20 | transport, block.concat())
        }
    }
}

fn plain_v4(ip: IpAddr) -> Option<Ipv4Addr> {
    match ip {
        IpAddr::V4(v4) => Some(v4),
        IpAddr::V6(v6) => v6.to_ipv4_mapped(),
    }
}

fn v6_octets(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// What the decoder must say of two addresses: neither scope nor flow label,
/// v4-mapped if and only if the other one is IPv6.
fn as_decoded(source: SocketAddr, destination: SocketAddr) -> (SocketAddr, SocketAddr) {
    let v4 = (plain_v4(source.ip()), plain_v4(destination.ip()));
    let bring = |address: SocketAddr| match (v4, plain_v4(address.ip())) {
        ((Some(_), Some(_)), Some(v4)) => SocketAddr::from((v4, address.port())),
        _ => SocketAddr::from((v6_octets(address.ip()), address.port())),
    };
    (bring(source), bring(destination))
}

fn address() -> impl Strategy<Value = SocketAddr> {
    let v4 = any::<[u8; 4]>().prop_map(|octets| IpAddr::from(Ipv4Addr::from(octets)));
    let v6 = any::<[u8; 16]>().prop_map(|octets| IpAddr::from(Ipv6Addr::from(octets)));
    let mapped =
        any::<[u8; 4]>().prop_map(|octets| IpAddr::from(Ipv4Addr::from(octets).to_ipv6_mapped()));
    // Looks like IPv4 but is not v4-mapped: ::a.b.c.d, among them :: and ::1.
    let compatible = (0..4u32).prop_map(|low| IpAddr::from(Ipv6Addr::from(u128::from(low))));
    let ip = prop_oneof![4 => v4, 4 => v6, 3 => mapped, 1 => compatible];
    (ip, any::<u16>(), any::<(u32, u32)>()).prop_map(|(ip, port, (flow, scope))| {
        let mut address = SocketAddr::new(ip, port);
        if let SocketAddr::V6(v6) = &mut address {
            v6.set_flowinfo(flow);
            v6.set_scope_id(scope);
        }
        address
    })
}

fn path() -> impl Strategy<Value = [u8; 108]> {
    (uniform32(any::<u8>()), 0..=32usize).prop_map(|(bytes, len)| {
        let mut path = [0; 108];
        path[..len].copy_from_slice(&bytes[..len]);
        path[107] = bytes[31];
        path
    })
}

fn transport() -> impl Strategy<Value = Transport> {
    prop_oneof![1 => Just(Transport::Stream), 3 => Just(Transport::Datagram)]
}

fn start() -> impl Strategy<Value = Start> {
    prop_oneof![
        1 => Just(Start::Local),
        1 => Just(Start::Unspecified),
        8 => (transport(), address(), address()).prop_map(|(t, from, to)| Start::Ip(t, from, to)),
        1 => (transport(), path(), path()).prop_map(|(t, from, to)| Start::Unix(t, from, to)),
    ]
}

fn value(max: usize) -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![1 => Just(Vec::new()), 3 => vec(any::<u8>(), 0..=max)]
}

fn piece() -> impl Strategy<Value = Piece> {
    // A raw unique id has a limit of its own, and a raw checksum is refused.
    let kind = any::<u8>().prop_filter("has rules", |kind| ![0x03, 0x05].contains(kind));
    let nested = vec((any::<u8>(), value(20)), 0..4);
    prop_oneof![
        (kind, value(300)).prop_map(|(kind, value)| Piece::Tlv(kind, value)),
        value(20).prop_map(Piece::Alpn),
        ".{0,20}".prop_map(Piece::Authority),
        (0..300usize).prop_map(Piece::Noop),
        value(128).prop_map(Piece::UniqueId),
        (any::<u8>(), any::<u32>(), nested).prop_map(|(c, v, tlvs)| Piece::Ssl(c, v, tlvs)),
        ".{0,20}".prop_map(Piece::Netns),
        "[ -~]{0,20}".prop_map(Piece::Aws),
        any::<u32>().prop_map(Piece::Azure),
        any::<u64>().prop_map(Piece::Gcp),
        any::<(u8, [u8; 8])>().prop_map(|(flags, tag)| Piece::ReplyTag(flags, tag)),
    ]
}

/// Pieces in any order, with at most one checksum in any place.
fn pieces() -> impl Strategy<Value = Vec<Piece>> {
    (vec(piece(), 0..6), prop::option::of(0..6usize)).prop_map(|(mut pieces, checksum)| {
        if let Some(place) = checksum {
            pieces.insert(place.min(pieces.len()), Piece::Crc32c);
        }
        pieces
    })
}

fn check_origin(start: &Start, origin: Origin<'_>) {
    let expected = match start {
        Start::Local => Origin::Local,
        Start::Unspecified => Origin::Unspecified,
        Start::Ip(transport, source, destination) => {
            let (source, destination) = as_decoded(*source, *destination);
            Origin::Ip {
                transport: *transport,
                source,
                destination,
            }
        }
        Start::Unix(transport, source, destination) => Origin::Unix {
            transport: *transport,
            source,
            destination,
        },
    };
    assert_eq!(origin, expected);
}

/// What the typed getter of the first TLV of a type must return.
fn check_getter(piece: &Piece, tlvs: ppv2::Tlvs<'_>) {
    let ascii = |text: &str| text.is_ascii();
    match piece {
        Piece::Tlv(kind, value) => assert_eq!(tlvs.get(TlvType(*kind)), Some(&value[..])),
        Piece::Alpn(value) => assert_eq!(tlvs.alpn(), Some(&value[..])),
        Piece::Authority(host) => assert_eq!(tlvs.authority(), Some(Ok(&host[..]))),
        Piece::Noop(len) => assert_eq!(tlvs.get(TlvType::NOOP), Some(&vec![0; *len][..])),
        Piece::UniqueId(id) => assert_eq!(tlvs.unique_id(), Some(&id[..])),
        Piece::Netns(name) if ascii(name) => assert_eq!(tlvs.netns(), Some(Ok(&name[..]))),
        Piece::Netns(_) => assert!(tlvs.netns().is_some_and(|name| name.is_err())),
        Piece::Aws(id) => assert_eq!(tlvs.aws_vpc_endpoint_id(), Some(Ok(&id[..]))),
        Piece::Azure(id) => assert_eq!(tlvs.azure_private_endpoint_link_id(), Some(Ok(*id))),
        Piece::Gcp(id) => assert_eq!(tlvs.gcp_psc_connection_id(), Some(Ok(*id))),
        // The only getter that a second TLV of its type silences.
        Piece::ReplyTag(flags, tag) => {
            let found = tlvs.reply_tag();
            assert!(found.is_none_or(|found| found == ReplyTag::new(*flags, *tag)));
        }
        Piece::Crc32c => assert!(tlvs.crc32c().is_some_and(|checksum| checksum.is_ok())),
        Piece::Ssl(client, verify, nested) => {
            let ssl = tlvs.ssl().expect("was written").expect("is well framed");
            assert_eq!((ssl.client(), ssl.verify()), (*client, *verify));
            assert_eq!(ssl.is_tls(), client & Ssl::CLIENT_SSL != 0);
            let found: Vec<_> = ssl
                .tlvs()
                .iter()
                .map(|t| (t.kind.0, t.value.to_vec()))
                .collect();
            assert_eq!(&found, nested);
        }
    }
}

/// An SPP header without the crate: two bytes, two addresses, two ports.
fn spp_by_hand(client: SocketAddr, proxy: SocketAddr) -> Vec<u8> {
    [
        &[0x56, 0xec][..],
        &v6_octets(client.ip()),
        &v6_octets(proxy.ip()),
        &client.port().to_be_bytes(),
        &proxy.port().to_be_bytes(),
    ]
    .concat()
}

/// Each address of an SPP header stands for itself: IPv4 if it can be.
fn as_decoded_by_spp(address: SocketAddr) -> SocketAddr {
    let ip = plain_v4(address.ip()).map_or(address.ip(), IpAddr::V4);
    SocketAddr::new(ip, address.port())
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn what_spp_wrote_is_read(
        client in address(),
        proxy in address(),
        payload in vec(any::<u8>(), 0..100),
    ) {
        let expected = spp_by_hand(client, proxy);
        let mut buffer = [0xa5; SPP_HEADER_LEN + 8];
        prop_assert_eq!(spp::encode(client, proxy, &mut buffer), Ok(&expected[..]));
        prop_assert_eq!(&buffer[SPP_HEADER_LEN..], [0xa5; 8], "written beyond the header");

        let datagram = [&expected[..], &payload].concat();
        let header = SppHeader {
            client: as_decoded_by_spp(client),
            proxy: as_decoded_by_spp(proxy),
        };
        prop_assert_eq!(spp::decode(&datagram), Ok((header, &payload[..])));
        prop_assert_eq!(header.to_bytes(), &expected[..]);

        for len in 0..SPP_HEADER_LEN {
            prop_assert_eq!(spp::decode(&datagram[..len]), Err(SppError::TooShort { len }));
            let error = EncodeError::BufferTooSmall { needed: SPP_HEADER_LEN, have: len };
            prop_assert_eq!(spp::encode(client, proxy, &mut buffer[..len]), Err(error));
        }
    }

    #[test]
    fn what_was_written_is_read(
        start in start(),
        pieces in pieces(),
        payload in vec(any::<u8>(), 0..100),
    ) {
        let expected = by_hand(&start, &pieces);
        let mut buffer = vec![0xa5; expected.len() + 64];
        let header = encode(&start, &pieces, &mut buffer).unwrap();
        prop_assert_eq!(header, &expected);
        prop_assert_eq!(&buffer[expected.len()..], [0xa5; 64], "written beyond the header");

        let datagram = [&expected[..], &payload].concat();
        let (header, rest) = UNLIMITED.decode(&datagram).unwrap();
        prop_assert_eq!(header.as_bytes(), &expected);
        prop_assert_eq!(rest, payload);
        check_origin(&start, header.origin());

        let tlvs = match start {
            Start::Local | Start::Unspecified => {
                prop_assert!(header.tlvs().is_empty());
                ppv2::Tlvs::parse(header.skipped()).unwrap()
            }
            Start::Ip(..) | Start::Unix(..) => header.tlvs(),
        };
        let found: Vec<_> = tlvs.iter().map(|tlv| (tlv.kind.0, tlv.value.len())).collect();
        let asked: Vec<_> = pieces.iter().map(|p| (raw(p).0, raw(p).1.len())).collect();
        prop_assert_eq!(found, &asked[..]);
        for (index, piece) in pieces.iter().enumerate() {
            if asked.iter().position(|(kind, _)| *kind == asked[index].0) == Some(index) {
                check_getter(piece, tlvs);
            }
        }
    }

    #[test]
    fn the_fast_path_writes_what_the_encoder_writes(from in address(), to in address()) {
        let expected = by_hand(&Start::Ip(Transport::Datagram, from, to), &[]);
        prop_assert_eq!(ppv2::udp_header_len(from, to), expected.len());
        let mut buffer = [0xa5; ppv2::MAX_UDP_HEADER_LEN + 8];
        prop_assert_eq!(ppv2::encode_udp(from, to, &mut buffer), Ok(&expected[..]));
        prop_assert!(buffer[expected.len()..].iter().all(|byte| *byte == 0xa5));

        for have in 0..expected.len() {
            let mut buffer = vec![0xa5; have];
            let needed = expected.len();
            let error = EncodeError::BufferTooSmall { needed, have };
            prop_assert_eq!(ppv2::encode_udp(from, to, &mut buffer), Err(error));
            prop_assert!(buffer.iter().all(|byte| *byte == 0xa5), "part of a header written");
        }
    }
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn a_tagged_reply_reads_back_as_written(
        client in address(),
        destination in address(),
        (flags, tag) in any::<(u8, [u8; 8])>(),
        payload in vec(any::<u8>(), 0..100),
    ) {
        let piece = Piece::ReplyTag(flags, tag);
        let start = Start::Ip(Transport::Datagram, client, destination);
        let expected = by_hand(&start, &[piece]);
        let tag = ReplyTag::new(flags, tag);
        let mut buffer = [0xa5; ppv2::MAX_TAGGED_HEADER_LEN + 8];
        let header = ppv2::encode_udp_tagged(client, destination, tag, &mut buffer);
        prop_assert_eq!(header, Ok(&expected[..]));
        prop_assert!(buffer[expected.len()..].iter().all(|byte| *byte == 0xa5));

        let datagram = [&expected[..], &payload].concat();
        let reply = ppv2::decode_tagged(&datagram).unwrap();
        prop_assert_eq!((reply.client, reply.destination), as_decoded(client, destination));
        prop_assert_eq!((reply.tag, reply.payload), (tag, &payload[..]));

        // A proxy may keep to whatever limit leaves room for these headers.
        for max in [expected.len() - 1, expected.len()] {
            let decoded = Decoder::new().max_header_len(max).decode(&datagram);
            prop_assert_eq!(decoded.is_ok(), max == expected.len());
        }
    }
}

proptest! {
    #![proptest_config(cases(100))]

    #[test]
    fn every_shorter_buffer_is_refused(start in start(), pieces in pieces()) {
        let needed_in_all = by_hand(&start, &pieces).len();
        for len in 0..needed_in_all {
            match encode(&start, &pieces, &mut vec![0; len]) {
                Err(EncodeError::BufferTooSmall { needed, have }) => {
                    prop_assert_eq!(have, len);
                    prop_assert!(needed > len && needed <= needed_in_all);
                }
                other => prop_assert!(false, "{} bytes: {:?}", len, other),
            }
        }
        let mut buffer = vec![0; needed_in_all];
        prop_assert!(encode(&start, &pieces, &mut buffer).is_ok());
    }
}

#[test]
fn nothing_longer_than_the_length_field_can_say_is_written() {
    let mut buffer = vec![0; 200_000];
    let whole = encode(&Start::Local, &[Piece::Noop(65_532)], &mut buffer).unwrap();
    assert_eq!(whole.len(), 16 + 65_535);
    assert!(UNLIMITED.decode(whole).is_ok());

    let v4 = Start::Ip(
        Transport::Datagram,
        "192.0.2.1:1".parse().unwrap(),
        "192.0.2.2:2".parse().unwrap(),
    );
    let long = vec![7; 65_000];
    for (start, pieces, len) in [
        (&Start::Local, vec![Piece::Noop(65_533)], 65_536),
        (&v4, vec![Piece::Noop(65_521)], 65_536),
        (&v4, vec![Piece::Noop(65_520), Piece::Crc32c], 65_542),
        (&v4, vec![Piece::Tlv(0xe1, vec![0; 100_000])], 100_015),
        (
            &v4,
            vec![Piece::Ssl(0, 0, vec![(0x21, long.clone()), (0x22, long)])],
            130_026,
        ),
    ] {
        let error = encode(start, &pieces, &mut buffer).unwrap_err();
        assert_eq!(error, EncodeError::TooLong { len });
    }
    let endless = Encoder::local(&mut buffer).unwrap().noop(usize::MAX);
    assert!(matches!(endless, Err(EncodeError::TooLong { .. })));
}

#[test]
fn what_no_receiver_would_take_is_not_written() {
    let refused = |pieces: &[Piece]| encode(&Start::Local, pieces, &mut [0; 512]).unwrap_err();
    let raw_checksum = Piece::Tlv(0x03, vec![0; 4]);
    assert_eq!(refused(&[raw_checksum]), EncodeError::Checksum);
    let twice = [Piece::Crc32c, Piece::Noop(1), Piece::Crc32c];
    assert_eq!(refused(&twice), EncodeError::Checksum);
    for too_long in [
        Piece::UniqueId(vec![0; 129]),
        Piece::Tlv(0x05, vec![0; 129]),
    ] {
        let error = EncodeError::UniqueIdTooLong { len: 129 };
        assert_eq!(refused(&[too_long]), error);
    }
}
