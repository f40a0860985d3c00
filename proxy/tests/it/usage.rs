//! What the binary says, and how it ends, when it is used wrongly: 2 for usage
//! and configuration, before any socket exists; 1 for what the host refuses.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ppv2_lab::service::Proxy;
use ppv2_lab::*;

#[track_caller]
fn fails(arguments: &[&str], code: i32, parts: &[&str]) {
    let (status, stdout, stderr) = output(arguments);
    assert_eq!(status, Some(code), "{arguments:?}\n{stderr}");
    assert_eq!(stdout, "", "{arguments:?}");
    for part in parts {
        assert!(
            stderr.contains(part),
            "{arguments:?}: no `{part}` in\n{stderr}"
        );
    }
    assert!(!stderr.contains("ready"), "{arguments:?}:\n{stderr}");
}

#[test]
fn wrong_flags_exit_with_2_and_name_the_fix() {
    fails(&[], 2, &["Usage"]);
    fails(&["run"], 2, &["--listen", "--upstream"]);
    fails(&["run", "--listen", "127.0.0.1:1"], 2, &["--upstream"]);
    let run = [
        "run",
        "--listen",
        "127.0.0.1:9",
        "--upstream",
        "127.0.0.1:10",
    ];
    let with = |more: &[&'static str]| [&run[..], more].concat();
    fails(
        &with(&["--config", "x.toml"]),
        2,
        &["--config", "cannot be used with"],
    );
    fails(
        &with(&["--mode", "magic"]),
        2,
        &["'magic' for '--mode", "ppv2, transparent, dsr, plain"],
    );
    fails(
        &with(&["--balance", "roundrobin"]),
        2,
        &[
            "'roundrobin' for '--balance",
            "a similar value exists: 'round_robin'",
        ],
    );
    fails(
        &with(&["--workers", "0"]),
        2,
        &["--workers", "0 is out of range", "1 to"],
    );
    fails(
        &with(&["--max-sessions", "0"]),
        2,
        &["--max-sessions", "0 is out of range"],
    );
    fails(
        &with(&["--idle-timeout", "soon"]),
        2,
        &["--idle-timeout", "`soon` is not a duration", "\"30s\""],
    );
    fails(
        &with(&["--allow", "10.0.0.0/40"]),
        2,
        &["`10.0.0.0/40` is not a network"],
    );
    fails(&with(&["--admin", "here"]), 2, &["'here' for '--admin"]);
    fails(&with(&["--log-level", "=[]"]), 2, &["--log-level"]);
    fails(&with(&["--listn", "x"]), 2, &["--listen"]);
    fails(
        &[
            "run",
            "--listen",
            "127.0.0.1:0",
            "--upstream",
            "127.0.0.1:1",
        ],
        2,
        &["port 0"],
    );
    fails(
        &[
            "run",
            "--listen",
            "127.0.0.1:1",
            "--upstream",
            "127.0.0.1:0",
        ],
        2,
        &["port 0"],
    );
    fails(
        &[
            "run",
            "--listen",
            "127.0.0.1:1",
            "--upstream",
            "127.0.0.1:1",
        ],
        2,
        &["own address"],
    );
    let unresolved = [
        "run",
        "--listen",
        "127.0.0.1:1",
        "--upstream",
        "nowhere.invalid:1",
    ];
    fails(&unresolved, 2, &["nowhere.invalid:1", "does not resolve"]);
}

#[test]
fn wrong_files_exit_with_2_and_show_the_line() {
    let folder = tempfile::tempdir().unwrap();
    for command in ["run", "check"] {
        fails(
            &[command, "--config", "/nonexistent.toml"],
            2,
            &["/nonexistent.toml", "No such"],
        );
        for (content, parts) in [
            (
                "[[listener]]\nbnd = []\n",
                vec![".toml:2:1", "unknown key `bnd`", "`bind`"],
            ),
            ("[[listener]\n", vec![".toml:1:"]),
            ("\u{0}", vec![".toml:1:"]),
            ("", vec!["no listener"]),
        ] {
            let file = write(&folder, "wrong.toml", content);
            fails(&[command, "--config", file.to_str().unwrap()], 2, &parts);
        }
    }
}

#[test]
fn flags_other_than_the_logs_are_refused_beside_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = write(&folder, "empty.toml", "");
    let run = ["run", "--config", file.to_str().unwrap()];
    let (_, help, _) = output(&["run", "--help"]);
    let flags = help.lines().filter_map(|line| {
        let flag = line.trim_start().strip_prefix("--")?;
        flag.split_once(' ').map(|(name, _)| format!("--{name}"))
    });
    let mut refused = 0;
    for flag in flags {
        if flag == "--config" {
            continue;
        }
        let value = match flag.as_str() {
            "--log-level" => "debug",
            "--log-format" => "json",
            "--admin" | "--listen" | "--upstream" => "127.0.0.1:1",
            "--allow" | "--accept-from" => "192.0.2.0/24",
            "--balance" => "maglev",
            "--busy-poll" | "--coalesce" => "100us",
            "--idle-timeout" => "1s",
            "--mode" => "plain",
            "--replies" => "auto",
            "--rewrite-on" => "sdk",
            "--source" => "127.64.0.0/10",
            "--source-port" => "any",
            _ => "1",
        };
        let command = [&run[..], &[&flag, value]].concat();
        if flag.starts_with("--log-") || flag == "--takeover" {
            fails(&command, 2, &["no listener"]);
        } else {
            fails(&command, 2, &[&flag, "cannot be used with", "--config"]);
            refused += 1;
        }
    }
    assert!(refused >= 12, "{help}");
    let mut with_level = Command::new(binary());
    with_level.args(run).env("PPV2_LOG", "debug");
    let stderr = String::from_utf8(with_level.output().unwrap().stderr).unwrap();
    assert!(stderr.contains("no listener"), "{stderr}");
}

