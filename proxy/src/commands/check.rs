//! `check`: prints what a configuration sets up, without binding anything. Names are
//! looked up once.

use std::fmt::Write;

use crate::capacity::HostCapacity;
use crate::config::{Accept, Config, Listener};
use crate::discovery;
use ppv2_engine::mode::{MAX_PASSED_TLVS, Mode};
use ppv2_engine::server::{Replies, SourceNetwork};

/// Describes a valid configuration, a line for each thing that it sets up, with the
/// servers that its names resolve to now. Must not be called within a tokio runtime.
#[must_use]
pub fn report(config: &Config) -> String {
    let resolved = discovery::resolve_once(config);
    let expanded = config.expand(&resolved.answers);
    let remarks = [resolved.remarks(config), expanded.remarks].concat();
    describe(&expanded.config, &remarks)
}

fn describe(config: &Config, remarks: &[String]) -> String {
    let mut text = String::new();
    for listener in &config.listeners {
        let bind: Vec<_> = listener.bind.iter().map(ToString::to_string).collect();
        let _ = writeln!(text, "listener {}: {}", listener.name, bind.join(" "));
        if listener.bind.iter().any(|bind| !bind.is_single()) {
            let (addresses, each) = (listener.address_count(), config.sockets_of_address());
            let sockets = addresses * each;
            let _ = match config.reuse_port.0 {
                true => writeln!(
                    text,
                    "  {addresses} addresses, {each} workers: {sockets} sockets"
                ),
                false => writeln!(text, "  {addresses} addresses: {sockets} sockets"),
            };
        }
        let rules = listener.rules();
        let _ = write!(text, "  sessions end after {}", listener.idle_timeout);
        if rules.responses > 0 {
            let replies = if rules.responses == 1 {
                "reply"
            } else {
                "replies"
            };
            let _ = write!(text, ", or {} {replies} a datagram", rules.responses);
        }
        if rules.requests > 0 {
            let datagrams = if rules.requests == 1 {
                "datagram"
            } else {
                "datagrams"
            };
            let _ = write!(text, "; a new one after {} {datagrams}", rules.requests);
        }
        let _ = writeln!(text);
        if let Some(accept) = &listener.accept {
            let _ = writeln!(text, "  {accept}");
        }
        if listener.servers.len() + listener.names.len() > 1 {
            let returns = match listener.returns {
                true => "; sessions return with their server",
                false => "",
            };
            let _ = writeln!(text, "  balance {}{returns}", listener.balance);
        }
        // The options of an upstream are the same for all of its servers.
        let servers = listener.servers.iter();
        let servers = servers.map(|(index, _)| &config.servers[*index]);
        let names = listener.names.iter();
        let names = names.map(|(index, _)| &config.names[*index].server);
        if let Some(server) = servers.chain(names).next() {
            if let Some(health) = &server.health {
                let _ = writeln!(text, "  health: {health}");
            }
            if !server.slow_start.is_zero() {
                let slow_start = humantime::format_duration(server.slow_start);
                let _ = writeln!(text, "  slow start: {slow_start}");
            }
        }
        if let Some(replies) = replies_of(config, listener) {
            let _ = writeln!(text, "  {replies}");
        }
        for header in header_of(config, listener) {
            let _ = writeln!(text, "  {header}");
        }
        for source in networks_of(config, listener) {
            let _ = writeln!(text, "  {source}");
        }
        for (number, mode) in &listener.servers {
            let server = &config.servers[*number];
            let address = server.shown_address();
            let _ = write!(text, "  -> {} {address} ", listener.upstream);
            let written = match &server.found_by {
                Some(name) => name.to_string(),
                None => server.name.clone(),
            };
            if written != address {
                let _ = write!(text, "({written}) ");
            }
            let remarks = server.remarks().into_iter();
            let said: Vec<_> = std::iter::once(mode.name().to_owned())
                .chain(remarks)
                .collect();
            let _ = writeln!(text, "{}", said.join(", "));
        }
    }
    if let Some(peers) = config.peers.as_ref().filter(|peers| !peers.is_empty()) {
        let peers: Vec<_> = peers.iter().map(ToString::to_string).collect();
        let _ = writeln!(
            text,
            "peers (other proxies, not clients): {}",
            peers.join(" ")
        );
    }
    if let Some(admin) = config.admin() {
        let _ = writeln!(text, "admin: {admin}");
    }
    if let Some(upgrade) = &config.upgrade {
        let _ = writeln!(text, "upgrade: at {}", upgrade.socket);
    }
    let capacity = HostCapacity::of(config);
    let _ = writeln!(
        text,
        "sessions: at most {} ({})",
        capacity.max_sessions,
        capacity.bounds()
    );
    let warnings = config.warnings.iter().chain(remarks);
    for warning in warnings.chain(&capacity.shortfall()) {
        let _ = writeln!(text, "warning: {warning}");
    }
    text
}

