//! Mode `dsr` across hosts: the server's replies reach the client from the listener's
//! address and never pass the proxy, whichever host rewrites them.

use std::net::SocketAddr;

use ppv2_lab::eventually;
use ppv2_lab::network::*;
use ppv2_lab::test_name;

const REWRITTEN_ON_PROXY: ModeTest = ModeTest {
    scheme: Scheme::RewriteOnProxy,
    mode: "mode = \"dsr\"\nrewrite_on = \"proxy\"",
    capabilities: NET_RAW | NET_BIND_SERVICE,
    answering: Answering::Back,
    port: true,
    through_proxy: false,
};

#[test]
fn the_proxys_host_rewrites_replies() {
    REWRITTEN_ON_PROXY.run(test_name!(), Side::Private);
}

#[test]
fn the_servers_host_rewrites_replies() {
    let test = ModeTest {
        scheme: Scheme::RewriteOnServer,
        mode: "mode = \"dsr\"\nrewrite_on = \"server\"",
        ..REWRITTEN_ON_PROXY
    };
    test.run(test_name!(), Side::Public);
}

/// The proxy needs no capability.
const BY_HEADER: ModeTest = ModeTest {
    scheme: Scheme::Sdk,
    mode: "mode = \"dsr\"\nrewrite_on = \"sdk\"",
    capabilities: 0,
    answering: Answering::ByHeader,
    port: true,
    through_proxy: false,
};

#[test]
fn the_server_answers_from_the_destination_in_the_header() {
    BY_HEADER.run(test_name!(), Side::Public);
}

#[test]
fn the_server_answers_through_the_proxys_host() {
    let test = ModeTest {
        scheme: Scheme::SdkByProxy,
        ..BY_HEADER
    };
    test.run(test_name!(), Side::Private);
}

/// Two listeners of a family at two ports, `a` and `b`, whose servers are at the other's.
fn crossed(family: Family, mode: &str) -> String {
    let (listener, server) = (family.listener(), family.server());
    ["a", "b"]
        .map(|name| {
            let (bind, server) = match name {
                "a" => (listener, server),
                _ => (
                    SocketAddr::new(listener.ip(), server.port()),
                    SocketAddr::new(server.ip(), listener.port()),
                ),
            };
            format!(
                "[[listener]]\nname = \"{name}{family:?}\"\nbind = [\"{bind}\"]\n{mode}\n\
                 upstream = \"{name}{family:?}\"\n\
                 [upstream.{name}{family:?}]\nservers = [\"{server}\"]\n"
            )
        })
        .concat()
}

#[track_caller]
fn each_listener_answers(test: &str, side: Side, mode: &str, host: (&str, &[&str])) {
    let Some(lab) = Lab::enter(test, side) else {
        return;
    };
    let config = Family::BOTH.map(|family| crossed(family, mode)).concat();
    lab.host_setup(host.0, &config, host.1);
    let _proxy = lab.proxy_with(&config);
    for family in Family::BOTH {
        let (first, second) = (family.listener(), family.server());
        let _servers = [first.port(), second.port()].map(|port| {
            let address = SocketAddr::new(family.server().ip(), port);
            Echo::at(&lab, address, Answering::Back)
        });
        let mut client = Client::new(&lab, family, 1, 0);
        for _ in 0..20 {
            for port in [first.port(), second.port()] {
                client.listener.set_port(port);
                client.ask(b"from the listener that was asked");
                client.ask(&[b'z'; 3000]);
            }
        }
    }
}

#[test]
fn the_proxys_host_has_each_listener_answer() {
    each_listener_answers(
        test_name!(),
        Side::Private,
        "mode = \"dsr\"",
        ("proxy", &["--role", "proxy"]),
    );
}

/// Where a rule rewrote what another has rewritten, all would come from one.
#[test]
fn the_servers_host_has_each_listener_answer() {
    each_listener_answers(
        test_name!(),
        Side::Public,
        "mode = \"dsr\"\nrewrite_on = \"server\"",
        (
            "server",
            &["--role", "server", "--public-interface", "public"],
        ),
    );
}

/// The server's host reaches clients and the proxy by one interface.
#[test]
fn the_servers_host_rewrites_nothing_that_goes_to_the_proxy() {
    let Some(lab) = Lab::enter(test_name!(), Side::Public) else {
        return;
    };
    // Neither is the address of a listener.
    let source = |family| match family {
        Family::V4 => "198.51.100.9",
        Family::V6 => "2001:db8:a::9",
    };
    lab.sh(
        "proxy",
        "ip addr add 198.51.100.9/24 dev pub; ip addr add 2001:db8:a::9/64 dev pub",
    );
    let server = |family| -> SocketAddr {
        let address = match family {
            Family::V4 => "192.0.2.20:9001",
            Family::V6 => "[2001:db8:b::20]:9001",
        };
        address.parse().unwrap()
    };
    let config = Family::BOTH.map(|family| {
        let (bind, server, source) = (family.listener(), server(family), source(family));
        let plain = SocketAddr::new(bind.ip(), 9002);
        format!(
            r#"
[[listener]]
name = "dsr{family:?}"
bind = ["{bind}"]
upstream = "dsr{family:?}"
mode = "dsr"
rewrite_on = "server"
[[listener]]
name = "plain{family:?}"
bind = ["{plain}"]
upstream = "plain{family:?}"
mode = "plain"
[upstream.dsr{family:?}]
source = ["{source}"]
servers = ["{server}"]
health = {{ every = "100ms", timeout = "100ms", probe = {{ kind = "udp", send = "ping" }} }}
[upstream.plain{family:?}]
source = ["{source}"]
servers = ["{server}"]
"#
        )
    });
    let config = config.concat();
    lab.host_setup("server", &config, &["--role", "server"]);
    let servers = Family::BOTH.map(|family| Echo::at(&lab, server(family), Answering::Back));
    let proxy = lab.proxy_with(&config);
    for family in Family::BOTH {
        let mut client = Client::new(&lab, family, 1, 0);
        for _ in 0..20 {
            client.listener.set_port(9000);
            assert_eq!(client.ask(b"rewritten"), client.address);
            client.listener.set_port(9002);
            let seen = client.ask(b"passed on");
            assert_eq!(seen.ip().to_string(), source(family));
        }
        let server = server(family);
        let passed = format!(
            "ppv2_upstream_health_checks_total{{upstream=\"dsr{family:?}\",server=\"{server}\",result=\"passed\"}}"
        );
        let before = proxy.metric(&passed);
        eventually("probes to pass", || proxy.metric(&passed) > before + 2);
    }
    drop(servers);
}
