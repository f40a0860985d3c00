//! TLVs of a sender's header: they go on to servers that read one, or not, and its checksum,
//! padding and reply tag stay with the sender.

use ppv2::{Encoder, ReplyTag, TlvType};
use ppv2_lab::*;

use super::*;

/// TLVs as (type, value).
type Values = Vec<(u8, Vec<u8>)>;

fn write(client: &str, destination: &str, tlvs: &Values, crc32c: bool) -> Vec<u8> {
    let mut buffer = [0; 512];
    let mut encoder = Encoder::udp(&mut buffer, addr(client), addr(destination)).unwrap();
    for (kind, value) in tlvs {
        encoder = encoder.tlv(TlvType(*kind), value).unwrap();
    }
    if crc32c {
        encoder = encoder.crc32c().unwrap();
    }
    [encoder.finish(), b"payload"].concat()
}

fn read(datagram: &[u8]) -> (SocketAddr, SocketAddr, Values) {
    // Checksums are checked here.
    let (header, payload) = ppv2::decode(datagram).unwrap();
    assert_eq!(payload, b"payload");
    let tlvs = header.tlvs().iter();
    let tlvs = tlvs.map(|tlv| (tlv.kind.0, tlv.value.to_vec())).collect();
    let (client, destination) = (header.client(), header.destination());
    (client.unwrap(), destination.unwrap(), tlvs)
}

/// Those of cloud providers, twice the same type, an empty one, one that looks like a header,
/// and one of a type that nobody has given a meaning.
fn foreign() -> Values {
    vec![
        (0x02, b"example.org".to_vec()),
        (0xea, b"\x01vpce-08d2bf15fac5001c9".to_vec()),
        (0xee, vec![1, 4, 3, 2, 1]),
        (0xe0, 7u64.to_be_bytes().to_vec()),
        (0xe0, Vec::new()),
        (0x05, vec![9; 128]),
        (0x77, ppv2::SIGNATURE.to_vec()),
        (0xff, b"last\0\xff".to_vec()),
    ]
}

/// What belongs to the sender's header alone.
fn own() -> Values {
    let tag = ReplyTag::from_value(&[1; ppv2::REPLY_TAG_LEN]);
    let tag = tag.map_or(vec![1; ppv2::REPLY_TAG_LEN], |tag| tag.value().to_vec());
    vec![(0x04, vec![0; 9]), (0xeb, tag), (0x04, Vec::new())]
}

#[test]
fn they_pass_in_their_order_or_are_dropped() {
    for (client, destination) in [(CLIENT, VIP), (CLIENT_V6, VIP_V6), (CLIENT, VIP_V6)] {
        for crc32c in [true, false] {
            let passing = In::with("tlvs = \"pass\"", "", "");
            let dropping = In::start("");
            let sender = socket(SENDER);
            let all = [foreign(), own()].concat();
            for tlvs in [all, foreign(), own(), Vec::new()] {
                let datagram = write(client, destination, &tlvs, crc32c);
                for (it, expected) in [(&passing, Some(foreign())), (&dropping, None)] {
                    sender.send_to(&datagram, it.listener).unwrap();
                    let (seen, to, got) = read(&receive(&it.server).0);
                    assert_eq!((seen.port(), to), (addr(client).port(), addr(destination)));
                    let has_foreign = tlvs.len() > own().len();
                    let expected = expected.filter(|_| has_foreign).unwrap_or_default();
                    assert_eq!(got, expected);
                }
            }
            assert_eq!(all_dropped(&passing.proxy), []);
        }
    }
}

#[test]
fn a_checksum_is_written_anew() {
    let it = In::with("tlvs = \"pass\"", "", "header = { crc32c = true }");
    let sender = socket(SENDER);
    for crc32c in [true, false] {
        let datagram = write(CLIENT, VIP, &foreign(), crc32c);
        sender.send_to(&datagram, it.listener).unwrap();
        let (_, _, mut got) = read(&receive(&it.server).0);
        let sums = got.extract_if(.., |(kind, _)| *kind == 0x03).count();
        assert_eq!((sums, got), (1, foreign()));
    }
    // A wrong one is not made right.
    let mut datagram = write(CLIENT, VIP, &foreign(), true);
    datagram[20] ^= 1;
    sender.send_to(&datagram, it.listener).unwrap();
    it.eventually_dropped("bad_header", 1);
}

#[test]
fn each_datagrams_own_tlvs_pass() {
    let it = In::with("tlvs = \"pass\"", "", "");
    let sender = socket(SENDER);
    for number in 0..20u8 {
        let tlvs = vec![(0xe0, vec![number; usize::from(number)])];
        let tlvs = if number % 3 == 0 { Vec::new() } else { tlvs };
        let datagram = write(CLIENT, VIP, &tlvs, number % 2 == 0);
        sender.send_to(&datagram, it.listener).unwrap();
        assert_eq!(read(&receive(&it.server).0).2, tlvs);
    }
}

/// The longest header that is accepted, behind which the longest payload that fits comes.
#[test]
fn the_longest_pass() {
    let it = In::with("tlvs = \"pass\"", "", "");
    let sender = socket(SENDER);
    let longest = vec![(0xe0, vec![7; 512 - 28 - 3])];
    let datagram = write(CLIENT, VIP, &longest, false);
    sender.send_to(&datagram, it.listener).unwrap();
    assert_eq!(read(&receive(&it.server).0).2, longest);
}

/// What the operator has configured can't be replaced by who is in front: servers read the
/// first TLV of a type.
#[test]
fn own_tlvs_win_over_those_of_a_sender() {
    let own = "header = { authority = \"own.example\", tlvs = [ { type = \"0xE1\", value = \"own\" }, \
               { type = \"unique_id\", from = \"session\" } ] }";
    let it = In::with("tlvs = \"pass\"", "", own);
    let sender = socket(SENDER);
    let foreign = vec![
        (0xe1, b"foreign".to_vec()),
        (0x02, b"foreign.example".to_vec()),
        (0x05, vec![7; 16]),
        (0xe2, b"foreign".to_vec()),
        (0xe1, b"foreign again".to_vec()),
    ];
    let mut ids = Vec::new();
    for tlvs in [&foreign, &Vec::new(), &foreign] {
        let datagram = write(CLIENT, VIP, tlvs, true);
        sender.send_to(&datagram, it.listener).unwrap();
        let datagram = receive(&it.server).0;
        let (header, _) = ppv2::decode(&datagram).unwrap();
        let got = header.tlvs();
        assert_eq!(got.authority(), Some(Ok("own.example")));
        assert_eq!(got.get(TlvType(0xe1)), Some(&b"own"[..]));
        let second = (!tlvs.is_empty()).then_some(&b"foreign"[..]);
        assert_eq!(got.get(TlvType(0xe2)), second);
        ids.push(got.unique_id().unwrap().to_vec());
    }
    ids.dedup();
    assert_eq!(ids.len(), 1);
}
