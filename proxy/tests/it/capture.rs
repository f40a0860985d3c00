//! `capture`: what tcpdump wrote of the real proxy's traffic, and how it ends.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use etherparse::PacketBuilder;
use ppv2_lab::dig::program;
use ppv2_lab::*;
use quinn_udp::{Transmit, UdpSocketState};
use serde_json::Value;

#[track_caller]
fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "no `{part}` in\n{text}");
    }
}

/// tcpdump on an interface. It writes each packet at once.
fn tcpdump(interface: &str, file: &Path) -> Process {
    let mut command = Command::new(program("tcpdump", "tcpdump"));
    command.args(["-n", "-i", interface, "-U", "--immediate-mode", "-s", "0"]);
    command.arg("-w").arg(file).arg("udp");
    let mut process = Process::start(&mut command);
    process.wait_for("listening on");
    process
}

/// What `capture` prints of a file, and how it ends.
fn capture(file: &Path, more: &[&str]) -> (Option<i32>, String, String) {
    let arguments = [&["capture", file.to_str().unwrap()], more].concat();
    output(&arguments)
}

/// Waits until a file has these bytes.
fn await_bytes(file: &Path, bytes: &[u8]) {
    let has_them = || {
        fs::read(file)
            .unwrap()
            .windows(bytes.len())
            .any(|it| it == bytes)
    };
    eventually("tcpdump to write the last packet", has_them);
}

#[test]
fn traffic_of_the_proxy_is_explained_by_link_type_and_family() {
    if !namespace::enter_not_as_root(test_name!()) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let files = ["lo", "any"].map(|name| folder.path().join(name));
    let mut dumps: Vec<_> = ["lo", "any"]
        .into_iter()
        .zip(&files)
        .map(|(interface, file)| tcpdump(interface, file))
        .collect();
    let mut expected = Vec::new();
    let mut ports = Vec::new();
    for ip in ["127.0.0.1", "::1"] {
        let (server, client) = (socket(ip), socket(ip));
        let listener = address(ip);
        let _proxy = proxy_between(listener, server.local_addr().unwrap(), &[]);
        served(&client, listener, &server);
        let from = client.local_addr().unwrap();
        expected.push(format!("PROXY v2, client {from}, destination {listener}; "));
        ports.push(server.local_addr().unwrap().port().to_string());
        client.send_to(b"the last one", listener).unwrap();
        receive(&server);
    }
    for (file, dump) in files.iter().zip(&mut dumps) {
        await_bytes(file, b"the last one");
        eventually("all packets", || {
            let (_, text, _) = capture(file, &[]);
            expected.iter().all(|part| text.contains(part))
        });
        dump.signal("INT");
        dump.wait();
        let ports = ports
            .iter()
            .flat_map(|port| ["--port", port])
            .collect::<Vec<_>>();
        let (status, text, stderr) = capture(file, &ports);
        assert_eq!(status, Some(0), "{text}{stderr}");
        has(&text, &[" without a header; 2 are replies\n"]);
        assert!(!text.contains("mistake"), "{text}");
    }
}

#[test]
fn each_datagram_of_a_burst_is_found() {
    const COUNT: usize = 40;
    if !namespace::enter_not_as_root(test_name!()) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("bursts.pcap");
    let mut dump = tcpdump("lo", &file);
    let server = socket("127.0.0.1");
    let listener = address("127.0.0.1");
    let to = server.local_addr().unwrap();
    let _proxy = proxy_between(listener, to, &[]);
    let client = socket("127.0.0.1");
    let state = UdpSocketState::new((&client).into()).unwrap();
    let transmit = Transmit {
        destination: listener,
        ecn: None,
        contents: &[b'x'; 100 * COUNT],
        segment_size: Some(100),
        src_ip: None,
    };
    state.try_send((&client).into(), &transmit).unwrap();
    for _ in 0..COUNT {
        let (datagram, _) = receive(&server);
        assert_eq!(datagram.len(), 28 + 100);
    }
    client.send_to(b"the last one", listener).unwrap();
    receive(&server);
    await_bytes(&file, b"the last one");
    let port = to.port().to_string();
    eventually("all packets", || {
        let (_, text, _) = capture(&file, &["--port", &port]);
        text.contains(&format!("{} UDP datagrams: {0} with PROXY v2", COUNT + 1))
    });
    dump.signal("INT");
    dump.wait();
    let (status, text, stderr) = capture(&file, &["--port", &port]);
    assert_eq!(status, Some(0), "{text}{stderr}");
    has(&text, &[&format!(" (1 of {COUNT}), ")]);
}

