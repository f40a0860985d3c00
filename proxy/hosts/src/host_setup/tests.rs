//! The scripts as they are printed, from options that leave nothing to this host.

use super::*;
use crate::reply_path::Rewriter;
use crate::topology::{Server, SourceNetwork};

/// Options that ask this host for nothing.
fn options(role: Role) -> Options {
    let ip = |ip: &str| ip.parse().unwrap();
    Options {
        config: None,
        role,
        undo: false,
        public_interface: Some("pub".to_owned()),
        server_interface: Some("priv".to_owned()),
        gateway: vec![ip("192.0.2.1"), ip("2001:db8:b::1")],
        server: vec![ip("192.0.2.202"), ip("2001:db8:b::2")],
        listener_address: Vec::new(),
        is_gateway: false,
        mtu: None,
        table: None,
    }
}

const TRANSPARENT: Option<Rewriter> = Some(Rewriter::Proxy);
const DSR: Option<Rewriter> = Some(Rewriter::ProxyHost);
const ON_SERVER: Option<Rewriter> = Some(Rewriter::ServerHost);
const BY_SDK: Option<Rewriter> = Some(Rewriter::Sdk);

/// A listener with these addresses and one server.
fn server(listener: &[&str], address: &str, rewriter: Option<Rewriter>) -> Server {
    Server {
        address: address.parse().unwrap(),
        last_port: address.parse::<std::net::SocketAddr>().unwrap().port(),
        upstream: "u".to_owned(),
        listener: listener.iter().map(|ip| ip.parse().unwrap()).collect(),
        reads_headers: false,
        rewriter,
        spoofs_ports: false,
        header_len: 0,
        tag_len: 0,
        dont_fragment: false,
        source: None,
        answers_proxy: None,
        question: Vec::new(),
        answers_question: false,
    }
}

fn topology(servers: impl IntoIterator<Item = Server>) -> Topology {
    let servers = Vec::from_iter(servers);
    Topology {
        listeners: servers.iter().flat_map(|s| s.listener.clone()).collect(),
        servers,
        ..Topology::default()
    }
}

/// A listener and two servers, each of both families.
fn both_families(rewriter: Option<Rewriter>) -> Topology {
    let listener = ["198.51.100.10:9000", "[2001:db8:a::10]:9000"];
    let servers = ["192.0.2.202:9001", "[2001:db8:b::2]:9001"];
    topology(servers.map(|address| server(&listener, address, rewriter)))
}

/// The commands, without the functions and the comments.
#[track_caller]
fn commands(rewriter: Option<Rewriter>, options: &Options) -> String {
    commands_of(&compose(&both_families(rewriter), options).unwrap())
}

fn commands_of(text: &str) -> String {
    let (_, own) = text.split_once("\nundo\n").unwrap();
    let lines = own.lines().filter(|line| !line.is_empty());
    let lines = lines.filter(|line| !line.starts_with('#'));
    lines.fold(String::new(), |text, line| text + line + "\n")
}

#[test]
fn transparent_needs_only_routes() {
    assert_eq!(
        commands(TRANSPARENT, &options(Role::Proxy)),
        "\
use_table 9022
ip -4 route replace local 0.0.0.0/0 dev lo table 9022
ip -4 rule add pref 9022 iif priv from 192.0.2.202/32 lookup 9022
ip -6 route replace local ::/0 dev lo table 9022
ip -6 rule add pref 9022 iif priv from 2001:db8:b::2/128 lookup 9022
"
    );
    assert_eq!(
        commands(TRANSPARENT, &options(Role::Server)),
        "\
use_table 9023
ip -6 route replace default via 2001:db8:b::1 dev priv table 9023
ip -4 route replace default via 192.0.2.1 dev priv table 9023
ip -6 rule add pref 9023 ipproto udp sport 9001 lookup 9023
ip -4 rule add pref 9023 ipproto udp sport 9001 lookup 9023
ip -6 rule add pref 9023 from 2001:db8:b::2 lookup main suppress_prefixlength 0
ip -6 rule add pref 9023 from 2001:db8:b::2 lookup 9023
ip -4 rule add pref 9023 from 192.0.2.202 lookup main suppress_prefixlength 0
ip -4 rule add pref 9023 from 192.0.2.202 lookup 9023
"
    );
}

