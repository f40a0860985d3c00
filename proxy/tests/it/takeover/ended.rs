//! The process that has all is told to end, or to leave all to the next one, while another
//! process takes over.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::sleep;

use super::hostile::{Message, connect};
use super::relay::Relay;
use super::*;
use crate::activation::stand_in;

/// Time for a signal to be heard. Nobody sees when it is.
const HEARD: Duration = Duration::from_millis(200);

const ADMIN: &str = "admin.sock";

impl Setup {
    /// As [`config`](Setup::config), with the admin API on a Unix socket beside the other one.
    fn with_files(&self) -> String {
        let admin = format!("unix:{}", self.socket().with_file_name(ADMIN).display());
        self.config(2).replace(&self.admin.to_string(), &admin)
    }

    /// Both sockets are there and answer.
    #[track_caller]
    fn assert_reachable(&self) {
        let admin = format!("unix:{}", self.socket().with_file_name(ADMIN).display());
        let (code, _, said) = output(&["healthcheck", "--admin", &admin]);
        assert_eq!(code, Some(0), "{said}");
        drop(UnixStream::connect(self.socket()).unwrap());
    }

    #[track_caller]
    fn assert_no_files(&self) {
        assert!(!self.socket().exists());
        assert!(!self.socket().with_file_name(ADMIN).exists());
    }
}

/// A client's question that the server has, and has not answered yet.
struct Question {
    client: UdpSocket,
    server: UdpSocket,
    session: SocketAddr,
}

impl Question {
    /// Starts the proxy, which is given all the time that it wants for the answer.
    fn ask(setup: &Setup) -> (Process, Self) {
        let (bind, server) = (address("127.0.0.1"), socket("127.0.0.1"));
        let config = format!(
            "{}[[listener]]\nname = \"asked\"\nbind = [\"{bind}\"]\nupstream = \"asked\"\n\
             [upstream.asked]\nservers = [\"{}\"]\n",
            setup.with_files().replace("\"1s\"", "\"60s\""),
            server.local_addr().unwrap()
        );
        let proxy = proxy_with(&setup.folder, &config);
        let client = socket("127.0.0.1");
        client.send_to(b"question", bind).unwrap();
        let (_, session) = receive(&server);
        let asked = Self {
            client,
            server,
            session,
        };
        (proxy, asked)
    }

    #[track_caller]
    fn answer(self) {
        self.server.send_to(b"answer", self.session).unwrap();
        assert_eq!(receive(&self.client).0, b"answer");
    }
}

/// A new process that has said `words`, and has read up to `until`.
#[track_caller]
fn stranger(setup: &Setup, words: &[Message], until: &str) -> UnixStream {
    let mut stream = connect(setup);
    let words: Vec<_> = words.iter().flat_map(Message::bytes).collect();
    stream.write_all(&words).unwrap();
    let (mut said, mut byte) = (Vec::new(), [0]);
    while !said.ends_with(until.as_bytes()) {
        stream.read_exact(&mut byte).unwrap();
        said.extend(byte);
    }
    stream
}

fn offered(setup: &Setup) -> UnixStream {
    stranger(setup, &[Message::hello(1)], "Offer")
}

/// Workers have stopped to look at their sockets for it.
fn frozen(setup: &Setup) -> UnixStream {
    let words = [Message::hello(1), Message::Begin, Message::Freeze];
    stranger(setup, &words, "Last")
}

/// It goes on to take over, and gets nothing.
#[track_caller]
fn gets_nothing(mut stream: UnixStream) {
    let words = [Message::Begin, Message::Freeze].map(|one| one.bytes());
    let mut said = Vec::new();
    // The process may have closed the connection.
    let written = stream.write_all(&words.concat());
    let _ = written.and_then(|()| stream.read_to_end(&mut said));
    let said = String::from_utf8_lossy(&said);
    assert!(!said.contains("Last"), "{said}");
}

#[test]
fn a_process_ends_though_another_one_prepares_to_take_over() {
    for signal in ["TERM", "USR2"] {
        let setup = Setup::simple();
        let (mut proxy, question) = Question::ask(&setup);
        let other = offered(&setup);
        proxy.signal(signal);
        proxy.wait_for("shutting down");
        gets_nothing(other);
        question.answer();
        let (status, log) = proxy.wait();
        assert!(status.success(), "{status}: {log}");
        setup.assert_no_files();
    }
}

