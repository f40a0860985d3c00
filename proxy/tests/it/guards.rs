//! What clients are kept from, as they and the operator see it, and what the
//! access log tells of those that were served.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use ppv2_lab::*;

/// A proxy whose listener has these settings besides; its server and addresses.
struct Guarded {
    proxy: Process,
    server: UdpSocket,
    listener: SocketAddr,
    admin: SocketAddr,
    folder: tempfile::TempDir,
}

fn guarded(top: &str, of_listener: &str) -> Guarded {
    guarded_at("127.0.0.1", top, of_listener)
}

fn guarded_at(host: &str, top: &str, of_listener: &str) -> Guarded {
    let (listener, admin) = (address(host), address(host));
    let server = socket(host);
    let folder = tempfile::tempdir().unwrap();
    // The proxy may run as another user than the test.
    let status = std::process::Command::new("chmod")
        .arg("777")
        .arg(folder.path())
        .status();
    assert!(status.unwrap().success());
    let config = format!(
        "{}\n[admin]\nlisten = \"{admin}\"\n[[listener]]\nbind = [\"{listener}\"]\n\
         upstream = \"u\"\n{of_listener}\n[upstream.u]\nservers = [\"{}\"]\n",
        top.replace("FOLDER", folder.path().to_str().unwrap()),
        server.local_addr().unwrap()
    );
    let proxy = proxy_with(&folder, &config);
    Guarded {
        proxy,
        server,
        listener,
        admin,
        folder,
    }
}

#[test]
fn deny_overrides_allow() {
    let it = guarded("", "allow = [\"127.0.0.0/8\"]\ndeny = [\"127.0.7.0/24\"]");
    let denied = socket("127.0.7.7");
    denied.send_to(b"question", it.listener).unwrap();
    receive_nothing(&it.server);
    served(&socket("127.0.8.7"), it.listener, &it.server);
    eventually("the drop", || dropped(it.admin, "not_allowed") == 1);
}

#[test]
fn sessions_of_one_client_are_limited() {
    let it = guarded(
        "workers = 2",
        "responses = 1\nper_client = { sessions = 2 }",
    );
    let clients: Vec<_> = (0..3).map(|_| socket("127.0.0.2")).collect();
    for client in &clients {
        client.send_to(b"question", it.listener).unwrap();
    }
    eventually("one too many", || dropped(it.admin, "client_sessions") == 1);
    let asked = [(); 2].map(|()| receive(&it.server).1);
    served(&socket("127.0.0.3"), it.listener, &it.server);
    // With its answer a session ends, and another may begin.
    it.server.send_to(b"answer", asked[0]).unwrap();
    eventually("one to end", || {
        metric(it.admin, "ppv2_sessions{listener=\"listener1\"}") == 1
    });
    served(&socket("127.0.0.2"), it.listener, &it.server);
}

#[test]
fn rate_limit_slows_the_fast_client_alone() {
    let it = guarded("", "per_client = { rate = 1, burst = 5 }");
    let fast = socket("127.0.0.2");
    for _ in 0..50 {
        fast.send_to(b"question", it.listener).unwrap();
    }
    served(&socket("127.0.0.3"), it.listener, &it.server_after(5));
    // The other client may be another worker's, which has nothing to wait for;
    // and seconds may pass meanwhile, with a token each.
    eventually("most to be refused", || {
        (30..=45).contains(&dropped(it.admin, "client_rate"))
    });
}

#[test]
fn rate_limit_spares_answered_sessions_from_forged_datagrams() {
    for host in ["127.0.0.1", "::1"] {
        let it = guarded_at(host, "", "per_client = { rate = 1, burst = 5 }");
        let client = socket(host);
        served(&client, it.listener, &it.server);
        // In the client's name, from other ports.
        for _ in 0..50 {
            socket(host).send_to(b"forged", it.listener).unwrap();
        }
        it.server.set_nonblocking(true).unwrap();
        let mut passed = 0;
        eventually("all forged ones to be passed or refused", || {
            passed += u64::from(it.server.recv(&mut [0; 100]).is_ok());
            passed + dropped(it.admin, "client_rate") == 50
        });
        it.server.set_nonblocking(false).unwrap();
        for _ in 0..4 {
            served(&client, it.listener, &it.server);
        }
        // Its own bucket has a bottom, too.
        let before = dropped(it.admin, "client_rate");
        for _ in 0..50 {
            client.send_to(b"question", it.listener).unwrap();
        }
        eventually("most of its own to be refused", || {
            dropped(it.admin, "client_rate") >= before + 30
        });
    }
}

