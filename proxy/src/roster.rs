//! Numbers: which listener and which server workers and counters mean by each, for
//! as long as the process runs.
//!
//! A configuration names listeners and servers by their place in it, which another
//! configuration may give to others. A number stays with its listener, by name, and
//! with its server, by upstream and address, for as long as anybody goes by it; a
//! server that comes back meanwhile is the same one. Numbers that nobody goes by any
//! more are given out again, so that there are never more of them than servers in
//! use, however often a name leads elsewhere. That of a listener which is gone rests
//! before, since sockets of its sessions do.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::{Config, Listener, Server};
use ppv2_engine::upstream::ServerName;

/// How long the number of a listener that is gone is no other's: longer than the sockets
/// of its sessions rest, on which late replies are counted.
const LISTENER_REST: Duration = Duration::from_secs(600);

/// All numbers that were given out.
#[derive(Debug, Default)]
pub struct Roster {
    /// Listeners, by number. As many as there have been within [`LISTENER_REST`].
    listeners: Vec<Listed>,
    /// Servers, by number.
    servers: Vec<Enrolled>,
}

/// Whose the number of a listener is.
#[derive(Debug)]
enum Listed {
    /// A listener's, by name, which is there or not yet forgotten.
    Held(String),
    /// Nobody's, since then. It may be the same listener's again at any time.
    Rests(String, Instant),
}

#[derive(Debug)]
struct Enrolled {
    name: Arc<ServerName>,
    address: SocketAddr,
    /// What metrics call it.
    label: String,
}

/// A configuration, and the numbers of what is in it.
#[derive(Debug)]
pub struct Roll {
    /// The configuration.
    pub config: Config,
    /// The number of each listener.
    pub listeners: Vec<usize>,
    /// The number of each server, and what it goes by.
    pub servers: Vec<(usize, Arc<ServerName>)>,
    /// What metrics call each server; no two of an upstream the same.
    pub labels: Vec<String>,
    /// Numbers that were another server's before.
    pub anew: Vec<usize>,
    /// Numbers that were another listener's before.
    pub listeners_anew: Vec<usize>,
    /// How many numbers listeners and servers have.
    pub counts: (usize, usize),
}

impl Roll {
    /// The numbers of listeners and servers, with what is configured of each.
    pub fn listeners(&self) -> impl Iterator<Item = (usize, &Listener)> {
        self.listeners.iter().copied().zip(&self.config.listeners)
    }

    /// The number of a server by its place in the configuration.
    #[must_use]
    pub fn server(&self, index: usize) -> usize {
        self.servers[index].0
    }
}

impl Roster {
    /// Gives numbers to all listeners and servers of `config`.
    pub fn enroll(&mut self, config: Config) -> Roll {
        let (listeners, listeners_anew) = self.enlist(&config, Instant::now());
        let known: HashMap<_, _> = self
            .servers
            .iter()
            .enumerate()
            .map(|(number, one)| ((one.name.upstream.as_str(), one.address), number))
            .collect();
        let numbers: Vec<_> = config
            .servers
            .iter()
            .map(|server| {
                known
                    .get(&(server.upstream.as_str(), server.address.0))
                    .copied()
            })
            .collect();
        let kept: HashSet<_> = numbers.iter().flatten().copied().collect();
        let mut free: Vec<_> = (0..self.servers.len())
            .rev()
            .filter(|number| !self.servers[*number].is_in_use() && !kept.contains(number))
            .collect();
        let mut anew = Vec::new();
        let servers = config.servers.iter().zip(numbers).map(|(server, number)| {
            let number = number.unwrap_or_else(|| {
                let enrolled = Enrolled::of(server);
                if let Some(number) = free.pop() {
                    self.servers[number] = enrolled;
                    anew.push(number);
                    return number;
                }
                self.servers.push(enrolled);
                self.servers.len() - 1
            });
            (number, Arc::clone(&self.servers[number].name))
        });
        let servers: Vec<_> = servers.collect();
        self.label(&config, &servers);
        let label = |(number, _): &(usize, _)| self.servers[*number].label.clone();
        let labels = servers.iter().map(label).collect();
        Roll {
            config,
            listeners,
            servers,
            labels,
            anew,
            listeners_anew,
            counts: (self.listeners.len(), self.servers.len()),
        }
    }

