//! The scripts of `host-setup`, run on hosts of the test's own: they work, twice as well
//! as once, and `--undo` leaves nothing behind.

use ppv2_lab::namespace::enter;
use ppv2_lab::two_hosts::{Host, SETUP, difference};
use ppv2_lab::*;

/// A configuration with both families; `mode` is the listener's.
fn config(folder: &tempfile::TempDir, mode: &str) -> String {
    let content = format!(
        "[[listener]]\nbind = [\"198.51.100.10:9000\", \"[2001:db8:a::10]:9000\"]\n{mode}\n\
         upstream = \"u\"\n[upstream.u]\nservers = [\"10.0.0.2:9001\", \"[fd00:a::2]:9001\"]\n"
    );
    let file = write(folder, "proxy.toml", &content);
    file.to_str().unwrap().to_owned()
}

#[track_caller]
fn script(host: Host, config: &str, more: &[&str]) -> String {
    let role = match host {
        Host::Proxy => "proxy",
        Host::Server => "server",
    };
    let arguments = [&["host-setup", "--config", config, "--role", role], more].concat();
    let (status, script, stderr) = host.proxy(&arguments);
    assert_eq!(status, Some(0), "{stderr}");
    script
}

const MODES: [&str; 4] = [
    "mode = \"transparent\"",
    "mode = \"dsr\"",
    "mode = \"dsr\"\nrewrite_on = \"server\"",
    "mode = \"dsr\"\nrewrite_on = \"sdk\"",
];

const OPTIONS: [(Host, &[&str]); 2] = [
    (Host::Proxy, &["--is-gateway"]),
    (
        Host::Server,
        &[
            "--gateway",
            "10.0.0.1",
            "--gateway",
            "fd00:a::1",
            "--public-interface",
            "pub",
        ],
    ),
];

#[test]
fn running_twice_is_running_once_and_undo_leaves_nothing() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for mode in MODES {
        let config = config(&folder, mode);
        for (host, options) in OPTIONS {
            let before = host.state();
            let set_up = script(host, &config, options);
            host.shell(&set_up);
            let once = host.state();
            let needs_nothing = host == Host::Proxy && mode.contains("\"server\"");
            assert_eq!(
                difference(&before, &once).is_empty(),
                needs_nothing,
                "{host:?} {mode}\n{set_up}"
            );
            host.shell(&set_up);
            let changes = difference(&once, &host.state());
            assert!(
                changes.is_empty(),
                "{host:?} {mode}: {changes:#?}\n{set_up}"
            );
            let undo = script(host, &config, &["--undo"]);
            for _ in 0..2 {
                host.shell(&undo);
                let left = difference(&before, &host.state());
                assert!(left.is_empty(), "{host:?} {mode}: {left:#?}\n{undo}");
            }
        }
    }
}

/// Three listeners of each family at `ip`, a server of each, and the modes of these
/// that a role has something to do for.
fn all_modes(host: Host, last: u8) -> String {
    let dsr = match host {
        Host::Proxy => MODES[1],
        Host::Server => MODES[2],
    };
    let listeners = [MODES[0], dsr, MODES[3]].into_iter().enumerate();
    let listeners = listeners.map(|(number, mode)| {
        let (port, server) = (9000 + number, 2 + number);
        format!(
            "[[listener]]\nbind = [\"198.51.100.{last}:{port}\", \"[2001:db8:a::{last}]:{port}\"]\n\
             name = \"l{number}\"\n{mode}\nupstream = \"u{number}\"\n[upstream.u{number}]\n\
             servers = [\"10.0.0.{server}:{port}\", \"[fd00:a::{server}]:{port}\"]\n"
        )
    });
    listeners.collect()
}

/// What is printed for [`all_modes`].
fn script_of_all(host: Host, last: u8, table: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let file = write(&folder, "proxy.toml", &all_modes(host, last));
    let servers = ["10.0.0.2", "10.0.0.3", "10.0.0.4"];
    let servers = [&servers[..], &["fd00:a::2", "fd00:a::3", "fd00:a::4"]].concat();
    let servers: Vec<_> = servers.iter().flat_map(|ip| ["--server", ip]).collect();
    let named = [
        "--public-interface",
        "pub",
        "--server-interface",
        "priv",
        "--table",
        table,
    ];
    let (_, options) = OPTIONS[usize::from(host == Host::Server)];
    let options = match host {
        Host::Proxy => [options, &named].concat(),
        Host::Server => [options, &named[2..], &servers].concat(),
    };
    script(host, file.to_str().unwrap(), &options)
}

