//! A plan: which servers of an upstream take new sessions now, and how these are
//! spread over them.
//!
//! Built off the data path, from what is known of the servers at that time, and
//! never changed; workers share it by an `Arc`. When a server goes down or comes
//! back, another plan is built and handed to them. Of the same servers in the
//! same states it is the same plan, so clients that a failure moved come back.

use std::fmt;

use super::affinity::HashOn;
use super::maglev::Table;
use super::turns;
use crate::address::ServerAddr;

/// How an upstream's servers are chosen for new sessions. All heed weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balance {
    /// The same server for the same client, also by other proxies with the same
    /// servers.
    Maglev(HashOn),
    /// One after the other.
    RoundRobin,
    /// The server that has the fewest sessions for its weight; of many servers,
    /// the one that has of the next few in turn.
    LeastSessions,
    /// Of two drawn at random, the one that has fewer sessions for its weight.
    RandomTwo,
}

impl Default for Balance {
    fn default() -> Self {
        Self::Maglev(HashOn::ClientIp { ipv6_prefix: 64 })
    }
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Maglev(HashOn::ClientIp { ipv6_prefix }) => {
                write!(f, "maglev, hash_on client_ip (IPv6 by /{ipv6_prefix})")
            }
            Self::Maglev(HashOn::ClientAddr) => f.write_str("maglev, hash_on client_addr"),
            Self::RoundRobin => f.write_str("round_robin"),
            Self::LeastSessions => f.write_str("least_sessions"),
            Self::RandomTwo => f.write_str("random_two"),
        }
    }
}

/// Whether a server takes new sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It does.
    Up,
    /// It keeps the sessions that it has and gets no new ones, as an operator
    /// asked.
    Draining,
    /// It doesn't answer.
    Down,
}

/// What a plan must know of a server.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// Where it listens.
    pub address: ServerAddr,
    /// Its share of the sessions beside the others', from 1 to
    /// [`MAX_WEIGHT`](super::MAX_WEIGHT).
    pub weight: u16,
    /// Whether it only stands in for the others.
    pub backup: bool,
    /// Whether it takes new sessions.
    pub state: State,
}

/// Which servers take new sessions, and how these are spread over them.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    pub(super) spread: Spread,
    /// Those that take new sessions.
    serving: Box<[u16]>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Spread {
    Maglev {
        hash_on: HashOn,
        table: Table,
    },
    /// A round of turns.
    RoundRobin(Box<[u16]>),
    /// Servers, in turn.
    LeastSessions(Box<[Weighted]>),
    /// A round of turns to draw from, and the costs of all servers.
    RandomTwo {
        turns: Box<[u16]>,
        costs: Box<[u32]>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Weighted {
    pub(super) server: u16,
    pub(super) cost: u32,
}

/// What a session costs a server of weight 1: enough to tell all weights apart,
/// and little enough for 2⁴⁰ sessions.
const COST: u32 = 1 << 24;

/// What one session costs a server of this weight.
fn cost(weight: u16) -> u32 {
    COST / u32::from(weight.max(1))
}

impl Plan {
    /// The plan without servers.
    #[must_use]
    pub fn none() -> Self {
        Self::new(Balance::RoundRobin, &[])
    }

    /// The plan for an upstream of these servers, of which there are
    /// at most [`MAX_SERVERS`](super::MAX_SERVERS). It names them by their
    /// index in `members`.
    #[must_use]
    pub fn new(balance: Balance, members: &[Member]) -> Self {
        Self::among(balance, members, |_| true)
    }

    /// As [`new`](Self::new), of the servers alone whose index passes `can_serve`.
    #[must_use]
    pub fn among(balance: Balance, members: &[Member], can_serve: impl Fn(usize) -> bool) -> Self {
        let serving = serving(members, can_serve);
        let weights: Vec<_> = serving
            .iter()
            .map(|index| members[usize::from(*index)].weight.max(1))
            .collect();
        let turns = || -> Box<[u16]> {
            let round = turns::round(&weights);
            round
                .iter()
                .map(|turn| serving[usize::from(*turn)])
                .collect()
        };
        let spread = match balance {
            Balance::Maglev(hash_on) => {
                let addresses = serving.iter().map(|i| members[usize::from(*i)].address);
                let servers: Vec<_> = addresses.zip(weights.iter().copied()).collect();
                Spread::Maglev {
                    hash_on,
                    table: Table::build(&servers, &serving),
                }
            }
            Balance::RoundRobin => Spread::RoundRobin(turns()),
            Balance::LeastSessions => {
                let weighted = serving.iter().zip(&weights);
                let weighted = weighted.map(|(server, weight)| Weighted {
                    server: *server,
                    cost: cost(*weight),
                });
                Spread::LeastSessions(weighted.collect())
            }
            Balance::RandomTwo => Spread::RandomTwo {
                turns: turns(),
                costs: members.iter().map(|member| cost(member.weight)).collect(),
            },
        };
        Self {
            spread,
            serving: serving.into(),
        }
    }

    /// Whether the server of this index takes new sessions.
    #[must_use]
    pub fn serves(&self, index: usize) -> bool {
        self.serving.iter().any(|one| usize::from(*one) == index)
    }
}

/// The servers that take new sessions: the primary ones that are up; without
/// those the backups that are up; and if none is, all primary ones, since what
/// says that they are down may be wrong and to send nothing is certainly so. A
/// draining server gets sessions only where there are no others.
///
/// # Panics
///
/// If there are more than 65,536.
fn serving(members: &[Member], can_serve: impl Fn(usize) -> bool) -> Vec<u16> {
    let choices: [fn(&Member) -> bool; 6] = [
        |m| !m.backup && m.state == State::Up,
        |m| m.state == State::Up,
        |m| !m.backup && m.state != State::Draining,
        |m| m.state != State::Draining,
        |m| !m.backup,
        |_| true,
    ];
    let chosen = |choice: fn(&Member) -> bool| {
        let numbered = members.iter().enumerate();
        let chosen = numbered.filter(|(index, member)| can_serve(*index) && choice(member));
        let index = |(index, _)| u16::try_from(index).expect("fewer than 2^16 servers");
        chosen.map(index).collect::<Vec<_>>()
    };
    let mut choices = choices.into_iter().map(chosen);
    choices
        .find(|chosen| !chosen.is_empty())
        .unwrap_or_default()
}
