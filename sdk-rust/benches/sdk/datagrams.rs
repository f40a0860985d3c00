//! Servers that echo datagrams. One thread plays clients and server in turn: it
//! puts datagrams into the server's queue, has the server empty it, which is
//! what is measured, and takes the replies away. So neither waits for the other,
//! and nothing is lost.

use std::net::{SocketAddr, UdpSocket as StdSocket};
use std::time::Duration;

use ppv2_sdk::{Batch, Recipient, Trust, UdpSocket};
use ppv2_udp::{Outgoing, SocketState, Transmit};
use rustix::time::{ClockId, clock_gettime};

use crate::{Row, Wanted};

const ROUNDS: usize = 21;
/// Datagrams in the server's queue when it begins.
const WINDOW: usize = 64;
const WINDOWS: usize = 300;
const BURST: usize = 32;
const PAYLOAD: [u8; 100] = [7; 100];

/// Clients, or what the proxy has for each of them: a socket of its own.
struct Clients {
    sockets: Vec<StdSocket>,
    headers: bool,
}

impl Clients {
    fn new(count: usize, headers: bool) -> Self {
        let socket = |_| {
            let socket = StdSocket::bind("127.0.0.1:0").unwrap();
            // As the proxy has it.
            let state = SocketState::unasked(socket.local_addr().unwrap());
            assert!(state.enable_gro(&socket).unwrap());
            socket
        };
        Self {
            sockets: (0..count).map(socket).collect(),
            headers,
        }
    }

    fn datagram(&self, client: usize) -> Vec<u8> {
        if !self.headers {
            return PAYLOAD.to_vec();
        }
        let client = SocketAddr::from(([203, 0, 113, 11], 1000 + u16::try_from(client).unwrap()));
        let listener = "198.51.100.10:9000".parse().unwrap();
        let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
        let header = ppv2::encode_udp(client, listener, &mut buffer).unwrap();
        [header, &PAYLOAD].concat()
    }

    /// Each sends an equal part of the window, all of it at once.
    fn send(&self, server: SocketAddr) {
        let each = WINDOW / self.sockets.len();
        for (number, socket) in self.sockets.iter().enumerate() {
            let datagram = self.datagram(number);
            let burst = datagram.repeat(each);
            let transmit = Transmit::burst(to(server), &burst, datagram.len());
            let state = SocketState::unasked(server);
            assert_eq!(state.send(socket, 1, |_| transmit).unwrap(), each);
        }
    }

    /// Takes the replies away and checks that all came.
    fn drain(&self) {
        let mut buffer = [0; 65_535];
        let each = WINDOW / self.sockets.len() * PAYLOAD.len();
        for socket in &self.sockets {
            socket.set_nonblocking(true).unwrap();
            let mut bytes = 0;
            while let Ok(len) = socket.recv(&mut buffer) {
                bytes += len;
            }
            assert_eq!(bytes, each, "replies lost");
        }
    }

    /// Time of `serve` for each datagram, which it must take `WINDOW` of.
    fn measure(&self, server: SocketAddr, mut serve: impl FnMut()) -> Duration {
        let mut busy = Duration::ZERO;
        for _ in 0..WINDOWS {
            self.send(server);
            let start = cpu_time();
            serve();
            busy += cpu_time() - start;
            self.drain();
        }
        busy / u32::try_from(WINDOW * WINDOWS).unwrap()
    }
}

/// Time that this thread has worked.
pub(crate) fn cpu_time() -> Duration {
    clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap()
}

/// Ratios of time: that of the server that `sdk` makes to that of `std`'s, each
/// for so many clients.
fn ratios(clients: usize, mut sdk: impl FnMut(&UdpSocket), gro: bool) -> Vec<f64> {
    let plain = StdSocket::bind("127.0.0.1:0").unwrap();
    let trust = Trust::networks(["127.0.0.1"]).build().unwrap();
    let socket = UdpSocket::bind("127.0.0.1:0", trust).unwrap();
    if gro {
        assert!(socket.enable_gro().unwrap());
    }
    let (direct, behind_proxy) = (Clients::new(clients, false), Clients::new(clients, true));
    let mut buffer = [0; 2048];
    let mut round = || {
        let without = direct.measure(plain.local_addr().unwrap(), || {
            for _ in 0..WINDOW {
                let (len, client) = plain.recv_from(&mut buffer).unwrap();
                plain.send_to(&buffer[..len], client).unwrap();
            }
        });
        let with = behind_proxy.measure(socket.local_addr().unwrap(), || sdk(&socket));
        show_times(with, without, "a datagram");
        with.as_secs_f64() / without.as_secs_f64()
    };
    round();
    (0..ROUNDS).map(|_| round()).collect()
}

