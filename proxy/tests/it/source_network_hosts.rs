//! Hosts of source networks: `run` refuses to start without their local routes in the words
//! of `doctor`, `host-setup` prints what is missing, and a route that goes is reported.

use std::process::Command;

use ppv2_lab::namespace::{enter, enter_without_rights};
use ppv2_lab::two_hosts::{Host, SETUP, difference};
use ppv2_lab::*;

const FIX_V4: &str = "ip -4 route add local 10.99.0.0/16 dev lo";
const FIX_V6: &str = "ip -6 route add local fd00:99::/64 dev lo";

const GATEWAYS: [&str; 4] = ["--gateway", "10.0.0.1", "--gateway", "fd00:a::1"];

/// Servers on the server's host, each written to from a source network.
fn config(folder: &tempfile::TempDir, more: &str) -> String {
    let content = format!(
        "workers = 2\n[[listener]]\nbind = [\"198.51.100.10:9000\", \"[2001:db8:a::10]:9000\"]\n\
         upstream = \"u\"\n[upstream.u]\nsource = [\"10.99.0.0/16\", \"fd00:99::/64\"]\n{more}\n\
         servers = [\"10.0.0.2:9001\", \"[fd00:a::2]:9001\"]\n"
    );
    let file = write(folder, "proxy.toml", &content);
    file.to_str().unwrap().to_owned()
}

fn doctor(host: Host, config: &str, more: &[&str]) -> (Option<i32>, String) {
    let (status, stdout, stderr) = host.proxy(&[&["doctor", "--config", config], more].concat());
    assert!(stderr.is_empty() || status == Some(1), "{stderr}");
    (status, stdout)
}

/// A command that is ended if it doesn't end by itself, as a proxy that starts.
fn ended(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("timeout");
    command.arg("60").arg(program);
    command
}

/// The finding whose line has this part, and its fix.
#[track_caller]
fn finding(report: &str, part: &str) -> String {
    let lines: Vec<_> = report.lines().collect();
    let at = lines.iter().position(|line| line.contains(part));
    let at = at.unwrap_or_else(|| panic!("no `{part}` in\n{report}"));
    let fix = lines
        .get(at + 1)
        .filter(|line| line.starts_with("        fix: "));
    [lines[at], fix.unwrap_or(&"")].concat()
}

fn host_setup(host: Host, config: &str, more: &[&str]) -> String {
    let role = match host {
        Host::Proxy => "proxy",
        Host::Server => "server",
    };
    let arguments = ["host-setup", "--config", config, "--role", role];
    let (status, script, stderr) = host.proxy(&[&arguments, more].concat());
    assert_eq!(status, Some(0), "{stderr}");
    script
}

#[test]
fn run_refuses_a_network_without_its_route_in_the_words_of_doctor() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "");
    let (status, report) = doctor(Host::Proxy, &config, &[]);
    assert_eq!(status, Some(1), "{report}");
    let refuses = |fatal: &[(&str, &str)]| {
        let (status, _, stderr) = output_of(
            ended("setpriv")
                .args(["--bounding-set=-all", "--inh-caps=-all"])
                .arg(binary())
                .args(["run", "--config", &config]),
        );
        assert_eq!(status, Some(1), "{stderr}");
        let (_, report) = doctor(Host::Proxy, &config, &[]);
        for (network, fix) in fatal {
            let of_it = finding(&report, &format!("source network {network} of upstream u"));
            let (found, _) = of_it.split_once("        fix: ").unwrap();
            let words = found.strip_prefix("FATAL").unwrap().trim();
            assert!(
                stderr.contains(&format!("{words}; fix: {fix}")),
                "{words}\n{stderr}"
            );
        }
        assert_eq!(stderr.matches("fix: ").count(), fatal.len(), "{stderr}");
    };
    let (v4, v6) = (("10.99.0.0/16", FIX_V4), ("fd00:99::/64", FIX_V6));
    refuses(&[v4, v6]);
    Host::Proxy.shell(FIX_V6);
    refuses(&[v4]);
    // A larger part of the network leads elsewhere.
    Host::Proxy.shell(&format!(
        "{FIX_V4}; ip route add throw 10.99.128.0/17 table local"
    ));
    refuses(&[v4]);
    Host::Proxy.shell("ip route del throw 10.99.128.0/17 table local");
    // The kernel looks for IPv4 sources in the table local alone.
    let elsewhere =
        "ip route add local 10.99.0.0/16 dev lo table 77; ip rule add to 10.99.0.0/16 lookup 77";
    Host::Proxy.shell(&format!(
        "ip route del local 10.99.0.0/16 dev lo; {elsewhere}"
    ));
    refuses(&[v4]);
    let (_, report) = doctor(Host::Proxy, &config, &[]);
    assert!(finding(&report, "10.99.0.0/16 of").contains("must be in table local"));
    Host::Proxy.shell(FIX_V4);
    let mut running = proxy(&["--config", &config]);
    running.signal("TERM");
    assert!(running.wait().0.success());
}

