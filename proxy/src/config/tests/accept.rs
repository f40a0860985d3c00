//! `accept` as it is read, and what it can't be together with.

use super::super::accept::{Direct, Format, HeaderAlone, LocalHeaders, Tlvs};
use super::*;
use ppv2_engine::accept;

/// A configuration whose listener has `of_listener` and whose upstream has `of_upstream`.
fn load(of_listener: &str, of_upstream: &str) -> Result<Config, String> {
    let content = format!(
        "workers = 3\n[[listener]]\nname = \"dns\"\nbind = [\"127.0.0.1:5353\"]\nupstream = \"u\"\n{of_listener}\n\
         [upstream.u]\nservers = [\"192.0.2.1:53\"]\n{of_upstream}\n"
    );
    Config::from_toml("x", &content).map_err(|error| error.to_string())
}

fn accept_of(of_listener: &str) -> Accept {
    let config = load(of_listener, "").unwrap();
    config.listeners[0].accept.clone().unwrap()
}

#[test]
fn no_header_is_read_by_default() {
    assert_eq!(load("", "").unwrap().listeners[0].accept, None);
}

#[test]
fn accept_has_the_documented_defaults() {
    let read = accept_of("accept = { from = [\"192.0.2.0/24\"] }");
    assert_eq!(read.from, ["192.0.2.0/24".parse().unwrap()]);
    assert_eq!(read.formats, [Format::V2]);
    assert_eq!(
        (read.direct, read.local, read.tlvs, read.remember),
        (Direct::Drop, LocalHeaders::Forward, Tlvs::Drop, None)
    );
    let remember = accept_of("accept = { from = [\"::1\"], remember = {} }").remember;
    let remember = remember.unwrap();
    assert_eq!(*remember.idle, Duration::from_secs(30));
    assert_eq!(*remember.max, 100_000);
    assert_eq!(remember.header_alone, HeaderAlone::Announce);
}

#[test]
fn the_flag_accepts_headers_as_the_file_does_by_default() {
    let run = |more: &[&str]| {
        let mut words = vec!["ppv2-proxy", "run", "--listen", "127.0.0.1:5353"];
        words.extend(["--upstream", "192.0.2.1:53"]);
        words.extend(more);
        let Command::Run(run) = Arguments::try_parse_from(words)?.command else {
            panic!("it is `run`");
        };
        let accept = run.config().unwrap().listeners[0].accept.clone();
        Ok::<_, clap::Error>(accept)
    };
    assert_eq!(run(&[]).unwrap(), None);
    let of_flags = run(&["--accept-from", "192.0.2.0/24", "--accept-from", "::1"]);
    let of_file = accept_of("accept = { from = [\"192.0.2.0/24\", \"::1\"] }");
    assert_eq!(of_flags.unwrap(), Some(of_file));
    // A file replaces it, as all flags of `run`.
    let mixed = ["ppv2-proxy", "run", "--config", "f", "--accept-from", "::1"];
    let error = Arguments::try_parse_from(mixed).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), clap::error::ErrorKind::ArgumentConflict);
}

#[test]
fn a_worker_gets_all_settings_and_its_share_of_senders() {
    let all = "accept = { from = [\"192.0.2.1\", \"2001:db8::/32\"], formats = [\"spp\", \"v2\"], \
               direct = \"accept\", local = \"drop\", tlvs = \"pass\", \
               remember = { idle = \"10s\", max = 100, header_alone = \"forward\" } }";
    let expected = accept::Accept {
        from: vec![
            "192.0.2.1/32".parse().unwrap(),
            "2001:db8::/32".parse().unwrap(),
        ],
        formats: accept::Formats {
            v2: true,
            spp: true,
        },
        direct: accept::Direct::Accept,
        local: accept::LocalHeaders::Drop,
        passes_tlvs: true,
        remember: Some(accept::Remember {
            idle: Duration::from_secs(10),
            max: 34,
            forwards_empty: true,
        }),
    };
    let config = load(all, "").unwrap();
    let listener = &config.listeners[0];
    let workers = config.workers_of(listener);
    assert_eq!(workers, 3);
    let read = listener.accept.as_ref().unwrap();
    assert_eq!(read.of_worker(workers), expected);
    let one = accept_of("accept = { from = [\"192.0.2.1\"], remember = { max = 1 } }");
    assert_eq!(one.of_worker(3).remember.unwrap().max, 1);
}

