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
        wanted in prop::collection::vec((0_usize..4, 0_usize..2), 1..200),
        limit in 0_usize..50,
    ) {
        let pair = Pair::new();
        pair.state.limit_bursts(limit);
        let bytes: Vec<_> = (0..=u8::MAX).map(|number| [number; 40]).collect();
        let datagrams: Vec<_> = wanted
            .iter()
            .zip(&bytes)
            .map(|(&(len, to), bytes)| (&bytes[..len * 10], to))
            .collect();
        prop_assert_eq!(pair.send(&datagrams).unwrap(), datagrams.len());
        for number in 0..2 {
            let received: Vec<_> = pair.receive(number).into_iter().flatten().collect();
            let expected: Vec<_> = datagrams
                .iter()
                .filter(|(_, to)| *to == number)
                .map(|(bytes, _)| bytes.to_vec())
                .collect();
            prop_assert_eq!(received, expected);
        }
    }
}
