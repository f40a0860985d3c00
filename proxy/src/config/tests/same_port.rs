//! Ranges of ports: `bind`, and servers with `port = "same"`.

use ppv2_engine::address::PortRange;

use super::super::*;

/// A listener on these, with these keys, and an upstream with these keys.
fn load(bind: &str, of_listener: &str, of_upstream: &str) -> Result<Config, String> {
    let content = format!(
        "[[listener]]\nname = \"media\"\nbind = [{bind}]\nupstream = \"u\"\n{of_listener}\n\
         [upstream.u]\n{of_upstream}\n"
    );
    Config::from_toml("p.toml", &content).map_err(|error| error.to_string())
}

const BIND: &str = "\"0.0.0.0:40000-40999\", \"[::]:40100-40199\"";
const SERVERS: &str = "servers = [{ address = \"192.0.2.10:40000-40999\", port = \"same\" }]";

#[track_caller]
fn refused(result: Result<Config, String>, parts: &[&str]) {
    let error = result.unwrap_err();
    for part in parts {
        assert!(error.contains(part), "no `{part}` in\n{error}");
    }
}

#[test]
fn a_server_has_its_clients_ports() {
    let config = load(BIND, "", SERVERS).unwrap();
    let server = &config.servers[0];
    let ports = PortRange {
        first: 40_000,
        last: 40_999,
    };
    assert_eq!(server.ports, Some(ports));
    assert_eq!(server.name, "192.0.2.10:40000-40999");
    assert_eq!(server.shown_address(), "192.0.2.10:40000-40999");
    assert_eq!(server.id().to_string(), "192.0.2.10:0");
    assert_eq!(config.warnings, [""; 0]);
    assert_eq!(config.listeners[0].address_count(), 1100);
    // With another range it is the same server.
    let narrow = load(
        "\"0.0.0.0:40000\"",
        "",
        &SERVERS.replace("-40999", "-40001"),
    );
    assert_eq!(narrow.unwrap().servers[0].id(), server.id());
    let elsewhere = "\"192.0.2.1:40000\"";
    let host = load(elsewhere, "", &SERVERS.replace("192.0.2.10", "localhost")).unwrap();
    let shown = host.servers[0].shown_address();
    assert!(shown.ends_with(":40000-40999"), "{shown}");
    assert_eq!(host.servers[0].name, "localhost:40000-40999");
}

#[test]
fn servers_of_a_name_have_its_ports() {
    let servers = SERVERS.replace("192.0.2.10", "dns:media.lan");
    let config = load(BIND, "", &servers).unwrap();
    let name = config.names[0].name.clone();
    assert_eq!(name.to_string(), "dns:media.lan:40000-40999");
    let answer = |ip: &str| Answer {
        address: SocketAddr::new(ip.parse().unwrap(), 40_000),
        weight: 1,
        backup: false,
    };
    let answers = vec![
        answer("192.0.2.1"),
        answer("2001:db8::1"),
        answer("127.0.0.1"),
    ];
    let expanded = config.expand(&Answers::from([(name, answers)]));
    let shown = expanded.config.servers.iter().map(Server::shown_address);
    let shown: Vec<_> = shown.collect();
    assert_eq!(
        shown,
        ["192.0.2.1:40000-40999", "[2001:db8::1]:40000-40999"]
    );
    let left_out = &expanded.remarks[0];
    assert!(left_out.contains("0.0.0.0:40000-40999"), "{left_out}");
}

#[test]
fn a_range_needs_port_same_and_the_other_way_round() {
    refused(
        load(BIND, "", "servers = [\"192.0.2.10:40000-40999\"]"),
        &[
            "server `192.0.2.10:40000-40999` has a range of ports",
            "{ address = \"192.0.2.10:40000-40999\", port = \"same\" }",
        ],
    );
    refused(
        load(BIND, "", "servers = [\"dns:media.lan:40000-40999\"]"),
        &["server `dns:media.lan:40000-40999` has a range of ports"],
    );
    refused(
        load(BIND, "", &SERVERS.replace("-40999", "")),
        &[
            "port = \"same\" with the single port of `192.0.2.10:40000`",
            "leave `port` out",
        ],
    );
    let srv = "servers = [{ address = \"srv:_rtp._udp.lan\", port = \"same\" }]";
    refused(
        load(BIND, "", srv),
        &["SRV records say on which port", "dns:HOST:FIRST-LAST"],
    );
    for (range, part) in [
        ("40999-40000", "write 192.0.2.10:40000-40999"),
        ("0-5", "begin at 1"),
    ] {
        let servers = SERVERS.replace("40000-40999", range);
        refused(load(BIND, "", &servers), &[part]);
    }
}

