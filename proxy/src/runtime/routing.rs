//! Where sessions go, by the configuration and by how the servers stand.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::config::{Config, Listener};
use crate::health::Standing;
use crate::registry::ActiveConfig;
use ppv2_engine::mode::Mode;
use ppv2_engine::snapshot::{Routing, TargetRules};
use ppv2_engine::upstream::{ByFamily, MAX_WEIGHT, Member, Plan, State};

/// By how much weights are multiplied where servers start slowly, if they are small
/// enough: in so many steps a server of weight 1 gets its share.
const FINENESS: u16 = 10;

/// Where the sessions of each listener go with the servers of `active` that stand like
/// this, by their place in the configuration. Sessions leave a server that is down, unless
/// all are and their upstream fails open.
pub(super) fn routing(active: &ActiveConfig, standings: &[Standing]) -> Vec<Routing> {
    let config = &active.config;
    let listeners = config.listeners.iter().zip(plans(config, standings));
    let routing = listeners.map(|(listener, plans)| {
        let targets = listener.servers.iter().chain(&listener.leaving);
        let rules = targets.enumerate().map(|(place, (server, _))| {
            let standing = standings[*server];
            let is_new = place < listener.servers.len();
            let serves = ByFamily::new(|v6| is_new && plans.get(v6).serves(place));
            let may_return = listener.returns && standing.has_returned;
            let is_down = standing.state == State::Down;
            TargetRules {
                leave: ByFamily::new(|v6| is_down && !serves.get(v6)),
                takes_back: ByFamily::new(|v6| may_return && *serves.get(v6)),
                is_draining: standing.state == State::Draining,
            }
        });
        let rules = rules.collect();
        Routing { plans, rules }
    });
    routing.collect()
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
                let fails_open = server
                    .health
                    .as_ref()
                    .is_none_or(|health| health.fail_open.0);
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
            reason = "a part of the weight, which is at most 256"
        )]
        let share = (f64::from(whole) * standing.share) as u16;
        Member {
            address: server.id(),
            weight: share.clamp(1, whole),
            backup: server.backup,
            state: standing.state,
        }
    };
    servers().map(member).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Registry;
    use ppv2_engine::address::ClientAddr;
    use ppv2_engine::upstream::Balancer;

    fn active(keys: &str, servers: &str) -> ActiveConfig {
        let text = format!(
            "[[listener]]\nbind = [\"127.0.0.1:5300\"]\nupstream = \"u\"\n\
             [upstream.u]\n{keys}\nservers = [{servers}]\n"
        );
        Registry::new(1).activate(Config::from_toml("test.toml", &text).unwrap())
    }

    const FOUR: &str = "\"192.0.2.1:53\", \"192.0.2.2:53\", \"192.0.2.3:53\", \"192.0.2.4:53\"";

    /// The servers that a thousand clients get.
    fn picks(routing: &[Routing]) -> Vec<usize> {
        let plan = Arc::clone(routing[0].plans.get(false));
        let mut balancer = Balancer::new(0, 1);
        let client = |n: u32| ClientAddr((n.to_be_bytes(), 1000).into());
        let mut sessions = [0; 4];
        let mut pick = |n| {
            let server = balancer
                .pick(&plan, client(n), |server| sessions[server])
                .unwrap();
            sessions[server] += 1;
            server
        };
        (1..=1000).map(&mut pick).collect()
    }

    #[test]
    fn a_server_that_starts_slowly_gets_its_part_of_a_share() {
        for balance in ["maglev", "round_robin", "least_sessions", "random_two"] {
            let active = active(&format!("balance = \"{balance}\""), FOUR);
            let of = |share| {
                let mut standings = [Standing::UP; 4];
                standings[2].share = share;
                let routing = routing(&active, &standings);
                picks(&routing).iter().filter(|pick| **pick == 2).count()
            };
            // Of 1,000, beside three whole ones: share ÷ (3 + share).
            for (share, expected) in [(0.0, 33), (0.1, 33), (0.5, 143), (0.9, 231), (1.0, 250)] {
                let had = of(share);
                assert!(had.abs_diff(expected) < 60, "{balance} {share}: {had}");
            }
        }
    }

    #[test]
    fn only_a_server_that_starts_slowly_takes_clients_of_others() {
        let active = active("", FOUR);
        let mut before = None;
        for tenth in 0..=10_u32 {
            let mut standings = [Standing::UP; 4];
            standings[1].share = f64::from(tenth) / 10.0;
            let now = picks(&routing(&active, &standings));
            let before: Vec<_> = before.replace(now.clone()).unwrap_or_else(|| now.clone());
            let strays = now
                .iter()
                .zip(before)
                .filter(|(now, before)| *now != before && **now != 1);
            // Maglev moves some whose slot is taken.
            assert!(strays.count() <= 20);
        }
    }

    #[test]
    fn servers_are_left_where_another_serves_that_family() {
        let servers =
            "\"192.0.2.1:53\", { address = \"[2001:db8::1]:53\", mode = \"transparent\" }";
        let active = active("", servers);
        let down = Standing {
            state: State::Down,
            ..Standing::UP
        };
        // The second one alone could serve no IPv4 client: the first is not left
        // for these, though it is down, since its upstream fails open.
        let routing = routing(&active, &[down, Standing::UP]);
        let leave = routing[0].rules.iter().map(|rules| rules.leave);
        let only_v6 = ByFamily::new(|v6| v6);
        assert_eq!(leave.collect::<Vec<_>>(), [only_v6, ByFamily::default()]);
    }
}
