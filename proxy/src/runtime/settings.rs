//! What workers need of the configuration.

use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;

use crate::config::{Listener, Network, PerClient};
use crate::roster::Roll;
use ppv2_engine::session::{Clients, Rates};
use ppv2_engine::upstream::Server;
use ppv2_engine::worker::ListenerSettings;
use ppv2_udp::Options;

/// The settings of all listeners, by number. Those that are no longer there stay as
/// they were `before`, which is nothing at the start; what is counted of clients
/// goes on.
pub(super) fn settings(
    roll: &Roll,
    before: Option<(&Roll, &[Arc<ListenerSettings>])>,
) -> Vec<Arc<ListenerSettings>> {
    let mut all: Vec<_> = before.map_or_else(Vec::new, |(_, settings)| settings.to_vec());
    for (number, listener) in roll.listeners() {
        let old = before.and_then(|(roll, settings)| {
            let (_, old) = roll.listeners().find(|(of, _)| *of == number)?;
            Some((old.per_client, &*settings[number]))
        });
        let settings = Arc::new(of_listener(roll, listener, old));
        if number < all.len() {
            all[number] = settings;
        } else {
            // Numbers are given in this order.
            all.push(settings);
        }
    }
    all
}

fn of_listener(
    roll: &Roll,
    listener: &Listener,
    old: Option<(PerClient, &ListenerSettings)>,
) -> ListenerSettings {
    let config = &roll.config;
    let servers = listener.servers.iter().chain(&listener.leaving);
    let server = |(index, mode): &(usize, _)| {
        let (number, name) = &roll.servers[*index];
        let server = &config.servers[*index];
        Server {
            number: *number,
            name: Arc::clone(name),
            address: server.address,
            mode: *mode,
            sources: Arc::clone(&server.sources),
        }
    };
    ListenerSettings {
        name: listener.name.as_str().into(),
        rules: listener.rules(),
        allow: networks(&listener.allow),
        deny: networks(&listener.deny),
        peers: networks(config.peers.as_deref().unwrap_or_default()),
        clients: clients(listener.per_client, old),
        rates: rates(listener.per_client, old),
        entrance: entrance_options(listener),
        dont_fragment: listener.dont_fragment,
        dscp: listener.dscp,
        servers: servers.map(server).collect(),
    }
}

/// What a listener's sockets to clients are made for.
pub(super) fn entrance_options(listener: &Listener) -> Options {
    Options {
        dont_fragment: listener.dont_fragment,
        bursts: !listener.rules().count_requests(),
    }
}

fn networks(of: &[Network]) -> Vec<IpNet> {
    of.iter().map(|network| network.0).collect()
}

fn clients(wanted: PerClient, old: Option<(PerClient, &ListenerSettings)>) -> Option<Arc<Clients>> {
    let most = *wanted.sessions?;
    let same = old.filter(|(old, _)| old.ipv6_prefix == wanted.ipv6_prefix);
    let Some(clients) = same.and_then(|(_, settings)| settings.clients.as_ref()) else {
        return Some(Clients::new(most, *wanted.ipv6_prefix));
    };
    clients.resize(most);
    Some(Arc::clone(clients))
}

fn rates(wanted: PerClient, old: Option<(PerClient, &ListenerSettings)>) -> Option<Arc<Rates>> {
    let (rate, burst) = wanted.rate()?;
    let same =
        old.filter(|(old, _)| (old.rate(), old.ipv6_prefix) == (wanted.rate(), wanted.ipv6_prefix));
    let Some(rates) = same.and_then(|(_, settings)| settings.rates.as_ref()) else {
        let rates = Rates::new(Instant::now(), rate, burst, *wanted.ipv6_prefix);
        return Some(Arc::new(rates));
    };
    Some(Arc::clone(rates))
}
