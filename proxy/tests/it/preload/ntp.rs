//! chrony as an NTP server, which sends each answer with the local address that the question
//! came to.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use ppv2_lab::dig::program;
use ppv2_lab::wrapped::{CLIENT_NETWORKS, ROUNDS, Scene, at, setup, wrapped};
use ppv2_lab::*;

/// A question of version 4; its time of sending is what the answer has as origin.
fn question(client: SocketAddr, round: usize) -> Vec<u8> {
    let mut packet = vec![0; 48];
    packet[0] = 0x23;
    packet[40..].copy_from_slice(&stamp(client, round));
    packet
}

fn stamp(client: SocketAddr, round: usize) -> [u8; 8] {
    let round = u32::try_from(round).unwrap();
    (u64::from(client.port()) << 32 | u64::from(round)).to_be_bytes()
}

fn chronyd(folder: &Path, port: u16) -> Process {
    let [clients4, clients6] = CLIENT_NETWORKS;
    let path = folder.display();
    let config = format!(
        "port {port}\nlocal stratum 5\nallow {clients4}\nallow {clients6}\n\
         bindaddress 127.0.0.1\nbindaddress ::1\n\
         cmdport 0\nbindcmdaddress {path}/run/chronyd.sock\npidfile {path}/run/chronyd.pid\n"
    );
    let file = folder.join("chrony.conf");
    std::fs::write(&file, config).unwrap();
    let arguments = ["-d", "-x", "-u", "root", "-f", file.to_str().unwrap()];
    let mut process = wrapped(&[], &program("chronyd", "chrony"), &arguments);
    process.wait_for("root privileges");
    process
}

/// Its record of clients: address, and how many questions came from there.
fn clients(folder: &Path) -> Vec<(String, usize)> {
    let mut chronyc = Command::new(program("chronyc", "chrony"));
    chronyc
        .args(["-n", "-h"])
        .arg(folder.join("run/chronyd.sock"));
    let (_, text, errors) = output_of(chronyc.arg("clients"));
    let read = |line: &str| {
        let mut words = line.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
    };
    let read: Vec<_> = text.lines().filter_map(read).collect();
    assert!(!read.is_empty(), "{text}{errors}");
    read
}

#[test]
fn chrony_sees_each_client() {
    if !namespace::enter(test_name!(), &setup()) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let port = port();
    let _server = chronyd(folder.path(), port);
    for family in [0, 1] {
        let scene = Scene::new(at(family, port));
        let nobody = SocketAddr::new(scene.server.ip(), 0);
        scene.until_answered(&question(nobody, 0));
        scene.strangers(&question(nobody, 1));
        for refused in &scene.refused {
            let question = question(refused.local_addr().unwrap(), 0);
            refused.send_to(&question, scene.listener).unwrap();
        }
        scene.exchange(question, |client, round, answer| {
            // A server's answer, from a clock that is right.
            assert_eq!((answer.len(), answer[0]), (48, 0x24));
            assert_eq!(answer[24..32], stamp(client, round), "to {client}");
        });
        scene.nothing_more(&scene.refused);

        let seen = clients(folder.path());
        let of_client = |ip: String| {
            let record = seen.iter().find(|(address, _)| *address == ip);
            record.map_or(0, |(_, questions)| *questions)
        };
        // The first also asked whether the server answers.
        for client in &scene.clients[1..] {
            let ip = client.local_addr().unwrap().ip().to_string();
            assert_eq!(of_client(ip), ROUNDS, "{client:?} in {seen:?}");
        }
        let proxy = seen
            .iter()
            .find(|(address, _)| address.parse() == Ok(nobody.ip()));
        assert_eq!(proxy, None, "{seen:?}");
    }
}