#[test]
fn a_header_that_is_said_once_is_a_mistake() {
    if !namespace::enter_not_as_root(test_name!()) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("first.pcap");
    let mut dump = tcpdump("lo", &file);
    let server = socket("127.0.0.1");
    let to = server.local_addr().unwrap();
    let send = [
        "send",
        &to.to_string(),
        "--emit",
        "first",
        "--count",
        "2",
        "--timeout",
        "10s",
    ];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..2 {
                let (_, from) = receive(&server);
                server.send_to(b"the last one", from).unwrap();
            }
        });
        let (status, text, stderr) = output(&send);
        assert_eq!(status, Some(0), "{text}{stderr}");
    });
    eventually("four packets", || {
        let (_, text, _) = capture(&file, &["--json"]);
        let summary: Option<Value> = text
            .lines()
            .last()
            .map(|it| serde_json::from_str(it).unwrap());
        summary.is_some_and(|it| it["summary"]["packets"] == 4)
    });
    dump.signal("INT");
    dump.wait();
    let (status, text, stderr) = capture(&file, &["--mistakes"]);
    assert_eq!(status, Some(1), "{text}");
    has(
        &text,
        &[
            "no header; the flow's first was in packet 1",
            "mistake (missing): 1, ",
        ],
    );
    has(&stderr, &["1 mistake in 1 datagram"]);
}

/// A pcap file with one datagram of raw IP.
fn one_datagram(folder: &tempfile::TempDir, payload: &[u8]) -> PathBuf {
    let mut packet = Vec::new();
    let builder = PacketBuilder::ipv4([192, 0, 2, 1], [192, 0, 2, 10], 64).udp(40_000, 53);
    builder.write(&mut packet, payload).unwrap();
    let len = u32::try_from(packet.len()).unwrap();
    let words = [0xa1b2_c3d4, 0x0004_0002, 0, 0, 65_535, 101, 1, 2, len, len];
    let head: Vec<_> = words
        .iter()
        .flat_map(|word: &u32| word.to_le_bytes())
        .collect();
    let file = folder.path().join("one.pcap");
    fs::write(&file, [head, packet].concat()).unwrap();
    file
}

#[test]
fn the_exit_code_tells_mistakes_from_files_that_cannot_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let client: SocketAddr = "203.0.113.11:54321".parse().unwrap();
    let mut buffer = [0; 28];
    let wildcard = "0.0.0.0:53".parse().unwrap();
    let header = ppv2::encode_udp(client, wildcard, &mut buffer).unwrap();
    let file = one_datagram(&folder, header);
    let (status, text, stderr) = capture(&file, &[]);
    assert_eq!(status, Some(1));
    has(
        &text,
        &["mistake (destination): destination 0.0.0.0:53 is a wildcard\n"],
    );
    has(&stderr, &["1 mistake in 1 datagram"]);

    // The same from a pipe.
    let mut command = Command::new(binary());
    command
        .args(["capture", "-"])
        .stdin(File::open(&file).unwrap());
    let piped = command.stdout(Stdio::piped()).output().unwrap();
    assert_eq!(String::from_utf8(piped.stdout).unwrap(), text);

    let name = file.to_str().unwrap();
    fs::write(&file, "no capture").unwrap();
    let (status, text, stderr) = capture(&file, &[]);
    assert_eq!((status, text.as_str()), (Some(2), ""));
    has(
        &stderr,
        &[
            name,
            "no pcap or pcapng file",
            "`tcpdump -ni any -w FILE udp`",
        ],
    );
    fs::remove_file(&file).unwrap();
    let (status, _, stderr) = capture(&file, &[]);
    assert_eq!(status, Some(2));
    has(&stderr, &[name, "No such file"]);
    let (status, _, stderr) = output(&["capture", folder.path().to_str().unwrap()]);
    assert_eq!(status, Some(2));
    has(&stderr, &["Is a directory"]);
    let (status, _, stderr) = output(&["capture", "x", "--port", "70000"]);
    assert_eq!(status, Some(2));
    has(&stderr, &["70000 is not in"]);
}
