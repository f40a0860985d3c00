//! `doctor` on hosts of the test's own: it finds nothing after `host-setup`, and just the
//! one thing that is then broken; `run` refuses in the same words.

use std::net::SocketAddr;
use std::process::Command;

use ppv2_lab::namespace::enter;
use ppv2_lab::two_hosts::{Host, SETUP};
use ppv2_lab::*;

const TRANSPARENT: &str = "mode = \"transparent\"";
const DSR: &str = "mode = \"dsr\"";
const DSR_ON_SERVER: &str = "mode = \"dsr\"\nrewrite_on = \"server\"";
const DSR_BY_SDK: &str = "mode = \"dsr\"\nrewrite_on = \"sdk\"";

/// A complete setup, of which a test breaks one thing.
struct Case {
    _folder: tempfile::TempDir,
    config: String,
    host: Host,
    more: Vec<&'static str>,
}

impl Case {
    /// Sets the host up, and asserts that nothing is missing then.
    #[track_caller]
    fn set_up(mode: &str, host: Host) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let content = format!(
            "[[listener]]\nbind = [\"198.51.100.10:9000\", \"[2001:db8:a::10]:9000\"]\n{mode}\n\
             allow = [\"203.0.113.11\", \"2001:db8:c::11\"]\nupstream = \"u\"\n[upstream.u]\n\
             servers = [\"10.0.0.2:9001\", \"[fd00:a::2]:9001\"]\n"
        );
        let config = write(&folder, "proxy.toml", &content);
        let config = config.to_str().unwrap().to_owned();
        let gateways = ["--gateway", "10.0.0.1", "--gateway", "fd00:a::1"];
        let more = match host {
            Host::Proxy if mode == DSR_BY_SDK => vec!["--role", "proxy", "--is-gateway"],
            Host::Proxy => vec!["--role", "proxy"],
            Host::Server if mode == DSR_BY_SDK => vec!["--role", "server"],
            Host::Server => [&["--role", "server"], &gateways[..]].concat(),
        };
        let case = Self {
            _folder: folder,
            config,
            host,
            more,
        };
        let mut arguments = case.arguments("host-setup");
        if mode == DSR_ON_SERVER {
            arguments.extend(["--public-interface", "pub"]);
        }
        let (status, script, stderr) = host.proxy(&arguments);
        assert_eq!(status, Some(0), "{stderr}");
        host.shell(&script);
        case.finds(&[]);
        case
    }

    fn arguments<'a>(&'a self, command: &'a str) -> Vec<&'a str> {
        [&[command, "--config", &self.config], &self.more[..]].concat()
    }

    /// Asserts that exactly the lines with these parts are not `ok`, and that the exit code
    /// is that of the worst.
    #[track_caller]
    fn finds(&self, parts: &[&str]) {
        let (status, stdout, stderr) = self.host.proxy(&self.arguments("doctor"));
        self.reported(parts, status, &stdout, &stderr);
    }

    #[track_caller]
    fn reported(&self, parts: &[&str], status: Option<i32>, stdout: &str, stderr: &str) {
        // No setup here drops them; they have a test of their own.
        let is_forged = |line: &&str| line.starts_with("advice  forged replies");
        let is_finding = |line: &&str| {
            line.starts_with("FATAL ") || line.starts_with("advice ") && !is_forged(line)
        };
        let lines: Vec<_> = stdout.lines().filter(is_finding).collect();
        assert_eq!(lines.len(), parts.len(), "{stdout}{stderr}");
        for (line, part) in lines.iter().zip(parts) {
            let all = part.split(" … ").all(|part| line.contains(part));
            assert!(all, "no `{part}` in\n{line}");
        }
        let fatal = lines.iter().any(|line| line.starts_with("FATAL"));
        assert_eq!(status, Some(i32::from(fatal)), "{stdout}{stderr}");
        let fixes = stdout.matches("fix: ").count() - stdout.lines().filter(is_forged).count();
        assert_eq!(fixes, lines.len(), "{stdout}");
    }

    /// Breaks one thing, asserts the finding, and fixes it.
    #[track_caller]
    fn broken(&self, breaks: &str, fix: &str, parts: &[&str]) {
        self.host.shell(breaks);
        self.finds(parts);
        self.host.shell(fix);
        self.finds(&[]);
    }

    /// Asserts that `run` refuses to start with the words of `doctor`.
    #[track_caller]
    fn refuses_to_run(&self, breaks: &str, fix: &str) {
        self.host.shell(breaks);
        let (_, stdout, _) = self.host.proxy(&self.arguments("doctor"));
        let line = stdout.lines().find_map(|line| line.strip_prefix("FATAL"));
        let words = line.unwrap().trim();
        let run = ["run", "--config", &self.config];
        let (status, _, stderr) = self.host.proxy(&run);
        assert_eq!(status, Some(1), "{stderr}");
        assert!(stderr.contains(words), "no `{words}` in\n{stderr}");
        assert!(!stderr.contains("ready"), "{stderr}");
        self.host.shell(fix);
        let mut running = proxy(&run[1..]);
        running.signal("TERM");
        assert!(running.wait().0.success());
    }
}