#[test]
fn rules_know_a_servers_whole_range() {
    let listener = ["198.51.100.10:40000"];
    let range = |rewriter| Server {
        last_port: 40_999,
        ..server(&listener, "192.0.2.202:40000", rewriter)
    };
    let options = options(Role::Server);
    let on_server = compose(&topology([range(TRANSPARENT)]), &options).unwrap();
    let rule = "ip -4 rule add pref 9023 ipproto udp sport 40000-40999 lookup 9023\n";
    assert!(commands_of(&on_server).contains(rule), "{on_server}");
    let proxy = Options {
        server_interface: Some("lo".to_owned()),
        role: Role::Proxy,
        ..options.clone()
    };
    let on_proxy = compose(&topology([range(TRANSPARENT)]), &proxy).unwrap();
    let rule = "iif lo from 192.0.2.202/32 ipproto udp sport 40000-40999 lookup 9022\n";
    assert!(commands_of(&on_proxy).contains(rule), "{on_proxy}");
    // A rule rewrites what another server sends from that port.
    let other = server(&["198.51.100.10:9000"], "192.0.2.203:40500", ON_SERVER);
    let both = Options {
        server: vec![range(None).address.ip(), other.address.ip()],
        ..options
    };
    let error = compose(&topology([range(TRANSPARENT), other]), &both);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("have the same port"), "{error}");
}

/// Two source networks, one of them on loopback, each with a server.
fn with_source_networks() -> Topology {
    let mut topology = both_families(None);
    let sources = [
        ("10.99.0.0/16", "192.0.2.202:9001"),
        ("fd00:1::/64", "[2001:db8:b::2]:9001"),
        ("127.64.0.0/10", "127.0.0.2:9001"),
    ];
    let source = |(network, server): (&str, &str)| SourceNetwork {
        network: network.parse().unwrap(),
        probe: network.split('/').next().unwrap().parse().unwrap(),
        upstream: "u".to_owned(),
        servers: [server.parse().unwrap()].into(),
    };
    topology.source_networks = sources.map(source).into();
    topology
}

#[test]
fn source_networks_need_local_routes_and_routes_to_the_proxy() {
    let topology = with_source_networks();
    let set_up = |role| commands_of(&compose(&topology, &options(role)).unwrap());
    assert_eq!(
        set_up(Role::Proxy),
        "\
add_local_route -4 10.99.0.0/16
add_local_route -6 fd00:1::/64
"
    );
    assert_eq!(
        set_up(Role::Server),
        "\
add_route -4 10.99.0.0/16 192.0.2.1 priv
add_route -6 fd00:1::/64 2001:db8:b::1 priv
"
    );
    let text = compose(&topology, &options(Role::Proxy)).unwrap();
    for part in [
        "127.0.0.0/8 need nothing",
        "neighbour entry for each session",
        "# ip route add 10.99.0.0/16 via ",
        "# ip route add fd00:1::/64 via ",
        "out ip saddr 127.64.0.0/10 meta l4proto udp notrack",
    ] {
        assert!(
            text.replace("\n# ", " ").contains(part) || text.contains(part),
            "no `{part}` in\n{text}"
        );
    }
    let unknown = Options {
        gateway: Vec::new(),
        ..options(Role::Server)
    };
    let error = compose(&topology, &unknown).unwrap_err().to_string();
    assert!(error.contains("source network 10.99.0.0/16"), "{error}");
    assert!(error.ends_with("name it with --gateway"), "{error}");
}

#[test]
fn a_server_on_the_proxys_host_is_matched_by_its_port() {
    let on_loopback = Options {
        server_interface: Some("lo".to_owned()),
        table: Some(7),
        ..options(Role::Proxy)
    };
    let text = compose(&both_families(TRANSPARENT), &on_loopback).unwrap();
    let rule = "ip -4 rule add pref 7 iif lo from 192.0.2.202/32 ipproto udp sport 9001 lookup 7\n";
    assert!(text.contains(rule), "{text}");
    let dsr = compose(&both_families(DSR), &on_loopback).unwrap_err();
    assert!(
        dsr.to_string().contains("never forwards its own replies"),
        "{dsr}"
    );
}

