//! Modes that send from the client's address, and what conflicts with them.

use super::super::*;
use ppv2_engine::mode::{RewriteOn, SourcePort};

const GOOD: &str = r#"
[[listener]]
name = "dns"
bind = ["192.0.2.1:53", "[2001:db8::1]:53"]
upstream = "u"
mode = "dsr"

[upstream.u]
servers = ["10.0.0.1:53", "[fd00::1]:53", { address = "10.0.0.2:53", mode = "transparent", source_port = "client" }]
"#;

fn load(content: &str) -> Result<Config, String> {
    Config::from_toml("p.toml", content).map_err(|error| error.to_string())
}

fn broken(from: &str, to: &str) -> String {
    assert!(GOOD.contains(from), "{from}");
    load(&GOOD.replacen(from, to, 1)).unwrap_err()
}

#[test]
fn each_server_has_the_mode_that_was_asked_for() {
    let modes = |content: &str| -> Vec<_> {
        let config = load(content).unwrap();
        config.served().map(|(_, _, mode)| mode).collect()
    };
    let own_port = Mode::Transparent {
        port: SourcePort::Client,
    };
    let dsr = |on| [Mode::Dsr(on), Mode::Dsr(on), own_port];
    assert_eq!(modes(GOOD), dsr(RewriteOn::Proxy));
    for (name, on) in [
        ("proxy", RewriteOn::Proxy),
        ("server", RewriteOn::Server),
        ("sdk", RewriteOn::Sdk { crc32c: false }),
    ] {
        let wanted = format!("mode = \"dsr\"\nrewrite_on = \"{name}\"");
        assert_eq!(modes(&GOOD.replacen("mode = \"dsr\"", &wanted, 1)), dsr(on));
    }
    let any = Mode::Transparent {
        port: SourcePort::Any,
    };
    let transparent = GOOD.replacen("dsr", "transparent", 1);
    assert_eq!(modes(&transparent), [any, any, own_port]);
}

#[test]
fn keys_of_another_mode_are_errors() {
    let error = broken("mode = \"dsr\"", "mode = \"dsr\"\nsource_port = \"any\"");
    assert!(error.contains("`source_port` is for mode `transparent` alone"));
    let error = broken("mode = \"dsr\"", "mode = \"ppv2\"\nrewrite_on = \"proxy\"");
    assert!(error.contains("`rewrite_on` is for mode `dsr` alone"));
    let error = broken("mode = \"transparent\", ", "");
    assert!(error.contains("`source_port` but no `mode`"), "{error}");
    assert!(error.contains("add mode = \"transparent\""), "{error}");
    let error = broken("\"client\"", "\"both\"");
    assert!(error.contains("known values: any, client"), "{error}");
    let error = broken("\"dsr\"", "\"dsr\"\nrewrite_on = \"client\"");
    assert!(error.contains("known values: proxy, server, sdk"));
}

#[test]
fn a_family_without_a_server_is_an_error() {
    let error = broken(", \"[fd00::1]:53\"", "");
    assert!(error.contains("no server can see the addresses of clients of [2001:db8::1]:53"));
    assert!(error.contains("an IPv6 server"), "{error}");
    // One that is told by a header takes clients of both.
    let mixed = GOOD.replacen(
        "\"[fd00::1]:53\"",
        "{ address = \"10.0.0.3:53\", mode = \"ppv2\" }",
        1,
    );
    load(&mixed).unwrap();
}

#[test]
fn rewritten_replies_come_from_one_address() {
    let error = broken("192.0.2.1:53", "0.0.0.0:53");
    assert!(error.contains("a wildcard, 0.0.0.0:53, in mode dsr"));
    let error = broken("\"192.0.2.1:53\"", "\"192.0.2.1:53\", \"192.0.2.2:53\"");
    assert!(error.contains("192.0.2.1:53 and 192.0.2.2:53 in mode dsr"));
    let second =
        "[[listener]]\nname = \"b\"\nbind = [\"192.0.2.9:53\"]\nupstream = \"u\"\nmode = \"dsr\"\n";
    let error = load(&GOOD.replacen("[upstream", &format!("{second}[upstream"), 1)).unwrap_err();
    assert!(
        error.contains("`dns` and `b` write to server 10.0.0.1:53 from clients' addresses"),
        "{error}"
    );
    // The header says it for each datagram.
    let sdk = GOOD
        .replacen("\"dsr\"", "\"dsr\"\nrewrite_on = \"sdk\"", 1)
        .replacen("192.0.2.1:53", "0.0.0.0:53", 1);
    load(&sdk).unwrap();
}

