//! A test that waits for ever fails, and says what it waits for: `.ci/limited`, by which
//! `make unit` runs each test binary, ends it.

use std::env;
use std::io::{BufRead, BufReader, Write};
use std::net::UdpSocket;
use std::process::{Command, Output, Stdio};

const LIMITED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../.ci/limited");

/// Says that the test is to wait for ever.
const FOR_EVER: &str = "PPV2_TEST_FOR_EVER";

fn limited(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| {
        panic!("{LIMITED} needs the Debian package python3-minimal: {error}")
    })
}

#[inline(never)]
fn wait_for_a_datagram() {
    let nobody_knows = UdpSocket::bind("127.0.0.1:0").unwrap();
    nobody_knows.recv(&mut [0]).unwrap();
}

#[test]
fn hanging_test_fails_and_shows_its_stack() {
    let name = ppv2_lab::test_name!();
    if env::var_os(FOR_EVER).is_some() {
        // Which libtest says of it, only later.
        let said = format!("\ntest {name} has been running for over 60 seconds\n");
        let mut stdout = std::io::stdout();
        stdout.write_all(said.as_bytes()).unwrap();
        stdout.flush().unwrap();
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        wait_for_a_datagram();
        child.wait().unwrap();
    }
    // It would not return while anything is left that could write.
    let output = limited(
        Command::new(LIMITED)
            .args(["--after", "1"])
            .arg(env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(FOR_EVER, "1"),
    );
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(101), "{said}");
    for word in [
        &format!("test {name} FAILED"),
        "wait_for_a_datagram",
        "sleep 1000",
    ] {
        assert!(said.contains(word), "{word} is missing:\n{said}");
    }
}

#[test]
fn test_ends_with_the_process_that_started_it() {
    let script = "\"$0\" sh -c 'echo begun; exec sleep 1000' & read line";
    let mut shell = Command::new("sh")
        .args(["-c", script, LIMITED])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(shell.stdout.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert_eq!(line, "begun\n");
    // The shell ends, and the pipe once all that could write to it has.
    drop(shell.stdin.take());
    assert!(!shell.wait().unwrap().success());
    assert_eq!(said.read_line(&mut line).unwrap(), 0);
}

#[test]
fn exit_code_and_output_pass_through() {
    for (script, code, said) in [
        ("echo done; exit 3", 3, "done\n"),
        ("kill -9 $$", 137, ""),
        ("test -t 0 || cat", 0, "asked"),
    ] {
        let mut command = Command::new("sh");
        command.args(["-c", "printf asked | \"$0\" sh -c \"$1\"", LIMITED, script]);
        let output = limited(&mut command);
        assert_eq!(output.status.code(), Some(code), "{script}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), said, "{script}");
    }
}
