//! What operators see: metrics that add up, health, readiness, sessions by the
//! page, and logs as text or JSON.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use ppv2_lab::*;

#[test]
fn counters_add_up_by_listener_and_server() {
    let servers = [socket("127.0.0.1"), socket("127.0.0.1")];
    let upstreams = [&servers[0], &servers[1]].map(|s| s.local_addr().unwrap());
    let listeners = [address("127.0.0.1"), address("127.0.0.1")];
    let admin = address("127.0.0.1");
    let folder = tempfile::tempdir().unwrap();
    let mut config = format!("[admin]\nlisten = \"{admin}\"\n");
    for (i, (listener, upstream)) in listeners.iter().zip(&upstreams).enumerate() {
        config += &format!(
            "[[listener]]\nname = \"l{i}\"\nbind = [\"{listener}\"]\nupstream = \"u{i}\"\n\
             [upstream.u{i}]\nservers = [\"{upstream}\"]\n"
        );
    }
    let _proxy = proxy_with(&folder, &config);
    for (i, server) in servers.iter().enumerate() {
        let client = socket("127.0.0.1");
        for _ in 0..=i {
            client.send_to(b"12345", listeners[i]).unwrap();
            let (_, session) = receive(server);
            server.send_to(b"1234567", session).unwrap();
            receive(&client);
        }
    }
    for (i, upstream) in upstreams.iter().enumerate() {
        let n = i as u64 + 1;
        let listener = format!("{{listener=\"l{i}\"}}");
        let server = format!("{{upstream=\"u{i}\",server=\"{upstream}\"}}");
        for (name, labels, expected) in [
            ("ppv2_client_datagrams_total", &listener, n),
            ("ppv2_client_bytes_total", &listener, 5 * n),
            ("ppv2_reply_datagrams_total", &listener, n),
            ("ppv2_reply_bytes_total", &listener, 7 * n),
            ("ppv2_sessions", &listener, 1),
            ("ppv2_upstream_datagrams_total", &server, n),
            ("ppv2_upstream_bytes_total", &server, (28 + 5) * n),
            ("ppv2_upstream_reply_datagrams_total", &server, n),
            ("ppv2_upstream_reply_bytes_total", &server, 7 * n),
            ("ppv2_upstream_sessions", &server, 1),
        ] {
            // A reply is counted once it has been sent, and may be here first.
            let name = format!("{name}{labels}");
            eventually(&name, || metric(admin, &name) == expected);
        }
    }
    assert_eq!(http_get(admin, "/healthz"), (200, "ok\n".to_owned()));
    assert_eq!(http_get(admin, "/readyz"), (200, "ready\n".to_owned()));
    assert_eq!(http_get(admin, "/nothing").0, 404);
}

