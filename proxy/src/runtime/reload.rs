//! What another configuration changes: what of it takes a restart, and what has come
//! and gone, in words.

use std::collections::BTreeSet;

use super::leaving::identity;
use crate::config::{Config, Listener};

/// What can't change while the proxy runs, and would, in words; with the mend.
pub(super) fn takes_restart(old: &Config, new: &Config) -> Option<String> {
    let shown = |value: &Option<String>| value.clone().unwrap_or_else(|| "unset".to_owned());
    let differs = |key: &str, old: String, new: String| {
        (old != new).then(|| {
            format!("{key} is {old} and would be {new}, which takes a restart; set it back, or restart the proxy")
        })
    };
    let count = |config: &Config| config.worker_count().to_string();
    let admin = |config: &Config| config.admin.map(|address| address.to_string());
    differs("workers", count(old), count(new))
        .or_else(|| {
            let (old, new) = (old.reuse_port, new.reuse_port);
            differs("reuse_port", old.to_string(), new.to_string())
        })
        .or_else(|| differs("admin.listen", shown(&admin(old)), shown(&admin(new))))
        .or_else(|| differs("user", shown(&old.user), shown(&new.user)))
}

/// The name of an upstream that has no servers at all in `new`, if one has not, but
/// for those that have none as it is.
pub(super) fn without_servers<'a>(old: &Config, new: &'a Config) -> Option<&'a str> {
    let empty = |config: &'_ Config| -> BTreeSet<_> {
        let listeners = config.listeners.iter();
        let empty = listeners.filter(|listener| listener.servers.is_empty());
        empty.map(|listener| listener.upstream.clone()).collect()
    };
    let known = empty(old);
    let mut listeners = new.listeners.iter();
    let is_new = |listener: &&Listener| !known.contains(&listener.upstream);
    let listener = listeners.find(|listener| listener.servers.is_empty() && is_new(listener));
    listener.map(|listener| listener.upstream.as_str())
}

/// What has come and gone from one configuration to another.
pub(super) fn news(old: &Config, new: &Config) -> String {
    fn listeners(config: &Config) -> BTreeSet<&str> {
        let listeners = config.listeners.iter();
        listeners.map(|listener| listener.name.as_str()).collect()
    }
    let servers = |config: &Config| -> BTreeSet<_> {
        let servers = config.servers.iter().filter(|server| !server.leaving);
        servers
            .map(|server| {
                let (upstream, address) = identity(server);
                (upstream.to_owned(), address)
            })
            .collect()
    };
    let of = |what, count: usize, come: usize, gone: usize| {
        format!("{count} {what} ({come} new, {gone} gone)")
    };
    let (before, after) = (listeners(old), listeners(new));
    let come = after.difference(&before).count();
    let listeners = of(
        "listeners",
        after.len(),
        come,
        before.difference(&after).count(),
    );
    let (before, after) = (servers(old), servers(new));
    let come = after.difference(&before).count();
    let servers = of(
        "servers",
        after.len(),
        come,
        before.difference(&after).count(),
    );
    format!("{listeners}, {servers}")
}
