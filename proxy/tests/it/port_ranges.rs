//! Listeners of many ports, and servers on the same ports.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use ppv2_lab::network::{Family, Lab, Side};
use ppv2_lab::service::*;
use ppv2_lab::*;

/// Ports of a listener.
const PORTS: u16 = 200;

/// A listener named `media` on these ports.
fn media(bind: &str, more: &str) -> String {
    format!(
        "[[listener]]\nname = \"media\"\nbind = [{bind}]\nupstream = \"u\"\n{more}\n[upstream.u]\n"
    )
}

/// Asks by `client` at each of these ports, and sees that each answers from where it was
/// asked. Returns the answers.
fn ask_each(client: &UdpSocket, ip: &str, ports: impl Iterator<Item = u16>) -> Vec<String> {
    let ip: IpAddr = ip.parse().unwrap();
    let ask = |port| {
        let to = SocketAddr::new(ip, port);
        client.send_to(b"question", to).unwrap();
        let (answer, from) = receive(client);
        assert_eq!(from, to);
        String::from_utf8(answer).unwrap()
    };
    ports.map(ask).collect()
}

#[test]
fn each_port_of_a_range_is_served() {
    let (first, server) = (ports(PORTS), Server::start());
    let last = first + PORTS - 1;
    let bind = format!("\"127.0.0.1:{first}-{last}\", \"[::1]:{first}-{last}\"");
    let servers = format!("servers = [{}]\n", list(&[&server]));
    let proxy = Proxy::start(&(media(&bind, "mode = \"plain\"") + &servers));
    for ip in ["127.0.0.1", "::1"] {
        let client = socket(ip);
        let answers = ask_each(&client, ip, first..=last);
        // Each port is another session.
        let mut distinct = answers.clone();
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), answers.len());
        // They go on.
        assert_eq!(ask_each(&client, ip, first..=last), answers);
    }
    let log = proxy.process.log();
    let listening = format!("bind=[127.0.0.1:{first}-{last}, [::1]:{first}-{last}]");
    assert!(log.contains(&listening), "{log}");
    assert!(log.lines().count() < 20, "{log}");
    let received = "ppv2_client_datagrams_total{listener=\"media\"}";
    assert_eq!(proxy.metric(received), 4 * u64::from(PORTS));
}

#[test]
fn reload_keeps_the_sessions_of_ports_that_stay() {
    let (first, server) = (ports(PORTS), Server::start());
    let last = first + PORTS - 1;
    let config = |first: u16, last: u16| {
        let servers = format!("servers = [{}]\n", list(&[&server]));
        media(&format!("\"127.0.0.1:{first}-{last}\""), "mode = \"plain\"") + &servers
    };
    let (from, to) = (first + 50, last - 50);
    let proxy = Proxy::start(&config(first, to));
    let client = socket("127.0.0.1");
    let before = ask_each(&client, "127.0.0.1", from..=to);
    // Longer at its end, then shorter at its front.
    proxy.reload(&config(first, last));
    assert_eq!(ask_each(&client, "127.0.0.1", from..=to), before);
    ask_each(&client, "127.0.0.1", to + 1..=last);
    proxy.reload(&config(from, to));
    assert_eq!(ask_each(&client, "127.0.0.1", from..=to), before);
    let closed = format!(
        "addresses=[127.0.0.1:{first}-{}, 127.0.0.1:{}-{last}]",
        from - 1,
        to + 1
    );
    eventually("the other ports are closed", || {
        proxy.process.log().contains(&closed)
    });
    // Others can have them, once each worker has closed its own.
    for port in [first, last] {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        eventually("the port is free", || UdpSocket::bind(address).is_ok());
    }
    assert_eq!(ask_each(&client, "127.0.0.1", from..=to), before);
    let moved = "ppv2_sessions_ended_total{listener=\"media\",reason=\"moved\"}";
    assert_eq!(proxy.metric(moved), 0);
}

#[test]
fn more_ports_than_open_files_are_refused_with_both_numbers() {
    let first = ports(PORTS);
    let last = first + PORTS - 1;
    let folder = tempfile::tempdir().unwrap();
    let config =
        media(&format!("\"127.0.0.1:{first}-{last}\""), "") + "servers = [\"127.0.0.2:9\"]\n";
    let file = write(&folder, "proxy.toml", &format!("workers = 2\n{config}"));
    let limited = |command: &str| {
        let command = format!(
            "ulimit -n 300; exec {} {command} --config {}",
            binary().display(),
            file.display()
        );
        output_of(std::process::Command::new("sh").args(["-c", &command]))
    };
    let lack = format!("listeners take {} sockets", 2 * PORTS);
    let (status, stdout, stderr) = limited("check");
    assert_eq!(status, Some(0), "{stderr}");
    assert!(stdout.contains(&lack), "{stdout}");
    let (status, _, stderr) = limited("run");
    assert_eq!(status, Some(1), "{stderr}");
    assert!(
        stderr.contains(&lack) && stderr.contains("LimitNOFILE"),
        "{stderr}"
    );
}

