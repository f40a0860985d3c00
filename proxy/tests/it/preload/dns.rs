//! DNS servers without a setting for proxies.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;

use ppv2_lab::dig::program;
use ppv2_lab::dns_message::{question, reply};
use ppv2_lab::wrapped::{
    CLIENT_NETWORKS, CLIENTS, REFUSED_NETWORKS, ROUNDS, Scene, at, setup, wrapped,
};
use ppv2_lab::*;

use crate::dns_servers::{kresd_config, powerdns_zone};

const ZONE: &str = "ppv2.test";
const STRANGER: &str = "stranger.ppv2.test";

/// Starts a server on a port of both loopback addresses, with a folder of its own. It allows
/// [`CLIENT_NETWORKS`] alone.
type Start = fn(&Path, u16) -> Process;

/// What shows a client's address.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shown {
    /// The server's access list: it refuses others.
    Access,
    /// Its log: what comes between a client's address and port.
    Log(&'static str),
    /// The answer: that address.
    Answer,
}

/// What a client asks for in a round, so that its answer is nobody else's.
fn name(client: SocketAddr, round: usize) -> String {
    let ip = client.ip().to_string().replace([':', '.'], "-");
    format!("c{ip}-p{}-r{round}.{ZONE}", client.port())
}

fn id(client: SocketAddr, round: usize) -> u16 {
    let [high, low] = client.port().to_be_bytes();
    u16::from_be_bytes([high ^ low, u8::try_from(round).unwrap()])
}

fn each_client_is_seen(test: &str, start: Start, shown: &[Shown]) {
    // dnsmasq gives up groups of root, which root of a user namespace must not do.
    if !namespace::enter_without_rights(test, &setup()) {
        return;
    }
    let by_answer = shown.contains(&Shown::Answer);
    let folder = tempfile::tempdir().unwrap();
    let port = port();
    let server = start(folder.path(), port);
    for family in [0, 1] {
        let scene = Scene::new(at(family, port));
        scene.until_answered(&question(0, ZONE, false));
        let is_ipv6 = family == 1;
        let asked = |client, round| match by_answer {
            // No other name's answer is the address.
            true => ZONE.to_owned(),
            false => name(client, round),
        };
        let ask = |client, round| {
            // The answer is the address that the server saw, and has the client's family.
            let name = asked(client, round);
            question(id(client, round), &name, by_answer && is_ipv6)
        };
        scene.strangers(&question(1, STRANGER, false));
        scene.exchange(ask, |client, round, answer| {
            let reply = reply(answer);
            assert_eq!(
                (reply.id, reply.name),
                (id(client, round), asked(client, round))
            );
            let expected = match by_answer {
                true => client.ip().to_string(),
                false => "192.0.2.1".to_owned(),
            };
            assert_eq!(reply.data, [expected], "to {client}: {}", reply.status);
        });
        if shown.contains(&Shown::Access) {
            scene.exchange_refused(ask, |client, round, answer| {
                let reply = reply(answer);
                assert_eq!(reply.id, id(client, round));
                assert_eq!(reply.status, "Query Refused", "to {client}");
            });
        }
        for one in shown {
            if let Shown::Log(between) = one {
                logs_each_client(&server, &scene, between);
            }
        }
    }
    let log = server.log();
    assert!(!log.contains(STRANGER), "{log}");
}

/// Each question is logged in a line with the address of its client.
fn logs_each_client(server: &Process, scene: &Scene, between: &str) {
    let clients: Vec<_> = scene
        .clients
        .iter()
        .map(|c| c.local_addr().unwrap())
        .collect();
    let mut expected = BTreeSet::new();
    for client in clients {
        let address = format!("{}{between}{}", client.ip(), client.port());
        expected.extend((0..ROUNDS).map(|round| (name(client, round), address.clone())));
    }
    assert_eq!(expected.len(), CLIENTS * ROUNDS);
    eventually("a log of each client's questions", || {
        let log = server.log();
        let seen: BTreeSet<_> = log.lines().flat_map(names_and_addresses).collect();
        expected.is_subset(&seen)
    });
}

