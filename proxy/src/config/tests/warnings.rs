//! Warnings of what works but is probably not meant.

use super::*;

/// Without anything to be warned of.
fn good() -> String {
    GOOD.replace("emit = \"first\", ", "")
}

#[test]
fn an_address_without_allowed_clients_is_a_warning() {
    let only_v6 = good().replacen("\"192.0.2.0/24\", ", "", 1);
    let config = Config::from_toml("proxy.toml", &only_v6).unwrap();
    assert_eq!(
        config.warnings,
        ["listener `dns`: no client of 0.0.0.0:5353 can be served: `allow` has no IPv4 network"]
    );
}

#[test]
fn an_unused_upstream_is_a_warning() {
    let unused = "[upstream.spare]\nservers = [\"192.0.2.1:1\"]\n";
    let config = Config::from_toml("proxy.toml", &format!("{}{unused}", good())).unwrap();
    assert_eq!(config.warnings, ["upstream `spare` is used by no listener"]);
    assert_eq!(config.servers.len(), 2);
    // One in front of the others takes none of their numbers.
    let first = unused.replace("spare", "aaa");
    let config = Config::from_toml("proxy.toml", &format!("{}{first}", good())).unwrap();
    assert_eq!(config.servers[0].name, "192.0.2.10:53");
    assert_eq!(config.listeners[0].servers[1].0, 1);
}

#[test]
fn freebind_for_an_address_that_is_elsewhere_asks_for_peers() {
    let asks = |config: String| {
        let config = Config::from_toml("proxy.toml", &config).unwrap();
        config
            .warnings
            .iter()
            .any(|warning| warning.contains("`freebind` is on"))
    };
    for address in ["203.0.113.77:5300", "[2001:db8:77::1]:5300"] {
        let config = |more: &str| {
            format!(
                "{more}\n[[listener]]\nname = \"vip\"\nbind = [\"{address}\"]\nfreebind = true\n\
                 upstream = \"u\"\n[upstream.u]\nservers = [\"192.0.2.10:53\"]\n"
            )
        };
        assert!(asks(config("")));
        assert!(!asks(config("peers = []")));
        assert!(!asks(config("").replace("freebind = true", "")));
    }
}

#[test]
fn peers_that_are_all_clients_of_a_listener_are_a_warning() {
    let config = format!("peers = [\"192.0.0.0/16\", \"2001:db8::/32\"]\n{}", good());
    let config = Config::from_toml("proxy.toml", &config).unwrap();
    assert_eq!(
        config.warnings,
        ["listener `dns` serves nobody: all that `allow` lets in is in `peers`"]
    );
}
