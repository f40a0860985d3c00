//! Which servers sessions may stay with, and for how long.

use std::time::Duration;

use super::*;
use crate::registry::Registry;

fn config(servers: &str) -> Config {
    let text = format!(
        "[[listener]]\nname = \"l\"\nbind = [\"127.0.0.1:5300\"]\nupstream = \"u\"\n\
         [upstream.u]\nlame_duck = \"10s\"\nservers = [{servers}]\n"
    );
    Config::from_toml("test.toml", &text).unwrap()
}

/// As if a name led to its servers.
fn found(mut config: Config) -> Config {
    for server in &mut config.servers {
        let name = "srv:_a._udp.example".to_owned();
        server.found_by = Some(crate::config::Name::Srv { name });
    }
    config
}

const A: &str = "\"192.0.2.1:53\"";
const B: &str = "\"192.0.2.2:53\"";

fn addresses(config: &Config, servers: &[(usize, Mode)]) -> Vec<String> {
    let servers = servers.iter();
    servers
        .map(|(index, _)| config.servers[*index].address.to_string())
        .collect()
}

#[test]
fn a_server_that_is_taken_out_stays_for_its_time_and_no_longer() {
    let now = Instant::now();
    let after = |seconds| now + Duration::from_secs(seconds);
    let (mut registry, mut ducks) = (Registry::new(1), LameDucks::default());
    let both = registry.activate(config(&format!("{A}, {B}")));

    let mut one = config(A);
    ducks.update(&mut one, &both, now);
    assert_eq!(addresses(&one, &one.listeners[0].servers), ["192.0.2.1:53"]);
    assert_eq!(addresses(&one, &one.listeners[0].leaving), ["192.0.2.2:53"]);
    assert!(one.servers[1].leaving && !one.servers[0].leaving);
    assert_eq!(ducks.next(), Some(after(10)));
    let one = registry.activate(one);
    assert_eq!(one.servers, both.servers);

    // Another change meanwhile does not restart its time.
    let mut again = config(A);
    ducks.update(&mut again, &one, after(5));
    assert_eq!(
        addresses(&again, &again.listeners[0].leaving),
        ["192.0.2.2:53"]
    );
    assert_eq!(ducks.next(), Some(after(10)));
    let again = registry.activate(again);
    let mut gone = config(A);
    ducks.update(&mut gone, &again, after(10));
    assert!(gone.listeners[0].leaving.is_empty() && gone.servers.len() == 1);
    assert_eq!(ducks.next(), None);

    // One that comes back is as before.
    let mut back = config(&format!("{A}, {B}"));
    ducks.update(&mut back, &again, after(6));
    assert!(back.listeners[0].leaving.is_empty() && back.servers.len() == 2);
    assert_eq!(ducks.next(), None);
}

#[test]
fn a_name_that_leads_elsewhere_all_the_time_leaves_a_bounded_trail() {
    let (mut registry, mut ducks) = (Registry::new(1), LameDucks::default());
    let mut now = Instant::now();
    let mut before = registry.activate(found(config(A)));
    for n in 0..2_000_u32 {
        now += Duration::from_millis(10);
        let mut next = found(config(&format!("\"10.0.{}.{}:53\"", n / 250, 1 + n % 250)));
        ducks.update(&mut next, &before, now);
        before = registry.activate(next);
        assert!(before.config.servers.len() <= MAX_LAME_DUCKS + 1);
        // Servers that are gone and have no sessions are forgotten.
        let known = registry.servers().len();
        assert!(known <= 2 * MAX_LAME_DUCKS + 2, "{known}");
    }
}

#[test]
fn a_name_that_leads_elsewhere_all_the_time_cuts_no_other_listeners_time() {
    let with = |servers: &str| {
        let text = format!(
            "[[listener]]\nname = \"l\"\nbind = [\"127.0.0.1:5300\"]\nupstream = \"u\"\n\
             [[listener]]\nname = \"m\"\nbind = [\"127.0.0.1:5301\"]\nupstream = \"v\"\n\
             [upstream.u]\nlame_duck = \"60s\"\nservers = [{servers}]\n\
             [upstream.v]\nlame_duck = \"10s\"\nservers = [{A}{}]\n",
            if servers == A {
                format!(", {B}")
            } else {
                String::new()
            }
        );
        found(Config::from_toml("test.toml", &text).unwrap())
    };
    let (mut registry, mut ducks) = (Registry::new(1), LameDucks::default());
    let now = Instant::now();
    let mut before = registry.activate(with(A));
    for n in 0..300_u32 {
        let mut next = with(&format!("\"10.0.{}.{}:53\"", n / 250, 1 + n % 250));
        ducks.update(&mut next, &before, now + Duration::from_millis(n.into()));
        before = registry.activate(next);
    }
    let listeners = &before.config.listeners;
    assert_eq!(listeners[0].leaving.len(), MAX_LAME_DUCKS);
    let of_other = addresses(&before.config, &listeners[1].leaving);
    assert_eq!(of_other, ["192.0.2.2:53"]);
}

#[test]
fn servers_that_were_written_have_their_time_however_many_they_are() {
    let many: Vec<_> = (0..2 * MAX_LAME_DUCKS)
        .map(|n| format!("\"10.0.{}.{}:53\"", n / 250, 1 + n % 250))
        .collect();
    let (mut registry, mut ducks) = (Registry::new(1), LameDucks::default());
    let before = registry.activate(config(&many.join(", ")));
    let mut one = config(A);
    ducks.update(&mut one, &before, Instant::now());
    assert_eq!(one.listeners[0].leaving.len(), 2 * MAX_LAME_DUCKS);
}
