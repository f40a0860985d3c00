//! The codec against two that others wrote: `ppp`, which the decoder is built
//! on, and `proxy-header`, which shares no line with it. Where both accept a
//! datagram they must agree on all that it says. Each difference must be on the
//! list of that crate's module, which says who is right, pins it by a datagram,
//! and is checked to hold nothing that the generator does not meet.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "what is on no list must panic, the variants of later versions included"
)]

#[path = "../common/mod.rs"]
mod common;

mod against_ppp;
mod against_proxy_header;

use std::collections::BTreeSet;

use common::wire;
use ppv2::{Decoder, Header};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

/// The others have no limit.
const UNLIMITED: Decoder = Decoder::new().max_header_len(usize::MAX);

/// Bytes of a well-formed address block for UDP over IPv4.
const V4: [u8; 12] = [203, 0, 113, 11, 198, 51, 100, 10, 0xd4, 0x31, 0x23, 0x28];

fn tlvs_of(header: &Header<'_>) -> Vec<(u8, Vec<u8>)> {
    let tlvs = header.tlvs().iter();
    tlvs.map(|tlv| (tlv.kind.0, tlv.value.to_vec())).collect()
}

/// That a checksum which we refused is wrong indeed.
fn assert_wrong_checksum(header: &[u8], offset: usize, found: u32) {
    let mut sealed = header.to_vec();
    wire::seal(&mut sealed, offset + 3);
    assert_eq!(header[offset..offset + 3], [0x03, 0, 4]);
    assert_eq!(header[offset + 3..offset + 7], found.to_be_bytes());
    assert_ne!(sealed, header);
}

/// All that `differences` finds in the same 20,000 datagrams of every run.
fn met<T: Ord>(differences: fn(&[u8]) -> Vec<T>) -> BTreeSet<T> {
    let mut runner = TestRunner::deterministic();
    let strategy = wire::wire();
    (0..20_000)
        .flat_map(|_| {
            let wire = strategy.new_tree(&mut runner).expect("no filter").current();
            differences(&wire.datagram())
        })
        .collect()
}

/// Nearly valid datagrams, and what a few changes make of them.
fn datagram() -> impl Strategy<Value = Vec<u8>> {
    let mutations = proptest::collection::vec(any::<(u8, prop::sample::Index, u8)>(), 0..3);
    (wire::wire(), mutations)
        .prop_map(|(wire, mutations)| wire::mutated(&wire.datagram(), &mutations))
}
