//! `healthcheck` says by its exit code whether a proxy is well, whatever has the address.

use std::io::Write as _;
use std::net::TcpListener;
use std::os::fd::AsFd as _;
use std::thread;

use ppv2_lab::*;

/// A proxy with one worker, whose file has this admin address.
fn config(admin: &str) -> String {
    format!(
        "workers = 1\ndrain_timeout = \"1h\"\n[admin]\nlisten = \"{admin}\"\n\
         [[listener]]\nbind = [\"{}\"]\nupstream = \"u\"\n[upstream.u]\nservers = [\"{}\"]\n",
        address("127.0.0.1"),
        address("127.0.0.1"),
    )
}

#[track_caller]
fn says(arguments: &[&str], code: i32, part: &str) {
    let arguments = [&["healthcheck"], arguments].concat();
    let (status, stdout, stderr) = output(&arguments);
    let said = format!("{stdout}{stderr}");
    assert_eq!(status, Some(code), "{arguments:?}: {said}");
    assert!(said.contains(part), "{arguments:?}: no `{part}` in {said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[test]
fn a_proxy_is_asked_by_address_or_by_file() {
    let folder = tempfile::tempdir().unwrap();
    let admin = address("127.0.0.1").to_string();
    let text = config(&admin);
    let mut proxy = proxy_with(&folder, &text);
    let file = folder.path().join("proxy.toml");
    let by_file = ["--config", file.to_str().unwrap()];
    let by_address = ["--admin", &admin];
    for by in [by_file, by_address] {
        says(&by, 0, "ok");
        says(&[&by[..], &["--ready"]].concat(), 0, "ready");
    }
    // What the file is to be next concerns no running proxy.
    write(&folder, "proxy.toml", &format!("{text}unknown = 1\n"));
    says(&by_file, 0, "ok");
    write(
        &folder,
        "proxy.toml",
        &text.replace("127.0.0.1:1", "nowhere.invalid:1"),
    );
    says(&by_address, 0, "ok");

    proxy.pause();
    let patience = ["--timeout", "200ms"];
    says(
        &[&by_address[..], &patience].concat(),
        1,
        "has not answered within 200ms",
    );
    proxy.signal("CONT");
    proxy.signal("TERM");
    let (status, log) = proxy.wait();
    assert!(status.success(), "{log}");
    says(&by_address, 1, "can't be asked: Connection refused");
}

#[test]
fn a_wildcard_is_asked_on_loopback() {
    let folder = tempfile::tempdir().unwrap();
    for (wildcard, loopback) in [("0.0.0.0", "127.0.0.1"), ("[::]", "::1")] {
        let admin = format!("{wildcard}:{}", address(loopback).port());
        let _proxy = proxy_with(&folder, &config(&admin));
        let file = folder.path().join("proxy.toml");
        says(&["--config", file.to_str().unwrap()], 0, "ok");
        says(&["--admin", &admin], 0, "ok");
    }
}

#[test]
fn a_stopping_proxy_is_well_but_not_ready() {
    let (server, folder) = (socket("127.0.0.1"), tempfile::tempdir().unwrap());
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1").to_string());
    let text = format!(
        "workers = 1\ndrain_timeout = \"1h\"\n[admin]\nlisten = \"{admin}\"\n\
         [[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\n[upstream.u]\nservers = [\"{}\"]\n",
        server.local_addr().unwrap()
    );
    let mut proxy = proxy_with(&folder, &text);
    socket("127.0.0.1").send_to(b"question", listener).unwrap();
    receive(&server);
    proxy.signal("TERM");
    proxy.wait_for("shutting down");
    says(&["--admin", &admin], 0, "ok");
    says(
        &["--admin", &admin, "--ready"],
        1,
        "answers 503 to /readyz: not ready",
    );
}

#[test]
fn wrong_use_exits_with_2() {
    let folder = tempfile::tempdir().unwrap();
    let file = write(
        &folder,
        "none.toml",
        "[[listener]]\nbind = [\"127.0.0.1:53\"]\n",
    );
    let file = file.to_str().unwrap();
    says(
        &["--config", file],
        2,
        "no admin address to ask; add `[admin]`",
    );
    says(&["--config", "/nonexistent"], 2, "/nonexistent");
    for wrong in [
        &["--admin", "here"][..],
        &["--admin", "127.0.0.1:1", "--config", file],
        &["--timeout", "soon"],
    ] {
        let (status, _, stderr) = output(&[&["healthcheck"], wrong].concat());
        assert_eq!(status, Some(2), "{wrong:?}: {stderr}");
    }
}

/// What else may have the port: nothing of it makes a proxy well, or a check endless.
#[test]
fn other_servers_are_no_proxies() {
    for (answer, part) in [
        (&b""[..], "does not answer as an HTTP server"),
        (
            b"SSH-2.0-OpenSSH_9.2\r\n",
            "does not answer as an HTTP server",
        ),
        (
            b"HTTP/1.1 404 Not Found\r\n\r\nno\x1b[2Jpe\n",
            "answers 404 to /healthz: no",
        ),
        (b"HTTP/1.1 302 Found\r\nlocation: /\r\n\r\n", "answers 302"),
    ] {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let admin = server.local_addr().unwrap().to_string();
        let answering = thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            stream.write_all(answer).unwrap();
            // The request must be read: otherwise the answer is lost with a reset.
            rustix::net::shutdown(stream.as_fd(), rustix::net::Shutdown::Write).unwrap();
            std::io::copy(&mut stream, &mut std::io::sink()).unwrap();
        });
        says(&["--admin", &admin], 1, part);
        answering.join().unwrap();
    }
    // One that sends for ever, and one that sends now and then.
    for pause in [0, 20] {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let admin = server.local_addr().unwrap().to_string();
        let answering = thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            while stream.write_all(b"x").is_ok() {
                thread::sleep(std::time::Duration::from_millis(pause));
            }
        });
        let part = if pause == 0 {
            "HTTP server"
        } else {
            "has not answered"
        };
        says(&["--admin", &admin, "--timeout", "500ms"], 1, part);
        answering.join().unwrap();
    }
}