fn undo_of(host: Host) -> String {
    let role = match host {
        Host::Proxy => "proxy",
        Host::Server => "server",
    };
    // It needs no configuration.
    let (status, undo, stderr) = host.proxy(&["host-setup", "--undo", "--role", role]);
    assert_eq!(status, Some(0), "{stderr}");
    undo
}

/// Gives parameters that a setup changes another value than the default.
const UNUSUAL: &str = "
for key in ipv6/conf/priv/forwarding ipv6/conf/lo/forwarding ipv4/conf/pub/forwarding; do
    echo 1 >/proc/sys/net/$key
done";

/// What is interrupted.
#[derive(Clone, Copy, Debug)]
enum Interrupted {
    SetUp,
    /// A setup for other listeners than those that are set up.
    Change,
    Undo,
}

/// Kills the script before each of its commands in turn; undo then restores the host.
#[track_caller]
fn undo_after_any_interruption(test: &str, host: Host, interrupted: Interrupted) {
    if !enter(test, SETUP) {
        return;
    }
    host.shell(UNUSUAL);
    let before = host.state();
    let (first, second) = (script_of_all(host, 10, "88"), script_of_all(host, 11, "99"));
    let undo = undo_of(host);
    let (earlier, script) = match interrupted {
        Interrupted::SetUp => ("", &first),
        Interrupted::Change => (first.as_str(), &second),
        Interrupted::Undo => (first.as_str(), &undo),
    };
    let folder = tempfile::tempdir().unwrap();
    let file = write(&folder, "script", script);
    for number in 1.. {
        host.shell(earlier);
        let is_interrupted = host.killed_at(number, &file);
        host.shell(&undo);
        let left = difference(&before, &host.state());
        assert!(left.is_empty(), "killed at {number}: {left:#?}");
        if !is_interrupted {
            assert!(number > 10, "{number} commands");
            break;
        }
    }
}

#[test]
fn undo_after_an_interrupted_setup_on_the_proxys_host() {
    undo_after_any_interruption(test_name!(), Host::Proxy, Interrupted::SetUp);
}

#[test]
fn undo_after_an_interrupted_setup_on_a_servers_host() {
    undo_after_any_interruption(test_name!(), Host::Server, Interrupted::SetUp);
}

#[test]
fn undo_after_an_interrupted_change_on_the_proxys_host() {
    undo_after_any_interruption(test_name!(), Host::Proxy, Interrupted::Change);
}

#[test]
fn undo_after_an_interrupted_change_on_a_servers_host() {
    undo_after_any_interruption(test_name!(), Host::Server, Interrupted::Change);
}

#[test]
fn undo_after_an_interrupted_undo_on_the_proxys_host() {
    undo_after_any_interruption(test_name!(), Host::Proxy, Interrupted::Undo);
}

#[test]
fn undo_after_an_interrupted_undo_on_a_servers_host() {
    undo_after_any_interruption(test_name!(), Host::Server, Interrupted::Undo);
}

#[test]
fn another_setup_leaves_nothing_of_the_first() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    for host in [Host::Proxy, Host::Server] {
        host.shell(UNUSUAL);
        let (first, second) = (script_of_all(host, 10, "88"), script_of_all(host, 11, "99"));
        let undo = undo_of(host);
        host.shell(&second);
        let alone = host.state();
        host.shell(&undo);
        host.shell(&first);
        host.shell(&second);
        let left = difference(&alone, &host.state());
        assert!(left.is_empty(), "{left:#?}");
        host.shell(&undo);
    }
}

#[test]
fn undo_works_after_an_interface_is_gone() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for (mode, host) in [
        (MODES[1], Host::Proxy),
        (MODES[3], Host::Proxy),
        (MODES[2], Host::Server),
    ] {
        let before = host.state();
        let add =
            "ip link add late type veth peer name later; ip link set late addrgenmode none up";
        host.shell(add);
        let config = config(&folder, mode);
        let options = [
            "--server-interface",
            "late",
            "--public-interface",
            "pub",
            "--is-gateway",
        ];
        let set_up = script(host, &config, &options);
        let undo = undo_of(host);
        // Gone before and after it is set up.
        host.shell("ip link del late");
        let said = host.shell(&format!(
            "sh -c '{}' 2>&1 && exit 1 || :",
            set_up.replace('\'', r"'\''")
        ));
        assert!(said.contains("conf/late/"), "{said}");
        host.shell(&undo);
        let left = difference(&before, &host.state());
        assert!(left.is_empty(), "{mode}: {left:#?}");
        host.shell(add);
        host.shell(&set_up);
        host.shell("ip link del late");
        host.shell(&undo);
        let left = difference(&before, &host.state());
        assert!(left.is_empty(), "{mode}: {left:#?}");
    }
}

