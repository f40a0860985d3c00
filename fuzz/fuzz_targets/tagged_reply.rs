//! What a server may send back to a proxy: any bytes, or a tagged reply of which
//! some bytes differ. A proxy must read from it what was written or refuse it with
//! what it is, and the general decoder must agree.
#![no_main]

use std::net::SocketAddr;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use ppv2::{ReplyTag, decode_tagged, encode_udp_tagged};

#[path = "../../ppv2/tests/common/invariants.rs"]
#[allow(dead_code)]
mod invariants;

#[derive(Arbitrary, Debug)]
enum Reply<'a> {
    Any(&'a [u8]),
    Tagged {
        client: SocketAddr,
        destination: SocketAddr,
        flags: u8,
        tag: [u8; 8],
        payload: &'a [u8],
        /// Offset and new value of bytes that differ.
        changed: Vec<(u8, u8)>,
    },
}

fuzz_target!(|reply: Reply<'_>| {
    match reply {
        Reply::Any(datagram) => invariants::check_tagged(datagram),
        Reply::Tagged {
            client,
            destination,
            flags,
            tag,
            payload,
            changed,
        } => {
            let tag = ReplyTag::new(flags, tag);
            let mut buffer = [0; ppv2::MAX_TAGGED_HEADER_LEN];
            let header = encode_udp_tagged(client, destination, tag, &mut buffer).expect("fits");
            let mut datagram = [header, payload].concat();
            let same = |ours: SocketAddr, theirs: SocketAddr| {
                (ours.ip().to_canonical(), ours.port())
                    == (theirs.ip().to_canonical(), theirs.port())
            };
            let read = decode_tagged(&datagram).expect("was written");
            assert!(same(read.client, client) && same(read.destination, destination));
            assert_eq!((read.tag, read.payload), (tag, payload));

            for (at, byte) in changed {
                if let Some(place) = datagram.get_mut(usize::from(at)) {
                    *place = byte;
                }
            }
            invariants::check_tagged(&datagram);
        }
    }
});