    /// The names of listeners, by number; `None` for those that were forgotten.
    #[must_use]
    pub fn listeners(&self) -> Vec<Option<String>> {
        let listeners = self.listeners.iter();
        listeners
            .map(|listed| match listed {
                Listed::Held(name) => Some(name.clone()),
                Listed::Rests(..) => None,
            })
            .collect()
    }

    /// Forgets a listener that no configuration has and nobody goes by any more. In some
    /// minutes, another one gets its number.
    pub fn forget_listener(&mut self, number: usize, now: Instant) {
        if let Some(listed) = self.listeners.get_mut(number)
            && let Listed::Held(name) = listed
        {
            *listed = Listed::Rests(std::mem::take(name), now);
        }
    }

    /// Servers' upstreams and what metrics call them, by number; `None` for those that
    /// nobody goes by any more.
    #[must_use]
    pub fn servers(&self) -> Vec<Option<(String, String)>> {
        let servers = self.servers.iter();
        servers
            .map(|one| {
                let is_in_use = one.is_in_use();
                is_in_use.then(|| (one.name.upstream.clone(), one.label.clone()))
            })
            .collect()
    }

    /// Has metrics call servers what is written. Where that led to another address
    /// before, and somebody goes by it still, that one has its address behind it.
    fn label(&mut self, config: &Config, servers: &[(usize, Arc<ServerName>)]) {
        let stays = config.servers.iter().zip(servers);
        let stays =
            stays.filter(|(server, (_, name))| !server.leaving && server.name == name.server);
        let first: Vec<_> = stays.map(|(_, (number, _))| *number).collect();
        let (mut done, mut taken) = (HashSet::new(), HashSet::new());
        for number in first.into_iter().chain(0..self.servers.len()) {
            let one = &mut self.servers[number];
            if !one.is_in_use() || !done.insert(number) {
                continue;
            }
            let ServerName { upstream, server } = &*one.name;
            one.label = if taken.insert((upstream.clone(), server.clone())) {
                server.clone()
            } else {
                format!("{server} ({})", one.address)
            };
        }
    }

    /// The numbers of the listeners of `config`, and those of them that begin anew.
    fn enlist(&mut self, config: &Config, now: Instant) -> (Vec<usize>, Vec<usize>) {
        let names: Vec<_> = config.listeners.iter().map(|l| l.name.as_str()).collect();
        let wanted: HashSet<_> = names.iter().copied().collect();
        let known = self.listeners.iter().enumerate();
        let known: HashMap<_, _> = known
            .map(|(number, listed)| (listed.name().to_owned(), number))
            .collect();
        let is_free = |listed: &Listed| match listed {
            Listed::Held(_) => false,
            Listed::Rests(name, since) => {
                let rested = now.saturating_duration_since(*since) >= LISTENER_REST;
                rested && !wanted.contains(name.as_str())
            }
        };
        let listed = self.listeners.iter().enumerate().rev();
        let mut free: Vec<_> = listed
            .filter(|(_, one)| is_free(one))
            .map(|(n, _)| n)
            .collect();
        let mut anew = Vec::new();
        let mut number_of = |name: &str| {
            let known = known.get(name).copied();
            let number = known.or_else(|| free.pop()).unwrap_or(self.listeners.len());
            let held = Listed::Held(name.to_owned());
            match self.listeners.get_mut(number) {
                None => self.listeners.push(held),
                Some(Listed::Held(_)) => {}
                Some(rests) => {
                    if rests.name() != name {
                        anew.push(number);
                    }
                    *rests = held;
                }
            }
            number
        };
        let numbers = names.into_iter().map(&mut number_of).collect();
        (numbers, anew)
    }
}

impl Listed {
    fn name(&self) -> &str {
        match self {
            Self::Held(name) | Self::Rests(name, _) => name,
        }
    }
}

impl Enrolled {
    fn of(server: &Server) -> Self {
        let name = ServerName {
            upstream: server.upstream.clone(),
            server: server.name.clone(),
        };
        Self {
            label: name.server.clone(),
            name: Arc::new(name),
            address: server.address.0,
        }
    }