#[test]
fn loopback_networks_need_no_setup_and_no_privilege() {
    if !enter_without_rights(test_name!(), "") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let content = "[[listener]]\nbind = [\"127.0.0.1:9000\"]\nupstream = \"u\"\n[upstream.u]\n\
                   source = [\"127.64.0.0/10\"]\nsource_port = 7000\nservers = [\"127.0.0.1:9001\"]\n";
    let file = write(&folder, "proxy.toml", content);
    let config = file.to_str().unwrap();
    let (status, report) = doctor(Host::Proxy, config, &[]);
    assert_eq!(status, Some(0), "{report}");
    let found = finding(&report, "source network 127.64.0.0/10 of upstream u");
    assert!(found.starts_with("ok "), "{found}");
    let script = host_setup(Host::Proxy, config, &[]);
    assert!(script.contains("127.0.0.0/8 need nothing"), "{script}");
    assert!(!script.contains("\nadd_local_route "), "{script}");
    let mut running = proxy(&["--config", config]);
    running.signal("TERM");
    assert!(running.wait().0.success());
    // The port of the first worker.
    let _taken = std::net::UdpSocket::bind(("0.0.0.0", 7000)).unwrap();
    let (status, _, stderr) = output(&["run", "--config", config]);
    assert_eq!(status, Some(1), "{stderr}");
    for part in [
        "source_port, address 0.0.0.0:7000 can't be bound: it is in use",
        "choose another `source_port`",
    ] {
        assert!(stderr.contains(part), "no `{part}` in\n{stderr}");
    }
}

#[test]
fn host_setup_makes_networks_local_and_undo_leaves_nothing() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "");
    let server = [&["--role", "server"], &GATEWAYS[..]].concat();
    for (host, doctors, options) in [
        (Host::Proxy, &[][..], &[][..]),
        (Host::Server, &server[..], &GATEWAYS[..]),
    ] {
        let (status, report) = doctor(host, &config, doctors);
        assert_eq!(status, Some(1), "{report}");
        let before = host.state();
        let set_up = host_setup(host, &config, options);
        host.shell(&set_up);
        let once = host.state();
        let (status, report) = doctor(host, &config, doctors);
        assert_eq!(status, Some(0), "{report}\n{set_up}");
        host.shell(&set_up);
        let changes = difference(&once, &host.state());
        assert!(changes.is_empty(), "{host:?}: {changes:#?}\n{set_up}");
        let undo = host_setup(host, &config, &["--undo"]);
        for _ in 0..2 {
            host.shell(&undo);
            let left = difference(&before, &host.state());
            assert!(left.is_empty(), "{host:?}: {left:#?}\n{undo}");
        }
        host.shell(&set_up);
    }
    let script = host_setup(Host::Proxy, &config, &[]);
    for part in [
        "ip route add 10.99.0.0/16 via 10.0.0.1",
        "ip route add fd00:99::/64 via fd00:a::1",
        "in ip6 daddr fd00:99::/64 meta l4proto udp notrack",
    ] {
        assert!(script.contains(part), "no `{part}` in\n{script}");
    }
    // Servers answer to the address that health checks have.
    let _echo = echo();
    let (status, report) = doctor(Host::Proxy, &config, &["--probe"]);
    assert_eq!(status, Some(0), "{report}");
    let answered = "comes from the address that was asked";
    assert_eq!(report.matches(answered).count(), 2, "{report}");
}

const ECHO: &str = "
import socket, threading
def serve(family, ip):
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.bind((ip, 9001))
    print('bound', file=__import__('sys').stderr, flush=True)
    while True:
        data, sender = s.recvfrom(65535)
        print('from', sender[0], file=__import__('sys').stderr, flush=True)
        s.sendto(data, sender)
threading.Thread(target=serve, args=(socket.AF_INET6, 'fd00:a::2')).start()
serve(socket.AF_INET, '10.0.0.2')
";

/// A server that sends everything back, on the server's host.
fn echo() -> Process {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", "server", "python3", "-c", ECHO]);
    let echo = Process::start(&mut command);
    eventually("both sockets", || echo.log().matches("bound").count() == 2);
    echo
}