/// How replies find the clients of a listener, if not by sessions.
fn replies_of(config: &Config, listener: &Listener) -> Option<&'static str> {
    let servers = listener.servers.iter();
    let mut servers = servers.map(|(index, _)| &config.servers[*index]);
    let named = listener.names.iter();
    let mut named = named.map(|(index, _)| &config.names[*index].server);
    match servers.next().or_else(|| named.next())?.replies {
        Replies::Session => None,
        Replies::Auto(_) => Some("replies find their client by tags where servers return them"),
        Replies::Tagged(_) if listener.sessions.0 => Some("replies find their client by tags"),
        Replies::Tagged(_) => Some("no sessions: replies find their client by tags"),
    }
}

/// How long headers to the servers of a listener are and what they say besides clients, and
/// which datagrams have one, if that is not as usual.
fn header_of(config: &Config, listener: &Listener) -> Vec<String> {
    let mut lines = Vec::new();
    let mut reading = config
        .written_to(listener)
        .filter(|(_, mode)| mode.has_header());
    let Some((server, mode)) = reading.next() else {
        return lines;
    };
    if let Some(tlvs) = &server.tlvs {
        let mut types: Vec<_> = tlvs.types().map(|kind| kind.to_string()).collect();
        if tlvs.has_unique_id() {
            types.push("UNIQUE_ID of the session".to_owned());
        }
        let (len, types) = (server.header_len(mode, listener), types.join(", "));
        let passes = listener.accept.as_ref().is_some_and(Accept::passes_tlvs);
        let passed = match passes {
            true => format!(", and up to {MAX_PASSED_TLVS} more of TLVs that pass"),
            false => String::new(),
        };
        lines.push(format!(
            "headers have up to {len} bytes, with {types}{passed}"
        ));
    }
    if mode == Mode::Spp {
        lines.push(
            "headers by Simple Proxy Protocol, which replies must have in front, too".to_owned(),
        );
    }
    if mode.may_omit_header() {
        let repeat = server.repeat.map_or_else(String::new, |repeat| {
            format!(", and again after {}", humantime::format_duration(repeat))
        });
        lines.push(format!(
            "headers until the server has answered{repeat}: it must remember clients (our SDKs: `remember_senders`)"
        ));
    }
    lines
}

