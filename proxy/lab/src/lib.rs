//! What the tests of all crates share: the real proxy as a process, network namespaces,
//! DNS servers, certificates, and clients and servers that check what they receive.

#![allow(missing_docs, reason = "for tests alone")]
#![allow(clippy::print_stderr, reason = "what a failed test shows")]
#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::time::{Duration, Instant};

mod admin;
pub mod browser;
#[cfg(target_os = "linux")]
pub mod continuity;
pub mod dig;
pub mod dns_message;
pub mod dns_server;
pub mod fake_proxy;
pub mod namespace;
#[cfg(target_os = "linux")]
pub mod network;
#[cfg(target_os = "linux")]
pub mod nginx;
mod process;
mod proxy;
pub mod quic;
#[cfg(target_os = "linux")]
pub mod senders;
#[cfg(target_os = "linux")]
pub mod service;
#[cfg(target_os = "linux")]
pub mod service_manager;
#[cfg(target_os = "linux")]
mod sockets;
#[cfg(target_os = "linux")]
pub mod two_hosts;
#[cfg(target_os = "linux")]
pub mod wrapped;

pub use admin::{dropped, http, http_get, http_whole, metric};
pub use process::Process;
pub use proxy::{
    binary, musl_gcc, output, output_of, preload_library, preload_library_musl, proxy,
    proxy_between, proxy_with, write,
};
#[cfg(target_os = "linux")]
pub use sockets::{
    address, bind, port, ports, read_header, receive, receive_nothing, served, socket,
};

/// Long enough for a loaded machine; a test that waits so long has failed.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// Waits until `done` returns true.
#[track_caller]
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !done() {
        assert!(
            Instant::now() < deadline,
            "{what}: has not happened within {TIMEOUT:?}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The path of the test that calls this, as libtest knows it: `module::test`.
#[macro_export]
macro_rules! test_name {
    () => {{
        fn here() {}
        $crate::namespace::test_path(std::any::type_name_of_val(&here))
    }};
}
