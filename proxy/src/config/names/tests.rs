//! Every mistake in a name is named with its place and the fix; servers that names
//! lead to stand behind those that are written, bounded and each but once.

use proptest::prelude::*;

use super::super::*;
use super::ServerAddress;
use ppv2_engine::upstream::{MAX_SERVERS, MAX_WEIGHT};

const LISTENER: &str =
    "[[listener]]\nname = \"a\"\nbind = [\"127.0.0.1:5353\"]\nupstream = \"u\"\n";

/// A configuration whose upstream has these servers, and these other keys.
fn load(servers: &str, more: &str) -> Result<Config, String> {
    let content = format!("{LISTENER}[upstream.u]\n{more}\nservers = [{servers}]\n");
    Config::from_toml("p.toml", &content).map_err(|error| error.to_string())
}

fn config(servers: &str) -> Config {
    load(servers, "").unwrap()
}

fn dns(host: &str, port: u16) -> Name {
    let host = host.to_owned();
    let ports = PortRange::single(port);
    Name::Dns { host, ports }
}

fn srv(name: &str) -> Name {
    let name = name.to_owned();
    Name::Srv { name }
}

fn answer(address: &str) -> Answer {
    Answer {
        address: address.parse().unwrap(),
        weight: 1,
        backup: false,
    }
}

fn answers(name: Name, addresses: &[&str]) -> Answers {
    let found = addresses.iter().map(|address| answer(address)).collect();
    Answers::from([(name, found)])
}

/// The addresses of the first listener's servers, in order.
fn addresses(config: &Config) -> Vec<String> {
    let servers = config.listeners[0].servers.iter();
    servers
        .map(|(number, _)| config.servers[*number].address.to_string())
        .collect()
}

#[test]
fn names_are_kept_in_one_form() {
    for (written, name, shown) in [
        ("dns:a.example:53", dns("a.example", 53), "dns:a.example:53"),
        ("dns:A.Example.:1", dns("a.example.", 1), "dns:a.example.:1"),
        (
            "dns:my_service:53",
            dns("my_service", 53),
            "dns:my_service:53",
        ),
        (
            "dns:m\u{fc}nchen.example:53",
            dns("xn--mnchen-3ya.example", 53),
            "dns:xn--mnchen-3ya.example:53",
        ),
        (
            "srv:_Dns._UDP.a.example",
            srv("_dns._udp.a.example"),
            "srv:_dns._udp.a.example",
        ),
    ] {
        let config = config(&format!("\"{written}\""));
        assert_eq!(config.names[0].name, name);
        assert_eq!(config.names[0].name.to_string(), shown);
        assert_eq!(config.listeners[0].names.len(), 1);
        assert!(config.servers.is_empty());
        assert_eq!(config.warnings, Vec::<String>::new());
    }
}

#[test]
fn a_host_named_as_a_prefix_is_a_host() {
    for host in ["dns:53", "srv:53", "dnsmasq:a:53"] {
        let address: ServerAddress = host.parse().unwrap();
        assert_eq!(address, ServerAddress::Host(host.to_owned()));
    }
}

#[test]
fn an_invalid_name_is_shown_with_place_and_fix() {
    let long = format!("dns:{}:53", "a".repeat(64));
    let longer = format!("dns:{}a:53", "abc.".repeat(64));
    for (written, what, fix) in [
        ("dns:a.example", "has no port", "dns:servers.example:53"),
        ("dns:a.example:", "has no port", "dns:servers.example:53"),
        (
            "dns:a.example:65536",
            "has no port",
            "dns:servers.example:53",
        ),
        ("dns:a.example:0", "has port 0", "listen on"),
        ("dns:192.0.2.1:53", "has an IP address", "leave `dns:` out"),
        ("dns:192.0.2.1", "has an IP address", "leave `dns:` out"),
        (
            "dns:[2001:db8::1]:53",
            "has an IP address",
            "leave `dns:` out",
        ),
        ("dns:2001:db8::1", "has an IP address", "leave `dns:` out"),
        ("dns::53", "`` is not a DNS name", "labels"),
        ("dns:.:53", "`.` is not a DNS name", "labels"),
        ("dns:a..b:53", "`a..b` is not a DNS name", "labels"),
        (
            "dns:*.example:53",
            "`*.example` is not a DNS name",
            "labels",
        ),
        ("dns:a b:53", "`a b` is not a DNS name", "labels"),
        ("dns:a/b:53", "`a/b` is not a DNS name", "labels"),
        ("dns:b:c:53", "`b:c` is not a DNS name", "labels"),
        (&long, "is not a DNS name", "63 bytes"),
        (&longer, "is not a DNS name", "255 in all"),
        (
            "srv:_dns._tcp.a.example",
            "is not of UDP",
            "write srv:_dns._udp.a.example",
        ),
        ("srv:a.example", "names no service", "RFC 2782"),
        ("srv:_dns.a.example", "names no service", "RFC 2782"),
        ("srv:_dns._udp", "or no domain", "RFC 2782"),
        ("srv:_dns._udp.", "or no domain", "RFC 2782"),
        (
            "srv:_dns._udp.a.example:53",
            "names a port",
            "write srv:_dns._udp.a.example:",
        ),
        ("srv:", "is not a DNS name", "labels"),
    ] {
        let error = load(&format!("\"{written}\""), "").unwrap_err();
        for part in ["p.toml:7:12:", what, fix, "^^^"] {
            assert!(error.contains(part), "{written}: no {part} in {error}");
        }
    }
}

