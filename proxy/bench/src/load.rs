//! The load generator: many clients behind few sockets.
//!
//! A client is an address of 127.0.0.0/8 and a port. All clients of a port
//! share one socket that is bound to every address; packet info gives each
//! datagram its source and names the client that a reply was for. So 18,000
//! clients cost two sockets, and sending for many of them is one system call:
//! what the generator doesn't spend is left to the proxy under test.
//!
//! The clients may also be behind another proxy, which puts a PROXY v2 header that names
//! the client in front of each datagram. The generator is that proxy then, and replies come
//! to its sockets.
//!
//! Every reply is checked: it must come from the listener, to the client that
//! its tag names, with the content that was sent, and once.

mod closed;
mod paced;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use ppv2_udp::Batch;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::output;
use crate::process::Tree;
use crate::tag::{self, Shape, Tag};
use crate::wire::{BATCH, Socket};

/// Ports of the clients: outside the range that proxies get theirs from, and outside that of
/// [`ppv2_lab::port`].
const FIRST_PORT: u16 = 9_500;

/// Address of the first client; the listeners and servers are at 127.0.0.1.
pub(crate) const FIRST_ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 1, 0, 1);

/// First byte of the addresses of clients that are behind another proxy; their own tells
/// them from those of its sockets.
const BEHIND: u8 = 10;

/// Where such a client has written to.
const DESTINATION: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 10), 9_000);

/// Bytes of a PROXY v2 header for IPv4.
const HEADER: usize = 28;

/// After this long a datagram is lost.
const TIMEOUT: Duration = Duration::from_millis(300);

/// What to put on the proxy.
#[derive(Args, Clone, Debug)]
pub(crate) struct Load {
    /// The listener
    #[arg(long)]
    pub(crate) target: SocketAddrV4,
    /// Address of the first client
    #[arg(long, default_value_t = FIRST_ADDRESS)]
    pub(crate) from: Ipv4Addr,
    /// Distinct client addresses and ports
    #[arg(long, default_value_t = 64)]
    pub(crate) clients: usize,
    /// Number of the first client, to begin with clients that nobody has seen
    #[arg(long, default_value_t = 0)]
    pub(crate) first: usize,
    /// Ports that the clients are spread over
    #[arg(long, default_value_t = 2)]
    pub(crate) ports: u16,
    /// Bytes of a datagram
    #[arg(long, default_value_t = 64)]
    pub(crate) size: usize,
    /// Datagrams that a client sends in one go (UDP_SEGMENT)
    #[arg(long, default_value_t = 1)]
    pub(crate) burst: usize,
    /// Datagrams, or bursts, that a client keeps in flight, in a closed loop
    #[arg(long, default_value_t = 1)]
    pub(crate) flight: usize,
    /// Datagrams a second; without it each client sends when it has its replies
    #[arg(long)]
    pub(crate) rate: Option<u64>,
    /// Every datagram comes from a client that never sent one before
    #[arg(long)]
    pub(crate) fresh: bool,
    /// Datagrams are DNS questions, replies their answers
    #[arg(long)]
    pub(crate) dns: bool,
    /// Who sends the clients' datagrams
    #[arg(long, value_enum, default_value_t = Senders::Clients)]
    pub(crate) senders: Senders,
    /// Milliseconds before the measurement
    #[arg(long, default_value_t = 300)]
    pub(crate) warm_up: u64,
    /// Milliseconds of the measurement
    #[arg(long, default_value_t = 2_000)]
    pub(crate) time: u64,
    /// Processes of the proxy, whose CPU time is to be told
    #[arg(long, value_name = "PID")]
    pub(crate) proxy: Vec<i32>,
    /// The same of the server
    #[arg(long, value_name = "PID")]
    pub(crate) server: Vec<i32>,
}

/// Who sends the clients' datagrams to the proxy that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Senders {
    /// They themselves, without a header
    Clients,
    /// Another proxy, with a header before each datagram, from an address for each client
    One,
    /// The same from one address and port for all clients that share a socket here
    Shared,
}

