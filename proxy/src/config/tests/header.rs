//! `header`: what headers to servers say besides the client.

use ppv2_engine::own_tlvs::OwnTlvs;

use super::super::*;

fn load(of_listener: &str, of_upstream: &str) -> Result<Config, String> {
    let content = format!(
        "[[listener]]\nname = \"l\"\nbind = [\"127.0.0.1:5353\"]\nupstream = \"u\"\n{of_listener}\n\
         [upstream.u]\n{of_upstream}\nservers = [\"192.0.2.1:53\", \"dns:a.example:53\"]\n"
    );
    Config::from_toml("p.toml", &content).map_err(|error| error.to_string())
}

/// With these TLVs in the header.
fn tlvs(tlvs: &str) -> Result<Config, String> {
    load("", &format!("header = {{ tlvs = [{tlvs}] }}"))
}

#[track_caller]
fn refused(result: Result<Config, String>, parts: &[&str]) {
    let error = result.unwrap_err();
    for part in parts {
        assert!(error.contains(part), "no `{part}` in\n{error}");
    }
}

#[test]
fn tlvs_stand_as_they_were_given_behind_the_authority() {
    let config = load(
        "",
        "header = { authority = \"a.test\", tlvs = [ { type = \"0xE1\", value = \"text\" }, \
         { type = \"ALPN\", value = \"\" }, { type = \"0xe2\", hex = \"0a 0B\" }, \
         { type = \"unique_id\", from = \"session\" } ] }",
    )
    .unwrap();
    let mut expected = OwnTlvs::new();
    for (kind, value) in [
        (ppv2::TlvType::AUTHORITY, &b"a.test"[..]),
        (ppv2::TlvType(0xe1), b"text"),
        (ppv2::TlvType::ALPN, b""),
        (ppv2::TlvType(0xe2), b"\x0a\x0b"),
    ] {
        expected.push(kind, value).unwrap();
    }
    expected.add_unique_id();
    assert_eq!(config.servers[0].tlvs.as_deref(), Some(&expected));
    assert_eq!(config.names[0].server.tlvs.as_deref(), Some(&expected));
    assert_eq!(config.warnings, Vec::<String>::new());

    for none in ["", "header = { crc32c = true }", "header = { tlvs = [] }"] {
        assert!(load("", none).unwrap().servers[0].tlvs.is_none());
    }
}

#[test]
fn a_tlv_that_no_header_can_have_is_refused() {
    for (of, parts) in [
        (
            "{ type = \"uniqueid\", value = \"a\" }",
            [
                "`uniqueid` is not a type of TLV",
                "did you mean `unique_id`?",
            ],
        ),
        (
            "{ type = \"225\", value = \"a\" }",
            ["`225` is not a type", "0x and two hexadecimal digits"],
        ),
        (
            "{ type = \"crc32c\", hex = \"00000000\" }",
            ["no TLV of type `crc32c`", "crc32c = true"],
        ),
        (
            "{ type = \"noop\", value = \"\" }",
            ["`noop`", "leave it out"],
        ),
        (
            "{ type = \"0xEB\", value = \"a\" }",
            ["`reply_tag`", "take another type"],
        ),
        (
            "{ type = \"0xE1\" }",
            ["`0xE1` without a value", "give `value`"],
        ),
        (
            "{ type = \"0xE1\", value = \"a\", hex = \"61\" }",
            ["`0xE1` with `value` and `hex`", "give one of them"],
        ),
        (
            "{ type = \"unique_id\", value = \"a\", from = \"session\" }",
            ["`unique_id` with `value` and `from`", "give one of them"],
        ),
        (
            "{ type = \"0xE1\", from = \"session\" }",
            ["`from` for the type `0xE1`", "only a unique_id"],
        ),
        (
            "{ type = \"unique_id\", from = \"request\" }",
            ["`request` is not known", "session"],
        ),
        (
            "{ type = \"unique_id\", from = \"session\" }, { type = \"unique_id\", value = \"a\" }",
            ["two TLVs of type `unique_id`", "give one of them"],
        ),
        (
            "{ type = \"0xE1\", hex = \"0\" }",
            ["not hexadecimal", "two digits for each byte"],
        ),
        (
            "{ type = \"ssl\", hex = \"01\" }",
            ["no server could read this `ssl`", "0xE0 to 0xEF"],
        ),
        (
            "{ type = \"authority\", hex = \"ff\" }",
            ["no server could read this `authority`", "0xE0 to 0xEF"],
        ),
    ] {
        refused(tlvs(of), &[&["p.toml:7:"][..], &parts].concat());
    }
    let id = "61".repeat(129);
    refused(
        tlvs(&format!("{{ type = \"unique_id\", hex = \"{id}\" }}")),
        &["a unique_id of 129 bytes", "at most 128"],
    );
    let filled = |len| format!("{{ type = \"0xE1\", value = \"{}\" }}", "x".repeat(len));
    tlvs(&filled(509)).unwrap();
    let too_long = ["TLVs of 513 bytes up to here", "at most 512"];
    refused(tlvs(&filled(510)), &too_long);
    refused(
        tlvs(&format!("{}, {}", filled(255), filled(252))),
        &too_long,
    );
    refused(tlvs(&filled(70_000)), &["TLVs of 70003 bytes"]);
}

