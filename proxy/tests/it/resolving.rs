//! Servers given by name, behind the running proxy: where clients go when DNS answers
//! change, fail, or never come.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ppv2_lab::dns_server::{Answers, DnsServer};
use ppv2_lab::service::*;
use ppv2_lab::*;

const NAME: &str = "servers.ppv2.test";

/// A server of each of these addresses, all at one port.
fn at<const N: usize>(ips: [&str; N]) -> (u16, [Server; N]) {
    let port = port();
    let server = |ip: &str| Server::at(SocketAddr::new(ip.parse().unwrap(), port));
    (port, ips.map(server))
}

fn config(resolver: &DnsServer, bind: SocketAddr, keys: &str, servers: &str) -> String {
    let listener = listener("a", bind, "u");
    let upstream =
        format!("[upstream.u]\nbalance = \"round_robin\"\n{keys}\nservers = [{servers}]\n");
    listener + &upstream + &resolver.table()
}

/// The addresses of the servers that new clients get.
fn of_new_clients(listener: SocketAddr) -> BTreeSet<IpAddr> {
    (0..12)
        .map(|_| ask(&socket("127.0.0.1"), listener).0.ip())
        .collect()
}

fn ips<const N: usize>(texts: [&str; N]) -> BTreeSet<IpAddr> {
    texts.map(|text| text.parse().unwrap()).into()
}

#[test]
fn dns_change_moves_new_clients_at_once_and_sessions_after_the_drain_timeout() {
    let resolver = DnsServer::start();
    let (port, _servers) = at(["127.0.0.2", "127.0.0.3", "127.0.0.4"]);
    resolver.set(NAME, 1, &["127.0.0.2", "127.0.0.3"]);
    let a = address("127.0.0.1");
    let name = format!("\"dns:{NAME}:{port}\"");
    let proxy = Proxy::start(&config(&resolver, a, "lame_duck = \"2s\"", &name));
    assert_eq!(of_new_clients(a), ips(["127.0.0.2", "127.0.0.3"]));
    let clients: Vec<_> = (0..12).map(|_| socket("127.0.0.1")).collect();
    let before: Vec<_> = clients.iter().map(|client| ask(client, a)).collect();

    resolver.set(NAME, 1, &["127.0.0.3", "127.0.0.4"]);
    let changed = ips(["127.0.0.3", "127.0.0.4"]);
    eventually("new clients to follow", || of_new_clients(a) == changed);
    for (client, session) in clients.iter().zip(&before) {
        let now = ask(client, a);
        // Sessions to 127.0.0.2 stay until the drain timeout.
        assert!(now == *session || session.0.ip() == IpAddr::from([127, 0, 0, 2]));
    }
    let (_, upstreams) = http_get(proxy.admin, "/upstreams");
    let found_by = format!("\"found_by\":\"dns:{NAME}:{port}\"");
    assert!(upstreams.contains(&found_by), "{upstreams}");
    eventually("all to have moved", || {
        let now: Vec<_> = clients.iter().map(|client| ask(client, a)).collect();
        let kept = |(now, before): (&(SocketAddr, _), &(SocketAddr, _))| {
            now == before || before.0.ip() == IpAddr::from([127, 0, 0, 2])
        };
        assert!(now.iter().zip(&before).all(kept));
        now.iter().all(|(server, _)| changed.contains(&server.ip()))
    });
    assert!(
        proxy.metric(&format!(
            "ppv2_name_changes_total{{name=\"dns:{NAME}:{port}\"}}"
        )) > 0
    );

    // Whatever fails, the last answer stands.
    for answers in [Answers::ServFail, Answers::NxDomain, Answers::Silence] {
        resolver.answer(answers);
        let asked = resolver.asked(NAME);
        eventually("it to be asked", || resolver.asked(NAME) > asked + 2);
        assert_eq!(of_new_clients(a), changed);
        let failing = format!("ppv2_name_failing{{name=\"dns:{NAME}:{port}\"}}");
        eventually("it to be told", || proxy.metric(&failing) == 1);
    }
    resolver.remove(NAME);
    resolver.answer(Answers::Right);
    let asked = resolver.asked(NAME);
    eventually("it to be asked", || resolver.asked(NAME) > asked + 2);
    assert_eq!(of_new_clients(a), changed);
}

