//! The objects that stand for listeners and servers, over all configurations that follow
//! each other.
//!
//! A listener is the same in two configurations by its name, a server by its upstream and
//! its address. As long as anything holds the object of one, such as a configuration in
//! force or a session, another configuration that has it gets the same object, with its
//! counters.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::sync::{Arc, Weak};

use ppv2_engine::address::ServerAddr;
use ppv2_engine::listener::Listener;
use ppv2_engine::server::Server;

use crate::config::Config;

/// All objects that anything holds.
#[derive(Debug)]
pub struct Registry {
    workers: usize,
    listeners: Vec<Weak<Listener>>,
    servers: Vec<Weak<Server>>,
}

/// A configuration, and the objects of what is in it.
#[derive(Debug)]
pub struct ActiveConfig {
    /// The configuration.
    pub config: Config,
    /// Its listeners, in its order.
    pub listeners: Vec<Arc<Listener>>,
    /// Its servers, in its order.
    pub servers: Vec<Arc<Server>>,
}

impl Registry {
    /// No objects yet; so many workers will count in them.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        Self {
            workers,
            listeners: Vec::new(),
            servers: Vec::new(),
        }
    }

    /// Finds or makes the objects of all that is in `config`, and gives servers their
    /// labels.
    pub fn activate(&mut self, config: Config) -> ActiveConfig {
        let workers = self.workers;
        let names = config.listeners.iter().map(|listener| &listener.name);
        let listeners = find_or_make(
            &mut self.listeners,
            |listener| listener.name.clone(),
            names.map(|name| (name.clone(), move || Listener::new(name, workers))),
        );
        let servers = config.servers.iter().map(|server| {
            let (upstream, name, address) = (&server.upstream, &server.name, server.id());
            let make = move || Server::new(upstream, name, address, workers);
            ((upstream.clone(), address), make)
        });
        let servers = find_or_make(
            &mut self.servers,
            |server| (server.upstream.clone(), server.address),
            servers,
        );
        self.label(&config, &servers);
        ActiveConfig {
            config,
            listeners,
            servers,
        }
    }

    /// Finds or makes the object of a server that sessions of another process have, which may
    /// be in no configuration any more.
    pub fn server(&mut self, upstream: &str, name: &str, address: ServerAddr) -> Arc<Server> {
        let held = self.servers.iter().filter_map(Weak::upgrade);
        let found = held
            .into_iter()
            .find(|one| one.upstream == upstream && one.address == address);
        found.unwrap_or_else(|| {
            let made = Server::new(upstream, name, address, self.workers);
            made.set_label(format!("{name} ({})", address.0));
            self.servers.push(Arc::downgrade(&made));
            made
        })
    }

    /// All servers. Those that nothing holds any more can't be upgraded.
    #[must_use]
    pub fn servers(&self) -> Vec<Weak<Server>> {
        self.servers.clone()
    }

    /// Labels servers as the configuration names them. Where that name led to another
    /// address before, and anything holds that server still, its label has its address
    /// behind the name. One that is written to at the port that its client wrote to stays
    /// the same with other ports, and its label names those of now.
    fn label(&self, config: &Config, servers: &[Arc<Server>]) {
        let named = config.servers.iter().zip(servers);
        let named = named.filter(|(written, server)| {
            !written.leaving && (server.name == written.name || written.ports.is_some())
        });
        let named = named.map(|(written, server)| (Arc::clone(server), written.name.clone()));
        let all = self.servers.iter().filter_map(Weak::upgrade);
        let all = all.map(|server| {
            let name = server.name.clone();
            (server, name)
        });
        let (mut done, mut taken) = (HashSet::new(), HashSet::new());
        for (server, name) in named.chain(all) {
            if !done.insert(server.id()) {
                continue;
            }
            let is_first = taken.insert((server.upstream.clone(), name.clone()));
            server.set_label(match (is_first, server.has_same_port()) {
                (true, _) => name,
                (false, false) => format!("{name} ({})", server.address),
                (false, true) => format!("{name} ({})", server.address.0.ip()),
            });
        }
    }
}

