//! Bursts as a kernel could hand them over, without a kernel.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::Waker;

use ::quinn::UdpPoller;
use ::quinn::udp::Transmit;
use proptest::prelude::*;

use super::*;
use crate::{ReplyPath, Trust};

const PROXY: &str = "192.0.2.10:40000";
const OTHER_PROXY: &str = "192.0.2.11:40000";

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn client(number: u8) -> SocketAddr {
    SocketAddr::from(([203, 0, 113, number], 4433))
}

fn demux() -> Demux {
    Demux::new(Trust::networks(["192.0.2.0/24"]).build().unwrap())
}

fn from_client(number: u8, payload: &[u8]) -> Vec<u8> {
    let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
    let header = ppv2::encode_udp(client(number), addr("198.51.100.1:443"), &mut buffer).unwrap();
    [header, payload].concat()
}

/// What one buffer holds after a receive call, and what is known of it.
#[derive(Clone, Debug)]
struct Burst {
    datagrams: Vec<Vec<u8>>,
    peer: SocketAddr,
    ecn: Option<EcnCodepoint>,
}

impl Burst {
    fn new(datagrams: Vec<Vec<u8>>) -> Self {
        Self {
            datagrams,
            peer: addr(PROXY),
            ecn: None,
        }
    }
}

/// A socket that hands over one list of bursts for each call.
#[derive(Debug, Default)]
struct Kernel(Mutex<VecDeque<Vec<Burst>>>);

impl Kernel {
    fn with(calls: Vec<Vec<Burst>>) -> Self {
        Self(Mutex::new(calls.into()))
    }
}

impl AsyncUdpSocket for Kernel {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        unimplemented!("nothing is sent")
    }

    fn try_send(&self, _transmit: &Transmit<'_>) -> io::Result<()> {
        unimplemented!("nothing is sent")
    }

    fn poll_recv(
        &self,
        _cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let Some(bursts) = self.0.lock().unwrap().pop_front() else {
            return Poll::Pending;
        };
        for ((burst, buf), meta) in bursts.iter().zip(&mut *bufs).zip(meta) {
            let bytes = burst.datagrams.concat();
            buf[..bytes.len()].copy_from_slice(&bytes);
            *meta = RecvMeta {
                addr: burst.peer,
                len: bytes.len(),
                stride: burst.datagrams[0].len(),
                ecn: burst.ecn,
                dst_ip: Some([192, 0, 2, 1].into()),
            };
        }
        Poll::Ready(Ok(bursts.len()))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(addr("192.0.2.1:443"))
    }
}

/// What quinn would read: a client and a payload for each datagram, and how many
/// buffers they came in.
struct Read {
    datagrams: Vec<(SocketAddr, Vec<u8>)>,
    buffers: Vec<RecvMeta>,
}

/// Polls with `bufs` buffers of `room` bytes until there is nothing left.
fn read_all(kernel: &Kernel, demux: &Demux, bufs: usize, room: usize) -> Read {
    let mut inbox = Inbox::default();
    let mut read = Read {
        datagrams: Vec::new(),
        buffers: Vec::new(),
    };
    let mut cx = Context::from_waker(Waker::noop());
    let mut bytes = vec![vec![0; room]; bufs];
    let mut pending_in_a_row = 0;
    while pending_in_a_row < 3 {
        let mut meta = [RecvMeta::default(); BATCH_SIZE];
        let mut slices: Vec<_> = bytes.iter_mut().map(|b| IoSliceMut::new(b)).collect();
        let Poll::Ready(result) = inbox.poll_recv(&mut cx, kernel, demux, &mut slices, &mut meta)
        else {
            pending_in_a_row += 1;
            continue;
        };
        let count = result.unwrap();
        assert!(count > 0);
        for (meta, buf) in meta.iter().zip(&bytes).take(count) {
            // As quinn takes a buffer apart.
            for payload in buf[..meta.len].chunks(meta.stride) {
                read.datagrams.push((meta.addr, payload.to_vec()));
            }
            read.buffers.push(*meta);
        }
    }
    read
}