/// Answers each datagram with its own port, where it came from, and what came. The sockets are
/// another process's: other tests count those of this one.
const SERVER: &str = "
import selectors, socket, sys
ip, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sockets = selectors.DefaultSelector()
for port in range(first, first + count):
    s = socket.socket(socket.AF_INET6 if ':' in ip else socket.AF_INET, socket.SOCK_DGRAM)
    s.bind((ip, port))
    sockets.register(s, selectors.EVENT_READ, port)
print('bound', file=sys.stderr, flush=True)
while True:
    for key, _ in sockets.select():
        datagram, client = key.fileobj.recvfrom(65535)
        source = ('[%s]:%d' if ':' in ip else '%s:%d') % client[:2]
        key.fileobj.sendto(b'%d %s ' % (key.data, source.encode()) + datagram, client)
";

/// A server on [`PORTS`] ports.
struct RangeServer {
    ip: &'static str,
    first: u16,
    _process: Process,
}

impl RangeServer {
    fn start(ip: &'static str, first: u16) -> Self {
        let mut command = std::process::Command::new("python3");
        command.args(["-c", SERVER, ip, &first.to_string(), &PORTS.to_string()]);
        let mut process = Process::start(&mut command);
        process.wait_for("bound");
        Self {
            ip,
            first,
            _process: process,
        }
    }

    fn last(&self) -> u16 {
        self.first + PORTS - 1
    }

    /// Its address, with all ports.
    fn address(&self) -> String {
        format!("{}:{}-{}", self.ip, self.first, self.last())
    }

    /// It as `servers`, with these keys.
    fn servers(&self, more: &str) -> String {
        let address = self.address();
        format!("servers = [{{ address = \"{address}\", port = \"same\"{more} }}]\n")
    }
}

/// Asks by `client` at this port, and sees that the server's same port answers. Returns what
/// the server saw: the address that it was asked from, and the datagram.
#[track_caller]
fn ask(client: &UdpSocket, ip: &str, port: u16) -> (SocketAddr, Vec<u8>) {
    let to = SocketAddr::new(ip.parse().unwrap(), port);
    client.send_to(b"question", to).unwrap();
    let (answer, from) = receive(client);
    assert_eq!(from, to);
    let mut parts = answer.splitn(3, |byte| *byte == b' ');
    let mut text = || {
        std::str::from_utf8(parts.next().unwrap())
            .unwrap()
            .to_owned()
    };
    let (by, asked_from) = (text(), text());
    assert_eq!(by, port.to_string());
    (asked_from.parse().unwrap(), parts.next().unwrap().to_vec())
}

#[test]
fn a_server_is_asked_at_the_port_that_its_client_wrote_to() {
    let first = ports(PORTS);
    let server = RangeServer::start("127.0.0.2", first);
    let (address, last) = (server.address(), server.last());
    let bind = format!("\"127.0.0.1:{first}-{last}\", \"[::1]:{first}-{last}\"");
    let proxy = Proxy::start(&(media(&bind, "") + &server.servers("")));
    // As of RTP and RTCP: an even port and the next one.
    for ip in ["127.0.0.1", "::1"] {
        let (rtp, rtcp) = (socket(ip), socket(ip));
        for even in (first..last).step_by(2) {
            for (client, port) in [(&rtp, even), (&rtcp, even + 1)] {
                let (_, datagram) = ask(client, ip, port);
                let (seen, destination, payload) = read_header(&datagram);
                assert_eq!(seen, client.local_addr().unwrap());
                assert_eq!(destination, SocketAddr::new(ip.parse().unwrap(), port));
                assert_eq!(payload, b"question");
            }
        }
    }
    // One server in all that is told.
    let label = format!("upstream=\"u\",server=\"{address}\"");
    let opened = format!("ppv2_upstream_sessions{{{label}}}");
    assert_eq!(proxy.metric(&opened), 2 * u64::from(PORTS));
    let log = proxy.process.log();
    assert!(log.contains(&format!("{address} (ppv2)")), "{log}");
    let (_, upstreams) = http_get(proxy.admin, "/upstreams");
    let shown = format!("\"address\":\"{address}\"");
    assert!(upstreams.replace(' ', "").contains(&shown), "{upstreams}");
    let (_, sessions) = http_get(proxy.admin, "/sessions");
    assert!(sessions.contains(&address), "{sessions}");
    let check = output(&["check", "--config", proxy.file.to_str().unwrap()]);
    let line = format!("  -> u {address} ppv2, the client's destination port\n");
    assert!(check.1.contains(&line), "{check:?}");
}

