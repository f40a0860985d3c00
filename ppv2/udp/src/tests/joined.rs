//! What `SocketState` joins into bursts, and what it leaves apart.

use proptest::prelude::*;

use super::*;

/// A socket that receives bursts in one piece, and the state of one that sends.
struct Pair {
    sender: UdpSocket,
    state: SocketState,
    receivers: [UdpSocket; 2],
    receiver_states: [SocketState; 2],
}

impl Pair {
    fn new() -> Self {
        let bind = || UdpSocket::bind("127.0.0.1:0").unwrap();
        let sender = bind();
        let receivers = [bind(), bind()];
        let receiver_states = receivers.each_ref().map(|socket| {
            socket2::SockRef::from(socket)
                .set_recv_buffer_size(4 << 20)
                .unwrap();
            let state = SocketState::new(socket, socket.local_addr().unwrap());
            assert!(state.enable_gro(socket).unwrap());
            state
        });
        Self {
            state: SocketState::new(&sender, sender.local_addr().unwrap()),
            sender,
            receivers,
            receiver_states,
        }
    }

    fn send(&self, datagrams: &[(&[u8], usize)]) -> io::Result<usize> {
        self.state.send(&self.sender, datagrams.len(), |index| {
            let (payload, to) = datagrams[index];
            let to = Some(self.receivers[to].local_addr().unwrap());
            Transmit::datagram(
                Outgoing {
                    to,
                    ..Outgoing::default()
                },
                payload,
            )
        })
    }

    /// What `number` received: the datagrams of each message.
    fn receive(&self, number: usize) -> Vec<Vec<Vec<u8>>> {
        let mut batch = Batch::new(256);
        let (socket, state) = (&self.receivers[number], &self.receiver_states[number]);
        let slots = match state.receive(socket, &mut batch, 0..256, false) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            result => result.unwrap(),
        };
        let message = |slot: usize| {
            let segment = batch.received(slot).unwrap().segment.max(1);
            let payload = batch.payload(slot);
            if payload.is_empty() {
                return vec![Vec::new()];
            }
            payload.chunks(segment).map(<[u8]>::to_vec).collect()
        };
        (0..slots).map(message).collect()
    }
}

fn counts(messages: &[Vec<Vec<u8>>]) -> Vec<usize> {
    messages.iter().map(Vec::len).collect()
}

#[test]
fn datagrams_of_one_length_to_one_recipient_leave_as_one_message() {
    let pair = Pair::new();
    let bytes = [7; 1200];
    let run = |len: usize, to, count| vec![(&bytes[..len], to); count];
    let datagrams = [
        run(100, 0, 32),
        run(60, 0, 1),
        run(100, 1, 32),
        run(1000, 1, 2),
        run(0, 1, 2),
    ]
    .concat();
    assert_eq!(pair.send(&datagrams).unwrap(), datagrams.len());
    assert_eq!(counts(&pair.receive(0)), [33]);
    assert_eq!(counts(&pair.receive(1)), [32, 2, 1, 1]);

    // No message has more than 64 datagrams, or more than fit in an IP packet.
    assert_eq!(pair.send(&run(1, 0, 100)).unwrap(), 100);
    assert_eq!(counts(&pair.receive(0)), [64, 36]);
    assert_eq!(pair.send(&run(1200, 0, 60)).unwrap(), 60);
    assert_eq!(counts(&pair.receive(0)), [54, 6]);
}

#[test]
fn neighbours_of_one_length_leave_as_one_message_with_their_own_headers() {
    let pair = Pair::new();
    let to = Some(pair.receivers[0].local_addr().unwrap());
    let bytes = pattern(400);
    let transmit = |header: &'static [u8], payload, segment| {
        let outgoing = Outgoing {
            to,
            header,
            ..Outgoing::default()
        };
        Transmit::burst(outgoing, payload, segment)
    };
    let transmits = [
        // One message: the first header and its datagram have the length of the others.
        transmit(b"longer", &bytes[..94], 94),
        transmit(b"one", &bytes[..97], 97),
        transmit(b"", &bytes[..300], 100),
        transmit(b"two", &bytes[..3], 3),
        // Another: the last one of its burst was shorter.
        transmit(b"three", &bytes[..1], 1),
        // A burst whose first datagram is shorter than the last message's begins one.
        transmit(b"", &bytes[..8], 5),
    ];
    let send = |transmits: &[Transmit<'_>]| {
        let (sender, transmit) = (&pair.sender, |index: usize| transmits[index]);
        let fault = |_, fault| panic!("{fault:?}");
        pair.state
            .send_joined(sender, transmits.len(), transmit, fault)
    };
    assert_eq!(send(&transmits).datagrams, 9);
    let received = pair.receive(0);
    assert_eq!(counts(&received), [6, 1, 2]);
    let expected: [&[&[u8]]; 3] = [
        &[
            &[b"longer", &bytes[..94]].concat(),
            &[b"one", &bytes[..97]].concat(),
            &bytes[..100],
            &bytes[100..200],
            &bytes[200..300],
            &[b"two", &bytes[..3]].concat(),
        ],
        &[&[b"three", &bytes[..1]].concat()],
        &[&bytes[..5], &bytes[5..8]],
    ];
    assert_eq!(received, expected);

    // A burst that is cut at the most that a message takes goes on in the next one.
    let long = transmit(b"h", &bytes[..40], 1);
    assert_eq!(send(&[long; 3]).datagrams, 120);
    assert_eq!(counts(&pair.receive(0)), [64, 56]);
}

