//! Every datagram that the library receives is counted once: as delivered, or as dropped for
//! a reason. A C program whose threads and signal handlers receive in every way is sent good
//! datagrams, long ones, and those that must be dropped.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::io::{BufRead, BufReader};
use std::net::UdpSocket;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use ppv2_lab::fake_proxy::{self, CLIENT, from_client};
use ppv2_lab::{address, musl_gcc, preload_library, preload_library_musl};

const ROUNDS: usize = 400;

#[test]
fn every_datagram_is_delivered_or_dropped_once() {
    storm(Command::new("cc"), preload_library());
}

#[test]
fn every_datagram_is_delivered_or_dropped_once_with_musl() {
    storm(musl_gcc(), preload_library_musl());
}

fn storm(mut cc: Command, library: &Path) {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("storm");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/storm/storm.c");
    let compiled = cc
        .args(["-std=c11", "-O1", "-pthread", "-w"])
        .arg(source)
        .arg("-o")
        .arg(&program)
        .status();
    let compiled = compiled.expect("cc is in the Debian package gcc");
    assert!(compiled.success());

    let server = address("127.0.0.1");
    let stats = folder.path().join("stats.prom");
    let mut child = Command::new(&program)
        .arg(server.port().to_string())
        .env("LD_PRELOAD", library)
        .env("PPV2_TRUSTED", "127.0.0.1")
        .env("PPV2_STATS", &stats)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");

    let proxy = UdpSocket::bind("127.0.0.1:0").unwrap();
    let stranger = UdpSocket::bind("127.0.0.2:0").unwrap();
    let hostile = fake_proxy::hostile();
    let long = vec![b'l'; 9000];
    let mut sent = 0;
    let mut send = |from: &UdpSocket, datagram: &[u8]| {
        from.send_to(datagram, server).unwrap();
        sent += 1;
    };
    for round in 0..ROUNDS {
        send(&proxy, &from_client(CLIENT, b"short"));
        send(&stranger, b"of a stranger");
        send(&proxy, &from_client(CLIENT, &long[..2000 + round * 17]));
        send(&proxy, &hostile[round % hostile.len()]);
        send(&stranger, &long);
        send(&proxy, &from_client(CLIENT, b"short again"));
        send(&proxy, &from_client(CLIENT, &long));
        // The queue has room for some of these.
        if round % 4 == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    drop(child.stdin.take());
    let line = lines.next().unwrap().unwrap();
    assert!(child.wait().unwrap().success());
    let numbers: Vec<u64> = line.split(' ').map(|word| word.parse().unwrap()).collect();
    let [got, unreachable, without_room] = numbers[..] else {
        panic!("{line}");
    };

    let stats = std::fs::read_to_string(stats).unwrap();
    let sum = |name: &str| -> u64 {
        let lines = stats.lines().filter(|line| line.starts_with(name));
        lines
            .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
            .sum()
    };
    let received = sum("ppv2_preload_datagrams_received_total");
    let delivered = sum("ppv2_preload_datagrams_delivered_total");
    let dropped = sum("ppv2_preload_datagrams_dropped_total{");
    assert_eq!(received, delivered + dropped, "{stats}");
    assert_eq!(sent, received + without_room, "{stats}");
    assert_eq!(delivered, got, "{stats}");
    let bad = sum("ppv2_preload_datagrams_dropped_total{reason=\"bad_pointer\"}");
    assert_eq!(bad, unreachable, "{stats}");
    assert!(got > 0 && dropped > bad, "{stats}");
}
