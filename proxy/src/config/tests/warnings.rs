//! What works but is probably not meant is said, and nothing else.

use super::*;

#[test]
fn an_address_without_allowed_clients_is_a_warning() {
    let only_v6 = GOOD.replacen("\"192.0.2.0/24\", ", "", 1);
    let config = Config::from_toml("proxy.toml", &only_v6).unwrap();
    assert_eq!(
        config.warnings,
        ["listener `dns`: no client of 0.0.0.0:5353 can be served: `allow` has no IPv4 network"]
    );
}

#[test]
fn an_upstream_that_nobody_uses_is_a_warning() {
    let unused = "[upstream.spare]\nservers = [\"192.0.2.1:1\"]\n";
    let config = Config::from_toml("proxy.toml", &format!("{GOOD}{unused}")).unwrap();
    assert_eq!(config.warnings, ["upstream `spare` is used by no listener"]);
    assert_eq!(config.servers.len(), 2);
    // One in front of the others takes none of their numbers.
    let first = unused.replace("spare", "aaa");
    let config = Config::from_toml("proxy.toml", &format!("{GOOD}{first}")).unwrap();
    assert_eq!(config.servers[0].name, "192.0.2.10:53");
    assert_eq!(config.listeners[0].servers[1].0, 1);
}

#[test]
fn sharing_sockets_is_counted_and_told_where_it_saves_nothing() {
    let config = |servers: &str| {
        let content = format!(
            "[[listener]]\nbind = [\"127.0.0.1:5353\"]\nupstream = \"u\"\n\
             [upstream.u]\nshare_sockets = true\nservers = [{servers}]\n"
        );
        Config::from_toml("proxy.toml", &content).unwrap()
    };
    let shared = config("\"192.0.2.1:53\", \"192.0.2.2:53\", \"192.0.2.3:53\"");
    assert_eq!(shared.sharing(), 3);
    assert_eq!(shared.warnings, Vec::<String>::new());
    for servers in ["\"192.0.2.1:53\"", "\"192.0.2.1:53\", \"[2001:db8::1]:53\""] {
        let alone = config(servers);
        assert_eq!(alone.sharing(), 1);
        assert!(alone.warnings[0].contains("share_sockets saves nothing"));
    }
    let good = Config::from_toml("proxy.toml", GOOD).unwrap();
    assert_eq!(good.sharing(), 1);
}