#[test]
fn undo_keeps_rules_and_routes_of_others() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, MODES[0]);
    let host = Host::Proxy;
    for (theirs, remove) in [
        (
            "ip -6 rule add pref 9022 from 2001:db8::7 lookup 77",
            "ip -6 rule del pref 9022",
        ),
        (
            "ip route add 192.0.2.99 dev priv table 9022",
            "ip route flush table 9022",
        ),
    ] {
        host.shell(theirs);
        let before = host.state();
        let set_up = script(host, &config, &[]);
        let said = host.shell(&format!(
            "sh -c '{}' 2>&1 && exit 1 || :",
            set_up.replace('\'', r"'\''")
        ));
        assert!(
            said.contains("9022, or the preference 9022 of rules, is in use"),
            "{said}"
        );
        assert!(said.contains("--table"), "{said}");
        host.shell(&undo_of(host));
        let left = difference(&before, &host.state());
        assert!(left.is_empty(), "{left:#?}");
        host.shell(&script(host, &config, &["--table", "7"]));
        host.shell(&undo_of(host));
        let left = difference(&before, &host.state());
        assert!(left.is_empty(), "{left:#?}");
        host.shell(remove);
    }
}

/// Where a packet from the server goes, as the proxy's host sees it.
fn route(host: Host, question: &str) -> String {
    host.shell(&format!("ip route get {question} 2>&1 || :"))
}

#[test]
fn replies_take_the_path_of_the_mode() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let replies = [
        "203.0.113.11 from 10.0.0.2 iif priv",
        "2001:db8:c::11 from fd00:a::2 iif priv",
    ];
    for (mode, leads) in [(MODES[0], "local "), (MODES[1], "dev pub")] {
        let config = config(&folder, mode);
        for (host, options) in OPTIONS {
            host.shell(&script(host, &config, options));
        }
        for reply in replies {
            let found = route(Host::Proxy, reply);
            assert!(found.contains(leads), "{mode}: {found}");
        }
        for (to, gateway) in [
            ("203.0.113.11", "10.0.0.1"),
            ("2001:db8:c::11", "fd00:a::1"),
        ] {
            let found = route(Host::Server, &format!("{to} ipproto udp sport 9001"));
            assert!(
                found.contains(&format!("via {gateway} dev priv")),
                "{found}"
            );
            assert_eq!(found.contains("1280"), mode == MODES[1], "{found}");
        }
        let incoming = route(Host::Server, "10.0.0.2 from 203.0.113.11 iif priv");
        assert!(incoming.starts_with("local "), "{incoming}");
        for (host, _) in OPTIONS {
            host.shell(&script(host, &config, &["--undo"]));
        }
    }
}

#[test]
fn server_on_the_proxys_loopback_answers_the_proxy() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let content = "[[listener]]\nbind = [\"198.51.100.10:9000\"]\nmode = \"transparent\"\n\
                   upstream = \"u\"\n[upstream.u]\nservers = [\"127.0.0.1:9001\"]\n";
    let file = write(&folder, "proxy.toml", content);
    let host = Host::Proxy;
    host.shell(&script(host, file.to_str().unwrap(), &[]));
    let server = bind("127.0.0.1:9001".parse().unwrap());
    let spoofed = socket2::Socket::new(
        socket2::Domain::IPV4,
        socket2::Type::DGRAM,
        Some(socket2::Protocol::UDP),
    );
    let spoofed = spoofed.unwrap();
    spoofed.set_ip_transparent_v4(true).unwrap();
    let client: std::net::SocketAddr = "203.0.113.11:4000".parse().unwrap();
    spoofed.bind(&client.into()).unwrap();
    spoofed.set_read_timeout(Some(TIMEOUT)).unwrap();
    let spoofed = std::net::UdpSocket::from(spoofed);
    spoofed
        .send_to(b"question", server.local_addr().unwrap())
        .unwrap();
    assert_eq!(receive(&server), (b"question".to_vec(), client));
    server.send_to(b"answer", client).unwrap();
    let answer = (b"answer".to_vec(), server.local_addr().unwrap());
    assert_eq!(receive(&spoofed), answer);
}