#[test]
fn check_binds_nothing_and_reports() {
    let listener = address("127.0.0.1");
    let holder = bind(listener);
    let folder = tempfile::tempdir().unwrap();
    let content = format!(
        "[[listener]]\nname = \"dns\"\nbind = [\"{listener}\"]\nupstream = \"u\"\n\
         [upstream.u]\nservers = [\"localhost:53\"]\n"
    );
    let file = write(&folder, "right.toml", &content);
    let (status, stdout, stderr) = output(&["check", "--config", file.to_str().unwrap()]);
    assert_eq!(status, Some(0), "{stderr}");
    assert!(
        stdout.contains(&format!("listener dns: {listener}")),
        "{stdout}"
    );
    assert!(stdout.contains("(localhost:53) ppv2"), "{stdout}");
    drop(holder);
}

#[test]
fn address_in_use_exits_with_1_and_names_its_owner() {
    let listener = address("127.0.0.1");
    let holder = bind(listener);
    let pid = format!("pid {}", std::process::id());
    let listen = listener.to_string();
    let run = ["run", "--listen", &listen, "--upstream", "127.0.0.1:1"];
    fails(&run, 1, &[&listen, "in use", &pid, "another port"]);
    // A wildcard of the same port is held by the same process.
    let wildcard = format!("0.0.0.0:{}", listener.port());
    let run = ["run", "--listen", &wildcard, "--upstream", "127.0.0.2:1"];
    fails(&run, 1, &[&wildcard, "in use", &pid]);
    drop(holder);
}

#[test]
fn second_proxy_on_the_same_address_is_refused() {
    let listener = address("127.0.0.1");
    let first = proxy_between(listener, address("127.0.0.1"), &["--workers", "2"]);
    let listen = listener.to_string();
    let pid = format!("ppv2-proxy (pid {})", first.pid());
    let run = [
        "run",
        "--workers",
        "2",
        "--listen",
        &listen,
        "--upstream",
        "127.0.0.1:1",
    ];
    fails(&run, 1, &[&listen, "in use", &pid]);
}

