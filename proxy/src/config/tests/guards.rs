//! Bounds on clients, and the access log, as they are read.

use super::super::*;
use ppv2_engine::listener::Amplification;

fn load(top: &str, of_listener: &str) -> Result<Config, String> {
    let content = format!(
        "{top}\n[[listener]]\nbind = [\"127.0.0.1:5353\"]\nupstream = \"u\"\n{of_listener}\n\
         [upstream.u]\nservers = [\"192.0.2.1:53\"]\n"
    );
    Config::from_toml("x", &content).map_err(|error| error.to_string())
}

#[test]
fn client_bounds_are_off_by_default() {
    let config = load("", "").unwrap();
    let listener = &config.listeners[0];
    let per_client = listener.per_client;
    assert!(per_client.sessions.is_none() && per_client.rate().is_none());
    assert_eq!(*per_client.ipv6_prefix, 64);
    assert_eq!(listener.rules().amplification, None);
    assert_eq!((&listener.deny, &config.access_log), (&Vec::new(), &None));
    assert!(config.peers.is_none() && config.reuse_port.0);
}

#[test]
fn client_bounds_are_read() {
    let config = load(
        "workers = 3\nreuse_port = false\npeers = [\"192.0.2.8\", \"2001:db8::/64\"]\n[access_log]\npath = \"-\"",
        "deny = [\"192.0.2.0/24\"]\namplification = { limit = 3 }\n\
         per_client = { sessions = 9, rate = 100, ipv6_prefix = 56 }",
    )
    .unwrap();
    let listener = &config.listeners[0];
    let per_client = listener.per_client;
    assert_eq!(per_client.sessions.map(|sessions| *sessions), Some(9));
    assert_eq!(
        (per_client.rate(), *per_client.ipv6_prefix),
        (Some((100, 100)), 56)
    );
    let watch = Amplification {
        limit: 3,
        enforce: false,
    };
    assert_eq!(listener.rules().amplification, Some(watch));
    assert_eq!(listener.deny, ["192.0.2.0/24".parse().unwrap()]);
    let peers = ["192.0.2.8/32", "2001:db8::/64"].map(|net| net.parse().unwrap());
    assert_eq!(config.peers, Some(peers.into()));
    assert_eq!(config.listening_sockets(), 1);
    let log = config.access_log.unwrap();
    assert_eq!((log.file(), log.format), (None, LogFormat::Text));
}

#[test]
fn errors_name_the_fix() {
    for (top, of_listener, message, fix) in [
        (
            "",
            "per_client = { burst = 5 }",
            "`per_client.burst` without a rate",
            "add `rate`",
        ),
        (
            "",
            "per_client = { sessions = 0 }",
            "per_client.sessions: 0 is out of range",
            "a number from 1",
        ),
        (
            "",
            "per_client = { ipv6_prefix = 129 }",
            "per_client.ipv6_prefix: 129 is out of range",
            "from 1 to 128",
        ),
        (
            "",
            "per_client = { session = 1 }",
            "unknown key `session`",
            "did you mean `sessions`",
        ),
        (
            "",
            "amplification = { limit = 3, action = \"drop\" }",
            "amplification.action: `drop` is not known",
            "off, watch, enforce",
        ),
        (
            "",
            "deny = [\"everybody\"]",
            "`everybody` is not a network",
            "192.0.2.0/24",
        ),
        (
            "peers = [\"192.0.2.8:5300\"]",
            "",
            "`192.0.2.8:5300` is not a network",
            "192.0.2.0/24",
        ),
        (
            "peers = [\"0.0.0.0/0\"]",
            "",
            "0.0.0.0/0 in `peers` would treat every client as a proxy",
            "the other proxies' addresses alone",
        ),
        (
            "[access_log]\npath = \"\"",
            "",
            "an access log without a path",
            "standard output",
        ),
        (
            "[access_log]\npath = \"-\"\nformat = \"xml\"",
            "",
            "format: `xml` is not known",
            "text, json",
        ),
    ] {
        let error = load(top, of_listener).unwrap_err();
        assert!(error.contains(message), "{message}: {error}");
        assert!(error.contains(fix), "{fix}: {error}");
    }
}

#[test]
fn an_access_log_goes_to_one_place_with_fields_that_exist() {
    let parsed = |log: &str| load(&format!("[access_log]\n{log}"), "");
    let log = |log: &str| parsed(log).unwrap().access_log.unwrap();
    let file = log("path = \"/a\"");
    assert_eq!(file.file(), Some(Path::new("/a")));
    assert_eq!(file.line(), LogField::USUAL);
    let syslog = log("target = \"syslog\"\nfields = [\"client_ip\", \"time\"]");
    assert_eq!(syslog.socket(), Path::new("/dev/log"));
    assert_eq!(syslog.line(), [LogField::ClientIp, LogField::Time]);
    let journald = log("target = \"journald\"");
    let socket = Path::new("/run/systemd/journal/socket");
    assert_eq!(journald.socket(), socket);
    let journald = log("target = \"journald\"\nsocket = \"/b\"");
    assert_eq!(journald.socket(), Path::new("/b"));
    for (log, message, fix) in [
        ("", "without `path` or `target`", "target = \"syslog\""),
        ("path = \"\"", "without a path", "standard output"),
        (
            "path = \"/a\"\ntarget = \"syslog\"",
            "`path` is for files, and target is \"syslog\"",
            "remove one",
        ),
        (
            "path = \"/a\"\nsocket = \"/b\"",
            "`socket` is for `target`",
            "remove it",
        ),
        (
            "target = \"journald\"\nfacility = \"local0\"",
            "`facility` is for syslog",
            "target = \"syslog\"",
        ),
        (
            "path = \"/a\"\nfields = []",
            "`fields` is empty",
            "name some",
        ),
        (
            "path = \"/a\"\nfields = [\"time\", \"client\", \"time\"]",
            "`fields` has \"time\" twice",
            "remove one",
        ),
        (
            "path = \"/a\"\nfields = [\"clientip\"]",
            "`clientip`",
            "`client_ip`",
        ),
    ] {
        let error = parsed(log).unwrap_err();
        assert!(error.contains(message) && error.contains(fix), "{error}");
    }
}
