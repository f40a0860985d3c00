//! Any header that can be asked for: what is written reads back as asked, fits
//! into a buffer of its own size and into none shorter, and leaves the bytes
//! behind it alone.
#![no_main]

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use ppv2::{Decoder, EncodeError, Encoder, Origin, TlvType, Tlvs, Transport};

#[derive(Arbitrary, Debug)]
struct Description<'a> {
    start: Start,
    /// Before which TLV a checksum stands, if one does.
    checksum: Option<u8>,
    tlvs: Vec<(u8, &'a [u8])>,
    payload: &'a [u8],
}

#[derive(Arbitrary, Debug)]
enum Start {
    Local,
    Unspecified,
    Udp(SocketAddr, SocketAddr),
    Tcp(SocketAddr, SocketAddr),
    Unix {
        stream: bool,
        source: [u8; 108],
        destination: [u8; 108],
    },
}

fn encode<'b>(asked: &Description<'_>, buffer: &'b mut [u8]) -> Result<&'b [u8], EncodeError> {
    let mut encoder = match &asked.start {
        Start::Local => Encoder::local(buffer)?,
        Start::Unspecified => Encoder::unspecified(buffer)?,
        Start::Udp(source, destination) => Encoder::udp(buffer, *source, *destination)?,
        Start::Tcp(source, destination) => Encoder::tcp(buffer, *source, *destination)?,
        Start::Unix {
            stream,
            source,
            destination,
        } => Encoder::unix(buffer, transport(*stream), source, destination)?,
    };
    let checksum = asked
        .checksum
        .map(|place| usize::from(place).min(asked.tlvs.len()));
    for (index, (kind, value)) in asked.tlvs.iter().enumerate() {
        if checksum == Some(index) {
            encoder = encoder.crc32c()?;
        }
        encoder = encoder.tlv(TlvType(*kind), value)?;
    }
    if checksum == Some(asked.tlvs.len()) {
        encoder = encoder.crc32c()?;
    }
    Ok(encoder.finish())
}

fn transport(stream: bool) -> Transport {
    if stream {
        Transport::Stream
    } else {
        Transport::Datagram
    }
}

/// What the decoder must say of two addresses, written without the encoder's
/// own way to bring them to one family.
fn as_decoded(source: SocketAddr, destination: SocketAddr) -> (SocketAddr, SocketAddr) {
    let all_v4 = [source, destination]
        .iter()
        .all(|a| a.ip().to_canonical().is_ipv4());
    let bring = |address: SocketAddr| {
        let ip = match address.ip().to_canonical() {
            IpAddr::V4(v4) if !all_v4 => {
                Ipv6Addr::from_bits(0xffff_0000_0000 | u128::from(v4.to_bits())).into()
            }
            ip => ip,
        };
        SocketAddr::new(ip, address.port())
    };
    (bring(source), bring(destination))
}

fn expected(start: &Start) -> Origin<'_> {
    match start {
        Start::Local => Origin::Local,
        Start::Unspecified => Origin::Unspecified,
        Start::Udp(source, destination) | Start::Tcp(source, destination) => {
            let (source, destination) = as_decoded(*source, *destination);
            Origin::Ip {
                transport: transport(matches!(start, Start::Tcp(..))),
                source,
                destination,
            }
        }
        Start::Unix {
            stream,
            source,
            destination,
        } => Origin::Unix {
            transport: transport(*stream),
            source,
            destination,
        },
    }
}

fuzz_target!(|asked: Description<'_>| {
    let values: usize = asked.tlvs.iter().map(|(_, value)| 3 + value.len()).sum();
    let mut buffer = vec![0xa5; ppv2::UNIX_HEADER_LEN + ppv2::CRC32C_TLV_LEN + values + 64];
    let header = match encode(&asked, &mut buffer) {
        Ok(header) => header.to_vec(),
        Err(EncodeError::Checksum) => {
            return assert!(asked.tlvs.iter().any(|(kind, _)| *kind == 0x03));
        }
        Err(EncodeError::UniqueIdTooLong { len }) => {
            let too_long = |(kind, id): &(u8, &[u8])| *kind == 0x05 && id.len() == len;
            return assert!(len > 128 && asked.tlvs.iter().any(too_long));
        }
        Err(EncodeError::TooLong { len }) => return assert!(len > 65_535),
        Err(other) => panic!("{other}"),
    };
    assert!(buffer[header.len()..].iter().all(|byte| *byte == 0xa5));
    let mut exact = vec![0; header.len()];
    assert_eq!(encode(&asked, &mut exact), Ok(&header[..]));
    let short = encode(&asked, &mut exact[1..]);
    assert!(matches!(short, Err(EncodeError::BufferTooSmall { .. })));

    let datagram = [&header[..], asked.payload].concat();
    let decoder = Decoder::new().max_header_len(usize::MAX);
    let (read, payload) = decoder.decode(&datagram).expect("what we wrote");
    assert_eq!(read.as_bytes(), header);
    assert_eq!(payload, asked.payload);
    assert_eq!(read.origin(), expected(&asked.start));

    // A receiver skips the TLVs of LOCAL and UNSPEC, but they were written.
    let tlvs = match read.origin() {
        Origin::Local | Origin::Unspecified => Tlvs::parse(read.skipped()).expect("well framed"),
        _ => read.tlvs(),
    };
    assert_eq!(tlvs.crc32c().is_some(), asked.checksum.is_some());
    let others = tlvs.iter().filter(|tlv| tlv.kind != TlvType::CRC32C);
    assert!(others.map(|tlv| (tlv.kind.0, tlv.value)).eq(asked.tlvs));
});
