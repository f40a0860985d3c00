//! The load generator: many clients behind few sockets.
//!
//! A client is an address of 127.0.0.0/8 and a port. All clients of a port
//! share one socket that is bound to every address; packet info gives each
//! datagram its source and names the client that a reply was for. So 18,000
//! clients cost two sockets, and sending for many of them is one system call:
//! what the generator doesn't spend is left to the proxy under test.
//!
//! Every reply is checked: it must come from the listener, to the client that
//! its tag names, with the content that was sent, and once.

mod closed;
mod paced;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use ppv2_udp::Batch;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::output;
use crate::process::Tree;
use crate::tag::{self, Shape, Tag};
use crate::wire::{BATCH, Socket};

/// Ports of the clients: outside the range that proxies get theirs from.
const FIRST_PORT: u16 = 20_000;

/// Address of the first client; the listeners and servers are at 127.0.0.1.
pub(crate) const FIRST_ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 1, 0, 1);

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
        (socket, SocketAddrV4::new(ip, port(socket)))
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
                let is_owners = |tag: &Tag| {
                    about.local.ip() == IpAddr::V4(*tag.client.ip())
                        && tag.client.port() == port(number)
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