#[test]
fn each_port_of_a_listener_is_a_servers() {
    for (bind, port) in [
        ("\"127.0.0.1:39999-40000\"", "39999"),
        ("\"127.0.0.1:40000\", \"127.0.0.1:40500-41005\"", "41000"),
        ("\"127.0.0.1:53\"", "53"),
        ("\"127.0.0.1:50000-50001\"", "50000"),
    ] {
        let part = format!("has port {port}, which server `192.0.2.10:40000-40999` does not");
        refused(load(bind, "", SERVERS), &[&part, "p.toml:3:"]);
    }
    // A header names the port.
    let accept =
        |direct| format!("accept = {{ from = [\"192.0.2.0/24\"], direct = \"{direct}\" }}");
    assert!(load("\"127.0.0.1:53\"", &accept("drop"), SERVERS).is_ok());
    refused(
        load("\"127.0.0.1:53\"", &accept("accept"), SERVERS),
        &["has port 53"],
    );
}

#[test]
fn what_needs_one_port_is_refused() {
    for replies in ["auto", "tagged"] {
        let upstream = format!("replies = \"{replies}\"\n{SERVERS}");
        let part = format!("port = \"same\" with replies = \"{replies}\"");
        refused(load(BIND, "", &upstream), &[&part]);
    }
    let one = "\"192.0.2.1:40000\"";
    for rewrite_on in ["proxy", "server"] {
        let dsr = format!("mode = \"dsr\"\nrewrite_on = \"{rewrite_on}\"");
        refused(load(one, &dsr, SERVERS), &["port = \"same\" in mode dsr"]);
        let range = "\"192.0.2.1:40000-40001\"";
        let server = "servers = [\"192.0.2.10:53\"]";
        refused(
            load(range, &dsr, server),
            &["a range of ports, 192.0.2.1:40000-40001, in mode dsr"],
        );
    }
    let sdk = "mode = \"dsr\"\nrewrite_on = \"sdk\"";
    assert!(load(BIND, sdk, SERVERS).is_ok());
    let loops = SERVERS.replace("192.0.2.10", "127.0.0.1");
    refused(
        load(BIND, "", &loops),
        &["server `127.0.0.1:40000-40999` is listener `media` at 0.0.0.0:40000-40999"],
    );
    let twice = "servers = [{ address = \"192.0.2.10:40000-40999\", port = \"same\" }, \
                 { address = \"192.0.2.10:40000-41999\", port = \"same\" }]";
    refused(load(BIND, "", twice), &["192.0.2.10:40000-41999 is twice"]);
    // A rule on a host would rewrite the replies of both.
    let both = "servers = [{ address = \"192.0.2.10:40000-40999\", port = \"same\", mode = \"ppv2\" }, \
                \"192.0.2.10:40500\"]";
    refused(
        load(one, "mode = \"dsr\"", both),
        &["has the port of server `192.0.2.10:40500` in mode dsr"],
    );
}

#[test]
fn balancers_that_part_the_ports_of_a_client_are_a_warning() {
    let two = "servers = [{ address = \"192.0.2.10:40000-40999\", port = \"same\" }, \
               { address = \"192.0.2.11:40000-40999\", port = \"same\" }]";
    let warnings = |keys: &str, servers: &str| {
        let upstream = format!("{keys}\n{servers}");
        load(BIND, "", &upstream).unwrap().warnings
    };
    assert_eq!(warnings("", two), [""; 0]);
    for keys in ["balance = \"round_robin\"", "hash_on = \"client_addr\""] {
        let warnings_of_two = warnings(keys, two);
        assert!(
            warnings_of_two[0].contains("RTP and RTCP"),
            "{warnings_of_two:?}"
        );
        assert_eq!(warnings(keys, SERVERS), [""; 0]);
    }
}