#[test]
fn status_has_all_that_is_counted() {
    let server = socket("127.0.0.1");
    let upstream = server.local_addr().unwrap();
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let folder = tempfile::tempdir().unwrap();
    let config = |more: &str| {
        format!(
            "workers = 2\n[admin]\nlisten = \"{admin}\"\n[[listener]]\nname = \"a\"\n\
             bind = [\"{listener}\"]\nupstream = \"u\"\nallow = [\"127.0.0.1\"]\n\
             [upstream.u]\nservers = [\"{upstream}\"]\n{more}"
        )
    };
    let mut proxy = proxy_with(&folder, &config(""));
    let status = || -> serde_json::Value {
        let (status, body) = http_get(admin, "/status");
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    };
    let first = status();
    assert_eq!(first["listeners"][0]["drops"], serde_json::json!({}));
    served(&socket("127.0.0.1"), listener, &server);
    socket("127.0.0.2").send_to(b"x", listener).unwrap();
    eventually("the datagrams to be counted", || {
        let listener = &status()["listeners"][0];
        listener["reply_datagrams"] == 1 && listener["drops"]["not_allowed"] == 1
    });
    let second = status();
    let uptime = |of: &serde_json::Value| of["uptime_seconds"].as_f64().unwrap();
    assert!(uptime(&second) > uptime(&first), "{first} {second}");
    assert_eq!(
        first["started_unix_seconds"],
        second["started_unix_seconds"]
    );
    for (pointer, expected) in [
        ("/version", env!("CARGO_PKG_VERSION").into()),
        ("/ready", true.into()),
        ("/workers", 2.into()),
        ("/workers_not_responding", serde_json::json!([])),
        ("/sessions", 1.into()),
        ("/listeners_left_out", 0.into()),
        ("/servers_left_out", 0.into()),
        ("/listeners/0/listener", "a".into()),
        ("/listeners/0/bind/0", listener.to_string().into()),
        ("/listeners/0/upstream", "u".into()),
        ("/listeners/0/mode", "ppv2".into()),
        ("/listeners/0/client_datagrams", 2.into()),
        ("/listeners/0/sessions", 1.into()),
        ("/listeners/0/sessions_opened", 1.into()),
        ("/upstreams/0/upstream", "u".into()),
        ("/upstreams/0/servers/0/label", upstream.to_string().into()),
        ("/upstreams/0/servers/0/state", "up".into()),
        ("/upstreams/0/servers/0/datagrams", 1.into()),
        ("/upstreams/0/servers/0/reply_datagrams", 1.into()),
        ("/upstreams/0/servers/0/sessions", 1.into()),
        ("/reloads/applied", 0.into()),
    ] {
        assert_eq!(
            second.pointer(pointer),
            Some(&expected),
            "{pointer}: {second}"
        );
    }
    let meaning = &second["drop_reasons"]["not_allowed"];
    for (part, text) in [("description", "`allow`"), ("fix", "add it")] {
        assert!(meaning[part].as_str().unwrap().contains(text), "{meaning}");
    }

    // A listener that a reload removes is shown while it has sessions.
    let other = address("127.0.0.1");
    let moved = config("").replace("\"a\"", "\"b\"");
    let moved = moved.replace(&listener.to_string(), &other.to_string());
    write(&folder, "proxy.toml", &moved);
    proxy.signal("HUP");
    proxy.wait_for("reloaded");
    let listeners = status()["listeners"].clone();
    assert_eq!(listeners[0]["bind"][0], other.to_string(), "{listeners}");
    assert_eq!(listeners[1]["listener"], "a", "{listeners}");
    assert_eq!(listeners[1]["bind"], serde_json::json!([]), "{listeners}");
    assert_eq!(listeners[1]["upstream"], serde_json::Value::Null);
    assert_eq!(status()["reloads"]["applied"], 1);
}

/// Reads metrics in the format named first, as the official client library does, and
/// prints what it read.
const SCRAPER: &str = "
import sys
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics
reader = {'openmetrics': openmetrics, 'classic': parser}[sys.argv[1]]
for family in reader.text_string_to_metric_families(sys.stdin.read()):
    print(family.type, family.name, family.documentation)
    for sample in family.samples:
        print(sample.name, sorted(sample.labels.items()), float(sample.value))
";

