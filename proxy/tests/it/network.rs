//! Sessions and listeners follow this host's network: addresses that come and go, and
//! routes that prefer others. They keep their servers, and what goes on is not disturbed.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use ppv2_lab::network::{
    Answering, Client, Echo, Family, Lab, Proxy, Scheme, Side, forged_v4, listener, listeners,
};
use ppv2_lab::test_name;
use ppv2_lab::{Process, TIMEOUT, binary, eventually, namespace};
use socket2::{Domain, Protocol, Socket, Type};

/// What the proxy's host gets instead of its address on the server's side.
fn next_address(family: Family) -> IpAddr {
    let ip = match family {
        Family::V4 => "10.0.0.9",
        Family::V6 => "fd00:a::9",
    };
    ip.parse().unwrap()
}

fn prefix(family: Family) -> u8 {
    match family {
        Family::V4 => 24,
        Family::V6 => 64,
    }
}

/// `ip address add` or `del` on the server's side of the proxy's host.
fn change(lab: &Lab, verb: &str, ip: IpAddr, family: Family) {
    let prefix = prefix(family);
    // Otherwise the first address of a network takes the others with it.
    let promote = "echo 1 >/proc/sys/net/ipv4/conf/priv/promote_secondaries";
    lab.sh(
        "proxy",
        &format!("{promote}; ip addr {verb} {ip}/{prefix} dev priv"),
    );
}

/// Has the proxy's host lose its address for another one.
fn replace_address(lab: &Lab, family: Family) {
    change(lab, "add", next_address(family), family);
    change(lab, "del", family.proxy(), family);
}

fn restore_address(lab: &Lab, family: Family) {
    change(lab, "add", family.proxy(), family);
    change(lab, "del", next_address(family), family);
}

/// Asks until there is an answer; returns the source that the server saw.
#[track_caller]
fn ask_until_answered(client: &Client) -> SocketAddr {
    let deadline = Instant::now() + TIMEOUT;
    let seen = loop {
        assert!(Instant::now() < deadline, "never answered again");
        if let Some(seen) = client.try_ask(b"again") {
            break seen;
        }
    };
    // What waited for a neighbour's address may be answered, too.
    client.pass_over_answers();
    seen
}

fn followed(proxy: &Proxy<'_>, family: Family) -> u64 {
    let labels = format!("listener=\"{family:?}\",reason=\"network\"");
    proxy.metric(&format!("ppv2_sessions_ended_total{{{labels}}}"))
}

/// Two servers in turn: a new session would be given the other.
fn two_servers(family: Family, keys: &str) -> (String, [SocketAddr; 2]) {
    let first = family.server();
    let second = SocketAddr::new(first.ip(), 9002);
    let config = listener(family, "mode = \"plain\"");
    let servers = format!("servers = [\"{first}\"]");
    let both = format!("balance = \"round_robin\"\n{keys}\nservers = [\"{first}\", \"{second}\"]");
    (config.replace(&servers, &both), [first, second])
}

#[test]
fn sessions_follow_an_address_that_is_replaced() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    for family in Family::BOTH {
        let probe =
            "health = { every = \"200ms\", timeout = \"100ms\", probe = { kind = \"udp\" } }";
        let (config, addresses) = two_servers(family, probe);
        let servers = addresses.map(|address| Echo::at(&lab, address, Answering::Back));
        let mut proxy = lab.proxy_with(&format!("workers = 1\n{config}"));
        let clients = [1, 2].map(|number| Client::new(&lab, family, number, 0));
        let asked = |server: usize, client: SocketAddr| {
            let seen = servers[server].seen();
            seen.contains(&client)
        };
        let before = clients.each_ref().map(|client| client.ask(b"before"));
        let home = before.map(|source| usize::from(asked(1, source)));
        assert_ne!(home[0], home[1]);

        replace_address(&lab, family);
        for (client, home) in clients.iter().zip(home) {
            let source = ask_until_answered(client);
            assert_eq!(source.ip(), next_address(family));
            assert!(asked(home, source), "moved to another server");
            assert_eq!(client.ask(b"and again"), source);
        }
        assert_eq!(followed(&proxy, family), 2);
        // The proxy may have looked between the two changes: then it says another former one.
        let next = next_address(family);
        let said = format!("servers are written to from {next} instead of ");
        proxy.process.wait_for(&said);
        // Probes leave from the new address, too.
        let up = addresses.map(|server| {
            let labels = format!("upstream=\"{family:?}\",server=\"{server}\"");
            format!("ppv2_upstream_health_checks_total{{{labels},result=\"passed\"}}")
        });
        let passed = up.each_ref().map(|name| proxy.metric(name));
        eventually("probes to pass again", || {
            up.iter()
                .zip(passed)
                .all(|(name, before)| proxy.metric(name) > before + 1)
        });
        restore_address(&lab, family);
        for client in &clients {
            assert_eq!(ask_until_answered(client).ip(), family.proxy());
        }
    }
}

