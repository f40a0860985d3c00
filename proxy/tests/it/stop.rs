//! A stop lets out the replies in flight, takes no more from clients, and ends;
//! `ready` means that every listener takes datagrams.

use std::time::Duration;

use ppv2_lab::*;

#[test]
fn shutdown_passes_replies_in_flight_and_exits_with_0() {
    for signal in ["TERM", "INT"] {
        let server = socket("127.0.0.1");
        let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
        let more = ["--admin", &admin.to_string()];
        let mut proxy = proxy_between(listener, server.local_addr().unwrap(), &more);
        let client = socket("127.0.0.1");
        client.send_to(b"slow question", listener).unwrap();
        let (_, session) = receive(&server);
        assert_eq!(http_get(admin, "/readyz").0, 200);
        proxy.signal(signal);
        proxy.wait_for("shutting down");
        eventually("not ready", || http_get(admin, "/readyz").0 == 503);

        client.send_to(b"too late", listener).unwrap();
        receive_nothing(&server);
        assert!(!proxy.has_ended(), "it waits for the reply");
        server.send_to(b"answer", session).unwrap();
        assert_eq!(receive(&client), (b"answer".to_vec(), listener));
        let (status, log) = proxy.wait();
        assert!(status.success(), "{log}");
        assert!(log.contains("stopped"), "{log}");
    }
}

/// A proxy that was told to stop while a question waits for its answer. The
/// server must outlive it: a closed port would refuse.
fn stopping_unanswered(drain_timeout: &str) -> (Process, std::net::UdpSocket) {
    let (server, listener) = (socket("127.0.0.1"), address("127.0.0.1"));
    let folder = tempfile::tempdir().unwrap();
    let config = format!(
        "drain_timeout = \"{drain_timeout}\"\n\
         [[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\n\
         [upstream.u]\nservers = [\"{}\"]\n",
        server.local_addr().unwrap()
    );
    let proxy = proxy_with(&folder, &config);
    socket("127.0.0.1").send_to(b"question", listener).unwrap();
    receive(&server);
    proxy.signal("TERM");
    (proxy, server)
}

#[test]
fn silent_server_delays_shutdown_by_the_drain_timeout_alone() {
    let (mut proxy, _server) = stopping_unanswered("500ms");
    let (status, log) = proxy.wait();
    assert!(status.success(), "{log}");
    assert!(log.contains("did not come within 500ms"), "{log}");
}

#[test]
fn a_second_signal_stops_at_once() {
    let (mut proxy, _server) = stopping_unanswered("1h");
    proxy.wait_for("shutting down");
    std::thread::sleep(Duration::from_millis(300));
    assert!(!proxy.has_ended());
    proxy.signal("TERM");
    assert!(proxy.wait().0.success());
}

#[test]
fn every_address_is_served_once_ready_is_logged() {
    for _ in 0..10 {
        let server = socket("127.0.0.1");
        let listeners: Vec<_> = ["127.0.0.1", "127.0.0.2", "::1"].map(address).into();
        let upstream = server.local_addr().unwrap().to_string();
        let mut arguments = vec!["--upstream".to_owned(), upstream];
        for listener in &listeners {
            arguments.extend(["--listen".to_owned(), listener.to_string()]);
        }
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let proxy = proxy(&arguments);
        assert_eq!(proxy.log().matches("ready").count(), 1, "{}", proxy.log());
        for listener in &listeners {
            let client = socket(&listener.ip().to_string());
            client.send_to(b"now", *listener).unwrap();
        }
        let mut seen: Vec<_> = (0..3).map(|_| read_header(&receive(&server).0).1).collect();
        seen.sort_unstable();
        let mut expected = listeners.clone();
        expected.sort_unstable();
        assert_eq!(seen, expected);
    }
}