fn scraped(format: &str, text: &str) -> String {
    let mut scraper = Command::new("/usr/bin/python3")
        .args(["-c", SCRAPER, format])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = scraper.stdin.take().unwrap();
    input.write_all(text.as_bytes()).unwrap();
    drop(input);
    let output = scraper.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{format}: the Debian package python3-prometheus-client can't read\n{text}"
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn metrics_are_in_the_format_that_the_scraper_asks_for() {
    let server = socket("127.0.0.1");
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let folder = tempfile::tempdir().unwrap();
    let config = format!(
        "[admin]\nlisten = \"{admin}\"\n[[listener]]\nname = 'a \\ \"quoted\" name'\n\
         bind = [\"{listener}\"]\nupstream = \"u\"\nidle_timeout = \"1h\"\n\
         [upstream.u]\nservers = [\"{}\"]\nhealth = {{ every = \"1h\" }}\n",
        server.local_addr().unwrap()
    );
    let _proxy = proxy_with(&folder, &config);
    served(&socket("127.0.0.1"), listener, &server);
    let metrics = |accept: &str| {
        let (head, text) = http_whole(admin, "GET /metrics", accept);
        let kind = head
            .lines()
            .find_map(|line| line.strip_prefix("content-type: "));
        (kind.unwrap().to_owned(), text)
    };
    let name = "ppv2_reply_datagrams_total{listener=\"a \\\\ \\\"quoted\\\" name\"}";
    eventually("the reply to be counted", || metric(admin, name) == 1);

    let (kind, text) = metrics("accept: application/openmetrics-text;q=0.6,text/plain;q=0.5\r\n");
    assert!(
        kind.starts_with("application/openmetrics-text; version=1.0.0"),
        "{kind}"
    );
    let open_metrics = scraped("openmetrics", &text);
    assert!(
        open_metrics.contains("counter ppv2_reply_datagrams "),
        "{open_metrics}"
    );
    for accept in [
        "",
        "accept: text/plain;version=0.0.4\r\n",
        "accept: */*\r\n",
    ] {
        let (kind, text) = metrics(accept);
        assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
        // The names of families, their types and all samples.
        assert_eq!(scraped("classic", &text), open_metrics);
    }
}

#[test]
fn sessions_are_listed_page_by_page_each_once() {
    let server = socket("127.0.0.1");
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let more = ["--workers", "2", "--admin", &admin.to_string()];
    let _proxy = proxy_between(listener, server.local_addr().unwrap(), &more);
    let clients: Vec<_> = (0..25).map(|_| socket("127.0.0.1")).collect();
    for client in &clients {
        client.send_to(b"x", listener).unwrap();
        receive(&server);
    }
    let mut seen = HashSet::new();
    let mut path = "/sessions?limit=10".to_owned();
    let mut pages = 0;
    loop {
        let (status, body) = http_get(admin, &path);
        assert_eq!(status, 200);
        let page: serde_json::Value = serde_json::from_str(&body).unwrap();
        let sessions = page["sessions"].as_array().unwrap();
        assert!(sessions.len() <= 10);
        for session in sessions {
            assert_eq!(session["local"], listener.to_string());
            assert_eq!(session["listener"], "listener1");
            assert_eq!(session["server"], server.local_addr().unwrap().to_string());
            assert_eq!(
                (&session["requests"], &session["replies"]),
                (&1.into(), &0.into())
            );
            assert!(seen.insert(session["client"].as_str().unwrap().to_owned()));
        }
        pages += 1;
        match page["next"].as_str() {
            Some(next) => path = format!("/sessions?limit=10&after={next}"),
            None => break,
        }
    }
    assert_eq!(pages, 3);
    let expected: HashSet<_> = clients
        .iter()
        .map(|client| client.local_addr().unwrap().to_string())
        .collect();
    assert_eq!(seen, expected);
    for bad in [
        "/sessions?after=x",
        "/sessions?limit=x",
        "/sessions?limit=-1",
    ] {
        assert_eq!(http_get(admin, bad).0, 400, "{bad}");
    }
}

#[test]
fn json_logs_hold_no_client_address() {
    let server = socket("127.0.0.1");
    let listener = address("127.0.0.1");
    let more = ["--log-format", "json", "--log-level", "debug"];
    let mut proxy = proxy_between(listener, server.local_addr().unwrap(), &more);
    let client = socket("127.0.0.66");
    client.send_to(b"x", listener).unwrap();
    receive(&server);
    proxy.signal("TERM");
    let (_, log) = proxy.wait();
    let lines: Vec<serde_json::Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}")))
        .collect();
    assert!(lines.iter().any(|line| line["message"] == "ready"), "{log}");
    assert!(!log.contains("127.0.0.66"), "{log}");
}