#[test]
fn each_transmit_of_a_lost_message_is_reported() {
    let socket = Socket::listen("0.0.0.0:0".parse().unwrap(), Binding::default(), OPTIONS).unwrap();
    let state = SocketState::unasked(socket.bound());
    let cases = [
        // Broadcast without having asked for it; no port, which the kernel refuses in the words
        // that it has for bursts.
        ("255.255.255.255:9", libc::EACCES),
        ("127.0.0.1:0", libc::EINVAL),
    ];
    for (to, number) in cases {
        let outgoing = |header| Outgoing {
            to: Some(to.parse().unwrap()),
            header,
            ..Outgoing::default()
        };
        let transmits = [
            Transmit::datagram(outgoing(b"h"), b"234"),
            Transmit::burst(outgoing(b""), b"12341234", 4),
            Transmit::datagram(outgoing(b"head"), b""),
        ];
        let mut lost = Vec::new();
        let transmit = |index: usize| transmits[index];
        let sent = state.send_joined(&socket, 3, transmit, |index, fault| match fault {
            SendFault::Lost {
                error,
                datagrams,
                len,
            } => {
                assert_eq!(error.raw_os_error(), Some(number));
                lost.extend(vec![(index, len); datagrams]);
            }
            SendFault::Earlier(error) => panic!("{error}"),
        });
        assert_eq!(sent, Sent::default());
        assert_eq!(lost, [(0, 4), (1, 4), (1, 4), (2, 4)]);
        // It was not the burst that was refused.
        assert_eq!(state.burst_limit(), usize::MAX);
    }
}

#[test]
fn a_length_that_the_kernel_refused_is_not_joined_again() {
    let pair = Pair::new();
    assert_eq!(pair.state.burst_limit(), usize::MAX);
    pair.state.limit_bursts(1472);
    pair.state.limit_bursts(9000);
    assert_eq!(pair.state.burst_limit(), 1472);
    assert_eq!(pair.send(&[(&[1; 1473][..], 0); 3]).unwrap(), 3);
    assert_eq!(counts(&pair.receive(0)), [1, 1, 1]);
    pair.state.limit_bursts(0);
    assert_eq!(pair.send(&[(&b"short"[..], 0); 3]).unwrap(), 3);
    assert_eq!(counts(&pair.receive(0)), [1, 1, 1]);
}

#[test]
fn what_was_sent_before_a_fault_is_counted() {
    let pair = Pair::new();
    let too_long = vec![0; 65_508];
    let datagrams: [(&[u8], _); 4] = [(b"one", 0), (b"two", 0), (&too_long, 0), (b"four", 0)];
    assert_eq!(pair.send(&datagrams).unwrap(), 2);
    let error = pair.send(&datagrams[2..]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
}

#[test]
fn more_slots_than_a_call_fills_are_filled_by_several() {
    let pair = Pair::new();
    let numbers: Vec<_> = (0..200_u8).map(|number| vec![number; 3]).collect();
    pair.state.limit_bursts(0);
    let datagrams: Vec<_> = numbers.iter().map(|bytes| (&bytes[..], 0)).collect();
    assert_eq!(pair.send(&datagrams).unwrap(), 200);
    let received: Vec<_> = pair.receive(0).into_iter().flatten().collect();
    assert_eq!(received, numbers);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..Default::default() })]

    #[test]
    fn every_datagram_arrives_whole_and_in_order(
        wanted in prop::collection::vec((0_usize..4, 0_usize..3, 0_usize..4, 0_usize..2), 1..120),
        limit in prop_oneof![Just(usize::MAX), 0_usize..90],
        join in any::<bool>(),
    ) {
        let pair = Pair::new();
        pair.state.limit_bursts(limit);
        // Few lengths, so that neighbours often have the same with their headers.
        let numbers = || (0..=u8::MAX).take(wanted.len());
        let headers: Vec<_> = numbers().map(|number| [number | 0x80; 40]).collect();
        let payload = |number: u8| (0..200).map(|at: u8| at.wrapping_add(number)).collect();
        let payloads: Vec<Vec<u8>> = numbers().map(payload).collect();
        let transmit = |index: usize| {
            let (size, header, more, to) = wanted[index];
            let segment = size * 10;
            let outgoing = Outgoing {
                to: Some(pair.receivers[to].local_addr().unwrap()),
                header: &headers[index][..header * 10],
                ..Outgoing::default()
            };
            // Bursts of up to three datagrams and a half.
            let payload = &payloads[index][..segment + more * segment.min(25)];
            Transmit::burst(outgoing, payload, segment)
        };
        let count = wanted.len();
        let fault = |_, fault| panic!("{fault:?}");
        let sent = if join {
            pair.state.send_joined(&pair.sender, count, transmit, fault)
        } else {
            pair.state.send_each(&pair.sender, count, transmit, fault)
        };
        let mut all = Sent::default();
        for number in 0..2 {
            let received: Vec<_> = pair.receive(number).into_iter().flatten().collect();
            let mut expected = Vec::new();
            for one in (0..count).map(transmit) {
                if one.outgoing.to == Some(pair.receivers[number].local_addr().unwrap()) {
                    let datagrams = (0..one.datagrams()).map(|index| one.slice(index, 1));
                    expected.extend(datagrams.map(|bytes| [one.outgoing.header, bytes].concat()));
                }
            }
            all.datagrams += expected.len();
            all.bytes += expected.iter().map(Vec::len).sum::<usize>();
            prop_assert_eq!(received, expected);
        }
        prop_assert_eq!(sent, all);
    }
}
