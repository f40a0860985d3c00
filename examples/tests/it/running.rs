//! Examples that run, and the proxy in front of them.

use std::net::SocketAddr;
use std::process::Command;

use ppv2_lab::Process;

/// A running example, stopped when dropped.
pub(crate) struct Example {
    _process: Process,
    pub(crate) address: SocketAddr,
}

impl Example {
    pub(crate) fn start(path: &str) -> Self {
        let arguments = ["--listen", "127.0.0.1:0", "--trusted", "127.0.0.1", "::1"];
        let mut process = Process::start(Command::new(path).args(arguments));
        process.wait_for("\n");
        let log = process.log();
        let address = log.lines().next().unwrap().strip_prefix("ready on ");
        let address = address.expect(&log).parse().unwrap();
        Self {
            _process: process,
            address,
        }
    }
}

/// How replies find their client: by the session's socket, or by tags that the server
/// returns.
pub(crate) const REPLIES: [&str; 3] = ["session", "auto", "tagged"];

/// The real proxy, stopped when dropped.
pub(crate) struct Proxy {
    _process: Process,
    pub(crate) listeners: Vec<SocketAddr>,
}

impl Proxy {
    /// In front of `server`, with so many listeners and this setting of `replies`.
    pub(crate) fn start(server: SocketAddr, listeners: usize, replies: &str) -> Self {
        let listeners: Vec<_> = (0..listeners)
            .map(|_| ppv2_lab::address("127.0.0.1"))
            .collect();
        let mut arguments = ["--upstream", &server.to_string(), "--replies", replies]
            .map(str::to_owned)
            .to_vec();
        for listener in &listeners {
            arguments.extend(["--listen".to_owned(), listener.to_string()]);
        }
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        Self {
            _process: ppv2_lab::proxy(&arguments),
            listeners,
        }
    }

    pub(crate) fn listener(&self) -> SocketAddr {
        self.listeners[0]
    }
}
