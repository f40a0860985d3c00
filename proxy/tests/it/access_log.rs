//! Fields and targets of the access log: the system's log daemons as they receive it, by
//! sockets that stand in for theirs.

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ppv2_lab::*;

const UNLOGGED: &str = "ppv2_sessions_unlogged_total";

/// A proxy whose sessions end with their answer.
struct Logging {
    proxy: Process,
    server: UdpSocket,
    listener: SocketAddr,
    admin: SocketAddr,
    folder: tempfile::TempDir,
}

/// FOLDER in `log` stands for the proxy's, which `receiver` is given before it starts.
fn logging<T>(log: &str, receiver: impl FnOnce(&Path) -> T) -> (Logging, T) {
    let folder = tempfile::tempdir().unwrap();
    // The proxy may run as another user than the test.
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let receiver = receiver(folder.path());
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let server = socket("127.0.0.1");
    let config = format!(
        "[access_log]\n{}\n[admin]\nlisten = \"{admin}\"\n[[listener]]\n\
         bind = [\"{listener}\"]\nupstream = \"u\"\nresponses = 1\n[upstream.u]\n\
         servers = [\"{}\"]\n",
        log.replace("FOLDER", folder.path().to_str().unwrap()),
        server.local_addr().unwrap()
    );
    let logging = Logging {
        proxy: proxy_with(&folder, &config),
        server,
        listener,
        admin,
        folder,
    };
    (logging, receiver)
}

impl Logging {
    /// A session of a client that has one answer, and the client's address.
    fn session(&self) -> SocketAddr {
        let client = socket("127.0.0.1");
        served(&client, self.listener, &self.server);
        client.local_addr().unwrap()
    }

    fn unlogged(&self) -> u64 {
        metric(self.admin, UNLOGGED)
    }

    fn told(&self, words: &str) -> usize {
        self.proxy.log().matches(words).count()
    }
}

/// A socket that stands in for a log daemon's.
fn receiver(path: &Path) -> UnixDatagram {
    let socket = UnixDatagram::bind(path).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    socket
}

fn message(socket: &UnixDatagram) -> String {
    let mut buffer = [0; 8192];
    let len = socket.recv(&mut buffer).unwrap();
    String::from_utf8(buffer[..len].to_vec()).unwrap()
}

fn at_log(folder: &Path) -> PathBuf {
    folder.join("log")
}

#[test]
fn syslog_gets_a_message_for_each_session_also_after_it_was_restarted() {
    let (it, syslog) = logging(
        "target = \"syslog\"\nsocket = \"FOLDER/log\"\nfacility = \"local3\"\n\
         fields = [\"client\", \"replies\", \"listener\", \"reason\"]",
        |folder| receiver(&at_log(folder)),
    );
    let expected = |client: SocketAddr| {
        // local3 (19) and informational (6).
        format!(
            "<158>ppv2-proxy[{}]: client={client} replies=1 listener=\"listener1\" reason=responses",
            it.proxy.pid()
        )
    };
    let client = it.session();
    assert_eq!(message(&syslog), expected(client));

    let path = at_log(it.folder.path());
    fs::remove_file(&path).unwrap();
    drop(syslog);
    for lost in 1..4 {
        it.session();
        eventually("a loss", || it.unlogged() == lost);
    }
    let syslog = receiver(&path);
    let client = it.session();
    assert_eq!(message(&syslog), expected(client));
    eventually("the end to be told", || {
        it.told("the access log is written again") == 1
    });
    assert_eq!(it.told("the access log can't be written"), 1);

    // It was replaced, and the former one lives on.
    fs::remove_file(&path).unwrap();
    let other = receiver(&path);
    it.proxy.signal("HUP");
    eventually("the reload", || it.told("reloaded") == 1);
    // The log's thread hears of it within half a second.
    let mut clients = Vec::new();
    other.set_nonblocking(true).unwrap();
    let mut first = None;
    eventually("a message at the new socket", || {
        clients.push(expected(it.session()));
        let mut buffer = [0; 8192];
        let received = other.recv(&mut buffer);
        first = received.ok().map(|len| buffer[..len].to_vec());
        first.is_some()
    });
    let first = String::from_utf8(first.unwrap()).unwrap();
    assert!(clients.contains(&first), "{first}");
    assert_eq!(it.unlogged(), 3);
}

#[test]
fn a_log_daemon_that_does_not_read_holds_nothing_up() {
    let (it, syslog) = logging(
        "target = \"syslog\"\nsocket = \"FOLDER/log\"\nformat = \"json\"",
        |folder| receiver(&at_log(folder)),
    );
    // The kernel keeps some messages for it.
    let mut ended = 0;
    eventually("a loss", || {
        for _ in 0..20 {
            it.session();
        }
        ended += 20;
        it.unlogged() > 0
    });
    let mut received = 0;
    syslog.set_nonblocking(true).unwrap();
    eventually("each line to be there or counted", || {
        while syslog.recv(&mut [0; 8192]).is_ok() {
            received += 1;
        }
        received + it.unlogged() == ended
    });
    syslog.set_nonblocking(false).unwrap();
    let lost = it.unlogged();
    let client = it.session();
    let message = message(&syslog);
    let (head, line) = message.split_once("]: ").unwrap();
    assert!(head.starts_with("<30>ppv2-proxy["), "{head}");
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    assert_eq!(line["client"], client.to_string());
    assert_eq!(it.unlogged(), lost);
    eventually("the end to be told", || {
        it.told("the access log is written again") >= 1
    });
    assert_eq!(it.told("the access log can't be written"), 1);
}

#[test]
fn the_journal_gets_fields() {
    const SOCKET: &str = "/run/systemd/journal/socket";
    let run = "mount -t tmpfs -o mode=755 tmpfs /run";
    if !namespace::enter(test_name!(), run) {
        return;
    }
    // Nobody receives yet: the journal may start later.
    let (it, ()) = logging(
        "target = \"journald\"\nfields = [\"client_ip\", \"upstream\", \"request_bytes\"]",
        |_| (),
    );
    assert_eq!(it.told("the access log can't be written"), 1);
    it.session();
    eventually("a loss", || it.unlogged() == 1);
    fs::create_dir_all(Path::new(SOCKET).parent().unwrap()).unwrap();
    let journal = receiver(Path::new(SOCKET));
    it.session();
    assert_eq!(
        message(&journal),
        "PRIORITY=6\nSYSLOG_IDENTIFIER=ppv2-proxy\n\
         MESSAGE=client_ip=127.0.0.1 upstream=\"u\" request_bytes=8\n\
         PPV2_CLIENT_IP=127.0.0.1\nPPV2_UPSTREAM=u\nPPV2_REQUEST_BYTES=8\n"
    );
    let mut proxy = it.proxy;
    proxy.signal("TERM");
    assert!(proxy.wait().0.success());
}