/// The old address stays, and replies to it would come.
/// Until its address is closed, `drain_timeout` after the reload.
#[test]
fn sessions_of_a_removed_listener_follow_an_address_that_is_replaced() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    for (family, other) in [(Family::V4, Family::V6), (Family::V6, Family::V4)] {
        let _server = Echo::new(&lab, family, Answering::Back);
        let both = listeners("mode = \"plain\"");
        let proxy = lab.proxy_with(&format!("drain_timeout = \"10m\"\n{both}"));
        let client = Client::new(&lab, family, 1, 0);
        let before = client.ask(b"before");

        let rest = listener(other, "mode = \"plain\"");
        proxy.reload(&format!("drain_timeout = \"10m\"\n{rest}"));
        assert_eq!(client.ask(b"removed"), before);
        replace_address(&lab, family);

        let source = ask_until_answered(&client);
        assert_eq!(source.ip(), next_address(family));
        assert_eq!(followed(&proxy, family), 1);
        restore_address(&lab, family);
    }
}

#[test]
fn sessions_follow_a_route_that_prefers_another_address() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    for family in Family::BOTH {
        let ip: IpAddr = match family {
            Family::V4 => "10.9.9.9".parse().unwrap(),
            Family::V6 => "fd00:9::9".parse().unwrap(),
        };
        let usable_at_once = if ip.is_ipv4() { "" } else { "nodad" };
        lab.sh(
            "server",
            &format!("ip addr add {ip} dev lo {usable_at_once}"),
        );
        change(&lab, "add", next_address(family), family);
        let prefer = |source: IpAddr| {
            let via = family.server().ip();
            lab.sh(
                "proxy",
                &format!("ip route replace {ip} via {via} src {source}"),
            );
        };
        prefer(family.proxy());
        let server = SocketAddr::new(ip, 9001);
        let config =
            listener(family, "").replace(&family.server().to_string(), &server.to_string());
        let config = config.replace("upstream =", "mode = \"plain\"\nupstream =");
        let _server = Echo::at(&lab, server, Answering::Back);
        let proxy = lab.proxy_with(&config);
        let client = Client::new(&lab, family, 1, 0);
        let before = client.ask(b"before");
        assert_eq!(before.ip(), family.proxy());

        // What has nothing to do with the server changes nothing.
        let unrelated: String = (0..200)
            .map(|n| match family {
                Family::V4 => format!("route add 10.8.{n}.0/24 dev priv\n"),
                Family::V6 => format!("route add fd00:8:{n}::/48 dev priv\n"),
            })
            .collect();
        lab.sh("proxy", &format!("ip -batch - <<END\n{unrelated}\nEND"));
        for number in 0..50 {
            assert_eq!(client.ask(format!("meanwhile {number}").as_bytes()), before);
        }
        assert_eq!(followed(&proxy, family), 0);

        prefer(next_address(family));
        eventually("the session to follow", || {
            let seen = client.ask(b"after");
            assert!(seen == before || seen.ip() == next_address(family));
            seen != before
        });
        assert_eq!(followed(&proxy, family), 1);
        change(&lab, "del", next_address(family), family);
    }
}

