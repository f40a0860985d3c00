//! Options of health checks.

use super::*;

fn with(health: &str) -> String {
    GOOD.replacen(
        "[upstream.resolvers]",
        &format!("[upstream.resolvers]\nhealth = {{ {health} }}"),
        1,
    )
}

#[test]
fn without_keys_health_is_as_the_readme_promises() {
    let config = Config::from_toml("proxy.toml", &with("")).unwrap();
    let health = config.servers[1].health.as_ref().unwrap();
    assert_eq!(*health.every, Duration::from_secs(2));
    assert_eq!(health.timeout(), Duration::from_millis(500));
    assert_eq!((*health.fall, *health.rise), (3, 2));
    assert_eq!(*health.jitter_percent, 10);
    assert!(health.fail_open.0 && health.passive.is_none());
    let Some(Probe::Udp {
        payload, expect, ..
    }) = &health.probe
    else {
        panic!("{health:?}");
    };
    assert!(payload.is_empty() && matches!(expect, Expect::Silence));
}

#[test]
fn probes_are_read() {
    let probe = |probe: &str| {
        let config = Config::from_toml("x", &with(&format!("probe = {{ {probe} }}"))).unwrap();
        config.servers[0]
            .health
            .as_ref()
            .unwrap()
            .probe
            .clone()
            .unwrap()
    };
    let Probe::Dns { query, .. } = probe("kind = \"dns\", name = \"a.example\"") else {
        panic!("no query");
    };
    assert_eq!(
        &query[2..],
        b"\x01\0\0\x01\0\0\0\0\0\0\x01a\x07example\0\0\x01\0\x01"
    );
    let udp = probe("kind = \"udp\", send_hex = \"00 fF\", expect_regex = '^\\d+$'");
    let Probe::Udp {
        payload,
        expect: Expect::Matching(regex),
        ..
    } = udp
    else {
        panic!("{udp:?}");
    };
    assert_eq!(payload, [0, 255]);
    assert!(regex.is_match(b"17") && !regex.is_match(b"17 "));
}

#[test]
fn errors_show_the_fix() {
    for (health, what, fix) in [
        (
            "every = \"0s\"",
            "health.every: `0s` is too short",
            "from \"10ms\"",
        ),
        ("every = \"1ms\"", "`1ms` is too short", "from \"10ms\""),
        (
            "every = \"1s\", timeout = \"2s\"",
            "longer than health.every",
            "at most",
        ),
        ("fall = 0", "health.fall: 0 is out of range", "from 1"),
        ("rise = 0", "health.rise: 0 is out of range", "from 1"),
        (
            "jitter_percent = 91",
            "health.jitter_percent: 91 is out of range",
            "from 0 to 90",
        ),
        ("evry = \"1s\"", "unknown key `evry`", "`every`"),
        ("probe = { kind = \"upd\" }", "`upd` is not known", "`udp`"),
        ("probe = { kind = \"none\" }", "check nothing", "`passive`"),
        (
            "probe = { kind = \"dns\" }",
            "without `name`",
            "add the name",
        ),
        (
            "probe = { kind = \"dns\", name = \"a..b\" }",
            "not a domain name",
            "labels",
        ),
        (
            "probe = { kind = \"dns\", name = \"a b\" }",
            "not a domain name",
            "labels",
        ),
        (
            "probe = { kind = \"udp\", path = \"/\" }",
            "`path` is not for",
            "leave it out",
        ),
        (
            "probe = { kind = \"udp\", send_hex = \"0g\" }",
            "not hexadecimal",
            "two digits",
        ),
        (
            "probe = { kind = \"udp\", send_hex = \"012\" }",
            "not hexadecimal",
            "two digits",
        ),
        (
            "probe = { kind = \"udp\", expect_regex = \"(\" }",
            "expect_regex",
            "regular expression",
        ),
        (
            "probe = { kind = \"udp\", expect_regex = \"(x{1000}){1000}\" }",
            "expect_regex: it takes more than 65536 bytes",
            "repeat less",
        ),
        (
            "probe = { kind = \"udp\", expect_regex = '([a-z]{1,100}){1,20}\\W\\W$' }",
            "expect_regex: it takes more than 65536 bytes",
            "repeat less",
        ),
        (
            "probe = { kind = \"udp\", expect = \"a\", expect_reply = false }",
            "expects two things",
            "one of",
        ),
        (
            "probe = { kind = \"http\", path = \"a b\" }",
            "is not a path",
            "/health",
        ),
        (
            "passive = { window = \"0s\" }",
            "passive.window: `0s` is too short",
            "from \"1ms\"",
        ),
    ] {
        let error = error(&with(health));
        assert!(
            error.contains(what) && error.contains(fix),
            "{health}: {error}"
        );
        assert!(error.contains("proxy.toml:22:"), "{health}: {error}");
    }
}