/// The names of clients' questions in a line, each with each word that may be an address.
fn names_and_addresses(line: &str) -> Vec<(String, String)> {
    let is_between = |c: char| c.is_whitespace() || "()".contains(c);
    let words: Vec<_> = line.split(is_between).collect();
    let end = format!(".{ZONE}");
    let names = words
        .iter()
        .filter(|word| word.ends_with(&end) && word.starts_with('c'));
    names
        .flat_map(|name| {
            words
                .iter()
                .map(|word| ((*name).to_owned(), (*word).to_owned()))
        })
        .collect()
}

fn write(folder: &Path, name: &str, content: &str) -> String {
    let file = folder.join(name);
    std::fs::write(&file, content).unwrap();
    file.to_str().unwrap().to_owned()
}

/// A zone of which each name has one address.
fn zone(folder: &Path) -> String {
    let zone = format!(
        "{ZONE}. 0 IN SOA ns. admin. 1 3600 3600 3600 0\n{ZONE}. 0 IN NS ns.\n\
         *.{ZONE}. 0 IN A 192.0.2.1\n"
    );
    write(folder, "zone", &zone)
}

fn nsd(folder: &Path, port: u16) -> Process {
    let zone = zone(folder);
    let [clients4, clients6] = CLIENT_NETWORKS;
    let path = folder.display();
    // All clients are one to its rate limit.
    let config = format!(
        r#"
server:
    ip-address: 127.0.0.1@{port}
    ip-address: ::1@{port}
    server-count: 1
    username: ""
    chroot: ""
    zonesdir: "{path}"
    database: ""
    pidfile: ""
    xfrdfile: "{path}/xfrd.state"
    zonelistfile: "{path}/zone.list"
    rrl-ratelimit: 0
remote-control:
    control-enable: no
zone:
    name: {ZONE}
    zonefile: "{zone}"
    allow-query: {clients4} NOKEY
    allow-query: {clients6} NOKEY
"#
    );
    let config = write(folder, "nsd.conf", &config);
    wrapped(&[], &program("nsd", "nsd"), &["-d", "-c", &config])
}

fn dnsmasq(folder: &Path, port: u16, more: &[&str]) -> Process {
    let config = write(folder, "dnsmasq.conf", "");
    let arguments = [
        "--keep-in-foreground",
        "--no-resolv",
        "--no-hosts",
        "--pid-file",
        "--log-queries=extra",
        "--log-facility=-",
        &format!("--conf-file={config}"),
        &format!("--port={port}"),
        &format!("--address=/{ZONE}/192.0.2.1"),
    ];
    let arguments = [&arguments[..], more].concat();
    wrapped(&[], &program("dnsmasq", "dnsmasq-base"), &arguments)
}

fn named(folder: &Path, port: u16) -> Process {
    let zone = zone(folder);
    let [clients4, clients6] = CLIENT_NETWORKS;
    let path = folder.display();
    let config = format!(
        r#"
options {{
    directory "{path}";
    pid-file none;
    session-keyfile none;
    managed-keys-directory "{path}";
    listen-on port {port} {{ 127.0.0.1; }};
    listen-on-v6 port {port} {{ ::1; }};
    allow-query {{ {clients4}; {clients6}; }};
    recursion no;
    dnssec-validation no;
    empty-zones-enable no;
    querylog yes;
}};
controls {{ }};
zone "{ZONE}" {{ type primary; file "{zone}"; }};
"#
    );
    let config = write(folder, "named.conf", &config);
    wrapped(
        &[],
        &program("named", "bind9"),
        &["-g", "-n", "2", "-c", &config],
    )
}