impl Guarded {
    /// The server, past so many datagrams.
    fn server_after(&self, datagrams: usize) -> UdpSocket {
        for _ in 0..datagrams {
            receive(&self.server);
        }
        self.server.try_clone().unwrap()
    }
}

#[test]
fn amplification_is_limited() {
    for action in ["enforce", "watch"] {
        let rule = format!("amplification = {{ limit = 2, action = \"{action}\" }}");
        let it = guarded("", &rule);
        let client = socket("127.0.0.1");
        client.send_to(&[b'q'; 100], it.listener).unwrap();
        let (_, session) = receive(&it.server);
        for _ in 0..3 {
            it.server.send_to(&[b'a'; 100], session).unwrap();
        }
        for _ in 0..2 {
            assert_eq!(receive(&client).0.len(), 100);
        }
        let amplified = "ppv2_amplified_replies_total{listener=\"listener1\"}";
        eventually("one too many", || metric(it.admin, amplified) == 1);
        if action == "enforce" {
            receive_nothing(&client);
            eventually("the drop", || dropped(it.admin, "reply_amplified") == 1);
            // It has asked for more.
            client.send_to(&[b'q'; 100], it.listener).unwrap();
            receive(&it.server);
            it.server.send_to(&[b'a'; 100], session).unwrap();
        }
        assert_eq!(receive(&client).0.len(), 100);
    }
}