/// Runs a command without some capabilities.
fn without(capabilities: &str, command: &[&str]) -> (Option<i32>, String, String) {
    output_of(
        Command::new("setpriv")
            .args(["--bounding-set", capabilities])
            .arg(binary())
            .args(command),
    )
}

#[test]
fn doctor_finds_each_fault_of_transparent_on_the_proxys_host() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let case = Case::set_up(TRANSPARENT, Host::Proxy);
    let rule = "rule add pref 9022 iif priv from";
    let (less, more) = (
        "ip -4 rule del pref 9022",
        format!("ip -4 {rule} 10.0.0.2 lookup 9022"),
    );
    case.broken(less, &more, &["FATAL … replies of server 10.0.0.2:9001"]);
    case.refuses_to_run(less, &more);
    case.broken(
        "ip -6 route flush table 9022",
        "ip -6 route add local ::/0 dev lo table 9022",
        &["FATAL … replies of server [fd00:a::2]:9001"],
    );
    // The operator's own rules, by a mark that a firewall sets.
    let marked = format!("{less}; ip -4 rule add pref 9022 fwmark 7 lookup 9022");
    let unmarked = format!("{less}; {more}");
    case.broken(&marked, &unmarked, &["advice … mark 7"]);
    case.broken(
        &format!("{marked}; sysctl -q -w net.ipv4.conf.all.src_valid_mark=1"),
        &format!("{unmarked}; sysctl -q -w net.ipv4.conf.all.src_valid_mark=0"),
        &["FATAL … src_valid_mark is 1"],
    );
    let (status, stdout, stderr) = without("-net_raw,-net_admin", &case.arguments("doctor"));
    case.reported(&["FATAL … CAP_NET_RAW"], status, &stdout, &stderr);
    assert!(stdout.contains("fix: setcap cap_net_raw+ep /"), "{stdout}");
    assert!(
        stdout.contains("AmbientCapabilities=CAP_NET_RAW"),
        "{stdout}"
    );
    let (status, _, stderr) = without("-net_raw,-net_admin", &["run", "--config", &case.config]);
    assert_eq!(status, Some(1), "{stderr}");
    for part in [
        "CAP_NET_RAW, to write to server",
        "fix: setcap cap_net_raw+ep /",
    ] {
        assert!(stderr.contains(part), "no `{part}` in\n{stderr}");
    }
    assert!(!stderr.contains("ready"), "{stderr}");
}

#[test]
fn doctor_finds_each_fault_of_dsr_on_the_proxys_host() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let case = Case::set_up(DSR, Host::Proxy);
    let forwarding = |v: u8, key: &str, value: u8| {
        format!("sysctl -q -w net.ipv{v}.conf.{key}.forwarding={value}")
    };
    let (off, on) = (forwarding(4, "priv", 0), forwarding(4, "priv", 1));
    case.broken(
        &off,
        &on,
        &["FATAL … 10.0.0.2:9001 … net.ipv4.conf.priv.forwarding is 0"],
    );
    case.refuses_to_run(&off, &on);
    case.broken(
        &forwarding(6, "all", 0),
        &forwarding(6, "all", 1),
        &["FATAL … [fd00:a::2]:9001 … net.ipv6.conf.all.forwarding is 0"],
    );
    case.broken(
        "ip route del default",
        "ip route add default via 198.51.100.1",
        &["FATAL … 10.0.0.2:9001 … no route to 203.0.113.11"],
    );
    let rules = "FATAL … rules that make replies of server";
    let (_, script, _) = case.host.proxy(&case.arguments("host-setup"));
    case.broken(
        "nft flush chain inet ppv2_dsr post",
        &script,
        &[rules, rules],
    );
    let (status, stdout, stderr) = without("-net_admin", &case.arguments("doctor"));
    let unseen = "advice … rules … without CAP_NET_ADMIN";
    case.reported(&[unseen, unseen], status, &stdout, &stderr);
    let (status, stdout, stderr) = without("-net_bind_service", &case.arguments("doctor"));
    case.reported(&["advice … ports below 1024"], status, &stdout, &stderr);
}

