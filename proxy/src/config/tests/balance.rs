//! Options of balancing.

use super::super::Config;
use ppv2_engine::upstream::{Balance, HashOn};

fn config(upstream: &str) -> Result<Config, String> {
    let content = format!(
        "[[listener]]\nbind = [\"127.0.0.1:5353\"]\nupstream = \"u\"\n[upstream.u]\n{upstream}\n"
    );
    Config::from_toml("proxy.toml", &content).map_err(|error| error.to_string())
}

const SERVERS: &str = "servers = [\"192.0.2.1:53\", \"192.0.2.2:53\"]";

fn balance(keys: &str) -> (Balance, Vec<String>) {
    let config = config(&format!("{keys}\n{SERVERS}")).unwrap();
    (config.listeners[0].balance, config.warnings)
}

#[test]
fn balancers_have_names_and_a_default() {
    let by_ip = |ipv6_prefix| Balance::Maglev(HashOn::ClientIp { ipv6_prefix });
    for (keys, expected) in [
        ("", by_ip(64)),
        ("balance = \"maglev\"", by_ip(64)),
        ("hash_on = \"client_ip\"\nhash_ipv6_prefix = 56", by_ip(56)),
        (
            "hash_on = \"client_addr\"",
            Balance::Maglev(HashOn::ClientAddr),
        ),
        ("balance = \"round_robin\"", Balance::RoundRobin),
        ("balance = \"least_sessions\"", Balance::LeastSessions),
        ("balance = \"random_two\"", Balance::RandomTwo),
    ] {
        assert_eq!(balance(keys), (expected, Vec::new()), "{keys}");
    }
}

#[test]
fn keys_that_change_nothing_are_warned_of() {
    for (keys, what) in [
        (
            "balance = \"round_robin\"\nhash_on = \"client_ip\"",
            "upstream `u`: hash_on and hash_ipv6_prefix change nothing but with balance = \"maglev\"",
        ),
        (
            "balance = \"random_two\"\nhash_ipv6_prefix = 56",
            "upstream `u`: hash_on and hash_ipv6_prefix change nothing but with balance = \"maglev\"",
        ),
        (
            "hash_on = \"client_addr\"\nhash_ipv6_prefix = 56",
            "upstream `u`: hash_ipv6_prefix changes nothing with hash_on = \"client_addr\"",
        ),
    ] {
        assert_eq!(balance(keys).1, [what]);
    }
}

#[test]
fn servers_have_weights_and_roles() {
    let servers = "servers = [\"192.0.2.1:53\", \
                   { address = \"192.0.2.2:53\", weight = 256, drain = true }, \
                   { address = \"192.0.2.3:53\", backup = true, drain = false }]";
    let config = config(servers).unwrap();
    let said: Vec<_> = config
        .servers
        .iter()
        .map(|s| s.remarks().join(", "))
        .collect();
    assert_eq!(said, ["", "weight 256, drain", "backup"]);
    assert_eq!(config.servers[0].weight, 1);
}

#[test]
fn errors_show_place_and_fix() {
    let weight =
        |weight: &str| format!("servers = [{{ address = \"192.0.2.1:53\", weight = {weight} }}]");
    let all = |what: &str| format!("servers = [{{ address = \"192.0.2.1:53\", {what} = true }}]");
    let with = |keys: &str| format!("{keys}\n{SERVERS}");
    for (upstream, place, what, fix) in [
        (weight("0"), ":5:49:", "weight is 0", "drain = true"),
        (
            weight("-3"),
            ":5:49:",
            "weight is -3",
            "1 to 256; the nearest is 1",
        ),
        (
            weight("257"),
            ":5:49:",
            "weight is 257",
            "1 to 256; the nearest is 256",
        ),
        (weight("1.5"), ":5:", "invalid type: floating point", ""),
        (
            with("hash_ipv6_prefix = 0"),
            ":5:20:",
            "hash_ipv6_prefix: 0 is out of range",
            "from 1 to 128",
        ),
        (
            with("hash_ipv6_prefix = 129"),
            ":5:20:",
            "hash_ipv6_prefix: 129 is out of range",
            "from 1 to 128",
        ),
        (
            with("share_sockets = true"),
            ":5:1:",
            "`share_sockets` no longer exists",
            "remove the key: a network in `source`",
        ),
        (
            with("balance = \"magliv\""),
            ":5:11:",
            "balance: `magliv` is not known",
            "did you mean `maglev`? known values: maglev, round_robin, least_sessions, random_two",
        ),
        (
            with("hash_on = \"client_port\""),
            ":5:11:",
            "hash_on: `client_port` is not known",
            "known values: client_ip, client_addr",
        ),
        (
            all("backup"),
            ":4:1:",
            "every server of upstream `u` is a backup",
            "leave `backup` out",
        ),
        (
            all("drain"),
            ":4:1:",
            "every server of upstream `u` is draining",
            "leave `drain` out",
        ),
        (
            with("hash = \"client_ip\""),
            ":5:1:",
            "unknown key `hash`",
            "did you mean",
        ),
        (
            weight("1, bakup = true"),
            ":5:",
            "unknown key `bakup`",
            "did you mean `backup`?",
        ),
    ] {
        let message = config(&upstream).unwrap_err();
        for part in ["proxy.toml", place, what, fix] {
            assert!(
                message.contains(part),
                "{upstream}: expected {part} in {message}"
            );
        }
    }
}

#[test]
fn a_drained_server_may_leave_the_work_to_its_backup() {
    let servers = "servers = [{ address = \"192.0.2.1:53\", drain = true }, \
                   { address = \"192.0.2.2:53\", backup = true }]";
    assert_eq!(config(servers).unwrap().warnings, Vec::<String>::new());
}

#[test]
fn an_upstream_has_at_most_2000_servers() {
    let servers = |count: u32| {
        let address = |n: u32| format!("\"10.{}.{}.{}:53\"", n >> 16, n >> 8 & 255, n & 255);
        let all: Vec<_> = (0..count).map(address).collect();
        config(&format!("servers = [{}]", all.join(", ")))
    };
    assert_eq!(servers(2_000).unwrap().servers.len(), 2_000);
    let message = servers(2_001).unwrap_err();
    assert!(
        message.contains("upstream `u` has 2001 servers"),
        "{message}"
    );
    assert!(message.contains("give at most 2000"), "{message}");
}