#[test]
fn idle_connections_displace_neither_sessions_nor_requests() {
    let server = socket("127.0.0.1");
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    // Of 120 descriptors, more than the connections below would take, some 50
    // are left to sessions.
    let script = format!(
        "ulimit -n 120; exec \"$0\" run --workers 1 \
         --listen {listener} --upstream {} --admin {admin}",
        server.local_addr().unwrap()
    );
    let mut proxy = Process::start(Command::new("sh").args(["-c", &script]).arg(binary()));
    proxy.wait_for("ready");
    let mut idle: Vec<_> = (0..200)
        .map(|_| TcpStream::connect(admin).unwrap())
        .collect();
    // Some ask a little, though never enough.
    for stream in idle.iter_mut().step_by(2) {
        stream.write_all(b"GET /healthz HTTP/1.1\r\n").unwrap();
    }
    let descriptors = format!("/proc/{}/fd", proxy.pid());
    let open = || std::fs::read_dir(&descriptors).unwrap().count();
    eventually("connections to be accepted", || open() > 32);
    let clients: Vec<_> = (0..45).map(|_| socket("127.0.0.1")).collect();
    for client in &clients {
        client.send_to(b"question", listener).unwrap();
        let (_, session) = receive(&server);
        server.send_to(b"answer", session).unwrap();
        assert_eq!(receive(client), (b"answer".to_vec(), listener));
    }
    assert!(open() < 120);

    // The latest stay open, more than are served at once, so that one of them has to
    // make room.
    idle.drain(..160);
    assert_eq!(http_get(admin, "/healthz"), (200, "ok\n".to_owned()));
    assert!(!proxy.log().contains("can't accept"), "{}", proxy.log());
    assert_eq!(
        metric(admin, "ppv2_sessions{listener=\"listener1\"}"),
        clients.len() as u64
    );
}

#[test]
fn silent_connections_delay_no_request() {
    let server = socket("127.0.0.1");
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let more = ["--workers", "1", "--admin", &admin.to_string()];
    let _proxy = proxy_between(listener, server.local_addr().unwrap(), &more);
    // More than could all be waited for, 32 at a time and three seconds each.
    let mut silent: Vec<_> = (0..400)
        .map(|_| TcpStream::connect(admin).unwrap())
        .collect();
    // Some have asked once, and stay, unless they have had to make room by now.
    for stream in &mut silent[360..] {
        let _ = write!(stream, "GET / HTTP/1.1\r\nhost: {admin}\r\n\r\n");
    }
    assert_eq!(http_get(admin, "/healthz"), (200, "ok\n".to_owned()));
}

#[test]
fn browsers_get_a_page_that_loads_nothing_from_elsewhere() {
    let server = socket("127.0.0.1");
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let more = ["--workers", "1", "--admin", &admin.to_string()];
    let _proxy = proxy_between(listener, server.local_addr().unwrap(), &more);
    let html = "accept: text/html,application/xhtml+xml,*/*;q=0.8\r\n";
    let (head, page) = http_whole(admin, "GET /", html);
    assert!(head.contains("content-type: text/html"), "{head}");
    assert!(page.starts_with("<!doctype html>"), "{page}");
    // The policy forbids all of these.
    for forbidden in ["://", " style=", " onclick=", "<style", "<script>"] {
        assert!(!page.contains(forbidden), "{forbidden}");
    }
    let (head, list) = http_whole(admin, "GET /", "accept: */*\r\n");
    assert!(head.contains("content-type: text/plain"), "{head}");
    assert!(list.contains("/status"), "{list}");
    for (path, kind) in [
        ("/", "text/plain"),
        ("/page.js", "text/javascript"),
        ("/page.css", "text/css"),
        ("/icon.svg", "image/svg+xml"),
        ("/status", "application/json"),
        ("/metrics", "text/plain"),
        ("/nothing", "text/plain"),
    ] {
        let (head, _) = http_whole(admin, &format!("GET {path}"), "");
        for line in [
            &format!("content-type: {kind}"),
            "content-security-policy: default-src 'none'; script-src 'self'; ",
            "x-content-type-options: nosniff",
            "cross-origin-resource-policy: same-origin",
        ] {
            assert!(head.contains(line), "{path}: no {line} in {head}");
        }
    }
    // What other pages make a browser send.
    for origin in [
        "origin: https://evil.example\r\n",
        "sec-fetch-site: cross-site\r\n",
    ] {
        assert_eq!(http(admin, "POST /reload", origin).0, 403, "{origin}");
    }
}

