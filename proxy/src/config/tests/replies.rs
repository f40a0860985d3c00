//! `replies`, `tag_key_file` and `sessions`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use ppv2_engine::server::Replies;
use ppv2_engine::tag::TagKeys;

use super::super::*;

fn load(top: &str, of_listener: &str, of_upstream: &str) -> Result<Config, String> {
    let content = format!(
        "{top}\n[[listener]]\nname = \"l\"\nbind = [\"127.0.0.1:5353\"]\nupstream = \"u\"\n{of_listener}\n\
         [upstream.u]\n{of_upstream}\nservers = [\"192.0.2.1:53\", \"dns:a.example:53\"]\n"
    );
    Config::from_toml("p.toml", &content).map_err(|error| error.to_string())
}

#[track_caller]
fn refused(result: Result<Config, String>, parts: &[&str]) {
    let error = result.unwrap_err();
    for part in parts {
        assert!(error.contains(part), "no `{part}` in\n{error}");
    }
}

/// A key file with this mode.
fn key_file(folder: &tempfile::TempDir, content: &str, mode: u32) -> String {
    let file = folder.path().join("tags.key");
    fs::write(&file, content).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
    file.display().to_string()
}

fn with_key(replies: &str, file: &str) -> Result<Config, String> {
    load(
        "",
        "",
        &format!("replies = \"{replies}\"\ntag_key_file = \"{file}\""),
    )
}

const KEY: &str = "000102030405060708090A0B0C0D0E0F\n";

fn key() -> Arc<TagKeys> {
    Arc::new(TagKeys::new(std::array::from_fn(|n| {
        u8::try_from(n).unwrap()
    })))
}

#[test]
fn replies_find_their_client_by_sessions_unless_told_otherwise() {
    for of_upstream in ["", "replies = \"session\""] {
        let config = load("", "", of_upstream).unwrap();
        assert_eq!(config.servers[0].replies, Replies::Session);
        assert_eq!(config.tag_key_files().count(), 0);
        assert!(config.listeners[0].sessions.0 && config.uses_session_sockets());
    }
    refused(
        load("", "", "replies = \"tags\""),
        &["known values: session, auto, tagged"],
    );
}

#[test]
fn replicas_read_the_same_key_and_a_process_keeps_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let file = key_file(&folder, KEY, 0o600);
    let auto = with_key("auto", &file).unwrap();
    assert_eq!(auto.servers[0].replies, Replies::Auto(key()));
    assert_eq!(auto.names[0].server.replies, Replies::Auto(key()));
    assert_eq!(auto.tag_key_files().count(), 1);
    assert!(auto.uses_session_sockets());
    let tagged = with_key("tagged", &file).unwrap();
    assert_eq!(tagged.servers[0].replies, Replies::Tagged(key()));
    assert!(!tagged.uses_session_sockets());
    // Another key from the next reload on.
    key_file(&folder, &KEY.replace('A', "B"), 0o600);
    assert_ne!(
        with_key("auto", &file).unwrap().servers[0].replies,
        Replies::Auto(key())
    );
    let own = || {
        load("", "", "replies = \"auto\"").unwrap().servers[0]
            .replies
            .clone()
    };
    assert_eq!(own(), own());
    assert_ne!(own(), Replies::Auto(key()));
}

