//! `source` and `source_port` of an upstream.

use ppv2_engine::server::{SourceNetwork, Sources};

use std::num::NonZeroU16;

use clap::Parser;

use super::super::*;
use crate::cli::{Arguments, Command};

/// An upstream with servers of both families on this host, and these keys.
fn load(top: &str, of_listener: &str, of_upstream: &str) -> Result<Config, String> {
    let content = format!(
        "{top}\n[[listener]]\nname = \"dns\"\nbind = [\"127.0.0.1:5353\", \"[::1]:5353\"]\n\
         upstream = \"u\"\n{of_listener}\n[upstream.u]\n{of_upstream}\n\
         servers = [\"127.0.0.2:53\", \"[2001:db8::53]:53\"]\n"
    );
    Config::from_toml("p.toml", &content).map_err(|error| error.to_string())
}

const BOTH: &str = "source = [\"127.64.0.0/10\", \"fd00:1::/64\"]";

#[track_caller]
fn refused(result: Result<Config, String>, parts: &[&str]) {
    let error = result.unwrap_err();
    for part in parts {
        assert!(error.contains(part), "no `{part}` in\n{error}");
    }
}

#[track_caller]
fn source_refused(source: &str, parts: &[&str]) {
    refused(load("", "", &format!("source = [{source}]")), parts);
}

#[test]
fn each_server_is_written_to_from_the_network_of_its_family() {
    let with_port = format!("{BOTH}\nsource_port = 7000");
    let config = load("workers = 2", "", &with_port).unwrap();
    let networks = config.servers.iter().map(|server| server.sources.network());
    let expected = ["127.64.0.0/10", "fd00:1::/64"].map(|network| {
        Some(SourceNetwork {
            network: network.parse().unwrap(),
            port: NonZeroU16::new(7000),
        })
    });
    assert!(networks.eq(expected));
    assert_eq!(config.source_networks().len(), 2);
    assert!(!config.uses_session_sockets() && config.sources().is_empty());
    let probes = config.servers.iter().map(Server::probe_source);
    let probes: Vec<_> = probes.map(|ip| ip.unwrap().to_string()).collect();
    assert_eq!(probes, ["127.64.0.1", "fd00:1::1"]);
}

#[test]
fn a_fixed_port_on_a_network_that_repeats_addresses_is_a_warning() {
    let warnings = |more: &str| {
        let upstream = format!("{BOTH}\n{more}");
        load("workers = 2", "", &upstream).unwrap().warnings
    };
    assert_eq!(
        warnings("source_port = 7000"),
        [
            "upstream `u`: source_port = 7000 with source network 127.64.0.0/10: after a restart, late replies to a former session can reach a new one that has its address; leave `source_port` out, or take a /64"
        ]
    );
    assert!(warnings("").is_empty());
}

#[test]
fn a_network_of_one_family_and_addresses_of_the_other_go_together() {
    let config = load("", "", "source = [\"127.64.0.0/10\", \"2001:db8::1\"]").unwrap();
    assert!(config.servers[0].sources.network().is_some());
    let address = ["2001:db8::1".parse().unwrap()];
    assert_eq!(
        config.servers[1].sources,
        Sources::Addresses(address.into())
    );
    assert!(config.uses_session_sockets());
    let run = [
        "ppv2-proxy",
        "run",
        "--listen",
        "127.0.0.1:53",
        "--upstream",
        "127.0.0.1:1",
        "--source",
        "127.64.0.0/10",
    ];
    let Command::Run(run) = Arguments::parse_from(run).command else {
        panic!("it is `run`");
    };
    assert_eq!(run.config().unwrap().source_networks().len(), 1);
}

#[test]
fn sources_that_exclude_each_other_are_errors() {
    source_refused(
        "\"127.64.0.0/10\", \"127.0.0.9\"",
        &[
            "both single addresses and a network of IPv4",
            "127.0.0.9",
            "p.toml:8:28",
        ],
    );
    source_refused(
        "\"fd00:1::/64\", \"fd00:2::/64\"",
        &[
            "two IPv6 networks, fd00:1::/64 and fd00:2::/64",
            "a shorter prefix",
        ],
    );
    // The same one twice is one.
    load(
        "",
        "",
        "source = [\"127.64.0.0/10\", \"127.64.0.0/10\", \"2001:db8::1\", \"2001:db8::1\"]",
    )
    .unwrap();
}