#[test]
fn options_that_conflict_with_a_name_are_errors() {
    let name = "\"dns:a.example:53\"";
    for (servers, more, what, fix) in [
        (
            "{ address = \"srv:_dns._udp.a.example\", weight = 2 }",
            "",
            "`srv:_dns._udp.a.example` with a weight",
            "each SRV record has its own",
        ),
        (
            "\"dns:a.example:53\", \"dns:A.EXAMPLE:53\"",
            "",
            "dns:a.example:53 is twice in upstream `u`",
            "once",
        ),
        (
            "{ address = \"dns:a.example:53\", backup = true }",
            "",
            "every server of upstream `u` is a backup",
            "leave `backup` out",
        ),
        (
            "{ address = \"dns:a.example:53\", drain = true }",
            "",
            "every server of upstream `u` is draining",
            "leave `drain` out",
        ),
        (
            "{ address = \"dns:a.example:53\", mode = \"dsr\" }",
            "",
            "`dns:a.example:53`: mode dsr needs fixed addresses",
            "rewrite_on = \"sdk\"",
        ),
        (
            name,
            "source = [\"x\"]",
            "source: this is not",
            "without a port",
        ),
    ] {
        let error = load(servers, more).unwrap_err();
        for part in ["p.toml:", what, fix] {
            assert!(error.contains(part), "{servers}: no {part} in {error}");
        }
    }
    let dsr = format!("{LISTENER}mode = \"dsr\"\n[upstream.u]\nservers = [{name}]\n");
    let error = Config::from_toml("p.toml", &dsr).unwrap_err().to_string();
    assert!(error.contains("can't follow a name"), "{error}");
    for mode in [
        "mode = \"dsr\"\nrewrite_on = \"sdk\"",
        "mode = \"transparent\"",
        "mode = \"plain\"",
    ] {
        let content = dsr.replacen("mode = \"dsr\"", mode, 1);
        let config = Config::from_toml("p.toml", &content).unwrap();
        assert_eq!(config.named().count(), 1);
        assert_eq!(config.listeners[0].modes().count(), 1);
    }
}

#[test]
fn a_mode_that_needs_a_family_takes_a_name_for_either() {
    let content = format!(
        "{}[upstream.u]\nservers = [\"dns:a.example:53\", \"10.0.0.1:53\"]\n",
        LISTENER.replace("\"127.0.0.1:5353\"", "\"127.0.0.1:5353\", \"[::1]:5353\"")
            + "mode = \"transparent\"\n"
    );
    assert!(Config::from_toml("p.toml", &content).is_ok());
}