#[test]
fn dsr_rewrites_on_the_proxys_host() {
    assert_eq!(
        commands(DSR, &options(Role::Proxy)),
        r#"set_parameter net/ipv4/conf/priv/forwarding 1
[ "$(cat /proc/sys/net/ipv6/conf/pub/accept_ra)" != 1 ] || set_parameter net/ipv6/conf/pub/accept_ra 2
for file in /proc/sys/net/ipv6/conf/*/forwarding; do
    [ "$file" = /proc/sys/net/ipv6/conf/all/forwarding ] || keep "${file#/proc/sys/}"
done
set_parameter net/ipv6/conf/all/forwarding 1
echo "nft ppv2_dsr" >>"$state"
nft -f - <<'END'
table inet ppv2_dsr
delete table inet ppv2_dsr
table inet ppv2_dsr {
    chain pre {
        type filter hook prerouting priority raw
        iifname "priv" ip saddr 192.0.2.202 udp sport 9001 notrack
        iifname "priv" ip6 saddr 2001:db8:b::2 udp sport 9001 notrack
    }
    chain defrag {
        type filter hook prerouting priority mangle
        meta mark 0xdef0dead meta l4proto udp tproxy to :1
    }
    chain out {
        type filter hook output priority raw
        ip daddr 192.0.2.202 udp dport 9001 notrack
        ip6 daddr 2001:db8:b::2 udp dport 9001 notrack
    }
    chain post {
        type filter hook postrouting priority 300
        oifname "pub" ip saddr 192.0.2.202 udp sport 9001 udp checksum 0 udp sport set 9000 ip saddr set 198.51.100.10 udp checksum set 0 accept
        oifname "pub" ip saddr 192.0.2.202 udp sport 9001 udp sport set 9000 ip saddr set 198.51.100.10 accept
        oifname "pub" ip6 saddr 2001:db8:b::2 udp sport 9001 udp sport set 9000 ip6 saddr set 2001:db8:a::10 accept
    }
}
END
"#
    );
    // What the ICMP errors for larger replies would ask for.
    let server = commands(DSR, &options(Role::Server));
    for route in [
        "ip -4 route replace default via 192.0.2.1 dev priv mtu lock 1280 table 9023\n",
        "ip -6 route replace default via 2001:db8:b::1 dev priv mtu 1280 table 9023\n",
    ] {
        assert!(server.contains(route), "{server}");
    }
}

#[test]
fn dsr_rewrites_on_the_servers_host() {
    assert_eq!(commands(ON_SERVER, &options(Role::Proxy)), "");
    assert_eq!(
        commands(ON_SERVER, &options(Role::Server)),
        r#"set_parameter net/ipv4/conf/priv/rp_filter 2
echo "nft ppv2_dsr_server" >>"$state"
nft -f - <<'END'
table inet ppv2_dsr_server
delete table inet ppv2_dsr_server
table inet ppv2_dsr_server {
    chain post {
        type filter hook postrouting priority 300
        ip daddr { 192.0.2.1, 198.51.100.10 } accept
        ip6 daddr { 2001:db8:a::10, 2001:db8:b::1 } accept
        oifname "pub" meta nfproto ipv4 udp sport 9001 udp checksum 0 udp sport set 9000 ip saddr set 198.51.100.10 udp checksum set 0 accept
        oifname "pub" meta nfproto ipv4 udp sport 9001 udp sport set 9000 ip saddr set 198.51.100.10 accept
        oifname "pub" meta nfproto ipv6 udp sport 9001 udp sport set 9000 ip6 saddr set 2001:db8:a::10 accept
    }
}
END
"#
    );
}

#[test]
fn dsr_by_the_sdk_needs_the_listeners_address_and_a_gateway_that_accepts_it() {
    assert_eq!(commands(BY_SDK, &options(Role::Proxy)), "");
    let gateway = Options {
        is_gateway: true,
        server_interface: Some("eth0.100".to_owned()),
        ..options(Role::Proxy)
    };
    let text = commands(BY_SDK, &gateway);
    for line in [
        "set_parameter net/ipv4/conf/eth0.100/forwarding 1\n",
        "set_parameter net/ipv4/conf/eth0.100/accept_local 1\n",
        "set_parameter net/ipv4/conf/eth0.100/rp_filter 2\n",
        "set_parameter net/ipv6/conf/all/forwarding 1\n",
    ] {
        assert!(text.contains(line), "{text}");
    }
    let alone = Options {
        gateway: Vec::new(),
        ..options(Role::Server)
    };
    assert_eq!(
        commands(BY_SDK, &alone),
        "add_address 198.51.100.10/32\nset_parameter net/ipv4/conf/all/arp_ignore 1\n\
         set_parameter net/ipv4/conf/all/arp_announce 2\n"
    );
    let through = commands(BY_SDK, &options(Role::Server));
    for line in [
        "ip -4 route replace default via 192.0.2.1 dev priv mtu lock 1280 table 9023\n",
        "ip -4 rule add pref 9023 from 198.51.100.10 lookup 9023\n",
        "ip -6 rule add pref 9023 from 2001:db8:a::10 lookup 9023\n",
    ] {
        assert!(through.contains(line), "{through}");
    }
}

#[test]
fn modes_that_need_nothing_get_nothing() {
    for role in [Role::Proxy, Role::Server] {
        assert_eq!(commands(None, &options(role)), "", "{role:?}");
    }
}

#[test]
fn unknown_facts_name_the_option_that_tells_them() {
    let unnamed = |role| Options {
        public_interface: None,
        server_interface: None,
        gateway: Vec::new(),
        server: Vec::new(),
        ..options(role)
    };
    let error = |topology: &Topology, options: &Options| compose(topology, options).unwrap_err();
    let dsr = both_families(DSR);
    let cases = [
        (
            Options {
                server_interface: Some("priv".to_owned()),
                ..unnamed(Role::Proxy)
            },
            "--public-interface",
        ),
        (unnamed(Role::Server), "--server"),
        (
            Options {
                server: vec!["192.0.2.202".parse().unwrap()],
                ..unnamed(Role::Server)
            },
            "--gateway",
        ),
        (
            Options {
                server: vec!["192.0.2.202".parse().unwrap()],
                gateway: vec!["192.0.2.1".parse().unwrap()],
                ..unnamed(Role::Server)
            },
            "--server-interface",
        ),
    ];
    for (options, option) in cases {
        let text = error(&dsr, &options).to_string();
        assert!(text.ends_with(option), "no {option} in: {text}");
    }
    let wildcard = topology([server(&["0.0.0.0:9000"], "192.0.2.202:9001", BY_SDK)]);
    let text = error(&wildcard, &options(Role::Server)).to_string();
    assert!(text.ends_with("--listener-address"), "{text}");
    let named = Options {
        listener_address: vec!["198.51.100.10".parse().unwrap()],
        ..options(Role::Server)
    };
    let text = compose(&wildcard, &named).unwrap();
    assert!(text.contains("add_address 198.51.100.10/32\n"), "{text}");
}

#[test]
fn one_server_address_with_two_modes_is_refused() {
    let listener = ["198.51.100.10:9000"];
    let two = topology([
        server(&listener, "192.0.2.202:9001", DSR),
        server(&listener, "192.0.2.202:9002", TRANSPARENT),
    ]);
    let error = compose(&two, &options(Role::Proxy)).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("192.0.2.202") && text.contains("two addresses"),
        "{text}"
    );
}

#[test]
fn interface_names_that_are_unsafe_in_a_script_are_refused() {
    for name in ["eth0", "eth0.100", "br-1a2b"] {
        assert_eq!(interface(name).as_deref(), Ok(name));
    }
    for name in [
        "",
        "a b",
        "$(id)",
        "a\"b",
        "x/y",
        "eth0:1",
        "v@if5",
        "sixteen-letters-",
    ] {
        assert!(interface(name).is_err(), "{name}");
    }
}

#[test]
fn the_kernels_own_tables_are_refused() {
    for number in ["1", "252", "256", "9022", "32765"] {
        assert_eq!(table(number), number.parse().map_err(|_| String::new()));
    }
    for number in ["0", "253", "254", "255", "32766", "main"] {
        assert!(table(number).is_err(), "{number}");
    }
}

/// Two listeners, each with one server.
fn two(servers: [&str; 2], rewriters: [Option<Rewriter>; 2]) -> Topology {
    let v6 = servers[0].starts_with('[');
    topology([0, 1].map(|n| {
        let listener = match v6 {
            true => format!("[2001:db8:a::1{n}]:9001"),
            false => format!("198.51.100.1{n}:9001"),
        };
        server(&[&listener], servers[n], rewriters[n])
    }))
}

/// The options of a host with two servers.
fn two_servers() -> Options {
    let ip = |ip: &str| ip.parse().unwrap();
    Options {
        server: [
            "192.0.2.202",
            "192.0.2.203",
            "2001:db8:b::2",
            "2001:db8:b::3",
        ]
        .map(ip)
        .to_vec(),
        ..options(Role::Server)
    }
}

#[test]
fn one_port_of_a_host_is_rewritten_for_one_listener_only() {
    for servers in [
        ["192.0.2.202:9001", "192.0.2.203:9001"],
        ["[2001:db8:b::2]:9001", "[2001:db8:b::3]:9001"],
    ] {
        for other in [ON_SERVER, DSR, TRANSPARENT] {
            let two = two(servers, [ON_SERVER, other]);
            let error = compose(&two, &two_servers()).unwrap_err();
            assert!(error.to_string().contains("have the same port"), "{error}");
            // The proxy's host recognizes servers by their addresses.
            compose(&two, &options(Role::Proxy)).unwrap();
        }
    }
    // One listener, whose server has two addresses.
    let both = ["192.0.2.202:9001", "192.0.2.203:9001"];
    let one = both.map(|address| server(&["198.51.100.10:9000"], address, ON_SERVER));
    let text = compose(&topology(one), &two_servers()).unwrap();
    assert_eq!(text.matches("ip saddr set 198.51.100.10 accept").count(), 1);
}

#[test]
fn replies_of_the_sdk_and_to_the_proxy_are_not_rewritten() {
    let by_sdk = two(
        ["192.0.2.202:9001", "192.0.2.203:9002"],
        [ON_SERVER, BY_SDK],
    );
    let text = compose(&by_sdk, &two_servers()).unwrap();
    let chain = [
        "        ip daddr { 192.0.2.1, 198.51.100.10, 198.51.100.11 } accept\n",
        "        ip saddr 198.51.100.11 udp sport 9001 accept\n",
        "        oifname \"pub\" meta nfproto ipv4 udp sport 9001 udp checksum 0",
    ];
    assert!(text.contains(&chain.concat()), "{text}");
    // The same port at another address of the host.
    let servers = ["192.0.2.202:9001", "192.0.2.203:9001"];
    let mut plain = two(servers, [ON_SERVER, None]);
    plain.servers[1].answers_proxy = Some("mode plain");
    let without_gateway = Options {
        gateway: Vec::new(),
        ..two_servers()
    };
    let error = compose(&plain, &without_gateway).unwrap_err().to_string();
    for part in ["192.0.2.203:9001", "mode plain", "--gateway"] {
        assert!(error.contains(part), "no {part} in: {error}");
    }
    compose(&plain, &two_servers()).unwrap();
    let source = "192.0.2.9".parse().unwrap();
    plain.sources.insert(source);
    plain.servers[1].source = Some(source);
    let text = compose(&plain, &without_gateway).unwrap();
    let proxy = "ip daddr { 192.0.2.9, 198.51.100.10, 198.51.100.11 } accept\n";
    assert!(text.contains(proxy), "{text}");
}

#[test]
fn addresses_that_no_other_host_has_are_refused() {
    for text in ["192.0.2.1", "2001:db8::1", "fe80::1"] {
        assert_eq!(other_host(text), Ok(text.parse().unwrap()));
        assert_eq!(unicast(text), Ok(text.parse().unwrap()));
    }
    assert!(unicast("127.0.0.1").is_ok() && unicast("::1").is_ok());
    for text in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
        assert!(other_host(text).is_err(), "{text}");
    }
    for text in [
        "0.0.0.0",
        "::",
        "224.0.0.1",
        "ff02::1",
        "255.255.255.255",
        "::ffff:0.0.0.0",
        "x",
    ] {
        assert!(
            unicast(text).is_err() && other_host(text).is_err(),
            "{text}"
        );
    }
}

#[test]
fn an_error_names_an_interface_that_is_unsafe_in_a_script() {
    assert_eq!(safe("eth0.100".to_owned()).unwrap(), "eth0.100");
    let error = safe("v@if5\"".to_owned()).unwrap_err().to_string();
    assert!(
        error.contains(r#"interface "v@if5\"" has a name"#),
        "{error}"
    );
    assert!(error.contains("rename it"), "{error}");
}

#[test]
fn client_addresses_reach_servers_of_their_family_and_headers_reach_all() {
    assert!(both_families(None).reply_paths().is_empty());
    for rewriter in [TRANSPARENT, DSR, ON_SERVER] {
        let paths = both_families(rewriter).reply_paths();
        let mut families = paths
            .iter()
            .map(|p| (p.server.is_ipv4(), p.listener.is_ipv4()));
        assert!(paths.len() == 2 && families.all(|(server, listener)| server == listener));
    }
    assert_eq!(both_families(BY_SDK).reply_paths().len(), 4);
}