#[test]
fn doctor_finds_each_fault_of_the_sdks_gateway() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let case = Case::set_up(DSR_BY_SDK, Host::Proxy);
    let key = |name: &str, value: u8| format!("sysctl -q -w net.ipv4.conf.priv.{name}={value}");
    // Two servers, whose replies from one IPv4 listener come in by one interface.
    for (name, good, bad, part) in [
        ("accept_local", 1, 0, "accept_local is 0 on priv"),
        ("rp_filter", 2, 0, "rp_filter is 1 on priv"),
        ("forwarding", 1, 0, "net.ipv4.conf.priv.forwarding is 0"),
    ] {
        let part = format!("FATAL … from 198.51.100.10:9000 … {part}");
        case.broken(&key(name, bad), &key(name, good), &[&part, &part]);
    }
    let server = Case::set_up(DSR_BY_SDK, Host::Server);
    let unowned = "advice … address 198.51.100.10";
    server.broken(
        "ip addr del 198.51.100.10/32 dev lo",
        "ip addr add 198.51.100.10/32 dev lo",
        &[unowned, unowned],
    );
}

#[test]
fn doctor_finds_each_fault_on_servers_hosts() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let case = Case::set_up(DSR, Host::Server);
    let route = "ip -4 route replace default table 9023 dev priv via";
    let right = format!("{route} 10.0.0.1 mtu lock 1280");
    case.broken(
        &format!("{route} 10.0.0.9 mtu lock 1280"),
        &right,
        &["FATAL … replies of server 10.0.0.2:9001 … via 10.0.0.9 on priv, not via the proxy"],
    );
    case.broken(
        &format!("{route} 10.0.0.1"),
        &right,
        &["advice … 10.0.0.2:9001 … has no MTU"],
    );
    let replies = "ipproto udp sport 9001 lookup 9023";
    case.broken(
        &format!("ip -6 rule del pref 9023 {replies}"),
        &format!("ip -6 rule add pref 9022 {replies}"),
        &["FATAL … replies of server [fd00:a::2]:9001 … no route to 2001:db8:c::11"],
    );
    case.host.shell(
        &case
            .host
            .proxy(&[&case.arguments("host-setup")[..], &["--undo"]].concat())
            .1,
    );
    case.host.shell("ip -6 rule del pref 9022");

    case.host
        .shell("ip route add default via 192.0.2.1; ip -6 route add default via 2001:db8:e::1");
    let case = Case::set_up(DSR_ON_SERVER, Host::Server);
    case.broken(
        "sysctl -q -w net.ipv4.conf.priv.rp_filter=0",
        "sysctl -q -w net.ipv4.conf.priv.rp_filter=2",
        &["FATAL … datagrams from clients to server 10.0.0.2:9001 … rp_filter is 1 on priv"],
    );
    case.broken(
        "ip route del default",
        "ip route add default via 192.0.2.1",
        // Even loose rp_filter needs some route to the client.
        &[
            "FATAL … datagrams from clients",
            "FATAL … replies of server 10.0.0.2:9001 … no route",
        ],
    );
}

