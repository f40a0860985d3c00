//! The real proxy: where its binary is, and how tests run it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::Process;

/// The proxy's binary: the one that `PPV2_PROXY` names, or the one beside the test, which
/// cargo has built with the tests of the proxy and of the workspace. The tests of other
/// packages alone have it built.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(named) = std::env::var_os("PPV2_PROXY") {
            return named.into();
        }
        let binary = beside_the_test("ppv2-proxy");
        if !binary.exists() {
            build(&["-p", "ppv2-proxy", "--bin", "ppv2-proxy"]);
        }
        binary
    })
}

/// The preload library: the file that `PPV2_PRELOAD` names, or the library as it is now. Cargo
/// builds it with no test, since none can be linked to it.
pub fn preload_library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        if let Some(named) = std::env::var_os("PPV2_PRELOAD") {
            return named.into();
        }
        build(&["-p", "ppv2-preload"]);
        beside_the_test("libppv2_preload.so")
    })
}

/// The same for programs that use musl: the file that `PPV2_PRELOAD_MUSL` names, or the library as
/// it is now.
pub fn preload_library_musl() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        if let Some(named) = std::env::var_os("PPV2_PRELOAD_MUSL") {
            return named.into();
        }
        let target = beside_the_test("");
        let target = target.parent().unwrap();
        let mut build = Command::new(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../sdk-rust/preload/for-musl"
        ));
        build.args(["--locked", "--quiet"]);
        build.env("CARGO_TARGET_DIR", target);
        assert!(build.status().unwrap().success(), "{build:?}");
        let machine = std::env::consts::ARCH;
        target.join(format!(
            "{machine}-unknown-linux-musl/debug/libppv2_preload.so"
        ))
    })
}

/// A compiler of C programs that use musl.
pub fn musl_gcc() -> Command {
    let is_there = Command::new("musl-gcc").arg("--version").output().is_ok();
    assert!(is_there, "install the Debian package musl-tools");
    Command::new("musl-gcc")
}

/// A file in target/debug, or where else the test was built.
fn beside_the_test(name: &str) -> PathBuf {
    // target/debug/deps/TEST
    let test = std::env::current_exe().unwrap();
    test.ancestors().nth(2).unwrap().join(name)
}

fn build(what: &[&str]) {
    let folder = beside_the_test("");
    let mut build = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    build.args(["build", "--locked", "--quiet"]).args(what);
    build.arg("--manifest-path").arg(MANIFEST);
    build.arg("--target-dir").arg(folder.parent().unwrap());
    if folder.ends_with("release") {
        build.arg("--release");
    }
    assert!(build.status().unwrap().success(), "{build:?}");
}

const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml");

/// `ppv2-proxy run` that has said `ready`.
pub fn proxy(arguments: &[&str]) -> Process {
    let mut process = Process::start(Command::new(binary()).arg("run").args(arguments));
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
    output_of(Command::new(binary()).args(arguments))
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
