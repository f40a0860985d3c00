//! DNS servers that are not ours, each with the one setting that its manual names for
//! proxies: each answers a client with the address that it saw, which must be the
//! client's own, whatever families the client and the server speak. Unbound and dnsdist
//! have files of their own.

use std::net::SocketAddr;
use std::path::Path;

use ppv2_lab::dig::{NAME, answered, ask, clients, for_each, program, server, setup_clients};
use ppv2_lab::*;

const CLIENTS4: (&str, usize) = ("127.10.0.", 10);
const CLIENTS6: (&str, usize) = ("fd00:10::", 10);

/// Starts a server on a port of both loopback addresses, with a folder of its own; it
/// answers questions about [`NAME`] with the address of the client that asks.
type Start = fn(&Path, u16) -> Process;

fn each_client_is_seen(test: &str, start: Start) {
    if !namespace::enter(test, &setup_clients(&[CLIENTS6])) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let port = port();
    let _server = start(folder.path(), port);
    let upstreams = ["127.0.0.1", "::1"].map(|ip| SocketAddr::new(ip.parse().unwrap(), port));
    let mut proxies = Vec::new();
    let mut questions = Vec::new();
    for (ip, (prefix, count), kind) in [("127.0.0.1", CLIENTS4, "A"), ("::1", CLIENTS6, "AAAA")] {
        for upstream in upstreams {
            let listener = address(ip);
            proxies.push(proxy_between(listener, upstream, &[]));
            let clients = clients(prefix, count, ppv2_lab::port());
            let is_ready = || {
                let answer = ask(clients[0], listener, &[kind], 1);
                answer.is_some_and(|answer| answer[0].status == "NOERROR")
            };
            eventually("the server to answer", is_ready);
            questions.extend(clients.into_iter().map(|client| (client, listener, kind)));
        }
    }
    assert_eq!(questions.len(), 2 * 10 + 2 * 10);
    for_each(&questions, |&(client, listener, kind)| {
        let answer = &answered(client, listener, &[kind])[0];
        assert_eq!(answer.only(), client.ip().to_string());
    });
}

fn write(folder: &Path, name: &str, content: &str) {
    std::fs::write(folder.join(name), content).unwrap();
}

fn knot(folder: &Path, port: u16) -> Process {
    let path = folder.display();
    let config = format!(
        r#"
server:
    rundir: "{path}"
    listen: [ 127.0.0.1@{port}, ::1@{port} ]
    proxy-allowlist: [ 127.0.0.1, ::1 ]
    udp-workers: 1
    tcp-workers: 1
    background-workers: 1
database:
    storage: "{path}"
log:
  - target: stderr
    any: info
zone:
  - domain: {NAME}
    storage: "{path}"
    file: "zone"
    module: mod-whoami
"#
    );
    write(folder, "knot.conf", &config);
    let zone = format!("{NAME}. 0 SOA ns. admin. 1 3600 3600 3600 0\n{NAME}. 0 NS ns.\n");
    write(folder, "zone", &zone);
    let config = folder.join("knot.conf");
    server(&program("knotd", "knot"), &["-c", config.to_str().unwrap()])
}

/// A configuration of Knot Resolver that answers each question with its client's address.
pub(crate) fn kresd_config(port: u16, more: &str) -> String {
    format!(
        r"
net.listen({{'127.0.0.1', '::1'}}, {port}, {{ kind = 'dns' }})
{more}
cache.size = 10 * MB
modules.unload('ta_update')
policy.add(function (request)
    local client = request.qsource.addr
    -- Its own questions have none.
    if client == nil then return nil end
    local kind = client:family() == 2 and kres.type.A or kres.type.AAAA
    local address = require('ffi').string(client:ip(), client:len())
    return policy.ANSWER({{ [kind] = {{ rdata = address, ttl = 0 }} }}, true)
end)
"
    )
}

/// A zone of PowerDNS whose name has the client's address.
pub(crate) fn powerdns_zone(name: &str) -> String {
    format!(
        "{name}. 0 IN SOA ns. admin. 1 3600 3600 3600 0\n{name}. 0 IN NS ns.\n\
         {name}. 0 IN LUA A \"who:toString()\"\n{name}. 0 IN LUA AAAA \"who:toString()\"\n"
    )
}

fn knot_resolver(folder: &Path, port: u16) -> Process {
    let config = kresd_config(port, "net.proxy_allowed({'127.0.0.1', '::1'})");
    write(folder, "kresd.conf", &config);
    let config = folder.join("kresd.conf");
    server(
        &program("kresd", "knot-resolver"),
        &[
            "-n",
            "-c",
            config.to_str().unwrap(),
            folder.to_str().unwrap(),
        ],
    )
}

fn powerdns_authoritative(folder: &Path, port: u16) -> Process {
    let path = folder.display();
    let config = format!(
        "launch=bind\nbind-config={path}/named.conf\nlocal-address=127.0.0.1:{port},[::1]:{port}\n\
         proxy-protocol-from=127.0.0.1,::1\nenable-lua-records=yes\nsocket-dir={path}\n\
         daemon=no\nguardian=no\nsecurity-poll-suffix=\n"
    );
    write(folder, "pdns.conf", &config);
    let zone = format!("zone \"{NAME}\" {{ type master; file \"{path}/zone\"; }};\n");
    write(folder, "named.conf", &zone);
    write(folder, "zone", &powerdns_zone(NAME));
    // The server reads zones by a library of another package.
    let backend = Path::new("/usr/share/doc/pdns-backend-bind").is_dir();
    assert!(backend, "install the Debian package pdns-backend-bind");
    let folder = format!("--config-dir={path}");
    server(&program("pdns_server", "pdns-server"), &[&folder])
}

fn powerdns_recursor(folder: &Path, port: u16) -> Process {
    let path = folder.display();
    let config = format!(
        "local-address=127.0.0.1:{port},[::1]:{port}\nproxy-protocol-from=127.0.0.1,::1\n\
         allow-from=0.0.0.0/0,::/0\nlua-dns-script={path}/answer.lua\nsocket-dir={path}\n\
         daemon=no\nthreads=1\nsecurity-poll-suffix=\nhint-file=no\n"
    );
    write(folder, "recursor.conf", &config);
    let script = "
function preresolve(dq)
    -- Not to be kept for the next client.
    dq.variable = true
    dq:addAnswer(dq.qtype, dq.remoteaddr:toString())
    return true
end
";
    write(folder, "answer.lua", script);
    let folder = format!("--config-dir={path}");
    server(&program("pdns_recursor", "pdns-recursor"), &[&folder])
}

#[test]
fn knot_dns_sees_each_client() {
    each_client_is_seen(test_name!(), knot);
}

#[test]
fn knot_resolver_sees_each_client() {
    each_client_is_seen(test_name!(), knot_resolver);
}

#[test]
fn powerdns_authoritative_sees_each_client() {
    each_client_is_seen(test_name!(), powerdns_authoritative);
}

#[test]
fn powerdns_recursor_sees_each_client() {
    each_client_is_seen(test_name!(), powerdns_recursor);
}