#[test]
fn a_single_socket_has_all_senders() {
    let config = "workers = 4\nreuse_port = false\n[[listener]]\n\
                  bind = [\"127.0.0.1:5353\"]\nupstream = \"u\"\n\
                  [upstream.u]\nservers = [\"192.0.2.1:53\"]\n";
    let mut config = Config::from_toml("x", config).unwrap();
    assert_eq!(config.workers_of(&config.listeners[0]), 1);
    config.listeners[0].bind = vec!["127.0.0.1:1".parse().unwrap(); 3];
    assert_eq!(config.workers_of(&config.listeners[0]), 3);
    config.listeners[0].bind = vec!["127.0.0.1:1".parse().unwrap(); 9];
    assert_eq!(config.workers_of(&config.listeners[0]), 4);
}

#[test]
fn errors_name_place_and_fix() {
    for (of_listener, place, message, fix) in [
        (
            "accept = {}",
            "x:6:10:",
            "`accept` without networks in `from`",
            "from = [\"192.0.2.1\"]",
        ),
        (
            "accept = { from = [] }",
            "x:6:19:",
            "`accept` without networks in `from`",
            "or leave `accept` out",
        ),
        (
            "accept = { remember = { idle = \"10s\" } }",
            "x:6:10:",
            "`accept` without networks in `from`",
            "the proxies that write headers",
        ),
        (
            "accept = { from = [\"192.0.2.1/24\"] }",
            "x:6:20:",
            "`192.0.2.1/24` is an address within a network",
            "the network is 192.0.2.0/24, that address alone 192.0.2.1/32",
        ),
        (
            "accept = { from = [\"::ffff:192.0.2.1\"] }",
            "x:6:20:",
            "`::ffff:192.0.2.1` is IPv4 written as IPv6",
            "192.0.2.1/32",
        ),
        (
            "accept = { from = [\"lb.example\"] }",
            "x:6:20:",
            "listener.accept.from: `lb.example` is not a network",
            "192.0.2.0/24",
        ),
        (
            "accept = { from = [\"192.0.2.1\", \"::1\", \"192.0.2.1/32\"] }",
            "x:6:40:",
            "192.0.2.1/32 is twice in `from`",
            "once",
        ),
        (
            "accept = { from = [\"::1\"], formats = [\"v1\"] }",
            "x:6:39:",
            "listener.accept.formats: `v1` is not known",
            "did you mean `v2`?",
        ),
        (
            "accept = { from = [\"::1\"], formats = [] }",
            "x:6:38:",
            "an empty `formats` reads no header",
            "\"v2\", \"spp\" or both",
        ),
        (
            "accept = { from = [\"::1\"], formats = [\"spp\", \"spp\"] }",
            "x:6:46:",
            "spp is twice in `formats`",
            "once",
        ),
        (
            "accept = { from = [\"::1\"], direct = \"refuse\" }",
            "x:6:37:",
            "listener.accept.direct: `refuse` is not known",
            "drop, accept",
        ),
        (
            "accept = { from = [\"::1\"], tlvs = \"passs\" }",
            "x:6:35:",
            "listener.accept.tlvs: `passs` is not known",
            "did you mean `pass`?",
        ),
        (
            "accept = { from = [\"::1\"], remmeber = {} }",
            "x:6:28:",
            "unknown key `remmeber`",
            "did you mean `remember`?",
        ),
        (
            "accept = { from = [\"::1\"], remember = { idle = \"900ms\" } }",
            "x:6:48:",
            "listener.accept.remember.idle: `900ms` is too short",
            "from \"1s\" to \"1day\"",
        ),
        (
            "accept = { from = [\"::1\"], remember = { max = 10000001 } }",
            "x:6:47:",
            "listener.accept.remember.max: 10000001 is out of range",
            "from 1 to 10000000",
        ),
        (
            "accept = { from = [\"::1\"], remember = { header_alone = \"drop\" } }",
            "x:6:56:",
            "listener.accept.remember.header_alone: `drop` is not known",
            "announce, forward",
        ),
    ] {
        let error = load(of_listener, "").unwrap_err();
        for part in [place, message, fix] {
            assert!(error.contains(part), "{of_listener}: no {part} in {error}");
        }
    }
}
