//! Runs each example and speaks to it as a proxy does.

use std::process::Command;

use ppv2_lab::socket;

use crate::running::Example;

const CLIENT: &str = "203.0.113.11:54321";

/// The example's answer to a client's `hello` that comes through a proxy.
fn answer(path: &str) -> String {
    let example = Example::start(path);
    let proxy = socket("127.0.0.1");
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
        env!("CARGO_BIN_EXE_dns_hickory"),
        env!("CARGO_BIN_EXE_http3_quinn"),
        env!("CARGO_BIN_EXE_game_tokio"),
        env!("CARGO_BIN_EXE_rate_limit_std"),
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
