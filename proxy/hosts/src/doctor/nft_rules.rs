//! The nft rules that rewrite replies. Listing them takes CAP_NET_ADMIN.

use std::process::Command;

use rustix::thread::CapabilitySet;

use super::{Finding, capabilities};
use crate::host_setup::Role;
use crate::nft::nft_set;
use crate::reply_path::ReplyPath;

pub(super) fn examine(paths: &[&ReplyPath], role: Role) -> Vec<Finding> {
    if paths.is_empty() {
        return Vec::new();
    }
    let table = role.nft_table();
    let rules = rules(table);
    let finding = |path: &&ReplyPath| {
        let what = format!(
            "nft rules that make replies of server {} come from {}",
            path.server, path.listener
        );
        let rules = match &rules {
            Ok(rules) => rules,
            Err(why) => return Finding::advice(what, why, "run doctor as root"),
        };
        let matches = path.nft_match(role);
        let sets = format!("{} accept", nft_set(path.listener));
        let is_there = |line: &str| line.contains(&matches) && line.contains(&sets);
        if rules.lines().any(is_there) {
            Finding::ok(what, format!("present in table inet {table}"))
        } else {
            let missing = format!("missing from table inet {table}");
            Finding::fatal(what, missing, role.set_up())
        }
    };
    paths.iter().map(finding).collect()
}

/// The rules of a table, empty if there is none, or why they can't be listed.
fn rules(table: &str) -> Result<String, String> {
    if !capabilities::effective().contains(CapabilitySet::NET_ADMIN) {
        return Err("can't be listed without CAP_NET_ADMIN".to_owned());
    }
    let output = Command::new("nft")
        .args(["list", "table", "inet", table])
        .output()
        .map_err(|error| format!("nft can't be run: {error}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
