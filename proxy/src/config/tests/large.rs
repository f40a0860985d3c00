//! Configurations as large as a generator may write them.

use std::fmt::Write as _;
use std::sync::mpsc;
use std::thread;

use super::*;

/// Reads `content`, and fails if that takes so long that work must grow with the square
/// of its size.
fn read_soon(content: String) -> Result<Config, ConfigError> {
    let (done, is_done) = mpsc::channel();
    thread::spawn(move || {
        let _ = done.send(Config::from_toml("x", &content));
    });
    let read = is_done.recv_timeout(Duration::from_secs(60));
    read.expect("the configuration is still being checked")
}

/// Address number `n` of many.
fn address(n: usize) -> String {
    let [.., a, b, c] = n.to_be_bytes();
    format!("127.{a}.{b}.{c}:5300")
}

const UPSTREAM: &str = "[upstream.u]\nservers = [\"192.0.2.1:53\"]\n";

#[test]
fn many_addresses_are_checked_in_one_pass() {
    let bind: Vec<_> = (1..=300_000).map(address).collect();
    let config = read_soon(format!(
        "[[listener]]\nbind = {bind:?}\nupstream = \"u\"\n{UPSTREAM}"
    ));
    assert_eq!(config.unwrap().listeners[0].bind.len(), 300_000);
}

#[test]
fn many_listeners_are_checked_in_one_pass() {
    let mut content = String::new();
    for n in 1..=50_000 {
        let (name, bind) = (
            format!("a listener with a long name, number {n}"),
            address(n),
        );
        let _ = write!(
            content,
            "[[listener]]\nname = \"{name}\"\nbind = [\"{bind}\"]\nupstream = \"u\"\n"
        );
    }
    let config = read_soon(content + UPSTREAM);
    assert_eq!(config.unwrap().listeners.len(), 50_000);
}

#[test]
fn too_many_servers_are_refused_before_they_are_resolved() {
    for odd in ["127.0.0.1:5300", "no.such.name.invalid:53"] {
        let mut servers: Vec<_> = (1..=300_000).map(address).collect();
        servers[0] = odd.to_owned();
        servers[1] = odd.to_owned();
        let content = format!(
            "[[listener]]\nbind = [\"127.0.0.1:5300\"]\nupstream = \"u\"\n\
             [upstream.u]\nservers = {servers:?}\n"
        );
        let message = read_soon(content).unwrap_err().to_string();
        let bound = "upstream `u` has 300000 servers";
        assert!(message.contains(bound), "{message}");
        assert!(message.contains("give at most 2000"), "{message}");
    }
}

#[test]
fn servers_of_an_upstream_share_its_source_addresses() {
    let servers: Vec<_> = (1..=100).map(address).collect();
    let content = format!(
        "[[listener]]\nbind = [\"0.0.0.0:53\"]\nupstream = \"u\"\n[upstream.u]\n\
         source = [\"192.0.2.1\", \"2001:db8::1\", \"192.0.2.1\", \"192.0.2.2\"]\nservers = {servers:?}\n"
    );
    let config = Config::from_toml("x", &content).unwrap();
    let first = config.servers[0].sources.addresses();
    assert_eq!(first.len(), 2);
    let same = |server: &Server| std::ptr::eq(server.sources.addresses(), first);
    assert!(config.servers.iter().all(same));
    assert_eq!(config.sources().len(), 2);
}
