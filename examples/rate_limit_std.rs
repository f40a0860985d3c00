//! Answers each client's datagrams up to a rate, and drops the rest: five at
//! once, and ten a second after that. What is limited is the client's IP address,
//! which without the SDK would be the proxy's, all clients' together.
//!
//!     cargo run -p ppv2-examples --bin rate_limit_std -- --listen 127.0.0.1:9001 --trusted 127.0.0.0/8
#![expect(clippy::print_stderr, reason = "a program for people to look at")]

use std::collections::HashMap;
use std::error::Error;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};
use std::{env, process};

use ppv2_sdk::{Trust, UdpSocket};

const AT_ONCE: f64 = 5.0;
const PER_SECOND: f64 = 10.0;

/// One sender can pretend to be many clients. When so many are remembered, those that
/// have all their tokens back are forgotten, which makes no difference to them. If there
/// are none, new clients have to wait.
const MOST_CLIENTS: usize = 100_000;

/// Between two searches for clients to forget, each of which takes a while.
const SWEEP: Duration = Duration::from_secs(1);

/// Tokens that a client has left, each good for one datagram.
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = AT_ONCE.min(self.tokens + passed * PER_SECOND);
        self.at = now;
    }
}

#[derive(Default)]
struct Limiter {
    buckets: HashMap<IpAddr, Bucket>,
    swept: Option<Instant>,
}

impl Limiter {
    /// Whether the client may have one more answer.
    fn admits(&mut self, client: IpAddr, now: Instant) -> bool {
        if self.buckets.len() >= MOST_CLIENTS && !self.buckets.contains_key(&client) {
            self.sweep(now);
            if self.buckets.len() >= MOST_CLIENTS {
                return false;
            }
        }
        let bucket = self.buckets.entry(client).or_insert(Bucket {
            tokens: AT_ONCE,
            at: now,
        });
        bucket.refill(now);
        let admitted = bucket.tokens >= 1.0;
        if admitted {
            bucket.tokens -= 1.0;
        }
        admitted
    }

    fn sweep(&mut self, now: Instant) {
        if self.swept.is_some_and(|swept| now < swept + SWEEP) {
            return;
        }
        self.swept = Some(now);
        self.buckets.retain(|_, bucket| {
            bucket.refill(now);
            bucket.tokens < AT_ONCE
        });
    }
}

/// Whose rate it is. A host with IPv6 has as many addresses as it likes, all of
/// them in one /64.
fn owner(client: SocketAddr) -> IpAddr {
    match client.ip() {
        v4 @ IpAddr::V4(_) => v4,
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
    }
}

fn main() {
    if let Err(error) = serve() {
        eprintln!("rate_limit_std: {error}");
        process::exit(1);
    }
}

fn serve() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let ["--listen", listen, "--trusted", trusted @ ..] = args.as_slice() else {
        return Err("usage: rate_limit_std --listen ADDR --trusted NET [NET ...]".into());
    };

    let socket = UdpSocket::bind(*listen, Trust::networks(trusted).build()?)?;
    eprintln!("ready on {}", socket.local_addr()?);
    let mut limiter = Limiter::default();
    let mut buffer = vec![0; 65_535];
    loop {
        let (len, client) = socket.recv_from(&mut buffer)?;
        if !limiter.admits(owner(client), Instant::now()) {
            continue;
        }
        if let Err(error) = socket.send_to(&buffer[..len], client) {
            eprintln!("no reply to {client}: {error}");
        }
    }
}
