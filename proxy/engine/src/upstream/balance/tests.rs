//! Each balancer gives every server its share, and those that are down none.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::address::ServerAddr;
use crate::upstream::{Balance, HashOn, MAX_WEIGHT, Member, State};

const BALANCES: [Balance; 5] = [
    Balance::Maglev(HashOn::ClientIp { ipv6_prefix: 64 }),
    Balance::Maglev(HashOn::ClientAddr),
    Balance::RoundRobin,
    Balance::LeastSessions,
    Balance::RandomTwo,
];

fn client(number: u32) -> ClientAddr {
    let ip = Ipv4Addr::from_bits(0x0a00_0000 + number);
    ClientAddr(SocketAddr::from((ip, 1)))
}

fn member(number: usize, weight: u16) -> Member {
    let port = u16::try_from(number + 1).unwrap();
    Member {
        address: ServerAddr(SocketAddr::from(([192, 0, 2, 1], port))),
        weight,
        backup: false,
        state: State::Up,
    }
}

fn of_weights(weights: &[u16]) -> Vec<Member> {
    let numbered = weights.iter().enumerate();
    numbered
        .map(|(number, weight)| member(number, *weight))
        .collect()
}

/// A balancer and its plan.
struct Planned {
    plan: Arc<Plan>,
    balancer: Balancer,
}

impl Planned {
    fn new(plan: Arc<Plan>, start: usize, seed: u64) -> Self {
        let balancer = Balancer::new(start, seed);
        Self { plan, balancer }
    }

    fn pick(&mut self, client: ClientAddr, sessions: impl Fn(usize) -> u64) -> Option<usize> {
        self.balancer.pick(&self.plan, client, sessions)
    }
}

fn balancer(balance: Balance, members: &[Member]) -> Planned {
    Planned::new(Arc::new(Plan::new(balance, members)), 0, 7)
}

/// Sessions of each server after so many clients, none of which ends.
fn fill(balancer: &mut Planned, servers: usize, clients: u32) -> Vec<u64> {
    let mut sessions = vec![0; servers];
    for number in 0..clients {
        let picked = balancer.pick(client(number), |server| sessions[server]);
        sessions[picked.unwrap()] += 1;
    }
    sessions
}

#[expect(clippy::cast_precision_loss, reason = "they are few")]
fn float(number: u64) -> f64 {
    number as f64
}