#[test]
fn unknown_facts_name_the_option_that_tells_them() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, MODES[1]);
    let fails = |host: Host, role: &str, part: &str| {
        let arguments = ["host-setup", "--config", &config, "--role", role];
        let (status, stdout, stderr) = host.proxy(&arguments);
        assert_eq!((status, &*stdout), (Some(2), ""), "{stderr}");
        assert!(stderr.contains(part), "no `{part}` in {stderr}");
    };
    fails(Host::Server, "server", "--gateway");
    fails(Host::Proxy, "server", "--server");
    fails(Host::Server, "proxy", "never forwards its own replies");
    for option in ["--public-interface", "--server-interface"] {
        let arguments = ["--config", &config, "--role", "proxy", option, "nosuch"];
        let (status, stdout, stderr) =
            Host::Proxy.proxy(&[&["host-setup"], &arguments[..]].concat());
        assert_eq!((status, &*stdout), (Some(2), ""), "{stderr}");
        assert!(stderr.contains(&format!("{option} nosuch")), "{stderr}");
    }
    Host::Proxy.shell("ip link set priv down");
    Host::Proxy.shell("ip route del default; ip -6 route del default");
    fails(Host::Proxy, "proxy", "--server-interface");
}

/// A server that answers with as many bytes as the question says, and without a checksum
/// if it says so.
const SERVER: &str = "
import socket, sys, threading
def serve(family, ip):
    s = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    s.bind((ip, 9001))
    print('bound', file=sys.stderr, flush=True)
    while True:
        question, client = s.recvfrom(65535)
        size, unchecked = question.split()
        if family == socket.AF_INET:
            s.setsockopt(socket.SOL_SOCKET, 11, int(unchecked))  # SO_NO_CHECK
        s.sendto(b'x' * int(size), client)
threading.Thread(target=serve, args=(socket.AF_INET6, '::' if 'any' in sys.argv else 'fd00:a::2')).start()
serve(socket.AF_INET, '0.0.0.0' if 'any' in sys.argv else '10.0.0.2')
";

/// A client that logs what it receives.
const CLIENT: &str = "
import socket, sys, threading
def listen(family, ip):
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.bind((ip, 4000))
    print('bound', file=sys.stderr, flush=True)
    while True:
        reply, source = s.recvfrom(65535)
        print('got', len(reply), 'from', source[0], source[1], file=sys.stderr, flush=True)
threading.Thread(target=listen, args=(socket.AF_INET6, '2001:db8:c::11')).start()
listen(socket.AF_INET, '203.0.113.11')
";

fn python(namespace: &str, script: &str, more: &str) -> Process {
    let mut command = std::process::Command::new("ip");
    command.args(["netns", "exec", namespace, "python3", "-c", script, more]);
    let process = Process::start(&mut command);
    eventually("both sockets", || {
        process.log().matches("bound").count() == 2
    });
    process
}

/// Sends to a server from the client's address and port, as the proxy does.
fn ask(client: &str, server: &str, question: &str) {
    let [client, server]: [std::net::SocketAddr; 2] = [client, server].map(|a| a.parse().unwrap());
    let domain = socket2::Domain::for_address(client);
    let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, None).unwrap();
    if client.is_ipv4() {
        socket.set_ip_transparent_v4(true).unwrap();
    } else {
        socket.set_ip_transparent_v6(true).unwrap();
    }
    socket.bind(&client.into()).unwrap();
    socket.send_to(question.as_bytes(), &server.into()).unwrap();
}

#[track_caller]
fn clients_see_the_listener(client: &Process, mode: &str) {
    for (from, server, listener) in [
        ("203.0.113.11:4000", "10.0.0.2:9001", "198.51.100.10 9000"),
        (
            "[2001:db8:c::11]:4000",
            "[fd00:a::2]:9001",
            "2001:db8:a::10 9000",
        ),
    ] {
        for (size, unchecked) in [(100, 0), (101, 1), (3000, 0), (3001, 1)] {
            ask(from, server, &format!("{size} {unchecked}"));
            let line = format!("got {size} from {listener}");
            eventually(&format!("{mode}: {line}"), || client.log().contains(&line));
        }
    }
}

#[test]
fn the_proxys_host_rewrites_whole_and_fragmented_replies() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, MODES[1]);
    for (host, options) in OPTIONS {
        host.shell(&script(host, &config, options));
    }
    let (_server, client) = (python("server", SERVER, ""), python("router", CLIENT, ""));
    clients_see_the_listener(&client, MODES[1]);
}

#[test]
fn the_servers_host_rewrites_whole_and_fragmented_replies() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, MODES[2]);
    let host = Host::Server;
    host.shell("ip route add default via 192.0.2.1; ip -6 route add default via 2001:db8:e::1");
    // The interface is found by the route to clients.
    host.shell(&script(host, &config, &[]));
    let (_server, client) = (
        python("server", SERVER, "any"),
        python("router", CLIENT, ""),
    );
    clients_see_the_listener(&client, MODES[2]);
}