#[test]
fn health_checks_come_from_the_network() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let health = "health = { every = \"100ms\", timeout = \"50ms\", probe = { kind = \"udp\", send = \"ping\" } }";
    let config = config(&folder, health);
    Host::Proxy.shell(&host_setup(Host::Proxy, &config, &[]));
    Host::Server.shell(&host_setup(Host::Server, &config, &GATEWAYS));
    let echo = echo();
    let mut running = proxy(&["--config", &config]);
    for source in ["from 10.99.0.1\n", "from fd00:99::1\n"] {
        eventually(source, || echo.log().contains(source));
    }
    assert!(
        !running.log().contains("server is down"),
        "{}",
        running.log()
    );
    running.signal("TERM");
    assert!(running.wait().0.success());
    assert!(!echo.log().contains("from 10.0.0.1\n"), "{}", echo.log());
}

#[test]
fn doctor_warns_of_networks_that_are_on_a_link() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "");
    Host::Proxy.shell(&host_setup(Host::Proxy, &config, &[]));
    Host::Proxy.shell("ip addr add 10.99.7.1/24 dev priv");
    let (status, report) = doctor(Host::Proxy, &config, &[]);
    assert_eq!(status, Some(0), "{report}");
    let found = finding(&report, "neighbours of source network 10.99.0.0/16");
    assert!(
        found.contains("overlaps with 10.99.7.0/24, which is on the link of priv"),
        "{found}"
    );
    // On the server's side.
    Host::Server
        .shell("ip route add 10.99.0.0/16 dev priv; ip -6 route add fd00:99::/64 via fd00:a::9");
    let server = [&["--role", "server"], &GATEWAYS[..]].concat();
    let (status, report) = doctor(Host::Server, &config, &server);
    assert_eq!(status, Some(1), "{report}");
    let on_link = finding(&report, "replies to source network 10.99.0.0/16");
    assert!(
        on_link.starts_with("advice") && on_link.contains("a neighbour entry for each session"),
        "{on_link}"
    );
    assert!(
        on_link.ends_with("ip route replace 10.99.0.0/16 via 10.0.0.1"),
        "{on_link}"
    );
    let wrong = finding(&report, "replies to source network fd00:99::/64");
    assert!(
        wrong.starts_with("FATAL") && wrong.contains("leave via fd00:a::9"),
        "{wrong}"
    );
}

#[test]
fn doctor_warns_of_ipv6_networks_with_servers_on_the_same_host() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let content = "[[listener]]\nbind = [\"127.0.0.1:9000\"]\nupstream = \"u\"\n[upstream.u]\n\
                   source = [\"fd00:99::/64\"]\nservers = [\"[::1]:9001\"]\n";
    let file = write(&folder, "proxy.toml", content);
    let config = file.to_str().unwrap();
    Host::Proxy.shell(FIX_V6);
    let (status, report) = doctor(Host::Proxy, config, &[]);
    assert_eq!(status, Some(0), "{report}");
    let found = finding(
        &report,
        "neighbour entries of source network fd00:99::/64, with servers on this host",
    );
    assert!(
        found.starts_with("advice") && found.contains("source = [\"127.64.0.0/10\"]"),
        "{found}"
    );
}

#[test]
fn a_route_that_goes_and_comes_back_is_logged() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "");
    Host::Proxy.shell(&host_setup(Host::Proxy, &config, &[]));
    let mut running = proxy(&["--config", &config]);
    Host::Proxy.shell(&FIX_V6.replace("route add", "route del"));
    let gone = format!(
        "the addresses of source network fd00:99::/64 are no longer this host's: its sessions get no replies until they are; fix: {FIX_V6}"
    );
    eventually("the warning", || running.log().contains(&gone));
    Host::Proxy.shell(FIX_V6);
    let back = "the addresses of source network fd00:99::/64 are this host's again";
    eventually("its end", || running.log().contains(back));
    assert!(!running.log().contains("10.99.0.0/16"), "{}", running.log());
    running.signal("TERM");
    assert!(running.wait().0.success());
}

/// A client that has asked `proxy` and been answered: its address, and the answer.
fn ask(proxy: &str) -> (std::net::SocketAddr, String) {
    let client = socket("127.0.0.1");
    client.send_to(b"who", proxy).unwrap();
    let (answer, from) = receive(&client);
    assert_eq!(from.to_string(), proxy);
    let answer = String::from_utf8(answer).unwrap();
    (client.local_addr().unwrap(), answer.trim().to_owned())
}