#[test]
fn start_without_dns_answer_keeps_asking() {
    let resolver = DnsServer::start();
    let (port, [server, other]) = at(["127.0.0.2", "127.0.0.1"]);
    let (a, b) = (address("127.0.0.1"), address("127.0.0.1"));
    let name = format!("\"dns:{NAME}:{port}\"");
    let both = config(&resolver, a, "", &name)
        + &listener("b", b, "other")
        + &format!("[upstream.other]\nservers = [{}]\n", list(&[&other]));
    let mut proxy = Proxy::start(&both);
    proxy.process.wait_for("servers.ppv2.test");
    // Others are not kept waiting.
    ask(&socket("127.0.0.1"), b);
    let client = socket("127.0.0.1");
    client.send_to(b"?", a).unwrap();
    receive_nothing(&client);
    let dropped = "ppv2_dropped_datagrams_total{listener=\"a\",reason=\"no_server\"}";
    eventually("the drop", || proxy.metric(dropped) == 1);
    resolver.set(NAME, 1, &["127.0.0.2"]);
    let up = format!(
        "ppv2_upstream_up{{upstream=\"u\",server=\"{}\"}}",
        server.address
    );
    eventually("an answer", || proxy.has_metric(&up));
    eventually("service", || {
        client
            .set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        client.send_to(b"?", a).unwrap();
        client.recv(&mut [0; 100]).is_ok()
    });

    // A reload that would be without servers is refused, for all was well before.
    // What was known of the name before is not lost, though DNS fails meanwhile.
    let lost = both.replace(NAME, "lost.ppv2.test");
    resolver.answer(Answers::ServFail);
    let (status, said) = proxy.try_reload(&lost);
    assert_eq!(status, 422);
    assert!(
        said.contains("none of the names in upstream `u` resolves to a usable server"),
        "{said}"
    );
    assert!(proxy.has_metric(&up));
    let known = format!("ppv2_name_addresses{{name=\"dns:{NAME}:{port}\"}}");
    assert_eq!(proxy.metric(&known), 1);
    resolver.answer(Answers::Right);
    // One more name beside others that lead somewhere is not.
    let more = both.replace(&name, &format!("{name}, \"dns:lost.ppv2.test:53\""));
    proxy.reload(&more);
    assert_eq!(of_new_clients(a), ips(["127.0.0.2"]));
}

#[test]
fn rejected_reload_keeps_the_resolver() {
    let (resolver, other) = (DnsServer::start(), DnsServer::start());
    let (port, _servers) = at(["127.0.0.2", "127.0.0.3"]);
    resolver.set(NAME, 1, &["127.0.0.2"]);
    other.set(NAME, 1, &["127.0.0.3"]);
    let (a, b) = (address("127.0.0.1"), address("127.0.0.1"));
    let name = format!("\"dns:{NAME}:{port}\"");
    let proxy = Proxy::start(&config(&resolver, a, "", &name));
    assert_eq!(of_new_clients(a), ips(["127.0.0.2"]));
    let good = config(&other, a, "", &name);
    let lost =
        listener("b", b, "lost") + "[upstream.lost]\nservers = [\"dns:lost.ppv2.test:53\"]\n";
    for _ in 0..3 {
        let (status, said) = proxy.try_reload(&(good.clone() + &lost));
        assert_eq!(status, 422);
        assert!(
            said.contains("none of the names in upstream `lost`"),
            "{said}"
        );
    }
    assert!(other.asked("lost.ppv2.test") > 0);
    assert_eq!(other.asked(NAME), 0);
    assert_eq!(of_new_clients(a), ips(["127.0.0.2"]));
    // One that is not refused has the other asked.
    proxy.reload(&good);
    eventually("the other's answer", || {
        of_new_clients(a) == ips(["127.0.0.3"])
    });
}

#[test]
fn reload_replaces_a_resolver_that_never_answered() {
    let (failing, resolver) = (DnsServer::start(), DnsServer::start());
    failing.answer(Answers::ServFail);
    let (port, _servers) = at(["127.0.0.2"]);
    resolver.set(NAME, 1, &["127.0.0.2"]);
    let a = address("127.0.0.1");
    let name = format!("\"dns:{NAME}:{port}\"");
    let proxy = Proxy::start(&config(&failing, a, "", &name));
    proxy.reload(&config(&resolver, a, "", &name));
    assert_eq!(of_new_clients(a), ips(["127.0.0.2"]));
}

