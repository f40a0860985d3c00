//! Every error names its place and what to write instead; what is right is kept.

use std::net::IpAddr;

use clap::Parser;

mod accept;
mod balance;
mod guards;
mod header;
mod health;
mod large;
mod modes;
mod names;
mod replies;
mod same_port;
mod server_changes;
mod sources;
mod upgrade;

use super::*;
use crate::cli::{Arguments, Command};
use ppv2_engine::mode::Emit;

mod warnings;

const GOOD: &str = r#"
workers = 2
drain_timeout = "1s"

[limits]
max_sessions = 100

[admin]
listen = "127.0.0.1:9901"

[[listener]]
name = "dns"
bind = ["0.0.0.0:5353", "[::]:5353"]
upstream = "resolvers"
idle_timeout = "10s"
responses = 1
requests = 2
allow = ["192.0.2.0/24", "2001:db8::1"]
dont_fragment = true

[upstream.resolvers]
balance = "round_robin"
header = { emit = "first", crc32c = true }
servers = ["192.0.2.10:53", { address = "[2001:db8::10]:53", mode = "plain" }]
"#;

/// What `run --listen … --upstream …` reads.
fn from_flags(listen: &str, upstream: &str) -> Result<Config, ConfigError> {
    let run = [
        "ppv2-proxy",
        "run",
        "--listen",
        listen,
        "--upstream",
        upstream,
    ];
    let Command::Run(run) = Arguments::parse_from(run).command else {
        panic!("it is `run`");
    };
    run.config()
}

fn error(content: &str) -> String {
    Config::from_toml("proxy.toml", content)
        .unwrap_err()
        .to_string()
}

/// The error that GOOD gives with `from` replaced by `to`.
fn broken(from: &str, to: &str) -> String {
    assert!(GOOD.contains(from), "{from}");
    error(&GOOD.replacen(from, to, 1))
}

#[test]
fn a_full_file_is_read() {
    let config = Config::from_toml("proxy.toml", GOOD).unwrap();
    assert_eq!(config.worker_count(), 2);
    assert_eq!(*config.limits.max_sessions.unwrap(), 100);
    assert_eq!(*config.drain_timeout, Duration::from_secs(1));
    assert_eq!(config.admin(), Some(&"127.0.0.1:9901".parse().unwrap()));
    let listener = &config.listeners[0];
    assert_eq!(listener.name, "dns");
    assert_eq!(listener.bind.len(), 2);
    assert_eq!(*listener.idle_timeout, Duration::from_secs(10));
    assert_eq!((listener.responses, listener.requests), (1, 2));
    assert!(listener.dont_fragment);
    assert_eq!(listener.allow[1].to_string(), "2001:db8::1/128");
    let first = Mode::Ppv2 {
        emit: Emit::First,
        crc32c: true,
    };
    assert_eq!(listener.servers, [(0, first), (1, Mode::Plain)]);
    assert_eq!(config.servers[1].address.0.to_string(), "[2001:db8::10]:53");
    assert_eq!(config.warnings.len(), 1, "DNS with emit = \"first\"");
}

#[test]
fn flags_and_file_have_the_documented_defaults() {
    let config = from_flags("127.0.0.1:5300", "127.0.0.1:53").unwrap();
    let listener = &config.listeners[0];
    let every = Mode::Ppv2 {
        emit: Emit::Every,
        crc32c: false,
    };
    assert_eq!(listener.servers, [(0, every)]);
    assert_eq!(*listener.idle_timeout, Duration::from_secs(30));
    assert!(config.workers.is_none() && config.limits.max_sessions.is_none());
    assert_eq!(config.admin(), None);
    for client in [IpAddr::from([8; 4]), IpAddr::from([8u16; 8])] {
        assert!(listener.allow.iter().any(|net| net.0.contains(&client)));
    }
    // They are those of a file that says nothing.
    let file = "[[listener]]\nbind = [\"127.0.0.1:5300\"]\nupstream = \"upstream\"\n\
                [upstream.upstream]\nservers = [\"127.0.0.1:53\"]\n";
    let of_file = Config::from_toml("x", file).unwrap();
    assert_eq!(format!("{config:?}"), format!("{of_file:?}"));
}

