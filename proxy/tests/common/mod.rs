//! What the tests with the real binary share: starting and stopping it,
//! addresses that nobody else uses, and namespaces.

#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "each test file uses a part"
)]
#![allow(clippy::print_stderr, reason = "what a failed test shows")]
#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub mod dns;
pub mod hosts;
pub mod lab;
pub mod namespace;
pub mod resolver;
pub mod service;

/// Long enough for a loaded machine; a test that waits so long has failed.
pub const TIMEOUT: Duration = Duration::from_secs(20);

pub const BINARY: &str = env!("CARGO_BIN_EXE_ppv2-proxy");

/// A port below the kernel's ephemeral range that no other test uses.
pub fn port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let process = u16::try_from(std::process::id() % 100).unwrap();
    10_000 + process * 200 + NEXT.fetch_add(1, Ordering::Relaxed)
}

/// An address of this machine that no other test uses.
pub fn address(ip: &str) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port())
}

/// A socket that gives up waiting rather than hang.
pub fn socket(ip: &str) -> UdpSocket {
    bind(SocketAddr::new(ip.parse().unwrap(), 0))
}

pub fn bind(address: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    socket
}

pub fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut datagram = vec![0; 65_536];
    let (len, from) = socket.recv_from(&mut datagram).unwrap();
    datagram.truncate(len);
    (datagram, from)
}

/// Asserts that nothing arrives within a moment.
pub fn receive_nothing(socket: &UdpSocket) {
    socket
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let mut datagram = [0; 65_536];
    if let Ok((len, from)) = socket.recv_from(&mut datagram) {
        panic!("{len} bytes from {from}: {:?}", &datagram[..len.min(100)]);
    }
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
}

/// Client, destination and payload of a datagram that must have a header.
pub fn read_header(datagram: &[u8]) -> (SocketAddr, SocketAddr, Vec<u8>) {
    let (header, payload) = ppv2::decode(datagram).unwrap();
    let (client, destination) = (header.client(), header.destination());
    (client.unwrap(), destination.unwrap(), payload.to_vec())
}

/// Waits until `done` says so.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not come about");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A process that ends with the value.
pub struct Process {
    child: Child,
    log: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl Process {
    /// Starts `command` and gathers what it writes on standard error.
    pub fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let log = Arc::new(Mutex::new(String::new()));
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        let reader = std::thread::spawn({
            let log = Arc::clone(&log);
            move || {
                let mut line = Vec::new();
                while lines.read_until(b'\n', &mut line).unwrap_or(0) > 0 {
                    log.lock()
                        .unwrap()
                        .push_str(&String::from_utf8_lossy(&line));
                    line.clear();
                }
            }
        });
        Self {
            child,
            log,
            reader: Some(reader),
        }
    }

    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line with `word`.
    pub fn wait_for(&mut self, word: &str) {
        let deadline = Instant::now() + TIMEOUT;
        while !self.log().contains(word) {
            if let Some(status) = self.child.try_wait().unwrap() {
                self.reader.take().map(JoinHandle::join);
                panic!(
                    "ended with {status} before it said `{word}`:\n{}",
                    self.log()
                );
            }
            let log = self.log();
            assert!(Instant::now() < deadline, "never said `{word}`:\n{log}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn signal(&self, name: &str) {
        let pid = self.pid().to_string();
        let sent = Command::new("kill")
            .args(["-s", name, &pid])
            .status()
            .unwrap();
        assert!(sent.success());
    }

    /// Stops the process and waits until it stands still, which a signal alone
    /// does not; `CONT` lets it go on.
    pub fn pause(&self) {
        self.signal("STOP");
        let threads = format!("/proc/{}/task", self.pid());
        // The state follows the name, which stands in brackets (proc(5)).
        let stands = |stat: String| stat.rsplit(") ").next().unwrap().starts_with('T');
        eventually("all threads to stand still", || {
            std::fs::read_dir(&threads)
                .unwrap()
                .map(|thread| std::fs::read_to_string(thread.unwrap().path().join("stat")))
                .all(|stat| stands(stat.unwrap()))
        });
    }

    /// Waits for the end, and returns it with everything that was logged.
    pub fn wait(&mut self) -> (ExitStatus, String) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                self.reader.take().map(JoinHandle::join);
                return (status, self.log());
            }
            assert!(Instant::now() < deadline, "still runs:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("log of process {}:\n{}", self.child.id(), self.log());
        }
    }
}

/// `ppv2-proxy run` that has said `ready`.
pub fn proxy(arguments: &[&str]) -> Process {
    let mut process = Process::start(Command::new(BINARY).arg("run").args(arguments));
    process.wait_for("ready");
    process
}

/// `ppv2-proxy run` between one listener and one server.
pub fn proxy_between(listen: SocketAddr, upstream: SocketAddr, more: &[&str]) -> Process {
    let (listen, upstream) = (listen.to_string(), upstream.to_string());
    let mut arguments = vec!["--listen", &listen, "--upstream", &upstream];
    arguments.extend(more);
    proxy(&arguments)
}

/// `ppv2-proxy run --config` with this file. The folder must outlive it.
pub fn proxy_with(folder: &tempfile::TempDir, config: &str) -> Process {
    let file = write(folder, "proxy.toml", config);
    proxy(&["--config", file.to_str().unwrap()])
}

pub fn write(folder: &tempfile::TempDir, name: &str, content: &str) -> PathBuf {
    let file = folder.path().join(name);
    std::fs::write(&file, content).unwrap();
    file
}

/// What a command printed, and how it ended.
pub fn output(arguments: &[&str]) -> (Option<i32>, String, String) {
    output_of(Command::new(BINARY).args(arguments))
}

/// As [`output`], of any command.
pub fn output_of(command: &mut Command) -> (Option<i32>, String, String) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

/// Status and body of an HTTP request to the admin address.
pub fn http_get(address: SocketAddr, path: &str) -> (u16, String) {
    http(address, &format!("GET {path}"), "")
}

/// As [`http_get`], of a request with any method and more header lines.
pub fn http(address: SocketAddr, request: &str, headers: &str) -> (u16, String) {
    let (head, body) = http_whole(address, request, headers);
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body)
}

/// The head of the answer to a request, and the body.
pub fn http_whole(address: SocketAddr, request: &str, headers: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    write!(
        stream,
        "{request} HTTP/1.0\r\nhost: {address}\r\n{headers}\r\n"
    )
    .unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

/// The value of a metric, labels included in `name`.
pub fn metric(admin: SocketAddr, name: &str) -> u64 {
    let (status, text) = http_get(admin, "/metrics");
    assert_eq!(status, 200);
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
        .unwrap_or_else(|| panic!("no metric {name} in\n{text}"))
}

/// What the first listener has dropped for `reason`, as its metric says.
pub fn dropped(admin: SocketAddr, reason: &str) -> u64 {
    let name = "ppv2_dropped_datagrams_total{listener=\"listener1\",reason=";
    metric(admin, &format!("{name}\"{reason}\"}}"))
}

/// Sends a question, and sees that the server's answer comes back.
pub fn served(client: &UdpSocket, listener: SocketAddr, server: &UdpSocket) {
    client.send_to(b"question", listener).unwrap();
    let (_, proxy) = receive(server);
    server.send_to(b"answer", proxy).unwrap();
    assert_eq!(receive(client), (b"answer".to_vec(), listener));
}
