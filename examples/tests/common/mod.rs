//! Examples that run, and the proxy in front of them.
#![allow(dead_code, reason = "each test file uses its part of it")]

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;

/// A running example, stopped when dropped.
pub(crate) struct Example {
    process: Child,
    pub(crate) address: SocketAddr,
}

impl Example {
    pub(crate) fn start(path: &str) -> Self {
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

/// The real proxy with one listener for each of its addresses, stopped when
/// dropped.
pub(crate) struct Proxy {
    process: Child,
    pub(crate) listeners: Vec<SocketAddr>,
}

impl Proxy {
    /// In front of `server`, on so many addresses of this host.
    pub(crate) fn start(server: SocketAddr, listeners: usize) -> Self {
        let listeners: Vec<_> = (0..listeners).map(|_| address()).collect();
        let mut command = Command::new(binary());
        command.args(["run", "--upstream", &server.to_string()]);
        for listener in &listeners {
            command.args(["--listen", &listener.to_string()]);
        }
        let mut process = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut log = BufReader::new(process.stderr.take().unwrap());
        let mut lines = String::new();
        while !lines.contains("ready") {
            let read = log.read_line(&mut lines).unwrap();
            assert_ne!(read, 0, "the proxy ended:\n{lines}");
        }
        // It must not find its log full.
        thread::spawn(move || log.read_to_end(&mut Vec::new()));
        Self { process, listeners }
    }

    pub(crate) fn listener(&self) -> SocketAddr {
        self.listeners[0]
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// An address below the kernel's ephemeral ports that no other test uses.
fn address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let process = u16::try_from(std::process::id() % 100).unwrap();
    let port = 10_000 + process * 200 + NEXT.fetch_add(1, Ordering::Relaxed);
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// The proxy's binary. Cargo names binaries of a test's own package alone; with
/// `--workspace` the proxy's lies beside them, and else it is built.
fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let example = Path::new(env!("CARGO_BIN_EXE_echo_std"));
        let binary = example.with_file_name(format!("ppv2-proxy{}", std::env::consts::EXE_SUFFIX));
        if !binary.exists() {
            let mut build = Command::new(env!("CARGO"));
            build.args([
                "build",
                "--locked",
                "--quiet",
                "-p",
                "ppv2-proxy",
                "--bin",
                "ppv2-proxy",
            ]);
            if example
                .parent()
                .is_some_and(|folder| folder.ends_with("release"))
            {
                build.arg("--release");
            }
            assert!(build.status().unwrap().success(), "{build:?}");
        }
        binary
    })
}