#[test]
fn no_session_takes_over_a_socket_of_another_port() {
    let first = ports(PORTS);
    let server = RangeServer::start("127.0.0.2", first);
    let last = first + 19;
    let admin = address("127.0.0.1");
    // A session ends with its answer, and its socket could serve another. There are
    // descriptors for about 60.
    let content = format!(
        "workers = 1\n[admin]\nlisten = \"{admin}\"\n{}{}",
        media(
            &format!("\"127.0.0.1:{first}-{last}\""),
            "mode = \"plain\"\nresponses = 1"
        ),
        server.servers("")
    );
    let folder = tempfile::tempdir().unwrap();
    let file = write(&folder, "proxy.toml", &content);
    let command = format!(
        "ulimit -n 150; exec {} run --config {}",
        binary().display(),
        file.display()
    );
    let mut process = Process::start(std::process::Command::new("sh").args(["-c", &command]));
    process.wait_for("ready");
    let client = socket("127.0.0.1");
    let wait = Duration::from_millis(100);
    client.set_read_timeout(Some(wait)).unwrap();
    let mut answered = 0;
    for port in (first..=last).cycle().take(2000) {
        let to = SocketAddr::new([127, 0, 0, 1].into(), port);
        client.send_to(b"question", to).unwrap();
        let mut answer = [0; 100];
        // Without a socket that may be used again, it is dropped.
        let Ok((len, from)) = client.recv_from(&mut answer) else {
            continue;
        };
        let port = from.port().to_string();
        assert!(answer[..len].starts_with(port.as_bytes()), "{from}");
        answered += 1;
        if answered == 200 {
            break;
        }
    }
    assert_eq!(answered, 200);
    let reclaimed = metric(admin, "ppv2_resting_ports_reclaimed_total");
    assert!(reclaimed > 0, "{reclaimed}");
}

#[test]
fn a_source_network_reaches_each_port() {
    let first = ports(PORTS);
    let server = RangeServer::start("127.0.0.2", first);
    let bind = format!("\"127.0.0.1:{first}-{}\"", server.last());
    let source = "source = [\"127.64.0.0/10\"]\n";
    let _proxy = Proxy::start(&(media(&bind, "mode = \"plain\"") + source + &server.servers("")));
    let client = socket("127.0.0.1");
    for port in first..=server.last() {
        let (from, _) = ask(&client, "127.0.0.1", port);
        assert!(from.to_string().starts_with("127."), "{from}");
        assert_ne!(from.ip().to_string(), "127.0.0.1");
    }
}

#[test]
fn reload_with_another_range_keeps_the_server_and_its_sessions() {
    let first = ports(PORTS);
    let server = RangeServer::start("127.0.0.2", first);
    let config = |from: u16, to: u16| {
        let bind = format!("\"127.0.0.1:{from}-{to}\"");
        let servers = format!(
            "servers = [{{ address = \"127.0.0.2:{from}-{to}\", port = \"same\" }}]\nlame_duck = \"0s\"\n"
        );
        media(&bind, "mode = \"plain\"") + &servers
    };
    let proxy = Proxy::start(&config(first, server.last()));
    let client = socket("127.0.0.1");
    let (from, to) = (first + 10, first + 19);
    let before: Vec<_> = (from..=to)
        .map(|port| ask(&client, "127.0.0.1", port))
        .collect();
    proxy.reload(&config(from, to));
    let after: Vec<_> = (from..=to)
        .map(|port| ask(&client, "127.0.0.1", port))
        .collect();
    assert_eq!(after, before);
    let label = format!("upstream=\"u\",server=\"127.0.0.2:{from}-{to}\"");
    let opened = format!("ppv2_upstream_sessions{{{label}}}");
    assert_eq!(proxy.metric(&opened), 10);
    let (status, why) = proxy.try_reload(&config(from, to).replacen(
        &format!("{from}-{to}"),
        &format!("{from}-{}", to + 1),
        1,
    ));
    assert_eq!(status, 422, "{why}");
    assert!(why.contains(&format!("has port {}", to + 1)), "{why}");
}