#[test]
fn an_authority_is_a_host_name_that_is_given_once() {
    let authority = |name: &str| load("", &format!("header = {{ authority = \"{name}\" }}"));
    authority(&"a".repeat(255)).unwrap();
    refused(authority(""), &["`authority` is empty", "host name"]);
    refused(authority(&"a".repeat(256)), &["`authority` has 256 bytes"]);
    refused(authority("a\\u001b"), &["can't be shown"]);
    refused(
        load(
            "",
            "header = { authority = \"a\", tlvs = [{ type = \"authority\", value = \"b\" }] }",
        ),
        &["beside the key `authority`", "give one of them"],
    );
}

#[test]
fn an_id_of_the_session_needs_sessions() {
    let of_upstream = "replies = \"tagged\"\n\
                       header = { tlvs = [{ type = \"unique_id\", from = \"session\" }] }";
    load("", of_upstream).unwrap();
    refused(
        load("sessions = false", of_upstream),
        &[
            "listener `l` has none (sessions = false)",
            "leave the TLV out",
        ],
    );
    let fixed = of_upstream.replace("from = \"session\"", "value = \"eu-1\"");
    load("sessions = false", &fixed).unwrap();
}

#[test]
fn a_header_that_receivers_refuse_or_that_nobody_gets_is_a_warning() {
    let filled = |len| {
        let value = "x".repeat(len);
        format!("header = {{ crc32c = true, tlvs = [{{ type = \"0xE1\", value = \"{value}\" }}] }}")
    };
    // 28 bytes for IPv4, 3 and 7 for what TLVs begin with and the checksum.
    let longest = 512 - 28 - 3 - 7;
    let warnings =
        |of_listener, of_upstream: &str| load(of_listener, of_upstream).unwrap().warnings;
    assert!(warnings("", &filled(longest)).is_empty());
    let too_long = warnings("", &filled(longest + 1));
    assert_eq!(
        too_long,
        [
            "upstream `u`: headers of up to 513 bytes; dnsdist and our SDKs refuse those of more than 512 unless told otherwise"
        ]
    );
    let accept = "accept = { from = [\"192.0.2.0/24\"] }";
    let of_ipv6 = warnings(accept, &filled(longest));
    let names_len = |warning: &String| warning.contains("headers of up to 536 bytes");
    assert!(of_ipv6.iter().any(names_len), "{of_ipv6:?}");

    let nobody = warnings("mode = \"plain\"", &filled(1));
    assert!(
        nobody[0].contains("`header` changes nothing for listener `l`"),
        "{nobody:?}"
    );
    assert!(warnings("mode = \"plain\"", "").is_empty());
}

