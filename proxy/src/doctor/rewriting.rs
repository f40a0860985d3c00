//! The rules that rewrite replies. Only who has CAP_NET_ADMIN may look at them.

use std::process::Command;

use rustix::thread::CapabilitySet;

use super::{Finding, privilege, servers_of};
use crate::commands::host_setup::{PROXY_NFT_TABLE, SERVER_NFT_TABLE};
use crate::returns::{By, Return};

pub(super) fn examine_proxy(returns: &[Return]) -> Vec<Finding> {
    let servers = servers_of(returns, By::ProxyHost);
    examine(&servers, PROXY_NFT_TABLE, "proxy", |found| {
        let family = if found.server.is_ipv4() { "ip" } else { "ip6" };
        let (ip, port) = (found.server.ip(), found.server.port());
        format!("{family} saddr {ip} udp sport {port}")
    })
}

pub(super) fn examine_server(returns: &[&Return]) -> Vec<Finding> {
    examine(returns, SERVER_NFT_TABLE, "server", |found| {
        let family = if found.server.is_ipv4() {
            "ipv4"
        } else {
            "ipv6"
        };
        format!("meta nfproto {family} udp sport {}", found.server.port())
    })
}

fn examine(
    servers: &[&Return],
    table: &str,
    role: &str,
    matches: impl Fn(&Return) -> String,
) -> Vec<Finding> {
    if servers.is_empty() {
        return Vec::new();
    }
    let mend =
        format!("run what `ppv2-proxy host-setup --config FILE --role {role}` prints, as root");
    let rules = rules(table);
    let finding = |found: &&Return| {
        let what = format!(
            "rules that have replies of server {} come from {}",
            found.server, found.listener
        );
        let rules = match &rules {
            Ok(rules) => rules,
            Err(why) => {
                return Finding::advice(what, why, "run doctor as root, which may list them");
            }
        };
        let family = if found.listener.is_ipv4() {
            "ip"
        } else {
            "ip6"
        };
        let (ip, port) = (found.listener.ip(), found.listener.port());
        let sets = format!("udp sport set {port} {family} saddr set {ip} accept");
        let wanted = matches(found);
        let is_there = |line: &str| line.contains(&wanted) && line.contains(&sets);
        if rules.lines().any(is_there) {
            Finding::right(what, format!("in nft's table inet {table}"))
        } else {
            Finding::fatal(what, format!("not in nft's table inet {table}"), &mend)
        }
    };
    servers.iter().map(finding).collect()
}

/// The rules of a table, empty if there is none, or why they can't be seen.
fn rules(table: &str) -> Result<String, String> {
    if !privilege::has(CapabilitySet::NET_ADMIN) {
        return Err("can't be looked at without CAP_NET_ADMIN".to_owned());
    }
    let output = Command::new("nft")
        .args(["list", "table", "inet", table])
        .output()
        .map_err(|error| format!("nft can't be run: {error}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