#[test]
fn sessions_send_from_addresses_of_the_network_and_a_reload_keeps_these_apart() {
    if !enter_without_rights(test_name!(), "") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let config = |network: &str| {
        let content = format!(
            "workers = 1\n[[listener]]\nbind = [\"127.0.0.1:9000\"]\nupstream = \"u\"\n[upstream.u]\n\
             source = [\"{network}\"]\nsource_port = 7000\nservers = [\"127.0.0.1:9001\"]\n"
        );
        write(&folder, "proxy.toml", &content)
    };
    let file = config("127.64.0.0/10");
    let mut running = proxy(&["--config", file.to_str().unwrap()]);
    let server = std::net::UdpSocket::bind("127.0.0.1:9001").unwrap();
    let clients: Vec<_> = (0..20).map(|_| socket("127.0.0.1")).collect();
    let mut sources = std::collections::BTreeSet::new();
    for client in &clients {
        client.send_to(b"ping", "127.0.0.1:9000").unwrap();
        let (datagram, source) = receive(&server);
        let (header, payload) = ppv2::decode(&datagram).unwrap();
        assert_eq!(
            (header.client(), payload),
            (client.local_addr().ok(), &b"ping"[..])
        );
        let network: ipnet::IpNet = "127.64.0.0/10".parse().unwrap();
        assert!(network.contains(&source.ip()), "{source}");
        assert_eq!(source.port(), 7000);
        assert!(sources.insert(source), "{source} has two clients");
        server.send_to(b"pong", source).unwrap();
        assert_eq!(receive(client).0, b"pong");
    }
    config("127.96.0.0/11");
    running.signal("HUP");
    let refused = "source network 127.96.0.0/11 overlaps with 127.64.0.0/10, of which sessions have addresses now";
    eventually(refused, || running.log().contains(refused));
    config("127.32.0.0/11");
    running.signal("HUP");
    eventually("the reload", || running.log().contains("reloaded: "));
    let new = socket("127.0.0.1");
    new.send_to(b"ping", "127.0.0.1:9000").unwrap();
    let other: ipnet::IpNet = "127.32.0.0/11".parse().unwrap();
    assert!(other.contains(&receive(&server).1.ip()));
    running.signal("TERM");
    running.wait();
}

#[test]
fn tagged_replies_need_no_session_and_a_reload_reads_the_key_again() {
    if !enter_without_rights(test_name!(), "") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let key = |content: &str, mode: u32| {
        use std::os::unix::fs::PermissionsExt;
        let file = write(&folder, "tags.key", content);
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        file.to_str().unwrap().to_owned()
    };
    let name = key(&"01".repeat(16), 0o640);
    let content = format!(
        "[[listener]]\nbind = [\"127.0.0.1:9000\"]\nupstream = \"u\"\nsessions = false\n[upstream.u]\n\
         replies = \"tagged\"\ntag_key_file = \"{name}\"\nservers = [\"127.0.0.1:9001\"]\n"
    );
    let file = write(&folder, "proxy.toml", &content);
    let config = file.to_str().unwrap();
    for command in ["run", "check"] {
        let (status, _, stderr) = output_of(ended(binary()).args([command, "--config", config]));
        assert_eq!(status, Some(2), "{stderr}");
        let fix = format!("chmod 600 {name}");
        assert!(stderr.contains(&name) && stderr.contains(&fix), "{stderr}");
    }
    key(&"01".repeat(16), 0o600);
    let (status, told, _) = output(&["check", "--config", config]);
    assert_eq!(status, Some(0));
    assert!(
        told.contains("  no sessions: replies find their client by tags\n"),
        "{told}"
    );
    let mut server = Command::new(binary());
    server.args([
        "whoami",
        "--listen",
        "127.0.0.1:9001",
        "--trusted",
        "127.0.0.1",
    ]);
    let mut server = Process::start(&mut server);
    server.wait_for("ready");
    let mut running = proxy(&["--config", config]);
    let is_told = || {
        let (client, answer) = ask("127.0.0.1:9000");
        assert!(answer.contains(&client.to_string()), "{answer}");
    };
    is_told();
    key(&"02".repeat(16), 0o644);
    running.signal("HUP");
    eventually("the refusal", || {
        running.log().contains(&format!("chmod 600 {name}"))
    });
    is_told();
    key(&"02".repeat(16), 0o600);
    running.signal("HUP");
    eventually("the reload", || running.log().contains("reloaded: "));
    is_told();
    running.signal("TERM");
    assert!(running.wait().0.success());
}