fn weights(max: u16) -> impl Strategy<Value = Vec<u16>> {
    prop::collection::vec(1..=max, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Exactly by weight, or by chance not far from it.
    #[test]
    fn each_server_gets_its_share(weights in weights(20)) {
        const CLIENTS: u32 = 20_000;
        let total: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
        for balance in BALANCES {
            let mut balancer = balancer(balance, &of_weights(&weights));
            let sessions = fill(&mut balancer, weights.len(), CLIENTS);
            for (had, weight) in sessions.iter().zip(&weights) {
                let expected = f64::from(CLIENTS) * f64::from(*weight) / total;
                let near = match balance {
                    // Some weights put a turn a little more than one session off.
                    Balance::RoundRobin => 2.0,
                    // One session more weighs the less, the heavier the server.
                    Balance::LeastSessions => f64::from(*weight).max(1.0),
                    // Two choices keep what is by chance from adding up.
                    Balance::RandomTwo => 0.05 * expected + 20.0,
                    Balance::Maglev(_) => 6.0 * expected.sqrt() + 6.0,
                };
                prop_assert!(
                    (float(*had) - expected).abs() <= near,
                    "{balance}: {had}, not {expected}: {sessions:?} by {weights:?}"
                );
            }
        }
    }

    /// Wherever a balancer begins, the server with the least load is picked.
    #[test]
    fn the_least_load_is_picked(
        servers in prop::collection::vec((1..=MAX_WEIGHT, 0..1000u64), 1..40),
        start in 0..50usize,
    ) {
        let (weights, sessions): (Vec<_>, Vec<_>) = servers.into_iter().unzip();
        let plan = Arc::new(Plan::new(Balance::LeastSessions, &of_weights(&weights)));
        let mut balancer = Planned::new(plan, start, 0);
        let load = |server: usize| float(sessions[server] + 1) / f64::from(weights[server]);
        let picked = balancer.pick(client(0), |server| sessions[server]).unwrap();
        let least = (0..weights.len()).map(load).fold(f64::MAX, f64::min);
        // What a session costs is rounded to one in 2²⁴ ÷ 256.
        prop_assert!(load(picked) <= least * 1.0001);
    }

    /// Whatever is up, drained, down or a backup: sessions go where they may, and
    /// everywhere there.
    #[test]
    fn sessions_go_where_they_may(kinds in prop::collection::vec((any::<bool>(), 0..3u8), 1..8)) {
        let members: Vec<_> = kinds.iter().enumerate().map(|(number, (backup, state))| Member {
            backup: *backup,
            state: [State::Up, State::Draining, State::Down][usize::from(*state)],
            ..member(number, 1)
        }).collect();
        let of = |backup: bool, states: &[State]| -> Vec<usize> {
            let is = |m: &Member| m.backup == backup && states.contains(&m.state);
            (0..members.len()).filter(|index| is(&members[*index])).collect()
        };
        let all = [State::Up, State::Draining, State::Down];
        let may = [
            of(false, &[State::Up]),
            of(true, &[State::Up]),
            of(false, &[State::Down]),
            of(true, &[State::Down]),
            of(false, &all),
            of(true, &all),
        ].into_iter().find(|servers| !servers.is_empty()).unwrap();
        for balance in BALANCES {
            let mut balancer = balancer(balance, &members);
            let sessions = fill(&mut balancer, members.len(), 500);
            let used: Vec<_> = (0..members.len()).filter(|index| sessions[*index] > 0).collect();
            prop_assert_eq!(&used, &may, "{}", balance);
        }
    }
}

#[test]
fn workers_begin_elsewhere() {
    for balance in [Balance::RoundRobin, Balance::LeastSessions] {
        let plan = Arc::new(Plan::new(balance, &of_weights(&[1, 1, 1])));
        let first = |worker| {
            let mut balancer = Planned::new(Arc::clone(&plan), worker, 0);
            let turns: Vec<_> = (0..4).map(|n| balancer.pick(client(n), |_| 0)).collect();
            turns.into_iter().flatten().collect::<Vec<_>>()
        };
        assert_eq!(first(2), [2, 0, 1, 2]);
        assert_eq!(first(4), [1, 2, 0, 1]);
    }
    for balance in BALANCES {
        assert_eq!(balancer(balance, &[]).pick(client(1), |_| 0), None);
    }
}

#[test]
fn of_many_servers_the_next_in_turn_are_compared() {
    let members = of_weights(&[1; 200]);
    let mut balancer = balancer(Balance::LeastSessions, &members);
    let mut sessions = vec![1; members.len()];
    sessions[70] = 0;
    sessions[199] = 0;
    let mut begin = |sessions: &mut [u64], numbers: std::ops::Range<u32>| {
        for number in numbers {
            let picked = balancer.pick(client(number), |server| sessions[server]);
            sessions[picked.unwrap()] += 1;
        }
    };
    // Free ones are found within as many picks as it takes to come to them.
    begin(&mut sessions, 0..200);
    assert!(sessions[70] > 0 && sessions[199] > 0, "{sessions:?}");
    begin(&mut sessions, 200..5_000);
    let (least, most) = (sessions.iter().min(), sessions.iter().max());
    assert!(most.unwrap() - least.unwrap() <= 2, "{sessions:?}");
}

#[test]
fn two_choices_avoid_the_server_that_has_more() {
    // 1 in 3⁵ of the draws finds nobody else.
    let mut balancer = balancer(Balance::RandomTwo, &of_weights(&[1, 1, 1]));
    let busy = |server: usize| if server == 0 { 1000 } else { 0 };
    let hit = (0..10_000).filter(|n| balancer.pick(client(*n), busy) == Some(0));
    assert!(hit.count() < 200);
}

#[test]
fn a_server_that_is_back_has_its_clients_back() {
    const CLIENTS: u32 = 10_000;
    let up = of_weights(&[1; 4]);
    let mut one_down = up.clone();
    one_down[2].state = State::Down;
    let [up, one_down] = [&up, &one_down].map(|m| Arc::new(Plan::new(BALANCES[0], m)));
    let mut balancer = Planned::new(Arc::clone(&up), 0, 0);
    let mut picks = |plan: &Arc<Plan>| -> Vec<_> {
        balancer.plan = Arc::clone(plan);
        (0..CLIENTS)
            .map(|n| balancer.pick(client(n), |_| 0))
            .collect()
    };
    let (before, meanwhile, after) = (picks(&up), picks(&one_down), picks(&up));
    assert_eq!(before, after);
    let pairs = || before.iter().zip(&meanwhile);
    assert!(pairs().all(|(_, new)| *new != Some(2)));
    let others = pairs().filter(|(old, new)| **old != Some(2) && old != new);
    assert!(others.count() < 100, "one in a hundred");
}