const ECHO: &str = "
import socket, threading
def serve(family, ip):
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.bind((ip, 9001))
    print('bound', file=__import__('sys').stderr, flush=True)
    while True:
        s.sendto(*s.recvfrom(65535))
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
fn probe_reports_whether_the_reply_came_back() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let case = Case::set_up(TRANSPARENT, Host::Proxy);
    Case::set_up(TRANSPARENT, Host::Server);
    let probe = |parts: &[&str]| {
        let arguments = [&case.arguments("doctor")[..], &["--probe"]].concat();
        let (status, stdout, stderr) = case.host.proxy(&arguments);
        case.reported(parts, status, &stdout, &stderr);
        stdout
    };
    let refused = "advice … the server's host answered 'port unreachable'";
    probe(&[refused, refused]);
    let _echo = echo();
    let stdout = probe(&[]);
    assert_eq!(stdout.matches("the reply came back").count(), 2, "{stdout}");
    case.host.shell("ip -4 rule del pref 9022");
    probe(&[
        "FATAL … replies of server 10.0.0.2:9001",
        "FATAL … datagram to server 10.0.0.2:9001 … no reply … IpInAddrErrors",
    ]);
}

#[test]
fn probe_of_dsr_reads_the_kernels_counters() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let case = Case::set_up(DSR, Host::Proxy);
    Case::set_up(DSR, Host::Server);
    let _echo = echo();
    let probe = || {
        let arguments = [&case.arguments("doctor")[..], &["--probe"]].concat();
        case.host.proxy(&arguments)
    };
    let (status, stdout, stderr) = probe();
    case.reported(&[], status, &stdout, &stderr);
    for listener in ["198.51.100.10:9000", "[2001:db8:a::10]:9000"] {
        let passed = format!(
            "forwards rose by 1; only a client can see that the reply came from {listener}"
        );
        assert!(stdout.contains(&passed), "{stdout}");
    }
    case.host
        .shell("sysctl -q -w net.ipv4.conf.priv.forwarding=0");
    let (status, stdout, stderr) = probe();
    let parts = [
        "FATAL … replies of server 10.0.0.2:9001",
        "FATAL … datagram to server 10.0.0.2:9001 … no reply … IpInAddrErrors",
    ];
    case.reported(&parts, status, &stdout, &stderr);
}

#[test]
fn probe_needs_a_client_address_and_the_proxys_host() {
    let folder = tempfile::tempdir().unwrap();
    let content = "[[listener]]\nbind = [\"127.0.0.1:9000\"]\nmode = \"transparent\"\n\
                   upstream = \"u\"\n[upstream.u]\nservers = [\"127.0.0.2:9001\"]\n";
    let file = write(&folder, "proxy.toml", content);
    let doctor = ["doctor", "--probe", "--config", file.to_str().unwrap()];
    for (more, part) in [
        (&[][..], "--client IP"),
        (&["--role", "server"], "on the proxy's host"),
    ] {
        let (status, stdout, stderr) = output(&[&doctor[..], more].concat());
        assert_eq!((status, &*stdout), (Some(2), ""), "{stderr}");
        assert!(stderr.contains(part), "{stderr}");
    }
}

/// Sends a datagram from the router, where clients are, from the address of the server.
const FORGE: &str = "
import socket, sys
_, server, proxy = sys.argv
s = socket.socket(socket.AF_INET6 if ':' in server else socket.AF_INET, socket.SOCK_DGRAM)
s.bind((server, 9001))
s.sendto(b'forged', (proxy, 9999))
";