#[test]
fn srv_priorities_tell_servers_from_backups() {
    let resolver = DnsServer::start();
    let (port, _servers) = at(["127.0.0.2", "127.0.0.3"]);
    resolver.set("first.ppv2.test", 1, &["127.0.0.2"]);
    resolver.set("second.ppv2.test", 1, &["127.0.0.3"]);
    let records = |first: u16, second: u16| {
        let record = |priority, name| format!("{priority} 1 {port} {name}.ppv2.test.");
        let (first, second) = (record(first, "first"), record(second, "second"));
        resolver.set("_dns._udp.ppv2.test", 1, &[&first, &second]);
    };
    records(1, 2);
    let a = address("127.0.0.1");
    let _proxy = Proxy::start(&config(&resolver, a, "", "\"srv:_dns._udp.ppv2.test\""));
    assert_eq!(of_new_clients(a), ips(["127.0.0.2"]));
    let client = socket("127.0.0.1");
    let before = ask(&client, a);
    records(2, 1);
    eventually("the other", || of_new_clients(a) == ips(["127.0.0.3"]));
    assert_eq!(ask(&client, a), before);
    records(1, 1);
    eventually("both", || {
        of_new_clients(a) == ips(["127.0.0.2", "127.0.0.3"])
    });
    assert_eq!(ask(&client, a), before);
}

#[test]
fn addresses_of_a_name_change_no_other_upstream() {
    if !namespace::enter(test_name!(), "") {
        return;
    }
    let (resolver, steady) = (DnsServer::start(), Server::start());
    // Of this host, which is not set up for replies of mode transparent.
    resolver.set(NAME, 1, &["127.0.0.2"]);
    let [a, b] = [(); 2].map(|()| address("127.0.0.1"));
    let (port, steadily) = (port(), list(&[&steady]));
    let with = |keys: &str| {
        let by_name = listener("b", b, "v").replace("plain", "transparent");
        let upstream = format!("[upstream.v]\nservers = [\"dns:{NAME}:{port}\"]\n{by_name}{keys}");
        config(&resolver, a, "", &steadily) + &upstream
    };
    let mut proxy = Proxy::start(&with(""));
    ask(&socket("127.0.0.1"), a);
    proxy.process.wait_for("127.0.0.2");
    let log = proxy.process.log();
    assert!(log.contains("not used: this host lacks what"), "{log}");

    for answer in ["127.0.0.3", "0.0.0.0"] {
        resolver.set(NAME, 1, &[answer]);
        let client = socket("127.0.0.1");
        let before = ask(&client, a);
        proxy.reload(&with("requests = 7\n"));
        assert_eq!(ask(&client, a), before);
    }
    // What has no servers from the first is somebody's mistake.
    let content = with("")
        .replace(NAME, "other.ppv2.test")
        .replace("\"b\"", "\"c\"");
    let content = content
        .replace("upstream.v", "upstream.w")
        .replace("\"v\"", "\"w\"");
    let (status, said) = proxy.try_reload(&content);
    assert!(
        status == 422 && said.contains("resolves to a usable server"),
        "{said}"
    );
}

#[test]
fn ever_changing_addresses_are_bounded_and_harm_no_other_name() {
    let resolver = DnsServer::start();
    let steady = Server::start();
    let port = port();
    resolver.set(NAME, 0, &["127.1.0.1"]);
    let a = address("127.0.0.1");
    let servers = format!("{}, \"dns:{NAME}:{port}\"", list(&[&steady]));
    // A probe tells addresses that are gone from those that serve.
    let keys = "lame_duck = \"1s\"\nhealth = { every = \"200ms\", timeout = \"100ms\" }";
    let proxy = Proxy::start(&config(&resolver, a, keys, &servers));
    let clients: Vec<_> = (0..8).map(|_| socket("127.0.0.1")).collect();
    for client in &clients {
        client
            .set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
    }
    // Until each is with the steady one, since nobody answers at the others.
    eventually("all clients to be served", || {
        clients.iter().all(|client| {
            client.send_to(b"?", a).unwrap();
            client.recv(&mut [0; 100]).is_ok()
        })
    });
    let before: Vec<_> = clients.iter().map(|client| ask(client, a)).collect();
    let changes = format!("ppv2_name_changes_total{{name=\"dns:{NAME}:{port}\"}}");
    for n in 2..42 {
        resolver.set(NAME, 0, &[&format!("127.1.0.{n}")]);
        let seen = proxy.metric(&changes);
        eventually("the change", || proxy.metric(&changes) > seen);
        for (client, session) in clients.iter().zip(&before) {
            assert_eq!(ask(client, a), *session);
        }
    }
    // It was checked all along, though everything beside it changed.
    let passed = format!(
        "ppv2_upstream_health_checks_total{{upstream=\"u\",server=\"{}\",result=\"passed\"}}",
        steady.address
    );
    assert!(proxy.metric(&passed) > 5);
    let shown = || {
        http_get(proxy.admin, "/metrics")
            .1
            .matches("ppv2_upstream_up{")
            .count()
    };
    eventually("those that left to be gone", || shown() == 2);
    let log = proxy.process.log();
    assert!(log.matches(NAME).count() < 10, "{log}");
}
