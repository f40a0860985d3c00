//! The admin API on a Unix socket: who may use it, and what becomes of its file.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use ppv2_lab::*;

/// A folder in which every user may make sockets, as the proxy's may in its own.
fn open_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
    folder
}

/// The configuration of a proxy with this admin socket.
fn config(socket: &Path) -> String {
    format!(
        "workers = 1\n[admin]\nlisten = \"unix:{}\"\n\
         [[listener]]\nbind = [\"{}\"]\nupstream = \"u\"\n[upstream.u]\nservers = [\"{}\"]\n",
        socket.display(),
        address("127.0.0.1"),
        address("127.0.0.1"),
    )
}

fn is_socket(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket())
}

/// Asks by `healthcheck`, and returns its exit code and what it said.
fn healthcheck(arguments: &[&str]) -> (Option<i32>, String) {
    let (code, stdout, stderr) = output(&[&["healthcheck"], arguments].concat());
    (code, stdout + &stderr)
}

/// What a start says that fails with exit code 1.
fn failure(file: &Path) -> String {
    let (code, _, stderr) = output(&["run", "--config", file.to_str().unwrap()]);
    assert_eq!(code, Some(1), "{stderr}");
    stderr
}

#[test]
fn a_unix_socket_serves_the_admin_api() {
    let folder = open_folder();
    let socket = folder.path().join("admin.sock");
    let mut proxy = proxy_with(&folder, &config(&socket));
    assert!(
        proxy
            .log()
            .contains(&format!("admin=unix:{}", socket.display()))
    );
    assert_eq!(fs::metadata(&socket).unwrap().mode() & 0o777, 0o660);
    let file = folder.path().join("proxy.toml");
    let address = format!("unix:{}", socket.display());
    for by in [["--admin", &address], ["--config", file.to_str().unwrap()]] {
        assert_eq!(healthcheck(&by), (Some(0), "ok\n".to_owned()));
    }

    // Another one leaves it alone.
    let other = write(&folder, "other.toml", &config(&socket));
    let said = failure(&other);
    assert!(said.contains("a process listens there; stop it"), "{said}");
    assert_eq!(healthcheck(&["--admin", &address]).0, Some(0));

    proxy.pause();
    let (code, said) = healthcheck(&["--admin", &address, "--timeout", "200ms"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("has not answered within 200ms"), "{said}");
    proxy.signal("CONT");
    proxy.signal("TERM");
    let (status, log) = proxy.wait();
    assert!(status.success(), "{log}");
    assert!(!socket.exists());
    let (code, said) = healthcheck(&["--admin", &address]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("can't be asked"), "{said}");
}

#[test]
fn a_socket_that_nobody_listens_on_is_replaced() {
    let folder = open_folder();
    let socket = folder.path().join("admin.sock");
    let address = format!("unix:{}", socket.display());
    let mut killed = proxy_with(&folder, &config(&socket));
    killed.signal("KILL");
    killed.wait();
    assert!(is_socket(&socket));
    let mut proxy = proxy_with(&folder, &config(&socket));
    assert_eq!(healthcheck(&["--admin", &address]).0, Some(0));

    // What another process has put there since stays.
    fs::remove_file(&socket).unwrap();
    let _other = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    proxy.signal("TERM");
    proxy.wait();
    assert!(is_socket(&socket));
}

#[test]
fn what_is_no_socket_is_left_alone() {
    let folder = open_folder();
    let path = write(&folder, "precious", "data");
    let said = failure(&write(&folder, "proxy.toml", &config(&path)));
    assert!(said.contains("there is a file that is no socket"), "{said}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "data");
    let missing = folder.path().join("none/admin.sock");
    let said = failure(&write(&folder, "proxy.toml", &config(&missing)));
    assert!(said.contains("No such file or directory"), "{said}");
    assert!(said.contains("make its directory"), "{said}");
}