    /// Whether anybody but the roster holds the name.
    fn is_in_use(&self) -> bool {
        Arc::strong_count(&self.name) > 1
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config(servers: &[&str]) -> Config {
        let text = format!(
            "[[listener]]\nbind = [\"127.0.0.1:5300\"]\nupstream = \"u\"\n\
             [upstream.u]\nservers = {servers:?}\n"
        );
        Config::from_toml("test.toml", &text).unwrap()
    }

    fn numbers(roll: &Roll) -> Vec<usize> {
        roll.servers.iter().map(|(number, _)| *number).collect()
    }

    #[test]
    fn a_number_is_its_servers_as_long_as_anybody_goes_by_it() {
        const A: &str = "192.0.2.1:53";
        const B: &str = "192.0.2.2:53";
        const C: &str = "192.0.2.3:53";
        let mut roster = Roster::default();
        let first = roster.enroll(config(&[A, B]));
        assert_eq!((numbers(&first), first.counts), (vec![0, 1], (1, 2)));
        // Their order is of no account.
        let turned = roster.enroll(config(&[B, A]));
        assert_eq!(numbers(&turned), [1, 0]);
        // A session with A keeps its number from C, though the configuration is gone.
        let session = Arc::clone(&first.servers[0].1);
        drop((first, turned));
        let second = roster.enroll(config(&[B, C]));
        assert_eq!((numbers(&second), second.counts.1), (vec![1, 2], 3));
        assert_eq!(second.anew, [0; 0]);
        assert!(roster.servers().iter().all(Option::is_some));
        // A is back, and the same.
        let back = roster.enroll(config(&[A, B]));
        assert_eq!(numbers(&back), [0, 1]);
        drop((second, back, session));
        assert_eq!(roster.servers(), [None, None, None]);
        // Nobody goes by any number, so another server begins anew with one.
        let other = roster.enroll(config(&["192.0.2.4:53"]));
        assert_eq!((numbers(&other), &*other.anew), (vec![0], &[0][..]));
        assert_eq!(other.counts.1, 3);
    }

    #[test]
    fn numbers_of_listeners_that_are_gone_are_given_out_again() {
        let mut roster = Roster::default();
        let mut now = Instant::now();
        let named = |name: String| {
            let mut config = config(&["192.0.2.1:53"]);
            config.listeners[0].name = name;
            config
        };
        // A name of its own with each reload, once a minute.
        for reload in 0..1000 {
            let (numbers, _) = roster.enlist(&named(format!("listener {reload}")), now);
            assert!(numbers[0] <= 10, "{numbers:?} at reload {reload}");
            assert_eq!(roster.listeners().iter().flatten().count(), 1);
            roster.forget_listener(numbers[0], now);
            now += Duration::from_secs(60);
        }
        assert_eq!(roster.listeners.len(), 10);
    }

    #[test]
    fn metrics_call_no_two_servers_the_same() {
        // A name that leads elsewhere each time that the file is read.
        let led_to = |last: u8| {
            let mut config = config(&["192.0.2.1:53", "192.0.2.9:53"]);
            config.servers[0].name = "srv.lan:53".to_owned();
            config.servers[0].address.0 = ([192, 0, 2, last], 53).into();
            config
        };
        let mut roster = Roster::default();
        let first = roster.enroll(led_to(1));
        assert_eq!(first.labels, ["srv.lan:53", "192.0.2.9:53"]);
        let second = roster.enroll(led_to(2));
        let mut leaving = led_to(3);
        leaving.servers.push(led_to(1).servers.remove(0));
        leaving.servers[2].leaving = true;
        let third = roster.enroll(leaving);
        let (old, older) = ("srv.lan:53 (192.0.2.2:53)", "srv.lan:53 (192.0.2.1:53)");
        assert_eq!(third.labels, ["srv.lan:53", "192.0.2.9:53", older]);
        let labels = |roster: &Roster| -> Vec<_> {
            let servers = roster.servers().into_iter().flatten();
            servers.map(|(_, label)| label).collect()
        };
        let expected = [older, "192.0.2.9:53", old, "srv.lan:53"];
        assert_eq!(labels(&roster), expected);
        drop((first, second, third));
        // It is back where it was.
        let back = roster.enroll(led_to(1));
        assert_eq!(back.labels, ["srv.lan:53", "192.0.2.9:53"]);
        assert_eq!(labels(&roster), back.labels);
    }

    proptest! {
        /// Whatever listeners come, go and are forgotten: a number means one of them until
        /// it has rested, and there are no more numbers than listeners within that time.
        #[test]
        fn a_number_means_one_listener(
            steps in prop::collection::vec(
                (prop::collection::btree_set(1..9u8, 1..4), 0..700u64, any::<bool>()), 1..40),
        ) {
            let mut roster = Roster::default();
            let mut now = Instant::now();
            // Whose each number is or was last, since when nobody's, and what was counted.
            let mut last: Vec<(String, Option<Instant>)> = Vec::new();
            for (listeners, seconds, forgets) in steps {
                let names: Vec<_> = listeners.iter().map(|n| format!("l{n}")).collect();
                let mut wanted = config(&["192.0.2.1:53"]);
                let one = wanted.listeners.remove(0);
                wanted.listeners.extend(names.iter().map(|name| Listener {
                    name: name.clone(),
                    ..one.clone()
                }));
                let (numbers, anew) = roster.enlist(&wanted, now);
                let distinct: HashSet<_> = numbers.iter().collect();
                prop_assert_eq!(distinct.len(), names.len());
                for (number, name) in numbers.iter().zip(&names) {
                    let begins_anew = match last.get(*number) {
                        None => false,
                        Some((before, None)) => {
                            prop_assert_eq!(before, name);
                            false
                        }
                        Some((before, Some(since))) => {
                            prop_assert!(before == name || now - *since >= LISTENER_REST);
                            before != name
                        }
                    };
                    prop_assert_eq!(anew.contains(number), begins_anew);
                    if *number == last.len() {
                        last.push((name.clone(), None));
                    } else {
                        last[*number] = (name.clone(), None);
                    }
                }
                let shown = roster.listeners();
                for (number, (name, since)) in last.iter_mut().enumerate() {
                    prop_assert_eq!(shown[number].as_ref(), since.is_none().then_some(&*name));
                    if forgets && since.is_none() && !numbers.contains(&number) {
                        roster.forget_listener(number, now);
                        *since = Some(now);
                    }
                }
                // Eight names are all that there are.
                prop_assert!(roster.listeners.len() <= 8);
                now += Duration::from_secs(seconds);
            }
        }

        /// Whatever configurations follow each other and whoever goes on by a name of
        /// an earlier one: a number means one server, and there are no more numbers
        /// than servers that anybody goes by, and those of one configuration more.
        #[test]
        fn a_number_means_one_server(
            steps in prop::collection::vec(
                (prop::collection::btree_set(1..12u8, 1..6), any::<u8>(), any::<bool>()), 1..40),
        ) {
            let mut roster = Roster::default();
            let mut held: Vec<(usize, Arc<ServerName>)> = Vec::new();
            let mut before: Option<Roll> = None;
            let mut most = 0;
            for (servers, which, holds) in steps {
                let names: Vec<_> = servers.iter().map(|n| format!("192.0.2.{n}:53")).collect();
                let names: Vec<_> = names.iter().map(String::as_str).collect();
                let roll = roster.enroll(config(&names));
                let in_force = before.iter().flat_map(|roll| &roll.servers);
                for (number, name) in held.iter().chain(in_force) {
                    for (other, its) in &roll.servers {
                        prop_assert_eq!(number == other, name.server == its.server);
                    }
                    prop_assert!(!roll.anew.contains(number));
                }
                let numbers: HashSet<_> = numbers(&roll).into_iter().collect();
                prop_assert_eq!(numbers.len(), servers.len());
                if holds {
                    held.push(roll.servers[usize::from(which) % roll.servers.len()].clone());
                } else if !held.is_empty() {
                    held.swap_remove(usize::from(which) % held.len());
                }
                most = most.max(held.len());
                prop_assert!(roll.counts.1 <= most + 2 * 5);
                before = Some(roll);
            }
        }
    }
}