#[test]
fn without_reuse_port_every_address_is_served_by_one_worker() {
    let (second, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let first = address("127.0.0.1");
    let server = socket("127.0.0.1");
    let folder = tempfile::tempdir().unwrap();
    let config = format!(
        "workers = 2\nreuse_port = false\n[admin]\nlisten = \"{admin}\"\n[[listener]]\n\
         bind = [\"{first}\", \"{second}\"]\nupstream = \"u\"\n[upstream.u]\nservers = [\"{}\"]\n",
        server.local_addr().unwrap()
    );
    let proxy = proxy_with(&folder, &config);
    for listener in [first, second] {
        for _ in 0..10 {
            served(&socket("127.0.0.1"), listener, &server);
        }
    }
    let udp = fs::read_to_string(format!("/proc/{}/net/udp", proxy.pid())).unwrap();
    for listener in [first, second] {
        let bound = format!("0100007F:{:04X} 00000000:0000", listener.port());
        assert_eq!(udp.matches(&bound).count(), 1, "{udp}");
    }
}

#[test]
fn the_access_log_has_a_line_for_each_session_that_ended() {
    let it = guarded(
        "[access_log]\npath = \"FOLDER/access.log\"\nformat = \"json\"",
        "name = \"dns\"\nresponses = 1",
    );
    let client = socket("127.0.0.1");
    served(&client, it.listener, &it.server);
    let file = it.folder.path().join("access.log");
    let lines = |file| -> Vec<serde_json::Value> {
        let text = fs::read_to_string(file).unwrap_or_default();
        let lines = text.lines().map(serde_json::from_str);
        lines.collect::<Result<_, _>>().unwrap_or_default()
    };
    eventually("the first line", || lines(&file).len() == 1);
    let line = &lines(&file)[0];
    assert_eq!(line["client"], client.local_addr().unwrap().to_string());
    assert_eq!(line["local"], it.listener.to_string());
    let counts = ["requests", "request_bytes", "replies", "reply_bytes"];
    assert_eq!(counts.map(|key| line[key].as_u64()), [1, 8, 1, 6].map(Some));
    assert_eq!(
        (&line["listener"], &line["upstream"], &line["reason"]),
        (&"dns".into(), &"u".into(), &"responses".into())
    );

    // Moved away, as logrotate does.
    let old = it.folder.path().join("access.log.1");
    fs::rename(&file, &old).unwrap();
    it.proxy.signal("HUP");
    eventually("a new file", || file.exists());
    let waiting = socket("127.0.0.1");
    waiting.send_to(b"question", it.listener).unwrap();
    receive(&it.server);
    let mut proxy = it.proxy;
    proxy.signal("TERM");
    eventually("the drain", || proxy.log().contains("shutting down"));
    proxy.signal("TERM");
    assert_eq!(proxy.wait().0.code(), Some(0));
    assert_eq!(lines(&old).len(), 1);
    assert_eq!(lines(&file)[0]["reason"], "stopped");
    assert_eq!(lines(&file)[0]["replies"], 0);
}

const UNLOGGED: &str = "ppv2_sessions_unlogged_total";

/// The lines that are whole.
fn whole_lines(file: &Path) -> u64 {
    let text = fs::read_to_string(file).unwrap();
    let lines = text.lines();
    let whole = lines.filter(|line| serde_json::from_str::<serde_json::Value>(line).is_ok());
    whole.count() as u64
}

#[test]
fn lines_lost_to_a_full_disk_are_counted_and_reported_once() {
    if !namespace::enter(
        test_name!(),
        "mount -t tmpfs -o size=64k,mode=777 tmpfs /mnt",
    ) {
        return;
    }
    let it = guarded(
        "[access_log]\npath = \"/mnt/access.log\"\nformat = \"json\"",
        "responses = 1",
    );
    let end = |sessions: u64| {
        for _ in 0..sessions {
            served(&socket("127.0.0.1"), it.listener, &it.server);
        }
    };
    let unlogged = || metric(it.admin, UNLOGGED);
    let file = Path::new("/mnt/access.log");
    let filler = Path::new("/mnt/filler");
    // All but a page, in the middle of a line.
    let mut other = fs::File::create(filler).unwrap();
    while other.write_all(&[0; 4096]).is_ok() {}
    let len = other.metadata().unwrap().len();
    other.set_len(len - 4096).unwrap();

    let mut ended = 0;
    for _ in 0..3 {
        end(40);
        ended += 40;
        eventually("each line to be there or counted", || {
            whole_lines(file) + unlogged() == ended
        });
    }
    let lost = unlogged();
    assert!((80..120).contains(&lost), "{lost}");
    fs::remove_file(filler).unwrap();
    drop(other);
    end(10);
    eventually("all lines that came later", || {
        whole_lines(file) == ended - lost + 10
    });
    assert_eq!(unlogged(), lost);
    let told = |words| it.proxy.log().matches(words).count();
    eventually("the end to be told", || {
        told("the access log is written again") == 1
    });
    assert_eq!(told("the access log can't be written"), 1);
}

#[test]
fn every_lost_access_log_line_is_counted() {
    let it = guarded("[access_log]\npath = \"/dev/full\"", "responses = 1");
    for lost in 1..4 {
        served(&socket("127.0.0.1"), it.listener, &it.server);
        eventually("a loss", || metric(it.admin, UNLOGGED) == lost);
    }
    let mut proxy = it.proxy;
    proxy.signal("TERM");
    let (status, log) = proxy.wait();
    assert!(status.success(), "{log}");
    assert_eq!(log.matches("can't be written").count(), 1, "{log}");
}

#[test]
fn abandoned_access_log_pipe_delays_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    let made = std::process::Command::new("mkfifo")
        .args(["-m", "666"])
        .arg(&pipe)
        .status();
    assert!(made.unwrap().success());
    let log = format!("[access_log]\npath = \"{}\"", pipe.display());
    // As a configuration, it is refused at once.
    for command in ["run", "check"] {
        let (ended, _, log) = output(&[command, "--config", pipe.to_str().unwrap()]);
        assert_eq!(ended, Some(2), "{log}");
        let said = "it is a pipe to which nobody writes";
        assert!(log.contains(said), "{log}");
    }

    let mut reader = std::process::Command::new("cat")
        .arg(&pipe)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // It has it open once somebody can write to it.
    let opened = fs::OpenOptions::new().write(true).open(&pipe).unwrap();
    let it = guarded(&log, "responses = 1");
    drop(opened);
    served(&socket("127.0.0.1"), it.listener, &it.server);
    let mut line = String::new();
    BufReader::new(reader.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert!(line.contains("reason=responses"), "{line}");
    reader.kill().unwrap();
    reader.wait().unwrap();
    served(&socket("127.0.0.1"), it.listener, &it.server);
    eventually("a loss", || metric(it.admin, UNLOGGED) == 1);
    // Reopening waits for no reader.
    let mut proxy = it.proxy;
    proxy.signal("HUP");
    eventually("a word of it", || proxy.log().contains("can't be reopened"));
    served(&socket("127.0.0.1"), it.listener, &it.server);
    eventually("another loss", || metric(it.admin, UNLOGGED) == 2);
    proxy.signal("TERM");
    let (status, log) = proxy.wait();
    assert!(status.success(), "{log}");
}

/// Ends two sessions while the access log can't be written, and more once `repair` has been
/// called, after which their lines have to be in `file`.
fn serves_without_an_access_log(path: &Path, said: &str, repair: impl FnOnce() -> Lines) {
    let log = format!(
        "[access_log]\npath = \"{}\"\nformat = \"json\"",
        path.display()
    );
    let it = guarded(&log, "responses = 1");
    let all = std::cell::Cell::new(0);
    let ended = |sessions: u64| {
        for _ in 0..sessions {
            served(&socket("127.0.0.1"), it.listener, &it.server);
            all.set(all.get() + 1);
        }
    };
    ended(2);
    eventually("the loss", || metric(it.admin, UNLOGGED) == 2);
    let told = |words| it.proxy.log().matches(words).count();
    assert_eq!(
        told("the access log can't be written"),
        1,
        "{}",
        it.proxy.log()
    );
    assert_eq!(told(said), 1, "{}", it.proxy.log());
    let mut lines = repair();
    it.proxy.signal("HUP");
    eventually("the log to be open", || {
        ended(1);
        lines() > 0
    });
    let lost = metric(it.admin, UNLOGGED);
    ended(3);
    eventually("all lines that came later", || lines() == all.get() - lost);
    assert_eq!(metric(it.admin, UNLOGGED), lost);
    assert_eq!(
        told("the access log is written again"),
        1,
        "{}",
        it.proxy.log()
    );
    let mut proxy = it.proxy;
    proxy.signal("TERM");
    let (status, log) = proxy.wait();
    assert!(status.success(), "{log}");
    assert_eq!(
        log.matches("the access log can't be written").count(),
        1,
        "{log}"
    );
}

/// Counts the lines that are in the log.
type Lines = Box<dyn FnMut() -> u64>;

#[test]
fn a_start_waits_for_no_reader_of_the_access_log() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pipe");
    let made = std::process::Command::new("mkfifo")
        .args(["-m", "666"])
        .arg(&path)
        .status();
    assert!(made.unwrap().success());
    serves_without_an_access_log(&path, "it is a pipe that nobody reads", || {
        let without_waiting = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let mut options = fs::OpenOptions::new();
        let mut reader = options
            .read(true)
            .custom_flags(without_waiting)
            .open(&path)
            .unwrap();
        let mut lines = 0;
        Box::new(move || {
            let mut text = [0; 4096];
            while let Ok(some @ 1..) = std::io::Read::read(&mut reader, &mut text) {
                lines += text[..some].iter().filter(|byte| **byte == b'\n').count() as u64;
            }
            lines
        })
    });
}

#[test]
fn a_start_waits_for_no_permission_to_write_the_access_log() {
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("log");
    fs::create_dir(&folder).unwrap();
    let allow = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    allow(outer.path(), 0o755);
    allow(&folder, 0o555);
    let path = folder.join("access.log");
    serves_without_an_access_log(&path, "Permission denied", || {
        allow(&folder, 0o777);
        let path = path.clone();
        Box::new(move || if path.exists() { whole_lines(&path) } else { 0 })
    });
}

#[test]
fn a_reload_is_rejected_if_the_access_log_can_not_be_opened() {
    let it = guarded("", "responses = 1");
    let file = it.folder.path().join("proxy.toml");
    let path = it.folder.path().join("no such folder/access.log");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(
        &file,
        format!("{text}\n[access_log]\npath = \"{}\"\n", path.display()),
    )
    .unwrap();
    it.proxy.signal("HUP");
    eventually("the rejection", || {
        it.proxy.log().contains("not reloaded, nothing has changed")
    });
    assert!(it.proxy.log().contains("access.log can't be opened"));
    served(&socket("127.0.0.1"), it.listener, &it.server);
}
