//! Listeners of many ports, and servers on the same ports.

use std::net::{IpAddr, SocketAddr, UdpSocket};

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
    // Others can have them now.
    drop(bind(SocketAddr::new([127, 0, 0, 1].into(), first)));
    drop(bind(SocketAddr::new([127, 0, 0, 1].into(), last)));
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