#[test]
fn a_burst_of_one_client_stays_one() {
    let mut datagrams = vec![from_client(1, &[7; 1200]); 20];
    datagrams.push(from_client(1, &[8; 100]));
    let kernel = Kernel::with(vec![vec![Burst::new(datagrams)]]);
    let read = read_all(&kernel, &demux(), BATCH_SIZE, 1472 * 64);
    assert_eq!(read.buffers.len(), 1);
    let meta = read.buffers[0];
    assert_eq!(
        (meta.addr, meta.stride, meta.len),
        (client(1), 1200, 20 * 1200 + 100)
    );
    assert_eq!(meta.dst_ip, Some([192, 0, 2, 1].into()));
}

#[test]
fn a_burst_of_several_clients_is_split() {
    let mixed = [1, 1, 2, 1, 3, 3].map(|number| from_client(number, &[number; 300]));
    let kernel = Kernel::with(vec![vec![Burst::new(mixed.to_vec())]]);
    let demux = demux();
    let read = read_all(&kernel, &demux, 2, 1472 * 64);
    let clients: Vec<_> = read.buffers.iter().map(|meta| meta.addr).collect();
    assert_eq!(clients, [1, 2, 1, 3].map(client));
    for (from, payload) in &read.datagrams {
        assert_eq!(*from, client(payload[0]));
    }
    let local = Some([192, 0, 2, 1].into());
    assert_eq!(
        demux.path_to(Tick::roughly_now(), client(2).into()),
        Some(ReplyPath {
            local,
            ..ReplyPath::back(addr(PROXY))
        })
    );
}

#[test]
fn marks_of_congestion_stay_with_their_datagrams() {
    let marked = |ecn| Burst {
        ecn,
        ..Burst::new(vec![from_client(1, b"x"); 2])
    };
    let marks = [None, Some(EcnCodepoint::Ce), Some(EcnCodepoint::Ect0)];
    let kernel = Kernel::with(vec![marks.map(marked).to_vec()]);
    let read = read_all(&kernel, &demux(), BATCH_SIZE, 1472);
    let ecn: Vec<_> = read.buffers.iter().map(|meta| meta.ecn).collect();
    assert_eq!(ecn, marks);
}

#[test]
fn what_is_not_for_quinn_is_passed_over() {
    let stranger = Burst {
        peer: addr("198.18.0.1:7"),
        ..Burst::new(vec![from_client(1, b"forged")])
    };
    let bursts = vec![
        Burst::new(vec![b"no header".to_vec()]),
        stranger,
        Burst::new(vec![from_client(1, b"")]),
        Burst::new(vec![from_client(1, &[1; 1473])]),
        Burst::new(vec![from_client(1, &[2; 1472])]),
    ];
    // Calls that bring nothing at all in between don't end it either.
    let nothing = vec![Burst::new(vec![b"no header".to_vec()])];
    let mut calls = vec![nothing; 40];
    calls.push(bursts);
    let demux = demux();
    let read = read_all(&Kernel::with(calls), &demux, BATCH_SIZE, 1472);
    assert_eq!(read.datagrams, [(client(1), vec![2; 1472])]);
    assert_eq!(demux.stats().dropped_total(), 42);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    /// Whatever the kernel coalesced and however small quinn's buffers are,
    /// every datagram arrives once, in order, as its client's.
    #[test]
    fn every_datagram_reaches_quinn_as_its_clients(
        calls in prop::collection::vec(
            prop::collection::vec(
                (1usize..5, prop::collection::vec(1u8..4, 1..20), any::<bool>(), any::<bool>()),
                1..8,
            ),
            1..4,
        ),
        bufs in 1usize..5,
        room in 60usize..400,
    ) {
        let mut expected = Vec::new();
        let mut mark = 0u8;
        let calls = calls
            .into_iter()
            .map(|bursts| {
                bursts
                    .into_iter()
                    .map(|(len, clients, other_proxy, shorter)| {
                        let count = clients.len();
                        let datagrams = clients.into_iter().enumerate().map(|(n, number)| {
                            mark = mark.wrapping_add(1);
                            let cut = usize::from(shorter && n + 1 == count && len > 1);
                            let payload = vec![mark; len * 10 - cut];
                            expected.push((client(number), payload.clone()));
                            from_client(number, &payload)
                        });
                        Burst {
                            datagrams: datagrams.collect(),
                            peer: addr(if other_proxy { OTHER_PROXY } else { PROXY }),
                            ecn: None,
                        }
                    })
                    .collect()
            })
            .collect();
        let read = read_all(&Kernel::with(calls), &demux(), bufs, room);
        prop_assert_eq!(read.datagrams, expected);
    }
}