fn unbound(folder: &Path, port: u16) -> Process {
    let [clients4, clients6] = CLIENT_NETWORKS;
    let [refused4, refused6] = REFUSED_NETWORKS;
    let path = folder.display();
    let config = format!(
        r#"
server:
    directory: "{path}"
    chroot: ""
    username: ""
    pidfile: ""
    use-syslog: no
    logfile: ""
    log-replies: yes
    num-threads: 2
    module-config: "iterator"
    interface: 127.0.0.1@{port}
    interface: ::1@{port}
    access-control: 127.0.0.0/8 deny
    access-control: ::/0 deny
    access-control: {clients4} allow
    access-control: {clients6} allow
    access-control: {refused4} refuse
    access-control: {refused6} refuse
    local-zone: "{ZONE}" redirect
    local-data: "{ZONE} A 192.0.2.1"
remote-control:
    control-enable: no
"#
    );
    let config = write(folder, "unbound.conf", &config);
    wrapped(&[], &program("unbound", "unbound"), &["-d", "-c", &config])
}

fn knot(folder: &Path, port: u16) -> Process {
    let path = folder.display();
    let config = format!(
        r#"
server:
    rundir: "{path}"
    listen: [ 127.0.0.1@{port}, ::1@{port} ]
    udp-workers: 2
    tcp-workers: 1
    background-workers: 1
database:
    storage: "{path}"
log:
  - target: stderr
    any: info
zone:
  - domain: {ZONE}
    storage: "{path}"
    file: "zone"
    module: mod-whoami
"#
    );
    zone(folder);
    let config = write(folder, "knot.conf", &config);
    wrapped(&[], &program("knotd", "knot"), &["-c", &config])
}

fn powerdns(folder: &Path, port: u16) -> Process {
    let path = folder.display();
    let config = format!(
        "launch=bind\nbind-config={path}/named.conf\nlocal-address=127.0.0.1:{port},[::1]:{port}\n\
         enable-lua-records=yes\nsocket-dir={path}\ndaemon=no\nguardian=no\n\
         security-poll-suffix=\ncache-ttl=0\nquery-cache-ttl=0\n"
    );
    write(folder, "pdns.conf", &config);
    let zone = format!("zone \"{ZONE}\" {{ type master; file \"{path}/zone\"; }};\n");
    write(folder, "named.conf", &zone);
    write(folder, "zone", &powerdns_zone(ZONE));
    let program = program("pdns_server", "pdns-server");
    wrapped(&[], &program, &[&format!("--config-dir={path}")])
}

fn knot_resolver(folder: &Path, port: u16) -> Process {
    let config = write(folder, "kresd.conf", &kresd_config(port, ""));
    let folder = folder.to_str().unwrap();
    let program = program("kresd", "knot-resolver");
    wrapped(&[], &program, &["-n", "-c", &config, folder])
}

#[test]
fn powerdns_sees_each_client() {
    each_client_is_seen(test_name!(), powerdns, &[Shown::Answer]);
}

#[test]
fn knot_resolver_sees_each_client() {
    each_client_is_seen(test_name!(), knot_resolver, &[Shown::Answer]);
}

#[test]
fn nsd_sees_each_client() {
    each_client_is_seen(test_name!(), nsd, &[Shown::Access]);
}

#[test]
fn dnsmasq_sees_each_client() {
    let start: Start = |folder, port| {
        let more = ["--listen-address=127.0.0.1,::1", "--bind-interfaces"];
        dnsmasq(folder, port, &more)
    };
    each_client_is_seen(test_name!(), start, &[Shown::Log("/")]);
}

#[test]
fn dnsmasq_on_all_addresses_sees_each_client() {
    each_client_is_seen(
        test_name!(),
        |folder, port| dnsmasq(folder, port, &[]),
        &[Shown::Log("/")],
    );
}

#[test]
fn bind_sees_each_client() {
    each_client_is_seen(test_name!(), named, &[Shown::Access, Shown::Log("#")]);
}

#[test]
fn unbound_sees_each_client() {
    each_client_is_seen(test_name!(), unbound, &[Shown::Access]);
}

#[test]
fn knot_sees_each_client() {
    each_client_is_seen(test_name!(), knot, &[Shown::Answer]);
}