impl Senders {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Clients => "clients",
            Self::One => "one",
            Self::Shared => "shared",
        }
    }

    /// Bytes in front of each payload.
    pub(crate) fn header_len(self) -> usize {
        if self == Self::Clients { 0 } else { HEADER }
    }

    /// An address as a client of these senders has it.
    pub(crate) fn behind(self, address: Ipv4Addr) -> Ipv4Addr {
        let [first, b, c, d] = address.octets();
        let first = if self == Self::Clients { first } else { BEHIND };
        Ipv4Addr::new(first, b, c, d)
    }

    /// The address that a client's datagrams come from, if the first client's come from
    /// `first`.
    fn address_for(self, client: Ipv4Addr, first: Ipv4Addr) -> Ipv4Addr {
        match self {
            Self::Clients => client,
            Self::One => {
                let [_, b, c, d] = client.octets();
                Ipv4Addr::new(first.octets()[0], b, c, d)
            }
            Self::Shared => first,
        }
    }
}

/// Writes the header of a client, which may be none, and returns the payload behind it.
pub(crate) fn write_header(
    senders: Senders,
    client: SocketAddrV4,
    datagram: &mut [u8],
) -> Result<&mut [u8]> {
    let (header, payload) = datagram.split_at_mut(senders.header_len());
    if !header.is_empty() {
        let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
        let written = ppv2::encode_udp(client.into(), DESTINATION.into(), &mut buffer)?;
        header.copy_from_slice(written);
    }
    Ok(payload)
}

/// What came of it, between the end of the warm-up and the end.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) seconds: f64,
    pub(crate) sent: u64,
    pub(crate) received: u64,
    pub(crate) lost: u64,
    /// Replies that reached the wrong client, twice, or changed.
    pub(crate) wrong: u64,
    /// Replies to a client that came after the reply to one that it sent later, in a closed
    /// loop.
    pub(crate) reordered: u64,
    /// Nanoseconds of CPU that were spent meanwhile.
    pub(crate) cpu: Cpu,
    /// Sent while warming up.
    pub(crate) sent_before: u64,
    /// Lost while warming up.
    pub(crate) lost_before: u64,
    /// Microseconds from sending to the reply, at a fixed rate.
    pub(crate) latency: Option<Latency>,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    /// How late the generator itself was at p99.
    pub(crate) lag_p99: f64,
}

/// Applies the load, and prints the report as one line of JSON.
pub(crate) fn run(load: &Load) -> Result<()> {
    // Without it, the kernel may let a timer go off 50 µs late.
    let slack = std::num::NonZeroU64::new(1);
    rustix::thread::set_current_timer_slack(slack).context("setting the timer slack")?;
    let report = match load.rate {
        Some(rate) => paced::run(load, rate)?,
        None => closed::run(load)?,
    };
    output::line(&serde_json::to_string(&report)?)
}

/// Nanoseconds of CPU.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Cpu {
    pub(crate) proxy: u64,
    pub(crate) server: u64,
    /// The generator's own.
    pub(crate) clients: u64,
}

/// Looks at the clocks of all processes, which nobody can do at a better time than the
/// generator.
struct Clocks {
    proxy: Tree,
    server: Tree,
}

impl Clocks {
    fn of(load: &Load) -> Result<Self> {
        Ok(Self {
            proxy: Tree::with(&load.proxy)?,
            server: Tree::with(&load.server)?,
        })
    }

    fn now(&self) -> Cpu {
        let own = Duration::try_from(clock_gettime(ClockId::ProcessCPUTime));
        let own = own.unwrap_or_default().as_nanos();
        Cpu {
            proxy: self.proxy.cpu(),
            server: self.server.cpu(),
            clients: u64::try_from(own).unwrap_or(u64::MAX),
        }
    }
}

impl Cpu {
    fn since(self, before: Self) -> Self {
        Self {
            proxy: self.proxy - before.proxy,
            server: self.server - before.server,
            clients: self.clients - before.clients,
        }
    }

    pub(crate) fn all(self) -> u64 {
        self.proxy + self.server + self.clients
    }
}

/// The clients' sockets, and what is common to all loads.
struct Clients {
    sockets: Vec<Socket>,
    target: SocketAddrV4,
    from: Ipv4Addr,
    senders: Senders,
    shape: Shape,
    template: Vec<u8>,
    /// Number of this load.
    number: u32,
    start: Instant,
    wrong: u64,
}