#[test]
fn sessions_go_on_from_another_source_when_one_is_gone() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    for family in Family::BOTH {
        let (old, new) = (family.proxy(), next_address(family));
        change(&lab, "add", new, family);
        let config = listener(family, "mode = \"plain\"");
        let config = config.replace(
            "servers =",
            &format!("source = [\"{old}\", \"{new}\"]\nservers ="),
        );
        let _server = Echo::new(&lab, family, Answering::Back);
        let mut proxy = lab.proxy_with(&format!("workers = 1\n{config}"));
        let clients = [1, 2].map(|number| Client::new(&lab, family, number, 0));
        let mut sources = clients.each_ref().map(|client| client.ask(b"before").ip());
        sources.sort();
        assert_eq!(sources, [old, new]);
        change(&lab, "del", old, family);
        for client in &clients {
            assert_eq!(ask_until_answered(client).ip(), new);
        }
        assert_eq!(followed(&proxy, family), 1);
        proxy
            .process
            .wait_for(&format!("address {old} (source) is gone"));
        change(&lab, "add", old, family);
        proxy
            .process
            .wait_for(&format!("address {old} (source) is on this host now"));
        for client in &clients {
            assert_eq!(client.ask(b"still there").ip(), new);
        }
        change(&lab, "del", new, family);
    }
}

/// The host's address is the gateway of the server's replies.
#[test]
fn transparent_sessions_outlast_an_address_that_is_replaced() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    lab.set_up(Scheme::Transparent);
    let proxy = lab.proxy("mode = \"transparent\"");
    for family in Family::BOTH {
        let _server = Echo::new(&lab, family, Answering::Back);
        let client = Client::new(&lab, family, 1, 0);
        let before = client.ask(b"before");
        replace_address(&lab, family);
        let gateway = next_address(family);
        lab.sh("server", &format!("ip route replace default via {gateway}"));
        assert_eq!(ask_until_answered(&client), before);
        assert_eq!(followed(&proxy, family), 0);
    }
}

#[test]
fn a_listener_serves_again_once_its_address_is_back() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    let mut proxy = lab.proxy_with(&listeners("mode = \"plain\""));
    for family in Family::BOTH {
        let _server = Echo::new(&lab, family, Answering::Back);
        let client = Client::new(&lab, family, 1, 0);
        let before = client.ask(b"before");
        let (ip, prefix) = (family.listener().ip(), prefix(family));
        lab.sh("proxy", &format!("ip addr del {ip}/{prefix} dev pub"));
        proxy
            .process
            .wait_for(&format!("address {ip} (listener `{family:?}`) is gone"));
        assert_eq!(client.try_ask(b"meanwhile"), None);
        // The default route went with it.
        let router = match family {
            Family::V4 => "198.51.100.1",
            Family::V6 => "2001:db8:a::1",
        };
        lab.sh(
            "proxy",
            &format!("ip addr add {ip}/{prefix} dev pub; ip route replace default via {router}"),
        );
        assert_eq!(ask_until_answered(&client), before);
        proxy.process.wait_for(&format!(
            "address {ip} (listener `{family:?}`) is on this host now"
        ));
        assert_eq!(followed(&proxy, family), 0);
    }
}

/// The address of a VRRP standby: by the listener's own option, or by the host's.
#[test]
fn a_listener_starts_before_its_address_comes() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    let sysctls = |value: u8| {
        let ipv4 = format!("echo {value} >/proc/sys/net/ipv4/ip_nonlocal_bind");
        let ipv6 = format!("echo {value} >/proc/sys/net/ipv6/ip_nonlocal_bind");
        lab.sh("proxy", &format!("{ipv4}; {ipv6}"));
    };
    for freebind in [true, false] {
        sysctls(u8::from(!freebind));
        let mut config = listeners(&format!("mode = \"plain\"\nfreebind = {freebind}"));
        for family in Family::BOTH {
            let to_come = SocketAddr::new(address_to_come(family), family.listener().port());
            config = config.replace(&family.listener().to_string(), &to_come.to_string());
        }
        let mut proxy = lab.proxy_with(&config);
        for family in Family::BOTH {
            let ip = address_to_come(family);
            proxy.process.wait_for(&format!(
                "address {ip} (listener `{family:?}`) is not on this host yet"
            ));
            let _server = Echo::new(&lab, family, Answering::Back);
            let mut client = Client::new(&lab, family, 1, 0);
            client.listener.set_ip(ip);
            assert_eq!(client.try_ask(b"again"), None);
            for _ in 0..2 {
                let prefix = prefix(family);
                lab.sh("proxy", &format!("ip addr add {ip}/{prefix} dev pub"));
                ask_until_answered(&client);
                lab.sh("proxy", &format!("ip addr del {ip}/{prefix} dev pub"));
            }
        }
    }
    sysctls(0);
}