#[test]
fn the_resolver_has_bounds() {
    let load = |keys: &str| {
        let content = format!(
            "{LISTENER}[upstream.u]\nservers = [\"dns:a.example:53\"]\n[resolver]\n{keys}\n"
        );
        Config::from_toml("p.toml", &content).map_err(|error| error.to_string())
    };
    let times = |resolver: &Resolver| {
        let Resolver {
            timeout,
            max_ttl,
            retry,
            ..
        } = resolver;
        [**timeout, resolver.min_ttl(), **max_ttl, **retry].map(|time| time.as_secs())
    };
    let usual = load("").unwrap().resolver;
    assert_eq!(times(&usual), [5, 5, 300, 1]);
    assert!(usual.servers.is_empty());
    assert_eq!(config("\"192.0.2.1:53\"").resolver, usual);
    let set = load(
        "servers = [\"192.0.2.1:53\", \"[2001:db8::1]:5353\"]\ntimeout = \"2s\"\nmin_ttl = \"1s\"\nmax_ttl = \"1m\"\nretry = \"3s\"",
    );
    let set = set.unwrap().resolver;
    assert_eq!(times(&set), [2, 1, 60, 3]);
    let servers: Vec<_> = set.servers.iter().map(ToString::to_string).collect();
    assert_eq!(servers, ["192.0.2.1:53", "[2001:db8::1]:5353"]);
    let short = load("max_ttl = \"2s\"").unwrap().resolver;
    assert_eq!(short.min_ttl(), Duration::from_secs(2));
    let many = format!("servers = [{}]", "\"192.0.2.1:53\", ".repeat(9));
    for (keys, what, fix) in [
        (
            "servers = [\"x\"]",
            "servers: this is not an IP address with a port",
            "192.0.2.1:53",
        ),
        (
            "servers = [\"192.0.2.1\"]",
            "is not an IP address with a port",
            "192.0.2.1:53",
        ),
        ("servers = [\"192.0.2.1:0\"]", "can't be asked", "53"),
        ("servers = [\"0.0.0.0:53\"]", "can't be asked", "53"),
        (
            "servers = [\"224.0.0.1:53\"]",
            "can't be asked",
            "multicast",
        ),
        ("servers = [\"[fe80::1%2]:53\"]", "can't be asked", "link"),
        (
            "servers = [\"192.0.2.1:53\", \"[::ffff:192.0.2.1]:53\"]",
            "is there twice",
            "once",
        ),
        (&many, "has 9 addresses", "at most 8"),
        (
            "timeout = \"soon\"",
            "resolver.timeout: `soon` is not a duration",
            "\"30s\"",
        ),
        (
            "timeout = \"2m\"",
            "resolver.timeout: `2m` is too long",
            "from \"100ms\" to \"1m\"",
        ),
        (
            "min_ttl = \"1ms\"",
            "resolver.min_ttl: `1ms` is too short",
            "from \"100ms\" to \"1day\"",
        ),
        (
            "max_ttl = \"2days\"",
            "resolver.max_ttl: `2days` is too long",
            "to \"1day\"",
        ),
        (
            "retry = \"1h\"",
            "resolver.retry: `1h` is too long",
            "to \"1m\"",
        ),
        (
            "min_ttl = \"6m\"",
            "min_ttl is longer than resolver.max_ttl",
            "at most",
        ),
        ("max_tll = \"6m\"", "unknown key `max_tll`", "`max_ttl`"),
    ] {
        let error = load(keys).unwrap_err();
        for part in ["p.toml:8:", what, fix] {
            assert!(error.contains(part), "{keys}: no {part} in {error}");
        }
    }
    let unused = format!(
        "{LISTENER}[upstream.u]\nservers = [\"192.0.2.1:53\"]\n[resolver]\nretry = \"2s\"\n"
    );
    let unused = Config::from_toml("p.toml", &unused).unwrap();
    assert!(unused.warnings[0].contains("[resolver] changes nothing"));
}

#[test]
fn the_reference_names_the_default_times() {
    let reference = include_str!("../../../../docs/reference/ppv2-proxy.toml");
    let (_, table) = reference.split_once("\n# [resolver]").unwrap();
    let (table, _) = table.split_once("\n\n").unwrap();
    let keys: Vec<_> = table.lines().filter_map(|l| l.strip_prefix("# ")).collect();
    assert_eq!(keys.len(), 5);
    let content = format!(
        "{LISTENER}[upstream.u]\nservers = [\"dns:a.example:53\"]\n[resolver]\n{}\n",
        keys.join("\n")
    );
    let config = Config::from_toml("ppv2-proxy.toml", &content).unwrap();
    let usual = load("\"dns:a.example:53\"", "").unwrap();
    assert_eq!(config.resolver.min_ttl(), usual.resolver.min_ttl());
    let resolver = Resolver {
        min_ttl: None,
        ..config.resolver
    };
    assert_eq!(resolver, usual.resolver);
}

#[test]
fn a_configuration_without_names_expands_to_itself() {
    let config = config("\"192.0.2.1:53\", { address = \"192.0.2.2:53\", mode = \"plain\" }");
    let expanded = config.expand(&answers(dns("a.example", 53), &["192.0.2.9:53"]));
    assert_eq!(format!("{config:?}"), format!("{:?}", expanded.config));
    assert!(expanded.remarks.is_empty());
}