#[test]
fn forged_replies_are_reported_with_what_drops_them() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let found = |servers: &str| -> Vec<String> {
        let content = format!(
            "[[listener]]\nbind = [\"198.51.100.10:9000\", \"[2001:db8:a::10]:9000\"]\n\
             upstream = \"u\"\n[upstream.u]\nservers = {servers}\n"
        );
        let config = write(&folder, "proxy.toml", &content);
        let arguments = ["doctor", "--config", config.to_str().unwrap()];
        let (status, stdout, stderr) = Host::Proxy.proxy(&arguments);
        assert_eq!(status, Some(0), "{stdout}{stderr}");
        let lines: Vec<_> = stdout.lines().collect();
        let of = lines
            .windows(2)
            .filter(|two| two[0].contains(" forged replies of server "));
        of.map(|two| two.join("\n")).collect()
    };
    let rp_filter = |value: u8| {
        let of_pub = format!("net.ipv4.conf.pub.rp_filter={value}");
        Host::Proxy.shell(&format!(
            "sysctl -q -w net.ipv4.conf.all.rp_filter=0 {of_pub}"
        ));
    };
    rp_filter(2);
    let both = "[\"10.0.0.2:9001\", \"10.0.0.3:9001\", \"[fd00:a::2]:9001\"]";
    // IPv6, then IPv4.
    let advice = found(both);
    let [v6, v4] = &advice[..] else {
        panic!("{advice:?}")
    };
    assert!(v6.starts_with("advice  forged replies of server fd00:a::2 from pub: "));
    assert!(v6.contains("IPv6 has no rp_filter"), "{v6}");
    assert!(v4.starts_with("advice  forged replies of server 10.0.0.2 and 1 more from pub: "));
    assert!(v4.contains("rp_filter is 2 on pub"), "{v4}");
    // It would ask for the proxy's link address from the server's address.
    Host::Proxy.shell("ip netns exec router sysctl -q -w net.ipv4.conf.proxy.arp_announce=2");
    for (advice, server, proxy) in [(v4, "10.0.0.2", "10.0.0.1"), (v6, "fd00:a::2", "fd00:a::1")] {
        let (_, rule) = advice.split_once("nft '").unwrap();
        Host::Proxy.shell(&format!("nft '{rule}"));
        let gateway = if proxy.contains(':') {
            "2001:db8:a::10"
        } else {
            "198.51.100.10"
        };
        Host::Proxy.shell(&format!(
            "ip -n router address add {server} dev lo; ip -n router route add {proxy} via {gateway}"
        ));
        let mut forger = Command::new("ip");
        forger.args([
            "netns", "exec", "router", "python3", "-c", FORGE, server, proxy,
        ]);
        eventually("a dropped datagram", || {
            assert!(forger.status().unwrap().success());
            let rules = Host::Proxy.shell("nft list table inet ppv2_guard");
            let mut rules = rules.lines().filter(|rule| rule.contains(server));
            rules.any(|rule| !rule.contains("packets 0 ") && rule.contains("drop"))
        });
    }
    let v4_says = |part: &str| {
        let now = found("[\"10.0.0.2:9001\"]");
        assert!(
            now.len() == 1 && now[0].contains(part),
            "no `{part}` in {now:?}"
        );
    };
    rp_filter(1);
    v4_says("ok      forged replies of server 10.0.0.2 from pub: are dropped by the proxy");
    Host::Proxy.shell("ip rule add fwmark 5 lookup main");
    v4_says("get past rp_filter");
    v4_says("fix: sysctl -w net.ipv4.udp_early_demux=0, or nft");
    Host::Proxy.shell("sysctl -q -w net.ipv4.udp_early_demux=0");
    v4_says("ok      forged replies of server 10.0.0.2 from pub: are dropped: rp_filter is 1");
    rp_filter(2);
    v4_says("rp_filter is 2 on pub");
    // Behind one interface they can't be told apart from replies.
    assert!(found("[\"198.51.100.7:9001\"]").is_empty());
}

#[test]
fn forged_headers_are_reported_with_what_drops_them() {
    if !enter(test_name!(), SETUP) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let found = |from: &str| -> Vec<String> {
        let content = format!(
            "[[listener]]\nbind = [\"10.0.0.1:9000\", \"[fd00:a::1]:9000\"]\nupstream = \"u\"\n\
             accept = {{ from = {from} }}\n[upstream.u]\nservers = [\"127.0.0.1:9001\"]\n"
        );
        let config = write(&folder, "proxy.toml", &content);
        let arguments = ["doctor", "--config", config.to_str().unwrap()];
        let (status, stdout, stderr) = Host::Proxy.proxy(&arguments);
        assert_eq!(status, Some(0), "{stdout}{stderr}");
        let lines: Vec<_> = stdout.lines().collect();
        let of = lines
            .windows(2)
            .filter(|two| two[0].contains(" forged headers of proxies "));
        of.map(|two| two.join("\n")).collect()
    };
    let both = "[\"10.0.0.0/24\", \"10.0.0.128/25\", \"10.0.9.1\", \"fd00:a::2\", \"127.0.0.1\"]";
    let of_pub = |value: u8| {
        Host::Proxy.shell(&format!(
            "sysctl -q -w net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.pub.rp_filter={value}"
        ));
    };
    Host::Proxy.shell("ip route add 10.0.9.0/24 via 10.0.0.2");
    of_pub(2);
    let advice = found(both);
    let [v6, v4] = &advice[..] else {
        panic!("{advice:?}")
    };
    assert!(v6.starts_with("advice  forged headers of proxies fd00:a::2/128 from pub: "));
    assert!(v6.contains("IPv6 has no rp_filter"), "{v6}");
    assert!(v4.starts_with("advice  forged headers of proxies 10.0.0.0/24 and 1 more from pub: "));
    assert!(v4.contains("rp_filter is 2 on pub"), "{v4}");
    for advice in [v4, v6] {
        let (_, rule) = advice.split_once("nft '").unwrap();
        Host::Proxy.shell(&format!("nft '{rule}"));
    }
    of_pub(1);
    let strict = found("[\"10.0.0.2\"]");
    let ok = "ok      forged headers of proxies 10.0.0.2/32 from pub: are dropped: rp_filter is 1";
    assert!(strict.len() == 1 && strict[0].starts_with(ok), "{strict:?}");
    // Where clients are, too, nothing tells them apart.
    Host::Proxy
        .shell("ip route replace default via 10.0.0.2; ip -6 route replace default via fd00:a::2");
    assert!(found("[\"10.0.0.2\", \"fd00:a::2\"]").is_empty());
}

