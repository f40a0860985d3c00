//! The scripts as they are printed, from options that leave nothing to this host.

use super::*;

/// Options that ask this host for nothing.
fn options(role: Role) -> Options {
    let ip = |ip: &str| ip.parse().unwrap();
    Options {
        config: PathBuf::new(),
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

fn config(mode: &str) -> Config {
    let content = format!(
        "[[listener]]\nbind = [\"198.51.100.10:9000\", \"[2001:db8:a::10]:9000\"]\n{mode}\n\
         upstream = \"u\"\n[upstream.u]\nservers = [\"192.0.2.202:9001\", \"[2001:db8:b::2]:9001\"]\n"
    );
    Config::from_toml("x", &content).unwrap()
}

/// The commands alone, without what is the same in every script.
#[track_caller]
fn commands(mode: &str, options: &Options) -> String {
    let text = script(&config(mode), options).unwrap();
    let (_, own) = text.split_once("flush table 9").unwrap();
    let (_, own) = own.split_once("\ndone\n").unwrap();
    let clears_nft = own.starts_with("if nft list table");
    let own = own
        .split_once("\nfi\n")
        .filter(|_| clears_nft)
        .map_or(own, |(_, own)| own);
    let lines = own.lines().filter(|line| !line.is_empty());
    let lines = lines.filter(|line| !line.starts_with('#'));
    lines.fold(String::new(), |text, line| text + line + "\n")
}

#[test]
fn transparent_takes_routes_alone() {
    assert_eq!(
        commands("mode = \"transparent\"", &options(Role::Proxy)),
        "\
ip -4 route replace local 0.0.0.0/0 dev lo table 9022
ip -4 rule add pref 9022 iif priv from 192.0.2.202/32 lookup 9022
ip -6 route replace local ::/0 dev lo table 9022
ip -6 rule add pref 9022 iif priv from 2001:db8:b::2/128 lookup 9022
"
    );
    assert_eq!(
        commands("mode = \"transparent\"", &options(Role::Server)),
        "\
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
fn a_server_on_the_proxys_own_host_is_told_by_its_port() {
    let on_loopback = Options {
        server_interface: Some("lo".to_owned()),
        table: Some(7),
        ..options(Role::Proxy)
    };
    let text = script(&config("mode = \"transparent\""), &on_loopback).unwrap();
    let rule = "ip -4 rule add pref 7 iif lo from 192.0.2.202/32 ipproto udp sport 9001 lookup 7\n";
    assert!(text.contains(rule), "{text}");
    let dsr = script(&config("mode = \"dsr\""), &on_loopback).unwrap_err();
    assert!(matches!(dsr, HostSetupError::OwnServer { .. }), "{dsr}");
}

#[test]
fn dsr_rewrites_on_the_proxys_host() {
    assert_eq!(
        commands("mode = \"dsr\"", &options(Role::Proxy)),
        r#"set_parameter net.ipv4.conf.priv.forwarding 1
[ "$(sysctl -n net.ipv6.conf.pub.accept_ra)" != 1 ] || set_parameter net.ipv6.conf.pub.accept_ra 2
if ! grep -qs "^net.ipv6.conf.all.forwarding = " "$state"; then
    keep net.ipv6.conf.all.forwarding
    for key in $(sysctl -N -a 2>/dev/null | grep '^net\.ipv6\.conf\..*\.forwarding$'); do
        keep "$key"
    done
fi
set_parameter net.ipv6.conf.all.forwarding 1
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
        oifname "pub" ip saddr 192.0.2.202 udp sport 9001 udp sport set 9000 ip saddr set 198.51.100.10
        oifname "pub" ip6 saddr 2001:db8:b::2 udp sport 9001 udp sport set 9000 ip6 saddr set 2001:db8:a::10
    }
}
END
"#
    );
    // What the ICMP errors for larger replies would ask for.
    let server = commands("mode = \"dsr\"", &options(Role::Server));
    for route in [
        "ip -4 route replace default via 192.0.2.1 dev priv mtu lock 1280 table 9023\n",
        "ip -6 route replace default via 2001:db8:b::1 dev priv mtu 1280 table 9023\n",
    ] {
        assert!(server.contains(route), "{server}");
    }
}

#[test]
fn dsr_rewrites_on_the_servers_host() {
    let mode = "mode = \"dsr\"\nrewrite_on = \"server\"";
    assert_eq!(commands(mode, &options(Role::Proxy)), "");
    assert_eq!(
        commands(mode, &options(Role::Server)),
        r#"set_parameter net.ipv4.conf.priv.rp_filter 2
nft -f - <<'END'
table inet ppv2_dsr_server
delete table inet ppv2_dsr_server
table inet ppv2_dsr_server {
    chain post {
        type filter hook postrouting priority 300
        oifname "pub" meta nfproto ipv4 udp sport 9001 udp checksum 0 udp sport set 9000 ip saddr set 198.51.100.10 udp checksum set 0 accept
        oifname "pub" meta nfproto ipv4 udp sport 9001 udp sport set 9000 ip saddr set 198.51.100.10
        oifname "pub" meta nfproto ipv6 udp sport 9001 udp sport set 9000 ip6 saddr set 2001:db8:a::10
    }
}
END
"#
    );
}

#[test]
fn the_sdk_takes_the_listeners_address_and_a_gateway_that_lets_it_in() {
    let mode = "mode = \"dsr\"\nrewrite_on = \"sdk\"";
    assert_eq!(commands(mode, &options(Role::Proxy)), "");
    let gateway = Options {
        is_gateway: true,
        server_interface: Some("eth0.100".to_owned()),
        ..options(Role::Proxy)
    };
    let text = commands(mode, &gateway);
    for line in [
        "set_parameter net/ipv4/conf/eth0.100/forwarding 1\n",
        "set_parameter net/ipv4/conf/eth0.100/accept_local 1\n",
        "set_parameter net/ipv4/conf/eth0.100/rp_filter 2\n",
        "set_parameter net.ipv6.conf.all.forwarding 1\n",
    ] {
        assert!(text.contains(line), "{text}");
    }
    let alone = Options {
        gateway: Vec::new(),
        ..options(Role::Server)
    };
    assert_eq!(
        commands(mode, &alone),
        "add_address 198.51.100.10/32\nset_parameter net.ipv4.conf.all.arp_ignore 1\n\
         set_parameter net.ipv4.conf.all.arp_announce 2\n"
    );
    let through = commands(mode, &options(Role::Server));
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
        for mode in ["mode = \"ppv2\"", "mode = \"plain\""] {
            assert_eq!(commands(mode, &options(role)), "", "{role:?} {mode}");
        }
    }
}

#[test]
fn what_is_not_known_names_the_option() {
    let unnamed = |role| Options {
        public_interface: None,
        server_interface: None,
        gateway: Vec::new(),
        server: Vec::new(),
        ..options(role)
    };
    let error = |config: &Config, options: &Options| script(config, options).unwrap_err();
    let dsr = config("mode = \"dsr\"");
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
    let wildcard = Config::from_toml(
        "x",
        "[[listener]]\nbind = [\"0.0.0.0:9000\"]\nmode = \"dsr\"\nrewrite_on = \"sdk\"\n\
         upstream = \"u\"\n[upstream.u]\nservers = [\"192.0.2.202:9001\"]\n",
    )
    .unwrap();
    let text = error(&wildcard, &options(Role::Server)).to_string();
    assert!(text.ends_with("--listener-address"), "{text}");
    let named = Options {
        listener_address: vec!["198.51.100.10".parse().unwrap()],
        ..options(Role::Server)
    };
    let text = script(&wildcard, &named).unwrap();
    assert!(text.contains("add_address 198.51.100.10/32\n"), "{text}");
}

#[test]
fn one_address_in_two_ways_is_refused() {
    let config = Config::from_toml(
        "x",
        "[[listener]]\nbind = [\"198.51.100.10:9000\"]\nmode = \"dsr\"\nupstream = \"u\"\n[upstream.u]\n\
         servers = [\"192.0.2.202:9001\", { address = \"192.0.2.202:9002\", mode = \"transparent\" }]\n",
    )
    .unwrap();
    let error = script(&config, &options(Role::Proxy)).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("192.0.2.202") && text.contains("two addresses"),
        "{text}"
    );
}

#[test]
fn a_name_that_a_shell_would_take_apart_is_refused() {
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