#[test]
fn servers_of_names_stand_behind_those_that_are_written() {
    let config = load(
        "{ address = \"dns:b.example:53\", weight = 3, mode = \"plain\" }, \"192.0.2.1:53\", \
         { address = \"srv:_dns._udp.a.example\", backup = true }",
        "source = [\"10.0.0.1\", \"fd00::1\"]\nhealth = {}",
    )
    .unwrap();
    assert_eq!(addresses(&config), ["192.0.2.1:53"]);
    let mut known = answers(dns("b.example", 53), &["[2001:db8::9]:53", "192.0.2.8:53"]);
    known.extend(answers(srv("_dns._udp.a.example"), &["192.0.2.7:99"]));
    known.extend(answers(dns("other.example", 1), &["192.0.2.6:1"]));
    let Expanded { config, remarks } = config.expand(&known);
    assert_eq!(remarks, Vec::<String>::new());
    assert_eq!(
        addresses(&config),
        [
            "192.0.2.1:53",
            "192.0.2.8:53",
            "[2001:db8::9]:53",
            "192.0.2.7:99"
        ]
    );
    let modes: Vec<_> = config.served().map(|(_, _, mode)| mode.name()).collect();
    assert_eq!(modes, ["ppv2", "plain", "plain", "ppv2"]);
    let found = &config.servers[1];
    assert_eq!((found.name.as_str(), found.weight), ("192.0.2.8:53", 3));
    assert_eq!(found.found_by, Some(dns("b.example", 53)));
    assert!(found.health.is_some() && !found.backup);
    assert_eq!(found.sources.addresses(), [IpAddr::from([10, 0, 0, 1])]);
    assert_eq!(
        config.servers[2].sources.addresses()[0].to_string(),
        "fd00::1"
    );
    assert!(config.servers[3].backup);
    assert_eq!(config.sources().len(), 2);
    // Another expansion keeps nothing of the one before.
    let fewer = config.expand(&answers(dns("b.example", 53), &["192.0.2.5:53"]));
    assert_eq!(addresses(&fewer.config), ["192.0.2.1:53", "192.0.2.5:53"]);
    let none = fewer.config.expand(&Answers::new());
    assert_eq!(addresses(&none.config), ["192.0.2.1:53"]);
}

#[test]
fn records_have_their_own_weights_and_the_first_of_two_counts() {
    let config = config("\"192.0.2.1:53\", \"srv:_a._udp.example\", \"dns:b.example:53\"");
    let record = |address: &str, weight, backup| Answer {
        weight,
        backup,
        ..answer(address)
    };
    let mut known = answers(dns("b.example", 53), &["192.0.2.3:53", "192.0.2.4:53"]);
    known.insert(
        srv("_a._udp.example"),
        vec![
            record("192.0.2.3:53", 9, true),
            record("192.0.2.2:53", 0, true),
            record("192.0.2.3:53", 7, false),
            record("192.0.2.1:53", 8, true),
            record("[::ffff:192.0.2.3]:53", 8, false),
            record("192.0.2.5:53", u16::MAX, false),
        ],
    );
    let expanded = config.expand(&known);
    assert!(expanded.remarks.is_empty());
    let servers = expanded.config.servers.iter();
    let servers: Vec<_> = servers
        .map(|server| (server.name.as_str(), server.weight, server.backup))
        .collect();
    assert_eq!(
        servers,
        [
            ("192.0.2.1:53", 1, false),
            ("192.0.2.3:53", 8, false),
            ("192.0.2.5:53", MAX_WEIGHT, false),
            ("192.0.2.2:53", 1, true),
            ("192.0.2.4:53", 1, false),
        ]
    );
}

#[test]
fn unusable_answers_are_left_out_with_a_remark() {
    let config = load(
        "\"192.0.2.1:53\", \"srv:_a._udp.example\"",
        "source = [\"10.0.0.1\"]",
    )
    .unwrap();
    let expanded = config.expand(&answers(
        srv("_a._udp.example"),
        &[
            "0.0.0.0:53",
            "0.1.2.3:53",
            "224.0.0.1:53",
            "255.255.255.255:53",
            "127.255.255.255:53",
            "[::]:53",
            "[ff02::1]:53",
            "[::ffff:127.255.255.255]:53",
            "[::ffff:224.0.0.2]:53",
            "192.0.2.2:0",
            "[fe80::1]:53",
            "127.0.0.1:5353",
            "[2001:db8::1]:53",
            "192.0.2.2:53",
        ],
    ));
    assert_eq!(
        addresses(&expanded.config),
        ["192.0.2.1:53", "192.0.2.2:53"]
    );
    let leads = "upstream `u`: `srv:_a._udp.example` resolves to";
    assert_eq!(
        expanded.remarks,
        [
            format!("{leads} [2001:db8::1]:53, not used: `source` has no address of its family"),
            format!("{leads} [fe80::1]:53, not used: it is link-local and names no interface"),
            format!(
                "{leads} 127.0.0.1:5353, not used: listener `a` is there, at 127.0.0.1:5353: datagrams would loop"
            ),
            format!("{leads} 0.0.0.0:53 and 8 more, not used: no server has such an address"),
        ]
    );
}

