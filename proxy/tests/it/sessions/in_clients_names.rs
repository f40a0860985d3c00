//! Sessions that send from their client's address: which sources are refused, and what
//! happens to such sessions when privileges, listeners or servers change.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

use nix::net::if_::if_nametoindex;
use ppv2_lab::network::*;
use ppv2_lab::*;

const TRANSPARENT: &str = r#"mode = "transparent""#;
const OWN_PORT: &str = "mode = \"transparent\"\nsource_port = \"client\"";
const DSR: &str = "mode = \"dsr\"\nrewrite_on = \"proxy\"";

/// Sends one datagram to the listener from an address of a host.
fn send_from(lab: &Lab, host: &str, from: &str, family: Family) {
    let from = SocketAddr::new(from.parse().unwrap(), 0);
    let socket = lab.at(host, || bind(from));
    socket.send_to(b"whose?", family.listener()).unwrap();
}

#[test]
fn forged_sources_are_counted_and_never_written_from() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    for (scheme, mode) in [
        (Scheme::Transparent, TRANSPARENT),
        (Scheme::Transparent, OWN_PORT),
        (Scheme::RewriteOnProxy, DSR),
    ] {
        let setup = lab.set_up(scheme);
        let proxy = lab.proxy(mode);
        let servers = Family::BOTH.map(|family| Echo::new(&lab, family, Answering::Back));

        // The proxy's own, and the server's.
        for from in ["127.0.0.1", "127.0.0.9", "198.51.100.10", "10.0.0.1"] {
            send_from(&lab, "proxy", from, Family::V4);
        }
        for from in ["::1", "2001:db8:a::10", "fd00:a::1"] {
            send_from(&lab, "proxy", from, Family::V6);
        }
        send_from(&lab, "server", "10.0.0.2", Family::V4);
        send_from(&lab, "server", "fd00:a::2", Family::V6);
        let mut expected = [5, 4];

        // Addresses of no host. Those of IPv4 pass a strict reverse path filter, which the
        // route by default is enough for.
        forge(&lab, [169, 254, 7, 7], 5000);
        forge(&lab, [0, 1, 2, 3], 5000);
        forge(&lab, [203, 0, 113, 12], 0);
        expected[0] += 3;
        let router = lab.sh("router", "ip -6 -o addr show dev rp scope link");
        let link_local = router.split_whitespace().nth(3).unwrap();
        let (link_local, _) = link_local.split_once('/').unwrap();
        let device = lab.at("router", || if_nametoindex("rp")).unwrap();
        let from = SocketAddrV6::new(link_local.parse().unwrap(), 0, 0, device);
        let socket = lab.at("router", || bind(from.into()));
        socket.send_to(b"whose?", Family::V6.listener()).unwrap();
        expected[1] += 1;

        for (family, expected) in Family::BOTH.into_iter().zip(expected) {
            eventually("every one to be counted", || {
                proxy.dropped(family, "bad_source") >= expected
            });
        }
        // These the kernel drops before the proxy could.
        for from in [
            [224, 0, 0, 5],
            [255, 255, 255, 255],
            [198, 51, 100, 255],
            [127, 0, 0, 1],
        ] {
            forge(&lab, from, 5000);
        }
        for (family, expected) in Family::BOTH.into_iter().zip(expected) {
            let client = Client::new(&lab, family, 1, 0);
            client.send(b"mine");
            let server = &servers[usize::from(family == Family::V6)];
            eventually("the client's to come", || !server.seen().is_empty());
            let seen: Vec<_> = server.seen().iter().map(|source| source.ip()).collect();
            assert_eq!(seen, [client.address.ip()]);
            assert_eq!(proxy.dropped(family, "bad_source"), expected);
        }
        drop(proxy);
        setup.undo();
    }
}

/// Has the router send a datagram to the listener from any IPv4 source.
fn forge(lab: &Lab, from: [u8; 4], port: u16) {
    let SocketAddr::V4(to) = Family::V4.listener() else {
        panic!("IPv4");
    };
    let from = SocketAddrV4::new(Ipv4Addr::from(from), port);
    let socket = lab.at("router", || raw_udp(Ipv4Addr::UNSPECIFIED.into()));
    socket.set_header_included_v4(true).unwrap();
    let datagram = forged_v4(from, to, b"whose?");
    socket
        .send_to(&datagram, &SocketAddr::new((*to.ip()).into(), 0).into())
        .unwrap();
}

/// No process can take a capability from another, but what stands in for one can
/// be taken: ports below 1024 are everybody's where this sysctl says so.
fn unprivileged_ports_from(lab: &Lab, port: u16) {
    let script = format!("echo {port} >/proc/sys/net/ipv4/ip_unprivileged_port_start");
    lab.sh("proxy", &script);
}

#[test]
fn lost_privilege_ends_no_session() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    lab.set_up(Scheme::Transparent);
    unprivileged_ports_from(&lab, 0);
    let without = ["setpriv", "--bounding-set=-net_bind_service"];
    let mut proxy = lab.proxy_by(&without, &listeners(OWN_PORT));
    proxy.assert_standing(NET_RAW);
    for family in Family::BOTH {
        let _server = Echo::new(&lab, family, Answering::Back);
        let [old, new] = [53, 67].map(|port| Client::new(&lab, family, 1, port));
        let high = Client::new(&lab, family, 2, 5000);
        assert_eq!(old.ask(b"in time"), old.address);

        unprivileged_ports_from(&lab, 1024);
        new.unanswered(b"too late");
        eventually("the drop", || proxy.dropped(family, "no_privilege") == 1);
        for number in 0..20 {
            assert_eq!(old.ask(&[number]), old.address);
            assert_eq!(high.ask(&[number]), high.address);
        }
        assert_eq!(proxy.dropped(family, "no_privilege"), 1);

        unprivileged_ports_from(&lab, 0);
        assert_eq!(new.ask(b"again"), new.address);
    }
    // It tells within a second.
    proxy.process.wait_for("CAP_NET_BIND_SERVICE");
}