fn address_to_come(family: Family) -> IpAddr {
    let ip = match family {
        Family::V4 => "198.51.100.77",
        Family::V6 => "2001:db8:a::77",
    };
    ip.parse().unwrap()
}

/// At boot, the proxy starts while duplicate address detection goes on.
#[test]
fn a_tentative_address_is_waited_for() {
    let setup = "ip link add name va type veth peer name vb; ip link set va up; ip link set vb up";
    if !namespace::enter(test_name!(), setup) {
        return;
    }
    let script =
        "ip addr add 2001:db8::1/64 dev va; grep -q '^20010db8.* [4c]0 *va' /proc/net/if_inet6
         exec \"$0\" run --listen [2001:db8::1]:9000 --upstream [2001:db8::2]:9000";
    let mut proxy = Process::start(Command::new("sh").args(["-ec", script]).arg(binary()));
    proxy.wait_for("ready");
}

/// The kernel hands over what matches a connected socket before it looks at its source:
/// where rp_filter is strict, the proxy looks. Where it is not, a server may answer by
/// another interface.
#[test]
fn strict_rp_filter_has_forged_replies_dropped() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    let family = Family::V4;
    let early_demux = lab.sh("proxy", "cat /proc/sys/net/ipv4/udp_early_demux");
    assert_eq!(early_demux.trim(), "1");
    let setup = lab.set_up(Scheme::Transparent);
    // The attacker is the proxy's neighbour on the clients' side, and sends it what it likes.
    let to_proxy = format!(
        "ip rule add fwmark 7 lookup 77; ip route add default via {} table 77",
        family.listener().ip()
    );
    lab.sh("router", &to_proxy);
    let attacker = lab.at("router", || {
        let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255))).unwrap();
        raw.set_header_included_v4(true).unwrap();
        raw.set_mark(7).unwrap();
        raw
    });
    let _server = Echo::new(&lab, family, Answering::Back);
    for mode in ["plain", "transparent"] {
        let strict = |strict: bool| {
            let value = u8::from(strict);
            let path = "/proc/sys/net/ipv4/conf/pub/rp_filter";
            lab.sh("proxy", &format!("echo {value} >{path}"));
        };
        strict(true);
        let proxy = lab.proxy_with(&listener(family, &format!("mode = \"{mode}\"")));
        let client = Client::new(&lab, family, 1, 0);
        let session = client.ask(b"question");
        let forge = || {
            let (SocketAddr::V4(from), SocketAddr::V4(to)) = (family.server(), session) else {
                panic!("IPv4 only");
            };
            let target = SocketAddr::new(session.ip(), 0);
            let datagram = forged_v4(from, to, b"forged");
            attacker.send_to(&datagram, &target.into()).unwrap();
        };
        let dropped = || proxy.dropped(family, "reply_wrong_interface");
        for number in 1..=3 {
            forge();
            eventually("the drop", || dropped() == number);
            client.ask(b"the server's own replies pass");
        }

        strict(false);
        eventually("replies by another interface to pass", || {
            forge();
            let passed = receive_soon(&client);
            assert!(passed.as_deref().is_none_or(|reply| reply == b"forged"));
            passed.is_some()
        });
        client.pass_over_answers();
        strict(true);
        eventually("them to be dropped again", || {
            let before = dropped();
            forge();
            client.pass_over_answers();
            dropped() > before
        });
        client.ask(b"the server's own replies pass");
    }
    setup.undo();
}

/// What comes within a moment.
fn receive_soon(client: &Client) -> Option<Vec<u8>> {
    let moment = Some(Duration::from_millis(100));
    client.socket.set_read_timeout(moment).unwrap();
    let mut datagram = [0; 2048];
    let received = client.socket.recv(&mut datagram);
    client.socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    Some(datagram[..received.ok()?].to_vec())
}
