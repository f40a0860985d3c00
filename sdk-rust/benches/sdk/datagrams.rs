//! Servers that echo datagrams. One thread plays clients and server in turn: it
//! puts datagrams into the server's queue, has the server empty it, which is
//! what is measured, and takes the replies away. So neither waits for the other,
//! and nothing is lost.

use std::net::{SocketAddr, UdpSocket as StdSocket};
use std::time::Duration;

use ppv2::ReplyTag;
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

/// Clients, or what the proxy has for them: a socket for each, or with reply tags one
/// for all.
struct Clients {
    sockets: Vec<StdSocket>,
    front: Front,
}

/// What stands in front of each client's datagrams.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Front {
    Nothing,
    Header,
    /// A header with a reply tag, in front of the replies too.
    Tagged,
}

impl Clients {
    fn new(count: usize, front: Front) -> Self {
        let socket = |_| {
            let socket = StdSocket::bind("127.0.0.1:0").unwrap();
            // As the proxy has it.
            let state = SocketState::unasked(socket.local_addr().unwrap());
            assert!(state.enable_gro(&socket).unwrap());
            socket
        };
        Self {
            sockets: (0..count).map(socket).collect(),
            front,
        }
    }

    fn datagram(&self, client: usize) -> Vec<u8> {
        let client = SocketAddr::from(([203, 0, 113, 11], 1000 + u16::try_from(client).unwrap()));
        let listener = "198.51.100.10:9000".parse().unwrap();
        let mut buffer = [0; ppv2::MAX_TAGGED_HEADER_LEN];
        let header = match self.front {
            Front::Nothing => return PAYLOAD.to_vec(),
            Front::Header => ppv2::encode_udp(client, listener, &mut buffer),
            Front::Tagged => {
                let tag = ReplyTag::new(0, u64::from(client.port()).to_be_bytes());
                ppv2::encode_udp_tagged(client, listener, tag, &mut buffer)
            }
        };
        [header.unwrap(), &PAYLOAD].concat()
    }

    /// Each sends an equal part of the window, all of it at once.
    fn send(&self, server: SocketAddr) {
        let each = WINDOW / self.sockets.len();
        for (number, socket) in self.sockets.iter().enumerate() {
            let burst: Vec<_> = match self.front {
                // One of each client.
                Front::Tagged => (0..each).flat_map(|client| self.datagram(client)).collect(),
                Front::Nothing | Front::Header => self.datagram(number).repeat(each),
            };
            let transmit = Transmit::burst(to(server), &burst, burst.len() / each);
            let state = SocketState::unasked(server);
            assert_eq!(state.send(socket, 1, |_| transmit).unwrap(), each);
        }
    }

    /// Takes the replies away and checks that all came.
    fn drain(&self) {
        let mut buffer = [0; 65_535];
        let reply = match self.front {
            Front::Tagged => ppv2::IPV4_TAGGED_HEADER_LEN + PAYLOAD.len(),
            Front::Nothing | Front::Header => PAYLOAD.len(),
        };
        let each = WINDOW / self.sockets.len() * reply;
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
fn ratios(clients: usize, sdk: impl FnMut(&UdpSocket), gro: bool) -> Vec<f64> {
    let direct = Clients::new(clients, Front::Nothing);
    ratios_of(&direct, &Clients::new(clients, Front::Header), sdk, gro)
}

/// As `ratios`, for these clients without the proxy and behind it.
fn ratios_of(
    direct: &Clients,
    behind_proxy: &Clients,
    mut sdk: impl FnMut(&UdpSocket),
    gro: bool,
) -> Vec<f64> {
    let plain = StdSocket::bind("127.0.0.1:0").unwrap();
    let trust = Trust::networks(["127.0.0.1"]).build().unwrap();
    let socket = UdpSocket::bind("127.0.0.1:0", trust).unwrap();
    if gro {
        assert!(socket.enable_gro().unwrap());
    }
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
    let clients = Clients::new(WINDOW, Front::Nothing);
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

/// As many clients as `scattered` has, through one address of the proxy, whose datagrams
/// and replies can be joined therefore.
pub(crate) fn tagged() -> Row {
    let direct = Clients::new(WINDOW, Front::Nothing);
    let one_address = Clients::new(1, Front::Tagged);
    Row {
        work: "Rust batches, scattered clients with reply tags, GRO and GSO",
        against: "`std`'s loop, no header",
        unit: "datagrams/s",
        wanted: Wanted::AtLeast(2.0),
        ratios: inverse(ratios_of(&direct, &one_address, echo_batches(), true)),
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