#[test]
fn names_and_upstreams_have_a_bound_of_servers() {
    let numbered = |from: usize, count: usize| -> Vec<_> {
        let address = |n: usize| {
            let [_, _, high, low] = u32::try_from(n).unwrap().to_be_bytes();
            format!("10.0.{high}.{low}:53")
        };
        (from..from + count).map(|n| answer(&address(n))).collect()
    };
    let names: Vec<_> = (0..9).map(|n| dns(&format!("n{n}.example"), 53)).collect();
    let written: Vec<_> = names.iter().map(|name| format!("\"{name}\"")).collect();
    let config = config(&written.join(", "));
    let known: Answers = names
        .iter()
        .enumerate()
        .map(|(n, name)| (name.clone(), numbered(300 * n, 300)))
        .collect();
    let Expanded { config, remarks } = config.expand(&known);
    assert_eq!(config.servers.len(), MAX_SERVERS);
    assert!(remarks[0].contains("10.0.1.0:53 and 43 more, not used: no more than 256"));
    let last = remarks.last().unwrap();
    assert!(
        last.contains(&format!("{MAX_SERVERS} servers at most")),
        "{last}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Whatever is written is a name, no name or an error, and a name is kept in a
    /// form that means the same.
    #[test]
    fn any_text_is_read(text in "(dns:|srv:)?(_[a-z]{1,3}\\.|[\\PC.:_*-]){0,20}(:[0-9]{1,6})?") {
        if let Ok(ServerAddress::Name(name)) = text.parse() {
            let again = name.to_string().parse::<ServerAddress>();
            prop_assert_eq!(again.unwrap(), ServerAddress::Name(name));
        }
    }

    /// Whatever is answered: bounds hold, nobody is there twice, those that are
    /// written come first, and the order of the answers is no matter.
    #[test]
    fn any_answers_expand_to_something_sound(
        found in prop::collection::vec(
            prop::collection::vec((any::<[u8; 2]>(), 0..3u16, any::<u16>(), any::<bool>(), any::<bool>()), 0..400),
            3,
        ),
    ) {
        let config = config("\"10.0.0.1:1\", \"dns:a.example:1\", \"srv:_a._udp.example\", \"dns:b.example:1\"");
        let names = [dns("a.example", 1), srv("_a._udp.example"), dns("b.example", 1)];
        let known: Answers = names.into_iter().zip(found).map(|(name, found)| {
            let answers = found.into_iter().map(|([high, low], port, weight, backup, v6)| Answer {
                address: match v6 {
                    true => SocketAddr::from(([0x2001, 0xdb8, 0, 0, 0, 0, 0, low.into()], port)),
                    false => SocketAddr::from(([10, 0, high % 2, low], port)),
                },
                weight,
                backup,
            });
            (name, answers.collect())
        }).collect();
        let Expanded { config: expanded, remarks } = config.expand(&known);
        prop_assert_eq!(&expanded.servers[0].name, "10.0.0.1:1");
        prop_assert!(expanded.servers[1..].iter().all(|server| server.found_by.is_some()));
        prop_assert!(expanded.servers.iter().all(|server| (1..=MAX_WEIGHT).contains(&server.weight)));
        let distinct: BTreeSet<_> = expanded.servers.iter().map(|server| server.address).collect();
        prop_assert_eq!(distinct.len(), expanded.servers.len());
        for named in &config.names {
            let of_name = expanded.servers.iter().filter(|s| s.found_by.as_ref() == Some(&named.name));
            prop_assert!(of_name.count() <= MAX_ADDRESSES);
        }
        prop_assert!(remarks.len() <= 3 * 4);
        let numbers: Vec<_> = expanded.listeners[0].servers.iter().map(|(number, _)| *number).collect();
        prop_assert_eq!(numbers, (0..expanded.servers.len()).collect::<Vec<_>>());
        let reversed: Answers = known.into_iter().map(|(name, mut found)| {
            found.reverse();
            (name, found)
        }).collect();
        let again = expanded.expand(&reversed);
        prop_assert_eq!(format!("{expanded:?}"), format!("{:?}", again.config));
        prop_assert_eq!(remarks, again.remarks);
    }
}