/// The objects of these identities, each of which is made if nothing holds it.
fn find_or_make<T, I: Eq + Hash>(
    held: &mut Vec<Weak<T>>,
    identity: impl Fn(&T) -> I,
    wanted: impl Iterator<Item = (I, impl FnOnce() -> Arc<T>)>,
) -> Vec<Arc<T>> {
    held.retain(|one| one.strong_count() > 0);
    let known = held.iter().filter_map(Weak::upgrade);
    let mut known: HashMap<_, _> = known.map(|one| (identity(&one), one)).collect();
    let wanted = wanted.map(|(identity, make)| {
        let found = known.entry(identity).or_insert_with(|| {
            let made = make();
            held.push(Arc::downgrade(&made));
            made
        });
        Arc::clone(found)
    });
    wanted.collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config;

    fn config(servers: &[&str]) -> Config {
        let text = format!(
            "[[listener]]\nbind = [\"127.0.0.1:5300\"]\nupstream = \"u\"\n\
             [upstream.u]\nservers = {servers:?}\n"
        );
        Config::from_toml("test.toml", &text).unwrap()
    }

    fn held(registry: &Registry) -> usize {
        let all = registry.servers();
        all.iter().filter(|one| one.strong_count() > 0).count()
    }

    #[test]
    fn a_server_is_the_same_as_long_as_anything_holds_it() {
        const A: &str = "192.0.2.1:53";
        const B: &str = "192.0.2.2:53";
        const C: &str = "192.0.2.3:53";
        let mut registry = Registry::new(1);
        let first = registry.activate(config(&[A, B]));
        let turned = registry.activate(config(&[B, A]));
        assert_eq!(turned.servers[1], first.servers[0]);
        assert_eq!(turned.servers[0], first.servers[1]);
        // A session with A goes on, though the configuration is gone.
        let session = Arc::clone(&first.servers[0]);
        let listener = Arc::clone(&first.listeners[0]);
        drop((first, turned));
        let second = registry.activate(config(&[B, C]));
        assert_eq!(
            (second.listeners[0].clone(), held(&registry)),
            (listener, 3)
        );
        let back = registry.activate(config(&[A, B]));
        assert_eq!(back.servers[0], session);
        let before = session.id();
        drop((second, back, session));
        assert_eq!(held(&registry), 0);
        // Nothing held it: it begins with counters at zero.
        let later = registry.activate(config(&[A]));
        assert_ne!(later.servers[0].id(), before);
        assert_eq!(registry.servers().len(), 1);
    }

    #[test]
    fn no_two_servers_have_the_same_label() {
        // A name that leads elsewhere each time that the file is read.
        let led_to = |last: u8| {
            let mut config = config(&["192.0.2.1:53", "192.0.2.9:53"]);
            config.servers[0].name = "srv.lan:53".to_owned();
            config.servers[0].address.0 = ([192, 0, 2, last], 53).into();
            config
        };
        let labels = |active: &ActiveConfig| -> Vec<_> {
            active.servers.iter().map(|server| server.label()).collect()
        };
        let mut registry = Registry::new(1);
        let first = registry.activate(led_to(1));
        assert_eq!(labels(&first), ["srv.lan:53", "192.0.2.9:53"]);
        let second = registry.activate(led_to(2));
        let mut leaving = led_to(3);
        leaving.servers.push(led_to(1).servers.remove(0));
        leaving.servers[2].leaving = true;
        let third = registry.activate(leaving);
        let (old, older) = ("srv.lan:53 (192.0.2.2:53)", "srv.lan:53 (192.0.2.1:53)");
        assert_eq!(labels(&third), ["srv.lan:53", "192.0.2.9:53", older]);
        assert_eq!(labels(&second), [old, "192.0.2.9:53"]);
        drop((first, second, third));
        // It is back where it was.
        let back = registry.activate(led_to(1));
        assert_eq!(labels(&back), ["srv.lan:53", "192.0.2.9:53"]);
    }

    proptest! {
        /// Configurations follow each other in any order, and anything may hold servers and
        /// listeners of earlier ones: an identity has one object as long as it is held, no
        /// other identity has it, and objects that nothing holds are forgotten.
        #[test]
        fn an_object_stands_for_one_server_or_listener(
            steps in prop::collection::vec(
                (prop::collection::btree_set(1..12u8, 1..6), any::<u8>(), any::<bool>()), 1..40),
        ) {
            let mut registry = Registry::new(1);
            let mut held: Vec<(Arc<Server>, Arc<Listener>)> = Vec::new();
            let mut before: Option<ActiveConfig> = None;
            for (numbers, which, holds) in steps {
                let names: Vec<_> = numbers.iter().map(|n| format!("192.0.2.{n}:53")).collect();
                let names: Vec<_> = names.iter().map(String::as_str).collect();
                let mut wanted = config(&names);
                let one = wanted.listeners.remove(0);
                wanted.listeners.extend(names.iter().map(|name| config::Listener {
                    name: (*name).to_owned(),
                    ..one.clone()
                }));
                let active = registry.activate(wanted);
                let pairs = |active: &ActiveConfig| -> Vec<_> {
                    let servers = active.servers.iter().cloned();
                    servers.zip(active.listeners.iter().cloned()).collect()
                };
                let in_force = before.iter().flat_map(pairs);
                for (server, listener) in held.iter().cloned().chain(in_force) {
                    for (other, its) in pairs(&active) {
                        prop_assert_eq!(server == other, server.name == other.name);
                        prop_assert_eq!(listener == its, listener.name == its.name);
                    }
                }
                if holds {
                    held.push(pairs(&active)[usize::from(which) % active.servers.len()].clone());
                } else if !held.is_empty() {
                    held.swap_remove(usize::from(which) % held.len());
                }
                let most = held.len() + 1 + 2 * 5;
                prop_assert!(registry.servers.len() <= most && registry.listeners.len() <= most);
                before = Some(active);
            }
        }
    }
}
