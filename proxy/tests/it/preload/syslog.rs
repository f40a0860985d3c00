//! rsyslog, which receives log lines and never answers.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use ppv2_lab::dig::program;
use ppv2_lab::wrapped::{CLIENTS, ROUNDS, Scene, at, setup, wrapped};
use ppv2_lab::*;

fn line(client: SocketAddr, round: usize) -> String {
    let time = "2026-01-01T00:00:00Z";
    format!("<13>1 {time} host app - - - {round} of {}", client.ip())
}

#[test]
fn rsyslog_writes_each_clients_address() {
    if !namespace::enter(test_name!(), &setup()) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().display();
    let port = port();
    let config = format!(
        r#"
global(workDirectory="{path}" net.enableDNS="off")
module(load="imudp" threads="2")
template(name="line" type="string" string="%fromhost-ip% wrote %msg%\n")
ruleset(name="all") {{ action(type="omfile" file="{path}/log" template="line") }}
input(type="imudp" address="127.0.0.1" port="{port}" ruleset="all")
input(type="imudp" address="::1" port="{port}" ruleset="all")
"#
    );
    let config = write(&folder, "rsyslog.conf", &config);
    let config = config.to_str().unwrap();
    let arguments = ["-n", "-i", "NONE", "-f", config];
    let _server = wrapped(&[], &program("rsyslogd", "rsyslog"), &arguments);
    let log = || std::fs::read_to_string(folder.path().join("log")).unwrap_or_default();
    let scenes = [0, 1].map(|family| Scene::new(at(family, port)));
    let mut expected = BTreeSet::new();
    for scene in &scenes {
        let first = &scene.clients[0];
        eventually("the first line in the log", || {
            let hello = line(first.local_addr().unwrap(), 99);
            first.send_to(hello.as_bytes(), scene.listener).unwrap();
            log().contains(&format!("99 of {}", first.local_addr().unwrap().ip()))
        });
        scene.strangers(line(first.local_addr().unwrap(), 77).as_bytes());
        for round in 0..ROUNDS {
            for client in &scene.clients {
                let address = client.local_addr().unwrap();
                let line = line(address, round);
                client.send_to(line.as_bytes(), scene.listener).unwrap();
                let ip = address.ip();
                expected.insert(format!("{ip} wrote {round} of {ip}"));
            }
            // No more at once than the server's socket has room for.
            let newest = expected.len();
            eventually("the lines of a round in the log", || {
                log()
                    .lines()
                    .filter(|line| !line.contains(" 99 of "))
                    .count()
                    >= newest
            });
        }
    }
    assert_eq!(expected.len(), 2 * CLIENTS * ROUNDS);
    let log = log();
    let lines = log.lines().map(str::to_owned);
    let seen: Vec<_> = lines.filter(|line| !line.contains(" 99 of ")).collect();
    assert_eq!(seen.len(), expected.len(), "each line once");
    assert_eq!(seen.into_iter().collect::<BTreeSet<_>>(), expected);
}