#[test]
fn a_bad_key_file_is_an_error_that_names_it_and_not_the_key() {
    let folder = tempfile::tempdir().unwrap();
    for (content, mode, parts) in [
        (
            KEY,
            0o640,
            &[
                "can be used by others than its owner (mode 640)",
                "chmod 600 ",
            ][..],
        ),
        (KEY, 0o602, &["(mode 602)"]),
        (
            &KEY[..30],
            0o600,
            &[
                "has 30 hexadecimal digits",
                "a key has 32",
                "openssl rand -hex 16",
            ],
        ),
        (&KEY.repeat(2), 0o600, &["has 64 hexadecimal digits"]),
        ("", 0o600, &["has 0 hexadecimal digits"]),
        (
            "not a key",
            0o600,
            &["something else than hexadecimal digits"],
        ),
        (
            &KEY.repeat(1000),
            0o600,
            &["can't be read: it has more than 4096 bytes"],
        ),
    ] {
        let file = key_file(&folder, content, mode);
        let error = with_key("auto", &file).unwrap_err();
        let line = format!("p.toml:9:16: key file {file} ");
        assert!(error.contains(&line), "no `{line}` in\n{error}");
        assert!(!error.contains("0102"), "{error}");
        refused(Err(error), parts);
    }
    refused(
        with_key("tagged", "/nonexistent/key"),
        &[
            "key file /nonexistent/key can't be read: No such file",
            "openssl rand -hex 16 >/nonexistent/key; chmod 600",
        ],
    );
    refused(
        with_key("session", "/nonexistent/key"),
        &[
            "p.toml:9",
            "`tag_key_file` without tags",
            "set replies = \"auto\"",
        ],
    );
}

#[test]
fn tags_need_a_header_on_each_datagram() {
    let auto = "replies = \"auto\"";
    for (mode, part) in [
        (
            "mode = \"plain\"",
            "replies = \"auto\" with mode plain (listener `l`)",
        ),
        ("mode = \"transparent\"", "with mode transparent"),
        ("mode = \"dsr\"\nrewrite_on = \"sdk\"", "with mode dsr"),
    ] {
        refused(
            load("", mode, auto),
            &[
                "p.toml:",
                part,
                "a tag needs a PROXY v2 header on each datagram",
            ],
        );
    }
    let first = format!("{auto}\nheader = {{ emit = \"first\" }}");
    refused(load("", "", &first), &["with header.emit = \"first\""]);
    load("", "", &format!("{auto}\nheader = {{ crc32c = true }}")).unwrap();
}

#[test]
fn listeners_without_sessions_need_tags_and_no_bound_by_session() {
    let tagged = "replies = \"tagged\"";
    let without = |more: &str| format!("sessions = false\n{more}");
    for replies in ["session", "auto"] {
        refused(
            load("", &without(""), &format!("replies = \"{replies}\"")),
            &[
                "p.toml:6",
                &format!("sessions = false with replies = \"{replies}\""),
                "set replies = \"tagged\" in [upstream.u]",
            ],
        );
    }
    refused(
        load("", &without("amplification = { limit = 3 }"), tagged),
        &["`amplification` bounds the replies of a session"],
    );
    refused(
        load("", &without("per_client = { sessions = 3 }"), tagged),
        &["`per_client.sessions` bounds sessions"],
    );
    let quiet = load("", &without("per_client = { rate = 9 }"), tagged).unwrap();
    assert!(quiet.warnings.is_empty(), "{:?}", quiet.warnings);
    let log = "[access_log]\npath = \"-\"";
    let rules = "responses = 1\nidle_timeout = \"1s\"";
    let told = load(log, &without(rules), tagged).unwrap();
    assert_eq!(
        told.warnings,
        [
            "listener `l` has no sessions (sessions = false), so this doesn't apply to it: responses, idle_timeout, the access log"
        ]
    );
}

#[test]
fn without_sessions_a_client_keeps_its_server_by_maglev_alone() {
    for balance in ["round_robin", "least_sessions", "random_two"] {
        let upstream = format!("replies = \"tagged\"\nbalance = \"{balance}\"");
        refused(
            load("", "sessions = false", &upstream),
            &[
                "p.toml:6",
                &format!("sessions = false with balance = \"{balance}\" in [upstream.u]"),
                "set balance = \"maglev\" in [upstream.u]",
            ],
        );
        load("", "", &upstream).unwrap();
    }
}

#[test]
fn tags_dont_tell_the_sessions_of_a_client_apart() {
    for replies in ["auto", "tagged"] {
        refused(
            load("", "requests = 2", &format!("replies = \"{replies}\"")),
            &[
                "p.toml:6",
                &format!("requests = 2 with replies = \"{replies}\" in [upstream.u]"),
                "leave `requests` out, or set replies = \"session\"",
            ],
        );
    }
    load("", "requests = 2", "replies = \"session\"").unwrap();
}
