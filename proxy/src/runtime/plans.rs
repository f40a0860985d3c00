//! Where workers are to take sessions, made of the configuration and of what is
//! known of the servers.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::config::{Config, Listener};
use crate::mode::Mode;
use crate::upstream::{ByFamily, Member, Plan, State, Steering};

/// The states of all servers while nothing is known of them but what the
/// configuration says.
pub(super) fn configured_states(config: &Config) -> Vec<State> {
    let state = |drain| if drain { State::Draining } else { State::Up };
    let servers = config.servers.iter();
    servers.map(|server| state(server.drain)).collect()
}

/// Where sessions go with the servers, by number, in these `states`. A server that
/// is down is left, unless all are and their upstream fails open.
pub(super) fn steer(config: &Config, states: &[State]) -> Steering {
    let plans = plans(config, states);
    let leave = (0..config.servers.len()).map(|server| {
        let still_serves = config
            .listeners
            .iter()
            .zip(&plans)
            .any(|(listener, plans)| {
                let index = listener
                    .servers
                    .iter()
                    .position(|(number, _)| *number == server);
                index.is_some_and(|index| plans.iter().any(|plan| plan.serves(index)))
            });
        states[server] == State::Down && !still_serves
    });
    Steering {
        leave: leave.collect(),
        plans,
    }
}

/// The plans of each listener's upstream; those of the same servers are shared.
fn plans(config: &Config, states: &[State]) -> Vec<ByFamily<Arc<Plan>>> {
    let mut known = BTreeMap::new();
    let mut of_listener = |listener: &Listener| {
        let members = members(config, listener, states);
        let serves: ByFamily<Vec<bool>> = ByFamily::new(|v6| {
            let servers = listener.servers.iter();
            let serves = |(number, mode): &(usize, Mode)| {
                let server = &config.servers[*number];
                let fails_open = server.health.as_ref().is_none_or(|health| health.fail_open);
                (fails_open || states[*number] != State::Down) && mode.reaches(server.address, v6)
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
fn members(config: &Config, listener: &Listener, states: &[State]) -> Vec<Member> {
    let member = |(number, _): &(usize, _)| {
        let server = &config.servers[*number];
        Member {
            address: server.address,
            weight: server.weight,
            backup: server.backup,
            state: states[*number],
        }
    };
    listener.servers.iter().map(member).collect()
}