#[test]
fn missing_listener_address_exits_with_1() {
    let run = [
        "run",
        "--listen",
        "203.0.113.99:5300",
        "--upstream",
        "127.0.0.1:1",
    ];
    fails(
        &run,
        1,
        &["203.0.113.99:5300", "use an address that this host has"],
    );
    let listen = address("127.0.0.1").to_string();
    let admin = ["--admin", "203.0.113.99:80"];
    let run = [
        &["run", "--listen", &listen, "--upstream", "127.0.0.1:1"],
        &admin[..],
    ]
    .concat();
    fails(&run, 1, &["admin address 203.0.113.99:80"]);
}

#[test]
fn missing_source_address_exits_with_1() {
    let folder = tempfile::tempdir().unwrap();
    let content = format!(
        "[[listener]]\nbind = [\"{}\"]\nupstream = \"u\"\n\
         [upstream.u]\nsource = [\"203.0.113.99\"]\nservers = [\"127.0.0.1:1\"]\n",
        address("127.0.0.1")
    );
    let file = write(&folder, "proxy.toml", &content);
    let run = ["run", "--config", file.to_str().unwrap()];
    fails(
        &run,
        1,
        &["source 203.0.113.99", "use an address that this host has"],
    );
}

#[test]
fn one_address_out_of_two_is_not_ready() {
    let (free, taken) = (address("127.0.0.1"), address("127.0.0.1"));
    let _holder = bind(taken);
    let (free, taken) = (free.to_string(), taken.to_string());
    let run = [
        "run",
        "--listen",
        &free,
        "--listen",
        &taken,
        "--upstream",
        "127.0.0.1:1",
    ];
    fails(&run, 1, &[&taken]);
}

#[test]
fn decode_explains_from_argument_and_standard_input() {
    let hex = "0d0a0d0a 000d0a51 5549540a 2112000c cb00710b c633640a d4312328 68656c6c6f";
    let (status, stdout, _) = output(&["decode", hex]);
    assert_eq!(status, Some(0));
    for part in ["203.0.113.11", "54321", "198.51.100.10", "9000", "5 bytes"] {
        assert!(stdout.contains(part), "{stdout}");
    }
    let mut child = Command::new(binary())
        .args(["decode", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(hex.as_bytes())
        .unwrap();
    let piped = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(piped.stdout).unwrap(), stdout);

    let spp = "56ec 00000000000000000000ffffcb00710b 00000000000000000000ffffc633640a d4312328 68656c6c6f";
    let (status, stdout, _) = output(&["decode", spp]);
    assert_eq!(status, Some(0));
    for part in ["Simple Proxy Protocol", "203.0.113.11", "9000", "5 bytes"] {
        assert!(stdout.contains(part), "{stdout}");
    }

    fails(
        &["decode", "56ec00"],
        1,
        &["not a valid SPP header: byte 3"],
    );
    let version_1: String = b"PROXY TCP4 203.0.113.11 198.51.100.10 54321 9000\r\nhello"
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let parts = [
        "text of PROXY protocol v1",
        "receivers of UDP drop it",
        "`proxy_protocol v2;`",
    ];
    fails(&["decode", &version_1], 1, &parts);
    fails(&["decode", "xyz"], 2, &["`x` at character 1"]);
    fails(&["decode", "\u{1b}[2J"], 2, &["`\\u{1b}` at character 1"]);
    fails(
        &["decode", "0d0a0d0a000d0a515549540a31"],
        1,
        &["not a valid header"],
    );
}

#[test]
fn decode_reads_no_more_than_a_datagram_takes() {
    let endless = |path: &str| {
        // A reader without bound would take all memory.
        let mut command = Command::new("prlimit");
        let input = File::open(path).unwrap();
        let limited = ["--as=1000000000", "timeout", "60"];
        command.args(limited).arg(binary()).arg("decode");
        command.stdin(input).output()
    };
    let output = endless("/dev/zero").unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("more than 1048576 bytes"), "{stderr}");
    // The longest datagram, as hexdump(1) and the like print it.
    let folder = tempfile::tempdir().unwrap();
    let longest = format!(
        "0d0a0d0a000d0a515549540a20000000{}",
        "\n  00".repeat(65_519)
    );
    let file = write(&folder, "hex", &longest);
    let output = endless(file.to_str().unwrap()).unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{stdout}");
    assert!(stdout.contains("65519 bytes"), "{stdout}");
}