#[test]
fn networks_that_no_session_can_send_from_are_errors() {
    for (network, part) in [
        (
            "10.0.0.1/8",
            "the network is 10.0.0.0/8; to send from that address alone, write 10.0.0.1",
        ),
        ("fd00::1/64", "the network is fd00::/64"),
        ("::ffff:10.0.0.0/104", "write it as 10.0.0.0/8"),
        ("10.0.0.0/33", "`10.0.0.0/33` is not a network"),
        ("10.0.0.0/", "is not a network"),
        ("239.1.0.0/16", "has multicast addresses (224.0.0.0/4)"),
        ("ff05::/64", "has multicast addresses (ff00::/8)"),
        ("0.0.0.0/0", "has addresses of no host (0.0.0.0/8)"),
        ("0.1.0.0/16", "has addresses of no host"),
        ("169.254.0.0/16", "has link-local addresses"),
        ("fe80::/64", "has link-local addresses"),
        ("240.0.0.0/4", "has the broadcast address"),
        ("::/64", "has the addresses :: and ::1"),
        (
            "10.0.0.0/31",
            "10.0.0.0/31 is too small to give each session an address",
        ),
        (
            "10.0.0.1/32",
            "or write 10.0.0.1 to send from that address alone",
        ),
        ("fd00::/121", "give a /120 or larger"),
    ] {
        source_refused(&format!("\"{network}\""), &["p.toml:8", part]);
    }
    source_refused(
        "\"nowhere\"",
        &["this is not an IP address or a network", "10.99.0.0/16"],
    );
    source_refused("\"224.0.0.1\"", &["can't send from 224.0.0.1"]);
}

#[test]
fn a_server_that_no_source_reaches_is_an_error() {
    source_refused(
        "\"127.64.0.0/10\"",
        &[
            "no source address can reach [2001:db8::53]:53",
            "a network of its family",
        ],
    );
    source_refused(
        "\"fd00:1::/64\"",
        &["no source address can reach 127.0.0.2:53"],
    );
}

#[test]
fn a_network_without_a_server_of_its_family_is_a_warning() {
    let content = "[[listener]]\nbind = [\"127.0.0.1:53\"]\nupstream = \"u\"\n[upstream.u]\n\
                   source = [\"127.64.0.0/10\", \"fd00:1::/64\"]\nservers = [\"127.0.0.2:53\"]\n";
    let config = Config::from_toml("x", content).unwrap();
    assert_eq!(
        config.warnings,
        ["upstream `u`: source network fd00:1::/64 is not used: no server is of its family"]
    );
    assert_eq!(config.source_networks().len(), 1);
}

#[test]
fn nothing_else_has_an_address_of_a_network() {
    for (network, more, part) in [
        (
            "127.0.0.0/10",
            "",
            "overlaps with listener `dns` at 127.0.0.1:5353",
        ),
        ("127.0.0.2/31", "", "too small"),
        (
            "127.0.0.4/30",
            "[admin]\nlisten = \"127.0.0.5:9901\"",
            "overlaps with the admin address 127.0.0.5:9901",
        ),
    ] {
        let source = format!("source = [\"{network}\", \"fd00:1::/64\"]");
        refused(load(more, "", &source), &[part]);
    }
    let server = "source = [\"127.64.0.0/10\", \"2001:db8::/64\"]";
    refused(
        load("", "", server),
        &["2001:db8::/64 overlaps with server [2001:db8::53]:53"],
    );
    let second = |source: &str, servers: &str| {
        let content = format!(
            "[[listener]]\nname = \"a\"\nbind = [\"127.0.0.1:53\"]\nupstream = \"u\"\n\
             [[listener]]\nname = \"b\"\nbind = [\"127.0.0.1:54\"]\nupstream = \"v\"\n\
             [upstream.u]\nsource = [\"127.64.0.0/10\"]\nservers = [\"127.0.0.2:53\"]\n\
             [upstream.v]\nsource = [\"{source}\"]\nservers = [\"{servers}\"]\n"
        );
        Config::from_toml("x", &content).map_err(|error| error.to_string())
    };
    refused(
        second("127.96.0.0/12", "127.0.0.2:53"),
        &[
            "source network 127.64.0.0/10 overlaps with source network 127.96.0.0/12 of upstream `v`",
        ],
    );
    refused(
        second("127.64.0.9", "127.0.0.2:53"),
        &["127.64.0.0/10 overlaps with source address 127.64.0.9"],
    );
    refused(
        second("127.0.0.9", "127.65.0.1:53"),
        &["127.64.0.0/10 overlaps with server 127.65.0.1:53"],
    );
    second("127.32.0.0/12", "127.0.0.2:53").unwrap();
    // A name can't lead there either.
    let named = second("127.0.0.9", "dns:a.example:53").unwrap();
    let answer = Answer {
        address: "127.70.0.1:53".parse().unwrap(),
        weight: 1,
        backup: false,
    };
    let name = named.names[0].name.clone();
    let expanded = named.expand(&[(name, vec![answer])].into());
    let remark = "source network 127.64.0.0/10 has its address";
    assert!(
        expanded.remarks[0].contains(remark),
        "{:?}",
        expanded.remarks
    );
    assert_eq!(expanded.config.servers.len(), 1);
}