/// A line for each source network of a listener.
fn networks_of(config: &Config, listener: &Listener) -> Vec<String> {
    let all = config.source_networks_of(listener).into_iter();
    let line = |network: SourceNetwork| {
        let workers = config.worker_count();
        let ports = match network.port.map(|port| usize::from(port.get())) {
            None => String::new(),
            Some(port) if workers == 1 => format!(", port {port}"),
            Some(first) => format!(", ports {first} to {}", first + workers - 1),
        };
        format!(
            "sessions send from an address each of {}{ports}",
            network.network
        )
    };
    all.map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_will_be_set_up_is_named() {
        let config = Config::from_toml(
            "x",
            r#"
peers = ["192.0.2.7", "2001:db8::/64"]
[admin]
listen = "127.0.0.1:9901"
[upgrade]
socket = "/run/ppv2/upgrade.sock"
[limits]
max_sessions = 3000000
[[listener]]
bind = ["127.0.0.1:5353", "[::1]:5353"]
upstream = "dns"
responses = 1
[upstream.dns]
hash_ipv6_prefix = 56
servers = [
  "192.0.2.1:53",
  { address = "192.0.2.2:53", mode = "plain", weight = 3, drain = true },
  { address = "192.0.2.3:53", backup = true },
]
"#,
        )
        .unwrap();
        let text = report(&config);
        for line in [
            "listener listener1: 127.0.0.1:5353 [::1]:5353",
            "  sessions end after 30s, or 1 reply a datagram",
            "  -> dns 192.0.2.1:53 ppv2",
            "  -> dns 192.0.2.2:53 plain, weight 3, drain",
            "  -> dns 192.0.2.3:53 ppv2, backup",
            "  balance maglev, hash_on client_ip (IPv6 by /56)",
            "peers (other proxies, not clients): 192.0.2.7/32 2001:db8::/64",
            "admin: 127.0.0.1:9901",
            "upgrade: at /run/ppv2/upgrade.sock",
        ] {
            assert!(
                text.lines().any(|l| l == line),
                "{line} is missing in\n{text}"
            );
        }
        assert!(text.contains("warning: max_sessions is 3000000"));
        assert!(text.contains(", memory about "), "{text}");
    }

    #[test]
    fn headers_that_are_not_as_usual_are_described() {
        let tlvs = "tlvs = [{ type = \"0xE1\", value = \"text\" }, { type = \"unique_id\", from = \"session\" }]";
        let with_tlvs = format!("crc32c = true, authority = \"a.test\", {tlvs}");
        let types = "AUTHORITY, TLV 0xe1 (custom), UNIQUE_ID of the session";
        let accept = "accept = { from = [\"192.0.2.0/24\"], tlvs = \"pass\" }";
        for (of_listener, header, line) in [
            ("", "crc32c = true", None),
            ("mode = \"plain\"", &with_tlvs, None),
            // 28 bytes for IPv4, 9, 7 and 19 for TLVs, 7 for the checksum.
            ("", &with_tlvs, Some(format!("headers have up to 70 bytes, with {types}"))),
            (
                accept,
                &with_tlvs,
                Some(format!(
                    "headers have up to 94 bytes, with {types}, and up to 484 more of TLVs that pass"
                )),
            ),
            (
                "",
                "emit = \"first\", repeat = \"10s\"",
                Some(
                    "headers until the server has answered, and again after 10s: it must remember clients (our SDKs: `remember_senders`)"
                        .to_owned(),
                ),
            ),
            (
                "",
                "format = \"spp\"",
                Some("headers by Simple Proxy Protocol, which replies must have in front, too".to_owned()),
            ),
        ] {
            let text = format!(
                "[[listener]]\nbind = [\"127.0.0.1:9000\"]\nupstream = \"u\"\n{of_listener}\n\
                 [upstream.u]\nservers = [\"192.0.2.1:9000\"]\nheader = {{ {header} }}\n"
            );
            let report = report(&Config::from_toml("x", &text).unwrap());
            let mut described = report.lines().map(str::trim).filter(|line| {
                line.starts_with("headers have") || line.starts_with("headers until") || line.starts_with("headers by")
            });
            assert_eq!(described.next().map(str::to_owned), line, "{report}");
            assert_eq!(described.next(), None, "{report}");
        }
    }

    #[test]
    fn accepted_headers_are_named() {
        for (accept, line) in [
            (
                "from = [\"192.0.2.0/24\", \"::1\"]",
                "  headers (v2) from 192.0.2.0/24 ::1/128 on each datagram; other sources are dropped",
            ),
            (
                "from = [\"::1\"], formats = [\"v2\", \"spp\"], direct = \"accept\", local = \"drop\", tlvs = \"pass\"",
                "  headers (v2 or spp) from ::1/128 on each datagram; TLVs pass; LOCAL is dropped; other sources are clients",
            ),
            (
                "from = [\"::1\"], remember = { header_alone = \"forward\" }",
                "  headers (v2) from ::1/128, remembered for 30s, of at most 100000 senders; headers alone are forwarded; other sources are dropped",
            ),
        ] {
            let content = format!(
                "[[listener]]\nbind = [\"127.0.0.1:5353\"]\nupstream = \"u\"\naccept = {{ {accept} }}\n\
                 [upstream.u]\nservers = [\"192.0.2.1:53\"]\n"
            );
            let text = report(&Config::from_toml("x", &content).unwrap());
            assert!(
                text.lines().any(|l| l == line),
                "{line} is missing in\n{text}"
            );
        }
    }

    #[test]
    fn source_networks_are_named_with_their_ports() {
        let content = "workers = 3\n[[listener]]\nbind = [\"127.0.0.1:5353\"]\nupstream = \"u\"\n[upstream.u]\n\
                       source = [\"fd00:1::/64\", \"127.64.0.0/10\"]\nsource_port = 7000\nservers = [\"127.0.0.1:53\"]\n";
        let text = report(&Config::from_toml("x", content).unwrap());
        for line in [
            "  sessions send from an address each of 127.64.0.0/10, ports 7000 to 7002",
            "warning: upstream `u`: source network fd00:1::/64 is not used: no server is of its family",
        ] {
            assert!(
                text.lines().any(|l| l == line),
                "{line} is missing in\n{text}"
            );
        }
        assert!(
            text.contains(" (source networks allow 2097150, memory about "),
            "{text}"
        );
    }

    #[test]
    fn a_range_is_one_line_with_its_sockets() {
        let content = "workers = 2\n[[listener]]\nbind = [\"127.0.0.1:40000-40999\", \"[::1]:40000\"]\n\
                       upstream = \"u\"\n[upstream.u]\nservers = [\"192.0.2.1:53\"]\n";
        let config = Config::from_toml("x", content).unwrap();
        assert_eq!(config.listening_sockets(), 2002);
        let text = report(&config);
        for line in [
            "listener listener1: 127.0.0.1:40000-40999 [::1]:40000",
            "  1001 addresses, 2 workers: 2002 sockets",
        ] {
            assert!(
                text.lines().any(|l| l == line),
                "{line} is missing in\n{text}"
            );
        }
        assert!(text.lines().count() < 10, "{text}");
    }

    #[test]
    fn listening_sockets_reduce_the_capacity() {
        let config = |workers: usize| {
            let content = format!(
                "workers = {workers}\n[[listener]]\nbind = [\"127.0.0.1:5353\", \"[::1]:5353\"]\n\
                 upstream = \"u\"\n[upstream.u]\nservers = [\"192.0.2.1:53\"]\n"
            );
            Config::from_toml("x", &content).unwrap()
        };
        assert_eq!(config(3).listening_sockets(), 6);
        let open_files = |workers| {
            let text = report(&config(workers));
            let (_, rest) = text.split_once("open files allow ").unwrap();
            rest.split_once(',').unwrap().0.parse::<usize>().unwrap()
        };
        // Two addresses, and what a worker takes for itself.
        assert_eq!(open_files(1) - open_files(11), 10 * (2 + 2));
    }
}
