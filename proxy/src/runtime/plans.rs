//! Where workers are to take sessions, made of the configuration and of what is
//! known of the servers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::config::{Config, Listener};
use crate::health::Standing;
use crate::mode::Mode;
use crate::roster::Roll;
use crate::upstream::{Balance, ByFamily, MAX_WEIGHT, Member, Plan, Route, State, Steering};

/// By how much weights are multiplied where servers start slowly, if they are small
/// enough: in so many steps a server of weight 1 gets its share.
const FINENESS: u16 = 10;

/// Where sessions go with the servers of `roll` that stand like this, by their place
/// in the configuration. A server that is down is left, unless all are and their
/// upstream fails open.
pub(super) fn steer(roll: &Roll, standings: &[Standing], version: u64) -> Steering {
    let config = &roll.config;
    let nobody = Arc::new(Plan::new(Balance::RoundRobin, &[]));
    let mut steering = Steering {
        version,
        plans: vec![ByFamily::new(|_| Arc::clone(&nobody)); roll.counts.0],
        leave: BTreeSet::new(),
        returns: BTreeSet::new(),
        draining: BTreeSet::new(),
    };
    let plans = plans(config, standings);
    for ((number, listener), plans) in roll.listeners().zip(plans) {
        let servers = listener.servers.iter().chain(&listener.leaving);
        for (index, (server, _)) in servers.enumerate() {
            let standing = standings[*server];
            for v6 in [false, true] {
                let route = Route {
                    listener: number,
                    server: roll.server(*server),
                    v6,
                };
                let serves = index < listener.servers.len() && plans.get(v6).serves(index);
                if standing.state == State::Down && !serves {
                    steering.leave.insert(route);
                }
                if listener.returns && standing.has_returned && serves {
                    steering.returns.insert(route);
                }
            }
        }
        steering.plans[number] = plans;
    }
    let draining = |index: &usize| standings[*index].state == State::Draining;
    let servers = (0..config.servers.len()).filter(draining);
    steering.draining = servers.map(|index| roll.server(index)).collect();
    steering
}

/// The plans of each listener's upstream; those of the same servers are shared.
fn plans(config: &Config, standings: &[Standing]) -> Vec<ByFamily<Arc<Plan>>> {
    let mut known = BTreeMap::new();
    let mut of_listener = |listener: &Listener| {
        let members = members(config, listener, standings);
        let serves: ByFamily<Vec<bool>> = ByFamily::new(|v6| {
            let servers = listener.servers.iter();
            let serves = |(index, mode): &(usize, Mode)| {
                let server = &config.servers[*index];
                let fails_open = server.health.as_ref().is_none_or(|health| health.fail_open);
                let may_serve = fails_open || standings[*index].state != State::Down;
                may_serve && mode.reaches(server.address, v6)
            };
            servers.map(serves).collect()
        });
        ByFamily::new(|v6| {
            let serves = serves.get(v6);
            let plan = known
                .entry((listener.upstream.clone(), serves.clone()))
                .or_insert_with(|| {
                    Arc::new(Plan::among(listener.balance, &members, |index| {
                        serves[index]
                    }))
                });
            Arc::clone(plan)
        })
    };
    config.listeners.iter().map(&mut of_listener).collect()
}

/// The servers of a listener's upstream, in the order in which the listener has
/// them.
fn members(config: &Config, listener: &Listener, standings: &[Standing]) -> Vec<Member> {
    let servers = || listener.servers.iter().map(|(index, _)| *index);
    let all_started = servers().all(|index| standings[index].share >= 1.0);
    let heaviest = servers().map(|index| config.servers[index].weight).max();
    let fineness = match heaviest {
        Some(heaviest) if !all_started => FINENESS.min(MAX_WEIGHT / heaviest.max(1)).max(1),
        _ => 1,
    };
    let member = |index: usize| {
        let server = &config.servers[index];
        let standing = standings[index];
        let whole = server.weight * fineness;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a part of the weight, which is 256 at the most"
        )]
        let share = (f64::from(whole) * standing.share) as u16;
        Member {
            address: server.address,
            weight: share.clamp(1, whole),
            backup: server.backup,
            state: standing.state,
        }
    };
    servers().map(member).collect()
}
