//! Picking a server for a new session, and building the plan that it is picked
//! by: bare figures, since the bounds on them are such.

use std::hint::black_box;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Instant;

use anyhow::{Context, Result};
use ppv2_engine::address::{ClientAddr, ServerAddr};
use ppv2_engine::server::Server;
use ppv2_engine::upstream::{Balance, Balancer, HashOn, MAX_WEIGHT, Member, Plan, State};

use crate::measure::{Bounded, CALLS, Spread, time};

/// Clients in turn: more than any cache would remember the slots of.
const CLIENTS: u32 = 1 << 16;

/// Servers to pick from, and what a pick may take.
const FEW: usize = 100;
const MOST_NANOSECONDS: f64 = 100.0;

/// Servers to build a plan for, and what that may take.
const MANY: usize = 1_000;
const MOST_MILLISECONDS: f64 = 50.0;

pub(crate) fn run(rounds: usize) -> Result<Vec<Bounded>> {
    let maglev = Balance::Maglev(HashOn::ClientIp { ipv6_prefix: 64 });
    let mut figures = Vec::new();
    for balance in [
        maglev,
        Balance::RoundRobin,
        Balance::LeastSessions,
        Balance::RandomTwo,
    ] {
        figures.push(Bounded {
            what: format!("balance: pick of {FEW} by {balance}"),
            unit: "ns",
            spread: pick(balance, rounds)?,
            at_most: MOST_NANOSECONDS,
        });
    }
    for (weights, heaviest) in [("equal", 1), ("all", MAX_WEIGHT)] {
        figures.push(Bounded {
            what: format!("balance: build of maglev for {MANY}, {weights} weights"),
            unit: "ms",
            spread: build(maglev, heaviest, rounds)?,
            at_most: MOST_MILLISECONDS,
        });
    }
    Ok(figures)
}

/// Nanoseconds of a pick, with each server's sessions counted as a worker does.
fn pick(balance: Balance, rounds: usize) -> Result<Spread> {
    let members = members(FEW, 1);
    let server = |member: &Member| Server::new("upstream", "server", member.address, 1);
    let servers: Vec<_> = members.iter().map(server).collect();
    for (sessions, server) in (0..).zip(&servers) {
        server.counters(0).opened.add(sessions % 7);
    }
    let plan = Plan::new(balance, &members);
    let mut balancer = Balancer::new(0, 1);
    let clients: Vec<_> = (0..CLIENTS).map(client).collect();
    let mut turn = 0;
    let mut call = || {
        turn = (turn + 1) % clients.len();
        let sessions = |server: usize| servers[server].counters(0).sessions();
        balancer.pick(&plan, black_box(clients[turn]), sessions)
    };
    call().context("a server for each client")?;
    // As many as `time` calls.
    let each = |()| time(&mut call).as_secs_f64() * 1e9 / f64::from(CALLS);
    Spread::of(std::iter::repeat_n((), rounds).map(each).collect()).context("no rounds")
}

/// Milliseconds of a build.
fn build(balance: Balance, heaviest: u16, rounds: usize) -> Result<Spread> {
    let members = members(MANY, heaviest);
    let each = |()| {
        let start = Instant::now();
        black_box(Plan::new(balance, black_box(&members)));
        start.elapsed().as_secs_f64() * 1e3
    };
    Spread::of(std::iter::repeat_n((), rounds).map(each).collect()).context("no rounds")
}

/// Servers with weights of all sizes up to `heaviest`.
fn members(count: usize, heaviest: u16) -> Vec<Member> {
    let member = |(number, weight): (u32, u16)| Member {
        address: ServerAddr((Ipv4Addr::from_bits(0x0a00_0000 + number), 9_000).into()),
        weight,
        backup: false,
        state: State::Up,
    };
    let weights = (1..=heaviest).cycle();
    (0..).zip(weights).take(count).map(member).collect()
}

fn client(number: u32) -> ClientAddr {
    let ip = Ipv4Addr::from_bits(number.wrapping_mul(0x9e37_79b9));
    ClientAddr(SocketAddr::from((ip, 54_321)))
}