#[test]
fn ipv6_needs_no_capability() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    let clients = [1, 2].map(|number| Client::new(&lab, Family::V6, number, 0));
    let _server = Echo::new(&lab, Family::V6, Answering::Back);
    let everything: &[&str] = &[];
    let no_low_ports = ["setpriv", "--bounding-set=-net_bind_service"];
    for (scheme, mode, wrapper, capabilities) in [
        (Scheme::Transparent, TRANSPARENT, everything, 0),
        (Scheme::RewriteOnProxy, DSR, everything, NET_BIND_SERVICE),
        // That is for clients' ports below 1024, and for nothing else.
        (Scheme::Transparent, OWN_PORT, &no_low_ports, 0),
        (Scheme::RewriteOnProxy, DSR, &no_low_ports, 0),
    ] {
        let setup = lab.set_up(scheme);
        let proxy = lab.proxy_by(wrapper, &listener(Family::V6, mode));
        proxy.assert_standing(capabilities);
        exchange(&clients, mode != TRANSPARENT);
        setup.undo();
    }
}

#[test]
fn reload_has_wildcard_listeners_share_their_ports_with_clients() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    lab.set_up(Scheme::Transparent);
    let (family, port) = (Family::V6, Family::V6.listener().port());
    let config = |mode| {
        let listener = listener(family, mode);
        let any = format!("[::]:{port}");
        "workers = 1\n".to_owned() + &listener.replace(&family.listener().to_string(), &any)
    };
    let proxy = lab.proxy_with(&config("mode = \"plain\""));
    let _server = Echo::new(&lab, family, Answering::Back);
    let client = Client::new(&lab, family, 1, port);
    assert_eq!(client.ask(b"whose?").ip(), family.proxy());
    proxy.reload(&config(OWN_PORT));
    assert_eq!(client.ask(b"whose now?"), client.address);
}

/// A listener with two addresses and one server, and one with another server.
fn two_ways(mode: &str, family: Family) -> String {
    let ip = family.listener().ip();
    let (first, second) = (family.server(), SocketAddr::new(family.server().ip(), 9003));
    let at = |port| SocketAddr::new(ip, port);
    format!(
        r#"
[[listener]]
name = "{family:?}"
bind = ["{}", "{}"]
upstream = "first"
idle_timeout = "1s"
{mode}
[[listener]]
bind = ["{}"]
upstream = "second"
{mode}
[upstream.first]
servers = ["{first}"]
[upstream.second]
servers = ["{second}"]
"#,
        at(9000),
        at(9002),
        at(9004)
    )
}

#[test]
fn one_client_port_serves_one_session_to_a_server() {
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    lab.set_up(Scheme::Transparent);
    for family in Family::BOTH {
        let second = SocketAddr::new(family.server().ip(), 9003);
        let servers = [family.server(), second].map(|at| Echo::at(&lab, at, Answering::Back));
        let proxy = lab.proxy_with(&two_ways(OWN_PORT, family));
        let mut client = Client::new(&lab, family, 1, 0);
        let ip = family.listener().ip();
        assert_eq!(client.ask(b"first"), client.address);

        client.listener = SocketAddr::new(ip, 9002);
        client.unanswered(b"by another address");
        eventually("the drop", || {
            proxy.dropped(family, "client_port_in_use") == 1
        });
        for number in 0..20 {
            for port in [9000, 9004] {
                client.listener = SocketAddr::new(ip, port);
                assert_eq!(client.ask(&[number]), client.address);
            }
        }
        assert_eq!(servers[1].seen().len(), 20);

        eventually("the first session to end", || {
            proxy.of(family, "ppv2_sessions") == 0
        });
        // A late reply could still come to it: its port rests, but for the client
        // at the same address.
        client.listener = SocketAddr::new(ip, 9002);
        client.unanswered(b"too soon");
        eventually("the drop", || {
            proxy.dropped(family, "client_port_in_use") == 2
        });
        client.listener = SocketAddr::new(ip, 9000);
        assert_eq!(client.ask(b"again"), client.address);
    }
}

#[test]
fn replies_that_wait_when_a_session_ends_are_counted() {
    // Nearly as many as a socket of the default size holds.
    const WAITING: u64 = 200;
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    lab.set_up(Scheme::Transparent);
    let proxy = lab.proxy(&format!("responses = 1\n{OWN_PORT}"));
    for family in Family::BOTH {
        let server = lab.at("server", || bind(family.server()));
        let client = Client::new(&lab, family, 1, 0);
        client.send(b"question");
        let (_, session) = receive(&server);
        // Its socket is closed with the first, and the client may start a new one.
        proxy.process.pause();
        for _ in 0..WAITING {
            server.send_to(b"answer", session).unwrap();
        }
        proxy.process.signal("CONT");
        assert_eq!(receive(&client.socket).0, b"answer");
        eventually("the others to be counted", || {
            proxy.dropped(family, "reply_late") == WAITING - 1
        });
        client.send(b"question");
        assert_eq!(receive(&server).1, session);
    }
}
