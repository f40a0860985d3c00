//! Numbers: which listener and which server workers and counters mean by each, for
//! as long as the process runs.
//!
//! A configuration names listeners and servers by their place in it, which another
//! configuration may give to others. A number stays with its listener, by name, and
//! with its server, by upstream and address, for as long as anybody goes by it; a
//! server that comes back meanwhile is the same one. Numbers that nobody goes by any
//! more are given out again, so that there are never more of them than servers in
//! use, however often a name leads elsewhere.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use crate::config::{Config, Listener, Server};
use crate::upstream::ServerName;

/// All numbers that were given out.
#[derive(Debug, Default)]
pub struct Roster {
    /// Names of listeners, by number. As many as operators have ever written.
    listeners: Vec<String>,
    /// Servers, by number.
    servers: Vec<Enrolled>,
}

#[derive(Debug)]
struct Enrolled {
    name: Arc<ServerName>,
    address: SocketAddr,
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
    /// Numbers that were another server's before.
    pub anew: Vec<usize>,
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
        let listeners = config.listeners.iter();
        let listeners = listeners.map(|listener| self.listener(&listener.name));
        let listeners = listeners.collect();
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
        let servers = servers.collect();
        Roll {
            config,
            listeners,
            servers,
            anew,
            counts: (self.listeners.len(), self.servers.len()),
        }
    }

    /// The names of all listeners, by number.
    #[must_use]
    pub fn listeners(&self) -> &[String] {
        &self.listeners
    }

    /// What servers go by, by number; `None` for those that nobody goes by any more.
    #[must_use]
    pub fn servers(&self) -> Vec<Option<(String, String)>> {
        let servers = self.servers.iter();
        servers
            .map(|one| {
                let name = &one.name;
                let is_in_use = one.is_in_use();
                is_in_use.then(|| (name.upstream.clone(), name.server.clone()))
            })
            .collect()
    }

    fn listener(&mut self, name: &str) -> usize {
        let known = self.listeners.iter().position(|known| known == name);
        known.unwrap_or_else(|| {
            self.listeners.push(name.to_owned());
            self.listeners.len() - 1
        })
    }
}

impl Enrolled {
    fn of(server: &Server) -> Self {
        let name = ServerName {
            upstream: server.upstream.clone(),
            server: server.name.clone(),
        };
        Self {
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

    proptest! {
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