#[test]
fn a_process_ends_when_another_one_fails_to_take_over() {
    for signal in ["TERM", "USR2"] {
        let setup = Setup::simple();
        let (mut proxy, question) = Question::ask(&setup);
        let other = frozen(&setup);
        proxy.signal(signal);
        sleep(HEARD);
        // The other one may look at the sockets, so this one does not, to drain them either.
        assert!(!proxy.log().contains("shutting down"), "{}", proxy.log());
        assert!(!proxy.has_ended(), "{}", proxy.log());
        drop(other);
        proxy.wait_for("shutting down");
        question.answer();
        let (status, log) = proxy.wait();
        assert!(status.success(), "{status}: {log}");
        setup.assert_no_files();
    }
}

#[test]
fn a_process_that_is_told_to_end_lets_another_one_go_on() {
    let setup = Setup::simple();
    let config = setup.with_files();
    let mut proxy = proxy_with(&setup.folder, &config);
    let load = setup.load(RATE / 4);
    for signal in ["TERM", "USR2"] {
        // It is frozen when the new one says these.
        for word in ["Ready", "Running"] {
            let relay = Relay::start(&setup.socket(), word);
            let mut new = Process::start(&mut setup.taking_from(&relay.socket, &config));
            relay.wait();
            proxy.signal(signal);
            sleep(HEARD);
            relay.go_on();
            new.wait_for("ready");
            let (status, log) = proxy.wait();
            assert!(status.success(), "{status}: {log}");
            assert!(log.contains("another process goes on"), "{log}");
            assert!(!log.contains("shutting down"), "{log}");
            setup.assert_reachable();
            proxy = new;
            load.wait_for_a_round();
        }
    }
    clean(load);
    proxy.signal("TERM");
    assert!(proxy.wait().0.success());
    setup.assert_no_files();
}

#[test]
fn a_process_that_fails_to_take_over_leaves_all_to_the_store() {
    let setup = Setup::simple();
    let config = setup.with_files();
    let file = write(&setup.folder, "proxy.toml", &config);
    let mut manager = Process::start(&mut stand_in(&["store".to_owned()], &file));
    manager.wait_for(" ready ");
    let load = setup.load(RATE / 4);
    let wait_for_next = |times: usize| {
        for (word, count) in [(" ready ", times + 1), ("removed ppv2-state", times)] {
            eventually("the next process", || {
                manager.log().matches(word).count() == count
            });
        }
        let sessions = format!("{} sessions go on", 2 * CLIENTS);
        assert_eq!(manager.log().matches(&sessions).count(), times);
        setup.assert_reachable();
        load.wait_for_a_round();
    };

    let other = offered(&setup);
    manager.signal("USR1");
    wait_for_next(1);
    gets_nothing(other);

    let other = frozen(&setup);
    manager.signal("USR1");
    sleep(HEARD);
    drop(other);
    wait_for_next(2);

    for (times, word) in [(3, "Begin"), (4, "Freeze")] {
        let relay = Relay::start(&setup.socket(), word);
        let mut new = Process::start(&mut setup.taking_from(&relay.socket, &config));
        relay.wait();
        manager.signal("USR1");
        wait_for_next(times);
        relay.go_on();
        let (status, said) = new.wait();
        assert_eq!(status.code(), Some(1), "{said}");
        setup.assert_reachable();
        load.wait_for_a_round();
    }
    clean(load);
    manager.signal("TERM");
    let (status, log) = manager.wait();
    assert!(status.success(), "{log}");
}

#[test]
fn sockets_whose_files_are_gone_are_made_anew() {
    let mut setup = Setup::simple();
    setup.socket = "run/upgrade.sock";
    let run = setup.folder.path().join("run");
    let make = || {
        fs::create_dir(&run).unwrap();
        fs::set_permissions(&run, fs::Permissions::from_mode(0o777)).unwrap();
    };
    make();
    let config = setup.with_files();
    let mut proxy = proxy_with(&setup.folder, &config);
    let load = setup.load(RATE / 4);
    for _ in 0..2 {
        let relay = Relay::start(&setup.socket(), "Hello");
        let mut new = Process::start(&mut setup.taking_from(&relay.socket, &config));
        relay.wait();
        fs::remove_dir_all(&run).unwrap();
        make();
        relay.go_on();
        new.wait_for("ready");
        let (status, log) = proxy.wait();
        assert!(status.success(), "{status}: {log}");
        setup.assert_reachable();
        proxy = new;
    }
    // It can be asked as before.
    setup.upgrade(&mut proxy, &config);
    setup.assert_reachable();
    clean(load);
}