#[test]
fn a_header_is_repeated_where_it_does_not_come_each_time() {
    let load = |header: &str| load("", &format!("header = {{ {header} }}"));
    let config = load("emit = \"first\", repeat = \"10s\"").unwrap();
    let ten = Some(Duration::from_secs(10));
    assert_eq!(
        (config.servers[0].repeat, config.names[0].server.repeat),
        (ten, ten)
    );
    assert_eq!(load("emit = \"first\"").unwrap().servers[0].repeat, None);
    refused(
        load("repeat = \"10s\""),
        &["`repeat` with emit = \"every\"", "leave `repeat` out"],
    );
    refused(
        load("emit = \"first\", repeat = \"1ms\""),
        &["too short", "100ms"],
    );
}

#[test]
fn servers_that_seem_to_need_each_header_are_a_warning_where_it_comes_once() {
    let load = |header: &str, servers: &str, health: &str| {
        let content = format!(
            "[[listener]]\nbind = [\"127.0.0.1:9000\"]\nupstream = \"u\"\n\
             [upstream.u]\nservers = [{servers}]\nheader = {{ {header} }}\n{health}"
        );
        Config::from_toml("p.toml", &content).unwrap().warnings
    };
    let (first, other) = ("emit = \"first\"", "\"192.0.2.1:5354\"");
    let probe = "health = { probe = { kind = \"dns\", name = \"a.example\" } }";
    let port = load(first, "\"192.0.2.1:53\"", "");
    assert!(port[0].contains("seem to answer DNS (port 53)"), "{port:?}");
    assert!(port[0].contains("remember_senders"), "{port:?}");
    let by_probe = load(first, other, probe);
    assert!(
        by_probe[0].contains("(the probe asks for a name)"),
        "{by_probe:?}"
    );

    assert!(load(first, other, "").is_empty());
    assert!(load("", "\"192.0.2.1:53\"", probe).is_empty());
    let plain = "{ address = \"192.0.2.1:53\", mode = \"plain\" }";
    assert!(load(first, &format!("{other}, {plain}"), "").is_empty());
}

#[test]
fn simple_proxy_protocol_says_addresses_alone_on_each_datagram() {
    let spp = "header = { format = \"spp\" }";
    let config = load("", spp).unwrap();
    assert_eq!(config.listeners[0].servers, [(0, Mode::Spp)]);
    assert_eq!(config.warnings, Vec::<String>::new());
    for (key, option) in [
        ("emit", "emit = \"first\""),
        ("crc32c", "crc32c = true"),
        ("authority", "authority = \"a.test\""),
        ("tlvs", "tlvs = [{ type = \"0xE1\", value = \"a\" }]"),
    ] {
        let header = format!("header = {{ format = \"spp\", {option} }}");
        let parts = [
            &format!("`{key}` with format = \"spp\"")[..],
            "or set format = \"v2\"",
        ];
        refused(load("", &header), &parts);
    }
    for replies in ["auto", "tagged"] {
        refused(
            load("", &format!("{spp}\nreplies = \"{replies}\"")),
            &[
                "with header.format = \"spp\"",
                "a tag needs a PROXY v2 header",
            ],
        );
    }
    refused(
        load("mode = \"dsr\"\nrewrite_on = \"sdk\"", spp),
        &[
            "rewrite_on = \"sdk\" and format = \"spp\"",
            "leave `format` out",
        ],
    );
    refused(
        load("", "header = { format = \"v1\" }"),
        &["`v1` is not known", "v2, spp"],
    );
    // Servers that get no header don't matter.
    load("mode = \"transparent\"", spp).unwrap();

    let accept = |tlvs: &str| {
        let accept = format!("accept = {{ from = [\"192.0.2.128/25\"], tlvs = \"{tlvs}\" }}");
        let warnings = load(&accept, spp).unwrap().warnings;
        let has_no_tlvs = |warning: &&String| warning.contains("Simple Proxy Protocol has no TLVs");
        warnings.iter().filter(has_no_tlvs).count()
    };
    assert_eq!((accept("pass"), accept("drop")), (1, 0));
}