#[test]
fn an_unknown_key_is_shown_with_the_nearest_known_one() {
    assert_eq!(
        broken("idle_timeout", "idle_timout"),
        r#"proxy.toml:15:1: unknown key `idle_timout`
    |
 15 | idle_timout = "10s"
    | ^^^^^^^^^^^
  = did you mean `idle_timeout`?"#
    );
    for (from, to, expected) in [
        ("workers", "wrokers", "`workers`"),
        ("max_sessions", "max_session", "`max_sessions`"),
        ("crc32c", "crc", "`crc32c`"),
        ("mode =", "mod =", "`mode`"),
        ("[limits]", "[limit]", "`limits`"),
        (
            "dont_fragment = true",
            "xyzzyxyzzy = 1",
            "known keys here: name, bind",
        ),
    ] {
        let message = broken(from, to);
        assert!(message.contains("unknown key"), "{message}");
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn a_former_key_names_what_replaced_it() {
    for (from, to, instead) in [
        ("dont_fragment", "df", "write `dont_fragment`"),
        (
            "balance =",
            "share_sockets = true\nbalance =",
            "a network in `source` gives each session an address",
        ),
        (
            "balance =",
            "health = { jitter = 5 }\nbalance =",
            "write `jitter_percent`",
        ),
        (
            "balance =",
            "health = { passive = { unanswered = 5 } }\nbalance =",
            "write `unanswered_percent`",
        ),
        (
            "balance =",
            "health = { passive = { at_least = 5 } }\nbalance =",
            "write `min_datagrams`",
        ),
        (
            "balance =",
            "health = { probe = { kind = \"udp\", answer = false } }\nbalance =",
            "write `expect_reply`",
        ),
    ] {
        let message = broken(from, to);
        for part in ["proxy.toml:", "no longer exists", instead, "^^"] {
            assert!(message.contains(part), "{to}: no {part} in {message}");
        }
    }
}

#[test]
fn the_schema_describes_every_key() {
    fn check(schema: &serde_json::Value, key: &str, all: &mut usize) {
        for (key, of_key) in schema["properties"].as_object().into_iter().flatten() {
            assert!(
                of_key["description"].is_string(),
                "{key} has no description"
            );
            *all += 1;
            check(of_key, key, all);
        }
        for (name, definition) in schema["$defs"].as_object().into_iter().flatten() {
            check(definition, name, all);
        }
        for form in schema["anyOf"].as_array().into_iter().flatten() {
            check(form, key, all);
        }
        assert_ne!(schema["additionalProperties"], true, "{key}");
    }
    let (schema, mut all) = (Config::schema(), 0);
    check(&schema, "", &mut all);
    assert!(all > 70, "{all} keys");
    let idle_timeout = &schema["$defs"]["Listener"]["properties"]["idle_timeout"];
    assert_eq!(idle_timeout["default"], "30s", "{idle_timeout}");
    let weights = &schema["$defs"]["PerClient"]["properties"]["ipv6_prefix"];
    assert_eq!(
        (&weights["maximum"], &weights["default"]),
        (&128.into(), &64.into())
    );
}

#[test]
fn an_invalid_value_is_shown_with_place_and_fix() {
    for (from, to, place, what, fix) in [
        (
            "workers = 2",
            "workers = 0",
            ":2:11:",
            "workers: 0 is out of range",
            "1 to 1024",
        ),
        (
            "workers = 2",
            "workers = \"two\"",
            ":2:11:",
            "invalid type",
            "",
        ),
        (
            "\"1s\"",
            "\"0s\"",
            ":3:17:",
            "drain_timeout: `0s` is too short",
            "from \"1ms\"",
        ),
        (
            "\"10s\"",
            "\"10\"",
            ":15:16:",
            "listener.idle_timeout: `10` is not a duration",
            "\"500ms\"",
        ),
        (
            "= 100",
            "= 0",
            ":6:16:",
            "limits.max_sessions: 0 is out of range",
            "1 to",
        ),
        (
            "127.0.0.1:9901",
            "127.0.0.1",
            ":9:10:",
            "admin.listen: `127.0.0.1` is neither an IP address with a port nor the path of a socket",
            "unix:/run/ppv2/admin.sock",
        ),
        (
            "127.0.0.1:9901",
            "unix:admin.sock",
            ":9:10:",
            "admin.listen: `admin.sock` is not an absolute path",
            "unix:/run/ppv2/admin.sock",
        ),
        (
            "0.0.0.0:5353",
            "0.0.0.0:0",
            ":13:9:",
            "`0.0.0.0:0` has port 0",
            "name the port",
        ),
        (
            "0.0.0.0:5353",
            "224.0.0.1:53",
            ":13:9:",
            "can't listen on 224.0.0.1:53",
            "wildcard",
        ),
        (
            "[::]:5353",
            "127.0.0.1:5353",
            ":13:25:",
            "overlaps with 0.0.0.0:5353",
            "once",
        ),
        (
            "[::]:5353",
            "127.0.0.1:5000-6000",
            ":13:25:",
            "127.0.0.1:5000-6000 overlaps with 0.0.0.0:5353",
            "once",
        ),
        (
            "\"0.0.0.0:5353\"",
            "\"[::]:5353-5353\", \"[::1]:5000-6000\"",
            ":13:27:",
            "[::1]:5000-6000 overlaps with [::]:5353",
            "once",
        ),
        (
            "[::]:5353",
            "[::]:10000-30000",
            ":13:8:",
            "the ranges of listener `dns` have 20001 addresses",
            "give at most 20000",
        ),
        (
            "[::]:5353",
            "[::]:41-40",
            ":13:25:",
            "first port is after its last",
            "write [::]:40-41",
        ),
        (
            "[\"0.0.0.0:5353\", \"[::]:5353\"]",
            "[]",
            ":13:8:",
            "without an address",
            "at least one",
        ),
        (
            "upstream = \"resolvers\"",
            "upstream = \"resolver\"",
            ":14:12:",
            "no upstream `resolver`",
            "did you mean `resolvers`?",
        ),
        (
            "192.0.2.0/24",
            "192.0.2.0/33",
            ":18:10:",
            "`192.0.2.0/33` is not a network",
            "192.0.2.0/24",
        ),
        (
            "[\"192.0.2.0/24\", \"2001:db8::1\"]",
            "[]",
            ":18:9:",
            "lets no client in",
            "leave the key out",
        ),
        (
            "round_robin",
            "random",
            ":22:11:",
            "upstream.resolvers.balance: `random` is not known",
            "round_robin",
        ),
        (
            "\"first\"",
            "\"sometimes\"",
            ":23:19:",
            "header.emit: `sometimes` is not known",
            "every, first",
        ),
        (
            "\"plain\"",
            "\"direct\"",
            ":24:69:",
            "mode: `direct` is not known",
            "ppv2, transparent, dsr, plain",
        ),
        (
            "192.0.2.10:53",
            "192.0.2.10",
            ":24:12:",
            "`192.0.2.10` has no port",
            "192.0.2.10:53",
        ),
        (
            "192.0.2.10:53",
            "192.0.2.10:0",
            ":24:12:",
            "`192.0.2.10:0` has port 0",
            "listens on",
        ),
        (
            "192.0.2.10:53",
            "no.such.name.invalid:53",
            ":24:12:",
            "does not resolve",
            "resolver",
        ),
        (
            "192.0.2.10:53",
            "[2001:db8::10]:53",
            ":24:33:",
            "twice in upstream `resolvers`",
            "once",
        ),
        (
            "192.0.2.10:53",
            "127.0.0.1:5353",
            ":24:12:",
            "listener `dns` at 0.0.0.0:5353, this proxy's own address",
            "another port",
        ),
        (
            "dont_fragment = true",
            "busy_poll = \"1s\"",
            ":19:13:",
            "busy_poll: `1s` is too long",
            "10ms",
        ),
        (
            "dont_fragment = true",
            "coalesce = \"x\"",
            ":19:12:",
            "coalesce: `x` is not a duration",
            "\"500ms\"",
        ),
        (
            "balance =",
            "source = [\"10.0.0.1:5\"]\nbalance =",
            ":22:11:",
            "source: this is not an IP address",
            "without a port",
        ),
        (
            "balance =",
            "source = [\"0.0.0.0\"]\nbalance =",
            ":22:11:",
            "can't send from 0.0.0.0",
            "this host",
        ),
        (
            "balance =",
            "source = [\"10.0.0.1\"]\nbalance =",
            ":25:",
            "no source address can reach [2001:db8::10]:53",
            "family",
        ),
        ("dont_fragment = true", "df = tru", ":19:", "", ""),
        (
            "\"dns\"",
            "\"\"",
            ":12:8:",
            "name is \"\"",
            "leave `name` out",
        ),
        (
            "\"10s\"",
            "\"49ms\"",
            ":15:16:",
            "idle_timeout: `49ms` is too short",
            "\"50ms\"",
        ),
        (
            "192.0.2.0/24",
            "10.1.2.3/8",
            ":18:10:",
            "`10.1.2.3/8` is an address within a network",
            "10.0.0.0/8, that address alone 10.1.2.3/32",
        ),
        (
            "192.0.2.0/24",
            "::ffff:10.0.0.0/104",
            ":18:10:",
            "`::ffff:10.0.0.0/104` is IPv4 written as IPv6",
            "write it as 10.0.0.0/8",
        ),
        (
            "192.0.2.0/24",
            "::ffff:10.0.0.1",
            ":18:10:",
            "IPv4 written as IPv6",
            "10.0.0.1/32",
        ),
        (
            "0.0.0.0:5353",
            "[::ffff:127.0.0.1]:5353",
            ":13:9:",
            "listener address `[::ffff:127.0.0.1]:5353` is IPv4 written as IPv6",
            "write it as 127.0.0.1:5353",
        ),
        (
            "127.0.0.1:9901",
            "[::ffff:127.0.0.1]:9901",
            ":9:10:",
            "admin address `[::ffff:127.0.0.1]:9901` is IPv4",
            "127.0.0.1:9901",
        ),
        (
            "0.0.0.0:5353",
            "[fe80::1]:53",
            ":13:9:",
            "`[fe80::1]:53` is link-local and names no interface",
            "[fe80::1%2]:53",
        ),
        (
            "192.0.2.10:53",
            "[fe80::1]:53",
            ":24:12:",
            "server `[fe80::1]:53` is link-local and names no interface",
            "[fe80::1%2]:53",
        ),
    ] {
        let message = broken(from, to);
        for part in ["proxy.toml", place, what, fix] {
            assert!(message.contains(part), "{to}: expected {part} in {message}");
        }
    }
    for server in [
        "0.0.0.0:53",
        "[::]:53",
        "[::ffff:0.0.0.0]:53",
        "224.0.0.1:53",
        "[ff02::1%2]:53",
        "255.255.255.255:53",
    ] {
        let message = broken("192.0.2.10:53", server);
        for part in [":24:12:", "can't be a server's address", "127.0.0.1"] {
            assert!(message.contains(part), "{server}: {message}");
        }
    }
}

#[test]
fn a_key_in_quotes_is_shown_as_it_is_written() {
    let message = broken("dont_fragment = true", "\"a`b\" = 1");
    assert!(message.contains(r#"unknown key "a`b""#), "{message}");
    assert!(message.contains("known keys here: name, bind"), "{message}");
    let message = broken("mode =", "\"mo`de\" =");
    assert!(message.contains("mo`de"), "{message}");
    assert!(message.contains("did you mean `mode`?"), "{message}");
}

/// A configuration of two listeners, with one server each.
fn two(binds: [&str; 2], servers: [&str; 2]) -> Result<Config, ConfigError> {
    let part = |name: &str, bind: &str, server: &str| {
        format!(
            "[[listener]]\nname = \"{name}\"\nbind = [\"{bind}\"]\nupstream = \"{name}\"\n\
             [upstream.{name}]\nservers = [\"{server}\"]\n"
        )
    };
    let [a, b] = [0, 1].map(|n| part(["a", "b"][n], binds[n], servers[n]));
    Config::from_toml("proxy.toml", &(a + &b))
}

#[test]
fn servers_that_are_listeners_are_loops() {
    let elsewhere = "192.0.2.1:53";
    for (binds, servers, listener) in [
        (
            ["127.0.0.1:1", "127.0.0.1:2"],
            ["127.0.0.1:2", "127.0.0.1:1"],
            "b",
        ),
        (
            ["127.0.0.1:1", "127.0.0.1:2"],
            [elsewhere, "127.0.0.1:1"],
            "a",
        ),
        (
            ["127.0.0.1:1", "127.0.0.1:2"],
            [elsewhere, "[::ffff:127.0.0.1]:1"],
            "a",
        ),
        (
            ["127.0.0.1:1", "0.0.0.0:2"],
            ["127.9.9.9:2", elsewhere],
            "b",
        ),
        (["[::1]:1", "[::]:2"], ["[::1%1]:1", elsewhere], "a"),
        (["[::1]:1", "[::]:2"], ["[::1%7]:2", elsewhere], "b"),
        (
            ["[fe80::1%2]:1", "[::]:2"],
            ["[fe80::1%2]:1", elsewhere],
            "a",
        ),
    ] {
        let message = two(binds, servers).unwrap_err().to_string();
        for part in [
            &format!("is listener `{listener}` at"),
            "another port",
            "^^^",
        ] {
            assert!(message.contains(part), "{binds:?} {servers:?}: {message}");
        }
    }
    let apart = two(
        ["[fe80::1%2]:1", "0.0.0.0:2"],
        ["[fe80::1%3]:1", "192.0.2.1:2"],
    );
    assert!(apart.is_ok(), "{apart:?}");
}

#[test]
fn a_wildcard_covers_the_hosts_own_addresses() {
    let interfaces = if_addrs::get_if_addrs().unwrap();
    for own in interfaces.iter().map(if_addrs::Interface::ip) {
        let wildcard = if own.is_ipv4() { "0.0.0.0:7" } else { "[::]:7" };
        let server = match interfaces.iter().find(|i| i.ip() == own).unwrap().index {
            Some(index) if is_v6_link_local(own) => format!("[{own}%{index}]:7"),
            _ => SocketAddr::new(own, 7).to_string(),
        };
        let result = two([wildcard, "127.0.0.1:8"], [&server, "192.0.2.1:53"]);
        let message = result.unwrap_err().to_string();
        assert!(message.contains("own address"), "{message}");
    }
}

fn is_v6_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

#[test]
fn addresses_are_kept_in_one_form() {
    let servers = ["[::ffff:192.0.2.1]:53", "[2001:db8::1%4]:53"];
    let config = two(["127.0.0.1:1", "[::1%1]:1"], servers).unwrap();
    let addresses = config
        .servers
        .iter()
        .map(|server| server.address.to_string());
    let expected = ["192.0.2.1:53", "[2001:db8::1]:53"];
    assert_eq!(addresses.collect::<Vec<_>>(), expected);
    assert_eq!(config.listeners[1].bind[0].to_string(), "[::1]:1");
}

#[test]
fn link_local_addresses_of_two_interfaces_are_two_addresses() {
    let servers = ["192.0.2.1:53", "192.0.2.1:53"];
    assert!(two(["[fe80::1%2]:1", "[fe80::1%3]:1"], servers).is_ok());
    for second in ["[fe80::1%2]:1", "[::]:1"] {
        let error = two(["[fe80::1%2]:1", second], servers).unwrap_err();
        assert!(error.to_string().contains("overlaps"), "{error}");
    }
}

#[test]
fn listener_names_are_unique() {
    let second = r#"
[[listener]]
name = "dns"
bind = ["127.0.0.1:1"]
upstream = "resolvers"
"#;
    let message = error(&format!("{GOOD}{second}"));
    assert!(
        message.contains("a second listener named `dns`"),
        "{message}"
    );
}

#[test]
fn an_empty_file_is_an_error() {
    assert!(error("").contains("no listener"));
    let message = error("[[listener]]\nbind = [\"127.0.0.1:1\"]");
    assert!(
        message.contains("listener `listener1` has no `upstream`"),
        "{message}"
    );
}

#[test]
fn an_unused_upstream_is_checked_too() {
    for (servers, what) in [
        ("[]", "has no servers"),
        ("[\"192.0.2.1\"]", "has no port"),
        ("[\"0.0.0.0:1\"]", "can't be a server's address"),
        ("[{ address = \"192.0.2.1:1\", mode = \"x\" }]", "mode: `x`"),
    ] {
        let unused = format!("[upstream.spare]\nservers = {servers}\n");
        let message = error(&format!("{GOOD}{unused}"));
        assert!(message.contains(what), "{message}");
    }
}

#[test]
fn an_invalid_flag_names_value_and_fix() {
    let flags = |listen: &str, upstream: &str| {
        let error = from_flags(listen, upstream).unwrap_err();
        error.to_string()
    };
    let message = flags("127.0.0.1:0", "127.0.0.1:1");
    assert!(
        message.starts_with("listener address `127.0.0.1:0` has port 0; name"),
        "{message}"
    );
    let message = flags("127.0.0.1:7", "127.0.0.1:7");
    assert!(message.contains("own address"), "{message}");
}

#[test]
fn the_reference_shows_a_file_that_works() {
    let file = include_str!("../../../docs/reference/ppv2-proxy.toml");
    let config = Config::from_toml("ppv2-proxy.toml", file).unwrap();
    assert_eq!(config.listeners[0].name, "dns");
    assert!(config.warnings.is_empty(), "{:?}", config.warnings);
}
