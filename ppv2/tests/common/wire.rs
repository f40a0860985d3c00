//! Headers put together byte by byte, without the crate under test, and
//! generators of datagrams of which about half are valid.

use proptest::collection::vec;
use proptest::option::weighted;
use proptest::prelude::*;
use proptest::sample::select;

pub(crate) const SIGNATURE: &[u8; 12] = b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a";

/// CRC32C, bit by bit, from its polynomial (RFC 3720, appendix B.4).
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 * (crc & 1));
        }
    }
    !crc
}

pub(crate) fn tlv(kind: u8, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len()).expect("a test's value fits");
    [&[kind], &length.to_be_bytes()[..], value].concat()
}

/// A header with a true length field.
pub(crate) fn header(version_command: u8, family_transport: u8, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(body.len()).expect("a test's header fits");
    let fixed = [version_command, family_transport];
    [SIGNATURE, &fixed[..], &length.to_be_bytes(), body].concat()
}

/// Writes the checksum of `header` into its four bytes from `at` on.
pub(crate) fn seal(header: &mut [u8], at: usize) {
    header[at..at + 4].fill(0);
    let checksum = crc32c(header);
    header[at..at + 4].copy_from_slice(&checksum.to_be_bytes());
}

/// Bytes of the address block that a family calls for.
pub(crate) fn block_len(family_transport: u8) -> usize {
    match family_transport >> 4 {
        1 => 12,
        2 => 36,
        3 => 216,
        _ => 0,
    }
}

/// A datagram by its parts, of which each may be wrong.
#[derive(Clone, Debug)]
pub(crate) struct Wire {
    pub(crate) version_command: u8,
    pub(crate) family_transport: u8,
    pub(crate) block: Vec<u8>,
    pub(crate) tlvs: Vec<(u8, Vec<u8>)>,
    /// Before which of the TLVs a CRC32C stands, and how it differs from the true one.
    pub(crate) checksum: Option<(usize, u32)>,
    /// Bytes behind the last TLV that still belong to the header.
    pub(crate) stray: Vec<u8>,
    /// What the length field says instead of the truth.
    pub(crate) length: Option<u16>,
    pub(crate) payload: Vec<u8>,
}

impl Wire {
    pub(crate) fn header(&self) -> Vec<u8> {
        let mut body = self.block.clone();
        let mut checksum_at = None;
        for index in 0..=self.tlvs.len() {
            if let Some((place, _)) = self.checksum
                && place.min(self.tlvs.len()) == index
            {
                checksum_at = Some(16 + body.len() + 3);
                body.extend(tlv(0x03, &[0; 4]));
            }
            if let Some((kind, value)) = self.tlvs.get(index) {
                body.extend(tlv(*kind, value));
            }
        }
        body.extend(&self.stray);
        let mut header = header(self.version_command, self.family_transport, &body);
        if let Some(length) = self.length {
            header[14..16].copy_from_slice(&length.to_be_bytes());
        }
        if let (Some(at), Some((_, wrong))) = (checksum_at, self.checksum) {
            seal(&mut header, at);
            for (byte, wrong) in header[at..].iter_mut().zip(wrong.to_be_bytes()) {
                *byte ^= wrong;
            }
        }
        header
    }

    pub(crate) fn datagram(&self) -> Vec<u8> {
        [self.header(), self.payload.clone()].concat()
    }
}

/// Types with rules of their own, more often than chance has them.
fn tlv_kind() -> impl Strategy<Value = u8> {
    let named = vec![
        0x01, 0x02, 0x04, 0x05, 0x20, 0x21, 0x22, 0x25, 0x28, 0x30, 0xe0, 0xea, 0xeb, 0xeb, 0xee,
    ];
    prop_oneof![8 => select(named), 1 => any::<u8>(), 1 => Just(0x03)]
}

/// Values of a reply tag, one in four of an unknown version.
fn reply_tag() -> impl Strategy<Value = Vec<u8>> {
    (
        prop_oneof![3 => Just(1), 1 => any::<u8>()],
        any::<[u8; 9]>(),
    )
        .prop_map(|(version, rest)| [&[version], &rest[..]].concat())
}

pub(crate) fn tlv_parts() -> impl Strategy<Value = (u8, Vec<u8>)> {
    let text = "[a-z.]{0,12}".prop_map(String::into_bytes);
    let ssl = (any::<[u8; 5]>(), 0x21..0x29u8, text.clone())
        .prop_map(|(fixed, kind, text)| [&fixed[..], &tlv(kind, &text)].concat());
    let value = prop_oneof![
        4 => text,
        3 => vec(any::<u8>(), 0..12),
        2 => ssl,
        2 => reply_tag(),
        1 => Just(Vec::new()),
        1 => (120..140usize).prop_map(|len| vec![b'i'; len]),
    ];
    (tlv_kind(), value)
}

/// Datagrams of which about half are valid, and the others nearly so.
pub(crate) fn wire() -> impl Strategy<Value = Wire> {
    let listed = select(vec![0x00, 0x11, 0x12, 0x12, 0x12, 0x21, 0x22, 0x22, 0x32]);
    let unlisted = select(vec![0x01, 0x02, 0x10, 0x20, 0x30, 0x13, 0x42]);
    let pair = prop_oneof![14 => listed, 1 => unlisted, 1 => any::<u8>()];
    pair.prop_flat_map(|family_transport| {
        let whole = block_len(family_transport);
        let block = prop_oneof![
            15 => vec(any::<u8>(), whole),
            1 => vec(any::<u8>(), 0..=whole),
        ];
        let checksum = prop_oneof![4 => Just(0), 1 => any::<u32>()];
        (
            prop_oneof![12 => Just(0x21), 3 => Just(0x20), 1 => any::<u8>()],
            block,
            vec(tlv_parts(), 0..4),
            weighted(0.3, (0..4usize, checksum)),
            prop_oneof![9 => Just(Vec::new()), 1 => vec(any::<u8>(), 1..4)],
            weighted(0.08, prop_oneof![0..60u16, any::<u16>()]),
            vec(any::<u8>(), 0..40),
        )
            .prop_map(
                move |(version_command, block, tlvs, checksum, stray, length, payload)| Wire {
                    version_command,
                    family_transport,
                    block,
                    tlvs,
                    checksum,
                    stray,
                    length,
                    payload,
                },
            )
    })
}

/// One change to a datagram: a byte set, put in or taken out, or the end cut off.
pub(crate) fn mutated(datagram: &[u8], mutations: &[(u8, prop::sample::Index, u8)]) -> Vec<u8> {
    let mut bytes = datagram.to_vec();
    for (what, index, byte) in mutations {
        if bytes.is_empty() {
            break;
        }
        let at = index.index(bytes.len());
        match what % 5 {
            0 => bytes[at] = *byte,
            1 => bytes[at] ^= 1 << (byte % 8),
            2 => bytes.insert(at, *byte),
            3 => drop(bytes.remove(at)),
            _ => bytes.truncate(at),
        }
    }
    bytes
}
