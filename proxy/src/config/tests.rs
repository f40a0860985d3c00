//! Every mistake is named with its place and its mend; what is right is kept.

use std::net::IpAddr;

use super::*;

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
df = true

[upstream.resolvers]
balance = "round_robin"
header = { emit = "first", crc32c = true }
servers = ["192.0.2.10:53", { address = "[2001:db8::10]:53", mode = "plain" }]
"#;

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
fn a_full_file_is_read_whole() {
    let config = Config::from_toml("proxy.toml", GOOD).unwrap();
    assert_eq!(config.workers, Some(2));
    assert_eq!(config.max_sessions, Some(100));
    assert_eq!(config.drain_timeout, Duration::from_secs(1));
    assert_eq!(config.admin, Some("127.0.0.1:9901".parse().unwrap()));
    let listener = &config.listeners[0];
    assert_eq!(listener.name, "dns");
    assert_eq!(listener.bind.len(), 2);
    assert_eq!(listener.rules.idle_timeout, Duration::from_secs(10));
    assert_eq!((listener.rules.responses, listener.rules.requests), (1, 2));
    assert!(listener.dont_fragment);
    assert_eq!(listener.allow[1], "2001:db8::1/128".parse().unwrap());
    let first = Mode::Ppv2 {
        emit: Emit::First,
        crc32c: true,
    };
    assert_eq!(listener.servers, [(0, first), (1, Mode::Plain)]);
    assert_eq!(config.servers[1].address.0.to_string(), "[2001:db8::10]:53");
    assert!(config.warnings.is_empty());
}

#[test]
fn defaults_are_those_that_the_readme_promises() {
    let config = Config::from_flags(Flags {
        listen: vec!["127.0.0.1:5300".into()],
        upstream: vec!["127.0.0.1:53".into()],
        ..Flags::default()
    })
    .unwrap();
    let listener = &config.listeners[0];
    let every = Mode::Ppv2 {
        emit: Emit::Every,
        crc32c: false,
    };
    assert_eq!(listener.servers, [(0, every)]);
    assert_eq!(listener.rules.idle_timeout, Duration::from_secs(30));
    assert_eq!(
        (config.workers, config.max_sessions, config.admin),
        (None, None, None)
    );
    assert!(
        listener
            .allow
            .iter()
            .any(|net| net.contains(&IpAddr::from([8; 4])))
    );
    assert!(
        listener
            .allow
            .iter()
            .any(|net| net.contains(&IpAddr::from([8u16; 8])))
    );
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
        ("df = true", "xyzzyxyzzy = 1", "known keys here: name, bind"),
    ] {
        let message = broken(from, to);
        assert!(message.contains("unknown key"), "{message}");
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn a_value_that_can_not_be_is_shown_with_its_place_and_mend() {
    for (from, to, place, what, mend) in [
        (
            "workers = 2",
            "workers = 0",
            ":2:11:",
            "workers is 0",
            "1 to 1024",
        ),
        (
            "workers = 2",
            "workers = \"two\"",
            ":2:11:",
            "invalid type",
            "",
        ),
        ("\"1s\"", "\"0s\"", ":3:17:", "must not be 0", "\"30s\""),
        (
            "\"10s\"",
            "\"10\"",
            ":15:16:",
            "`10` is not a duration",
            "\"500ms\"",
        ),
        ("= 100", "= 0", ":6:16:", "max_sessions is 0", "1 to"),
        (
            "127.0.0.1:9901",
            "127.0.0.1",
            ":9:10:",
            "`127.0.0.1` is not an IP address with a port",
            "192.0.2.1:53",
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
            "add an [upstream.resolver]",
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
            "balance `random` is not known",
            "round_robin",
        ),
        (
            "\"first\"",
            "\"sometimes\"",
            ":23:19:",
            "emit `sometimes`",
            "every, first",
        ),
        (
            "\"plain\"",
            "\"dsr\"",
            ":24:69:",
            "mode `dsr` is not known",
            "ppv2, plain",
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
            ":13:8:",
            "own address 0.0.0.0:5353",
            "another port",
        ),
        (
            "df = true",
            "busy_poll = \"1s\"",
            ":19:13:",
            "busy_poll is `1s`",
            "10ms",
        ),
        (
            "df = true",
            "coalesce = \"x\"",
            ":19:12:",
            "coalesce is `x`",
            "\"50us\"",
        ),
        (
            "balance =",
            "source = [\"10.0.0.1:5\"]\nbalance =",
            ":22:11:",
            "source `10.0.0.1:5`",
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
        ("df = true", "df = tru", ":19:", "", ""),
    ] {
        let message = broken(from, to);
        for part in ["proxy.toml", place, what, mend] {
            assert!(message.contains(part), "{to}: expected {part} in {message}");
        }
    }
}

#[test]
fn listeners_are_told_apart() {
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
fn nothing_at_all_is_named_too() {
    assert!(error("").contains("no listener"));
    assert!(error("[[listener]]\nbind = [\"127.0.0.1:1\"]").contains("missing field `upstream`"));
}

#[test]
fn an_upstream_that_nobody_uses_is_a_warning() {
    let unused = "[upstream.spare]\nservers = [\"192.0.2.1:1\"]\n";
    let config = Config::from_toml("proxy.toml", &format!("{GOOD}{unused}")).unwrap();
    assert_eq!(config.warnings, ["upstream `spare` is used by no listener"]);
}

#[test]
fn flags_are_named_by_value_and_mend() {
    let flags = |listen: &str, upstream: &str| {
        let flags = Flags {
            listen: vec![listen.into()],
            upstream: vec![upstream.into()],
            ..Flags::default()
        };
        Config::from_flags(flags).unwrap_err().to_string()
    };
    let message = flags("127.0.0.1:0", "127.0.0.1:1");
    assert!(
        message.starts_with("listener address `127.0.0.1:0` has port 0; name"),
        "{message}"
    );
    let message = flags("127.0.0.1:7", "127.0.0.1:7");
    assert!(message.contains("own address"), "{message}");
}