/// Prints the times behind a ratio, for those who set BENCH_TIMES.
pub(crate) fn show_times(with: Duration, without: Duration, what: &str) {
    if std::env::var_os("BENCH_TIMES").is_some() {
        println!("{with:?} with the SDK, {without:?} without, for {what}");
    }
}

pub(crate) fn one_by_one() -> Row {
    let mut buffer = [0; 2048];
    let serve = |socket: &UdpSocket| {
        for _ in 0..WINDOW {
            let (len, client) = socket.recv_from(&mut buffer).unwrap();
            socket.send_to(&buffer[..len], client).unwrap();
        }
    };
    Row {
        work: "Rust `recv_from` + `send_to`",
        against: "`std`, no header",
        unit: "time",
        wanted: Wanted::AtMost(1.05),
        ratios: ratios(WINDOW, serve, false),
    }
}

pub(crate) fn scattered() -> Row {
    Row {
        work: "Rust batches, scattered clients",
        against: "`std`'s loop, no header",
        unit: "datagrams/s",
        wanted: Wanted::AtLeast(1.05),
        ratios: inverse(ratios(WINDOW, echo_batches(), false)),
    }
}

/// The gain of the batches' calls to the kernel alone, without headers and without
/// the SDK: no batch can do better.
pub(crate) fn bare_calls() -> Row {
    let (one_by_one, in_batches) = (
        StdSocket::bind("127.0.0.1:0").unwrap(),
        StdSocket::bind("127.0.0.1:0").unwrap(),
    );
    let clients = Clients::new(WINDOW, false);
    let mut buffer = [0; 2048];
    let state = SocketState::unasked(in_batches.local_addr().unwrap());
    let mut batch = ppv2_udp::Batch::new(WINDOW);
    let mut round = || {
        let single = clients.measure(one_by_one.local_addr().unwrap(), || {
            for _ in 0..WINDOW {
                let (len, client) = one_by_one.recv_from(&mut buffer).unwrap();
                one_by_one.send_to(&buffer[..len], client).unwrap();
            }
        });
        let many = clients.measure(in_batches.local_addr().unwrap(), || {
            echo_bare(&in_batches, &state, &mut batch);
        });
        show_times(many, single, "a datagram");
        single.as_secs_f64() / many.as_secs_f64()
    };
    round();
    Row {
        work: "`recvmmsg` and `sendmmsg` alone, scattered clients, no header",
        against: "`std`'s loop, no header",
        unit: "datagrams/s",
        wanted: Wanted::Nothing,
        ratios: (0..ROUNDS).map(|_| round()).collect(),
    }
}

fn echo_bare(socket: &StdSocket, state: &SocketState, batch: &mut ppv2_udp::Batch) {
    let received = state.receive(socket, batch, 0..WINDOW, true).unwrap();
    assert_eq!(received, WINDOW);
    let echo = |slot| {
        let peer = batch.received(slot).unwrap().peer;
        Transmit::datagram(to(peer), batch.payload(slot))
    };
    assert_eq!(state.send(socket, WINDOW, echo).unwrap(), WINDOW);
}

fn to(peer: SocketAddr) -> Outgoing<'static> {
    Outgoing {
        to: Some(peer),
        ..Outgoing::default()
    }
}

pub(crate) fn bursts() -> Row {
    Row {
        work: "Rust batches, bursts of 32 with GRO and GSO",
        against: "`std`'s loop, no header",
        unit: "datagrams/s",
        wanted: Wanted::AtLeast(3.0),
        ratios: inverse(ratios(WINDOW / BURST, echo_batches(), true)),
    }
}

fn inverse(ratios: Vec<f64>) -> Vec<f64> {
    ratios.into_iter().map(f64::recip).collect()
}

fn echo_batches() -> impl FnMut(&UdpSocket) {
    let mut batch = Batch::default();
    move |socket| {
        let mut served = 0;
        while served < WINDOW {
            served += socket.recv_batch(&mut batch).unwrap();
            let echoes: Vec<_> = batch
                .iter()
                .map(|one| (one.payload, Recipient::from(one)))
                .collect();
            assert_eq!(socket.send_batch(&echoes).unwrap(), echoes.len());
        }
    }
}