#[test]
fn rules_that_need_replies_or_a_second_port_are_errors() {
    let without_last = GOOD.replacen(
        ", { address = \"10.0.0.2:53\", mode = \"transparent\", source_port = \"client\" }",
        "",
        1,
    );
    let with = |rule: &str| without_last.replacen("mode = ", &format!("{rule}\nmode = "), 1);
    let error = load(&with("responses = 1")).unwrap_err();
    assert!(error.contains("`responses` counts replies"), "{error}");
    let error = load(&with("requests = 9")).unwrap_err();
    assert!(error.contains("`requests` starts"), "{error}");
    let error = load(&with("amplification = { limit = 3 }")).unwrap_err();
    assert!(error.contains("`amplification` bounds replies"), "{error}");
    let mixed = GOOD.replacen("mode = ", "responses = 1\nmode = ", 1);
    let warnings = load(&mixed).unwrap().warnings;
    assert!(
        warnings
            .iter()
            .any(|w| w.contains("`responses` ends no session"))
    );
    let sdk = with("requests = 9\nrewrite_on = \"sdk\"");
    load(&sdk).unwrap();
    let first = sdk + "header = { emit = \"first\" }\n";
    let error = load(&first).unwrap_err();
    assert!(error.contains("emit = \"first\""), "{error}");
}

/// A second listener and upstream beside those of GOOD.
fn beside_good(bind: &str, mode: &str, upstream: &str) -> Result<Config, String> {
    load(&format!(
        "{GOOD}[upstream.v]\n{upstream}\n\
         [[listener]]\nname = \"b\"\nbind = [\"{bind}\"]\nupstream = \"v\"\n{mode}\n"
    ))
}

#[test]
fn servers_of_two_upstreams_are_told_apart_by_address() {
    let conflict = "write to server 10.0.0.1:53 from clients' addresses";
    let alike = "servers = [\"10.0.0.1:53\"]";
    for mode in [
        "mode = \"dsr\"",
        "mode = \"dsr\"\nrewrite_on = \"server\"",
        "mode = \"transparent\"",
    ] {
        let error = beside_good("192.0.2.9:53", mode, alike).unwrap_err();
        assert!(error.contains(conflict), "{mode}: {error}");
        assert!(error.contains("second port or address"), "{error}");
    }
    let v6 = "servers = [\"[fd00::1]:53\"]";
    let error = beside_good("[2001:db8::9]:53", "mode = \"dsr\"", v6).unwrap_err();
    assert!(error.contains("server [fd00::1]:53"), "{error}");
    // Clients of the other family are never written for.
    let both = "servers = [\"[fd00::9]:53\", \"10.0.0.1:53\"]";
    beside_good("[2001:db8::9]:53", "mode = \"dsr\"", both).unwrap();
    for (mode, servers) in [
        ("mode = \"dsr\"", "servers = [\"10.0.0.1:54\"]"),
        ("mode = \"dsr\"\nrewrite_on = \"sdk\"", alike),
        ("mode = \"plain\"", alike),
        // Two of transparent have sockets of their own.
        (
            "mode = \"transparent\"\nsource_port = \"client\"",
            "servers = [\"10.0.0.2:53\"]",
        ),
    ] {
        beside_good("192.0.2.9:53", mode, servers).unwrap();
    }
}

#[test]
fn a_server_that_also_answers_the_proxy_needs_source() {
    let on_server = |upstream: &str| {
        GOOD.replacen("\"dsr\"", "\"dsr\"\nrewrite_on = \"server\"", 1)
            .replacen("[upstream.u]", &format!("[upstream.u]\n{upstream}"), 1)
    };
    let udp = "health = { probe = { kind = \"udp\", send = \"ping\" } }";
    let dns = "health = { probe = { kind = \"dns\", name = \"example.com\" } }";
    let source = "source = [\"10.0.0.9\", \"fd00::9\"]";
    for (probe, kind) in [(udp, "a udp probe"), (dns, "a dns probe")] {
        let error = load(&on_server(probe)).unwrap_err();
        assert!(
            error.contains("server 10.0.0.1:53 replies to the proxy"),
            "{error}"
        );
        assert!(error.contains(kind), "{error}");
        assert!(error.contains("set `source` in [upstream.u]"), "{error}");
        load(&on_server(&format!("{probe}\n{source}"))).unwrap();
    }
    for silent in ["", "health = {}", "health = { probe = { kind = \"tcp\" } }"] {
        load(&on_server(silent)).unwrap();
    }
    let second = |mode: &str, source: &str| {
        let first = on_server("");
        load(&format!(
            "{first}[upstream.v]\n{source}\nservers = [\"[fd00::1]:53\"]\n\
             [[listener]]\nname = \"b\"\nbind = [\"[2001:db8::9]:53\"]\nupstream = \"v\"\nmode = \"{mode}\"\n"
        ))
    };
    for mode in ["ppv2", "plain"] {
        let error = second(mode, "").unwrap_err();
        assert!(
            error.contains("server [fd00::1]:53 replies to the proxy"),
            "{error}"
        );
        assert!(error.contains("set `source` in [upstream.v]"), "{error}");
        second(mode, source).unwrap();
    }
}
