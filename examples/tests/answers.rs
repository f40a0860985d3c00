//! Runs each example and speaks to it as a proxy does.
#![expect(clippy::unwrap_used, reason = "a failed test is the right answer")]

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const CLIENT: &str = "203.0.113.11:54321";

/// A running example, stopped when dropped.
struct Example {
    process: Child,
    address: SocketAddr,
}

impl Example {
    fn start(path: &str) -> Self {
        let mut process = Command::new(path)
            .args(["--listen", "127.0.0.1:0", "--trusted", "127.0.0.1", "::1"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stderr.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address = line.trim_end().strip_prefix("ready on ").expect(&line);
        let address = address.parse().unwrap();
        Self { process, address }
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// The example's answer to a client's `hello` that comes through a proxy.
fn answer(path: &str) -> String {
    let example = Example::start(path);
    let proxy = UdpSocket::bind("127.0.0.1:0").unwrap();
    proxy
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let mut buffer = [0; 64];
    let client = CLIENT.parse().unwrap();
    let header = ppv2::encode_udp(client, example.address, &mut buffer).unwrap();
    let datagram = [header, b"hello"].concat();
    proxy.send_to(b"no header", example.address).unwrap();
    proxy.send_to(&datagram, example.address).unwrap();
    let len = proxy.recv(&mut buffer).expect("an answer");
    String::from_utf8_lossy(&buffer[..len]).into_owned()
}

#[test]
fn whoami_answers_with_the_clients_address() {
    assert_eq!(answer(env!("CARGO_BIN_EXE_whoami_std")), CLIENT);
    assert_eq!(answer(env!("CARGO_BIN_EXE_whoami_tokio")), CLIENT);
}

#[test]
fn echo_answers_with_the_payload() {
    assert_eq!(answer(env!("CARGO_BIN_EXE_echo_std")), "hello");
    assert_eq!(answer(env!("CARGO_BIN_EXE_echo_tokio")), "hello");
}

#[test]
fn arguments_that_make_no_sense_are_refused() {
    for path in [
        env!("CARGO_BIN_EXE_echo_std"),
        env!("CARGO_BIN_EXE_echo_tokio"),
        env!("CARGO_BIN_EXE_whoami_std"),
        env!("CARGO_BIN_EXE_whoami_tokio"),
    ] {
        for (args, message) in [
            (vec![], "usage: "),
            (
                vec!["--listen", "127.0.0.1:0", "--trusted"],
                "no trusted network",
            ),
            (
                vec!["--listen", "127.0.0.1:0", "--trusted", "localhost"],
                "trusted network \"localhost\" is not a network",
            ),
        ] {
            let output = Command::new(path).args(args).output().unwrap();
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success());
            assert!(stderr.contains(message), "{stderr}");
        }
    }
}