#[test]
fn the_destination_of_a_header_names_the_port() {
    let first = ports(PORTS);
    let server = RangeServer::start("127.0.0.2", first);
    let listener = address("127.0.0.1");
    let more = "mode = \"plain\"\naccept = { from = [\"127.0.0.0/8\"] }";
    let proxy = Proxy::start(&(media(&format!("\"{listener}\""), more) + &server.servers("")));
    let front = socket("127.0.0.1");
    let send = |port: u16| {
        let client: SocketAddr = "203.0.113.7:5000".parse().unwrap();
        let destination: SocketAddr = format!("198.51.100.1:{port}").parse().unwrap();
        let mut buffer = [0; 100];
        let header = ppv2::encode_udp(client, destination, &mut buffer).unwrap();
        front
            .send_to(&[header, b"question"].concat(), listener)
            .unwrap();
    };
    for port in [first, first + 1, server.last()] {
        send(port);
        let (answer, from) = receive(&front);
        assert_eq!(from, listener);
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with(&format!("{port} ")), "{answer}");
        assert!(answer.ends_with(" question"), "{answer}");
    }
    for port in [first - 1, server.last() + 1, 0] {
        send(port);
    }
    let drops = "ppv2_dropped_datagrams_total{listener=\"media\",reason=\"no_server\"}".to_owned();
    eventually("datagrams to other ports are dropped", || {
        proxy.metric(&drops) == 3
    });
    receive_nothing(&front);
}

#[test]
fn health_is_checked_at_one_port() {
    let first = ports(PORTS);
    let server = RangeServer::start("127.0.0.2", first);
    let checked = socket("127.0.0.2");
    let port = checked.local_addr().unwrap().port();
    let bind = format!("\"127.0.0.1:{first}-{}\"", server.last());
    let health = |probe: &str| {
        format!(
            "health = {{ every = \"50ms\", probe = {{ kind = \"udp\", send = \"ping\"{probe} }} }}\n"
        )
    };
    let config =
        |probe: &str| media(&bind, "mode = \"plain\"") + &health(probe) + &server.servers("");
    let proxy = Proxy::start(&config(&format!(", port = {port}")));
    let (ping, from) = receive(&checked);
    assert_eq!(ping, b"ping");
    checked.send_to(b"pong", from).unwrap();
    // It is down at that port, and up at its first.
    let label = format!("upstream=\"u\",server=\"{}\"", server.address());
    let up = format!("ppv2_upstream_up{{{label}}}");
    eventually("it is down", || proxy.metric(&up) == 0);
    proxy.reload(&config(", expect_regex = \"^[0-9]+ .* ping$\""));
    eventually("it is up", || proxy.metric(&up) == 1);
}

/// Sets both hosts up by what `host-setup` prints, whose rules know the whole range.
#[test]
fn a_server_in_mode_transparent_sees_clients_at_each_port() {
    const FIRST: u16 = 20_000;
    let Some(lab) = Lab::enter(test_name!(), Side::Private) else {
        return;
    };
    let last = FIRST + PORTS - 1;
    let config = Family::BOTH.map(|family| {
        let range = |mut address: SocketAddr| {
            address.set_port(FIRST);
            format!("{address}-{last}")
        };
        let (bind, server) = (range(family.listener()), range(family.server()));
        format!(
            "[[listener]]\nname = \"{family:?}\"\nbind = [\"{bind}\"]\nmode = \"transparent\"\n\
             upstream = \"{family:?}\"\n[upstream.{family:?}]\n\
             servers = [{{ address = \"{server}\", port = \"same\" }}]\n"
        )
    });
    let config = config.concat();
    lab.host_setup("proxy", &config, &["--role", "proxy"]);
    let gateways = Family::BOTH.map(|family| family.proxy().to_string());
    let [v4, v6] = &gateways;
    let options = ["--role", "server", "--gateway", v4, "--gateway", v6];
    lab.host_setup("server", &config, &options);
    let rules = lab.sh("server", "ip rule");
    let rule = format!("sport {FIRST}-{last}");
    assert!(rules.contains(&rule), "{rules}");
    let _servers = lab.at("server", || {
        ["10.0.0.2", "fd00:a::2"].map(|ip| RangeServer::start(ip, FIRST))
    });
    let _proxy = lab.proxy_with(&config);
    for family in Family::BOTH {
        let own = family.client(1);
        let client = lab.at("client1", || socket(&own.to_string()));
        let listener = family.listener().ip().to_string();
        for port in [FIRST, FIRST + 1, last - 1, last] {
            let (seen, payload) = ask(&client, &listener, port);
            assert_eq!((seen.ip(), &payload[..]), (own, &b"question"[..]));
        }
    }
}