#[test]
fn busy_polling_and_gathering_workers_take_commands() {
    for flag in ["--busy-poll", "--coalesce"] {
        let server = socket("127.0.0.1");
        let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
        let more = [flag, "10ms", "--admin", &admin.to_string()];
        let mut proxy = proxy_between(listener, server.local_addr().unwrap(), &more);
        for _ in 0..20 {
            assert_eq!(http_get(admin, "/healthz").0, 200, "{flag}");
        }
        let client = socket("127.0.0.1");
        client.send_to(b"question", listener).unwrap();
        let (_, session) = receive(&server);
        server.send_to(b"answer", session).unwrap();
        assert_eq!(receive(&client).0, b"answer");
        proxy.signal("TERM");
        assert!(proxy.wait().0.success());
    }
}

#[test]
fn shutdown_serves_waiting_requests_and_passes_their_replies() {
    let server = socket("127.0.0.1");
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let more = ["--workers", "1", "--admin", &admin.to_string()];
    let mut proxy = proxy_between(listener, server.local_addr().unwrap(), &more);
    let client = socket("127.0.0.1");
    client.send_to(b"1", listener).unwrap();
    let (_, session) = receive(&server);
    // Waits in the listener's buffer when the order to stop comes.
    proxy.pause();
    for _ in 0..100 {
        client.send_to(b"2", listener).unwrap();
    }
    server.send_to(b"a", session).unwrap();
    proxy.signal("TERM");
    proxy.signal("CONT");
    for _ in 0..100 {
        assert_eq!(read_header(&receive(&server).0).2, b"2");
    }
    assert_eq!(receive(&client).0, b"a");
    std::thread::sleep(Duration::from_millis(600));
    client.send_to(b"too late", listener).unwrap();
    let late = "ppv2_dropped_datagrams_total{listener=\"listener1\",reason=\"stopping\"}";
    eventually("a count of what is too late", || metric(admin, late) == 1);
    for _ in 0..100 {
        server.send_to(b"b", session).unwrap();
    }
    for _ in 0..100 {
        assert_eq!(receive(&client).0, b"b");
    }
    let (status, log) = proxy.wait();
    assert!(status.success() && !log.contains("did not come"), "{log}");
}

#[test]
fn sighup_ends_nothing_and_the_last_drops_are_reported() {
    let (server, listener) = (socket("127.0.0.1"), address("127.0.0.1"));
    let more = ["--allow", "127.9.0.0/16"];
    let mut proxy = proxy_between(listener, server.local_addr().unwrap(), &more);
    proxy.signal("HUP");
    proxy.wait_for("not reloaded, nothing has changed");
    let (allowed, refused) = (socket("127.9.0.1"), socket("127.0.0.1"));
    for expected in [1, 2] {
        refused.send_to(b"no", listener).unwrap();
        allowed.send_to(b"yes", listener).unwrap();
        let (_, session) = receive(&server);
        server.send_to(b"answer", session).unwrap();
        receive(&allowed);
        if expected == 1 {
            proxy.wait_for("reason=\"not_allowed\"");
        }
    }
    proxy.signal("TERM");
    let (status, log) = proxy.wait();
    assert!(status.success());
    assert_eq!(
        log.matches("reason=\"not_allowed\" count=1").count(),
        2,
        "{log}"
    );
}

#[test]
fn sighup_while_the_configuration_is_read_ends_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("proxy.toml");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    let run = ["run", "--config", pipe.to_str().unwrap()];
    let mut proxy = Process::start(std::process::Command::new(binary()).args(run));
    // Can be opened as soon as the proxy has begun to read.
    let mut writer = std::fs::File::options().write(true).open(&pipe).unwrap();
    proxy.signal("HUP");
    let (listener, server) = (address("127.0.0.1"), socket("127.0.0.1"));
    let content = format!(
        "[[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\n[upstream.u]\nservers = [\"{}\"]\n",
        server.local_addr().unwrap()
    );
    std::io::Write::write_all(&mut writer, content.as_bytes()).unwrap();
    drop(writer);
    proxy.wait_for("ready");
    served(&socket("127.0.0.1"), listener, &server);
    assert!(
        proxy.log().contains("not a regular file"),
        "{}",
        proxy.log()
    );
}