#[test]
fn demo_shows_the_clients_address() {
    let (status, stdout, stderr) = output(&["demo"]);
    assert_eq!(status, Some(0), "{stderr}");
    let same = "the client's address as the server read it is the client's own";
    assert_eq!(stdout.matches(same).count(), 2, "{stdout}");
    assert!(stdout.contains("proxy running with uid"), "{stdout}");
}

#[test]
fn whoami_answers_clients_of_the_proxy_and_nobody_else() {
    let (listener, server) = (address("127.0.0.1"), address("127.0.0.1"));
    let listen = server.to_string();
    let arguments = ["whoami", "--listen", &listen, "--trusted", "127.0.0.1/32"];
    let mut whoami = Process::start(Command::new(binary()).args(arguments));
    whoami.wait_for("ready");
    let _proxy = proxy_between(listener, server, &[]);
    let client = socket("127.0.0.50");
    client.send_to(b"?", listener).unwrap();
    let own = client.local_addr().unwrap().to_string();
    assert_eq!(receive(&client), (own.into_bytes(), listener));
    client.send_to(b"?", server).unwrap();
    receive_nothing(&client);
    // The operator is told why, and what to change.
    let sender = client.local_addr().unwrap();
    whoami.wait_for(&format!("dropped a datagram from {sender} (untrusted): "));
    whoami.wait_for("add it to `trusted`");
    fails(
        &["whoami", "--listen", "127.0.0.1:1", "--trusted", "x"],
        2,
        &["x"],
    );
    fails(&["whoami", "--listen", "127.0.0.1:1"], 2, &["--trusted"]);
}

/// A server of the command `whoami` on 127.0.0.1 that trusts that host.
fn whoami_with(options: &[&str]) -> (Process, SocketAddr) {
    let server = address("127.0.0.1");
    (whoami_at(server, options), server)
}

fn whoami_at(server: SocketAddr, options: &[&str]) -> Process {
    let listen = server.to_string();
    let arguments = ["whoami", "--listen", &listen, "--trusted", "127.0.0.1"];
    let mut whoami = Process::start(Command::new(binary()).args(arguments).args(options));
    whoami.wait_for("ready");
    whoami
}

#[test]
fn whoami_reads_other_formats() {
    let (client, proxy) = ("203.0.113.11:7", "198.51.100.10:9000");
    let (client, proxy) = (client.parse().unwrap(), proxy.parse().unwrap());
    let simple = ppv2::spp::SppHeader { client, proxy }.to_bytes();
    let mut buffer = [0; ppv2::MAX_UDP_HEADER_LEN];
    let v2 = ppv2::encode_udp(client, proxy, &mut buffer).unwrap();
    let sender = socket("127.0.0.1");
    for (options, reads_v2) in [
        (&["--format", "spp"][..], false),
        (&["--format", "spp", "--format", "v2"], true),
    ] {
        let (_whoami, server) = whoami_with(options);
        sender.send_to(&simple, server).unwrap();
        let answer = [&simple[..], b"203.0.113.11:7"].concat();
        assert_eq!(receive(&sender), (answer, server));
        if reads_v2 {
            sender.send_to(v2, server).unwrap();
            assert_eq!(receive(&sender), (b"203.0.113.11:7".to_vec(), server));
        }
    }
    let both = ["whoami", "--listen", "127.0.0.1:1", "--trusted", "::1"];
    let both = [&both[..], &["--format", "spp", "--remember", "30s"]].concat();
    fails(
        &both,
        2,
        &["--remember 30s: with `--format spp`", "leave out one"],
    );
}

