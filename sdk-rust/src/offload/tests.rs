//! The portable way on this system, and what the Linux way puts into one call.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use super::{Outgoing, portable};
use crate::{Batch, Gate, Trust, Way};

const CLIENT: &str = "203.0.113.11:54321";

fn bound() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    socket
}

fn from_client(payload: &[u8]) -> Vec<u8> {
    let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
    let listener = "198.51.100.10:9000".parse().unwrap();
    let header = ppv2::encode_udp(CLIENT.parse().unwrap(), listener, &mut buffer).unwrap();
    [header, payload].concat()
}

#[test]
fn one_by_one_fills_a_batch_and_sends_one() {
    let (socket, proxy) = (bound(), bound());
    let gate = Gate::new(Trust::networks(["127.0.0.1"]).unwrap()).unwrap();
    let server = socket.local_addr().unwrap();
    for datagram in [
        from_client(b"a"),
        b"no header".to_vec(),
        from_client(b""),
        from_client(b"later"),
    ] {
        proxy.send_to(&datagram, server).unwrap();
    }

    let mut offload = portable::Offload::new(&socket, server);
    assert!(!offload.enable_gro(&socket).unwrap() && !offload.gro());
    let mut batch = Batch::new(3);
    let mut receive = || {
        batch.fill(&gate, |slots| {
            portable::receive(&socket, &offload, slots, true)
        })
    };
    assert_eq!(receive().unwrap(), 2);
    let payloads: Vec<_> = batch.iter().map(|datagram| datagram.payload).collect();
    assert_eq!(payloads, [b"a".as_slice(), b""]);
    assert_eq!(batch.get(0).unwrap().client, CLIENT.parse().unwrap());

    let to = batch.get(0).unwrap().way;
    let outgoing: [Outgoing<'_>; 2] = [(b"one", to), (b"two", to)];
    let sent = portable::send(&socket, &offload, &outgoing, None).unwrap();
    assert_eq!(sent, 2);
    let mut buffer = [0; 8];
    for expected in [b"one", b"two"] {
        let len = proxy.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], expected);
    }

    let mut receive = || {
        batch.fill(&gate, |slots| {
            portable::receive(&socket, &offload, slots, true)
        })
    };
    assert_eq!(receive().unwrap(), 1);
    let error = batch
        .fill(&gate, |slots| {
            portable::receive(&socket, &offload, slots, false)
        })
        .unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    assert!(batch.is_empty());
}

#[test]
fn one_by_one_sends_from_the_front_up_to_what_fails() {
    let (socket, proxy) = (bound(), bound());
    let to = proxy.local_addr().unwrap();
    let nowhere: SocketAddr = "[2001:db8::1]:9".parse().unwrap();
    let [back, nowhere] = [to, nowhere].map(Way::back);
    let outgoing: [Outgoing<'_>; 3] = [(b"one", back), (b"two", nowhere), (b"three", back)];
    let offload = portable::Offload::new(&socket, to);
    assert_eq!(
        portable::send(&socket, &offload, &outgoing, None).unwrap(),
        1
    );
    assert!(portable::send(&socket, &offload, &outgoing[1..], None).is_err());
}

#[cfg(target_os = "linux")]
mod linux {
    use proptest::prelude::*;

    use super::super::linux::{Message, Offload, plan};
    use super::*;

    fn way(number: u8) -> Way {
        Way::back(SocketAddr::from(([192, 0, 2, number], 9)))
    }

    fn lengths(messages: &[Message]) -> Vec<usize> {
        messages.iter().map(|message| message.datagrams).collect()
    }

    #[test]
    fn a_run_of_one_length_for_one_way_is_one_message() {
        let bytes = [0; 1200];
        let run = |len: usize, to, count| vec![(&bytes[..len], way(to)); count];
        let datagrams = [
            run(100, 1, 32),
            run(60, 1, 1),
            run(100, 2, 32),
            run(90, 3, 1),
            run(1000, 3, 2),
        ]
        .concat();
        let (messages, segment) = plan(&datagrams, 1200);
        // A longer segment has to wait for the next call.
        assert_eq!((lengths(&messages), segment), (vec![33, 32, 1], Some(100)));

        // Without segmenting each is a message, and any length goes.
        let (messages, segment) = plan(&datagrams, 0);
        assert_eq!((lengths(&messages), segment), (vec![1; 68], None));

        // Nothing is longer than 64 segments, or than 65,507 bytes together.
        let (messages, _) = plan(&run(1, 1, 100), 1200);
        assert_eq!(lengths(&messages), [64, 36]);
        let (messages, _) = plan(&run(1200, 1, 60), 1200);
        assert_eq!(lengths(&messages), [54, 6]);
        let (messages, _) = plan(&run(0, 1, 3), 1200);
        assert_eq!(lengths(&messages), [1, 1, 1]);
    }

    #[test]
    fn a_refused_length_is_not_segmented_again() {
        use nix::errno::Errno;

        let socket = bound();
        let offload = Offload::new(&socket, socket.local_addr().unwrap());
        assert!(offload.longest_segment(&socket) > 1500);
        offload.refused(1473, Errno::EINVAL);
        assert_eq!(offload.longest_segment(&socket), 1472);
        offload.refused(9000, Errno::EINVAL);
        assert_eq!(offload.longest_segment(&socket), 1472);
        offload.refused(100, Errno::EIO);
        assert_eq!(offload.longest_segment(&socket), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn whatever_is_sent_keeps_its_length_and_its_way(
            wanted in prop::collection::vec((0usize..40, 1u8..3), 1..200),
            longest in 0usize..50,
        ) {
            let bytes = [0; 40];
            let datagrams: Vec<Outgoing<'_>> = wanted
                .iter()
                .map(|&(len, to)| (&bytes[..len / 10 * 10], way(to)))
                .collect();
            let (messages, segment) = plan(&datagrams, longest);
            prop_assert!(!messages.is_empty());
            let mut rest = &datagrams[..];
            for message in &messages {
                let (these, after) = rest.split_at(message.datagrams);
                rest = after;
                // The kernel cuts each message at every multiple of `segment`.
                let segment = segment.map_or(usize::MAX, usize::from);
                let (last, full) = these.split_last().unwrap();
                prop_assert!(last.0.len() <= segment);
                prop_assert!(full.is_empty() || !last.0.is_empty());
                for one in full {
                    prop_assert_eq!(one.0.len(), segment);
                    prop_assert_eq!(one.1, last.1);
                }
            }
        }
    }
}