#[test]
fn dns_rebinding_reads_nothing() {
    let server = socket("127.0.0.1");
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let more = ["--workers", "1", "--admin", &admin.to_string()];
    let _proxy = proxy_between(listener, server.local_addr().unwrap(), &more);
    let status = |request: &str, host: &str| {
        let mut stream = TcpStream::connect(admin).unwrap();
        write!(stream, "{request} HTTP/1.1\r\n{host}\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer["HTTP/1.1 ".len()..][..3].parse::<u16>().unwrap()
    };
    let page = format!("host: evil.example:{}\r\n", admin.port());
    for request in [
        "GET /sessions",
        "GET /upstreams",
        "GET /",
        "POST /reload",
        "POST /drain?upstream=u&server=s",
    ] {
        assert_eq!(status(request, &page), 421, "{request}");
    }
    let both = format!("host: {admin}\r\n{page}");
    assert_eq!(status("GET /sessions", &both), 421);
    let own = format!("host: localhost:{}\r\n", admin.port());
    for host in [&own, &format!("host: {admin}\r\n"), ""] {
        assert_eq!(status("GET /sessions", host), 200, "{host}");
    }
    // Monitors may use a name.
    for path in ["/metrics", "/healthz", "/readyz"] {
        assert_eq!(status(&format!("GET {path}"), &page), 200, "{path}");
    }
}

#[test]
fn changes_need_the_token_if_there_is_one() {
    let server = socket("127.0.0.1");
    let upstream = server.local_addr().unwrap();
    let (listener, admin) = (address("127.0.0.1"), address("127.0.0.1"));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, "0123456789abcdef0123\n").unwrap();
    let mode = |mode| {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        std::fs::set_permissions(&file, mode).unwrap();
    };
    let config = format!(
        "[admin]\nlisten = \"{admin}\"\ntoken_file = \"{}\"\n\
         [[listener]]\nbind = [\"{listener}\"]\nupstream = \"u\"\n[upstream.u]\nservers = [\"{upstream}\"]\n",
        file.display()
    );
    mode(0o604);
    let path = write(&folder, "proxy.toml", &config);
    let (code, _, said) = output(&["check", "--config", path.to_str().unwrap()]);
    assert_eq!(code, Some(2), "{said}");
    let why = "can be used by everybody (mode 604)";
    assert!(said.contains(why), "{said}");
    assert!(!said.contains("0123456789abcdef"), "{said}");

    mode(0o640);
    let _proxy = proxy_with(&folder, &config);
    let post = |path: &str, more: &str| {
        let mut stream = TcpStream::connect(admin).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        let request =
            format!("POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n{more}\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    for path in [
        "/",
        "/page.js",
        "/status",
        "/upstreams",
        "/sessions",
        "/clients",
    ] {
        assert_eq!(http_get(admin, path).0, 200, "{path}");
    }
    let drain = format!("/drain?upstream=u&server={upstream}");
    for path in ["/reload", &drain, "/undrain?upstream=u&server=x"] {
        for credentials in [
            "",
            "Authorization: Bearer \r\n",
            "Authorization: Bearer 0123456789abcdef012\r\n",
            "Authorization: Bearer 0123456789abcdef0124\r\n",
            "Authorization: Basic 0123456789abcdef0123\r\n",
        ] {
            let answer = post(path, credentials);
            assert!(answer.starts_with("HTTP/1.1 401 "), "{path}: {answer}");
            assert!(answer.contains("www-authenticate: Bearer"), "{answer}");
            assert!(!answer.contains("0123456789abcdef"), "{answer}");
        }
    }
    let right = "Authorization: Bearer 0123456789abcdef0123\r\n";
    assert!(post(&drain, right).starts_with("HTTP/1.1 200 "));
    // A page of a browser can't have the right to it either.
    let of_page = format!("{right}Origin: http://localhost\r\n");
    assert!(post("/reload", &of_page).starts_with("HTTP/1.1 403 "));
    // What changes nothing is for all who reach the address.
    for path in ["/metrics", "/healthz", "/readyz", "/upstreams", "/sessions"] {
        assert_eq!(http_get(admin, path).0, 200, "{path}");
    }
}