#[test]
fn whoami_answers_by_simple_proxy_protocol() {
    let (_whoami, server) = whoami_with(&["--format", "spp"]);
    let listener = address("127.0.0.1");
    let _proxy = Proxy::start(&format!(
        "[[listener]]\nname = \"l\"\nbind = [\"{listener}\"]\nupstream = \"u\"\n\
         [upstream.u]\nservers = [\"{server}\"]\nheader = {{ format = \"spp\" }}\n"
    ));
    let clients = ["127.0.0.50", "127.0.0.50", "127.0.0.51"].map(socket);
    for payload in [&b"?"[..], b"", &[7; 1200]] {
        for client in &clients {
            client.send_to(payload, listener).unwrap();
        }
        for client in &clients {
            let own = client.local_addr().unwrap().to_string();
            assert_eq!(receive(client), (own.into_bytes(), listener));
        }
    }
}

#[test]
fn whoami_remembers_what_emit_first_says_once() {
    let (whoami, server) = whoami_with(&["--remember", "1m"]);
    let listener = address("127.0.0.1");
    let _proxy = Proxy::start(&format!(
        "[[listener]]\nname = \"l\"\nbind = [\"{listener}\"]\nupstream = \"u\"\n\
         [upstream.u]\nservers = [\"{server}\"]\nheader = {{ emit = \"first\" }}\n"
    ));
    let clients = [(); 5].map(|()| socket("127.0.0.50"));
    for _ in 0..5 {
        for client in &clients {
            client.send_to(b"?", listener).unwrap();
        }
        for client in &clients {
            let own = client.local_addr().unwrap().to_string();
            assert_eq!(receive(client), (own.into_bytes(), listener));
        }
    }
    // One that has been restarted has forgotten all, and is told again.
    drop(whoami);
    let _whoami = whoami_at(server, &["--remember", "1m"]);
    let client = &clients[0];
    client
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    eventually("the server is told who the client is", || {
        client.send_to(b"?", listener).unwrap();
        client.recv(&mut [0; 99]).is_ok()
    });
}

#[test]
fn whoami_names_its_port_and_takes_no_address_of_many_hosts() {
    let whoami = |listen| ["whoami", "--listen", listen, "--trusted", "127.0.0.1/32"];
    for many in [
        "224.0.0.1:9000",
        "[ff02::1]:9000",
        "[::ffff:224.0.0.1]:9000",
        "255.255.255.255:9000",
        "127.255.255.255:9000",
    ] {
        fails(&whoami(many), 2, &[many, "is no host's address"]);
    }
    let mut running = Process::start(Command::new(binary()).args(whoami("127.0.0.1:0")));
    running.wait_for("ready");
    let log = running.log();
    let (_, port) = log.split_once("listen=127.0.0.1:").unwrap();
    let port: u16 = port.split_whitespace().next().unwrap().parse().unwrap();
    // It has just that one.
    let held = UdpSocket::bind(("127.0.0.1", port)).unwrap_err();
    assert_eq!(held.kind(), ErrorKind::AddrInUse);
}

