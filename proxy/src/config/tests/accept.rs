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
    let all = "accept = { from = [\"192.0.2.1\", \"2001:db8::/32\"], formats = [\"v2\"], \
               direct = \"accept\", local = \"drop\", tlvs = \"pass\", \
               remember = { idle = \"10s\", max = 100, header_alone = \"forward\" } }";
    let expected = accept::Accept {
        from: vec![
            "192.0.2.1/32".parse().unwrap(),
            "2001:db8::/32".parse().unwrap(),
        ],
        formats: accept::Formats {
            v2: true,
            spp: false,
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
    let both = accept_of("accept = { from = [\"192.0.2.1\"], formats = [\"spp\", \"v2\"] }");
    let formats = both.of_worker(3).formats;
    assert!(formats.v2 && formats.spp);
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
fn replies_need_a_session_to_find_the_proxy_in_front() {
    const ACCEPT: &str = "accept = { from = [\"198.51.100.1\"] }\n";
    for (of_listener, of_upstream, message, fix) in [
        (
            "sessions = false",
            "replies = \"tagged\"",
            "`accept` with sessions = false: only a session knows which proxy a reply goes back through",
            "leave `sessions` or `accept` out",
        ),
        (
            "",
            "replies = \"tagged\"",
            "`accept` with replies = \"tagged\" in [upstream.u]",
            "set replies = \"session\" in [upstream.u]",
        ),
        (
            "",
            "replies = \"auto\"",
            "`accept` with replies = \"auto\" in [upstream.u]",
            "a network as `source`",
        ),
    ] {
        let error = load(&format!("{ACCEPT}{of_listener}"), of_upstream).unwrap_err();
        for part in ["x:6:10:", message, fix] {
            assert!(error.contains(part), "no {part} in {error}");
        }
    }
    // A source network has sessions.
    load(ACCEPT, "source = [\"fd00:1::/64\", \"127.64.0.0/10\"]").unwrap();
}

#[test]
fn senders_trusted_by_mistake_are_warnings() {
    let warnings = |of_listener: &str| load(of_listener, "").unwrap().warnings;
    let none: [&str; 0] = [];
    assert_eq!(warnings("accept = { from = [\"198.51.100.0/24\"] }"), none);
    assert_eq!(
        warnings("accept = { from = [\"0.0.0.0/0\", \"::/0\"] }"),
        ["0.0.0.0/0", "::/0"].map(|all| format!(
            "listener `dns`: {all} in `accept.from`: anybody can send a header that names any client. List the addresses of the proxies in front alone"
        ))
    );
    assert_eq!(
        warnings("accept = { from = [\"192.0.0.0/16\"] }"),
        [
            "listener `dns`: 192.0.0.0/16 in `accept.from` contains the server 192.0.2.1, which can then name any client. List the addresses of the proxies in front alone"
        ]
    );
    let ipv6 = "from = [\"2001:db8::1\"]";
    assert_eq!(
        warnings(&format!("accept = {{ {ipv6} }}")),
        [
            "listener `dns`: every datagram to 127.0.0.1:5353 is dropped: `accept.from` has no IPv4 network, and `accept.direct` is drop"
        ]
    );
    assert_eq!(
        warnings(&format!("accept = {{ {ipv6}, direct = \"accept\" }}")),
        none
    );
    for key in [
        "deny = [\"203.0.113.9\"]",
        "allow = [\"203.0.113.0/24\", \"::/0\"]",
    ] {
        let restricted = |more: &str| {
            warnings(&format!(
                "{key}\naccept = {{ from = [\"198.51.100.1\"], local = \"drop\"{more} }}"
            ))
        };
        assert_eq!(restricted(""), none);
        let warned = restricted(", remember = {}");
        assert!(warned.len() == 1 && warned[0].contains("`allow` and `deny` don't hold"));
    }
    for (key, why) in [
        ("deny = [\"198.51.0.0/16\"]", "is in `deny`"),
        ("allow = [\"203.0.113.0/24\"]", "is not in `allow`"),
    ] {
        let warned = warnings(&format!("{key}\naccept = {{ from = [\"198.51.100.1\"] }}"));
        assert!(
            warned.len() == 1 && warned[0].contains(&format!("198.51.100.1/32 {why}")),
            "{warned:?}"
        );
    }
    let pass = "accept = { from = [\"198.51.100.1\"], tlvs = \"pass\" }";
    assert_eq!(warnings(pass), none);
    for (changed, why) in [
        (
            format!("mode = \"plain\"\n{pass}"),
            "no server gets a header",
        ),
        (
            pass.replace("tlvs", "formats = [\"spp\"], tlvs"),
            "Simple Proxy Protocol has none",
        ),
    ] {
        let expected = format!("listener `dns`: `accept.tlvs` = \"pass\" changes nothing: {why}");
        assert_eq!(warnings(&changed), [expected]);
    }
    let dsr = "mode = \"dsr\"\naccept = { from = [\"198.51.100.1\"] }";
    assert_eq!(
        warnings(dsr),
        [
            "listener `dns`: `accept` with mode dsr: replies reach clients from the listener's address, and those that wrote to another address of a proxy in front ignore them. Use rewrite_on = \"sdk\", or mode ppv2 or transparent"
        ]
    );
    assert_eq!(warnings(&format!("rewrite_on = \"sdk\"\n{dsr}")), none);
    let transparent = "mode = \"transparent\"\naccept = { from = [\"198.51.100.1\"] }";
    assert_eq!(warnings(transparent), none);
    let warned = warnings(&format!("source_port = \"client\"\n{transparent}"));
    assert!(
        warned.len() == 1 && warned[0].contains("`client_port_in_use`"),
        "{warned:?}"
    );
}

#[test]
fn a_server_on_this_host_may_be_in_a_network_of_senders() {
    let config = "[[listener]]\nbind = [\"127.0.0.1:5353\"]\nupstream = \"u\"\n\
                  accept = { from = [\"127.0.0.0/8\"] }\n\
                  [upstream.u]\nservers = [\"127.0.0.1:53\"]\n";
    let config = Config::from_toml("x", config).unwrap();
    assert!(config.warnings.is_empty(), "{:?}", config.warnings);
}

#[test]
fn headers_name_clients_of_either_family() {
    let transparent = |accept: &str, bind: &str| {
        let config = format!(
            "[[listener]]\nbind = [\"{bind}\"]\nupstream = \"u\"\nmode = \"transparent\"\n{accept}\n\
             [upstream.u]\nservers = [\"192.0.2.1:53\"]\n"
        );
        Config::from_toml("x", &config).map(|config| config.warnings)
    };
    let error = transparent("", "[::1]:5353").unwrap_err().to_string();
    assert!(error.contains("need an IPv6 server"), "{error}");
    let accept = "accept = { from = [\"::1\"], local = \"drop\" }";
    assert!(transparent(accept, "[::1]:5353").unwrap().is_empty());
    // Nor does `allow` have to have a network of the listener's own family.
    let allow = "allow = [\"203.0.113.0/24\"]";
    let warned = transparent(allow, "[::1]:5353");
    assert!(warned.is_err());
    let accepted = transparent(&format!("{allow}\n{accept}"), "[::1]:5353");
    assert!(accepted.unwrap().is_empty());
}

#[test]
fn listeners_that_read_headers_may_follow_each_other() {
    let accept = "accept = { from = [\"127.0.0.1\"] }";
    let three = |servers: [&str; 3]| {
        let listener = |(number, server): (usize, &str)| {
            let port = number + 1;
            format!(
                "[[listener]]\nname = \"l{port}\"\nbind = [\"127.0.0.1:{port}\"]\nupstream = \"u{port}\"\n{}\n\
                 [upstream.u{port}]\nservers = [\"{server}\"]\n",
                if number > 0 { accept } else { "" }
            )
        };
        let all: String = servers.into_iter().enumerate().map(listener).collect();
        Config::from_toml("x", &all).map_err(|error| error.to_string())
    };
    let (second, third, end) = ("127.0.0.1:2", "127.0.0.1:3", "192.0.2.1:53");
    three([second, third, end]).unwrap();
    three([third, third, end]).unwrap();
    for loops in [
        [second, third, second],
        [second, third, third],
        [second, second, end],
    ] {
        let error = three(loops).unwrap_err();
        assert!(error.contains("datagrams would loop"), "{error}");
    }
    // One that writes no header is not understood by one that needs it.
    let plain = "[[listener]]\nbind = [\"127.0.0.1:1\"]\nupstream = \"u1\"\nmode = \"plain\"\n\
                 [upstream.u1]\nservers = [\"127.0.0.1:2\"]\n\
                 [[listener]]\nname = \"l2\"\nbind = [\"127.0.0.1:2\"]\nupstream = \"u2\"\n\
                 accept = { from = [\"127.0.0.1\"] }\n\
                 [upstream.u2]\nservers = [\"192.0.2.1:53\"]\n";
    let error = Config::from_toml("x", plain).unwrap_err().to_string();
    assert!(error.contains("every datagram would be dropped"), "{error}");
    // The first takes every byte for payload.
    let error = three(["192.0.2.1:53", "127.0.0.1:1", end]).unwrap_err();
    assert!(error.contains("is listener `l1` at 127.0.0.1:1"), "{error}");
}

#[test]
fn peers_are_asked_for_only_where_anybody_may_write() {
    let asks = |accept: &str| {
        let config = format!(
            "[[listener]]\nbind = [\"203.0.113.77:5300\"]\nfreebind = true\nupstream = \"u\"\n{accept}\n\
             [upstream.u]\nservers = [\"192.0.2.10:53\"]\n"
        );
        let warnings = Config::from_toml("x", &config).unwrap().warnings;
        warnings.iter().any(|warning| warning.contains("`peers`"))
    };
    assert!(asks(""));
    assert!(!asks("accept = { from = [\"198.51.100.1\"] }"));
    assert!(asks(
        "accept = { from = [\"198.51.100.1\"], direct = \"accept\" }"
    ));
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
            "accept = { from = [\"::1\"], formats = [\"v2\", \"spp\"], remember = {} }",
            "x:6:64:",
            "`remember` with \"spp\" in `formats`",
            "a listener for each",
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