#[test]
fn a_network_has_addresses_for_all_sessions() {
    let with = |network: &str, most: usize| {
        let top = format!("workers = 4\n[limits]\nmax_sessions = {most}");
        load(
            &top,
            "",
            &format!("source = [\"{network}\", \"fd00:1::/64\"]"),
        )
    };
    // Four workers have 15 of 61 addresses each.
    with("10.99.0.0/26", 60).unwrap();
    refused(
        with("10.99.0.0/26", 61),
        &[
            "source network 10.99.0.0/26 has addresses for 60 sessions, but limits.max_sessions is 61",
            "give a /25 or larger, or set limits.max_sessions to at most 60",
        ],
    );
    refused(with("10.99.0.0/26", 1_000_000), &["give a /12 or larger"]);
    refused(
        load(
            "workers = 4",
            "",
            "source = [\"10.99.0.0/30\", \"fd00:1::/64\"]",
        ),
        &[
            "addresses for 0 sessions, but there are 4 workers",
            "give a /29 or larger",
        ],
    );
}

#[test]
fn modes_without_replies_to_the_proxy_have_no_use_for_a_network() {
    for (mode, why) in [
        (
            "mode = \"transparent\"",
            "which sends from clients' addresses",
        ),
        ("mode = \"dsr\"", "which sends from clients' addresses"),
        (
            "mode = \"dsr\"\nrewrite_on = \"sdk\"",
            "which takes no replies",
        ),
    ] {
        refused(
            load("", mode, BOTH),
            &["source = [\"127.64.0.0/10\"", why, "give single addresses"],
        );
    }
    load("", "mode = \"plain\"", BOTH).unwrap();
}

#[test]
fn fixed_ports_are_in_range_and_nobody_elses() {
    let with = |more: &str, port: &str| {
        load(
            "workers = 4",
            more,
            &format!("{BOTH}\nsource_port = {port}"),
        )
    };
    with("", "65532").unwrap();
    refused(
        with("", "65533"),
        &["too few ports after it for 4 workers", "give at most 65532"],
    );
    refused(
        with("", "80"),
        &["80 is out of range", "from 1024 to 65535"],
    );
    refused(with("", "70000"), &["70000 is out of range"]);
    refused(
        with("", "\"client\""),
        &[
            "`client` is not a port",
            "belong to a listener or a server in mode transparent",
        ],
    );
    for port in [5350, 5353] {
        refused(
            with("", &port.to_string()),
            &[
                "the port of listener `dns` at",
                &format!("ports {port} to {}", port + 3),
            ],
        );
    }
    for port in ["5349", "5354"] {
        with("", port).unwrap();
    }
    refused(
        load("", "", "source_port = 7000"),
        &[
            "`source_port` of an upstream without a network",
            "leave `source_port` out",
        ],
    );
    refused(
        load("", "mode = \"transparent\"\nsource_port = 7000", ""),
        &["source_port"],
    );
}

#[test]
fn upstreams_share_ports_or_have_others() {
    let with = |first: u16, second: u16, of_second: &str| {
        let content = format!(
            "workers = 2\n[[listener]]\nname = \"a\"\nbind = [\"127.0.0.1:53\"]\nupstream = \"u\"\n\
             [[listener]]\nname = \"b\"\nbind = [\"127.0.0.1:54\"]\nupstream = \"v\"\n{of_second}\n\
             [upstream.u]\nsource = [\"127.64.0.0/11\"]\nsource_port = {first}\nservers = [\"127.0.0.2:53\"]\n\
             [upstream.v]\nsource = [\"127.96.0.0/11\"]\nsource_port = {second}\nservers = [\"127.0.0.2:53\"]\n"
        );
        Config::from_toml("x", &content).map_err(|error| error.to_string())
    };
    with(7000, 7000, "").unwrap();
    with(7000, 7002, "dont_fragment = true").unwrap();
    refused(
        with(7000, 7001, ""),
        &[
            "two workers would send from one port",
            "ports that are 2 apart",
        ],
    );
    refused(
        with(7000, 7000, "dont_fragment = true"),
        &[
            "listeners `a` and `b` differ in `dont_fragment`",
            "at port 7000",
        ],
    );
}