/// Runs the proxy with `stderr`, which `after` may spoil once datagrams pass, and
/// asserts that it serves, outlives a line in the log and stops when told.
#[track_caller]
fn serves_with_standard_error(stderr: Stdio, after: impl FnOnce()) {
    let (listener, server) = (address("127.0.0.1"), bind(address("127.0.0.1")));
    let upstream = server.local_addr().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let config = format!(
        "drain_timeout = \"50ms\"\n\
         [[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\nallow = [\"127.0.0.1\"]\n\
         [upstream.u]\nservers = [\"{upstream}\"]\n"
    );
    let mut child = Command::new(binary())
        .args(["run", "--config"])
        .arg(write(&folder, "proxy.toml", &config))
        .env("PPV2_LOG", "trace")
        .stdin(Stdio::null())
        .stderr(stderr)
        .spawn()
        .unwrap();
    let client = socket("127.0.0.1");
    let passes = || {
        server
            .set_read_timeout(Some(Duration::from_millis(50)))
            .unwrap();
        let deadline = Instant::now() + TIMEOUT;
        loop {
            // It is refused as long as nobody listens there.
            let _ = client.send_to(b"?", listener);
            if server.recv_from(&mut [0; 100]).is_ok() {
                return;
            }
            assert!(Instant::now() < deadline, "no datagram passes");
        }
    };
    passes();
    after();
    // Its refusal is told within a second, and a new session at once.
    socket("127.0.0.2").send_to(b"?", listener).unwrap();
    socket("127.0.0.1").send_to(b"?", listener).unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    passes();
    let pid = child.id().to_string();
    let sent = Command::new("kill").args(["-s", "TERM", &pid]).status();
    assert!(sent.unwrap().success());
    let mut ended = None;
    eventually("the end", || {
        ended = child.try_wait().unwrap();
        ended.is_some()
    });
    assert_eq!(ended.unwrap().code(), Some(0));
}

#[test]
fn full_standard_error_stops_nothing() {
    let full = || File::options().write(true).open("/dev/full").unwrap();
    serves_with_standard_error(full().into(), || ());
    let status = Command::new(binary())
        .args(["decode", "xyz"])
        .stderr(full())
        .status();
    assert_eq!(status.unwrap().code(), Some(2));
}

#[test]
fn closed_standard_error_stops_nothing() {
    let (reader, writer) = std::io::pipe().unwrap();
    serves_with_standard_error(writer.into(), || drop(reader));
}

#[test]
fn stalled_reader_of_standard_error_stops_nothing() {
    let (_reader, mut writer) = UnixStream::pair().unwrap();
    writer.set_nonblocking(true).unwrap();
    let full = loop {
        if let Err(error) = writer.write(&[b'x'; 4096]) {
            break error;
        }
    };
    assert_eq!(full.kind(), ErrorKind::WouldBlock);
    writer.set_nonblocking(false).unwrap();
    serves_with_standard_error(OwnedFd::from(writer).into(), || ());
}

/// Where workers share addresses, the kernel lets other processes of the same user in.
#[test]
fn user_with_other_processes_is_warned_about() {
    // For an ordinary user; root's proxy is `nobody`.
    let mut other = Command::new("sleep").arg("60").spawn().unwrap();
    let warns = |more: &[&str]| {
        let (listener, upstream) = (address("127.0.0.1"), address("127.0.0.1"));
        let log = proxy_between(listener, upstream, more).log();
        log.contains("run the proxy as a user of its own")
    };
    assert!(warns(&["--workers", "2"]));
    assert!(!warns(&["--workers", "1"]));
    if rustix::process::geteuid().is_root() {
        assert!(!warns(&["--workers", "2", "--user", "54321"]));
    }
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
fn root_becomes_nobody() {
    let (listener, upstream) = (address("127.0.0.1").to_string(), "127.0.0.1:1");
    let with = |user| {
        [
            "run",
            "--listen",
            &listener,
            "--upstream",
            upstream,
            "--user",
            user,
        ]
    };
    fails(&with("root"), 2, &["`root` is root", "an ordinary user"]);
    fails(&with("nosuchuser"), 2, &["there is no user `nosuchuser`"]);
    if rustix::process::geteuid().is_root() {
        let mut process = Process::start(Command::new(binary()).args(with("daemon")));
        process.wait_for("ready");
        let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
        let line = |key: &str| status.lines().find_map(|line| line.strip_prefix(key));
        assert_eq!(line("Uid:"), Some("\t1\t1\t1\t1"));
        assert_eq!(line("Gid:"), Some("\t1\t1\t1\t1"));
        assert_eq!(line("Groups:").map(str::trim), Some("1"));
        assert_eq!(line("CapPrm:"), Some("\t0000000000000000"));
        assert_eq!(line("NoNewPrivs:"), Some("\t1"));
    } else {
        fails(&with("daemon"), 1, &["only root can become `daemon`"]);
    }
}