#[test]
fn ppv2_needs_no_setup() {
    let folder = tempfile::tempdir().unwrap();
    let content = "[limits]\nmax_sessions = 1000000\n[[listener]]\nbind = [\"127.0.0.1:9000\"]\n\
                   upstream = \"u\"\n[upstream.u]\nservers = [\"127.0.0.2:9001\"]\n";
    let file = write(&folder, "proxy.toml", content);
    let (status, stdout, stderr) = output(&["doctor", "--config", file.to_str().unwrap()]);
    assert_eq!(status, Some(0), "{stdout}{stderr}");
    assert!(stdout.contains("the header takes 28 bytes"), "{stdout}");
    let shortfall =
        "advice  sessions (open files, local ports and memory): max_sessions is 1000000";
    assert!(stdout.contains(shortfall), "{stdout}");
    assert!(stdout.contains("ok      memory: "), "{stdout}");
    assert!(stdout.contains(" MiB, by /"), "{stdout}");
}

#[test]
fn probe_finds_servers_that_answer_from_another_address() {
    for (ip, wildcard) in [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")] {
        let (asked, other) = (socket(ip), socket(ip));
        let [server, elsewhere] = [&asked, &other].map(|s| s.local_addr().unwrap());
        let silent = socket(ip);
        let folder = tempfile::tempdir().unwrap();
        let content = format!(
            "[[listener]]\nbind = [\"{wildcard}:9000\"]\nupstream = \"u\"\n[upstream.u]\n\
             servers = [\"{server}\", {{ address = \"{}\", mode = \"plain\" }}]\n\
             health = {{ every = \"2s\", timeout = \"500ms\", fall = 3, rise = 2,\n\
             probe = {{ kind = \"udp\", send = \"ping\", expect = \"pong\" }} }}\n",
            silent.local_addr().unwrap()
        );
        let file = write(&folder, "proxy.toml", &content);
        let doctor = || {
            let file = file.to_str().unwrap().to_owned();
            std::thread::spawn(move || output(&["doctor", "--probe", "--config", &file]))
        };
        let line = |stdout: &str, server: SocketAddr| {
            let what = format!("answer of server {server}: ");
            let line = stdout.lines().find(|line| line.contains(&what));
            line.unwrap().to_owned()
        };
        for (sender, word, part) in [
            (
                &asked,
                "ok ",
                "comes from the address that was asked".to_owned(),
            ),
            (&other, "FATAL ", format!("comes from {elsewhere}")),
        ] {
            let report = doctor();
            let (question, from) = receive(&asked);
            let (header, payload) = ppv2::decode(&question).unwrap();
            assert_eq!((header.client(), payload), (None, &b"ping"[..]));
            assert_eq!(receive(&silent).0, b"ping");
            sender.send_to(b"pong", from).unwrap();
            let (status, stdout, stderr) = report.join().unwrap();
            let of_asked = line(&stdout, server);
            assert!(
                of_asked.starts_with(word) && of_asked.contains(&part),
                "{stdout}{stderr}"
            );
            let of_silent = line(&stdout, silent.local_addr().unwrap());
            assert!(of_silent.starts_with("advice "), "{stdout}");
            assert_eq!(status, Some(i32::from(word == "FATAL ")), "{stdout}");
        }
    }
}