impl Clients {
    fn open(load: &Load) -> Result<Self> {
        let shape = if load.dns { Shape::Dns } else { Shape::Plain };
        let sockets = (0..load.ports)
            .map(|i| {
                let bind = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, FIRST_PORT + i);
                let mut socket = Socket::bind(bind).with_context(|| format!("binding {bind}"))?;
                socket.report_local_address()?;
                if load.burst > 1 {
                    socket.receive_bursts()?;
                }
                Ok(socket)
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            sockets,
            target: load.target,
            from: load.from,
            senders: load.senders,
            shape,
            template: shape.template(load.size)?,
            number: std::process::id(),
            start: Instant::now(),
            wrong: 0,
        })
    }

    /// Number of the socket of a client, and the client's address.
    fn address(&self, client: usize) -> (usize, SocketAddrV4) {
        let socket = client % self.sockets.len();
        let offset = u32::try_from(client / self.sockets.len()).unwrap_or(u32::MAX);
        let ip = Ipv4Addr::from_bits(self.from.to_bits().wrapping_add(offset));
        (
            socket,
            SocketAddrV4::new(self.senders.behind(ip), port(socket)),
        )
    }

    /// Where the datagrams of a client leave from, and replies to it come.
    fn sender_of(&self, client: SocketAddrV4) -> SocketAddrV4 {
        let ip = self.senders.address_for(*client.ip(), self.from);
        SocketAddrV4::new(ip, client.port())
    }

    /// A datagram without header and tag.
    fn blank(&self) -> Vec<u8> {
        [&vec![0; self.senders.header_len()][..], &self.template].concat()
    }

    /// Nanoseconds since the start.
    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Hands each reply that is there to `take`, which says whether it was
    /// waited for. Says how many were there.
    fn receive(&mut self, inbox: &mut Batch, mut take: impl FnMut(Tag) -> bool) -> Result<usize> {
        let mut count = 0;
        for number in 0..self.sockets.len() {
            let received = self.sockets[number].receive(inbox, 0..BATCH)?;
            for (about, range) in inbox.datagrams(received) {
                count += 1;
                let reply = &inbox.bytes()[range];
                let tag = Tag::read(reply, self.shape);
                if tag.is_some_and(|tag| tag.load != self.number) {
                    continue;
                }
                let (senders, from) = (self.senders, self.from);
                let is_owners = |tag: &Tag| {
                    let sender = senders.address_for(*tag.client.ip(), from);
                    about.local.ip() == IpAddr::V4(sender) && tag.client.port() == port(number)
                };
                let right = about.peer == SocketAddr::V4(self.target)
                    && tag::same_filling(reply, &self.template, self.shape)
                    && tag.filter(is_owners).is_some_and(&mut take);
                self.wrong += u64::from(!right);
            }
        }
        Ok(count)
    }

    /// Waits for a reply, but not for longer than `time`.
    fn wait(&self, time: Duration) -> Result<()> {
        let mut polled: Vec<_> = self
            .sockets
            .iter()
            .map(|socket| PollFd::new(socket, PollFlags::IN))
            .collect();
        let time = Timespec::try_from(time)?;
        poll(&mut polled, Some(&time))?;
        Ok(())
    }
}

#[expect(clippy::cast_possible_truncation, reason = "numbered by a u16")]
fn port(socket: usize) -> u16 {
    FIRST_PORT + socket as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Ipv4Addr = FIRST_ADDRESS;

    #[test]
    fn each_client_behind_a_proxy_has_an_address_of_its_own() {
        let of = |senders: Senders, number: u32| {
            let ip = Ipv4Addr::from_bits(FIRST.to_bits() + number);
            let client = senders.behind(ip);
            (client, senders.address_for(client, FIRST))
        };
        let address = |text: &str| text.parse::<Ipv4Addr>().unwrap();
        let (client, sender) = (address("127.1.1.44"), address("127.1.1.44"));
        assert_eq!(of(Senders::Clients, 299), (client, sender));
        let client = address("10.1.1.44");
        assert_eq!(of(Senders::One, 299), (client, sender));
        assert_eq!(of(Senders::Shared, 299), (client, FIRST));
    }

    #[test]
    fn header_in_front_names_the_client() {
        let client = "10.1.0.1:9500".parse().unwrap();
        let mut datagram = [vec![0; HEADER], b"payload".to_vec()].concat();
        let payload = write_header(Senders::One, client, &mut datagram).unwrap();
        assert_eq!(payload, b"payload");
        let (header, payload) = ppv2::decode(&datagram).unwrap();
        assert_eq!(header.client(), Some(SocketAddr::V4(client)));
        assert_eq!(payload, b"payload");
        let mut plain = b"payload".to_vec();
        let payload = write_header(Senders::Clients, client, &mut plain).unwrap();
        assert_eq!(payload, b"payload");
    }
}
