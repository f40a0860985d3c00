//! Checks and status of the servers of whole configurations.

mod checks;

use std::collections::HashSet;
use std::net::UdpSocket;
use std::time::Duration;

use super::*;
use crate::access_log::Unlogged;
use crate::config::Config;
use crate::metrics::{Counted, Format, Metrics};
use crate::registry::Registry;
use ppv2_engine::capacity::Capacity;
use ppv2_engine::upstream::State;

fn metrics() -> Arc<Metrics> {
    Arc::new(Metrics::new(
        Counted::default(),
        Capacity::new(1, 1),
        Unlogged::default(),
    ))
}

#[test]
fn servers_of_one_name_have_distinct_labels_and_are_drained_together() {
    let text = "[[listener]]\nbind = [\"127.0.0.1:5300\"]\nupstream = \"u\"\n\
                [upstream.u]\nservers = [\"192.0.2.1:53\", \"192.0.2.2:53\", \"192.0.2.3:53\"]\n";
    let mut config = Config::from_toml("test.toml", text).unwrap();
    for server in &mut config.servers[1..] {
        server.name = "srv.lan:53".to_owned();
    }
    // It stands before the one that the name leads to now.
    config.servers[1].leaving = true;
    let active = Registry::new(1).activate(config);
    let status = Arc::new(Status::default());
    status.reconfigure(&active, Instant::now());
    let text = metrics()
        .text(Format::OpenMetrics, [Box::new(Arc::clone(&status)) as _])
        .unwrap();
    let series: Vec<_> = text
        .lines()
        .filter(|line| line.starts_with("ppv2_upstream_up{"))
        .collect();
    assert_eq!(series.len(), 3);
    assert_eq!(series.iter().collect::<HashSet<_>>().len(), 3, "{text}");
    let leaving = "ppv2_upstream_up{upstream=\"u\",server=\"srv.lan:53 (192.0.2.2:53)\"} 1";
    assert!(series.contains(&leaving), "{text}");

    let states = || -> Vec<_> {
        let standings = status.standings(&active, Instant::now());
        standings.iter().map(|standing| standing.state).collect()
    };
    assert!(status.drain("u", "srv.lan:53", true));
    assert_eq!(states(), [State::Up, State::Draining, State::Draining]);
    assert!(status.drain("u", "192.0.2.3:53", false));
    assert_eq!(states(), [State::Up, State::Draining, State::Up]);
    assert!(!status.drain("u", "192.0.2.4:53", true));
}

#[test]
fn an_upstream_whose_servers_hang_delays_no_probes_of_another() {
    // On all addresses of loopback, and silent.
    let hangs = UdpSocket::bind("0.0.0.0:0").unwrap();
    let port = hangs.local_addr().unwrap().port();
    let silent: Vec<_> = (256..1256)
        .map(|n| format!("\"127.0.{}.{}:{port}\"", n / 256, n % 256))
        .collect();
    let address = ppv2_lab::address("127.0.0.1");
    let upstream = |name: &str, servers: &str| {
        format!(
            "[[listener]]\nname = \"{name}\"\nbind = [\"127.1.0.1:1{name}\"]\n\
             upstream = \"{name}\"\n[upstream.{name}]\nservers = [{servers}]\n\
             health = {{ every = \"400ms\", timeout = \"400ms\", probe = {{ kind = \"udp\" }} }}\n"
        )
    };
    let text = upstream("1", &silent.join(", ")) + &upstream("2", &format!("\"{address}\""));
    let active = Registry::new(1).activate(Config::from_toml("test.toml", &text).unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut health = Health::default();
        health.reconfigure(&active, Instant::now());
        let status = Arc::clone(&health.status);
        let is_down = || {
            let standings = status.standings(&active, Instant::now());
            standings.last().map(|standing| standing.state) == Some(State::Down)
        };
        while !is_down() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // Three probes of the dead server do not wait until each of a thousand that
        // hang, 64 at a time, has had one.
        let text = metrics()
            .text(Format::OpenMetrics, [Box::new(Arc::clone(&status)) as _])
            .unwrap();
        let timeouts = text
            .lines()
            .filter(|line| line.contains("result=\"timeout\"} 1"));
        let asked = timeouts.count();
        assert!(asked < 1000, "{asked}");
    });
}

/// Configurations of an upstream `u` with these servers, each with whether it drains.
fn with_servers(registry: &mut Registry, servers: &[(u16, bool)]) -> ActiveConfig {
    let servers: Vec<_> = servers
        .iter()
        .map(|(port, drain)| format!("{{ address = \"192.0.2.1:{port}\", drain = {drain} }}"))
        .collect();
    let text = format!(
        "[[listener]]\nbind = [\"127.0.0.1:5300\"]\nupstream = \"u\"\n\
         [upstream.u]\nservers = [{}]\n",
        servers.join(", ")
    );
    registry.activate(Config::from_toml("test.toml", &text).unwrap())
}

fn drains(status: &Status, active: &ActiveConfig) -> Vec<bool> {
    let standings = status.standings(active, Instant::now());
    let states = standings.iter().map(|standing| standing.state);
    states.map(|state| state == State::Draining).collect()
}

#[test]
fn a_drain_request_survives_its_servers_absence_until_the_configuration_changes() {
    let (mut registry, status) = (Registry::new(1), Status::default());
    let mut reconfigure = |servers: &[(u16, bool)]| {
        let active = with_servers(&mut registry, servers);
        status.reconfigure(&active, Instant::now());
        drains(&status, &active)
    };
    let all = [
        (1, false),
        (2, false),
        (3, true),
        (4, false),
        (5, false),
        (9, false),
    ];
    reconfigure(&all);
    for port in [1, 2, 4, 5] {
        assert!(status.drain("u", &format!("192.0.2.1:{port}"), true));
    }
    assert!(status.drain("u", "192.0.2.1:3", false));
    assert!(!status.drain("v", "192.0.2.1:1", true));
    assert_eq!(reconfigure(&[(9, false)]), [false]);
    // Requests while they are gone.
    assert!(!status.drain("u", "192.0.2.1:6", false));
    assert!(status.drain("u", "192.0.2.1:4", true));
    assert!(status.drain("u", "192.0.2.1:5", false));
    // The configuration now says so of the second.
    let all = [(1, false), (2, true), (3, true), (4, false), (5, false)];
    assert_eq!(reconfigure(&all), [true, true, false, true, false]);
    let all = [(1, false), (2, false), (3, true), (4, true), (5, false)];
    assert_eq!(reconfigure(&all), [true, false, false, true, false]);
    let all = [(4, false)];
    assert_eq!(reconfigure(&all), [false]);
}

#[test]
fn drain_requests_of_servers_that_left_first_are_forgotten_first() {
    let (mut registry, status) = (Registry::new(1), Status::default());
    for port in 1..=1026 {
        // The one before leaves.
        let active = with_servers(&mut registry, &[(port, false)]);
        status.reconfigure(&active, Instant::now());
        assert!(status.drain("u", &format!("192.0.2.1:{port}"), true));
    }
    for (port, is_known) in [(1, false), (2, true), (1025, true)] {
        let server = format!("192.0.2.1:{port}");
        assert_eq!(status.drain("u", &server, true), is_known, "{port}");
    }
}
